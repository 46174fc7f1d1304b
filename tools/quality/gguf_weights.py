"""A small GGUF in memory: its keys, and its tensors as float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue

from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.gguf_header import TensorEntry, read_gguf_header
from nsds_gguf.records import Float32, kv

# Keys that describe the quantization of the file that was read.
OF_QUANTIZATION = ("general.file_type", "general.quantization_version")


@dataclass
class GgufWeights:
    """Keys and tensors, in the order of the file; tensors are float32 in numpy order."""

    metadata: dict[str, GGUFValue]
    tensors: dict[str, Float32]

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata["general.architecture"].value)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; ``{arch}`` in it stands for the architecture."""
        found = self.metadata.get(key.format(arch=self.architecture))
        return default if found is None else found.value

    def set(self, key: str, value: Any, kind: GGUFValueType) -> None:
        """Set a key; ``{arch}`` in it stands for the architecture."""
        self.metadata[key.format(arch=self.architecture)] = kv(value, kind)


def read_weights(path: Path) -> GgufWeights:
    """Read a GGUF and dequantize its tensors."""
    header = read_gguf_header(path)
    metadata = {key: value for key, value in header.metadata.items() if key not in OF_QUANTIZATION}
    with path.open("rb") as stream:
        tensors = {}
        for entry in header.tensors:
            stream.seek(entry.offset)
            tensors[entry.name] = dequantized(stream.read(entry.n_bytes), entry)
    return GgufWeights(metadata, tensors)


def dequantized(data: bytes, entry: TensorEntry) -> Float32:
    """Return the values of a tensor's bytes."""
    n_cols = entry.shape[-1]
    rows = np.frombuffer(data, np.uint8).reshape(-1, ggml.row_bytes(entry.type, n_cols))
    return ggml.dequantize(rows, entry.type, n_cols).reshape(entry.shape)


def write_weights(path: Path, weights: GgufWeights) -> None:
    """Write a GGUF of F32 tensors; it appears under its name when it is complete."""
    temporary = path.with_suffix(".part")
    writer = GGUFWriter(temporary, weights.architecture)
    writer.kv_data[0] = {**weights.metadata, "general.file_type": kv(0, GGUFValueType.UINT32)}
    for name, values in weights.tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)
