"""safetensors files, right and wrong: values against numpy's, and every field of the header wrong in every way."""

import copy
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny_models import safetensors_bytes

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import checkpoint
from nsds_gguf.read.safetensors import MAX_DIMENSIONS, MAX_HEADER_BYTES, read_header

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23093576\n"

# Two tensors of 24 and 8 bytes, one after the other.
GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(range(32))

# Values that a number, a list, a string or an object of a header is replaced by.
STRANGE = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "F32", "I8", "\ud800", "\x1b[31m", "x" * 5000,
    [], [1], [1, 2], [6], [2, 3, 1], [True, 6], [2.0, 3.0], [2**62, 4], [2**63, 2**63], [1] * 100, [2] * 5000,
    [0, 24], [24, 0], [-24, 0], [0, 2**63], [0, 24, 32], ["0", "24"], [None, None], [[0], [24]],
    {}, {"a": 1}, {"dtype": "F32"}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
)  # fmt: skip


def open_checkpoint(folder: Path) -> dict[str, checkpoint.StoredTensor]:
    return checkpoint.open_checkpoint(folder, {})


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file of any header, right or wrong."""
    return len(header).to_bytes(8, "little") + header + data


def write(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def header_file(folder: Path, header: object, data: bytes = DATA) -> Path:
    return write(folder, with_header(json.dumps(header).encode(), data))


def edited(name: str, **fields: object) -> dict[str, object]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_values_of_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    f32, f16 = rng.standard_normal((5, 7)).astype(np.float32), rng.standard_normal(9).astype(np.float16)
    file = write(tmp_path, safetensors_bytes({"m": f32, "v": f16}))
    found = open_checkpoint(tmp_path)
    assert [(t.name, t.dtype, t.shape, t.file) for t in found.values()] == [
        ("m", "F32", (5, 7), file), ("v", "F16", (9,), file)]  # fmt: skip
    np.testing.assert_array_equal(found["m"].rows(slice(1, 4)), f32[1:4])
    np.testing.assert_array_equal(found["m"].rows(np.array([3, 0, 3])), f32[[3, 0, 3]])
    np.testing.assert_array_equal(found["v"].rows(slice(0, 1)), f16[None].astype(np.float32))
    rows = found["m"].rows(slice(0, 5))
    rows[:] = 0  # a fresh array: the file stays as it is
    np.testing.assert_array_equal(found["m"].rows(slice(0, 5)), f32)


def test_bf16_is_the_upper_half_of_float32(tmp_path):
    halves = np.array([0x3F80, 0xC049, 0x0001, 0xFF7F, 0x8000, 0x7F7F], dtype="<u2")
    header = {"t": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    header_file(tmp_path, header, halves.tobytes())
    wanted = [[1.0, -3.140625, 2.0**-133], [-(2 - 2**-7) * 2.0**127, -0.0, (2 - 2**-7) * 2.0**127]]
    rows = open_checkpoint(tmp_path)["t"].rows(slice(0, 2))
    np.testing.assert_array_equal(rows, np.array(wanted, dtype=np.float32))
    assert np.signbit(rows[1, 1])


DAMAGED = {
    "lfs pointer": (LFS_POINTER, "git-lfs pointer.*git lfs pull"),
    "empty": (b"", "0 bytes are not a safetensors file"),
    "shorter than its length": (b"\x08\0\0", "3 bytes are not a safetensors file"),
    "length beyond the file": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes in a file of 10"),
    "length one too long": ((3).to_bytes(8, "little") + b"{}", "header of 3 bytes in a file of 10"),
    "length zero": (b"\0" * 8, "damaged header: Expecting value"),
    "length too short": ((5).to_bytes(8, "little") + json.dumps(GOOD).encode(), "damaged header: .*download it again"),
    "a web page": (b"<!DOCTYPE html><html><head><title>Sign in</title>", "truncated or damaged"),
    "not UTF-8": (with_header(b'{"\xff\xfe": 1}'), "damaged header: .*utf-8"),
    "not JSON": (with_header(b"{'a': 1}"), "damaged header: Expecting property name"),
    "an array": (with_header(b"[1, 2]"), "damaged header: wanted an object, got list"),
    "a number": (with_header(b"12"), "damaged header: wanted an object, got int"),
    "deeply nested": (with_header(b'{"a": ' + b"[" * 200_000), "damaged header: .*recursion"),
    "a number of 5000 digits": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "damaged header: "),
    "a name twice": (with_header(b'{"a": {}, "a": {}}'), "'a' occurs more than once"),
    "a field twice": (with_header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' occurs more than once"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file(tmp_path, content, message):
    file = write(tmp_path, content)
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(file) in str(error.value)


LYING = {
    "entry of another kind": ({"a": 1}, "wanted dtype, shape and data_offsets"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, "wanted dtype, shape and data_offsets"),
    "one offset": (edited("a", data_offsets=[0]), "wanted dtype, shape and data_offsets"),
    "offsets of another kind": (edited("a", data_offsets=["0", "24"]), "got shape .* offsets '0' to '24'"),
    "offsets reversed": (edited("a", data_offsets=[24, 0]), "offsets 24 to 0 span -24"),
    "negative offset": (edited("a", data_offsets=[-24, 0]), "offsets -24 to 0"),
    "negative size": (edited("a", shape=[-2, -3]), "got shape .-2, -3."),
    "fractional size": (edited("a", shape=[2.0, 3]), "got shape .2.0, 3."),
    "boolean size": (edited("a", shape=[True, 6]), "got shape .True, 6."),
    "shape of another kind": (edited("a", shape="23"), "got shape '23'"),
    "too many dimensions": (edited("a", shape=[6] + [1] * MAX_DIMENSIONS), f"at most {MAX_DIMENSIONS} sizes"),
    "size that overflows 64 bits": (edited("a", shape=[2**62, 4]), "takes 73786976294838206464 bytes"),
    "size beyond 64 bits": (edited("a", shape=[2**64]), "got shape"),
    "shape larger than the offsets": (edited("a", shape=[2, 4]), r"F32 \[2, 4\] takes 32 bytes.* span 24"),
    "shape smaller than the offsets": (edited("b", shape=[3]), r"F16 \[3\] takes 6 bytes.* span 8"),
    "overlap": (edited("b", data_offsets=[20, 28]), "a and b overlap"),
    "the same data twice": ({"a": GOOD["a"], "c": GOOD["a"], "b": GOOD["b"]}, "a and c overlap"),
    "gap": ({"b": GOOD["b"]}, "the header and b leave a gap"),
    "data that belongs to nobody": ({"a": GOOD["a"]}, "end at byte 97, the file has 105"),
    "beyond the end": (edited("b", shape=[8], data_offsets=[24, 40]), "tensor b: ends at byte .* truncated"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "message"), LYING.values(), ids=LYING)
def test_lying_header(tmp_path, header, message):
    file = header_file(tmp_path, header)
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(file) in str(error.value)
    assert not isinstance(error.value, UnsupportedError)


@pytest.mark.parametrize("dtype", ["f32", "", "X8", None, 4, ["F32"], {"a": 1}])
def test_dtype_that_the_format_does_not_know(tmp_path, dtype):
    header_file(tmp_path, edited("a", dtype=dtype))
    with pytest.raises(UnsupportedError, match=r"tensor a: stored as .*, which safetensors does not know"):
        open_checkpoint(tmp_path)


# Shapes that take 24 bytes, as the safetensors package counts.
SHAPES_OF_24_BYTES = {
    "BOOL": [24], "U8": [2, 12], "I8": [24], "F8_E5M2": [24], "F8_E4M3FNUZ": [24], "I16": [12], "U16": [12], "I32": [6],
    "U32": [6], "I64": [3], "U64": [3], "F64": [3], "C64": [3], "F4": [48], "F6_E2M3": [32], "F6_E3M2": [32],
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "shape"), SHAPES_OF_24_BYTES.items(), ids=SHAPES_OF_24_BYTES)
def test_dtype_that_is_not_read_is_listed_and_fails_on_reading(tmp_path, dtype, shape):
    """GPT-2 stores its causal masks, others their rope frequencies or integer buffers: nobody needs them."""
    file = header_file(tmp_path, edited("a", dtype=dtype, shape=shape))
    found = open_checkpoint(tmp_path)
    assert (found["a"].dtype, found["a"].shape) == (dtype, tuple(shape))
    assert found["a"].first_bytes(100) == DATA[:24]
    found["b"].rows(slice(0, 1))
    for read in (lambda: found["a"].rows(slice(0, 1)), lambda: found["a"].values(slice(None), slice(0, 1)),
                 found["a"].require_readable):  # fmt: skip
        with pytest.raises(UnsupportedError) as error:
            read()
        assert str(error.value) == (
            f"{file}: tensor a: stored as {dtype!r}; wanted F32, F16, BF16 or FP8 (F8_E4M3): use the unquantized "
            "checkpoint"
        )


def test_rows_columns_and_first_bytes(tmp_path):
    stack = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write(tmp_path, safetensors_bytes({"stack": stack}))
    tensor = open_checkpoint(tmp_path)["stack"]
    assert (tensor.n_rows, tensor.n_cols) == (6, 4)
    np.testing.assert_array_equal(tensor.rows(np.array([5, 0])), [[20, 21, 22, 23], [0, 1, 2, 3]])
    np.testing.assert_array_equal(tensor.values(slice(None), slice(1, 3)), stack.reshape(6, 4)[:, 1:3])
    assert tensor.values(slice(None), slice(1, 3)).flags.writeable
    assert tensor.first_bytes(10) == stack.tobytes()[:10]


def test_header_beyond_the_limit_is_refused_unread(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(file, 8 + MAX_HEADER_BYTES + 1)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="truncated or damaged: a header of 100000001 bytes"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_empty_tensors_and_scalars_are_read(tmp_path):
    header = {
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
        "one": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]},
    }
    header_file(tmp_path, header, np.float16(2.5).tobytes())
    assert open_checkpoint(tmp_path)["one"].rows(slice(0, 1)).tolist() == [[2.5]]


def test_file_that_shrinks_after_opening(tmp_path):
    file = header_file(tmp_path, GOOD)
    found = open_checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ModelError, match="tensor b can no longer be read"):
        found["b"].rows(slice(0, 1))
    file.unlink()
    with pytest.raises(ModelError, match="tensor a can no longer be read"):
        found["a"].rows(slice(0, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite_are_counted(tmp_path, dtype):
    array = np.ones((4, 3), dtype)
    array[1, :2], array[3, 0], array[3, 2] = np.nan, np.inf, -np.inf
    file = write(tmp_path, safetensors_bytes({"w": array}))
    tensor = open_checkpoint(tmp_path)["w"]
    assert tensor.rows(slice(0, 1)).tolist() == [[1, 1, 1]]
    with pytest.raises(ModelError) as error:
        tensor.rows(slice(0, 2))
    assert str(error.value) == (
        f"{file}: tensor w: 2 NaN and 2 infinite of 12 weights; wanted finite numbers: the file is damaged, "
        "download it again"
    )


# --- shards ----------------------------------------------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, weight_map: object) -> Path:
    """Write ``a`` and ``b`` into a shard each, and an index of ``weight_map``."""
    for name, shard in zip("ab", SHARDS, strict=True):
        write(folder, safetensors_bytes({name: np.full((2, 2), ord(name), np.float32)}), shard)
    return write(folder, json.dumps({"weight_map": weight_map}).encode(), "model.safetensors.index.json")


PLACES = dict(zip("ab", SHARDS, strict=True))


def test_shards(tmp_path):
    sharded(tmp_path, PLACES)
    found = open_checkpoint(tmp_path)
    assert {name: tensor.rows(slice(0, 1))[0, 0] for name, tensor in found.items()} == {"a": 97.0, "b": 98.0}


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "c:\\x.safetensors",
        3,
        None,
        ["a"],
    ],
)
def test_index_that_leaves_the_folder(tmp_path, shard):
    index = sharded(tmp_path, {"a": shard})
    with pytest.raises(
        ModelError, match=r"places tensor a in .*; wanted the name of a file in the same folder"
    ) as error:
        open_checkpoint(tmp_path)
    assert str(index) in str(error.value)


INDEXES = {
    "lfs pointer": (LFS_POINTER, "git-lfs pointer"),
    "not JSON": (b"weights", "wanted JSON with a weight_map"),
    "not UTF-8": (b"\xff\xfe\xff", "wanted JSON with a weight_map"),
    "deeply nested": (b"[" * 200_000, "wanted JSON with a weight_map"),
    "a number of 5000 digits": (b"9" * 5000, "wanted JSON with a weight_map"),
    "an array": (b"[]", "wanted JSON with a weight_map"),
    "without a map": (b"{}", "wanted JSON with a weight_map"),
    "map of another kind": (b'{"weight_map": ["a"]}', "wanted JSON with a weight_map"),
    "null": (b"null", "wanted JSON with a weight_map"),
}


@pytest.mark.parametrize(("content", "message"), INDEXES.values(), ids=INDEXES)
def test_damaged_index(tmp_path, content, message):
    index = write(tmp_path, content, "model.safetensors.index.json")
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(index) in str(error.value)


DISAGREEING = {
    "missing shard": ({**PLACES, "c": "model-3.safetensors"}, "model-3.safetensors: shard is missing; .* names it"),
    "shard that is a folder": ({**PLACES, "c": "folder"}, "folder: shard is missing"),
    "shard with an impossible name": ({**PLACES, "c": "x" * 300}, "x: cannot be read: File name too long"),
}  # fmt: skip


@pytest.mark.parametrize(("weight_map", "message"), DISAGREEING.values(), ids=DISAGREEING)
def test_index_and_shards_disagree(tmp_path, weight_map, message):
    (tmp_path / "folder").mkdir()
    sharded(tmp_path, weight_map)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


NO_WEIGHTS = {
    "nothing": ((), ModelError, "no model.safetensors and no model.safetensors.index.json"),
    "PyTorch": (("consolidated.00.pth",), UnsupportedError, "holds consolidated.00.pth but no model.safetensors"),
    "GGUF": (("m.gguf",), UnsupportedError, "holds no safetensors: to convert m.gguf, pass .*/m.gguf"),
    "adapter": (("adapter_model.safetensors",), UnsupportedError, "holds an adapter, not a model: merge it into"),
    "shards without index": ((SHARDS[0],), ModelError, f"holds {SHARDS[0]} but no model.safetensors.index.json"),
}


@pytest.mark.parametrize(("files", "kind", "message"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_no_weights(tmp_path, files, kind, message):
    for name in files:
        write(tmp_path, b"", name)
    with pytest.raises(kind, match=message):
        open_checkpoint(tmp_path)


def test_link_to_nowhere(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "4d7a")
    with pytest.raises(ModelError, match=r"model.safetensors: link to a file that is missing: download it again"):
        open_checkpoint(tmp_path)


# --- fuzz ------------------------------------------------------------------------------------------------------------


def check_survives(folder: Path, content: bytes) -> bool:
    """Open a file of any content: either ``ModelError``, or tensors that lie inside the file and can be read."""
    file = write(folder, content)
    try:
        found = open_checkpoint(folder)
    except ModelError as error:
        assert str(error).startswith(str(file))
        assert len(str(error)) < len(str(file)) + 6000  # a name is quoted whole, anything else is cut
        return False
    for tensor in found.values():
        assert tensor.offset_bytes + tensor.n_bytes <= len(content)
        if tensor.n_bytes:
            assert tensor.first_bytes(1 << 30) == content[tensor.offset_bytes :][: tensor.n_bytes]
            if tensor.dtype in ("F32", "F16", "BF16"):
                assert tensor.rows(slice(0, 1)).nbytes <= 4 * len(content)
    return True


def strange_headers():
    """Yield ``GOOD`` with every value, at every depth, replaced by every strange one or left out."""
    paths = [("a",), ("__metadata__",), *(("a", field) for field in GOOD["a"]), ("b", "shape", 0),
             ("a", "shape", 1), ("a", "data_offsets", 0), ("b", "data_offsets", 1)]  # fmt: skip
    for path in paths:
        for value in STRANGE:
            header = copy.deepcopy(GOOD)
            at = header
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            yield header
        header = copy.deepcopy(GOOD)
        at = header
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        yield header


def test_every_field_wrong_in_every_way(tmp_path):
    tracemalloc.start()
    try:
        outcomes = [
            check_survives(tmp_path, with_header(json.dumps(header).encode(), DATA)) for header in strange_headers()
        ]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(outcomes) > 400
    assert (
        40 < sum(outcomes) < 80
    )  # whatever __metadata__ holds is no concern; of the rest few values happen to be right


def test_random_damage(tmp_path):
    rng = np.random.default_rng(20260317)
    good = with_header(json.dumps(GOOD).encode(), DATA)
    n_read = 0
    for _ in range(600):
        content = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(content) + 1))
            match rng.integers(0, 4):
                case 0:
                    content[at : at + 1] = rng.bytes(1)
                case 1:
                    content[at : at + int(rng.integers(1, 9))] = b""
                case 2:
                    content[at:at] = rng.bytes(int(rng.integers(1, 9)))
                case _:
                    del content[at + 1 :]
        n_read += check_survives(tmp_path, bytes(content))
    assert 0 < n_read < 200
