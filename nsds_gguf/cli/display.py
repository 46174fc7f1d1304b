"""Records as rich tables for the terminal. Nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.bar import Bar
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..allocate import decided_by
from ..evaluate.divergence import Divergence
from ..evaluate.embedding import EmbeddingCheck
from ..evaluate.perplexity import Perplexity
from ..evaluate.texts import spoken
from ..publish.bundle import Bundle
from ..publish.explain import in_a_word
from ..publish.first_words import Sample
from ..publish.upload import Upload
from ..records import Plan, PlannedTensor, Scores
from ..records.comparison import KINDS, OURS, Comparison, Row, geometric_mean
from ..session.sizes import GOOD_DIVERGENCE, Sizes

# From few bits to many, safe for colour-blind readers (viridis); the text names the type in any case.
TYPE_COLOURS = {
    "Q2_0": "#fde725", "Q2_K": "#fde725", "Q3_K": "#90d743", "Q4_K": "#35b779", "Q4_0": "#35b779", "IQ4_NL": "#35b779",
    "Q5_K": "#21918c", "Q5_0": "#21918c", "Q5_1": "#21918c", "Q6_K": "#31688e", "Q8_0": "#443983",
    "F16": "#8c6bb1", "BF16": "#8c6bb1", "F32": "#8c6bb1",
}  # fmt: skip

_BAR_WIDTH = 36


def scores_view(scores: Scores) -> RenderableType:
    """Return a bar per layer, with the parts of the score where the metric has parts."""
    has_parts = any(layer.p_nv is not None for layer in scores.layers)
    reading = f", SE {scores.recipe.se}" if scores.recipe.se else ""
    table = Table(
        title=f"{scores.model_name}: {scores.recipe.metric}{reading}, higher = more sensitive", title_justify="left"
    )
    table.add_column("layer", justify="right")
    table.add_column("score", justify="right")
    table.add_column("")
    for name in ("P_NV", "P_SE") if has_parts else ():
        table.add_column(name, justify="right")
    low, high = _bar_range([layer.score for layer in scores.layers])
    for layer in scores.layers:
        bar = Bar(high - low, 0, layer.score - low, width=_BAR_WIDTH, color="#21918c")
        parts = ["-" if p is None else f"{p:.3f}" for p in (layer.p_nv, layer.p_se)] if has_parts else []
        table.add_row(str(layer.layer), f"{layer.score:.4g}", bar, *parts)
    return Group(table, *(Text(f"note: {note}") for note in scores.notes))


def _bar_range(values: Sequence[float]) -> tuple[float, float]:
    """Return where bars start and end: at 0, or just below the scores where that would hide their differences."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low >= 0 and high - low > 0.2 * high:
        low = 0.0
    elif high > low:
        low -= 0.1 * (high - low)
    return low, high if high > low else low + 1.0


def plan_view(plan: Plan) -> RenderableType:
    """Return the types by layer and role, the totals by type, and the sums."""
    deciding = " and ".join(decided_by(plan.recipe))
    title = f"{plan.model_name}: types decided by {deciding}, target {plan.recipe.target or 'none'}"
    return Group(_grid(plan.tensors, title), _type_table(plan.tensors), _plan_sums(plan))


def plan_details(plan: Plan) -> RenderableType:
    """Return one line per tensor with error, sensitivity and reason."""
    table = Table(title="tensors", title_justify="left")
    for name in ("tensor", "type", "why"):
        table.add_column(name, no_wrap=name != "why")
    for name in ("shape", "bytes", "error", "sensitivity"):
        table.add_column(name, justify="right", no_wrap=True)
    for t in plan.tensors:
        error = "" if t.error is None else f"{t.error:.3g}"
        if t.error and t.error_stderr:
            error += f" ± {100 * t.error_stderr / t.error:.1f} %"
        sensitivity = "" if t.sensitivity is None else f"{t.sensitivity:.3g}"
        shape = " x ".join(map(str, t.shape))
        table.add_row(t.name, _type_text(t.type), in_a_word(plan, t), shape, f"{t.n_bytes:,}", error, sensitivity)
    return table


