"""GGUF input: the same numbers as from the folder, any architecture, split files, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import PLAIN, QUICK, call, message
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from llama_quantize import assert_same_bytes, llama_quantize
from tiny_archs import ARCHITECTURES, write_tiny_arch
from tiny_gguf import add_vocabulary, tiny_text, tiny_vocabulary, tiny_weights, write_tiny_gguf
from tiny_models import Spec, write_tiny

from nsds_gguf import read
from nsds_gguf.conversion import convert, plan, score
from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.read.gguf_source import LEFT_OUT, open_gguf
from nsds_gguf.records import COPIED_TYPES, Options, Plan, role_and_layer
from nsds_gguf.session.original import fast_plan
from nsds_gguf.session.run import Run
from nsds_gguf.session.source import Source

NO_CHECK = VerifyOptions(enabled=False)
WIDE = {"n_embd": 256, "n_ff": 256}  # rows fit K-quants


def uniform(name):
    return Options(uniform=name, calibration="none")


def converted(source, path, options, **settings):
    """Convert without the check by perplexity and return the path."""
    convert(source, options, verifying=NO_CHECK, output=path, run=Run(1), **settings)
    return path


def tensor_bytes(path):
    """Return type, shape and bytes of every tensor, read by gguf's reader."""
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in GGUFReader(path).tensors}


def written(path, arrays, architecture="llama", keys=(), types=None, **options):
    """Write a GGUF of arrays; ``keys`` are called with the writer, ``types`` are by name, F32 unless told."""
    writer = GGUFWriter(path, architecture, **options)
    for add in keys:
        add(writer)
    for name, array in arrays.items():
        kind = GGMLQuantizationType[(types or {}).get(name, "F32")]
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working directory that holds ``tiny.gguf``, and a text for it."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.txt").write_text(tiny_text(), encoding="utf-8")
    return tmp_path


def split_tiny(folder):
    """Write the tiny model as one file and split into three parts, and return the paths."""
    header = read_gguf_header(write_tiny_gguf(folder / "unnamed.gguf"))

    def keys(writer):
        writer.kv_data[0] = dict(header.metadata)
        writer.add_name("Tiny")

    whole = written(folder / "whole.gguf", tiny_weights(), keys=[keys])
    written(folder / "part.gguf", tiny_weights(), keys=[keys], split_max_tensors=7)
    parts = sorted(folder.glob("part-*.gguf"))
    assert [part.name for part in parts] == [f"part-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    return whole, parts


# --- the same model from a folder and from its GGUF ------------------------------------------------------------------

FOLDERS = {
    "llama": Spec("LlamaForCausalLM", **WIDE),  # its q and k are permuted in the GGUF
    "llama-tied-bf16": Spec("LlamaForCausalLM", tied=True, dtype="BF16", n_kv_heads=1, **WIDE),
    "qwen2": Spec("Qwen2ForCausalLM", dtype="F16", **WIDE),
    "qwen3": Spec("Qwen3ForCausalLM", head_dim=32, **WIDE),
}


@pytest.fixture(params=FOLDERS)
def pair(request, tmp_path):
    """A folder and the F32 GGUF of it."""
    folder = write_tiny(tmp_path / "model", FOLDERS[request.param])
    return folder, converted(folder, tmp_path / "model.gguf", uniform("F32"))


def test_scores_of_folder_and_gguf_agree(pair):
    of_folder, of_gguf = (score(path, Options(rounding="rtn"), run=Run(1)) for path in pair)
    assert len(of_folder.layers) == len(of_gguf.layers) == 2
    for first, second in zip(of_folder.layers, of_gguf.layers, strict=True):
        assert first.score == pytest.approx(second.score, rel=1e-6)
        assert first.nv.keys() >= {"qk", "ov", "gate", "up", "down"}
        assert first.nv == pytest.approx(second.nv, rel=1e-6) and first.se == pytest.approx(second.se, rel=1e-6)
    assert [cost.name for cost in of_folder.costs] == [cost.name for cost in of_gguf.costs] != []
    for first, second in zip(of_folder.costs, of_gguf.costs, strict=True):
        assert first.sensitivity == pytest.approx(second.sensitivity, rel=1e-6)
        assert first.errors == pytest.approx(second.errors, rel=1e-6)


def test_folder_and_gguf_become_the_same_bytes(pair, tmp_path):
    options = Options(target_bpw=4.5, rounding="rtn")
    files = [converted(path, tmp_path / f"{i}.gguf", options) for i, path in enumerate(pair)]
    first, second = map(tensor_bytes, files)
    assert first == second and len({kind for kind, _, _ in first.values()}) > 2
    keys = [
        {key: entry for key, entry in read_gguf_header(file).metadata.items() if not key.startswith("nsds_gguf.")}
        for file in files
    ]
    assert keys[0] == keys[1]


def test_hparams_do_not_depend_on_the_source(pair):
    of_folder, of_gguf = map(read.open_model, pair)
    assert of_folder.hparams == of_gguf.hparams
    assert [(t.name, t.role, t.layer, t.shape) for t in of_folder.tensors] == [
        (t.name, t.role, t.layer, t.shape) for t in of_gguf.tensors
    ]


# --- stored types ----------------------------------------------------------------------------------------------------


def random_blocks(name, n_rows, n_blocks):
    """Return rows of any bytes below 0x7C: no half, quarter or power-of-two scale is infinite then."""
    n_bytes = ggml.block(name)[1]
    return np.random.default_rng(3).integers(0, 0x7C, (n_rows, n_blocks * n_bytes), dtype=np.uint8)


def q1_0_weights(data):
    """Return the weights of blocks of a half-precision scale and 128 signs, lowest bit first (gguf cannot)."""
    blocks = data.reshape(len(data), -1, 18)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    signs = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32) * 2 - 1
    return (scale * signs).reshape(len(data), -1)


