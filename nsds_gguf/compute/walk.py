"""The forward pass over the layers of a model; keeps the streams that a backward pass needs.

Tokens run in batches; between layers, the streams of all batches are on disk, so that the weights of a layer are
decoded once for all batches. The streams of the first batch stay there for the backward pass. With records, an
interrupted pass resumes after the last complete layer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..records import Float32, Float64, Model, Progress, no_progress
from ..system.resources import check_memory
from ..system.store import Store
from .backend import DEFAULT_BACKEND, Backend, LayerPass, OutputPass, Tokens, find_backend
from .input_moments import InputSums, Recording
from .layers import view_layer
from .pass_records import LayerSums, RecordStreams, get_layers, put_layer, record_streams, tell_layers
from .stream_file import FileStreams, Streams, stream_file
from .weights import held_bytes

# Peak copies of the stream and of the hidden units of one sequence in one layer: 14 + 7 (of the width of keys and
# values) and 8.6 were measured (docs/log.md, 2026-11-25).
_WIDTHS, _HIDDEN_WIDTHS = 21, 9
_STREAMS = 4  # of a batch: before and after the layer, and their derivatives

OnHessian = Callable[[tuple[str, ...], Float32], None]


@dataclass(frozen=True)
class WalkOptions:
    """Options of a walk.

    Attributes:
        n_first: sequences per batch; only the first batch can run backward, and the last may be smaller.
        recording: the sums to collect of the inputs.
        on_hessian: called in the order of the layers with the stored names of the matrices that share an input and its
            ``E[x x^T]``, ``(n_cols, n_cols)`` float32; required if ``recording`` asks for Hessians.
        n_threads: CPU threads; they do not change the result.
        folder: of the temporary file; default: the system's temporary folder.
        backend: a key of ``BACKENDS``.
        records: keep the pass layer by layer, instead of the temporary file; their key stands for model, tokens and
            ``n_first``, and their names begin with ``PASS``.
        has_hessian: returns whether ``on_hessian`` got the Hessian of these names from the interrupted pass; required
            for resuming if ``recording`` asks for Hessians.

    """

    n_first: int
    recording: Recording = field(default_factory=Recording)
    on_hessian: OnHessian | None = None
    n_threads: int = 1
    folder: Path | None = None
    backend: str = DEFAULT_BACKEND
    records: Store | None = None
    has_hessian: Callable[[tuple[str, ...]], bool] = lambda _names: False


@dataclass(frozen=True)
class Walk:
    """A completed forward pass; its backend and files live as long as the ``with`` block of ``walk``.

    Attributes:
        model: the model.
        tokens: ``(n_first, n_positions)`` of the first batch.
        backend: the backend that computed it.
        inputs: sums over all tokens, by stored name; matrices that share an input share an entry.
        first_inputs: sums over the first batch alone.
        column_squares: squared norms of the columns of matrices, ``(n_cols,)`` by stored name, if recorded.
        streams: input stream of every layer for the first batch, then the output of the last layer, by index.
        records: those of the options.

    """

    model: Model
    tokens: Tokens
    backend: Backend
    inputs: Mapping[str, InputSums]
    first_inputs: Mapping[str, InputSums]
    column_squares: Mapping[str, Float64]
    streams: Streams
    records: Store | None = None


@contextmanager
def walk(model: Model, tokens: Tokens, options: WalkOptions, progress: Progress = no_progress) -> Iterator[Walk]:
    """Run tokens forward through a model.

    In memory: what the backend holds of one layer; the inputs of one batch in one layer; the Hessians of one layer. In
    a temporary file: ``(n_layers + 1) * n_first * n_positions + n_tokens`` rows of the stream at most; as records,
    ``2 * n_tokens`` in place of ``n_tokens``, and two batches of derivatives.

    Args:
        model: a model that ``Decoder`` supports (``decoder.what_is_missing``).
        tokens: ``(n_sequences, n_positions)`` ids.
        options: batches, sums, threads, folder, backend.
        progress: called with (done, total), in batches times layers.

    Raises:
        ModelError: activations are not finite: the weights are damaged.
        OutputError: too little memory, or no room on the disk for the temporary file.
        PlanError: the backend cannot run here.

    """
    entry, n_positions = find_backend(options.backend), tokens.shape[1]
    batches = [tokens[start : start + options.n_first] for start in range(0, len(tokens), options.n_first)]
    if options.recording.hessians and options.on_hessian is None:
        raise ValueError("the recording asks for Hessians, but on_hessian is None")
    n_bytes = working_bytes(model, batches[0].shape, options.recording, options.n_threads)
    check_memory(n_bytes, "the pass over tokens", "close other programs")
    slot_bytes = 4 * batches[0].size * model.hparams.n_embd
    with ExitStack() as stack:
        stack.enter_context(np.errstate(over="ignore", invalid="ignore"))  # the finite checks report overflow
        streams = stack.enter_context(_open_streams(options, model.hparams.n_layers, len(batches), slot_bytes))
        backend = stack.enter_context(entry.open(model, n_positions, options.n_threads))
        forward = _ForwardPass(model, batches, backend, streams, options)
        forward.run(progress)
        sums = forward.inputs, forward.first_inputs, forward.column_squares
        yield Walk(model, batches[0], backend, *sums, streams, options.records)


@contextmanager
def _open_streams(options: WalkOptions, n_layers: int, n_batches: int, slot_bytes: int) -> Iterator[Streams]:
    """Open the streams, as records or in a temporary file."""
    if options.records is not None:
        yield record_streams(options.records, n_layers, n_batches, slot_bytes)
        return
    with stream_file(options.folder, n_layers + n_batches, slot_bytes) as file:
        yield FileStreams(file, n_layers)


def working_bytes(
    model: Model, shape: tuple[int, ...], recording: Recording | None = None, n_jobs: int | None = None
) -> int:
    """Estimate the memory of one layer: activations forward and backward, inputs, weights, Hessians.

    Args:
        model: the model.
        shape: (sequences, positions) of a batch.
        recording: of inputs; ``None``: they are not collected.
        n_jobs: sequences whose activations are in memory at a time; ``None``: all.

    """
    h, weights, hessians, inputs = model.hparams, 0, 0, 0
    for index in range(h.n_layers):
        view = view_layer(model, index)
        weights = max(weights, sum(matrix.n_weights for matrix in view.matrices()))
        groups = view.input_groups(h) if recording else []
        widths = [model.by_name[names[0]].n_cols for names in groups]
        wanted = [names for names in groups if recording and not recording.hessians.isdisjoint(names)]
        hessians = max(hessians, sum(model.by_name[names[0]].n_cols ** 2 for names in wanted))
        inputs = max(inputs, sum(widths) + max(widths, default=0))
    n_sequences, n_positions = shape
    n_active = n_positions * (n_sequences if n_jobs is None else min(n_jobs, n_sequences))
    activations = n_active * (_WIDTHS * h.n_embd + _HIDDEN_WIDTHS * h.n_ff)
    activations += n_sequences * n_positions * (_STREAMS * h.n_embd + inputs)
    return 4 * (activations + hessians) + held_bytes(weights)


class _ForwardPass:
    """State of a forward pass: the sums over all batches, and over the first."""

    def __init__(
        self, model: Model, batches: Sequence[Tokens], backend: Backend, streams: Streams, options: WalkOptions
    ) -> None:
        self._n_layers, self._batches, self._backend = model.hparams.n_layers, batches, backend
        self._streams, self._options = streams, options
        self.inputs: dict[str, InputSums] = {}
        self.first_inputs: dict[str, InputSums] = {}
        self.column_squares: dict[str, Float64] = {}

    def run(self, progress: Progress) -> None:
        """Run all layers and the output, or those that an interrupted pass left."""
        n_batches, recording, done = len(self._batches), self._options.recording, self._resumed()
        total = (self._n_layers + 1) * n_batches
        progress(done * n_batches, total)
        if not done:
            for batch, tokens in enumerate(self._batches):
                self._streams.write(0, batch, self._backend.embed(tokens))
        for index in range(done, self._n_layers):
            layer = self._backend.layer(index, recording)
            shifted = _shifted(progress, index * n_batches, total)
            self._all_batches(index, layer, functools.partial(self._through, layer, index), shifted)
        if done <= self._n_layers:
            output, index = self._backend.output(recording), self._n_layers
            shifted = _shifted(progress, index * n_batches, total)
            self._all_batches(index, output, lambda batch: output.forward(self._streams.read(index, batch)), shifted)

    def _resumed(self) -> int:
        """Take over the layers, and the output, that an interrupted pass completed; return their number."""
        records, streams = self._options.records, self._streams
        if records is None or not isinstance(streams, RecordStreams):
            return 0
        found = list(itertools.takewhile(self._has_hessians, get_layers(records, self._n_layers)))
        done = streams.resumable(len(found), self._n_layers)
        for layer in found[:done]:
            self._add(layer)
        tell_layers(records, done, self._n_layers)
        return done

    def _has_hessians(self, layer: LayerSums) -> bool:
        """Return whether the Hessians that the recording wants of a completed layer are there."""
        wanted = self._options.recording.hessians
        inputs = [sums.names for sums in layer.inputs if not sums.is_stack and not wanted.isdisjoint(sums.names)]
        return all(self._options.has_hessian(names) for names in inputs)

    def _all_batches(
        self, index: int, stage: LayerPass | OutputPass, forward: Callable[[int], None], progress: Progress
    ) -> None:
        """Run every batch through a layer or the output; collect sums and pass on Hessians, then record it all."""
        first: Sequence[InputSums] = ()
        n_batches, records = len(self._batches), self._options.records
        for batch in range(n_batches):
            forward(batch)
            if batch == 0:
                first = stage.input_sums()
            if batch + 1 < n_batches:
                progress(batch + 1, n_batches)
        columns = stage.column_squares() if self._options.recording.column_squares else {}
        found = LayerSums(stage.input_sums(), first, columns)
        self._add(found)
        for names, hessian in stage.hessians():
            if self._options.on_hessian is not None:
                self._options.on_hessian(names, hessian)
        if records is not None:
            put_layer(records, index, found)
        self._streams.drop(index)
        progress(n_batches, n_batches)

    def _add(self, layer: LayerSums) -> None:
        self.inputs.update(_by_name(layer.inputs))
        self.first_inputs.update(_by_name(layer.first_inputs))
        self.column_squares.update(layer.column_squares)

    def _through(self, layer: LayerPass, index: int, batch: int) -> None:
        stream = layer.forward(self._streams.read(index, batch))
        if not np.isfinite(stream).all():
            raise ModelError(f"layer {index}: its output is not finite; the weights are damaged")
        self._streams.write(index + 1, batch, stream)


def _by_name(found: Sequence[InputSums]) -> dict[str, InputSums]:
    return {name: sums for sums in found for name in sums.names}


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, _: progress(done + step, total)
