"""Folders that are up to no good: nothing outside them is read, nothing in them is run, nothing in them lasts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import ENVIRONMENT, PLAIN, call, message
from tiny_models import SPECS, write_tiny

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.publish.chat import find_format
from nsds_gguf.publish.modelfile import chat_format
from nsds_gguf.publish.renderer import Renderer, TemplateLimitError
from nsds_gguf.read import open_model
from nsds_gguf.read.own_files import MAX_TEXT_BYTES

ROOT = Path(__file__).parent.parent
SMALL = replace(SPECS["llama"], n_layers=1, n_embd=32, n_ff=32, n_heads=2, n_kv_heads=1, dtype="F16")
CHATML = (ROOT / "tests" / "jinja" / "chatml.jinja").read_text(encoding="utf-8")
TEMPLATE_KEY = "tokenizer.chat_template"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", SMALL)


# --- what is no ordinary file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenizer.model", "README.md",
     "model.safetensors", "model.safetensors.index.json", "chat_template.jinja", "additional_chat_templates/a.jinja"],
)  # fmt: skip
def test_a_pipe_is_refused_and_not_waited_for(name: str, model: Path) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ModelError) as caught:
        open_model(model)
    assert str(caught.value) == f"{model / name}: is a pipe; wanted an ordinary file"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "added_tokens.json"])
def test_a_device_is_refused(name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=rf"{name}: is a device; wanted an ordinary file"):
        open_model(model)


def test_a_text_of_absurd_size_is_not_read(model: Path) -> None:
    os.truncate(model / "config.json", MAX_TEXT_BYTES + 2**20)  # a sparse file
    with pytest.raises(ModelError, match=r"config.json: has 101 MiB; wanted at most 100: it is damaged"):
        open_model(model)


def test_the_command_refuses_a_pipe_at_once(tmp_path: Path, model: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert message(call("convert", model, *PLAIN, "-o", tmp_path), 3).endswith(
        "config.json: is a pipe; wanted an ordinary file"
    )


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "README.md", "config.json"])
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_link_to_a_file_elsewhere_is_refused(name: str, is_absolute: bool, model: Path) -> None:
    secret = model.parent / "id_rsa"
    secret.write_text("a secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret if is_absolute else "../id_rsa")
    with pytest.raises(ModelError) as caught:
        open_model(model)
    assert str(caught.value) == (
        f"{model / name}: is a link to {secret}, outside the model folder, which is not read; if you trust it, "
        "copy the file into the folder"
    )


def test_links_of_the_cache_of_the_hub_are_followed(tmp_path: Path, model: Path) -> None:
    wanted = open_model(model).model_id
    snapshot = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        blob = blobs / f"{number:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    assert open_model(snapshot).model_id == wanted


def test_links_to_files_of_the_same_name_are_followed_and_weights_may_be_anywhere(tmp_path: Path, model: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    (model / "model.safetensors").rename(tmp_path / "merged.safetensors")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to("../merged.safetensors")
    assert open_model(linked).n_weights == sum(tensor.n_weights for tensor in open_model(linked).tensors)


def test_a_folder_that_is_itself_a_link_is_the_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    (model / "chat_template.jinja").symlink_to("other.txt")
    (model / "other.txt").write_text("{{ messages }}")
    assert open_model(tmp_path / "link").metadata[TEMPLATE_KEY].value == "{{ messages }}"


# --- what is opened, and what is run ----------------------------------------------------------------------------------

_WATCHED = """
import sys
sys.path.remove("")  # as the installed command has it
import json, os
opened, started = [], []
def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        opened.append(os.path.realpath(os.fsdecode(arguments[0])))
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class"):
        started.append([event, *map(str, arguments[:2])])
sys.addaudithook(hook)
from nsds_gguf.cli import main
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as stream:
    json.dump([code, opened, started], stream)
