"""Added tokens of a model folder, with the ids that transformers 5 gives them.

Several files list added tokens: ``tokenizer.json``, ``added_tokens_decoder`` in ``tokenizer_config.json``,
``added_tokens.json`` and ``special_tokens_map.json``. Where they disagree, this module follows transformers
(``PreTrainedTokenizerBase._from_pretrained`` and ``TokenizersBackend.__init__``):

* With ``added_tokens_decoder``, ``added_tokens.json`` and ``special_tokens_map.json`` are ignored.
* With ``tokenizer.json``, the tokenizers library assigns ids by text: a text in the vocabulary keeps its id, any
  other gets the next free one. The ids in the files do not count. Later flags replace earlier ones.
* Tokens that a file names for a role (``bos_token``, ``image_token``, ...) but does not list are added at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import TokenizerError
from .steps import is_byte_level

JSON, CONFIG, MAP, LIST = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# Classes of transformers 5 that read only vocabulary and merges from tokenizer.json, so that added_tokens_decoder
# replaces its added tokens; the model types for which transformers ignores such a class; those with a default class.
_REBUILDING = frozenset({"CodeLlama", "Cohere", "GPT2", "GPTNeoX", "Gemma", "Llama", "Qwen2", "Qwen3_5", "T5"})
_BY_MODEL_TYPE = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "Gemma"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2"),
    **dict.fromkeys(("phi", "gpt2", "gptj", "starcoder2"), "GPT2"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mamba"), "GPTNeoX"),
    **dict.fromkeys(("cohere", "cohere2"), "Cohere"),
}
_LOADED_AS_IT_IS = frozenset(
    [
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "internlm2",
        "llava",
        "llava_next",
        "mistral",
        "mistral3",
        "mixtral",
        "olmo2",
        "olmo3",
        "phi3",
        "smolvlm",
        "stablelm",
    ]
)


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before it is split.

    ``special`` marks control tokens; ``strips`` marks tokens that strip spaces around them or match whole words only.
    """

    token_id: int
    text: str
    special: bool
    strips: bool = False


@dataclass(frozen=True)
class Listings:
    """The parsed files of a folder that list tokens; ``config`` is the model's ``config.json``."""

    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    added_tokens_map: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def reads_map(self) -> bool:
        """Whether ``special_tokens_map.json`` and ``added_tokens.json`` count."""
        return "added_tokens_decoder" not in self.tokenizer_config

    @property
    def named(self) -> dict[str, Any]:
        """The settings of ``tokenizer_config.json``, with those of ``special_tokens_map.json`` if they count."""
        return {**self.tokenizer_config, **(self.special_tokens_map if self.reads_map else {})}

    def json_tokens(self) -> tuple[AddedToken, ...]:
        """Return the added tokens of ``tokenizer.json``, in its order and with its ids."""
        entries = self.tokenizer.get("added_tokens") or []
        if not isinstance(entries, list):
            raise TokenizerError(f"{JSON}: added_tokens: wanted a list, got {type(entries).__name__}; restore the file")
        return tuple(_added_token(entry, _field(entry, "id")) for entry in entries)

    def decoder_tokens(self) -> tuple[AddedToken, ...]:
        """Return the added tokens of ``tokenizer_config.json`` by id."""
        entries = self.tokenizer_config.get("added_tokens_decoder") or {}
        if not isinstance(entries, Mapping):
            raise TokenizerError(
                f"{CONFIG}: added_tokens_decoder: wanted an object, got {type(entries).__name__}; restore the file"
            )
        tokens = [_added_token(entry, _decimal(key)) for key, entry in entries.items()]
        return tuple(sorted(tokens, key=lambda token: token.token_id))

    def map_tokens(self) -> tuple[AddedToken, ...]:
        """Return the tokens of ``added_tokens.json`` by id; those named by another file are special."""
        special = set(named_tokens(self.named))
        tokens = [
            AddedToken(_token_id(i, text, LIST), text, text in special) for text, i in self.added_tokens_map.items()
        ]
        return tuple(sorted(tokens, key=lambda token: token.token_id))


