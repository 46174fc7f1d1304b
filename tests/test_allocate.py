"""Candidates, measuring and plans: what may be chosen, what it costs, and that budgets are met to the byte."""

import dataclasses
import json
import math
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from arrays import random_arrays
from models import make_model
from recipes import recipe, uniform

from nsds_gguf import conversion, read
from nsds_gguf.allocate import (
    ALLOCATORS,
    PREFERENCES,
    candidates,
    check_recipe,
    decided_by,
    layer_factors,
    make_plan,
    measurable,
    parse_tensor_type,
)
from nsds_gguf.allocate.allocators import FAST_MARGIN
from nsds_gguf.allocate.candidates import check_target
from nsds_gguf.calibration.column_weights import normalized
from nsds_gguf.errors import ModelError, PlanError, RecordError, TargetError
from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize import measure as measuring
from nsds_gguf.quantize.hessian_factors import FactorStore
from nsds_gguf.quantize.measure import RatioEstimate, measure, ratio_estimate, sample_rows
from nsds_gguf.records import K_TYPES, UNQUANTIZED, LayerScore, Options, Plan, Scores, Target, Tensor, TensorType
from nsds_gguf.sensitivity.moment_propagation import propagate
from nsds_gguf.sensitivity.typical import by_role
from nsds_gguf.session.run import Run
from nsds_gguf.session.settle import settle
from nsds_gguf.system.workers import Threads

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"

ALIGNED = {"n_embd": 256, "n_ff": 512, "n_heads": 4, "head_dim": 64, "n_vocab": 300, "n_layers": 3}
MISALIGNED = {"n_embd": 96, "n_ff": 160, "n_heads": 3, "n_kv_heads": 1, "head_dim": 32, "n_vocab": 300}
HEADER = 1000


@pytest.fixture(scope="module")
def model():
    return make_model(*random_arrays(seed=1, **ALIGNED))


@pytest.fixture(scope="module")
def scores(model):
    return scored(model)


def scored(model, types=K_TYPES):
    propagation = propagate(model)
    costs = measured(model, types, weights_of(propagation), propagation.sensitivity)
    values = np.linspace(0.2, 0.9, model.hparams.n_layers)
    layers = tuple(LayerScore(i, float(v)) for i, v in enumerate(values))
    return Scores(recipe(metric="nsds", se="product", types=types), layers, model.model_id, "tiny", costs=costs)


def weights_of(propagation):
    """Return column weights of mean 1 from swept moments."""
    return {name: normalized(moments) for name, moments in propagation.inputs.items()}


def measured(model, types, weights, sensitivity, n_threads=2):
    """Return the costs of a model's tensors, by ggml's rounding with column weights."""
    tensors = measurable(candidates(model, types))
    return measure(tensors, TensorQuantizers("rtn", weights), sensitivity, Threads(n_threads))


def floor_and_ceiling(model, types=K_TYPES):
    found = candidates(model, types)
    sizes = [[c.n_bytes(name) for name in c.types] for c in found]
    return sum(map(min, sizes)) * 8 / model.n_weights, sum(map(max, sizes)) * 8 / model.n_weights


