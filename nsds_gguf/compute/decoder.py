"""The layers of a decoder as operations on a ``Tape``, from its layer views.

Supports every norm placement, fused and separate matrices, biases, norms of queries and keys, softcapping, scales and
mixtures of experts. Ignores what only shifts attention: sliding windows, single layers without rope, a separate rope
theta of windowed layers, details of yarn and longrope.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..records import Float32, Hparams, Model, Tensor
from .activation_functions import ACTIVATIONS, UP_OFFSETS
from .layers import DENSE, ROUTED, SHARED, Attention, FeedForward, Layer, Linear, rows_of, view_layer
from .norm_placement import BlockNorms, has_plain_experts, is_plain_stream, norm_placement
from .norms import Norm
from .tape import Node, Tape, angles

# Roles that change the result of a layer and are not supported.
_UNKNOWN = ("attn_gate", "attn_sinks", "attn_sub_norm", "ffn_sub_norm", "attn_rot_embd")

# Architectures whose norms of queries and keys come after rope.
_NORMS_ROTATED = ("hunyuan-dense", "hunyuan-moe")


def what_is_missing(model: Model) -> str:
    """Return, in words, the first part of a model that a ``Decoder`` does not support; empty when it supports all."""
    h = model.hparams
    embedding = model.by_name.get("token_embd.weight")
    if embedding is None or embedding.n_cols != h.n_embd or h.norm == "unknown" or not h.n_heads:
        return "its embedding or norms"
    if h.activation not in ACTIVATIONS:
        return "its activation"
    for index in range(h.n_layers):
        view = view_layer(model, index)
        unknown = [role for role in _UNKNOWN if role in view.tensors] + [tensor.role for tensor in view.rest]
        if unknown:
            return unknown[0]
        if not is_plain_stream(view.tensors):
            return "its several streams"
        if view.attention is None or not view.feed_forward:
            return "its blocks"
        if [block.kind for block in view.feed_forward] != [DENSE] and not _has_known_experts(view, h):
            return "its way to choose experts"
    return ""


def _has_known_experts(view: Layer, hparams: Hparams) -> bool:
    """Return whether a layer has routed experts with a supported router, with or without a shared expert."""
    kinds, router = [block.kind for block in view.feed_forward], view.tensors.get("ffn_gate_inp")
    return (
        kinds.count(ROUTED) == len(kinds) - kinds.count(SHARED)
        and router is not None
        and router.shape == (kinds.count(ROUTED), hparams.n_embd)
        and 0 < hparams.n_experts_used <= kinds.count(ROUTED)
        and hparams.expert_scores != "unknown"
        and has_plain_experts(view.tensors)
        and not any(role.endswith(".scale") for role in view.tensors)
    )


@dataclass(frozen=True)
class Decoder:
    """The parts that layers share: hparams, and the cosines and sines of rope, ``(n_positions, n_pairs)``.

    ``norms_rotated``: norms of queries and keys come after rope, not before it.
    """

    hparams: Hparams
    cos: Float32
    sin: Float32
    norms_rotated: bool = False

    @classmethod
    def of(cls, model: Model, n_positions: int) -> Decoder:
        """Return the decoder of a model for sequences of ``n_positions``."""
        h = model.hparams
        n_pairs = 0 if h.rope == "none" else min(h.rope_dim, h.head_dim) // 2
        frequencies = h.rope_theta ** (-np.arange(n_pairs) / max(n_pairs, 1)) / h.rope_factor
        factors = model.by_name.get("rope_freqs.weight")
        if factors is not None and factors.n_weights == n_pairs:
            frequencies = frequencies / factors.load().ravel()
        return cls(h, *angles(n_positions, frequencies), norms_rotated=model.architecture in _NORMS_ROTATED)

    def layer(self, tape: Tape, view: Layer, x: Node) -> Node:
        """Return the output stream of a layer."""
        placement = norm_placement(view.tensors, self.hparams)
        if view.attention is None:
            raise ValueError("a layer without attention: call what_is_missing first")
        attended = self.attention(tape, view.attention, view.tensors, self.block_input(tape, placement.attention, x))
        if placement.parallel:
            fed = self.feed_forward(tape, view, self.block_input(tape, placement.feed_forward, x))
            x = self.add_update(tape, placement.attention, x, attended)
        else:
            x = self.add_update(tape, placement.attention, x, attended)
            fed = self.feed_forward(tape, view, self.block_input(tape, placement.feed_forward, x))
        x = self.add_update(tape, placement.feed_forward, x, fed)
        scale = view.tensors.get("layer_output_scale")
        return x if scale is None else tape.times(x, tape.node(scale.load().ravel()[:1, np.newaxis]))

    def block_input(self, tape: Tape, norms: BlockNorms, x: Node) -> Node:
        """Return the input of a block: the stream, through its norm if it has one."""
        return x if norms.before is None else self.norm(tape, norms.before, x)

    def norm(self, tape: Tape, norm: Norm, x: Node) -> Node:
        """Apply a norm of the kind that the stream has."""
        return tape.norm(norm, x, self.hparams.norm, self.hparams.norm_eps)

    def add_update(self, tape: Tape, norms: BlockNorms, x: Node, write: Node) -> Node:
        """Add a residual update to the stream; apply the norms of the placement."""
        if norms.after is not None:
            write = self.norm(tape, norms.after, write)
        x = tape.add(x, write, self.hparams.residual_scale)
        return x if norms.on_stream is None else self.norm(tape, norms.on_stream, x)

    def attention(self, tape: Tape, a: Attention, tensors: Mapping[str, Tensor], x: Node) -> Node:
        """Return the residual update of attention."""
        h, parts = self.hparams, {}
        for part, linear, n_heads in (("q", a.q, a.n_heads), ("k", a.k, a.n_kv_heads)):
            node, gain = tape.linear(linear, x), tensors.get(f"attn_{part}_norm")
            if gain is not None and not self.norms_rotated:
                node = tape.heads_norm(gain, node, n_heads, h.norm, h.norm_eps)
            if self.cos.shape[1]:
                node = tape.rotate(node, self.cos, self.sin, n_heads, h.rope == "neox")
            if gain is not None and self.norms_rotated:
                node = tape.heads_norm(gain, node, n_heads, h.norm, h.norm_eps)
            parts[part] = node
        v = tape.linear(a.v, x)
        scale = a.head_dim**-0.5 if h.attention_scale is None else h.attention_scale
        o = tape.attention(parts["q"], parts["k"], v, a.n_heads, a.n_kv_heads, scale, h.attn_logit_softcapping)
        return tape.linear(a.o, o)

    def feed_forward(self, tape: Tape, view: Layer, x: Node) -> Node:
        """Return the sum of the residual updates of a layer's feed-forward blocks: dense, or experts."""
        routed = [block for block in view.feed_forward if block.kind == ROUTED]
        parts = [self.routed(tape, routed, view.tensors, x)] if routed else []
        for block in view.feed_forward:
            if block.kind == ROUTED:
                continue
            written, gate = tape.linear(block.down, self.units(tape, block, x)), view.tensors.get("ffn_gate_inp_shexp")
            if block.kind == SHARED and gate is not None:
                gate_value = tape.scores(tape.linear(Linear(rows_of(gate, 0, 1)), x), "sigmoid")
                written = tape.times(written, gate_value)
            parts.append(written)
        return functools.reduce(tape.add, parts)

    def routed(self, tape: Tape, experts: Sequence[FeedForward], tensors: Mapping[str, Tensor], x: Node) -> Node:
        """Return the residual update of the experts that the router chooses; a score bias affects the choice only."""
        h = self.hparams
        logits = tape.linear(Linear(tensors["ffn_gate_inp"], tensors.get("ffn_gate_inp.bias")), x)
        scores = tape.scores(logits, h.expert_scores)
        chosen = tape.chosen(scores, tensors.get("exp_probs_b.bias"), h.n_experts_used)
        weights = tape.chosen_weights(scores, chosen, h.norm_topk_prob, h.experts_scale)

        def write(inner: Tape, expert: int, read: Node) -> Node:
            block = experts[expert]
            units = self.units(inner, block, read)
            if inner.on_expert is not None and inner.tokens is not None:
                for part, x in ((block.gate, read), (block.up, read), (block.down, units)):
                    if part is not None:
                        inner.on_expert(part.name, expert, inner.tokens, x.value)
            return inner.linear(block.down, units)

        return tape.experts(x, chosen, weights, write)

    def units(self, tape: Tape, block: FeedForward, x: Node) -> Node:
        """Return the hidden units of a feed-forward block, after its activation function."""
        gate = None if block.gate is None else tape.linear(block.gate, x)
        offset = 0.0 if gate is None else UP_OFFSETS.get(self.hparams.activation, 0.0)
        return tape.units(gate, tape.linear(block.up, x), self.hparams.activation, offset)