@dataclass(frozen=True)
class Resolved:
    """The added tokens that count, by id, and a note on each file that disagrees."""

    tokens: Mapping[int, AddedToken]
    notes: tuple[str, ...]


def resolve(listings: Listings, vocab: Mapping[str, int], by_file_id: bool) -> Resolved:
    """Return the added tokens as transformers has them.

    Args:
        listings: what the files list.
        vocab: id of every token of the vocabulary proper.
        by_file_id: keep the ids of the files; for ``tokenizer.model`` alone, whose ids the library does not assign.

    Raises:
        TokenizerError: an entry is not an id and a text.

    """
    base = listings.json_tokens()
    if listings.reads_map:
        others = {**_by_id(listings.map_tokens()), **_by_id(base)}
        listed: Sequence[AddedToken] = tuple(others[i] for i in sorted(others))
    else:
        listed = listings.decoder_tokens()
    if rebuilds(listings):  # those of the vocabulary stay: the class names them (<s>, <unk>) or has them there
        base = tuple(token for token in base if token.text in vocab)
    register = _Register(vocab, by_file_id)
    for token in (*base, *listed):
        register.add(token)
    for text in named_tokens(listings.named):
        register.add_named(text)
    found = {token.token_id: token for token in register.tokens.values()}
    return Resolved(found, tuple(_notes(listings, found, vocab)))


def rebuilds(listings: Listings) -> bool:
    """Return whether transformers rebuilds the tokenizer from the vocabulary and merges of ``tokenizer.json``."""
    return tokenizer_class(listings) in _REBUILDING


def tokenizer_class(listings: Listings) -> str:
    """Return the class that transformers uses, without ``Tokenizer`` and ``Fast``; empty for the generic class."""
    stated = listings.config.get("model_type")
    model_type = stated if isinstance(stated, str) else ""
    name = listings.tokenizer_config.get("tokenizer_class") or listings.config.get("tokenizer_class")
    if model_type in _LOADED_AS_IT_IS:
        return ""
    if not isinstance(name, str):
        return _BY_MODEL_TYPE.get(model_type, "")
    name = name.removesuffix("Fast").removesuffix("Tokenizer")
    return "" if name == "Llama" and is_byte_level(listings.tokenizer) else name


def named_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens that settings name, in the order in which transformers adds them."""
    roles = [f"{role}_token" for role in ROLES]
    others = [key for key in settings if key.endswith("_token") and key not in roles]
    extra, additional = settings.get("extra_special_tokens"), settings.get("additional_special_tokens")
    named = extra.values() if isinstance(extra, Mapping) else ()
    listed = extra if isinstance(extra, list) and extra else additional if isinstance(additional, list) else ()
    for value in (*(settings.get(key) for key in (*roles, *others)), *named, *listed):
        if (text := token_text(value)) is not None:
            yield text


def token_text(entry: Any) -> str | None:
    """Return the text of a token as configuration files write it: a string or an object with ``content``."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) and text else None


class _Register:
    """Added tokens by text, with ids as the tokenizers library assigns them (``AddedVocabulary::add_tokens``)."""

    def __init__(self, vocab: Mapping[str, int], by_file_id: bool) -> None:
        self.tokens: dict[str, AddedToken] = {}
        self._vocab, self._by_file_id = vocab, by_file_id
        self._last = -1

    def add(self, token: AddedToken) -> None:
        if not token.text:
            return
        if self._by_file_id:
            token_id = token.token_id
            self.tokens = {text: other for text, other in self.tokens.items() if other.token_id != token_id}
        else:
            token_id = self._vocab.get(token.text, self._known(token.text))
        self.tokens[token.text] = replace(token, token_id=token_id)
        self._last = max(self._last, token_id)

    def add_named(self, text: str) -> None:
        """Add a token that a file names but does not list; leave tokens of the vocabulary unchanged."""
        if text in self.tokens or text in self._vocab:
            return
        token_id = self._known(text)
        self.tokens[text] = AddedToken(token_id, text, special=True)
        self._last = max(self._last, token_id)

    def _known(self, text: str) -> int:
        known = self.tokens.get(text)
        return max(self._last + 1, len(self._vocab)) if known is None else known.token_id


