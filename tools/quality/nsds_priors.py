"""Sensitivities of tensors without a forward or backward pass: by the role of a tensor, and by NSDS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nsds_gguf.metrics.nsds import combined
from nsds_gguf.metrics.stats import robust_z, sigmoid
from nsds_gguf.records import LayerScore, Model, role_and_layer
from nsds_gguf.sensitivity.moment_propagation import propagate
from nsds_gguf.sensitivity.typical import by_role
from nsds_gguf.system.workers import Threads

FLAT, PROPAGATION = "flat", "moment propagation"

# Name of a prior: what it weighs by, and how much. "role": by role alone; "layer": times NSDS of the layer;
# "component": times NSDS of the component of the layer that the tensor belongs to.
LAYERS_ALONE: dict[str, tuple[str, str, float]] = {
    FLAT: ("flat", "", 0.0),
    "role": ("role", "", 0.0),
    "role, layer 1 product": ("layer", "product", 1.0),
    "role, layer 2 product": ("layer", "product", 2.0),
    "role, layer 2 ratio": ("layer", "ratio", 2.0),
    "role, component 2 product": ("component", "product", 2.0),
    PROPAGATION: ("propagation", "", 0.0),
}

COMPONENTS = {
    "attn_q": "qk",
    "attn_k": "qk",
    "attn_v": "ov",
    "attn_output": "ov",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


class Priors:
    """The sensitivities of one model by name of the prior."""

    def __init__(self, model: Model, layers: Mapping[str, Sequence[LayerScore]]) -> None:
        """Take the model and its NSDS scores by reading of SE."""
        self.layer_scores = {reading: centred([one.score for one in found]) for reading, found in layers.items()}
        self.component_scores = {reading: component_scores(found) for reading, found in layers.items()}
        self.propagated = propagate(model, workers=Threads(1)).sensitivity
        self.by_role = by_role(model).sensitivity

    def sensitivity(self, prior: str, name: str) -> float:
        """Return the sensitivity of a tensor by a key of ``LAYERS_ALONE``, in any unit."""
        by, reading, weight = LAYERS_ALONE[prior]
        role, layer = role_and_layer(name)
        if by == "propagation":
            return self.propagated[name]
        if by == "flat":
            return 1.0
        base = self.by_role[name]
        if layer is None or by == "role":
            return base
        scores = self.layer_scores[reading]
        if by == "component" and role in COMPONENTS:
            scores = self.component_scores[reading][COMPONENTS[role]]
        return base * math.exp(weight * scores[layer])


def component_scores(layers: Sequence[LayerScore]) -> dict[str, list[float]]:
    """Return NSDS of every component, centred over the layers: the soft-OR of the standings of its NV and SE."""
    found = {}
    for name in set(COMPONENTS.values()):
        nv, se = (sigmoid(robust_z(np.array([part[name] for part in parts])))
                  for parts in ([one.nv for one in layers], [one.se for one in layers]))  # fmt: skip
        found[name] = centred([combined(float(a), float(b)) for a, b in zip(nv, se, strict=True)])
    return found


def centred(values: Sequence[float]) -> list[float]:
    """Return values minus their mean."""
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]
