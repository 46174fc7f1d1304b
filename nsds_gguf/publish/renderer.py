"""Renders chat templates in a child process with a time limit, where a template can do no harm.

One child serves all templates of a run (``template_child``); a child that takes too long or dies is replaced for the
next template. Neither the working directory nor a model folder is on the child's path.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError

MAX_SECONDS = 5.0  # a normal text takes a millisecond
_PROGRAM = Path(__file__).with_name("template_child.py")


class TemplateLimitError(UnsupportedError):
    """A chat template exceeded the time limit, or its process died."""


class Renderer:
    """The child process, started on first use."""

    def __init__(self, max_seconds: float = MAX_SECONDS) -> None:
        """Take the time limit of one answer in seconds."""
        self._max_seconds, self._lock = max_seconds, threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request, see ``template_child``.

        Raises ``TemplateLimitError`` when it takes too long, or the child dies.
        """
        with self._lock:
            child = self._started()
            is_late = threading.Event()

            def end() -> None:
                is_late.set()
                child.kill()

            timer = threading.Timer(self._max_seconds, end)
            timer.start()
            try:
                line = self._exchanged(child, json.dumps(request).encode() + b"\n")
            finally:
                timer.cancel()
                timer.join()
            if line.endswith(b"\n") and not is_late.is_set():
                answer: dict[str, Any] = json.loads(line)
                return answer
            code = self._stopped()
        ends = f"ends its process (exit code {code})"
        what = f"takes more than {self._max_seconds:g} s" if is_late.is_set() else ends
        raise TemplateLimitError(f"chat template cannot be rendered: it {what}")

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._stopped()

    def _started(self) -> subprocess.Popen[bytes]:
        """Return the child after one exchange, so that its start does not count as a template's time."""
        if self._child is None or self._child.poll() is not None:
            self._stopped()
            self._child = subprocess.Popen(
                [sys.executable, str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            hello: dict[str, Any] = {"source": "", "now": None, "variables": {}}
            if not self._exchanged(self._child, json.dumps(hello).encode() + b"\n"):
                raise TemplateLimitError(f"chat template cannot be rendered: {_PROGRAM} does not start")
        return self._child

    @staticmethod
    def _exchanged(child: subprocess.Popen[bytes], line: bytes) -> bytes:
        """Write a line and return the reply, which is incomplete where the child has died."""
        assert child.stdin is not None and child.stdout is not None  # noqa: S101 - both are pipes
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(line)
            child.stdin.flush()
        return child.stdout.readline()

    def _stopped(self) -> int | None:
        """Kill the child and return its exit code; ``None`` where there is none."""
        child, self._child = self._child, None
        if child is None:
            return None
        child.kill()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return child.wait()


RENDERER = Renderer()
atexit.register(RENDERER.close)
