"""The arguments of every verb, and how they are parsed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..allocate import ALLOCATORS, LARGER_TYPES, PREFERENCES, parse_tensor_type
from ..calibration import CALIBRATIONS
from ..calibration.generated_text import LENGTH, N_TOKENS
from ..calibration.kinds import N_SEQUENCES_GENERATED
from ..comparison import DEFAULT_PRESETS, N_SEEDS
from ..compute import BACKENDS
from ..evaluate.perplexity import DEFAULT_BATCH, MIN_CTX
from ..evaluate.texts import DEFAULT_CTX
from ..llamacpp import ggml, llama
from ..metrics import METRICS, SE_READINGS
from ..quantize import ROUNDINGS
from ..read.architectures.mtp import DROP, KEEP
from ..read.projector import PROJECTOR_TYPES
from ..records import AUTO, K_TYPES, Options
from ..session.pad import PADDINGS
from ..session.settle import (
    DEFAULT_ALLOCATOR,
    DEFAULT_METRIC,
    DEFAULT_SE,
    GENERATED,
    GPTQ_WEIGHTS,
    RANDOM,
)
from ..system.cluster import LOCAL
from .fit import CONTEXTS, MEMORIES, add_cache, add_fit
from .fit import DEFAULTS as FIT
from .screen import Screen
from .values import argument as _argument
from .values import integer_from as _integer_from
from .values import parse_bpw_list, parse_projector_type, parse_repo, parse_size, parse_type, parse_types
from .verbs import (
    run_bundle,
    run_compare,
    run_convert,
    run_inspect,
    run_perplexity,
    run_plan,
    run_report,
    run_score,
    run_what_fits,
)

DEFAULTS = Options()

USAGE_EXIT = 2

EXIT_CODES = """exit codes:
  0 done   2 wrong usage   3 model   4 plan, target or record   5 output, disk or memory
  6 text   7 verification failed   8 ggml or llama.cpp   9 cluster
  129 hung up   130 interrupted   143 terminated"""

# --- the parser ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USAGE_EXIT)


class _VersionAction(argparse.Action):
    """``--version``: the versions of this program, ggml and llama.cpp, looked up on demand."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"nsds-gguf {__version__}, ggml {ggml.version()}, llama.cpp {llama.llama_build()}")
        parser.exit()


def build_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="nsds-gguf",
        description="Quantize a model to a GGUF within a budget: data-free scoring, exact allocation, verified output.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", nargs=0, action=_VersionAction, help="show the versions and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    _add_convert(verbs)
    _add_score(verbs)
    _add_sizes(verbs)
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
        "convert a model to a GGUF within a budget; without a budget, list the possible sizes and write nothing",
    )  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    _add_cluster(parser)
    _add_output(parser)
    parser.add_argument("--dry-run", action="store_true", help="plan only, write nothing")
    parser.add_argument("--no-resume", action="store_true",
                        help="start over instead of resuming an interrupted run")  # fmt: skip
    _add_page(parser)
    _add_budget(parser)
    add_fit(parser, has_ctx_size=True)
    _add_rounding(parser)
    _add_scoring(parser)
    _add_records(parser)
    _add_verification(parser)
    _add_bundle_folder(parser)
    _add_general(parser)
    parser.set_defaults(tensor_type_file=None, why=[])


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="output file or existing folder")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--keep-failed", action="store_true", help="keep a file that failed verification as FILE.failed"
    )
    parser.add_argument("--mmproj", metavar="TYPE", nargs="?", const=PROJECTOR_TYPES[0],
                        type=_argument(parse_projector_type, "one of " + ", ".join(PROJECTOR_TYPES)),
                        help="also write the vision part of a multimodal model folder, next to the output, as "
                        f"mmproj-NAME-TYPE.gguf; TYPE is one of {', '.join(PROJECTOR_TYPES)} "
                        f"(default: {PROJECTOR_TYPES[0]})")  # fmt: skip


