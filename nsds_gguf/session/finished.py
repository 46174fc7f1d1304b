"""Finished work of a session as records, from which the same command resumes; see ``system.store``.

Each function returns the record of an earlier run, or computes and records the result. Without a store it only
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compute.backend import Tokens
from ..compute.input_moments import Moments
from ..records import LayerScore, TensorCost
from ..records.json_records import built
from ..sensitivity.result import Sensitivities
from ..system.store import Store

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Facts:
    """The fields of ``Sensitivities`` other than arrays."""

    sensitivity: Mapping[str, float]
    notes: tuple[str, ...]
    looked_up: float


def kept_tokens(store: Store | None, name: str, compute: Callable[[], Tokens]) -> Tokens:
    """Return ``(n_sequences, n_positions)`` ids."""
    found = None if store is None else store.get_arrays(name)
    if store is not None and found is not None:
        store.tell_kept(name, [name])
        return found["tokens"].astype(np.int64)
    tokens = compute()
    if store is not None:
        store.put_arrays(name, {"tokens": tokens})
    return tokens


def kept_moments(store: Store | None, name: str, compute: Callable[[], dict[str, Moments]]) -> dict[str, Moments]:
    """Return moments of matrices' inputs by stored name."""
    found = None if store is None else store.get_arrays(name)
    if store is not None and found is not None:
        store.tell_kept(name, [name])
        return _moments(found)
    moments = compute()
    if store is not None:
        store.put_arrays(name, _moment_arrays(moments))
    return moments


def kept_sensitivities(store: Store | None, name: str, compute: Callable[[], Sensitivities]) -> Sensitivities:
    """Return sensitivities with the statistics of the same pass."""
    if store is not None:
        facts, arrays = store.get(f"{name}/facts"), store.get_arrays(f"{name}/arrays")
        if facts is not None and arrays is not None:
            store.tell_kept(name, [f"{name}/facts"])
            return _sensitivities(facts, arrays)
    found = compute()
    if store is not None:
        parts: dict[str, Mapping[str, NDArray[np.floating]]] = {
            "inputs": found.inputs, "gains": found.gains, "columns": found.column_squares, "rows": found.of_rows,
            "all_inputs": found.all_inputs,
        }  # fmt: skip
        arrays = {f"{part} {key}": array for part, values in parts.items() for key, array in values.items()}
        store.put_arrays(f"{name}/arrays", {**arrays, **_moment_arrays(found.moments)})
        facts = {"sensitivity": dict(found.sensitivity), "notes": list(found.notes), "looked_up": found.looked_up}
        store.put(f"{name}/facts", facts)
    return found


def kept_cost(store: Store | None, name: str) -> TensorCost | None:
    """Return the recorded cost of a tensor, or ``None``."""
    found = None if store is None else store.get(f"measured errors/{name}")
    cost: TensorCost | None = None if found is None else built(TensorCost, found, "measured errors")
    return cost


def tell_costs(store: Store | None, names: Sequence[str], total: int) -> None:
    """Tell of how many tensors the cost is recorded."""
    if store is not None:
        store.tell_kept("measured tensors", [f"measured errors/{name}" for name in names], total)


def keep_cost(store: Store | None, cost: TensorCost) -> None:
    """Record the cost of a tensor."""
    if store is not None:
        store.put(f"measured errors/{cost.name}", asdict(cost))


def kept_layers(
    store: Store | None, compute: Callable[[], tuple[tuple[LayerScore, ...], tuple[str, ...]]]
) -> tuple[tuple[LayerScore, ...], tuple[str, ...]]:
    """Return layer scores and their notes."""
    found = None if store is None else store.get("layer scores")
    if store is not None and found is not None:
        store.tell_kept("layer scores", ["layer scores"])
        return tuple(built(LayerScore, value, "layer scores") for value in found["layers"]), tuple(found["notes"])
    layers, notes = compute()
    if store is not None:
        store.put("layer scores", {"layers": [asdict(layer) for layer in layers], "notes": list(notes)})
    return layers, notes


def _sensitivities(facts: Mapping[str, object], arrays: Arrays) -> Sensitivities:
    def part(name: str) -> dict[str, NDArray[np.float64]]:
        prefix = f"{name} "
        return {key.removeprefix(prefix): array.astype("f8") for key, array in arrays.items() if key.startswith(prefix)}

    values = built(_Facts, dict(facts), "sensitivities")
    return Sensitivities(
        sensitivity=values.sensitivity,
        inputs=part("inputs"),
        gains=part("gains"),
        notes=values.notes,
        looked_up=values.looked_up,
        moments=_moments(arrays),
        column_squares=part("columns"),
        all_inputs=part("all_inputs"),
        of_rows={name: rows.astype(np.float32) for name, rows in part("rows").items()},
    )


def _moment_arrays(moments: Mapping[str, Moments]) -> Arrays:
    """Return the arrays that ``_moments`` reads; matrices with the same input share them."""
    arrays: Arrays = {}
    for name, found in moments.items():
        alike = "\n".join(found.names or (name,))
        arrays[f"squares {alike}"], arrays[f"counts {alike}"] = found.mean_squares, found.counts
    return arrays


def _moments(arrays: Arrays) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    for key, squares in arrays.items():
        kind, _, alike = key.partition(" ")
        if kind == "squares":
            names = tuple(alike.split("\n"))
            counts = arrays[f"counts {alike}"].astype(np.int64)
            found |= dict.fromkeys(names, Moments(squares.astype("f8"), counts, names=names))
    return found
