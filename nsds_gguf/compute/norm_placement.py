"""Norm placement: the norms before and after the blocks of a layer.

llama.cpp has one graph per architecture; here, the set of norms in a layer determines their placement.

=========================================  ====================================================================
norms of the layer                         placement
=========================================  ====================================================================
attn_norm, ffn_norm                        each block reads the stream through its norm (llama, gpt2, ...)
... and post_attention_norm, post_ffw_norm residual updates are normed too (gemma 2 and 3, glm4, plamo2)
... and attn_output_norm, layer_output...  the same under other names (grok)
post_attention_norm, post_ffw_norm alone   blocks read the bare stream (olmo2, exaone4)
attn_norm, post_attention_norm             the latter is the feed-forward block's own (qwen3next, glm4moe, gpt-oss)
attn_norm, attn_output_norm                the same under another name (dbrx)
attn_norm alone                            both blocks read its output, in parallel (command-r, phi2, falcon)
... and attn_norm_2                        attention reads this one instead (falcon 40B)
attn_output_norm, layer_output_norm alone  the stream itself is normed after each block (bert)
none                                       each block reads the stream through a norm without gain (olmo)
=========================================  ====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..records import Hparams, Tensor
from .norms import Norm


@dataclass(frozen=True)
class BlockNorms:
    """Norm before a block, norm on its residual update, norm on the stream after the update; ``None`` for none."""

    before: Norm | None
    after: Norm | None = None
    on_stream: Norm | None = None


@dataclass(frozen=True)
class NormPlacement:
    """The norms of both blocks of a layer; ``parallel``: both blocks read the input of the layer."""

    attention: BlockNorms
    feed_forward: BlockNorms
    parallel: bool

    @property
    def has_one_input(self) -> bool:
        """Whether both blocks read the input of the layer through the same norm."""
        return self.parallel and self.attention.before == self.feed_forward.before


def norm_placement(tensors: Mapping[str, Tensor], hparams: Hparams) -> NormPlacement:
    """Return the norm placement of a layer from its tensors by role."""

    def norm(role: str) -> Norm | None:
        gain = tensors.get(role)
        return None if gain is None else Norm(gain, tensors.get(f"{role}.bias"))

    first, second, own = norm("attn_norm"), norm("attn_norm_2"), norm("ffn_norm")
    attention_out, layer_out = norm("attn_output_norm"), norm("layer_output_norm")
    after_attention, after_ffn = norm("post_attention_norm"), norm("post_ffw_norm")
    if first is None and attention_out is not None:
        on_stream = BlockNorms(None, None, attention_out), BlockNorms(None, None, layer_out)
        return NormPlacement(*on_stream, parallel=False)
    if own is not None:
        ahead = BlockNorms(second or first, after_attention or attention_out)
        return NormPlacement(ahead, BlockNorms(own, after_ffn or layer_out), hparams.parallel_residual)
    if after_ffn is not None:
        return NormPlacement(BlockNorms(second or first, after_attention), BlockNorms(None, after_ffn), parallel=False)
    own = after_attention or attention_out
    if own is not None:
        return NormPlacement(BlockNorms(second or first), BlockNorms(own), parallel=False)
    if first is not None:
        return NormPlacement(BlockNorms(second or first), BlockNorms(first), parallel=True)
    return NormPlacement(BlockNorms(Norm()), BlockNorms(Norm()), parallel=False)


# Unsupported structures: several mixed streams (gemma3n, hyper-connections), experts with another input than the dense
# block (gemma4, arctic).
_OTHER_STREAM = re.compile(r"altup_|hc_|attn_res_score|ffn_res_score")
_OTHER_EXPERTS = ("pre_ffw_norm_2", "ffn_norm_exps")

# Matrices that share the input of attention: linear attention, latent queries and keys, ...
_ATTENTION_READERS = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "attn_q_a", "attn_kv_a_mqa", "ssm_in", "ssm_ba",
    "ssm_alpha", "ssm_beta", "ssm_f_a", "ssm_g_a", "shortconv.in_proj",
)  # fmt: skip


def is_plain_stream(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a layer has a single residual stream."""
    return not any(_OTHER_STREAM.match(role) for role in tensors)


def has_plain_experts(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether all feed-forward blocks of a layer share their input."""
    return not any(role in tensors for role in _OTHER_EXPERTS)


def reads_as_attention(tensor: Tensor) -> bool:
    """Return whether a matrix outside plain attention reads the stream through attention's norm."""
    return tensor.role in _ATTENTION_READERS
