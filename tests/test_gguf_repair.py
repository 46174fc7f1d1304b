"""What llama.cpp refuses or aborts on in a GGUF: mended so that the file heals, or refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import PLAIN, QUICK, call, message
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import quantize
from test_gguf_source import NO_CHECK, converted, tensor_bytes, uniform
from tiny_archs import write_tiny_arch
from tiny_gguf import N_EMBD, N_VOCAB, tiny_text, tiny_weights, write_tiny_gguf

from nsds_gguf.conversion import convert
from nsds_gguf.errors import ModelError, UnsupportedError, VerifyError, told_of
from nsds_gguf.evaluate.texts import VerifyOptions, check_vocabulary
from nsds_gguf.llamacpp import llama
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.llamacpp.rules import needs_f32
from nsds_gguf.quantize.header import _HeaderWriter, write_outline
from nsds_gguf.read.gguf_repair import OLLAMA_NAMES
from nsds_gguf.read.gguf_source import open_gguf
from nsds_gguf.records import kv
from nsds_gguf.session.outputs import Output
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
U32, STRING = GGUFValueType.UINT32, GGUFValueType.STRING


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working directory with ``tiny.gguf`` and a text for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text(tiny_text(), encoding="utf-8")
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def rewritten(source, path, *, architecture="llama", keys=None, more=None, without=(), types=None):
    """Write a GGUF once more: keys changed (``None`` removes one), tensors added, left out or of other types."""
    metadata = dict(read_gguf_header(source).metadata) | (keys or {})
    arrays = {t.name: t.data.reshape(t.shape[::-1]) for t in GGUFReader(source).tensors if t.name not in without}
    writer = _HeaderWriter(path, architecture)  # writes empty lists too
    arch = writer.kv_data[0]["general.architecture"]
    writer.kv_data[0] = {key: entry for key, entry in metadata.items() if entry is not None}
    writer.kv_data[0]["general.architecture"] = arch
    for name, array in {**arrays, **(more or {})}.items():
        kind = GGMLQuantizationType[(types or {}).get(name, "F32")]
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def listed(values, item):
    return kv(values, GGUFValueType.ARRAY, item)


def vocabulary_keys(source, n):
    """Return the lists of the vocabulary cut, or filled up with new tokens, to ``n``."""
    metadata = read_gguf_header(source).metadata
    more = {TOKENS: "more{}", SCORES: -5.0, TYPES: 1}
    return {
        key: listed(
            [*metadata[key].value, *(m.format(i) if isinstance(m, str) else m for i in range(n))][:n],
            metadata[key].sub_type,
        )
        for key, m in more.items()
    }


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_vectors_become_f32_and_the_file_heals(tiny, kind):
    vectors = {name: kind for name, array in tiny_weights().items() if array.ndim == 1}
    source = rewritten(tiny, tiny.with_name("norms.gguf"), types=vectors)
    model = open_gguf(source)
    assert model.is_repaired and len(model.notes) == 1
    assert model.notes[0].startswith(f"5 vectors and other small tensors stored as {kind} (blk.0.attn_norm.weight, ")
    out = converted(source, tiny.with_name("out.gguf"), uniform("Q8_0"))
    assert llama.logits(out, [1, 5, 9], n_threads=1).shape == (3, N_VOCAB)
    found = {t.name: t for t in GGUFReader(out).tensors}
    for name in vectors:
        assert found[name].tensor_type == GGMLQuantizationType.F32
        np.testing.assert_array_equal(found[name].data, model.by_name[name].load().ravel())


def test_f32_vectors_and_f16_vectors_of_the_same_values_become_the_same_tensors(tiny):
    halves = {n: a.astype(np.float16).astype(np.float32) for n, a in tiny_weights().items() if a.ndim == 1}
    full = rewritten(tiny, tiny.with_name("full.gguf"), without=halves, more=halves)
    half = rewritten(tiny, tiny.with_name("half.gguf"), without=halves, more=halves, types=dict.fromkeys(halves, "F16"))
    first, second = (tensor_bytes(converted(f, f.with_suffix(".out"), uniform("Q8_0"))) for f in (full, half))
    assert first == second


def test_convolution_and_scan_become_f32(tmp_path):
    source = write_tiny_arch(tmp_path / "mamba.gguf", "mamba")
    names = ["ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_a", "ssm_d", "attn_norm.weight"]
    types = {f"blk.{i}.{name}": "F16" for i in range(2) for name in names}
    half = rewritten(source, tmp_path / "half.gguf", architecture="mamba", types=types)
    out = converted(half, tmp_path / "out.gguf", uniform("Q8_0"))
    found = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    assert {found[name] for name in types} == {"F32"}
    assert np.isfinite(llama.logits(out, [1, 5, 9], n_threads=1)).all()


@pytest.mark.parametrize(("name", "shape", "wanted"), [
    ("blk.0.attn_norm.weight", (64,), True),
    ("blk.0.attn_q_norm.weight", (4, 16), True),
    ("blk.0.attn_norm_2.weight", (64,), True),
    ("blk.0.ffn_gate_exps.bias", (4, 64), True),
    ("blk.0.shortconv.conv.weight", (64, 3), True),
    ("blk.0.ssm_a", (16, 64), True),
    ("blk.0.ssm_conv1d_q.weight", (64, 4), True),
    ("blk.0.time_mix_lerp_fused.weight", (5, 1, 1, 64), True),
    ("blk.0.time_mix_first.weight", (4, 16), True),
    ("rope_freqs.weight", (32,), True),
    ("blk.0.ffn_gate_inp.weight", (4, 64), False),
    ("blk.0.time_mix_w1.weight", (64, 16), False),
    ("blk.0.attn_q.weight", (64, 64), False),
    ("position_embd.weight", (512, 64), False),
    ("token_embd.weight", (256, 64), False),
])  # fmt: skip
def test_which_tensors_need_f32(name, shape, wanted):
    assert needs_f32(name, shape) is wanted


def test_the_original_of_a_mended_file_is_written_anew(tiny):
    vectors = {name: "F16" for name, array in tiny_weights().items() if array.ndim == 1}
    source = rewritten(tiny, tiny.with_name("norms.gguf"), types=vectors)
    with WorkFolder(tiny.parent) as files:
        session = Session(open_gguf(source), Run(1), files)
        with session.original() as path:
            assert path != source and np.isfinite(llama.logits(path, [1, 5], n_threads=1)).all()
            with pytest.raises(VerifyError, match=r"^\S+norms\.gguf: no such"), session.original() as same:
                raise VerifyError(f"{same}: no such")
        assert not path.exists()


# --- other parts -----------------------------------------------------------------------------------------------------


def test_vision_part_is_left_out_and_the_rest_is_the_same(tiny):
    rng = np.random.default_rng(5)
    part = {
        "v.blk.0.attn_q.weight": rng.standard_normal((32, 32)).astype(np.float32),
        "v.patch_embedding.weight": rng.standard_normal((8, 3, 4, 4)).astype(np.float32),
        "a.blk.0.norm.weight": np.ones(32, np.float32),
        "mm.input_projection.weight": rng.standard_normal((N_EMBD, 32)).astype(np.float32),
    }
    keys = {"llama.vision.block_count": kv(1, U32), "llama.audio.block_count": kv(1, U32),
            "llama.mm.tokens_per_image": kv(4, U32), "clip.has_vision_encoder": kv(1, U32)}  # fmt: skip
    source = rewritten(tiny, tiny.with_name("sha256-0f3a6c"), more=part, keys=keys)
    model, plain = open_gguf(source), open_gguf(tiny)
    assert [t.name for t in model.tensors] == [t.name for t in plain.tensors]
    assert model.metadata == plain.metadata and model.hparams == plain.hparams
    assert model.notes == (
        "The file holds a vision or audio part beside the language model, as Ollama stores it: 4 tensors (v.*, a.*, "
        "mm.*) and 4 keys are left out; llama.cpp reads that part from a separate file (mmproj).",
    )
    first, second = (converted(f, f.with_name(f"{f.name}.out"), uniform("Q8_0")) for f in (source, tiny))
    assert tensor_bytes(first) == tensor_bytes(second)
    assert llama.logits(first, [1, 5], n_threads=1).shape == (2, N_VOCAB)


@pytest.mark.parametrize(("name", "theirs"), OLLAMA_NAMES.items())
def test_architectures_of_ollama_are_refused_by_name(tiny, name, theirs):
    source = rewritten(tiny, tiny.with_name("sha256-9bd1ce"), architecture=name)
    with pytest.raises(UnsupportedError) as caught:
        open_gguf(source)
    assert str(caught.value).startswith(f"{source}: architecture {name} is Ollama's own: llama.cpp")
    assert theirs in str(caught.value) and "Hugging Face" in str(caught.value)


def test_architecture_that_llama_cpp_does_not_know_is_refused_before_work(tiny):
    source = rewritten(tiny, tiny.with_name("odd.gguf"), architecture="fancynet", keys={
        f"fancynet.{name}": kv(1 if name == "block_count" else 64, U32)
        for name in ("block_count", "embedding_length", "context_length")
    }, without=[n for n in tiny_weights() if n.startswith("blk.1.")])  # fmt: skip
    outcome = call("convert", source, *PLAIN, *QUICK, "-o", "out.gguf", "--text", "tiny.txt")
    assert message(outcome, 7) == (
        f"{source}: llama.cpp cannot load it: llama_model_load: error loading model: unknown model architecture: "
        "'fancynet'"
    )


# --- keys and layers -------------------------------------------------------------------------------------------------

REFUSED = {
    "NaN": ({"llama.rope.freq_base": kv(float("nan"), GGUFValueType.FLOAT32)}, "rope.freq_base is nan; wanted"),
    "no layers": ({"llama.block_count": kv(0, U32)}, "block_count is 0; wanted a positive integer"),
    "many layers": ({"llama.block_count": kv(513, U32)}, "block_count is 513; llama.cpp takes at most 512"),
    "layer missing": ({"llama.block_count": kv(3, U32)}, "is 3, but there are no tensors of layer 2"),
    "layer too many": ({"llama.block_count": kv(1, U32)}, "is 1, but there are tensors of layer 1"),
    "more experts used": (
        {"llama.expert_count": kv(2, U32), "llama.expert_used_count": kv(3, U32)}, "expert_used_count are 2 and 3"),
    "no expert used": ({"llama.expert_count": kv(2, U32)}, "expert_used_count are 2 and 0"),
    "rope scaling": ({"llama.rope.scaling.type": kv("ntk", STRING)}, "is 'ntk'; llama.cpp knows none, linear, yarn"),
    "token twice": (
        {TOKENS: listed(["<unk>", "<s>", "</s>", *(f"t{i % 255}" for i in range(N_VOCAB - 3))], STRING)},
        r"tokens 3 and 258 are both 't0' \(2 duplicates in all\), on which llama.cpp aborts"),
    "scores short": ({SCORES: listed([0.0] * 7, GGUFValueType.FLOAT32)}, "wanted 260 values, .* got 7"),
    "types short": ({TYPES: listed([1] * 7, GGUFValueType.INT32)}, "wanted 260 values, .* got 7"),
    "no tokens": ({TOKENS: None}, "the tokenizer is incomplete"),
    "no merges": ({"tokenizer.ggml.model": kv("gpt2", STRING)}, "merges is missing: llama.cpp cannot build"),
    "merges empty": (
        {"tokenizer.ggml.model": kv("gpt2", STRING), "tokenizer.ggml.merges": listed([], STRING),
         TYPES: listed([1] * N_VOCAB, GGUFValueType.INT32)}, "merges is empty: llama.cpp cannot build"),
    "no BOS": (
        {"tokenizer.ggml.model": kv("t5", STRING), "tokenizer.ggml.bos_token_id": None},
        "add_bos_token is true, but tokenizer.ggml.bos_token_id is missing, on which llama.cpp aborts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_from_the_header(tiny, case):
    keys, wanted = REFUSED[case]
    source = rewritten(tiny, tiny.with_name("broken.gguf"), keys=keys)
    with pytest.raises(ModelError, match=wanted) as caught:
        open_gguf(source)
    assert str(caught.value).startswith(f"{source}: ")


OUTLINE = {
    "context": ({"llama.context_length": None}, (), "key not found in model: llama.context_length"),
    "heads": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        (),
        "llama.attention.layer_norm",
    ),
    "tensor": ({}, ("blk.1.ffn_up.weight",), "tensor 'blk.1.ffn_up.weight' not found"),
    "embedding": ({}, ("token_embd.weight",), "tensor 'token_embd.weight' not found"),
    "shape": ({"llama.feed_forward_length": kv(95, U32)}, (), "has wrong shape"),
    "tokenizer": ({"tokenizer.ggml.model": kv("fancy", STRING)}, (), "unknown tokenizer: 'fancy'"),
    "none": (
        {"tokenizer.ggml.model": None, TOKENS: None},
        (),
        "has no tokenizer, which llama.cpp needs to load",
    ),
}


@pytest.mark.parametrize("case", OUTLINE)
def test_what_llama_cpp_refuses_is_said_before_work(tiny, case):
    keys, without, wanted = OUTLINE[case]
    source = rewritten(tiny, tiny.with_name("broken.gguf"), keys=keys, without=without)
    model = open_gguf(source)
    with WorkFolder(tiny.parent) as files, pytest.raises(VerifyError) as caught:
        check_vocabulary(model, VerifyOptions(n_ctx=32), tiny_text(), files)
    assert str(caught.value).startswith(f"{source}: ") and wanted in str(caught.value)
    assert "outline" not in str(caught.value)


def test_unknown_pre_tokenizer_is_refused_before_work(tiny):
    keys = {"tokenizer.ggml.model": kv("gpt2", STRING), "tokenizer.ggml.pre": kv("fancy", STRING),
            "tokenizer.ggml.merges": listed(["a b"], STRING)}  # fmt: skip
    source = rewritten(tiny, tiny.with_name("broken.gguf"), keys=keys)
    with WorkFolder(tiny.parent) as files, pytest.raises(VerifyError, match="unknown pre-tokenizer type: 'fancy'"):
        check_vocabulary(open_gguf(source), VerifyOptions(n_ctx=32), tiny_text(), files)


def test_outline_takes_no_room(tiny):
    model = open_gguf(tiny)
    wide = replace(model.tensors[0], shape=(1 << 22, 1024))
    write_outline(replace(model, tensors=(wide,)), tiny.with_name("outline.gguf"))
    found = tiny.with_name("outline.gguf").stat()
    assert found.st_size > 1 << 30 and found.st_blocks * 512 < 1 << 20
    with pytest.raises(VerifyError, match="cannot load it"):
        llama.check_loads(tiny.with_name("outline.gguf"))


# --- vocabulary ------------------------------------------------------------------------------------------------------


def healed(source):
    """Return the model after its vocabulary was repaired, having checked that llama.cpp runs what is made of it."""
    model = open_gguf(source)
    out = Path("healed.gguf")
    convert(source, uniform("Q8_0"), verifying=NO_CHECK, output=Output(out, force=True), run=Run(1))
    assert llama.logits(out, [1, 5], n_threads=1).shape == (2, model.hparams.n_vocab)
    return model


def test_tokens_beyond_the_embedding_are_left_out(tiny):
    source = rewritten(tiny, tiny.with_name("long.gguf"), keys={
        **vocabulary_keys(tiny, N_VOCAB + 2), "tokenizer.ggml.eot_token_id": kv(N_VOCAB, U32)})  # fmt: skip
    model = healed(source)
    before = read_gguf_header(tiny).metadata
    assert [model.metadata[key] for key in (TOKENS, SCORES, TYPES)] == [before[key] for key in (TOKENS, SCORES, TYPES)]
    assert "tokenizer.ggml.eot_token_id" not in model.metadata
    assert model.notes == (
        "The vocabulary has 262 tokens, the embedding 260 rows: the last 2 tokens ('more0', 'more1') are left out.",
        "The vocabulary has 260 tokens; special token ids outside it are left out, as llama.cpp ignores them: "
        "tokenizer.ggml.eot_token_id 260.",
    )


def test_rows_without_tokens_get_unused_ones(tiny):
    model = healed(rewritten(tiny, tiny.with_name("short.gguf"), keys=vocabulary_keys(tiny, N_VOCAB - 2)))
    assert model.metadata[TOKENS].value[-3:] == ["<0xFE>", "[PAD258]", "[PAD259]"]
    assert model.metadata[TYPES].value[-3:] == [6, 5, 5]
    assert model.metadata[SCORES].value[-3:] == [0.0, -1000.0, -1000.0]
    assert model.notes == (
        "The vocabulary has 258 tokens, the embedding 260 rows: the other rows get unused tokens [PAD258] to [PAD259].",
    )


def test_scores_beyond_the_tokens_are_left_out(tiny):
    keys = {SCORES: listed([0.0] * (N_VOCAB + 4), GGUFValueType.FLOAT32)}
    model = healed(rewritten(tiny, tiny.with_name("scores.gguf"), keys=keys))
    assert len(model.metadata[SCORES].value) == N_VOCAB
    assert model.notes == (f"Key {SCORES} has 264 values for 260 tokens: the surplus is left out.",)


def test_a_sound_file_is_left_as_it_is(tiny):
    model = open_gguf(tiny)
    assert not model.notes and not model.is_repaired
    with WorkFolder(tiny.parent) as files, Session(model, Run(1), files).original() as path:
        assert path == tiny


def test_messages_name_what_the_user_knows(tmp_path):
    with pytest.raises(VerifyError, match=r"^model: is broken$"), told_of(Path("model"), tmp_path / "x.gguf"):
        raise VerifyError(f"{tmp_path / 'x.gguf'}: is broken")
    with pytest.raises(ModelError, match=r"^other$"), told_of(Path("model"), tmp_path / "x.gguf"):
        raise ModelError("other")
