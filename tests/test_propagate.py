"""Moment propagation against sampling and against a plain float64 retelling of its formulas."""

from dataclasses import replace

import numpy as np
import pytest
from arrays import random_arrays
from models import make_model

from nsds_gguf.calibration.column_weights import FLOOR
from nsds_gguf.calibration.evidence import Evidence, column_weights
from nsds_gguf.calibration.kinds import find_calibration
from nsds_gguf.errors import ModelError, PlanError
from nsds_gguf.llamacpp.rules import kept_reason
from nsds_gguf.sensitivity.blocks import ATTENTION_SHRINK
from nsds_gguf.sensitivity.moment_propagation import STREAM_WEIGHT, propagate
from nsds_gguf.sensitivity.moments import Signal, gated_unit_moments


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("gate", "up", "rho"), [(1.0, 1.0, 0.0), (0.3, 2.0, 0.7), (4.0, 0.5, -0.9), (0.01, 1.0, 0.2)])
def test_gated_unit_moments_equal_sampling(gate, up, rho):
    rng = np.random.default_rng(0)
    z, w = rng.standard_normal((2, 1_000_000))
    g, u = np.sqrt(gate) * z, np.sqrt(up) * (rho * z + np.sqrt(1 - rho**2) * w)
    s = 1 / (1 + np.exp(-g))
    slope = s * (1 + g * (1 - s))
    both = np.array([rho * np.sqrt(gate * up)])
    units = gated_unit_moments(Signal(np.array([gate])), Signal(np.array([up])), both)
    assert units.second[0] == pytest.approx(((silu(g) * u) ** 2).mean(), rel=2e-2)
    assert units.mean[0] == pytest.approx((silu(g) * u).mean(), abs=5e-3)
    assert units.noise[0] == pytest.approx(((slope * np.sqrt(gate) * u) ** 2).mean(), rel=2e-2)


def test_dead_units_have_no_moments():
    units = gated_unit_moments(Signal(np.zeros(1)), Signal(np.ones(1)), np.zeros(1))
    assert units.second[0] == units.mean[0] == units.noise[0] == 0.0


