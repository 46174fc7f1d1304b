"""Figures and cells of docs/quality.md: what is computed of results, and how a number is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quality_statistics import geometric_mean, paired_ratio
from quality_zoo import OURS

Result = Mapping[str, Any]
Cells = Iterable[str]

NO_FIGURE = "–"
NOT_REACHED = "✗"


# --- figures ----------------------------------------------------------------------------------------------------


def rows_of(result: Result, text: str, budget: str, kind: str) -> list[Mapping[str, Any]]:
    """Return the rows of one kind at one budget, one a seed."""
    return [r for r in result["rows"] if (r["text"], r["budget"], r["kind"]) == (text, budget, kind)]


def ratio(result: Result, text: str, budget: str, kind: str, ours: str = OURS) -> tuple[float, float] | None:
    """Return our divergence over that of a kind, over the mean chunk by chunk of several seeds, and its error."""
    mine, others = (rows_of(result, text, budget, name) for name in (ours, kind))
    if not mine or not others:
        return None
    mean = [math.fsum(values) / len(others) for values in zip(*(row["chunks"] for row in others), strict=True)]
    return paired_ratio(mine[0]["chunks"], mean)


def ratios(results: Iterable[Result], text: str, budgets: Iterable[str], kind: str, ours: str = OURS) -> list[float]:
    """Return the ratios that were measured, over models and budgets."""
    budgets = list(budgets)
    found = [ratio(result, text, budget, kind, ours) for result in results for budget in budgets]
    return [pair[0] for pair in found if pair is not None]


def in_group(results: Iterable[Result], group: str) -> list[Result]:
    """Return the results of a group."""
    return [result for result in results if result["group"] == group]


def layer_alphas(result: Result) -> list[float]:
    """Return the sum of measured sensitivities of each layer's tensors."""
    sums = [0.0] * result["model"]["n_layers"]
    for tensor in result["sensitivities"]:
        if tensor["layer"] is not None:
            sums[tensor["layer"]] += alpha(tensor)
    return sums


def alpha(tensor: Mapping[str, Any]) -> float:
    """Return the measured sensitivity of a tensor, at its smallest type."""
    return float(next(iter(tensor["measured"].values()))["alpha"])


# --- cells ------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Cells]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def with_error(pair: tuple[float, float] | None) -> str:
    """Return a ratio and its standard error."""
    return NO_FIGURE if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


def mean_cell(values: Sequence[float]) -> str:
    """Return a geometric mean."""
    return f"{geometric_mean(values):.3f}" if values else NO_FIGURE


def number(value: float | None) -> str:
    """Return a correlation."""
    return NO_FIGURE if value is None or math.isnan(value) else f"{value:.2f}"


def goal_cell(value: float | None, goal: float, strict: bool = False) -> str:
    """Return what was reached beside what had to be, with a mark where it was not."""
    sign = "<" if strict else "≤"
    if value is None:
        return f"{NO_FIGURE} ({sign} {goal:g})"
    missed = value >= goal if strict else value > goal
    return f"{f'**{value:.3f}** {NOT_REACHED}' if missed else f'{value:.3f}'} ({sign} {goal:g})"
