"""Numbers and views from GGUF names, keys and shapes: what is fused, stacked or permuted scores as what is not."""

import nsds_oracle
import numpy as np
import pytest
from arrays import random_arrays
from gguf import GGUFValueType
from models import make_model, make_tensor
from variants import VARIANTS, fused, variant_arrays

from nsds_gguf.compute.layers import view_layer
from nsds_gguf.llamacpp.rules import kept_reason
from nsds_gguf.metrics import METRICS, score_layers
from nsds_gguf.read.hparams import read_hparams
from nsds_gguf.records import Hparams, kv

NUMBERS = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, bool: GGUFValueType.BOOL}


def keys(architecture, **values):
    """Return GGUF keys of an architecture; ``__`` stands for a dot."""
    out = {}
    for name, value in values.items():
        kind = GGUFValueType.ARRAY if isinstance(value, list) else NUMBERS[type(value)]
        sub = GGUFValueType.UINT32 if isinstance(value, list) else None
        out[f"{architecture}.{name.replace('__', '.')}"] = kv(value, kind, sub)
    return out


def hparams_of(architecture, arrays=None, **values):
    tensors = [make_tensor(name, array) for name, array in (arrays or {}).items()]
    return read_hparams(architecture, keys(architecture, **values), tensors)


# --- numbers --------------------------------------------------------------------------------------------------


def test_numbers_of_a_llama_come_from_its_keys():
    arrays, wanted = random_arrays(seed=0, biases=True)
    found = hparams_of(
        "llama", arrays, block_count=2, context_length=128, embedding_length=32, feed_forward_length=48,
        attention__head_count=4, attention__head_count_kv=2, attention__key_length=8, attention__value_length=8,
        attention__layer_norm_rms_epsilon=1e-5,
    )  # fmt: skip
    assert found == Hparams(
        **{**wanted.__dict__, "value_dim": 8, "norm_eps": float(np.float32(1e-5)), "rope": "norm", "rope_dim": 8}
    )


def test_numbers_that_differ_between_layers_are_the_largest():
    found = hparams_of(
        "openelm", block_count=3, embedding_length=64, feed_forward_length=[96, 128, 0],
        attention__head_count=[2, 4, 0], attention__head_count_kv=[1, 2, 0], attention__key_length=16,
    )  # fmt: skip
    assert (found.n_ff, found.n_heads, found.n_kv_heads, found.head_dim) == (128, 4, 2, 16)


def test_nothing_is_refused():
    found = hparams_of("not-yet-invented", {"blk.4.something.weight": np.zeros((3, 5))})
    assert (found.n_layers, found.n_heads, found.head_dim, found.n_vocab) == (5, 0, 0, 0)
    assert (found.norm, found.activation, found.norm_eps) == ("unknown", "silu", 0.0)
    model = make_model({"blk.4.something.weight": np.eye(3, 5)}, found)
    for metric in METRICS:
        assert len(score_layers(model, metric)[0]) == 5


@pytest.mark.parametrize(
    ("architecture", "values", "wanted"),
    [
        ("gpt2", {"attention__layer_norm_epsilon": 1e-5}, {"norm": "layer", "activation": "gelu"}),
        ("gemma2", {"embedding_length": 64, "block_count": 26}, {"embedding_scale": 8.0, "attention_scale": None}),
        (
            "gemma2",
            {"embedding_length": 64, "block_count": 46, "attention__head_count": 4, "attention__key_length": 8},
            {"attention_scale": 0.25, "head_dim": 8},  # 64 / 4 = 16 channels, whatever the heads have
        ),
        (
            "granite",
            {"embedding_scale": 12.0, "residual_scale": 0.25, "attention__scale": 0.5},
            {"embedding_scale": 12.0, "residual_scale": 0.25, "attention_scale": 0.5},
        ),
        ("minicpm", {"block_count": 49}, {"embedding_scale": 12.0, "residual_scale": pytest.approx(0.2)}),
        ("minicpm", {"block_count": 49, "residual_scale": 0.5}, {"residual_scale": 0.5}),
        ("gptneox", {"use_parallel_residual": True}, {"parallel_residual": True}),
        ("gptneox", {"use_parallel_residual": False}, {"parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}, {"parallel_residual": False}),  # llama.cpp asks the norms
        ("gemma3n", {}, {"attention_scale": 1.0}),
        (
            "deepseek2",
            {"expert_count": 64, "expert_used_count": 6, "expert_weights_scale": 2.5},
            {"n_experts": 64, "n_experts_used": 6, "experts_scale": 2.5},
        ),
    ],
)
def test_facts_of_architectures(architecture, values, wanted):
    found = hparams_of(architecture, **values)
    assert {name: getattr(found, name) for name in wanted} == wanted


# --- what llama.cpp does not quantize -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "architecture", "wanted"),
    [
        ("blk.0.attn_q.weight", (8, 32), "llama", ""),
        ("blk.0.ffn_down_exps.weight", (4, 8, 32), "llama", ""),
        ("token_embd.weight", (40, 32), "llama", ""),
        ("blk.0.attn_norm.weight", (32,), "llama", "vector"),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 32), "qwen2moe", "vector"),
        ("blk.0.attn_q_norm.weight", (4, 8), "stablelm", "norm"),
        ("blk.0.ffn_gate_inp.weight", (4, 32), "llama", "router"),
        ("position_embd.weight", (40, 32), "gpt2", "positions"),
        ("blk.0.ssm_conv1d.weight", (64, 4), "mamba", "convolution"),
        ("blk.0.shortconv.conv.weight", (64, 3), "lfm2", "convolution"),
        ("blk.0.time_mix_w1.weight", (32, 32), "rwkv6", "recurrence"),
        ("blk.0.time_mix_key.weight", (32, 32), "rwkv6", ""),
        ("blk.0.altup_proj.weight", (32, 32), "gemma3n", "small"),
        ("blk.0.ssm_a", (64, 16), "mamba", "vector"),  # its name does not end in .weight
        ("blk.0.attn_k_b.weight", (4, 8, 32), "deepseek2", ""),
        ("blk.0.attn_k_b.weight", (4, 8, 32), "glm5-next", "small"),
    ],
)
def test_what_is_kept(name, shape, architecture, wanted):
    assert kept_reason(make_tensor(name, np.zeros(shape)), architecture) == wanted


