"""Map the tensors of a checkpoint to those of a GGUF: all used, none missing, rows in GGUF order."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from ..errors import ModelError, UnsupportedError
from ..records import Stack, Tensor, kv
from ..records.transforms import MinusExp, PlusOne, Reshape, TakeColumns, TakeRows, Transform, Transpose
from .architectures.families import IGNORED
from .architectures.family import Config, Family, Part, Sizes
from .architectures.mtp import mtp_layers, mtp_parts
from .missing import check_complete
from .names import Found, Wanted, find_names
from .stored import StoredTensor, same_values, some

_IDENTITY_WEIGHTS = 1024  # of every tensor: enough to distinguish fine-tunes, and cheap to read

Stored = Mapping[str, StoredTensor]
Order = NDArray[np.intp]

# Names of other parts of a multimodal checkpoint.
_OTHER_MODELS = re.compile(
    r"(^|\.)(vision_tower|vision_model|multi_modal_projector|multimodal_projector|connector|image_newline|"
    r"audio_tower|visual|embed_vision|embed_audio)"
    r"(\.|$)"
)

# Layers of multi-token prediction, in addition to the model's own.
_MTP = re.compile(r"(model\.|language_model\.)*mtp\.")


# --- orders of rows -------------------------------------------------------------------------------------------


def rope_row_order(n_heads: int, head_dim: int) -> Order:
    """Return the checkpoint row of each GGUF row of q or k, ``(n_heads * head_dim,)``.

    transformers rotates channel ``j`` of a head with ``j + head_dim / 2`` (NEOX), ggml's NORM rope ``2j`` with
    ``2j + 1``: the rows of the two halves are interleaved (llama.cpp conversion, ``permute``).
    """
    rows = np.arange(n_heads * head_dim, dtype=np.intp).reshape(n_heads, 2, head_dim // 2)
    order: Order = rows.swapaxes(1, 2).ravel()
    return order


def _by_head_qkv(sizes: Sizes) -> Order:
    """GPT-NeoX stores q, k and v head by head; GGUF all of q, then all of k, then all of v."""
    rows = np.arange(sizes["qkv"], dtype=np.intp).reshape(sizes["heads"], 3, sizes["head"])
    order: Order = rows.swapaxes(0, 1).ravel()
    return order


def _grouped(sizes: Sizes) -> Order:
    """InternLM 2 stores, for each key/value head, its queries, its key and its value: the rows by group and part."""
    per_group = sizes["heads"] // sizes["kv_heads"]
    return np.arange(sizes["qkv"], dtype=np.intp).reshape(sizes["kv_heads"], per_group + 2, sizes["head"])


def _grouped_q(sizes: Sizes) -> Order:
    return _grouped(sizes)[:, :-2].ravel()[rope_row_order(sizes["heads"], sizes["head"])]


def _grouped_k(sizes: Sizes) -> Order:
    return _grouped(sizes)[:, -2].ravel()[rope_row_order(sizes["kv_heads"], sizes["head"])]


def _half(n: int, n_rows: int, which: int) -> Order:
    """Return the rows of the first (0) or second (1) half of each of ``n`` stacked matrices of ``2 n_rows``."""
    return np.arange(n * 2 * n_rows, dtype=np.intp).reshape(n, 2, n_rows)[:, which].ravel()


def _every_second(sizes: Sizes, first: int) -> Order:
    """Return the even (0) or odd (1) rows of all experts."""
    return np.arange(first, sizes["experts"] * sizes["2ff_exp"], 2, dtype=np.intp)


def _part_of_heads(sizes: Sizes, which: slice) -> Order:
    """DeepSeek stores, for each head, the rows of its key, then those of its value."""
    rows = np.arange(sizes["kv_b"], dtype=np.intp).reshape(sizes["heads"], sizes["nope"] + sizes["v_head"])
    return rows[:, which].ravel()


def _delta_parts(sizes: Sizes) -> list[Order]:
    """Return the rows of queries, keys, values and gates, which Qwen3-Next stores together for each key head."""
    heads, head = sizes["k_heads"], sizes["delta_k"] // sizes["k_heads"]
    values = sizes["delta_v"] // heads
    rows = np.arange(sizes["delta_qkvz"], dtype=np.intp).reshape(heads, -1)
    return [part.ravel() for part in np.split(rows, np.cumsum([head, head, values]), axis=1)]


def _turns(sizes: Sizes, head: int) -> Order:
    """Return value heads in llama.cpp's order, the first of every key head first; Qwen 3.5 groups them by key head."""
    shape = (sizes["k_heads"], sizes["v_heads/k_heads"], head)
    order: Order = np.arange(math.prod(shape), dtype=np.intp).reshape(shape).swapaxes(0, 1).ravel()
    return order


