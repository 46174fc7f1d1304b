"""Models by their name on the Hub: names, choice of files, and downloads from a server on localhost."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command import ENVIRONMENT, PLAIN, TINY, call, message, run
from hub_server import COMMIT, Hub
from tiny_models import safetensors_bytes, tiny_weights, write_tiny

from nsds_gguf.errors import ModelError
from nsds_gguf.read.hub import SMALL_FILES, HubName, parse_name

PLAN = ("plan", "org/model", *PLAIN)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Return the files of a repository: a sound model, and much that nobody needs."""
    folder = write_tiny(tmp_path_factory.mktemp("repository") / "model", TINY)
    needed = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {
        **needed,
        ".gitattributes": b"*.bin filter=lfs",
        "README.md": b"---\nlicense: mit\n---\n# Model\n",
        "pytorch_model.bin": b"x" * 100,
        "model-Q4_K_M.gguf": b"x" * 100,
        "consolidated.safetensors": b"x" * 100,
        "onnx/model.onnx": b"x" * 100,
        "modeling_model.py": b"raise SystemExit",
        "../escaped.json": b"{}",
        "/etc/escaped.json": b"{}",
    }


def environment(hub: Hub, **changes: str) -> dict[str, str]:
    """Return the environment of a user whose Hub this is, and whose home is the working directory."""
    clean = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": "home", "HF_HUB_DISABLE_TELEMETRY": "1", **changes}


def plan(hub: Hub, *arguments: object, cwd: Path, **changes: str):
    return run(*(arguments or PLAN), cwd=cwd, env=environment(hub, **changes))


