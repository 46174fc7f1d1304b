"""Reverse-mode differentiation of a decoder: operations forward, their derivatives backward.

Activations are ``(n, channels)`` float32, ``n = n_sequences * n_positions`` rows, sequence after sequence; an expert
has the rows of the tokens routed to it. Every slab of a matrix is one job with one BLAS thread, and sums follow the
order of the slabs: results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Tensor
from .activation_functions import ACTIVATIONS
from .layers import Linear
from .norms import Norm
from .weights import LayerWeights, slabs

_LEAST_SUM = np.float32(2.0**-14)  # least divisor of expert weights: llama.cpp's, the smallest normal float16

Job = TypeVar("Job")
Result = TypeVar("Result")
Ids = NDArray[np.intp]
RowNorms = dict[tuple[str, int], Float64]  # by stored name and first row of a matrix, ``(n_rows,)`` each


@dataclass(eq=False)
class Node:
    """A value of the forward pass, ``(n, channels)``, and the derivative of the loss with respect to it, once known."""

    value: Float32
    grad: Float32 | None = None

    def receive(self, grad: Float32) -> None:
        """Add to the derivative."""
        self.grad = grad if self.grad is None else self.grad + grad


@dataclass
class Tape:
    """Operations so far, for ``backward`` to differentiate.

    Attributes:
        pool: runs the jobs of an operation; ``None``: they run in turn.
        n_positions: tokens of a sequence; rows of one sequence lie together.
        squared_norms: ``sum (W dL/dW)^2`` of every row, summed over sequences; filled by ``backward``.
        on_input: called forward for every matrix that is not part of a stack: stored name and input, ``(n, n_cols)``.
        keeps_values: whether ``backward`` can follow; otherwise values are freed as soon as nothing needs them.
        on_expert: called forward for every matrix of a routed expert: stored name, number of the expert, the tokens
            routed to it, ``(n_routed,)``, and the input, ``(n_routed, n_cols)``.
        tokens: ascending numbers of the tokens of these activations, ``(n,)``; ``None``: all tokens.
        weights: source of the rows of matrices.
    """

    pool: Executor | None
    n_positions: int
    squared_norms: RowNorms
    on_input: Callable[[str, Float32], None] | None = None
    keeps_values: bool = True
    on_expert: Callable[[str, int, Ids, Float32], None] | None = None
    tokens: Ids | None = None
    weights: LayerWeights = field(default_factory=LayerWeights)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def backward(self) -> None:
        """Differentiate all operations, last first: every input node receives its derivative."""
        while self._undo:
            self._undo.pop()()

    def keep(self, undo: Callable[[], None]) -> None:
        """Register the derivative of the last operation."""
        if self.keeps_values:
            self._undo.append(undo)

    def node(self, value: Float32) -> Node:
        """Return a node of values that the caller computed."""
        return Node(value)

    def edges(self, n: int) -> list[int]:
        """Return the first row of every sequence, and ``n``."""
        if self.tokens is None:
            return list(range(0, n + 1, self.n_positions))
        firsts = range(0, int(self.tokens[-1]) + 1, self.n_positions)
        return [*np.searchsorted(self.tokens, firsts).tolist(), n]

    def each(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield the results of jobs in order; the caller checks for overflow."""
        return each(self.pool, function, jobs)

    def linear(self, linear: Linear, x: Node) -> Node:
        """Return ``x W^T + b``."""
        weight = linear.weight
        if self.on_input is not None:
            self.on_input(linear.name, x.value)
        parts = self.each(lambda slab: x.value @ self.weights.rows(weight, slab).T, slabs(weight))
        out = Node(np.concatenate(list(parts), axis=1))
        if linear.bias is not None:
            out.value += linear.bias.load().ravel()

        def undo() -> None:
            if out.grad is None:
                return
            x.receive(self.through(weight, out.grad, x.value))

        self.keep(undo)
        return out

    def through(self, weight: Tensor, grad: Float32, x: Float32) -> Float32:
        """Return the derivative by the input of a matrix; add ``sum (W dL/dW)^2`` of its rows to the squared norms.

        Args:
            weight: the matrix.
            grad: derivative by its output, ``(n, n_rows)``.
            x: its input, ``(n, n_cols)``.

        """
        edges = self.edges(len(x))

        def job(slab: tuple[int, int]) -> tuple[Float32, Float64]:
            rows = self.weights.rows(weight, slab)
            part = np.ascontiguousarray(grad[:, slice(*slab)])
            return part @ rows, squared_gradient_norms(rows, part, x, edges)

        total, norms = np.zeros_like(x), list[Float64]()
        for by_input, squared in self.each(job, slabs(weight)):
            total += by_input
            norms.append(squared)
        self.add_norms(weight, np.concatenate(norms))
        return total

    def add_norms(self, weight: Tensor, norms: Float64) -> None:
        """Add to the squared norms of the rows of a matrix, which may be used several times."""
        key = weight.name, weight.first_row
        self.squared_norms[key] = self.squared_norms[key] + norms if key in self.squared_norms else norms

    def gain(self, gain: Tensor) -> Float32:
        """Return the gain of a norm, ``(n_weights,)``."""
        return gain.load().astype(np.float32).ravel()

    def on_gain(self, gain: Tensor, grad: Float32, unit: Float32) -> None:
        """Take the derivative by the output of a norm and its input without the gain, ``(n, channels)`` each."""

    def norm(self, norm: Norm, x: Node, kind: str, eps: float) -> Node:
        """Normalize each row: RMS norm, or layer norm (``kind`` ``layer``), with gain and bias."""
        gain = np.ones(1, dtype=np.float32) if norm.gain is None else self.gain(norm.gain)
        centred = x.value - x.value.mean(axis=1, keepdims=True) if kind == "layer" else x.value
        inverse = 1 / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(eps))
        unit = centred * inverse
        out = Node(unit * gain)
        if norm.bias is not None:
            out.value += norm.bias.load().ravel()

        def undo() -> None:
            if out.grad is None:
                return
            if norm.gain is not None:
                self.on_gain(norm.gain, out.grad, unit)
            grad = out.grad * gain
            grad = grad - unit * (grad * unit).mean(axis=1, keepdims=True)
            grad = grad * inverse
            x.receive(grad - grad.mean(axis=1, keepdims=True) if kind == "layer" else grad)

        self.keep(undo)
        return out

    def heads_norm(self, gain: Tensor, x: Node, n_heads: int, kind: str, eps: float) -> Node:
        """Normalize queries or keys, per head or over all heads, depending on the length of the gain."""
        width = x.value.shape[1] // n_heads if gain.n_weights != x.value.shape[1] else x.value.shape[1]
        if gain.n_weights == x.value.shape[1] and len(gain.shape) > 1:
            width = gain.n_cols  # one gain per head
        gains = np.resize(self.gain(gain), x.value.shape[1])
        shaped = x.value.reshape(len(x.value), -1, width)
        if kind == "layer":
            shaped = shaped - shaped.mean(axis=2, keepdims=True)
        inverse = 1 / np.sqrt(np.square(shaped).mean(axis=2, keepdims=True) + np.float32(eps))
        unit = shaped * inverse
        out = Node(unit.reshape(x.value.shape) * gains)

        def undo() -> None:
            if out.grad is None:
                return
            self.on_gain(gain, out.grad, unit.reshape(x.value.shape))
            grad = (out.grad * gains).reshape(shaped.shape)
            grad = (grad - unit * (grad * unit).mean(axis=2, keepdims=True)) * inverse
            grad = grad - grad.mean(axis=2, keepdims=True) if kind == "layer" else grad
            x.receive(grad.reshape(x.value.shape))

        self.keep(undo)
        return out

    def rotate(self, x: Node, cos: Float32, sin: Float32, n_heads: int, is_neox: bool) -> Node:
        """Apply rope to queries or keys.

        Args:
            x: ``(n, n_heads * head_dim)``.
            cos: ``(n_positions, n_pairs)``; channels beyond ``2 * n_pairs`` stay unchanged.
            sin: ``(n_positions, n_pairs)``.
            n_heads: number of heads.
            is_neox: NEOX pairs (one channel of each half) instead of NORM pairs (adjacent channels).

        """
        out = Node(_rotated(x.value, cos, sin, n_heads, is_neox))

        def undo() -> None:
            if out.grad is not None:
                x.receive(_rotated(out.grad, cos, -sin, n_heads, is_neox))

        self.keep(undo)
        return out

    def attention(self, q: Node, k: Node, v: Node, n_heads: int, n_kv_heads: int, scale: float, cap: float) -> Node:
        """Return causal attention within each sequence, ``(n, n_heads * value_dim)``.

        Args:
            q: ``(n, n_heads * head_dim)``.
            k: ``(n, n_kv_heads * head_dim)``.
            v: ``(n, n_kv_heads * value_dim)``.
            n_heads: query heads, a multiple of ``n_kv_heads``.
            n_kv_heads: key and value heads.
            scale: factor on the logits.
            cap: logits become ``cap * tanh(logits / cap)``; 0 for no cap.

        """
        t = self.n_positions
        n_sequences, group = len(q.value) // t, n_heads // n_kv_heads
        queries, keys, values = (
            node.value.reshape(n_sequences, t, n, -1) for node, n in ((q, n_heads), (k, n_kv_heads), (v, n_kv_heads))
        )
        out_value = np.empty((n_sequences, t, n_heads, values.shape[-1]), dtype=np.float32)
        hidden = np.triu(np.ones((t, t), dtype=bool), 1)
        jobs = [(s, h) for s in range(n_sequences) for h in range(n_heads)]

        def weights(job: tuple[int, int]) -> tuple[Float32, Float32 | None]:
            """Return the attention weights of a head, ``(t, t)``, and the derivative of the cap."""
            s, h = job
            logits = queries[s, :, h] @ keys[s, :, h // group].T
            logits *= np.float32(scale)
            slope = None
            if cap:
                bent = np.tanh(logits / np.float32(cap))
                slope, logits = 1 - bent**2, bent * np.float32(cap)
            logits[hidden] = -np.inf
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=1, keepdims=True)
            return logits, slope

        def attend(job: tuple[int, int]) -> None:
            s, h = job
            out_value[s, :, h] = weights(job)[0] @ values[s, :, h // group]

        for _ in self.each(attend, jobs):
            pass
        out = Node(out_value.reshape(len(q.value), -1))

        def undo() -> None:
            if out.grad is None:
                return
            grads = out.grad.reshape(out_value.shape)

            def job(at: tuple[int, int]) -> tuple[Float32, Float32, Float32]:
                s, h = at
                attended, slope = weights(at)
                grad = grads[s, :, h]
                by_logits = attended * (grad @ values[s, :, h // group].T)
                by_logits -= attended * by_logits.sum(axis=1, keepdims=True)
                if slope is not None:
                    by_logits *= slope
                by_logits *= np.float32(scale)
                return by_logits @ keys[s, :, h // group], by_logits.T @ queries[s, :, h], attended.T @ grad

            dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
            for (s, h), (by_q, by_k, by_v) in zip(jobs, self.each(job, jobs), strict=True):
                dq[s, :, h] = by_q
                dk[s, :, h // group] += by_k
                dv[s, :, h // group] += by_v
            for node, grad in ((q, dq), (k, dk), (v, dv)):
                node.receive(grad.reshape(node.value.shape))

        self.keep(undo)
        return out

    def units(self, gate: Node | None, up: Node, activation: str, offset: float = 0.0) -> Node:
        """Return the hidden units of a feed-forward block: ``f(gate) (up + offset)``, or ``f(up)`` without a gate."""
        function, slope = (_in_float32(part) for part in ACTIVATIONS[activation])
        if gate is None:
            out = Node(function(up.value))
        else:
            opened = function(gate.value)
            shifted = up.value + np.float32(offset) if offset else up.value
            out = Node(opened * shifted)

        def undo() -> None:
            if out.grad is None:
                return
            if gate is None:
                up.receive(out.grad * slope(up.value))
            else:
                up.receive(out.grad * opened)
                gate.receive(out.grad * shifted * slope(gate.value))

        self.keep(undo)
        return out

    def scores(self, logits: Node, kind: str) -> Node:
        """Return the softmax of each row, or the sigmoid of each entry, depending on ``kind``."""
        if kind == "softmax":
            raised = np.exp(logits.value - logits.value.max(axis=1, keepdims=True))
            out = Node(raised / raised.sum(axis=1, keepdims=True))
        else:
            out = Node(np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * logits.value)))

        def undo() -> None:
            if out.grad is None:
                return
            by_logits = out.value * out.grad
            if kind == "softmax":
                logits.receive(by_logits - out.value * by_logits.sum(axis=1, keepdims=True))
            else:
                logits.receive(by_logits * (1 - out.value))

        self.keep(undo)
        return out

    def chosen(self, scores: Node, bias: Tensor | None, n_chosen: int) -> Ids:
        """Return the columns of the largest scores of each row, ``(n, n_chosen)``; a bias affects the choice only."""
        ranked = scores.value if bias is None else scores.value + bias.load().ravel()
        return np.argsort(-ranked, axis=1, kind="stable")[:, :n_chosen]

    def chosen_weights(self, scores: Node, chosen: Ids, normed: bool, scale: float) -> Node:
        """Return the weights of the chosen experts, ``(n, n_chosen)``: their scores, ``normed`` to sum 1, and scaled.

        Args:
            scores: ``(n, n_experts)``.
            chosen: ``(n, n_chosen)`` columns of ``scores``, distinct within a row.
            normed: whether to divide the scores by their sum (``norm_topk_prob``).
            scale: factor on the result.

        """
        picked = np.take_along_axis(scores.value, chosen, axis=1)
        total = np.maximum(picked.sum(axis=1, keepdims=True), _LEAST_SUM) if normed else np.ones(1, dtype=np.float32)
        share = picked / total
        out = Node(share * np.float32(scale))

        def undo() -> None:
            if out.grad is None:
                return
            grad = out.grad * np.float32(scale)
            if normed:
                grad = grad - (grad * share).sum(axis=1, keepdims=True)
            by_scores = np.zeros_like(scores.value)
            np.put_along_axis(by_scores, chosen, grad / total, axis=1)
            scores.receive(by_scores)

        self.keep(undo)
        return out

    def experts(self, x: Node, chosen: Ids, weights: Node, write: Callable[[Tape, int, Node], Node]) -> Node:
        """Return the weighted sum of the outputs of the chosen experts, ``(n, channels)`` like ``x``.

        Runs one expert at a time and recomputes it backward instead of keeping its values. The choice of experts is a
        constant; derivatives pass through their outputs and weights.

        Args:
            x: their input.
            chosen: ``(n, n_chosen)`` numbers of experts, different ones in a row.
            weights: ``(n, n_chosen)``.
            write: what an expert does, from a tape of its own, its number and the rows of ``x`` that it gets.

        """

        def visit(tape: Tape, expert: int) -> tuple[Ids, Ids, Tape, Node, Node]:
            tokens, places = np.nonzero(chosen == expert)
            inner, read = replace(tape, on_input=None, tokens=tokens, _undo=[]), Node(x.value[tokens])
            return tokens, places, inner, read, write(inner, expert, read)

        visited = [int(expert) for expert in np.unique(chosen)]
        out = Node(np.zeros_like(x.value))
        for expert in visited:
            tokens, places, _, _, written = visit(self, expert)
            out.value[tokens] += written.value * weights.value[tokens, places, np.newaxis]

        def undo() -> None:
            if out.grad is None:
                return
            silent = replace(self, on_expert=None)
            by_x, by_weights = np.zeros_like(x.value), np.zeros_like(weights.value)
            for expert in visited:
                tokens, places, inner, read, written = visit(silent, expert)
                grad = out.grad[tokens]
                by_weights[tokens, places] = (grad * written.value).sum(axis=1)
                written.receive(grad * weights.value[tokens, places, np.newaxis])
                inner.backward()
                if read.grad is not None:
                    by_x[tokens] += read.grad
            x.receive(by_x)
            weights.receive(by_weights)

        self.keep(undo)
        return out

    def times(self, x: Node, factor: Node) -> Node:
        """Return rows of ``x`` times a factor each, ``(n, 1)``."""
        out = Node(x.value * factor.value)

        def undo() -> None:
            if out.grad is not None:
                x.receive(out.grad * factor.value)
                factor.receive((out.grad * x.value).sum(axis=1, keepdims=True))

        self.keep(undo)
        return out

    def add(self, first: Node, second: Node, scale: float = 1.0) -> Node:
        """Return ``first + scale * second``."""
        factor = np.float32(scale)
        out = Node(first.value + second.value * factor)

        def undo() -> None:
            if out.grad is not None:
                first.receive(out.grad)
                second.receive(out.grad * factor)

        self.keep(undo)
        return out


def each(pool: Executor | None, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Yield the results of jobs in order, from a pool if there is one; the caller checks for overflow."""

    def quietly(job: Job) -> Result:
        with np.errstate(over="ignore", invalid="ignore"):  # every thread has its own
            return function(job)

    return map(quietly, jobs) if pool is None else pool.map(quietly, jobs)


def squared_gradient_norms(rows: Float32, grad: Float32, x: Float32, edges: Sequence[int]) -> Float64:
    """Return ``sum (W dL/dW)^2`` of some rows of a matrix, ``(n_rows,)``, summed over sequences.

    Args:
        rows: ``(n_rows, n_cols)`` of ``W``.
        grad: derivative of the loss by their output, ``(n, n_rows)``.
        x: their input, ``(n, n_cols)``.
        edges: the first row of each sequence in ``x``, and ``n``.

    """
    total = np.zeros(len(rows))
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        by_weight = grad[start:stop].T @ x[start:stop]
        by_weight *= rows
        total += np.einsum("ij,ij->i", by_weight, by_weight)
    return total


def _in_float32(function: Callable[[Float64], Float64]) -> Callable[[Float32], Float32]:
    """Cast a function of arrays to float32: numpy preserves the precision of its input."""
    return cast("Callable[[Float32], Float32]", function)


def angles(n_positions: int, frequencies: Float64) -> tuple[Float32, Float32]:
    """Return cosines and sines ``(n_positions, n_pairs)`` of positions times frequencies ``(n_pairs,)``."""
    radians = np.arange(n_positions)[:, np.newaxis] * frequencies
    return np.cos(radians).astype(np.float32), np.sin(radians).astype(np.float32)


def _rotated(x: Float32, cos: Float32, sin: Float32, n_heads: int, is_neox: bool) -> Float32:
    n_positions, n_pairs = cos.shape
    shaped = x.reshape(-1, n_positions, n_heads, x.shape[1] // n_heads)
    pairs = (slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)) if is_neox else (
        slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2))  # fmt: skip
    a, b = shaped[..., pairs[0]], shaped[..., pairs[1]]
    cos, sin = cos[:, np.newaxis], sin[:, np.newaxis]
    out = shaped.copy()
    out[..., pairs[0]] = a * cos - b * sin
    out[..., pairs[1]] = a * sin + b * cos
    rotated: Float32 = out.reshape(x.shape)
    return rotated
