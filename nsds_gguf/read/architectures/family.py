"""The data model of families: parts, keys and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ...records import kv
from ...records.transforms import Transform

Config = Mapping[str, Any]  # canonical: see ``config.canonical``
Sizes = Mapping[str, int]  # by name of the dimension, from ``config.dimensions``
Condition = Callable[[Config], bool]
LayerCondition = Callable[[Config, int], bool]


def always(_: Config) -> bool:
    """Return true for every model of the family."""
    return True


def never(_: Config) -> bool:
    """Return false for every model of the family."""
    return False


def flag(key: str) -> Condition:
    """Return the condition that config.json enables ``key``."""
    return lambda config: bool(config.get(key))


def unless(key: str) -> Condition:
    """Return the condition that config.json does not enable ``key``."""
    return lambda config: not config.get(key)


def every_layer(_config: Config, _layer: int) -> bool:
    """Return true for every layer."""
    return True


def no_sizes(_: Config) -> dict[str, int]:
    """Return no additional sizes."""
    return {}


def no_keys(_config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return no additional keys."""
    return {}


def no_steps(_: Config) -> tuple[Transform, ...]:
    """Return no transforms."""
    return ()


@dataclass(frozen=True)
class Part:
    """The checkpoint source of one GGUF tensor.

    Attributes:
        source: checkpoint name within the layer (or the model) without ``.weight``. ``{e}`` is the number
            of a tensor in a stack along the first dimension: experts, or norms of single heads.
        shape: names of the GGUF tensor's dimensions, slowest first (``mapping.dimensions``).
        order: key of ``mapping.ROW_ORDERS``, the permutation of rows; default: none.
        stored: names of the stored dimensions if they differ from ``shape``: ``order`` selects rows of a larger tensor,
            or the shape differs.
        bias: whether it has a bias too.
        when: whether the model has it.
        layers: which layers have it.
        transposed: stored as ``(in, out)``, like GPT-2's Conv1D; for three dimensions, each matrix of the stack.
        columns: key of ``mapping.COLUMN_ORDERS``, the columns taken of each stored matrix, in order; default: all.
        change: key of ``mapping.CHANGES``, an elementwise change; default: none.
        steps: returns transforms that depend on config.json, after all others; biases have none.
        suffix: follows ``source`` in the checkpoint.
        bare: the GGUF name has no ``.weight`` suffix (nor has a role that contains a dot).
        also: alternative forms of the same tensor; the first form in the checkpoint counts.
    """

    source: str
    shape: tuple[str, ...]
    order: str = ""
    stored: tuple[str, ...] = ()
    bias: Condition = never
    when: Condition = always
    layers: LayerCondition = every_layer
    transposed: bool = False
    columns: str = ""
    change: str = ""
    steps: Callable[[Config], tuple[Transform, ...]] = no_steps
    suffix: str = ".weight"
    bare: bool = False
    also: tuple[Part, ...] = ()

    @property
    def forms(self) -> tuple[Part, ...]:
        """The part itself, then its alternative forms."""
        return (self, *self.also)

    def within(self, prefix: str) -> Part:
        """Return the part with ``prefix`` before its checkpoint names."""
        also = tuple(replace(form, source=prefix + form.source) for form in self.also)
        return replace(self, source=prefix + self.source, also=also)

    def gguf_name(self, role: str) -> str:
        """Return the tensor's name within its layer."""
        return role if self.bare or "." in role else f"{role}.weight"


Parts = dict[str, Part]


@dataclass(frozen=True)
class Key:
    """A GGUF key of the architecture, its type, and the setting of config.json that it holds.

    A setting that is null or absent has no key.
    """

    name: str
    setting: str
    type: GGUFValueType = GGUFValueType.FLOAT32


