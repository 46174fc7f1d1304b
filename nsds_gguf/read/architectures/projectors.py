"""Vision parts as a table: the projector of each multimodal class, and the source of each tensor and key.

Checkpoint names are canonical (``projector.canonical_name``): without a leading ``model.``, and without the
``vision_model`` within ``vision_tower`` that transformers 5 no longer saves.

Sources: llama.cpp's ``conversion/*.py`` for names, types and keys, ``tools/mtmd/clip.cpp`` for what it loads and
computes, and transformers' configuration files for defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ...errors import ModelError, UnsupportedError
from ...records import kv
from .family import Config, Part, Parts, Sizes, always, flag
from .projector_family import ARRAY, BOOL, INT32, U32, Keys, ProjectorFamily, eps_key, number, positive

_USE_GELU: Keys = {"clip.use_gelu": kv(True, BOOL)}
_PATCH = ("embd", "channels", "patch", "patch")


def _linear(source: str, rows: str, columns: str) -> Part:
    return Part(source, (rows, columns), bias=always)


def _norm(source: str, width: str = "embd") -> Part:
    return Part(source, (width,), bias=always)


def _layer_norm_eps(config: Config) -> Keys:
    return eps_key(config["vision"]["layer_norm_eps"])


def _patches(_: Config, sizes: Sizes) -> dict[str, int]:
    return {"patches": (sizes["image"] // sizes["patch"]) ** 2}


def _merged(sizes: Sizes, side: int) -> dict[str, int]:
    """Return the width of squares of ``side`` times ``side`` patches that the projector reads as one."""
    return {"merged": side * side * sizes["embd"]}


# --- SigLIP: Gemma 3, Idefics 3, SmolVLM --------------------------------------------------------------------------

_SIGLIP_LAYER: Parts = {
    "ln1": _norm("layer_norm1"),
    "attn_q": _linear("self_attn.q_proj", "embd", "embd"),
    "attn_k": _linear("self_attn.k_proj", "embd", "embd"),
    "attn_v": _linear("self_attn.v_proj", "embd", "embd"),
    "attn_out": _linear("self_attn.out_proj", "embd", "embd"),
    "ln2": _norm("layer_norm2"),
    "ffn_up": _linear("mlp.fc1", "ff", "embd"),
    "ffn_down": _linear("mlp.fc2", "embd", "ff"),
}
_SIGLIP_TYPES = {"v.patch_embd": "F32", "v.position_embd": "F32"}
_SIGLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_GELU = ("gelu_pytorch_tanh", "gelu")


def _siglip(tower: str) -> Parts:
    parts: Parts = {
        "v.patch_embd": Part("embeddings.patch_embedding", _PATCH, bias=always),
        "v.position_embd": Part("embeddings.position_embedding", ("patches", "embd")),
        "v.post_ln": _norm("post_layernorm"),
    }
    return {role: part.within(tower) for role, part in parts.items()}


def _gemma3_keys(config: Config, sizes: Sizes) -> Keys:
    n_tokens = positive(config["image"].get("image_seq_length", 256), "preprocessor_config.json: image_seq_length")
    scale = sizes["image"] // sizes["patch"] // math.isqrt(n_tokens)
    default = scale in (0, 4)
    scaled = {} if default else {"clip.vision.projector.scale_factor": kv(scale, U32)}
    return {**_layer_norm_eps(config), **_USE_GELU, **scaled}


_GEMMA3 = ProjectorFamily(
    classes=("Gemma3ForConditionalGeneration",),
    encoders=("siglip_vision_model",),
    kind="gemma3",
    roots=("vision_tower.", "multi_modal_projector."),
    layer=_SIGLIP_LAYER,
    layer_prefix="vision_tower.encoder.layers.{i}.",
    outside={
        **_siglip("vision_tower."),
        "mm.input_projection": Part("multi_modal_projector.mm_input_projection_weight", ("embd", "text"), suffix=""),
        "mm.soft_emb_norm": Part("multi_modal_projector.mm_soft_emb_norm", ("embd",), change="plus_one"),
    },
    types={**_SIGLIP_TYPES, "mm.input_projection": "F16"},
    sizes=_patches,
    keys=_gemma3_keys,
    vision=_SIGLIP_DEFAULTS,
    activations=_GELU,
    ignored=lambda _config, _sizes: (r"vision_tower\.head\..*",),
    example="google/gemma-3-4b-it",
)


def _scale(config: Config) -> int:
    return positive(config["scale_factor"], "config.json: scale_factor")


def _smolvlm_keys(config: Config, sizes: Sizes) -> Keys:
    size = config["image"].get("size")
    longest = size.get("longest_edge", sizes["image"]) if isinstance(size, Mapping) else sizes["image"]
    return {
        **_layer_norm_eps(config),
        "clip.vision.projector.scale_factor": kv(_scale(config), U32),
        **_USE_GELU,
        "clip.vision.preproc_image_size": kv(positive(longest, "preprocessor_config.json: size.longest_edge"), U32),
    }


_SMOLVLM = ProjectorFamily(
    classes=("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
    encoders=("smolvlm_vision", "idefics3_vision", "idefics3"),
    kind="idefics3",
    roots=("vision_model.", "connector."),
    layer=_SIGLIP_LAYER,
    layer_prefix="vision_model.encoder.layers.{i}.",
    outside={
        **_siglip("vision_model."),
        "mm.model.fc": Part("connector.modality_projection.proj", ("text", "merged")),
    },
    types=_SIGLIP_TYPES,
    sizes=lambda config, sizes: {**_patches(config, sizes), **_merged(sizes, _scale(config))},
    keys=_smolvlm_keys,
    vision={**_SIGLIP_DEFAULTS, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
    defaults={"scale_factor": 2},
    activations=_GELU,
    example="HuggingFaceTB/SmolVLM-Instruct",
)


# --- Gemma 4 ------------------------------------------------------------------------------------------------------


def _standardizes(config: Config) -> bool:
    return bool(config["vision"]["standardize"])


def _clippable(source: str, rows: str, columns: str) -> Part:
    return Part(f"{source}.linear", (rows, columns))


def _gemma4_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    """Return further dimensions; refuse what ``gemma4v.cpp`` assumes otherwise."""
    vision, heads = config["vision"], sizes["heads"]
    assumed = {
        "num_key_value_heads": heads,
        "head_dim": sizes["embd"] // heads,
        "pooling_kernel_size": 3,
        "use_clipped_linears": False,
        "attention_bias": False,
    }
    for key, wanted in assumed.items():
        if vision[key] != wanted:
            raise UnsupportedError(f"config.json: vision_config.{key} {vision[key]!r}: supported is {wanted!r}")
    if config.get("audio_config") is not None:
        raise UnsupportedError("config.json: audio_config: the file needs an audio encoder, which is not converted")
    positions = positive(vision["position_embedding_size"], "config.json: vision_config.position_embedding_size")
    pixels = sizes["patch"] ** 2 * sizes["channels"]
    image = 224  # llama.cpp demands a size and resizes by its own rule
    return {"two": 2, "positions": positions, "pixels": pixels, "head": sizes["embd"] // heads, "image": image}


_GEMMA4 = ProjectorFamily(
    classes=("Gemma4ForConditionalGeneration",),
    encoders=("gemma4_vision",),
    kind="gemma4v",
    kind_key="clip.vision.projector_type",
    roots=("vision_tower.", "embed_vision."),
    layer={
        "ln1": Part("input_layernorm", ("embd",)),
        "attn_q": _clippable("self_attn.q_proj", "embd", "embd"),
        "attn_k": _clippable("self_attn.k_proj", "embd", "embd"),
        "attn_v": _clippable("self_attn.v_proj", "embd", "embd"),
        "attn_q_norm": Part("self_attn.q_norm", ("head",)),
        "attn_k_norm": Part("self_attn.k_norm", ("head",)),
        "attn_out": _clippable("self_attn.o_proj", "embd", "embd"),
        "attn_post_norm": Part("post_attention_layernorm", ("embd",)),
        "ln2": Part("pre_feedforward_layernorm", ("embd",)),
        "ffn_gate": _clippable("mlp.gate_proj", "ff", "embd"),
        "ffn_up": _clippable("mlp.up_proj", "ff", "embd"),
        "ffn_down": _clippable("mlp.down_proj", "embd", "ff"),
        "ffn_post_norm": Part("post_feedforward_layernorm", ("embd",)),
    },
    layer_prefix="vision_tower.encoder.layers.{i}.",
    outside={
        "v.patch_embd": Part("vision_tower.patch_embedder.input_proj", ("embd", "pixels")),
        "v.position_embd": Part(
            "vision_tower.patch_embedder.position_embedding_table", ("two", "positions", "embd"), suffix=""
        ),
        "v.std_bias": Part("vision_tower.std_bias", ("embd",), suffix="", bare=True, when=_standardizes),
        "v.std_scale": Part("vision_tower.std_scale", ("embd",), suffix="", bare=True, when=_standardizes),
        "mm.input_projection": Part("embed_vision.embedding_projection", ("text", "embd")),
    },
    unfolded=("v.patch_embd",),
    sizes=_gemma4_sizes,
    keys=lambda config, _: eps_key(config["vision"]["rms_norm_eps"]),
    vision={
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64, "num_channels": 3, "patch_size": 16, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "pooling_kernel_size": 3, "position_embedding_size": 10240,
        "use_clipped_linears": False, "standardize": False, "attention_bias": False,
    },
    activations=("gelu_pytorch_tanh",),
    example="google/gemma-4-31B-it",
)  # fmt: skip


# --- Pixtral: its encoder in LLaVA's class, and Mistral 3 ---------------------------------------------------------

_PIXTRAL_LAYER: Parts = {
    "ln1": Part("attention_norm", ("embd",)),
    "attn_q": Part("attention.q_proj", ("embd", "embd"), order="rope_vision"),
    "attn_k": Part("attention.k_proj", ("embd", "embd"), order="rope_vision"),
    "attn_v": Part("attention.v_proj", ("embd", "embd")),
    "attn_out": Part("attention.o_proj", ("embd", "embd")),
    "ln2": Part("ffn_norm", ("embd",)),
    "ffn_gate": Part("feed_forward.gate_proj", ("ff", "embd")),
    "ffn_up": Part("feed_forward.up_proj", ("ff", "embd")),
    "ffn_down": Part("feed_forward.down_proj", ("embd", "ff")),
}
_BREAK = Part("language_model.model.embed_tokens", ("text",), stored=("vocab", "text"), order="token", bare=True)


def _pixtral_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    if sizes["embd"] % (2 * sizes["heads"]):
        raise ModelError(
            f"config.json: vision_config: {sizes['heads']} heads do not share {sizes['embd']} channels in pairs"
        )
    vocab = config["text"].get("vocab_size", config.get("vocab_size"))
    return {"vocab": positive(vocab, "config.json: vocab_size")}


def _merge(config: Config) -> int:
    return positive(config["spatial_merge_size"], "config.json: spatial_merge_size")


def _pixtral_keys(config: Config, _: Sizes) -> Keys:
    keys = {**_layer_norm_eps(config), f"clip.use_{config['vision']['hidden_act']}": kv(True, BOOL)}
    if "spatial_merge_size" in config:
        keys["clip.vision.spatial_merge_size"] = kv(_merge(config), U32)
    return keys


_PIXTRAL = ProjectorFamily(
    classes=("LlavaForConditionalGeneration",),
    encoders=("pixtral",),
    kind="pixtral",
    roots=("vision_tower.", "multi_modal_projector."),
    layer=_PIXTRAL_LAYER,
    layer_prefix="vision_tower.transformer.layers.{i}.",
    outside={
        "v.patch_embd": Part("vision_tower.patch_conv", _PATCH),
        "v.pre_ln": Part("vision_tower.ln_pre", ("embd",)),
        "mm.1": Part("multi_modal_projector.linear_1", ("text", "embd"), bias=flag("multimodal_projector_bias")),
        "mm.2": Part("multi_modal_projector.linear_2", ("text", "text"), bias=flag("multimodal_projector_bias")),
        "v.token_embd.img_break": replace(
            _BREAK, also=tuple(replace(_BREAK, source=name) for name in ("language_model.embed_tokens", "embed_tokens"))
        ),
    },
    sizes=_pixtral_sizes,
    keys=_pixtral_keys,
    vision={
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_channels": 3, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,  # fixed in transformers' class
    },
    defaults={"multimodal_projector_bias": True},
    activations=("silu", "gelu"),
    fixed={"vision_feature_layer": -1},
    token="[IMG_BREAK]",  # between the rows of an image
    example="mistral-community/pixtral-12b",
)  # fmt: skip

_MISTRAL3 = replace(
    _PIXTRAL,
    classes=("Mistral3ForConditionalGeneration",),
    outside={
        **_PIXTRAL.outside,
        "mm.input_norm": Part("multi_modal_projector.norm", ("embd",)),
        "mm.patch_merger": Part("multi_modal_projector.patch_merger.merging_layer", ("embd", "merged")),
    },
    sizes=lambda config, sizes: {**_pixtral_sizes(config, sizes), **_merged(sizes, _merge(config))},
    defaults={"multimodal_projector_bias": False, "spatial_merge_size": 2},
    example="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
)


# --- CLIP: LLaVA 1.5 ----------------------------------------------------------------------------------------------


def _feature_layer(config: Config) -> int:
    """Return the number of layers up to the one whose output the projector reads."""
    layer, n_layers = config["vision_feature_layer"], config["vision"]["num_hidden_layers"]
    n_layers = positive(n_layers, "config.json: vision_config.num_hidden_layers")
    if type(layer) is not int or not -n_layers <= layer <= n_layers or layer in (0, -n_layers - 1):
        raise UnsupportedError(f"config.json: vision_feature_layer {layer!r}: llama.cpp supports one layer from 1 up")
    return layer if layer > 0 else n_layers + 1 + layer


def _unread_layers(config: Config, sizes: Sizes) -> tuple[str, ...]:
    """Return patterns of what follows the layer that the projector reads."""
    beyond = range(sizes["layers"], config["vision"]["num_hidden_layers"])
    layers = (rf"vision_tower\.encoder\.layers\.{i}\..*" for i in beyond)
    return (r"vision_tower\.post_layernorm\..*", r"vision_tower\.embeddings\.position_ids", *layers)


def _clip_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"layers": _feature_layer(config), "positions": _patches(config, sizes)["patches"] + 1}


def _clip_keys(config: Config, sizes: Sizes) -> Keys:
    return {
        **_layer_norm_eps(config),
        "clip.use_gelu": kv(config["vision"]["hidden_act"] != "quick_gelu", BOOL),
        "clip.vision.feature_layer": kv([sizes["layers"]], ARRAY, INT32),
    }


_CLIP = replace(
    _GEMMA3,
    classes=("LlavaForConditionalGeneration",),
    encoders=("clip_vision_model",),
    kind="mlp",
    outside={
        "v.class_embd": Part("vision_tower.embeddings.class_embedding", ("embd",), suffix="", bare=True),
        "v.patch_embd": Part("vision_tower.embeddings.patch_embedding", _PATCH),
        "v.position_embd": Part("vision_tower.embeddings.position_embedding", ("positions", "embd")),
        "v.pre_ln": _norm("vision_tower.pre_layrnorm"),
        "mm.0": Part("multi_modal_projector.linear_1", ("text", "embd"), bias=flag("multimodal_projector_bias")),
        "mm.2": Part("multi_modal_projector.linear_2", ("text", "text"), bias=flag("multimodal_projector_bias")),
    },
    types={},
    sizes=_clip_sizes,
    keys=_clip_keys,
    vision={**_SIGLIP_DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    defaults={"multimodal_projector_bias": True, "vision_feature_layer": -2},
    activations=("quick_gelu", "gelu"),
    fixed={"vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"},
    ignored=_unread_layers,
    example="llava-hf/llava-1.5-7b-hf",
)  # fmt: skip


# --- Qwen VL ------------------------------------------------------------------------------------------------------

_QWEN_DEFAULTS = {"num_heads": 16, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _part_of_qkv(which: str) -> Part:
    return Part("attn.qkv", ("embd", "embd"), order=f"vision_{which}", stored=("3embd", "embd"), bias=always)


def _frame(which: int, bare: bool = False) -> Part:
    """Return the convolution over one of the two frames that Qwen's encoders read together."""
    stored = ("embd", "channels", "frames", "patch", "patch")
    return Part("visual.patch_embed.proj", _PATCH, order=f"frame_{which}", stored=stored, bare=bare)


