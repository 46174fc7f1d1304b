"""The calibrations that users choose from."""

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
    """A calibration as users choose it.

    Attributes:
        name: what ``--calibration`` and records call it.
        description: one line for ``--help``.
        make: makes it of what is known of the model.
        tokens: returns the tokens that sensitivities, moments and Hessians are taken on.
        shrinkage: share by which its Hessians are mistrusted (``factor_hessian``); ``None``: GPTQ rounding needs more
            than it holds.
        first_positions: whether the first position of a sequence counts in its Hessians.
        is_generated: whether llama.cpp generates its tokens, with the original at hand.
        n_sequences: how many of the tokens' sequences sensitivities are found on.

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
        """Whether GPTQ rounding can take its Hessians."""
        return self.shrinkage is not None

    @property
    def token_source(self) -> str:
        """Name of the calibration whose tokens it takes: sensitivities are the same for all of one source."""
        return "random" if self.tokens is random_tokens else self.name


@dataclass(frozen=True)
class NoCalibration(RandomTokens):
    """A ``Calibration`` that knows nothing: all columns weigh the same."""

    def column_moments(self, name: str) -> Float64 | None:
        """Return nothing."""
        return None


class ImatrixFile(RandomTokens):
    """A ``Calibration``: an importance matrix; random tokens where it has no entry."""

    def __init__(self, evidence: Evidence) -> None:
        """Take evidence with an importance matrix.

        Raises ``PlanError`` without one, ``RecordError`` when it is of another model.
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
        """Return the mean squares of the file as they are, like llama-quantize."""
        found = self._columns.get(name)
        return super().column_weights(name) if found is None else found

    def note(self) -> str:
        """Return which file it is, and what it lacks."""
        return self._imatrix.note(self.evidence.model)


# Of what is off the diagonal of a Hessian: how far it is mistrusted (docs/log.md, 2026-11-25).
SHRINKAGE_RANDOM, SHRINKAGE_GENERATED = 0.3, 0.05

N_SEQUENCES_GENERATED = 8  # of the generated text, that sensitivities are found on

CALIBRATIONS = {
    kind.name: kind
    for kind in (
        CalibrationKind(
            "random", "tokens drawn at random from the vocabulary, common ones more often", RandomTokens,
            shrinkage=SHRINKAGE_RANDOM,
        ),
        CalibrationKind(
            "generated", "text that the model generates itself", GeneratedText, generated_tokens, SHRINKAGE_GENERATED,
            first_positions=True, is_generated=True, n_sequences=lambda _: N_SEQUENCES_GENERATED,
        ),
        CalibrationKind("imatrix", "an importance matrix of llama.cpp, read from a file", ImatrixFile),
        CalibrationKind("norm", "squared gains of the norm in front of each matrix", NormGains),
        CalibrationKind("none", "no statistics: all columns weigh the same", NoCalibration),
    )
}  # fmt: skip


def find_calibration(name: str) -> CalibrationKind:
    """Return a calibration by name; raises ``PlanError`` when there is none."""
    if name not in CALIBRATIONS:
        raise PlanError(f"calibration {name!r} is not known; wanted one of {', '.join(CALIBRATIONS)}")
    return CALIBRATIONS[name]
