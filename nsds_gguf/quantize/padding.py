"""Zero padding: the residual stream gets zero channels up to a multiple of 256, so that its rows fit K-quants.

The padded model computes the same, in any llama.cpp. With width d, padded to D:

* Rows that the stream is multiplied with (embedding, q, k, v, gate, up, output) get zero columns; what is added to the
  stream (attention output, down) gets zero rows. The stream's new channels are zero everywhere.
* An RMS norm divides by ``sqrt(sum / D + eps)``: its gains take the factor ``sqrt(d / D)``, eps the factor ``d / D``,
  and gains of new channels are zero. Norms of heads keep their width and gains; where they share eps with the others
  (Qwen 3), it is far below the squares that it is added to.
* Gemma multiplies the embedding by ``sqrt(D)``, so its whole stream is larger by ``sqrt(D / d)``: what is added to it
  takes that factor before its norm. Then eps and the gains of norms after blocks stay.
* Head sizes, which llama.cpp would derive from the width, become explicit. Qwen 2 in llama.cpp wants as many query
  channels as the stream has: each group of query heads gets heads of zeros, whose output meets zero columns. Key and
  value heads, and so the cache, stay.

A zero is exact in every type where its sub-block is zero, so widths must be a multiple of 32. Statistics of the
original also hold for the padded model: ``columns_of`` and ``rows_of`` say which column and row of a padded tensor is
which of the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGUFValueType
from gguf.constants import QK_K
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from ..llamacpp import ggml
from ..records import Model, Recipe, Tensor, kv
from ..records.transforms import Order, Scale, SpreadColumns, SpreadRows

WIDTH = "width"  # the padding of recipes: of the residual stream

_MULTIPLE, _SUB_BLOCK = QK_K, 32

_LAYERS_OF_GEMMA3_27B = 62

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

_CONSUMERS = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
_PRODUCERS = ("attn_output", "ffn_down")
_GAINS = ("attn_norm", "ffn_norm", "output_norm")
_POST_GAINS = ("post_attention_norm", "post_ffw_norm")
_PRODUCER_BIASES = ("attn_output.bias", "ffn_down.bias")
_OTHERS = (
    "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_q_norm", "attn_k_norm", "ffn_gate.bias", "ffn_up.bias",
    "output.bias", "rope_freqs",
)  # fmt: skip
_KNOWN = frozenset((*_CONSUMERS, *_PRODUCERS, *_GAINS, *_POST_GAINS, *_PRODUCER_BIASES, *_OTHERS))


@dataclass(frozen=True)
class _Widths:
    """The channels of the stream and of the query heads, before and after.

    Attributes:
        stream: the original channel of each channel; -1 for zeros.
        heads: the same for the channels of all query heads; ``None`` where they stay.
        n_heads: query heads after padding.

    """

    stream: Order
    heads: Order | None
    n_heads: int

    @property
    def share(self) -> float:
        """Original channels over all."""
        return float(np.mean(self.stream >= 0))


def padded_width(model: Model) -> int:
    """Return the width of the padded residual stream."""
    return -(-model.hparams.n_embd // _MULTIPLE) * _MULTIPLE


def padding_obstacle(model: Model) -> str:
    """Return why a model cannot be padded, as the end of a sentence; empty where it can."""
    h = model.hparams
    if model.architecture not in ARCHITECTURES:
        return f"its architecture {model.architecture} is not one of {', '.join(ARCHITECTURES)}"
    if h.n_embd % _MULTIPLE == 0:
        return f"its width {h.n_embd} is a multiple of {_MULTIPLE} already"
    if h.n_embd % _SUB_BLOCK:
        return f"its width {h.n_embd} is not a multiple of {_SUB_BLOCK}, so zeros would share sub-blocks with weights"
    if h.norm != "rms":
        return f"its norms are of kind {h.norm}, not RMS"
    if model.architecture == "gemma3" and h.n_layers == _LAYERS_OF_GEMMA3_27B:
        return "llama.cpp scales the attention of this size by its width"
    unknown = next((tensor for tensor in model.tensors if tensor.role not in _KNOWN), None)
    if unknown is not None:
        return f"how to pad {unknown.name} is not known"
    if model.architecture == "qwen2" and _more_heads(model) == 0:
        return (
            f"llama.cpp wants {padded_width(model)} query channels in it, which heads of {h.head_dim} shared by "
            f"{h.n_kv_heads} key/value heads do not make"
        )
    return ""


def laid_out(model: Model, recipe: Recipe) -> Model:
    """Return the model as the files of a recipe hold it: padded, or as it is."""
    return model if recipe.padding is None else padded(model)


def padded(model: Model) -> Model:
    """Return the padded model, which computes the same; ``padding_obstacle`` must have none.

    Weights are read as before, row by row; ``n_weights`` counts those of the original.
    """
    widths, h = _widths(model), model.hparams
    n_embd = len(widths.stream)
    scale = h.embedding_scale * math.sqrt(n_embd / h.n_embd) if _scales_embedding(model) else h.embedding_scale
    return replace(
        model,
        tensors=tuple(_padded(tensor, model, widths) for tensor in model.tensors),
        hparams=replace(
            h, n_embd=n_embd, n_heads=widths.n_heads, norm_eps=_norm_eps(model, widths), embedding_scale=scale
        ),
        metadata=_metadata(model, widths),
        notes=(*model.notes, _note(model, widths)),
        is_repaired=True,
    )


def columns_of(tensor: Tensor) -> Order | None:
    """Return the original column of each column of a padded tensor, -1 for zeros; ``None`` where all columns stay."""
    return next((step.order for step in tensor.transforms if isinstance(step, SpreadColumns)), None)


def rows_of(tensor: Tensor) -> Order | None:
    """Return the original row of each row of a padded tensor, -1 for zeros; ``None`` where all rows stay."""
    return next((step.order for step in tensor.transforms if isinstance(step, SpreadRows)), None)


def _widths(model: Model) -> _Widths:
    h = model.hparams
    stream = np.full(padded_width(model), -1, np.intp)
    stream[: h.n_embd] = np.arange(h.n_embd)
    if model.architecture != "qwen2":
        return _Widths(stream, None, h.n_heads)
    n_heads = _more_heads(model)
    groups = np.full((h.n_kv_heads, n_heads // h.n_kv_heads, h.head_dim), -1, np.intp)
    groups[:, : h.n_heads // h.n_kv_heads] = np.arange(h.n_heads * h.head_dim).reshape(h.n_kv_heads, -1, h.head_dim)
    return _Widths(stream, groups.reshape(-1), n_heads)


def _more_heads(model: Model) -> int:
    """Return the query heads that make as many channels as the padded stream has; 0 where no number of heads does."""
    h = model.hparams
    n_heads, rest = divmod(padded_width(model), h.head_dim)
    return 0 if rest or n_heads % h.n_kv_heads or n_heads < h.n_heads else n_heads


def _scales_embedding(model: Model) -> bool:
    """Return whether llama.cpp multiplies the embedding by the square root of the width."""
    return model.architecture == "gemma3"


def _padded(tensor: Tensor, model: Model, widths: _Widths) -> Tensor:
    """Return a tensor with zeros; norms, and what is added to Gemma's stream, with a factor."""
    role, rows, columns = tensor.role, None, None
    if role in (*_CONSUMERS, *_PRODUCER_BIASES, *_GAINS, *_POST_GAINS):
        columns = widths.stream
    if role in _PRODUCERS:
        rows = widths.stream
    if role == "attn_q":
        rows = widths.heads
    elif role in ("attn_q.bias", "attn_output"):
        columns = widths.heads
    factor = math.sqrt(widths.share) if role in _GAINS else 1.0
    if _scales_embedding(model) and role in (*_PRODUCERS, *_PRODUCER_BIASES):
        factor = 1 / math.sqrt(widths.share)
    return _spread(tensor, rows, columns, factor)


