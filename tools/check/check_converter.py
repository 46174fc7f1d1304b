"""Compare our F32, F16 or BF16 GGUF of model folders with what llama.cpp's convert_hf_to_gguf.py makes of them.

    python tools/check/check_converter.py --llama-cpp DIR --transformers4 DIR4 [--record] [FOLDER ...]

DIR is a llama.cpp source tree, for example ``vendor/llama.cpp`` of the source distribution of llama-cpp-python. Its
converter reads config.json through transformers, and asks for 4.57.6: models in the form of transformers 4 are given
to it with the one in DIR4 (``pip install --target DIR4 transformers==4.57.6``), the others with the installed one.
Without folders, the models of the tests are compared. Demanded are the same tensor names, shapes, types and bytes, and
the same keys with the same types and values; what may differ is in ``ALLOWED``, each with its reason.

The converter runs as ``tools/check/run_converter.py`` says. With ``--record`` its results go to ``docs/converter.md``
and, in short, to ``tests/golden/converter.json``, which the tests hold our output against.

Needs the ``dev`` extra. Exit code 1 when there is a difference that is not allowed, 2 when anything needed is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from converter_record import (
    ABSENT,
    GOLDEN,
    MTP,
    OURS,
    Entry,
    computed_differences,
    convert_ours,
    differences,
    names,
    read_entry,
    to_record,
    write_folder,
)

from nsds_gguf import __version__
from nsds_gguf.errors import NsdsError
from nsds_gguf.llamacpp.gguf_header import read_gguf_header

DOCS = ROOT / "docs" / "converter.md"

_OUTTYPES = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type -> --outtype
_SHOWN_LETTERS = 160  # of a value in a message


@dataclass(frozen=True)
class Allowed:
    """A difference that may be: patterns of the name and of both values (``absent``), and the reason.

    The pattern of their value may refer to groups in that of ours.
    """

    name: str
    ours: str
    theirs: str
    reason: str

    def holds(self, name: str, ours: str, theirs: str) -> bool:
        """Return whether a difference is this one."""
        both = re.fullmatch(f"(?:{self.ours})\n(?:{self.theirs})", f"{ours}\n{theirs}")
        return both is not None and re.fullmatch(self.name, name) is not None


ALLOWED = (
    Allowed(r"nsds_gguf\..*", ".*", "absent", "says how the file was made; llama.cpp ignores it"),
    Allowed(
        r"tokenizer\.ggml\.add_(bos|eos)_token",
        "BOOL false",
        "absent",
        "states that the tokenizer adds none, where the converter leaves it to what llama.cpp assumes of the "
        "pre-tokenizer",
    ),
    Allowed(
        r"tokenizer\.ggml\.unknown_token_id",
        "UINT32 0",
        "absent",
        "states what llama.cpp assumes of a sentencepiece vocabulary",
    ),
    Allowed(
        r"tokenizer\.ggml\.add_space_prefix",
        "BOOL true",
        "absent",
        "states what llama.cpp assumes of a sentencepiece vocabulary",
    ),
    Allowed(
        r"(gemma|gemma2|gptneox|phi2|stablelm)\.rope\.freq_base",
        "FLOAT32 .*",
        "absent",
        "the converter leaves out the rope base for these classes; llama.cpp reads it for all, and takes 10000 "
        "without it, which is wrong for a checkpoint with another base",
    ),
    Allowed(
        r".*\.rope\.scaling\.attn_factor",
        "FLOAT32 .*",
        "absent",
        "yarn with an attention factor or mscale: this is the key that llama.cpp reads (llama-model.cpp)",
    ),
    Allowed(
        r".*\.rope\.scaling\.yarn_attn_factor",
        "absent",
        "FLOAT32 .*",
        "yarn with an attention factor: llama.cpp reads this key for Grok only (grok.cpp)",
    ),
    Allowed(
        r"gemma3\.attention\.sliding_window_pattern",
        "ARRAY of BOOL .*",
        "absent",
        "which layers have the window, where that is not Gemma 3's usual five of six: llama.cpp reads the key and "
        "assumes the usual without it (gemma3.cpp)",
    ),
    Allowed(
        r"olmo2\.rope\.freq_base_swa",
        "absent",
        "FLOAT32 .*",
        "OLMo 3 has one rope base; llama.cpp takes the base of all layers for those with a window (olmo2.cpp)",
    ),
    Allowed(
        r"gpt2\.feed_forward_length",
        "UINT32 .*",
        "UINT32 .*",
        "the converter writes four times the width whatever n_inner says; llama.cpp would not load the tensors",
    ),
    Allowed(
        r"deepseek2\.expert_weights_norm",
        "BOOL false",
        "absent",
        "states what llama.cpp assumes",
    ),
    Allowed(
        r"deepseek2\.expert_gating_func",
        "UINT32 1",
        "absent",
        "softmax, which llama.cpp assumes, except for models that resemble one with another gating function "
        "(deepseek2.cpp)",
    ),
    Allowed(
        r"deepseek2\.attention\.q_lora_rank",
        "UINT32 0",
        "absent",
        "llama.cpp demands the key unless the number of layers is that of a lite model (deepseek2.cpp)",
    ),
    Allowed(
        r"general\.file_type",
        "UINT32 .*",
        "absent",
        "the converter leaves it out for GPT-NeoX; llama.cpp only shows it",
    ),
    Allowed(
        r"general\.architecture",
        'STRING "llama"',
        'STRING "mistral3"',
        "without the scaling of queries by position that Ministral 3 has, llama.cpp's mistral3 computes what its llama "
        "does; all other keys are compared under one name",
    ),
    Allowed(
        r"tokenizer\.ggml\.tokens",
        r"ARRAY of STRING \[(.*)\]",
        r'ARRAY of STRING \[\1(, "\[PAD\d+\]")+\]',
        "the converter fills the vocabulary of models with state spaces to a multiple of eight, beyond the rows of the "
        "embedding: llama.cpp would not load it",
    ),
    Allowed(
        r"tokenizer\.ggml\.token_type",
        r"ARRAY of INT32 \[(.*)\]",
        r"ARRAY of INT32 \[\1(, 5)+\]",
        "as for the tokens",
    ),
    Allowed(
        r"granitehybrid\.context_length",
        "UINT32 .*",
        "UINT32 1048576",
        "the value of config.json, where the converter has one number for all models with state spaces",
    ),
    Allowed(
        r"granitehybrid\.feed_forward_length",
        "UINT32 .*",
        "UINT32 .*",
        "the width of the tensors, shared_intermediate_size, where the converter takes intermediate_size, the width of "
        "the experts",
    ),
    Allowed(
        r"granitehybrid\.expert_(used_)?count",
        "absent",
        "UINT32 .*",
        "of a model without experts; llama.cpp stops when more experts are used than exist",
    ),
    Allowed(
        r"granitemoe\.attention\.head_count_kv",
        r"UINT32 (\d+)",
        r"ARRAY of INT32 \[\1(, \1)*\]",
        "one number for all layers, where the converter repeats it",
    ),
    Allowed(
        r"granitemoe\.ssm\..*",
        "absent",
        "UINT32 .*",
        "of state spaces, which the model does not have",
    ),
    Allowed(
        r"phi3\.rope\.scaling\.type",
        'STRING "longrope"',
        "absent",
        "names the kind of rope; llama.cpp computes it from the factors either way",
    ),
    Allowed(
        r"nemotron_h(_moe)?\.attention\.layer_norm_rms_epsilon",
        "FLOAT32 .*",
        "absent",
        "states what llama.cpp takes from layer_norm_epsilon without it (nemotron-h.cpp)",
    ),
    Allowed(
        r"mistral3\.rope\.scaling\.yarn_beta_(fast|slow)",
        "absent",
        r"FLOAT32 (32|1)\.0",
        "what llama.cpp assumes; other values are refused",
    ),
)

# Classes whose layers of multi-token prediction the converter demands of models that have none.
_MTP_CLASSES = ("Glm4Moe", "Qwen3Next", "Qwen3_5")

# Models that the converter stops at, and how.
NOT_CONVERTED = {
    r"granite(moe)?-llama3": (
        r"ValueError: Missing <MODEL_TENSOR\.ROPE_FREQS: \d+> for MODEL_TENSORS of <MODEL_ARCH\.GRANITE.*",
        "its table of Granite's tensors lacks the rope factors that llama.cpp's granite.cpp loads",
    ),
    r"stablelm-parallel-qk-norm": (
        r"ValueError: Unprocessed norms: .*",
        "it stacks the norms of the heads at the 40th layer of StableLM 2 12B and at no other",
    ),
    r"gpt-neox": (
        r"KeyError: 'rotary_pct'",
        "it reads rotary_pct, which transformers 5 has under another name",
    ),
    r"gpt2-bare-4": (
        r"ValueError: Can not map tensor 'h\.0\.attn\.bias'",
        "it knows the stored attention masks under the names of later repositories only",
    ),
    r"granite4-micro": (
        r"ValueError: Missing <MODEL_TENSOR\.FFN_GATE: \d+> for MODEL_TENSORS of <MODEL_ARCH\.GRANITE_MOE: \d+>",
        "it takes a Granite 4 without state spaces for a mixture of experts, which this one is not",
    ),
    r"idefics3|llava-next|smolvlm": (
        r"NotImplementedError: Architecture .* not supported!",
        "it does not know the class",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The comparison of one folder.

    ``faults`` are the differences that are not allowed, or why nothing was compared; ``not_converted`` says why the
    converter stops where that is known; ``ours`` holds our values of the keys in which the two may differ.
    """

    name: str
    source_class: str
    type: str = ""
    n_tensors: int = 0
    n_keys: int = 0
    allowed: tuple[Allowed, ...] = ()
    faults: tuple[str, ...] = ()
    not_converted: str = ""
    ours: Mapping[str, str] = field(default_factory=dict)