def _add_verification(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("verification")
    _add_text(group, chunks=8, fits=True)
    group.add_argument("--reference", metavar="REF",
                       help="measure the KL divergence from REF: 'original' (the GGUF input itself, or a temporary "
                       "GGUF of a model folder) or a GGUF file (default: the original for GGUF input or when the model "
                       "generates calibration text, else none)")  # fmt: skip
    group.add_argument("--no-verify", action="store_true", help="skip the perplexity check; still check the structure")


def _add_bundle_folder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bundle")
    group.add_argument("--bundle", metavar="DIR", type=Path,
                       help="write the file into a folder with a Modelfile for Ollama, a model card for Hugging Face, "
                       "plan, scores and SHA-256 sums")  # fmt: skip
    _add_bundle_options(group)


def _add_plan(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "plan", run_plan, "show the types that convert would choose",
        "nsds-gguf plan model/ --target-size 700M --scores scores.json --json plan.json",
        "show the types that convert would choose; without a budget, list the possible sizes",
    )  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    _add_cluster(parser)
    parser.add_argument("--tensor-type-file", metavar="FILE", type=Path,
                        help="write the plan as a file for llama-quantize --tensor-type-file")  # fmt: skip
    parser.add_argument("--why", metavar="TENSOR", action="append", default=[],
                        help="explain a tensor's type and the effect of the next smaller and larger one")  # fmt: skip
    _add_page(parser)
    _add_budget(parser)
    add_fit(parser, has_ctx_size=False)
    _add_rounding(parser)
    _add_scoring(parser)
    _add_records(parser)
    _add_general(parser)


def _add_sizes(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "sizes", run_what_fits, "list the sizes that a model could have, and the memories that they fit",
        "nsds-gguf sizes model/ --plot sizes.png",
        "list the sizes that a model could have: bytes, predicted divergence, and the largest that fits "
        f"{', '.join(f'{n / 1e9:g}' for n in MEMORIES)} GB with {', '.join(map(str, CONTEXTS))} tokens of context",
    )  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    _add_cluster(parser)
    add_cache(parser)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="plot divergence against bytes (.png, .svg or .pdf)")
    parser.add_argument("--scores", metavar="FILE", type=Path, help="scores written by 'score --json'")
    _add_types(parser)
    _add_rounding(parser)
    _add_general(parser)


def _add_score(verbs: Any) -> None:
    parser = _add_verb(verbs, "score", run_score, "score layers and measure tensors, without data",
                       "nsds-gguf score model/ --json scores.json --plot scores.png")  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    _add_cluster(parser)
    parser.add_argument("--layers-only", action="store_true", help="skip the tensor measurements that plans need")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a plot (.png, .svg or .pdf)")
    _add_types(parser)
    _add_pad(parser)
    _add_rounding(parser)
    _add_scoring(parser)
    _add_general(parser)


def _add_perplexity(verbs: Any) -> None:
    parser = _add_verb(verbs, "perplexity", run_perplexity, "measure perplexity as llama-perplexity does",
                       "nsds-gguf perplexity model-Q3.gguf --text wiki.raw --reference model-F16.gguf")  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file")
    _add_text(parser, chunks=0)
    parser.add_argument("--batch", metavar="N", type=_integer_from(1), default=DEFAULT_BATCH,
                        help="tokens decoded per batch (default: %(default)s)")  # fmt: skip
    parser.add_argument("--reference", metavar="REF", type=Path,
                        help="measure the KL divergence from REF: a GGUF file, or a model folder, which is written as "
                        "a temporary GGUF to the working directory")  # fmt: skip
    _add_gpu_layers(parser)
    _add_pre_tokenizer(parser)
    _add_general(parser)


def _add_compare(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "compare", run_compare, "compare our plan with other allocations and llama.cpp's presets",
        "nsds-gguf compare model/ --presets Q2_K,Q3_K_M --text wiki.test.raw -o comparison --plot pareto.png",
        "compare our plan, the paper's, a single type, random types and llama.cpp's presets at equal bytes, by their "
        "divergence from the original; an interrupted comparison resumes where it stopped",
    )  # fmt: skip
    _add_model(parser)
    _add_requantize(parser)
    _add_cluster(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("comparison"),
                        help="folder for comparison.json and temporary files (default: %(default)s)")  # fmt: skip
    parser.add_argument("--target-bpw", metavar="X[,X]", type=_argument(parse_bpw_list, "numbers in (0, 32]"),
                        help="budgets in bits per weight")  # fmt: skip
    parser.add_argument("--presets", metavar="LIST", type=lambda text: tuple(text.upper().split(",")),
                        help="llama.cpp presets to compare with, each also a budget: its own bytes "
                        f"(default: {','.join(DEFAULT_PRESETS)}, without --target-bpw)")  # fmt: skip
    parser.add_argument("--seeds", metavar="N", type=_integer_from(0), default=N_SEEDS,
                        help="random allocations per budget (default: %(default)s)")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="plot divergence against bytes (.png, .svg or .pdf)")
    _add_types(parser)
    _add_rounding(parser)
    _add_scoring(parser)
    _add_text(parser.add_argument_group("measurement"), chunks=0)
    _add_general(parser)


