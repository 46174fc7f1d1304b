"""The weights of a model folder, in one file or shards of any format, as one dict of tensors.

If a folder holds several sets of weights, transformers' order of preference decides (``modeling_utils``,
``_get_resolved_checkpoint_files``), and a note names the ignored files.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .foreign import foreign_folder
from .fp8 import with_scales
from .mxfp4 import with_mxfp4
from .quantization import read_quantization
from .safetensors import LFS_MARK, read_header
from .stored import StoredTensor, same_values, some
from .torch_bin import read_torch_file

FileReader = Callable[[Path], Mapping[str, StoredTensor]]

# Name of a single weight file, name of the index of shards, and reader of one file; the first match counts.
FORMATS: tuple[tuple[str, str, FileReader], ...] = (
    ("model.safetensors", "model.safetensors.index.json", read_header),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_file),
)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<ending>safetensors|bin)")

# Weight files and indexes; files that trainers keep beside them do not count.
_WEIGHTS = re.compile(r".+\.(safetensors|bin|pth|pt|ckpt|h5|msgpack)(\.index\.json)?")
_NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|spiece|sentencepiece).*|.*imatrix.*|adapter_.+"
)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by checkpoint name, in file order, and notes on their files."""

    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Chosen:
    """The chosen files, the reader of one file, the index that names them, and the reason if there was a choice."""

    files: tuple[Path, ...]
    read: FileReader
    index: Path | None = None
    reason: str = ""


def open_checkpoint(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder; see ``read_checkpoint``."""
    return read_checkpoint(folder, config).tensors


def read_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Read the headers of the weights: safetensors, else PyTorch; one file or several.

    Args:
        folder: model folder.
        config: the parsed config.json, with the settings of FP8 weights.

    Returns:
        The tensors, FP8 and MXFP4 weights combined with their scales. Tensors may have any dtype; reading their values
        fails for unsupported dtypes.

    Raises:
        ModelError: no weights, a missing shard, a git-lfs pointer, an index that leaves the folder, a header that
            is truncated, contradicts itself or another shard, FP8 weights without scales that fit, or PyTorch weights
            without torch.
        UnsupportedError: weights in an unsupported format or quantized by an unsupported method.

    """
    try:
        chosen = _choose(folder, config)
        tensors, notes = _open(chosen)
        tensors = with_mxfp4(tensors)
        fp8, quantization_notes = read_quantization(folder, config, tensors)
        found = with_scales(tensors, fp8)
        return Checkpoint(found, (*_aside(folder, chosen), *notes, *quantization_notes))
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


# --- which files ----------------------------------------------------------------------------------------------


def _choose(folder: Path, config: Mapping[str, Any]) -> _Chosen:
    """Return the files that transformers would load, else the only complete set under other names."""
    named = config.get("transformers_weights")  # transformers 5: name of the weight file
    if isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json")):
        file = folder / _in_folder(named, f"{folder / 'config.json'}: transformers_weights")
        if file.name.endswith(".json") and file.is_file():
            return _by_index(file, read_header)
        if file.is_file():
            return _Chosen((file,), read_header, reason="config.json names it in transformers_weights")
        raise ModelError(f"{file}: is missing; config.json names it in transformers_weights: download it")
    for single, index, read in FORMATS:
        if (folder / single).is_file():
            return _Chosen((folder / single,), read)
        if (folder / index).is_file():
            return _by_index(folder / index, read)
    return _other_names(folder)


def _by_index(index: Path, read: FileReader) -> _Chosen:
    files = tuple(index.parent / shard for shard in sorted(set(read_index(index).values())))
    lost = [file for file in files if not file.is_file()]
    if lost:
        others = [single for single, _, _ in FORMATS if (index.parent / single).is_file()]
        instead = f", or remove {index.name} to use {others[0]}" if others else ""
        raise ModelError(f"{lost[0]}: shard is missing; {index.name} names it: download it{instead}")
    return _Chosen(files, read, index)


def _other_names(folder: Path) -> _Chosen:
    """Return the only set of weights under names that transformers does not search for."""
    readers = {"safetensors": read_header, "bin": FORMATS[1][2]}
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not _NO_WEIGHTS.fullmatch(path.name)]
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            sets.setdefault(match.group("stem", "count", "ending"), []).append(name)
    whole = [(key, shards) for key, shards in sets.items() if len(shards) == int(key[1])]
    if len(whole) == 1:
        (_, count, ending), shards = whole[0]
        files = tuple(folder / shard for shard in shards)
        return _Chosen(files, readers[ending], reason=f"all {int(count)} shards are present, but no index")
    alone = [name for name in names if name.endswith(".safetensors") and not _SHARD.fullmatch(name)]
    if not whole and len(alone) == 1:
        reason = "the folder holds no model.safetensors and no other weights"
        return _Chosen((folder / alone[0],), read_header, reason=reason)
    raise foreign_folder(folder)


