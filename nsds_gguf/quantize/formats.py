"""Byte layouts of the block formats, as tables: unpack bytes into codes and scales, and pack them again.

A format cuts a row into blocks (256 weights in K-quants, 64 in Q2_0, 32 in the others) and a block into sub-blocks. A
weight with code ``code``, integers s and m of its sub-block and float16 scales d and dmin of its block is

    d * s * levels[code] - dmin * m

Formats without s have s = 1; formats without m have m = 0. Bits are numbered from the lowest.

Codes, and integers of sub-blocks, are stored in *fields*: a range of bytes is cut into groups of equal width; within
a group of ``width`` bytes, byte l holds in its k-th ``bits`` bits value ``k * width + l`` of the group. A second field
holds the upper bits of the same values.

    type    bytes   from byte: what
    Q2_K     84     0: s and m of 16, a nibble each   16: codes   80: d   82: dmin
    Q3_K    110     0: codes, bit 2   32: codes, bits 0-1   96: s + 32 of 16, bits 0-3   104: bits 4-5   108: d
    Q4_K    144     0: d   2: dmin   4: s and m of 8, 6 bits each (``_SixBitPairs``)   16: codes
    Q5_K    176     0: d   2: dmin   4: s and m as in Q4_K   16: codes, bit 4   48: codes, bits 0-3
    Q6_K    210     0: codes, bits 0-3   128: codes, bits 4-5   192: s of 16, int8   208: d
    Q4_0     18     0: d   2: codes
    IQ4_NL   18     as Q4_0, with the levels of a table
    Q5_0     22     0: d   2: codes, bit 4   6: codes, bits 0-3
    Q5_1     24     0: d   2: -dmin, m = 1   4: codes, bit 4   8: codes, bits 0-3
    Q8_0     34     0: d   2: codes - 128, int8
    Q2_0     18     0: d, of either sign   2: codes

Source: llama.cpp, ggml-common.h (``block_q2_K`` and following) and ggml-quants.c (``dequantize_row_*``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..records import Float32

UInt8 = NDArray[np.uint8]
Int16 = NDArray[np.int16]


@dataclass(frozen=True)
class Blocks:
    """Rows of a block format, unpacked.

    Attributes:
        codes: ``(n_rows, n_blocks, n_sub, sub)`` uint8, index into the levels of the format.
        s: ``(n_rows, n_blocks, n_sub)`` int16.
        m: ``(n_rows, n_blocks, n_sub)`` int16.
        d: ``(n_rows, n_blocks)`` float32, each the value of a float16.
        dmin: ``(n_rows, n_blocks)`` float32, each the value of a float16.

    """

    codes: UInt8
    s: Int16
    m: Int16
    d: Float32
    dmin: Float32

    @property
    def scale(self) -> Float32:
        """The factor of a level: ``(n_rows, n_blocks, n_sub)`` float32."""
        scale: Float32 = self.d[..., None] * self.s
        return scale

    @property
    def offset(self) -> Float32:
        """The subtracted offset: ``(n_rows, n_blocks, n_sub)`` float32."""
        offset: Float32 = self.dmin[..., None] * self.m
        return offset

    def reordered(self, order: NDArray[np.int64]) -> Blocks:
        """Return the blocks with column j moved to ``order[j]``; columns of a sub-block stay in one, as do sub-blocks.

        ``order`` is a permutation, ``(n_cols,)``.
        """
        n_rows, _, n_sub, sub = self.codes.shape
        place = np.argsort(order)
        subs, blocks = place[::sub] // sub, place[:: n_sub * sub] // (n_sub * sub)
        codes = np.take(self.codes.reshape(n_rows, -1), place, axis=1).reshape(self.codes.shape)
        s, m = (np.take(x.reshape(n_rows, -1), subs, axis=1).reshape(x.shape) for x in (self.s, self.m))
        d, dmin = (np.take(x, blocks, axis=1) for x in (self.d, self.dmin))
        return Blocks(codes, s, m, d, dmin)


@dataclass(frozen=True)
class _Field:
    """Bytes ``start`` to ``start + n_bytes`` of a block, in ``groups``: ``bits`` of each value, from bit ``shift``."""

    start: int
    n_bytes: int
    groups: int
    bits: int
    shift: int = 0

    def read(self, blocks: UInt8) -> UInt8:
        """Return the values, ``(n, n_values)``, of blocks ``(n, block_bytes)``."""
        data = blocks[:, self.start : self.start + self.n_bytes].reshape(len(blocks), self.groups, 1, -1)
        parts = data >> self._shifts & np.uint8((1 << self.bits) - 1)
        values: UInt8 = parts.reshape(len(blocks), -1) << np.uint8(self.shift)
        return values

    def write(self, blocks: UInt8, values: UInt8) -> None:
        """Write values ``(n, n_values)`` into blocks of zeros ``(n, block_bytes)``."""
        bits = values >> np.uint8(self.shift) & np.uint8((1 << self.bits) - 1)
        parts = bits.reshape(len(blocks), self.groups, 8 // self.bits, -1) << self._shifts
        data = np.bitwise_or.reduce(parts, axis=2)
        blocks[:, self.start : self.start + self.n_bytes] = data.reshape(len(blocks), -1)

    @property
    def _shifts(self) -> UInt8:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


class _Scales(Protocol):
    """The layout of s and m of the sub-blocks."""

    def read(self, blocks: UInt8) -> tuple[Int16, Int16]:
        """Return s and m, ``(n, n_sub)`` each, of blocks ``(n, block_bytes)``."""
        ...

    def write(self, blocks: UInt8, s: Int16, m: Int16) -> None:
        """Write s and m into blocks of zeros."""
        ...


@dataclass(frozen=True)
class _Fixed:
    """Nothing is stored: s is 1, and m is ``m``."""

    m: int = 0

    def read(self, blocks: UInt8) -> tuple[Int16, Int16]:
        ones = np.ones((len(blocks), 1), dtype=np.int16)
        return ones, ones * np.int16(self.m)

    def write(self, blocks: UInt8, s: Int16, m: Int16) -> None:
        pass


@dataclass(frozen=True)
class _Nibbles:
    """Q2_K: s and m, one after the other, in one field."""

    field: _Field

    def read(self, blocks: UInt8) -> tuple[Int16, Int16]:
        s, m = np.split(self.field.read(blocks).astype(np.int16), 2, axis=1)
        return s, m

    def write(self, blocks: UInt8, s: Int16, m: Int16) -> None:
        self.field.write(blocks, np.concatenate([s, m], axis=1).astype(np.uint8))


@dataclass(frozen=True)
class _Signed:
    """Q3_K: s plus ``shift`` in fields; no m."""

    fields: tuple[_Field, ...]
    shift: int

    def read(self, blocks: UInt8) -> tuple[Int16, Int16]:
        s = sum(field.read(blocks) for field in self.fields).astype(np.int16) - np.int16(self.shift)  # type: ignore[union-attr]
        return s, np.zeros_like(s)

    def write(self, blocks: UInt8, s: Int16, m: Int16) -> None:
        for field in self.fields:
            field.write(blocks, (s + self.shift).astype(np.uint8))


@dataclass(frozen=True)
class _Bytes:
    """Q6_K: s as int8 from byte ``start``; no m."""

    start: int
    n_sub: int

    def read(self, blocks: UInt8) -> tuple[Int16, Int16]:
        s = blocks[:, self.start : self.start + self.n_sub].view(np.int8).astype(np.int16)
        return s, np.zeros_like(s)

    def write(self, blocks: UInt8, s: Int16, m: Int16) -> None:
        blocks[:, self.start : self.start + self.n_sub] = s.astype(np.int8).view(np.uint8)


@dataclass(frozen=True)
class _SixBitPairs:
    """Q4_K, Q5_K: 8 s and 8 m of 6 bits in 12 bytes from ``start``, in three groups A, B, C of 4.

    Sub-block i < 4: s in A[i], m in B[i], bits 0-5. Sub-block 4 + i: s has bits 0-3 in the low nibble of C[i] and bits
    4-5 in bits 6-7 of A[i]; m has them in the high nibble of C[i] and in bits 6-7 of B[i].
    """

    start: int

    def read(self, blocks: UInt8) -> tuple[Int16, Int16]:
        a, b, c = (blocks[:, i : i + 4].astype(np.int16) for i in range(self.start, self.start + 12, 4))
        s = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
        m = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
        return s, m

    def write(self, blocks: UInt8, s: Int16, m: Int16) -> None:
        a = s[:, :4] | s[:, 4:] >> 4 << 6
        b = m[:, :4] | m[:, 4:] >> 4 << 6
        c = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
        blocks[:, self.start : self.start + 12] = np.concatenate([a, b, c], axis=1).astype(np.uint8)


@dataclass(frozen=True)
class Format:
    """The values of a type and their layout.

    Attributes:
        block: weights per block.
        sub: weights per sub-block.
        block_bytes: bytes per block.
        levels: ``(n_levels,)`` float32, ascending.
        s_range: least and greatest s; both 1 where s is not stored.
        m_max: greatest m; 0 where there is no m. Where s is not stored, m is 1 and dmin may be negative.

    """

    block: int
    sub: int
    block_bytes: int
    levels: Float32
    s_range: tuple[int, int]
    m_max: int
    _codes: tuple[_Field, ...]
    _scales: _Scales
    _d: int
    _dmin: int | None = None
    _dmin_sign: int = 1
    _code_flip: int = 0

    @property
    def n_sub(self) -> int:
        """Sub-blocks per block."""
        return self.block // self.sub

    @property
    def has_s(self) -> bool:
        """Whether sub-blocks have scales of their own."""
        return self.s_range[0] < self.s_range[1]

    @cached_property
    def has_even_levels(self) -> bool:
        """Whether adjacent levels are 1 apart."""
        return bool((np.diff(self.levels) == 1).all())

    def unpack(self, data: UInt8) -> Blocks:
        """Unpack rows, ``(n_rows, row_bytes)`` uint8."""
        blocks = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        codes = self._codes[0].read(blocks)
        for field in self._codes[1:]:
            codes |= field.read(blocks)
        s, m = self._scales.read(blocks)
        dmin = np.zeros(len(blocks), dtype=np.float32)
        if self._dmin is not None:
            dmin = self._dmin_sign * _float16_at(blocks, self._dmin)
        n_rows = len(data)
        return Blocks(
            (codes ^ np.uint8(self._code_flip)).reshape(n_rows, -1, self.n_sub, self.sub),
            s.reshape(n_rows, -1, self.n_sub),
            m.reshape(n_rows, -1, self.n_sub),
            _float16_at(blocks, self._d).reshape(n_rows, -1),
            dmin.reshape(n_rows, -1),
        )

    def pack(self, blocks: Blocks) -> UInt8:
        """Return the bytes of rows, ``(n_rows, row_bytes)`` uint8."""
        n_rows, n_blocks = blocks.d.shape
        out = np.zeros((n_rows * n_blocks, self.block_bytes), dtype=np.uint8)
        codes = blocks.codes.reshape(len(out), self.block) ^ np.uint8(self._code_flip)
        for field in self._codes:
            field.write(out, codes)
        self._scales.write(out, blocks.s.reshape(len(out), -1), blocks.m.reshape(len(out), -1))
        _put_float16(out, self._d, blocks.d)
        if self._dmin is not None:
            _put_float16(out, self._dmin, self._dmin_sign * blocks.dmin)
        return out.reshape(n_rows, -1)

    def dequantize(self, blocks: Blocks) -> Float32:
        """Return the weights, ``(n_rows, n_cols)`` float32."""
        weights = blocks.scale[..., None] * self.levels[blocks.codes] - blocks.offset[..., None]
        flat: Float32 = weights.reshape(len(weights), -1)
        return flat


def joined(parts: Sequence[Blocks]) -> Blocks:
    """Concatenate the blocks of parts, from left to right."""
    return Blocks(*(np.concatenate([getattr(part, f.name) for part in parts], axis=1) for f in fields(Blocks)))


def _float16_at(blocks: UInt8, start: int) -> Float32:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")[:, 0].astype(np.float32)


def _put_float16(blocks: UInt8, start: int, values: Float32) -> None:
    blocks[:, start : start + 2] = values.reshape(-1, 1).astype("<f2").view(np.uint8)


def _whole(low: int, high: int) -> Float32:
    return np.arange(low, high + 1, dtype=np.float32)


# kvalues_iq4nl of ggml-common.h
_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)

FORMATS = {
    "Q2_K": Format(256, 16, 84, _whole(0, 3), (0, 15), 15, (_Field(16, 64, 2, 2),),
                   _Nibbles(_Field(0, 16, 1, 4)), 80, 82),
    "Q3_K": Format(256, 16, 110, _whole(-4, 3), (-32, 31), 0, (_Field(32, 64, 2, 2), _Field(0, 32, 1, 1, 2)),
                   _Signed((_Field(96, 8, 1, 4), _Field(104, 4, 1, 2, 4)), 32), 108),
    "Q4_K": Format(256, 32, 144, _whole(0, 15), (0, 63), 63, (_Field(16, 128, 4, 4),), _SixBitPairs(4), 0, 2),
    "Q5_K": Format(256, 32, 176, _whole(0, 31), (0, 63), 63, (_Field(48, 128, 4, 4), _Field(16, 32, 1, 1, 4)),
                   _SixBitPairs(4), 0, 2),
    "Q6_K": Format(256, 16, 210, _whole(-32, 31), (-128, 127), 0, (_Field(0, 128, 2, 4), _Field(128, 64, 2, 2, 4)),
                   _Bytes(192, 16), 208),
    "Q4_0": Format(32, 32, 18, _whole(-8, 7), (1, 1), 0, (_Field(2, 16, 1, 4),), _Fixed(), 0),
    "IQ4_NL": Format(32, 32, 18, _IQ4_NL, (1, 1), 0, (_Field(2, 16, 1, 4),), _Fixed(), 0),
    "Q5_0": Format(32, 32, 22, _whole(-16, 15), (1, 1), 0, (_Field(6, 16, 1, 4), _Field(2, 4, 4, 1, 4)), _Fixed(), 0),
    "Q5_1": Format(32, 32, 24, _whole(0, 31), (1, 1), 1, (_Field(8, 16, 1, 4), _Field(4, 4, 4, 1, 4)), _Fixed(1), 0, 2,
                   _dmin_sign=-1),
    "Q8_0": Format(32, 32, 34, _whole(-128, 127), (1, 1), 0, (_Field(2, 32, 1, 8),), _Fixed(), 0, _code_flip=0x80),
    "Q2_0": Format(64, 64, 18, _whole(-1, 2), (1, 1), 0, (_Field(2, 16, 16, 2),), _Fixed(), 0),
}  # fmt: skip
