"""Tokenizer files that disagree: ours is what transformers makes of them, and a note counts what differs.

The expected values are what ``AutoTokenizer`` of transformers 5.24 gives for the same folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as binding
import pytest
import sentencepiece
from gguf import TokenType
from tokenizer_oracles import (
    HuggingFace,
    LlamaCpp,
    Stored,
    added_token,
    write_converted_folder,
    write_gguf,
    write_json,
)
from tokenizer_strings import HAND_PICKED

from nsds_gguf.errors import TokenizerError, UnsupportedError
from nsds_gguf.read.tokenizer.vocab import Vocab, open_vocab

EXAMPLES = Path(__file__).parents[1] / "examples"
BOOKS, DEEP = EXAMPLES / "books-4.6m", EXAMPLES / "zoo" / "deep"  # 2048 and 1024 pieces
SPEC = {"content": "", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def stored(folder: Path) -> Stored:
    """Return what sentencepiece itself says of a model's pieces."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(model.vocab_size())
    kinds = (
        (TokenType.UNKNOWN, model.is_unknown),
        (TokenType.CONTROL, model.is_control),
        (TokenType.BYTE, model.is_byte),
    )
    types = [int(next((kind for kind, is_it in kinds if is_it(i)), TokenType.NORMAL)) for i in ids]
    return Stored([model.id_to_piece(i) for i in ids], types, [model.get_score(i) for i in ids], [])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the ``tokenizer.json`` of the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    write_converted_folder(folder, stored(BOOKS))
    return folder


def changed(base: Path, target: Path, files: Mapping[str, Mapping[str, Any]], added: Any = ()) -> Path:
    """Copy a folder with JSON files updated and tokens ``(id, text)`` added to its ``tokenizer.json``."""
    shutil.copytree(base, target)
    for name, content in files.items():
        path = target / name
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, {**old, **content})
    path = target / "tokenizer.json"
    if added:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["added_tokens"] += [added_token(i, text, special=True) for i, text in added]
        write_json(path, content)
    return target


def token(text: str, **flags: bool) -> dict[str, Any]:
    return {**SPEC, "content": text, **flags}


def value(vocab: Vocab, key: str) -> Any:
    return vocab.metadata[f"tokenizer.ggml.{key}"].value


# --- tokenizer.json and tokenizer.model -------------------------------------------------------------------------------


def test_a_stale_tokenizer_model_is_left_aside(converted: Path, tmp_path: Path) -> None:
    folder = changed(converted, tmp_path / "model", {})
    shutil.copy(DEEP / "tokenizer.model", folder)
    vocab = open_vocab(folder, 2048, {})
    assert vocab.notes == (
        "tokenizer.json counts, as in transformers; tokenizer.model beside it is another vocabulary: 69 ids have other "
        "text, as id 955 is '▁', in tokenizer.json '▁ac'; 1024 tokens are missing, as id 1024 'ple'.",
    )
    assert vocab.metadata == open_vocab(converted, 2048, {}).metadata
    texts = ["The old man said: hello there", *HAND_PICKED]
    write_gguf(tmp_path / "v.gguf", vocab.metadata)
    with LlamaCpp(tmp_path / "v.gguf") as llama:
        ids = llama.tokenize(texts, parse_special=True)
    assert ids[0] == [1, 360, 722, 442, 415, 2033, 293, 289, 1983, 472]
    assert ids == HuggingFace(folder).tokenize(texts, parse_special=True)


def test_a_tokenizer_model_that_agrees_counts(converted: Path, tmp_path: Path) -> None:
    folder = changed(converted, tmp_path / "model", {})
    shutil.copy(BOOKS / "tokenizer.model", folder)
    vocab = open_vocab(folder, 2048, {})
    assert vocab.notes == ()
    assert value(vocab, "scores")[3:] == stored(BOOKS).scores[3:]


def test_merges_in_another_order_are_another_vocabulary(converted: Path, tmp_path: Path) -> None:
    folder = changed(converted, tmp_path / "model", {})
    shutil.copy(BOOKS / "tokenizer.model", folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    by_token = list(dict.fromkeys("".join(pair) for pair in merges))
    last = [pair for pair in merges if "".join(pair) == by_token[-1]]
    content["model"]["merges"] = last + [pair for pair in merges if pair not in last]
    write_json(folder / "tokenizer.json", content)
    vocab = open_vocab(folder, 2048, {})
    assert "tokens are joined in another order" in vocab.notes[0]
    assert value(vocab, "scores")[value(vocab, "tokens").index(by_token[-1])] == -1.0


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\n", b"IQ== 0\nIg== 1\n"])
def test_a_tokenizer_model_that_cannot_be_read_is_left_aside(data: bytes, converted: Path, tmp_path: Path) -> None:
    folder = changed(converted, tmp_path / "model", {})
    (folder / "tokenizer.model").write_bytes(data)
    vocab = open_vocab(folder, 2048, {})
    assert vocab.metadata == open_vocab(converted, 2048, {}).metadata
    assert vocab.notes[0].startswith("tokenizer.json counts, as in transformers; tokenizer.model beside it cannot be")


def test_a_list_of_tiktoken_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UnsupportedError, match="a list of tokens for tiktoken, which does not say how text is split"):
        open_vocab(tmp_path, 10, {})


