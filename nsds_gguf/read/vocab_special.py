"""Ids of the special tokens, whether BOS and EOS are added to a text, and chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ..errors import TokenizerError, UnsupportedError
from ..records import kv
from .vocab_bpe import flat
from .vocab_files import TokenizerFiles, read_json, read_text, token_text

_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
# CodeLlama's end of a turn, which llama.cpp's search by text misses; its converter names it (conversion/llama.py).
UNSEEN_EOT = "▁<EOT>"
_NAMES = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class Affixes:
    """What a post-processor puts before and after a text: token ids or nothing."""

    bos: int | None = None
    eos: int | None = None


def special_keys(
    files: TokenizerFiles, ids: Mapping[str, int], own_ids: Mapping[str, int], adds_bos_by_default: bool
) -> dict[str, GGUFValue]:
    """Return the keys of special token ids and of ``add_bos_token``, ``add_eos_token``.

    A name is looked up in ``tokenizer_config.json``, ``special_tokens_map.json``, ``config.json``,
    ``generation_config.json`` and the sentencepiece model, in this order. Tokens that end a turn or serve infilling are
    found by llama.cpp itself, by text, but for ``UNSEEN_EOT``. The post-processor of ``tokenizer.json`` has
    the last word on what is added, as in transformers 5; without one the flags of ``tokenizer_config.json`` count.

    Args:
        files: the tokenizer files.
        ids: id of every token text.
        own_ids: ids that a sentencepiece model names.
        adds_bos_by_default: whether BOS is added when no file says so.

    Raises:
        TokenizerError: no EOS, a BOS or EOS that is no token, or BOS to be added without a BOS.
        UnsupportedError: the post-processor adds what llama.cpp cannot.

    """
    affixes = _affixes(files)
    found = {name: _special_id(name, files, ids, own_ids) for name in _NAMES}
    if affixes is None:
        flags = {name: files.tokenizer_config.get(f"add_{name}_token") for name in ("bos", "eos")}
        add_bos = flags["bos"] if isinstance(flags["bos"], bool) else adds_bos_by_default
        add_eos = flags["eos"] if isinstance(flags["eos"], bool) else False
    else:
        add_bos, add_eos = affixes.bos is not None, affixes.eos is not None
        found["bos"] = affixes.bos if add_bos else found["bos"]
        if add_eos and found["eos"] != affixes.eos:  # the token that is added, and the one that ends a turn
            found["eot"], found["eos"] = found["eos"], affixes.eos
    if found.get("eot") is None and UNSEEN_EOT in ids:
        found["eot"] = ids[UNSEEN_EOT]
    _check_found(files, found, add_bos)
    keys = {
        _ID_KEYS[name]: kv(token_id, GGUFValueType.UINT32) for name, token_id in found.items() if token_id is not None
    }
    keys[Keys.Tokenizer.ADD_BOS] = kv(add_bos, GGUFValueType.BOOL)
    keys[Keys.Tokenizer.ADD_EOS] = kv(add_eos, GGUFValueType.BOOL)
    return keys


def chat_template_keys(files: TokenizerFiles) -> dict[str, GGUFValue]:
    """Return the keys of the chat templates, wherever they live.

    A template in a file of its own comes before the ones in ``tokenizer_config.json``, as in transformers.
    """
    templates = _template_files(files) or dict(_configured_templates(files))
    keys = {}
    named = sorted({re.sub("[^A-Za-z0-9]", "_", name) for name in templates} - {"default"})
    for name, template in templates.items():
        safe = re.sub("[^A-Za-z0-9]", "_", name)
        key = Keys.Tokenizer.CHAT_TEMPLATE if safe == "default" else Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=safe)
        keys[key] = kv(template, GGUFValueType.STRING)
    if named:
        keys[Keys.Tokenizer.CHAT_TEMPLATES] = kv(named, GGUFValueType.ARRAY, GGUFValueType.STRING)
    return keys


def _special_id(name: str, files: TokenizerFiles, ids: Mapping[str, int], own_ids: Mapping[str, int]) -> int | None:
    for file, configuration in (
        ("tokenizer_config.json", files.tokenizer_config),
        ("special_tokens_map.json", files.special_tokens_map),
    ):
        text = token_text(configuration.get(f"{name}_token"))
        if text is None:
            continue
        if text in ids:
            return ids[text]
        if name in ("bos", "eos"):
            raise TokenizerError(f"{files.folder / file}: {name}_token {text!r} is not in the vocabulary")
    known = set(ids.values())
    for configuration in (files.config, files.generation_config):
        value = configuration.get(f"{name}_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id in known:
                return token_id
    return own_ids.get(name)


def _check_found(files: TokenizerFiles, found: Mapping[str, int | None], add_bos: bool) -> None:
    if found["eos"] is None:
        raise TokenizerError(
            f"{files.folder}: no file names the token that ends a text, and llama.cpp would take another for it; "
            "set eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
    if add_bos and found["bos"] is None:
        raise TokenizerError(
            f"{files.folder}: a BOS token is to be added, but no file names it; "
            "set bos_token in tokenizer_config.json or bos_token_id in config.json"
        )


def _affixes(files: TokenizerFiles) -> Affixes | None:
    """Return what the post-processor of ``tokenizer.json`` adds, ``None`` when it has none."""
    processor = files.tokenizer.get("post_processor")
    if processor is None:
        return None
    affixes = Affixes()
    for step in flat(processor):
        if step.get("type") == "TemplateProcessing":
            affixes = _template_affixes(step, files)
        elif step.get("type") != "ByteLevel":
            raise UnsupportedError(f"{files.json_path}: post-processor {step.get('type')} is not supported")
    return affixes


def _template_affixes(template: Mapping[str, Any], files: TokenizerFiles) -> Affixes:
    pieces = template.get("single") or []
    if not isinstance(pieces, list) or not all(isinstance(piece, Mapping) for piece in pieces):
        raise TokenizerError(f"{files.json_path}: damaged post-processor template: wanted objects in 'single'")
    is_text = ["Sequence" in piece for piece in pieces]
    before, after = (pieces[: is_text.index(True)], pieces[is_text.index(True) + 1 :]) if any(is_text) else (pieces, [])
    tokens = template.get("special_tokens") or {}
    try:
        first, last = (
            [token_id for piece in side for token_id in tokens[piece["SpecialToken"]["id"]]["ids"]]
            for side in (before, after)
        )
    except (KeyError, TypeError) as error:
        raise TokenizerError(f"{files.json_path}: damaged post-processor template: {error!r}") from error
    if not any(is_text) or len(first) > 1 or len(last) > 1:
        raise UnsupportedError(
            f"{files.json_path}: the post-processor adds {len(first)} tokens before and {len(last)} after the text; "
            "llama.cpp adds at most one each"
        )
    return Affixes(*(side[0] if side else None for side in (first, last)))


def _template_files(files: TokenizerFiles) -> dict[str, str]:
    templates = {}
    if (path := files.folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(path)
    elif isinstance(template := read_json(files.folder / "chat_template.json").get("chat_template"), str):
        templates["default"] = template
    for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    return templates


def _configured_templates(files: TokenizerFiles) -> Iterator[tuple[str, str]]:
    configured = files.tokenizer_config.get("chat_template")
    if isinstance(configured, str):
        yield "default", configured
    elif isinstance(configured, Mapping):
        yield from ((str(name), str(template)) for name, template in configured.items())
    elif isinstance(configured, list):
        for entry in configured:
            if not isinstance(entry, Mapping) or not {"name", "template"} <= entry.keys():
                raise TokenizerError(
                    f"{files.folder / 'tokenizer_config.json'}: chat_template: wanted name and template, got {entry!r}"
                )
            yield str(entry["name"]), str(entry["template"])
