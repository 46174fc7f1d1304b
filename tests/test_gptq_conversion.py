"""GPTQ rounding from the command line to the file: less error in the same bytes, records, refusals, nothing left."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from command import QUICK, TINY, call, message
from gguf import GGUFReader
from llama_forward import matrix_inputs
from recorded_inputs import recorded_inputs, without_first
from tiny_archs import write_tiny_arch
from tiny_gguf import tiny_text, tiny_weights, write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf import conversion, read
from nsds_gguf.calibration import generated_text, hessians, random_tokens
from nsds_gguf.calibration.activations import collect
from nsds_gguf.calibration.random_tokens import draw_tokens
from nsds_gguf.compute.decoder import what_is_missing
from nsds_gguf.errors import OutputError, PlanError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.records import UNQUANTIZED, Options, Plan
from nsds_gguf.session import session
from nsds_gguf.session.run import Run, Silent

UNCHECKED = VerifyOptions(enabled=False)
GPTQ = ("--rounding", "gptq", "--calibration", "random", "--threads", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder of a model whose rows fit K-quants, and of one with blocks of 32 and a forward pass in numpy."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "wide", replace(TINY, n_layers=1))
    write_tiny_gguf(folder / "narrow.gguf")
    write_tiny_arch(folder / "experts.gguf", "deepseek2")
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Draw and write fewer tokens, in an empty working directory."""
    monkeypatch.setattr(random_tokens, "N_SEQUENCES_HESSIANS", 4)
    monkeypatch.setattr(random_tokens, "N_SEQUENCES", 2)
    monkeypatch.setattr(random_tokens, "draw_tokens", drawn_short)
    monkeypatch.setattr(generated_text, "N_TOKENS", 512)
    monkeypatch.chdir(tmp_path)


def drawn_short(model, n_sequences, seed=0):
    return draw_tokens(model, n_sequences, 64 if n_sequences == 2 else 512, seed)


def converted(source, path, options, n_threads=1):
    (done,) = conversion.convert(source, options, verifying=UNCHECKED, output=path, run=Run(n_threads))
    return done


def drawn_moments(model):
    """Return second moments in float64 of what the pass tells, on tokens that rounding does not see."""
    inputs, _ = recorded_inputs(model, draw_tokens(model, 4, 512, seed=1))
    rows = {name: without_first(x, 512).astype(np.float64) for name, x in inputs.items()}
    return {name: x.T @ x for name, x in rows.items()}


def forward_moments(model):
    """Return those of a forward pass of the test's own."""
    inputs = matrix_inputs(tiny_weights(), draw_tokens(model, 8, 128, seed=1))
    return {name: rows.T @ rows for name, rows in inputs.items()}


@pytest.mark.parametrize(
    ("source", "type_name", "moments"),
    [("wide", "Q2_K", drawn_moments), ("wide", "Q4_K", drawn_moments), ("narrow.gguf", "Q4_0", forward_moments)],
)
def test_what_matrices_put_out_is_nearer_in_the_same_bytes(models, source, type_name, moments):
    """Mean square of the error of every matrix's output, on other tokens, the files read by gguf-py."""
    model = read.open_model(models / source)
    found = moments(model)
    errors, sizes = {}, set()
    for rounding in ("rtn", "gptq"):
        options = Options(uniform=type_name, rounding=rounding, calibration="random")
        done = converted(models / source, f"{rounding}.gguf", options)
        sizes.add(done.plan.tensor_bytes)
        for tensor in GGUFReader(done.path).tensors:
            if tensor.name in found:
                rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
                delta = rows - model.by_name[tensor.name].load()
                error = np.einsum("ri,ij,rj->", delta, found[tensor.name], delta, optimize=True)
                errors.setdefault(tensor.name, []).append(error)
    ratios = {name: gptq / rtn for name, (rtn, gptq) in errors.items()}
    assert set(ratios) == set(found) == set(hessians.multiplied(model)) and len(sizes) == 1
    assert max(ratios.values()) < 1 and np.exp(np.mean(np.log(list(ratios.values())))) < 0.8, ratios


