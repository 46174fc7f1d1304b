"""The numerics of a decoder: layer views, the forward and backward pass, and the backends that compute them.

To add a backend, write a class like ``numpy_backend.NumpyBackend`` and add one line to ``backend.BACKENDS``.
"""

from .backend import BACKENDS, Backend, BackendEntry, find_backend

__all__ = ["BACKENDS", "Backend", "BackendEntry", "find_backend"]
