"""The verbs: each reads its options, does the work and shows the results."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.text import Text

from ..comparison import Budgets, compare
from ..conversion import Converted, convert, score
from ..conversion import plan as make_plans
from ..errors import PlanError
from ..evaluate.inspect import inspect_gguf
from ..evaluate.perplexity import Measurement, Perplexity, Window, perplexity
from ..evaluate.texts import ORIGINAL, SHIPPED_TEXT, VerifyOptions, evaluation_text, spoken
from ..evaluate.truth import truth
from ..llamacpp.gguf_header import is_gguf
from ..llamacpp.memory import Context
from ..publish import bundle as bundles
from ..publish.bundle import Bundle, bundle_folder, make_bundle, ollama_create
from ..publish.explain import why
from ..publish.first_words import DEFAULT_PROMPT, sample
from ..publish.plot import plot_comparison, plot_scores, plot_sizes
from ..publish.report import Check, Report, file_report, plan_report, write_report
from ..publish.tensor_type_file import tensor_type_file
from ..publish.upload import Destination, upload
from ..records import Plan, Scores, read_json
from ..session.outputs import Output
from ..session.reference import reference_of
from ..session.sizes import Sizes, possible_sizes
from ..session.source import Source
from . import display
from .fit import CONTEXTS, DEFAULTS, MEMORIES, projector_bytes
from .fit_view import fits_view, memory_view
from .inspect_view import inspection_view
from .options import (
    check_bundle_arguments,
    check_sizes_arguments,
    is_open,
    loaded_record,
    next_command,
    options_of,
    output_options,
    public_command,
    public_word,
    run_of,
    source_of,
    verify_options,
)
from .screen import Screen, write_json, write_text


def run_convert(arguments: argparse.Namespace, screen: Screen) -> None:
    """Convert a model; with ``--dry-run`` show the plan, without a budget the possible sizes."""
    check_bundle_arguments(arguments)
    if is_open(arguments):
        run_sizes(arguments, screen)
    elif arguments.dry_run:
        run_plan(arguments, screen)
    elif arguments.bundle is None:
        results = _convert(arguments, screen, output_options(arguments))
        write_json(arguments.json, [_converted_json(arguments, screen, result) for result in results])
    else:
        with bundle_folder(arguments.bundle, arguments.force, screen) as folder:
            results = _convert(
                arguments, screen, Output(folder, arguments.force, arguments.keep_failed, arguments.mmproj)
            )
            bundles = [_bundle_converted(arguments, screen, folder, result) for result in results]
        write_json(arguments.json, [
            {
                **_converted_json(arguments, screen, result),
                "bundle": bundle.to_json(),
                **_upload(arguments, screen, bundle),
            }
            for result, bundle in zip(results, bundles, strict=True)
        ])  # fmt: skip


def _convert(arguments: argparse.Namespace, screen: Screen, output: Output) -> list[Converted]:
    """Convert and show the results."""
    results = convert(
        source_of(arguments),
        options_of(arguments),
        verifying=verify_options(arguments),
        output=output,
        loaded=loaded_record(arguments),
        run=run_of(arguments, screen),
    )
    for result in results:
        screen.show(display.plan_view(result.plan))
        if screen.verbose:
            screen.show(display.plan_details(result.plan))
        if result.fitted is not None:
            screen.show(memory_view(result.fitted))
        if result.perplexity is not None:
            screen.show(display.perplexity_view(result.perplexity, result.path.name, result.reference, result.notes))
        if result.embedding is not None:
            screen.show(display.embedding_view(result.embedding, result.path.name, result.reference))
        _show_file(screen, result.path)
        if arguments.report is not None:
            _write_report(arguments, screen, result.path.stem, _converted_report(arguments, result))
    if results[0].projector is not None:
        _show_file(screen, results[0].projector)
    return results


def _show_file(screen: Screen, path: Path) -> None:
    screen.show(Text.assemble((str(path), "bold"), f": {path.stat().st_size / 2**20:.2f} MiB"))


def _converted_report(arguments: argparse.Namespace, result: Converted) -> Report:
    text = SHIPPED_TEXT if arguments.text is None else arguments.text.name
    reference = result.reference
    if reference is not None and reference != ORIGINAL:  # the page has words for it
        reference = spoken(reference)
    return plan_report(
        result.plan,
        scores=result.scores,
        check=Check(result.perplexity, text, reference, result.notes) if result.perplexity else None,
        architecture=inspect_gguf(result.path).architecture,
        model=public_word(str(arguments.model)),
        given=public_command(arguments.given),
    )


def _write_report(arguments: argparse.Namespace, screen: Screen, name: str, report: Report) -> None:
    """Write a page to ``--report``, or under a name in that folder."""
    path: Path = arguments.report / f"{name}.html" if arguments.report.is_dir() else arguments.report
    write_report(report, path)
    screen.show(Text(f"report: {path}"))


def _converted_json(arguments: argparse.Namespace, screen: Screen, result: Converted) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": str(result.path),
        "plan": result.plan.to_json(),
        "perplexity": result.perplexity.to_json() if result.perplexity else None,
        "reference": result.reference,
        "notes": result.notes,
    }
    if result.fitted is not None:
        found["memory"] = result.fitted.to_json()
    if result.embedding is not None:
        found["embedding"] = result.embedding.to_json()
    if result.projector is not None:
        found["projector"] = {"path": str(result.projector), "bytes": result.projector.stat().st_size}
    speaks = arguments.bundle is not None and not arguments.no_verify and result.embedding is None
    if arguments.chat is not None or speaks:
        found["sample"] = _show_sample(arguments, screen, result.path)
    return found


def _bundle_converted(arguments: argparse.Namespace, screen: Screen, folder: Path, result: Converted) -> Bundle:
    source = bundles.Source(
        path=result.source,
        base_model=arguments.base_model,
        plan=result.plan,
        scores=result.scores,
        perplexity=result.perplexity,
        embedding=result.embedding,
        text=SHIPPED_TEXT if arguments.text is None else arguments.text.name,
        command=public_command(arguments.given),
        reference=result.reference,
        projector=result.projector,
    )
    return _bundle(arguments, screen, result.path, folder, source)


def _bundle(arguments: argparse.Namespace, screen: Screen, file: Path, folder: Path, source: bundles.Source) -> Bundle:
    """Make a bundle, show its files, and with ``--ollama`` pass it to Ollama."""
    bundle = make_bundle(file, folder, source, screen)
    screen.show(display.bundle_view(bundle))
    if arguments.ollama is not None:
        with screen.stage("ollama create"):
            ollama_create(bundle, arguments.ollama)
        screen.show(Text(f"ollama run {arguments.ollama}"))
    return bundle


def _upload(arguments: argparse.Namespace, screen: Screen, bundle: Bundle) -> dict[str, Any]:
    """Upload a bundle where that is wanted, show what happened, and return it for the JSON."""
    if arguments.upload is None:
        return {}
    where = Destination(arguments.upload, arguments.public, arguments.force, arguments.upload_dry_run)
    found = upload(bundle, where, screen)
    screen.show(display.upload_view(found))
    return {"upload": found.to_json()}


def _show_sample(arguments: argparse.Namespace, screen: Screen, file: Path) -> dict[str, Any]:
    """Show the beginning of a finished file's answer."""
    with screen.stage("first words"):
        found = sample(file, DEFAULT_PROMPT if arguments.chat is None else arguments.chat, arguments.threads)
    screen.show(display.sample_view(found))
    return found.to_json()


