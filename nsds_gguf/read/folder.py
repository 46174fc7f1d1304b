"""A Hugging Face model folder becomes a ``Model`` of canonical tensors.

``open_folder`` reads JSON and headers only; weights are read later, a slab of rows at a time, through
``Tensor.read_rows`` (but a stored ``lm_head`` that config.json ties to the embedding is compared with it at once).
Everything that can be refused is refused here: class, rope, activation, tokenizer, and a tensor mapping that is not
total in both directions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..records import Float32, Hparams, Model, Tensor
from .card import card_keys
from .checkpoint import open_checkpoint
from .families import (
    ALWAYS,
    DEFAULT_FULL_LAYERS,
    DEFAULT_NORM_EPS,
    DEFAULT_WINDOW,
    GLOBAL_TENSORS,
    IGNORED,
    Family,
    find_family,
)
from .rope import add_rope_keys, check_rope, llama3_factors, rope_settings
from .stored import StoredTensor
from .vocab import open_vocab

MAX_LAYERS = 512  # llama.cpp's (LLAMA_MAX_LAYERS in llama-hparams.h)

_SLAB_WEIGHTS = 1 << 20  # 4 MiB of float32
_IDENTITY_BYTES = 4096  # of every tensor: enough to tell two fine-tunes apart, cheap enough to read always


def open_folder(path: Path, pre: str | None = None) -> Model:
    """Open a Hugging Face model folder.

    Args:
        path: folder with ``config.json``, safetensors weights and a tokenizer.
        pre: name of llama.cpp's pre-tokenizer, overriding the one recognised.

    Returns:
        The model; no weights have been read.

    Raises:
        ModelError: files are missing, damaged or contradict one another.
        UnsupportedError: a class, rope kind, activation, weight format or tokenizer that is not supported.

    """
    folder = path.resolve()
    config = _read_config(folder, path)
    family = find_family(_class_name(config))
    hparams = _hparams(config, family)
    rope = rope_settings(config)
    check_rope(rope, family.architecture, family.rope_kinds)
    stored = open_checkpoint(folder, config)
    tensors, notes = _map_tensors(stored, config, family, hparams)
    if rope["rope_type"] == "llama3":
        tensors.append(_constant("rope_freqs.weight", "rope_freqs", llama3_factors(rope, hparams.head_dim)))
    vocab = open_vocab(folder, hparams.n_vocab, config, pre)
    about, unread = card_keys(folder, config, sum(tensor.n_weights for tensor in tensors))
    metadata = {**_model_keys(about, config, family, hparams, rope), **vocab.metadata}
    _check_letters(folder, metadata)
    return Model(
        path=folder,
        architecture=family.architecture,
        source_class=_class_name(config),
        hparams=hparams,
        tensors=tuple(tensors),
        metadata=metadata,
        notes=(*_window_note(config, family, hparams), *notes, *vocab.notes, *unread),
        model_id=_identity(config, stored),
    )


def _read_config(folder: Path, shown: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ModelError(f"{shown}: no such folder")
    if not folder.is_dir():
        raise UnsupportedError(f"{shown}: is a file; wanted a Hugging Face model folder with config.json")
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{shown}: no config.json in it; wanted a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: wanted an object, got {type(config).__name__}")
    return config


def _class_name(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelError(f"config.json: wanted one class name in architectures, got {architectures!r}")
    return architectures[0]


def _hparams(config: Mapping[str, Any], family: Family) -> Hparams:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"config.json: hidden_act {activation!r} is not supported; known: silu")
    n_layers, n_heads = _integer(config, "num_hidden_layers"), _integer(config, "num_attention_heads")
    if n_layers > MAX_LAYERS:
        raise UnsupportedError(f"config.json: num_hidden_layers {n_layers}: llama.cpp takes at most {MAX_LAYERS}")
    n_kv_heads = _integer(config, "num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(f"config.json: {n_heads} heads cannot share {n_kv_heads} key/value heads evenly")
    return Hparams(
        n_layers=n_layers,
        n_embd=_integer(config, "hidden_size"),
        n_ff=_integer(config, "intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=_head_dim(config, family, n_heads),
        n_vocab=_integer(config, "vocab_size"),
        n_ctx_train=_integer(config, "max_position_embeddings"),
        norm_eps=_norm_eps(config),
        qk_norm=family.qk_norm,
    )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ModelError(f"config.json: {key}: wanted a positive integer, got {value!r}")
    return value


def _head_dim(config: Mapping[str, Any], family: Family, n_heads: int) -> int:
    n_embd = _integer(config, "hidden_size")
    if config.get("head_dim") is None and n_embd % n_heads:
        raise ModelError(f"config.json: hidden_size {n_embd} is no multiple of num_attention_heads {n_heads}")
    head_dim = _integer(config, "head_dim", n_embd // n_heads)
    if family.fixed_head_dim and head_dim * n_heads != n_embd:
        raise UnsupportedError(
            f"config.json: head_dim {head_dim} x {n_heads} heads is not hidden_size {n_embd}; "
            f"llama.cpp's {family.architecture} demands it"
        )
    if head_dim % 2:
        raise UnsupportedError(f"config.json: head_dim {head_dim} is odd; rope rotates pairs of channels")
    return head_dim


def _norm_eps(config: Mapping[str, Any]) -> float:
    eps = config.get("rms_norm_eps", DEFAULT_NORM_EPS)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ModelError(f"config.json: rms_norm_eps: wanted a number from 0 to 1, got {eps!r}")
    return float(eps)


def _map_tensors(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any], family: Family, hparams: Hparams
) -> tuple[list[Tensor], list[str]]:
    """Return the tensors in GGUF order and the notes; raises unless every tensor is placed and none is missing."""
    tied = bool(config.get("tie_word_embeddings", False))
    wanted = _wanted_tensors(config, family, hparams, tied)
    missing = [source for _, _, source in wanted if source not in stored]
    if missing:
        raise ModelError(
            f"tensors missing from the weights: {_some(missing)}; "
            "the checkpoint is incomplete or config.json is another model's"
        )
    used = {source for _, _, source in wanted}
    if tied:
        used.add(GLOBAL_TENSORS["output.weight"])
    leftover = [name for name in stored if name not in used and not any(re.fullmatch(p, name) for p in IGNORED)]
    if leftover:
        raise UnsupportedError(
            f"tensors that llama.cpp's {family.architecture}, as config.json describes it, has no place for: "
            f"{_some(leftover)}"
        )
    notes = _tie_notes(stored) if tied else []
    shapes = _shapes(hparams)
    return [_tensor(name, layer, stored[source], shapes, family, hparams) for name, layer, source in wanted], notes


def _tie_notes(stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the note on a tied output that is stored all the same; raises unless it equals the embedding.

    transformers 4 would drop it and transformers 5 use it, so one that differs cannot be converted faithfully.
    """
    embedding, output = (GLOBAL_TENSORS[name] for name in ("token_embd.weight", "output.weight"))
    if output not in stored:
        return []
    if not _same_values(stored[embedding], stored[output]):
        raise ModelError(
            f"config.json ties {output} to {embedding}, but the stored ones differ: "
            f"set tie_word_embeddings to false to keep {output}, or remove it from the weights"
        )
    return [f"{output} is left out: it is the embedding, to which config.json ties it."]


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two matrices hold the same numbers, reading a slab of rows at a time up to a difference."""
    if first.shape != second.shape:
        return False
    n_rows, step = first.shape[0], max(1, _SLAB_WEIGHTS // first.shape[-1])
    slabs = (slice(start, start + step) for start in range(0, n_rows, step))
    return all(np.array_equal(first.read_rows(slab), second.read_rows(slab)) for slab in slabs)


def _wanted_tensors(
    config: Mapping[str, Any], family: Family, hparams: Hparams, tied: bool
) -> list[tuple[str, int | None, str]]:
    """Return ``(GGUF name, layer, checkpoint name)`` of every tensor that the model must have, in GGUF order."""
    wanted: list[tuple[str, int | None, str]] = [("token_embd.weight", None, GLOBAL_TENSORS["token_embd.weight"])]
    biased = [role for role, flag in family.biases.items() if flag == ALWAYS or config.get(flag)]
    for i in range(hparams.n_layers):
        for name, source in family.layer_tensors.items():
            wanted.append((f"blk.{i}.{name}", i, source.format(i=i)))
            role = name.removesuffix(".weight")
            if role in biased:
                wanted.append((f"blk.{i}.{role}.bias", i, source.format(i=i).removesuffix("weight") + "bias"))
    wanted.append(("output_norm.weight", None, GLOBAL_TENSORS["output_norm.weight"]))
    if not tied:
        wanted.append(("output.weight", None, GLOBAL_TENSORS["output.weight"]))
    return wanted


def _shapes(hparams: Hparams) -> dict[str, tuple[int, ...]]:
    """Return the shape that each role must have, ``(out_features, in_features)``."""
    h, d, q = hparams, hparams.n_embd, hparams.n_heads * hparams.head_dim
    kv = h.n_kv_heads * h.head_dim
    return {
        "token_embd": (h.n_vocab, d),
        "output": (h.n_vocab, d),
        "output_norm": (d,),
        "attn_norm": (d,),
        "ffn_norm": (d,),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
        "attn_q_norm": (h.head_dim,),
        "attn_k_norm": (h.head_dim,),
        "ffn_gate": (h.n_ff, d),
        "ffn_up": (h.n_ff, d),
        "ffn_down": (d, h.n_ff),
    }


def _tensor(
    name: str,
    layer: int | None,
    stored: StoredTensor,
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    hparams: Hparams,
) -> Tensor:
    role = name.split(".", 2)[2] if layer is not None else name
    kind = role.removesuffix(".weight").removesuffix(".bias")
    wanted = shapes[kind][:1] if role.endswith(".bias") else shapes[kind]
    stored.require_readable()
    if stored.shape != wanted:
        hint = "vocabulary size and embedding rows disagree" if kind in ("token_embd", "output") else "see config.json"
        raise ModelError(f"{stored.file}: tensor {stored.name}: wanted shape {wanted}, got {stored.shape}: {hint}")
    n_heads = {"attn_q": hparams.n_heads, "attn_k": hparams.n_kv_heads}.get(kind)
    order = rope_row_order(n_heads, hparams.head_dim) if family.permutes_qk and n_heads is not None else None
    return Tensor(name, role.removesuffix(".weight"), layer, wanted, stored.dtype, stored.name, _reader(stored, order))


def rope_row_order(n_heads: int, head_dim: int) -> NDArray[np.intp]:
    """Return the checkpoint row behind each GGUF row of q or k, ``(n_heads * head_dim,)``.

    transformers rotates channel ``j`` of a head with ``j + head_dim / 2``, ggml's order "norm" neighbours
    ``2j`` with ``2j + 1``: rows of the two halves are interleaved (llama.cpp conversion, ``permute``).
    """
    rows = np.arange(n_heads * head_dim, dtype=np.intp).reshape(n_heads, 2, head_dim // 2)
    order: NDArray[np.intp] = rows.swapaxes(1, 2).ravel()
    return order


def _reader(stored: StoredTensor, order: NDArray[np.intp] | None) -> Callable[[int, int], Float32]:
    if order is None:
        return lambda start, stop: stored.read_rows(slice(start, stop))
    if len(stored.shape) == 1:  # a bias is one row whose entries are permuted
        return lambda start, stop: stored.read_rows(slice(start, stop))[:, order]
    return lambda start, stop: stored.read_rows(order[start:stop])


def _constant(name: str, role: str, values: Float32) -> Tensor:
    """Return a tensor that is computed, not read."""
    return Tensor(
        name, role, None, values.shape, "F32", "computed from config.json",
        lambda start, stop: values[np.newaxis][start:stop].copy(),
    )  # fmt: skip


def _window_note(config: Mapping[str, Any], family: Family, hparams: Hparams) -> tuple[str, ...]:
    window = config.get("sliding_window", DEFAULT_WINDOW)
    if not window or not _has_windowed_layers(config, family, hparams):
        return ()
    if not isinstance(window, int):
        raise ModelError(f"config.json: sliding_window: wanted a number of tokens or null, got {window!r}")
    if window >= hparams.n_ctx_train:
        return ()
    return (
        f"llama.cpp has no sliding window for {family.architecture}: attention is full beyond {window} tokens, "
        f"where the original looks back {window}.",
    )


def _has_windowed_layers(config: Mapping[str, Any], family: Family, hparams: Hparams) -> bool:
    if family.window is None or family.window == ALWAYS:
        return family.window == ALWAYS
    if not config.get(family.window):
        return False
    layer_types, n_full = config.get("layer_types"), config.get("max_window_layers", DEFAULT_FULL_LAYERS)
    if isinstance(layer_types, list):
        return "sliding_attention" in layer_types
    if not isinstance(n_full, int):
        raise ModelError(f"config.json: max_window_layers: wanted a number of layers, got {n_full!r}")
    return n_full < hparams.n_layers


def _model_keys(
    about: Mapping[str, GGUFValue],
    config: Mapping[str, Any],
    family: Family,
    hparams: Hparams,
    rope: Mapping[str, Any],
) -> dict[str, GGUFValue]:
    """Return the ``general.*`` and architecture keys, as llama.cpp's converter writes them."""
    writer = GGUFWriter(None, family.architecture)
    writer.add_type(GGUFType.MODEL)
    writer.kv_data[0].update(about)
    writer.add_block_count(hparams.n_layers)
    writer.add_context_length(hparams.n_ctx_train)
    writer.add_embedding_length(hparams.n_embd)
    writer.add_feed_forward_length(hparams.n_ff)
    writer.add_head_count(hparams.n_heads)
    writer.add_head_count_kv(hparams.n_kv_heads)
    writer.add_layer_norm_rms_eps(hparams.norm_eps)
    if config.get("head_dim") is not None:
        writer.add_key_length(hparams.head_dim)
        writer.add_value_length(hparams.head_dim)
    if family.writes_rope_dim:
        writer.add_rope_dimension_count(hparams.head_dim)
        writer.add_vocab_size(hparams.n_vocab)
    add_rope_keys(writer, rope)
    return dict(writer.kv_data[0])


def _check_letters(folder: Path, metadata: Mapping[str, GGUFValue]) -> None:
    """Raise ``ModelError`` for text that no UTF-8 file can hold: JSON may spell halves of a letter, file names too."""
    for key, entry in metadata.items():
        texts = entry.value if isinstance(entry.value, list) else [entry.value]
        try:
            "".join(text for text in texts if isinstance(text, str)).encode()
        except UnicodeEncodeError as error:
            raise ModelError(
                f"{folder}: {key} is not UTF-8: {error.object[error.start]!r}; correct it where it comes from: "
                "a file of the model, or the folder's name"
            ) from error


def _identity(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(stored):
        tensor = stored[name]
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.first_bytes(_IDENTITY_BYTES))
    return digest.hexdigest()


def _some(names: list[str], n_shown: int = 3) -> str:
    shown = ", ".join(names[:n_shown])
    return f"{shown}, … ({len(names) - n_shown} more)" if len(names) > n_shown else shown