def _plan_sums(plan: Plan) -> RenderableType:
    lines = [
        f"bits per weight: {plan.bpw:.4f} of all tensors, {plan.quantized_bpw:.4f} of quantized tensors, "
        f"{plan.file_bpw:.4f} of the whole file",
        f"bytes: {plan.tensor_bytes:,} tensors, {plan.file_bytes:,} file"
        + ("" if plan.recipe.target is None else f", {plan.unused_bytes:,} of the budget unused"),
    ]
    if plan.gap is not None:
        lines.append(f"optimality gap at most {plan.gap:.1e}")
    return Text("\n".join([*lines, *(f"note: {note}" for note in plan.notes)]))


def perplexity_view(
    found: Perplexity, name: str, reference: str | None = None, notes: Sequence[str] = ()
) -> RenderableType:
    """Return the perplexity, that of the reference if there is one, a sentence on what they mean, and notes."""
    chunks = f"{found.n_chunks} chunks"
    if found.n_chunks < found.n_chunks_wanted:
        chunks = f"interrupted after {found.n_chunks} of {found.n_chunks_wanted} chunks"
    title = Text(f"{chunks} of {found.n_ctx} tokens, {found.n_scored_tokens:,} scored", style="italic")
    table = Table()
    for column in ("", "perplexity", "± error"):
        table.add_column(column, justify="right" if column else "left")
    if found.divergence is not None:
        d = found.divergence
        table.add_row(Path(reference or "reference").name, f"{d.reference_ppl:.4f}", f"{d.reference_ppl_error:.4f}")
    table.add_row(name, f"{found.ppl:.4f}", f"{found.ppl_error:.4f}")
    if found.divergence is None:
        sentence = _perplexity_sentence(found)
    else:
        sentence = _divergence_sentence(found.divergence, spoken(reference or "reference"))
    return Group(title, table, sentence, *(Text(f"note: {note}") for note in notes))


def embedding_view(found: EmbeddingCheck, name: str, reference: str | None = None) -> RenderableType:
    """Return how close a file's embeddings are to those of the reference."""
    return Text(
        f"{name}: cosine similarity to {reference or 'the original'}: mean {found.cosine_mean:.4f}, lowest "
        f"{found.cosine_min:.4f} over {found.n_passages} passages ({found.pooling} pooling, {found.n_tokens:,} tokens)"
    )


def _perplexity_sentence(found: Perplexity) -> Text:
    return Text(
        f"On average the next token is as uncertain as a choice among {found.ppl:.3g} equally likely ones; "
        f"{found.bits_per_byte:.3f} bits per byte of text."
    )


def _divergence_sentence(found: Divergence, reference: str) -> Text:
    change = 100 * (found.ppl_ratio - 1)
    return Text(
        f"KL divergence from {reference}: {found.kld_mean:.6f} ± {found.kld_error:.6f} nats per token; same top token "
        f"{100 * found.same_top:.1f} %; perplexity {abs(change):.2f} % ± {100 * found.ppl_ratio_error:.2f} % "
        f"{'higher' if change >= 0 else 'lower'}."
    )


def divergence_details(found: Divergence) -> RenderableType:
    """Return every statistic of a divergence: means with their errors, and percentiles over the positions."""
    sums = Table(title="compared with the reference", title_justify="left")
    for column in ("", "value", "± error"):
        sums.add_column(column, justify="right" if column else "left", no_wrap=True)
    correlation = found.log_ppl_correlation
    for name, value, error in (
        ("PPL ratio", f"{found.ppl_ratio:.6f}", f"{found.ppl_ratio_error:.6f}"),
        ("ln PPL ratio", f"{found.log_ppl_ratio:.6f}", f"{found.log_ppl_ratio_error:.6f}"),
        ("PPL difference", f"{found.ppl_difference:.6f}", f"{found.ppl_difference_error:.6f}"),
        ("correlation, ln PPL", "-" if correlation is None else _percent(correlation), ""),
        ("mean KL divergence", f"{found.kld_mean:.6f}", f"{found.kld_error:.6f}"),
        ("mean Δp", _percent(found.delta_p_mean), _percent(found.delta_p_error)),
        ("RMS Δp", _percent(found.delta_p_rms), _percent(found.delta_p_rms_error)),
        ("same top token", _percent(found.same_top), _percent(found.same_top_error)),
    ):
        sums.add_row(name, value, error)
    percentiles = Table(title="percentiles of positions", title_justify="left")
    for column in ("", "KL div.", "Δp"):
        percentiles.add_column(column, justify="right", no_wrap=True)
    names = {"0": "min", "50": "median", "100": "max"}
    for key, kld in found.kld_percentiles.items():
        percentiles.add_row(names.get(key, f"{key} %"), f"{kld:.6f}", _percent(found.delta_p_percentiles[key]))
    meaning = Text("Δp: change in the probability of the text's next token.", style="dim")
    return Group(Columns([sums, percentiles]), meaning)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3f} %"


