"""The stages on one model, each told to the reporter; what several need is computed once."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import allocate, read, score
from ..allocate import PlanOptions
from ..calibration import generated_text, random_tokens
from ..calibration.activations import collect
from ..calibration.evidence import Calibration, Evidence, TokenRequest, column_weights
from ..calibration.hessians import HessianFiles, callback_hessians, disk_bytes, factor_hessians, multiplied
from ..calibration.hessians import note as feedback_note
from ..calibration.imatrix import IMATRIX, Imatrix
from ..calibration.kinds import CalibrationKind, find_calibration
from ..compute.backend import Tokens
from ..compute.decoder import what_is_missing
from ..compute.input_moments import Moments, NamedHessian, Recording
from ..compute.walk import WalkOptions, walk
from ..errors import PlanError, RecordError, told_of
from ..evaluate.embedding import EmbeddingCheck, check_close, compare_embeddings
from ..evaluate.perplexity import Perplexity, check_comparable, check_sane, needed_bytes, perplexity
from ..evaluate.structure import verify_structure
from ..evaluate.texts import (
    ORIGINAL,
    QUANTIZED_INPUT,
    VerifyOptions,
    embeds,
    outline_file,
    predicts,
)
from ..llamacpp import ggml, llama
from ..quantize.equalization import Balance, find_balance
from ..quantize.rounding import Feedbacks
from ..quantize.write import header_bytes, write_gguf
from ..read.gguf_source import SOURCE_TYPES
from ..read.hub import HubName, fetch
from ..records import (
    ALIGNMENT_BYTES,
    SELF,
    UNQUANTIZED,
    Float32,
    Model,
    Plan,
    Scores,
    Target,
)
from ..sensitivity.result import Sensitivities
from ..sensitivity.sensitivities import sensitivities
from ..session.effort import effort_note, settled
from ..session.estimate import duration, estimate_seconds, own_text_seconds
from ..system.filestate import check_unchanged, unchanged
from ..system.resources import THREADED_WIDTH, blas_threads, check_disk, check_memory, lacks_memory
from ..system.workfolder import WorkFolder
from .reporter import Reporter, Silent

# Working memory of scoring and writing, without the page cache: measured in tools/bench/bench.py.
_BASE_MEMORY_BYTES = 400 << 20
_THREAD_MEMORY_BYTES = 48 << 20

# Calibrations by the names that options and records have for them.
_CALIBRATION_OF = {"sweep": "random", SELF: "generated"}

_HESSIAN_TOKENS = random_tokens.N_SEQUENCES_HESSIANS * random_tokens.N_POSITIONS


@dataclass(frozen=True)
class ScoreOptions:
    """How to score: layer ``metric``, reading of SE, and whether tensor costs are measured too."""

    metric: str = "nsds"
    se: str = "product"
    measure: bool = True


class Work:
    """The stages on one model, each told to the reporter.

    Sensitivities, the model's own text and factors for feedback are made once, when first needed. ``scores`` are those
    that the last plans were made from.
    """

    def __init__(
        self,
        model: Model,
        n_threads: int,
        report: Reporter,
        imatrix: Imatrix | None = None,
        notes: tuple[str, ...] = (),
        files: WorkFolder | None = None,
    ) -> None:
        """Take the model, the threads, who is told, an importance matrix of the model, and notes for every plan.

        ``files`` is where large temporary files go: without one, to the working directory for as long as this lives.
        """
        self.model, self.n_threads, self.report, self.notes = model, n_threads, report, notes
        self.imatrix = imatrix
        if imatrix is not None:
            imatrix.weights(model)  # raises before any work when it is of another model
        self.scores: Scores | None = None
        self.files = files or WorkFolder(Path(), say=report.say)
        if files is None:
            weakref.finalize(self, self.files.close)
        self._tokens: dict[tuple[str, bool], Tokens] = {}
        self._propagations: dict[str, Sensitivities] = {}
        self._callback_moments: dict[str, dict[str, Moments]] = {}
        self._hessians: dict[str, HessianFiles] = {}
        self._balances: dict[str, Balance] = {}
        self._feedbacks: dict[tuple[str, bool], Feedbacks] = {}
        self._original: Path | None = None

    def tokens(self, kind: CalibrationKind, for_hessians: bool) -> Tokens:
        """Return the tokens of a calibration; none where nothing reads them, since the pass cannot follow the model."""
        if what_is_missing(self.model) and not kind.is_generated:
            return np.zeros((0, 1), np.int64)
        key = kind.token_source, for_hessians and not kind.is_generated
        if key not in self._tokens:
            if kind.is_generated:
                self._tokens[key] = self._generated(kind)
            else:
                self._tokens[key] = kind.tokens(TokenRequest(self.model, self.original, for_hessians))
        return self._tokens[key]

    def _generated(self, kind: CalibrationKind) -> Tokens:
        n_tokens = generated_text.N_TOKENS
        seconds = own_text_seconds(self.model, n_tokens)
        self.report.say(f"Generating {n_tokens:,} tokens of calibration text: about {duration(seconds)}.")
        n_blas = self.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
        with self.original() as path, blas_threads(n_blas):
            with self.report.stage("generate text") as progress:
                request = TokenRequest(self.model, self.original, n_threads=self.n_threads, progress=progress)
                tokens = kind.tokens(request)
            if what_is_missing(self.model):
                with self.report.stage("read generated text") as progress:
                    self._callback_moments[kind.name] = collect(
                        path, tokens.astype(np.int32), n_threads=self.n_threads, progress=progress
                    )
        return tokens

    def propagation(self, importance: str, for_hessians: bool = False) -> Sensitivities:
        """Return sensitivities and column moments on the tokens of a calibration; Hessians too if they are wanted."""
        kind = _calibration_kind(importance)
        key = kind.token_source
        if key not in self._propagations:
            tokens = self.tokens(kind, for_hessians)
            options = self._walk_options(kind, for_hessians)
            with self.report.stage("find sensitivities") as progress, blas_threads(1):
                self._propagations[key] = sensitivities(self.model, tokens, options, progress)
        return self._propagations[key]

    def _walk_options(self, kind: CalibrationKind, for_hessians: bool) -> WalkOptions:
        """Return how tokens go through the model; Hessians go to new files."""
        folder = self.files.path if self.files.is_open else None
        recording = Recording(column_squares=True)
        options = WalkOptions(kind.n_sequences(self.model), recording, None, self.n_threads, folder)
        if not for_hessians or what_is_missing(self.model):
            return options
        folder = self.files.path / f"hessians-{kind.name}"
        folder.mkdir(exist_ok=True)
        check_disk(folder, disk_bytes(self.model), "GPTQ rounding")
        self._hessians[kind.name] = files = HessianFiles(folder)
        recording = Recording(frozenset(multiplied(self.model)), kind.first_positions, column_squares=True)
        return replace(options, recording=recording, on_hessian=files.add)

    def balance(self, job: PlanOptions | Plan) -> Balance:
        """Return the channel equalization for a job: for ``nsds``, where the pass over tokens sees outliers."""
        if job.allocator != "nsds" or what_is_missing(self.model):
            return Balance()
        key = _calibration_kind(job.importance).token_source
        if key not in self._balances:
            found = self.propagation(job.importance, _rounds_with_feedback(job))
            self._balances[key] = find_balance(self.model, found.inputs, found.column_squares)
        return self._balances[key]

    def feedbacks(self, job: PlanOptions | Plan) -> Feedbacks | None:
        """Return the Hessian factors where the job asks for GPTQ rounding."""
        if not _rounds_with_feedback(job):
            return None
        check_effort(self.model, job)
        kind = _calibration_kind(job.importance)
        if kind.shrinkage is None:
            raise PlanError(f"GPTQ rounding needs Hessians, which calibration {kind.name} does not have")
        looked_up = self.propagation(job.importance, for_hessians=True).looked_up
        balance = self.balance(job)
        key = kind.name, bool(balance)
        if key not in self._feedbacks:
            folder = self.files.path / f"feedback-{len(self._feedbacks)}"
            folder.mkdir(exist_ok=True)
            check_disk(folder, disk_bytes(self.model), "GPTQ rounding")
            self._find_hessians(kind)
            hessians = self.calibration(job.importance).hessians()
            with self.report.stage("factor second moments") as progress, blas_threads(1):
                self._feedbacks[key] = factor_hessians(
                    self.model, hessians, Feedbacks(folder), kind.shrinkage, looked_up, balance, progress
                )
        return self._feedbacks[key]

    def calibration(self, importance: str) -> Calibration:
        """Return the column statistics that an importance stands for.

        Raises ``RecordError`` for an importance matrix that was not given.
        """
        if importance.startswith(IMATRIX) and (self.imatrix is None or self.imatrix.name != importance):
            raise RecordError(f"made with the importance matrix {importance}: pass that file with --imatrix")
        kind = _calibration_kind(importance)
        tokens = self.tokens(kind, False)
        found = self.propagation(importance)
        moments = self._callback_moments.get(kind.name, found.moments)
        evidence = Evidence(
            self.model,
            tokens if tokens.size else None,
            found.inputs,
            found.gains,
            moments,
            lambda: self._taken_hessians(kind),
            self.imatrix,
        )
        return kind.make(evidence)

    def _find_hessians(self, kind: CalibrationKind) -> None:
        """Read the tokens again where Hessians were not asked for when they were read, or are used up."""
        if kind.name not in self._hessians and not what_is_missing(self.model):
            tokens, options = self.tokens(kind, True), self._walk_options(kind, for_hessians=True)
            stage = self.report.stage("find Hessians")
            with stage as progress, blas_threads(1), walk(self.model, tokens, options, progress):
                pass

    def _taken_hessians(self, kind: CalibrationKind) -> Iterator[NamedHessian]:
        """Return the Hessians of a calibration's tokens, which are used up then."""
        if kind.name in self._hessians:
            return self._hessians.pop(kind.name).take()
        moments, tokens = self._callback_moments.get(kind.name, {}), self.tokens(kind, True)
        return callback_hessians(self.original, tokens, moments, multiplied(self.model), self.n_threads)

    def score(self, options: Sequence[PlanOptions], scoring: ScoreOptions) -> Scores:
        """Score layers and, if an allocator needs it, measure tensors."""
        n_threads = self.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
        with self.report.stage(f"score layers ({scoring.metric})") as progress, blas_threads(n_threads):
            scores = score.score_layers(self.model, scoring.metric, scoring.se, progress)
        wanted = next((option for option in options if option.allocator == "nsds"), None)
        return self.measure(scores, wanted) if scoring.measure and wanted is not None else scores

    def plans(self, options: Sequence[PlanOptions], scoring: ScoreOptions, given: Scores | None) -> list[Plan]:
        """Score once, unless scores are given, and allocate for every budget; the scores are kept."""
        needs_scores = any(option.allocator != "uniform" for option in options)
        self.scores = given or (self.score(options, scoring) if needs_scores else None)
        return [self.allocate(self.scores, option) for option in options]

    def measure(self, scores: Scores, options: PlanOptions) -> Scores:
        """Return the scores with the costs of the tensors added."""
        propagation = self.propagation(options.importance, _rounds_with_feedback(options))
        balance = self.balance(options)
        found = allocate.candidates(balance.applied(self.model), options.types, options.pins)
        importance, feedbacks = balance.weights(self.columns(options.importance)), self.feedbacks(options)
        with self.report.stage("measure tensors") as progress, blas_threads(1):
            costs = allocate.measure(found, propagation, importance, self.n_threads, progress, feedbacks)
        versions = {**scores.versions, "ggml": ggml.version()}
        notes = (*scores.notes, *propagation.notes)
        notes += (balance.note,) if balance else ()
        if feedbacks is not None:
            notes += (feedback_note(self.model, feedbacks),)
        if options.importance == SELF:
            notes += (self.calibration(SELF).note(),)
        return replace(
            scores, importance=options.importance, effort=options.effort, costs=costs, notes=notes, versions=versions
        )

    def allocate(self, scores: Scores | None, options: PlanOptions) -> Plan:
        """Choose the types."""
        n_header = _header_bytes(self.model, options, scores.metric if scores else None)
        with self.report.stage(f"allocate for {options.target}"):
            plan = allocate.make_plan(self.model, scores, options, n_header)
        plan = replace(plan, notes=(*plan.notes, *self.notes))
        if self.imatrix is not None and options.importance == self.imatrix.name:
            return replace(plan, notes=(*plan.notes, self.imatrix.note(self.model)))
        feedbacks = None if scores is not None and scores.effort == "high" else self.feedbacks(plan)
        if feedbacks is not None:
            plan = replace(plan, notes=(*plan.notes, feedback_note(self.model, feedbacks)))
        told = scores is not None and scores.importance == SELF
        if self.needs_text(plan) and not told:
            return replace(plan, notes=(*plan.notes, self.calibration(SELF).note()))
        return plan

    @contextmanager
    def original(self) -> Iterator[Path]:
        """Give the original as a GGUF for the length of a ``with`` block; within one, another gives the same file.

        Of a folder, or a GGUF that was mended, it is a temporary file, removed on every exit, and messages name the
        model in its place; any other GGUF is its own original.
        """
        if self._original is not None:
            with told_of(self.model.path, self._original):
                yield self._original
            return
        if self.model.files and not self.model.is_mended:
            yield self.model.files[0]
            return
        plan = reference_plan(self.model)
        path = self.files.path / "original.gguf"
        check_disk(self.files.folder, plan.file_bytes, "the original")
        size = f"{plan.file_bytes / 2**20:.0f} MiB"
        self.report.say(f"Writing the original as a temporary {plan.types[0]} GGUF of {size}: {path}")
        try:
            self.write(plan, path, "write reference")
            self._original = path
            with told_of(self.model.path, path):
                yield path
        finally:
            self._original = None
            path.unlink(missing_ok=True)

    def needs_text(self, job: PlanOptions | Plan) -> bool:
        """Return whether a plan, or one that is made so, takes its column importance from the model's own text."""
        return job.importance == SELF and _weighs_columns(job)

    def importance(self, plan: Plan) -> Mapping[str, Float32]:
        """Return the column weights that the plan's quantizers take, if they take any."""
        if plan.importance == "none" or not _weighs_columns(plan):
            return {}
        return self.balance(plan).weights(self.columns(plan.importance))

    def columns(self, importance: str) -> dict[str, Float32]:
        """Return the column weights that an importance stands for, by tensor name."""
        return column_weights(self.calibration(importance), self.model)

    def check_resources(self, sizes: Sequence[int], verifying: VerifyOptions, writes_text: bool = False) -> None:
        """Check disk and memory for files of these bytes before the heavy work."""
        needs_original = verifying.against == ORIGINAL or (verifying.against is None and embeds(self.model))
        against_original = verifying.enabled and needs_original
        original = original_bytes(self.model) if against_original or writes_text else 0
        reference = original if against_original else 0
        written = 0 if self.model.files and not self.model.is_mended else original
        check_disk(self.files.folder, sum(sizes) + written, "the output" + (" with the reference" if written else ""))
        working = _BASE_MEMORY_BYTES + self.n_threads * _THREAD_MEMORY_BYTES
        check_memory(working, "converting", "close other programs or lower --threads")
        if writes_text:
            check_memory(original + working, "a text by the model itself", "choose another --importance")
        if verifying.enabled:
            remedy = "pass --no-verify" + (" or leave out --against" if reference else "")
            check_memory(max(sizes, default=0) + reference + _BASE_MEMORY_BYTES, "verification", remedy)

    def tell_time(
        self,
        given: Scores | Plan | None,
        options: Sequence[PlanOptions],
        n_files: int,
        verifying: VerifyOptions,
        writes_text: bool = False,
    ) -> None:
        """Tell how long the whole conversion will take, from a short trial on this machine."""
        n_tokens = verifying.n_ctx * (verifying.n_chunks or 0) * n_files * (2 if verifying.against else 1)
        efforts = {given.effort} if isinstance(given, Plan) else {option.effort for option in options}
        seconds = estimate_seconds(
            self.model,
            types=_quantized_types(given) if isinstance(given, Plan) else options[0].allowed_types,
            n_threads=self.n_threads,
            n_files=n_files,
            scores=given is None and any(option.allocator != "uniform" for option in options),
            measures=given is None and any(option.allocator == "nsds" for option in options),
            n_tokens=n_tokens if verifying.enabled else 0,
            n_own_tokens=generated_text.N_TOKENS if writes_text else 0,
            n_feedback_tokens=0 if efforts == {"normal"} else _HESSIAN_TOKENS,
        )
        size = f"{self.model.n_weights / 1e6:.1f} M weights"
        self.report.say(f"{self.model.name}, {size}: about {duration(seconds)} with {self.n_threads} threads.")

    def write(self, plan: Plan, path: Path, name: str = "quantize and write") -> None:
        """Write the file."""
        feedbacks, importance = self.feedbacks(plan), self.importance(plan)
        model = self.balance(plan).applied(self.model)
        with self.report.stage(name) as progress, blas_threads(1):
            write_gguf(model, plan, importance, path, n_threads=self.n_threads, progress=progress, feedbacks=feedbacks)
        check_unchanged(model.inputs)

    def verify(
        self, plan: Plan, path: Path, options: VerifyOptions, text: str, reference: Path | None
    ) -> Perplexity | EmbeddingCheck | None:
        """Check the file against its plan and, unless switched off, by perplexity or by its embeddings."""
        with self.report.stage("verify structure"):
            verify_structure(path, self.model, plan)
        if not options.enabled:
            return None
        if embeds(self.model) and reference is not None:
            return self._verify_embeddings(path, options, text, reference)
        with self.report.stage("verify perplexity") as progress:
            found = perplexity(
                path,
                text,
                n_ctx=options.n_ctx,
                n_chunks=options.n_chunks,
                n_threads=self.n_threads,
                against=reference,
                progress=progress,
            )
        check_sane(path, found)
        return found

    def _verify_embeddings(self, path: Path, options: VerifyOptions, text: str, reference: Path) -> EmbeddingCheck:
        with self.report.stage("verify embeddings") as progress:
            found = compare_embeddings(
                path, reference, text, n_ctx=options.n_ctx, n_threads=self.n_threads, progress=progress
            )
        check_close(path, found)
        return found


