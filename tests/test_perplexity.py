"""Perplexity and divergence against llama-perplexity's recorded numbers and against numpy alone."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import psutil
import pytest
from llama_perplexity_oracle import exact_scores, flat, rounded_scores, statistics
from perplexity_cases import CASES, case_file, case_text, scored_logits
from scipy.special import log_softmax
from tiny_gguf import (
    BOS,
    EOS,
    HEAD_DIM,
    N_EMBD,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    N_VOCAB,
    NORM_EPS,
    ROPE_THETA,
    UNK,
    tiny_text,
    tiny_vocabulary,
    tiny_weights,
    write_tiny_gguf,
)

import nsds_gguf.evaluate.perplexity as module
from nsds_gguf import __version__
from nsds_gguf.errors import GgmlError, TextError, VerifyError
from nsds_gguf.evaluate import divergence
from nsds_gguf.evaluate.divergence import TOKEN_SCORE, score_rows
from nsds_gguf.evaluate.perplexity import Perplexity, Window, check_sane
from nsds_gguf.llamacpp import llama
from nsds_gguf.llamacpp.llama import default_threads, llama_build, open_model
from nsds_gguf.llamacpp.process import LlamaProcess, llama_process

GOLDEN = json.loads((Path(__file__).parent / "golden" / "perplexity.json").read_text(encoding="utf-8"))
TEXT = tiny_text()

# One thread does for so small a model, and does not wait for others on a busy machine.
perplexity = functools.partial(module.perplexity, n_threads=1)
logits = functools.partial(llama.logits, n_threads=1)
open_context = functools.partial(llama.open_context, n_threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of the tiny model; files of other cases join it when asked for."""
    path = tmp_path_factory.mktemp("gguf")
    for model in ("bos-F32", "bos-Q8_0", "bos-Q4_0", "plain-F32"):
        case_file(path, f"tiny-{model}")
    return path


@pytest.fixture
def tiny(folder):
    return folder / "tiny-bos-F32.gguf"


# --- llama-perplexity ---

# Four thousand tokens take the demo model seconds: of these the tests run one, the check tool all.
LONG = [case for case in CASES if case.model.startswith("demo") and case.n_ctx == 2048][1:]
ALONE = [case for case in CASES if case.reference is None and case not in LONG]
PAIRS = [case for case in CASES if case.reference is not None]

# Other processors compute with other kernels; the check tool compares one build with itself to the last digit.
ELSEWHERE = {"rel": 1e-3, "abs": 1e-5}

# Quantized matrices are multiplied in integers, after rounding what they multiply, and kernels round differently:
# AVX2 with interleaved rows against AMX moves the perplexity of the demo in Q4_K by up to 4e-3, percentiles of its few
# hundred tokens by a fifth (docs/log.md). What is exact there is held against numpy on the same logits, below.
ELSEWHERE_QUANTIZED = {"tiny": {"rel": 2e-2, "abs": 1e-3}, "demo": {"rel": 0.3, "abs": 3e-3}}
PERPLEXITY_QUANTIZED = {"rel": 1e-2}

# What 16 bits, and log-probabilities below -16 left out, change in llama-perplexity's divergences.
ROUNDED = {"rel": 1e-3, "abs": 5e-5}


def case_id(case):
    return f"{case.model}-{case.n_ctx}-{case.n_batch}"


def golden(case):
    """Return what llama-perplexity printed, and its running perplexities."""
    (found,) = (entry for entry in GOLDEN["cases"] if entry["case"] == dataclasses.asdict(case))
    return found["llama_perplexity"], found["running_ppl"]


def run(folder, case, **options):
    return perplexity(
        case_file(folder, case.model),
        case_text(case),
        Window(n_ctx=case.n_ctx, n_batch=case.n_batch, n_chunks=case.n_chunks),
        reference=case_file(folder, case.reference) if case.reference else None,
        **options,
    )


def about(wanted, n, tolerance, names=None):
    """Expect these numbers, or those of some names, but let other kernels tip a few of the ``n`` top tokens."""
    return {
        **{name: pytest.approx(wanted[name], **tolerance) for name in names or wanted},
        "same_top": pytest.approx(wanted["same_top"], abs=5 / n),
        "same_top_error": pytest.approx(wanted["same_top_error"], rel=0.1),
    }


