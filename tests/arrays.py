"""Arrays of tiny random decoders by GGUF name, for models held in memory."""

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