def main() -> int:
    args = _arguments()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} missing; pip install 'nsds-gguf[dev]'", file=sys.stderr)
        return 2
    for file in (args.llama_cpp / "convert_hf_to_gguf.py", args.transformers4 / "transformers" / "__init__.py"):
        if not file.is_file():
            print(f"error: {file}: no such file", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        given = {folder.resolve().name: folder for folder in args.folders}
        folders = given or {name: write_folder(work / name, name) for name in args.only or names()}
        outcomes, theirs = compare_all(folders, args.llama_cpp, args.transformers4, work)
    for outcome in outcomes:
        print(line(outcome))
        for fault in outcome.faults:
            print(f"    {fault}")
    n_equal = sum(not outcome.faults for outcome in outcomes)
    print(f"{n_equal} of {len(outcomes)} equal")
    if args.record:
        record(outcomes, theirs)
    return 0 if n_equal == len(outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="llama.cpp source tree")
    parser.add_argument("--transformers4", type=Path, required=True, metavar="DIR4", help="where transformers 4.57 is")
    parser.add_argument("--record", action="store_true", help="write the docs and the record of the tests")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these of the tests' own models")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="model folders")
    args = parser.parse_args()
    if args.record and args.folders:
        parser.error("--record is for the tests' own models; drop the folders")
    return args


def compare_all(
    folders: Mapping[str, Path], llama_cpp: Path, transformers4: Path, work: Path
) -> tuple[list[Outcome], dict[str, Entry]]:
    """Convert every folder both ways and return the comparisons, and what the converter made by name."""
    ours = {name: try_ours(folder, work / f"{name}.ours") for name, folder in folders.items()}
    jobs = {name: _job(folders[name], path, work) for name, path in ours.items() if isinstance(path, Path)}
    old = {name: job for name, job in jobs.items() if _is_form_4(folders[name])}
    new = {name: job for name, job in jobs.items() if name not in old}
    failures = run_converter(old, llama_cpp, transformers4) | run_converter(new, llama_cpp)
    outcomes, entries = [], {}
    for name, path in ours.items():
        class_name = _class_name(folders[name])
        if isinstance(path, str):
            outcomes.append(Outcome(name, class_name, faults=(path,)))
        elif failures[name] is not None:
            outcomes.append(_failed(name, class_name, str(failures[name])))
        else:
            found = read_entry(path)
            entries[name] = _alike(read_entry(Path(jobs[name]["outfile"])), found)
            outcomes.append(compare(name, class_name, jobs[name]["outtype"], found, entries[name]))
    return outcomes, entries


def _failed(name: str, class_name: str, said: str) -> Outcome:
    """Return the outcome of a model that the converter stopped at: a fault unless it is a known one."""
    for pattern, (message, reason) in NOT_CONVERTED.items():
        if re.fullmatch(pattern, name) and re.fullmatch(message, said):
            return Outcome(name, class_name, not_converted=reason)
    return Outcome(name, class_name, faults=(f"the converter failed: {_shown(said)}",))


def try_ours(folder: Path, path: Path) -> Path | str:
    """Write our GGUF and return its path, or the message of our refusal."""
    try:
        return convert_ours(folder, path)
    except NsdsError as error:
        return f"refused: {error}"


def _job(folder: Path, ours: Path, work: Path) -> dict[str, str]:
    header = read_gguf_header(ours)
    file_type = header.metadata["general.file_type"].value
    return {
        "folder": str(folder.resolve()),
        "outfile": str(work / f"{ours.stem}.theirs"),
        "outtype": _OUTTYPES[file_type],
        "pre": header.metadata["tokenizer.ggml.pre"].value,
        "options": "--no-mtp" if _class_name(folder).startswith(_MTP_CLASSES) and not folder.name.endswith(MTP) else "",
    }


def _class_name(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])


