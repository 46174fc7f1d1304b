"""Comparison at equal bytes: our plan, other allocations and llama.cpp's own mixes, all against the original.

Every file is made, measured and removed before the next one; what was measured is kept in ``comparison.json`` at once,
so that a comparison that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .allocate import Pin, PlanOptions
from .allocate.presets import PRESETS
from .calibration.imatrix import Imatrix
from .errors import OutputError, PlanError, RecordError, TargetError, VerifyError
from .evaluate.inspect import inspect_gguf
from .evaluate.perplexity import perplexity
from .evaluate.texts import ORIGINAL, VerifyOptions, check_vocabulary, embeds, evaluation_text
from .llamacpp import llama
from .read.hub import HubName
from .records import Plan, Scores, Target, read_json
from .session.reporter import Reporter, Silent
from .session.session import (
    ScoreOptions,
    Work,
    check_targets,
    open_model,
    reference_plan,
    settled_options,
)
from .system.atomic import unfinished, write_small
from .system.filestate import unchanged
from .system.resources import check_disk
from .system.workfolder import WorkFolder

COMPARISON_FORMAT = "nsds-gguf comparison 1"

# llama.cpp's mixes of the types that we use too, none of which needs an importance matrix; smallest first.
STOCK_MIXES = tuple(PRESETS)
DEFAULT_STOCK = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_M")

N_SEEDS = 3  # random allocations a budget

EQUAL_BYTES = 1e-3  # share of the bytes by which two files may differ and still be compared

OURS, PAPER, UNIFORM, RANDOM, RANDOM_FIXED, STOCK = (
    "nsds",
    "paper",
    "uniform",
    "random",
    "random, output fixed",
    "stock",
)

KINDS = (OURS, STOCK, PAPER, UNIFORM, RANDOM_FIXED, RANDOM)  # in the order in which they are shown

RESULT = "comparison.json"
_SCORES = "scores.json"


@dataclass(frozen=True)
class Row:
    """One file that was measured.

    Attributes:
        budget: what its bytes were to equal: ``3 bpw`` or the name of a stock mix.
        kind: ``nsds``, ``paper``, ``uniform``, ``random``, ``random, output fixed`` or ``stock``.
        detail: type of ``uniform``, seed of ``random``; else empty.
        tensor_bytes: of all tensors, without padding.
        bpw: bits over weights of all tensors.
        ppl, ppl_error: perplexity and its standard error.
        kld, kld_error: mean divergence from the original and its standard error, nats per token.
        same_top: share of positions at which both prefer the same token.
        original_ppl, original_ppl_error: of what it was compared with.
        n_scored_tokens: tokens behind these numbers.
        predicted: divergence that the plan predicts, relative to the other plans; ``None`` for stock mixes.
        key: digest of what was measured how; a row with the same key is not measured again.
    """

    budget: str
    kind: str
    detail: str
    tensor_bytes: int
    bpw: float
    ppl: float
    ppl_error: float
    kld: float
    kld_error: float
    same_top: float
    original_ppl: float
    original_ppl_error: float
    n_scored_tokens: int
    predicted: float | None
    key: str


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they share; ``missing`` says which allocations a budget cannot have, and why."""

    model_name: str
    model_id: str
    n_ctx: int
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format": COMPARISON_FORMAT, **asdict(self)}

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets in order."""
        return tuple(dict.fromkeys(row.budget for row in self.rows))

    def of(self, budget: str) -> list[Row]:
        """Return the rows of one budget, ours first."""
        return [row for row in self.rows if row.budget == budget]

    def ours(self, budget: str, beside: str = "") -> Row:
        """Return our row of a budget: the one at the bytes of the kind ``beside`` where those are fewer.

        Raises ``RecordError`` when it was not measured.
        """
        rows = [row for row in self.of(budget) if row.kind == OURS]
        for detail in (_at_bytes_of(beside), ""):
            if found := [row for row in rows if row.detail == detail]:
                return found[0]
        raise RecordError(f"the comparison holds no plan of ours at {budget}")

    def ratios(self, kind: str) -> dict[str, float]:
        """Return, by budget, our divergence over the mean one of a kind."""
        found = {}
        for budget in self.budgets:
            others = [row.kld for row in self.of(budget) if row.kind == kind]
            if others:
                found[budget] = self.ours(budget, kind).kld / (sum(others) / len(others))
        return found

    @property
    def prediction_factor(self) -> float | None:
        """What a plan's prediction is multiplied by to be nats, on the geometric mean; ``None`` without plans."""
        logs = [math.log(row.kld / row.predicted) for row in self.rows if row.predicted and row.kld > 0]
        return math.exp(sum(logs) / len(logs)) if logs else None

    @property
    def prediction_rank_correlation(self) -> float | None:
        """Spearman's rank correlation of predicted and measured divergence; ``None`` for fewer than three plans."""
        pairs = [(row.predicted, row.kld) for row in self.rows if row.predicted is not None]
        if len(pairs) < 3:
            return None
        first, second = (_ranks([pair[i] for pair in pairs]) for i in (0, 1))
        mean = (len(pairs) - 1) / 2
        covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
        spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
        return covariance / spread if spread else None


