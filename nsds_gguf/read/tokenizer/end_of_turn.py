"""Tokens that end generation, and tokens that llama.cpp does not print."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from gguf import TokenType

# Texts at which llama.cpp always ends generation (src/llama-vocab.cpp, special_eog_ids), and those that it uses as the
# end of a turn if no key names another.
_ENDS_BY_TEXT = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
_TURNS_BY_TEXT = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
    ]
)
_EOM_TEXT = "<|eom_id|>"

# Special tokens that are not part of answers: padding, roles, infilling, images, spares.
_USUAL = re.compile(
    r"reserved|unused|extra_id|placeholder|place▁holder|dummy|special|empty|fim|header|begin|start|end|im_sep|gmask|"
    r"python_tag|image|vision|video|img|audio_pad|box|quad|object_ref|file|repo|gh_|issue|jupyter|commit|prefix|suffix|"
    r"middle|user|assistant|system|inst|finetune|step_id|2mass|"
    r"(?<![a-z])(pad|unk|cls|sep|mask|bos|eos|eot|eod|eom|sop|eop|s|code)(?![a-z])",
    re.IGNORECASE,
)


def wanted_ends(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return the ids at which transformers ends generation, and the file that names them."""
    files = (("generation_config.json", generation_config), ("config.json", config))
    for file, settings in files:
        value = settings.get("eos_token_id")
        ids = [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]
        if ids:
            return file, list(dict.fromkeys(ids))
    return "", []


def add_ends(found: dict[str, int | None], ids: Mapping[str, int], wanted: Iterable[int]) -> list[int]:
    """Assign ends of generation that llama.cpp would miss to the free keys ``eot`` and ``eom``.

    Args:
        found: token id by the name of its key, with ``eos``; changed in place.
        ids: id of every token text.
        wanted: ids that end generation.

    Returns:
        The wanted ids at which llama.cpp still does not end.

    """
    texts = {token_id: text for text, token_id in ids.items()}
    known = [token_id for token_id in wanted if token_id in texts]
    for token_id in known:
        if token_id in _ends(found, texts):
            continue
        if (key := _free_key(found, ids)) is not None:
            found[key] = token_id
    ends = _ends(found, texts)
    return [token_id for token_id in known if token_id not in ends]


def ends_note(file: str, missed: Collection[int], ids: Mapping[str, int]) -> Iterator[str]:
    """Yield a note on the ends of generation for which GGUF has no key."""
    if not missed:
        return
    named = ", ".join(f"{text!r} (id {token_id})" for text, token_id in ids.items() if token_id in missed)
    yield (
        f"llama.cpp does not end its answer at {len(missed)} of the end tokens in {file}, for which GGUF has no key: "
        f"{named}. Pass them as stop texts when you run the model."
    )


def unprinted_note(
    texts: Mapping[int, str], types: Mapping[int, TokenType], keyed: Collection[int], templates: Iterable[str]
) -> Iterator[str]:
    """Yield a note on special tokens that may be part of answers, which llama.cpp does not print.

    Args:
        texts: text of every added token with a row in the embedding, by id.
        types: type by id.
        keyed: ids that a key names, such as BOS and EOS.
        templates: the chat templates; their tokens are chat formatting.

    """
    written = "\n".join(templates)
    silent = [
        (token_id, text)
        for token_id, text in sorted(texts.items())
        if types.get(token_id) == TokenType.CONTROL
        and token_id not in keyed
        and text not in _ENDS_BY_TEXT
        and text not in written
        and not _USUAL.search(text)
    ]
    if silent:
        token_id, text = silent[0]
        yield (
            f"llama.cpp hides {len(silent)} special token{'s' * (len(silent) > 1)} that no chat template uses, "
            f"such as {text!r} (id {token_id}): it prints no special tokens. If answers contain them, run llama-cli or "
            "llama-server with --special."
        )


def _free_key(found: Mapping[str, int | None], ids: Mapping[str, int]) -> str | None:
    """Return the key to write, preferably one whose token llama.cpp does not find by text."""
    free = [key for key in ("eot", "eom") if found.get(key) is None]
    taken_by_text = {"eot": not _TURNS_BY_TEXT.isdisjoint(ids), "eom": _EOM_TEXT in ids}
    return min(free, key=lambda key: taken_by_text[key], default=None)


def _ends(found: Mapping[str, int | None], texts: Mapping[int, str]) -> set[int]:
    """Return the ids at which llama.cpp ends generation, including its two exceptions."""
    ends = {token_id for token_id, text in texts.items() if text in _ENDS_BY_TEXT}
    ends |= {token_id for key in ("eos", "eot", "eom") if (token_id := found.get(key)) is not None}
    named = {texts[token_id]: token_id for token_id in ends if token_id in texts}
    if {"<|return|>", "<|call|>"} <= named.keys() or (
        not named.keys().isdisjoint({"<|call|>", "<|calls|>"}) and "<|flush|>" in named
    ):
        ends.discard(named.get("<|end|>", -1))
    if "<|tool_response>" in named or "<|plamo:eos|>" in named:
        ends.discard(named.get("</s>", -1))
    return ends