def _grid(tensors: Iterable[PlannedTensor], title: str) -> Table:
    """Return a table of matrix types: a row per layer, a column per role; equal adjacent layers share a row."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    roles = list(dict.fromkeys(tensor.role for tensor in matrices if tensor.layer is not None))
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for role in roles:
        table.add_column(role.replace("attn_output", "attn_o").removeprefix("ffn_").removeprefix("attn_"))
    rows: dict[int, dict[str, str]] = {}
    for tensor in matrices:
        if tensor.layer is not None:
            rows.setdefault(tensor.layer, {})[tensor.role] = tensor.type
    for first, last in _runs(rows):
        label = str(first) if first == last else f"{first}–{last}"
        table.add_row(label, *(_type_text(rows[first].get(role, "")) for role in roles))
    outside = [f"{tensor.role} {tensor.type}" for tensor in matrices if tensor.layer is None]
    table.caption = ", ".join(outside)
    table.caption_justify = "left"
    return table


def _runs(rows: dict[int, dict[str, str]]) -> list[tuple[int, int]]:
    """Return the first and last of each run of adjacent layers with the same types."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(rows):
        if runs and runs[-1][1] == layer - 1 and rows[layer] == rows[runs[-1][0]]:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _type_table(tensors: Iterable[PlannedTensor]) -> Table:
    counts: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    n_weights: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.type] += 1
        n_bytes[tensor.type] += tensor.n_bytes
        n_weights[tensor.type] += tensor.n_weights
    total_bytes, total_weights = sum(n_bytes.values()), sum(n_weights.values())
    table = Table()
    for name in ("type", "tensors", "weights", "bytes"):
        table.add_column(name, justify="left" if name == "type" else "right")
    for name, held in n_bytes.most_common():
        weights = f"{100 * n_weights[name] / total_weights:.1f} %"
        table.add_row(_type_text(name), str(counts[name]), weights, f"{100 * held / total_bytes:.1f} %")
    return table


def _type_text(name: str) -> Text:
    return Text(name, style=f"bold {TYPE_COLOURS[name]}" if name in TYPE_COLOURS else "")


def sizes_view(found: Sizes, command: str) -> RenderableType:
    """Return the possible sizes of a model, a row per budget, and the command for the proposed one."""
    table = Table(title=f"{found.model_name}: possible sizes", title_justify="left")
    predicted = "predicted\nKL divergence" if found.in_nats else "predicted\ndivergence"
    for column in ("bpw", "file", predicted, "types,\n% of weights", "llama.cpp\npreset (bpw)"):
        table.add_column(column, justify="right" if column in ("bpw", "file", predicted) else "left")
    for size in found.sizes:
        shares = [(name, round(100 * share)) for name, share in size.types.items()]
        types = ", ".join(f"{name} {share}" for name, share in shares[:3] if share)
        preset = f"{size.preset} ({size.preset_bpw:.2f})"
        table.add_row(f"{size.target_bpw:g}", bytes_text(size.file_bytes), two_digits(size.predicted), types, preset)
    table.caption, table.caption_justify = f"original: {bytes_text(found.original_bytes)}", "left"
    is_good = found.in_nats and found.proposed.predicted < GOOD_DIVERGENCE
    chosen = f"the smallest size below {GOOD_DIVERGENCE:g} nats per token" if is_good else "one of these sizes"
    end = [f"Nothing was written. To convert to {chosen}, run:", command]
    return Group(table, Text("\n".join([*(f"note: {note}" for note in found.notes), *end])))


