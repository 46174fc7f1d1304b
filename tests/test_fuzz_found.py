"""What fuzzing found (``tools/check/fuzz.py``), each with the smallest input that shows it: refused, for its reason.

The last test is the fuzzer itself, on a few inputs of every kind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_oracles as oracles
from fuzz_inputs import SMALL, gguf_parts, pieces, unigram_json
from fuzz_mutations import GgufParts, gguf_bytes
from gguf import GGUFValueType
from recipes import recipe
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny
from zoo_specs import write_spec

from nsds_gguf.calibration.imatrix import read_imatrix
from nsds_gguf.errors import ModelError, RecordError, TokenizerError, UnsupportedError
from nsds_gguf.publish.chat import find_format
from nsds_gguf.publish.model_card import find_origin
from nsds_gguf.publish.modelfile import chat_format, modelfile, parameters, special_texts
from nsds_gguf.read import open_model
from nsds_gguf.records import PLAN_FORMAT, Plan, kv

ROOT = Path(__file__).parent.parent
ODD_STEPS = {"type": "Sequence", "pretokenizers": 1.5}

Edit = Callable[[dict[str, Any]], object]


def edited(file: Path, edit: Edit) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    edit(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def setting(**values: Any) -> Edit:
    return lambda config: config.update(values)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "edit", "message"),
    [
        ("gemma3-multimodal", lambda config: config["text_config"].update(model_type={}), "language model of type {}"),
        ("smollm3", setting(num_hidden_layers="3"), "num_hidden_layers: wanted a positive integer, got '3'"),
        ("smollm3", setting(num_hidden_layers=2**31 - 1), "num_hidden_layers 2147483647: llama.cpp takes at most 512"),
        ("cohere", setting(num_hidden_layers="\ud800"), "num_hidden_layers: wanted a positive integer"),
        ("granite4-h-micro", setting(num_hidden_layers={}), "num_hidden_layers: wanted a positive integer, got {}"),
        ("mamba", setting(hidden_size="<unk>"), "hidden_size: wanted a positive integer, got '<unk>'"),
        ("mamba", setting(state_size=[16]), "state_size: wanted a positive integer, got [16]"),
        ("deepseek2", setting(first_k_dense_replace={"a": 1}), "first_k_dense_replace: wanted a positive integer"),
        ("gemma2", setting(num_attention_heads=0), "num_attention_heads: wanted a positive integer, got 0"),
        (
            "mixtral",
            setting(num_local_experts=2**31 - 1),
            "consists of 2147483647 matrices, the weights hold at most 65",
        ),
        ("granite", setting(logits_scaling=10**400), "logits_scaling: wanted a number, got 1000000000"),
        ("granite", setting(logits_scaling=float("nan")), "logits_scaling: wanted a number, got nan"),
        ("cohere", setting(model_max_length="long"), "context_length: wanted a number of type UINT32, got 'long'"),
        ("cohere", setting(model_max_length=2**32), "wanted a number of type UINT32, got 4294967296"),
        ("phi-3", setting(original_max_position_embeddings=-1), "wanted a number of type UINT32, got -1"),
    ],
)
def test_config(spec: str, edit: Edit, message: str, tmp_path: Path) -> None:
    model = write_spec(tmp_path, spec)
    edited(model / "config.json", edit)
    with pytest.raises(ModelError) as caught:
        open_model(model)
    assert message in str(caught.value)


def test_a_sampling_default_that_no_key_can_hold(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", SMALL)
    (model / "generation_config.json").write_text('{"top_k": 100000000000000000000}')
    with pytest.raises(ModelError, match=r"general.sampling.top_k: wanted a number of type INT32, got 1000000"):
        open_model(model)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "edit", "error", "message"),
    [
        ("converted", lambda t: t["post_processor"].update(single=True), TokenizerError, "wanted objects in 'single'"),
        ("converted", lambda t: t["post_processor"].update(single=[5]), TokenizerError, "wanted objects in 'single'"),
        (
            "bytes",
            setting(decoder=None, pre_tokenizer=ODD_STEPS),
            UnsupportedError,
            "neither byte-level",
        ),
    ],
)
def test_tokenizer(kind: str, edit: Edit, error: type[Exception], message: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", SMALL)
    if kind == "converted":
        oracles.write_converted_folder(model, pieces())
    edited(model / "tokenizer.json", edit)
    with pytest.raises(error, match=message):
        open_model(model)


def test_a_post_processor_that_adds_what_is_no_id(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", SMALL)
    oracles.write_converted_folder(model, pieces())
    edited(model / "tokenizer.json", lambda t: t["post_processor"]["special_tokens"]["<s>"].update(ids=[[1]]))
    with pytest.raises(ModelError, match=r"damaged post-processor template: wanted a token id, got \[1\]"):
        open_model(model)


def test_a_token_as_long_as_a_book(tmp_path: Path) -> None:
    """llama.cpp's process ends with a segmentation fault."""
    model = write_tiny(tmp_path / "model", SMALL)
    oracles.write_json(model / "tokenizer.json", unigram_json(pieces()))
    oracles.write_json(model / "tokenizer_config.json", {"eos_token": "</s>"})
    open_model(model)
    edited(model / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].append(["a" * 70_000, -1.0]))
    with pytest.raises(TokenizerError, match="token 269 has 70000 letters"):
        open_model(model)


