"""Sensitivities without a pass over tokens: what is typical of the role of a tensor.

Together with NSDS of its layer (``allocate.layer_factors``) they give a plan from one read of the weights. On five
trained models such plans have 1.09 times the divergence of those by the Fisher pass, by role alone 1.19 times, with all
tensors alike 1.70 times (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

from ..calibration.norm_gains import squared_gains
from ..llamacpp.rules import kept_reason
from ..records import Model, Tensor
from .result import Sensitivities

# Nats of divergence per unit of relative error in a matrix, times the number of layers: geometric means over the layers
# of five trained models (docs/quality.json), and over those.
_ROLES = {
    "attn_q": 0.19,
    "attn_k": 0.23,
    "attn_v": 0.77,
    "attn_output": 0.69,
    "ffn_gate": 0.86,
    "ffn_up": 0.69,
    "ffn_down": 1.10,
}
_OTHER_ROLE = 0.5
_OUTPUT, _LOOKED_UP, _TIED = 2.55, 0.76, 2.63


def by_role(model: Model) -> Sensitivities:
    """Return sensitivities by role, in nats per unit of relative error, and the gains of norms; nothing else is known.

    Stacked experts share the role's sensitivity: it is that of all of them together.
    """
    quantized = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    note = "Sensitivities are typical of the roles of tensors, times the score of their layer."
    return Sensitivities({each.name: _of_role(model, each) for each in quantized}, {}, squared_gains(model), (note,))


def _of_role(model: Model, tensor: Tensor) -> float:
    if tensor.layer is not None:
        role = tensor.role.removesuffix("_exps").removesuffix("_shexp")
        return _ROLES.get(role, _OTHER_ROLE) / model.hparams.n_layers
    if tensor.name == model.unembedding().name:
        return _TIED if model.is_tied else _OUTPUT
    return _LOOKED_UP