@dataclass(frozen=True)
class Window:
    """Sliding-window attention.

    Attributes:
        flag: setting that enables it; default: the size of the window does.
        period: every ``period``-th layer has full attention, llama.cpp's default; 0 if llama.cpp has no window for
            the architecture.
        lists_layers: write the list of layers even if it is llama.cpp's default.
    """

    flag: str = ""
    period: int = 0
    lists_layers: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp and the checkpoint classes that convert to it.

    Attributes:
        classes: names under ``architectures`` in config.json.
        variant: condition on config.json, if it decides the architecture of a class.
        architecture: llama.cpp's name.
        layer: role -> part, within ``layer_prefix``, in GGUF order.
        other_layers: conditions, and parts that those layers have in place of others.
        outside: role -> part outside the layers; the output projection is last.
        defaults: transformers' defaults of settings: values, or functions of the settings.
        prefix, layer_prefix: of the checkpoint's names; ``{i}`` is the layer.
        activations: activation functions that llama.cpp supports for the architecture.
        rope_kinds: rope scaling kinds that llama.cpp supports; empty without rope.
        has_local_theta: layers with a window may have a separate rope theta.
        yarn_log_unit: unit of the key that yarn's ``mscale`` settings have in place of the attention factor; 0: none.
        keys: keys in addition to those of every architecture.
        fixed: settings for which llama.cpp supports one value only: the value, or a function of the settings.
        norm: kind of norm, ``rms`` or ``layer``.
        fixed_head_dim: llama.cpp's loader requires ``head_dim * n_heads == n_embd``.
        window: the sliding window, if the class may have one.
        writes_rope_dim, writes_vocab_size, writes_kv_heads: optional keys that the converter writes.
        output: ``own`` (or tied to the embedding), ``tied`` if llama.cpp has no separate output projection,
            ``required`` if it requires one: a tied embedding is then written twice.
        sizes: returns dimensions in addition to those of every family.
        more_keys: returns computed keys, without the architecture's prefix; they come last.
        layer_numbers: GGUF key, which has a number per layer and no prefix -> name of the number within the layer.
        extra_layers: the checkpoint may have layers beyond the model's own (multi-token prediction), which are skipped.
        ignored: patterns of checkpoint tensors that the GGUF does not need.
        example: a well-known repository.
    """

    classes: tuple[str, ...]
    architecture: str
    layer: Mapping[str, Part]
    outside: Mapping[str, Part]
    other_layers: tuple[tuple[LayerCondition, Mapping[str, Part]], ...] = ()
    defaults: Config = field(default_factory=dict)
    prefix: str = "model."
    layer_prefix: str = "model.layers.{i}."
    activations: tuple[str, ...] = ("silu", "swish")
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")
    has_local_theta: bool = False
    yarn_log_unit: float = 0.0
    keys: tuple[Key, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "rms"
    fixed_head_dim: bool = False
    window: Window | None = None
    writes_rope_dim: bool = False
    writes_vocab_size: bool = False
    writes_kv_heads: bool = True
    output: str = "own"
    sizes: Callable[[Config], dict[str, int]] = no_sizes
    more_keys: Callable[[Config, Sizes], dict[str, GGUFValue]] = no_keys
    layer_numbers: Mapping[str, str] = field(default_factory=dict)
    extra_layers: bool = False
    ignored: tuple[str, ...] = ()
    variant: Condition = always
    example: str = ""

    def parts_of(self, config: Config, layer: int) -> Parts:
        """Return the parts of one layer."""
        parts = dict(self.layer)
        for condition, others in self.other_layers:
            if condition(config, layer):
                parts |= others
        return {role: part for role, part in parts.items() if part.layers(config, layer)}

    @property
    def embedding(self) -> str:
        """Checkpoint name of the token embedding."""
        return self.outside["token_embd"].source + ".weight"

    @property
    def unembedding(self) -> str:
        """Checkpoint name of the output projection, which a tied model may lack."""
        return self.outside["output"].source + ".weight"


def counts(numbers: Mapping[str, int | None]) -> dict[str, GGUFValue]:
    """Return keys of unsigned integers; a number that is ``None`` has no key."""
    return {name: kv(value, GGUFValueType.UINT32) for name, value in numbers.items() if value is not None}


def biased(parts: Mapping[str, Part], roles: str, bias: Condition) -> Parts:
    """Return the parts with biases on ``roles`` (space-separated)."""
    return {**parts, **{role: replace(parts[role], bias=bias) for role in roles.split()}}


def shifted(parts: Mapping[str, Part]) -> Parts:
    """Return the parts with 1 added to the gain of every norm, which Gemma stores minus 1."""
    return {role: replace(part, change="plus_one") if role.endswith("norm") else part for role, part in parts.items()}


def where(parts: Mapping[str, Part], layers: LayerCondition) -> Parts:
    """Return the parts, restricted to some layers."""
    return {role: replace(part, layers=layers) for role, part in parts.items()}


def without(parts: Mapping[str, Part], roles: str) -> Parts:
    """Return the parts except ``roles`` (space-separated)."""
    return {role: part for role, part in parts.items() if role not in roles.split()}
