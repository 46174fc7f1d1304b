"""A plan or a GGUF as one HTML page: bytes, sensitivities, measurements, and the command to reproduce it.

The page is one file and loads nothing: it contains its data, its script and Vega-Lite, which draws the charts; its
content security policy allows these two scripts and no request. Vega-Lite comes from the installed vl-convert-python
(the extra ``report``) when a page is written. The page's sources are in ``publish/page``.

Unknown facts are ``None`` or empty in the record, and the page says so instead of drawing them.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.util
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal

from .. import __version__
from ..allocate import ALLOCATORS, decided_by
from ..calibration.generated_text import N_TOKENS
from ..calibration.imatrix import IMATRIX
from ..errors import PlanError, RecordError
from ..evaluate.inspect import FoundTensor, Inspection
from ..evaluate.perplexity import Perplexity
from ..llamacpp import ggml
from ..records import UNQUANTIZED, LayerScore, Options, Plan, PlannedTensor, Scores
from ..system.atomic import write_small
from .explain import in_a_word

# The part of vl-convert's bundle that the page uses.
_SNIPPET = "globalThis.vegaEmbed = vegaEmbed;"

# The parts of the page's script, in order; one module, so that no name collides with the library's.
SCRIPTS = ("data.js", "tables.js", "charts.js", "heatmap.js", "page.js")


@dataclass(frozen=True)
class Check:
    """A measurement of the file: the result, the text, the reference if any, and notes."""

    found: Perplexity
    text: str
    reference: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Attributes:
        kind: whether ``tensors`` come from a plan or a file.
        title: name of the model.
        kicker: the line above it.
        tensors: in the order of the file.
        why: the reason for each planned tensor's type, in a few words.
        file_bytes, bpw, quantized_bpw: sums, as in ``Plan`` and ``Inspection``.
        target: the budget; empty when unknown.
        metric: the metric of ``layers``.
        layers: layer scores; empty when unknown.
        check: the measurement; ``None`` when there is none.
        notes: notes for the reader, one sentence each.
        facts: names and values for the end of the page.
        given: the user's command that made the file; empty when unknown.
        command: the same command from the plan, with every choice named; empty without a plan.

    """

    kind: Literal["plan", "file"]
    title: str
    kicker: str
    tensors: Sequence[PlannedTensor] | Sequence[FoundTensor]
    file_bytes: int
    bpw: float
    quantized_bpw: float
    why: tuple[str, ...] = ()
    target: str = ""
    metric: str | None = None
    layers: tuple[LayerScore, ...] = ()
    check: Check | None = None
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    given: str = ""
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the page's data: tensors as one list per column, the rest as plain values."""
        check = self.check
        names = [field.name for field in fields(self.tensors[0])] if self.tensors else ["name"]
        columns = {name: [getattr(tensor, name) for tensor in self.tensors] for name in names}
        return {
            "kind": self.kind,
            "title": self.title,
            "kicker": self.kicker,
            "tensors": {**columns, "why": self.why} if self.why else columns,
            "unquantized": UNQUANTIZED,
            "kernels": _kernels({tensor.type for tensor in self.tensors}),
            "file_bytes": self.file_bytes,
            "bpw": self.bpw,
            "quantized_bpw": self.quantized_bpw,
            "target": self.target,
            "metric": self.metric,
            "layers": [asdict(layer) for layer in self.layers],
            "perplexity": check.found.to_json() if check else None,
            "text": check.text if check else None,
            "reference": check.reference if check else None,
            "notes": self.notes,
            "facts": self.facts,
            "given": self.given,
            "command": self.command,
        }


def plan_report(
    plan: Plan,
    *,
    scores: Scores | None = None,
    check: Check | None = None,
    architecture: str | None = None,
    model: str = "MODEL",
    given: str = "",
) -> Report:
    """Return the report of a plan.

    Args:
        plan: the plan of the file.
        scores: the scores of the plan, if known.
        check: the measurement of the written file, if any.
        architecture: llama.cpp's architecture, if known.
        model: name of the model in commands.
        given: the command that made the file, if known.

    Raises:
        RecordError: the scores belong to another model.

    """
    if scores is not None and scores.model_id != plan.model_id:
        raise RecordError(f"the scores belong to another model ({scores.model_name}); score {plan.model_name} again")
    return Report(
        kind="plan",
        title=plan.model_name,
        kicker=" · ".join(filter(None, (architecture, f"types decided by {' and '.join(decided_by(plan.recipe))}"))),
        tensors=plan.tensors,
        why=tuple(in_a_word(plan, tensor) for tensor in plan.tensors),
        file_bytes=plan.file_bytes,
        bpw=plan.bpw,
        quantized_bpw=plan.quantized_bpw,
        target=str(plan.recipe.target or ""),
        metric=scores.recipe.metric if scores else plan.recipe.metric,
        layers=scores.layers if scores else (),
        check=check,
        notes=tuple(dict.fromkeys((*plan.notes, *(scores.notes if scores else ()), *(check.notes if check else ())))),
        facts=_plan_facts(plan),
        given=given,
        command=command(plan, model),
    )


def file_report(found: Inspection) -> Report:
    """Return the report of a GGUF from its header alone."""
    name = Path(found.path).name
    return Report(
        kind="file",
        title=found.name or name,
        kicker=f"{found.architecture} · {name}",
        tensors=found.tensors,
        file_bytes=found.file_bytes,
        bpw=found.bpw,
        quantized_bpw=found.quantized_bpw,
        target=found.made_by_us.get("target", "").replace("none", ""),
        notes=_file_notes(found),
        facts=_file_facts(found),
    )


