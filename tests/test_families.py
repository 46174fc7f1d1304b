"""What families differ in: where their tensors come from, what is left out, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from zoo_specs import SPECS, write_spec

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import open_model
from nsds_gguf.read.architectures.families import FAMILIES, TEXT_MODELS, WRAPPERS
from nsds_gguf.read.mapping import CHANGES, COLUMN_ORDERS, ROW_ORDERS


def written(folder: Path, name: str, config: Mapping[str, Any] | None = None, **tensors: Any) -> Path:
    """Write the folder of a spec with changed settings (``...`` takes one out) and tensors added."""
    path = write_spec(folder / "model", name)
    file = path / "config.json"
    settings = {**json.loads(file.read_text()), **(config or {})}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    if tensors:
        weights = path / "model.safetensors"
        save_file({**load_file(weights), **tensors}, weights)
    return path


def rows(path: Path) -> dict[str, np.ndarray]:
    """Return the stored tensors of a folder."""
    return load_file(path / "model.safetensors")


# The table


def test_the_tables_agree() -> None:
    for family in FAMILIES:
        for part in (*family.layer.values(), *family.outside.values()):
            assert not part.order or part.order in ROW_ORDERS
            assert not part.change or part.change in CHANGES
            assert not part.columns or part.columns in COLUMN_ORDERS
    classes = {name for family in FAMILIES for name in family.classes}
    assert set(TEXT_MODELS.values()) <= classes
    assert not classes & set(WRAPPERS)
    assert len(set(WRAPPERS)) == len(WRAPPERS)


def test_every_row_order_takes_each_row_once() -> None:
    sizes = {
        "heads": 6, "kv_heads": 2, "head": 8, "qkv": 80, "experts": 3, "ff_exp": 5, "ff_shexp": 7, "nope": 4,
        "v_head": 3, "kv_b": 42, "embd": 48, "channels": 3, "patch": 2, "token": 0,
        "2ff_exp": 10, "k_heads": 2, "v_heads": 6, "v_heads/k_heads": 3, "delta_head": 4,
        "delta_k": 8, "delta_v": 24, "delta_qkv": 40, "delta_qkvz": 64,
    }  # fmt: skip
    together = {
        "grouped": ("grouped_q", "grouped_k", "grouped_v"),
        "exps": ("first_half_exps", "second_half_exps"),
        "every second": ("even_exps", "odd_exps"),
        "delta": ("delta_qkv", "delta_z"),
        "turns_qkv": ("turns_qkv",),
        "turns_v": ("turns_v",),
        "turns_heads": ("turns_heads",),
        "shexp": ("first_half_shexp", "second_half_shexp"),
        "heads": ("first_part_of_heads", "last_part_of_heads"),
        "rope_q": ("rope_q",),
        "rope_k": ("rope_k",),
        "rope_vision": ("rope_vision",),
        "vision": ("vision_q", "vision_k", "vision_v"),
        "frames": ("frame_0", "frame_1"),
        "token": ("token",),
    }
    for names in together.values():
        taken = np.concatenate([ROW_ORDERS[name](sizes) for name in names])
        assert sorted(taken) == list(range(len(taken))), names
    same_heads = {**sizes, "kv_heads": 6, "qkv": 144}
    assert sorted(ROW_ORDERS["by_head_qkv"](same_heads)) == list(range(144))
    assert {name for names in together.values() for name in names} | {"by_head_qkv"} == set(ROW_ORDERS)


# Where tensors come from: what was stored, taken apart and put together here


def test_experts_are_stacked_in_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, "mixtral")
    stored, model = rows(path), open_model(path)
    for role, source in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        tensor = model.by_name[f"blk.1.ffn_{role}_exps.weight"]
        wanted = [
            stored[f"model.layers.1.block_sparse_moe.experts.{e}.{source}.weight"] for e in range(tensor.shape[0])
        ]
        assert np.array_equal(tensor.load(), np.stack(wanted))
        across = tensor.rows(slice(tensor.shape[1] - 2, tensor.shape[1] + 3))  # from the first expert into the second
        assert np.array_equal(across, np.concatenate([wanted[0][-2:], wanted[1][:3]]))


def test_gemma_stores_gains_less_one(tmp_path: Path) -> None:
    path = written(tmp_path, "gemma3")
    stored, model = rows(path), open_model(path)
    for name, source in (
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
        ("blk.2.attn_q_norm", "model.layers.2.self_attn.q_norm"),
        ("output_norm", "model.norm"),
    ):
        assert np.array_equal(model.by_name[f"{name}.weight"].load(), stored[f"{source}.weight"] + np.float32(1))


def test_gpt2_stores_matrices_the_other_way_round(tmp_path: Path) -> None:
    path = written(tmp_path, "gpt2")
    stored, model = rows(path), open_model(path)
    for role, source in (("attn_qkv", "attn.c_attn"), ("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")):
        tensor = model.by_name[f"blk.0.{role}.weight"]
        assert np.array_equal(tensor.load(), stored[f"transformer.h.0.{source}.weight"].T)
        assert np.array_equal(tensor.rows(slice(3, 9)), stored[f"transformer.h.0.{source}.weight"].T[3:9])


def test_latent_keys_are_turned_head_by_head(tmp_path: Path) -> None:
    path = written(tmp_path, "deepseek2")
    config, model = json.loads((path / "config.json").read_text()), open_model(path)
    heads, nope, v = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    kv_b = rows(path)["model.layers.0.self_attn.kv_b_proj.weight"].reshape(heads, nope + v, -1)
    assert np.array_equal(model.by_name["blk.0.attn_k_b.weight"].load(), kv_b[:, :nope].swapaxes(1, 2))
    assert np.array_equal(model.by_name["blk.0.attn_v_b.weight"].load(), kv_b[:, nope:])


def test_of_delta_nets_the_rows_go_by_part(tmp_path: Path) -> None:
    """Two heads of keys of 16 channels, each with two heads of values: 16 + 16 + 32 + 32 rows a head of keys."""
    path = written(tmp_path, "qwen3next")
    by_head = rows(path)["model.layers.0.linear_attn.in_proj_qkvz.weight"].reshape(2, 96, -1)
    model = open_model(path)
    parts = (by_head[:, :16], by_head[:, 16:32], by_head[:, 32:64])
    qkv = np.concatenate([part.reshape(-1, by_head.shape[2]) for part in parts])
    assert np.array_equal(model.by_name["blk.0.attn_qkv.weight"].load(), qkv)
    assert np.array_equal(model.by_name["blk.0.attn_gate.weight"].load(), by_head[:, 64:].reshape(64, -1))


def test_heads_of_values_take_turns(tmp_path: Path) -> None:
    """The checkpoint's heads 0 and 1 share the first head of keys, 2 and 3 the second: llama.cpp has 0, 2, 1, 3."""
    path = written(tmp_path, "qwen3.5")
    stored, model, prefix = rows(path), open_model(path), "model.layers.0.linear_attn."
    order = [0, 2, 1, 3]
    rates = -np.exp(stored[f"{prefix}A_log"][order])
    assert np.allclose(model.by_name["blk.0.ssm_a"].load(), rates, rtol=1e-6)
    out = stored[f"{prefix}out_proj.weight"].reshape(-1, 4, 16)[:, order].reshape(-1, 64)
    assert np.array_equal(model.by_name["blk.0.ssm_out.weight"].load(), out)
    qkv = stored[f"{prefix}in_proj_qkv.weight"]
    values = qkv[64:].reshape(4, 16, -1)[order].reshape(64, -1)
    assert np.array_equal(model.by_name["blk.0.attn_qkv.weight"].load(), np.concatenate([qkv[:64], values]))


