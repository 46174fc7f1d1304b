"""Convert frozen records to JSON and back; check every field against its annotation."""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import RecordError


def read_json(path: Path) -> Any:
    """Parse a JSON file; raise ``RecordError`` when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON: {error}; create it again") from error


# Names of JSON values, for messages.
_JSON_NAMES = {float: "a number", int: "an integer", str: "text", tuple: "a list"}


def checked(data: Any, wanted: str, source: str) -> dict[str, Any]:
    """Return a parsed record without its format; raise ``RecordError`` for another format."""
    found = data.get("format") if isinstance(data, dict) else None
    if found != wanted:
        if isinstance(found, str) and found.rpartition(" ")[0] == wanted.rpartition(" ")[0]:
            raise RecordError(f"{source}: was written by another version of nsds-gguf ({found}); create it again")
        raise RecordError(f"{source}: wanted a file of format {wanted!r}, got {found!r}")
    return {key: value for key, value in data.items() if key != "format"}


def built(kind: Any, value: Any, source: str, at: str = "") -> Any:
    """Convert parsed JSON to a value of an annotated type, one of those that the records use.

    Raises ``RecordError`` naming the first value that does not fit; ``at`` is the path of ``value`` in the file.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return _built_record(kind, value, source, at)
    if origin is UnionType:
        return None if value is None else built(arguments[0], value, source, at)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(built(arguments[0], item, source, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: built(arguments[1], item, source, f"{at}.{key}") for key, item in value.items()}
    if value in arguments if origin is Literal else _is_scalar(kind, value):
        return value
    wanted = " or ".join(arguments) if origin is Literal else _JSON_NAMES.get(origin or kind, "an object")
    raise RecordError(f"{source}: {at}: wanted {wanted}, got {reprlib.repr(value)}; create the file again")


def _built_record(kind: Any, data: Mapping[str, Any], source: str, at: str) -> Any:
    hints = get_type_hints(kind)
    required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    unknown = [name for name in data if name not in hints]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown field {reprlib.repr(unknown[0])}"
        raise RecordError(f"{source}: {at or 'the record'} {what}; create the file again")
    prefix = f"{at}." if at else ""
    return kind(**{name: built(hints[name], item, source, prefix + name) for name, item in data.items()})


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is float:  # an integer is fine too; must be finite
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    return type(value) is kind


def digest(data: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
