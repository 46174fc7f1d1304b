"""The arguments that name a memory to fit, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ModelError, PlanError
from ..evaluate.perplexity import MIN_CTX
from ..llamacpp.gguf_header import is_gguf
from ..llamacpp.memory import CACHE_TYPES
from ..records import AUTO, Fit
from ..session.fit import SHARE_OF_FREE, machine_memory
from .values import argument, integer_from, parse_size

DEFAULTS = Fit(0)

# What ``sizes`` fits the model into: memories of devices that people have, and contexts in tokens.
MEMORIES = tuple(n * 10**9 for n in (4, 6, 8, 12, 16, 24))
CONTEXTS = (4096, 16384, 65536)


def add_fit(parser: argparse.ArgumentParser, has_ctx_size: bool) -> None:
    """Add the arguments; ``has_ctx_size``: the parser has ``--ctx-size`` already."""
    group = parser.add_argument_group("memory")
    group.add_argument("--fit", metavar="N", type=_fit,
                       help="make the largest file that fits a memory, for example 8GB, together with llama.cpp's KV "
                       f"cache, compute buffers and projector; '{AUTO}': {100 * SHARE_OF_FREE:.0f} %% of the free "
                       "memory of the GPU, or of this machine if it has none")  # fmt: skip
    if not has_ctx_size:
        group.add_argument("--ctx-size", metavar="N", type=integer_from(MIN_CTX),
                           help=f"tokens of the context to make room for (default: {DEFAULTS.n_ctx})")  # fmt: skip
    add_cache(group)


def add_cache(group: Any) -> None:
    """Add the arguments of what the memory holds besides the weights."""
    group.add_argument("--cache-type", choices=CACHE_TYPES,
                       help=f"type of the KV cache, as llama.cpp's --cache-type-k and --cache-type-v "
                       f"(default: {DEFAULTS.cache_type})")  # fmt: skip
    group.add_argument("--projector", metavar="FILE", type=Path,
                       help="vision or audio part (mmproj GGUF) that shares the memory")  # fmt: skip


def _fit(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    size: int = argument(parse_size, f"bytes, or with M, G, MiB or GiB, or {AUTO}")(text)
    return size


def fit_of(arguments: argparse.Namespace) -> Fit | None:
    """Return the memory to fit, ``None`` without ``--fit``; raises ``PlanError`` for arguments that need one."""
    asked = getattr(arguments, "fit", None)
    if asked is None:
        for option in ("cache_type", "projector", *(() if hasattr(arguments, "chunks") else ("ctx_size",))):
            if getattr(arguments, option, None) is not None:
                raise PlanError(f"--{option.replace('_', '-')} needs a memory; pass --fit too")
        return None
    memory_bytes, owner = machine_memory() if asked == AUTO else (asked, "")
    return Fit(
        memory_bytes=memory_bytes,
        n_ctx=arguments.ctx_size or DEFAULTS.n_ctx,
        cache_type=arguments.cache_type or DEFAULTS.cache_type,
        projector_bytes=projector_bytes(arguments.projector),
        owner=owner,
    )


def projector_bytes(path: Path | None) -> int:
    """Return the size of a projector; raises ``ModelError`` for a file that is not a GGUF."""
    if path is None:
        return 0
    if not is_gguf(path):
        raise ModelError(f"--projector {path}: not a GGUF file")
    return path.stat().st_size
