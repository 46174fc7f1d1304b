"""The multiple-choice knapsack: one type per tensor, least total cost, within a number of bytes.

HiGHS (scipy.optimize.milp) solves the integer program without a time limit, to a proven relative gap of ``GAP`` or
better. The solution is then made canonical, so that equal optima always give one answer:

1. While some tensor can take a type of less cost within the bytes left, the upgrade with the largest gain is taken
   (ties: the earlier tensor, then fewer bytes).
2. Among tensors with the same costs and bytes in every type, the earlier one gets the larger type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..errors import PlanError

GAP = 1e-4

_OBJECTIVE_SCALE = 1e4  # optimum of the scaled problem, far above HiGHS' absolute tolerances of 1e-6
_CAPACITY_SCALE = 1e6  # capacity of the scaled problem: a tolerance of 1e-6 is far below one byte


@dataclass(frozen=True)
class Choices:
    """The types open to one tensor: ``bytes[j]`` and ``costs[j]`` (>= 0) of the j-th."""

    bytes: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """Index of the chosen type per tensor, the total cost, and the proven relative gap to the optimum."""

    chosen: tuple[int, ...]
    cost: float
    gap: float


def solve(items: Sequence[Choices], capacity_bytes: int) -> Solution:
    """Choose one type per tensor with the least total cost in at most ``capacity_bytes``.

    Raises ``PlanError`` when even the smallest types do not fit.
    """
    kept = [_undominated(item) for item in items]
    smallest = [options[0] for options in kept]
    if _total_bytes(items, smallest) > capacity_bytes:
        raise PlanError(f"the smallest types need {_total_bytes(items, smallest)} bytes, {capacity_bytes} are allowed")
    largest = [options[-1] for options in kept]
    if _total_bytes(items, largest) <= capacity_bytes:
        return Solution(tuple(largest), _total_cost(items, largest), 0.0)
    chosen, bound = _solve_milp(items, kept, capacity_bytes)
    chosen = _ordered_twins(items, _filled(items, kept, chosen, capacity_bytes))
    cost = _total_cost(items, chosen)
    return Solution(tuple(chosen), cost, max(0.0, (cost - bound) / cost) if cost > 0 else 0.0)


def _undominated(item: Choices) -> list[int]:
    """Return the indices of undominated types: ascending bytes, strictly descending cost."""
    order = sorted(range(len(item.bytes)), key=lambda j: (item.bytes[j], item.costs[j], j))
    kept: list[int] = []
    for j in order:
        if not kept or item.costs[j] < item.costs[kept[-1]]:
            kept.append(j)
    return kept


def _solve_milp(
    items: Sequence[Choices], kept: Sequence[Sequence[int]], capacity_bytes: int
) -> tuple[list[int], float]:
    """Return the chosen indices and the proven lower bound on the cost."""
    scale = _OBJECTIVE_SCALE / _greedy_cost(items, kept, capacity_bytes)
    pairs = [(i, j) for i, options in enumerate(kept) for j in options]
    costs = np.array([items[i].costs[j] * scale for i, j in pairs])
    sizes = np.array([items[i].bytes[j] for i, j in pairs], dtype=float)
    one_each = csr_array(
        (np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))), shape=(len(items), len(pairs))
    )
    room, bound = capacity_bytes, -np.inf
    while True:
        result = milp(
            costs,
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sizes[None] * (_CAPACITY_SCALE / room), -np.inf, _CAPACITY_SCALE),
            ],
            options={"mip_rel_gap": GAP / 2},
        )
        if result.x is None:
            raise PlanError(f"HiGHS found no plan: {result.message}")
        if room == capacity_bytes:  # a bound for less room does not hold for the full capacity
            bound = float(result.mip_dual_bound) / scale
        taken = {i: j for (i, j), value in zip(pairs, result.x, strict=True) if value > 0.5}
        if len(taken) != len(items):
            raise PlanError(f"HiGHS left {len(items) - len(taken)} tensors without a type: {result.message}")
        chosen = [taken[i] for i in range(len(items))]
        excess = _total_bytes(items, chosen) - capacity_bytes
        if excess <= 0:
            return chosen, bound
        room -= excess  # the solver's tolerance exceeded the capacity: lower it by the excess


def _greedy_cost(items: Sequence[Choices], kept: Sequence[Sequence[int]], capacity_bytes: int) -> float:
    """Return the cost of a feasible plan by greedy upgrades; it only sets a scale."""
    return max(_total_cost(items, _filled(items, kept, [o[0] for o in kept], capacity_bytes)), np.finfo(float).tiny)


def _filled(
    items: Sequence[Choices], kept: Sequence[Sequence[int]], chosen: Sequence[int], capacity_bytes: int
) -> list[int]:
    """Take upgrades within the bytes left, largest gain first, until none fits."""
    filled = list(chosen)
    left = capacity_bytes - _total_bytes(items, filled)
    while True:
        best: tuple[float, int, int, int] | None = None
        for i, options in enumerate(kept):
            item, now = items[i], filled[i]
            for j in options:
                extra, gain = item.bytes[j] - item.bytes[now], item.costs[now] - item.costs[j]
                if gain > 0 and extra <= left and (best is None or (-gain, i, extra) < best[:3]):
                    best = (-gain, i, extra, j)
        if best is None:
            return filled
        _, i, extra, j = best
        filled[i], left = j, left - extra


def _ordered_twins(items: Sequence[Choices], chosen: Sequence[int]) -> list[int]:
    """Give the larger types to the earlier of tensors with the same options."""
    twins: dict[Choices, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        twins[item].append(i)
    ordered = list(chosen)
    for item, members in twins.items():
        types = sorted((chosen[i] for i in members), key=lambda j: -item.bytes[j])
        for i, j in zip(members, types, strict=True):
            ordered[i] = j
    return ordered


def _total_bytes(items: Sequence[Choices], chosen: Sequence[int]) -> int:
    return sum(item.bytes[j] for item, j in zip(items, chosen, strict=True))


def _total_cost(items: Sequence[Choices], chosen: Sequence[int]) -> float:
    return sum(item.costs[j] for item, j in zip(items, chosen, strict=True))
