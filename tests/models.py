"""Models made of arrays, for tests of everything after reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nsds_gguf.records import Float32, Hparams, Model, Tensor

LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def make_tensor(name: str, array: NDArray[np.floating]) -> Tensor:
    """Return a tensor under its GGUF ``name`` that reads its rows from ``array``."""
    weights = np.ascontiguousarray(array, dtype=np.float32)
    rows = weights.reshape(-1, weights.shape[-1])

    def read_rows(start: int, stop: int) -> Float32:
        return rows[start:stop].copy()

    match = LAYER_NAME.fullmatch(name)
    layer, rest = (int(match[1]), match[2]) if match else (None, name)
    return Tensor(name, rest.removesuffix(".weight"), layer, weights.shape, "F32", f"checkpoint.{name}", read_rows)


def make_model(arrays: Mapping[str, NDArray[np.floating]], hparams: Hparams) -> Model:
    """Return a llama model of ``arrays`` by GGUF name, (out_features, in_features) each."""
    tensors = tuple(make_tensor(name, array) for name, array in arrays.items())
    return Model(Path("arrays"), "llama", "LlamaForCausalLM", hparams, tensors, {}, (), "0" * 64)
