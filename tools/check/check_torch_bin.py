"""Check the reader of PyTorch's ``.bin`` files against torch itself, and FP8 against torch's own float8.

    python tools/check/check_torch_bin.py

Needs torch (``pip install 'nsds-gguf[torch]'``); takes seconds and leaves nothing. Files are written by ``torch.save``:
every dtype, views that are not contiguous, shared storage, shards, the old format, damaged files, and a pickle that
would run a command.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsds_gguf.errors import ModelError
from nsds_gguf.read.checkpoint import open_checkpoint
from nsds_gguf.read.stored import StoredTensor

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BLOCK = (2, 3)
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}


class Command:
    """Pickled, a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every readable dtype, in every layout that a checkpoint may have."""
    generator = torch.Generator().manual_seed(0)
    f32 = torch.randn(6, 8, generator=generator)
    stack = torch.randn(3, 4, 5, generator=generator)
    return {
        "f32": f32,
        "f16": f32.to(torch.float16),
        "bf16": f32.to(torch.bfloat16),
        "shared": f32,
        "part of a storage": f32[2:4],
        "every other column": f32[:, ::2],
        "transposed": f32.T,
        "transposed bf16": f32.to(torch.bfloat16).T,
        "stack": stack,
        "permuted stack": stack.permute(2, 0, 1),
        "expanded": f32[:1].expand(5, 8),
        "vector": f32[0],
        "column": f32[:, 0],
        "number": f32[0, 0],
        "parameter": torch.nn.Parameter(f32.clone()),
    }


def check_tensor(stored: StoredTensor, tensor: torch.Tensor) -> None:
    """Compare shape, rows, columns, a pickled copy and the first bytes; raises ``SystemExit`` on a difference."""
    wanted = tensor.detach().float().reshape(stored.n_rows, stored.n_cols).numpy()
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    order = np.random.default_rng(0).permutation(stored.n_rows)
    same = (
        stored.shape == tuple(tensor.shape)
        and np.array_equal(stored.rows(slice(0, stored.n_rows)), wanted)
        and np.array_equal(stored.rows(order), wanted[order])
        and np.array_equal(stored.values(slice(None), slice(1, 3)), wanted[:, 1:3])
        and stored.first_bytes(7) == raw[:7]
        and stored.first_bytes(1 << 20) == raw
    )
    if not same:
        raise SystemExit(f"{stored.name}: differs from torch")
    if not np.array_equal(pickle.loads(pickle.dumps(stored)).rows(slice(None)), wanted):
        raise SystemExit(f"{stored.name}: pickled, it differs")
    stored.rows(slice(0, 1))[:] = 0  # fresh: neither the file nor the mapping changes
    if not np.array_equal(stored.rows(slice(0, stored.n_rows)), wanted):
        raise SystemExit(f"{stored.name}: what rows returns is not a copy")


def check_single(folder: Path) -> None:
    masks = {"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool), "ids": torch.arange(4), "f64": torch.ones(2).double()}
    torch.save({**tensors(), **masks}, folder / SINGLE)
    found = open_checkpoint(folder, {})
    if list(found) != [*tensors(), *masks]:
        raise SystemExit(f"wanted {list(tensors())}, got {list(found)}")
    for name, tensor in tensors().items():
        check_tensor(found[name], tensor)
    for name in masks:
        refused(lambda name=name: found[name].rows(slice(0, 1)), f"tensor {name}: stored as")
        found[name].first_bytes(10)


def check_shards(folder: Path) -> None:
    shards = {"pytorch_model-00001-of-00002.bin": {"a": torch.ones(2, 2)},
              "pytorch_model-00002-of-00002.bin": {"b": torch.zeros(2, 2)}}  # fmt: skip
    for shard, content in shards.items():
        torch.save(content, folder / shard)
    places = {name: shard for shard, content in shards.items() for name in content}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    found = open_checkpoint(folder, {})
    for content in shards.values():
        for name, tensor in content.items():
            check_tensor(found[name], tensor)


def check_fp8(folder: Path) -> None:
    """Every code, with a scale for each ragged block, as llama.cpp's dequant_simple multiplies them."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 127) != 127].view(torch.float8_e4m3fn).reshape(2, 127)
    scales = torch.rand(1, 43, generator=torch.Generator().manual_seed(1)) * 1e-3
    torch.save({"w": finite, "w_scale_inv": scales}, folder / SINGLE)
    grid = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:2, :127]
    wanted = (finite.float() * grid).numpy()
    found = open_checkpoint(folder, FP8_CONFIG)["w"].rows(slice(0, 2))
    if not np.array_equal(found, wanted):
        raise SystemExit("FP8: differs from torch")
    exponents = torch.arange(1, 255, dtype=torch.uint8).reshape(1, 254)
    torch.save({"e": exponents.view(torch.float8_e8m0fnu)}, folder / SINGLE)
    if not np.array_equal(open_checkpoint(folder, {})["e"].rows(slice(0, 1)), exponents_of(exponents)):
        raise SystemExit("E8M0: differs from torch")


