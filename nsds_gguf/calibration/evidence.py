"""What a calibration is made from: what is known of a model's matrices' inputs once tokens went through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..compute.backend import Tokens
from ..compute.input_moments import Moments, NamedHessian
from ..records import Float32, Float64, Model, Progress, no_progress
from .imatrix import Imatrix


def no_hessians() -> Iterator[NamedHessian]:
    """Yield nothing."""
    yield from ()


@dataclass(frozen=True)
class Evidence:
    """What is known of the inputs of a model's matrices.

    Attributes:
        model: the model.
        tokens: ``(n_sequences, n_positions)`` ids that went through it, if any did.
        columns: by stored name mean squares of each column's input, ``(n_cols,)`` or ``(n_experts, n_cols)``, first
            positions left out; predicted by moment propagation where the pass over tokens cannot follow the model.
        gains: by stored name the squared gain of the norm in front of the matrix, ``(n_cols,)``.
        moments: of all tokens, by stored name; empty where none were collected.
        hessians: yields the Hessians of all tokens, in the order of the layers; nothing where none were collected.
        imatrix: an importance matrix of the model.

    """

    model: Model
    tokens: Tokens | None = None
    columns: Mapping[str, Float64] = field(default_factory=dict)
    gains: Mapping[str, Float64] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    hessians: Callable[[], Iterator[NamedHessian]] = no_hessians
    imatrix: Imatrix | None = None


class Calibration(Protocol):
    """Where a model's column statistics come from, by stored tensor name."""

    @property
    def tokens(self) -> Tokens | None:
        """``(n_sequences, n_positions)`` ids, where it has them."""

    def column_moments(self, name: str) -> Float64 | None:
        """Return mean squares of each column's input, ``(n_cols,)`` or ``(n_experts, n_cols)``, where it has them."""

    def column_weights(self, name: str) -> Float32 | None:
        """Return what quantizers weigh columns by, in the same shape; ``None`` where all weigh the same."""

    def hessians(self) -> Iterator[NamedHessian]:
        """Yield ``E[x x^T]`` of every input in the order of the layers, once; nothing where it has none."""

    def note(self) -> str:
        """Return what the user must know of it, a sentence or more, or an empty string."""


@dataclass(frozen=True)
class TokenRequest:
    """What tokens are wanted.

    Attributes:
        model: for which model.
        original: gives the model as a GGUF for the length of a ``with`` block.
        for_hessians: whether Hessians are taken on them, which want more than sensitivities do.
        n_threads: CPU threads.
        seed: of what is drawn.
        progress: called with tokens done and tokens in all, where they take long.

    """

    model: Model
    original: Callable[[], AbstractContextManager[Path]]
    for_hessians: bool = False
    n_threads: int | None = None
    seed: int = 0
    progress: Progress = no_progress


def column_weights(calibration: Calibration, model: Model) -> dict[str, Float32]:
    """Return the column weights of all matrices of a model that have any, by stored name."""
    found = {t.name: calibration.column_weights(t.name) for t in model.tensors if t.is_matrix}
    return {name: weights for name, weights in found.items() if weights is not None}
