"""Identify folders without supported weights, and suggest the next step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError

# Weights of other programs: file extension, description, next step.
_OTHER_FORMATS = (
    (".nemo", "a NeMo archive", "convert it to Hugging Face's format with NeMo's export scripts"),
    (".onnx", "an ONNX model", "get the safetensors weights"),
    (".xml", "an OpenVINO model", "get the safetensors weights"),
    (".tflite", "a TensorFlow Lite model", "get the safetensors weights"),
    (".h5", "TensorFlow weights", "load them with transformers 4 (from_tf=True) and save_pretrained, or get the "
     "safetensors weights"),
    (".msgpack", "Flax weights", "load them with transformers 4 (from_flax=True) and save_pretrained, or get the "
     "safetensors weights"),
    (".pth", "PyTorch weights of another program", "get the safetensors weights"),
    (".pt", "PyTorch weights of another program", "get the safetensors weights"),
    (".bin", "other PyTorch weights", "get the safetensors weights"),
)  # fmt: skip

_CHECKPOINT = re.compile(r"(checkpoint|epoch|step|iter)[-_]?(\d+)")


def foreign_folder(folder: Path) -> ModelError:
    """Return the error for a folder without supported weights: what it is, and what to do."""
    found = describe(folder)
    if found is not None:
        return UnsupportedError(f"{folder}: {found}")
    names = _names(folder)
    links = [path for path in sorted(folder.glob("*.safetensors")) if path.is_symlink() and not path.exists()]
    if links:
        return ModelError(f"{links[0]}: link to a file that is missing: download it again")
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        more = f" (and {len(shards) - 1} more)" if len(shards) > 1 else ""
        return ModelError(
            f"{folder}: holds {shards[0]}{more} but no model.safetensors.index.json to say which belong together: "
            "download the index and all shards"
        )
    for ending, what, help_ in _OTHER_FORMATS:
        other = [name for name in names if name.endswith(ending) and not name.startswith("training_args")]
        if other:
            return UnsupportedError(f"{folder}: holds {other[0]} but no model.safetensors: {what}: {help_}")
    return ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it")


def describe(folder: Path) -> str | None:
    """Return what a folder is instead of a model, and what to do; ``None`` if unknown."""
    return next((found for look in _LOOKS if (found := look(folder)) is not None), None)


def _ggufs(folder: Path) -> str | None:
    names = [name for name in _names(folder) if name.endswith(".gguf")]
    return f"holds no safetensors: to convert {names[0]}, pass {folder / names[0]}" if names else None


def _adapter(folder: Path) -> str | None:
    names = _names(folder)
    if not any(name.startswith("adapter_model.") for name in names) and "adapter_config.json" not in names:
        return None
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return f"holds an adapter{of}, not a model: merge it into its base model: {merge_step(folder)}"


def merge_step(folder: Path) -> str:
    """Return the step to merge an adapter, as one line of Python."""
    return (
        f"`AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(OUT)` with "
        "peft, then convert OUT"
    )


def _diffusers(folder: Path) -> str | None:
    if not (folder / "model_index.json").is_file():
        return None
    return f"is a diffusers pipeline, not a language model{_pass(_models_below(folder))}"


def _deepspeed(folder: Path) -> str | None:
    steps = [name for name in _folders(folder) if name.startswith("global_step")]
    shards = [name for name in _names(folder) if name.startswith(("zero_pp_rank_", "mp_rank_"))]
    if not steps and not shards:
        return None
    place = folder if steps else folder.parent
    return (
        f"holds a training checkpoint of DeepSpeed ({(steps or shards)[0]}): gather its weights first: "
        f"`python zero_to_fp32.py {place} OUT`, then convert OUT"
    )


def _distributed(folder: Path) -> str | None:
    names = _names(folder)
    inner = [name for name in _folders(folder) if (folder / name / ".metadata").is_file()]
    if any(name.endswith(".distcp") for name in names) or ".metadata" in names:
        place = folder
    elif inner:
        place = folder / inner[0]
    else:
        return None
    return (
        f"holds a distributed training checkpoint (FSDP, {place.name}): merge it first: "
        f"`accelerate merge-weights {place} OUT`, copy config.json and the tokenizer to OUT, then convert OUT"
    )


def _sentence_transformers(folder: Path) -> str | None:
    if not (folder / "modules.json").is_file():
        return None
    models = _models_below(folder)
    return f"is a sentence-transformers model with its weights in a subfolder{_pass(models)}" if models else None


def _hub_cache(folder: Path) -> str | None:
    snapshots = [path for path in sorted((folder / "snapshots").glob("*")) if path.is_dir()]
    return f"is a folder of the Hub cache: pass {snapshots[-1]}" if snapshots else None


def _checkpoints(folder: Path) -> str | None:
    found = [(int(match[2]), name) for name in _folders(folder) if (match := _CHECKPOINT.fullmatch(name))]
    if not found:
        return None
    latest = max(found)[1]
    many = f"{len(found)} training checkpoints" if len(found) > 1 else "a training checkpoint"
    return f"holds {many} in subfolders: pass one of them; the latest is {folder / latest}"


def _subfolder(folder: Path) -> str | None:
    models = _models_below(folder)
    return f"holds no weights itself{_pass(models)}" if models else None


def _training_state(folder: Path) -> str | None:
    names = _names(folder)
    state = [name for name in names if name in ("optimizer.pt", "optimizer.bin", "trainer_state.json", "scheduler.pt")]
    if not state:
        return None
    return f"holds a training state ({state[0]}) but no weights: pass the folder where the model was saved"


_LOOKS: Sequence[Callable[[Path], str | None]] = (
    _adapter, _ggufs, _diffusers, _deepspeed, _distributed, _sentence_transformers, _hub_cache, _checkpoints,
    _subfolder, _training_state,
)  # fmt: skip


def _pass(models: Sequence[Path]) -> str:
    return f": pass {', '.join(str(model) for model in models[:3])}" if models else ""


def _models_below(folder: Path) -> list[Path]:
    """Return subfolders that hold a config.json, with weights first."""
    found = [folder / name for name in _folders(folder) if (folder / name / "config.json").is_file()]
    return sorted(found, key=lambda path: (not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")), path))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _json(file: Path) -> dict[str, Any]:
    """Return a JSON object, empty if unreadable: it only serves to describe a folder."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