def _at_bytes_of(kind: str) -> str:
    return f"at the bytes of {kind}"


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 0, ties at the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


@dataclass(frozen=True)
class _Job:
    """One file to measure: what it is, how to plan it, and the key under which it is known."""

    budget: str
    kind: str
    detail: str
    plan: Plan | None  # None: llama.cpp's own mix of the budget's name


def compare(
    path: Path | HubName,
    targets: Sequence[Target],
    stock: Sequence[str],
    folder: Path,
    *,
    verifying: VerifyOptions | None = None,
    scoring: ScoreOptions | None = None,
    n_seeds: int = N_SEEDS,
    types: tuple[str, ...] | None = None,
    importance: str = "sweep",
    effort: str = "normal",
    pre: str | None = None,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
    n_threads: int | None = None,
    report: Reporter | None = None,
) -> Comparison:
    """Measure allocations at equal bytes.

    Args:
        path: model folder, GGUF, or name on the Hub.
        targets: budgets in bits per weight.
        stock: names of llama.cpp's mixes, each also a budget: its own bytes.
        folder: where results go and intermediate files lie; created when missing.
        verifying: text, context and chunks; ``against`` is the original, always.
        scoring: how layers are scored.
        n_seeds: random allocations a budget.
        types: types that our plan and the random ones may use; ``None`` for the default ones.
        importance: column importance of all plans but the stock mixes, which have none.
        effort: how weights of our plans are rounded.
        pre: as for ``convert``, like those that follow.
        allow_requantize: take quantized input.
        imatrix: importance matrix for our plans; llama.cpp's mixes go without.
        n_threads: threads for everything.
        report: who is told.

    Returns:
        The comparison; it is in ``comparison.json`` too.

    Raises:
        NsdsError: anything that a user can act on; what was measured before is kept.

    """
    check_stock(stock)
    verifying = replace(verifying or VerifyOptions(), against=ORIGINAL, enabled=True)
    report, scoring = report or Silent(), scoring or ScoreOptions()
    text = evaluation_text(verifying)
    model = open_model(path, pre, allow_requantize, report)
    options = PlanOptions(Target("none", 0), importance=importance, effort=effort)
    options = replace(options, types=types or options.types)
    (options,), told = settled_options(model, [options], None)
    check_targets(model, [replace(options, target=target) for target in targets], scoring.metric)
    if embeds(model):
        raise VerifyError(f"{model.path}: is a model for embeddings, and files are compared by perplexity; convert it: "
                          "each file is then checked by the cosine similarity of its embeddings")  # fmt: skip
    make_folder(folder)
    with ExitStack() as stack:
        files = stack.enter_context(WorkFolder(folder, [RESULT], report.say))
        stack.enter_context(unchanged(model.inputs))
        files.open()
        check_vocabulary(model, verifying, text, files)
        work = Work(model, n_threads or llama.default_threads(), report, imatrix, told, files)
        check_disk(folder, 2 * reference_plan(model).file_bytes, "the original and one file at a time")
        bench = _Bench(work, folder, verifying, text)
        reference = stack.enter_context(work.original())
        scores = bench.scores(replace(options, target=Target("bpw", 1)), scoring)
        for target in targets:
            bench.run(_plans(bench, str(target), target, scores, options, n_seeds, {}), reference)
        for name in stock:
            with _stock_file(work, reference, name) as file:
                found = inspect_gguf(file)
                fixed = {t.name: t.type for t in found.tensors if t.name in ("output.weight", "token_embd.weight")}
                bench.measure(_Job(name, STOCK, "", None), file, reference)
                size = sum(tensor.n_bytes for tensor in found.tensors)
            target = Target("bpw", exact_bpw(size, model.n_weights))
            bench.run(_plans(bench, name, target, scores, options, n_seeds, fixed), reference)
    return bench.result()


