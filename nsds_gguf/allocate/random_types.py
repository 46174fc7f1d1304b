"""Random types within a budget: the baseline for other allocations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .candidates import Candidate


def random_types(found: Sequence[Candidate], budget: int | None, padded: bool, seed: int) -> tuple[str, ...]:
    """Return a random type per tensor that uses the budget as far as single steps can.

    Every open tensor first gets one of its types with equal probability; then tensors drawn at random go down one type
    until the budget holds, and up one type while one fits.

    Args:
        found: the tensors and their types, smallest first.
        budget: bytes for all; ``None`` keeps the first draw.
        padded: whether padding counts, as for a budget of file bytes.
        seed: seed of the generator (PCG64).

    Returns:
        One type per tensor, in the order of ``found``.

    """
    generator = np.random.default_rng(seed)
    costs = [[candidate.cost(name, padded) for name in candidate.types] for candidate in found]
    levels = [int(generator.integers(len(candidate.types))) for candidate in found]
    used = sum(cost[level] for cost, level in zip(costs, levels, strict=True))
    is_open = np.array([i for i, candidate in enumerate(found) if candidate.is_open], dtype=np.intp)
    while budget is not None and used > budget:
        lowerable = [i for i in is_open if levels[i] > 0]
        if not lowerable:
            break
        i = int(generator.choice(lowerable))
        used += costs[i][levels[i] - 1] - costs[i][levels[i]]
        levels[i] -= 1
    while budget is not None:
        raisable = [
            i
            for i in is_open
            if levels[i] + 1 < len(costs[i]) and used + costs[i][levels[i] + 1] - costs[i][levels[i]] <= budget
        ]
        if not raisable:
            break
        i = int(generator.choice(raisable))
        used += costs[i][levels[i] + 1] - costs[i][levels[i]]
        levels[i] += 1
    return tuple(candidate.types[level] for candidate, level in zip(found, levels, strict=True))
