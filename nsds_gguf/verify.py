"""Stage 5, verify: the finished file is opened again and held against its plan.

The structure is read by gguf's reader, which shares no code with the writer of the data. Whether the file *works* is
for ``perplexity`` to say.
"""

from __future__ import annotations

import math
from pathlib import Path

from gguf import GGUFReader, ReaderTensor

from .errors import VerifyError
from .records import Model, Plan, PlannedTensor


def verify_structure(path: Path, model: Model, plan: Plan) -> None:
    """Check names, shapes, types, offsets, sizes and keys of a written file against its plan.

    Raises ``VerifyError`` naming the first difference.
    """
    n_bytes = path.stat().st_size
    if n_bytes != plan.file_bytes:
        raise VerifyError(f"{path}: wanted {plan.file_bytes} bytes, got {n_bytes}")
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise VerifyError(f"{path}: gguf's reader refuses it: {error}") from error
    names = [tensor.name for tensor in reader.tensors]
    if names != [tensor.name for tensor in plan.tensors]:
        raise VerifyError(f"{path}: wanted {len(plan.tensors)} tensors in the plan's order, got {len(names)}")
    expected_offset = plan.header_bytes
    for found, planned in zip(reader.tensors, plan.tensors, strict=True):
        _check_tensor(path, found, planned, expected_offset)
        expected_offset += planned.padded_bytes
    missing = [key for key in model.metadata if key not in reader.fields]
    if missing:
        raise VerifyError(f"{path}: metadata key {missing[0]} is missing")
    _check_target(path, plan, sum(int(tensor.n_bytes) for tensor in reader.tensors), n_bytes)


def _check_tensor(path: Path, found: ReaderTensor, planned: PlannedTensor, offset: int) -> None:
    facts = {
        "shape": (tuple(int(n) for n in reversed(found.shape)), planned.shape),
        "type": (found.tensor_type.name, planned.type),
        "bytes": (int(found.n_bytes), planned.n_bytes),
        "offset": (int(found.data_offset), offset),
    }
    for what, (got, wanted) in facts.items():
        if got != wanted:
            raise VerifyError(f"{path}: tensor {planned.name}: {what}: wanted {wanted}, got {got}")


def _check_target(path: Path, plan: Plan, tensor_bytes: int, file_bytes: int) -> None:
    """Check the budget on the finished file; bytes, not rounded bpw."""
    target = plan.target
    used = tensor_bytes if target.kind == "bpw" else file_bytes
    allowed = math.floor(target.value * plan.n_weights / 8) if target.kind == "bpw" else int(target.value)
    if target.kind != "none" and used > allowed:
        raise VerifyError(f"{path}: {used} bytes exceed the target {target} ({allowed} bytes)")