def open_model(path: Path | HubName, pre: str | None, allow_requantize: bool, report: Reporter) -> Model:
    """Read the model's headers and tell its notes."""
    if isinstance(path, HubName):
        with report.stage(f"download {path}") as progress:
            path = fetch(path, progress)
    with report.stage("read headers"):
        model = read.open_model(path, pre, allow_requantize)
    for note in model.notes:
        report.say(note)
    return model


def tensor_types_file(plan: Plan) -> str:
    """Return the plan as lines for ``llama-quantize --tensor-type-file``.

    llama-quantize searches for a pattern anywhere in the name and takes the first hit, so patterns are anchored. Its
    base type must be a quantized one (it ignores the file otherwise) that needs no importance matrix: not Q2_K_S.
    """
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) > 1 and tensor.type in ggml.TYPES]
    return "".join(f"^{re.escape(tensor.name)}$={tensor.type.lower()}\n" for tensor in matrices)


def largest_file_bytes(model: Model, job: PlanOptions | Plan) -> int:
    """Return what the file takes at most: the plan's bytes, or the budget where the types can use it all."""
    if isinstance(job, Plan):
        return job.file_bytes
    n_header = _header_bytes(model, job, None)
    found = allocate.open_candidates(model, job, n_header)
    ceiling = n_header + sum(candidate.cost(candidate.types[-1], padded=True) for candidate in found)
    if job.target.kind == "size":
        return min(ceiling, int(job.target.value))
    if job.target.kind == "bpw":
        padding = ALIGNMENT_BYTES * len(found)
        return min(ceiling, n_header + int(job.target.value * model.n_weights / 8) + padding)
    return ceiling


