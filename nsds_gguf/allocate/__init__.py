"""Stage 3, allocate: scores and costs become a ``Plan``, one quantization type per tensor within the budget.

Allocators are functions in ``ALLOCATORS``; each gets a ``Problem`` and returns one type per tensor.

* ``nsds``: the exact knapsack over sensitivity x measured error (``sensitivity``, ``measurement``, ``knapsack``),
  if asked with the layer score as a factor on the tensors of its layer.
* ``paper``: whole layers, the most sensitive fraction at 4 bit, the rest at 2 (arXiv 2603.17354).
* ``random``: types drawn at random within the budget: what knowing nothing is worth.
* ``uniform``: one type for every matrix; also the plain converter to F32, F16, BF16 and Q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..calibration.imatrix import IMATRIX
from ..errors import PlanError, RecordError
from ..llamacpp import ggml
from ..records import (
    EFFORTS,
    SELF,
    UNQUANTIZED,
    Model,
    Plan,
    PlannedTensor,
    Scores,
    Target,
    TensorCost,
)
from ..sensitivity.result import IMPORTANCES
from .candidates import (
    FALLBACKS,
    LAST_RESORT,
    Candidate,
    Pin,
    budget_bytes,
    candidates,
    check_target,
    check_type,
    nearest_bpw,
)
from .knapsack import Choices, solve
from .measurement import measure
from .random_types import random_types

__all__ = [
    "ALLOCATORS",
    "DEFAULT_TYPES",
    "PREFERENCES",
    "SCORE_WEIGHT",
    "Candidate",
    "Pin",
    "PlanOptions",
    "candidates",
    "check_options",
    "check_type",
    "fitting_type",
    "make_plan",
    "measure",
    "nearest_bpw",
    "open_candidates",
]  # fmt: skip

DEFAULT_TYPES = ggml.K_TYPES

PAPER_TYPES = ("Q2_K", "Q4_K")  # the paper's 2 and 4 bits

# Weight of the layer score in the exponent of the layer factor: beside the Fisher information, no score of layers has
# been found to improve plans (docs/log.md, 2026-11-25).
SCORE_WEIGHT = 0.0


# Importances whose source gives full second moments too, for feedback from column to column.
FULL_IMPORTANCES = ("sweep", SELF)

# What decides between types that cost about the same: nothing else, or ggml's speed on a CPU.
PREFERENCES = ("quality", "fast")

# A slow type is taken all the same where the fast ones give this share more divergence: about what a prediction may be
# off by. On the plans measured it costs at most 4.3 % in all (docs/log.md, 2026-11-25).
FAST_MARGIN = 0.2


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked of the allocator.

    ``uniform`` is the type of the allocator of that name, ``seed`` that of ``random``; ``prefer``, one of
    ``PREFERENCES``, is heard by ``nsds``; ``effort``, one of ``records.EFFORTS``, says how weights are rounded,
    ``score_weight`` how much the layer score counts.
    """

    target: Target
    allocator: str = "nsds"
    types: tuple[str, ...] = DEFAULT_TYPES
    uniform: str | None = None
    pins: tuple[Pin, ...] = ()
    importance: str = "sweep"
    seed: int = 0
    prefer: str = "quality"
    effort: str = "normal"
    score_weight: float = SCORE_WEIGHT

    @property
    def allowed_types(self) -> tuple[str, ...]:
        """Types that the allocator may use where rows allow it; raises ``PlanError`` for ``uniform`` without a type."""
        if self.allocator == "paper":
            return PAPER_TYPES
        if self.allocator == "uniform":
            if self.uniform is None:
                raise PlanError("allocator uniform needs a type: --uniform TYPE")
            return (self.uniform,)
        return self.types


@dataclass(frozen=True)
class Problem:
    """What an allocator gets: the open types in file order, the bytes allowed (``None``: no budget), the scores."""

    found: tuple[Candidate, ...]
    budget: int | None
    padded: bool
    scores: Scores | None
    options: PlanOptions


@dataclass(frozen=True)
class Choice:
    """What an allocator returns: a type per tensor, the proven gap where something was solved, notes."""

    types: tuple[str, ...]
    gap: float | None = None
    notes: tuple[str, ...] = ()


def allocate_nsds(problem: Problem) -> Choice:
    """Minimise predicted divergence within the budget, exactly; without a budget, take the largest types."""
    costs = _checked_costs(problem)
    factors = layer_factors(problem.scores, problem.options.score_weight)
    prefers_fast = problem.options.prefer == "fast"
    items = [_choices(candidate, costs, factors, problem.padded, prefers_fast) for candidate in problem.found]
    budget = sum(max(item.bytes) for item in items) if problem.budget is None else problem.budget
    solution = solve(items, budget)
    types = tuple(c.types[j] for c, j in zip(problem.found, solution.chosen, strict=True))
    return Choice(types, solution.gap)


