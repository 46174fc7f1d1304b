"""Channel equalization: scale outlier channels before rounding, by factors that cancel (SmoothQuant).

In the inputs of matrices, some channels of large models are far larger than the others, and the matrices have small
columns there (LLM.int8(), arXiv 2208.07339). Both hurt block formats: rounding destroys the small columns, and
llama.cpp, which rounds the inputs of quantized weights to 8 bits in blocks of 32 or 256, loses precision in everything
that shares a block with a large channel. A *producer* is a norm's gain, or the rows of a matrix that compute hidden
units; its *consumers* are the matrices that multiply its output. Moving a factor from a producer into the columns of
all its consumers changes no output (SmoothQuant, arXiv 2211.10438).

Factors are powers of two, so that every product and sum stays the same to the last bit as long as nothing is rounded.
They equalize the columns' squared norms with those of their inputs: in a block of weights with one scale the squared
error ``sum x_j^2 s_j^-2 * sum w_j^2 s_j^2`` is least for ``s_j^2`` proportional to ``x_j / w_j``. A model without
outlier channels stays as it is (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Model, Tensor
from ..records.transforms import ScaleByPowersOfTwo

Exponents = NDArray[np.int64]

OUTSTANDING = 2.5  # log2 of the largest factor from which channels are equalized
LEAST = 1.0  # log2 of the smallest factor that is applied
LARGEST = 16.0  # log2 of the largest factor; beyond it a channel is dead

# Parts of a layer that is equalized: no others consume a norm's output or act between hidden units and consumers.
_KNOWN = frozenset(
    ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_output",
     "post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm")
)  # fmt: skip


@dataclass(frozen=True)
class Equalization:
    """Powers of two that multiply weights.

    Attributes:
        columns: by name of a matrix, ``(n_cols,)`` exponents of its columns.
        rows: by name of a matrix, gain or bias, ``(n_rows,)`` exponents of its rows or entries.
        n_channels: equalized channels of all pairs.
        n_pairs: pairs of a producer and its consumers: norms and feed-forward blocks.
    """

    columns: Mapping[str, Exponents] = field(default_factory=dict)
    rows: Mapping[str, Exponents] = field(default_factory=dict)
    n_channels: int = 0
    n_pairs: int = 0

    def __bool__(self) -> bool:
        """Return whether anything changes."""
        return bool(self.columns)

    def applied(self, model: Model) -> Model:
        """Return the model with multiplied weights, which computes the same."""
        if not self:
            return model
        return replace(model, tensors=tuple(self._multiplied(tensor) for tensor in model.tensors))

    def only(self, name: str) -> Equalization:
        """Return what ``moments`` needs for one matrix, small enough to send."""
        return Equalization({name: self.columns[name]} if name in self.columns else {})

    def _multiplied(self, tensor: Tensor) -> Tensor:
        columns, rows = self.columns.get(tensor.name), self.rows.get(tensor.name)
        if rows is not None and len(tensor.shape) == 1:
            columns, rows = rows, None
        if columns is None and rows is None:
            return tensor
        return replace(tensor, transforms=(*tensor.transforms, ScaleByPowersOfTwo(rows, columns)))

    def weights(self, original: Mapping[str, Float32]) -> dict[str, Float32]:
        """Return column weights of mean 1 for the equalized matrices, from those of the original ones."""
        weights = dict(original)
        for name in original.keys() & self.columns.keys():
            scaled = np.ldexp(original[name].astype(np.float64), -2 * self.columns[name])
            weights[name] = (scaled / scaled.mean(axis=-1, keepdims=True)).astype(np.float32)
        return weights

    def moments(self, name: str, full: Float32) -> Float32:
        """Return the second moments ``(n_cols, n_cols)`` of a matrix's input once the matrix is equalized: exact."""
        if name not in self.columns:
            return full
        factors = np.ldexp(np.ones(len(full), np.float32), -self.columns[name])
        equalized: Float32 = full * factors
        equalized *= factors[:, np.newaxis]
        return equalized

    @property
    def note(self) -> str:
        """The note for the user."""
        return (
            f"Powers of two equalize {self.n_channels} outlier channels around {self.n_pairs} norms and feed-forward "
            "blocks: their tensors differ from the original's but compute the same; LoRA adapters of the original do "
            "not fit them."
        )