def _aside(folder: Path, chosen: _Chosen) -> list[str]:
    """Return the note on ignored weight files, and the reason for the choice."""
    read = {file.name for file in chosen.files} | ({chosen.index.name} if chosen.index else set())
    ignored = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in read and _WEIGHTS.fullmatch(path.name) and not _NO_WEIGHTS.fullmatch(path.name)
    ]
    first = chosen.files[0].name if chosen.files else ""
    what = chosen.index.name if chosen.index else first
    if not chosen.index and len(chosen.files) > 1:
        what = f"{first} … {chosen.files[-1].name}"
    files = "1 file is" if len(ignored) == 1 else f"{len(ignored)} files are"
    rest = f"; {files} ignored: {some(ignored)}" if ignored else ""
    if chosen.reason:
        return [f"Weights are read from {what}: {chosen.reason}{rest}."]
    return [f"Weights are read from {what}, as transformers would{rest}."] if ignored else []


# --- their contents ------------------------------------------------------------------------------------------


def _open(chosen: _Chosen) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of all files and notes on a wrong index; raise for a name with different tensors."""
    tensors: dict[str, StoredTensor] = {}
    for file in chosen.files:
        for name, tensor in chosen.read(file).items():
            first = tensors.setdefault(name, tensor)
            if first is not tensor and not _is_same(first, tensor):
                raise ModelError(
                    f"{file}: holds tensor {name}, and {first.file.name} a different one of that name: the shards come "
                    "from different saves; download them again"
                )
    return tensors, _index_notes(chosen.index, tensors) if chosen.index else []


def _is_same(first: StoredTensor, second: StoredTensor) -> bool:
    return first.dtype == second.dtype and same_values(first, second)


def _index_notes(index: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return notes on tensors that are not where the index says; transformers also goes by the shards."""
    places = read_index(index)
    wrong = [name for name, tensor in tensors.items() if places.get(name) != tensor.file.name]
    lost = [name for name in places if name not in tensors]
    notes = []
    if wrong:
        notes.append(f"{index.name} is wrong about {len(wrong)} tensors ({some(wrong)}): the shards count.")
    if lost:
        notes.append(f"{index.name} names {len(lost)} tensors that are in no shard: {some(lost)}.")
    return notes


def read_index(index: Path) -> dict[str, str]:
    """Return the shard of every tensor; raise ``ModelError`` for a damaged index or one that leaves its folder."""
    raw = index.read_bytes()
    if raw.startswith(LFS_MARK):
        raise ModelError(f"{index}: is a git-lfs pointer: run `git lfs pull` in {index.parent}")
    try:
        items = dict(json.loads(raw)["weight_map"].items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: damaged: wanted JSON with a weight_map: {error}: download it again") from error
    return {name: _in_folder(shard, f"{index}: places tensor {name} in") for name, shard in items.items()}


def _in_folder(name: Any, where: str) -> str:
    """Return a valid file name; raise ``ModelError`` if it is not one or leaves the folder."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise ModelError(f"{where} {reprlib.repr(name)}; wanted the name of a file in the same folder")
    return name
