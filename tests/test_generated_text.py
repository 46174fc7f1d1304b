"""Calibration text that the model generates: how tokens are drawn, what is made of them, and the way to a file."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
from command import call, message
from tiny_archs import write_tiny_arch
from tiny_gguf import BOS, EOS, write_tiny_gguf
from tiny_models import Spec, write_tiny

from nsds_gguf import read
from nsds_gguf.calibration import generated_text
from nsds_gguf.calibration.evidence import Evidence, TokenRequest, column_weights
from nsds_gguf.calibration.generated_text import GeneratedText, draw, generated_tokens, write_tokens
from nsds_gguf.compute.input_moments import Moments
from nsds_gguf.conversion import convert, plan, score
from nsds_gguf.errors import OutputError, VerifyError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp.llama import open_context, open_model
from nsds_gguf.records import Options, Plan, no_progress
from nsds_gguf.session import room, session
from nsds_gguf.session.run import Run, Silent

WIDE = Spec("LlamaForCausalLM", n_embd=256, n_ff=256)  # rows fit K-quants; no BOS is added
UNCHECKED = VerifyOptions(enabled=False)
NONE = np.array([], np.intp)
GENERATED = {"rounding": "rtn", "calibration": "generated"}
NOTE = "Column weights come from 512 tokens that the model generated (sequences of "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generated_text")


@pytest.fixture(scope="module")
def tiny(folder):
    return write_tiny_gguf(folder / "tiny.gguf")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for module in (generated_text, room):
        monkeypatch.setattr(module, "N_TOKENS", 512)


# Drawing


def test_draws_follow_the_distribution():
    """Chi-squared of 20 000 draws of six tokens, one banned; at 4 degrees of freedom 23.5 is the 1e-4 point."""
    logits = np.log(np.array([0.4, 0.05, 0.2, 0.25, 0.03, 0.07])).astype(np.float32) + 3
    for temperature in (1.0, 0.5):
        wanted = np.array([0.4, 0.05, 0.2, 0, 0.03, 0.07]) ** (1 / temperature)
        tokens = draw(np.tile(logits, (20000, 1)), temperature, np.array([3]), np.random.default_rng(1))
        counts = np.bincount(tokens, minlength=6)
        assert counts[3] == 0
        expected = np.delete(wanted / wanted.sum() * 20000, 3)
        assert (np.square(np.delete(counts, 3) - expected) / expected).sum() < 23.5


def test_extreme_logits_can_be_drawn_from():
    rows = np.array([[-1e4, 1e4, 0], [5, -np.inf, -np.inf], [0, 0, 80]], np.float32)
    assert draw(rows, 1.0, NONE, np.random.default_rng(0)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("row", [[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf, -np.inf, -np.inf]])
def test_logits_that_are_none(row):
    with np.errstate(invalid="ignore"), pytest.raises(VerifyError, match="logits are not finite"):
        draw(np.array([row], np.float32), 1.0, NONE, np.random.default_rng(0))


def test_tokens_are_the_models_own(tiny):
    """Each token is drawn from the prediction after those before it: replayed in one pass, with the same draws."""
    tokens = write_tokens(tiny, n_sequences=3, length=40, seed=7, n_threads=1)
    rng = np.random.default_rng(7)
    with open_model(tiny) as model, open_context(model, n_ctx=40, n_batch=120, n_seq=3, n_threads=1) as context:
        logits = context.decode(tokens).copy()
    replayed = np.stack([draw(logits[:, at], 1.0, np.array([EOS]), rng) for at in range(39)], axis=1)
    assert (tokens[:, 0] == BOS).all()
    assert (replayed == tokens[:, 1:]).mean() > 0.97  # a rounding may tip a draw
    assert EOS not in tokens
    assert len({tuple(row) for row in tokens.tolist()}) == 3


def test_seed_and_start(tiny, folder):
    def written(file, seed):
        return write_tokens(file, n_sequences=40, length=8, seed=seed, n_threads=1)

    assert np.array_equal(written(tiny, 1), written(tiny, 1))
    assert not np.array_equal(written(tiny, 1), written(tiny, 2))
    plain = write_tiny_gguf(folder / "plain.gguf", add_bos=False)
    assert len(set(written(plain, 1)[:, 0].tolist())) > 20
    assert EOS not in written(plain, 1)


# What is made of it


def test_as_many_tokens_as_wanted(tiny, monkeypatch):
    monkeypatch.setattr(generated_text, "N_TOKENS", 300)
    monkeypatch.setattr(generated_text, "LENGTH", 64)
    seen = []
    model = read.open_model(tiny, None, False)
    request = TokenRequest(model, lambda: nullcontext(tiny), n_threads=1, progress=lambda *at: seen.append(at))
    tokens = generated_tokens(request)
    assert tokens.shape == (5, 64) and tokens.dtype == np.int64  # rounded up
    assert np.array_equal(tokens, write_tokens(tiny, n_sequences=5, length=64, n_threads=1))
    assert seen[-1] == (320, 320)
    assert seen == sorted(seen)
    fewer = generated_tokens(replace(request, n_tokens=100))
    assert np.array_equal(fewer, write_tokens(tiny, n_sequences=2, length=64, n_threads=1))


def test_weights_of_what_the_text_reaches_and_of_the_rest(folder):
    """An expert that no token went to has the columns of random tokens, in the measure of the others."""
    model = read.open_model(write_tiny_arch(folder / "deepseek2.gguf", "deepseek2"), None, False)
    stack, dense, missed = "blk.1.ffn_up_exps.weight", "blk.0.attn_q_a.weight", "blk.0.ffn_down.weight"
    rng = np.random.default_rng(1)
    own = rng.lognormal(size=(4, 256))
    own[2] = 0
    moments = {
        stack: Moments(own, np.array([5, 1, 0, 9])),
        dense: Moments(own[0], np.array([15])),
    }
    columns = {t.name: rng.lognormal(size=t.n_cols) for t in model.tensors if t.is_matrix}
    text = GeneratedText(Evidence(model, np.zeros((3, 5), np.int64), columns, moments=moments))
    weights = column_weights(text, model)
    assert np.allclose(weights[dense], own[0] / own[0].mean())
    assert np.allclose(weights[stack][[0, 1, 3]], own[[0, 1, 3]] / own[[0, 1, 3]].mean())
    assert np.allclose(weights[stack][2], columns[stack] / columns[stack].mean())
    assert np.allclose(weights[missed], columns[missed] / columns[missed].mean())
    assert all(array.dtype == np.float32 for array in weights.values())
    note = text.note()
    assert note.startswith("Column weights come from 15 tokens that the model generated (sequences of 5);")
    assert note.endswith(" 1 matrices of experts: their weights come from random tokens.")
    assert "token_embd" not in note


def test_columns_that_stay_zero_weigh_little(folder):
    model = read.open_model(write_tiny(folder / "zero", WIDE), None, False)
    name, squares = "blk.0.ffn_down.weight", np.ones(256)
    squares[7] = 0
    moments = {name: Moments(squares, np.array([5]))}
    weights = GeneratedText(Evidence(model, np.zeros((1, 5), np.int64), moments=moments)).column_weights(name)
    assert weights[7] == np.float32(1e-4)
    assert weights.min() > 0


# The way to a file


def test_one_copy_generates_text_and_one_original_is_compared(folder, tmp_path, monkeypatch):
    """Temporary GGUFs are written once and are gone afterwards; a plan can be carried out again."""
    source = write_tiny(folder / "wide", WIDE)
    written = []
    real = session.write_gguf
    monkeypatch.setattr(session, "write_gguf", lambda *a, **k: (written.append(a[3].name), real(*a, **k)))
    options = [Options(target_bpw=bpw, **GENERATED) for bpw in (4, 6)]
    checked = VerifyOptions(reference="original", n_chunks=1, n_ctx=64)
    done = convert(source, options, verifying=checked, output=tmp_path, run=Run(1))
    assert written[:2] == ["fast-copy.gguf", "original.gguf"] and len(written) == 4
    assert sorted(tmp_path.iterdir()) == sorted(item.path for item in done)
    made = done[0].plan
    assert made.recipe.calibration == "generated"
    assert made.notes[-1].startswith(NOTE)
    loaded = Plan.from_json(made.to_json())
    again = convert(source, (), loaded=loaded, verifying=UNCHECKED, output=tmp_path / "b.gguf", run=Run(1))
    assert again[0].path.read_bytes() == done[0].path.read_bytes()
    options = Options(target_bpw=4, rounding="rtn", calibration="random")
    on_random = convert(source, options, verifying=UNCHECKED, output=tmp_path / "c.gguf", run=Run(1))
    assert on_random[0].path.read_bytes() != done[0].path.read_bytes()


def test_a_gguf_generates_its_own_text(folder, tmp_path, monkeypatch):
    """No temporary file; scores are measured with the text, which planning and a uniform file tell of too."""
    source = write_tiny(folder / "wide2", WIDE)
    plain = Options(uniform="F32", **GENERATED)
    file = convert(source, plain, verifying=UNCHECKED, output=tmp_path / "f32.gguf")[0]
    assert file.plan.notes == ()  # nothing is quantized: no text
    monkeypatch.chdir(tmp_path)
    scores = score(file.path, Options(**GENERATED), run=Run(1))
    assert scores.recipe.calibration == "generated"
    assert scores.notes[-1].startswith(NOTE)
    assert "The text does not reach" not in scores.notes[-1]
    planned = plan(file.path, Options(target_bpw=4), loaded=scores, run=Run(1))
    assert planned.plans[0].notes.count(scores.notes[-1]) == 1
    uniform = Options(uniform="Q4_K", **GENERATED)
    assert plan(file.path, uniform, run=Run(1)).plans[0].notes[-1] == scores.notes[-1]
    more = plan(file.path, replace(uniform, calibration_tokens=700), run=Run(1)).plans[0]
    assert more.recipe.calibration_tokens == 700
    assert more.notes[-1].startswith("Column weights come from 768 tokens")
    assert list(tmp_path.iterdir()) == [file.path]


def test_the_command(folder, tmp_path, monkeypatch):
    source = write_tiny(folder / "wide3", WIDE)
    monkeypatch.chdir(tmp_path)
    outcome = call(
        "plan", source, "--target-bpw", "4", "--calibration", "generated", "--json", "plan.json", "--threads", 1, "-v"
    )
    assert outcome.code == 0
    assert re.search(r"Generating 512 tokens of calibration text: about \d+ s\.", outcome.err.replace("\n", " "))
    assert "Writing the fast copy as a temporary Q8_0 GGUF" in outcome.err
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"]["calibration"] == "generated"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert call("convert", source, "--plan", "plan.json", "-o", "x.gguf", "--no-verify", "--threads", 1).code == 0
    outcome = call("plan", source, "--target-bpw", "4", "--calibration", "generated", "--imatrix", "x.gguf")
    assert message(outcome, 4) == "--imatrix and --calibration generated contradict each other; drop one"


@pytest.mark.parametrize("options", [{}, {"rounding": "rtn", "score_weight": 1.0}], ids=["gptq", "rtn with scores"])
def test_every_stage_that_is_expected_runs_in_that_order(options, folder, tmp_path):
    """For two files; stages that are not expected take no time worth telling."""
    expected, ran = [], []

    class Listener(Silent):
        def expect(self, stages):
            expected.extend(stages)

        def stage(self, name):
            ran.append(name)
            return super().stage(name)

    source, short = write_tiny(folder / "wide5", WIDE), VerifyOptions(n_ctx=64, n_chunks=1)
    both = [Options(target_bpw=bpw, **options) for bpw in (4.0, 5.0)]
    convert(source, both, verifying=short, output=tmp_path, run=Run(1, Listener()))
    starts = tuple(start for start, _ in expected)
    assert [next(start for start in starts if name.startswith(start)) for name in ran if name.startswith(starts)] == [
        *starts
    ]
    assert all(seconds > 0 for _, seconds in expected)
    gptq = ["generate text", "find sensitivities", "factor Hessians", "measure tensors"]
    scored = ["score layers", "find sensitivities", "measure tensors"]
    files = ["quantize and write", "verify perplexity"] * 2
    assert [*starts] == [*(scored if options else gptq), *files]


def test_ctrl_c_leaves_nothing(folder, tmp_path, monkeypatch):
    source = write_tiny(folder / "wide4", WIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generated_text, "N_TOKENS", 1 << 20)

    timers = []

    class Impatient(Silent):
        @contextmanager
        def stage(self, name):
            yield self.progress if "generate text" in name else no_progress

        def progress(self, done, total):
            """Stop when tokens are being written: before, threadpoolctl looks for libraries, whose callback eats it."""
            if not timers:
                assert list(tmp_path.glob(".nsds-gguf-*/fast-copy.gguf"))
                timers.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
                timers[0].start()

    with pytest.raises(KeyboardInterrupt):
        plan(source, Options(target_bpw=4, **GENERATED), run=Run(1, Impatient()))
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_copy(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="the fast copy takes"):
        plan(write_tiny(folder / "wide5", WIDE), Options(target_bpw=4, **GENERATED), run=Run(1))
