"""Compare llama.cpp's logits on our F32 GGUF with transformers' on the checkpoint, and record the latter for the tests.

    python tools/check/check_logits.py [--record] [NAME ...]

Runs the models of ``tests/zoo_specs.py``, all or those named: transformers in float32 with eager attention, llama.cpp
with an F32 cache. For each it demands that

* config.json and the names and shapes of tensors are those recorded in ``tests/golden/zoo.json``, which is what
  transformers saves; in the form of transformers 4, today's transformers reads config.json without loss;
* the largest difference is at most the spec's tolerance of the largest logit, and the argmax is the same at every
  position where the two best are further apart than that;
* attention is peaked: its mean entropy is under 60 % of the uniform one's;
* routers choose clearly: rounding does not decide between two experts;
* every error of ``tests/mutations.py`` moves llama.cpp's logits by more than 2 % of the largest;
* the recorded logits, unless they are being written, are those of this run.

Needs the ``dev`` extra. Exit code 1 when anything is off or a package is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the models, the errors and the comparison of the tests themselves

import zoo
from zoo import ZooSpec, digest, packed, write_zoo, zoo_tokens
from zoo_logits import BITE, GOLDEN, best_tokens, difference, model_logits, moves, recorded
from zoo_specs import SPECS

from nsds_gguf.errors import NsdsError
from nsds_gguf.llamacpp.llama import llama_build
from nsds_gguf.read import open_model

try:
    import torch
    import transformers
    from transformers_oracle import Forward, Saved, forward, reads_alike, saved
except ImportError as error:
    sys.exit(f"error: {error}; run: pip install 'nsds-gguf[dev]'")

MAX_ENTROPY = 0.6  # of the uniform attention's
MIN_MARGIN = 1e-4  # of a router's largest output

# transformers 4 ignores rope_parameters.
MIN_TRANSFORMERS = 5

Golden = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Outcome:
    """What came out for one model; ``entropy`` is a part of the uniform attention's, ``faults`` says what is off."""

    error: float
    entropy: float
    weakest: tuple[str, float]
    faults: tuple[str, ...]


def main() -> int:
    args = _arguments()
    if int(transformers.__version__.split(".")[0]) < MIN_TRANSFORMERS:
        print(f"error: wanted transformers {MIN_TRANSFORMERS}, got {transformers.__version__}", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of settings in the form of transformers 4
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {llama_build()}")
    entries = json.loads(zoo.GOLDEN.read_text(encoding="utf-8")) if zoo.GOLDEN.exists() else {}
    golden: Golden = dict(np.load(GOLDEN, allow_pickle=False)) if GOLDEN.exists() else {}
    n_faults = 0
    print(f"{'model':36} {'difference':>10} {'entropy':>8}  least moved by an error")
    for name in args.names or SPECS:
        try:
            outcome, entry, arrays = check(name, None if args.record else entries.get(name, {}), golden)
        except NsdsError as error:
            print(f"{name:36} WRONG: {error}")
            n_faults += 1
            continue
        n_faults += len(outcome.faults)
        what, by = outcome.weakest
        print(f"{name:36} {outcome.error:10.1e} {outcome.entropy:8.2f}  {by:6.2f} of the largest: {what}", flush=True)
        for fault in outcome.faults:
            print(f"  WRONG: {fault}")
        if args.record and not outcome.faults:
            entries[name], golden = entry, golden | arrays
    if args.record:
        _write_golden(entries, golden)
    print(f"{n_faults} faults")
    return 1 if n_faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare llama.cpp's logits on our GGUF with transformers'.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to check; default: all")
    parser.add_argument(
        "--record", action="store_true", help="write what the tests compare with, of models without a fault"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SPECS))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    return args


def _write_golden(entries: dict[str, dict], golden: Golden) -> None:
    """Write what was recorded of the models that there are, a line each in the JSON file."""
    lines = [f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in SPECS if name in entries]
    zoo.GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    kept = {key: array for key, array in sorted(golden.items()) if key.split("/")[0] in SPECS}
    np.savez_compressed(GOLDEN, **kept)
    for file in (zoo.GOLDEN, GOLDEN):
        print(f"wrote {file.relative_to(ROOT)}: {file.stat().st_size} bytes")


def check(name: str, entry: dict | None, golden: Golden) -> tuple[Outcome, dict, Golden]:
    """Check one model; returns what came out, and the entry and the arrays to record.

    ``entry`` ``None`` compares with nothing recorded.
    """
    spec, found = SPECS[name], saved(SPECS[name])
    own = {"config": found.config, "shapes": packed(found.shapes)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = write_zoo(folder / "checkpoint", spec, found.config, found.shapes)
        run = forward(spec, checkpoint, zoo_tokens(spec))
        is_read_alike = spec.form == 5 or bool(spec.stand_in) or reads_alike(spec, checkpoint)
        model = open_model(checkpoint)
        rows = model_logits(model, folder / "model.gguf", zoo_tokens(spec))
        moved = moves(model, spec, folder)
    arrays = _recorded_arrays(name, spec, found, run)
    best = arrays[f"{name}/best"]
    error = difference(rows, run.logits)
    checks = {
        f"difference above {spec.tolerance:g}": not error <= spec.tolerance,
        "another argmax": not np.array_equal(rows.argmax(axis=1)[best >= 0], best[best >= 0]),
        f"entropy above {MAX_ENTROPY} of uniform": run.entropy > MAX_ENTROPY,
        f"a router's margin of {run.margin:.1e}": run.margin < MIN_MARGIN,
        f"weights that transformers does not expect: {', '.join(run.unexpected)}": bool(run.unexpected),
        "transformers reads config.json otherwise": not is_read_alike,
        "recorded config.json or names are others": entry is not None and not _same_entry(own, entry),
        "recorded logits are others": entry is not None and not _same(arrays, golden, spec),
    }
    faults = [fault for fault, found in checks.items() if found]
    faults += [f"{what}: moves the logits by {by:.1e} only" for what, by in moved.items() if by <= BITE]
    return Outcome(error, run.entropy, min(moved.items(), key=lambda item: item[1]), tuple(faults)), own, arrays


def _recorded_arrays(name: str, spec: ZooSpec, found: Saved, run: Forward) -> Golden:
    return {
        f"{name}/digest": np.array(digest(spec, found.config, found.shapes)),
        f"{name}/logits": recorded(run.logits),
        f"{name}/largest": np.abs(run.logits).max(),
        f"{name}/best": best_tokens(run.logits, spec.tolerance),
    }


def _same_entry(own: dict, entry: dict) -> bool:
    """Return whether what transformers saves today is what was recorded, but for its version."""
    if own["shapes"] != entry.get("shapes"):
        return False
    configs = (own["config"], entry["config"])
    first, second = ({key: config[key] for key in config if key != "transformers_version"} for config in configs)
    return bool(first == second)


def _same(arrays: Golden, golden: Golden, spec: ZooSpec) -> bool:
    """Return whether recorded arrays are those of this run, but for rounding on another machine."""
    if not arrays.keys() <= golden.keys():
        return False
    logits = [key for key in arrays if key.endswith(("/logits", "/largest"))]
    exact = [key for key in arrays if key.endswith("/best")]
    return all(np.array_equal(arrays[key], golden[key]) for key in exact) and all(
        np.allclose(arrays[key], golden[key], rtol=0, atol=spec.tolerance / 10 * np.abs(golden[key]).max())
        for key in logits
    )


if __name__ == "__main__":
    sys.exit(main())
