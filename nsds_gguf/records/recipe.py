"""The options of a user, and the recipe: every choice that decides the bytes of an output.

``Options`` may leave choices to the program; a ``Recipe`` is complete. ``session.settle`` turns options into a recipe,
for the command line and for Python. Scores, plans and the keys of a GGUF carry the whole recipe.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

AUTO = "auto"  # leaves a choice to the program

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Target:
    """A budget: ``kind`` says whether ``value`` is bits per weight over all tensors or bytes of the whole file."""

    kind: Literal["bpw", "size"]
    value: float

    def __str__(self) -> str:
        """Return the target as a user writes it."""
        return f"{self.value:g} bpw" if self.kind == "bpw" else f"{int(self.value)} bytes"


@dataclass(frozen=True)
class TensorType:
    """A fixed type for all tensors whose whole name matches the regular expression ``pattern``."""

    pattern: str
    type: str

    def __str__(self) -> str:
        """Return it as ``--tensor-type`` takes it."""
        return f"{self.pattern}={self.type}"


@dataclass(frozen=True)
class Fit:
    """A memory that a file must fit, together with all that llama.cpp keeps besides the weights.

    Attributes:
        memory_bytes: the memory.
        n_ctx: tokens of the context to make room for.
        cache_type: llama.cpp's name of the type of the KV cache.
        projector_bytes: size of a vision or audio part (mmproj) in the same memory.
        owner: what the memory belongs to, where this machine was asked: ``the GPU`` or ``this machine``.

    """

    memory_bytes: int
    n_ctx: int = 4096
    cache_type: str = "f16"
    projector_bytes: int = 0
    owner: str = ""


@dataclass(frozen=True)
class Options:
    """The choices of a user; ``AUTO`` leaves one to ``session.settle``.

    Attributes:
        target_bpw: budget in bits per weight over all tensors; default: none.
        target_size: budget in bytes of the whole file.
        fit: a memory, in place of a budget: the file may take what llama.cpp leaves of it.
        allocator: key of ``allocate.ALLOCATORS``; ``AUTO``: ``uniform`` if ``uniform`` is set, else ``fisher``.
        uniform: type of every matrix, for the allocator ``uniform``.
        types: candidate types; ``None``: the K-quants, and larger types where the budget comes near their sizes.
        tensor_types: fixed types of some tensors; the first match counts.
        rounding: key of ``quantize.ROUNDINGS``.
        calibration: key of ``calibration.CALIBRATIONS``.
        imatrix: importance matrix file of llama.cpp, in place of ``calibration``.
        metric: key of ``metrics.METRICS``: the layer scores that ``score_weight`` and the allocator ``paper`` use.
        se: key of ``metrics.SE_READINGS``: how ``nsds`` reads structural expressiveness.
        score_weight: how much layer scores scale the sensitivities of ``fisher``.
        prefer: key of ``allocate.PREFERENCES``: the tie-breaker between types of about the same cost.
        seed: of random tokens, and of the allocator ``random``.
        device: key of ``compute.BACKENDS``.
        pad: ``on`` pads the residual stream with zeros to a multiple of 256, ``off`` never does; ``AUTO`` pads
            if the budget is out of reach otherwise, or if padding adds little and lowers the predicted divergence.
        calibration_tokens: how many tokens of calibration text the model generates; default: 8192.
        tune_norms: whether to tune the gains of norms to the rounded weights.

    """

    target_bpw: float | None = None
    target_size: int | None = None
    fit: Fit | None = None
    allocator: str = AUTO
    uniform: str | None = None
    types: tuple[str, ...] | None = None
    tensor_types: tuple[TensorType, ...] = ()
    rounding: str = AUTO
    calibration: str = AUTO
    imatrix: Path | None = None
    metric: str = AUTO
    se: str = AUTO
    score_weight: float = 0.0
    prefer: str = "quality"
    seed: int = 0
    device: str = AUTO
    pad: str = AUTO
    calibration_tokens: int | None = None
    tune_norms: bool = False

    @property
    def target(self) -> Target | None:
        """The budget; ``None`` without one. ``session.settle`` refuses two budgets."""
        if self.target_bpw is not None:
            return Target("bpw", self.target_bpw)
        return None if self.target_size is None else Target("size", self.target_size)


@dataclass(frozen=True)
class Recipe:
    """Every choice that, with the model, decides the bytes of an output.

    Attributes:
        target: the budget; ``None`` without one.
        allocator: key of ``allocate.ALLOCATORS``.
        types: candidate types, where rows allow them.
        tensor_types: fixed types of some tensors.
        rounding: key of ``quantize.ROUNDINGS``.
        calibration: key of ``calibration.CALIBRATIONS``, or ``imatrix:`` and the first digits of a file's SHA-256.
        metric: metric of the layer scores; ``None`` when no layer is scored.
        se: reading of structural expressiveness; ``None`` for other metrics than ``nsds``.
        score_weight: how much layer scores scale sensitivities.
        prefer: the tie-breaker between types of about the same cost.
        seed: of the tokens that calibration draws or generates.
        allocation_seed: of the allocator ``random``.
        device: key of ``compute.BACKENDS``.
        padding: ``width`` if the residual stream is padded with zeros (``quantize.padding``), else ``None``.
        calibration_tokens: how many tokens of calibration text the model generates; ``None`` where it generates none.
        tune_norms: whether the gains of norms are tuned to the rounded weights (``quantize.gain_tuning``).

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
    padding: str | None = None
    calibration_tokens: int | None = None
    tune_norms: bool = False

    def to_json(self) -> str:
        """Return the canonical JSON text: the GGUF key ``nsds_gguf.recipe``."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def to(self, target: Target | None) -> Recipe:
        """Return the same recipe for another budget."""
        return replace(self, target=target)

    def facts(self) -> dict[str, str]:
        """Return every choice that has a value as readable text, by name."""
        return {name: text for name, value in vars(self).items() if (text := _text(value))}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None or value is False else str(value)
