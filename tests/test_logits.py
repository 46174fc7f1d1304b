"""Logits of llama.cpp on our F32 GGUF equal those of transformers on the checkpoint, and errors would show.

transformers' logits are recorded in ``golden/logits.npz`` by ``tools/check_logits.py``, which also measures the
attention entropy: the best token at every position, and every ``STRIDE``-th number at ``N_POSITIONS`` positions.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from mutations import mutations
from numpy.typing import NDArray
from tiny_models import SPECS, Spec, digest, tiny_tokens, write_tiny

from nsds_gguf.allocate import PlanOptions, make_plan
from nsds_gguf.convert import Output, VerifyOptions, convert
from nsds_gguf.llama import logits
from nsds_gguf.read import open_model, supported_classes
from nsds_gguf.records import Float32, Model, Target
from nsds_gguf.write import header_bytes, write_gguf

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"

TOLERANCE = 1e-3  # of the largest logit
BITE = 20  # times the tolerance: what every error must move

N_POSITIONS = 16
STRIDE = 5

# The errors that each class can have, and must be tested with.
_COMMON = {
    "theta left out",
    "theta 5 % larger",
    "norm eps doubled",
    "q and k in the other order",
    "gate and up exchanged",
    "norms exchanged",
    "tied",
    "untied",
    "rope factor left out",
    "rope factor 5 % larger",
    "yarn taken for linear",
    "original context left out",
    "attention factor left out",
}
_QKV_ERRORS = {
    "attn_q.bias left out", "attn_k.bias left out", "attn_v.bias left out", "q and k biases in the other order",
}  # fmt: skip
_LLAMA3 = {"rope_freqs left out", "rope_freqs halved"}
ERRORS = {
    "LlamaForCausalLM": _COMMON | _LLAMA3 | _QKV_ERRORS
    | {f"{role}.bias left out" for role in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")},
    "MistralForCausalLM": _COMMON | _LLAMA3,
    "Qwen2ForCausalLM": _COMMON | _QKV_ERRORS,
    "Qwen3ForCausalLM": _COMMON | _QKV_ERRORS | {"attn_q_norm of ones", "attn_k_norm of ones"},
}  # fmt: skip

F32 = PlanOptions(Target("none", 0), "uniform", uniform="F32", importance="none")


def positions(n_tokens: int) -> NDArray[np.intp]:
    """Return the positions whose logits are recorded, the first and the last among them."""
    return np.linspace(0, n_tokens - 1, N_POSITIONS).astype(np.intp)


def recorded(rows: Float32) -> Float32:
    """Return the part of ``(n_tokens, n_vocab)`` logits that is recorded."""
    return rows[positions(len(rows))][:, ::STRIDE]


def best_tokens(rows: Float32) -> NDArray[np.int16]:
    """Return the argmax at every position; -1 where the second best is so close that the tolerance allows either."""
    second, first = np.sort(rows, axis=1)[:, -2:].T
    is_clear = first - second > 2 * TOLERANCE * np.abs(rows).max()
    return np.where(is_clear, rows.argmax(axis=1), -1).astype(np.int16)


def difference(rows: Float32, wanted: Float32, largest: float | None = None) -> float:
    """Return the largest difference as a part of the largest logit."""
    return float(np.abs(rows - wanted).max() / (np.abs(wanted).max() if largest is None else largest))


def model_logits(model: Model, path: Path, tokens: list[int]) -> Float32:
    """Write a model as F32 GGUF to ``path`` and return llama.cpp's logits."""
    n_header = header_bytes(model, allocator="uniform", target=F32.target, importance="none", metric=None)
    write_gguf(model, make_plan(model, None, F32, n_header), {}, path, n_threads=1)
    return logits(path, tokens, n_threads=1)


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("name", SPECS)
def test_llama_cpp_computes_what_transformers_computes(
    name: str, golden: dict[str, NDArray[np.generic]], tmp_path: Path
) -> None:
    spec = SPECS[name]
    assert golden[f"{name}/digest"] == digest(spec), "the model changed: run tools/check_logits.py --record"
    model = open_model(write_tiny(tmp_path / name, spec))
    rows = model_logits(model, tmp_path / "model.gguf", tiny_tokens(spec))
    largest = float(golden[f"{name}/largest"])
    assert difference(recorded(rows), golden[f"{name}/logits"], largest) <= TOLERANCE
    best = golden[f"{name}/best"]
    assert np.mean(best >= 0) > 0.9
    np.testing.assert_array_equal(rows.argmax(axis=1)[best >= 0], best[best >= 0])


@pytest.mark.parametrize("source_class", supported_classes())
def test_the_whole_conversion_writes_the_file_that_is_compared(source_class: str, tmp_path: Path) -> None:
    spec = next(spec for spec in SPECS.values() if spec.source_class == source_class)
    checkpoint = write_tiny(tmp_path / "model", spec)
    unverified, output = VerifyOptions(enabled=False), Output(tmp_path / "converted.gguf")
    convert(checkpoint, [F32], verifying=unverified, output=output, n_threads=1)
    model_logits(open_model(checkpoint), tmp_path / "compared.gguf", tiny_tokens(spec))
    assert (tmp_path / "converted.gguf").read_bytes() == (tmp_path / "compared.gguf").read_bytes()


def moves(folder: Path, spec: Spec, known: Collection[str] = ()) -> dict[str, float]:
    """Return how far each error that is not ``known`` moves the logits of a spec, as a part of the largest."""
    tokens, path = tiny_tokens(spec), folder / "mutant.gguf"
    model = open_model(write_tiny(folder / "model", spec))
    mutants = {error: mutant for error, mutant in mutations(model).items() if error not in known}
    if not mutants:
        return {}
    right = model_logits(model, path, tokens)
    return {error: difference(model_logits(mutant, path, tokens), right) for error, mutant in mutants.items()}


@pytest.mark.parametrize("source_class", supported_classes())
def test_every_error_moves_the_logits(source_class: str, tmp_path: Path) -> None:
    moved: dict[str, float] = {}  # by each error in the first model of the class that can have it
    for name, spec in SPECS.items():
        if spec.source_class == source_class:
            moved |= moves(tmp_path / name, spec, known=moved)
    assert moved.keys() == ERRORS[source_class]
    assert {error: by for error, by in moved.items() if by <= BITE * TOLERANCE} == {}


def test_every_class_and_rope_kind_is_covered() -> None:
    covered = {(spec.source_class, spec.rope.get("rope_type") or spec.rope["type"]) for spec in SPECS.values()}
    kinds = {name: {"default", "linear", "yarn"} for name in supported_classes()}
    kinds["LlamaForCausalLM"].add("llama3")
    kinds["MistralForCausalLM"].add("llama3")
    assert covered == {(name, kind) for name, found in kinds.items() for kind in found}


def test_sequences_are_longer_than_ropes_original_context() -> None:
    for spec in SPECS.values():
        factor = spec.rope.get("factor", 1.0)
        original = spec.rope.get("original_max_position_embeddings", spec.n_ctx / factor)
        assert spec.n_tokens > original or factor == 1.0
