"""The memory that llama.cpp takes to run a model: formulas of keys and shapes, nothing is read or asked.

They follow llama.cpp's source for one sequence, flash attention and physical batches of 512 tokens, its defaults:

* which layers have which cache: ``llama_model::create_memory`` in src/llama-model.cpp, ``load_arch_hparams`` in
  src/models/*.cpp
* keys and values: ``llama_kv_cache``; sliding windows: ``llama_kv_cache_iswa`` (src/llama-kv-cache*.cpp)
* recurrent states: ``llama_memory_recurrent``; their sizes: ``llama_hparams::n_embd_r`` and ``n_embd_s``
* buffers of results: ``llama_context::output_reserve``; compute buffers: ``sched_reserve``, where ggml-alloc lays out a
  graph. Its peaks were fitted to what llama.cpp reports, see ``compute_bytes``.

``Engine.memory`` in ``binding`` returns llama.cpp's own figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import PlanError, UnsupportedError
from . import ggml
from .binding import N_PHYSICAL_BATCH

# Types of the KV cache that llama.cpp's programs accept (common/arg.cpp, kv_cache_types).
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

_PADDING = 256  # cells of a cache are padded to it
_F16, _F32 = 2, 4

Shape = tuple[int, ...]


class Window(NamedTuple):
    """Where an architecture has sliding windows.

    Attributes:
        pattern: of so many layers one attends to everything, unless keys name the layers; 0: keys must.
        is_first: whether that one is the first of them, not the last.
        size: tokens of the window where no key states them; 0: no windows then.
        fixed: tokens of the window, whatever size a key states; 0: the key counts.
    """

    pattern: int
    is_first: bool = False
    size: int = 0
    fixed: int = 0


# Architectures that llama.cpp runs with sliding windows. Others ignore the key ``attention.sliding_window``.
WINDOWS = {
    "afmoe": Window(4),
    "cohere2": Window(4),
    "cohere2moe": Window(4, is_first=True),
    "exaone-moe": Window(4, size=128),
    "gemma2": Window(2, size=4096),
    "gemma3": Window(6),
    "gemma3n": Window(5),
    "gemma4": Window(0),
    "gpt-oss": Window(2),
    "granite_swa": Window(0),
    "laguna": Window(4, is_first=True),
    "llama4": Window(4, size=8192, fixed=8192),
    "maple": Window(0),
    "mellum": Window(4),
    "mimo2": Window(0),
    "muse-glimmer": Window(4),
    "olmo2": Window(4),
    "plamo3": Window(8),
    "smallthinker": Window(4, is_first=True, fixed=4096),
    "spark2_5": Window(0),
    "step35": Window(0),
}
# Architectures whose models have windows only with so many layers (the 32B).
_LAYERS_WITH_WINDOWS: dict[str, tuple[int, Window | None]] = {"exaone4": (64, Window(4, size=4096))}

# Architectures with recurrent states, and how they name the layers that have them: all layers; those without key/value
# heads; those that a key or an interval names.
RECURRENT = {
    "mamba": "all",
    "mamba2": "all",
    "falcon-h1": "all",
    "granitehybrid": "heads",
    "jamba": "heads",
    "kimi-linear": "heads",
    "lfm2": "heads",
    "lfm2moe": "heads",
    "nemotron_h": "heads",
    "nemotron_h_moe": "heads",
    "plamo2": "heads",
    "qwen35": "interval",
    "qwen35moe": "interval",
    "qwen3next": "interval",
}
_BOTH_EVERYWHERE = ("falcon-h1",)  # attention and a state in every layer

_NO_CACHE = "it computes a whole text at once, without a KV cache, in buffers that grow with the text"
_INDEXER = "its attention keeps a second cache, of an indexer"
_OTHER = "llama.cpp keeps states for it that have no formula here"
_TWO_MODELS = "it runs together with a second model and shares its cache"
WITHOUT_FORMULA = {
    **dict.fromkeys(
        (
            "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe",
            "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "t5", "t5encoder", "wavtokenizer-dec",
        ),
        _NO_CACHE,
    ),
    **dict.fromkeys(
        ("deepseek32", "deepseek4", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "minimax-m3", "qwen4exp"), _INDEXER
    ),
    **dict.fromkeys(
        ("arwkv7", "bailingmoe3", "hrm_text", "kimi-k3", "minimax-01", "pockettts", "qwen3tts", "rwkv6", "rwkv6qwen2",
         "rwkv7"),
        _OTHER,
    ),
    **dict.fromkeys(("dflash", "eagle3", "gemma4-assistant"), _TWO_MODELS),
}  # fmt: skip


@dataclass(frozen=True)
class Context:
    """How a model is run: tokens of the context, and one of ``CACHE_TYPES``."""

    n_ctx: int
    cache_type: str = "f16"

    @property
    def n_cells(self) -> int:
        """Cells of a cache without a window."""
        return _padded(self.n_ctx)

    @property
    def n_tokens(self) -> int:
        """Tokens computed at once."""
        return min(self.n_ctx, N_PHYSICAL_BATCH)


@dataclass(frozen=True)
class Memory:
    """Bytes that llama.cpp takes to run a model.

    Attributes:
        weights: data of the tensors.
        attention_cache: keys and values of the tokens seen.
        states: of recurrent layers.
        compute: intermediate results of a batch.
        output: logits of a token.
        projector: the file of a vision or audio part.
    """

    weights: int
    attention_cache: int
    states: int
    compute: int
    output: int
    projector: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.beside_weights

    @property
    def beside_weights(self) -> int:
        """All but the weights."""
        return self.attention_cache + self.states + self.compute + self.output + self.projector

    def holding(self, weights: int) -> Memory:
        """Return the same for weights of another size."""
        return replace(self, weights=weights)


def memory(architecture: str, keys: Mapping[str, Any], shapes: Mapping[str, Shape], context: Context) -> Memory:
    """Return the memory of a model without its weights.

    Args:
        architecture: ``general.architecture``.
        keys: plain values of the GGUF keys, with the architecture's prefix.
        shapes: of the tensors by GGUF name, in numpy order.
        context: how the model is run.

    Raises:
        UnsupportedError: no formula is known for this architecture; the message says why.
        PlanError: the type of the cache does not fit the model's heads.

    """
    if architecture in WITHOUT_FORMULA:
        raise UnsupportedError(
            f"the memory of architecture {architecture} is not known: {WITHOUT_FORMULA[architecture]}"
        )
    dims = Dimensions(architecture, keys, shapes)
    if architecture not in RECURRENT and any(".ssm_" in name or ".time_mix" in name for name in shapes):
        raise UnsupportedError(f"the memory of architecture {architecture} is not known: {_OTHER}")
    return Memory(
        weights=0,
        attention_cache=attention_cache_bytes(dims, context),
        states=state_bytes(dims),
        compute=compute_bytes(dims, context),
        output=dims.n_vocab * _F32,
    )


class Dimensions:
    """What the formulas need to know of a model: lists have an entry per layer.

    Layers that predict further tokens (MTP) are left out: llama.cpp loads them on request alone.
    """

    def __init__(self, architecture: str, keys: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
        """Take keys and shapes as ``memory`` does."""
        self.architecture, self._keys, self.shapes = architecture, keys, shapes
        self.n_all_layers = int(self.get("block_count", 0))
        self.n_layers = self.n_all_layers - int(self.get("nextn_predict_layers", 0))
        self.width = int(self.get("embedding_length", 0))
        embedding = shapes.get("output.weight") or shapes.get("token_embd.weight") or (int(self.get("vocab_size", 0)),)
        self.n_vocab = embedding[0]
        self.heads = self._per_layer("attention.head_count")
        self.kv_heads = self._per_layer("attention.head_count_kv", self.heads)
        self.ff = self._per_layer("feed_forward_length")
        usual = self.width // max(self.heads) if max(self.heads, default=0) else 0
        self.key_dim = int(self.get("attention.key_length", usual))
        self.value_dim = int(self.get("attention.value_length", usual))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture."""
        value = self._keys.get(f"{self.architecture}.{name}")
        return default if value is None else value

    def _per_layer(self, name: str, default: list[int] | None = None) -> list[int]:
        value = self.get(name)
        if value is None:
            return default if default is not None else [0] * self.n_layers
        values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)] * self.n_all_layers
        return values[: self.n_layers]

    @cached_property
    def is_latent(self) -> bool:
        """Whether attention is latent (MLA): keys and values share one compressed vector."""
        return self.get("attention.key_length_mla") is not None

    @cached_property
    def _window(self) -> Window | None:
        n_layers, window = _LAYERS_WITH_WINDOWS.get(self.architecture, (self.n_layers, WINDOWS.get(self.architecture)))
        return window if n_layers == self.n_layers else None

    @cached_property
    def window(self) -> int:
        """Tokens of the sliding windows; 0 without any."""
        if self._window is None:
            return 0
        stated = int(self.get("attention.sliding_window", self._window.size))
        return self._window.fixed if stated and self._window.fixed else stated

    @cached_property
    def has_window(self) -> list[bool]:
        """Which layers attend to a sliding window only."""
        if self._window is None or not self.window:
            return [False] * self.n_layers
        stated = self.get("attention.sliding_window_pattern", self._window.pattern)
        if isinstance(stated, list | tuple):
            return [bool(v) for v in stated][: self.n_layers]
        n, full = int(stated), 0 if self._window.is_first else int(stated) - 1
        return [n == 0 or i % n != full for i in range(self.n_layers)]

    @cached_property
    def is_recurrent(self) -> list[bool]:
        """Which layers keep a state."""
        kind = RECURRENT.get(self.architecture)
        if kind is None or kind == "all":
            return [kind == "all"] * self.n_layers
        if kind == "heads":
            no_block = self.architecture.startswith("nemotron_h")  # there a layer is attention, a state or a block
            return [h == 0 and not (no_block and f) for h, f in zip(self.kv_heads, self.ff, strict=True)]
        stated = self.get("attention.recurrent_layers")
        if isinstance(stated, list | tuple):
            return [bool(v) for v in stated][: self.n_layers]
        interval = int(self.get("full_attention_interval", 4))
        return [(i + 1) % interval != 0 for i in range(self.n_layers)]

    @cached_property
    def attends(self) -> list[bool]:
        """Which layers keep keys and values of their own."""
        first_shared = self.n_layers
        if self.architecture == "gemma3n":
            first_shared = 20
        elif self.architecture == "gemma4":
            first_shared = self.n_all_layers - int(self.get("attention.shared_kv_layers", 0))
        both = self.architecture in _BOTH_EVERYWHERE
        return [
            i < first_shared and self.kv_heads[i] > 0 and (both or not self.is_recurrent[i])
            for i in range(self.n_layers)
        ]

    def head_dims(self, layer: int) -> tuple[int, int]:
        """Return the channels of a key and a value head; those of a layer with a window may differ."""
        if not self.has_window[layer]:
            return self.key_dim, self.value_dim
        key, value = (self.get(f"attention.{name}_length_swa") for name in ("key", "value"))
        return int(key or self.key_dim), int(value or self.value_dim)


