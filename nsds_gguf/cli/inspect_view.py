"""The terminal view of a GGUF: metadata, types by role, bits of each layer, a summary. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..evaluate.inspect import VECTORS, Inspection, Sums
from .display import TYPE_COLOURS

# Colours of bits per weight, darker for more: the viridis scale of ``TYPE_COLOURS``.
_HEAT = ((2.0, "#fde725"), (3.0, "#90d743"), (4.0, "#35b779"), (5.0, "#21918c"), (6.0, "#31688e"), (8.0, "#443983"),
         (16.0, "#8c6bb1"))  # fmt: skip
_DARK = 0.55  # luminance below which letters are white
_LAYERS_A_LINE, _CELL_WIDTH = 10, 7
_KEY_WIDTH = 44  # largest width of the column of keys
_DIGEST_LETTERS = 16
_MIB = 2**20


def inspection_view(found: Inspection) -> RenderableType:
    """Return the whole view, with the summary last, where it stays visible in the terminal.

    Widths adapt to the terminal, and colour alone never carries information.
    """
    parts: list[RenderableType] = [_metadata(found)]
    if found.tensors:
        parts += [_roles(found)]
    parts += [_heat_strip(stack, layers) for stack, layers in found.layers.items()]
    return Group(*parts, _summary(found))


def _summary(found: Inspection) -> Table:
    table = Table(title=Text(_plain(Path(found.path).name), "bold"), title_justify="left", box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _facts(found):
        table.add_row(label, Text(_plain(text)))
    return table


def _facts(found: Inspection) -> list[tuple[str, str]]:
    """Return the lines of the summary."""
    n_layers = sum(len(layers) for layers in found.layers.values())
    size = f"{found.n_weights / 1e6:,.2f}M parameters in {len(found.tensors)} tensors"
    named = [found.name] if found.name else []
    facts = [
        ("model", ", ".join([*named, f"architecture {found.architecture}"])),
        ("size", f"{found.file_bytes / _MIB:,.2f} MiB, {size}" + (f", {n_layers} layers" if n_layers else "")),
    ]
    if found.tensors:
        facts.append(("bits per weight", f"{found.bpw:.4f} of all tensors, {found.quantized_bpw:.4f} of quantized "
                      f"tensors, {found.file_bpw:.4f} of the whole file"))  # fmt: skip
    if len(found.files) + len(found.missing) > 1:
        facts.append(("parts", f"{len(found.files)} of {len(found.files) + len(found.missing)} files, summed up"))
    if found.missing:
        facts.append(("missing", ", ".join(Path(name).name for name in found.missing)))
    return [*facts, *_origin(found.made_by_us)]


def _origin(made: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return how nsds-gguf made the file; nothing for other files."""
    if not made:
        return []
    how = [f"{key} {made[key]}" for key in ("allocator", "metric", "rounding", "calibration", "target") if key in made]
    digests = [
        f"{name} {made[key][:_DIGEST_LETTERS]}…"
        for name, key in (("plan", "plan_sha256"), ("scores", "scores_sha256"))
        if made.get(key, "").strip("0")
    ]
    lines = [("made by", f"nsds-gguf {made.get('version', '')}: {', '.join(how)}")]
    return [*lines, ("digests", ", ".join(digests))] if digests else lines


def _roles(found: Inspection) -> Table:
    """Return a line per role: its tensors by type, their bits per weight and their share of the bytes."""
    table = _plain_table("Types by role")
    for name in ("role", "types"):
        table.add_column(name, no_wrap=name == "role")
    for name in ("bits/weight", "MiB", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = Sums.of(found.tensors)
    for role, sums in found.roles.items():
        style = "dim" if role == VECTORS else ""
        table.add_row(Text(_plain(role), style), _types(sums), *_shares(sums, whole))
    table.add_section()
    table.add_row("all", _types(whole), *_shares(whole, whole))
    return table


def _types(sums: Sums) -> Text:
    return Text(", ").join(
        Text.assemble(f"{count}\N{NO-BREAK SPACE}", (name, f"bold {TYPE_COLOURS.get(name, '')}".strip()))
        for name, count in sums.types.items()
    )


def _shares(sums: Sums, whole: Sums) -> tuple[str, str, str]:
    share = 100 * sums.n_bytes / whole.n_bytes if whole.n_bytes else 0.0
    return f"{sums.bpw:.3f}", f"{sums.n_bytes / _MIB:,.2f}", f"{share:.1f} %"


def _heat_strip(stack: str, layers: Mapping[int, Sums]) -> Text:
    """Return the bits per weight of each layer, ten per line, coloured where the terminal has colours."""
    title = "Bits per weight of each layer" + (f" of {_plain(stack)}" if stack else "")
    columns = "".join(f"{f'+{column}':^{_CELL_WIDTH}}" for column in range(_LAYERS_A_LINE))
    strip = Text.assemble((f"{title}\n\n", "bold"), (f" layer {columns}\n", "bold"))
    for first in range(min(layers) // _LAYERS_A_LINE * _LAYERS_A_LINE, max(layers) + 1, _LAYERS_A_LINE):
        cells = [_cell(layers.get(layer)) for layer in range(first, first + _LAYERS_A_LINE)]
        strip.append(f"{first:6} ").append_text(Text().join(cells)).append("\n")
    return strip


def _cell(sums: Sums | None) -> Text:
    return Text(" " * _CELL_WIDTH) if sums is None else Text(f"{f'{sums.bpw:.2f}':^{_CELL_WIDTH}}", _heat(sums.bpw))


def _heat(bits: float) -> Style:
    """Return the style of a cell: a background interpolated on the scale, and letters that contrast with it."""
    at = min(max(bits, _HEAT[0][0]), _HEAT[-1][0])
    (low, first), (high, second) = next(pair for pair in pairwise(_HEAT) if at <= pair[1][0])
    share = (at - low) / (high - low)
    mixed = [round(a + share * (b - a)) for a, b in zip(_rgb(first), _rgb(second), strict=True)]
    luminance = sum(weight * value / 255 for weight, value in zip((0.299, 0.587, 0.114), mixed, strict=True))
    letters = "#ffffff" if luminance < _DARK else "#000000"
    return Style(color=letters, bgcolor=Color.from_triplet(ColorTriplet(*mixed)))


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def _metadata(found: Inspection) -> Group:
    """Return a line per key, cut at the width of the terminal."""
    width = min(max(map(len, found.metadata), default=0), _KEY_WIDTH)
    lines = [Text(f"{_plain(found.path)}\n", "bold")]
    for key, value in found.metadata.items():
        shown = _plain(f"{value:.7g}" if isinstance(value, float) else str(value))
        lines.append(Text(f" {_plain(key):<{width}}  {shown}", no_wrap=True, overflow="ellipsis"))
    return Group(*lines, Text())


def _plain_table(title: str) -> Table:
    return Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _plain(text: str) -> str:
    """Return text without control characters: line ends become an arrow, others are escaped."""
    shown = text.replace("\r\n", "\n").replace("\n", "⏎")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)
