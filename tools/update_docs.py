"""Write the generated blocks of the documentation: supported models, options, exit codes.

    python tools/update_docs.py [--check]

A block stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. With ``--check`` nothing is written and
a block that is out of date is an error.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path

import numpy as np

import nsds_gguf
from nsds_gguf.cli import EXIT_CODES, build_parser
from nsds_gguf.read.architectures.families import FAMILIES, TEXT_MODELS, WRAPPERS, find_family
from nsds_gguf.read.architectures.family import Family
from nsds_gguf.read.architectures.projectors import PROJECTORS

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

from zoo_specs import SPECS

PACKAGE = Path(nsds_gguf.__file__).parent
FILES = tuple(ROOT / "docs" / name for name in ("models.md", "vision.md", "cli.md", "architecture.md"))


def models_table() -> str:
    """Return the families, a line each, and the multimodal classes whose language model is taken."""
    lines = ["| models | class | llama.cpp architecture | rope scaling | checked |", "|---|---|---|---|---|"]
    for family in sorted(FAMILIES, key=lambda family: family.example.lower()):
        classes = ", ".join(f"`{name}`" for name in family.classes)
        kinds = ", ".join(kind for kind in family.rope_kinds if kind != "default") or "none"
        lines.append(f"| {family.example} | {classes} | {family.architecture} | {kinds} | {_checked(family)} |")
    wrappers = ", ".join(f"`{name}`" for name in sorted(WRAPPERS))
    within = ", ".join(sorted({find_family(name).architecture for name in TEXT_MODELS.values()}))
    lines += ["", f"Of multimodal models ({wrappers}) the language model is taken, when it is one of: {within}."]
    return "\n".join(lines)


def projectors_table() -> str:
    """Return the vision parts, a line each."""
    lines = ["| for example | class | encoder | llama.cpp projector |", "|---|---|---|---|"]
    for family in PROJECTORS:
        classes, encoders = (", ".join(f"`{name}`" for name in names) for names in (family.classes, family.encoders))
        lines.append(f"| {family.example} | {classes} | {encoders} | {family.kind} |")
    return "\n".join(lines)


def _checked(family: Family) -> str:
    """Return what the classes of a family were compared with, from what the tests have recorded of that."""
    names = [name for name, spec in SPECS.items() if spec.source_class in family.classes]
    logits = {entry.split("/")[0] for entry in np.load(TESTS / "golden" / "logits.npz")}
    converter = json.loads((TESTS / "golden" / "converter.json").read_text(encoding="utf-8"))
    checks = {"logits": logits, "converter": converter}
    return ", ".join(check for check, recorded in checks.items() if any(name in recorded for name in names))


def module_tree() -> str:
    """Return every module with the first sentence of its docstring, packages first."""
    lines = ["```text", "nsds_gguf/"]
    for path in sorted(PACKAGE.rglob("*.py"), key=_tree_order):
        parts = path.relative_to(PACKAGE).parts
        is_package = parts[-1] == "__init__.py"
        depth, name = len(parts) - is_package, f"{parts[-2]}/" if is_package and len(parts) > 1 else parts[-1]
        lines.append(f"{'  ' * max(depth, 1) + name:<28} {_summary(path)}".rstrip())
    return "\n".join([*lines, "```"])


def _tree_order(path: Path) -> list[tuple[int, str]]:
    """Return what sorts a package's own line before its modules, and its subpackages behind them."""
    *folders, name = path.relative_to(PACKAGE).parts
    return [(2, folder) for folder in folders] + [(0 if name == "__init__.py" else 1, name)]


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0].rstrip(".")


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


BLOCKS = {"models": models_table, "projectors": projectors_table, "options": options_tables, "tree": module_tree}


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