def test_an_unknown_token_that_is_no_text(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", SMALL)
    oracles.write_converted_folder(model, pieces())
    edited(model / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(unk_token=["<unk>"]))
    assert "tokenizer.ggml.unknown_token_id" not in open_model(model).metadata


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_keys_of_a_gguf_that_are_of_another_kind() -> None:
    number, text = kv(3, GGUFValueType.UINT32), kv("x" * 70_000, GGUFValueType.STRING)
    metadata = {
        "general.architecture": kv("llama", GGUFValueType.STRING),
        "general.base_model.count": text,
        "general.sampling.temp": text,
        "llama.context_length": text,
        "tokenizer.ggml.tokens": number,
        "tokenizer.ggml.token_type": number,
        "tokenizer.ggml.bos_token_id": text,
        "tokenizer.ggml.eos_token_id": number,
    }
    assert find_origin(metadata).repos == ()
    assert special_texts(metadata) == ("", "")
    assert parameters(metadata) == {}
    assert chat_format(metadata) is None
    assert modelfile("a.gguf", metadata, None, []).endswith("FROM ./a.gguf\n")
    tokens = kv(["a"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    assert special_texts({**metadata, "tokenizer.ggml.tokens": tokens}) == ("", "")


def test_layers_without_end(tmp_path: Path) -> None:
    parts = gguf_parts(write_tiny_gguf(tmp_path / "whole.gguf"))
    keys = [(key, kind, 2**31 if key == "llama.block_count" else value) for key, kind, value in parts.keys]
    (tmp_path / "many.gguf").write_bytes(gguf_bytes(replace(parts, keys=keys)))
    with pytest.raises(ModelError, match=r"llama.block_count is 2147483648; llama.cpp takes at most 512 layers"):
        open_model(tmp_path / "many.gguf")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("tokenizer.ggml.bos_token_id", [1, 2], "an integer"),
        ("llama.pooling_type", [3], "an integer"),
        ("tokenizer.ggml.add_bos_token", "yes", "true or false"),
    ],
)
def test_keys_of_another_kind(key: str, value: object, wanted: str, tmp_path: Path) -> None:
    parts = gguf_parts(write_tiny_gguf(tmp_path / "whole.gguf"))
    entry = (key, 9, (5, value)) if isinstance(value, list) else (key, 8, value)  # an array of INT32, a text
    keys = [*((k, kind, v) for k, kind, v in parts.keys if k != key), entry]
    (tmp_path / "odd.gguf").write_bytes(gguf_bytes(replace(parts, keys=keys)))
    with pytest.raises(ModelError, match=f"key {key} is .*; wanted {wanted}: download the file again"):
        open_model(tmp_path / "odd.gguf")


def test_a_stream_wider_than_any_tensor(tmp_path: Path) -> None:
    parts = gguf_parts(write_tiny_gguf(tmp_path / "whole.gguf"))
    keys = [(key, kind, 2**31 if key == "llama.embedding_length" else value) for key, kind, value in parts.keys]
    (tmp_path / "wide.gguf").write_bytes(gguf_bytes(replace(parts, keys=keys)))
    with pytest.raises(ModelError, match=r"llama.embedding_length is 2147483648; no tensor is wider than \d+"):
        open_model(tmp_path / "wide.gguf")


def test_a_plan_without_weights() -> None:
    data = {"format": PLAN_FORMAT, "recipe": asdict(recipe()), "tensors": [], "header_bytes": 32, "model_id": "",
            "model_name": ""}  # fmt: skip
    with pytest.raises(RecordError, match="tensors: wanted at least one, with positive sizes"):
        Plan.from_json(data)


def test_a_plan_whose_numbers_no_sum_can_hold(tmp_path: Path) -> None:
    data = {"format": PLAN_FORMAT, "recipe": asdict(recipe()), "tensors": [], "header_bytes": 10**400, "model_id": "",
            "model_name": ""}  # fmt: skip
    with pytest.raises(RecordError, match="header_bytes: wanted an integer, got 1000"):
        Plan.from_json(data)


def test_a_count_of_parents_without_end() -> None:
    assert find_origin({"general.base_model.count": kv(2**63, GGUFValueType.UINT64)}).repos == ()
    url = kv("https://huggingface.co/org/base", GGUFValueType.STRING)
    counted = {"general.base_model.count": kv(1, GGUFValueType.UINT32), "general.base_model.0.repo_url": url}
    assert find_origin(counted).repos == ("org/base",)


@pytest.mark.parametrize(
    ("name", "n"), [("blk.0.attn_norm.weight", 32), ("blk.1.ffn_norm.weight", 63), ("output_norm.weight", 2)]
)
def test_a_norm_of_another_width_than_the_stream(name: str, n: int, tmp_path: Path) -> None:
    parts = gguf_parts(write_tiny_gguf(tmp_path / "whole.gguf"))
    open_model(tmp_path / "whole.gguf")
    cut = [(tensor, [n] if tensor == name else sizes, *rest) for tensor, sizes, *rest in parts.tensors]
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf_bytes(replace(parts, tensors=cut)))
    with pytest.raises(ModelError, match=f"tensor {name}: wanted 64 weights, the width of its input, got {n}"):
        open_model(file)


