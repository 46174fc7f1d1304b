"""What is left open is settled once: rounding, calibration, metric and allocator, and what contradicts itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import TINY, call
from gguf import GGUFValueType
from recipes import recipe
from tiny_archs import write_tiny_arch
from tiny_models import write_tiny

from nsds_gguf import read
from nsds_gguf.calibration import CALIBRATIONS, generated_text
from nsds_gguf.errors import PlanError
from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize import ROUNDINGS
from nsds_gguf.records import K_TYPES, LayerScore, Model, Options, Recipe, Scores, Target, TensorCost, kv
from nsds_gguf.session.settle import check_possible, settle

OPEN = Options(target_bpw=4)
GPTQ = ("gptq", "generated")
RTN = ("rtn", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "wide", replace(TINY, n_layers=1))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return read.open_model(folder)


def imatrix_file(path: Path) -> Path:
    """Write llama.cpp's older form of an importance matrix, of one tensor."""
    name = b"blk.0.ffn_up.weight"
    head = np.array([1, len(name)], "<i4").tobytes() + name + np.array([1, 256], "<i4").tobytes()
    path.write_bytes(head + np.ones(256, "<f4").tobytes())
    return path


def scores_of(model: Model, made: Recipe) -> Scores:
    """Return scores that a recipe measured."""
    costs = (TensorCost("output.weight", 1.0, {"Q4_K": 0.1}, {"Q4_K": 0.0}, 1),)
    return Scores(made, (LayerScore(0, 0.5),), model.model_id, model.name, costs=costs)


# --- rounding and calibration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected", "obstacle"),
    [
        ({}, GPTQ, ""),
        ({"calibration": "generated"}, GPTQ, ""),
        ({"calibration": "random"}, RTN, ""),
        ({"calibration": "norm"}, ("rtn", "norm"), ""),
        ({"calibration": "none"}, ("rtn", "none"), ""),
        ({"rounding": "gptq"}, GPTQ, ""),
        ({"rounding": "gptq", "calibration": "random"}, ("gptq", "random"), ""),
        ({"rounding": "rtn"}, RTN, ""),
        ({"rounding": "rtn", "calibration": "generated"}, ("rtn", "generated"), ""),
        ({"allocator": "paper"}, RTN, ""),
        ({"allocator": "random"}, RTN, ""),
        ({"uniform": "Q4_K"}, RTN, ""),
        ({"uniform": "Q4_K", "rounding": "gptq"}, GPTQ, ""),
        ({"types": ("F16", "BF16")}, RTN, "no type is quantized"),
    ],
)
def test_rounding_and_calibration(
    model: Model, changed: dict[str, str], expected: tuple[str, str], obstacle: str
) -> None:
    found = settle(replace(OPEN, **changed), model)
    assert (found.recipe.rounding, found.recipe.calibration) == expected
    assert found.imatrix is None
    assert len(found.notes) == bool(obstacle) and all(obstacle in note for note in found.notes)


def test_tokens_that_the_model_generates(model: Model) -> None:
    made = scores_of(model, recipe(rounding="gptq", calibration="generated", calibration_tokens=5000))
    asked = replace(OPEN, calibration_tokens=20_000)
    assert settle(OPEN, model).recipe.calibration_tokens == 8192
    assert settle(asked, model).recipe.calibration_tokens == 20_000
    assert settle(OPEN, model, made).recipe.calibration_tokens == 5000
    assert settle(asked, model, made).recipe.calibration_tokens == 20_000
    assert settle(replace(OPEN, rounding="rtn"), model).recipe.calibration_tokens is None
    with pytest.raises(PlanError) as caught:
        settle(replace(asked, rounding="rtn"), model)
    assert str(caught.value) == (
        "--calibration-tokens counts text that the model generates, and the calibration is random; drop it, or pass "
        "--calibration generated"
    )


def test_an_importance_matrix_is_the_calibration(model: Model, tmp_path: Path) -> None:
    found = settle(replace(OPEN, imatrix=imatrix_file(tmp_path / "x.dat")), model)
    assert found.imatrix is not None and found.recipe.calibration == found.imatrix.name
    assert found.recipe.calibration == f"imatrix:{found.imatrix.sha256[:12]}"
    assert found.recipe.rounding == "rtn" and found.notes == ()


def test_a_large_model_is_rounded_to_nearest_and_the_user_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsds_gguf.session.settle.GPTQ_WEIGHTS", 500_000)
    written = tmp_path / "plan.json"
    outcome = call("plan", folder, "--target-bpw", 4, "--json", written, as_told=True)
    assert outcome.code == 0, outcome.err
    plan = json.loads(written.read_text())
    assert (plan["recipe"]["rounding"], plan["recipe"]["calibration"]) == RTN
    note = (
        "Weights are rounded to nearest (--rounding rtn) because the model has 0.0B parameters; --rounding gptq "
        "loses less in the same bytes."
    )
    assert plan["notes"][-1] == note and note in " ".join(outcome.out.split())
    assert "rounded to nearest" not in call("plan", folder, "--target-bpw", 4).out


