"""Vision parts (mmproj): against llama.cpp's converter, by hand, through the command line, and loaded by llama.cpp.

The record of the converter comes from tools/check/check_projectors.py.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import PLAIN, call, message
from converter_record import convert_ours, read_entry
from gguf import GGUFReader
from projector_record import as_theirs, golden, projector_ours, projector_record
from projectors import EMBD, PATCH, PROJECTOR_SPECS, TEXT, projector_config, projector_weights, write_projector_folder
from tiny_models import SPECS, write_model, write_tiny

from nsds_gguf.errors import ModelError, UnsupportedError
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.quantize.write import projector_bytes, write_projector
from nsds_gguf.read.projector import PROJECTOR_TYPES, open_projector
from nsds_gguf.system.workers import Threads

RECORD = golden()
NOT_CONVERTED = {"llava-clip"}  # llama.cpp's converter knows LLaVA's class with Pixtral's encoder only


# --- against the converter ----------------------------------------------------------------------------------------


def test_the_record_has_every_model_in_every_type():
    assert set(RECORD) == {
        f"{name} {kind}" for name in set(PROJECTOR_SPECS) - NOT_CONVERTED for kind in PROJECTOR_TYPES
    }


@pytest.mark.parametrize("case", RECORD)
def test_our_file_is_the_converters(case, tmp_path):
    name, kind = case.split()
    folder = write_projector_folder(tmp_path / name, name)
    path = projector_ours(folder, tmp_path / "ours.gguf", kind)
    assert projector_record(as_theirs(read_entry(path), RECORD[case])) == RECORD[case]
    assert path.stat().st_size == projector_bytes(open_projector(folder, kind))


# --- by hand ------------------------------------------------------------------------------------------------------


def opened(tmp_path, name, kind="F32"):
    """Return the checkpoint's tensors as float32, and ours by GGUF name."""
    spec = replace(PROJECTOR_SPECS[name], dtype="F32")
    write_projector_folder(tmp_path / name, name)
    write_model(tmp_path / name, projector_config(spec), projector_weights(spec))
    config = json.loads((tmp_path / name / "config.json").read_text())
    if spec.tokens:
        added = {str(number): {"content": text} for text, number in spec.tokens.items()}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert config["architectures"]
    model = open_projector(tmp_path / name, kind)
    return projector_weights(spec), {tensor.name: tensor.load() for tensor in model.tensors}


def test_gemma3(tmp_path):
    stored, ours = opened(tmp_path, "gemma3")
    assert np.array_equal(ours["mm.soft_emb_norm.weight"], stored["multi_modal_projector.mm_soft_emb_norm.weight"] + 1)
    assert np.array_equal(
        ours["mm.input_projection.weight"], stored["multi_modal_projector.mm_input_projection_weight"]
    )
    layer = "vision_tower.vision_model.encoder.layers.1."
    assert np.array_equal(ours["v.blk.1.ffn_up.weight"], stored[f"{layer}mlp.fc1.weight"])
    assert np.array_equal(ours["v.blk.1.attn_out.bias"], stored[f"{layer}self_attn.out_proj.bias"])


def test_gemma4_unfolds_patches_and_keeps_both_position_tables(tmp_path):
    stored, ours = opened(tmp_path, "gemma4")
    pixels = stored["model.vision_tower.patch_embedder.input_proj.weight"].reshape(EMBD, PATCH, PATCH, 3)
    assert np.array_equal(ours["v.patch_embd.weight"], pixels.transpose(0, 3, 1, 2))
    tables = stored["model.vision_tower.patch_embedder.position_embedding_table"]
    assert np.array_equal(ours["v.position_embd.weight"], tables) and tables.shape == (2, 16, EMBD)
    assert np.array_equal(ours["v.std_scale"], stored["model.vision_tower.std_scale"])
    tensor = open_projector(tmp_path / "gemma4").tensors[-5]
    assert tensor.name == "v.patch_embd.weight"
    matrix, some = tensor.rows(slice(None)), np.array([100, 3, 41, 42])
    assert np.array_equal(tensor.rows(some), matrix[some]) and np.array_equal(tensor.rows(slice(50, 99)), matrix[50:99])