"""

_TRAP = "import pathlib\npathlib.Path(__file__).with_name('TRAPPED').touch()\n"


def _trapped(model: Path) -> None:
    """Put into a folder all that could lead out of it, or be run."""
    secret = model.parent / "outside" / "secret.json"
    secret.parent.mkdir()
    secret.write_text("{}")
    for name in [
        "modeling_x",
        "configuration_x",
        "tokenization_x",
        "json",
        "yaml",
        "jinja2",
        "gguf",
        "numpy",
        "datetime",
        "sitecustomize",
    ]:
        (model / f"{name}.py").write_text(_TRAP)
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["t.X", None]}
    out = "../outside/secret.json"
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": auto, "trust_remote_code": True, "_name_or_path": out, "tokenizer_file": out}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": auto, "tokenizer_file": out, "vocab_file": str(secret), "name_or_path": out}
    tokenizer["chat_template"] = {"default": CHATML, "../../x": "{{ 1 }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (model / "generation_config.json").write_text(json.dumps({"_from_model_config": out, "transformers_version": out}))


def test_a_conversion_opens_nothing_else_and_runs_nothing(tmp_path: Path, model: Path) -> None:
    _trapped(model)
    out = tmp_path / "out"
    out.mkdir()
    command = ("convert", "../model", *PLAIN, "--no-verify", "-o", str(out / "a.gguf"), "--rounding", "rtn")
    # The working directory is the model folder: what is run must not take modules from there.
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(out / "seen.json"), *command],
        cwd=model,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    code, opened, started = json.loads((out / "seen.json").read_text())
    assert code == 0, done.stderr
    # Of Python, its libraries and the system; the folder and the output.
    allowed = [model, out, ROOT, "/proc", "/sys", "/dev", "/etc", "/usr", "/lib"]
    allowed += [sys.prefix, sys.base_prefix, *(path for path in sys.path if "site-packages" in path)]
    known = tuple({str(path) for path in allowed} | {os.path.realpath(path) for path in allowed})
    outside = [path for path in opened if not path.startswith(known) or path.startswith(str(model.parent / "outside"))]
    assert outside == []
    assert str(model / "tokenizer_config.json") in opened and not (model / "TRAPPED").exists()
    forbidden = ("os.system", "os.exec", "socket.connect", "pickle.find_class")
    assert not [event for event in started if event[0] in forbidden]


def test_the_child_that_renders_takes_no_module_from_the_working_directory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _trapped(model)
    monkeypatch.chdir(model)
    monkeypatch.setenv("PYTHONPATH", "")
    renderer = Renderer()
    try:
        assert renderer.ask({"source": "{{ 6 * 7 }}", "now": None, "variables": {}}) == {"text": "42"}
    finally:
        renderer.close()
    assert not (model / "TRAPPED").exists()


# --- templates --------------------------------------------------------------------------------------------------------

_TIME = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10**10 }}", "it takes more than 512 MiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "it takes more than 512 MiB of memory"),
        ("{{ 'x' | center(10**10) }}", "it takes more than 512 MiB of memory"),
        ("{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}", "it writes more than 1048576 characters"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth exceeded"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "maximum recursion depth exceeded"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{% import 'os' as os %}", "no loader for this environment"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% break %}", "'break' outside loop"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_templates_at_war(template: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        find_format(CHATML + template)


def test_a_template_without_end_is_ended_and_the_next_is_rendered() -> None:
    renderer = Renderer(max_seconds=0.3)
    with pytest.raises(TemplateLimitError, match=r"cannot be rendered: it takes more than 0\.3 s"):
        renderer.ask({"source": _TIME, "now": None, "variables": {}})
    assert renderer.ask({"source": "{{ a }}", "now": None, "variables": {"a": "\ud800"}}) == {"text": "\ud800"}
    renderer.close()


def test_a_template_that_takes_the_child_down_is_told_so() -> None:
    renderer = Renderer()
    child = renderer._started()
    child.kill()
    child.wait()
    assert renderer.ask({"source": "a", "now": None, "variables": {}}) == {"text": "a"}  # another was started
    renderer.close()


def test_a_bad_template_of_a_folder_does_not_stop_its_conversion(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    opened = open_model(model)
    assert opened.metadata[TEMPLATE_KEY].value == "{{ 'x' * 10**10 }}"
    with pytest.raises(UnsupportedError, match="chat template"):
        chat_format(opened.metadata)
