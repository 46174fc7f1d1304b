"""Zero padding of the residual stream: the same logits in llama.cpp, K-quants in rows that did not fit them."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import call
from recipes import recipe
from tiny_models import Spec, write_tiny
from zoo import EXACT, zoo_tokens
from zoo_logits import difference, model_logits
from zoo_specs import SPECS, write_spec

from nsds_gguf import conversion
from nsds_gguf.conversion import convert
from nsds_gguf.errors import PlanError, RecordError, TargetError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.publish.report import command
from nsds_gguf.publish.tensor_type_file import tensor_type_file
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.hessian_factors import FactorStore, factor_hessian
from nsds_gguf.quantize.padding import ARCHITECTURES, columns_of, padded, padding_obstacle
from nsds_gguf.read import open_model
from nsds_gguf.records import K_TYPES, Model, Options, Plan, Scores, Target
from nsds_gguf.session.run import Run
from nsds_gguf.session.settle import settle

# Of every architecture: tied and not, with biases, one key/value head and several, scaled rope, a vision model's text.
CASES = (
    "llama", "llama-tied-mha-bf16-4", "llama-biases", "llama-yarn", "mistral-mqa-bf16-4", "smolvlm", "qwen2",
    "qwen2-tied-mqa-bf16-4", "qwen2-mha-shards", "qwen3", "qwen3-tied-mha-bf16-4", "qwen3-biases", "gemma3",
    "gemma3-linear-4", "gemma3-pattern-3", "gemma3-multimodal",
)  # fmt: skip

# Width 96: 37.5 % of a row of 256. Bits of an original weight in Q2_K: 7.
NARROW = Spec("LlamaForCausalLM", n_embd=96, n_ff=256, n_heads=3, n_kv_heads=3, head_dim=32, n_layers=2)
NO_CHECK = VerifyOptions(enabled=False)


def narrow(folder: Path, **changes: object) -> Model:
    return open_model(write_tiny(folder, replace(NARROW, **changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    model, tokens = open_model(write_spec(tmp_path / "checkpoint", name)), zoo_tokens(SPECS[name])
    assert padding_obstacle(model) == ""
    wider = padded(model)
    assert (model.hparams.n_embd, wider.hparams.n_embd, wider.n_weights) == (64, 256, model.n_weights)
    before, after = (model_logits(m, tmp_path / f"{i}.gguf", tokens) for i, m in enumerate((model, wider)))
    assert difference(after, before) < EXACT
    header = read_gguf_header(tmp_path / "1.gguf")
    keys = {key: header.metadata[f"{model.architecture}.{key}"].value for key in
            ("embedding_length", "attention.head_count", "attention.key_length", "attention.value_length")}  # fmt: skip
    dim = model.hparams.head_dim
    n_heads = 256 // dim if model.architecture == "qwen2" else model.hparams.n_heads
    assert keys == {"embedding_length": 256, "attention.head_count": n_heads, "attention.key_length": dim,
                    "attention.value_length": dim}  # fmt: skip
    for tensor in header.tensors:
        assert 64 not in tensor.shape or tensor.name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight",
            "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.weight")), tensor.name  # fmt: skip


def test_the_case_of_every_architecture_is_tried() -> None:
    assert {name.partition("-")[0] for name in CASES} >= set(ARCHITECTURES)


def test_rows_are_read_lazily_and_the_same_in_any_order(tmp_path: Path) -> None:
    """Any rows, as a slice or by number, in another process too, are those of the whole padded tensor."""
    model = open_model(write_spec(tmp_path / "checkpoint", "qwen2"))
    for tensor in pickle.loads(pickle.dumps(padded(model))).tensors:
        whole, original = tensor.load(), model.by_name[tensor.name]
        assert whole.shape == tensor.shape and np.count_nonzero(whole) == np.count_nonzero(original.load())
        assert math.prod(tensor.shape) - tensor.n_zeros == original.n_weights
        flat = whole.reshape(tensor.n_rows, -1)
        order = np.random.default_rng(0).permutation(tensor.n_rows)[:7]
        np.testing.assert_array_equal(tensor.rows(order), flat[order])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in tensor.slabs(1 << 12)]), flat)


def test_heads_of_zeros_join_their_groups(tmp_path: Path) -> None:
    """Qwen 2: four query heads of 16 in two groups become 16, each group followed by its zeros."""
    model = open_model(write_spec(tmp_path / "checkpoint", "qwen2"))
    wider, name = padded(model), "blk.0.attn_q.weight"
    rows = wider.by_name[name].load().reshape(2, 8, 16, 256)
    original = model.by_name[name].load().reshape(2, 2, 16, 64)
    np.testing.assert_array_equal(rows[:, :2, :, :64], original)
    assert not rows[:, 2:].any() and not rows[..., 64:].any()
    columns = columns_of(wider.by_name["blk.0.attn_output.weight"])
    assert columns is not None
    np.testing.assert_array_equal(columns.reshape(2, 8, 16)[:, :2].reshape(-1), np.arange(64))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi-3", "its architecture phi3 is not one of llama, qwen2, qwen3, gemma3"),
        ("mixtral", "how to pad blk.0.ffn_gate_inp.weight is not known"),
        ("gemma3-27b", "llama.cpp scales the attention of this size by its width"),
    ],
)
def test_what_cannot_be_padded_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    assert padding_obstacle(model) == reason
    with pytest.raises(PlanError, match=f"--pad on: .* cannot be padded: {reason}"):
        settle(Options(target_bpw=8, pad="on"), model)
    assert settle(Options(target_bpw=8), model).recipe.padding is None


def test_widths_that_need_no_padding_or_share_sub_blocks_are_refused(tmp_path: Path) -> None:
    wide = narrow(tmp_path / "wide", n_embd=256)
    assert padding_obstacle(wide) == "its width 256 is a multiple of 256 already"
    odd = narrow(tmp_path / "odd", n_embd=48)
    assert padding_obstacle(odd).startswith("its width 48 is not a multiple of 32")
    heads = open_model(write_tiny(tmp_path / "heads", Spec("Qwen2ForCausalLM", n_embd=96, n_heads=6, n_kv_heads=3)))
    assert padding_obstacle(heads) == (
        "llama.cpp wants 256 query channels in it, which heads of 16 shared by 3 key/value heads do not make"
    )


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", [*K_TYPES, "Q8_0", "IQ4_NL", "Q5_1"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_zeros_stay_zero_and_weights_round_as_without_them(type_name: str, rounding: str, tmp_path: Path) -> None:
    """In every type: the new columns are exactly zero, and so are new rows; errors count the weights alone."""
    model = narrow(tmp_path / "model")
    name = "token_embd.weight"
    tensor = padded(model).by_name[name]
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.5, 2, 96).astype("f4")
    x = rng.standard_normal((400, 96)) * np.sqrt(weights)
    factors = FactorStore(tmp_path)
    factors.add([name], x.T @ x / 400, 0.05)
    quantizer = TensorQuantizers(rounding, {name: weights}, factors if rounding == "gptq" else None)(tensor)
    rows = tensor.rows(slice(0, 64))
    back = ggml.dequantize(quantizer.quantize(rows, type_name), type_name, 256)
    assert not back[:, 96:].any() and np.abs(back[:, :96] - rows[:, :96]).mean() < np.abs(rows[:, :96]).mean() / 2
    norms = quantizer.squared_norms(rows)
    diagonal = factor_hessian(x.T @ x / 400, shrinkage=0.05).diagonal if rounding == "gptq" else weights
    np.testing.assert_allclose(norms, np.square(rows[:, :96]) @ diagonal, rtol=1e-5)
    down = padded(model).by_name["blk.0.ffn_down.weight"]
    zeros = TensorQuantizers(rounding)(down)
    assert not ggml.dequantize(zeros.quantize(down.rows(slice(96, 256)), type_name), type_name, 256).any()
    assert not zeros.errors(down.rows(slice(96, 256)), type_name).any()


def test_factors_of_zero_inputs_are_those_of_dead_columns() -> None:
    x = np.random.default_rng(2).standard_normal((300, 32))
    order = np.full(48, -1, np.intp)
    order[8:40] = np.arange(32)
    hessian = np.zeros((48, 48))
    hessian[8:40, 8:40] = x.T @ x / 300
    spread = factor_hessian(x.T @ x / 300).spread(order)
    direct = factor_hessian(hessian)
    errors = np.random.default_rng(3).standard_normal((5, 48)).astype("f4")
    errors[:, order < 0] = 0
    np.testing.assert_allclose(spread.row_errors(errors), direct.row_errors(errors), rtol=2e-3)
    is_dead = (order < 0)[spread.order]
    assert 0 < spread.variances[is_dead].max() < 2e-3 * spread.diagonal[order >= 0].mean()


# --- plans and files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 224, 14 % below 256, and rows of 256 in down and attention output."""
    spec = Spec("LlamaForCausalLM", n_embd=224, n_ff=256, n_heads=4, n_kv_heads=2, head_dim=64, n_layers=2)
    return write_tiny(tmp_path_factory.mktemp("models") / "narrow", spec)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(folder)


