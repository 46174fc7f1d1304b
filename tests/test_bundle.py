"""Bundles: what is in the folder, what the model card and the checksums say, Ollama's program, first words."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from chat_templates import source
from command import PLAIN, QUICK, TINY, call, listing, message
from gguf import GGUFReader, GGUFWriter
from modelfile_parser import parse
from tiny_gguf import write_tiny_gguf
from tiny_models import N_VOCAB, write_tiny

from nsds_gguf.errors import ModelError, OutputError, TextError
from nsds_gguf.llamacpp import llama
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.publish.bundle import Source, make_bundle
from nsds_gguf.publish.first_words import sample
from nsds_gguf.publish.model_card import Origin, find_origin, is_repo
from nsds_gguf.records import kv

FILES = {"Modelfile", "README.md", "SHA256SUMS", "plan.json", "scores.json"}

CARD = """---
license: other
license_name: tiny-license
license_link: https://example.com/license
language: [en, "no"]
tags: [tiny, gguf]
base_model: Some-Org/Some-Base
---
"""
GENERATION = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "do_sample": True}

SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repeat_penalty": 1.05, "num_ctx": 256}  # in the Modelfile


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds the folder ``model``, with a chat template, a card and sampling parameters."""
    monkeypatch.chdir(tmp_path)
    model = write_tiny(tmp_path / "model", TINY)
    (model / "chat_template.jinja").write_text(source("chatml"), encoding="utf-8")
    (model / "README.md").write_text(CARD, encoding="utf-8")
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    return tmp_path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working directory that holds ``tiny.gguf``."""
    monkeypatch.chdir(tmp_path)
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def bundled(*arguments):
    outcome = call(*arguments)
    assert outcome.code == 0, outcome
    return outcome


def front_matter(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n\n(# .*)", text, re.DOTALL).groups()
    return yaml.safe_load(head), body


def check_sums(folder):
    """Check SHA256SUMS by its definition, and by the program for which it is made where that is installed."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = dict(re.fullmatch(r"([0-9a-f]{64})  (.+)", line).groups()[::-1] for line in lines)
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert sums == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums}
    if shutil.which("sha256sum") is not None:
        subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


# --- convert --bundle ------------------------------------------------------------------------------------------------


