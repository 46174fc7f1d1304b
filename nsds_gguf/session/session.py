"""A session: the results for one model in a run, each computed once, on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .. import allocate, metrics, read
from ..allocate import ALLOCATORS
from ..calibration.hessians import note as hessian_note
from ..calibration.imatrix import Imatrix
from ..compute.decoder import what_is_missing
from ..errors import told_of
from ..evaluate.embedding import EmbeddingCheck, check_close, compare_embeddings
from ..evaluate.perplexity import Perplexity, Window, check_sane, perplexity
from ..evaluate.structure import verify_structure
from ..evaluate.texts import VerifyOptions, embeds
from ..llamacpp import ggml
from ..quantize import TensorQuantizers, gain_tuning
from ..quantize.header import header_bytes
from ..quantize.measure import measure
from ..quantize.padding import laid_out
from ..quantize.write import Resume, write_gguf
from ..records import Model, Plan, Recipe, Scores
from ..system.filestate import check_unchanged, file_states
from ..system.resources import THREADED_WIDTH, blas_threads, check_disk
from ..system.store import Store
from ..system.workers import Threads, Workers
from ..system.workfolder import WorkFolder
from .agreement import agreement_note, is_acceptable
from .calibrated import Calibrated
from .estimate import MEASURE, SCORE, TUNE, VERIFY, WRITE
from .finished import keep_cost, kept_cost, kept_layers, tell_costs
from .original import fast_plan, is_own_original, original_plan
from .run import Run
from .settle import GENERATED, Settled, weighs_columns


class Session:
    """The stages of one model, each reported.

    Attributes:
        model: the opened model.
        run: threads and reporter.
        files: the folder for large temporary files.
        workers: run the tasks of stages.
        calibrated: the statistics of the model.
        store: records of finished work; ``None`` where the run keeps none.
    """

    def __init__(
        self,
        model: Model,
        run: Run,
        files: WorkFolder,
        imatrix: Imatrix | None = None,
        workers: Workers | None = None,
    ) -> None:
        """Take a model and its run.

        Args:
            model: the model.
            run: threads and reporter.
            files: folder for temporary files.
            imatrix: the importance matrix that recipes name.
            workers: run the tasks of stages; default: the threads of ``run``.

        """
        self.model, self.run, self.files = model, run, files
        self.workers = workers or Threads(run.n_threads)
        self.store: Store | None = None
        if files.has_records:
            self.store = Store(files.records.absolute(), Store.key(model.inputs, model.model_id), run.report.say)
        self.calibrated = Calibrated(model, run, files, self.fast_copy, imatrix, self.store, self.workers)
        self._scores: dict[str, Scores] = {}
        self._open_files: set[Path] = set()

    @contextmanager
    def original(self) -> Iterator[Path]:
        """Give the original as a GGUF for the length of a ``with`` block; nested blocks share the file.

        For a folder or a repaired GGUF it is a temporary file, removed on every exit, and messages name the model
        instead; any other GGUF is its own original.
        """
        if is_own_original(self.model):
            yield self.model.files[0]
            return
        with self._temporary(original_plan(self.model), "original") as path:
            yield path

    @contextmanager
    def fast_copy(self) -> Iterator[Path]:
        """Yield the model as a GGUF that llama.cpp evaluates fast, to generate and read text, in a ``with`` block.

        It is a temporary file of Q8_0, or the original if its matrices are quantized already.
        """
        plan = fast_plan(self.model)
        with self.original() if plan is None else self._temporary(plan, "fast copy") as path:
            yield path

    @contextmanager
    def _temporary(self, plan: Plan, name: str) -> Iterator[Path]:
        """Write a temporary file for the length of a ``with`` block, or share that of an outer one.

        Messages name the model instead of the file.
        """
        path = self.files.path / f"{name.replace(' ', '-')}.gguf"
        if path in self._open_files:
            with told_of(self.model.path, path):
                yield path
            return
        check_disk(self.files.folder, plan.file_bytes, f"the {name}")
        size = f"{plan.file_bytes / 2**20:.0f} MiB"
        self.run.report.say(f"Writing the {name} as a temporary {plan.recipe.types[0]} GGUF of {size}: {path}")
        try:
            self.write(plan, path, f"write {name}")
            self._open_files.add(path)
            with told_of(self.model.path, path):
                yield path
        finally:
            self._open_files.discard(path)
            path.unlink(missing_ok=True)

    # --- scores and plans -----------------------------------------------------------------------------------------

    def score(self, recipe: Recipe, measures: bool = True) -> Scores:
        """Score layers where the recipe has a metric, and measure tensors."""
        layers: tuple[metrics.LayerScore, ...] = ()
        notes: tuple[str, ...] = ()
        if recipe.metric is not None:
            n_threads = self.run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
            with self.run.report.stage(f"{SCORE} ({recipe.metric})") as progress, blas_threads(n_threads):
                store = self.store and self.store.keyed(recipe.metric, recipe.se, recipe.device)
                workers = self.workers if store is None else metrics.RecordedWorkers(self.workers, store)
                layers, notes = kept_layers(
                    store,
                    lambda: metrics.score_layers(
                        self.model, str(recipe.metric), recipe.se, workers, progress, recipe.device
                    ),
                )
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
        found, equalization = self.calibrated.sensitivities(recipe), self.calibrated.equalization(recipe)
        model = laid_out(equalization.applied(self.model), recipe)
        candidates = allocate.candidates(model, recipe.types, recipe.tensor_types)
        columns, factors = self.calibrated.column_weights(recipe, set(recipe.types)), self.calibrated.factors(recipe)
        quantizers = TensorQuantizers(recipe.rounding, columns, factors, recipe.device)
        tensors = allocate.measurable(candidates)
        store = self.store and self.store.keyed(recipe.to(None), ggml.version())
        known = {tensor.name: kept_cost(store, tensor.name) for tensor, _ in tensors}
        unknown = [each for each in tensors if known[each[0].name] is None]
        tell_costs(store, [name for name, cost in known.items() if cost is not None], len(tensors))
        with self.run.report.stage(MEASURE) as progress, blas_threads(1):
            costs = measure(
                unknown,
                quantizers,
                found.sensitivity,
                self.workers,
                progress,
                lambda cost: keep_cost(store, cost),
                found.of_rows,
            )
        known |= {cost.name: cost for cost in costs}
        notes = [*scores.notes, *found.notes]
        if equalization:
            notes.append(equalization.note)
        notes += self._calibration_notes(recipe, set(recipe.types))
        versions = {**scores.versions, "ggml": ggml.version()}
        in_order = tuple(cost for tensor, _ in tensors if (cost := known[tensor.name]) is not None)
        return replace(scores, costs=in_order, notes=tuple(notes), versions=versions)

    def plans(self, settled: Sequence[Settled], scores: Scores | None) -> list[Plan]:
        """Score once, or use ``scores``, and allocate for every budget; of two recipes keep the better plan."""
        known: dict[str | None, Scores | None] = {}
        recipes = [recipe for each in settled for recipe in each.recipes]
        for padding in dict.fromkeys(recipe.padding for recipe in recipes):
            alike = [recipe for recipe in recipes if recipe.padding == padding]
            known[padding] = self._scored(alike) if scores is None else scores
        best = [
            self._best([self.plan(one, known[one.padding], each.notes) for one in each.recipes]) for each in settled
        ]
        if what_is_missing(self.model) or not ALLOCATORS[recipes[0].allocator].predicts:  # no prediction in nats
            return best
        return [plan if is_acceptable(plan) else self._warned(plan, known, scores) for plan in best]

    def _warned(self, plan: Plan, known: dict[str | None, Scores | None], loaded: Scores | None) -> Plan:
        """Return a plan with a note on what its divergence means; the better budget that it names is not padded."""
        recipe = plan.recipe if loaded is not None else replace(plan.recipe, padding=None)
        if recipe.padding not in known:
            known[recipe.padding] = self._scored([recipe])
        scores = known[recipe.padding]
        if scores is None:
            return plan
        return replace(plan, notes=(*plan.notes, agreement_note(self.model, plan, recipe, scores)))

    def _scored(self, recipes: Sequence[Recipe]) -> Scores | None:
        """Return scores for recipes that differ in budget and types alone; ``None`` where they need none."""
        recipe, allocator = recipes[0], ALLOCATORS[recipes[0].allocator]
        if not allocator.needs_costs and not allocator.needs_layers:
            return None
        types = tuple(dict.fromkeys(name for each in recipes for name in each.types))
        return self.score(replace(recipe, types=types), measures=allocator.needs_costs)

    def _best(self, plans: Sequence[Plan]) -> Plan:
        """Return the plan with the least predicted divergence, with a note on all."""
        predicted = [plan.predicted_divergence or 0.0 for plan in plans]
        best = plans[predicted.index(min(predicted))]
        if len(plans) == 1:
            return best
        ways = [
            f"{'without' if p.recipe.padding is None else 'with'} padding: {d:.4f}"
            for p, d in zip(plans, predicted, strict=True)
        ]
        return replace(best, notes=(*best.notes, f"Predicted divergence {', '.join(ways)}."))

    def scores_of(self, plan: Plan) -> Scores | None:
        """Return the scores that a plan of this session was made from; ``None`` where it needed none."""
        return self._scores.get(plan.scores_digest)

    def plan(self, recipe: Recipe, scores: Scores | None, notes: Sequence[str] = ()) -> Plan:
        """Choose the types; add ``notes`` to the plan's."""
        model = laid_out(self.model, recipe)
        with self.run.report.stage(f"allocate for {recipe.target or 'no budget'}"):
            plan = allocate.make_plan(model, scores, recipe, header_bytes(model, recipe))
        if scores is not None:
            self._scores[plan.scores_digest] = scores
        if scores is None or not scores.costs:
            notes = [*notes, *self._calibration_notes(recipe, {tensor.type for tensor in plan.tensors})]
        return replace(plan, notes=(*plan.notes, *notes))

    def _calibration_notes(self, recipe: Recipe, types: set[str]) -> list[str]:
        """Return the notes on column weights and Hessians."""
        notes = []
        factors = self.calibrated.factors(recipe)
        if factors is not None:
            notes.append(hessian_note(self.model, factors))
        if weighs_columns(recipe, types):
            notes.append(self.calibrated.calibration(recipe).note())
        return [note for note in notes if note]

    def generates_text(self, recipe: Recipe, types: set[str]) -> bool:
        """Return whether these types need calibration text that the model generates."""
        return recipe.calibration == GENERATED and weighs_columns(recipe, types)

    # --- files that are finished ----------------------------------------------------------------------------------

    def has_finished(self, path: Path, plan: Plan | None = None) -> bool:
        """Return whether an interrupted run finished an output, of that plan if one is given, and it is unchanged."""
        if self.store is None or not path.exists():
            return False
        found = self.store.get(f"finished files/{path.name}")
        state = file_states([path])[0]
        if found is None or found["state"] != [state.n_bytes, state.mtime_ns]:
            return False
        return plan is None or bool(found["plan"] == plan.digest)

    def note_finished(self, path: Path, plan: Plan) -> None:
        """Record that an output has its name: the next run of the same command does not write it again."""
        if self.store is not None:
            state = file_states([path])[0]
            finished = {"plan": plan.digest, "state": [state.n_bytes, state.mtime_ns]}
            self.store.put(f"finished files/{path.name}", finished)

    # --- the file -------------------------------------------------------------------------------------------------

    def write(self, plan: Plan, path: Path, name: str = WRITE, resumes: bool = False) -> None:
        """Write the file; ``resumes`` continues after the last tensor that an interrupted run completed."""
        recipe, types = plan.recipe, {tensor.type for tensor in plan.tensors}
        columns, factors = self.calibrated.column_weights(recipe, types), self.calibrated.factors(recipe)
        quantizers = TensorQuantizers(recipe.rounding, columns, factors, recipe.device)
        model = laid_out(self.calibrated.equalization(recipe).applied(self.model), recipe)
        with self.run.report.stage(name) as progress, blas_threads(1):
            resume = Resume(Store.key(plan.digest, ggml.version()), self.run.report.say) if resumes else None
            write_gguf(model, plan, quantizers, path, workers=self.workers, progress=progress, resume=resume)
        check_unchanged(model.inputs)

    def tune_norms(self, plan: Plan, path: Path) -> None:
        """Tune the gains of norms in the file of a plan, where its recipe says so."""
        recipe = plan.recipe
        if not recipe.tune_norms:
            return
        model = laid_out(self.calibrated.equalization(recipe).applied(self.model), recipe)
        tokens = self.calibrated.generated_text(recipe)[: gain_tuning.N_SEQUENCES]
        with self.run.report.stage(TUNE) as progress, blas_threads(1), told_of(self.model.path, path):
            quantized = read.open_model(path, None, allow_requantize=True)
            found = gain_tuning.tune_gains(model, quantized, tokens, self.run.n_threads, progress)
            gain_tuning.write_gains(path, found.gains)
        self.run.report.say(found.note)

    def verify(
        self, plan: Plan, path: Path, options: VerifyOptions, text: str, reference: Path | None
    ) -> Perplexity | EmbeddingCheck | None:
        """Check the file against its plan and, if enabled, by its perplexity or embeddings."""
        with self.run.report.stage("verify structure"):
            verify_structure(path, laid_out(self.model, plan.recipe), plan)
        if not options.enabled:
            return None
        if embeds(self.model) and reference is not None:
            return self._verify_embeddings(path, options, text, reference)
        with self.run.report.stage(VERIFY) as progress:
            found = perplexity(
                path,
                text,
                Window(options.n_ctx, options.n_chunks),
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
