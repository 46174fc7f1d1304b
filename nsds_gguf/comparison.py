"""Comparison at equal bytes: our plan, other allocations and llama.cpp's presets, all against the original.

Each file is made, measured and removed before the next one. Every row is written to ``comparison.json`` at once, so
that an interrupted comparison resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import allocate
from .allocate.allocators import PAPER_TYPES
from .allocate.presets import PRESETS
from .errors import OutputError, PlanError, RecordError, TargetError, VerifyError
from .evaluate.inspect import inspect_gguf
from .evaluate.perplexity import Window, perplexity
from .evaluate.texts import ORIGINAL, VerifyOptions, check_vocabulary, embeds, evaluation_text
from .llamacpp import llama
from .quantize.header import header_bytes
from .read.hub import HubName
from .records import Options, Plan, Recipe, Scores, Target, TensorType, read_json
from .records.comparison import (
    COMPARISON_FORMAT,
    OURS,
    PAPER,
    PRESET,
    RANDOM,
    RANDOM_FIXED,
    UNIFORM,
    Comparison,
    Row,
    at_bytes_of,
)
from .session.cluster import open_workers
from .session.original import original_plan
from .session.run import Run
from .session.session import Session
from .session.settle import settle
from .session.source import Source, open_model
from .system.atomic import unfinished, write_small
from .system.filestate import unchanged
from .system.resources import check_disk
from .system.workfolder import WorkFolder

# llama.cpp's K-quant presets that need no importance matrix, smallest first.
PRESET_NAMES = tuple(PRESETS)
DEFAULT_PRESETS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_M")

N_SEEDS = 3  # random allocations per budget

EQUAL_BYTES = 1e-3  # largest relative difference in bytes between compared files

RESULT = "comparison.json"
_SCORES = "scores.json"


@dataclass(frozen=True)
class _Job:
    """One file to measure: its budget, kind, detail and plan."""

    budget: str
    kind: str
    detail: str
    plan: Plan | None  # None: llama.cpp's preset of the budget's name


@dataclass(frozen=True)
class _Aim:
    """One budget: its name, its target, the number of random allocations, and types to fix in some of them."""

    budget: str
    target: Target
    n_seeds: int
    fixed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Budgets:
    """The budgets of a comparison.

    Attributes:
        target_bpw: budgets in bits per weight.
        presets: llama.cpp presets, each with its own bytes as a budget; ``None`` for ``DEFAULT_PRESETS`` where there is
            no other budget.
        n_seeds: random allocations per budget.

    """

    target_bpw: tuple[float, ...] = ()
    presets: tuple[str, ...] | None = None
    n_seeds: int = N_SEEDS

    @property
    def chosen_presets(self) -> tuple[str, ...]:
        """The presets, or the default ones."""
        if self.presets is not None:
            return self.presets
        return () if self.target_bpw else DEFAULT_PRESETS


def compare(
    source: str | Path | HubName | Source,
    folder: Path,
    budgets: Budgets | None = None,
    options: Options | None = None,
    *,
    verifying: VerifyOptions | None = None,
    run: Run | None = None,
) -> Comparison:
    """Measure allocations at equal bytes: ours, others, and llama.cpp's presets, all against the original.

    Args:
        source: as for ``convert``.
        folder: folder for results and temporary files; created if missing.
        budgets: the budgets, including presets.
        options: options of all plans but the presets; without a budget.
        verifying: text, context and chunks; the reference is always the original.
        run: threads and reporter.

    Returns:
        The comparison, which is also written to ``comparison.json``.

    Raises:
        NsdsError: anything that a user can act on; rows measured before are kept.

    """
    budgets, options, run = budgets or Budgets(), options or Options(), run or Run()
    check_presets(budgets.chosen_presets)
    verifying = replace(verifying or VerifyOptions(), reference=ORIGINAL, enabled=True)
    text = evaluation_text(verifying)
    model = open_model(source, run)
    settled = settle(replace(options, target_bpw=1.0, pad="off"), model, scores_layers=True)
    recipe = settled.recipe
    for value in budgets.target_bpw:
        aimed = recipe.to(Target("bpw", value))
        allocate.checked_candidates(model, aimed, header_bytes(model, aimed))
    if embeds(model):
        raise VerifyError(
            f"{model.path}: is an embedding model, which perplexity cannot compare; use convert, which checks files "
            "by the cosine similarity of its embeddings"
        )
    make_folder(folder)
    with ExitStack() as stack:
        files = stack.enter_context(WorkFolder(folder, [RESULT], run.report.say))
        stack.enter_context(unchanged(model.inputs))
        files.open()
        check_vocabulary(model, verifying, text, files)
        session = Session(model, run, files, settled.imatrix, stack.enter_context(open_workers(run, model)))
        check_disk(folder, 2 * original_plan(model).file_bytes, "the original and one file at a time")
        bench = _Bench(session, folder, verifying, text)
        reference = stack.enter_context(session.original())
        scores = bench.scores(recipe)
        aims = [_Aim(str(target), target, budgets.n_seeds) for target in
                (Target("bpw", value) for value in budgets.target_bpw)]  # fmt: skip
        for aim in aims:
            bench.run(_plans(bench, aim, scores, recipe), reference)
        for name in budgets.chosen_presets:
            with _preset_file(session, reference, name) as file:
                found = inspect_gguf(file)
                fixed = {t.name: t.type for t in found.tensors if t.name in ("output.weight", "token_embd.weight")}
                bench.measure(_Job(name, PRESET, "", None), file, reference)
                size = sum(tensor.n_bytes for tensor in found.tensors)
            target = Target("bpw", exact_bpw(size, model.n_weights))
            bench.run(_plans(bench, _Aim(name, target, budgets.n_seeds, fixed), scores, recipe), reference)
    return bench.result()


def check_presets(names: Sequence[str]) -> None:
    """Raise ``PlanError`` for a preset that is not in ``PRESET_NAMES``."""
    unknown = [name for name in names if name not in PRESET_NAMES]
    if unknown:
        raise PlanError(f"--presets {unknown[0]}: not a preset that needs no importance matrix; known: "
                        f"{', '.join(PRESET_NAMES)}")  # fmt: skip


def make_folder(folder: Path) -> None:
    """Create the folder for results; raise ``OutputError`` on failure."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}; choose another folder") from error


