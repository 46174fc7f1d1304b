"""The command line: arguments in, tables and exit codes out. The only module that prints.

Results go to standard output, progress and notes to standard error; with ``--json -`` standard output holds JSON alone.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from . import allocate, convert, display, ggml, llama
from .allocate import DEFAULT_TYPES, Pin, PlanOptions
from .bundle import Bundle, Source, bundle_folder, check_ollama, make_bundle, ollama_create
from .compare import DEFAULT_STOCK, N_SEEDS, compare
from .errors import NsdsError, OutputError, PlanError
from .explain import why
from .gguf_header import is_gguf
from .hub import HubName, parse_name
from .inspect import inspect_gguf
from .inspect_view import inspection_view
from .model_card import is_repo
from .perplexity import DEFAULT_BATCH, MIN_CTX, Measurement, Perplexity, perplexity
from .plot import check_plot, plot_comparison, plot_scores
from .records import Plan, Progress, Scores, Target, read_json
from .report import Check, Report, check_report, file_report, plan_report, write_report
from .sample import DEFAULT_PROMPT, sample
from .score import METRICS, SE_READINGS
from .version import __version__

USAGE_EXIT = 2
SIGNAL_EXIT = 128  # plus the number of the signal, as shells have it

EXIT_CODES = """exit codes:
  0 done   2 wrong usage   3 model   4 plan, target or record   5 output, disk or memory
  6 text   7 verification failed   8 ggml or llama.cpp   130 interrupted   143 terminated"""

DEFAULT_SCORING = convert.ScoreOptions()

_FILE_WIDTH = 140  # columns of tables that go to a file or a pipe
_MAX_MESSAGE = 2000  # characters of an error line: damaged files can hold names of any length

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(?:([KMG])(i?))?B?", re.IGNORECASE)
_SIZE_POWERS = {"K": 1, "M": 2, "G": 3}


class _Stopped(KeyboardInterrupt):
    """A signal asks the program to end; raised where Ctrl-C would be, so that temporary files go."""

    def __init__(self, number: int, _frame: object) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> NoReturn:
    raise _Stopped(number, frame)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _handle_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables have lines and dashes that not every terminal knows
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(given, argparse.Namespace(given=given))
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    screen = Screen(quiet=arguments.quiet, json_to_stdout=arguments.json == "-", verbose=arguments.verbose)
    try:
        check_destinations(arguments)
        arguments.run(arguments, screen)
        print(end="", flush=True)  # a full disk or a closed pipe shows here, not at exit
    except NsdsError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
        return _fail(f"stopped by {signal.Signals(number).name}; no unfinished file is left", SIGNAL_EXIT + number)
    except MemoryError:
        return _fail("out of memory; lower --threads or close other programs", OutputError.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        return SIGNAL_EXIT + signal.SIGPIPE
    except OSError as error:  # of the system, whatever it was about: permissions, names too long, a disk that fails
        if error.filename is None:
            _drop_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", OutputError.exit_code)
    return 0


def _handle_signals() -> None:
    """End on what would kill the process without a chance to clean up; what is ignored (nohup) stays ignored."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _drop_output() -> None:
    """Send what is left in the buffer of standard output nowhere: Python would fail on it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)  # names from a file may drive the terminal
    print(f"error: {line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + '…'}", file=sys.stderr)
    return code


class _Console(Console):
    """A console that shows names and templates as they are, brackets too, and leaves a closed pipe to ``main``."""

    def __init__(self, *, stderr: bool, quiet: bool) -> None:
        super().__init__(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _TimeLeftColumn(ProgressColumn):
    """The time left at the average speed so far, known from the first step on: steps may take minutes."""

    def render(self, task: Task) -> Text:
        """Return it as hours, minutes and seconds."""
        if not task.total or not task.completed or task.elapsed is None:
            return Text("-:--:--", style="progress.remaining")
        left = task.elapsed * (task.total - task.completed) / task.completed
        return Text(str(timedelta(seconds=round(left))), style="progress.remaining")


class Screen:
    """Draws what happens: bars on a terminal, notes on standard error, results on standard output."""

    def __init__(self, *, quiet: bool, json_to_stdout: bool, verbose: bool) -> None:
        """Take what the user wants to see."""
        self.notes = _Console(stderr=True, quiet=quiet)
        self.results = _Console(stderr=json_to_stdout, quiet=quiet)
        if not self.results.is_terminal:
            self.results.width = _FILE_WIDTH
        self.verbose = verbose
        self.draws_bars = self.notes.is_terminal and not quiet
        self._annotate: Callable[[str], None] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Show one stage as a bar with the time it takes; off a terminal, as one line when it is done."""
        start = time.perf_counter()
        if not self.draws_bars:
            yield lambda done, total: None
            if self.verbose:
                self.notes.print(f"{name}: {time.perf_counter() - start:.1f} s")
            return
        columns = (TextColumn("{task.description:<24}"), BarColumn(None), TaskProgressColumn(), TimeElapsedColumn(),
                   _TimeLeftColumn())  # fmt: skip
        with Bars(*columns, console=self.notes) as bars:
            task = bars.add_task(name, total=None)
            self._annotate = lambda text: bars.update(task, description=text)
            yield lambda done, total: bars.update(task, completed=done, total=total)
            bars.update(task, completed=1, total=1)
        self._annotate = None

    def annotate(self, text: str) -> None:
        """Show a running figure in place of the name of the open bar; off a terminal, a line to who asked for more."""
        if self._annotate is not None:
            self._annotate(text)
        elif self.verbose:
            self.notes.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Tell what may spoil the result, in one line."""
        self.notes.print(f"warning: {text}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Tell one fact in one line; off a terminal, only to who asked for more."""
        if self.notes.is_terminal or self.verbose:
            self.notes.print(text, soft_wrap=True)

    def show(self, view: RenderableType) -> None:
        """Show a result; text is one line, however long."""
        self.results.print(view, soft_wrap=isinstance(view, Text))