def check_stock(names: Sequence[str]) -> None:
    """Raise ``PlanError`` for a mix that is not one of ``STOCK_MIXES``."""
    unknown = [name for name in names if name not in STOCK_MIXES]
    if unknown:
        raise PlanError(f"--stock {unknown[0]}: not a mix that needs no importance matrix; known: "
                        f"{', '.join(STOCK_MIXES)}")  # fmt: skip


def make_folder(folder: Path) -> None:
    """Create the folder for results; raises ``OutputError`` when that cannot be."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}; choose another folder") from error


def exact_bpw(tensor_bytes: int, n_weights: int) -> float:
    """Return the smallest number of bits per weight whose budget, in whole bytes, is ``tensor_bytes``."""
    bpw = tensor_bytes * 8 / n_weights
    while math.floor(bpw * n_weights / 8) < tensor_bytes:
        bpw = math.nextafter(bpw, math.inf)
    return bpw


@contextmanager
def _stock_file(work: Work, reference: Path, name: str) -> Iterator[Path]:
    """Give llama.cpp's own mix of the original; removed on every exit."""
    path = work.files.path / f"stock-{name}.gguf"
    try:
        with work.report.stage(f"llama.cpp makes {name}"):
            llama.quantize_stock(reference, path, name, work.n_threads)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _plans(
    bench: _Bench,
    budget: str,
    target: Target,
    scores: Scores,
    options: PlanOptions,
    n_seeds: int,
    fixed: Mapping[str, str],
) -> list[_Job]:
    """Return the plans of one budget; what it cannot have is told to ``bench``."""
    options = replace(options, target=target)
    wanted: list[tuple[str, str, PlanOptions]] = [
        (OURS, "", options),
        (PAPER, "", replace(options, allocator="paper")),
        *((RANDOM, f"seed {i}", replace(options, allocator="random", seed=i)) for i in range(n_seeds)),
    ]
    if fixed:
        present = {tensor.name for tensor in bench.work.model.tensors}
        pins = tuple(Pin(_exactly(name), type_name) for name, type_name in fixed.items() if name in present)
        fixing = replace(options, allocator="random", pins=pins)
        wanted += [(RANDOM_FIXED, f"seed {i}", replace(fixing, seed=i)) for i in range(n_seeds)]
    jobs = []
    for kind, detail, option in wanted:
        try:
            jobs.append(_Job(budget, kind, detail, bench.work.allocate(scores, option)))
        except PlanError as error:
            if kind == OURS:
                raise
            bench.missing.append(f"{budget}: no allocation '{kind}': {error}")
    uniform = _uniform_plan(bench, scores, options)
    if uniform is None:
        bench.missing.append(f"{budget}: no single type is small enough")
    else:
        jobs.append(_Job(budget, UNIFORM, uniform.types[0], uniform))
    return [*jobs, *_equals(bench, jobs, scores, options)]


def _equals(bench: _Bench, jobs: Sequence[_Job], scores: Scores, options: PlanOptions) -> list[_Job]:
    """Return plans of ours at the bytes of those that cannot use the budget: whole layers, or one type for all."""
    sizes = {job.kind: job.plan.tensor_bytes for job in jobs if job.plan is not None}
    found = []
    for kind in (PAPER, UNIFORM):
        if kind in sizes and sizes[kind] < sizes[OURS] * (1 - EQUAL_BYTES):
            target = Target("bpw", exact_bpw(sizes[kind], bench.work.model.n_weights))
            try:
                plan = bench.work.allocate(scores, replace(options, target=target))
            except TargetError as error:
                bench.missing.append(f"{jobs[0].budget}: no plan of ours {_at_bytes_of(kind)}: {error}")
                continue
            found.append(_Job(jobs[0].budget, OURS, _at_bytes_of(kind), plan))
    return found


def _uniform_plan(bench: _Bench, scores: Scores, options: PlanOptions) -> Plan | None:
    """Return the plan of the largest single type within the budget."""
    for type_name in reversed(options.types):
        try:
            return bench.work.allocate(scores, replace(options, allocator="uniform", uniform=type_name))
        except PlanError:
            continue
    return None


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