def check_targets(model: Model, options: Sequence[PlanOptions], metric: str) -> None:
    """Refuse impossible targets, pins and efforts before any weight is read."""
    for option in options:
        allocate.open_candidates(model, option, _header_bytes(model, option, metric))
        check_effort(model, option)


def settled_options(
    model: Model, options: Sequence[PlanOptions], given: Scores | None
) -> tuple[list[PlanOptions], tuple[str, ...]]:
    """Return options without ``AUTO`` in effort and importance, and what the user must know of that."""
    notes = {effort_note(model, option) for option in options} - {""} if given is None else set[str]()
    return [settled(model, option, given) for option in options], tuple(sorted(notes))


def check_effort(model: Model, job: PlanOptions | Plan) -> None:
    """Raise ``PlanError`` when a job asks for feedback with drawn tokens of a model that the pass cannot follow."""
    missing = what_is_missing(model) if _rounds_with_feedback(job) and job.importance != SELF else ""
    if missing:
        raise PlanError(
            f"--effort high cannot follow {missing} of {model.name} on its own; pass --importance self, which "
            "llama.cpp computes"
        )


def reference_plan(model: Model) -> Plan:
    """Return the plan of a file at the precision of the source: the type that all matrices share, if any, else F32."""
    dtypes = {tensor.dtype for tensor in model.tensors if tensor.is_matrix}
    uniform = dtypes.pop() if len(dtypes) == 1 and dtypes <= set(ggml.TYPES) else "F32"
    options = PlanOptions(Target("none", 0), "uniform", uniform=uniform, importance="none")
    return allocate.make_plan(model, None, options, _header_bytes(model, options, None))


