"""Writing: llama.cpp's own quantizer is the oracle of every byte, gguf's reader of the header, the disk of the rest."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arrays import random_arrays
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from llama_quantize import (
    assert_same_bytes,
    extreme_rows,
    llama_quantize,
    name_patterns,
    per_expert,
    read_tensors,
)
from models import make_tensor, read_by
from plans import cycled_types, plan_of, uniform_plan, writable_model
from recipes import recipe

from nsds_gguf import __version__
from nsds_gguf.calibration.evidence import Evidence, column_weights
from nsds_gguf.calibration.random_tokens import RandomTokens, draw_tokens
from nsds_gguf.compute.walk import WalkOptions
from nsds_gguf.errors import ModelError, OutputError
from nsds_gguf.llamacpp import ggml
from nsds_gguf.llamacpp.llama import logits
from nsds_gguf.publish.tensor_type_file import tensor_type_file
from nsds_gguf.quantize import TensorQuantizers, header
from nsds_gguf.quantize.header import header_bytes
from nsds_gguf.quantize.kernel import OWN_SEARCH
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.records import Hparams, Scores, Target, kv
from nsds_gguf.sensitivity.sensitivities import sensitivities
from nsds_gguf.system.atomic import unfinished
from nsds_gguf.system.workers import Threads

HPARAMS = Hparams(1, 256, 512, 4, 2, 64, 300, 128, 1e-5)


def awkward_model(n_cols_multiple):
    """Return matrices of odd numbers of rows, stacked ones and extreme ones, in rows of whole blocks."""
    rng = np.random.default_rng(5)
    wide, narrow = 2 * n_cols_multiple, n_cols_multiple

    def noise(*shape):
        return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]))).astype(np.float32)

    arrays = {
        "blk.0.attn_norm.weight": noise(wide),
        "blk.0.attn_q.weight": noise(3, narrow),
        "blk.0.attn_k.weight": noise(7, 3 * narrow),
        "blk.0.attn_v.weight": extreme_rows(wide),
        "blk.0.ffn_up.weight": noise(37, wide),
        "blk.0.ffn_gate_exps.weight": noise(3, 5, wide),
    }
    return writable_model(arrays, HPARAMS)


def random_importance(model):
    """Return column weights over several orders of magnitude for every matrix, every expert's own."""
    rng = np.random.default_rng(6)
    return {
        tensor.name: np.exp(2 * rng.standard_normal((*tensor.shape[:-2], tensor.n_cols))).clip(1e-4).astype(np.float32)
        for tensor in model.tensors
        if tensor.is_matrix
    }


def small_decoder(**changes):
    """Return a random decoder that llama.cpp loads; 293 rows of the embedding are an odd number."""
    shape = {"n_embd": 256, "n_ff": 512, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "n_vocab": 293} | changes
    return writable_model(*random_arrays(7, **shape))


GGML_ROUNDED = tuple(name for name in ggml.TYPES if name not in OWN_SEARCH)


def written(model, plan, path, importance=None, n_threads=2):
    write_gguf(model, plan, TensorQuantizers("rtn", importance or {}), path, workers=Threads(n_threads))
    return path


# --- the bytes of tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("type_name", GGML_ROUNDED)
def test_every_byte_is_llama_cpps(type_name, with_importance, tmp_path, monkeypatch):
    model = awkward_model(max(32, ggml.block(type_name)[0]))
    importance = random_importance(model) if with_importance else {}
    source = written(model, uniform_plan(model, "F32"), tmp_path / "F32.gguf")
    plan = uniform_plan(model, type_name)
    theirs = tmp_path / "theirs.gguf"
    patterns = name_patterns({tensor.name: tensor.type for tensor in plan.tensors})
    llama_quantize(source, theirs, patterns, per_expert(model, importance))
    assert_same_bytes(written(model, plan, tmp_path / "ours.gguf", importance), theirs)
    monkeypatch.setattr(Threads, "slab_bytes", 4 * 5 * 512)  # slabs end within tensors, and within experts
    assert_same_bytes(written(model, plan, tmp_path / "slabs.gguf", importance, n_threads=3), theirs)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_rows_that_no_block_divides_are_llama_cpps(type_name, tmp_path):
    arrays = {"blk.0.attn_q.weight": np.random.default_rng(8).standard_normal((5, 33)).astype(np.float32)}
    model = writable_model(arrays, HPARAMS)
    source = written(model, uniform_plan(model, "F32"), tmp_path / "F32.gguf")
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(source, theirs, name_patterns({"blk.0.attn_q.weight": type_name}))
    assert_same_bytes(written(model, uniform_plan(model, type_name), tmp_path / "ours.gguf"), theirs)


