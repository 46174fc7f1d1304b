"""One line that says what a file really is, and whether its name does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import TINY, call
from tiny_models import write_tiny

from nsds_gguf.evaluate.inspect import FoundTensor, Inspection
from nsds_gguf.evaluate.truth import truth

BPW = {"Q2_K": 2.625, "Q4_K": 4.5, "Q6_K": 6.5625, "Q4_0": 4.5, "Q5_0": 5.5, "Q8_0": 8.5, "F16": 16, "F32": 32}
FILE_TYPES = {"Q4_K_M": 15, "Q8_0": 7, "GUESSED": 1024}


def found(name, *tensors, **metadata):
    """Return an inspection of matrices, each a type, rows and columns."""
    listed = tuple(
        FoundTensor(f"blk.{i}.ffn_up.weight", "ffn_up", "", i, (n_rows, n_cols), ggml_type, n_rows * n_cols,
                    int(n_rows * n_cols * BPW[ggml_type] / 8))
        for i, (ggml_type, n_rows, n_cols) in enumerate(tensors)
    )  # fmt: skip
    norm = FoundTensor("output_norm.weight", "output_norm", "", None, (64,), "F32", 64, 256)
    n_bytes = sum(tensor.n_bytes for tensor in listed)
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return Inspection(f"folder/{name}", (f"folder/{name}",), (), n_bytes + 10**6, keys, (*listed, norm))


ALIGNED = (("Q4_K", 4096, 4096), ("Q4_K", 4096, 2048), ("Q6_K", 1024, 4096))
NARROW = (("Q5_0", 4096, 896), ("Q5_0", 4096, 896), ("Q8_0", 4096, 896), ("Q4_K", 896, 1024))


def test_an_honest_file():
    said = truth(found("Model-7B-Q4_K_M.gguf", *ALIGNED))
    assert (said.claim, said.source, said.claimed_bpw, said.fallbacks, said.lies) == ("Q4_K_M", "name", 4.89, (), "")
    assert said.line == ("Model-7B-Q4_K_M.gguf: 4.79 bpw, 19 MB; bytes: Q4_K 80 %, Q6_K 20 %; the name Q4_K_M is true")


def test_rows_that_are_not_a_multiple_of_256():
    said = truth(found("model.Q4_K_M.gguf", *NARROW))
    assert said.fallbacks == tuple(f"blk.{i}.ffn_up.weight" for i in range(3))
    share = 3 * 4096 * 896 / (3 * 4096 * 896 + 896 * 1024 + 64)
    assert said.fallback_share == pytest.approx(share)
    assert said.lies == "92 % of the weights have larger types, it usually is 4.89 bpw"
    assert said.line == (
        "model.Q4_K_M.gguf: 6.35 bpw, 10 MB; bytes: Q5_0 53 %, Q8_0 41 %, Q4_K 5 %; 3 of 4 matrices (92 % of the "
        "weights) are fallbacks: rows are not a multiple of 256; the name Q4_K_M misleads: 92 % of the weights have "
        "larger types, it usually is 4.89 bpw"
    )


@pytest.mark.parametrize(
    ("name", "metadata", "claim", "source"),
    [
        ("a-q4_k_s.gguf", {}, "Q4_K_S", "name"),
        ("a-Q4_0.gguf", {}, "Q4_0", "name"),
        ("a-IQ4_XS.gguf", {}, "IQ4_XS", "name"),
        ("a-UD-Q4_K_XL.gguf", {}, "UD-Q4_K_XL", "name"),
        ("a-BF16-00001-of-00002.gguf", {}, "BF16", "name"),
        ("a-v1.0-FISHER_3_00BPW.gguf", {}, "3_00BPW", "name"),
        ("a.gguf", {"general__file_type": 15}, "Q4_K_M", "general.file_type"),
        ("a.gguf", {"general__file_type": 15, "nsds_gguf__recipe": "{}"}, "", ""),
        ("a.gguf", {"general__file_type": 1024}, "", ""),
        ("a.gguf", {}, "", ""),
        ("Q4_KMART.gguf", {}, "", ""),
        ("a-F16.gguf", {"general__file_type": 15}, "F16", "name"),
    ],
)
def test_claims(name, metadata, claim, source):
    said = truth(found(name, *ALIGNED, **metadata))
    assert (said.claim, said.source) == (claim, source)
    assert claim in said.line and ("is true" in said.line or "misleads" in said.line) == bool(claim)


@pytest.mark.parametrize(
    ("name", "tensors", "lies"),
    [
        ("a-Q2_K.gguf", ALIGNED, "no matrix is Q2_K, it usually is 3.16 bpw"),
        ("a-F16.gguf", ALIGNED, "no matrix is F16, it usually is 16.00 bpw"),
        ("a-Q8_0.gguf", (("Q8_0", 64, 896),), ""),
        ("a-FISHER_4_80BPW.gguf", ALIGNED, ""),
        ("a-FISHER_3_00BPW.gguf", ALIGNED, "it is 3.00 bpw"),
        ("a-UD-Q4_K_XL.gguf", ALIGNED, ""),
        ("a-UD-Q2_K_XL.gguf", ALIGNED, "no matrix is Q2_K"),
        ("a-IQ4_XS.gguf", ALIGNED, ""),
        ("a-Q4_K_M.gguf", (("Q5_0", 64, 960), ("Q4_K", 80, 1024)), ""),
    ],
)
def test_lies(name, tensors, lies):
    assert truth(found(name, *tensors)).lies == lies


def test_blocks_of_32_by_name_are_no_fallbacks():
    assert truth(found("a-Q8_0.gguf", ("Q8_0", 64, 896))).fallbacks == ()
    assert truth(found("a.gguf", ("Q8_0", 64, 896))).fallbacks == ()
    assert len(truth(found("a.gguf", ("Q8_0", 64, 896), nsds_gguf__version="1")).fallbacks) == 1


def test_inspect_ends_with_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model", TINY)
    assert call("convert", "model", "--uniform", "Q8_0", "--no-verify", "-o", "Tiny-Q4_K_M.gguf").code == 0
    outcome = call("inspect", "Tiny-Q4_K_M.gguf", "--json", "found.json")
    said = json.loads(Path("found.json").read_text())["truth"]
    assert outcome.out.splitlines()[-1] == said["line"]
    assert said["line"].endswith("; the name Q4_K_M misleads: no matrix is Q4_K, it usually is 4.89 bpw")
    assert said["shares"]["Q8_0"] > 0.99 and said["claim"] == "Q4_K_M"
