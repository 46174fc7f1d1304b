"""``docs/quality.md`` from what was measured: tables alone, nothing is measured here.

A *result* is what ``quality_model.ModelBench.run`` returns, a plain dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quality_figures import (
    NO_FIGURE,
    NOT_REACHED,
    Result,
    alpha,
    goal_cell,
    in_group,
    layer_alphas,
    mean_cell,
    number,
    ratio,
    ratios,
    rows_of,
    table,
    with_error,
)
from quality_statistics import geometric_mean, log_correlation, paired_ratio, rank_correlation
from quality_zoo import (
    BUDGET_CLASSES,
    BUDGETS,
    GROUPS,
    NSDS_WEIGHTS,
    ORACLE,
    OURS,
    OUTLIER,
    OUTLIER_GOAL,
    PAPER_BITS,
    PAPER_METRICS,
    PLAIN_GOALS,
    PLAIN_HELD_OUT,
    PLAIN_WORST,
    RANDOM,
    RTN,
    STOCK,
    STOCK_IMATRIX,
    UNIFORM,
    UNIFORM_GOAL,
    UNIFORM_TYPES,
    VARIANTS,
    ZOO,
)

ROLES = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")


# --- tables -----------------------------------------------------------------------------------------------------


def zoo_table(results: Sequence[Result]) -> str:
    """Return the table of the models."""
    head = ("model", "group", "parameters", "layers", "width", "ffn", "heads / KV", "vocabulary", "output", "about")
    rows = []
    for result in results:
        m = result["model"]
        heads = f"{m['n_heads']} / {m['n_kv_heads']}" + (", q/k norms" if m["qk_norm"] else "")
        shape = (str(m[name]) for name in ("n_layers", "n_embd", "n_ff"))
        rows.append((result["name"], result["group"], f"{m['n_weights'] / 1e6:.1f} M", *shape, heads,
                     str(m["n_vocab"]), "tied" if m["tied"] else "untied", result["about"]))  # fmt: skip
    return table(head, rows)


def goals_table(results: Sequence[Result], text: str, ours: str = OURS) -> str:
    """Return goals and results, group by group; for another variant as ``ours``, over the presets alone."""
    rows = []
    for group in GROUPS[:2]:
        members = in_group(results, group)
        for kind, goals in PLAIN_GOALS.items():
            if ours != OURS and kind not in (STOCK, STOCK_IMATRIX):
                continue
            cells = [
                goal_cell(_mean(ratios(members, text, BUDGET_CLASSES[name], kind, ours)), goal)
                for name, goal in goals.items()
            ]
            worst = NO_FIGURE
            if kind in PLAIN_WORST:
                limit = PLAIN_WORST[kind]
                worst = goal_cell(max(ratios(members, text, BUDGETS, kind, ours), default=None), limit, limit == 1)
            rows.append((group, kind, *cells, worst))
        if ours != OURS:
            continue
        found = ratios(members, text, uniform_budgets(), UNIFORM)
        worst = goal_cell(max(found, default=None), UNIFORM_GOAL, strict=True)
        rows.append((group, "uniform, at its bytes", f"{mean_cell(found)} over {', '.join(UNIFORM_TYPES)}",
                     NO_FIGURE, NO_FIGURE, worst))  # fmt: skip
    members = in_group(results, OUTLIER)
    cells = [
        goal_cell(_mean(ratios(members, text, presets, STOCK_IMATRIX, ours)), OUTLIER_GOAL)
        for presets in BUDGET_CLASSES.values()
    ]
    rows.append((OUTLIER, STOCK_IMATRIX, *cells, f"{_worst(ratios(members, text, BUDGETS, STOCK_IMATRIX, ours))}"))
    classes = [f"{name}: {', '.join(presets)}" for name, presets in BUDGET_CLASSES.items()]
    return table(("models", "ours over", *classes, "worst single case"), rows)


def uniform_budgets() -> list[str]:
    """Return the names of the budgets of uniform types."""
    return [f"{UNIFORM} {name}" for name in UNIFORM_TYPES]


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


def _worst(values: Sequence[float]) -> str:
    return f"{max(values):.3f}" if values else NO_FIGURE


def main_table(results: Sequence[Result], text: str, ours: str = OURS) -> str:
    """Return every model at every budget, for one variant of ours."""
    kinds = (STOCK, STOCK_IMATRIX, ORACLE, RANDOM) if ours == OURS else (STOCK, STOCK_IMATRIX, OURS)
    over = [f"over {kind}" for kind in kinds]
    head = ("model", "budget", "bpw", "preset KLD", *over, "perplexity: original, preset, this")
    rows = []
    for result in results:
        for budget in BUDGETS:
            stock, mine = (rows_of(result, text, budget, kind) for kind in (STOCK, ours))
            if not stock or not mine:
                continue
            pairs = [with_error(ratio(result, text, budget, kind, ours)) for kind in kinds]
            ppl = f"{mine[0]['original_ppl']:.2f}, {stock[0]['ppl']:.2f}, {mine[0]['ppl']:.2f}"
            kld = f"{stock[0]['kld']:.5f} ± {stock[0]['kld_error']:.5f}"
            rows.append((result["name"], budget, f"{mine[0]['bpw']:.3f}", kld, *pairs, ppl))
    return table(head, rows)


def groups_table(results: Sequence[Result], text: str, kind: str) -> str:
    """Return geometric means of our divergence over that of a kind, by group and budget."""
    rows = []
    for group in GROUPS:
        members = in_group(results, group)
        cells = [mean_cell(ratios(members, text, (budget,), kind)) for budget in BUDGETS]
        rows.append((f"{group} ({len(members)})", *cells, mean_cell(ratios(members, text, BUDGETS, kind))))
    return table((f"ours over {kind}", *BUDGETS, "all"), rows)


def variants_table(results: Sequence[Result], text: str) -> str:
    """Return geometric means over a group of each variant of ours over the default one."""
    names = [variant.name for variant in VARIANTS if variant.name != OURS]
    rows = [
        (group, name, *(mean_cell(ratios(in_group(results, group), text, (b,), OURS, name)) for b in BUDGETS),
         mean_cell(ratios(in_group(results, group), text, BUDGETS, OURS, name)))
        for group in GROUPS for name in names
    ]  # fmt: skip
    return table(("models", "over the default", *BUDGETS, "all"), rows)


def uniform_table(results: Sequence[Result], text: str) -> str:
    """Return ours at the bytes of one type for all, over it."""
    rows = [
        (result["name"], *(with_error(ratio(result, text, budget, UNIFORM)) for budget in uniform_budgets()))
        for result in results
    ]
    return table(("ours over uniform", *UNIFORM_TYPES), rows)


def sensitivity_table(results: Sequence[Result]) -> str:
    """Return how predicted and measured sensitivities correlate: over all tensors, then within roles."""
    head = ("model", "log, all", "rank, all", "layer sums", *ROLES[1:-1], "stream / output, over predicted")
    rows = []
    for result in results:
        tensors = result["sensitivities"]
        predicted, measured = [t["predicted"] for t in tensors], [alpha(t) for t in tensors]
        sums = [0.0] * result["model"]["n_layers"]
        for t in tensors:
            if t["layer"] is not None:
                sums[t["layer"]] += t["predicted"]
        roles = [number(_within_role(tensors, role)) for role in ROLES[1:-1]]
        layers = rank_correlation(sums, layer_alphas(result))
        rows.append((result["name"], number(log_correlation(predicted, measured)),
                     number(rank_correlation(predicted, measured)), number(layers),
                     *roles, number(_stream_factor(tensors))))  # fmt: skip
    return table(head, rows)


def _within_role(tensors: Sequence[Mapping[str, Any]], role: str) -> float | None:
    of_role = [t for t in tensors if t["role"] == role]
    return rank_correlation([t["predicted"] for t in of_role], [alpha(t) for t in of_role])


def _stream_factor(tensors: Sequence[Mapping[str, Any]]) -> float | None:
    """Return measured over predicted of the layers' tensors, in units of the output's; ``None`` without an output."""
    output = [t for t in tensors if t["role"] == "output"]
    inside = [t for t in tensors if t["layer"] is not None]
    if not output or not inside:
        return None
    factors = [alpha(t) / t["predicted"] for t in inside]
    return geometric_mean(factors) / (alpha(output[0]) / output[0]["predicted"])


def role_table(results: Sequence[Result]) -> str:
    """Return measured over predicted sensitivity by role, geometric means over the layers."""
    rows = []
    for result in results:
        cells = []
        for role in ROLES:
            factors = [alpha(t) / t["predicted"] for t in result["sensitivities"] if t["role"] == role]
            cells.append(mean_cell(factors))
        rows.append((result["name"], *cells))
    return table(("measured over predicted", *ROLES), rows)


def linearity_table(results: Sequence[Result]) -> str:
    """Return the sensitivity at the second type over that at the first, by role; nothing where one was measured."""
    rows = []
    for result in results:
        found = [(t["role"], [m["alpha"] for m in t["measured"].values()]) for t in result["sensitivities"]]
        twice = [(role, values[1] / values[0]) for role, values in found if len(values) > 1]
        if twice:
            rows.append((result["name"], *(mean_cell([x for role, x in twice if role == name]) for name in ROLES)))
    caption = (
        "Sensitivity at the second type over that at the first, geometric means over layers; 1 where it is linear:"
    )
    return f"{caption}\n\n{table(('model', *ROLES), rows)}" if rows else ""


def additivity_table(results: Sequence[Result], text: str) -> str:
    """Return measured divergence over the sum of single tensors' errors times sensitivities, by budget."""
    rows = []
    for result in results:
        for kind in (OURS, ORACLE, RANDOM):
            cells = []
            for budget in BUDGETS:
                found = rows_of(result, text, budget, kind)
                cells.append(mean_cell([row["kld"] / row["expected"] for row in found]))
            rows.append((result["name"], kind, *cells))
    return table(("model", "plan", *BUDGETS), rows)


