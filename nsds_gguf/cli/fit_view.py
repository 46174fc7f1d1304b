"""Memory as a table for the terminal: what goes into it, and what is left. Nothing here prints."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from ..session.fit import Fitted
from .display import bytes_text


def memory_view(found: Fitted) -> RenderableType:
    """Return what a memory holds, a row per part."""
    fit, memory = found.fit, found.memory
    table = Table(title=f"memory with {fit.n_ctx} tokens of context", title_justify="left", min_width=40)
    table.add_column("")
    table.add_column("", justify="right")
    for name, n_bytes in (
        ("weights (the file)", memory.weights),
        (f"KV cache ({fit.cache_type})", memory.attention_cache),
        ("recurrent states", memory.states),
        ("compute buffers", memory.compute + memory.output),
        ("projector", memory.projector),
    ):
        if n_bytes:
            table.add_row(name, bytes_text(n_bytes))
    table.add_section()
    table.add_row("left", bytes_text(found.left_bytes))
    table.add_row("in all", bytes_text(fit.memory_bytes))
    return table
