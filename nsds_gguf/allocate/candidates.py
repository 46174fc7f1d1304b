"""The types open to each tensor, their bytes, and the smallest budget.

llama.cpp's rules that matter here: tensors that it does not quantize (vectors, norms, routers, ...) are F32 or, where
its kernels take any type, keep the type of a GGUF input; a row must be whole blocks. K-quants have blocks of 256
weights; a row that is not a multiple of 256 chooses among the types with blocks of 32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PlanError, TargetError
from ..llamacpp import ggml
from ..llamacpp.rules import kept_reason, needs_f32
from ..records import ALIGNMENT_BYTES, COPIED_TYPES, K_TYPES, Model, Target, Tensor, TensorKind, TensorType

# Types that budgets near the largest K-quants add to them, step by step. The two floats have the same bytes: a tensor
# takes the one with less error, F16 unless its weights leave that range or are stored as BF16.
LARGER_TYPES = (("Q8_0",), ("F16", "BF16"))

LAST_RESORT = "F16"  # for rows that no block divides, as in llama.cpp


@dataclass(frozen=True)
class Candidate:
    """One tensor and the types open to it, smallest first; ``kind`` and ``reason`` say what limits the choice."""

    tensor: Tensor
    types: tuple[str, ...]
    kind: TensorKind = "chosen"
    reason: str = ""

    @property
    def is_open(self) -> bool:
        """True when there is more than one type to choose from."""
        return len(self.types) > 1

    def n_bytes(self, type_name: str) -> int:
        """Bytes of the tensor in a type, without padding."""
        return self.tensor.n_rows * ggml.row_bytes(type_name, self.tensor.n_cols)

    def cost(self, type_name: str, padded: bool) -> int:
        """Bytes that count against the budget; with padding when the budget is a file size."""
        n_bytes = self.n_bytes(type_name)
        return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if padded else n_bytes


def parse_tensor_type(text: str) -> TensorType:
    """Parse ``REGEX=TYPE``; raises ``PlanError`` for anything else."""
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern:
        raise PlanError(f"--tensor-type {text!r}: wanted REGEX=TYPE, for example 'blk\\.0\\..*=Q6_K'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise PlanError(f"--tensor-type {text!r}: not a regular expression: {error}") from error
    return TensorType(pattern, check_type(name, f"--tensor-type {text!r}"))


def fitting_type(wanted: str, candidate: Candidate) -> str:
    """Return the type, or its fallback where the rows do not fit it."""
    n_cols = candidate.tensor.n_cols
    return next(
        (name for name in (wanted, ggml.TYPES[wanted].fallback or wanted) if ggml.fits(name, n_cols)), LAST_RESORT
    )


def check_type(name: str, where: str) -> str:
    """Return the type's name in upper case; raise ``PlanError`` for a type that is not supported."""
    if name.upper() not in ggml.TYPES:
        raise PlanError(f"{where}: type {name!r} is not known; wanted one of {', '.join(ggml.TYPES)}")
    return name.upper()


def candidates(model: Model, types: Sequence[str], fixed: Sequence[TensorType] = ()) -> list[Candidate]:
    """Return the candidate types of every tensor of the model, in file order; the first fixed type that matches counts.

    Raises:
        PlanError: a fixed type matches no tensor that may be quantized, or does not fit the tensor's rows.

    """
    for one in fixed:
        matched = [tensor for tensor in model.tensors if re.fullmatch(one.pattern, tensor.name)]
        if all(kept_reason(tensor, model.architecture) for tensor in matched):
            stays = _kept_type(model, matched[0]) if matched else ""
            why = f"only tensors that stay {stays}, such as {matched[0].name}" if matched else "no tensor"
            raise PlanError(f"--tensor-type '{one}' matches {why} (the pattern must match the whole name)")
    return [_candidate(model, tensor, types, fixed) for tensor in model.tensors]


def default_types(
    model: Model, target: Target | None, fixed: Sequence[TensorType], header_bytes: int
) -> tuple[str, ...]:
    """Return the candidate types of a budget: the K-quants, and ``LARGER_TYPES`` where it comes near their sizes.

    A step is added where the budget holds every tensor at the second largest of the types so far: below that, bytes
    reduce more divergence elsewhere. Without a budget all are added.
    """
    types: tuple[str, ...] = K_TYPES
    if target is None:
        return types + tuple(name for larger in LARGER_TYPES for name in larger)
    if not math.isfinite(target.value):
        return types
    budget, padded = budget_bytes(target, model.n_weights, header_bytes) or 0, target.kind == "size"
    for larger in LARGER_TYPES:
        found = candidates(model, types, fixed)
        is_any_open = any(each.is_open for each in found)
        if not is_any_open or budget < sum(each.cost(each.types[-2 if each.is_open else 0], padded) for each in found):
            break
        types += larger
    return types


