"""Mutated inputs of every kind, each taken through the program: none may end in a traceback, a hang or a file.

    python tools/check/fuzz.py --n 100000 --seed 1 --json fuzz.json

Inputs are those of ``tests/tiny_models.py`` and its kin with one file mutated (``fuzz_inputs``, ``fuzz_mutations``). A
worker process takes them one after the other; every one must be accepted or end in an ``NsdsError``. One in
``CONVERTED`` of those accepted is converted whole, one in ``VERIFIED`` of them with the perplexity check. Found are:

* ``traceback``: any other exception, ``MemoryError`` for more than 1 GiB of address space included;
* ``hang``: more than 10 s (a conversion: 60 s), ``crash``: the worker's death;
* ``memory``: a peak above 1 GiB; ``file``: anything left in the input's folder, the working or the temporary directory.

The inputs of findings are kept beside the JSON file. ``--only N`` runs one input, as it is numbered, and shows its
traceback. Exit code 1 on any finding.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

CONVERTED, VERIFIED = 60, 4
MAX_SECONDS, MAX_CONVERT_SECONDS = 10, 60
MAX_BYTES = 1 << 30
_AFTER_WARNING = 120  # seconds without a word from the worker that its own alarm should have ended


# --- the worker -------------------------------------------------------------------------------------------------------


class Worker:
    """Runs inputs by number and tells the parent of each: when it begins, and what came of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        import fuzz_inputs

        self.inputs, self.seed, self.folder = fuzz_inputs, seed, folder
        self.out, self.work, self.temporary = (folder / name for name in ("out", "work", "tmp"))
        for path in (self.out, self.work, self.temporary):
            path.mkdir(exist_ok=True)
        os.chdir(self.work)
        tempfile.tempdir = str(self.temporary)
        self.fuzzed = fuzz_inputs.make_inputs(folder / "inputs", self.out / "keys.gguf")
        self.kinds = [kind for kind, weight in fuzz_inputs.WEIGHTS.items() for _ in range(weight)]
        self.known = {target.file.parent: self._names(target.file.parent) | {target.file.name}
                      for targets in self.fuzzed.values() for target in targets}  # fmt: skip
        self._warm_up()

    def _names(self, folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()}

    def _warm_up(self) -> None:
        """Convert a whole input, so that what is loaded once is loaded, then limit memory to 1 GiB more."""
        target = self.fuzzed["safetensors header"][0]
        self.inputs.convert(target, self.out, verify=True)
        for path in self.out.iterdir():
            path.unlink()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))

    def choose(self, number: int) -> tuple[Any, bytes]:
        """Return the target and the mutated input of a number."""
        rng = Random(f"{self.seed}/{number}")
        target = rng.choice(self.fuzzed[self.kinds[number % len(self.kinds)]])
        return target, target.mutate(rng)

    def run(self, number: int) -> dict[str, Any]:
        """Take one input through the program and return what came of it."""
        target, data = self.choose(number)
        target.file.write_bytes(data)
        result = {"n": number, "kind": target.kind, **self._guarded(target.use, MAX_SECONDS)}
        if result["outcome"] == "accepted" and target.model is not None:
            draw = Random(f"{self.seed}/{number}/convert").randrange(CONVERTED * VERIFIED)
            if draw % CONVERTED == 0:
                converted = self._guarded(
                    lambda: self.inputs.convert(target, self.out, verify=draw == 0), MAX_CONVERT_SECONDS
                )
                result["converted"] = converted["outcome"] + (" verified" if draw == 0 else "")
                if converted["outcome"] == "finding":
                    result |= converted
                for path in self.out.glob("*.gguf"):
                    path.unlink()
        result |= self._left(target.file.parent, result)
        return result

    def _guarded(self, call: Any, seconds: int) -> dict[str, Any]:
        from nsds_gguf.errors import NsdsError

        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            call()
        except NsdsError as error:
            return {"outcome": "refused", "error": type(error).__name__, "message": str(error)[:300]}
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "nsds_gguf" in f.filename] or [None]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].name}:{frames[-1].lineno}" if frames[-1] else "?"
            text = traceback.format_exc()
            return {"outcome": "finding", "what": "traceback", "type": type(error).__name__, "where": where,
                    "message": str(error)[:300], "traceback": text[-3000:]}  # fmt: skip
        finally:
            faulthandler.cancel_dump_traceback_later()
        return {"outcome": "accepted"}

    def _left(self, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
        """Return a finding where a file was left or memory went too high."""
        if result["outcome"] == "finding":
            result["stop"] = result.get("type") == "MemoryError"  # the peak stays
            for path in (*self.out.iterdir(), *self.work.iterdir(), *self.temporary.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return {}
        left = self._names(folder) - self.known[folder]
        left |= set().union(*(self._names(path) for path in (self.out, self.work, self.temporary)))
        if left:
            return {"outcome": "finding", "what": "file", "where": sorted(left)[0], "message": str(sorted(left))}
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MAX_BYTES:
            return {"outcome": "finding", "what": "memory", "where": "?", "message": "more than 1 GiB", "stop": True}
        return {}


def work(options: argparse.Namespace) -> None:
    """Run the numbers that the command line says, one line of JSON before and after each."""
    pipe = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may print
    worker = Worker(Path(options.worker), options.seed)

    def tell(line: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(line).encode() + b"\n")

    tell({"ready": True})
    for number in range(options.start, options.n):
        tell({"begin": number})
        result = worker.run(number)
        tell(result)
        if result.get("stop"):
            os._exit(3)
    os._exit(0)


# --- the parent -------------------------------------------------------------------------------------------------------


class Campaign:
    """Counts what workers tell, and starts another where one died."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counts: dict[str, Counter[str]] = {}
        self.findings: dict[tuple[str, ...], dict[str, Any]] = {}
        self.started = time.monotonic()
        self.done, self.slowest = 0, 0.0

    def run(self) -> int:
        """Run all inputs and return how many findings there are."""
        start = self.options.start
        while start < self.options.n:
            start = self._one_worker(start)
        self._report()
        return len(self.findings)

    def _one_worker(self, start: int) -> int:
        """Run inputs until the worker ends; return the number to go on from."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            (Path(folder) / "inputs").mkdir()
            errors = Path(folder) / "stderr"
            command = [sys.executable, __file__, "--worker", folder, "--seed", str(self.options.seed),
                       "--start", str(start), "--n", str(self.options.n)]  # fmt: skip
            with errors.open("wb") as stderr:
                worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
            current: int | None = None
            ready = False
            signal.alarm(_AFTER_WARNING)
            for line in worker.stdout or ():
                signal.alarm(_AFTER_WARNING)
                told = json.loads(line)
                if "begin" in told:
                    current, began = told["begin"], time.monotonic()
                elif "ready" in told:
                    ready = True
                else:
                    self._count(told)
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    current = None
            signal.alarm(0)
            code = worker.wait()
            said = errors.read_text(errors="replace")
            if not ready:
                raise SystemExit(f"the worker did not start ({code}):\n{said[-3000:]}")
            if code == 0:
                return int(self.options.n)
            if current is not None:
                what = "hang" if "Timeout" in said else "crash"
                where = next((row.strip() for row in said.splitlines() if "/nsds_gguf/" in row), said[-200:])
                self._count({"n": current, "kind": "?", "outcome": "finding", "what": what, "where": where,
                             "message": f"exit code {code}", "traceback": said[-3000:]})  # fmt: skip
                return current + 1
            return self.last + 1

    def _count(self, result: dict[str, Any]) -> None:
        self.last = result["n"]
        self.done += 1
        counts = self.counts.setdefault(result["kind"], Counter())
        counts["inputs"] += 1
        counts[result["outcome"]] += 1
        if "converted" in result:
            counts["converted"] += 1
            counts[f"converted: {result['converted']}"] += 1
        if result["outcome"] == "finding":
            key = (result["what"], result.get("type", ""), result["where"])
            if key not in self.findings:
                print(f"\nfound: {result['n']} {result['kind']}: {' '.join(key)}: {result['message'][:99]}", flush=True)
            self.findings.setdefault(key, {**result, "times": 0})["times"] += 1
        if self.done % 2000 == 0:
            seconds = time.monotonic() - self.started
            print(f"{self.done} of {self.options.n - self.options.start} inputs, {seconds:.0f} s, "
                  f"{len(self.findings)} findings", flush=True)  # fmt: skip

    def _report(self) -> None:
        seconds = time.monotonic() - self.started
        print("| input | tried | accepted | refused | converted | of these verified | found |")
        print("|---|---|---|---|---|---|---|")
        for kind, counts in sorted(self.counts.items()):
            verified = sum(n for name, n in counts.items() if name.endswith(" verified"))
            print(f"| {kind} | {counts['inputs']} | {counts['accepted']} | {counts['refused']} | "
                  f"{counts['converted']} | {verified} | {counts['finding']} |")  # fmt: skip
        print(f"{self.done} inputs, seed {self.options.seed}, {seconds:.0f} s, slowest {self.slowest:.1f} s, "
              f"{len(self.findings)} findings")  # fmt: skip
        if self.options.json is not None:
            found = {"seed": self.options.seed, "inputs": self.done, "seconds": round(seconds), "counts": self.counts,
                     "slowest_seconds": round(self.slowest, 1), "findings": list(self.findings.values())}  # fmt: skip
            self.options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_one(options: argparse.Namespace) -> int:
    """Run one input, keep it, and print its traceback."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        (Path(folder) / "inputs").mkdir()
        worker = Worker(Path(folder), options.seed)
        target, data = worker.choose(options.only)
        kept = Path(options.keep or tempfile.gettempdir()).resolve() if options.keep else None
        result = worker.run(options.only)
        print(result.pop("traceback", ""))
        print(json.dumps(result, indent=1))
        print(f"{target.file.name}: {data[:2000]!r}")
        if kept is not None:
            shutil.copytree(target.file.parent, kept, dirs_exist_ok=True)
    return int(result["outcome"] == "finding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="inputs")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write counts and findings to this file")
    parser.add_argument("--only", type=int, metavar="N", help="run input N alone and show what happens")
    parser.add_argument("--keep", help="with --only: copy the folder of the input here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if options.worker:
        work(options)
    if options.only is not None:
        return run_one(options)
    return int(Campaign(options).run() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