class _Bench:
    """Measures files one after the other and keeps what it found on disk."""

    def __init__(self, work: Work, folder: Path, verifying: VerifyOptions, text: str) -> None:
        self.work, self.folder, self.verifying, self.text = work, folder, verifying, text
        self.missing: list[str] = []
        self.rows: list[Row] = []
        self.known = self._known()
        if self.known:
            work.report.say(f"{folder / RESULT}: {len(self.known)} files were measured before")

    def scores(self, options: PlanOptions, scoring: ScoreOptions) -> Scores:
        """Return the scores, from an earlier run when they are this model's and were made alike."""
        path = self.folder / _SCORES
        if path.is_file():
            kept = Scores.from_json(read_json(path), str(path))
            alike = (kept.model_id, kept.metric, kept.importance, kept.effort) == (
                self.work.model.model_id,
                scoring.metric,
                options.importance,
                options.effort,
            )
            if alike and _covers(kept, options.types):
                return kept
        scores = self.work.score([options], scoring)
        write_small(path, json.dumps(scores.to_json()))
        return scores

    def run(self, jobs: Sequence[_Job], reference: Path) -> None:
        """Make, measure and remove the file of every job."""
        for job in jobs:
            if job.plan is None:
                continue
            path = self.work.files.path / "measured.gguf"
            try:
                if self._key(job) not in self.known:
                    self.work.write(job.plan, path, f"write {job.budget} {job.kind} {job.detail}".rstrip())
                self.measure(job, path, reference)
            finally:
                path.unlink(missing_ok=True)

    def measure(self, job: _Job, file: Path, reference: Path) -> None:
        """Measure a file, unless it was, and keep the row."""
        key = self._key(job)
        row = self.known.get(key)
        if row is None:
            row = self._measured(job, file, reference, key)
            self.known[key] = row
        self.rows.append(replace(row, budget=job.budget, kind=job.kind, detail=job.detail))
        self._keep()

    def result(self) -> Comparison:
        """Return everything that was measured in this run."""
        return self._comparison(self.rows)

    def _measured(self, job: _Job, file: Path, reference: Path, key: str) -> Row:
        with self.work.report.stage(f"measure {job.budget} {job.kind} {job.detail}".rstrip()) as progress:
            found = perplexity(
                file,
                self.text,
                n_ctx=self.verifying.n_ctx,
                n_chunks=self.verifying.n_chunks,
                n_threads=self.work.n_threads,
                against=reference,
                progress=progress,
            )
        if found.divergence is None:
            raise RecordError(f"{file}: measured without a divergence")
        n_bytes = sum(tensor.n_bytes for tensor in inspect_gguf(file).tensors)
        return Row(
            budget=job.budget,
            kind=job.kind,
            detail=job.detail,
            tensor_bytes=n_bytes,
            bpw=n_bytes * 8 / self.work.model.n_weights,
            ppl=found.ppl,
            ppl_error=found.ppl_error,
            kld=found.divergence.kld_mean,
            kld_error=found.divergence.kld_error,
            same_top=found.divergence.same_top,
            original_ppl=found.divergence.reference_ppl,
            original_ppl_error=found.divergence.reference_ppl_error,
            n_scored_tokens=found.n_scored_tokens,
            predicted=job.plan.predicted_divergence if job.plan else None,
            key=key,
        )

    def _key(self, job: _Job) -> str:
        what = job.plan.digest if job.plan else f"stock {job.budget} {self.work.model.model_id}"
        how = f"{self.verifying.n_ctx} {self.verifying.n_chunks} {llama.llama_build()}"
        return hashlib.sha256(f"{what}\n{how}\n{self.text}".encode()).hexdigest()

    def _known(self) -> dict[str, Row]:
        """Return the rows of an earlier run by key; raises ``RecordError`` when the file is something else."""
        path = self.folder / RESULT
        if not path.is_file():
            return {}
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != COMPARISON_FORMAT:
            raise RecordError(f"{path}: not a comparison; choose another folder or remove it")
        try:
            rows = [Row(**row) for row in data["rows"]]
        except (KeyError, TypeError) as error:
            raise RecordError(f"{path}: damaged: {error}; remove it to start again") from error
        return {row.key: row for row in rows}

    def _comparison(self, rows: Sequence[Row]) -> Comparison:
        model = self.work.model
        return Comparison(
            model_name=model.name,
            model_id=model.model_id,
            n_ctx=self.verifying.n_ctx,
            rows=tuple(rows),
            missing=tuple(self.missing),
            versions={"llama.cpp": llama.llama_build()},
        )

    def _keep(self) -> None:
        """Write what is known: rows of this run, then those of earlier ones that it did not ask for."""
        keys = {row.key for row in self.rows}
        rows = [*self.rows, *(row for key, row in self.known.items() if key not in keys)]
        text = json.dumps(self._comparison(rows).to_json(), indent=1)
        with unfinished(self.folder / RESULT, self.work.files) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _covers(scores: Scores, types: Sequence[str]) -> bool:
    """Tell whether the scores know every type on some tensor: K-quants are not measured where rows do not fit them."""
    measured = {name for cost in scores.costs for name in cost.errors}
    return bool(scores.costs) and set(types) <= measured
