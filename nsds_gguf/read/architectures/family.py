"""What a model family is made of: parts, keys and settings, stated as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

Config = Mapping[str, Any]  # canonical: see ``config.canonical``
Sizes = Mapping[str, int]  # by name of the dimension, from ``config.dimensions``
Condition = Callable[[Config], bool]
LayerCondition = Callable[[Config, int], bool]


def always(_: Config) -> bool:
    """Hold for every model of the family."""
    return True


def never(_: Config) -> bool:
    """Hold for no model of the family."""
    return False


def flag(key: str) -> Condition:
    """Hold where config.json switches ``key`` on."""
    return lambda config: bool(config.get(key))


def unless(key: str) -> Condition:
    """Hold where config.json does not switch ``key`` on."""
    return lambda config: not config.get(key)


def every_layer(_config: Config, _layer: int) -> bool:
    """Hold for every layer."""
    return True


def no_sizes(_: Config) -> dict[str, int]:
    """Return no sizes beyond the ones that every family has."""
    return {}


def no_keys(_config: Config, _sizes: Sizes) -> dict[str, GGUFValue]:
    """Return no keys beyond the ones that tables state."""
    return {}


@dataclass(frozen=True)
class Part:
    """Where one GGUF tensor comes from.

    Attributes:
        source: checkpoint name within the layer (or the model) without ``.weight``. ``{e}`` numbers tensors that are
            stacked along the first dimension: experts, or the norms of single heads.
        shape: names of the GGUF tensor's dimensions, slowest first (``mapping.dimensions``).
        order: key of ``mapping.ROW_ORDERS``: which stored row becomes which; empty where they stay as they are.
        stored: names of the stored dimensions where they are not those of ``shape``: ``order`` takes rows of something
            larger, or the same numbers are folded otherwise.
        bias: whether there is a bias too.
        when: whether the model has it.
        layers: which layers have it.
        transposed: stored as ``(in, out)``, the way of GPT-2's Conv1D; for three dimensions, each matrix of the stack.
        change: key of ``mapping.CHANGES``: what is done to every number; empty where nothing is.
        suffix: what follows ``source`` in the checkpoint.
        bare: the GGUF name has no ``.weight`` either. (A role that holds a dot is a whole name, too.)
        also: other forms in which the same tensor is saved; the first one that is there is read.
    """

    source: str
    shape: tuple[str, ...]
    order: str = ""
    stored: tuple[str, ...] = ()
    bias: Condition = never
    when: Condition = always
    layers: LayerCondition = every_layer
    transposed: bool = False
    change: str = ""
    suffix: str = ".weight"
    bare: bool = False
    also: tuple[Part, ...] = ()

    @property
    def forms(self) -> tuple[Part, ...]:
        """The part itself, then every other form of it."""
        return (self, *self.also)

    def within(self, prefix: str) -> Part:
        """Return the part with ``prefix`` before its checkpoint names."""
        also = tuple(replace(form, source=prefix + form.source) for form in self.also)
        return replace(self, source=prefix + self.source, also=also)

    def gguf_name(self, role: str) -> str:
        """Return the tensor's name within its layer."""
        return role if self.bare or "." in role else f"{role}.weight"


@dataclass(frozen=True)
class Key:
    """A GGUF key of the architecture, its type, and the setting of config.json that it holds.

    A setting that is null or absent is left out.
    """

    name: str
    setting: str
    type: GGUFValueType = GGUFValueType.FLOAT32


@dataclass(frozen=True)
class Window:
    """Sliding-window attention.

    Attributes:
        flag: setting that switches it on; empty where the window's own number does.
        period: every ``period``-th layer attends to everything, as llama.cpp assumes without a key; 0 where it
            computes no window for the architecture.
        lists_layers: say which layers have it even where they are the ones that llama.cpp assumes.
    """

    flag: str = ""
    period: int = 0
    lists_layers: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp and the checkpoint classes that convert to it.

    Attributes:
        classes: names under ``architectures`` in config.json.
        variant: which models of these classes, where config.json decides about the architecture.
        architecture: llama.cpp's name.
        layer: role -> part, within ``layer_prefix``, in GGUF order.
        outside: role -> part of what is not in a layer; the output projection is last.
        defaults: what transformers assumes where config.json is silent: a value, or what gives it from the settings.
        prefix, layer_prefix: of the checkpoint's names; ``{i}`` is the layer.
        activations: the ones that llama.cpp computes for the architecture.
        rope_kinds: rope scaling kinds that llama.cpp computes; empty without rope.
        has_local_theta: layers with a window may have a rope theta of their own.
        has_yarn_log_multiplier: yarn's ``mscale`` settings have a key, in place of the attention factor that they make.
        keys: keys beyond the ones that every architecture has.
        fixed: settings for which llama.cpp computes one value only: the value, or what gives it.
        norm: kind of norm, ``rms`` or ``layer``.
        fixed_head_dim: llama.cpp's loader demands ``head_dim * n_heads == n_embd``.
        window: the sliding window, if the class may have one.
        writes_rope_dim, writes_vocab_size, writes_kv_heads: keys that the converter writes or leaves to defaults.
        output: ``own`` (or tied to the embedding), ``tied`` where llama.cpp has no output projection of its own, and
            ``required`` where it demands one: a tied embedding is then written twice.
        sizes: dimensions beyond the ones that every family has.
        more_keys: keys that are computed, without the architecture's prefix; they come after all others.
        extra_layers: layers beyond the model's own (multi-token prediction) may be there and are left out.
        ignored: patterns of checkpoint tensors that hold nothing the GGUF needs.
        example: a repository people know.
    """

    classes: tuple[str, ...]
    architecture: str
    layer: Mapping[str, Part]
    outside: Mapping[str, Part]
    defaults: Config = field(default_factory=dict)
    prefix: str = "model."
    layer_prefix: str = "model.layers.{i}."
    activations: tuple[str, ...] = ("silu", "swish")
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")
    has_local_theta: bool = False
    has_yarn_log_multiplier: bool = False
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
    extra_layers: bool = False
    ignored: tuple[str, ...] = ()
    variant: Condition = always
    example: str = ""

    @property
    def embedding(self) -> str:
        """Checkpoint name of the token embedding."""
        return self.outside["token_embd"].source + ".weight"

    @property
    def unembedding(self) -> str:
        """Checkpoint name of the output projection, which a tied model may lack."""
        return self.outside["output"].source + ".weight"


Parts = dict[str, Part]


def biased(parts: Mapping[str, Part], roles: str, bias: Condition) -> Parts:
    """Return the parts with biases on ``roles`` (separated by blanks)."""
    return {**parts, **{role: replace(parts[role], bias=bias) for role in roles.split()}}


def shifted(parts: Mapping[str, Part]) -> Parts:
    """Return the parts with 1 added to every norm's gain, which Gemma stores less 1."""
    return {role: replace(part, change="plus_one") if role.endswith("norm") else part for role, part in parts.items()}


def where(parts: Mapping[str, Part], layers: LayerCondition) -> Parts:
    """Return the parts, in some layers only."""
    return {role: replace(part, layers=layers) for role, part in parts.items()}


def without(parts: Mapping[str, Part], roles: str) -> Parts:
    """Return the parts but those of ``roles`` (separated by blanks)."""
    return {role: part for role, part in parts.items() if role not in roles.split()}
