"""The tools that build real models: what they change leaves logits, and folders hold the model of their GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from gguf import GGUFValueType
from gguf_folder import merges_of_scores, write_folder
from gguf_weights import GgufWeights, read_weights, write_weights
from off_grid import off_grid
from pad_width import EPSILON, pad_width
from real_models import MODELS
from tiny_models import SPECS, write_tiny
from tokenizer_strings import HAND_PICKED
from zoo_specs import write_spec

from nsds_gguf.llamacpp import llama
from nsds_gguf.read import open_model
from nsds_gguf.records import kv
from nsds_gguf.session.original import original_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

TOKENS = np.random.default_rng(3).integers(0, 280, 48).tolist()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 GGUF of each wiring, its vocabulary cut as SmolLM's.

    Epsilon is next to nothing, because llama.cpp has one for all norms: those of Gemma's heads are not padded.
    """
    folder = tmp_path_factory.mktemp(request.param)
    is_llama = request.param == "llama"
    source = write_tiny(folder / "source", SPECS["llama"]) if is_llama else write_spec(folder / "source", "gemma3")
    with WorkFolder(folder) as files:
        session = Session(open_model(source), Run(1), files)
        session.write(original_plan(session.model), folder / "stored.gguf")
    weights = read_weights(folder / "stored.gguf")
    weights.set("tokenizer.ggml.pre", "smollm", GGUFValueType.STRING)
    weights.set(EPSILON, 1e-9, GGUFValueType.FLOAT32)
    write_weights(folder / "model.gguf", weights)
    return folder / "model.gguf"


def logits(path: Path) -> np.ndarray:
    return llama.logits(path, TOKENS, n_threads=1)


def test_off_the_grid_it_computes_the_same(gguf: Path, tmp_path: Path) -> None:
    off_grid(gguf, tmp_path / "moved.gguf", seed=1)
    before, after = read_weights(gguf), read_weights(tmp_path / "moved.gguf")
    expected = logits(gguf)
    assert np.abs(logits(tmp_path / "moved.gguf") - expected).max() < 1e-3 * np.abs(expected).max()
    changed = {
        n.split(".")[2] for n, a in after.tensors.items() if not np.array_equal(a, before.tensors[n]) and "blk" in n
    }
    assert changed == {"attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                       "ffn_down"}  # fmt: skip
    ratio = after.tensors["blk.1.attn_q.weight"] / before.tensors["blk.1.attn_q.weight"]
    assert 0.77 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.29
    assert np.array_equal(after.tensors["token_embd.weight"], before.tensors["token_embd.weight"])


def test_padded_it_computes_the_same(gguf: Path, tmp_path: Path) -> None:
    pad_width(gguf, tmp_path / "padded.gguf", 256)
    padded = read_weights(tmp_path / "padded.gguf")
    assert padded.value("{arch}.embedding_length") == padded.tensors["blk.0.attn_q.weight"].shape[1] == 256
    assert padded.tensors["blk.0.ffn_down.weight"].shape[0] == len(padded.tensors["output_norm.weight"]) == 256
    expected = logits(gguf)
    assert np.abs(logits(tmp_path / "padded.gguf") - expected).max() < 2e-5 * np.abs(expected).max()


def test_a_stream_is_not_cut(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="more than 8"):
        pad_width(gguf, tmp_path / "cut.gguf", 8)


def test_the_folder_is_the_same_model(gguf: Path, tmp_path: Path) -> None:
    write_folder(gguf, tmp_path / "folder")
    made, original = open_model(tmp_path / "folder"), open_model(gguf)
    assert made.architecture == original.architecture and made.hparams == original.hparams
    assert {t.name for t in made.tensors} == {t.name for t in original.tensors}
    for tensor in original.tensors:
        np.testing.assert_allclose(made.by_name[tensor.name].load(), tensor.load(), rtol=1e-6, atol=1e-6)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    with llama.open_model(gguf, vocab_only=True) as model:
        for text in filter(None, HAND_PICKED):
            assert library.encode(text).ids == model.tokenize(text, parse_special=True).tolist(), repr(text)


def test_other_wirings_are_refused(gguf: Path, tmp_path: Path) -> None:
    weights = read_weights(gguf)
    weights.metadata["general.architecture"] = kv("qwen3", GGUFValueType.STRING)
    weights = GgufWeights(
        {k.replace(gguf.parent.name, "qwen3"): v for k, v in weights.metadata.items()}, weights.tensors
    )
    write_weights(tmp_path / "other.gguf", weights)
    for make in (off_grid, write_folder):
        with pytest.raises(SystemExit, match="architecture 'qwen3' is not one of llama, gemma3"):
            make(tmp_path / "other.gguf", tmp_path / "made")


def test_scores_become_merges_best_token_first() -> None:
    def keys(**values: object) -> dict:
        kind = GGUFValueType.ARRAY
        return {f"tokenizer.ggml.{name}": replace_kind(value, kind) for name, value in values.items()}

    def replace_kind(value: object, kind: GGUFValueType) -> object:
        return replace(kv([], kind, GGUFValueType.STRING), value=value)

    tokens = ["<s>", "a", "b", "ab", "ba", "aba"]
    metadata = keys(tokens=tokens, scores=[0.0, -9.0, -9.0, -2.0, -1.0, -3.0], token_type=[3, 1, 1, 1, 1, 1])
    weights = GgufWeights({"general.architecture": kv("llama", GGUFValueType.STRING), **metadata}, {})
    assert merges_of_scores(weights) == [["b", "a"], ["a", "b"], ["a", "ba"], ["ab", "a"]]


def test_padded_widths_are_whole_blocks() -> None:
    assert [package.padded_width for package in MODELS.values()] == [768, 768]
    assert all(len(package.sha256) == 64 for package in MODELS.values())
