"""Whether the files of a recipe are padded: as the user says, or as the budget asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..allocate import ALLOCATORS, candidates
from ..errors import PlanError
from ..quantize.header import header_bytes
from ..quantize.padding import WIDTH, laid_out, padded_width, padding_obstacle
from ..records import AUTO, Model, Recipe, Scores

# Values of ``Options.pad``, and what each does.
PADDINGS: Mapping[str, str] = {
    AUTO: "where the budget is out of reach otherwise, or padding adds little and the predicted divergence is less",
    "on": "pad",
    "off": "never pad",
}

# Padding of a larger share of the width only serves budgets that are out of reach otherwise (docs/log.md, 2026-11-28).
LITTLE = 0.15


def settle_padding(wanted: str, model: Model, recipe: Recipe, scores: Scores | None) -> tuple[Recipe, Recipe | None]:
    """Return a recipe with its padding, and an alternative where both ways have to be planned.

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
    if obstacle or not ALLOCATORS[recipe.allocator].needs_costs or not _reaches(model, padded):
        return recipe, None
    if not _reaches(model, recipe):
        return padded, None
    is_little = padded_width(model) <= (1 + LITTLE) * model.hparams.n_embd
    return recipe, padded if is_little else None


def _reaches(model: Model, recipe: Recipe) -> bool:
    """Return whether the smallest types fit the budget; false without a budget or with an impossible one."""
    target = recipe.target
    if target is None or not math.isfinite(target.value):
        return False
    laid = laid_out(model, recipe)
    is_size = target.kind == "size"
    floor = sum(each.cost(each.types[0], is_size) for each in candidates(laid, recipe.types, recipe.tensor_types))
    if is_size:
        return floor + header_bytes(laid, recipe) <= target.value
    return floor <= math.floor(target.value * model.n_weights / 8)
