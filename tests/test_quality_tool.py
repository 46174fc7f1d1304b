"""tools/quality/quality.py: the halves of a text, measuring against kept logits, figures, and the whole on a tiny
model."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import quality
import quality_figures
import quality_measure
import quality_model
import quality_page
import quality_sensitivity
import quality_statistics
from command import TINY
from quality_measure import Passage, halves, spread
from quality_model import DEFAULT, FREE, ModelBench, Settings
from quality_zoo import GROUPS, ORACLE, OURS, RANDOM, STOCK, STOCK_IMATRIX, UNIFORM, ZOO, Entry
from tiny_models import write_tiny

from nsds_gguf.evaluate.perplexity import Window, perplexity
from nsds_gguf.evaluate.texts import VerifyOptions, evaluation_text

N_CTX = 32
TEXT = evaluation_text(VerifyOptions())[:6000]
CALIBRATION = evaluation_text(VerifyOptions())[6000:8000]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Short chunks, one budget a class at most, one mean of the paper's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_measure, "N_CTX", N_CTX)
        for module in (quality_model, quality_page):
            patch.setattr(module, "BUDGETS", ("Q3_K_M",))
            patch.setattr(module, "UNIFORM_TYPES", ("Q3_K",))
            patch.setattr(module, "PAPER_BITS", (3.0,))
        yield


@pytest.fixture(scope="module")
def settings() -> Settings:
    first, second = halves(TEXT)
    final = (Passage("novel", "final", second, 6),)
    return Settings(final, Passage("novel", "choosing", first, 4), CALIBRATION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def bench(folder: Path, settings: Settings) -> Iterator[ModelBench]:
    # Three layers: correlations over layers need as many.
    source = write_tiny(folder / "model", replace(TINY, n_layers=3))
    with ModelBench(Entry("tiny", fitted=True), source, folder / "work", settings) as made:
        yield made


@pytest.fixture(scope="module")
def result(bench: ModelBench) -> dict:
    return json.loads(json.dumps(bench.run()))


# Texts


def test_halves_are_cut_behind_a_line() -> None:
    text = "one\ntwo\nthree\nfour\n"
    assert halves(text) == ("one\ntwo\n", "three\nfour\n")
    assert halves("no line") == ("no ", "line")


@pytest.mark.parametrize(("n_all", "n_taken", "wanted"), [(10, 2, [2, 7]), (9, 3, [1, 4, 7]), (2, 5, [0, 1])])
def test_spread_is_even(n_all: int, n_taken: int, wanted: list[int]) -> None:
    assert spread(n_all, n_taken) == wanted


def test_calibration_is_taken_from_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_model, "CALIBRATION_BYTES", 40)
    monkeypatch.setattr(quality_model, "CALIBRATION_PIECES", 4)
    words = "".join(f"{i:03} " for i in range(100))
    (tmp_path / "text").write_text(words)
    (tmp_path / "text.xz").write_bytes(lzma.compress(words.encode()))
    wanted = ["000 001 00", "2 033 034 ", "065 066 06", "7 098 099 "]
    for name in ("text", "text.xz"):
        assert quality_model.calibration_text(tmp_path / name).split("\n") == wanted


# Measuring


def test_divergence_is_that_of_perplexity(bench: ModelBench, folder: Path) -> None:
    """All chunks of a text, against the package's own measurement, where both models run in step."""
    first = bench.bench.yardstick(Passage("all", "choosing", TEXT, 1))
    n_chunks = len(quality_measure.tokenized(bench.bench.reference, TEXT))
    yardstick = bench.bench.yardstick(Passage("all", "choosing", TEXT, n_chunks))
    file = folder / "one.gguf"
    plan = quality_sensitivity.one_tensor_plan(bench.bench, "blk.1.ffn_down.weight", "Q2_K", "random")
    bench.session.write(plan, file)
    found = perplexity(file, TEXT, Window(n_ctx=N_CTX, n_batch=4 * N_CTX), n_threads=1, reference=bench.bench.reference)
    measured = yardstick.measure(file, "key")
    assert found.n_chunks == n_chunks > 50 and len(first.chunks) == 1
    assert np.mean(measured.kld) == pytest.approx(found.divergence.kld_mean, rel=1e-6) and found.divergence.kld_mean > 0
    assert math.exp(np.mean(measured.nll)) == pytest.approx(found.ppl, rel=1e-6)
    assert math.exp(np.mean(measured.original_nll)) == pytest.approx(found.divergence.reference_ppl, rel=1e-6)
    assert np.mean(measured.same_top) == pytest.approx(found.divergence.same_top, rel=1e-6)


