"""The pass over tokens: its logits against transformers', its derivatives against differences and its theory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from arrays import expert_arrays, random_arrays
from gguf import GGUFValueType
from models import make_model
from recorded_inputs import logits_of, recorded_inputs
from zoo import zoo_tokens
from zoo_logits import GOLDEN, difference, positions, recorded
from zoo_specs import SPECS, write_spec

from nsds_gguf.calibration.hessians import HessianFiles, multiplied
from nsds_gguf.calibration.random_tokens import ZIPF_SHIFT, draw_tokens, token_chances
from nsds_gguf.compute.decoder import Decoder, what_is_missing
from nsds_gguf.compute.input_moments import Recording
from nsds_gguf.compute.layers import view_layer
from nsds_gguf.compute.tape import Node, Tape
from nsds_gguf.compute.walk import WalkOptions, walk, working_bytes
from nsds_gguf.errors import OutputError
from nsds_gguf.read import open_model
from nsds_gguf.read.hparams import read_hparams
from nsds_gguf.records import kv
from nsds_gguf.sensitivity.fisher import fisher
from nsds_gguf.sensitivity.sensitivities import sensitivities

# Models of which the pass leaves something out that only moves attention: there the first position is compared, which
# attends to itself alone.
MOVED = (
    "yarn", "longrope", "phi-4", "gemma2", "gemma3", "olmo3", "olmo-clip", "cohere2", "smollm3", "exaone4-32b",
    "ministral3",
)  # fmt: skip
NOT_FOLLOWED = (
    "Deepseek",
    "Mamba",
    "GptOss",
    "Apertus",
    "Lfm2",
    "LFM2",
    "Qwen3Next",
    "Qwen3_5",
    "FalconH1",
    "NemotronH",
)
FOLLOWED = [
    name
    for name, spec in SPECS.items()
    if not spec.source_class.startswith(NOT_FOLLOWED) and not name.startswith("granite4-h")
]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_pass_computes_what_transformers_computes(name, tmp_path):
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    assert what_is_missing(model) == ""
    with np.load(GOLDEN, allow_pickle=False) as golden:
        wanted, largest = golden[f"{name}/logits"], float(golden[f"{name}/largest"])
    rows = recorded(logits_of(model, zoo_tokens(SPECS[name])))
    compared = slice(0, 1) if any(word in name for word in MOVED) else slice(None)
    assert positions(2)[0] == 0
    assert difference(rows[compared], wanted[compared], largest) <= max(SPECS[name].tolerance, 1e-4)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in FOLLOWED])
def test_what_cannot_be_followed_is_said(name, tmp_path):
    assert what_is_missing(open_model(write_spec(tmp_path / "checkpoint", name)))


# One model of every kind of operation: plain, biases and fused rows, layer norms, parallel blocks, norms behind blocks,
# norms of queries and keys in both kinds, caps, scales, no gate, experts with and without a shared one, whose weights
# are normed and not. Steps are too short to change an expert chosen.
DIFFERENT = ["llama-biases", "qwen3", "gemma2", "gpt2", "gpt-neox", "phi-2", "phi-3", "olmo", "olmo2", "granite",
             "cohere-qk-norm", "stablelm-parallel-qk-norm", "starcoder2", "mixtral", "qwen2moe",
             "granitemoe-shared"]  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_derivatives_are_those_of_differences(name, tmp_path):
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    n, width, rng = 12, model.hparams.n_embd, np.random.default_rng(0)
    x, along, by_output = (rng.standard_normal((n, width), dtype=np.float32) for _ in range(3))
    decoder, view = Decoder.of(model, n // 2), view_layer(model, 0)

    def layer(value):
        tape, node = Tape(None, n // 2, {}), Node(value)
        return tape, node, decoder.layer(tape, view, node)

    tape, node, out = layer(x)
    out.receive(by_output)
    tape.backward()
    step = 3e-3
    ahead, back = (layer(x + sign * step * along)[2].value.astype(np.float64) for sign in (1, -1))
    wanted = float(((ahead - back) * by_output).sum()) / (2 * step)
    assert float((node.grad * along).sum()) == pytest.approx(wanted, rel=1e-2)


@pytest.fixture(scope="module")
def tiny():
    arrays, hparams = random_arrays(5, n_layers=2)
    return make_model(arrays, hparams), arrays


def scored_logits(model, tokens):
    """Return log-probabilities at the scored positions, float64."""
    rows = np.concatenate([logits_of(model, sequence) for sequence in tokens]).astype(np.float64)
    first = int(tokens.shape[1] * 0.5)
    rows = rows.reshape(*tokens.shape, -1)[:, first:].reshape(-1, rows.shape[1])
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def check_noise(model, arrays, wanted):
    """Check that noise of relative squared norm e causes a mean KL divergence of e times the sensitivity."""
    rng, relative = np.random.default_rng(1), 1e-4
    tokens = rng.integers(0, model.hparams.n_vocab, (4, 24))
    found = [fisher(model, tokens, 1, seed=seed).sensitivity for seed in range(24)]
    reference = scored_logits(model, tokens)
    names = [name for name in found[0] if wanted(name)]
    assert names
    for name in names:
        measured = []
        for _ in range(12):
            noise = rng.standard_normal(arrays[name].shape) * np.sqrt(relative)
            noisy = make_model({**arrays, name: arrays[name] * (1 + noise)}, model.hparams)
            other = scored_logits(noisy, tokens)
            measured.append(float((np.exp(reference) * (reference - other)).sum(axis=1).mean()))
        predicted = relative * np.mean([sensitivity[name] for sensitivity in found])
        assert predicted == pytest.approx(np.mean(measured), rel=0.25), name


def test_memory_is_asked_first(monkeypatch):
    arrays, hparams = random_arrays(5, n_layers=2, n_embd=256, n_ff=512, n_heads=4, head_dim=64, n_vocab=64)
    model = make_model(arrays, hparams)
    tokens = draw_tokens(model, 4, 64)
    tracemalloc.start()
    try:
        fisher(model, tokens, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    wanted = working_bytes(model, tokens.shape, Recording(), 1)
    assert 0.5 * wanted < peak < 1.3 * wanted, (peak, wanted)
    monkeypatch.setattr("nsds_gguf.system.resources.available_memory_bytes", lambda: wanted - 1)
    with pytest.raises(OutputError, match=r"the pass over tokens takes 0\.01 GiB of memory"):
        fisher(model, tokens, 1)


def test_sensitivity_is_the_divergence_that_noise_causes(tiny):
    check_noise(*tiny, lambda name: True)


@pytest.mark.parametrize("scores, normed", [("softmax", True), ("sigmoid", False)])
def test_so_it_is_of_experts(scores, normed):
    """Of one layer: noise in front of a router would change which experts are chosen."""
    arrays, hparams = expert_arrays(5, n_layers=1)
    model = make_model(arrays, replace(hparams, expert_scores=scores, norm_topk_prob=normed))
    check_noise(model, arrays, lambda name: name.endswith(("_exps.weight", "shexp.weight")))


def retold(arrays, hparams, x):
    """Return what the experts of the first layer write, token by token, and the squared units by visited expert."""

    def block(at, kind, token, expert=...):
        gate, up, down = (at[f"blk.0.ffn_{part}_{kind}.weight"][expert] for part in ("gate", "up", "down"))
        units = (gate @ token) / (1 + np.exp(-gate @ token)) * (up @ token)
        return down @ units, units**2

    a, out, squares = {name: value.astype("f8") for name, value in arrays.items()}, [], {}
    for token in x.astype("f8"):
        logits = a["blk.0.ffn_gate_inp.weight"] @ token
        scores = np.exp(logits) / np.exp(logits).sum()
        if hparams.expert_scores == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        bias = a.get("blk.0.exp_probs_b.bias", np.zeros(len(scores)))
        ranked = sorted(range(len(scores)), key=lambda e: -(scores[e] + bias[e]))
        chosen = ranked[: hparams.n_experts_used]
        total = sum(scores[e] for e in chosen) if hparams.norm_topk_prob else 1.0
        written = block(a, "shexp", token)[0] / (1 + np.exp(-a["blk.0.ffn_gate_inp_shexp.weight"] @ token))
        for expert in chosen:
            by_expert, square = block(a, "exps", token, expert)
            written = written + hparams.experts_scale * scores[expert] / total * by_expert
            squares.setdefault(expert, []).append(square)
        out.append(written)
    return np.array(out), squares


ROUTINGS = [("softmax", True, False), ("softmax", False, False), ("sigmoid", True, True), ("sigmoid", False, True)]


@pytest.mark.parametrize("scores, normed, biased", ROUTINGS)
def test_experts_are_chosen_and_weighed_as_told(scores, normed, biased):
    arrays, hparams = expert_arrays(7, n_experts=8, n_used=3)
    hparams = replace(hparams, expert_scores=scores, norm_topk_prob=normed, experts_scale=1.5)
    rng = np.random.default_rng(0)
    if biased:
        arrays["blk.0.exp_probs_b.bias"] = rng.standard_normal(8).astype("f4") / 4
    model, x = make_model(arrays, hparams), rng.standard_normal((12, 32), dtype=np.float32)
    told = {}
    tape = Tape(None, 6, {}, on_expert=lambda name, expert, tokens, x: told.setdefault((name, expert), x))
    written = Decoder.of(model, 6).feed_forward(tape, view_layer(model, 0), Node(x)).value
    wanted, squares = retold(arrays, hparams, x)
    assert what_is_missing(model) == ""
    np.testing.assert_allclose(written, wanted, rtol=1e-4, atol=1e-5)
    name = "blk.0.ffn_down_exps.weight"
    assert {expert for stack, expert in told if stack == name} == set(squares)
    for expert, units_squared in squares.items():
        np.testing.assert_allclose(told[name, expert] ** 2, units_squared, rtol=1e-3, atol=1e-5)


def test_experts_that_no_token_visits_weigh_as_the_others_and_are_told():
    arrays, hparams = expert_arrays(7, n_experts=16, n_used=2, n_layers=1)
    model, tokens = make_model(arrays, hparams), np.array([[39, 5, 5, 7], [39, 9, 5, 3]])
    name = "blk.0.ffn_down_exps.weight"
    visits = recorded_inputs(model, tokens)[1][name]
    moments = {
        expert: np.square(units[at % 4 > 0].astype("f8")).mean(axis=0)  # first positions left out
        for expert, (at, units) in visits.items()
        if (at % 4 > 0).any()
    }
    assert len(moments) < len(visits) < 16
    found = sensitivities(model, tokens, WalkOptions(len(tokens)))
    others = np.mean(list(moments.values()), axis=0)
    np.testing.assert_allclose(found.inputs[name], [moments.get(expert, others) for expert in range(16)], rtol=1e-5)
    assert found.inputs["blk.0.ffn_up_exps.weight"].shape == (32,)
    assert found.notes == (
        f"No token is routed to {16 - len(moments)} of 16 experts: their column weights are the mean of the other "
        "experts in the layer.",
    )
    assert not [key for key in found.sensitivity if "gate_inp" in key]  # is not quantized


def test_a_fused_gate_has_the_sensitivity_of_its_parts():
    arrays, hparams = expert_arrays(7, n_layers=1)
    gate, up = (f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up"))
    fused = {name: value for name, value in arrays.items() if name not in (gate, up)}
    fused["blk.0.ffn_gate_up_exps.weight"] = np.concatenate([arrays[gate], arrays[up]], axis=1)
    tokens = np.random.default_rng(0).integers(0, hparams.n_vocab, (2, 16))
    apart, one = (fisher(make_model(stored, hparams), tokens, 1) for stored in (arrays, fused))
    whole = one.sensitivity["blk.0.ffn_gate_up_exps.weight"]
    assert whole == pytest.approx(apart.sensitivity[gate] + apart.sensitivity[up], rel=1e-5)
    np.testing.assert_allclose(one.inputs["blk.0.ffn_gate_up_exps.weight"], apart.inputs[up], rtol=1e-5)
    n_experts, n_ff, _ = arrays[gate].shape
    parts = [apart.of_rows[name].reshape(n_experts, n_ff) for name in (gate, up)]
    rows = one.of_rows["blk.0.ffn_gate_up_exps.weight"].reshape(n_experts, 2 * n_ff)
    np.testing.assert_allclose(rows, np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-12)
    for found in (apart, one):
        for name, of_rows in found.of_rows.items():
            assert of_rows.sum() == pytest.approx(found.sensitivity[name], rel=1e-5)


def test_rows_of_zeros_have_no_sensitivity():
    arrays, hparams = random_arrays(6, n_layers=1)
    name, row = "blk.0.ffn_down.weight", 3
    only = np.zeros_like(arrays[name])
    only[row] = arrays[name][row]
    tokens = np.random.default_rng(0).integers(0, hparams.n_vocab, (2, 16))
    found = fisher(make_model({**arrays, name: only}, hparams), tokens, 1)
    assert found.of_rows[name][row] == pytest.approx(found.sensitivity[name], rel=1e-5) and found.sensitivity[name] > 0
    assert np.count_nonzero(found.of_rows[name]) == 1
    whole = fisher(make_model(arrays, hparams), tokens, 1)
    assert (whole.of_rows[name] > 0).all() and whole.of_rows[name].shape == (len(arrays[name]),)


def test_plain_matrices_beside_experts_have_hessians(tmp_path):
    model = make_model(*expert_arrays(7))
    files, plain = HessianFiles(tmp_path), frozenset(multiplied(model))
    with walk(model, draw_tokens(model, 2, 32), WalkOptions(2, Recording(plain), files.add)):
        pass
    found = {name for names, _ in files.take() for name in names}
    assert found == plain
    assert not [name for name in found if "_exps" in name]
    assert "blk.1.ffn_down_shexp.weight" in found and "blk.1.attn_q.weight" in found


@pytest.mark.parametrize(
    "changed", [{"expert_scores": "unknown"}, {"n_experts_used": 0}, {"n_experts_used": 5}, {"activation": "unknown"}]
)
def test_experts_that_cannot_be_followed_are_told(changed):
    arrays, hparams = expert_arrays(5)
    wanted = "its activation" if "activation" in changed else "its way to choose experts"
    assert what_is_missing(make_model(arrays, replace(hparams, **changed))) == wanted


def test_experts_beside_a_dense_block_or_without_a_router_are_told():
    arrays, hparams = expert_arrays(5, n_layers=1)
    dense = {name.replace("_shexp", ""): value for name, value in arrays.items() if "gate_inp_shexp" not in name}
    no_router = {name: value for name, value in arrays.items() if "gate_inp." not in name}
    scaled = {**arrays, "blk.0.ffn_down_exps.scale": np.ones(4, dtype="f4")}
    for other in (dense, no_router, scaled):
        assert what_is_missing(make_model(other, hparams)) == "its way to choose experts"


@pytest.mark.parametrize(
    "architecture, keys, wanted",
    [
        ("llama", {}, ("softmax", True)),
        ("qwen2moe", {}, ("softmax", False)),
        ("dots1", {"expert_gating_func": 2, "expert_weights_norm": True}, ("sigmoid", True)),
        ("dots1", {"expert_gating_func": 1}, ("softmax", False)),
        ("dots1", {"expert_gating_func": 2, "expert_group_count": 8}, ("unknown", False)),
        ("minimax-m2", {"expert_gating_func": 3}, ("unknown", True)),
        ("llama4", {}, ("unknown", False)),
    ],
)
def test_routing_is_read_from_architecture_and_keys(architecture, keys, wanted):
    metadata = {
        f"{architecture}.{name}": kv(value, GGUFValueType.BOOL if value is True else GGUFValueType.UINT32)
        for name, value in keys.items()
    }
    hparams = read_hparams(architecture, metadata, [])
    assert (hparams.expert_scores, hparams.norm_topk_prob) == wanted


def test_threads_do_not_change_the_result(tiny):
    for model in (tiny[0], make_model(*expert_arrays(5, n_layers=1))):
        check_threads(model)


def check_threads(model):
    tokens = draw_tokens(model, 3, 16)
    one, three = fisher(model, tokens, 1), fisher(model, tokens, 3)
    assert one.sensitivity == three.sensitivity
    assert all((one.inputs[name] == three.inputs[name]).all() for name in one.inputs)


def test_a_tied_embedding_has_both_roles():
    arrays, hparams = random_arrays(6, tied=True)
    tied, tokens = make_model(arrays, hparams), np.random.default_rng(0).integers(0, hparams.n_vocab, (2, 16))
    untied = make_model({**arrays, "output.weight": arrays["token_embd.weight"]}, hparams)
    both, apart = fisher(tied, tokens, 1), fisher(untied, tokens, 1)
    rows, output = apart.sensitivity["token_embd.weight"], apart.sensitivity["output.weight"]
    assert both.sensitivity["token_embd.weight"] == pytest.approx(rows + output)
    assert both.looked_up == pytest.approx(rows / (rows + output)) and apart.looked_up == 0
    wanted = (1 - both.looked_up) * apart.inputs["output.weight"]
    wanted = wanted + both.looked_up * apart.inputs["output.weight"].mean()
    np.testing.assert_allclose(both.inputs["token_embd.weight"], wanted)


def test_tokens_are_drawn_by_rank_behind_bos(tmp_path):
    model = open_model(write_spec(tmp_path / "checkpoint", "llama"))
    n_vocab, metadata = model.hparams.n_vocab, {
        "tokenizer.ggml.token_type": kv([3, *[1] * (model.hparams.n_vocab - 1)], GGUFValueType.ARRAY),
        "tokenizer.ggml.bos_token_id": kv(0, GGUFValueType.UINT32),
        "tokenizer.ggml.add_bos_token": kv(True, GGUFValueType.BOOL),
    }  # fmt: skip
    tokens = draw_tokens(replace(model, metadata=metadata), 40, 256)
    assert (tokens[:, 0] == 0).all() and (tokens[:, 1:] > 0).all()
    assert (tokens == draw_tokens(replace(model, metadata=metadata), 40, 256)).all()
    counts = np.bincount(tokens[:, 1:].ravel(), minlength=n_vocab)
    chance = token_chances(replace(model, metadata=metadata))
    assert chance[1] / chance[28] == pytest.approx((27 + ZIPF_SHIFT) / ZIPF_SHIFT)
    assert abs(counts[1:60].sum() / counts.sum() - chance[1:60].sum()) < 0.02
    assert token_chances(replace(model, metadata={})) == pytest.approx(1 / n_vocab)
