"""Names that others have put around a model's own, classes renamed, experts in one tensor: the same model all the same.

Every case is compared with the donor: keys, tensors to the bit, and the identity that goes into plans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import safetensors_bytes
from zoo import zoo_shapes, zoo_weights
from zoo_specs import SPECS, write_spec

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import open_model
from nsds_gguf.read.architectures.classes import MODEL_TYPES
from nsds_gguf.read.architectures.families import find_family, supported_classes
from nsds_gguf.read.architectures.rope import rope_settings
from nsds_gguf.read.config import canonical
from nsds_gguf.records import Model

Weights = dict[str, np.ndarray]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def saved(folder: Path, name: str, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """Write the folder of a spec with changed weights and settings (``...`` takes one out)."""
    path = write_spec(folder / "model", name)
    settings = {**json.loads((path / "config.json").read_text()), **config}
    (path / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    weights = change(load_file(path / "model.safetensors"))
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, path / "model.safetensors")
    return path


def check_same(model: Model, donor: Model) -> None:
    """Assert that two models are one: all keys, tensors in their order, every number, the identity."""
    assert model.metadata == donor.metadata
    assert [(t.name, t.shape, t.dtype) for t in model.tensors] == [(t.name, t.shape, t.dtype) for t in donor.tensors]
    assert all(np.array_equal(a.load(), b.load()) for a, b in zip(model.tensors, donor.tensors, strict=True))
    for tensor, other in zip(model.tensors, donor.tensors, strict=True):
        n = tensor.n_rows
        assert np.array_equal(tensor.rows(slice(n // 3, n // 3 + 2)), other.rows(slice(n // 3, n // 3 + 2)))
    assert model.model_id == donor.model_id


def each(rename: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {rename(name): value for name, value in weights.items()}


def before(prefix: str) -> Callable[[Weights], Weights]:
    return each(lambda name: prefix + name)


def within(pattern: str, replacement: str) -> Callable[[Weights], Weights]:
    return each(lambda name: re.sub(pattern, replacement, name))


RENAMED = {
    "torch.compile": (before("_orig_mod."), "`_orig_mod.` is removed from the names of 21 tensors."),
    "DDP": (before("module."), "`module.` is removed from the names of 21 tensors."),
    "PEFT": (before("base_model.model."), "`base_model.model.` is removed from the names of 21 tensors."),
    "both": (before("module._orig_mod."), "`module._orig_mod.` is removed from the names of 21 tensors."),
    "FSDP around layers": (
        within(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module."),
        "`_fsdp_wrapped_module.` is removed from the names of 18 tensors.",
    ),
    "checkpointed layers": (
        within(r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module."),
        "`_checkpoint_wrapped_module.` is removed from the names of 18 tensors.",
    ),
    "PEFT's base layers": (
        within(r"(q_proj|v_proj)\.", r"\1.base_layer."),
        "`base_layer.` is removed from the names of 4 tensors.",
    ),
    "a trainer's own": (before("policy.net."), "`policy.net.` is removed from the names of 21 tensors."),
    "model twice": (before("model."), "`model.` is removed from the names of 21 tensors."),
    "model twice, the head once": (
        within(r"^model\.", "model.model."),
        "`model.model.` at the beginning of names is read as `model.`.",
    ),
    "bare": (within(r"^model\.", ""), ""),
    "GPT's word": (
        within(r"^model\.", "transformer."),
        "`transformer.` at the beginning of names is read as `model.`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rename", "note"), RENAMED.values(), ids=RENAMED)
def test_what_stands_around_names_is_taken_off(tmp_path, rename, note):
    model = open_model(saved(tmp_path / "a", "llama", rename))
    check_same(model, open_model(write_spec(tmp_path / "b" / "model", "llama")))
    assert model.notes == ((note,) if note else ())


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "internlm2-4", "mamba", "deepseek3", "granite4-h-tiny", "olmo"])
def test_wrappers_of_other_families(tmp_path, name):
    model = open_model(saved(tmp_path / "a", name, before("module.")))
    check_same(model, open_model(write_spec(tmp_path / "b" / "model", name)))
    assert model.notes[-1].startswith("`module.` is removed from the names of ")


def test_two_models_in_one_file_are_not_guessed(tmp_path):
    def both(weights: Weights) -> Weights:
        return weights | {f"ema.{name}": value for name, value in weights.items()}

    with pytest.raises(UnsupportedError, match=r"has no place for: ema\."):
        open_model(saved(tmp_path, "llama", both))
    with pytest.raises(UnsupportedError, match=r"has no place for: "):
        open_model(saved(tmp_path / "b", "llama", lambda w: before("a.")(w) | before("b.")(w)))


# Tied embeddings


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("llama-tied-mha-bf16-4", EMBEDDING), ("gemma3", EMBEDDING), ("gpt2", "transformer.wte.weight"),
        ("smollm3", EMBEDDING), ("mamba", "backbone.embeddings.weight"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "net."])
def test_a_tied_model_under_the_name_of_its_head(tmp_path, name, embedding, prefix):
    donor = write_spec(tmp_path / "b" / "model", name)
    path = write_spec(tmp_path / "a" / "model", name)
    raw = zoo_weights(SPECS[name], zoo_shapes(name))
    renamed = {prefix + (HEAD if key == embedding else key): value for key, value in raw.items()}
    (path / "model.safetensors").write_bytes(safetensors_bytes(renamed))
    model = open_model(path)
    check_same(model, open_model(donor))
    assert f"The embedding is read from {prefix}{HEAD}, to which config.json ties it." in model.notes


def test_an_untied_model_is_not_read_from_its_head(tmp_path):
    def headless(weights: Weights) -> Weights:
        return {name: value for name, value in weights.items() if name != EMBEDDING}

    with pytest.raises(ModelError, match=r"tensors missing from the weights: model\.embed_tokens\.weight"):
        open_model(saved(tmp_path, "llama", headless))


# Experts in one tensor


def groups(weights: Weights, pattern: str) -> dict[str, list[np.ndarray]]:
    """Return the experts' matrices by what their names have in common, ``{prefix}{projection}``."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, value in weights.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(f"{match[1]}|{match[3]}", {})[int(match[2])] = value
    return {key: [part[i] for i in range(len(part))] for key, part in found.items()}


