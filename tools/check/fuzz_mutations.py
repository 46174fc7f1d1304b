"""Mutations of files: of bytes, of JSON, of GGUF headers, of protocol buffers and of chat templates.

Every function takes a ``random.Random`` and gives bytes, so that a seed says what comes out.
"""

from __future__ import annotations

import copy
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

Path = list[Any]

_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)

# What a value of JSON may be instead. Text that only raw bytes can say comes in ``_spoilt_text``.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    -(2**31), -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-45, 1e-320, 1e38, 3.6e9, 1e300, 1.5, -2.5, math.nan,
    math.inf, -math.inf, "", " ", "0", "1", "-1", "1e999", "true", "null", "a", "\ud800", "x\udfff", "\0", "\x1b[2J",
    "é" * 300, "▁", "<s>", "</s>", "<unk>", "<0x0A>", "../../etc/passwd", "/etc/passwd", "C:\\x", "a/b", "..", "%s{0}",
    "{{ 1/0 }}", [], {}, [[]], [{}], [None], [0], [""], {"": None}, {"a": [1]}, {"content": 5}, {"type": []},
    [1, "a", None, 2.5], ["a", "a"], [["a", "b"]], [[1, 2]], "a" * 70_000, [0] * 3000, ["x"] * 3000,
)  # fmt: skip

_SPOILT = (
    (rb'": [^,\n]{1,20}', b'": NaN'), (rb'": [^,\n]{1,20}', b'": -Infinity'), (rb'": [^,\n]{1,20}', b'": 1e999'),
    (rb'": [^,\n]{1,20}', b'": ' + b"9" * 5000), (rb'"[^"]{1,9}"', b'"\\ud800"'), (rb'"[^"]{1,9}"', b'"\xff\xfe"'),
    (rb'"[^"]{1,9}"', b'"\\u0000"'), (rb"\d+", b"-0"), (rb"\d+", b"0123"), (rb"\d+", b"1" * 310), (rb",", b",,"),
    (rb"\{", b'{"a": 1, "a": 2, '), (rb"[\[{]", b"[" * 100_000), (rb"[\[{]", b'{"a":' * 60_000), (rb"\}", b"]"),
)  # fmt: skip


# --- bytes ------------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: Random, data: bytes, n_most: int = 4) -> bytes:
    """Return bytes after one to ``n_most`` flips, insertions, deletions, copies, cuts or numbers written over them."""
    found = bytearray(data)
    for _ in range(rng.randint(1, n_most)):
        at = rng.randrange(len(found) + 1)
        rng.choice(_BYTE_EDITS)(rng, found, at)
    return bytes(found)


def _flip(rng: Random, data: bytearray, at: int) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _overwrite(rng: Random, data: bytearray, at: int) -> None:
    size = rng.choice((1, 2, 4, 8))
    at -= at % rng.choice((1, size))
    word = rng.choice(_WORDS) if rng.random() < 0.7 else rng.getrandbits(64)
    data[at : at + size] = (word & (256**size - 1)).to_bytes(size, "little")


def _insert(rng: Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))


def _delete(rng: Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.choice((1, 2, 4, 8, 64, 1024))]


def _repeat(rng: Random, data: bytearray, at: int) -> None:
    piece = data[at : at + rng.choice((1, 4, 16, 256))]
    data[at:at] = piece * rng.choice((1, 2, 50))


def _cut(rng: Random, data: bytearray, at: int) -> None:
    del data[at:]


_BYTE_EDITS: tuple[Callable[[Random, bytearray, int], None], ...] = (
    _flip, _flip, _flip, _overwrite, _overwrite, _overwrite, _insert, _delete, _repeat, _cut,
)  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------------------------------


