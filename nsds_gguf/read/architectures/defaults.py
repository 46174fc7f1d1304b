"""Default sizes of transformers' config classes, which config.json (and text_config in particular) may omit.

``tools/check/check_defaults.py`` compares them, and a family's own ``defaults``, with the classes themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip

# In the order of the names; None where the class has no default, or derives it.
_SIZES: dict[str, tuple[int | None, ...]] = {
    "CohereForCausalLM": (8192, 22528, 40, 64, None, 256000, 8192),
    "Cohere2ForCausalLM": (8192, 22528, 40, 64, None, 256000, 8192),
    "DeepseekV2ForCausalLM": (4096, 11008, 32, 32, None, 102400, 2048),
    "DeepseekV3ForCausalLM": (7168, 18432, 61, 128, None, 129280, 4096),
    "GemmaForCausalLM": (3072, 24576, 28, 16, 16, 256000, 8192),
    "Gemma2ForCausalLM": (2304, 9216, 26, 8, 4, 256000, 8192),
    "Gemma3ForCausalLM": (2304, 9216, 26, None, None, None, None),
    "GPT2LMHeadModel": (768, None, 12, 12, None, 50257, None),
    "GPTNeoXForCausalLM": (6144, 24576, 44, 64, None, 50432, 2048),
    "GraniteForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "GraniteMoeForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "GraniteMoeHybridForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "GraniteMoeSharedForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "LlamaForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "MambaForCausalLM": (768, None, 32, None, None, 50280, None),
    "MistralForCausalLM": (4096, 14336, 32, 32, 8, 32000, 131072),
    "MixtralForCausalLM": (4096, 14336, 32, 32, 8, 32000, 131072),
    "OlmoForCausalLM": (4096, 11008, 32, 32, None, 50304, 2048),
    "Olmo2ForCausalLM": (4096, 11008, 32, 32, None, 50304, 2048),
    "Olmo3ForCausalLM": (4096, 11008, 32, 32, None, 50304, 2048),
    "OlmoeForCausalLM": (2048, 2048, 16, 16, None, 50304, 4096),
    "PhiForCausalLM": (2048, 8192, 24, 32, None, 51200, 2048),
    "Phi3ForCausalLM": (3072, 8192, 32, 32, None, 32064, 4096),
    "Qwen2ForCausalLM": (4096, 22016, 32, 32, 32, 151936, 32768),
    "Qwen2MoeForCausalLM": (2048, 5632, 24, 16, 16, 151936, 32768),
    "Qwen3ForCausalLM": (4096, 22016, 32, 32, 32, 151936, 32768),
    "Qwen3MoeForCausalLM": (2048, 6144, 24, 32, 4, 151936, 32768),
    "SmolLM3ForCausalLM": (2048, 11008, 36, 16, 4, 128256, 32768),
    "StableLmForCausalLM": (2560, 6912, 32, 32, 32, 50304, 4096),
    "Starcoder2ForCausalLM": (3072, 12288, 30, 24, 2, 49152, 4096),
}


def default_sizes(class_name: str) -> Mapping[str, int]:
    """Return the default sizes of a class by canonical name; empty for a class unknown to transformers."""
    pairs = zip(_NAMES, _SIZES.get(class_name, ()), strict=False)
    return {name: size for name, size in pairs if size is not None}
