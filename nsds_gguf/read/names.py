"""Resolve a family's tensor names in a checkpoint: prefixes, wrappers and alternative forms.

Training wrappers insert words into names (torch.compile, DDP, FSDP, checkpointing, PEFT); saving a part of a model
drops prefixes. The interpretation with the fewest missing tensors wins; the family's own comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..records.transforms import Transform
from .architectures.families import LAYOUTS
from .architectures.family import Family, Part, Sizes
from .stored import StoredTensor

# Words that wrappers insert into names, at any place.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module|module|base_layer)"
    r"\."
)


@dataclass(frozen=True)
class Wanted:
    """One GGUF tensor that the model must have; a bias has the ``part`` of its matrix.

    ``steps`` are the transforms of the part that depend on config.json.
    """

    name: str
    role: str
    layer: int | None
    part: Part
    is_bias: bool = False
    steps: tuple[Transform, ...] = ()

    def sources(self, sizes: Sizes) -> list[str]:
        """Return the family's names of the checkpoint tensors, several for a stack."""
        suffix = ".bias" if self.is_bias else self.part.suffix
        count = sizes[self.part.shape[0]] if "{e}" in self.part.source else 1
        return [self.part.source.replace("{e}", str(e)) + suffix for e in range(count)]

    def stored_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a checkpoint tensor; of a stack, that of one of its tensors."""
        shape = tuple(sizes[name] for name in self.part.stored or self.part.shape)
        if "{e}" in self.part.source:
            shape = shape[1:]
        if self.is_bias:
            return shape[:1]
        return shape[::-1] if self.part.transposed and not self.part.stored else shape

    def forms(self) -> Iterator[Wanted]:
        """Yield the tensor in every form in which checkpoints store it."""
        return (replace(self, part=part) for part in self.part.forms)


@dataclass(frozen=True)
class Layout:
    """Prefix of names within the model, and of those beside it (the output projection)."""

    inner: str
    outer: str
    prefix: str

    def actual(self, name: str) -> str:
        """Return the checkpoint's name for a name of the family."""
        if name.startswith(self.prefix):
            return self.inner + name.removeprefix(self.prefix)
        return self.outer + name


@dataclass(frozen=True)
class Found:
    """The resolved names of a checkpoint.

    Attributes:
        stored: the tensors by name, without the words of wrappers.
        layout: prefixes of names.
        places: every wanted tensor in the form found (default: its first), with the names of its checkpoint tensors.
        notes: prefixes and words that were removed, one sentence each.
    """

    stored: Mapping[str, StoredTensor]
    layout: Layout
    places: tuple[tuple[Wanted, list[str]], ...]
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Wanted names that the checkpoint lacks."""
        return [name for _, names in self.places for name in names if name not in self.stored]


def find_names(stored: Mapping[str, StoredTensor], wanted: Sequence[Wanted], family: Family, sizes: Sizes) -> Found:
    """Return the interpretation of the names with the fewest missing tensors.

    Args:
        stored: the checkpoint's tensors by name.
        wanted: every tensor that the model must have.
        family: of the model.
        sizes: of the dimensions.

    """
    best: Found | None = None
    for names in _unwrapped(stored):
        for layout in _layouts(names, wanted, family, sizes):
            places = tuple(_place(item, names, layout.actual, sizes) for item in wanted)
            found = Found(names, layout, places)
            if best is None or len(found.missing) < len(best.missing):
                best = found
            if not best.missing:
                return replace(best, notes=_notes(stored, best, family))
    if best is None:  # unreachable: the family's own layout is always tried
        raise ValueError("no layouts")
    return best


def without_wrappers(name: str) -> str:
    """Return a checkpoint name without the words of wrappers."""
    return _WRAPPERS.sub("", name)


def _unwrapped(stored: Mapping[str, StoredTensor]) -> Iterator[Mapping[str, StoredTensor]]:
    """Yield the tensors under their own names, then without words of wrappers if names stay distinct."""
    yield stored
    names = {without_wrappers(name): tensor for name, tensor in stored.items()}
    if len(names) == len(stored) and names.keys() != stored.keys():
        yield names


def _layouts(
    stored: Mapping[str, StoredTensor], wanted: Sequence[Wanted], family: Family, sizes: Sizes
) -> Iterator[Layout]:
    """Yield possible prefixes: known ones first, then those that the names suggest."""
    known = [(inner.format(prefix=family.prefix), outer) for inner, outer in LAYOUTS]
    heads = _before(stored, [family.unembedding])
    inners = _before(stored, [name.removeprefix(family.prefix) for name in _landmarks(wanted, family, sizes)])
    found = [(inner, outer) for inner in inners for outer in (inner.removesuffix(family.prefix), *heads, "")]
    for inner, outer in dict.fromkeys([*known, *found]):
        yield Layout(inner, outer, family.prefix)


def _landmarks(wanted: Sequence[Wanted], family: Family, sizes: Sizes) -> list[str]:
    """Return names that reveal a layout: the embedding, and the first tensor of the first layer."""
    first = next((item.sources(sizes)[0] for item in wanted if item.layer == 0), family.embedding)
    return [family.embedding, first]


def _before(stored: Mapping[str, StoredTensor], ends: Sequence[str]) -> list[str]:
    """Return the prefixes of names with these endings, shortest first."""
    found = {
        name.removesuffix(end) for end in ends for name in stored if name == end or name.endswith(f".{end}")
    }  # fmt: skip
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _place(
    item: Wanted, stored: Mapping[str, StoredTensor], actual: Callable[[str], str], sizes: Sizes
) -> tuple[Wanted, list[str]]:
    """Return the form of a tensor in the checkpoint, and its names; by default its first form.

    Of forms with the same names, that of the stored shape counts, else the first.
    """
    forms = [(form, [actual(name) for name in form.sources(sizes)]) for form in item.forms()]
    present = [(form, names) for form, names in forms if all(name in stored for name in names)]
    fitting = (
        (form, names)
        for form, names in present
        if names == present[0][1] and stored[names[0]].shape == form.stored_shape(sizes)
    )
    return next(fitting, (present or forms)[0])


def _notes(raw: Mapping[str, StoredTensor], found: Found, family: Family) -> tuple[str, ...]:
    """Return notes on prefixes and words removed from names."""
    used = {name for _, names in found.places for name in names}
    notes = []
    is_raw = found.stored is raw
    before = {} if is_raw else {tensor.name: name for name, tensor in found.stored.items() if name in used}
    words = {f"`{match[0]}`" for name in raw for match in _WRAPPERS.finditer(name) if name in before}
    if words:
        n_names = sum(name != clean for name, clean in before.items())
        notes.append(f"{', '.join(sorted(words))} is removed from the names of {n_names} tensors.")
    layout = found.layout
    known = {(inner.format(prefix=family.prefix), outer) for inner, outer in LAYOUTS}
    if (layout.inner, layout.outer) in known:
        return tuple(notes)
    if layout.inner == layout.outer + family.prefix:
        return (*notes, f"`{layout.outer}` is removed from the names of {len(used)} tensors.")
    beside = f" and `{layout.outer}` before the output's is removed" if layout.outer else ""
    return (*notes, f"`{layout.inner}` at the beginning of names is read as `{family.prefix}`{beside}.")
