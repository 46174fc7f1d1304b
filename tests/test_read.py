"""Reading a model folder: what is mapped, what is refused and in which words, which keys are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import N_VOCAB, SPECS, Spec, Weights, tiny_config, tiny_weights, write_model, write_tiny

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import open_model, supported_classes
from nsds_gguf.read.architectures.rope import llama3_factors, rope_settings, yarn_attention_factor
from nsds_gguf.read.mapping import rope_row_order
from nsds_gguf.records import Model

LLAMA, MISTRAL, QWEN2, QWEN3 = (SPECS[name] for name in ("llama", "mistral", "qwen2", "qwen3"))
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Change = Callable[[Weights], Weights]


def changed(
    folder: Path, spec: Spec = LLAMA, config: Mapping[str, Any] | None = None, weights: Change | None = None
) -> Path:
    """Write the folder of a spec with changes; a config value of ``...`` takes the key out."""
    settings = {key: value for key, value in (tiny_config(spec) | dict(config or {})).items() if value is not ...}
    tensors = tiny_weights(spec)
    return write_model(folder / "model", settings, weights(tensors) if weights else tensors)


def without(*names: str) -> Change:
    return lambda weights: {name: array for name, array in weights.items() if name not in names}


def refusal(kind: type[ModelError], folder: Path) -> str:
    """Return the message with which a folder is refused, the folder's own path cut out."""
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder.resolve()}/", "")


# Which tensors there are


def test_every_tensor_of_a_llama_has_its_place(tmp_path: Path) -> None:
    model = open_model(changed(tmp_path, SPECS["llama-llama3"]))
    layer = {
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_k.weight": "self_attn.k_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_up.weight": "mlp.up_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
    }
    assert {tensor.name: tensor.source for tensor in model.tensors} == {
        "token_embd.weight": EMBEDDING,
        **{f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in range(2) for ours, theirs in layer.items()},
        "output_norm.weight": "model.norm.weight",
        "output.weight": LM_HEAD,
        "rope_freqs.weight": "computed from config.json",
    }


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama-biases", {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
        ("qwen2", {"attn_q", "attn_k", "attn_v"}),
        ("qwen3-biases", {"attn_q", "attn_k", "attn_v"}),
        ("mistral", set()),
    ],
)
def test_biases_by_class(name: str, roles: set[str], tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path, SPECS[name]))
    biases = {tensor.name for tensor in model.tensors if tensor.name.endswith(".bias")}
    assert biases == {f"blk.{i}.{role}.bias" for role in roles for i in range(2)}
    assert not any(model.by_name[bias].is_matrix for bias in biases)


def test_one_leftover_tensor_is_named(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)}
    assert refusal(UnsupportedError, changed(tmp_path, weights=lambda weights: weights | extra)) == (
        "tensors that llama.cpp's llama, as config.json describes it, has no place for: model.layers.0.self_attn.sinks"
    )


def test_many_leftover_tensors_are_named_in_part(tmp_path: Path) -> None:
    folder = changed(tmp_path, SPECS["llama-biases"], {"mlp_bias": False})
    assert refusal(UnsupportedError, folder) == (
        "tensors that llama.cpp's llama, as config.json describes it, has no place for: "
        "model.layers.0.mlp.gate_proj.bias, model.layers.0.mlp.up_proj.bias, model.layers.0.mlp.down_proj.bias, "
        "… (3 more)"
    )


def test_a_layer_too_many_is_left_over(tmp_path: Path) -> None:
    message = refusal(UnsupportedError, changed(tmp_path, config={"num_hidden_layers": 1}))
    assert "model.layers.1.input_layernorm.weight" in message


def test_biases_that_llama_cpp_has_no_place_for_are_left_over(tmp_path: Path) -> None:
    spec = Spec("Qwen3ForCausalLM", attention_bias=True)
    assert refusal(UnsupportedError, changed(tmp_path, spec)) == (
        "tensors that llama.cpp's qwen3, as config.json describes it, has no place for: "
        "model.layers.0.self_attn.o_proj.bias, model.layers.1.self_attn.o_proj.bias"
    )


def test_biases_that_transformers_would_not_use_are_left_over(tmp_path: Path) -> None:
    weights = tiny_weights(SPECS["llama-biases"])
    config = {"attention_bias": True, "mlp_bias": True}
    message = refusal(UnsupportedError, changed(tmp_path, MISTRAL, config, lambda _: weights))
    assert message.endswith("… (11 more)")


