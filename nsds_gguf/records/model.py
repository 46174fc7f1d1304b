"""An opened model: its tensors, hparams and GGUF keys.

Outside ``read``, tensors have GGUF names and roles only. Shapes are in numpy order, slowest dimension first: a matrix
is ``(n_rows, n_cols)`` = ``(out_features, in_features)``, stacked experts are ``(n_experts, n_rows, n_cols)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ..system.filestate import FileState
from .tensor import Tensor

# Progress of a long step: called with (done, total), in a unit of the step's choice.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Ignore progress: the default of every long step."""


# ggml's constant block alignment of tensor data in a GGUF file (GGUF_DEFAULT_ALIGNMENT).
ALIGNMENT_BYTES = 32


@dataclass(frozen=True)
class Hparams:
    """Hyperparameters of a decoder; 0 where the model does not state one.

    A number that differs between layers is the largest; the shapes of a layer's tensors give its own.

    Attributes:
        n_layers: number of layers, without those of multi-token prediction after them.
        n_embd: width of the residual stream.
        n_ff: hidden units of a feed-forward block.
        n_heads: number of query heads.
        n_kv_heads: number of key/value heads.
        head_dim: channels of a query or key head.
        n_vocab: rows of the embedding.
        n_ctx_train: context length in training, in tokens.
        norm_eps: epsilon of the norms.
        activation: ``silu``, ``gelu``, ``relu``, ``relu2`` (squared), ``swiglu_oai`` or ``unknown``.
        qk_norm: whether queries and keys are normalized.
        value_dim: channels of a value head; ``None`` where it is ``head_dim``.
        norm: ``rms``, ``layer`` (subtracts the mean) or ``unknown``.
        parallel_residual: attention and feed-forward block both read the input of the layer, each through its own norm.
        embedding_scale: factor on the embedding.
        residual_scale: factor on every residual update.
        attention_scale: factor on the attention logits; ``None`` where it is ``1 / sqrt(head_dim)``.
        n_experts: number of routed experts of a layer.
        n_experts_used: number of routed experts that a token uses.
        experts_scale: factor on the sum of the routed experts.
        expert_scores: function from the router's logits to scores, over all experts: ``softmax`` or ``sigmoid``; the
            scores of the chosen experts are their weights. ``unknown`` where the router works otherwise.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum.
        rope: which channels of queries and keys are rotated in pairs: ``norm`` (adjacent channels), ``neox`` (one of
            each half of the rotated channels) or ``none``.
        rope_dim: rotated channels of a head.
        rope_theta: base of the frequencies.
        rope_factor: divisor of positions (linear scaling).
        attn_logit_softcapping: attention logits become ``cap * tanh(logits / cap)``; 0 for no cap.
        final_logit_softcapping: the same for the output logits.
        logit_scale: factor on the output logits.
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
    norm_topk_prob: bool = True
    rope: Literal["norm", "neox", "none"] = "neox"
    rope_dim: int = 0
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Model:
    """An opened model: its tensors, hparams and GGUF keys.

    Attributes:
        path: the folder or file it was opened from.
        architecture: llama.cpp's name of the architecture (``llama``, ``qwen2``, ``qwen3``).
        source_class: class that the checkpoint names, such as ``LlamaForCausalLM``.
        hparams: the hyperparameters.
        tensors: in the order of the output file.
        metadata: every GGUF key except those that depend on the plan (``general.file_type``,
            ``general.quantization_version``, ``nsds_gguf.*``).
        notes: facts that the user must see (in the plan and on the screen), one sentence each.
        model_id: hex SHA-256 of the architecture's keys and of the name, type, shape and first row of every tensor.
        files: the GGUF files it was opened from, in order; empty for a folder.
        is_repaired: whether tensors or keys were changed, so that ``files`` are not the model that is converted.
        inputs: state of all weight files when the model was opened.
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
    is_repaired: bool = False
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
        """``general.name``, else the name of the file or folder; unprintable characters replaced."""
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
        """True when the embedding doubles as the output projection."""
        return "output.weight" not in self.by_name


def kv(value: Any, vtype: GGUFValueType, sub_type: GGUFValueType | None = None) -> GGUFValue:
    """Return one typed GGUF metadata value."""
    return GGUFValue(value=value, type=vtype, sub_type=sub_type)