def _choices(
    candidate: Candidate,
    costs: Mapping[str, TensorCost],
    factors: Mapping[int | None, float],
    padded: bool,
    prefers_fast: bool,
) -> Choices:
    sizes = tuple(candidate.cost(name, padded) for name in candidate.types)
    if not candidate.is_open:
        return Choices(sizes, (0.0,))
    cost = costs[candidate.tensor.name]
    weight = cost.sensitivity * factors.get(candidate.tensor.layer, 1.0)
    margins = [1 + FAST_MARGIN if prefers_fast and name not in ggml.FAST_TYPES else 1.0 for name in candidate.types]
    divergences = (weight * cost.errors[name] for name in candidate.types)
    return Choices(sizes, tuple(d * margin for d, margin in zip(divergences, margins, strict=True)))


def allocate_paper(problem: Problem) -> Choice:
    """Give the most sensitive layers 4 bits and the rest 2, as many as the budget holds.

    Embedding and output, which the paper leaves out, get 4 bits too, or 2 when the budget is too small for that.
    """
    if problem.scores is None:
        raise PlanError("allocator paper needs layer scores")
    order = [layer.layer for layer in sorted(problem.scores.layers, key=lambda layer: (-layer.score, layer.layer))]
    notes: tuple[str, ...] = ()
    for outside_at in (1, 0):
        for n_high in range(len(order), -1, -1):
            high = set(order[:n_high])
            types = tuple(_paper_type(c, high, bool(outside_at)) for c in problem.found)
            used = sum(c.cost(name, problem.padded) for c, name in zip(problem.found, types, strict=True))
            if problem.budget is None or used <= problem.budget:
                return Choice(types, None, (*notes, f"{n_high} of {len(order)} layers are at 4 bit."))
        notes = ("Embedding and output are at 2 bit: at 4 bit they alone leave too little.",)
    raise PlanError(f"allocator paper cannot meet {problem.options.target}: all layers at 2 bit are larger")


def _paper_type(candidate: Candidate, high: set[int], outside_high: bool) -> str:
    if not candidate.is_open:
        return candidate.types[0]
    layer = candidate.tensor.layer
    is_high = outside_high if layer is None else layer in high
    return fitting_type(PAPER_TYPES[is_high], candidate)


def allocate_uniform(problem: Problem) -> Choice:
    """Give every matrix one type, pins and fallbacks apart; raises ``PlanError`` when that misses the target."""
    wanted = problem.options.allowed_types[0]
    types = tuple(fitting_type(wanted, c) if c.is_open else c.types[0] for c in problem.found)
    used = sum(c.cost(name, problem.padded) for c, name in zip(problem.found, types, strict=True))
    if problem.budget is not None and used > problem.budget:
        raise PlanError(
            f"--uniform {wanted} takes {used} bytes of tensors, the target {problem.options.target} allows "
            f"{max(problem.budget, 0)}; raise or drop the target, or choose a smaller type"
        )
    return Choice(types)


def fitting_type(wanted: str, candidate: Candidate) -> str:
    """Return the type, or what takes its place when the rows do not fit it."""
    n_cols = candidate.tensor.n_cols
    return next((name for name in (wanted, FALLBACKS.get(wanted, wanted)) if ggml.fits(name, n_cols)), LAST_RESORT)


def allocate_random(problem: Problem) -> Choice:
    """Give every matrix a random type within the budget: the baseline that any knowledge has to beat."""
    seed = problem.options.seed
    types = random_types(problem.found, problem.budget, problem.padded, seed)
    return Choice(types, None, (f"The types are random, seed {seed}.",))


Allocator = Callable[[Problem], Choice]
ALLOCATORS: dict[str, Allocator] = {
    "nsds": allocate_nsds,
    "paper": allocate_paper,
    "random": allocate_random,
    "uniform": allocate_uniform,
}


