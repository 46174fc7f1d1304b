"""The steps of the normalizer, pre-tokenizer, post-processor and decoder in a ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a parsed ``tokenizer.json`` maps bytes to characters before merging."""
    parts = (tokenizer.get(part) for part in ("normalizer", "pre_tokenizer", "decoder"))
    return any(step.get("type") == "ByteLevel" for part in parts for step in flat(part))


def flat(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a tokenizer component, with nested sequences flattened."""
    if not isinstance(component, Mapping):
        return
    if component.get("type") != "Sequence":
        yield component
        return
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        steps = component.get(key)
        for step in steps if isinstance(steps, list) else []:
            yield from flat(step)
