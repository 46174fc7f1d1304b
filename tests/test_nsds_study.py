"""tools/quality/nsds_study.py and its page: files from the bank, priors, and figures of hand-made answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nsds_page
import nsds_study
import pytest
import quality_measure
from command import TINY
from nsds_priors import LAYERS_ALONE, Priors, component_scores
from nsds_study import ALONE, FACTOR, FISHER, PAPER, Study
from quality_measure import Passage, planned
from quality_model import FREE
from tiny_models import write_tiny

from nsds_gguf.evaluate.texts import VerifyOptions, evaluation_text
from nsds_gguf.records import LayerScore, Target


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder = tmp_path_factory.mktemp("study")
    source = write_tiny(folder / "model", replace(TINY, n_layers=4))
    passage = Passage("novel", "final", evaluation_text(VerifyOptions())[:6000], 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_measure, "N_CTX", 32)
        patch.setattr(nsds_study, "PAPER_BITS", (3.0,))
        patch.setattr(nsds_study, "K_BUDGETS", (3.5,))
        yield Study("tiny", source, folder / "work", passage, 1)


def test_the_bank_assembles_the_bytes_that_the_session_writes(study: Study, tmp_path: Path) -> None:
    bank = study.bank("rtn")
    bank.fill()
    plan = planned(study.session, FREE.to(Target("bpw", 3.7)), study.scores("rtn"))
    assert len({tensor.type for tensor in plan.tensors if len(tensor.shape) == 2}) > 1
    bank.write(plan, tmp_path / "assembled.gguf")
    study.session.write(plan, tmp_path / "written.gguf")
    assert (tmp_path / "assembled.gguf").read_bytes() == (tmp_path / "written.gguf").read_bytes()


def test_the_bank_quantizes_only_what_it_lacks(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = study.bank("rtn")
    bank.fill()
    monkeypatch.setattr(study.session, "write", None)
    plan = planned(study.session, replace(FREE.to(Target("bpw", 3.7)), allocator="random"))
    bank.write(plan, tmp_path / "assembled.gguf")
    lost = next(tensor for tensor in plan.tensors if tensor.name.endswith("ffn_up.weight"))
    (bank.folder / f"{lost.name}-{lost.type}").unlink()
    with pytest.raises(TypeError, match="NoneType"):
        bank.write(plan, tmp_path / "assembled.gguf")
    monkeypatch.undo()
    bank.write(plan, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "assembled.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("question", [PAPER, FACTOR, ALONE])
def test_every_question_has_its_rows_at_equal_bytes(study: Study, question: str) -> None:
    rows = study.run(question, "rtn")["rows"]
    kinds = [row["kind"] for row in rows]
    assert len(kinds) == len(set(kinds)) == {PAPER: 11, FACTOR: 9, ALONE: 8}[question]
    most = max(row["tensor_bytes"] for row in rows)
    for row in rows:
        assert row["tensor_bytes"] > 0.97 * most and all(value > 0 for value in row["chunks"]), row["kind"]


def test_priors_follow_role_and_score(study: Study) -> None:
    priors = Priors(
        study.session.model, {reading: study.layers[f"nsds, {reading}"] for reading in ("product", "ratio")}
    )
    name = "blk.1.ffn_down.weight"
    assert priors.sensitivity("role", name) == pytest.approx(1.10 / 4)
    assert priors.sensitivity("flat", name) == priors.sensitivity("flat", "output.weight") == 1
    scores = [layer.score for layer in study.layers["nsds, product"]]
    factor = math.exp(2 * (scores[1] - sum(scores) / 4))
    assert priors.sensitivity("role, layer 2 product", name) == pytest.approx(1.10 / 4 * factor)
    assert priors.sensitivity("role, layer 2 product", "output.weight") == 2.55
    assert all(priors.sensitivity(prior, name) > 0 for prior in LAYERS_ALONE)


def test_a_component_stands_among_the_layers_by_both_parts() -> None:
    def layer(i: int, nv: float, se: float) -> LayerScore:
        parts = dict.fromkeys(("qk", "ov", "gate", "up", "down"), nv)
        return LayerScore(i, 0.5, parts, dict.fromkeys(parts, se))

    found = component_scores([layer(0, 1.0, 5.0), layer(1, 2.0, 6.0), layer(2, 3.0, 7.0)])["up"]
    z = 1 / 1.4826  # of the first and the last: one MAD from the median
    p = [1 / (1 + math.exp(z)), 0.5, 1 / (1 + math.exp(-z))]
    assert found == pytest.approx([value - sum(p) / 3 for value in p], abs=1e-7)


# The page


def answer(name: str, question: str, kinds: dict[str, list[float]], rounding: str = "rtn", group: str = "g") -> dict:
    rows = [
        {
            "question": question,
            "rounding": rounding,
            "budget": "3",
            "kind": kind,
            "bpw": 3.0,
            "predicted": chunks[0],
            "chunks": chunks,
        }
        for kind, chunks in kinds.items()
    ]
    what = {"n_weights": 2_000_000, "n_layers": 4, "text": "novel", "n_chunks": 2}
    return {"name": name, "group": group, **what, "rows": rows}


def test_random_orders_are_averaged() -> None:
    found = answer("m", PAPER, {"random order 0": [1.0, 3.0], "random order 1": [3.0, 5.0], "mse": [1.0, 2.0]})
    assert nsds_page.chunks(found, "3", "random order") == [2.0, 4.0]
    assert nsds_page.ratio(found, "3", "mse", "random order") == pytest.approx((0.5, 0))
    assert nsds_page.chunks(found, "3", "ewq") is None


def test_ratios_are_averaged_with_their_errors() -> None:
    mean, error = nsds_page.mean_ratio([(0.5, 0.05), (2.0, 0.2), None])
    assert (mean, error) == pytest.approx((1.0, math.sqrt(2) * 0.1 / 2))
    assert nsds_page.mean_ratio([None]) is None


def test_a_weight_is_harmless_up_to_the_first_class_that_it_harms() -> None:
    kinds = {"0": [1.0, 1.0], "0.5 product": [0.9, 0.9], "1 product": [1.0, 1.01], "1.5 product": [1.1, 1.1],
             "2 product": [0.8, 0.8], "0.5 ratio": [1.2, 1.2]}  # fmt: skip
    good = answer("m", FACTOR, {kind: [1.0, 1.0] for kind in kinds}, "gptq")
    found = [answer("m", FACTOR, kinds), good]
    assert nsds_page.largest_harmless(found, "product") == 1
    assert nsds_page.largest_harmless(found, "ratio") == 0
    text = nsds_page.classes_table(found)
    assert "**1.100 ± 0.000**" in text and "**1.005" not in text


def test_the_page_names_the_fisher_plan_and_every_metric() -> None:
    paper = {"random order 0": [1.0, 1.0], FISHER: [0.5, 0.5], "nsds, product": [0.7, 0.9]}
    found = [
        answer("m", PAPER, paper),
        answer("m", FACTOR, {"0": [1.0, 1.0]}),
        answer("m", ALONE, {FISHER: [1.0, 1.0]}),
    ]
    text = nsds_page.page(found)
    assert "| m | 3 | 3.000 | 1.0000 | – | 0.800 ± 0.100 |" in text
    assert text.count("| m | g | 2.0 M | 4 | novel | 2 |") == 1 and text.count("\n## ") == 3
