"""Tokens by id with types, scores and merges: the result of reading any kind of tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import TokenType

from ...errors import TokenizerError
from .added_tokens import AddedToken
from .files import TokenizerFiles

# Scores of added tokens and of padding in llama.cpp's conversion/base.py (_create_vocab_sentencepiece).
ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0

METASPACE = "\u2581"  # the space in sentencepiece vocabularies


@dataclass(frozen=True)
class Tokens:
    """A vocabulary before padding.

    Attributes:
        texts: text by id, with gaps allowed; texts are distinct.
        types: type by id.
        scores: score by id, of sentencepiece vocabularies only.
        merges: ``"left right"`` in order of rank, of byte-level BPE only.

    """

    texts: Mapping[int, str]
    types: Mapping[int, TokenType]
    scores: Mapping[int, float] = field(default_factory=dict)
    merges: tuple[str, ...] = ()


def added_token_type(token: AddedToken) -> TokenType:
    """Return ``CONTROL`` for special tokens and those that look special, else ``USER_DEFINED``."""
    return TokenType.CONTROL if token.special or looks_special(token.text) else TokenType.USER_DEFINED


def looks_special(text: str) -> bool:
    """Return whether the text of a token marks it as a control token, regardless of its flag.

    Some models flag control tokens as ordinary; the rule is llama.cpp's (conversion/base.py,
    ``does_token_look_special``).
    """
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(left) and text.endswith(right) for left, right in brackets
    )


def texts_by_id(vocab: Mapping[str, int], files: TokenizerFiles) -> dict[int, str]:
    """Return the text of every id of a ``tokenizer.json`` vocabulary and its added tokens.

    Raises:
        TokenizerError: an id is not a natural number, or belongs to two texts.

    """
    path = files.json_path
    texts: dict[int, str] = {}
    for text, token_id in vocab.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise TokenizerError(f"{path}: token {text!r}: wanted an id from 0, got {token_id!r}; restore the file")
        if texts.setdefault(token_id, text) != text:
            raise TokenizerError(
                f"{path}: id {token_id} belongs to both {texts[token_id]!r} and {text!r}; restore the file"
            )
    for token in files.added_tokens.values():
        texts[token.token_id] = token.text
    return texts


def piece_text(text: str, kind: TokenType) -> str:
    """Return the text that llama.cpp matches for a sentencepiece token: raw spaces for user-defined tokens."""
    return text.replace(METASPACE, " ") if kind == TokenType.USER_DEFINED else text


def overlay(
    texts: dict[int, str], types: dict[int, TokenType], scores: dict[int, float], added: Mapping[int, AddedToken]
) -> None:
    """Put added tokens into a sentencepiece vocabulary, replacing tokens with the same ids."""
    for token_id, token in added.items():
        types[token_id], scores[token_id] = added_token_type(token), ADDED_SCORE
        texts[token_id] = piece_text(token.text, types[token_id])
