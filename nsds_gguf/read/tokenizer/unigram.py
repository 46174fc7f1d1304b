"""Sentencepiece unigram, from ``tokenizer.model`` or from a ``tokenizer.json`` with a Unigram model.

llama.cpp's ``t5`` tokenizer (src/llama-vocab.cpp, ``llm_tokenizer_ugm_session``) finds the split with the highest score
like sentencepiece, applies its compiled normalization and removes extra spaces, but has no byte fallback.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Keys, TokenType
from gguf.gguf_writer import GGUFValue

from ...errors import TokenizerError, UnsupportedError
from ...records import kv
from .files import TokenizerFiles
from .metaspace import metaspace_prefix, prefix_note
from .sentencepiece_proto import ModelProto
from .tokens import METASPACE, Tokens, overlay, piece_text, texts_by_id

_LARGEST_F32 = 3.4028234663852886e38  # scores are float32
_BLANKS_NOTE = "llama.cpp adds no space before text that consists of spaces only; the original does."


@dataclass(frozen=True)
class Unigram:
    """A unigram vocabulary for llama.cpp.

    ``special_ids`` are the ids that the model names, always with ``unk``; ``charsmap`` is empty if normalization
    changes no characters.
    """

    tokens: Tokens
    special_ids: Mapping[str, int]
    add_space_prefix: bool
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, GGUFValue]:
        """The keys of this kind of vocabulary only, as in llama.cpp's conversion/t5.py."""
        keys = {
            Keys.Tokenizer.ADD_PREFIX: kv(self.add_space_prefix, GGUFValueType.BOOL),
            Keys.Tokenizer.REMOVE_EXTRA_WS: kv(self.remove_extra_whitespaces, GGUFValueType.BOOL),
            Keys.Tokenizer.UNK_ID: kv(self.special_ids["unk"], GGUFValueType.UINT32),
        }
        if self.charsmap:
            keys[Keys.Tokenizer.PRECOMPILED_CHARSMAP] = kv(self.charsmap, GGUFValueType.ARRAY, GGUFValueType.UINT8)
        return keys


def read_unigram(files: TokenizerFiles, proto: ModelProto) -> Unigram:
    """Read a unigram ``tokenizer.model`` and the added tokens beside it.

    Raises:
        UnsupportedError: llama.cpp would split or normalize text differently.
        TokenizerError: the file is damaged.

    """
    _check_handling(proto)
    _check_charsmap(proto)
    texts = {i: piece_text(piece.text, piece.type) for i, piece in enumerate(proto.pieces)}
    types = {i: piece.type for i, piece in enumerate(proto.pieces)}
    scores = {i: piece.score for i, piece in enumerate(proto.pieces)}
    overlay(texts, types, scores, files.added_tokens)
    notes = [] if proto.removes_extra_whitespaces or not proto.adds_dummy_prefix else [_BLANKS_NOTE]
    matched_first = [texts[i] for i, kind in types.items() if kind == TokenType.USER_DEFINED]
    if proto.charsmap and matched_first:
        notes.append(f"llama.cpp does not normalize the first character of added tokens such as {matched_first[0]!r}.")
    return Unigram(
        Tokens(texts, types, scores),
        proto.special_ids,
        proto.adds_dummy_prefix,
        proto.removes_extra_whitespaces,
        proto.charsmap,
        tuple(notes),
    )


def read_converted_unigram(files: TokenizerFiles) -> Unigram:
    """Read a ``tokenizer.json`` with a Unigram model that does not normalize.

    Its ``Precompiled`` normalizer is refused: it drops combining marks that sentencepiece and llama.cpp keep.

    Raises:
        UnsupportedError: llama.cpp would split or normalize text differently.
        TokenizerError: the vocabulary is damaged.

    """
    path, model = files.json_path, files.tokenizer["model"]
    pieces = _scored_pieces(model.get("vocab"), path)
    if model.get("byte_fallback"):
        raise _no_byte_fallback(path)
    unk = model.get("unk_id")
    if isinstance(unk, bool) or not isinstance(unk, int) or not 0 <= unk < len(pieces):
        raise TokenizerError(f"{path}: unk_id: wanted the id of a token, got {unk!r}; restore the file")
    whole_words = not any(METASPACE in text[1:] for text, _ in pieces)
    add_space_prefix = metaspace_prefix(files.tokenizer, path, splits_words=whole_words)
    vocab = {text: i for i, (text, _) in enumerate(pieces)}
    if len(vocab) < len(pieces):
        twice = next(text for i, (text, _) in enumerate(pieces) if vocab[text] != i)
        raise TokenizerError(f"{path}: token {twice!r} has two ids; restore the file")
    texts = texts_by_id(vocab, files)
    types = dict.fromkeys(texts, TokenType.NORMAL) | {unk: TokenType.UNKNOWN}
    scores = {i: score for i, (_, score) in enumerate(pieces)}
    overlay(texts, types, scores, files.added_tokens)
    types[unk] = TokenType.UNKNOWN
    notes = filter(None, [prefix_note(files.tokenizer) or (_BLANKS_NOTE if add_space_prefix else "")])
    return Unigram(Tokens(texts, types, scores), {"unk": unk}, add_space_prefix, notes=tuple(notes))


def _check_handling(proto: ModelProto) -> None:
    types = {piece.type for piece in proto.pieces}
    if TokenType.UNKNOWN not in types or "unk" not in proto.special_ids:
        raise TokenizerError(f"{proto.path}: no piece for unknown characters; restore the file")
    if TokenType.BYTE in types:
        raise _no_byte_fallback(proto.path)
    unsupported = {
        "spaces as suffix of words": proto.blanks_are_suffixes,
        "unescaped spaces": not proto.escapes_whitespaces,
        "unused pieces": TokenType.UNUSED in types,
        "remove_extra_whitespaces without a space prefix": (
            proto.removes_extra_whitespaces and not proto.adds_dummy_prefix
        ),
    }
    found = [what for what, is_set in unsupported.items() if is_set]
    if found:
        raise UnsupportedError(f"{proto.path}: unigram model with {', '.join(found)}: not supported by llama.cpp")


def _check_charsmap(proto: ModelProto) -> None:
    """Raise for a map that llama.cpp does not load: the first of its two tables must end before the map."""
    size = len(proto.charsmap)
    if size and (size < 4 or struct.unpack_from("<I", proto.charsmap)[0] + 4 >= size):
        raise TokenizerError(f"{proto.path}: precompiled_charsmap of {size} bytes is damaged; restore the file")


def _no_byte_fallback(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: unigram model with byte fallback: llama.cpp supports it for BPE only; characters outside the "
        "vocabulary would become unknown"
    )


def _scored_pieces(vocab: Any, path: Path) -> list[tuple[str, float]]:
    pieces = []
    for entry in vocab if isinstance(vocab, list) else [vocab]:
        kinds = [type(part) for part in entry] if isinstance(entry, list) else []
        if kinds not in ([str, float], [str, int]) or not abs(entry[1]) <= _LARGEST_F32:
            raise TokenizerError(f"{path}: wanted a list of pieces with scores, got {entry!r}; restore the file")
        pieces.append((entry[0], float(entry[1])))
    return pieces
