"""From parsed arguments to the options of the library, and what contradicts itself."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..allocate import PlanOptions
from ..calibration.imatrix import Imatrix, read_imatrix
from ..errors import OutputError, PlanError
from ..evaluate.texts import VerifyOptions
from ..llamacpp.gguf_header import is_gguf
from ..publish.bundle import check_ollama
from ..publish.plot import check_plot
from ..publish.report import check_report
from ..read.hub import HubName, parse_name
from ..records import Plan, Scores, Target, read_json
from ..session.effort import AUTO
from ..session.outputs import Output
from ..session.session import ScoreOptions

DEFAULT_SCORING = ScoreOptions()


def given_imatrix(arguments: argparse.Namespace) -> Imatrix | None:
    """Return the importance matrix that the user brings; raises ``PlanError`` where it is not the only importance."""
    if arguments.imatrix is None:
        return None
    if arguments.importance is not None:
        raise PlanError(f"--imatrix and --importance {arguments.importance} contradict each other; drop one")
    return read_imatrix(arguments.imatrix)


def importance_name(arguments: argparse.Namespace, imatrix: Imatrix | None) -> str:
    """Return the name of the column importance that is asked for, or that it is left open."""
    if imatrix is not None:
        return imatrix.name
    return str(arguments.importance or AUTO)


def plan_options(arguments: argparse.Namespace, imatrix: Imatrix | None = None) -> list[PlanOptions]:
    """Return one entry per target; raises ``PlanError`` for contradicting flags."""
    if arguments.uniform is not None and arguments.allocator not in (None, "uniform"):
        raise PlanError(f"--uniform and --allocator {arguments.allocator} contradict each other; drop one")
    if arguments.target_bpw and arguments.target_size is not None:
        raise PlanError("--target-bpw and --target-size are two budgets; give one")
    targets = [Target("bpw", value) for value in arguments.target_bpw or ()]
    if arguments.target_size is not None:
        targets = [Target("size", arguments.target_size)]
    return [
        PlanOptions(
            target=target,
            allocator="uniform" if arguments.uniform else arguments.allocator or "nsds",
            types=arguments.types,
            uniform=arguments.uniform,
            pins=tuple(arguments.pin),
            importance=importance_name(arguments, imatrix),
            prefer=arguments.prefer,
            effort=arguments.effort,
            score_weight=arguments.score_weight,
        )
        for target in targets or [Target("none", 0)]
    ]


def is_open(arguments: argparse.Namespace) -> bool:
    """Return whether a conversion or a plan is asked for without anything that says how large it is to be."""
    has_budget = bool(arguments.target_bpw) or arguments.target_size is not None
    has_types = arguments.plan is not None or arguments.uniform is not None
    return not has_budget and not has_types and arguments.allocator in (None, "nsds")


def check_sizes_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what wants one plan where there is no budget to make it for."""
    wants_plan = {"--tensor-types": arguments.tensor_types, "--why": arguments.why, "--report": arguments.report}
    for option, value in wants_plan.items():
        if value:
            raise PlanError(f"{option} needs a plan, and a plan a budget: pass --target-bpw or --target-size")


def next_command(words: Sequence[str], bpw: float) -> str:
    """Return the command line that converts to a budget, from the words of one that named none."""
    kept = [word for word in words[1:] if word != "--dry-run"]
    while "--json" in kept:  # the record of a conversion is another one
        del kept[kept.index("--json") : kept.index("--json") + 2]
    return shlex.join(["nsds-gguf", "convert", *kept, "--target-bpw", f"{bpw:g}"])


def model_source(arguments: argparse.Namespace) -> Path | HubName:
    """Return the model's path or its name on the Hub; raises ``PlanError`` for a revision of a path."""
    name = parse_name(arguments.model, arguments.revision)
    if name is None and arguments.revision:
        raise PlanError(f"--revision {arguments.revision} is of a model of the Hub; {arguments.model} is a local path")
    return name or Path(arguments.model)


def scoring_options(arguments: argparse.Namespace) -> ScoreOptions:
    """Return how layers are scored."""
    metric, se = arguments.metric or DEFAULT_SCORING.metric, arguments.se or DEFAULT_SCORING.se
    return ScoreOptions(metric, se, not getattr(arguments, "layers_only", False))


