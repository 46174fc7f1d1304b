"""The command line when all is well: help, output for people, output for programs, files and their names."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from command import ENVIRONMENT, PLAIN, QUICK, TINY, call, listing, message, run, start
from gguf import GGUFReader, GGUFWriter
from tiny_gguf import tiny_text, write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf import __version__, errors
from nsds_gguf.cli import EXIT_CODES
from nsds_gguf.cli.parser import parse_bpw_list, parse_size

VERBS = ("convert", "score", "sizes", "plan", "perplexity", "compare", "inspect", "report", "bundle")
CONVERT = ("convert", "model", *PLAIN, *QUICK)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds the folder ``model``."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "model", TINY)
    return tmp_path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working directory that holds ``tiny.gguf`` and a text for it."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.txt").write_text(tiny_text())
    return tmp_path


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb):
    outcome = call(verb, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert re.search(rf"^example: nsds-gguf {verb} \S", outcome.out, re.MULTILINE) and EXIT_CODES in outcome.out
    assert "None" not in outcome.out and "%(" not in outcome.out


def test_help_lists_verbs_and_exit_codes():
    outcome = call("--help")
    assert outcome.code == 0 and EXIT_CODES in outcome.out
    assert all(re.search(rf"^ +{verb}\b", outcome.out, re.MULTILINE) for verb in VERBS)


def test_exit_codes_in_the_help_are_those_of_the_errors():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NsdsError)]
    kinds.remove(errors.NsdsError)
    documented = {int(code) for code in re.findall(r"\b(\d+) ", EXIT_CODES)}
    assert documented == {kind.exit_code for kind in kinds} | {0, 2, 129, 130, 143}


def test_version():
    outcome = call("--version")
    assert outcome.code == 0
    assert re.fullmatch(rf"nsds-gguf {re.escape(__version__)}, ggml \d.*, llama.cpp .*\n", outcome.out)
    assert f"llama-cpp-python {metadata.version('llama_cpp_python')}" in outcome.out


def test_package_runs_as_a_module(folder):
    arguments = [sys.executable, "-m", "nsds_gguf", "inspect", "none.gguf"]
    found = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (
        3,
        "",
        "error: none.gguf: no such file; wanted a GGUF file\n",
    )


@pytest.mark.parametrize(
    "arguments", [(), ("convert",), ("convrt", "model"), ("inspect",), ("perplexity", "--ctx-size", "9")]
)
def test_wrong_usage(arguments):
    assert re.search(r"; see nsds-gguf( \w+)? --help$", message(call(*arguments), 2))


# --- output for programs ---------------------------------------------------------------------------------------------


def test_json_of_every_verb_is_all_of_standard_output(folder):
    scored = call("score", "model", "--metric", "zd", "--json", "-")
    scores = json.loads(scored.out)
    assert scores["recipe"]["metric"] == "zd" and scores["format"] == "nsds-gguf scores 2"
    assert len(scores["layers"]) == 2 and len(scores["costs"]) == 16
    assert "higher = more sensitive" in scored.err  # people read standard error then

    Path("scores.json").write_text(scored.out)
    planned = call("plan", "model", "--target-bpw", "4", "--scores", "scores.json", "--json", "-")
    plan = json.loads(planned.out)
    assert plan["format"] == "nsds-gguf plan 2" and plan["sums"]["bpw"] <= 4

    several = json.loads(call("plan", "model", "--target-bpw", "3,4", "--scores", "scores.json", "--json", "-").out)
    assert [plan["recipe"]["target"]["value"] for plan in several] == [3, 4]

    Path("plan.json").write_text(planned.out)
    (made,) = json.loads(call("convert", "model", "--plan", "plan.json", *QUICK, "--json", "-").out)
    assert made["plan"] == plan and made["perplexity"]["n_chunks"] == 2

    path = made["path"]
    measured = json.loads(call("perplexity", path, *QUICK, "--reference", path, "--json", "-").out)
    assert {"ppl", "ppl_error", "divergence"} <= measured.keys()
    assert measured["ppl"] == pytest.approx(made["perplexity"]["ppl"], rel=1e-6)
    assert measured["divergence"]["kld_mean"] == pytest.approx(0, abs=1e-6)

    inspected = json.loads(call("inspect", path, "--json", "-").out)
    assert inspected["bpw"] == plan["sums"]["bpw"] and len(inspected["tensors"]) == len(plan["tensors"])


@pytest.mark.parametrize(
    "arguments",
    [
        CONVERT,
        ("plan", "model", *PLAIN),
        ("score", "model", "--metric", "zd", "--layers-only"),
        ("perplexity", "out.gguf", *QUICK),
        ("inspect", "out.gguf"),
    ],
    ids=("convert", "plan", "score", "perplexity", "inspect"),
)
def test_quiet_says_nothing_and_still_writes_json(folder, arguments):
    if "out.gguf" in arguments:
        assert call(*CONVERT, "-o", "out.gguf").code == 0
    outcome = call(*arguments, "-q", "--json", "result.json")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert json.loads(Path("result.json").read_text())


def test_pipes_get_neither_colours_nor_bars(folder):
    outcome = run(*CONVERT, "--reference", "original", cwd=folder)
    assert outcome.code == 0 and outcome.err == ""
    assert "\x1b" not in outcome.out and "\r" not in outcome.out
    assert "│ Q8_0 │" in outcome.out and "\nKL divergence from the original: 0.0" in outcome.out
    assert outcome.out.endswith(f"{folder.resolve()}/Model-934K-v1.0-Q8_0.gguf: 0.96 MiB\n")


def test_verbose_tells_stages_and_tensors(folder):
    outcome = call(*CONVERT, "-v")
    assert re.search(r"^quantize and write: \d+\.\d s$", outcome.err, re.MULTILINE)
    assert re.search(r"^Model, 0\.9M parameters: about \d+ s with 1 threads\.$", outcome.err, re.MULTILINE)
    assert "blk.1.ffn_down.weight" in outcome.out
    assert "gguf_writer" not in outcome.err  # a library's own lines


def test_terminal_gets_bars_and_notes(folder):
    master, slave = os.openpty()
    with start(*CONVERT, "--reference", "original", cwd=folder, stderr=slave) as process:
        os.close(slave)
        seen = b""
        while select.select([master], [], [], 60)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        table = process.stdout.read()
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert process.returncode == 0
    for stage in ("read headers", "write original", "quantize and write", "verify structure", "verify perplexity"):
        assert re.search(rf"{stage} +━+ *100%", text), stage
    assert "Writing the original as a temporary F16 GGUF of 2 MiB" in text
    assert "perplexity" in table and "\x1b" not in table


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_in_an_encoding_that_lacks_letters(folder, encoding):
    outcome = run("plan", "model", *PLAIN, cwd=folder, env={**ENVIRONMENT, "PYTHONIOENCODING": encoding})
    assert outcome.code == 0 and outcome.err == ""
    assert "bits per weight: 8.5322 of all tensors" in outcome.out and "0?1" in outcome.out


def test_brackets_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = GGUFWriter("a[bold]b.gguf", "llama")
    writer.add_chat_template("{{ '[INST] ' + text + ' [/INST]' }} :smile:")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    outcome = call("inspect", "a[bold]b.gguf")
    assert outcome.code == 0 and outcome.out.startswith("a[bold]b.gguf")
    assert "{{ '[INST] ' + text + ' [/INST]' }} :smile:" in outcome.out


# --- files -----------------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(folder):
    before = listing(folder)
    dry = call(*CONVERT, "--dry-run", "-o", "out.gguf")
    assert dry.code == 0 and "bits per weight: 8.5322 of all tensors" in dry.out
    assert dry.out == call("plan", "model", *PLAIN).out
    assert listing(folder) == before


def test_name_follows_the_convention_in_the_working_directory(folder):
    assert call(*CONVERT, "--no-verify").code == 0
    assert set(listing(folder)) - set(listing(folder / "model")) >= {"Model-934K-v1.0-Q8_0.gguf"}


def test_several_targets_go_to_a_folder(folder):
    (folder / "out").mkdir()
    scores = ("--scores", "scores.json")
    assert call("score", "model", "--metric", "zd", "--json", "scores.json", "-q").code == 0
    arguments = ("convert", "model", "--target-bpw", "3,4.25", *scores, "--no-verify")
    assert message(call(*arguments, "-o", "one.gguf"), 5) == "one.gguf: one file cannot hold 2 targets; pass a folder"
    assert call(*arguments, "-o", "out/").code == 0
    names = ["Model-934K-v1.0-FISHER_3_00BPW.gguf", "Model-934K-v1.0-FISHER_4_25BPW.gguf"]
    assert sorted(listing(folder / "out")) == names
    sizes = [8 * sum(int(t.n_bytes) for t in GGUFReader(folder / "out" / name).tensors) / 934_144 for name in names]
    assert 2.9 < sizes[0] <= 3 and 4.15 < sizes[1] <= 4.25


def test_targets_that_share_a_name(folder):
    line = message(call("convert", "model", "--target-bpw", "4,4.001"), 5)
    assert line == "two targets share the file name Model-934K-v1.0-FISHER_4_00BPW.gguf; drop one"


def test_force_replaces_a_gguf(folder):
    assert call(*CONVERT, "-o", "out.gguf").code == 0
    first = listing(folder)["out.gguf"]
    assert message(call(*CONVERT, "-o", "out.gguf"), 5) == "out.gguf: exists already; pass --force to replace it"
    assert listing(folder)["out.gguf"] == first
    assert call("convert", "model", "--uniform", "Q4_K", *QUICK, "-o", "out.gguf", "--force").code == 0
    assert listing(folder)["out.gguf"][1] < first[1]
    Path("empty").touch()  # as mktemp makes it
    assert call(*CONVERT, "-o", "empty", "--force").code == 0


@pytest.mark.parametrize("spelling", ["model/", "./model", "../work/model", "link", "mödel [bold] 模型"])
def test_spellings_of_the_model_folder(tmp_path, monkeypatch, spelling):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_tiny(Path("mödel [bold] 模型" if "ö" in spelling else "model"), TINY)
    Path("link").symlink_to("model")
    outcome = call("convert", spelling, *PLAIN, *QUICK, "-o", "ö [x] 模.gguf")
    assert outcome.code == 0 and outcome.out.endswith("ö [x] 模.gguf: 0.96 MiB\n")
    assert call("inspect", "ö [x] 模.gguf").code == 0


def test_model_is_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder / "model")
    assert call("convert", ".", *PLAIN, *QUICK, "-o", "..").code == 0
    assert (folder / "Model-934K-v1.0-Q8_0.gguf").is_file()


def test_plan_for_llama_quantize(folder):
    assert call("plan", "model", "--uniform", "Q4_K", "--tensor-type-file", "types.txt", "-q").code == 0
    lines = Path("types.txt").read_text().splitlines()
    assert len(lines) == 16 and lines[0] == r"^token_embd\.weight$=q4_k"


@pytest.mark.parametrize("name", ["scores.png", "scores.svg"])
def test_picture_of_the_scores(folder, name):
    outcome = call("score", "model", "--metric", "zd", "--layers-only", "--plot", name)
    assert outcome.code == 0
    assert (folder / name).read_bytes().startswith((b"\x89PNG", b"<?xml"))


def test_perplexity_of_a_file(tiny):
    outcome = call(
        "perplexity", "tiny.gguf", "--text", "tiny.txt", "--ctx-size", "128", "--chunks", "3", "--threads", "1"
    )
    assert outcome.code == 0 and "3 chunks of 128 tokens, 189 scored" in outcome.out
    everything = call("perplexity", "tiny.gguf", "--text", "tiny.txt", "--ctx-size", "128", "--json", "-", "-q")
    assert json.loads(everything.out)["n_chunks"] == 21  # all of 2701 tokens


def test_inspect_a_file(tiny):
    outcome = call("inspect", "tiny.gguf")
    assert outcome.code == 0 and "general.architecture" in outcome.out and "… 260 in all" in outcome.out


# --- arguments -------------------------------------------------------------------------------------------------------

SIZES = {
    "1": 1, "1500000": 1_500_000, "1500000B": 1_500_000, "2K": 2000, "2KB": 2000, "2KiB": 2048, "700M": 700_000_000,
    "700m": 700_000_000, "700 MB": 700_000_000, "1.5GiB": 3 * 2**29, "1.5G": 1_500_000_000, ".5M": 500_000,
    " 3M ": 3_000_000, "1.0000001M": 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "1.5X",
        "1.5GG",
        "3KiBB",
        "-5M",
        "0",
        "0.4",
        "inf",
        "nan",
        "1e400",
        "1e9",
        "9" * 400,
        "1 2",
        "0x10",
        "٣M?",
    ],
)
def test_sizes_that_are_none(text):
    line = message(call("plan", "model", f"--target-size={text}"), 2)
    wanted = f"argument --target-size: wanted bytes, or with M, G, MiB or GiB, got {text!r}; see nsds-gguf plan --help"
    assert line == " ".join(wanted.split())


def test_lists_of_bpw():
    assert parse_bpw_list("2.8, 3.2,4") == [2.8, 3.2, 4]


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "33", "nan", "inf", "3,", "3;4", "3,,4"])
def test_bpw_that_are_none(text):
    line = message(call("plan", "model", f"--target-bpw={text}"), 2)
    assert line == f"argument --target-bpw: wanted numbers in (0, 32], got {text!r}; see nsds-gguf plan --help"


ARGUMENTS = {
    "--types=Q4_K,Q9": "wanted some of F32,F16,",
    "--types=": "wanted some of F32,F16,",
    "--uniform=Q9": "wanted one of F32, F16,",
    "--metric=kurt": "invalid choice: 'kurt'",
    "--ctx-size=4": "wanted an integer from 8 up, got '4'",
    "--ctx-size=512.5": "wanted an integer from 8 up, got '512.5'",
    "--chunks=-1": "wanted an integer from 0 up, got '-1'",
    "--threads=0": "wanted an integer from 1 up, got '0'",
    "--threads=all": "wanted an integer from 1 up, got 'all'",
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments_that_are_wrong(argument):
    line = message(call("convert", "model", argument), 2)
    assert line.startswith(f"argument {argument.partition('=')[0]}: {ARGUMENTS[argument]}")


def test_types_in_any_spelling(folder):
    outcome = call("plan", "model", "--uniform", "q4_k", "--types", "q4_k, Q8_0,q4_K", "--json", "-", "-q")
    assert {tensor["type"] for tensor in json.loads(outcome.out)["tensors"]} == {"Q4_K", "F32"}


CONTRADICTIONS = {
    "no target": (("--allocator", "paper"), 4, "allocator paper needs a target: --target-bpw or --target-size"),
    "two budgets": (
        ("--target-bpw", "3", "--target-size", "1M"),
        4,
        "--target-bpw and --target-size are two budgets; drop one",
    ),
    "two allocators": (
        ("--uniform", "Q4_K", "--allocator", "paper"),
        4,
        "--uniform and --allocator paper contradict each other; drop one",
    ),
    "uniform without a type": (
        ("--allocator", "uniform"),
        4,
        "allocator uniform needs a type: --uniform TYPE",
    ),
    "scores and plan": (
        ("--scores", "s.json", "--plan", "p.json"),
        4,
        "--scores and --plan contradict each other: a plan needs no scores; drop one",
    ),
    **{
        f"plan and {flag}": (
            ("--plan", "p.json", flag, value),
            4,
            f"--plan fixes every type and its rounding; drop {flag}, or plan again",
        )
        for flag, value in (("--target-bpw", "3"), ("--target-size", "1M"), ("--uniform", "Q4_K"),
                            ("--allocator", "paper"), ("--tensor-type", ".*=Q4_K"), ("--rounding", "rtn"),
                            ("--calibration", "random"), ("--metric", "nsds"), ("--se", "product"),
                            ("--score-weight", "0"), ("--types", "Q4_K"), ("--seed", "0"), ("--prefer", "quality"),
                            ("--device", "cpu"))
    },
    "verification off and on": (
        (*PLAIN, "--no-verify", "--reference", "original"),
        4,
        "--no-verify skips the check that uses --reference; drop one",
    ),
    "quiet and verbose": ((*PLAIN, "-q", "-v"), 2, "argument -v/--verbose: not allowed with argument -q/--quiet; see "
                                                   "nsds-gguf convert --help"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "line"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(folder, arguments, code, line):
    before = listing(folder)
    assert message(call("convert", "model", *arguments), code) == line
    assert listing(folder) == before


def test_several_targets_are_no_tensor_type_file(folder):
    line = message(call("plan", "model", "--target-bpw", "3,4", "--tensor-type-file", "types.txt"), 4)
    assert line == "--tensor-type-file holds one plan, got 2 targets; pass one"


def test_small_outputs_are_checked_before_the_work(folder):
    assert (
        message(call("plan", "model", *PLAIN, "--json", "no/x.json"), 5)
        == "--json no/x.json: no folder no; create it first"
    )
    assert message(call("plan", "model", *PLAIN, "--json", "model"), 5) == "--json model: is a folder; pass a file name"
    line = message(call("score", "model", "--plot", "no/x.png"), 5)
    assert line == "--plot no/x.png: no folder no; create it first"
    line = message(call("plan", "model", *PLAIN, "--tensor-type-file", "no/x"), 5)
    assert line == "--tensor-type-file no/x: no folder no; create it first"
    line = message(call("score", "model", "--plot", "scores.gif"), 4)
    assert line == "--plot scores.gif: wanted a name ending in .png, .svg, .pdf"
    full = call("plan", "model", *PLAIN, "--json", "/dev/full", "-q")
    assert message(full, 5) == "/dev/full: cannot write: No space left on device"


def test_records_are_of_this_model_and_these_options(folder):
    assert call("score", "model", "--metric", "zd", "--json", "scores.json", "-q").code == 0
    given = ("plan", "model", "--target-bpw", "4", "--scores", "scores.json")
    assert call(*given, "--metric", "zd").code == 0
    for weight in ((), ("--score-weight", 1)):
        line = message(call(*given, *weight, "--metric", "mse"), 4)
        assert line == "the scores were made with metric zd, not --metric mse; score again or drop the option"
    assert message(call(*given, "--calibration", "none"), 4) == (
        "the scores were measured with calibration random, the plan uses none; score again or pass --calibration random"
    )
    write_tiny(folder / "other", replace(TINY, seed=9))
    line = message(call("plan", "other", "--target-bpw", "4", "--scores", "scores.json"), 4)
    assert line == "the scores belong to another model (Model); score Other again"
    assert call("plan", "model", *PLAIN, "--json", "plan.json", "-q").code == 0
    assert message(call("convert", "other", "--plan", "plan.json"), 4) == (
        "the plan belongs to another model (Model); plan Other again"
    )
    assert message(call("convert", "model", "--plan", "scores.json"), 4) == (
        "scores.json: wanted a file of format 'nsds-gguf plan 2', got 'nsds-gguf scores 2'"
    )