def write_json(destination: str | None, data: Any) -> None:
    """Write JSON to a file, or to standard output for ``-``; raises ``OutputError`` when that fails."""
    if destination is None:
        return
    text = json.dumps(data, indent=1) + "\n"  # ASCII: the terminal's encoding does not matter
    if destination == "-":
        print(text, end="")
        return
    write_text(Path(destination), text)


def write_text(path: Path, text: str) -> None:
    """Write a small file; raises ``OutputError`` when that fails."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error


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


# --- verbs -----------------------------------------------------------------------------------------------------------


def run_convert(arguments: argparse.Namespace, screen: Screen) -> None:
    """Convert a model, or with ``--dry-run`` show what would be written."""
    check_bundle_arguments(arguments)
    if arguments.dry_run:
        run_plan(arguments, screen)
    elif arguments.bundle is None:
        results = _convert(arguments, screen, output_options(arguments))
        write_json(arguments.json, [_converted_json(arguments, screen, result) for result in results])
    else:
        with bundle_folder(arguments.bundle, arguments.force) as folder:
            results = _convert(arguments, screen, convert.Output(folder, arguments.force, arguments.keep))
            bundles = [_bundle_converted(arguments, screen, folder, result) for result in results]
        write_json(arguments.json, [
            {**_converted_json(arguments, screen, result), "bundle": bundle.to_json()}
            for result, bundle in zip(results, bundles, strict=True)
        ])  # fmt: skip


def _convert(arguments: argparse.Namespace, screen: Screen, output: convert.Output) -> list[convert.Converted]:
    """Convert and show what came out."""
    results = convert.convert(
        model_source(arguments),
        [] if arguments.plan else plan_options(arguments),
        scoring=scoring_options(arguments),
        verifying=verify_options(arguments),
        output=output,
        given=given_record(arguments),
        pre=arguments.pre,
        allow_requantize=arguments.allow_requantize,
        n_threads=arguments.threads,
        report=screen,
    )
    for result in results:
        screen.show(display.plan_view(result.plan))
        if screen.verbose:
            screen.show(display.plan_details(result.plan))
        if result.perplexity is not None:
            screen.show(display.perplexity_view(result.perplexity, result.path.name, arguments.against))
        screen.show(Text.assemble((str(result.path), "bold"), f": {result.path.stat().st_size / 2**20:.2f} MiB"))
        if arguments.report is not None:
            _write_report(arguments, screen, result.path.stem, _converted_report(arguments, result))
    return results


def _converted_report(arguments: argparse.Namespace, result: convert.Converted) -> Report:
    text = convert.SHIPPED_TEXT if arguments.text is None else arguments.text.name
    against = None if arguments.against is None else Path(arguments.against).name
    return plan_report(
        result.plan,
        scores=result.scores,
        check=Check(result.perplexity, text, against) if result.perplexity else None,
        architecture=inspect_gguf(result.path).architecture,
        model=_public_word(str(arguments.model)),
        given=public_command(arguments.given),
    )


def _write_report(arguments: argparse.Namespace, screen: Screen, name: str, report: Report) -> None:
    """Write a page where it is wanted; in a folder, under a name."""
    path: Path = arguments.report / f"{name}.html" if arguments.report.is_dir() else arguments.report
    write_report(report, path)
    screen.show(Text(f"report: {path}"))


def _converted_json(arguments: argparse.Namespace, screen: Screen, result: convert.Converted) -> dict[str, Any]:
    found: dict[str, Any] = {
        "path": str(result.path),
        "plan": result.plan.to_json(),
        "perplexity": result.perplexity.to_json() if result.perplexity else None,
    }
    if arguments.chat is not None or (arguments.bundle is not None and not arguments.no_verify):
        found["sample"] = _show_sample(arguments, screen, result.path)
    return found


def _bundle_converted(arguments: argparse.Namespace, screen: Screen, folder: Path, result: convert.Converted) -> Bundle:
    source = Source(
        path=result.source,
        base_model=arguments.base_model,
        plan=result.plan,
        scores=result.scores,
        perplexity=result.perplexity,
        text=convert.SHIPPED_TEXT if arguments.text is None else arguments.text.name,
        command=public_command(arguments.given),
    )
    return _bundle(arguments, screen, result.path, folder, source)


def _bundle(arguments: argparse.Namespace, screen: Screen, file: Path, folder: Path, source: Source) -> Bundle:
    """Make a bundle, show what it holds, and hand it to Ollama where that is wanted."""
    bundle = make_bundle(file, folder, source, screen)
    screen.show(display.bundle_view(bundle))
    if arguments.ollama is not None:
        with screen.stage("ollama create"):
            ollama_create(bundle, arguments.ollama)
        screen.show(Text(f"ollama run {arguments.ollama}"))
    return bundle


def _show_sample(arguments: argparse.Namespace, screen: Screen, file: Path) -> dict[str, Any]:
    """Let a finished file say its first words."""
    with screen.stage("first words"):
        found = sample(file, DEFAULT_PROMPT if arguments.chat is None else arguments.chat, arguments.threads)
    screen.show(display.sample_view(found))
    return found.to_json()


def run_bundle(arguments: argparse.Namespace, screen: Screen) -> None:
    """Put a GGUF and what belongs to it into a folder."""
    check_bundle_arguments(arguments)
    plan = None if arguments.plan is None else Plan.from_json(read_json(arguments.plan), str(arguments.plan))
    scores = None if arguments.scores is None else Scores.from_json(read_json(arguments.scores), str(arguments.scores))
    inspect_gguf(arguments.file)
    with bundle_folder(arguments.bundle, arguments.force) as folder:
        source = Source(arguments.file, arguments.base_model, plan, scores)
        bundle = _bundle(arguments, screen, arguments.file, folder, source)
    found: dict[str, Any] = {"bundle": bundle.to_json()}
    if arguments.chat is not None:
        found["sample"] = _show_sample(arguments, screen, bundle.gguf)
    write_json(arguments.json, found)


def run_plan(arguments: argparse.Namespace, screen: Screen) -> None:
    """Plan without writing a model."""
    options = plan_options(arguments)
    if arguments.tensor_types is not None and len(options) > 1:
        raise PlanError(f"--tensor-types holds one plan, got {len(options)} targets; give one")
    planned = convert.plan(
        model_source(arguments),
        options,
        scoring=scoring_options(arguments),
        given=given_record(arguments),
        pre=arguments.pre,
        allow_requantize=arguments.allow_requantize,
        n_threads=arguments.threads,
        report=screen,
    )
    plans = planned.plans
    for plan in plans:
        screen.show(display.plan_view(plan))
        if screen.verbose:
            screen.show(display.plan_details(plan))
        for name in arguments.why:
            screen.show(Text(why(plan, planned.scores, name)))
        if arguments.report is not None:
            page = plan_report(plan, scores=planned.scores, model=_public_word(str(arguments.model)))
            _write_report(arguments, screen, f"plan-{plan.bpw:.2f}bpw", page)
    if arguments.tensor_types is not None:
        write_text(arguments.tensor_types, convert.tensor_types_file(plans[0]))
    write_json(arguments.json, plans[0].to_json() if len(plans) == 1 else [plan.to_json() for plan in plans])


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
        raise PlanError(f"{file}: a GGUF goes without --scores: they may not be those it was made from; give its plan")
    _write_report(arguments, screen, file.stem, report)
    write_json(arguments.json, report.to_json())


def run_score(arguments: argparse.Namespace, screen: Screen) -> None:
    """Score layers and measure tensors."""
    scores = convert.score_model(
        model_source(arguments),
        scoring_options(arguments),
        types=arguments.types,
        importance=arguments.importance,
        pre=arguments.pre,
        allow_requantize=arguments.allow_requantize,
        n_threads=arguments.threads,
        report=screen,
    )
    screen.show(display.scores_view(scores))
    if arguments.plot is not None:
        plot_scores(scores, arguments.plot)
        screen.say(f"picture: {arguments.plot}")
    write_json(arguments.json, scores.to_json())


def run_perplexity(arguments: argparse.Namespace, screen: Screen) -> None:
    """Measure perplexity, and with ``--against`` the divergence; an interrupted run shows what it found."""
    text = convert.evaluation_text(convert.VerifyOptions(arguments.text, arguments.ctx))
    _check_trained_context(arguments, screen)
    if arguments.against is not None and not arguments.against.is_dir():
        inspect_gguf(arguments.against)
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
    if isinstance(n_ctx_train, int) and arguments.ctx > n_ctx_train:
        screen.warn(
            f"{arguments.file}: trained for {n_ctx_train} tokens, --ctx {arguments.ctx} asked: beyond the first "
            f"{n_ctx_train} of a chunk the numbers say little about the file"
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
        convert.reference_of(
            arguments.against, arguments.file, text, arguments.ctx,
            pre=arguments.pre, n_threads=arguments.threads, report=screen,
        ) as reference,
        screen.stage("perplexity") as progress,
    ):  # fmt: skip
        return perplexity(
            arguments.file,
            text,
            n_ctx=arguments.ctx,
            n_chunks=arguments.chunks or None,
            n_threads=arguments.threads,
            n_batch=arguments.batch,
            against=reference,
            progress=progress,
            on_chunk=on_chunk,
        )


def _show_perplexity(arguments: argparse.Namespace, screen: Screen, found: Perplexity) -> None:
    reference = arguments.against
    screen.show(display.perplexity_view(found, arguments.file.name, reference and reference.name))
    if found.divergence is not None:
        screen.show(display.divergence_details(found.divergence))
    compared = {"against": str(reference)} if reference else {}
    write_json(arguments.json, {"file": str(arguments.file), **compared, **found.to_json()})


def run_compare(arguments: argparse.Namespace, screen: Screen) -> None:
    """Measure our plan, other allocations and llama.cpp's mixes at equal bytes."""
    stock = arguments.stock
    if stock is None:
        stock = () if arguments.target_bpw else DEFAULT_STOCK
    found = compare(
        model_source(arguments),
        [Target("bpw", value) for value in arguments.target_bpw or ()],
        stock,
        arguments.output,
        verifying=convert.VerifyOptions(arguments.text, arguments.ctx, arguments.chunks or None),
        scoring=scoring_options(arguments),
        n_seeds=arguments.seeds,
        types=arguments.types,
        importance=arguments.importance,
        pre=arguments.pre,
        allow_requantize=arguments.allow_requantize,
        n_threads=arguments.threads,
        report=screen,
    )
    screen.show(display.comparison_view(found))
    if arguments.plot is not None:
        plot_comparison(found, arguments.plot)
        screen.say(f"picture: {arguments.plot}")
    write_json(arguments.json, found.to_json())


