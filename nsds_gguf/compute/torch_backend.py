"""The PyTorch backend: one layer's weights on the device at a time. Importing this module imports torch.

Sequences of operations, sampled predictions and sums are those of the numpy backend: the same random draws, made by
numpy; float32 products without TF32; sums of squares in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError, OutputError
from ..records import Float32, Float64, Model, Tensor
from .input_moments import Recording
from .layers import view_layer
from .numpy_backend import InputRecorder, NumpyBackend, NumpyLayer, NumpyOutput, SequenceInputs
from .output import Head, Scan, drawn_signs, output_norm, sampled
from .torch_device import free_device_bytes
from .torch_tape import TorchTape, squared_gradient_norms, tensor_of
from .weights import HELD_SHARE, LayerWeights, Slab, held_bytes, slabs


@contextmanager
def open_torch(device: str, model: Model, n_positions: int, n_threads: int) -> Iterator[TorchBackend]:
    """Open the backend on a device of PyTorch; the threads decode weights and draw noise."""
    with exact_products(), reports_full_memory(), ThreadPoolExecutor(n_threads) as pool:
        yield TorchBackend(device, model, n_positions, pool)


@contextmanager
def reports_full_memory() -> Iterator[None]:
    """Raise ``OutputError`` if the device runs out of memory while the context is open."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        said = str(error).split(". ")[0]
        raise OutputError(f"the GPU's memory is too small: {said}; pass --device cpu") from error


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, not in TF32 or BF16, while the context is open."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class TorchBackend(NumpyBackend):
    """A ``Backend``. Embeddings are looked up on the CPU; layers and output run on the device.

    On the device: the activations of one batch in one layer, the sums of that layer's inputs, and its weights in
    float32 if they fit in a quarter of the free memory; otherwise every batch copies them again.
    """

    def __init__(self, device: str, model: Model, n_positions: int, pool: Executor) -> None:
        """Take the device, a model that ``Decoder`` supports, and the pool that decodes weights."""
        super().__init__(model, n_positions, pool)
        self.device = device

    def torch_tape(self, weights: LayerWeights, inputs: SequenceInputs | None = None) -> TorchTape:
        """Return an empty tape on the device; with ``inputs``, for a forward pass only."""
        if inputs is None:
            return TorchTape(None, self.n_positions, {}, weights=weights, device=self.device)
        return TorchTape(
            None, self.n_positions, {}, inputs.add, False, on_expert=inputs.add_expert, weights=weights,
            device=self.device,
        )  # fmt: skip

    def weights_of(self, tensors: Collection[Tensor]) -> LayerWeights:
        """Return the rows of these matrices on the device, cached if they fit in its memory."""
        n_weights = sum(tensor.n_weights for tensor in tensors)
        is_held = held_bytes(n_weights) > 0
        if self.device != "cpu":
            is_held = 4 * n_weights <= HELD_SHARE * free_device_bytes()
        return DeviceWeights(self.device, self.pool, is_held)

    def recorder(self, groups: Sequence[tuple[str, ...]], recording: Recording | None) -> InputRecorder:
        """Return the sums over inputs of matrices, on the device."""
        return TorchRecorder(self, groups, recording or Recording())

    def column_squares(self, matrices: Iterable[Tensor], weights: LayerWeights) -> dict[str, Float64]:
        """Return the squared norms of columns; views of one stored tensor add up."""
        found: dict[str, Float64] = {}
        for matrix in matrices:
            if len(self.model.by_name[matrix.name].shape) == 2:
                total = sum(_squares(weights.rows(matrix, slab)) for slab in slabs(matrix))
                found[matrix.name] = found.get(matrix.name, np.zeros(matrix.n_cols)) + _array(total)
        return found

    def layer(self, index: int, recording: Recording | None = None) -> TorchLayer:
        """Return a layer."""
        return TorchLayer(self, view_layer(self.model, index), recording)

    def output(self, recording: Recording | None = None) -> TorchOutput:
        """Return the output."""
        return TorchOutput(self, recording)


class TorchLayer(NumpyLayer):
    """A ``LayerPass``."""

    _backend: TorchBackend

    def forward(self, x: Float32) -> Float32:
        """Return the output stream of the layer."""
        with torch.no_grad():
            inputs = SequenceInputs(self._recorder)
            tape = self._backend.torch_tape(self._weights, inputs)
            out: Float32 = _array(self._backend.decoder.layer(tape, self._view, tape.node(x)).value)
            self._recorder.add_batch([inputs])
            return out

    def backward(self, x: Float32, grad: Float32) -> tuple[Float32, Mapping[str, Float32]]:
        """Return the derivative with respect to the input, and the squared norms."""
        tape = self._backend.torch_tape(self._weights)
        entry = tape.input(x)
        tape.backward_from(self._backend.decoder.layer(tape, self._view, entry), tape.on_device(grad))
        norms = {key: _array(squared) for key, squared in tape.squared_norms.items()}
        found, squared_norms = tensor_of(entry).grad, self._backend.of_stored_rows([norms])
        return np.zeros_like(grad) if found is None else _array(found), squared_norms


