"""PyTorch weights as far as torch is not needed: which file is opened, how torch is asked, what is said without it.

``tools/check/check_torch_bin.py`` compares the values with torch's own.
"""

from __future__ import annotations

import ast
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_models import safetensors_bytes

import nsds_gguf
from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import checkpoint
from nsds_gguf.read.checkpoint import FORMATS, open_checkpoint
from nsds_gguf.read.safetensors import read_header

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture
def readable(monkeypatch):
    """Let ``.bin`` files be safetensors ones, whose reader needs no torch."""
    monkeypatch.setattr(checkpoint, "FORMATS", tuple((single, index, read_header) for single, index, _ in FORMATS))


def weights(value: float, name: str = "a") -> bytes:
    return safetensors_bytes({name: np.full((2, 2), value, np.float32)})


def value_of(folder: Path, name: str = "a") -> float:
    return float(open_checkpoint(folder, {})[name].rows(slice(0, 1))[0, 0])


def archive(file: Path) -> Path:
    """Write an archive as ``torch.save`` does, of no tensors."""
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        content.writestr("archive/version", "3\n")
    return file


def test_one_file(tmp_path, readable):
    (tmp_path / SINGLE).write_bytes(weights(1))
    assert value_of(tmp_path) == 1


def test_shards(tmp_path, readable):
    for name, shard in zip("ab", SHARDS, strict=True):
        (tmp_path / shard).write_bytes(weights(ord(name), name))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}))
    assert [value_of(tmp_path, name) for name in "ab"] == [97, 98]
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path, {})
    assert str(error.value) == f"{tmp_path / SHARDS[1]}: shard is missing; {INDEX} names it: download it"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../" + SHARDS[0]}}))
    with pytest.raises(ModelError, match="wanted the name of a file in the same folder"):
        open_checkpoint(tmp_path, {})


def test_safetensors_come_first(tmp_path, readable):
    (tmp_path / SINGLE).write_bytes(weights(1))
    (tmp_path / INDEX).write_text("damaged")
    (tmp_path / "model.safetensors").write_bytes(weights(2))
    assert value_of(tmp_path) == 2


def test_torch_is_asked_for_tensors_only(tmp_path, monkeypatch):
    asked = []
    torch = types.ModuleType("torch")
    torch.load = lambda file, **options: asked.append((file, options)) or {}
    monkeypatch.setitem(sys.modules, "torch", torch)
    file = archive(tmp_path / SINGLE)
    assert open_checkpoint(tmp_path, {}) == {}
    assert asked == [(file, {"map_location": "cpu", "weights_only": True, "mmap": True})]


ERRORS = {
    pickle.UnpicklingError(
        "Weights only load failed.\n\tWeightsUnpickler error: Unsupported global: GLOBAL os.system was"
    ): ("calls os.system, which could run any code: refused; get the safetensors weights"),
    pickle.UnpicklingError("Weights only load failed.\n\tUnsupported operand 149"): (
        "is not a pickle of tensors: refused; get the safetensors weights"
    ),
    RuntimeError("PytorchStreamReader failed\nstack"): "truncated or damaged: PytorchStreamReader failed: download it "
    "again",
    EOFError(): "truncated or damaged: EOFError: download it again",
}


@pytest.mark.parametrize(("raised", "message"), ERRORS.items(), ids=["code", "damage", "archive", "end"])
def test_what_torch_refuses(tmp_path, monkeypatch, raised, message):
    def load(*_, **__):
        raise raised

    torch = types.ModuleType("torch")
    torch.load = load
    monkeypatch.setitem(sys.modules, "torch", torch)
    file = archive(tmp_path / SINGLE)
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path, {})
    assert str(error.value) == f"{file}: {message}"


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    file = archive(tmp_path / SINGLE)
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path, {})
    assert str(error.value) == (
        f"{file}: PyTorch weights need torch: run `pip install 'nsds-gguf[torch]'`, or get the safetensors weights"
    )


FILES = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", ModelError, "is a git-lfs pointer"),
    "old format": (pickle.dumps(0x1950A86A20F9469CFC6C, 2), UnsupportedError, "has the format before PyTorch 1.6"),
    "empty": (b"", ModelError, "truncated or damaged: not a PyTorch zip archive"),
    "a web page": (b"<!DOCTYPE html>", ModelError, "truncated or damaged: not a PyTorch zip archive"),
}


@pytest.mark.parametrize(("content", "kind", "message"), FILES.values(), ids=FILES)
def test_files_that_torch_never_sees(tmp_path, monkeypatch, content, kind, message):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(kind, match=message) as error:
        open_checkpoint(tmp_path, {})
    assert type(error.value) is kind and str(error.value).startswith(str(tmp_path / SINGLE))


def test_nothing_else_unpickles():
    """One call in the package loads pickles, and its ``weights_only`` is a literal; numpy's may hold none."""
    modules = ("torch", "pickle", "dill", "joblib", "marshal", "shelve", "np", "numpy")
    calls = [
        ast.unparse(node)
        for path in Path(nsds_gguf.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("load", "loads", "open", "Unpickler") and ast.unparse(node.func.value) in modules
    ]
    assert sorted(calls) == [
        "np.load(path, allow_pickle=False)",
        "np.load(path, allow_pickle=False)",
        "np.load(self._store.file_path(_stream(index, batch)), allow_pickle=False)",
        "np.load(self.path, mmap_mode='r', allow_pickle=False)",
        "pickle.loads(data, buffers=buffers)",  # what llama.cpp's process sends back
        "pickle.loads(needed)",  # what a cluster's client sends to its workers
        "pickle.loads(work)",
        "torch.load(file, map_location='cpu', weights_only=True, mmap=True)",
    ]
