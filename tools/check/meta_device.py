"""Run PyTorch's parts of a conversion on the meta device, which computes shapes and refuses operands of another device.

So a tensor that stays on the CPU by mistake shows where there is no GPU. What needs values is replaced: arrays that
come back are zeros, choices of experts are arbitrary. The patches stay: run it in a separate process.

    python tools/check/meta_device.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the makers of the very models that the tests use

from zoo_specs import write_spec

from nsds_gguf.calibration.hessians import multiplied
from nsds_gguf.compute import torch_backend
from nsds_gguf.compute.input_moments import Recording
from nsds_gguf.compute.torch_tape import TorchTape
from nsds_gguf.quantize import gptq_torch
from nsds_gguf.quantize.formats import FORMATS
from nsds_gguf.read import open_model

# Dense, experts with and without a shared one, softcapping, layer norms with biases, parallel blocks.
NAMES = ["llama", "mixtral", "qwen2moe", "gemma2", "gpt2", "phi-2", "gpt-neox", "olmo2"]
_N_ROWS, _N_POSITIONS = 32, 16
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}


def main() -> int:
    """Run the command line."""
    _check_that_devices_are_told_apart()
    _replace_what_needs_values()
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
            model = open_model(write_spec(Path(folder) / name, name))
            run_passes(torch_backend.TorchBackend("meta", model, _N_POSITIONS, pool))
        print(f"{name}: both passes stay on their device")
    factors = gptq_torch.DeviceFactors(torch.eye(512, device="meta"), torch.ones(512, device="meta"))
    for type_name in FORMATS:
        gptq_torch.round_columns(torch.zeros(512, _N_ROWS, device="meta"), type_name, factors, 1)
        print(f"{type_name}: rounding stays on its device")
    return 0


def run_passes(backend: torch_backend.TorchBackend) -> None:
    """Run the first layer and the output forward and backward, with every sum."""
    model = backend.model
    stream = np.zeros((_N_ROWS, model.hparams.n_embd), np.float32)
    layer = backend.layer(0, Recording(frozenset(multiplied(model)), column_squares=True))
    layer.forward(stream)
    list(layer.hessians()), layer.input_sums(), layer.column_squares()
    layer.backward(stream, stream)
    output = backend.output(Recording())
    output.forward(stream)
    output.backward(stream, np.arange(8, 16), 0)


def _check_that_devices_are_told_apart() -> None:
    try:
        torch.zeros(1) + torch.zeros(2, device="meta")
    except RuntimeError:
        return
    raise SystemExit("this PyTorch adds tensors of the meta device to those of the CPU, so this check shows nothing")


def _replace_what_needs_values() -> None:
    def chosen(self: TorchTape, scores: Any, bias: Any, n_chosen: int) -> Any:
        shape = scores.value.shape if bias is None else (scores.value + self.vector(bias)).shape
        generator = np.random.default_rng(0)
        return np.array([generator.permutation(shape[1])[:n_chosen] for _ in range(shape[0])])

    patches: list[tuple[Any, str, Any]] = [
        (torch_backend, "_array", lambda tensor: np.zeros(tuple(tensor.shape), _DTYPES[tensor.dtype])),
        (torch_backend, "float", lambda _: 0.0),
        (torch_backend, "free_device_bytes", lambda: 2**40),
        (torch_backend, "is_finite", lambda _: True),
        (TorchTape, "chosen", chosen),
        (torch, "equal", lambda *_: True),
        (gptq_torch._Columns, "blocks", lambda _: None),
        (gptq_torch, "joined", lambda _: None),
    ]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)


if __name__ == "__main__":
    sys.exit(main())
