"""Open a GGUF file as a ``Model``: any architecture, unchanged keys and tokenizer, weights read a slab at a time.

``open_gguf`` reads headers only, and repairs or refuses what llama.cpp would reject (``gguf_repair``). It drops the
keys on the file's own quantization and layout: ``general.file_type``, ``general.quantization_version``, the alignment,
the keys of a split file, of an importance matrix and of nsds-gguf.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..llamacpp import ggml
from ..llamacpp.gguf_header import GgufPart, TensorEntry, read_gguf_parts
from ..records import COPIED_TYPES, Float32, Model, Rows, Tensor, kv, role_and_layer
from ..system.filestate import file_states
from .architectures.mtp import mtp_settled
from .gguf_repair import Header, repaired
from .hparams import read_hparams
from .spans import read_spans, row_runs
from .stored import FileTensor

# Types that can be quantized without noticeable additional loss.
SOURCE_TYPES = (*ggml.FLOAT_TYPES, "Q8_0")

# Keys, or prefixes of keys, that describe the quantization and layout of the file, not the model.
LEFT_OUT = (
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
    "split.",
    "quantize.imatrix.",
    "nsds_gguf.",
)

# Values of general.type for files without a language model, in words (gguf, GGUFType).
OTHER_KINDS = {
    "mmproj": "the image or audio encoder of a multimodal model",
    "adapter": "an adapter (LoRA)",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary",
}

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
MAX_LAYERS = 512  # llama.cpp's (LLAMA_MAX_LAYERS in llama-hparams.h)
_IDENTITY_BYTES = 4096  # of every tensor


@dataclass(frozen=True)
class GgufTensor(FileTensor):
    """A tensor in a GGUF file, at ``offset_bytes``; ``dtype`` is a ggml type."""

    offset_bytes: int

    def values(self, rows: Rows, columns: slice) -> Float32:
        """Return some rows and columns, dequantized by ggml; reads whole rows."""
        data = self.stored_rows(rows)
        if self.dtype in _NUMPY_DTYPES:
            values: Float32 = data.view(_NUMPY_DTYPES[self.dtype]).astype(np.float32)
        else:
            values = ggml.dequantize(data, self.dtype, self.n_cols)
        return values if columns == slice(0, self.n_cols) else values[:, columns].copy()

    def stored_rows(self, rows: Rows) -> NDArray[np.uint8]:
        """Return rows as stored, ``(n, row bytes)`` uint8, fresh."""
        if isinstance(rows, slice):
            return self._read([(rows.start, rows.stop - rows.start)])
        distinct, at = np.unique(rows, return_inverse=True)
        return self._read(row_runs(distinct))[at]

    def _read(self, runs: list[tuple[int, int]]) -> NDArray[np.uint8]:
        """Read runs of rows: first row and number of rows each."""
        n_bytes, n_rows = ggml.row_bytes(self.dtype, self.n_cols), sum(n for _, n in runs)
        spans = [(self.offset_bytes + first * n_bytes, n * n_bytes) for first, n in runs]
        return read_spans(self.file, self.name, spans, n_rows * n_bytes).reshape(n_rows, n_bytes)


def open_gguf(path: Path, pre: str | None = None, allow_requantize: bool = False, mtp: str | None = None) -> Model:
    """Open a GGUF, or all parts of a split GGUF.

    Args:
        path: the file, or any part.
        pre: name of llama.cpp's pre-tokenizer; default: the one in the file.
        allow_requantize: accept weights that are quantized to less than Q8_0.
        mtp: ``keep`` or ``drop`` layers of multi-token prediction; default: as the file has them.

    Returns:
        The model; reads no weights.

    Raises:
        ModelError: a file is missing, damaged or contradicts another part.
        UnsupportedError: it holds no language model, or weights that are quantized already.

    """
    parts = read_gguf_parts(path)
    stated = parts[0].header.metadata
    architecture = _architecture(path, stated)
    header = _repaired(path, architecture, parts)
    names = {entry.name for entry in header.tensors}
    entries = [(part, entry) for part in parts for entry in part.header.tensors if entry.name in names]
    tensors = mtp_settled([_tensor(part.path, entry) for part, entry in entries], architecture, header.metadata, mtp)
    _check_vectors(path, tensors)
    notes = (*header.notes, *_requantize_notes(path, tensors, allow_requantize))
    metadata = header.metadata
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = kv(pre, GGUFValueType.STRING)
    hparams = read_hparams(architecture, metadata, tensors)
    if hparams.n_layers > MAX_LAYERS:
        raise UnsupportedError(
            f"{path}: {architecture}.block_count {hparams.n_layers}: llama.cpp takes at most {MAX_LAYERS} layers"
        )
    return Model(
        path=parts[0].path,
        architecture=architecture,
        source_class="",
        hparams=hparams,
        tensors=tensors,
        metadata={key: _writable(value) for key, value in metadata.items()},
        notes=notes,
        model_id=_identity(metadata, entries),
        files=tuple(part.path for part in parts),
        is_repaired=bool(header.notes) or pre is not None,
        inputs=file_states(part.path for part in parts),
    )


def _repaired(path: Path, architecture: str, parts: Sequence[GgufPart]) -> Header:
    """Return the repaired header; errors name the file."""
    stated = {k: value for k, value in parts[0].header.metadata.items() if not k.startswith(LEFT_OUT)}
    entries = [entry for part in parts for entry in part.header.tensors]
    if not entries:
        raise UnsupportedError(f"{path}: holds a vocabulary and no weights; wanted a GGUF of a model")
    try:
        return repaired(architecture, stated, entries)
    except ModelError as error:
        raise type(error)(f"{path}: {error}") from error


# Norms of the residual stream, in every architecture of llama.cpp.
_STREAM_NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")


def _check_vectors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Raise ``ModelError`` for a norm or a bias of the wrong width."""
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding = by_name.get("token_embd.weight")
    for tensor in tensors:
        base = by_name.get(tensor.name.removesuffix(".bias") + ".weight")
        wanted = tensor.n_weights
        is_norm = tensor.role == "output_norm" or (tensor.role in _STREAM_NORMS and tensor.layer is not None)
        if is_norm and embedding is not None:
            wanted = embedding.n_cols
        elif tensor.role.endswith(".bias") and base is not None and len(base.shape) <= 2 and tensor.layer is not None:
            wanted = base.n_rows if len(base.shape) == 2 else base.n_weights
        if tensor.n_weights != wanted:
            raise ModelError(
                f"{path}: tensor {tensor.name}: wanted {wanted} weights, the width of its input, got "
                f"{tensor.n_weights}: the file is damaged, download it again"
            )