def test_pixtral_rotates_adjacent_channels_and_brings_the_break(tmp_path):
    stored, ours = opened(tmp_path, "mistral3")
    rows = stored["vision_tower.transformer.layers.0.attention.q_proj.weight"]
    pairs = [half * 8 + i + head * 16 for head in range(4) for i in range(8) for half in range(2)]
    assert np.array_equal(ours["v.blk.0.attn_q.weight"], rows[pairs])
    assert np.array_equal(
        ours["v.blk.0.attn_v.weight"], stored["vision_tower.transformer.layers.0.attention.v_proj.weight"]
    )
    assert np.array_equal(ours["v.token_embd.img_break"], stored["language_model.model.embed_tokens.weight"][12])
    assert ours["v.token_embd.img_break"].shape == (TEXT,)


def test_qwen_splits_queries_keys_values_and_frames(tmp_path):
    stored, ours = opened(tmp_path, "qwen2.5-vl")
    for i, name in enumerate("qkv"):
        part = slice(i * EMBD, (i + 1) * EMBD)
        assert np.array_equal(ours[f"v.blk.1.attn_{name}.weight"], stored["visual.blocks.1.attn.qkv.weight"][part])
        assert np.array_equal(ours[f"v.blk.1.attn_{name}.bias"], stored["visual.blocks.1.attn.qkv.bias"][part])
    frames = stored["visual.patch_embed.proj.weight"]
    assert frames.shape == (EMBD, 3, 2, PATCH, PATCH)
    assert np.array_equal(ours["v.patch_embd.weight"], frames[:, :, 0])
    assert np.array_equal(ours["v.patch_embd.weight.1"], frames[:, :, 1])


def test_llava_with_clip_ends_at_the_layer_that_the_projector_reads(tmp_path):
    stored, ours = opened(tmp_path, "llava-clip")
    model = open_projector(tmp_path / "llava-clip")
    keys = {name: entry.value for name, entry in model.metadata.items()}
    assert keys["clip.projector_type"] == "mlp" and keys["clip.use_gelu"] is False
    assert keys["clip.vision.block_count"] == 2 and keys["clip.vision.feature_layer"] == [2]  # -2 of three layers
    assert not [name for name in ours if name.startswith(("v.blk.2.", "v.post_ln"))]
    assert np.array_equal(ours["mm.2.weight"], stored["multi_modal_projector.linear_2.weight"])
    embedding = stored["vision_tower.vision_model.embeddings.class_embedding"]
    assert np.array_equal(ours["v.class_embd"], embedding)


def test_types_of_a_file(tmp_path):
    folder = write_projector_folder(tmp_path / "gemma3", "gemma3")
    types = open_projector(folder, "Q8_0").types
    assert types["v.blk.0.attn_q.weight"] == "Q8_0"
    assert types["v.blk.0.ffn_down.weight"] == "F16"  # rows of 80 are not whole blocks
    assert types["v.patch_embd.weight"] == types["v.position_embd.weight"] == types["v.blk.0.ln1.weight"] == "F32"
    assert types["mm.input_projection.weight"] == "F16"
    assert open_projector(folder, "F32").types["mm.input_projection.weight"] == "F16"


@pytest.mark.parametrize("change", [
    lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),  # as transformers 5 saves it
    lambda name: name if name.startswith("language_model") else f"model.{name}",
    lambda name: f"_orig_mod.{name}",
], ids=["transformers 5", "model.", "torch.compile"])  # fmt: skip
def test_other_names_give_the_same_file(change, tmp_path):
    spec = PROJECTOR_SPECS["gemma3"]
    wanted = projector_ours(write_projector_folder(tmp_path / "a", "gemma3"), tmp_path / "a.gguf", "F16")
    folder = write_projector_folder(tmp_path / "b", "gemma3")
    write_model(folder, projector_config(spec), {change(name): rows for name, rows in projector_weights(spec).items()})
    found = projector_ours(folder, tmp_path / "b.gguf", "F16")
    assert read_entry(found).tensors == read_entry(wanted).tensors


# --- refusals -----------------------------------------------------------------------------------------------------