# --- views ----------------------------------------------------------------------------------------------------


def heavy(name, **options):
    """Return the arrays and hparams of a variant of three layers whose weights have tails of different weight."""
    arrays, hparams = variant_arrays(VARIANTS[name], n_layers=3, n_embd=32, n_ff=48, n_heads=4, n_kv_heads=2,
                                     head_dim=8, n_vocab=40, **options)  # fmt: skip
    rng = np.random.default_rng(1)
    for key, value in arrays.items():
        if value.ndim > 1:
            value *= rng.lognormal(0, 0.2 + 0.2 * int(key[4] if key.startswith("blk") else 1), value.shape)
    return arrays, hparams


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_fused_matrices_score_exactly_as_their_parts(name, metric):
    arrays, hparams = heavy(name)
    apart = dict(arrays)
    for i in range(hparams.n_layers):
        up = apart[f"blk.{i}.ffn_up.weight"]
        if VARIANTS[name].fused_gate:
            apart[f"blk.{i}.ffn_gate.weight"], apart[f"blk.{i}.ffn_up.weight"] = np.split(up, 2)
    one, other = make_model(fused(arrays, VARIANTS[name]), hparams), make_model(apart, hparams)
    assert "attn_qkv" in one.layer(0) and "attn_qkv" not in other.layer(0)
    assert score_layers(one, metric)[0] == score_layers(other, metric)[0]


def test_layers_have_the_heads_that_their_shapes_say():
    arrays, _ = variant_arrays(VARIANTS["phi3"], n_layers=1, n_heads=6, n_kv_heads=3, head_dim=8, n_embd=32)
    model = make_model(fused(arrays, VARIANTS["phi3"]), Hparams(1, 32, 48, 99, 99, 8, 40, 64, 1e-5))
    attention = view_layer(model, 0).attention
    assert (attention.n_heads, attention.n_kv_heads) == (6, 3)
    for part in "qkv":
        view = getattr(attention, part)
        assert view.name == "blk.0.attn_qkv.weight"
        np.testing.assert_array_equal(view.weight.load(), arrays[f"blk.0.attn_{part}.weight"])


def test_biases_of_fused_matrices_are_split_with_them():
    arrays, hparams = variant_arrays(VARIANTS["gpt2"])
    attention = view_layer(make_model(fused(arrays, VARIANTS["gpt2"]), hparams), 0).attention
    for part in "qkv":
        np.testing.assert_array_equal(getattr(attention, part).bias.load().ravel(), arrays[f"blk.0.attn_{part}.bias"])


def test_experts_are_views_of_the_stack():
    arrays, hparams = variant_arrays(VARIANTS["gpt-oss"])
    blocks = view_layer(make_model(arrays, hparams), 0).feed_forward
    assert [block.expert for block in blocks] == [0, 1, 2]
    for part in ("gate", "up", "down"):
        for e, block in enumerate(blocks):
            linear = getattr(block, part)
            np.testing.assert_array_equal(linear.weight.load(), arrays[f"blk.0.ffn_{part}_exps.weight"][e])
            np.testing.assert_array_equal(linear.bias.load().ravel(), arrays[f"blk.0.ffn_{part}_exps.bias"][e])