# Columns of the table of NSDS: what of a layer's scores is compared.
Reading = Callable[[Mapping[str, Any]], float | None]
COMPONENTS = ("qk", "ov", "gate", "up", "down")


def nsds_table(results: Sequence[Result]) -> str:
    """Return rank correlations of NSDS's parts with the layers' measured sensitivities."""
    columns: dict[str, Reading] = {}
    for name in COMPONENTS:
        for part, label in (("nv", "NV"), ("se_ratio", "SE ratio"), ("se_product", "SE product")):
            columns[f"{label} {name}"] = lambda layer, part=part, name=name: layer[part].get(name)  # type: ignore[misc]
    for key, label in (("p_nv", "P_NV"), ("p_se_ratio", "P_SE ratio"), ("p_se_product", "P_SE product"),
                       ("s_ratio", "S ratio"), ("s_product", "S product")):  # fmt: skip
        columns[label] = lambda layer, key=key: layer[key]  # type: ignore[misc]
    rows = []
    for label, read in columns.items():
        cells = []
        for result in results:
            values = [read(layer) for layer in result["layers"]]
            known = [] if any(value is None for value in values) else values
            cells.append(number(rank_correlation(known, layer_alphas(result))) if known else NO_FIGURE)
        rows.append((label, *cells))
    return table(("rank correlation with layer sums", *(result["name"] for result in results)), rows)


