"""What is compared of our GGUFs with those of llama.cpp's converter, and the record of the latter.

``tools/check/check_converter.py`` runs the converter and writes the record, which ``test_converter.py`` holds our
output to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mtp_models import NAMES, write_mtp
from zoo import write_zoo, zoo_config, zoo_shapes
from zoo_specs import SPECS

from nsds_gguf import read
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.session.original import original_plan
from nsds_gguf.system.workers import Threads

GOLDEN = Path(__file__).parent / "golden" / "converter.json"
TRAINED = Path(__file__).parent.parent / "examples" / "books-4.6m"

MTP = "-mtp"  # ends the names of models with layers of multi-token prediction
OURS = "nsds_gguf."  # keys that say where a file comes from
ABSENT = "absent"

_DIGEST_LETTERS = 12  # of SHA-256: 48 bits
_LONG = 64  # letters of a value that the record keeps as it is
_COMPUTED = r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.ssm_a"
_COMPUTED_ERROR = 1e-6  # relative: two ways to compute in single precision
_RECORDED_NUMBERS = 16  # of a computed tensor


@dataclass(frozen=True)
class Entry:
    """What is compared of a file: a line per tensor and per key, and the numbers of tensors that are computed."""

    tensors: Mapping[str, str]
    keys: Mapping[str, str]
    computed: Mapping[str, list[float]]


def names() -> list[str]:
    """Return the names of the models that are compared: the zoo, some with more layers, and one that was trained."""
    return [*SPECS, *(f"{name}{MTP}" for name in NAMES), TRAINED.name]


def write_folder(folder: Path, name: str) -> Path:
    """Write the folder of a model, unless it is there already, and return it.

    Its config.json has what the converter demands, repositories have, and transformers 5 writes no more.
    """
    if name == TRAINED.name:
        return TRAINED
    if name.endswith(MTP):
        return write_mtp(folder, name.removesuffix(MTP))
    config = zoo_config(name)
    return write_zoo(folder, SPECS[name], {**config, **_repository_keys(config)}, zoo_shapes(name))


def _repository_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    match config["architectures"][0]:
        case "GPT2LMHeadModel":
            return {"n_ctx": config["n_positions"]}
        case "Cohere2ForCausalLM":
            return {"rotary_pct": 1.0}
        case "DeepseekV3ForCausalLM":
            return {"scoring_func": "sigmoid"}
        case "HunYuanMoEV1ForCausalLM":
            n_layers, width = config["num_hidden_layers"], config["intermediate_size"]
            by_layer = {"moe_topk": config["moe_topk"], "num_shared_expert": 1, "moe_intermediate_size": width}
            return {name: [value] * n_layers for name, value in by_layer.items()}
        case "NemotronHForCausalLM" if "layers_block_type" in config:  # the converter knows dense blocks by the pattern
            letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
            return {"hybrid_override_pattern": "".join(letters[kind] for kind in config["layers_block_type"])}
        case "MambaForCausalLM":
            return {"pad_vocab_size_multiple": 2}
        case "GraniteMoeHybridForCausalLM":
            spelling = {"full_attention": "attention", "linear_attention": "mamba"}
            return {"layer_types": [spelling.get(kind, kind) for kind in config["layer_types"]]}
    return {}


def convert_ours(folder: Path, path: Path) -> Path:
    """Write our GGUF at the precision of the folder and return its path."""
    model = read.open_model(folder)
    write_gguf(model, original_plan(model), TensorQuantizers(), path, workers=Threads(1))
    return path


def read_entry(path: Path) -> Entry:
    """Return what is compared of a file."""
    header = read_gguf_header(path)
    data = np.memmap(path, np.uint8, "r")
    tensors, computed = {}, {}
    for t in header.tensors:
        raw = data[t.offset : t.offset + t.n_bytes].tobytes()
        is_computed = re.fullmatch(_COMPUTED, t.name) is not None
        tensors[t.name] = f"{t.type} {list(t.shape)} {'computed' if is_computed else _digest(raw)}"
        if is_computed:
            computed[t.name] = np.frombuffer(raw, "<f4").tolist()
    keys = {}
    for key, entry in header.metadata.items():
        kind = entry.type.name if entry.sub_type is None else f"{entry.type.name} of {entry.sub_type.name}"
        keys[key] = f"{kind} {json.dumps(entry.value)}"
    return Entry(tensors, keys, computed)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_LETTERS]


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return name, ours and theirs of all that differs."""
    found = [(name, ours.get(name, ABSENT), theirs.get(name, ABSENT)) for name in dict.fromkeys([*theirs, *ours])]
    return [(name, a, b) for name, a, b in found if a != b]


def computed_differences(
    ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]
) -> list[tuple[str, str, str]]:
    """Return name, ours and theirs of computed tensors that differ in the numbers that both know."""
    found = []
    for name, wanted in theirs.items():
        numbers = ours.get(name, [])[: len(wanted)]
        if len(numbers) != len(wanted) or not np.allclose(numbers, wanted, rtol=_COMPUTED_ERROR, atol=0):
            found.append((name, str(numbers), str(wanted)))
    return found


def digests(lines: Mapping[str, str]) -> dict[str, str]:
    """Return what the record keeps of the lines of tensors."""
    return {name: _digest(line.encode()) for name, line in lines.items()}


def short(value: str) -> str:
    """Return a value for the record: as it is, or its beginning and digest."""
    return value if len(value) <= _LONG else f"{value[:_LONG]}… {_digest(value.encode())}"


def to_record(entry: Entry, own: Mapping[str, str]) -> dict[str, Any]:
    """Return what the record keeps of a file of the converter; ``own`` are our values where others are allowed."""
    return {
        "tensors": digests(entry.tensors),
        "computed": {name: numbers[:_RECORDED_NUMBERS] for name, numbers in entry.computed.items()},
        "keys": {key: short(value) for key, value in entry.keys.items()},
        "own": {key: short(value) for key, value in own.items()},
    }