def retold(arrays, h, tied):
    """Retell the propagation loop by loop in float64: sensitivities and inputs by tensor name."""
    a = {name: value.astype(np.float64) for name, value in arrays.items()}
    stream = (a["token_embd.weight"] ** 2).mean(axis=0)
    alpha, inputs = {"token_embd.weight": STREAM_WEIGHT}, {}
    for i in range(h.n_layers):
        t = {name.removeprefix(f"blk.{i}."): value for name, value in a.items() if name.startswith(f"blk.{i}.")}
        name = f"blk.{i}.{{}}.weight".format
        x2 = stream / (stream.mean() + h.norm_eps) * t["attn_norm.weight"] ** 2
        for role in ("attn_q", "attn_k", "attn_v"):
            inputs[name(role)] = x2
        v2 = np.array([ATTENTION_SHRINK * sum(row**2 * x2) for row in t["attn_v.weight"]])
        if "attn_v.bias" in t:
            v2 = v2 + t["attn_v.bias"] ** 2
        group = h.n_heads // h.n_kv_heads
        o2 = np.concatenate([v2[(head // group) * h.head_dim :][: h.head_dim] for head in range(h.n_heads)])
        inputs[name("attn_output")] = o2
        write = t["attn_output.weight"] ** 2 @ o2
        stream = stream + write
        share = write.sum() / stream.sum()
        logits = []
        for head in range(h.n_heads):
            q = t["attn_q.weight"][head * h.head_dim :][: h.head_dim]
            k = t["attn_k.weight"][(head // group) * h.head_dim :][: h.head_dim]
            mq, mk = q @ np.diag(x2) @ q.T, k @ np.diag(x2) @ k.T
            if "attn_q.bias" in t:
                bq = t["attn_q.bias"][head * h.head_dim :][: h.head_dim]
                bk = t["attn_k.bias"][(head // group) * h.head_dim :][: h.head_dim]
                mq, mk = mq + np.outer(bq, bq), mk + np.outer(bk, bk)
            logits.append(np.trace(mq @ mk) / h.head_dim)
        variance = np.mean(logits)
        if h.qk_norm:
            variance = ((t["attn_q_norm.weight"] * t["attn_k_norm.weight"]) ** 2).sum() / h.head_dim
        alpha[name("attn_v")] = alpha[name("attn_output")] = STREAM_WEIGHT * share / ATTENTION_SHRINK
        alpha[name("attn_q")] = alpha[name("attn_k")] = STREAM_WEIGHT * share * variance
        x2 = stream / (stream.mean() + h.norm_eps) * t["ffn_norm.weight"] ** 2
        inputs[name("ffn_gate")] = inputs[name("ffn_up")] = x2
        gate, up = t["ffn_gate.weight"], t["ffn_up.weight"]
        units = gated_unit_moments(Signal(gate**2 @ x2), Signal(up**2 @ x2), (gate * up) @ x2)
        h2, noise = units.second, units.noise
        inputs[name("ffn_down")] = h2
        write = t["ffn_down.weight"] ** 2 @ h2
        stream = stream + write
        alpha[name("ffn_down")] = alpha[name("ffn_up")] = STREAM_WEIGHT * write.sum() / stream.sum()
        alpha[name("ffn_gate")] = STREAM_WEIGHT * (t["ffn_down.weight"] ** 2 @ noise).sum() / stream.sum()
    output = "token_embd.weight" if tied else "output.weight"
    inputs[output] = stream / (stream.mean() + h.norm_eps) * a["output_norm.weight"] ** 2
    alpha[output] = 1 + (STREAM_WEIGHT if tied else 0)
    return alpha, inputs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"n_kv_heads": 1},
        {"n_heads": 3, "n_kv_heads": 3, "head_dim": 10},
        {"biases": True},
        {"qk_norm": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_propagation_equals_its_formulas(options):
    arrays, hparams = random_arrays(seed=1, **options)
    model = make_model(arrays, hparams)
    found = propagate(model)
    alpha, inputs = retold(arrays, hparams, tied=options.get("tied", False))
    assert found.sensitivity == pytest.approx(alpha, rel=1e-4)
    assert set(found.inputs) == set(inputs)
    for name, moment in inputs.items():
        np.testing.assert_allclose(found.inputs[name], moment, rtol=1e-4)


def calibrated(name, model):
    found = propagate(model)
    evidence = Evidence(model, columns=found.inputs, gains=found.gains)
    return column_weights(find_calibration(name).make(evidence), model)


def test_column_weights_by_calibration():
    arrays, hparams = random_arrays(seed=2)
    model = make_model(arrays, hparams)
    random, norm = calibrated("random", model), calibrated("norm", model)
    assert calibrated("none", model) == {}
    assert "token_embd.weight" not in random  # nothing is known about which tokens come
    assert "blk.0.ffn_down.weight" in random and "blk.0.ffn_down.weight" not in norm  # no norm in front of it
    gain = arrays["blk.0.attn_norm.weight"].astype(np.float64) ** 2
    np.testing.assert_allclose(norm["blk.0.attn_q.weight"], gain / gain.mean(), rtol=1e-5)
    for weights in (*random.values(), *norm.values()):
        assert weights.dtype == np.float32 and weights.mean() == pytest.approx(1, abs=1e-3) and weights.min() > 0
    with pytest.raises(PlanError, match=r"calibration 'x' is not known; wanted one of random, generated, imatrix, "):
        find_calibration("x")


def test_a_channel_with_no_gain_keeps_a_little_weight():
    arrays, hparams = random_arrays(seed=3)
    arrays["blk.1.ffn_norm.weight"][4] = 0
    weights = calibrated("random", make_model(arrays, hparams))["blk.1.ffn_up.weight"]
    assert weights[4] == np.float32(FLOOR)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.inf, r"^tensor checkpoint\.blk\.1\.ffn_down\.weight: 0 NaN and 1 infinite of 1536 weights"),
        (1e30, r"^tensor blk\.1\.ffn_down\.weight: .* the weights are damaged$"),  # its square overflows
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_damaged_weights_are_named(value, message):
    arrays, hparams = random_arrays(seed=4)
    arrays["blk.1.ffn_down.weight"][3, 3] = value
    with pytest.raises(ModelError, match=message):
        propagate(make_model(arrays, hparams))


def test_function_preserving_rescaling_moves_column_weights_not_sensitivity():
    """Gain up, columns down: the same function, so the same sensitivities; the column weights follow the gain."""
    arrays, hparams = random_arrays(seed=5)
    before = propagate(make_model(arrays, hparams))
    scaled = {name: value.copy() for name, value in arrays.items()}
    scaled["blk.0.ffn_norm.weight"][7] *= 20
    for role in ("ffn_gate", "ffn_up"):
        scaled[f"blk.0.{role}.weight"][:, 7] /= 20
    after = propagate(make_model(scaled, hparams))
    assert after.sensitivity == pytest.approx(dict(before.sensitivity), rel=1e-4)
    ratio = after.inputs["blk.0.ffn_up.weight"] / before.inputs["blk.0.ffn_up.weight"]
    assert ratio[7] == pytest.approx(400, rel=1e-4) and ratio[8] == pytest.approx(1, rel=1e-4)


# --- what propagation does not follow ---------------------------------------------------------------------------


def hybrid_arrays():
    """Return a decoder whose second of three layers has a recurrence in place of attention."""
    arrays, hparams = random_arrays(seed=6, n_layers=3)
    arrays = {name: value for name, value in arrays.items() if not name.startswith("blk.1.attn_") or "norm" in name}
    rng = np.random.default_rng(6)
    for role, shape in (("ssm_in", (64, 32)), ("ssm_out", (32, 64)), ("ssm_conv1d", (64, 4))):
        arrays[f"blk.1.{role}.weight"] = rng.standard_normal(shape).astype("f4")
    return arrays, hparams


def test_a_recurrence_gets_the_median_of_what_mixes_positions_and_is_said():
    found = propagate(make_model(*hybrid_arrays()))
    known = [found.sensitivity[f"blk.{i}.attn_{role}.weight"] for i in (0, 2) for role in ("q", "k", "v", "output")]
    assert found.sensitivity["blk.1.ssm_in.weight"] == found.sensitivity["blk.1.ssm_out.weight"] == np.median(known)
    assert "blk.1.ssm_conv1d.weight" not in found.sensitivity  # is not quantized
    assert found.notes == (
        "2 tensors (ssm_in, ssm_out) belong to blocks that moment propagation does not follow: "
        "they get the median sensitivity of the others of their kind.",
    )


def test_a_block_that_is_not_followed_writes_nothing_and_its_readers_are_known():
    arrays, hparams = hybrid_arrays()
    found = propagate(make_model(arrays, hparams))
    gain = arrays["blk.1.attn_norm.weight"].astype(np.float64) ** 2
    before = found.inputs["blk.0.ffn_up.weight"]  # only to see that the stream moved on
    reads = found.inputs["blk.1.ssm_in.weight"]
    ffn_gain = arrays["blk.1.ffn_norm.weight"].astype(np.float64) ** 2
    np.testing.assert_allclose(reads / gain, found.inputs["blk.1.ffn_up.weight"] / ffn_gain, rtol=1e-12)
    assert not np.allclose(before / before.mean(), reads / reads.mean())
    assert "blk.1.ssm_out.weight" not in found.inputs


def test_an_unknown_activation_leaves_the_attention_known():
    arrays, hparams = random_arrays(seed=7)
    known = propagate(make_model(arrays, hparams))
    found = propagate(make_model(arrays, replace(hparams, activation="unknown")))
    assert found.sensitivity["blk.0.attn_q.weight"] == known.sensitivity["blk.0.attn_q.weight"]
    alike = STREAM_WEIGHT / (2 * hparams.n_layers)  # no feed-forward block is known: all write alike
    assert {found.sensitivity[f"blk.{i}.ffn_{r}.weight"] for i in (0, 1) for r in ("gate", "up", "down")} == {alike}
    assert "blk.0.ffn_up.weight" not in found.inputs


@pytest.mark.parametrize(
    ("role", "shape"),
    [
        ("altup_proj", (3, 32, 32)),  # several streams
        ("attn_q", (64, 32)),  # queries with a gate among them
        ("attn_q_norm", (5,)),  # a norm of no known width
        ("attn_gate", (7, 32)),  # a gate of no known width
        ("pre_ffw_norm_2", (32,)),  # experts that read something else
    ],
)
def test_layers_of_other_wiring_degrade_to_typical_values(role, shape):
    arrays, hparams = random_arrays(seed=8, n_layers=3)
    arrays[f"blk.1.{role}.weight"] = np.ones(shape, dtype="f4")
    model = make_model(arrays, hparams)
    found = propagate(model)
    assert len(found.notes) == 1
    missed = {t.name for t in model.tensors if t.is_matrix} - set(found.inputs) - {"token_embd.weight"}
    assert all(tensor.startswith(("blk.1.", "altup")) for tensor in missed)
    assert all(found.sensitivity[t.name] > 0 for t in model.tensors if not kept_reason(t))


def test_a_model_without_an_embedding_has_typical_values_only():
    arrays, hparams = random_arrays(seed=9)
    del arrays["token_embd.weight"]
    found = propagate(make_model(arrays, hparams))
    assert set(found.sensitivity.values()) == {STREAM_WEIGHT / 4} and found.inputs == {}


def test_layers_without_attention_or_feed_forward_pass_the_stream_on():
    arrays, hparams = random_arrays(seed=10, n_layers=3)
    whole = propagate(make_model(arrays, hparams))
    pruned = {name: value for name, value in arrays.items() if not name.startswith("blk.2.")}
    found = propagate(make_model(pruned, hparams))
    assert found.notes == ()
    for name in pruned:
        if name.startswith("blk.") and name in found.sensitivity:
            assert found.sensitivity[name] == whole.sensitivity[name]