def mutate_json(rng: Random, value: Any, known: Sequence[tuple[str, Any]] = ()) -> bytes:
    """Return the text of a JSON value after mutations of its structure, its text or both.

    Args:
        rng: source of chance.
        value: what is mutated; it is not changed.
        known: keys, and values that they have elsewhere, to be set at random.

    """
    holder = [copy.deepcopy(value)]
    kind = rng.random()
    if kind < 0.92:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _edit(rng, holder, known)
    text = json.dumps(holder[0], ensure_ascii=rng.random() < 0.9, indent=rng.choice((None, 1)))
    data = text.encode(errors="surrogatepass")
    if kind >= 0.92:
        return mutate_bytes(rng, data) if rng.random() < 0.5 else _spoilt_text(rng, data)
    return data


def _edit(rng: Random, holder: list[Any], known: Sequence[tuple[str, Any]]) -> None:
    """Change one place of the value in ``holder``."""
    if known and isinstance(holder[0], dict) and rng.random() < 0.15:
        key, usual = rng.choice(known)
        holder[0][key] = rng.choice(_VALUES) if rng.random() < 0.6 else copy.deepcopy(usual)
        return
    parent, key = _place(rng, holder)
    rng.choice(_JSON_EDITS)(rng, parent, key, holder)


def _place(rng: Random, holder: list[Any]) -> tuple[Any, Any]:
    """Return a container and a key or index in it; shallow places come up as often as deep ones."""
    parent, key = holder, 0
    while isinstance(parent[key], dict | list) and parent[key] and (parent is holder or rng.random() < 0.65):
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key


def _replaced(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    parent[key] = copy.deepcopy(rng.choice(_VALUES))


def _nudged(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = rng.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 10**6, value + 2**32))
    elif isinstance(value, float):
        parent[key] = rng.choice(
            (-value, value * 2, value * 1e30, value / 1e30, int(value) if abs(value) < 1e18 else 0)
        )
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        letter = rng.choice(("", "\0", "é", "\ud834", "/", "\u202e", "a" * 20, " ", "<", "%"))
        parent[key] = value[:at] + letter + value[at + rng.randrange(2) :]
    elif isinstance(value, list):
        parent[key] = rng.choice((value * 2, value[:-1], value[::-1], value[:1], [value]))
    else:
        items = [list(item) for item in value.items()]
        parent[key] = dict(value) if rng.random() < 0.3 else items


