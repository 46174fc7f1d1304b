"""Renders chat templates, which are untrusted programs, in a separate process that may be killed.

``renderer`` runs this file by its path and writes one JSON object per line to its input::

    {"source", "now", "variables"} -> {"text"} or {"error", "is_syntax"}

Templates run in Jinja's immutable sandbox, which exposes only their variables: no file, no module. The parent limits
the time, this process the memory and the length of a text. The file imports nothing from the package, so that it starts
in a tenth of a second, and removes its own folder and the working directory from the path before any import: modules
there could shadow others.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".", os.path.dirname(__file__))]  # noqa: PTH120

import contextlib
import datetime
import functools
import json
import signal
from collections.abc import Mapping
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 512 << 20  # of the process, where the system can limit it (not on macOS and Windows)
_LAST_RESORT_SECONDS = 60
MAX_LETTERS = 1 << 20  # of a rendered text: conversations here have a few words

# The exceptions of Jinja expressions, besides Jinja's own.
FAILURES = (
    TemplateError, SyntaxError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


class _Generation(Extension):
    """``{% generation %}``, transformers' mark of the assistant's text: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=4)
def compiled(source: str, now: str | None) -> Template:
    """Return a template in the environment of transformers; ``strftime_now`` formats ``now``."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    if now is not None:
        environment.globals["strftime_now"] = datetime.datetime.fromisoformat(now).strftime
    return environment.from_string(source)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text of a request, or the error; without variables only compile the template."""
    is_syntax = True
    try:
        template = compiled(request["source"], request["now"])
        is_syntax = False
        if request["variables"] is None:
            return {"text": ""}
        pieces, n_letters = [], 0
        for piece in template.generate(**request["variables"]):
            n_letters += len(piece)
            if n_letters > MAX_LETTERS:
                return {"error": f"it writes more than {MAX_LETTERS} characters", "is_syntax": False}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory", "is_syntax": is_syntax}
    except FAILURES as error:
        return {"error": " ".join(str(error).split())[:500] or type(error).__name__, "is_syntax": is_syntax}


def serve() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the input
    if sys.platform != "win32":
        import resource

        with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit of the address space
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    alarm = getattr(signal, "alarm", lambda seconds: None)  # ends this process if the parent no longer can
    for line in sys.stdin.buffer:
        alarm(_LAST_RESORT_SECONDS)
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()
        alarm(0)


if __name__ == "__main__":
    serve()
