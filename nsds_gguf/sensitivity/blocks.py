"""What attention and feed-forward blocks write to the stream, and what noise in their matrices adds to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..compute.activation_functions import UP_OFFSETS
from ..compute.layers import ROUTED, SHARED, Attention, FeedForward, Linear, rows_of
from ..compute.norms import Norm
from ..records import Float64, Hparams, Tensor
from .moments import (
    Signal,
    centred_matrix_moments,
    covariance,
    gated_unit_moments,
    matrix_moments,
    normed,
    product,
    product_mean,
    ratio,
    sigmoid_moments,
    unit_moments,
)

# Energy of a value after averaging over the attended positions, over that of one value: measured, not derived
# (docs/log.md, 2026-11-23).
ATTENTION_SHRINK = 0.3

# ``(W ** 2) @ x2`` of a matrix that writes to the stream, as far as the stream's readers can see it: ``(n_embd,)``.
Writer = Callable[[Tensor, Float64], Float64]

WRITERS: dict[str, Writer] = {"layer": centred_matrix_moments}  # by kind of norm; others see everything


@dataclass(frozen=True)
class ResidualUpdate:
    """What a block adds to the stream.

    Attributes:
        name: tensor that writes, for messages.
        signal: moments of each channel, ``(n_embd,)``.
        noise: by tensor name, the second moment that relative noise of 1 in the tensor adds, ``(n_embd,)``.
        readers: tensors that multiply what the block reads of the stream.
        inputs: by name of the other tensors, the second moment of what each column multiplies, ``(n_cols,)``, or
            ``(n_experts, n_cols)``.
    """

    name: str
    signal: Signal
    noise: dict[str, Float64]
    readers: tuple[str, ...]
    inputs: dict[str, Float64]

    def scaled(self, mean_square: float, mean: float) -> ResidualUpdate:
        """Return the write times a factor of these moments."""
        noise = {name: value * mean_square for name, value in self.noise.items()}
        return replace(self, signal=self.signal.scaled(mean_square, mean), noise=noise)

    def normed(self, norm: Norm, eps: float) -> ResidualUpdate:
        """Return the write behind a norm: noise keeps its share."""
        factor = norm.gains(len(self.signal.second)) ** 2 / (self.signal.second.mean() + eps)
        noise = {name: value * factor for name, value in self.noise.items()}
        return replace(self, signal=normed(norm, self.signal, eps), noise=noise)

    def plus(self, other: ResidualUpdate) -> ResidualUpdate:
        """Return the sum of two independent writes; of a tensor that takes part in both the noises add up."""
        readers, inputs = (*self.readers, *other.readers), {**self.inputs, **other.inputs}
        noise = added(self.noise, other.noise)
        return ResidualUpdate(self.name, self.signal.plus(other.signal), noise, readers, inputs)


def added(first: Mapping[str, Float64], second: Mapping[str, Float64]) -> dict[str, Float64]:
    """Return the sums of two mappings by key."""
    return {**first, **{name: first[name] + value if name in first else value for name, value in second.items()}}


def _of_parts(parts: Sequence[tuple[Linear, Float64]]) -> dict[str, Float64]:
    """Return noise by stored tensor: that of the parts of a fused one adds up."""
    return functools.reduce(added, [{part.name: value} for part, value in parts])


def written(linear: Linear, hidden: Signal, hparams: Hparams) -> Signal:
    """Return what a matrix writes to the stream, ``(n_embd,)``.

    Where the mean of what it multiplies is not followed, neither is that of what it writes.
    """
    writer = WRITERS.get(hparams.norm, matrix_moments)
    varying, mean = Signal(writer(linear.weight, hidden.variance)), product_mean(linear, hidden)
    if mean is None:
        return varying
    constant = mean - mean.mean() if hparams.norm == "layer" else mean
    total = varying.shifted(constant)
    return Signal(total.second) if hidden.mean is None else total


def noise_through(linear: Linear, second: Float64, hparams: Hparams) -> Float64:
    """Return the second moment that a matrix writes of noise of this second moment: ``(n_embd,)``."""
    return WRITERS.get(hparams.norm, matrix_moments)(linear.weight, second)


def noise_within(linear: Linear, second: Float64) -> Float64:
    """Return the second moment that relative noise of 1 in a writing matrix adds: ``(n_embd,)``.

    Noise is independent in every row, so that all of it shows, even where the rows have something in common that is
    never read.
    """
    return matrix_moments(linear.weight, second)


# --- attention ------------------------------------------------------------------------------------------------


def attention_update(a: Attention, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> ResidualUpdate:
    """Return what attention writes.

    Args:
        a: the attention.
        tensors: the layer's tensors by role: norms on queries, keys and output, gate.
        x: what q, k and v read, ``(n_embd,)``.
        hparams: scales.

    """
    value = product(a.v, x)
    spread = Signal(ATTENTION_SHRINK * value.variance)
    heads = _per_head(spread if value.mean is None else spread.shifted(value.mean), a)
    attended = heads if x.mean is not None else Signal(heads.second)
    sub_norm, gate = tensors.get("attn_sub_norm"), tensors.get("attn_gate")
    if sub_norm is not None:
        attended = normed(Norm(sub_norm), attended, hparams.norm_eps)
    readers, noise = [a.q.name, a.k.name, a.v.name], {}
    if gate is not None:
        opening = sigmoid_moments(product(Linear(gate, tensors.get("attn_gate.bias")), x))
        n_wide = a.value_dim if len(opening.second) == a.n_heads else 1
        noise[gate.name] = noise_through(a.o, attended.second * np.repeat(opening.noise, n_wide), hparams)
        attended = attended.scaled(np.repeat(opening.second, n_wide), np.repeat(opening.mean, n_wide))
        readers.append(gate.name)
    energy = noise_through(a.o, attended.second, hparams)
    shrink = ATTENTION_SHRINK if x.mean is None else _shrink(value)
    # noise of a matrix is alike at all positions: no averaging shrinks it
    of_values, of_output = energy / shrink, noise_within(a.o, attended.second) / shrink
    of_logits = energy * logit_variance(a, tensors, x, hparams)
    noise |= _of_parts([(a.v, of_values), (a.o, of_output), (a.q, of_logits), (a.k, of_logits)])
    signal = written(a.o, attended, hparams)
    return ResidualUpdate(a.o.name, signal, noise, tuple(readers), {a.o.name: attended.second})


def _per_head(value: Signal, a: Attention) -> Signal:
    """Return values as the query heads see them, each group's for every head of it: ``(n_heads * value_dim,)``."""
    rows = np.arange(len(value.second)).reshape(a.n_kv_heads, -1)
    order = np.repeat(rows, a.n_heads // a.n_kv_heads, axis=0).ravel()
    return Signal(value.second[order], None if value.mean is None else value.mean[order])


def _shrink(value: Signal) -> float:
    """Return the energy that averaging over positions leaves of values, whose mean it does not shrink."""
    mean_square = 0.0 if value.mean is None else float((value.mean**2).sum())
    return (ATTENTION_SHRINK * float(value.variance.sum()) + mean_square) / float(value.second.sum())


def has_known_gate(a: Attention, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the gate on attention's output, if any, is one number a head or one a channel."""
    gate = tensors.get("attn_gate")
    return gate is None or gate.n_rows in (a.n_heads, a.n_heads * a.value_dim)


def logit_variance(a: Attention, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> float:
    """Return the second moment of the attention logits, mean over heads.

    ``tr(M_q M_k) scale^2`` with ``M`` the second moments of a head's queries or keys; ``scale^2`` is 1 / head_dim
    unless the model says otherwise.
    """
    scale2 = 1 / a.head_dim if hparams.attention_scale is None else hparams.attention_scale**2
    heads_q, heads_k = _head_moments(a, "q", tensors, x), _head_moments(a, "k", tensors, x)
    per_group, total = a.n_heads // a.n_kv_heads, 0.0
    for group in range(a.n_kv_heads):
        keys = heads_k(group)
        for head in range(group * per_group, (group + 1) * per_group):
            total += float((heads_q(head) * keys).sum())
    return total / a.n_heads * scale2


def _head_moments(a: Attention, part: str, tensors: Mapping[str, Tensor], x: Signal) -> Callable[[int], Float64]:
    """Return the function from a head to the second moments of its queries or keys, ``(head_dim, head_dim)``."""
    linear, n_heads = (a.q, a.n_heads) if part == "q" else (a.k, a.n_kv_heads)
    norm = tensors.get(f"attn_{part}_norm")
    if norm is not None:
        gain2 = np.resize(norm.load().astype(np.float64).ravel() ** 2, (n_heads, a.head_dim))
        return lambda head: np.diag(gain2[head])
    mean = product_mean(linear, x)
    deviation = np.sqrt(x.variance).astype(np.float32)

    def moments(head: int) -> Float64:
        start, stop = head * a.head_dim, (head + 1) * a.head_dim
        rows = linear.weight.rows(slice(start, stop)) * deviation
        moment: Float64 = (rows @ rows.T).astype(np.float64)
        return moment if mean is None else moment + np.outer(mean[start:stop], mean[start:stop])

    return moments


def has_known_qk_norms(a: Attention, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether norms on queries and keys, if any, have a gain per channel: of one head, or of all."""
    sizes = {"q": a.n_heads * a.head_dim, "k": a.n_kv_heads * a.head_dim}
    norms = {part: tensors.get(f"attn_{part}_norm") for part in sizes}
    return all(norm is None or norm.n_weights in (a.head_dim, sizes[part]) for part, norm in norms.items())


# --- feed-forward ---------------------------------------------------------------------------------------------


def feed_forward_update(
    blocks: Sequence[FeedForward], tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams
) -> ResidualUpdate:
    """Return what the feed-forward blocks of a layer write together: a dense one, or experts, or both.

    Args:
        blocks: at least one.
        tensors: the layer's tensors by role: routers and inner norms.
        x: what the blocks read, ``(n_embd,)``.
        hparams: activation and experts in use; the activation is one of ``ACTIVATIONS``.

    """
    n_experts = sum(block.kind == ROUTED for block in blocks)
    parts = [
        block_update(block, tensors, x, hparams).scaled(*expected_use(block, tensors, x, hparams, n_experts))
        for block in blocks
    ]
    total = functools.reduce(ResidualUpdate.plus, parts)
    routed = [(block.down.name, part) for block, part in zip(blocks, parts, strict=True) if block.kind == ROUTED]
    if not routed:
        return total
    name = routed[0][0]
    return replace(total, inputs={**total.inputs, name: np.stack([part.inputs[name] for _, part in routed])})


def expected_use(
    block: FeedForward, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams, n_experts: int
) -> tuple[float, float]:
    """Return the mean square and the mean of the weight that the router gives a block's output.

    Of ``n`` routed experts a token visits ``k``, all alike likely, and weighs them alike: ``scale / k`` in ``k`` of
    ``n`` cases. A shared expert counts in full, or through the sigmoid of its own router.
    """
    if block.kind == ROUTED:
        n_used, scale = min(hparams.n_experts_used or n_experts, n_experts), hparams.experts_scale
        return scale**2 / (n_used * n_experts), scale / n_experts
    router = tensors.get("ffn_gate_inp_shexp")
    if block.kind != SHARED or router is None:
        return 1.0, 1.0
    weight = sigmoid_moments(product(Linear(rows_of(router, 0, 1)), x))
    return float(weight.second[0]), float(weight.mean[0])


def block_update(block: FeedForward, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> ResidualUpdate:
    """Return what one dense block or expert writes, as if every token went through it."""
    up = product(block.up, x)
    if block.gate is None:
        units = unit_moments(up, hparams.activation)
        noisy = [(block.up, units.noise * noise_ratio(block.up, x, up, up.variance))]
    else:
        offset = UP_OFFSETS.get(hparams.activation)
        up = up if offset is None else up.shifted(offset)
        gate = product(block.gate, x)
        both = covariance(block.gate.weight, block.up.weight, x.variance)
        units = gated_unit_moments(gate, up, both, hparams.activation)
        noisy = [
            (block.gate, units.noise * noise_ratio(block.gate, x, gate, gate.variance)),
            (block.up, units.second * noise_ratio(block.up, x, up, up.second)),
        ]
    hidden, sub_norm = Signal(units.second, None if x.mean is None else units.mean), tensors.get("ffn_sub_norm")
    if sub_norm is not None:
        hidden = normed(Norm(sub_norm), hidden, hparams.norm_eps)
        noisy = [(part, value * ratio(hidden.second, units.second)) for part, value in noisy]
    through = [(part, noise_through(block.down, value, hparams)) for part, value in noisy]
    noise = _of_parts([*through, (block.down, noise_within(block.down, hidden.second))])
    readers, signal = tuple(part.name for part, _ in noisy), written(block.down, hidden, hparams)
    return ResidualUpdate(block.down.name, signal, noise, readers, {block.down.name: hidden.second})


def noise_ratio(linear: Linear, x: Signal, out: Signal, of: Float64) -> Float64 | float:
    """Return the second moment ``W^2 x^2`` that noise in the weights is relative to, over ``of``, ``(n_rows,)``."""
    if out.mean is None:
        return 1.0
    return ratio(out.variance if x.mean is None else matrix_moments(linear.weight, x.second), of)
