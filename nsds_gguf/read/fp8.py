"""FP8 checkpoints: 8-bit codes, times the scale of their tensor, row or block.

Such a checkpoint stores ``NAME`` as F8_E4M3 and ``NAME_scale_inv`` or ``NAME_scale`` beside it; despite the name, both
are factors (DeepSeek-V3, ``inference/kernel.py``, ``weight_dequant``; llama.cpp, ``conversion/base.py``,
``dequant_simple``). Products are computed in float32 when rows are read, and not cached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..records import Float32, Rows
from .quantization import Fp8
from .stored import StoredTensor

_SCALES = ("_scale_inv", "_scale")  # after the name of the weight

# Scales of activations and of the key/value cache, which weights do not need.
_UNUSED = (".input_scale", "activation_scale", ".output_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A tensor of F8_E4M3 codes and its scales.

    Args:
        codes: the stored codes, in the shape of the tensor.
        scales: the scales, with as many dimensions as the tensor.
        blocks: number of codes per scale along every dimension; the last block may be smaller.

    """

    codes: StoredTensor
    scales: StoredTensor
    blocks: tuple[int, ...]

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return the products of some rows and columns as a fresh float32 matrix, finite or not."""
        values = self.codes.values(rows, columns)
        column_blocks = np.arange(*columns.indices(self.n_cols)) // self.blocks[-1]
        scales = self.scales.rows(self._scale_rows(rows))
        with np.errstate(over="ignore"):  # an infinite product is an error, reported as such
            values *= np.take(scales, column_blocks, axis=1)  # in C order; indexing gives columns, 15 times slower
        return values

    def _scale_rows(self, rows: Rows) -> NDArray[np.intp]:
        """Return the row of ``scales``, as a matrix, that belongs to each of some rows."""
        wanted = np.arange(*rows.indices(self.n_rows)) if isinstance(rows, slice) else rows
        places = np.unravel_index(wanted, self.shape[:-1])
        blocks = tuple(place // size for place, size in zip(places, self.blocks, strict=False))
        return np.ravel_multi_index(blocks, self.scales.shape[:-1])

    def first_bytes(self, n_bytes: int) -> bytes:
        """Return at most ``n_bytes`` bytes, the scales' before the codes'."""
        return (self.scales.first_bytes(n_bytes) + self.codes.first_bytes(n_bytes))[:n_bytes]


def with_scales(tensors: Mapping[str, StoredTensor], fp8: Fp8 | None) -> dict[str, StoredTensor]:
    """Return the tensors, every FP8 tensor combined with its scales.

    Args:
        tensors: all tensors of the checkpoint, by name.
        fp8: FP8 settings of config.json; ``None`` without any.

    Raises:
        ModelError: FP8 codes without scales, or scales of the wrong shape.

    """
    codes = {name: tensor for name, tensor in tensors.items() if tensor.dtype == "F8_E4M3"}
    if fp8 is None and not codes:
        return dict(tensors)
    scales = {name: _scales_of(tensor, tensors) for name, tensor in codes.items()}
    consumed = {scale.name for scale in scales.values()}
    block = fp8.block if fp8 is not None else None
    return {
        name: _scaled(tensor, scales[name], block) if name in codes else tensor
        for name, tensor in tensors.items()
        if name not in consumed and not name.endswith(_UNUSED)
    }


def _scales_of(codes: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    found = [tensors[codes.name + suffix] for suffix in _SCALES if codes.name + suffix in tensors]
    if len(found) != 1:
        state = "is missing" if not found else f"and {codes.name + _SCALES[1]} contradict each other"
        raise ModelError(
            f"{codes.file}: tensor {codes.name} is stored as FP8 and its scale {codes.name + _SCALES[0]} {state}: "
            "download the checkpoint again"
        )
    found[0].require_readable()
    return found[0]


def _scaled(codes: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None) -> ScaledTensor:
    aligned = _aligned(scales.shape, len(codes.shape))
    blocks = _blocks(codes.shape, aligned, block) if len(codes.shape) > 1 else None
    if blocks is None:
        grid = f", or one per block of {block[0]} x {block[1]}" if block else ""
        raise ModelError(
            f"{scales.file}: tensor {scales.name}: shape {scales.shape} does not fit {codes.name}, {codes.shape}; "
            f"wanted one scale, one per row{grid}: see quantization_config in config.json"
        )
    return ScaledTensor(codes.name, codes.dtype, codes.shape, codes.file, codes, replace(scales, shape=aligned), blocks)


def _aligned(shape: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    """Return the shape of scales with ``n_dims`` dimensions; missing dimensions are the last (dequant_simple)."""
    return (1,) * n_dims if math.prod(shape) == 1 else shape + (1,) * (n_dims - len(shape))


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return the number of weights per scale along every dimension; ``None`` if the scales do not fit."""
    if len(scales) != len(shape):
        return None
    pairs = list(zip(shape, scales, strict=True))
    if block is not None and scales[-2:] == tuple(-(-n // size) for n, size in zip(shape[-2:], block, strict=True)):
        sizes = [*(_span(*pair) for pair in pairs[:-2]), *block]
    else:
        sizes = [*(_span(*pair) for pair in pairs[:-1]), shape[-1] if scales[-1] == 1 else 0]
    return None if 0 in sizes else tuple(sizes)


def _span(n_weights: int, n_scales: int) -> int:
    """Return the number of weights per scale if that is one or all, else 0."""
    if n_scales == 1:
        return n_weights
    return 1 if n_scales == n_weights else 0
