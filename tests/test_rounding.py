"""GPTQ rounding: the codec against ggml, rounding against a naive loop and ggml's own error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import gptq_oracle
import numpy as np
import pytest

from nsds_gguf.errors import GgmlError, ModelError
from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize import formats, kernel
from nsds_gguf.quantize.cholesky import cholesky
from nsds_gguf.quantize.formats import FORMATS
from nsds_gguf.quantize.gptq import GptqQuantizer
from nsds_gguf.quantize.hessian_factors import HessianFactors, factor_hessian, rounding_order
from nsds_gguf.system.resources import blas_threads


@pytest.fixture(autouse=True)
def one_blas_thread():
    with blas_threads(1):
        yield


COVERED_TYPES = tuple(FORMATS)


def quantize(rows, type_name, factors, first_row=0, n_descents=1):
    return GptqQuantizer(factors, n_descents).quantize(rows, type_name, first_row)


def random_rows(n_rows=20, n_cols=512, seed=0):
    """Return rows with uneven channels, as trained matrices have."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n_rows, n_cols)) * np.exp(rng.standard_normal(n_cols) / 2)).astype(np.float32)


def random_hessian(n_cols=512, rank=None, seed=1):
    """Return the second moment of correlated inputs; of ``rank`` tokens, if that is given."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n_cols, n_cols)) * np.exp(rng.standard_normal(n_cols)) ** 2
    inputs = rng.standard_normal((rank or 4 * n_cols, n_cols)) @ mixing.T / n_cols
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def weighted_errors(data, rows, type_name, hessian):
    """Return e^T H e of every row, in float64."""
    errors = rows.astype(np.float64) - ggml.dequantize(data, type_name, rows.shape[1])
    return np.einsum("ri,ij,rj->r", errors, hessian.astype(np.float64), errors)


def with_finite_scales(data, type_name):
    """Return random blocks with scales that are numbers: NaN has more than one form."""
    blocks = data.reshape(-1, ggml.block(type_name)[1]).copy()
    scale = np.random.default_rng(5).standard_normal((len(blocks), 2)).astype("<f2").view(np.uint8)
    starts = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q5_1": (0, 2)}
    for i, start in enumerate(starts.get(type_name, (0,))):
        blocks[:, start : start + 2] = scale[:, 2 * i : 2 * i + 2]
    return blocks.reshape(data.shape)


def test_types_covered_are_all_that_are_quantized():
    assert set(COVERED_TYPES) == set(ggml.TYPES) - set(ggml.FLOAT_TYPES)


@pytest.mark.parametrize("source", ["ggml", "random bytes"])
@pytest.mark.parametrize("name", COVERED_TYPES)
def test_codec_is_ggmls_bit_for_bit(name, source):
    data = ggml.quantize(random_rows(), name)
    if source == "random bytes":
        data = with_finite_scales(np.random.default_rng(4).integers(0, 256, data.shape, dtype=np.uint8), name)
    format = FORMATS[name]
    blocks = format.unpack(data)
    assert np.array_equal(format.pack(blocks), data)
    assert np.array_equal(format.dequantize(blocks).view(np.int32), ggml.dequantize(data, name, 512).view(np.int32))
    assert blocks.codes.shape == (20, 512 // format.block, format.block // format.sub, format.sub)
    assert blocks.codes.max() < len(format.levels)
    assert (format.block, format.block_bytes) == ggml.block(name)


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_levels_are_the_nearest(name):
    levels = FORMATS[name].levels
    x = np.random.default_rng(0).uniform(1.2 * levels[0] - 1, 1.2 * levels[-1], 5000).astype(np.float32)
    values = x.copy()
    codes = gptq_oracle.to_levels(FORMATS[name], values)
    assert np.array_equal(values, levels[codes])
    nearest = np.abs(x[:, None].astype(np.float64) - levels).min(axis=1)
    np.testing.assert_allclose(np.abs(x - values), nearest, atol=1e-4)


def compare(rows, name, factors, n_descents, variant=""):
    """Return the blocks of the compiled loop and of the oracle, and their errors."""
    ours, errors = kernel.round_rows(rows, name, factors, n_descents, variant)
    with np.errstate(over="ignore", invalid="ignore"):
        oracle = gptq_oracle.round_rows(rows, name, factors, n_descents)
        measured = factors.row_errors(rows - FORMATS[name].dequantize(oracle))
    return ours, errors, oracle, measured


def damped(hessian):
    """Return a Hessian after shrinkage and damping as ``factor_hessian`` has by default, in float64."""
    found = 0.95 * hessian.astype(np.float64)
    np.fill_diagonal(found, hessian.diagonal() + 1e-3 * hessian.diagonal().mean())
    return found


FIELDS = ("codes", "s", "m", "d", "dmin")


@pytest.mark.parametrize("variant", kernel.variants())
@pytest.mark.parametrize("name", COVERED_TYPES)
def test_scales_are_ggmls_bit_for_bit_where_columns_do_not_mix(name, variant):
    """With U the identity, targets are the weights, whose scales ggml's quantizer finds with the variances.

    ggml does not search for the scales of Q2_0: those are the oracle's.
    """
    rows, variances = random_rows(70), np.random.default_rng(6).gamma(1, 1, 512).astype(np.float32)
    rows[3] = 0
    rows[4, 100:400] = 0
    rows[5] *= 1e-30
    rows[6] *= 1e8  # its scales are infinite, and so are errors to the right of its first block
    rows[7] = 1
    factors = HessianFactors(np.eye(512, dtype=np.float32), variances, variances, np.arange(512))
    ours, _ = kernel.round_rows(rows, name, factors, 0, variant)
    n = FORMATS[name].block
    theirs = formats.joined([
        gptq_oracle.scaled(np.ascontiguousarray(rows[:, i : i + n]), name, variances[i : i + n])
        for i in range(0, 512, n)
    ])  # fmt: skip
    for field in ("s", "m", "d", "dmin"):
        found, wanted = getattr(ours, field), getattr(theirs, field)
        np.testing.assert_array_equal(np.delete(found, 6, axis=0), np.delete(wanted, 6, axis=0))
        np.testing.assert_array_equal(found[6, 0], wanted[6, 0])


@pytest.mark.parametrize("n_descents", [0, 1, 2])
@pytest.mark.parametrize("name", COVERED_TYPES)
def test_the_compiled_loop_rounds_as_the_oracle(name, n_descents):
    """Sums have another order: a code next to a tie falls otherwise now and then, and those after it follow."""
    factors = factor_hessian(random_hessian())
    ours, errors, oracle, measured = compare(random_rows(150), name, factors, n_descents)
    assert errors.sum() == pytest.approx(measured.sum(), rel=2e-3)
    rows_apart = (ours.codes != oracle.codes).reshape(150, -1).any(axis=1)
    assert rows_apart.mean() < 0.25
    np.testing.assert_allclose(errors[~rows_apart], measured[~rows_apart], rtol=5e-3)
    assert (ours.codes != oracle.codes).mean() < 0.01
    assert all(getattr(ours, field).dtype == getattr(oracle, field).dtype for field in FIELDS)


def test_columns_with_large_inputs_are_rounded_first():
    diagonal = np.ones(64, np.float32)
    diagonal[[3, 20, 40, 50]] = 2, 4, 3, 30
    found = rounding_order(diagonal)
    assert list(found[:18]) == [50, 48, 49, *range(51, 64), 40, 32]  # the second block, its second half
    assert list(found[32:50]) == [20, *range(16, 20), *range(21, 32), 3, 0]


@pytest.mark.parametrize("n_cols", [16, 96, 160, 512, 1000, 1280])
def test_the_order_is_that_of_the_definition(n_cols):
    rng = np.random.default_rng(n_cols)
    for diagonal in (rng.gamma(0.3, 1, n_cols), rng.integers(0, 3, n_cols) * 0.5, np.zeros(n_cols)):
        assert list(rounding_order(diagonal)) == gptq_oracle.order_of(list(range(n_cols)), diagonal)


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_moving_columns_moves_their_weights(name):
    order = rounding_order(np.random.default_rng(8).gamma(0.3, 1, 768))
    blocks = FORMATS[name].unpack(ggml.quantize(random_rows(3, 768), name))
    moved = FORMATS[name].dequantize(blocks.reordered(order))
    np.testing.assert_array_equal(moved[:, order], FORMATS[name].dequantize(blocks))
    assert not np.array_equal(moved, moved[:, order])


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_the_order_lowers_the_error(name):
    rows, widths = random_rows(100, 768), np.exp(np.random.default_rng(2).standard_normal(768))
    hessian = random_hessian(768) * np.outer(widths, widths)
    factors, identity = factor_hessian(hessian), np.arange(768)
    lower = np.linalg.cholesky(damped(hessian)[::-1, ::-1])[::-1, ::-1]
    pivots = lower.diagonal()
    plain = HessianFactors(
        (lower / pivots).astype(np.float32), np.square(pivots).astype(np.float32), factors.diagonal, identity
    )
    np.testing.assert_allclose(plain.row_errors(rows), factors.row_errors(rows), rtol=1e-4)
    ours, theirs = (kernel.round_rows(rows, name, each, 1)[1].sum() for each in (factors, plain))
    assert ours < 0.99 * theirs


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_errors_are_those_of_the_bytes(name):
    rows, factors = random_rows(70), factor_hessian(random_hessian())
    quantizer = GptqQuantizer(factors)
    written = ggml.dequantize(quantizer.quantize(rows, name), name, 512)
    np.testing.assert_allclose(quantizer.errors(rows, name), factors.row_errors(rows - written), rtol=1e-4)


@pytest.mark.parametrize("variant", kernel.variants())
@pytest.mark.parametrize("name", COVERED_TYPES)
def test_a_row_does_not_depend_on_the_others(name, variant):
    """Nor on its place, and not on rows whose scales are infinite."""
    rows, factors = random_rows(135), factor_hessian(random_hessian())
    rows[70] *= 1e20
    whole, errors = kernel.round_rows(rows, name, factors, 1, variant)
    for first, last in ((0, 1), (17, 18), (60, 70), (71, 135)):
        part, some = kernel.round_rows(rows[first:last], name, factors, 1, variant)
        np.testing.assert_array_equal(some, errors[first:last])
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[first:last])


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_instruction_sets_agree(name):
    rows, factors = random_rows(200), factor_hessian(random_hessian())
    found = [kernel.round_rows(rows, name, factors, 1, variant)[1].sum() for variant in kernel.variants()]
    assert found == pytest.approx([found[0]] * len(found), rel=2e-3)


def test_the_compiled_loop_refuses_arrays_that_do_not_match():
    factors = factor_hessian(random_hessian())
    with pytest.raises(ValueError, match=r"^wanted factors of 256 columns, got 512$"):
        kernel.round_rows(random_rows(2, 256), "Q4_K", factors, 1)
    with pytest.raises(ValueError, match=r"^arrays of rows, columns and results have sizes that do not match$"):
        kernel.round_rows(random_rows(2), "Q4_K", replace(factors, upper=factors.upper[:256]), 1)
    with pytest.raises(ValueError, match=r"^no variant sse9 for this processor$"):
        kernel.round_rows(random_rows(2), "Q4_K", factors, 1, "sse9")


def best_targets(row, rounded, hessian):
    """Return what columns right of those rounded should be: where e^T H e is least when they are free, in float64."""
    n = len(rounded)
    wrong = row[:n] - rounded
    return row[n:] + np.linalg.solve(hessian[n:, n:], hessian[n:, :n] @ wrong)


@pytest.mark.parametrize("name", ["Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K"])
@pytest.mark.parametrize("loop", ["compiled", "oracle"])
def test_gptq_rounds_what_a_naive_loop_finds_best(loop, name, monkeypatch):
    """Column after column by the definition, given what was rounded before; blocks too see the best targets."""
    format = FORMATS[name]
    n_cols = 2 * format.block
    rows, hessian = random_rows(2, n_cols), random_hessian(n_cols).astype(np.float64)
    hessian += np.eye(n_cols) * 0.1 * hessian.diagonal().mean()
    factors = factor_hessian(hessian, shrinkage=0, damping=0)
    seen = {}

    def quantize(targets, type_name, variances):
        seen[len(seen) * format.block] = targets
        return ggml.quantize(targets, type_name, variances)

    monkeypatch.setattr(gptq_oracle, "ggml", SimpleNamespace(quantize=quantize))
    if loop == "compiled":
        found, _ = kernel.round_rows(rows, name, factors, 0)
    else:
        found = gptq_oracle.round_rows(rows, name, factors, 0)
        assert list(seen) == [0, format.block]
    order = factors.order
    rounded, hessian = format.dequantize(found).astype(np.float64)[:, order], hessian[np.ix_(order, order)]
    for r, row in enumerate(rows[:, order].astype(np.float64)):
        for start in (0, format.block):
            scale, offset = (
                np.repeat(x[r].ravel(), format.sub)[order[start:]].astype(np.float64)
                for x in (found.scale, found.offset)
            )
            targets = best_targets(row, rounded[r, :start], hessian)[: format.block]
            if loop == "oracle":
                np.testing.assert_allclose(seen[start][r], targets, atol=1e-4 * np.abs(row).max())
            for j in range(format.block):
                target = best_targets(row, rounded[r, : start + j], hessian)[0]
                distances = np.abs(scale[j] * format.levels - offset[j] - target)
                taken = distances[found.codes.reshape(2, n_cols)[r, order[start + j]]]
                assert taken <= distances.min() + 1e-4 * np.abs(row).max()


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_row_errors_are_the_quadratic_form(name):
    hessian, errors = random_hessian(), random_rows(seed=3)
    factors = factor_hessian(hessian, damping=0.01, shrinkage=0.25)
    damped = 0.75 * hessian.astype(np.float64)
    np.fill_diagonal(damped, hessian.diagonal() + 0.01 * hessian.diagonal().mean())
    np.testing.assert_allclose(factors.row_errors(errors), np.einsum("ri,ij,rj->r", errors, damped, errors), rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 40])
@pytest.mark.parametrize("name", COVERED_TYPES)
def test_gptq_is_better_than_ggml_in_every_row(name, rank):
    rows, hessian = random_rows(), random_hessian(rank=rank)
    factors = factor_hessian(hessian, shrinkage=0, damping=0.01)
    damped = hessian + np.eye(512) * 0.01 * hessian.diagonal().mean()
    plain = weighted_errors(ggml.quantize(rows, name, factors.diagonal), rows, name, damped)
    ours = weighted_errors(quantize(rows, name, factors), rows, name, damped)
    assert (ours <= plain * 1.0001).all()
    assert ours.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_descent_lowers_the_error_in_sum(name):
    rows, hessian = random_rows(), random_hessian()
    factors = factor_hessian(hessian)
    without, once = (
        factors.row_errors(rows - ggml.dequantize(quantize(rows, name, factors, n_descents=n), name, 512))
        for n in (0, 1)
    )
    assert once.sum() < without.sum() * (1 if name in ggml.K_TYPES else 1.01)


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "IQ4_NL"])
def test_bytes_do_not_depend_on_slabs_or_threads(name):
    rows, factors = random_rows(700), factor_hessian(random_hessian())
    whole = quantize(rows, name, factors)
    cuts = [0, 1, 130, 386, 387, 700]

    def part(i):
        return quantize(rows[cuts[i] : cuts[i + 1]], name, factors, first_row=cuts[i])

    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(part, range(5)))
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_dead_columns(name):
    """Columns that no input uses may become anything; the others must not suffer."""
    rows, hessian = random_rows(), random_hessian()
    dead = np.arange(512) % 3 == 0
    hessian[dead] = hessian[:, dead] = 0
    found = ggml.dequantize(quantize(rows, name, factor_hessian(hessian)), name, 512)
    assert np.isfinite(found).all()
    plain = ggml.quantize(rows, name, hessian.diagonal() + 1e-3 * hessian.diagonal().mean())
    errors = rows.astype(np.float64) - found
    ours = np.einsum("ri,ij,rj->r", errors, hessian, errors)
    assert ours.sum() < weighted_errors(plain, rows, name, hessian).sum()


@pytest.mark.parametrize("name", COVERED_TYPES)
def test_rows_of_zeros_and_huge_weights(name):
    rows = random_rows(6)
    rows[0] = 0
    rows[1, :256] = 0
    rows[2] *= 1e10  # no float16 scale reaches it: infinite, as ggml's own, which the writer refuses
    rows[3] *= 1e-30
    rows[4] = 1
    found = ggml.dequantize(quantize(rows, name, factor_hessian(random_hessian())), name, 512)
    assert np.isfinite(found[[0, 1, 3, 4, 5]]).all()
    assert not np.isfinite(found[2]).all()
    assert (found[0] == 0).all()


@pytest.mark.parametrize("n", [3, 512, 1300])
def test_cholesky_is_lapacks_in_any_number_of_threads(n):
    x = np.random.default_rng(n).standard_normal((n, n))
    matrix = x @ x.T / n + 0.1 * np.eye(n)
    one, three = matrix.copy(), matrix.copy()
    assert cholesky(one, 1) == cholesky(three, 3) == 0
    np.testing.assert_array_equal(one, three)
    np.testing.assert_allclose(one, np.linalg.cholesky(matrix), rtol=0, atol=1e-13)


@pytest.mark.parametrize("column", [1, 600, 1300])
def test_cholesky_names_the_column(column):
    matrix = np.eye(1300)
    matrix[column - 1, column - 1] = -1
    assert cholesky(matrix, 2) == column


def test_refusals():
    rows, hessian = random_rows(2), random_hessian()
    with pytest.raises(GgmlError, match=r"^cannot quantize to Q9; wanted one of F32, F16"):
        quantize(rows, "Q9", factor_hessian(hessian))
    with pytest.raises(GgmlError, match=r"^Q4_K needs rows of a multiple of 256 weights, got 160$"):
        quantize(rows[:, :160], "Q4_K", factor_hessian(hessian[:160, :160]))
    with pytest.raises(GgmlError, match=r"^Hessian factors: wanted 256 columns, got 512$"):
        quantize(rows[:, :256], "Q4_K", factor_hessian(hessian))
    with pytest.raises(ModelError, match=r"^Hessian: wanted finite numbers and a positive diagonal, got a diagonal of"):
        factor_hessian(np.zeros((4, 4)))
    with pytest.raises(ModelError, match=r"^Hessian: wanted finite numbers"):
        factor_hessian(np.full((4, 4), np.nan))
    with pytest.raises(ModelError, match=r"^Hessian: not positive definite with shrinkage 0 and damping 0 \(column"):
        factor_hessian(np.array([[1.0, 2.0], [2.0, 1.0]]), shrinkage=0, damping=0)


def test_joining():
    whole = FORMATS["Q4_K"].unpack(ggml.quantize(random_rows(), "Q4_K"))
    parts = [FORMATS["Q4_K"].unpack(ggml.quantize(random_rows()[:, i : i + 256], "Q4_K")) for i in (0, 256)]
    joined = formats.joined(parts)
    assert all(np.array_equal(getattr(joined, key), getattr(whole, key)) for key in ("codes", "s", "m", "d", "dmin"))
