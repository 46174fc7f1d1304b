"""Reports: the page holds the plan cell by cell, runs nothing but its own two scripts, and says what is not known."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import PLAIN, QUICK, TINY, call, message
from recipes import recipe
from report_plans import DENSE, EXPERTS, HOSTILE_NAME, made_up_perplexity, made_up_plan, made_up_scores
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf.cli import build_parser
from nsds_gguf.cli.options import options_of
from nsds_gguf.errors import OutputError, PlanError, RecordError
from nsds_gguf.evaluate.inspect import inspect_gguf
from nsds_gguf.publish import report
from nsds_gguf.publish.explain import in_a_word
from nsds_gguf.publish.report import (
    Check,
    command,
    file_report,
    page,
    plan_report,
    template,
    write_report,
)
from nsds_gguf.records import Plan, Target, TensorType

GOLDEN = json.loads((Path(__file__).parent / "golden" / "report.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page as a browser parses it: elements with their attributes, and the text inside each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def policy(self):
        return next(a["content"] for t, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def plan():
    return made_up_plan(3, EXPERTS)


@pytest.fixture(scope="module")
def full(plan):
    check = Check(made_up_perplexity(), "a text", "original")
    return plan_report(
        plan, scores=made_up_scores(plan), check=check, architecture="llama", given="nsds-gguf convert x"
    )


@pytest.fixture(scope="module")
def html(full):
    return page(full)


# --- the data --------------------------------------------------------------------------------------------------------


def test_page_holds_the_plan_cell_by_cell(html, plan):
    columns = Page(html).data["tensors"]
    assert len(columns["name"]) == len(plan.tensors) > 30
    for i, tensor in enumerate(plan.to_json()["tensors"]):
        assert {name: values[i] for name, values in columns.items() if name != "why"} == {
            **tensor, "shape": list(tensor["shape"])
        }  # fmt: skip
        assert columns["why"][i] == in_a_word(plan, plan.tensors[i])


def test_page_holds_sums_scores_and_measurement(html, plan):
    data, scores = Page(html).data, made_up_scores(plan)
    assert (data["file_bytes"], data["bpw"], data["quantized_bpw"]) == (plan.file_bytes, plan.bpw, plan.quantized_bpw)
    assert data["layers"] == list(scores.to_json()["layers"]) and data["metric"] == "nsds"
    assert data["perplexity"] == made_up_perplexity().to_json()
    assert (data["text"], data["reference"], data["target"]) == ("a text", "original", "3.5 bpw")
    assert data["kernels"]["Q3_K"] == "slow" and data["kernels"]["Q4_K"] == "fast" and "IQ1_S" not in data["kernels"]
    assert data["notes"] == list(plan.notes) and dict(data["facts"])["plan SHA-256"] == plan.digest


def test_plan_of_a_file_makes_the_same_page(plan):
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert plan_report(again).to_json() == plan_report(plan).to_json()


def test_what_is_not_known_is_empty(plan):
    data = plan_report(plan).to_json()
    assert (data["layers"], data["perplexity"], data["given"]) == ([], None, "")


def test_scores_of_another_model_are_refused(plan):
    scores = replace(made_up_scores(plan), model_id="f" * 64, model_name="Other")
    with pytest.raises(RecordError, match=r"the scores belong to another model \(Other\); score Made Up 405B again"):
        plan_report(plan, scores=scores)


def test_file_report_tells_what_the_file_tells(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, "Q4_0")
    found = inspect_gguf(path)
    data = file_report(found).to_json()
    assert data["tensors"]["name"] == [tensor.name for tensor in found.tensors]
    assert data["tensors"]["n_bytes"] == [tensor.n_bytes for tensor in found.tensors]
    assert not {"error", "sensitivity", "reason", "why"} & data["tensors"].keys()
    assert (data["kind"], data["file_bytes"], data["command"]) == ("file", path.stat().st_size, "")
    assert data["notes"] == ("The file was not written by nsds-gguf: how its types were chosen is not known.",)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Target("bpw", 3.1), Target("size", 700_000_000), None], ids=str)
@pytest.mark.parametrize("allocator", ["fisher", "paper", "uniform"])
def test_command_parses_to_the_recipe_of_the_plan(plan, target, allocator):
    changes = {
        "fisher": {"types": ("IQ4_NL", "Q4_K"), "metric": "zd", "se": None, "score_weight": 0.7, "prefer": "fast"},
        "paper": {"types": ("Q2_K", "Q4_K"), "metric": "nsds", "se": "ratio", "seed": 3},
        "uniform": {"types": ("Q4_K",), "calibration": "norm"},
    }[allocator]
    fixed = (TensorType(r"blk\.0\.attn_(q|k)\.weight", "Q6_K"), TensorType("output.weight", "Q8_0"))
    asked = recipe(target, allocator=allocator, tensor_types=fixed, **changes)
    words = shlex.split(command(replace(plan, recipe=asked), "a model; rm"))
    arguments = build_parser().parse_args(words[1:])
    (options,) = options_of(arguments)
    assert arguments.model == "a model; rm" and options.target == target
    assert options.uniform == ("Q4_K" if allocator == "uniform" else None)
    names = {"allocator", "types"} if allocator != "uniform" else set()
    for name in names | {"tensor_types", "rounding", "calibration", "score_weight", "prefer", "seed", "device"}:
        assert getattr(options, name) == getattr(asked, name), name
    layers = ("auto", "auto") if allocator == "uniform" else (asked.metric, asked.se or "auto")
    assert (options.metric, options.se) == layers


def test_command_names_an_importance_matrix(plan):
    text = command(replace(plan, recipe=recipe(3.0, calibration="imatrix:0123456789ab")), "model")
    assert "--imatrix FILE" in text and "--calibration" not in text


# --- the page --------------------------------------------------------------------------------------------------------


def test_only_two_scripts_run_and_nothing_is_requested(html):
    parsed = Page(html)
    data, *scripts = parsed.scripts
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2 and json.loads(data)
    assert parsed.policy == (
        f"default-src 'none'; script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "srcset", "action", "style"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", "#").startswith("#")
    own = template("page.css") + "".join(map(template, report.SCRIPTS))
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|innerHTML|import\(", own)


def test_hostile_names_are_text():
    plan = made_up_plan(1, name=HOSTILE_NAME)
    tensors = (replace(plan.tensors[0], name=HOSTILE_NAME, role=HOSTILE_NAME), *plan.tensors[1:])
    hostile = page(plan_report(replace(plan, tensors=tensors), model=HOSTILE_NAME))
    plain = page(plan_report(made_up_plan(1)))
    parsed, harmless = Page(hostile), Page(plain)
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in harmless.elements]
    assert parsed.scripts[1:] == harmless.scripts[1:]
    assert parsed.data["title"] == parsed.data["tensors"]["name"][0] == HOSTILE_NAME
    assert all(hostile.count(text) == plain.count(text) for text in ("<img", "<!--", "<script", "</script"))
    assert shlex.split(parsed.data["command"])[2] == HOSTILE_NAME


def test_page_is_made_for_phones_and_the_dark(html):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert '<html lang="en">' in html and "prefers-color-scheme: dark" in html and "prefers-reduced-motion" in html


@pytest.mark.parametrize("layers", [2, 126])
def test_page_is_small(layers):
    n_bytes = len(page(plan_report(made_up_plan(layers, DENSE))).encode())
    assert 800_000 < n_bytes < 1_100_000 + 400 * 9 * layers


def test_golden_record_of_the_browser_check_is_current():
    """Whoever changes the page runs tools/check/check_report.py --record, which looks at it in a browser."""
    parts = ("page.html", "page.css", *report.SCRIPTS)
    assert GOLDEN["page_sha256"] == hashlib.sha256("".join(map(template, parts)).encode()).hexdigest()
    counts = {
        "demo": 57,
        "dense-126": 126 * len(DENSE) + 3,
        "dense-2": 2 * len(DENSE) + 3,
        "hostile": 3 * len(EXPERTS) + 3,
    }
    assert {name: case["cells"] for name, case in GOLDEN["cases"].items() if name in counts} == counts


# --- files and command line ------------------------------------------------------------------------------------------


def test_without_the_library_the_message_says_what_to_install(full, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"needs vl-convert-python; run: pip install 'nsds-gguf\[report\]'"):
        write_report(full, tmp_path / "x.html")


def test_a_page_that_cannot_be_written(full, tmp_path):
    with pytest.raises(OutputError, match=r"no/x\.html: cannot be written: No such file or directory"):
        write_report(full, tmp_path / "no" / "x.html")


@pytest.fixture
def folder(tmp_path, monkeypatch, plan):
    """A working directory with a plan, its scores and a GGUF."""
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(json.dumps(plan.to_json()))
    Path("scores.json").write_text(json.dumps(made_up_scores(plan).to_json()))
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path


def test_report_of_a_plan_and_of_a_gguf(folder, plan):
    outcome = call("report", "plan.json", "--scores", "scores.json", "-o", "page.html", "--json", "page.json")
    assert (outcome.code, outcome.out) == (0, "report: page.html\n")
    data = Page(Path("page.html").read_text(encoding="utf-8")).data
    assert data == json.loads(Path("page.json").read_text()) and len(data["layers"]) == 3
    outcome = call("report", "tiny.gguf", "-o", ".")
    assert (outcome.code, outcome.out) == (0, "report: tiny.html\n")
    assert Page(Path("tiny.html").read_text(encoding="utf-8")).data["kind"] == "file"


def test_convert_writes_a_report_of_what_it_made(folder):
    write_tiny(folder / "model", TINY)
    done = call(
        "convert", "model", *PLAIN, *QUICK, "--reference", "original", "-o", ".", "--report", ".", "--json", "made.json"
    )
    assert done.code == 0, done.err
    (made,) = json.loads(Path("made.json").read_text())
    data = Page(Path(made["path"]).with_suffix(".html").read_text(encoding="utf-8")).data
    assert data["perplexity"] == made["perplexity"] and data["reference"] == "original"
    assert data["tensors"]["type"] == [tensor["type"] for tensor in made["plan"]["tensors"]]
    assert data["file_bytes"] == Path(made["path"]).stat().st_size
    assert data["given"].startswith("nsds-gguf convert model --uniform Q8_0")
    assert data["command"] == "nsds-gguf convert model --uniform Q8_0 --rounding rtn --calibration random --device cpu"
    done = call("convert", "model", *PLAIN, "--dry-run", "--report", "planned.html")
    assert done.code == 0 and Page(Path("planned.html").read_text(encoding="utf-8")).data["perplexity"] is None


def test_report_refuses_what_it_cannot_show(folder):
    assert message(call("report", "plan.json", "-o", "x.txt"), 4) == (
        "--report x.txt: wanted a name ending in .html, or an existing folder"
    )
    assert (
        message(call("report", "plan.json", "-o", "no/x.html"), 5)
        == "--report no/x.html: no folder no; create it first"
    )
    assert "--scores needs a plan, got a GGUF" in message(
        call("report", "tiny.gguf", "--scores", "scores.json", "-o", "."), 4
    )
    assert "cannot be read" in message(call("report", "no.json", "-o", "x.html"), 4)
    line = message(call("plan", "model", "--target-bpw", "3,4", "--report", "x.html"), 4)
    assert line == "--report x.html: one page cannot hold 2 targets; pass a folder"
    assert not list(folder.glob("*.html"))
