"""ggml, as shipped inside llama-cpp-python: quantize and dequantize rows, look into the products of a graph.

The only module that knows ctypes, and the layout of ggml's structures.

Nothing here keeps state but the loaded library. Both directions release the GIL for the whole call, so a thread pool
over row slabs keeps all cores busy. Rows are quantized independently of one another (ggml-quants.c), so the bytes
do not depend on how rows are cut into slabs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from ..errors import GgmlError
from ..records import Float32

# Types of ggml.h that no release of gguf has yet: number in enum ggml_type, weights and bytes of a block.
_NEWER_TYPES = {"Q2_0": (42, (64, 18))}

# By name, all types that a file may have: number in enum ggml_type.
TYPE_NUMBERS: Mapping[str, int] = {
    **{member.name: int(member) for member in GGMLQuantizationType},
    **{name: number for name, (number, _) in _NEWER_TYPES.items()},
}
_BLOCKS: Mapping[str, tuple[int, int]] = {
    **{member.name: sizes for member, sizes in GGML_QUANT_SIZES.items()},
    **{name: sizes for name, (_, sizes) in _NEWER_TYPES.items()},
}
_MOSTLY_Q2_0 = 41  # llama.h, enum llama_ftype; gguf does not have it yet


@dataclass(frozen=True)
class QuantType:
    """A type that this program writes.

    Attributes:
        name: ggml's name, in capitals.
        file_type: ``general.file_type`` of a file in which most bytes are of this type: llama.h, enum llama_ftype.
        is_fast: whether ggml-cpu has kernels for rows that it interleaves when it loads them, on some processor at
            least (ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type).
        weighs_columns: whether the scales minimize an error with column weights; the others round to nearest.
        fallback: what takes its place where rows are not whole blocks; empty where only F16 does.

    """

    name: str
    file_type: int
    is_fast: bool = False
    weighs_columns: bool = True
    fallback: str = ""


# In the order of menus and of ties between equal sizes. A type whose name is in ``quantize.formats.FORMATS`` can be
# rounded by GPTQ too.
#
# The fallback of a K-quant is the type with blocks of 32 nearest above it, and IQ4_NL rather than llama.cpp's Q4_0, for
# the same bytes with a better codebook (tensor_type_fallback).
TYPES: Mapping[str, QuantType] = {row.name: row for row in (
    QuantType("F32", LlamaFileType.ALL_F32, weighs_columns=False),
    QuantType("F16", LlamaFileType.MOSTLY_F16, weighs_columns=False),
    QuantType("BF16", LlamaFileType.MOSTLY_BF16, weighs_columns=False),
    QuantType("Q2_K", LlamaFileType.MOSTLY_Q2_K, is_fast=True, fallback="IQ4_NL"),
    QuantType("Q3_K", LlamaFileType.MOSTLY_Q3_K_M, fallback="IQ4_NL"),
    QuantType("Q4_K", LlamaFileType.MOSTLY_Q4_K_M, is_fast=True, fallback="Q5_0"),
    QuantType("Q5_K", LlamaFileType.MOSTLY_Q5_K_M, is_fast=True, fallback="Q5_1"),
    QuantType("Q6_K", LlamaFileType.MOSTLY_Q6_K, is_fast=True, fallback="Q8_0"),
    QuantType("Q4_0", LlamaFileType.MOSTLY_Q4_0, is_fast=True),
    QuantType("IQ4_NL", LlamaFileType.MOSTLY_IQ4_NL, is_fast=True),
    QuantType("Q5_0", LlamaFileType.MOSTLY_Q5_0),
    QuantType("Q5_1", LlamaFileType.MOSTLY_Q5_1),
    QuantType("Q8_0", LlamaFileType.MOSTLY_Q8_0, is_fast=True, weighs_columns=False),
    QuantType("Q2_0", _MOSTLY_Q2_0),
)}  # fmt: skip


def _of_block(n_weights: int) -> tuple[str, ...]:
    return tuple(name for name in TYPES if _BLOCKS[name][0] == n_weights)


# NARROW_TYPES take the place of K-quants in rows that do not fit; Q2_0, with blocks of 64, is used where it is named.
FLOAT_TYPES, NARROW_TYPES, K_TYPES = _of_block(1), _of_block(32), _of_block(256)

# Further types that ggml dequantizes, which files that are quantized already may hold; gguf may be too old for some.
READ_TYPES = (*TYPES, *(
    name for name in ("Q4_1", "MXFP4", "NVFP4", "Q1_0", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
                      "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS") if name in GGMLQuantizationType.__members__
))  # fmt: skip

_LIBRARY_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
_SYMBOLS = ("ggml_quantize_chunk", "ggml_get_type_traits", "ggml_type_name", "ggml_row_size", "ggml_commit")


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


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def block(type_name: str) -> tuple[int, int]:
    """Return ``(weights, bytes)`` of one block of a type."""
    return _BLOCKS[type_name]


def type_named(number: int) -> str | None:
    """Return the name of a type by its number in enum ggml_type; ``None`` for a number that is not known."""
    return next((name for name, each in TYPE_NUMBERS.items() if each == number), None)


def bits_per_weight(type_name: str) -> float:
    """Return the bits that one weight takes in a type, scales included."""
    n_weights, n_bytes = block(type_name)
    return n_bytes * 8 / n_weights


def fits(type_name: str, n_cols: int) -> bool:
    """Return whether rows of ``n_cols`` weights can be cut into whole blocks of a type."""
    return n_cols % block(type_name)[0] == 0


def row_bytes(type_name: str, n_cols: int) -> int:
    """Return the bytes of one row; raises ``GgmlError`` when the row is not whole blocks."""
    n_weights, n_bytes = block(type_name)
    if n_cols % n_weights:
        raise GgmlError(f"{type_name} needs rows of a multiple of {n_weights} weights, got {n_cols}")
    return n_cols // n_weights * n_bytes


def quantize(rows: Float32, type_name: str, importance: Float32 | None = None) -> NDArray[np.uint8]:
    """Quantize rows with ``ggml_quantize_chunk``, the function that llama-quantize calls.

    Args:
        rows: ``(n_rows, n_cols)`` float32.
        type_name: one of ``TYPES``.
        importance: ``(n_cols,)`` float32, weight of each column's squared error, or ``None``.

    Returns:
        ``(n_rows, row_bytes)`` uint8.

    Raises:
        GgmlError: the type or the row length is not one that ggml quantizes, or it wrote another number of bytes.

    """
    if type_name not in TYPES:  # ggml would end the process
        raise GgmlError(f"cannot quantize to {type_name}; wanted one of {', '.join(TYPES)}")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n_rows, n_cols = rows.shape
    out = np.empty((n_rows, row_bytes(type_name, n_cols)), dtype=np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        if weights.shape != (n_cols,):
            raise GgmlError(f"importance: wanted {n_cols} columns, got shape {weights.shape}")
    written = _library().ggml_quantize_chunk(
        TYPE_NUMBERS[type_name], rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    if written != out.nbytes:
        raise GgmlError(f"ggml_quantize_chunk({type_name}): wanted {out.nbytes} bytes, got {written}")
    return out


def dequantize(data: NDArray[np.uint8], type_name: str, n_cols: int) -> Float32:
    """Dequantize rows with ggml's ``to_float``.

    Args:
        data: ``(n_rows, row_bytes)`` uint8, as ``quantize`` returns it.
        type_name: one of ``READ_TYPES``.
        n_cols: weights in a row.

    Returns:
        ``(n_rows, n_cols)`` float32.

    Raises:
        GgmlError: the rows are not of the length that the type needs.

    """
    data = np.ascontiguousarray(data)
    if data.shape[1] != row_bytes(type_name, n_cols):
        raise GgmlError(f"{type_name}: wanted rows of {row_bytes(type_name, n_cols)} bytes, got {data.shape[1]}")
    out: Float32 = np.empty((data.shape[0], n_cols), dtype=np.float32)
    if type_name == "F32":  # ggml has no converter for what needs none
        out[:] = data.view(np.float32)
        return out
    _traits(type_name).to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


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


def version() -> str:
    """Return ggml's own version and commit, for records and ``--version``."""
    library = _library()
    parts = [getattr(library, name)() for name in ("ggml_version", "ggml_commit") if hasattr(library, name)]
    return "-".join(part.decode() for part in parts)


