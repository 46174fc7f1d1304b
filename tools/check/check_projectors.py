"""Compare our projector files (mmproj) with those of llama.cpp's ``convert_hf_to_gguf.py --mmproj``.

    python tools/check/check_projectors.py --llama-cpp DIR [--record] [MODEL ...]

DIR is a llama.cpp source tree. A MODEL is a name in ``tests/projectors.py``, by default all, or a folder; each is
compared in all types that the converter offers. Demanded are the same tensor names, shapes, types and bytes, and the
same keys with the same types and values; ``tests/projector_record.py`` says what the converter may leave out. With
``--record`` the converter's results go, in short, to ``tests/golden/projectors.json``, which the tests hold our output
against; records of models that are not compared stay.

Needs torch and transformers (the ``dev`` extra). Exit code 1 when there is a difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from check_converter import run_converter
from converter_record import Entry, read_entry
from projector_record import GOLDEN, projector_differences, projector_ours, projector_record
from projectors import PROJECTOR_SPECS, write_projector_folder

from nsds_gguf.read.projector import PROJECTOR_TYPES


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        models = args.models or list(PROJECTOR_SPECS)
        folders = [write_projector_folder(work / m, m) if m in PROJECTOR_SPECS else Path(m) for m in models]
        cases = {f"{folder.name} {kind}": (folder.resolve(), kind) for folder in folders for kind in PROJECTOR_TYPES}
        jobs = {
            case: {
                "folder": str(folder),
                "outfile": str(work / f"{folder.name}-{kind}.theirs"),
                "outtype": kind.lower(),
                "pre": "",
                "mmproj": "yes",
            }
            for case, (folder, kind) in cases.items()
        }
        said = run_converter(jobs, args.llama_cpp)
        golden, n_faults = {}, 0
        for case, (folder, kind) in cases.items():
            faults, theirs = [f"the converter failed: {said[case]}"], None
            if said[case] is None:
                theirs = read_entry(_written(Path(jobs[case]["outfile"])))
                faults = _faults(read_entry(projector_ours(folder, work / f"{folder.name}-{kind}.ours", kind)), theirs)
                golden[case] = projector_record(theirs)
            n_faults += len(faults)
            _report(case, theirs, faults)
    if args.record and not n_faults:
        _record(golden)
    return 1 if n_faults else 0


def _report(case: str, theirs: Entry | None, faults: list[str]) -> None:
    n_tensors = 0 if theirs is None else len(theirs.tensors)
    print(f"{case:36} {n_tensors:4} tensors  {'DIFFERS' if faults else 'equal'}")
    for fault in faults:
        print(f"    {fault}")


def _record(found: Mapping[str, Any]) -> None:
    """Write the golden record; records of models that were not compared stay."""
    before = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps(dict(sorted({**before, **found}.items())), indent=0) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", metavar="DIR", type=Path, required=True)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("models", metavar="MODEL", nargs="*")
    return parser.parse_args()


def _written(path: Path) -> Path:
    """Return the file that the converter wrote: some versions put ``mmproj-`` before its name."""
    return path if path.exists() else path.with_name(f"mmproj-{path.name}")


def _faults(ours: Entry, theirs: Entry) -> list[str]:
    return [f"{name}: ours {a[:160]}, theirs {b[:160]}" for name, a, b in projector_differences(ours, theirs)]


if __name__ == "__main__":
    sys.exit(main())
