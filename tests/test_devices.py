"""Devices that are not here: choices, refusals, and what reaches llama.cpp. tools/check/check_torch.py runs PyTorch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import TINY, call
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny

from nsds_gguf import read
from nsds_gguf.compute import BACKENDS
from nsds_gguf.compute.backend import BackendEntry
from nsds_gguf.compute.numpy_backend import open_numpy
from nsds_gguf.compute.torch_device import missing_cuda, missing_torch
from nsds_gguf.errors import PlanError
from nsds_gguf.llamacpp import llama
from nsds_gguf.llamacpp.binding import Engine, _Context
from nsds_gguf.records import Model, Options
from nsds_gguf.session import device
from nsds_gguf.session.settle import settle

OPEN = Options(target_bpw=4)
INSTALL = "PyTorch is not installed; run: pip install 'nsds-gguf[torch]'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", replace(TINY, n_layers=1))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return read.open_model(folder)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as ``auto`` looks; it computes by numpy."""
    monkeypatch.setitem(BACKENDS, "cuda", BackendEntry("cuda", "on a GPU", lambda: "", open_numpy))
    monkeypatch.setattr(device, "lacks_device_memory", lambda n_bytes: "" if n_bytes < 2**32 else "4.0 GiB")


@pytest.mark.usefixtures("no_torch")
def test_without_torch(model: Model) -> None:
    assert missing_torch() == missing_cuda() == INSTALL
    settled = settle(OPEN, model)
    assert settled.recipe.device == "cpu" and not any("GPU" in note for note in settled.notes)
    for name in ("cuda", "torch-cpu"):
        with pytest.raises(PlanError) as caught:
            settle(replace(OPEN, device=name), model)
        assert str(caught.value) == f"device {name} cannot run here: {INSTALL}"


@pytest.mark.usefixtures("no_torch")
def test_the_command_says_what_is_missing(folder: Path) -> None:
    outcome = call("plan", folder, "--target-bpw", 6, "--device", "cuda")
    assert outcome.code == PlanError.exit_code and outcome.err == f"error: device cuda cannot run here: {INSTALL}\n"


@pytest.mark.usefixtures("gpu")
def test_auto_takes_a_gpu_with_room(model: Model) -> None:
    assert settle(OPEN, model).recipe.device == "cuda"
    assert settle(replace(OPEN, device="cpu"), model).recipe.device == "cpu"


@pytest.mark.usefixtures("gpu")
def test_auto_leaves_a_gpu_without_room(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_bytes", lambda _: 2**32)
    settled = settle(OPEN, model)
    assert settled.recipe.device == "cpu"
    assert f"The GPU is not used: {model.name} needs 4.0 GiB; --device cuda tries anyway." in settled.notes
    assert settle(replace(OPEN, device="cuda"), model).recipe.device == "cuda"


def test_the_largest_hessian_counts(model: Model) -> None:
    largest = max(tensor.n_cols for tensor in model.tensors)
    assert device.device_bytes(model) >= 32 * largest**2


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, nsds_gguf.cli, nsds_gguf.conversion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Layers of llama.cpp


def test_layers_for_a_gpu_that_llama_cpp_lacks(tmp_path: Path) -> None:
    if llama.llama_process().call("llama.cpp", "supports_gpu"):
        pytest.skip("this build of llama.cpp has a GPU backend")
    outcome = call("perplexity", write_tiny_gguf(tmp_path / "a.gguf"), "--gpu-layers", 3)
    assert outcome.code == PlanError.exit_code
    assert outcome.err.startswith("error: --gpu-layers 3: this build of llama.cpp has no GPU backend, or finds no GPU;")


def test_layers_go_to_every_model_while_the_context_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    process = llama.llama_process()

    class Recorder:
        is_alive = True

        def call(self, what: str, method: str, *arguments: Any) -> Any:
            asked.append((method, arguments[-1] if method == "load" else None))
            return True if method == "supports_gpu" else process.call(what, method, *arguments)

    monkeypatch.setattr(llama, "llama_process", Recorder)
    path = write_tiny_gguf(tmp_path / "a.gguf")
    with llama.gpu_layers(5):
        assert llama.llama_build().endswith("; 5 layers on the GPU")
        with llama.open_model(path):
            pass
    with llama.open_model(path):
        pass
    assert [number for method, number in asked if method == "load"] == [5, 0]
    assert "GPU" not in llama.llama_build().split("; ")[-1]


class Binding:
    """llama.cpp's binding, as far as loading and contexts go; it keeps what it is given."""

    def __init__(self) -> None:
        self.model, self.context = SimpleNamespace(), SimpleNamespace(n_threads_batch=0)

    def llama_model_default_params(self) -> Any:
        return self.model

    def llama_context_default_params(self) -> Any:
        return self.context

    def llama_init_from_model(self, pointer: Any, params: Any) -> Any:
        return "context"

    def llama_model_load_from_file(self, path: bytes, params: Any) -> Any:
        return "model"

    def llama_print_system_info(self) -> bytes:
        return b""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1


@pytest.mark.parametrize(("n_layers", "uses_gpu"), [(0, False), (7, True)])
def test_llama_cpp_is_told(n_layers: int, uses_gpu: bool) -> None:
    """With 0, no large product goes to a GPU either (``op_offload``), nor the KV cache."""
    engine, binding = Engine(), Binding()
    engine._binding = binding
    facts = engine.load(Path("a.gguf"), "/a.gguf", False, n_layers)
    assert binding.model.n_gpu_layers == n_layers
    options = SimpleNamespace(n_ctx=8, n_seq=1, n_batch=8, n_threads=1, exact=False, observer=None, n_blas_threads=1)
    _Context(engine, engine._models[facts.number], options, None)  # type: ignore[arg-type]
    assert (binding.context.offload_kqv, binding.context.op_offload) == (uses_gpu, uses_gpu)