def test_counts_that_are_not_finite_say_nothing_on_the_screen(tmp_path: Path) -> None:
    data = np.array([np.inf, 1], "<f4").tobytes().ljust(32, b"\0") + np.array([np.inf], "<f4").tobytes()
    file = tmp_path / "imatrix.gguf"
    tensors = [("a.weight.in_sum2", [2, 1], 0, 0), ("a.weight.counts", [1, 1], 0, 32)]
    file.write_bytes(gguf_bytes(GgufParts([("general.type", 8, "imatrix")], tensors, data)))
    with pytest.raises(RecordError, match="wanted finite mean squares"):  # and no RuntimeWarning: an error here
        read_imatrix(file)


# --- texts and templates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\x00\x00\x80\x7f", b"\x01\x00\x80\x7f"], ids=["infinity", "a signalling NaN"])
def test_the_older_form_says_nothing_on_the_screen_either(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(b"\1\0\0\0" + b"\1\0\0\0a" + b"\1\0\0\0" + b"\1\0\0\0" + data + bytes(8))
    with pytest.raises(RecordError, match="wanted finite mean squares"):
        read_imatrix(tmp_path / "imatrix.dat")


def test_an_importance_matrix_without_columns(tmp_path: Path) -> None:
    data = b"\1\0\0\0" + b"\1\0\0\0a" + b"\1\0\0\0" + bytes(4) + bytes(8)
    (tmp_path / "imatrix.dat").write_bytes(data)
    with pytest.raises(RecordError, match="wanted finite mean squares"):
        read_imatrix(tmp_path / "imatrix.dat")


def test_a_pre_tokenizer_as_long_as_a_book_is_compared_in_time(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", SMALL)
    edited(model / "tokenizer.json", lambda tokenizer: tokenizer["pre_tokenizer"].update(type="a" * 300_000))
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer"):
        open_model(model)


def test_a_template_that_drops_the_prompt_for_a_system_prompt() -> None:
    template = (
        "{% for m in messages %}{% if messages[0].role != 'system' or m.role == 'system' %}"
        "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UnsupportedError, match="does not write every message once and in order"):
        find_format(template)


# --- the fuzzer itself ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_two_hundred_inputs_of_every_kind(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "check" / "fuzz.py",
            "--n",
            "200",
            "--seed",
            "5",
            "--json",
            tmp_path / "found.json",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "found:" not in done.stdout and done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["inputs"] == 200 and found["findings"] == []
    assert sum(counts.get("accepted", 0) + counts.get("refused", 0) for counts in found["counts"].values()) == 200
    assert found["counts"]["config.json"]["accepted"] > 10 and found["counts"]["config.json"]["refused"] > 10
    shutil.rmtree(tmp_path)
