"""llama.cpp's own quantizer, driven through the binding: the oracle of what is written."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType, ReaderTensor

from nsds_gguf.records import Float32, Model

# llama.cpp looks at overrides only when the base type is a quantized one; with this one, none needs importance.
BASE_TYPE = LlamaFileType.MOSTLY_Q8_0


def name_patterns(types: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return ``(pattern, type)`` that give each tensor its type and match no other."""
    return [(f"^{re.escape(name)}$", type_name) for name, type_name in types.items()]


def llama_quantize(
    source: Path,
    target: Path,
    patterns: Sequence[tuple[str, str]],
    importance: Mapping[str, Float32] | None = None,
    n_threads: int = 2,
) -> None:
    """Quantize a GGUF with ``llama_model_quantize``.

    Args:
        source: F32, F16 or BF16 GGUF.
        target: file to create.
        patterns: ``(pattern, type)``; llama.cpp searches names with std::regex and takes the first hit.
        importance: by tensor name, ``(n_cols,)``, or ``(n_experts * n_cols,)`` for stacked experts.
        n_threads: threads.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = n_threads, int(BASE_TYPE)
    overrides = (llama_cpp.llama_model_tensor_override * (len(patterns) + 1))()  # the last one stays null: the end
    for entry, (pattern, type_name) in zip(overrides, patterns, strict=False):
        entry.pattern, entry.type = pattern.encode(), int(GGMLQuantizationType[type_name])
    params.tt_overrides = overrides
    columns = {name: np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    if columns:
        data = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
        for entry, (name, values) in zip(data, columns.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = data
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize refuses {source}; llama.cpp's log says why")


def per_expert(model: Model, importance: Mapping[str, Float32]) -> dict[str, Float32]:
    """Return the column weights as llama.cpp takes them: those of every expert of a stack, one after another."""
    return {
        name: values.ravel() if values.ndim > 1 else np.tile(values, tensor.n_rows // tensor.shape[-2])
        for name, values in importance.items()
        for tensor in [model.by_name[name]]
    }


def read_tensors(path: Path) -> dict[str, ReaderTensor]:
    """Return the tensors of a GGUF by name."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    """Fail unless two GGUFs hold the same tensors, byte for byte; the order of the tensors does not count.

    The message names the first tensor that differs, its row, the block in the row and the byte in the block.
    """
    found, wanted = read_tensors(ours), read_tensors(theirs)
    assert sorted(found) == sorted(wanted), f"tensors differ: {sorted(set(found) ^ set(wanted))}"
    for name, tensor in found.items():
        other = wanted[name]
        assert tensor.tensor_type == other.tensor_type, (
            f"{name}: wanted {other.tensor_type.name}, got {tensor.tensor_type.name}"
        )
        assert tensor.shape.tolist() == other.shape.tolist(), f"{name}: wanted {other.shape}, got {tensor.shape}"
        difference = first_difference(tensor, other)
        assert difference is None, f"{name} ({tensor.tensor_type.name}): {difference}"


def first_difference(ours: ReaderTensor, theirs: ReaderTensor) -> str | None:
    """Say where the data of two tensors of one type and shape begin to differ; ``None`` when they do not."""
    got, wanted = (np.asarray(tensor.data).view(np.uint8).ravel() for tensor in (ours, theirs))
    unequal = np.flatnonzero(got != wanted)
    if not len(unequal):
        return None
    block_weights, block_bytes = GGML_QUANT_SIZES[ours.tensor_type]
    at = int(unequal[0])
    block, byte = divmod(at, block_bytes)
    row, block_in_row = divmod(block, int(ours.shape[0]) // block_weights)
    return (
        f"row {row}, block {block_in_row}, byte {byte} of it: wanted {wanted[at]:#04x}, got {got[at]:#04x} "
        f"({len(unequal)} of {len(got)} bytes differ)"
    )


def extreme_rows(n_cols: int) -> Float32:
    """Return rows that strain quantizers: zeros, zero blocks, denormals, outliers, constants, halves, one sign."""
    rng = np.random.default_rng(4)
    noise = rng.standard_normal(n_cols).astype(np.float32)
    outlier, holes = noise.copy(), noise.copy()
    outlier[n_cols // 3] = 6e4
    holes[n_cols // 4 : n_cols // 2] = 0
    return np.stack(
        [
            np.zeros(n_cols, np.float32),
            holes,
            outlier,
            -np.abs(noise),
            np.full(n_cols, 0.125, np.float32),
            noise * np.float32(1e-7),  # scales below float16's normal range
            noise * np.float32(1e-40),  # denormal in float32
            np.where(noise > 0, np.float32(1), np.float32(-1)),
            np.exp(8 * noise).clip(max=6e4).astype(np.float32),
            np.eye(1, n_cols, n_cols - 1, dtype=np.float32)[0] * np.float32(-3e4),
        ]
    )