def test_a_whole_decoder_is_llama_cpps_and_runs(tmp_path):
    """All types that ggml rounds in one file, with column weights on random tokens."""
    model = small_decoder()
    source = written(model, uniform_plan(model, "F32"), tmp_path / "F32.gguf")
    types = cycled_types(model, GGML_ROUNDED)
    assert set(types.values()) == set(GGML_ROUNDED)
    tokens = draw_tokens(model)
    found = sensitivities(model, tokens, WalkOptions(4))
    importance = column_weights(RandomTokens(Evidence(model, tokens, found.inputs)), model)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    written(model, plan_of(model, types, calibration="random"), ours, importance)
    llama_quantize(source, theirs, name_patterns(types), importance)
    assert_same_bytes(ours, theirs)
    tokens = [1, *range(3, 40)]
    exact, mixed = logits(source, tokens), logits(ours, tokens)
    assert np.corrcoef(exact.ravel(), mixed.ravel())[0, 1] > 0.7  # Q2_K is among the types


def test_llama_quantize_takes_the_plan_as_a_file(tmp_path):
    """Layers 1 and 11: an unanchored pattern of one would match the other."""
    model = small_decoder(n_layers=12, n_embd=32, n_ff=64, head_dim=8)
    source = written(model, uniform_plan(model, "F32"), tmp_path / "F32.gguf")
    plan = plan_of(model, cycled_types(model, ("F32", "F16", "BF16", *ggml.NARROW_TYPES)))
    words = tensor_type_file(plan).split()  # llama-quantize reads words, lower-cases what is left of "="
    patterns = [(word.partition("=")[0].lower(), word.partition("=")[2].upper()) for word in words]
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(source, theirs, patterns)
    assert_same_bytes(written(model, plan, tmp_path / "ours.gguf"), theirs)


def test_a_byte_that_differs_is_located(tmp_path):
    model = awkward_model(256)
    ours = written(model, uniform_plan(model, "Q4_K"), tmp_path / "ours.gguf")
    data = bytearray(ours.read_bytes())
    name, row, block, byte = "blk.0.ffn_up.weight", 21, 1, 17
    at = int(read_tensors(ours)[name].data_offset) + (row * 2 + block) * 144 + byte  # Q4_K: 144 bytes a block
    data[at] ^= 0x0F
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    message = (
        f"{name} (Q4_K): row {row}, block {block}, byte {byte} of it: wanted {data[at]:#04x}, "
        f"got {data[at] ^ 0x0F:#04x} (1 of {37 * 2 * 144} bytes differ)"
    )
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}"):
        assert_same_bytes(ours, other)


def test_another_type_is_a_difference(tmp_path):
    model = awkward_model(256)
    ours = written(model, uniform_plan(model, "Q4_K"), tmp_path / "ours.gguf")
    other = written(model, uniform_plan(model, "Q5_K"), tmp_path / "other.gguf")
    with pytest.raises(AssertionError, match=r"^blk\.0\.attn_q\.weight: wanted Q5_K, got Q4_K"):
        assert_same_bytes(ours, other)


# --- the file around them --------------------------------------------------------------------------------------------


