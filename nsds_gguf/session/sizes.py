"""What sizes a model could have: plans over a grid of budgets, from one measurement, and nothing written."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import allocate
from ..allocate import PlanOptions
from ..allocate.presets import PRESETS, preset_bytes
from ..calibration.imatrix import Imatrix
from ..compute.decoder import what_is_missing
from ..llamacpp import llama
from ..quantize.header import header_bytes
from ..read.hub import HubName
from ..records import Model, Plan, Scores, Target
from .effort import AUTO, PLAIN_IMPORTANCE, settled
from .estimate import duration, estimate_seconds
from .loaded import check_scores
from .reporter import Reporter, Silent
from .session import ScoreOptions, Work, check_targets, open_model, original_bytes

SIZES_FORMAT = "nsds-gguf sizes 1"

# Budgets in bits per weight: up to each of these in steps of so much.
_STEPS = ((4.0, 0.25), (8.0, 0.5), (32.0, 1.0))
_APART = 0.1  # bits per weight between the smallest or largest size and the next budget

GOOD_DIVERGENCE = 0.05  # nats per token; the smallest budget below it is the one that is proposed
_USUAL_BPW = 4.5

_PREDICTED_FOR_NORMAL = (
    "Predicted for round-to-nearest. convert rounds this model by GPTQ (--effort high), which divided the measured "
    "divergence by 1.4 to 1.8 on average over the models of docs/quality.md."
)
_RELATIVE = "The divergence is relative to that of the smallest size: for this architecture it is not known in nats."


@dataclass(frozen=True)
class Size:
    """One budget and the plan that spends it.

    Attributes:
        target_bpw: the budget, as ``--target-bpw`` takes it.
        bpw: bits of all tensors over weights of all tensors.
        file_bytes: of the whole file.
        predicted: KL divergence from the original, nats per token, or relative to the first size.
        types: share of the weights by type, largest first.
        preset: llama.cpp's preset nearest in bytes.
        preset_bpw: its bits of all tensors over weights of all tensors.
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
        original_bytes: of the model at its own precision as a GGUF.
        in_nats: whether ``predicted`` is in nats per token; otherwise it is relative to the first size.
        effort, importance: how the weights are rounded for which divergence is predicted.
        sizes: the rows.
        notes: what to know of the numbers, one sentence each.
    """

    model_name: str
    model_id: str
    original_bytes: int
    in_nats: bool
    effort: str
    importance: str
    sizes: tuple[Size, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format": SIZES_FORMAT, **asdict(self)}

    @property
    def proposed(self) -> Size:
        """The smallest size below ``GOOD_DIVERGENCE``; where there is none, or none is known, that nearest 4.5 bpw."""
        good = (size for size in self.sizes if self.in_nats and size.predicted < GOOD_DIVERGENCE)
        return next(good, min(self.sizes, key=lambda size: abs(size.bpw - _USUAL_BPW)))


def possible_sizes(
    path: Path | HubName,
    options: PlanOptions,
    *,
    scoring: ScoreOptions | None = None,
    given: Scores | None = None,
    pre: str | None = None,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
    n_threads: int | None = None,
    report: Reporter | None = None,
) -> Sizes:
    """Return what sizes a model could have; arguments and errors are those of ``convert.plan``.

    Args:
        path: Hugging Face model folder or GGUF file.
        options: of the allocator ``nsds``; the target does not count. Where effort and importance are left open,
            divergence is predicted for normal effort, which needs no text.
        scoring: how layers are scored, where ``options.score_weight`` makes that count.
        given: scores from an earlier run, in place of measuring.
        pre: name of the pre-tokenizer, overriding the one recognised.
        allow_requantize: take a GGUF that is quantized already.
        imatrix: importance matrix, for options whose ``importance`` is its name.
        n_threads: threads for everything; ``None`` for one a core.
        report: who is told.

    """
    scoring, report, n_threads = scoring or ScoreOptions(), report or Silent(), n_threads or llama.default_threads()
    model = open_model(path, pre, allow_requantize, report)
    check_scores(model, given)
    usual = settled(model, options, given)
    if given is None and (options.effort, options.importance) == (AUTO, AUTO):
        options = replace(options, effort="normal", importance=PLAIN_IMPORTANCE)
    options = settled(model, options, given)
    budgets = possible_budgets(model, options)
    check_targets(model, [replace(options, target=target) for target in budgets[:1]], scoring.metric)
    work = Work(model, n_threads, report, imatrix)
    if given is None:
        _tell_time(work, options)
    scores = given or _measured(work, options, scoring)
    with report.stage("try budgets") as progress:
        plans = []
        for target in budgets:
            plans.append(_plan(model, scores, replace(options, target=target)))
            progress(len(plans), len(budgets))
    in_nats = not what_is_missing(model)
    notes = (*model.notes, *scores.notes, *(() if in_nats else (_RELATIVE,)))
    notes += (_PREDICTED_FOR_NORMAL,) if options.effort == "normal" and usual.effort == "high" else ()
    return Sizes(
        model_name=model.name,
        model_id=model.model_id,
        original_bytes=original_bytes(model),
        in_nats=in_nats,
        effort=options.effort,
        importance=options.importance,
        sizes=_rows(model, plans, in_nats),
        notes=notes,
    )


def possible_budgets(model: Model, options: PlanOptions) -> list[Target]:
    """Return the smallest budget that a model can meet, round ones above it, and the largest that its types can use."""
    found = allocate.candidates(model, options.allowed_types, options.pins)
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


def _measured(work: Work, options: PlanOptions, scoring: ScoreOptions) -> Scores:
    """Return the costs of tensors, without the scores of layers unless they count."""
    if options.score_weight:
        return work.score([options], scoring)
    bare = Scores(scoring.metric, (), work.model.model_id, work.model.name)
    return work.measure(bare, options)


def _plan(model: Model, scores: Scores, options: PlanOptions) -> Plan:
    n_header = header_bytes(
        model,
        allocator=options.allocator,
        target=options.target,
        importance=options.importance,
        metric=scores.metric,
        effort=options.effort,
    )
    return allocate.make_plan(model, scores, options, n_header)


def _tell_time(work: Work, options: PlanOptions) -> None:
    seconds = estimate_seconds(
        work.model,
        types=options.allowed_types,
        n_threads=work.n_threads,
        n_files=0,
        scores=bool(options.score_weight),
        measures=True,
        n_tokens=0,
    )
    size = f"{work.model.n_weights / 1e6:.1f} M weights"
    work.report.say(
        f"{work.model.name}, {size}: measuring takes about {duration(seconds)} with {work.n_threads} threads."
    )


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
        target_bpw=plan.target.value,
        bpw=plan.bpw,
        file_bytes=plan.file_bytes,
        predicted=(plan.predicted_divergence or 0.0) / unit,
        types={name: n / plan.n_weights for name, n in n_weights.most_common()},
        preset=nearest,
        preset_bpw=presets[nearest] * 8 / plan.n_weights,
    )
