"""A graph of ggml as it runs: what a product reads and writes, and the layout of the structures that show it."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GgmlError
from ..records import Float32
from .ggml import library_path, open_library, type_named

# ggml.h, enum ggml_type; ggml-backend.h, enum ggml_backend_buffer_usage
_F32, _F16, _I32 = 0, 1, 26
_USAGE_WEIGHTS = 1

# What looking into a graph needs of the library, with the types of arguments and results.
_ADDRESS, _INT64 = ctypes.c_void_p, ctypes.c_int64
_GRAPH_SYMBOLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_get_name": (ctypes.c_char_p, (_ADDRESS,)),
    "ggml_nelements": (_INT64, (_ADDRESS,)),
    "ggml_nbytes": (ctypes.c_size_t, (_ADDRESS,)),
    "ggml_get_data": (_ADDRESS, (_ADDRESS,)),
    "ggml_op_desc": (ctypes.c_char_p, (_ADDRESS,)),
    "ggml_free": (None, (_ADDRESS,)),
    "ggml_set_name": (_ADDRESS, (_ADDRESS, ctypes.c_char_p)),
    "ggml_new_tensor_3d": (_ADDRESS, (_ADDRESS, ctypes.c_int, _INT64, _INT64, _INT64)),
    "ggml_view_2d": (_ADDRESS, (_ADDRESS, _ADDRESS, _INT64, _INT64, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_mul_mat": (_ADDRESS, (_ADDRESS, _ADDRESS, _ADDRESS)),
    "ggml_mul_mat_id": (_ADDRESS, (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)),
    "ggml_get_rows": (_ADDRESS, (_ADDRESS, _ADDRESS, _ADDRESS)),
    "ggml_backend_tensor_set": (None, (_ADDRESS, _ADDRESS, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_tensor_get": (None, (_ADDRESS, _ADDRESS, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_tensor_alloc": (ctypes.c_int, (_ADDRESS, _ADDRESS, _ADDRESS)),
    "ggml_backend_cpu_buffer_from_ptr": (_ADDRESS, (_ADDRESS, ctypes.c_size_t)),
    "ggml_backend_buffer_free": (None, (_ADDRESS,)),
    "ggml_backend_buffer_get_usage": (ctypes.c_int, (_ADDRESS,)),
}


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h, as far as it is looked at; ``_check_tensor_layout`` holds it to the library."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Product:
    """A node of ggml's graph that multiplies rows with the weights of the model, or looks up rows of them.

    It is valid while the graph is.

    Attributes:
        weight: GGUF name of the weights.
        stack: how many matrices they are, in two dimensions, slowest first: ``(1, n)`` for experts and for heads.
        n_cols: length of their rows.
        inputs: address of the node that they are multiplied with: two products with the same one read the same rows.
        ids: address of the node that says which expert takes which row; ``None`` where every matrix has its own rows.
        output: address of the node itself.
        rows: of each matrix of the weights, those that take part: all of them but for a view.
        is_lookup: whether ``inputs`` are the numbers of the rows that it looks up.

    """

    weight: str
    stack: tuple[int, int]
    n_cols: int
    inputs: int
    ids: int | None
    output: int
    rows: range
    is_lookup: bool = False

    @property
    def n_matrices(self) -> int:
        """Matrices in the weights."""
        return math.prod(self.stack)


def product(address: int) -> Product | None:
    """Return what a graph's node multiplies with weights, ``None`` when it does nothing of the kind.

    Products of activations with one another, as with what is in a KV cache, are none: their left side does not lie in
    a buffer of weights.
    """
    library, plain, routed, lookup = _graph_library()
    node = _Tensor.from_address(address)
    if node.op not in (plain, routed, lookup):
        return None
    matrices = _Tensor.from_address(node.src[0])
    weight = _Tensor.from_address(matrices.view_src) if matrices.view_src else matrices
    if not weight.buffer or library.ggml_backend_buffer_get_usage(weight.buffer) != _USAGE_WEIGHTS:
        return None
    n_cols, n_rows, inner, outer = matrices.ne
    first = matrices.view_offs // matrices.nb[1]
    ids, name = node.src[2] if node.op == routed else None, _weight_name(weight.name.decode())
    rows = range(first, first + n_rows)
    return Product(name, (outer, inner), n_cols, node.src[1], ids, address, rows, node.op == lookup)


def _weight_name(name: str) -> str:
    """Return a tensor's name without what a scheduler adds when it copies it to a backend, ``CUDA0#NAME#0``."""
    return name.split("#")[1] if "#" in name else name


