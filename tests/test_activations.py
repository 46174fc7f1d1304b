"""Second moments of activations: against llama-imatrix's files, a forward pass in numpy, and when they are refused."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from imatrix_cases import CASES, case_file, case_tokens
from llama_forward import matrix_inputs
from tiny_archs import N_EXPERTS
from tiny_gguf import N_VOCAB, tiny_weights, write_tiny_gguf

from nsds_gguf.calibration.activations import collect
from nsds_gguf.calibration.imatrix import read_imatrix
from nsds_gguf.errors import GgmlError, TextError, VerifyError
from nsds_gguf.llamacpp import graph
from nsds_gguf.session.original import original_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.session.source import open_model
from nsds_gguf.system.workfolder import WorkFolder

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"
GOLDEN = Path(__file__).parent / "golden"
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@pytest.fixture(scope="module")
def tiny(folder):
    return write_tiny_gguf(folder / "model.gguf")


def drawn(*shape, seed=3):
    return np.random.default_rng(seed).integers(3, N_VOCAB, shape).astype(np.int32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_mean_squares_are_llama_imatrix(case, folder):
    """What llama-imatrix wrote (tools/check/check_imatrix.py): sums in single precision, of every matrix it looks
    at."""
    file = case_file(folder, case)
    found = collect(file, case_tokens(file, case), n_threads=1)
    golden = GGUFReader(GOLDEN / f"imatrix-{case.model}.gguf")
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in golden.tensors}
    names = {name.removesuffix(".counts") for name in tensors if name.endswith(".counts")}
    assert {"blk.1.attn_output.weight", "output.weight"} <= names <= found.keys()
    for name in names:
        moments, counts = found[name], tensors[f"{name}.counts"].ravel()
        wanted = tensors[f"{name}.in_sum2"].reshape(moments.mean_squares.shape) / np.maximum(counts, 1)[:, np.newaxis]
        got = moments.mean_squares.reshape(wanted.shape)
        assert np.allclose(got, wanted, rtol=1e-3, atol=1e-4 * wanted.max()), name
        assert np.array_equal(moments.counts, np.broadcast_to(counts, moments.counts.shape)), name


def test_mean_squares_of_a_trained_model_are_llama_imatrix(folder):
    """The demo in BF16 over eight chunks, whose token ids are kept: ``golden/imatrix.gguf`` of llama-imatrix."""
    session = Session(open_model(DEMO), Run(1), WorkFolder(folder))
    session.write(original_plan(session.model), folder / "demo.gguf")
    tokens = np.load(GOLDEN / "imatrix-tokens.npy").astype(np.int32)
    found = collect(folder / "demo.gguf", tokens, n_threads=1)
    wanted = read_imatrix(GOLDEN / "imatrix.gguf").columns
    assert len(wanted) == 6 * len(MATRICES)
    for name, columns in wanted.items():
        assert np.allclose(found[name].mean_squares, columns[0], rtol=1e-3, atol=1e-4 * columns.max()), name
    assert found.keys() - wanted.keys() == {"output.weight"}  # llama-imatrix leaves it out unless told


@pytest.mark.parametrize("shape", [(1, 40), (3, 50), (30, 40), (2, 600)], ids=str)
def test_moments_of_a_dense_model(shape, tiny):
    """Sequences alone, several in a batch, more than fit in one, and longer than one; against numpy in float64."""
    tokens = drawn(*shape)
    full_for = [*(f"blk.1.{role}.weight" for role in MATRICES), "output.weight"]
    found = collect(tiny, tokens, full_for=full_for, n_threads=1)
    wanted = matrix_inputs(tiny_weights(), tokens)
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        moments, scale = found[name], np.sqrt(np.square(rows).mean())
        assert np.array_equal(moments.counts, [tokens.size])
        assert np.allclose(moments.mean_squares, np.square(rows).mean(axis=0), rtol=2e-3, atol=2e-3 * scale**2), name
        if name.startswith("blk.0"):
            assert moments.full is None
        else:
            size = np.sqrt(moments.mean_squares)  # keys and values are kept in half precision
            assert np.abs((moments.full - rows.T @ rows / len(rows)) / np.outer(size, size)).max() < 5e-3, name


def test_matrices_with_one_input_share_arrays(tiny):
    found = collect(tiny, drawn(1, 20), full_for=["blk.0.attn_q.weight", "blk.0.attn_v.weight"], n_threads=1)
    q, k, v = (found[f"blk.0.attn_{letter}.weight"] for letter in "qkv")
    assert q is v
    assert k is not q
    assert k.full is None
    assert np.array_equal(k.mean_squares, q.mean_squares)
    assert found["blk.1.ffn_gate.weight"] is found["blk.1.ffn_up.weight"]
    assert not q.full.flags.writeable


def test_only_some_tensors(tiny):
    found = collect(tiny, drawn(1, 20), only=["output.weight"], full_for=["blk.1.ffn_up.weight"], n_threads=1)
    assert found.keys() == {"output.weight", "blk.1.ffn_up.weight"}
    everything = collect(tiny, drawn(1, 20), n_threads=1)
    assert np.array_equal(found["output.weight"].mean_squares, everything["output.weight"].mean_squares)


def test_a_tied_embedding_is_the_output_matrix(folder):
    weights = tiny_weights()
    plain = collect(write_tiny_gguf(folder / "untied.gguf", weights=weights), drawn(1, 20), n_threads=1)
    del weights["output.weight"]
    tied = collect(write_tiny_gguf(folder / "tied.gguf", weights=weights), drawn(1, 20), n_threads=1)
    assert np.array_equal(tied["token_embd.weight"].mean_squares, plain["output.weight"].mean_squares)
    assert "token_embd.weight" not in plain


def test_experts_split_the_tokens(folder):
    """Gate and up read the router's own rows: their experts' sums add up to it, as often as experts are used."""
    case = next(case for case in CASES if case.model == "deepseek2")
    file = case_file(folder, case)
    tokens = case_tokens(file, case)
    found = collect(file, tokens, n_threads=1)
    router, up, down = (found[f"blk.1.{role}.weight"] for role in ("ffn_gate_inp", "ffn_up_exps", "ffn_down_exps"))
    assert up is found["blk.1.ffn_gate_exps.weight"]
    assert up.counts.shape == (N_EXPERTS,)
    assert up.counts.sum() == 2 * tokens.size
    assert np.array_equal(up.counts, down.counts)
    assert np.allclose(up.counts @ up.mean_squares / tokens.size, 2 * router.mean_squares, rtol=1e-5)
    with pytest.raises(GgmlError, match=r"ffn_up_exps\.weight: a stack of 4 matrices has no single matrix"):
        collect(file, tokens, full_for=["blk.1.ffn_up_exps.weight"])


# What is refused


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(drawn(0, 5), "got none"), (np.full((1, 4), N_VOCAB, np.int32), "got 260 to 260"), (-drawn(1, 4), "got -")],
)
def test_tokens_that_are_none(tokens, said, tiny):
    with pytest.raises(TextError, match=said):
        collect(tiny, tokens)


def test_a_tensor_that_multiplies_nothing(tiny):
    with pytest.raises(GgmlError, match=r"blk\.7\.attn_q\.weight multiplies no input"):
        collect(tiny, drawn(1, 4), full_for=["blk.7.attn_q.weight"])


def test_damaged_weights(folder):
    weights = tiny_weights()
    weights["blk.0.ffn_up.weight"][3] = np.inf
    with pytest.raises(GgmlError, match="multiplies values that are not finite; the weights are damaged"):
        collect(write_tiny_gguf(folder / "inf.gguf", weights=weights), drawn(1, 20))


def test_no_file(folder):
    with pytest.raises(VerifyError, match="no such GGUF file"):
        collect(folder / "none.gguf", drawn(1, 4))


FIELDS = graph._Tensor._fields_


@pytest.mark.parametrize(
    "fields",
    [
        FIELDS[:1] + FIELDS[2:],  # no buffer
        (*FIELDS[:4], ("grad", ctypes.c_void_p), *FIELDS[4:]),
        (*FIELDS[:5], ("op_params", ctypes.c_int32 * 20), *FIELDS[6:]),
        (*FIELDS[:7], ("src", ctypes.c_void_p * 12), *FIELDS[8:]),
        (*FIELDS[:2], FIELDS[3], FIELDS[2], *FIELDS[4:]),  # strides before sizes
        (*FIELDS[:8], ("view_offs", ctypes.c_size_t), ("view_src", ctypes.c_void_p), *FIELDS[10:]),
        (*FIELDS[:10], ("perf", ctypes.c_int64), *FIELDS[10:]),
        (("buffer", ctypes.c_void_p), ("type", ctypes.c_int), *FIELDS[2:]),
        (*FIELDS[:4], ("flags", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("op", ctypes.c_int), *FIELDS[7:]),
    ],
)
def test_another_layout_of_tensors_is_refused(fields, monkeypatch):
    names = {"buffer"} - {name for name, _ in fields}
    extra = dict.fromkeys(names)  # read as nothing where the layout has no such field
    changed = type("Changed", (ctypes.Structure,), {"_fields_": fields, **extra})
    library, *_ = graph._graph_library()
    graph._check_tensor_layout(library, Path("lib"))
    monkeypatch.setattr(graph, "_Tensor", changed)
    with pytest.raises(GgmlError, match="tensors have another layout"):
        graph._check_tensor_layout(library, Path("lib"))


def test_ctrl_c_stops_a_run(tiny):
    seen = []

    def progress(done, total):
        if not seen:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        seen.append(done / total)

    with pytest.raises(KeyboardInterrupt):
        collect(tiny, drawn(200, 512), progress=progress, n_threads=1)
    assert max(seen) < 0.9