def run_inspect(arguments: argparse.Namespace, screen: Screen) -> None:
    """Show what a GGUF holds."""
    found = inspect_gguf(arguments.file)
    screen.show(inspection_view(found))
    write_json(arguments.json, found.to_json())


# --- arguments to options --------------------------------------------------------------------------------------------


def plan_options(arguments: argparse.Namespace) -> list[PlanOptions]:
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
            importance=arguments.importance,
            prefer=arguments.prefer,
        )
        for target in targets or [Target("none", 0)]
    ]


def model_source(arguments: argparse.Namespace) -> Path | HubName:
    """Return the model's path or its name on the Hub; raises ``PlanError`` for a revision of a path."""
    name = parse_name(arguments.model, arguments.revision)
    if name is None and arguments.revision:
        raise PlanError(f"--revision {arguments.revision} is of a model of the Hub; {arguments.model} is a local path")
    return name or Path(arguments.model)


def scoring_options(arguments: argparse.Namespace) -> convert.ScoreOptions:
    """Return how layers are scored."""
    metric, se = arguments.metric or DEFAULT_SCORING.metric, arguments.se or DEFAULT_SCORING.se
    return convert.ScoreOptions(metric, se, not getattr(arguments, "layers_only", False))


def verify_options(arguments: argparse.Namespace) -> convert.VerifyOptions:
    """Return how the finished file is checked; raises ``PlanError`` for contradicting flags."""
    if arguments.no_verify and arguments.against is not None:
        raise PlanError("--no-verify skips the check that --against is for; drop one")
    return convert.VerifyOptions(
        text=arguments.text,
        n_ctx=arguments.ctx,
        n_chunks=arguments.chunks or None,
        against=arguments.against,
        enabled=not arguments.no_verify,
    )


