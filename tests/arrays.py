"""Arrays of tiny random decoders by GGUF name, for models held in memory."""

from dataclasses import replace

import numpy as np

from nsds_gguf.records import Hparams


def random_arrays(seed, *, tied=False, n_layers=2, n_embd=32, n_ff=48, n_heads=4, n_kv_heads=2, head_dim=8,
                  n_vocab=40, biases=False, qk_norm=False):  # fmt: skip
    """Return float32 arrays by GGUF name and the hparams of a random decoder."""
    rng = np.random.default_rng(seed)

    def matrix(rows, cols):
        return (rng.standard_normal((rows, cols)) * rng.lognormal(0, 0.5, (1, cols)) / np.sqrt(cols)).astype("f4")

    def gain(n):
        return rng.lognormal(0, 0.3, n).astype("f4")

    arrays = {"token_embd.weight": matrix(n_vocab, n_embd)}
    q, kv = n_heads * head_dim, n_kv_heads * head_dim
    for i in range(n_layers):
        layer = {
            "attn_norm.weight": gain(n_embd),
            "attn_q.weight": matrix(q, n_embd),
            "attn_k.weight": matrix(kv, n_embd),
            "attn_v.weight": matrix(kv, n_embd),
            "attn_output.weight": matrix(n_embd, q),
            "ffn_norm.weight": gain(n_embd),
            "ffn_gate.weight": matrix(n_ff, n_embd),
            "ffn_up.weight": matrix(n_ff, n_embd),
            "ffn_down.weight": matrix(n_embd, n_ff),
        }
        if biases:
            layer |= {
                f"attn_{r}.bias": rng.standard_normal(n).astype("f4") for r, n in zip("qkv", (q, kv, kv), strict=True)
            }
        if qk_norm:
            layer |= {f"attn_{r}_norm.weight": gain(head_dim) for r in "qk"}
        arrays |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    arrays["output_norm.weight"] = gain(n_embd)
    if not tied:
        arrays["output.weight"] = matrix(n_vocab, n_embd)
    hparams = Hparams(n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab, 128, 1e-5, qk_norm=qk_norm)
    return arrays, hparams


def expert_arrays(seed, *, n_experts=4, n_used=2, **sizes):
    """Return likewise a decoder of routed experts beside a shared one with a gate, each as wide as the dense block."""
    arrays, hparams = random_arrays(seed, **sizes)
    rng, out = np.random.default_rng([seed, n_experts]), {}
    for name, value in arrays.items():
        before, _, role = name.partition(".ffn_")
        if role in ("gate.weight", "up.weight", "down.weight"):
            kind = role.removesuffix(".weight")
            out[f"{before}.ffn_{kind}_shexp.weight"] = value
            others = [rng.permuted(value, axis=0) for _ in range(n_experts)]  # columns keep their sizes
            out[f"{before}.ffn_{kind}_exps.weight"] = np.stack(others)
        else:
            out[name] = value
        if role == "norm.weight":
            router = rng.standard_normal((n_experts + 1, hparams.n_embd)).astype("f4") / np.sqrt(hparams.n_embd)
            out[f"{before}.ffn_gate_inp.weight"] = router[1:]
            out[f"{before}.ffn_gate_inp_shexp.weight"] = router[0]
    return out, replace(hparams, n_experts=n_experts, n_experts_used=n_used)
