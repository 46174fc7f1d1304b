"""Running the command line: the installed command in a process of its own, or ``main`` in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tiny_models import Spec

from nsds_gguf.cli import main

COMMAND = Path(sys.executable).with_name("nsds-gguf")

# One BLAS thread: several waiting for one another on a busy machine take a minute for a second's work.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}

TINY = Spec("LlamaForCausalLM", n_embd=256, n_ff=256, dtype="F16")  # rows fit K-quants; 0.9 M weights, 286 tokens
PLAIN = ("--uniform", "Q8_0")  # no scoring
QUICK = ("--threads", "1", "--ctx-size", "32", "--chunks", "2")  # a check that takes no time

VERBS_THAT_ROUND = ("convert", "plan", "score", "compare")


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def words(arguments: tuple[object, ...], as_told: bool = False) -> list[str]:
    """Return a command line, with round-to-nearest unless a rounding or plan is named: few tests need GPTQ's text."""
    found = [str(argument) for argument in arguments]
    names_one = "--rounding" in found or "--plan" in found
    quick = not as_told and found and found[0] in VERBS_THAT_ROUND and not names_one
    return [*found, "--rounding", "rtn"] if quick else found


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start the installed command; ``options`` are those of ``Popen``."""
    defaults = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([str(COMMAND), *words(arguments)], **{**defaults, "env": ENVIRONMENT, **options})


def run(*arguments: object, **options: object) -> Outcome:
    """Run the installed command to its end."""
    process = start(*arguments, **options)
    out, err = process.communicate()
    return Outcome(process.returncode, out, err)


def call(*arguments: object, as_told: bool = False) -> Outcome:
    """Run the command line in this process; ``as_told`` leaves the rounding to it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words(arguments, as_told))
        except SystemExit as stop:  # argparse: wrong usage, --help and --version
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def message(outcome: Outcome, code: int) -> str:
    """Return the one line of a run that failed as it should: with this code, and nothing else said."""
    assert outcome.code == code, outcome
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: ") and outcome.err.endswith("\n"), outcome
    assert "Traceback" not in outcome.err and outcome.out == "", outcome
    return outcome.err.removeprefix("error: ").removesuffix("\n")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a folder, hidden ones included, with its inode and size."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): (path.lstat().st_ino, path.lstat().st_size) for path in files}
