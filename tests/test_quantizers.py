"""The seam for rounding: what is measured is what is written, by whatever rounding, in every type."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import gptq_oracle
import numpy as np
import pytest
from plans import uniform_plan, writable_model

from nsds_gguf.calibration.hessians import HessianFiles
from nsds_gguf.errors import GgmlError
from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.quantize import ROUNDINGS, Rounding, TensorQuantizers, gptq, kernel, measure, rtn
from nsds_gguf.quantize.gptq import ROW_TILE, GptqQuantizer
from nsds_gguf.quantize.hessian_factors import FactorStore, factor_hessian
from nsds_gguf.quantize.measure import sample_rows
from nsds_gguf.quantize.rtn import RtnQuantizer
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.records import Hparams
from nsds_gguf.system.resources import blas_threads
from nsds_gguf.system.workers import Threads

HPARAMS = Hparams(1, 256, 512, 4, 2, 64, 300, 128, 1e-5)
PLAIN, STACK, UNSEEN = "blk.0.ffn_up.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_q.weight"
N_LARGE = 2500  # rows of 256: more than a slab


@pytest.fixture(autouse=True)
def one_blas_thread():
    with blas_threads(1):
        yield


def uneven(*shape, seed=0):
    """Return weights with uneven channels, as trained matrices have."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]) / 2)).astype(np.float32)


@pytest.fixture
def model():
    """Return a matrix of more than a tile, experts of different size, and a matrix that nothing is known of."""
    experts = uneven(3, 50, 256, seed=1) * np.array([1, 3, 0.1], np.float32)[:, None, None]
    return writable_model({PLAIN: uneven(300, 256), STACK: experts, UNSEEN: uneven(7, 256, seed=2)}, HPARAMS)


@pytest.fixture
def hessian():
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((1024, 256)) @ (rng.standard_normal((256, 256)) + 4 * np.eye(256))
    return inputs.T @ inputs / len(inputs)


