"""Strings to tokenize: every script, blank, digit and contraction that a pre-tokenizer may treat in its own way."""

# ruff: noqa: SIM905 -- lists of words are easier to read and to extend as text

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from nsds_gguf.read.tokenizer.bpe import byte_alphabet

N_STRINGS = 14_000

# Characters that stand for the special tokens of whatever vocabulary the strings are used with.
SPECIAL_SLOTS = [chr(0xF0000 + i) for i in range(8)]

_BLOCKS = """
20-7e 20-7e 20-7e 20-7e a1-ff 100-24f 250-2af 370-373 391-3ce 400-52f 531-556 561-587 5d0-5ea 620-64a 660-669 671-6d3
904-939 958-961 985-9b9 a85-ab9 b85-bb9 c05-c39 d05-d39 e01-e3a e40-e4e f40-f6c 1000-102a 10a0-10c5 10d0-10fa 1100-1112
1200-1248 13a0-13f4 1401-1676 1780-17b3 1820-1878 1e00-1eff 1f00-1f15 2010-2027 2030-205e 2070-2071 2074-208e 20a0-20bf
2100-218b 2190-23fe 2460-24ff 2500-27bf 2c00-2c5f 3001-303f 3041-3096 30a1-30ff 3131-318e 3200-33ff 4e00-9fa5 a640-a66d
ac00-d7a3 fb00-fb06 ff01-ff5e 10400-1044f 12000-12399 1d400-1d454 1d7ce-1d7ff 1f300-1f64f 1f680-1f6c5 1f900-1f9ff
20000-2a6d6
""".split()
BLOCKS = [tuple(int(end, 16) for end in block.split("-")) for block in _BLOCKS]
BLANKS = " |  |   |\t|\n|\n\n|\r\n|\r|\x0b|\x0c|\x85|\xa0|\u1680|\u2003|\u2028|\u2029|\u202f|\u3000".split("|")
MARKS = [chr(i) for i in range(0x300, 0x370)] + list("\u0591\u064b\u093f\u0941\u0e31\u20e3\ufe0f\u3099")
DIGITS = "0123456789" * 4 + "٠١٢٣۴۵۶०१२½¾²³Ⅳⅻ①一"
WORDS = """
the The hello WORLD naïve Österreich façade ΕΛΛΗΝΙΚΑ ελληνικά привет МИР שלום مرحبا नमस्ते สวัสดี 你好 世界 日本語
カタカナ 한국어 Straße İstanbul ﬁnance ﬃ K Å ſ ß ÉCOLE été don can I we they camelCase snake_case HTTPServer xyz
supercalifragilistic aaaaaaaaaaaaaaaa ＦＵＬＬ ｗｉｄｔｈ
""".split()
CODE = """
() {} [] == != <= >= -> => :: ++ -- // /* */ "" '' ``` && || ### <html> </p> </s> <s> [INST] $x @y #z %d \\n ... , ; :
? ! ~ ^ _ __ = + - * / | & 0x1F 1e-5 3.14 1,000 def if(x): return; for(int i=0;i<n;i++) ======== -------- ▁ ▁▁ <0x0A>
""".split()
EMOJI = "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ ☃ ✅ 😶‍🌫️ 🦙 ‼️ 1️⃣ ©".split()
APOSTROPHES = ["'", "'", "'", "’", "ʼ"]
ENDINGS = "s S t T re RE Re rE ve VE m M ll LL lL d D ſ x 1 's".split()
ODD = ["\x01", "\x04", "\x1b", "\x7f", "\u200b", "\u200d", "\ufeff", "\xad", "\ue000", "\ufffd", "\U000e0041", "\u0378"]

HAND_PICKED = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\n ",
        "\t\n",
        "\r\n\r\n",
        " \r\n x",
        "a\n\n\nb",
        "x  \n  y  ",
        "   a",
        "a   ",
    ),
    *("\u3000\u3000", "a\u3000 b", "\xa0\xa0x", " \x85 ", "\u2028a\u2029", "tab\tand  \t mix", " \n \n \n"),
    *("1", "12", "123", "1234", "1234567890", "3.14159", "1,000,000", "٣٤٥ 12", "½¾ ²³", "v1.2.3-rc4", "0xDEADBEEF"),
    *("don't", "DON'T", "I'Ll we'VE they'rE", "'s't're've'm'll'd", "o'clock's", "’s it’s", " 's", "''''s", "l'été"),
    *("e\u0301te\u0301", "\u0301x", "a\u0308\u0323", "नि\u0303", "กำ", "ก\u0e33", "ﷺ", "ﬁﬂ", "ÅÅÅ", "ǅǆǄ", "ⅣⅩ"),
    *("你好，世界！", "日本語のテキスト", "한국어 텍스트", "Привет, мир", "مرحبا بالعالم", "שלום עולם", "Γειά σου"),
    *("👨‍👩‍👧‍👦👨‍👩‍👧‍👦", "🇩🇪🇫🇷🇯🇵", "👍🏽👍🏿", "1️⃣2️⃣", "☃\ufe0f", "🏳️‍🌈!"),
    *("def f(x):\n    return x ** 2  # y\n", "for (;;) { i++; }", "<a href='x'>y</a>", "SELECT * FROM t;", "a=b==c"),
    *("a" * 200, "ab" * 100, " " * 100, "\n" * 50, "=" * 100, "0" * 64, "-" * 33 + ">", "\t" * 20, "." * 70, "好" * 60),
]


