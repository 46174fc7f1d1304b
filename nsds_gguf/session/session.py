"""A session: what one model yields in a run, each part computed once, when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import allocate, metrics
from ..allocate import ALLOCATORS
from ..calibration.generated_text import N_TOKENS, OwnText, own_text
from ..calibration.hessians import N_DRAWN, disk_bytes, make_feedbacks
from ..calibration.hessians import note as hessian_note
from ..calibration.imatrix import IMATRIX, Imatrix
from ..compute.decoder import what_is_missing
from ..errors import RecordError, told_of
from ..evaluate.embedding import EmbeddingCheck, check_close, compare_embeddings
from ..evaluate.perplexity import Perplexity, check_sane, perplexity
from ..evaluate.structure import verify_structure
from ..evaluate.texts import VerifyOptions, embeds
from ..llamacpp import ggml
from ..quantize import TensorQuantizers
from ..quantize.equalization import Equalization, find_equalization
from ..quantize.header import header_bytes
from ..quantize.hessian_factors import FactorStore
from ..quantize.measure import measure
from ..quantize.write import write_gguf
from ..records import Float32, Model, Plan, Recipe, Scores
from ..sensitivity.fisher import Tokens, draw_tokens
from ..sensitivity.moment_propagation import Propagation
from ..sensitivity.sensitivities import sensitivities
from ..system.filestate import check_unchanged
from ..system.resources import THREADED_WIDTH, blas_threads, check_disk
from ..system.workfolder import WorkFolder
from .estimate import duration, own_text_seconds
from .original import is_own_original, original_plan
from .run import Run
from .settle import GENERATED, Settled, rounds_by_hessians, weighs_columns

FISHER_SEQUENCES = 8  # of the model's own text that sensitivities are found on
DRAWN_LENGTH = 512  # tokens of a drawn sequence


class Session:
    """The stages on one model, each told to the reporter.

    Attributes:
        model: the opened model.
        run: threads, and who is told.
        files: the folder for large temporary files.
        scores: those that the last plans were made from.

    """

    def __init__(self, model: Model, run: Run, files: WorkFolder, imatrix: Imatrix | None = None) -> None:
        """Take a model, how to work, where temporary files go, and an importance matrix that recipes name."""
        self.model, self.run, self.files, self.imatrix = model, run, files, imatrix
        self.scores: Scores | None = None
        self._imatrix_columns = imatrix.weights(model) if imatrix is not None else {}
        self._propagations: dict[bool, Propagation] = {}
        self._equalizations: dict[bool, Equalization] = {}
        self._factors: dict[tuple[bool, bool], FactorStore] = {}
        self._own_text: OwnText | None = None
        self._original: Path | None = None

    # --- calibration ----------------------------------------------------------------------------------------------

    def propagation(self, own: bool = False) -> Propagation:
        """Return sensitivities and column moments, on drawn tokens or on the model's own text."""
        if own not in self._propagations:
            tokens = self.own_text().tokens[:FISHER_SEQUENCES].astype(np.int64) if own else None
            with self.run.report.stage("find sensitivities") as progress, blas_threads(1):
                folder = self.files.path if self.files.is_open else None
                self._propagations[own] = sensitivities(self.model, self.run.n_threads, progress, tokens, folder)
        return self._propagations[own]

    def equalization(self, recipe: Recipe) -> Equalization:
        """Return how outlier channels are equalized: where costs count and the pass over tokens sees them."""
        if not ALLOCATORS[recipe.allocator].needs_costs or what_is_missing(self.model):
            return Equalization()
        own = recipe.calibration == GENERATED
        if own not in self._equalizations:
            self._equalizations[own] = find_equalization(self.model, self.propagation(own).inputs)
        return self._equalizations[own]

    def factors(self, recipe: Recipe) -> FactorStore | None:
        """Return the Hessian factors where the recipe rounds with them."""
        if not rounds_by_hessians(recipe):
            return None
        own, equalization = recipe.calibration == GENERATED, self.equalization(recipe)
        key = own, bool(equalization)
        if key not in self._factors:
            model, looked_up = equalization.applied(self.model), self.propagation(own).looked_up
            source: Tokens | OwnText
            if own:
                source = replace(self.own_text(), balance=equalization)
            else:
                source = draw_tokens(model, N_DRAWN // DRAWN_LENGTH, DRAWN_LENGTH)
            folder = self.files.path / f"hessians-{len(self._factors)}"
            folder.mkdir(exist_ok=True)
            check_disk(folder, disk_bytes(model), "the Hessian factors")
            with self.run.report.stage("factor Hessians") as progress, blas_threads(1), self._readable(own):
                self._factors[key] = make_feedbacks(model, source, looked_up, folder, self.run.n_threads, progress)
        return self._factors[key]

    def _readable(self, own: bool) -> AbstractContextManager[object]:
        """Give the file that the model's own text is read with again, where it is."""
        return self.original() if own else nullcontext()

    def own_text(self) -> OwnText:
        """Return what the model writes itself, with the moments of its matrices' inputs."""
        if self._own_text is None:
            seconds = own_text_seconds(self.model, N_TOKENS)
            self.run.report.say(f"Generating {N_TOKENS:,} tokens of calibration text: about {duration(seconds)}.")
            with (
                self.original() as path,
                self.run.report.stage("generate text") as progress,
                blas_threads(self.run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1),
            ):
                self._own_text = own_text(path, n_tokens=N_TOKENS, n_threads=self.run.n_threads, progress=progress)
        return self._own_text

    def columns(self, recipe: Recipe, types: set[str]) -> Mapping[str, Float32]:
        """Return the column weights that the quantizers take for these types, if they take any."""
        if not weighs_columns(recipe, types):
            return {}
        return self.equalization(recipe).weights(self._columns(recipe.calibration))

    def _columns(self, calibration: str) -> dict[str, Float32]:
        if calibration == GENERATED:
            return self.own_text().weights(self.model, self.propagation(own=True).importance("random"))
        if not calibration.startswith(IMATRIX):
            return self.propagation().importance(calibration)
        if self.imatrix is None or self.imatrix.name != calibration:
            raise RecordError(f"made with the importance matrix {calibration}: pass that file with --imatrix")
        return {**self.propagation().importance("random"), **self._imatrix_columns}

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
        if is_own_original(self.model):
            yield self.model.files[0]
            return
        plan = original_plan(self.model)
        path = self.files.path / "original.gguf"
        check_disk(self.files.folder, plan.file_bytes, "the original")
        size = f"{plan.file_bytes / 2**20:.0f} MiB"
        self.run.report.say(f"Writing the original as a temporary {plan.recipe.types[0]} GGUF of {size}: {path}")
        try:
            self.write(plan, path, "write original")
            self._original = path
            with told_of(self.model.path, path):
                yield path
        finally:
            self._original = None
            path.unlink(missing_ok=True)

    # --- scores and plans -----------------------------------------------------------------------------------------

    def score(self, recipe: Recipe, measures: bool = True) -> Scores:
        """Score layers where the recipe has a metric, and measure tensors."""
        layers: tuple[metrics.LayerScore, ...] = ()
        notes: tuple[str, ...] = ()
        if recipe.metric is not None:
            n_threads = self.run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
            with self.run.report.stage(f"score layers ({recipe.metric})") as progress, blas_threads(n_threads):
                layers, notes = metrics.score_layers(self.model, recipe.metric, recipe.se, progress)
        scores = Scores(
            recipe=replace(recipe, target=None),
            layers=layers,
            model_id=self.model.model_id,
            model_name=self.model.name,
            notes=notes,
            versions=metrics.versions(),
        )
        return self.measure(scores, recipe) if measures else scores

    def measure(self, scores: Scores, recipe: Recipe) -> Scores:
        """Return the scores with the costs of the tensors added."""
        own = recipe.calibration == GENERATED
        propagation, equalization = self.propagation(own), self.equalization(recipe)
        found = allocate.candidates(equalization.applied(self.model), recipe.types, recipe.tensor_types)
        columns = equalization.weights(self._columns(recipe.calibration)) if recipe.calibration != "none" else {}
        factors = self.factors(recipe)
        quantizers, tensors = TensorQuantizers(recipe.rounding, columns, factors), allocate.measurable(found)
        with self.run.report.stage("measure tensors") as progress, blas_threads(1):
            costs = measure(tensors, quantizers, propagation.sensitivity, self.run.n_threads, progress)
        notes = [*scores.notes, *propagation.notes]
        if equalization:
            notes.append(equalization.note)
        if factors is not None:
            notes.append(hessian_note(self.model, factors))
        if own:
            notes.append(self.own_text().note(self.model))
        versions = {**scores.versions, "ggml": ggml.version()}
        return replace(scores, costs=costs, notes=tuple(notes), versions=versions)

    def plans(self, settled: Sequence[Settled], scores: Scores | None) -> list[Plan]:
        """Score once, unless scores are given, and allocate for every budget; the scores are kept."""
        recipe = settled[0].recipe
        allocator = ALLOCATORS[recipe.allocator]
        if scores is None and (allocator.needs_costs or allocator.needs_layers):
            scores = self.score(recipe, measures=allocator.needs_costs)
        self.scores = scores
        return [self.plan(each.recipe, scores, each.notes) for each in settled]

    def plan(self, recipe: Recipe, scores: Scores | None, notes: Sequence[str] = ()) -> Plan:
        """Choose the types; ``notes`` are added to the plan's."""
        with self.run.report.stage(f"allocate for {recipe.target or 'no budget'}"):
            plan = allocate.make_plan(self.model, scores, recipe, header_bytes(self.model, recipe))
        return replace(plan, notes=(*plan.notes, *notes, *self._calibration_notes(plan, scores)))

    def _calibration_notes(self, plan: Plan, scores: Scores | None) -> list[str]:
        """Return what the user must know of column weights and Hessians, as far as the scores' notes do not say it."""
        recipe = plan.recipe
        if self.imatrix is not None and recipe.calibration == self.imatrix.name:
            return [self.imatrix.note(self.model)]
        if scores is not None and scores.costs:
            return []
        notes = []
        factors = self.factors(recipe)
        if factors is not None:
            notes.append(hessian_note(self.model, factors))
        if self.generates_text(recipe, {tensor.type for tensor in plan.tensors}):
            notes.append(self.own_text().note(self.model))
        return notes

    def generates_text(self, recipe: Recipe, types: set[str]) -> bool:
        """Return whether the model must generate calibration text for these types."""
        return recipe.calibration == GENERATED and weighs_columns(recipe, types)

    # --- the file -------------------------------------------------------------------------------------------------

    def write(self, plan: Plan, path: Path, name: str = "quantize and write") -> None:
        """Write the file."""
        columns = self.columns(plan.recipe, {tensor.type for tensor in plan.tensors})
        quantizers = TensorQuantizers(plan.recipe.rounding, columns, self.factors(plan.recipe))
        model = self.equalization(plan.recipe).applied(self.model)
        with self.run.report.stage(name) as progress, blas_threads(1):
            write_gguf(model, plan, quantizers, path, n_threads=self.run.n_threads, progress=progress)
        check_unchanged(model.inputs)

    def verify(
        self, plan: Plan, path: Path, options: VerifyOptions, text: str, reference: Path | None
    ) -> Perplexity | EmbeddingCheck | None:
        """Check the file against its plan and, unless switched off, by perplexity or by its embeddings."""
        with self.run.report.stage("verify structure"):
            verify_structure(path, self.model, plan)
        if not options.enabled:
            return None
        if embeds(self.model) and reference is not None:
            return self._verify_embeddings(path, options, text, reference)
        with self.run.report.stage("verify perplexity") as progress:
            found = perplexity(
                path,
                text,
                n_ctx=options.n_ctx,
                n_chunks=options.n_chunks,
                n_threads=self.run.n_threads,
                reference=reference,
                progress=progress,
            )
        check_sane(path, found)
        return found

    def _verify_embeddings(self, path: Path, options: VerifyOptions, text: str, reference: Path) -> EmbeddingCheck:
        with self.run.report.stage("verify embeddings") as progress:
            found = compare_embeddings(
                path, reference, text, n_ctx=options.n_ctx, n_threads=self.run.n_threads, progress=progress
            )
        check_close(path, found)
        return found
