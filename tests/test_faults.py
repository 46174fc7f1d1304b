"""Faults: what is left by runs that are killed, what two runs to one output do, inputs that change, signals."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from command import ENVIRONMENT, PLAIN, TINY, call, message
from tiny_models import write_tiny

from nsds_gguf import conversion as convert
from nsds_gguf.cli import _is_lack_of_memory, run, signals
from nsds_gguf.errors import ModelError, NsdsError, OutputError, notes_of
from nsds_gguf.read import open_model
from nsds_gguf.read.spans import read_spans, row_runs
from nsds_gguf.system import atomic, folder_lock, leftovers, workfolder
from nsds_gguf.system.filestate import check_unchanged, file_states, unchanged
from nsds_gguf.system.folder_lock import LOCK, RECORDS
from nsds_gguf.system.leftovers import remove_stale
from nsds_gguf.system.workers import Threads
from nsds_gguf.system.workfolder import WorkFolder, release_all


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


def dead(folder, name="out.gguf", n_bytes=3 << 20, n_record_bytes=0):
    """Leave the work folder of a run that was killed, with a temporary file and perhaps a record."""
    code = (
        "import os, sys; from pathlib import Path; from nsds_gguf.system.workfolder import WorkFolder\n"
        "files = WorkFolder(Path(sys.argv[1]), [sys.argv[2]], resume=True)\n"
        f"(files.path / 'original.gguf').write_bytes(bytes({n_bytes}))\n"
        f"if {n_record_bytes}: (files.records / 'a.record').write_bytes(bytes({n_record_bytes}))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder, name], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    path = folder / (folder_lock.PREFIX + hashlib.sha256(name.encode()).hexdigest()[:16])
    assert names(path) == ["lock", "original.gguf"] + ["records"] * (n_record_bytes > 0)
    return path


def record(files, n_bytes=2 << 20):
    """Finish something in a run."""
    (files.records / "a.record").write_bytes(bytes(n_bytes))


# --- the work folder -------------------------------------------------------------------------------------------------


def test_a_work_folder_is_there_for_a_block(out):
    with WorkFolder(out, ["a.gguf", "b.gguf"], resume=True) as files:
        assert names(out) == []
        (files.path / "large").write_bytes(b"data")
        assert files.path.parent == out and len(names(out)) == 2
        record = json.loads((files.path / LOCK).read_text())
        assert (record["format"], record["output"], record["pid"]) == (folder_lock.FORMAT, "a.gguf", os.getpid())
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
    assert remove_stale(out).notes == ["Removed 1.5 MiB of temporary files left by 3 interrupted runs."]
    assert names(out) == []


def test_a_live_run_keeps_its_files(out):
    with WorkFolder(out, ["a.gguf"]) as live:
        (live.path / "large").write_bytes(b"data")
        assert remove_stale(out).notes == []
        assert names(live.path) == ["large", "lock"]


def test_the_second_run_to_an_output_is_refused(out, monkeypatch):
    monkeypatch.setattr(workfolder, "_TRIES", 2)
    with WorkFolder(out, ["a.gguf"]) as first, WorkFolder(out, ["b.gguf", "a.gguf"]) as second:
        first.open()
        with pytest.raises(OutputError) as caught:
            second.open()
        assert names(out) == [first.path.name]
    host = folder_lock.platform.node()
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
    assert remove_stale(out).notes == [
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
    monkeypatch.setattr(folder_lock, "_machine", lambda: {"host": "here", "boot": "0"})
    (note,) = remove_stale(out).notes
    assert path.exists() == is_left
    if is_left:
        assert note == f"{path}: left alone: a run on there made it; if none is going on there, remove it (3.0 MiB)."


def test_where_there_are_no_locks_runs_do_not_meet(out, monkeypatch):
    def refuse(_descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workfolder, "try_lock", refuse)
    monkeypatch.setattr(leftovers, "try_lock", refuse)
    with WorkFolder(out, ["a.gguf"]) as first, WorkFolder(out, ["a.gguf"]) as second:
        assert first.path != second.path
        (note, _) = remove_stale(out).notes
        assert note.endswith(": left alone: its file system has no locks; if no run is going on, remove it.")
        assert first.path.exists() and second.path.exists()
    assert names(out) == []


def test_a_full_disk_leaves_no_lock(out, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_lock.os, "write", refuse)
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
        thread = threading.Thread(target=release_all)
        thread.start()
        thread.join()
        assert names(out) == []


# --- records of interrupted runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OutputError("disk full"), MemoryError(), SystemExit()])
def test_an_interrupted_run_keeps_its_records_and_success_removes_them(out, error):
    with pytest.raises(type(error)), WorkFolder(out, ["a.gguf"], resume=True) as files:
        record(files)
        (files.path / "original.gguf").write_bytes(b"data")
        path = files.path
        raise error
    assert names(out) == [path.name] and names(path) == ["lock", "records"]
    note = f"2.0 MiB of finished work is kept in {path.name}: the same command goes on from there"
    assert notes_of(error) == [note]
    said = []
    with WorkFolder(out, ["a.gguf"], said.append, resume=True) as files:
        assert names(files.path) == ["lock", "records"] and names(files.records) == ["a.record"]
    assert names(out) == []
    assert said == ["Going on from 2.0 MiB of finished work that an interrupted run left."]


def test_a_killed_run_is_taken_over_by_the_next_to_its_output(out):
    path = dead(out, "a.gguf", n_record_bytes=1 << 19)
    said = []
    with WorkFolder(out, ["a.gguf"], said.append, resume=True) as files:
        assert files.path == path and names(path) == ["lock", "records"] and names(files.records) == ["a.record"]
    assert names(out) == []
    assert said == [
        "Removed 3.0 MiB of temporary files left by an interrupted run.",
        "Going on from 0.5 MiB of finished work that an interrupted run left.",
    ]


def test_a_run_that_hears_nothing_takes_over_too(out):
    path = dead(out, "a.gguf", n_record_bytes=1)
    with WorkFolder(out, ["a.gguf"], resume=True) as files:
        assert names(files.records) == ["a.record"] and names(path) == ["lock", "records"]
    assert names(out) == []


def test_a_run_that_starts_anew_removes_records_and_keeps_its_own(out):
    dead(out, "a.gguf", n_record_bytes=1)
    said = []
    with pytest.raises(KeyboardInterrupt), WorkFolder(out, ["a.gguf"], said.append, resume=False) as files:
        assert names(files.path) == ["lock"] and names(files.records) == []
        (files.records / "b.record").write_bytes(b"data")
        raise KeyboardInterrupt
    assert [path.name for path in out.rglob("*.record")] == ["b.record"]
    assert said == ["Removed 3.0 MiB of temporary files left by an interrupted run."]


def test_a_run_without_records_leaves_those_it_finds(out):
    path = dead(out, "a.gguf", n_record_bytes=1)
    for error in (None, KeyboardInterrupt()):
        with suppress(KeyboardInterrupt), WorkFolder(out, ["a.gguf"]) as files:
            assert names(files.path) == ["lock", "records"]
            (files.path / "large").write_bytes(b"data")
            with pytest.raises(ValueError, match="has no records"):
                _ = files.records
            if error:
                raise error
        assert names(path) == ["lock", "records"] and names(path / "records") == ["a.record"]
    with pytest.raises(ValueError, match="has no records"), WorkFolder(out, resume=True) as files:
        _ = files.records
    with WorkFolder(out, ["a.gguf"], resume=True) as files:
        assert names(files.records) == ["a.record"]


@pytest.mark.parametrize("error", [OutputError("no room"), KeyboardInterrupt()])
def test_a_run_that_fails_before_it_finished_anything_leaves_nothing(out, error):
    with pytest.raises(type(error)), WorkFolder(out, ["a.gguf"], resume=True) as files:
        (files.records / "a.bin").write_bytes(b"a payload without its head")
        raise error
    assert names(out) == [] and notes_of(error) == []


@pytest.mark.parametrize(("cause", "is_kept"), [(None, False), (ValueError(), False), (OSError(5, "I/O error"), True)])
def test_a_bad_model_leaves_nothing_but_one_that_cannot_be_read_now_does(out, cause, is_kept):
    with pytest.raises(ModelError), WorkFolder(out, ["a.gguf"], resume=True) as files:
        record(files)
        try:
            raise ModelError("the cause") from cause
        except ModelError as error:
            raise ModelError("NaN, or a disk that was unplugged") from error
    assert len(names(out)) == is_kept


def test_records_of_other_outputs_are_kept_and_told_in_one_note(out):
    first, second = dead(out, "a.gguf", 1 << 20, n_record_bytes=1 << 20), dead(out, "b.gguf", 0, n_record_bytes=2 << 20)
    paths = sorted([first, second])
    outputs = ["a.gguf", "b.gguf"] if paths[0] == first else ["b.gguf", "a.gguf"]
    for said in ([], []):
        with WorkFolder(out, ["c.gguf"], said.append, resume=True) as files:
            files.open()
        assert names(out) == [path.name for path in paths]
        assert names(first) == names(second) == ["lock", "records"]
        assert said[-1] == (
            f"Kept 3.0 MiB of finished work for interrupted runs to {', '.join(outputs)}, up to 7 days; if you do not "
            f"want to run them again, remove {paths[0]}, {paths[1]}."
        )
        assert len(said) <= 2
    said = []
    with WorkFolder(out, ["b.gguf"], said.append, resume=True) as files:
        files.open()
    assert said == [
        "Kept 1.0 MiB of finished work for interrupted runs to a.gguf, up to 7 days; if you do not want to run them "
        f"again, remove {first}.",
        "Going on from 2.0 MiB of finished work that an interrupted run left.",
    ]
    assert names(out) == [first.name]


@pytest.mark.parametrize(("days", "is_kept"), [(6.9, True), (7.1, False), (-3, True)])
def test_records_are_kept_for_seven_days(out, days, is_kept):
    path = dead(out, n_record_bytes=1 << 20)
    (path / RECORDS / "b.bin").touch()
    for file in path.rglob("*"):
        os.utime(file, (1, 1))
    changed = time.time() - days * 24 * 3600
    os.utime(path / RECORDS / "b.bin", (changed, changed))
    left = remove_stale(out)
    assert names(out) == [path.name] * is_kept
    assert [found.output for found in left.kept] == ["out.gguf"] * is_kept
    kept = "3.0" if is_kept else "4.0"
    assert left.notes == [f"Removed {kept} MiB of temporary files left by an interrupted run."]


def test_a_removal_that_was_killed_is_finished(out):
    """The run had succeeded; its records are in the folder still."""
    dead(out, n_record_bytes=1 << 20).rename(out / ".nsds-gguf-removed-0123456789abcdef")
    left = remove_stale(out)
    assert names(out) == [] and left.kept == []


def test_records_of_another_machine_are_not_taken_over(out, monkeypatch):
    path = dead(out, "a.gguf", n_record_bytes=1 << 20)
    monkeypatch.setattr(folder_lock, "_machine", lambda: {"host": "here", "boot": "0"})
    host = json.loads((path / LOCK).read_text())["host"]
    with pytest.raises(OutputError) as caught:
        WorkFolder(out, ["a.gguf"], resume=True).open()
    assert str(caught.value) == (
        f"{path}: is in the way: it holds files of a run on {host}, which may still be going on; move it "
        "away or choose another name"
    )
    assert names(path / RECORDS) == ["a.record"]


def test_where_there_are_no_locks_nothing_is_kept(out, monkeypatch):
    def refuse(_descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workfolder, "try_lock", refuse)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), WorkFolder(out, ["a.gguf"], resume=True) as files:
        record(files)
        raise error
    assert names(out) == [] and notes_of(error) == []
    path = dead(out, "a.gguf", n_record_bytes=1)  # where there were locks, from another machine perhaps
    with WorkFolder(out, ["a.gguf"], resume=True) as files:
        assert names(files.records) == [] and names(path / RECORDS) == ["a.record"]
    assert names(out) == [path.name]


def test_a_full_disk_does_not_make_records_nobodys(out, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = dead(out, "a.gguf", n_record_bytes=1)
    before = (path / LOCK).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.os, "write", refuse)
        with pytest.raises(OutputError, match="disk full"):
            WorkFolder(out, ["a.gguf"], resume=True).open()
    assert (path / LOCK).read_text() == before and names(path / RECORDS) == ["a.record"]
    (path / LOCK).write_text(before + "the rest of an older, longer line")  # killed between two steps
    with WorkFolder(out, ["a.gguf"], resume=True) as files:
        assert names(files.records) == ["a.record"]
        assert json.loads((path / LOCK).read_text())["pid"] == os.getpid()
    assert names(out) == []


def test_a_records_folder_that_cannot_be_made(out):
    message = r"out: cannot write: File exists$"
    with pytest.raises(OutputError, match=message), WorkFolder(out, ["a.gguf"], resume=True) as files:
        (files.path / RECORDS).write_text("a file")
        _ = files.records
    assert names(out) == []


def test_a_run_to_several_outputs_has_its_records_with_the_first(out):
    def run(outputs):
        with WorkFolder(out, outputs, resume=True) as files:
            found = names(files.records)
            record(files)
            raise KeyboardInterrupt

        return found

    for outputs in (["a.gguf", "b.gguf"], ["b.gguf"]):
        with pytest.raises(KeyboardInterrupt):
            run(outputs)
    assert len(names(out)) == 2
    with WorkFolder(out, ["b.gguf", "a.gguf"], resume=True) as files:
        assert names(files.records) == ["a.record"]
    assert names(out) == []


def test_all_work_folders_keep_their_records_from_any_thread(out):
    with WorkFolder(out, ["a.gguf"], resume=True) as files:
        record(files)
        (files.path / "large").write_bytes(b"half")
        told = []
        thread = threading.Thread(target=lambda: told.append(release_all()))
        thread.start()
        thread.join()
        (name,) = names(out)
        assert told == [f"2.0 MiB of finished work is kept in {name}: the same command goes on from there"]
        assert names(out / name) == ["lock", "records"]
    assert release_all() == ""
    with WorkFolder(out, ["a.gguf"], resume=True) as files:
        assert names(files.records) == ["a.record"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OutputError("no room"), 5, "no room"),
        (OSError(errno.EIO, "Input/output error"), 5, "Input/output error"),
        (MemoryError(), 5, "out of memory; lower --threads or close other programs"),
        (signals.Stopped(signal.SIGINT), 130, "stopped by SIGINT"),
    ],
)
def test_an_error_tells_what_is_kept(model, out, monkeypatch, error, code, line):
    def fail(*_arguments, **_options):
        with WorkFolder(out, ["a.gguf"], resume=True) as files:
            record(files)
            raise error

    monkeypatch.setattr(convert, "open_model", fail)
    told = message(call("convert", model, *PLAIN), code)
    (name,) = names(out)
    assert told == f"{line}; 2.0 MiB of finished work is kept in {name}: the same command goes on from there"


def test_a_bundle_folder_with_records_of_its_file_alone_is_empty(model, out):
    dead(out, "a.gguf", n_record_bytes=1)
    call("convert", model, *PLAIN, "--no-verify", "--bundle", out, "-q")
    assert "Modelfile" in names(out)
    assert "is not empty" in message(call("convert", model, *PLAIN, "--no-verify", "--bundle", out, "-q"), 5)


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
    atomic.write_small(path, "old\n")
    path.chmod(0o640)

    def half(temporary, *_arguments, **_options):
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.Path, "write_text", half)
        with pytest.raises(OutputError, match=r"plan.json: cannot write: No space left on device$"):
            atomic.write_small(path, "new\n")
    assert path.read_text() == "old\n" and names(out) == ["plan.json"]
    (out / "link.json").symlink_to("plan.json")
    atomic.write_small(out / "link.json", "new\n")
    assert path.read_text() == "new\n" and (out / "link.json").is_symlink() and path.stat().st_mode & 0o777 == 0o640
    atomic.write_small(Path(os.devnull), "nowhere\n")


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
    real = Threads.ordered

    def later(*arguments, **options):
        if change == "shrinks":
            os.truncate(weights, weights.stat().st_size // 2)
        else:
            os.utime(weights, ns=(1, 1))
        return real(*arguments, **options)

    monkeypatch.setattr(Threads, "ordered", later)
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
@pytest.mark.parametrize(("name", "has_records"), [("SIGINT", False), ("SIGTERM", True)])
def test_a_signal_ends_the_program_within_a_second_even_inside_a_library(model, out, name, has_records):
    """Where the orderly way leads nowhere, the watch ends the process and removes the files, but no records."""
    code = (
        "import sys, threading; from nsds_gguf.session import session; from nsds_gguf.cli import main\n"
        "from pathlib import Path; from nsds_gguf.system.workfolder import WorkFolder\n"
        "def stuck(*arguments, **options):\n"
        f"    if {has_records}:\n"
        f"        files = WorkFolder(Path({str(out)!r}), ['b.gguf'], resume=True)\n"
        "        (files.records / 'a.record').write_bytes(bytes(1 << 20))\n"
        "    while True:\n"
        "        try:\n"
        "            print('stuck', flush=True)\n"
        "            threading.Event().wait()\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"  # as if the signal had never arrived
        "session.write_gguf = stuck\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "convert", model, *PLAIN, "--no-verify", "-o", out / "a.gguf"]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "stuck\n"
    assert len(names(out)) == 1 + has_records
    number = getattr(signal, name)
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    left, is_kept = names(out), ": the same command goes on from there"
    assert len(left) == has_records
    what = f"1.0 MiB of finished work is kept in {left[0]}{is_kept}" if has_records else "no unfinished file is left"
    assert err.strip() == f"error: stopped by {name}; {what}"


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
        "import resource; from nsds_gguf.system.resources import available_memory_bytes as free\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), -1)); print(free() >> 20)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 90 <= int(done.stdout) <= 100
