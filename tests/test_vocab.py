"""Tokenizers: ids from llama.cpp on our keys equal those of the original libraries, and bad files are refused.

Vocabularies here are trained on the spot. ``tools/check/check_tokenizers.py`` does the same on real ones and leaves a
record in ``golden/tokenizers.json``, which must be of the code as it is.
"""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as binding
import pytest
import sentencepiece
import tokenizers
from gguf import GGUFWriter, TokenType
from tokenizer_oracles import (
    HuggingFace,
    LlamaCpp,
    SentencePiece,
    Stored,
    added_token,
    bos_template,
    byte_level,
    write_converted_folder,
    write_json,
    write_sentencepiece_folder,
)
from tokenizer_strings import HAND_PICKED, comparable, corpus, corpus_digest, fill_slots

from nsds_gguf.errors import TokenizerError, UnsupportedError
from nsds_gguf.read.tokenizer.pretokenizers import KNOWN, NAMES, recognise, table_digests
from nsds_gguf.read.tokenizer.vocab import open_vocab, read_vocab

DOCS = Path(__file__).parents[1] / "docs" / "tokenizers.md"
RECORD = json.loads((Path(__file__).parent / "golden" / "tokenizers.json").read_text(encoding="utf-8"))
N_STRINGS = 3_000


def isolated(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# Pre-tokenizers as the tokenizer.json files of the named models spell them, and ignore_merges.
SPELLED: dict[str, tuple[dict[str, Any], bool]] = {
    "Llama 3": (
        sequence(
            isolated(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            byte_level(use_regex=False),
        ),
        True,
    ),
    "Granite 4": (
        sequence(
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Removed",
                "invert": True,
            },
            byte_level(use_regex=False),
        ),
        False,
    ),
    "Qwen 3": (
        sequence(
            isolated(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ),
        False,
    ),
    "SmolLM2": (sequence({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)), False),
    "GPT-2": (byte_level(use_regex=True), False),
    "Mistral Nemo": (
        sequence(
            isolated(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            byte_level(use_regex=False),
        ),
        True,
    ),
    "DeepSeek V3": (
        sequence(
            isolated(r"\p{N}{1,3}"),
            isolated("[一-龥぀-ゟ゠-ヿ]+"),
            isolated(
                r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+".replace('\\"', '"')
                + "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
            ),
            byte_level(use_regex=False),
        ),
        False,
    ),
}
RECOGNISED = {
    "Llama 3": "llama-bpe",
    "Granite 4": "dbrx",
    "Qwen 3": "qwen2",
    "SmolLM2": "smollm",
    "GPT-2": "gpt-2",
    "Mistral Nemo": "tekken",
    "DeepSeek V3": "deepseek-v3",
}
WRONG = {"llama-bpe": "gpt-2", "qwen2": "llama-bpe", "gpt-2": "smollm"}

CONTROL = ["<|bos|>", "<|eos|>"]
USER_DEFINED = ["<tool>", "    "]


@pytest.fixture(scope="session")
def strings() -> list[str]:
    return corpus(N_STRINGS)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, strings: list[str]) -> Callable[[str], Path]:
    """Return a function that gives the folder of a vocabulary trained with a pre-tokenizer of ``SPELLED``."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("trained") / "model"
            train_bpe(folders[name], *SPELLED[name], strings)
        return folders[name]

    return folder_of


def train_bpe(folder: Path, pre_tokenizer: Mapping[str, Any], ignore_merges: bool, strings: list[str]) -> None:
    shell = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(shell))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(strings, trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(USER_DEFINED)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    content["post_processor"] = bos_template(CONTROL[0], tokenizer.token_to_id(CONTROL[0]))
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {"bos_token": CONTROL[0], "eos_token": CONTROL[1]})


@pytest.fixture(scope="session")
def spm(tmp_path_factory: pytest.TempPathFactory, strings: list[str]) -> Path:
    """Return the folder of a trained sentencepiece BPE model."""
    folder = tmp_path_factory.mktemp("spm") / "model"
    train_sentencepiece(folder, strings)
    return folder


def train_sentencepiece(folder: Path, strings: list[str], **options: Any) -> None:
    settings = {
        "vocab_size": 1000,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    model = io.BytesIO()
    latin_to_cyrillic = (text for text in strings if text.strip() and max(text) < "\u0500")
    sentences = (line for text in latin_to_cyrillic for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


# As sentencepiece's own defaults: characters normalized, extra blanks removed, unknown ones unknown.
UNIGRAM = {
    "model_type": "unigram",
    "byte_fallback": False,
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "hard_vocab_limit": False,
    "vocab_size": 400,
    "character_coverage": 0.99,
}


def n_rows(folder: Path) -> int:
    """Return how many rows the embedding of a folder's ``tokenizer.json`` needs."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def write_vocab(path: Path, folder: Path, n_vocab: int, pre: str | None = None) -> Path:
    """Write the vocabulary of a folder as a GGUF, with the writer that the package uses."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(1)
    writer.add_embedding_length(1)
    writer.add_feed_forward_length(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, entry in read_vocab(folder, n_vocab, {}, pre).items():
        writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def edited(folder: Path, target: Path, file: str = "tokenizer.json", **changes: Any) -> Path:
    """Copy a folder with top-level entries of a JSON file changed; ``None`` removes one."""
    shutil.copytree(folder, target)
    path = target / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    write_json(path, content)
    return target


def edited_model(folder: Path, target: Path, **changes: Any) -> Path:
    """Copy a folder with entries of ``model`` in its ``tokenizer.json`` changed."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return edited(folder, target, model={**model, **changes})


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPELLED)
def test_ids_are_those_of_tokenizers(
    name: str, trained: Callable[[str], Path], strings: list[str], tmp_path: Path
) -> None:
    folder = trained(name)
    texts = fill_slots(comparable(strings, RECOGNISED[name], tokens_of(folder)), [*CONTROL, *USER_DEFINED])
    original = HuggingFace(folder)
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, n_rows(folder) + 5)) as llama:
        assert llama.tokenize(texts, parse_special=True) == original.tokenize(texts, parse_special=True)
        held = [text for text in texts if any(token in text for token in CONTROL)]
        assert len(held) > 300
        assert llama.tokenize(held, parse_special=False) == original.tokenize(held, parse_special=False)


@pytest.mark.parametrize(("name", "wrong"), [("Llama 3", "qwen2"), ("Qwen 3", "gpt-2"), ("GPT-2", "smollm")])
def test_a_wrong_pre_tokenizer_gives_other_ids(
    name: str, wrong: str, trained: Callable[[str], Path], strings: list[str], tmp_path: Path
) -> None:
    folder = trained(name)
    texts = fill_slots(strings, CONTROL)[:1000]
    expected = HuggingFace(folder).tokenize(texts, parse_special=True)
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, n_rows(folder), pre=wrong)) as llama:
        assert llama.tokenize(texts, parse_special=True) != expected


