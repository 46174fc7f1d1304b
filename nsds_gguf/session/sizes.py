"""The possible sizes of a model: plans over a grid of budgets, from one measurement; nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import allocate
from ..allocate.presets import PRESETS, preset_bytes
from ..compute.decoder import what_is_missing
from ..errors import UnsupportedError
from ..llamacpp.memory import Context, Memory
from ..quantize.header import header_bytes
from ..quantize.padding import laid_out
from ..read.hub import HubName
from ..records import AUTO, Model, Options, Plan, Recipe, Scores, Target
from ..system.workfolder import WorkFolder
from .cluster import open_workers
from .estimate import Work, duration, estimate_stages
from .fit import memory_beside_weights
from .loaded import check_scores
from .original import original_bytes
from .run import Run
from .session import Session
from .settle import RANDOM, settle
from .source import Source, open_model

SIZES_FORMAT = "nsds-gguf sizes 2"

# Budgets in bits per weight: pairs of an upper limit and the step up to it.
_STEPS = ((4.0, 0.25), (8.0, 0.5), (32.0, 4.0))
_APART = 0.1  # bits per weight between the smallest or largest size and the next budget

GOOD_DIVERGENCE = 0.05  # nats per token; the smallest budget below it is proposed
_USUAL_BPW = 4.5

_PREDICTED_FOR_RTN = (
    "Predictions are for round-to-nearest. convert rounds this model by GPTQ (--rounding gptq), which divided the "
    "measured divergence by 1.4 to 1.8 on average over the models of docs/quality.md."
)
_RELATIVE = "The divergence is relative to that of the smallest size: it is not known in nats for this architecture."


@dataclass(frozen=True)
class Size:
    """One budget and its plan.

    Attributes:
        target_bpw: the budget, as ``--target-bpw`` takes it.
        bpw: bits over the weights of all tensors.
        file_bytes: size of the whole file.
        predicted: KL divergence from the original, nats per token, or relative to the first size.
        types: share of the weights by type, largest first.
        preset: llama.cpp preset nearest in bytes.
        preset_bpw: its bits over the weights of all tensors.
    """

    target_bpw: float
    bpw: float
    file_bytes: int
    predicted: float
    types: dict[str, float]
    preset: str
    preset_bpw: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, smallest first.

    Attributes:
        model_name, model_id: of the model.
        original_bytes: size of the original as a GGUF.
        in_nats: whether ``predicted`` is in nats per token; otherwise it is relative to the first size.
        rounding, calibration: those of the predictions.
        sizes: the rows.
        notes: notes on the numbers, one sentence each.
        contexts: the contexts that the caller asked about.
        beside: what llama.cpp keeps besides the weights in each context; empty if that is not known.
    """

    model_name: str
    model_id: str
    original_bytes: int
    in_nats: bool
    rounding: str
    calibration: str
    sizes: tuple[Size, ...]
    notes: tuple[str, ...]
    contexts: tuple[Context, ...] = ()
    beside: tuple[Memory, ...] = ()

    def largest_that_fits(self, memory_bytes: int, beside: Memory) -> Size | None:
        """Return the largest size that fits a memory together with what else goes into it; ``None`` if none does."""
        fitting = (size for size in self.sizes if size.file_bytes + beside.total <= memory_bytes)
        return max(fitting, key=lambda size: size.file_bytes, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format": SIZES_FORMAT, **asdict(self)}

    @property
    def proposed(self) -> Size:
        """The smallest size below ``GOOD_DIVERGENCE`` nats, if any; else the size nearest 4.5 bpw."""
        good = (size for size in self.sizes if self.in_nats and size.predicted < GOOD_DIVERGENCE)
        return next(good, min(self.sizes, key=lambda size: abs(size.bpw - _USUAL_BPW)))


def possible_sizes(
    source: str | Path | HubName | Source,
    options: Options,
    *,
    loaded: Scores | None = None,
    run: Run | None = None,
    contexts: Sequence[Context] = (),
) -> Sizes:
    """Return the possible sizes of a model.

    Where rounding and calibration are open, predict the divergence of round-to-nearest, which takes seconds.

    Args:
        source: as for ``convert``.
        options: options without a budget.
        loaded: scores from an earlier run, instead of measuring.
        run: threads and reporter.
        contexts: for each, return what llama.cpp keeps besides the weights.

    Raises:
        NsdsError: anything that a user can act on.

    """
    run = run or Run()
    model = open_model(source, run)
    beside, unknown = _beside(model, contexts, run)
    check_scores(model, loaded)
    anyone = replace(options, target_bpw=32.0)
    usual = settle(anyone, model, loaded).recipe
    if loaded is None and (options.rounding, options.calibration, options.imatrix) == (AUTO, AUTO, None):
        anyone = replace(anyone, rounding="rtn", calibration=RANDOM)
    settled = settle(anyone, model, loaded)
    recipe = settled.recipe
    laid = laid_out(model, recipe)
    budgets = possible_budgets(laid, recipe)
    scores = loaded
    if scores is None:
        with WorkFolder(Path(), say=run.report.say) as files, open_workers(run, model) as workers:
            if run.cluster is None:
                _tell_time(model, run, recipe)
            scores = Session(model, run, files, settled.imatrix, workers).score(recipe)
    with run.report.stage("try budgets") as progress:
        plans = []
        for target in budgets:
            aimed = settle(replace(anyone, target_bpw=target.value), model, scores).recipe
            plans.append(allocate.make_plan(laid, scores, aimed, header_bytes(laid, aimed)))
            progress(len(plans), len(budgets))
    in_nats = not what_is_missing(model)
    notes = (*laid.notes, *scores.notes, *unknown, *(() if in_nats else (_RELATIVE,)))
    notes += (_PREDICTED_FOR_RTN,) if (recipe.rounding, usual.rounding) == ("rtn", "gptq") else ()
    return Sizes(
        model_name=model.name,
        model_id=model.model_id,
        original_bytes=original_bytes(model),
        in_nats=in_nats,
        rounding=recipe.rounding,
        calibration=recipe.calibration,
        sizes=_rows(model, plans, in_nats),
        notes=notes,
        contexts=tuple(contexts),
        beside=beside,
    )


def _beside(model: Model, contexts: Sequence[Context], run: Run) -> tuple[tuple[Memory, ...], tuple[str, ...]]:
    """Return what llama.cpp keeps besides the weights in each context, or a note on why that is not known."""
    if not contexts:
        return (), ()
    try:
        return tuple(memory_beside_weights(model, contexts, run)), ()
    except UnsupportedError as error:
        return (), (f"What fits is not known: {error}.",)


def possible_budgets(model: Model, recipe: Recipe) -> list[Target]:
    """Return the smallest feasible budget, round ones above it, and the largest that the types can use."""
    found = allocate.candidates(model, recipe.types, recipe.tensor_types)
    floor, ceiling = (
        allocate.nearest_bpw(sum(candidate.n_bytes(candidate.types[i]) for candidate in found), model.n_weights)
        for i in (0, -1)
    )
    round_ones, value = [], 0.0
    for limit, step in _STEPS:
        while value < limit:
            value += step
            round_ones.append(value)
    inner = [value for value in round_ones if floor + _APART < value < ceiling - _APART]
    return [Target("bpw", value) for value in dict.fromkeys([floor, *inner, ceiling])]


def _tell_time(model: Model, run: Run, recipe: Recipe) -> None:
    work = Work(types=recipe.types, n_files=0, scores=recipe.metric is not None, measures=True, passes=True)
    stages = estimate_stages(model, work, run.n_threads)
    run.report.say(
        f"{model.name}, {model.n_weights / 1e6:.1f}M parameters: measuring takes about "
        f"{duration(sum(seconds for _, seconds in stages))} with {run.n_threads} threads."
    )
    run.report.expect(stages)


def _rows(model: Model, plans: list[Plan], in_nats: bool) -> tuple[Size, ...]:
    """Return a row per plan; of plans with the same bytes, the first."""
    presets = {name: preset_bytes(model, name) for name in PRESETS}
    different = {plan.tensor_bytes: plan for plan in reversed(plans)}
    smallest_first = [different[n_bytes] for n_bytes in sorted(different)]
    unit = 1.0 if in_nats else smallest_first[0].predicted_divergence or 1.0
    return tuple(_row(plan, presets, unit) for plan in smallest_first)


def _row(plan: Plan, presets: dict[str, int], unit: float) -> Size:
    nearest = min(presets, key=lambda name: abs(presets[name] - plan.tensor_bytes))
    n_weights: Counter[str] = Counter()
    for tensor in plan.tensors:
        n_weights[tensor.type] += tensor.n_weights
    return Size(
        target_bpw=plan.recipe.target.value if plan.recipe.target else plan.bpw,
        bpw=plan.bpw,
        file_bytes=plan.file_bytes,
        predicted=(plan.predicted_divergence or 0.0) / unit,
        types={name: n / plan.n_weights for name, n in n_weights.most_common()},
        preset=nearest,
        preset_bpw=presets[nearest] * 8 / plan.n_weights,
    )