def edited(tmp_path, name, config=None, drop="", extra=""):
    """Write a model with changed settings, without a tensor, or with one more."""
    spec = PROJECTOR_SPECS[name]
    folder = write_projector_folder(tmp_path / name, name)
    weights = {key: rows for key, rows in projector_weights(spec).items() if key != drop}
    if extra:
        weights[extra] = np.ones((2, 2), np.float32)
    settings = projector_config(spec)
    for key, value in (config or {}).items():
        settings[key] = {**(settings[key] or {}), **value} if isinstance(value, dict) else value
    tokenizer = (folder / "tokenizer_config.json").read_text()
    write_model(folder, settings, weights)
    (folder / "tokenizer_config.json").write_text(tokenizer)
    return folder


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("gemma3", {"drop": "multi_modal_projector.mm_soft_emb_norm.weight"},
         "tensors missing from the weights: multi_modal_projector.mm_soft_emb_norm.weight"),
        ("gemma3", {"extra": "multi_modal_projector.extra.weight"},
         "projector gemma3, as config.json describes it, has no place for: multi_modal_projector.extra.weight"),
        ("gemma3", {"config": {"vision_config": {"hidden_act": "relu"}}},
         "vision_config.hidden_act 'relu' is not supported for gemma3; known: gelu_pytorch_tanh, gelu"),
        ("gemma3", {"config": {"vision_config": {"patch_size": 0}}},
         "vision_config.patch_size: wanted a positive integer, got 0"),
        ("gemma3", {"config": {"vision_config": {"model_type": "moonvit"}}},
         "Gemma3ForConditionalGeneration with a vision encoder of type 'moonvit'; known: siglip_vision_model"),
        ("gemma3", {"config": {"vision_config": {"intermediate_size": 96}}}, "wanted shape (96, 64), got (80, 64)"),
        ("gemma3", {"config": {"architectures": ["LlavaNextForConditionalGeneration"]}},
         "no projector is known for LlavaNextForConditionalGeneration; known: Gemma3ForConditionalGeneration, "),
        ("gemma4", {"config": {"vision_config": {"use_clipped_linears": True}}},
         "vision_config.use_clipped_linears True: supported is False"),
        ("gemma4", {"config": {"audio_config": {"hidden_size": 8}}}, "audio_config: the file needs an audio encoder"),
        ("pixtral", {"config": {"vision_feature_layer": -2}}, "vision_feature_layer -2: llama.cpp's projector pixtral"),
        ("qwen2.5-vl", {"config": {"vision_config": {"fullatt_block_indexes": [0, 2]}}},
         "fullatt_block_indexes [0, 2]: llama.cpp supports every n-th layer only"),
        ("qwen3-vl", {"config": {"vision_config": {"deepstack_visual_indexes": [9]}}},
         "deepstack_visual_indexes: wanted layers, got [9]"),
        ("qwen3-vl", {"config": {"vision_config": {"temporal_patch_size": 1}}}, "temporal_patch_size 1: llama.cpp"),
        ("llava-clip", {"config": {"vision_feature_layer": [-2, -5]}}, "vision_feature_layer [-2, -5]: llama.cpp"),
    ],
)  # fmt: skip
def test_refusals_name_the_reason(name, edit, said, tmp_path):
    with pytest.raises(ModelError) as error:
        open_projector(edited(tmp_path, name, **edit))
    assert said in str(error.value)