# --- added tokens -----------------------------------------------------------------------------------------------------

DECODER, LIST, CONFIG, MAP = (
    "added_tokens_decoder",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
GENERAL, LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizer"}
X = [(2048, "<x>")]


@pytest.mark.parametrize(
    ("files", "added", "expected"),
    [
        ({CONFIG: {**GENERAL}}, X, {2048: ("<x>", True)}),
        ({CONFIG: {**GENERAL, DECODER: {"2048": token("<y>")}}}, X, {2048: ("<x>", True), 2049: ("<y>", True)}),
        ({CONFIG: {**LLAMA, DECODER: {"2048": token("<y>")}}}, X, {2048: ("<y>", True)}),
        ({CONFIG: {**GENERAL, DECODER: {"2048": token("<x>", special=False)}}}, X, {2048: ("<x>", False)}),
        ({CONFIG: {**LLAMA, DECODER: {"2048": token("<x>", special=False)}}}, X, {2048: ("<x>", False)}),
        ({CONFIG: {**GENERAL, DECODER: {"7": token("<x>")}}}, (), {2048: ("<x>", True)}),
        ({CONFIG: {**LLAMA, DECODER: {"2050": token("<x>")}}}, (), {2048: ("<x>", True)}),
        ({CONFIG: GENERAL}, [(2050, "<x>")], {2048: ("<x>", True)}),
        ({CONFIG: GENERAL}, [(7, "<x>")], {2048: ("<x>", True)}),
        ({CONFIG: GENERAL}, [(2048, "<x>"), (2048, "<y>")], {2048: ("<x>", True), 2049: ("<y>", True)}),
        ({CONFIG: LLAMA}, [(2048, "<x>"), (2048, "<y>")], {2048: ("<y>", True)}),
        ({CONFIG: GENERAL}, [(2048, "<x>"), (2049, "<x>")], {2048: ("<x>", True)}),
        ({CONFIG: GENERAL, LIST: {"<x>": 2048}}, (), {2048: ("<x>", False)}),
        ({CONFIG: GENERAL, LIST: {"<y>": 2048}}, X, {2048: ("<x>", True)}),
        ({CONFIG: LLAMA, LIST: {"<y>": 2049}}, X, {2048: ("<x>", True), 2049: ("<y>", False)}),
        ({CONFIG: {**LLAMA, DECODER: {"2048": token("<x>")}}, LIST: {"<y>": 2048}}, (), {2048: ("<x>", True)}),
        ({CONFIG: {**GENERAL, "pad_token": "<pad>"}}, (), {2048: ("<pad>", True)}),
        ({CONFIG: GENERAL, MAP: {"pad_token": "<pad>"}}, (), {2048: ("<pad>", True)}),
        ({CONFIG: {**GENERAL, "extra_special_tokens": ["<x>"]}}, (), {2048: ("<x>", True)}),
        ({CONFIG: {**GENERAL, "extra_special_tokens": {"x_token": "<x>"}}}, (), {2048: ("<x>", True)}),
        ({CONFIG: {**GENERAL, "image_token": "<x>"}}, (), {2048: ("<x>", True)}),
    ],
)
def test_added_tokens_are_those_of_transformers(
    files: Mapping[str, Any], added: Any, expected: Mapping[int, tuple[str, bool]], converted: Path, tmp_path: Path
) -> None:
    vocab = open_vocab(changed(converted, tmp_path / "model", files, added), 2052, {})
    tokens, types = value(vocab, "tokens"), value(vocab, "token_type")
    kinds = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    assert {i: (tokens[i], kinds[types[i]]) for i in range(3, 2052) if types[i] in kinds} == expected


@pytest.mark.parametrize(
    ("files", "added", "note"),
    [
        ({LIST: {"<x>": 2048}}, X, ""),
        (
            {CONFIG: {DECODER: {"2049": token("<x>"), "2048": token("<y>")}}},
            X,
            "tokenizer_config.json disagrees with the tokenizer that transformers builds from the files about 2 added "
            "tokens: for example, it lists '<y>' as special with id 2048, which has id 2049. "
            "The GGUF follows transformers.",
        ),
        (
            {CONFIG: {DECODER: {"2048": token("<x>", special=False)}}},
            X,
            "tokenizer.json disagrees with the tokenizer that transformers builds from the files about 1 added token: "
            "for example, it lists '<x>' as special with id 2048, which is not special. "
            "The GGUF follows transformers.",
        ),
        (
            {MAP: {"eos_token": "<s>"}},
            (),
            "tokenizer_config.json and special_tokens_map.json name different tokens for 1 role: eos_token is '</s>' "
            "in the first, '<s>' in the second. special_tokens_map.json counts, as in transformers.",
        ),
    ],
)
def test_notes_count_what_differs(files: Any, added: Any, note: str, converted: Path, tmp_path: Path) -> None:
    vocab = open_vocab(changed(converted, tmp_path / "model", files, added), 2052, {})
    about = [text for text in vocab.notes if "special tokens that no chat template" not in text]
    assert [text for text in about if "special token that no chat template" not in text] == ([note] if note else [])


@pytest.mark.parametrize(("has_decoder", "eos"), [(False, 1), (True, 2)])
def test_special_tokens_map_counts_without_added_tokens_decoder(
    has_decoder: bool, eos: int, converted: Path, tmp_path: Path
) -> None:
    config = {DECODER: {"2": token("</s>")}} if has_decoder else {}
    folder = changed(converted, tmp_path / "model", {CONFIG: config, MAP: {"eos_token": "<s>"}})
    assert value(open_vocab(folder, 2048, {}), "eos_token_id") == eos


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({**LLAMA, "add_prefix_space": False}, False),
        ({**LLAMA, "add_prefix_space": None}, True),
        ({**GENERAL, "add_prefix_space": False}, True),
        ({"tokenizer_class": "GemmaTokenizer"}, False),
    ],
)
def test_the_class_says_whether_a_blank_comes_first(
    config: dict[str, Any], prefix: bool, converted: Path, tmp_path: Path
) -> None:
    vocab = open_vocab(changed(converted, tmp_path / "model", {CONFIG: config}), 2048, {})
    assert value(vocab, "add_space_prefix") is prefix
    assert len(vocab.notes) == (not prefix)


