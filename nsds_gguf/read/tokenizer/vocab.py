"""Convert the tokenizer of a model folder to GGUF keys.

Three kinds: byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``), sentencepiece BPE (``llama``) and sentencepiece
unigram (``t5``). Keys are those of llama.cpp's converter (conversion/base.py: ``_set_vocab_gpt2``,
``_set_vocab_sentencepiece``; conversion/t5.py); ``pretokenizers`` finds the pre-tokenizer. docs/tokenizers.md lists
what llama.cpp does differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Keys, TokenType
from gguf.gguf_writer import GGUFValue

from ...errors import TokenizerError, UnsupportedError
from ...records import kv
from .bpe import read_bpe
from .choice import another, aside, byte_level_note, differences, is_tiktoken
from .end_of_turn import unprinted_note
from .files import TokenizerFiles
from .json_files import read_bytes
from .metaspace import prefix_note
from .pretokenizers import check_name, limit_of, recognise
from .special_tokens import chat_template_keys, special_keys
from .spm import SentencePiece, read_converted, read_sentencepiece
from .steps import flat, is_byte_level
from .tokens import PADDING_SCORE, Tokens
from .unigram import Unigram, read_converted_unigram, read_unigram

_MAX_TOKEN_LETTERS = 10_000  # a tenth of what overflows the stack of llama.cpp's trie of a unigram vocabulary

_SPM_PRE = "default"  # the converter writes it for sentencepiece; llama.cpp ignores it


@dataclass(frozen=True)
class Vocab:
    """A vocabulary as GGUF keys, and notes, one sentence each."""

    metadata: dict[str, GGUFValue]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """The differences between kinds of vocabulary; ``keys`` are those of this kind only."""

    model: str
    pre: str
    tokens: Tokens
    source: Path
    own_ids: Mapping[str, int]
    adds_bos_by_default: bool
    notes: tuple[str, ...]
    keys: Mapping[str, GGUFValue] = field(default_factory=dict)


def read_vocab(folder: Path, n_vocab: int, config: Mapping[str, Any], pre: str | None = None) -> dict[str, GGUFValue]:
    """Return every ``tokenizer.*`` key of a model folder; see ``open_vocab``."""
    return open_vocab(folder, n_vocab, config, pre).metadata


def open_vocab(folder: Path, n_vocab: int, config: Mapping[str, Any], pre: str | None = None) -> Vocab:
    """Read the tokenizer of a model folder.

    Ids without a token, in gaps or after the last one, become ``[PADi]`` of type ``UNUSED``.

    Args:
        folder: the model folder.
        n_vocab: rows of the embedding.
        config: parsed ``config.json``, for special token ids that the tokenizer files do not name.
        pre: name of llama.cpp's pre-tokenizer, which skips the check of text handling; default: recognised.

    Raises:
        TokenizerError: files are missing, damaged, contradict one another or need more rows than there are.
        UnsupportedError: llama.cpp handles text differently, or has no pre-tokenizer ``pre``.

    """
    if pre is not None:
        check_name(pre)
    files = TokenizerFiles.read(folder, config)
    kind = _byte_level(files, pre) if is_byte_level(files.tokenizer) else _sentencepiece(files, pre)
    tokens, rows_note = _with_rows(kind, n_vocab, files)
    ids = {text: token_id for token_id, text in tokens.texts.items()}
    special = special_keys(files, ids, kind.own_ids, kind.adds_bos_by_default)
    templates = chat_template_keys(files)
    metadata = {
        Keys.Tokenizer.MODEL: kv(kind.model, GGUFValueType.STRING),
        Keys.Tokenizer.PRE: kv(kind.pre, GGUFValueType.STRING),
        **_token_keys(tokens, n_vocab, kind.source),
        **special.keys,
        **templates,
        **kind.keys,
    }
    added = {i: tokens.texts[i] for i in files.added_tokens if i in tokens.texts}
    written = [str(entry.value) for entry in templates.values()]
    notes = (
        *kind.notes,
        *files.resolved.notes,
        *rows_note,
        *special.notes,
        *unprinted_note(added, tokens.types, special.ids.values(), written),
        *_added_token_note(files),
    )
    return Vocab(metadata, notes)


def _with_rows(kind: _Kind, n_vocab: int, files: TokenizerFiles) -> tuple[Tokens, tuple[str, ...]]:
    """Return the tokens with a row in the embedding, and a note on added tokens without one."""
    tokens = kind.tokens
    beyond = sorted(i for i in tokens.texts if i >= n_vocab)
    if not beyond:
        return tokens, ()
    proper = [i for i in beyond if i not in files.added_tokens]
    if proper:
        raise TokenizerError(
            f"{kind.source}: {len(tokens.texts)} tokens up to id {beyond[-1]} ({tokens.texts[beyond[-1]]!r}), but the "
            f"embedding has {n_vocab} rows, and {len(proper)} of those without a row are not added tokens: the "
            "tokenizer belongs to another model; copy the correct files"
        )
    texts = {i: text for i, text in tokens.texts.items() if i < n_vocab}
    first = beyond[0]
    note = (
        f"{len(beyond)} added token{'s have' if len(beyond) > 1 else ' has'} no row in the embedding of {n_vocab} rows "
        f"and {'are' if len(beyond) > 1 else 'is'} left out, such as {tokens.texts[first]!r} (id {first})."
    )
    return replace(tokens, texts=texts), (note,)


def _byte_level(files: TokenizerFiles, pre: str | None) -> _Kind:
    tokens = read_bpe(files)
    notes = [note for note in [byte_level_note(files)] if note]
    if pre is None:
        pre = recognise(files.tokenizer, files.json_path)
        if _check_normalizer(files):
            notes.append("Text is expected in Unicode normalization form C: llama.cpp does not normalize it.")
    if limit := limit_of(pre):
        notes.append(f"llama.cpp's pre-tokenizer {pre!r} may give {limit} other token ids than the original.")
    return _Kind("gpt2", pre, tokens, files.json_path, {}, False, tuple(notes))


def _sentencepiece(files: TokenizerFiles, pre: str | None) -> _Kind:
    if pre not in (None, _SPM_PRE):
        raise UnsupportedError(
            f"--pre-tokenizer {pre}: {files.folder} has a sentencepiece tokenizer, which has no pre-tokenizer; "
            "leave it out"
        )
    reason = _why_not_model(files)
    if reason is None:
        return _from_model(files, pre)
    try:
        kind = _from_json(files)
    except UnsupportedError as error:
        if not reason:
            raise
        raise UnsupportedError(f"{error}; the tokenizer.model beside it {reason}") from error
    return replace(kind, notes=(aside(reason), *kind.notes)) if reason else kind


def _why_not_model(files: TokenizerFiles) -> str | None:
    """Return why ``tokenizer.model`` does not count; ``None`` if it does, an empty string if it does not exist."""
    if not files.model_path.is_file():
        return ""
    if not files.has_json:
        if is_tiktoken(read_bytes(files.model_path)):
            raise UnsupportedError(
                f"{files.model_path}: not a sentencepiece model, but a list of tokens for tiktoken, which does not say "
                "how text is split; load the tokenizer with transformers and save it, which writes tokenizer.json"
            )
        return None
    try:
        proto = files.proto
    except TokenizerError as error:
        return f"cannot be read ({error})"
    found = differences(files, proto)
    return another(found) if found else None


def _from_model(files: TokenizerFiles, pre: str | None) -> _Kind:
    if files.proto.algorithm == "unigram":
        return _unigram(read_unigram(files, files.proto), files.model_path)
    return _bpe(read_sentencepiece(files, files.proto, any_normalizer=pre is not None), files.model_path, "")


def _from_json(files: TokenizerFiles) -> _Kind:
    if _is_unigram(files.tokenizer):
        return _unigram(read_converted_unigram(files), files.json_path)
    read = read_converted(files)
    return _bpe(read, files.json_path, prefix_note(files.tokenizer) if read.add_space_prefix else "")


def _is_unigram(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return isinstance(model, Mapping) and model.get("type") == "Unigram"


def _bpe(read: SentencePiece, source: Path, note: str) -> _Kind:
    keys = {Keys.Tokenizer.ADD_PREFIX: kv(read.add_space_prefix, GGUFValueType.BOOL)}
    notes = tuple(text for text in (read.note, note) if text)
    return _Kind("llama", _SPM_PRE, read.tokens, source, read.special_ids, True, notes, keys)


def _unigram(read: Unigram, source: Path) -> _Kind:
    return _Kind("t5", _SPM_PRE, read.tokens, source, read.special_ids, True, read.notes, read.keys)


def _check_normalizer(files: TokenizerFiles) -> bool:
    """Return whether the tokenizer normalizes to form C; raise for any other normalization."""
    kinds = [str(step.get("type")) for step in flat(files.tokenizer.get("normalizer"))]
    if any(kind != "NFC" for kind in kinds):
        raise UnsupportedError(
            f"{files.json_path}: normalizer {' > '.join(kinds)}: llama.cpp does not apply it, ids would differ; "
            "known: none and NFC; --pre-tokenizer NAME converts it anyway"
        )
    return bool(kinds)


def _token_keys(tokens: Tokens, n_vocab: int, source: Path) -> dict[str, GGUFValue]:
    texts = [tokens.texts.get(i, f"[PAD{i}]") for i in range(n_vocab)]
    _check_texts(texts, source)
    types = [int(tokens.types.get(i, TokenType.UNUSED)) for i in range(n_vocab)]
    keys = {
        Keys.Tokenizer.LIST: kv(texts, GGUFValueType.ARRAY, GGUFValueType.STRING),
        Keys.Tokenizer.TOKEN_TYPE: kv(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    if tokens.scores:
        scores = [tokens.scores.get(i, PADDING_SCORE) for i in range(n_vocab)]
        keys[Keys.Tokenizer.SCORES] = kv(scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    if tokens.merges:
        keys[Keys.Tokenizer.MERGES] = kv(list(tokens.merges), GGUFValueType.ARRAY, GGUFValueType.STRING)
    return keys


def _check_texts(texts: list[str], source: Path) -> None:
    """Raise unless all token texts are distinct, as llama.cpp requires, and valid Unicode."""
    ids: dict[str, int] = {}
    for token_id, text in enumerate(texts):
        if ids.setdefault(text, token_id) != token_id:
            raise TokenizerError(f"{source}: token {text!r} has both id {ids[text]} and id {token_id}")
    longest = max(texts, key=len, default="")
    if len(longest) > _MAX_TOKEN_LETTERS:
        raise TokenizerError(
            f"{source}: token {ids[longest]} has {len(longest)} letters; llama.cpp, which recurses for each, "
            f"supports at most {_MAX_TOKEN_LETTERS}: the file is damaged"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{source}: a token is not valid Unicode: {error.reason}; restore the file") from error


def _added_token_note(files: TokenizerFiles) -> tuple[str, ...]:
    stripping = [token.text for token in files.added_tokens.values() if token.strips]
    if not stripping:
        return ()
    architectures = files.config.get("architectures") or []
    unless = ", unless general.name contains phi-3" if "Phi3ForCausalLM" in architectures else ""
    return (
        f"Added tokens such as {stripping[0]!r} strip spaces around them or match whole words only; "
        f"llama.cpp matches their text alone{unless}.",
    )
