"""What sizes a model could have: ``convert`` and ``plan`` without a budget."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import TINY, call, listing, message
from tiny_archs import write_tiny_arch
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf.errors import UnsupportedError
from nsds_gguf.llamacpp.memory import Context, Memory
from nsds_gguf.publish.plot import plot_sizes
from nsds_gguf.session import sizes
from nsds_gguf.session.sizes import Size, Sizes

RTN = ("--rounding", "rtn", "--threads", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a model folder whose rows fit K-quants, a GGUF with rows of 64, and one that the pass cannot follow."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "wide", TINY)
    write_tiny_gguf(folder / "narrow.gguf")
    write_tiny_arch(folder / "latent.gguf", "deepseek2")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(*arguments):
    outcome = call(*arguments, "--json", "-", "--threads", "1", as_told=True)
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_rows_are_the_plans_of_their_budgets(models, here):
    found = table("convert", models / "wide")
    assert listing(here) == {} and found["format"] == "nsds-gguf sizes 2"
    assert [row["target_bpw"] for row in found["sizes"]] == [
        2.666, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 12, 16.022
    ]  # fmt: skip
    budgets = ",".join(str(row["target_bpw"]) for row in found["sizes"])
    assert call("plan", models / "wide", "--target-bpw", budgets, *RTN, "--json", "plans.json").code == 0
    for row, plan in zip(found["sizes"], json.loads(Path("plans.json").read_text()), strict=True):
        predicted = sum(t["sensitivity"] * t["error"] for t in plan["tensors"] if t["error"] is not None)
        assert row["predicted"] == pytest.approx(predicted, rel=1e-9)
        assert (row["bpw"], row["file_bytes"]) == (plan["sums"]["bpw"], plan["sums"]["file_bytes"])
    assert [row["predicted"] for row in found["sizes"]] == sorted(
        (r["predicted"] for r in found["sizes"]), reverse=True
    )
    assert max(found["sizes"][0]["types"], key=found["sizes"][0]["types"].get) == "Q2_K"
    assert set(found["sizes"][0]["types"]) == {"Q2_K", "F32"} and set(found["sizes"][-1]["types"]) == {"F16", "F32"}
    at_six = next(row["types"] for row in found["sizes"] if row["target_bpw"] == 6)
    assert "Q8_0" in at_six and "F16" not in at_six


def test_the_table_and_the_next_command(models, here):
    outcome = call("convert", models / "wide", "--threads", "1", "--types", "Q2_K,Q4_K,Q8_0", as_told=True)
    assert outcome.code == 0 and outcome.err == "" and listing(here) == {}
    lines = outcome.out.splitlines()
    assert lines[0].rstrip() == "Wide: possible sizes"
    (row,) = (line for line in lines if line.startswith("│   4.5 │ "))
    assert re.fullmatch(r"│   4.5 │ 0.50 MiB │ +0\.\d+ │ Q4_K \d+, Q\d_\w \d+, Q\d_\w \d+ │ Q3_K_L \(4.45\) │", row)
    assert "│ Q2_K 100 " in outcome.out and "│ Q8_0 100 " in outcome.out and "original: 1.79 MiB" in outcome.out
    assert (
        "note: Predictions are for round-to-nearest. convert rounds this model by GPTQ (--rounding gptq)" in outcome.out
    )
    assert lines[-2] == "Nothing was written. To convert to the smallest size below 0.05 nats per token, run:"
    command, bpw = lines[-1].rsplit(" ", 1)
    assert command == f"nsds-gguf convert {models}/wide --threads 1 --types Q2_K,Q4_K,Q8_0 --target-bpw"
    assert call(*lines[-1].split()[1:], "--no-verify", "-o", "out.gguf").code == 0
    size = next(row for row in table("plan", models / "wide", "--types", "Q2_K,Q4_K,Q8_0")["sizes"]
                if row["target_bpw"] == float(bpw))  # fmt: skip
    assert size["predicted"] < 0.05 and abs(Path("out.gguf").stat().st_size - size["file_bytes"]) <= 64


def test_a_gguf_whose_rows_fit_no_k_quant(models):
    found = table("plan", models / "narrow.gguf")
    first, *inner, last = (row["target_bpw"] for row in found["sizes"])
    assert inner == [5, 5.5, 6, 6.5, 7, 7.5, 8, 12] and set(found["sizes"][-1]["types"]) == {"F16", "F32"}
    assert call("plan", models / "narrow.gguf", "--target-bpw", first, *RTN).code == 0
    line = message(call("plan", models / "narrow.gguf", "--target-bpw", first - 0.001, *RTN), 4)
    assert f"nearest feasible: --target-bpw {first:g}; smaller with --types Q2_0," in line
    (plan,) = (json.loads(call("plan", models / "narrow.gguf", "--target-bpw", last + 1, *RTN, "--json", "-").out),)
    assert plan["sums"]["bpw"] == found["sizes"][-1]["bpw"]
    assert found["original_bytes"] == (models / "narrow.gguf").stat().st_size and found["in_nats"]


def test_a_model_whose_divergence_is_not_known_in_nats(models):
    outcome = call("convert", models / "latent.gguf", *RTN, "--json", "sizes.json")
    found = json.loads(Path("sizes.json").read_text())
    assert not found["in_nats"] and found["sizes"][0]["predicted"] == 1 and found["sizes"][-1]["predicted"] < 0.1
    assert found["notes"][-1] == (
        "The divergence is relative to that of the smallest size: it is not known in nats for this architecture."
    )
    assert "Nothing was written. To convert to one of these sizes, run:" in outcome.out


def test_one_type_is_one_size(models):
    (row,) = table("plan", models / "wide", "--types", "Q4_K")["sizes"]
    assert row["types"] == pytest.approx({"Q4_K": 1, "F32": 0}, abs=0.01)
    assert row["preset"] == "Q3_K_L"  # 4.45 bpw; Q4_K_S has 4.69


def test_scores_make_the_table_without_measuring(models, monkeypatch):
    assert call("score", models / "wide", *RTN, "--json", "scores.json", "-q").code == 0
    measured = table("plan", models / "wide")
    monkeypatch.setattr(sizes.Session, "measure", None)
    known = table("plan", models / "wide", "--scores", "scores.json")
    assert known["sizes"] == measured["sizes"] and known["rounding"] == "rtn"


@pytest.mark.parametrize("words", [("--tensor-type-file", "types.txt"), ("--why", "output.weight")])
def test_what_wants_one_plan_is_refused(models, words):
    line = message(call("plan", models / "wide", *words), 4)
    assert line == f"{words[0]} needs a plan, and a plan needs a budget: pass --target-bpw or --target-size"


def test_fixed_types_that_match_nothing_are_refused(models):
    assert message(call("convert", models / "wide", "--tensor-type", "nothing=Q4_K"), 4).startswith(
        "--tensor-type 'nothing=Q4_K' matches"
    )


@pytest.mark.parametrize(
    ("predicted", "in_nats", "proposed"),
    [((0.3, 0.06, 0.049, 0.01), True, 4), ((0.3, 0.2, 0.1, 0.06), True, 4.4), ((1, 0.2, 0.01, 0.001), False, 4.4)],
)
def test_proposed_size(predicted, in_nats, proposed):
    budgets = (3, 3.5, 4, 4.4)
    rows = tuple(Size(bpw, bpw, 1, p, {}, "Q4_K_S", 4.5) for bpw, p in zip(budgets, predicted, strict=True))
    assert Sizes("m", "0", 1, in_nats, "rtn", "random", rows, ()).proposed.target_bpw == proposed


# --- what fits --------------------------------------------------------------------------------------------------------


def eight_billion(beside=True):
    """Return sizes of a model of 8 B parameters, and caches that leave room for some of them."""
    rows = tuple(
        Size(bpw, bpw, int(bpw * 1e9), predicted, {"Q4_K": 1.0}, "Q4_K_S", 4.5)
        for bpw, predicted in ((3, 0.3), (4, 0.1), (5, 0.03), (6, 0.01))
    )
    contexts = (Context(4096), Context(65536))
    memories = tuple(Memory(0, cache, 0, 300_000_000, 0) for cache in (500_000_000, 8_000_000_000))
    return Sizes("Eight", "0", 16 * 10**9, True, "rtn", "random", rows, (), contexts, memories if beside else ())


def test_the_largest_size_that_fits():
    found = eight_billion()

    def largest(gb):
        sizes = [found.largest_that_fits(gb * 10**9, beside) for beside in found.beside]
        return [size and size.target_bpw for size in sizes]

    bpw = {gb: largest(gb) for gb in (3, 4, 5, 6, 12, 13, 24)}
    assert bpw == {3: [None, None], 4: [3, None], 5: [4, None], 6: [5, None], 12: [6, 3], 13: [6, 4], 24: [6, 6]}


def test_the_picture_has_a_point_per_size_and_a_row_per_memory(here):
    plot_sizes(eight_billion(), (4 * 10**9, 6 * 10**9, 24 * 10**9), here / "sizes.svg")
    text = (here / "sizes.svg").read_text()
    labels = re.findall(r"<!-- (.+?) -->", text)
    wanted = {"3", "4", "5", "6", "4 GB", "6 GB", "24 GB", "4096 tokens", "65536 tokens", "Eight: possible sizes"}
    assert wanted <= set(labels)
    plot_sizes(eight_billion(beside=False), (4 * 10**9,), here / "sizes.svg")
    assert "4 GB" not in re.findall(r"<!-- (.+?) -->", (here / "sizes.svg").read_text())


def test_the_sizes_verb(models, here):
    outcome = call("sizes", models / "wide", "--threads", "1", "--cache-type", "q8_0", "--plot", "sizes.png",
                   "--json", "sizes.json", as_told=True)  # fmt: skip
    assert outcome.code == 0, outcome
    found = json.loads(Path("sizes.json").read_text())
    assert found["contexts"] == [{"n_ctx": n, "cache_type": "q8_0"} for n in (4096, 16384, 65536)]
    assert [each["attention_cache"] for each in found["beside"]] == pytest.approx(
        [2 * 2 * 128 * n * 34 / 32 for n in (4096, 16384, 65536)], abs=6000
    )
    assert [(each["memory_bytes"] // 10**9, each["n_ctx"]) for each in found["fits"]] == [
        (gb, n) for gb in (4, 6, 8, 12, 16, 24) for n in (4096, 16384, 65536)
    ]
    assert {each["target_bpw"] for each in found["fits"]} == {16.022}
    for each, beside in zip(found["fits"], found["beside"] * 6, strict=True):
        total = sum(value for name, value in beside.items() if name != "weights")
        assert each["left"] == each["memory_bytes"] - total - found["sizes"][-1]["file_bytes"]
    assert Path("sizes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and len(listing(here)) == 2
    text = " ".join(outcome.out.split())
    assert "Wide: largest size that fits, bpw (divergence)" in text and re.search(r"│ 8 GB │ 16.022 \(0\.\d+\) │", text)
    command = outcome.out.splitlines()[-1]
    assert re.fullmatch(rf"nsds-gguf convert {models}/wide --threads 1 --target-bpw \d\S*", command)


def test_sizes_of_a_model_whose_memory_is_not_known(models, monkeypatch):
    def unknown(*_):
        raise UnsupportedError("the memory of architecture llama is not known: a test says so")

    monkeypatch.setattr(sizes, "memory_beside_weights", unknown)
    outcome = call("sizes", models / "wide", *RTN, "--json", "sizes.json")
    found = json.loads(Path("sizes.json").read_text())
    assert outcome.code == 0 and (found["beside"], found["fits"], len(found["sizes"])) == ([], [], 16)
    assert "What fits is not known: the memory of architecture llama is not known: a test says so." in found["notes"]