class TorchOutput(NumpyOutput):
    """An ``OutputPass``."""

    _backend: TorchBackend

    def forward(self, x: Float32) -> None:
        """Add the input of the output matrix to the sums."""
        if not self._recorder.sums_input_of(self._name):
            return
        with torch.no_grad():
            tape = self._backend.torch_tape(self._weights)
            read = output_norm(self._backend.model, self._backend.decoder, tape, tape.node(x))
            self._recorder.add(self._name, read.value)

    def backward(self, x: Float32, scored: NDArray[np.intp], seed: int) -> tuple[Float32, float]:
        """Return the derivative with respect to the stream, and the squared norm; see ``output.loss_gradient``."""
        backend, tape = self._backend, self._backend.torch_tape(self._weights)
        entry, at = tape.input(x), tape.on_device(scored)
        read = output_norm(backend.model, backend.decoder, tape, entry)
        if not is_finite(read.value):
            raise ModelError("tensor output_norm.weight: its output is not finite; the weights are damaged")
        head = TorchHead(backend.model, tensor_of(read).detach()[at], seed, self._weights)
        with torch.no_grad():
            found = list(head.scans(backend.pool))
            log_sum, drawn = sampled(found)
            signs, length = drawn_signs(seed, len(scored)), len(scored) * backend.n_positions // len(x)
            grad, squared_norm = torch.zeros_like(read.value), 0.0
            for slab in head.slabs:
                by_input, part = head.derivative(slab, log_sum, drawn, signs, length)
                grad[at] += by_input
                squared_norm = squared_norm + part
        tape.backward_from(read, grad)
        return _array(tensor_of(entry).grad), float(squared_norm)


class TorchHead(Head):
    """The output tensor over slabs of the vocabulary, on the device."""

    x: Any

    def logits(self, slab: Slab) -> tuple[Any, Any, Any]:
        """Return the rows of a slab, its logits ``(n_scored, n_rows)``, and their derivative by ``x W^T``."""
        h, rows = self.hparams, self.weights.rows(self.tensor, slab)
        logits, slope = self.x @ rows.T, h.logit_scale
        if self.bias is not None:
            logits += self._on_device(self.bias[slice(*slab)])
        logits *= h.logit_scale
        if h.final_logit_softcapping:
            bent = torch.tanh(logits / h.final_logit_softcapping)
            logits, slope = bent * h.final_logit_softcapping, h.logit_scale * (1 - bent**2)
        return rows, logits, slope

    def scans(self, pool: Executor) -> Iterator[Scan]:
        """Yield the scan of every slab; the pool draws the noise of the next one."""
        drawing = [pool.submit(self.noise, self.slabs[0], len(self.x))]
        for index, slab in enumerate(self.slabs):
            if index + 1 < len(self.slabs):
                drawing.append(pool.submit(self.noise, self.slabs[index + 1], len(self.x)))
            _, logits, _ = self.logits(slab)
            best, at = (logits + self._on_device(drawing.pop(0).result())).max(dim=1)
            log_sum = torch.logsumexp(logits.double(), dim=1)
            yield Scan(_array(log_sum), _array(best), _array(at) + slab[0])

    def derivative(
        self, slab: Slab, log_sum: Float64, drawn: NDArray[np.int64], signs: Float32, length: int
    ) -> tuple[Any, Any]:
        """Return the derivative of ``sum signs log p(sampled)`` by the input, and ``sum (W dL/dW)^2`` of the rows."""
        rows, logits, slope = self.logits(slab)
        grad = -torch.exp(logits - self._on_device(log_sum.astype(np.float32))[:, None])
        inside = np.flatnonzero((drawn >= slab[0]) & (drawn < slab[1]))
        grad[self._on_device(inside), self._on_device(drawn[inside] - slab[0])] += 1
        grad *= self._on_device(signs)[:, None] * slope
        return grad @ rows, squared_gradient_norms(rows, grad, self.x, range(0, len(grad) + 1, length)).sum()

    def _on_device(self, values: Any) -> Any:
        return torch.from_numpy(values).to(self.x.device)


class DeviceWeights(LayerWeights):
    """Rows of matrices on a device while one layer is computed; threads decode all slabs of a matrix at first use."""

    def __init__(self, device: str, pool: Executor, is_held: bool) -> None:
        """Take the device, the pool that decodes, and whether rows stay on the device."""
        super().__init__(is_held)
        self._device, self._pool = device, pool

    def rows(self, weight: Tensor, slab: Slab) -> Any:
        """Return a slab of a matrix as a tensor on the device; read-only."""
        if not self._is_held:
            return self._copied(super().rows(weight, slab))
        if (id(weight), slab) not in self._decoded:
            for each, rows in zip(slabs(weight), self._pool.map(lambda s: weight.rows(slice(*s)), slabs(weight)),
                                  strict=True):  # fmt: skip
                self._decoded[id(weight), each] = weight, self._copied(rows)
        return self._decoded[id(weight), slab][1]

    def _copied(self, rows: Float32) -> Any:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)


class TorchRecorder(InputRecorder):
    """An ``InputRecorder`` whose products stay on the device."""

    _backend: TorchBackend

    def _products_of(self, group: tuple[str, ...], n_cols: int) -> Any:
        if group not in self._products:
            self._products[group] = torch.zeros(n_cols, n_cols, device=self._backend.device)
        return self._products[group]

    def _taken(self, x: Any, mask: NDArray[np.bool_]) -> Any:
        return x[torch.from_numpy(np.flatnonzero(mask)).to(x.device)]

    def _squares(self, rows: Any) -> Float64:
        squares: Float64 = _array(_squares(rows))
        return squares

    def _add_squares(self, total: Float64, rows: Any) -> None:
        total += self._squares(rows.reshape(-1, rows.shape[-1]))

    def _add_products(self, total: Any, rows: Any) -> None:
        total.addmm_(rows.T, rows)

    def _mirrored(self, products: Any) -> Float32:
        mirrored: Float32 = _array((products + products.T) / 2)
        return mirrored


def is_finite(tensor: Any) -> bool:
    """Return whether all values are finite."""
    return bool(torch.isfinite(tensor).all())


def _squares(rows: Any) -> Any:
    """Return the squared norms of columns in float64, on the device."""
    return rows.double().square().sum(0)


def _array(tensor: Any) -> Any:
    """Return a tensor as a numpy array on the CPU."""
    return tensor.detach().cpu().numpy()