def attention_cache_bytes(dims: Dimensions, context: Context) -> int:
    """Return the bytes of keys and values.

    A layer keeps a row of ``kv_heads * head_dim`` numbers a token, for keys and for values; latent attention keeps keys
    alone. A window keeps its own tokens and those of a batch (``llama_kv_cache_iswa``).
    """
    n_bytes = 0
    for layer in filter(lambda i: dims.attends[i], range(dims.n_layers)):
        key, value = dims.head_dims(layer)
        _check_cache_type(context.cache_type, key, value)
        n_cells = window_cells(dims, context) if dims.has_window[layer] else context.n_cells
        rows = [dims.kv_heads[layer] * key] + ([] if dims.is_latent else [dims.kv_heads[layer] * value])
        n_bytes += sum(n_cells * row_bytes(context.cache_type, n) for n in rows)
    return n_bytes


def window_cells(dims: Dimensions, context: Context) -> int:
    """Return the cells of a cache with a sliding window."""
    return _padded(min(context.n_cells, dims.window + context.n_tokens))


def state_bytes(dims: Dimensions) -> int:
    """Return the bytes of recurrent states, in F32: inputs of the convolution, and the state proper.

    They do not depend on the context. Formulas: ``n_embd_r`` and ``n_embd_s``.
    """
    conv, inner, state, groups = (
        int(dims.get(f"ssm.{name}", 0)) for name in ("conv_kernel", "inner_size", "state_size", "group_count")
    )
    if dims.get("shortconv.l_cache"):  # LFM2
        numbers = dims.width * (int(dims.get("shortconv.l_cache")) - 1)
    elif dims.get("kda.head_dim"):  # Kimi Delta Attention
        head, n_heads = int(dims.get("kda.head_dim")), max(dims.heads)
        numbers = 3 * (conv - 1 if conv else 3) * n_heads * head + head * head * n_heads
    else:  # Mamba, and gated delta nets
        numbers = max(0, conv - 1) * (inner + 2 * groups * state) + state * inner
    return sum(dims.is_recurrent) * numbers * _F32


