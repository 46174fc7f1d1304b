"""Comparison at equal bytes: what is measured, that it is equal, and that an interrupted run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import TINY, call, message
from tiny_models import write_tiny

from nsds_gguf import comparison as module
from nsds_gguf.allocate.candidates import candidates
from nsds_gguf.allocate.random_types import random_types
from nsds_gguf.comparison import Budgets, compare, exact_bpw
from nsds_gguf.errors import PlanError, RecordError, TargetError
from nsds_gguf.evaluate.perplexity import Perplexity, Window, perplexity
from nsds_gguf.evaluate.texts import VerifyOptions, evaluation_text
from nsds_gguf.read import open_model
from nsds_gguf.records import K_TYPES, Options
from nsds_gguf.records.comparison import (
    OURS,
    PAPER,
    PRESET,
    RANDOM,
    RANDOM_FIXED,
    UNIFORM,
    Comparison,
    Row,
    geometric_mean,
)
from nsds_gguf.session.run import Run

QUICK = VerifyOptions(n_ctx=32, n_chunks=2)
RTN = Options(rounding="rtn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("compare") / "model", TINY)


def run(model: Path, folder: Path, bpw: tuple[float, ...] = (4.0,), presets: tuple[str, ...] = ()) -> Comparison:
    return compare(model, folder, Budgets(bpw, presets, n_seeds=2), RTN, verifying=QUICK, run=Run(1))


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return run(model, tmp_path_factory.mktemp("found"), (4.0,), ("Q3_K_M",))


def row(**values: Any) -> Row:
    """Return a row of which only what is given matters."""
    plain = {
        "budget": "3 bpw", "kind": OURS, "detail": "", "tensor_bytes": 100, "bpw": 3.0, "ppl": 9.0, "ppl_error": 0.1,
        "kld": 0.1, "kld_error": 0.01, "same_top": 0.9, "original_ppl": 8.0, "original_ppl_error": 0.1,
        "n_scored_tokens": 10, "predicted": None, "key": "",
    }  # fmt: skip
    return Row(**{**plain, **values})


def of_rows(*rows: Row) -> Comparison:
    return Comparison("model", "id", 32, rows)


# Random types


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bpw", [2.9, 3.3, 5.0])
def test_random_types_use_the_budget(model: Path, bpw: float, padded: bool) -> None:
    opened = open_model(model)
    found = candidates(opened, K_TYPES)
    budget = int(bpw * opened.n_weights / 8)
    drawn = [random_types(found, budget, padded, seed) for seed in range(4)]
    step = min(c.cost("Q3_K", padded) - c.cost("Q2_K", padded) for c in found if c.is_open)
    for types in drawn:
        used = sum(candidate.cost(name, padded) for candidate, name in zip(found, types, strict=True))
        assert budget - 2 * step < used <= budget
    assert len(set(drawn)) == 4
    assert drawn[1] == random_types(found, budget, padded, 1)


def test_random_types_without_a_budget_are_a_free_draw(model: Path) -> None:
    found = candidates(open_model(model), K_TYPES)
    types = {name for seed in range(3) for name in random_types(found, None, False, seed)}
    assert types == {*K_TYPES, "F32"}


# What is compared


def test_every_kind_is_measured_at_every_budget(found: Comparison) -> None:
    assert found.budgets == ("4 bpw", "Q3_K_M")
    assert {r.kind for r in found.of("4 bpw")} == {OURS, PAPER, UNIFORM, RANDOM}
    assert {r.kind for r in found.of("Q3_K_M")} == {OURS, PAPER, UNIFORM, RANDOM, RANDOM_FIXED, PRESET}
    assert [r.detail for r in found.of("4 bpw") if r.kind == RANDOM] == ["seed 0", "seed 1"]
    assert found.missing == ()


def test_bytes_are_equal(found: Comparison) -> None:
    (preset,) = [r for r in found.rows if r.kind == PRESET]
    for r in found.of("Q3_K_M"):
        if r.kind in (RANDOM, RANDOM_FIXED) or (r.kind == OURS and not r.detail):
            assert 0.98 * preset.tensor_bytes < r.tensor_bytes <= preset.tensor_bytes  # tensors of 0.1 MB: coarse steps
    for r in found.rows:
        if r.kind == OURS and r.detail:
            (other,) = [o for o in found.of(r.budget) if r.detail == f"at the bytes of {o.kind}"]
            assert r.tensor_bytes <= other.tensor_bytes


def test_plans_predict_and_presets_do_not(found: Comparison) -> None:
    assert all((r.predicted is None) == (r.kind == PRESET) for r in found.rows)
    assert found.prediction_factor is not None
    assert found.prediction_rank_correlation is not None
    assert -1 <= found.prediction_rank_correlation <= 1


def test_the_numbers_are_those_of_the_files(model: Path, tmp_path: Path) -> None:
    """A single type, made and measured by hand, is the row of the comparison."""
    result = run(model, tmp_path / "out", (4.6,))
    (uniform,) = [r for r in result.rows if r.kind == UNIFORM]
    assert uniform.detail == "Q4_K"
    arguments = ["--threads", 1, "--no-verify", "-q"]
    assert call("convert", model, "--uniform", "Q4_K", "-o", tmp_path / "q4.gguf", *arguments).code == 0
    assert call("convert", model, "--uniform", "F16", "-o", tmp_path / "f16.gguf", *arguments).code == 0
    text = evaluation_text(QUICK)
    by_hand = perplexity(
        tmp_path / "q4.gguf", text, Window(n_ctx=32, n_chunks=2), n_threads=1, reference=tmp_path / "f16.gguf"
    )
    assert by_hand.divergence is not None
    assert (uniform.ppl, uniform.kld) == pytest.approx((by_hand.ppl, by_hand.divergence.kld_mean), rel=1e-4)


def test_our_plan_stands_beside_what_cannot_use_the_budget() -> None:
    ours, less = row(kld=0.1), row(kld=0.3, detail="at the bytes of uniform", tensor_bytes=80)
    found = of_rows(ours, row(kind=UNIFORM, kld=0.6, tensor_bytes=80), row(kind=RANDOM, kld=0.2), less)
    assert found.ratios(UNIFORM) == {"3 bpw": pytest.approx(0.5)}
    assert found.ratios(RANDOM) == {"3 bpw": pytest.approx(0.5)}


def test_ratios_are_to_the_mean_over_seeds() -> None:
    found = of_rows(row(kld=0.1), row(kind=RANDOM, kld=0.2), row(kind=RANDOM, kld=0.6))
    assert found.ratios(RANDOM) == {"3 bpw": pytest.approx(0.25)}
    assert geometric_mean([0.25, 4.0]) == pytest.approx(1.0)


def test_predictions_against_measurements() -> None:
    rows = [row(predicted=p, kld=k) for p, k in ((1.0, 0.1), (2.0, 0.2), (4.0, 0.8))]
    found = of_rows(*rows)
    assert found.prediction_factor == pytest.approx((0.1 * 0.1 * 0.2) ** (1 / 3))
    assert found.prediction_rank_correlation == pytest.approx(1.0)
    reverse = [row(predicted=p, kld=k) for p, k in ((1.0, 0.3), (2.0, 0.2), (4.0, 0.1))]
    assert of_rows(*reverse).prediction_rank_correlation == pytest.approx(-1.0)
    ties = [row(predicted=p, kld=k) for p, k in ((1.0, 0.1), (1.0, 0.2), (2.0, 0.3))]
    assert of_rows(*ties).prediction_rank_correlation == pytest.approx(1.5 / math.sqrt(3))
    assert of_rows(*rows[:2]).prediction_rank_correlation is None


@pytest.mark.parametrize("n_weights", [1, 7, 999_983, 4_592_640, 6_738_415_616])
def test_exact_bpw_is_the_smallest_that_allows_the_bytes(n_weights: int) -> None:
    for tensor_bytes in (n_weights // 3 + 1, n_weights, 2 * n_weights - 1):
        bpw = exact_bpw(tensor_bytes, n_weights)
        assert math.floor(bpw * n_weights / 8) == tensor_bytes


# Going on


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[Path]:
    """Record the files that are measured; stop as Ctrl-C does after some."""
    measured: list[Path] = []

    def watched(file: Path, *arguments: Any, **options: Any) -> Perplexity:
        if stop_after is not None and len(measured) == stop_after:
            raise KeyboardInterrupt
        measured.append(file)
        return perplexity(file, *arguments, **options)

    monkeypatch.setattr(module, "perplexity", watched)
    return measured


def test_an_interrupted_comparison_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = counting(monkeypatch, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "scores.json"]
    after = counting(monkeypatch)
    found = run(model, tmp_path)
    assert len(before) + len(after) == len({r.key for r in found.rows})
    third = counting(monkeypatch)
    assert run(model, tmp_path) == found
    assert third == []


def test_other_settings_are_measured_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(model, tmp_path)
    measured = counting(monkeypatch)
    longer = VerifyOptions(n_ctx=32, n_chunks=3)
    again = compare(model, tmp_path, Budgets((4.0,), n_seeds=2), RTN, verifying=longer, run=Run(1))
    assert len(measured) == len({r.key for r in again.rows})
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert {r["key"] for r in kept["rows"]} == {r.key for r in (*first.rows, *again.rows)}


def test_no_file_is_left(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, (4.0,), ("Q2_K",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "scores.json"]


# What is refused


def test_a_preset_that_is_not_known(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--presets IQ2_XS: not a preset that needs no importance matrix; known: Q2_K"):
        run(model, tmp_path, (), ("IQ2_XS",))


def test_a_budget_out_of_reach_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        run(model, tmp_path / "out", (1.0,))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "nsds-gguf comparison 2", "rows": [{}]}'])
def test_a_result_that_is_none(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(RecordError, match=r"comparison\.json: (not a comparison|damaged)"):
        run(model, tmp_path)
    assert (tmp_path / "comparison.json").read_text() == text


def test_allocations_that_a_budget_cannot_have_are_told(model: Path, tmp_path: Path) -> None:
    """The paper's layers may go down to Q2_K where ours may not."""
    options = replace(RTN, types=("Q3_K", "Q4_K"))
    found = compare(model, tmp_path, Budgets((3.5,), n_seeds=1), options, verifying=QUICK, run=Run(1))
    assert {r.kind for r in found.rows} == {OURS, PAPER, UNIFORM, RANDOM}
    (note,) = found.missing
    assert note.startswith("3.5 bpw: no fisher plan at the bytes of paper: target ")


# The command


def test_the_command_shows_table_and_writes_json_and_picture(model: Path, tmp_path: Path) -> None:
    outcome = call(
        "compare", model, "--target-bpw", "4", "--seeds", 1, "--threads", 1, "--ctx-size", 32, "--chunks", 2,
        "-o", tmp_path / "out", "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    data = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    ours = data["rows"][0]
    assert f"{ours['tensor_bytes']:,}" in outcome.out
    assert f"{ours['kld']:.5f}" in outcome.out
    assert "our divergence / that of random" in outcome.out


def test_a_picture_of_no_kind_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    outcome = call("compare", model, "--target-bpw", "4", "-o", tmp_path / "out", "--plot", tmp_path / "out.txt")
    assert message(outcome, 4).startswith("--plot")
    assert not (tmp_path / "out").exists()
