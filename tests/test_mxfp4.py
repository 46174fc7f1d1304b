"""MXFP4 weights: blocks of 32 codes and a power of two, as gpt-oss stores them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from zoo_specs import write_spec

from nsds_gguf.errors import ModelError
from nsds_gguf.read import check_supported, open_model
from nsds_gguf.read.mxfp4 import with_mxfp4
from nsds_gguf.read.safetensors import read_header

# The sixteen values of E2M1 (OCP Microscaling Formats 1.0, table 5).
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
EXPERTS = "model.layers.{}.mlp.experts."


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the weights of blocks, one at a time."""
    found = np.empty((*scales.shape, 32), np.float32)
    for place in np.ndindex(scales.shape):
        for i, byte in enumerate(blocks[place]):
            for half, code in enumerate((int(byte) & 15, int(byte) >> 4)):
                found[place][2 * i + half] = VALUES[code] * 2.0 ** (int(scales[place]) - 127)
    return found.reshape(*scales.shape[:-1], -1)


def drawn(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a tensor of some shape."""
    random = np.random.default_rng(3)
    n_blocks = (*shape[:-1], shape[-1] // 32)
    return random.integers(0, 256, (*n_blocks, 16), np.uint8), random.integers(119, 125, n_blocks, np.uint8)


def test_rows_and_columns_are_the_products(tmp_path: Path) -> None:
    blocks, scales = drawn(2, 3, 96)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "w.safetensors")
    tensor = with_mxfp4(read_header(tmp_path / "w.safetensors"))["w_blocks"]
    wanted = unpacked(blocks, scales).reshape(6, 96)
    assert tensor.shape == (2, 3, 96)
    np.testing.assert_array_equal(tensor.values(slice(0, 6), slice(0, 96)), wanted)
    np.testing.assert_array_equal(tensor.values(slice(1, 4), slice(5, 70)), wanted[1:4, 5:70])
    np.testing.assert_array_equal(tensor.values(np.array([4, 1, 4]), slice(40, 44)), wanted[[4, 1, 4], 40:44])


def gpt_oss(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Write gpt-oss with experts in MXFP4, and return the folder and the experts' weights by name, unpacked."""
    path = write_spec(folder, "gpt-oss")
    weights, wanted = load_file(path / "model.safetensors"), {}
    for i in range(2):
        for name, shape in (("gate_up_proj", (8, 192, 64)), ("down_proj", (8, 64, 96))):
            del weights[f"{EXPERTS.format(i)}{name}"]
            blocks, scales = drawn(*shape)
            weights |= {f"{EXPERTS.format(i)}{name}_blocks": blocks, f"{EXPERTS.format(i)}{name}_scales": scales}
            wanted[f"{i} {name}"] = unpacked(blocks, scales)
    save_file(weights, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path, wanted


def test_gpt_oss_is_read_exactly(tmp_path: Path) -> None:
    path, wanted = gpt_oss(tmp_path / "model")
    check_supported(path, ["BF16", "U8"])
    model = open_model(path)
    assert not [note for note in model.notes if "quantiz" in note]
    for i in range(2):
        for role, experts in (
            ("gate", wanted[f"{i} gate_up_proj"][:, 0::2]),
            ("up", wanted[f"{i} gate_up_proj"][:, 1::2]),
            ("down", wanted[f"{i} down_proj"]),
        ):
            tensor = model.by_name[f"blk.{i}.ffn_{role}_exps.weight"]
            assert tensor.dtype == "BF16"
            np.testing.assert_array_equal(tensor.load(), experts)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    blocks, scales = drawn(4, 64)
    save_file({"w_blocks": blocks, "w_scales": scales[:3]}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"tensor w_scales: wanted shape \(4, 2\) for w_blocks, got \(3, 2\)"):
        with_mxfp4(read_header(tmp_path / "w.safetensors"))
