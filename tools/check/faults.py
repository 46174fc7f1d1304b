"""Faults, counted: conversions that are killed, run out of disk or memory, lose their input or meet another run.

Every run is the command line in a process of its own, on a small model that passes through all stages; text that it
writes itself is 512 tokens, so that hundreds of runs take minutes. What is wrong is listed, and makes the exit code 1.

    python tools/check/faults.py --kills 200 --seed 1 --json faults.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

PROGRAM = """
import resource, sys
try:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < 400 << 20:  # where the program does not import more either
        raise MemoryError
    from nsds_gguf.calibration import generated_text
    generated_text.N_TOKENS = 512
except KeyboardInterrupt:
    sys.exit(130)
except (MemoryError, ImportError, OSError) as error:  # the program itself says what it is
    if isinstance(error.__context__, KeyboardInterrupt):
        sys.exit(130)
from nsds_gguf.cli import main
sys.exit(main())
"""
OPTIONS = ("--target-bpw", "4", "--rounding", "gptq", "--ctx-size", "64", "--chunks", "2", "--threads", "1",
           "-o", "out.gguf")  # fmt: skip
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SECTIONS = ("kills", "signals", "disk", "memory", "inputs", "places", "pairs")
KILLS_A_RUN = 10  # then one is left to end
ALLOWED_S = 1.0  # from a signal to the end
TIME_LIMIT_S = 120
KEPT = ["lock", "records"]  # of an interrupted run

Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, standard error, seconds from the signal to the end."""

    code: int
    err: str
    waited_s: float = 0.0


@dataclass
class Section:
    """What came out of one kind of fault: how often each outcome, and what should not have been."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, outcome: str, problem: str = "") -> None:
        """Count a try."""
        self.tried += 1
        self.outcomes[outcome] += 1
        if problem:
            self.wrong.append(problem)


class Bench:
    """A model, a folder to write in, and the bytes of an undisturbed run."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Make the model and convert it once."""
        from tiny_models import Spec, write_tiny

        self.random = random.Random(seed)
        self.model = write_tiny(folder / "model", Spec("LlamaForCausalLM", n_embd=256, n_ff=256, dtype="F16"))
        self.work = folder / "work"
        self.work.mkdir()
        self.seconds = 0.0
        self.whole = b""
        found = self.end(self.start())
        if found.code:
            raise SystemExit(f"the undisturbed run fails: {found.err}")
        self.whole = self.output.read_bytes()
        self.output.unlink()

    @property
    def output(self) -> Path:
        """The file that runs write."""
        return self.work / "out.gguf"

    def start(self, model: Path | None = None, options: tuple[str, ...] = OPTIONS, **limits: int) -> Process:
        """Start a run; ``limits`` are those of ``resource``, by name without RLIMIT."""

        def limit() -> None:
            for number in (signal.SIGINT, signal.SIGHUP):  # which a shell's background and nohup ignore
                signal.signal(number, signal.SIG_DFL)
            for name, value in limits.items():
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

        command = [sys.executable, "-c", PROGRAM, "convert", str(model or self.model), *options]
        return subprocess.Popen(
            command, cwd=self.work, env=ENVIRONMENT, preexec_fn=limit,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, process: Process, number: int | None = None, after_s: float = 0.0) -> Outcome:
        """Wait for the end of a run, with a signal on the way; an undisturbed run tells how long one takes."""
        began = time.perf_counter()
        if number is not None:
            try:
                err = process.communicate(timeout=after_s)[1]
                return Outcome(process.returncode, err)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        sent = time.perf_counter()
        try:
            err = process.communicate(timeout=TIME_LIMIT_S)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            return Outcome(-999, process.communicate()[1], TIME_LIMIT_S)
        now = time.perf_counter()
        if number is None and process.returncode == 0:
            self.seconds = now - began
        return Outcome(process.returncode, err, now - sent)

    def moment(self) -> float:
        """Return a moment of a run, in seconds from its start."""
        return self.random.uniform(0.0, self.seconds)

    def state(self, err: str = "") -> str:
        """Return what is wrong with the folder: a partial output, or temporary files; empty when nothing is.

        Records may be there where the run's last line ``err`` says so, but nothing beside them.
        """
        if self.output.exists() and self.output.read_bytes() != self.whole:
            return "a partial or different file under the final name"
        kept = [
            path
            for path in self.work.iterdir()
            if path.name in err and sorted(entry.name for entry in path.iterdir()) == KEPT
        ]
        others = [path.name for path in self.work.iterdir() if path not in (self.output, *kept)]
        return f"left: {', '.join(others)}" if others else ""

    def clear(self) -> None:
        """Empty the folder."""
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def judged(section: Section, bench: Bench, found: Outcome, expected: tuple[int, ...], what: str) -> None:
    """Count a run that should end with one line and nothing left, or well with the whole file."""
    lines = [line for line in found.err.splitlines() if line]
    problem = bench.state(found.err if found.code else "")
    if found.code == 0:
        problem = problem or ("" if bench.output.exists() else "no output")
    elif found.code not in expected:
        problem = f"exit code {found.code}: {found.err[-300:]!r}"
    elif bench.output.exists():
        problem = "an output in spite of the error"
    elif len(lines) != 1 or not lines[0].startswith("error: "):
        problem = f"not one line: {found.err[-300:]!r}"
    section.add("ended well" if found.code == 0 else f"exit code {found.code}", problem and f"{what}: {problem}")
    bench.clear()


