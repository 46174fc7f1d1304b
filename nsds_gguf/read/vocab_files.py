"""The tokenizer files of a model folder, read and checked as far as every kind of tokenizer needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import TokenizerError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # either alone defines the token ids


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before anything is split.

    ``special`` ones are control tokens; ``strips`` ones take the blanks around them along or match whole words only.
    """

    token_id: int
    text: str
    special: bool
    strips: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """Parsed JSON of the tokenizer files; a file that does not exist is an empty mapping.

    ``config`` is the model's ``config.json``.
    """

    folder: Path
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    added_tokens_map: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
        """Read what ``folder`` holds; raises ``TokenizerError`` when a file is damaged or no tokenizer is there."""
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise TokenizerError(_no_tokenizer(folder))
        names = ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config", "added_tokens")
        return cls(folder, config, *(read_json(folder / f"{name}.json") for name in names))

    @property
    def json_path(self) -> Path:
        """Where ``tokenizer.json`` is or would be."""
        return self.folder / "tokenizer.json"

    @property
    def model_path(self) -> Path:
        """Where ``tokenizer.model`` is or would be."""
        return self.folder / "tokenizer.model"

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens of all files by id; where files name an id twice, ``tokenizer.json`` has the last word.

        Raises:
            TokenizerError: an entry is not an id and a text, or ``tokenizer.json`` gives an id or a text twice.

        """
        found: dict[int, AddedToken] = {}
        for text, token_id in self.added_tokens_map.items():
            found[_token_id(token_id, text, "added_tokens.json")] = AddedToken(
                token_id, text, special=text in self._named_special
            )
        for key, entry in _mapping(self.tokenizer_config, "added_tokens_decoder", "tokenizer_config.json").items():
            token_id = int(key) if key.isdecimal() else key
            found[_token_id(token_id, key, "tokenizer_config.json")] = _added_token(entry, token_id)
        for token in self.json_added_tokens:
            found[token.token_id] = token
        return found

    @cached_property
    def json_added_tokens(self) -> tuple[AddedToken, ...]:
        """Added tokens of ``tokenizer.json`` in its order; raises ``TokenizerError`` when it names one twice."""
        entries = self.tokenizer.get("added_tokens") or []
        if not isinstance(entries, list):
            raise TokenizerError(f"{self.json_path}: added_tokens: wanted a list, got {type(entries).__name__}")
        tokens = tuple(_added_token(entry, _field(entry, "id")) for entry in entries)
        if min(len({token.token_id for token in tokens}), len({token.text for token in tokens})) < len(tokens):
            raise TokenizerError(f"{self.json_path}: added_tokens names the same id or text twice; restore the file")
        return tokens

    @cached_property
    def _named_special(self) -> set[str]:
        """Texts that a configuration file calls special, for ``added_tokens.json``, which has no flags."""
        return set(_named_tokens(self.tokenizer_config)) | set(_named_tokens(self.special_tokens_map))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty when there is no such file; raises ``TokenizerError`` when damaged."""
    if not path.is_file():
        return {}
    data = read_bytes(path)
    try:
        parsed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer too long, brackets too deep
        raise TokenizerError(f"{path}: not JSON: {error}; restore the file") from error
    if not isinstance(parsed, dict):
        raise TokenizerError(f"{path}: wanted a JSON object, got {type(parsed).__name__}; restore the file")
    return parsed


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file; raises ``TokenizerError`` for a git-lfs pointer in its place."""
    data = path.read_bytes()
    if data.startswith(_LFS_POINTER):
        raise TokenizerError(f"{path}: a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'")
    return data


def read_text(path: Path) -> str:
    """Return the text of a file; raises ``TokenizerError`` when it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8: {error}; restore the file") from error


def token_text(entry: Any) -> str | None:
    """Return the text of a token as configuration files write it: a string or an object with ``content``."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) and text else None


def _no_tokenizer(folder: Path) -> str:
    looked_for = " nor ".join(TOKENIZER_FILES)
    if (folder / "vocab.json").is_file():
        return (
            f"{folder}: no tokenizer: neither {looked_for} is there, and vocab.json does not say how text is split; "
            "load the tokenizer with transformers and save it, which writes tokenizer.json"
        )
    return f"{folder}: no tokenizer: neither {looked_for} is there; copy the tokenizer files of the original model"


def _named_tokens(configuration: Mapping[str, Any]) -> Iterator[str]:
    for key, value in configuration.items():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            for entry in value if isinstance(value, list) else [value]:
                if (text := token_text(entry)) is not None:
                    yield text


def _mapping(configuration: Mapping[str, Any], key: str, file: str) -> Mapping[str, Any]:
    value = configuration.get(key) or {}
    if not isinstance(value, Mapping):
        raise TokenizerError(f"{file}: {key}: wanted an object, got {type(value).__name__}; restore the file")
    return value


def _added_token(entry: Any, token_id: Any) -> AddedToken:
    text = _field(entry, "content")
    strips = any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    return AddedToken(_token_id(token_id, text, "added_tokens"), str(text), bool(entry.get("special")), strips)


def _field(entry: Any, key: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise TokenizerError(f"added_tokens: wanted an object with content and id, got {entry!r}; restore the file")
    return entry[key]


def _token_id(value: Any, text: Any, file: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TokenizerError(f"{file}: token {text!r}: wanted an id from 0, got {value!r}; restore the file")
    return value
