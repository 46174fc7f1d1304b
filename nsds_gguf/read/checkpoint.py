"""The weights of a model folder: one file or shards with an index, of whatever format, become one dict of tensors."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError
from .fp8 import with_scales
from .quantization import read_quantization
from .safetensors import LFS_MARK, read_header
from .stored import StoredTensor
from .torch_bin import read_torch_file

FileReader = Callable[[Path], Mapping[str, StoredTensor]]

# The name of all weights in one file, the name of the index of several, and who reads one: the first found is taken.
FORMATS: tuple[tuple[str, str, FileReader], ...] = (
    ("model.safetensors", "model.safetensors.index.json", read_header),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_file),
)


def open_checkpoint(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Read the headers of the weights: safetensors or, where there are none, PyTorch's; one file or several.

    Args:
        folder: model folder.
        config: the parsed config.json; says how the weights are quantized, if they are.

    Returns:
        The tensors by checkpoint name, in file order; FP8 weights are joined to their scales, which do not show. Any
        dtype may be among them; those that are not read fail when they are asked for their values.

    Raises:
        ModelError: no weights, a missing shard, a git-lfs pointer, an index that leaves the folder, a header that
            is truncated, contradicts itself or the index, FP8 weights without scales that fit, or PyTorch weights
            without torch.
        UnsupportedError: weights in a format that is not read, or quantized by a method that is not known.

    """
    fp8 = read_quantization(folder, config)
    try:
        return with_scales(_open_files(folder), fp8)
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


def _open_files(folder: Path) -> dict[str, StoredTensor]:
    """Open the first format of ``FORMATS`` that is there, its index before its single file."""
    for single, index, read in FORMATS:
        if (folder / index).is_file():
            return _open_shards(folder / index, read)
        if (folder / single).is_file():
            return dict(read(folder / single))
    raise _no_weights(folder)


def _open_shards(index: Path, read: FileReader) -> dict[str, StoredTensor]:
    weight_map = read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not file.is_file():
            raise ModelError(f"{file}: shard is missing; {index.name} names it: download it")
        for name, tensor in read(file).items():
            if weight_map.get(name) != shard:
                where = weight_map.get(name, "no shard")
                raise ModelError(f"{file}: holds tensor {name}, but {index.name} places it in {where}")
            tensors[name] = tensor
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ModelError(f"{index}: names {len(lost)} tensors that are in no shard, first {lost[0]}")
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Return the shard of every tensor; raises ``ModelError`` for a damaged index or one that leaves its folder."""
    raw = index.read_bytes()
    if raw.startswith(LFS_MARK):
        raise ModelError(f"{index}: is a git-lfs pointer: run `git lfs pull` in {index.parent}")
    try:
        items = dict(json.loads(raw)["weight_map"].items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: damaged: wanted JSON with a weight_map: {error}: download it again") from error
    for name, shard in items.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise ModelError(
                f"{index}: places tensor {name} in {reprlib.repr(shard)}; wanted the name of a file in the same folder"
            )
    return items


def _no_weights(folder: Path) -> ModelError:
    if any(folder.glob("adapter_model.*")):
        return UnsupportedError(
            f"{folder}: holds an adapter, not a model: merge it into its base model (peft, merge_and_unload) first"
        )
    names = sorted(path.name for path in folder.iterdir())
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return UnsupportedError(f"{folder}: holds no safetensors: to convert {gguf[0]}, pass {folder / gguf[0]}")
    links = [path for path in sorted(folder.glob("*.safetensors")) if path.is_symlink() and not path.exists()]
    if links:
        return ModelError(f"{links[0]}: link to a file that is missing: download it again")
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return ModelError(f"{folder}: holds {shards[0]} but no model.safetensors.index.json: download the index")
    other = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".h5", ".msgpack", ".onnx"))]
    if other:
        return UnsupportedError(f"{folder}: holds {other[0]} but no model.safetensors: get the safetensors weights")
    return ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it")