def test_gates_and_ups_of_gpt_oss_take_turns(tmp_path: Path) -> None:
    path = written(tmp_path, "gpt-oss")
    stored, model, prefix = rows(path), open_model(path), "model.layers.1.mlp.experts."
    for first, role in enumerate(("gate", "up")):
        wanted = stored[f"{prefix}gate_up_proj"][:, :, first::2].swapaxes(1, 2)
        assert np.array_equal(model.by_name[f"blk.1.ffn_{role}_exps.weight"].load(), wanted)
        bias = stored[f"{prefix}gate_up_proj_bias"][:, first::2]
        assert np.array_equal(model.by_name[f"blk.1.ffn_{role}_exps.bias"].load(), bias)
    down = stored[f"{prefix}down_proj"].swapaxes(1, 2)
    assert np.array_equal(model.by_name["blk.1.ffn_down_exps.weight"].load(), down)


def test_numbers_of_layers_are_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "apertus")
    stored, model = rows(path), open_model(path)
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        values = [float(stored[f"model.layers.{i}.mlp.act_fn.{name}"].item()) for i in range(2)]
        assert model.metadata[f"xielu.{name}"].value == values
    del stored["model.layers.1.mlp.act_fn.beta"]
    save_file(stored, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"not of one number: model\.layers\.1\.mlp\.act_fn\.beta"):
        open_model(path)