def kills(bench: Bench, count: int) -> Section:
    """Kill runs at random moments: nothing partial, and the next run leaves nothing but its file."""
    section = Section()
    for i in range(count):
        found = bench.end(bench.start(), signal.SIGKILL, bench.moment())
        is_partial = bench.output.exists() and bench.output.read_bytes() != bench.whole
        section.add("killed" if found.code == -signal.SIGKILL else "had ended", "partial output" if is_partial else "")
        bench.output.unlink(missing_ok=True)
        if i % KILLS_A_RUN == KILLS_A_RUN - 1 or i == count - 1:
            section.outcomes["work folders left by kills"] += len(list(bench.work.iterdir()))
            found = bench.end(bench.start())
            problem = bench.state() if found.code == 0 else found.err
            section.outcomes["next runs"] += 1
            section.wrong += [f"next run after kill {i}: {problem}"] if problem else []
            bench.clear()
    return section


def signals(bench: Bench, count: int) -> Section:
    """Send other signals at random moments: one line, the shell's exit code, within a second, nothing left."""
    section = Section()
    for i in range(count):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[i % 3]
        found = bench.end(bench.start(), number, bench.moment())
        section.longest_s = max(section.longest_s, found.waited_s)
        name, problem = number.name, bench.state(found.err if found.code else "")
        if found.code in (-number, 130) and not found.err.strip():
            section.add(f"{name} before the program began", problem)
        elif found.code == 0:
            section.add("had ended", problem)
        else:
            ends = ("no unfinished file is left", "the same command goes on from there")
            line = found.err.strip()
            if found.code != 128 + number or not (
                line.startswith(f"error: stopped by {name}; ") and line.endswith(ends)
            ):
                problem = problem or f"{name}: exit code {found.code}: {found.err[-300:]!r}"
            if found.waited_s > ALLOWED_S:
                problem = problem or f"{name}: took {found.waited_s:.2f} s"
            section.add(name, problem)
        bench.clear()
    return section