@pytest.mark.parametrize("case", ALONE, ids=case_id)
def test_numbers_are_those_of_llama_perplexity(folder, case):
    wanted, wanted_running = golden(case)
    running = []
    got = run(folder, case, on_chunk=lambda run: running.append((run.n_chunks, run.ppl, run.n_chunks_wanted)))
    tolerance = ELSEWHERE if "-F32" in case.model else PERPLEXITY_QUANTIZED
    assert (got.ppl, got.ppl_error) == pytest.approx((wanted["ppl"], wanted["ppl_error"]), **tolerance)
    assert got.adds_bos == ("-bos-" in case.model) and got.n_text_tokens > got.n_chunks * case.n_ctx
    n_chunks = len(wanted_running)
    assert [(chunk, total) for chunk, _, total in running] == [(i + 1, n_chunks) for i in range(n_chunks)]
    assert [ppl for _, ppl, _ in running] == pytest.approx(wanted_running, **tolerance)


@pytest.mark.parametrize("case", PAIRS, ids=case_id)
def test_statistics_are_those_of_llama_perplexity(folder, case):
    """Its figures are those of 16-bit log-probabilities, ours those of the same logits without that rounding."""
    got = flat(run(folder, case).to_json())
    logits, targets = scored_logits(case_file(folder, case.model), case_text(case), case)
    base, _ = scored_logits(case_file(folder, case.reference), case_text(case), case)
    wanted, n = golden(case)[0], len(targets)
    assert len(wanted) == 43 and got["n_scored_tokens"] == n
    rounded = statistics(rounded_scores(logits, base, targets))
    tolerance = ELSEWHERE if "-F32" in case.model else ELSEWHERE_QUANTIZED[case.model.split("-")[0]]
    assert {name: rounded[name] for name in wanted} == about(wanted, n, tolerance)
    exact = statistics(exact_scores(logits, base, targets))
    assert {name: got[name] for name in exact} == pytest.approx(exact, rel=1e-8, abs=1e-11)
    assert {name: got[name] for name in wanted} == about(rounded, n, ROUNDED, wanted)


def test_recorded_settings_tell_the_variants_apart():
    """BOS or none, chunk length and type each move the perplexity by more than the tolerance."""
    found = [golden(case)[0]["ppl"] for case in ALONE if case.n_batch == 2048]
    found.sort()
    assert all(b / a > 1 + 1e-6 for a, b in itertools.pairwise(found)) and len(found) > 15


# --- numpy alone ---


