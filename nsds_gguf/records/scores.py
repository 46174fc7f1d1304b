"""Scores: one score per layer, one cost per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .json_records import built, checked, digest
from .recipe import Recipe

SCORES_FORMAT = "nsds-gguf scores 2"


@dataclass(frozen=True)
class LayerScore:
    """Sensitivity of one layer; higher = more sensitive.

    ``nv`` and ``se`` hold the raw value of each component (``qk``, ``ov``, ``gate``, ``up``, ``down``, and ``rest``,
    which has no ``se``), ``p_nv`` and ``p_se`` their aggregates in [0, 1], ``None`` for a layer without components.
    Baselines set ``score`` alone, in their own unit.
    """

    layer: int
    score: float
    nv: Mapping[str, float] = field(default_factory=dict)
    se: Mapping[str, float] = field(default_factory=dict)
    p_nv: float | None = None
    p_se: float | None = None


@dataclass(frozen=True)
class TensorCost:
    """The cost of quantizing one tensor.

    Attributes:
        name: GGUF name.
        sensitivity: predicted KL divergence (nats per token) per unit of relative error, without the layer factor.
        errors: by type name, ``sum(w * (x - q)**2) / sum(w * x**2)`` over the sampled rows, ``w`` the column weights
            (default: 1); for GPTQ the numerator is ``(x - q)^T H (x - q)``, ``w`` the diagonal of H.
        stderr: standard error of each entry of ``errors`` from sampling rows; 0 when all rows were measured.
        n_rows_sampled: number of rows that were measured.
    """

    name: str
    sensitivity: float
    errors: Mapping[str, float]
    stderr: Mapping[str, float]
    n_rows_sampled: int


@dataclass(frozen=True)
class Scores:
    """Result of scoring: one score per layer and, when measured, one cost per tensor.

    Attributes:
        recipe: the recipe of the measurement; its target is ``None``, and its metric when no layer was scored.
        layers: scores of the layers, in order; empty when no layer was scored.
        model_id, model_name: the model.
        costs: of the tensors; empty when none was measured.
        notes: parts of the model that the method cannot see, one sentence each.
        versions: of the programs that computed them.

    """

    recipe: Recipe
    layers: tuple[LayerScore, ...]
    model_id: str
    model_name: str
    costs: tuple[TensorCost, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format": SCORES_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, source: str = "scores") -> Scores:
        """Build the record from parsed JSON; raise ``RecordError`` naming ``source`` when it does not fit."""
        scores: Scores = built(cls, checked(data, SCORES_FORMAT, source), source)
        return scores

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return digest(self.to_json())
