"""The values of arguments: text becomes numbers, sizes, types and names, or an error that says what was wanted."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from ..errors import NsdsError
from ..llamacpp import ggml
from ..publish.model_card import is_repo
from ..read.projector import PROJECTOR_TYPES

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(?:([KMG])(i?))?B?", re.IGNORECASE)
_SIZE_POWERS = {"K": 1, "M": 2, "G": 3}


def parse_bpw_list(text: str) -> list[float]:
    """Parse ``2.8,3.2,4``."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 32 for value in values):
        raise ValueError(text)
    return values


def parse_size(text: str) -> int:
    """Parse bytes with an optional unit: ``1500000``, ``700M``, ``1.5GiB``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, letter, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** _SIZE_POWERS.get((letter or "").upper(), 0)
    if not 1 <= size < 2**63:
        raise ValueError(text)
    return int(size)


def parse_repo(text: str) -> str:
    """Parse the name of a repository on the Hub."""
    if not is_repo(text):
        raise ValueError(text)
    return text


def parse_type(text: str) -> str:
    """Parse the name of a type."""
    name = text.strip().upper()
    if name not in ggml.TYPES:
        raise ValueError(text)
    return name


def parse_projector_type(text: str) -> str:
    """Parse the type of a vision part."""
    name = text.strip().upper()
    if name not in PROJECTOR_TYPES:
        raise ValueError(text)
    return name


def parse_types(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of types."""
    return tuple(dict.fromkeys(parse_type(part) for part in text.split(",")))


def argument(parse: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """Return a parser of one argument that reports what it wanted."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except NsdsError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}") from error

    return parsed


def integer_from(smallest: int) -> Callable[[str], Any]:
    """Return a parser of integers from ``smallest`` up."""

    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise ValueError(text)
        return value

    return argument(parse, f"an integer from {smallest} up")
