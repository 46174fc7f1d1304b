"""From a recipe to a plan: checks, the allocator's choice, and notes for the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import PlanError, RecordError
from ..llamacpp import ggml
from ..records import UNQUANTIZED, Model, Plan, PlannedTensor, Recipe, Scores, TensorCost
from .allocators import ALLOCATORS, PREFERENCES, Problem, layer_factors
from .candidates import LAST_RESORT, Candidate, budget_bytes, candidates, check_target, check_type


def check_recipe(recipe: Recipe) -> None:
    """Raise ``PlanError`` for a recipe that no model can satisfy."""
    if recipe.allocator not in ALLOCATORS:
        raise PlanError(f"allocator {recipe.allocator!r} is not known; wanted one of {', '.join(ALLOCATORS)}")
    if recipe.prefer not in PREFERENCES:
        raise PlanError(f"preference {recipe.prefer!r} is not known; wanted one of {', '.join(PREFERENCES)}")
    if not math.isfinite(recipe.score_weight):
        raise PlanError(f"score weight {recipe.score_weight}: wanted a finite number")
    if not recipe.types:
        raise PlanError("--types: wanted at least one type")
    for name in recipe.types:
        check_type(name, "--uniform" if recipe.allocator == "uniform" else "--types")
    target = recipe.target
    if target is None:
        if ALLOCATORS[recipe.allocator].needs_target:
            raise PlanError(f"allocator {recipe.allocator} needs a target: --target-bpw or --target-size")
    elif not (math.isfinite(target.value) and target.value > 0):
        raise PlanError(f"target {target}: wanted a positive number")


def checked_candidates(model: Model, recipe: Recipe, header_bytes: int) -> list[Candidate]:
    """Return the types open to each tensor, after checking that the target is feasible.

    Raises ``PlanError`` for impossible fixed types and ``TargetError`` for a target below the floor.
    """
    check_recipe(recipe)
    found = candidates(model, recipe.types, recipe.tensor_types)
    if recipe.allocator != "uniform" and recipe.target is not None:
        check_target(found, recipe.target, header_bytes)
    return found


def make_plan(model: Model, scores: Scores | None, recipe: Recipe, header_bytes: int) -> Plan:
    """Choose a type for every tensor.

    Args:
        model: the opened model.
        scores: the layer scores and tensor costs that the allocator reads.
        recipe: the budget and how to spend it.
        header_bytes: bytes of the file before the tensor data.

    Returns:
        The plan; its bytes never exceed the target.

    Raises:
        PlanError: contradicting options; ``TargetError`` when the target is below the floor.
        RecordError: the scores belong to another model or do not hold what the allocator needs.

    """
    found = checked_candidates(model, recipe, header_bytes)
    if scores is not None and scores.model_id != model.model_id:
        raise RecordError(f"the scores belong to another model ({scores.model_name}); score {model.name} again")
    budget = budget_bytes(recipe.target, model.n_weights, header_bytes)
    padded = recipe.target is not None and recipe.target.kind == "size"
    allocator = ALLOCATORS[recipe.allocator]
    choice = allocator.choose(Problem(tuple(found), budget, padded, scores, recipe))
    costs = {cost.name: cost for cost in scores.costs} if scores else {}
    factors = layer_factors(scores, recipe.score_weight)
    plan = Plan(
        recipe=recipe,
        tensors=tuple(
            _planned(c, t, allocator.reason, costs, factors) for c, t in zip(found, choice.types, strict=True)
        ),
        header_bytes=header_bytes,
        model_id=model.model_id,
        model_name=model.name,
        gap=choice.gap,
        notes=(*model.notes, *(scores.notes if scores else ()), *choice.notes),
        scores_digest=scores.digest if scores else "",
        versions=dict(scores.versions) if scores else {},
    )
    return replace(plan, notes=(*plan.notes, *_plan_notes(plan, found), *_reader_notes(plan), *_speed_notes(plan)))


def _planned(
    candidate: Candidate,
    type_name: str,
    reason: str,
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
        kind=candidate.kind,
        reason=candidate.reason or reason,
        error=cost.errors[type_name] if cost and measured else None,
        error_stderr=cost.stderr[type_name] if cost and measured else None,
        n_rows_sampled=cost.n_rows_sampled if cost and measured else None,
        sensitivity=cost.sensitivity * factors.get(tensor.layer, 1.0) if cost else None,
        n_zeros=tensor.n_zeros,
    )


def _reader_notes(plan: Plan) -> tuple[str, ...]:
    """Return what reads the file, where not every program of today does."""
    new = [t for t in plan.tensors if t.type == "Q2_0"]
    if not new:
        return ()
    return (
        f"{len(new)} tensors are Q2_0, which llama.cpp has since July 2026: older builds, and programs that hold one, "
        "refuse the file. ARM CPUs, Metal, Vulkan and CUDA run it fast; x86 CPUs have no fast kernel.",
    )


def _speed_notes(plan: Plan) -> tuple[str, ...]:
    """Return which tensors have types without fast kernels, where the recipe prefers fast ones."""
    if plan.recipe.prefer != "fast":
        return ()
    slow = [t for t in plan.tensors if t.type not in UNQUANTIZED and not ggml.TYPES[t.type].is_fast]
    if not slow:
        return ("Every quantized tensor has a type with fast CPU kernels in ggml.",)
    share = sum(t.n_weights for t in slow) / plan.n_weights
    types = ", ".join(sorted({t.type for t in slow}))
    names = ", ".join(t.name for t in slow)
    return (
        f"{len(slow)} tensors with {100 * share:.0f} % of the weights have types ({types}) without fast CPU kernels in "
        f"ggml: {names}.",
    )


def _plan_notes(plan: Plan, found: Sequence[Candidate]) -> list[str]:
    """Return the notes on the plan itself."""
    notes = []
    ceiling = sum(c.n_bytes(c.types[-1]) for c in found)
    needs_costs = ALLOCATORS[plan.recipe.allocator].needs_costs
    if needs_costs and plan.recipe.target is not None and plan.tensor_bytes == ceiling:
        largest = max((c.types[-1] for c in found if c.is_open), key=ggml.bits_per_weight, default="F32")
        notes.append(
            f"The target {plan.recipe.target} exceeds what the types can use: every tensor has its largest type "
            f"({largest}); add larger --types to use the rest."
        )
    fallbacks = [t for t in plan.tensors if t.kind == "fallback"]
    narrow = [t for t in fallbacks if t.type not in UNQUANTIZED]
    if narrow:
        share = sum(t.n_weights for t in narrow) / plan.n_weights
        notes.append(
            f"{len(narrow)} tensors ({100 * share:.0f} % of the weights) have rows that are not a multiple of 256 and "
            "use types with blocks of 32."
        )
    unblocked = [t for t in fallbacks if t.type in UNQUANTIZED and t.shape[-1] % 32]
    if unblocked:
        notes.append(f"{len(unblocked)} tensors have rows that are not a multiple of 32 and stay {LAST_RESORT}.")
    sampled = [
        t for t in plan.tensors if t.error and t.n_rows_sampled and t.error_stderr and t.type not in ggml.FLOAT_TYPES
    ]
    if sampled:
        worst = max(t.error_stderr / t.error for t in sampled if t.error and t.error_stderr)
        rows = sum(t.n_rows_sampled or 0 for t in sampled)
        notes.append(
            f"Errors of {len(sampled)} large tensors are measured on {rows} sampled rows (largest standard error "
            f"{100 * worst:.1f} %)."
        )
    return notes