def _deleted(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    if parent is not holder:
        del parent[key]


def _transplanted(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    other, place = _place(rng, holder)
    parent[key] = copy.deepcopy(other[place])


def _renamed(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    if isinstance(parent, dict):
        name = rng.choice((str(key) + "x", str(key)[:-1], "", "\ud800", "a" * 5000, str(key).upper(), "../x"))
        parent[name] = parent.pop(key)


def _wrapped(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    for _ in range(rng.choice((1, 2, 60))):
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}


def _added(rng: Random, parent: Any, key: Any, holder: list[Any]) -> None:
    if isinstance(parent, dict):
        parent[rng.choice(("type", "id", "content", "name", "a", "__metadata__"))] = copy.deepcopy(rng.choice(_VALUES))
    else:
        parent.insert(0 if parent is not holder else 1, copy.deepcopy(rng.choice(_VALUES)))


_JSON_EDITS: tuple[Callable[[Random, Any, Any, list[Any]], None], ...] = (
    _replaced, _replaced, _replaced, _replaced, _nudged, _nudged, _nudged, _deleted, _deleted, _transplanted, _renamed,
    _wrapped, _added,
)  # fmt: skip


def _spoilt_text(rng: Random, data: bytes) -> bytes:
    """Return JSON text with one thing in it that the ``json`` module would not write, or in another coding."""
    if rng.random() < 0.1:
        prefix, codec = rng.choice(((b"\xef\xbb\xbf", "utf-8"), (b"", "utf-16"), (b"", "utf-32"), (b"\0", "utf-8")))
        return prefix + data.decode(errors="replace").encode(codec)
    pattern, put = rng.choice(_SPOILT)
    places = list(re.finditer(pattern, data))[:4000]
    if not places:
        return data[: len(data) // 2]
    place = rng.choice(places)
    return data[: place.start()] + put + data[place.end() :]


# --- safetensors ------------------------------------------------------------------------------------------------------


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Return a file of safetensors with a mutated header, or length of it, or data."""
    n_header = int.from_bytes(data[:8], "little")
    raw, rest = data[8 : 8 + n_header], data[8 + n_header :]
    kind = rng.random()
    if kind < 0.7:
        raw = mutate_json(rng, json.loads(raw), (("__metadata__", {"format": "pt"}),))
    elif kind < 0.85:
        raw = mutate_bytes(rng, raw)
    length = len(raw)
    if kind > 0.85:
        length = rng.choice((0, 1, length - 1, length + 1, length + len(rest), 10**8, 2**63 - 1, 2**64 - 1, 2**32))
    if rng.random() < 0.05:
        rest = rest[: rng.randrange(len(rest) + 1)]
    return (length & (2**64 - 1)).to_bytes(8, "little") + raw + rest


# --- GGUF -------------------------------------------------------------------------------------------------------------

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


@dataclass
class GgufParts:
    """A GGUF that can be put together wrongly: values are ``(type, value)``, of arrays ``(9, (item type, items))``."""

    keys: list[tuple[str, int, Any]]
    tensors: list[tuple[str, list[int], int, int]]  # name, sizes fastest first, type, offset in the data
    data: bytes
    version: int = 3
    wrong: dict[str, int] = field(default_factory=dict)  # counts that are not those of the lists


def gguf_bytes(parts: GgufParts) -> bytes:
    """Return the file."""
    counts = parts.wrong.get("tensors", len(parts.tensors)), parts.wrong.get("keys", len(parts.keys))
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", parts.version, *counts))
    for name, kind, value in parts.keys:
        out += _text(name) + struct.pack("<I", kind) + _packed(kind, value, parts.wrong.get(f"length of {name}"))
    for name, sizes, kind, offset in parts.tensors:
        out += _text(name) + struct.pack("<I", parts.wrong.get(f"sizes of {name}", len(sizes)))
        out += b"".join((size % 2**64).to_bytes(8, "little") for size in sizes)
        out += struct.pack("<IQ", kind, offset % 2**64)
    return bytes(out) + bytes(-len(out) % 32) + parts.data


def _text(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    return len(data).to_bytes(8, "little") + data


def _packed(kind: int, value: Any, length: int | None = None) -> bytes:
    if kind == _ARRAY and isinstance(value, tuple):
        item, items = value
        n = len(items) if length is None else length
        return struct.pack("<IQ", item, n % 2**64) + b"".join(_packed(item, entry) for entry in items)
    if kind == _TEXT:
        return _text(value if isinstance(value, str | bytes) else str(value))
    layout = _SCALARS.get(kind, "<I")
    try:
        return struct.pack(layout, value)
    except (struct.error, OverflowError):
        return bytes(struct.calcsize(layout) - 1) + b"\x7f"


def mutate_gguf(rng: Random, base: GgufParts) -> bytes:
    """Return a GGUF after mutations of its keys, its tensor table, its counts or its bytes."""
    if rng.random() < 0.2:
        whole = gguf_bytes(base)
        n_header = len(whole) - len(base.data)
        return mutate_bytes(rng, whole[:n_header]) + base.data
    parts = copy.deepcopy(base)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_GGUF_EDITS)(rng, parts)
    data = gguf_bytes(parts)
    return data[: rng.randrange(len(data))] if rng.random() < 0.03 else data


def _key_value(rng: Random, parts: GgufParts) -> None:
    at = rng.randrange(len(parts.keys))
    name, kind, value = parts.keys[at]
    if kind == _ARRAY and value[1] and rng.random() < 0.7:
        item, items = value
        place = rng.randrange(len(items))
        new = _other_value(rng, item)
        change = rng.choice((items[:place], [*items[:place], new, *items[place + 1 :]], items + items[:1], items[::-1]))
        parts.keys[at] = name, kind, (item, change)
    else:
        parts.keys[at] = name, kind, value if kind == _ARRAY else _other_value(rng, kind)


def _other_value(rng: Random, kind: int) -> Any:
    if kind == _TEXT:
        return rng.choice(
            ("", "a", "\ud800", b"\xff\xfe", "x" * 70_000, "{{ messages }}", "default", "llama", "bert", "▁")
        )
    if kind == 7:
        return rng.choice((False, True))
    if kind in (6, 12):
        return rng.choice((0.0, -1.0, 1e-38, 1e30, math.nan, math.inf, 0.5, 1e6))
    return rng.choice((0, 1, 2, 3, 7, 63, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1))


def _key_type(rng: Random, parts: GgufParts) -> None:
    at = rng.randrange(len(parts.keys))
    kind = rng.choice((*_SCALARS, _TEXT, _ARRAY, 13, 2**31))
    value: Any = _other_value(rng, kind)
    if kind == _ARRAY:
        item = rng.choice((*_SCALARS, _TEXT, _ARRAY, 99))
        value = item, [_other_value(rng, item) for _ in range(rng.choice((0, 1, 2, 300)))]
    parts.keys[at] = parts.keys[at][0], kind, value


def _key_gone(rng: Random, parts: GgufParts) -> None:
    del parts.keys[rng.randrange(len(parts.keys))]


def _key_twice(rng: Random, parts: GgufParts) -> None:
    parts.keys.append(rng.choice(parts.keys))


def _key_renamed(rng: Random, parts: GgufParts) -> None:
    at = rng.randrange(len(parts.keys))
    name, *rest = parts.keys[at]
    parts.keys[at] = (rng.choice((name + "x", "", "\ud800", name[1:], *_GGUF_KEYS)), *rest)  # type: ignore[assignment]


def _key_new(rng: Random, parts: GgufParts) -> None:
    kind = rng.choice((4, 5, 6, 7, _TEXT, 10, _ARRAY))
    value = (rng.choice((4, 5, 6, _TEXT)), []) if kind == _ARRAY else _other_value(rng, kind)
    if kind == _ARRAY:
        value = value[0], [_other_value(rng, value[0]) for _ in range(rng.choice((1, 2, 5)))]
    parts.keys.append((rng.choice(_GGUF_KEYS), kind, value))


_GGUF_KEYS = (
    "general.alignment", "general.type", "split.count", "split.no", "split.tensors.count", "general.base_model.count",
    "general.base_model.0.repo_url", "general.license", "general.name", "general.tags", "general.languages",
    "general.sampling.temp", "general.sampling.top_k", "tokenizer.chat_template", "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eos_token_id", "llama.expert_count",
    "llama.expert_used_count", "llama.attention.key_length", "llama.attention.head_count_kv", "llama.rope.freq_base",
    "llama.rope.scaling.factor", "llama.vocab_size", "llama.context_length", "llama.attention.sliding_window",
    "llama.logit_scale", "llama.attention.layer_norm_epsilon", "llama.residual_scale",
    "llama.leading_dense_block_count", "llama.pooling_type", "llama.attention.causal", "general.file_type",
    "general.source.url",
)  # fmt: skip


def _tensor_edit(rng: Random, parts: GgufParts) -> None:
    if not parts.tensors:
        return
    at = rng.randrange(len(parts.tensors))
    name, sizes, kind, offset = parts.tensors[at]
    which = rng.randrange(6)
    if which == 0:
        kind = rng.choice((0, 1, 2, 8, 12, 14, 24, 26, 27, 28, 30, 31, 39, 40, 99, 2**31))
    elif which == 1:
        sizes[rng.randrange(len(sizes))] = rng.choice((0, 1, 2, 31, 32, 256, 2**31, 2**32, 2**63, 2**64 - 1, 2**62))
    elif which == 2:
        offset = rng.choice((offset + 1, offset + 32, offset - 32, 0, 2**31, 2**63, 2**64 - 1, len(parts.data)))
    elif which == 3:
        sizes = rng.choice(([*sizes, 1], sizes[::-1], sizes[:1], sizes + sizes, [1] * 4, []))
    elif which == 4:
        name = rng.choice(
            (
                parts.tensors[0][0],
                "",
                "\ud800",
                "blk.99999999999999999999.attn_q.weight",
                name + "x",
                "blk.-1.attn_q.weight",
                "v.blk.0.attn_q.weight",
                "mm.0.weight",
                "output.bias",
                "x" * 300,
            )
        )
    else:
        parts.wrong[f"sizes of {name}"] = rng.choice((0, 5, 2**31, 2**32 - 1))
    parts.tensors[at] = name, sizes, kind, offset


def _tensor_gone(rng: Random, parts: GgufParts) -> None:
    if parts.tensors:
        del parts.tensors[rng.randrange(len(parts.tensors))]


def _tensor_twice(rng: Random, parts: GgufParts) -> None:
    if parts.tensors:
        parts.tensors.append(copy.deepcopy(rng.choice(parts.tensors)))


def _count(rng: Random, parts: GgufParts) -> None:
    names = ["tensors", "keys", *(f"length of {name}" for name, kind, _ in parts.keys if kind == _ARRAY)]
    parts.wrong[rng.choice(names)] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1, 100))


def _version(rng: Random, parts: GgufParts) -> None:
    parts.version = rng.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))


_GGUF_EDITS: tuple[Callable[[Random, GgufParts], None], ...] = (
    _key_value, _key_value, _key_value, _key_type, _key_type, _key_gone, _key_twice, _key_renamed, _key_new, _key_new,
    _tensor_edit, _tensor_edit, _tensor_edit, _tensor_gone, _tensor_twice, _count, _version,
)  # fmt: skip


# --- protocol buffers -------------------------------------------------------------------------------------------------


@dataclass
class _Field:
    """One field of a message: number, wire type, and an integer or bytes."""

    number: int
    wire: int
    value: Any


def mutate_proto(rng: Random, data: bytes) -> bytes:
    """Return a sentencepiece model with mutated fields, of the file or of the messages in it, or mutated bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    fields = list(_parsed(data))
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not fields:
            break
        at = len(fields) - 1 - int(rng.expovariate(0.5)) if rng.random() < 0.5 else rng.randrange(len(fields))
        outer = fields[max(0, at)]
        inner = list(_parsed(outer.value)) if outer.wire == 2 else []
        if inner and rng.random() < 0.8:
            _edit_fields(rng, inner)
            outer.value = b"".join(map(_field_bytes, inner))
        else:
            _edit_fields(rng, fields)
    out = b"".join(map(_field_bytes, fields))
    return out[: rng.randrange(len(out) + 1)] if rng.random() < 0.03 else out


def _edit_fields(rng: Random, fields: list[_Field]) -> None:
    at = rng.randrange(len(fields))
    target, which = fields[at], rng.randrange(7)
    if which == 0:
        target.number = rng.choice((0, 1, 2, 3, 4, 5, 24, 35, 45, 2**28, 2**60))
    elif which == 1:
        target.wire = rng.choice((0, 1, 2, 3, 4, 5, 6, 7))
    elif which == 2:
        del fields[at]
    elif which == 3:
        fields.insert(rng.randrange(len(fields) + 1), copy.copy(target))
    elif which == 4:
        fields.append(_Field(rng.randrange(1, 54), 0, rng.choice((0, 1, 2, 3, 4, 5, 6, 2**31, 2**64))))
    elif isinstance(target.value, bytes):
        huge = rng.choice((b"", b"\xff", b"a" * 5000, b"<s>", "▁▁".encode(), b"<0x41>", struct.pack("<f", math.nan)))
        target.value = huge if rng.random() < 0.5 else mutate_bytes(rng, target.value, 2)
    else:
        target.value = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 127, 2**31 - 1, 2**31, 2**64 - 1, 2**64, 2**700))


def _parsed(data: Any) -> Iterator[_Field]:
    """Yield the fields of a message; nothing where it is none."""
    found, at = [], 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            wire = key & 7
            if wire == 0:
                value, at = _varint(data, at)
                found.append(_Field(key >> 3, wire, value))
                continue
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            if at + size > len(data):
                return
            found.append(_Field(key >> 3, wire, bytes(data[at : at + size])))
            at += size
    except (IndexError, KeyError, TypeError):
        return
    yield from found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _field_bytes(entry: _Field) -> bytes:
    key = _varint_bytes(entry.number << 3 | entry.wire)
    if isinstance(entry.value, int):
        return key + _varint_bytes(entry.value)
    return key + (_varint_bytes(len(entry.value)) if entry.wire == 2 else b"") + bytes(entry.value)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# --- chat templates ---------------------------------------------------------------------------------------------------

_TEMPLATE_TOKEN = re.compile(r"\{%-?|-?%\}|\{\{-?|-?\}\}|'[^']*'|\w+|\s+|.", re.S)

_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if true %}", "{% endif %}", "{% else %}", "{{ messages }}",
    "{% set x = 1 %}", "{{ x }}", "{{ 1 / 0 }}", "{{ undefined.a }}", "{{ messages[0]['role'] }}",
    "{{ ''.__class__ }}", "{{ 1 | tojson }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{% extends 'x' %}", "{{ self }}", "{{ cycler }}", "{{ lipsum }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ raise_exception('no') }}",
    "{{ range(99999) | list | length }}", "{{ messages.append(1) }}", "{{ '%99999d' % 1 }}", "{{ 2 ** 70000 }}",
    "{% break %}", "{{ strftime_now('%Y') }}", "{{ '\\ud800' }}", "{% generation %}", "{% endgeneration %}", "{# c #}",
    "{% raw %}", "{{ [[]] | sum(start=[]) }}", "{{ namespace(a=1) }}", "{{ messages | map('upper') | list }}",
    "{{ bos_token * 3 }}", "{{ tools }}", "\0", "{%", "}}", "{{ (((((((((1))))))))) }}",
)  # fmt: skip

