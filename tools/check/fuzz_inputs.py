"""What is fuzzed: small inputs of every kind, how each is mutated, and what the program does with it.

An input goes through what a user's would before any weight is quantized: opened, told its targets, its chat template
understood, its header written and read back. ``convert`` takes those that are accepted the whole way.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_mutations import (
    GgufParts,
    mutate_bytes,
    mutate_gguf,
    mutate_json,
    mutate_proto,
    mutate_safetensors,
    mutate_template,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the models of the tests themselves

import tiny_archs
import tiny_gguf
import tokenizer_oracles as oracles
import zoo_specs
from chat_templates import FAMILIES, source
from tiny_models import SPECS, safetensors_bytes, tiny_config, tiny_weights, write_tiny

from nsds_gguf import allocate, read, records
from nsds_gguf import conversion as pipeline
from nsds_gguf.calibration import imatrix
from nsds_gguf.errors import UnsupportedError
from nsds_gguf.evaluate import inspect
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.publish import bundle, model_card, modelfile
from nsds_gguf.publish.chat import ChatTemplate, conversation, find_format
from nsds_gguf.quantize.header import header_bytes, write_outline
from nsds_gguf.records import Model, Options, Plan, Scores
from nsds_gguf.session import loaded, outputs
from nsds_gguf.session.original import PLAIN, original_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.settle import settle
from nsds_gguf.session.source import Source

SMALL = replace(SPECS["llama"], n_layers=1, n_embd=32, n_ff=32, n_heads=2, n_kv_heads=1, dtype="F16")
UNIFORM = Options(uniform="Q8_0", calibration="none")
BUDGET = Options(target_bpw=12.0, rounding="rtn")


@dataclass(frozen=True)
class Fuzzed:
    """One file that is mutated, in a folder that is otherwise whole.

    Attributes:
        kind: what it is, for counting.
        file: where a mutated input is written.
        mutate: gives one.
        use: does with it what the program does; raises ``NsdsError`` where it is refused.
        model: what ``convert`` is given when the input was accepted; ``None`` for what is no model.
        options: what ``convert`` is asked for when the file is an importance matrix; ``None`` for anything else.
        load: the record that ``convert`` is given, read from the file.

    """

    kind: str
    file: Path
    mutate: Callable[[Random], bytes]
    use: Callable[[], None]
    model: Path | None = None
    options: Options | None = None
    load: Callable[[], Scores | Plan | None] = lambda: None


# How often each kind comes up.
WEIGHTS = {
    "safetensors header": 10, "safetensors index": 5, "GGUF header": 14, "imatrix.gguf": 4, "imatrix.dat": 4,
    "config.json": 18, "tokenizer.json": 14, "tokenizer side files": 10, "tokenizer.model": 8, "plan record": 4,
    "scores record": 4, "chat template": 3, "embedding settings": 1, "README.md": 1,
}  # fmt: skip


def make_inputs(folder: Path, out: Path) -> dict[str, list[Fuzzed]]:
    """Write whole inputs below ``folder`` and return what is mutated in them, by kind.

    ``out`` is where headers are written, in a folder that is otherwise empty.
    """
    makers = (_safetensors, _ggufs, _configs, _tokenizers, _imatrices, _records, _templates, _others)
    found: dict[str, list[Fuzzed]] = {kind: [] for kind in WEIGHTS}
    for make in makers:
        for fuzzed in make(folder, out):
            found[fuzzed.kind].append(fuzzed)
    return found


def use_model(path: Path, out: Path) -> None:
    """Do with a model all that comes before its weights are quantized."""
    model = read.open_model(path, None, allow_requantize=True)
    try:
        for options in (UNIFORM, Options(target_bpw=12.0)):
            recipe = settle(options, model).recipe
            allocate.checked_candidates(model, recipe, header_bytes(model, recipe))
    finally:
        _use_keys(model, out)
    original_plan(model)
    outputs.default_name(model, PLAIN)
    _ = model.name, model.n_weights


def _use_keys(model: Model, out: Path) -> None:
    """Write the keys, read them back, and say what other programs are told of them."""
    write_outline(model, out)
    try:
        metadata = read_gguf_header(out).metadata
        if len(metadata) < len(model.metadata):
            raise AssertionError(f"{len(model.metadata)} keys were written, {len(metadata)} are read back")
    finally:
        out.unlink()
    _use_metadata(metadata, out)


def _use_metadata(metadata: Mapping[str, Any], out: Path) -> None:
    chat, notes = bundle._chat_and_notes(metadata)
    modelfile.modelfile("model.gguf", metadata, chat, notes)
    model_card.find_origin(metadata)


def convert(fuzzed: Fuzzed, folder: Path, verify: bool) -> None:
    """Convert an accepted input whole; raises ``NsdsError`` where that is refused."""
    pipeline.convert(
        Source(fuzzed.model or fuzzed.file, allow_requantize=True),
        fuzzed.options or (UNIFORM if verify else BUDGET),
        output=folder,
        verifying=VerifyOptions(n_ctx=32, n_chunks=1, enabled=verify),
        loaded=fuzzed.load(),
        run=Run(1),
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def _safetensors(folder: Path, out: Path) -> list[Fuzzed]:
    single = write_tiny(folder / "safetensors", SMALL)
    file = single / "model.safetensors"
    data = file.read_bytes()
    found = [_of_model("safetensors header", single, file, lambda rng: mutate_safetensors(rng, data), out)]
    shards = write_tiny(folder / "shards", replace(SMALL, n_shards=3))
    index = shards / "model.safetensors.index.json"
    return [*found, _json_file("safetensors index", shards, index, out, ())]


def _of_model(kind: str, model: Path, file: Path, mutate: Callable[[Random], bytes], out: Path) -> Fuzzed:
    return Fuzzed(kind, file, mutate, lambda: use_model(model, out), model)


def _json_file(
    kind: str, model: Path, file: Path, out: Path, known: tuple[tuple[str, Any], ...], value: Any = None
) -> Fuzzed:
    whole = json.loads(file.read_text(encoding="utf-8")) if value is None else value
    return _of_model(kind, model, file, lambda rng: mutate_json(rng, whole, known), out)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_parts(path: Path) -> GgufParts:
    """Take a GGUF apart."""
    header = read_gguf_header(path)
    keys: list[tuple[str, int, Any]] = []
    for name, entry in header.metadata.items():
        value = (int(entry.sub_type), entry.value) if entry.sub_type is not None else entry.value
        keys.append((name, int(entry.type), value))
    from gguf import GGMLQuantizationType

    tensors = [
        (
            tensor.name,
            list(reversed(tensor.shape)),
            int(GGMLQuantizationType[tensor.type]),
            tensor.offset - header.n_bytes,
        )
        for tensor in header.tensors
    ]
    return GgufParts(keys, tensors, path.read_bytes()[header.n_bytes :])


def _ggufs(folder: Path, out: Path) -> list[Fuzzed]:
    folder = folder / "ggufs"
    folder.mkdir()
    chat = json.dumps("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    paths = [
        tiny_gguf.write_tiny_gguf(folder / "f32.gguf"),
        tiny_gguf.write_tiny_gguf(folder / "q8.gguf", "Q8_0"),
        *(tiny_archs.write_tiny_arch(folder / f"{name}.gguf", name) for name in ("mamba", "starcoder2", "deepseek2")),
    ]
    found = []
    for path in paths:
        parts = gguf_parts(path)
        parts.keys.append(("tokenizer.chat_template", 8, json.loads(chat)))
        target = folder / path.stem / "model.gguf"
        target.parent.mkdir()

        def use(target: Path = target) -> None:
            inspect.inspect_gguf(target).to_json()
            use_model(target, out)

        found.append(
            Fuzzed("GGUF header", target, lambda rng, parts=parts: mutate_gguf(rng, parts), use, target)  # type: ignore[misc]
        )
    return found


# --- config.json ------------------------------------------------------------------------------------------------------


def _configs(folder: Path, out: Path) -> list[Fuzzed]:
    names: dict[str, str] = {}
    for name, spec in zoo_specs.SPECS.items():
        names.setdefault(spec.source_class, name)
        if "yarn" in name or "longrope" in name or "llama3" in name or "linear" in name:
            names.setdefault(f"{spec.source_class} {name}", name)
    chosen = [name for key, name in names.items() if " " not in key or key.startswith(("Llama", "Phi3", "Deepseek"))]
    known = tuple(
        item for name in chosen for item in sorted(zoo_specs.zoo_config(name).items()) if item[0] != "architectures"
    )
    found = []
    for name in chosen:
        model = zoo_specs.write_spec(folder / "configs" / name, name)
        found.append(_json_file("config.json", model, model / "config.json", out, known))
    return found


# --- tokenizers -------------------------------------------------------------------------------------------------------


def pieces() -> oracles.Stored:
    """Return a vocabulary of special tokens, bytes, letters and a few words, as sentencepiece has it."""
    words = ["▁", "t", "h", "e", "a", "n", "▁t", "he", "▁the", "an"]
    tokens = [*tiny_gguf.SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    return oracles.Stored(tokens, types, [0.0] * 259 + [-float(i) for i in range(len(words))], [])


_SIDE_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "unk_token": "<unk>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "additional_special_tokens": ["<s>"], "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        "model_max_length": 512, "tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]},
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<extra>": 269, "<more>": 270},
    "generation_config.json": {
        "bos_token_id": 1, "eos_token_id": [2, 0], "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1, "do_sample": True,
    },
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
}  # fmt: skip


def _tokenizers(folder: Path, out: Path) -> list[Fuzzed]:
    found = []
    stored = pieces()
    bytewise = write_tiny(folder / "byte-level", SMALL)
    converted = write_tiny(folder / "converted", SMALL)
    oracles.write_converted_folder(converted, stored)
    unigram = write_tiny(folder / "unigram", SMALL)
    oracles.write_json(unigram / "tokenizer.json", unigram_json(stored))
    oracles.write_json(unigram / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    whole = [json.loads((model / "tokenizer.json").read_text("utf-8")) for model in (bytewise, converted, unigram)]
    known = tuple(item for tokenizer in whole for item in tokenizer.items())
    for model, value in zip((bytewise, converted, unigram), whole, strict=True):
        found.append(_json_file("tokenizer.json", model, model / "tokenizer.json", out, known, value))
    for name, value in _SIDE_FILES.items():
        for base in ("bpe", "json"):
            model = write_tiny(folder / f"side-{base}-{name}", SMALL)
            (oracles.write_sentencepiece_folder if base == "bpe" else oracles.write_converted_folder)(model, stored)
            if base == "bpe":
                (model / "tokenizer.json").unlink()
                oracles.write_json(model / "tokenizer_config.json", {"eos_token": "</s>"})
            found.append(_json_file("tokenizer side files", model, model / name, out, (), value))
    for name, algorithm in (("bpe", 2), ("unigram", 1)):
        model = write_tiny(folder / f"proto-{name}", SMALL)
        (model / "tokenizer.json").unlink()
        oracles.write_sentencepiece_folder(model, stored)
        oracles.write_json(model / "tokenizer_config.json", {"eos_token": "</s>"})
        data = (model / "tokenizer.model").read_bytes()
        if algorithm == 1:
            data += oracles._message(2, oracles._number(3, 1) + oracles._number(35, 0))
        found.append(_of_model("tokenizer.model", model, model / "tokenizer.model",
                               lambda rng, data=data: mutate_proto(rng, data), out))  # type: ignore[misc]  # fmt: skip
    return found


def unigram_json(stored: oracles.Stored) -> dict[str, Any]:
    """Return a unigram model as a ``tokenizer.json``."""
    return {
        "added_tokens": [oracles.added_token(i, text, special=True) for i, text in enumerate(tiny_gguf.SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": oracles.bos_template("<s>", 1),
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                  "vocab": [[text, score] for text, score in zip(stored.tokens, stored.scores, strict=True)]},
    }  # fmt: skip


# --- importance matrices and records ----------------------------------------------------------------------------------


def _imatrices(folder: Path, out: Path) -> list[Fuzzed]:
    path = write_tiny(folder / "measured", SMALL)
    model = read.open_model(path)
    matrices = [tensor for tensor in model.tensors if tensor.is_matrix]
    folder = folder / "imatrices"
    folder.mkdir()
    legacy = struct.pack("<i", len(matrices))
    writer_parts = GgufParts([("general.type", 8, "imatrix"), ("imatrix.chunk_count", 4, 3),
                              ("imatrix.datasets", 9, (8, ["text"]))], [], b"")  # fmt: skip
    for tensor in matrices:
        sums = np.arange(1, tensor.n_cols + 1, dtype="<f4")
        legacy += struct.pack("<i", len(tensor.name)) + tensor.name.encode()
        legacy += struct.pack("<ii", 4, tensor.n_cols) + sums.tobytes()
        for suffix, array in ((".in_sum2", sums), (".counts", np.full(8, 4, "<f4"))):
            sizes = [tensor.n_cols, 1] if suffix == ".in_sum2" else [1, 1]
            writer_parts.tensors.append((tensor.name + suffix, sizes, 0, len(writer_parts.data)))
            writer_parts.data += array.tobytes()
    legacy += struct.pack("<ii", 3, 4) + b"text"

    def use(file: Path) -> None:
        read_in = imatrix.read_imatrix(file)
        weights = read_in.weights(model)
        read_in.note(model)
        if any(not np.isfinite(columns).all() for columns in weights.values()):
            raise AssertionError("weights that are not finite were let in")

    def fuzzed(kind: str, name: str, mutate: Callable[[Random], bytes]) -> Fuzzed:
        file = folder / name / name
        file.parent.mkdir()
        return Fuzzed(kind, file, mutate, lambda: use(file), path, replace(BUDGET, imatrix=file))

    return [
        fuzzed("imatrix.dat", "imatrix.dat", lambda rng: mutate_bytes(rng, legacy)),
        fuzzed("imatrix.gguf", "imatrix.gguf", lambda rng: mutate_gguf(rng, writer_parts)),
    ]


def _records(folder: Path, out: Path) -> list[Fuzzed]:
    path = write_tiny(folder / "planned", replace(SMALL, n_embd=256, n_ff=256, n_heads=8, n_layers=2))
    scores = pipeline.score(path, BUDGET, run=Run(1))
    options = Options(target_bpw=6.0)
    plan = pipeline.plan(path, options, loaded=scores, run=Run(1)).plans[0]
    model = read.open_model(path)
    folder = folder / "records"
    folder.mkdir()

    def use_plan(file: Path) -> None:
        found = Plan.from_json(records.read_json(file), str(file))
        _ = found.digest, found.bpw if found.tensors and found.n_weights else 0, found.file_bytes
        checked = loaded.checked_plan(model, found)
        _ = checked.digest, checked.bpw, checked.unused_bytes, checked.predicted_divergence, checked.to_json()
        outputs.default_name(model, checked.recipe)

    def use_scores(file: Path) -> None:
        found = Scores.from_json(records.read_json(file), str(file))
        _ = found.digest
        loaded.check_scores(model, found)
        recipe = settle(options, model, found).recipe
        allocate.make_plan(model, found, recipe, header_bytes(model, recipe))

    def fuzzed(kind: str, name: str, record: Plan | Scores, use: Callable[[Path], None], load: Any) -> Fuzzed:
        file = folder / name / name
        file.parent.mkdir()
        value = json.loads(json.dumps(record.to_json()))
        return Fuzzed(kind, file, lambda rng: mutate_json(rng, value), lambda: use(file), path,
                      load=lambda: load(records.read_json(file)))  # fmt: skip

    return [
        fuzzed("plan record", "plan.json", plan, use_plan, Plan.from_json),
        fuzzed("scores record", "scores.json", scores, use_scores, Scores.from_json),
    ]


# --- the rest ---------------------------------------------------------------------------------------------------------


def _templates(folder: Path, out: Path) -> list[Fuzzed]:
    model = write_tiny(folder / "templates", SMALL)
    file = model / "chat_template.jinja"
    sources = [source(name) for name in FAMILIES]
    sources = [text for text in sources if len(text) < 6000]

    def use() -> None:
        text = file.read_bytes().decode(errors="replace")
        use_model(model, out)
        try:
            modelfile.go_template(find_format(text, "<s>", "</s>"))
        except UnsupportedError:
            ChatTemplate(text, "<s>", "</s>").render(conversation("a", "b", "c"))

    return [Fuzzed("chat template", file, lambda rng: mutate_template(rng, rng.choice(sources)), use, model)]


_README = """---
license: apache-2.0
language: [en, de]
base_model: org/base
tags: &tags [a, b]
datasets: *tags
model-index:
- name: x
---
# A model
"""


def _others(folder: Path, out: Path) -> list[Fuzzed]:
    found = []
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
               "pooling_mode_lasttoken": False, "include_prompt": True}  # fmt: skip
    small = replace(SPECS["qwen3"], n_layers=1, n_embd=32, n_ff=32, n_heads=2, n_kv_heads=1, head_dim=16, dtype="F16")
    for name, value in (("modules.json", modules), ("1_Pooling/config.json", pooling)):
        model = write_tiny(folder / f"embedding-{name.replace('/', '-')}", small)
        oracles.write_json(model / "modules.json", modules)
        oracles.write_json(model / "1_Pooling" / "config.json", pooling)
        found.append(_json_file("embedding settings", model, model / name, out, (), value))
    model = write_tiny(folder / "card", SMALL)
    readme = _README.encode()
    return [*found, _of_model("README.md", model, model / "README.md", lambda rng: mutate_bytes(rng, readme, 6), out)]


__all__ = ["WEIGHTS", "Fuzzed", "convert", "make_inputs", "safetensors_bytes", "tiny_config", "tiny_weights"]