def test_experts_with_gate_and_up_in_one_stack():
    arrays, hparams = variant_arrays(VARIANTS["mixtral"])
    both = np.concatenate([arrays.pop(f"blk.0.ffn_{part}_exps.weight") for part in ("gate", "up")], axis=1)
    blocks = view_layer(make_model({**arrays, "blk.0.ffn_gate_up_exps.weight": both}, hparams), 0).feed_forward
    assert len(blocks) == 4
    for e, block in enumerate(blocks):
        np.testing.assert_array_equal(block.gate.weight.load(), both[e, :160])
        np.testing.assert_array_equal(block.up.weight.load(), both[e, 160:])


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe"])
@pytest.mark.parametrize("se", ["ratio", "product"])
def test_a_layer_scores_the_mean_over_its_experts_the_shared_one_being_one_more(name, se):
    arrays, hparams = heavy(name)
    scores, notes = score_layers(make_model(arrays, hparams), "nsds", se)
    assert notes == ()
    basis = nsds_oracle.projection_basis(arrays["output.weight"])
    for i, layer in enumerate(scores):
        stacks = {p: list(arrays[f"blk.{i}.ffn_{p}_exps.weight"]) for p in ("gate", "up", "down")}
        for part, stack in stacks.items():
            if name == "qwen2moe":
                stack.append(arrays[f"blk.{i}.ffn_{part}_shexp.weight"])
            beta = nsds_oracle.writer_beta(basis) if part == "down" else nsds_oracle.detector_beta
            wanted = np.mean([nsds_oracle.nv_and_se(w.astype(np.float64), beta, se) for w in stack], axis=0)
            assert (layer.nv[part], layer.se[part]) == pytest.approx(tuple(wanted), rel=1e-4)


@pytest.mark.parametrize("metric", nsds_oracle.BASELINES)
def test_baselines_look_at_every_expert(metric):
    arrays, hparams = heavy("mixtral")
    layers = []
    for i in range(hparams.n_layers):
        layer = {role: arrays[f"blk.{i}.attn_{role}.weight"] for role in ("q", "k", "v", "output")}
        for part in ("gate", "up", "down"):
            layer |= {f"{part} {e}": w for e, w in enumerate(arrays[f"blk.{i}.ffn_{part}_exps.weight"])}
        layers.append(layer)
    scores, _ = score_layers(make_model(arrays, hparams), metric)
    assert [layer.score for layer in scores] == pytest.approx(nsds_oracle.BASELINES[metric](layers), rel=1e-6)


def test_permuted_rows_of_queries_and_keys_score_the_same():
    """The same permutation within every head, as ggml's rope order has it: a model folder and its GGUF."""
    arrays, hparams = heavy("llama")
    order = np.arange(8).reshape(2, 4).T.ravel()
    permuted = {
        name: value.reshape(-1, 8, 32)[:, order].reshape(value.shape)
        if ".attn_q" in name or ".attn_k" in name
        else value
        for name, value in arrays.items()
    }
    one, other = (score_layers(make_model(each, hparams))[0] for each in (arrays, permuted))
    for a, b in zip(one, other, strict=True):
        assert [a.score, *a.nv.values(), *a.se.values()] == pytest.approx([b.score, *b.nv.values(), *b.se.values()])


def hybrid():
    """Return a model with a plain, a recurrent and an empty layer."""
    arrays, hparams = heavy("llama")
    arrays = {name: value for name, value in arrays.items() if not name.startswith("blk.2.")}
    arrays = {name: value for name, value in arrays.items() if not name.startswith("blk.1.attn_") or "norm" in name}
    rng = np.random.default_rng(3)
    arrays["blk.1.ssm_in.weight"] = rng.standard_t(4, (64, 32)).astype("f4")
    arrays["blk.1.ssm_out.weight"] = rng.standard_t(4, (32, 64)).astype("f4")
    arrays["blk.1.ssm_conv1d.weight"] = rng.standard_t(4, (64, 4)).astype("f4")
    return arrays, hparams


def test_what_is_no_component_is_scored_by_its_kurtosis_alone_and_said():
    arrays, hparams = hybrid()
    (plain, recurrent, empty), notes = score_layers(make_model(arrays, hparams))
    assert set(plain.nv) == {"qk", "ov", "gate", "up", "down"}
    assert set(recurrent.nv) == {"gate", "up", "down", "rest"} and "rest" not in recurrent.se
    kurtoses = [nsds_oracle.kurtosis(arrays[f"blk.1.ssm_{part}.weight"].astype(np.float64)) for part in ("in", "out")]
    assert recurrent.nv["rest"] == pytest.approx(np.mean(kurtoses), rel=1e-5)
    assert (empty.nv, empty.p_nv, empty.p_se, empty.score) == ({}, None, None, 0)
    assert notes == (
        "2 tensors of 1 layers are outside NSDS's components (QK, OV, gate, up, down) and are scored by their kurtosis"
        " alone: ssm_in, ssm_out.",
    )
    for metric in nsds_oracle.BASELINES:
        assert score_layers(make_model(arrays, hparams), metric)[0][2].score == 0


def test_tensors_of_unusual_shape_are_the_rest():
    arrays, hparams = heavy("llama")
    arrays["blk.0.attn_q.weight"] = np.ones((64, 32), "f4")  # queries and a gate
    arrays["blk.1.ffn_up.weight"] = np.ones((50, 32), "f4")
    views = [view_layer(make_model(arrays, hparams), i) for i in range(3)]
    assert views[0].attention is None and len(views[0].rest) == 4
    assert views[1].feed_forward == () and {t.role for t in views[1].rest} == {"ffn_gate", "ffn_up", "ffn_down"}
    assert views[2].attention is not None and views[2].rest == ()
