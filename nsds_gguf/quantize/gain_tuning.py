"""Tune the gains of norms once all matrices are quantized.

Rounding changes what a matrix computes, and a gain multiplies the columns behind it: other gains undo part of the
change. They are found by Adam (Kingma and Ba, arXiv 1412.6980) on the KL divergence of the quantized model's
predictions from the original's, on calibration text. Gains stay float32, so a file keeps its size and its layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..compute.backend import Tokens
from ..compute.decoder import Decoder
from ..compute.embedding import embed
from ..compute.gain_tape import GainTape
from ..compute.layers import view_layer
from ..compute.output import Head, output_norm
from ..compute.tape import Node, each
from ..compute.weights import LayerWeights, held_bytes, slabs
from ..errors import ModelError
from ..llamacpp.gguf_header import read_gguf_header
from ..records import Float32, Model, Progress, no_progress
from ..system.workfolder import output_error

N_SEQUENCES = 32  # of calibration text that a conversion tunes on
N_EPOCHS = 2
N_BATCH = 2  # sequences of a step
RATE = 0.027  # the first steps of a gain, as a share of it, over the square root of the divergence
DECAYS = 0.9, 0.95  # of Adam's two averages
HELD_OUT = 16  # one sequence in so many tells whether tuning helps

_TINY = 1e-12
_LOGITS = 1 << 23  # in memory at a time, for each model and thread

Gains = dict[str, Float32]


@dataclass(frozen=True)
class TunedGains:
    """Gains by stored name, ``(n_weights,)`` float32, and what they gain.

    Attributes:
        gains: the tuned gains; empty where tuning does not help.
        before: divergence on held-out sequences with the original gains, nats per token.
        after: that with tuned gains.

    """

    gains: Mapping[str, Float32]
    before: float
    after: float

    @property
    def note(self) -> str:
        """The note for the user."""
        found = f"held-out calibration text: {self.before:.4f} nats before, {self.after:.4f} after"
        if not self.gains:
            return f"Norm gains stay as they are: tuning does not lower the divergence ({found})."
        return f"{len(self.gains)} norm gains are tuned to the rounded weights ({found})."


def tune_gains(
    original: Model, quantized: Model, tokens: Tokens, n_threads: int = 1, progress: Progress = no_progress
) -> TunedGains:
    """Return gains that lower the divergence of a quantized model from its original.

    In memory: the weights of both models in float32 if they fit (``held_bytes``); for every thread, the stream of one
    sequence at every layer; the output stream of the original for all tokens. The result does not depend on
    ``n_threads``.

    Args:
        original: the model before rounding, with the channels of the file; ``Decoder`` supports it.
        quantized: the file, opened; its own gains do not count.
        tokens: ``(n_sequences, n_positions)`` ids of calibration text, at least two sequences.
        n_threads: CPU threads.
        progress: called with sequences done and sequences in all.

    Raises:
        ModelError: activations are not finite.

    """
    n_held = max(1, len(tokens) // HELD_OUT)
    n_tuned = len(tokens) - n_held
    total = len(tokens) + 2 * n_held + N_EPOCHS * n_tuned
    with _open_pools(n_threads) as (pool, slab_pool):
        network, reads = _Network(original, tokens.shape[1], slab_pool), list[Float32]()
        for read in each(pool, lambda sequence: network.read(sequence, {}), tokens):
            reads.append(read)
            progress(len(reads), total)
        tuner = _Tuner(_Network(quantized, tokens.shape[1], slab_pool), _Original(network, reads), tokens, pool)
        held = range(n_tuned, len(tokens))
        before = tuner.divergence(held)
        tuner.tune(n_tuned, lambda done, _: progress(len(tokens) + n_held + done, total))
        after = tuner.divergence(held)
    progress(total, total)
    if not math.isfinite(before + after):
        raise ModelError("the predictions of the quantized model are not finite")
    return TunedGains(tuner.gains if after < before else {}, before, after)


def write_gains(path: Path, gains: Mapping[str, Float32]) -> None:
    """Overwrite gains, which are F32, in a GGUF file; raise ``OutputError`` when it cannot be written."""
    try:
        with path.open("r+b") as file:
            for tensor in read_gguf_header(path).tensors:
                if tensor.name in gains:
                    file.seek(tensor.offset)
                    file.write(gains[tensor.name].astype("<f4").tobytes())
    except OSError as error:
        raise output_error(path, error) from error


@contextmanager
def _open_pools(n_threads: int) -> Iterator[tuple[Executor, Executor | None]]:
    """Open threads for sequences, and for slabs of matrices where a step has fewer sequences than there are threads."""
    with ThreadPoolExecutor(min(n_threads, N_BATCH)) as pool, ThreadPoolExecutor(n_threads) as slab_pool:
        yield pool, slab_pool if n_threads > N_BATCH else None


class _Network:
    """One model, a sequence at a time; holds its weights in float32 if they fit in memory."""

    def __init__(self, model: Model, n_positions: int, slab_pool: Executor | None) -> None:
        self.model, self._n_positions, self._slab_pool = model, n_positions, slab_pool
        self._decoder, is_held = Decoder.of(model, n_positions), held_bytes(model.n_weights) > 0
        self._layers = [(view_layer(model, index), LayerWeights(is_held)) for index in range(model.hparams.n_layers)]
        self._head_weights = LayerWeights(is_held)

    def read(self, sequence: Tokens, gains: Gains) -> Float32:
        """Return what the output matrix reads, ``(n_positions, n_embd)``."""
        return self._output_norm(self._tape(gains, is_kept=False), Node(self._streams(sequence, gains)[-1])).value

    def differentiate(self, sequence: Tokens, gains: Gains, original: _Original, index: int) -> tuple[float, Gains]:
        """Return the divergence from the original, summed over a sequence, and its derivatives by gains."""
        streams, found = self._streams(sequence, gains), Gains()
        tape, entry = self._tape(gains), Node(streams.pop())
        read = self._output_norm(tape, entry)
        divergence, grad = original.divergence(self, read.value, index)
        read.receive(grad)
        tape.backward()
        found.update(tape.gain_grads)
        for view, weights in reversed(self._layers):
            if entry.grad is None:
                raise ModelError("the output does not depend on the stream")
            tape, above, entry = self._tape(gains, weights), entry.grad, Node(streams.pop())
            self._decoder.layer(tape, view, entry).receive(above)
            tape.backward()
            found.update(tape.gain_grads)
        return divergence, found

    def logits(self, read: Float32) -> tuple[Float32, Float32]:
        """Return logits, ``(n, n_vocab)``, and their derivative by the product with the output matrix."""
        head = Head(self.model, read, 0, self._head_weights)
        parts = [head.logits(slab)[1:] for slab in head.slabs]
        slopes = [np.broadcast_to(slope, logits.shape) for logits, slope in parts]
        return np.concatenate([logits for logits, _ in parts], axis=1), np.concatenate(slopes, axis=1)

    def through_head(self, grad: Float32) -> Float32:
        """Return the derivative by the input of the output matrix from that by its products, ``(n, n_vocab)``."""
        head = self.model.unembedding()
        parts = (grad[:, slice(*slab)] @ self._head_weights.rows(head, slab) for slab in slabs(head))
        return functools.reduce(np.add, parts)

    def _streams(self, sequence: Tokens, gains: Gains) -> list[Float32]:
        """Return the input stream of every layer and the output of the last, ``(n_positions, n_embd)`` each."""
        tape = self._tape(gains, is_kept=False)
        found = [embed(self.model, self._decoder, tape, sequence[np.newaxis])[1].value]
        for view, weights in self._layers:
            tape = self._tape(gains, weights, is_kept=False)
            found.append(self._decoder.layer(tape, view, Node(found[-1])).value)
        return found

    def _output_norm(self, tape: GainTape, entry: Node) -> Node:
        return output_norm(self.model, self._decoder, tape, entry)

    def _tape(self, gains: Gains, weights: LayerWeights | None = None, is_kept: bool = True) -> GainTape:
        held = LayerWeights() if weights is None else weights
        return GainTape(self._slab_pool, self._n_positions, {}, None, is_kept, weights=held, gains=gains)


@dataclass(frozen=True)
class _Original:
    """The original, and what its output matrix reads in every sequence, ``(n_positions, n_embd)`` each."""

    network: _Network
    reads: Sequence[Float32]

    def divergence(self, network: _Network, read: Float32, index: int) -> tuple[float, Float32]:
        """Return the divergence of a network, summed over a sequence, and its derivative by ``read``."""
        total, grads = 0.0, list[Float32]()
        step = max(1, _LOGITS // network.model.unembedding().n_rows)
        for start in range(0, len(read), step):
            rows = slice(start, start + step)
            wanted = _log_softmax(self.network.logits(self.reads[index][rows])[0])
            logits, slope = network.logits(read[rows])
            found, chances = _log_softmax(logits), np.exp(wanted)
            total += float(np.vdot(chances, wanted - found))
            grads.append(network.through_head((np.exp(found) - chances) * slope))
        return total, np.concatenate(grads)


@dataclass
class _Tuner:
    """Adam; a gain is that of the original times 1 plus a parameter, which starts at 0.

    Attributes:
        network: the quantized model.
        original: the original.
        tokens: all tokens.
        pool: runs sequences.
        gains: the gains so far.

    """

    network: _Network
    original: _Original
    tokens: Tokens
    pool: Executor
    gains: Gains = field(default_factory=dict)
    _moments: dict[str, tuple[Float32, Float32, Float32]] = field(default_factory=dict)

    def divergence(self, sequences: Sequence[int]) -> float:
        """Return the mean divergence over some sequences, nats per token."""

        def job(index: int) -> float:
            read = self.network.read(self.tokens[index], self.gains)
            return self.original.divergence(self.network, read, index)[0]

        n_tokens = len(sequences) * int(self.tokens.shape[1])
        return sum(each(self.pool, job, sequences)) / n_tokens

    def tune(self, n_sequences: int, progress: Progress) -> None:
        """Tune on the first sequences, in a new random order in every epoch."""
        self.gains, rng, scale = self._start(), np.random.default_rng(0), 0.0
        orders = [rng.permutation(n_sequences) for _ in range(N_EPOCHS)]
        batches = [order[at : at + N_BATCH].tolist() for order in orders for at in range(0, n_sequences, N_BATCH)]
        done = 0
        for step, batch in enumerate(batches):
            divergence, grads = self._differentiate(batch)
            scale = scale or RATE * math.sqrt(max(divergence, _TINY))
            self._step(step, scale * (1 + math.cos(math.pi * step / len(batches))) / 2, grads)
            done += len(batch)
            progress(done, N_EPOCHS * n_sequences)

    def _start(self) -> Gains:
        """Return the gains of the original."""
        tensors = self.original.network.model.tensors
        return {t.name: t.load().ravel() for t in tensors if len(t.shape) == 1 and t.role.endswith("norm")}

    def _differentiate(self, batch: Sequence[int]) -> tuple[float, Gains]:
        """Return the mean divergence over a batch, and its derivatives by gains."""

        def job(index: int) -> tuple[float, Gains]:
            return self.network.differentiate(self.tokens[index], self.gains, self.original, index)

        n_tokens, total, grads = len(batch) * self.tokens.shape[1], 0.0, Gains()
        for divergence, found in each(self.pool, job, batch):
            total += divergence / n_tokens
            for name, grad in found.items():
                part = grad / np.float32(n_tokens)
                grads[name] = part if name not in grads else grads[name] + part
        return total, grads

    def _step(self, step: int, rate: float, grads: Gains) -> None:
        """Take one step of Adam."""
        for name, grad in grads.items():
            start = self.original.network.model.by_name[name].load().ravel()
            zero = np.zeros_like(start)
            parameter, mean, square = self._moments.get(name, (zero, zero, zero))
            by_parameter = grad * start
            mean = np.float32(DECAYS[0]) * mean + np.float32(1 - DECAYS[0]) * by_parameter
            square = np.float32(DECAYS[1]) * square + np.float32(1 - DECAYS[1]) * np.square(by_parameter)
            unbiased = [part / np.float32(1 - d ** (step + 1)) for part, d in zip((mean, square), DECAYS, strict=True)]
            parameter = parameter - np.float32(rate) * unbiased[0] / (np.sqrt(unbiased[1]) + np.float32(_TINY))
            self._moments[name] = parameter, mean, square
            self.gains[name] = start * (1 + parameter)


def _log_softmax(logits: Float32) -> Float32:
    """Return the logarithms of the softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: Float32 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
