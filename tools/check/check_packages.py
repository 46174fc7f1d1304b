"""Build wheel and sdist, and check what is in them: all of the package, nothing else, and no model.

    python tools/check/check_packages.py

The wheel must be installable from the sdist alone, so it is built from it, as ``build`` does by itself.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "nsds_gguf"
MAX_BYTES = 1_000_000  # of each; the smallest model of examples/ has nine times that
DATA = {
    f"{PACKAGE}/py.typed",
    f"{PACKAGE}/evaluate/old_curiosity_shop.txt",
    f"{PACKAGE}/publish/page/page.html",
    f"{PACKAGE}/read/architectures/llama_cpp_classes.txt",
}
SDIST_ONLY = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
              "SECURITY.md", "docs/index.md", "docs/demo-scores.png", "setup.py", "native/rounding.h",
              "native/module.cpp"}  # fmt: skip
LIBRARY_SUFFIXES = (".so", ".pyd")
COMPILED = f"{PACKAGE}/quantize/_rounding"  # followed by the name of Python's ABI and system
ELSEWHERE = ("tests/", "examples/", "tools/", ".ci/", ".github/")


def package_files() -> set[str]:
    """Return the files of the package in this tree."""
    found = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file() and "__pycache__" not in path.parts
             and path.suffix not in LIBRARY_SUFFIXES)  # fmt: skip
    return {path.relative_to(ROOT).as_posix() for path in found}


def faults_of_wheel(names: set[str], wanted: set[str]) -> list[str]:
    """Return what is wrong with the files of a wheel."""
    inside = {name for name in names if ".dist-info/" not in name}
    compiled = {name for name in inside if name.startswith(COMPILED) and name.endswith(LIBRARY_SUFFIXES)}
    inside -= compiled
    return (
        ["wheel lacks the compiled rounding"] * (len(compiled) != 1)
        + [f"wheel lacks {name}" for name in sorted(wanted - inside)]
        + [f"wheel holds {name}" for name in sorted(inside - wanted)]
    )


def faults_of_sdist(names: set[str], wanted: set[str]) -> list[str]:
    """Return what is wrong with the files of an sdist; names without the folder that holds them all."""
    lacking = sorted((wanted | SDIST_ONLY) - names)
    foreign = sorted(name for name in names if name.startswith(ELSEWHERE))
    return [f"sdist lacks {name}" for name in lacking] + [f"sdist holds {name}" for name in foreign]


def main() -> int:
    """Build, check, print; return how many faults there are, at most 1."""
    wanted = package_files()
    faults = [f"the tree lacks {name}" for name in sorted(DATA - wanted)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--outdir", folder, str(ROOT)], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            faults += faults_of_wheel(set(archive.namelist()), wanted)
        with tarfile.open(sdist) as archive:
            faults += faults_of_sdist({member.name.partition("/")[2] for member in archive if member.isfile()}, wanted)
        for file in (wheel, sdist):
            n_bytes = file.stat().st_size
            print(f"{file.name}: {n_bytes:,} bytes")
            if n_bytes > MAX_BYTES:
                faults.append(f"{file.name}: {n_bytes:,} bytes; wanted at most {MAX_BYTES:,}")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return min(1, len(faults))


if __name__ == "__main__":
    sys.exit(main())
