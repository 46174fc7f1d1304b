"""Faults: what is left by runs that are killed, what two runs to one output do, inputs that change, signals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from command import ENVIRONMENT, PLAIN, TINY, call, message
from tiny_models import write_tiny

from nsds_gguf import convert
from nsds_gguf.cli import _is_lack_of_memory, run, signals
from nsds_gguf.errors import ModelError, NsdsError, OutputError
from nsds_gguf.quantize import write
from nsds_gguf.read import open_model
from nsds_gguf.read.spans import read_spans, row_runs
from nsds_gguf.session import outputs
from nsds_gguf.system import workfolder
from nsds_gguf.system.filestate import check_unchanged, file_states, unchanged
from nsds_gguf.system.workfolder import LOCK, WorkFolder, remove_stale


@pytest.fixture
def model(tmp_path):
    return write_tiny(tmp_path / "model", TINY)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def dead(folder, name="out.gguf", n_bytes=3 << 20):
    """Leave the work folder of a run that was killed."""
    code = (
        "import os, sys; from pathlib import Path; from nsds_gguf.workfolder import WorkFolder\n"
        "files = WorkFolder(Path(sys.argv[1]), [sys.argv[2]])\n"
        f"(files.path / 'original.gguf').write_bytes(bytes({n_bytes}))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder, name], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    (path,) = folder.glob(".nsds-gguf-*")
    assert names(path) == ["lock", "original.gguf"]
    return path


# --- the work folder -------------------------------------------------------------------------------------------------


def test_a_work_folder_is_there_for_a_block(out):
    with WorkFolder(out, ["a.gguf", "b.gguf"]) as files:
        assert names(out) == []
        (files.path / "large").write_bytes(b"data")
        assert files.path.parent == out and len(names(out)) == 2
        record = json.loads((files.path / LOCK).read_text())
        assert (record["format"], record["output"], record["pid"]) == (workfolder.FORMAT, "a.gguf", os.getpid())
    assert names(out) == []


def test_what_a_killed_run_left_is_removed_by_the_next(out):
    dead(out)
    said = []
    with WorkFolder(out, ["another.gguf"], said.append) as files:
        files.open()
        assert names(out) == [files.path.name]
    assert said == ["Removed 3.0 MiB of temporary files left by an interrupted run."]


def test_several_leftovers_are_counted_together(out):
    for i in range(3):
        (out / f"{i}").mkdir()
        dead(out / f"{i}", n_bytes=1 << 19).rename(out / f".nsds-gguf-{i}")
        (out / f"{i}").rmdir()
    assert remove_stale(out) == ["Removed 1.5 MiB of temporary files left by 3 interrupted runs."]
    assert names(out) == []


def test_a_live_run_keeps_its_files(out):
    with WorkFolder(out, ["a.gguf"]) as live:
        (live.path / "large").write_bytes(b"data")
        assert remove_stale(out) == []
        assert names(live.path) == ["large", "lock"]


def test_the_second_run_to_an_output_is_refused(out, monkeypatch):
    monkeypatch.setattr(workfolder, "_TRIES", 2)
    with WorkFolder(out, ["a.gguf"]) as first, WorkFolder(out, ["b.gguf", "a.gguf"]) as second:
        first.open()
        with pytest.raises(OutputError) as caught:
            second.open()
        assert names(out) == [first.path.name]
    host = workfolder.platform.node()
    assert str(caught.value) == (
        f"{out}/a.gguf: another run (process {os.getpid()} on {host}) is writing it; wait for that run, or choose "
        "another name"
    )


def test_what_is_not_ours_is_left_alone_and_named(out):
    (out / ".nsds-gguf-mine").mkdir()
    (out / ".nsds-gguf-mine" / "letter.txt").write_text("kept")
    (out / ".nsds-gguf-empty").mkdir()  # a run was killed between two steps
    (out / ".nsds-gguf-link").symlink_to(out / ".nsds-gguf-mine")
    with_lock = out / ".nsds-gguf-other"
    with_lock.mkdir()
    (with_lock / LOCK).write_text("not a record")
    (with_lock / "data").write_text("kept")
    assert remove_stale(out) == [
        f"{out}/.nsds-gguf-link: left alone: no folder of this user.",
        f"{out}/.nsds-gguf-mine: left alone: it holds no lock of ours.",
        f"{out}/.nsds-gguf-other: left alone: it holds no lock of ours.",
    ]
    assert names(out) == [".nsds-gguf-link", ".nsds-gguf-mine", ".nsds-gguf-other"]


@pytest.mark.parametrize(
    ("host", "boot", "is_left"), [("here", "1", False), ("there", "0", False), ("there", "1", True)]
)
def test_files_of_another_machine_are_left(out, monkeypatch, host, boot, is_left):
    """The same machine started again, a container of the same kernel, another machine on a shared file system."""
    path = dead(out)
    record = json.loads((path / LOCK).read_text())
    (path / LOCK).write_text(json.dumps({**record, "host": host, "boot": boot}))
    monkeypatch.setattr(workfolder, "_machine", lambda: {"host": "here", "boot": "0"})
    (note,) = remove_stale(out)
    assert path.exists() == is_left
    if is_left:
        assert note == f"{path}: left alone: a run on there made it; if none is going on there, remove it (3.0 MiB)."


def test_where_there_are_no_locks_runs_do_not_meet(out, monkeypatch):
    def refuse(_descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workfolder, "_try_lock", refuse)
    with WorkFolder(out, ["a.gguf"]) as first, WorkFolder(out, ["a.gguf"]) as second:
        assert first.path != second.path
        (note, _) = remove_stale(out)
        assert note.endswith(": left alone: its file system has no locks; if no run is going on, remove it.")
        assert first.path.exists() and second.path.exists()
    assert names(out) == []


def test_a_full_disk_leaves_no_lock(out, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workfolder.os, "write", refuse)
    with pytest.raises(OutputError, match=r"disk full or file too large while writing: No space left"):
        WorkFolder(out, ["a.gguf"]).open()
    assert names(out) == []


def test_a_folder_that_disappears(out):
    with pytest.raises(OutputError) as caught, WorkFolder(out, ["a.gguf"]) as files:
        workfolder.shutil.rmtree(files.path)
        raise NsdsError("what follows from it")
    assert str(caught.value) == f"{out}: the temporary files disappeared while the run wrote there: run again"


def test_all_work_folders_go_from_any_thread(out):
    with WorkFolder(out, ["a.gguf"]) as files, (files.path / "large").open("wb") as stream:
        stream.write(b"half")
        thread = threading.Thread(target=workfolder.release_all)
        thread.start()
        thread.join()
        assert names(out) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_conversion_tells_what_it_removed(model, out):
    dead(out, "a.gguf")
    outcome = call("convert", model, *PLAIN, "--no-verify", "-o", out / "b.gguf", "-v")
    assert outcome.code == 0 and names(out) == ["b.gguf"]
    assert "Removed 3.0 MiB of temporary files left by an interrupted run." in " ".join(outcome.err.split())


def test_a_bundle_folder_with_leftovers_alone_is_empty(model, out):
    dead(out, "a.gguf")
    assert call("convert", model, *PLAIN, "--no-verify", "--bundle", out, "-q").code == 0
    assert not list(out.glob(".*"))


def test_outputs_that_cannot_be(model, out):
    (out / "link.gguf").symlink_to("nowhere")
    long = "x" * 251 + ".gguf"
    cases = {
        "link.gguf": f"{out}/link.gguf: is a link to a file that is missing; remove the link or choose another name",
        long: f"{out}/{long}: cannot be written: File name too long; choose another name or folder",
    }
    for name, expected in cases.items():
        assert message(call("convert", model, *PLAIN, "-o", out / name), 5) == expected
    assert names(out) == ["link.gguf"]


def test_a_name_of_255_bytes(model, out):
    name = "x" * 250 + ".gguf"
    assert call("convert", model, *PLAIN, "--no-verify", "-o", out / name, "-q").code == 0
    assert names(out) == [name]


def test_small_files_are_whole_or_not_there(out, monkeypatch):
    path = out / "plan.json"
    outputs.write_small(path, "old\n")
    path.chmod(0o640)

    def half(temporary, *_arguments, **_options):
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(outputs.Path, "write_text", half)
        with pytest.raises(OutputError, match=r"plan.json: cannot write: No space left on device$"):
            outputs.write_small(path, "new\n")
    assert path.read_text() == "old\n" and names(out) == ["plan.json"]
    (out / "link.json").symlink_to("plan.json")
    outputs.write_small(out / "link.json", "new\n")
    assert path.read_text() == "new\n" and (out / "link.json").is_symlink() and path.stat().st_mode & 0o777 == 0o640
    outputs.write_small(Path(os.devnull), "nowhere\n")


# --- inputs that change ----------------------------------------------------------------------------------------------


def test_file_states(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    states = file_states([file, file])
    assert len(states) == 1
    check_unchanged(states)
    os.utime(file, ns=(1, 1))
    with pytest.raises(ModelError, match=r"weights: was written again while it was read; run again when the model is"):
        check_unchanged(states)
    file.write_bytes(b"12")
    with pytest.raises(ModelError, match=r"weights: changed while it was read: it had 4 bytes, it has 2; run again"):
        check_unchanged(states)
    with pytest.raises(ModelError, match="it had 4 bytes, it has 2") as caught, unchanged(states):
        raise OutputError("what follows from it")
    assert str(caught.value.__cause__) == "what follows from it"
    file.unlink()
    with pytest.raises(ModelError, match=r"weights: can no longer be read: No such file or directory; run again"):
        check_unchanged(states)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("change", ["shrinks", "changes"])
def test_weights_that_change_while_they_are_read(model, out, monkeypatch, kind, change):
    source = weights = model / "model.safetensors"
    if kind == "gguf":
        source = weights = out.parent / "whole.gguf"
        assert call("convert", model, "--uniform", "F16", "--no-verify", "-o", source, "-q").code == 0
    source = model if kind == "folder" else source
    real = write._write_tensors

    def later(*arguments):
        if change == "shrinks":
            os.truncate(weights, weights.stat().st_size // 2)
        else:
            os.utime(weights, ns=(1, 1))
        real(*arguments)

    monkeypatch.setattr(write, "_write_tensors", later)
    n_bytes = weights.stat().st_size
    line = message(call("convert", source, *PLAIN, "--no-verify", "-o", out / "a.gguf"), 3)
    how = f"changed while it was read: it had {n_bytes} bytes, it has {n_bytes // 2}"
    how = how if change == "shrinks" else "was written again while it was read"
    assert line == f"{weights}: {how}; run again when the model is complete"
    assert names(out) == []


def test_a_span_that_is_not_there(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(10)))
    assert read_spans(file, "a", [(3, 4)], 4).tolist() == [3, 4, 5, 6]
    with pytest.raises(ModelError, match=r"weights: tensor a can no longer be read: the file ends before byte 11, it"):
        read_spans(file, "a", [(3, 8)], 8)


def test_runs_of_rows():
    assert row_runs(np.array([], np.intp)) == []
    assert row_runs(np.array([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 1), (7, 2)]


def test_rows_and_columns_of_a_file_are_those_of_the_array(tmp_path):
    from nsds_gguf.read.safetensors import SafetensorsTensor

    values = np.arange(60, dtype="<f4").reshape(10, 6)
    file = tmp_path / "weights"
    file.write_bytes(b"12345678" + values.tobytes())
    tensor = SafetensorsTensor("a", "F32", (10, 6), file, 8)
    order = np.array([7, 0, 1, 1, 9])
    for rows, columns in ((slice(2, 5), slice(None)), (slice(None), slice(1, 3)), (order, slice(None)),
                          (order, slice(4, 6)), (slice(8, 99), slice(5, 99)), (slice(3, 3), slice(None))):  # fmt: skip
        np.testing.assert_array_equal(tensor.values(rows, columns), values[rows][:, columns])


def test_every_weight_file_is_watched(model):
    assert [state.path.name for state in open_model(model).inputs] == ["model.safetensors"]


# --- signals, memory -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("name", ["SIGINT"])
def test_a_signal_ends_the_program_within_a_second_even_inside_a_library(model, out, name):
    """Where the orderly way leads nowhere, the watch ends the process and removes the files."""
    code = (
        "import sys, threading; from nsds_gguf import convert; from nsds_gguf.cli import main\n"
        "def stuck(*arguments, **options):\n"
        "    print('stuck', flush=True)\n"
        "    while True:\n"
        "        try:\n"
        "            threading.Event().wait()\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"  # as if the signal had never arrived
        "convert.write_gguf = stuck\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "convert", model, *PLAIN, "--no-verify", "-o", out / "a.gguf"]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "stuck\n"
    assert len(names(out)) == 1
    number = getattr(signal, name)
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err.strip() == f"error: stopped by {name}; no unfinished file is left"
    assert names(out) == []


def test_only_the_first_signal_counts():
    seen = []
    handler = signal.getsignal(signal.SIGINT)
    with signals.handled():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            signal.raise_signal(signal.SIGINT)
            seen.append(stop.number)
    assert seen == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory; lower --threads or close other programs"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; lower --threads or close other programs"),
        (
            RuntimeError("can't start new thread"),
            "the system allows no more threads, or no memory for them; lower --threads or close other programs",
        ),
        (OSError(errno.EIO, "Input/output error", "weights"), "weights: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_errors_of_the_system_are_one_line(model, monkeypatch, error, expected):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr(convert, "open_model", fail)
    assert message(call("convert", model, *PLAIN), 5) == expected


def test_errors_of_the_program_are_not_hidden(model, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(convert, "open_model", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run.main(["convert", str(model), *PLAIN])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to this limit")
def test_too_little_address_space_is_refused_before_anything_is_imported():
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (165 << 20, -1))\n"
        "from nsds_gguf.cli import main\ncode = main(['inspect', 'x.gguf']); print(code, 'numpy' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "5 False\n"
    assert done.stderr == (
        "error: out of memory before the program could start: it needs 400 MiB of address space, the limit is 165 MiB; "
        "raise it (ulimit -v)\n"
    )


def test_an_import_that_fails_for_memory():
    assert _is_lack_of_memory(MemoryError())
    assert _is_lack_of_memory(ImportError("libx.so: failed to map segment from shared object"))
    assert not _is_lack_of_memory(ImportError("No module named 'gguf'"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the address space")
def test_a_limit_of_the_address_space_is_a_limit_of_memory():
    code = (
        "import resource; from nsds_gguf.resources import available_memory_bytes as free\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), -1)); print(free() >> 20)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 90 <= int(done.stdout) <= 100
