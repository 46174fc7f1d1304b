"""What scoring and measuring found: one score a layer, one cost a tensor."""

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

    ``nv`` and ``se`` hold the raw value per component (``qk``, ``ov``, ``gate``, ``up``, ``down``, and ``rest``, which
    has no ``se``), ``p_nv`` and ``p_se`` their aggregates in [0, 1], ``None`` where the layer has no component;
    baselines leave these empty and give ``score`` alone, in their own unit.
    """

    layer: int
    score: float
    nv: Mapping[str, float] = field(default_factory=dict)
    se: Mapping[str, float] = field(default_factory=dict)
    p_nv: float | None = None
    p_se: float | None = None


@dataclass(frozen=True)
class TensorCost:
    """What quantizing one tensor costs, without data.

    Attributes:
        name: GGUF name.
        sensitivity: predicted KL divergence (nats per token) per unit of relative error; before the layer factor from
            the scores.
        errors: by type name, ``sum(w * (x - q)**2) / sum(w * x**2)`` over the sampled rows, ``w`` the column
            importance (1 where there is none); with feedback the numerator is ``(x - q)^T H (x - q)``, ``w`` the
            diagonal of H.
        stderr: standard error of each entry of ``errors`` that comes from sampling rows; 0 when all were taken.
        n_rows_sampled: rows that were quantized to measure it.
    """

    name: str
    sensitivity: float
    errors: Mapping[str, float]
    stderr: Mapping[str, float]
    n_rows_sampled: int


@dataclass(frozen=True)
class Scores:
    """Result of scoring, small enough to keep: one score a layer and, when measured, one cost a tensor.

    Attributes:
        recipe: how it was measured; its target is ``None``, its metric where no layer was scored.
        layers: scores of the layers, in order; empty where no layer was scored.
        model_id, model_name: the model that they are of.
        costs: of the tensors; empty where none was measured.
        notes: what the method cannot see of the model, one sentence each.
        versions: of what computed them.

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
        """Build the record from parsed JSON; raises ``RecordError`` naming ``source`` when it does not fit."""
        scores: Scores = built(cls, checked(data, SCORES_FORMAT, source), source)
        return scores

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return digest(self.to_json())