def test_one_missing_tensor_is_named(tmp_path: Path) -> None:
    message = refusal(ModelError, changed(tmp_path, weights=without("model.layers.1.mlp.up_proj.weight")))
    assert message == (
        "tensors missing from the weights: model.layers.1.mlp.up_proj.weight; "
        "the checkpoint is incomplete or config.json belongs to another model"
    )


def test_many_missing_tensors_are_named_in_part(tmp_path: Path) -> None:
    assert refusal(ModelError, changed(tmp_path, QWEN3, {"num_hidden_layers": 3})) == (
        "tensors missing from the weights: model.layers.2.input_layernorm.weight, "
        "model.layers.2.self_attn.q_proj.weight, model.layers.2.self_attn.k_proj.weight, … (8 more); "
        "the checkpoint is incomplete or config.json belongs to another model"
    )


def test_biases_that_config_promises_are_missing(tmp_path: Path) -> None:
    message = refusal(ModelError, changed(tmp_path, config={"attention_bias": True}))
    assert "model.layers.0.self_attn.q_proj.bias" in message


def test_tables_that_rope_recomputes_are_ignored(tmp_path: Path) -> None:
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32) for i in range(2)}
    plain = open_model(changed(tmp_path / "plain"))
    model = open_model(changed(tmp_path, weights=lambda weights: weights | tables))
    assert [tensor.name for tensor in model.tensors] == [tensor.name for tensor in plain.tensors]


# Tied embeddings


def test_an_untied_model_needs_its_output(tmp_path: Path) -> None:
    assert refusal(ModelError, changed(tmp_path, weights=without(LM_HEAD))) == (
        "tensors missing from the weights: lm_head.weight; "
        "the checkpoint is incomplete or config.json belongs to another model"
    )


def test_a_tied_output_that_equals_the_embedding_is_left_out(tmp_path: Path) -> None:
    config = {"tie_word_embeddings": True}
    folder = changed(tmp_path, config=config, weights=lambda weights: weights | {LM_HEAD: weights[EMBEDDING]})
    model = open_model(folder)
    assert model.is_tied
    assert model.notes == ("lm_head.weight is left out: it is the embedding, to which config.json ties it.",)


def test_a_tied_output_that_differs_is_refused(tmp_path: Path) -> None:
    def last_number_changed(weights: Weights) -> Weights:
        output = weights[EMBEDDING].copy()
        output[-1, -1] += 1
        return weights | {LM_HEAD: output}

    folder = changed(tmp_path, config={"tie_word_embeddings": True}, weights=last_number_changed)
    assert refusal(ModelError, folder) == (
        "config.json ties lm_head.weight to model.embed_tokens.weight, but the stored ones differ: "
        "set tie_word_embeddings to false to keep lm_head.weight, or remove it from the weights"
    )


# Shapes


