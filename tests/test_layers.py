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

# The modules that may be long: tables, an entry per model family.
TABLES = [ROOT / "read" / "architectures" / name for name in ("projectors.py",)]

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
    bodies = {n.name: ast.unparse(n) for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    stages = {"convert": ("open_model(", "_plans(", "_written("), "_written": ("session.write(", "session.verify(")}
    for name, words in stages.items():
        order = [bodies[name].index(word) for word in words]
        assert order == sorted(order)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ctypes_and_prints_and_foreign_names_stay_home(path):
    text = path.read_text(encoding="utf-8")
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert "print" not in names or unit(path) == "cli"
    assert "import ctypes" not in text or path.name in ("ggml.py", "graph.py")
    if unit(path) != "read":
        assert not [word for word in CHECKPOINT_WORDS if word in text]


def test_the_top_floor_has_at_most_20_entries():
    assert len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_signatures_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500 or path in TABLES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = parameters(node.args)
            assert len(names) <= 7, f"{node.name} has {len(names)} parameters: {', '.join(names)}"


def parameters(arguments):
    """Return the names of a function's parameters, without the object or class that a method is called on."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [each.arg for each in every if each is not None and each.arg not in ("self", "cls")]


def test_no_import_cycles():
    """Imports within functions count; those for types alone do not."""
    imports = {module_name(path): set(imported_modules(path)) for path in ROOT.rglob("*.py")}
    assert imports["nsds_gguf.conversion"] > {"nsds_gguf.errors", "nsds_gguf.session.session"}
    assert cycle(imports) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == ["a", "b", "c", "a"]


def module_name(path):
    """Return the dotted name of a module; a package's is that of its folder."""
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path):
    """Return the modules of our package that a module imports."""
    package = path.relative_to(ROOT.parent).parent.parts
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in NAMES else base


NAMES = {module_name(path) for path in ROOT.rglob("*.py")}


def cycle(imports):
    """Return a path of imports that ends where it began, or ``None``."""
    done = set()

    def follow(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        done.add(name)
        imported = sorted(imports.get(name, ()))  # compiled modules import none of ours
        return next(filter(None, (follow(other, [*trail, name]) for other in imported)), None)

    return next(filter(None, (follow(name, []) for name in sorted(imports))), None)


def test_importing_the_package_is_light():
    """No llama.cpp, no matplotlib, no scipy until they are used."""
    code = "import nsds_gguf.records, sys; print([m for m in ('llama_cpp', 'matplotlib', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