def _is_form_4(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("transformers_version", "4")).startswith("4")


def run_converter(
    jobs: Mapping[str, Mapping[str, str]], llama_cpp: Path, packages: Path | None = None
) -> dict[str, str | None]:
    """Run the converter on all jobs, ``packages`` before those installed; return what each said if it failed."""
    command = [sys.executable, str(ROOT / "tools" / "check" / "run_converter.py"), str(llama_cpp)]
    paths = [str(path) for path in (packages, os.environ.get("PYTHONPATH")) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, input=json.dumps(list(jobs.values())), stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


def _alike(theirs: Entry, ours: Entry) -> Entry:
    """Return their entry with keys under our architecture's name; that the names differ is left to ``ALLOWED``."""
    names = (json.loads(entry.keys["general.architecture"].removeprefix("STRING ")) for entry in (theirs, ours))
    their_name, our_name = (f"{name}." for name in names)
    keys = {key.replace(their_name, our_name) if key.startswith(their_name) else key: value
            for key, value in theirs.keys.items()}  # fmt: skip
    return replace(theirs, keys=keys)


def compare(name: str, source_class: str, type_name: str, ours: Entry, theirs: Entry) -> Outcome:
    """Return the comparison of two files."""
    unequal = differences(ours.tensors, theirs.tensors) + computed_differences(ours.computed, theirs.computed)
    faults = [f"tensor {tensor}: ours {_shown(a)}, theirs {_shown(b)}" for tensor, a, b in unequal]
    allowed: list[Allowed] = []
    own: dict[str, str] = {}
    for key, a, b in differences(ours.keys, theirs.keys):
        known = next((entry for entry in ALLOWED if entry.holds(key, a, b)), None)
        if known is None:
            faults.append(f"key {key}: ours {_shown(a)}, theirs {_shown(b)}")
            continue
        if known not in allowed:
            allowed.append(known)
        if not key.startswith(OURS):
            own[key] = a
    n_tensors, n_keys = len(theirs.tensors), len(theirs.keys)
    return Outcome(name, source_class, type_name.upper(), n_tensors, n_keys, tuple(allowed), tuple(faults), ours=own)


def _shown(value: str) -> str:
    return value if len(value) <= _SHOWN_LETTERS else f"{value[:_SHOWN_LETTERS]}…"


def line(outcome: Outcome) -> str:
    verdict = "DIFFERS" if outcome.faults else "not converted" if outcome.not_converted else "equal"
    counts = f"{outcome.n_tensors:4} tensors {outcome.n_keys:3} keys"
    return f"{outcome.name:36} {outcome.source_class:32} {outcome.type:4} {counts}  {verdict}"


def record(outcomes: Sequence[Outcome], theirs: Mapping[str, Entry]) -> None:
    """Write the documentation and the golden record; models that were not compared keep their lines."""
    before = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    found = {o.name: to_record(theirs[o.name], o.ours) for o in outcomes if o.name in theirs and not o.faults}
    compared = {o.name for o in outcomes}
    golden = {name: found.get(name, before.get(name)) for name in names() if name in found or name not in compared}
    golden = {name: entry for name, entry in golden.items() if entry is not None}
    GOLDEN.write_text(json.dumps(golden, indent=0) + "\n", encoding="utf-8")
    DOCS.write_text(documentation(outcomes), encoding="utf-8")


def _rows_before() -> dict[str, str]:
    """Return the rows of the table that there is, by the name of the model."""
    text = DOCS.read_text(encoding="utf-8") if DOCS.exists() else ""
    return {match[1]: match[0] for match in re.finditer(r"^\| `\w+` \| (\S+) \| .*$", text, re.MULTILINE)}


def documentation(outcomes: Sequence[Outcome]) -> str:
    numbers = {entry: i + 1 for i, entry in enumerate(ALLOWED)}
    introduction = f"""# Compared with llama.cpp's converter

Written by `tools/check/check_converter.py --record` (nsds-gguf {__version__}). Each model is converted twice at its own
precision: by nsds-gguf and by llama.cpp's `convert_hf_to_gguf.py`. Equal means: the same tensor names, shapes, types
and bytes, and the same keys with the same types and values, except for the differences listed below (computed tensors,
rope factors and Mamba's A, agree to a millionth). The models are the tiny random ones of the tests and
`examples/books-4.6m`. The tiny ones have a byte-level tokenizer of their own. The converter knows pre-tokenizers by a
hash, so `tools/check/run_converter.py` names the pre-tokenizer for it, and gives it that tokenizer where it needs a
`tokenizer.model`; the rest of the converter is unchanged.
"""
    lines = [
        introduction,
        "| class | model | type | tensors | keys | equal | allowed differences |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = _rows_before()
    for o in outcomes:
        notes = ", ".join(str(number) for number in sorted(numbers[entry] for entry in o.allowed))
        verdict = f"**no**: {'; '.join(o.faults)}" if o.faults else "yes"
        if o.not_converted:
            verdict = f"the converter stops: {o.not_converted}"
        counts = f"{o.type} | {o.n_tensors} | {o.n_keys}"
        rows[o.name] = f"| `{o.source_class}` | {o.name} | {counts} | {verdict} | {notes} |"
    lines += sorted((row for name, row in rows.items() if name in names()), key=lambda row: row.split(" | ")[:2])
    lines += ["", "## Differences that are allowed", ""]
    for entry, number in numbers.items():
        ours, theirs = (ABSENT if text == ABSENT else "present" for text in (entry.ours, entry.theirs))
        lines.append(f"{number}. `{entry.name}` (ours {ours}, theirs {theirs}): {entry.reason}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
