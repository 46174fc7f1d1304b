from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import nsds_oracle
import numpy as np
import pytest
from models import make_model
from recipes import recipe

from nsds_gguf.errors import ModelError, PlanError
from nsds_gguf.metrics import METRICS, SE_READINGS, baselines, nsds, score_layers, stats
from nsds_gguf.records import Hparams, Model, Scores
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

TOLERANCE = 1e-4
N_LAYERS = 5


@dataclass(frozen=True)
class Shape:
    """Dimensions of a random model, and what is special about it."""

    d: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int = 64
    decay: float = 0.85  # ratio of successive singular values
    n_strong: int = 0  # that many leading ones are 20 times as large
    tied: bool = False
    gate: bool = True

    @property
    def hparams(self) -> Hparams:
        return Hparams(
            N_LAYERS, self.d, self.n_ff, self.n_heads, self.n_kv_heads, self.head_dim, self.n_vocab, 64, 1e-5
        )


SHAPES = {
    "mha": Shape(d=32, n_ff=48, n_heads=4, n_kv_heads=4, head_dim=8),
    "gqa 2, tied": Shape(d=32, n_ff=48, n_heads=4, n_kv_heads=2, head_dim=8, tied=True),
    "gqa 4, heads wider than the stream": Shape(d=24, n_ff=40, n_heads=8, n_kv_heads=2, head_dim=16),
    "head_dim above d": Shape(d=12, n_ff=20, n_heads=2, n_kv_heads=1, head_dim=16),
    "mqa, n_ff below d": Shape(d=36, n_ff=20, n_heads=4, n_kv_heads=1, head_dim=6),
    "vocabulary below d": Shape(d=40, n_ff=64, n_heads=2, n_kv_heads=2, head_dim=10, n_vocab=17),
    "no gate": Shape(d=32, n_ff=64, n_heads=4, n_kv_heads=2, head_dim=8, gate=False),
    "two triplets": Shape(d=32, n_ff=48, n_heads=4, n_kv_heads=2, head_dim=8, decay=0.05),
    "dense spectrum below a strong direction": Shape(48, 64, 4, 2, 12, decay=0.99, n_strong=1),
}


