"""Layers of multi-token prediction (MTP), which llama.cpp uses to draft tokens: a decoder layer and what joins it.

llama.cpp stores them as layers after the model's own, counts them in ``block_count`` and names their number in
``nextn_predict_layers``. Families that are not in ``HEADS`` have no place for them there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...errors import UnsupportedError
from ...records import Tensor, kv
from .family import Config, Family, Part, Parts, Sizes

KEEP, DROP = "keep", "drop"  # values of ``--mtp``; by default they are kept where llama.cpp's converter keeps them

_NEXTN_KEY = "nextn_predict_layers"


@dataclass(frozen=True)
class MtpHead:
    """How a checkpoint stores its layers of multi-token prediction.

    Attributes:
        layer: prefix of the decoder layer's names; ``{k}`` is its number, ``{i}`` that of a layer after the model's.
        beside: prefix of the names of ``parts``.
        parts: what joins the layer to the model, in GGUF order.
        optional: roles of ``parts`` that a checkpoint may lack: the model's own serve in their place.

    """

    layer: str
    beside: str
    parts: Parts
    optional: tuple[str, ...] = ()


_QWEN = MtpHead(
    layer="mtp.layers.{k}.",
    beside="mtp.",
    parts={
        "nextn.eh_proj.weight": Part("fc", ("embd", "2embd")),
        "nextn.enorm.weight": Part("pre_fc_norm_embedding", ("embd",), change="plus_one"),
        "nextn.hnorm.weight": Part("pre_fc_norm_hidden", ("embd",), change="plus_one"),
        "nextn.shared_head_norm.weight": Part("norm", ("embd",), change="plus_one"),
    },
)
_APPENDED = MtpHead(
    layer="model.layers.{i}.",
    beside="model.layers.{i}.",
    parts={
        "nextn.eh_proj.weight": Part("eh_proj", ("embd", "2embd")),
        "nextn.enorm.weight": Part("enorm", ("embd",)),
        "nextn.hnorm.weight": Part("hnorm", ("embd",)),
        "nextn.embed_tokens.weight": Part("embed_tokens", ("vocab", "embd")),
        "nextn.shared_head_head.weight": Part("shared_head.head", ("vocab", "embd")),
        "nextn.shared_head_norm.weight": Part("shared_head.norm", ("embd",)),
    },
    optional=("nextn.embed_tokens.weight", "nextn.shared_head_head.weight"),
)

# By architecture: those whose layers llama.cpp's converter keeps, and the checkpoint's names of them.
HEADS: Mapping[str, MtpHead] = {
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), _QWEN),
    "glm4moe": _APPENDED,
}


def mtp_layers(names: Collection[str], family: Family, n_layers: int, mtp: str | None) -> int:
    """Return how many layers of multi-token prediction of a checkpoint to write.

    Args:
        names: of the checkpoint's tensors.
        family: of the model.
        n_layers: of the model itself.
        mtp: ``KEEP``, ``DROP``, or ``None`` for what llama.cpp's converter does.

    Raises:
        UnsupportedError: they are to be kept, and the checkpoint or llama.cpp has none.

    """
    head, found = HEADS.get(family.architecture), 0
    while head is not None and any(_is_within(name, head.layer.format(k=found, i=n_layers + found)) for name in names):
        found += 1
    if mtp == KEEP and not found:
        reason = "the weights hold none" if head is not None else f"llama.cpp's {family.architecture} has no place"
        raise UnsupportedError(f"--mtp keep: {reason} for layers of multi-token prediction; drop the option")
    return 0 if mtp == DROP else found


def _is_within(name: str, prefix: str) -> bool:
    return re.search(rf"(^|\.){re.escape(prefix)}", name) is not None


def mtp_parts(names: Collection[str], config: Config, family: Family, n_layers: int, number: int) -> dict[str, Part]:
    """Return the parts of one layer of multi-token prediction, by role."""
    head = HEADS[family.architecture]
    layer, beside = (text.format(k=number, i=n_layers + number) for text in (head.layer, head.beside))
    if not any(name.startswith(layer) for name in names) and not layer.startswith("model."):
        layer, beside = f"model.{layer}", f"model.{beside}"
    decoder = {role: part for role, part in family.layer.items() if part.layers(config, n_layers + number)}
    own = {
        role: part
        for role, part in head.parts.items()
        if role not in head.optional or any(name.endswith(f"{beside}{part.source}.weight") for name in names)
    }
    return {
        **{role: part.within(layer) for role, part in decoder.items()},
        **{role: replace(part, source=beside + part.source) for role, part in own.items()},
    }


def mtp_keys(architecture: str, keys: Mapping[str, GGUFValue], sizes: Sizes, n_mtp: int) -> dict[str, GGUFValue]:
    """Return the keys that count layers of multi-token prediction in; none without any."""
    if not n_mtp:
        return {}
    found = {
        "block_count": kv(sizes["layers"] + n_mtp, GGUFValueType.UINT32),
        _NEXTN_KEY: kv(n_mtp, GGUFValueType.UINT32),
    }
    recurrent = keys.get(f"{architecture}.attention.recurrent_layers")
    if recurrent is not None:
        listed = [*recurrent.value, *[False] * n_mtp]
        found["attention.recurrent_layers"] = kv(listed, GGUFValueType.ARRAY, GGUFValueType.BOOL)
    return {f"{architecture}.{name}": value for name, value in found.items()}


def mtp_settled(
    tensors: Sequence[Tensor], architecture: str, metadata: dict[str, GGUFValue], mtp: str | None
) -> tuple[Tensor, ...]:
    """Return the tensors of a GGUF without its layers of multi-token prediction, if those are to be dropped.

    Corrects the keys that count them in ``metadata``. Raises ``UnsupportedError`` for layers to be kept that are not
    there.
    """
    counted, n_mtp = (metadata.get(f"{architecture}.{name}") for name in ("block_count", _NEXTN_KEY))
    if counted is None or n_mtp is None or not n_mtp.value:
        if mtp == KEEP:
            raise UnsupportedError("--mtp keep: the file has no layers of multi-token prediction; drop the option")
        return tuple(tensors)
    if mtp != DROP:
        return tuple(tensors)
    n_layers = counted.value - n_mtp.value
    metadata[f"{architecture}.block_count"] = kv(n_layers, GGUFValueType.UINT32)
    del metadata[f"{architecture}.{_NEXTN_KEY}"]
    recurrent = metadata.get(f"{architecture}.attention.recurrent_layers")
    if recurrent is not None:
        listed = kv(list(recurrent.value)[:n_layers], GGUFValueType.ARRAY, GGUFValueType.BOOL)
        metadata[f"{architecture}.attention.recurrent_layers"] = listed
    return tuple(tensor for tensor in tensors if tensor.layer is None or tensor.layer < n_layers)
