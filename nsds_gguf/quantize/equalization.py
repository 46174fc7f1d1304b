"""Outlier channels made even before anything is rounded, by factors that cancel: SmoothQuant without data.

Some channels of large models are far larger than the others in what matrices read, and what reads them has small
columns (LLM.int8(), arXiv 2208.07339). Both are bad for blocks: rounding spoils the small columns, and llama.cpp, which
rounds what it multiplies with quantized weights to 8 bits in blocks of 32 or 256, spoils everything beside a large
channel. A factor moved from the gain in front into the columns behind changes neither, nor does one moved from the rows
that write hidden units into the columns that read them (SmoothQuant, arXiv 2211.10438).

Factors are powers of two, so that every product and sum is what it was, to the last bit, as long as nothing is rounded.
They even out the columns' energies and those of their inputs: in a block of weights with one scale the squared error
``sum x_j^2 s_j^-2 * sum w_j^2 s_j^2`` is least for ``s_j^2`` in proportion to ``x_j / w_j``. Where no channel stands
out nothing is changed (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Model, Tensor

Exponents = NDArray[np.int64]

OUTSTANDING = 2.5  # log2 of the factor of at least one channel, where channels are evened out
LEAST = 1.0  # log2 of the factors that are worth it there
LARGEST = 16.0  # log2; more is a dead channel

_SLAB_WEIGHTS = 1 << 20

# What a layer may hold: nothing else reads a norm or stands between hidden units and what reads them.
_KNOWN = frozenset(
    ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_output",
     "post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm")
)  # fmt: skip


@dataclass(frozen=True)
class Balance:
    """Powers of two that weights are multiplied by.

    Attributes:
        columns: by name of a matrix, ``(n_cols,)`` exponents of its columns.
        rows: by name of a matrix, gain or bias, ``(n_rows,)`` exponents of its rows or entries.
        n_channels: channels that are evened out, all places together.
        n_places: norms and feed-forward blocks where they are.
    """

    columns: Mapping[str, Exponents] = field(default_factory=dict)
    rows: Mapping[str, Exponents] = field(default_factory=dict)
    n_channels: int = 0
    n_places: int = 0

    def __bool__(self) -> bool:
        """Return whether anything changes."""
        return bool(self.columns)

    def applied(self, model: Model) -> Model:
        """Return the model that computes the same from weights multiplied."""
        if not self:
            return model
        return replace(model, tensors=tuple(self._multiplied(tensor) for tensor in model.tensors))

    def _multiplied(self, tensor: Tensor) -> Tensor:
        columns, rows = self.columns.get(tensor.name), self.rows.get(tensor.name)
        if rows is not None and len(tensor.shape) == 1:
            columns, rows = rows, None
        if columns is None and rows is None:
            return tensor

        def read_rows(start: int, stop: int) -> Float32:
            values = tensor.read_rows(start, stop)
            if columns is not None:
                values = np.ldexp(values, columns)
            if rows is not None:
                values = np.ldexp(values, rows[start:stop, np.newaxis])
            return values

        return replace(tensor, read_rows=read_rows)

    def weights(self, importance: Mapping[str, Float32]) -> dict[str, Float32]:
        """Return column weights of mean 1 for the matrices multiplied, from those of the matrices as they were."""
        found = dict(importance)
        for name in importance.keys() & self.columns.keys():
            scaled = np.ldexp(importance[name].astype(np.float64), -2 * self.columns[name])
            found[name] = (scaled / scaled.mean(axis=-1, keepdims=True)).astype(np.float32)
        return found

    def moments(self, name: str, full: Float64) -> Float64:
        """Return the second moments ``(n_cols, n_cols)`` of what a matrix multiplies once it is multiplied itself."""
        if name not in self.columns:
            return full
        factors = np.ldexp(np.ones(len(full)), -self.columns[name])
        even: Float64 = full * factors * factors[:, np.newaxis]
        return even

    @property
    def note(self) -> str:
        """What the user must know."""
        return (
            f"Outlier channels are evened out by powers of two, {self.n_channels} of them around {self.n_places} norms "
            "and feed-forward blocks: those tensors hold other numbers than the original's and compute the same; LoRA "
            "adapters of the original do not fit them."
        )


def find_balance(
    model: Model, inputs: Mapping[str, Float64], column_squares: Mapping[str, Float64] = MappingProxyType({})
) -> Balance:
    """Return the factors that even out a model's channels; nothing where none stands out.

    Args:
        model: any model; layers with tensors that are not known here, and what belongs to experts, stay as they are.
        inputs: mean squares of what each matrix multiplies, ``(n_cols,)`` by stored name.
        column_squares: squared norms of the matrices' columns, ``(n_cols,)`` by stored name; of those that are not
            given the weights are read.

    """
    columns, rows = dict[str, Exponents](), dict[str, Exponents]()
    n_channels = n_places = 0
    for readers, writers in _places(model):
        moments = inputs.get(readers[0].name)
        if moments is None or moments.ndim != 1:
            continue
        exponents = _exponents(moments, readers, column_squares)
        if not exponents.any():
            continue
        n_channels, n_places = n_channels + int(np.count_nonzero(exponents)), n_places + 1
        columns.update({reader.name: exponents for reader in readers})
        rows.update({writer.name: -exponents for writer in writers})
    return Balance(columns, rows, n_channels, n_places)


def _places(model: Model) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the matrices that read some channels, all of them, and what these channels are written by."""
    gated = model.hparams.activation != "swiglu_oai"  # which adds to what up writes
    for index in range(model.hparams.n_layers):
        prefix = f"blk.{index}."
        held = {t.name.removeprefix(prefix).partition(".")[0] for t in model.tensors if t.name.startswith(prefix)}
        if not held <= _KNOWN:
            continue
        if "ffn_norm" in held:  # otherwise both blocks read one norm
            yield from _place(model, prefix, ("attn_q", "attn_k", "attn_v", "attn_qkv"), "attn_norm")
        yield from _place(model, prefix, ("ffn_gate", "ffn_up"), "ffn_norm")
        if gated and "ffn_gate" in held:
            yield from _place(model, prefix, ("ffn_down",), "ffn_up")
    yield from _place(model, "", ("output",), "output_norm")


