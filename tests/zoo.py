"""Random models of every supported class, as Hugging Face folders that transformers itself could have saved.

``zoo_specs.SPECS`` says what each model is. What transformers makes of that is recorded in ``golden/zoo.json`` by
``tools/check/check_logits.py``: config.json as it is saved, and the names and shapes of the saved tensors. The weights
follow from the spec's seed, a tensor's name and its shape, so that tests build the same folder to the byte without
transformers.

The weights are drawn so that errors show. Queries and keys are large enough for peaked attention. Embeddings are so
small, or epsilons so large, that the epsilon of the first norm counts. Norms are far from their neutral value, biases
far from zero, and routers choose clearly.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import N_VOCAB, Uniform, Weights, safetensors_bytes, stored, write_model

GOLDEN = Path(__file__).parent / "golden" / "zoo.json"

Shape = tuple[int, ...]

EXACT = 1e-3  # of the largest logit: what float32 can differ by
ROUGH = 5e-3  # where ggml takes GELU from a table of half precision
_GELU_CLASSES = ("GPT", "Gemma", "PhiFor", "Starcoder2")

# What a name says of a tensor. Gains: of the root mean square of a random vector.
_QK_NORM = re.compile(r".*\.(q|k|query|key)_(layer)?norm(\.norms\.\d+)?\.weight")
_NORM = re.compile(r".*(norm|norm_f|norm_\d|ln_\w+)\.weight")
_SCALE = re.compile(r".*\.(layer_scalar|router\.scale|router\.per_expert_scale)")
_EMBEDDING = re.compile(r".*(embed_tokens|wte|embed_in|tok_embeddings|embeddings)\.weight")
_GAINS = {
    re.compile(r"(.*\.)?wpe\.weight"): 0.02,
    re.compile(r".*(q_proj|q_b_proj|k_proj|kv_b_proj|qkv_proj|wqkv|query_key_value)\.weight"): 2.5,
    re.compile(r".*\.c_attn\.weight"): 2.5 * math.sqrt(3),  # (in, out), and out is three times in
    re.compile(
        r".*(mlp\.gate(\.wg)?|block_sparse_moe\.gate|router\.layer|mlp\.router|feed_forward\.gate|shared_expert_gate)\.weight"
    ): 4.0,
    re.compile(r".*\.router\.proj\.weight"): 32.0,  # divided by the root of the width
    re.compile(r".*\.sinks"): 8.0,
    re.compile(r".*\.(mlp|feed_forward|block_sparse_moe|shared_mlp)\..*"): 1.5,
}

# What transformers takes from its own code, whatever is stored.
_CONSTANTS = {".act_fn.beta": 0.5, ".act_fn.eps": -1e-6}

# Added to probabilities: larger ones would choose experts whose probabilities are rounded away.
_PROBABILITY, _SMALL = re.compile(r".*\.moe_statics\..*"), 0.1


@dataclass(frozen=True)
class ZooSpec:
    """A random model.

    Attributes:
        source_class: name under ``architectures``.
        settings: arguments of the config class.
        form: major version of transformers whose config.json it has: 5, or 4 with ``rope_theta`` and ``rope_scaling``.
        edits: keys of config.json that repositories have otherwise than transformers saves them; ``None`` removes one.
        stand_in: class of transformers that computes the same where it has none of that name.
        dtype: storage, F32, F16 or BF16.
        n_shards: files of weights.
        omitted: pattern of names that the weights lack.
        names: patterns of saved names, and what repositories have in their place.
        turned: pattern of names of stacks that repositories have as ``(in, out)``, transformers 5 as ``(out, in)``.
        extras: names and shapes of tensors that repositories have beside the weights.
        n_tokens: length of the sequence it is tested on.
        embedding_gain: root mean square of a row of the embedding.
        qk_gain: mean weight of the norms of queries and keys.
        norm_shift: what the class adds to a norm's stored weight.
        seed: of weights and tokens.
    """

    source_class: str
    settings: Mapping[str, Any]
    form: int = 5
    edits: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str = ""
    dtype: str = "F32"
    n_shards: int = 1
    omitted: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    turned: str = ""
    extras: Mapping[str, Shape] = field(default_factory=dict)
    n_tokens: int = 160
    embedding_gain: float = 0.02
    qk_gain: float = 2.0
    norm_shift: float = 0.0
    seed: int = 1

    @property
    def tolerance(self) -> float:
        """Largest difference of two logits, as a part of the largest logit."""
        return ROUGH if self.source_class.startswith(_GELU_CLASSES) else EXACT


@cache
def _golden() -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return entries


def zoo_config(name: str) -> dict[str, Any]:
    """Return the recorded config.json of a spec."""
    return dict(_golden()[name]["config"])


def zoo_shapes(name: str) -> dict[str, Shape]:
    """Return the recorded shapes of a spec's tensors by name."""
    return unpacked(_golden()[name]["shapes"])