class TestCandidates:
    def test_aligned_rows_take_what_was_asked(self, model):
        found = {c.tensor.name: c for c in candidates(model, ("Q4_K", "Q2_K"))}
        assert found["blk.0.attn_q.weight"].types == ("Q2_K", "Q4_K")
        assert found["token_embd.weight"].types == ("Q2_K", "Q4_K")
        assert found["blk.0.attn_norm.weight"].types == ("F32",)
        assert found["blk.0.attn_norm.weight"].reason == "vector"

    def test_misaligned_rows_choose_among_narrow_types(self):
        model = make_model(*random_arrays(seed=2, **MISALIGNED))
        found = {c.tensor.name: c for c in candidates(model, K_TYPES)}
        q = found["blk.0.attn_q.weight"]
        assert q.types == ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
        assert q.kind == "fallback" and q.reason == "rows of 96 are not a multiple of 256"
        assert q.n_bytes("Q4_0") == q.n_bytes("IQ4_NL") == 96 * 96 // 32 * 18

    def test_narrow_types_alone_need_no_fallback(self):
        model = make_model(*random_arrays(seed=2, **MISALIGNED))
        found = {c.tensor.name: c for c in candidates(model, ("Q8_0", "Q4_0"))}
        assert found["blk.0.attn_q.weight"].types == ("Q4_0", "Q8_0")
        assert found["blk.0.attn_q.weight"].reason == ""

    def test_what_llama_cpp_keeps_is_f32_or_as_a_gguf_has_it(self):
        arrays, hparams = random_arrays(seed=2, **ALIGNED)
        arrays["blk.0.ffn_gate_inp.weight"] = np.ones((4, 256), "f4")
        arrays["position_embd.weight"] = np.ones((8, 256), "f4")
        arrays["blk.0.ffn_gate_exps.weight"] = np.ones((4, 8, 256), "f4")
        model = make_model(arrays, hparams)
        halves = dataclasses.replace(
            model, tensors=tuple(dataclasses.replace(tensor, dtype="BF16") for tensor in model.tensors)
        )
        from_gguf = dataclasses.replace(halves, files=(Path("model.gguf"),))
        for each, kept in ((model, "F32"), (halves, "F32"), (from_gguf, "BF16")):
            found = {c.tensor.name: c for c in candidates(each, ("Q2_K", "Q4_K"))}
            for name, why in (
                ("blk.0.attn_norm.weight", "vector"),
                ("blk.0.ffn_gate_inp.weight", "router"),
                ("position_embd.weight", "positions"),
            ):
                stays = "F32" if why == "vector" else kept  # the only type of llama.cpp's kernels there
                assert found[name].types == (stays,)
                assert (found[name].kind, found[name].reason) == ("unquantized", why)
            assert found["blk.0.ffn_gate_exps.weight"].types == ("Q2_K", "Q4_K")
        with pytest.raises(PlanError, match=r"only tensors that stay BF16, such as position_embd\.weight"):
            candidates(from_gguf, ("Q2_K",), [parse_tensor_type("position_embd.weight=Q4_K")])

    def test_rows_that_no_block_divides_stay_f16(self):
        model = make_model(*random_arrays(seed=3, n_embd=40, n_ff=40))
        found = {c.tensor.name: c for c in candidates(model, K_TYPES)}
        assert found["blk.0.ffn_up.weight"].types == ("F16",)
        assert found["blk.0.ffn_up.weight"].kind == "fallback"
        assert found["blk.0.ffn_up.weight"].reason == "rows of 40 are not a multiple of 32"

    def test_fixed_types_match_whole_names_and_the_first_counts(self, model):
        fixed = [
            parse_tensor_type(r"blk\.1\.ffn_.*=q6_k"),
            parse_tensor_type(r"blk\.1\..*=Q2_K"),
            parse_tensor_type("output.weight=F16"),
        ]
        found = {c.tensor.name: c for c in candidates(model, K_TYPES, fixed)}
        assert found["blk.1.attn_q.weight"].types == ("Q2_K",)
        assert found["blk.1.ffn_up.weight"].types == ("Q6_K",)
        assert found["blk.1.ffn_norm.weight"].types == ("F32",)
        assert found["output.weight"].types == ("F16",) and found["output.weight"].kind == "fixed"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("attn_q=Q4_K", "--tensor-type 'attn_q=Q4_K' matches no tensor (the pattern must match the whole name)"),
            (
                ".*norm.*=Q4_K",
                "--tensor-type '.*norm.*=Q4_K' matches only tensors that stay F32, such as blk.0.attn_norm.weight "
                "(the pattern must match the whole name)",
            ),
            (
                "(=Q4_K",
                "--tensor-type '(=Q4_K': not a regular expression: missing ), unterminated subpattern at position 0",
            ),
            ("Q4_K", "--tensor-type 'Q4_K': wanted REGEX=TYPE, for example 'blk\\.0\\..*=Q6_K'"),
            ("a=Q9", f"--tensor-type 'a=Q9': type 'Q9' is not known; wanted one of {', '.join(ggml.TYPES)}"),
        ],
    )
    def test_bad_fixed_types(self, model, text, message):
        with pytest.raises(PlanError) as caught:
            candidates(model, K_TYPES, [parse_tensor_type(text)])
        assert str(caught.value) == message

    def test_a_fixed_type_that_rows_do_not_fit(self):
        model = make_model(*random_arrays(seed=2, **MISALIGNED))
        with pytest.raises(PlanError, match=r"token_embd\.weight has rows of 96 weights, .* not a multiple of 256$"):
            candidates(model, K_TYPES, [TensorType("token_embd.weight", "Q4_K")])