def tokens_of(folder: Path) -> list[str]:
    return list(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_sentencepiece(prefix: bool, strings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train_sentencepiece(folder, strings, add_dummy_prefix=prefix)
    texts = fill_slots(strings, [])
    expected = SentencePiece(folder).tokenize(texts, parse_special=False)
    file = write_vocab(tmp_path / "v.gguf", folder, 1000)
    with LlamaCpp(file) as llama:
        assert llama.tokenize(texts, parse_special=False) == expected
    with LlamaCpp(file, {"tokenizer.ggml.add_space_prefix": not prefix}) as llama:
        assert llama.tokenize(texts[:100], parse_special=False) != expected[:100]


def test_ids_of_a_converted_sentencepiece_model(spm: Path, strings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_converted_folder(folder, stored(spm))
    texts = fill_slots(strings, ["<s>", "</s>"])
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 1000)) as llama:
        ids = llama.tokenize(texts, parse_special=True)
    assert ids == HuggingFace(folder).tokenize(texts, parse_special=True)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_ids_of_a_converted_model_with_metaspace(scheme: str, spm: Path, strings: list[str], tmp_path: Path) -> None:
    write_converted_folder(tmp_path / "prepend", stored(spm))
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    folder = edited(tmp_path / "prepend", tmp_path / "model", normalizer=None, pre_tokenizer=metaspace)
    texts = [text for text in fill_slots(strings, []) if not text.startswith((" ", "▁")) and "s>" not in text]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 1000)) as llama:
        ids = llama.tokenize(texts, parse_special=True)
    assert ids == HuggingFace(folder).tokenize(texts, parse_special=True)
    note = "llama.cpp adds a space before every piece of text; the original omits it before another space"
    assert (
        open_vocab(folder, 1000, {}).notes
        == {
            "always": (f"{note}.",),
            "first": (f"{note} and after special tokens.",),
            "never": (),
        }[scheme]
    )