def packed(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return shapes with one entry for like layers and experts: ``name with {} -> [numbers by place, shape]``.

    Layers of other shapes have ``{"by shape": [such pairs]}``.
    """
    groups: dict[str, dict[Shape, list[str]]] = {}
    for name in sorted(shapes):
        template = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        groups.setdefault(template, {}).setdefault(shapes[name], []).append(name)
    entries = {}
    for template, by_shape in groups.items():
        places = []
        for shape, names in by_shape.items():
            numbers = [[int(part) for part in name.split(".") if part.isdigit()] for name in names]
            places.append([[sorted(set(column)) for column in zip(*numbers, strict=True)], list(shape)])
        entries[template] = places[0] if len(places) == 1 else {"by shape": places}
    if unpacked(entries) != dict(shapes):
        raise ValueError("layers or experts of different shapes")
    return entries


def unpacked(entries: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what was ``packed``."""
    return {
        template.format(*place): tuple(shape)
        for template, entry in entries.items()
        for numbers, shape in (entry["by shape"] if isinstance(entry, dict) else [entry])
        for place in itertools.product(*numbers)
    }


def zoo_weights(spec: ZooSpec, shapes: Mapping[str, Shape]) -> Weights:
    """Return the tensors by checkpoint name, in the spec's storage type."""
    return {name: stored(_drawn(spec, name, shapes[name]), spec.dtype) for name in sorted(shapes)}


def _drawn(spec: ZooSpec, name: str, shape: Shape) -> NDArray[np.float32]:
    constant = next((value for ending, value in _CONSTANTS.items() if name.endswith(ending)), None)
    if constant is not None:
        return np.full(shape, constant, np.float32)
    seed = hashlib.sha256(f"{spec.seed} {name}".encode()).digest()[:8]
    numbers = Uniform(int.from_bytes(seed, "little")).draw(*shape)
    if _QK_NORM.fullmatch(name):
        return numbers * np.float32(spec.qk_gain / 2) + np.float32(spec.qk_gain - spec.norm_shift)
    if _NORM.fullmatch(name):
        return numbers * np.float32(0.5) + np.float32(1 - spec.norm_shift)
    if _SCALE.fullmatch(name):
        return numbers * np.float32(0.5) + np.float32(1)
    if name.endswith("bias"):
        return numbers * np.float32(_SMALL if _PROBABILITY.fullmatch(name) else 1)
    return numbers * np.float32(_gain(spec, name) * math.sqrt(3 / shape[-1]))


def _gain(spec: ZooSpec, name: str) -> float:
    if _EMBEDDING.fullmatch(name):
        return spec.embedding_gain
    return next((gain for pattern, gain in _GAINS.items() if pattern.fullmatch(name)), 1.0)


def zoo_tokens(spec: ZooSpec) -> list[int]:
    """Return the sequence that a spec is tested on."""
    raw = np.random.PCG64(1000 + spec.seed).random_raw(spec.n_tokens)
    return [int(token) for token in raw % np.uint64(N_VOCAB)]


def write_zoo(folder: Path, spec: ZooSpec, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Path:
    """Write the folder of a spec and return it."""
    return write_model(folder, config, zoo_weights(spec, shapes), spec.n_shards)


def digest(spec: ZooSpec, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str:
    """Return the hex SHA-256 of all that a spec stands for: what it states, config.json, weights and sequence."""
    silent = asdict(ZooSpec("", {}))
    stated = {key: value for key, value in asdict(spec).items() if value != silent[key]}
    text = json.dumps([stated, config, zoo_tokens(spec)], sort_keys=True)
    return hashlib.sha256(text.encode() + safetensors_bytes(zoo_weights(spec, shapes))).hexdigest()
