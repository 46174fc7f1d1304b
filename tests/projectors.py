"""Random multimodal models whose vision parts have the names and settings of well-known repositories.

The language model is that of a spec of ``zoo_specs`` where our table has its class; for the others the folder holds an
embedding alone, enough for the vision part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import N_VOCAB, Uniform, Weights, stored, write_model
from zoo import Shape, zoo_config, zoo_shapes, zoo_weights
from zoo_specs import SPECS

# The converter numbers the layers of projectors as it does those of encoders: it takes three to name two of them.
EMBD, FF, TEXT, LAYERS, PATCH, IMAGE = 64, 80, 64, 3, 14, 56

_IMAGE = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.125]}
_ENCODER: dict[str, Any] = {
    "hidden_size": EMBD,
    "image_size": IMAGE,
    "intermediate_size": FF,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class ProjectorSpec:
    """A random multimodal model.

    Attributes:
        base: spec of ``zoo_specs`` for the language model; empty for an embedding alone.
        vision: ``vision_config``.
        shapes: names and shapes of the tensors of the vision part.
        settings: keys of config.json to change.
        image: preprocessor_config.json.
        processor: processor_config.json; none where empty.
        tokens: special tokens by text, in tokenizer_config.json.
        names: checkpoint names of the language model to change.
        dtype: storage, F32, F16 or BF16.
        seed: of the weights.
    """

    base: str
    vision: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    settings: Mapping[str, Any] = field(default_factory=dict)
    image: Mapping[str, Any] = field(default_factory=lambda: dict(_IMAGE))
    processor: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "F32"
    seed: int = 1


def _layers(prefix: str, layer: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def _biased(parts: Mapping[str, Shape]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, shape in parts.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


_SIGLIP_LAYER = _biased({
    "layer_norm1": (EMBD,),
    "layer_norm2": (EMBD,),
    **{f"self_attn.{name}_proj": (EMBD, EMBD) for name in ("q", "k", "v", "out")},
    "mlp.fc1": (FF, EMBD),
    "mlp.fc2": (EMBD, FF),
})  # fmt: skip


def _siglip(tower: str) -> dict[str, Shape]:
    return {
        **_biased({f"{tower}embeddings.patch_embedding": (EMBD, 3, PATCH, PATCH), f"{tower}post_layernorm": (EMBD,)}),
        f"{tower}embeddings.position_embedding.weight": ((IMAGE // PATCH) ** 2, EMBD),
        **_layers(f"{tower}encoder.layers.", _SIGLIP_LAYER),
    }


_GEMMA3_PROJECTOR = {
    "multi_modal_projector.mm_input_projection_weight": (EMBD, TEXT),
    "multi_modal_projector.mm_soft_emb_norm.weight": (EMBD,),
}
_SIGLIP_VISION = {"model_type": "siglip_vision_model", **_ENCODER}

_PIXTRAL = {
    "vision_tower.ln_pre.weight": (EMBD,),
    "vision_tower.patch_conv.weight": (EMBD, 3, PATCH, PATCH),
    **_layers("vision_tower.transformer.layers.", {
        **{f"attention.{name}_proj.weight": (EMBD, EMBD) for name in "qkvo"},
        "attention_norm.weight": (EMBD,),
        "feed_forward.down_proj.weight": (EMBD, FF),
        "feed_forward.gate_proj.weight": (FF, EMBD),
        "feed_forward.up_proj.weight": (FF, EMBD),
        "ffn_norm.weight": (EMBD,),
    }),
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "depth": LAYERS,
    "hidden_size": EMBD,
    "in_channels": 3,
    "intermediate_size": FF,
    "num_heads": 4,
    "out_hidden_size": TEXT,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


_QWEN3_SHAPES: dict[str, Shape] = {
    **_biased({"model.visual.patch_embed.proj": (EMBD, 3, 2, PATCH, PATCH)}),
    **_biased({"model.visual.merger.norm": (EMBD,)}),
    "model.visual.pos_embed.weight": (16, EMBD),
    **_biased({"model.visual.merger.linear_fc1": (4 * EMBD, 4 * EMBD),
               "model.visual.merger.linear_fc2": (TEXT, 4 * EMBD),
               "model.visual.deepstack_merger_list.0.norm": (4 * EMBD,),
               "model.visual.deepstack_merger_list.0.linear_fc1": (4 * EMBD, 4 * EMBD),
               "model.visual.deepstack_merger_list.0.linear_fc2": (TEXT, 4 * EMBD)}),
    **_layers("model.visual.blocks.", _biased({
        "norm1": (EMBD,),
        "norm2": (EMBD,),
        "attn.qkv": (3 * EMBD, EMBD),
        "attn.proj": (EMBD, EMBD),
        "mlp.linear_fc1": (FF, EMBD),
        "mlp.linear_fc2": (EMBD, FF),
    })),
}  # fmt: skip


def _whole(source_class: str, model_type: str) -> dict[str, Any]:
    text = {"hidden_size": TEXT, "vocab_size": N_VOCAB, "rms_norm_eps": 1e-5, "model_type": f"{model_type}_text"}
    return {"architectures": [source_class], "model_type": model_type, "text_config": text}


PROJECTOR_SPECS = {
    "gemma3": ProjectorSpec(
        "gemma3-multimodal",
        {**_SIGLIP_VISION, "vision_use_head": False},
        {**_siglip("vision_tower.vision_model."), **_GEMMA3_PROJECTOR},
        image={**_IMAGE, "image_seq_length": 1},
        seed=1,
    ),
    "gemma3-bf16-scale": ProjectorSpec(
        "gemma3-multimodal-4",
        {**_SIGLIP_VISION, "layer_norm_eps": 1e-5, "num_attention_heads": 2},
        {
            **_siglip("vision_tower.vision_model."),
            **_GEMMA3_PROJECTOR,
            "vision_tower.vision_model.head.probe": (1, 1, EMBD),
        },
        processor={"image_processor": {"image_mean": [0.4, 0.3, 0.2]}, "image_seq_length": 4},
        dtype="BF16",
        seed=2,
    ),
    "gemma4": ProjectorSpec(
        "",
        {"model_type": "gemma4_vision", **_ENCODER, "num_key_value_heads": 4, "head_dim": 16, "standardize": True,
         "position_embedding_size": 16, "hidden_activation": "gelu_pytorch_tanh"},
        {
            "model.vision_tower.patch_embedder.position_embedding_table": (2, 16, EMBD),
            "model.vision_tower.patch_embedder.input_proj.weight": (EMBD, 3 * PATCH * PATCH),
            "model.vision_tower.std_bias": (EMBD,),
            "model.vision_tower.std_scale": (EMBD,),
            "model.embed_vision.embedding_projection.weight": (TEXT, EMBD),
            **_layers("model.vision_tower.encoder.layers.", {
                **{f"self_attn.{name}_proj.linear.weight": (EMBD, EMBD) for name in "qkvo"},
                **{f"self_attn.{name}_norm.weight": (16,) for name in "qk"},
                **{f"mlp.{name}_proj.linear.weight": (FF, EMBD) for name in ("gate", "up")},
                "mlp.down_proj.linear.weight": (EMBD, FF),
                **{f"{name}_layernorm.weight": (EMBD,) for name in (
                    "input", "post_attention", "pre_feedforward", "post_feedforward"
                )},
            }),
        },
        settings={**_whole("Gemma4ForConditionalGeneration", "gemma4"), "audio_config": None},
        names={"model.embed_tokens.weight": "model.language_model.embed_tokens.weight"},
        dtype="BF16",
        seed=11,
    ),
    "smolvlm": ProjectorSpec(
        "smolvlm",
        {"model_type": "smolvlm_vision", **_ENCODER},
        {**_siglip("model.vision_model."), "model.connector.modality_projection.proj.weight": (TEXT, 4 * EMBD)},
        settings={"scale_factor": 2},
        image={**_IMAGE, "size": {"longest_edge": 112}},
        dtype="BF16",
        seed=3,
    ),
    "idefics3": ProjectorSpec(
        "idefics3",
        {"model_type": "idefics3_vision", **_ENCODER, "layer_norm_eps": 1e-5},
        {**_siglip("model.vision_model."), "model.connector.modality_projection.proj.weight": (TEXT, EMBD)},
        seed=4,
    ),
    "llava-clip": ProjectorSpec(
        "llava",
        {"model_type": "clip_vision_model", **_ENCODER, "num_hidden_layers": LAYERS},
        {
            "vision_tower.vision_model.embeddings.class_embedding": (EMBD,),
            "vision_tower.vision_model.embeddings.position_embedding.weight": ((IMAGE // PATCH) ** 2 + 1, EMBD),
            "vision_tower.vision_model.embeddings.patch_embedding.weight": (EMBD, 3, PATCH, PATCH),
            **_biased({f"vision_tower.vision_model.{name}": (EMBD,) for name in ("pre_layrnorm", "post_layernorm")}),
            **_layers("vision_tower.vision_model.encoder.layers.", _SIGLIP_LAYER),
            **_biased({
                "multi_modal_projector.linear_1": (TEXT, EMBD),
                "multi_modal_projector.linear_2": (TEXT, TEXT),
            }),
        },
        seed=5,
    ),
    "pixtral": ProjectorSpec(
        "llava",
        {"model_type": "pixtral", **_ENCODER, "head_dim": 16, "hidden_act": "silu"},
        {
            **_PIXTRAL,
            **_biased({
                "multi_modal_projector.linear_1": (TEXT, EMBD),
                "multi_modal_projector.linear_2": (TEXT, TEXT),
            }),
        },
        settings={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        tokens={"[IMG]": 10, "[IMG_BREAK]": 12},
        names={"language_model.model.embed_tokens.weight": "model.embed_tokens.weight"},
        dtype="F16",
        seed=6,
    ),
    "mistral3": ProjectorSpec(
        "mistral3",
        {"model_type": "pixtral", **_ENCODER, "head_dim": 16, "hidden_act": "silu"},
        {
            **_PIXTRAL,
            "multi_modal_projector.linear_1.weight": (TEXT, EMBD),
            "multi_modal_projector.linear_2.weight": (TEXT, TEXT),
            "multi_modal_projector.norm.weight": (EMBD,),
            "multi_modal_projector.patch_merger.merging_layer.weight": (EMBD, 4 * EMBD),
        },
        settings={"spatial_merge_size": 2},
        tokens={"[IMG_BREAK]": 12},
        dtype="BF16",
        seed=7,
    ),
    "qwen2.5-vl": ProjectorSpec(
        "qwen2.5-vl",
        {**_QWEN, "model_type": "qwen2_5_vl", "hidden_act": "silu", "fullatt_block_indexes": [0, 1]},
        {
            "visual.patch_embed.proj.weight": (EMBD, 3, 2, PATCH, PATCH),
            "visual.merger.ln_q.weight": (EMBD,),
            **_biased({"visual.merger.mlp.0": (4 * EMBD, 4 * EMBD), "visual.merger.mlp.2": (TEXT, 4 * EMBD)}),
            **_layers("visual.blocks.", {
                "norm1.weight": (EMBD,),
                "norm2.weight": (EMBD,),
                **_biased({"attn.qkv": (3 * EMBD, EMBD), "attn.proj": (EMBD, EMBD), "mlp.down_proj": (EMBD, FF),
                           "mlp.gate_proj": (FF, EMBD), "mlp.up_proj": (FF, EMBD)}),
            }),
        },
        dtype="BF16",
        seed=8,
    ),
    "qwen3-vl": ProjectorSpec(
        "qwen3-vl",
        {
            **_QWEN,
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1],
        },
        _QWEN3_SHAPES,
        seed=9,
    ),
    "qwen3.5": ProjectorSpec(
        "",
        {**_QWEN, "model_type": "qwen3_5", "hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 16,
         "deepstack_visual_indexes": []},
        {name: shape for name, shape in _QWEN3_SHAPES.items() if "deepstack" not in name},
        settings=_whole("Qwen3_5ForConditionalGeneration", "qwen3_5"),
        dtype="BF16",
        seed=10,
    ),
}  # fmt: skip


def projector_config(spec: ProjectorSpec) -> dict[str, Any]:
    """Return config.json."""
    if not spec.base:
        return {**spec.settings, "vision_config": dict(spec.vision)}
    return {**zoo_config(spec.base), **spec.settings, "vision_config": dict(spec.vision)}


def projector_weights(spec: ProjectorSpec) -> Weights:
    """Return all tensors by checkpoint name: those of the vision part, then those of the language model."""
    weights = {name: stored(_drawn(spec, name, shape), spec.dtype) for name, shape in spec.shapes.items()}
    if not spec.base:
        name = "model.embed_tokens.weight"
        return {**weights, spec.names.get(name, name): stored(_drawn(spec, name, (N_VOCAB, TEXT)), spec.dtype)}
    shapes = zoo_shapes(spec.base)
    own = ("lm_head", "model.embed_tokens", "model.layers", "model.norm")
    text = {name: shape for name, shape in shapes.items() if "language_model." in name or "text_model." in name
            or name.startswith(own)}  # fmt: skip
    found = zoo_weights(SPECS[spec.base], text)
    return {**weights, **{spec.names.get(name, name): rows for name, rows in found.items()}}


def _drawn(spec: ProjectorSpec, name: str, shape: Shape) -> NDArray[np.float32]:
    """Return weights that keep the size of activations: norms about 1, biases and embeddings small."""
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(f"{spec.seed} {name}"))
    numbers = Uniform(seed).draw(*shape)
    if len(shape) == 1:
        return numbers * np.float32(0.1) + np.float32("norm" in name or ".ln_" in name) * np.float32(name[-1] == "t")
    return numbers * np.float32(1 / math.sqrt(math.prod(shape[1:])))


def write_projector_folder(folder: Path, name: str) -> Path:
    """Write the folder of a spec, unless it is there already, and return it."""
    if folder.exists():
        return folder
    spec = PROJECTOR_SPECS[name]
    write_model(folder, projector_config(spec), projector_weights(spec))
    for file, settings in (("preprocessor_config.json", spec.image), ("processor_config.json", spec.processor)):
        if settings:
            (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    if spec.tokens:
        path = folder / "tokenizer_config.json"
        added = {str(number): {"content": text, "special": True} for text, number in spec.tokens.items()}
        settings = {**json.loads(path.read_text(encoding="utf-8")), "added_tokens_decoder": added}
        path.write_text(json.dumps(settings), encoding="utf-8")
    return folder
