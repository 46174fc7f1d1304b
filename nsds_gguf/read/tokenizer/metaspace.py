"""Spaces in a ``tokenizer.json`` converted from sentencepiece: replaced by U+2581, with an optional space prefix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from .added_tokens import tokenizer_class
from .files import TokenizerFiles
from .steps import flat
from .tokens import METASPACE


def metaspace_prefix(tokenizer: Mapping[str, Any], path: Path, *, splits_words: bool = False) -> bool:
    """Return whether the tokenizer adds a space prefix; raise unless its only other step replaces spaces by U+2581.

    Args:
        tokenizer: the parsed file.
        path: of the file, for messages.
        splits_words: accept a split before every U+2581.

    """
    normalizers = list(flat(tokenizer.get("normalizer")))
    steps = list(flat(tokenizer.get("pre_tokenizer")))
    prepends = bool(normalizers) and _is_prepend(normalizers[0])
    replaces = bool(normalizers) and _is_replace(normalizers[-1])
    metaspace = len(steps) == 1 and _is_metaspace(steps[0]) and (splits_words or not _splits(steps[0]))
    plain = not steps or (len(steps) == 1 and _is_split_at_blank(steps[0]))
    if replaces and plain and len(normalizers) == 1 + prepends:
        return prepends
    if metaspace and not normalizers:
        return _prepends(steps[0])
    described = " > ".join(str(step.get("type")) for step in (*normalizers, *steps)) or "none"
    raise UnsupportedError(
        f"{path}: neither byte-level nor sentencepiece's text handling (normalizer and pre-tokenizer: {described}); "
        "add the original tokenizer.model"
    )


def prefix_note(tokenizer: Mapping[str, Any]) -> str:
    """Return the note on text where only llama.cpp adds a space prefix; empty if they agree."""
    prepending = [step for step in flat(tokenizer.get("pre_tokenizer")) if _prepends(step)]
    if not prepending:
        return ""
    after_special = " and after special tokens" if prepending[0].get("prepend_scheme") == "first" else ""
    return (
        f"llama.cpp adds a space before every piece of text; the original omits it before another space{after_special}."
    )


def class_prefix(files: TokenizerFiles) -> bool | None:
    """Return whether the class in transformers adds a space prefix; ``None`` if the file decides."""
    name = tokenizer_class(files.listings)
    if name == "Gemma":
        return False
    return files.tokenizer_config.get("add_prefix_space") is not False if name == "Llama" and files.has_json else None


def class_prefix_note(files: TokenizerFiles, of_file: bool) -> str:
    """Return the note that the class overrides the space prefix of the file; empty if it does not."""
    prefix = class_prefix(files)
    if prefix in (None, of_file):
        return ""
    found, counts = ("a space", "none") if of_file else ("no space", "one")
    file = "tokenizer.json" if files.has_json else "tokenizer.model"
    return (
        f"{file} adds {found} before text, but {tokenizer_class(files.listings)}Tokenizer of transformers adds "
        f"{counts}: add_space_prefix {str(prefix).lower()} is written."
    )


def _is_prepend(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Prepend" and step.get("prepend") == METASPACE


def _is_replace(step: Mapping[str, Any]) -> bool:
    return (step.get("type"), step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, METASPACE)


def _is_split_at_blank(step: Mapping[str, Any]) -> bool:
    """Return whether a step splits at spaces, which has no effect after their replacement (Gemma)."""
    return step.get("type") == "Split" and step.get("pattern") in ({"String": " "}, {"Regex": " "})


def _is_metaspace(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Metaspace" and step.get("replacement") == METASPACE


def _splits(step: Mapping[str, Any]) -> bool:
    return step.get("split", True) is not False


def _prepends(step: Mapping[str, Any]) -> bool:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return step.get("type") == "Metaspace" and scheme != "never"