def check_options(options: PlanOptions) -> None:
    """Raise ``PlanError`` for options that no model could satisfy."""
    if options.allocator not in ALLOCATORS:
        raise PlanError(f"allocator {options.allocator!r} is not known; wanted one of {', '.join(ALLOCATORS)}")
    known = (*IMPORTANCES, SELF)
    if options.importance not in known and not options.importance.startswith(IMATRIX):
        raise PlanError(f"importance {options.importance!r} is not known; wanted one of {', '.join(known)}")
    if options.prefer not in PREFERENCES:
        raise PlanError(f"preference {options.prefer!r} is not known; wanted one of {', '.join(PREFERENCES)}")
    if not math.isfinite(options.score_weight):
        raise PlanError(f"score weight {options.score_weight}: wanted a number")
    if options.effort not in EFFORTS:
        raise PlanError(f"effort {options.effort!r} is not known; wanted one of {', '.join(EFFORTS)}")
    if options.effort == "high" and options.importance not in FULL_IMPORTANCES:
        raise PlanError(
            f"--effort high needs more of what matrices multiply than importance {options.importance} holds; wanted "
            f"importance {' or '.join(FULL_IMPORTANCES)}"
        )
    for name in options.allowed_types:
        check_type(name, "--uniform" if options.allocator == "uniform" else "--types")
    if options.allocator != "uniform" and options.target.kind == "none":
        raise PlanError(f"allocator {options.allocator} needs a target: --target-bpw or --target-size")
    if options.target.kind != "none" and not (math.isfinite(options.target.value) and options.target.value > 0):
        raise PlanError(f"target {options.target}: wanted a positive number")


def open_candidates(model: Model, options: PlanOptions, header_bytes: int) -> list[Candidate]:
    """Return the types open to each tensor, after checking that the target can be met at all.

    Raises ``PlanError`` for impossible pins and ``TargetError`` for a target below the floor.
    """
    check_options(options)
    found = candidates(model, options.allowed_types, options.pins)
    if options.allocator != "uniform":
        check_target(found, options.target, header_bytes)
    return found


def make_plan(model: Model, scores: Scores | None, options: PlanOptions, header_bytes: int) -> Plan:
    """Choose a type for every tensor.

    Args:
        model: the opened model.
        scores: layer scores, with costs for the ``nsds`` allocator; ``uniform`` needs none.
        options: the budget and how to spend it.
        header_bytes: bytes of the file before the tensor data.

    Returns:
        The plan; its bytes never exceed the target.

    Raises:
        PlanError: contradicting options; ``TargetError`` when the target is below the floor.
        RecordError: the scores belong to another model or lack what the allocator needs.

    """
    found = open_candidates(model, options, header_bytes)
    if scores is not None and scores.model_id != model.model_id:
        raise RecordError(f"scores are of another model ({scores.model_name}); score {model.name} again")
    budget = budget_bytes(options.target, model.n_weights, header_bytes)
    problem = Problem(tuple(found), budget, options.target.kind == "size", scores, options)
    choice = ALLOCATORS[options.allocator](problem)
    costs = {cost.name: cost for cost in scores.costs} if scores else {}
    factors = layer_factors(scores, options.score_weight)
    plan = Plan(
        allocator=options.allocator,
        target=options.target,
        types=options.allowed_types,
        importance=options.importance,
        tensors=tuple(_planned(c, t, options, costs, factors) for c, t in zip(found, choice.types, strict=True)),
        header_bytes=header_bytes,
        model_id=model.model_id,
        model_name=model.name,
        metric=scores.metric if scores else None,
        gap=choice.gap,
        effort=options.effort,
        score_weight=options.score_weight,
        notes=(*model.notes, *(scores.notes if scores else ()), *choice.notes),
        scores_digest=scores.digest if scores else "",
        versions=dict(scores.versions) if scores else {},
    )
    return replace(plan, notes=(*plan.notes, *_plan_notes(plan, found), *_speed_note(plan, options)))


def layer_factors(scores: Scores | None, weight: float) -> dict[int | None, float]:
    """Return the factor of each layer on its tensors' sensitivity, ``exp(weight (S - mean S))``.

    Scores of metrics that are not in [0, 1] are first mapped onto it, smallest to 0 and largest to 1.
    """
    if scores is None or not scores.layers or not weight:
        return {}
    values = [layer.score for layer in scores.layers]
    if scores.metric != "nsds":
        low, span = min(values), max(values) - min(values)
        values = [(value - low) / span if span > 0 else 0.0 for value in values]
    mean = sum(values) / len(values)
    return {layer.layer: math.exp(weight * (value - mean)) for layer, value in zip(scores.layers, values, strict=True)}


