"""Compare what we assume of a silent config.json with the defaults of transformers' config classes.

    python tools/check/check_defaults.py [--record]

For every class that transformers has, a config.json that names the class alone must give, in our reading, the settings
of its config class: sizes, epsilons, rope, windows, multipliers, experts. The same with another number of heads, which
shows whether a default follows it. ``--record`` writes the settings to ``tests/golden/defaults.json``, which the tests
compare with ours.

Needs the ``dev`` extra. Exit code 1 when anything is off or transformers is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nsds_gguf.read.architectures.classes import MODEL_TYPES
from nsds_gguf.read.architectures.families import WRAPPERS, find_family
from nsds_gguf.read.architectures.rope import rope_settings
from nsds_gguf.read.config import ALIASES, canonical

try:
    import transformers
    from transformers import CONFIG_MAPPING
except ImportError as error:
    sys.exit(f"error: {error}; run: pip install 'nsds-gguf[dev]'")

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "defaults.json"

# Settings that decide what is written, by their canonical names.
SETTINGS = (
    "attention_bias", "attention_multiplier", "attn_logit_softcapping", "conv_kernel", "embedding_multiplier",
    "final_logit_softcapping", "first_k_dense_replace", "head_dim", "hidden_size", "intermediate_size", "kv_lora_rank",
    "logit_scale", "logits_scaling", "mamba_conv_bias", "mamba_d_conv", "mamba_d_head", "mamba_d_state", "mamba_expand",
    "mamba_n_groups", "mamba_n_heads", "max_position_embeddings", "mlp_bias", "moe_intermediate_size", "n_group",
    "n_shared_experts", "norm_eps", "norm_topk_prob", "num_attention_heads", "num_experts", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "q_lora_rank", "qk_layernorm", "qk_nope_head_dim", "qk_rope_head_dim",
    "qkv_bias", "query_pre_attn_scalar", "residual_multiplier", "routed_scaling_factor", "scoring_func",
    "shared_expert_intermediate_size", "shared_intermediate_size", "state_size", "tie_word_embeddings", "topk_group",
    "use_bias", "use_conv_bias", "use_parallel_residual", "use_qk_norm", "use_qkv_bias", "v_head_dim", "vocab_size",
)  # fmt: skip

# Where ours is another on purpose: transformers' classes then do not run, or the number does not count.
EXCEPTIONS = {
    ("deepseek_v2", "num_experts_per_tok"): "transformers has none, and fails without",
    ("deepseek_v2", "head_dim"): "of the rotated part; the sizes of latent attention count",
    ("deepseek_v3", "head_dim"): "of the rotated part; the sizes of latent attention count",
    ("deepseek_v3", "num_key_value_heads"): "latent attention has one",
    ("qwen3_vl_moe_text", "tie_word_embeddings"): "that of the whole model counts, which is false",
    ("mamba", "num_attention_heads"): "Mamba has no heads",
    ("mamba", "max_position_embeddings"): "Mamba has no limit of positions",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write tests/golden/defaults.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found, n_wrong = {}, 0
    for kind, name in MODEL_TYPES.items():
        if name in WRAPPERS or kind not in CONFIG_MAPPING:
            continue
        for given in ({}, {"num_attention_heads": 8}):
            if given and kind == "mamba":
                continue
            entry = theirs(kind, given)
            found.setdefault(name, []).append({"given": given, "wanted": entry})
            for key, (wanted, ours) in differences(kind, name, given, entry).items():
                n_wrong += 1
                print(f"{name} {given}: {key}: transformers {wanted!r}, ours {ours!r}")
    print(f"transformers {transformers.__version__}: {len(found)} classes, {n_wrong} differences")
    if args.record:
        lines = (f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in found.items())
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    elif not GOLDEN.exists() or json.loads(GOLDEN.read_text(encoding="utf-8")) != found:
        print(f"{GOLDEN.name} is another: run with --record")
        n_wrong += 1
    return 1 if n_wrong else 0


def theirs(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' settings under canonical names, those that count and are not null; rope among them."""
    config = CONFIG_MAPPING[kind](**given)
    entry = {}
    for key in SETTINGS:
        values = [getattr(config, alias) for alias in ALIASES.get(key, (key,)) if hasattr(config, alias)]
        if values and values[0] is not None and (kind, key) not in EXCEPTIONS:
            entry[key] = values[0]
    if "head_dim" in entry and entry["head_dim"] * config.num_attention_heads == config.hidden_size:
        del entry["head_dim"]  # follows from the others
    rope = getattr(config, "rope_parameters", None)
    if rope:
        full = rope.get("full_attention", rope)
        entry["rope_theta"] = full["rope_theta"]
        entry["partial_rotary_factor"] = full.get("partial_rotary_factor", 1.0)
        if "sliding_attention" in rope:
            entry["local_theta"] = rope["sliding_attention"]["rope_theta"]
    return entry


def differences(kind: str, name: str, given: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that ours has otherwise: transformers' value and ours."""
    family = find_family(name)
    settings = canonical({"model_type": kind, **given}, family)
    rope = rope_settings(settings, family.defaults) if family.rope_kinds else {}
    ours = {**settings, "local_theta": rope.get("rope_theta"), "partial_rotary_factor": 1.0, **rope}
    ours.setdefault("num_key_value_heads", ours.get("num_attention_heads"))
    return {
        key: (value, ours.get(key)) for key, value in wanted.items() if (ours.get(key) or 0) != (value or 0)
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
