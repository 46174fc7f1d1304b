"""Channel equalization: the same logits to the last bit, less error in the same bytes, nothing without need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import TINY
from outlier_copy import FIXED_FACTORS, N_FIXED, outlier_copy
from recipes import recipe, uniform
from test_outlier_copy import CASES
from tiny_models import write_tiny
from zoo import zoo_tokens
from zoo_logits import model_logits
from zoo_specs import SPECS, write_spec

from nsds_gguf.calibration import generated_text, random_tokens
from nsds_gguf.conversion import Converted, convert
from nsds_gguf.evaluate.texts import ORIGINAL, VerifyOptions
from nsds_gguf.quantize.equalization import LEAST, OUTSTANDING, Equalization, find_equalization
from nsds_gguf.read import open_model
from nsds_gguf.records import Model, Options, Plan
from nsds_gguf.session import calibrated
from nsds_gguf.session.calibrated import Calibrated
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

RECIPE = recipe(4.5)

# Whose layers are left alone, beside those with experts: latent attention, state spaces, one norm without gated units.
LEFT_ALONE = ("deepseek2", "falcon-h1", "mamba", "nemotron_h", "nemotron_h_moe", "phi2")


def calibration_of(model: Model, folder: Path) -> Calibrated:
    return Session(model, Run(1), WorkFolder(folder)).calibrated


def uneven(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Return made-up mean squares far apart, the same for all matrices of one width."""
    widths = {tensor.n_cols for tensor in model.tensors}
    drawn = {width: np.exp2(np.random.default_rng(seed + width).uniform(-20, 20, width)) for width in widths}
    return {tensor.name: drawn[tensor.n_cols] for tensor in model.tensors}


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    """Whatever the factors, in every class: llama.cpp computes what it computed."""
    model, tokens = open_model(write_spec(tmp_path / "checkpoint", name)), zoo_tokens(SPECS[name])
    equalization = find_equalization(model, uneven(model))
    in_layers = any(matrix.startswith("blk.") for matrix in equalization.columns)
    dense = {tensor.layer for tensor in model.tensors if tensor.role == "ffn_down"}  # leading ones, before experts
    attends = {tensor.layer for tensor in model.tensors if tensor.role == "attn_output"}
    if model.hparams.n_experts == 0:
        assert in_layers == (model.architecture not in LEFT_ALONE)
    else:
        assert in_layers == (bool(dense & attends) and model.architecture not in LEFT_ALONE)
    assert ("output.weight" in equalization.columns) == (not model.is_tied and "output_norm.weight" in model.by_name)
    changed = equalization.applied(model)
    before, after = (model_logits(m, tmp_path / f"{i}.gguf", tokens) for i, m in enumerate((model, changed)))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", CASES)
def test_planted_outliers_are_found(name: str, tmp_path: Path) -> None:
    """Factors of 10 to 30 on the same channels of every norm come out as powers of two within a factor of 4."""
    source = write_tiny(tmp_path / "source", replace(CASES[name], dtype="F32"))
    outlier_copy(source, tmp_path / "copy", seed=1)
    plain, planted = open_model(source), open_model(tmp_path / "copy")
    assert not calibration_of(plain, tmp_path).equalization(RECIPE)
    equalization = calibration_of(planted, tmp_path).equalization(RECIPE)
    factors = planted.by_name["blk.0.attn_norm.weight"].load() / plain.by_name["blk.0.attn_norm.weight"].load()
    large = factors > FIXED_FACTORS[0] - 0.1
    assert np.count_nonzero(large) == N_FIXED
    exponents = equalization.columns["blk.0.attn_q.weight"]
    assert np.abs(exponents[large] - np.log2(factors[large])).max() < 2
    assert all(np.array_equal(equalization.columns[f"blk.0.attn_{part}.weight"], exponents) for part in "kv")
    assert np.array_equal(equalization.rows["blk.0.attn_norm.weight"], -exponents)
    assert ("output.weight" in equalization.columns) == (not planted.is_tied)
    assert equalization.n_channels >= N_FIXED and f"{equalization.n_channels} outlier channels" in equalization.note


def test_one_channel_must_stand_out(tmp_path: Path) -> None:
    """Below a factor of ``2**OUTSTANDING`` nothing is changed; above, all from ``2**LEAST`` on are, and no others."""
    model = open_model(write_tiny(tmp_path / "model", CASES["llama"]))
    name = "blk.0.ffn_down.weight"
    norms = np.square(model.by_name[name].load().astype(np.float64)).sum(axis=0)

    def exponents(factors: dict[int, float]) -> dict[int, int]:
        logs = np.zeros(len(norms))
        logs[list(factors)] = list(factors.values())
        found = find_equalization(model, {name: norms * np.exp2(4 * logs)}).columns.get(name, np.zeros(len(norms)))
        return {int(i): int(found[i]) for i in np.flatnonzero(found)}

    others = {3: 1.4, 5: -1.1, 7: 0.9, 9: -0.9}
    assert exponents({**others, 1: OUTSTANDING - 0.01}) == {}
    assert exponents({**others, 1: OUTSTANDING + 0.01}) == {1: 3, 3: 1, 5: -1}
    assert exponents({**others, 1: -4.2}) == {1: -4, 3: 1, 5: -1}
    assert LEAST == 1


