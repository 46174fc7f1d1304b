"""What transformers makes of a model of the zoo: the files that it saves, and the logits that it computes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import Shape, ZooSpec

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Keys of transformers 4 for what transformers 5 keeps in rope_parameters, where they are not called the same.
_OLD_ROPE_KEYS = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


@dataclass(frozen=True)
class Saved:
    """What a folder holds: config.json, and the shapes of the tensors by name."""

    config: dict[str, Any]
    shapes: dict[str, Shape]


@dataclass(frozen=True)
class Forward:
    """A run over one sequence.

    Attributes:
        logits: ``(n_tokens, n_vocab)`` float32.
        entropy: mean entropy of the attention, as a part of the uniform attention's; 0 without attention.
        margin: smallest distance of the last expert chosen to the first one not, as a part of the router's largest
            output; infinite without experts.
        unexpected: names that the weights lack or have too many.
    """

    logits: NDArray[np.float32]
    entropy: float
    margin: float
    unexpected: tuple[str, ...]


def saved(spec: ZooSpec) -> Saved:
    """Return what the folder of a spec must hold."""
    config, shapes = _saved_by_transformers(spec)
    if spec.form == 4:
        config = _old_form(config)
    if spec.source_class == "InternLM2ForCausalLM":
        config |= {"model_type": "internlm2", "bias": False}
        shapes = _internlm2_shapes(config)
    config |= {"architectures": [spec.source_class]} | spec.edits
    config = {key: value for key, value in config.items() if key not in spec.edits or value is not None}
    kept = {name: shape for name, shape in shapes.items() if not re.fullmatch(spec.omitted, name)}
    for pattern, other in spec.names.items():
        kept = {re.sub(pattern, other, name): shape for name, shape in kept.items()}
    kept = {
        name: (*shape[:-2], shape[-1], shape[-2]) if re.fullmatch(spec.turned, name) else shape
        for name, shape in kept.items()
    }
    return Saved(dict(sorted(config.items())), kept | dict(spec.extras))


def _saved_by_transformers(spec: ZooSpec) -> tuple[dict[str, Any], dict[str, Shape]]:
    model_class = _model_class(spec)
    settings = deepcopy(dict(spec.settings))  # config classes write into what they are given
    model = model_class(model_class.config_class(**settings)).to(_DTYPES[spec.dtype])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return config, shapes


def _model_class(spec: ZooSpec) -> Any:
    return getattr(transformers, spec.stand_in or spec.source_class)


def _old_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as transformers 4 writes it: settings of rope at the top, ``torch_dtype``."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    old |= {"torch_dtype": config["dtype"], "transformers_version": "4.46.0"}
    if "rope_parameters" not in config:
        return old
    rope = dict(config["rope_parameters"])
    if "full_attention" in rope:
        if old["model_type"] == "gemma3_text":
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    names = _OLD_ROPE_KEYS.get(old["model_type"], {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            old[names.get(key, key)] = rope.pop(key)
    if rope["rope_type"] == "longrope":  # Phi 3.5 says type, and has the original context at the top only
        rope = {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    return old


def reads_alike(spec: ZooSpec, folder: Path) -> bool:
    """Return whether transformers reads a folder's config.json, in its older form, as what it would save today."""
    read = json.loads(_model_class(spec).config_class.from_pretrained(folder).to_json_string())
    today = _saved_by_transformers(spec)[0]
    return _meaning(read) == _meaning(today)


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without what says nothing, or says it again."""
    said_elsewhere = {"transformers_version", "architectures", "partial_rotary_factor", "n_ctx"}
    said_elsewhere |= {"sliding_window_pattern", "_sliding_window_pattern"}
    meant = {key: value for key, value in config.items() if key not in said_elsewhere}
    if "rope_parameters" in meant:
        meant["rope_parameters"] = {key: value for key, value in meant["rope_parameters"].items() if key != "type"}
    return meant


def forward(spec: ZooSpec, folder: Path, tokens: list[int]) -> Forward:
    """Run a folder in float32 with eager attention."""
    with _folder_of_stand_in(spec, folder) if spec.stand_in else nullcontext(folder) as readable:
        model, loading = _model_class(spec).from_pretrained(
            readable, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    with torch.no_grad():
        output = model.eval()(torch.tensor([tokens]), **_options(model.config))
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[key]]
    return Forward(
        logits=output.logits[0].float().numpy(),
        entropy=_entropy(getattr(output, "attentions", None) or ()),
        margin=_margin(getattr(output, "router_logits", None) or (), model.config),
        unexpected=tuple(str(name) for name in wrong if not re.fullmatch(spec.omitted, str(name))),
    )


def _options(config: Any) -> dict[str, bool]:
    """Return what to ask of a model beside its logits: the attention and the routers' outputs, where it has them."""
    asked = {
        "output_attentions": hasattr(config, "num_attention_heads") or hasattr(config, "text_config"),
        "output_router_logits": hasattr(config, "output_router_logits") and getattr(config, "num_local_experts", 1) > 0,
    }
    return {option: True for option, has in asked.items() if has}