def numpy_logits(weights, tokens):
    """Return the logits of the llama architecture, ``(n_tokens, N_VOCAB)``, in float64 with none of llama.cpp."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    x = w["token_embd.weight"][tokens]
    for layer in range(N_LAYERS):
        t = {name.split(".")[2]: tensor for name, tensor in w.items() if name.startswith(f"blk.{layer}.")}
        x = x + attention(rms_norm(x) * t["attn_norm"], t)
        h = rms_norm(x) * t["ffn_norm"]
        gate = h @ t["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ t["ffn_up"].T)) @ t["ffn_down"].T
    return rms_norm(x) * w["output_norm.weight"] @ w["output.weight"].T


def rms_norm(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + NORM_EPS)


def attention(x, t):
    n = len(x)
    q = rope((x @ t["attn_q"].T).reshape(n, N_HEADS, HEAD_DIM))
    k = rope((x @ t["attn_k"].T).reshape(n, N_KV_HEADS, HEAD_DIM)).repeat(N_HEADS // N_KV_HEADS, axis=1)
    v = (x @ t["attn_v"].T).reshape(n, N_KV_HEADS, HEAD_DIM).repeat(N_HEADS // N_KV_HEADS, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(HEAD_DIM)
    scores[:, np.triu(np.ones((n, n), dtype=bool), 1)] = -np.inf
    return np.einsum("hij,jhd->ihd", np.exp(log_softmax(scores, axis=-1)), v).reshape(n, N_EMBD) @ t["attn_output"].T


def rope(x):
    angle = np.arange(len(x))[:, None, None] * ROPE_THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], axis=-1)
    return turned.reshape(x.shape)


def test_logits_are_those_of_the_architecture(tiny):
    tokens = np.random.default_rng(5).integers(3, N_VOCAB, 100)
    tokens[0] = BOS
    got = logits(tiny, tokens.tolist())
    assert got.shape == (100, N_VOCAB) and got.dtype == np.float32
    assert got == pytest.approx(numpy_logits(tiny_weights(), tokens), abs=2e-4)


def test_perplexity_is_that_of_its_definition(tiny):
    tokens = [BOS, N_VOCAB - 1, *(N_VOCAB - 1 if byte == 32 else byte + 3 for byte in TEXT.encode())]
    nll = []
    for start in range(0, 5 * 128, 128):
        chunk = np.array([BOS, *tokens[start + 1 : start + 128]])
        predicted = log_softmax(numpy_logits(tiny_weights(), chunk), axis=1)
        nll += [-predicted[i, chunk[i + 1]] for i in range(64, 127)]
    got = perplexity(tiny, TEXT, Window(n_ctx=128, n_chunks=5))
    assert (got.n_chunks, got.n_scored_tokens, got.n_text_tokens) == (5, len(nll), len(tokens))
    assert got.ppl == pytest.approx(math.exp(np.mean(nll)), rel=5e-4)
    assert got.ppl_error == pytest.approx(got.ppl * np.std(nll) / math.sqrt(len(nll) - 1), rel=5e-4)
    assert got.bits_per_byte == pytest.approx(np.mean(nll) / math.log(2) * len(tokens) / len(TEXT.encode()), rel=5e-4)


@pytest.mark.parametrize("n_vocab", [5, 1000, 40001])
@pytest.mark.parametrize("scale", [1, 300])
def test_scores_of_rows_are_those_of_scipy(n_vocab, scale):
    rng = np.random.default_rng(n_vocab)
    ours, reference = scale * rng.standard_normal((2, 77, n_vocab), dtype=np.float32)
    reference = ours + reference / 10
    targets = rng.integers(0, n_vocab, 77, dtype=np.int32)
    log_q = log_softmax(ours.astype(np.float64), axis=1)
    log_p = log_softmax(reference.astype(np.float64), axis=1)
    rows = np.arange(77)
    alone, pair = np.zeros((2, 77), dtype=TOKEN_SCORE)
    score_rows(alone, [ours], targets)
    score_rows(pair, [ours, reference], targets)
    assert alone["nll"] == pytest.approx(-log_q[rows, targets], rel=1e-6)
    assert pair["nll"] == pytest.approx(-log_q[rows, targets], rel=1e-12)
    assert pair["reference_nll"] == pytest.approx(-log_p[rows, targets], rel=1e-12)
    assert pair["kld"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1), rel=1e-9, abs=1e-12)
    assert (pair["same_top"] == (log_p.argmax(axis=1) == log_q.argmax(axis=1))).all()


def test_statistics_by_hand():
    scores = np.zeros(4, dtype=TOKEN_SCORE)
    scores["nll"] = [1, 2, 3, 4]
    scores["reference_nll"] = [1, 1, 3, 3]
    scores["kld"] = [0, 0.5, 0.1, 0.2]
    scores["same_top"] = [True, True, True, False]
    got = dataclasses.asdict(divergence.divergence(scores))
    # Means of nll 2.5 and 2, variances 1.25 and 1, covariance 1; llama-perplexity: sqrt(a + b - 2 cov) of the means.
    assert got["reference_ppl"] == pytest.approx(math.exp(2))
    assert got["reference_ppl_error"] == pytest.approx(math.exp(2) * math.sqrt(1 / 3))
    assert got["ppl_ratio"] == pytest.approx(math.exp(0.5))
    assert got["ppl_ratio_error"] == pytest.approx(math.exp(0.5) * math.sqrt((1.25 + 1 - 2 * 1) / 3))
    assert got["kld_mean"] == pytest.approx(0.2)
    assert got["kld_error"] == pytest.approx(math.sqrt(0.035 / 3))
    kld = got["kld_percentiles"]
    assert (kld["0"], kld["50"], kld["99"], kld["100"]) == pytest.approx((0, 0.15, 0.2 + 0.97 * 0.3, 0.5))
    assert got["log_ppl_correlation"] == pytest.approx(1 / math.sqrt(1.25))
    assert got["ppl_difference"] == pytest.approx(math.exp(2.5) - math.exp(2))
    errors = (math.exp(5) * 1.25 + math.exp(4) * 1 - 2 * math.exp(4.5) * 1) / 3
    assert got["ppl_difference_error"] == pytest.approx(math.sqrt(errors))
    delta = [0, math.exp(-2) - math.exp(-1), 0, math.exp(-4) - math.exp(-3)]
    assert got["delta_p_mean"] == pytest.approx(sum(delta) / 4)
    squares = [x**2 for x in delta]
    assert got["delta_p_rms"] == pytest.approx(math.sqrt(sum(squares) / 4))
    square_error = math.sqrt((sum(x**2 for x in squares) / 4 - (sum(squares) / 4) ** 2) / 3)
    assert got["delta_p_rms_error"] == pytest.approx(square_error / (2 * got["delta_p_rms"]))
    assert got["delta_p_percentiles"]["0"] == min(delta) and got["delta_p_percentiles"]["100"] == 0
    assert (got["same_top"], got["same_top_error"]) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 3)))


def test_statistics_without_variation():
    """A model that knows nothing gives every token the same chance: there is nothing to correlate."""
    scores = np.zeros(4, dtype=TOKEN_SCORE)
    scores["nll"] = scores["reference_nll"] = math.log(100)
    got = divergence.divergence(scores)
    assert (got.log_ppl_correlation, got.ppl_ratio, got.delta_p_rms, got.delta_p_rms_error) == (None, 1, 0, 0)


def test_statistics_beyond_a_float():
    scores = np.zeros(4, dtype=TOKEN_SCORE)
    scores["nll"] = [1e3, 2e3, 3e3, 4e3]
    got = divergence.divergence(scores)
    assert (got.ppl_ratio, got.ppl_difference, got.ppl_difference_error) == (math.inf, math.inf, math.inf)


# --- what a run reports ---


def test_json_has_no_reference_without_one(tiny):
    result = perplexity(tiny, TEXT, Window(n_ctx=128, n_chunks=3, n_batch=300), n_threads=1)
    assert result.to_json() == {
        "ppl": result.ppl,
        "ppl_error": result.ppl_error,
        "bits_per_byte": result.bits_per_byte,
        "n_ctx": 128,
        "n_chunks": 3,
        "n_chunks_wanted": 3,
        "n_scored_tokens": 3 * 63,
        "n_text_tokens": 2702,
        "n_text_bytes": 2700,
        "text_sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "adds_bos": True,
        "n_vocab": N_VOCAB,
        "n_ctx_train": 512,
        "n_batch": 256,
        "n_threads": 1,
        "versions": {"nsds-gguf": __version__, "llama.cpp": llama_build()},
    }
    assert json.loads(json.dumps(result.to_json())) == result.to_json()


def test_a_model_does_not_diverge_from_itself(tiny):
    result = perplexity(tiny, TEXT, Window(n_ctx=128, n_chunks=2), reference=tiny)
    found = result.divergence
    assert (found.kld_mean, found.kld_percentiles["100"], found.same_top, found.ppl_ratio) == (0, 0, 1, 1)
    assert found.log_ppl_correlation == pytest.approx(1) and found.reference_ppl == result.ppl


def test_threads_do_not_change_the_numbers(tiny, folder):
    def run(n_threads):
        return perplexity(
            tiny, TEXT, Window(n_ctx=128, n_chunks=2), n_threads=n_threads, reference=folder / "tiny-bos-Q4_0.gguf"
        )

    one, two = run(1), run(2)
    assert (two.ppl, two.divergence.kld_mean) == pytest.approx((one.ppl, one.divergence.kld_mean), rel=1e-9)
    assert (one.n_threads, two.n_threads) == (1, 2)


def test_progress_counts_chunks(tiny):
    seen = []
    perplexity(tiny, TEXT, Window(n_ctx=128, n_chunks=18), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 18), (16, 18), (18, 18)]


def test_one_newline_at_the_end_does_not_count(tiny):
    with_newline = perplexity(tiny, TEXT + "\n", Window(n_ctx=512))
    assert with_newline.n_text_bytes == 2701  # the digest is that of the file
    assert (with_newline.ppl, with_newline.n_text_tokens) == (perplexity(tiny, TEXT, Window(n_ctx=512)).ppl, 2702)
    assert perplexity(tiny, " " + TEXT + "\n\n", Window(n_ctx=512)).n_text_tokens == 2702 + 2


def test_nothing_is_printed(tiny, folder, capfd):
    perplexity(tiny, TEXT, Window(n_ctx=128, n_chunks=1), reference=folder / "tiny-bos-Q8_0.gguf")
    assert capfd.readouterr() == ("", "")


# --- what goes wrong ---


def test_short_text(tiny):
    with pytest.raises(TextError) as caught:
        perplexity(tiny, "a" * 100, Window(n_ctx=512))
    assert str(caught.value) == (
        "text: too short: wanted at least 1024 tokens for a context of 512, got 102; "
        "use a longer text or a smaller --ctx-size"
    )


def test_text_of_exactly_two_chunks(tiny):
    assert perplexity(tiny, "a" * 62, Window(n_ctx=32)).n_chunks == 2
    with pytest.raises(TextError, match="wanted at least 64 tokens for a context of 32, got 63"):
        perplexity(tiny, "a" * 61, Window(n_ctx=32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 4}, "perplexity: wanted a context of at least 8 tokens, got 4; use a larger --ctx-size"),
        ({"n_chunks": 0}, "perplexity: wanted at least 1 chunk, got 0; leave out --chunks to take all"),
        ({"n_batch": 0}, "perplexity: wanted batches of at least 1 token, got 0"),
    ],
)
def test_options_that_score_nothing(tiny, options, message):
    with pytest.raises(TextError) as caught:
        perplexity(tiny, TEXT, Window(**options))
    assert str(caught.value) == message


def test_missing_file(tmp_path):
    with pytest.raises(VerifyError) as caught:
        perplexity(tmp_path / "none.gguf", TEXT)
    assert str(caught.value) == f"{tmp_path / 'none.gguf'}: no such GGUF file"


def test_file_that_is_no_gguf_names_the_reason(tmp_path):
    file = tmp_path / "page.gguf"
    file.write_text("<html>not found</html>" * 100, encoding="utf-8")
    with pytest.raises(VerifyError, match=r"llama.cpp cannot load it: .*magic") as caught:
        perplexity(file, TEXT)
    assert "\n" not in str(caught.value)


def test_truncated_file_names_the_reason(tiny, tmp_path):
    file = tmp_path / "half.gguf"
    file.write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    with pytest.raises(VerifyError, match=r"llama.cpp cannot load it: .*not within the file bounds") as caught:
        perplexity(file, TEXT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_nan_and_infinity_name_file_and_chunk(tiny, tmp_path, value):
    weights = tiny_weights()
    weights["output.weight"][7] = value
    bad = write_tiny_gguf(tmp_path / "bad.gguf", weights=weights)
    message = f"{bad}: NaN or infinite logits at 63 of 63 scored tokens of chunk 1 of 21; the file is damaged"
    with pytest.raises(VerifyError) as caught:
        perplexity(bad, TEXT, Window(n_ctx=128))
    assert str(caught.value) == message
    with pytest.raises(VerifyError) as caught:
        perplexity(tiny, TEXT, Window(n_ctx=128), reference=bad)
    assert str(caught.value) == message


def test_one_infinite_logit_of_an_unlikely_token():
    """It leaves the perplexity finite, but not the divergence."""
    ours, reference = np.random.default_rng(7).standard_normal((2, 3, 50), dtype=np.float32)
    ours[1, 9] = -np.inf
    scores = np.zeros(3, dtype=TOKEN_SCORE)
    score_rows(scores, [ours, reference], np.zeros(3, dtype=np.int32))
    assert np.isfinite(scores["nll"]).all()
    with pytest.raises(VerifyError, match=r"^a or b: NaN or infinite logits at 1 of 3 scored tokens of chunk 5 of 8"):
        module._check_finite(scores, [Path("a"), Path("b")], 4, 8)


def test_absurd_perplexity(tiny, tmp_path):
    check_sane(tiny, perplexity(tiny, TEXT, Window(n_ctx=128)))
    weights = tiny_weights()
    weights["output.weight"] *= -10
    bad = write_tiny_gguf(tmp_path / "bad.gguf", weights=weights)
    result = perplexity(bad, TEXT, Window(n_ctx=128))
    with pytest.raises(VerifyError, match=r"bad.gguf: perplexity .* is absurd: wanted at most 2600 "):
        check_sane(bad, result)


@pytest.mark.parametrize(("factor", "fails"), [(9.9, False), (10.1, True), (math.inf, True), (math.nan, True)])
def test_bound_of_absurd(factor, fails):
    result = Perplexity(
        factor * 1000, 1.0, 1.0, 512, 1, 1, 255, 1024, 4096, "0" * 64, adds_bos=True, n_vocab=1000, n_ctx_train=512,
        n_batch=512, n_threads=1, versions={},
    )  # fmt: skip
    if not fails:
        return check_sane(Path("a.gguf"), result)
    with pytest.raises(VerifyError, match="absurd"):
        check_sane(Path("a.gguf"), result)


def test_perplexity_beyond_a_float_is_infinite():
    assert divergence._exp(1000.0) == math.inf


def test_reference_of_another_vocabulary_size(tiny, tmp_path):
    weights = tiny_weights()
    for name in ("token_embd.weight", "output.weight"):
        weights[name] = np.concatenate([weights[name], weights[name][-1:]])
    other = write_tiny_gguf(tmp_path / "other.gguf", weights=weights, vocabulary=[*tiny_vocabulary(), "more"])
    with pytest.raises(VerifyError) as caught:
        perplexity(tiny, TEXT, reference=other)
    assert str(caught.value) == (
        f"{other}: cannot be the reference of {tiny}: wanted a vocabulary of 260, got 261; compare files of one model"
    )


def test_reference_of_another_tokenizer(tiny, folder, tmp_path):
    tokens = tiny_vocabulary()
    tokens[100], tokens[101] = tokens[101], tokens[100]
    swapped = write_tiny_gguf(tmp_path / "swapped.gguf", vocabulary=tokens)
    for other in (swapped, folder / "tiny-plain-F32.gguf"):
        with pytest.raises(VerifyError, match="it tokenizes the text differently") as caught:
            perplexity(tiny, TEXT, reference=other)
        assert str(caught.value).startswith(f"{other}: cannot be the reference of {tiny}: ")


def test_vocabulary_that_adds_eos(tmp_path):
    with_eos, without = (write_tiny_gguf(tmp_path / f"{eos}.gguf", add_eos=eos) for eos in (True, False))
    found, wanted = perplexity(with_eos, TEXT), perplexity(without, TEXT)
    assert found.ppl == wanted.ppl and found.n_text_tokens == wanted.n_text_tokens


def test_context_that_cannot_be_created(tiny):
    with (
        open_model(tiny) as model,
        pytest.raises(GgmlError, match=r"cannot create a context: .*n_seq_max"),
        open_context(model, n_ctx=16, n_batch=16, n_seq=10**6),
    ):
        pass


def test_block_that_does_not_fit_the_context(tiny):
    with open_model(tiny) as model, open_context(model, n_ctx=256, n_batch=512) as context:
        context.decode(np.full((1, 256), 5, dtype=np.int32))
        with pytest.raises(GgmlError, match=r"tiny-bos-F32.gguf: llama_decode failed with status 1"):
            context.decode(np.full((1, 8), 5, dtype=np.int32), start=256)


# --- nothing stays behind ---


@pytest.fixture
def live(monkeypatch):
    """Count what llama.cpp's process has made and not freed."""
    counts = dict.fromkeys(("model", "context"), 0)
    steps = {"load": ("model", 1), "free_model": ("model", -1), "open_context": ("context", 1),
             "free_context": ("context", -1)}  # fmt: skip
    call = LlamaProcess.call

    def counted(process, what, method, *arguments):
        result = call(process, what, method, *arguments)
        if method in steps:
            counts[steps[method][0]] += steps[method][1]
        return result

    monkeypatch.setattr(LlamaProcess, "call", counted)
    return counts


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_all_is_freed(tiny, folder, live, error):
    def progress(done, total):
        assert live == {"model": 2, "context": 2}
        if error and done:
            raise error

    def run():
        perplexity(tiny, TEXT, Window(n_ctx=128), reference=folder / "tiny-bos-Q4_0.gguf", progress=progress)

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert live == {"model": 0, "context": 0}


