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
    "ApertusForCausalLM": (4096, 14336, 32, 32, None, 131072, 65536),
    "CohereForCausalLM": (8192, 22528, 40, 64, None, 256000, 8192),
    "Cohere2ForCausalLM": (8192, 22528, 40, 64, None, 256000, 8192),
    "DeepseekV2ForCausalLM": (4096, 11008, 32, 32, None, 102400, 2048),
    "DeepseekV3ForCausalLM": (7168, 18432, 61, 128, None, 129280, 4096),
    "Dots1ForCausalLM": (4608, 10944, 62, 32, 32, 152064, 2048),
    "Ernie4_5ForCausalLM": (1024, 3072, 18, 16, 2, 103424, 131072),
    "Ernie4_5_MoeForCausalLM": (2560, 12288, 28, 20, 4, 103424, 131072),
    "Exaone4ForCausalLM": (4096, 16384, 32, 32, 32, 102400, 2048),
    "FalconH1ForCausalLM": (4096, 14336, 32, 32, 8, 128000, 8192),
    "GemmaForCausalLM": (3072, 24576, 28, 16, 16, 256000, 8192),
    "Gemma2ForCausalLM": (2304, 9216, 26, 8, 4, 256000, 8192),
    "Gemma3ForCausalLM": (2304, 9216, 26, None, None, None, None),
    "Glm4ForCausalLM": (4096, 13696, 40, 32, 2, 151552, 131072),
    "Glm4MoeForCausalLM": (4096, 10944, 46, 96, 8, 151552, 131072),
    "GPT2LMHeadModel": (768, None, 12, 12, None, 50257, None),
    "GPTNeoXForCausalLM": (6144, 24576, 44, 64, None, 50432, 2048),
    "GptOssForCausalLM": (2880, 2880, 36, 64, 8, 201088, 131072),
    "GraniteForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "GraniteMoeForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "GraniteMoeHybridForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "GraniteMoeSharedForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "HunYuanDenseV1ForCausalLM": (4096, 11008, 32, 32, None, 290943, 2048),
    "HunYuanMoEV1ForCausalLM": (4096, 11008, 32, 32, None, 290943, 2048),
    "Lfm2ForCausalLM": (2560, 12288, 32, 32, 8, 65536, 128000),
    "Lfm2MoeForCausalLM": (2048, 7168, 32, 32, 8, 65536, 128000),
    "LlamaForCausalLM": (4096, 11008, 32, 32, None, 32000, 2048),
    "MambaForCausalLM": (768, None, 32, None, None, 50280, None),
    "MiniMaxM2ForCausalLM": (3072, 1536, 62, 48, 8, 200064, 196608),
    "Ministral3ForCausalLM": (4096, 14336, 34, 32, 8, 131072, 262144),
    "MistralForCausalLM": (4096, 14336, 32, 32, 8, 32000, 131072),
    "MixtralForCausalLM": (4096, 14336, 32, 32, 8, 32000, 131072),
    "NemotronHForCausalLM": (4096, 21504, 4, 32, 8, 131072, 4096),
    "OlmoForCausalLM": (4096, 11008, 32, 32, None, 50304, 2048),
    "Olmo2ForCausalLM": (4096, 11008, 32, 32, None, 50304, 2048),
    "Olmo3ForCausalLM": (4096, 11008, 32, 32, None, 50304, 2048),
    "OlmoeForCausalLM": (2048, 2048, 16, 16, None, 50304, 4096),
    "PhiForCausalLM": (2048, 8192, 24, 32, None, 51200, 2048),
    "Phi3ForCausalLM": (3072, 8192, 32, 32, None, 32064, 4096),
    "Qwen2ForCausalLM": (4096, 22016, 32, 32, 32, 151936, 32768),
    "Qwen2MoeForCausalLM": (2048, 5632, 24, 16, 16, 151936, 32768),
    "Qwen3ForCausalLM": (4096, 22016, 32, 32, 32, 151936, 32768),
    "Qwen3_5ForCausalLM": (4096, 12288, 32, 16, 4, 248320, 32768),
    "Qwen3_5MoeForCausalLM": (2048, None, 40, 16, 2, 248320, 32768),
    "Qwen3MoeForCausalLM": (2048, 6144, 24, 32, 4, 151936, 32768),
    "Qwen3NextForCausalLM": (2048, 5632, 48, 16, 2, 151936, 32768),
    "Qwen2VLForConditionalGeneration": (8192, 29568, 80, 64, 8, 152064, 32768),
    "Qwen3VLForConditionalGeneration": (4096, 22016, 32, 32, 32, 151936, 128000),
    "Qwen3VLMoeForConditionalGeneration": (2048, 5632, 24, 16, 16, 151936, 128000),
    "SeedOssForCausalLM": (4096, 27648, 64, 80, 8, 155136, 524288),
    "SmolLM3ForCausalLM": (2048, 11008, 36, 16, 4, 128256, 32768),
    "StableLmForCausalLM": (2560, 6912, 32, 32, 32, 50304, 4096),
    "Starcoder2ForCausalLM": (3072, 12288, 30, 24, 2, 49152, 4096),
}


def default_sizes(class_name: str) -> Mapping[str, int]:
    """Return the default sizes of a class by canonical name; empty for a class unknown to transformers."""
    pairs = zip(_NAMES, _SIZES.get(class_name, ()), strict=False)
    return {name: size for name, size in pairs if size is not None}
