"""What calibration finds of one model: tokens, sensitivities, column weights, Hessian factors; each found once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..allocate import ALLOCATORS
from ..calibration.activations import collect
from ..calibration.evidence import Calibration, Evidence, TokenRequest, column_weights
from ..calibration.generated_text import N_TOKENS
from ..calibration.hessians import HessianFiles, callback_hessians, disk_bytes, factor_hessians, multiplied
from ..calibration.imatrix import IMATRIX, Imatrix
from ..calibration.kinds import CalibrationKind, find_calibration
from ..compute.backend import Tokens
from ..compute.decoder import what_is_missing
from ..compute.input_moments import Moments, NamedHessian, Recording
from ..compute.walk import WalkOptions, walk
from ..errors import PlanError
from ..quantize.equalization import Equalization, find_equalization
from ..quantize.hessian_factors import FactorStore
from ..records import Float32, Model, Recipe
from ..sensitivity.moment_propagation import Propagation
from ..sensitivity.sensitivities import sensitivities
from ..system.resources import THREADED_WIDTH, blas_threads, check_disk
from ..system.workfolder import WorkFolder
from .estimate import duration, own_text_seconds
from .run import Run
from .settle import check_imatrix, rounds_by_hessians, weighs_columns

Original = Callable[[], AbstractContextManager[Path]]


class Calibrated:
    """The statistics of one model, by recipe; recipes that calibrate alike share them.

    Models that the pass over tokens can follow are walked once forward, for column moments and Hessians, and once
    back, for Fisher sensitivities; llama.cpp collects moments and Hessians of the others.
    """

    def __init__(
        self, model: Model, run: Run, files: WorkFolder, original: Original, imatrix: Imatrix | None = None
    ) -> None:
        """Take a model, how to work, where files go, what gives the original as a GGUF, and an importance matrix."""
        self.model, self.imatrix = model, imatrix
        self._run, self._files, self._original = run, files, original
        self._tokens: dict[tuple[str, bool], Tokens] = {}
        self._sensitivities: dict[str, Propagation] = {}
        self._callback_moments: dict[str, dict[str, Moments]] = {}
        self._hessians: dict[str, HessianFiles] = {}
        self._equalizations: dict[str, Equalization] = {}
        self._factors: dict[tuple[str, bool], FactorStore] = {}

    def sensitivities(self, recipe: Recipe) -> Propagation:
        """Return sensitivities and column moments on the recipe's tokens; Hessians too where it rounds with them."""
        kind = _kind(recipe)
        key = _tokens_key(kind)
        if key not in self._sensitivities:
            for_hessians = rounds_by_hessians(recipe)
            tokens, options = self._drawn(kind, recipe, for_hessians), self._walk_options(kind, recipe, for_hessians)
            with self._run.report.stage("find sensitivities") as progress, blas_threads(1):
                self._sensitivities[key] = sensitivities(self.model, tokens, options, progress)
        return self._sensitivities[key]

    def equalization(self, recipe: Recipe) -> Equalization:
        """Return the channel equalization: where costs count, and the pass over tokens sees outliers."""
        if not ALLOCATORS[recipe.allocator].needs_costs or what_is_missing(self.model):
            return Equalization()
        key = _tokens_key(_kind(recipe))
        if key not in self._equalizations:
            self._equalizations[key] = find_equalization(self.model, self.sensitivities(recipe).inputs)
        return self._equalizations[key]

    def column_weights(self, recipe: Recipe, types: set[str]) -> Mapping[str, Float32]:
        """Return the column weights that quantizers take for these types, by tensor name, if they take any."""
        if not weighs_columns(recipe, types):
            return {}
        return self.equalization(recipe).weights(column_weights(self.calibration(recipe), self.model))

    def factors(self, recipe: Recipe) -> FactorStore | None:
        """Return the Hessian factors where the recipe rounds with them."""
        if not rounds_by_hessians(recipe):
            return None
        kind = _kind(recipe)
        if kind.shrinkage is None:
            raise PlanError(f"--rounding {recipe.rounding} needs Hessians, which calibration {kind.name} does not have")
        looked_up, equalization = self.sensitivities(recipe).looked_up, self.equalization(recipe)
        key = kind.name, bool(equalization)
        if key not in self._factors:
            folder = self._files.path / f"factors-{len(self._factors)}"
            folder.mkdir(exist_ok=True)
            check_disk(folder, disk_bytes(self.model), "the Hessian factors")
            self._find_hessians(kind, recipe)
            hessians = self.calibration(recipe).hessians()
            with self._run.report.stage("factor Hessians") as progress, blas_threads(1):
                self._factors[key] = factor_hessians(
                    self.model, hessians, FactorStore(folder), kind.shrinkage, looked_up, equalization, progress
                )
        return self._factors[key]

    def calibration(self, recipe: Recipe) -> Calibration:
        """Return the recipe's calibration; raises ``RecordError`` for an importance matrix that was not given."""
        check_imatrix(self.model, recipe, self.imatrix)
        kind, found = _kind(recipe), self.sensitivities(recipe)
        evidence = Evidence(
            self.model,
            self._drawn(kind, recipe, False),
            found.inputs,
            found.gains,
            self._callback_moments.get(kind.name, found.moments),
            lambda: self._taken_hessians(kind, recipe),
            self.imatrix,
        )
        return kind.make(evidence)

    # --- tokens and Hessians --------------------------------------------------------------------------------------

    def _drawn(self, kind: CalibrationKind, recipe: Recipe, for_hessians: bool) -> Tokens:
        """Return the tokens of a calibration; generated text takes long, and more where llama.cpp reads it too."""
        key = kind.name, for_hessians and not kind.is_generated
        if key not in self._tokens:
            request = TokenRequest(
                self.model, self._original, for_hessians, n_threads=self._run.n_threads, seed=recipe.seed
            )
            self._tokens[key] = self._generated(kind, request) if kind.is_generated else kind.tokens(request)
        return self._tokens[key]

    def _generated(self, kind: CalibrationKind, request: TokenRequest) -> Tokens:
        seconds = own_text_seconds(self.model, N_TOKENS)
        self._run.report.say(f"Generating {N_TOKENS:,} tokens of calibration text: about {duration(seconds)}.")
        n_blas = self._run.n_threads if self.model.hparams.n_embd >= THREADED_WIDTH else 1
        with self._original() as path, blas_threads(n_blas):
            with self._run.report.stage("generate text") as progress:
                tokens = kind.tokens(replace(request, progress=progress))
            if what_is_missing(self.model):
                with self._run.report.stage("read generated text") as progress:
                    self._callback_moments[kind.name] = collect(
                        path, tokens.astype(np.int32), n_threads=self._run.n_threads, progress=progress
                    )
        return tokens

    def _walk_options(self, kind: CalibrationKind, recipe: Recipe, for_hessians: bool) -> WalkOptions:
        """Return how tokens go through the model; Hessians go to new files."""
        options = WalkOptions(
            kind.n_sequences(self.model),
            n_threads=self._run.n_threads,
            folder=self._files.path if self._files.is_open else None,
            backend=recipe.device,
        )
        if not for_hessians or what_is_missing(self.model):
            return options
        folder = self._files.path / f"hessians-{kind.name}"
        folder.mkdir(exist_ok=True)
        check_disk(folder, disk_bytes(self.model), "the Hessians")
        self._hessians[kind.name] = files = HessianFiles(folder)
        recording = Recording(frozenset(multiplied(self.model)), kind.first_positions)
        return replace(options, recording=recording, on_hessian=files.add)

    def _find_hessians(self, kind: CalibrationKind, recipe: Recipe) -> None:
        """Walk again where Hessians were not asked for when the tokens were read, or are used up."""
        if kind.name not in self._hessians and not what_is_missing(self.model):
            tokens, options = self._drawn(kind, recipe, True), self._walk_options(kind, recipe, True)
            stage = self._run.report.stage("find Hessians")
            with stage as progress, blas_threads(1), walk(self.model, tokens, options, progress):
                pass

    def _taken_hessians(self, kind: CalibrationKind, recipe: Recipe) -> Iterator[NamedHessian]:
        """Return the Hessians of a calibration's tokens, which are used up then."""
        if kind.name in self._hessians:
            return self._hessians.pop(kind.name).take()
        moments, tokens = self._callback_moments.get(kind.name, {}), self._drawn(kind, recipe, True)
        return callback_hessians(self._original, tokens, moments, multiplied(self.model), self._run.n_threads)


def _kind(recipe: Recipe) -> CalibrationKind:
    return find_calibration("imatrix" if recipe.calibration.startswith(IMATRIX) else recipe.calibration)


def _tokens_key(kind: CalibrationKind) -> str:
    """Return what kinds that read the same tokens have in common."""
    return kind.name if kind.is_generated else "random"