def test_a_wrong_shape_names_file_and_tensor(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    folder = changed(tmp_path, weights=lambda weights: weights | {name: weights[name].T.copy()})
    assert refusal(ModelError, folder) == (
        f"model.safetensors: tensor {name}: wanted shape (64, 96), got (96, 64): see config.json"
    )


def test_a_wrong_bias_shape(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"
    folder = changed(tmp_path, QWEN2, weights=lambda weights: weights | {name: np.zeros((32, 1), np.float32)})
    assert refusal(ModelError, folder) == (
        f"model.safetensors: tensor {name}: wanted shape (32,), got (32, 1): see config.json"
    )


def test_vocabulary_size_that_disagrees_with_the_embedding(tmp_path: Path) -> None:
    assert refusal(ModelError, changed(tmp_path, config={"vocab_size": N_VOCAB + 1})) == (
        f"model.safetensors: tensor {EMBEDDING}: wanted shape (287, 64), got (286, 64): "
        "vocabulary size and embedding rows disagree"
    )


# What the weights are


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_are_read_exactly(dtype: str, tmp_path: Path) -> None:
    spec = Spec("Qwen3ForCausalLM", dtype=dtype, n_shards=2)
    weights = tiny_weights(spec)
    model = open_model(write_tiny(tmp_path, spec))
    for tensor in model.tensors:
        given = weights[tensor.source]
        wanted = (given.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else given.astype(np.float32)
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor.load(), wanted)
        rows = wanted.reshape(-1, wanted.shape[-1])
        np.testing.assert_array_equal(tensor.rows(slice(1, 3)), rows[1:3])


def test_rope_row_order_of_two_heads() -> None:
    assert rope_row_order(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_llama_reads_q_and_k_in_rope_order(tmp_path: Path) -> None:
    weights = tiny_weights(SPECS["llama-biases"])
    model = open_model(write_tiny(tmp_path, SPECS["llama-biases"]))
    for role, source, n_heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        order = [16 * head + 8 * half + j for head in range(n_heads) for j in range(8) for half in range(2)]
        weight, bias = (weights[f"model.layers.1.self_attn.{source}.{kind}"] for kind in ("weight", "bias"))
        np.testing.assert_array_equal(model.by_name[f"blk.1.{role}.weight"].load(), weight[order])
        np.testing.assert_array_equal(model.by_name[f"blk.1.{role}.weight"].rows(slice(5, 9)), weight[order[5:9]])
        np.testing.assert_array_equal(model.by_name[f"blk.1.{role}.bias"].load(), bias[order])
    v = model.by_name["blk.1.attn_v.weight"].load()
    np.testing.assert_array_equal(v, weights["model.layers.1.self_attn.v_proj.weight"])


def test_rows_are_the_callers_own(tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path, SPECS["llama-llama3"]))
    for tensor in model.tensors:
        wanted = tensor.load()
        tensor.rows(slice(0, tensor.n_rows))[:] = -1
        np.testing.assert_array_equal(tensor.load(), wanted)


# Identity


def identity(folder: Path, config: Mapping[str, Any] | None = None, weights: Change | None = None) -> str:
    return open_model(changed(folder, config=config, weights=weights)).model_id


def test_the_identity_changes_with_a_weight_a_name_and_the_config(tmp_path: Path) -> None:
    def one_bit(weights: Weights) -> Weights:
        array = weights["model.layers.1.mlp.up_proj.weight"].copy()
        array.view(np.uint32)[0, 0] ^= 1
        return weights | {"model.layers.1.mlp.up_proj.weight": array}

    def other_type(weights: Weights) -> Weights:
        return weights | {"model.norm.weight": weights["model.norm.weight"].astype(np.float16)}

    same = identity(tmp_path / "a")
    assert identity(tmp_path / "elsewhere" / "b") == same
    others = [
        identity(tmp_path / "c", weights=one_bit),
        identity(tmp_path / "d", weights=other_type),
        identity(tmp_path / "e", {"rms_norm_eps": 2e-5}),
    ]
    assert len({same, *others}) == 4


def test_the_identity_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    weights = tiny_weights(LLAMA)
    one = write_model(tmp_path / "one", tiny_config(LLAMA), weights)
    three = write_model(tmp_path / "three", tiny_config(LLAMA), weights, n_shards=3)
    assert open_model(one).model_id == open_model(three).model_id


# config.json


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"model")
    for path, message in (
        (tmp_path / "nowhere", f"{tmp_path}/nowhere: no such folder"),
        (tmp_path, f"{tmp_path}: no config.json in it; wanted a Hugging Face model folder"),
        (file, f"{file}: is a file; wanted a Hugging Face model folder with config.json, or a .gguf"),
    ):
        with pytest.raises(ModelError) as caught:
            open_model(path)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: cannot be read as JSON: Expecting property name enclosed in double quotes"),
        ("[1]", "config.json: wanted an object, got list"),
        ("[" * 100_000, "config.json: cannot be read as JSON: "),
        ("{}", "config.json: wanted one class name in architectures, got None"),
        ('{"architectures": [3]}', "config.json: wanted one class name in architectures, got [3]"),
    ],
)
def test_damaged_config(text: str, message: str, tmp_path: Path) -> None:
    folder = changed(tmp_path)
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert refusal(ModelError, folder).startswith(message)


def test_an_unsupported_class_names_the_nearest(tmp_path: Path) -> None:
    assert refusal(UnsupportedError, changed(tmp_path, config={"architectures": ["LlamaForCausalM"]})) == (
        "config.json: class LlamaForCausalM is not supported; nearest is LlamaForCausalLM, "
        "and llama.cpp does not know it either"
    )


def test_a_class_that_llama_cpp_knows_is_pointed_there(tmp_path: Path) -> None:
    assert refusal(UnsupportedError, changed(tmp_path, config={"architectures": ["GlmMoeDsaForCausalLM"]})) == (
        "config.json: class GlmMoeDsaForCausalLM is not supported; nearest is Glm4MoeForCausalLM; llama.cpp converts "
        "it: python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model.gguf, then nsds-gguf convert model.gguf"
    )


