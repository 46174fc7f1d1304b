"""Residual updates of attention and feed-forward blocks, and the noise that errors in their matrices add."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..compute.activation_functions import UP_OFFSETS
from ..compute.layers import ROUTED, SHARED, Attention, FeedForward, Linear, rows_of
from ..compute.norms import Norm
from ..records import Float64, Hparams, Tensor
from ..system.workers import Workers
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

# Squared norm of a value averaged over the attended positions, over that of a single value; measured, not derived
# (docs/log.md, 2026-11-23).
ATTENTION_SHRINK = 0.3

_ROUTER = "ffn_gate_inp_shexp"  # of a shared expert

# ``(W ** 2) @ x2`` of a matrix that writes to the stream, as its consumers see it: ``(n_embd,)``.
MatrixMoments = Callable[[Tensor, Float64], Float64]

MATRIX_MOMENTS: dict[str, MatrixMoments] = {"layer": centred_matrix_moments}  # by kind of norm; default: matrix_moments


@dataclass(frozen=True)
class ResidualUpdate:
    """The residual update of a block.

    Attributes:
        name: tensor that produces it, for messages.
        signal: moments of each channel, ``(n_embd,)``.
        noise: by tensor name, the second moment that relative noise of 1 in the tensor adds, ``(n_embd,)``.
        consumers: tensors that multiply the input of the block.
        inputs: by name of the other tensors, the second moment of the input of each column, ``(n_cols,)``, or
            ``(n_experts, n_cols)``.
    """

    name: str
    signal: Signal
    noise: dict[str, Float64]
    consumers: tuple[str, ...]
    inputs: dict[str, Float64]

    def scaled(self, mean_square: float, mean: float) -> ResidualUpdate:
        """Return the update times a factor of these moments."""
        noise = {name: value * mean_square for name, value in self.noise.items()}
        return replace(self, signal=self.signal.scaled(mean_square, mean), noise=noise)

    def normed(self, norm: Norm, eps: float) -> ResidualUpdate:
        """Return the update after a norm: noise keeps its share."""
        factor = norm.gains(len(self.signal.second)) ** 2 / (self.signal.second.mean() + eps)
        noise = {name: value * factor for name, value in self.noise.items()}
        return replace(self, signal=normed(norm, self.signal, eps), noise=noise)

    def plus(self, other: ResidualUpdate) -> ResidualUpdate:
        """Return the sum of two independent updates; noise of a tensor in both adds up."""
        consumers, inputs = (*self.consumers, *other.consumers), {**self.inputs, **other.inputs}
        noise = added(self.noise, other.noise)
        return ResidualUpdate(self.name, self.signal.plus(other.signal), noise, consumers, inputs)


def added(first: Mapping[str, Float64], second: Mapping[str, Float64]) -> dict[str, Float64]:
    """Return the sums of two mappings by key."""
    return {**first, **{name: first[name] + value if name in first else value for name, value in second.items()}}


def _of_parts(parts: Sequence[tuple[Linear, Float64]]) -> dict[str, Float64]:
    """Return noise by stored tensor; the parts of a fused tensor add up."""
    return functools.reduce(added, [{part.name: value} for part, value in parts])


def update_moments(linear: Linear, hidden: Signal, hparams: Hparams) -> Signal:
    """Return the moments of a matrix's output to the stream, ``(n_embd,)``.

    Without the mean of its input, the result has no mean either.
    """
    moments_of = MATRIX_MOMENTS.get(hparams.norm, matrix_moments)
    varying, mean = Signal(moments_of(linear.weight, hidden.variance)), product_mean(linear, hidden)
    if mean is None:
        return varying
    constant = mean - mean.mean() if hparams.norm == "layer" else mean
    total = varying.shifted(constant)
    return Signal(total.second) if hidden.mean is None else total


def noise_through(linear: Linear, second: Float64, hparams: Hparams) -> Float64:
    """Return the second moment of noise after a matrix that writes to the stream: ``(n_embd,)``."""
    return MATRIX_MOMENTS.get(hparams.norm, matrix_moments)(linear.weight, second)


def noise_within(linear: Linear, second: Float64) -> Float64:
    """Return the second moment that relative noise of 1 in a matrix that writes to the stream adds: ``(n_embd,)``.

    Noise is independent in every row, so all of it counts, even if layer norms remove the common part of the rows.
    """
    return matrix_moments(linear.weight, second)


# --- attention ------------------------------------------------------------------------------------------------


def attention_update(a: Attention, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> ResidualUpdate:
    """Return the residual update of attention.

    Args:
        a: the attention.
        tensors: the layer's tensors by role: norms on queries, keys and output, gate.
        x: input of q, k and v, ``(n_embd,)``.
        hparams: scales.

    """
    value = product(a.v, x)
    spread = Signal(ATTENTION_SHRINK * value.variance)
    heads = _per_head(spread if value.mean is None else spread.shifted(value.mean), a)
    attended = heads if x.mean is not None else Signal(heads.second)
    sub_norm, gate = tensors.get("attn_sub_norm"), tensors.get("attn_gate")
    if sub_norm is not None:
        attended = normed(Norm(sub_norm), attended, hparams.norm_eps)
    consumers, noise = [a.q.name, a.k.name, a.v.name], {}
    if gate is not None:
        gate_moments = sigmoid_moments(product(Linear(gate, tensors.get("attn_gate.bias")), x))
        n_wide = a.value_dim if len(gate_moments.second) == a.n_heads else 1
        noise[gate.name] = noise_through(a.o, attended.second * np.repeat(gate_moments.noise, n_wide), hparams)
        attended = attended.scaled(np.repeat(gate_moments.second, n_wide), np.repeat(gate_moments.mean, n_wide))
        consumers.append(gate.name)
    written = noise_through(a.o, attended.second, hparams)
    shrink = ATTENTION_SHRINK if x.mean is None else _shrink(value)
    # the noise of a matrix is the same at all positions: averaging does not shrink it
    of_values, of_output = written / shrink, noise_within(a.o, attended.second) / shrink
    of_logits = written * logit_variance(a, tensors, x, hparams)
    noise |= _of_parts([(a.v, of_values), (a.o, of_output), (a.q, of_logits), (a.k, of_logits)])
    signal = update_moments(a.o, attended, hparams)
    return ResidualUpdate(a.o.name, signal, noise, tuple(consumers), {a.o.name: attended.second})


def _per_head(value: Signal, a: Attention) -> Signal:
    """Return the values repeated for every query head of a group: ``(n_heads * value_dim,)``."""
    rows = np.arange(len(value.second)).reshape(a.n_kv_heads, -1)
    order = np.repeat(rows, a.n_heads // a.n_kv_heads, axis=0).ravel()
    return Signal(value.second[order], None if value.mean is None else value.mean[order])


def _shrink(value: Signal) -> float:
    """Return the share of the squared norm of values that averaging over positions leaves; the mean does not shrink."""
    mean_square = 0.0 if value.mean is None else float((value.mean**2).sum())
    return (ATTENTION_SHRINK * float(value.variance.sum()) + mean_square) / float(value.second.sum())


def has_known_gate(a: Attention, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the gate on the output of attention, if any, has one number per head or per channel."""
    gate = tensors.get("attn_gate")
    return gate is None or gate.n_rows in (a.n_heads, a.n_heads * a.value_dim)


