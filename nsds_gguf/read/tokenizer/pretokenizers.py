r"""Pre-tokenizers of byte-level BPE: recognise them by their steps, and return llama.cpp's name.

The ``tokenizer.json`` of a checkpoint describes how text is split before merges apply; llama.cpp has its pre-tokenizers
compiled in and selects one by the name in ``tokenizer.ggml.pre`` (src/llama-vocab.cpp: ``llm_tokenizer_bpe`` for the
patterns, ``llama_vocab::impl::load`` for the names). ``KNOWN`` maps one to the other.
``tools/check/check_tokenizers.py`` has checked each line against the tokenizers library; ``limit`` names text that
llama.cpp splits differently. To add one, add a line to ``KNOWN`` and run the tool, which rejects an incorrect line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError

# A step is its kind and relevant options; a chain is the whole pre-tokenizer.
Step = tuple[str, ...]
Chain = tuple[Step, ...]

BYTE_LEVEL: Step = ("ByteLevel",)
_DIGITS: Step = ("Digits", "individual")
_DIGIT_RUNS: Step = ("Digits", '{"individual_digits": false}')
_PUNCTUATION: Step = ("Punctuation", '{"behavior": "Contiguous"}')

# Patterns as in tokenizer.json files, with line ends as \r and \n.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS_SPELLED_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # llama.cpp's spelling
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TIKTOKEN_WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
_TIKTOKEN_REST = r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_DEEPSEEK_WORDS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_CJK_WIDE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The letters with case, as DeepSeek LLM lists them.
_CASED_RANGES = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00"
    "-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own (use_regex)
LLAMA3 = f"{_CONTRACTIONS}|{_LEAD}" + r"\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = f"{_CONTRACTIONS}|{_LEAD}" + r"\p{L}+|\p{N}" + _REST
QWEN35 = f"{_CONTRACTIONS}|{_LEAD}" + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _BLANKS
MINICPM5 = f"{_CONTRACTIONS}|{_LEAD}" + r"\p{L}+|\p{N}+" + _REST
SEED_CODER = f"{_CONTRACTIONS}|{_LEAD}" + r"\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _BLANKS
TEKKEN = f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST_WITH_SLASH
GPT4O = f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?" + (
    r"|\p{N}{1,3}" + _REST_WITH_SLASH
)
# tiktoken's spelling of LLAMA3 and QWEN2: possessive quantifiers that change no match.
TIKTOKEN_3_DIGITS = _TIKTOKEN_WORDS + r"\p{N}{1,3}" + _TIKTOKEN_REST
TIKTOKEN_1_DIGIT = _TIKTOKEN_WORDS + r"\p{N}" + _TIKTOKEN_REST
DEEPSEEK_V3 = _DEEPSEEK_WORDS + r"| ?[\p{P}\p{S}]+[\r\n]*" + _BLANKS
SPARK25 = _DEEPSEEK_WORDS + r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK_WIDE)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_RANGES}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _DEEPSEEK_CJK_WIDE,
)
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


@dataclass(frozen=True)
class PreTokenizer:
    """One pre-tokenizer of llama.cpp.

    Attributes:
        name: value of ``tokenizer.ggml.pre``.
        chains: its forms in ``tokenizer.json`` files.
        ignore_merges: whether llama.cpp keeps a word that is a token whole, which depends on the name.
        limit: text that llama.cpp splits differently, beyond what docs/tokenizers.md lists for all.
        alike: other names with the same ids in llama.cpp; its converter writes them for some models.

    """

    name: str
    chains: tuple[Chain, ...]
    ignore_merges: bool = False
    limit: str = ""
    alike: tuple[str, ...] = ()


def split(*patterns: str) -> Chain:
    """Return the chain that isolates the matches of each pattern in turn, then maps bytes to characters."""
    return (*(("Split", pattern, "Isolated") for pattern in patterns), BYTE_LEVEL)


def covering(pattern: str) -> tuple[Chain, Chain]:
    """Return the two forms of a split at a pattern that matches all text.

    Isolating every match and removing text between matches are then equivalent.
    """
    return split(pattern), (("Split", pattern, "Removed", "inverted"), BYTE_LEVEL)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _digits_last(chain: Chain) -> Chain:
    return (*chain[:-1], _DIGITS, BYTE_LEVEL)


_CASED_OR_MARKED = "letters beyond A-Z that have case, or combining marks,"

KNOWN: tuple[PreTokenizer, ...] = (
    PreTokenizer(
        "llama-bpe",
        (*covering(LLAMA3), *covering(TIKTOKEN_3_DIGITS)),
        ignore_merges=True,
        alike=_names("llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4 glm5"),
    ),
    PreTokenizer("dbrx", (*covering(LLAMA3), *covering(TIKTOKEN_3_DIGITS)), alike=_names("smaug-bpe chatglm-bpe")),
    PreTokenizer(
        "qwen2",
        (*covering(QWEN2), *covering(TIKTOKEN_1_DIGIT)),
        alike=_names("stablelm2 deepseek-r1-qwen megrez grok-2 hunyuan kormo solar-open f2llmv2"),
    ),
    PreTokenizer("qwen35", covering(QWEN35)),
    PreTokenizer(
        "gpt-2",
        covering(GPT2),
        alike=_names("olmo mpt phi-2 gigachat a.x-4.0 mellum jais exaone4 trillion granite-docling"),
    ),
    PreTokenizer(
        "smollm",
        ((_DIGITS, *split(GPT2)), split(r"\p{N}", GPT2)),
        alike=_names("starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    ),
    PreTokenizer("tekken", covering(TEKKEN), ignore_merges=True, limit=_CASED_OR_MARKED),
    PreTokenizer("gpt-4o", covering(GPT4O), limit=_CASED_OR_MARKED, alike=_names("llama4 kanana2 talkie minimax-m2")),
    PreTokenizer(
        "deepseek-v3",
        (split(r"\p{N}{1,3}", _DEEPSEEK_CJK, DEEPSEEK_V3),),
        alike=_names("hunyuan-dense hy_v4 joyai-llm"),
    ),
    PreTokenizer(
        "deepseek-coder",
        (_digits_last(split(*DEEPSEEK_CODER)),),
        limit="blanks from U+1680 on, such as the ideographic space,",
    ),
    PreTokenizer(
        "deepseek-llm",
        (_digits_last(split(*DEEPSEEK_LLM)),),
        limit="digits beyond 0-9, or blanks from U+1680 on such as the ideographic space,",
    ),
    PreTokenizer("seed-coder", covering(SEED_CODER)),
    PreTokenizer("minicpm5", (split(r"\p{N}{1,3}", MINICPM5),), ignore_merges=True),
    PreTokenizer("spark2_5", (_digits_last(split(r"\p{N}{1,3}", _DEEPSEEK_CJK, SPARK25)),)),
    PreTokenizer("bloom", (split(BLOOM),), alike=_names("poro-chat gpt3-finnish")),
    PreTokenizer("falcon", ((_PUNCTUATION, *split(GPT2), _DIGIT_RUNS, *split("[0-9][0-9][0-9]")[:1]),)),
)

# Every name that llama.cpp's src/llama-vocab.cpp compares tokenizer.ggml.pre with (llama-cpp-python 0.3.36).
_NAMES = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3
gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m
granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code
jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3
llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat
qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder
superbpe talkie tekken tiny_aya trillion ufakzeka viking whitespace youtu
"""
NAMES = _names(_NAMES)