def stored(folder: Path) -> Stored:
    """Return what sentencepiece itself says of a model's pieces."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(model.vocab_size())
    types = [
        TokenType.UNKNOWN
        if model.is_unknown(i)
        else TokenType.CONTROL
        if model.is_control(i)
        else TokenType.BYTE
        if model.is_byte(i)
        else TokenType.NORMAL
        for i in ids
    ]
    return Stored([model.id_to_piece(i) for i in ids], [int(t) for t in types], [model.get_score(i) for i in ids], [])


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, None),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, None),
        ({"normalization_rule_name": "identity"}, None),
        ({"remove_extra_whitespaces": False}, "llama.cpp adds no space before text that consists of spaces only"),
        ({"remove_extra_whitespaces": False, "add_dummy_prefix": False}, None),
        ({"split_by_whitespace": False}, None),
    ],
)
def test_ids_of_a_unigram_model(options: dict[str, Any], note: str | None, strings: list[str], tmp_path: Path) -> None:
    """Splits of equal score excepted, which sentencepiece tells apart by rounding to float32."""
    folder = tmp_path / "model"
    train_sentencepiece(folder, strings, **{**UNIGRAM, **options})
    # Without a normalization that makes blanks of U+2581, sentencepiece removes it as one.
    texts = [text.replace("▁", "_") for text in fill_slots(strings, [])]
    expected = SentencePiece(folder).tokenize(texts, parse_special=False)
    pieces = stored(folder)
    vocab = open_vocab(folder, len(pieces.tokens), {})
    assert vocab.notes == (() if note is None else (f"{note}; the original does.",))
    if note is not None:
        blank = {i for i, token in enumerate(pieces.tokens) if not token.strip("▁")}
        kept = [i for i, ids in enumerate(expected) if not blank.issuperset(ids[1:])]
        texts, expected = [texts[i] for i in kept], [expected[i] for i in kept]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, len(pieces.tokens))) as llama:
        ids = llama.tokenize(texts, parse_special=False)
    differing = [(a, b) for a, b in zip(expected, ids, strict=True) if a != b]
    assert len(differing) < 20
    assert all(sorted(a) == sorted(b) and pieces.text_of(a) == pieces.text_of(b) for a, b in differing)
    removes = options.get("remove_extra_whitespaces", True)
    with LlamaCpp(tmp_path / "v.gguf", {"tokenizer.ggml.remove_extra_whitespaces": not removes}) as llama:
        assert llama.tokenize(texts[:100], parse_special=False) != ids[:100]


@pytest.mark.parametrize("scheme", ["always", "never", "split", "prepend"])
def test_ids_of_a_converted_unigram_model(scheme: str, strings: list[str], tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "model", strings, **{**UNIGRAM, "normalization_rule_name": "identity"})
    pieces = stored(tmp_path / "model")
    folder = tmp_path / "converted"
    write_json(folder / "tokenizer.json", unigram_json(pieces, scheme))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    texts = fill_slots(strings, ["<s>", "</s>"])
    if scheme != "never":  # the blank in front of blanks
        texts = [text for text in texts if "s>" not in text and not text.startswith((" ", "▁"))]
    vocab = open_vocab(folder, len(pieces.tokens), {})
    assert vocab.metadata["tokenizer.ggml.model"].value == "t5"
    assert len(vocab.notes) == (scheme != "never")
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, len(pieces.tokens))) as llama:
        assert llama.tokenize(texts, parse_special=True) == HuggingFace(folder).tokenize(texts, parse_special=True)


def unigram_json(pieces: Stored, scheme: str) -> dict[str, Any]:
    """Return a unigram model as a ``tokenizer.json`` that does not normalize characters."""
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepended = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": scheme == "split"}
    if scheme == "never":
        metaspace["prepend_scheme"] = "never"
    scored = [[text, score] for text, score in zip(pieces.tokens, pieces.scores, strict=True)]
    return {
        "added_tokens": [added_token(i, pieces.tokens[i], special=True) for i in range(3)],
        "normalizer": prepended if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else metaspace,
        "post_processor": bos_template("<s>", 1),
        "model": {"type": "Unigram", "unk_id": 0, "vocab": scored},
    }


def test_keys_of_a_unigram_model(strings: list[str], tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, strings, **UNIGRAM)
    pieces, processor = stored(tmp_path), sentencepiece.SentencePieceProcessor()
    processor.Load(str(tmp_path / "tokenizer.model"))
    keys = {key.removeprefix("tokenizer.ggml."): entry for key, entry in read_vocab(tmp_path, 900, {}).items()}
    n_padding = 900 - len(pieces.tokens)
    assert keys["scores"].value == pieces.scores + [-10000.0] * n_padding
    assert keys["token_type"].value == pieces.types + [TokenType.UNUSED] * n_padding
    assert [keys[f"{name}_token_id"].value for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert [keys[f"add_{name}"].value for name in ("space_prefix", "bos_token", "eos_token")] == [True, True, False]
    charsmap = keys["precompiled_charsmap"]
    assert charsmap.value in processor.serialized_model_proto()
    assert (charsmap.type, charsmap.sub_type) == (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_fallback": True}, "unigram model with byte fallback: llama.cpp supports it for BPE only"),
        (
            {"add_dummy_prefix": False},
            "with remove_extra_whitespaces without a space prefix: not supported by llama.cpp",
        ),
        (
            {"treat_whitespace_as_suffix": True},
            "unigram model with spaces as suffix of words: not supported by llama.cpp",
        ),
    ],
)
def test_other_unigram_models_are_refused(
    options: dict[str, Any], message: str, strings: list[str], tmp_path: Path
) -> None:
    train_sentencepiece(tmp_path, strings, **{**UNIGRAM, "vocab_size": 600, **options})
    with pytest.raises(UnsupportedError, match=message):
        read_vocab(tmp_path, 1000, {})


def test_user_defined_symbols_of_a_unigram_model_are_noted(strings: list[str], tmp_path: Path) -> None:
    symbols = {"user_defined_symbols": ["abc"], "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    train_sentencepiece(tmp_path, strings, **{**UNIGRAM, **symbols})
    note = "llama.cpp does not normalize the first character of added tokens such as 'abc'."
    assert open_vocab(tmp_path, 1000, {}).notes == (note,)
    text = ["a\u0308", "o\u0308"]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", tmp_path, 1000)) as llama:
        ids = llama.tokenize(text, parse_special=False)
    expected = SentencePiece(tmp_path).tokenize(text, parse_special=False)
    assert [a == b for a, b in zip(ids, expected, strict=True)] == [False, True]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"byte_fallback": True}, "unigram model with byte fallback"),
        ({"unk_id": None}, "unk_id: wanted the id of a token, got None"),
        ({"unk_id": 3}, "unk_id: wanted the id of a token, got 3"),
        ({"vocab": [["<unk>", 0.0], ["a", "b"]]}, "wanted a list of pieces with scores, got \\['a', 'b'\\]"),
        ({"vocab": [["a", float("nan")]]}, "wanted a list of pieces with scores, got \\['a', nan\\]"),
        ({"vocab": [["a", 10**400]]}, "wanted a list of pieces with scores"),
        ({"vocab": {"<unk>": 0}}, "wanted a list of pieces with scores"),
        ({"vocab": [["<unk>", 0], ["a", -1.0], ["a", -2.0]]}, "token 'a' has two ids"),
        ({"vocab": [["<unk>", 0], ["a", -1.0], ["a▁", -2.0]]}, "normalizer and pre-tokenizer: Metaspace"),
    ],
)
def test_damaged_unigram_models(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain = unigram_json(Stored(["<unk>", "<s>", "</s>"], [], [0.0, 0.0, 0.0], []), "split")
    write_json(tmp_path / "tokenizer.json", {**plain, "added_tokens": [], "model": {**plain["model"], **model}})
    with pytest.raises((UnsupportedError, TokenizerError), match=message):
        read_vocab(tmp_path, 10, {})


def test_the_normalizer_of_a_converted_unigram_model_is_refused(tmp_path: Path) -> None:
    plain = unigram_json(Stored(["<unk>", "<s>", "</s>"], [], [0.0, 0.0, 0.0], []), "split")
    precompiled = {"type": "Precompiled", "precompiled_charsmap": ""}
    write_json(tmp_path / "tokenizer.json", {**plain, "normalizer": precompiled})
    with pytest.raises(UnsupportedError, match=r"Precompiled > Metaspace\); add the original tokenizer.model"):
        read_vocab(tmp_path, 10, {})


def test_a_damaged_charsmap_is_refused(strings: list[str], tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, strings, **UNIGRAM)
    charsmap = read_vocab(tmp_path, 1000, {})["tokenizer.ggml.precompiled_charsmap"].value
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace(charsmap, b"\xff\xff\xff\x7f" + charsmap[4:]))
    with pytest.raises(TokenizerError, match=rf"precompiled_charsmap of {len(charsmap)} bytes is damaged"):
        read_vocab(tmp_path, 1000, {})


def test_keys_of_a_sentencepiece_model_are_what_sentencepiece_says(spm: Path) -> None:
    keys = read_vocab(spm, 1000, {})
    expected = stored(spm)
    assert keys["tokenizer.ggml.tokens"].value == expected.tokens
    assert keys["tokenizer.ggml.token_type"].value == expected.types
    assert keys["tokenizer.ggml.scores"].value == expected.scores
    assert [keys[f"tokenizer.ggml.{name}_token_id"].value for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert keys["tokenizer.ggml.add_bos_token"].value is True
    assert keys["tokenizer.ggml.add_eos_token"].value is False
    assert keys["tokenizer.ggml.model"].value == "llama"
    assert keys["tokenizer.ggml.pre"].value == "default"


# --- recognising the pre-tokenizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pre"), RECOGNISED.items())
def test_real_spellings_are_recognised(name: str, pre: str) -> None:
    pre_tokenizer, ignore_merges = SPELLED[name]
    assert recognise({"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": ignore_merges}}, Path("t")) == pre


def test_nesting_and_offsets_do_not_matter() -> None:
    pre_tokenizer, _ = SPELLED["Qwen 3"]
    nested = sequence(sequence(pre_tokenizer["pretokenizers"][0]), byte_level(use_regex=False))
    assert recognise({"pre_tokenizer": nested, "model": {}}, Path("t")) == "qwen2"


def test_ignore_merges_that_llama_cpp_has_not_is_refused() -> None:
    tokenizer = {"pre_tokenizer": SPELLED["Qwen 3"][0], "model": {"ignore_merges": True}}
    with pytest.raises(UnsupportedError) as error:
        recognise(tokenizer, Path("tokenizer.json"))
    assert str(error.value) == (
        "tokenizer.json: pre-tokenizer of 'qwen2' with ignore_merges true, which llama.cpp has only with false; "
        "--pre-tokenizer qwen2 converts it anyway, and some words get other ids"
    )


def test_an_unknown_pattern_names_the_nearest_and_the_override(trained: Callable[[str], Path], tmp_path: Path) -> None:
    two_digits = json.loads(json.dumps(SPELLED["Llama 3"][0]).replace("{1,3}", "{1,2}"))
    folder = edited(trained("Llama 3"), tmp_path / "model", pre_tokenizer=two_digits)
    with pytest.raises(UnsupportedError, match=r"unknown pre-tokenizer Split\(.*the nearest known one is 'llama-bpe'"):
        read_vocab(folder, 2000, {})
    with pytest.raises(
        UnsupportedError, match=r"to use it anyway, pass --pre-tokenizer llama-bpe; if llama.cpp's.* MODEL"
    ):
        read_vocab(folder, 2000, {})
    assert read_vocab(folder, 2000, {}, pre="llama-bpe")["tokenizer.ggml.pre"].value == "llama-bpe"
    assert read_vocab(folder, 2000, {}, pre="jais-2")["tokenizer.ggml.pre"].value == "jais-2"


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        {**byte_level(use_regex=True), "add_prefix_space": True},
        sequence({"type": "Digits", "individual_digits": False}, byte_level(use_regex=True)),
        sequence(byte_level(use_regex=False), isolated(r"\p{N}")),
        sequence({**isolated(r"\p{N}"), "behavior": "MergedWithNext"}, byte_level(use_regex=True)),
    ],
)
def test_other_options_are_another_pre_tokenizer(pre_tokenizer: Any) -> None:
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer"):
        recognise({"pre_tokenizer": pre_tokenizer, "model": {}}, Path("t"))


def test_an_override_must_be_a_name_of_llama_cpp(trained: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError) as error:
        read_vocab(trained("Qwen 3"), 2000, {}, pre="qwen3")
    assert str(error.value) == "--pre-tokenizer qwen3: llama.cpp has no such pre-tokenizer; similar: qwen35, qwen2"


def test_llama_cpp_knows_every_name_of_the_table() -> None:
    names = [name for known in KNOWN for name in (known.name, *known.alike)]
    assert len(set(names)) == len(names)
    assert set(names) <= set(NAMES)


def test_limits_become_notes(trained: Callable[[str], Path]) -> None:
    assert open_vocab(trained("Mistral Nemo"), 2000, {}).notes == (
        "llama.cpp's pre-tokenizer 'tekken' may give letters beyond A-Z that have case, or combining marks, other "
        "token ids than the original.",
    )
    assert open_vocab(trained("Llama 3"), 2000, {}).notes == ()
    (note,) = open_vocab(trained("Llama 3"), 2000, {}, pre="llama4").notes
    assert note.startswith("llama.cpp's pre-tokenizer 'llama4' may give letters beyond A-Z that have case")


@pytest.mark.parametrize("text", ["ÉCOLE", "aÉb"])
def test_what_is_said_to_be_cut_differently_is(text: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("Mistral Nemo")
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2000)) as llama:
        ids = llama.tokenize([text], parse_special=True)
    assert ids != HuggingFace(folder).tokenize([text], parse_special=True)


def test_nfc_is_accepted_with_a_note(trained: Callable[[str], Path], strings: list[str], tmp_path: Path) -> None:
    folder = edited(trained("Qwen 3"), tmp_path / "model", normalizer={"type": "NFC"})
    assert open_vocab(folder, 2000, {}).notes == (
        "Text is expected in Unicode normalization form C: llama.cpp does not normalize it.",
    )
    texts = [unicodedata.normalize("NFC", text) for text in comparable(fill_slots(strings, []), "qwen2")]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2000)) as llama:
        assert llama.tokenize(["e\u0301"], parse_special=True) != HuggingFace(folder).tokenize(
            ["e\u0301"], parse_special=True
        )
        assert llama.tokenize(texts, parse_special=True) == HuggingFace(folder).tokenize(texts, parse_special=True)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Lowercase"},
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]},
    ],
)
def test_other_normalizers_are_refused(normalizer: Any, trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(trained("Qwen 3"), tmp_path / "model", normalizer=normalizer)
    with pytest.raises(UnsupportedError, match=r"llama.cpp does not apply it, .*; known: none and NFC"):
        read_vocab(folder, 2000, {})
    assert read_vocab(folder, 2000, {}, pre="qwen2")["tokenizer.ggml.pre"].value == "qwen2"


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_types_padding_and_merges(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("Qwen 3")
    size = n_rows(folder)
    keys = read_vocab(folder, size + 3, {})
    tokens, types = keys["tokenizer.ggml.tokens"].value, keys["tokenizer.ggml.token_type"].value
    assert tokens[-7:] == [*CONTROL, *USER_DEFINED, f"[PAD{size}]", f"[PAD{size + 1}]", f"[PAD{size + 2}]"]
    assert types[-7:] == [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED] * 2 + [TokenType.UNUSED] * 3
    assert set(types[:-7]) == {TokenType.NORMAL}
    assert len(tokens) == len(types) == size + 3
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert isinstance(model["merges"][0], list)
    spelled = [" ".join(pair) for pair in model["merges"]]
    assert keys["tokenizer.ggml.merges"].value == spelled
    old = edited_model(folder, tmp_path / "old", merges=spelled)
    assert read_vocab(old, size + 3, {}) == keys
    assert "tokenizer.ggml.scores" not in keys
    assert "tokenizer.ggml.add_space_prefix" not in keys


def test_gaps_become_unused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    model = json.loads((trained("GPT-2") / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merged = "".join(model["merges"][-1])
    vocab = {**model["vocab"], merged: 2000, CONTROL[0]: 2001, CONTROL[1]: 2002}
    added = json.loads((trained("GPT-2") / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"][:2]
    moved = [{**token, "id": 2001 + i} for i, token in enumerate(added)]
    folder = edited(
        trained("GPT-2"),
        tmp_path / "model",
        model={**model, "vocab": vocab},
        added_tokens=moved,
        post_processor=bos_template(CONTROL[0], 2001),
    )
    tokens = read_vocab(folder, 2004, {})["tokenizer.ggml.tokens"].value
    assert tokens[model["vocab"][merged]] == f"[PAD{model['vocab'][merged]}]"
    assert tokens[2000:] == [merged, *CONTROL, "[PAD2003]"]
    texts = comparable(HAND_PICKED, "gpt-2")
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2004)) as llama:
        ids = llama.tokenize(texts, parse_special=True)
    assert ids == HuggingFace(folder).tokenize(texts, parse_special=True)


def test_flagged_ordinary_but_looking_special_is_control(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained("Qwen 3"), folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|fim_prefix|>", "<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    types = read_vocab(folder, n_rows(folder), {})["tokenizer.ggml.token_type"].value
    assert types[-2:] == [TokenType.CONTROL, TokenType.USER_DEFINED]


def test_added_tokens_without_a_row_are_left_out(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """As in every Gemma 3, whose tokenizer has one token more than the embedding has rows."""
    folder = trained("Qwen 3")
    size = n_rows(folder)
    vocab = open_vocab(folder, size - 1, {})
    assert (
        vocab.metadata["tokenizer.ggml.tokens"].value
        == read_vocab(folder, size, {})["tokenizer.ggml.tokens"].value[:-1]
    )
    assert vocab.notes == (
        f"1 added token has no row in the embedding of {size - 1} rows and is left out, such as '    ' "
        f"(id {size - 1}).",
    )
    (note,) = open_vocab(folder, size - 2, {}).notes
    assert note.startswith("2 added tokens have no row") and "such as '<tool>'" in note
    texts = ["one two three", "<|eos|>x"]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, size - 1)) as llama:
        ids = llama.tokenize(texts, parse_special=True)
    assert ids == HuggingFace(folder).tokenize(texts, parse_special=True)


def test_a_vocabulary_larger_than_the_embedding_is_refused(spm: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        read_vocab(spm, 999, {})
    message = str(error.value)
    assert "1000 tokens up to id 999" in message and "but the embedding has 999 rows" in message
    assert "1 of those without a row are not added tokens: the tokenizer belongs to another model" in message


def test_added_tokens_of_a_sentencepiece_model(spm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(spm, folder)
    write_json(folder / "added_tokens.json", {"<pad>": 1000, "<old>": 1001, "[SEP]": 1002})
    decoder = {
        "1000": {"content": "<pad>", "special": True},
        "1002": {"content": "[SEP]", "special": True},
        "1001": {"content": "<new>", "special": False},
        "1003": {"content": "▁▁▁x", "special": False},
        "1004": {"content": "<|end|>", "special": False},
        "1005": {"content": "<ctl>", "special": True, "rstrip": True},
    }
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, "pad_token": "<pad>"})
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": ["[SEP]"]})
    vocab = open_vocab(folder, 1008, {})
    keys = vocab.metadata
    control, user, unused = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED
    expected = [
        ("<pad>", control, -1000.0),
        ("<new>", user, -1000.0),
        ("[SEP]", control, -1000.0),
        ("   x", user, -1000.0),
        ("<|end|>", control, -1000.0),
        ("<ctl>", control, -1000.0),
        ("[PAD1006]", unused, -10000.0),
        ("[PAD1007]", unused, -10000.0),
    ]
    columns = [keys[f"tokenizer.ggml.{name}"].value[1000:] for name in ("tokens", "token_type", "scores")]
    assert list(zip(*columns, strict=True)) == expected
    assert keys["tokenizer.ggml.padding_token_id"].value == 1000
    assert vocab.notes == (
        "added_tokens.json disagrees with the tokenizer that transformers builds from the files about 1 added token: "
        "for example, it lists '<old>' as ordinary with id 1001, which is not a token. "
        "The GGUF follows transformers.",
        "llama.cpp hides 1 special token that no chat template uses, such as '<ctl>' (id 1005): it prints no "
        "special tokens. If answers contain them, run llama-cli or llama-server with --special.",
        "Added tokens such as '<ctl>' strip spaces around them or match whole words only; "
        "llama.cpp matches their text alone.",
    )


def test_symbols_that_sentencepiece_matches_first_are_user_defined(strings: list[str], tmp_path: Path) -> None:
    """As in Gemma: runs of blanks and HTML tags."""
    folder = tmp_path / "model"
    symbols = ["<sep>", "<h1>", *("▁" * n for n in range(2, 32))]
    train_sentencepiece(folder, strings, user_defined_symbols=symbols, add_dummy_prefix=False)
    keys = read_vocab(folder, 1000, {})
    assert keys["tokenizer.ggml.tokens"].value[3:35] == [text.replace("▁", " ") for text in symbols]
    assert keys["tokenizer.ggml.token_type"].value[3:35] == [TokenType.USER_DEFINED] * 32
    assert keys["tokenizer.ggml.add_space_prefix"].value is False
    texts = [f"{text}<sep>x{' ' * (i % 40)}<h1>{text}" for i, text in enumerate(fill_slots(strings, [])[:1000])]
    texts = [text.replace("▁", "_") for text in texts]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 1000)) as llama:
        ids = llama.tokenize(texts, parse_special=False)
    assert ids == SentencePiece(folder).tokenize(texts, parse_special=False)


def extended(pieces: Stored, tokens: Mapping[str, TokenType], stripping: Iterable[str] = ()) -> Stored:
    """Return a sentencepiece vocabulary with more tokens at its end."""
    return replace(
        pieces,
        tokens=[*pieces.tokens, *tokens],
        types=[*pieces.types, *map(int, tokens.values())],
        scores=[*pieces.scores, *[0.0] * len(tokens)],
        stripping=frozenset(stripping),
    )


def test_tokens_of_phi_3_take_blanks_along_where_the_name_says_so(
    spm: Path, strings: list[str], tmp_path: Path
) -> None:
    stripping = ("</s>", "<|user|>", "<|end|>")
    names = ("<|endoftext|>", "<|user|>", "<|end|>")
    write_converted_folder(tmp_path, extended(stored(spm), dict.fromkeys(names, TokenType.CONTROL), stripping))
    (note,) = open_vocab(tmp_path, 1010, {"architectures": ["Phi3ForCausalLM"]}).notes
    assert note.endswith("llama.cpp matches their text alone, unless general.name contains phi-3.")
    texts = fill_slots(comparable(strings, "phi-3 json"), ["</s>", *names])
    file = write_vocab(tmp_path / "v.gguf", tmp_path, 1010)
    expected = HuggingFace(tmp_path).tokenize(texts, parse_special=True)
    with LlamaCpp(file, {"general.name": "My Phi-3 mini"}) as llama:
        assert llama.tokenize(texts, parse_special=True) == expected
    with LlamaCpp(file) as llama:
        assert llama.tokenize(texts, parse_special=True) != expected


def test_pieces_of_internlm_2(spm: Path, strings: list[str], tmp_path: Path) -> None:
    """One piece is a zero byte, some are unused by name, and the end of a turn is an added token."""
    pieces = dict.fromkeys(("\0", "[UNUSED_TOKEN_1]", "zz"), TokenType.NORMAL)
    write_sentencepiece_folder(tmp_path, extended(stored(spm), {**pieces, "<|im_end|>": TokenType.CONTROL}))
    keys = read_vocab(tmp_path, 1004, {})
    assert keys["tokenizer.ggml.tokens"].value[1000:] == [*pieces, "<|im_end|>"]
    unused = [TokenType.NORMAL, TokenType.UNUSED, TokenType.NORMAL, TokenType.CONTROL]
    assert keys["tokenizer.ggml.token_type"].value[1000:] == unused
    assert keys["tokenizer.ggml.eos_token_id"].value == 2
    texts = fill_slots(strings, [])
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", tmp_path, 1004)) as llama:
        assert llama.tokenize(texts, parse_special=False) == SentencePiece(tmp_path).tokenize(
            texts, parse_special=False
        )
        assert llama.tokenize(["<|im_end|>"], parse_special=True) == [[1, 1003]]
        assert [i for i in range(1004) if binding.llama_vocab_is_eog(llama.vocab, i)] == [2, 1003]


def test_a_character_in_place_of_its_byte(spm: Path, strings: list[str], tmp_path: Path) -> None:
    """As transformers converts Gemma 1 and 2, which have tokens of several tabs, but no tab; here with U+0002."""
    pieces = extended(stored(spm), dict.fromkeys(("\2\2", "\2\2\2"), TokenType.NORMAL))
    single = pieces.tokens.index("<0x02>")
    pieces.tokens[single], pieces.types[single] = "\2", int(TokenType.NORMAL)
    write_converted_folder(tmp_path, pieces)
    texts = [f"{text}{chr(2) * (i % 8)}" for i, text in enumerate(fill_slots(strings, []))]
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", tmp_path, 1002)) as llama:
        ids = llama.tokenize(texts, parse_special=True)
    assert ids == HuggingFace(tmp_path).tokenize(texts, parse_special=True)
    assert {single, 1000, 1001} <= {token for line in ids for token in line}


def test_infilling_tokens_of_codellama(spm: Path, tmp_path: Path) -> None:
    control = dict.fromkeys(("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), TokenType.CONTROL)
    write_sentencepiece_folder(tmp_path, extended(stored(spm), {"zz": TokenType.NORMAL, **control}))
    assert read_vocab(tmp_path, 1005, {})["tokenizer.ggml.eot_token_id"].value == 1004
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", tmp_path, 1005)) as llama:
        found = [getattr(binding, f"llama_vocab_{name}")(llama.vocab) for name in ("fim_pre", "fim_suf", "fim_mid")]
        assert found == [1001, 1002, 1003]
        assert binding.llama_vocab_eot(llama.vocab) == 1004
        assert binding.llama_vocab_is_eog(llama.vocab, 1004)


@pytest.mark.parametrize("normalized", [False, True])
def test_runs_of_blanks_as_added_tokens(
    normalized: bool, trained: Callable[[str], Path], strings: list[str], tmp_path: Path
) -> None:
    """As in GPT-NeoX, whose normalizer sees them."""
    folder = edited(trained("GPT-2"), tmp_path / "model", normalizer={"type": "NFC"})
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    runs = [tokenizers.AddedToken(" " * n, normalized=normalized) for n in range(24, 4, -1)]
    tokenizer.add_tokens(runs)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = [f"{text}{' ' * (i % 60)}x" for i, text in enumerate(comparable(fill_slots(strings, []), "gpt-2"))]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    assert read_vocab(folder, 2000, {})["tokenizer.ggml.token_type"].value[n_rows(folder) - 1] == TokenType.USER_DEFINED
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2000)) as llama:
        assert llama.tokenize(texts, parse_special=True) == HuggingFace(folder).tokenize(texts, parse_special=True)


def test_tokenizer_model_goes_before_a_converted_tokenizer_json(spm: Path, tmp_path: Path) -> None:
    write_converted_folder(tmp_path / "both", stored(spm))
    shutil.copy(spm / "tokenizer.model", tmp_path / "both")
    scores = read_vocab(tmp_path / "both", 1000, {})["tokenizer.ggml.scores"].value
    assert scores == [-1000.0] * 3 + stored(spm).scores[3:]  # the first three are added tokens in tokenizer.json


def test_byte_level_json_goes_before_tokenizer_model(trained: Callable[[str], Path], spm: Path, tmp_path: Path) -> None:
    shutil.copytree(trained("Llama 3"), tmp_path / "both")
    shutil.copy(spm / "tokenizer.model", tmp_path / "both")
    assert read_vocab(tmp_path / "both", 2000, {})["tokenizer.ggml.model"].value == "gpt2"


# --- special tokens ---------------------------------------------------------------------------------------------------


def special_ids(folder: Path, config: Mapping[str, Any], n_vocab: int = 2000) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    keys = read_vocab(folder, n_vocab, config)
    return {
        key.removeprefix(prefix): entry.value
        for key, entry in keys.items()
        if key.endswith("_token_id") or key.startswith(f"{prefix}add_")
    }


def test_llama_cpp_sees_the_special_tokens(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("Llama 3")
    bos, eos = (n_rows(folder) - 4 + i for i in range(2))
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2000)) as llama:
        assert binding.llama_vocab_n_tokens(llama.vocab) == 2000
        assert binding.llama_vocab_bos(llama.vocab) == bos
        assert binding.llama_vocab_eos(llama.vocab) == eos
        assert binding.llama_vocab_is_eog(llama.vocab, eos)
        assert binding.llama_vocab_is_control(llama.vocab, bos)
        assert not binding.llama_vocab_is_control(llama.vocab, n_rows(folder) - 1)
        assert binding.llama_vocab_get_add_bos(llama.vocab)
        assert not binding.llama_vocab_get_add_eos(llama.vocab)


def test_special_ids_and_template_agree_with_gguf(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(
        trained("Qwen 3"),
        tmp_path / "model",
        "tokenizer_config.json",
        pad_token={"content": "<tool>"},
        chat_template="{{ messages }}",
    )
    theirs = gguf.SpecialVocab(folder, load_merges=True)
    keys = read_vocab(folder, 2000, {})
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ours = {name: keys[f"tokenizer.ggml.{key}_token_id"].value for name, key in names.items()}
    assert ours == theirs.special_token_ids
    assert keys["tokenizer.ggml.merges"].value == theirs.merges
    assert keys["tokenizer.chat_template"].value == theirs.chat_template
    assert keys["tokenizer.ggml.add_bos_token"].value is theirs.add_special_token["bos"] is True


def test_where_special_ids_come_from(trained: Callable[[str], Path], tmp_path: Path) -> None:
    base = edited(trained("Qwen 3"), tmp_path / "base", post_processor=byte_level(use_regex=False))
    ids = {text: i for i, text in enumerate(read_vocab(base, 2000, {})["tokenizer.ggml.tokens"].value)}
    write_json(base / "tokenizer_config.json", {"eos_token": {"content": "<|eos|>"}, "bos_token": None})
    plain = {"eos_token_id": ids["<|eos|>"], "add_bos_token": False, "add_eos_token": False}
    assert special_ids(base, {}) == plain
    assert special_ids(base, {"eos_token_id": 5, "bos_token_id": 7, "pad_token_id": 9999}) == {
        **plain,
        "bos_token_id": 7,
        "eot_token_id": 5,
    }
    mapped = edited(base, tmp_path / "mapped", "special_tokens_map.json", bos_token="<|bos|>", unk_token="<|eos|>")
    of_map = {**plain, "bos_token_id": ids["<|bos|>"], "unknown_token_id": ids["<|eos|>"]}
    assert special_ids(mapped, {"bos_token_id": 7}) == of_map
    (base / "tokenizer_config.json").unlink()
    assert special_ids(base, {"eos_token_id": [12, 13]})["eos_token_id"] == 12
    write_json(base / "generation_config.json", {"eos_token_id": 14, "pad_token_id": 15})
    assert special_ids(base, {"eos_token_id": None}) == {**plain, "eos_token_id": 14, "padding_token_id": 15}


def test_no_end_of_text_is_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(trained("Qwen 3"), tmp_path / "model", "tokenizer_config.json", eos_token=None)
    with pytest.raises(TokenizerError) as error:
        read_vocab(folder, 2000, {})
    assert str(error.value) == (
        f"{folder}: no file names an EOS token of the vocabulary, and llama.cpp would use another token; "
        "set eos_token in tokenizer_config.json or eos_token_id in config.json"
    )


def test_a_special_token_that_no_file_lists_is_added_at_the_end(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers does; where the embedding has no row for it, another file must name the end."""
    folder = edited(trained("Qwen 3"), tmp_path / "model", "tokenizer_config.json", eos_token="<none>")
    size = n_rows(folder)
    vocab = open_vocab(folder, size + 2, {})
    assert vocab.metadata["tokenizer.ggml.eos_token_id"].value == size
    assert vocab.metadata["tokenizer.ggml.tokens"].value[size:] == ["<none>", f"[PAD{size + 1}]"]
    assert f"names 1 special tokens that no file lists, such as '<none>': it gets id {size}" in vocab.notes[0]
    assert special_ids(folder, {"eos_token_id": 7}, size)["eos_token_id"] == 7
    with pytest.raises(TokenizerError, match="no file names an EOS token of the vocabulary"):
        read_vocab(folder, size, {})


