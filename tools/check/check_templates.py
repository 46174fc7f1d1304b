"""Prove that our Go templates say what the original Jinja templates say, by a real Go ``text/template`` engine.

For every family of tests/chat_templates.py, and every ``*.jinja`` in ``--templates DIR``, conversations are rendered by
the original template and by Go with what ``go_template`` makes of it, as Ollama does since July 2024 and, where turns
can say it, as it did before; the texts must be equal. Needs the command ``go``. Exit code 1 on any
difference; ``--write`` stores what tests/test_modelfile.py compares the code with.

    python tools/check/check_templates.py [--templates DIR] [--write]
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the templates and conversations of the tests themselves

from chat_templates import CONVERSATIONS, FAMILIES, messages_for, source

from nsds_gguf.errors import UnsupportedError
from nsds_gguf.publish.chat import DATED_SYSTEM, ChatFormat, ChatTemplate, find_format
from nsds_gguf.publish.modelfile import go_template

GOLDEN = ROOT / "tests" / "golden" / "templates.json"
DAY = datetime.datetime(2026, 1, 2)
PROGRAM = ROOT / "tools" / "ollama_template" / "main.go"


@dataclass(frozen=True)
class Case:
    """A conversation, the Go template and the version that render it, and what should come out."""

    family: str
    conversation: str
    version: str
    template: str
    messages: list[dict[str, str]]
    wanted: str


def render_with_go(cases: list[Case]) -> list[str]:
    jobs = [{"template": case.template, "version": case.version, "messages": case.messages} for case in cases]
    done = subprocess.run(["go", "run", str(PROGRAM)], input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    texts: list[str] = json.loads(done.stdout)
    return texts


def cases_of(family: str, template: ChatTemplate, chat: ChatFormat, bos: str) -> list[Case]:
    written, cases = go_template(chat), []
    for name, messages in CONVERSATIONS.items():
        if (wanted := wanted_text(template, chat, messages, bos)) is None:
            continue
        given = messages_for(chat, messages)
        by_turns = ".Messages" not in written or [m["role"] for m in messages] == ["system", "user"]
        versions = ("new", "old") if by_turns else ("new",)
        cases += [Case(family, name, version, written, given, wanted) for version in versions]
    return cases


def wanted_text(template: ChatTemplate, chat: ChatFormat, messages: list[dict[str, str]], bos: str) -> str | None:
    """Return the original's text; our own where it refuses the conversation, nothing where it names the day."""
    if DATED_SYSTEM in chat.notes and messages[0]["role"] != "system":
        return None
    try:
        return template.render(messages).removeprefix(bos)
    except UnsupportedError:
        return chat.render(messages)


def families(folder: Path | None) -> dict[str, tuple[str, str, str, bool]]:
    found = {name: (source(name), f.bos, f.eos, f.adds_bos) for name, f in FAMILIES.items()}
    for path in sorted(folder.glob("*.jinja")) if folder else ():
        found[path.stem] = (path.read_text(encoding="utf-8"), "<s>", "</s>", True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, help="also check the *.jinja files of a folder")
    parser.add_argument("--write", action="store_true", help="store the golden renderings")
    arguments = parser.parse_args()
    if shutil.which("go") is None:
        raise SystemExit("the command go is missing: apt-get install golang")
    cases, refused = [], []
    for name, (text, bos, eos, adds_bos) in families(arguments.templates).items():
        try:
            chat = find_format(text, bos, eos, adds_bos=adds_bos)
        except UnsupportedError as error:
            refused.append(f"{name}: {error}")
            continue
        template = ChatTemplate(text, bos, eos, now=DAY if DATED_SYSTEM in chat.notes else None)
        cases += cases_of(name, template, chat, bos if adds_bos else "")
    texts = render_with_go(cases)
    wrong = [(case, text) for case, text in zip(cases, texts, strict=True) if text != case.wanted]
    for case, text in wrong:
        print(f"{case.family}, {case.conversation}, {case.version}:\n  wanted {case.wanted!r}\n  got    {text!r}")
    checked = dict.fromkeys(case.family for case in cases)
    print(f"{len(checked)} templates, {len(cases)} renderings, {len(wrong)} differ; not translated: {len(refused)}")
    print("\n".join(refused))
    if arguments.write and not wrong:
        write_golden(cases, texts)
    return 1 if wrong or any(name not in checked for name in FAMILIES) else 0


def write_golden(cases: list[Case], texts: list[str]) -> None:
    golden: dict[str, Any] = {}
    for case, text in zip(cases, texts, strict=True):
        if case.family in FAMILIES:
            entry = golden.setdefault(case.family, {"go": case.template, "texts": {}})
            entry["texts"][case.conversation] = text
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
