"""The arguments of every verb, and how their texts are read."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__, allocate
from ..allocate import DEFAULT_TYPES, Pin
from ..compare import DEFAULT_STOCK, N_SEEDS
from ..errors import NsdsError
from ..evaluate.perplexity import DEFAULT_BATCH, MIN_CTX
from ..llamacpp import ggml, llama
from ..publish.model_card import is_repo
from ..records import EFFORTS, SELF
from ..score import METRICS, SE_READINGS
from ..sensitivity.result import IMPORTANCES
from ..session.effort import AUTO, AUTO_HIGH_WEIGHTS, PLAIN_IMPORTANCE
from .options import DEFAULT_SCORING
from .screen import Screen
from .verbs import (
    run_bundle,
    run_compare,
    run_convert,
    run_inspect,
    run_perplexity,
    run_plan,
    run_report,
    run_score,
)

USAGE_EXIT = 2

EXIT_CODES = """exit codes:
  0 done   2 wrong usage   3 model   4 plan, target or record   5 output, disk or memory
  6 text   7 verification failed   8 ggml or llama.cpp   129 hung up   130 interrupted   143 terminated"""

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(?:([KMG])(i?))?B?", re.IGNORECASE)
_SIZE_POWERS = {"K": 1, "M": 2, "G": 3}


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
    parser = _add_verb(
        verbs, "convert", run_convert, "convert a model to a GGUF within a budget",
        "nsds-gguf convert model/ --target-bpw 3.0",
        "convert a model to a GGUF within a budget; without a budget, show what sizes it could have and write nothing",
    )  # fmt: skip
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
                       help="measure the KL divergence from: 'original' (a GGUF input itself; of a folder, a temporary "
                       "GGUF of its precision) or a GGUF file (default: the original where it is a GGUF anyway: with "
                       "GGUF input, or when the model generates text)")  # fmt: skip
    group.add_argument("--no-verify", action="store_true", help="skip the perplexity check; structure is still checked")
    group = parser.add_argument_group("bundle")
    group.add_argument("--bundle", metavar="DIR", type=Path,
                       help="write the file into a folder with a Modelfile for Ollama, a model card for Hugging Face, "
                       "plan, scores and SHA-256 sums")  # fmt: skip
    _add_bundle_options(group)
    _add_general(parser)
    parser.set_defaults(tensor_types=None, why=[])


def _add_plan(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "plan", run_plan, "show the types that convert would choose",
        "nsds-gguf plan model/ --target-size 700M --scores scores.json --json plan.json",
        "show the types that convert would choose; without a budget, what sizes the model could have",
    )  # fmt: skip
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
    group.add_argument(
        "--score-weight",
        metavar="G",
        type=float,
        default=allocate.SCORE_WEIGHT,
        help="multiply sensitivities of a layer by exp(G (score - mean score)) (%(default)g unless told)",
    )
    group.add_argument("--pin", metavar="REGEX=TYPE", action="append", default=[],
                       type=_argument(Pin.parse, "REGEX=TYPE"),
                       help="fix the type of tensors whose whole name matches; repeatable")  # fmt: skip
    _add_types(group)


def _add_types(group: Any) -> None:
    group.add_argument("--types", metavar="LIST", type=_argument(parse_types, "some of " + ",".join(ggml.TYPES)),
                       default=",".join(DEFAULT_TYPES),
                       help="types to choose from (%(default)s unless told)")  # fmt: skip
    group.add_argument("--importance", choices=(*IMPORTANCES, SELF),
                       help="column importance for the quantizers; self: from text that the model writes first"
                       f" ({SELF} with high effort, {PLAIN_IMPORTANCE} with normal unless told)")  # fmt: skip
    group.add_argument(
        "--effort",
        choices=(AUTO, *EFFORTS),
        default=AUTO,
        help="high: the model writes a text and weights are rounded with feedback from column to"
        " column; much less divergence in several times the time; auto: high for models of up to"
        f" {AUTO_HIGH_WEIGHTS / 1e9:g} B weights unless importance or another allocator is named"
        " (%(default)s unless told)",
    )
    group.add_argument("--imatrix", metavar="FILE", type=Path,
                       help="column importance from an importance matrix of llama.cpp, as GGUF or .dat")  # fmt: skip


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
