"""Everything that is measured of one model: from the original to a plain dictionary that the page is made of."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from quality_measure import Bench, Measured, Passage, Yardstick, planned
from quality_sensitivity import (
    MEASURED_AT,
    TensorSensitivity,
    measure_sensitivities,
    with_factors,
    with_sensitivities,
)
from quality_statistics import mean_and_error
from quality_zoo import (
    BUDGETS,
    IMATRIX_OF_TEXT,
    N_RANDOM,
    N_RANDOM_ORDERS,
    NSDS_WEIGHTS,
    ORACLE,
    OURS,
    PAPER_BITS,
    PAPER_METRICS,
    RANDOM,
    RTN,
    STOCK,
    STOCK_IMATRIX,
    UNIFORM,
    UNIFORM_TYPES,
    VARIANTS,
    Entry,
    Variant,
)

from nsds_gguf.calibration.imatrix import Imatrix
from nsds_gguf.comparison import exact_bpw
from nsds_gguf.metrics import score_layers
from nsds_gguf.read import open_model
from nsds_gguf.records import K_TYPES, LayerScore, Plan, Recipe, Scores, Target, TensorType
from nsds_gguf.session.original import PLAIN
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

CALIBRATION_BYTES = 400_000
CALIBRATION_PIECES = 8

# No budget and round-to-nearest: what sensitivities are measured with, and whole layers compared.
FREE = replace(PLAIN, allocator="fisher", types=K_TYPES, calibration="random")
DEFAULT = replace(FREE, rounding=VARIANTS[0].rounding, calibration=VARIANTS[0].calibration)


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        final: halves that final tables are measured on, one a text; the first text's is also that of questions.
        choosing: the half that sensitivities are measured on.
        calibration: in-domain text for the importance matrix; ``None`` leaves out what needs one.
        sensitivity_types: at which each tensor is measured.
        n_threads: threads.
        say: called with a line of progress.
    """

    final: tuple[Passage, ...]
    choosing: Passage
    calibration: str | None
    sensitivity_types: tuple[str, ...] = MEASURED_AT
    n_threads: int = 1
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Row:
    """One file on one text: what it is, and per chunk its divergence from the original, nats per token.

    ``expected`` is ``sum_t alpha_t e_t`` over its tensors with measured sensitivities: what ``kld`` would be if single
    errors added up. ``None`` for llama.cpp's mixes.
    """

    text: str
    budget: str
    kind: str
    detail: str
    tensor_bytes: int
    bpw: float
    kld: float
    kld_error: float
    ppl: float
    original_ppl: float
    same_top: float
    expected: float | None
    chunks: tuple[float, ...]


