"""The parsed tokenizer files of a model folder, with the checks common to all kinds of tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import TokenizerError
from .added_tokens import AddedToken, Listings, Resolved, resolve
from .json_files import read_json
from .sentencepiece_proto import ModelProto, read_proto

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # each defines the token ids


@dataclass(frozen=True)
class TokenizerFiles:
    """Parsed JSON of the tokenizer files; a missing file is an empty mapping.

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
        """Read the files of ``folder``; raise ``TokenizerError`` for a damaged file or a missing tokenizer."""
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise TokenizerError(_no_tokenizer(folder))
        names = ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config", "added_tokens")
        return cls(folder, config, *(read_json(folder / f"{name}.json") for name in names))

    @property
    def json_path(self) -> Path:
        """Path of ``tokenizer.json``."""
        return self.folder / "tokenizer.json"

    @property
    def model_path(self) -> Path:
        """Path of ``tokenizer.model``."""
        return self.folder / "tokenizer.model"

    @property
    def has_json(self) -> bool:
        """Whether ``tokenizer.json`` holds a model."""
        return isinstance(self.tokenizer.get("model"), Mapping)

    @cached_property
    def json_vocab(self) -> dict[str, int]:
        """Id by text in ``tokenizer.json``, BPE or Unigram; skips invalid entries."""
        vocab = self.tokenizer["model"].get("vocab") if self.has_json else None
        if isinstance(vocab, list):
            pairs = [(entry[0], i) for i, entry in enumerate(vocab) if isinstance(entry, list) and entry]
            return {text: i for text, i in pairs if isinstance(text, str)}
        entries = vocab.items() if isinstance(vocab, Mapping) else ()
        return {text: i for text, i in entries if isinstance(text, str) and type(i) is int}

    @cached_property
    def proto(self) -> ModelProto:
        """The parsed ``tokenizer.model``; raises ``TokenizerError`` if it is not a sentencepiece model."""
        return read_proto(self.model_path)

    @property
    def listings(self) -> Listings:
        """The parsed files that list added tokens."""
        return Listings(
            self.tokenizer, self.tokenizer_config, self.special_tokens_map, self.added_tokens_map, self.config
        )

    @cached_property
    def resolved(self) -> Resolved:
        """Added tokens as transformers has them, and notes; raises ``TokenizerError`` for a damaged entry."""
        if self.has_json or not self.model_path.is_file():
            return resolve(self.listings, self.json_vocab, by_file_id=False)
        vocab = {piece.text: i for i, piece in enumerate(self.proto.pieces)}
        return resolve(self.listings, vocab, by_file_id=True)

    @property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """Added tokens by id."""
        return self.resolved.tokens


def _no_tokenizer(folder: Path) -> str:
    looked_for = " nor ".join(TOKENIZER_FILES)
    if (folder / "vocab.json").is_file():
        return (
            f"{folder}: no tokenizer: neither {looked_for} exists, and vocab.json does not say how text is split; "
            "load the tokenizer with transformers and save it, which writes tokenizer.json"
        )
    return f"{folder}: no tokenizer: neither {looked_for} exists; copy the tokenizer files of the original model"
