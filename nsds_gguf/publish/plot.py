"""Plots of layer scores with their components, of comparisons, and of sizes. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlanError
from ..metrics.stats import robust_z, sigmoid
from ..records import Float64, LayerScore, Scores
from ..records.comparison import OURS, PAPER, PRESET, RANDOM, RANDOM_FIXED, UNIFORM, Comparison
from ..session.sizes import Sizes
from ..system.atomic import small_file

FORMATS = (".png", ".svg", ".pdf")

_COMPONENT_NAMES = {"qk": "QK", "ov": "OV", "gate": "gate", "up": "up", "down": "down", "rest": "rest"}
# The colour-blind palette of Okabe and Ito, and markers that need no colour.
_KINDS = {
    OURS: ("#0072b2", "o"),
    PRESET: ("#d55e00", "s"),
    PAPER: ("#cc79a7", "D"),
    UNIFORM: ("#009e73", "^"),
    RANDOM: ("#999999", "x"),
    RANDOM_FIXED: ("#555555", "+"),
}
_INCHES_PER_LAYER, _MIN_INCHES, _MAX_INCHES = 0.28, 7.0, 24.0


def check_plot(path: Path) -> None:
    """Raise ``PlanError`` when the name has another ending than ``FORMATS``, or matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise PlanError(f"--plot {path}: wanted a name ending in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlanError("--plot needs matplotlib; run: pip install 'nsds-gguf[plot]'")


def plot_scores(scores: Scores, path: Path) -> None:
    """Plot layer scores to a file.

    For ``nsds`` the lower half shows each component relative to the other layers, ``sigmoid(z)`` in [0, 1], for
    numerical vulnerability and structural expressiveness: the numbers that the score combines.

    Raises:
        PlanError: matplotlib is missing, or the file's ending is not in ``FORMATS``.
        OutputError: the file cannot be written.

    """
    check_plot(path)
    from matplotlib.figure import Figure

    components = [name for name in _COMPONENT_NAMES if any(name in layer.nv for layer in scores.layers)]
    width = min(max(_MIN_INCHES, 2.5 + _INCHES_PER_LAYER * len(scores.layers)), _MAX_INCHES)
    n_rows = 3 if components else 1
    figure = Figure(figsize=(width, 6.4 if components else 3.2), layout="constrained")
    figure.suptitle(f"{scores.model_name}: sensitivity by layer (higher = more sensitive)", x=0.02, ha="left")
    grid = figure.subplots(n_rows, 1, sharex=True, squeeze=False, height_ratios=[2, 1, 1][:n_rows])[:, 0]
    _draw_bars(grid[0], scores)
    if components:
        image = _draw_standing(grid[1], "NV", components, [layer.nv for layer in scores.layers])
        _draw_standing(grid[2], "SE", components, [layer.se for layer in scores.layers])
        figure.colorbar(image, ax=list(grid[1:]), label="standing among layers", shrink=0.9)
    grid[-1].set_xlabel("layer")
    with small_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def plot_comparison(found: Comparison, path: Path) -> None:
    """Plot divergence against bytes for every file of a comparison; a line joins ours, the Pareto front.

    Raises the errors of ``plot_scores``.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    for kind, (colour, marker) in _KINDS.items():
        rows = sorted((row for row in found.rows if row.kind == kind), key=lambda row: row.tensor_bytes)
        if rows:
            axes.errorbar(
                [row.tensor_bytes / 2**20 for row in rows],
                [row.kld for row in rows],
                yerr=[row.kld_error for row in rows],
                color=colour, marker=marker, ms=6, lw=1.5 if kind == OURS else 0, elinewidth=1, capsize=2,
                label="ours" if kind == OURS else kind,
            )  # fmt: skip
    for row in found.rows:
        if row.kind == PRESET:
            axes.annotate(row.budget, (row.tensor_bytes / 2**20, row.kld), textcoords="offset points", xytext=(6, 4))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tensors, MiB")
    axes.set_ylabel("mean KL divergence from the original, nats per token")
    axes.set_title(f"{found.model_name}: lower left is better", loc="left")
    axes.legend(frameon=False)
    axes.grid(which="both", axis="y", color="#dddddd", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    with small_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def plot_sizes(found: Sizes, memories: Sequence[int], path: Path) -> None:
    """Plot the predicted divergence of every size against its bytes, and below it how large a file each memory holds.

    Raises the errors of ``plot_scores``.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.6 if found.beside else 4.2), layout="constrained")
    heights = [3, 1.5] if found.beside else [1]
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes = grid[0]
    bytes_of = [size.file_bytes / 1e9 for size in found.sizes]
    axes.plot(bytes_of, [size.predicted for size in found.sizes], color="#0072b2", marker="o", ms=6, lw=1.5)
    for size, x in zip(found.sizes, bytes_of, strict=True):
        axes.annotate(f"{size.target_bpw:g}", (x, size.predicted), textcoords="offset points", xytext=(4, 6))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("predicted KL divergence,\nnats per token" if found.in_nats else "predicted divergence,\nrelative")
    axes.set_title(f"{found.model_name}: possible sizes", loc="left")
    axes.grid(which="both", axis="y", color="#dddddd", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if found.beside:
        _draw_rooms(grid[1], found, memories, axes.get_xlim())
    grid[-1].set_xlabel("file, GB (labels: bits per weight)")
    with small_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def _draw_rooms(axes: Any, found: Sizes, memories: Sequence[int], limits: tuple[float, float]) -> None:
    """Draw a row per memory: what it leaves for the file in each context; markers beyond the curve stay at its edge."""
    rows = range(len(memories))
    for context, beside, marker in zip(found.contexts, found.beside, "o^sDv", strict=False):
        rooms = [(memory - beside.total) / 1e9 for memory in memories]
        axes.plot(np.clip(rooms, *limits), rows, marker, color="#009e73", ms=6, clip_on=False,
                  label=f"{context.n_ctx} tokens", fillstyle="full" if marker == "o" else "none")  # fmt: skip
    axes.set_xlim(limits)
    axes.set_yticks(rows, [f"{memory / 1e9:g} GB" for memory in memories])
    axes.set_ylim(len(memories) - 0.5, -0.5)
    axes.grid(axis="y", color="#dddddd", lw=0.5)
    axes.legend(frameon=False, ncols=len(found.contexts), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Any, scores: Scores) -> None:
    layers: Sequence[LayerScore] = scores.layers
    numbers = [layer.layer for layer in layers]
    axes.bar(numbers, [layer.score for layer in layers], color="#35b779", label="score S")
    for name, values, marker in (
        ("P_NV", [layer.p_nv for layer in layers], "o"),
        ("P_SE", [layer.p_se for layer in layers], "s"),
    ):
        if any(value is not None for value in values):
            axes.plot(
                numbers,
                [np.nan if value is None else value for value in values],
                marker,
                color="#31688e" if name == "P_NV" else "#440154",
                label=name,
                ms=4,
            )
    if any(layer.p_nv is not None for layer in layers):
        axes.set_ylim(0, 1.03)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False)
    axes.set_ylabel(scores.recipe.metric or "")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_standing(axes: Any, title: str, components: Sequence[str], raw: Sequence[Mapping[str, float]]) -> Any:
    rows = [_standing(np.array([values.get(name, np.nan) for values in raw])) for name in components]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(components)), [_COMPONENT_NAMES[name] for name in components])
    axes.set_ylabel(title)
    return image


def _standing(values: Float64) -> Float64:
    known = np.isfinite(values)
    out = np.full(len(values), np.nan)
    if known.any():
        out[known] = sigmoid(robust_z(values[known]))
    return out
