"""Bad input: one clear line, an exit code that is not 0, and no file left.

The first part starts the installed command, as a user would; the rest runs in this process and asks about the many
ways in which one thing can be wrong.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from command import PLAIN, QUICK, TINY, call, listing, message, run, start
from tiny_gguf import write_tiny_gguf
from tiny_models import SPECS, Spec, safetensors_bytes, tiny_config, tiny_weights, write_tiny

from nsds_gguf.allocate.candidates import budget_bytes, nearest_bpw
from nsds_gguf.records import Target
from nsds_gguf.system import resources

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23093576\n"
SHARDED = replace(TINY, n_shards=3)
CONVERT = ("convert", "model", *PLAIN, *QUICK, "-o", "out.gguf")
SCORED = ("convert", "model", "--target-bpw", "4", *QUICK, "-o", "out.gguf")

Edit = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A model folder, what is done to it, the command, and what it must say; {tmp} is the working directory."""

    code: int
    message: str
    edit: Edit = lambda model: None
    arguments: tuple[object, ...] = CONVERT
    spec: Spec = TINY


def config(**changes: object) -> Edit:
    """Change entries of config.json."""

    def edit(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def weights(change: Callable[[dict], object]) -> Edit:
    """Write the weights again after a change."""

    def edit(model: Path) -> None:
        found = tiny_weights(TINY)
        change(found)
        (model / "model.safetensors").write_bytes(safetensors_bytes(found))

    return edit


def file(name: str, content: str | bytes) -> Edit:
    """Replace a file of the model, or put one beside it."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model / name).write_bytes(raw)


def without(name: str) -> Edit:
    """Take a file away."""
    return lambda model: (model / name).unlink()


def shorter(name: str, n_bytes: int) -> Edit:
    """Cut a file off."""
    return lambda model: os.truncate(model / name, n_bytes)


def replaced(name: str, old: str, new: str) -> Edit:
    """Replace bytes of a file by others of the same number."""

    def edit(model: Path) -> None:
        raw = (model / name).read_bytes()
        assert old.encode() in raw
        (model / name).write_bytes(raw.replace(old.encode(), new.encode()))

    return edit


def entries(name: str, path: tuple[str, ...], value: object) -> Edit:
    """Set one value of a JSON file."""

    def edit(model: Path) -> None:
        data = json.loads((model / name).read_text())
        at = data
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (model / name).write_text(json.dumps(data))

    return edit


def spoilt(name: str, values: dict[int, float]) -> Edit:
    """Set weights of one tensor by their flat index."""

    def change(found: dict) -> None:
        for index, value in values.items():
            found[name].flat[index] = value

    return weights(change)


def norm_of(value: float, name: str = "model.norm.weight") -> Edit:
    """Set a norm, the last one: large values make the model certain of nonsense, very large ones overflow."""
    return weights(lambda found: found.update({name: np.full(TINY.n_embd, value, np.float32)}))


def quantized(method: str) -> Edit:
    """Pack one matrix into bytes, and say by which method."""

    def edit(model: Path) -> None:
        found = tiny_weights(TINY)
        name = "model.layers.0.self_attn.q_proj.weight"
        raw = safetensors_bytes({**found, name: found[name].view(np.float32)})
        (model / "model.safetensors").write_bytes(_retyped(raw, name, "I32"))
        config(quantization_config={"quant_method": method, "bits": 4})(model)

    return edit


def _retyped(raw: bytes, name: str, dtype: str) -> bytes:
    """Return a safetensors file with another dtype of the same size for one tensor."""
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + n :]


UNKNOWN_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d{1,7}|\w+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}

CASES = {
    "missing shard": Case(
        3,
        "{tmp}/model/model-00002-of-00003.safetensors: shard is missing; model.safetensors.index.json names it: "
        "download it",
        without("model-00002-of-00003.safetensors"),
        spec=SHARDED,
    ),
    "git-lfs pointer": Case(
        3,
        "{tmp}/model/model.safetensors: is a git-lfs pointer, not the weights: run `git lfs pull` in {tmp}/model",
        file("model.safetensors", LFS_POINTER),
    ),
    "truncated header": Case(
        3,
        "{tmp}/model/model.safetensors: truncated or damaged: a header of 2376 bytes in a file of 1000: "
        "download it again",
        shorter("model.safetensors", 1000),
    ),
    "truncated data": Case(
        3,
        "{tmp}/model/model.safetensors: tensor lm_head.weight: ends at byte 1870672, the file has 1870000: truncated, "
        "download it again",
        shorter("model.safetensors", 1_870_000),
    ),
    "lying header": Case(
        3,
        "{tmp}/model/model.safetensors: tensor model.embed_tokens.weight: damaged header: F16 [386, 256] takes 197632 "
        "bytes, but its offsets 0 to 146432 span 146432: download it again",
        replaced("model.safetensors", '"model.embed_tokens.weight": {"dtype": "F16", "shape": [286',
                 '"model.embed_tokens.weight": {"dtype": "F16", "shape": [386'),
    ),
    "index that leaves the folder": Case(
        3,
        "{tmp}/model/model.safetensors.index.json: places tensor lm_head.weight in '../../etc/passwd'; wanted the name "
        "of a file in the same folder",
        entries("model.safetensors.index.json", ("weight_map", "lm_head.weight"), "../../etc/passwd"),
        spec=SHARDED,
    ),
    "NaN": Case(
        3,
        "{tmp}/model/model.safetensors: tensor model.layers.1.mlp.up_proj.weight: 3 NaN and 0 infinite of 65536 "
        "weights; wanted finite numbers: the file is damaged, download it again",
        spoilt("model.layers.1.mlp.up_proj.weight", {0: math.nan, 7: math.nan, 60_000: math.nan}),
    ),
    "infinity, when scored": Case(
        3,
        "{tmp}/model/model.safetensors: tensor model.layers.0.input_layernorm.weight: 0 NaN and 2 infinite of 256 "
        "weights; wanted finite numbers: the file is damaged, download it again",
        spoilt("model.layers.0.input_layernorm.weight", {3: math.inf, 4: -math.inf}),
        ("convert", "model", "--target-bpw", "4", *QUICK, "-o", "out.gguf"),
    ),
    "vocabulary size": Case(
        3,
        "{tmp}/model/model.safetensors: tensor model.embed_tokens.weight: wanted shape (300, 256), got (286, 256): "
        "vocabulary size and embedding rows disagree",
        config(vocab_size=300),
    ),
    "unsupported class": Case(
        3,
        "{tmp}/model/config.json: class LlamaForSequenceClassification is not supported; nearest is LlamaForCausalLM, "
        "and llama.cpp does not know it either",
        config(architectures=["LlamaForSequenceClassification"]),
    ),
    **{
        f"already quantized: {method}": Case(
            3,
            f"{{tmp}}/model: the weights are quantized ({method} 4: model.layers.0.self_attn.q_proj.weight); wanted "
            "F32, F16, BF16, MXFP4 or FP8 (fp8, modelopt FP8, compressed-tensors float-quantized with one scale per "
            "tensor, row or block): use the original checkpoint",
            quantized(method),
        )
        for method in ("awq", "hqq")
    },
    "quantized weights": Case(
        3,
        "{tmp}/model/model.safetensors: tensor model.embed_tokens.weight: stored as 'I16'; wanted F32, F16, "
        "BF16 or FP8 (F8_E4M3): use the unquantized checkpoint",
        lambda model: (model / "model.safetensors").write_bytes(_with_dtype("I16")),
    ),
    "no tokenizer": Case(
        3,
        "{tmp}/model: no tokenizer: neither tokenizer.model nor tokenizer.json exists; copy the tokenizer files of "
        "the original model",
        without("tokenizer.json"),
    ),
    "tokenizer is a git-lfs pointer": Case(
        3,
        "{tmp}/model/tokenizer.json: a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'",
        file("tokenizer.json", LFS_POINTER),
    ),
    "unknown pre-tokenizer": Case(
        3,
        r"{tmp}/model/tokenizer.json: unknown pre-tokenizer Split(\d{{1,7}}|\w+, Isolated) > ByteLevel(); the nearest "
        "known one is 'bloom' (70% alike); to use it anyway, pass --pre-tokenizer bloom; "
        "if llama.cpp's converter knows it: python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model.gguf, "
        "then nsds-gguf convert model.gguf",
        entries("tokenizer.json", ("pre_tokenizer",), UNKNOWN_SPLIT),
    ),
    "text too short": Case(
        6,
        "short.txt: text too short: wanted at least 64 tokens for a context of 32, got 40; use a longer text or a "
        "smaller --ctx-size",
        file("../short.txt", "the " * 20),
        (*CONVERT, "--text", "short.txt"),
    ),
    "text not UTF-8": Case(
        6,
        "latin.txt: not UTF-8 text: byte 0xfc at position 1; convert it to UTF-8 or choose another text",
        file("../latin.txt", b"f\xfcr " * 100),
        (*CONVERT, "--text", "latin.txt"),
    ),
    "no folder for the output": Case(
        5,
        "no/such: no such folder for the output; create it first",
        arguments=("convert", "model", *PLAIN, "-o", "no/such/out.gguf"),
    ),
    "output exists": Case(
        5,
        "old.gguf: exists already; pass --force to replace it",
        lambda model: write_tiny_gguf(model / "../old.gguf"),
        ("convert", "model", *PLAIN, "-o", "old.gguf"),
    ),
    "impossible target": Case(
        4,
        "target 2 bpw is out of reach: the floor is 2.665 bpw, 311216 bytes for the tensors, set by layers at Q2_K "
        "(83 %), output.weight at Q2_K (8 %), token_embd.weight at Q2_K (8 %); nearest feasible: --target-bpw 2.666",
        arguments=("convert", "model", "--target-bpw", "2"),
    ),
    "fixed type that matches nothing": Case(
        4,
        "--tensor-type 'blk.7.*=Q6_K' matches no tensor (the pattern must match the whole name)",
        arguments=("convert", "model", "--target-bpw", "4", "--tensor-type", "blk.7.*=Q6_K"),
    ),
    "no such model": Case(3, "models: no such folder", arguments=("convert", "models", *PLAIN)),
    "the model is a file": Case(
        3,
        "model/model.safetensors: is a file; wanted a Hugging Face model folder with config.json, or a .gguf",
        arguments=("convert", "model/model.safetensors", *PLAIN),
    ),
    "config is not JSON": Case(
        3,
        "{tmp}/model/config.json: cannot be read as JSON: Expecting value: line 1 column 17 (char 16)",
        file("config.json", '{"vocab_size" : '),
    ),
    "not a GGUF": Case(
        3,
        "model/model.safetensors: not a readable GGUF file: wanted b'GGUF' and version 2 or 3, got "
        r"b'H\t\x00\x00' and 0",
        arguments=("perplexity", "model/model.safetensors", "--ctx-size", "32"),
    ),
    "reference with another vocabulary": Case(
        7,
        "--reference other.gguf: wanted a vocabulary of 286, got 260; compare with a GGUF of Model",
        lambda model: write_tiny_gguf(model / "../other.gguf"),
        (*CONVERT, "--reference", "other.gguf"),
    ),
    "a model that computes NaN": Case(
        7,
        "out.gguf: NaN or infinite logits at 15 of 15 scored tokens of chunk 1 of 2; the file is damaged "
        "(removed; pass --keep-failed to keep it)",
        norm_of(3e38),
    ),
    "a model whose last norm overflows": Case(
        3,
        "tensor output_norm.weight: its output is not finite; the weights are damaged",
        norm_of(3e38),
        SCORED,
    ),
    "a model whose layer overflows": Case(
        3,
        "layer 1: its output is not finite; the weights are damaged",
        norm_of(3e38, "model.layers.1.post_attention_layernorm.weight"),
        SCORED,
    ),
    "a model that is certain of nonsense": Case(
        7,
        "out.gguf: perplexity inf is absurd: wanted at most 2860 (10 times that of guessing); the file is damaged, or "
        "the text does not suit the model (removed; pass --keep-failed to keep it)",
        norm_of(1e4),
    ),
    "JSON that cannot be written": Case(
        5,
        "--json no/such.json: no folder no; create it first",
        arguments=(*CONVERT, "--json", "no/such.json"),
    ),
    "misspelt option": Case(
        2,
        "unrecognized arguments: --target-bwp 3; see nsds-gguf --help",
        arguments=("convert", "model", "--target-bwp", "3"),
    ),
}  # fmt: skip


def _with_dtype(name: str) -> bytes:
    """Return the weights as a file whose first tensor claims another type."""
    raw = safetensors_bytes(tiny_weights(TINY))
    n_header = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n_header].replace(b'"F16"', f'"{name}"'.encode(), 1)
    return len(header).to_bytes(8, "little") + header + raw[8 + n_header :]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_clear_line(tmp_path, case):
    case.edit(write_tiny(tmp_path / "model", case.spec))
    before = listing(tmp_path)
    outcome = run(*case.arguments, cwd=tmp_path)
    assert message(outcome, case.code) == case.message.format(tmp=tmp_path.resolve())
    assert listing(tmp_path) == before


def test_disk_full_in_the_middle(tmp_path):
    write_tiny(tmp_path / "model", TINY)
    before = listing(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    outcome = run(*CONVERT, cwd=tmp_path, preexec_fn=limit)
    assert message(outcome, 5) == ".: disk full or file too large while writing: File too large"
    assert listing(tmp_path) == before


def test_failed_file_is_kept_when_asked(tmp_path):
    norm_of(1e4)(write_tiny(tmp_path / "model", TINY))
    before = set(listing(tmp_path))
    outcome = run(*CONVERT, "--keep-failed", cwd=tmp_path)
    assert message(outcome, 7).endswith(" (kept as out.gguf.failed)")
    assert set(listing(tmp_path)) == before | {"out.gguf.failed"}
    assert (tmp_path / "out.gguf.failed").read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize(("number", "extra"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--reference", "original"))])
def test_a_stopped_conversion_leaves_its_records_alone(tmp_path, number, extra):
    write_tiny(tmp_path / "model", TINY)
    (tmp_path / "long.txt").write_text("What you eat today walks and talks tomorrow. " * 20_000)
    before = listing(tmp_path)
    process = start(
        "convert", "model", *PLAIN, "--text", "long.txt", "--chunks", "0", "-o", "out.gguf", *extra, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".nsds-gguf-*/records/*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == "" and re.fullmatch(
        rf"error: stopped by {number.name}; [\d.]+ MiB of finished work is kept in \.nsds-gguf-\w+: the same command "
        r"goes on from there\n", err
    )  # fmt: skip
    left = [name for name in listing(tmp_path) if name not in before]
    assert left and all(re.match(r"\.nsds-gguf-\w+(/lock|/records|$)", name) for name in left)


def test_output_that_nobody_reads(tmp_path):
    write_tiny(tmp_path / "model", TINY)
    for arguments in (("plan", "model", *PLAIN), ("plan", "model", *PLAIN, "--json", "-", "-q")):
        with start(*arguments, cwd=tmp_path) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 128 + signal.SIGPIPE


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model folder in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model", TINY)
    return Path("model")


@pytest.fixture
def refused(tmp_path):
    """Return what a command that fails says, after checking that it left no file."""

    def refuse(code, *arguments):
        before = listing(tmp_path)
        line = message(call(*arguments), code)
        assert listing(tmp_path) == before
        return line

    return refuse


def test_disk_space_is_asked_first(model, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 5000))
    assert refused(5, "convert", "model", *PLAIN, *QUICK) == (
        f"{Path.cwd()}: the output takes 0.00 GiB, the disk has 0.00 GiB free: make room or choose another folder"
    )
    assert "the output with a temporary copy of the model takes" in refused(
        5, "convert", model, *PLAIN, "--reference", "original"
    )


def test_memory_is_asked_first(model, refused, monkeypatch):
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 100 << 20)
    assert refused(5, "convert", model, *PLAIN, "--threads", "2") == (
        "converting takes 0.48 GiB of memory, 0.10 GiB are available: close other programs or lower --threads"
    )


OUTPUTS = {
    "a folder that is a file": (
        "model/config.json/out.gguf",
        "model/config.json: is a file; wanted a folder for the output",
    ),
    "a missing folder": ("out/", "out/: no such folder for the output; create it first"),
    "the model's weights": (
        "model/model.safetensors",
        "model/model.safetensors: exists and is not a GGUF file, so it is not replaced; choose another name",
    ),
    "a device": ("/dev/null", "/dev/null: exists and is not a GGUF file, so it is not replaced; choose another name"),
    "a name too long": (
        "x" * 300,
        "x" * 300 + ": cannot be written: File name too long; choose another name or folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("output", "line"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_cannot_be(model, refused, output, line):
    assert refused(5, "convert", model, *PLAIN, "--force", "-o", output) == line


def test_paths_no_system_knows(model, refused):
    assert refused(5, "plan", "x" * 300, *PLAIN).endswith("x: File name too long")
    assert refused(5, "inspect", "x" * 300) == "x" * 300 + ": File name too long"
    assert refused(3, "plan", "model/config.json/model", *PLAIN) == "model/config.json/model: no such folder"
    assert refused(3, "plan", "", *PLAIN) == f".: holds no weights itself: pass {Path('model').resolve()}"


def test_folders_that_hold_no_model(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "links", "pointer"):
        Path(name).mkdir()
    Path("links/config.json").symlink_to("config.json")
    Path("pointer/config.json").write_text(LFS_POINTER)
    Path("there").symlink_to("back")
    Path("back").symlink_to("there")
    for name in ("empty", "links"):
        assert refused(3, "plan", name, *PLAIN) == f"{name}: no config.json in it; wanted a Hugging Face model folder"
    assert refused(3, "plan", "there", *PLAIN) == "there: no such folder"
    pointer = Path("pointer").resolve()
    assert refused(3, "plan", "pointer", *PLAIN) == (
        f"{pointer}/config.json: is a git-lfs pointer, not the file itself: run `git lfs pull` in {pointer}"
    )


def test_names_cannot_drive_the_terminal(model, refused):
    file("config.json", json.dumps({"architectures": ["\x1b[31mLlama\nForCausalLM\x07" + "x" * 5000]}))(model)
    line = refused(3, "plan", model, *PLAIN)
    assert line.startswith(f"{model.resolve()}/config.json: class " + r"\x1b[31mLlama ForCausalLM\x07xxx")
    assert line.isprintable() and len(line) < 2100


TEXTS = {
    "missing": (None, "evaluation.txt: cannot be read: No such file or directory; wanted a text file"),
    "empty": (b"", "evaluation.txt: text too short: wanted at least 64 tokens for a context of 32, got 0 bytes; use a "
                   "longer text or a smaller --ctx-size"),
    "binary": (b"\x80abc", "evaluation.txt: not UTF-8 text: byte 0x80 at position 0; convert it to UTF-8 or choose "
                           "another text"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["convert", "perplexity"])
@pytest.mark.parametrize(("content", "line"), TEXTS.values(), ids=TEXTS)
def test_text(model, refused, verb, content, line):
    if content is not None:
        Path("evaluation.txt").write_bytes(content)
    write_tiny_gguf(Path("tiny.gguf"))
    what = ("convert", model, *PLAIN) if verb == "convert" else ("perplexity", "tiny.gguf")
    assert refused(6, *what, *QUICK, "--text", "evaluation.txt") == line


def test_text_and_reference_are_checked_before_the_work(model, refused):
    spoilt("lm_head.weight", {0: math.nan})(model)  # reading a weight would end otherwise
    Path("short.txt").write_text("the " * 20)
    assert refused(6, *CONVERT, "--text", "short.txt").startswith(
        "short.txt: text too short: wanted at least 64 tokens"
    )
    assert refused(3, *CONVERT, "--reference", "none.gguf") == "none.gguf: no such file; wanted a GGUF file"
    assert refused(3, *CONVERT, "--reference", "model/config.json").startswith("model/config.json: not a readable GGUF")
    write_tiny_gguf(Path("other.gguf"))
    os.truncate("other.gguf", 20_000)
    assert refused(3, *CONVERT, "--reference", "other.gguf").startswith("other.gguf: ")


def test_perplexity_against_another_vocabulary(model, refused):
    write_tiny_gguf(Path("tiny.gguf"))
    assert call(*CONVERT).code == 0
    line = refused(7, "perplexity", "out.gguf", "--reference", "tiny.gguf", *QUICK)
    assert line == (
        "tiny.gguf: cannot be the reference of out.gguf: wanted a vocabulary of 286, got 260; compare files of one "
        "model"
    )


# --- targets and fixed types -----------------------------------------------------------------------------------------

NARROW = Spec("LlamaForCausalLM", n_embd=64, n_ff=96, dtype="F16")  # no row is a multiple of 256
ODD = Spec("LlamaForCausalLM", n_embd=80, n_ff=120, n_heads=2, n_kv_heads=1, dtype="F16")  # none of 32

FLOORS = {
    "layers": (TINY, (), "layers at Q2_K"),
    "embedding": (replace(TINY, n_layers=1, n_ff=32), (), "token_embd.weight at Q2_K"),
    "fixed types": (TINY, ("--tensor-type", ".*ffn.*weight=Q8_0"), "--tensor-type"),
    "rows of 64": (NARROW, (), "rows that are not a multiple of 256 at Q4_0, 4.5 bpw"),
    "rows of 80": (ODD, (), "rows that are not a multiple of 256 at F16, 16 bpw"),
    "types": (TINY, ("--types", "Q5_K,Q6_K"), "layers at Q5_K"),
}


FLOOR = re.compile(
    r"target (?:0\.5 bpw|5000 bytes) is out of reach: the floor is (?P<bpw>\d+\.\d{3}) bpw, (?P<bytes>\d+) bytes for "
    r"the (?:tensors|whole file \((?P<header>\d+) of them header and tokenizer\)), set by .+ \(\d+ %\).*; "
    r"nearest feasible: (?P<flag>--target-\w+) (?P<nearest>\d+(?:\.\d+)?)(?:; smaller with --types Q2_0,.*)?"
)


@pytest.mark.parametrize(("spec", "options", "cause"), FLOORS.values(), ids=FLOORS)
@pytest.mark.parametrize(("flag", "first"), [("--target-bpw", "0.5"), ("--target-size", "5K")], ids=["bpw", "size"])
def test_floor(tmp_path, refused, spec, options, cause, flag, first):
    """The nearest feasible target is feasible and one step below it is not; no weight is read to find out."""
    folder, sound = tmp_path / "model", tiny_weights(spec)
    damaged = {name: np.full_like(array, np.nan) for name, array in sound.items()}
    (write_tiny(folder, spec) / "model.safetensors").write_bytes(safetensors_bytes(damaged))
    plan = ("plan", folder, *options)
    line = refused(4, *plan, flag, first)
    found = FLOOR.fullmatch(line)
    assert found["flag"] == flag and f" {cause} (" in line
    nearest, step = found["nearest"], 0.001 if flag == "--target-bpw" else 1
    assert "is out of reach" in refused(4, *plan, flag, f"{float(nearest) - step:.9g}")
    assert "NaN" in refused(3, *plan, flag, nearest)  # accepted: now weights are read
    (folder / "model.safetensors").write_bytes(safetensors_bytes(sound))
    sums = json.loads(call(*plan, flag, nearest, "--json", "-", "-q").out)["sums"]
    assert sums["tensor_bytes" if flag == "--target-bpw" else "file_bytes"] == int(found["bytes"])
    n_weights = sum(array.size for array in sound.values())
    n_bytes = int(found["bytes"]) - int(found["header"] or 0)
    assert float(found["bpw"]) == pytest.approx(n_bytes * 8 / n_weights, abs=5.1e-4)


def test_nearest_bpw_is_the_first_that_is_accepted():
    rng = np.random.default_rng(5)
    for n_weights in rng.integers(1000, 10**10, 2000):
        for floor in (int(n_weights) // 3, -(-int(n_weights) // 8000) * int(rng.integers(1000, 32000))):
            nearest = nearest_bpw(floor, int(n_weights))
            budgets = [budget_bytes(Target("bpw", round(nearest - step, 3)), int(n_weights), 0) for step in (0, 0.001)]
            assert budgets[0] >= floor > budgets[1]
    assert nearest_bpw(12604285, 5633200) == 17.901  # 17.9 exactly, but 17.9 * n / 8 is a byte short in floats


def test_uniform_above_the_target(model, refused):
    assert refused(4, "convert", model, "--uniform", "Q4_K", "--target-bpw", "3") == (
        "--uniform Q4_K takes 529856 bytes of tensors, the target 3 bpw allows 350304; raise or drop the target, or "
        "choose a smaller type"
    )


def test_folder_in_place_of_a_gguf(model, refused):
    assert refused(3, "inspect", model) == "model: is a folder; wanted a GGUF file"
    assert refused(3, "perplexity", model) == "model: is a folder; wanted a GGUF file"


FIXED_TYPES = {
    "no type": ("output.weight", 2, r"wanted REGEX=TYPE, for example 'blk\.0\..*=Q6_K'"),
    "no pattern": ("=Q6_K", 2, "wanted REGEX=TYPE"),
    "unknown type": (".*=Q9", 2, "type 'Q9' is not known; wanted one of F32, F16, BF16, Q2_K"),
    "no regular expression": ("(=Q4_K", 2, "not a regular expression: missing )"),
    "part of a name": ("ffn_up=Q4_K", 4, "matches no tensor (the pattern must match the whole name)"),
    "a norm": ("output_norm.weight=Q4_K", 4, "output_norm.weight"),
    "rows that do not fit": ("blk.0.ffn_down.weight=Q4_K", 4, "rows of 96 weights, which are not a multiple of 256"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "code", "line"), FIXED_TYPES.values(), ids=FIXED_TYPES)
def test_fixed_types(tmp_path, refused, text, code, line):
    folder = write_tiny(tmp_path / "model", replace(TINY, n_ff=96))
    found = refused(code, "plan", folder, "--target-bpw", "6", "--tensor-type", text)
    assert f"--tensor-type '{text}'" in found and line in found


# --- config.json -----------------------------------------------------------------------------------------------------

STRANGE = ("x", "", None, True, 0, -1, 3, 2.5, 10**9, 10**400, math.nan, [], ["x"], {}, {"factor": "x"})


def places(data: dict, at: tuple[str, ...] = ()):
    """Yield the place of every value of nested objects."""
    for key, value in data.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


def fuzzed_configs():
    """Yield configs with one value replaced or taken away."""
    for spec in [SPECS[name] for name in ("llama-llama3", "mistral", "qwen2", "qwen3", "llama-yarn-4")]:
        for place in places(tiny_config(spec)):
            for value in (*STRANGE, ...):
                config = json.loads(json.dumps(tiny_config(spec)))
                at = config
                for key in place[:-1]:
                    at = at[key]
                if value is ...:
                    del at[place[-1]]
                else:
                    at[place[-1]] = value
                yield spec, place, value, config


def test_config_with_any_value_wrong(tmp_path):
    rng = np.random.default_rng(7)
    everything = list(fuzzed_configs())
    codes = {}
    for i in rng.choice(len(everything), 400, replace=False):
        spec, place, value, config = everything[i]
        folder = tmp_path / f"model-{spec.seed}"
        if not folder.exists():
            write_tiny(folder, spec)
        (folder / "config.json").write_text(json.dumps(config))
        outcome = call("plan", folder, *PLAIN, "-q")
        assert outcome.code in (0, 3), (place, value, outcome)
        if outcome.code:
            assert re.match(r"[^ ]*(config\.json|safetensors)|tensors|[^ ]*tokenizer", message(outcome, 3)), (
                place,
                outcome,
            )
        codes.setdefault(outcome.code, []).append(place)
    assert len(codes[0]) > 100 and len(codes[3]) > 100  # many keys do not matter; those that do are checked


NOT_A_CONFIG = [
    "",
    "null",
    "[]",
    "12",
    '"LlamaForCausalLM"',
    "{}",
    "{",
    "\ufeff{}",
    "[" * 100_000,
    "9" * 5000,
    LFS_POINTER,
]


@pytest.mark.parametrize("content", NOT_A_CONFIG, ids=range(len(NOT_A_CONFIG)))
def test_config_that_is_none(model, refused, content):
    file("config.json", content)(model)
    assert "config.json" in refused(3, "plan", model, *PLAIN)


# --- tokenizer files -------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "merge of numbers": (
        entries("tokenizer.json", ("model", "merges"), [[1, 2]]),
        "{tmp}/model/tokenizer.json: merge 0: wanted two tokens, got [1, 2]; restore the file",
    ),
    "template that is not UTF-8": (
        file("chat_template.jinja", b"\xff"),
        "{tmp}/model/chat_template.jinja: not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: invalid start "
        "byte; restore the file",
    ),
    "template with half a letter": (
        file("chat_template.json", json.dumps({"chat_template": "\ud800"})),
        "{tmp}/model: tokenizer.chat_template is not UTF-8: '\\ud800'; correct it at its source: a file of the "
        "model, or the folder's name",
    ),
}


@pytest.mark.parametrize(("edit", "line"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer_files(model, refused, edit, line):
    edit(model)
    assert refused(3, "plan", model, *PLAIN) == line.format(tmp=Path.cwd())


def test_folder_whose_name_is_not_utf8(model, refused):
    model.rename(os.fsdecode(b"mod\xffel"))
    line = refused(3, "plan", os.fsdecode(b"mod\xffel"), *PLAIN)
    assert r"mod\udcffel: general." in line and "the folder's name" in line


# --- records ---------------------------------------------------------------------------------------------------------


def edited_records(record: dict):
    """Yield a record with one value, the first of every list, replaced by every strange one or taken away."""

    def places(data: object, at: tuple = ()):
        items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
        for key, value in items:
            if key != "sums":
                yield (*at, key)
                yield from places(value, (*at, key))

    for place in places(record):
        for value in (*STRANGE, "\ud800", 1e300, ...):
            changed = copy.deepcopy(record)
            at = changed
            for key in place[:-1]:
                at = at[key]
            if value is ...:
                del at[place[-1]]
            else:
                at[place[-1]] = value
            yield place, value, changed


@pytest.mark.parametrize("kind", ["scores", "plan"])
def test_record_with_any_value_wrong(model, kind):
    made = {
        "scores": ("score", model, "--metric", "zd"),
        "plan": ("plan", model, "--target-bpw", "4"),
    }
    record = json.loads(call(*made[kind], "--json", "-", "-q").out)
    use = {
        "scores": ("plan", model, "--target-bpw", "4", "--scores", "record.json", "-q"),
        "plan": ("plan", model, "--plan", "record.json", "-q"),
    }
    codes = []
    everything = list(edited_records(record))
    for i in np.random.default_rng(3).choice(len(everything), 150, replace=False):
        place, value, changed = everything[i]
        Path("record.json").write_text(json.dumps(changed))
        outcome = call(*use[kind])
        assert outcome.code in (0, 4), (place, value, outcome)
        if outcome.code:
            message(outcome, 4)
        codes.append(outcome.code)
    assert codes.count(0) < codes.count(4) / 4


RECORDS = {
    "not JSON": ("{", "r.json: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); "
                      "create it again"),
    "no JSON at all": ("\udcff", "r.json: not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start "
                                 "byte; create it again"),
    "another file": ("[]", "r.json: wanted a file of format 'nsds-gguf scores 2', got None"),
    "nothing in it": ('{"format": "nsds-gguf scores 2"}', "r.json: the record lacks 'recipe'; create the file again"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "line"), RECORDS.values(), ids=RECORDS)
def test_record_that_is_none(model, refused, content, line):
    Path("r.json").write_text(content, errors="surrogateescape")
    assert refused(4, "plan", model, "--target-bpw", "4", "--scores", "r.json") == line


def test_record_that_is_missing(model, refused):
    given = ("plan", model, "--target-bpw", "4", "--scores")
    assert refused(4, *given, "none.json") == "none.json: cannot be read: No such file or directory"
    assert refused(4, *given, "model") == "model: cannot be read: Is a directory"


def test_record_says_which_value_is_wrong(model, refused):
    scores = json.loads(call("score", model, "--metric", "zd", "--json", "-", "-q").out)
    scores["costs"][1]["errors"]["Q3_K"] = "0.1"
    Path("r.json").write_text(json.dumps(scores))
    assert refused(4, "plan", model, "--target-bpw", "4", "--scores", "r.json") == (
        "r.json: costs[1].errors.Q3_K: wanted a number, got '0.1'; create the file again"
    )
