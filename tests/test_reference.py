"""What a conversion compares a finished file with when nobody says: the original, where it is a GGUF anyway."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command import TINY, call, listing
from tiny_gguf import tiny_text, write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf.calibration import generated_text
from nsds_gguf.evaluate import texts
from nsds_gguf.session import room, session
from nsds_gguf.session.room import BASE_MEMORY_BYTES
from nsds_gguf.system import resources

QUICK = ("--threads", "1", "--ctx-size", "64", "--chunks", "2", "--text", "tiny.txt")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with a GGUF, a model folder and a text; the model writes few tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generated_text, "N_TOKENS", 512)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    write_tiny(tmp_path / "model", replace(TINY, n_layers=1))
    (tmp_path / "tiny.txt").write_text(tiny_text())
    return tmp_path


def converted(*arguments, code=0):
    outcome = call("convert", *arguments, *QUICK, "-o", "out.gguf", "--force", "--json", "out.json")
    assert outcome.code == code and outcome.err == "", outcome
    (found,) = json.loads(Path("out.json").read_text())
    return found, outcome.out


def test_a_gguf_is_compared_with_itself():
    found, screen = converted("tiny.gguf", "--uniform", "Q4_0")
    divergence = found["perplexity"]["divergence"]
    assert found["reference"] == "original" and found["notes"] == []
    asked = call("perplexity", "out.gguf", *QUICK, "--reference", "tiny.gguf", "--json", "-")
    assert divergence == json.loads(asked.out)["divergence"] and 0.001 < divergence["kld_mean"] < 1
    mean, error = (f"{divergence[name]:.6f}" for name in ("kld_mean", "kld_error"))
    same = f"same top token {100 * divergence['same_top']:.1f} %"
    assert f"KL divergence from the original: {mean} ± {error} nats per token; {same}; perplexity " in screen
    assert screen.count("│ original ") == 1


def test_a_folder_is_compared_with_the_original_that_generated_the_text(here):
    before = listing(here)
    found, screen = converted("model", "--target-bpw", "4", "--calibration", "generated")
    assert found["reference"] == "original" and 0 < found["perplexity"]["divergence"]["kld_mean"] < 1
    assert "KL divergence from the original: " in screen
    assert set(listing(here)) - set(before) == {"out.gguf", "out.json"}


def test_the_original_of_a_folder_is_not_written_for_this_alone(monkeypatch):
    monkeypatch.setattr(session, "original_plan", None)
    found, screen = converted("model", "--uniform", "Q8_0")
    assert found["reference"] is None and "divergence" not in found["perplexity"] and "KL divergence" not in screen


def test_a_quantized_input_is_named_for_what_it_is():
    assert call("convert", "tiny.gguf", "--uniform", "Q5_0", "--no-verify", "-o", "q5.gguf").code == 0
    found, screen = converted("q5.gguf", "--uniform", "Q4_0", "--allow-requantize", "--report", "out.html")
    assert found["reference"] == "quantized input" and "KL divergence from the quantized input: 0." in screen
    assert '"reference":"the quantized input"' in Path("out.html").read_text()


def test_q8_0_counts_as_the_original():
    assert call("convert", "tiny.gguf", "--uniform", "Q8_0", "--no-verify", "-o", "q8.gguf").code == 0
    assert converted("q8.gguf", "--uniform", "Q4_0")[0]["reference"] == "original"


def test_without_memory_for_both_the_check_goes_on_without_the_original(monkeypatch):
    """Free memory holds what the check of the file alone takes, and not the original beside it."""
    n_vocab, both = 260, []
    monkeypatch.setattr(room, "lacks_memory", lambda n_bytes: both.append(n_bytes) or "3 GiB of memory, 2 are there")
    found, screen = converted("tiny.gguf", "--uniform", "Q4_0")
    assert found["reference"] is None and "divergence" not in found["perplexity"]
    note = "The KL divergence from the original is not measured: it takes 3 GiB of memory, 2 are there."
    assert found["notes"] == [note] and f"\nnote: {note}\n" in screen
    files = Path("tiny.gguf").stat().st_size + Path("out.gguf").stat().st_size
    n_rows = 2048 // 64 * 32 + 512  # logits of a batch, second halves of its chunks, and those being computed
    assert both == [BASE_MEMORY_BYTES + files + 2 * n_rows * n_vocab * 4]


def test_asked_for_it_is_no_longer_given_up(monkeypatch):
    monkeypatch.setattr(room, "lacks_memory", lambda _: "3 GiB of memory, 2 are there")
    assert converted("tiny.gguf", "--uniform", "Q4_0", "--reference", "original")[0]["reference"] == "original"
    assert converted("tiny.gguf", "--uniform", "Q4_0", "--reference", "tiny.gguf")[0]["reference"] == "tiny.gguf"


def test_the_time_told_counts_both(monkeypatch):
    tokens = []
    monkeypatch.setattr(room, "estimate_stages", lambda _, work, __: tokens.append(work.n_tokens) or [("write", 1.0)])
    converted("tiny.gguf", "--uniform", "Q4_0")
    converted("model", "--uniform", "Q8_0")
    assert tokens == [2 * 2 * 64, 2 * 64]


@pytest.mark.parametrize(
    ("available", "wanted"), [(2**31, ""), (2**31 - 1, "2.00 GiB of memory, 2.00 GiB are available"),
                              (2**30, "2.00 GiB of memory, 1.00 GiB are available")]
)  # fmt: skip
def test_memory_that_lacks(monkeypatch, available, wanted):
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: available)
    assert resources.lacks_memory(2**31) == wanted


def test_how_sentences_name_it():
    assert [texts.spoken(name) for name in ("original", "quantized input", "/a/b.gguf")] == [
        "the original", "the quantized input", "b.gguf"
    ]  # fmt: skip