@pytest.mark.parametrize("name", [name for name in ggml.READ_TYPES if name not in ("F32", "Q2_0")])
def test_every_type_is_read_as_gguf_reads_it(name, tmp_path):
    data = random_blocks(name, 6, 4)
    n_cols = 4 * ggml.block(name)[0]
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = open_gguf(path, allow_requantize=True).tensors
    wanted = q1_0_weights(data) if name == "Q1_0" else dequantize(data, GGMLQuantizationType[name])
    assert (tensor.dtype, tensor.shape) == (name, (6, n_cols))
    np.testing.assert_allclose(tensor.load(), wanted, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(tensor.rows(slice(2, 4)), tensor.load()[2:4])


def test_q8_0_input_is_read_back_exactly(tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    again = converted(source, tmp_path / "again.gguf", uniform("Q8_0"))
    assert tensor_bytes(again) == tensor_bytes(source)


def test_rows_are_the_callers_own(tiny):
    tensor = read.open_model(Path("tiny.gguf")).by_name["output.weight"]
    rows = tensor.rows(slice(0, 2))
    rows[:] = 0
    np.testing.assert_array_equal(tensor.rows(slice(0, 2)), tiny_weights()["output.weight"][:2])


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0"])
def test_weights_that_are_not_finite(type_name, tmp_path):
    array = np.ones((4, 32), dtype=np.float32)
    path = written(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": array}, types={"blk.0.ffn_up.weight": type_name})
    data = bytearray(path.read_bytes())
    offset = read_gguf_header(path).tensors[0].offset
    bad, counts = {
        "F32": (np.float32([np.nan, np.inf]).tobytes(), "1 NaN and 1 infinite"),
        "F16": (np.float16([np.nan, np.inf]).tobytes(), "1 NaN and 1 infinite"),
        "BF16": (bytes([0xC0, 0x7F, 0x80, 0x7F]), "1 NaN and 1 infinite"),
        "Q8_0": (np.float16([np.nan]).tobytes(), "32 NaN and 0 infinite"),
    }[type_name]
    data[offset : offset + len(bad)] = bad
    path.write_bytes(data)
    tensor = open_gguf(path).tensors[0]
    with pytest.raises(ModelError, match=rf"tensor blk\.0\.ffn_up\.weight: {counts} of 128 weights; wanted finite"):
        tensor.rows(slice(0, 1))
    assert tensor.rows(slice(1, 4)).shape == (3, 32)


def test_a_file_that_shrinks_after_it_was_opened(tiny):
    tensor = read.open_model(Path("tiny.gguf")).by_name["output.weight"]
    os.truncate("tiny.gguf", 5000)
    with pytest.raises(ModelError, match=r"tensor output\.weight can no longer be read"):
        tensor.rows(slice(0, 1))


# --- keys ------------------------------------------------------------------------------------------------------------


def odd_keys(writer):
    """Add keys of every type, an array without items, a token that is no UTF-8, and keys that must go."""
    kinds = GGUFValueType
    for i, kind in enumerate(k for k in kinds if k not in (kinds.ARRAY, kinds.STRING, kinds.BOOL)):
        value = 0.1 if "FLOAT" in kind.name else 3 + i
        writer.add_key_value(f"odd.{kind.name.lower()}", value, kind)
        writer.add_key_value(f"odd.list_{kind.name.lower()}", [value, value], kinds.ARRAY, sub_type=kind)
    writer.add_bool("odd.yes", True)
    writer.add_key_value("odd.flags", [True, False], kinds.ARRAY, sub_type=kinds.BOOL)
    writer.add_string("odd.text", "naïve\n<|im_end|>")
    writer.add_string("odd.empty_text", "")
    writer.add_string("general.type", "model")
    for key in ("general.file_type", "general.quantization_version"):
        writer.add_uint32(key, 1)
    writer.add_custom_alignment(64)
    writer.add_string("quantize.imatrix.file", "x.dat")
    writer.add_string("nsds_gguf.allocator", "old")


def test_keys_are_carried_over_with_their_types(tmp_path):
    source = written(
        tmp_path / "in.gguf", tiny_weights(), keys=[odd_keys, lambda w: add_vocabulary(w, tiny_vocabulary())]
    )
    data = source.read_bytes()
    spot = data.index(b"<0x41>")  # a token of invalid UTF-8, and an array without items in place of one with one
    source.write_bytes(data[:spot] + b"\xff\xfe\x80abc" + data[spot + 6 :])
    before = read_gguf_header(source).metadata
    after = read_gguf_header(converted(source, tmp_path / "out.gguf", uniform("Q8_0"))).metadata
    kept = {key: entry for key, entry in before.items() if not key.startswith(LEFT_OUT)}
    assert len(before) - len(kept) == 5 and len(kept) > 30
    for key, entry in kept.items():
        assert (after[key].type, after[key].sub_type, after[key].value) == (entry.type, entry.sub_type, entry.value)
    assert set(after) - set(kept) == {key for key in after if key.startswith("nsds_gguf.")} | {
        "general.file_type",
        "general.quantization_version",
    }
    assert after["nsds_gguf.allocator"].value == "uniform" and after["general.file_type"].value == 7
    assert list(kept) == list(after)[: len(kept)]
    assert b"\xff\xfe\x80abc" in (tmp_path / "out.gguf").read_bytes()


def test_an_array_without_items_is_carried_over(tmp_path):
    source = written(tmp_path / "in.gguf", {"output.weight": np.ones((2, 32), "f4")})
    entry = b"\x05\0\0\0\0\0\0\0empty" + b"\x09\0\0\0\x08\0\0\0" + bytes(8)  # name, array of strings, no items
    data = bytearray(source.read_bytes())
    n_keys = int.from_bytes(data[16:24], "little")
    data[16:24] = (n_keys + 1).to_bytes(8, "little")
    start = read_gguf_header(source).n_bytes
    (line,) = re.finditer(rb"\x0d\0{7}output\.weight", bytes(data))
    grown = bytes(data[: line.start()]) + entry + bytes(data[line.start() : start]).rstrip(b"\0") + bytes(8)
    grown = grown[: line.start() + len(entry) + 8 + 13 + 4 + 16 + 4 + 8]
    source.write_bytes(grown + bytes(-len(grown) % 32) + bytes(data[start:]))
    after = read_gguf_header(converted(source, tmp_path / "out.gguf", uniform("Q8_0"))).metadata["empty"]
    assert (after.type, after.sub_type, after.value) == (GGUFValueType.ARRAY, GGUFValueType.STRING, [])


def test_pre_tokenizer_can_be_replaced(tiny):
    model = read.open_model(Path("tiny.gguf"), "llama-bpe")
    assert model.metadata["tokenizer.ggml.pre"].value == "llama-bpe"


def test_a_file_without_a_name_is_called_by_its_own(tiny):
    assert read.open_model(Path("tiny.gguf")).name == "tiny"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../../x", "x-v1.0-Q8_0.gguf"),
        ("a\\b:c*?", "a-b-c-v1.0-Q8_0.gguf"),
        ("a\0\x1b[2J", "a��[2J-v1.0-Q8_0.gguf"),
        ("..", "ggml-model-v1.0-Q8_0.gguf"),
        ("", "in-v1.0-Q8_0.gguf"),
        ("n" * 300, f"{'n' * 96}-v1.0-Q8_0.gguf"),
    ],
)
def test_names_in_a_file_cannot_lead_elsewhere(name, file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def keys(writer):
        writer.add_name(name)
        writer.add_array("general.finetune", ["../x"])

    written(Path("in.gguf"), {"output.weight": np.ones((2, 32), "f4")}, keys=[keys])
    (made,) = convert(Path("in.gguf"), uniform("Q8_0"), verifying=NO_CHECK, run=Run(1))
    assert made.path.name == file
    assert {path.name for path in tmp_path.rglob("*")} == {"here", "in.gguf", file}
    assert made.plan.model_name.isprintable()


# --- split files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [0, 1, 2])
def test_a_split_model_is_the_whole_one(named, tmp_path):
    whole, parts = split_tiny(tmp_path)
    model = read.open_model(parts[named])
    assert model.files == tuple(parts) and model.path == parts[0]
    assert model.model_id == read.open_model(whole).model_id
    outputs = [
        converted(path, tmp_path / f"o{i}.gguf", uniform("Q8_0")) for i, path in enumerate((whole, parts[named]))
    ]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_llama_cpp_reads_the_parts_as_one_too(tmp_path):
    whole, parts = split_tiny(tmp_path)
    np.testing.assert_array_equal(logits(whole, [1, 5, 9]), logits(parts[0], [1, 5, 9]))


def test_a_part_that_is_missing_is_named(tmp_path):
    _, parts = split_tiny(tmp_path)
    parts[1].unlink()
    with pytest.raises(ModelError, match=rf"^{parts[1]}: missing part; the model is split into 3 files"):
        read.open_model(parts[2])


def test_a_part_under_another_name(tmp_path):
    _, parts = split_tiny(tmp_path)
    renamed = parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"other\.gguf: is a part of a model split into 3 files; wanted a name"):
        read.open_model(renamed)


def test_parts_in_the_wrong_places(tmp_path):
    _, parts = split_tiny(tmp_path)
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelError, match=r"00002-of-00003\.gguf: its keys say part 2 of 3 .*its name says 1 of 3"):
        read.open_model(parts[0])