def sigma_of(shape: Shape, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return singular values with a gap between any two, the 99 % cut included, scaled at random."""
    sigma = shape.decay ** np.arange(n) * rng.uniform(0.5, 2.0)
    sigma[: shape.n_strong] *= 20
    return sigma


def vectors(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    """Return k orthonormal columns with heavy tails (and a few without)."""
    return np.linalg.qr(rng.standard_t(2.5, (d, k)) + rng.uniform(-1, 1, (d, k)))[0]


def gapped(shape: Shape, rng: np.random.Generator, n_rows: int, n_cols: int) -> np.ndarray:
    n = min(n_rows, n_cols)
    return (vectors(rng, n_rows, n) * sigma_of(shape, n, rng)) @ vectors(rng, n_cols, n).T


def gapped_factors(shape: Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n_heads, head_dim, d) and (n_kv_heads, head_dim, d) factors of head products with gaps."""
    n = min(shape.d, shape.head_dim)
    outer, inner = [], []
    for _ in range(shape.n_kv_heads):
        basis = vectors(rng, shape.head_dim, n)  # what the product of the factors does not see
        sigma = sigma_of(shape, n, rng)
        inner.append(basis * np.sqrt(sigma) @ vectors(rng, shape.d, n).T)
        for _ in range(shape.n_heads // shape.n_kv_heads):
            outer.append(basis * (np.sqrt(sigma) * rng.uniform(0.98, 1.02)) @ vectors(rng, shape.d, n).T)
    return np.array(outer), np.array(inner)


def random_layer(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    q, k = gapped_factors(shape, rng)
    o, v = gapped_factors(shape, rng)
    layer = {
        "attn_q": q.reshape(-1, shape.d),
        "attn_k": k.reshape(-1, shape.d),
        "attn_v": v.reshape(-1, shape.d),
        "attn_output": o.reshape(-1, shape.d).T,
        "ffn_gate": gapped(shape, rng, shape.n_ff, shape.d),
        "ffn_up": gapped(shape, rng, shape.n_ff, shape.d),
        "ffn_down": gapped(shape, rng, shape.d, shape.n_ff),
    }
    if not shape.gate:
        del layer["ffn_gate"]
    return {role: array.astype(np.float32) for role, array in layer.items()}


def random_layers(shape: Shape, seed: int = 0) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Return the layers' arrays by role and the unembedding."""
    rng = np.random.default_rng(seed)
    layers = [random_layer(shape, rng) for _ in range(N_LAYERS)]
    return layers, gapped(shape, rng, shape.n_vocab, shape.d).astype(np.float32)


def model_of(shape: Shape, layers: list[dict[str, np.ndarray]], unembedding: np.ndarray) -> Model:
    arrays = {"token_embd.weight": unembedding if shape.tied else np.ones_like(unembedding)}
    if not shape.tied:
        arrays["output.weight"] = unembedding
    for index, layer in enumerate(layers):
        arrays |= {f"blk.{index}.{role}.weight": array for role, array in layer.items()}
        arrays[f"blk.{index}.attn_norm.weight"] = np.ones(shape.d)
        arrays[f"blk.{index}.attn_q.bias"] = np.ones(shape.n_heads * shape.head_dim)
    return make_model(arrays, shape.hparams)


def plain_layers(seed: int = 0) -> tuple[Shape, list[dict[str, np.ndarray]], np.ndarray]:
    """Return a small model whose weights are normal deviates of standard deviation 0.5."""
    shape, rng = SHAPES["gqa 2, tied"], np.random.default_rng(seed)
    layers, unembedding = random_layers(shape)
    normal = [{role: rng.normal(0, 0.5, w.shape).astype(np.float32) for role, w in layer.items()} for layer in layers]
    return shape, normal, unembedding


def close(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= TOLERANCE * max(1.0, abs(wanted))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles and slabs so small that tests' matrices have several, and a last one that is not full."""
    monkeypatch.setattr(stats, "TILE_ENTRIES", 7 * 24)
    monkeypatch.setattr(nsds, "GRAM_ENTRIES", 11 * 24)
    monkeypatch.setattr(nsds, "SLAB_BYTES", 4 * 7 * 24)


# --- against the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("se", SE_READINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_nsds_value_is_that_of_naive_float64_full_svds(name: str, se: str, small_tiles: None) -> None:
    shape = SHAPES[name]
    layers, unembedding = random_layers(shape)
    wanted = nsds_oracle.nsds(layers, unembedding, shape.n_heads, shape.n_kv_heads, shape.head_dim, se)
    scores, _ = score_layers(model_of(shape, layers, unembedding), "nsds", se)
    assert len(scores) == len(wanted)
    for index, (layer, want) in enumerate(zip(scores, wanted, strict=True)):
        assert layer.layer == index
        assert set(layer.nv) == set(layer.se) == set(want["nv"])
        off = {
            (kind, component): (getattr(layer, kind)[component], value)
            for kind in ("nv", "se")
            for component, value in want[kind].items()
            if not close(getattr(layer, kind)[component], value)
        }
        off |= {
            (kind, ""): (getattr(layer, kind), want[kind])
            for kind in ("p_nv", "p_se", "score")
            if not close(getattr(layer, kind), want[kind])
        }
        assert not off


@pytest.mark.parametrize("metric", nsds_oracle.BASELINES)
@pytest.mark.parametrize("name", ["mqa, n_ff below d", "no gate"])
def test_every_baseline_value_is_that_of_the_formula(name: str, metric: str, small_tiles: None) -> None:
    layers, unembedding = random_layers(SHAPES[name])
    scores, _ = score_layers(model_of(SHAPES[name], layers, unembedding), metric)
    wanted = nsds_oracle.BASELINES[metric](layers)
    assert [layer.score for layer in scores] == pytest.approx(wanted, rel=1e-6)


# --- by hand --------------------------------------------------------------------------------------------------


def test_kurtosis_of_tiny_vectors() -> None:
    bernoulli, signs = np.array([0.0, 0, 0, 1]), np.array([1.0, -1, 1, -1])  # p = 1/4: (1 - 6 pq) / pq
    assert stats.matrix_kurtosis(bernoulli[None]) == pytest.approx(-2 / 3)
    assert stats.column_kurtosis(np.stack([bernoulli, signs], axis=1)) == pytest.approx([-2 / 3, -2])


def test_constant_entries_have_no_tails() -> None:
    rounded = np.array([1, 1, 1, 1 + 2e-16])
    assert stats.matrix_kurtosis(rounded[None]) == stats.column_kurtosis(rounded[:, None])[0] == 0
    third = np.full((5, 3), 1 / 3, dtype=np.float32)
    assert stats.matrix_kurtosis(third) == 0
    assert (stats.column_kurtosis(third.astype(np.float64)) == 0).all()
    assert stats.product_kurtosis(third, np.ones((3, 4), np.float32), 20.0) == 0
    assert stats.product_kurtosis(np.zeros((5, 3), np.float32), np.ones((3, 4), np.float32), 0.0) == 0


def exact_product_kurtosis(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return the kurtosis of ``left @ right`` and its sum of squares in float64."""
    product = left.astype(np.float64) @ right.astype(np.float64)
    return nsds_oracle.kurtosis(product), float((product**2).sum())


def test_product_kurtosis_uses_float32_where_it_is_safe() -> None:
    rng = np.random.default_rng(3)
    left, right = rng.standard_t(3, (200, 16)).astype(np.float32), rng.standard_t(3, (16, 150)).astype(np.float32)
    wanted, squared_norm = exact_product_kurtosis(left, right)
    assert stats.product_dtype(left, right, math.sqrt(squared_norm / 30000)) == np.float32
    assert stats.product_kurtosis(left, right, squared_norm) == pytest.approx(wanted, rel=1e-6)


def test_product_kurtosis_uses_float64_where_the_terms_cancel() -> None:
    rng = np.random.default_rng(4)
    half = rng.standard_t(3, (200, 8))
    left = np.concatenate([half, half + 1e-6 * rng.standard_t(3, (200, 8))], axis=1).astype(np.float32)
    other = rng.standard_t(3, (8, 150))
    right = np.concatenate([other, -other]).astype(np.float32)
    wanted, squared_norm = exact_product_kurtosis(left, right)
    std = math.sqrt(squared_norm / 30000)
    assert stats.product_dtype(left, right, std) == np.float64
    assert nsds_oracle.kurtosis(left @ right) != pytest.approx(wanted, rel=1e-3)  # what float32 would have given
    assert stats.product_kurtosis(left, right, squared_norm) == pytest.approx(wanted, rel=1e-6)


def test_product_kurtosis_keeps_its_digits_beside_a_large_mean() -> None:
    rng = np.random.default_rng(5)
    left = (100 + 1e-3 * rng.standard_t(3, (200, 1))).astype(np.float32)
    right = (100 + 1e-3 * rng.standard_t(3, (1, 150))).astype(np.float32)
    wanted, squared_norm = exact_product_kurtosis(left, right)
    assert stats.product_kurtosis(left, right, squared_norm) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("sigma", "at_least", "wanted"),
    [
        ([10, 0.1, 0.1], 2, 2),  # the first holds 99.98 %, but two are kept
        ([10, 0.1, 0.1], 1, 1),
        ([5], 2, 1),  # there is no second
        ([1] * 10, 2, 10),  # nine hold 90 %
        ([7, 6, 2, 0.5, 0.4], 2, 3),  # 49, 85, 89 of 89.41: 99.54 %
        ([0, 0, 0], 2, 2),
    ],
)
def test_leading_triplets_hold_99_percent_of_the_squared_norm(sigma: list[float], at_least: int, wanted: int) -> None:
    assert nsds.n_leading(np.array(sigma, dtype=float), at_least) == wanted


def test_right_vectors_come_largest_first() -> None:
    matrix = np.diag([1.0, 3.0, 2.0])
    sigma, vectors_ = nsds.right_vectors(nsds.residual_gram([matrix[:2], matrix[2:]], 3))
    assert sigma == pytest.approx([3, 2, 1])
    assert np.abs(vectors_) == pytest.approx(np.eye(3)[:, [1, 2, 0]])


def test_detector_weights_ignore_light_tails() -> None:
    heavy, light = np.eye(8)[0], np.array([1.0, -1, 1, -1, 1, -1, 1, -1])  # excess kurtosis 22/7 and -2
    both = np.stack([heavy, light], axis=1)
    assert nsds.detector_ffn_weight(both) == pytest.approx([math.log(1 + 22 / 7), 0])
    assert nsds.detector_qk_weight(both, both) == pytest.approx([math.log(1 + (22 / 7) ** 2), 0])


def test_writer_weight_is_the_length_of_the_projection() -> None:
    projection = np.eye(3, dtype=np.float32)[:, :2]
    u = np.array([[1, 0, 0.6, 0.6], [0, 0, 0, 0.8], [0, 1, 0.8, 0]])
    assert nsds.writer_weight(u, projection) == pytest.approx([1, 0, 0.6, 1])


def test_spectral_magnitude_and_entropy_of_equal_values() -> None:
    sigma, weight = np.array([1.0, 2, 4, 8]), np.array([4.0, 2, 1, 0.5])
    assert nsds.spectral_magnitude(sigma, weight) == 16
    assert nsds.spectral_entropy(sigma, weight) == pytest.approx(math.log(4))
    assert nsds.structural_expressiveness(sigma, weight, SE_READINGS["ratio"]) == pytest.approx(4)
    assert nsds.structural_expressiveness(sigma, weight, SE_READINGS["product"]) == pytest.approx(64)


@pytest.mark.parametrize("se", SE_READINGS)
def test_expressiveness_of_nothing_is_zero(se: str) -> None:
    assert nsds.structural_expressiveness(np.array([3.0, 1]), np.zeros(2), SE_READINGS[se]) == 0


def test_robust_z_by_hand() -> None:
    wanted = np.array([-2, -1, 0, 1, 97]) / 1.4826  # median 3, MAD 1
    assert stats.robust_z(np.array([1.0, 2, 3, 4, 100])) == pytest.approx(wanted)


def test_without_spread_a_layer_at_the_median_gets_one_half() -> None:
    p = stats.sigmoid(stats.robust_z(np.array([2.0, 2, 2, 5, 1])))
    assert p.tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]


def test_sigmoid_by_hand() -> None:
    assert stats.sigmoid(np.array([-1e9, -math.log(3), 0, math.log(3), 1e9])) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_soft_or_by_hand() -> None:
    assert stats.soft_or(np.array([0.0, 0.75])) == pytest.approx(0.5)  # 1 - sqrt(1 * 1/4)
    assert stats.soft_or(np.array([0.5, 0.5, 0.5])) == pytest.approx(0.5)
    assert stats.soft_or(np.array([0.2, 1.0])) == 1
    assert stats.soft_or(np.zeros(2)) == 0


def test_a_component_that_one_layer_lacks_does_not_count_for_it() -> None:
    both = [{"up": 1.0, "gate": 7.0}, {"up": 2.0}, {"up": 3.0, "gate": 9.0}]
    up = stats.sigmoid(np.array([-1, 0, 1]) / 1.4826)
    gate = stats.sigmoid(np.array([-1, 1]) / 1.4826)
    wanted = [1 - math.sqrt((1 - up[0]) * (1 - gate[0])), 0.5, 1 - math.sqrt((1 - up[2]) * (1 - gate[1]))]
    assert nsds.aggregate(both) == pytest.approx(wanted)


def test_zd_uses_the_unbiased_standard_deviation() -> None:
    assert baselines.outlier_fraction(np.array([[-1, 0, 1]], np.float32)) == 0  # |z| = 1 is not above 1
    assert baselines.outlier_fraction(np.array([[0, 0, 0, 0, 10]], np.float32)) == pytest.approx(0.2)


def test_mse_by_hand() -> None:
    weights = np.array([[4, 1, 0.9, -2.1]], np.float32)  # scale 2, levels 2 (clipped), 0 (half to even), 0, -2
    assert baselines.two_bit_error(weights) == pytest.approx(4 + 1 + 0.81 + 0.01)
    assert baselines.two_bit_error(np.zeros((2, 2), np.float32)) == 0


def test_ewq_of_uniform_tensors_is_that_of_their_sizes() -> None:
    matrices = iter([np.full((2, 3), 5, np.float32), np.zeros((2, 2), np.float32)])
    assert baselines.ewq(matrices) == pytest.approx((math.log(6) / 6 + math.log(4) / 4) / 10)


def test_kurtboost_doubles_the_layer_that_jumps() -> None:
    steady = np.ones(9)
    jumping = np.array([1.0, 1, 1, 1, 10, 10, 10, 10, 10])  # jumps 0, 0, 0, 9, 0, ...: 9 is 2.6 deviations off
    assert baselines.boost_jumps(steady).tolist() == steady.tolist()
    assert baselines.boost_jumps(jumping).tolist() == [1, 1, 1, 1, 20, 10, 10, 10, 10]
    assert baselines.boost_jumps(np.array([1.0, 1, 1, 10])).tolist() == [1, 1, 1, 10]  # 1.4 deviations
    assert baselines.boost_jumps(np.array([3.0])).tolist() == [3]


# --- the contract of every metric -----------------------------------------------------------------------------


def plant_outliers(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    planted = weights.copy()
    planted[rng.integers(len(weights), size=4), rng.integers(weights.shape[1], size=4)] = 8.0
    return planted


# What each metric calls sensitive: outliers for those that look for tails or range, many weights beyond one standard
# deviation (three values, few zeros) for ZD, an even softmax for EWQ.
RIGS = {
    "nsds": plant_outliers,
    "mse": plant_outliers,
    "kurtboost": plant_outliers,
    "zd": lambda weights, rng: rng.choice([-1.0, 0.0, 1.0], weights.shape, p=[0.4, 0.2, 0.4]),
    "ewq": lambda weights, rng: 0.01 * weights,
}


def scores_of_plain_model(metric: str, se: str | None = None) -> Scores:
    shape, layers, unembedding = plain_layers()
    session = Session(model_of(shape, layers, unembedding), Run(1), WorkFolder(Path()))
    return session.score(recipe(metric=metric, se=se), measures=False)


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_gives_every_layer_a_finite_score(metric: str) -> None:
    scores = scores_of_plain_model(metric)
    assert scores.recipe.metric == metric
    assert [layer.layer for layer in scores.layers] == list(range(N_LAYERS))
    assert all(type(layer.score) is float and math.isfinite(layer.score) for layer in scores.layers)
    assert len({layer.score for layer in scores.layers}) == N_LAYERS


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_is_deterministic_and_survives_json(metric: str) -> None:
    scores = scores_of_plain_model(metric)
    assert scores.digest == scores_of_plain_model(metric).digest
    assert Scores.from_json(scores.to_json()) == scores


@pytest.mark.parametrize("metric", METRICS)
def test_higher_means_more_sensitive(metric: str) -> None:
    shape, layers, unembedding = plain_layers()
    rng = np.random.default_rng(9)
    layers[3] = {role: RIGS[metric](weights, rng) for role, weights in layers[3].items()}
    scores, _ = score_layers(model_of(shape, layers, unembedding), metric)
    assert max(scores, key=lambda layer: layer.score).layer == 3


@pytest.mark.parametrize("metric", METRICS)
def test_a_layer_of_zeros_has_a_finite_score(metric: str) -> None:
    shape, layers, unembedding = plain_layers()
    layers[2] = {role: np.zeros_like(weights) for role, weights in layers[2].items()}
    scores, _ = score_layers(model_of(shape, layers, unembedding), metric)
    assert all(math.isfinite(layer.score) for layer in scores)


@pytest.mark.parametrize("metric", METRICS)
def test_weights_that_are_not_finite_are_named_and_counted(metric: str, small_tiles: None) -> None:
    shape, layers, unembedding = plain_layers()
    layers[1]["ffn_up"][0, 0], layers[1]["ffn_up"][-1, :2] = np.nan, np.inf
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight: 1 NaN and 2 infinite of 1536 weights"):
        score_layers(model_of(shape, layers, unembedding), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_progress_ends_at_its_total(metric: str) -> None:
    shape, layers, unembedding = plain_layers()
    calls: list[tuple[int, int]] = []
    score_layers(model_of(shape, layers, unembedding), metric, progress=lambda *step: calls.append(step))
    assert calls == sorted(calls)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] >= N_LAYERS


# --- nsds as a whole ------------------------------------------------------------------------------------------


def test_the_unembedding_is_checked_too(small_tiles: None) -> None:
    shape, layers, unembedding = plain_layers()
    unembedding[[0, 30, 60], 5] = -np.inf
    with pytest.raises(ModelError, match=r"token_embd\.weight: 0 NaN and 3 infinite of 2048 weights"):
        score_layers(model_of(shape, layers, unembedding))


def test_order_of_rows_within_heads_does_not_matter() -> None:
    shape = SHAPES["gqa 2, tied"]
    layers, unembedding = random_layers(shape)
    order = np.random.default_rng(1).permutation(shape.head_dim)
    permuted = [
        layer
        | {role: layer[role].reshape(-1, shape.head_dim, shape.d)[:, order].reshape(-1, shape.d)}
        | {"attn_k": layer["attn_k"].reshape(-1, shape.head_dim, shape.d)[:, order].reshape(-1, shape.d)}
        for layer in layers
        for role in ["attn_q"]
    ]
    (one, _), (other, _) = (score_layers(model_of(shape, each, unembedding)) for each in (layers, permuted))
    for a, b in zip(one, other, strict=True):
        assert [a.score, *a.nv.values(), *a.se.values()] == pytest.approx([b.score, *b.nv.values(), *b.se.values()])


def test_one_layer_alone_is_neither_sensitive_nor_not() -> None:
    shape, layers, unembedding = plain_layers()
    arrays = {f"blk.0.{role}.weight": weights for role, weights in layers[0].items()}
    hparams = Hparams(1, shape.d, shape.n_ff, shape.n_heads, shape.n_kv_heads, shape.head_dim, 64, 64, 1e-5)
    scores, _ = score_layers(make_model({"token_embd.weight": unembedding, **arrays}, hparams))
    assert scores[0].score == 0.5


def test_the_record_says_how_it_was_made() -> None:
    scores = scores_of_plain_model("nsds", "product")
    assert (scores.recipe.metric, scores.recipe.se, scores.recipe.target) == ("nsds", "product", None)
    assert set(scores.versions) == {"nsds-gguf", "numpy", "scipy"}
    assert (scores.model_id, scores.model_name, scores.costs) == ("0" * 64, "arrays", ())
    assert scores_of_plain_model("zd").recipe.se is None


def test_stored_values_have_seven_digits() -> None:
    layer = scores_of_plain_model("nsds").layers[0]
    for value in [layer.score, layer.p_nv, layer.p_se, *layer.nv.values(), *layer.se.values()]:
        assert value == float(f"{value:.7g}")


@pytest.mark.parametrize(("options", "known"), [({"metric": "hawq"}, "zd, mse"), ({"se": "sum"}, "ratio, product")])
def test_unknown_names_are_refused_with_the_known_ones(options: dict[str, str], known: str) -> None:
    shape, layers, unembedding = plain_layers()
    with pytest.raises(PlanError, match=f"{next(iter(options.values()))}.*{known}"):
        score_layers(model_of(shape, layers, unembedding), **options)