def _qwen_merge(config: Config) -> int:
    return positive(config["vision"]["spatial_merge_size"], "config.json: vision_config.spatial_merge_size")


def _qwen_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    frames = config["vision"]["temporal_patch_size"]
    if frames != 2:
        raise UnsupportedError(f"config.json: vision_config.temporal_patch_size {frames!r}: llama.cpp supports 2 only")
    return {"frames": 2, "3embd": 3 * sizes["embd"], **_merged(sizes, _qwen_merge(config))}


def _qwen25_keys(config: Config, _: Sizes) -> Keys:
    full = config["vision"]["fullatt_block_indexes"]
    if not isinstance(full, list) or not full or full != [(i + 1) * (full[0] + 1) - 1 for i in range(len(full))]:
        raise UnsupportedError(
            f"config.json: vision_config.fullatt_block_indexes {full!r}: llama.cpp supports every n-th layer only"
        )
    return {
        "clip.use_silu": kv(True, BOOL),
        "clip.vision.n_wa_pattern": kv(positive(full[0] + 1, "fullatt_block_indexes"), U32),
        **eps_key(1e-6),  # fixed in transformers' class
    }


_QWEN25 = ProjectorFamily(
    classes=("Qwen2_5_VLForConditionalGeneration",),
    encoders=("qwen2_5_vl", "qwen2_5_vl_vision"),
    kind="qwen2.5vl_merger",
    roots=("visual.",),
    layer={
        "ln1": Part("norm1", ("embd",)),
        "attn_q": _part_of_qkv("q"),
        "attn_k": _part_of_qkv("k"),
        "attn_v": _part_of_qkv("v"),
        "attn_out": _linear("attn.proj", "embd", "embd"),
        "ln2": Part("norm2", ("embd",)),
        "ffn_gate": _linear("mlp.gate_proj", "ff", "embd"),
        "ffn_up": _linear("mlp.up_proj", "ff", "embd"),
        "ffn_down": _linear("mlp.down_proj", "embd", "ff"),
    },
    layer_prefix="visual.blocks.{i}.",
    outside={
        "v.patch_embd": _frame(0),
        "v.patch_embd.weight.1": _frame(1, bare=True),
        "v.post_ln": Part("visual.merger.ln_q", ("embd",)),
        "mm.0": _linear("visual.merger.mlp.0", "merged", "merged"),
        "mm.2": _linear("visual.merger.mlp.2", "text", "merged"),
    },
    sizes=_qwen_sizes,
    keys=_qwen25_keys,
    vision={
        **_QWEN_DEFAULTS, "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "patch_size": 14,
        "hidden_act": "silu", "fullatt_block_indexes": [7, 15, 23, 31],
        "image_size": 560,  # llama.cpp demands one and resizes by its own rule
    },
    activations=("silu",),
    example="Qwen/Qwen2.5-VL-3B-Instruct",
)  # fmt: skip


