"""A plan: the quantization type of every tensor within a budget.

*bpw* is always bits in the file over weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import RecordError
from .json_records import built, checked, digest
from .model import ALIGNMENT_BYTES
from .recipe import Recipe
from .tensor import UNQUANTIZED

PLAN_FORMAT = "nsds-gguf plan 2"


# Why a tensor has its type: the allocator chose it; ``--tensor-type`` fixed it; its rows do not fit the requested
# types; or llama.cpp does not quantize it.
TensorKind = Literal["chosen", "fixed", "fallback", "unquantized"]


@dataclass(frozen=True)
class PlannedTensor:
    """One line of a plan.

    ``n_bytes`` excludes padding. ``error`` is the relative squared error at ``type`` (``None``: not measured),
    ``sensitivity`` the predicted divergence per unit of error, layer factor included; ``reason`` is a short text.
    ``n_zeros`` are zeros that padding added: they do not count as weights.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    kind: TensorKind
    reason: str
    error: float | None = None
    error_stderr: float | None = None
    n_rows_sampled: int | None = None
    sensitivity: float | None = None
    n_zeros: int = 0

    @property
    def n_weights(self) -> int:
        """Number of weights, without zeros of padding."""
        return math.prod(self.shape) - self.n_zeros

    @property
    def padded_bytes(self) -> int:
        """Bytes in the file, alignment padding included."""
        return -(-self.n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Plan:
    """A quantization type for every tensor, and the resulting sizes.

    Attributes:
        recipe: the recipe of the plan.
        tensors: one entry per tensor, in the order of the file.
        header_bytes: bytes before the tensor data: header, metadata, tensor table and padding.
        model_id, model_name: the model.
        gap: proven relative optimality gap of the solver; ``None`` when no solver ran.
        notes: facts that the user must see, one sentence each.
        scores_digest, versions: provenance.
    """

    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    header_bytes: int
    model_id: str
    model_name: str
    gap: float | None = None
    notes: tuple[str, ...] = ()
    scores_digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors, without zeros of padding."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors without padding, as llama.cpp counts them."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.header_bytes + sum(tensor.padded_bytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits of all tensors over weights of all tensors (llama.cpp's definition)."""
        return self.tensor_bytes * 8 / self.n_weights

    @property
    def quantized_bpw(self) -> float:
        """Bits over weights of the quantized tensors alone; 0 without any."""
        quantized = [tensor for tensor in self.tensors if tensor.type not in UNQUANTIZED]
        n_weights = sum(tensor.n_weights for tensor in quantized)
        return sum(tensor.n_bytes for tensor in quantized) * 8 / n_weights if n_weights else 0.0

    @property
    def file_bpw(self) -> float:
        """Bits of the whole file over weights of all tensors."""
        return self.file_bytes * 8 / self.n_weights

    @property
    def unused_bytes(self) -> int:
        """Bytes of the budget that the plan leaves unused; 0 without a budget."""
        target = self.recipe.target
        if target is None:
            return 0
        if target.kind == "bpw":
            return int(target.value * self.n_weights / 8) - self.tensor_bytes
        return int(target.value) - self.file_bytes

    @property
    def predicted_divergence(self) -> float | None:
        """Sum of sensitivity × error over the tensors; ``None`` when not measured."""
        terms = [t.sensitivity * t.error for t in self.tensors if t.error is not None and t.sensitivity is not None]
        return sum(terms) if terms else None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, with sums for other programs."""
        sums = {
            "bpw": self.bpw,
            "quantized_bpw": self.quantized_bpw,
            "file_bpw": self.file_bpw,
            "tensor_bytes": self.tensor_bytes,
            "file_bytes": self.file_bytes,
            "unused_bytes": self.unused_bytes,
        }
        return {"format": PLAN_FORMAT, **asdict(self), "sums": sums}

    @classmethod
    def from_json(cls, data: Any, source: str = "plan") -> Plan:
        """Build the record from parsed JSON; raise ``RecordError`` naming ``source`` when it does not fit."""
        values = checked(data, PLAN_FORMAT, source)
        values.pop("sums", None)
        plan: Plan = built(cls, values, source)
        if plan.n_weights < 1 or any(min(tensor.shape, default=0) < 1 for tensor in plan.tensors):
            raise RecordError(f"{source}: tensors: wanted at least one, with positive sizes; create the plan again")
        return plan

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON without the notes: the same for every way to save one model."""
        return digest({key: value for key, value in self.to_json().items() if key != "notes"})
