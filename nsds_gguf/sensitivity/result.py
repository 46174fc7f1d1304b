"""The result of a Fisher pass or of moment propagation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..compute.input_moments import Moments
from ..records import Float32, Float64


@dataclass(frozen=True)
class Sensitivities:
    """Sensitivities and column moments, by tensor name.

    Attributes:
        sensitivity: of every matrix that may be quantized: from the Fisher pass in nats per unit of relative error,
            from moment propagation relative to the output tensor.
        inputs: ``(n_cols,)`` float64 mean square of the input of each column, ``(n_experts, n_cols)`` for stacked
            matrices with separate inputs.
        gains: squared gain of the norm before a matrix, ``(n_cols,)``, if it has one.
        notes: facts that the user must see, one sentence each.
        looked_up: share of a tied embedding's sensitivity that is due to lookups, not to the output.
        moments: of all tokens that the model has read; empty without tokens.
        of_rows: sensitivity of every row of a matrix, ``(n_rows,)`` float32, where the Fisher pass finds it.
        all_inputs: like ``inputs``, with the first positions of sequences, which those of the Fisher pass leave out.
        column_squares: squared norm of each column of the weights, ``(n_cols,)``; empty without tokens.

    """

    sensitivity: Mapping[str, float]
    inputs: Mapping[str, Float64]
    gains: Mapping[str, Float64]
    notes: tuple[str, ...] = ()
    looked_up: float = 0.0
    moments: Mapping[str, Moments] = field(default_factory=dict)
    column_squares: Mapping[str, Float64] = field(default_factory=dict)
    of_rows: Mapping[str, Float32] = field(default_factory=dict)
    all_inputs: Mapping[str, Float64] = field(default_factory=dict)
