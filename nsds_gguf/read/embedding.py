"""Embedding models of sentence-transformers: modules.json and the settings of its modules.

The modules run in sequence: ``Transformer`` is the model itself, ``Pooling`` reduces its tokens to one vector,
``Normalize`` scales that to length 1. The key ``pooling_type`` of a GGUF states the pooling (as written by llama.cpp's
converter); llama.cpp's programs normalize on their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, PoolingType
from gguf.gguf_writer import GGUFValue

from ..errors import ModelError, UnsupportedError
from ..records import kv

MODULES = "modules.json"
POOLING = "1_Pooling"

# Settings of 1_Pooling/config.json, old and new, and llama.cpp's pooling types.
_POOLINGS = {
    "pooling_mode_mean_tokens": PoolingType.MEAN,
    "pooling_mode_cls_token": PoolingType.CLS,
    "pooling_mode_lasttoken": PoolingType.LAST,
}
_MODES = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST}


@dataclass(frozen=True)
class Embedding:
    """Keys without the architecture's prefix, and notes; both empty for other models."""

    keys: Mapping[str, GGUFValue]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether the model is an embedding model."""
        return bool(self.keys)


def read_embedding(folder: Path, config: Mapping[str, Any]) -> Embedding:
    """Return the embedding settings of a folder.

    Raises:
        ModelError: modules.json or the settings of pooling are damaged or missing.
        UnsupportedError: a module or a pooling that llama.cpp does not support.

    """
    if (folder / MODULES).is_file():
        modules, source = _modules(folder), MODULES
    elif (folder / POOLING / "config.json").is_file():
        modules, source = [("Pooling", POOLING)], f"{POOLING}/config.json, without {MODULES}"
    else:
        return Embedding({})
    kinds = [kind for kind, _ in modules]
    if "Pooling" not in kinds:
        return Embedding({}, (f"{MODULES} has no pooling module: the file holds a language model.",))
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise UnsupportedError(
            f"{folder / MODULES}: module {unknown[0]} comes after the model, which llama.cpp does not compute: its "
            f"embeddings would differ; to convert the language model alone, remove {MODULES}"
        )
    pooling = _pooling(folder / dict(modules)["Pooling"] / "config.json")
    keys = {"pooling_type": kv(int(pooling), GGUFValueType.UINT32)}
    if source != MODULES:
        length = "no file states whether to normalize embeddings; llama-embedding and llama-server do by default"
    elif "Normalize" in kinds:
        length = "embeddings are normalized, as llama-embedding and llama-server do by default"
    else:
        length = "embeddings are not normalized: pass --embd-normalize -1 to llama.cpp's programs"
    note = f"An embedding model ({source}) with {pooling.name.lower()} pooling; {length}."
    causal, causal_notes = _attention(config)
    return Embedding({**keys, **causal}, (note, *causal_notes, *_prompts(folder)))


def _attention(config: Mapping[str, Any]) -> tuple[dict[str, GGUFValue], tuple[str, ...]]:
    """Return the key of bidirectional attention, and its note."""
    switches = (("is_causal", False), ("use_bidirectional_attention", True))
    active = [name for name, value in switches if config.get(name) is value]
    if not active:
        return {}, ()
    value = json.dumps(config[active[0]])
    note = f"config.json: {active[0]} {value}: attention is bidirectional (key attention.causal is false)."
    return {"attention.causal": kv(False, GGUFValueType.BOOL)}, (note,)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return kind and folder of each module."""
    found = _json(folder / MODULES)
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise ModelError(f"{folder / MODULES}: wanted a list of modules; download it again")
    return [(str(module.get("type", "")).rpartition(".")[2], _inside(folder, str(module.get("path", ""))))
            for module in found]  # fmt: skip


def _inside(folder: Path, name: str) -> str:
    """Return a module's folder; raise ``ModelError`` if it is outside the model's."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{folder / MODULES}: path {name!r} leads out of the folder; wanted one inside")
    return name


def _pooling(file: Path) -> PoolingType:
    settings = _json(file)
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: wanted the settings of pooling; download it again")
    asked = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    mode = settings.get("pooling_mode")
    if len(asked) == 1 and asked[0] in _POOLINGS:
        return _POOLINGS[asked[0]]
    if not asked and isinstance(mode, str) and mode in _MODES:
        return _MODES[mode]
    found = " and ".join(asked) or (f"pooling_mode {mode!r}" if mode is not None else "none")
    raise UnsupportedError(f"{file}: pooling is {found}; llama.cpp has one of mean, cls and last token")


def _prompts(folder: Path) -> tuple[str, ...]:
    """Return the note on prompts that sentence-transformers prepends to texts."""
    file = folder / "config_sentence_transformers.json"
    prompts = (_json(file) or {}).get("prompts") if file.is_file() else None
    used = {name: text for name, text in prompts.items() if text} if isinstance(prompts, dict) else {}
    if not used:
        return ()
    listed = "; ".join(f"{name}: {text!r}" for name, text in used.items())
    return (f"sentence-transformers prepends a prompt to a text; for llama.cpp, add it yourself ({listed}).",)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}; {MODULES} names it: download it again") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON: {error}; download it again") from error
