"""Open a Hugging Face model folder as a ``Model`` of canonical tensors.

``open_folder`` reads JSON and headers only; ``Tensor.rows`` reads weights later, a slab of rows at a time (but a stored
``lm_head`` that config.json ties to the embedding is compared with it at once). It refuses everything that is not
supported: class, rope, activation function, tokenizer, missing or unused tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ..errors import ModelError, UnsupportedError
from ..records import Float32, FromArray, Model, Tensor
from ..system.filestate import file_states
from .architectures.families import find_family
from .architectures.family import Family
from .architectures.keys import model_keys, window_note
from .architectures.mtp import mtp_keys
from .architectures.rope import (
    check_rope,
    llama3_factors,
    longrope_factors,
    proportional_factors,
    rope_dim,
    rope_note,
    rope_settings,
)
from .card import card_keys
from .checkpoint import read_checkpoint
from .config import canonical, check_settings, dimensions, is_multimodal, read_config, text_model
from .embedding import read_embedding
from .hparams import read_hparams
from .mapping import Mapped, layer_numbers, map_tensors
from .missing import check_no_adapter
from .own_files import check_files
from .quantization import refuse_codes
from .tokenizer.vocab import open_vocab

HEAD = "lm_head.weight"

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def open_folder(path: Path, pre: str | None = None, mtp: str | None = None) -> Model:
    """Open a Hugging Face model folder.

    Args:
        path: folder with ``config.json``, safetensors weights and a tokenizer.
        pre: name of llama.cpp's pre-tokenizer; default: recognised.
        mtp: what to do with layers of multi-token prediction: ``keep``, ``drop``, or what llama.cpp's converter does.

    Returns:
        The model; reads no weights.

    Raises:
        ModelError: files are missing, damaged or contradict one another.
        UnsupportedError: an unsupported class, rope kind, activation function, weight format or tokenizer.

    """
    folder = Path(os.path.realpath(path))  # before Python 3.13, Path.resolve raises on a loop of links
    check_files(folder)
    whole = read_config(folder, path)
    with naming(folder):
        return _open_model(folder, whole, pre, mtp)


def _open_model(folder: Path, whole: Mapping[str, Any], pre: str | None, mtp: str | None) -> Model:
    """Open a folder with a parsed config.json; messages about that file begin with its bare name."""
    known = _checked_settings(whole)
    source_class, family, config, sizes, rope = known.source_class, known.family, known.config, known.sizes, known.rope
    checkpoint = read_checkpoint(folder, whole)
    check_no_adapter(folder, checkpoint.tensors)
    embedding = read_embedding(folder, whole)
    if embedding and not any(name.endswith(HEAD) for name in checkpoint.tensors):
        config = {**config, "tie_word_embeddings": True}  # llama.cpp loads embedding models without a head
    mapped = map_tensors(
        checkpoint.tensors, config, family, sizes, is_multimodal(whole, source_class), checkpoint.notes, mtp
    )
    tensors = [*mapped.tensors, *_rope_tensors(rope, sizes)]
    vocab = open_vocab(folder, sizes["vocab"], config, pre)
    about, unread = card_keys(folder, whole, tensors)
    keys = {**model_keys(about, config, family, sizes, rope), **_named(family.architecture, embedding.keys)}
    keys |= mtp_keys(family.architecture, keys, sizes, mapped.n_mtp)
    keys |= layer_numbers(checkpoint.tensors, family, sizes["layers"])
    metadata = {**keys, **vocab.metadata}
    _check_letters(folder, metadata)
    _check_numbers(folder, metadata)
    computed = (*known.notes, *window_note(config, family, sizes), *(rope_note(rope) if rope else ()))
    return Model(
        path=folder,
        architecture=family.architecture,
        source_class=source_class,
        hparams=read_hparams(family.architecture, metadata, tensors),
        tensors=tuple(tensors),
        metadata=metadata,
        notes=(*computed, *checkpoint.notes, *mapped.notes, *vocab.notes, *embedding.notes, *unread),
        model_id=_identity(metadata, family.architecture, mapped),
        inputs=file_states(tensor.file for tensor in checkpoint.tensors.values()),
    )


def _named(architecture: str, keys: Mapping[str, GGUFValue]) -> dict[str, GGUFValue]:
    return {f"{architecture}.{name}": value for name, value in keys.items()}


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Prefix messages that begin with ``config.json`` with the folder."""
    try:
        yield
    except ModelError as error:
        if not str(error).startswith("config.json"):
            raise
        raise type(error)(f"{folder}{os.sep}{error}") from error


