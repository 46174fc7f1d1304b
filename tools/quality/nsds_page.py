"""``docs/nsds.md`` from what ``nsds_study.py`` measured: tables alone, nothing is measured here.

python tools/quality/nsds_page.py --work DIR [--page FILE] [--numbers FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsds_priors import LAYERS_ALONE
from nsds_study import ALONE, FACTOR, FISHER, PAPER, RANDOM_ORDER, ROUNDINGS, factor_name
from quality import compact
from quality_figures import NO_FIGURE, table, with_error
from quality_statistics import geometric_mean, paired_ratio
from quality_zoo import NSDS_WEIGHTS, PAPER_METRICS, ROOT

Answer = Mapping[str, Any]
Pair = tuple[float, float]

FORMAT = "nsds-gguf nsds 1"
NOISE = 2.0  # standard errors above 1 from which a factor counts as worse

FACTORS = tuple(
    factor_name(weight, reading) for weight in NSDS_WEIGHTS if weight for reading in ("product", "ratio")
)  # fmt: skip

INTRO = """# NSDS

What the layer scores of NSDS are worth, by the divergence of files of equal bytes from the original. Made by
`tools/quality/nsds_study.py` and `tools/quality/nsds_page.py`; the numbers are in [nsds.json](nsds.json). KLD is the
mean KL divergence in nats per token. Ratios are over the same tokens, with the standard error of the paired chunks;
below 1 is better. All files of a table differ in types only: rounding, calibration and channel equalization are the
same.

The readings of structural expressiveness are the product of spectral magnitude and effective rank, and their ratio, as
in the released code."""

PAPER_TEXT = """## The paper's allocation

Whole layers at Q2_K or Q4_K so that their mean is 2.5, 3 or 3.5 bits, embedding and output at Q4_K, round-to-nearest.
Each metric over the mean of random orders of the layers; *knapsack* is the default allocation of tensors at those
bytes. Metrics that choose the same layers have the same file."""

FACTOR_TEXT = """## A factor on Fisher sensitivities

`exp(g (S - mean S))` on the sensitivities of a layer's tensors, weight g and reading of SE, over the plan without
(g = 0): geometric means over budgets."""

PREDICTED_TEXT = """What these plans cost by the Fisher sensitivities themselves (sum of sensitivity times error), over
the plan without factor: by that measure a factor can only lose."""

ALONE_TEXT = """## Without the Fisher pass

Sensitivities from the role of a tensor (geometric means of measured ones over five trained models), times
`exp(g (S - mean S))`, S of the layer or of the component that the tensor belongs to, over the plan by Fisher
sensitivities, round-to-nearest: geometric means over budgets. *Flat* gives all tensors the same sensitivity."""


def answers(work: Path) -> list[dict[str, Any]]:
    """Return what was measured, models in the order of their size."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*/*-*.json"))
             if re.fullmatch(f"({PAPER}|{FACTOR}|{ALONE})-({'|'.join(ROUNDINGS)})", path.stem)]  # fmt: skip
    with_rows = [answer for answer in found if answer["rows"]]
    return sorted(with_rows, key=lambda answer: (answer["group"] != "trained zoo", answer["n_weights"]))


def about(found: Iterable[Answer], question: str) -> list[Answer]:
    """Return the answers to a question."""
    return [answer for answer in found if answer["rows"][0]["question"] == question]


def budgets(answer: Answer) -> list[str]:
    """Return the budgets of an answer, in order."""
    return list(dict.fromkeys(row["budget"] for row in answer["rows"]))


def chunks(answer: Answer, budget: str, kind: str) -> list[float] | None:
    """Return the divergence by chunk of one kind, the mean over those whose name begins so."""
    rows = [row["chunks"] for row in answer["rows"] if row["budget"] == budget and is_kind(row["kind"], kind)]
    return [math.fsum(values) / len(rows) for values in zip(*rows, strict=True)] if rows else None


def is_kind(name: str, kind: str) -> bool:
    """Return whether a row is of a kind: a random order of any seed is."""
    return name == kind or (kind == RANDOM_ORDER and name.startswith(kind))


def ratio(answer: Answer, budget: str, kind: str, over: str) -> Pair | None:
    """Return the divergence of one kind over that of another, and its error."""
    ours, others = chunks(answer, budget, kind), chunks(answer, budget, over)
    return None if ours is None or others is None else paired_ratio(ours, others)


def mean_ratio(pairs: Iterable[Pair | None]) -> Pair | None:
    """Return the geometric mean of ratios and its error, as if their errors were independent."""
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return None
    mean = geometric_mean([value for value, _ in known])
    return mean, mean * math.sqrt(math.fsum((error / value) ** 2 for value, error in known)) / len(known)


# --- tables -----------------------------------------------------------------------------------------------------------


def models_table(found: Sequence[Answer]) -> str:
    """Return the models, and what they were measured on."""
    rows = {
        (
            a["name"],
            a["group"],
            f"{a['n_weights'] / 1e6:.1f} M",
            str(a["n_layers"]),
            a["text"],
            str(a["n_chunks"]),
        ): None
        for a in found
    }
    return table(("model", "group", "weights", "layers", "text", "chunks of 512"), rows)