def original_bytes(model: Model) -> int:
    """Return the bytes of the file, or files, that ``--against original`` compares with."""
    if model.is_mended:
        return reference_plan(model).file_bytes
    return sum(state.n_bytes for state in model.inputs) if model.files else reference_plan(model).file_bytes


def with_original_at_hand(model: Model, options: VerifyOptions, writes_text: bool) -> VerifyOptions:
    """Return options that compare with the original where it is a GGUF anyway and nothing else was asked for."""
    is_at_hand = (bool(model.files) and not model.is_mended) or writes_text
    if options.enabled and options.against is None and is_at_hand and predicts(model):
        return replace(options, against=ORIGINAL)
    return options


def lacks_room_for_original(model: Model, plan: Plan, n_ctx: int) -> tuple[str, ...]:
    """Return a note when the original does not fit in memory beside a finished file."""
    files = (plan.file_bytes, original_bytes(model))
    lacking = lacks_memory(_BASE_MEMORY_BYTES + needed_bytes(files, model.hparams.n_vocab, n_ctx))
    return (f"The KL divergence from the original is not measured: it takes {lacking}.",) if lacking else ()


def against_name(model: Model, options: VerifyOptions) -> str | None:
    """Return what a file was compared with: ``ORIGINAL``, ``QUANTIZED_INPUT`` or the user's path."""
    is_quantized = any(tensor.is_matrix and tensor.dtype not in SOURCE_TYPES for tensor in model.tensors)
    return QUANTIZED_INPUT if options.against == ORIGINAL and model.files and is_quantized else options.against


