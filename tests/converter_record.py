"""What is compared of our GGUFs with those of llama.cpp's converter, and the record of the latter.

``tools/check_converter.py`` runs the converter and writes the record, which ``test_converter.py`` holds our output to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import SPECS, write_tiny

from nsds_gguf import read
from nsds_gguf.convert import reference_plan
from nsds_gguf.gguf_header import read_gguf_header
from nsds_gguf.write import write_gguf

GOLDEN = Path(__file__).parent / "golden" / "converter.json"
TRAINED = Path(__file__).parent.parent / "examples" / "books-4.6m"

OURS = "nsds_gguf."  # keys that say where a file comes from
ABSENT = "absent"

_DIGEST_LETTERS = 12  # of SHA-256: 48 bits
_LONG = 64  # letters of a value that the record keeps as it is
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_FACTOR_ERROR = 1e-6  # relative: two ways to compute them in single precision


@dataclass(frozen=True)
class Entry:
    """What is compared of a file: a line per tensor and per key, and rope factors, which are computed, as numbers."""

    tensors: Mapping[str, str]
    keys: Mapping[str, str]
    factors: Mapping[str, list[float]]


def names() -> list[str]:
    """Return the names of the models that are compared: the tiny ones, and one that was trained."""
    return [*SPECS, TRAINED.name]


def write_folder(folder: Path, name: str) -> Path:
    """Write the folder of a model, unless it is there already, and return it."""
    return TRAINED if name == TRAINED.name else write_tiny(folder, SPECS[name])


def convert_ours(folder: Path, path: Path) -> Path:
    """Write our GGUF at the precision of the folder and return its path."""
    model = read.open_model(folder)
    write_gguf(model, reference_plan(model), {}, path, n_threads=1)
    return path


def read_entry(path: Path) -> Entry:
    """Return what is compared of a file."""
    header = read_gguf_header(path)
    data = np.memmap(path, np.uint8, "r")
    tensors, factors = {}, {}
    for t in header.tensors:
        raw = data[t.offset : t.offset + t.n_bytes].tobytes()
        content = "factors" if t.name in _FACTORS else _digest(raw)
        tensors[t.name] = f"{t.type} {list(t.shape)} {content}"
        if t.name in _FACTORS:
            factors[t.name] = np.frombuffer(raw, "<f4").tolist()
    keys = {}
    for key, entry in header.metadata.items():
        kind = entry.type.name if entry.sub_type is None else f"{entry.type.name} of {entry.sub_type.name}"
        keys[key] = f"{kind} {json.dumps(entry.value)}"
    return Entry(tensors, keys, factors)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_LETTERS]


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return name, ours and theirs of all that differs."""
    found = [(name, ours.get(name, ABSENT), theirs.get(name, ABSENT)) for name in dict.fromkeys([*theirs, *ours])]
    return [(name, a, b) for name, a, b in found if a != b]


def tensor_differences(ours: Entry, theirs: Entry) -> list[tuple[str, str, str]]:
    """Return name, ours and theirs of all tensors that differ."""
    found = differences(ours.tensors, theirs.tensors)
    for name in sorted(ours.factors.keys() & theirs.factors.keys()):
        a, b = ours.factors[name], theirs.factors[name]
        if len(a) != len(b) or not np.allclose(a, b, rtol=_FACTOR_ERROR, atol=0):
            found.append((name, str(a), str(b)))
    return found


def short(value: str) -> str:
    """Return a value for the record: as it is, or its beginning and digest."""
    return value if len(value) <= _LONG else f"{value[:_LONG]}… {_digest(value.encode())}"


def to_record(entry: Entry, own: Mapping[str, str]) -> dict[str, Any]:
    """Return what the record keeps of a file of the converter; ``own`` are our values where others are allowed."""
    return {
        "tensors": dict(entry.tensors),
        "factors": dict(entry.factors),
        "keys": {key: short(value) for key, value in entry.keys.items()},
        "own": {key: short(value) for key, value in own.items()},
    }
