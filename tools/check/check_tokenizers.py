"""Prove on real vocabularies that llama.cpp, given our keys, tokenizes as the original libraries do.

The vocabularies are the ``ggml-vocab-*.gguf`` files of llama.cpp, which come with the source distribution of
llama-cpp-python. Each is turned back into the files of a Hugging Face folder; ``read_vocab`` reads the folder, its keys
are written to a GGUF, llama.cpp tokenizes thousands of strings with it, and the ids must equal those of the tokenizers
or the sentencepiece library on the same folder. A wrong pre-tokenizer must make a difference. Exit code 1 on any
mismatch; ``--write`` stores what tests/test_vocab.py compares the code with.

    python tools/check/check_tokenizers.py [--source DIR_OR_SDIST] [--only KIND ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from gguf import GGUFValueType, TokenType
from llama_cpp import __version__ as LLAMA_CPP_VERSION

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the strings and both sides of the tests themselves

from tokenizer_oracles import (
    SCALARS,
    HuggingFace,
    Ids,
    LlamaCpp,
    SentencePiece,
    Stored,
    byte_level,
    chain_json,
    write_bpe_folder,
    write_converted_folder,
    write_gemma_folder,
    write_gguf,
    write_sentencepiece_folder,
)
from tokenizer_strings import FORCED_CONTROL, SPECIAL_SLOTS, comparable, corpus, corpus_digest, fill_slots

from nsds_gguf.read.tokenizer.pretokenizers import GPT2, KNOWN, NAMES, table_digests
from nsds_gguf.read.tokenizer.tokens import looks_special
from nsds_gguf.read.tokenizer.vocab import read_vocab
from nsds_gguf.records import kv

RECORD = ROOT / "tests" / "golden" / "tokenizers.json"
MIN_STRINGS = 10_000
N_STRINGS_WITH_SPECIAL = 10_800  # of the corpus, for the libraries that parse special tokens
N_WRONG = 2_000  # strings for the wrong pre-tokenizer, where one mismatch is enough

_STRING, _ARRAY = 8, 9  # of enum gguf_type


# --- vocabularies of llama.cpp ----------------------------------------------------------------------------------------


def read_stored(path: Path) -> Stored:
    """Read the vocabulary of a GGUF; gguf.GGUFReader does the same ten times slower."""
    data = path.read_bytes()
    keys: dict[str, Any] = {}
    _, _, _, n_keys = struct.unpack_from("<4sIQQ", data)
    at = 24
    for _ in range(n_keys):
        key, at = _gguf_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        keys[key], at = _gguf_value(data, at + 4, kind)
    found = [keys.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type", "scores", "merges")]
    return Stored(*found)


def _gguf_string(data: bytes, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + size].decode(), at + 8 + size


def _gguf_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _gguf_string(data, at)
    if kind != _ARRAY:
        return struct.unpack_from(f"<{SCALARS[kind]}", data, at)[0], at + struct.calcsize(SCALARS[kind])
    item_kind, n_items = struct.unpack_from("<IQ", data, at)
    at += 12
    if item_kind != _STRING:
        layout = f"<{n_items}{SCALARS[item_kind]}"
        return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
    items = []
    for _ in range(n_items):
        text, at = _gguf_string(data, at)
        items.append(text)
    return items, at


# --- kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One vocabulary in one form: ``bpe``, ``model`` (sentencepiece), ``converted`` (from sentencepiece) or ``gemma``.

    ``title`` is the ``general.name``, from which llama.cpp infers which tokens take blanks along.
    """

    name: str
    stored: str
    pre: str
    wrong: str
    form: str = "bpe"
    pre_tokenizer: Mapping[str, Any] = field(default_factory=dict)
    ignore_merges: bool = False
    nfc: bool = False
    title: str = ""

    @property
    def spoiled(self) -> dict[str, str | bool]:
        """The key that makes llama.cpp tokenize wrongly."""
        if self.form == "bpe":
            return {"tokenizer.ggml.pre": self.wrong}
        return {"tokenizer.ggml.add_space_prefix": self.form == "gemma"}


_DIGITS_GPT2 = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
}

