"""The model in ``examples``: small, whole, of a shape that K-quants fit, and really trained."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

import nsds_gguf
from nsds_gguf.evaluate.perplexity import Window, perplexity

MODEL = Path(__file__).parents[1] / "examples" / "books-4.6m"
TEXT = Path(nsds_gguf.__file__).parent / "evaluate" / "old_curiosity_shop.txt"

MAX_FOLDER_BYTES = 10_000_000
MAX_BITS_PER_BYTE = 1.75
K_QUANT_BLOCK = 256  # weights; QK_K in ggml


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((MODEL / "config.json").read_text())


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    """Read the tensor table of the safetensors file: a length (u64), then JSON."""
    with (MODEL / "model.safetensors").open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(n_bytes))
    del table["__metadata__"]
    return table


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def expected_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Return name and shape of every tensor of a Llama with this configuration."""
    n_embd, n_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_q = config["num_attention_heads"] * config["head_dim"]
    n_kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": [n_embd],
        "self_attn.q_proj": [n_q, n_embd],
        "self_attn.k_proj": [n_kv, n_embd],
        "self_attn.v_proj": [n_kv, n_embd],
        "self_attn.o_proj": [n_embd, n_q],
        "post_attention_layernorm": [n_embd],
        "mlp.gate_proj": [n_ff, n_embd],
        "mlp.up_proj": [n_ff, n_embd],
        "mlp.down_proj": [n_embd, n_ff],
    }
    shapes = {"model.embed_tokens": [n_vocab, n_embd], "model.norm": [n_embd], "lm_head": [n_vocab, n_embd]}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def test_the_folder_stays_under_ten_megabytes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= MAX_FOLDER_BYTES


def test_config_and_safetensors_agree(config, header):
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not config["tie_word_embeddings"]
    assert {name: entry["shape"] for name, entry in header.items()} == expected_shapes(config)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"} == {config["dtype"].replace("bfloat", "BF")}


def test_tensor_data_is_complete(header):
    n_header_bytes = int.from_bytes((MODEL / "model.safetensors").read_bytes()[:8], "little")
    n_weights = sum(math.prod(entry["shape"]) for entry in header.values())
    assert (MODEL / "model.safetensors").stat().st_size == 8 + n_header_bytes + 2 * n_weights


def test_rows_fit_k_quants(header):
    for name, entry in header.items():
        assert entry["shape"][-1] % K_QUANT_BLOCK == 0, name


def test_tokenizer_belongs_to_the_model(config, tokenizer):
    assert tokenizer.vocab_size() == config["vocab_size"]
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (config["bos_token_id"], config["eos_token_id"])
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_tokenizer_loses_nothing(tokenizer):
    text = TEXT.read_text(encoding="utf-8") + "two  spaces\n\n\ttab, naïve – 中 🙂\r\n "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_evaluation_text_is_plain_prose():
    text = TEXT.read_bytes().decode("utf-8")
    assert text.startswith("CHAPTER 1\n\nNight is generally my time for walking.")
    assert text.endswith(".\n")
    assert 120 * 1024 <= len(text.encode()) <= 128 * 1024
    assert not set("#*_\r\t") & set(text)
    assert all(line == line.strip() for line in text.splitlines())


@pytest.mark.slow
def test_model_was_trained(tokenizer, tmp_path):
    """Bits per byte of text it never saw, by llama.cpp; an untrained model of this vocabulary has about 3.6."""
    file = tmp_path / "model.gguf"
    command = [sys.executable, "-m", "nsds_gguf", "convert", str(MODEL), "-o", str(file)]
    subprocess.run([*command, "--uniform", "BF16", "--no-verify"], check=True, capture_output=True, timeout=300)
    text = TEXT.read_text(encoding="utf-8")
    ppl = perplexity(file, text, Window(n_ctx=512), n_threads=1).ppl
    bits_per_byte = math.log2(ppl) * len(tokenizer.encode(text)) / len(text.encode())
    assert bits_per_byte <= MAX_BITS_PER_BYTE
