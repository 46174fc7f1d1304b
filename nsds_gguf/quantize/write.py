"""Stage 4, write: a plan and a model become a GGUF file, streamed.

Layout of the file (GGUF v3): header (magic ``GGUF``, version, counts), metadata keys, tensor table, padding, then the
data of each tensor, padded to 32 bytes. gguf's own writer makes everything before the data; the data is read, quantized
by ggml and written in slabs of rows, a bounded number of slabs in flight, so that memory holds neither the model nor
the file.

The output appears under its name only when it is complete: it is written to a hidden folder, synced and renamed.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.gguf_writer import GGUFValue, WriterState
from numpy.typing import NDArray

from .. import __version__
from ..errors import ModelError, OutputError
from ..llamacpp import ggml
from ..llamacpp.rules import kept_reason, needs_f32
from ..records import (
    ALIGNMENT_BYTES,
    COPIED_TYPES,
    Float32,
    Model,
    Plan,
    PlannedTensor,
    Progress,
    Target,
    Tensor,
    kv,
    no_progress,
)
from ..system.atomic import sync
from ..system.workfolder import output_error
from . import rounding
from .rounding import Feedback, Feedbacks

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

# general.file_type shown for a mixed file: that of the type which holds most bytes.
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_M,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "IQ4_NL": LlamaFileType.MOSTLY_IQ4_NL,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}

_OUTLINE_TYPES = ("Q2_K", "Q4_0", "F16")  # smallest first: types that some row length does not fit, and one all fit

_SLAB_WEIGHTS = 1 << 19  # 2 MiB of float32 in each thread: stays in the cache, hides Python's 0.1 ms a slab
_IN_FLIGHT_PER_THREAD = 2
_LARGEST_F16 = 65504.0  # scales are float16: only weights above can overflow a type
_NO_DIGEST = "0" * 64  # as long as a real one: the header's size is known before the plan is


def header_bytes(
    model: Model, *, allocator: str, target: Target, importance: str, metric: str | None, effort: str = "normal"
) -> int:
    """Return the bytes before the tensor data; they depend on the plan's settings, not on its types."""
    settings = _settings(allocator, target, importance, effort, metric)
    types = {tensor.name: "F32" for tensor in model.tensors}
    return len(_header(model, _keys(settings, "F32", _NO_DIGEST, _NO_DIGEST), types))


def write_outline(model: Model, path: Path) -> None:
    """Write a GGUF of the model's keys and tensor table, with a hole in place of the data.

    It is enough for llama.cpp to tokenize with and to say whether it would load and run the model. The file system
    must have room, at least on paper, for the data in the smallest types.
    """
    types = {tensor.name: _outline_type(tensor) for tensor in model.tensors}
    header = _header(model, {}, types)
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


def write_gguf(
    model: Model,
    plan: Plan,
    importance: Mapping[str, Float32],
    path: Path,
    *,
    n_threads: int,
    progress: Progress = no_progress,
    feedbacks: Feedbacks | None = None,
) -> None:
    """Write the file that the plan describes.

    In memory: about four slabs of 2 MiB per thread and what the page cache keeps of the source.

    Args:
        model: where the weights come from.
        plan: type of every tensor; its ``header_bytes`` must be right.
        importance: ``(n_cols,)`` float32 column weights by tensor name, for the quantizers; ``(n_experts, n_cols)``
            where stacked matrices differ.
        path: file to create, usually that of ``unfinished``.
        n_threads: threads that read and quantize.
        progress: called with weights done and weights in all.
        feedbacks: where weights are rounded with feedback, the factors of the tensors that have it.

    Raises:
        ModelError: a tensor holds NaN or infinite values, or values that its type cannot hold.
        OutputError: the disk is full or the folder cannot be written.

    """
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    settings = _settings(plan.allocator, plan.target, plan.importance, plan.effort, plan.metric)
    header = _header(model, _keys(settings, _main_type(plan), plan.scores_digest or _NO_DIGEST, plan.digest), types)
    if len(header) != plan.header_bytes:
        raise OutputError(f"{path}: header takes {len(header)} bytes, the plan says {plan.header_bytes}: plan again")
    try:
        with path.open("wb") as stream, ThreadPoolExecutor(n_threads) as pool:
            stream.write(header)
            _write_tensors(stream, pool, model, plan, importance, n_threads, progress, feedbacks)
            stream.flush()
            sync(stream.fileno())
    except OSError as error:
        raise output_error(path, error) from error


def _main_type(plan: Plan) -> str:
    n_bytes: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.type in FILE_TYPES:
            n_bytes[tensor.type] = n_bytes.get(tensor.type, 0) + tensor.n_bytes
    return max(n_bytes, key=lambda name: (n_bytes[name], -ggml.TYPES.index(name)))


def _settings(allocator: str, target: Target, importance: str, effort: str, metric: str | None) -> dict[str, str]:
    return {
        "version": __version__,
        "metric": metric or "none",
        "allocator": allocator,
        "importance": importance,
        "effort": effort,
        "target": str(target),
    }


