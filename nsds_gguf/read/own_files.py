"""Restrict reading to regular files of plausible size that belong to the model folder.

A folder may come from anywhere. A pipe or a device under a file's name would be read forever, and a link to a file
elsewhere would put its text into messages, or into the GGUF as a chat template. But links are common: the Hub's cache
consists of them, and people link files between folders. So a link may lead out of the folder to a file of the same name
or to a store that names files by content; weights, which hold no text, may link anywhere.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelError

MAX_TEXT_BYTES = 100 << 20  # the largest known tokenizer.json has 33 MiB

_TEXTS = (
    "config.json", "generation_config.json", "*.index.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "tekken.json", "vocab.json", "merges.txt", "tokenizer.model", "*.tiktoken", "chat_template.*",
    "modules.json", "config_sentence_transformers.json", "README.md", "adapter_config.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_FOLDERS = ("additional_chat_templates", "1_Pooling")

_CONTENT_NAME = re.compile(r"(.*[^0-9a-f])?[0-9a-f]{30,}(\..*)?", re.IGNORECASE)  # of the Hub's cache, DVC, git-annex


def check_files(folder: Path) -> None:
    """Raise ``ModelError`` for a model file that must not be read; ignore files that are not part of a model."""
    for path, is_text in _read_files(folder):
        try:
            found = path.stat()
        except (OSError, ValueError):  # a dangling link: the reader of the file reports it
            continue
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path}: is {_kind(found.st_mode)}; wanted an ordinary file")
        if is_text and found.st_size > MAX_TEXT_BYTES:
            raise ModelError(
                f"{path}: has {found.st_size / 2**20:.0f} MiB; wanted at most {MAX_TEXT_BYTES >> 20}: it is damaged "
                "or another file"
            )
        if is_text:
            _check_link(folder, path)


def _read_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the files that may be read, and whether they are text."""
    for place in (folder, *(folder / name for name in _FOLDERS)):
        try:
            paths = sorted(place.iterdir())
        except OSError:
            continue
        for path in paths:
            is_text = place != folder or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _TEXTS)
            if is_text or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _WEIGHTS):
                yield path, is_text


def _check_link(folder: Path, path: Path) -> None:
    """Raise ``ModelError`` for a link out of the folder to a different name that is not a content hash."""
    target = Path(os.path.realpath(path))
    if target.is_relative_to(os.path.realpath(folder)) or target.name == path.name:
        return
    if _CONTENT_NAME.fullmatch(target.name) is None:
        raise ModelError(
            f"{path}: is a link to {target}, outside the model folder, which is not read; if you trust it, "
            "copy the file into the folder"
        )


def _kind(mode: int) -> str:
    """Return the kind of a special file, in words."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "not a file")