def regret_table(results: Sequence[Result]) -> str:
    """Return what plans lose with each weight of the NSDS factor, by measured sensitivities."""
    rows = []
    for weight in NSDS_WEIGHTS:
        for reading in ("ratio", "product"):
            found = [
                [x for x in result["regret"] if (x["weight"], x["reading"]) == (weight, reading)] for result in results
            ]
            if any(found):
                cells = [mean_cell(list(x[0]["ratios"].values())) if x else NO_FIGURE for x in found]
                rows.append((f"{weight:g}", reading if weight else NO_FIGURE, *cells))
    return table(("weight", "reading of SE", *(result["name"] for result in results)), rows)


def paper_table(results: Sequence[Result], text: str) -> str:
    """Return the divergence under the paper's allocator by metric, over the mean of random orders of the layers."""
    rows = []
    for result in results:
        for bits in PAPER_BITS:
            budget = f"paper {bits:g}"
            randoms = [
                r for r in result["rows"] if (r["text"], r["budget"]) == (text, budget) and "random" in r["kind"]
            ]
            if not randoms:
                continue
            mean = [math.fsum(v) / len(randoms) for v in zip(*(r["chunks"] for r in randoms), strict=True)]
            cells = []
            for name in (*PAPER_METRICS, RTN):
                found = rows_of(result, text, budget, name)
                cells.append(with_error(paired_ratio(found[0]["chunks"], mean)) if found else NO_FIGURE)
            klds = [r["kld"] for r in randoms]
            spread = f"{math.fsum(klds) / len(klds):.4f} ({min(klds):.4f} to {max(klds):.4f})"
            rows.append((result["name"], f"{bits:g}", f"{randoms[0]['bpw']:.3f}", spread, *cells))
    return table(("model", "mean bits", "bpw", "random orders: KLD", *PAPER_METRICS, "ours, at its bytes"), rows)


# --- the page ---------------------------------------------------------------------------------------------------


