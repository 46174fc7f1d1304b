"""ggml through ctypes. gguf-py's numpy code is the oracle here; llama.cpp's own quantizer is in test_write."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from llama_quantize import extreme_rows

from nsds_gguf.errors import GgmlError
from nsds_gguf.llamacpp import ggml

# Bits per weight by hand: (payload + scales) over the block, as in the comments of ggml-common.h.
BITS = {
    "F32": 32, "F16": 16, "BF16": 16,
    "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625,
    "Q4_0": 4.5, "IQ4_NL": 4.5, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_0": 2.25,
}  # fmt: skip

# Numbers of enum llama_ftype in llama.h.
FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32,
    "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
    "Q4_0": 2, "IQ4_NL": 25, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_0": 41,
}  # fmt: skip

# Where ggml's quantizer takes column weights. For Q2_0 it does not, but ours does.
WEIGH_COLUMNS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "IQ4_NL", "Q5_0", "Q5_1")

# Where gguf-py has a quantizer of its own; it rounds as ggml's reference does.
NUMPY_QUANTIZERS = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0")


def random_rows(n_rows: int = 5, n_cols: int = 512, seed: int = 0) -> np.ndarray:
    """Return rows with uneven channels, as trained matrices have."""
    rng = np.random.default_rng(seed)
    gains = np.exp(rng.standard_normal(n_cols))
    return (rng.standard_normal((n_rows, n_cols)) * gains).astype(np.float32)


def test_the_types_are_those_counted_here():
    assert list(ggml.TYPES) == list(BITS)
    assert {name: int(row.file_type) for name, row in ggml.TYPES.items()} == FILE_TYPES
    assert tuple(name for name, row in ggml.TYPES.items() if row.weighs_columns) == (*WEIGH_COLUMNS, "Q2_0")
    assert {name for name, row in ggml.TYPES.items() if not row.is_fast} == {
        "F32", "F16", "BF16", "Q3_K", "Q5_0", "Q5_1", "Q2_0"
    }  # fmt: skip
    assert (tuple(BITS)[:3], tuple(BITS)[3:8]) == (ggml.FLOAT_TYPES, ggml.K_TYPES)
    assert tuple(BITS)[8:-1] == ggml.NARROW_TYPES


@pytest.mark.parametrize("name", ggml.K_TYPES)
def test_a_fallback_has_narrow_blocks_and_no_fewer_bits(name):
    fallback = ggml.TYPES[name].fallback
    assert fallback in ggml.NARROW_TYPES and ggml.bits_per_weight(fallback) >= ggml.bits_per_weight(name)


@pytest.mark.parametrize("name", ggml.TYPES)
def test_bits_per_weight(name):
    assert ggml.bits_per_weight(name) == BITS[name]
    assert ggml.row_bytes(name, 768) == 768 * BITS[name] / 8


@pytest.mark.parametrize("name", ggml.TYPES)
def test_rows_must_be_whole_blocks(name):
    n_weights = {"F32": 1, "F16": 1, "BF16": 1, "Q2_0": 64}.get(name, 256 if name in ggml.K_TYPES else 32)
    assert ggml.fits(name, 3 * n_weights)
    if n_weights > 1:
        assert not ggml.fits(name, 3 * n_weights - 1)
        with pytest.raises(GgmlError, match=f"^{name} needs rows of a multiple of {n_weights} weights, got 17$"):
            ggml.quantize(np.zeros((1, 17), np.float32), name)


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("name", ggml.TYPES)
def test_dequantize_is_what_gguf_py_computes(name, with_importance):
    rows = random_rows()
    importance = np.random.default_rng(1).gamma(1, 1, rows.shape[1]).astype(np.float32) if with_importance else None
    data = ggml.quantize(rows, name, importance)
    assert data.shape == (len(rows), ggml.row_bytes(name, rows.shape[1]))
    if name == "Q2_0":  # gguf does not have it yet: two bits a weight, from the lowest, minus 1
        d = data.reshape(-1, 18)[:, :2].copy().view("<f2").astype(np.float32)
        oracle = d * ((data.reshape(-1, 18)[:, 2:, None] >> np.arange(0, 8, 2)) & 3).reshape(-1, 64).astype("f4") - d
    else:
        oracle = gguf.quants.dequantize(data, GGMLQuantizationType[name])
    oracle = oracle.reshape(rows.shape)
    np.testing.assert_allclose(ggml.dequantize(data, name, rows.shape[1]), oracle, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NUMPY_QUANTIZERS)
def test_quantize_is_what_gguf_py_computes(name):
    rows = random_rows()
    assert np.array_equal(ggml.quantize(rows, name), gguf.quants.quantize(rows, GGMLQuantizationType[name]).view("u1"))


@pytest.mark.parametrize("name", ggml.TYPES)
def test_error_shrinks_with_the_bits(name):
    """Uniform weights and n bits leave about 4 ** -n of their energy as error; blocks and scales move that little."""
    rows = np.random.default_rng(3).uniform(-1, 1, (16, 512)).astype(np.float32)
    found = ggml.dequantize(ggml.quantize(rows, name), name, 512)
    error = float(((found - rows) ** 2).sum() / (rows**2).sum())
    payload_bits = {"F32": 24, "F16": 12, "BF16": 9, "IQ4_NL": 4}.get(name) or int(name[1])
    assert error <= 4.0 ** (1 - payload_bits)


@pytest.mark.parametrize("name", WEIGH_COLUMNS)
def test_importance_moves_error_away_from_important_columns(name):
    rows = random_rows(n_rows=64)
    importance = np.full(512, 0.01, np.float32)
    importance[::8] = 10.0

    def error(data: np.ndarray) -> float:
        return float(((ggml.dequantize(data, name, 512) - rows) ** 2)[:, ::8].sum())

    assert error(ggml.quantize(rows, name, importance)) < 0.9 * error(ggml.quantize(rows, name))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_importance_does_not_matter_where_rounding_is_to_nearest(name):
    rows = random_rows()
    importance = np.linspace(0.1, 2, 512, dtype=np.float32)
    assert np.array_equal(ggml.quantize(rows, name, importance), ggml.quantize(rows, name))


@pytest.mark.parametrize("name", ggml.TYPES)
def test_bytes_do_not_depend_on_slabs_or_threads(name):
    rows, importance = random_rows(n_rows=33), np.linspace(0.1, 2, 512, dtype=np.float32)
    whole = ggml.quantize(rows, name, importance)
    edges = [0, 1, 8, 15, 32, 33]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ggml.quantize, rows[a:b], name, importance) for a, b in itertools.pairwise(edges)]
        assert np.array_equal(np.concatenate([job.result() for job in jobs]), whole)


def test_rows_of_any_layout_are_taken():
    rows = random_rows(n_rows=6)
    assert np.array_equal(ggml.quantize(rows[::2], "Q4_K"), ggml.quantize(rows, "Q4_K")[::2])
    wide = ggml.quantize(rows.astype(np.float64), "Q4_K")
    assert np.array_equal(wide, ggml.quantize(rows, "Q4_K"))
    strided = np.repeat(wide, 2, axis=0)[::2]
    assert np.array_equal(ggml.dequantize(strided, "Q4_K", 512), ggml.dequantize(wide, "Q4_K", 512))


def test_importance_of_another_length_is_refused():
    with pytest.raises(GgmlError, match=r"^importance: wanted 512 columns, got shape \(511,\)$"):
        ggml.quantize(random_rows(), "Q4_K", np.ones(511, np.float32))


def test_data_of_another_length_is_refused():
    with pytest.raises(GgmlError, match=r"^Q4_K: wanted rows of 288 bytes, got 289$"):
        ggml.dequantize(np.zeros((2, 289), np.uint8), "Q4_K", 512)


@pytest.mark.parametrize("name", ggml.TYPES)
def test_extreme_rows_survive(name):
    """Zeros stay zero, an outlier stays within a step of itself, and nothing becomes infinite."""
    rows = extreme_rows(512)
    found = ggml.dequantize(ggml.quantize(rows, name), name, 512)
    assert np.isfinite(found).all()
    assert not found[0].any()
    at = np.abs(rows).argmax(axis=1)
    largest, kept = np.take_along_axis(rows, at[:, None], 1), np.take_along_axis(found, at[:, None], 1)
    normal = np.abs(largest) > 1e-2  # smaller ones may vanish in float16 scales
    assert (np.abs(kept - largest)[normal] <= 0.5 * np.abs(largest)[normal]).all()


def test_version_names_a_release_and_a_commit():
    number, commit = ggml.version().split("-", 1)
    assert [part.isdigit() for part in number.split(".")] == [True, True, True]
    assert commit


def test_missing_library(monkeypatch, fresh_library):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GgmlError, match=r"^llama-cpp-python is not installed; run: pip install llama-cpp-python$"):
        ggml.version()


def test_library_of_another_kind(monkeypatch, fresh_library):
    monkeypatch.setattr(ggml, "library_path", lambda: Path(np._core._multiarray_umath.__file__))
    with pytest.raises(GgmlError, match=r"has no ggml_quantize_chunk, .*; upgrade llama-cpp-python$"):
        ggml.version()


def test_damaged_library(monkeypatch, fresh_library, tmp_path):
    file = tmp_path / "libggml-base.so"
    file.write_bytes(b"not a library")
    monkeypatch.setattr(ggml, "library_path", lambda: file)
    with pytest.raises(GgmlError, match=r"libggml-base.so: cannot be loaded: .*; reinstall llama-cpp-python$"):
        ggml.version()


def test_library_with_other_types(monkeypatch, fresh_library):
    monkeypatch.setattr(ggml, "block", lambda name: (256, 1))
    with pytest.raises(GgmlError, match=r"type F32: wanted \(256, 1\) weights and bytes a block, got \('F32', 1, 4\)$"):
        ggml.version()


@pytest.fixture
def fresh_library():
    """Forget the loaded library before and after, so that a test can break it."""
    for cached in (ggml.open_library, ggml._traits):
        cached.cache_clear()
    yield
    for cached in (ggml.open_library, ggml._traits):
        cached.cache_clear()