def test_no_class_is_in_two_families() -> None:
    classes = supported_classes()
    assert len(set(classes)) == len(classes)
    assert {"LlamaForCausalLM", "Gemma3ForConditionalGeneration", "MixtralForCausalLM"} < set(classes)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act 'gelu' is not supported for llama; known: silu, swish"),
        ({"hidden_size": "64"}, ModelError, "hidden_size: wanted a positive integer, got '64'"),
        ({"intermediate_size": 0}, ModelError, "intermediate_size: wanted a positive integer, got 0"),
        ({"num_hidden_layers": True}, ModelError, "num_hidden_layers: wanted a positive integer, got True"),
        ({"vocab_size": 286.0}, ModelError, "vocab_size: wanted a positive integer, got 286.0"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
            ModelError,
            "hidden_size 64 is not a multiple of num_attention_heads 5",
        ),
        ({"num_hidden_layers": 513}, UnsupportedError, "num_hidden_layers 513: llama.cpp takes at most 512"),
        ({"num_key_value_heads": 3}, ModelError, "4 heads cannot share 3 key/value heads evenly"),
        ({"head_dim": 15}, UnsupportedError, "head_dim 15 is odd; rope rotates pairs of channels"),
        ({"rms_norm_eps": None}, ModelError, "rms_norm_eps: wanted a number from 0 to 1, got None"),
        ({"rms_norm_eps": "1e-5"}, ModelError, "rms_norm_eps: wanted a number from 0 to 1, got '1e-5'"),
    ],
)
def test_config_that_is_refused(
    config: Mapping[str, Any], kind: type[ModelError], message: str, tmp_path: Path
) -> None:
    assert refusal(kind, changed(tmp_path, config=config)) == f"config.json: {message}"


def test_qwen2_with_heads_of_their_own_size_is_refused(tmp_path: Path) -> None:
    assert refusal(UnsupportedError, changed(tmp_path, QWEN2, {"head_dim": 32})) == (
        "config.json: head_dim 32 x 4 heads is not hidden_size 64; llama.cpp's qwen2 requires it"
    )


def test_settings_that_config_may_leave_out(tmp_path: Path) -> None:
    spec = Spec("LlamaForCausalLM", 4, n_kv_heads=4)
    optional = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act")
    model = open_model(changed(tmp_path, spec, dict.fromkeys(optional, ...)))
    assert (model.hparams.head_dim, model.hparams.n_kv_heads) == (16, 4)
    assert model.hparams.norm_eps == pytest.approx(1e-6)  # float32 in the key
    assert model.metadata["llama.rope.freq_base"].value == 10000.0
    assert "llama.attention.key_length" not in model.metadata


# Attention windows


@pytest.mark.parametrize(
    ("spec", "config", "n_window"),
    [
        (MISTRAL, {"sliding_window": 128}, 128),
        (MISTRAL, {"sliding_window": ..., "max_position_embeddings": 8192}, 4096),  # transformers' default
        (MISTRAL, {"sliding_window": None}, None),
        (MISTRAL, {"sliding_window": 256}, None),  # as long as the context
        (LLAMA, {"sliding_window": 128}, None),  # a key that the class does not know
        (QWEN2, {"sliding_window": 128}, None),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, None),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True}, None),  # both layer_types are full
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True, "layer_types": ...}, None),  # of 28 and more layers
        (
            QWEN2,
            {"sliding_window": 128, "use_sliding_window": True, "layer_types": ..., "max_window_layers": 1},
            128,
        ),
        (
            QWEN3,
            {
                "sliding_window": 128,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            128,
        ),
    ],
)
def test_a_window_that_llama_cpp_does_not_have_is_told(
    spec: Spec, config: Mapping[str, Any], n_window: int | None, tmp_path: Path
) -> None:
    model = open_model(changed(tmp_path, spec, config))
    told = (
        f"llama.cpp has no sliding window for {model.architecture}: beyond {n_window} tokens, attention is full, "
        f"where the original attends to {n_window}."
    )
    assert model.notes == ((told,) if n_window else ())
    assert not any("sliding" in key for key in model.metadata)