# llama.cpp's converter recognises tokenizers by the ids of one text, including some that are not in KNOWN.
_ROUTE_THROUGH_GGUF = (
    "if llama.cpp's converter knows it: python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model.gguf, "
    "then nsds-gguf convert model.gguf"
)


def check_name(name: str) -> None:
    """Raise ``UnsupportedError`` unless llama.cpp knows the pre-tokenizer ``name``."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=3, cutoff=0.5) or [known.name for known in KNOWN[:5]]
        raise UnsupportedError(
            f"--pre-tokenizer {name}: llama.cpp has no such pre-tokenizer; similar: {', '.join(near)}"
        )


def table_digests() -> dict[str, str]:
    """Return a digest of each line of ``KNOWN``, by name: the first 16 hex digits of its SHA-256."""
    lines = {known.name: json.dumps([known.chains, known.ignore_merges, known.limit]) for known in KNOWN}
    return {name: hashlib.sha256(line.encode()).hexdigest()[:16] for name, line in lines.items()}


def limit_of(name: str) -> str:
    """Return the text that llama.cpp splits differently with pre-tokenizer ``name``; empty if none is known."""
    return next((known.limit for known in KNOWN if name in (known.name, *known.alike)), "")


def recognise(tokenizer: Mapping[str, Any], path: Path) -> str:
    """Return llama.cpp's name of the pre-tokenizer in a ``tokenizer.json``.

    Args:
        tokenizer: the parsed file.
        path: of the file, for messages.

    Raises:
        UnsupportedError: llama.cpp has no equivalent; the message names the nearest.

    """
    chain = canonical_chain(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    same_cut = [known for known in KNOWN if chain in known.chains]
    for known in same_cut:
        if known.ignore_merges == ignore_merges:
            return known.name
    if same_cut:
        name = same_cut[0].name
        raise UnsupportedError(
            f"{path}: pre-tokenizer of {name!r} with ignore_merges {str(ignore_merges).lower()}, which llama.cpp has "
            f"only with {str(not ignore_merges).lower()}; --pre-tokenizer {name} converts it anyway, and some "
            "words get other ids"
        )
    nearest, likeness = _nearest(chain)
    raise UnsupportedError(
        f"{path}: unknown pre-tokenizer {_shortened(_spelled(chain))}; the nearest known one is {nearest!r} "
        f"({likeness:.0%} alike); to use it anyway, pass --pre-tokenizer {nearest}; "
        f"{_ROUTE_THROUGH_GGUF}"
    )


def canonical_chain(pre_tokenizer: Any) -> Chain:
    """Return the steps of a ``pre_tokenizer`` object, flattened, without options that do not affect ids."""
    return tuple(_steps(pre_tokenizer))


def _steps(node: Any) -> Iterator[Step]:
    if not isinstance(node, Mapping):
        if node is not None:
            yield ("Unknown", json.dumps(node))
        return
    kind = node.get("type")
    if kind == "Sequence":
        for step in node.get("pretokenizers") or []:
            yield from _steps(step)
    elif kind == "ByteLevel" and not node.get("add_prefix_space", True):
        if node.get("use_regex", True):
            yield ("Split", GPT2, "Isolated")
        yield BYTE_LEVEL
    elif kind == "Split" and isinstance(node.get("pattern"), Mapping) and "Regex" in node["pattern"]:
        inverted = ("inverted",) if node.get("invert") else ()
        yield ("Split", _canonical_pattern(str(node["pattern"]["Regex"])), str(node.get("behavior")), *inverted)
    elif kind == "Digits" and node.get("individual_digits"):
        yield _DIGITS
    else:
        options = {key: value for key, value in node.items() if key not in ("type", "trim_offsets")}
        yield (str(kind), json.dumps(options, ensure_ascii=False, sort_keys=True))


def _canonical_pattern(pattern: str) -> str:
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    return pattern.replace(_CONTRACTIONS_SPELLED_OUT, _CONTRACTIONS)


_COMPARED_LETTERS = 2000  # comparison time is quadratic; the longest known has 600


def _nearest(chain: Chain) -> tuple[str, float]:
    """Return the most similar known pre-tokenizer and the similarity, 0 to 1."""
    spelled = _spelled(chain)[:_COMPARED_LETTERS]
    scored = [
        (SequenceMatcher(None, spelled, _spelled(other), autojunk=False).ratio(), known.name)
        for known in KNOWN
        for other in known.chains
    ]
    likeness, name = max(scored, key=lambda pair: pair[0])
    return name, likeness


def _spelled(chain: Chain) -> str:
    return " > ".join(f"{step[0]}({', '.join(step[1:])})" for step in chain) or "(none)"


def _shortened(text: str, n_chars: int = 200) -> str:
    return text if len(text) <= n_chars else f"{text[:n_chars]}…"