def _add_inspect(verbs: Any) -> None:
    parser = _add_verb(verbs, "inspect", run_inspect, "show the contents of a GGUF: types by role and by layer",
                       "nsds-gguf inspect model-Q3.gguf",
                       "show the contents of a GGUF: types by role and by layer, and in one line what it really is: "
                       "bits, types, llama.cpp's fallback types, and whether its name tells the truth")  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file")
    _add_general(parser)


def _add_bundle(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "bundle", run_bundle, "put a GGUF into a folder for Ollama and Hugging Face",
        "nsds-gguf bundle model-Q3.gguf -o model-Q3 --base-model ORG/NAME",
        "put a GGUF into a folder with a Modelfile for Ollama, a model card for Hugging Face and SHA-256 sums",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file; linked, or copied to another file system")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, dest="bundle",
                        help="folder, created if missing")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the bundle in the folder")
    parser.add_argument("--mmproj", metavar="FILE", type=Path,
                        help="GGUF of the vision part of a multimodal model, to go into the bundle")  # fmt: skip
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
                        help="write a web page with bytes, layers, tensors and the result")  # fmt: skip


def _add_bundle_options(group: Any) -> None:
    group.add_argument("--base-model", metavar="ORG/NAME", type=_argument(parse_repo, "ORG/NAME"),
                       help="repository of the original, for the model card")  # fmt: skip
    group.add_argument("--ollama", metavar="NAME", help="run 'ollama create NAME' with the bundle")
    group.add_argument("--upload", metavar="ORG/NAME", type=_argument(parse_repo, "ORG/NAME"),
                       help="upload the bundle to a repository on the Hub, which is created private unless it exists; "
                       "a file over 50 GB is split (extra hub)")  # fmt: skip
    group.add_argument("--public", action="store_true", help="create the repository of --upload public")
    group.add_argument("--upload-dry-run", action="store_true",
                       help="compare with the repository and say what --upload would do; send nothing")  # fmt: skip
    group.add_argument("--chat", metavar="PROMPT", help="show the beginning of the finished file's answer to PROMPT")


def _add_requantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-requantize", action="store_true",
                        help="accept a GGUF that is already quantized; its errors add to the new ones")  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder, GGUF file, or ORG/MODEL on the Hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")
    _add_pre_tokenizer(parser)
    parser.add_argument("--mtp", choices=(KEEP, DROP),
                        help="keep or drop layers of multi-token prediction (default: keep those that llama.cpp's "
                        "converter keeps)")  # fmt: skip


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget")
    group.add_argument("--target-bpw", metavar="X[,X]", type=_argument(parse_bpw_list, "numbers in (0, 32]"),
                       help="bits per weight over all tensors; one file per budget")  # fmt: skip
    group.add_argument("--target-size", metavar="N", type=_argument(parse_size, "bytes, or with M, G, MiB or GiB"),
                       help="size of the whole file in bytes, for example 700M or 1.5GiB")  # fmt: skip
    group.add_argument("--allocator", choices=tuple(ALLOCATORS),
                       help=f"how types are chosen: {_choices(ALLOCATORS)} (default: {DEFAULT_ALLOCATOR})")  # fmt: skip
    group.add_argument("--uniform", metavar="TYPE", type=_argument(parse_type, "one of " + ", ".join(ggml.TYPES)),
                       help="one type for all matrices, also F32, F16, BF16, Q8_0")  # fmt: skip
    group.add_argument("--prefer", choices=tuple(PREFERENCES),
                       help="which of several types of about the same quality to take: "
                       + "; ".join(f"{name}: {meaning}" for name, meaning in PREFERENCES.items())
                       + f" (default: {DEFAULTS.prefer})")  # fmt: skip
    group.add_argument("--tensor-type", metavar="REGEX=TYPE", action="append", dest="tensor_types",
                       type=_argument(parse_tensor_type, "REGEX=TYPE"),
                       help="fix the type of tensors whose whole name matches; repeatable")  # fmt: skip
    _add_types(group)
    _add_pad(group)


def _add_types(group: Any) -> None:
    group.add_argument("--types", metavar="LIST", type=_argument(parse_types, "some of " + ",".join(ggml.TYPES)),
                       help=f"types to choose from (default: {','.join(K_TYPES)}; budgets near the largest of them add "
                            f"{', then '.join(' and '.join(names) for names in LARGER_TYPES)})")  # fmt: skip