def _spread(tensor: Tensor, rows: Order | None, columns: Order | None, factor: float) -> Tensor:
    steps, shape = list(tensor.transforms), list(tensor.shape)
    if factor != 1.0:
        steps.append(Scale(factor))
    if rows is not None:
        steps.append(SpreadRows(rows))
        shape[-2] = len(rows)
    if columns is not None:
        steps.append(SpreadColumns(columns))
        shape[-1] = len(columns)
    n_zeros = math.prod(shape) - tensor.n_weights
    return replace(tensor, transforms=tuple(steps), shape=tuple(shape), n_zeros=n_zeros)


def _norm_eps(model: Model, widths: _Widths) -> float:
    return model.hparams.norm_eps * (1.0 if _scales_embedding(model) else widths.share)


def _metadata(model: Model, widths: _Widths) -> Mapping[str, GGUFValue]:
    """Return the keys with the new width, eps and heads, and with explicit head sizes."""
    h, prefix = model.hparams, model.architecture
    changed = {
        "embedding_length": kv(len(widths.stream), GGUFValueType.UINT32),
        "attention.layer_norm_rms_epsilon": kv(_norm_eps(model, widths), GGUFValueType.FLOAT32),
    }
    if widths.heads is not None:
        changed["attention.head_count"] = kv(widths.n_heads, GGUFValueType.UINT32)
    for name, size in (("key_length", h.head_dim), ("value_length", h.value_dim or h.head_dim)):
        if f"{prefix}.attention.{name}" not in model.metadata:
            changed[f"attention.{name}"] = kv(size, GGUFValueType.UINT32)
    return {**model.metadata, **{f"{prefix}.{name}": entry for name, entry in changed.items()}}


def _note(model: Model, widths: _Widths) -> str:
    n_before, n_heads = model.hparams.n_embd, model.hparams.n_heads
    heads = f", query heads from {n_heads} to {widths.n_heads}" if widths.heads is not None else ""
    return (
        f"The residual stream is padded with zeros from {n_before} to {len(widths.stream)} channels{heads}, so that "
        "its rows fit K-quants: the file computes the same. Bits per weight count the original weights; LoRA adapters "
        "of the original do not fit it. Below 4.5 bpw unpadded files diverge less with --pad off --types "
        f"{','.join(ggml.SMALL_ROW_TYPES)}, for llama.cpp since July 2026."
    )


def spread_vector(values: NDArray[np.float32], order: Order) -> NDArray[np.float32]:
    """Return values ``(n,)`` of original rows or columns as those of padded ones, zero for new ones."""
    spread = np.zeros(len(order), values.dtype)
    spread[order >= 0] = values
    return spread