def exact_bpw(tensor_bytes: int, n_weights: int) -> float:
    """Return the smallest number of bits per weight whose budget, in whole bytes, is ``tensor_bytes``."""
    bpw = tensor_bytes * 8 / n_weights
    while math.floor(bpw * n_weights / 8) < tensor_bytes:
        bpw = math.nextafter(bpw, math.inf)
    return bpw


@contextmanager
def _preset_file(session: Session, reference: Path, name: str) -> Iterator[Path]:
    """Give the original quantized by a llama.cpp preset; removed on every exit."""
    path = session.files.path / f"preset-{name}.gguf"
    try:
        with session.run.report.stage(f"llama.cpp makes {name}"):
            llama.quantize_preset(reference, path, name, session.run.n_threads)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _plans(bench: _Bench, aim: _Aim, scores: Scores, recipe: Recipe) -> list[_Job]:
    """Return the plans of one budget; add allocations that it does not allow to ``bench.missing``."""
    paper = replace(recipe.to(aim.target), allocator="paper", types=PAPER_TYPES)
    recipe = recipe.to(aim.target) if recipe.score_weight else replace(recipe, target=aim.target, metric=None, se=None)
    randomly = replace(recipe, allocator="random")
    wanted: list[tuple[str, str, Recipe]] = [
        (OURS, "", recipe),
        (PAPER, "", paper),
        *((RANDOM, f"seed {i}", replace(randomly, allocation_seed=i)) for i in range(aim.n_seeds)),
    ]
    if aim.fixed:
        present = {tensor.name for tensor in bench.session.model.tensors}
        fixed = tuple(TensorType(_exactly(name), type_) for name, type_ in aim.fixed.items() if name in present)
        fixing = replace(randomly, tensor_types=fixed)
        wanted += [(RANDOM_FIXED, f"seed {i}", replace(fixing, allocation_seed=i)) for i in range(aim.n_seeds)]
    jobs = []
    for kind, detail, each in wanted:
        try:
            jobs.append(_Job(aim.budget, kind, detail, bench.session.plan(each, scores)))
        except PlanError as error:
            if kind == OURS:
                raise
            bench.missing.append(f"{aim.budget}: no allocation '{kind}': {error}")
    uniform = _uniform_plan(bench, scores, recipe)
    if uniform is None:
        bench.missing.append(f"{aim.budget}: every single type exceeds the budget")
    else:
        jobs.append(_Job(aim.budget, UNIFORM, uniform.recipe.types[0], uniform))
    return [*jobs, *_equals(bench, jobs, scores, recipe)]


