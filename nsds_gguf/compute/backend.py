"""The interface of compute backends.

A backend runs one model: its embedding, its layers one at a time, its output. Arrays pass between caller and backend at
layer boundaries only, as float32 numpy arrays on the CPU; within the backend, weights, activations and sums may stay on
a device. ``walk`` determines the order of calls. To add a backend, write a module with a class like ``NumpyBackend``
and add one line to ``BACKENDS``.

Shapes: ``n = n_sequences * n_positions`` rows, sequence after sequence; ``x`` and ``grad`` are ``(n, n_embd)``.
"""

from __future__ import annotations

import functools
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
from .torch_device import CPU, CUDA, missing_cuda, missing_torch

Tokens = NDArray[np.int64]


class LayerPass(Protocol):
    """One layer; decodes its weights at most once while in use (if they fit in memory)."""

    def forward(self, x: Float32) -> Float32:
        """Return the output stream of the layer; add the inputs of its matrices to the sums."""

    def backward(self, x: Float32, grad: Float32) -> tuple[Float32, Mapping[str, Float32]]:
        """Recompute the layer from ``x``, then differentiate.

        Args:
            x: the input stream of the layer.
            grad: derivative of the loss with respect to its output stream.

        Returns:
            The derivative with respect to ``x``, and by stored name ``sum (W dL/dW)^2`` of every row of the matrices,
            ``(n_rows,)``: the gradient of each sequence is squared separately, and the squares are summed over
            sequences.

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
        """Sample a prediction at every scored row and differentiate its log-likelihood, each with a random sign.

        Returns:
            The derivative of ``sum signs * log p(sampled)`` with respect to ``x``, and ``sum (W dL/dW)^2`` of the
            output matrix.

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
        """Return the input stream of the first layer for ``(n_sequences, n_positions)`` ids."""

    def embed_backward(self, tokens: Tokens, grad: Float32) -> float:
        """Return ``sum (W dL/dW)^2`` of the embedding rows looked up, from the derivative of the stream."""

    def layer(self, index: int, recording: Recording | None = None) -> LayerPass:
        """Return a layer; without a recording it collects no sums."""

    def output(self, recording: Recording | None = None) -> OutputPass:
        """Return the output; without a recording it collects no sums."""


# Opens a backend; takes the model, the positions of a sequence and the number of CPU threads.
Open = Callable[[Model, int, int], AbstractContextManager[Backend]]


@dataclass(frozen=True)
class BackendEntry:
    """A backend that users can choose.

    Attributes:
        name: its name in ``--device`` and in records.
        description: one line for ``--help``.
        missing: returns why it cannot run on this machine, or an empty string.
        open: opens it.
        torch_device: PyTorch's name of the device, for roundings and decompositions there; empty for numpy.

    """

    name: str
    description: str
    missing: Callable[[], str]
    open: Open
    torch_device: str = ""


def _open_torch(device: str, model: Model, n_positions: int, n_threads: int) -> AbstractContextManager[Backend]:
    from .torch_backend import open_torch

    return open_torch(device, model, n_positions, n_threads)


BACKENDS = {entry.name: entry for entry in (
    BackendEntry("cpu", "numpy on the CPU, float32", lambda: "", open_numpy),
    BackendEntry("cuda", "PyTorch on an NVIDIA GPU, float32 (extra torch)", missing_cuda,
                 functools.partial(_open_torch, CUDA), CUDA),
    BackendEntry("torch-cpu", "PyTorch on the CPU, float32 (extra torch)", missing_torch,
                 functools.partial(_open_torch, CPU), CPU),
)}  # fmt: skip

DEFAULT_BACKEND = "cpu"


def find_backend(name: str) -> BackendEntry:
    """Return a backend; raise ``PlanError`` when it is unknown or cannot run on this machine."""
    if name not in BACKENDS:
        raise PlanError(f"device {name!r} is not known; wanted one of {', '.join(BACKENDS)}")
    missing = BACKENDS[name].missing()
    if missing:
        raise PlanError(f"device {name} cannot run here: {missing}")
    return BACKENDS[name]