def _checked_costs(problem: Problem) -> dict[str, TensorCost]:
    """Return the costs by tensor name; raises ``RecordError`` when they do not cover the problem."""
    scores, asked = problem.scores, problem.options.importance
    if scores is None or not scores.costs:
        raise RecordError("the scores hold no tensor costs; score again without --layers-only")
    if scores.importance != asked:
        made_with = str(scores.importance)
        pass_it = "pass that file with --imatrix" if made_with.startswith(IMATRIX) else f"pass --importance {made_with}"
        raise RecordError(
            f"the scores were measured with importance {made_with}, the plan asks for {asked}; score again or {pass_it}"
        )
    if scores.effort != problem.options.effort:
        raise RecordError(
            f"the scores were measured with --effort {scores.effort}, the plan asks for {problem.options.effort}; "
            f"score again or pass --effort {scores.effort}"
        )
    costs = {cost.name: cost for cost in scores.costs}
    for candidate in problem.found:
        name = candidate.tensor.name
        known = costs[name].errors if name in costs else {}
        lacking = [type_name for type_name in candidate.types if type_name not in known]
        if candidate.is_open and lacking:
            raise RecordError(f"the scores hold no error of {name} at {', '.join(lacking)}; score again with --types")
    return costs


def _planned(
    candidate: Candidate,
    type_name: str,
    options: PlanOptions,
    costs: Mapping[str, TensorCost],
    factors: Mapping[int | None, float],
) -> PlannedTensor:
    tensor = candidate.tensor
    cost = costs.get(tensor.name)
    measured = cost is not None and type_name in cost.errors
    return PlannedTensor(
        name=tensor.name,
        role=tensor.role,
        layer=tensor.layer,
        shape=tensor.shape,
        type=type_name,
        n_bytes=candidate.n_bytes(type_name),
        reason=candidate.reason or ("optimum" if options.allocator == "nsds" else options.allocator),
        error=cost.errors[type_name] if cost and measured else None,
        error_stderr=cost.stderr[type_name] if cost and measured else None,
        n_rows_sampled=cost.n_rows_sampled if cost and measured else None,
        sensitivity=cost.sensitivity * factors.get(tensor.layer, 1.0) if cost else None,
    )


def _speed_note(plan: Plan, options: PlanOptions) -> tuple[str, ...]:
    """Return which tensors are of types without fast kernels, to who prefers fast ones."""
    if options.prefer != "fast":
        return ()
    slow = [t for t in plan.tensors if t.type not in (*ggml.FAST_TYPES, *UNQUANTIZED)]
    if not slow:
        return ("Every quantized tensor is of a type that ggml has fast CPU kernels for.",)
    share = sum(t.n_weights for t in slow) / plan.n_weights
    types = ", ".join(sorted({t.type for t in slow}))
    names = ", ".join(t.name for t in slow)
    return (f"Of slow types ({types}), for which ggml has no fast CPU kernels, are {len(slow)} tensors with "
            f"{100 * share:.0f} % of the weights: {names}.",)  # fmt: skip


def _plan_notes(plan: Plan, found: Sequence[Candidate]) -> list[str]:
    """Return what the user must see about the plan itself."""
    notes = []
    ceiling = sum(c.n_bytes(c.types[-1]) for c in found)
    if plan.allocator == "nsds" and plan.target.kind != "none" and plan.tensor_bytes == ceiling:
        largest = max((c.types[-1] for c in found if c.is_open), key=ggml.bits_per_weight, default="F32")
        notes.append(f"The target {plan.target} is above what the types can use: every tensor is at its largest type"
                     f" ({largest}); widen --types to use the rest.")  # fmt: skip
    fallbacks = [t for t in plan.tensors if t.reason.startswith("fallback") and t.type not in UNQUANTIZED]
    if fallbacks:
        share = sum(t.n_weights for t in fallbacks) / plan.n_weights
        notes.append(f"{len(fallbacks)} tensors ({100 * share:.0f} % of the weights) have rows that are no multiple"
                     " of 256 and use types with blocks of 32.")  # fmt: skip
    unblocked = [t for t in plan.tensors if t.reason.startswith("fallback") and t.type in UNQUANTIZED]
    if unblocked:
        notes.append(f"{len(unblocked)} tensors have rows that no block divides and stay {LAST_RESORT}.")
    sampled = [t for t in plan.tensors if t.error and t.n_rows_sampled and t.error_stderr]
    if sampled:
        worst = max(t.error_stderr / t.error for t in sampled if t.error and t.error_stderr)
        rows = sum(t.n_rows_sampled or 0 for t in sampled)
        notes.append(f"Errors of {len(sampled)} large tensors are measured on {rows} sampled rows"
                     f" (largest standard error {100 * worst:.1f} %).")  # fmt: skip
    return notes