class ModelBench:
    """Measures one model of the zoo; a ``with`` block removes its temporary files."""

    def __init__(self, entry: Entry, source: Path, folder: Path, settings: Settings) -> None:
        """Open the model in ``source``; ``folder`` keeps what is measured."""
        self.entry, self.settings = entry, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.files = WorkFolder(folder)
        self.bench = Bench(Session(open_model(source), Run(settings.n_threads), self.files), folder)
        self.imatrix = None if settings.calibration is None else self.bench.imatrix(settings.calibration)
        self.scores: dict[Recipe, Scores] = {}
        self.alphas: dict[str, float] = {}  # measured sensitivities by tensor
        self.rows: list[Row] = []

    def __enter__(self) -> ModelBench:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove temporary files."""
        self.files.close()

    @property
    def session(self) -> Session:
        """The stages on the model."""
        return self.bench.session

    @cached_property
    def yardsticks(self) -> list[Yardstick]:
        """Of the final halves."""
        return [self.bench.yardstick(passage) for passage in self.settings.final]

    def recipe(self, variant: Variant) -> Recipe | None:
        """Return the recipe of a variant; ``None`` where it wants an importance matrix and there is none."""
        calibration = variant.calibration
        if calibration == IMATRIX_OF_TEXT:
            if self.imatrix is None:
                return None
            calibration = self.imatrix.name
        return replace(FREE, rounding=variant.rounding, calibration=calibration)

    def scores_of(self, recipe: Recipe) -> Scores:
        """Return scores with costs, measured as the recipe wants; made once."""
        how = replace(FREE, rounding=recipe.rounding, calibration=recipe.calibration)
        if how not in self.scores:
            self.scores[how] = self.session.score(how)
        return self.scores[how]

    def run(self) -> dict[str, Any]:
        """Measure everything and return it."""
        sensitivities = self.sensitivities()
        self.alphas = {t.name: t.alpha for t in sensitivities}
        oracle = with_sensitivities(self.scores_of(DEFAULT), self.alphas)
        budgets = {mix: self.budget(mix, oracle) for mix in BUDGETS}
        for type_name in UNIFORM_TYPES:
            self.uniform(type_name)
        self.paper()
        model = self.session.model
        return {
            "name": self.entry.name,
            "group": self.entry.group,
            "about": self.entry.about,
            "model": {"n_weights": model.n_weights, "tied": model.is_tied, **asdict(model.hparams)},
            "rows": [asdict(row) for row in self.rows],
            "sensitivities": [asdict(t) for t in sensitivities],
            "layers": self.layer_scores(),
            "regret": self.regrets(budgets),
        }

    def sensitivities(self) -> list[TensorSensitivity]:
        """Return measured sensitivities, on the choosing half."""
        yardstick = self.bench.yardstick(self.settings.choosing)
        types = self.settings.sensitivity_types
        return measure_sensitivities(self.bench, self.scores_of(FREE), FREE, yardstick, types, self.say)

    # --- the main table -------------------------------------------------------------------------------------------

    def budget(self, mix: str, oracle: Scores) -> Target:
        """Measure everything at the bytes of one of llama.cpp's mixes; return them as a target."""
        stock = self.stock(mix, None)
        target = Target("bpw", exact_bpw(stock[0].tensor_bytes, self.session.model.n_weights))
        if self.imatrix is not None:
            self.stock(mix, self.imatrix)
        for variant in VARIANTS:
            recipe = self.recipe(variant)
            if recipe is not None:
                self.plan(mix, variant.name, "", self.scores_of(recipe), recipe.to(target))
        self.plan(mix, ORACLE, "", oracle, DEFAULT.to(target))
        outside = stock[0].outside.items()
        fixed = tuple(TensorType(name.replace(".", r"\."), type_name) for name, type_name in outside)
        for seed in range(N_RANDOM):
            recipe = replace(DEFAULT.to(target), allocator="random", seed=seed, tensor_types=fixed)
            self.plan(mix, RANDOM, f"seed {seed}", self.scores_of(DEFAULT), recipe)
        return target

    def uniform(self, type_name: str) -> None:
        """Measure one type for all, and ours at its bytes."""
        budget = f"{UNIFORM} {type_name}"
        recipe = replace(DEFAULT, allocator="uniform", types=(type_name,))
        plan = self.plan(budget, UNIFORM, type_name, self.scores_of(DEFAULT), recipe)
        target = Target("bpw", exact_bpw(plan.tensor_bytes, plan.n_weights))
        self.plan(budget, OURS, "", self.scores_of(DEFAULT), DEFAULT.to(target))

    # --- the paper's comparison -----------------------------------------------------------------------------------

    def paper(self) -> None:
        """Measure the paper's allocator on every metric, on random orders of the layers, and ours at its bytes."""
        for bits in PAPER_BITS:
            budget, target = f"paper {bits:g}", self.paper_target(bits)
            for name, scores in self.orders():
                self.plan(budget, name, "", scores, replace(FREE.to(target), allocator="paper"))
            self.plan(budget, RTN, "", self.scores_of(FREE), FREE.to(target))

    def orders(self) -> Iterator[tuple[str, Scores]]:
        """Yield what ranks the layers: every metric, then random numbers."""
        base = self.scores_of(FREE)
        for name, layers in self.metric_layers.items():
            yield name, replace(base, layers=layers)
        for seed in range(N_RANDOM_ORDERS):
            values = np.random.default_rng(seed).random(self.session.model.hparams.n_layers)
            yield f"random order {seed}", replace(base, layers=tuple(map(LayerScore, range(len(values)), values)))

    @cached_property
    def metric_layers(self) -> Mapping[str, tuple[LayerScore, ...]]:
        """Scores of the layers by metric and reading."""
        model = self.session.model
        return {name: score_layers(model, *which)[0] for name, which in PAPER_METRICS.items()}

    def paper_target(self, bits: float) -> Target:
        """Return the bytes of so many layers at 4 bit that their mean is ``bits``, the others at 2, the rest at 4.

        Layers are taken to be equally large.
        """
        small, large = (
            planned(self.session, replace(FREE, allocator="uniform", types=(name,))) for name in ("Q2_K", "Q4_K")
        )
        n_layers = self.session.model.hparams.n_layers
        n_high = round(n_layers * (bits - 2) / 2)
        per_layer = [sum(t.n_bytes for t in plan.tensors if t.layer is not None) // n_layers for plan in (small, large)]
        n_bytes = large.tensor_bytes - (n_layers - n_high) * (per_layer[1] - per_layer[0])
        return Target("bpw", exact_bpw(n_bytes, self.session.model.n_weights))

    # --- questions that need no file ------------------------------------------------------------------------------

    def layer_scores(self) -> list[dict[str, Any]]:
        """Return per layer what NSDS says in both readings: NV and SE of the components, their aggregates, S."""
        ratio, product = (self.metric_layers[f"nsds, {reading}"] for reading in ("ratio", "product"))
        return [
            {"layer": a.layer, "nv": dict(a.nv), "se_ratio": dict(a.se), "se_product": dict(b.se), "p_nv": a.p_nv,
             "p_se_ratio": a.p_se, "p_se_product": b.p_se, "s_ratio": a.score, "s_product": b.score}
            for a, b in zip(ratio, product, strict=True)
        ]  # fmt: skip

    def regrets(self, budgets: Mapping[str, Target]) -> list[dict[str, Any]]:
        """Return, by weight and reading of the NSDS factor, what plans lose by measured sensitivities.

        ``sum_t alpha_t e_t`` of the plan over that of the oracle's plan, by budget.
        """
        found = []
        base = self.scores_of(FREE)
        oracle = with_sensitivities(base, self.alphas)

        def loss(scores: Scores, target: Target) -> float:
            return self.expected(planned(self.session, FREE.to(target), scores))

        best = {mix: loss(oracle, target) for mix, target in budgets.items()}
        for reading in ("ratio", "product"):
            layers = self.metric_layers[f"nsds, {reading}"]
            for weight in NSDS_WEIGHTS:
                if weight == 0 and reading == "product":
                    continue
                mean = float(np.mean([layer.score for layer in layers]))
                factors = {layer.layer: float(np.exp(weight * (layer.score - mean))) for layer in layers}
                scores = with_factors(base, factors)
                ratios = {mix: loss(scores, target) / best[mix] for mix, target in budgets.items()}
                found.append({"reading": reading, "weight": weight, "ratios": ratios})
        return found

    def expected(self, plan: Plan) -> float:
        """Return ``sum_t alpha_t e_t`` of a plan, nats per token."""
        return sum(self.alphas[t.name] * t.error for t in plan.tensors if t.name in self.alphas and t.error is not None)

    # --- files ----------------------------------------------------------------------------------------------------

    def stock(self, mix: str, imatrix: Imatrix | None) -> list[Measured]:
        """Measure one of llama.cpp's mixes."""
        kind = STOCK if imatrix is None else STOCK_IMATRIX
        found = self.bench.stock(mix, imatrix, self.yardsticks)
        self.keep(mix, kind, "", found, None)
        return found

    def plan(self, budget: str, kind: str, detail: str, scores: Scores, recipe: Recipe) -> Plan:
        """Plan, measure and keep the row; outside the main table on the first text alone.

        The seed of random types is not that of tokens: all files are calibrated alike.
        """
        plan = planned(self.session, recipe, scores)
        plan = replace(plan, recipe=replace(plan.recipe, seed=FREE.seed))
        in_main_table = budget in BUDGETS
        found = self.bench.plan(plan, self.yardsticks if in_main_table else self.yardsticks[:1])
        self.keep(budget, kind, detail, found, self.expected(plan))
        return plan

    def keep(self, budget: str, kind: str, detail: str, found: Sequence[Measured], expected: float | None) -> None:
        """Keep the rows of one file."""
        for passage, m in zip(self.settings.final, found, strict=False):
            kld, error = mean_and_error(m.kld)
            bpw = m.tensor_bytes * 8 / self.session.model.n_weights
            ppl, original = (float(np.exp(np.mean(values))) for values in (m.nll, m.original_nll))
            self.rows.append(Row(passage.name, budget, kind, detail, m.tensor_bytes, bpw, kld, error, ppl, original,
                                 float(np.mean(m.same_top)), expected, m.kld))  # fmt: skip
            self.say(f"{passage.name} {budget} {kind} {detail}: {kld:.5f} ± {error:.5f}")

    def say(self, text: str) -> None:
        """Tell the progress."""
        self.settings.say(f"{self.entry.name}: {text}")


def calibration_text(path: Path) -> str:
    """Return ``CALIBRATION_BYTES`` of a text (or one compressed by xz), in pieces spread evenly over it."""
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    length = CALIBRATION_BYTES // CALIBRATION_PIECES
    starts = [i * (len(data) - length) // max(CALIBRATION_PIECES - 1, 1) for i in range(CALIBRATION_PIECES)]
    return "\n".join(data[start : start + length].decode(errors="ignore") for start in starts)
