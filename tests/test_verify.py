"""The check of a finished file: every damage is found, and every header is read as gguf's own reader reads it."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

import numpy as np
import pytest
from arrays import random_arrays
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from plans import cycled_types, plan_of, uniform_plan, writable_model

from nsds_gguf.errors import ModelError, VerifyError
from nsds_gguf.evaluate.structure import verify_structure
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.records import Target, kv
from nsds_gguf.system.workers import Threads


@pytest.fixture(scope="module")
def model():
    return writable_model(*random_arrays(11, n_embd=256, n_ff=512, head_dim=64))


@pytest.fixture(scope="module")
def plan(model):
    return plan_of(model, cycled_types(model))


@pytest.fixture
def file(model, plan, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(model, plan, TensorQuantizers(), path, workers=Threads(2))
    return path


def edit(path, old, new):
    """Replace the one place in a file that holds ``old``."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def string(text):
    """Return a string as GGUF stores it."""
    return struct.pack("<Q", len(text)) + text.encode()


def table_entry(path, name):
    """Return one line of the tensor table: ``(place, bytes)``, without its name."""
    data = path.read_bytes()
    start = data.index(string(name)) + len(string(name))
    n_dims = struct.unpack_from("<I", data, start)[0]
    return start, data[start : start + 4 + 8 * n_dims + 4 + 8]


def rewrite_entry(path, name, *, shape=None, type_name=None, offset=None):
    """Change one line of the tensor table in place; ``shape`` is in numpy order."""
    start, entry = table_entry(path, name)
    n_dims = struct.unpack_from("<I", entry)[0]
    dims, kind, old_offset = (
        struct.unpack_from(f"<{n_dims}Q", entry, 4),
        struct.unpack_from("<I", entry, 4 + 8 * n_dims)[0],
        struct.unpack_from("<Q", entry, 8 + 8 * n_dims)[0],
    )
    new = struct.pack("<I", n_dims) + struct.pack(f"<{n_dims}Q", *(reversed(shape) if shape else dims))
    new += struct.pack("<I", GGMLQuantizationType[type_name] if type_name else kind)
    new += struct.pack("<Q", old_offset if offset is None else offset)
    data = bytearray(path.read_bytes())
    data[start : start + len(new)] = new
    path.write_bytes(data)


def refusal(path, model, plan):
    with pytest.raises(VerifyError) as caught:
        verify_structure(path, model, plan)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# --- a written file against its plan ---------------------------------------------------------------------------------


def test_what_was_written_passes(file, model, plan):
    verify_structure(file, model, plan)


@pytest.mark.parametrize("n_bytes", [-1, -10_000, 1, 32])
def test_another_length(n_bytes, file, model, plan):
    data = file.read_bytes()
    file.write_bytes(data[:n_bytes] if n_bytes < 0 else data + bytes(n_bytes))
    assert refusal(file, model, plan) == f"wanted {len(data)} bytes, got {len(data) + n_bytes}"


def test_no_gguf(file, model, plan):
    edit(file, b"GGUF" + struct.pack("<I", 3), b"GGML" + struct.pack("<I", 3))
    expected = "not a readable GGUF file: wanted b'GGUF' and version 2 or 3, got b'GGML' and 3"
    assert refusal(file, model, plan) == expected


def test_a_type_of_the_same_size(file, model, plan):
    """Q4_0 and IQ4_NL take the same bytes: nothing but the table tells them apart."""
    name = next(tensor.name for tensor in plan.tensors if tensor.type == "Q4_0")
    rewrite_entry(file, name, type_name="IQ4_NL")
    assert refusal(file, model, plan) == f"tensor {name}: type: wanted Q4_0, got IQ4_NL"


def test_two_types_swapped(file, model, plan):
    first, second = (tensor for tensor in plan.tensors if tensor.type in ("Q2_K", "Q3_K"))
    rewrite_entry(file, first.name, type_name=second.type)
    rewrite_entry(file, second.name, type_name=first.type)
    assert refusal(file, model, plan) == f"tensor {first.name}: type: wanted {first.type}, got {second.type}"


def test_a_wrong_offset(file, model, plan):
    name = plan.tensors[1].name
    rewrite_entry(file, name, offset=0)
    offset = plan.header_bytes + plan.tensors[0].padded_bytes
    assert refusal(file, model, plan) == f"tensor {name}: offset: wanted {offset}, got {plan.header_bytes}"


def test_an_offset_beside_the_alignment(file, model, plan):
    name = plan.tensors[1].name
    rewrite_entry(file, name, offset=8)
    assert refusal(file, model, plan) == f"not a readable GGUF file: tensor {name}: offset 8 is no multiple of 32"


def test_an_offset_beyond_the_end(file, model, plan):
    name = plan.tensors[1].name
    rewrite_entry(file, name, offset=2**40)
    assert re.fullmatch(
        rf"not a readable GGUF file: tensor {name}: ends at byte \d+, the file has {plan.file_bytes}",
        refusal(file, model, plan),
    )


