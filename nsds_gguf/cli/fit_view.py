"""Memory as tables for the terminal: what goes into it, what is left, what fits. Nothing here prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from ..session.fit import SHARE_OF_FREE, Fitted
from ..session.sizes import Sizes
from .display import bytes_text, two_digits


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
    owner = f" ({100 * SHARE_OF_FREE:.0f} % of what is free on {fit.owner})" if fit.owner else ""
    table.add_row(f"in all{owner}", bytes_text(fit.memory_bytes))
    return table


def fits_view(found: Sizes, memories: Sequence[int]) -> RenderableType:
    """Return the largest size that fits each memory with each context, as bits per weight and predicted divergence."""
    table = Table(
        title=f"{found.model_name}: largest size that fits, bpw (divergence)",
        title_justify="left",
    )
    table.add_column("memory", justify="right")
    for context, beside in zip(found.contexts, found.beside, strict=True):
        table.add_column(f"{context.n_ctx} tokens\n+ {bytes_text(beside.total)}", justify="right")
    for memory in memories:
        sizes = [found.largest_that_fits(memory, beside) for beside in found.beside]
        cells = ["-" if size is None else f"{size.target_bpw:g} ({two_digits(size.predicted)})" for size in sizes]
        table.add_row(f"{memory / 1e9:g} GB", *cells)
    cache_type = found.contexts[0].cache_type
    table.caption = f"besides the file: KV cache ({cache_type}), states, buffers and projector"
    table.caption_justify = "left"
    return table