def test_convert_makes_a_whole_bundle(folder):
    outcome = bundled("convert", "model", "--target-bpw", 4, *QUICK, "--bundle", "out", "--json", "out.json")
    out = folder / "out"
    names = {path.name for path in out.iterdir()}
    (gguf,) = names - FILES
    assert gguf.endswith(".gguf") and names > FILES
    check_sums(out)
    found = json.loads((folder / "out.json").read_text())[0]
    assert json.loads((out / "plan.json").read_text()) == found["plan"]
    scores = json.loads((out / "scores.json").read_text())
    metadata = read_gguf_header(out / gguf).metadata
    canonical = json.dumps(scores, sort_keys=True).encode()
    assert hashlib.sha256(canonical).hexdigest() == metadata["nsds_gguf.scores_sha256"].value
    assert found["bundle"]["chat_format"] == "ChatML" and found["bundle"]["sha256"].keys() == names - {"SHA256SUMS"}
    assert found["sample"]["is_chat"] and repr(found["sample"]["answer"]) in outcome.out
    modelfile = parse((out / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.model == f"./{gguf}" and (out / modelfile.model).is_file()
    assert modelfile.parameters == SAMPLING
    assert "{{ .Prompt }}" in modelfile.template and "<|im_start|>user" in modelfile.stops


def test_the_card_says_what_was_measured(folder):
    bundled("convert", "model", *PLAIN, *QUICK, "--reference", "original", "--bundle", "out", "--json", "out.json")
    head, body = front_matter(folder / "out")
    assert head == {
        "base_model": "Some-Org/Some-Base",
        "quantized_by": "nsds-gguf",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "https://example.com/license",
        "language": ["en", "no"],
        "tags": ["gguf", "nsds-gguf", "tiny"],
    }
    assert "its metadata names [Some-Org/Some-Base](https://huggingface.co/Some-Org/Some-Base)" in body
    found = json.loads((folder / "out.json").read_text())[0]
    gguf = next((folder / "out").glob("*.gguf"))
    sums, measured = found["plan"]["sums"], found["perplexity"]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
    assert rows["bytes"].replace(",", "") == str(gguf.stat().st_size)
    assert rows["bits per weight, all tensors"] == f"{sums['bpw']:.4f}"
    assert rows["bits per weight, quantized tensors"] == f"{sums['quantized_bpw']:.4f}"
    assert rows["bits per weight, whole file"] == f"{sums['file_bpw']:.4f}"
    assert rows["perplexity"].startswith(f"{measured['ppl']:.4f} ± {measured['ppl_error']:.4f} (2 chunks of 32 tokens")
    divergence = rows["mean KL divergence from the original, nats per token"]
    assert divergence.startswith(f"{measured['divergence']['kld_mean']:.6f} ± ")
    assert rows["plan sha256"].strip("`") == read_gguf_header(gguf).metadata["nsds_gguf.plan_sha256"].value
    types = {
        row[0]: row[1:] for row in re.findall(r"^\| (\S+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE)
    }
    assert types["attn_q"] == ("2 Q8_0", f"{2 * 256 * 256:,}", "8.5000")
    assert types["token_embd"] == ("Q8_0", f"{N_VOCAB * 256:,}", "8.5000")
    assert "nsds-gguf convert model --uniform Q8_0" in body and str(folder) not in body


def test_the_user_names_the_original(folder):
    bundled("convert", "model", *PLAIN, "--no-verify", "--bundle", "out", "--base-model", "Org/Model-1.5")
    head, body = front_matter(folder / "out")
    assert (head["base_model"], head["base_model_relation"]) == ("Org/Model-1.5", "quantized")
    assert "Quantized from [Org/Model-1.5](https://huggingface.co/Org/Model-1.5)." in body and "not measured" in body


def test_a_bundle_is_not_replaced_without_force(folder):
    arguments = ("convert", "model", *PLAIN, "--no-verify", "--bundle", "out")
    bundled(*arguments)
    before = listing(folder / "out")
    assert message(call(*arguments), 5) == "out: is not empty; pass --force to replace the bundle in it"
    assert listing(folder / "out") == before
    (folder / "out" / "scores.json").write_text("of another run")
    (folder / "out" / "mine.txt").write_text("kept")
    bundled(*arguments, "--force")
    assert not (folder / "out" / "scores.json").exists()
    assert (folder / "out" / "mine.txt").read_text() == "kept"
    (folder / "out" / "mine.txt").unlink()
    check_sums(folder / "out")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--bundle", "out", "-o", "x.gguf"), 5, "--bundle and --output name two places for one file; drop one"),
        (("--base-model", "a/b"), 5, "--base-model needs a bundle; pass --bundle DIR too"),
        (("--ollama", "x"), 5, "--ollama needs a bundle; pass --bundle DIR too"),
        (("--bundle", "model/config.json"), 5, "model/config.json: is a file; wanted a folder for the bundle"),
        (("--bundle", "a/b"), 5, "a/b: cannot be created: No such file or directory; create the folder above it first"),
    ],
)
def test_what_goes_not_together_is_refused_before_the_work(folder, arguments, code, text):
    before = listing(folder)
    assert message(call("convert", "model", *PLAIN, "--no-verify", *arguments), code) == text
    assert listing(folder) == before


def test_several_targets_are_no_bundle(folder):
    outcome = call("convert", "model", "--target-bpw", "3,4", "--bundle", "out")
    assert message(outcome, 4) == "--bundle holds one file, got 2 targets; pass one"
    assert not (folder / "out").exists()


def test_a_folder_made_for_a_conversion_that_fails_is_removed(folder):
    assert call("convert", "model", "--target-bpw", "0.1", "--bundle", "out").code == 4
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["no/slashes/twice", "plain", "a/b c", "/x", "ä/b"])
def test_names_of_no_repository_are_refused(folder, name):
    outcome = call("convert", "model", "--bundle", "out", "--base-model", name)
    assert (outcome.code, f"wanted ORG/NAME, got {name!r}" in outcome.err) == (2, True)
    assert not is_repo(name)


# --- bundle ----------------------------------------------------------------------------------------------------------


def test_a_file_is_linked_into_its_bundle(tiny):
    outcome = bundled("bundle", tiny, "-o", "out")
    out = tiny.parent / "out"
    assert {path.name for path in out.iterdir()} == {"tiny.gguf", "Modelfile", "README.md", "SHA256SUMS"}
    assert (out / "tiny.gguf").samefile(tiny)
    check_sums(out)
    head, body = front_matter(out)
    assert "base_model" not in head and "names no base model" in body and "does not say how it was made" in body
    assert "pass --base-model ORG/NAME for the model card" in outcome.out
    assert parse((out / "Modelfile").read_text(encoding="utf-8")).template is None


def test_a_symbolic_link_is_followed(tiny):
    (tiny.parent / "cache").mkdir()
    link = tiny.parent / "cache" / "model.gguf"
    link.symlink_to(Path("..") / tiny.name)
    bundled("bundle", link, "-o", "out")
    inside = tiny.parent / "out" / "model.gguf"
    assert inside.samefile(tiny) and not inside.is_symlink()