# Each takes its limit of time or of memory to the full.
HOSTILE = (
    "{{ 'x' * 10**10 }}", "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}", "{{ 'x' | center(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
)  # fmt: skip


def mutate_template(rng: Random, source: str, hostile: float = 0.003) -> bytes:
    """Return a chat template with tokens lost, doubled, exchanged or put in; ``hostile`` is how often one is at war."""
    tokens = _TEMPLATE_TOKEN.findall(source)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(tokens) + 1)
        which = rng.randrange(5)
        if which == 0:
            tokens[at:at] = [rng.choice(_PIECES)]
        elif which == 1:
            del tokens[at : at + rng.choice((1, 1, 3, 10))]
        elif which == 2:
            tokens[at:at] = tokens[at : at + rng.choice((1, 5, 30))]
        elif which == 3 and len(tokens) > 1:
            other = rng.randrange(len(tokens))
            at = min(at, len(tokens) - 1)
            tokens[at], tokens[other] = tokens[other], tokens[at]
        else:
            tokens[at : at + 1] = [rng.choice(("0", "''", "none", "messages", "loop", "x" * 3000, "not ", "-", "."))]
    if rng.random() < hostile:
        tokens.append(rng.choice(HOSTILE))
    data = "".join(tokens).encode(errors="surrogatepass")
    return mutate_bytes(rng, data, 2) if rng.random() < 0.05 else data
