"""Plans and scores made up for reports: many layers, experts, every kind of reason, names that would do harm."""

from __future__ import annotations

import math

from recipes import recipe

from nsds_gguf.evaluate.divergence import PERCENTILES, Divergence
from nsds_gguf.evaluate.perplexity import Perplexity
from nsds_gguf.llamacpp import ggml
from nsds_gguf.records import LayerScore, Plan, PlannedTensor, Scores

HOSTILE_NAME = (
    """</script><script>alert(1)</script><img src=x onerror=alert(2)> "'&amp;$data \u2028 \U0001f642 <!-- é"""
)

TYPES = ("IQ1_S", "IQ2_XXS", "Q2_K", "IQ3_S", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")

# Shapes of a dense layer, and of one with experts, a shared expert and a fused qkv; rows of 896 do not fit K-types.
DENSE = {
    "attn_norm": (8192,), "attn_q": (8192, 8192), "attn_k": (1024, 8192), "attn_v": (1024, 8192),
    "attn_output": (8192, 8192), "ffn_norm": (8192,), "ffn_gate": (28672, 8192), "ffn_up": (28672, 8192),
    "ffn_down": (8192, 28672),
}  # fmt: skip
EXPERTS = {
    "attn_norm": (2048,), "attn_qkv": (3072, 2048), "attn_qkv.bias": (3072,), "attn_output": (2048, 2048),
    "ffn_norm": (2048,), "ffn_gate_inp": (60, 2048), "ffn_gate_exps": (60, 896, 2048), "ffn_up_exps": (60, 896, 2048),
    "ffn_down_exps": (60, 2048, 896), "ffn_gate_inp_shexp": (2048,), "ffn_gate_shexp": (3584, 2048),
    "ffn_up_shexp": (3584, 2048), "ffn_down_shexp": (2048, 3584),
}  # fmt: skip


def made_up_plan(n_layers: int, roles: dict[str, tuple[int, ...]] = DENSE, name: str = "Made Up 405B") -> Plan:
    """Return a plan whose numbers differ from tensor to tensor; the type of one tensor in eleven is fixed."""
    n_embd = roles["attn_norm"][0]
    tensors = [_planned(0, "token_embd.weight", "token_embd", None, (32000, n_embd))]
    for layer in range(n_layers):
        for role, shape in roles.items():
            suffix = "" if role.endswith(".bias") else ".weight"
            tensors.append(_planned(len(tensors), f"blk.{layer}.{role}{suffix}", role, layer, shape))
    tensors.append(_planned(len(tensors), "output_norm.weight", "output_norm", None, (n_embd,)))
    tensors.append(_planned(len(tensors), "output.weight", "output", None, (32000, n_embd)))
    return Plan(
        recipe=recipe(3.5, metric="nsds", se="ratio", score_weight=1.0),
        tensors=tuple(tensors),
        header_bytes=49024,
        model_id="0" * 64,
        model_name=name,
        gap=1.2e-5,
        notes=(f"A note about {name}.",),
        scores_digest="1" * 64,
        versions={"nsds-gguf": "0.1.0"},
    )


def made_up_scores(plan: Plan) -> Scores:
    """Return scores of the layers of a plan, with the parts of NSDS."""
    n_layers = 1 + max(tensor.layer for tensor in plan.tensors if tensor.layer is not None)
    layers = []
    for layer in range(n_layers):
        p_nv, p_se = (0.5 + 0.45 * math.sin(rate * layer + 1) for rate in (0.7, 0.31))
        parts = {part: 0.1 + 0.01 * layer + 0.1 * i for i, part in enumerate(("qk", "ov", "gate", "up", "down"))}
        layers.append(LayerScore(layer, 1 - (1 - p_nv) * (1 - p_se), parts, parts, p_nv, p_se))
    return Scores(plan.recipe.to(None), tuple(layers), plan.model_id, plan.model_name)


def made_up_perplexity() -> Perplexity:
    """Return a measurement with a reference."""
    percentiles = {f"{percentile:g}": (percentile / 100) ** 3 for percentile in PERCENTILES}
    divergence = Divergence(
        reference_ppl=23.62974, reference_ppl_error=1.28489, ppl_ratio=1.182984, ppl_ratio_error=0.016474,
        log_ppl_ratio=0.16804, log_ppl_ratio_error=0.01392, ppl_difference=4.32387, ppl_difference_error=0.38,
        log_ppl_correlation=0.9657, kld_mean=0.1798124, kld_error=0.0043969, kld_percentiles=percentiles,
        delta_p_mean=-0.0121, delta_p_error=0.0021, delta_p_rms=0.0934, delta_p_rms_error=0.0031,
        delta_p_percentiles=percentiles, same_top=0.698529, same_top_error=0.010163,
    )  # fmt: skip
    return Perplexity(
        ppl=27.953607, ppl_error=1.503375, bits_per_byte=1.5102, n_ctx=512, n_chunks=8, n_chunks_wanted=8,
        n_scored_tokens=2040, n_text_tokens=41031, n_text_bytes=130000, text_sha256="2" * 64, adds_bos=True,
        n_vocab=2048, n_ctx_train=512, n_batch=2048, n_threads=2, versions={"llama.cpp": "b1"}, divergence=divergence,
    )  # fmt: skip


def _planned(index: int, name: str, role: str, layer: int | None, shape: tuple[int, ...]) -> PlannedTensor:
    n_weights = math.prod(shape)
    if len(shape) == 1:
        return PlannedTensor(name, role, layer, shape, "F32", 4 * n_weights, "unquantized", "vector")
    type_name, kind, reason = TYPES[(3 * (layer or 0) // 7 + index) % len(TYPES)], "chosen", "optimum"
    if shape[-1] % 256:
        type_name, kind = ("Q4_0", "IQ4_NL", "Q5_0")[index % 3], "fallback"
        reason = f"rows of {shape[-1]} are not a multiple of 256"
    elif index % 11 == 0:
        type_name, kind, reason = ("Q6_K", "Q8_0")[index % 2], "fixed", "fixed by --tensor-type"
    n_bytes = n_weights * ggml.block(type_name)[1] // ggml.block(type_name)[0]
    error = 0.5 ** (2 * ggml.bits_per_weight(type_name)) * (1.5 + math.sin(index))
    sensitivity = 0.03 * (1.2 + math.sin(0.37 * index)) / (1 + (layer or 0))
    stderr = error / 50 if index % 2 else 0.0
    return PlannedTensor(
        name, role, layer, shape, type_name, n_bytes, kind, reason, error, stderr, 512, sensitivity
    )  # fmt: skip
