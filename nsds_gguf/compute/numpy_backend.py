"""The numpy backend: a tape per sequence, sequences as jobs of a thread pool.

Where there are fewer sequences than threads, slabs of matrices are jobs too. Every job uses one BLAS thread (the caller
sets that, ``resources.blas_threads``). Neither block sizes nor the order of sums depend on the number of threads, so
results do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64, Model, Tensor
from .decoder import Decoder
from .embedding import embed, lookup_squared_norm
from .input_moments import InputSums, NamedHessian, Recording
from .layers import Layer, view_layer
from .output import loss_gradient, output_norm
from .tape import Ids, Node, RowNorms, Tape, each
from .weights import LayerWeights, held_bytes, slabs

_STRIPE = 512  # columns per job of a sum of squares or products

Result = TypeVar("Result")
ExpertSums = tuple[Float64, NDArray[np.int64]]  # squares (2, n_cols) and counts (2,): first positions, all others


@contextmanager
def open_numpy(model: Model, n_positions: int, n_threads: int) -> Iterator[NumpyBackend]:
    """Open the backend for a model; see ``BackendEntry.open``."""
    with ThreadPoolExecutor(n_threads) as pool, ThreadPoolExecutor(n_threads) as slab_pool:
        yield NumpyBackend(model, n_positions, pool, slab_pool, n_threads)


class NumpyBackend:
    """A ``Backend``.

    In memory: in one layer, the activations of one sequence per thread and the inputs of the matrices for one batch;
    the sums of those inputs; the weights of the layer in float32 if they fit in a quarter of the available memory;
    otherwise every sequence decodes them again.
    """

    def __init__(
        self, model: Model, n_positions: int, pool: Executor, slab_pool: Executor | None = None, n_threads: int = 1
    ) -> None:
        """Take a model and the threads.

        Args:
            model: a model that ``Decoder`` supports (``decoder.what_is_missing``).
            n_positions: tokens of a sequence.
            pool: runs the jobs.
            slab_pool: runs slabs of matrices where there are fewer sequences than threads; ``None``: they run in turn.
            n_threads: threads of ``pool``.

        """
        self.model, self.n_positions, self.pool = model, n_positions, pool
        self._slab_pool, self._n_threads = slab_pool, n_threads
        self.decoder = Decoder.of(model, n_positions)

    def tape(self, weights: LayerWeights | None = None, inputs: SequenceInputs | None = None, n_jobs: int = 1) -> Tape:
        """Return an empty tape for one of ``n_jobs`` jobs at a time; with ``inputs``, for a forward pass only."""
        weights = LayerWeights() if weights is None else weights
        pool = self._slab_pool if n_jobs < self._n_threads else None
        if inputs is None:
            return Tape(pool, self.n_positions, {}, weights=weights)
        return Tape(pool, self.n_positions, {}, inputs.add, False, on_expert=inputs.add_expert, weights=weights)

    def each_sequence(self, function: Callable[[slice], Result], n_rows: int) -> Iterator[Result]:
        """Yield the results of a function of the rows of each sequence, in order; the function runs in the pool."""
        return each(
            self.pool, function, (slice(at, at + self.n_positions) for at in range(0, n_rows, self.n_positions))
        )

    def weights_of(self, tensors: Collection[Tensor]) -> LayerWeights:
        """Return the rows of these matrices, cached if they fit in memory."""
        return LayerWeights(held_bytes(sum(tensor.n_weights for tensor in tensors)) > 0)

    def recorder(self, groups: Sequence[tuple[str, ...]], recording: Recording | None) -> InputRecorder:
        """Return the sums over inputs of matrices, grouped by shared input; without a recording they stay empty."""
        return InputRecorder(self, groups, recording or Recording())

    def column_squares(self, matrices: Iterable[Tensor], weights: LayerWeights) -> dict[str, Float64]:
        """Return the squared norms of columns; views of one stored tensor add up."""
        found: dict[str, Float64] = {}
        for matrix in matrices:
            if len(self.model.by_name[matrix.name].shape) == 2:
                total = found.setdefault(matrix.name, np.zeros(matrix.n_cols))
                for part in self.pool.map(lambda slab, m=matrix: _squares(weights.rows(m, slab)), slabs(matrix)):
                    total += part
        return found

    def of_stored_rows(self, parts: Iterable[RowNorms]) -> dict[str, Float32]:
        """Return the sums of squared norms of rows, ``(n_rows,)`` by stored name; 0 for rows that no view has."""
        found: dict[str, Float64] = {}
        for part in parts:
            for (name, first), norms in part.items():
                rows = found.setdefault(name, np.zeros(self.model.by_name[name].n_rows))
                rows[first : first + len(norms)] += norms
        return {name: rows.astype(np.float32) for name, rows in found.items()}

    def embed(self, tokens: NDArray[np.int64]) -> Float32:
        """Return the input stream of the first layer."""
        return embed(self.model, self.decoder, self.tape(), tokens)[1].value

    def embed_backward(self, tokens: NDArray[np.int64], grad: Float32) -> float:
        """Return ``sum (W dL/dW)^2`` of the embedding rows looked up."""
        tape = self.tape()
        rows, entry = embed(self.model, self.decoder, tape, tokens)
        entry.receive(grad)
        tape.backward()
        return lookup_squared_norm(rows, tokens)

    def layer(self, index: int, recording: Recording | None = None) -> NumpyLayer:
        """Return a layer."""
        return NumpyLayer(self, view_layer(self.model, index), recording)

    def output(self, recording: Recording | None = None) -> NumpyOutput:
        """Return the output."""
        return NumpyOutput(self, recording)


class NumpyLayer:
    """A ``LayerPass``."""

    def __init__(self, backend: NumpyBackend, view: Layer, recording: Recording | None) -> None:
        """Take the views of the layer and the recording of its inputs."""
        self._backend, self._view = backend, view
        self._weights = backend.weights_of([*view.matrices()])
        groups = view.input_groups(backend.model.hparams) if recording is not None else []
        self._recorder = backend.recorder(groups, recording)

    def forward(self, x: Float32) -> Float32:
        """Return the output stream of the layer."""
        backend, out, n_jobs = self._backend, np.empty_like(x), len(x) // self._backend.n_positions
        self._weights.decode(self._view.matrices(), backend.pool)

        def job(rows: slice) -> SequenceInputs:
            inputs = SequenceInputs(self._recorder)
            tape = backend.tape(self._weights, inputs, n_jobs)
            out[rows] = backend.decoder.layer(tape, self._view, Node(x[rows])).value
            return inputs

        self._recorder.add_batch(list(backend.each_sequence(job, len(x))))
        return out

    def backward(self, x: Float32, grad: Float32) -> tuple[Float32, Mapping[str, Float32]]:
        """Return the derivative with respect to the input, and the squared norms."""
        backend, by_x, n_jobs = self._backend, np.zeros_like(grad), len(x) // self._backend.n_positions
        self._weights.decode(self._view.matrices(), backend.pool)

        def job(rows: slice) -> RowNorms:
            tape, entry = backend.tape(self._weights, n_jobs=n_jobs), Node(x[rows])
            backend.decoder.layer(tape, self._view, entry).receive(grad[rows])
            tape.backward()
            if entry.grad is not None:
                by_x[rows] = entry.grad
            return tape.squared_norms

        return by_x, backend.of_stored_rows(backend.each_sequence(job, len(x)))

    def input_sums(self) -> Sequence[InputSums]:
        """Return the sums."""
        return self._recorder.sums()

    def hessians(self) -> Iterator[NamedHessian]:
        """Yield the Hessians."""
        return self._recorder.hessians()

    def column_squares(self) -> Mapping[str, Float64]:
        """Return the squared norms of columns."""
        return self._backend.column_squares(self._view.matrices(), self._weights)


class NumpyOutput:
    """An ``OutputPass``."""

    def __init__(self, backend: NumpyBackend, recording: Recording | None) -> None:
        """Take the recording."""
        self._backend = backend
        self._name = backend.model.unembedding().name
        self._weights = backend.weights_of([backend.model.unembedding()])
        self._recorder = backend.recorder([(self._name,)] if recording else [], recording)

    def forward(self, x: Float32) -> None:
        """Add the input of the output matrix to the sums."""
        backend = self._backend
        if not self._recorder.sums_input_of(self._name):
            return

        def job(rows: slice) -> Float32:
            return output_norm(backend.model, backend.decoder, backend.tape(), Node(x[rows])).value

        self._recorder.add(self._name, np.concatenate(list(backend.each_sequence(job, len(x)))))

    def backward(self, x: Float32, scored: NDArray[np.intp], seed: int) -> tuple[Float32, float]:
        """Return the derivative with respect to the stream, and the squared norm."""
        backend = self._backend
        self._weights.decode([backend.model.unembedding()], backend.pool)
        tape = backend.tape(self._weights)
        return loss_gradient(backend.model, backend.decoder, tape, x, scored, seed, backend.pool)

    def input_sums(self) -> Sequence[InputSums]:
        """Return the sums."""
        return self._recorder.sums()

    def hessians(self) -> Iterator[NamedHessian]:
        """Yield the Hessians."""
        return self._recorder.hessians()

    def column_squares(self) -> Mapping[str, Float64]:
        """Return the squared norms of columns."""
        return self._backend.column_squares([self._backend.model.unembedding()], self._weights)


class SequenceInputs:
    """The inputs of the matrices of a layer in one job; a tape reports them."""

    def __init__(self, recorder: InputRecorder) -> None:
        """Take the recorder that will add them up."""
        self._recorder = recorder
        self.inputs: dict[str, Float32] = {}
        self.of_experts: list[tuple[str, int, ExpertSums]] = []

    def add(self, name: str, x: Float32) -> None:
        """Keep the input of a matrix, ``(n, n_cols)``, if the recorder sums it; only the first use counts."""
        if self._recorder.sums_input_of(name):
            self.inputs.setdefault(name, x)

    def add_expert(self, name: str, expert: int, tokens: Ids, x: Float32) -> None:
        """Sum the input of one matrix of a stack, ``(n_routed, n_cols)``, for the tokens routed to it."""
        if self._recorder.sums_input_of(name):
            self.of_experts.append((name, expert, self._recorder.expert_sums(tokens, x)))


class InputRecorder:
    """Sums over the inputs of matrices; an input shared by several matrices counts once, for the first of them."""

    def __init__(self, backend: NumpyBackend, groups: Sequence[tuple[str, ...]], recording: Recording) -> None:
        """Take the names grouped by shared input, and the recording."""
        self._backend, self._recording = backend, recording
        self._group_of = {group[0]: group for group in groups}
        self._sums: dict[tuple[str, ...], InputSums] = {}
        self._products: dict[tuple[str, ...], Float32] = {}

    def sums(self) -> list[InputSums]:
        """Return the sums so far."""
        return [sums.copy() for sums in self._sums.values()]

    def hessians(self) -> Iterator[NamedHessian]:
        """Yield ``E[x x^T]`` so far."""
        for names, products in self._products.items():
            counts = self._sums[names].counts[:, 0]
            n_rows = int(counts.sum() if self._recording.first_positions else counts[1])
            yield names, self._mirrored(products) / np.float32(max(n_rows, 1))

    def sums_input_of(self, name: str) -> bool:
        """Return whether a matrix is the first of a group that shares an input."""
        return name in self._group_of

    def add_batch(self, parts: Sequence[SequenceInputs]) -> None:
        """Add the inputs of a batch, sequence after sequence."""
        for name in list(parts[0].inputs):
            inputs = [part.inputs.pop(name) for part in parts]
            self.add(name, np.concatenate(inputs) if len(inputs) > 1 else inputs[0])
        for part in parts:
            for name, expert, sums in part.of_experts:
                self.add_expert_sums(name, expert, sums)

    def add(self, name: str, x: Float32) -> None:
        """Add the input of the first matrix of a group, ``(n, n_cols)``."""
        group = self._group_of[name]
        sums = self._of(group, x.shape[1])
        shaped = x.reshape(-1, self._backend.n_positions, x.shape[1])
        for part, rows in enumerate((shaped[:, :1], shaped[:, 1:])):
            self._add_squares(sums.squares[part, 0], rows)
            sums.counts[part, 0] += rows.shape[0] * rows.shape[1]
        if not self._recording.hessians.isdisjoint(group):
            rows = x if self._recording.first_positions else shaped[:, 1:].reshape(-1, x.shape[1])
            products = self._products_of(group, x.shape[1])
            self._add_products(products, rows)

    def expert_sums(self, tokens: Ids, x: Float32) -> ExpertSums:
        """Return the sums over the input of a matrix of a stack, ``(n_routed, n_cols)``."""
        is_first = tokens % self._backend.n_positions == 0
        parts = [self._taken(x, mask) for mask in (is_first, ~is_first)]
        return np.stack([self._squares(rows) for rows in parts]), np.array([len(rows) for rows in parts], np.int64)

    def add_expert_sums(self, name: str, expert: int, sums: ExpertSums) -> None:
        """Add the sums over the input of one matrix of a stack."""
        squares, counts = sums
        total = self._of(self._group_of[name], squares.shape[1], name)
        total.squares[:, expert] += squares
        total.counts[:, expert] += counts

    def _of(self, group: tuple[str, ...], n_cols: int, stack: str | None = None) -> InputSums:
        if group not in self._sums:
            n_matrices = 1 if stack is None else self._backend.model.by_name[stack].shape[0]
            squares, counts = np.zeros((2, n_matrices, n_cols)), np.zeros((2, n_matrices), np.int64)
            self._sums[group] = InputSums(group, squares, counts, stack is not None)
        return self._sums[group]

    def _products_of(self, group: tuple[str, ...], n_cols: int) -> Float32:
        if group not in self._products:
            self._products[group] = np.zeros((n_cols, n_cols), np.float32)
        return self._products[group]

    def _taken(self, x: Float32, mask: NDArray[np.bool_]) -> Float32:
        """Return some rows."""
        return x[mask]

    def _squares(self, rows: Float32) -> Float64:
        """Return the squared norms of columns."""
        return _squares(rows)

    def _add_squares(self, total: Float64, rows: Float32) -> None:
        """Add the squares of ``(n_sequences, n_positions, n_cols)`` to ``(n_cols,)``."""

        def add(start: int) -> None:
            stripe = rows[:, :, start : start + _STRIPE]
            total[start : start + _STRIPE] += np.einsum("spj,spj->j", stripe, stripe, dtype=np.float64)

        self._each_stripe(add, len(total))

    def _add_products(self, total: Float32, rows: Float32) -> None:
        """Add the lower triangle of ``rows^T rows``, in stripes of rows."""

        def add(start: int) -> None:
            stop = min(start + _STRIPE, len(total))
            stripe = rows[:, start:stop]
            total[start:stop, start:stop] += stripe.T @ stripe  # numpy calls BLAS's syrk: half the work
            if start:
                total[start:stop, :start] += stripe.T @ rows[:, :start]

        self._each_stripe(add, len(total))

    def _mirrored(self, products: Float32) -> Float32:
        """Copy the stripes of rows left of the diagonal to the columns above it, in place."""
        for start in range(_STRIPE, len(products), _STRIPE):
            products[:start, start : start + _STRIPE] = products[start : start + _STRIPE, :start].T
        return products

    def _each_stripe(self, add: Callable[[int], None], n_cols: int) -> None:
        """Run a job for every stripe of columns, last (longest) first."""

        def quietly(start: int) -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # every thread has its own
                add(start)

        for _ in self._backend.pool.map(quietly, reversed(range(0, n_cols, _STRIPE))):
            pass


def _squares(rows: Float32) -> Float64:
    """Return the squared norms of columns."""
    squares: Float64 = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return squares
