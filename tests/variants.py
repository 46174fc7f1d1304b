"""Tiny random decoders of many designs, and a plain forward pass of each to sample from.

A ``Variant`` says how a decoder is put together; ``variant_arrays`` gives it weights by GGUF name, ``simulate`` runs
all tokens of its vocabulary through it. The pass is written from the variant, not from what the weights are called, and
knows nothing of moments. Attention stands for one over many independent positions: a value's deviation from its mean
shrinks by a fixed factor.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import erf

from nsds_gguf.records import Hparams
from nsds_gguf.sensitivity.blocks import ATTENTION_SHRINK

EPS = 1e-5

# Size of what attention writes: small, so that the stream stays as uncorrelated as the theory takes it to be.
SMALL = 0.3

LATENT, ROPE = 48, 8  # channels of latents and of rotated keys


@dataclass(frozen=True)
class Variant:
    """How a decoder is put together; a norm is its role, ``""`` one without gain, ``None`` no norm."""

    norm: str = "rms"
    norm_bias: bool = False
    before_attention: str | None = "attn_norm"
    behind_attention: str | None = None
    before_ffn: str | None = "ffn_norm"
    behind_ffn: str | None = None
    parallel: bool = False
    fused_qkv: bool = False
    bias: bool = False
    qk_norm: str | None = None  # "head" or "width"
    attention_gate: bool = False
    latent: str | None = None  # keys and values from a latent: "joint" in one matrix, "apart", "queries" from one too
    gated: bool = True
    fused_gate: bool = False
    activation: str = "silu"
    n_experts: int = 0
    n_used: int = 0
    shared: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    positions: bool = False
    hparams: dict = field(default_factory=dict)


VARIANTS = {
    "llama": Variant(),
    "gpt2": Variant(norm="layer", norm_bias=True, fused_qkv=True, bias=True, gated=False, activation="gelu",
                    positions=True),
    "gptneox": Variant(norm="layer", norm_bias=True, fused_qkv=True, bias=True, gated=False, activation="gelu",
                       parallel=True, hparams={"parallel_residual": True}),
    "command-r": Variant(norm="layer", before_ffn="attn_norm", parallel=True),
    "phi2": Variant(norm="layer", norm_bias=True, before_ffn="attn_norm", parallel=True, gated=False, bias=True,
                    activation="gelu"),
    "phi3": Variant(fused_qkv=True, fused_gate=True),
    "olmo": Variant(norm="layer", before_attention="", before_ffn=""),
    "olmo2": Variant(before_attention=None, behind_attention="post_attention_norm", before_ffn=None,
                     behind_ffn="post_ffw_norm", qk_norm="width"),
    "gemma2": Variant(behind_attention="post_attention_norm", behind_ffn="post_ffw_norm", activation="gelu",
                      embedding_scale=8.0),
    "granite": Variant(embedding_scale=12.0, residual_scale=0.22, attention_scale=0.2),
    "nemotron": Variant(norm="layer", norm_bias=True, gated=False, activation="relu2"),
    "qwen3": Variant(qk_norm="head"),
    "afmoe, parallel": Variant(attention_gate=True, before_ffn="attn_norm", parallel=True),
    "deepseek2": Variant(latent="joint"),
    "deepseek2, apart": Variant(latent="apart"),
    "deepseek3": Variant(latent="queries"),
    "mixtral": Variant(n_experts=4, n_used=2),
    "qwen2moe": Variant(n_experts=4, n_used=2, shared=True),
    "gpt-oss": Variant(before_ffn="post_attention_norm", bias=True, n_experts=3, n_used=2, activation="swiglu_oai"),
}  # fmt: skip


def variant_arrays(variant, seed=0, *, n_layers=1, n_embd=128, n_ff=160, n_heads=8, n_kv_heads=8, head_dim=16,
                   n_vocab=3000):  # fmt: skip
    """Return float32 arrays by GGUF name and the hparams of a random decoder of a variant."""
    rng = np.random.default_rng(seed)
    q, kv = n_heads * head_dim, n_kv_heads * head_dim

    def matrix(rows, cols, *stack):
        """Return columns of different size, so that it matters which moment meets which."""
        size = rng.lognormal(0, 0.25, (1, cols)) / np.sqrt(cols)
        return (rng.standard_normal((*stack, rows, cols)) * size).astype("f4")

    def table(size):
        return (size * rng.standard_normal((n_vocab, n_embd)) * rng.lognormal(0, 0.25, n_embd)).astype("f4")

    def vector(*shape, spread=0.2):
        return (spread * rng.standard_normal(shape)).astype("f4")

    def norm(role, size=1.0):
        if not role:
            return {}
        gain = {f"{role}.weight": (size * rng.lognormal(0, 0.3, n_embd)).astype("f4")}
        return gain | ({f"{role}.bias": vector(n_embd)} if variant.norm_bias else {})

    def linear(role, rows, cols, *stack, bias=variant.bias):
        weight = {f"{role}.weight": matrix(rows, cols, *stack)}
        return weight | ({f"{role}.bias": vector(*stack, rows)} if bias else {})

    def feed_forward(suffix, *stack):
        hidden = 2 * n_ff if variant.fused_gate else n_ff
        out = linear(f"ffn_up{suffix}", hidden, n_embd, *stack) | linear(f"ffn_down{suffix}", n_embd, n_ff, *stack)
        if variant.gated and not variant.fused_gate:
            out |= linear(f"ffn_gate{suffix}", n_ff, n_embd, *stack)
        return out

    def latent():
        out = linear("attn_kv_a_mqa", LATENT + ROPE, n_embd)
        out["attn_kv_a_norm.weight"] = rng.lognormal(0, 0.3, LATENT).astype("f4")
        if variant.latent == "queries":
            out |= linear("attn_q_a", LATENT, n_embd) | linear("attn_q_b", n_heads * (head_dim + ROPE), LATENT)
            out["attn_q_a_norm.weight"] = rng.lognormal(0, 0.3, LATENT).astype("f4")
        else:
            out |= linear("attn_q", n_heads * (head_dim + ROPE), n_embd)
        if variant.latent == "joint":
            return out | linear("attn_kv_b", n_heads * 2 * head_dim, LATENT)
        out["attn_k_b.weight"] = matrix(head_dim, LATENT, n_heads).swapaxes(1, 2).copy()
        return out | linear("attn_v_b", head_dim, LATENT, n_heads)

    def layer():
        out = norm(variant.before_attention) | norm(variant.behind_attention, SMALL)
        out |= norm(variant.before_ffn) | norm(variant.behind_ffn, SMALL)
        if variant.latent:
            out |= latent()
        for part, rows in (("q", q), ("k", kv), ("v", kv)) if not variant.latent else ():
            out |= linear(f"attn_{part}", rows, n_embd)
        out |= linear("attn_output", n_embd, q)
        out["attn_output.weight"] *= SMALL
        if variant.qk_norm:
            sizes = {"head": (head_dim, head_dim), "width": (q, kv)}[variant.qk_norm]
            out |= {
                f"attn_{p}_norm.weight": rng.lognormal(0, 0.3, n).astype("f4") for p, n in zip("qk", sizes, strict=True)
            }
        if variant.attention_gate:
            out |= linear("attn_gate", q, n_embd)
        if variant.n_experts:
            out |= feed_forward("_exps", variant.n_experts)
            out["ffn_gate_inp.weight"] = matrix(variant.n_experts, n_embd)
        if variant.shared:
            out |= feed_forward("_shexp") | {"ffn_gate_inp_shexp.weight": vector(n_embd)}
        out |= {} if variant.n_experts else feed_forward("")
        if variant.norm == "layer":  # what is written to all channels alike is never read
            for role in ("attn_output", "ffn_down"):
                out[f"{role}.weight"] += rng.standard_normal(out[f"{role}.weight"].shape[1]).astype("f4") / 8
        return out

    mean = vector(n_embd) if variant.norm == "layer" else 0  # propagation follows means after layer norms alone
    arrays = {"token_embd.weight": table(1.0) + mean}
    if variant.positions:
        arrays["position_embd.weight"] = table(0.5) + mean
    for index in range(n_layers):
        arrays |= {f"blk.{index}.{name}": value for name, value in layer().items()}
    arrays |= norm("output_norm") if variant.before_attention != "" else {}
    arrays["output.weight"] = matrix(40, n_embd)
    hparams = Hparams(
        n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab, 128, EPS, variant.activation,
        bool(variant.qk_norm), norm=variant.norm, embedding_scale=variant.embedding_scale,
        residual_scale=variant.residual_scale, attention_scale=variant.attention_scale, n_experts=variant.n_experts,
        n_experts_used=variant.n_used, **variant.hparams,
    )  # fmt: skip
    return arrays, hparams


def fused(arrays, variant):
    """Return the arrays as a file holds them: queries, keys and values in one matrix where the variant fuses them."""
    if not variant.fused_qkv:
        return arrays
    out = {}
    for name, value in arrays.items():
        before, _, part = name.partition("attn_")
        if part in ("k.weight", "v.weight", "k.bias", "v.bias"):
            continue
        if part in ("q.weight", "q.bias"):
            kind = part.partition(".")[2]
            name = f"{before}attn_qkv.{kind}"
            value = np.concatenate([arrays[f"{before}attn_{p}.{kind}"] for p in "qkv"])
        out[name] = value
    return out


def act(name, x):
    if name in ("silu", "swiglu_oai"):
        return x / (1 + np.exp(-x * (1.702 if name == "swiglu_oai" else 1)))
    if name == "gelu":
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return np.maximum(x, 0) ** (2 if name == "relu2" else 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Simulation:
    """All tokens of the vocabulary, one a row, through a decoder; ``seen`` holds what each matrix multiplied."""

    def __init__(self, arrays, variant, hparams, seed=0):
        self.a = {name: value.astype(np.float64) for name, value in arrays.items()}
        self.variant, self.h = variant, hparams
        self.rng = np.random.default_rng(seed)
        self.seen, self.logit_square = {}, []

    def run(self):
        """Return the stream after the last layer, ``(n_vocab, n_embd)``."""
        x = self.a["token_embd.weight"] * self.variant.embedding_scale
        if self.variant.positions:
            x = x + self.rng.permutation(self.a["position_embd.weight"])
        for index in range(self.h.n_layers):
            x = self.layer(f"blk.{index}.", x)
        self.seen["output.weight"] = self.norm("output_norm" if self.variant.before_attention != "" else "", x)
        return x

    def layer(self, at, x):
        v = self.variant
        attention = self.norm(self.role(at, v.before_attention), x)
        y = x + v.residual_scale * self.norm(self.role(at, v.behind_attention), self.attention(at, attention))
        hidden = self.norm(self.role(at, v.before_ffn), x if v.parallel else y)
        return y + v.residual_scale * self.norm(self.role(at, v.behind_ffn), self.feed_forward(at, hidden))

    @staticmethod
    def role(at, norm):
        return at + norm if norm else norm

    def norm(self, name, x, gain=None):
        if name is None:
            return x
        if self.variant.norm == "layer" and gain is None:
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
        gain = self.a.get(f"{name}.weight", 1.0) if gain is None else gain
        return x * gain + self.a.get(f"{name}.bias", 0.0)

    def linear(self, name, x, expert=None):
        w, b = self.a[f"{name}.weight"], self.a.get(f"{name}.bias", 0.0)
        if expert is not None:
            w, b = w[expert], b if np.isscalar(b) else b[expert]
        self.seen[f"{name}.weight" if expert is None else (f"{name}.weight", expert)] = x
        return x @ w.T + b

    def attention(self, at, x):
        if self.variant.latent:
            return self.latent_attention(at, x)
        h = self.h
        self.logits(at, x)
        v = self.linear(f"{at}attn_v", x)
        mean = v.mean(axis=0) if self.variant.norm == "layer" else self.a.get(f"{at}attn_v.bias", 0.0)
        v = mean + math.sqrt(ATTENTION_SHRINK) * (v - mean)
        heads = np.repeat(v.reshape(len(x), h.n_kv_heads, -1), h.n_heads // h.n_kv_heads, axis=1).reshape(len(x), -1)
        if self.variant.attention_gate:
            heads = heads * sigmoid(self.linear(f"{at}attn_gate", x))
        return self.linear(f"{at}attn_output", heads)

    def latent_attention(self, at, x):
        h, n = self.h, len(x)
        latent, rotated = np.split(self.linear(f"{at}attn_kv_a_mqa", x), [LATENT], axis=1)
        latent = self.norm("", latent, self.a[f"{at}attn_kv_a_norm.weight"])
        if self.variant.latent == "queries":
            short = self.norm("", self.linear(f"{at}attn_q_a", x), self.a[f"{at}attn_q_a_norm.weight"])
            q = self.linear(f"{at}attn_q_b", short)
        else:
            q = self.linear(f"{at}attn_q", x)
        q = q.reshape(n, h.n_heads, h.head_dim + ROPE)
        if self.variant.latent == "joint":
            both = self.linear(f"{at}attn_kv_b", latent).reshape(n, h.n_heads, 2 * h.head_dim)
            k, v = both[..., : h.head_dim], both[..., h.head_dim :]
        else:
            k = np.einsum("tr,hrc->thc", latent, self.a[f"{at}attn_k_b.weight"])
            v = np.einsum("tr,hcr->thc", latent, self.a[f"{at}attn_v_b.weight"])
            self.seen[f"{at}attn_v_b.weight"] = latent
            for head in range(h.n_heads):
                self.seen[f"{at}attn_k_b.weight", head] = q[:, head, : h.head_dim]
        k = np.concatenate([k, np.repeat(rotated[:, None], h.n_heads, axis=1)], axis=2)
        self.logit_square.append(((q * self.rng.permutation(k)).sum(axis=-1) ** 2).mean() / (h.head_dim + ROPE))
        return self.linear(f"{at}attn_output", math.sqrt(ATTENTION_SHRINK) * v.reshape(n, -1))

    def logits(self, at, x):
        """Keep the mean square of the logits of random pairs of positions."""
        h, norms = self.h, []
        for part, n_heads in (("q", h.n_heads), ("k", h.n_kv_heads)):
            y = self.linear(f"{at}attn_{part}", x)
            heads = y.reshape(len(x), n_heads, h.head_dim)
            if self.variant.qk_norm == "head":
                heads = self.norm("", heads, self.a[f"{at}attn_{part}_norm.weight"])
            elif self.variant.qk_norm == "width":
                heads = self.norm("", y, self.a[f"{at}attn_{part}_norm.weight"]).reshape(heads.shape)
            norms.append(heads)
        q, k = norms[0], np.repeat(self.rng.permutation(norms[1]), h.n_heads // h.n_kv_heads, axis=1)
        scale = self.variant.attention_scale or 1 / math.sqrt(h.head_dim)
        self.logit_square.append((((q * k).sum(axis=-1) * scale) ** 2).mean())

    def feed_forward(self, at, x):
        if not self.variant.n_experts:
            return self.block(at, "", x)
        n, k = self.variant.n_experts, self.variant.n_used
        chosen = self.rng.permuted(np.tile(np.arange(n) < k, (len(x), 1)), axis=1)
        out = sum(chosen[:, [e]] / k * self.block(at, "_exps", x, e) for e in range(n))
        if self.variant.shared:
            gate = sigmoid(x @ self.a[f"{at}ffn_gate_inp_shexp.weight"])
            out = out + gate[:, None] * self.block(at, "_shexp", x)
        return out

    def block(self, at, suffix, x, expert=None):
        v, up = self.variant, self.linear(f"{at}ffn_up{suffix}", x, expert)
        if v.fused_gate:
            gate, up = np.split(up, 2, axis=1)
            hidden = act(v.activation, gate) * up
        elif v.gated:
            gate = self.linear(f"{at}ffn_gate{suffix}", x, expert)
            hidden = act(v.activation, gate) * (up + (v.activation == "swiglu_oai"))
        else:
            hidden = act(v.activation, up)
        return self.linear(f"{at}ffn_down{suffix}", hidden, expert)
