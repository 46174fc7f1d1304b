"""Parsed arguments become options of the library; contradictions are refused."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..errors import OutputError, PlanError
from ..evaluate.texts import DEFAULT_CTX, VerifyOptions
from ..llamacpp.gguf_header import is_gguf
from ..publish.bundle import check_ollama
from ..publish.plot import check_plot
from ..publish.report import check_report
from ..publish.upload import check_upload
from ..read.hub import parse_name
from ..records import AUTO, Options, Plan, Scores, read_json
from ..session.outputs import Output
from ..session.run import Run
from ..session.settle import DEFAULT_ALLOCATOR
from ..session.source import Source
from .fit import fit_of
from .screen import Screen


def options_of(arguments: argparse.Namespace) -> list[Options]:
    """Return the options, one entry per budget; options that are not named keep the defaults of ``Options``."""
    named = {
        name: value
        for name in (field.name for field in fields(Options))
        if (value := getattr(arguments, name, None)) is not None
    }
    budgets, fit = named.pop("target_bpw", None), fit_of(arguments)
    named.pop("fit", None)
    asked = Options(**{**named, "tensor_types": tuple(named.get("tensor_types", ()))}, fit=fit)
    return [replace(asked, target_bpw=value) for value in budgets] if budgets else [asked]


def run_of(arguments: argparse.Namespace, screen: Screen) -> Run:
    """Return how to run."""
    chosen = {"n_threads": arguments.threads} if arguments.threads else {}
    resume, cluster = not getattr(arguments, "no_resume", False), getattr(arguments, "cluster", None)
    return Run(**chosen, report=screen, resume=resume, cluster=cluster)


def is_open(arguments: argparse.Namespace) -> bool:
    """Return whether a conversion or plan names no size: neither a budget, a plan nor a type."""
    has_budget = bool(arguments.target_bpw) or arguments.target_size is not None or arguments.fit is not None
    has_types = arguments.plan is not None or arguments.uniform is not None
    return not has_budget and not has_types and arguments.allocator in (None, AUTO, DEFAULT_ALLOCATOR)


def check_sizes_arguments(arguments: argparse.Namespace) -> None:
    """Raise ``PlanError`` for options that need a plan where there is no budget for one."""
    wants_plan = {
        "--tensor-type-file": arguments.tensor_type_file,
        "--why": arguments.why,
        "--report": arguments.report,
    }
    for option, value in wants_plan.items():
        if value:
            raise PlanError(f"{option} needs a plan, and a plan needs a budget: pass --target-bpw or --target-size")


def next_command(words: Sequence[str], bpw: float) -> str:
    """Return the command line that converts to a budget, from the words of one without a budget."""
    kept = [word for word in words[1:] if word != "--dry-run"]
    for option in ("--json", "--plot", "--cache-type", "--projector"):  # a conversion writes other records
        while option in kept:
            del kept[kept.index(option) : kept.index(option) + 2]
    return shlex.join(["nsds-gguf", "convert", *kept, "--target-bpw", f"{bpw:g}"])


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the model's path or its name on the Hub; raises ``PlanError`` for a revision of a path."""
    name = parse_name(arguments.model, arguments.revision)
    if name is None and arguments.revision:
        raise PlanError(
            f"--revision {arguments.revision} applies to models on the Hub; {arguments.model} is a local path"
        )
    path = name or Path(arguments.model)
    return Source(path, arguments.pre_tokenizer, arguments.allow_requantize, arguments.mtp)


def verify_options(arguments: argparse.Namespace) -> VerifyOptions:
    """Return how to check the finished file; raises ``PlanError`` for contradicting flags."""
    if arguments.no_verify and arguments.reference is not None:
        raise PlanError("--no-verify skips the check that uses --reference; drop one")
    return VerifyOptions(
        text=arguments.text,
        n_ctx=DEFAULT_CTX if arguments.fit is not None else arguments.ctx_size or DEFAULT_CTX,
        n_chunks=arguments.chunks or None,
        reference=arguments.reference,
        enabled=not arguments.no_verify,
    )


