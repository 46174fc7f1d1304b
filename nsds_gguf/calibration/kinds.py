"""The table of calibrations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..compute.backend import Tokens
from ..errors import PlanError
from ..records import Float32, Float64, Model
from .evidence import Calibration, Evidence, TokenRequest
from .generated_text import GeneratedText, generated_tokens
from .imatrix import Imatrix
from .norm_gains import NormGains
from .random_tokens import RandomTokens, n_sequences_for, random_tokens


@dataclass(frozen=True)
class CalibrationKind:
    """A calibration that users can choose.

    Attributes:
        name: its name in ``--calibration`` and in records.
        description: one line for ``--help``.
        make: creates it from the evidence.
        tokens: returns the tokens for sensitivities, moments and Hessians.
        shrinkage: of the off-diagonal of its Hessians (``factor_hessian``); ``None``: it cannot serve GPTQ rounding.
        first_positions: whether the first position of a sequence counts in its Hessians.
        is_generated: whether llama.cpp generates its tokens, from the original model.
        n_sequences: returns the number of sequences for sensitivities.

    """

    name: str
    description: str
    make: Callable[[Evidence], Calibration]
    tokens: Callable[[TokenRequest], Tokens] = random_tokens
    shrinkage: float | None = None
    first_positions: bool = False
    is_generated: bool = False
    n_sequences: Callable[[Model], int] = n_sequences_for

    @property
    def has_hessians(self) -> bool:
        """Whether it has Hessians for GPTQ rounding."""
        return self.shrinkage is not None

    @property
    def token_source(self) -> str:
        """Name of the calibration whose tokens it uses: calibrations of one source share sensitivities."""
        return "random" if self.tokens is random_tokens else self.name


@dataclass(frozen=True)
class NoCalibration(RandomTokens):
    """A ``Calibration`` without statistics: equal column weights."""

    def column_moments(self, name: str) -> Float64 | None:
        """Return nothing."""
        return None


class ImatrixFile(RandomTokens):
    """A ``Calibration``: an importance matrix; random tokens for tensors without an entry."""

    def __init__(self, evidence: Evidence) -> None:
        """Take evidence with an importance matrix.

        Raises ``PlanError`` without one, ``RecordError`` if it belongs to another model.
        """
        if evidence.imatrix is None:
            raise PlanError("calibration imatrix: wanted the file of an importance matrix")
        super().__init__(evidence)
        self._imatrix: Imatrix = evidence.imatrix
        self._columns = evidence.imatrix.weights(evidence.model)

    def column_moments(self, name: str) -> Float64 | None:
        """Return the mean squares of the file."""
        found = self._columns.get(name)
        return super().column_moments(name) if found is None else found.astype("f8")

    def column_weights(self, name: str) -> Float32 | None:
        """Return the mean squares of the file unchanged, like llama-quantize."""
        found = self._columns.get(name)
        return super().column_weights(name) if found is None else found

    def note(self) -> str:
        """Return the note on the file and its missing entries."""
        return self._imatrix.note(self.evidence.model)


# Shrinkage of the off-diagonal of Hessians (docs/log.md, 2026-11-25).
SHRINKAGE_RANDOM, SHRINKAGE_GENERATED = 0.3, 0.05

N_SEQUENCES_GENERATED = 8  # sequences of generated text for sensitivities

CALIBRATIONS = {
    kind.name: kind
    for kind in (
        CalibrationKind(
            "random", "random tokens of the vocabulary, common ones more often", RandomTokens,
            shrinkage=SHRINKAGE_RANDOM,
        ),
        CalibrationKind(
            "generated", "text that the model generates itself", GeneratedText, generated_tokens, SHRINKAGE_GENERATED,
            first_positions=True, is_generated=True, n_sequences=lambda _: N_SEQUENCES_GENERATED,
        ),
        CalibrationKind("imatrix", "an importance matrix of llama.cpp, read from a file", ImatrixFile),
        CalibrationKind("norm", "squared gains of the norm before each matrix", NormGains),
        CalibrationKind("none", "no statistics: equal column weights", NoCalibration),
    )
}  # fmt: skip


def find_calibration(name: str) -> CalibrationKind:
    """Return a calibration by name; raise ``PlanError`` if it is unknown."""
    if name not in CALIBRATIONS:
        raise PlanError(f"calibration {name!r} is not known; wanted one of {', '.join(CALIBRATIONS)}")
    return CALIBRATIONS[name]
