"""Verify the structure of a finished file: read it again and compare it with its plan.

``gguf_header`` reads the header and shares no code with the writer. ``perplexity`` tests whether the file *works*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ..errors import ModelError, VerifyError
from ..llamacpp.gguf_header import GgufHeader, TensorEntry, read_gguf_header
from ..records import Model, Plan, PlannedTensor, Projector


def verify_structure(path: Path, model: Model, plan: Plan) -> None:
    """Check names, shapes, types, offsets, sizes, keys and the budget of a written file against its plan.

    Raises ``VerifyError`` naming the first difference.
    """
    n_bytes = path.stat().st_size
    if n_bytes != plan.file_bytes:
        raise VerifyError(f"{path}: wanted {plan.file_bytes} bytes, got {n_bytes}")
    try:
        header = read_gguf_header(path)
    except ModelError as error:
        raise VerifyError(str(error)) from error
    _check_tensors(path, header, plan)
    _check_keys(path, header, model, plan)
    _check_target(path, plan, sum(tensor.n_bytes for tensor in header.tensors), n_bytes)


def verify_projector(path: Path, projector: Projector) -> None:
    """Check names, shapes, types, sizes and keys of a written vision part; raise ``VerifyError`` for a difference."""
    try:
        header = read_gguf_header(path)
    except ModelError as error:
        raise VerifyError(str(error)) from error
    found = {tensor.name: (tensor.shape, tensor.type) for tensor in header.tensors}
    wanted = {tensor.name: (tensor.shape, projector.types[tensor.name]) for tensor in projector.tensors}
    if found != wanted:
        name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise VerifyError(f"{path}: tensor {name}: wanted {wanted.get(name)}, got {found.get(name)}")
    _check_metadata(path, header, projector.metadata)


def _check_tensors(path: Path, header: GgufHeader, plan: Plan) -> None:
    if len(header.tensors) != len(plan.tensors):
        raise VerifyError(f"{path}: wanted {len(plan.tensors)} tensors, got {len(header.tensors)}")
    offset = plan.header_bytes
    for found, planned in zip(header.tensors, plan.tensors, strict=True):
        _check_tensor(path, found, planned, offset)
        offset += planned.padded_bytes


def _check_tensor(path: Path, found: TensorEntry, planned: PlannedTensor, offset: int) -> None:
    facts = {
        "name": (found.name, planned.name),
        "shape": (found.shape, planned.shape),
        "type": (found.type, planned.type),
        "bytes": (found.n_bytes, planned.n_bytes),
        "offset": (found.offset, offset),
    }
    for what, (got, wanted) in facts.items():
        if got != wanted:
            raise VerifyError(f"{path}: tensor {planned.name}: {what}: wanted {wanted}, got {got}")


def _check_keys(path: Path, header: GgufHeader, model: Model, plan: Plan) -> None:
    """Check that the file holds the model's keys unchanged, and this plan's digest."""
    _check_metadata(path, header, model.metadata)
    digest = header.metadata.get("nsds_gguf.plan_sha256")
    if digest is None or digest.value != plan.digest:
        raise VerifyError(f"{path}: nsds_gguf.plan_sha256: wanted {plan.digest}, got {digest and digest.value}")


def _check_metadata(path: Path, header: GgufHeader, metadata: Mapping[str, GGUFValue]) -> None:
    for key, wanted in metadata.items():
        found = header.metadata.get(key)
        if found is None:
            raise VerifyError(f"{path}: metadata key {key} is missing")
        if found.type != wanted.type or not _same_value(found, wanted):
            raise VerifyError(f"{path}: metadata key {key} differs from the model's")


def _same_value(found: GGUFValue, wanted: GGUFValue) -> bool:
    """Return whether a value that was read back is the wanted one, at the precision of its type."""
    if GGUFValueType.FLOAT32 in (found.type, found.sub_type):
        return np.array_equal(found.value, np.asarray(wanted.value, dtype=np.float32), equal_nan=True)
    return bool(found.value == _plain(wanted.value))


def _plain(value: object) -> object:
    """Return a value as it reads back: tokens stored as bytes become text."""
    if isinstance(value, bytes | bytearray):
        return value.decode(errors="surrogateescape")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_target(path: Path, plan: Plan, tensor_bytes: int, file_bytes: int) -> None:
    """Check the budget on the finished file, in bytes rather than rounded bpw."""
    target = plan.recipe.target
    if target is None:
        return
    used = tensor_bytes if target.kind == "bpw" else file_bytes
    allowed = math.floor(target.value * plan.n_weights / 8) if target.kind == "bpw" else int(target.value)
    if used > allowed:
        raise VerifyError(f"{path}: {used} bytes exceed the target {target} ({allowed} bytes)")
