"""Logits of llama.cpp on our F32 GGUF equal those of transformers on the checkpoint, and errors would show.

transformers' logits are recorded by ``tools/check/check_logits.py``, which also asserts what only transformers can
tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutations
from numpy.typing import NDArray
from zoo import digest, packed, unpacked, zoo_config, zoo_shapes, zoo_tokens
from zoo_logits import BITE, GOLDEN, difference, model_logits, moves, recorded
from zoo_specs import SPECS, write_spec

from nsds_gguf.conversion import convert
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.read import open_model, supported_classes
from nsds_gguf.read.architectures.families import FAMILIES
from nsds_gguf.read.config import canonical, text_model
from nsds_gguf.records import Options
from nsds_gguf.session.run import Run


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("name", SPECS)
def test_llama_cpp_computes_what_transformers_computes(
    name: str, golden: dict[str, NDArray[np.generic]], tmp_path: Path
) -> None:
    spec = SPECS[name]
    fingerprint = digest(spec, zoo_config(name), zoo_shapes(name))
    assert golden[f"{name}/digest"] == fingerprint, "the model changed: run tools/check/check_logits.py --record"
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    rows = model_logits(model, tmp_path / "model.gguf", zoo_tokens(spec))
    largest = float(golden[f"{name}/largest"])
    assert difference(recorded(rows), golden[f"{name}/logits"], largest) <= spec.tolerance
    best = golden[f"{name}/best"]
    assert np.mean(best >= 0) > 0.75
    np.testing.assert_array_equal(rows.argmax(axis=1)[best >= 0], best[best >= 0])


@pytest.mark.parametrize("source_class", supported_classes())
def test_the_whole_conversion_writes_the_file_that_is_compared(source_class: str, tmp_path: Path) -> None:
    name = next(name for name, spec in SPECS.items() if spec.source_class == source_class)
    folder = write_spec(tmp_path / "checkpoint", name)
    options = Options(uniform="F32", rounding="rtn", calibration="none")
    convert(folder, options, output=tmp_path / "converted.gguf", verifying=VerifyOptions(enabled=False), run=Run(1))
    model_logits(open_model(folder), tmp_path / "compared.gguf", zoo_tokens(SPECS[name]))
    assert (tmp_path / "converted.gguf").read_bytes() == (tmp_path / "compared.gguf").read_bytes()


def architecture_of(name: str) -> str:
    """Return llama.cpp's name for what a spec converts to; empty for the language model of a larger model."""
    config, source_class = text_model(zoo_config(name))[1], SPECS[name].source_class
    families = [family for family in FAMILIES if source_class in family.classes]
    chosen = (family for family in families if family.variant(canonical(config, family)))
    return next((family.architecture for family in chosen), "")


ARCHITECTURES = {name: architecture_of(name) for name in SPECS}


@pytest.mark.parametrize("architecture", sorted({family.architecture for family in FAMILIES}))
def test_every_error_moves_the_logits(architecture: str, tmp_path: Path) -> None:
    moved: dict[str, float] = {}  # by each error in the first model that can have it
    for name in (name for name, found in ARCHITECTURES.items() if found == architecture):
        model = open_model(write_spec(tmp_path / name, name))
        moved |= moves(model, SPECS[name], tmp_path / name, known=moved)
    assert len(moved) >= 5
    assert {error: by for error, by in moved.items() if by <= BITE} == {}


