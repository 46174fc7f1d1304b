"""Byte-level BPE of a ``tokenizer.json``: tokens, types and merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from ...errors import TokenizerError, UnsupportedError
from .files import TokenizerFiles
from .tokens import Tokens, added_token_type, texts_by_id

_UTF8_BYTES = sorted(set(range(0xF5)) - {0xC0, 0xC1})  # the bytes that occur in UTF-8 text


def bpe_model(files: TokenizerFiles) -> Mapping[str, Any]:
    """Return the BPE model of ``tokenizer.json``.

    Raises:
        UnsupportedError: another algorithm, or a variant of BPE that llama.cpp does not support.
        TokenizerError: no vocabulary.

    """
    model = files.tokenizer.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), (Mapping, list)):
        raise TokenizerError(f"{files.json_path}: wanted an object 'model' with a vocab; restore the file")
    kind = model.get("type", "BPE")  # old GPT-2 files leave it out
    if kind != "BPE" or not isinstance(model["vocab"], Mapping):
        raise UnsupportedError(f"{files.json_path}: tokenizer model {kind} is not supported; known: BPE")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise UnsupportedError(f"{files.json_path}: BPE with {option} {model[option]!r}: llama.cpp has none")
    return model


def read_bpe(files: TokenizerFiles) -> Tokens:
    """Read a byte-level BPE vocabulary.

    Raises:
        UnsupportedError: a variant that llama.cpp does not support.
        TokenizerError: ids or merges contradict the vocabulary.

    """
    model, path = bpe_model(files), files.json_path
    vocab = model["vocab"]
    texts = texts_by_id(vocab, files)
    _check_alphabet(model, path)
    types = dict.fromkeys(texts, TokenType.NORMAL)
    types.update({token_id: added_token_type(token) for token_id, token in files.added_tokens.items()})
    return Tokens(texts, types, merges=_merge_lines(model.get("merges"), vocab, path))


def byte_alphabet() -> tuple[str, ...]:
    """Return the character for each byte, 256 in all.

    Printable Latin-1 maps to itself, the other bytes to U+0100 and up, in order (GPT-2's ``bytes_to_unicode``).
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in itself else next(others)) for byte in range(256))


def merge_pairs(merges: Any, vocab: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """Return the two halves of each merge, from ``"left right"`` or ``["left", "right"]``.

    Raises:
        TokenizerError: a merge has another form, or a half or the whole is not a token.

    """
    if not isinstance(merges, list) or not merges:
        raise TokenizerError(f"{path}: wanted a list of merges, got {merges!r}; restore the file")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise TokenizerError(f"{path}: merge {len(pairs)}: wanted two tokens, got {merge!r}; restore the file")
        left, right = pair
        if not (left in vocab and right in vocab and left + right in vocab):
            unknown = next(text for text in (left, right, left + right) if text not in vocab)
            raise TokenizerError(f"{path}: merge {len(pairs)} {merge!r}: {unknown!r} is not in the vocabulary")
        pairs.append((left, right))
    return pairs


def _merge_lines(merges: Any, vocab: Mapping[str, int], path: Path) -> tuple[str, ...]:
    lines = tuple(f"{left} {right}" for left, right in merge_pairs(merges, vocab, path))
    blank = next((line for line in lines if line.count(" ") != 1), None)
    if blank is not None:
        raise TokenizerError(f"{path}: merge {blank!r}: a space in a byte-level token; restore the file")
    return lines


def _check_alphabet(model: Mapping[str, Any], path: Path) -> None:
    """Refuse vocabularies that replace a missing byte by another token: llama.cpp drops the byte."""
    alphabet = byte_alphabet()
    missing = [byte for byte in _UTF8_BYTES if alphabet[byte] not in model["vocab"]]
    if missing and (model.get("unk_token") or model.get("byte_fallback")):
        raise UnsupportedError(
            f"{path}: no token for byte 0x{missing[0]:02X} and {len(missing) - 1} others, which the tokenizer "
            "replaces and llama.cpp drops"
        )
