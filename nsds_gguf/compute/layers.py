"""Layer views: the logical matrices of a layer, independent of how the file names or fuses them.

llama.cpp stores queries, keys and values separately or as rows of one ``attn_qkv``; gate and up separately or as rows
of one ``ffn_up``; experts stacked. A view is a ``Tensor`` over some rows of a stored tensor, under its name, so that
the scores and sensitivities of views add up to those of the stored tensor.

Shapes decide, not architectures: where the shapes do not fit the pattern, the layer has no view of that part, and its
matrices go to ``rest``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..llamacpp.rules import kept_reason
from ..records import Hparams, Model, Tensor
from ..records.transforms import SliceColumns, SliceRows
from .norm_placement import norm_placement

# Roles of matrices that plain attention does not have: latent queries, keys and values (MLA), attention for images.
_NOT_PLAIN = ("attn_q_a", "attn_kv_a_mqa", "attn_kv", "attn_kv_b", "attn_k_b", "vis_attn_qkv", "cross_attn_q")

# Suffixes of feed-forward tensors: dense, shared expert, routed experts (stacked).
DENSE, SHARED, ROUTED = "", "_shexp", "_exps"


@dataclass(frozen=True)
class Linear:
    """A matrix ``(out_features, in_features)`` and its bias ``(out_features,)``, if any."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def name(self) -> str:
        """GGUF name of the stored tensor that contains the matrix."""
        return self.weight.name


@dataclass(frozen=True)
class Attention:
    """Attention of one layer: ``n_heads`` query heads in groups that share the ``n_kv_heads`` keys and values.

    ``q`` is ``(n_heads * head_dim, d)``, ``k`` ``(n_kv_heads * head_dim, d)``, ``v`` ``(n_kv_heads * value_dim, d)``
    and ``o`` ``(d, n_heads * value_dim)``.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block, or one expert: ``gate`` and ``up`` ``(n_ff, d)``, ``down`` ``(d, n_ff)``.

    ``kind`` is ``DENSE``, ``SHARED`` or ``ROUTED``, ``expert`` the number among the routed.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    kind: str = DENSE
    expert: int = 0


@dataclass(frozen=True)
class Layer:
    """The views of a layer: attention, feed-forward blocks, and all other matrices that may be quantized."""

    tensors: Mapping[str, Tensor]
    attention: Attention | None
    feed_forward: tuple[FeedForward, ...]
    rest: tuple[Tensor, ...]

    @property
    def is_empty(self) -> bool:
        """True for a layer without any matrix, as left by pruning."""
        return self.attention is None and not self.feed_forward and not self.rest

    def input_groups(self, hparams: Hparams) -> list[tuple[str, ...]]:
        """Return the stored names of the matrices in the views, grouped by shared input.

        Both blocks of a parallel layer with one norm share their input; stacks do not share theirs.
        """
        placement = norm_placement(self.tensors, hparams)
        groups: list[list[Linear | None]] = []
        if self.attention is not None:
            a = self.attention
            groups += [[a.q, a.k, a.v], [a.o]]
        for kind in (DENSE, SHARED, ROUTED):
            block = next((block for block in self.feed_forward if block.kind == kind), None)
            if block is None:
                continue
            if kind != ROUTED and groups and placement.has_one_input:
                groups[0] += [block.gate, block.up]
                groups.append([block.down])
            else:
                groups += [[block.gate, block.up], [block.down]]
        return [tuple(dict.fromkeys(part.name for part in group if part is not None)) for group in groups]

    def matrices(self) -> Iterator[Tensor]:
        """Yield every logical matrix of the layer, experts one by one."""
        if self.attention is not None:
            a = self.attention
            yield from (part.weight for part in (a.q, a.k, a.v, a.o))
        for block in self.feed_forward:
            yield from (part.weight for part in (block.gate, block.up, block.down) if part is not None)
        yield from self.rest


def view_layer(model: Model, index: int) -> Layer:
    """Return the views of one layer of a model."""
    tensors, hparams = model.layer(index), model.hparams
    attention = view_attention(tensors, hparams)
    blocks = tuple(view_feed_forward(tensors, hparams.n_embd))
    seen = {block.down.name for block in blocks} | {block.up.name for block in blocks}
    seen |= {block.gate.name for block in blocks if block.gate is not None}
    if attention is not None:
        seen |= {part.name for part in (attention.q, attention.k, attention.v, attention.o)}
    rest = tuple(t for t in tensors.values() if t.name not in seen and not kept_reason(t, model.architecture))
    return Layer(tensors, attention, blocks, rest)


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of a tensor, leading dimensions flattened, as a matrix."""
    transforms = (*tensor.transforms, SliceRows(start, stop))
    shape = stop - start, tensor.n_cols
    return replace(tensor, shape=shape, transforms=transforms, first_row=tensor.first_row + start)


def entries_of(vector: Tensor, start: int, stop: int, row: int = 0) -> Tensor:
    """Return entries ``start`` to ``stop`` of a vector, or of one row of stacked vectors, as a vector."""
    transforms = (*vector.transforms, SliceRows(row, row + 1), SliceColumns(start, stop))
    return replace(vector, shape=(stop - start,), transforms=transforms)


# --- attention ------------------------------------------------------------------------------------------------


