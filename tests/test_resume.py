"""An interrupted conversion goes on where it was: stopped before, in and after every stage, the bytes are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import TINY
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf import Options, Output, Run, VerifyOptions, convert
from nsds_gguf.calibration import generated_text, random_tokens
from nsds_gguf.calibration.kinds import CALIBRATIONS
from nsds_gguf.compute.layers import Layer
from nsds_gguf.compute.numpy_backend import NumpyBackend, NumpyLayer, NumpyOutput
from nsds_gguf.errors import OutputError
from nsds_gguf.metrics import nsds
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
    assert not {"generate text", "find sensitivities", "find Hessians"} & again.stages.keys()
    assert "Kept from the interrupted run: generated text." in again.said


# --- layer by layer ---------------------------------------------------------------------------------------------------

THREE = replace(TINY, n_layers=3)
FEW = replace(GPTQ, types=("Q4_K", "Q8_0"))


def number(view: Layer) -> int | None:
    return next(iter(view.tensors.values())).layer


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of what the pass computes: embedding, layers and output, forward and backward, in batches."""
    calls: list[str] = []

    def counted(kind: type, method: str, label: Callable[[Any], str]) -> None:
        original = getattr(kind, method)

        def call(self: Any, *arguments: Any) -> Any:
            calls.append(label(self))
            return original(self, *arguments)

        monkeypatch.setattr(kind, method, call)

    counted(NumpyBackend, "embed", lambda _: "embed")
    counted(NumpyLayer, "forward", lambda layer: f"forward {number(layer._view)}")
    counted(NumpyLayer, "backward", lambda layer: f"backward {number(layer._view)}")
    counted(NumpyOutput, "forward", lambda _: "output forward")
    counted(NumpyOutput, "backward", lambda _: "output backward")
    return calls


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches of one sequence: of the two for Hessians, only the first runs backward."""
    monkeypatch.setitem(CALIBRATIONS, "random", replace(CALIBRATIONS["random"], n_sequences=lambda _model: 1))


BACK = ["output backward", "backward 2", "backward 1", "backward 0"]
OUTPUT = ["output forward"] * 2
LEFT = {  # calls of progress in the pass: what the next run computes, and what it says it has kept
    1: (["embed"] * 2 + ["forward 0"] * 2 + ["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, ""),
    2: (["embed"] * 2 + ["forward 0"] * 2 + ["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, ""),
    3: (["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, "1 of 3 layers of the forward pass; 2 left"),
    4: (["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, "1 of 3 layers of the forward pass; 2 left"),
    6: (["forward 2"] * 2 + OUTPUT + BACK, "2 of 3 layers of the forward pass; 1 left"),
    7: (OUTPUT + BACK, "3 of 3 layers of the forward pass; 0 left"),
    9: (BACK, "3 of 3 layers of the forward pass; 0 left"),
    10: (BACK[1:], "3 of 3 layers of the forward pass; 0 left"),
    11: (BACK[2:], "1 of 3 layers of the backward pass; 2 left"),
    13: ([], "3 of 3 layers of the backward pass; 0 left"),
}


@pytest.mark.usefixtures("batches")
def test_the_pass_goes_on_at_the_layer_where_it_stopped(tmp_path: Path, layers: list[str]) -> None:
    source = write_tiny(tmp_path / "model", THREE)
    whole = Stopping()
    wanted = run(source, tmp_path / "whole", FEW, whole)
    assert layers == LEFT[1][0] and whole.stages["find sensitivities"] == 13
    assert not any("Kept" in said for said in whole.said)
    for after, (left, kept) in LEFT.items():
        folder = tmp_path / f"stopped-{after}"
        with pytest.raises(KeyboardInterrupt):
            run(source, folder, FEW, Stopping("find sensitivities", after))
        layers.clear()
        again = Stopping()
        assert run(source, folder, FEW, again) == wanted, after
        assert (after, layers) == (after, left)
        assert not kept or f"Kept from the interrupted run: {kept}." in again.said
        assert kept or not any("pass" in said for said in again.said)


@pytest.mark.usefixtures("batches")
def test_a_pass_that_is_stopped_at_every_layer_ends(tmp_path: Path, layers: list[str]) -> None:
    source = write_tiny(tmp_path / "model", THREE)
    wanted = run(source, tmp_path / "whole", FEW, Stopping())
    layers.clear()
    for _ in range(7):  # three layers and the output forward; the output with a layer, and two layers backward
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", FEW, Stopping("find sensitivities", 3))
    assert run(source, tmp_path / "out", FEW, Stopping()) == wanted and layers == LEFT[1][0]


DAMAGED = {  # part of a file's name, and what is computed again
    "sums_of_layer_1": (["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, "the pass over tokens"),
    "before_layer_2": (["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, "the pass over tokens"),
    "Hessians+blk.1.attn_output": (["forward 1"] * 2 + ["forward 2"] * 2 + OUTPUT + BACK, "Hessians"),
}


@pytest.mark.parametrize("part", DAMAGED)
def test_damage_to_a_pass_is_told_and_computed_again(
    tmp_path: Path, layers: list[str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a single batch, whose streams before every layer are kept."""
    monkeypatch.setitem(CALIBRATIONS, "random", replace(CALIBRATIONS["random"], n_sequences=lambda _model: 2))
    source = write_tiny(tmp_path / "model", THREE)
    wanted, folder = run(source, tmp_path / "whole", FEW, Stopping()), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, Stopping("find sensitivities", 4))
    damage(folder, part)
    layers.clear()
    again = Stopping()
    assert run(source, folder, FEW, again) == wanted
    left, name = DAMAGED[part]
    assert layers == list(dict.fromkeys(left))
    assert f"Recomputed: the record of {name} is damaged." in again.said