def _architecture(path: Path, metadata: Mapping[str, GGUFValue]) -> str:
    """Return the architecture; raise ``UnsupportedError`` for a file without a language model."""
    kind = _text(metadata, "general.type")
    architecture = _text(metadata, "general.architecture")
    if kind in OTHER_KINDS or architecture == "clip":
        what = OTHER_KINDS.get(kind or "", OTHER_KINDS["mmproj"])
        raise UnsupportedError(f"{path}: holds {what}; wanted a GGUF of a language model")
    if not architecture:
        raise ModelError(f"{path}: has no key general.architecture; wanted a GGUF of a language model")
    return architecture


def _text(metadata: Mapping[str, GGUFValue], key: str) -> str | None:
    entry = metadata.get(key)
    return entry.value if entry is not None and isinstance(entry.value, str) else None


def _tensor(file: Path, entry: TensorEntry) -> Tensor:
    if entry.type not in (*ggml.READ_TYPES, *COPIED_TYPES):
        raise UnsupportedError(f"{file}: tensor {entry.name}: ggml cannot dequantize type {entry.type}; "
                               f"wanted one of {', '.join(SOURCE_TYPES)}")  # fmt: skip
    if 0 in entry.shape:
        raise ModelError(f"{file}: tensor {entry.name}: has no weights, shape {entry.shape}; download it again")
    role, layer = role_and_layer(entry.name)
    stored = GgufTensor(entry.name, entry.type, entry.shape, file, entry.offset)
    return Tensor(entry.name, role, layer, entry.shape, entry.type, entry.name, stored)


def _requantize_notes(path: Path, tensors: tuple[Tensor, ...], allowed: bool) -> tuple[str, ...]:
    """Return the note on weights that are already quantized; raise ``UnsupportedError`` unless that is allowed."""
    counts = Counter(t.dtype for t in tensors if t.dtype not in (*SOURCE_TYPES, *COPIED_TYPES))
    if not counts:
        return ()
    held = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
    if not allowed:
        raise UnsupportedError(
            f"{path}: is quantized already (tensors: {held}): its errors would add to the new ones and scores would "
            "measure them; use the F32, F16, BF16 or Q8_0 file of the model, or pass --allow-requantize"
        )
    return (f"The input is quantized already (tensors: {held}): its errors add to the new ones, and the scores "
            "see them too.",)  # fmt: skip


def _writable(entry: GGUFValue) -> GGUFValue:
    """Return a value for gguf's writer, with text that is not UTF-8 as bytes."""
    if isinstance(entry.value, list):
        return kv([_bytes_unless_utf8(item) for item in entry.value], entry.type, entry.sub_type)
    return kv(_bytes_unless_utf8(entry.value), entry.type)


def _bytes_unless_utf8(value: Any) -> Any:
    """Return text with lone surrogates as the bytes that they stand for, anything else unchanged."""
    if not isinstance(value, str) or value.isascii():
        return value
    data = value.encode(errors="surrogateescape")
    try:
        data.decode()
    except UnicodeDecodeError:
        return data
    return value


def _identity(metadata: Mapping[str, GGUFValue], entries: list[tuple[GgufPart, TensorEntry]]) -> str:
    """Return the hex SHA-256 that identifies the model: the same for a split file and a single one."""
    keys = {key: [int(entry.type), entry.value] for key, entry in metadata.items()}
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode())
    for part, entry in entries:
        digest.update(f"\n{entry.name} {entry.type} {entry.shape}\n".encode())
        with part.path.open("rb") as stream:
            stream.seek(entry.offset)
            digest.update(stream.read(min(_IDENTITY_BYTES, entry.n_bytes)))
    return digest.hexdigest()