def test_parts_that_do_not_add_up(tmp_path):
    _, parts = split_tiny(tmp_path)
    data = parts[0].read_bytes()
    spot = data.index(b"split.tensors.count") + len("split.tensors.count") + 4
    parts[0].write_bytes(data[:spot] + b"\x63" + data[spot + 1 :])
    with pytest.raises(ModelError, match="the split model has 21 tensors, wanted 99"):
        read.open_model(parts[0])


# --- what is no model for us -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind", "reason"),
    [
        ("clip", "mmproj", "holds the image or audio encoder of a multimodal model; wanted a GGUF of a language model"),
        ("clip", None, "holds the image or audio encoder of a multimodal model; wanted a GGUF of a language model"),
        ("llama", "adapter", r"holds an adapter \(LoRA\); wanted"),
        ("llama", "imatrix", "holds an importance matrix; wanted"),
        ("llama", "vocab", "holds a vocabulary; wanted"),
    ],
)
def test_other_kinds_are_refused(architecture, kind, reason, tmp_path):
    keys = [] if kind is None else [lambda writer: writer.add_type(kind)]
    path = written(tmp_path / "a.gguf", {"a.weight": np.ones((2, 32), "f4")}, architecture, keys)
    assert re.search(reason, message(call("plan", path, "--target-bpw", "4"), 3))