class TestTarget:
    @pytest.mark.parametrize("dims", [ALIGNED, MISALIGNED], ids=["aligned", "misaligned"])
    def test_the_nearest_target_named_is_feasible_and_a_bit_less_is_not(self, dims):
        found = candidates(make_model(*random_arrays(seed=4, **dims)), K_TYPES)
        for kind, option, step in (("bpw", "--target-bpw ", 0.001), ("size", "--target-size ", 1)):
            with pytest.raises(TargetError) as caught:
                check_target(found, Target(kind, 0.5), HEADER)
            nearest = float(str(caught.value).rsplit(option, 1)[1])
            check_target(found, Target(kind, nearest), HEADER)
            with pytest.raises(TargetError):
                check_target(found, Target(kind, nearest - step), HEADER)

    def test_message_says_what_sets_the_floor(self, model):
        found = candidates(model, ("Q2_K",), [TensorType("output.weight", "F16")])
        with pytest.raises(TargetError) as caught:
            check_target(found, Target("bpw", 2.0), HEADER)
        text = str(caught.value)
        floor = sum(c.n_bytes(c.types[0]) for c in found)
        assert text.startswith(f"target 2 bpw is out of reach: the floor is {floor * 8 / model.n_weights:.3f} bpw, ")
        assert f"{floor} bytes for the tensors, set by layers at Q2_K (" in text and "--tensor-type (" in text

    @pytest.mark.parametrize(
        ("n_cols", "types", "is_told"), [(320, K_TYPES, True), (96, K_TYPES, False), (320, ggml.SMALL_ROW_TYPES, False)]
    )
    def test_message_names_types_for_rows_of_64(self, n_cols, types, is_told):
        _, hparams = random_arrays(seed=0)
        model = make_model({"blk.0.ffn_down.weight": np.ones((8, n_cols), "f4")}, hparams)
        found = candidates(model, types)
        with pytest.raises(TargetError) as caught:
            check_target(found, Target("bpw", 2.0), HEADER)
        hint = "; smaller with --types Q2_0,IQ4_NL,Q5_0,Q5_1,Q8_0, for llama.cpp since July 2026"
        assert str(caught.value).endswith(hint) == is_told


