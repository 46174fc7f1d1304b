"""MXFP4 checkpoints: blocks of 32 four-bit codes, times a power of two (OCP Microscaling Formats 1.0, section 5.3).

gpt-oss stores ``NAME_blocks``, ``(..., n_blocks, 16)`` bytes with two codes each, the even weight in the low half, and
``NAME_scales``, ``(..., n_blocks)`` exponents with a bias of 127. The products are exact in BF16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from ..errors import ModelError
from ..records import Float32, Rows
from .safetensors import SafetensorsTensor
from .stored import StoredTensor

BLOCK = 32  # weights per scale
BLOCKS, SCALES = "_blocks", "_scales"

_CODES = np.arange(16, dtype=np.uint8)
_VALUES: Float32 = _CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@dataclass(frozen=True)
class MxTensor(StoredTensor):
    """A tensor of MXFP4 codes and scales, each as a matrix with the rows of the tensor."""

    codes: SafetensorsTensor
    scales: SafetensorsTensor

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return the weights of some rows and columns as a fresh float32 matrix."""
        first, last, _ = columns.indices(self.n_cols)
        start, stop = first // BLOCK, max(-(-last // BLOCK), first // BLOCK)
        codes = self.codes.stored(rows, slice(start * BLOCK // 2, stop * BLOCK // 2))
        scales = self.scales.values(rows, slice(start, stop))
        pairs = np.stack([_VALUES[codes & 15], _VALUES[codes >> 4]], axis=2)
        blocks = pairs.reshape(len(codes), stop - start, BLOCK) * scales[:, :, np.newaxis]
        offset = start * BLOCK
        return np.ascontiguousarray(blocks.reshape(len(codes), -1)[:, first - offset : last - offset])

    def first_bytes(self, n_bytes: int) -> bytes:
        """Return at most ``n_bytes`` bytes, the scales' before the codes'."""
        return (self.scales.first_bytes(n_bytes) + self.codes.first_bytes(n_bytes))[:n_bytes]


def with_mxfp4(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors, every ``NAME_blocks`` combined with its ``NAME_scales`` under the name of the blocks.

    Raises ``ModelError`` for scales of another shape.
    """
    found = dict(tensors)
    for name, codes in tensors.items():
        scales = tensors.get(name.removesuffix(BLOCKS) + SCALES)
        if not name.endswith(BLOCKS) or not isinstance(codes, SafetensorsTensor):
            continue
        if not isinstance(scales, SafetensorsTensor) or {codes.dtype, scales.dtype} != {"U8"}:
            continue
        if codes.shape != (*scales.shape, BLOCK // 2):
            raise ModelError(
                f"{scales.file}: tensor {scales.name}: wanted shape {codes.shape[:-1]} for {name}, got {scales.shape}: "
                "download the checkpoint again"
            )
        found[name] = _combined(codes, scales)
        del found[scales.name]
    return found


def _combined(codes: SafetensorsTensor, scales: SafetensorsTensor) -> MxTensor:
    """Return the tensor of codes and scales: both become matrices of bytes that hold exponents."""
    n_rows, n_blocks = int(np.prod(scales.shape[:-1])), scales.shape[-1]
    matrix = replace(codes, dtype="F8_E8M0", shape=(n_rows, n_blocks * BLOCK // 2))
    powers = replace(scales, dtype="F8_E8M0", shape=(n_rows, n_blocks))
    shape = (*scales.shape[:-1], n_blocks * BLOCK)
    return MxTensor(codes.name, "BF16", shape, codes.file, matrix, powers)
