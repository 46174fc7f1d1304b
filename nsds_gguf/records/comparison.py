"""The record of a comparison: a row per measured file, and statistics over rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import RecordError

COMPARISON_FORMAT = "nsds-gguf comparison 2"

OURS, PAPER, UNIFORM, RANDOM, RANDOM_FIXED, PRESET = (
    "fisher",
    "paper",
    "uniform",
    "random",
    "random, output fixed",
    "preset",
)

KINDS = (OURS, PRESET, PAPER, UNIFORM, RANDOM_FIXED, RANDOM)  # in the order in which they are shown


@dataclass(frozen=True)
class Row:
    """One measured file.

    Attributes:
        budget: the budget: ``3 bpw`` or the name of a preset.
        kind: ``fisher``, ``paper``, ``uniform``, ``random``, ``random, output fixed`` or ``preset``.
        detail: type of ``uniform``, seed of ``random``; otherwise empty.
        tensor_bytes: bytes of all tensors, without padding.
        bpw: bits over the weights of all tensors.
        ppl, ppl_error: perplexity and its standard error.
        kld, kld_error: mean divergence from the original and its standard error, nats per token.
        same_top: share of positions at which both have the same most likely token.
        original_ppl, original_ppl_error: perplexity of the original and its standard error.
        n_scored_tokens: number of scored tokens.
        predicted: divergence that the plan predicts, relative to the other plans; ``None`` for presets.
        key: digest of the file and the measurement; a row with the same key is not measured again.
    """

    budget: str
    kind: str
    detail: str
    tensor_bytes: int
    bpw: float
    ppl: float
    ppl_error: float
    kld: float
    kld_error: float
    same_top: float
    original_ppl: float
    original_ppl_error: float
    n_scored_tokens: int
    predicted: float | None
    key: str


@dataclass(frozen=True)
class Comparison:
    """All rows and their common facts; ``missing`` lists the allocations that a budget does not allow, and why."""

    model_name: str
    model_id: str
    n_ctx: int
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format": COMPARISON_FORMAT, **asdict(self)}

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets in order."""
        return tuple(dict.fromkeys(row.budget for row in self.rows))

    def of(self, budget: str) -> list[Row]:
        """Return the rows of one budget, ours first."""
        return [row for row in self.rows if row.budget == budget]

    def ours(self, budget: str, beside: str = "") -> Row:
        """Return our row of a budget: where the kind ``beside`` takes fewer bytes, the one at those.

        Raises ``RecordError`` when there is none.
        """
        rows = [row for row in self.of(budget) if row.kind == OURS]
        for detail in (at_bytes_of(beside), ""):
            if found := [row for row in rows if row.detail == detail]:
                return found[0]
        raise RecordError(f"the comparison holds no {OURS} row at {budget}")

    def ratios(self, kind: str) -> dict[str, float]:
        """Return, by budget, our divergence over the mean divergence of a kind."""
        found = {}
        for budget in self.budgets:
            others = [row.kld for row in self.of(budget) if row.kind == kind]
            if others:
                found[budget] = self.ours(budget, kind).kld / (sum(others) / len(others))
        return found

    @property
    def prediction_factor(self) -> float | None:
        """Geometric mean factor from predicted to measured divergence; ``None`` without plans."""
        logs = [math.log(row.kld / row.predicted) for row in self.rows if row.predicted and row.kld > 0]
        return math.exp(sum(logs) / len(logs)) if logs else None

    @property
    def prediction_rank_correlation(self) -> float | None:
        """Spearman's rank correlation of predicted and measured divergence; ``None`` for fewer than three plans."""
        pairs = [(row.predicted, row.kld) for row in self.rows if row.predicted is not None]
        if len(pairs) < 3:
            return None
        first, second = (_ranks([pair[i] for pair in pairs]) for i in (0, 1))
        mean = (len(pairs) - 1) / 2
        covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
        spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
        return covariance / spread if spread else None


def at_bytes_of(kind: str) -> str:
    """Return the detail of our row at the bytes of another kind."""
    return f"at the bytes of {kind}"


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 0; ties share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
