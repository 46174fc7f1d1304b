"""Evidence: statistics of the inputs of a model's matrices, from which calibrations are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..compute.backend import Tokens
from ..compute.input_moments import Moments
from ..records import Float32, Float64, Model, Progress, no_progress
from .hessians import FoundHessian
from .imatrix import Imatrix


def no_hessians() -> Iterator[FoundHessian]:
    """Yield nothing."""
    yield from ()


@dataclass(frozen=True)
class Evidence:
    """Statistics of the inputs of a model's matrices.

    Attributes:
        model: the model.
        tokens: ``(n_sequences, n_positions)`` ids that the model has read, if any.
        columns: by stored name, mean squares of each column's input, ``(n_cols,)`` or ``(n_experts, n_cols)``, first
            positions included; from moment propagation if the Fisher pass does not support the model.
        gains: by stored name, the squared gain of the norm before the matrix, ``(n_cols,)``.
        moments: of all tokens, by stored name; empty if not collected.
        hessians: yields the Hessians of all tokens, in the order of the layers; yields nothing if not collected.
        imatrix: an importance matrix of the model.

    """

    model: Model
    tokens: Tokens | None = None
    columns: Mapping[str, Float64] = field(default_factory=dict)
    gains: Mapping[str, Float64] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    hessians: Callable[[], Iterator[FoundHessian]] = no_hessians
    imatrix: Imatrix | None = None


class Calibration(Protocol):
    """A source of column statistics of a model, by stored tensor name."""

    @property
    def tokens(self) -> Tokens | None:
        """``(n_sequences, n_positions)`` ids, or ``None``."""

    def column_moments(self, name: str) -> Float64 | None:
        """Return mean squares of each column's input, ``(n_cols,)`` or ``(n_experts, n_cols)``, or ``None``."""

    def column_weights(self, name: str) -> Float32 | None:
        """Return the column weights for quantizers, in the same shape; ``None`` for equal weights."""

    def hessians(self) -> Iterator[FoundHessian]:
        """Yield the Hessian of every input in the order of the layers, once; nothing without Hessians."""

    def note(self) -> str:
        """Return facts that the user must see, in full sentences, or an empty string."""


@dataclass(frozen=True)
class TokenRequest:
    """A request for tokens.

    Attributes:
        model: the model that will read them.
        original: provides the model as a GGUF for the duration of a ``with`` block.
        for_hessians: whether they serve for Hessians, which need more tokens than sensitivities.
        n_threads: CPU threads.
        seed: of random choices.
        progress: called with (tokens done, total) if they take long.
        n_tokens: how many to generate; default: ``generated_text.N_TOKENS``.

    """

    model: Model
    original: Callable[[], AbstractContextManager[Path]]
    for_hessians: bool = False
    n_threads: int | None = None
    seed: int = 0
    progress: Progress = no_progress
    n_tokens: int | None = None


def column_weights(calibration: Calibration, model: Model) -> dict[str, Float32]:
    """Return the column weights of all matrices that have any, by stored name."""
    found = {t.name: calibration.column_weights(t.name) for t in model.tensors if t.is_matrix}
    return {name: weights for name, weights in found.items() if weights is not None}
