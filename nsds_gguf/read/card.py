"""Descriptive keys of a model folder: name, author, licence, base model, sampling defaults.

gguf finds these facts and splits a name into its parts. This module converts them to the types of GGUF keys: the front
matter of a README is written by hand and may hold anything.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from gguf import GGUFValueType, GGUFWriter, Metadata, size_label
from gguf.gguf_writer import GGUFValue

from ..records import Tensor, kv
from .tokenizer.json_files import read_json

# A model name as on the Hub, with or without owner; not a local path.
_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_PLACE = re.compile(
    r"(checkpoint|ckpt|step|epoch|outputs?|results?|models?|runs?|saves?|tmp|data|home|mnt|root|workspace|content)([-_]?\d+)?"
    r"|[a-z]:?",
    re.IGNORECASE,
)


def _is_name(text: Any) -> bool:
    """Return whether a text is the name of a model, not a local path from training."""
    return isinstance(text, str) and bool(_NAME.fullmatch(text)) and not any(map(_PLACE.fullmatch, text.split("/")))


def card_keys(
    folder: Path, config: Mapping[str, Any], tensors: Sequence[Tensor]
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return the ``general.*`` keys that describe the model, and a note if the README cannot be read.

    Args:
        folder: model folder; its name is the default name of the model.
        config: the parsed config.json.
        tensors: of the model, for the size label.

    Raises:
        ModelError: generation_config.json is damaged.

    """
    notes: list[str] = []
    n_weights = sum(tensor.n_weights for tensor in tensors)
    name = config.get("_name_or_path")
    named = {"_name_or_path": name} if _is_name(name) else {}
    card = _front_matter(folder, notes)
    found = Metadata.apply_metadata_heuristic(Metadata(), card, named, _called(folder), n_weights)
    for key, value in read_json(folder / "generation_config.json").items():
        field = "sampling_temp" if key == "temperature" else f"sampling_{key}"
        if hasattr(found, field):
            setattr(found, field, value)
    writer = GGUFWriter(None, "")  # its empty architecture is dropped like all empty values
    found.set_gguf_meta_model(writer)
    keys = {key: fitted for key, value in writer.kv_data[0].items() if (fitted := _fitted(value)) is not None}
    keys.setdefault("general.name", kv(_called(folder).name, GGUFValueType.STRING))
    keys.setdefault("general.size_label", kv(_size_label(tensors), GGUFValueType.STRING))
    return keys, notes


def _size_label(tensors: Sequence[Tensor]) -> str:
    """Return ``1.1B``, or ``8x7B`` for a mixture of experts, by gguf's rule."""
    experts = [tensor for tensor in tensors if tensor.role.endswith("_exps")]
    n_all, n_stacked = (sum(tensor.n_weights for tensor in group) for group in (tensors, experts))
    if not experts:
        return str(size_label(n_all, n_all, 0, 0))
    n_experts = sum(tensor.shape[0] for tensor in experts) // len(experts)
    return str(size_label(n_all, n_all - n_stacked, n_stacked // n_experts, n_experts))


def _called(folder: Path) -> Path:
    """Return the folder, renamed to its model: the Hub's cache uses ``models--ORG--NAME/snapshots/COMMIT``."""
    owner = folder.parent.parent.name
    if folder.parent.name == "snapshots" and owner.startswith("models--"):
        return folder.with_name(owner.rpartition("--")[2])
    return folder


def _front_matter(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        card = dict(Metadata.load_model_card(folder))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        notes.append(f"README.md: its front matter is left out (licence, base model): {reason}")
        return {}
    if isinstance(card.get("license"), list):
        card["license"] = ",".join(filter(None, map(_text, card["license"])))
    for key in ("base_model", "base_models", "base_model_sources"):
        if key in card:
            listed = card[key] if isinstance(card[key], list) else [card[key]]
            card[key] = [base for base in listed if not _is_path(base)] or None
    return {key: value for key, value in card.items() if value is not None}


def _is_path(base: Any) -> bool:
    """Return whether a base model is a local path on the author's machine."""
    return isinstance(base, str) and not _is_name(base) and not base.startswith(("http://", "https://"))


def _fitted(entry: GGUFValue) -> GGUFValue | None:
    """Convert the value of an entry to the type of its key; ``None`` if that is impossible."""
    fitted: Any
    if entry.type == GGUFValueType.ARRAY:
        fitted = [text for text in map(_text, entry.value) if text] or None
    elif entry.type == GGUFValueType.STRING:
        fitted = _text(entry.value) or None
    else:
        numbers = int | float if entry.type == GGUFValueType.FLOAT32 else int
        fits = isinstance(entry.value, numbers) and not isinstance(entry.value, bool)
        fitted = entry.value if fits else None
    return None if fitted is None else kv(fitted, entry.type, entry.sub_type)


def _text(value: Any) -> str | None:
    """Return a scalar of YAML as text; ``None`` for anything else."""
    is_scalar = isinstance(value, str | int | float | datetime.date) and not isinstance(value, bool)
    return str(value) if is_scalar else None
