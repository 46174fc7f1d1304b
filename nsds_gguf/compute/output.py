"""Output norm and output matrix: sampled predictions, and the derivative of their log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..records import Float32, Float64, Model
from .decoder import Decoder
from .norms import Norm
from .tape import Node, Tape, each, squared_gradient_norms
from .weights import LayerWeights, Slab, slabs


def output_norm(model: Model, decoder: Decoder, tape: Tape, x: Node) -> Node:
    """Return the input of the output matrix, ``(n, n_embd)``."""
    tensors = model.by_name
    gain = tensors.get("output_norm.weight")
    if gain is None:  # olmo has layer norms without gain; RMS models without gain have no norm
        return x if model.hparams.norm == "rms" else decoder.norm(tape, Norm(), x)
    return decoder.norm(tape, Norm(gain, tensors.get("output_norm.bias")), x)


def loss_gradient(
    model: Model, decoder: Decoder, tape: Tape, stream: Float32, scored: NDArray[np.intp], seed: int, pool: Executor
) -> tuple[Float32, float]:
    """Return the derivative of ``sum signs * log p(sampled)`` by the stream, and the output's ``sum (W dL/dW)^2``.

    Args:
        model: the model.
        decoder: its decoder.
        tape: an empty tape.
        stream: ``(n, n_embd)``, output of the last layer.
        scored: rows at which to sample a token from the prediction, equally many in every sequence.
        seed: of tokens and signs.
        pool: runs the slabs of the vocabulary.

    Raises:
        ModelError: activations are not finite: the weights are damaged.

    """
    x = Node(stream)
    read = output_norm(model, decoder, tape, x)
    if not np.isfinite(read.value).all():
        raise ModelError("tensor output_norm.weight: its output is not finite; the weights are damaged")
    head = Head(model, read.value[scored], seed, tape.weights)
    found = list(each(pool, head.scan, head.slabs))
    log_sum, drawn = sampled(found)
    signs = drawn_signs(seed, len(scored))
    grad, squared_norm = np.zeros_like(stream), 0.0
    length = len(scored) * tape.n_positions // len(stream)
    derivatives = each(pool, lambda slab: head.derivative(slab, log_sum, drawn, signs, length), head.slabs)
    for by_input, part in derivatives:
        grad[scored] += by_input
        squared_norm += part
    read.receive(grad)
    tape.backward()
    if x.grad is None:
        raise ModelError("the output does not depend on the stream")
    return x.grad, squared_norm


@dataclass(frozen=True)
class Scan:
    """One slab of the vocabulary, by position: ``log sum exp`` of logits, largest perturbed logit, its token."""

    log_sum: Float64
    best: Float64
    drawn: NDArray[np.int64]


def sampled(found: Sequence[Scan]) -> tuple[Float64, NDArray[np.int64]]:
    """Return ``log sum exp`` of the logits and the sampled token of every position, from the scans of all slabs."""
    best = np.argmax([part.best for part in found], axis=0)
    drawn = np.array([part.drawn for part in found])[best, np.arange(len(best))]
    return np.logaddexp.reduce([part.log_sum for part in found]), drawn


def drawn_signs(seed: int, n: int) -> Float32:
    """Return ``n`` random signs, float32."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.float32), n)


class Head:
    """The output tensor over slabs of the vocabulary: holds one slab of logits at a time.

    The largest logit after adding Gumbel noise is a sample of the softmax (Gumbel, 1954), without normalization; each
    slab has its own noise generator.
    """

    def __init__(self, model: Model, x: Float32, seed: int, weights: LayerWeights | None = None) -> None:
        """Take the input of the scored positions, ``(n_scored, n_embd)``, and the seed of the samples."""
        self.tensor, self.hparams, self.x, self.seed = model.unembedding(), model.hparams, x, seed
        self.weights = LayerWeights() if weights is None else weights
        bias = model.by_name.get("output.bias")
        self.bias = None if bias is None else bias.load().ravel()
        self.slabs = slabs(self.tensor)

    def logits(self, slab: Slab) -> tuple[Float32, Float32, Float32]:
        """Return the rows of a slab, its logits ``(n_scored, n_rows)``, and their derivative by ``x W^T``."""
        h, rows = self.hparams, self.weights.rows(self.tensor, slab)
        logits = self.x @ rows.T
        if self.bias is not None:
            logits += self.bias[slice(*slab)]
        logits *= np.float32(h.logit_scale)
        slope = np.float32(h.logit_scale) * np.ones(1, dtype=np.float32)
        if h.final_logit_softcapping:
            bent = np.tanh(logits / np.float32(h.final_logit_softcapping))
            logits, slope = bent * np.float32(h.final_logit_softcapping), slope * (1 - bent**2)
        return rows, logits, slope

    def noise(self, slab: Slab, n_scored: int) -> Float64:
        """Return Gumbel noise for the logits of a slab, ``(n_scored, n_rows)``."""
        return np.random.default_rng([self.seed, slab[0]]).gumbel(size=(n_scored, slab[1] - slab[0]))

    def scan(self, slab: Slab) -> Scan:
        """Return the scan of a slab."""
        _, logits, _ = self.logits(slab)
        perturbed = logits + self.noise(slab, len(logits))
        largest = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64)) + largest[:, 0]
        at = perturbed.argmax(axis=1)
        return Scan(log_sum, perturbed[np.arange(len(at)), at], at + slab[0])

    def derivative(
        self, slab: Slab, log_sum: Float64, drawn: NDArray[np.int64], signs: Float32, length: int
    ) -> tuple[Float32, float]:
        """Return the derivative of ``sum signs log p(sampled)`` by the input, and ``sum (W dL/dW)^2`` of the rows."""
        rows, logits, slope = self.logits(slab)
        grad = -np.exp(logits - log_sum[:, np.newaxis].astype(np.float32))
        inside = np.flatnonzero((drawn >= slab[0]) & (drawn < slab[1]))
        grad[inside, drawn[inside] - slab[0]] += 1
        grad *= signs[:, np.newaxis] * slope
        squared = squared_gradient_norms(rows, grad, self.x, range(0, len(grad) + 1, length))
        return grad @ rows, float(squared.sum())