# --- disagreements between files -------------------------------------------------------------------------------------


def _notes(listings: Listings, found: Mapping[int, AddedToken], vocab: Mapping[str, int]) -> Iterator[str]:
    final = {text: i for text, i in vocab.items() if i not in found} | {t.text: t.token_id for t in found.values()}
    for file, tokens, has_flags in (
        (JSON, listings.json_tokens(), True),
        (CONFIG, listings.decoder_tokens(), True),
        (LIST, listings.map_tokens(), False),
    ):
        differing = [(token, _otherwise(token, final, found, has_flags)) for token in tokens]
        yield from _note(file, [(token, how) for token, how in differing if how])
    yield from _unlisted_note(listings, found)
    yield from _roles_note(listings)


def _otherwise(token: AddedToken, final: Mapping[str, int], found: Mapping[int, AddedToken], has_flags: bool) -> str:
    """Return how a listed token differs in the result; empty if it does not."""
    token_id = final.get(token.text)
    if token_id is None:
        return "which is not a token"
    if token_id != token.token_id:
        return f"which has id {token_id}"
    if has_flags and token_id in found and found[token_id].special != token.special:
        return "which is special" if found[token_id].special else "which is not special"
    return ""


def _note(file: str, differing: Sequence[tuple[AddedToken, str]]) -> Iterator[str]:
    if not differing:
        return
    token, how = differing[0]
    kind = "special" if token.special else "ordinary"
    yield (
        f"{file} disagrees with the tokenizer that transformers builds from the files about {len(differing)} added "
        f"token{'s' * (len(differing) > 1)}: for example, it lists {token.text!r} as {kind} with id {token.token_id}, "
        f"{how}. The GGUF follows transformers."
    )


def _unlisted_note(listings: Listings, found: Mapping[int, AddedToken]) -> Iterator[str]:
    listed = {token.text for tokens in (listings.json_tokens(), listings.decoder_tokens()) for token in tokens}
    listed |= listings.added_tokens_map.keys()
    unlisted = [token for token in found.values() if token.text not in listed]
    if unlisted:
        first = unlisted[0]
        yield (
            f"{CONFIG} or {MAP} names {len(unlisted)} special tokens that no file lists, such "
            f"as {first.text!r}: it gets id {first.token_id}, as in transformers."
        )


def _roles_note(listings: Listings) -> Iterator[str]:
    """Yield a note if ``special_tokens_map.json`` and ``tokenizer_config.json`` name different tokens for roles."""
    files = (listings.tokenizer_config, listings.special_tokens_map)
    texts = ((role, *(token_text(file.get(f"{role}_token")) for file in files)) for role in ROLES)
    differing = [(role, ours, theirs) for role, ours, theirs in texts if ours and theirs and ours != theirs]
    if differing:
        role, ours, theirs = differing[0]
        counts = MAP if listings.reads_map else CONFIG
        yield (
            f"{CONFIG} and {MAP} name different tokens for {len(differing)} role{'s' * (len(differing) > 1)}: "
            f"{role}_token is {ours!r} in the first, {theirs!r} in the second. {counts} counts, as in transformers."
        )


# --- entries ----------------------------------------------------------------------------------------------------------


def _by_id(tokens: Iterable[AddedToken]) -> dict[int, AddedToken]:
    return {token.token_id: token for token in tokens}


def _added_token(entry: Any, token_id: Any) -> AddedToken:
    text = _field(entry, "content")
    strips = any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    return AddedToken(_token_id(token_id, text, "added_tokens"), str(text), bool(entry.get("special")), strips)


def _decimal(key: str) -> Any:
    return int(key) if key.isdecimal() else key


def _field(entry: Any, key: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise TokenizerError(f"added_tokens: wanted an object with content and id, got {entry!r}; restore the file")
    return entry[key]


def _token_id(value: Any, text: Any, file: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TokenizerError(f"{file}: token {text!r}: wanted an id from 0, got {value!r}; restore the file")
    return value
