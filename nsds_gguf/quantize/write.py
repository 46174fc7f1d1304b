"""Write the GGUF file of a plan, streamed.

Layout of the file (GGUF v3): header (magic ``GGUF``, version, counts), metadata keys, tensor table, padding, then the
data of each tensor, padded to 32 bytes. ``header`` makes everything before the data; the data is read, quantized and
written in slabs of rows, a bounded number of slabs in flight, so that memory holds neither the model nor the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, OutputError
from ..llamacpp import ggml
from ..records import Model, Plan, PlannedTensor, Progress, Tensor, no_progress
from ..system.partfile import PartFile, PlainFile
from ..system.store import kept_note
from ..system.workers import Workers
from .header import plan_header
from .quantizer import Quantizer, Quantizers

_LARGEST_F16 = 65504.0  # scales are float16: only larger weights can overflow a type


_HEADER = "header"  # name of the first piece of a file; no tensor has it


@dataclass(frozen=True)
class Resume:
    """How to resume the file of an interrupted run.

    Attributes:
        key: digest of what its bytes depend on; a file with another key is written from the start.
        say: told of the tensors that are kept, and of those that must be written again.

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
        slabs = _slabs(model, plan, quantizers, done, workers.slab_bytes)
        with closing(workers.ordered(_quantize_slab, slabs)) as quantized:
            for slab, data in quantized:
                file.write(data.data)
                if slab.is_last:
                    file.write(bytes(slab.planned.padded_bytes - slab.planned.n_bytes))
                    file.complete(slab.tensor.name)
                n_written += slab.n_weights
                progress(n_written, total)
        file.finish()


@dataclass(frozen=True)
class _Slab:
    """Rows ``start`` to ``stop`` of a tensor, of one matrix of a stack."""

    tensor: Tensor
    planned: PlannedTensor
    quantizer: Quantizer
    start: int
    stop: int

    @property
    def n_weights(self) -> int:
        return (self.stop - self.start) * self.tensor.n_cols

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its tensor."""
        return self.stop == self.tensor.n_rows


def _slabs(model: Model, plan: Plan, quantizers: Quantizers, done: Collection[str], slab_bytes: int) -> Iterator[_Slab]:
    """Yield the slabs of all tensors but those ``done``, in the order of the file; make quantizers on demand."""
    for tensor, planned in zip(model.tensors, plan.tensors, strict=True):
        if tensor.name in done:
            continue
        quantizer = quantizers(tensor)
        for rows in tensor.row_slices(slab_bytes, quantizer.tile_rows):
            yield _Slab(tensor, planned, quantizer.for_rows(rows.start), rows.start, rows.stop)


def _quantize_slab(slab: _Slab) -> NDArray[np.uint8]:
    """Return the bytes of a slab: ``(n_rows, row_bytes)`` uint8."""
    tensor, name = slab.tensor, slab.planned.type
    if tensor.is_copied:
        return tensor.stored_rows(slice(slab.start, slab.stop))
    rows = tensor.rows(slice(slab.start, slab.stop))
    data = slab.quantizer.quantize(rows, name, slab.start)
    largest = max(float(rows.max()), -float(rows.min()))
    if largest > _LARGEST_F16 and not np.isfinite(ggml.dequantize(data, name, tensor.n_cols)).all():
        raise ModelError(
            f"tensor {tensor.source}: weights up to {largest:g} overflow {name}: "
            f"give it a type that holds them, --tensor-type '{re.escape(tensor.name)}=F32'"
        )
    return data