def test_one_tensor_is_quantized_and_the_others_are_not(bench: ModelBench) -> None:
    plan = quality_sensitivity.one_tensor_plan(bench.bench, "blk.1.ffn_down.weight", "Q2_K", "random")
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    assert types.pop("blk.1.ffn_down.weight") == "Q2_K"
    assert set(types.values()) == {"F32"}


@pytest.mark.slow
def test_measured_sensitivities_are_divergence_over_error(result: dict) -> None:
    names = [t["name"] for t in result["sensitivities"]]
    assert len(names) == len(set(names)) == 2 + 3 * 7
    for tensor in result["sensitivities"]:
        assert list(tensor["measured"]) == ["Q2_K", "Q3_K"]
        for m in tensor["measured"].values():
            assert m["alpha"] == pytest.approx(m["kld"] / m["e"]) and m["kld"] > 0


@pytest.mark.slow
def test_the_oracle_is_best_by_its_own_lights(result: dict) -> None:
    """No plan at the same bytes can have less measured sensitivity times error."""
    assert len(result["regret"]) == 9
    for entry in result["regret"]:
        assert all(ratio > 1 - 1e-3 for ratio in entry["ratios"].values())


@pytest.mark.slow
def test_what_single_errors_add_up_to(bench: ModelBench, result: dict) -> None:
    """Of the plan with every matrix at Q3_K: the sum of what was measured of its tensors' sensitivities and errors."""
    (row,) = [row for row in result["rows"] if row["kind"] == UNIFORM]
    errors = {cost.name: cost.errors["Q3_K"] for cost in bench.scores_of(DEFAULT).costs}
    terms = [t["measured"]["Q2_K"]["alpha"] * errors[t["name"]] for t in result["sensitivities"]]
    assert row["expected"] == pytest.approx(sum(terms), rel=1e-6)


@pytest.mark.slow
def test_bytes_are_equal(result: dict) -> None:
    rows = [row for row in result["rows"] if row["budget"] == "Q3_K_M"]
    (stock,) = [row for row in rows if row["kind"] == STOCK]
    assert {row["kind"] for row in rows} >= {STOCK, STOCK_IMATRIX, OURS, ORACLE, RANDOM}
    for row in rows:  # tensors of 0.1 MB: coarse steps
        assert 0.98 * stock["tensor_bytes"] < row["tensor_bytes"] <= stock["tensor_bytes"], row["kind"]


def test_layers_of_the_paper_have_the_mean_bits_asked_for(bench: ModelBench) -> None:
    scores = replace(bench.scores_of(FREE), layers=bench.metric_layers["nsds, ratio"])
    recipe = replace(FREE, target=bench.paper_target(3.2), allocator="paper")
    plan = quality_measure.planned(bench.session, recipe, scores)
    assert plan.notes[-1] == "2 of 3 layers are at 4 bits."
    assert {t.type for t in plan.tensors if t.name in quality_measure.OUTSIDE} == {"Q4_K"}


@pytest.mark.slow
def test_nothing_is_measured_twice(bench: ModelBench, result: dict, settings: Settings, folder: Path) -> None:
    log = folder / "work" / "measured.jsonl"
    before = log.read_text()
    again = ModelBench(bench.entry, folder / "model", folder / "work", settings)
    again.scores, again.metric_layers = bench.scores, bench.metric_layers
    again.bench.measure = lambda recipe, file, yardsticks, own=again.bench: [
        own._known[quality_measure.digest(recipe, y.digest, own._build)] for y in yardsticks
    ]
    assert json.loads(json.dumps(again.run())) == result
    assert log.read_text() == before


