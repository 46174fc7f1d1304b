"""The allocators: how types are chosen.

* ``fisher``: the exact knapsack over Fisher sensitivity x measured error; with a score weight, layer scores (NSDS)
  multiply the sensitivities of a layer's tensors.
* ``nsds``: the same with sensitivities typical of roles, times NSDS: one read of the weights, no text.
* ``paper``: whole layers by their score, the most sensitive ones at 4 bits, the rest at 2 (arXiv 2603.17354).
* ``random``: random types within the budget, the baseline.
* ``uniform``: one type for every matrix; also the plain converter to F32, F16, BF16 and Q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import PlanError, RecordError
from ..llamacpp import ggml
from ..records import Recipe, Scores, TensorCost
from .candidates import Candidate, fitting_type
from .knapsack import Choices, solve
from .random_types import random_types

# Which type to take of several with about the same divergence.
PREFERENCES = {"quality": "the one with the least divergence", "fast": "one with fast CPU kernels in ggml"}

# A slow type is still taken where fast ones have more divergence by this share, about the error of a prediction. On the
# plans measured this costs at most 4.3 % in all (docs/log.md, 2026-11-25).
FAST_MARGIN = 0.2

PAPER_TYPES = ("Q2_K", "Q4_K")  # the paper's 2 and 4 bits


@dataclass(frozen=True)
class Problem:
    """The input of an allocator.

    Attributes:
        candidates: the types open to each tensor, in file order.
        budget: bytes allowed; ``None`` without a budget.
        padded: whether padding counts against the budget.
        scores: layer scores and tensor costs, where known.
        recipe: the settled options.

    """

    candidates: tuple[Candidate, ...]
    budget: int | None
    padded: bool
    scores: Scores | None
    recipe: Recipe


@dataclass(frozen=True)
class Choice:
    """The output of an allocator: a type per tensor, the proven gap where one is known, notes."""

    types: tuple[str, ...]
    gap: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Allocator:
    """An entry of ``ALLOCATORS``.

    Attributes:
        choose: chooses the types.
        description: one line for ``--help``.
        reason: why a tensor has its type, in a word.
        needs_costs: whether it reads sensitivities and measured errors; layer scores then multiply the sensitivities
            where the recipe gives them a weight.
        by_role: whether those sensitivities are typical of roles, not found by a pass over tokens.
        needs_layers: whether it always reads layer scores.
        needs_target: whether it needs a budget.
        types: the types that it chooses from; ``None`` for those of the recipe.
        score_weight: weight of layer scores where the user gives none.

    """

    choose: Callable[[Problem], Choice]
    description: str
    reason: str
    needs_costs: bool = False
    by_role: bool = False
    needs_layers: bool = False
    needs_target: bool = True
    types: tuple[str, ...] | None = None
    score_weight: float = 0.0

    @property
    def predicts(self) -> bool:
        """Whether it predicts divergence in nats, from a pass over tokens."""
        return self.needs_costs and not self.by_role

    def uses_layers(self, score_weight: float) -> bool:
        """Return whether layer scores affect the choice."""
        return self.needs_layers or (self.needs_costs and score_weight != 0)


def allocate_fisher(problem: Problem) -> Choice:
    """Minimize predicted divergence within the budget, exactly; without a budget, take the largest types."""
    costs = _checked_costs(problem)
    factors = layer_factors(problem.scores, problem.recipe.score_weight)
    prefers_fast = problem.recipe.prefer == "fast"
    items = [_choices(candidate, costs, factors, problem.padded, prefers_fast) for candidate in problem.candidates]
    budget = sum(max(item.bytes) for item in items) if problem.budget is None else problem.budget
    solution = solve(items, budget)
    types = tuple(c.types[j] for c, j in zip(problem.candidates, solution.chosen, strict=True))
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
    margins = [1 + FAST_MARGIN if prefers_fast and not ggml.TYPES[name].is_fast else 1.0 for name in candidate.types]
    divergences = (weight * cost.errors[name] for name in candidate.types)
    return Choices(sizes, tuple(d * margin for d, margin in zip(divergences, margins, strict=True)))


def allocate_paper(problem: Problem) -> Choice:
    """Give as many of the most sensitive layers 4 bits as the budget holds, and the rest 2.

    Embedding and output, which the paper leaves out, also get 4 bits, or 2 when the budget is too small for that.
    """
    if problem.scores is None or not problem.scores.layers:
        raise PlanError("allocator paper needs layer scores")
    order = [layer.layer for layer in sorted(problem.scores.layers, key=lambda layer: (-layer.score, layer.layer))]
    notes: tuple[str, ...] = ()
    for outside_at in (1, 0):
        for n_high in range(len(order), -1, -1):
            high = set(order[:n_high])
            types = tuple(_paper_type(c, high, bool(outside_at)) for c in problem.candidates)
            if _fits(problem, types):
                return Choice(types, None, (*notes, f"{n_high} of {len(order)} layers are at 4 bits."))
        notes = ("Embedding and output are at 2 bits: at 4 bits they leave too little for the layers.",)
    raise PlanError(f"allocator paper cannot meet {problem.recipe.target}: all layers at 2 bits exceed it")


def _paper_type(candidate: Candidate, high: set[int], outside_high: bool) -> str:
    if not candidate.is_open:
        return candidate.types[0]
    layer = candidate.tensor.layer
    is_high = outside_high if layer is None else layer in high
    return fitting_type(PAPER_TYPES[is_high], candidate)


def allocate_uniform(problem: Problem) -> Choice:
    """Give every matrix one type, except fixed types and fallbacks; raise ``PlanError`` beyond the target."""
    wanted = problem.recipe.types[0]
    types = tuple(fitting_type(wanted, c) if c.is_open else c.types[0] for c in problem.candidates)
    if not _fits(problem, types):
        raise PlanError(
            f"--uniform {wanted} takes {_used(problem, types)} bytes of tensors, the target {problem.recipe.target} "
            f"allows {max(problem.budget or 0, 0)}; raise or drop the target, or choose a smaller type"
        )
    return Choice(types)


def allocate_random(problem: Problem) -> Choice:
    """Give every matrix a random type within the budget: the baseline to beat."""
    seed = problem.recipe.allocation_seed
    types = random_types(problem.candidates, problem.budget, problem.padded, seed)
    return Choice(types, None, (f"The types are random, seed {seed}.",))


ALLOCATORS: dict[str, Allocator] = {
    "fisher": Allocator(
        allocate_fisher,
        "least predicted divergence: Fisher sensitivity times measured error, solved exactly",
        reason="optimum",
        needs_costs=True,
    ),
    "nsds": Allocator(
        allocate_fisher,
        "like fisher, with sensitivities typical of roles times NSDS: one read of the weights, no text",
        reason="optimum",
        needs_costs=True,
        by_role=True,
        needs_layers=True,
        score_weight=1.0,
    ),
    "paper": Allocator(
        allocate_paper,
        "whole layers at 4 or 2 bits by their NSDS score, as in the paper",
        reason="paper",
        needs_layers=True,
        types=PAPER_TYPES,
    ),
    "random": Allocator(allocate_random, "random types, the baseline", reason="random"),
    "uniform": Allocator(allocate_uniform, "one type for every matrix", reason="uniform", needs_target=False),
}


def decided_by(recipe: Recipe) -> tuple[str, ...]:
    """Return what decides the types of a plan: ``fisher``, ``nsds`` (or another layer metric), ``random``, a type."""
    allocator = ALLOCATORS[recipe.allocator]
    if recipe.allocator == "uniform":
        return (recipe.types[0],)
    own = () if allocator.needs_layers else (recipe.allocator,)
    uses_layers = recipe.metric is not None and allocator.uses_layers(recipe.score_weight)
    return (*own, str(recipe.metric)) if uses_layers else own


def layer_factors(scores: Scores | None, weight: float) -> dict[int | None, float]:
    """Return the factor of each layer on its tensors' sensitivity, ``exp(weight (S - mean S))``.

    Scores of metrics other than ``nsds`` are first mapped onto [0, 1], smallest to 0 and largest to 1.
    """
    if scores is None or not scores.layers or not weight:
        return {}
    values = [layer.score for layer in scores.layers]
    if scores.recipe.metric != "nsds":
        low, span = min(values), max(values) - min(values)
        values = [(value - low) / span if span > 0 else 0.0 for value in values]
    mean = sum(values) / len(values)
    return {layer.layer: math.exp(weight * (value - mean)) for layer, value in zip(scores.layers, values, strict=True)}


def _used(problem: Problem, types: tuple[str, ...]) -> int:
    return sum(c.cost(name, problem.padded) for c, name in zip(problem.candidates, types, strict=True))


def _fits(problem: Problem, types: tuple[str, ...]) -> bool:
    return problem.budget is None or _used(problem, types) <= problem.budget


def _checked_costs(problem: Problem) -> dict[str, TensorCost]:
    """Return the costs by tensor name; raise ``RecordError`` when they do not cover the problem."""
    scores, recipe = problem.scores, problem.recipe
    if scores is None or not scores.costs:
        raise RecordError("the scores hold no tensor costs; score again without --layers-only")
    for name in ("calibration", "rounding"):
        measured, planned = getattr(scores.recipe, name), getattr(recipe, name)
        if measured != planned:
            remedy = "that file with --imatrix" if measured.startswith("imatrix:") else f"--{name} {measured}"
            raise RecordError(
                f"the scores were measured with {name} {measured}, the plan uses {planned}; score again or pass "
                f"{remedy}"
            )
    if ALLOCATORS[scores.recipe.allocator].by_role != ALLOCATORS[recipe.allocator].by_role:
        raise RecordError(
            f"the scores hold sensitivities of allocator {scores.recipe.allocator}, the plan uses {recipe.allocator}; "
            "drop --scores or --allocator"
        )
    if recipe.score_weight and not scores.layers:
        raise RecordError("the scores hold no layer scores for --score-weight; score again with --score-weight")
    costs = {cost.name: cost for cost in scores.costs}
    for candidate in problem.candidates:
        name = candidate.tensor.name
        errors = costs[name].errors if name in costs else {}
        unmeasured = [type_name for type_name in candidate.types if type_name not in errors]
        if candidate.is_open and unmeasured:
            raise RecordError(
                f"the scores hold no error of {name} at {', '.join(unmeasured)}; score again with --types"
            )
    return costs
