"""Families with parts that the pass cannot follow, from the folder to a file of K-quants that llama.cpp loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zoo import zoo_tokens
from zoo_specs import SPECS, write_spec

from nsds_gguf import conversion
from nsds_gguf.calibration import generated_text, random_tokens
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.records import Options
from nsds_gguf.session.run import Run

# Sinks, an activation function of its own, convolutions, delta nets, and a family that the pass follows.
NAMES = ("gpt-oss", "apertus", "lfm2", "lfm2moe", "qwen3next", "qwen3.5", "hunyuan-moe")
BITS = 8.0  # per weight: rows of 48 weights stay F16
NARROW = {"Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0"}  # what takes the place of K-quants in rows of 64 and 96 weights


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw and write fewer tokens."""
    monkeypatch.setattr(random_tokens, "N_SEQUENCES_HESSIANS", 2)
    monkeypatch.setattr(random_tokens, "N_SEQUENCES", 2)
    monkeypatch.setattr(generated_text, "N_TOKENS", 512)


def converted(folder: Path, options: Options, path: Path) -> Path:
    """Convert without a check of perplexity and return the file."""
    conversion.convert(folder, options, output=path, verifying=VerifyOptions(enabled=False), run=Run(1))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_kept_and_the_file_computes(name: str, tmp_path: Path) -> None:
    folder, tokens = write_spec(tmp_path / "model", name), zoo_tokens(SPECS[name])
    file = converted(folder, Options(target_bpw=BITS), tmp_path / "small.gguf")
    whole = converted(folder, Options(uniform="F32", rounding="rtn", calibration="none"), tmp_path / "whole.gguf")
    types = {tensor.type for tensor in read_gguf_header(file).tensors}
    assert types & NARROW and types <= NARROW | {"F32", "F16"}
    assert file.stat().st_size < 0.6 * whole.stat().st_size
    rows, wanted = (logits(path, tokens, n_threads=1) for path in (file, whole))
    assert np.corrcoef(rows.ravel(), wanted.ravel())[0, 1] > 0.7