# For each line of the table a vocabulary of llama.cpp, another kind's where it has none of this kind, and a wrong name.
_VOCABULARIES = {
    "llama-bpe": ("llama-bpe", "qwen2"),
    "dbrx": ("llama-bpe", "qwen2"),
    "qwen2": ("qwen2", "gpt-2"),
    "qwen35": ("qwen35", "qwen2"),
    "gpt-2": ("gpt-2", "qwen2"),
    "smollm": ("starcoder", "gpt-2"),
    "tekken": ("deepseek-coder", "gpt-2"),
    "gpt-4o": ("deepseek-coder", "gpt-2"),
    "deepseek-v3": ("deepseek-llm", "qwen2"),
    "deepseek-coder": ("deepseek-coder", "gpt-2"),
    "deepseek-llm": ("deepseek-llm", "gpt-2"),
    "seed-coder": ("deepseek-coder", "gpt-2"),
    "minicpm5": ("deepseek-coder", "gpt-2"),
    "spark2_5": ("deepseek-coder", "gpt-2"),
    "bloom": ("deepseek-coder", "gpt-2"),
    "falcon": ("falcon", "gpt-2"),
}
_ALIKE = {known.name: known.alike for known in KNOWN}
_NFC_KINDS = ("qwen2", "qwen35")


def kinds() -> Iterator[Kind]:
    """Yield every kind: the sentencepiece forms, each line of the table, and further vocabularies."""
    for name in ("llama-spm", "baichuan", "phi-3"):
        yield Kind(name, name, "default", "no blank in front", form="model")
    yield Kind("llama-spm json", "llama-spm", "default", "no blank in front", form="converted")
    yield Kind("phi-3 json", "phi-3", "default", "no blank in front", form="converted", title="Phi-3")
    yield Kind("gemma-4", "gemma-4", "default", "a blank in front", form="gemma")
    yield Kind("gemma-3", "gemma-4", "default", "a blank in front", form="gemma")
    for known in KNOWN:
        stored, wrong = _VOCABULARIES[known.name]
        yield Kind(
            known.name,
            stored,
            known.name,
            wrong,
            pre_tokenizer=chain_json(known.chains[0]),
            ignore_merges=known.ignore_merges,
            nfc=known.name in _NFC_KINDS,
        )
    yield Kind("gpt-neox", "gpt-neox", "gpt-2", "smollm", pre_tokenizer=byte_level(True), nfc=True)
    yield Kind("aquila", "aquila", "gpt-2", "smollm", pre_tokenizer=byte_level(True))
    yield Kind("mpt", "mpt", "gpt-2", "smollm", pre_tokenizer=byte_level(True), nfc=True)
    yield Kind("refact", "refact", "smollm", "gpt-2", pre_tokenizer=_DIGITS_GPT2)
    yield Kind("command-r", "command-r", "smollm", "gpt-2", pre_tokenizer=_DIGITS_GPT2, nfc=True)


@dataclass
class Result:
    """What one kind showed.

    Under the names in ``alike`` llama.cpp gave the same ids.
    ``n_strings`` different strings were compared, ``n_unparsed`` of those with special tokens once more without parsing
    them; ``n_cleaned`` had characters removed; ``n_vectors`` are llama.cpp's own test strings for the vocabulary.
    """

    kind: str
    pre: str
    wrong: str
    n_strings: int = 0
    n_unparsed: int = 0
    n_cleaned: int = 0
    mismatches: list[tuple[str, Ids, Ids]] = field(default_factory=list)
    n_wrong: int = 0
    alike: list[str] = field(default_factory=list)
    n_vectors: int = 0
    problems: list[str] = field(default_factory=list)


def check_kind(kind: Kind, models: Path) -> Result:
    """Compare llama.cpp with the original library on one kind."""
    gguf = models / f"ggml-vocab-{kind.stored}.gguf"
    stored = _as_released(read_stored(gguf), kind)
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name) / "model", Path(name) / "vocab.gguf"
        _write_folder(kind, stored, folder)
        keys = read_vocab(folder, len(stored.tokens), {})
        write_gguf(written, {**keys, "general.name": kv(kind.title, GGUFValueType.STRING)})
        result = Result(kind.name, str(keys["tokenizer.ggml.pre"].value), kind.wrong)
        if result.pre != kind.pre:
            result.problems.append(f"recognised as {result.pre}, wanted {kind.pre}")
        if keys["tokenizer.ggml.tokens"].value != _written_tokens(kind, stored):
            result.problems.append("tokens differ from llama.cpp's")
        _compare(kind, stored, folder, written, result)
        with LlamaCpp(written) as llama:
            _check_vectors(llama, gguf, kind, result)
    return result