def _deepstack(config: Config) -> list[int]:
    """Return the layers whose output the language model gets too."""
    found = config["vision"]["deepstack_visual_indexes"]
    n_layers = positive(config["vision"]["depth"], "config.json: vision_config.depth")
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i < n_layers for i in found):
        raise ModelError(f"config.json: vision_config.deepstack_visual_indexes: wanted layers, got {found!r}")
    return found


def _deepstack_parts(config: Config) -> Parts:
    parts: Parts = {}
    for i, layer in enumerate(_deepstack(config)):
        source = f"visual.deepstack_merger_list.{i}."
        parts[f"v.deepstack.{layer}.norm"] = _norm(f"{source}norm", "merged")
        parts[f"v.deepstack.{layer}.fc1"] = _linear(f"{source}linear_fc1", "merged", "merged")
        parts[f"v.deepstack.{layer}.fc2"] = _linear(f"{source}linear_fc2", "text", "merged")
    return parts


def _qwen3_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    vision = config["vision"]
    patches = positive(vision["num_position_embeddings"], "config.json: vision_config.num_position_embeddings")
    image = vision.get("image_size", int(patches**0.5 * sizes["patch"]))
    return {**_qwen_sizes(config, sizes), "patches": patches, "image": positive(image, "vision_config.image_size")}


