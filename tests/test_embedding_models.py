"""Models that embed texts: what the file says of pooling, and the check by cosine similarity to the original."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from command import QUICK, call, message
from gguf import GGUFReader, GGUFValueType
from llama_forward import matrix_inputs
from test_gguf_repair import rewritten
from tiny_gguf import N_EMBD, tiny_text, tiny_weights, write_tiny_gguf
from tiny_models import Spec, write_tiny

from nsds_gguf import read
from nsds_gguf.conversion import convert
from nsds_gguf.errors import ModelError, TextError, UnsupportedError, VerifyError
from nsds_gguf.evaluate.embedding import (
    FLOOR,
    N_PASSAGES,
    EmbeddingCheck,
    check_close,
    compare_embeddings,
    cosine,
    passages,
)
from nsds_gguf.evaluate.perplexity import perplexity
from nsds_gguf.evaluate.texts import VerifyOptions, check_vocabulary
from nsds_gguf.llamacpp.llama import embed, open_model
from nsds_gguf.records import Options, kv
from nsds_gguf.session.run import Run
from nsds_gguf.session.settle import settle
from nsds_gguf.system.workfolder import WorkFolder

TEXT = tiny_text()
MODULES = ("Transformer", "Pooling", "Normalize")


def with_modules(folder, kinds=MODULES, pooling=None, prompts=None):
    """Add what sentence-transformers keeps beside a model and return the folder."""
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    settings = {"word_embedding_dimension": 64, "include_prompt": True} | (pooling or {"pooling_mode_lasttoken": True})
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a model like Qwen3-Embedding: no head although config.json ties none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text(TEXT, encoding="utf-8")
    spec = Spec("Qwen3ForCausalLM", head_dim=32, n_embd=256, n_ff=256, omitted=("lm_head.weight",))
    return with_modules(write_tiny(tmp_path / "model", spec))


@pytest.fixture
def pooled(tmp_path):
    """Return a function that writes the tiny GGUF with a kind of pooling."""
    plain = write_tiny_gguf(tmp_path / "plain.gguf")
    return lambda number: rewritten(
        plain, tmp_path / f"pooling-{number}.gguf", keys={"llama.pooling_type": kv(number, GGUFValueType.UINT32)}
    )


def field(path, key):
    found = GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


# --- what the file says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "number"), [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, 1),
    ({"pooling_mode_cls_token": True}, 2),
    ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, 3),
    ({"pooling_mode": "mean"}, 1),
    ({"pooling_mode": "cls"}, 2),
    ({"pooling_mode": "lasttoken"}, 3),
])  # fmt: skip
def test_pooling_is_written(folder, pooling, number):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert read.open_model(folder).metadata["qwen3.pooling_type"] == kv(number, GGUFValueType.UINT32)


@pytest.mark.parametrize(("pooling", "told"), [
    ({"pooling_mode_max_tokens": True}, "pooling is pooling_mode_max_tokens;"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
     "pooling is pooling_mode_mean_tokens and pooling_mode_cls_token;"),
    ({"pooling_mode": "weightedmean"}, "pooling is pooling_mode 'weightedmean';"),
    ({}, "pooling is none;"),
])  # fmt: skip
def test_other_pooling_is_refused(folder, pooling, told):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UnsupportedError, match=f"{told} llama.cpp has one of mean, cls and last token"):
        read.open_model(folder)


def test_pooling_counts_without_modules(folder):
    (folder / "modules.json").unlink()
    model = read.open_model(folder)
    assert model.metadata["qwen3.pooling_type"] == kv(3, GGUFValueType.UINT32)
    assert any("1_Pooling/config.json, without modules.json) with last pooling" in note for note in model.notes)


def test_dense_module_is_refused(folder):
    with_modules(folder, (*MODULES[:2], "Dense"))
    with pytest.raises(UnsupportedError, match=r"module Dense comes after the model, which llama.cpp does not compute"):
        read.open_model(folder)


def test_damaged_modules(folder):
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"1_Pooling/config.json: cannot be read: .*; modules.json names it"):
        read.open_model(folder)
    (folder / "modules.json").write_text('[{"type": "x.Pooling", "path": "../elsewhere"}]')
    with pytest.raises(ModelError, match=r"path '../elsewhere' leads out of the folder"):
        read.open_model(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(ModelError, match=r"modules.json: not JSON"):
        read.open_model(folder)


def test_notes_say_length_and_prompts(folder):
    with_modules(folder, MODULES, prompts={"query": "Instruct: ", "document": ""})
    assert read.open_model(folder).notes[-2:] == (
        "An embedding model (modules.json) with last pooling; embeddings are normalized, as "
        "llama-embedding and llama-server do by default.",
        "sentence-transformers prepends a prompt to a text; for llama.cpp, add it yourself (query: 'Instruct: ').",
    )
    with_modules(folder, MODULES[:2])
    assert "embeddings are not normalized: pass --embd-normalize -1" in read.open_model(folder).notes[0]


def test_attention_both_ways_is_written(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    model = read.open_model(folder)
    assert model.metadata["qwen3.attention.causal"].value is False
    assert any(note.startswith("config.json: is_causal false: attention is bidirectional") for note in model.notes)


def test_head_is_not_missed_and_not_written(folder):
    model = read.open_model(folder)
    assert "output.weight" not in model.by_name and model.is_tied
    with WorkFolder(folder.parent) as files:
        check_vocabulary(model, VerifyOptions(n_ctx=32), TEXT, files)  # llama.cpp loads it so
    (folder / "modules.json").unlink()
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        read.open_model(folder)


# --- llama.cpp's embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "pool"), [
    (1, lambda rows: rows.mean(axis=0)), (2, lambda rows: rows[0]), (3, lambda rows: rows[-1]),
])  # fmt: skip
def test_embeddings_are_the_pooled_hidden_states(pooled, number, pool):
    texts = [np.array(ids, dtype=np.int32) for ids in ([1, 100, 101, 102], [1, 7], [1, *range(40, 90)])]
    found = embed(pooled(number), texts, n_threads=1)
    assert found.shape == (3, N_EMBD)
    for tokens, embedding in zip(texts, found, strict=True):
        hidden = matrix_inputs(tiny_weights(), tokens[np.newaxis])["output.weight"]
        np.testing.assert_allclose(embedding, pool(hidden), atol=1e-4)


def test_embedding_needs_pooling(tmp_path):
    with pytest.raises(VerifyError, match="does not say how embeddings are pooled"):
        embed(write_tiny_gguf(tmp_path / "plain.gguf"), [np.array([1, 5], dtype=np.int32)])


# --- the check -------------------------------------------------------------------------------------------------------


def test_file_has_its_own_embeddings(pooled):
    found = compare_embeddings(pooled(3), pooled(3), TEXT, n_ctx=64, n_threads=1)
    assert found.cosine_mean == pytest.approx(1, abs=1e-6) and found.cosine_min == pytest.approx(1, abs=1e-6)
    assert (found.n_passages, found.n_embd, found.pooling) == (N_PASSAGES, N_EMBD, "last")


def test_other_weights_have_other_embeddings(pooled, tmp_path):
    other = rewritten(write_tiny_gguf(tmp_path / "other.gguf", weights=tiny_weights(9)), tmp_path / "x.gguf",
                      keys={"llama.pooling_type": kv(3, GGUFValueType.UINT32)})  # fmt: skip
    found = compare_embeddings(other, pooled(3), TEXT, n_ctx=64, n_threads=1)
    assert abs(found.cosine_mean) < 0.2
    with pytest.raises(VerifyError, match=rf"other.gguf: embeddings are lost: .* wanted at least {FLOOR}; give it"):
        check_close(tmp_path / "other.gguf", found)
    check_close(other, EmbeddingCheck(FLOOR, 0.1, 64, 9, 64, "last", "", 1, {}))


def test_long_passages_are_cut_and_keep_eos(pooled, tmp_path):
    with_eos = rewritten(pooled(3), tmp_path / "eos.gguf",
                         keys={"tokenizer.ggml.add_eos_token": kv(True, GGUFValueType.BOOL)})  # fmt: skip
    found = compare_embeddings(with_eos, with_eos, TEXT, n_ctx=16, n_threads=1)
    assert found.n_tokens == sum(min(16, len(passage.encode()) + 3) for passage in passages(TEXT))  # BOS, space, EOS
    with open_model(with_eos, vocab_only=True) as model:
        assert model.tokenize(passages(TEXT)[0])[-1] == 2


def test_passages():
    found = passages("one two three four five " * 400)
    assert len(found) == N_PASSAGES and {text.split()[0] for text in found} <= {"one", "two", "three", "four", "five"}
    assert max(map(len, found)) > 700 and min(map(len, found)) < 41
    assert passages("short") == ["short"]
    with pytest.raises(TextError, match="nothing but white space"):
        passages(" \n ")


def test_cosine():
    first = np.array([[1, 0], [2, 0], [0, 0]], dtype=np.float32)
    second = np.array([[1, 1], [-3, 0], [1, 0]], dtype=np.float32)
    assert cosine(first, second).tolist() == pytest.approx([0.5**0.5, -1, 0])


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_convert_checks_embeddings(folder):
    outcome = call("convert", "model", "--uniform", "Q8_0", *QUICK, "--text", "tiny.txt", "-o", "out.gguf",
                   "--json", "out.json")  # fmt: skip
    assert outcome.code == 0, outcome
    found = json.loads((folder.parent / "out.json").read_text())[0]
    assert found["perplexity"] is None
    assert 0.99 < found["embedding"]["cosine_min"] <= found["embedding"]["cosine_mean"] < 1
    assert "cosine similarity to the original: mean 0.99" in " ".join(outcome.out.split())
    assert field("out.gguf", "qwen3.pooling_type") == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "out.gguf", "out.json", "tiny.txt"]


def test_bundle_tells_of_embeddings(folder):
    outcome = call("convert", "model", "--uniform", "Q8_0", *QUICK, "--text", "tiny.txt", "--bundle", "bundle")
    assert outcome.code == 0, outcome
    card = (folder.parent / "bundle" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card and "perplexity" not in card
    assert "| cosine similarity of embeddings to the original's | mean 0.99" in card
    assert "llama-embedding -m " in card


def test_gguf_with_pooling_is_checked_likewise(pooled):
    source = pooled(1)
    options, verifying = Options(uniform="Q8_0", calibration="none"), VerifyOptions(n_ctx=32)
    (result,) = convert(source, options, verifying=verifying, output=source.with_name("o.gguf"), run=Run(1))
    assert result.perplexity is None and result.embedding.pooling == "mean"
    assert 0.99 < result.embedding.cosine_min < 1


def test_perplexity_refuses(pooled):
    with pytest.raises(VerifyError, match=r"is an embedding model \(last pooling\), which perplexity cannot measure"):
        perplexity(pooled(3), TEXT)


def test_compare_refuses(folder):
    outcome = call("compare", "model", "--target-bpw", "5", "--text", "tiny.txt", "--ctx-size", "32", "-o", "compared")
    assert "is an embedding model" in message(outcome, 7)


def test_calibration_is_random_tokens(folder):
    model = read.open_model(folder)
    asked = Options(target_bpw=5)
    for rounding in ("rtn", "gptq"):
        found = settle(replace(asked, rounding=rounding), model)
        assert (found.recipe.rounding, found.recipe.calibration, found.notes) == (rounding, "random", ())
    found = settle(asked, model)
    assert (found.recipe.rounding, found.recipe.calibration) == ("rtn", "random")
    (note,) = found.notes
    assert "because the model computes embeddings and generates no text; --rounding gptq loses less" in note