# One architecture that must be tested with the error; others may be.
ERRORS = {
    "attention.clamp_kqv left out": "olmo",
    "attention.layer_norm_epsilon doubled": "gpt2",
    "attention.layer_norm_rms_epsilon doubled": "llama",
    "attention.scale left out": "granite",
    "attention.sliding_window doubled": "olmo2",
    "attention.temperature_scale left out": "mistral3",
    "attn_gate: heads in another order": "qwen3next",
    "attn_k.bias left out": "qwen2",
    "attn_k_norm of ones": "qwen3",
    "attn_k_b: heads in another order": "deepseek2",
    "attn_k_norm: heads in another order": "stablelm",
    "attn_logit_softcapping left out": "gemma2",
    "attn_output not transposed": "gpt2",
    "attn_output.bias left out": "llama",
    "attn_q.bias left out": "qwen2",
    "attn_q_norm of ones": "qwen3",
    "attn_q_norm: heads in another order": "command-r",
    "attn_qkv.bias left out": "gptneox",
    "attn_sinks left out": "gpt-oss",
    "attn_v.bias left out": "qwen2",
    "attn_v_b: heads in another order": "deepseek2",
    "embedding scaled by the converter too": "gemma",
    "embedding_scale left out": "granite",
    "expert_used_count doubled": "qwen3moe",
    "exp_probs_b.bias left out": "deepseek2",
    "expert_weights_scale left out": "deepseek2",
    "ffn_down.bias left out": "phi2",
    "ffn_down_exps in another order": "olmoe",
    "ffn_gate_inp in another order": "granitemoe",
    "ffn_gate_inp_shexp left out": "qwen2moe",
    "final_logit_softcapping left out": "gemma2",
    "gate and up exchanged": "internlm2",
    "gate and up of the shared expert exchanged": "granitemoe",
    "gates and ups of experts exchanged": "llama",
    "halves of ffn_up exchanged": "phi3",
    "logit_scale halved": "cohere2",
    "long and short rope factors exchanged": "phi3",
    "norms behind the blocks exchanged": "gemma3",
    "norms exchanged": "llama",
    "norms without their 1": "gemma",
    "output.bias left out": "phi2",
    "output_norm.bias left out": "starcoder2",
    "position_embd one row late": "gpt2",
    "q and k biases in the other order": "llama",
    "q and k in the other order": "internlm2",
    "q, k, v by head": "gptneox",
    "q, k, v taken for k, v, q": "phi3",
    "residual_scale left out": "granite",
    "rope factors of ones": "phi3",
    "rope.dimension_count left out": "stablelm",
    "rope.freq_base 25 % larger": "smollm3",
    "rope.freq_base left out": "llama",
    "rope.freq_base_swa left out": "gemma3",
    "rope.scaling.attn_factor left out": "llama",
    "rope.scaling.factor 5 % larger": "qwen3",
    "rope.scaling.factor left out": "qwen2",
    "rope.scaling.original_context_length left out": "llama",
    "rope.scaling.original_context_length on the other side": "phi3",
    "rope.scaling.type left out": "qwen3",
    "rope.scaling.yarn_log_multiplier left out": "deepseek2",
    "rope_freqs halved": "llama",
    "rope_freqs left out": "granite",
    "shortconv.conv backwards": "lfm2",
    "ssm_a as its logarithm": "mamba",
    "ssm_conv1d backwards": "granitehybrid",
    "ssm_d left out": "mamba",
    "ssm_out: heads in another order": "qwen35",
    "the other gating": "deepseek2",
    "the other residual": "gptneox",
    "thirds of shortconv.in_proj turned": "lfm2moe",
    "tied": "llama",
    "untied": "llama",
    "wqkv split as q, then k, then v": "internlm2",
    "xielu.alpha_n one larger": "apertus",
    "xielu.alpha_p one larger": "apertus",
    "xielu.beta one larger": "apertus",
}


def test_errors_are_tried_where_they_can_happen(tmp_path: Path) -> None:
    tried = {
        (error, architecture)
        for name, architecture in ARCHITECTURES.items()
        for error in mutations(open_model(write_spec(tmp_path / name, name)))
    }
    assert set(ERRORS.items()) - tried == set()
    assert {error for error, _ in tried if not error.endswith(("of ones", ".bias left out"))} - set(ERRORS) == set()


def test_every_class_and_rope_kind_is_covered() -> None:
    assert {spec.source_class for spec in SPECS.values()} == set(supported_classes())
    covered = {(architecture, rope_kind(zoo_config(name))) for name, architecture in ARCHITECTURES.items()}
    wanted = {(family.architecture, kind) for family in FAMILIES for kind in family.rope_kinds}
    assert wanted - covered == set()


def rope_kind(config: dict[str, Any]) -> str:
    """Return the kind of rope of a config.json in either form."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    return rope.get("rope_type") or rope.get("type") or "default"


def test_shapes_are_packed_without_loss() -> None:
    shapes = {f"layers.{i}.experts.{j}.up": (3, 2) for i in (1, 2) for j in range(3)} | {"norm": (4,)}
    assert packed(shapes) == {"layers.{}.experts.{}.up": [[[1, 2], [0, 1, 2]], [3, 2]], "norm": [[], [4]]}
    assert unpacked(packed(shapes)) == shapes
    shapes = {"layers.0.up": (3, 2), "layers.1.up": (3, 4), "layers.2.up": (3, 2)}
    assert packed(shapes) == {"layers.{}.up": {"by shape": [[[[0, 2]], [3, 2]], [[[1]], [3, 4]]]}}
    assert unpacked(packed(shapes)) == shapes
    with pytest.raises(ValueError, match="different shapes"):
        packed({"layers.0.experts.0.up": (3, 2), "layers.1.experts.1.up": (3, 2)})