@pytest.mark.parametrize(
    ("options", "padding", "both"),
    [
        (Options(target_bpw=4), "width", False),  # 4.1 without
        (Options(target_size=400_000), "width", False),
        (Options(target_bpw=2), "width", False),  # out of reach for both
        (Options(target_bpw=4.5), None, True),
        (Options(target_bpw=4.5, pad="off"), None, False),
        (Options(target_bpw=4.5, pad="on"), "width", False),
        (Options(target_bpw=4, allocator="random"), None, False),
        (Options(uniform="Q4_K"), None, False),
        (Options(uniform="Q4_K", pad="on"), "width", False),
        (Options(), None, False),
    ],
)
def test_who_is_padded(model: Model, options: Options, padding: str | None, both: bool) -> None:
    settled = settle(options, model)
    assert (settled.recipe.padding, settled.alternative is not None) == (padding, both)
    if settled.alternative is not None:
        assert settled.alternative == replace(settled.recipe, padding="width")


def test_the_nearest_feasible_target_is_a_padded_one(model: Model, folder: Path) -> None:
    with pytest.raises(TargetError, match=r"the floor is 3\.046 bpw.*nearest feasible: --target-bpw 3\.047"):
        _plans(folder, Options(target_bpw=2, rounding="rtn"))
    assert settle(Options(target_bpw=3.05), model).recipe.padding == "width"


