"""The steps of a conversion: open, settle, check, plan, write, verify. Functions return results and print nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import allocate
from .calibration.imatrix import read_imatrix
from .errors import RecordError, TargetError
from .evaluate.embedding import EmbeddingCheck
from .evaluate.perplexity import Perplexity
from .evaluate.texts import VerifyOptions, check_vocabulary, evaluation_text
from .quantize.header import header_bytes
from .quantize.padding import laid_out
from .quantize.write import projector_bytes
from .read.hub import HubName
from .records import Model, Options, Plan, Projector, Recipe, Scores, Target
from .session.cluster import open_workers
from .session.fit import Fitted, fitted
from .session.loaded import check_scores, checked_plan
from .session.original import reference_name, with_original_at_hand
from .session.outputs import (
    Output,
    check_not_input,
    check_output_folder,
    check_replaceable,
    default_name,
    named,
    output_paths,
)
from .session.projector import ProjectorFile, open_projectors, projector_files, write_projectors
from .session.reference import reference_file
from .session.room import check_room, lacks_room_for_original, largest_file_bytes, tell_time
from .session.run import Run
from .session.session import Session
from .session.settle import Settled, check_imatrix, settle
from .session.source import Source, open_model
from .system.atomic import unfinished
from .system.filestate import check_unchanged, unchanged
from .system.workers import Workers
from .system.workfolder import WorkFolder


@dataclass(frozen=True)
class Converted:
    """A finished file.

    Attributes:
        path: the file.
        plan: the types of its tensors.
        perplexity: the result of the check; ``None`` when it was skipped, or for an embedding model.
        scores: the scores of the plan; ``None`` when the plan was loaded or needed none.
        source: the folder or file that was read; for a model on the Hub, that in its cache.
        reference: the reference of the check: ``ORIGINAL``, ``QUANTIZED_INPUT``, a path, or ``None``.
        notes: notes on the check.
        embedding: the result of the check of an embedding model.
        fitted: the memory that the file fits, where options name one.
        projector: the file of the vision part; ``None`` without one.

    """

    path: Path
    plan: Plan
    perplexity: Perplexity | None
    scores: Scores | None = None
    source: Path | None = None
    reference: str | None = None
    notes: tuple[str, ...] = ()
    embedding: EmbeddingCheck | None = None
    fitted: Fitted | None = None
    projector: Path | None = None


@dataclass(frozen=True)
class Planned:
    """Plans, one per budget, and the scores that they were made from (``None`` for a plan from a file).

    ``fitted`` has the memory that each plan fits, ``None`` for a plan without one.
    ``projectors`` holds the file of the vision part, where ``output`` asks for it.
    """

    plans: list[Plan]
    scores: Scores | None = None
    fitted: tuple[Fitted | None, ...] = ()
    projectors: tuple[ProjectorFile, ...] = ()


@dataclass(frozen=True)
class _Job:
    """One file to make: its settled recipe, its plan where one was loaded, and the memory that it must fit."""

    settled: Settled
    plan: Plan | None = None
    fitted: Fitted | None = None

    def holding(self, plan: Plan) -> Fitted | None:
        return None if self.fitted is None else self.fitted.holding(plan)

    def largest_bytes(self, model: Model) -> int:
        return self.plan.file_bytes if self.plan is not None else largest_file_bytes(model, self.settled.recipe)

    def generates_text(self, session: Session) -> bool:
        recipe = self.settled.recipe
        types = recipe.types if self.plan is None else [tensor.type for tensor in self.plan.tensors]
        return session.generates_text(recipe, set(types))


def convert(
    source: str | Path | HubName | Source,
    options: Options | Sequence[Options],
    *,
    output: Output | str | Path | None = None,
    verifying: VerifyOptions | None = None,
    loaded: Scores | Plan | None = None,
    run: Run | None = None,
) -> list[Converted]:
    """Convert a model to one GGUF per budget; score and measure once.

    Args:
        source: Hugging Face model folder, GGUF file, ``ORG/MODEL`` on the Hub, or a ``Source``.
        options: the options, one entry per budget; with a loaded plan only ``imatrix`` counts.
        output: the output path; ``None`` for the working directory.
        verifying: how to check finished files.
        loaded: scores or a plan from an earlier run, instead of computing them.
        run: threads and reporter.

    Returns:
        One entry per budget, in order.

    Raises:
        NsdsError: anything that a user can act on; no output remains, and a target out of reach is refused before any
            weight is read.

    """
    run, verifying = run or Run(), verifying or VerifyOptions()
    output = output if isinstance(output, Output) else Output(None if output is None else Path(output))
    text = evaluation_text(verifying) if verifying.enabled else ""
    check_output_folder(output)
    model = open_model(source, run)
    projectors = open_projectors(model, output)
    jobs = _jobs(model, options, loaded, run, projectors)
    paths = output_paths([default_name(model, job.settled.recipe) for job in jobs], output)
    vision = projector_files(projectors, paths[0].parent, run)
    beside = [each.path for each in vision]
    check_not_input([*paths, *beside], model)
    results = []
    with ExitStack() as stack:
        files = stack.enter_context(
            WorkFolder(paths[0].parent, [path.name for path in paths], run.report.say, run.resume)
        )
        stack.enter_context(unchanged(model.inputs))
        files.open()
        session = Session(model, run, files, jobs[0].settled.imatrix, stack.enter_context(open_workers(run, model)))
        check_replaceable([*(path for path in paths if not session.has_finished(path)), *beside], output.force)
        check_vocabulary(model, verifying, text, files)
        generates = any(job.generates_text(session) for job in jobs)
        n_bytes = [*(job.largest_bytes(model) for job in jobs), *(each.n_bytes for each in vision)]
        check_room(model, run, files.folder, n_bytes, verifying, generates)
        comparing = with_original_at_hand(model, verifying, generates)
        if run.cluster is None:  # estimates are those of this machine
            tell_time(model, run, [job.plan or job.settled.recipe for job in jobs], comparing, generates)
        plans = _plans(session, jobs, loaded)
        reference = stack.enter_context(reference_file(session, comparing))
        for target, plan, job in zip(paths, plans, jobs, strict=True):
            notes = () if comparing is verifying else lacks_room_for_original(model, plan, verifying.n_ctx)
            compared_with = None if notes else reference
            found = _written(session, plan, target, output, verifying, text, compared_with)
            ppl, embedding = (None, found) if isinstance(found, EmbeddingCheck) else (found, None)
            compared = reference_name(model, comparing) if ppl is not None and ppl.divergence is not None else None
            results.append(
                Converted(
                    path=target,
                    plan=plan,
                    perplexity=ppl,
                    scores=session.scores_of(plan),
                    source=model.path,
                    reference=compared,
                    notes=notes,
                    embedding=embedding,
                    fitted=job.holding(plan),
                    projector=next(iter(beside), None),
                )
            )
        write_projectors(vision, run, files, session.workers)
    return results


def _written(
    session: Session,
    plan: Plan,
    target: Path,
    output: Output,
    verifying: VerifyOptions,
    text: str,
    reference: Path | None,
) -> Perplexity | EmbeddingCheck | None:
    """Write a file, unless an interrupted run finished it, and verify it; return what ``Session.verify`` found."""
    if not session.has_finished(target, plan):
        with unfinished(target, session.files, output.keep_failed, True) as temporary, named(target, temporary, output):
            session.write(plan, temporary, resumes=True)
            session.tune_norms(plan, temporary)
            found = session.verify(plan, temporary, verifying, text, reference)
            check_unchanged(session.model.inputs)
        session.note_finished(target, plan)
        return found
    return session.verify(plan, target, verifying, text, reference)


def plan(
    source: str | Path | HubName | Source,
    options: Options | Sequence[Options],
    *,
    output: Output | None = None,
    loaded: Scores | Plan | None = None,
    run: Run | None = None,
) -> Planned:
    """Return the plans of ``convert``; arguments and errors are the same, but nothing is written."""
    run = run or Run()
    model = open_model(source, run)
    projectors = open_projectors(model, output or Output())
    jobs = _jobs(model, options, loaded, run, projectors)
    vision = projector_files(projectors, Path(), run)
    with _temporary(run, model) as (files, workers):
        session = Session(model, run, files, jobs[0].settled.imatrix, workers)
        plans = _plans(session, jobs, loaded)
        fits = tuple(job.holding(plan) for job, plan in zip(jobs, plans, strict=True))
        return Planned(plans, session.scores_of(plans[0]), fits, tuple(vision))


def score(
    source: str | Path | HubName | Source,
    options: Options | None = None,
    *,
    measures: bool = True,
    run: Run | None = None,
) -> Scores:
    """Return layer scores and, with ``measures``, the error of every tensor in every type.

    Args:
        source: as for ``convert``.
        options: scoring uses ``metric`` and ``se``, the measurement ``types``, ``rounding`` and ``calibration``.
        measures: whether to measure tensors.
        run: threads and reporter.

    Raises:
        NsdsError: anything that a user can act on.

    """
    run = run or Run()
    model = open_model(source, run)
    settled = settle(options or Options(), model, scores_layers=True)
    with _temporary(run, model) as (files, workers):
        return Session(model, run, files, settled.imatrix, workers).score(settled.recipe, measures)


@contextmanager
def _temporary(run: Run, model: Model) -> Iterator[tuple[WorkFolder, Workers]]:
    """Give a work folder in the working directory, and workers, for a model that does not change meanwhile."""
    with (
        WorkFolder(Path(), say=run.report.say) as files,
        unchanged(model.inputs),
        open_workers(run, model) as workers,
    ):
        yield files, workers


def _jobs(
    model: Model,
    options: Options | Sequence[Options],
    loaded: Scores | Plan | None,
    run: Run,
    projectors: Sequence[Projector],
) -> list[_Job]:
    """Return the files to make; refuse impossible targets and fixed types before any weight is read."""
    every = [options] if isinstance(options, Options) else list(options)
    if isinstance(loaded, Plan):
        checked = checked_plan(model, loaded)
        imatrix = next((read_imatrix(each.imatrix) for each in every if each.imatrix is not None), None)
        check_imatrix(model, checked.recipe, imatrix)
        if imatrix is not None and imatrix.name != checked.recipe.calibration:
            raise RecordError(f"the plan was made without {imatrix.name}: drop --imatrix, or plan again with it")
        return [_Job(Settled(checked.recipe, imatrix), checked)]
    check_scores(model, loaded)
    jobs, vision_bytes = [], sum(projector_bytes(each) for each in projectors)
    for each in every:
        aimed, fits = fitted(model, each, run, vision_bytes)
        jobs.append(_Job(settle(aimed, model, loaded), fitted=fits))
    for job in jobs:
        _check_target(model, job.settled.recipe)
    return jobs


def _check_target(model: Model, recipe: Recipe) -> None:
    """Raise ``TargetError`` for a target out of reach; the nearest size counts its own digits in the header."""
    model = laid_out(model, recipe)
    n_header = header_bytes(model, recipe)
    try:
        allocate.checked_candidates(model, recipe, n_header)
    except TargetError:
        if recipe.target is None or recipe.target.kind == "bpw":
            raise
        found = allocate.candidates(model, recipe.types, recipe.tensor_types)
        nearest = n_header + sum(each.cost(each.types[0], padded=True) for each in found)
        n_header = header_bytes(model, recipe.to(Target("size", nearest)))
        allocate.checked_candidates(model, recipe, n_header)
        raise


def _plans(session: Session, jobs: Sequence[_Job], loaded: Scores | Plan | None) -> list[Plan]:
    fixed = [job.plan for job in jobs if job.plan is not None]
    return fixed or session.plans([job.settled for job in jobs], loaded if isinstance(loaded, Scores) else None)
