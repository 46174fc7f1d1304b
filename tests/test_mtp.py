"""Layers of multi-token prediction, kept or dropped; ``test_converter`` compares those that are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mtp_models import NAMES, write_mtp
from zoo import zoo_tokens
from zoo_specs import SPECS, write_spec

from nsds_gguf.errors import UnsupportedError
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.read import open_model
from nsds_gguf.records import Model
from nsds_gguf.session.original import original_plan
from nsds_gguf.system.workers import Threads


def write(model: Model, path: Path) -> Path:
    write_gguf(model, original_plan(model), TensorQuantizers(), path, workers=Threads(1))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_the_same_with_and_without(name, tmp_path):
    kept, folder = open_model(write_mtp(tmp_path / "model", name)), tmp_path / "model"
    dropped, plain = open_model(folder, mtp="drop"), open_model(write_spec(tmp_path / "plain", name))
    assert kept.hparams == dropped.hparams == plain.hparams
    assert {t.name for t in dropped.tensors} == {t.name for t in plain.tensors}
    assert {key for key in dropped.metadata if "nextn" in key} == {key for key in plain.metadata if "nextn" in key}
    tokens = zoo_tokens(SPECS[name])[:32]
    rows = [logits(write(model, tmp_path / f"{i}.gguf"), tokens, n_threads=1) for i, model in enumerate((kept, plain))]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("name", ["qwen3.5", "glm4moe"])
def test_they_are_dropped_from_a_gguf_too(name, tmp_path):
    file = write(open_model(write_mtp(tmp_path / "model", name)), tmp_path / "kept.gguf")
    kept, dropped = open_model(file), open_model(file, mtp="drop")
    plain = open_model(write_spec(tmp_path / "plain", name))
    assert kept.hparams.n_layers == dropped.hparams.n_layers == plain.hparams.n_layers
    assert {t.name for t in dropped.tensors} == {t.name for t in plain.tensors} < {t.name for t in kept.tensors}
    architecture = plain.architecture
    assert dropped.metadata[f"{architecture}.block_count"].value == plain.hparams.n_layers
    assert logits(write(dropped, tmp_path / "dropped.gguf"), [5, 6, 7], n_threads=1).shape[0] == 3


def test_what_is_not_there_is_not_kept(tmp_path):
    with pytest.raises(UnsupportedError, match="--mtp keep: the weights hold none"):
        open_model(write_spec(tmp_path / "qwen", "qwen3.5"), mtp="keep")
    with pytest.raises(UnsupportedError, match=r"--mtp keep: llama\.cpp's llama has no place"):
        open_model(write_spec(tmp_path / "llama", "llama"), mtp="keep")