class TestMeasure:
    def test_whole_tensors_equal_gguf_pys_dequantization(self, model):
        propagation = propagate(model)
        weights_by_name = weights_of(propagation)
        costs = {c.name: c for c in measured(model, ("Q3_K", "Q6_K"), weights_by_name, propagation.sensitivity)}
        for name in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight", "token_embd.weight"):
            tensor, weights = model.by_name[name], weights_by_name.get(name, np.ones(1, "f4")).astype(np.float64)
            x = tensor.load().astype(np.float64)
            cost = costs[name]
            assert cost.n_rows_sampled == tensor.n_rows and set(cost.stderr.values()) == {0.0}
            for type_name, error in cost.errors.items():
                data = ggml.quantize(x.astype("f4"), type_name, weights_by_name.get(name))
                y = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name]).astype(np.float64)
                by_row = (weights * (x - y) ** 2).sum(axis=1) / (weights * x**2).sum(axis=1)
                assert error == pytest.approx(by_row.mean(), rel=1e-4)

    @pytest.mark.parametrize("limit", [1 << 30, 1], ids=["whole", "sampled"])
    def test_experts_are_measured_with_weights_of_their_own(self, monkeypatch, limit):
        """Slabs of rows have one expert's weights each, whether they are a sample or not."""
        monkeypatch.setattr(measuring, "WHOLE_BELOW_WEIGHTS", limit)
        monkeypatch.setattr(Tensor, "rows_per_slab", lambda tensor: max(1, 5 * 256 // tensor.n_cols))
        rng = np.random.default_rng(4)
        stack = (rng.standard_normal((3, 50, 256)) * np.array([1, 3, 0.1])[:, None, None]).astype("f4")
        weights = np.exp(rng.standard_normal((3, 256))).astype("f4")
        name = "blk.0.ffn_down_exps.weight"
        _, hparams = random_arrays(seed=0)
        tensor = make_model({name: stack}, hparams).tensors[0]
        (cost,) = measure([(tensor, ("Q4_K",))], TensorQuantizers("rtn", {name: weights}), {}, Threads(1))
        rows = sample_rows(tensor)
        assert (len(rows) == 150) == (limit > 1) and len(rows) >= 64
        errors = []
        for row in rows:
            x, w = stack.reshape(-1, 256)[row : row + 1], weights[row // 50]
            delta = gguf.quants.dequantize(ggml.quantize(x, "Q4_K", w), gguf.GGMLQuantizationType.Q4_K) - x
            errors.append((w * delta**2).sum() / (w * x**2).sum())
        assert cost.errors["Q4_K"] == pytest.approx(np.mean(errors), rel=1e-5)

    def test_sample_of_rows_is_fixed_and_stratified(self):
        model = make_model(*random_arrays(seed=5, **{**ALIGNED, "n_vocab": 4096}))
        rows = sample_rows(model.by_name["token_embd.weight"], 512)
        assert len(rows) == 512 and (rows == sample_rows(model.by_name["token_embd.weight"], 512)).all()
        assert (rows // 8 == np.arange(512)).all()

    def test_sampled_error_agrees_with_the_whole_within_its_standard_error(self, monkeypatch):
        model = make_model(*random_arrays(seed=6, **{**ALIGNED, "n_vocab": 4096}))
        output = [(model.by_name["output.weight"], ("Q2_K", "Q4_K"))]
        (sampled,) = measure(output, TensorQuantizers(), {}, Threads(1))
        monkeypatch.setattr("nsds_gguf.quantize.measure.WHOLE_BELOW_WEIGHTS", 1 << 30)
        (whole,) = measure(output, TensorQuantizers(), {}, Threads(1))
        assert whole.n_rows_sampled == 4096 > sampled.n_rows_sampled
        for name in ("Q2_K", "Q4_K"):
            assert 0 < sampled.stderr[name] < 0.035 * whole.errors[name]
            assert abs(sampled.errors[name] - whole.errors[name]) < 4 * sampled.stderr[name]

    def test_uneven_rows_take_a_larger_sample(self):
        """Rows of equal error need few; where three of four rows have none, a sample of 128 is too small."""
        arrays, hparams = random_arrays(seed=6, **{**ALIGNED, "n_vocab": 4096})
        half = arrays["output.weight"].copy()
        half[np.arange(len(half)) % 4 > 0] = 1.0
        found = [
            measure([(make_model({**arrays, "output.weight": rows}, hparams).by_name["output.weight"], ("Q4_K",))],
                    TensorQuantizers(), {}, Threads(1))[0]
            for rows in (arrays["output.weight"], half)
        ]  # fmt: skip
        assert found[0].n_rows_sampled < 1000 < found[1].n_rows_sampled < 4096
        for cost in found:
            assert 0 < cost.stderr["Q4_K"] < 0.035 * cost.errors["Q4_K"]

    @pytest.mark.parametrize("has_factors", [False, True], ids=["rtn", "gptq"])
    def test_weights_beyond_f16_take_bf16(self, tmp_path, has_factors):
        """Floats of 16 bits are measured like any type: F16 loses less, BF16 has the range."""
        arrays, hparams = random_arrays(seed=1, **ALIGNED)
        large, small = "blk.1.ffn_up.weight", "blk.0.ffn_up.weight"
        arrays[large] *= np.float32(1e6 / np.abs(arrays[large]).max())
        model = make_model(arrays, hparams)
        factors = FactorStore(tmp_path)
        factors.add([large, small], np.eye(256), 0.05)
        quantizers = TensorQuantizers("gptq", factors=factors) if has_factors else TensorQuantizers()
        types = settle(Options(target_bpw=17), model).recipe.types
        costs = measure(measurable(candidates(model, types)), quantizers, dict.fromkeys(arrays, 1.0), Threads(1))
        of_large, of_small = ({cost.name: cost.errors for cost in costs}[name] for name in (large, small))
        assert of_large["F16"] == 1e12 and 1e-7 < of_large["BF16"] < 1e-5
        assert 1e-9 < of_small["F16"] < 1e-7 < of_small["BF16"] < 1e-5 < of_small["Q8_0"] < 1e-4
        scores = Scores(recipe(types=types), (), model.model_id, "tiny", costs=costs)
        plan = make_plan(model, scores, recipe(17, types=types), HEADER)
        planned = {tensor.name: tensor.type for tensor in plan.tensors}
        assert planned[large] == "BF16" and planned[small] == "F16"

    def test_a_row_of_huge_norm_does_not_hide_the_others(self):
        """One row holds nearly all of the squared norm and is exact in every type; rows of zeros do not count."""
        arrays, hparams = random_arrays(seed=6, **ALIGNED)
        rows = np.random.default_rng(1).standard_normal((300, 256)).astype("f4")
        rows[7], rows[200:] = 1e4, 0
        arrays["output.weight"] = rows
        tensor = make_model(arrays, hparams).by_name["output.weight"]
        plain = make_model({**arrays, "output.weight": np.delete(rows[:200], 7, axis=0)}, hparams)
        found, others = (
            measure([(each, ("Q2_K",))], TensorQuantizers(), {}, Threads(1))[0].errors["Q2_K"]
            for each in (tensor, plain.by_name["output.weight"])
        )
        assert found == pytest.approx(others * 199 / 200, rel=1e-4) and others > 0.01

    def test_rows_count_by_their_sensitivity(self, monkeypatch):
        """Rows that no token reaches do not count, be the matrix measured whole or by a sample."""
        arrays, hparams = random_arrays(seed=6, **ALIGNED)
        rows = np.random.default_rng(1).standard_normal((400, 256)).astype("f4")
        rows[::2, ::16] *= 10  # larger errors
        arrays["output.weight"] = rows
        tensor = make_model(arrays, hparams).by_name["output.weight"]
        x, y = rows, gguf.quants.dequantize(ggml.quantize(rows, "Q4_K", None), gguf.GGMLQuantizationType.Q4_K)
        by_row = ((x - y).astype("f8") ** 2).sum(axis=1) / (x.astype("f8") ** 2).sum(axis=1)
        of_rows = np.where(np.arange(400) % 2, 3.0, 1.0).astype("f4")
        of_rows[:100] = 0
        for limit in (1 << 30, 1):
            monkeypatch.setattr(measuring, "WHOLE_BELOW_WEIGHTS", limit)
            (cost,) = measure([(tensor, ("Q4_K",))], TensorQuantizers(), {}, Threads(1), of_rows={tensor.name: of_rows})
            assert (cost.n_rows_sampled == 400) == (limit > 1)
            taken = sample_rows(tensor, cost.n_rows_sampled)
            wanted = np.average(by_row[taken], weights=of_rows[taken])
            assert cost.errors["Q4_K"] == pytest.approx(wanted, rel=1e-4)
        (cost,) = measure([(tensor, ("Q4_K",))], TensorQuantizers(), {}, Threads(1),
                          of_rows={tensor.name: np.zeros(400, "f4")})  # fmt: skip
        assert cost.errors["Q4_K"] == pytest.approx(by_row[taken].mean(), rel=1e-4)

    def test_ratio_estimate_by_hand(self):
        # rows (1, 2), (2, 2): ratio 3/4; residuals -1/2, 1/2; variance 1/2; half the rows sampled
        estimate = ratio_estimate(np.array([1.0, 2.0]), np.array([2.0, 2.0]), 4)
        assert estimate.ratio == 0.75 and estimate.stderr == pytest.approx(math.sqrt(2 * 0.5 * 0.5) / 4)
        assert ratio_estimate(np.array([1.0, 2.0]), np.array([2.0, 2.0]), 2).stderr == 0
        assert ratio_estimate(np.zeros(3), np.zeros(3), 30).ratio == 0

    def test_rows_that_a_standard_error_takes(self):
        """Deviation 0.5 of the ratio: of very many rows (0.5 / 0.01)^2; of as many again as that, half."""
        assert RatioEstimate(2.0, 1.0, 128, 10**12).n_wanted(0.01) == 2500
        assert RatioEstimate(2.0, 1.0, 128, 2500).n_wanted(0.01) == 1250
        assert RatioEstimate(2.0, 1.0, 1250, 2500).stderr == pytest.approx(0.02)
        assert RatioEstimate(2.0, 0.0, 128, 2500).n_wanted(0.01) == 0

    def test_nan_is_named(self, model):
        arrays, hparams = random_arrays(seed=1, **ALIGNED)
        arrays["blk.1.attn_v.weight"][5, 7] = np.nan
        broken = make_model(arrays, hparams)
        with pytest.raises(ModelError, match=r"attn_v\.weight: 1 NaN and 0 infinite of \d+ weights"):
            measured(broken, ("Q4_K",), {}, {})

    def test_threads_do_not_change_anything(self, model):
        found, types = propagate(model), ("Q2_K", "Q5_K")
        one, several = (measured(model, types, weights_of(found), found.sensitivity, n) for n in (1, 3))
        assert one == several


class TestPlans:
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 0.9])
    @pytest.mark.parametrize("kind", ["bpw", "size"])
    def test_budget_is_met_to_the_byte_and_used(self, model, scores, share, kind):
        low, high = floor_and_ceiling(model)
        value = low + (high - low) * share + 1e-9
        target = Target(kind, value if kind == "bpw" else int(value * model.n_weights / 8) + HEADER + 64 * 32)
        plan = make_plan(model, scores, recipe(target), HEADER)
        assert plan.unused_bytes >= 0
        used = plan.tensor_bytes if kind == "bpw" else plan.file_bytes
        assert used == sum(t.n_bytes if kind == "bpw" else t.padded_bytes for t in plan.tensors) + (
            0 if kind == "bpw" else HEADER
        )
        for tensor in plan.tensors:  # no feasible upgrade is left
            for name in K_TYPES if tensor.reason == "optimum" else ():
                extra = math.prod(tensor.shape[:-1]) * ggml.row_bytes(name, tensor.shape[-1]) - tensor.n_bytes
                assert extra <= 0 or extra > plan.unused_bytes

    def test_more_sensitive_tensors_get_more_bits(self, model, scores):
        def with_output_sensitivity(value):
            costs = tuple(
                dataclasses.replace(c, sensitivity=value) if c.name == "output.weight" else c for c in scores.costs
            )
            plan = make_plan(model, dataclasses.replace(scores, costs=costs), recipe(3.6), HEADER)
            return next(t.n_bytes for t in plan.tensors if t.name == "output.weight")

        sizes = [with_output_sensitivity(value) for value in (1e-6, 0.01, 0.1, 1.0, 100.0)]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]

    def test_layer_scores_are_a_factor_when_asked(self, model, scores):
        """Of exp(weight (S - mean S)); scores of metrics that are no shares span 0 to 1 first."""
        factors = layer_factors(scores, 1.5)
        assert factors == {i: pytest.approx(math.exp(1.5 * x)) for i, x in enumerate((-0.35, 0.0, 0.35))}
        other = dataclasses.replace(
            scores, recipe=recipe(metric="mse"), layers=tuple(LayerScore(i, 100.0 * i) for i in range(3))
        )
        assert layer_factors(other, 1.5)[2] / layer_factors(other, 1.5)[0] == pytest.approx(math.exp(1.5))
        costs = {cost.name: cost.sensitivity for cost in scores.costs}
        for weight, expected in ((1.5, factors), (Options().score_weight, dict.fromkeys(range(3), 1.0))):
            asked = recipe(3.5, metric="nsds", se="product", score_weight=weight)
            for tensor in make_plan(model, scores, asked, HEADER).tensors:
                if tensor.name in costs:
                    assert tensor.sensitivity == pytest.approx(costs[tensor.name] * expected.get(tensor.layer, 1.0))
        assert Options().score_weight == 0

    def test_what_scoring_could_not_see_is_said(self, model, scores):
        plan = make_plan(model, dataclasses.replace(scores, notes=("Unseen.",)), recipe(4), HEADER)
        assert "Unseen." in plan.notes

    def test_ceiling_is_said(self, model, scores):
        plan = make_plan(model, scores, recipe(9), HEADER)
        assert {t.type for t in plan.tensors} == {"Q6_K", "F32"}
        assert any(note.startswith("The target 9 bpw exceeds what the types can use") for note in plan.notes)

    def test_fallbacks_are_said(self):
        model = make_model(*random_arrays(seed=2, **MISALIGNED))
        plan = make_plan(model, scored(model), recipe(5), HEADER)
        assert {t.type for t in plan.tensors} <= {"F32", *ggml.NARROW_TYPES}
        assert any("rows that are not a multiple of 256" in note for note in plan.notes)
        for tensor in plan.tensors:  # the better codebook at the same bytes
            assert tensor.type != "Q4_0" or tensor.sensitivity == 0

    @pytest.mark.parametrize("n_high", [0, 1, 2, 3])
    def test_paper_gives_the_most_sensitive_layers_four_bits(self, model, n_high):
        values = [0.2, 0.9, 0.5]
        scores = Scores(
            recipe(metric="nsds", se="product"),
            tuple(LayerScore(i, v) for i, v in enumerate(values)),
            model.model_id,
            "tiny",
        )
        found = candidates(model, ("Q2_K", "Q4_K"))
        high = {1: [], 2: [1], 3: [1, 2], 4: [0, 1, 2]}[n_high + 1]
        allowed = sum(
            c.n_bytes(c.types[-1] if c.tensor.layer is None or c.tensor.layer in high else c.types[0]) for c in found
        )
        plan = make_plan(model, scores, recipe(allowed * 8 / model.n_weights + 1e-9, allocator="paper"), HEADER)
        at_four = {t.layer for t in plan.tensors if t.type == "Q4_K" and t.layer is not None}
        assert at_four == set(high) and plan.tensor_bytes == allowed
        assert f"{n_high} of 3 layers are at 4 bits." in plan.notes

    @pytest.mark.parametrize(
        ("name", "expected"), [("Q4_K", "Q5_0"), ("Q2_K", "IQ4_NL"), ("Q8_0", "Q8_0"), ("F16", "F16")]
    )
    def test_uniform_with_fallback(self, name, expected):
        model = make_model(*random_arrays(seed=2, **MISALIGNED))
        plan = make_plan(model, None, uniform(name), HEADER)
        assert {t.type for t in plan.tensors if len(t.shape) > 1} == {expected}
        says = [(t.kind, t.reason) for t in plan.tensors if t.name == "token_embd.weight"]
        fallback = ("fallback", "rows of 96 are not a multiple of 256")
        assert says == [("chosen", "uniform") if expected == name else fallback]

    def test_plans_are_deterministic_and_round_trip(self, model, scores):
        first, second = (make_plan(model, scores, recipe(3.3), HEADER) for _ in range(2))
        assert first == second and first.digest == second.digest
        again = Plan.from_json(json.loads(json.dumps(first.to_json())))
        assert again == first and again.digest == first.digest
        kept = Scores.from_json(json.loads(json.dumps(scores.to_json())))
        assert make_plan(model, kept, recipe(3.3), HEADER).tensors == first.tensors

    def test_three_ways_to_count_bits(self, model, scores):
        plan = make_plan(model, scores, recipe(3.3), HEADER)
        matrices = [t for t in plan.tensors if len(t.shape) > 1]
        assert plan.bpw == sum(t.n_bytes for t in plan.tensors) * 8 / model.n_weights <= 3.3
        assert plan.quantized_bpw == sum(t.n_bytes for t in matrices) * 8 / sum(t.n_weights for t in matrices)
        assert plan.file_bpw == (HEADER + sum(t.padded_bytes for t in plan.tensors)) * 8 / model.n_weights

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            ({"model_id": "f" * 64}, {}, "the scores belong to another model (tiny); score arrays again"),
            ({"costs": ()}, {}, "the scores hold no tensor costs; score again without --layers-only"),
            (
                {"recipe": recipe(calibration="norm")},
                {},
                "the scores were measured with calibration norm, the plan uses random; "
                "score again or pass --calibration norm",
            ),
            (
                {"recipe": recipe(rounding="gptq")},
                {},
                "the scores were measured with rounding gptq, the plan uses rtn; score again or pass --rounding gptq",
            ),
            (
                {"recipe": recipe(calibration="imatrix:0123456789ab")},
                {},
                "the scores were measured with calibration imatrix:0123456789ab, the plan uses random; "
                "score again or pass that file with --imatrix",
            ),
            (
                {"layers": ()},
                {"score_weight": 1.0},
                "the scores hold no layer scores for --score-weight; score again with --score-weight",
            ),
            (
                {},
                {"types": ("Q4_K", "Q8_0")},
                "the scores hold no error of token_embd.weight at Q8_0; score again with --types",
            ),
        ],
    )
    def test_scores_that_do_not_fit(self, model, scores, change, options, message):
        with pytest.raises(RecordError) as caught:
            make_plan(model, dataclasses.replace(scores, **change), recipe(5, **options), HEADER)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            (recipe(), "allocator fisher needs a target: --target-bpw or --target-size"),
            (recipe(3, allocator="x"), f"allocator 'x' is not known; wanted one of {', '.join(ALLOCATORS)}"),
            (recipe(-1), "target -1 bpw: wanted a positive number"),
            (recipe(math.nan), "target nan bpw: wanted a positive number"),
            (recipe(3, types=()), "--types: wanted at least one type"),
            (
                recipe(3, types=("Q4_K", "Q9")),
                f"--types: type 'Q9' is not known; wanted one of {', '.join(ggml.TYPES)}",
            ),
            (recipe(3, score_weight=math.nan), "score weight nan: wanted a finite number"),
        ],
    )
    def test_contradicting_recipes(self, model, scores, asked, message):
        with pytest.raises(PlanError) as caught:
            make_plan(model, scores, asked, HEADER)
        assert str(caught.value) == message