def test_a_vocabulary_alone_is_refused(tmp_path):
    path = written(tmp_path / "a.gguf", {}, keys=[lambda writer: add_vocabulary(writer, tiny_vocabulary())])
    assert message(call("score", path), 3) == f"{path}: holds a vocabulary and no weights; wanted a GGUF of a model"


def test_a_file_without_an_architecture_is_refused(tmp_path):
    path = written(tmp_path / "a.gguf", {}, keys=[lambda writer: writer.kv_data[0].clear()])
    assert "has no key general.architecture" in message(call("score", path), 3)


def test_a_folder_of_ggufs_names_the_file_to_pass(tiny):
    Path("models").mkdir()
    for name in ("mmproj-tiny.gguf", "tiny.gguf"):
        shutil.copy("tiny.gguf", f"models/{name}")
    assert message(call("convert", "models", *PLAIN), 3) == (
        "models: holds GGUF files and no config.json; pass the file: models/tiny.gguf (or another of its 2 GGUF files)"
    )


def test_a_tensor_without_weights_is_refused(tmp_path):
    path = written(tmp_path / "a.gguf", {"output.weight": np.ones((2, 32), "f4")})
    data = path.read_bytes()
    spot = data.index(b"output.weight") + len("output.weight") + 4 + 8  # the second dimension
    path.write_bytes(data[:spot] + bytes(8) + data[spot + 8 :])
    assert "tensor output.weight: has no weights, shape (0, 32)" in message(call("score", path), 3)


