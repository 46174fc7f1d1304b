"""Read tokenizer files as bytes, text or JSON, with errors that name the damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import TokenizerError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty for a missing file; raise ``TokenizerError`` for a damaged one."""
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
    """Return the bytes of a file; raise ``TokenizerError`` for a git-lfs pointer."""
    data = path.read_bytes()
    if data.startswith(_LFS_POINTER):
        raise TokenizerError(f"{path}: a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'")
    return data


def read_text(path: Path) -> str:
    """Return the text of a file; raise ``TokenizerError`` when it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8: {error}; restore the file") from error
