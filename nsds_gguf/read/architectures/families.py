"""Model families as tables: the architecture of each class, and the source of each tensor and key.

A family states its differences from the defaults. Checkpoint names appear only in this package: everything else uses
GGUF names.

Sources: transformers' configuration and modeling files for the checkpoint side (defaults of config.json, names), and
llama.cpp ``src/models/*.cpp`` for what each architecture loads and computes: a bias, rope kind or setting that it does
not support is an error. llama.cpp's ``conversion/*.py`` determines the names of keys.
"""

from __future__ import annotations

import difflib
from importlib import resources

from ...errors import UnsupportedError
from .cohere import COHERE
from .deepseek import DEEPSEEK
from .family import Config, Family
from .gemma import GEMMA
from .gpt import GPT
from .granite import GRANITE
from .hybrid import HYBRID
from .llama import LLAMA
from .olmo import OLMO
from .phi import PHI
from .qwen import QWEN
from .recent import RECENT

FAMILIES = (*LLAMA, *QWEN, *GEMMA, *PHI, *GPT, *OLMO, *COHERE, *GRANITE, *DEEPSEEK, *RECENT, *HYBRID)

# Multimodal classes whose language model is converted, with the default ``model_type`` of their text_config.
WRAPPERS = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Idefics3ForConditionalGeneration": "llama",
    "LlavaForConditionalGeneration": "llama",
    "LlavaNextForConditionalGeneration": "llama",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen3_5ForConditionalGeneration": "qwen3_5_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe_text",
    "SmolVLMForConditionalGeneration": "llama",
}
TEXT_MODELS = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}

# Prefixes of names within the model and beside it (the output projection): of the class itself, of the language model
# in a multimodal one, of a model without head.
LAYOUTS = (
    ("{prefix}", ""),
    ("language_model.{prefix}", "language_model."),
    ("model.language_model.", ""),
    ("model.text_model.", ""),
    ("", ""),
)

# Checkpoint tensors that the GGUF does not need: rope tables, saved by old transformers.
IGNORED = (r"(.*\.)?rotary_emb\.inv_freq",)


# Conversion of an unsupported model through a GGUF.
ROUTE_THROUGH_GGUF = (
    "llama.cpp converts it: python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model.gguf, "
    "then nsds-gguf convert model.gguf"
)


def supported_classes() -> tuple[str, ...]:
    """Return every checkpoint class that converts, multimodal ones included."""
    return (*dict.fromkeys(name for family in FAMILIES for name in family.classes), *WRAPPERS)


_COMPARED_LETTERS = 200  # of a class name; comparison time is quadratic


def find_family(class_name: str, config: Config | None = None) -> Family:
    """Return the family of a checkpoint class; ``config`` decides where the class has several.

    Raises ``UnsupportedError`` naming the nearest supported class, and the way through a GGUF where llama.cpp has one.
    """
    for family in FAMILIES:
        if class_name in family.classes and (config is None or family.variant(config)):
            return family
    nearest = difflib.get_close_matches(class_name[:_COMPARED_LETTERS], supported_classes(), n=1, cutoff=0.0)
    known = (
        (resources.files("nsds_gguf.read.architectures") / "llama_cpp_classes.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    route = f"; {ROUTE_THROUGH_GGUF}" if class_name in known else ", and llama.cpp does not know it either"
    raise UnsupportedError(f"config.json: class {class_name} is not supported; nearest is {nearest[0]}{route}")