@pytest.mark.parametrize(
    ("edit", "obstacle"),
    [
        ({"llama.attention.causal": kv(False, GGUFValueType.BOOL)}, "the model does not generate text"),
        ({"llama.pooling_type": kv(1, GGUFValueType.UINT32)}, "the model computes embeddings and generates no text"),
        ({"tokenizer.ggml.model": None}, "the model does not generate text"),
    ],
)
def test_a_model_that_generates_no_text(model: Model, edit: dict[str, object], obstacle: str) -> None:
    metadata = {key: entry for key, entry in {**model.metadata, **edit}.items() if entry is not None}
    found = settle(OPEN, replace(model, metadata=metadata))
    assert (found.recipe.rounding, found.recipe.calibration) == RTN
    assert f"because {obstacle}; --rounding gptq" in found.notes[0]


def test_scores_bring_their_rounding_and_calibration(model: Model) -> None:
    """They decide for the plans made of them where nothing else is named; plans that need no costs ignore them."""
    for made in (recipe(), recipe(rounding="gptq"), recipe(calibration="norm")):
        found = settle(OPEN, model, scores_of(model, made)).recipe
        assert (found.rounding, found.calibration) == (made.rounding, made.calibration)
    named = settle(replace(OPEN, rounding="rtn"), model, scores_of(model, recipe(rounding="gptq")))
    assert named.recipe.rounding == "rtn"
    other = settle(replace(OPEN, uniform="Q4_K"), model, scores_of(model, recipe(rounding="gptq"))).recipe
    assert (other.rounding, other.calibration) == RTN


def test_the_commands_take_what_scores_were_measured_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_text, "N_TOKENS", 512)
    for name, how in (("gptq", ()), ("rtn", ("--rounding", "rtn"))):
        scores, plan = tmp_path / f"{name}.json", tmp_path / "plan.json"
        scored = call("score", folder, *how, "--types", "Q2_K,Q4_K", "--json", scores, "-q", as_told=True)
        assert scored.code == 0, scored.err
        asked = ("--target-bpw", 4, "--types", "Q2_K,Q4_K", "--scores", scores, "--json", plan, "-q")
        assert call("plan", folder, *asked, as_told=True).code == 0
        assert json.loads(plan.read_text())["recipe"]["rounding"] == name


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OPEN, {"target": Target("bpw", 4), "allocator": "fisher", "types": K_TYPES, "metric": None, "se": None}),
        (Options(target_size=900_000), {"target": Target("size", 900_000), "allocator": "fisher"}),
        (Options(uniform="q4_k"), {"target": None, "allocator": "uniform", "types": ("Q4_K",)}),
        (replace(OPEN, allocator="paper"), {"types": ("Q2_K", "Q4_K"), "metric": "nsds", "se": "product"}),
        (
            replace(OPEN, allocator="nsds"),
            {"metric": "nsds", "se": "product", "score_weight": 1.0, "rounding": "rtn", "calibration": "norm"},
        ),
        (
            replace(OPEN, allocator="nsds", score_weight=2, rounding="gptq"),
            {"score_weight": 2, "rounding": "gptq", "calibration": "generated"},
        ),
        (replace(OPEN, score_weight=1.0), {"metric": "nsds", "se": "product", "score_weight": 1.0}),
        (replace(OPEN, score_weight=1.0, se="ratio"), {"metric": "nsds", "se": "ratio"}),
        (replace(OPEN, score_weight=1.0, metric="zd"), {"metric": "zd", "se": None}),
        (replace(OPEN, allocator="random", seed=7, prefer="fast"), {"seed": 7, "prefer": "fast", "device": "cpu"}),
    ],
)
def test_recipes(model: Model, options: Options, expected: dict[str, object]) -> None:
    found = vars(settle(options, model).recipe)
    assert {name: found[name] for name in expected} == expected


def test_layers_scored_for_their_own_sake_have_a_metric(model: Model) -> None:
    found = settle(Options(), model, scores_layers=True).recipe
    assert (found.metric, found.se, found.target) == ("nsds", "product", None)
    assert settle(Options(metric="mse"), model, scores_layers=True).recipe.metric == "mse"