def check_supported(folder: Path, dtypes: Collection[str] = ()) -> None:
    """Raise what ``open_folder`` raises for config.json, without weights and tokenizer.

    Args:
        folder: model folder.
        dtypes: of the weights, if known, in the spelling of safetensors.

    """
    check_files(folder)
    config = read_config(folder, folder)
    with naming(folder):
        _checked_settings(config)
    refuse_codes(folder, config, dtypes)


@dataclass(frozen=True)
class _Settings:
    """The settings of the language model in config.json, with notes of one sentence each."""

    source_class: str
    family: Family
    config: dict[str, Any]
    sizes: dict[str, int]
    rope: dict[str, Any] | None
    notes: list[str]


def _checked_settings(whole: Mapping[str, Any]) -> _Settings:
    """Return the settings in config.json; raise for settings that llama.cpp does not support."""
    source_class, settings, notes = text_model(whole)
    family = find_family(source_class, canonical(settings, find_family(source_class)))
    config = canonical(settings, family)
    sizes = dimensions(config, family)
    check_settings(config, family)
    return _Settings(source_class, family, config, sizes, _checked_rope(config, family, sizes), notes)


def _checked_rope(config: Mapping[str, Any], family: Family, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the rope settings, ``None`` for a class without rope; raise for unsupported settings."""
    if not family.rope_kinds:
        return None
    settings = rope_settings(config, family.defaults)
    settings["n_ctx_train"] = sizes["ctx"]
    local = settings.get("local_theta")
    if local is not None and not family.has_local_theta and local != settings["rope_theta"]:
        raise UnsupportedError(
            f"config.json: layers with a sliding window have a separate rope theta, {local}; llama.cpp's "
            f"{family.architecture} has one for all layers"
        )
    if family.window is None or not family.window.period:
        settings.pop("local_theta", None)
    settings["yarn_log_unit"] = family.yarn_log_unit
    check_rope(settings, family.architecture, family.rope_kinds, family.writes_rope_dim)
    return settings


def _rope_tensors(rope: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> list[Tensor]:
    """Return the tables of frequency divisors for llama3 and longrope scaling."""
    if rope is None:
        return []
    tables: dict[str, Float32] = {}
    if rope["rope_type"] == "llama3":
        tables = {"rope_freqs": llama3_factors(rope, rope_dim(rope, sizes["head"]))}
    if rope["rope_type"] == "proportional":
        tables = {"rope_freqs": proportional_factors(rope, sizes["head_full"])}
    if rope["rope_type"] == "longrope":
        tables = longrope_factors(rope, rope_dim(rope, sizes["head"]))
    return [_constant(f"{role}.weight", role, values) for role, values in tables.items()]


def _constant(name: str, role: str, values: Float32) -> Tensor:
    """Return a computed tensor."""
    return Tensor(name, role, None, values.shape, "F32", "computed from config.json", FromArray(name, values))


def _check_letters(folder: Path, metadata: Mapping[str, GGUFValue]) -> None:
    """Raise ``ModelError`` for text that is not valid UTF-8: JSON and file names may contain lone surrogates."""
    for key, entry in metadata.items():
        texts = entry.value if isinstance(entry.value, list) else [entry.value]
        try:
            "".join(text for text in texts if isinstance(text, str)).encode()
        except UnicodeEncodeError as error:
            raise ModelError(
                f"{folder}: {key} is not UTF-8: {error.object[error.start]!r}; correct it at its source: "
                "a file of the model, or the folder's name"
            ) from error


# Range of each key type.
_RANGES = {
    GGUFValueType.UINT32: (0, 2**32 - 1),
    GGUFValueType.INT32: (-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: (0, 2**64 - 1),
    GGUFValueType.FLOAT32: (-_LARGEST_FLOAT32, _LARGEST_FLOAT32),
}


def _check_numbers(folder: Path, metadata: Mapping[str, GGUFValue]) -> None:
    """Raise ``ModelError`` for a number out of range of its key's type."""
    for key, entry in metadata.items():
        kind = entry.sub_type if entry.sub_type is not None else entry.type
        if kind not in _RANGES:
            continue
        (low, high), numbers = _RANGES[kind], (int, float) if kind == GGUFValueType.FLOAT32 else (int,)
        for value in entry.value if entry.sub_type is not None else [entry.value]:
            if type(value) not in numbers or not low <= value <= high:
                raise ModelError(
                    f"{folder}: {key}: wanted a number of type {kind.name}, got {reprlib.repr(value)}; correct it in "
                    "config.json or in the tokenizer's files"
                )


def _identity(metadata: Mapping[str, GGUFValue], architecture: str, mapped: Mapped) -> str:
    """Return the hex SHA-256 of the architecture's keys and the digest of the tensors."""
    keys = {key: entry.value for key, entry in metadata.items() if key.startswith(f"{architecture}.")}
    text = json.dumps([architecture, keys, mapped.digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
