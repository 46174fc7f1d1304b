"""Find the class of a config.json that names a wrapper, no class, or a model without head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ModelError
from .families import supported_classes

# Classes of transformers' AutoModelForCausalLM by model_type (modeling_auto).
MODEL_TYPES = {
    "apertus": "ApertusForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "idefics3": "Idefics3ForConditionalGeneration",
    "internlm2": "InternLM2ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "mamba": "MambaForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl_text": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_vl_text": "Qwen2VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl_moe_text": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl_text": "Qwen3VLForConditionalGeneration",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}

# Prefixes that trainers add to the name of a class, and names that replace it.
_BEFORE = re.compile(
    r"^(FSDP2?|FullyShardedDataParallel|FullySharded|DistributedDataParallel|DDP|DataParallel|DeepSpeed|DS|Replicate|"
    r"Compiled|Optimized|Peft|Lora|Liger|Unsloth|FastLanguage)+(?=[A-Z])"
)
_IN_PLACE = re.compile(
    r"OptimizedModule|FullyShardedDataParallel|DistributedDataParallel|DataParallel|DeepSpeedEngine|PeftModel|"
    r"PeftModelForCausalLM|LoraModel|AutoModelForCausalLM|PreTrainedModel"
)

# Exceptional names of classes without a head.
_BASES = {"Gemma3TextModel": "Gemma3ForCausalLM", "GPT2Model": "GPT2LMHeadModel"}


def named_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the class of a config.json, and a note if it differs from the name under ``architectures``.

    Raises ``ModelError`` when config.json has neither a class nor a known model_type. Returns unsupported classes
    unchanged.
    """
    architectures, kind = config.get("architectures"), config.get("model_type")
    by_type = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if isinstance(architectures, str):
        architectures = [architectures]
    if architectures is None or architectures == []:
        if by_type is None:
            also = f", and model_type {kind!r}" if kind is not None else ""
            raise ModelError(f"config.json: wanted one class name in architectures, got {architectures!r}{also}")
        return by_type, f"config.json names no class; its model_type {kind} is {by_type}."
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ModelError(f"config.json: wanted one class name in architectures, got {architectures!r}")
    name = architectures[0]
    meant = _meant(name, by_type)
    return (name, None) if meant is None else (meant, f"config.json's class {name} is read as {meant}.")


def _meant(name: str, by_type: str | None) -> str | None:
    """Return the class that a name stands for; ``None`` if the name is itself a class, or unknown."""
    known = supported_classes()
    if name in known:
        return None
    if _IN_PLACE.fullmatch(name):
        return by_type
    bare = _BEFORE.sub("", name)
    if bare in known:
        return bare
    stem = bare.removesuffix("Model")
    candidates = [_BASES.get(bare), f"{stem}ForCausalLM", f"{stem}ForConditionalGeneration"]
    return next((found for found in candidates if found in known), None) if bare.endswith("Model") else None