def measurable(found: Sequence[Candidate]) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Return the matrices that may be quantized, each with the types to measure, even if only one."""
    return [(each.tensor, each.types) for each in found if each.kind != "unquantized" and each.types != ("F32",)]


def _candidate(model: Model, tensor: Tensor, types: Sequence[str], fixed: Sequence[TensorType]) -> Candidate:
    if tensor.dtype in COPIED_TYPES:
        return Candidate(tensor, (tensor.dtype,), "unquantized", "no weights")
    kept = kept_reason(tensor, model.architecture)
    if kept:
        return Candidate(tensor, (_kept_type(model, tensor),), "unquantized", kept)
    one = next((one for one in fixed if re.fullmatch(one.pattern, tensor.name)), None)
    if one is None:
        return _open_candidate(tensor, types)
    if not ggml.fits(one.type, tensor.n_cols):
        raise PlanError(
            f"--tensor-type '{one}': {tensor.name} has rows of {tensor.n_cols} weights, which are not a multiple of "
            f"{ggml.block(one.type)[0]}"
        )
    return Candidate(tensor, (one.type,), "fixed", "fixed by --tensor-type")


def _kept_type(model: Model, tensor: Tensor) -> str:
    """Return the type of a tensor that is not quantized: F32 where llama.cpp's kernels take no other type.

    Others, such as a router, keep their type from a GGUF input.
    """
    keeps_type = model.files and tensor.dtype in ggml.TYPES and not needs_f32(tensor.name, tensor.shape)
    return tensor.dtype if keeps_type else "F32"


def _open_candidate(tensor: Tensor, types: Sequence[str]) -> Candidate:
    fitting = [name for name in types if ggml.fits(name, tensor.n_cols)]
    if len(fitting) == len(types):
        return Candidate(tensor, _by_size(fitting))
    fitting += [name for name in ggml.NARROW_TYPES if ggml.fits(name, tensor.n_cols) and name not in fitting]
    if not fitting:
        return Candidate(tensor, (LAST_RESORT,), "fallback", f"rows of {tensor.n_cols} are not a multiple of 32")
    return Candidate(tensor, _by_size(fitting), "fallback", f"rows of {tensor.n_cols} are not a multiple of 256")


def _by_size(types: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted((name for name in ggml.TYPES if name in types), key=ggml.bits_per_weight))


def budget_bytes(target: Target | None, n_weights: int, header_bytes: int) -> int | None:
    """Return the bytes that tensors may take together; ``None`` without a budget."""
    if target is None:
        return None
    return math.floor(target.value * n_weights / 8) if target.kind == "bpw" else int(target.value) - header_bytes


def check_target(found: Sequence[Candidate], target: Target, header_bytes: int) -> None:
    """Raise ``TargetError`` when even the smallest types exceed the budget.

    The message gives the floor in bpw and bytes, what sets it, and the nearest feasible target.
    """
    n_weights = sum(candidate.tensor.n_weights for candidate in found)
    budget = budget_bytes(target, n_weights, header_bytes)
    padded = target.kind == "size"
    floor = sum(candidate.cost(candidate.types[0], padded) for candidate in found)
    if budget is None or floor <= budget:
        return
    floor_bpw = floor * 8 / n_weights
    if padded:
        nearest = f"--target-size {floor + header_bytes}"
        have = f"{floor + header_bytes} bytes for the whole file ({header_bytes} of them header and tokenizer)"
    else:
        nearest = f"--target-bpw {nearest_bpw(floor, n_weights):g}"
        have = f"{floor} bytes for the tensors"
    raise TargetError(
        f"target {target} is out of reach: the floor is {floor_bpw:.3f} bpw, {have}, "
        f"set by {_floor_causes(found, floor)}; nearest feasible: {nearest}{_smaller_types(found)}"
    )


def _smaller_types(found: Sequence[Candidate]) -> str:
    """Return the types that lower the floor of rows that do not fit K-quants; empty where none do."""
    narrow = [each for each in found if each.kind == "fallback" and ggml.fits("Q2_0", each.tensor.n_cols)]
    if not narrow or any("Q2_0" in each.types for each in narrow):
        return ""
    return f"; smaller with --types {','.join(ggml.SMALL_ROW_TYPES)}, for llama.cpp since July 2026"


def nearest_bpw(floor_bytes: int, n_weights: int) -> float:
    """Return the smallest thousandth of a bit per weight whose budget holds ``floor_bytes``."""
    thousandths = floor_bytes * 8000 // n_weights  # rounded down; in floats, some exact values fall a byte short
    while math.floor(thousandths / 1000 * n_weights / 8) < floor_bytes:
        thousandths += 1
    return thousandths / 1000


def _floor_causes(found: Sequence[Candidate], floor: int) -> str:
    """Return which tensors set the floor, largest share first."""
    groups: dict[str, int] = {}
    for candidate in found:
        groups[_cause(candidate)] = groups.get(_cause(candidate), 0) + candidate.n_bytes(candidate.types[0])
    ranked = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{cause} ({100 * share / floor:.0f} %)" for cause, share in ranked[:3])


def _cause(candidate: Candidate) -> str:
    cheapest = candidate.types[0]
    if candidate.kind == "fixed":
        return "--tensor-type"
    if candidate.kind == "fallback":
        return f"rows that are not a multiple of 256 at {cheapest}, {ggml.bits_per_weight(cheapest):g} bpw"
    if candidate.kind == "unquantized":
        return f"tensors that stay {cheapest}"
    if candidate.tensor.layer is None:
        return f"{candidate.tensor.name} at {cheapest}"
    return f"layers at {cheapest}"
