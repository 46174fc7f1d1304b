"""Predicted divergence in words: the share of positions with the original's next token, and a budget that helps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import Spec, write_tiny

from nsds_gguf.conversion import plan
from nsds_gguf.records import Options, Plan, Scores
from nsds_gguf.session.agreement import GOOD, LEAST, expected_agreement, is_acceptable
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session

NOTE = re.compile(
    r"At (\S+) bpw this model is expected to pick the original's next token at about (\d+) % of positions"
    r"(?:; at (\S+) bpw: (\d+) %)?\."
)


# Predicted divergence and measured share, in %, of plans at the bytes of Q2_K, Q3_K_M and Q4_K_M (docs/quality.json).
MEASURED = {
    "books-4.6m": ((0.0589, 82.7), (0.0172, 90.4), (0.0059, 94.1)),
    "books-11m": ((0.0213, 88.9), (0.0059, 93.9), (0.0017, 96.6)),
    "normed": ((0.1189, 77.0), (0.0352, 86.4), (0.0111, 91.7)),
    "full": ((0.2098, 72.8), (0.0587, 85.4), (0.0188, 90.7)),
    "deep": ((0.1012, 80.3), (0.0296, 89.2), (0.0096, 93.9)),
    "wide": ((0.1091, 80.6), (0.0320, 88.5), (0.0098, 93.5)),
    "SmolLM2-135M": ((0.4600, 64.1), (0.2971, 71.7), (0.1201, 80.9), (0.0517, 86.7), (0.0188, 91.2)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_fit_holds_for_plans_that_were_measured(name: str) -> None:
    for divergence, same in MEASURED[name]:
        assert abs(100 * expected_agreement(divergence) - same) < 3.5


def test_no_divergence_is_agreement() -> None:
    assert expected_agreement(0.0) == 1.0 and expected_agreement(0.886) == pytest.approx(0.517, abs=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = Spec("LlamaForCausalLM", n_embd=256, n_ff=256, head_dim=64, n_layers=1, seed=3)
    return write_tiny(tmp_path_factory.mktemp("models") / "model", spec)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = Spec("LlamaForCausalLM", n_embd=224, n_ff=256, head_dim=64, n_layers=1, seed=3)
    return write_tiny(tmp_path_factory.mktemp("models") / "narrow", spec)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tensor a hundred times as sensitive: random models predict next to nothing, so little is lost."""
    measure = Session.measure

    def raised(session: Session, scores: Scores, recipe: object) -> Scores:
        found = measure(session, scores, recipe)  # type: ignore[arg-type]
        factor = 100 / sum(cost.sensitivity for cost in found.costs)
        return replace(found, costs=tuple(replace(c, sensitivity=factor * c.sensitivity) for c in found.costs))

    monkeypatch.setattr(Session, "measure", raised)


def notes_of(found: Plan) -> list[re.Match[str]]:
    return [match for note in found.notes if (match := NOTE.fullmatch(note))]


def planned(source: Path, **options: object) -> list[Plan]:
    asked = [Options(target_bpw=bpw, rounding="rtn", **options) for bpw in (3.4, 8)]  # type: ignore[arg-type]
    return plan(source, asked, run=Run(1)).plans


@pytest.mark.usefixtures("fragile")
def test_a_plan_that_costs_too_much_says_so_in_words(folder: Path) -> None:
    low, high = planned(folder)
    (match,) = notes_of(low)
    assert low.predicted_divergence is not None and high.predicted_divergence is not None
    assert match[1] == f"{low.bpw:.3g}"
    assert int(match[2]) == round(100 * expected_agreement(low.predicted_divergence)) < 100 * LEAST
    (better,) = plan(folder, Options(target_bpw=float(match[3]), rounding="rtn"), run=Run(1)).plans
    assert better.predicted_divergence is not None and float(match[3]) % 0.5 == 0 and low.bpw < better.bpw
    assert int(match[4]) == pytest.approx(100 * expected_agreement(better.predicted_divergence), abs=1)
    assert int(match[4]) >= 100 * GOOD and is_acceptable(better)
    assert not notes_of(high) and not notes_of(better)


@pytest.mark.usefixtures("fragile")
def test_the_better_budget_of_a_padded_plan_needs_no_padding(narrow: Path) -> None:
    low, _ = planned(narrow)
    assert low.recipe.padding == "width"
    (match,) = notes_of(low)
    better = plan(narrow, Options(target_bpw=float(match[3]), rounding="rtn", pad="off"), run=Run(1)).plans[0]
    assert better.predicted_divergence is not None
    assert int(match[4]) == pytest.approx(100 * expected_agreement(better.predicted_divergence), abs=1)


def test_a_plan_that_a_model_bears_says_nothing(folder: Path) -> None:
    low, high = planned(folder)
    assert low.predicted_divergence is not None and low.predicted_divergence < 0.17 and is_acceptable(low)
    assert not notes_of(low) and not notes_of(high)
