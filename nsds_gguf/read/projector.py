"""Open the vision part of a multimodal model folder: tensors, types and keys of llama.cpp's projector file (mmproj).

The table in ``architectures.projectors`` says where each tensor comes from. As for the language model, every wanted
tensor must exist in the shape that config.json states, and every tensor of the vision part must have a place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ..errors import ModelError, UnsupportedError
from ..llamacpp import ggml
from ..records import Projector, Tensor, kv
from ..records.transforms import SplitRows, TakeColumns
from ..system.filestate import file_states
from .architectures.classes import named_class
from .architectures.family import Config, Part, Sizes
from .architectures.projector_family import ProjectorFamily, positive, vision_keys
from .architectures.projectors import find_projector, projector_classes
from .card import card_keys
from .checkpoint import read_checkpoint
from .config import integer, read_config
from .folder import naming
from .mapping import tensor_of
from .missing import check_complete, check_no_adapter
from .names import Found, Layout, Wanted, without_wrappers
from .own_files import check_files
from .stored import StoredTensor, some
from .tokenizer.json_files import read_json

PROJECTOR_TYPES = ("F16", "Q8_0", "BF16", "F32")  # what llama.cpp's converter offers; the first is the default

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# F16 in a file of that type, else F32.
_CONVOLUTIONS = ("v.patch_embd.weight", "v.patch_embd.weight.1", "mm.patch_merger.weight")
_NO_BLOCKS = "F16"  # for rows that are not whole blocks

# Dimensions of every encoder, and the names of their settings.
_VISION_SIZES = {
    "embd": ("hidden_size",),
    "ff": ("intermediate_size",),
    "layers": ("num_hidden_layers", "depth"),
    "heads": ("num_attention_heads", "num_heads"),
    "channels": ("num_channels", "in_channels"),
    "image": ("image_size",),
    "patch": ("patch_size",),
}


def open_projector(path: Path, type_name: str = PROJECTOR_TYPES[0]) -> Projector:
    """Open the vision part of a model folder; reads no weights.

    Args:
        path: folder with ``config.json``, ``preprocessor_config.json`` and weights.
        type_name: type of the matrices, one of ``PROJECTOR_TYPES``.

    Raises:
        ModelError: files are missing, damaged or contradict one another.
        UnsupportedError: a GGUF, a class without a known projector, or settings that llama.cpp does not support.

    """
    folder = Path(os.path.realpath(path))
    if folder.is_file():
        raise UnsupportedError(f"{path}: is a file: the vision part is read from a model folder; drop --mmproj")
    check_files(folder)
    whole = read_config(folder, path)
    with naming(folder):
        family, config = read_settings(folder, whole)
        return _open(folder, whole, family, config, type_name)


def read_settings(folder: Path, whole: Mapping[str, Any]) -> tuple[ProjectorFamily, dict[str, Any]]:
    """Return the projector and its settings: config.json with defaults, ``vision``, ``text`` and ``image``."""
    source_class, _ = named_class(whole)
    vision = whole.get("vision_config")
    if not isinstance(vision, Mapping) and source_class not in projector_classes():
        raise UnsupportedError(f"config.json: {source_class} has no vision_config, so no projector; drop --mmproj")
    vision = vision if isinstance(vision, Mapping) else {}
    kind = vision.get("model_type")
    family = find_projector(source_class, kind if isinstance(kind, str) else None)
    stated = {key: value for key, value in vision.items() if value is not None}
    text = whole.get("text_config")
    config = {
        **family.defaults,
        **{key: value for key, value in whole.items() if value is not None},
        "vision": {**family.vision, **stated},
        "text": dict(text) if isinstance(text, Mapping) else dict(whole),
        "image": _image_settings(folder),
        "folder": folder,
    }
    return family, config


def _image_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor; those of processor_config.json take precedence, as in llama.cpp."""
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = read_json(folder / name)
        inner = settings.get("image_processor")
        found |= {**settings, **(inner if isinstance(inner, dict) else {})}
    if not found:
        raise ModelError(f"{folder}: preprocessor_config.json is missing; the projector needs it: download it")
    return found


