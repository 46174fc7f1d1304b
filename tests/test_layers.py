"""The shape of the package: imports go down only, the library never prints, ctypes has one home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nsds_gguf

ROOT = Path(nsds_gguf.__file__).parent

# Lowest first; a module may import from lower lines and its own package only. Packages stand for all their modules.
LAYERS = [
    ["errors"],
    ["system"],
    ["records"],
    ["llamacpp"],
    ["read"],
    ["compute"],
    ["quantize"],
    ["calibration"],
    ["metrics", "sensitivity"],
    ["allocate"],
    ["evaluate"],
    ["session"],
    ["conversion"],
    ["comparison"],
    ["publish"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Checkpoint names appear at the read edge only.
CHECKPOINT_WORDS = ("q_proj", "self_attn", "embed_tokens", "lm_head", "down_proj")

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path):
    """Return the line of LAYERS' table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_units(path):
    """Return the units of our package that a file imports, wherever in it."""
    package = ("nsds_gguf", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = [*base, *(node.module or "").split(".")] if node.module else list(base)
            if full[:1] == ["nsds_gguf"]:
                yield from (
                    [full[1]] if len(full) > 1 else (alias.name for alias in node.names if alias.name != "__version__")
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nsds_gguf."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = unit(path)
    for other in imported_units(path):
        assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_every_module_has_a_layer():
    assert {unit(path) for path in MODULES} == set(LEVEL)


def test_stages_are_called_in_order():
    text = (ROOT / "conversion.py").read_text(encoding="utf-8")
    body = ast.unparse(next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "convert"))
    order = [body.index(word) for word in ("open_model(", "_plans(", "session.write(", "session.verify(")]
    assert order == sorted(order)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ctypes_and_prints_and_foreign_names_stay_home(path):
    text = path.read_text(encoding="utf-8")
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert "print" not in names or unit(path) == "cli"
    assert "import ctypes" not in text or path.name == "ggml.py"
    if unit(path) != "read":
        assert not [word for word in CHECKPOINT_WORDS if word in text]


def test_importing_the_package_is_light():
    """No llama.cpp, no matplotlib, no scipy until they are used."""
    code = "import nsds_gguf.records, sys; print([m for m in ('llama_cpp', 'matplotlib', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
