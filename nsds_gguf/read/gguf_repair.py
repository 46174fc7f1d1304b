"""Repair or refuse what llama.cpp rejects, or aborts on, in the header of an input GGUF.

``repaired`` reads keys and the tensor table alone. It makes exact repairs: it drops the tensors of a vision or audio
model in the file, and fits the vocabulary to the rows of the embedding. It refuses everything else with a reason before
any work. llama.cpp itself checks the rest on an outline of the file (``evaluate.texts``).

Sources: llama.cpp src/llama-model.cpp (``load_hparams``), src/llama-vocab.cpp (``llama_vocab::impl::load``);
Ollama llama/compat/README.md.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ..errors import ModelError, UnsupportedError
from ..llamacpp.gguf_header import TensorEntry
from ..llamacpp.rules import needs_f32
from ..records import COPIED_TYPES, kv, role_and_layer
from .config import MAX_LAYERS

# Ollama's own architectures, and llama.cpp's name of the model, whose keys and tensors are named otherwise.
OLLAMA_NAMES = {
    "deepseekocr": "deepseek2-ocr",
    "glm4moelite": "deepseek2",
    "glmocr": "glm4",
    "gptoss": "gpt-oss",
    "mllama": "",
    "nemotron_h_omni": "nemotron_h_moe",
    "olmo3": "olmo2",
    "qwen25vl": "qwen2vl",
}

# Tensors and keys of a vision or audio part that some tools store in the file of the language model.
_OTHER_PART = re.compile(r"(v|a|s|mm|resampler|adapter|vision_tower|audio_tower|multi_modal_projector)\.")
_OTHER_KEYS = ("vision.", "audio.", "mm.", "sam.", "projector.")

_NEEDED = ("block_count", "embedding_length", "context_length")  # of every architecture (load_hparams)
_MAX_EXPERTS = 512  # llama.cpp's LLAMA_MAX_EXPERTS
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_BY_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
_SPECIAL_ID = re.compile(r"tokenizer\.ggml\.\w+_(token_)?id")
_FLAG = re.compile(r"tokenizer\.ggml\.(add|remove)_\w+")
_NORMAL, _UNUSED = 1, 5  # llama.cpp, enum llama_token_type
_NO_VOCABULARY = ("no_vocab", "none")
# Default ids of BOS and EOS in llama.cpp's tokenizers, if no key names them.
_DEFAULT_IDS = {
    "bos": {"llama": 1, "bert": 101, "gpt2": 11, "plamo2": 1},
    "eos": {"llama": 2, "gpt2": 11, "t5": 1, "plamo2": 2},
}
_SHOWN = 3  # names in a message

Metadata = dict[str, GGUFValue]


@dataclass(frozen=True)
class Header:
    """Keys and tensor table, with notes on repairs, one sentence each."""

    metadata: Metadata
    tensors: tuple[TensorEntry, ...]
    notes: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """Return the value of a key, ``None`` without one."""
        entry = self.metadata.get(key)
        return None if entry is None else entry.value

    def noting(self, note: str, **changes: Any) -> Header:
        """Return the header with changes and a note on them."""
        return replace(self, notes=(*self.notes, note), **changes)


def repaired(architecture: str, metadata: Mapping[str, GGUFValue], tensors: Sequence[TensorEntry]) -> Header:
    """Return the header with repairs that do not change the model.

    Raises:
        ModelError: llama.cpp cannot load or run the file because of a key, a tensor or the vocabulary.
        UnsupportedError: an architecture that only Ollama knows.

    """
    check_architecture(architecture)
    header = _without_other_parts(architecture, Header(dict(metadata), tuple(tensors)))
    _check_keys(architecture, header)
    _check_layers(architecture, header)
    return _with_needed_keys(architecture, _with_f32(_with_fitting_vocabulary(header)))


def check_architecture(architecture: str) -> None:
    """Raise ``UnsupportedError`` for an architecture of Ollama's own."""
    if architecture not in OLLAMA_NAMES:
        return
    known = OLLAMA_NAMES[architecture]
    theirs = f"llama.cpp's is {known}, with other keys and tensor names" if known else "llama.cpp has no equivalent"
    remedy = "download the model's GGUF made for llama.cpp, or its safetensors, from Hugging Face"
    raise UnsupportedError(f"architecture {architecture} is Ollama's own: {theirs}; {remedy}")


# --- other parts than the language model ---------------------------------------------------------------------------


