"""The walk over the layers: moments and Hessians against recorded inputs and llama.cpp, batches, decoding, backends."""

from __future__ import annotations

import collections
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from arrays import expert_arrays, random_arrays
from command import TINY
from models import make_model, read_by
from recorded_inputs import recorded_inputs, without_first
from tiny_models import write_tiny
from zoo_specs import write_spec

from nsds_gguf.calibration import generated_text
from nsds_gguf.calibration.activations import collect
from nsds_gguf.calibration.hessians import multiplied
from nsds_gguf.compute import numpy_backend, weights
from nsds_gguf.compute.backend import BACKENDS, BackendEntry, find_backend
from nsds_gguf.compute.input_moments import Recording
from nsds_gguf.compute.layers import view_layer
from nsds_gguf.compute.numpy_backend import NumpyBackend, open_numpy
from nsds_gguf.compute.stream_file import stream_file
from nsds_gguf.compute.walk import WalkOptions, walk
from nsds_gguf.errors import ModelError, PlanError
from nsds_gguf.read import open_model
from nsds_gguf.records import Options
from nsds_gguf.sensitivity.fisher import fisher
from nsds_gguf.session.original import original_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.session.settle import settle
from nsds_gguf.system.workfolder import WorkFolder

# Dense, experts with and without a shared one, parallel blocks with one norm and with two, norms behind blocks, layer
# norms with biases and learned positions, fused queries, keys and values.
FAMILIES = ["llama-biases", "mixtral", "qwen2moe", "gpt-neox", "phi-2", "gemma2", "olmo2", "gpt2", "phi-3", "granite"]


def tokens_of(model, n_sequences=5, n_positions=16):
    return np.random.default_rng(2).integers(0, model.hparams.n_vocab, (n_sequences, n_positions))


def walked(model, tokens, n_first=2, first_positions=False, n_threads=2):
    """Return sums over all tokens, sums over the first batch, and Hessians by stored name."""
    hessians = {}
    recording = Recording(frozenset(multiplied(model)), first_positions)

    def keep(names, hessian):
        assert not hessians.keys() & set(names)
        hessians.update(dict.fromkeys(names, hessian))

    with walk(model, tokens, WalkOptions(n_first, recording, keep, n_threads)) as found:
        return found.inputs, found.first_inputs, hessians


