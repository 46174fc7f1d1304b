"""What a predicted divergence means for generated text: how often the file picks the original's next token.

With the KL divergence D from the original, in nats per token, the most likely token is the original's at about

    exp(-SLOPE sqrt(D))

of the positions. ``SLOPE`` fits 540 plans of six trained models of 4 to 12 M parameters by their predicted divergence
(0.77) and SmolLM2-135M by its measured one (0.62): with 0.7 half of the former are within 1.2 points, 95 % within 5.2,
and the latter within 3.5 (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

import math

from .. import allocate
from ..allocate import candidates, nearest_bpw
from ..quantize.padding import laid_out
from ..records import Model, Plan, Recipe, Scores, Target

SLOPE = 0.7

LEAST = 0.75  # plans below this agreement get a warning: beyond 0.17 nats per token
GOOD = 0.80  # the budget that the warning names reaches it

_STEP, _LARGEST = 0.5, 8.5  # bits per weight of the budgets that are tried


def expected_agreement(divergence: float) -> float:
    """Return the expected share of positions, in (0, 1], with the same most likely token at a divergence in nats."""
    return math.exp(-SLOPE * math.sqrt(divergence))


def is_acceptable(plan: Plan) -> bool:
    """Return whether a plan needs no warning; true if its divergence is not predicted."""
    predicted = plan.predicted_divergence
    return predicted is None or expected_agreement(predicted) >= LEAST


def agreement_note(model: Model, plan: Plan, recipe: Recipe, scores: Scores) -> str:
    """Return the warning of a plan that is not acceptable, with the smallest budget whose agreement is good.

    Args:
        model: the original.
        plan: the plan; its divergence is predicted in nats.
        recipe: how the better plan would be made: the plan's recipe, or the one without padding.
        scores: the scores of that recipe.

    """
    share = expected_agreement(plan.predicted_divergence or 0.0)
    text = (
        f"At {plan.bpw:.3g} bpw this model is expected to pick the original's next token at about {100 * share:.0f} % "
        "of positions"
    )
    better = _smallest_good(model, plan, recipe, scores)
    if better is None:
        return f"{text}."
    share = expected_agreement(better.predicted_divergence or 0.0)
    value = better.recipe.target.value if better.recipe.target else better.bpw
    return f"{text}; at {value:.3g} bpw: {100 * share:.0f} %."


def _smallest_good(model: Model, plan: Plan, recipe: Recipe, scores: Scores) -> Plan | None:
    """Return the plan of the smallest budget, in steps, whose agreement is good; ``None`` if there is none."""
    laid = laid_out(model, recipe)
    found = candidates(laid, recipe.types, recipe.tensor_types)
    floor = nearest_bpw(sum(each.n_bytes(each.types[0]) for each in found), model.n_weights)
    value = math.ceil(max(floor, plan.bpw + _STEP / 2) / _STEP) * _STEP
    while value <= _LARGEST:
        tried = allocate.make_plan(laid, scores, recipe.to(Target("bpw", value)), plan.header_bytes)
        if expected_agreement(tried.predicted_divergence or 0.0) >= GOOD:
            return tried
        value += _STEP
    return None