def output_options(arguments: argparse.Namespace) -> Output:
    """Return where the file goes; raises ``OutputError`` for a folder that does not exist."""
    name: str | None = arguments.output
    if name is not None and name.endswith(("/", os.sep)) and not Path(name).is_dir():
        raise OutputError(f"{name}: no such folder for the output; create it first")
    return Output(None if name is None else Path(name), arguments.force, arguments.keep_failed, arguments.mmproj)


def check_bundle_arguments(arguments: argparse.Namespace) -> None:
    """Refuse bundle options without ``--bundle``, and options that contradict it, before the work."""
    if arguments.bundle is None:
        for flag in ("ollama", "base_model", "upload", "public", "upload_dry_run"):
            if getattr(arguments, flag) not in (None, False):
                option = "--" + flag.replace("_", "-")
                raise OutputError(f"{option} needs a bundle; pass --bundle DIR too")
        return
    if arguments.upload is None and (arguments.public or arguments.upload_dry_run):
        raise OutputError("--public and --upload-dry-run need --upload ORG/NAME")
    if arguments.upload is not None:
        check_upload(arguments.upload)
    if arguments.ollama is not None:
        check_ollama()
    if getattr(arguments, "output", None) is not None:
        raise OutputError("--bundle and --output name two places for one file; drop one")
    if len(getattr(arguments, "target_bpw", None) or ()) > 1:
        raise PlanError(f"--bundle holds one file, got {len(arguments.target_bpw)} targets; pass one")


def public_command(words: Sequence[str]) -> str:
    """Return a command line for publication: files and folders by name, without their paths."""
    return shlex.join(["nsds-gguf", *(public_word(word) for word in words)])


def public_word(word: str) -> str:
    """Return one word of a command line; a file or folder without its path."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    shown = Path(value).resolve().name if value and os.sep in value and Path(value).exists() else value
    return f"{option}{equals}{shown}"


def loaded_record(arguments: argparse.Namespace) -> Scores | Plan | None:
    """Return the scores or plan that the user loads; raises ``PlanError`` for both at once."""
    if arguments.scores is not None and arguments.plan is not None:
        raise PlanError("--scores and --plan contradict each other: a plan needs no scores; drop one")
    if arguments.plan is not None:
        _check_plan_alone(arguments)
        return Plan.from_json(read_json(arguments.plan), str(arguments.plan))
    if arguments.scores is not None:
        return Scores.from_json(read_json(arguments.scores), str(arguments.scores))
    return None


def _check_plan_alone(arguments: argparse.Namespace) -> None:
    """Raise ``PlanError`` for options that a plan from a file has settled: all but its importance matrix."""
    names = [field.name for field in fields(Options) if field.name != "imatrix"]
    named = [name for name in names if getattr(arguments, name, None) is not None]
    if named:
        options = ["--tensor-type" if name == "tensor_types" else "--" + name.replace("_", "-") for name in named]
        raise PlanError(f"--plan fixes every type and its rounding; drop {' and '.join(options)}, or plan again")


def check_destinations(arguments: argparse.Namespace) -> None:
    """Refuse small outputs with an impossible name or place before the work that fills them."""
    for flag in ("json", "plot", "tensor_type_file", "report"):
        wanted = getattr(arguments, flag, None)
        if wanted is None or wanted == "-":
            continue
        path, option = Path(wanted), "--" + flag.replace("_", "-")
        if path.is_dir() and flag != "report":
            raise OutputError(f"{option} {path}: is a folder; pass a file name")
        if not path.parent.is_dir():
            raise OutputError(f"{option} {path}: no folder {path.parent}; create it first")
        if is_gguf(path):
            raise OutputError(f"{option} {path}: is a GGUF file and is not replaced; choose another name")
        if flag == "plot":
            check_plot(path)
        if flag == "report":
            check_report(path)
            n_targets = len(getattr(arguments, "target_bpw", None) or ())
            if n_targets > 1 and not path.is_dir():
                raise PlanError(f"--report {path}: one page cannot hold {n_targets} targets; pass a folder")