_ONE_BY_ONE = r"(.*\.)experts\.(\d+)\.(\w+)\.weight"
_PLACES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def fused(weights: Weights) -> Weights:
    """Stack experts as transformers 5 keeps them; Mixtral's block has another name then."""
    stacks = {key: np.stack(parts) for key, parts in groups(weights, _ONE_BY_ONE).items()}
    found = {name: value for name, value in weights.items() if not re.fullmatch(_ONE_BY_ONE, name)}
    for block in {key.split("|")[0] for key in stacks}:
        places = [place for of, place in map(_parts, stacks) if of == block]
        named = {_PLACES.get(place, place): stacks[f"{block}|{place}"] for place in places}
        found[f"{block}experts.gate_up_proj"] = np.concatenate([named["gate_proj"], named["up_proj"]], axis=1)
        found[f"{block}experts.down_proj"] = named["down_proj"]
    return {name.replace("block_sparse_moe", "mlp"): value for name, value in found.items()}


def mlx(weights: Weights) -> Weights:
    """Stack experts as MLX does."""
    found = {name: value for name, value in weights.items() if not re.fullmatch(_ONE_BY_ONE, name)}
    for key, parts in groups(weights, _ONE_BY_ONE).items():
        block, place = _parts(key)
        found[f"{block}switch_mlp.{_PLACES.get(place, place)}.weight"] = np.stack(parts)
    return found


def _parts(key: str) -> tuple[str, str]:
    block, place = key.split("|")
    return block, place


def granite_fused(weights: Weights) -> Weights:
    """Name Granite's experts as transformers 5 does."""
    names = {
        "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
    }
    return {re.sub(r"block_sparse_moe\..*", lambda m: names[m[0]], name): value for name, value in weights.items()}


def granite_mlx(weights: Weights) -> Weights:
    found = {}
    for name, value in weights.items():
        block, _, rest = name.partition("block_sparse_moe.")
        if rest == "input_linear.weight":
            half = value.shape[1] // 2
            found[f"{block}block_sparse_moe.switch_mlp.gate_proj.weight"] = value[:, :half]
            found[f"{block}block_sparse_moe.switch_mlp.up_proj.weight"] = value[:, half:]
        else:
            found[name.replace("moe.output_linear", "moe.switch_mlp.down_proj")] = value
    return found


_EXPERTS = ("mixtral", "qwen2moe", "qwen3moe", "olmoe", "deepseek2", "deepseek3")
_GRANITES = ("granitemoe", "granitemoe-shared", "granite4-h-tiny")


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, form) for name in _EXPERTS for form in (fused, mlx)),
     *((name, form) for name in _GRANITES for form in (granite_fused, granite_mlx))],
)  # fmt: skip
def test_experts_in_one_tensor(tmp_path, name, form):
    path = saved(tmp_path / "a", name, form)
    assert any(re.search("gate_up_proj|switch_mlp", key) for key in load_file(path / "model.safetensors"))
    donor = open_model(write_spec(tmp_path / "b" / "model", name))
    model = open_model(path)
    check_same(model, donor)
    assert model.notes == donor.notes


def test_the_head_of_gpt_neox_under_its_new_name(tmp_path):
    path = saved(tmp_path / "a", "gpt-neox", within("^embed_out", "lm_head"))
    check_same(open_model(path), open_model(write_spec(tmp_path / "b" / "model", "gpt-neox")))


def test_convolutions_as_mlx_has_them(tmp_path):
    def turned(weights: Weights) -> Weights:
        return {name: value.swapaxes(1, 2) if "conv1d.weight" in name else value for name, value in weights.items()}

    donor = open_model(write_spec(tmp_path / "b" / "model", "mamba"))
    check_same(open_model(saved(tmp_path / "a", "mamba", turned)), donor)