def template(before: list[str], after: list[str], ids: Mapping[str, int]) -> dict[str, Any]:
    def special(text: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        **bos_template("<|bos|>", ids["<|bos|>"]),
        "single": [*map(special, before), text, *map(special, after)],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*before, *after)},
    }


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], (False, False)),
        (["<|bos|>"], [], (True, False)),
        (["<|bos|>"], ["<|eos|>"], (True, True)),
        ([], ["<tool>"], (False, True)),
    ],
)
def test_the_post_processor_says_what_is_added(
    before: list[str],
    after: list[str],
    expected: tuple[bool, bool],
    trained: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    ids = {text: i for i, text in enumerate(read_vocab(trained("GPT-2"), 2000, {})["tokenizer.ggml.tokens"].value)}
    processors = [byte_level(use_regex=True), template(before, after, ids)]
    folder = edited(trained("GPT-2"), tmp_path / "model", post_processor={"type": "Sequence", "processors": processors})
    found = special_ids(folder, {})
    assert (found["add_bos_token"], found["add_eos_token"]) == expected
    assert found["bos_token_id"] == ids["<|bos|>"]
    assert found["eos_token_id"] == ids[(after or ["<|eos|>"])[-1]]
    assert found.get("eot_token_id") == (ids["<|eos|>"] if after == ["<tool>"] else None)
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2000)) as llama:
        ids_added = llama.tokenize(HAND_PICKED, parse_special=True)
    assert ids_added == HuggingFace(folder).tokenize(HAND_PICKED, parse_special=True)