def page(results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
        results: of the models, in the order of the zoo.
        facts: ``texts``, ``n_chunks``, ``sensitivity_chunks``, ``n_ctx``, ``commit``, ``build``, ``command``,
            ``missing`` (names of models), ``trial`` (whether the final half was left alone) and ``imatrix``.

    """
    first = facts["texts"][0]
    parts = ["# Quality", intro(facts), "## Goals", goals_note(results), goals_table(results, first),
             f"The same of *{RTN}*:", goals_table(results, first, RTN),
             "## The models", zoo_table(results)]  # fmt: skip
    for text in facts["texts"]:
        parts += [f"## Equal bytes: {text}", main_table(results, text),
                  f"*{RTN}*:", main_table(results, text, RTN),
                  *(groups_table(results, text, kind) for kind in (STOCK, STOCK_IMATRIX, ORACLE))]  # fmt: skip
        if text != first:
            parts += ["Goals on this text:", goals_table(results, text)]
    parts += [
        "## Variants of ours",
        "Divergence of each variant over that of the default, at equal bytes, geometric means.",
        variants_table(results, first),
        "## One type for all",
        "Q2_K is left out: at its bytes there is nothing to choose.",
        uniform_table(results, first),
        "## Does the Fisher information predict?",
        "Sensitivity of a tensor: divergence over relative error, one tensor at a time at Q2_K, on the choosing half. "
        "Within roles and for sums over layers: rank correlation over the layers.",
        sensitivity_table(results),
        "Measured over predicted, both in nats per unit of relative error, geometric means over layers:",
        role_table(results),
        linearity_table(results),
        "Do single errors add up? Divergence of whole plans over the sum of sensitivity times error of their tensors:",
        additivity_table(results, first),
        "## NSDS",
        "Rank correlation over layers with the sum of measured sensitivities of a layer's tensors:",
        nsds_table(results),
        "Plans of the knapsack with the NSDS factor `exp(g (S - mean S))` on predicted sensitivities: divergence by "
        "measured sensitivities over that of the oracle's plan, geometric mean over the budgets above:",
        regret_table(results),
        "The paper's allocator (whole layers at Q2_K or Q4_K, embedding and output at Q4_K): divergence over the mean "
        "of random orders of the layers, same column weights for all:",
        paper_table(results, first),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def intro(facts: Mapping[str, Any]) -> str:
    """Return the introduction: how the page was made, and the names of the variants."""
    lines = [
        f"Made by `{facts['command']}`; the numbers are in [quality.json](quality.json). KLD is the mean KL divergence "
        "from the original at its own precision, nats per token; every ratio compares files of equal bytes (those of "
        "the llama.cpp preset that the row names) on the same tokens, with the standard error of the paired chunks. "
        "Below 1 is better for ours.",
        f"Texts: {', '.join(facts['texts'])}; {facts['n_chunks']} chunks of {facts['n_ctx']} tokens spread evenly over "
        f"the half of each that nothing was chosen on; sensitivities on {facts['sensitivity_chunks']} chunks of the "
        f"other half of {facts['texts'][0]}. Constants were frozen in commit {facts['commit']}. "
        f"llama.cpp {facts['build']}.",
        f"*Ours*: the default of `convert` for models of this size, GPTQ calibrated on text that the model generates. "
        f"*{RTN[0].upper()}{RTN[1:]}*: its default for large ones, round-to-nearest by ggml's quantizers with column "
        "weights from random tokens.",
        f"*Real imatrix*: {facts['imatrix']} *Oracle*: the same knapsack, errors and quantizer as ours, but with "
        "measured sensitivities in place of predicted ones. *Random*: random types, output and embedding at those of "
        "the preset. Oracle, random and uniform files are rounded like ours.",
    ]
    if facts["trial"]:
        lines.insert(0, "**Trial: measured on the half for choosing; not for publication.**")
    if facts["missing"]:
        lines.append(f"**Not measured, the models are not there:** {', '.join(facts['missing'])}.")
    return "\n\n".join(lines)


def goals_note(results: Sequence[Result]) -> str:
    """Return how to read the table of goals."""
    held_out = len(in_group(results, PLAIN_HELD_OUT))
    measured = {result["name"] for result in results}
    looked_at = ", ".join(entry.name for entry in ZOO if entry.fitted and entry.name in measured)
    return (
        f"Geometric means over models and budgets; goals in brackets, {NOT_REACHED} where missed. "
        f"The goals are for the {held_out} models that nothing was fitted on; the table shows the others beside them. "
        f"Looked at while choosing: {looked_at or 'none'}."
    )