def run_bundle(arguments: argparse.Namespace, screen: Screen) -> None:
    """Put a GGUF and the files that belong to it into a folder."""
    check_bundle_arguments(arguments)
    plan = None if arguments.plan is None else Plan.from_json(read_json(arguments.plan), str(arguments.plan))
    scores = None if arguments.scores is None else Scores.from_json(read_json(arguments.scores), str(arguments.scores))
    inspect_gguf(arguments.file)
    with bundle_folder(arguments.bundle, arguments.force, screen) as folder:
        source = bundles.Source(arguments.file, arguments.base_model, plan, scores, projector=arguments.mmproj)
        bundle = _bundle(arguments, screen, arguments.file, folder, source)
    found: dict[str, Any] = {"bundle": bundle.to_json(), **_upload(arguments, screen, bundle)}
    if arguments.chat is not None:
        found["sample"] = _show_sample(arguments, screen, bundle.gguf)
    write_json(arguments.json, found)


def run_plan(arguments: argparse.Namespace, screen: Screen) -> None:
    """Plan without writing a model."""
    if is_open(arguments):
        run_sizes(arguments, screen)
        return
    options = options_of(arguments)
    if arguments.tensor_type_file is not None and len(options) > 1:
        raise PlanError(f"--tensor-type-file holds one plan, got {len(options)} targets; pass one")
    planned = make_plans(
        source_of(arguments),
        options,
        output=Output(mmproj=getattr(arguments, "mmproj", None)),
        loaded=loaded_record(arguments),
        run=run_of(arguments, screen),
    )
    plans = planned.plans
    for plan, fits in zip(plans, planned.fitted, strict=True):
        screen.show(display.plan_view(plan))
        if fits is not None:
            screen.show(memory_view(fits))
        if screen.verbose:
            screen.show(display.plan_details(plan))
        for name in arguments.why:
            screen.show(Text(why(plan, planned.scores, name)))
        if arguments.report is not None:
            page = plan_report(plan, scores=planned.scores, model=public_word(str(arguments.model)))
            _write_report(arguments, screen, f"plan-{plan.bpw:.2f}bpw", page)
    for each in planned.projectors:
        screen.show(Text(f"{each.path.name}: {each.n_bytes / 2**20:.2f} MiB"))
    if arguments.tensor_type_file is not None:
        write_text(arguments.tensor_type_file, tensor_type_file(plans[0]))
    write_json(arguments.json, plans[0].to_json() if len(plans) == 1 else [plan.to_json() for plan in plans])


