"""llama.cpp in a process of its own: whatever becomes of it, the program gets one clear error and goes on."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import run
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from tiny_gguf import write_tiny_gguf

from nsds_gguf.errors import GgmlError, OutputError
from nsds_gguf.llamacpp import llama, process
from nsds_gguf.llamacpp.llama import open_context, open_model
from nsds_gguf.llamacpp.messages import SharedBuffer, map_shared, receive, send

TOKENS = np.arange(5, 13, dtype=np.int32)[np.newaxis]


class Saboteur:
    """An observer that does something in llama.cpp's process while the first product is computed."""

    def __init__(self, deed):
        self.deed = deed

    def begin(self):
        pass

    def wants(self, product):
        return True

    def take(self, product):
        {
            "abort": os.abort,
            "crash": lambda: ctypes.string_at(8),
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "exit": lambda: os._exit(3),
            "hang": lambda: time.sleep(3600),
            "say and abort": lambda: os.write(2, b"/build/ggml/src/ggml.c:7: GGML_ASSERT(a) failed\n") and os.abort(),
            "bug": lambda: 1 / 0,
            "error": lambda: (_ for _ in ()).throw(GgmlError("as the observer says")),
            "print": lambda: (os.write(1, b"to the pipe?\n"), os.write(2, b"to the screen?\n")),
        }[self.deed]()

    def results(self):
        yield "seen"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("process") / "tiny.gguf")


def decode(file, deed):
    observer = Saboteur(deed)
    with open_model(file) as model, open_context(model, n_ctx=8, n_batch=8, n_threads=1, observer=observer) as context:
        context.read(TOKENS)
        return list(context.observed())


# --- what kills it ---


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("abort", "llama.cpp aborted without a word"),
        ("say and abort", "llama.cpp aborted: ggml.c:7: GGML_ASSERT(a) failed"),
        ("crash", "llama.cpp crashed (SIGSEGV)"),
        ("kill", "the process that ran llama.cpp was killed, most likely because memory ran out; close other programs, "
                 "or convert on a machine with more memory"),
        ("exit", "the process that ran llama.cpp ended with exit code 3"),
    ],
)  # fmt: skip
def test_death_is_an_error_and_the_next_call_works(tiny, deed, message):
    before = llama.logits(tiny, [1, 5, 6], n_threads=1)
    with pytest.raises(GgmlError) as caught:
        decode(tiny, deed)
    assert str(caught.value) == f"{tiny}: {message}"
    assert np.array_equal(llama.logits(tiny, [1, 5, 6], n_threads=1), before)


def test_a_hang_is_an_error(tiny, monkeypatch):
    llama.end_process()
    monkeypatch.setattr(process, "HANG_SECONDS", 1)
    try:
        with pytest.raises(GgmlError, match=r"llama\.cpp hangs: no progress for 1 seconds"):
            decode(tiny, "hang")
    finally:
        llama.end_process()


def test_an_idle_process_does_not_hang(tiny, monkeypatch):
    llama.end_process()
    monkeypatch.setattr(process, "HANG_SECONDS", 0.2)
    try:
        with open_model(tiny, vocab_only=True) as model:
            time.sleep(1.5)
            assert model.tokenize("ab").size == 4
    finally:
        llama.end_process()


def test_errors_of_the_observer_come_back(tiny):
    with pytest.raises(GgmlError, match=r"^as the observer says$"):
        decode(tiny, "error")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        decode(tiny, "bug")
    assert process.llama_process().is_alive