def test_a_passage_without_enough_text_is_refused(bench: ModelBench) -> None:
    with pytest.raises(quality_measure.TextError, match="wanted 10000 chunks in half of it"):
        bench.bench.yardstick(Passage("short", "final", TEXT, 10000))


# Figures and the page


def test_ratio_of_pairs() -> None:
    assert quality_statistics.paired_ratio([1, 2, 3], [2, 4, 6]) == pytest.approx((0.5, 0))
    value, error = quality_statistics.paired_ratio([1, 3], [2, 2])  # residuals -1, 1; sqrt(2 * 2) / 4
    assert (value, error) == pytest.approx((1, 0.5))
    assert quality_statistics.mean_and_error([1, 3]) == pytest.approx((2, 1))


def test_correlations() -> None:
    assert quality_statistics.rank_correlation([1, 2, 30], [2, 3, 4]) == pytest.approx(1)
    assert quality_statistics.log_correlation([1, 10, 100], [5, 50, 500]) == pytest.approx(1)
    assert quality_statistics.rank_correlation([1, 2], [2, 3]) is None
    assert quality_statistics.rank_correlation([1, 2, 3], [2, 2, 2]) is None


@pytest.mark.parametrize(
    ("value", "goal", "strict", "wanted"),
    [
        (0.6, 0.6, False, "0.600 (≤ 0.6)"),
        (0.61, 0.6, False, "**0.610** ✗ (≤ 0.6)"),
        (1.0, 1.0, True, "**1.000** ✗ (< 1)"),
        (None, 1.0, True, "– (< 1)"),
    ],
)
def test_what_is_not_reached_is_marked(value: float | None, goal: float, strict: bool, wanted: str) -> None:
    assert quality_figures.goal_cell(value, goal, strict) == wanted


def test_ours_is_compared_with_the_mean_of_the_seeds() -> None:
    def row(kind: str, *chunks: float) -> dict:
        return {"text": "t", "budget": "b", "kind": kind, "chunks": chunks}

    result = {"rows": [row(OURS, 1.0, 1.0), row(RANDOM, 1.0, 2.0), row(RANDOM, 3.0, 2.0)]}
    assert quality_figures.ratio(result, "t", "b", RANDOM) == pytest.approx((0.5, 0))
    assert quality_figures.ratio(result, "t", "b", STOCK) is None


@pytest.mark.slow
def test_the_page_has_every_table(result: dict) -> None:
    facts = {"texts": ["novel"], "n_chunks": 6, "sensitivity_chunks": 4, "n_ctx": N_CTX, "commit": "abc1234",
             "build": "b", "command": "c", "missing": ["big"], "trial": False, "imatrix": "collected."}  # fmt: skip
    text = quality_page.page([result], facts)
    assert "commit abc1234" in text and "**Not measured, the models are not there:** big." in text
    default, high = [line for line in text.splitlines() if line.startswith("| tiny | Q3_K_M |")]
    assert default.count("±") == 5 and quality_figures.NO_FIGURE not in default
    assert high.count("±") == 4 and default != high  # over stock twice and over the default
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 17
    for block in tables:
        assert len({line.count("|") for line in block.splitlines()}) == 1


# The zoo


def test_the_zoo_is_consistent() -> None:
    by_name = {entry.name: entry for entry in ZOO}
    assert len(by_name) == len(ZOO)
    assert {entry.group for entry in ZOO} <= set(GROUPS)
    for entry in ZOO:
        assert not set(entry.name) & set("/, ") and bool(entry.folder) != bool(entry.copy_of)
        if entry.copy_of:
            assert entry.fitted == by_name[entry.copy_of].fitted


def test_names_of_the_zoo_are_checked() -> None:
    names = [ZOO[2].name, ZOO[0].name]
    assert [entry.name for entry in quality.chosen(", ".join(names))] == names
    with pytest.raises(SystemExit, match="'nobody' is not in the zoo"):
        quality.chosen("nobody")
