"""The statistics of one model: tokens, sensitivities, column weights, Hessian factors; each computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..allocate import ALLOCATORS
from ..calibration import generated_text
from ..calibration.activations import collect
from ..calibration.evidence import Calibration, Evidence, TokenRequest, column_weights
from ..calibration.hessians import (
    HESSIANS,
    FoundHessian,
    HessianFiles,
    Roles,
    callback_hessians,
    disk_bytes,
    factor_hessians,
    multiplied,
    shared_inputs,
)
from ..calibration.imatrix import IMATRIX, Imatrix
from ..calibration.kinds import CalibrationKind, find_calibration
from ..compute.backend import Tokens
from ..compute.decoder import what_is_missing
from ..compute.input_moments import Moments, Recording
from ..compute.pass_records import PASS
from ..compute.walk import WalkOptions, walk
from ..errors import PlanError
from ..llamacpp import llama
from ..quantize import factoring
from ..quantize.equalization import Equalization, find_equalization
from ..quantize.hessian_factors import FACTORS, FactorStore, record_name
from ..records import Float32, Model, Progress, Recipe
from ..sensitivity.moment_propagation import propagate
from ..sensitivity.noise import N_POSITIONS, N_SEQUENCES, noise_divergence, noisy_tensors, with_noise
from ..sensitivity.result import Sensitivities
from ..sensitivity.sensitivities import sensitivities
from ..sensitivity.typical import by_role
from ..system.resources import THREADED_WIDTH, blas_threads, check_disk
from ..system.store import Store
from ..system.workers import Threads, Workers
from ..system.workfolder import WorkFolder
from .estimate import FACTOR, GENERATE, SENSITIVITIES, duration, generation_seconds
from .finished import kept_moments, kept_sensitivities, kept_tokens
from .run import Run
from .settle import check_imatrix, rounds_by_hessians, weighs_columns

FileOf = Callable[[], AbstractContextManager[Path]]

_Source = tuple[str, int, int | None, str]  # whose tokens, of what seed, how many, computed by what


class Calibrated:
    """The statistics of one model, by recipe; recipes with the same calibration share them.

    Where the Fisher pass supports the model, one forward pass yields column moments and Hessians and one backward pass
    Fisher sensitivities; for other models llama.cpp collects moments and Hessians.
    """

    def __init__(
        self,
        model: Model,
        run: Run,
        files: WorkFolder,
        fast_copy: FileOf,
        imatrix: Imatrix | None = None,
        store: Store | None = None,
        workers: Workers | None = None,
    ) -> None:
        """Take a model and its run.

        Args:
            model: the model.
            run: threads and reporter.
            files: folder for temporary files.
            fast_copy: yields the model as a GGUF that generates and reads text, for the length of a ``with`` block.
            imatrix: the importance matrix that recipes name; raises ``RecordError`` when it belongs to another model.
            store: records of finished work; ``None`` for no records.
            workers: run the tasks of stages; default: the threads of ``run``.

        """
        if imatrix is not None:
            imatrix.weights(model)
        self.model, self.imatrix = model, imatrix
        self._run, self._files, self._fast_copy, self._store = run, files, fast_copy, store
        self._workers = workers or Threads(run.n_threads)
        self._tokens: dict[tuple[str, int, int | None, bool], Tokens] = {}
        self._sensitivities: dict[_Source, Sensitivities] = {}
        self._callback_moments: dict[_Source, dict[str, Moments]] = {}
        self._hessians: dict[_Source, HessianFiles] = {}
        self._equalizations: dict[_Source, Equalization] = {}
        self._factors: dict[tuple[_Source, bool], FactorStore] = {}

    def sensitivities(self, recipe: Recipe) -> Sensitivities:
        """Return sensitivities and column moments on the recipe's tokens; collect Hessians too where it needs them."""
        if ALLOCATORS[recipe.allocator].by_role:
            return by_role(self.model)
        kind = _kind(recipe)
        key = _source(recipe)
        if key not in self._sensitivities:
            for_hessians = rounds_by_hessians(recipe)
            tokens = self._drawn(kind, recipe, for_hessians)

            def compute() -> Sensitivities:
                options = self._walk_options(kind, recipe, for_hessians)
                with self._run.report.stage(SENSITIVITIES) as progress, blas_threads(1):
                    if what_is_missing(self.model) and kind.is_generated:
                        return self._by_noise(recipe, tokens, options, progress)
                    found = sensitivities(self.model, tokens, options, progress, self._workers)
                if key in self._hessians:
                    self._hessians[key].put_inputs()
                return found

            store = self._keyed(kind, recipe, recipe.device, for_hessians)
            self._sensitivities[key] = kept_sensitivities(store, f"sensitivities on {kind.name} tokens", compute)
            _drop_pass(store)
        return self._sensitivities[key]

    def _by_noise(self, recipe: Recipe, tokens: Tokens, options: WalkOptions, progress: Progress) -> Sensitivities:
        """Return the sensitivities of a model that the Fisher pass does not support, measured by llama.cpp."""
        propagated = propagate(self.model, workers=self._workers)
        noisy = noisy_tensors(self.model, self._callback_moments[_source(recipe)].keys())
        some = tokens[:N_SEQUENCES, :N_POSITIONS]
        with self._fast_copy() as file:
            divergence = noise_divergence(file, noisy, some, self._run.n_threads, options.records, progress)
        found = with_noise(propagated, self.model, divergence)
        note = (
            "Sensitivities come from noise in one tensor at a time, in llama.cpp: the Fisher pass does not support "
            f"{what_is_missing(self.model)}."
        )
        return replace(found, notes=(note, *found.notes))

    def _keyed(self, kind: CalibrationKind, recipe: Recipe, *parts: object) -> Store | None:
        """Return the store for results that depend on the tokens of a calibration."""
        made_by = llama.llama_build() if kind.is_generated else ""
        tokens = kind.token_source, recipe.seed, recipe.calibration_tokens
        return self._store and self._store.keyed(*tokens, made_by, *parts)

    def equalization(self, recipe: Recipe) -> Equalization:
        """Return the channel equalization; empty where costs do not count or the Fisher pass does not apply."""
        if not ALLOCATORS[recipe.allocator].predicts or what_is_missing(self.model):
            return Equalization()
        key = _source(recipe)
        if key not in self._equalizations:
            found = self.sensitivities(recipe)
            self._equalizations[key] = find_equalization(self.model, found.inputs, found.column_squares)
        return self._equalizations[key]

    def column_weights(self, recipe: Recipe, types: set[str]) -> Mapping[str, Float32]:
        """Return the column weights for the quantizers of these types, by tensor name; empty where none use them."""
        if not weighs_columns(recipe, types):
            return {}
        return self.equalization(recipe).weights(column_weights(self.calibration(recipe), self.model))

    def factors(self, recipe: Recipe) -> FactorStore | None:
        """Return the Hessian factors; ``None`` where the recipe rounds without them."""
        if not rounds_by_hessians(recipe):
            return None
        kind = _kind(recipe)
        if kind.shrinkage is None:
            raise PlanError(f"--rounding {recipe.rounding} needs Hessians; calibration {kind.name} has none")
        looked_up, equalization = self.sensitivities(recipe).looked_up, self.equalization(recipe)
        key = _source(recipe), bool(equalization)
        if key not in self._factors:
            folder = self._files.path.absolute() / f"factors-{len(self._factors)}"
            folder.mkdir(exist_ok=True)
            self._workers.check_sees(folder)
            store = self._keyed(kind, recipe, recipe.device, "factors", key)
            n_kept = 0 if store is None else store.n_bytes(HESSIANS) + store.n_bytes(FACTORS)
            check_disk(folder, disk_bytes(self.model) - n_kept, "the Hessian factors")
            n_threads = self._run.n_threads if self._run.cluster is None else 1  # workers are processes of one thread
            self._factors[key] = factors = FactorStore(folder, store, factoring(recipe.device, n_threads))
            recorded = None if store is None else store.get(FACTORS)
            if recorded is not None and all(factors.recall(names) for names in recorded):
                return factors
            self._find_hessians(kind, recipe, factors)
            hessians, roles = self.calibration(recipe).hessians(), Roles(looked_up, equalization)
            with self._run.report.stage(FACTOR) as progress, blas_threads(1):
                factor_hessians(self.model, hessians, factors, kind.shrinkage, roles, self._workers, progress)
            if store is not None:
                store.put(FACTORS, factors.inputs)
                store.remove_all(HESSIANS)
        return self._factors[key]

    def calibration(self, recipe: Recipe) -> Calibration:
        """Return the recipe's calibration; raise ``RecordError`` without the importance matrix that it names."""
        check_imatrix(self.model, recipe, self.imatrix)
        kind, found = _kind(recipe), self.sensitivities(recipe)
        tokens = self._drawn(kind, recipe, False)
        evidence = Evidence(
            self.model,
            tokens if tokens.size else None,
            found.all_inputs or found.inputs,
            found.gains,
            self._callback_moments.get(_source(recipe), found.moments),
            lambda: self._taken_hessians(kind, recipe),
            self.imatrix,
        )
        return kind.make(evidence)

    def generated_text(self, recipe: Recipe) -> Tokens:
        """Return the text of a recipe whose calibration is generated: ``(n_sequences, n_positions)`` ids."""
        return self._drawn(_kind(recipe), recipe, False)

    # --- tokens and Hessians --------------------------------------------------------------------------------------

    def _drawn(self, kind: CalibrationKind, recipe: Recipe, for_hessians: bool) -> Tokens:
        """Return the tokens of a calibration; none where the Fisher pass does not support the model."""
        if what_is_missing(self.model) and not kind.is_generated:
            return np.zeros((0, 1), np.int64)
        key = kind.token_source, recipe.seed, recipe.calibration_tokens, for_hessians and not kind.is_generated
        if key not in self._tokens:
            request = TokenRequest(
                self.model, self._fast_copy, for_hessians, n_threads=self._run.n_threads, seed=recipe.seed,
                n_tokens=recipe.calibration_tokens,
            )  # fmt: skip
            if kind.is_generated:
                store = self._keyed(kind, recipe)
                self._tokens[key] = kept_tokens(store, "generated text", lambda: self._generated(kind, request))
                if what_is_missing(self.model):
                    self._read_by_llama_cpp(kind, recipe, self._tokens[key])
            else:
                self._tokens[key] = kind.tokens(request)
        return self._tokens[key]

    def _generated(self, kind: CalibrationKind, request: TokenRequest) -> Tokens:
        n_tokens = request.n_tokens or generated_text.N_TOKENS
        seconds = generation_seconds(self.model, n_tokens, self._run.n_threads)
        self._run.report.say(f"Generating {n_tokens:,} tokens of calibration text: about {duration(seconds)}.")
        n_blas = self._run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
        with self._fast_copy(), blas_threads(n_blas), self._run.report.stage(GENERATE) as progress:
            return kind.tokens(replace(request, progress=progress))

    def _read_by_llama_cpp(self, kind: CalibrationKind, recipe: Recipe, tokens: Tokens) -> None:
        """Collect moments by llama.cpp's callback, for a model that the Fisher pass does not support."""

        def compute() -> dict[str, Moments]:
            n_blas = self._run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
            stage = self._run.report.stage("read generated text")
            with self._fast_copy() as path, blas_threads(n_blas), stage as progress:
                return collect(path, tokens.astype(np.int32), n_threads=self._run.n_threads, progress=progress)

        store = self._keyed(kind, recipe)
        self._callback_moments[_source(recipe)] = kept_moments(store, "column statistics of generated text", compute)

    def _walk_options(self, kind: CalibrationKind, recipe: Recipe, for_hessians: bool) -> WalkOptions:
        """Return the options of a walk; Hessians go to files."""
        options = WalkOptions(
            kind.n_sequences(self.model),
            Recording(column_squares=True),
            n_threads=self._run.n_threads,
            folder=self._files.path if self._files.is_open else None,
            backend=recipe.device,
            records=self._keyed(kind, recipe, recipe.device, for_hessians),
        )
        if not for_hessians or what_is_missing(self.model):
            return options
        files = self._hessian_files(kind, recipe)
        recording = Recording(frozenset(multiplied(self.model)), kind.first_positions, column_squares=True)
        return replace(options, recording=recording, on_hessian=files.add, has_hessian=files.recall)

    def _hessian_files(self, kind: CalibrationKind, recipe: Recipe) -> HessianFiles:
        """Return files for the Hessians, none of them taken from the records yet."""
        folder = self._files.path.absolute() / f"hessians-{kind.name}-{recipe.seed}-{recipe.calibration_tokens}"
        folder.mkdir(exist_ok=True)
        store = self._keyed(kind, recipe, recipe.device, True)
        n_kept = 0 if store is None else store.n_bytes(HESSIANS) + store.n_bytes(FACTORS)
        check_disk(folder, disk_bytes(self.model) - n_kept, "the Hessians")
        self._hessians[_source(recipe)] = files = HessianFiles(folder, store)
        return files

    def _find_hessians(self, kind: CalibrationKind, recipe: Recipe, factors: FactorStore) -> None:
        """Take factors and Hessians from the records; walk again where the first walk left none, or they are lost."""
        if what_is_missing(self.model):
            self._find_callback_hessians(kind, recipe, factors)
            return
        if _source(recipe) in self._hessians:
            return
        options = self._walk_options(kind, recipe, True)
        files = self._hessians[_source(recipe)]
        inputs = files.recorded_inputs()
        self._recall(factors, inputs)
        lost = [names for names in inputs if names[0] not in factors.names and not files.recall(names)]
        if inputs and not lost:
            return
        wanted = frozenset(name for names in lost for name in names) or options.recording.hessians
        options = replace(options, recording=replace(options.recording, hessians=wanted))
        stage, tokens = self._run.report.stage("find Hessians"), self._drawn(kind, recipe, True)
        with stage as progress, blas_threads(1), walk(self.model, tokens, options, progress):
            files.put_inputs()
        _drop_pass(options.records)

    def _find_callback_hessians(self, kind: CalibrationKind, recipe: Recipe, factors: FactorStore) -> None:
        """Take factors and Hessians from the records; let llama.cpp's callback collect the others."""
        moments, tokens = self._callback_moments[_source(recipe)], self._drawn(kind, recipe, True)
        files, inputs = self._hessian_files(kind, recipe), shared_inputs(moments, multiplied(self.model))
        self._recall(factors, inputs)
        left = [names for names in inputs if names[0] not in factors.names and not files.recall(names)]
        if not left:
            return
        n_blas = self._run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
        with self._run.report.stage("find Hessians") as progress, blas_threads(n_blas):
            progress(len(inputs) - len(left), len(inputs))
            found = callback_hessians(self._fast_copy, tokens, moments, left, self._run.n_threads)
            for n_done, (names, hessian) in enumerate(found, len(inputs) - len(left) + 1):
                files.add(names, hessian)
                progress(n_done, len(inputs))

    def _recall(self, factors: FactorStore, inputs: Sequence[tuple[str, ...]]) -> None:
        """Take the factors of these inputs that an interrupted run recorded."""
        kept = [record_name(names) for names in inputs if factors.recall(names)]
        if self._store is not None:
            self._store.tell_kept("Hessian factors", kept, len(inputs))

    def _taken_hessians(self, kind: CalibrationKind, recipe: Recipe) -> Iterator[FoundHessian]:
        """Return the Hessians of a calibration's tokens and use them up."""
        return self._hessians.pop(_source(recipe)).take()


def _drop_pass(store: Store | None) -> None:
    """Remove the records of a pass: what it found is kept elsewhere."""
    if store is not None:
        store.remove_all(PASS)


def _kind(recipe: Recipe) -> CalibrationKind:
    return find_calibration("imatrix" if recipe.calibration.startswith(IMATRIX) else recipe.calibration)


def _source(recipe: Recipe) -> _Source:
    """Return what recipes whose statistics are the same have in common."""
    return _kind(recipe).token_source, recipe.seed, recipe.calibration_tokens, recipe.device