def output_options(arguments: argparse.Namespace) -> convert.Output:
    """Return where the file goes; raises ``OutputError`` when a folder is meant and there is none."""
    name: str | None = arguments.output
    if name is not None and name.endswith(("/", os.sep)) and not Path(name).is_dir():
        raise OutputError(f"{name}: no such folder for the output; create it first")
    return convert.Output(None if name is None else Path(name), arguments.force, arguments.keep)


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
    return shlex.join(["nsds-gguf", *(_public_word(word) for word in words)])


def _public_word(word: str) -> str:
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


def parse_bpw_list(text: str) -> list[float]:
    """Parse ``2.8,3.2,4``."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 32 for value in values):
        raise ValueError(text)
    return values


def parse_size(text: str) -> int:
    """Parse bytes with an optional unit: ``1500000``, ``700M``, ``1.5GiB``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, letter, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** _SIZE_POWERS.get((letter or "").upper(), 0)
    if not 1 <= size < 2**63:
        raise ValueError(text)
    return int(size)


def parse_repo(text: str) -> str:
    """Parse the name of a repository on the Hub."""
    if not is_repo(text):
        raise ValueError(text)
    return text


def parse_type(text: str) -> str:
    """Parse the name of a type."""
    name = text.strip().upper()
    if name not in ggml.TYPES:
        raise ValueError(text)
    return name


