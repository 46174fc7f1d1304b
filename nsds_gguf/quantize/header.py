"""The part of a GGUF file before the tensor data: header, keys, tensor table, by gguf's own writer.

Its size depends on the recipe alone, so it is known before types are chosen.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue, WriterState

from .. import __version__
from ..llamacpp import ggml
from ..llamacpp.rules import kept_reason, needs_f32
from ..records import ALIGNMENT_BYTES, COPIED_TYPES, Model, Plan, Recipe, Tensor, kv
from ..system.workfolder import output_error

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

_OUTLINE_TYPES = ("Q2_K", "Q4_0", "F16")  # smallest first; rows of any length fit the last
_NO_DIGEST = "0" * 64  # as long as a real one, so that the header has its final size before there is a plan


def header_bytes(model: Model, recipe: Recipe) -> int:
    """Return the bytes before the tensor data; they depend on the recipe, not on the chosen types."""
    types = {tensor.name: "F32" for tensor in model.tensors}
    keys = {**model.metadata, **_keys(recipe, "F32", _NO_DIGEST, _NO_DIGEST)}
    return len(file_header(model.architecture, keys, model.tensors, types))


def plan_header(model: Model, plan: Plan) -> bytes:
    """Return everything before the tensor data of a plan's file, padded to the alignment."""
    keys = _keys(plan.recipe, _main_type(plan), plan.scores_digest or _NO_DIGEST, plan.digest)
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    return file_header(model.architecture, {**model.metadata, **keys}, model.tensors, types)


def write_outline(model: Model, path: Path) -> None:
    """Write a GGUF of the model's keys and tensor table, with a hole in place of the data.

    llama.cpp can tokenize with it and tell whether it would load and run the model. The file system must allow a sparse
    file of the data in the smallest types.
    """
    types = {tensor.name: _outline_type(tensor) for tensor in model.tensors}
    header = file_header(model.architecture, model.metadata, model.tensors, types)
    n_data = sum(-(-t.n_rows * ggml.row_bytes(types[t.name], t.n_cols) // ALIGNMENT_BYTES) for t in model.tensors)
    try:
        with path.open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + n_data * ALIGNMENT_BYTES)
    except OSError as error:
        raise output_error(path, error) from error


def _outline_type(tensor: Tensor) -> str:
    if tensor.dtype in COPIED_TYPES:
        return tensor.dtype
    if kept_reason(tensor) or needs_f32(tensor.name, tensor.shape):
        return "F32"
    return next(name for name in _OUTLINE_TYPES if ggml.fits(name, tensor.n_cols))


def _main_type(plan: Plan) -> str:
    """Return the type with most bytes, for ``general.file_type``; on a tie, the first in ``ggml.TYPES``."""
    n_bytes = dict.fromkeys(ggml.TYPES, 0)
    for tensor in plan.tensors:
        if tensor.type in n_bytes:
            n_bytes[tensor.type] += tensor.n_bytes
    return max(n_bytes, key=lambda name: n_bytes[name])


def _keys(recipe: Recipe, main_type: str, scores_digest: str, plan_digest: str) -> dict[str, GGUFValue]:
    """Return the keys that depend on the plan; ``nsds_gguf.recipe`` holds the recipe whole, as JSON."""
    ours = {
        "version": __version__,
        "allocator": recipe.allocator,
        "metric": recipe.metric or "none",
        "rounding": recipe.rounding,
        "calibration": recipe.calibration,
        "target": str(recipe.target or "none"),
        "recipe": recipe.to_json(),
        "scores_sha256": scores_digest,
        "plan_sha256": plan_digest,
    }
    return {
        "general.file_type": kv(int(ggml.TYPES[main_type].file_type), GGUFValueType.UINT32),
        "general.quantization_version": kv(QUANTIZATION_VERSION, GGUFValueType.UINT32),
        **{f"nsds_gguf.{key}": kv(value, GGUFValueType.STRING) for key, value in ours.items()},
    }


class _HeaderWriter(GGUFWriter):
    """gguf's writer with arrays packed at once, several times faster, and allowed to be empty, as in llama.cpp."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype != GGUFValueType.ARRAY or sub_type is None:
            packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return packed
        head = struct.pack("<I", vtype) * add_vtype + struct.pack("<IQ", sub_type, len(val))
        if sub_type == GGUFValueType.STRING:
            texts = [text.encode() if isinstance(text, str) else text for text in val]
            return head + b"".join([struct.pack("<Q", len(text)) + text for text in texts])
        return head + struct.pack(f"<{len(val)}{self._simple_value_packing[sub_type]}", *val)


def file_header(
    architecture: str, keys: Mapping[str, GGUFValue], tensors: Sequence[Tensor], types: Mapping[str, str]
) -> bytes:
    """Return everything before the tensor data, as gguf's writer makes it, padded to the alignment.

    Args:
        architecture: ``general.architecture``.
        keys: every key of the file.
        tensors: in the order of the file.
        types: type of every tensor by name.

    """
    writer = _HeaderWriter(None, architecture)
    writer.kv_data[0] = dict(keys)
    for tensor in tensors:
        n_bytes = tensor.n_rows * ggml.row_bytes(types[tensor.name], tensor.n_cols)
        ggml_type: Any = ggml.TYPE_NUMBERS[types[tensor.name]]  # may be newer than gguf
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, raw_dtype=ggml_type)
    memory = io.BytesIO()
    writer.fout, writer.state = [io.BufferedWriter(memory)], WriterState.EMPTY  # as open_output_file, without a disk
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = memory.getvalue()
    return header + b"\0" * (-len(header) % ALIGNMENT_BYTES)