NEEDED = ["README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


def test_only_the_files_that_are_needed(tmp_path, files):
    with Hub(files) as hub:
        outcome = plan(hub, "convert", *PLAN[1:], "--no-verify", "-v", cwd=tmp_path, HF_TOKEN="hf_secret")
        assert outcome.code == 0, outcome
        assert sorted(hub.fetched()) == sorted(name for name in NEEDED if name in files)
        assert list(tmp_path.glob("*.gguf")) == [tmp_path / "Model-934K-v1.0-Q8_0.gguf"]
        assert {headers.get("authorization") for _, path, headers in hub.requests if "/storage/" not in path} == {
            "Bearer hf_secret"
        }
        assert "download org/model" in outcome.err
        hub.requests.clear()
        assert plan(hub, cwd=tmp_path).code == 0
        assert hub.fetched() == []  # all of it is in the cache
    snapshot = tmp_path / "home" / "hub" / "models--org--model" / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(name for name in NEEDED if name in files)
    assert not list(tmp_path.rglob("escaped.json"))


def test_offline(tmp_path, files):
    with Hub(files) as hub:
        line = message(plan(hub, cwd=tmp_path, HF_HUB_OFFLINE="1"), 3)
        assert line == ("org/model: is not in the cache home/hub, and HF_HUB_OFFLINE forbids the download: unset it")
        online = plan(hub, *PLAN, "--json", "-", "-q", cwd=tmp_path)
        hub.requests.clear()
        offline = plan(hub, *PLAN, "--json", "-", "-q", cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert (offline.code, offline.out) == (0, online.out) and len(online.out) > 1000
        assert hub.requests == []


def test_a_broken_connection_is_resumed(tmp_path):
    """The library writes 10 MB at a time; what it has written it does not ask for again."""
    content = np.random.default_rng(0).bytes(24_000_000)
    with Hub({"big.gguf": content}, cut={"big.gguf"}) as hub:
        message(plan(hub, "plan", "org/model:big.gguf", *PLAIN, cwd=tmp_path), 3)  # random bytes are no GGUF
    ranges = [headers.get("range") for method, path, headers in hub.requests
              if method == "GET" and path == "/storage/big.gguf"]  # fmt: skip
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    assert (tmp_path / "home/hub/models--org--model/snapshots" / COMMIT / "big.gguf").read_bytes() == content


def test_files_that_arrived_are_kept(tmp_path, files):
    with Hub(files, removed={"model.safetensors"}) as hub:
        message(plan(hub, cwd=tmp_path), 3)
        hub.removed.clear()
        hub.requests.clear()
        assert plan(hub, cwd=tmp_path).code == 0
        assert hub.fetched() == ["model.safetensors"]


def test_shards_that_the_index_names(tmp_path, files):
    weights = tiny_weights(TINY)
    names = sorted(weights)
    shards = {f"part-{i}.safetensors": {name: weights[name] for name in names[i::2]} for i in range(2)}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    sharded = {shard: safetensors_bytes(held) for shard, held in shards.items()}
    with Hub({**rest, "model.safetensors.index.json": json.dumps(index).encode(), **sharded}) as hub:
        assert plan(hub, cwd=tmp_path).code == 0
        assert {"model.safetensors.index.json", *sharded} <= set(hub.fetched())
        assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(hub.fetched())
    with Hub({**rest, "model.safetensors.index.json": json.dumps(index).encode()}) as hub:
        assert message(plan(hub, cwd=tmp_path / ".."), 3) == (
            "org/model: model.safetensors.index.json names part-0.safetensors, which is not in the repository"
        )


def test_no_weights_of_a_model_that_is_not_supported(tmp_path, files):
    config = json.dumps({**json.loads(files["config.json"]), "architectures": ["UnheardOfForCausalLM"]}).encode()
    with Hub({**files, "config.json": config}) as hub:
        assert "UnheardOfForCausalLM" in message(plan(hub, cwd=tmp_path), 3)
        assert "model.safetensors" not in hub.fetched()


def test_pytorch_weights_only_where_there_are_no_others(tmp_path, files):
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    with Hub(rest) as hub:
        line = message(plan(hub, cwd=tmp_path), 3)
        assert "pytorch_model.bin" in hub.fetched()
        assert "pytorch_model.bin: truncated or damaged" in line


def test_revision(tmp_path, files):
    with Hub(files) as hub:
        assert plan(hub, *PLAN, "--revision", "v1", cwd=tmp_path).code == 0
        assert any("/resolve/v1/" in path for _, path, _ in hub.requests)
        assert not any("/resolve/main/" in path for _, path, _ in hub.requests)
        assert message(plan(hub, *PLAN, "--revision", "v9", cwd=tmp_path), 3) == (
            "org/model@v9: org/model has no such branch, tag or commit"
        )
    assert message(plan(hub, "plan", "config.json", *PLAIN, "--revision", "v1", cwd=tmp_path), 4) == (
        "--revision v1 applies to models on the Hub; config.json is a local path"
    )


REFUSALS = {
    "gated": (403, "GatedRepo", "org/model: is gated: accept its terms at {url}/org/model, then `hf auth login` or set "
                                "HF_TOKEN"),
    "missing": (404, "RepoNotFound", "org/model: no such folder here, and no such model on {url}: check the name, or "
                                     "for a private one `hf auth login` or set HF_TOKEN"),
    "not logged in": (401, "RepoNotFound", "org/model: no such folder here, and no such model on {url}: check the "
                                           "name, or for a private one `hf auth login` or set HF_TOKEN"),
    "forbidden": (403, "", "org/model: {url} refuses access (403): check the token in HF_TOKEN"),
    "broken": (501, "", "org/model: no such folder here, and the download from {url} failed: status 501: check the "
                        "connection and run the command again; files that have arrived are kept"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "code", "line"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(tmp_path, files, status, code, line):
    with Hub(files, status=status, error_code=code) as hub:
        assert message(plan(hub, cwd=tmp_path), 3) == line.format(url=hub.url)


def test_nobody_answers(tmp_path, files):
    with Hub(files) as hub:
        gone = hub
    line = message(plan(gone, cwd=tmp_path), 3)
    assert line.startswith(f"org/model: no such folder here, and the download from {gone.url} failed: ")
    assert line.endswith(": check the connection and run the command again; files that have arrived are kept")


def test_a_file_that_vanished(tmp_path, files):
    with Hub(files, removed={"tokenizer.json"}) as hub:
        assert message(plan(hub, cwd=tmp_path), 3).startswith(
            f"org/model: no such folder here, and the download from {hub.url} failed: status 404"
        )


def test_repository_without_a_model(tmp_path, files):
    with Hub({"a-Q8_0.gguf": b"GGUF", "b.gguf": b"GGUF", "README.md": b""}) as hub:
        assert message(plan(hub, cwd=tmp_path), 3) == (
            "org/model: a repository of GGUF files; name one, as org/model:a-Q8_0.gguf: a-Q8_0.gguf, b.gguf"
        )
        assert message(plan(hub, "plan", "org/model:c.gguf", *PLAIN, cwd=tmp_path), 3) == (
            "org/model:c.gguf: no such file in the repository; its GGUF files: a-Q8_0.gguf, b.gguf"
        )
        line = message(plan(hub, "plan", "org/model:b.gguf", *PLAIN, cwd=tmp_path), 3)
        assert f"snapshots/{COMMIT}/b.gguf: " in line and hub.fetched() == ["b.gguf"]
    with Hub({"readme.txt": b""}) as hub:
        assert message(plan(hub, cwd=tmp_path), 3) == (
            "org/model: wanted config.json with safetensors or pytorch_model.bin; the repository holds readme.txt"
        )


def test_disk_that_is_too_small(tmp_path, files):
    with Hub(files, sizes={"model.safetensors": 10**15}) as hub:
        line = message(plan(hub, cwd=tmp_path), 5)
        assert re.fullmatch(
            r"home/hub: the download of org/model to home/hub \(set HF_HOME to change the place\) takes "
            r"931322\.57 GiB, the disk has [\d.]+ GiB free: make room or choose another folder",
            line,
        )
        assert "model.safetensors" not in hub.fetched()


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert message(call(*PLAN), 3) == (
        "org/model: no such folder; to download the model of this name run `pip install 'nsds-gguf[hub]'`"
    )


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = {
    "org/model": HubName("org/model"),
    "hf:org/model": HubName("org/model"),
    "Qwen/Qwen2.5-0.5B_x": HubName("Qwen/Qwen2.5-0.5B_x"),
    "https://huggingface.co/org/model": HubName("org/model"),
    "https://huggingface.co/org/model/": HubName("org/model"),
    "https://huggingface.co/org/model/tree/v1": HubName("org/model", "v1"),
    "https://huggingface.co/org/model/blob/main/Q8/m.gguf": HubName("org/model", "main", "Q8/m.gguf"),
    "org/model-GGUF:model-Q8_0.gguf": HubName("org/model-GGUF", None, "model-Q8_0.gguf"),
    "hf:org/model:folder/m.gguf": HubName("org/model", None, "folder/m.gguf"),
    "here/model": None,
    "hf:here/model": HubName("here/model"),
    "model": None,
    "./org/model": None,
    "../org/model": None,
    "/org/model": None,
    "org/model/deeper": None,
    "org/model/": None,
    "org/model.gguf": None,
    "org\\model": None,
    "~/model": None,
    "": None,
    ".": None,
}


@pytest.mark.parametrize(("text", "name"), NAMES.items())
def test_names(tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert parse_name(text) == name


@pytest.mark.parametrize("text", ["hf:", "hf:model", "hf:org/model/x", "https://huggingface.co/org", "hf:../model",
                                  "https://example.org/org/model", "hf:https://huggingface.co/org/model"])  # fmt: skip
def test_names_that_are_none(text):
    with pytest.raises(ModelError) as error:
        parse_name(text)
    assert str(error.value) == f"{text}: wanted hf:ORG/MODEL or https://huggingface.co/ORG/MODEL"


@pytest.mark.parametrize("file", ["../m.gguf", "/m.gguf", "a/../m.gguf", "a//m.gguf", ".hidden.gguf", "a\\m.gguf"])
def test_files_that_leave_the_repository(file):
    with pytest.raises(ModelError, match="wanted the name of a GGUF file of the repository"):
        parse_name("org/model:" + file)


def test_two_revisions():
    with pytest.raises(ModelError, match="names a revision, --revision v2 another; give one"):
        parse_name("https://huggingface.co/org/model/tree/v1", "v2")


def test_small_files_are_those_that_are_read():
    """Every file that the package reads from a model folder is fetched; no code and no weights are."""
    wanted = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "README.md",
    ]  # fmt: skip
    assert all(SMALL_FILES.fullmatch(name) for name in wanted)
    others = [
        "modeling.py", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/config.json", ".gitattributes",
        "x.jinja", "../config.json", "additional_chat_templates/../config.json", "config.json.bak",
    ]  # fmt: skip
    assert not any(SMALL_FILES.fullmatch(name) for name in others)