def _keys(settings: Mapping[str, str], main_type: str, scores_digest: str, plan_digest: str) -> dict[str, GGUFValue]:
    ours = {**settings, "scores_sha256": scores_digest, "plan_sha256": plan_digest}
    return {
        "general.file_type": kv(int(FILE_TYPES[main_type]), GGUFValueType.UINT32),
        "general.quantization_version": kv(QUANTIZATION_VERSION, GGUFValueType.UINT32),
        **{f"nsds_gguf.{key}": kv(value, GGUFValueType.STRING) for key, value in ours.items()},
    }


class _HeaderWriter(GGUFWriter):
    """gguf's writer, but arrays are packed at once, several times faster, and may be empty, which llama.cpp allows."""

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


def _header(model: Model, keys: Mapping[str, GGUFValue], types: Mapping[str, str]) -> bytes:
    """Return everything before the tensor data, as gguf's writer makes it, padded to the alignment."""
    writer = _HeaderWriter(None, model.architecture)
    writer.kv_data[0] = {**model.metadata, **keys}
    for tensor in model.tensors:
        n_bytes = tensor.n_rows * ggml.row_bytes(types[tensor.name], tensor.n_cols)
        ggml_type = GGMLQuantizationType[types[tensor.name]]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, raw_dtype=ggml_type)
    memory = io.BytesIO()
    writer.fout, writer.state = [io.BufferedWriter(memory)], WriterState.EMPTY  # as open_output_file would, no disk
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = memory.getvalue()
    return header + b"\0" * (-len(header) % ALIGNMENT_BYTES)


def _write_tensors(
    stream: IO[bytes],
    pool: ThreadPoolExecutor,
    model: Model,
    plan: Plan,
    importance: Mapping[str, Float32],
    n_threads: int,
    progress: Progress,
    feedbacks: Feedbacks | None,
) -> None:
    """Quantize slabs in the pool and write them in order, a bounded number in flight."""
    pending: deque[tuple[Future[NDArray[np.uint8]], int, int]] = deque()
    done, total = 0, plan.n_weights

    def write_oldest() -> None:
        nonlocal done
        job, n_weights, n_padding = pending.popleft()
        stream.write(job.result().data)
        stream.write(b"\0" * n_padding)
        done += n_weights
        progress(done, total)

    try:
        for tensor, planned in zip(model.tensors, plan.tensors, strict=True):
            feedback = None
            if feedbacks is not None and planned.type in rounding.COVERED_TYPES:
                feedback = feedbacks.of(tensor.name)
            for start, stop in _slabs(tensor, 1 if feedback is None else rounding.ROW_TILE):
                job = pool.submit(_quantized_slab, tensor, planned, start, stop, importance.get(tensor.name), feedback)
                n_padding = planned.padded_bytes - planned.n_bytes if stop == tensor.n_rows else 0
                pending.append((job, (stop - start) * tensor.n_cols, n_padding))
                if len(pending) >= n_threads * _IN_FLIGHT_PER_THREAD:
                    write_oldest()
        while pending:
            write_oldest()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _slabs(tensor: Tensor, tile: int = 1) -> Iterator[tuple[int, int]]:
    """Yield stretches of whole tiles of rows; none has rows of two matrices of a stack, whose importance may differ."""
    step, n_rows = max(1, _SLAB_WEIGHTS // tensor.n_cols // tile) * tile, _rows_of_matrix(tensor)
    for first in range(0, tensor.n_rows, n_rows):
        for start in range(first, first + n_rows, step):
            yield start, min(start + step, first + n_rows)


def _rows_of_matrix(tensor: Tensor) -> int:
    """Return the rows of one matrix of a stack, or of the whole tensor."""
    return tensor.shape[-2] if len(tensor.shape) > 2 else tensor.n_rows


def _quantized_slab(
    tensor: Tensor,
    planned: PlannedTensor,
    start: int,
    stop: int,
    importance: Float32 | None,
    feedback: Feedback | None = None,
) -> NDArray[np.uint8]:
    if tensor.copy_rows is not None:
        return tensor.copy_rows(start, stop)
    rows = tensor.read_rows(start, stop)
    low, high = float(rows.min()), float(rows.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _not_finite(tensor)
    weights = importance
    if importance is not None and importance.ndim == 2:
        weights = importance[start // _rows_of_matrix(tensor)]
    if feedback is None:
        data = ggml.quantize(rows, planned.type, weights)
    else:
        data = rounding.quantize(rows, planned.type, feedback, first_row=start)
    largest = max(high, -low)
    if largest > _LARGEST_F16 and not np.isfinite(ggml.dequantize(data, planned.type, tensor.n_cols)).all():
        raise ModelError(
            f"tensor {tensor.source}: weights up to {largest:g} overflow {planned.type}: "
            f"give it a type that holds them, --pin '{re.escape(tensor.name)}=F32'"
        )
    return data


def _not_finite(tensor: Tensor) -> ModelError:
    n_nan = n_inf = 0
    for start, stop in _slabs(tensor):
        rows = tensor.read_rows(start, stop)
        n_nan += int(np.isnan(rows).sum())
        n_inf += int(np.isinf(rows).sum())
    return ModelError(
        f"tensor {tensor.source}: {n_nan} NaN and {n_inf} infinite of {tensor.n_weights} weights: "
        "the checkpoint is damaged, download it again"
    )
