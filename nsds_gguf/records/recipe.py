"""What was asked for, and the recipe that it is settled into: everything that decides the bytes of an output.

``Options`` is what a user names or leaves open; ``Recipe`` is the same with nothing left open. ``session.settle`` makes
one from the other, for the command line and for Python alike. Scores, plans and a GGUF's keys carry the recipe whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

AUTO = "auto"  # stands for a choice that is left open

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Target:
    """A budget: ``kind`` says whether ``value`` is bits per weight over all tensors or bytes of the whole file."""

    kind: Literal["bpw", "size"]
    value: float

    def __str__(self) -> str:
        """Return the target as the user would write it."""
        return f"{self.value:g} bpw" if self.kind == "bpw" else f"{int(self.value)} bytes"


@dataclass(frozen=True)
class TensorType:
    """A type that is fixed for all tensors whose whole name matches the regular expression ``pattern``."""

    pattern: str
    type: str

    def __str__(self) -> str:
        """Return it as ``--tensor-type`` takes it."""
        return f"{self.pattern}={self.type}"


@dataclass(frozen=True)
class Options:
    """What a user asks for; ``AUTO`` leaves a choice to ``session.settle``.

    Attributes:
        target_bpw: budget in bits per weight over all tensors; ``None`` for another budget or none.
        target_size: budget in bytes of the whole file.
        allocator: key of ``allocate.ALLOCATORS``; ``AUTO`` for ``fisher``, or ``uniform`` where that type is given.
        uniform: type of every matrix, for the allocator of that name.
        types: types to choose from.
        tensor_types: types that are fixed for some tensors; of several that match, the first counts.
        rounding: key of ``quantize.ROUNDINGS``.
        calibration: key of ``calibration.CALIBRATIONS``.
        imatrix: llama.cpp's importance matrix to calibrate with, in place of ``calibration``.
        metric: key of ``metrics.METRICS``: the layer scores that ``score_weight`` and the allocator ``paper`` use.
        se: key of ``metrics.SE_READINGS``: how ``nsds`` reads structural expressiveness.
        score_weight: weight of the layer scores as a factor on the sensitivities of ``fisher``.
        prefer: key of ``allocate.PREFERENCES``: what decides between types that cost about the same.
        seed: of random tokens, and of the allocator ``random``.
        device: key of ``compute.BACKENDS``.

    """

    target_bpw: float | None = None
    target_size: int | None = None
    allocator: str = AUTO
    uniform: str | None = None
    types: tuple[str, ...] = K_TYPES
    tensor_types: tuple[TensorType, ...] = ()
    rounding: str = AUTO
    calibration: str = AUTO
    imatrix: Path | None = None
    metric: str = AUTO
    se: str = AUTO
    score_weight: float = 0.0
    prefer: str = "quality"
    seed: int = 0
    device: str = "cpu"

    @property
    def target(self) -> Target | None:
        """The budget; ``None`` without one. Both kinds at once are refused by ``session.settle``."""
        if self.target_bpw is not None:
            return Target("bpw", self.target_bpw)
        return None if self.target_size is None else Target("size", self.target_size)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of an output beside the model, settled.

    Attributes:
        target: the budget; ``None`` without one.
        allocator: key of ``allocate.ALLOCATORS``.
        types: types to choose from, where rows allow them.
        tensor_types: types that are fixed for some tensors.
        rounding: key of ``quantize.ROUNDINGS``.
        calibration: key of ``calibration.CALIBRATIONS``, or ``imatrix:`` and the beginning of a file's SHA-256.
        metric: the layer scores that count; ``None`` where no layer is scored.
        se: reading of structural expressiveness; ``None`` for other metrics than ``nsds``.
        score_weight: weight of the layer scores as a factor on sensitivities.
        prefer: what decides between types that cost about the same.
        seed: of the tokens that calibration draws or generates.
        allocation_seed: of the allocator ``random``.
        device: key of ``compute.BACKENDS``.

    """

    target: Target | None
    allocator: str
    types: tuple[str, ...]
    tensor_types: tuple[TensorType, ...]
    rounding: str
    calibration: str
    metric: str | None
    se: str | None
    score_weight: float
    prefer: str
    seed: int
    allocation_seed: int
    device: str

    def to_json(self) -> str:
        """Return the canonical JSON text, which the key ``nsds_gguf.recipe`` of a GGUF holds."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def to(self, target: Target | None) -> Recipe:
        """Return the same recipe for another budget."""
        return replace(self, target=target)

    def facts(self) -> dict[str, str]:
        """Return every choice as text, by name, for people: choices without a value are left out."""
        return {name: text for name, value in vars(self).items() if (text := _text(value))}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