def _open(
    folder: Path, whole: Mapping[str, Any], family: ProjectorFamily, config: dict[str, Any], type_name: str
) -> Projector:
    _check_settings(family, config)
    sizes = _sizes(family, config)
    checkpoint = read_checkpoint(folder, whole)
    check_no_adapter(folder, checkpoint.tensors)
    tensors = _tensors(checkpoint.tensors, family, config, sizes, checkpoint.notes)
    about, _ = card_keys(folder, whole, tensors)
    metadata: dict[str, GGUFValue] = {
        "general.architecture": kv("clip", GGUFValueType.STRING),
        "general.type": kv("mmproj", GGUFValueType.STRING),
        **about,
        "general.file_type": kv(int(ggml.TYPES[type_name].file_type), GGUFValueType.UINT32),
        "general.quantization_version": kv(_QUANTIZATION_VERSION, GGUFValueType.UINT32),
        family.kind_key: kv(family.kind, GGUFValueType.STRING),
        **vision_keys(config, sizes),
        **family.keys(config, sizes),
    }
    return Projector(
        path=folder,
        source_class=named_class(whole)[0],
        kind=family.kind,
        type=type_name,
        tensors=tuple(tensors),
        types={tensor.name: _type(tensor, family, type_name) for tensor in tensors},
        metadata=metadata,
        inputs=file_states(tensor.file for tensor in checkpoint.tensors.values()),
    )


def _sizes(family: ProjectorFamily, config: Config) -> dict[str, int]:
    """Return the size of every dimension that a ``Part`` names."""
    vision = config["vision"]
    text = config["text"] if config["text"].get("hidden_size") is not None else config
    sizes = {"text": integer(text, "hidden_size")}
    for size, names in _VISION_SIZES.items():
        key = next((name for name in names if name in vision), names[0])
        if key in vision:
            sizes[size] = positive(vision[key], f"config.json: vision_config.{key}")
    if family.token:
        sizes["token"] = _token_id(config["folder"], family.token)
    return {**sizes, **family.sizes(config, sizes)}


def _token_id(folder: Path, text: str) -> int:
    """Return the id of a special token; raise ``ModelError`` where the tokenizer has none of that text."""
    added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    by_id = added.items() if isinstance(added, dict) else ()
    listed = read_json(folder / "tokenizer.json").get("added_tokens")
    tokens = [*by_id, *((token.get("id"), token) for token in listed or () if isinstance(token, dict))]
    for number, token in tokens:
        if isinstance(token, dict) and token.get("content") == text and str(number).isdecimal():
            return int(number)
    raise ModelError(f"{folder}: the tokenizer has no token {text}, whose embedding the projector needs")


def _check_settings(family: ProjectorFamily, config: Config) -> None:
    """Raise ``UnsupportedError`` for a setting that llama.cpp does not implement for the projector."""
    activation = config["vision"].get("hidden_act", config["vision"].get("hidden_activation"))
    if activation not in family.activations:
        raise UnsupportedError(
            f"config.json: vision_config.hidden_act {activation!r} is not supported for {family.kind}; "
            f"known: {', '.join(family.activations)}"
        )
    for key, wanted in family.fixed.items():
        if config.get(key, wanted) not in (wanted, [wanted]):
            raise UnsupportedError(
                f"config.json: {key} {config[key]!r}: llama.cpp's projector {family.kind} supports {wanted!r} only"
            )


# --- tensors ------------------------------------------------------------------------------------------------------


def canonical_name(name: str) -> str:
    """Return a checkpoint name as the table has it; see ``architectures.projectors``."""
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name.removeprefix("model."))