def test_much_padding_serves_targets_out_of_reach_alone(tmp_path: Path) -> None:
    settled = settle(Options(target_bpw=8), narrow(tmp_path / "model"))
    assert settled.recipe.padding is None and settled.alternative is None


def test_a_target_below_the_floor_is_reached(folder: Path, tmp_path: Path) -> None:
    """Its bits count original weights; the file loads, and says what it is."""
    options = Options(target_bpw=3.6, rounding="rtn")
    (made,) = convert(folder, options, output=tmp_path / "out.gguf", verifying=VerifyOptions(n_ctx=32, n_chunks=2),
                      run=Run(1))  # fmt: skip
    plan, original = made.plan, open_model(folder)
    assert plan.recipe.padding == "width" and plan.n_weights == original.n_weights and 3.4 < plan.bpw <= 3.6
    assert plan.tensor_bytes * 8 <= 3.6 * original.n_weights
    assert made.perplexity is not None and math.isfinite(made.perplexity.ppl)
    types = {tensor.type for tensor in plan.tensors}
    assert types <= {"F32", *K_TYPES} and "Q2_K" in types
    assert any("padded with zeros from 224 to 256 channels" in note for note in plan.notes)
    header = read_gguf_header(tmp_path / "out.gguf")
    assert header.metadata["llama.embedding_length"].value == 256
    assert json.loads(header.metadata["nsds_gguf.recipe"].value)["padding"] == "width"
    assert sum(tensor.n_bytes for tensor in header.tensors) == plan.tensor_bytes
    assert "--pad on" in command(plan, "model")
    with pytest.raises(PlanError, match="llama-quantize cannot pad"):
        tensor_type_file(plan)