def test_a_transposed_shape(file, model, plan):
    planned = next(tensor for tensor in plan.tensors if tensor.type == "BF16" and len(set(tensor.shape)) == 2)
    rewrite_entry(file, planned.name, shape=planned.shape[::-1])
    expected = f"tensor {planned.name}: shape: wanted {planned.shape}, got {planned.shape[::-1]}"
    assert refusal(file, model, plan) == expected


def test_another_name(file, model, plan):
    edit(file, string("blk.0.attn_k.weight"), string("blk.0.attn_x.weight"))
    assert refusal(file, model, plan) == "tensor blk.0.attn_k.weight: name: wanted blk.0.attn_k.weight, " \
        "got blk.0.attn_x.weight"  # fmt: skip


def test_a_plan_with_more_tensors(file, model, plan):
    *others, last = plan.tensors
    without = replace(plan, tensors=tuple(others), header_bytes=plan.header_bytes + last.padded_bytes)
    assert refusal(file, model, without) == f"wanted {len(others)} tensors, got {len(plan.tensors)}"


def test_a_missing_key(file, model, plan):
    edit(file, string("general.name"), string("general.mane"))
    assert refusal(file, model, plan) == "metadata key general.name is missing"


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("general.name", string("Test Model"), string("Best Model")),
        ("tokenizer.ggml.tokens", string("<0x07>"), string("<0x70>")),
        ("llama.context_length", struct.pack("<II", 4, 128), struct.pack("<II", 4, 129)),
        ("llama.context_length", struct.pack("<II", 4, 128), struct.pack("<II", 5, 128)),  # INT32 for UINT32
        ("tokenizer.ggml.scores", struct.pack("<f", -0.7), struct.pack("<f", -0.6999999)),
    ],
    ids=["string", "array", "number", "type", "rounding"],
)
def test_a_key_of_another_value_or_type(key, old, new, file, model, plan):
    name = string(key) if old[:4] == struct.pack("<I", 4) else b""  # small numbers are everywhere
    edit(file, name + old, name + new)
    assert refusal(file, model, plan) == f"metadata key {key} differs from the model's"


def test_the_file_of_another_plan(file, model, plan):
    """The same types, chosen for another reason: the bytes are those of another run."""
    other = replace(plan, versions={"ggml": "another"})
    expected = f"nsds_gguf.plan_sha256: wanted {other.digest}, got {plan.digest}"
    assert refusal(file, model, other) == expected


def test_a_file_without_the_digest_of_its_plan(file, model, plan):
    edit(file, string("nsds_gguf.plan_sha256"), string("nsds_gguf.plan_sha255"))
    assert refusal(file, model, plan) == f"nsds_gguf.plan_sha256: wanted {plan.digest}, got None"


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("kind", ["bpw", "size"])
def test_the_budget_is_checked_in_bytes(kind, excess, model, tmp_path):
    """A file as large as the target allows passes, one that is a byte larger does not."""
    path = tmp_path / "model.gguf"
    types = {tensor.name: "Q4_K" for tensor in model.tensors if tensor.is_matrix}
    draft = plan_of(model, types, target=Target("size", 999_999))  # the header holds the target's text
    used = draft.tensor_bytes if kind == "bpw" else draft.file_bytes
    assert len(str(draft.file_bytes)) == 6
    value = (used - excess + 0.5) * 8 / draft.n_weights if kind == "bpw" else used - excess
    plan = plan_of(model, types, target=Target(kind, value))
    write_gguf(model, plan, TensorQuantizers(), path, workers=Threads(1))
    if excess:
        assert refusal(path, model, plan) == f"{used} bytes exceed the target {plan.recipe.target} ({used - 1} bytes)"
    else:
        verify_structure(path, model, plan)


