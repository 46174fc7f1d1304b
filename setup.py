"""Builds the compiled rounding; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

# -ffp-contract=off: sums have the order and the roundings that the source gives them
GCC = "-std=c++17 -O3 -g0 -ffp-contract=off -fno-math-errno -fvisibility=hidden -Wno-psabi -Wno-maybe-uninitialized"
MSVC = "/std:c++17 /O2 /fp:precise"

setup(
    ext_modules=[
        Extension(
            "nsds_gguf.quantize._rounding",
            sources=[f"native/{name}.cpp" for name in ("module", "rounding_avx512", "rounding_avx2", "rounding_plain")],
            depends=sorted(map(str, Path("native").glob("*.h"))),
            extra_compile_args=(MSVC if sys.platform == "win32" else GCC).split(),
            language="c++",
        )
    ]
)