def _entropy(attentions: tuple[torch.Tensor | None, ...]) -> float:
    layers = [layer[0].double().numpy() for layer in attentions if layer is not None]
    if not layers:
        return 0.0
    attention = np.stack(layers)  # layer, head, query, key
    logarithms = np.log(attention, out=np.zeros_like(attention), where=attention > 0)
    entropy = -(attention * logarithms).sum(axis=-1).mean(axis=(0, 1))
    return float(entropy.sum() / np.log(np.arange(1, attention.shape[-1] + 1)).sum())


def _margin(router_logits: tuple[torch.Tensor, ...], config: Any) -> float:
    margin = float("inf")
    if hasattr(config, "topk_group"):  # DeepSeek chooses among groups, by other numbers
        return margin
    for layer in router_logits:
        rows = np.sort(layer.double().numpy(), axis=1)[:, ::-1]
        chosen = config.num_experts_per_tok
        margin = min(margin, float((rows[:, chosen - 1] - rows[:, chosen]).min() / np.abs(rows).max()))
    return margin


@contextmanager
def _folder_of_stand_in(spec: ZooSpec, folder: Path) -> Iterator[Path]:
    """Give the folder of the class that stands in: its own config.json, and the same weights under its names."""
    config, _ = _saved_by_transformers(spec)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    if spec.source_class == "InternLM2ForCausalLM":
        weights = _internlm2_as_llama(weights, config)
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary)
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield other


# InternLM 2's own code is on the hub only (modeling_internlm2.py of internlm/internlm2-7b): a Llama with other names,
# whose wqkv holds for each key/value head the queries' heads that share it, its key, its value.
_INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "model.tok_embeddings": "model.embed_tokens",
}


def _internlm2_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    d, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = d // config["num_attention_heads"]
    layer = {
        "attention.wqkv.weight": (d + 2 * config["num_key_value_heads"] * head_dim, d),
        "attention.wo.weight": (d, d),
        "feed_forward.w1.weight": (n_ff, d),
        "feed_forward.w2.weight": (d, n_ff),
        "feed_forward.w3.weight": (n_ff, d),
        "attention_norm.weight": (d,),
        "ffn_norm.weight": (d,),
    }
    layers = range(config["num_hidden_layers"])
    shapes: dict[str, Shape] = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    return shapes | {
        "model.tok_embeddings.weight": (n_vocab, d), "model.norm.weight": (d,), "output.weight": (n_vocab, d),
    }  # fmt: skip


def _internlm2_as_llama(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    llama = {}
    for name, tensor in weights.items():
        if ".wqkv." in name:
            groups = tensor.reshape(n_kv_heads, n_heads // n_kv_heads + 2, -1, tensor.shape[1])
            for part, rows in {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}.items():
                other = name.replace("attention.wqkv", f"self_attn.{part}_proj")
                llama[other] = rows.reshape(-1, tensor.shape[1]).contiguous()
            continue
        for old, new in _INTERNLM2_NAMES.items():
            name = name.replace(old, new)
        llama["lm_head.weight" if name == "output.weight" else name] = tensor
    return llama