def test_records_go_back_in_and_give_the_same_bytes(models):
    """A plan is carried out as it was the first time, with one thread or two; scores say how they were measured."""
    source = models / "wide"
    assert call("score", source, *GPTQ, "--types", "Q2_K,Q4_K", "--json", "scores.json", "-q").code == 0
    assert json.loads(Path("scores.json").read_text())["recipe"]["rounding"] == "gptq"
    first = call("convert", source, "--target-bpw", 3.5, *GPTQ, "--types", "Q2_K,Q4_K", "--scores", "scores.json",
                 "--no-verify", "--json", "-", "-o", "first.gguf", "-q")  # fmt: skip
    assert first.code == 0, first.err
    plan = Plan.from_json(json.loads(first.out)[0]["plan"])
    Path("plan.json").write_text(json.dumps(plan.to_json()))
    assert plan.recipe.rounding == "gptq" and plan.recipe.calibration == "random"
    assert GGUFReader("first.gguf").fields["nsds_gguf.rounding"].contents() == "gptq"
    options = Options(target_bpw=3.5, types=("Q2_K", "Q4_K"), rounding="gptq", calibration="random")
    second = converted(source, "second.gguf", options, n_threads=2)
    assert second.plan.tensors == plan.tensors and second.plan.notes == plan.notes
    third = call("convert", source, "--plan", "plan.json", "--threads", 2, "--no-verify", "-o", "third.gguf", "-q")
    assert third.code == 0, third.err
    assert Path("third.gguf").read_bytes() == Path("first.gguf").read_bytes()
    first_data, second_data = ([t.data.tobytes() for t in GGUFReader(f"{n}.gguf").tensors] for n in ("first", "second"))
    assert second_data == first_data  # its keys name other scores: 'score' scores layers too, 'convert' none
    assert message(call("plan", source, "--target-bpw", 3.5, "--scores", "scores.json"), 4) == (
        "the scores were measured with rounding gptq, the plan uses rtn; score again or pass --rounding gptq"
    )
    assert sorted(path.name for path in Path().iterdir()) == [
        "first.gguf", "plan.json", "scores.json", "second.gguf", "third.gguf"
    ]  # fmt: skip


@pytest.mark.parametrize("calibration", ["none", "norm"])
def test_calibrations_without_hessians(models, calibration):
    asked = ("--target-bpw", 4, "--rounding", "gptq", "--calibration", calibration)
    assert message(call("convert", models / "wide", *asked), 4) == (
        f"--rounding gptq needs Hessians, which --calibration {calibration} does not have; pass --calibration random "
        "or generated"
    )


class Stages(Silent):
    def __init__(self):
        self.names = []

    def stage(self, name):
        self.names.append(name)
        return super().stage(name)


def test_experts_go_by_generated_text(models):
    """Random tokens are refused before any work; with generated text, stacks go by round-to-nearest."""
    source, stages = models / "experts.gguf", Stages()
    missing = what_is_missing(read.open_model(source))
    with pytest.raises(PlanError) as caught:
        options = Options(target_bpw=4, rounding="gptq", calibration="random")
        conversion.plan(source, options, run=Run(1, stages))
    assert str(caught.value) == (
        f"--rounding gptq on random tokens cannot follow {missing} of {read.open_model(source).name}; pass "
        "--calibration generated, which llama.cpp computes"
    )
    assert stages.names == ["read headers"]
    files = {
        rounding: converted(
            source, f"{rounding}.gguf", Options(uniform="Q3_K", rounding=rounding, calibration="generated")
        )
        for rounding in ("rtn", "gptq")
    }
    rtn, gptq = ({t.name: t.data for t in GGUFReader(done.path).tensors} for done in files.values())
    alike = [name for name in rtn if np.array_equal(rtn[name], gptq[name])]
    matrices = [t.name for t in files["gptq"].plan.tensors if t.type not in UNQUANTIZED and t.name in alike]
    (note,) = [note for note in files["gptq"].plan.notes if note.startswith("GPTQ rounding")]
    assert "token_embd.weight" in matrices and "blk.1.ffn_up_exps.weight" in matrices
    assert "blk.1.ffn_up_shexp.weight" not in matrices and "blk.0.attn_q_a.weight" not in matrices
    n_open = sum(t.type not in UNQUANTIZED for t in files["gptq"].plan.tensors)
    assert f"covers {n_open - len(matrices)} of {n_open} matrices" in note
    assert f"rounded to nearest: {', '.join(matrices[:3])}" in note


