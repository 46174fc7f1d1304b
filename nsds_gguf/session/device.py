"""The device of a run: for ``auto`` the GPU, if it can be used and has room, else the CPU."""

from __future__ import annotations

from ..calibration.random_tokens import N_POSITIONS, N_SEQUENCES
from ..compute.backend import BACKENDS, DEFAULT_BACKEND, find_backend
from ..compute.input_moments import Recording
from ..compute.torch_device import CUDA, lacks_device_memory
from ..compute.walk import working_bytes
from ..records import AUTO, Model

_FACTORING_BYTES = 32  # per entry of a Hessian: float64 Hessian, its scaled copy, factor and LAPACK's copy


def choose_device(name: str, model: Model) -> tuple[str, str]:
    """Return the key of ``BACKENDS`` to use, and a note if there is a GPU but it is too small.

    Raises ``PlanError`` for a named device that cannot run here.
    """
    if name != AUTO:
        return find_backend(name).name, ""
    if CUDA not in BACKENDS or BACKENDS[CUDA].missing():
        return DEFAULT_BACKEND, ""
    shortage = lacks_device_memory(device_bytes(model))
    if shortage:
        return DEFAULT_BACKEND, f"The GPU is not used: {model.name} needs {shortage}; --device cuda tries anyway."
    return CUDA, ""


def device_bytes(model: Model) -> int:
    """Estimate the memory that a model takes on a device: the pass over tokens, or factoring its largest Hessian."""
    recording = Recording(frozenset(tensor.name for tensor in model.tensors))
    largest = max((tensor.n_cols for tensor in model.tensors if tensor.is_matrix), default=0)
    return max(working_bytes(model, (N_SEQUENCES, N_POSITIONS), recording), _FACTORING_BYTES * largest**2)