@functools.cache
def _library() -> ctypes.CDLL:
    """Load libggml-base and check that its types are the ones that gguf describes."""
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise GgmlError(f"{path}: cannot be loaded: {error}; reinstall llama-cpp-python") from error
    missing = [name for name in _SYMBOLS if not hasattr(library, name)]
    if missing:
        raise GgmlError(f"{path}: has no {', '.join(missing)}; upgrade llama-cpp-python")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    for name in ("ggml_version", "ggml_commit"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_char_p
    _check_types(library, path)
    return library


def _library_path() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise GgmlError("llama-cpp-python is not installed; run: pip install llama-cpp-python")
    name = _LIBRARY_NAMES.get(sys.platform, "libggml-base.so")
    path = Path(spec.submodule_search_locations[0]) / "lib" / name
    if not path.exists():
        raise GgmlError(f"{path}: not found; this llama-cpp-python ships no ggml of its own, reinstall it")
    return path


def _check_types(library: ctypes.CDLL, path: Path) -> None:
    for name in READ_TYPES:
        traits = library.ggml_get_type_traits(TYPE_NUMBERS[name]).contents
        found = (traits.type_name.decode().upper(), traits.blck_size, traits.type_size)
        if found != (name, *block(name)):
            raise GgmlError(f"{path}: type {name}: wanted {block(name)} weights and bytes a block, got {found}")


@functools.cache
def _traits(type_name: str) -> _TypeTraits:
    traits: _TypeTraits = _library().ggml_get_type_traits(TYPE_NUMBERS[type_name]).contents
    return traits


@functools.cache
def _graph_library() -> tuple[ctypes.CDLL, int, int, int]:
    """Return libggml-base with what a graph is looked at with, and the numbers of MUL_MAT, MUL_MAT_ID and GET_ROWS."""
    library, path = _library(), _library_path()
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
