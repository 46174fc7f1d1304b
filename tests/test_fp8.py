"""FP8 checkpoints against a decoder written bit by bit and sums written as loops; other quantizations refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from command import TINY
from numpy.typing import NDArray
from tiny_models import tiny_weights, write_tiny

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import open_model
from nsds_gguf.read.checkpoint import open_checkpoint, read_checkpoint
from nsds_gguf.read.stored import StoredTensor
from nsds_gguf.session.original import original_plan

Entry = tuple[str, tuple[int, ...], bytes]  # dtype, shape, data

FINE_GRAINED = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def e4m3(code: int) -> float:
    """Return the value of an E4M3 code from its fields (Micikevicius et al. 2022, table 1)."""
    sign = -1.0 if code & 0b1_0000_000 else 1.0
    exponent, mantissa = (code & 0b0_1111_000) >> 3, code & 0b0_0000_111
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


# Codes whose values the paper or the ONNX operator documentation spells out.
GOLDEN = {0x00: 0.0, 0x01: 2.0**-9, 0x07: 0.875 * 2.0**-6, 0x08: 2.0**-6, 0x38: 1.0, 0x39: 1.125, 0x40: 2.0,
          0x77: 240.0, 0x78: 256.0, 0x7E: 448.0, 0xB8: -1.0, 0xFE: -448.0}  # fmt: skip


def checkpoint(
    folder: Path, entries: Mapping[str, Entry], quantization: object = FINE_GRAINED
) -> dict[str, StoredTensor]:
    """Write a checkpoint of any dtypes and open it."""
    header, begin = {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    raw = json.dumps(header).encode()
    content = len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in entries.values())
    (folder / "model.safetensors").write_bytes(content)
    return open_checkpoint(folder, {} if quantization is None else {"quantization_config": quantization})


def codes(shape: tuple[int, ...], seed: int = 0) -> tuple[Entry, NDArray[np.float64]]:
    """Return random finite codes and their values."""
    found = np.random.default_rng(seed).integers(0, 256, shape)
    found[(found & 127) == 127] = 0
    values = np.array([e4m3(int(code)) for code in found.ravel()]).reshape(shape)
    return ("F8_E4M3", shape, found.astype(np.uint8).tobytes()), values


def floats(values: NDArray[np.floating]) -> Entry:
    return "F32", values.shape, values.astype("<f4").tobytes()


def random_scales(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(1).lognormal(-6, 1, shape).astype(np.float32)


def read(tensor: StoredTensor) -> NDArray[np.float32]:
    """Read a whole tensor in its shape."""
    return tensor.rows(slice(0, tensor.n_rows)).reshape(tensor.shape)


def product(values: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float32]:
    """Multiply as float32 numbers are multiplied, which is exact in float64 up to the last rounding."""
    return (values * scales).astype(np.float32)


def test_every_code(tmp_path):
    found = read(checkpoint(tmp_path, {
        "w.weight": ("F8_E4M3", (2, 254 // 2), bytes(code for code in range(256) if code & 127 != 127)),
        "w.weight_scale_inv": floats(np.ones(())),
    })["w.weight"]).ravel()  # fmt: skip
    finite = [code for code in range(256) if code & 127 != 127]
    np.testing.assert_array_equal(found, [e4m3(code) for code in finite])
    for code, value in GOLDEN.items():
        assert found[finite.index(code)] == value == e4m3(code)
    assert math.copysign(1, found[finite.index(0x80)]) == -1
    assert np.isfinite(found).all() and found.max() == 448


SHAPES = {
    "whole blocks": ((4, 6), (2, 3)),
    "one ragged row of blocks": ((5, 6), (2, 3)),
    "ragged both ways": ((9, 10), (4, 4)),
    "smaller than a block": ((3, 2), (4, 4)),
    "one block wide": ((7, 3), (2, 3)),
    "one column": ((7, 1), (2, 4)),
    "experts": ((3, 5, 7), (2, 4)),
    "experts of experts": ((2, 3, 5, 7), (3, 2)),
}


@pytest.mark.parametrize(("shape", "block"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_blocks(tmp_path, shape, block, suffix):
    """Every weight is its code times the scale of the block that it lies in; any rows and columns, in any order."""
    entry, values = codes(shape)
    n_grid = tuple(math.ceil(n / size) for n, size in zip(shape[-2:], block, strict=True))
    scales = random_scales((*shape[:-2], *n_grid))
    wanted = np.empty(shape, np.float32)
    for place in np.ndindex(shape):
        grid_place = (*place[:-2], place[-2] // block[0], place[-1] // block[1])
        wanted[place] = np.float32(values[place]) * scales[grid_place]
    quantization = {**FINE_GRAINED, "weight_block_size": list(block)}
    found = checkpoint(tmp_path, {"w": entry, "w" + suffix: floats(scales)}, quantization)
    assert list(found) == ["w"]
    tensor = found["w"]
    assert (tensor.shape, tensor.dtype, tensor.file) == (shape, "F8_E4M3", tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read(tensor), wanted)
    matrix = wanted.reshape(-1, shape[-1])
    order = np.random.default_rng(2).permutation(len(matrix))
    np.testing.assert_array_equal(tensor.rows(order), matrix[order])
    np.testing.assert_array_equal(tensor.rows(slice(1, 3)), matrix[1:3])
    for start in range(shape[-1]):
        np.testing.assert_array_equal(tensor.values(slice(None), slice(start, start + 2)), matrix[:, start : start + 2])
    rows = tensor.rows(slice(0, 1))
    rows[:] = 0  # a fresh array: the file stays as it is
    np.testing.assert_array_equal(read(tensor), wanted)


PLAIN_SCALES = {
    "a number": ((4, 6), ()),
    "a list of one": ((4, 6), (1,)),
    "a matrix of one": ((4, 6), (1, 1)),
    "of every row": ((4, 6), (4, 1)),
    "of every row, without the 1": ((4, 6), (4,)),
    "of one row": ((1, 6), (1,)),
    "of every expert": ((3, 4, 6), (3,)),
    "of every expert, with ones": ((3, 4, 6), (3, 1, 1)),
    "of every row of every expert": ((3, 4, 6), (3, 4, 1)),
    "of every row of every expert, without the 1": ((3, 4, 6), (3, 4)),
    "one for all experts": ((3, 4, 6), ()),
}


@pytest.mark.parametrize(("shape", "scale_shape"), PLAIN_SCALES.values(), ids=PLAIN_SCALES)
@pytest.mark.parametrize("block", [None, [128, 128]])
def test_one_scale_and_one_a_row(tmp_path, shape, scale_shape, block):
    entry, values = codes(shape)
    scales = random_scales(scale_shape)
    aligned = scales.reshape(() if scales.size == 1 else scale_shape + (1,) * (len(shape) - len(scale_shape)))
    found = checkpoint(
        tmp_path, {"w": entry, "w_scale_inv": floats(scales)}, {**FINE_GRAINED, "weight_block_size": block}
    )
    np.testing.assert_array_equal(read(found["w"]), product(values, aligned.astype(np.float64)))


def test_scales_of_every_dtype(tmp_path):
    """BF16 as in Qwen3's, F16, and powers of two by their exponents (E8M0, as newer DeepSeek's)."""
    entry, values = codes((3, 4))
    powers = np.array([[2.0**-3], [1.0], [2.0**-126]])
    stored = {
        "BF16": (powers.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes(),
        "F16": np.array([2.0**-3, 1.0, 2.0**-14], "<f2").tobytes(),
        "F8_E8M0": bytes([127 - 3, 127, 1]),
    }
    for dtype, data in stored.items():
        wanted = np.array([[2.0**-3], [1.0], [2.0**-14]]) if dtype == "F16" else powers
        found = checkpoint(tmp_path, {"w": entry, "w_scale": (dtype, (3, 1), data)})
        np.testing.assert_array_equal(read(found["w"]), product(values, wanted))


def test_scales_do_not_show_and_the_rest_stays(tmp_path):
    entry, _ = codes((2, 2))
    kept = np.arange(4, dtype=np.float32).reshape(2, 2)
    found = checkpoint(tmp_path, {
        "a.weight": entry, "a.weight_scale_inv": floats(np.ones((1, 1))), "a.bias": floats(kept[0]),
        "a.input_scale": floats(np.ones(())), "b.activation_scale": floats(np.ones(1)), "c.k_scale": floats(np.ones(1)),
        "lm_head.weight": floats(kept), "mask": ("BOOL", (1, 1), b"\1"), "number": floats(np.ones(())),
    })  # fmt: skip
    assert list(found) == ["a.weight", "a.bias", "lm_head.weight", "mask", "number"]
    np.testing.assert_array_equal(read(found["lm_head.weight"]), kept)


def test_input_scales_stay_where_nothing_is_quantized(tmp_path):
    found = checkpoint(tmp_path, {"a.input_scale": floats(np.ones(()))}, None)
    assert list(found) == ["a.input_scale"]


def test_first_bytes_tell_scales_apart(tmp_path):
    entry, _ = codes((2, 2))
    firsts = set()
    for scale in (1.0, 2.0):
        tensor = checkpoint(tmp_path, {"w": entry, "w_scale": floats(np.full((), scale))})["w"]
        assert tensor.first_bytes(100) == np.float32(scale).tobytes() + entry[2]
        assert tensor.first_bytes(3) == np.float32(scale).tobytes()[:3]
        firsts.add(tensor.first_bytes(100))
    assert len(firsts) == 2


def refusal(kind: type[ModelError], folder: Path, entries: Mapping[str, Entry], quantization: object) -> str:
    with pytest.raises(kind) as error:
        checkpoint(folder, entries, quantization)
    return str(error.value).removeprefix(str(folder) + "/")


def test_scale_that_is_missing(tmp_path):
    entry, _ = codes((2, 2))
    for quantization in (FINE_GRAINED, None):
        assert refusal(ModelError, tmp_path, {"w.weight": entry}, quantization) == (
            "model.safetensors: tensor w.weight is stored as FP8 and its scale w.weight_scale_inv is missing: download "
            "the checkpoint again"
        )
    both = {"w": entry, "w_scale": floats(np.ones(())), "w_scale_inv": floats(np.ones(()))}
    assert "w_scale_inv and w_scale contradict each other" in refusal(ModelError, tmp_path, both, FINE_GRAINED)


MISFITS = {
    "too few blocks": ((300, 200), (2, 2), [128, 128]),
    "too many blocks": ((300, 200), (3, 3), [128, 128]),
    "blocks without a block size": ((300, 200), (3, 2), None),
    "rows of another matrix": ((300, 200), (301, 1), None),
    "one a column": ((300, 200), (1, 200), None),
    "experts of another stack": ((3, 4, 6), (2, 1, 1), None),
    "one grid for all experts": ((3, 300, 200), (3, 2), [128, 128]),
    "more dimensions": ((4, 6), (2, 2, 1), None),
    "a vector": ((6,), (), None),
}


@pytest.mark.parametrize(("shape", "scale_shape", "block"), MISFITS.values(), ids=MISFITS)
def test_scales_that_do_not_fit(tmp_path, shape, scale_shape, block):
    entry = ("F8_E4M3", shape, bytes(math.prod(shape)))
    entries = {"w": entry, "w_scale_inv": floats(np.ones(scale_shape))}
    grid = ", or one per block of 128 x 128" if block else ""
    assert refusal(ModelError, tmp_path, entries, {**FINE_GRAINED, "weight_block_size": block}) == (
        f"model.safetensors: tensor w_scale_inv: shape {scale_shape} does not fit w, {shape}; wanted one scale, "
        f"one per row{grid}: see quantization_config in config.json"
    )


def test_scales_that_are_no_numbers(tmp_path):
    entry, _ = codes((2, 2))
    message = refusal(UnsupportedError, tmp_path, {"w": entry, "w_scale": ("I32", (), bytes(4))}, FINE_GRAINED)
    assert message.startswith("model.safetensors: tensor w_scale: stored as 'I32'")
    tensor = checkpoint(tmp_path, {"w": entry, "w_scale": floats(np.full((), np.nan))})["w"]
    with pytest.raises(ModelError, match="tensor w_scale: 1 NaN and 0 infinite of 1 weights"):
        tensor.rows(slice(0, 1))
    tensor = checkpoint(tmp_path, {"w": entry, "w_scale": ("F8_E8M0", (), b"\xff")})["w"]
    with pytest.raises(ModelError, match="tensor w_scale: 1 NaN"):
        tensor.rows(slice(0, 1))


def test_codes_that_are_no_numbers(tmp_path):
    """0x7F and 0xFF are NaN; 448 times a scale near the largest float32 is infinite."""
    entry = ("F8_E4M3", (2, 3), bytes([0x38, 0x7F, 0x38, 0xFF, 0x7F, 0x7E]))
    entries = {"w": entry, "w_scale": floats(np.array([[1.0], [1e38]]))}
    tensor = checkpoint(tmp_path, entries)["w"]
    with pytest.raises(ModelError) as error:
        tensor.rows(slice(0, 1))
    assert str(error.value) == (
        f"{tmp_path}/model.safetensors: tensor w: 3 NaN and 1 infinite of 6 weights; wanted finite numbers: the "
        "file is damaged, download it again"
    )


def test_scales_in_another_shard(tmp_path):
    entry, values = codes((2, 3))
    shards = {"one.safetensors": {"w": entry}, "two.safetensors": {"w_scale_inv": floats(np.full((1, 1), 0.5))}}
    places = {}
    for shard, entries in shards.items():
        with pytest.raises(ModelError) if "w" in entries else pytest.MonkeyPatch.context():
            checkpoint(tmp_path, entries)  # alone, the codes have no scale
        (tmp_path / "model.safetensors").rename(tmp_path / shard)
        places |= dict.fromkeys(entries, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = open_checkpoint(tmp_path, {"quantization_config": FINE_GRAINED})
    assert list(found) == ["w"]
    np.testing.assert_array_equal(read(found["w"]), values / 2)


@pytest.fixture
def model(tmp_path):
    """Return the folder of a tiny model whose matrices are FP8, and its weights by checkpoint name."""
    folder, entries, weights = write_tiny(tmp_path / "model", TINY), {}, {}
    for seed, (name, array) in enumerate(tiny_weights(TINY).items()):
        weights[name] = array.astype(np.float32)
        entries[name] = floats(weights[name])
        if array.ndim == 2:
            entries[name], values = codes(array.shape, seed)
            scales = np.repeat(np.repeat(random_scales((8, 8)), 128, 0), 128, 1)[: array.shape[0], : array.shape[1]]
            entries[f"{name}_scale_inv"] = floats(scales[::128, ::128])
            weights[name] = product(values, scales.astype(np.float64))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FINE_GRAINED}))
    checkpoint(folder, entries)
    return folder, weights


def test_model(model):
    """No scale is taken for a tensor of the model; the file to compare with holds the same numbers."""
    folder, weights = model
    opened = open_model(folder)
    assert {tensor.source for tensor in opened.tensors} == set(weights)
    for tensor in opened.tensors:
        rows = tensor.load().reshape(tensor.shape)
        if not tensor.role.startswith(("attn_q", "attn_k")):  # their rows are permuted
            np.testing.assert_array_equal(rows, weights[tensor.source])
        np.testing.assert_array_equal(np.sort(rows, axis=None), np.sort(weights[tensor.source], axis=None))
    assert {tensor.type for tensor in original_plan(opened).tensors} == {"F32"}


# --- settings --------------------------------------------------------------------------------------------------------


def compressed(form: str = "float-quantized", **weights: object) -> dict[str, object]:
    """Return settings as compressed-tensors writes them, for one group of layers."""
    group = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


READ = {
    "DeepSeek": (FINE_GRAINED, (2, 2)),
    "block size left to its default": ({"quant_method": "fp8"}, (2, 2)),
    "no blocks": ({"quant_method": "fp8", "weight_block_size": None}, ()),
    "compressed-tensors by row": (compressed(), (200, 1)),
    "compressed-tensors by tensor": (compressed(strategy="tensor"), (1,)),
    "compressed-tensors by block": (compressed(strategy="block", block_structure=[128, 128]), (2, 2)),
    "compressed-tensors naive": (compressed("naive-quantized"), (200, 1)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, ()),
}


@pytest.mark.parametrize(("quantization", "scale_shape"), READ.values(), ids=READ)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_methods_that_are_read(tmp_path, quantization, scale_shape, place):
    entry, values = codes((200, 150))
    scales = np.full(scale_shape, 0.25)
    checkpoint(tmp_path, {"w.weight": entry, "w.weight_scale": floats(scales)})
    config = {place: quantization} if place != "text_config" else {place: {"quantization_config": quantization}}
    np.testing.assert_array_equal(read(open_checkpoint(tmp_path, config)["w.weight"]), values / 4)


ROUTE = (
    ", or let llama.cpp's converter dequantize it: `python convert_hf_to_gguf.py --outtype f16 --outfile "
    "model-F16.gguf {folder}`, then `nsds-gguf convert model-F16.gguf`"
)
PACKED: dict[str, Entry] = {"a.weight": ("U8", (2, 3), bytes(6))}
OTHER_SETTINGS = [FINE_GRAINED, compressed(), {"quant_method": "fp8", "weight_block_size": "x"}, "gptq", 4, [1], True]
REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq 4", ROUTE),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, "gptq 3", ""),
    "bitnet": ({"quant_method": "bitnet"}, "bitnet", ROUTE),
    "compressed-tensors int4": (compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32),
                                "compressed-tensors pack-quantized", ROUTE),
    "compressed-tensors int8": (compressed("int-quantized", type="int"), "compressed-tensors int-quantized", ROUTE),
    "compressed-tensors nvfp4": (compressed("nvfp4-pack-quantized", num_bits=4),
                                 "compressed-tensors nvfp4-pack-quantized", ""),
    "compressed-tensors in groups of columns": (compressed(strategy="group", group_size=128),
                                                "compressed-tensors float-quantized", ""),
    "awq": ({"quant_method": "awq", "bits": 4}, "awq 4", ""),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", ""),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4", ""),
    "hqq": ({"quant_method": "hqq"}, "hqq", ""),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4", ""),
    "no name": ({"load_in_8bit": True}, "codes of U8", ""),
    "a method that is no text": ({"quant_method": ["fp8"]}, "['fp8']", ""),
}  # fmt: skip


@pytest.mark.parametrize(("quantization", "method", "route"), REFUSED.values(), ids=REFUSED)
def test_methods_that_are_refused(tmp_path, quantization, method, route):
    """The weights are packed; the settings say how."""
    with pytest.raises(UnsupportedError) as error:
        checkpoint(tmp_path, PACKED, quantization)
    assert str(error.value) == (
        f"{tmp_path}: the weights are quantized ({method}: a.weight); wanted F32, F16, BF16, MXFP4 or FP8 (fp8, "
        "modelopt FP8, compressed-tensors float-quantized with one scale per tensor, row or block): use the original "
        "checkpoint" + route.format(folder=tmp_path)
    )


@pytest.mark.parametrize("quantization", [*(settings for settings, _, _ in REFUSED.values()), *OTHER_SETTINGS])
def test_settings_over_plain_weights_do_not_count(tmp_path, quantization):
    """As merging leaves them: the tensors decide, whatever the settings say."""
    values = np.array([[1.0, -2.0], [0.5, 3.0]])
    checkpoint(tmp_path, {"w.weight": floats(values)}, None)
    found = read_checkpoint(tmp_path, {"quantization_config": quantization})
    np.testing.assert_array_equal(read(found.tensors["w.weight"]), values)
    (note,) = found.notes
    assert note.startswith("config.json says that the weights are quantized (")
    assert note.endswith("), but they are plain F32: its quantization settings are ignored.")


def test_two_groups_of_different_blocks_are_refused(tmp_path):
    settings = compressed()
    one = settings["config_groups"]["group_0"]
    two = {**one, "weights": {**one["weights"], "strategy": "block", "block_structure": [64, 64]}}
    entry, _ = codes((2, 2))
    entries = {"w.weight": entry, "w.weight_scale": floats(np.ones((2, 1)))}
    assert list(checkpoint(tmp_path, entries, {**settings, "config_groups": {"a": one, "b": one}})) == ["w.weight"]
    message = refusal(UnsupportedError, tmp_path, entries, {**settings, "config_groups": {"a": one, "b": two}})
    assert message.endswith("groups of different block_structure; wanted one for all FP8 weights")


@pytest.mark.parametrize("block", [[128], [128, 0], [128, 128, 128], ["128", "128"], [True, 2], "128x128", 128, {}, []])
def test_block_size_that_is_none(tmp_path, block):
    entry, _ = codes((2, 2))
    with pytest.raises(ModelError) as error:
        checkpoint(tmp_path, {"w": entry}, {**FINE_GRAINED, "weight_block_size": block})
    assert str(error.value) == (
        f"{tmp_path}/config.json: weight_block_size: wanted two positive integers, rows and columns of a block, got "
        f"{block!r}"
    )


@pytest.mark.parametrize("value", ["gptq", 4, ["fp8"], True])
def test_settings_that_are_none(tmp_path, value):
    entry, _ = codes((2, 2))
    with pytest.raises(ModelError, match=r"config\.json: quantization_config: wanted an object, got"):
        checkpoint(tmp_path, {"w": entry}, value)


@pytest.mark.parametrize("groups", [None, [], {}, {"a": None}, {"a": {}}, {"a": {"weights": None}}, {"a": [1]}])
def test_compressed_groups_that_are_none(tmp_path, groups):
    entry, values = codes((2, 2))
    entries = {"w": entry, "w_scale": floats(np.full((2, 1), 0.5))}
    found = checkpoint(tmp_path, entries, {**compressed(), "config_groups": groups})
    np.testing.assert_array_equal(read(found["w"]), values / 2)
