"""Noise that llama.cpp adds to one tensor at a time: against files with the same noise, and against Fisher's."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_resume import Stopping
from test_resume import run as converted
from tiny_archs import ARCHITECTURES, write_tiny_arch
from tiny_gguf import N_VOCAB, tiny_weights, write_tiny_gguf

from nsds_gguf import Options
from nsds_gguf.calibration import generated_text
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.read import open_model
from nsds_gguf.records import Model
from nsds_gguf.sensitivity import noise
from nsds_gguf.sensitivity.fisher import fisher
from nsds_gguf.sensitivity.moment_propagation import propagate
from nsds_gguf.sensitivity.noise import RELATIVE_ERROR, Noisy, noise_divergence, noisy_tensors, with_noise
from nsds_gguf.system.store import Store

N_POSITIONS = 64


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let llama.cpp keep keys and values in F32, as ``logits`` does."""
    monkeypatch.setattr(noise, "open_context", functools.partial(noise.open_context, exact=True))


def tokens(n_sequences: int = 2) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(3, N_VOCAB, (n_sequences, N_POSITIONS))


def changed(weights: NDArray[np.float32], tensor_name: str, model: Model) -> NDArray[np.float32]:
    """Return weights with the noise that ``noise`` adds to products with them."""
    tensor = model.by_name[tensor_name]
    matrices = weights.reshape(-1, *weights.shape[-2:]).copy()
    for i, matrix in enumerate(matrices):
        signs = noise._signs(tensor, i * tensor.n_matrix_rows, matrix.shape)
        matrix += np.float32(math.sqrt(RELATIVE_ERROR)) * signs * matrix
    return matrices.reshape(weights.shape)


def log_chances(file: Path, sequence: NDArray[np.int64]) -> NDArray[np.float64]:
    rows = logits(file, sequence.tolist(), n_threads=1)[noise.SCORED_FROM :].astype(np.float64)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def divergence(file: Path, other: Path, texts: NDArray[np.int64]) -> float:
    found = []
    for sequence in texts:
        wanted, got = log_chances(file, sequence), log_chances(other, sequence)
        found.append((np.exp(wanted) * (wanted - got)).sum(axis=1).mean())
    return float(np.mean(found))


@pytest.mark.parametrize("role", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down"])
@pytest.mark.usefixtures("exact")
def test_noise_is_that_of_changed_weights(role: str, tmp_path: Path) -> None:
    """Seven tensors share a reading, so that each must get its own noise and no other's."""
    file, name = write_tiny_gguf(tmp_path / "model.gguf"), f"blk.0.{role}.weight"
    model, weights = open_model(file), tiny_weights()
    noisy = noisy_tensors(model, {*model.by_name} - {"token_embd.weight"})
    found = noise_divergence(file, noisy, tokens(), n_threads=1)
    weights[name] = changed(weights[name], name, model)
    other = write_tiny_gguf(tmp_path / "other.gguf", weights=weights)
    assert found[Noisy(model.by_name[name])] == pytest.approx(divergence(file, other, tokens()), rel=0.005)
    assert found[Noisy(model.by_name["token_embd.weight"], True)] > 0


@pytest.mark.parametrize("role", ["attn_k_b", "attn_v_b", "ffn_up_exps", "ffn_down_exps", "attn_kv_a_mqa"])
@pytest.mark.usefixtures("exact")
def test_noise_in_stacks(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, which all tokens read, and experts, which some do."""
    file, name = write_tiny_arch(tmp_path / "model.gguf", "deepseek2"), f"blk.1.{role}.weight"
    model = open_model(file)
    found = noise_divergence(file, [Noisy(model.by_name[name])], tokens(), n_threads=1)
    make, keys = ARCHITECTURES["deepseek2"]
    arrays = make()
    arrays[name] = changed(arrays[name], name, model)
    monkeypatch.setitem(ARCHITECTURES, "deepseek2", (lambda: arrays, keys))
    other = write_tiny_arch(tmp_path / "other.gguf", "deepseek2")
    assert found[Noisy(model.by_name[name])] == pytest.approx(divergence(file, other, tokens()), rel=0.005)


def test_the_order_is_that_of_fisher(tmp_path: Path) -> None:
    """Both are divergence over relative error: in the mean equal, up to the sampling of both."""
    file = write_tiny_gguf(tmp_path / "model.gguf")
    model = open_model(file)
    noisy = noisy_tensors(model, {*model.by_name} - {"token_embd.weight"})
    found = with_noise(propagate(model), model, noise_divergence(file, noisy, tokens(4), n_threads=1)).sensitivity
    wanted = fisher(model, tokens(4), 1).sensitivity
    assert found.keys() == wanted.keys()
    ratios = np.log([found[name] / wanted[name] for name in wanted])
    assert abs(ratios.mean()) < 0.3
    assert ratios.std() < 0.4


def test_a_tied_embedding_has_both_roles(tmp_path: Path) -> None:
    weights = tiny_weights()
    del weights["output.weight"]
    file = write_tiny_gguf(tmp_path / "model.gguf", weights=weights)
    model = open_model(file)
    embedding = model.by_name["token_embd.weight"]
    found = noise_divergence(file, noisy_tensors(model, {*model.by_name}), tokens(), n_threads=1)
    result = with_noise(propagate(model), model, found)
    parts = found[Noisy(embedding)], found[Noisy(embedding, True)]
    assert min(parts) > 0
    assert result.sensitivity["token_embd.weight"] == pytest.approx(sum(parts) / RELATIVE_ERROR)
    assert result.looked_up == pytest.approx(parts[1] / sum(parts))


def test_tensors_that_were_measured_are_not_measured_again(tmp_path: Path) -> None:
    file, store = write_tiny_gguf(tmp_path / "model.gguf"), Store(tmp_path / "records", "key")
    (tmp_path / "records").mkdir()
    model = open_model(file)
    noisy = [Noisy(model.by_name[f"blk.0.{role}.weight"]) for role in ("attn_q", "ffn_up")]
    store.put(noisy[0].record, 0.5)
    found = noise_divergence(file, noisy, tokens(), n_threads=1, records=store)
    assert found[noisy[0]] == 0.5
    assert store.get(noisy[1].record) == found[noisy[1]] != 0.5


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state space, which our pass does not follow: the same bytes, by GPTQ rounding, which is its default."""
    monkeypatch.setattr(generated_text, "N_TOKENS", 256)
    source = write_tiny_arch(tmp_path / "mamba.gguf", "mamba")
    options, stopped = Options(target_bpw=4.0), tmp_path / "stopped"
    wanted = converted(source, tmp_path / "whole", options, Stopping())
    for stage, after in (("find sensitivities", 2), ("find Hessians", 3), ("factor Hessians", 2)):
        with pytest.raises(KeyboardInterrupt):
            converted(source, stopped, options, Stopping(stage, after))
    again = Stopping()
    assert converted(source, stopped, options, again) == wanted
    assert not {"generate text", "find sensitivities", "find Hessians"} & again.stages.keys()
    assert any("Hessian factors" in said for said in again.said)
