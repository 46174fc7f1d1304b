"""What macOS and Windows do otherwise, as far as it can be acted out here: neither has been tried."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from test_faults import dead, names

from nsds_gguf.cli import run, signals
from nsds_gguf.publish import template_child
from nsds_gguf.system import atomic
from nsds_gguf.system.folder_lock import LOCK
from nsds_gguf.system.leftovers import remove_stale
from nsds_gguf.system.workfolder import WorkFolder

fcntl = pytest.importorskip("fcntl", reason="acted out on systems of the Unix kind")


@pytest.fixture
def windows(monkeypatch):
    """Refuse to rename or remove what is open: here, work folders and their locks."""

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    unlink = Path.unlink
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "rename", refused)
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (refused if path.name == LOCK else unlink)(path, **how))


def test_a_work_folder_goes_although_its_lock_is_open(tmp_path, windows):
    with WorkFolder(tmp_path, ["a.gguf"]) as files:
        (files.path / "large").write_bytes(b"data")
    assert names(tmp_path) == []


def test_what_a_killed_run_left_goes_too(tmp_path, request):
    dead(tmp_path)
    request.getfixturevalue("windows")
    assert remove_stale(tmp_path).notes == ["Removed 3.0 MiB of temporary files left by an interrupted run."]
    assert names(tmp_path) == []


def test_a_live_run_keeps_its_folder(tmp_path, windows):
    with WorkFolder(tmp_path, ["a.gguf"]) as live:
        live.open()
        assert remove_stale(tmp_path).notes == [] and names(live.path) == [LOCK]


@pytest.mark.parametrize(("knows", "wanted"), [(True, ["full"]), (False, ["full", "plain"])])
def test_macos_is_asked_to_empty_the_drives_cache(tmp_path, monkeypatch, knows, wanted):
    asked = []

    def full(descriptor, command):
        assert command == 51
        asked.append("full")
        if not knows:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append("plain"))
    monkeypatch.setattr(sys, "platform", "darwin")
    with (tmp_path / "file").open("wb") as stream:
        atomic.sync(stream.fileno())
    assert asked == wanted


def test_a_closed_pipe_has_the_exit_code_of_shells_where_there_is_no_such_signal(monkeypatch):
    monkeypatch.delattr(signal, "SIGPIPE")
    monkeypatch.setattr(run, "build_parser", lambda: (_ for _ in ()).throw(BrokenPipeError))
    monkeypatch.setattr(run, "drop_output", lambda: None)
    assert run.main(["inspect", "x.gguf"]) == 141


def test_ctrl_break_ends_in_order(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with pytest.raises(signals.Stopped) as stopped, signals.handled():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopped.value.number == signal.SIGUSR1


def test_templates_render_where_nothing_can_be_limited(monkeypatch):
    request = b'{"source": "{{ 1 + 1 }}", "now": null, "variables": {}}\n'
    stdin, stdout = _Stream([request]), _Stream([])
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(signal, "alarm")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", stdout)
    template_child.serve()
    assert stdout.lines == [b'{"text": "2"}\n']


class _Stream:
    """A standard stream whose buffer is itself: lines to read, or written."""

    def __init__(self, lines):
        self.lines, self.buffer = lines, self

    def __iter__(self):
        return iter(self.lines)

    def write(self, line):
        self.lines.append(line)

    def flush(self):
        pass