def disk(bench: Bench, count: int) -> Section:
    """Limit the size of files, then that of the file system: exit code 5, one line, nothing left."""
    section = Section()
    largest = 4 << 20
    for i in range(count):
        n_bytes = round(largest * (i / count) ** 3)
        found = bench.end(bench.start(FSIZE=n_bytes))
        judged(section, bench, found, (5,), f"files of at most {n_bytes} bytes")
    for kib in (16, 64, 256, 1024, 1500, 2048, 3072, 4096, 6144, 8192, 16384):
        with small_disk(bench.work, kib) as is_mounted:
            if not is_mounted:
                section.outcomes["no tmpfs could be mounted"] += 1
                break
            judged(section, bench, bench.end(bench.start()), (5,), f"a disk of {kib} KiB")
    return section


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """Mount a file system of a size on the folder, where that is allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", folder], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)


def memory(bench: Bench, count: int) -> Section:
    """Limit the address space: one line, no traceback, nothing left."""
    section = Section()
    for i in range(count):
        n_bytes = (80 << 20) + i * (2 << 30) // count
        found = bench.end(bench.start(AS=n_bytes))
        judged(section, bench, found, (5, 8), f"{n_bytes >> 20} MiB of address space")
    return section


def inputs(bench: Bench, count: int) -> Section:
    """Shrink, change or remove weights at a random moment, of a folder and of a GGUF: refused, or the same bytes."""
    section = Section()
    shutil.copytree(bench.model, bench.model.with_name("kept"))
    whole_folder, gguf = bench.whole, bench.model.with_name("whole.gguf")
    plain = ("--uniform", "F16", "--rounding", "rtn", "--no-verify", "-o", str(gguf))
    if bench.end(bench.start(options=plain)).code:
        raise SystemExit("no GGUF could be made")
    moving = bench.model.with_name("moving.gguf")
    shutil.copy(gguf, moving)
    bench.end(bench.start(moving))
    whole_gguf = bench.output.read_bytes()
    bench.clear()
    for i in range(count):
        is_gguf = i % 2 == 1
        weights = moving if is_gguf else bench.model / "model.safetensors"
        original = gguf if is_gguf else bench.model.with_name("kept") / "model.safetensors"
        bench.whole = whole_gguf if is_gguf else whole_folder
        name, change = CHANGES[i // 2 % len(CHANGES)]
        process = bench.start(moving if is_gguf else None)
        while process.poll() is None and not any(bench.work.iterdir()):  # until the model is open
            time.sleep(0.01)
        time.sleep(bench.moment() / 2)
        change(weights)
        found = bench.end(process)
        judged(section, bench, found, (3, 8) if is_gguf else (3,), f"{weights.name} {name}")
        shutil.copy(original, weights)
    bench.whole = whole_folder
    return section


def _half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _other_bytes(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(4096))


CHANGES: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("cut in half", _half),
    ("with other bytes", _other_bytes),
    ("removed", Path.unlink),
)


def places(bench: Bench, _count: int) -> Section:
    """Ask for outputs that cannot be: each is refused for its true reason."""
    section = Section()
    (bench.model.parent / "there").mkdir(exist_ok=True)
    cases = {
        "no/out.gguf": "no such folder",
        "x" * 251 + ".gguf": "File name too long",
        "link.gguf": "is a link to a file that is missing",
        "file/out.gguf": "is a file; wanted a folder",
        "text.gguf": "exists and is no GGUF file",
        "/proc/out.gguf": "cannot be written",
        "/dev/null": "exists and is no GGUF file",
    }
    for name, wanted in cases.items():
        (bench.work / "file").write_text("a file")
        (bench.work / "text.gguf").write_text("a text")
        (bench.work / "link.gguf").symlink_to("nowhere")
        before = sorted(bench.work.iterdir())
        found = bench.end(bench.start(options=(*OPTIONS[:-1], name)))
        is_true = found.code == 5 and wanted in found.err and found.err.count("\n") == 1
        left = sorted(bench.work.iterdir()) == before
        section.add(f"exit code {found.code}", "" if is_true and left else f"{name}: {found.code} {found.err!r}")
        bench.clear()
    for after in (0.0, 0.1, 0.2, 0.3):
        process = bench.start()
        while process.poll() is None and not any(bench.work.iterdir()):  # until the run has its work folder
            time.sleep(0.01)
        time.sleep(after * bench.seconds)
        moved = bench.work.with_name("moved")
        while bench.work.exists():  # the run may be removing its files too
            shutil.rmtree(bench.work, ignore_errors=True)
        found = bench.end(process)
        bench.work.mkdir()
        is_true = found.code == 5 and "disappeared while the run wrote there" in found.err
        section.add(f"folder removed: exit code {found.code}", "" if is_true else f"folder removed: {found}")
        shutil.rmtree(moved, ignore_errors=True)
    return section


def pairs(bench: Bench, count: int) -> Section:
    """Start two runs to one output together: one writes it, the other is refused."""
    section = Section()
    for _ in range(count):
        processes = [bench.start(), bench.start()]
        first, second = (bench.end(process) for process in processes)
        refused = [found for found in (first, second) if found.code == 5 and "is writing it" in found.err]
        problem = bench.state()
        if len(refused) != 1 or {first.code, second.code} != {0, 5}:
            problem = f"{first} {second}"
        section.add("one wrote, one was refused" if not problem else "other", problem)
        bench.clear()
    return section


def main() -> int:
    """Run the sections and tell what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, of " + ",".join(SECTIONS))
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs")
    parser.add_argument("--signals", type=int, default=60, help="other signals")
    parser.add_argument("--limits", type=int, default=24, help="limits of disk, and of memory")
    parser.add_argument("--changes", type=int, default=24, help="changes of the input")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    told = parser.parse_args()
    counts = {
        "kills": told.kills, "signals": told.signals, "disk": told.limits, "memory": told.limits,
        "inputs": told.changes, "places": 0, "pairs": told.pairs,
    }  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), told.seed)
        for section in told.only.split(","):
            result = globals()[section](bench, counts[section])
            found[section] = {"tried": result.tried, "outcomes": dict(result.outcomes), "wrong": result.wrong}
            if result.longest_s:
                found[section]["longest_s"] = round(result.longest_s, 2)
            print(section, json.dumps(found[section], indent=1), flush=True)
    if told.json is not None:
        told.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(section["wrong"] for section in found.values()))


if __name__ == "__main__":
    sys.exit(main())
