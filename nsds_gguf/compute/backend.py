"""The seam between what is computed of a model and what computes it.

A backend runs one model: its embedding, its layers one at a time, its output. Arrays cross the seam at the layer
boundary only, float32 in numpy on the CPU; inside, weights, activations and sums may stay on a device. The order of
calls is that of ``walk``. To add a backend, write a module with a class like ``NumpyBackend`` and add one line to
``BACKENDS``.

Shapes: ``n = n_sequences * n_positions`` rows, sequence after sequence; ``x`` and ``grad`` are ``(n, n_embd)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from ..records import Float32, Float64, Model
from .input_moments import InputSums, NamedHessian, Recording
from .numpy_backend import open_numpy

Tokens = NDArray[np.int64]


class LayerPass(Protocol):
    """One layer, its weights decoded at most once while it is in use (if they fit in memory)."""

    def forward(self, x: Float32) -> Float32:
        """Return the stream behind the layer; add the inputs of its matrices to the sums."""

    def backward(self, x: Float32, grad: Float32) -> tuple[Float32, Mapping[str, float]]:
        """Compute the layer again from ``x``, then go back through it.

        Args:
            x: the stream in front of the layer.
            grad: derivative of the loss by the stream behind it.

        Returns:
            The derivative by ``x``, and by stored name ``sum (W dL/dW)^2`` of every matrix, where the gradient is taken
            for each sequence by itself and the squares are summed over sequences.

        """

    def input_sums(self) -> Sequence[InputSums]:
        """Return the sums over all batches so far, one entry an input: copies."""

    def hessians(self) -> Iterator[NamedHessian]:
        """Yield ``E[x x^T]`` over all batches so far, of every input that the recording asks for."""

    def column_squares(self) -> Mapping[str, Float64]:
        """Return the squared norm of every column of the matrices, ``(n_cols,)`` by stored name, stacks left out."""


class OutputPass(Protocol):
    """Output norm and output matrix."""

    def forward(self, x: Float32) -> None:
        """Add the input of the output matrix to the sums."""

    def backward(self, x: Float32, scored: NDArray[np.intp], seed: int) -> tuple[Float32, float]:
        """Draw a prediction at every scored row and go back from its log-likelihood, with a random sign each.

        Returns:
            The derivative of ``sum signs * log p(drawn)`` by ``x``, and ``sum (W dL/dW)^2`` of the output matrix.

        """

    def input_sums(self) -> Sequence[InputSums]:
        """Return the sums over all batches so far, of one input: copies."""

    def hessians(self) -> Iterator[NamedHessian]:
        """Yield ``E[x x^T]`` over all batches so far, of every input that the recording asks for."""

    def column_squares(self) -> Mapping[str, Float64]:
        """Return the squared norm of every column of the matrices, ``(n_cols,)`` by stored name, stacks left out."""


class Backend(Protocol):
    """The numerics of one model for sequences of one length."""

    def embed(self, tokens: Tokens) -> Float32:
        """Return the stream in front of the first layer for ``(n_sequences, n_positions)`` ids."""

    def embed_backward(self, tokens: Tokens, grad: Float32) -> float:
        """Return ``sum (W dL/dW)^2`` of the embedding's rows as looked up, from the derivative by the stream."""

    def layer(self, index: int, recording: Recording | None = None) -> LayerPass:
        """Return a layer; without a recording it sums up nothing."""

    def output(self, recording: Recording | None = None) -> OutputPass:
        """Return the output likewise."""


# Opens a backend: of a model, for sequences of so many positions, with so many CPU threads.
Open = Callable[[Model, int, int], AbstractContextManager[Backend]]


@dataclass(frozen=True)
class BackendEntry:
    """A backend as users choose it.

    Attributes:
        name: what ``--device`` and records call it.
        description: one line for ``--help``.
        missing: returns what keeps it from running on this machine, or an empty string.
        open: opens it.

    """

    name: str
    description: str
    missing: Callable[[], str]
    open: Open


BACKENDS = {
    entry.name: entry
    for entry in (BackendEntry("cpu", "numpy on the CPU, float32", lambda: "", open_numpy),)
}  # fmt: skip

DEFAULT_BACKEND = "cpu"


def find_backend(name: str) -> BackendEntry:
    """Return a backend that can run here; raises ``PlanError`` when it is unknown, or cannot."""
    if name not in BACKENDS:
        raise PlanError(f"backend {name!r} is not known; wanted one of {', '.join(BACKENDS)}")
    missing = BACKENDS[name].missing()
    if missing:
        raise PlanError(f"backend {name} cannot run here: {missing}")
    return BACKENDS[name]