def run_sizes(arguments: argparse.Namespace, screen: Screen) -> None:
    """Show the possible sizes of a model, and the command for one of them; write nothing."""
    check_sizes_arguments(arguments)
    loaded = loaded_record(arguments)
    (options,) = options_of(arguments)
    found = possible_sizes(
        source_of(arguments),
        options,
        loaded=loaded if isinstance(loaded, Scores) else None,
        run=run_of(arguments, screen),
    )
    screen.show(display.sizes_view(found, next_command(arguments.given, found.proposed.target_bpw)))
    write_json(arguments.json, found.to_json())


def run_what_fits(arguments: argparse.Namespace, screen: Screen) -> None:
    """Show the possible sizes of a model, and which of them fit common memories; write nothing."""
    loaded = Scores.from_json(read_json(arguments.scores), str(arguments.scores)) if arguments.scores else None
    (options,) = options_of(argparse.Namespace(**{**vars(arguments), "cache_type": None, "projector": None}))
    projector = projector_bytes(arguments.projector)
    found = possible_sizes(
        source_of(arguments),
        options,
        loaded=loaded,
        run=run_of(arguments, screen),
        contexts=[Context(n_ctx, arguments.cache_type or DEFAULTS.cache_type) for n_ctx in CONTEXTS],
    )
    found = replace(found, beside=tuple(replace(beside, projector=projector) for beside in found.beside))
    if found.beside:
        screen.show(fits_view(found, MEMORIES))
    screen.show(display.sizes_view(found, next_command(arguments.given, found.proposed.target_bpw)))
    if arguments.plot is not None:
        plot_sizes(found, MEMORIES, arguments.plot)
        screen.say(f"picture: {arguments.plot}")
    write_json(arguments.json, {**found.to_json(), "fits": _fits_json(found)})


def _fits_json(found: Sizes) -> list[dict[str, Any]]:
    """Return an entry per memory and context; without a size that fits, its budget is ``None``."""
    entries = []
    for memory, (context, beside) in product(MEMORIES, zip(found.contexts, found.beside, strict=False)):
        size = found.largest_that_fits(memory, beside)
        entries.append({
            "memory_bytes": memory,
            "n_ctx": context.n_ctx,
            "target_bpw": size and size.target_bpw,
            "predicted": size and size.predicted,
            "left": size and memory - beside.total - size.file_bytes,
        })  # fmt: skip
    return entries


def run_report(arguments: argparse.Namespace, screen: Screen) -> None:
    """Show a plan or a GGUF as a page."""
    file: Path = arguments.file
    if not is_gguf(file):
        plan = Plan.from_json(read_json(file), str(file))
        scores = arguments.scores and Scores.from_json(read_json(arguments.scores), str(arguments.scores))
        report = plan_report(plan, scores=scores)
    elif arguments.scores is None:
        report = file_report(inspect_gguf(file))
    else:
        raise PlanError(f"{file}: --scores needs a plan, got a GGUF, which may come from other scores; pass the plan")
    _write_report(arguments, screen, file.stem, report)
    write_json(arguments.json, report.to_json())