def command(plan: Plan, model: str) -> str:
    """Return the command that makes the file of a plan, with every choice named."""
    recipe, words = plan.recipe, ["nsds-gguf", "convert", model]
    if recipe.target is not None:
        words += [f"--target-{recipe.target.kind}", f"{recipe.target.value:.17g}"]
    if recipe.allocator == "uniform":
        words += ["--uniform", recipe.types[0]]
    else:
        words += ["--allocator", recipe.allocator, "--types", ",".join(recipe.types)]
    words += ["--rounding", recipe.rounding]
    from_file = recipe.calibration.startswith(IMATRIX)
    words += ["--imatrix", "FILE"] if from_file else ["--calibration", recipe.calibration]
    if ALLOCATORS[recipe.allocator].uses_layers(recipe.score_weight):
        words += ["--metric", str(recipe.metric)] + (["--se", recipe.se] if recipe.se else [])
    defaults = {**vars(Options()), "calibration_tokens": N_TOKENS if recipe.calibration_tokens else None}
    for name in ("score_weight", "prefer", "seed", "device", "calibration_tokens"):
        value = getattr(recipe, name)
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", f"{value:.17g}" if isinstance(value, float) else str(value)]
    if recipe.padding is not None:
        words += ["--pad", "on"]
    if recipe.tune_norms:
        words.append("--tune-norms")
    for fixed in recipe.tensor_types:
        words += ["--tensor-type", str(fixed)]
    return shlex.join(words)


def _kernels(types: set[str]) -> dict[str, str]:
    """Return, for each quantized type that nsds-gguf writes, whether ggml has fast CPU kernels."""
    ours = sorted(types & set(ggml.TYPES) - set(UNQUANTIZED))
    return {name: "fast" if ggml.TYPES[name].is_fast else "slow" for name in ours}


def _plan_facts(plan: Plan) -> tuple[tuple[str, str], ...]:
    facts = [
        *((name.replace("_", " "), value) for name, value in plan.recipe.facts().items()),
        ("bytes unused", f"{plan.unused_bytes:,}" if plan.recipe.target is not None else ""),
        ("optimality gap", f"at most {plan.gap:.1e}" if plan.gap is not None else ""),
        ("predicted divergence", _predicted(plan)),
        ("model SHA-256", plan.model_id),
        ("plan SHA-256", plan.digest),
        ("scores SHA-256", plan.scores_digest),
        *((f"version: {name}", version) for name, version in plan.versions.items()),
    ]
    return tuple((name, value) for name, value in facts if value)


def _predicted(plan: Plan) -> str:
    predicted = plan.predicted_divergence
    return "" if predicted is None else f"{predicted:.4g}, the sum of error × sensitivity"


# Keys of a GGUF that the page shows, with their labels.
_FILE_KEYS = {
    "general.basename": "base name",
    "general.finetune": "fine-tune",
    "general.size_label": "size label",
    "general.license": "licence",
    "general.quantized_by": "quantized by",
    "general.quantization_version": "quantization version",
}


def _file_facts(found: Inspection) -> tuple[tuple[str, str], ...]:
    keys = {name: str(found.metadata[key]) for key, name in _FILE_KEYS.items() if key in found.metadata}
    ours = {f"nsds-gguf: {name.replace('_', ' ')}": value for name, value in found.made_by_us.items()}
    return (*keys.items(), *ours.items())


def _file_notes(found: Inspection) -> tuple[str, ...]:
    notes = []
    if found.missing:
        notes.append(f"{len(found.missing)} files of this split model are missing; their tensors are not shown.")
    if not found.made_by_us:
        notes.append("The file was not written by nsds-gguf: how its types were chosen is not known.")
    return tuple(notes)


# --- the page --------------------------------------------------------------------------------------------------------


def check_report(path: Path) -> None:
    """Raise ``PlanError`` when vl-convert-python is missing, or ``path`` is not the name of a page."""
    if path.suffix.lower() not in (".html", ".htm") and not path.is_dir():
        raise PlanError(f"--report {path}: wanted a name ending in .html, or an existing folder")
    if importlib.util.find_spec("vl_convert") is None:
        raise PlanError("a report needs vl-convert-python; run: pip install 'nsds-gguf[report]'")


def write_report(report: Report, path: Path) -> None:
    """Write the page.

    Raises:
        PlanError: vl-convert-python is missing, or the name does not end in ``.html``.
        OutputError: the file cannot be written.

    """
    check_report(path)
    write_small(path, page(report))


def page(report: Report) -> str:
    """Return the HTML of a report, including about 1 MB of charting library."""
    script = "".join(map(template, SCRIPTS))
    return Template(template("page.html")).substitute(
        policy=_policy(_library(), script),
        title=html.escape(f"{report.title}: what its GGUF holds"),
        style=template("page.css"),
        version=html.escape(__version__),
        data=embedded(report.to_json()),
        licences=template("licences.txt"),
        library=_library(),
        script=script,
    )


@functools.cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which takes a second to build."""
    import vl_convert

    return vl_convert.javascript_bundle(_SNIPPET).strip()


def template(name: str) -> str:
    """Return a part of the page."""
    return (resources.files("nsds_gguf.publish") / "page" / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """Return JSON that is safe in a script element: ASCII, without ``<``, finite numbers."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _policy(*scripts: str) -> str:
    """Return a content security policy that allows these scripts, inline styles, and no request of any kind."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
