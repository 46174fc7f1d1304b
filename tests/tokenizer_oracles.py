"""Both sides of a tokenizer test: folders as Hugging Face has them, the libraries that read them, and llama.cpp."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as binding
import sentencepiece
import tokenizers
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue

from nsds_gguf.llamacpp.llama import llama_build
from nsds_gguf.read.tokenizer.pretokenizers import BYTE_LEVEL, Chain
from nsds_gguf.records import kv

Ids = list[int]

_SILENT = binding.llama_log_callback(lambda *_: None)  # llama-cpp-python's own callback fails on tokens cut in a letter
binding.llama_log_set(_SILENT, None)


@dataclass(frozen=True)
class Stored:
    """What a ``ggml-vocab-*.gguf`` holds; ``stripping`` tokens take the blanks after them along."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    stripping: frozenset[str] = frozenset()

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the texts of tokens, joined."""
        return "".join(self.tokens[i] for i in ids)


# --- folders ----------------------------------------------------------------------------------------------------------


def chain_json(chain: Chain) -> dict[str, Any]:
    """Return a chain of the table as ``tokenizer.json`` spells it."""
    steps: list[dict[str, Any]] = []
    for kind, *options in chain:
        if kind == "Split":
            pattern, behavior, *inverted = options
            steps.append({"type": kind, "pattern": {"Regex": pattern}, "behavior": behavior, "invert": bool(inverted)})
        elif options == ["individual"]:
            steps.append({"type": kind, "individual_digits": True})
        elif (kind,) == BYTE_LEVEL:
            steps.append({"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
        else:
            steps.append({"type": kind, **json.loads(options[0])})
    return {"type": "Sequence", "pretokenizers": steps}


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def bos_template(bos: str, bos_id: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS in front."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def added_token(
    token_id: int, text: str, *, special: bool, normalized: bool = False, rstrip: bool = False
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": rstrip}
    return {"id": token_id, "content": text, **flags, "normalized": normalized, "special": special}


def write_bpe_folder(
    folder: Path,
    stored: Stored,
    pre_tokenizer: Mapping[str, Any],
    *,
    ignore_merges: bool,
    nfc: bool,
    merge_lists: bool,
) -> None:
    """Write a byte-level BPE vocabulary as ``tokenizer.json`` and ``tokenizer_config.json``."""
    added = [
        added_token(i, text, special=kind == TokenType.CONTROL, normalized=nfc and not text.strip())
        for i, (text, kind) in enumerate(zip(stored.tokens, stored.types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and not text.startswith("[PAD")
    ]
    bos = next(token for token in added if token["special"])
    n_base = max(i for i, kind in enumerate(stored.types) if kind == TokenType.NORMAL) + 1
    vocab = {text: i for i, text in enumerate(stored.tokens[:n_base])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "Sequence",
            "processors": [byte_level(True), bos_template(bos["content"], bos["id"])],
        },
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in stored.merges] if merge_lists else stored.merges,
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"eos_token": bos["content"]})


def write_sentencepiece_folder(folder: Path, stored: Stored) -> None:
    """Write a sentencepiece vocabulary as ``tokenizer.model``: BPE, identity normalizer, blank in front.

    Tokens after the last piece are added tokens of ``tokenizer_config.json``.
    """
    n_base = _n_base(stored)
    pieces = b"".join(
        _message(1, _message(1, text.encode()) + struct.pack("<Bf", 2 << 3 | 5, score) + _number(3, kind))
        for text, kind, score in zip(stored.tokens[:n_base], _piece_types(stored), stored.scores[:n_base], strict=True)
    )
    trainer = _number(3, 2) + _number(35, 1)  # model_type BPE, byte_fallback
    normalizer = _message(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(pieces + _message(2, trainer) + _message(3, normalizer))
    if n_base < len(stored.tokens):
        decoder = {str(token["id"]): token for token in _added_tokens(stored)}
        write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})


def write_converted_folder(folder: Path, stored: Stored) -> None:
    """Write a sentencepiece vocabulary as the ``tokenizer.json`` that transformers converts it to (Llama 2, Phi 3)."""
    texts = dict(enumerate(stored.tokens[: _n_base(stored)]))
    vocab = {text: i for i, text in texts.items()}
    ranked = sorted(
        (
            (stored.scores[i], len(text[:k]), len(text[k:]), -vocab[text[:k]], -vocab[text[k:]], text[:k], text[k:])
            for i, text in texts.items()
            for k in range(1, len(text))
            if text[:k] in vocab and text[k:] in vocab
        ),
        reverse=True,
    )
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer = {
        "added_tokens": _added_tokens(stored),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank]},
        "pre_tokenizer": None,
        "post_processor": bos_template("<s>", vocab["<s>"]),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _converted_bpe(vocab, [[left, right] for *_, left, right in ranked]),
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})


def write_gemma_folder(folder: Path, stored: Stored) -> None:
    """Write a Gemma vocabulary, whose merges are known, as its ``tokenizer.json``: no blank in front."""
    vocab = {text: i for i, text in enumerate(stored.tokens)}
    tokenizer = {
        "added_tokens": _added_tokens(stored),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": bos_template("<bos>", vocab["<bos>"]),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _converted_bpe(vocab, [merge.split(" ") for merge in stored.merges]),
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<eos>"})


def _converted_bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return {"type": "BPE", **options, "vocab": vocab, "merges": merges}


def _n_base(stored: Stored) -> int:
    """Return how many tokens the tokenizer itself has; further ones are added tokens or padding."""
    return 1 + max(i for i, kind in enumerate(stored.types) if kind in (TokenType.NORMAL, TokenType.BYTE))


def _piece_types(stored: Stored) -> list[int]:
    """Return the types that ``tokenizer.model`` has: the others come from added tokens."""
    kinds = stored.types[: _n_base(stored)]
    controls = (TokenType.CONTROL, TokenType.USER_DEFINED)
    control = [TokenType.CONTROL if kind in controls else kind for kind in kinds]
    return [int(TokenType.UNKNOWN if stored.tokens[i] == "<unk>" else kind) for i, kind in enumerate(control)]


def _added_tokens(stored: Stored) -> list[dict[str, Any]]:
    """Return what is matched before text is split; tokens in ``stored.stripping`` take the blanks after them along."""
    kinds = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    return [
        added_token(i, text, special=kinds[kind], rstrip=text in stored.stripping)
        for i, (text, kind) in enumerate(zip(stored.tokens, stored.types, strict=True))
        if kind in kinds and not text.startswith("[PAD")
    ]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# --- the two sides ----------------------------------------------------------------------------------------------------


# struct formats of the scalar types of enum gguf_type.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class HuggingFace:
    """The tokenizers library on ``tokenizer.json``, BOS included."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokenize(self, strings: Sequence[str], *, parse_special: bool) -> list[Ids]:
        self._tokenizer.encode_special_tokens = not parse_special
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(strings))]


