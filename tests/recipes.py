"""Recipes for tests of the stages: round to nearest, random tokens, no layer scores, unless a test says otherwise."""

from __future__ import annotations

from typing import Any

from nsds_gguf.records import K_TYPES, Recipe, Target


def recipe(target: Target | float | None = None, **changes: Any) -> Recipe:
    """Return a recipe; a number is a target in bits per weight."""
    plain: dict[str, Any] = {
        "target": Target("bpw", target) if isinstance(target, int | float) else target,
        "allocator": "fisher",
        "types": K_TYPES,
        "tensor_types": (),
        "rounding": "rtn",
        "calibration": "random",
        "metric": None,
        "se": None,
        "score_weight": 0.0,
        "prefer": "quality",
        "seed": 0,
        "allocation_seed": 0,
        "device": "cpu",
    }
    return Recipe(**{**plain, **changes})


def uniform(type_name: str, **changes: Any) -> Recipe:
    """Return the recipe of one type for every matrix, columns of equal weight."""
    return recipe(**{"allocator": "uniform", "types": (type_name,), "calibration": "none", **changes})
