"""Sentencepiece BPE, from ``tokenizer.model`` or from a ``tokenizer.json`` that was converted from one.

llama.cpp's ``llama`` tokenizer (src/llama-vocab.cpp, ``llm_tokenizer_spm_session``) joins the adjacent pair whose union
has the highest score, like sentencepiece; its only normalization is the space prefix.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from ...errors import UnsupportedError
from .added_tokens import AddedToken
from .bpe import bpe_model, merge_pairs
from .files import TokenizerFiles
from .metaspace import class_prefix, class_prefix_note, metaspace_prefix
from .sentencepiece_proto import ModelProto, Piece
from .tokens import Tokens, overlay, piece_text, texts_by_id

_BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}


@dataclass(frozen=True)
class SentencePiece:
    """A sentencepiece vocabulary for llama.cpp.

    ``special_ids`` are the ids that the model file names (``bos``, ``eos``, ``unk``, ``pad``).
    """

    tokens: Tokens
    add_space_prefix: bool
    special_ids: Mapping[str, int]
    note: str = ""


def read_sentencepiece(files: TokenizerFiles, proto: ModelProto, any_normalizer: bool) -> SentencePiece:
    """Read a BPE ``tokenizer.model`` and the added tokens beside it.

    Args:
        files: the tokenizer files.
        proto: the parsed ``tokenizer.model``.
        any_normalizer: accept a normalization that llama.cpp does not apply.

    Raises:
        UnsupportedError: not BPE with byte fallback, or text handling that llama.cpp does not support.

    """
    _check_algorithm(proto)
    if not any_normalizer:
        _check_normalizer(proto)
    texts = {i: piece_text(piece.text, piece.type) for i, piece in enumerate(proto.pieces)}
    types = {i: _piece_type(piece) for i, piece in enumerate(proto.pieces)}
    scores = {i: piece.score for i, piece in enumerate(proto.pieces)}
    _check_bytes(set(texts.values()), proto.path)
    overlay(texts, types, scores, files.added_tokens)
    prefix, note = _prefix_beside(files, proto)
    return SentencePiece(Tokens(texts, types, scores), prefix, proto.special_ids, note)


def read_converted(files: TokenizerFiles) -> SentencePiece:
    """Read a ``tokenizer.json`` whose BPE model is a converted sentencepiece model.

    Recovers scores from the ranks of the merges. That is faithful only if the conversion derived the merges from
    scores: every way to split a token into two others, token by token.

    Raises:
        UnsupportedError: not such a conversion, or text handling that llama.cpp does not support.
        TokenizerError: ids or merges contradict the vocabulary.

    """
    path, model = files.json_path, bpe_model(files)
    of_file = metaspace_prefix(files.tokenizer, path)
    prefix = class_prefix(files)
    note = class_prefix_note(files, of_file)
    vocab = model["vocab"]
    texts, added = texts_by_id(vocab, files), files.added_tokens
    _check_bytes(vocab, path)
    joined = _scores_by_rank(vocab, merge_pairs(model.get("merges"), vocab, path), added, path)
    types = {i: TokenType.BYTE if text in _BYTE_TOKENS else TokenType.NORMAL for i, text in texts.items()}
    scores = {i: joined.get(text, 0.0) for i, text in texts.items()}
    unk_token = model.get("unk_token")
    unk = vocab.get(unk_token) if isinstance(unk_token, str) else None
    if unk is not None:
        types[unk] = TokenType.UNKNOWN
    overlay(texts, types, scores, added)
    special_ids = {} if unk is None else {"unk": unk}
    return SentencePiece(Tokens(texts, types, scores), of_file if prefix is None else prefix, special_ids, note)


def _check_bytes(texts: Container[str], path: Path) -> None:
    """Raise unless every byte has a byte token or a character token (such as the tab in conversions of Gemma 1 and 2).

    llama.cpp searches for either (src/llama-vocab.cpp, ``byte_to_token``) and crashes without one.
    """
    missing = [
        text for text, byte in _BYTE_TOKENS.items() if text not in texts and (byte > 0x7F or chr(byte) not in texts)
    ]
    if missing:
        raise UnsupportedError(
            f"{path}: no byte fallback: {len(missing)} of 256 byte tokens are missing, the first {missing[0]}; "
            "llama.cpp cannot encode characters outside the vocabulary without them"
        )


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def _scores_by_rank(
    vocab: Mapping[str, int], merges: list[tuple[str, str]], added: Mapping[int, AddedToken], path: Path
) -> dict[str, float]:
    """Return a score per joined token that orders joins like the ranks, from -1 downwards.

    Tokens with interleaved merges had the same score, and get the same score again. That is correct for runs of one
    character, such as Llama 2's spaces; for other tokens, llama.cpp, which prefers the leftmost, might join
    differently.
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
    """Raise unless merges hold every split of a token into two: llama.cpp joins any pair that forms a token."""
    parts = {text for text in vocab if text not in added}
    for text in parts.difference(_BYTE_TOKENS):
        for character in text:
            if character not in parts:
                raise _joins_differently(path, f"character {character!r} of token {text!r} is not a token")
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in parts and right in parts and (left, right) not in merges:
                raise _joins_differently(path, f"{left!r} {right!r} forms a token, but is not a merge")


def _joins_differently(path: Path, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: {reason}, so llama.cpp would join text differently; add the original tokenizer.model"
    )


# --- tokenizer.model --------------------------------------------------------------------------------------------------


def _piece_type(piece: Piece) -> TokenType:
    """Return the type of a piece; InternLM 2 marks unused pieces by name (llama.cpp's conversion/internlm.py)."""
    if piece.type == TokenType.NORMAL and piece.text.startswith("[UNUSED_TOKEN_"):
        return TokenType.UNUSED
    return piece.type


def _prefix_beside(files: TokenizerFiles, proto: ModelProto) -> tuple[bool, str]:
    """Return whether to add a space prefix, with a note if the class of the tokenizer overrides the files."""
    of_file = proto.adds_dummy_prefix
    if files.has_json:
        with suppress(UnsupportedError):  # other text handling than sentencepiece's own: the model file counts
            of_file = metaspace_prefix(files.tokenizer, files.json_path)
    prefix = class_prefix(files)
    if prefix is not None:
        return prefix, class_prefix_note(files, of_file)
    flag = None if files.has_json else files.tokenizer_config.get("add_prefix_space")
    return flag if isinstance(flag, bool) else of_file, ""


def _check_algorithm(proto: ModelProto) -> None:
    if proto.algorithm != "BPE":
        raise UnsupportedError(
            f"{proto.path}: sentencepiece {proto.algorithm} models are not supported; known: BPE and unigram"
        )
    if proto.blanks_are_suffixes:
        raise UnsupportedError(f"{proto.path}: spaces as suffix of words: llama.cpp supports them as prefix only")


def _check_normalizer(proto: ModelProto) -> None:
    unsupported = {
        f"character normalization {proto.normalization!r}": bool(proto.charsmap),
        "remove_extra_whitespaces": proto.removes_extra_whitespaces,
        "unescaped spaces": not proto.escapes_whitespaces,
    }
    found = [what for what, is_set in unsupported.items() if is_set]
    if found:
        raise UnsupportedError(
            f"{proto.path}: {', '.join(found)}: llama.cpp does not apply it, ids of such text would differ; "
            "--pre-tokenizer default converts it anyway"
        )