def test_values_are_compared_as_the_file_can_hold_them(tmp_path):
    """Tokens may be given as bytes, scores as doubles; what cannot be held exactly is no difference."""
    model = writable_model(*random_arrays(12))
    extra = {
        "test.bytes": kv([b"a", "\u00fc".encode()], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "test.third": kv(1 / 3, GGUFValueType.FLOAT32),
        "test.thirds": kv([1 / 3, 2 / 3], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        "test.flags": kv([True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL),
    }
    model = replace(model, metadata={**model.metadata, **extra})
    plan = uniform_plan(model, "F16")
    write_gguf(model, plan, TensorQuantizers(), tmp_path / "model.gguf", workers=Threads(1))
    verify_structure(tmp_path / "model.gguf", model, plan)
    other = replace(model, metadata={**model.metadata, "test.third": kv(0.3333, GGUFValueType.FLOAT32)})
    assert refusal(tmp_path / "model.gguf", other, plan) == "metadata key test.third differs from the model's"


# --- the reader of headers -------------------------------------------------------------------------------------------


def write_odd_gguf(path, alignment=None):
    """Write a GGUF of every kind of value with gguf's own writer, and types and shapes that we do not write."""
    writer = GGUFWriter(path, "odd")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{name}")(f"test.{name}", 7)
    writer.add_int64("test.negative", -(2**62))
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "zwölf")
    writer.add_array("test.strings", ["", "a", "ü" * 300])
    writer.add_array("test.floats", [0.1, -1e30])
    writer.add_array("test.ints", list(range(1000)))
    writer.add_array("test.bools", [True, False])
    if alignment:
        writer.add_custom_alignment(alignment)
    rng = np.random.default_rng(0)
    writer.add_tensor("vector", rng.standard_normal(5, dtype=np.float32))
    writer.add_tensor("cube", rng.standard_normal((2, 3, 4)).astype(np.float16))
    writer.add_tensor("four", rng.standard_normal((2, 1, 3, 5), dtype=np.float32))
    writer.add_tensor("ints", np.arange(12, dtype=np.int32).reshape(3, 4))
    writer.add_tensor("iq", np.zeros((3, 66), np.uint8), raw_dtype=GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_headers_are_read_as_ggufs_reader_reads_them(alignment, tmp_path):
    path = write_odd_gguf(tmp_path / "odd.gguf", alignment)
    header, oracle = read_gguf_header(path), GGUFReader(path)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for name, field in fields.items():
        found = header.metadata[name]
        assert [found.type, *([found.sub_type] if found.sub_type is not None else [])] == field.types, name
        assert found.value == field.contents(), name
    assert header.n_bytes == oracle.data_offset
    for entry, tensor in zip(header.tensors, oracle.tensors, strict=True):
        assert entry.name == tensor.name
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.type, entry.n_bytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert entry.offset == tensor.data_offset


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated or damaged: 24 bytes wanted at byte 0 of 0"),
        (b"GGUF", "truncated or damaged: 24 bytes wanted at byte 0 of 4"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "wanted b'GGUF' and version 2 or 3, got b'GGUF' and 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian; wanted a little-endian file: "
         "convert it with gguf-convert-endian"),
        (HEADER, "truncated or damaged: 8 bytes wanted at byte 24 of 24"),
        (HEADER + struct.pack("<Q", 2**63), f"truncated or damaged: {2**63} bytes wanted at byte 32 of 32"),
        (HEADER + string("k") + struct.pack("<I", 99), "99 is not a valid GGUFValueType"),
        (HEADER + string("k") + struct.pack("<IIQ", 9, 0, 2**60), f"truncated or damaged: {2**60} bytes wanted at "
         "byte 49 of 49"),
        (HEADER + string("k") + struct.pack("<IIQ", 9, 8, 2**60), "truncated or damaged: 8 bytes wanted at byte 49 "
         "of 49"),
        (HEADER + string("k") + struct.pack("<IIQ", 9, 9, 1), "an array of arrays, which llama.cpp does not read "
         "either"),
        (HEADER + struct.pack("<Q", 1) + b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start "
         "byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (string("k") + struct.pack("<II", 4, 1)), "key k is there "
         "twice"),
        (HEADER + string("general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0"),
        (HEADER + string("general.alignment") + struct.pack("<I", 8) + string("32"), "general.alignment is '32'"),
    ],
)  # fmt: skip
def test_damaged_headers(data, reason, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"^{re.escape(f'{path}: not a readable GGUF file: {reason}')}$"):
        read_gguf_header(path)


def tensor_line(name, dims, kind, offset):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([tensor_line("t", [1] * 5, 0, 0)], "tensor t: 5 dimensions"),
        ([tensor_line("t", [], 0, 0)], "tensor t: 0 dimensions"),
        (
            [tensor_line("t", [4], 999, 0)],
            "tensor t: type 999 is not known; upgrade the package gguf if the file is newer",
        ),
        ([tensor_line("t", [100], 12, 0)], "tensor t: rows of 100 weights cannot be Q4_K"),
        ([tensor_line("t", [2**40, 2**40], 0, 0)], f"tensor t: ends at byte {2**82 + 96}, the file has 1000"),
        ([tensor_line("t", [4], 0, 0)] * 2, "a tensor is there twice"),
    ],
)
def test_damaged_tensor_tables(lines, reason, tmp_path):
    path = tmp_path / "bad.gguf"
    data = b"GGUF" + struct.pack("<IQQ", 3, len(lines), 0) + b"".join(lines)
    path.write_bytes(data.ljust(1000, b"\0"))
    with pytest.raises(ModelError, match=f"^{re.escape(f'{path}: not a readable GGUF file: {reason}')}$"):
        read_gguf_header(path)


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match=r"missing.gguf: not a readable GGUF file: .*No such file"):
        read_gguf_header(tmp_path / "missing.gguf")


def test_every_truncation_is_found(tmp_path):
    """Cut anywhere in front of the last tensor's end, a file is refused and never read past its end."""
    path = write_odd_gguf(tmp_path / "odd.gguf")
    data = path.read_bytes()
    last = read_gguf_header(path).tensors[-1]
    cut = tmp_path / "cut.gguf"
    for n_bytes in (*range(0, 700, 7), last.offset + last.n_bytes - 1):
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(ModelError):
            read_gguf_header(cut)
    cut.write_bytes(data[: last.offset + last.n_bytes])
    assert read_gguf_header(cut).tensors[-1] == last