def _compare(kind: Kind, stored: Stored, folder: Path, gguf: Path, result: Result) -> None:
    """Compare on text whose special tokens are parsed, on text whose special tokens are not, and with the wrong key."""
    parses = kind.form != "model"
    original: HuggingFace | SentencePiece = HuggingFace(folder) if parses else SentencePiece(folder)
    special = _special_tokens(stored) if parses else []
    raw = corpus()
    cleaned = comparable(raw, kind.pre, stored.tokens) if kind.form == "bpe" else comparable(raw, kind.name)
    result.n_cleaned = sum(a != b for a, b in zip(raw, cleaned, strict=True))
    texts = fill_slots(cleaned, special)[: N_STRINGS_WITH_SPECIAL if parses else None]
    if kind.nfc:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    texts = list(dict.fromkeys(texts))
    forced = [text for text in FORCED_CONTROL if _has_type(TokenType.NORMAL, text, stored)]
    hidden = [text for text in special if _is_lookalike(text, stored)]
    hidden += [text for text in FORCED_CONTROL if _has_type(TokenType.USER_DEFINED, text, stored)]
    parsed = [text for text in texts if not _holds(text, forced)] if parses else texts
    unparsed = [t for t in texts if _holds(t, [*special, *forced]) and not _holds(t, hidden)] if parses else []
    result.n_strings, result.n_unparsed = len(parsed), len(unparsed)
    expected = original.tokenize(parsed, parse_special=parses)
    with LlamaCpp(gguf) as llama:
        got = llama.tokenize(parsed, parse_special=parses)
        result.mismatches += _differences(parsed, expected, got)
        wanted = original.tokenize(unparsed, parse_special=False)
        result.mismatches += _differences(unparsed, wanted, llama.tokenize(unparsed, parse_special=False))
    with LlamaCpp(gguf, kind.spoiled) as llama:
        got = llama.tokenize(parsed[:N_WRONG], parse_special=parses)
    result.n_wrong = sum(a != b for a, b in zip(expected, got, strict=False))
    for name in _ALIKE.get(kind.name, ()):
        with LlamaCpp(gguf, {"tokenizer.ggml.pre": name}) as llama:
            if llama.tokenize(parsed[:N_WRONG], parse_special=parses) == expected[:N_WRONG]:
                result.alike.append(name)
            else:
                result.problems.append(f"other ids under the name {name}")


def _write_folder(kind: Kind, stored: Stored, folder: Path) -> None:
    if kind.form == "model":
        write_sentencepiece_folder(folder, stored)
    elif kind.form == "converted":
        write_converted_folder(folder, stored)
    elif kind.form == "gemma":
        write_gemma_folder(folder, stored)
    else:
        write_bpe_folder(
            folder,
            stored,
            kind.pre_tokenizer,
            ignore_merges=kind.ignore_merges,
            nfc=kind.nfc,
            merge_lists=len(stored.tokens) % 2 == 0,
        )


def _as_released(stored: Stored, kind: Kind) -> Stored:
    """Return a vocabulary as the files of its model have it, where llama.cpp's copy of it says less."""
    if kind.title:  # of Phi 3, all added tokens but these take blanks along
        added = {text for text, i in zip(stored.tokens, stored.types, strict=True) if i != TokenType.NORMAL}
        return replace(stored, stripping=frozenset(added - {"<unk>", "<s>", "<|endoftext|>"}))
    if kind.name != "gemma-3":
        return stored
    # Gemma 3 has nearly the vocabulary of Gemma 4, but runs of line ends and blanks, HTML tags and unused ones are
    # added tokens. The token by which llama.cpp recognises Gemma 4 is none of them.
    end_of_tags = stored.tokens.index("</h6>")
    tokens = ["<unused_>" if text == "<|tool_response>" else text for text in stored.tokens]
    types = [
        TokenType.CONTROL
        if text.startswith("<unused")
        else TokenType.USER_DEFINED
        if stored.tokens.index("\n") <= i <= end_of_tags
        else kind_
        for i, (text, kind_) in enumerate(zip(tokens, stored.types, strict=True))
    ]
    return replace(stored, tokens=tokens, types=list(map(int, types)))


