"""tools/quality/real_quality.py and real_texts.py: tables, texts, and the whole on a tiny model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import quality_measure
import real_quality
import real_texts
from command import TINY
from gguf_weights import read_weights, write_weights
from quality_zoo import OURS, RTN, STOCK, STOCK_IMATRIX
from real_quality import RealBench
from tiny_models import write_tiny

from nsds_gguf.evaluate.texts import VerifyOptions, evaluation_text
from nsds_gguf.publish.chat import ChatTemplate
from nsds_gguf.read import open_model
from nsds_gguf.session.original import original_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)


def result(**klds: float) -> dict:
    """One model on two texts; on the second everything is twice as far from the original."""
    kinds = {"ours": OURS, "rtn": RTN, "stock": STOCK, "imatrix": STOCK_IMATRIX}
    rows = [
        {"text": text, "budget": "Q2_K", "kind": kinds[name], "bpw": 5.0, "kld": kld * scale, "kld_99": 9 * kld,
         "same_top": 0.75, "ppl": 20.0, "original_ppl": 19.0, "chunks": [kld * scale, kld * scale]}
        for text, scale in (("wiki", 1), ("code", 2)) for name, kld in klds.items()
    ]  # fmt: skip
    rows[-1]["chunks"] = [4 * value for value in rows[-1]["chunks"]]  # the last kind on the last text
    return {"name": "m", "n_weights": 2_000_000, "rows": rows}


def test_means_are_over_texts_and_the_worst_is_shown() -> None:
    found = real_quality.means_table([result(ours=0.1, rtn=0.4, stock=0.8, imatrix=0.5)])
    # Over the preset 1/8; over the preset with imatrix 1/5 and, on the second text, 1/20.
    assert "| m | Q2_K | 5.000 | 0.125 (0.125) | 0.100 (0.200) | 0.500 (0.500) | 0.400 (0.800) |" in found


def test_every_text_has_its_line() -> None:
    found = real_quality.full_table(result(ours=0.1, rtn=0.4, stock=0.8, imatrix=0.5))
    assert "| Q2_K | wiki | 0.200 ± 0.000 | 0.800 ± 0.000 | 0.8000, 7.200, 75.0 %, 20.00 |" in found
    assert found.count("\n| Q2_K |") == 2


def test_conversations_belong_to_their_model(tmp_path: Path) -> None:
    for name in ("chat-small", "chat-big", "code"):
        (tmp_path / f"{name}.txt").write_text(name)
    arguments = argparse.Namespace(text=[str(path) for path in sorted(tmp_path.iterdir())])
    assert real_quality.texts_of("big", arguments) == [("chat", "chat-big"), ("code", "code")]


def test_turns_follow_the_template() -> None:
    template = ChatTemplate(CHATML)
    assert real_texts.opening(template, "Why?") == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    wanted = "<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    assert real_texts.between_turns(template, "How?") == wanted


def test_questions_are_asked_until_the_tokens_are_written() -> None:
    conversation = real_texts.Conversation([], [5, 6])

    class Model:
        end_tokens = frozenset({2})

        def tokenize(self, text: str, **_: bool) -> np.ndarray:
            assert text.startswith("<|im_end|>\n<|im_start|>user\n" + real_texts.FOLLOW_UPS[1])
            return np.array([2, 8, 9])

    for drawn in (0, 0, 7, 2, 0, 0, 4):
        real_texts.advance(conversation, drawn, Model(), ChatTemplate(CHATML))  # type: ignore[arg-type]
    assert conversation.tokens == [5, 6, 7, 2, 8, 9, 4] and conversation.n_turns == 2


def test_code_is_that_of_the_standard_library(tmp_path: Path) -> None:
    real_texts.write_code(tmp_path / "code.txt")
    code = (tmp_path / "code.txt").read_text(encoding="utf-8")
    assert len(code) > 300_000 and '"""Heap queue algorithm' in code and "class Fraction" in code


@pytest.mark.slow
def test_a_model_has_all_rows_at_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_measure, "N_CTX", 32)
    monkeypatch.setattr(real_quality, "IMATRIX_CHARACTERS", 1500)
    with WorkFolder(tmp_path) as files:
        session = Session(open_model(write_tiny(tmp_path / "source", replace(TINY, n_layers=2))), Run(1), files)
        session.write(original_plan(session.model), tmp_path / "stored.gguf")
    write_weights(tmp_path / "tiny.gguf", read_weights(tmp_path / "stored.gguf"))
    text = evaluation_text(VerifyOptions())[:8000]
    bench = RealBench(tmp_path / "tiny.gguf", tmp_path / "work", [("novel", text), ("chat", text[::-1])], 3)
    found = bench.run(["Q3_K_M"])
    assert [passage.is_chat for passage in bench.passages] == [False, True]
    rows = found["rows"]
    assert [(row["text"], row["kind"]) for row in rows] == [
        (text, kind) for kind in (STOCK, STOCK_IMATRIX, OURS, RTN) for text in ("novel", "chat")
    ]
    most = max(row["tensor_bytes"] for row in rows)
    for row in rows:
        assert 0.97 * most < row["tensor_bytes"] and 0 < row["kld"] < row["kld_99"]
    assert "| tiny | Q3_K_M |" in real_quality.page(
        [found], {"commit": "c", "build": "b", "texts": ["novel"], "n_chunks": 3}
    )