def find_equalization(
    model: Model, inputs: Mapping[str, Float64], column_squares: Mapping[str, Float64] = MappingProxyType({})
) -> Equalization:
    """Return the factors that equalize a model's channels; an empty ``Equalization`` where there are no outliers.

    Args:
        model: any model; experts, and layers with unknown tensors, are not equalized.
        inputs: mean squares of each matrix's input, ``(n_cols,)`` by stored name.
        column_squares: squared norms of the matrices' columns, ``(n_cols,)`` by stored name; where absent, the
            weights are read.

    """
    columns, rows = dict[str, Exponents](), dict[str, Exponents]()
    n_channels = n_pairs = 0
    for producers, consumers in _pairs(model):
        moments = inputs.get(consumers[0].name)
        if moments is None or moments.ndim != 1:
            continue
        exponents = _exponents(moments, consumers, column_squares)
        if not exponents.any():
            continue
        n_channels, n_pairs = n_channels + int(np.count_nonzero(exponents)), n_pairs + 1
        columns.update({consumer.name: exponents for consumer in consumers})
        rows.update({producer.name: -exponents for producer in producers})
    return Equalization(columns, rows, n_channels, n_pairs)


def _pairs(model: Model) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield every producer, a weight and its bias, with all its consumers."""
    is_pure = model.hparams.activation != "swiglu_oai"  # swiglu_oai adds to the output of up
    for index in range(model.hparams.n_layers):
        prefix = f"blk.{index}."
        held = {t.name.removeprefix(prefix).partition(".")[0] for t in model.tensors if t.name.startswith(prefix)}
        if not held <= _KNOWN:
            continue
        if "ffn_norm" in held:  # without it both blocks read one norm
            yield from _pair(model, prefix, "attn_norm", ("attn_q", "attn_k", "attn_v", "attn_qkv"))
        yield from _pair(model, prefix, "ffn_norm", ("ffn_gate", "ffn_up"))
        if is_pure and "ffn_gate" in held:
            yield from _pair(model, prefix, "ffn_up", ("ffn_down",))
    yield from _pair(model, "", "output_norm", ("output",))


def _pair(
    model: Model, prefix: str, producer: str, consumers: Sequence[str]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield a producer and its consumers, where the model has both and factors can move between them."""
    stored = model.by_name
    consuming = [stored[name] for consumer in consumers if (name := f"{prefix}{consumer}.weight") in stored]
    producing = [stored[name] for part in ("weight", "bias") if (name := f"{prefix}{producer}.{part}") in stored]
    if not consuming or not producing or not producing[0].name.endswith(".weight"):
        return
    n_channels = producing[0].n_cols if len(producing[0].shape) == 1 else producing[0].n_rows
    coarse = model.files and any(len(t.shape) == 1 and t.dtype != "F32" for t in producing)  # keep their stored type
    if not coarse and all(len(t.shape) == 2 and t.n_cols == n_channels for t in consuming):
        yield producing, consuming


def _exponents(moments: Float64, consumers: Sequence[Tensor], column_squares: Mapping[str, Float64]) -> Exponents:
    """Return the exponents of the columns of ``consumers``, ``(n_cols,)``; zeros without outliers."""
    shares = np.sum([_squared_norm_shares(each, column_squares.get(each.name)) for each in consumers], axis=0)
    alive = (moments > 0) & (shares > 0)
    if not alive.any():
        return np.zeros(len(moments), np.int64)
    logs = np.zeros(len(moments))
    logs[alive] = 0.25 * np.log2(moments[alive] / shares[alive])
    logs[alive] -= np.median(logs[alive])
    if np.abs(logs).max() < OUTSTANDING:
        return np.zeros(len(moments), np.int64)
    logs[np.abs(logs) < LEAST] = 0
    exponents: Exponents = np.rint(np.clip(logs, -LARGEST, LARGEST)).astype(np.int64)
    return exponents


def _squared_norm_shares(tensor: Tensor, squares: Float64 | None) -> Float64:
    """Return each column's share of the matrix's squared norm, ``(n_cols,)``, from ``squares`` where known."""
    total = _column_squares(tensor) if squares is None else squares
    share: Float64 = total / total.sum() if total.any() else total
    return share


def _column_squares(tensor: Tensor) -> Float64:
    total: Float64 = np.zeros(tensor.n_cols)
    for _, rows in tensor.slabs():
        total += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return total