def paper_table(found: Sequence[Answer]) -> str:
    """Return metrics over random orders, by model and mean bits, and their geometric means by group."""
    kinds = (*PAPER_METRICS, FISHER)
    rows = []
    for answer in found:
        for budget in budgets(answer):
            random = chunks(answer, budget, RANDOM_ORDER) or []
            bpw = next(row["bpw"] for row in answer["rows"] if row["budget"] == budget)
            cells = [with_error(ratio(answer, budget, kind, RANDOM_ORDER)) for kind in kinds]
            rows.append((answer["name"], budget, f"{bpw:.3f}", f"{math.fsum(random) / len(random):.4f}", *cells))
    for group, members in grouped(found):
        cells = [with_error(mean_ratio(ratio(a, b, kind, RANDOM_ORDER) for a in members for b in budgets(a)))
                 for kind in kinds]  # fmt: skip
        rows.append((f"**{group}**", "all", NO_FIGURE, NO_FIGURE, *cells))
    return table(("model", "mean bits", "bpw", "random orders: KLD", *kinds), rows)


def factor_table(found: Sequence[Answer]) -> str:
    """Return factors over no factor, by model and rounding."""
    head = ("model", "rounding", "bpw", *(f"g = {name}" for name in FACTORS))
    rows = []
    for answer in found:
        cells = [with_error(mean_ratio(ratio(answer, b, name, "0") for b in budgets(answer))) for name in FACTORS]
        rows.append((answer["name"], answer["rows"][0]["rounding"], ", ".join(budgets(answer)), *cells))
    return table(head, rows)


def classes_table(found: Sequence[Answer]) -> str:
    """Return factors over no factor by group and rounding, those marked that are worse beyond noise."""
    rows = []
    for rounding in ROUNDINGS:
        for group, members in grouped([a for a in found if a["rows"][0]["rounding"] == rounding]):
            pairs = [class_ratio(members, name) for name in FACTORS]
            rows.append((group, rounding, *(f"**{with_error(p)}**" if is_worse(p) else with_error(p) for p in pairs)))
    return table(("models", "rounding", *(f"g = {name}" for name in FACTORS)), rows)


def predicted_table(found: Sequence[Answer]) -> str:
    """Return the predicted divergence with factors over that without, by model and rounding."""
    rows = []
    for answer in found:
        values = {(row["budget"], row["kind"]): row["predicted"] for row in answer["rows"]}
        cells = [
            f"{geometric_mean([values[b, name] / values[b, '0'] for b in budgets(answer)]):.3f}"
            if all((b, name) in values for b in budgets(answer))
            else NO_FIGURE
            for name in FACTORS
        ]
        rows.append((answer["name"], answer["rows"][0]["rounding"], *cells))
    return table(("model", "rounding", *(f"g = {name}" for name in FACTORS)), rows)


def class_ratio(members: Sequence[Answer], name: str) -> Pair | None:
    """Return the mean over a class of a factor over none; ``None`` unless all its models were measured with it."""
    pairs = [ratio(a, b, name, "0") for a in members for b in budgets(a)]
    return None if None in pairs else mean_ratio(pairs)


def is_worse(pair: Pair | None) -> bool:
    """Return whether a ratio is above 1 by more than its noise."""
    return pair is not None and pair[0] - NOISE * pair[1] > 1


def largest_harmless(found: Sequence[Answer], reading: str) -> float:
    """Return the largest weight that was measured on every class of models and is worse on none beyond noise.

    No smaller weight is worse either.
    """
    classes = [members for rounding in ROUNDINGS
               for _, members in grouped([a for a in found if a["rows"][0]["rounding"] == rounding])]  # fmt: skip
    largest = 0.0
    for weight in NSDS_WEIGHTS[1:]:
        pairs = [class_ratio(members, factor_name(weight, reading)) for members in classes]
        if any(is_worse(pair) for pair in pairs):
            break
        if None not in pairs:
            largest = weight
    return largest


def alone_table(found: Sequence[Answer]) -> str:
    """Return priors over Fisher sensitivities, by model."""
    rows = []
    for answer in found:
        cells = [
            with_error(mean_ratio(ratio(answer, b, name, FISHER) for b in budgets(answer))) for name in LAYERS_ALONE
        ]
        rows.append((answer["name"], ", ".join(budgets(answer)), *cells))
    for group, members in grouped(found):
        cells = [with_error(mean_ratio(ratio(a, b, name, FISHER) for a in members for b in budgets(a)))
                 for name in LAYERS_ALONE]  # fmt: skip
        rows.append((f"**{group}**", NO_FIGURE, *cells))
    return table(("model", "bpw", *LAYERS_ALONE), rows)


def grouped(found: Sequence[Answer]) -> Iterator[tuple[str, list[Answer]]]:
    """Yield groups of models with their answers."""
    for group in dict.fromkeys(answer["group"] for answer in found):
        yield group, [answer for answer in found if answer["group"] == group]


def page(found: Sequence[Answer]) -> str:
    """Return the whole page."""
    factors = about(found, FACTOR)
    weights = {reading: largest_harmless(factors, reading) for reading in ("product", "ratio")}
    verdict = (
        f"By class of models; bold is worse by more than {NOISE:g} standard errors. Largest weight measured on every "
        f"class and worse on none: {weights['product']:g} by the product, {weights['ratio']:g} by the ratio."
    )
    parts = [
        INTRO,
        models_table(found),
        PAPER_TEXT,
        paper_table(about(found, PAPER)),
        FACTOR_TEXT,
        factor_table(factors),
        verdict,
        classes_table(factors),
        PREDICTED_TEXT,
        predicted_table(factors),
        ALONE_TEXT,
        alone_table(about(found, ALONE)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="of nsds_study.py")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "nsds.md")
    parser.add_argument("--numbers", type=Path, default=ROOT / "docs" / "nsds.json")
    arguments = parser.parse_args()
    found = answers(arguments.work)
    arguments.page.write_text(page(found), encoding="utf-8")
    arguments.numbers.write_text(compact({"format": FORMAT, "answers": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
