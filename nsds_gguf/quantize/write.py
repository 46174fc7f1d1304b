"""Write the GGUF file of a plan, streamed.

Layout of the file (GGUF v3): header (magic ``GGUF``, version, counts), metadata keys, tensor table, padding, then the
data of each tensor, padded to 32 bytes. ``header`` makes everything before the data; the data is read, quantized and
written in slabs of rows, a bounded number of slabs in flight, so that memory holds neither the model nor the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, OutputError
from ..llamacpp import ggml
from ..records import ALIGNMENT_BYTES, Model, Plan, Progress, Projector, Tensor, no_progress
from ..system.partfile import PartFile, PlainFile
from ..system.store import kept_note
from ..system.workers import Workers
from . import rtn
from .deferred import DeferredQuantizer
from .header import file_header, plan_header
from .quantizer import Quantizer, Quantizers, TensorQuantizer

_LARGEST_F16 = 65504.0  # scales are float16: only larger weights can overflow a type


_HEADER = "header"  # name of the first piece of a file; no tensor has it
_CLIP = "clip"  # llama.cpp's architecture of a vision part


@dataclass(frozen=True)
class Resume:
    """How to resume the file of an interrupted run.

    Attributes:
        key: digest of what its bytes depend on; a file with another key is written from the start.
        say: called with a note on the tensors that are kept, and on those that must be written again.

    """

    key: str
    say: Callable[[str], None] | None = None


def write_gguf(
    model: Model,
    plan: Plan,
    quantizers: Quantizers,
    path: Path,
    *,
    workers: Workers,
    progress: Progress = no_progress,
    resume: Resume | None = None,
) -> None:
    """Write the file that the plan describes.

    In memory: about four slabs per thread, 8 MiB, and the page cache of the source; with a cluster, one slab here.

    Args:
        model: where the weights come from.
        plan: type of every tensor; its ``header_bytes`` must be right.
        quantizers: return the quantizer of each tensor.
        path: file to create, usually from ``unfinished``.
        workers: read and quantize, a slab per task.
        progress: called with weights done and weights in all.
        resume: continue after the last complete tensor of an interrupted run, with a journal beside the file; ``None``
            writes the whole file.

    Raises:
        ModelError: a tensor holds NaN or infinite values, or values that its type cannot hold.
        OutputError: the disk is full or the folder cannot be written.

    """
    header = plan_header(model, plan)
    if len(header) != plan.header_bytes:
        raise OutputError(f"{path}: header takes {len(header)} bytes, the plan says {plan.header_bytes}: plan again")
    with PlainFile(path) if resume is None else PartFile(path, resume.key, resume.say) as file:
        if not file.names:
            file.write(header)
            file.complete(_HEADER)
        done = set(file.names)
        if resume is not None and resume.say is not None and len(done) > 1:
            resume.say(kept_note("tensors of the file", len(done) - 1, len(plan.tensors)))
        total = sum(math.prod(tensor.shape) for tensor in plan.tensors)
        n_written = sum(math.prod(tensor.shape) for tensor in plan.tensors if tensor.name in done)
        typed = [
            (tensor, planned.type)
            for tensor, planned in zip(model.tensors, plan.tensors, strict=True)
            if tensor.name not in done
        ]
        slabs = _slabs(typed, quantizers, workers.slab_bytes, "--tensor-type '{pattern}=F32'")
        _write_slabs(file, slabs, workers, lambda n: progress(n_written + n, total))
        file.finish()


def write_projector(projector: Projector, path: Path, *, workers: Workers, progress: Progress = no_progress) -> None:
    """Write the file of a vision part, streamed like ``write_gguf``; matrices are rounded to nearest.

    Raises ``ModelError`` and ``OutputError`` as ``write_gguf`` does.
    """
    typed = [(tensor, projector.types[tensor.name]) for tensor in projector.tensors]
    with PlainFile(path) as file:
        file.write(file_header(_CLIP, projector.metadata, projector.tensors, projector.types))
        slabs = _slabs(typed, _unweighted, workers.slab_bytes, "--mmproj F32")
        _write_slabs(file, slabs, workers, lambda n: progress(n, projector.n_weights))
        file.finish()


def projector_bytes(projector: Projector) -> int:
    """Return the bytes of the whole file of a vision part."""
    header = file_header(_CLIP, projector.metadata, projector.tensors, projector.types)
    return len(header) + sum(_padded(_n_bytes(tensor, projector.types[tensor.name])) for tensor in projector.tensors)


def _unweighted(tensor: Tensor) -> TensorQuantizer:
    return DeferredQuantizer(rtn.ROUNDING, tensor, None, None)


def _write_slabs(
    file: PartFile | PlainFile, slabs: Iterator[_Slab], workers: Workers, progress: Callable[[int], None]
) -> None:
    """Quantize and write slabs in order; ``progress`` is called with the number of weights written."""
    n_written = 0
    with closing(workers.ordered(_quantize_slab, slabs)) as quantized:
        for slab, data in quantized:
            file.write(data.data)
            if slab.is_last:
                n_bytes = _n_bytes(slab.tensor, slab.type)
                file.write(bytes(_padded(n_bytes) - n_bytes))
                file.complete(slab.tensor.name)
            n_written += slab.n_weights
            progress(n_written)


def _n_bytes(tensor: Tensor, type_name: str) -> int:
    return tensor.n_rows * ggml.row_bytes(type_name, tensor.n_cols)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class _Slab:
    """Rows ``start`` to ``stop`` of a tensor, of one matrix of a stack; ``remedy`` is the option for an overflow."""

    tensor: Tensor
    type: str
    quantizer: Quantizer
    start: int
    stop: int
    remedy: str

    @property
    def n_weights(self) -> int:
        return (self.stop - self.start) * self.tensor.n_cols

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its tensor."""
        return self.stop == self.tensor.n_rows


def _slabs(
    typed: Sequence[tuple[Tensor, str]], quantizers: Quantizers, slab_bytes: int, remedy: str
) -> Iterator[_Slab]:
    """Yield the slabs of tensors in order; make quantizers on demand."""
    for tensor, type_name in typed:
        quantizer = quantizers(tensor)
        for rows in tensor.row_slices(slab_bytes, quantizer.tile_rows):
            yield _Slab(tensor, type_name, quantizer.for_rows(rows.start), rows.start, rows.stop, remedy)


def _quantize_slab(slab: _Slab) -> NDArray[np.uint8]:
    """Return the bytes of a slab: ``(n_rows, row_bytes)`` uint8."""
    tensor, name = slab.tensor, slab.type
    if tensor.is_copied:
        return tensor.stored_rows(slice(slab.start, slab.stop))
    rows = tensor.rows(slice(slab.start, slab.stop))
    data = slab.quantizer.quantize(rows, name, slab.start)
    largest = max(float(rows.max()), -float(rows.min()))
    if largest > _LARGEST_F16 and not np.isfinite(ggml.dequantize(data, name, tensor.n_cols)).all():
        raise ModelError(
            f"tensor {tensor.source}: weights up to {largest:g} overflow {name}: "
            f"give it a type that holds them, {slab.remedy.format(pattern=re.escape(tensor.name))}"
        )
    return data