def _tensors(
    checkpoint: Mapping[str, StoredTensor],
    family: ProjectorFamily,
    config: Config,
    sizes: Sizes,
    hints: tuple[str, ...],
) -> list[Tensor]:
    """Return the tensors in the order of the table; raise unless all are present and none is left over."""
    stored = {canonical_name(without_wrappers(name)): tensor for name, tensor in checkpoint.items()}
    places = tuple(_place(wanted, stored) for wanted in _wanted(family, config, sizes))
    check_complete(Found(_own(stored, family, places), Layout("", "", ""), places), hints)
    used = {name for _, names in places for name in names}
    ignored = family.ignored(config, sizes)
    left = [
        name
        for name in stored
        if name.startswith(family.roots) and name not in used and not any(re.fullmatch(p, name) for p in ignored)
    ]
    if left:
        raise UnsupportedError(
            f"tensors that llama.cpp's projector {family.kind}, as config.json describes it, has no place for: "
            f"{some(left)}"
        )
    tensors = [tensor_of(wanted, [stored[name] for name in names], sizes) for wanted, names in places]
    return [_folded(tensor, sizes) if tensor.role in family.unfolded else tensor for tensor in tensors]


def _folded(tensor: Tensor, sizes: Sizes) -> Tensor:
    """Return a convolution ``(n, colour, y, x)`` from rows of the pixels of a patch, ``(y, x, colour)``."""
    patch, colours = sizes["patch"], sizes["channels"]
    order = np.arange(patch * patch * colours, dtype=np.intp).reshape(patch, patch, colours).transpose(2, 0, 1).ravel()
    steps = (*tensor.transforms, TakeColumns(order), SplitRows(colours * patch, patch))
    return replace(tensor, shape=(tensor.shape[0], colours, patch, patch), transforms=steps)


def _own(
    stored: Mapping[str, StoredTensor], family: ProjectorFamily, places: tuple[tuple[Wanted, list[str]], ...]
) -> dict[str, StoredTensor]:
    """Return the tensors of the vision part, so that messages name no others."""
    used = {name for _, names in places for name in names}
    return {name: tensor for name, tensor in stored.items() if name in used or name.startswith(family.roots)}


def _wanted(family: ProjectorFamily, config: Config, sizes: Sizes) -> Iterator[Wanted]:
    """Yield every tensor that the vision part must have."""
    for i in range(sizes["layers"]):
        parts = {
            f"v.blk.{i}.{role}": part.within(family.layer_prefix.format(i=i)) for role, part in family.layer.items()
        }
        yield from _with_biases(parts, config)
    yield from _with_biases({**family.outside, **family.more(config)}, config)


def _with_biases(parts: Mapping[str, Part], config: Config) -> Iterator[Wanted]:
    for name, part in parts.items():
        if part.when(config):
            yield Wanted(name if part.bare else f"{name}.weight", name, None, part)
            if part.bias(config):
                yield Wanted(f"{name}.bias", f"{name}.bias", None, part, is_bias=True)


def _place(wanted: Wanted, stored: Mapping[str, StoredTensor]) -> tuple[Wanted, list[str]]:
    """Return the form in which the checkpoint stores a tensor, its first where it stores none, and the name."""
    forms = [(form, form.sources({})) for form in wanted.forms()]
    return next((place for place in forms if all(name in stored for name in place[1])), forms[0])


def _type(tensor: Tensor, family: ProjectorFamily, type_name: str) -> str:
    """Return the type of a tensor as llama.cpp's converter chooses it (``conversion/base.py``, ``prepare_tensors``)."""
    if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
        return "F32"
    if tensor.role in family.types:
        return family.types[tensor.role]
    if tensor.name in _CONVOLUTIONS:
        return "F16" if type_name == "F16" else "F32"
    if tensor.name == "v.position_embd.weight" or not tensor.name.endswith(".weight"):
        return "F32"
    return type_name if ggml.fits(type_name, tensor.n_cols) else _NO_BLOCKS
