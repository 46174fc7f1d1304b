"""Checks of scores and plans from earlier runs against the model."""

from __future__ import annotations

import reprlib
from dataclasses import replace

from .. import allocate
from ..allocate import Candidate
from ..errors import PlanError, RecordError
from ..llamacpp import ggml
from ..quantize.header import header_bytes
from ..quantize.padding import laid_out
from ..records import Model, Plan, PlannedTensor, Scores, Tensor, TensorCost
from .settle import check_possible

_SHARES = ("nsds", "zd")  # metrics with values from 0 to 1
_ABSURD = 1e30  # far above any score, sensitivity or relative error; products must not overflow


def checked_plan(model: Model, plan: Plan) -> Plan:
    """Return a plan from a file, made consistent with the model: types are kept, bytes are computed again.

    Raises ``RecordError`` when it belongs to another model or a type does not fit its tensor, ``PlanError`` when its
    recipe is unknown or edited types exceed its target.
    """
    if plan.model_id != model.model_id:
        raise RecordError(f"the plan belongs to another model ({plan.model_name}); plan {model.name} again")
    allocate.check_recipe(plan.recipe)
    check_possible(model, plan.recipe)
    model = laid_out(model, plan.recipe)
    if [_identity(tensor) for tensor in plan.tensors] != [_identity(tensor) for tensor in model.tensors]:
        raise RecordError("the plan does not list the model's tensors in their order and shapes; plan again")
    found = allocate.candidates(model, plan.recipe.types)
    tensors = tuple(_resized(planned, candidate) for planned, candidate in zip(plan.tensors, found, strict=True))
    checked = replace(plan, tensors=tensors, header_bytes=header_bytes(model, plan.recipe))
    if checked.unused_bytes < 0:
        raise PlanError(f"the plan exceeds its target {plan.recipe.target} by {-checked.unused_bytes} bytes")
    return checked


def _identity(tensor: PlannedTensor | Tensor) -> tuple[object, ...]:
    return tensor.name, tensor.role, tensor.layer, tensor.shape, tensor.n_zeros


def _resized(planned: PlannedTensor, candidate: Candidate) -> PlannedTensor:
    if candidate.kind == "unquantized":
        if planned.type.upper() != candidate.types[0]:
            raise RecordError(
                f"plan: {planned.name} cannot be {planned.type}: it stays {candidate.types[0]} ({candidate.reason})"
            )
        return replace(planned, type=candidate.types[0], n_bytes=candidate.n_bytes(candidate.types[0]))
    type_name = allocate.check_type(planned.type, planned.name)
    if not ggml.fits(type_name, planned.shape[-1]):
        raise RecordError(f"plan: {planned.name}: rows of {planned.shape[-1]} weights cannot be {type_name}")
    return replace(planned, type=type_name, n_bytes=candidate.n_bytes(type_name))


def check_scores(model: Model, scores: Scores | None) -> None:
    """Raise ``RecordError`` for scores of another model, of other layers, or with impossible values."""
    if scores is None:
        return
    if scores.model_id != model.model_id:
        raise RecordError(f"the scores belong to another model ({scores.model_name}); score {model.name} again")
    check_possible(model, scores.recipe)
    metric = scores.recipe.metric
    wanted = list(range(model.hparams.n_layers)) if metric is not None else []
    if [layer.layer for layer in scores.layers] != wanted:
        raise RecordError(f"the scores do not list layers 0 to {model.hparams.n_layers - 1} in order; score again")
    low, high = (0.0, 1.0) if metric in _SHARES else (-_ABSURD, _ABSURD)
    for layer in scores.layers:
        if not low <= layer.score <= high:
            raise RecordError(f"the score of layer {layer.layer} is out of range for {metric}; score again")
        if not all(part is None or 0 <= part <= 1 for part in (layer.p_nv, layer.p_se)):
            raise RecordError(f"the parts of the score of layer {layer.layer} are damaged; score again")
    measured = laid_out(model, scores.recipe)
    for cost in scores.costs:
        _check_cost(measured, cost)


def _check_cost(model: Model, cost: TensorCost) -> None:
    tensor = model.by_name.get(cost.name)
    if tensor is None:
        raise RecordError(f"the scores hold costs of {reprlib.repr(cost.name)}, which the model lacks; score again")
    numbers = (cost.sensitivity, *cost.errors.values(), *cost.stderr.values())
    is_sound = cost.errors.keys() == cost.stderr.keys() and all(0 <= number < _ABSURD for number in numbers)
    is_sound &= 1 <= cost.n_rows_sampled <= tensor.n_rows
    is_sound &= cost.n_rows_sampled < tensor.n_rows or not any(cost.stderr.values())  # all rows were measured
    if not is_sound:
        raise RecordError(f"the scores' costs of {cost.name} are damaged; score again")