def test_scores_bring_their_metric(model: Model) -> None:
    scores = scores_of(model, recipe(metric="nsds", se="ratio"))
    found = settle(replace(OPEN, score_weight=1.0), model, scores).recipe
    assert (found.metric, found.se) == ("nsds", "ratio")
    assert settle(OPEN, model, scores).recipe.metric is None


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_size": 900_000}, "--target-bpw and --target-size are two budgets; drop one"),
        ({"allocator": "uniform"}, "allocator uniform needs a type: --uniform TYPE"),
        (
            {"uniform": "Q4_K", "allocator": "paper"},
            "--uniform and --allocator paper contradict each other; drop one",
        ),
        ({"uniform": "Q9"}, f"--uniform: type 'Q9' is not known; wanted one of {', '.join(ggml.TYPES)}"),
        ({"allocator": "x"}, "allocator 'x' is not known; wanted one of fisher, nsds, paper, random, uniform"),
        ({"calibration": "x"}, f"calibration 'x' is not known; wanted one of {', '.join(CALIBRATIONS)}"),
        ({"rounding": "x"}, f"rounding 'x' is not known; wanted one of {', '.join(ROUNDINGS)}"),
        ({"device": "x"}, "device 'x' is not known; wanted one of cpu, cuda, torch-cpu"),
        ({"metric": "x", "score_weight": 1.0}, "metric 'x' is not known; wanted one of nsds, zd, mse, ewq, kurtboost"),
        ({"se": "x", "score_weight": 1.0}, "SE reading 'x' is not known; wanted one of ratio, product"),
        (
            {"se": "ratio", "metric": "zd", "score_weight": 1.0},
            "--se ratio applies to metric nsds, the metric is zd; drop one",
        ),
        (
            {"metric": "zd"},
            "--metric zd has no effect with allocator fisher and --score-weight 0; drop it, pass --score-weight, or "
            "choose --allocator paper",
        ),
        (
            {"rounding": "gptq", "calibration": "norm"},
            "--rounding gptq needs Hessians, which --calibration norm does not have; pass --calibration random or "
            "generated",
        ),
    ],
)
def test_what_contradicts_itself(model: Model, changed: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        settle(replace(OPEN, **changed), model)
    assert str(caught.value) == message


def test_an_importance_matrix_leaves_no_other_choice(model: Model, tmp_path: Path) -> None:
    path = imatrix_file(tmp_path / "x.dat")
    with pytest.raises(PlanError, match="--imatrix and --calibration generated contradict each other"):
        settle(replace(OPEN, imatrix=path, calibration="generated"), model)
    with pytest.raises(PlanError, match="--rounding gptq needs Hessians, which --calibration imatrix does not have"):
        settle(replace(OPEN, imatrix=path, rounding="gptq"), model)


def test_gptq_on_random_tokens_wants_a_model_that_can_be_followed(tmp_path: Path) -> None:
    model = read.open_model(write_tiny_arch(tmp_path / "experts.gguf", "deepseek2"))
    with pytest.raises(PlanError, match=r"cannot follow .* pass --calibration generated, which llama\.cpp computes"):
        check_possible(model, recipe(4, rounding="gptq"))
    check_possible(model, recipe(4, rounding="gptq", calibration="generated"))
    check_possible(model, recipe(4))


# --- candidate types --------------------------------------------------------------------------------------------------

WITH_Q8 = (*K_TYPES, "Q8_0")
WIDEST = (*WITH_Q8, "F16", "BF16")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(target_bpw=5.5), K_TYPES),  # 5.5 bits for matrices, 32 for norms
        (Options(target_bpw=5.6), WITH_Q8),
        (Options(target_bpw=6.5), WITH_Q8),
        (Options(target_bpw=6.7), WIDEST),
        (Options(), WIDEST),
        (Options(target_bpw=float("nan")), K_TYPES),
        (Options(target_bpw=6.7, types=("Q4_K", "Q6_K")), ("Q4_K", "Q6_K")),
        (Options(target_bpw=6.7, allocator="random"), K_TYPES),
        (Options(target_bpw=6.7, allocator="paper"), ("Q2_K", "Q4_K")),
    ],
)
def test_types_widen_where_the_budget_comes_near_the_largest(model, options, expected):
    assert settle(options, model).recipe.types == expected


def test_types_widen_for_a_budget_of_bytes(model):
    recipe_bytes = settle(Options(target_size=10**9), model).recipe
    assert recipe_bytes.types == WIDEST
    assert settle(Options(target_size=model.n_weights * 5 // 8), model).recipe.types == K_TYPES


def test_open_types_are_those_that_scores_measured(model):
    near = Options(target_bpw=6.7)
    assert settle(near, model, scores_of(model, recipe(types=K_TYPES))).recipe.types == K_TYPES
    assert settle(near, model, scores_of(model, recipe(types=WIDEST))).recipe.types == WIDEST
    assert settle(OPEN, model, scores_of(model, recipe(types=WIDEST))).recipe.types == K_TYPES
    assert settle(near, model, scores_of(model, recipe(types=("Q4_0",)))).recipe.types == ("Q4_0",)