def parse_types(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of types."""
    return tuple(dict.fromkeys(parse_type(part) for part in text.split(",")))


def _argument(parse: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """Make a parser of one argument that reports what was wanted."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except NsdsError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}") from error

    return parsed


def _integer_from(smallest: int) -> Callable[[str], Any]:
    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise ValueError(text)
        return value

    return _argument(parse, f"an integer from {smallest} up")


# --- the parser ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USAGE_EXIT)


class _VersionAction(argparse.Action):
    """``--version``: ours, ggml's and llama.cpp's, looked up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"nsds-gguf {__version__}, ggml {ggml.version()}, llama.cpp {llama.llama_build()}")
        parser.exit()


def build_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="nsds-gguf",
        description="Make the best small GGUF of a model: data-free scoring, exact bit allocation, checked result.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", nargs=0, action=_VersionAction, help="show versions and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    _add_convert(verbs)
    _add_score(verbs)
    _add_plan(verbs)
    _add_perplexity(verbs)
    _add_compare(verbs)
    _add_inspect(verbs)
    _add_bundle(verbs)
    _add_report(verbs)
    return parser


def _add_verb(verbs: Any, name: str, run: Callable[[argparse.Namespace, Screen], None], summary: str, example: str,
              description: str = "") -> Parser:  # fmt: skip
    parser: Parser = verbs.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=f"example: {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_convert(verbs: Any) -> None:
    parser = _add_verb(verbs, "convert", run_convert, "convert a model to a GGUF within a budget",
                       "nsds-gguf convert model/ --target-bpw 3.0")  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="output file or existing folder")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--keep", action="store_true", help="keep a file that failed verification as FILE.failed")
    parser.add_argument("--dry-run", action="store_true", help="plan only, write nothing")
    _add_page(parser)
    _add_budget(parser)
    _add_scoring(parser)
    _add_records(parser)
    group = parser.add_argument_group("verification")
    _add_text(group, chunks=8)
    group.add_argument("--against", metavar="REF",
                       help="also show perplexity of, and divergence from: 'original' (a GGUF input itself; of a "
                       "folder, a temporary GGUF of its precision) or a GGUF file")  # fmt: skip
    group.add_argument("--no-verify", action="store_true", help="skip the perplexity check; structure is still checked")
    group = parser.add_argument_group("bundle")
    group.add_argument("--bundle", metavar="DIR", type=Path,
                       help="write the file into a folder with a Modelfile for Ollama, a model card for Hugging Face, "
                       "plan, scores and SHA-256 sums")  # fmt: skip
    _add_bundle_options(group)
    _add_general(parser)
    parser.set_defaults(tensor_types=None, why=[])


def _add_plan(verbs: Any) -> None:
    parser = _add_verb(verbs, "plan", run_plan, "show the types that convert would choose",
                       "nsds-gguf plan model/ --target-size 700M --scores scores.json --json plan.json")  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    parser.add_argument("--tensor-types", metavar="FILE", type=Path,
                        help="write the plan for llama-quantize --tensor-type-file")  # fmt: skip
    parser.add_argument("--why", metavar="TENSOR", action="append", default=[],
                        help="say why a tensor has its type, and what one more or less would do")  # fmt: skip
    _add_page(parser)
    _add_budget(parser)
    _add_scoring(parser)
    _add_records(parser)
    _add_general(parser)


def _add_score(verbs: Any) -> None:
    parser = _add_verb(verbs, "score", run_score, "score layers and measure tensors, without data",
                       "nsds-gguf score model/ --json scores.json --plot scores.png")  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    parser.add_argument("--layers-only", action="store_true", help="skip the tensor measurements that plans need")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a picture, .png or .svg")
    _add_types(parser)
    _add_scoring(parser)
    _add_general(parser)


def _add_perplexity(verbs: Any) -> None:
    parser = _add_verb(verbs, "perplexity", run_perplexity, "measure perplexity as llama-perplexity does",
                       "nsds-gguf perplexity model-Q3.gguf --text wiki.test.raw --against model-F16.gguf")  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file")
    _add_text(parser, chunks=0)
    parser.add_argument("--batch", metavar="N", type=_integer_from(1), default=DEFAULT_BATCH,
                        help="tokens decoded at once (%(default)s unless told)")  # fmt: skip
    parser.add_argument("--against", metavar="REF", type=Path,
                        help="what to measure the divergence from: a GGUF file, or the model folder, of which a "
                        "temporary GGUF is made in the working directory")  # fmt: skip
    _add_pre(parser)
    _add_general(parser)


def _add_compare(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "compare", run_compare, "measure our plan beside other allocations and llama.cpp's own mixes",
        "nsds-gguf compare model/ --stock Q2_K,Q3_K_M --text wiki.test.raw -o comparison --plot pareto.png",
        "measure, at equal bytes and against the original, our plan, the paper's, one type for all, random types, and "
        "llama.cpp's own mixes; an interrupted comparison goes on where it stopped",
    )  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("comparison"),
                        help="folder for comparison.json and temporary files (%(default)s unless told)")  # fmt: skip
    parser.add_argument("--target-bpw", metavar="X[,X]", type=_argument(parse_bpw_list, "numbers in (0, 32]"),
                        help="budgets in bits per weight")  # fmt: skip
    parser.add_argument("--stock", metavar="LIST", type=lambda text: tuple(text.upper().split(",")),
                        help="llama.cpp's mixes, each a budget of its own bytes "
                        f"({','.join(DEFAULT_STOCK)} unless there are budgets)")  # fmt: skip
    parser.add_argument("--seeds", metavar="N", type=_integer_from(0), default=N_SEEDS,
                        help="random allocations a budget (%(default)s unless told)")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw divergence against bytes, .png or .svg")
    _add_types(parser)
    _add_scoring(parser)
    _add_text(parser.add_argument_group("measurement"), chunks=0)
    _add_general(parser)


def _add_inspect(verbs: Any) -> None:
    parser = _add_verb(verbs, "inspect", run_inspect, "show what a GGUF holds: its types by role and by layer",
                       "nsds-gguf inspect model-Q3.gguf")  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file")
    _add_general(parser)


def _add_bundle(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "bundle", run_bundle, "put a GGUF into a folder for Ollama and Hugging Face",
        "nsds-gguf bundle model-Q3.gguf -o model-Q3 --base-model ORG/NAME",
        "put a GGUF into a folder with a Modelfile for Ollama, a model card for Hugging Face and SHA-256 sums",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file; linked, or copied onto another disk")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, dest="bundle",
                        help="folder, made where there is none")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the bundle in the folder")
    _add_records(parser)
    _add_bundle_options(parser)
    _add_general(parser)


def _add_report(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "report", run_report, "show a plan or a GGUF as a web page: its bytes, layers and tensors",
        "nsds-gguf report plan.json --scores scores.json -o report.html",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="plan written by 'plan --json', or GGUF file")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, dest="report",
                        help="page to write, or existing folder")  # fmt: skip
    parser.add_argument("--scores", metavar="FILE", type=Path, help="scores that the plan was made from")
    _add_general(parser)


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", type=Path,
                        help="write a web page of bytes, layers, tensors and the result")  # fmt: skip


def _add_bundle_options(group: Any) -> None:
    group.add_argument("--base-model", metavar="ORG/NAME", type=_argument(parse_repo, "ORG/NAME"),
                       help="repository of the original, for the model card")  # fmt: skip
    group.add_argument("--ollama", metavar="NAME", help="run 'ollama create NAME' with the bundle")
    group.add_argument("--chat", metavar="PROMPT", help="show the first words of the finished file's answer")


def _add_requantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-requantize", action="store_true",
                        help="take a GGUF that is quantized already, whose errors add to the new ones")  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder, GGUF file, or ORG/MODEL on the Hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget")
    group.add_argument("--target-bpw", metavar="X[,X]", type=_argument(parse_bpw_list, "numbers in (0, 32]"),
                       help="bits of all tensors over weights of all tensors; several make several files")  # fmt: skip
    group.add_argument("--target-size", metavar="N", type=_argument(parse_size, "bytes, or with M, G, MiB or GiB"),
                       help="bytes of the whole file, for example 700M or 1.5GiB")  # fmt: skip
    group.add_argument("--allocator", choices=sorted(allocate.ALLOCATORS), help="how bits are spent (nsds unless told)")
    group.add_argument("--uniform", metavar="TYPE", type=_argument(parse_type, "one of " + ", ".join(ggml.TYPES)),
                       help="one type for all matrices, also F32, F16, BF16, Q8_0")  # fmt: skip
    group.add_argument("--prefer", choices=allocate.PREFERENCES, default="quality",
                       help="between types of the same quality: nothing else, or what ggml is fast with on CPUs"
                       " (%(default)s unless told)")  # fmt: skip
    group.add_argument("--pin", metavar="REGEX=TYPE", action="append", default=[],
                       type=_argument(Pin.parse, "REGEX=TYPE"),
                       help="fix the type of tensors whose whole name matches; repeatable")  # fmt: skip
    _add_types(group)


def _add_types(group: Any) -> None:
    group.add_argument("--types", metavar="LIST", type=_argument(parse_types, "some of " + ",".join(ggml.TYPES)),
                       default=",".join(DEFAULT_TYPES),
                       help="types to choose from (%(default)s unless told)")  # fmt: skip
    group.add_argument("--importance", choices=tuple(allocate.IMPORTANCES), default="sweep",
                       help="column importance for the quantizers (%(default)s unless told)")  # fmt: skip


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    group.add_argument("--metric", choices=tuple(METRICS), help=f"layer score ({DEFAULT_SCORING.metric} unless told)")
    group.add_argument("--se", choices=tuple(SE_READINGS),
                       help=f"reading of structural expressiveness ({DEFAULT_SCORING.se} unless told)")  # fmt: skip
    _add_pre(group)


def _add_pre(group: Any) -> None:
    group.add_argument("--pre", metavar="NAME", help="llama.cpp's pre-tokenizer, in place of the one recognised")


def _add_records(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("records of earlier runs")
    group.add_argument("--scores", metavar="FILE", type=Path, help="scores written by 'score --json'")
    group.add_argument("--plan", metavar="FILE", type=Path, help="plan written by 'plan --json'")


def _add_text(group: Any, chunks: int) -> None:
    group.add_argument("--text", metavar="FILE", type=Path, help="evaluation text (a chapter of Dickens unless told)")
    group.add_argument("--ctx", metavar="N", type=_integer_from(MIN_CTX), default=512,
                       help="tokens of a chunk (%(default)s unless told)")  # fmt: skip
    group.add_argument("--chunks", metavar="N", type=_integer_from(0), default=chunks,
                       help="chunks to take, 0 for all (%(default)s unless told)")  # fmt: skip


def _add_general(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("--json", metavar="FILE", help="write the result as JSON, - for standard output")
    group.add_argument("--threads", metavar="N", type=_integer_from(1),
                       help="threads to use (one a core unless told)")  # fmt: skip
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    loudness.add_argument("-v", "--verbose", action="store_true", help="show every tensor, stage times and logs")
