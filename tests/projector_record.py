"""What is compared of our projector files with those of llama.cpp's converter, and the record of the latter.

``tools/check/check_projectors.py`` writes the record, which ``test_projector.py`` holds our output to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter_record import ABSENT, Entry, differences

from nsds_gguf.quantize.write import write_projector
from nsds_gguf.read.projector import open_projector
from nsds_gguf.system.workers import Threads

# Tensors that the converter may leave out, and why we do not.
OURS_ALONE = {
    "v.token_embd.img_break": "clip.cpp demands it; the converter skips the embedding where its name begins with "
    "language_model., as repositories have it",
}

GOLDEN = Path(__file__).parent / "golden" / "projectors.json"


def projector_ours(folder: Path, path: Path, type_name: str) -> Path:
    """Write our projector file and return its path."""
    write_projector(open_projector(folder, type_name), path, workers=Threads(1))
    return path


def projector_differences(ours: Entry, theirs: Entry) -> list[tuple[str, str, str]]:
    """Return name, ours and theirs of all that differs and may not."""
    found = differences(ours.tensors, theirs.tensors) + differences(ours.keys, theirs.keys)
    return [each for each in found if each[0] not in OURS_ALONE or each[2] != ABSENT]


def as_theirs(ours: Entry, record: Mapping[str, Any]) -> Entry:
    """Return our entry without the tensors that a file of the converter may lack, where it lacks them."""
    lacking = OURS_ALONE.keys() - set(record["ours_alone"])
    return replace(ours, tensors={name: line for name, line in ours.tensors.items() if name not in lacking})


def projector_record(entry: Entry) -> dict[str, Any]:
    """Return what the record keeps of a file: a digest of the line of every tensor, and the keys."""
    lines = "\n".join(f"{name} {line}" for name, line in sorted(entry.tensors.items()))
    types: dict[str, int] = {}
    for line in entry.tensors.values():
        types[line.split(" ")[0]] = types.get(line.split(" ")[0], 0) + 1
    return {
        "tensors": hashlib.sha256(lines.encode()).hexdigest(),
        "types": types,
        "ours_alone": [name for name in OURS_ALONE if name in entry.tensors],
        "keys": dict(sorted(entry.keys.items())),
    }


def golden() -> dict[str, Any]:
    """Return the record by model and type, ``gemma3 F16``."""
    entries: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return entries