def _written_tokens(kind: Kind, stored: Stored) -> list[str]:
    """Return the texts that the vocabulary must have: rows without a token, and blanks in text that is matched raw."""
    texts = [f"[PAD{i}]" if text.startswith("[PAD") else text for i, text in enumerate(stored.tokens)]
    if kind.form == "bpe":
        return texts
    return [
        text.replace("▁", " ") if i == TokenType.USER_DEFINED else text
        for text, i in zip(texts, stored.types, strict=True)
    ]


def _special_tokens(stored: Stored) -> list[str]:
    """Return some added tokens, spread over all of them."""
    added = [
        text
        for text, kind in zip(stored.tokens, stored.types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and not text.startswith("[PAD")
    ]
    return added[:: -(-len(added) // len(SPECIAL_SLOTS))]


def _has_type(kind: TokenType, text: str, stored: Stored) -> bool:
    return text in stored.tokens and stored.types[stored.tokens.index(text)] == kind


def _is_lookalike(text: str, stored: Stored) -> bool:
    """Tell whether an added token is written as a control token only because it looks like one."""
    return stored.types[stored.tokens.index(text)] == TokenType.USER_DEFINED and looks_special(text)


def _holds(text: str, tokens: Sequence[str]) -> bool:
    return any(token in text for token in tokens)


def _differences(strings: Sequence[str], expected: Sequence[Ids], got: Sequence[Ids]) -> list[tuple[str, Ids, Ids]]:
    return [(text, a, b) for text, a, b in zip(strings, expected, got, strict=True) if a != b]


def _check_vectors(llama: LlamaCpp, gguf: Path, kind: Kind, result: Result) -> None:
    """Compare with the ids that llama.cpp records for the vocabulary, made by the original tokenizer."""
    inputs, outputs = gguf.with_name(f"{gguf.name}.inp"), gguf.with_name(f"{gguf.name}.out")
    if not inputs.is_file() or kind.stored not in (kind.name, kind.name.removesuffix(" json"), _VECTORS.get(kind.name)):
        return
    texts = inputs.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [[int(number) for number in line.split()] for line in outputs.read_text(encoding="utf-8").splitlines()]
    got = llama.tokenize(texts, parse_special=False, add_special=False)
    result.n_vectors = len(texts)
    wrong = [text for text, a, b in zip(texts, wanted, got, strict=False) if a != b]
    if wrong:
        result.problems.append(f"{len(wrong)} of llama.cpp's own test strings differ, such as {wrong[0]!r}")


_VECTORS = {"smollm": "starcoder", "gemma-3": "gemma-4"}  # kinds checked with a vocabulary of the same pre-tokenizer


def check_spellings(strings: Sequence[str]) -> list[str]:
    """Return the lines of the table whose spellings do not all cut the strings at the same places."""
    problems = []
    for known in KNOWN:
        spellings = [chain_json(chain) for chain in known.chains]
        if any(chain[0][1:2] == (GPT2,) for chain in known.chains):
            spellings.append(byte_level(True))
        if known.name == "smollm":
            spellings.append(_DIGITS_GPT2)
        cuts = [_cuts(spelling, strings) for spelling in spellings]
        problems += [
            f"{known.name}: spelling {i} cuts {sum(a != b for a, b in zip(cuts[0], other, strict=True))} strings "
            "differently from the first"
            for i, other in enumerate(cuts)
            if other != cuts[0]
        ]
    return problems


def _cuts(pre_tokenizer: Mapping[str, Any], strings: Sequence[str]) -> list[list[str]]:
    shell = {"added_tokens": [], "pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    cutter = tokenizers.Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
    return [[piece for piece, _ in cutter.pre_tokenize_str(text)] for text in strings]


# --- the whole --------------------------------------------------------------------------------------------------------


def fetch_source(source: Path | None, work: Path) -> Path:
    """Return llama.cpp's folder, downloading the source distribution of the installed version when needed."""
    if source is None:
        print(f"downloading the source of llama-cpp-python {LLAMA_CPP_VERSION} …", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        done = subprocess.run([*command, f"llama-cpp-python=={LLAMA_CPP_VERSION}", "-d", str(work)], check=False)
        if done.returncode:
            raise SystemExit("pip download failed; pass the source distribution with --source")
        source = next(iter(work.glob("llama_cpp_python-*.tar.gz")))
    if source.is_file():
        with tarfile.open(source) as archive:
            wanted = re.compile(r"[^/]+/vendor/llama\.cpp/(models/ggml-vocab-[^/]+|src/llama-vocab\.cpp)")
            for member in archive:
                content = archive.extractfile(member) if wanted.fullmatch(member.name) else None
                if content is not None:
                    path = work / member.name.split("/vendor/", 1)[1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
        source = work
    found = sorted(path.parent for path in source.rglob("llama.cpp/models"))
    if not found:
        raise SystemExit(f"{source}: no llama.cpp/models in it; wanted the source distribution of llama-cpp-python")
    return found[0]


def check_names(llama_cpp: Path) -> list[str]:
    """Return what our list of llama.cpp's pre-tokenizer names has too much or too little."""
    source = (llama_cpp / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    load = source[source.index("void llama_vocab::impl::load") :]
    theirs = set(re.findall(r'tokenizer_pre == "([^"]+)"', load))
    return [f"llama.cpp does not know the pre-tokenizer {name}" for name in sorted(set(NAMES) - theirs)] + [
        f"NAMES lacks llama.cpp's pre-tokenizer {name}" for name in sorted(theirs - set(NAMES))
    ]


def make_record(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "pre_tokenizers": table_digests(),
        "corpus": corpus_digest(),
        "kinds": {
            result.kind: {
                "pre": result.pre,
                "strings": result.n_strings,
                "unparsed": result.n_unparsed,
                "cleaned": result.n_cleaned,
                "mismatches": len(result.mismatches),
                "vectors": result.n_vectors,
                "alike": result.alike,
                "wrong": result.wrong,
                "wrong_strings": N_WRONG,
                "wrong_mismatches": result.n_wrong,
            }
            for result in results
        },
        "versions": {
            "llama-cpp-python": LLAMA_CPP_VERSION,
            "sentencepiece": sentencepiece.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def problems_of(result: Result) -> list[str]:
    found = list(result.problems)
    if result.mismatches:
        text, expected, got = min(result.mismatches, key=lambda mismatch: len(mismatch[0]))
        found.append(f"{len(result.mismatches)} mismatches, the shortest {text!r}: wanted {expected}, got {got}")
    if result.n_strings < MIN_STRINGS:
        found.append(f"only {result.n_strings} strings, wanted {MIN_STRINGS}")
    if not result.n_wrong:
        found.append(f"the wrong {result.wrong} made no difference")
    return [f"{result.kind}: {problem}" for problem in found]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="source distribution of llama-cpp-python, packed or unpacked")
    parser.add_argument("--only", nargs="+", help="check these kinds only; leaves the record alone")
    parser.add_argument("--write", action="store_true", help=f"store the record in {RECORD.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        llama_cpp = fetch_source(options.source, Path(name))
        problems = check_names(llama_cpp) + check_spellings(corpus(3_000))
        results = []
        columns = f"{'strings':>8}{'unparsed':>9}{'cleaned':>9}{'mismatch':>9}{'vectors':>8}"
        print(f"{'kind':16}{'pre':16}{columns}   wrong: mismatches")
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            chosen = [kind for kind in kinds() if not options.only or kind.name in options.only]
            for result in pool.map(partial(check_kind, models=llama_cpp / "models"), chosen):
                results.append(result)
                problems += problems_of(result)
                print(
                    f"{result.kind:16}{result.pre:16}{result.n_strings:8}{result.n_unparsed:9}{result.n_cleaned:9}"
                    f"{len(result.mismatches):9}{result.n_vectors:8}   {result.wrong}: {result.n_wrong} of {N_WRONG}",
                    flush=True,
                )
    record = make_record(results)
    if options.write and not options.only:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    else:
        stored = json.loads(RECORD.read_text(encoding="utf-8"))
        if any(stored[part] != record[part] for part in ("pre_tokenizers", "corpus")):
            problems.append(f"{RECORD.name} is of another table of pre-tokenizers or other strings; run with --write")
    for problem in problems:
        print(f"error: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
