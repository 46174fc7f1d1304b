"""What is known of the tensors of a model once sensitivities are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..compute.input_moments import Moments
from ..records import Float64


@dataclass(frozen=True)
class Sensitivities:
    """Sensitivities and column moments, by tensor name: of the Fisher pass, or of moment propagation.

    Attributes:
        sensitivity: of every matrix that may be quantized: from the Fisher pass in nats per unit of relative error,
            from moment propagation in units of the output tensor's.
        inputs: ``(n_cols,)`` float64 mean square of what each column multiplies, ``(n_experts, n_cols)`` where stacked
            matrices multiply different things.
        gains: squared gain of the norm in front of a matrix, ``(n_cols,)``, where there is one.
        notes: what the user must know.
        looked_up: share of a tied embedding's sensitivity that is not the output's.
        moments: of all tokens that went through the model; empty where none did.
        column_squares: squared norm of each column of the weights, ``(n_cols,)``; empty where no tokens went through.

    """

    sensitivity: Mapping[str, float]
    inputs: Mapping[str, Float64]
    gains: Mapping[str, Float64]
    notes: tuple[str, ...] = ()
    looked_up: float = 0.0
    moments: Mapping[str, Moments] = field(default_factory=dict)
    column_squares: Mapping[str, Float64] = field(default_factory=dict)