def corpus(n_strings: int = N_STRINGS, seed: int = 1) -> list[str]:
    """Return test strings: hand-picked ones, then random ones, always the same for the same arguments.

    No character was first assigned after Unicode 15.1: llama.cpp and the tokenizers library know different versions.
    """
    rng = random.Random(seed)
    strings = list(HAND_PICKED)
    while len(strings) < n_strings:
        n_fragments = rng.randint(1, 12)
        with_special = len(strings) % 4 == 3
        fragments = [_fragment(rng) for _ in range(n_fragments)]
        if with_special:
            for _ in range(rng.randint(1, 3)):
                fragments.insert(rng.randint(0, len(fragments)), rng.choice(SPECIAL_SLOTS))
        strings.append("".join(fragments))
    return strings


def corpus_digest() -> str:
    """Return what identifies the strings: 16 hex digits of the SHA-256 of all of them."""
    return hashlib.sha256(json.dumps(corpus()).encode()).hexdigest()[:16]


def _fragment(rng: random.Random) -> str:
    def character() -> str:
        return chr(rng.randint(*rng.choice(BLOCKS)))

    def run(draw: Callable[[], str], longest: int) -> str:
        return "".join(draw() for _ in range(rng.randint(1, longest)))

    kinds: list[Callable[[], str]] = [
        lambda: run(character, 8),
        lambda: run(lambda: rng.choice(BLANKS), 5),
        lambda: run(lambda: rng.choice(DIGITS), 9),
        lambda: rng.choice(WORDS) + rng.choice(APOSTROPHES) + rng.choice(ENDINGS),
        lambda: rng.choice(["", " "]) + rng.choice(WORDS),
        lambda: rng.choice(["", " "]) + rng.choice(CODE),
        lambda: rng.choice(EMOJI),
        lambda: character() + run(lambda: rng.choice(MARKS), 3),
        lambda: " " * rng.randint(1, 9),
        lambda: rng.choice(["", " "]) + run(lambda: chr(rng.randint(*BLOCKS[rng.randint(4, 14)])), 7),
        lambda: rng.choice(ODD),
        lambda: rng.choice(WORDS).upper() + rng.choice(WORDS).lower(),
    ]
    return rng.choice(kinds)()


def fill_slots(strings: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """Return the strings with special tokens in the slots."""
    if not special_tokens:
        return [text for text in strings if not has_slot(text)]
    table = {ord(slot): special_tokens[i % len(special_tokens)] for i, slot in enumerate(SPECIAL_SLOTS)}
    return [text.translate(table) for text in strings]


def has_slot(text: str) -> bool:
    return any(slot in text for slot in SPECIAL_SLOTS)


# What llama.cpp tokenizes differently although the pre-tokenizer is right; docs/tokenizers.md has examples.

# Case-insensitive contractions: 'ſ (long s) folds to 's in the original, llama.cpp folds by lower case.
_LONG_S = re.compile("(?<=')ſ")

# Ordinary tokens with one of these texts become control tokens when llama.cpp loads them (llama_vocab::impl::load).
FORCED_CONTROL = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|end|>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<PRE>",
    "<PAD>",
    "<|tool_response>",
)


def _cased_or_mark(character: str) -> bool:
    return ord(character) > 127 and unicodedata.category(character) in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")


def _wide_blank(character: str) -> bool:
    return ord(character) >= 0x1680 and character.isspace()


def _digit_beyond_ascii(character: str) -> bool:
    return ord(character) > 127 and unicodedata.category(character) in ("Nd", "Nl", "No")


def _blank_beyond_ascii(character: str) -> bool:
    return ord(character) > 127 and character.isspace()


REMOVED: Mapping[str, Callable[[str], bool]] = {
    "phi-3 json": _blank_beyond_ascii,
    "gemma-3": lambda character: character == "▁",
    "tekken": _cased_or_mark,
    "gpt-4o": _cased_or_mark,
    "deepseek-coder": _wide_blank,
    "deepseek-llm": lambda character: _wide_blank(character) or _digit_beyond_ascii(character),
}


def comparable(strings: Sequence[str], kind: str, tokens: Sequence[str] | None = None) -> list[str]:
    """Return the strings without the characters that docs/tokenizers.md lists for the kind, and those only.

    ``kind`` is a pre-tokenizer or a sentencepiece vocabulary. Besides the classes above, characters are removed that a
    byte-level vocabulary of ``tokens`` has no bytes for.
    """
    alphabet, known = byte_alphabet(), set(tokens or byte_alphabet())
    missing = {byte for byte in range(256) if alphabet[byte] not in known}
    removed = REMOVED.get(kind, lambda character: False)
    characters = {character for text in strings for character in text}.difference(SPECIAL_SLOTS)
    drop = {ord(c): None for c in characters if removed(c) or not missing.isdisjoint(c.encode())}
    return [_LONG_S.sub("", text).translate(drop) for text in strings]
