"""Models made of arrays, for tests of everything after reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nsds_gguf.records import Float32, FromArray, Hparams, Model, Rows, Source, Tensor

LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def make_tensor(name: str, array: NDArray[np.floating]) -> Tensor:
    """Return a tensor under its GGUF ``name`` that reads its rows from ``array``."""
    weights = np.ascontiguousarray(array, dtype=np.float32)
    match = LAYER_NAME.fullmatch(name)
    layer, rest = (int(match[1]), match[2]) if match else (None, name)
    role, source = rest.removesuffix(".weight"), f"checkpoint.{name}"
    return Tensor(name, role, layer, weights.shape, "F32", source, FromArray(source, weights))


@dataclass(frozen=True)
class FromFunction(Source):
    """Rows of a tensor that ``read(start, stop)`` gives, for tests that look at when rows are read."""

    tensor: Tensor
    read: Callable[[int, int], Float32]

    @property
    def where(self) -> str:
        return self.tensor.source

    @property
    def n_rows(self) -> int:
        return self.tensor.n_rows

    @property
    def n_cols(self) -> int:
        return self.tensor.n_cols

    def values(self, rows: Rows, columns: slice) -> Float32:
        if isinstance(rows, slice):
            return self.read(rows.start, rows.stop)[:, columns]
        return np.concatenate([self.read(int(row), int(row) + 1) for row in rows])[:, columns]


def read_by(tensor: Tensor, read: Callable[[int, int], Float32]) -> Tensor:
    """Return a tensor whose rows ``read(start, stop)`` gives."""
    return replace(tensor, stored=FromFunction(tensor, read), transforms=())


def make_model(arrays: Mapping[str, NDArray[np.floating]], hparams: Hparams) -> Model:
    """Return a llama model of ``arrays`` by GGUF name, (out_features, in_features) each."""
    tensors = tuple(make_tensor(name, array) for name, array in arrays.items())
    return Model(Path("arrays"), "llama", "LlamaForCausalLM", hparams, tensors, {}, (), "0" * 64)