def _add_pad(group: Any) -> None:
    group.add_argument("--pad", choices=tuple(PADDINGS),
                       help="pad the residual stream with zeros to a multiple of 256, which computes the same, so that "
                       f"its rows fit K-quants; {AUTO}: {PADDINGS[AUTO]} (default: {DEFAULTS.pad})")  # fmt: skip


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="ADDRESS", nargs="?", const=LOCAL,
                        help="run the tasks of layers and tensors on a Dask cluster: the address of its scheduler, "
                        f"such as tcp://host:8786; without an address, or with '{LOCAL}': on as many worker "
                        "processes of this machine as --threads says")  # fmt: skip


def _add_rounding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rounding and calibration")
    group.add_argument("--rounding", choices=(AUTO, *ROUNDINGS),
                       help=f"{_choices(ROUNDINGS)}; {AUTO}: gptq for models of up to {GPTQ_WEIGHTS / 1e9:g}B "
                       f"parameters that generate text, otherwise rtn (default: {DEFAULTS.rounding})")  # fmt: skip
    group.add_argument("--calibration", choices=(AUTO, *CALIBRATIONS),
                       help=f"where column weights and Hessians come from: {_choices(CALIBRATIONS)} "
                       f"(default: {GENERATED} with gptq, {RANDOM} with rtn)")  # fmt: skip
    group.add_argument("--calibration-tokens", metavar="N", type=_integer_from(N_SEQUENCES_GENERATED * LENGTH),
                       help=f"tokens of text that the model generates for --calibration {GENERATED}; more take longer "
                       f"and leave less divergence (default: {N_TOKENS})")  # fmt: skip
    group.add_argument("--tune-norms", action="store_true", default=None,
                       help="tune the gains of norms to the rounded weights on the generated text: less divergence in "
                       "the same bytes for more time")  # fmt: skip
    group.add_argument("--imatrix", metavar="FILE", type=Path,
                       help="take column weights from a llama.cpp importance matrix (GGUF or .dat)")  # fmt: skip
    group.add_argument("--device", choices=(AUTO, *BACKENDS),
                       help=f"{_choices(BACKENDS)}; {AUTO}: cuda where PyTorch finds a GPU with room, else cpu "
                       f"(default: {DEFAULTS.device})")  # fmt: skip
    _add_gpu_layers(group)
    group.add_argument("--seed", metavar="N", type=_integer_from(0),
                       help=f"seed for random tokens and random types (default: {DEFAULTS.seed})")  # fmt: skip


def _add_gpu_layers(group: Any) -> None:
    group.add_argument("--gpu-layers", metavar="N", type=_integer_from(0),
                       help="layers that llama.cpp computes on a GPU, if its build supports one: for generated text, "
                       "statistics and perplexity (default: 0)")  # fmt: skip


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layer scores")
    group.add_argument("--score-weight", metavar="G", type=float,
                       help="multiply the sensitivities of a layer by exp(G (score - mean score)) "
                       f"(default: {DEFAULTS.score_weight:g}: layers are not scored)")  # fmt: skip
    group.add_argument("--metric", choices=tuple(METRICS), help=f"layer score (default: {DEFAULT_METRIC})")
    group.add_argument("--se", choices=tuple(SE_READINGS),
                       help=f"how nsds reads structural expressiveness (default: {DEFAULT_SE})")  # fmt: skip


def _choices(registry: Mapping[str, Any]) -> str:
    """Return the entries of a registry with their descriptions, for a help text."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in registry.items()).replace("%", "%%")


def _add_pre_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pre-tokenizer", metavar="NAME",
                        help="llama.cpp pre-tokenizer to use instead of the detected one")  # fmt: skip


def _add_records(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("records of earlier runs")
    group.add_argument("--scores", metavar="FILE", type=Path, help="scores written by 'score --json'")
    group.add_argument("--plan", metavar="FILE", type=Path, help="plan written by 'plan --json'")


def _add_text(group: Any, chunks: int, fits: bool = False) -> None:
    group.add_argument("--text", metavar="FILE", type=Path, help="evaluation text (default: a chapter of Dickens)")
    meaning = f"tokens per chunk (default: {DEFAULT_CTX})"
    if fits:
        meaning += f"; with --fit, tokens of the context to make room for (default: {FIT.n_ctx})"
    group.add_argument("--ctx-size", metavar="N", type=_integer_from(MIN_CTX), default=None if fits else DEFAULT_CTX,
                       help=meaning)  # fmt: skip
    group.add_argument("--chunks", metavar="N", type=_integer_from(0), default=chunks,
                       help="number of chunks, 0 for all (default: %(default)s)")  # fmt: skip


def _add_general(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
    group.add_argument("--threads", metavar="N", type=_integer_from(1),
                       help="CPU threads (default: one per physical core)")  # fmt: skip
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    loudness.add_argument("-v", "--verbose", action="store_true", help="show every tensor, stage times and logs")