# Classes

CLASSES = {
    "no class": ({"architectures": ...}, "config.json names no class; its model_type qwen3 is Qwen3ForCausalLM."),
    "null": ({"architectures": None}, "config.json names no class; its model_type qwen3 is Qwen3ForCausalLM."),
    "FSDP": (
        {"architectures": ["FSDPQwen3ForCausalLM"]},
        "config.json's class FSDPQwen3ForCausalLM is read as Qwen3ForCausalLM.",
    ),
    "torch.compile": (
        {"architectures": ["OptimizedModule"]}, "config.json's class OptimizedModule is read as Qwen3ForCausalLM."
    ),
    "PEFT": (
        {"architectures": ["PeftModelForCausalLM"]},
        "config.json's class PeftModelForCausalLM is read as Qwen3ForCausalLM.",
    ),
    "without its head": (
        {"architectures": ["Qwen3Model"]}, "config.json's class Qwen3Model is read as Qwen3ForCausalLM."
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "note"), CLASSES.values(), ids=CLASSES)
def test_classes_that_are_meant(tmp_path, config, note):
    name = "qwen3-tied-mha-bf16-4"
    path = write_spec(tmp_path / "a" / "model", name)
    settings = {**json.loads((path / "config.json").read_text()), **config}
    (path / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    model, donor = open_model(path), open_model(write_spec(tmp_path / "b" / "model", name))
    check_same(model, donor)
    assert (model.source_class, model.notes) == ("Qwen3ForCausalLM", (note,))


@pytest.mark.parametrize("name", ["Qwen3ForSequenceClassification", "MyQwen3ForCausalLM", "FSDPQwen9ForCausalLM"])
def test_classes_that_are_not_guessed(tmp_path, name):
    with pytest.raises(UnsupportedError, match=f"class {name} is not supported"):
        open_model(saved(tmp_path, "qwen3", lambda weights: weights, architectures=[name]))


def test_the_table_of_types_names_supported_classes() -> None:
    assert set(MODEL_TYPES.values()) <= set(supported_classes())


# Settings that a config.json leaves out

DEFAULTS: Mapping[str, Any] = json.loads((Path(__file__).parent / "golden" / "defaults.json").read_text())


@pytest.mark.parametrize("name", DEFAULTS)
def test_silent_settings_are_those_of_the_class(name):
    """``tools/check/check_defaults.py`` has recorded transformers'."""
    family = find_family(name)
    for case in DEFAULTS[name]:
        settings = canonical(case["given"], family)
        rope = rope_settings(settings, family.defaults) if family.rope_kinds else {}
        ours = {**settings, "local_theta": rope.get("rope_theta"), "partial_rotary_factor": 1.0, **rope}
        ours.setdefault("num_key_value_heads", ours.get("num_attention_heads"))
        wanted = case["wanted"]
        assert {key: ours.get(key) or 0 for key in wanted} == {key: value or 0 for key, value in wanted.items()}


@pytest.mark.parametrize("given", [{}, {"model_type": ...}])
def test_a_text_config_that_says_little(tmp_path, given):
    """Llava 1.5 names context, epsilon and vocabulary of its language model; the rest is Llama's."""
    path = write_spec(tmp_path / "model", "llava")
    config = json.loads((path / "config.json").read_text())
    text = {**config["text_config"], **given}
    for key in ("num_key_value_heads", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        text.pop(key, None)
    wanted = text.get("num_attention_heads")
    text = {key: value for key, value in text.items() if value is not ...}
    (path / "config.json").write_text(json.dumps({**config, "text_config": text}))
    with pytest.raises(ModelError, match=rf"k_proj\.weight: wanted shape \({wanted * 16}, 64\)"):  # all heads, not two
        open_model(path)


@pytest.mark.parametrize("theta", [3.6e9, 1e12, 1.0])
def test_a_base_of_rope_of_any_size(tmp_path, theta):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    model = open_model(saved(tmp_path, "qwen2", lambda weights: weights, **rope))
    assert model.metadata["qwen2.rope.freq_base"].value == theta


# Names of models


@pytest.mark.parametrize(
    "given",
    [".", "./", "/home/me/secret/Llama", "../out", "C:\\models\\mine", "outputs/checkpoint-500", "checkpoint-500",
     "~/m", "./a/b", "data/model"],
)  # fmt: skip
def test_a_path_is_no_name(tmp_path, given):
    model = open_model(saved(tmp_path, "llama", lambda weights: weights, _name_or_path=given))
    assert model.name == "Model"
    texts = [str(entry.value) for key, entry in model.metadata.items() if key.startswith("general.")]
    assert not any(word in text for word in ("secret", "checkpoint", "mine") for text in texts)


def test_a_path_in_the_readme_is_no_base_model(tmp_path):
    path = saved(tmp_path, "llama", lambda weights: weights)
    (path / "README.md").write_text("---\nbase_model: /home/me/secret/Llama\n---\n")
    assert not [key for key in open_model(path).metadata if "base_model" in key]