def test_flags_count_without_a_tokenizer_json(spm: Path, tmp_path: Path) -> None:
    unflagged = edited(spm, tmp_path / "unflagged", "tokenizer_config.json", add_bos_token=False)
    assert special_ids(unflagged, {})["add_bos_token"] is False
    assert special_ids(spm, {})["add_bos_token"] is True


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_post_processor_overrules_flags(
    has_processor: bool, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers 5 takes the flags away when there is a tokenizer.json, with a post-processor or without."""
    changes = {} if has_processor else {"post_processor": None}
    base = edited(trained("GPT-2"), tmp_path / "base", **changes)
    flags = {"add_bos_token": not has_processor, "add_eos_token": True}
    folder = edited(base, tmp_path / "flagged", "tokenizer_config.json", **flags)
    vocab = open_vocab(folder, 2000, {})
    assert vocab.metadata["tokenizer.ggml.add_bos_token"].value is has_processor
    assert vocab.metadata["tokenizer.ggml.add_eos_token"].value is False
    said = f"add_bos_token {str(not has_processor).lower()} and add_eos_token true"
    found = "has a post-processor that says" if has_processor else "has no post-processor, which says"
    assert vocab.notes == (
        f"tokenizer_config.json says {said}, but tokenizer.json {found} otherwise and counts, as in transformers 5: "
        f"add_bos_token {str(has_processor).lower()} and add_eos_token false is written.",
    )
    with LlamaCpp(write_vocab(tmp_path / "v.gguf", folder, 2000)) as llama:
        ids = llama.tokenize(["one two"], parse_special=True)
    assert ids == HuggingFace(folder).tokenize(["one two"], parse_special=True)


def test_post_processors_beyond_llama_cpp_are_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    ids = {"<|bos|>": 1, "<|eos|>": 2}
    two = edited(trained("GPT-2"), tmp_path / "two", post_processor=template(["<|bos|>", "<|eos|>"], [], ids))
    with pytest.raises(UnsupportedError, match=r"adds 2 tokens before and 0 after the text; llama.cpp adds at most"):
        read_vocab(two, 2000, {})
    roberta = edited(trained("GPT-2"), tmp_path / "roberta", post_processor={"type": "RobertaProcessing"})
    with pytest.raises(UnsupportedError, match="post-processor RobertaProcessing is not supported"):
        read_vocab(roberta, 2000, {})


def test_bos_without_a_bos_token_is_refused(spm: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((spm / "tokenizer.model").read_bytes().replace(b"\x0a\x03<s>", b"\x0a\x03<S>"))
    with pytest.raises(TokenizerError, match="a BOS token must be added, but no file names it"):
        read_vocab(tmp_path, 1000, {})


# --- chat templates ---------------------------------------------------------------------------------------------------


def chat_templates(folder: Path) -> dict[str, Any]:
    keys = read_vocab(folder, 2000, {})
    return {key: entry.value for key, entry in keys.items() if key.startswith("tokenizer.chat")}


@pytest.mark.parametrize("form", ["list", "mapping", "files"])
def test_named_chat_templates(form: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    templates = {"default": "{{ a }}", "tool_use": "{{ b }}", "rag 2": "{{ c }}"}
    folder = tmp_path / "model"
    if form == "files":
        shutil.copytree(trained("GPT-2"), folder)
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(templates["default"], encoding="utf-8")
        for name in ("tool_use", "rag 2"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(templates[name], encoding="utf-8")
    else:
        as_list = [{"name": name, "template": text} for name, text in templates.items()]
        edited(
            trained("GPT-2"),
            folder,
            "tokenizer_config.json",
            chat_template=as_list if form == "list" else templates,
        )
    assert chat_templates(folder) == {
        "tokenizer.chat_template": "{{ a }}",
        "tokenizer.chat_template.tool_use": "{{ b }}",
        "tokenizer.chat_template.rag_2": "{{ c }}",
        "tokenizer.chat_templates": ["rag_2", "tool_use"],
    }


def test_one_chat_template(trained: Callable[[str], Path], tmp_path: Path) -> None:
    assert chat_templates(trained("GPT-2")) == {}
    folder = edited(trained("GPT-2"), tmp_path / "model", "tokenizer_config.json", chat_template="{{ config }}")
    assert chat_templates(folder) == {"tokenizer.chat_template": "{{ config }}"}
    write_json(folder / "chat_template.json", {"chat_template": "{{ json }}"})
    assert chat_templates(folder) == {"tokenizer.chat_template": "{{ config }}"}
    write_json(folder / "tokenizer_config.json", {"eos_token": CONTROL[1]})
    assert chat_templates(folder) == {"tokenizer.chat_template": "{{ json }}"}
    (folder / "chat_template.jinja").write_text("{{ jinja }}", encoding="utf-8")
    assert chat_templates(folder) == {"tokenizer.chat_template": "{{ jinja }}"}


def test_a_damaged_list_of_chat_templates_is_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(trained("GPT-2"), tmp_path / "model", "tokenizer_config.json", chat_template=[{"name": "x"}])
    with pytest.raises(TokenizerError, match=r"chat_template: wanted name and template, got \{'name': 'x'\}"):
        read_vocab(folder, 2000, {})


# --- bad files --------------------------------------------------------------------------------------------------------


def test_no_tokenizer_names_the_files_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        read_vocab(tmp_path, 10, {})
    assert str(error.value) == (
        f"{tmp_path}: no tokenizer: neither tokenizer.model nor tokenizer.json exists; "
        "copy the tokenizer files of the original model"
    )
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"vocab.json does not say how text is split; load the tokenizer with"):
        read_vocab(tmp_path, 10, {})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", POINTER, "a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"),
        ("tokenizer.model", POINTER, "a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"),
        ("tokenizer.json", b"{", "not JSON: Expecting property name enclosed in double quotes"),
        ("tokenizer.json", b"\xff", "not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("tokenizer.json", b"[]", "wanted a JSON object, got list"),
        ("tokenizer.json", b"{}", "wanted an object 'model' with a vocab"),
        ("tokenizer.model", b"", r"not a sentencepiece model \(no pieces\)"),
        ("tokenizer.model", b"IQ== 0\nIg== x\n", "not a sentencepiece model"),
        ("tokenizer.model", b"\x0a\x7f\x0a\x01a", r"not a sentencepiece model \(truncated at byte 5\)"),
        ("tokenizer.model", b"\x0a\x02\x18\x63", "not a sentencepiece model"),
        (
            "tokenizer.model",
            b"\x0a\x08\x0a\x01a\x15\x00\x00\x80\x7f",
            r"not a sentencepiece model \(a piece of score inf\)",
        ),
        (
            "tokenizer.model",
            b"\x0a\x03\x0a\x01a\x1a\x02\x10\x07",
            r"sentencepiece model \(normalizer field 2 is not text\)",
        ),
    ],
)
def test_damaged_files(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        read_vocab(tmp_path, 10, {})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": "WordPiece"}, UnsupportedError, "tokenizer model WordPiece is not supported; known: BPE"),
        ({"type": "Unigram", "vocab": [["a", 0.0]]}, UnsupportedError, "tokenizer model Unigram is not supported"),
        ({"dropout": 0.1}, UnsupportedError, "BPE with dropout 0.1"),
        ({"end_of_word_suffix": "</w>"}, UnsupportedError, "BPE with end_of_word_suffix '</w>'"),
        ({"vocab": {"a": 0, "b": 0}}, TokenizerError, "id 0 belongs to both 'a' and 'b'"),
        ({"vocab": {"a": -1}}, TokenizerError, "token 'a': wanted an id from 0, got -1"),
        ({"vocab": {"a": "0"}}, TokenizerError, "token 'a': wanted an id from 0, got '0'"),
        ({"merges": ["a"]}, TokenizerError, "merge 0: wanted two tokens, got 'a'"),
        ({"merges": [["a", "b", "c"]]}, TokenizerError, "merge 0: wanted two tokens"),
        ({"merges": [[["a"], "b"]]}, TokenizerError, "merge 0: wanted two tokens"),
        ({"merges": [7]}, TokenizerError, "merge 0: wanted two tokens, got 7"),
        ({"merges": ["e \u4e00"]}, TokenizerError, "merge 0 'e \u4e00': '\u4e00' is not in the vocabulary"),
        ({"merges": []}, TokenizerError, r"wanted a list of merges, got \[\]"),
    ],
)
def test_damaged_bpe_models(
    changes: dict[str, Any], error: type[Exception], message: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = edited_model(trained("GPT-2"), tmp_path / "model", **changes)
    if "vocab" in changes:
        write_json(
            folder / "tokenizer.json", {**json.loads((folder / "tokenizer.json").read_text()), "added_tokens": []}
        )
    with pytest.raises(error, match=message):
        read_vocab(folder, 2000, {})


def test_a_vocabulary_without_some_bytes(trained: Callable[[str], Path], tmp_path: Path) -> None:
    model = json.loads((trained("GPT-2") / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    missing = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    escape = missing.pre_tokenize_str("\x1b")[0][0]
    vocab = {text: i for text, i in model["vocab"].items() if escape not in text}
    merges = [pair for pair in model["merges"] if escape not in "".join(pair)]
    vocab |= dict(zip(CONTROL, (3000, 3001), strict=True))
    added = [
        {**token, "id": 3000 + i}
        for i, token in enumerate(json.loads((trained("GPT-2") / "tokenizer.json").read_text())["added_tokens"][:2])
    ]
    lacking = {**model, "vocab": vocab, "merges": merges}
    folder = edited(trained("GPT-2"), tmp_path / "plain", model=lacking, added_tokens=added, post_processor=None)
    assert len(read_vocab(folder, 3002, {})["tokenizer.ggml.tokens"].value) == 3002
    unk = edited(folder, tmp_path / "unk", model={**lacking, "unk_token": "<|eos|>"})
    with pytest.raises(UnsupportedError, match="no token for byte 0x1B and 0 others, which the tokenizer replaces"):
        read_vocab(unk, 3002, {})


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([{"id": 1500}], "wanted an object with content and id"),
        ([{"id": -1, "content": "<x>"}], "token '<x>': wanted an id from 0, got -1"),
        ({"<x>": 1500}, "added_tokens: wanted a list, got dict"),
    ],
)
def test_damaged_added_tokens(added: Any, message: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(trained("GPT-2"), tmp_path / "model", added_tokens=added)
    with pytest.raises(TokenizerError, match=message):
        read_vocab(folder, 2000, {})


def test_contradicting_files(spm: Path, tmp_path: Path) -> None:
    twice = edited(spm, tmp_path / "twice", "added_tokens.json", **{"<s>": 1000})
    with pytest.raises(TokenizerError, match="token '<s>' has both id 1 and id 1000"):
        read_vocab(twice, 1001, {})
    padding = edited(spm, tmp_path / "padding", "added_tokens.json", **{"[PAD1001]": 1000})
    with pytest.raises(TokenizerError, match=r"token '\[PAD1001\]' has both id 1000 and id 1001"):
        read_vocab(padding, 1002, {})
    surrogate = edited(spm, tmp_path / "surrogate", "tokenizer_config.json")
    (surrogate / "added_tokens.json").write_text('{"\\ud800": 1000}', encoding="utf-8")
    with pytest.raises(TokenizerError, match="a token is not valid Unicode: surrogates not allowed"):
        read_vocab(surrogate, 1001, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char", "vocab_size": 500}, "sentencepiece char models are not supported; known: BPE and uni"),
        ({"byte_fallback": False}, r"no byte fallback: \d+ of 256 byte tokens are missing, the first <0x00>"),
        ({"treat_whitespace_as_suffix": True}, "spaces as suffix of words: llama.cpp supports them as prefix only"),
        ({"normalization_rule_name": "nmt_nfkc"}, "character normalization 'nmt_nfkc': llama.cpp does not apply it"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces: llama.cpp does not apply it"),
    ],
)
def test_other_sentencepiece_models_are_refused(
    options: dict[str, Any], message: str, strings: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    train_sentencepiece(folder, strings, **options)
    with pytest.raises(UnsupportedError, match=message):
        read_vocab(folder, 1000, {})
    if "does not apply" in message:
        assert read_vocab(folder, 1000, {}, pre="default")["tokenizer.ggml.pre"].value == "default"


def test_sentencepiece_has_no_pre_tokenizer(spm: Path) -> None:
    with pytest.raises(UnsupportedError, match="has a sentencepiece tokenizer, which has no pre-tokenizer"):
        read_vocab(spm, 1000, {}, pre="qwen2")


def test_converted_models_that_llama_cpp_would_join_differently_are_refused(spm: Path, tmp_path: Path) -> None:
    write_converted_folder(tmp_path / "good", stored(spm))
    merges = json.loads((tmp_path / "good" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    at = next(i for i in range(40, len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))
    left, right = merges[at]
    others = merges[:at] + merges[at + 1 :]
    lacking = edited_model(tmp_path / "good", tmp_path / "lacking", merges=others)
    with pytest.raises(UnsupportedError, match=f"'{left}' '{right}' forms a token, but is not a merge, so llama.cpp"):
        read_vocab(lacking, 1000, {})
    late = edited_model(tmp_path / "good", tmp_path / "late", merges=[*others, merges[at]])
    with pytest.raises(UnsupportedError, match=f"merges of .*'{left}{right}'.* interleave, so llama.cpp"):
        read_vocab(late, 1000, {})
    for name, normalizer in {
        "lowercase": {"type": "Lowercase"},
        "none": {"type": "Sequence", "normalizers": []},
        "prepend": {"type": "Prepend", "prepend": "▁"},
    }.items():
        folder = edited(tmp_path / "good", tmp_path / name, normalizer=normalizer)
        with pytest.raises(UnsupportedError, match=r"add the original tokenizer.model"):
            read_vocab(folder, 1000, {})
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    folder = edited(tmp_path / "good", tmp_path / "words", normalizer=None, pre_tokenizer=words)
    with pytest.raises(UnsupportedError, match="normalizer and pre-tokenizer: Metaspace"):
        read_vocab(folder, 1000, {})


def test_the_documentation_lists_the_table() -> None:
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = {line.split("`")[1]: line for line in lines}
    assert {known.name for known in KNOWN} <= listed.keys()
    for known in KNOWN:
        _, _, _, ignore_merges, limit, alike, _ = listed[known.name].split("|")
        assert ignore_merges.strip() == ("yes" if known.ignore_merges else "no")
        assert bool(limit.strip()) == bool(known.limit)
        assert alike.strip() == ", ".join(known.alike)


# --- the record of tools/check/check_tokenizers.py ------------------------------------------------------------------


def test_the_record_is_of_this_table_and_these_strings() -> None:
    assert RECORD["pre_tokenizers"] == table_digests(), "the table changed: run tools/check/check_tokenizers.py --write"
    checked = {name: kind["alike"] for name, kind in RECORD["kinds"].items() if kind["alike"]}
    assert checked == {known.name: list(known.alike) for known in KNOWN if known.alike}
    assert RECORD["corpus"] == corpus_digest(), "the strings changed: run tools/check/check_tokenizers.py --write"


def test_the_record_shows_no_mismatch_for_any_kind() -> None:
    kinds = RECORD["kinds"]
    assert {"llama-spm", "llama-spm json", "llama-bpe", "qwen2", "gpt-2", "smollm"} <= kinds.keys()
    assert {known.name for known in KNOWN} <= {kind["pre"] for kind in kinds.values()}
    for kind in kinds.values():
        assert kind["mismatches"] == 0
        assert kind["strings"] >= 10_000
        assert kind["wrong_mismatches"] > 0


def test_the_record_shows_llama_cpp_s_own_vectors() -> None:
    """Every vocabulary of llama.cpp that comes with ids for test strings, but those of encoders."""
    with_vectors = {name for name, kind in RECORD["kinds"].items() if kind["vectors"] >= 46}
    bpe = {"llama-bpe", "qwen2", "qwen35", "gpt-2", "smollm", "deepseek-coder", "deepseek-llm", "falcon", "mpt"}
    spm = {"llama-spm", "llama-spm json", "phi-3", "phi-3 json", "gemma-4"}
    assert with_vectors == {*bpe, *spm, "gemma-3", "refact", "command-r"}