def test_refusals_of_folders(tmp_path):
    folder = write_projector_folder(tmp_path / "gemma3", "gemma3")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]}')
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: image_mean: wanted three numbers, got \[0\.5, 0"):
        open_projector(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is missing"):
        open_projector(folder)
    pixtral = write_projector_folder(tmp_path / "pixtral", "pixtral")
    (pixtral / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer has no token \[IMG_BREAK\]"):
        open_projector(pixtral)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no vision_config, so no projector"):
        open_projector(write_tiny(tmp_path / "llama", SPECS["llama"]))


def test_a_weight_beyond_float16_is_refused_with_the_remedy(tmp_path):
    spec = PROJECTOR_SPECS["gemma3"]
    folder, weights = write_projector_folder(tmp_path / "a", "gemma3"), projector_weights(spec)
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    weights[name] = np.full_like(weights[name], 1e5)
    write_model(folder, projector_config(spec), weights)
    with pytest.raises(ModelError, match=r"fc1\.weight: weights up to 100000 overflow F16: .*--mmproj F32$"):
        projector_ours(folder, tmp_path / "a.gguf", "F16")
    projector_ours(folder, tmp_path / "a.gguf", "F32")


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def gemma3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_projector_folder(tmp_path / "gemma3", "gemma3")


QUIET = ("--no-verify", "--threads", 1)


def test_convert_writes_it_beside_the_output(gemma3, tmp_path):
    outcome = call("convert", "gemma3", *PLAIN, *QUIET, "-o", "a.gguf", "--mmproj", "--json", "a.json")
    path = tmp_path / "mmproj-Gemma3-F16.gguf"
    assert outcome.code == 0, outcome
    assert f"{path.name}: 0.32 MiB" in outcome.out
    written = json.loads((tmp_path / "a.json").read_text())[0]["projector"]
    assert written == {"path": path.name, "bytes": path.stat().st_size}
    assert projector_record(read_entry(path)) == RECORD["gemma3 F16"]
    assert sorted(file.name for file in tmp_path.glob("*.gguf")) == ["a.gguf", path.name]


def test_the_memory_to_fit_holds_it_too(gemma3, tmp_path):
    fit = ("--fit", "40MiB", "--ctx-size", 512, "--rounding", "rtn", "--threads", 1)
    budgets = []
    for more in ((), ("--mmproj",), ("--mmproj", "q8_0"), ("--mmproj", "--projector", "p.gguf")):
        (tmp_path / "p.gguf").write_bytes(b"GGUF" + bytes(96))
        outcome = call("convert", "gemma3", *fit, "--dry-run", "--json", "a.json", *more)
        assert outcome.code == 0, outcome
        budgets.append(json.loads((tmp_path / "a.json").read_text())["recipe"]["target"]["value"])
    assert call("convert", "gemma3", *PLAIN, *QUIET, "-o", "a.gguf", "--mmproj").code == 0
    n_bytes = (tmp_path / "mmproj-Gemma3-F16.gguf").stat().st_size
    assert budgets[0] - budgets[1] == n_bytes > budgets[0] - budgets[2] > 0 and budgets[0] - budgets[3] == 100


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_both_parts_of_qwen_vl(name, tmp_path, monkeypatch):
    """The language model is quantized to a budget, the vision part as it is."""
    monkeypatch.chdir(tmp_path)
    write_projector_folder(tmp_path / name, name)
    options = ("--target-bpw", 10, "--calibration", "random", "--rounding", "rtn")
    outcome = call("convert", name, *options, *QUIET, "-o", "a.gguf", "--mmproj")
    assert outcome.code == 0, outcome
    (file,) = tmp_path.glob("mmproj-*-F16.gguf")
    assert projector_record(as_theirs(read_entry(file), RECORD[f"{name} F16"])) == RECORD[f"{name} F16"]
    types = {tensor.type for tensor in read_gguf_header(tmp_path / "a.gguf").tensors}
    assert "Q8_0" in types or types & {"Q4_0", "Q5_0", "Q5_1", "IQ4_NL"}
    assert len(logits(tmp_path / "a.gguf", [1, 2, 3], n_threads=1)) == 3


def test_it_is_replaced_with_force_only_and_refused_before_the_work(gemma3, tmp_path):
    path = tmp_path / "mmproj-Gemma3-Q8_0.gguf"
    path.write_bytes(b"")
    command = ("convert", "gemma3", *PLAIN, *QUIET, "-o", "a.gguf", "--mmproj", "q8_0", "-q")
    assert message(call(*command), 5) == f"{path.name}: exists already; pass --force to replace it"
    assert not (tmp_path / "a.gguf").exists()
    assert call(*command, "--force").code == 0
    assert projector_record(read_entry(path)) == RECORD["gemma3 Q8_0"]


def test_a_dry_run_tells_its_bytes_and_writes_nothing(gemma3, tmp_path):
    outcome = call("convert", "gemma3", *PLAIN, "--dry-run", "--mmproj", "F32")
    assert outcome.code == 0 and "mmproj-Gemma3-F32.gguf: 0.47 MiB\n" in outcome.out
    assert not list(tmp_path.glob("*.gguf"))


def test_what_has_none_is_refused(gemma3, tmp_path):
    write_tiny(tmp_path / "llama", SPECS["llama"])
    assert "LlamaForCausalLM has no vision_config" in message(
        call("convert", "llama", *PLAIN, *QUIET, "--mmproj", "-q"), 3
    )
    convert_ours(tmp_path / "llama", tmp_path / "llama.gguf")
    assert "llama.gguf: a GGUF holds the language model only; --mmproj needs the Hugging Face folder" in message(
        call("convert", "llama.gguf", *PLAIN, *QUIET, "-o", "b.gguf", "--mmproj", "-q"), 3
    )
    assert "wanted one of F16, Q8_0, BF16, F32, got 'q4_k'" in message(call("convert", "llama", "--mmproj", "q4_k"), 2)


def test_bundle(gemma3, tmp_path):
    assert call("convert", "gemma3", *PLAIN, *QUIET, "--mmproj", "--bundle", "out").code == 0
    check_bundle(tmp_path / "out", "mmproj-Gemma3-F16.gguf")


def test_bundle_of_existing_files(gemma3, tmp_path):
    assert call("convert", "gemma3", *PLAIN, *QUIET, "--mmproj", "-o", "a.gguf").code == 0
    assert message(call("bundle", "a.gguf", "-o", "out", "--mmproj", "a.gguf", "-q"), 3) == (
        "a.gguf: is not a vision part (mmproj) of llama.cpp: its architecture is not clip"
    )
    assert call("bundle", "a.gguf", "-o", "out", "--mmproj", "mmproj-Gemma3-F16.gguf").code == 0
    check_bundle(tmp_path / "out", "mmproj-Gemma3-F16.gguf")


def check_bundle(folder: Path, name: str) -> None:
    (model,) = (path.name for path in folder.glob("*.gguf") if path.name != name)
    lines = (folder / "Modelfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM ")] == [f"FROM ./{model}", f"FROM ./{name}"]
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert f"{digest}  {name}\n" in (folder / "SHA256SUMS").read_text()
    card = (folder / "README.md").read_text()
    n_bytes = (folder / name).stat().st_size
    assert f"| vision part | `{name}`, {n_bytes:,} bytes |" in card and "pipeline_tag: image-text-to-text" in card
    assert f"`llama-mtmd-cli -m {model} --mmproj {name}`" in card


# --- loaded by llama.cpp ------------------------------------------------------------------------------------------

# Loads a vision part beside a language model and encodes an image of 56 x 56; prints tokens and the embedding's digest.
LOADER = """
import ctypes, json, sys
import llama_cpp, numpy as np
from llama_cpp import mtmd_cpp as mtmd

projector, text = (name.encode() for name in sys.argv[1:])
assert mtmd.mtmd_get_cap_from_file(projector).inp_vision
model = llama_cpp.llama_model_load_from_file(text, llama_cpp.llama_model_default_params())
options = mtmd.mtmd_context_params_default()
options.use_gpu, options.n_threads, options.warmup = False, 1, False
context = mtmd.mtmd_init_from_file(projector, model, options)
assert context and mtmd.mtmd_support_vision(context)
pixels = (np.arange(56 * 56 * 3) % 251).astype(np.uint8)
image = mtmd.mtmd_bitmap_init(56, 56, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
marker = mtmd.mtmd_default_marker()
prompt = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
chunks = mtmd.mtmd_input_chunks_init()
assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), (mtmd.mtmd_bitmap_p_ctypes * 1)(image), 1) == 0
for i in range(mtmd.mtmd_input_chunks_size(chunks)):
    chunk = mtmd.mtmd_input_chunks_get(chunks, i)
    if mtmd.mtmd_input_chunk_get_type(chunk) == 1:
        assert mtmd.mtmd_encode_chunk(context, chunk) == 0
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        print(json.dumps(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (n, 64)).tolist()))
        break
"""


def encoded(folder: Path, projector: Path) -> np.ndarray:
    """Return the embeddings of an image, ``(n_tokens, 64)``, as llama.cpp computes them."""
    text = folder.with_suffix(".text.gguf")
    if not text.exists():
        convert_ours(folder, text)
    done = subprocess.run([sys.executable, "-c", LOADER, projector, text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "llava-clip", "mistral3"])
def test_llama_cpp_loads_it_and_encodes_an_image(name, tmp_path):
    folder = write_projector_folder(tmp_path / name, name)
    whole, rounded = (
        encoded(folder, projector_ours(folder, tmp_path / f"{kind}.gguf", kind)) for kind in ("F32", "Q8_0")
    )
    assert np.isfinite(whole).all() and whole.std() > 0
    assert 0 < np.abs(rounded - whole).max() < 0.05 * np.abs(whole).max()


def test_gguf_reads_it(tmp_path):
    folder = write_projector_folder(tmp_path / "qwen3-vl", "qwen3-vl")
    projector = open_projector(folder)
    write_projector(projector, tmp_path / "a.gguf", workers=Threads(1))
    reader = GGUFReader(tmp_path / "a.gguf")
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in projector.tensors]
    assert reader.fields["clip.vision.is_deepstack_layers"].contents() == [False, True, False]
    assert reader.fields["clip.projector_type"].contents() == "qwen3vl_merger"
