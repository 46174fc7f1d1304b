"""An interrupted conversion goes on where it was: stopped before, in and after every stage, the bytes are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from command import TINY
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf import Options, Output, Run, VerifyOptions, convert
from nsds_gguf.calibration import generated_text, random_tokens
from nsds_gguf.errors import OutputError
from nsds_gguf.records import Progress
from nsds_gguf.session.run import Silent

UNCHECKED = VerifyOptions(enabled=False)
RTN = Options(target_bpw=6.0, rounding="rtn", score_weight=1.0)
GPTQ = Options(target_bpw=6.0, rounding="gptq", calibration="random")


class Stopping(Silent):
    """A reporter that stops the run in a stage, at its begin, behind some of its progress calls, or at its end."""

    def __init__(self, name: str = "", after: int = -1, *, at_end: bool = False, nth: int = 1) -> None:
        self.name, self.after, self.at_end, self.nth = name, after, at_end, nth
        self.stages: dict[str, int] = {}  # calls of progress by stage
        self.said: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        self.stages[name] = 0
        self.nth -= name == self.name
        if name == self.name and self.after == 0 and self.nth == 0:
            raise KeyboardInterrupt

        def progress(done: int, total: int) -> None:
            self.stages[name] += 1
            if name == self.name and self.stages[name] == self.after:
                raise KeyboardInterrupt

        yield progress
        if name == self.name and self.at_end:
            raise KeyboardInterrupt

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated_text, "N_TOKENS", 512)
    monkeypatch.setattr(random_tokens, "N_SEQUENCES_HESSIANS", 2)


def run(source: Path, folder: Path, options: Options, report: Silent, resume: bool = True) -> bytes:
    folder.mkdir(exist_ok=True)
    (result,) = convert(source, options, output=Output(folder / "a.gguf"), verifying=UNCHECKED,
                        run=Run(1, report, resume))  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["a.gguf"]
    return result.path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("options", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, options: Options) -> None:
    source = write_tiny(tmp_path / "model", TINY)
    whole = Stopping()
    wanted = run(source, tmp_path / "whole", options, whole)
    points = []
    for name, n_calls in whole.stages.items():
        if name == "read headers":
            continue
        points += [
            (name, 0, False),
            *((name, n, False) for n in sorted({min(1, n_calls), n_calls // 2, n_calls} - {0})),
        ]
        points.append((name, -1, True))
    assert len(points) > 15
    for number, (name, after, at_end) in enumerate(points):
        folder = tmp_path / f"stopped-{number}"
        with pytest.raises(KeyboardInterrupt):
            run(source, folder, options, Stopping(name, after, at_end=at_end))
        assert not list(folder.glob("*.gguf")), (name, after)
        assert run(source, folder, options, Stopping()) == wanted, (name, after, at_end)


def test_what_was_finished_is_not_computed_again(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", TINY)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, RTN, Stopping("quantize and write", 3))
    again = Stopping()
    run(source, folder, RTN, again)
    assert "find sensitivities" not in again.stages and again.stages["measure tensors"] <= 1
    assert any("Going on from" in said for said in again.said)


def test_generated_text_is_not_generated_again(tmp_path: Path) -> None:
    source = tmp_path / "narrow.gguf"
    write_tiny_gguf(source, "F32")
    options = Options(target_bpw=6.0, rounding="gptq")
    wanted = run(source, tmp_path / "whole", options, Stopping())
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, options, Stopping("factor Hessians", 1))
    again = Stopping()
    assert run(source, folder, options, again) == wanted
    assert "generate text" not in again.stages and "find Hessians" in again.stages


def test_no_resume_starts_anew(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", TINY)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, RTN, Stopping("quantize and write", 3))
    anew = Stopping()
    run(source, folder, RTN, anew, resume=False)
    assert anew.stages["find sensitivities"] and anew.stages["measure tensors"] > 1
    assert not any("Going on" in said for said in anew.said)


def test_other_options_and_damage_are_told_and_computed_again(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", TINY)
    wanted = run(source, tmp_path / "whole", RTN, Stopping())
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, RTN, Stopping("quantize and write", 3))
    (work,) = folder.glob(".nsds-gguf-*")
    for record in (work / "records").glob("sensitivities*.npz"):
        data = bytearray(record.read_bytes())
        data[len(data) // 2] ^= 1
        record.write_bytes(data)
    again = Stopping()
    assert run(source, folder, RTN, again) == wanted
    assert any("sensitivities" in said and "damaged" in said for said in again.said)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "other", RTN, Stopping("quantize and write", 3))
    other = Options(target_bpw=6.0, rounding="rtn", score_weight=1.0, seed=7)
    changed = Stopping()
    run(source, tmp_path / "other", other, changed)
    assert changed.stages["find sensitivities"] and any("other options" in said for said in changed.said)


def test_files_that_are_finished_are_not_written_again(tmp_path: Path) -> None:
    """Of several budgets; the same command is not refused for the files that it has finished itself."""
    source = write_tiny(tmp_path / "model", TINY)
    options = [replace(RTN, target_bpw=bpw) for bpw in (5.0, 6.0)]

    def both(folder: Path, report: Silent) -> dict[str, bytes]:
        convert(source, options, output=folder, verifying=UNCHECKED, run=Run(1, report))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    wanted = both(tmp_path / "whole", Stopping())
    with pytest.raises(KeyboardInterrupt):
        both(tmp_path / "out", Stopping("verify structure", 0, nth=2))
    (first,) = (tmp_path / "out").glob("*.gguf")
    before = first.stat().st_mtime_ns
    assert both(tmp_path / "out", Stopping()) == wanted and first.stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="exists already"):
        both(tmp_path / "out", Stopping())


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL of Unix")
@pytest.mark.parametrize("stage", ["measure tensors", "quantize and write"])
def test_killed_it_goes_on_too(tmp_path: Path, stage: str) -> None:
    source = write_tiny(tmp_path / "model", TINY)
    wanted = run(source, tmp_path / "whole", RTN, Stopping())
    folder = tmp_path / "out"
    folder.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from contextlib import contextmanager\n"
        "from nsds_gguf import Options, Output, Run, VerifyOptions, convert\n"
        "from nsds_gguf.session.run import Silent\n"
        "class Killing(Silent):\n"
        "    @contextmanager\n"
        "    def stage(self, name):\n"
        "        def progress(done, total):\n"
        "            if name == sys.argv[3] and done: os.kill(os.getpid(), 9)\n"
        "        yield progress\n"
        "options = Options(target_bpw=6.0, rounding='rtn', score_weight=1.0)\n"
        "convert(sys.argv[1], options, output=Output(Path(sys.argv[2])), verifying=VerifyOptions(enabled=False),"
        " run=Run(1, Killing()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, source, folder / "a.gguf", stage], env=environment)
    assert done.returncode == -signal.SIGKILL
    again = Stopping()
    assert run(source, folder, RTN, again) == wanted and "find sensitivities" not in again.stages
