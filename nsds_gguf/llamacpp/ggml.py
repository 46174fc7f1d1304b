"""ggml, as shipped inside llama-cpp-python: quantize and dequantize rows.

``graph`` has what looks into the products of a running graph; no other module knows ctypes.

Nothing here keeps state but the loaded library. Both directions release the GIL for the whole call, so a thread pool
over row slabs keeps all cores busy. Rows are quantized independently of one another (ggml-quants.c), so the bytes
do not depend on how rows are cut into slabs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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

# For rows that are a multiple of 64 only, in budgets below those of NARROW_TYPES; llama.cpp reads Q2_0 since July 2026.
SMALL_ROW_TYPES = ("Q2_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")

# Further types that ggml dequantizes, which files that are quantized already may hold; gguf may be too old for some.
READ_TYPES = (*TYPES, *(
    name for name in ("Q4_1", "MXFP4", "NVFP4", "Q1_0", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
                      "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS") if name in GGMLQuantizationType.__members__
))  # fmt: skip

_LIBRARY_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
_SYMBOLS = ("ggml_quantize_chunk", "ggml_get_type_traits", "ggml_type_name", "ggml_row_size", "ggml_commit")


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
    written = open_library().ggml_quantize_chunk(
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


def version() -> str:
    """Return ggml's own version and commit, for records and ``--version``."""
    library = open_library()
    parts = [getattr(library, name)() for name in ("ggml_version", "ggml_commit") if hasattr(library, name)]
    return "-".join(part.decode() for part in parts)


@functools.cache
def open_library() -> ctypes.CDLL:
    """Load libggml-base and check that its types are the ones that gguf describes."""
    path = library_path()
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


def library_path() -> Path:
    """Return the path of libggml-base; raise ``GgmlError`` where llama-cpp-python, or its ggml, is not there."""
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
    traits: _TypeTraits = open_library().ggml_get_type_traits(TYPE_NUMBERS[type_name]).contents
    return traits