def exponents_of(exponents: torch.Tensor) -> Any:
    return exponents.view(torch.float8_e8m0fnu).float().numpy()


def check_refusals(folder: Path) -> None:
    """Nothing but tensors is read, and a pickle that runs a command does not run it."""
    file, trace = folder / SINGLE, folder / "executed"
    torch.save({"a": torch.ones(2), "b": Command(f"touch {trace}")}, file)
    refused(lambda: open_checkpoint(folder, {}), "names posix.system, which is no tensor and could run any code")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Command(f"touch {trace}")))
        archive.writestr("archive/version", "3\n")
    refused(lambda: open_checkpoint(folder, {}), "refused; get the safetensors weights")
    file.write_bytes(pickle.dumps(Command(f"touch {trace}"), protocol=2))
    refused(lambda: open_checkpoint(folder, {}), "format of PyTorch before 1.6")
    if trace.exists():
        raise SystemExit("a pickle was executed")
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    refused(lambda: open_checkpoint(folder, {}), "format of PyTorch before 1.6")
    for content, message in (
        ([torch.ones(2)], "wanted tensors by name, got list"),
        ({"a": 1}, "'a': wanted a tensor with a name, got int"),
        ({1: torch.ones(2)}, "1: wanted a tensor with a name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "tensor a: wanted a plain tensor, got torch.sparse_coo"),
        ({"a": torch.ones(2, 2, device="meta")}, "tensor a: wanted a plain tensor"),
    ):
        torch.save(content, file)
        refused(lambda: open_checkpoint(folder, {}), message)


def check_damage(folder: Path) -> None:
    """Cut a file off or change it anywhere: one error, or other numbers where those alone were changed."""
    torch.save({"a": torch.randn(8, 8), "b": torch.ones(3)}, folder / SINGLE)
    good, rng = (folder / SINGLE).read_bytes(), np.random.default_rng(0)
    n_refused = 0
    for i in range(300):
        content = bytearray(good)
        if i % 3:
            content[int(rng.integers(len(good)))] = int(rng.integers(256))
        else:
            del content[int(rng.integers(len(good))) :]
        (folder / SINGLE).write_bytes(content)
        try:
            for tensor in open_checkpoint(folder, {}).values():
                tensor.rows(slice(0, 1))
        except ModelError:
            n_refused += 1
    if n_refused < 100:
        raise SystemExit(f"only {n_refused} of 300 damaged files were refused")


def refused(work: Callable[[], object], message: str) -> None:
    try:
        work()
    except ModelError as error:
        if message not in str(error):
            raise SystemExit(f"wanted {message!r} in the error, got: {error}") from error
        return
    raise SystemExit(f"nothing was refused; wanted: {message}")


def main() -> int:
    warnings.simplefilter("error")
    for check in (check_single, check_shards, check_fp8, check_refusals, check_damage):
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
        print(f"{check.__name__.removeprefix('check_')}: as torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