def test_a_window_that_is_no_number(tmp_path: Path) -> None:
    assert refusal(ModelError, changed(tmp_path, MISTRAL, {"sliding_window": "4k"})) == (
        "config.json: sliding_window: wanted a number of tokens or null, got '4k'"
    )


# Rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def rope_keys(folder: Path, spec: Spec = LLAMA, **config: Any) -> dict[str, Any]:
    """Return the rope keys of a model, without the architecture."""
    model = open_model(changed(folder, spec, config))
    return {
        key.split(".", 2)[2]: entry.value
        for key, entry in model.metadata.items()
        if ".rope." in key and not key.endswith("dimension_count")
    }


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 4}, {"scaling.type": "linear", "scaling.factor": 4.0}),
        (YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}),
        (LLAMA3, {}),
    ],
)
def test_both_forms_of_config_give_the_same_keys(
    rope: Mapping[str, Any], keys: Mapping[str, Any], tmp_path: Path
) -> None:
    wanted = {"freq_base": 50000.0, **keys}
    new = {"rope_parameters": {**rope, "rope_theta": 50000.0}}
    old = {"rope_parameters": ..., "rope_theta": 50000, "rope_scaling": dict(rope)}
    older = old | {"rope_scaling": {"type" if key == "rope_type" else key: value for key, value in rope.items()}}
    both = old | {"rope_scaling": {**rope, "type": rope["rope_type"]}}
    for i, config in enumerate((new, old, older, both, new | old | new)):
        assert rope_keys(tmp_path / str(i), **config) == wanted
    if rope["rope_type"] == "default":
        assert rope_keys(tmp_path / "null", **(old | {"rope_scaling": None})) == wanted


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, None),  # 0.1 ln 4 + 1 on both sides
        ({"attention_factor": 1.5}, 1.5 / 1.1386294361),
        ({"attention_factor": 1.1386294361119891}, None),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1 / 1.1386294361),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, 1.0980110113 / 1.1386294361 / 1.1386294361),
        ({"mscale": 0.707}, None),  # needs both
        ({"attention_factor": None, "beta_fast": 32, "beta_slow": 1.0, "truncate": True}, None),
    ],
)
def test_the_key_of_yarns_attention_factor(options: Mapping[str, Any], factor: float | None, tmp_path: Path) -> None:
    keys = rope_keys(tmp_path, rope_parameters={**YARN, "rope_theta": 500.0, **options})
    assert keys.get("scaling.attn_factor") == (pytest.approx(factor, rel=1e-9) if factor else None)


def test_yarn_below_a_factor_of_one_scales_nothing() -> None:
    assert yarn_attention_factor({"factor": 0.5}) == 1.0


def test_an_original_context_that_is_not_named_is_the_context(tmp_path: Path) -> None:
    keys = rope_keys(tmp_path, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0})
    assert keys["scaling.original_context_length"] == 256


def test_an_original_context_beside_the_rope_settings(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}
    keys = rope_keys(tmp_path, rope_parameters=yarn, original_max_position_embeddings=128)
    assert keys["scaling.original_context_length"] == 128


def test_llama3_factors_by_hand(tmp_path: Path) -> None:
    # Wavelengths of theta 10000 and 8 channels: 2 pi times 1, 10, 100, 1000. 1024 tokens hold 163, 16.3, 1.63 and 0.163
    # of them: the first two stay, the last is stretched by 8, the third has smooth = (1.62975 - 1) / (4 - 1) = 0.209916
    # and so the factor 1 / ((1 - 0.209916) / 8 + 0.209916) = 3.239642.
    factors = llama3_factors({**LLAMA3, "rope_theta": 10000.0}, 8)
    np.testing.assert_allclose(factors, [1, 1, 3.239642, 8], rtol=1e-6)
    assert factors.dtype == np.float32
    spec = Spec("MistralForCausalLM", rope=LLAMA3, rope_theta=10000.0, n_embd=32)
    tensor = open_model(write_tiny(tmp_path, spec)).by_name["rope_freqs.weight"]
    assert (tensor.role, tensor.layer, tensor.shape, tensor.is_matrix) == ("rope_freqs", None, (4,), False)
    np.testing.assert_array_equal(tensor.load(), factors)