def view_attention(tensors: Mapping[str, Tensor], hparams: Hparams) -> Attention | None:
    """Return the attention of a layer, or ``None`` if it is not plain attention.

    Shapes give the number of heads of the layer; ``hparams`` gives the width of a head only.
    """
    output = _matrix(tensors, "attn_output")
    head_dim, value_dim = _head_widths(tensors, hparams)
    if output is None or not head_dim or not value_dim or any(role in tensors for role in _NOT_PLAIN):
        return None
    n_heads = output.n_cols // value_dim
    parts = _fused_qkv(tensors, n_heads, head_dim, value_dim) or _separate_qkv(tensors)
    if parts is None:
        return None
    q, k, v = parts
    n_kv_heads = k.weight.n_rows // head_dim
    fits = (
        n_heads > 0
        and n_kv_heads > 0
        and n_heads % n_kv_heads == 0
        and output.shape == (hparams.n_embd, n_heads * value_dim)
        and q.weight.shape == (n_heads * head_dim, hparams.n_embd)
        and k.weight.shape == (n_kv_heads * head_dim, hparams.n_embd)
        and v.weight.shape == (n_kv_heads * value_dim, hparams.n_embd)
    )
    o = Linear(output, tensors.get("attn_output.bias"))
    return Attention(q, k, v, o, n_heads, n_kv_heads, head_dim, value_dim) if fits else None


def _head_widths(tensors: Mapping[str, Tensor], hparams: Hparams) -> tuple[int, int]:
    """Return the channels of a key head and of a value head; the key norm shows a width that differs by layer."""
    value_dim = hparams.head_dim if hparams.value_dim is None else hparams.value_dim
    norm, k = tensors.get("attn_k_norm"), _matrix(tensors, "attn_k")
    if norm is not None and k is not None and norm.n_weights != k.n_rows and norm.n_cols != hparams.head_dim:
        return norm.n_cols, norm.n_cols
    return hparams.head_dim, value_dim


def _matrix(tensors: Mapping[str, Tensor], role: str) -> Tensor | None:
    tensor = tensors.get(role)
    return tensor if tensor is not None and len(tensor.shape) == 2 else None


def _separate_qkv(tensors: Mapping[str, Tensor]) -> tuple[Linear, Linear, Linear] | None:
    q, k, v = (_matrix(tensors, f"attn_{part}") for part in "qkv")
    if q is None or k is None or v is None:
        return None
    biases = (tensors.get(f"attn_{part}.bias") for part in "qkv")
    first, second, third = (Linear(w, b) for w, b in zip((q, k, v), biases, strict=True))
    return first, second, third


def _fused_qkv(
    tensors: Mapping[str, Tensor], n_heads: int, head_dim: int, value_dim: int
) -> tuple[Linear, Linear, Linear] | None:
    """Return the rows of ``attn_qkv``: queries, then keys, then values; biases may be separate tensors."""
    fused = _matrix(tensors, "attn_qkv")
    if fused is None:
        return None
    n_kv_heads, left = divmod(fused.n_rows - n_heads * head_dim, head_dim + value_dim)
    if left or n_kv_heads <= 0:
        return None
    edges = [0, n_heads * head_dim, (n_heads + n_kv_heads) * head_dim, fused.n_rows]
    bias = tensors.get("attn_qkv.bias")
    first, second, third = (
        Linear(
            rows_of(fused, start, stop),
            entries_of(bias, start, stop) if bias is not None else tensors.get(f"attn_{part}.bias"),
        )
        for part, start, stop in zip("qkv", edges, edges[1:], strict=False)
    )
    return first, second, third


# --- feed-forward ---------------------------------------------------------------------------------------------


def view_feed_forward(tensors: Mapping[str, Tensor], n_embd: int) -> Iterator[FeedForward]:
    """Yield the dense block, the shared expert and the routed experts of a layer, if present."""
    for kind in (DENSE, SHARED, ROUTED):
        up, down = tensors.get(f"ffn_up{kind}"), tensors.get(f"ffn_down{kind}")
        gate, both = tensors.get(f"ffn_gate{kind}"), tensors.get(f"ffn_gate_up{kind}")
        up = up if both is None else both
        if up is None or down is None or down.shape[-2] != n_embd or up.n_cols != n_embd:
            continue
        for expert in range(down.shape[0] if len(down.shape) == 3 else 1):
            block = _block(tensors, gate, up, down, kind, expert)
            if block is not None:
                yield block


def _block(
    tensors: Mapping[str, Tensor], gate: Tensor | None, up: Tensor, down: Tensor, kind: str, expert: int
) -> FeedForward | None:
    """Return one block or expert; ``up`` may begin with the rows of the gate; ``None`` if the shapes do not fit."""
    n_ff, n_rows = down.n_cols, up.shape[-2]
    shapes_fit = n_rows in (n_ff, 2 * n_ff) and (gate is None or (gate.shape == up.shape and n_rows == n_ff))
    if not shapes_fit or len(up.shape) != len(down.shape):
        return None

    def linear(stored: Tensor, start: int, stop: int) -> Linear:
        base = expert * stored.shape[-2] if len(stored.shape) == 3 else 0
        bias = tensors.get(f"{stored.role}.bias")
        if bias is not None:
            bias = entries_of(bias, start, stop, expert if len(bias.shape) == 2 else 0)
        return Linear(rows_of(stored, base + start, base + stop), bias)

    lower = linear(down, 0, down.shape[-2])
    if n_rows == 2 * n_ff:
        return FeedForward(linear(up, 0, n_ff), linear(up, n_ff, 2 * n_ff), lower, kind, expert)
    return FeedForward(None if gate is None else linear(gate, 0, n_ff), linear(up, 0, n_ff), lower, kind, expert)
