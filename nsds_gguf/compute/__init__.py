"""The numerics of a decoder: layer views, forward and backward through them, behind one seam for what computes them.

A new backend is a class like ``numpy_backend.NumpyBackend`` and one line in ``backend.BACKENDS``.
"""

from .backend import BACKENDS, Backend, BackendEntry, find_backend

__all__ = ["BACKENDS", "Backend", "BackendEntry", "find_backend"]
