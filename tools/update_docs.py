"""Write the generated blocks of the documentation: supported models, options, exit codes.

    python tools/update_docs.py [--check]

A block stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. With ``--check`` nothing is written and
a block that is out of date is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from nsds_gguf.cli import EXIT_CODES, build_parser
from nsds_gguf.read.families import FAMILIES

ROOT = Path(__file__).parent.parent
FILES = (ROOT / "README.md", ROOT / "docs" / "cli.md")

# What people know the classes by.
KNOWN_AS = {
    "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2",
    "MistralForCausalLM": "Mistral 7B and its fine-tunes",
    "Qwen2ForCausalLM": "Qwen 2, Qwen 2.5",
    "Qwen3ForCausalLM": "Qwen 3 (dense)",
}


def models_table() -> str:
    lines = ["| class | models | llama.cpp architecture | rope scaling |", "|---|---|---|---|"]
    for family in FAMILIES:
        for name in family.classes:
            kinds = ", ".join("none" if kind == "default" else kind for kind in family.rope_kinds)
            lines.append(f"| `{name}` | {KNOWN_AS[name]} | {family.architecture} | {kinds} |")
    return "\n".join(lines)


def options_tables() -> str:
    verbs = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = []
    for verb, parser in verbs.choices.items():
        parts += [f"## nsds-gguf {verb}\n", f"{_sentence(parser.description)} {_example(parser.epilog)}\n",
                  "| option | meaning |", "|---|---|"]  # fmt: skip
        parts += [f"| {_flags(action)} | {_meaning(action)} |" for action in parser._actions if action.dest != "help"]
        parts.append("")
    return "\n".join([*parts, "## Exit codes\n", "```text", EXIT_CODES, "```"])


def _sentence(text: str | None) -> str:
    text = (text or "").strip()
    return text[:1].upper() + text[1:] + "."


def _example(epilog: str | None) -> str:
    example = re.search(r"nsds-gguf .+", epilog or "")
    if example is None:
        raise SystemExit("a verb has no example in its help")
    return f"Example: `{example[0]}`."


def _flags(action: argparse.Action) -> str:
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    if not action.option_strings:
        return f"`{value}`"
    shown = " ".join([", ".join(action.option_strings), str(value) if action.nargs != 0 else ""]).strip()
    return f"`{shown}`".replace("|", "\\|")


def _meaning(action: argparse.Action) -> str:
    default = ",".join(action.default) if isinstance(action.default, tuple) else action.default
    return (action.help or "") % {"default": default}


BLOCKS = {"models": models_table, "options": options_tables}


def updated(text: str) -> str:
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        block = make()
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if updated(text) != text:
            stale.append(file.name)
            if not check:
                file.write_text(updated(text), encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/update_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
