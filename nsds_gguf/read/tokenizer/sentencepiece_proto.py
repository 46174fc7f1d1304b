"""The ``ModelProto`` of a sentencepiece ``tokenizer.model``, read without protobuf.

Field numbers are those of sentencepiece_model.proto: https://github.com/google/sentencepiece
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from ...errors import TokenizerError
from .json_files import read_bytes

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX = 3, 24
_PIECE_NAMES = {"unk": (45, b"<unk>"), "bos": (46, b"<s>"), "eos": (47, b"</s>"), "pad": (48, b"<pad>")}
_RULE_NAME, _CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 1, 2, 3, 4, 5
_ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}

# Wire types of protocol buffers: https://protobuf.dev/programming-guides/encoding
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One piece; types have the numbers of ``gguf.TokenType``."""

    text: str
    score: float
    type: TokenType


@dataclass(frozen=True)
class ModelProto:
    """A parsed ``tokenizer.model``: pieces by id, fields of the trainer and of the normalizer by number."""

    path: Path
    pieces: tuple[Piece, ...]
    trainer: Mapping[int, Any]
    normalizer: Mapping[int, Any]

    @property
    def algorithm(self) -> str:
        """How text is split: ``unigram``, ``BPE``, ``word`` or ``char``."""
        kind = self.trainer.get(_MODEL_TYPE, 1)
        return _ALGORITHMS.get(kind, str(kind))

    @property
    def blanks_are_suffixes(self) -> bool:
        """Whether a space belongs to the word before it."""
        return bool(self.trainer.get(_WHITESPACE_AS_SUFFIX))

    @property
    def normalization(self) -> str:
        """Name of the normalization rule, for messages."""
        return str(self.normalizer.get(_RULE_NAME, b""), errors="replace")

    @property
    def charsmap(self) -> bytes:
        """The compiled normalization; empty if it changes no characters."""
        return bytes(self.normalizer.get(_CHARSMAP, b""))

    @property
    def adds_dummy_prefix(self) -> bool:
        """Whether a space is added before the text."""
        return bool(self.normalizer.get(_DUMMY_PREFIX, 1))

    @property
    def removes_extra_whitespaces(self) -> bool:
        """Whether leading, trailing and repeated spaces are removed."""
        return bool(self.normalizer.get(_EXTRA_WHITESPACES, 1))

    @property
    def escapes_whitespaces(self) -> bool:
        """Whether spaces become U+2581."""
        return bool(self.normalizer.get(_ESCAPE_WHITESPACES, 1))

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids that the file names: ``bos``, ``eos``, ``unk``, ``pad``."""
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        ids = {piece.text.encode(): i for i, piece in enumerate(self.pieces) if piece.type in special}
        texts = {name: self.trainer.get(number, default) for name, (number, default) in _PIECE_NAMES.items()}
        return {name: ids[text] for name, text in texts.items() if text in ids}


def read_proto(path: Path) -> ModelProto:
    """Parse a ``tokenizer.model``; raise ``TokenizerError`` for any other file."""
    pieces: list[Piece] = []
    settings: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    try:
        for number, value in _fields(read_bytes(path)):
            if number == _PIECES:
                pieces.append(_piece(dict(_fields(value))))
            elif number in settings:
                settings[number].update(_fields(value))
        if wrong := [n for n in (_RULE_NAME, _CHARSMAP) if type(settings[_NORMALIZER].get(n, b"")) is not bytes]:
            raise ValueError(f"normalizer field {wrong[0]} is not text")
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise TokenizerError(f"{path}: not a sentencepiece model ({error}); restore the file") from error
    if not pieces:
        raise TokenizerError(f"{path}: not a sentencepiece model (no pieces); restore the file")
    return ModelProto(path, tuple(pieces), settings[_TRAINER], settings[_NORMALIZER])


def _piece(fields: Mapping[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(_PIECE_SCORE, bytes(4)))
    if not math.isfinite(score):
        raise ValueError(f"a piece of score {score}")
    return Piece(fields[_PIECE_TEXT].decode(), score, TokenType(fields.get(_PIECE_TYPE, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield ``(field number, value)`` of a protocol buffers message: integers for varints, else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire_type = key & 7
        if wire_type == _VARINT:
            value: int | bytes
            value, at = _varint(data, at)
        elif wire_type in (_FIXED32, _FIXED64, _BYTES):
            size, at = _varint(data, at) if wire_type == _BYTES else (4 if wire_type == _FIXED32 else 8, at)
            if at + size > len(data):
                raise ValueError(f"truncated at byte {len(data)}")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