def run_score(arguments: argparse.Namespace, screen: Screen) -> None:
    """Score layers and measure tensors."""
    (options,) = options_of(arguments)
    scores = score(source_of(arguments), options, measures=not arguments.layers_only, run=run_of(arguments, screen))
    screen.show(display.scores_view(scores))
    if arguments.plot is not None:
        plot_scores(scores, arguments.plot)
        screen.say(f"picture: {arguments.plot}")
    write_json(arguments.json, scores.to_json())


def run_perplexity(arguments: argparse.Namespace, screen: Screen) -> None:
    """Measure perplexity, and with ``--reference`` the divergence; an interrupted run shows its finished chunks."""
    text = evaluation_text(VerifyOptions(arguments.text, arguments.ctx_size))
    _check_trained_context(arguments, screen)
    if arguments.reference is not None and not arguments.reference.is_dir():
        inspect_gguf(arguments.reference)
    runs: list[Measurement] = []
    try:
        found = _measure_perplexity(arguments, screen, text, runs)
    except KeyboardInterrupt:
        if runs:
            _show_perplexity(arguments, screen, runs[-1].result())
        raise
    _show_perplexity(arguments, screen, found)


def _check_trained_context(arguments: argparse.Namespace, screen: Screen) -> None:
    metadata = inspect_gguf(arguments.file).metadata
    n_ctx_train = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(n_ctx_train, int) and arguments.ctx_size > n_ctx_train:
        screen.warn(
            f"{arguments.file}: was trained for {n_ctx_train} tokens, --ctx-size is {arguments.ctx_size}: beyond the "
            f"first {n_ctx_train} tokens of a chunk, perplexity says little about the file"
        )


def _measure_perplexity(
    arguments: argparse.Namespace, screen: Screen, text: str, runs: list[Measurement]
) -> Perplexity:
    """Run the measurement, which joins ``runs`` with its first chunk."""

    def on_chunk(run: Measurement) -> None:
        runs[:] = [run]
        divergence = "" if run.kld_mean is None else f", KLD {run.kld_mean:.6f}"
        screen.annotate(f"chunk {run.n_chunks} of {run.n_chunks_wanted}: PPL {run.ppl:.4f}{divergence}")

    with (
        reference_of(
            arguments.reference and Source(arguments.reference, arguments.pre_tokenizer),
            arguments.file,
            text,
            arguments.ctx_size,
            run_of(arguments, screen),
        ) as reference,
        screen.stage("perplexity") as progress,
    ):  # fmt: skip
        return perplexity(
            arguments.file,
            text,
            Window(arguments.ctx_size, arguments.chunks or None, arguments.batch),
            n_threads=arguments.threads,
            reference=reference,
            progress=progress,
            on_chunk=on_chunk,
        )


def _show_perplexity(arguments: argparse.Namespace, screen: Screen, found: Perplexity) -> None:
    reference = arguments.reference
    screen.show(display.perplexity_view(found, arguments.file.name, reference and reference.name))
    if found.divergence is not None:
        screen.show(display.divergence_details(found.divergence))
    compared = {"reference": str(reference)} if reference else {}
    write_json(arguments.json, {"file": str(arguments.file), **compared, **found.to_json()})


def run_compare(arguments: argparse.Namespace, screen: Screen) -> None:
    """Compare our plan with other allocations and llama.cpp's presets at equal bytes."""
    (options,) = options_of(argparse.Namespace(**{**vars(arguments), "target_bpw": None}))
    found = compare(
        source_of(arguments),
        arguments.output,
        Budgets(tuple(arguments.target_bpw or ()), arguments.presets, arguments.seeds),
        options,
        verifying=VerifyOptions(arguments.text, arguments.ctx_size, arguments.chunks or None),
        run=run_of(arguments, screen),
    )
    screen.show(display.comparison_view(found))
    if arguments.plot is not None:
        plot_comparison(found, arguments.plot)
        screen.say(f"picture: {arguments.plot}")
    write_json(arguments.json, found.to_json())


def run_inspect(arguments: argparse.Namespace, screen: Screen) -> None:
    """Show the contents of a GGUF."""
    found = inspect_gguf(arguments.file)
    screen.show(inspection_view(found))
    said = truth(found)
    if found.tensors:
        screen.show(Text(said.line))
    write_json(arguments.json, {**found.to_json(), "truth": said.to_json()})
