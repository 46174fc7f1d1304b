"""Ids of special tokens, the flags for adding BOS and EOS, and chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ...errors import TokenizerError, UnsupportedError
from ...records import kv
from .added_tokens import token_text
from .end_of_turn import add_ends, ends_note, wanted_ends
from .files import TokenizerFiles
from .json_files import read_json, read_text
from .steps import flat

_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
# CodeLlama's end of turn, which llama.cpp does not find by text; its converter writes a key (conversion/llama.py).
UNSEEN_EOT = "▁<EOT>"
_NAMES = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class Affixes:
    """The token ids that a post-processor adds before and after a text."""

    bos: int | None = None
    eos: int | None = None


@dataclass(frozen=True)
class Specials:
    """Keys of special tokens, their ids, and notes, one sentence each."""

    keys: Mapping[str, GGUFValue]
    ids: Mapping[str, int]
    notes: tuple[str, ...]


def special_keys(
    files: TokenizerFiles, ids: Mapping[str, int], own_ids: Mapping[str, int], adds_bos_by_default: bool
) -> Specials:
    """Return the keys of special token ids and of ``add_bos_token``, ``add_eos_token``.

    A name is looked up in ``tokenizer_config.json`` and ``special_tokens_map.json`` (the latter first where
    transformers reads it), ``config.json``, ``generation_config.json`` and the sentencepiece model, in this order.
    llama.cpp finds infilling tokens by text. The post-processor of ``tokenizer.json`` determines the added tokens, as
    in transformers 5; without a ``tokenizer.json``, the flags of ``tokenizer_config.json`` do.

    Args:
        files: the tokenizer files.
        ids: id of every token text with a row in the embedding.
        own_ids: ids that a sentencepiece model names.
        adds_bos_by_default: whether to add BOS without a ``tokenizer.json`` and without a flag.

    Raises:
        TokenizerError: no EOS, a BOS or EOS that is not a token, or a flag to add BOS without a BOS.
        UnsupportedError: the post-processor adds tokens that llama.cpp cannot add.

    """
    found = {name: _special_id(name, files, ids, own_ids) for name in _NAMES}
    notes: list[str] = []
    if files.has_json:
        affixes = _affixes(files)
        _check_affixes(files, affixes, ids)
        add_bos, add_eos = affixes.bos is not None, affixes.eos is not None
        notes += _flags_note(files, add_bos, add_eos)
        found["bos"] = affixes.bos if add_bos else found["bos"]
        if add_eos and found["eos"] != affixes.eos:  # the added token, and the end of a turn
            found["eot"], found["eos"] = found["eos"], affixes.eos
    else:
        flags = {name: files.tokenizer_config.get(f"add_{name}_token") for name in ("bos", "eos")}
        add_bos = flags["bos"] if isinstance(flags["bos"], bool) else adds_bos_by_default
        add_eos = flags["eos"] if isinstance(flags["eos"], bool) else False
    if found.get("eot") is None and UNSEEN_EOT in ids:
        found["eot"] = ids[UNSEEN_EOT]
    _check_found(files, found, add_bos)
    file, wanted = wanted_ends(files.config, files.generation_config)
    notes += ends_note(file, add_ends(found, ids, wanted), ids)
    written = {name: token_id for name, token_id in found.items() if token_id is not None}
    keys = {_ID_KEYS[name]: kv(token_id, GGUFValueType.UINT32) for name, token_id in written.items()}
    keys[Keys.Tokenizer.ADD_BOS] = kv(add_bos, GGUFValueType.BOOL)
    keys[Keys.Tokenizer.ADD_EOS] = kv(add_eos, GGUFValueType.BOOL)
    return Specials(keys, written, tuple(notes))


def chat_template_keys(files: TokenizerFiles) -> dict[str, GGUFValue]:
    """Return the keys of the chat templates.

    Separate template files take precedence over ``tokenizer_config.json``, as in transformers, and this over
    ``chat_template.json``, which transformers reads for processors only.
    """
    templates = _template_files(files) or dict(_configured_templates(files)) or _processor_template(files)
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
    sources = [
        ("tokenizer_config.json", files.tokenizer_config),
        ("special_tokens_map.json", files.special_tokens_map),
    ]
    if files.listings.reads_map:
        sources.reverse()
    rowless = {token.text for token in files.added_tokens.values()} - ids.keys()
    for file, configuration in sources:
        text = token_text(configuration.get(f"{name}_token"))
        if text is None or text in rowless:
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
            f"{files.folder}: no file names an EOS token of the vocabulary, and llama.cpp would use "
            "another token; set eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
    if add_bos and found["bos"] is None:
        raise TokenizerError(
            f"{files.folder}: a BOS token must be added, but no file names it; "
            "set bos_token in tokenizer_config.json or bos_token_id in config.json"
        )


def _check_affixes(files: TokenizerFiles, affixes: Affixes, ids: Mapping[str, int]) -> None:
    known = set(ids.values())
    for token_id in (affixes.bos, affixes.eos):
        if token_id is not None and token_id not in known:
            raise TokenizerError(
                f"{files.json_path}: the post-processor adds id {token_id}, which is not a token with a row in the "
                "embedding; correct post_processor"
            )


def _flags_note(files: TokenizerFiles, add_bos: bool, add_eos: bool) -> Iterator[str]:
    """Yield a note if the flags of ``tokenizer_config.json`` differ from the post-processor."""
    added = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    flags = {name: files.tokenizer_config.get(name) for name in added}
    differing = [name for name, flag in flags.items() if isinstance(flag, bool) and flag != added[name]]
    if differing:
        said = " and ".join(f"{name} {str(flags[name]).lower()}" for name in differing)
        written = " and ".join(f"{name} {str(added[name]).lower()}" for name in differing)
        does = (
            "has a post-processor that says"
            if files.tokenizer.get("post_processor")
            else "has no post-processor, which says"
        )
        yield (
            f"tokenizer_config.json says {said}, but tokenizer.json {does} otherwise and counts, as in transformers 5: "
            f"{written} is written."
        )


def _affixes(files: TokenizerFiles) -> Affixes:
    """Return the tokens that the post-processor of ``tokenizer.json`` adds, if it has one."""
    affixes = Affixes()
    for step in flat(files.tokenizer.get("post_processor")):
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
    strange = next((token_id for token_id in (*first, *last) if type(token_id) is not int), None)
    if strange is not None:
        raise TokenizerError(f"{files.json_path}: damaged post-processor template: wanted a token id, got {strange!r}")
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
    for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    return templates


def _processor_template(files: TokenizerFiles) -> dict[str, str]:
    template = read_json(files.folder / "chat_template.json").get("chat_template")
    return {"default": template} if isinstance(template, str) else {}


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
