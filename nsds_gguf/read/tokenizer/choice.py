"""Choose between ``tokenizer.json`` and ``tokenizer.model`` when both exist.

transformers uses ``tokenizer.json``. A ``tokenizer.model`` of the same vocabulary holds more (scores, types), so it is
used if the two agree, and ignored with a note if they do not.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from ...errors import TokenizerError
from .bpe import byte_alphabet
from .files import TokenizerFiles
from .json_files import read_bytes
from .sentencepiece_proto import ModelProto

_CHARACTER_BYTES = {f"<0x{byte:02X}>": chr(byte) for byte in range(0x80)}
_SCORE_TOLERANCE = 1e-6  # relative: JSON holds scores of float32 in decimal


@dataclass(frozen=True)
class Difference:
    """A difference of ``tokenizer.model`` from ``tokenizer.json``: kind, number of entries, example."""

    what: str
    n: int
    example: str


def differences(files: TokenizerFiles, proto: ModelProto) -> list[Difference]:
    """Return the differences of a sentencepiece model from ``tokenizer.json``, added tokens excluded.

    Compares the text of every id, and the order of BPE merges or the scores of a unigram model.
    """
    ours = {i: text for text, i in files.json_vocab.items()}
    theirs = {i: piece.text for i, piece in enumerate(proto.pieces)}
    model = files.tokenizer["model"]
    is_unigram = isinstance(model.get("vocab"), list)
    if is_unigram != (proto.algorithm == "unigram"):
        kind = "Unigram" if is_unigram else model.get("type", "BPE")
        return [Difference("way to split text", 1, f"it is {proto.algorithm}, tokenizer.json is {kind}")]
    found = list(_text_differences(ours, theirs, files))
    return found + (_score_differences(files, proto) if is_unigram else _merge_differences(files, proto))


def byte_level_note(files: TokenizerFiles) -> str:
    """Return the note on how ``tokenizer.model`` differs from a byte-level ``tokenizer.json``; empty if it does not."""
    if not files.model_path.is_file():
        return ""
    try:
        ranks = _tiktoken_ranks(read_bytes(files.model_path))
    except TokenizerError as error:
        return aside(f"cannot be read ({error})")
    if ranks is None:
        return aside("is of another kind than its byte-level BPE")
    alphabet = byte_alphabet()
    theirs = {rank: "".join(alphabet[byte] for byte in token) for token, rank in ranks.items()}
    ours = {i: text for text, i in files.json_vocab.items()}
    found = list(_text_differences(ours, theirs, files))
    return aside(another(found)) if found else ""


def another(found: list[Difference]) -> str:
    """Return the differences as the predicate of a sentence."""
    return "is another vocabulary: " + "; ".join(f"{each.n} {each.what}, as {each.example}" for each in found)


def aside(reason: str) -> str:
    """Return the note that ``tokenizer.json`` counts because ``tokenizer.model`` ``reason``."""
    return f"tokenizer.json counts, as in transformers; tokenizer.model beside it {reason}."


def is_tiktoken(data: bytes) -> bool:
    """Return whether a ``tokenizer.model`` is a tiktoken list, like Llama 3's and Kimi's, not sentencepiece."""
    return _tiktoken_ranks(data[: data.rfind(b"\n", 0, 4096) + 1]) is not None


def _tiktoken_ranks(data: bytes) -> dict[bytes, int] | None:
    """Return rank by token of a tiktoken file (a line each: base64, space, rank); ``None`` for other files."""
    ranks: dict[bytes, int] = {}
    for line in data.splitlines():
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdigit():
            return None
        try:
            ranks[base64.b64decode(fields[0], validate=True)] = int(fields[1])
        except (binascii.Error, ValueError):
            return None
    return ranks or None


def _text_differences(
    ours: Mapping[int, str], theirs: Mapping[int, str], files: TokenizerFiles
) -> Iterator[Difference]:
    """Yield ids with two texts, and ids that one side lacks, added tokens excluded."""
    added = files.added_tokens
    other = [i for i in sorted(theirs.keys() & ours.keys()) if i not in added and not _same(ours[i], theirs[i])]
    if other:
        i = other[0]
        yield Difference("ids have other text", len(other), f"id {i} is {theirs[i]!r}, in tokenizer.json {ours[i]!r}")
    missing = sorted(ours.keys() - theirs.keys() - added.keys())
    if missing:
        yield Difference("tokens are missing", len(missing), f"id {missing[0]} {ours[missing[0]]!r}")
    extra = sorted(theirs.keys() - ours.keys() - added.keys())
    if extra:
        yield Difference("tokens are not in tokenizer.json", len(extra), f"id {extra[0]} {theirs[extra[0]]!r}")


def _same(ours: str, theirs: str) -> bool:
    """Compare texts; conversions of Gemma have a tab in place of its byte token."""
    return ours == theirs or _CHARACTER_BYTES.get(theirs) == ours


def _score_differences(files: TokenizerFiles, proto: ModelProto) -> list[Difference]:
    scores: list[Any] = [
        entry[1] for entry in files.tokenizer["model"]["vocab"] if isinstance(entry, list) and entry[1:]
    ]
    other = [
        (i, piece, score)
        for i, (piece, score) in enumerate(zip(proto.pieces, scores, strict=False))
        if not (isinstance(score, int | float) and math.isclose(piece.score, score, rel_tol=_SCORE_TOLERANCE))
    ]
    if not other:
        return []
    i, piece, score = other[0]
    return [
        Difference("scores differ", len(other), f"id {i} {piece.text!r} has {piece.score:g}, in tokenizer.json {score}")
    ]


def _merge_differences(files: TokenizerFiles, proto: ModelProto) -> list[Difference]:
    """Return tokens that scores and merges join in different order, and tokens without a merge."""
    scores = {piece.text: piece.score for piece in proto.pieces if piece.type == TokenType.NORMAL}
    made: dict[str, None] = {}
    late: dict[str, None] = {}
    lowest = math.inf
    merges = files.tokenizer["model"].get("merges")
    for merge in merges if isinstance(merges, list) else []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        joined = "".join(part for part in pair if isinstance(part, str)) if isinstance(pair, list) else ""
        made[joined] = None
        score = scores.get(joined)
        if score is None:
            continue
        if score > lowest:
            late[joined] = None
        lowest = min(lowest, score)
    unmade = [text for text, score in scores.items() if score and text not in made and _splits(text, scores)]
    found = [Difference("tokens are joined in another order", len(late), repr(next(iter(late))))] if late else []
    if unmade:
        found.append(Difference("tokens have no merge in tokenizer.json", len(unmade), repr(unmade[0])))
    return found


def _splits(text: str, pieces: Mapping[str, float]) -> bool:
    return any(text[:i] in pieces and text[i:] in pieces for i in range(1, len(text)))