# --- ends of generation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "ends", "found", "noted"),
    [
        ((), [2], {2}, ()),
        (("<|im_end|>", "<|eot_id|>"), [2, 2048, 2049], {2, 2048, 2049}, ()),
        (("<stop>",), [2048, 2], {2, 2048}, ()),
        (("<stop>", "<halt>"), [2048, 2049], {2, 2048, 2049}, ()),
        (("<|im_end|>", "<stop>", "<halt>"), [2049, 2050], {2, 2048, 2049, 2050}, ()),
        (("<stop>", "<halt>", "<quit>"), [2048, 2049, 2050], {2, 2048, 2049}, ("'<quit>' (id 2050)",)),
        (("<|end|>", "<|return|>", "<|call|>"), [2048], {2, 2049, 2050}, ("'<|end|>' (id 2048)",)),
    ],
)
def test_all_ends_end_generation(
    texts: tuple[str, ...], ends: list[int], found: set[int], noted: tuple[str, ...], converted: Path, tmp_path: Path
) -> None:
    files = {"generation_config.json": {"eos_token_id": ends}}
    folder = changed(converted, tmp_path / "model", files, list(enumerate(texts, 2048)))
    vocab = open_vocab(folder, 2052, {"eos_token_id": 77})
    write_gguf(tmp_path / "v.gguf", vocab.metadata)
    with LlamaCpp(tmp_path / "v.gguf") as llama:
        assert {i for i in range(2052) if binding.llama_vocab_is_eog(llama.vocab, i)} == found
    about = [note for note in vocab.notes if "does not end its answer" in note]
    assert len(about) == len(noted)
    assert all(text in note for note, text in zip(about, noted, strict=True))


# --- tokens that llama.cpp does not print -----------------------------------------------------------------------------


def test_special_tokens_that_no_template_uses_are_noted(converted: Path, tmp_path: Path) -> None:
    texts = ["<custom_token_0>", "<custom_token_1>", "<|user|>", "<|reserved_special_token_1|>", "<unused7>", "<tpl>"]
    files = {CONFIG: {"chat_template": "<tpl>{{ messages }}"}}
    folder = changed(converted, tmp_path / "model", files, list(enumerate(texts, 2048)))
    (note,) = open_vocab(folder, 2060, {}).notes
    assert note.startswith(
        "llama.cpp hides 2 special tokens that no chat template uses, such as '<custom_token_0>' (id 2048): it prints"
    )
    assert "--special" in note


def test_a_broken_tokenizer_config_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = changed(converted, tmp_path / "model", {})
    (folder / CONFIG).write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: not JSON"):
        open_vocab(folder, 2048, {})


@pytest.mark.parametrize("ids", [[{}], [True], [99999]])
def test_a_post_processor_without_a_token_is_refused(ids: list[Any], converted: Path, tmp_path: Path) -> None:
    folder = changed(converted, tmp_path / "model", {})
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = ids
    write_json(folder / "tokenizer.json", content)
    with pytest.raises(
        TokenizerError, match=r"adds id .*, which is not a token with a row|wanted a token id, got (\{\}|True)"
    ):
        open_vocab(folder, 2048, {})
