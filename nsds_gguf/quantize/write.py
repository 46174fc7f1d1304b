"""Stage 4, write: a plan and a model become a GGUF file, streamed.

Layout of the file (GGUF v3): header (magic ``GGUF``, version, counts), metadata keys, tensor table, padding, then the
data of each tensor, padded to 32 bytes. ``header`` makes everything before the data; the data is read, quantized and
written in slabs of rows, a bounded number of slabs in flight, so that memory holds neither the model nor the file.

The output appears under its name only when it is complete: it is written to a hidden folder, synced and renamed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError, OutputError
from ..llamacpp import ggml
from ..records import Model, Plan, PlannedTensor, Progress, Tensor, no_progress
from ..system.atomic import sync
from ..system.workfolder import output_error
from .header import plan_header
from .quantizer import Quantizer, Quantizers

_SLAB_BYTES = 2 << 20  # float32 rows of one job: stays in the cache, hides Python's 0.1 ms a slab
_IN_FLIGHT_PER_THREAD = 2
_LARGEST_F16 = 65504.0  # scales are float16: only weights above can overflow a type


def write_gguf(
    model: Model,
    plan: Plan,
    quantizers: Quantizers,
    path: Path,
    *,
    n_threads: int,
    progress: Progress = no_progress,
) -> None:
    """Write the file that the plan describes.

    In memory: about four slabs of 2 MiB per thread and what the page cache keeps of the source.

    Args:
        model: where the weights come from.
        plan: type of every tensor; its ``header_bytes`` must be right.
        quantizers: give the quantizer of each tensor.
        path: file to create, usually that of ``unfinished``.
        n_threads: threads that read and quantize.
        progress: called with weights done and weights in all.

    Raises:
        ModelError: a tensor holds NaN or infinite values, or values that its type cannot hold.
        OutputError: the disk is full or the folder cannot be written.

    """
    header = plan_header(model, plan)
    if len(header) != plan.header_bytes:
        raise OutputError(f"{path}: header takes {len(header)} bytes, the plan says {plan.header_bytes}: plan again")
    try:
        with (
            path.open("wb") as stream,
            ThreadPoolExecutor(n_threads) as pool,
            closing(_quantized(pool, _slabs(model, plan, quantizers), n_threads)) as quantized,
        ):
            stream.write(header)
            n_written = 0
            for data, slab in quantized:
                stream.write(data.data)
                stream.write(b"\0" * slab.n_padding)
                n_written += slab.n_weights
                progress(n_written, plan.n_weights)
            stream.flush()
            sync(stream.fileno())
    except OSError as error:
        raise output_error(path, error) from error


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
    def n_padding(self) -> int:
        """Zeros to write behind it."""
        is_last = self.stop == self.tensor.n_rows
        return self.planned.padded_bytes - self.planned.n_bytes if is_last else 0


def _slabs(model: Model, plan: Plan, quantizers: Quantizers) -> Iterator[_Slab]:
    """Yield the slabs of all tensors in the order of the file; a quantizer is made when its tensor's turn comes."""
    for tensor, planned in zip(model.tensors, plan.tensors, strict=True):
        quantizer = quantizers(tensor)
        for rows in tensor.row_slices(_SLAB_BYTES, quantizer.tile_rows):
            yield _Slab(tensor, planned, quantizer, rows.start, rows.stop)


def _quantized(
    pool: ThreadPoolExecutor, slabs: Iterator[_Slab], n_threads: int
) -> Generator[tuple[NDArray[np.uint8], _Slab], None, None]:
    """Quantize slabs in the pool and yield their bytes in order, a bounded number in flight."""
    pending: deque[tuple[Future[NDArray[np.uint8]], _Slab]] = deque()
    try:
        for slab in slabs:
            pending.append((pool.submit(_quantize_slab, slab), slab))
            if len(pending) >= n_threads * _IN_FLIGHT_PER_THREAD:
                job, oldest = pending.popleft()
                yield job.result(), oldest
        while pending:
            job, oldest = pending.popleft()
            yield job.result(), oldest
    finally:
        for job, _ in pending:
            job.cancel()


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