@pytest.mark.parametrize(
    ("spec", "rope", "kind", "message"),
    [
        (
            LLAMA,
            {"rope_type": "ntk", "factor": 2.0},
            UnsupportedError,
            "rope scaling 'ntk' is not supported for llama; known: default, linear, yarn, llama3",
        ),
        (
            QWEN3,
            LLAMA3,
            UnsupportedError,
            "rope scaling 'llama3' is not supported for qwen3; known: default, linear, yarn",
        ),
        (
            QWEN2,
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            UnsupportedError,
            "partial_rotary_factor 0.5 is not supported for qwen2",
        ),
        (
            LLAMA,
            {**YARN, "beta_fast": 16},
            UnsupportedError,
            "yarn rope with beta_fast 16: llama.cpp supports only beta_fast 32.0",
        ),
        (
            LLAMA,
            {**YARN, "beta_slow": 2},
            UnsupportedError,
            "yarn rope with beta_slow 2: llama.cpp supports only beta_slow 1.0",
        ),
        (
            LLAMA,
            {**YARN, "truncate": False},
            UnsupportedError,
            "yarn rope with truncate False: llama.cpp supports only truncate True",
        ),
        (
            LLAMA,
            {**YARN, "truncate": None},
            UnsupportedError,
            "yarn rope with truncate None: llama.cpp supports only truncate True",
        ),
        (
            QWEN3,
            {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}},
            UnsupportedError,
            "layers with a sliding window have a separate rope theta, 1000.0; llama.cpp's qwen3 has one for all layers",
        ),
        (
            LLAMA,
            {**YARN, "factor": None},
            ModelError,
            "rope setting factor: wanted a positive number that float32 holds, got None",
        ),
        (
            LLAMA,
            {**YARN, "mscale": "1"},
            ModelError,
            "rope setting mscale: wanted a positive number that float32 holds, got '1'",
        ),
        (
            LLAMA,
            {**YARN, "original_max_position_embeddings": 64.5},
            ModelError,
            "rope setting original_max_position_embeddings: wanted a number of tokens, got 64.5",
        ),
        (
            LLAMA,
            {"rope_type": "linear", "factor": 0},
            ModelError,
            "rope setting factor: wanted a positive number that float32 holds, got 0",
        ),
        (
            LLAMA,
            {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"},
            ModelError,
            "rope setting low_freq_factor: wanted a positive number that float32 holds, got None",
        ),
        (
            LLAMA,
            {**LLAMA3, "low_freq_factor": 4.0},
            ModelError,
            "llama3 rope: wanted low_freq_factor below high_freq_factor",
        ),
    ],
)
def test_rope_that_is_refused(
    spec: Spec, rope: Mapping[str, Any], kind: type[ModelError], message: str, tmp_path: Path
) -> None:
    assert refusal(kind, changed(tmp_path, spec, {"rope_parameters": rope})) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": "linear"}, "rope_parameters: wanted an object, got 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
            "rope setting rope_theta: wanted a positive number that float32 holds, got '1e4'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_parameters and rope_scaling disagree; keep the correct one",
        ),
        ({"rope_theta": 10000.0}, "rope_theta is 10000.0, but 500.0 in rope_parameters; keep the correct one"),
    ],
)
def test_rope_settings_that_contradict_each_other(config: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    assert refusal(ModelError, changed(tmp_path, config=config)) == f"config.json: {message}"


def test_null_settings_are_none(tmp_path: Path) -> None:
    assert rope_settings({"rope_scaling": None, "rope_theta": None, "max_position_embeddings": 8}) == {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 8,
    }


# Metadata


def keys_of(model: Model) -> dict[str, Any]:
    """Return the values of all keys but the tokenizer's."""
    return {key: entry.value for key, entry in model.metadata.items() if not key.startswith("tokenizer.")}


GENERAL = {"general.type": "model", "general.name": "Model", "general.size_label": "98K"}
LLAMA_KEYS = {
    **GENERAL,
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": 286,
    "llama.rope.freq_base": 500.0,
}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (LLAMA, LLAMA_KEYS),
        (MISTRAL, LLAMA_KEYS),
        (
            SPECS["qwen2-tied-mqa-bf16-4"],
            {
                **GENERAL,
                "general.architecture": "qwen2",
                "general.size_label": "76K",
                "qwen2.block_count": 2,
                "qwen2.context_length": 256,
                "qwen2.embedding_length": 64,
                "qwen2.feed_forward_length": 96,
                "qwen2.attention.head_count": 4,
                "qwen2.attention.head_count_kv": 1,
                "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
                "qwen2.rope.freq_base": 500.0,
            },
        ),
        (
            SPECS["qwen3-yarn"],
            {
                **GENERAL,
                "general.architecture": "qwen3",
                "general.size_label": "123K",
                "qwen3.block_count": 2,
                "qwen3.context_length": 256,
                "qwen3.embedding_length": 64,
                "qwen3.feed_forward_length": 96,
                "qwen3.attention.head_count": 4,
                "qwen3.attention.head_count_kv": 2,
                "qwen3.attention.layer_norm_rms_epsilon": 1e-5,
                "qwen3.attention.key_length": 32,
                "qwen3.attention.value_length": 32,
                "qwen3.rope.freq_base": 500.0,
                "qwen3.rope.scaling.type": "yarn",
                "qwen3.rope.scaling.factor": 4.0,
                "qwen3.rope.scaling.original_context_length": 64,
            },
        ),
    ],
)
def test_the_keys_of_each_class(spec: Spec, wanted: Mapping[str, Any], tmp_path: Path) -> None:
    model = open_model(changed(tmp_path, spec))
    assert keys_of(model) == wanted
    assert model.source_class == spec.source_class