@pytest.fixture
def weights():
    rng = np.random.default_rng(4)
    shapes = {PLAIN: (256,), STACK: (3, 256)}
    return {name: np.exp(rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def quantizers(tmp_path, weights, hessian):
    """Return quantizers by name of the rounding; GPTQ has Hessian factors of the plain matrix alone."""
    store = FactorStore(tmp_path)
    store.add([PLAIN], hessian, 0.1)
    return {"rtn": TensorQuantizers("rtn", weights), "gptq": TensorQuantizers("gptq", weights, store)}


def measured(model, quantizers, type_name):
    """Return the relative error of every tensor in a type."""
    costs = measure.measure([(tensor, (type_name,)) for tensor in model.tensors], quantizers, {}, Threads(2))
    return {cost.name: cost.errors[type_name] for cost in costs}


def written(model, quantizers, type_name, path):
    """Return what the tensors of a written file hold, ``(n_rows, n_cols)`` float32."""
    write_gguf(model, uniform_plan(model, type_name), quantizers, path, workers=Threads(2))
    data = np.fromfile(path, np.uint8)  # gguf's reader does not know every type
    read = {tensor.name: data[tensor.offset :][: tensor.n_bytes] for tensor in read_gguf_header(path).tensors}
    return {t.name: ggml.dequantize(read[t.name].reshape(t.n_rows, -1), type_name, t.n_cols) for t in model.tensors}


def seven_digits(errors, norms):
    return float(f"{(errors / norms).mean():.7g}")


def weighted_error(rows, found, weights):
    """Return the mean relative error of rows under column weights, matrix by matrix."""
    parts = zip(rows, found, weights, strict=True)
    sums = [(np.square(y - x) @ w, np.square(x) @ w) for x, y, w in parts]
    errors, norms = (np.concatenate(each).astype(np.float64) for each in zip(*sums, strict=True))
    return seven_digits(errors, norms)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("type_name", ggml.TYPES)
def test_the_measured_error_is_that_of_the_bytes(type_name, rounding, model, weights, quantizers, hessian, tmp_path):
    """To float32's precision; GPTQ's also by the quadratic form in float64."""
    errors = measured(model, quantizers[rounding], type_name)
    found = written(model, quantizers[rounding], type_name, tmp_path / "model.gguf")
    x, y = model.by_name[STACK].load(), found[STACK].reshape(3, 50, 256)
    assert errors[STACK] == pytest.approx(weighted_error(x, y, weights[STACK]), rel=1e-6)
    x, y = model.by_name[UNSEEN].load(), found[UNSEEN]
    assert errors[UNSEEN] == pytest.approx(weighted_error([x], [y], [np.ones(256, np.float32)]), rel=1e-6)
    x, y = model.by_name[PLAIN].load(), found[PLAIN]
    if rounding == "rtn":
        assert errors[PLAIN] == pytest.approx(weighted_error([x], [y], [weights[PLAIN]]), rel=1e-6)
        return
    factors = quantizers["gptq"].factors.of(PLAIN)
    norms = (np.square(x) @ factors.diagonal).astype(np.float64)
    assert errors[PLAIN] == seven_digits(factors.row_errors(x - y), norms)
    damped, diagonal, delta = 0.9 * hessian, hessian.diagonal(), x.astype(np.float64) - y
    np.fill_diagonal(damped, diagonal + 1e-3 * diagonal.mean())
    exact = (np.einsum("ri,ij,rj->r", delta, damped, delta) / (x.astype(np.float64) ** 2 @ damped.diagonal())).mean()
    assert errors[PLAIN] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_slabs_of_a_large_matrix_do_not_matter(rounding, weights, quantizers, tmp_path, monkeypatch):
    """Read at once when it is measured, in slabs when it is written."""
    monkeypatch.setattr(measure, "WHOLE_BELOW_WEIGHTS", 1 << 20)
    model = writable_model({PLAIN: uneven(N_LARGE, 256)}, HPARAMS)
    x, quantizer = model.by_name[PLAIN].load(), quantizers[rounding](model.by_name[PLAIN])
    y = written(model, quantizers[rounding], "Q4_K", tmp_path / "model.gguf")[PLAIN]
    np.testing.assert_array_equal(y, ggml.dequantize(quantizer.quantize(x, "Q4_K"), "Q4_K", 256))
    expected = seven_digits(quantizer.errors(x, "Q4_K"), quantizer.squared_norms(x))
    assert measured(model, quantizers[rounding], "Q4_K")[PLAIN] == expected


@pytest.mark.parametrize("type_name", ["Q2_K", "Q5_K", "IQ4_NL"])
def test_of_a_sample_too(type_name, model, quantizers, tmp_path, monkeypatch):
    """Rows of a sample stand elsewhere in their tiles than when they are written, which may move last bits."""
    monkeypatch.setattr(measure, "WHOLE_BELOW_WEIGHTS", 1)
    errors = measured(model, quantizers["gptq"], type_name)
    y, tensor = written(model, quantizers["gptq"], type_name, tmp_path / "model.gguf")[PLAIN], model.by_name[PLAIN]
    rows, factors = sample_rows(tensor), quantizers["gptq"].factors.of(PLAIN)
    assert len(rows) == 128
    x = tensor.load()[rows]
    expected = (factors.row_errors(x - y[rows]) / (np.square(x) @ factors.diagonal)).mean()
    assert errors[PLAIN] == pytest.approx(expected, rel=1e-3)


def test_gptq_lowers_what_it_measures(model, quantizers):
    """In every type with codes to choose; what it has no codec for is ggml's to the byte."""
    x, factors = model.by_name[PLAIN].load(), quantizers["gptq"].factors.of(PLAIN)
    for name in ggml.TYPES:
        ours, plain = GptqQuantizer(factors), RtnQuantizer(factors.diagonal, 300)
        rounded = ggml.dequantize(plain.quantize(x, name), name, 256)
        if name in ggml.FLOAT_TYPES:
            np.testing.assert_array_equal(ours.quantize(x, name), plain.quantize(x, name))
        else:
            assert ours.errors(x, name).sum() < 0.9 * factors.row_errors(x - rounded).sum()


def test_a_type_without_a_codec_is_rounded_one_way(model, quantizers, tmp_path, monkeypatch):
    """By GPTQ's quantizer to nearest, the Hessian's diagonal for weights, measured and written."""
    monkeypatch.setattr(gptq, "FORMATS", {name: each for name, each in gptq.FORMATS.items() if name != "Q4_K"})
    factors, x = quantizers["gptq"].factors.of(PLAIN), model.by_name[PLAIN].load()
    y = written(model, quantizers["gptq"], "Q4_K", tmp_path / "model.gguf")[PLAIN]
    np.testing.assert_array_equal(y, ggml.dequantize(ggml.quantize(x, "Q4_K", factors.diagonal), "Q4_K", 256))
    norms = (np.square(x) @ factors.diagonal).astype(np.float64)
    assert measured(model, quantizers["gptq"], "Q4_K")[PLAIN] == seven_digits(factors.row_errors(x - y), norms)


@dataclass(frozen=True)
class Halving(RtnQuantizer):
    """Writes half of every weight, in tiles of 96 rows."""

    tile_rows: int = 96

    def quantize(self, rows, type_name, first_row=0):
        assert first_row % self.rows_per_matrix % self.tile_rows == 0
        return super().quantize(rows / 2, type_name, first_row)


def test_a_rounding_of_ones_own_measures_and_writes(tmp_path, monkeypatch):
    """One entry of the table: half of every weight is an error of a quarter of its square."""
    model = writable_model({PLAIN: uneven(N_LARGE, 256), STACK: uneven(3, 50, 256, seed=1)}, HPARAMS)
    halving = Rounding("halve", "write half", False, lambda tensor, *_: Halving(None, tensor.shape[-2]))
    monkeypatch.setitem(ROUNDINGS, "halve", halving)
    quantizers = TensorQuantizers("halve")
    assert measured(model, quantizers, "F32") == {PLAIN: 0.25, STACK: 0.25}
    found = written(model, quantizers, "F32", tmp_path / "model.gguf")
    for tensor in model.tensors:
        np.testing.assert_array_equal(found[tensor.name].reshape(tensor.shape), tensor.load() / 2)


def test_rounding_needs_no_hessian_but_gptq(model, quantizers):
    assert {name: rounding.needs_hessians for name, rounding in ROUNDINGS.items()} == {"rtn": False, "gptq": True}
    assert all(name == rounding.name and rounding.description for name, rounding in ROUNDINGS.items())
    made = {tensor.name: quantizers["gptq"](tensor).quantizer for tensor in model.tensors}
    assert isinstance(made[PLAIN], GptqQuantizer) and made[PLAIN].tile_rows == ROW_TILE
    assert all(isinstance(made[name], RtnQuantizer) and made[name].tile_rows == 1 for name in (STACK, UNSEEN))


def test_squared_norms_are_weighted_by_the_matrix(model, quantizers, weights):
    x = model.by_name[STACK].load()
    quantizer = quantizers["rtn"](model.by_name[STACK])
    for expert in range(3):
        exact = x[expert, :5].astype(np.float64) ** 2 @ weights[STACK][expert]
        np.testing.assert_allclose(quantizer.squared_norms(x[expert, :5], first_row=50 * expert + 10), exact, rtol=1e-5)


def test_costs_carry_sensitivities_in_order(model):
    tensors = [(model.by_name[name], ("Q4_K", "Q8_0")) for name in (UNSEEN, PLAIN)]
    calls = []
    found = measure.measure(
        tensors, TensorQuantizers(), {PLAIN: 0.123456789}, Threads(1), lambda *call: calls.append(call)
    )
    assert [(cost.name, cost.sensitivity) for cost in found] == [(UNSEEN, 0.0), (PLAIN, 0.1234568)]
    assert all(list(cost.errors) == ["Q4_K", "Q8_0"] for cost in found)
    assert calls == [(0, 307 * 256), (7 * 256, 307 * 256), (307 * 256, 307 * 256)]


def test_what_cannot_be_rounded_is_refused(model, quantizers):
    narrow = GptqQuantizer(factor_hessian(np.eye(32)))
    with pytest.raises(GgmlError, match="wanted 256 columns, got 32"):
        narrow.errors(np.zeros((1, 256), np.float32), "Q4_K")
    short = replace(model.tensors[0], shape=(2, 160))
    for rounding in ("rtn", "gptq"):
        with pytest.raises(GgmlError, match="Q4_K needs rows of a multiple of 256 weights, got 160"):
            TensorQuantizers(rounding)(short).quantize(np.zeros((2, 160), np.float32), "Q4_K")


def uneven_rows(kind):
    """Return rows ``(65, 512)`` and column weights of a kind that makes searches differ."""
    rng = np.random.default_rng(1)
    rows, weights = (0.03 * rng.standard_normal((65, 512))).astype("f4"), rng.uniform(0.1, 2, 512).astype("f4")
    if kind == "heavy tails":
        rows = np.clip(rng.standard_t(1, rows.shape), -3e4, 3e4).astype("f4")
    elif kind == "sparse":
        rows[rng.random(rows.shape) < 0.9] = 0
    elif kind == "rows and columns of nothing":
        rows[::3], weights[rng.random(512) < 0.3], weights[:256] = 0, 0, 0
    elif kind == "overflow":
        rows *= 1e7
    elif kind == "underflow":
        rows *= 1e-9
    elif kind == "constant rows":
        rows[:] = rng.standard_normal((65, 1))
    return rows, weights


KINDS = ("normal", "heavy tails", "sparse", "rows and columns of nothing", "overflow", "underflow", "constant rows")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", kernel.variants())
@pytest.mark.parametrize("type_name", sorted(kernel.NEAREST_TYPES - kernel.OWN_SEARCH))
def test_k_quants_to_nearest_have_ggmls_bytes(type_name, variant, kind, monkeypatch):
    monkeypatch.setattr(rtn, "nearest_rows", functools.partial(kernel.nearest_rows, variant=variant))
    rows, weights = uneven_rows(kind)
    expected, quantizer = ggml.quantize(rows, type_name, weights), RtnQuantizer(weights, 65)
    np.testing.assert_array_equal(quantizer.quantize(rows, type_name), expected)
    delta = rows - ggml.dequantize(expected, type_name, 512)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = (weights * np.square(delta.astype("f8"))).sum(axis=1)
    np.testing.assert_allclose(quantizer.errors(rows, type_name), errors, rtol=2e-6)


@pytest.mark.parametrize("kind", ("normal", "heavy tails", "sparse", "rows and columns of nothing"))
def test_q2_0_to_nearest_has_scales_that_fit(kind):
    """ggml takes the largest magnitude of a block for its scale; with the oracle's scales much less is lost."""
    rows, weights = uneven_rows(kind)
    for given in (weights, None):
        quantizer, used = RtnQuantizer(given, 65), np.ones(512, "f4") if given is None else given
        found = ggml.dequantize(quantizer.quantize(rows, "Q2_0"), "Q2_0", 512)
        exact = (used * np.square((rows - found).astype("f8"))).sum(axis=1)
        np.testing.assert_allclose(quantizer.errors(rows, "Q2_0"), exact, rtol=2e-6)
        blocks = gptq_oracle.scaled(rows, "Q2_0", used)
        d = np.where(blocks.d == 0, 1, blocks.d)[..., None]
        wanted = d * np.clip(np.rint(rows.reshape(65, 8, 64) / d), -1, 2) * (blocks.d != 0)[..., None]
        by_oracle = (used * np.square((rows - wanted.reshape(65, 512)).astype("f8"))).sum(axis=1)
        np.testing.assert_allclose(exact, by_oracle, rtol=1e-2, atol=1e-6 * by_oracle.max())
        theirs = rows - ggml.dequantize(ggml.quantize(rows, "Q2_0"), "Q2_0", 512)
        assert exact.sum() < 0.6 * (used * np.square(theirs.astype("f8"))).sum()


def test_k_quants_to_nearest_refuse_rows_of_other_lengths():
    quantizer = RtnQuantizer(np.ones(160, "f4"), 2)
    for act in (quantizer.quantize, quantizer.errors):
        with pytest.raises(GgmlError, match=r"^Q4_K needs rows of a multiple of 256 weights, got 160$"):
            act(np.ones((2, 160), "f4"), "Q4_K")


@pytest.mark.parametrize("n_cols", [1, 96, 300])
def test_files_hold_triangles(tmp_path, n_cols):
    """Hessians and factors come back as they were, from files of half their size."""
    x = np.random.default_rng(n_cols).standard_normal((2 * n_cols, n_cols)).astype("f4")
    hessian = x.T @ x
    hessian = (hessian + hessian.T) / 2
    files, factors = HessianFiles(tmp_path), FactorStore(tmp_path)
    files.add((PLAIN,), hessian)
    ((names, file),) = files.take()
    assert names == (PLAIN,) and file.path.stat().st_size == 128 + 2 * n_cols * (n_cols + 1)
    np.testing.assert_array_equal(file.read(), hessian)
    factors.add([PLAIN], hessian, 0.05)
    found, made = factors.of(PLAIN), factor_hessian(hessian, shrinkage=0.05)
    for name in ("upper", "variances", "diagonal", "order"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