def compute_bytes(dims: Dimensions, context: Context) -> int:
    """Return the bytes of intermediate results, the largest of several moments.

    Numbers a token, fitted to ``compute buffer size`` of 40 models of random weights; the layout that ggml-alloc finds
    is up to a tenth smaller or larger. The attention masks (F16, a number for each cell and token) are there for as
    long as layers are.
    """
    layer = max(_attention(dims), _feed_forward(dims), _experts(dims), _state_space(dims))
    masks = 0
    if any(dims.attends):
        masks = context.n_cells * (not all(dims.has_window))
        masks += window_cells(dims, context) if any(dims.has_window) else 0
    in_layers = masks * _F16 + layer * _F32
    at_output = (dims.n_vocab + (3 if dims.get("ssm.inner_size") else 2) * dims.width) * _F32
    return context.n_tokens * max(in_layers, at_output)


def _attention(dims: Dimensions) -> int:
    """Return queries, keys and values before and after rope; of latent attention the queries in latent channels."""
    n_heads, n_kv_heads = max(dims.heads, default=0), max(dims.kv_heads, default=0)
    if dims.is_latent:
        latent = int(dims.get("attention.kv_lora_rank", 0))
        head = latent + dims.key_dim + int(dims.get("attention.key_length_mla"))
        return n_heads * head + 5 * dims.width
    return (2 * n_heads + 2 * n_kv_heads) * dims.key_dim + 3 * dims.width if any(dims.attends) else 0


