"""Fitting a memory: the formulas against llama.cpp's own figures, and files that fit."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from command import TINY, call, message
from models import make_model
from outlines import KNOWN, Outline, write_outline
from tiny_archs import write_tiny_arch
from tiny_models import write_tiny
from zoo import write_zoo, zoo_config, zoo_shapes
from zoo_specs import SPECS

from nsds_gguf import Fit, Options, errors, open_model
from nsds_gguf.llamacpp import llama
from nsds_gguf.llamacpp.memory import (
    RECURRENT,
    WINDOWS,
    WITHOUT_FORMULA,
    Context,
    Dimensions,
    Memory,
    attention_cache_bytes,
    memory,
)
from nsds_gguf.quantize import header
from nsds_gguf.read.architectures.families import FAMILIES
from nsds_gguf.session import fit as fitting
from nsds_gguf.session.fit import fitted, memory_beside_weights
from nsds_gguf.session.run import Run
from nsds_gguf.system import resources

MIB = 2**20
GGML_TYPES = {"f16": 1, "q8_0": 8}
RTN = ("--rounding", "rtn", "--threads", "1")


def calculated(outline: Outline, context: Context) -> Memory:
    return memory(outline.architecture, outline.full_keys, outline.shapes, context)


def check(found: Memory, reported: dict[str, float], weights: int, within: float = 0.03) -> None:
    """Caches agree to the 0.01 MiB that llama.cpp prints, all of it to 3 %."""
    assert found.attention_cache / MIB == pytest.approx(reported["attention cache"] / MIB, abs=0.011)
    assert found.states / MIB == pytest.approx(reported["recurrent states"] / MIB, abs=0.011)
    assert weights + found.total == pytest.approx(weights + sum(reported.values()), rel=within)


# --- the formulas -----------------------------------------------------------------------------------------------------

# MiB of cache, states and compute buffers in llama.cpp's log, at 4096 tokens in F16 and 65536 in Q8_0.
LOGGED = {
    "SmolLM2 135M": ((90.0, 0, 98.25), (765.0, 0, 99.38)),
    "TinyLlama 1.1B": ((88.0, 0, 70.5), (748.0, 0, 117.01)),
    "Llama 3.1 8B": ((512.0, 0, 266.5), (4352.0, 0, 274.5)),
    "Llama 2 7B": ((2048.0, 0, 100.51), (17408.0, 0, 152.51)),
    "Qwen3 4B": ((576.0, 0, 306.75), (4896.0, 0, 306.75)),
    "Gemma 3 4B": ((254.0, 0, 527.13), (772.44, 0, 522.13)),
    "Gemma 2 9B": ((1344.0, 0, 514.0), (6113.63, 0, 514.0)),
    "Mixtral 8x7B": ((512.0, 0, 204.01), (4352.0, 0, 256.01)),
    "Qwen3 30B A3B": ((384.0, 0, 304.75), (3264.0, 0, 304.75)),
    "DeepSeek V3": ((274.5, 0, 412.01), (2333.25, 0, 474.0)),
    "Mamba 1.4B": ((0, 14.25, 110.21), (0, 14.25, 110.21)),
    "Granite 4 H Micro": ((32.0, 73.79, 204.0), (272.0, 73.79, 204.0)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_against_the_log_of_llama_cpp(name):
    for context, logged in zip((Context(4096), Context(65536, "q8_0")), LOGGED[name], strict=True):
        found = calculated(KNOWN[name], context)
        assert (found.attention_cache / MIB, found.states / MIB) == pytest.approx(logged[:2], abs=0.006)
        assert found.compute / MIB == pytest.approx(logged[2], rel=0.06)
        assert (found.weights, found.projector) == (0, 0)


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Gemma 3 4B", "Qwen3 30B A3B", "Mamba 1.4B", "Granite 4 H Micro"])
def test_known_models_against_llama_cpp(name, tmp_path):
    weights = write_outline(tmp_path / "outline.gguf", KNOWN[name])
    for context in (Context(4096), Context(65536, "q8_0")):
        reported = llama.memory(tmp_path / "outline.gguf", context.n_ctx, GGML_TYPES[context.cache_type])
        check(calculated(KNOWN[name], context), reported, weights)


ONE_OF_EACH = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3",
    "phi3": "phi-3", "phi2": "phi-2", "gpt2": "gpt2", "gptneox": "gpt-neox", "stablelm": "stablelm", "olmo": "olmo",
    "olmo2": "olmo3", "granite": "granite", "command-r": "cohere", "cohere2": "cohere2", "smollm3": "smollm3",
    "qwen2moe": "qwen2moe", "qwen3moe": "qwen3moe", "olmoe": "olmoe", "granitemoe": "granitemoe",
    "internlm2": "internlm2-4", "starcoder2": "starcoder2", "deepseek2": "deepseek2", "mamba": "mamba",
    "granitehybrid": "granite4-h-micro",
    "seed_oss": "seed-oss",
    "glm4": "glm4",
    "exaone4": "exaone4",
    "ernie4_5": "ernie4.5",
    "ernie4_5-moe": "ernie4.5-moe",
    "hunyuan-dense": "hunyuan-dense",
    "hunyuan-moe": "hunyuan-moe",
    "glm4moe": "glm4moe",
    "dots1": "dots1",
    "minimax-m2": "minimax-m2",
    "mistral3": "ministral3",
    "gpt-oss": "gpt-oss",
    "apertus": "apertus",
    "lfm2": "lfm2",
    "lfm2moe": "lfm2moe",
    "qwen3next": "qwen3next",
    "qwen35": "qwen3.5",
    "qwen35moe": "qwen3.5-moe",
    "falcon-h1": "falcon-h1",
    "nemotron_h": "nemotron-h",
    "nemotron_h_moe": "nemotron-h-moe",
    "qwen2vl": "qwen2-vl",
    "qwen3vl": "qwen3-vl",
    "qwen3vlmoe": "qwen3-vl-moe",
}  # fmt: skip


def test_every_family_is_checked():
    assert set(ONE_OF_EACH) == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize("architecture", ONE_OF_EACH)
def test_every_family_against_llama_cpp(architecture, tmp_path):
    """Random models of a few thousand weights: cache and attention mask of 16384 tokens are most of it."""
    name = ONE_OF_EACH[architecture]
    model = open_model(write_zoo(tmp_path / name, SPECS[name], zoo_config(name), zoo_shapes(name)))
    assert model.architecture == architecture
    header.write_outline(model, tmp_path / "outline.gguf")
    keys = {key: entry.value for key, entry in model.metadata.items()}
    found = memory(architecture, keys, {t.name: t.shape for t in model.tensors}, Context(16384))
    weights = (tmp_path / "outline.gguf").stat().st_size
    within = 0.04 if architecture == "gpt-oss" else 0.03  # of a model whose buffers are most of the memory
    check(found, llama.memory(tmp_path / "outline.gguf", 16384, GGML_TYPES["f16"]), weights, within)


@pytest.mark.parametrize("architecture", ["mamba", "starcoder2", "deepseek2"])
def test_ggufs_against_llama_cpp(architecture, tmp_path):
    path = write_tiny_arch(tmp_path / "model.gguf", architecture)
    model = open_model(path)
    keys = {key: entry.value for key, entry in model.metadata.items()}
    found = memory(architecture, keys, {t.name: t.shape for t in model.tensors}, Context(16384, "q8_0"))
    check(found, llama.memory(path, 16384, GGML_TYPES["q8_0"]), path.stat().st_size)


def dimensions(architecture: str, **keys: object) -> Dimensions:
    usual = {"block_count": 8, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
    stated = usual | {name.replace("__", "."): value for name, value in keys.items()}
    return Dimensions(architecture, {f"{architecture}.{key}": value for key, value in stated.items()}, {})


@pytest.mark.parametrize(
    ("dims", "window", "layers"),
    [
        (dimensions("gemma3", attention__sliding_window=512), 512, "wwwwwfww"),
        (dimensions("gemma3"), 0, "ffffffff"),
        (dimensions("gemma2"), 4096, "wfwfwfwf"),
        (dimensions("cohere2moe", attention__sliding_window=96), 96, "fwwwfwww"),
        (dimensions("llama4"), 8192, "wwwfwwwf"),
        (dimensions("llama4", attention__sliding_window=4), 8192, "wwwfwwwf"),
        (dimensions("llama4", attention__sliding_window=0), 0, "ffffffff"),
        (dimensions("smallthinker"), 0, "ffffffff"),
        (dimensions("smallthinker", attention__sliding_window=7), 4096, "fwwwfwww"),
        (dimensions("exaone4", attention__sliding_window=7), 0, "ffffffff"),
        (dimensions("llama", attention__sliding_window=7), 0, "ffffffff"),  # Mistral: llama.cpp ignores it
        (dimensions("phi3", attention__sliding_window=7), 0, "ffffffff"),
        (
            dimensions("gpt-oss", attention__sliding_window=128, attention__sliding_window_pattern=[1] + [0] * 7),
            128,
            "wfffffff",
        ),
    ],
)
def test_sliding_windows(dims, window, layers):
    assert dims.window == window and "".join("fw"[has] for has in dims.has_window) == layers


def test_a_window_keeps_its_tokens_and_those_of_a_batch():
    dims = dimensions("gemma3", attention__sliding_window=1000)
    row = 2 * 2 * 16 * 2  # keys and values of 2 heads of 16 channels, in F16
    assert attention_cache_bytes(dims, Context(16384)) == row * (1 * 16384 + 7 * 1536)
    assert attention_cache_bytes(dims, Context(700)) == row * 8 * 768
    assert attention_cache_bytes(dims, Context(100)) == row * 8 * 256


def test_layers_that_attend():
    shared = dimensions("gemma4", attention__sliding_window=64, attention__sliding_window_pattern=[True, False] * 4,
                        attention__shared_kv_layers=3, attention__key_length=32, attention__value_length=32,
                        attention__key_length_swa=16, attention__value_length_swa=16)  # fmt: skip
    assert shared.attends == [True] * 5 + [False] * 3
    assert attention_cache_bytes(shared, Context(4096)) == 2 * 2 * 2 * (2 * 32 * 4096 + 3 * 16 * 768)
    delta = dimensions("qwen3next", full_attention_interval=4, nextn_predict_layers=1)
    assert delta.attends == [False, False, False, True, False, False, False]
    mixed = dimensions("nemotron_h", attention__head_count_kv=[0, 0, 2, 0] * 2, feed_forward_length=[0, 9, 0, 0] * 2)
    assert mixed.attends == [False, False, True, False] * 2
    assert mixed.is_recurrent == [True, False, False, True] * 2
    both = dimensions("falcon-h1")
    assert all(both.attends) and all(both.is_recurrent)


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ({"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16}, 3 * 128 + 16 * 128),
        (
            {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16, "ssm__group_count": 2},
            3 * (128 + 64) + 16 * 128,
        ),
    ],
)
def test_states_of_state_spaces(keys, numbers):
    assert fitting.memory("mamba2", dimensions("mamba2", **keys)._keys, {}, Context(512)).states == 8 * 4 * numbers


def test_states_of_convolutions_and_delta_attention():
    kv_heads = [0, 0, 2, 0, 0, 0, 2, 0]
    lfm = dimensions("lfm2", shortconv__l_cache=3, attention__head_count_kv=kv_heads)
    assert fitting.memory("lfm2", lfm._keys, {}, Context(512)).states == 6 * 4 * 64 * 2
    kimi = dimensions("kimi-linear", kda__head_dim=8, ssm__conv_kernel=4, attention__head_count_kv=kv_heads)
    assert fitting.memory("kimi-linear", kimi._keys, {}, Context(512)).states == 6 * 4 * (3 * 3 * 4 * 8 + 8 * 8 * 4)


@pytest.mark.parametrize("architecture", WITHOUT_FORMULA)
def test_what_has_no_formula_is_refused_with_the_reason(architecture):
    with pytest.raises(errors.UnsupportedError, match=re.escape(WITHOUT_FORMULA[architecture])) as raised:
        memory(architecture, {}, {}, Context(512))
    assert f"architecture {architecture}" in str(raised.value)
    assert architecture not in WINDOWS and architecture not in RECURRENT


def test_unknown_states_are_refused():
    with pytest.raises(errors.UnsupportedError, match=r"architecture new is not known: llama\.cpp keeps states"):
        memory("new", {}, {"blk.0.ssm_in.weight": (4, 4)}, Context(512))


# --- files that fit ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "model", TINY)


def test_the_largest_file_that_fits(folder):
    outcome = call("convert", "model", "--fit", "12MiB", "--ctx-size", 2048, *RTN, "--no-verify", "-o", "out.gguf",
                   "--json", "found.json")  # fmt: skip
    assert outcome.code == 0, outcome
    (found,) = json.loads(Path("found.json").read_text())
    held, size = found["memory"], Path("out.gguf").stat().st_size
    assert (held["memory_bytes"], held["n_ctx"], held["cache_type"]) == (12 * MIB, 2048, "f16")
    assert held["weights"] == size == found["plan"]["sums"]["file_bytes"]
    assert held["attention_cache"] == 2 * 2 * 2 * 2 * 64 * 2048  # layers, K and V, bytes, heads, channels, tokens
    parts = ("weights", "attention_cache", "states", "compute", "output", "projector")
    assert held["total"] == sum(held[part] for part in parts) == 12 * MIB - held["left"]
    assert 0 <= held["left"] == found["plan"]["sums"]["unused_bytes"]
    assert found["plan"]["recipe"]["target"] == {"kind": "size", "value": 12 * MIB - held["total"] + size}
    text = " ".join(outcome.out.split())
    assert "memory with 2048 tokens of context" in text and "│ KV cache (f16) │ 2.00 MiB │" in text
    assert "│ in all │ 12.00 MiB │" in text


def test_a_smaller_cache_and_a_projector(folder):
    Path("mmproj.gguf").write_bytes(b"GGUF" + bytes(100_000))
    options = ("plan", "model", "--fit", "12MiB", "--ctx-size", 2048, *RTN, "--json", "plan.json")
    budgets = []
    for more in ((), ("--cache-type", "q8_0"), ("--projector", "mmproj.gguf")):
        assert call(*options, *more).code == 0
        budgets.append(json.loads(Path("plan.json").read_text())["recipe"]["target"]["value"])
    plain, small_cache, projector = budgets
    saved = 2 * MIB * (1 - 34 / 64)
    assert small_cache - plain == pytest.approx(saved, abs=0.2 * MIB) and plain - projector == 100_004
    line = message(call(*options, "--projector", "model/config.json"), 3)
    assert line == "--projector model/config.json: not a GGUF file"


def test_a_memory_that_is_too_small(folder):
    line = message(call("plan", "model", "--fit", "12MiB", "--ctx-size", 8192, *RTN), 4)
    assert line.startswith(
        "Model does not fit 12.0 MiB with 8192 tokens of context: the smallest file takes 0.3 MiB, the cache (f16) "
        "8.0 MiB, buffers "
    )
    assert line.endswith(("; pass --ctx-size 2048", "; pass --ctx-size 4096"))
    assert call("plan", "model", "--fit", "12MiB", "--ctx-size", line.split()[-1], *RTN).code == 0
    line = message(call("plan", "model", "--fit", "1MiB", *RTN), 4)
    n_bytes = line.split("--fit ")[1].removesuffix(" would do")
    assert call("plan", "model", "--fit", int(n_bytes) + 2000, *RTN).code == 0
    assert message(call("plan", "model", "--fit", int(n_bytes) - 2000, *RTN), 4).startswith("Model does not fit")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--fit", "8GB", "--target-bpw", 3), "--fit and --target-bpw are two budgets; drop one"),
        (("--fit", "8GB", "--uniform", "Q8_0"), "--fit and --uniform are two budgets; drop one"),
        (("--target-bpw", 3, "--cache-type", "q8_0"), "--cache-type needs a memory; pass --fit too"),
        (("--target-bpw", 3, "--ctx-size", 4096), "--ctx-size needs a memory; pass --fit too"),
    ],
)
def test_contradictions(folder, words, line):
    assert message(call("plan", "model", *words), 4) == line


def test_a_type_of_cache_that_heads_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "gpt2"
    write_zoo(tmp_path / "model", SPECS[name], zoo_config(name), zoo_shapes(name))
    line = message(call("plan", "model", "--fit", "64MiB", "--cache-type", "q8_0"), 4)
    assert line == (
        "--cache-type q8_0 has blocks of 32, and heads of this model have 16 channels, which is not a multiple: "
        "llama.cpp refuses it; pass --cache-type f16"
    )


def test_without_a_tokenizer_the_formulas_count(folder):
    model = open_model(folder)
    nameless = make_model({t.name: t.load() for t in model.tensors}, model.hparams)
    keys = {key: entry for key, entry in model.metadata.items() if key.startswith("llama.")}
    object.__setattr__(nameless, "metadata", keys)
    said: list[str] = []

    class Listener(Run().report.__class__):  # type: ignore[misc]
        def say(self, text: str) -> None:
            said.append(text)

    context = Context(2048)
    (found,) = memory_beside_weights(nameless, [context], Run(report=Listener()))
    shapes = {t.name: t.shape for t in model.tensors}
    assert found == memory("llama", {key: entry.value for key, entry in keys.items()}, shapes, context)
    assert said[-1].startswith("Sizes of cache and buffers are calculated, since llama.cpp does not report them:")
    (reported,) = memory_beside_weights(model, [context], Run())
    assert reported.attention_cache == found.attention_cache and reported.total == pytest.approx(found.total, rel=0.15)


@pytest.mark.parametrize(
    ("answer", "bytes_wanted"),
    [("5000\n16000\n", 0.9 * 16000 * MIB), ("[N/A]\n", 0.9e9), (OSError(), 0.9e9), ("", 0.9e9)],
)
def test_the_memory_of_the_machine(monkeypatch, answer, bytes_wanted):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        if isinstance(answer, OSError):
            raise answer
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(resources.subprocess, "run", run)
    monkeypatch.setattr(fitting, "missing_cuda", lambda: "no GPU")
    monkeypatch.setattr(fitting, "available_memory_bytes", lambda: 10**9)
    where = "the GPU" if bytes_wanted > 10**9 else "this machine"
    assert fitting.machine_memory() == (int(bytes_wanted), where)
    monkeypatch.setattr(fitting, "missing_cuda", lambda: "")
    monkeypatch.setattr(fitting, "free_device_bytes", lambda: 2 * 10**9)
    assert fitting.machine_memory() == (int(bytes_wanted if "16000" in str(answer) else 1.8e9), "the GPU")


def test_auto(folder, monkeypatch):
    monkeypatch.setattr("nsds_gguf.cli.fit.machine_memory", lambda: (12 * MIB, "this machine"))
    assert call("plan", "model", "--fit", "auto", "--ctx-size", 2048, *RTN, "--json", "auto.json").code == 0
    assert call("plan", "model", "--fit", "12MiB", "--ctx-size", 2048, *RTN, "--json", "named.json").code == 0
    assert Path("auto.json").read_text() == Path("named.json").read_text()


def test_in_python(folder):
    model = open_model(folder)
    aimed, found = fitted(model, Options(fit=Fit(12 * MIB, 2048)), Run())
    assert aimed.fit is None and found is not None
    assert aimed.target_size == 12 * MIB - found.memory.beside_weights and found.memory.weights == 0
    assert fitted(model, Options(target_bpw=3.0), Run()) == (Options(target_bpw=3.0), None)