def test_gguf_reader_sees_every_key_with_its_value_and_type(tmp_path):
    model = small_decoder()
    extra = {
        "general.tags": kv(["a", "ü"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "test.flag": kv(False, GGUFValueType.BOOL),
        "test.big": kv(2**40, GGUFValueType.UINT64),
        "test.precise": kv(0.1, GGUFValueType.FLOAT64),
        "test.negative": kv(-3, GGUFValueType.INT32),
    }
    model = replace(model, metadata={**model.metadata, **extra})
    reader = GGUFReader(written(model, uniform_plan(model, "Q4_K"), tmp_path / "model.gguf"))
    for key, wanted in model.metadata.items():
        field = reader.fields[key]
        assert field.types[0] == wanted.type, key
        if wanted.type == GGUFValueType.ARRAY and wanted.sub_type is not None:
            assert field.types[1] == wanted.sub_type, key
        value = np.float32(wanted.value).tolist() if GGUFValueType.FLOAT32 in field.types else wanted.value
        assert field.contents() == value, key
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.file_type", "general.quantization_version"}
    assert {key for key in reader.fields if not key.startswith("nsds_gguf.")} == {*model.metadata, *own}


def test_our_own_keys(tmp_path):
    model = small_decoder()
    scores = Scores(recipe(metric="nsds", se="product"), (), model.model_id, model.name)
    target = Target("size", 1_500_000)
    types = dict.fromkeys((tensor.name for tensor in model.tensors if tensor.is_matrix), "Q4_K")
    plan = plan_of(model, types, target=target, calibration="random", scores=scores.digest)
    reader = GGUFReader(written(model, plan, tmp_path / "model.gguf"))
    found = {key: reader.fields[key].contents() for key in reader.fields if key.startswith("nsds_gguf.")}
    assert found == {
        "nsds_gguf.version": __version__,
        "nsds_gguf.metric": "none",
        "nsds_gguf.allocator": "fisher",
        "nsds_gguf.rounding": "rtn",
        "nsds_gguf.calibration": "random",
        "nsds_gguf.recipe": plan.recipe.to_json(),
        "nsds_gguf.target": "1500000 bytes",
        "nsds_gguf.scores_sha256": scores.digest,
        "nsds_gguf.plan_sha256": plan.digest,
    }
    assert reader.fields["general.quantization_version"].contents() == 2


@pytest.mark.parametrize(
    ("embedding", "output", "number"),
    [  # numbers of enum llama_ftype in llama.h
        ("Q6_K", "Q2_K", 18),
        ("Q2_K", "Q5_K", 17),
        ("BF16", "BF16", 32),
        ("IQ4_NL", "IQ4_NL", 25),
        ("Q2_K", "Q2_K", 0),  # most weights, but not most bytes, are Q2_K: 64 rows of 84 bytes, 8 of 1024
    ],
)
def test_file_type_is_that_of_most_bytes(embedding, output, number, tmp_path):
    shapes = {"token_embd.weight": (32, 256), "output.weight": (32, 256), "blk.0.attn_q.weight": (8, 256)}
    model = writable_model({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, HPARAMS)
    types = {"token_embd.weight": embedding, "output.weight": output}
    types |= {"blk.0.attn_q.weight": "Q3_K"} if number else {}
    reader = GGUFReader(written(model, plan_of(model, types), tmp_path / "model.gguf"))
    assert reader.fields["general.file_type"].contents() == number


def test_the_header_is_as_long_as_foreseen(tmp_path):
    """The header's length is asked for before there is a plan, and is where the first tensor begins."""
    model = small_decoder()
    n_bytes = header_bytes(model, recipe(calibration="none", types=("Q3_K",)))
    path = written(model, uniform_plan(model, "Q3_K"), tmp_path / "model.gguf")
    reader = GGUFReader(path)
    assert reader.data_offset == reader.tensors[0].data_offset == n_bytes
    assert n_bytes % 32 == 0


def test_keys_are_packed_as_gguf_packs_them(tmp_path):
    """Arrays are packed at once; gguf packs them item by item."""
    numbers = [kind for kind in GGUFValueType if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)]
    arrays = {f"test.{kind.name}": kv([0, 1, 1], GGUFValueType.ARRAY, kind) for kind in numbers}
    arrays["test.bytes"] = kv(bytes(range(256)), GGUFValueType.ARRAY, GGUFValueType.UINT8)
    arrays["test.texts"] = kv(["", "a\0b", "Grüße", "😀"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    scalars = {"test.text": kv("Grüße", GGUFValueType.STRING), "test.yes": kv(True, GGUFValueType.BOOL)}
    model = replace(small_decoder(), metadata={**arrays, **scalars})
    ours = header.file_header(model.architecture, model.metadata, (), {})
    writer = GGUFWriter(tmp_path / "theirs.gguf", model.architecture)
    writer.kv_data[0] = dict(model.metadata)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = (tmp_path / "theirs.gguf").read_bytes()
    assert ours == theirs + b"\0" * (-len(theirs) % 32)


def test_a_plan_with_another_header_is_refused(tmp_path):
    model = small_decoder()
    plan = uniform_plan(model, "Q3_K")
    wrong = replace(plan, header_bytes=plan.header_bytes + 32)
    with pytest.raises(OutputError, match=r"model.gguf: header takes \d+ bytes, the plan says \d+: plan again$"):
        written(model, wrong, tmp_path / "model.gguf")


def test_tensors_are_padded_with_zeros(tmp_path):
    """Odd rows of 32 weights: at Q4_0, 18 bytes each, no tensor ends where the next may begin."""
    rng = np.random.default_rng(9)
    arrays = {f"blk.{i}.attn_q.weight": rng.standard_normal((2 * i + 1, 32)).astype(np.float32) for i in range(4)}
    model = writable_model(arrays, HPARAMS)
    plan = uniform_plan(model, "Q4_0")
    path = written(model, plan, tmp_path / "model.gguf")
    data, end = path.read_bytes(), plan.header_bytes
    for tensor in GGUFReader(path).tensors:
        assert tensor.data_offset % 32 == 0
        assert tensor.data_offset - end == -end % 32
        assert not any(data[end : tensor.data_offset])
        end = int(tensor.data_offset + tensor.n_bytes)
    assert len(data) - end == -end % 32 > 0
    assert not any(data[end:])
    assert len(data) == plan.file_bytes


def test_the_same_input_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(Threads, "slab_bytes", 1 << 14)
    model = small_decoder()
    plan, importance = plan_of(model, cycled_types(model)), random_importance(model)
    first = written(model, plan, tmp_path / "1.gguf", importance, n_threads=1).read_bytes()
    assert written(model, plan, tmp_path / "2.gguf", importance, n_threads=1).read_bytes() == first
    assert written(model, plan, tmp_path / "3.gguf", importance, n_threads=3).read_bytes() == first


def test_progress_counts_every_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(Threads, "slab_bytes", 1 << 14)
    model, calls = small_decoder(), []
    plan = uniform_plan(model, "Q8_0")
    path = tmp_path / "model.gguf"
    write_gguf(model, plan, TensorQuantizers(), path, workers=Threads(2), progress=lambda *call: calls.append(call))
    done = [n for n, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (model.n_weights, model.n_weights)


def test_a_bounded_number_of_slabs_is_in_flight(tmp_path, monkeypatch):
    """However long the model, reading never runs further ahead of the disk than two slabs a thread."""
    monkeypatch.setattr(Threads, "slab_bytes", 4 * 256)
    written_weights, ahead, lock = 0, [], threading.Lock()
    read_weights = 0

    def read_rows(start, stop):
        nonlocal read_weights
        with lock:
            read_weights += (stop - start) * 256
            ahead.append(read_weights - written_weights)
        return np.ones((stop - start, 256), np.float32)

    def progress(done, total):
        nonlocal written_weights
        with lock:
            written_weights = done

    tensor = read_by(make_tensor("blk.0.attn_q.weight", np.ones((500, 256), np.float32)), read_rows)
    model = replace(writable_model({}, HPARAMS), tensors=(tensor,))
    plan, path = uniform_plan(model, "Q4_K"), tmp_path / "model.gguf"
    write_gguf(model, plan, TensorQuantizers(), path, workers=Threads(3), progress=progress)
    assert read_weights == 500 * 256
    assert max(ahead) <= 3 * 2 * 256


# --- what goes wrong -------------------------------------------------------------------------------------------------


def damaged(value_by_index, type_name="Q4_K"):
    """Return a model with one damaged tensor, and a plan for it."""
    weights = np.ones((40, 256), np.float32)
    for index, value in value_by_index.items():
        weights[index] = value
    model = writable_model({"blk.0.ffn_up.weight": weights}, HPARAMS)
    return model, uniform_plan(model, type_name)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({(3, 7): np.nan}, "1 NaN and 0 infinite"),
        ({(39, 255): np.inf}, "0 NaN and 1 infinite"),
        ({(0, 0): -np.inf, (0, 1): np.inf}, "0 NaN and 2 infinite"),  # their sum is NaN, with a warning
        ({(0, 0): np.nan, (20, 1): np.inf, (30, 2): np.nan}, "2 NaN and 1 infinite"),
    ],
)
def test_weights_that_are_no_numbers_are_counted(values, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(Threads, "slab_bytes", 4 * 10 * 256)
    model, plan = damaged(values)
    message = (
        f"tensor checkpoint.blk.0.ffn_up.weight: {counts} of 10240 weights; "
        "wanted finite numbers: the file is damaged, download it again"
    )
    with pytest.raises(ModelError, match=f"^{message}$"):
        written(model, plan, tmp_path / "model.gguf")


@pytest.mark.parametrize(("type_name", "value"), [("F16", 7e4), ("Q8_0", -1e7), ("Q4_K", 1e9), ("BF16", 3.4e38)])
def test_weights_beyond_their_type_are_refused(type_name, value, tmp_path):
    """llama_model_quantize refuses them too, without the name of the tensor."""
    model, plan = damaged({(3, 7): value}, type_name)
    message = (
        f"tensor checkpoint.blk.0.ffn_up.weight: weights up to {abs(value):g} overflow {type_name}: "
        r"give it a type that holds them, --tensor-type 'blk\.0\.ffn_up\.weight=F32'"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        written(model, plan, tmp_path / "model.gguf")


@pytest.mark.parametrize(("type_name", "value"), [("BF16", 7e4), ("Q8_0", 7e4), ("F32", 3.4e38), ("F16", -65504)])
def test_large_weights_that_fit_are_written(type_name, value, tmp_path):
    model, plan = damaged({(3, 7): value}, type_name)
    source = written(model, uniform_plan(model, "F32"), tmp_path / "F32.gguf")
    llama_quantize(source, tmp_path / "theirs.gguf", name_patterns({"blk.0.ffn_up.weight": type_name}))
    assert_same_bytes(written(model, plan, tmp_path / "ours.gguf"), tmp_path / "theirs.gguf")


def test_disk_full(tmp_path, monkeypatch):
    """A stream that takes the header and then no more."""

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 40_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedWriter(FullDisk(path, mode)))
    model = small_decoder()
    message = f"{tmp_path}: disk full or file too large while writing: No space left on device"
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        written(model, uniform_plan(model, "Q4_K"), tmp_path / "model.gguf")


def test_file_size_limit(tmp_path):
    """The system itself refuses."""
    import resource  # Windows has none

    model, path = small_decoder(), tmp_path / "model.gguf"
    plan = uniform_plan(model, "Q4_K")
    message = f"{tmp_path}: disk full or file too large while writing: File too large"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=f"^{re.escape(message)}$"), unfinished(path) as temporary:
            written(model, plan, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_no_folder(tmp_path):
    model = small_decoder()
    with pytest.raises(OutputError, match=r"missing: cannot write: .*No such file"):
        written(model, uniform_plan(model, "Q4_K"), tmp_path / "missing" / "model.gguf")


def test_an_error_while_reading_stops_the_write(tmp_path):
    """What the reader raises comes through, and no thread goes on."""

    def read_rows(start, stop):
        raise ModelError("the file has shrunk")

    model = small_decoder()
    tensor = read_by(model.tensors[5], read_rows)
    model = replace(model, tensors=(*model.tensors[:5], tensor, *model.tensors[6:]))
    n_threads = threading.active_count()
    with pytest.raises(ModelError, match=r"^the file has shrunk$"):
        written(model, uniform_plan(model, "Q4_K"), tmp_path / "model.gguf")
    assert threading.active_count() == n_threads


# --- the temporary file ----------------------------------------------------------------------------------------------


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "model.gguf"
    with unfinished(path) as temporary:
        assert temporary.parent.parent == tmp_path
        assert temporary.parent.name.startswith(".nsds-gguf-")
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_replaces_an_older_one_at_the_end_only(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"^full$"), unfinished(path) as temporary:
        temporary.write_bytes(b"half")
        raise OutputError("full")
    assert path.read_bytes() == b"old"
    with unfinished(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ModelError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_leaves_nothing(error, tmp_path):
    with pytest.raises(error), unfinished(tmp_path / "model.gguf") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_failure_before_anything_is_written_leaves_nothing(tmp_path):
    with pytest.raises(ModelError), unfinished(tmp_path / "model.gguf", keep_failed=True):
        raise ModelError
    assert not list(tmp_path.iterdir())


def test_a_failed_file_can_be_kept(tmp_path):
    with pytest.raises(ModelError), unfinished(tmp_path / "model.gguf", keep_failed=True) as temporary:
        temporary.write_bytes(b"suspect")
        raise ModelError
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.failed"]
    assert (tmp_path / "model.gguf.failed").read_bytes() == b"suspect"


def test_ctrl_c_leaves_nothing_even_when_failures_are_kept(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(KeyboardInterrupt), unfinished(path, keep_failed=True) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_name_that_cannot_be_given(tmp_path):
    path = tmp_path / "model.gguf"
    path.mkdir()
    with (
        pytest.raises(OutputError, match=f"^{re.escape(str(tmp_path))}: cannot write: "),
        unfinished(path) as temporary,
    ):
        temporary.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_in_the_middle_of_writing(tmp_path, monkeypatch):
    """A real signal, sent while the threads are busy: they end, and the file goes."""
    monkeypatch.setattr(Threads, "slab_bytes", 1 << 14)
    model = small_decoder()
    tensor = model.tensors[9]

    def read_rows(start, stop):
        if start == 0:
            signal.raise_signal(signal.SIGINT)  # from a worker; Python raises KeyboardInterrupt in the main thread
        return tensor.rows(slice(start, stop))

    model = replace(model, tensors=(*model.tensors[:9], read_by(tensor, read_rows), *model.tensors[10:]))
    n_threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "model.gguf") as temporary:
        written(model, uniform_plan(model, "Q3_K"), temporary)
    assert threading.active_count() == n_threads
    assert not list(tmp_path.iterdir())