def test_types_that_ggml_does_not_read_back_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("output.weight", np.zeros((2, 292), np.uint8), raw_dtype=GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "tensor output.weight: ggml cannot dequantize type Q8_K" in message(call("score", path), 3)


@pytest.mark.parametrize("architecture", ["t5", "bert"])
def test_models_without_a_next_token_need_no_verify(architecture, tmp_path):
    keys = [lambda writer: add_vocabulary(writer, tiny_vocabulary())]
    if architecture == "bert":
        keys.append(lambda writer: writer.add_causal_attention(False))
    names = ("token_embd.weight", "enc.blk.0.attn_q.weight", "dec.blk.1.cross_attn_q.weight", "enc.output_norm.weight")
    arrays = {name: np.ones((4, 32), "f4") for name in names}
    path = written(tmp_path / "a.gguf", arrays, architecture, keys)
    text = message(call("convert", path, *PLAIN, *QUICK, "-o", tmp_path / "b.gguf"), 7)
    assert text == (
        f"{path}: architecture {architecture} does not predict the next token, so perplexity cannot check it; "
        "pass --no-verify"
    )
    assert call("convert", path, *PLAIN, "--no-verify", "-o", tmp_path / "b.gguf").code == 0
    kinds = {name: kind.name for name, (kind, _, _) in tensor_bytes(tmp_path / "b.gguf").items()}
    assert kinds == {**dict.fromkeys(names[:3], "Q8_0"), names[3]: "F32"}


def test_roles_come_from_names():
    assert role_and_layer("blk.12.attn_q.weight") == ("attn_q", 12)
    assert role_and_layer("blk.0.attn_q.bias") == ("attn_q.bias", 0)
    assert role_and_layer("blk.3.ssm_a") == ("ssm_a", 3)
    assert role_and_layer("output.weight") == ("output", None)
    assert role_and_layer("enc.blk.0.attn_q.weight") == ("enc.blk.0.attn_q", None)


# --- input that is quantized already ---------------------------------------------------------------------------------


def test_quantized_input_is_refused_unless_allowed(tmp_path):
    folder = write_tiny(tmp_path / "model", FOLDERS["llama"])
    source = converted(folder, tmp_path / "small.gguf", uniform("Q4_K"))
    text = message(call("convert", source, *PLAIN), 3)
    assert text == (
        f"{source}: is quantized already (tensors: 16 of Q4_K): its errors would add to the new ones and scores would "
        "measure them; use the F32, F16, BF16 or Q8_0 file of the model, or pass --allow-requantize"
    )
    with pytest.raises(UnsupportedError):
        plan(source, uniform("Q8_0"))

    note = "The input is quantized already (tensors: 16 of Q4_K): its errors add to the new ones, and the scores see "
    shown = call("plan", source, "--allow-requantize", "--target-bpw", "3.5", "--json", tmp_path / "plan.json")
    assert shown.code == 0 and "quantized already" in shown.out
    made = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert any(line.startswith(note) for line in made.notes)
    out = converted(Source(source, allow_requantize=True), tmp_path / "o.gguf", uniform("F32"))
    wanted = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(source).tensors}
    for tensor in GGUFReader(out).tensors:
        np.testing.assert_allclose(tensor.data, wanted[tensor.name], rtol=1e-6)