def bytes_text(n_bytes: int) -> str:
    """Return bytes as MiB or GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def two_digits(value: float) -> str:
    """Return a number with two significant digits."""
    return f"{value:#.2g}".rstrip(".")


def comparison_view(found: Comparison) -> RenderableType:
    """Return the rows of a comparison by budget, with ratios and predictions; several seeds are averaged."""
    table = Table(title=f"{found.model_name}: divergence from the original at equal bytes", title_justify="left")
    for column in ("allocation", "bytes", "bpw", "perplexity", "KL divergence", "same top", "ours / this", "predicted"):
        table.add_column(column, justify="left" if column == "allocation" else "right")
    factor = found.prediction_factor
    for budget in found.budgets:
        table.add_section()
        table.add_row(Text(budget, style="bold"))
        for rows in _by_kind(found.of(budget)):
            table.add_row(*_comparison_row(rows, found.ours(budget, rows[0].kind), factor))
    return Group(table, _comparison_summary(found))


def _by_kind(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows grouped by kind, ours first; each of ours at other bytes is a group."""
    groups = dict.fromkeys((KINDS.index(row.kind), row.detail if row.kind == OURS else "") for row in rows)
    return [
        [row for row in rows if row.kind == KINDS[kind] and (row.kind != OURS or row.detail == detail)]
        for kind, detail in sorted(groups)
    ]


def _comparison_row(rows: Sequence[Row], ours: Row, factor: float | None) -> list[str]:
    """Return the cells of one allocation; for several seeds the means, and the spread instead of the error."""
    first, n = rows[0], len(rows)
    mean = {name: sum(getattr(row, name) for row in rows) / n for name in ("ppl", "kld", "same_top", "bpw")}
    spread = (sum((row.kld - mean["kld"]) ** 2 for row in rows) / (n - 1)) ** 0.5 if n > 1 else first.kld_error
    predictions = [row.predicted for row in rows if row.predicted is not None]
    predicted = sum(predictions) / len(predictions) * factor if predictions and factor else None
    name = f"{first.kind} (mean of {n})" if n > 1 else f"{first.kind} {first.detail}".rstrip()
    return [
        f"  {name}",
        f"{sum(row.tensor_bytes for row in rows) // n:,}",
        f"{mean['bpw']:.4f}",
        f"{mean['ppl']:.4f}",
        f"{mean['kld']:.5f} ± {spread:.5f}",
        f"{100 * mean['same_top']:.2f} %",
        "" if first.kind == ours.kind else f"{ours.kld / mean['kld']:.3f}",
        "" if predicted is None else f"{predicted:.5f}",
    ]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _comparison_summary(found: Comparison) -> Text:
    lines = []
    first = found.rows[0]
    lines.append(f"original: perplexity {first.original_ppl:.4f} ± {first.original_ppl_error:.4f}, "
                 f"{first.n_scored_tokens} tokens scored in contexts of {found.n_ctx}")  # fmt: skip
    for kind in dict.fromkeys(row.kind for row in found.rows if row.kind != OURS):
        ratios = list(found.ratios(kind).values())
        lines.append(f"our divergence / that of {kind}: {geometric_mean(ratios):.3f} "
                     f"(geometric mean over {_count(len(ratios), 'budget')}, largest {max(ratios):.3f})")  # fmt: skip
    rho = found.prediction_rank_correlation
    if rho is not None:
        lines.append(f"rank correlation of predicted and measured divergence: {rho:.3f} (Spearman); one factor scales "
                     "the whole predicted column")  # fmt: skip
    return Text("\n".join([*lines, *(f"note: {note}" for note in found.missing)]))


def bundle_view(bundle: Bundle) -> RenderableType:
    """Return the files of a bundle, and notes."""
    table = Table(title=str(bundle.folder), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column("SHA-256", overflow="ellipsis", no_wrap=True)
    for name, digest in bundle.sha256.items():
        table.add_row(name, digest)
    return Group(table, Text("\n".join(f"note: {note}" for note in bundle.notes)))


def upload_view(found: Upload) -> RenderableType:
    """Return what happened, or would happen, to each file of an upload, and where it is."""
    table = Table(
        title=f"{'dry run: ' if found.is_dry_run else ''}{found.repo}", title_justify="left", show_header=False
    )
    for name, n_bytes in found.files.items():
        table.add_row(name, bytes_text(n_bytes), found.states[name])
    where = "an existing repository"
    if found.is_new:
        where = f"a {'private' if found.is_private else 'public'} repository, "
        where += "to be created" if found.is_dry_run else "new"
    return Group(table, Text(f"{found.url} ({where})" + ("; nothing was sent" if found.is_dry_run else "")))


def sample_view(found: Sample) -> RenderableType:
    """Return a prompt and the beginning of the answer."""
    kind = "answer (chat template)" if found.is_chat else "continuation"
    lines = [f"{kind}: {found.prompt!r} -> {found.answer!r}", *([f"note: {found.note}"] if found.note else [])]
    return Text("\n".join(lines))