@pytest.fixture(scope="module")
def both():
    """Return a plan of the demo, and the one that prefers types that ggml is fast with."""
    scores = conversion.score(DEMO, Options(rounding="rtn"), run=Run(1))
    wishes = [Options(target_bpw=4.2, prefer=prefer) for prefer in PREFERENCES]
    return conversion.plan(DEMO, wishes, loaded=scores).plans


class TestPreferFast:
    """A demo plan with types that ggml is fast with, against the plan without the wish."""

    def test_less_is_slow_at_about_the_same_divergence(self, both):
        plain, fast = both
        assert sum(slow_weights(fast)) < sum(slow_weights(plain))
        assert plain.predicted_divergence < fast.predicted_divergence <= 1.05 * plain.predicted_divergence
        assert fast.tensor_bytes <= 4.2 * fast.n_weights / 8

    def test_the_margin_bounds_the_cost(self, model, scores):
        for value in np.arange(3.0, 6.0, 0.25):
            plain, fast = (make_plan(model, scores, recipe(value, prefer=prefer), HEADER) for prefer in PREFERENCES)
            assert fast.predicted_divergence <= (1 + FAST_MARGIN) * plain.predicted_divergence

    def test_what_is_still_slow_is_named(self, both):
        plain, fast = both
        slow = [t.name for t in fast.tensors if t.type == "Q3_K"]
        (note,) = [note for note in fast.notes if "without fast CPU kernels" in note]
        assert note.startswith(f"{len(slow)} tensors ") and note.endswith(f"ggml: {', '.join(slow)}.")
        assert not any("without fast CPU kernels" in note for note in plain.notes)

    def test_nothing_slow_is_told_too(self):
        (plan,) = conversion.plan(DEMO, Options(uniform="Q4_K", prefer="fast", rounding="rtn")).plans
        assert "Every quantized tensor has a type with fast CPU kernels in ggml." in plan.notes

    def test_a_wish_that_is_not_known(self):
        with pytest.raises(PlanError, match="preference 'speed' is not known; wanted one of quality, fast"):
            check_recipe(recipe(3, prefer="speed"))