@pytest.mark.parametrize("first_positions", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_moments_and_hessians_are_those_of_recorded_inputs(name, first_positions, tmp_path):
    """Naively, all tokens at once in float64: the walk goes in batches of two sequences, the last of one."""
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    tokens = tokens_of(model)
    inputs, first, hessians = walked(model, tokens, first_positions=first_positions)
    plain, stacks = recorded_inputs(model, tokens)
    assert hessians.keys() == set(multiplied(model)) <= plain.keys()
    for matrix, hessian in hessians.items():
        rows = plain[matrix] if first_positions else without_first(plain[matrix], 16)
        wanted = rows.astype("f8").T @ rows / len(rows)
        size = np.sqrt(np.maximum(wanted.diagonal(), 1e-12 * wanted.diagonal().max()))
        assert np.abs((hessian - wanted) / np.outer(size, size)).max() < 1e-4, matrix
        np.testing.assert_array_equal(hessian, hessian.T)
        moments = inputs[matrix].moments(first_positions)
        np.testing.assert_allclose(moments.mean_squares, wanted.diagonal(), rtol=1e-4, atol=1e-9)
        assert moments.counts.tolist() == [len(rows)]
        of_first = plain[matrix][:32] if first_positions else without_first(plain[matrix][:32], 16)
        means = first[matrix].moments(first_positions).mean_squares
        np.testing.assert_allclose(means, np.square(of_first, dtype="f8").mean(axis=0), rtol=1e-4, atol=1e-9)
    for stack, experts in stacks.items():
        check_stack(inputs[stack].moments(first_positions), experts, first_positions)
    assert {n for n, sums in inputs.items() if sums.is_stack} == stacks.keys()


def check_stack(moments, experts, first_positions):
    for expert, (routed, x) in experts.items():
        rows = x if first_positions else x[routed % 16 > 0]
        assert moments.counts[expert] == len(rows)
        if len(rows):
            wanted = np.square(rows, dtype="f8").mean(axis=0)
            np.testing.assert_allclose(moments.mean_squares[expert], wanted, rtol=1e-4, atol=1e-9)
    missed = [expert for expert in range(len(moments.counts)) if expert not in experts]
    assert not moments.counts[missed].any() and not moments.mean_squares[missed].any()


@pytest.mark.parametrize("name", ["llama-biases", "qwen2moe", "gpt-neox", "gemma2", "olmo2", "gpt2"])
def test_moments_and_hessians_are_those_of_llama_cpp(name, tmp_path):
    """All positions counted; llama.cpp keeps keys and values in half precision."""
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    Session(model, Run(1), WorkFolder(tmp_path)).write(original_plan(model), tmp_path / "model.gguf")
    tokens = tokens_of(model)
    inputs, _, hessians = walked(model, tokens, first_positions=True)
    found = collect(tmp_path / "model.gguf", tokens.astype(np.int32), full_for=sorted(hessians), n_threads=1)
    assert hessians.keys() <= found.keys()
    for matrix in inputs:
        moments, wanted = inputs[matrix].moments(first_positions=True), found[matrix]
        np.testing.assert_array_equal(moments.counts, wanted.counts)
        scale = wanted.mean_squares.max()
        np.testing.assert_allclose(moments.mean_squares, wanted.mean_squares, rtol=5e-3, atol=1e-3 * scale)
        if matrix in hessians:
            size = np.sqrt(np.maximum(wanted.mean_squares, 1e-6 * scale))
            assert np.abs((hessians[matrix] - wanted.full) / np.outer(size, size)).max() < 1e-2, matrix


def test_matrices_with_one_input_are_named_together():
    model = make_model(*expert_arrays(7, n_layers=1))
    found = {sums.names for sums in walked(model, tokens_of(model))[0].values()}
    named = {tuple(name.split(".", 2)[-1].removesuffix(".weight") for name in names) for names in found}
    assert named == {
        ("attn_q", "attn_k", "attn_v"), ("attn_output",),
        ("ffn_gate_shexp", "ffn_up_shexp"), ("ffn_down_shexp",), ("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",),
        ("weight",),
    }  # fmt: skip


ONE_NORM = [
    ("phi-2", [("attn_q", "attn_k", "attn_v", "ffn_up"), ("attn_output",), ("ffn_down",)]),
    ("gpt-neox", [("attn_qkv",), ("attn_output",), ("ffn_up",), ("ffn_down",)]),
    ("cohere-qk-norm", [("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"), ("attn_output",), ("ffn_down",)]),
]


@pytest.mark.parametrize(("name", "wanted"), ONE_NORM)
def test_parallel_blocks_behind_one_norm_share_an_input(name, wanted, tmp_path):
    """GPT-NeoX's parallel blocks have a norm each; the others' are the same rows, bit for bit."""
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    groups = view_layer(model, 0).input_groups(model.hparams)
    assert groups == [tuple(f"blk.0.{role}.weight" for role in roles) for roles in wanted]
    inputs, _ = recorded_inputs(model, tokens_of(model))
    assert all(np.array_equal(inputs[group[0]], inputs[other]) for group in groups for other in group)
    assert not np.array_equal(inputs["blk.0.ffn_up.weight"], inputs["blk.0.attn_output.weight"])


def test_batches_and_threads_do_not_change_sums(tmp_path):
    model = make_model(*expert_arrays(7))
    tokens = tokens_of(model, 6)
    whole, _, hessians = walked(model, tokens, n_first=6)
    for n_first, n_threads in ((1, 1), (4, 3)):
        parts, _, again = walked(model, tokens, n_first=n_first, n_threads=n_threads)
        for name, sums in whole.items():
            np.testing.assert_array_equal(parts[name].counts, sums.counts)
            np.testing.assert_allclose(parts[name].squares, sums.squares, rtol=1e-4)
        for name, hessian in hessians.items():
            np.testing.assert_allclose(again[name], hessian, atol=1e-5 * hessian.diagonal().max())
    one, three = (walked(model, tokens, n_first=2, n_threads=n)[2] for n in (1, 3))
    assert all(np.array_equal(one[name], three[name]) for name in one)


def test_wide_hessians_are_whole(monkeypatch):
    """More columns than a stripe, the last stripe narrower: every block of the symmetric matrix is filled."""
    monkeypatch.setattr(numpy_backend, "_STRIPE", 24)
    model = make_model(*random_arrays(5, n_layers=1))
    tokens = tokens_of(model)
    plain, _ = recorded_inputs(model, tokens)
    for name, hessian in walked(model, tokens)[2].items():
        rows = without_first(plain[name], 16).astype("f8")
        wanted = rows.T @ rows / len(rows)
        np.testing.assert_allclose(hessian, wanted, atol=1e-5 * wanted.diagonal().max())


def counted(model):
    """Return the model, and by tensor name how many weights are decoded from now on."""
    counts = collections.Counter()

    def count(tensor):
        def read(start, stop):
            counts[tensor.name] += (stop - start) * tensor.n_cols
            return tensor.rows(slice(start, stop))

        return read_by(tensor, read)

    return replace(model, tensors=tuple(count(tensor) for tensor in model.tensors)), counts


@pytest.mark.parametrize(("available", "wanted"), [(None, 1), (1 << 40, 1), (1 << 16, 8)])
def test_a_layer_is_decoded_once_forward_and_once_back(available, wanted, monkeypatch):
    """For all batches together; where the weights of a layer do not fit in memory, once for each of eight sequences."""
    monkeypatch.setattr(weights, "available_memory_bytes", lambda: available)
    model, counts = counted(make_model(*random_arrays(5, n_layers=2)))
    matrices = [tensor for tensor in model.tensors if tensor.is_matrix and tensor.layer is not None]
    tokens = tokens_of(model, 8)
    walked(model, tokens)
    assert {counts[tensor.name] / tensor.n_weights for tensor in matrices} == {wanted}
    if wanted == 1:
        counts.clear()
        fisher(model, tokens, 2)
        assert {counts[tensor.name] / tensor.n_weights for tensor in matrices} == {2}


def test_how_often_a_default_conversion_decodes_a_weight(tmp_path, monkeypatch):
    """The temporary original, forward, back, measuring (small matrices whole), writing: once each."""
    monkeypatch.setattr(generated_text, "N_TOKENS", 1024)
    monkeypatch.chdir(tmp_path)
    model, counts = counted(open_model(write_tiny(tmp_path / "wide", replace(TINY, n_layers=1))))
    with WorkFolder(tmp_path) as files:
        session = Session(model, Run(1), files)
        (plan,) = session.plans([settle(Options(target_bpw=4.0), model)], None)
        session.write(plan, tmp_path / "out.gguf")
    matrices = [tensor for tensor in model.tensors if tensor.is_matrix and tensor.layer is not None]
    assert len(matrices) == 7 and {counts[tensor.name] / tensor.n_weights for tensor in matrices} == {5}


@pytest.mark.parametrize("name", ["phi-3", "gpt-neox", "qwen2moe"])
def test_squared_norms_of_columns(name, tmp_path):
    """Of parts of a fused matrix together, of stacks not at all: what equalization would read the weights for."""
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    with walk(model, tokens_of(model), WalkOptions(5, Recording(column_squares=True))) as found:
        squares = found.column_squares
    assert squares.keys() == set(multiplied(model))
    for matrix, values in squares.items():
        stored = model.by_name[matrix].load().astype("f8")
        np.testing.assert_allclose(values, (stored**2).sum(axis=0), rtol=1e-12)
    with walk(model, tokens_of(model), WalkOptions(5)) as found:
        assert not found.column_squares


def test_damage_is_named_by_layer():
    arrays, hparams = random_arrays(5, n_layers=2)
    arrays["blk.1.ffn_up.weight"][3] = 3e38
    model = make_model(arrays, hparams)
    with pytest.raises(ModelError, match="layer 1: its output is not finite"):
        walked(model, tokens_of(model))


def test_hessians_need_a_taker():
    model = make_model(*random_arrays(5, n_layers=1))
    options = WalkOptions(5, Recording(frozenset(multiplied(model))))
    with pytest.raises(ValueError, match="on_hessian is None"), walk(model, tokens_of(model), options):
        pass


def test_progress_ends_where_it_said():
    model, steps = make_model(*random_arrays(5, n_layers=2)), []
    with walk(model, tokens_of(model), WalkOptions(2), lambda *step: steps.append(step)):
        pass
    assert steps == [(step, 9) for step in range(10)]  # two layers and the output, three batches each


# Streams between layers


def test_slots_are_written_again():
    with stream_file(None, 3, 16) as file:
        for slot, values in ((2, [1, 2, 3, 4]), (0, [5, 6]), (2, [7])):
            file.write(slot, np.array([values], np.float32))
        assert file.read(0).tolist() == [[5, 6]]
        assert file.read(2).tolist() == [[7]]
        with pytest.raises(ValueError, match="wanted at most 16 bytes a slot, got 20"):
            file.write(1, np.zeros(5, np.float32))


# Backends


class Doubled(NumpyBackend):
    """A backend that can be told from numpy's: what enters the first layer is doubled."""

    def embed(self, tokens):
        return 2 * super().embed(tokens)


def test_a_backend_that_is_registered_is_used(monkeypatch):
    opened = []

    @contextmanager
    def open_doubled(model, n_positions, n_threads):
        opened.append((n_positions, n_threads))
        with open_numpy(model, n_positions, n_threads) as backend:
            yield Doubled(model, n_positions, backend.pool)

    monkeypatch.setitem(BACKENDS, "doubled", BackendEntry("doubled", "twice the stream", lambda: "", open_doubled))
    model = make_model(*random_arrays(5, n_layers=1))
    tokens = tokens_of(model)
    streams = []
    for backend in ("cpu", "doubled"):
        options = WalkOptions(5, n_threads=2, backend=backend, folder=None)
        with walk(model, tokens, options) as found:
            streams.append(found.streams.read(0))
    assert opened == [(16, 2)]
    np.testing.assert_array_equal(streams[1], 2 * streams[0])


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    entry = BackendEntry("cuda", "on a GPU", lambda: "there is no GPU", open_numpy)
    monkeypatch.setitem(BACKENDS, "cuda", entry)
    with pytest.raises(PlanError, match="device cuda cannot run here: there is no GPU"):
        find_backend("cuda")
    with pytest.raises(PlanError, match="device 'abacus' is not known; wanted one of cpu, cuda"):
        find_backend("abacus")


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = make_model(*random_arrays(5, n_layers=1))
    with walk(model, tokens_of(model), WalkOptions(2, folder=tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []
