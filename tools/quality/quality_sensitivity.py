"""Measured sensitivity: one tensor at a time is quantized, all others stay as they are.

``alpha_t = KLD_t / e_t``, ``e_t`` the relative error that the allocator sees. With these in place of the predicted
sensitivities the same knapsack gives the oracle's plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from quality_measure import Bench, Yardstick, original_plan

from nsds_gguf.allocate import candidates
from nsds_gguf.quantize.header import header_bytes
from nsds_gguf.records import Plan, Recipe, Scores, TensorCost, role_and_layer

# Types at which a tensor is measured; the first gives alpha, the second shows whether divergence is linear in the
# error. Where rows do not fit, what the allocator would take there.
MEASURED_AT = ("Q2_K", "Q3_K")


@dataclass(frozen=True)
class TensorSensitivity:
    """One tensor: predicted sensitivity (units of the output tensor's) and, by type, what was measured.

    ``kld`` and ``kld_error`` are nats per token, ``e`` the relative error, ``alpha`` their quotient.
    """

    name: str
    role: str
    layer: int | None
    n_weights: int
    predicted: float
    measured: dict[str, dict[str, float]]

    @property
    def alpha(self) -> float:
        """Sensitivity at the smallest type, nats per token per unit of relative error."""
        return next(iter(self.measured.values()))["alpha"]


def measure_sensitivities(
    bench: Bench,
    scores: Scores,
    recipe: Recipe,
    yardstick: Yardstick,
    types: Sequence[str] = MEASURED_AT,
    say: Callable[[str], None] = lambda _: None,
) -> list[TensorSensitivity]:
    """Measure every open tensor, one at a time.

    Args:
        bench: of the model.
        scores: with costs under the calibration of ``recipe``.
        recipe: types and calibration.
        yardstick: of a choosing half.
        types: at which each tensor is measured, one type after the other.
        say: called with a line of progress after each tensor.

    """
    open_ones = [c for c in candidates(bench.session.model, recipe.types) if c.is_open]
    costs = {cost.name: cost for cost in scores.costs}
    measured: dict[str, dict[str, dict[str, float]]] = {c.tensor.name: {} for c in open_ones}
    for step in range(len(types)):
        for candidate in open_ones:
            name = candidate.tensor.name
            type_name = stand_ins(candidate.types, types)[step]
            (m,) = bench.plan(one_tensor_plan(bench, name, type_name, recipe.calibration), [yardstick])
            kld, error = float(np.mean(m.kld)), costs[name].errors[type_name]
            deviation = float(np.std(m.kld, ddof=1) / np.sqrt(len(m.kld)))
            measured[name][type_name] = {"kld": kld, "kld_error": deviation, "e": error, "alpha": kld / error}
            say(f"sensitivity at {type_name}: {name} {kld / error:.3g}")
    return [
        TensorSensitivity(t.name, *role_and_layer(t.name), t.n_weights, costs[t.name].sensitivity, measured[t.name])
        for t in (candidate.tensor for candidate in open_ones)
    ]


def stand_ins(open_types: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the types wanted, or as many of a tensor's smallest where its rows do not fit them."""
    return list(wanted) if set(wanted) <= set(open_types) else list(open_types[: len(wanted)])


def one_tensor_plan(bench: Bench, name: str, type_name: str, calibration: str) -> Plan:
    """Return the plan of the original with one tensor in another type."""
    model = bench.session.model
    plan = original_plan(bench.session)
    recipe = replace(plan.recipe, calibration=calibration)
    found = {candidate.tensor.name: candidate for candidate in candidates(model, (type_name,))}
    tensors = tuple(
        replace(t, type=type_name, n_bytes=found[name].n_bytes(type_name)) if t.name == name else t
        for t in plan.tensors
    )
    return replace(plan, recipe=recipe, tensors=tensors, header_bytes=header_bytes(model, recipe))


def with_sensitivities(scores: Scores, alphas: dict[str, float]) -> Scores:
    """Return the scores with measured sensitivities in place of predicted ones, and without a factor of layers."""
    costs = tuple(replace(cost, sensitivity=alphas.get(cost.name, cost.sensitivity)) for cost in scores.costs)
    return replace(scores, layers=(), costs=costs)


def with_factors(scores: Scores, factors: dict[int, float]) -> Scores:
    """Return the scores with a factor of each layer in its tensors' sensitivities, and without scores of layers."""
    costs = tuple(_scaled(cost, factors) for cost in scores.costs)
    return replace(scores, layers=(), costs=costs)


def _scaled(cost: TensorCost, factors: dict[int, float]) -> TensorCost:
    layer = role_and_layer(cost.name)[1]
    return cost if layer is None else replace(cost, sensitivity=cost.sensitivity * factors[layer])


def to_json(found: Sequence[TensorSensitivity]) -> list[dict[str, Any]]:
    """Return plain JSON values, a flat object a tensor."""
    return [{**asdict(t), "measured": t.measured} for t in found]
