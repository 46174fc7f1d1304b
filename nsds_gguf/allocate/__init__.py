"""From scores and costs to a ``Plan``: one quantization type per tensor, within the budget.

A new allocator is a function ``(Problem) -> Choice`` and one entry in ``ALLOCATORS``.
"""

from .allocators import ALLOCATORS, PREFERENCES, Allocator, Choice, Problem, decided_by, layer_factors
from .candidates import (
    LARGER_TYPES,
    Candidate,
    candidates,
    check_type,
    default_types,
    fitting_type,
    measurable,
    nearest_bpw,
    parse_tensor_type,
)
from .planning import check_recipe, checked_candidates, make_plan

__all__ = [
    "ALLOCATORS",
    "LARGER_TYPES",
    "PREFERENCES",
    "Allocator",
    "Candidate",
    "Choice",
    "Problem",
    "candidates",
    "check_recipe",
    "check_type",
    "checked_candidates",
    "decided_by",
    "default_types",
    "fitting_type",
    "layer_factors",
    "make_plan",
    "measurable",
    "nearest_bpw",
    "parse_tensor_type",
]