def test_models_are_freed_when_a_text_is_too_short(tiny, live):
    with pytest.raises(TextError):
        perplexity(tiny, "", reference=tiny)
    assert live == {"model": 0, "context": 0}


def test_ctrl_c_stops_a_run(tiny, monkeypatch):
    """The signal comes early, while llama.cpp works."""
    seen = []
    process = llama_process()
    reply = LlamaProcess._reply

    def interrupted(process):
        if seen:
            os.kill(os.getpid(), signal.SIGINT)
        return reply(process)

    monkeypatch.setattr(LlamaProcess, "_reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perplexity(tiny, TEXT * 40, Window(n_ctx=512), progress=lambda done, total: seen.append(done))
    assert max(seen) < 100  # of 210
    assert not process.is_alive


def test_import_does_not_load_llama_cpp():
    code = "import sys, nsds_gguf.evaluate.perplexity; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- llama.py's own ---


def test_tokenize(tiny):
    a, b, space = ord("a") + 3, ord("b") + 3, N_VOCAB - 1
    with open_model(tiny, vocab_only=True) as model:
        assert (model.n_vocab, model.bos, model.adds_eos) == (N_VOCAB, BOS, False)
        assert model.tokenize("ab").tolist() == [BOS, space, a, b]
        assert model.tokenize("ab", add_special=False).tolist() == [space, a, b]
        assert model.tokenize("a</s>", parse_special=True).tolist() == [BOS, space, a, EOS]
        assert EOS not in model.tokenize("a</s>")
        assert model.tokenize("").tolist() == [BOS]


def test_tokenize_to_more_tokens_than_bytes(tmp_path):
    file = write_tiny_gguf(tmp_path / "bytes.gguf", vocabulary=tiny_vocabulary()[:-1])
    with open_model(file, vocab_only=True) as model:
        marks = [byte + 3 for byte in "▁".encode()]
        assert model.tokenize(" " * 50).tolist() == [BOS, *marks * 51]


def test_model_without_bos(folder):
    with open_model(folder / "tiny-plain-F32.gguf", vocab_only=True) as model:
        assert model.bos is None
        assert BOS not in model.tokenize("ab") and UNK not in model.tokenize("ab")


def test_sequences_and_blocks_give_the_logits_of_one_run(tiny):
    tokens = np.random.default_rng(6).integers(3, N_VOCAB, (3, 40), dtype=np.int32)
    whole = np.stack([logits(tiny, row.tolist()) for row in tokens])
    with open_model(tiny) as model, open_context(model, n_ctx=40, n_batch=120, n_seq=3, exact=True) as context:
        for _ in range(2):
            context.clear()
            assert context.decode(tokens[:, :15], first_output=20).shape == (3, 0, N_VOCAB)
            got = context.decode(tokens[:, 15:], start=15, first_output=20)
            assert got == pytest.approx(whole[:, 20:], abs=1e-4)


def test_default_threads(monkeypatch):
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert default_threads() == 1
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {10**6, 10**6 + 1})  # not in /sys: a core each
        assert default_threads() == 2
        monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 9 if logical else 5)
    assert default_threads() == 5
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)  # the system does not say
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert default_threads() == 7


def test_build_names_the_binding():
    assert f" (llama-cpp-python {llama_cpp.__version__}; " in llama_build()
    assert "\n" not in llama_build()