def test_the_command_takes_generated_text_with_gptq(models):
    assert call("convert", models / "wide", "--uniform", "Q3_K", "--rounding", "gptq", "--threads", 1, "--no-verify",
                "--json", "plan.json", "-o", "x.gguf", "-q").code == 0  # fmt: skip
    (written,) = json.loads(Path("plan.json").read_text())
    plan = written["plan"]
    assert (plan["recipe"]["rounding"], plan["recipe"]["calibration"]) == ("gptq", "generated")
    told = " ".join(plan["notes"])
    assert "GPTQ rounding covers 8 of 9 matrices" in told and "tokens that the model generated" in told
    assert sorted(path.name for path in Path().iterdir()) == ["plan.json", "x.gguf"]


@pytest.mark.parametrize("end", ["failure", "Ctrl-C", "SIGTERM"])
def test_hessian_factors_are_kept_however_it_ends(models, monkeypatch, end):
    seen = []

    def stopped(*_arguments, **_options):
        seen.extend(Path().glob(".nsds-gguf-*/records/Hessian_factors*.bin"))
        if end == "failure":
            raise OutputError("the disk is full")
        os.kill(os.getpid(), signal.SIGINT if end == "Ctrl-C" else signal.SIGTERM)

    monkeypatch.setattr(session, "write_gguf", stopped)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        outcome = call("convert", models / "wide", "--uniform", "Q3_K", *GPTQ, "--no-verify", "-o", "x.gguf", "-q")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert outcome.code == {"failure": OutputError.exit_code, "Ctrl-C": 130, "SIGTERM": 143}[end]
    assert len(seen) == 5  # inputs: four of the layer, and the output's
    (work,) = Path().iterdir()
    assert {path.name for path in work.iterdir()} == {"lock", "records"}
    assert len(list(work.glob("records/Hessian_factors*.bin"))) == 5


def test_several_readings_by_llama_cpp_give_the_hessians_of_one(models, monkeypatch):
    """With no memory for more, every input is a reading of its own."""
    source, counts = models / "narrow.gguf", []
    model = read.open_model(source)
    tokens = draw_tokens(model, 8, 64)
    moments = collect(source, tokens.astype(np.int32), n_threads=1)

    def counted(*arguments, **options):
        counts.append(len(options["only"]))
        return collect(*arguments, **options)

    monkeypatch.setattr(hessians, "collect", counted)
    made = []
    for n_bytes in (1 << 40, 1):
        monkeypatch.setattr(hessians, "_budget_bytes", lambda n_bytes=n_bytes: n_bytes)
        inputs = hessians.shared_inputs(moments, hessians.multiplied(model))
        made.append(list(hessians.callback_hessians(lambda: nullcontext(source), tokens, moments, inputs, 1)))
    one, several = made
    assert counts == [15, 3, 1, 2, 1, 3, 1, 2, 1, 1]
    assert {name for names, _ in one for name in names} == set(hessians.multiplied(model))
    for (names, hessian), (names_again, again) in zip(one, several, strict=True):
        assert names == names_again
        np.testing.assert_array_equal(hessian, again)
        np.testing.assert_allclose(hessian.diagonal(), moments[names[0]].mean_squares, rtol=1e-5)


def test_q2_0_is_used_where_it_is_named_and_llama_cpp_reads_it(models, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(tiny_text(), encoding="utf-8")
    outcome = call(
        "convert", models / "wide", "--target-bpw", "3", "--types", "Q2_0,Q4_K", *GPTQ, "-o", "a.gguf",
        "--text", text, *QUICK, "--reference", "original", "--json", "a.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (made,) = json.loads(Path("a.json").read_text())
    types = {tensor["type"] for tensor in made["plan"]["tensors"]}
    assert {"Q2_0", "Q4_K"} <= types
    (note,) = [note for note in made["plan"]["notes"] if "Q2_0" in note]
    assert "since July 2026" in note
    assert 0 < made["perplexity"]["divergence"]["kld_mean"] < 5
    assert {tensor.type for tensor in read_gguf_header(Path("a.gguf")).tensors} == types
    plain = call("plan", models / "wide", "--target-bpw", "3", *GPTQ, "--json", "b.json")
    assert plain.code == 0 and "Q2_0" not in Path("b.json").read_text()