def product_rows(found: Product) -> tuple[Float32, NDArray[np.intp] | None]:
    """Return the rows that a product reads, and which matrix each is for; call it when the product has been computed.

    Returns:
        ``(n_rows, n_cols)`` float32, and ``(n_rows,)`` the number of the matrix, ``None`` where there is but one.

    Raises:
        GgmlError: the rows are of a type that is not known here.

    """
    rows = _tensor_values(found.inputs)
    if found.ids is not None:  # rows (n_tokens, 1 or n_used, n_cols), ids (n_tokens, n_used)
        ids = _tensor_values(found.ids)[0, 0]
        rows = np.broadcast_to(rows[0], (*ids.shape, found.n_cols))
        return rows.reshape(-1, found.n_cols), ids.ravel().astype(np.intp)
    if found.n_matrices == 1:
        return rows.reshape(-1, found.n_cols), None
    # ggml repeats matrices in both dimensions (ggml-cpu.c, ggml_compute_forward_mul_mat)
    outer, inner = (np.arange(n) * size // n for n, size in zip(rows.shape, found.stack, strict=False))
    owners = outer[:, np.newaxis] * found.stack[1] + inner
    return rows.reshape(-1, found.n_cols), np.repeat(owners.ravel(), rows.shape[2])


def looked_up_rows(found: Product) -> NDArray[np.intp]:
    """Return the numbers of the rows that a lookup takes, ``(n,)``, in the order of its output."""
    numbers: NDArray[np.intp] = _tensor_values(found.inputs).ravel().astype(np.intp)
    return numbers


def output_rows(found: Product) -> Float32:
    """Return what a product or a lookup computed, a row for each row that it reads: ``(n, n_rows or n_cols)``."""
    values: Float32 = _tensor_values(found.output)
    return values.reshape(-1, values.shape[-1])


def replace_output(found: Product, rows: Float32) -> None:
    """Write rows as ``output_rows`` returns them in place of what was computed."""
    library, *_ = _graph_library()
    tensor = _Tensor.from_address(found.output)
    data = np.ascontiguousarray(rows, np.float32)
    if tensor.type != _F32 or data.nbytes != library.ggml_nbytes(found.output):
        raise GgmlError(f"{found.weight}: its output is not a contiguous array of F32")
    library.ggml_backend_tensor_set(found.output, data.ctypes.data, 0, data.nbytes)


def _tensor_values(address: int) -> NDArray[Any]:
    """Return a copy of a tensor of the graph, four dimensions, slowest first; whatever its strides and backend."""
    library, *_ = _graph_library()
    tensor = _Tensor.from_address(address)
    dtypes: dict[int, Any] = {_F32: np.float32, _F16: np.float16, _I32: np.int32}
    if tensor.type not in dtypes:
        name, type_name = tensor.name.decode(), type_named(tensor.type)
        raise GgmlError(f"{name}: activations of type {type_name} cannot be read; wanted F32 or F16")
    data = np.empty(library.ggml_nbytes(address), np.uint8)
    library.ggml_backend_tensor_get(address, data.ctypes.data, 0, data.nbytes)
    dtype = np.dtype(dtypes[tensor.type])
    values: NDArray[Any] = np.ndarray(tuple(tensor.ne[::-1]), dtype, data, strides=tuple(tensor.nb[::-1]))
    return values.astype(np.float32) if dtype == np.float16 else values


@functools.cache
def _graph_library() -> tuple[ctypes.CDLL, int, int, int]:
    """Return libggml-base with what a graph is looked at with, and the numbers of MUL_MAT, MUL_MAT_ID and GET_ROWS."""
    library, path = open_library(), library_path()
    missing = [name for name in ("ggml_init", *_GRAPH_SYMBOLS) if not hasattr(library, name)]
    if missing:
        raise GgmlError(f"{path}: has no {', '.join(missing)}; another llama-cpp-python is needed to see activations")
    for name, (result, arguments) in _GRAPH_SYMBOLS.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    library.ggml_init.restype, library.ggml_init.argtypes = ctypes.c_void_p, (_InitParams,)
    return (library, *_check_tensor_layout(library, path))


def _check_tensor_layout(library: ctypes.CDLL, path: Path) -> tuple[int, int, int]:
    """Hold ``_Tensor`` against the library's own accessors on a small graph; return the numbers of its operations."""
    room = ctypes.create_string_buffer(1 << 14)
    start = -(-ctypes.addressof(room) // 64) * 64  # aligned as the buffer wants it
    context = library.ggml_init(_InitParams(1 << 16, None, True))
    buffer = library.ggml_backend_cpu_buffer_from_ptr(start, (1 << 14) - 64)
    try:
        matrices, rows, ids, picked = (
            library.ggml_new_tensor_3d(context, type_number, *shape)
            for type_number, shape in ((_F32, (8, 5, 3)), (_F32, (8, 2, 4)), (_I32, (2, 4, 1)), (_I32, (4, 3, 1)))
        )
        view = library.ggml_view_2d(context, matrices, 8, 4, 64, 32)
        products = [
            library.ggml_mul_mat(context, view, rows),
            library.ggml_mul_mat_id(context, matrices, rows, ids),
            library.ggml_get_rows(context, matrices, picked),
        ]
        for i, tensor in enumerate((matrices, rows, ids)):
            library.ggml_backend_tensor_alloc(buffer, tensor, start + 1024 * i)
        for i, tensor in enumerate((matrices, rows, ids, view, *products)):
            library.ggml_set_name(tensor, f"layout {i}".encode())
            _check_tensor(library, path, tensor)
        seen = [
            (_Tensor.from_address(matrices).buffer, buffer),
            (_Tensor.from_address(view).view_src, matrices),
            (_Tensor.from_address(view).view_offs, 32),
            (list(_Tensor.from_address(view).nb[:2]), [4, 64]),
            (list(_Tensor.from_address(products[0]).src[:3]), [view, rows, None]),
            (list(_Tensor.from_address(products[1]).src[:4]), [matrices, rows, ids, None]),
        ]
        if any(found != wanted for found, wanted in seen):
            raise _layout_error(path)
        numbers = [_Tensor.from_address(tensor).op for tensor in products]
        others = [_Tensor.from_address(tensor).op for tensor in (matrices, rows, ids, view)]
        if len({*numbers, *others}) < 5:  # nothing, a view, and the three operations
            raise _layout_error(path)
        if [library.ggml_op_desc(tensor) for tensor in products] != [b"MUL_MAT", b"MUL_MAT_ID", b"GET_ROWS"]:
            raise _layout_error(path)
    finally:
        library.ggml_backend_buffer_free(buffer)
        library.ggml_free(context)
    return numbers[0], numbers[1], numbers[2]


def _check_tensor(library: ctypes.CDLL, path: Path, address: int) -> None:
    tensor = _Tensor.from_address(address)
    found = (
        tensor.name,
        math.prod(tensor.ne),
        4 + sum((n - 1) * stride for n, stride in zip(tensor.ne, tensor.nb, strict=True)),  # of types of 4 bytes
        tensor.data,
    )
    accessors = ("get_name", "nelements", "nbytes", "get_data")
    wanted = tuple(getattr(library, f"ggml_{name}")(address) for name in accessors)
    if found != wanted or tensor.type not in (_F32, _I32):
        raise _layout_error(path)


def _layout_error(path: Path) -> GgmlError:
    return GgmlError(
        f"{path}: tensors have another layout than that of ggml 0.25; activations cannot be read with this "
        "llama-cpp-python, use version 0.3.36"
    )