def _qwen3_keys(config: Config, sizes: Sizes) -> Keys:
    deep = _deepstack(config)
    return {
        **_USE_GELU,
        "clip.vision.spatial_merge_size": kv(_qwen_merge(config), U32),
        **eps_key(number(config["text"].get("rms_norm_eps", 1e-6), "config.json: text_config.rms_norm_eps")),
        "clip.vision.is_deepstack_layers": kv([i in deep for i in range(sizes["layers"])], ARRAY, BOOL),
    }


_QWEN3 = ProjectorFamily(
    classes=("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
    encoders=("qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_vl_moe_vision"),
    kind="qwen3vl_merger",
    roots=("visual.",),
    layer={
        "ln1": _norm("norm1"),
        "attn_qkv": _linear("attn.qkv", "3embd", "embd"),
        "attn_out": _linear("attn.proj", "embd", "embd"),
        "ln2": _norm("norm2"),
        "ffn_up": _linear("mlp.linear_fc1", "ff", "embd"),
        "ffn_down": _linear("mlp.linear_fc2", "embd", "ff"),
    },
    layer_prefix="visual.blocks.{i}.",
    outside={
        "v.patch_embd": _frame(0),
        "v.patch_embd.weight.1": _frame(1, bare=True),
        "v.patch_embd.bias": Part("visual.patch_embed.proj", ("embd",), suffix=".bias", bare=True),
        "v.position_embd": Part("visual.pos_embed", ("patches", "embd")),
        "v.post_ln": _norm("visual.merger.norm"),
        "mm.0": _linear("visual.merger.linear_fc1", "merged", "merged"),
        "mm.2": _linear("visual.merger.linear_fc2", "text", "merged"),
    },
    more=_deepstack_parts,
    sizes=_qwen3_sizes,
    keys=_qwen3_keys,
    vision={
        **_QWEN_DEFAULTS, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
    activations=_GELU,
    example="Qwen/Qwen3-VL-4B-Instruct",
)  # fmt: skip

_QWEN35 = replace(
    _QWEN3,
    classes=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    encoders=("qwen3_5", "qwen3_5_vision", "qwen3_5_moe", "qwen3_5_moe_vision"),
    vision={**_QWEN3.vision, "deepstack_visual_indexes": []},
    example="Qwen/Qwen3.5-9B",
)

PROJECTORS = (_GEMMA3, _GEMMA4, _SMOLVLM, _CLIP, _PIXTRAL, _MISTRAL3, _QWEN25, _QWEN3, _QWEN35)


def projector_classes() -> tuple[str, ...]:
    """Return every checkpoint class whose vision part converts."""
    return tuple(dict.fromkeys(name for family in PROJECTORS for name in family.classes))


def find_projector(class_name: str, encoder: str | None) -> ProjectorFamily:
    """Return the projector of a checkpoint class and the ``model_type`` of its encoder.

    Raises ``UnsupportedError`` for a class or an encoder that is not in the table.
    """
    found = [family for family in PROJECTORS if class_name in family.classes]
    if not found:
        raise UnsupportedError(
            f"config.json: no projector is known for {class_name}; known: {', '.join(projector_classes())}"
        )
    for family in found:
        if encoder is None or encoder in family.encoders:
            return family
    known = ", ".join(name for family in found for name in family.encoders)
    raise UnsupportedError(f"config.json: {class_name} with a vision encoder of type {encoder!r}; known: {known}")