def test_a_file_that_cannot_be_linked_is_copied(tiny, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    bundled("bundle", tiny, "-o", "out")
    copy = tiny.parent / "out" / "tiny.gguf"
    assert not copy.samefile(tiny) and copy.read_bytes() == tiny.read_bytes()
    check_sums(copy.parent)


def test_a_file_may_lie_in_its_bundle_already(tiny):
    (tiny.parent / "out").mkdir()
    inside = tiny.rename(tiny.parent / "out" / "tiny.gguf")
    assert message(call("bundle", inside, "-o", "out"), 5).startswith("out: is not empty")
    bundled("bundle", inside, "-o", "out", "--force")
    check_sums(inside.parent)


def test_plan_and_scores_come_along_when_they_are_the_files(folder):
    bundled("score", "model", "--json", "scores.json")
    bundled("plan", "model", "--target-bpw", 4, "--scores", "scores.json", "--json", "plan.json")
    bundled("convert", "model", "--target-bpw", 4, "--scores", "scores.json", "--no-verify", "-o", "a.gguf")
    bundled(
        "bundle",
        "a.gguf",
        "-o",
        "out",
        "--plan",
        "plan.json",
        "--scores",
        "scores.json",
        "--threads",
        1,
        "--chat",
        "Hello",
    )
    assert {path.name for path in (folder / "out").iterdir()} == {"a.gguf", *FILES}
    bundled("convert", "model", *PLAIN, "--no-verify", "-o", "b.gguf")
    outcome = call("bundle", "b.gguf", "-o", "other", "--plan", "plan.json")
    assert message(outcome, 4) == "the plan is not that of b.gguf: tensors or types differ; pass its plan"
    outcome = call("bundle", "b.gguf", "-o", "other", "--scores", "scores.json")
    assert message(outcome, 4) == "the scores are not those of b.gguf: their digest differs; pass its scores"
    assert not (folder / "other").exists()


def test_what_is_no_gguf_is_no_bundle(folder):
    (folder / "text.gguf").write_text("not a model")
    assert call("bundle", "text.gguf", "-o", "out").code == 3
    assert call("bundle", "none.gguf", "-o", "out").code == 3
    assert not (folder / "out").exists()


def test_a_part_of_a_split_model_is_no_bundle(tmp_path):
    path = tmp_path / "x-00001-of-00002.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="part of a split model; convert it"):
        make_bundle(path, tmp_path)


def test_files_with_names_that_need_quotes(tiny):
    path = tiny.rename(tiny.with_name("My model, 4 bits.gguf"))
    bundled("bundle", path, "-o", "out")
    out = tiny.parent / "out"
    check_sums(out)
    assert parse((out / "Modelfile").read_text(encoding="utf-8")).model == "./My model, 4 bits.gguf"
    assert "`llama-completion -m 'My model, 4 bits.gguf'`" in (out / "README.md").read_text(encoding="utf-8")


def test_checksums_of_a_name_with_a_backslash(tiny):
    path = tiny.rename(tiny.with_name("back\\slash.gguf"))
    bundled("bundle", path, "-o", "out")
    line = (tiny.parent / "out" / "SHA256SUMS").read_text(encoding="utf-8").splitlines()[0]
    assert line == f"\\{hashlib.sha256(path.read_bytes()).hexdigest()}  back\\\\slash.gguf"


def test_a_template_that_is_no_format_is_left_out_and_said(folder):
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }} {{ strftime_now('%d') }}")
    outcome = bundled("convert", "model", *PLAIN, "--no-verify", "--bundle", "out")
    modelfile = parse((folder / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.template is None
    assert modelfile.comments[1].startswith("TEMPLATE is left out: chat template does not write every message")
    assert "older ones send the bare prompt" in outcome.out


# --- where a model comes from ----------------------------------------------------------------------------------------


def string(text):
    return kv(text, 8)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, Origin()),
        ({"general.source.repo_url": "https://huggingface.co/a/b"}, Origin(("a/b",))),
        ({"general.repo_url": "https://huggingface.co/a/b-c.d/"}, Origin(("a/b-c.d",))),
        ({"general.url": "https://hf.co/a/b", "general.base_model.0.repo_url": "x"}, Origin(("a/b",))),
        ({"general.url": "https://example.com/a/b"}, Origin()),
        ({"general.url": "https://huggingface.co/datasets/b"}, Origin()),
        ({"general.url": "https://huggingface.co/a"}, Origin()),
        ({"general.base_model.0.repo_url": "https://huggingface.co/a/b"}, Origin(("a/b",), is_parent=True)),
        ({"general.base_model.0.name": "B", "general.base_model.0.organization": "A"}, Origin()),
    ],
)
def test_no_repository_is_invented(keys, wanted):
    metadata = {key: string(value) for key, value in keys.items()}
    metadata["general.base_model.count"] = kv(1, 4)
    assert find_origin(metadata) == wanted


