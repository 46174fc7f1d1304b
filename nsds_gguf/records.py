"""The nouns that stages hand to one another: Model in, Scores and Plan along the way.

All are frozen. ``Scores`` and ``Plan`` round-trip through JSON, so that every stage can run alone and be
looked at. Tensors carry GGUF names and roles from the read edge inward; names of other formats stay there.

Shapes are written in numpy order, slowest first: a matrix is ``(n_rows, n_cols)`` = ``(out_features, in_features)``,
stacked experts are ``(n_experts, n_rows, n_cols)``. *bpw* always means bits in the file over weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from .errors import RecordError
from .filestate import FileState

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SCORES_FORMAT = "nsds-gguf scores 1"
PLAN_FORMAT = "nsds-gguf plan 1"

# Progress of a long step: called with (done, total) in whatever unit the step counts.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Ignore progress: the default of every long step."""


# ggml's constant block alignment of tensor data in a GGUF file (GGUF_DEFAULT_ALIGNMENT).
ALIGNMENT_BYTES = 32

# Types of tables and indices, not of weights: such tensors are copied as they are (ggml.h, enum ggml_type).
COPIED_TYPES = ("I8", "I16", "I32", "I64", "F64")

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def role_and_layer(name: str) -> tuple[str, int | None]:
    """Return the role of a GGUF tensor name and its layer; ``None`` for tensors outside the layers of a decoder.

    ``blk.3.attn_q.weight`` is ``("attn_q", 3)``, ``blk.3.attn_q.bias`` is ``("attn_q.bias", 3)``, ``output.weight`` is
    ``("output", None)``.
    """
    match = _LAYER_NAME.fullmatch(name)
    role = (match[2] if match else name).removesuffix(".weight")
    return role, int(match[1]) if match else None


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model under its GGUF name, readable in row slabs.

    Attributes:
        name: GGUF name, for example ``blk.3.attn_q.weight``.
        role: the name without layer and ``.weight``: ``attn_q``, ``ffn_down``, ``token_embd``, ``output``,
            ``attn_norm``; a bias keeps its suffix (``attn_q.bias``).
        layer: 0-based layer number; ``None`` for tensors outside the layers.
        shape: numpy order, slowest first.
        dtype: how the source stores it: ``F32``, ``F16``, ``BF16``; from a GGUF also ``Q8_0``, one of
            ``COPIED_TYPES`` or whatever the user allowed to be quantized once more.
        source: its name in the checkpoint, for messages.
        read_rows: ``read_rows(start, stop) -> (stop - start, n_cols) float32``, rows in GGUF order (for q and k
            of the llama architecture the permuted order), leading dimensions flattened; a fresh array that
            the caller may change. Raises ``ModelError`` when the file has shrunk since it was opened.
        copy_rows: ``copy_rows(start, stop) -> (stop - start, row bytes) uint8``, the rows as they are stored; only
            for tensors that are copied, not quantized.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    source: str
    read_rows: Callable[[int, int], Float32] = field(repr=False, compare=False)
    copy_rows: Callable[[int, int], NDArray[np.uint8]] | None = field(default=None, repr=False, compare=False)

    @property
    def n_cols(self) -> int:
        """Length of a row (the contiguous dimension)."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows, leading dimensions flattened; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """True for what may be quantized: two or more dimensions, a ``.weight``, not integers."""
        return len(self.shape) >= 2 and self.name.endswith(".weight") and self.dtype not in COPIED_TYPES

    def load(self) -> Float32:
        """Return the whole tensor, ``shape`` float32."""
        return self.read_rows(0, self.n_rows).reshape(self.shape)


@dataclass(frozen=True)
class Hparams:
    """The numbers of a decoder that the stages after reading need; 0 where the model does not say.

    Of numbers that differ between layers the largest; a layer's own are in the shapes of its tensors.

    Attributes:
        n_layers: blocks.
        n_embd: width of the residual stream.
        n_ff: hidden units of a feed-forward block.
        n_heads: query heads.
        n_kv_heads: key/value heads.
        head_dim: channels of a query or key head.
        n_vocab: rows of the embedding.
        n_ctx_train: tokens.
        norm_eps: epsilon of the norms.
        activation: ``silu``, ``gelu``, ``relu``, ``relu2`` (squared), ``swiglu_oai`` or ``unknown``.
        qk_norm: whether queries and keys are normalised.
        value_dim: channels of a value head; ``None`` where it is ``head_dim``.
        norm: ``rms``, ``layer`` (subtracts the mean) or ``unknown``.
        parallel_residual: attention and feed-forward block both read what the layer reads although each has its norm.
        embedding_scale: factor on the embedding.
        residual_scale: factor on what each block writes.
        attention_scale: factor on the attention logits; ``None`` where it is ``1 / sqrt(head_dim)``.
        n_experts: routed experts of a layer.
        n_experts_used: of them, how many a token visits.
        experts_scale: factor on the routed experts' sum.
        expert_scores: what makes scores of the router's logits, over all experts: ``softmax`` or ``sigmoid``; those of
            the experts visited are their weights. ``unknown`` where that is not how they are chosen and weighed.
        experts_normed: whether the weights of the experts visited are divided by their sum.
        rope: which channels of queries and keys pair up to be turned by their position: ``neighbours``, ``halves`` (of
            the turned channels) or ``none``.
        rope_dim: channels of a head that are turned.
        rope_theta: base of the frequencies.
        rope_factor: what positions are divided by (linear scaling).
        attention_cap: logits of attention are ``cap * tanh(logits / cap)``; 0 for no cap.
        logit_cap: likewise the logits of the output.
        logit_scale: factor on the logits of the output.
    """

    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    norm_eps: float
    activation: str = "silu"
    qk_norm: bool = False
    value_dim: int | None = None
    norm: Literal["rms", "layer", "unknown"] = "rms"
    parallel_residual: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    n_experts: int = 0
    n_experts_used: int = 0
    experts_scale: float = 1.0
    expert_scores: Literal["softmax", "sigmoid", "unknown"] = "softmax"
    experts_normed: bool = True
    rope: Literal["neighbours", "halves", "none"] = "halves"
    rope_dim: int = 0
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Model:
    """An opened model: what it is, its tensors and the GGUF keys that describe it.

    Attributes:
        path: the folder or file it was opened from.
        architecture: llama.cpp's name of the architecture (``llama``, ``qwen2``, ``qwen3``).
        source_class: class named by the checkpoint, ``LlamaForCausalLM``.
        hparams: the numbers.
        tensors: in the order in which they are written.
        metadata: every GGUF key except those that depend on the plan (``general.file_type``,
            ``general.quantization_version``, ``nsds_gguf.*``).
        notes: facts that the user must see (in the plan and on the screen), one sentence each.
        model_id: hex SHA-256 over what the model is: the architecture's keys, and name, type, shape and first row of
            every tensor.
        files: the GGUF files it was opened from, in order; empty for a folder.
        is_mended: whether llama.cpp takes not ``files`` but what is written of the model: tensors or keys were changed.
        inputs: all files that weights are read from, as they were when it was opened.
    """

    path: Path
    architecture: str
    source_class: str
    hparams: Hparams
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, GGUFValue]
    notes: tuple[str, ...]
    model_id: str
    files: tuple[Path, ...] = ()
    is_mended: bool = False
    inputs: tuple[FileState, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """Tensors by GGUF name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def name(self) -> str:
        """``general.name``, or what the file or folder is called when there is none; printable letters only."""
        entry = self.metadata.get("general.name")
        name = self.path.stem if self.files else self.path.name
        if entry is not None:
            name = entry.value.decode(errors="replace") if isinstance(entry.value, bytes) else str(entry.value)
        return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one layer by role."""
        return {tensor.role: tensor for tensor in self.tensors if tensor.layer == index}

    def unembedding(self) -> Tensor:
        """Return the output projection, or the embedding it is tied to: ``(n_vocab, n_embd)``."""
        return self.by_name.get("output.weight") or self.by_name["token_embd.weight"]

    @property
    def is_tied(self) -> bool:
        """True when the embedding also serves as the output projection."""
        return "output.weight" not in self.by_name


def kv(value: Any, vtype: GGUFValueType, sub_type: GGUFValueType | None = None) -> GGUFValue:
    """Return one typed GGUF metadata value."""
    return GGUFValue(value=value, type=vtype, sub_type=sub_type)


@dataclass(frozen=True)
class LayerScore:
    """Sensitivity of one layer; higher = more sensitive.

    ``nv`` and ``se`` hold the raw value per component (``qk``, ``ov``, ``gate``, ``up``, ``down``, and ``rest``, which
    has no ``se``), ``p_nv`` and ``p_se`` their aggregates in [0, 1], ``None`` where the layer has no component;
    baselines leave these empty and give ``score`` alone, in their own unit.
    """

    layer: int
    score: float
    nv: Mapping[str, float] = field(default_factory=dict)
    se: Mapping[str, float] = field(default_factory=dict)
    p_nv: float | None = None
    p_se: float | None = None


@dataclass(frozen=True)
class TensorCost:
    """What quantizing one tensor costs, without data.

    Attributes:
        name: GGUF name.
        sensitivity: predicted KL divergence (nats per token) per unit of relative error; before the layer factor from
            the scores.
        errors: by type name, ``sum(w * (x - q)**2) / sum(w * x**2)`` over the sampled rows, ``w`` the column
            importance (1 where there is none); with feedback the numerator is ``(x - q)^T H (x - q)``, ``w`` the
            diagonal of H.
        stderr: standard error of each entry of ``errors`` that comes from sampling rows; 0 when all were taken.
        n_rows_sampled: rows that were quantized to measure it.
    """

    name: str
    sensitivity: float
    errors: Mapping[str, float]
    stderr: Mapping[str, float]
    n_rows_sampled: int


@dataclass(frozen=True)
class Scores:
    """Result of scoring, small enough to keep: one score a layer and, when measured, one cost a tensor.

    ``importance`` and ``effort`` name the column importance and the rounding under which ``costs`` was measured;
    ``importance`` is empty, as they are, when only layers were scored. ``settings`` records what else shaped the
    numbers (``se`` reading), ``notes`` what the method cannot see of the model, one sentence each.
    """

    metric: str
    layers: tuple[LayerScore, ...]
    model_id: str
    model_name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    importance: str | None = None
    effort: str = "normal"
    costs: tuple[TensorCost, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format": SCORES_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, source: str = "scores") -> Scores:
        """Build the record from parsed JSON; raises ``RecordError`` naming ``source`` when it does not fit."""
        scores: Scores = _built(cls, _checked(data, SCORES_FORMAT, source), source)
        return scores

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return _digest(self.to_json())


@dataclass(frozen=True)
class Target:
    """The budget asked for: ``kind`` says whether ``value`` is bpw over all tensors or bytes of the whole file."""

    kind: Literal["bpw", "size", "none"]
    value: float

    def __str__(self) -> str:
        """Return the target as the user would write it."""
        if self.kind == "none":
            return "none"
        return f"{self.value:g} bpw" if self.kind == "bpw" else f"{int(self.value)} bytes"


@dataclass(frozen=True)
class PlannedTensor:
    """One line of a plan.

    ``n_bytes`` is without padding. ``error`` is the relative squared error at ``type`` (``None`` when it was not
    measured), ``sensitivity`` the predicted divergence per unit of it including the layer factor, and ``reason``
    why it got this type: ``optimum``, ``pinned``, ``fallback …``, ``kept F32: …``.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    reason: str
    error: float | None = None
    error_stderr: float | None = None
    n_rows_sampled: int | None = None
    sensitivity: float | None = None

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def padded_bytes(self) -> int:
        """Bytes it takes in the file, padding to the alignment included."""
        return -(-self.n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


# Name of the column importance that comes from text that the model writes itself.
SELF = "self"

# How weights are rounded: by ggml's own quantizers, or with feedback from column to column (``rounding``).
EFFORTS = ("normal", "high")

# Types that hold weights as they are: everything else counts as quantized.
UNQUANTIZED = ("F32", "F16", "BF16", *COPIED_TYPES)


@dataclass(frozen=True)
class Plan:
    """A quantization type for every tensor, and what it adds up to.

    Attributes:
        allocator: name of the allocator that made it.
        target: the budget asked for.
        types: the types that were allowed.
        importance: name of the column importance handed to the quantizer (``sweep``, ``norm``, ``none``, ``self``,
            or the name of an importance matrix).
        tensors: one entry per tensor, in the order of the file.
        header_bytes: bytes before the tensor data: header, metadata, tensor table and padding.
        gap: proven relative optimality gap of the solver; ``None`` where nothing was solved.
        notes: what the user must know: ceiling reached, fallbacks, attention window left out, sampling.
        metric, model_id, model_name, scores_digest, versions: where it comes from.
        effort: how weights are rounded, one of ``EFFORTS``.
        score_weight: how much the layer score counted.
    """

    allocator: str
    target: Target
    types: tuple[str, ...]
    importance: str
    tensors: tuple[PlannedTensor, ...]
    header_bytes: int
    model_id: str
    model_name: str
    metric: str | None = None
    gap: float | None = None
    notes: tuple[str, ...] = ()
    scores_digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    effort: str = "normal"
    score_weight: float = 0.0

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors without padding: what llama.cpp counts."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.header_bytes + sum(tensor.padded_bytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits of all tensors over weights of all tensors (llama.cpp's definition)."""
        return self.tensor_bytes * 8 / self.n_weights

    @property
    def quantized_bpw(self) -> float:
        """Bits over weights of the quantized tensors alone; 0 when there are none."""
        quantized = [tensor for tensor in self.tensors if tensor.type not in UNQUANTIZED]
        n_weights = sum(tensor.n_weights for tensor in quantized)
        return sum(tensor.n_bytes for tensor in quantized) * 8 / n_weights if n_weights else 0.0

    @property
    def file_bpw(self) -> float:
        """Bits of the whole file over weights of all tensors."""
        return self.file_bytes * 8 / self.n_weights

    @property
    def unused_bytes(self) -> int:
        """Bytes of the budget that the plan leaves unused; 0 without a budget."""
        if self.target.kind == "bpw":
            return int(self.target.value * self.n_weights / 8) - self.tensor_bytes
        return int(self.target.value) - self.file_bytes if self.target.kind == "size" else 0

    @property
    def predicted_divergence(self) -> float | None:
        """Sum of sensitivity × error over the tensors, in units of the output tensor's; ``None`` if unmeasured."""
        terms = [t.sensitivity * t.error for t in self.tensors if t.error is not None and t.sensitivity is not None]
        return sum(terms) if terms else None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, sums included for readers that are not us."""
        sums = {
            "bpw": self.bpw,
            "quantized_bpw": self.quantized_bpw,
            "file_bpw": self.file_bpw,
            "tensor_bytes": self.tensor_bytes,
            "file_bytes": self.file_bytes,
            "unused_bytes": self.unused_bytes,
        }
        return {"format": PLAN_FORMAT, **asdict(self), "sums": sums}

    @classmethod
    def from_json(cls, data: Any, source: str = "plan") -> Plan:
        """Build the record from parsed JSON; raises ``RecordError`` naming ``source`` when it does not fit."""
        values = _checked(data, PLAN_FORMAT, source)
        values.pop("sums", None)
        plan: Plan = _built(cls, values, source)
        if plan.n_weights < 1 or any(min(tensor.shape, default=0) < 1 for tensor in plan.tensors):
            raise RecordError(f"{source}: tensors: wanted some, with sizes from 1 up; write the plan again")
        return plan

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON without the notes: one model, however it was saved, has one digest."""
        return _digest({key: value for key, value in self.to_json().items() if key != "notes"})


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises ``RecordError`` when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON: {error}; write it again") from error


# What the parts of a record are called in its file.
_JSON_NAMES = {float: "a number", int: "an integer", str: "text", tuple: "a list"}


def _checked(data: Any, wanted: str, source: str) -> dict[str, Any]:
    found = data.get("format") if isinstance(data, dict) else None
    if found != wanted:
        raise RecordError(f"{source}: wanted a file of format {wanted!r}, got {found!r}")
    return {key: value for key, value in data.items() if key != "format"}


def _built(kind: Any, value: Any, source: str, at: str = "") -> Any:
    """Return parsed JSON as a value of an annotated type, one of those that the records of this module use.

    Raises ``RecordError`` naming the first place that does not fit; ``at`` is that of ``value`` in the file.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return _built_record(kind, value, source, at)
    if origin is UnionType:
        return None if value is None else _built(arguments[0], value, source, at)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_built(arguments[0], item, source, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _built(arguments[1], item, source, f"{at}.{key}") for key, item in value.items()}
    if value in arguments if origin is Literal else _is_scalar(kind, value):
        return value
    wanted = " or ".join(arguments) if origin is Literal else _JSON_NAMES.get(origin or kind, "an object")
    raise RecordError(f"{source}: {at}: wanted {wanted}, got {reprlib.repr(value)}; write the file again")


def _built_record(kind: Any, data: Mapping[str, Any], source: str, at: str) -> Any:
    hints = get_type_hints(kind)
    required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    lacking = [name for name in required if name not in data]
    unknown = [name for name in data if name not in hints]
    if lacking or unknown:
        what = f"lacks {lacking[0]!r}" if lacking else f"holds {reprlib.repr(unknown[0])}, which is not known"
        raise RecordError(f"{source}: {at or 'the record'} {what}; write the file again")
    prefix = f"{at}." if at else ""
    return kind(**{name: _built(hints[name], item, source, prefix + name) for name, item in data.items()})


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is float:  # may be written as an integer, and must be finite
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    return type(value) is kind


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
