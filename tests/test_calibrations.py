"""Calibrations by name: what each knows of columns, where tokens come from, and that a registered one is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from arrays import random_arrays
from models import make_model
from recipes import recipe
from recorded_inputs import recorded_inputs, without_first
from tiny_gguf import write_tiny_gguf

from nsds_gguf.calibration import generated_text, random_tokens
from nsds_gguf.calibration.evidence import Evidence, column_weights
from nsds_gguf.calibration.kinds import CALIBRATIONS, CalibrationKind, find_calibration
from nsds_gguf.calibration.random_tokens import RandomTokens, draw_tokens
from nsds_gguf.errors import PlanError
from nsds_gguf.read import open_model
from nsds_gguf.session.calibrated import Calibrated
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder


@pytest.fixture
def model():
    return make_model(*random_arrays(5, n_layers=1))


TYPES = {"Q4_K"}
GENERATED = recipe(calibration="generated", rounding="gptq")


def calibrated(model) -> Calibrated:
    return Session(model, Run(1), WorkFolder(Path())).calibrated


def test_the_kinds_are_described():
    assert list(CALIBRATIONS) == ["random", "generated", "imatrix", "norm", "none"]
    for name, kind in CALIBRATIONS.items():
        assert kind.name == name and kind.description and "\n" not in kind.description
    assert [name for name, kind in CALIBRATIONS.items() if kind.shrinkage is not None] == ["random", "generated"]
    with pytest.raises(PlanError, match="calibration 'tea leaves' is not known; wanted one of random, generated"):
        find_calibration("tea leaves")


def test_random_columns_are_mean_squares_of_mean_one(model, monkeypatch):
    monkeypatch.setattr(random_tokens, "draw_tokens", lambda model, n, seed: draw_tokens(model, n, 32, seed))
    found = calibrated(model)
    calibration = found.calibration(recipe())
    np.testing.assert_array_equal(calibration.tokens, draw_tokens(model, 4, 32))
    inputs, _ = recorded_inputs(model, calibration.tokens)
    weights = found.column_weights(recipe(), TYPES)
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight", "output.weight"):
        wanted = np.square(inputs[name], dtype="f8").mean(axis=0)
        np.testing.assert_allclose(calibration.column_moments(name), wanted, rtol=1e-5)
        np.testing.assert_allclose(weights[name], wanted / wanted.mean(), rtol=1e-5)
    assert calibration.note() == ""


def test_generated_columns_count_every_position_of_every_sequence(tmp_path, monkeypatch):
    """The text of all batches, where sensitivities are those of the first eight sequences."""
    monkeypatch.setattr(generated_text, "N_TOKENS", 10 * 16)
    monkeypatch.setattr(generated_text, "LENGTH", 16)
    monkeypatch.chdir(tmp_path)
    found = calibrated(open_model(write_tiny_gguf(tmp_path / "tiny.gguf")))
    calibration = found.calibration(GENERATED)
    assert calibration.tokens.shape == (10, 16)
    inputs, _ = recorded_inputs(found.model, calibration.tokens)
    name = "blk.1.ffn_down.weight"
    wanted = np.square(inputs[name], dtype="f8").mean(axis=0)
    np.testing.assert_allclose(calibration.column_moments(name), wanted, rtol=1e-4)
    np.testing.assert_allclose(calibration.column_weights(name), np.maximum(wanted / wanted.mean(), 1e-4), rtol=1e-4)
    of_first = np.square(without_first(inputs[name][:128], 16), dtype="f8").mean(axis=0)
    np.testing.assert_allclose(found.sensitivities(GENERATED).inputs[name], of_first, rtol=1e-4)


def test_norm_gains_and_none(model):
    found = calibrated(model)
    gain = model.by_name["blk.0.ffn_norm.weight"].load().astype("f8")
    weights = found.column_weights(recipe(calibration="norm"), TYPES)
    np.testing.assert_allclose(weights["blk.0.ffn_up.weight"], gain**2 / (gain**2).mean(), rtol=1e-6)
    assert "blk.0.ffn_down.weight" not in weights  # no norm in front
    assert found.column_weights(recipe(calibration="none"), TYPES) == {}


def test_an_importance_matrix_must_be_given(model):
    with pytest.raises(PlanError, match="calibration imatrix: wanted the file"):
        find_calibration("imatrix").make(Evidence(model))


@dataclass(frozen=True)
class Ramp(RandomTokens):
    """Columns weigh as their number says."""

    def column_moments(self, name):
        return np.arange(1.0, self.evidence.model.by_name[name].n_cols + 1)

    def note(self):
        return f"{self.evidence.tokens.size} tokens"


def test_a_calibration_that_is_registered_is_used(model, monkeypatch):
    tokens = np.array([[1, 2, 3, 4]])
    monkeypatch.setitem(CALIBRATIONS, "ramp", CalibrationKind("ramp", "columns in order", Ramp, lambda request: tokens))
    ramp = recipe(calibration="ramp")
    found = calibrated(model)
    calibration = found.calibration(ramp)
    weights = column_weights(calibration, model)["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(weights, np.arange(1, len(weights) + 1) / np.arange(1, len(weights) + 1).mean())
    assert calibration.note() == "4 tokens"
    own, of_random = found.sensitivities(ramp).sensitivity, found.sensitivities(recipe()).sensitivity
    assert own.keys() == of_random.keys() and own != of_random  # its tokens are read
