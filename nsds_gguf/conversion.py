"""The pipeline: read -> score -> allocate -> write -> verify, in one straight line.

Nothing here prints: what happens is told to a ``Reporter``, what came out is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from . import allocate
from .allocate import PlanOptions
from .calibration.imatrix import Imatrix
from .evaluate.embedding import EmbeddingCheck
from .evaluate.perplexity import Perplexity
from .evaluate.texts import VerifyOptions, check_vocabulary, evaluation_text
from .llamacpp import llama
from .read.hub import HubName
from .records import Plan, Scores, Target
from .session.loaded import check_scores, checked_plan
from .session.outputs import (
    Output,
    check_not_input,
    check_output_folder,
    default_name,
    named,
    output_paths,
)
from .session.reporter import Reporter, Silent
from .session.session import (
    ScoreOptions,
    Work,
    against_name,
    check_targets,
    lacks_room_for_original,
    largest_file_bytes,
    open_model,
    reference_file,
    settled_options,
    with_original_at_hand,
)
from .system.atomic import unfinished
from .system.filestate import check_unchanged, unchanged
from .system.workfolder import WorkFolder


@dataclass(frozen=True)
class Converted:
    """A finished file, its plan, what the check found (``None`` when it was skipped), and the scores behind the plan.

    The check is ``embedding`` for a model that embeds texts and ``perplexity`` for all others. ``scores`` is ``None``
    when the plan was given or needed none; ``source`` is the folder or file that was read, of a model of the Hub that
    in its cache. ``against`` says what the file was compared with: ``ORIGINAL``, ``QUANTIZED_INPUT``, a path, or
    ``None``; ``notes`` what to know of the check.
    """

    path: Path
    plan: Plan
    perplexity: Perplexity | None
    scores: Scores | None = None
    source: Path | None = None
    against: str | None = None
    notes: tuple[str, ...] = ()
    embedding: EmbeddingCheck | None = None


@dataclass(frozen=True)
class Planned:
    """Plans, one a budget, and the scores that they were made from (``None`` for a plan from a file)."""

    plans: list[Plan]
    scores: Scores | None = None


def convert(
    path: Path | HubName,
    options: Sequence[PlanOptions],
    *,
    scoring: ScoreOptions | None = None,
    verifying: VerifyOptions | None = None,
    output: Output | None = None,
    given: Scores | Plan | None = None,
    pre: str | None = None,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
    n_threads: int | None = None,
    report: Reporter | None = None,
) -> list[Converted]:
    """Convert a model to one GGUF per budget; scoring and measuring are done once.

    Args:
        path: Hugging Face model folder or GGUF file.
        options: one entry per budget; effort and importance may be left open (``effort.AUTO``).
        scoring: how layers are scored; ignored when scores or a plan are given.
        verifying: how finished files are checked.
        output: where files go.
        given: scores or a plan from an earlier run, in place of making them.
        pre: name of the pre-tokenizer, overriding the one recognised.
        allow_requantize: take a GGUF whose weights are quantized already to less than Q8_0.
        imatrix: importance matrix of llama.cpp, for options, scores or a plan whose ``importance`` is its name.
        n_threads: threads for everything; ``None`` for one a core.
        report: who is told.

    Returns:
        One entry per budget, in order.

    Raises:
        NsdsError: anything that a user can act on; no output and no temporary file is left then, and a target out of
            reach is refused before any weight is read.

    """
    scoring, verifying, output = scoring or ScoreOptions(), verifying or VerifyOptions(), output or Output()
    report, n_threads = report or Silent(), n_threads or llama.default_threads()
    told: tuple[str, ...] = ()
    text = evaluation_text(verifying) if verifying.enabled else ""
    check_output_folder(output)
    model = open_model(path, pre, allow_requantize, report)
    if isinstance(given, Plan):
        given = checked_plan(model, given)
    else:
        check_scores(model, given)
        options, told = settled_options(model, options, given)
        check_targets(model, options, given.metric if given else scoring.metric)
    jobs = [given] if isinstance(given, Plan) else options
    paths = output_paths([default_name(model, job) for job in jobs], output)
    check_not_input(paths, model)
    results = []
    with ExitStack() as stack:
        files = stack.enter_context(WorkFolder(paths[0].parent, [path.name for path in paths], report.say))
        stack.enter_context(unchanged(model.inputs))
        files.open()
        check_vocabulary(model, verifying, text, files)
        work = Work(model, n_threads, report, imatrix, told, files)
        writes_text = any(work.needs_text(job) for job in jobs)
        work.check_resources([largest_file_bytes(model, job) for job in jobs], verifying, writes_text)
        comparing = with_original_at_hand(model, verifying, writes_text)
        work.tell_time(given, options, len(paths), comparing, writes_text)
        if writes_text:  # before planning, which needs it too
            stack.enter_context(work.original())
        plans = [given] if isinstance(given, Plan) else work.plans(options, scoring, given)
        reference = stack.enter_context(reference_file(work, comparing))
        for target, plan in zip(paths, plans, strict=True):
            with unfinished(target, files, output.keep_failed) as temporary, named(target, temporary, output):
                work.write(plan, temporary)
                notes = () if comparing is verifying else lacks_room_for_original(model, plan, verifying.n_ctx)
                found = work.verify(plan, temporary, verifying, text, None if notes else reference)
                check_unchanged(model.inputs)
            ppl, embedding = (None, found) if isinstance(found, EmbeddingCheck) else (found, None)
            against = against_name(model, comparing) if ppl is not None and ppl.divergence is not None else None
            results.append(Converted(target, plan, ppl, work.scores, model.path, against, notes, embedding))
    return results


def plan(
    path: Path | HubName,
    options: Sequence[PlanOptions],
    *,
    scoring: ScoreOptions | None = None,
    given: Scores | Plan | None = None,
    pre: str | None = None,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
    n_threads: int | None = None,
    report: Reporter | None = None,
) -> Planned:
    """Return the plans that ``convert`` would carry out; arguments and errors are the same."""
    scoring, report = scoring or ScoreOptions(), report or Silent()
    model = open_model(path, pre, allow_requantize, report)
    if isinstance(given, Plan):
        return Planned([checked_plan(model, given)])
    check_scores(model, given)
    options, told = settled_options(model, options, given)
    check_targets(model, options, given.metric if given else scoring.metric)
    with WorkFolder(Path(), say=report.say) as files, unchanged(model.inputs):
        work = Work(model, n_threads or llama.default_threads(), report, imatrix, told, files)
        return Planned(work.plans(options, scoring, given), work.scores)


def score_model(
    path: Path | HubName,
    scoring: ScoreOptions,
    *,
    types: tuple[str, ...] = allocate.DEFAULT_TYPES,
    importance: str = "sweep",
    effort: str = "normal",
    pre: str | None = None,
    allow_requantize: bool = False,
    imatrix: Imatrix | None = None,
    n_threads: int | None = None,
    report: Reporter | None = None,
) -> Scores:
    """Return layer scores and, with ``scoring.measure``, what every type costs every tensor."""
    report = report or Silent()
    model = open_model(path, pre, allow_requantize, report)
    asked = PlanOptions(Target("none", 0), types=types, importance=importance, effort=effort)
    options, told = settled_options(model, [asked], None) if scoring.measure else ([asked], ())
    with WorkFolder(Path(), say=report.say) as files, unchanged(model.inputs):
        work = Work(model, n_threads or llama.default_threads(), report, imatrix, told, files)
        return work.score(options, scoring)