@contextmanager
def reference_file(work: Work, options: VerifyOptions) -> Iterator[Path | None]:
    """Give the GGUF to compare with: a file of the user's, the original, or none; embeddings have one always."""
    if not options.enabled or (options.against is None and not embeds(work.model)):
        yield None
    elif options.against not in (None, ORIGINAL):
        yield Path(str(options.against))
    else:
        with work.original() as path:
            yield path


def _calibration_kind(importance: str) -> CalibrationKind:
    name = "imatrix" if importance.startswith(IMATRIX) else importance
    return find_calibration(_CALIBRATION_OF.get(name, name))


def _types_of(job: PlanOptions | Plan) -> Sequence[str]:
    return [tensor.type for tensor in job.tensors] if isinstance(job, Plan) else job.allowed_types


def _rounds_with_feedback(job: PlanOptions | Plan) -> bool:
    return job.effort == "high" and not set(_types_of(job)) <= set(UNQUANTIZED)


def _weighs_columns(job: PlanOptions | Plan) -> bool:
    """Return whether any type is rounded to with regard to what columns weigh: ggml's Q8_0 takes the nearest levels."""
    unweighed = {*UNQUANTIZED, "Q8_0"} if job.effort == "normal" else set(UNQUANTIZED)
    return not set(_types_of(job)) <= unweighed


