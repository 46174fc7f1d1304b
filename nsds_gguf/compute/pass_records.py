"""Records of a pass over tokens, layer by layer, from which an interrupted pass resumes; see ``system.store``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Float32, Float64
from ..system.resources import check_disk
from ..system.store import Store
from .input_moments import InputSums

PASS = "the pass over tokens"  # begins the names of its records

_STACK, _PLAIN, _SQUARES, _COUNTS = "stack", "plain", "squares", "counts"
_ALL, _FIRST, _COLUMNS = "all", "first", "columns"


@dataclass(frozen=True)
class LayerSums:
    """What a forward pass finds in a layer, or in the output.

    Attributes:
        inputs: sums over all batches.
        first_inputs: sums over the first batch alone.
        column_squares: squared norms of the columns of matrices, ``(n_cols,)`` by stored name, if recorded.

    """

    inputs: Sequence[InputSums]
    first_inputs: Sequence[InputSums]
    column_squares: Mapping[str, Float64] = field(default_factory=dict)


@dataclass(frozen=True)
class Backward:
    """State of a backward pass.

    Attributes:
        index: the layer that it has reached; the number of layers if it has only passed the output.
        grad: ``(n, n_embd)`` derivative with respect to the input stream of that layer.
        of_output: ``sum (W dL/dW)^2`` of the output matrix.
        squared_norms: the same of every row of the matrices of the layers from ``index`` on, ``(n_rows,)`` by stored
            name.

    """

    index: int
    grad: Float32
    of_output: float
    squared_norms: Mapping[str, Float32]


class RecordStreams:
    """``Streams`` as records: the streams of the first batch, and before one or two layers those of the others."""

    def __init__(self, store: Store, n_batches: int) -> None:
        """Take the store and the number of batches."""
        self._store, self._n_batches = store, n_batches

    def write(self, index: int, batch: int, values: Float32) -> None:
        """See ``Streams``."""
        with self._store.put_file(_stream(index, batch)) as path, path.open("wb") as file:
            np.save(file, np.ascontiguousarray(values), allow_pickle=False)

    def read(self, index: int, batch: int = 0) -> Float32:
        """See ``Streams``."""
        found: Float32 = np.load(self._store.file_path(_stream(index, batch)), allow_pickle=False)
        return found

    def drop(self, index: int) -> None:
        """See ``Streams``."""
        for batch in range(1, self._n_batches):
            self._store.remove(_stream(index, batch))

    def resumable(self, n_done: int, n_layers: int) -> int:
        """Return the number of layers, with the output at most ``n_done``, after which the streams are there."""
        whole = next((index for index in range(n_layers + 1) if not self._is_whole(index, [0])), n_layers + 1)
        if n_done > n_layers and whole > n_layers:
            return n_done
        others = range(1, self._n_batches)
        candidates = range(min(n_done, whole - 1, n_layers), 0, -1)
        return next((index for index in candidates if self._is_whole(index, others)), 0)

    def _is_whole(self, index: int, batches: Iterable[int]) -> bool:
        return all(self._store.get_file(_stream(index, batch)) is not None for batch in batches)


def record_streams(store: Store, n_layers: int, n_batches: int, slot_bytes: int) -> RecordStreams:
    """Return streams as records; raises ``OutputError`` when the disk has no room for what is not there yet."""
    n_slots = n_layers + 1 + 2 * (n_batches - 1) + 2  # and two derivatives of the backward pass
    check_disk(store.folder, n_slots * slot_bytes - store.n_bytes(PASS), "the residual stream of every layer")
    return RecordStreams(store, n_batches)


def put_layer(store: Store, index: int, found: LayerSums) -> None:
    """Record what a forward pass found in a layer; the output is the last layer."""
    columns = {f"{_COLUMNS}\n{name}": squares for name, squares in found.column_squares.items()}
    parts = {_ALL: found.inputs, _FIRST: found.first_inputs}
    sums = {key: array for part, of_part in parts.items() for key, array in _arrays(part, of_part)}
    store.put_arrays(_layer(index), {**columns, **sums})


def get_layers(store: Store, n_layers: int) -> Iterator[LayerSums]:
    """Yield what is recorded of the layers, from the first on, and of the output."""
    for index in range(n_layers + 1):
        arrays = store.get_arrays(_layer(index))
        if arrays is None:
            return
        columns = {key.partition("\n")[2]: value for key, value in arrays.items() if key.startswith(f"{_COLUMNS}\n")}
        yield LayerSums(list(_sums(arrays, _ALL)), list(_sums(arrays, _FIRST)), columns)


def tell_layers(store: Store, n_done: int, n_layers: int) -> None:
    """Report how much of a forward pass is kept."""
    names = [_layer(index) for index in range(min(n_done, n_layers))]
    store.tell_kept("layers of the forward pass", names, n_layers)


def put_backward(store: Store, seed: int, state: Backward, found: Mapping[str, Float32]) -> None:
    """Record the state of a backward pass in place of the last one, and the norms that it found since then."""
    if found:
        store.put_arrays(_norms(seed, state.index), found)
    store.put_arrays(_backward(seed, state.index), {"grad": state.grad, "of output": np.array(state.of_output)})
    store.remove(_backward(seed, state.index + 1))


def get_backward(store: Store, seed: int, n_layers: int) -> Backward | None:
    """Return, and report, how far a backward pass came; ``None`` if nothing can be used."""
    for index in range(n_layers + 1):
        arrays = store.get_arrays(_backward(seed, index))
        norms = None if arrays is None else _all_norms(store, seed, range(index, n_layers))
        if arrays is not None and norms is not None:
            names = [_backward(seed, index)] * (n_layers - index)
            store.tell_kept("layers of the backward pass", names, n_layers)
            return Backward(index, arrays["grad"], float(arrays["of output"]), norms)
    return None


def _all_norms(store: Store, seed: int, layers: Iterable[int]) -> dict[str, Float32] | None:
    """Return the recorded norms of these layers; ``None`` where some are lost."""
    found = [store.get_arrays(_norms(seed, index)) for index in layers]
    if any(part is None for part in found):
        return None
    return {name: norms for part in found if part is not None for name, norms in part.items()}


def _arrays(part: str, found: Iterable[InputSums]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the arrays that ``_sums`` reads, with the names of the matrices in their keys."""
    for sums in found:
        kind, names = _STACK if sums.is_stack else _PLAIN, "\n".join(sums.names)
        yield f"{part} {kind} {_SQUARES}\n{names}", sums.squares
        yield f"{part} {kind} {_COUNTS}\n{names}", sums.counts


def _sums(arrays: Mapping[str, NDArray[Any]], part: str) -> Iterator[InputSums]:
    for kind in (_PLAIN, _STACK):
        prefix = f"{part} {kind} {_SQUARES}\n"
        for key in [key for key in arrays if key.startswith(prefix)]:
            names = key.removeprefix(prefix)
            counts = arrays[f"{part} {kind} {_COUNTS}\n{names}"]
            yield InputSums(tuple(names.split("\n")), arrays[key], counts, kind == _STACK)


def _stream(index: int, batch: int) -> str:
    return f"{PASS}/stream of batch {batch} before layer {index}"


def _layer(index: int) -> str:
    return f"{PASS}/sums of layer {index}"


def _norms(seed: int, index: int) -> str:
    return f"{PASS}/squared norms {seed} of layer {index}"


def _backward(seed: int, index: int) -> str:
    return f"{PASS}/derivative {seed} before layer {index}"
