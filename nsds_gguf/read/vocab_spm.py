"""Sentencepiece BPE, from ``tokenizer.model`` or from a ``tokenizer.json`` that was converted from one.

llama.cpp's ``llama`` tokenizer (src/llama-vocab.cpp, ``llm_tokenizer_spm_session``) joins the neighbours whose union
has the highest score, as sentencepiece does; it knows no normalization but the blank in front.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from ..errors import TokenizerError, UnsupportedError
from .vocab_bpe import bpe_model, flat, merge_pairs
from .vocab_files import AddedToken, TokenizerFiles, read_bytes
from .vocab_tokens import ADDED_SCORE, METASPACE, Tokens, added_token_type, texts_by_id

_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))

# Field numbers of sentencepiece_model.proto: https://github.com/google/sentencepiece
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX = 3, 24
_PIECE_NAMES = {"unk": (45, b"<unk>"), "bos": (46, b"<s>"), "eos": (47, b"</s>"), "pad": (48, b"<pad>")}
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}

# Wire types of protocol buffers: https://protobuf.dev/programming-guides/encoding
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePiece:
    """A sentencepiece vocabulary as llama.cpp takes it.

    ``special_ids`` are the ids that the model file itself names (``bos``, ``eos``, ``unk``, ``pad``).
    """

    tokens: Tokens
    add_space_prefix: bool
    special_ids: Mapping[str, int]


def read_sentencepiece(files: TokenizerFiles, any_normalizer: bool) -> SentencePiece:
    """Read ``tokenizer.model`` and the added tokens beside it.

    Args:
        files: the tokenizer files.
        any_normalizer: accept a normalization that llama.cpp does not apply.

    Raises:
        UnsupportedError: not BPE with byte fallback, or text handling that llama.cpp has not.
        TokenizerError: the file is damaged.

    """
    path = files.model_path
    pieces, trainer, normalizer = _model_proto(path)
    _check_algorithm(trainer, path)
    if not any_normalizer:
        _check_normalizer(normalizer, path)
    texts, types, scores = {}, {}, {}
    for token_id, (text, score, kind) in enumerate(pieces):
        user_defined = kind == TokenType.USER_DEFINED  # matched in raw text by llama.cpp, hence with true blanks
        texts[token_id] = text.replace(METASPACE, " ") if user_defined else text
        types[token_id], scores[token_id] = kind, score
    _check_bytes(set(texts.values()), path)
    special_ids = {
        name: token_id
        for name, (number, default) in _PIECE_NAMES.items()
        for token_id, text in texts.items()
        if types[token_id] in (TokenType.CONTROL, TokenType.UNKNOWN) and text.encode() == trainer.get(number, default)
    }
    _overlay(texts, types, scores, files.added_tokens)
    prefix = files.tokenizer_config.get("add_prefix_space")
    add_space_prefix = prefix if isinstance(prefix, bool) else bool(normalizer.get(_DUMMY_PREFIX, 1))
    return SentencePiece(Tokens(texts, types, scores), add_space_prefix, special_ids)


def read_converted(files: TokenizerFiles) -> SentencePiece:
    """Read a ``tokenizer.json`` whose BPE model is a converted sentencepiece model.

    Scores are recovered from the ranks of the merges; that is faithful only when the merges are what the conversion
    makes of scores: every way to split a token into two others, tokens one after the other.

    Raises:
        UnsupportedError: it is no such conversion, or handles text as llama.cpp cannot.
        TokenizerError: ids or merges contradict the vocabulary.

    """
    path, model = files.json_path, bpe_model(files)
    add_space_prefix = _metaspace_prefix(files.tokenizer, path)
    vocab, added = model["vocab"], files.added_tokens
    texts = texts_by_id(vocab, files)
    _check_bytes(vocab, path)
    joined = _scores_by_rank(vocab, merge_pairs(model.get("merges"), vocab, path), added, path)
    types = {i: TokenType.BYTE if text in _BYTE_TOKENS else TokenType.NORMAL for i, text in texts.items()}
    scores = {i: joined.get(text, 0.0) for i, text in texts.items()}
    unk = vocab.get(model.get("unk_token"))
    if unk is not None:
        types[unk] = TokenType.UNKNOWN
    _overlay(texts, types, scores, added)
    return SentencePiece(Tokens(texts, types, scores), add_space_prefix, {} if unk is None else {"unk": unk})


def prefix_note(tokenizer: Mapping[str, Any]) -> str:
    """Return in a sentence where llama.cpp puts a blank and a converted tokenizer does not; empty when nowhere."""
    prepending = [step for step in flat(tokenizer.get("pre_tokenizer")) if _prepends(step)]
    if not prepending:
        return ""
    after_special = " and after special tokens" if prepending[0].get("prepend_scheme") == "first" else ""
    return (
        "llama.cpp puts a blank in front of every stretch of text; the original leaves it out before another blank"
        f"{after_special}."
    )


def _overlay(
    texts: dict[int, str], types: dict[int, TokenType], scores: dict[int, float], added: Mapping[int, AddedToken]
) -> None:
    for token_id, token in added.items():
        kind = added_token_type(token)
        texts[token_id] = token.text.replace(METASPACE, " ") if kind == TokenType.USER_DEFINED else token.text
        types[token_id], scores[token_id] = kind, ADDED_SCORE


def _check_bytes(texts: Any, path: Path) -> None:
    missing = [text for text in _BYTE_TOKENS if text not in texts]
    if missing:
        raise UnsupportedError(
            f"{path}: no byte fallback: {len(missing)} of 256 byte tokens are missing, the first {missing[0]}; "
            "llama.cpp cannot encode characters outside the vocabulary without them"
        )


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def _metaspace_prefix(tokenizer: Mapping[str, Any], path: Path) -> bool:
    """Return whether a blank is put in front; raises unless blanks become U+2581 and nothing else happens."""
    normalizers = list(flat(tokenizer.get("normalizer")))
    steps = list(flat(tokenizer.get("pre_tokenizer")))
    prepends = bool(normalizers) and _is_prepend(normalizers[0])
    replaces = bool(normalizers) and _is_replace(normalizers[-1])
    metaspace = len(steps) == 1 and _is_whole_metaspace(steps[0])
    plain = not steps or (len(steps) == 1 and _is_split_at_blank(steps[0]))
    if replaces and plain and len(normalizers) == 1 + prepends:
        return prepends
    if metaspace and not normalizers:
        return _prepends(steps[0])
    described = " > ".join(str(step.get("type")) for step in (*normalizers, *steps)) or "none"
    raise UnsupportedError(
        f"{path}: BPE without bytes or sentencepiece's text handling (normalizer and pre-tokenizer: {described}); "
        "add the tokenizer.model that it was made from"
    )


def _is_prepend(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Prepend" and step.get("prepend") == METASPACE


def _is_replace(step: Mapping[str, Any]) -> bool:
    return (step.get("type"), step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, METASPACE)


def _is_split_at_blank(step: Mapping[str, Any]) -> bool:
    """Tell whether a step splits at blanks, which cuts nothing after all of them were replaced (Gemma)."""
    return step.get("type") == "Split" and step.get("pattern") in ({"String": " "}, {"Regex": " "})


def _is_whole_metaspace(step: Mapping[str, Any]) -> bool:
    is_metaspace = step.get("type") == "Metaspace" and step.get("replacement") == METASPACE
    return is_metaspace and step.get("split", True) is False


def _prepends(step: Mapping[str, Any]) -> bool:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return step.get("type") == "Metaspace" and scheme != "never"


def _scores_by_rank(
    vocab: Mapping[str, int], merges: list[tuple[str, str]], added: Mapping[int, AddedToken], path: Path
) -> dict[str, float]:
    """Return a score per joined token that orders joins as the ranks do, from -1 downwards.

    Tokens whose merges interleave had the same score and get the same again. That holds for runs of one character, as
    Llama 2 has them of blanks; for other tokens llama.cpp, which takes the left one of equals, might join differently.
    """
    _check_complete(vocab, set(merges), {token.text for token in added.values()}, path)
    last_rank = {left + right: rank for rank, (left, right) in enumerate(merges)}
    scores: dict[str, float] = {}
    group, end, previous = 0, -1, ""
    for rank, (left, right) in enumerate(merges):
        text = left + right
        if text in scores:
            continue
        if rank <= end and (len(set(previous)) > 1 or len(set(text)) > 1):
            raise _joins_differently(path, f"merges of {previous!r} and {text!r} interleave")
        group += rank > end
        end, previous = max(end, last_rank[text]), text
        scores[text] = -float(group)
    return scores


def _check_complete(vocab: Mapping[str, int], merges: set[tuple[str, str]], added: set[str], path: Path) -> None:
    """Raise unless merges hold every split of a token into two: llama.cpp joins whatever makes a token."""
    parts = {text for text in vocab if text not in added}
    for text in parts.difference(_BYTE_TOKENS):
        for character in text:
            if character not in parts:
                raise _joins_differently(path, f"character {character!r} of token {text!r} is no token")
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in parts and right in parts and (left, right) not in merges:
                raise _joins_differently(path, f"{left!r} {right!r} makes a token, but is no merge")


def _joins_differently(path: Path, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: {reason}, so llama.cpp would join text differently; add the tokenizer.model that it was made from"
    )


# --- tokenizer.model --------------------------------------------------------------------------------------------------


def _check_algorithm(trainer: Mapping[int, Any], path: Path) -> None:
    kind = trainer.get(_MODEL_TYPE, 1)
    if kind != 2:
        raise UnsupportedError(
            f"{path}: sentencepiece {_MODEL_TYPES.get(kind, kind)} models are not supported; known: BPE"
        )
    if trainer.get(_WHITESPACE_AS_SUFFIX):
        raise UnsupportedError(f"{path}: blanks as suffix of words: llama.cpp has them in front only")


def _check_normalizer(normalizer: Mapping[int, Any], path: Path) -> None:
    name = bytes(normalizer.get(1, b"")).decode(errors="replace")
    unsupported = {
        f"character normalization {name!r}": bool(normalizer.get(_CHARSMAP)),
        "remove_extra_whitespaces": bool(normalizer.get(_EXTRA_WHITESPACES, 1)),
        "unescaped blanks": not normalizer.get(_ESCAPE_WHITESPACES, 1),
    }
    found = [what for what, is_set in unsupported.items() if is_set]
    if found:
        raise UnsupportedError(
            f"{path}: {', '.join(found)}: llama.cpp does not apply it, ids of such text would differ; "
            "--pre default converts it nevertheless"
        )


def _model_proto(path: Path) -> tuple[list[tuple[str, float, TokenType]], dict[int, Any], dict[int, Any]]:
    """Parse a sentencepiece ``ModelProto``: pieces ``(text, score, type)``, trainer and normalizer fields."""
    pieces: list[tuple[str, float, TokenType]] = []
    settings: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    try:
        for number, value in _fields(read_bytes(path)):
            if number == _PIECES:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(_PIECE_SCORE, bytes(4)))
                pieces.append((piece[_PIECE_TEXT].decode(), score, TokenType(piece.get(_PIECE_TYPE, 1))))
            elif number in settings:
                settings[number].update(_fields(value))
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise TokenizerError(f"{path}: not a sentencepiece model ({error}); restore the file") from error
    if not pieces:
        raise TokenizerError(f"{path}: not a sentencepiece model (no pieces); restore the file")
    return pieces, settings[_TRAINER], settings[_NORMALIZER]


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
