"""Which weights of a folder are read, what is said of the others, and what a folder without any is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import SPECS, safetensors_bytes, tiny_config, tiny_weights, write_model

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.read import open_model
from nsds_gguf.read.checkpoint import read_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensor(value: float, name: str = "a") -> bytes:
    return safetensors_bytes({name: np.full((2, 2), value, np.float32)})


def index(**places: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": places}).encode()


def shard(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def read(
    folder: Path, files: dict[str, bytes], config: dict[str, object] | None = None
) -> tuple[dict[str, float], str]:
    """Write files, and return the first number of every tensor that is read, and the notes."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = read_checkpoint(folder, config or {})
    values = {name: float(tensor.rows(slice(0, 1))[0, 0]) for name, tensor in found.tensors.items()}
    return values, " ".join(found.notes)


TWO = {shard(1, 2): tensor(1), shard(2, 2): tensor(2, "b")}
TWO_INDEX = index(a=shard(1, 2), b=shard(2, 2))

# Files, what is read of them, and what is said.
CHOICES = {
    "one file": ({SINGLE: tensor(1)}, {"a": 1}, ""),
    "one file before an index whose shards are gone": (
        {SINGLE: tensor(1), INDEX: TWO_INDEX},
        {"a": 1},
        f"Weights are read from {SINGLE}, as transformers would; 1 file is ignored: {INDEX}.",
    ),
    "one file before the shards of another save": (
        {SINGLE: tensor(7), INDEX: TWO_INDEX, **TWO},
        {"a": 7},
        f"Weights are read from {SINGLE}, as transformers would; 3 files are ignored: {shard(1, 2)}, {shard(2, 2)}, "
        f"{INDEX}.",
    ),
    "other formats beside": (
        {SINGLE: tensor(1), "pytorch_model.bin": b"", "consolidated.safetensors": tensor(3), "tf_model.h5": b"",
         "flax_model.msgpack": b"", "training_args.bin": b"", "optimizer.pt": b"", "adapter_model.safetensors": b""},
        {"a": 1},
        f"Weights are read from {SINGLE}, as transformers would; 4 files are ignored: consolidated.safetensors, "
        "flax_model.msgpack, pytorch_model.bin, … (1 more).",
    ),
    "shards of an older save beside": (
        {INDEX: TWO_INDEX, **TWO, shard(1, 3): tensor(8), shard(2, 3): tensor(9), shard(3, 3): tensor(9)},
        {"a": 1, "b": 2},
        f"Weights are read from {INDEX}, as transformers would; 3 files are ignored: {shard(1, 3)}, {shard(2, 3)}, "
        f"{shard(3, 3)}.",
    ),
    "an index that names another shard": (
        {INDEX: index(a=shard(2, 2), b=shard(2, 2), c=shard(1, 2)), **TWO},
        {"a": 1, "b": 2},
        f"{INDEX} is wrong about 1 tensors (a): the shards count. "
        f"{INDEX} names 1 tensors that are in no shard: c.",
    ),
    "all shards without an index": (
        TWO,
        {"a": 1, "b": 2},
        f"Weights are read from {shard(1, 2)} … {shard(2, 2)}: all 2 shards are present, but no index.",
    ),
    "one shard of one without an index": (
        {shard(1, 1): tensor(1)},
        {"a": 1},
        f"Weights are read from {shard(1, 1)}: all 1 shards are present, but no index.",
    ),
    "all shards, and some of another save": (
        {**TWO, shard(2, 3): tensor(9)},
        {"a": 1, "b": 2},
        f"Weights are read from {shard(1, 2)} … {shard(2, 2)}: all 2 shards are present, but no index; 1 file is "
        f"ignored: {shard(2, 3)}.",
    ),
    "another name": (
        {"diffusion_pytorch_model.safetensors": tensor(4)},
        {"a": 4},
        "Weights are read from diffusion_pytorch_model.safetensors: the folder holds no model.safetensors and no other "
        "weights.",
    ),
    "the same tensor in two shards": (
        {INDEX: TWO_INDEX, shard(1, 2): tensor(1), shard(2, 2): tensor(1)},
        {"a": 1},
        f"{INDEX} names 1 tensors that are in no shard: b.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "wanted", "note"), CHOICES.values(), ids=CHOICES)
def test_the_weights_that_are_read(tmp_path, files, wanted, note):
    assert read(tmp_path, files) == (wanted, note)


def test_a_file_that_config_names(tmp_path):
    files = {SINGLE: tensor(1), "other.safetensors": tensor(2)}
    values, note = read(tmp_path, files, {"transformers_weights": "other.safetensors"})
    assert values == {"a": 2}
    assert note.startswith("Weights are read from other.safetensors: config.json names it in transformers_weights")
    with pytest.raises(ModelError, match=r"transformers_weights '\.\./x\.safetensors'; wanted the name of a file"):
        read(tmp_path, {}, {"transformers_weights": "../x.safetensors"})


def test_shards_of_different_saves(tmp_path):
    with pytest.raises(ModelError, match=r"holds tensor a, and model-00001-of-00002\.safetensors a different one"):
        read(tmp_path, {INDEX: TWO_INDEX, shard(1, 2): tensor(1), shard(2, 2): tensor(2)})


def test_a_missing_shard_with_another_format_beside(tmp_path):
    with pytest.raises(ModelError, match=r"shard is missing; .* or remove model\.safetensors\.index\.json to use pyt"):
        read(tmp_path, {INDEX: TWO_INDEX, shard(1, 2): tensor(1), "pytorch_model.bin": b""})


def test_what_was_left_aside_is_said_when_tensors_are_missing(tmp_path):
    """As some trainers leave them: a nearly empty file beside the real shards."""
    spec = SPECS["llama"]
    folder = write_model(tmp_path / "model", tiny_config(spec), tiny_weights(spec), n_shards=2)
    (folder / SINGLE).write_bytes(tensor(1))
    with pytest.raises(ModelError) as error:
        open_model(folder)
    assert str(error.value).endswith(
        "unused tensors in the weights: a; the checkpoint is incomplete or config.json belongs to another model "
        "(Weights "
        f"are read from {SINGLE}, as transformers would; 3 files are ignored: {shard(1, 2)}, {shard(2, 2)}, "
        f"{INDEX}.)"
    )


# Folders that are something else


def lay(folder: Path, *names: str) -> Path:
    """Write empty files, folders for names that end in a slash."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(parents=True, exist_ok=True) if name.endswith("/") else path.write_text("{}")
    return folder


FOREIGN = {
    "a DeepSpeed checkpoint": (
        ("global_step500/", "zero_to_fp32.py", "latest"),
        r"holds a training checkpoint of DeepSpeed \(global_step500\): .*`python zero_to_fp32.py {folder} OUT`",
    ),
    "FSDP": (("pytorch_model_fsdp_0/.metadata",), r"`accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT`"),
    "FSDP itself": (("__0_0.distcp", ".metadata"), r"`accelerate merge-weights {folder} OUT`"),
    "checkpoints in subfolders": (
        ("checkpoint-500/config.json", "checkpoint-1500/config.json", "trainer_state.json"),
        "holds 2 training checkpoints in subfolders: .* the latest is {folder}/checkpoint-1500",
    ),
    "a pipeline of diffusers": (
        ("model_index.json", "text_encoder/config.json"),
        "is a diffusers pipeline, not a language model: pass {folder}/text_encoder",
    ),
    "sentence-transformers": (
        ("modules.json", "0_Transformer/config.json", "0_Transformer/model.safetensors"),
        "with its weights in a subfolder: pass {folder}/0_Transformer",
    ),
    "the Hub's cache": (("snapshots/abc/config.json", "refs/main"), "the Hub cache: pass {folder}/snapshots/abc"),
    "a model below": (("final/config.json",), "holds no weights itself: pass {folder}/final"),
    "state of a training": (("optimizer.pt", "rng_state.pth"), r"holds a training state \(optimizer.pt\)"),
    "an ONNX model": (("model.onnx",), "holds model.onnx but no model.safetensors: an ONNX model"),
}


@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize(("names", "message"), FOREIGN.values(), ids=FOREIGN)
def test_folders_of_something_else(tmp_path, names, message, has_config):
    folder = lay(tmp_path.resolve() / "model", *names)
    if has_config:
        (folder / "config.json").write_text(json.dumps(tiny_config(SPECS["llama"])))
    elif "ONNX" in message:
        return
    with pytest.raises(UnsupportedError, match=message.format(folder=folder)):
        open_model(folder)


def test_an_adapter_names_its_base_and_how_to_merge(tmp_path):
    folder = lay(tmp_path.resolve() / "lora", "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/Base-7B"}))
    for config in (None, tiny_config(SPECS["llama"])):
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError) as error:
            open_model(folder)
        assert str(error.value) == (
            f"{folder}: holds an adapter of acme/Base-7B, not a model: merge it into its base model: "
            f"`AutoPeftModelForCausalLM.from_pretrained('{folder}').merge_and_unload().save_pretrained(OUT)` with "
            "peft, then convert OUT"
        )


# Weights that are not plain


def changed(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    spec = SPECS["llama"]
    weights = tiny_weights(spec)
    change(weights)
    return write_model(folder / "model", tiny_config(spec), weights)


def test_adapters_within_the_weights_are_named(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    folder = changed(tmp_path, lambda weights: weights.update({name: np.zeros((4, 64), np.float32)}))
    with pytest.raises(UnsupportedError, match=r"hold an adapter that is not merged .*lora_A.*merge_and_unload"):
        open_model(folder)


def test_placeholders_of_zero3_are_named(tmp_path):
    def empty(weights: dict[str, np.ndarray]) -> None:
        weights.update({name: np.zeros(0, np.float32) for name in weights})

    with pytest.raises(ModelError, match=r"21 tensors are empty .*ZeRO-3.*stage3_gather_16bit.*zero_to_fp32\.py"):
        open_model(changed(tmp_path, empty))


def test_missing_tensors_stand_beside_what_is_there(tmp_path):
    def rename(weights: dict[str, np.ndarray]) -> None:
        for name in list(weights):
            weights[name.replace("self_attn", "attn")] = weights.pop(name)

    with pytest.raises(ModelError) as error:
        open_model(changed(tmp_path, rename))
    assert str(error.value) == (
        "tensors missing from the weights: model.layers.0.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight, … (5 more); unused "
        "tensors in the weights: model.layers.0.attn.q_proj.weight, model.layers.0.attn.k_proj.weight, "
        "model.layers.0.attn.v_proj.weight, … (5 more); the checkpoint is incomplete or config.json belongs to another "
        "model"
    )


W = "model.layers.0.mlp.up_proj"
PACKED = {
    "MLX": ({f"{W}.weight": "U32", f"{W}.scales": "F16", f"{W}.biases": "F16"}, "MLX", "mlx_lm.convert --hf-path"),
    "GPTQ": ({f"{W}.qweight": "I32", f"{W}.qzeros": "I32", f"{W}.g_idx": "I32"}, "GPTQ", "use the original checkpoint"),
    "AWQ": ({f"{W}.qweight": "I32", f"{W}.qzeros": "I32"}, "AWQ or GPTQ", "use the original checkpoint"),
    "bitsandbytes 4": ({f"{W}.weight": "U8", f"{W}.weight.absmax": "F32"}, "bitsandbytes", r"dequantize\(\)"),
    "bitsandbytes 8": ({f"{W}.weight": "I8", f"{W}.SCB": "F32"}, "bitsandbytes", r"dequantize\(\)"),
    "HQQ": ({f"{W}.W_q": "U8"}, "HQQ", "use the original checkpoint"),
    "compressed-tensors": ({f"{W}.weight_packed": "I32"}, "compressed-tensors", "use the original checkpoint"),
    "NVFP4": ({f"{W}.weight": "U8", f"{W}.weight_scale_2": "F32"}, "modelopt NVFP4", "use the original checkpoint"),
    "EETQ": ({f"{W}.weight": "I8", f"{W}.weight_scales": "F16"}, "EETQ", "use the original checkpoint"),
    "unknown": ({f"{W}.weight": "I8"}, "codes of I8", "use the original checkpoint"),
}
_SIZES = {"U32": 4, "I32": 4, "F32": 4, "F16": 2, "U8": 1, "I8": 1}


@pytest.mark.parametrize(("tensors", "method", "step"), PACKED.values(), ids=PACKED)
def test_packed_weights_are_named(tmp_path, tensors, method, step):
    header, begin = {}, 0
    for name, dtype in tensors.items():
        end = begin + 4 * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": [2, 2], "data_offsets": [begin, end]}
        begin = end
    raw = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(begin))
    with pytest.raises(UnsupportedError, match=rf"the weights are quantized \({method}: {W}\..*{step}"):
        read_checkpoint(tmp_path, {})