def test_a_downloaded_folder_names_its_repository(tmp_path):
    folder = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert find_origin({}, folder) == Origin(("Qwen/Qwen2.5-0.5B",))
    assert find_origin({}, folder / "model.gguf") == Origin()  # a repository of GGUFs is not the original


# --- Ollama ----------------------------------------------------------------------------------------------------------

OLLAMA = """#!/bin/sh
pwd > "$OLLAMA_LOG"
echo "$@" >> "$OLLAMA_LOG"
echo "transferring model data" >&2
[ "$2" = good ] || { echo "Error: no such quantization" >&2; exit 1; }
"""


@pytest.fixture
def ollama(tmp_path, monkeypatch):
    """A program ``ollama`` that notes how it is called, and refuses every name but ``good``."""
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(OLLAMA)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OLLAMA_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def test_ollama_is_called_in_the_folder(tiny, ollama):
    outcome = bundled("bundle", tiny, "-o", "out", "--ollama", "good")
    assert ollama.read_text().splitlines() == [str(tiny.parent / "out"), "create good -f Modelfile"]
    assert "ollama run good" in outcome.out


def test_what_ollama_says_is_told(tiny, ollama):
    outcome = call("bundle", tiny, "-o", "out", "--ollama", "bad")
    wanted = "out: ollama create bad failed: Error: no such quantization; the bundle itself is complete"
    assert (outcome.code, outcome.err) == (5, f"error: {wanted}\n")
    check_sums(tiny.parent / "out")


def test_a_missing_ollama_is_told_before_the_work(tiny, monkeypatch):
    monkeypatch.setenv("PATH", "")
    text = message(call("bundle", tiny, "-o", "out", "--ollama", "x"), 5)
    assert text.startswith("the program ollama is not installed (https://ollama.com)")
    assert not (tiny.parent / "out").exists()


# --- first words -----------------------------------------------------------------------------------------------------


def test_first_words_are_the_most_likely_ones(tiny):
    """Against an independent loop over whole sequences, whose logits are computed anew for every token."""
    with llama.open_model(tiny, vocab_only=True) as vocabulary:
        tokens = [1, *vocabulary.tokenize("abc", add_special=False).tolist()]
        said = []
        for _ in range(5):
            said.append(int(llama.logits(tiny, [*tokens, *said], n_threads=1)[-1].argmax()))
        wanted = vocabulary.detokenize(said)
    assert llama.complete(tiny, "abc", n_tokens=5, n_threads=1) == wanted
    assert llama.complete(tiny, "abc", n_tokens=5, max_seconds=0.0, n_threads=1) == wanted[:1]
    found = sample(tiny, "abc", n_threads=1)
    assert (found.prompt, found.is_chat, found.note) == ("abc", False, "") and found.answer.startswith(wanted)


def test_no_prompt_has_no_answer(tmp_path):
    path = write_tiny_gguf(tmp_path / "no_bos.gguf", add_bos=False)
    with pytest.raises(TextError, match="the prompt has no tokens"):
        llama.complete(path, "", n_tokens=5)


def test_first_words_take_the_template_of_the_file(folder):
    outcome = bundled(
        "convert", "model", *PLAIN, "--no-verify", "-o", "a.gguf", "--threads", 1, "--chat", "Hi", "--json", "a.json"
    )
    found = json.loads((folder / "a.json").read_text())[0]["sample"]
    with_template = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answer = llama.complete(folder / "a.gguf", with_template, n_tokens=24, n_threads=1)
    assert found == {"prompt": "Hi", "answer": answer, "is_chat": True, "note": ""}
    assert f"answer (chat template): 'Hi' -> {found['answer']!r}" in " ".join(outcome.out.split("\n"))


def test_a_template_that_fails_does_not_fail_the_conversion(folder):
    (folder / "model" / "chat_template.jinja").write_text("{{ raise_exception('tools only') }}")
    outcome = bundled("convert", "model", *PLAIN, "--no-verify", "-o", "a.gguf", "--threads", 1, "--chat", "Hi")
    assert "note: chat template cannot be rendered: tools only" in outcome.out and "continuation: 'Hi'" in outcome.out


def test_a_bundle_without_a_source_is_made_from_the_file_alone(tiny):
    (tiny.parent / "out").mkdir()
    bundle = make_bundle(tiny, tiny.parent / "out", Source(base_model="a/b"))
    assert bundle.origin == Origin(("a/b",)) and bundle.to_json()["chat_format"] is None
    with pytest.raises(OutputError, match="no such folder for the bundle"):
        make_bundle(tiny, Path("missing"))
    assert [field.name for field in GGUFReader(bundle.gguf).fields.values()] == [
        field.name for field in GGUFReader(tiny).fields.values()
    ]