def _place(
    model: Model, prefix: str, readers: Sequence[str], writer: str
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the place where ``readers`` read what a gain, or the rows of a matrix, gives: where it is one."""
    stored = model.by_name
    reading = [stored[name] for reader in readers if (name := f"{prefix}{reader}.weight") in stored]
    writing = [stored[name] for part in ("weight", "bias") if (name := f"{prefix}{writer}.{part}") in stored]
    if not reading or not writing or not writing[0].name.endswith(".weight"):
        return
    n_channels = writing[0].n_cols if len(writing[0].shape) == 1 else writing[0].n_rows
    coarse = model.files and any(len(t.shape) == 1 and t.dtype != "F32" for t in writing)  # stay as they are stored
    if not coarse and all(len(t.shape) == 2 and t.n_cols == n_channels for t in reading):
        yield reading, writing


def _exponents(moments: Float64, readers: Sequence[Tensor], column_squares: Mapping[str, Float64]) -> Exponents:
    """Return the exponents of the columns of ``readers``, ``(n_cols,)``; zeros where no channel stands out."""
    energy = np.sum([_column_share(reader, column_squares.get(reader.name)) for reader in readers], axis=0)
    alive = (moments > 0) & (energy > 0)
    if not alive.any():
        return np.zeros(len(moments), np.int64)
    logs = np.zeros(len(moments))
    logs[alive] = 0.25 * np.log2(moments[alive] / energy[alive])
    logs[alive] -= np.median(logs[alive])
    if np.abs(logs).max() < OUTSTANDING:
        return np.zeros(len(moments), np.int64)
    logs[np.abs(logs) < LEAST] = 0
    exponents: Exponents = np.rint(np.clip(logs, -LARGEST, LARGEST)).astype(np.int64)
    return exponents


def _column_share(tensor: Tensor, squares: Float64 | None) -> Float64:
    """Return the squared norm of each column as a share of the matrix's, ``(n_cols,)``; ``squares`` where known."""
    total = _column_squares(tensor) if squares is None else squares
    share: Float64 = total / total.sum() if total.any() else total
    return share


def _column_squares(tensor: Tensor) -> Float64:
    total, step = np.zeros(tensor.n_cols), max(1, _SLAB_WEIGHTS // tensor.n_cols)
    for start in range(0, tensor.n_rows, step):
        rows = tensor.read_rows(start, min(start + step, tensor.n_rows))
        total += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return total