def _feed_forward(dims: Dimensions) -> int:
    """Return hidden units: gate, up and their product, or up alone."""
    hidden, rows = max(dims.ff, default=0), {shape[0] for name, shape in dims.shapes.items() if ".ffn_up.w" in name}
    if not rows:
        return 0
    is_gated = 2 * hidden in rows or any(".ffn_gate.w" in name for name in dims.shapes)
    if not is_gated:
        return hidden + 4 * dims.width
    gap = max(dims.width, max(dims.heads, default=0) * dims.key_dim)  # which hidden units do not fit into
    return 3 * hidden + 3 * dims.width + (gap if hidden > 2 * dims.width else 0)


def _experts(dims: Dimensions) -> int:
    """Return hidden units of the chosen experts, or what they return before it is summed."""
    used, hidden = dims.get("expert_used_count", 0), dims.get("expert_feed_forward_length", max(dims.ff, default=0))
    n_used, n_hidden = (max(value) if isinstance(value, list | tuple) else int(value) for value in (used, hidden))
    return max(3 * n_used * n_hidden + 4 * dims.width, (2 * n_used + 4) * dims.width) if n_used else 0


def _state_space(dims: Dimensions) -> int:
    """Return inputs, gates and outputs of a state space."""
    inner, state, groups = (int(dims.get(f"ssm.{name}", 0)) for name in ("inner_size", "state_size", "group_count"))
    return (13 * inner) // 2 + 14 * groups * state


def row_bytes(cache_type: str, n: int) -> int:
    """Return the bytes of a row of ``n`` numbers in a type of the cache."""
    per_block, n_bytes = ggml.block(cache_type.upper())
    return n // per_block * n_bytes


def _check_cache_type(cache_type: str, *head_dims: int) -> None:
    per_block = ggml.block(cache_type.upper())[0]
    wrong = [n for n in head_dims if n % per_block]
    if wrong:
        raise PlanError(
            f"--cache-type {cache_type} has blocks of {per_block}, and heads of this model have {wrong[0]} channels, "
            f"which is not a multiple: llama.cpp refuses it; pass --cache-type f16"
        )


def _padded(n: int) -> int:
    return -(-n // _PADDING) * _PADDING
