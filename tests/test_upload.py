"""Uploads to a stand-in of the Hub on localhost, and models in parts."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import struct

import numpy as np
import pytest
from command import TINY, call, message, run
from hub_server import COMMIT, Hub
from test_hub import environment
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf import errors
from nsds_gguf.evaluate.inspect import inspect_gguf
from nsds_gguf.llamacpp import llama
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.llamacpp.gguf_split import part_names, split_tensors, write_parts
from nsds_gguf.publish import upload as uploads
from nsds_gguf.publish.bundle import make_bundle
from nsds_gguf.publish.upload import Destination, check_upload, upload
from nsds_gguf.read.gguf_source import open_gguf
from nsds_gguf.session.run import Silent

# A warning of the HTTP client about how the library calls it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BUNDLE = ("bundle", "tiny.gguf", "-o", "out", "--base-model", "org/base", "--upload", "org/model", "-q", "--json", "-")
NAMES = ["Modelfile", "README.md", "SHA256SUMS", "tiny.gguf"]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with ``tiny.gguf``."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path


@pytest.fixture
def send(folder, monkeypatch):
    """Return what runs the command in this process, with a token, against a stand-in of the Hub."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(folder)

    def run_it(hub, *more, token="hf_secret", words=BUNDLE):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", token)
        return call(*words, *more)

    return run_it


def sent(folder):
    return {name: (folder / "out" / name).read_bytes() for name in NAMES}


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_a_new_repository_is_private(folder, send):
    with Hub({}, exists=False) as hub:
        outcome = send(hub)
        assert outcome.code == 0, outcome
        assert hub.is_private is True and hub.files == sent(folder)
        assert [sorted(names) for names in hub.commits] == [NAMES]
        found = json.loads(outcome.out)["upload"]
        assert (found["is_new"], found["is_private"], found["is_dry_run"]) == (True, True, False)
        assert found["states"] == dict.fromkeys(found["files"], "new")
        assert found["files"] == {name: len(content) for name, content in hub.files.items()}
        assert found["url"] == f"{hub.url}/org/model/commit/{COMMIT}"
        assert {headers.get("authorization") for method, path, headers in hub.requests if "org/model" in path} == {
            "Bearer hf_secret"
        }
    assert not list((folder / "out").glob(".nsds*"))


def test_public_on_request(folder, send):
    with Hub({}, exists=False) as hub:
        assert json.loads(send(hub, "--public").out)["upload"]["is_private"] is False
        assert hub.is_private is False


def test_what_is_there_already_is_not_sent_again(folder, send):
    with Hub({"other.gguf": b"x", ".gitattributes": b"y"}) as hub:
        assert json.loads(send(hub).out)["upload"]["is_private"] is None
        assert hub.is_private is None and set(hub.files) == {*NAMES, "other.gguf", ".gitattributes"}
        hub.requests.clear()
        outcome = send(hub, "--force")
        assert outcome.code == 0, outcome
        assert set(json.loads(outcome.out)["upload"]["states"].values()) == {"unchanged"}
        assert len(hub.commits) == 1 and not [path for method, path, _ in hub.requests if method == "PUT"]


@pytest.mark.parametrize("name", ["tiny.gguf", "README.md"])
def test_other_bytes_are_replaced_by_force_alone(folder, name, send):
    with Hub({name: b"other"}) as hub:
        line = message(send(hub), 5)
        assert line == (
            f"--upload org/model: has {name} with other bytes; pass --force to replace it, or name another repository"
        )
        assert hub.files == {name: b"other"} and hub.commits == [] and sent(folder).keys() == set(NAMES)
        outcome = send(hub, "--force")
        assert json.loads(outcome.out)["upload"]["states"][name] == "replaced" and hub.files == sent(folder)