@pytest.mark.usefixtures("batches")
def test_lost_streams_of_later_batches_restart_the_pass(tmp_path: Path, layers: list[str]) -> None:
    source = write_tiny(tmp_path / "model", THREE)
    wanted, folder = run(source, tmp_path / "whole", FEW, Stopping()), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, Stopping("find sensitivities", 5))
    damage(folder, "stream_of_batch_1_before_layer_2")
    layers.clear()
    assert run(source, folder, FEW, Stopping()) == wanted and layers == LEFT[1][0]


def damage(folder: Path, part: str) -> None:
    """Flip a bit of the payload of a record."""
    found = [path for path in folder.glob(f".nsds-gguf-*/records/*{part}*") if path.suffix != ".record"]
    assert len(found) == 1, found
    data = bytearray(found[0].read_bytes())
    data[len(data) // 2] ^= 1
    found[0].write_bytes(data)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_factoring_goes_on_without_another_pass(tmp_path: Path, layers: list[str], after: int) -> None:
    """Every input is factored once, and its Hessian goes when its factors are there."""
    source = write_tiny(tmp_path / "model", TINY)
    wanted, folder = run(source, tmp_path / "whole", FEW, Stopping()), tmp_path / "out"
    n_inputs = 9  # q, k and v; output; gate and up; down of two layers; the output
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, Stopping("factor Hessians", after))
    kept = n_records(folder, "Hessian_factors+")
    assert kept == after - 1 and n_records(folder, "Hessians+") == n_inputs - kept + 1  # and the list of inputs
    layers.clear()
    again = Stopping("measure tensors", 1)
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, again)
    assert layers == [] and "find Hessians" not in again.stages
    assert again.stages["factor Hessians"] == 2 + n_inputs - kept  # the first and the last call count no input
    told = f"Kept from the interrupted run: {kept} of {n_inputs} Hessian factors; {n_inputs - kept} left."
    assert (told in again.said) == (kept > 0)
    assert n_records(folder, "Hessian_factors+") == n_inputs and n_records(folder, "Hessians+") == 0
    assert run(source, folder, FEW, Stopping()) == wanted


def n_records(folder: Path, begin: str) -> int:
    return len(list(folder.glob(f".nsds-gguf-*/records/{begin}*.record")))


def test_a_damaged_hessian_alone_is_found_again(tmp_path: Path, layers: list[str]) -> None:
    source = write_tiny(tmp_path / "model", TINY)
    wanted, folder = run(source, tmp_path / "whole", FEW, Stopping()), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, Stopping("factor Hessians", 2))
    damage(folder, "Hessians+blk.1.ffn_down")
    layers.clear()
    again = Stopping()
    assert run(source, folder, FEW, again) == wanted
    assert "find Hessians" in again.stages and BACK[0] not in layers and "forward 1" in layers
    assert again.stages["factor Hessians"] == 2 + 8
    assert "Recomputed: the record of Hessians is damaged." in again.said


def test_records_of_the_pass_go_when_it_is_done(tmp_path: Path) -> None:
    source, folder = write_tiny(tmp_path / "model", TINY), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, Stopping("find sensitivities", 3))
    assert n_records(folder, "the_pass_over_tokens+")
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, FEW, Stopping("factor Hessians", 1))
    assert n_records(folder, "the_pass_over_tokens+") == 0


def test_layers_that_are_scored_are_not_scored_again(tmp_path: Path) -> None:
    source, folder = write_tiny(tmp_path / "model", THREE), tmp_path / "out"
    wanted = run(source, tmp_path / "whole", RTN, Stopping())
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, RTN, Stopping("score layers (nsds)", 3))
    damage_head(folder, "scored_layers+1")
    scored: list[int | None] = []
    again = Stopping()
    with pytest.MonkeyPatch.context() as patch:
        original = nsds.layer_components

        def counted(view: Layer, *rest: Any) -> dict[str, nsds.Sensitivity]:
            scored.append(number(view))
            return original(view, *rest)

        patch.setattr(nsds, "layer_components", counted)
        assert run(source, folder, RTN, again) == wanted
    assert scored == [1, 2]
    assert "Kept from the interrupted run: 1 of 3 scored layers; 2 left." in again.said
    assert "Recomputed: the record of scored layers is damaged." in again.said


def damage_head(folder: Path, part: str) -> None:
    """Cut the head of a record short."""
    (head,) = folder.glob(f".nsds-gguf-*/records/*{part}*.record")
    head.write_bytes(head.read_bytes()[:-9])


def test_what_is_kept_and_what_is_left_is_told(tmp_path: Path) -> None:
    source, folder = write_tiny(tmp_path / "model", TINY), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, RTN, Stopping("measure tensors", 4))
    measured = Stopping("quantize and write", 3)
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, RTN, measured)
    for kept in ("layer scores.", "sensitivities on random tokens.", "3 of 16 measured tensors; 13 left."):
        assert f"Kept from the interrupted run: {kept}" in measured.said
    written = Stopping()
    run(source, folder, RTN, written)
    assert any(said.endswith(" tensors of the file; 18 left.") for said in written.said), written.said


# --- other runs -------------------------------------------------------------------------------------------------------


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