def about(folder: Path, readme: str | bytes, **config: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the general keys and the notes of a model with a README."""
    path = changed(folder, config=config)
    (path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    model = open_model(path)
    general = {key: value for key, value in keys_of(model).items() if key.startswith("general.")}
    return {key.removeprefix("general."): value for key, value in general.items()}, model.notes


PLAIN = {"architecture": "llama", "type": "model", "name": "Model", "size_label": "98K"}


def test_the_front_matter_gives_licence_and_base_model(tmp_path: Path) -> None:
    readme = """---
license: apache-2.0
license_link: https://example.org/licence
base_model: acme/Anvil-7B-Instruct-v1.5
language:
- en
- de
tags: [text-generation]
---
# Not front matter
license: other
"""
    assert about(tmp_path, readme, _name_or_path="acme/Hammer-99K-Chat") == (
        {
            "architecture": "llama",
            "type": "model",
            "name": "Hammer 99K Chat",
            "organization": "Acme",
            "basename": "Hammer",
            "finetune": "Chat",
            "size_label": "99K",
            "license": "apache-2.0",
            "license.link": "https://example.org/licence",
            "base_model.count": 1,
            "base_model.0.name": "Anvil 7B Instruct v1.5",
            "base_model.0.organization": "Acme",
            "base_model.0.version": "v1.5",
            "base_model.0.repo_url": "https://huggingface.co/acme/Anvil-7B-Instruct-v1.5",
            "languages": ["en", "de"],
            "tags": ["text-generation"],
        },
        (),
    )


@pytest.mark.parametrize(
    ("front_matter", "wanted"),
    [
        ("version: 1.5", {"version": "1.5"}),
        ("version: 2024-03-01", {"version": "2024-03-01"}),
        ("license: [mit, apache-2.0, 3]", {"license": "mit,apache-2.0,3"}),
        ("license: {name: mit}", {}),
        ("license:", {}),
        ("name: ''\nauthor: [a, b]", {"name": "model"}),
        ("name: true", {"name": "model"}),
        ("tags: [1, two, [three]]", {"tags": ["1", "two"]}),
        ("language: false", {}),
        ("base_model: [{name: 3}, 4]", {"base_model.count": 2, "base_model.0.name": "3"}),
        ("- only\n- a list", {}),
    ],
)
def test_front_matter_of_any_type(front_matter: str, wanted: Mapping[str, Any], tmp_path: Path) -> None:
    assert about(tmp_path, f"---\n{front_matter}\n---\n") == (PLAIN | wanted, ())


def test_broken_front_matter_is_left_out_and_told(tmp_path: Path) -> None:
    no_list, no_utf8, no_date = "license: [mit", b"license: \xff", "version: 2024-13-45"
    for i, readme in enumerate(("---\n" + no_list + "\n---\n", b"---\n" + no_utf8, "---\n" + no_date)):
        general, notes = about(tmp_path / str(i), readme)
        assert general == PLAIN
        assert len(notes) == 1
        assert notes[0].startswith("README.md: its front matter is left out (licence, base model): ")
        assert "\n" not in notes[0]


def test_sampling_defaults_are_carried_over(tmp_path: Path) -> None:
    folder = changed(tmp_path)
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 1, "min_p": "0.1", "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    keys = keys_of(open_model(folder))
    assert {key: value for key, value in keys.items() if "sampling" in key} == {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 1,
    }