def test_bytes_of_the_same_number_are_compared(folder, send):
    content = bytearray((folder / "tiny.gguf").read_bytes())
    content[-1] ^= 1
    with Hub({"tiny.gguf": bytes(content)}) as hub:
        outcome = send(hub, "--upload-dry-run")
        assert json.loads(outcome.out)["upload"]["states"]["tiny.gguf"] == "replaced"


def test_a_dry_run_sends_nothing(folder, send):
    with Hub({"README.md": b"other"}) as hub:
        outcome = send(hub, "--upload-dry-run")
        assert outcome.code == 0, outcome
        found = json.loads(outcome.out)["upload"]
        assert found["states"] == {"README.md": "replaced", "Modelfile": "new", "tiny.gguf": "new", "SHA256SUMS": "new"}
        assert found["is_dry_run"] and hub.files == {"README.md": b"other"} and hub.commits == []
    with Hub({}, exists=False) as hub:
        outcome = send(hub, "--force", "--upload-dry-run", words=BUNDLE[:-3])
        assert not hub.exists and outcome.out.splitlines()[-1] == (
            f"{hub.url}/org/model (a private repository, to be created); nothing was sent"
        )


def test_what_the_hub_refuses(folder, send):
    with Hub({}) as hub:
        line = message(send(hub, token=""), 5)
        assert line == "--upload org/model: no Hub token found: run `hf auth login`, or set HF_TOKEN"
        assert not (folder / "out").exists()
        hub.may_write = False
        line = message(send(hub), 5)
        assert line == (
            f"--upload org/model: {hub.url} refuses access (403): wanted a token with write access in HF_TOKEN, or "
            "`hf auth login`"
        )
        assert sorted(path.name for path in (folder / "out").iterdir()) == NAMES
        hub.may_write, hub.moves = True, True
        line = message(send(hub, "--force"), 5)
        assert line == "--upload org/model: the repository changed meanwhile (412): run the command again"
        assert hub.commits == []
        hub.status = 401
        assert "refuses access (401)" in message(send(hub, "--force"), 5)
        hub.status = 500  # at the first request, before there is a bundle
        assert message(send(hub, "--force"), 5) == f"--upload org/model: a request to {hub.url} failed: status 500"


def test_convert_uploads_its_bundle(tmp_path):
    write_tiny(tmp_path / "model", TINY)
    with Hub({}, exists=False) as hub:
        outcome = run("convert", "model", "--uniform", "Q8_0", "--ctx-size", 32, "--chunks", 2, "--threads", 1,
                      "--bundle", "out", "--upload", "org/model", cwd=tmp_path,
                      env=environment(hub, HF_TOKEN="t", HF_HUB_DISABLE_XET="1"))  # fmt: skip
        assert outcome.code == 0, outcome
        assert set(hub.files) == {path.name for path in (tmp_path / "out").iterdir()} and len(hub.files) == 5
        assert b"| perplexity | " in hub.files["README.md"] and b"not measured" not in hub.files["README.md"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--upload", "org/model"), "--upload needs a bundle; pass --bundle DIR too"),
        (("--public",), "--public needs a bundle; pass --bundle DIR too"),
        (("--bundle", "out", "--public"), "--public and --upload-dry-run need --upload ORG/NAME"),
    ],
)
def test_contradictions(folder, monkeypatch, words, line):
    monkeypatch.chdir(folder)
    assert message(call("convert", "tiny.gguf", "--target-bpw", 6, *words), 5) == line


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(uploads.__builtins__ if isinstance(uploads.__builtins__, dict) else vars(uploads.__builtins__),
                        "__import__", _without_hub(__import__))  # fmt: skip
    with pytest.raises(errors.OutputError, match=r"needs huggingface_hub; run: pip install 'nsds-gguf\[hub\]'"):
        check_upload("org/model")