def slow_weights(plan):
    """Return the weights of every tensor of a slow type."""
    return [t.n_weights for t in plan.tensors if t.type not in UNQUANTIZED and not ggml.TYPES[t.type].is_fast]


class TestNsds:
    """Sensitivities typical of roles, times NSDS: a plan without text."""

    def test_sensitivities_are_those_of_roles(self):
        model = read.open_model(DEMO)
        found = by_role(model)
        of_layer = {role: found.sensitivity[f"blk.0.{role}.weight"] for role in ("attn_q", "ffn_down")}
        assert of_layer == pytest.approx({"attn_q": 0.19 / 6, "ffn_down": 1.10 / 6})
        assert (found.sensitivity["output.weight"], found.sensitivity["token_embd.weight"]) == (2.55, 0.76)
        assert "blk.0.attn_norm.weight" not in found.sensitivity and not found.of_rows

    def test_one_read_of_the_weights_gives_a_plan(self, monkeypatch):
        """No pass over tokens is made; NSDS of a layer is a factor of e to the power of its distance from the mean."""

        def refuse(*_):
            raise AssertionError("a pass over tokens")

        monkeypatch.setattr("nsds_gguf.session.calibrated.sensitivities", refuse)
        (plan,) = conversion.plan(DEMO, Options(target_bpw=3, allocator="nsds"), run=Run(1)).plans
        assert 2.99 * plan.n_weights / 8 < plan.tensor_bytes <= 3 * plan.n_weights / 8
        assert decided_by(plan.recipe) == ("nsds",)
        assert any(note.startswith("Sensitivities are typical of the roles") for note in plan.notes)
        scores = [layer.score for layer in conversion.score(DEMO, measures=False, run=Run(1)).layers]
        found = {tensor.layer: tensor.sensitivity for tensor in plan.tensors if tensor.role == "ffn_down"}
        wanted = {layer: 1.10 / 6 * math.exp(score - np.mean(scores)) for layer, score in enumerate(scores)}
        assert found == pytest.approx(wanted, rel=1e-5)

    def test_scores_of_a_pass_are_refused(self, model, scores):
        with pytest.raises(RecordError, match="sensitivities of allocator fisher, the plan uses nsds; drop --scores"):
            make_plan(model, scores, recipe(3.6, allocator="nsds"), HEADER)