def _without_other_parts(architecture: str, header: Header) -> Header:
    left_out = [tensor for tensor in header.tensors if _OTHER_PART.match(tensor.name)]
    if not left_out or len(left_out) == len(header.tensors):
        return header
    prefixes = ("clip.", *(f"{architecture}.{part}" for part in _OTHER_KEYS))
    keys = {key: entry for key, entry in header.metadata.items() if not key.startswith(prefixes)}
    parts = ", ".join(dict.fromkeys(f"{tensor.name.split('.')[0]}.*" for tensor in left_out))
    n_keys = len(header.metadata) - len(keys)
    return header.noting(
        f"The file holds a vision or audio part beside the language model, as Ollama stores it: {len(left_out)} "
        f"tensors ({parts}) and {n_keys} keys are left out; llama.cpp reads that part from a separate file (mmproj).",
        metadata=keys,
        tensors=tuple(tensor for tensor in header.tensors if not _OTHER_PART.match(tensor.name)),
    )


# --- hyperparameters
# ---------------------------------------------------------------------------------------------------------


def _check_keys(architecture: str, header: Header) -> None:
    """Raise ``ModelError`` for what llama.cpp's ``load_hparams`` throws or aborts on."""
    for name in _NEEDED:
        key = f"{architecture}.{name}"
        if key in header.metadata and not (type(value := header.value(key)) is int and value > 0):
            raise ModelError(f"key {key} is {value!r}; wanted a positive integer")
    for key, entry in header.metadata.items():
        if key.startswith(f"{architecture}.") and not _is_finite(entry.value):
            raise ModelError(f"key {key} is {entry.value!r}; wanted a finite number: download the file again")
    widest = max((size for tensor in header.tensors for size in tensor.shape), default=0)
    if (n_embd := header.value(f"{architecture}.embedding_length")) is not None and n_embd > widest:
        raise ModelError(f"key {architecture}.embedding_length is {n_embd}; no tensor is wider than {widest}")
    n_layers = header.value(f"{architecture}.block_count")
    if n_layers is not None and n_layers > MAX_LAYERS:
        raise ModelError(f"key {architecture}.block_count is {n_layers}; llama.cpp takes at most {MAX_LAYERS} layers")
    _check_experts(architecture, header)
    _check_kinds(architecture, header)
    scaling = header.value(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALINGS:
        raise ModelError(
            f"key {architecture}.rope.scaling.type is {scaling!r}; llama.cpp knows {', '.join(_ROPE_SCALINGS)}"
        )


def _check_kinds(architecture: str, header: Header) -> None:
    """Raise ``ModelError`` for an id, flag or pooling type of the wrong type: llama.cpp throws."""
    for key, entry in header.metadata.items():
        is_number = _SPECIAL_ID.fullmatch(key) is not None or key == f"{architecture}.pooling_type"
        if (is_number and type(entry.value) is not int) or (_FLAG.fullmatch(key) and type(entry.value) is not bool):
            wanted = "an integer" if is_number else "true or false"
            raise ModelError(f"key {key} is {reprlib.repr(entry.value)}; wanted {wanted}: download the file again")


def _with_needed_keys(architecture: str, header: Header) -> Header:
    """Return the header with a note on missing keys that llama.cpp requires."""
    needed = [f"{architecture}.{name}" for name in _NEEDED] + ["tokenizer.ggml.model"]
    missing = [key for key in needed if key not in header.metadata]
    if not missing:
        return header
    what = "has no tokenizer and " if needed[-1] in missing else ""
    return header.noting(f"The file {what}lacks {', '.join(missing)}: llama.cpp cannot load the output.")


def _is_finite(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(math.isfinite(item) for item in values if isinstance(item, float))


def _check_experts(architecture: str, header: Header) -> None:
    n_experts = _largest(header.value(f"{architecture}.expert_count"))
    n_used = _largest(header.value(f"{architecture}.expert_used_count"))
    if not (0 <= n_experts <= _MAX_EXPERTS and 0 <= n_used <= n_experts and (n_used > 0) == (n_experts > 0)):
        raise ModelError(
            f"keys {architecture}.expert_count and expert_used_count are {n_experts} and {n_used}; wanted at most "
            f"{_MAX_EXPERTS} experts, of which at least 1 and at most all are used, or 0 and 0"
        )
    groups = _largest(header.value(f"{architecture}.expert_group_count"))
    used = _largest(header.value(f"{architecture}.expert_group_used_count"))
    is_grouped = groups > 1 and (not n_experts or groups >= n_experts or n_experts % groups or not 0 < used < groups)
    if is_grouped or (groups and not n_experts):
        raise ModelError(
            f"keys {architecture}.expert_group_count and expert_group_used_count are {groups} and {used}, with "
            f"{n_experts} experts; wanted groups of equal size, of which fewer than all are used"
        )


def _largest(value: Any) -> int:
    values = value if isinstance(value, list) else [value]
    return max((item for item in values if type(item) is int), default=0)


def _check_layers(architecture: str, header: Header) -> None:
    """Raise ``ModelError`` unless the layers of the tensors match ``block_count``."""
    found = {layer for tensor in header.tensors if (layer := role_and_layer(tensor.name)[1]) is not None}
    n_layers = header.value(f"{architecture}.block_count")
    if not found or n_layers is None:
        return
    missing = sorted(set(range(n_layers)) - found)
    extra = sorted(found - set(range(n_layers)))
    if missing or extra:
        what = f"no tensors of layer {missing[0]}" if missing else f"tensors of layer {extra[0]}"
        raise ModelError(f"key {architecture}.block_count is {n_layers}, but there are {what}; get a complete file")


# --- vocabulary ------------------------------------------------------------------------------------------------------


def _with_fitting_vocabulary(header: Header) -> Header:
    """Return the header with a vocabulary that llama.cpp loads, one token per row of the embedding."""
    kind, tokens = header.value("tokenizer.ggml.model"), header.value(_TOKENS)
    if kind is None and tokens is None:
        return header
    if kind in _NO_VOCABULARY:
        return header
    if kind is None or not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ModelError(
            f"the tokenizer is incomplete: wanted keys tokenizer.ggml.model and {_TOKENS}, a list of texts; "
            "get a complete file"
        )
    for step in (_of_fitting_lists, _of_embedded_tokens, _of_known_ids):
        header = step(header)
    _check_tokens(header)
    _check_merges(header)
    _check_added(header)
    return header


def _of_fitting_lists(header: Header) -> Header:
    """Return the header without surplus scores and types; raise ``ModelError`` if there are too few."""
    n_tokens = len(header.value(_TOKENS))
    for key in _BY_TOKEN:
        values = header.value(key)
        if values is None or (isinstance(values, list) and len(values) == n_tokens):
            continue
        if not isinstance(values, list) or len(values) < n_tokens:
            found = len(values) if isinstance(values, list) else repr(values)
            raise ModelError(f"key {key}: wanted {n_tokens} values, one per token, got {found}; get a valid file")
        header = header.noting(
            f"Key {key} has {len(values)} values for {n_tokens} tokens: the surplus is left out.",
            metadata=_cut(header.metadata, (key,), n_tokens),
        )
    return header


def _cut(metadata: Metadata, keys: Sequence[str], n: int) -> Metadata:
    changed = {key: kv(entry.value[:n], entry.type, entry.sub_type) for key in keys if (entry := metadata.get(key))}
    return {**metadata, **changed}


def _of_embedded_tokens(header: Header) -> Header:
    """Return the header with one token per row of the embedding: truncated, or padded like llama.cpp's converter."""
    shape = next((tensor.shape for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    tokens = header.value(_TOKENS)
    if shape is None or len(shape) != 2 or len(tokens) == shape[0]:
        return header
    n_rows, n_tokens, size_keys = shape[0], len(tokens), (_TOKENS, *_BY_TOKEN)
    sizes = {key: kv(n_rows, entry.type) for key, entry in header.metadata.items() if key.endswith(".vocab_size")}
    if n_tokens > n_rows:
        names = ", ".join(map(repr, tokens[n_rows : n_rows + _SHOWN]))
        return header.noting(
            f"The vocabulary has {n_tokens} tokens, the embedding {n_rows} rows: the last {n_tokens - n_rows} tokens "
            f"({names}{', …' if n_tokens - n_rows > _SHOWN else ''}) are left out.",
            metadata={**_cut(header.metadata, size_keys, n_rows), **sizes},
        )
    fill: dict[str, Callable[[int], Any]] = {
        _TOKENS: lambda i: f"[PAD{i}]", _BY_TOKEN[0]: lambda _: -1000.0, _BY_TOKEN[1]: lambda _: _UNUSED,
    }  # fmt: skip
    if _BY_TOKEN[1] not in header.metadata:
        kinds = {_BY_TOKEN[1]: kv([_NORMAL] * n_tokens, GGUFValueType.ARRAY, GGUFValueType.INT32)}
        header = replace(header, metadata={**header.metadata, **kinds})
    filled = {
        key: kv([*entry.value, *map(fill[key], range(n_tokens, n_rows))], entry.type, entry.sub_type)
        for key in size_keys
        if (entry := header.metadata.get(key))
    }
    return header.noting(
        f"The vocabulary has {n_tokens} tokens, the embedding {n_rows} rows: the other rows get unused tokens "
        f"[PAD{n_tokens}] to [PAD{n_rows - 1}].",
        metadata={**header.metadata, **filled, **sizes},
    )


def _of_known_ids(header: Header) -> Header:
    """Return the header without special token ids outside the vocabulary; llama.cpp ignores them."""
    n_tokens = len(header.value(_TOKENS))
    wrong = {
        key: entry.value
        for key, entry in header.metadata.items()
        if _SPECIAL_ID.fullmatch(key) and type(entry.value) is int and not 0 <= entry.value < n_tokens
    }
    if not wrong:
        return header
    ids = ", ".join(f"{key} {value}" for key, value in wrong.items())
    return header.noting(
        f"The vocabulary has {n_tokens} tokens; special token ids outside it are left out, as llama.cpp ignores them: "
        f"{ids}.",
        metadata={key: entry for key, entry in header.metadata.items() if key not in wrong},
    )


def _check_tokens(header: Header) -> None:
    """Raise ``ModelError`` for a duplicate token: llama.cpp aborts."""
    ids: dict[str, int] = {}
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(header.value(_TOKENS))]  # llama.cpp's names
    for i, token in enumerate(tokens):
        first = ids.setdefault(token, i)
        if first != i:
            raise ModelError(
                f"key {_TOKENS}: tokens {first} and {i} are both {token!r} ({len(tokens) - len(set(tokens))} "
                "duplicates in all), on which llama.cpp aborts; convert the model's folder, or get a file with a valid "
                "vocabulary"
            )


def _check_merges(header: Header) -> None:
    """Raise ``ModelError`` for byte-level BPE with tokens of several letters, but without merges."""
    if header.value("tokenizer.ggml.model") != "gpt2" or header.value("tokenizer.ggml.pre") == "kimi-k2":
        return
    merges, kinds = header.value(_MERGES), header.value(_BY_TOKEN[1])
    tokens = header.value(_TOKENS)
    is_long = (len(token) > 1 and kinds is not None and kinds[i] == _NORMAL for i, token in enumerate(tokens))
    if merges is None or (not merges and any(is_long)):
        raise ModelError(
            f"key {_MERGES} is {'missing' if merges is None else 'empty'}: llama.cpp cannot build tokens of several "
            "letters; get a complete file"
        )


def _check_added(header: Header) -> None:
    """Raise ``ModelError`` if BOS or EOS must be added, but does not exist: llama.cpp aborts."""
    kind, n_tokens = header.value("tokenizer.ggml.model"), len(header.value(_TOKENS))
    for name, defaults in _DEFAULT_IDS.items():
        key = f"tokenizer.ggml.{name}_token_id"
        has_default = defaults.get(str(kind), n_tokens) < n_tokens
        if header.value(f"tokenizer.ggml.add_{name}_token") and key not in header.metadata and not has_default:
            raise ModelError(
                f"key tokenizer.ggml.add_{name}_token is true, but {key} is missing, on which llama.cpp aborts; "
                "get a complete file"
            )


# --- types -----------------------------------------------------------------------------------------------------------


def _with_f32(header: Header) -> Header:
    """Return the header with a note on tensors that are stored in a type that llama.cpp's kernels do not support."""
    wrong = [t for t in header.tensors if needs_f32(t.name, t.shape) and t.type not in ("F32", *COPIED_TYPES)]
    if not wrong:
        return header
    types = ", ".join(sorted({tensor.type for tensor in wrong}))
    names = ", ".join(tensor.name for tensor in wrong[:_SHOWN]) + (", …" if len(wrong) > _SHOWN else "")
    return header.noting(
        f"{len(wrong)} vectors and other small tensors stored as {types} ({names}) become F32, the only type that "
        "llama.cpp's kernels support there; their values do not change."
    )