def test_a_missing_binding(tiny, tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    llama.end_process()
    try:
        with pytest.raises(GgmlError, match="llama-cpp-python cannot be used: no such library; run: pip install"):
            llama.logits(tiny, [1])
    finally:
        llama.end_process()


def test_a_system_that_starts_no_process(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    llama.end_process()
    with pytest.raises(GgmlError, match=r"llama\.cpp cannot be started in a process of its own: No such file"):
        llama.llama_build()


def with_half_norms(folder):
    """Return a GGUF whose norms are F16: llama.cpp asserts on it in the middle of a graph."""
    whole = GGUFReader(write_tiny_gguf(folder / "f32.gguf"))
    writer = GGUFWriter(folder / "half.gguf", "llama")
    for key, entry in whole.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type)
    for tensor in whole.tensors:
        half = tensor.name.endswith("norm.weight")
        writer.add_tensor(tensor.name, tensor.data.astype(np.float16) if half else tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGMLQuantizationType.F16 in {t.tensor_type for t in GGUFReader(folder / "half.gguf").tensors}
    return folder / "half.gguf"


def test_an_assertion_of_ggml(tmp_path):
    file = with_half_norms(tmp_path)
    with pytest.raises(GgmlError, match=r"half.gguf: llama.cpp aborted: .*unsupported types"):
        llama.logits(file, [1, 5, 6], n_threads=2)


def test_an_assertion_is_one_line_of_the_command(tmp_path):
    outcome = run("perplexity", with_half_norms(tmp_path), "--threads", "2")
    assert (outcome.code, outcome.out) == (8, "")
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ") and "llama.cpp aborted: " in last
    assert "gdb" not in outcome.err and "#0" not in outcome.err
    assert len(outcome.err.splitlines()) < 5


# --- what interrupts it ---


def test_ctrl_c_does_not_wait(tiny):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    child = process.llama_process()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        decode(tiny, "hang")
    assert not child.is_alive


def test_it_ends_with_its_parent(tiny):
    """The parent is killed in the middle of a call, without a chance to say so."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from pathlib import Path\n"
        "from test_llama_process import decode\n"
        "from nsds_gguf.llamacpp.process import llama_process\n"
        "print(llama_process().pid, flush=True)\n"
        "decode(Path(sys.argv[2]), 'hang')\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tiny)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and running(child):
        time.sleep(0.05)
    assert not running(child)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_user_says_how_threads_wait(name, monkeypatch):
    for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(each, raising=False)
    assert process._waiting() == {"GOMP_SPINCOUNT": "30000"}
    monkeypatch.setenv(name, "active")
    assert process._waiting() == {}


# --- what it says ---


def test_nothing_reaches_the_screen(tiny, capfd, caplog):
    with caplog.at_level("INFO", logger="nsds_gguf.llamacpp"):
        assert decode(tiny, "print") == ["seen"]
        llama.end_process()  # all that it said has been read
    assert capfd.readouterr() == ("", "")
    assert "to the screen?" in caplog.messages and "to the pipe?" in caplog.messages


def test_files_are_found_whatever_the_folder(tiny, tmp_path, monkeypatch):
    process.llama_process()
    monkeypatch.chdir(tiny.parent)
    wanted = llama.logits(tiny, [1, 5], n_threads=1)
    assert np.array_equal(llama.logits(Path(tiny.name), [1, 5], n_threads=1), wanted)


def test_one_process_serves_all(tiny):
    pid = process.llama_process().pid
    with open_model(tiny) as model, open_model(tiny, vocab_only=True) as other:
        assert model.tokenize("ab").tolist() == other.tokenize("ab").tolist()
    assert process.llama_process().pid == pid


def test_a_fork_has_a_process_of_its_own(tiny):
    own = process.llama_process()
    own.owner += 1  # as a forked process sees it
    try:
        assert process.llama_process() is not own
    finally:
        own.owner -= 1
        own.close()


# --- messages ---


def test_messages_carry_arrays_without_a_copy_in_the_pickle():
    stream = io.BytesIO()
    array = np.random.default_rng(0).normal(size=(300, 200))
    send(stream, ("result", {"a": array, "b": [1, "x"], "c": np.empty((0, 3), np.int32)}))
    assert len(stream.getvalue()) < array.nbytes + 2000
    stream.seek(0)
    kind, found = receive(stream)
    assert kind == "result" and found["b"] == [1, "x"] and found["c"].shape == (0, 3)
    assert np.array_equal(found["a"], array) and found["a"].flags.writeable


def test_the_end_of_a_pipe():
    stream = io.BytesIO()
    send(stream, "whole")
    for cut in (0, 4, 12, len(stream.getvalue()) - 1):
        with pytest.raises(EOFError):
            receive(io.BytesIO(stream.getvalue()[:cut]))


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (0xC0000005, "llama.cpp crashed (0xC0000005): last words"),
        (255, "the process that ran llama.cpp ended with exit code 255: last words"),
    ],
)
def test_windows_names_a_crash_by_its_status(code, wanted):
    ended = object.__new__(process.LlamaProcess)
    ended._process = SimpleNamespace(wait=lambda: code, stdin=io.BytesIO(), stdout=io.BytesIO(), stderr=io.BytesIO())
    ended._lines, ended._drain = deque(["last words"]), threading.Thread()
    ended._drain.start()
    assert ended._cause_of_death() == wanted


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_shared_memory(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    buffer = SharedBuffer(4096)
    other = map_shared(buffer.path)
    np.frombuffer(other, np.float32)[:3] = [1, 2, 3]
    assert np.frombuffer(buffer.data, np.float32)[:4].tolist() == [1, 2, 3, 0]
    buffer.close()
    assert not Path(buffer.path).exists()


def test_no_shared_memory(tiny, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", refuse)
    with (
        open_model(tiny) as model,
        pytest.raises(OutputError, match=r"logits take up to 1 MiB of shared memory, .* \(File too large\)"),
        open_context(model, n_ctx=8, n_batch=1024),
    ):
        pass


def test_large_logits(tmp_path):
    """More than a container's /dev/shm holds is asked for, and the part that is used is right."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    wanted = llama.logits(file, TOKENS[0].tolist(), n_threads=1)
    with open_model(file) as model, open_context(model, n_ctx=8, n_batch=1 << 18, n_threads=1, exact=True) as context:
        assert np.array_equal(context.decode(TOKENS)[0], wanted)