def logit_variance(a: Attention, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> float:
    """Return the second moment of the attention logits, mean over heads.

    ``tr(M_q M_k) scale^2`` with ``M`` the second moments of a head's queries or keys; ``scale^2`` defaults to
    ``1 / head_dim``.
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
    """Return whether norms on queries and keys, if any, have a gain per channel of one head, or of all heads."""
    sizes = {"q": a.n_heads * a.head_dim, "k": a.n_kv_heads * a.head_dim}
    norms = {part: tensors.get(f"attn_{part}_norm") for part in sizes}
    return all(norm is None or norm.n_weights in (a.head_dim, sizes[part]) for part, norm in norms.items())


# --- feed-forward ---------------------------------------------------------------------------------------------


def feed_forward_update(
    blocks: Sequence[FeedForward], tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams, workers: Workers
) -> ResidualUpdate:
    """Return the sum of the residual updates of a layer's feed-forward blocks: dense, experts, or both.

    Args:
        blocks: at least one.
        tensors: the layer's tensors by role: routers and inner norms.
        x: input of the blocks, ``(n_embd,)``.
        hparams: activation function (one of ``ACTIVATIONS``) and experts in use.
        workers: compute the updates, a block or expert per task.

    """
    n_experts = sum(block.kind == ROUTED for block in blocks)
    vectors = {role: tensors[role] for role in (_ROUTER, "ffn_sub_norm") if role in tensors}
    tasks = (_BlockTask(block, vectors, x, hparams, n_experts) for block in blocks)
    parts = [part for _, part in workers.ordered(_used_update, tasks)]
    total = functools.reduce(ResidualUpdate.plus, parts)
    routed = [(block.down.name, part) for block, part in zip(blocks, parts, strict=True) if block.kind == ROUTED]
    if not routed:
        return total
    name = routed[0][0]
    return replace(total, inputs={**total.inputs, name: np.stack([part.inputs[name] for _, part in routed])})


@dataclass(frozen=True)
class _BlockTask:
    """The arguments of ``block_update`` and ``expected_use``."""

    block: FeedForward
    tensors: Mapping[str, Tensor]
    x: Signal
    hparams: Hparams
    n_experts: int


def _used_update(task: _BlockTask) -> ResidualUpdate:
    """Return the residual update of a block, weighted by its expected use."""
    use = expected_use(task.block, task.tensors, task.x, task.hparams, task.n_experts)
    return block_update(task.block, task.tensors, task.x, task.hparams).scaled(*use)


def expected_use(
    block: FeedForward, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams, n_experts: int
) -> tuple[float, float]:
    """Return the mean square and the mean of the router's weight on the output of a block.

    A token uses ``k`` of ``n`` routed experts, all equally likely and with equal weights: ``scale / k`` in ``k`` of
    ``n`` cases. A shared expert has weight 1, or the sigmoid of its own router.
    """
    if block.kind == ROUTED:
        n_used, scale = min(hparams.n_experts_used or n_experts, n_experts), hparams.experts_scale
        return scale**2 / (n_used * n_experts), scale / n_experts
    router = tensors.get(_ROUTER)
    if block.kind != SHARED or router is None:
        return 1.0, 1.0
    weight = sigmoid_moments(product(Linear(rows_of(router, 0, 1)), x))
    return float(weight.second[0]), float(weight.mean[0])


def block_update(block: FeedForward, tensors: Mapping[str, Tensor], x: Signal, hparams: Hparams) -> ResidualUpdate:
    """Return the residual update of one dense block or expert, as if all tokens used it."""
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
    consumers, signal = tuple(part.name for part, _ in noisy), update_moments(block.down, hidden, hparams)
    return ResidualUpdate(block.down.name, signal, noise, consumers, {block.down.name: hidden.second})


def noise_ratio(linear: Linear, x: Signal, out: Signal, of: Float64) -> Float64 | float:
    """Return the second moment ``W^2 x^2``, to which noise in the weights is relative, over ``of``, ``(n_rows,)``."""
    if out.mean is None:
        return 1.0
    return ratio(out.variance if x.mean is None else matrix_moments(linear.weight, x.second), of)