def test_a_state_space_holds_minus_the_exponential(tmp_path: Path) -> None:
    path = written(tmp_path, "mamba")
    stored, model = rows(path), open_model(path)
    a = model.by_name["blk.0.ssm_a"].load()
    assert np.allclose(a, -np.exp(stored["backbone.layers.0.mixer.A_log"]), rtol=1e-6)
    conv = stored["backbone.layers.0.mixer.conv1d.weight"]
    assert np.array_equal(model.by_name["blk.0.ssm_conv1d.weight"].load(), conv[:, 0])


def test_a_tied_output_that_llama_cpp_demands_is_written_twice(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen2moe", {"tie_word_embeddings": True})
    weights = rows(path)
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors")
    model = open_model(path)
    assert np.array_equal(model.by_name["output.weight"].load(), model.by_name["token_embd.weight"].load())
    assert "The embedding is written twice: llama.cpp's qwen2moe has no tied output." in model.notes


# What is left out


def test_of_a_multimodal_model_the_language_model_is_taken(tmp_path: Path) -> None:
    model = open_model(written(tmp_path, "llava"))
    (note,) = [note for note in model.notes if note.startswith("Only the language model is converted")]
    assert re.search(r"left out: multi_modal_projector \(\d+ tensors\), vision_tower \(\d+ tensors\)\.$", note)
    assert model.architecture == "llama"
    assert not [tensor for tensor in model.tensors if "vision" in tensor.source]


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    n_layers = json.loads((written(tmp_path / "a", "deepseek3") / "config.json").read_text())["num_hidden_layers"]
    extra = {f"model.layers.{n_layers}.eh_proj.weight": np.ones((4, 8), np.float32)}
    model = open_model(written(tmp_path / "b", "deepseek3", **extra))
    assert "Only the language model is converted; left out: layer of multi-token prediction (1 tensors)." in model.notes


def test_tensors_of_other_models_need_a_multimodal_class(tmp_path: Path) -> None:
    extra = {"vision_tower.patch.weight": np.ones((4, 8), np.float32)}
    with pytest.raises(UnsupportedError, match=r"has no place for: vision_tower\.patch\.weight"):
        open_model(written(tmp_path, "llama", **extra))


@pytest.mark.parametrize(
    ("name", "inner", "outer"),
    [("llama", "", ""), ("llama", "model.language_model.", ""), ("llama", "language_model.model.", "language_model.")],
)
def test_names_may_begin_otherwise(name: str, inner: str, outer: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    plain = {tensor.name: tensor.load() for tensor in open_model(path).tensors}
    renamed = {
        inner + key.removeprefix("model.") if key.startswith("model.") else outer + key: value
        for key, value in rows(path).items()
    }
    save_file(renamed, path / "model.safetensors")
    found = {tensor.name: tensor.load() for tensor in open_model(path).tensors}
    assert found.keys() == plain.keys()
    assert all(np.array_equal(found[key], plain[key]) for key in plain)


# What llama.cpp computes otherwise is refused


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob True: llama.cpp's qwen2moe supports False only"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob False: llama.cpp's qwen3moe supports True only"),
        ("qwen3moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]: llama.cpp's qwen3moe supports \[\] only"),
        ("olmoe", {"clip_qkv": 2.0}, "clip_qkv 2.0: llama.cpp's olmoe supports None only"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100: llama.cpp's gemma2 supports"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"activation_function": "relu"}, "hidden_act 'relu' is not supported for gpt2"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True: llama.cpp's command-r supports False only"),
        ("smollm3", {"no_rope_layers": [1, 1]}, r"no_rope_layers \[1, 1\]"),
        ("deepseek2", {"topk_method": "group_limited_greedy"}, "topk_method 'group_limited_greedy'"),
        ("exaone4", {"sliding_window": 48}, "sliding_window 48: llama.cpp's exaone4 supports None only"),
        ("exaone4-32b", {"sliding_window": None}, "sliding_window None: llama.cpp's exaone4 supports 4096 only"),
        ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads 2: llama.cpp's dots1 supports 4 only"),
        ("ernie4.5-moe", {"moe_layer_interval": 2}, "moe_layer_interval 2: llama.cpp's ernie4_5-moe supports 1 only"),
        ("ernie4.5-moe", {"moe_layer_end_index": 1}, "moe_layer_end_index 1: llama.cpp's ernie4_5-moe supports 2 only"),
        ("lfm2", {"conv_bias": True}, "conv_bias True: llama.cpp's lfm2 supports False only"),
        ("gemma", {"tie_word_embeddings": False}, "llama.cpp's gemma has no output projection of its own"),
        ("stablelm", {"head_dim": 8}, "head_dim 8 x 4 heads is not hidden_size"),
        ("llava", {"text_config": {"model_type": "bloom"}}, "around a language model of type 'bloom'; known: gemma"),
    ],
)  # fmt: skip
def test_refused(name: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_model(written(tmp_path, name, config))


def test_a_theta_for_windowed_layers_that_llama_cpp_would_not_use(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    with pytest.raises(UnsupportedError, match=r"a separate rope theta, 300\.0; llama\.cpp's olmo2 has one"):
        open_model(written(tmp_path, "olmo3", {"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"long_factor": [1.0]}, "longrope long_factor: wanted 8 positive numbers"),
        ({"short_factor": [0.0] * 8}, "longrope short_factor: wanted 8 positive numbers"),
        ({"long_factor": None}, "longrope long_factor: wanted 8 positive numbers"),
    ],
)
def test_longrope_factors_that_do_not_fit(factors: dict[str, Any], message: str, tmp_path: Path) -> None:
    name = "phi-3-longrope-long"
    rope = json.loads((written(tmp_path / "a", name) / "config.json").read_text())["rope_parameters"]
    with pytest.raises(ModelError, match=message):
        open_model(written(tmp_path / "b", name, {"rope_parameters": {**rope, **factors}}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_local_experts": -1}, "num_experts: wanted a positive integer"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 8 in all"),
    ],
)
def test_experts_that_contradict_themselves(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(written(tmp_path, "mixtral", config))


# Multimodal models


def test_qwen2_vl_without_text_config(tmp_path: Path) -> None:
    """As repositories have it: all settings at the top, sections of a rope of type mrope, no model.language_model."""
    path = written(tmp_path, "qwen2-vl")
    plain = open_model(path)
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "model_type": "qwen2_vl"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (path / "config.json").write_text(json.dumps(flat))
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    renamed = {
        next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key): value
        for key, value in rows(path).items()
    }
    save_file(renamed, path / "model.safetensors")
    model = open_model(path)
    assert model.model_id == plain.model_id
    assert model.metadata["qwen2vl.rope.dimension_sections"].value == [2, 3, 3, 0]
    assert "Only the language model is converted; left out: visual (19 tensors)." in model.notes


def test_experts_of_qwen3_vl_either_way_round(tmp_path: Path) -> None:
    """Repositories have stacks of (in, out), transformers 5 saves (out, in)."""
    path = written(tmp_path, "qwen3-vl-moe")
    stored, prefix = rows(path), "model.language_model.layers.1.mlp.experts."
    both, down = stored[f"{prefix}gate_up_proj"], stored[f"{prefix}down_proj"]
    parts = {"gate": both[:, :, :48], "up": both[:, :, 48:], "down": down}
    turned = {key: value.swapaxes(1, 2).copy() if ".experts." in key else value for key, value in stored.items()}
    for weights in (stored, turned):
        save_file(weights, path / "model.safetensors")
        model = open_model(path)
        for role, part in parts.items():
            found = model.by_name[f"blk.1.ffn_{role}_exps.weight"].load()
            assert np.array_equal(found, part.swapaxes(1, 2).astype(np.float32))


# Keys


def test_windows_that_llama_cpp_computes_are_keys(tmp_path: Path) -> None:
    usual = open_model(written(tmp_path / "a", "gemma3")).metadata
    assert "gemma3.attention.sliding_window_pattern" not in usual
    other = open_model(written(tmp_path / "b", "gemma3-pattern-3")).metadata
    assert other["gemma3.attention.sliding_window_pattern"].value == [True, True, False] * 2
    assert open_model(written(tmp_path / "c", "mistral", {"sliding_window": 64})).notes


def test_dynamic_scaling_is_none_up_to_the_context(tmp_path: Path) -> None:
    """As InternLM 2.5 has it: transformers' frequencies are the unscaled ones up to ``max_position_embeddings``."""
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 700.0}
    model = open_model(
        written(tmp_path, "internlm2-4", {**rope, "rope_parameters": ..., "max_position_embeddings": 128})
    )
    assert model.metadata["internlm2.rope.freq_base"].value == 700.0
    assert "internlm2.rope.scaling.type" not in model.metadata
    assert model.notes[0].startswith("llama.cpp has no dynamic rope scaling: the model works up to 128")


def test_the_theta_of_hunyuan_grows_with_alpha(tmp_path: Path) -> None:
    """As Hunyuan has it: ``theta alpha^(d / (d - 2))`` for heads of 32 channels, at any length of text."""
    metadata = open_model(written(tmp_path, "hunyuan-dense-alpha-bf16")).metadata
    assert metadata["hunyuan-dense.rope.freq_base"].value == pytest.approx(10000 * 50 ** (32 / 30))
    assert metadata["hunyuan-dense.rope.scaling.type"].value == "none"
    assert metadata["hunyuan-dense.context_length"].value == 262144


def test_gpt_oss_has_bounds_of_its_ramp_that_llama_cpp_rounds(tmp_path: Path) -> None:
    rope = json.loads((written(tmp_path / "a", "gpt-oss") / "config.json").read_text())["rope_parameters"]
    model = open_model(written(tmp_path / "b", "gpt-oss", {"rope_parameters": {**rope, "truncate": False}}))
    assert "llama.cpp rounds the bounds of yarn's ramp to whole channels, the original does not." in model.notes
    with pytest.raises(UnsupportedError, match="yarn rope with truncate False"):
        open_model(written(tmp_path / "c", "llama-yarn", {"rope_parameters": {**rope, "truncate": False}}))


def test_layers_of_multi_token_prediction_may_have_a_name_of_their_own(tmp_path: Path) -> None:
    model = open_model(written(tmp_path, "qwen3.5", **{"mtp.fc.weight": np.ones((4, 8), np.float32)}))
    assert "Only the language model is converted; left out: layer of multi-token prediction (1 tensors)." in model.notes


def test_the_context_of_command_r(tmp_path: Path) -> None:
    plain = open_model(written(tmp_path / "a", "cohere"))
    longer = open_model(written(tmp_path / "b", "cohere", {"model_max_length": 4096}))
    assert longer.metadata["command-r.context_length"].value == longer.hparams.n_ctx_train == 4096
    assert plain.hparams.n_ctx_train != 4096


def test_a_list_of_layers_of_another_length(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="layer_types: wanted 7 entries, got 1"):
        open_model(written(tmp_path, "gemma3", {"layer_types": ["full_attention"]}))


def test_every_architecture_has_a_model_and_experts_show_in_the_size(tmp_path: Path) -> None:
    architectures = set()
    for name in SPECS:
        model = open_model(write_spec(tmp_path / name, name))
        architectures.add(model.architecture)
        has_experts = any("exps" in tensor.role for tensor in model.tensors)
        assert ("x" in str(model.metadata["general.size_label"].value)) == has_experts
    assert architectures == {family.architecture for family in FAMILIES}