def verify_options(arguments: argparse.Namespace) -> VerifyOptions:
    """Return how the finished file is checked; raises ``PlanError`` for contradicting flags."""
    if arguments.no_verify and arguments.against is not None:
        raise PlanError("--no-verify skips the check that --against is for; drop one")
    return VerifyOptions(
        text=arguments.text,
        n_ctx=arguments.ctx,
        n_chunks=arguments.chunks or None,
        against=arguments.against,
        enabled=not arguments.no_verify,
    )


def output_options(arguments: argparse.Namespace) -> Output:
    """Return where the file goes; raises ``OutputError`` when a folder is meant and there is none."""
    name: str | None = arguments.output
    if name is not None and name.endswith(("/", os.sep)) and not Path(name).is_dir():
        raise OutputError(f"{name}: no such folder for the output; create it first")
    return Output(None if name is None else Path(name), arguments.force, arguments.keep)


def check_bundle_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what goes with a bundle where there is none, and what contradicts one, before the work."""
    if arguments.bundle is None:
        for flag in ("ollama", "base_model"):
            if getattr(arguments, flag) is not None:
                option = "--" + flag.replace("_", "-")
                raise OutputError(f"{option} is about a bundle, and none is made; give --bundle DIR too")
        return
    if arguments.ollama is not None:
        check_ollama()
    if getattr(arguments, "output", None) is not None:
        raise OutputError("--bundle and --output are two places for one file; give one")
    if len(getattr(arguments, "target_bpw", None) or ()) > 1:
        raise PlanError(f"--bundle holds one file, got {len(arguments.target_bpw)} targets; give one")


def public_command(words: Sequence[str]) -> str:
    """Return a command line as others may read it: files and folders by their names, not by where they lie here."""
    return shlex.join(["nsds-gguf", *(public_word(word) for word in words)])


def public_word(word: str) -> str:
    """Return one word of a command line; a file or a folder by its name."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    shown = Path(value).resolve().name if value and os.sep in value and Path(value).exists() else value
    return f"{option}{equals}{shown}"


def given_record(arguments: argparse.Namespace) -> Scores | Plan | None:
    """Return the scores or the plan that the user brings; raises ``PlanError`` for both at once."""
    if arguments.scores is not None and arguments.plan is not None:
        raise PlanError("--scores and --plan contradict each other: a plan needs no scores")
    if arguments.plan is not None:
        if arguments.target_bpw or arguments.target_size or arguments.uniform or arguments.allocator or arguments.pin:
            raise PlanError("--plan fixes every type; drop the target, --allocator, --uniform and --pin, or plan again")
        return Plan.from_json(read_json(arguments.plan), str(arguments.plan))
    if arguments.scores is not None:
        scores = Scores.from_json(read_json(arguments.scores), str(arguments.scores))
        for flag, held in (("metric", scores.metric), ("se", scores.settings.get("se"))):
            asked = getattr(arguments, flag)
            if asked not in (None, held):
                raise PlanError(f"{arguments.scores}: made with --{flag} {held}, --{flag} {asked} asked; score again")
        return scores
    return None


def check_destinations(arguments: argparse.Namespace) -> None:
    """Refuse small outputs that cannot be what or where they are wanted, before the work that fills them."""
    for flag in ("json", "plot", "tensor_types", "report"):
        wanted = getattr(arguments, flag, None)
        if wanted is None or wanted == "-":
            continue
        path, option = Path(wanted), "--" + flag.replace("_", "-")
        if path.is_dir() and flag != "report":
            raise OutputError(f"{option} {path}: is a folder; give a file name")
        if not path.parent.is_dir():
            raise OutputError(f"{option} {path}: no folder {path.parent}; create it first")
        if is_gguf(path):
            raise OutputError(f"{option} {path}: is a GGUF file, which is not replaced; choose another name")
        if flag == "plot":
            check_plot(path)
        if flag == "report":
            check_report(path)
            n_targets = len(getattr(arguments, "target_bpw", None) or ())
            if n_targets > 1 and not path.is_dir():
                raise PlanError(f"--report {path}: one page cannot hold {n_targets} targets; give a folder")