def _quantized_types(plan: Plan) -> list[str]:
    """Return the types that ggml makes of weights in a plan; some tensors may be copied instead."""
    return sorted({tensor.type for tensor in plan.tensors} & set(ggml.TYPES)) or ["F32"]


@contextmanager
def reference_of(
    against: Path | None,
    file: Path,
    text: str,
    n_ctx: int,
    *,
    pre: str | None = None,
    n_threads: int | None = None,
    report: Reporter | None = None,
) -> Iterator[Path | None]:
    """Give the GGUF to compare a finished file with: ``against`` itself, or of a model folder its original.

    The original is a temporary GGUF in the working directory, removed on every exit. The vocabulary, the disk and
    the memory are checked before it is written.

    Args:
        against: a GGUF, a Hugging Face model folder, or ``None`` for no comparison.
        file: the finished file.
        text: what both will read.
        n_ctx: tokens of a chunk of it.
        pre: name of the pre-tokenizer of a folder, overriding the one recognised.
        n_threads: threads to write with; ``None`` for one a core.
        report: who is told.

    Yields:
        The reference.

    Raises:
        NsdsError: the folder holds no model that can be read, another vocabulary, or one too large for this machine.

    """
    if against is None or not against.is_dir():
        yield against
        return
    report = report or Silent()
    model = open_model(against, pre, False, report)
    with WorkFolder(Path.cwd(), say=report.say) as files, unchanged(model.inputs):
        work = Work(model, n_threads or llama.default_threads(), report, files=files)
        _check_comparable(work, file, text, n_ctx)
        n_bytes = original_bytes(model)
        check_disk(files.folder, n_bytes, "the reference")
        working = _BASE_MEMORY_BYTES + work.n_threads * _THREAD_MEMORY_BYTES
        check_memory(n_bytes + file.stat().st_size + working, "a comparison with the original",
                     "close other programs or compare with a smaller GGUF")  # fmt: skip
        with work.original() as reference:
            yield reference


def _check_comparable(work: Work, file: Path, text: str, n_ctx: int) -> None:
    """Check a model as the reference of a file by its vocabulary alone; errors name the model's own path."""
    with outline_file(work.model, work.files) as path:
        check_comparable(file, path, text, n_ctx)


def _header_bytes(model: Model, option: PlanOptions, metric: str | None) -> int:
    if option.allocator == "uniform":
        metric = None
    return header_bytes(
        model,
        allocator=option.allocator,
        target=option.target,
        importance=option.importance,
        metric=metric,
        effort=option.effort,
    )