def _equals(bench: _Bench, jobs: Sequence[_Job], scores: Scores, recipe: Recipe) -> list[_Job]:
    """Return plans of ours at the bytes of allocations that leave budget unused: whole layers, or a single type."""
    sizes = {job.kind: job.plan.tensor_bytes for job in jobs if job.plan is not None}
    found = []
    for kind in (PAPER, UNIFORM):
        if kind in sizes and sizes[kind] < sizes[OURS] * (1 - EQUAL_BYTES):
            target = Target("bpw", exact_bpw(sizes[kind], bench.session.model.n_weights))
            try:
                plan = bench.session.plan(recipe.to(target), scores)
            except TargetError as error:
                bench.missing.append(f"{jobs[0].budget}: no {OURS} plan {at_bytes_of(kind)}: {error}")
                continue
            found.append(_Job(jobs[0].budget, OURS, at_bytes_of(kind), plan))
    return found


def _uniform_plan(bench: _Bench, scores: Scores, recipe: Recipe) -> Plan | None:
    """Return the plan of the largest single type within the budget."""
    for type_name in reversed(recipe.types):
        try:
            return bench.session.plan(replace(recipe, allocator="uniform", types=(type_name,)), scores)
        except PlanError:
            continue
    return None


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


class _Bench:
    """Measures files one after the other and keeps the rows on disk."""

    def __init__(self, session: Session, folder: Path, verifying: VerifyOptions, text: str) -> None:
        self.session, self.folder, self.verifying, self.text = session, folder, verifying, text
        self.missing: list[str] = []
        self.rows: list[Row] = []
        self.known = self._known()
        if self.known:
            session.run.report.say(f"{folder / RESULT}: {len(self.known)} files are already measured")

    def scores(self, recipe: Recipe) -> Scores:
        """Return the scores; those of an earlier run where model and recipe are the same."""
        path = self.folder / _SCORES
        if path.is_file():
            earlier = Scores.from_json(read_json(path), str(path))
            is_same = earlier.model_id == self.session.model.model_id and earlier.recipe == recipe.to(None)
            if is_same and _covers(earlier, recipe.types):
                return earlier
        scores = self.session.score(recipe)
        write_small(path, json.dumps(scores.to_json()))
        return scores

    def run(self, jobs: Sequence[_Job], reference: Path) -> None:
        """Make, measure and remove the file of every job."""
        for job in jobs:
            if job.plan is None:
                continue
            path = self.session.files.path / "measured.gguf"
            try:
                if self._key(job) not in self.known:
                    self.session.write(job.plan, path, f"write {job.budget} {job.kind} {job.detail}".rstrip())
                self.measure(job, path, reference)
            finally:
                path.unlink(missing_ok=True)

    def measure(self, job: _Job, file: Path, reference: Path) -> None:
        """Measure a file that has no row yet, and keep the row."""
        key = self._key(job)
        row = self.known.get(key)
        if row is None:
            row = self._measured(job, file, reference, key)
            self.known[key] = row
        self.rows.append(replace(row, budget=job.budget, kind=job.kind, detail=job.detail))
        self._keep()

    def result(self) -> Comparison:
        """Return the rows of this run."""
        return self._comparison(self.rows)

    def _measured(self, job: _Job, file: Path, reference: Path, key: str) -> Row:
        with self.session.run.report.stage(f"measure {job.budget} {job.kind} {job.detail}".rstrip()) as progress:
            found = perplexity(
                file,
                self.text,
                Window(self.verifying.n_ctx, self.verifying.n_chunks),
                n_threads=self.session.run.n_threads,
                reference=reference,
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
            bpw=n_bytes * 8 / self.session.model.n_weights,
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
        what = job.plan.digest if job.plan else f"preset {job.budget} {self.session.model.model_id}"
        how = f"{self.verifying.n_ctx} {self.verifying.n_chunks} {llama.llama_build()}"
        return hashlib.sha256(f"{what}\n{how}\n{self.text}".encode()).hexdigest()

    def _known(self) -> dict[str, Row]:
        """Return the rows of an earlier run by key; raise ``RecordError`` for a file of another kind."""
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
        model = self.session.model
        return Comparison(
            model_name=model.name,
            model_id=model.model_id,
            n_ctx=self.verifying.n_ctx,
            rows=tuple(rows),
            missing=tuple(self.missing),
            versions={"llama.cpp": llama.llama_build()},
        )

    def _keep(self) -> None:
        """Write the rows of this run, then the other rows of earlier runs."""
        keys = {row.key for row in self.rows}
        rows = [*self.rows, *(row for key, row in self.known.items() if key not in keys)]
        text = json.dumps(self._comparison(rows).to_json(), indent=1)
        with unfinished(self.folder / RESULT, self.session.files) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _covers(scores: Scores, types: Sequence[str]) -> bool:
    """Return whether some tensor is measured in each type: K-quants are not measured where rows do not fit."""
    measured = {name for cost in scores.costs for name in cost.errors}
    return bool(scores.costs) and set(types) <= measured