def _without_hub(imports):
    def without(name, *rest):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return imports(name, *rest)

    return without


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_are_read_as_one_model(folder):
    path, parts_folder = folder / "tiny.gguf", folder / "parts"
    parts_folder.mkdir()
    limit = path.stat().st_size // 3
    parts = write_parts(path, parts_folder, limit)
    assert [part.name for part in parts] == [f"tiny-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    assert len(parts) >= 3 and part_names(path, len(parts)) == [part.name for part in parts]
    whole = read_gguf_header(path)
    headers = [read_gguf_header(part) for part in parts]
    assert [t.name for header in headers for t in header.tensors] == [t.name for t in whole.tensors]
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        split = {key: entry.value for key, entry in header.metadata.items() if key.startswith("split.")}
        assert split == {"split.no": number, "split.count": len(parts), "split.tensors.count": len(whole.tensors)}
        assert part.stat().st_size <= max(limit, header.n_bytes + header.tensors[0].n_bytes + 32)
        others = {key: entry for key, entry in header.metadata.items() if not key.startswith("split.")}
        assert others == (whole.metadata if number == 0 else {})
    one, joined = open_gguf(path), open_gguf(parts[0])
    assert joined.n_weights == one.n_weights
    for name, tensor in one.by_name.items():
        np.testing.assert_array_equal(joined.by_name[name].load(), tensor.load())
    tokens = [1, 2, 3, 4]
    np.testing.assert_array_equal(llama.logits(parts[0], tokens), llama.logits(path, tokens))
    assert inspect_gguf(parts[1]).n_weights == one.n_weights


def test_keys_are_copied_byte_by_byte(folder):
    path = folder / "tiny.gguf"
    data = path.read_bytes()
    (part, *_) = write_parts(path, folder, path.stat().st_size // 2)
    first = part.read_bytes()
    header = read_gguf_header(path)
    assert first[24 : header.keys_end] == data[24 : header.keys_end]
    assert struct.unpack("<Q", first[16:24])[0] == len(header.metadata) + 3


def test_a_tensor_over_the_limit_has_a_part_of_its_own(folder):
    header = read_gguf_header(folder / "tiny.gguf")
    parts = split_tensors(header, 1)
    assert [len(part) for part in parts] == [1] * len(header.tensors)
    assert split_tensors(header, 10**12) == [list(header.tensors)]


def test_a_full_disk_is_no_failure_of_the_hub(folder, monkeypatch, send):
    (folder / "out").mkdir()
    bundle = make_bundle(folder / "tiny.gguf", folder / "out")
    monkeypatch.setattr(uploads, "LARGEST_FILE_BYTES", bundle.gguf.stat().st_size // 2)

    def fail(*_):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(uploads, "write_parts", fail)
    with pytest.raises(errors.OutputError, match=r"out: disk full or file too large while writing") as found:
        upload(bundle, Destination("org/model"), Silent())
    assert "request" not in str(found.value)


def test_a_large_model_is_uploaded_in_parts(folder, monkeypatch, send):
    (folder / "out").mkdir()
    bundle = make_bundle(folder / "tiny.gguf", folder / "out")
    monkeypatch.setattr(uploads, "LARGEST_FILE_BYTES", bundle.gguf.stat().st_size // 2)
    with Hub({}, exists=False) as hub:
        line = message(send(hub, "--force", token=""), 5)
        assert "no Hub token" in line  # and now the library knows this Hub
        monkeypatch.setenv("HF_TOKEN", "t")
        found = upload(bundle, Destination("org/model"), Silent())
        names = list(found.files)
        n_parts = len(names) - 2
        assert names == [*part_names(bundle.gguf, n_parts), "README.md", "SHA256SUMS"] and n_parts >= 2
        assert set(hub.files) == set(names)
        sums = dict(reversed(line.split("  ")) for line in hub.files["SHA256SUMS"].decode().splitlines())
        assert sums == {name: hashlib.sha256(hub.files[name]).hexdigest() for name in names if name != "SHA256SUMS"}
        card = hub.files["README.md"].decode()
        assert f"-m {names[0]}" in card and "tiny.gguf" not in card.replace(names[0], "")
    assert sorted(path.name for path in (folder / "out").iterdir()) == NAMES  # no part is left
