"""The knapsack against brute force, its written tie rules, and its silence."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from nsds_gguf.allocate.knapsack import GAP, Choices, solve
from nsds_gguf.errors import PlanError


def brute_force(items, capacity):
    """Least cost over every combination that fits."""
    best = None
    for chosen in itertools.product(*(range(len(item.bytes)) for item in items)):
        if sum(item.bytes[j] for item, j in zip(items, chosen, strict=True)) <= capacity:
            cost = sum(item.costs[j] for item, j in zip(items, chosen, strict=True))
            best = cost if best is None else min(best, cost)
    return best


def random_items(seed, n_items, n_types):
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(n_items):
        sizes = np.sort(rng.integers(10, 4000, n_types))
        costs = np.sort(rng.lognormal(-6, 3, n_types))[::-1]
        items.append(Choices(tuple(int(n) for n in sizes), tuple(float(c) for c in costs)))
    return items


@pytest.mark.parametrize("seed", range(30))
def test_equals_brute_force(seed):
    items = random_items(seed, n_items=6, n_types=4)
    floor, ceiling = sum(min(i.bytes) for i in items), sum(max(i.bytes) for i in items)
    capacity = int(floor + (ceiling - floor) * (seed + 1) / 31)
    solution = solve(items, capacity)
    optimum = brute_force(items, capacity)
    assert sum(item.bytes[j] for item, j in zip(items, solution.chosen, strict=True)) <= capacity
    assert optimum <= solution.cost <= optimum * (1 + GAP) + 1e-15
    assert solution.gap <= GAP


def test_costs_need_not_fall_with_bytes():
    items = [Choices((10, 20, 30), (1.0, 5.0, 0.5)), Choices((10, 10), (2.0, 1.0))]
    assert solve(items, 45).chosen == (2, 1)
    assert solve(items, 39).chosen == (0, 1)  # 20 bytes would cost more than 10


def test_everything_fits_at_its_best():
    items = [Choices((10, 20), (1.0, 0.5)), Choices((5, 9), (3.0, 0.1))]
    assert solve(items, 29).chosen == (1, 1)
    assert solve(items, 10**12).gap == 0.0


def test_too_small_is_an_error_with_the_numbers():
    with pytest.raises(PlanError, match=r"^the smallest types need 15 bytes, 14 are allowed$"):
        solve([Choices((10, 20), (1.0, 0.5)), Choices((5, 9), (3.0, 0.1))], 14)


def test_twins_are_ordered_earlier_gets_larger():
    twin = Choices((10, 20, 40), (4.0, 2.0, 1.0))
    solution = solve([twin] * 5, 100)
    assert list(solution.chosen) == sorted(solution.chosen, reverse=True)


def test_no_upgrade_is_left_that_would_fit():
    items = random_items(99, n_items=40, n_types=5)
    capacity = sum(i.bytes[1] for i in items)
    solution = solve(items, capacity)
    left = capacity - sum(i.bytes[j] for i, j in zip(items, solution.chosen, strict=True))
    for item, chosen in zip(items, solution.chosen, strict=True):
        for j, size in enumerate(item.bytes):
            assert not (item.costs[j] < item.costs[chosen] and size - item.bytes[chosen] <= left)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_scale_of_costs_does_not_matter(scale):
    items = random_items(5, n_items=6, n_types=4)
    scaled = [Choices(i.bytes, tuple(c * scale for c in i.costs)) for i in items]
    capacity = sum(i.bytes[1] for i in items)
    assert solve(scaled, capacity).chosen == solve(items, capacity).chosen


LARGE = """
import numpy as np
from nsds_gguf.allocate.knapsack import GAP, Choices, solve
bits, errors = np.array([2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5]), np.array([.088, .0228, .0051, .0013, .00031, .00003])
rng = np.random.default_rng(3)
sizes = [8192 * 8192, 1024 * 8192, 1024 * 8192, 8192 * 8192] + [28672 * 8192] * 3
items = [Choices(tuple(int(n * b / 8) for b in bits), tuple(float(e * np.exp(rng.normal(0, 1.5))) for e in errors))
         for _ in range(80) for n in sizes]
capacity = int(3.3 / 8 * sum(sizes) * 80)
first, second = solve(items, capacity), solve(items, capacity)
used = sum(i.bytes[j] for i, j in zip(items, first.chosen))
assert first == second and first.gap <= GAP and used <= capacity and capacity - used < capacity / 1000
"""


def test_eighty_layers_solve_to_the_gap_and_print_nothing():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
