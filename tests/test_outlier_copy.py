"""The outlier copy: the same function, in llama.cpp's arithmetic, of weights with columns far apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from outlier_copy import N_FIXED, N_OTHER, N_UNITS, outlier_copy
from tiny_models import SPECS, Spec, write_tiny

from nsds_gguf.llamacpp import llama
from nsds_gguf.read import open_model
from nsds_gguf.records import Float32
from nsds_gguf.session.original import original_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

TOKENS = np.random.default_rng(3).integers(0, 280, 48).tolist()

CASES = {
    "llama": replace(SPECS["llama"], n_embd=128, n_ff=96),
    "llama-biases": replace(SPECS["llama-biases"], n_embd=128),
    "llama-tied-bf16": replace(SPECS["llama-tied-mha-bf16-4"], n_embd=128),
    "qwen2": replace(SPECS["qwen2"], n_embd=128),
    "qwen3": replace(SPECS["qwen3"], n_embd=128),
}


def logits(folder: Path, path: Path) -> Float32:
    """Return llama.cpp's logits of a folder's file at its own precision."""
    with WorkFolder(path.parent) as files:
        session = Session(open_model(folder), Run(1), files)
        session.write(original_plan(session.model), path)
    return llama.logits(path, TOKENS, n_threads=1)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_same(name: str, tmp_path: Path) -> None:
    spec: Spec = CASES[name]
    # Stored as F32: a BF16 file would be computed by other kernels, which round what matrices multiply.
    source = write_tiny(tmp_path / "source", replace(spec, dtype="F32"))
    outlier_copy(source, tmp_path / "copy", seed=1)
    before, after = logits(source, tmp_path / "a.gguf"), logits(tmp_path / "copy", tmp_path / "b.gguf")
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()


def test_every_factor_is_there(tmp_path: Path) -> None:
    spec = CASES["llama"]
    source = write_tiny(tmp_path / "source", spec)
    outlier_copy(source, tmp_path / "copy", seed=1)
    before, after = open_model(source), open_model(tmp_path / "copy")
    factors = {t.name: after.by_name[t.name].load() / t.load() for t in before.tensors}
    gains = [factors[name].ravel() for name in factors if name.endswith("norm.weight")]
    assert len(gains) == 2 * spec.n_layers + 1
    for gain in gains:
        assert np.count_nonzero((gain > 9.9) & (gain < 30.1)) == N_FIXED
        assert np.count_nonzero((gain > 2.9) & (gain < 6.1)) == N_OTHER
        assert np.count_nonzero(np.isclose(gain, 1)) == spec.n_embd - N_FIXED - N_OTHER
    assert len({tuple(np.flatnonzero(gain > 9)) for gain in gains}) == 1
    for layer in range(spec.n_layers):
        for norm, roles in (("attn_norm", "q k v"), ("ffn_norm", "gate")):
            gain = factors[f"blk.{layer}.{norm}.weight"].ravel()
            kind = norm.removesuffix("_norm")
            for role in roles.split():
                np.testing.assert_allclose(factors[f"blk.{layer}.{kind}_{role}.weight"] * gain, 1, rtol=1e-5)
        units = factors[f"blk.{layer}.ffn_down.weight"]
        assert np.count_nonzero(units[0] < 0.21) == N_UNITS and np.ptp(units, axis=0).max() < 1e-5
    np.testing.assert_allclose(factors["output.weight"] * factors["output_norm.weight"].ravel(), 1, rtol=1e-5)


def test_a_tied_output_keeps_its_norm(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", CASES["llama-tied-bf16"])
    outlier_copy(source, tmp_path / "copy", seed=1)
    before, after = open_model(source), open_model(tmp_path / "copy")
    for name in ("output_norm.weight", "token_embd.weight"):
        np.testing.assert_array_equal(before.by_name[name].load(), after.by_name[name].load())


def test_equal_seeds_give_equal_copies(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", CASES["llama"])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        outlier_copy(source, tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_another_class_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", CASES["llama"])
    config = source / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(SystemExit, match="GPT2LMHeadModel is not one of"):
        outlier_copy(source, tmp_path / "copy", seed=1)
