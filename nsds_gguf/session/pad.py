"""Whether the files of a recipe are padded: as the user says, or as the budget requires."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..allocate import ALLOCATORS, candidates, nearest_bpw
from ..errors import PlanError
from ..quantize.header import header_bytes
from ..quantize.padding import WIDTH, laid_out, padded_width, padding_obstacle
from ..records import AUTO, Model, Recipe, Scores, Target

# Values of ``Options.pad``, and what each does.
PADDINGS: Mapping[str, str] = {
    AUTO: "pad if the budget is out of reach otherwise, or if padding adds little and lowers the predicted divergence",
    "on": "pad",
    "off": "never pad",
}

# Padding of a larger share of the width only serves budgets that are out of reach otherwise (docs/log.md, 2026-11-28).
LITTLE = 0.15


def settle_padding(wanted: str, model: Model, recipe: Recipe, scores: Scores | None) -> tuple[Recipe, Recipe | None]:
    """Return a recipe with its padding, and an alternative if both ways have to be planned.

    Args:
        wanted: key of ``PADDINGS``.
        model: the opened model.
        recipe: the recipe, without padding.
        scores: scores of an earlier run; tensors are laid out as those that they measured.

    Raises:
        PlanError: the user wants padding where the model cannot be padded, or other padding than the scores have.

    """
    if wanted not in PADDINGS:
        raise PlanError(f"padding {wanted!r} is not known; wanted one of {', '.join(PADDINGS)}")
    padded = replace(recipe, padding=WIDTH)
    obstacle = padding_obstacle(model)
    if wanted == "on" and obstacle:
        raise PlanError(f"--pad on: {model.name} cannot be padded: {obstacle}")
    if scores is not None and scores.costs and ALLOCATORS[recipe.allocator].needs_costs:
        measured = scores.recipe.padding
        if wanted != AUTO and (wanted == "on") != (measured is not None):
            raise PlanError(f"--pad {wanted}: the scores were measured {'with' if measured else 'without'} padding; "
                            "score again or drop the option")  # fmt: skip
        return replace(recipe, padding=measured), None
    if wanted != AUTO:
        return (padded if wanted == "on" else recipe), None
    target = recipe.target
    if obstacle or not ALLOCATORS[recipe.allocator].needs_costs or target is None or not math.isfinite(target.value):
        return recipe, None
    floor, padded_floor = _floor(model, recipe, target), _floor(model, padded, target)
    if floor > target.value:
        return (padded if padded_floor < floor else recipe), None
    is_little = padded_width(model) <= (1 + LITTLE) * model.hparams.n_embd
    return recipe, padded if is_little and padded_floor <= target.value else None


def _floor(model: Model, recipe: Recipe, target: Target) -> float:
    """Return the smallest value that a target could have."""
    laid, is_size = laid_out(model, recipe), target.kind == "size"
    floor = sum(each.cost(each.types[0], is_size) for each in candidates(laid, recipe.types, recipe.tensor_types))
    return floor + header_bytes(laid, recipe) if is_size else nearest_bpw(floor, model.n_weights)