# --- tables of integers ----------------------------------------------------------------------------------------------


def test_tables_of_integers_are_copied(tmp_path):
    path = tmp_path / "a.gguf"
    dtypes = {"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "F64": "f8"}
    assert set(dtypes) == set(COPIED_TYPES)
    tables = {name: np.arange(-3, 300 * 7 - 3).reshape(300, 7).astype(dtype) for name, dtype in dtypes.items()}
    tables["I64"][0, 0] = 2**53 + 1
    writer = GGUFWriter(path, "deepseek4")
    for name, table in tables.items():
        writer.add_tensor(f"blk.0.{name.lower()}_table.weight", table)
    writer.add_tensor("output.weight", np.ones((2, 32), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (made,) = plan(path, uniform("Q8_0")).plans
    stays = {t.type: (t.kind, t.reason) for t in made.tensors if t.type in dtypes}
    assert stays == dict.fromkeys(dtypes, ("unquantized", "no weights"))
    assert made.quantized_bpw == 8.5
    again = Plan.from_json(json.loads(json.dumps(made.to_json())))
    out = converted(path, tmp_path / "b.gguf", (), loaded=again)
    found = tensor_bytes(out)
    for name, table in tables.items():
        kind, _, data = found[f"blk.0.{name.lower()}_table.weight"]
        assert (kind.name, data) == (name, table.tobytes())
    assert found["output.weight"][0].name == "Q8_0"
    tensor = read.open_model(path).by_name["blk.0.i32_table.weight"]
    assert not tensor.is_matrix
    np.testing.assert_array_equal(tensor.load(), tables["I32"].astype("f4"))


# --- other architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_become_what_llama_quantize_makes_of_them(architecture, tmp_path):
    source = write_tiny_arch(tmp_path / "a.gguf", architecture)
    ours = converted(source, tmp_path / "b.gguf", uniform("Q8_0"))
    llama_quantize(source, tmp_path / "c.gguf", [])
    assert_same_bytes(ours, tmp_path / "c.gguf")
    kept = {
        t.name.split(".", 2)[2] for t in GGUFReader(ours).tensors if t.tensor_type.name == "F32" and len(t.shape) > 1
    }
    assert kept == {"mamba": {"ssm_a", "ssm_conv1d.weight"}, "deepseek2": {"ffn_gate_inp.weight"}}.get(
        architecture, set()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_decode_after_quantization(architecture, tmp_path):
    source = write_tiny_arch(tmp_path / "a.gguf", architecture)
    text = tmp_path / "a.txt"
    text.write_text(tiny_text(), encoding="utf-8")
    check = VerifyOptions(text, n_ctx=64, n_chunks=2, reference="original")
    options = [Options(target_bpw=bpw, rounding="rtn") for bpw in (5, 7)]
    low, high = convert(source, options, verifying=check, output=tmp_path, run=Run(1))
    assert 0 < high.perplexity.divergence.kld_mean < low.perplexity.divergence.kld_mean < 1
    assert 4.9 < low.plan.bpw <= 5 and len({tensor.type for tensor in low.plan.tensors}) > 3


# --- the input is safe -----------------------------------------------------------------------------------------------


def test_the_input_is_never_replaced(tiny):
    before = Path("tiny.gguf").read_bytes()
    Path("soft.gguf").symlink_to("tiny.gguf")
    os.link("tiny.gguf", "hard.gguf")
    for name in ("tiny.gguf", "./tiny.gguf", "soft.gguf", "hard.gguf"):
        text = message(call("convert", "tiny.gguf", *PLAIN, *QUICK, "--force", "-o", name), 5)
        assert text == f"{Path(name)}: is the input and is never replaced; choose another name"
    text = message(call("convert", "soft.gguf", *PLAIN, "--force", "-o", "tiny.gguf"), 5)
    assert "is the input" in text
    for flag in ("--json", "--tensor-type-file"):
        text = message(call("plan", "tiny.gguf", "--target-bpw", "6", flag, "tiny.gguf"), 5)
        assert text == f"{flag} tiny.gguf: is a GGUF file and is not replaced; choose another name"
    assert Path("tiny.gguf").read_bytes() == before


def test_q2_0_is_read_though_gguf_does_not_know_it(tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    path = converted(source, tmp_path / "q2.gguf", uniform("Q2_0"))
    (entry,) = [each for each in read_gguf_header(path).tensors if each.name == "blk.0.ffn_up.weight"]
    data = np.fromfile(path, np.uint8)[entry.offset :][: entry.n_bytes].reshape(-1, 18)
    d = data[:, :2].copy().view("<f2").astype(np.float32)
    wanted = d * (((data[:, 2:, None] >> np.arange(0, 8, 2)) & 3).reshape(-1, 64).astype("f4") - 1)
    tensor = open_gguf(path, allow_requantize=True).by_name["blk.0.ffn_up.weight"]
    assert tensor.dtype == "Q2_0" and np.count_nonzero(wanted) > wanted.size / 3
    np.testing.assert_array_equal(tensor.load(), wanted.reshape(tensor.shape))
    with pytest.raises(UnsupportedError, match="Q2_0"):
        open_gguf(path)


@pytest.mark.parametrize("type_name, is_copied", [("F32", True), ("BF16", True), ("Q8_0", False)])
def test_only_wider_types_need_a_fast_copy(tmp_path, type_name, is_copied):
    model = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", type_name))
    assert (fast_plan(model) is not None) == is_copied


def test_no_part_of_the_input_is_replaced(tmp_path):
    _, parts = split_tiny(tmp_path)
    text = message(call("convert", parts[0], *PLAIN, "--no-verify", "--force", "-o", parts[2]), 5)
    assert "is the input" in text


@pytest.mark.parametrize("split", [False, True])
def test_the_input_is_its_own_reference(split, tmp_path):
    whole, parts = split_tiny(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text(tiny_text(), encoding="utf-8")
    source = parts[1] if split else whole
    arguments = (*QUICK, "--text", text, "--json", tmp_path / "a.json")
    made = call("convert", source, *PLAIN, *arguments, "--reference", "original", "-o", tmp_path / "b.gguf", "-v")
    assert made.code == 0 and "temporary" not in made.err
    (result,) = json.loads((tmp_path / "a.json").read_text())
    assert call("perplexity", whole, *arguments).code == 0
    alone = json.loads((tmp_path / "a.json").read_text())
    assert result["perplexity"]["divergence"]["reference_ppl"] == pytest.approx(alone["ppl"], rel=1e-6)
    assert 0 < result["perplexity"]["divergence"]["kld_mean"] < 0.01
