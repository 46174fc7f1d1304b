"""Sizes of llama.cpp's presets, computed from shapes, against the files that llama.cpp itself makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from command import TINY
from gguf import GGUFReader
from tiny_models import write_tiny
from zoo_specs import write_spec

from nsds_gguf import read
from nsds_gguf.allocate.presets import PRESETS, preset_bytes, preset_types
from nsds_gguf.conversion import convert
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp import llama
from nsds_gguf.records import Options

# Seventeen layers: enough for every rule by layer. Of the zoo: experts, a fused qkv, rows that fit no K-quant.
MODELS = ("many layers", "mixtral", "gpt-neox", "deepseek2")


def write_model(folder, name):
    if name == "many layers":
        return write_tiny(folder, replace(TINY, n_layers=17, n_heads=8, n_kv_heads=2))
    return write_spec(folder, name)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return the models, and as F32 GGUFs."""
    folder = tmp_path_factory.mktemp("originals")
    for name in MODELS:
        write_model(folder / name, name)
        path = folder / f"{name}.gguf"
        convert(folder / name, Options(uniform="F32"), output=path, verifying=VerifyOptions(enabled=False))
    return folder


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_types_and_bytes_are_those_of_llama_quantize(originals, tmp_path, name, preset):
    llama.quantize_preset(originals / f"{name}.gguf", tmp_path / "q.gguf", preset, 1)
    tensors = GGUFReader(tmp_path / "q.gguf").tensors
    model = read.open_model(originals / name)
    found = {tensor: kind.replace("IQ4_NL", "Q4_0") for tensor, kind in preset_types(model, preset).items()}
    assert found == {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert preset_bytes(model, preset) == sum(int(tensor.n_bytes) for tensor in tensors)