def test_what_is_weighed_follows(tmp_path: Path) -> None:
    """Columns times s multiply inputs over s: diagonals over s squared, full moments over both."""
    model = open_model(write_tiny(tmp_path / "model", CASES["llama"]))
    equalization = find_equalization(model, uneven(model))
    name = "blk.1.ffn_down.weight"
    exponents, n = equalization.columns[name], model.by_name[name].n_cols
    rows, x = model.by_name[name].load(), np.random.default_rng(0).normal(size=(50, n))
    changed, even = equalization.applied(model).by_name[name].load(), x / 2.0**exponents
    np.testing.assert_allclose(even @ changed.T, x @ rows.T)
    np.testing.assert_allclose(equalization.moments(name, x.T @ x), even.T @ even)
    weights = equalization.weights({name: (x**2).mean(axis=0).astype(np.float32)})[name]
    np.testing.assert_allclose(weights, (even**2).mean(axis=0) / (even**2).mean(), rtol=1e-5)
    stacked = equalization.weights({name: np.ones((2, n), np.float32), "other": np.ones(3, np.float32)})
    assert stacked[name].shape == (2, n) and np.allclose(stacked[name].mean(axis=1), 1)
    np.testing.assert_array_equal(stacked["other"], 1)
    assert equalization.moments("other", x) is x
    up = "blk.1.ffn_up.weight"  # changed on both sides
    factors = 2.0 ** (equalization.columns[up] + equalization.rows[up][:, np.newaxis])
    np.testing.assert_array_equal(equalization.applied(model).by_name[up].load(), model.by_name[up].load() * factors)
    part = equalization.applied(model).by_name[up].rows(slice(3, 9))
    np.testing.assert_array_equal(part, (model.by_name[up].load() * factors)[3:9])


def test_nothing_is_changed_without_need(tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path / "model", CASES["llama"]))
    even = {tensor.name: np.ones(tensor.n_cols) for tensor in model.tensors}
    for inputs in ({}, even, {name: np.zeros_like(values) for name, values in even.items()}):
        equalization = find_equalization(model, inputs)
        assert not equalization and equalization.applied(model) is model
    strange = replace(model.tensors[3], name="blk.0.attn_sub_norm.weight")
    other = replace(model, tensors=(*model.tensors, strange))
    found = find_equalization(other, uneven(model)).columns
    assert not any(name.startswith("blk.0.") for name in found) and "blk.1.attn_q.weight" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"rounding": "rtn"},
        {"rounding": "gptq", "calibration": "random"},
        {"rounding": "gptq", "calibration": "generated"},
        {"rounding": "rtn", "calibration": "none"},
    ],
)
def test_the_same_bytes_hold_more(how: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With outliers, divergence from the file as it was; the plan says what was changed, and makes the same file."""
    monkeypatch.setattr(random_tokens, "N_SEQUENCES_HESSIANS", 4)
    monkeypatch.setattr(generated_text, "N_TOKENS", 2048)
    source = write_tiny(tmp_path / "source", replace(TINY, dtype="F32"))
    outlier_copy(source, tmp_path / "copy", seed=1)
    checked = VerifyOptions(n_ctx=64, n_chunks=4, reference=ORIGINAL)
    options = Options(target_bpw=5.5, types=("Q4_K", "Q5_K", "Q6_K"), **how)

    def made(name: str, loaded: Plan | None = None) -> Converted:
        output = tmp_path / name
        return convert(tmp_path / "copy", options, verifying=checked, output=output, loaded=loaded, run=Run(1))[0]

    found = made("found.gguf")
    assert sum("outlier channels" in note for note in found.plan.notes) == 1
    again = made("again.gguf", found.plan)
    assert again.path.read_bytes() == found.path.read_bytes()
    monkeypatch.setattr(calibrated, "find_equalization", lambda *_: Equalization())
    without = made("without.gguf")
    assert not any("Outlier" in note for note in without.plan.notes)
    divergences = [done.perplexity.divergence.kld_mean for done in (found, without)]
    assert divergences[0] < 0.5 * divergences[1], divergences


def test_other_allocators_write_the_weights_as_they_are(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", replace(CASES["llama"], dtype="F32"))
    outlier_copy(source, tmp_path / "copy", seed=1)
    found = calibration_of(open_model(tmp_path / "copy"), tmp_path)
    assert found.equalization(RECIPE)
    assert not found.equalization(uniform("Q8_0"))
    assert not found.equalization(replace(RECIPE, allocator="paper"))