class SentencePiece:
    """The sentencepiece library on ``tokenizer.model``, BOS included; it parses no special tokens."""

    def __init__(self, folder: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def tokenize(self, strings: Sequence[str], *, parse_special: bool) -> list[Ids]:
        if parse_special:
            raise ValueError("sentencepiece parses no special tokens")
        return [[self._processor.bos_id(), *ids] for ids in self._processor.encode(list(strings))]


class LlamaCpp:
    """llama.cpp on the vocabulary of a GGUF, bound by ctypes alone.

    ``overrides`` replaces text and truth values of keys.
    """

    def __init__(self, path: Path, overrides: Mapping[str, str | bool] | None = None) -> None:
        llama_build()  # sends llama.cpp's log where the package wants it
        params = binding.llama_model_default_params()
        params.vocab_only = True
        entries = [_override(key, value) for key, value in (overrides or {}).items()]
        self._overrides = (binding.llama_model_kv_override * (len(entries) + 1))(*entries)
        params.kv_overrides = self._overrides
        self._model = binding.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self.vocab = binding.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        binding.llama_model_free(self._model)

    def tokenize(self, strings: Sequence[str], *, parse_special: bool, add_special: bool = True) -> list[Ids]:
        return [self._tokenize(text.encode(), parse_special, add_special) for text in strings]

    def _tokenize(self, data: bytes, parse_special: bool, add_special: bool) -> Ids:
        room = len(data) + 8
        buffer = (binding.llama_token * room)()
        n_tokens = binding.llama_tokenize(self.vocab, data, len(data), buffer, room, add_special, parse_special)
        if n_tokens < 0:
            raise SystemExit(f"llama_tokenize failed with {n_tokens} on {data!r}")
        return buffer[:n_tokens]


def _override(key: str, value: str | bool) -> binding.llama_model_kv_override:
    is_text = isinstance(value, str)
    content = {"val_str": value.encode()} if isinstance(value, str) else {"val_bool": value}
    tag = binding.LLAMA_KV_OVERRIDE_TYPE_STR if is_text else binding.LLAMA_KV_OVERRIDE_TYPE_BOOL
    return binding.llama_model_kv_override(tag, key.encode(), binding.llama_model_kv_override_value(**content))


def write_gguf(path: Path, keys: Mapping[str, GGUFValue]) -> None:
    """Write a GGUF that holds a vocabulary only; gguf.GGUFWriter does the same five times slower."""
    entries = {"general.architecture": kv("llama", GGUFValueType.STRING), **keys}
    entries |= {f"llama.{name}": kv(1, GGUFValueType.UINT32) for name in _HPARAMS}
    entries["llama.attention.layer_norm_rms_epsilon"] = kv(1e-5, GGUFValueType.FLOAT32)
    packed = [_packed_text(key) + struct.pack("<I", entry.type) + _packed(entry) for key, entry in entries.items()]
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(packed)) + b"".join(packed))


_HPARAMS = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")


def _packed(entry: GGUFValue) -> bytes:
    if entry.type == GGUFValueType.STRING:
        return _packed_text(entry.value)
    if entry.type != GGUFValueType.ARRAY:
        return struct.pack(f"<{SCALARS[entry.type]}", entry.value)
    head = struct.pack("<IQ", entry.sub_type, len(entry.value))
    if entry.sub_type == GGUFValueType.STRING:
        return head + b"".join(map(_packed_text, entry.value))
    return head + struct.pack(f"<{len(entry.value)}{SCALARS[int(entry.sub_type or 0)]}", *entry.value)


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