def test_the_better_way_is_taken_and_both_are_said(folder: Path) -> None:
    def planned(**changes: object) -> Plan:
        (plan,) = _plans(folder, Options(target_bpw=4.5, rounding="rtn", **changes))  # type: ignore[arg-type]
        return plan

    auto, on, off = planned(), planned(pad="on"), planned(pad="off")
    assert on.predicted_divergence is not None and off.predicted_divergence is not None
    best = on if on.predicted_divergence < off.predicted_divergence else off
    assert auto.recipe.padding == best.recipe.padding and auto.tensors == best.tensors
    (note,) = (note for note in auto.notes if note.startswith("Predicted divergence "))
    assert f"without padding: {off.predicted_divergence:.4f}" in note
    assert f"with padding: {on.predicted_divergence:.4f}" in note


def _plans(folder: Path, options: Options, loaded: Scores | Plan | None = None) -> list[Plan]:
    return conversion.plan(folder, options, loaded=loaded, run=Run(1)).plans


def test_records_keep_their_padding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans from padded scores are padded; a plan of padded tensors makes the same file; others are refused."""
    monkeypatch.chdir(tmp_path)
    assert call("score", folder, "--pad", "on", "--json", "scores.json", "-q").code == 0
    scores = Scores.from_json(json.loads(Path("scores.json").read_text()))
    assert scores.recipe.padding == "width"
    (loaded,) = _plans(folder, Options(target_bpw=4.5), scores)
    (direct,) = _plans(folder, Options(target_bpw=4.5, rounding="rtn", pad="on"))
    assert loaded.tensors == direct.tensors
    with pytest.raises(PlanError, match="--pad off: the scores were measured with padding"):
        _plans(folder, Options(target_bpw=4.5, pad="off"), scores)
    again = Plan.from_json(json.loads(json.dumps(direct.to_json())))
    files = [convert(folder, Options(), output=Path(f"{i}.gguf"), verifying=NO_CHECK, loaded=plan, run=Run(1))[0].path
             for i, plan in enumerate((direct, again))]  # fmt: skip
    assert files[0].read_bytes() == files[1].read_bytes()
    unpadded = replace(direct, recipe=replace(direct.recipe, padding=None))
    with pytest.raises(RecordError, match="does not list the model's tensors"):
        _plans(folder, Options(), unpadded)


def test_gptq_rounds_padded_tensors(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hessians of the original serve the padded model; errors predicted and measured are less than by RTN."""
    monkeypatch.setattr("nsds_gguf.calibration.generated_text.N_TOKENS", 512)
    made = {
        rounding: convert(folder, Options(target_bpw=3.6, rounding=rounding), output=tmp_path / f"{rounding}.gguf",
                          verifying=VerifyOptions(n_ctx=32, n_chunks=4, reference="original"), run=Run(1))[0]
        for rounding in ("gptq", "rtn")
    }  # fmt: skip
    for each in made.values():
        assert each.plan.recipe.padding == "width" and each.perplexity is not None
    embedding = next(t for t in read_gguf_header(tmp_path / "gptq.gguf").tensors if t.name == "token_embd.weight")
    assert embedding.shape[1] == 256
    assert made["gptq"].plan.predicted_divergence < made["rtn"].plan.predicted_divergence


def test_a_gguf_of_the_model_is_padded_alike(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "f32.gguf"
    convert(folder, Options(uniform="F32"), output=whole, verifying=NO_CHECK, run=Run(1))
    asked = Options(uniform="Q4_K", pad="on")
    first, second = (
        convert(source, asked, output=tmp_path / f"{i}.gguf", verifying=NO_CHECK, run=Run(1))
        for i, source in enumerate((folder, whole))
    )
    headers = [read_gguf_header(made[0].path) for made in (first, second)]
    data = [made[0].path.read_bytes()[-made[0].plan.tensor_bytes :] for made in (first, second)]
    assert [t.shape for t in headers[0].tensors] == [t.shape for t in headers[1].tensors] and data[0] == data[1]


def test_budget_counts_original_weights(model: Model) -> None:
    wider = padded(model)
    assert sum(math.prod(tensor.shape) for tensor in wider.tensors) > 1.1 * model.n_weights == 1.1 * wider.n_weights
    assert settle(Options(target_bpw=4), model).recipe == recipe(Target("bpw", 4), padding="width", rounding="gptq",
                                                                 calibration="generated",
                                                                 calibration_tokens=8192)  # fmt: skip