def _turns_qkv(sizes: Sizes) -> Order:
    before = 2 * sizes["delta_k"]
    return np.concatenate([np.arange(before, dtype=np.intp), before + _turns(sizes, sizes["delta_head"])])


# Stored row of each GGUF row, leading dimensions flattened.
ROW_ORDERS: Mapping[str, Callable[[Sizes], Order]] = {
    "rope_q": lambda sizes: rope_row_order(sizes["heads"], sizes["head"]),
    "rope_k": lambda sizes: rope_row_order(sizes["kv_heads"], sizes["head"]),
    "by_head_qkv": _by_head_qkv,
    "grouped_q": _grouped_q,
    "grouped_k": _grouped_k,
    "grouped_v": lambda sizes: _grouped(sizes)[:, -1].ravel(),
    "first_half_exps": lambda sizes: _half(sizes["experts"], sizes["ff_exp"], 0),
    "second_half_exps": lambda sizes: _half(sizes["experts"], sizes["ff_exp"], 1),
    "even_exps": lambda sizes: _every_second(sizes, 0),
    "odd_exps": lambda sizes: _every_second(sizes, 1),
    "first_half_shexp": lambda sizes: _half(1, sizes["ff_shexp"], 0),
    "second_half_shexp": lambda sizes: _half(1, sizes["ff_shexp"], 1),
    "first_part_of_heads": lambda sizes: _part_of_heads(sizes, slice(0, sizes["nope"])),
    "rope_vision": lambda sizes: rope_row_order(sizes["heads"], sizes["embd"] // sizes["heads"]),
    "vision_q": lambda sizes: np.arange(sizes["embd"]),
    "vision_k": lambda sizes: np.arange(sizes["embd"], 2 * sizes["embd"]),
    "vision_v": lambda sizes: np.arange(2 * sizes["embd"], 3 * sizes["embd"]),
    "frame_0": lambda sizes: _half(sizes["embd"] * sizes["channels"], sizes["patch"], 0),
    "frame_1": lambda sizes: _half(sizes["embd"] * sizes["channels"], sizes["patch"], 1),
    "token": lambda sizes: np.array([sizes["token"]], np.intp),
    "delta_qkv": lambda sizes: np.concatenate(_delta_parts(sizes)[:3]),
    "delta_z": lambda sizes: _delta_parts(sizes)[3],
    "turns_qkv": _turns_qkv,
    "turns_v": lambda sizes: _turns(sizes, sizes["delta_head"]),
    "turns_heads": lambda sizes: _turns(sizes, 1),
    "last_part_of_heads": lambda sizes: _part_of_heads(sizes, slice(sizes["nope"], None)),
}

# Stored column of each column that a part takes.
COLUMN_ORDERS: Mapping[str, Callable[[Sizes], Order]] = {
    "even": lambda sizes: np.arange(0, sizes["2ff_exp"], 2, dtype=np.intp),
    "odd": lambda sizes: np.arange(1, sizes["2ff_exp"], 2, dtype=np.intp),
    "first": lambda sizes: np.arange(sizes["ff_exp"], dtype=np.intp),
    "second": lambda sizes: np.arange(sizes["ff_exp"], sizes["2ff_exp"], dtype=np.intp),
    "turns_v": ROW_ORDERS["turns_v"],
}

# Elementwise changes, in float32.
CHANGES: Mapping[str, Transform] = {"plus_one": PlusOne(), "minus_exp": MinusExp()}


# --- from names to tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    """The tensors in GGUF order, notes of one sentence each, and a hex SHA-256 that identifies the tensors.

    ``n_mtp`` is the number of layers of multi-token prediction among them. The digest covers names, types, shapes and
    the first row of each tensor, independent of the checkpoint's layout.
    """

    tensors: list[Tensor]
    notes: list[str]
    digest: str
    n_mtp: int = 0


def map_tensors(
    checkpoint: Stored,
    config: Config,
    family: Family,
    sizes: Sizes,
    is_wrapped: bool,
    hints: Sequence[str] = (),
    mtp: str | None = None,
) -> Mapped:
    """Return the tensors in GGUF order; raise unless all tensors are used and none is missing.

    Args:
        checkpoint: the tensors by name.
        config: canonical settings.
        family: of the model.
        sizes: of the dimensions.
        is_wrapped: whether the checkpoint may hold other models (vision, audio) beside the language model.
        hints: to add to the error for missing tensors, one sentence each.
        mtp: what to do with layers of multi-token prediction; see ``mtp_layers``.

    Raises:
        ModelError: a tensor is missing, has another shape than config.json states, or contradicts the tie.
        UnsupportedError: a tensor is not used.

    """
    tied = bool(config["tie_word_embeddings"])
    n_mtp = mtp_layers(checkpoint.keys(), family, sizes["layers"], mtp)
    sizes = {**sizes, "2embd": 2 * sizes["embd"]}
    wanted = [*_wanted(config, family, sizes, tied), *_wanted_mtp(checkpoint, config, family, sizes, n_mtp)]
    _check_stacks(wanted, sizes, checkpoint)
    found = find_names(checkpoint, wanted, family, sizes)
    used = {name for _, names in found.places for name in names}
    check_complete(found, hints)
    if tied:
        used |= {found.layout.actual(name) for name in _outputs(family)}
    notes = [*found.notes, *(_tie_notes(found, family) if tied else [])]
    if tied and family.output == "required":
        notes.append(f"The embedding is written twice: llama.cpp's {family.architecture} has no tied output.")
    strict = replace(family, extra_layers=family.extra_layers and not n_mtp)
    left_out = _left_over(found, used, strict, is_wrapped, sizes["layers"])
    if left_out:
        notes.append(f"Only the language model is converted; left out: {left_out}.")
    digest, tensors = hashlib.sha256(), []
    for item, names in found.places:
        stored = [_reshaped(found.stored[name], item.part, sizes) for name in names]
        tensor = tensor_of(item, stored, sizes)
        tensors.append(tensor)
        digest.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(_first_row(item.part, stored[0], sizes))
    return Mapped(tensors, notes, digest.hexdigest(), n_mtp)


def layer_numbers(checkpoint: Stored, family: Family, n_layers: int) -> dict[str, GGUFValue]:
    """Return the keys with a number per layer that the checkpoint holds as tensors of one weight.

    Raises ``ModelError`` for a missing tensor, and for one with more than one weight.
    """
    keys = {}
    for key, name in family.layer_numbers.items():
        names = [family.layer_prefix.format(i=i) + name for i in range(n_layers)]
        wrong = [name for name in names if name not in checkpoint or math.prod(checkpoint[name].shape) != 1]
        if wrong:
            raise ModelError(f"tensors missing from the weights, or not of one number: {some(wrong)}")
        values = [float(checkpoint[name].rows(slice(0, 1)).item()) for name in names]
        keys[key] = kv(values, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    return keys


def _check_stacks(wanted: Sequence[Wanted], sizes: Sizes, checkpoint: Stored) -> None:
    """Raise ``ModelError`` for more experts than the weights can hold, before generating all names."""
    most = max([len(checkpoint), *(tensor.shape[0] for tensor in checkpoint.values() if len(tensor.shape) == 3)])
    for item in wanted:
        if "{e}" in item.part.source and sizes[item.part.shape[0]] > most:
            raise ModelError(
                f"config.json: {item.name} consists of {sizes[item.part.shape[0]]} matrices, the weights hold at most "
                f"{most}; config.json belongs to another model"
            )


def _first_row(part: Part, stored: StoredTensor, sizes: Sizes) -> bytes:
    """Return the first entries of the stored row for the first GGUF row, as float32."""
    is_matrix = len(stored.shape) > 1
    row = int(ROW_ORDERS[part.order](sizes)[0]) if part.order and is_matrix else 0
    return stored.values(slice(row, row + 1), slice(0, _IDENTITY_WEIGHTS)).tobytes()


def _outputs(family: Family) -> list[str]:
    """Return every possible name of the output projection."""
    return [form.source + form.suffix for form in family.outside["output"].forms]


def _wanted(config: Config, family: Family, sizes: Sizes, tied: bool) -> list[Wanted]:
    """Return every tensor that the model must have, in GGUF order: embeddings, layers, output.

    A tied model may store the embedding under the name of the output.
    """
    embedding = family.outside["token_embd"]
    if tied:
        embedding = replace(embedding, also=tuple(replace(embedding, source=name) for name in _output_sources(family)))
    if tied and family.output == "required":
        output = {"output": replace(embedding, shape=family.outside["output"].shape)}
    elif tied:
        output = {}
    elif family.output == "tied":
        raise UnsupportedError(
            f"config.json: tie_word_embeddings false: llama.cpp's {family.architecture} has no output projection "
            "of its own"
        )
    else:
        output = {"output": family.outside["output"]}
    outside = {role: part for role, part in family.outside.items() if role != "output"} | {"token_embd": embedding}
    before = {role: part for role, part in outside.items() if role.endswith("_embd")}
    after = {role: part for role, part in outside.items() if role not in before}
    found = list(_with_biases("", None, before, config))
    for i in range(sizes["layers"]):
        prefix = family.layer_prefix.format(i=i)
        parts = {role: part.within(prefix) for role, part in family.parts_of(config, i).items()}
        found += _with_biases(f"blk.{i}.", i, parts, config)
    return [*found, *_with_biases("", None, {**after, **output}, config)]


def _wanted_mtp(checkpoint: Stored, config: Config, family: Family, sizes: Sizes, n_mtp: int) -> Iterator[Wanted]:
    """Yield the tensors of the layers of multi-token prediction."""
    for number in range(n_mtp):
        layer = sizes["layers"] + number
        parts = mtp_parts(checkpoint.keys(), config, family, sizes["layers"], number)
        yield from _with_biases(f"blk.{layer}.", layer, parts, config)


def _with_biases(prefix: str, layer: int | None, parts: Mapping[str, Part], config: Config) -> Iterator[Wanted]:
    for role, part in parts.items():
        if part.when(config):
            yield Wanted(prefix + part.gguf_name(role), role, layer, part, steps=part.steps(config))
            if part.bias(config):
                yield Wanted(f"{prefix}{role}.bias", f"{role}.bias", layer, part, is_bias=True)


def _output_sources(family: Family) -> list[str]:
    return [form.source for form in family.outside["output"].forms]


def _tie_notes(found: Found, family: Family) -> list[str]:
    """Return the note on a tied output that is stored; raise unless it equals the embedding.

    transformers 4 ignores it and transformers 5 uses it, so a model with a different one cannot be converted
    faithfully.
    """
    stored, actual = found.stored, found.layout.actual
    embedding = actual(family.embedding)
    output = next((name for name in map(actual, _outputs(family)) if name in stored), None)
    if output is None:
        return []
    if embedding not in stored:
        return [f"The embedding is read from {output}, to which config.json ties it."]
    if not same_values(stored[embedding], stored[output]):
        raise ModelError(
            f"config.json ties {output} to {embedding}, but the stored ones differ: "
            f"set tie_word_embeddings to false to keep {output}, or remove it from the weights"
        )
    return [f"{output} is left out: it is the embedding, to which config.json ties it."]


def _left_over(found: Found, used: set[str], family: Family, is_wrapped: bool, n_layers: int) -> str:
    """Return, in words, the skipped tensors of other models; raise for an unused tensor of this model."""
    actual = found.layout.actual
    numbers = (re.escape(name) for name in family.layer_numbers.values())
    of_layers = [re.escape(family.layer_prefix).replace(r"\{i\}", r"\d+") + name for name in numbers]
    patterns = [*IGNORED, *of_layers, *(re.escape(actual("")) + pattern for pattern in family.ignored)]
    left = [name for name in found.stored if name not in used and not any(re.fullmatch(p, name) for p in patterns)]
    beyond = actual(family.layer_prefix.format(i=n_layers)) if family.extra_layers else None
    extra = {name for name in left if beyond is not None and (name.startswith(beyond) or _MTP.match(name))}
    foreign = {name for name in left if is_wrapped and _OTHER_MODELS.search(name)} | extra
    unplaced = [name for name in left if name not in foreign]
    if unplaced:
        raise UnsupportedError(
            f"tensors that llama.cpp's {family.architecture}, as config.json describes it, has no place for: "
            f"{some(unplaced)}"
        )
    groups: dict[str, int] = {}
    for name in foreign:
        match = _OTHER_MODELS.search(name)
        group = match[2] if match else "layer of multi-token prediction"
        groups[group] = groups.get(group, 0) + 1
    return ", ".join(f"{group} ({count} tensors)" for group, count in sorted(groups.items()))


def tensor_of(wanted: Wanted, stored: Sequence[StoredTensor], sizes: Sizes) -> Tensor:
    """Return a GGUF tensor from its stored tensors; raise ``ModelError`` for another shape than config.json states."""
    part = wanted.part
    shape = tuple(sizes[name] for name in part.shape)
    shape, in_file = shape[:1] if wanted.is_bias else shape, wanted.stored_shape(sizes)
    for tensor in stored:
        tensor.require_readable()
        if tensor.shape != in_file:
            disagree = "vocabulary size and embedding rows disagree"
            hint = disagree if wanted.role in ("token_embd", "output") else "see config.json"
            raise ModelError(f"{tensor.file}: tensor {tensor.name}: wanted shape {in_file}, got {tensor.shape}: {hint}")
    first, transforms = stored[0], (*_transforms(part, stored, shape, sizes, wanted.is_bias), *wanted.steps)
    source = first if len(stored) == 1 else Stack(tuple(stored))
    return Tensor(wanted.name, wanted.role, wanted.layer, shape, first.dtype, first.name, source, transforms)


def _reshaped(tensor: StoredTensor, part: Part, sizes: Sizes) -> StoredTensor:
    """Return a convolution with its dimension of size 1 in the class's position; MLX has it last."""
    if "one" not in part.stored or len(tensor.shape) != len(part.stored) or tensor.shape[-1] != 1:
        return tensor
    in_file = tuple(sizes[name] for name in part.stored)
    return replace(tensor, shape=in_file) if (*tensor.shape[:-2], 1, tensor.shape[-2]) == in_file else tensor


def _transforms(
    part: Part, stored: Sequence[StoredTensor], shape: tuple[int, ...], sizes: Sizes, is_bias: bool
) -> Iterator[Transform]:
    """Yield the transforms from stored rows to GGUF rows; members of a stack need none."""
    is_stack, is_vector = len(stored) > 1, len(stored[0].shape) == 1
    if part.order and not is_stack:
        order = ROW_ORDERS[part.order](sizes)
        yield TakeColumns(order) if is_vector else TakeRows(order)  # a bias is one row whose entries are permuted
    if part.columns:
        yield TakeColumns(COLUMN_ORDERS[part.columns](sizes))
    if part.transposed and not is_bias and not is_stack:
        yield Transpose((math.prod(shape[:-2]), shape[-2], shape[-1]))
    elif is_vector and len(shape) > 1 and not is_stack:
        yield Reshape((math.prod(shape[:-1]), shape[-1]))
    if part.change and not is_bias:
        yield CHANGES[part.change]
