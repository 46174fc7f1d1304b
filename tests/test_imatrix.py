"""Importance matrices: both forms as llama-imatrix writes them, what is made of them, and what is refused.

``golden/imatrix.gguf`` and ``.dat`` are llama-imatrix's (llama-cpp-python 0.3.36), of the demo model in BF16 over the
same eight chunks of held-out text.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arrays import random_arrays
from command import call, message
from gguf import GGUFReader, GGUFWriter
from llama_quantize import assert_same_bytes, llama_quantize, name_patterns, read_tensors
from models import make_model
from recipes import recipe
from tiny_archs import write_tiny_arch

from nsds_gguf.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from nsds_gguf.compute.input_moments import Moments
from nsds_gguf.conversion import convert, plan
from nsds_gguf.errors import RecordError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp import ggml, llama
from nsds_gguf.read import open_model
from nsds_gguf.records import Options
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"
GOLDEN = Path(__file__).parent / "golden"
UNCHECKED = VerifyOptions(enabled=False)


def legacy(*entries: tuple[str, int, list[float]], n: int | None = None) -> bytes:
    """Return the older form of entries ``(name, calls, sums)``."""
    data = struct.pack("<i", len(entries) if n is None else n)
    for name, n_calls, sums in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(sums))
        data += np.array(sums, "<f4").tobytes()
    return data + struct.pack("<ii", 3, 4) + b"text"


def of_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    """Write a GGUF of tensors."""
    writer = GGUFWriter(path, "")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What is read


def test_both_forms_of_llama_imatrix_say_the_same() -> None:
    new, old = read_imatrix(GOLDEN / "imatrix.gguf"), read_imatrix(GOLDEN / "imatrix.dat")
    assert new.columns.keys() == old.columns.keys()
    assert len(new.columns) == 6 * 7  # no embedding, no output
    assert all(np.array_equal(new.columns[name], old.columns[name]) for name in new.columns)
    assert new.name != old.name


def test_means_are_sums_over_counts() -> None:
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(GOLDEN / "imatrix.gguf").tensors}
    found = read_imatrix(GOLDEN / "imatrix.gguf")
    for name, columns in found.columns.items():
        means = tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]
        assert np.allclose(columns, means.reshape(columns.shape), rtol=1e-6)


def test_the_older_form_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(("a.weight", 2, [2.0, 4.0]), ("b.weight", 0, [3.0, 1.0])))
    found = read_imatrix(path).columns
    assert np.array_equal(found["a.weight"], [[1.0, 2.0]])
    assert np.array_equal(found["b.weight"], [[3.0, 1.0]])


def test_experts_have_their_own_counts(tmp_path: Path) -> None:
    sums = np.array([[2.0, 6.0], [5.0, 5.0], [0.0, 8.0]], np.float32)
    counts = np.array([[2.0], [0.0], [4.0]], np.float32)
    path = of_gguf(tmp_path / "i.gguf", {"e.weight.in_sum2": sums, "e.weight.counts": counts})
    columns = read_imatrix(path).columns["e.weight"]
    assert np.allclose(columns, [[1.0, 3.0], [1.0, 1.0], [1e-4, 2.0]])  # never seen: alike; 0: the least there is


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Experts with their own counts; the keys that llama-imatrix writes."""
    squares = np.array([[1.0, 3.0], [0.0, 0.0], [2.5, 0.5]])
    moments = {
        "b.weight": Moments(squares, np.array([4, 0, 6])),
        "a.weight": Moments(squares[2], np.array([7])),
    }
    write_imatrix(tmp_path / "i.gguf", moments, source="text", n_chunks=3, n_ctx=8)
    columns = read_imatrix(tmp_path / "i.gguf").columns
    assert np.allclose(columns["a.weight"], [[2.5, 0.5]])
    assert np.allclose(columns["b.weight"], [[1.0, 3.0], [1.0, 1.0], [2.5, 0.5]])
    ours, theirs = (GGUFReader(path).fields for path in (tmp_path / "i.gguf", GOLDEN / "imatrix.gguf"))
    keys = {name: field.types for name, field in theirs.items() if name.startswith(("imatrix.", "general."))}
    assert {name: ours[name].types for name in keys} == keys


# What it is good for


def test_presets_with_an_importance_matrix(tmp_path: Path) -> None:
    """Tensor by tensor what ggml makes of the same rows and columns; only the choice of types is llama.cpp's."""
    source = write_tiny_arch(tmp_path / "f32.gguf", "deepseek2")
    rng = np.random.default_rng(1)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(source).tensors}
    weights = {
        name: rng.lognormal(sigma=2, size=(*data.shape[:-2], data.shape[-1])).astype(np.float32)
        for name, data in tensors.items()
        if data.ndim >= 2 and name != "token_embd.weight"
    }
    llama.quantize_preset(source, tmp_path / "plain.gguf", "Q2_K", 1)
    llama.quantize_preset(source, tmp_path / "q2_k.gguf", "Q2_K", 1, weights)
    plain = read_tensors(tmp_path / "plain.gguf")
    n_changed = 0
    for name, found in read_tensors(tmp_path / "q2_k.gguf").items():
        type_name = found.tensor_type.name
        if type_name == "F32":
            continue
        stack = tensors[name].reshape(-1, *tensors[name].shape[-2:])
        columns = weights[name].reshape(len(stack), -1) if name in weights else [None] * len(stack)
        wanted = [ggml.quantize(rows, type_name, own) for rows, own in zip(stack, columns, strict=True)]
        assert np.array_equal(np.asarray(found.data).reshape(-1), np.concatenate(wanted).reshape(-1)), name
        n_changed += bool(plain[name].data.tobytes() != found.data.tobytes())
    assert n_changed > 20


@pytest.mark.slow
def test_quantized_bytes_are_llama_quantizes(tmp_path: Path) -> None:
    """The tensors that the matrix speaks of, in five types, against llama.cpp with the same numbers."""
    imatrix = read_imatrix(GOLDEN / "imatrix.gguf")
    options = Options(target_bpw=3.6, imatrix=imatrix.path)
    (ours,) = convert(DEMO, options, verifying=UNCHECKED, output=tmp_path / "ours.gguf", run=Run(1))
    kept = tuple(t.name for t in ours.plan.tensors if t.name in imatrix.columns)
    plain = tmp_path / "bf16.gguf"
    convert(DEMO, Options(uniform="BF16", calibration="none"), verifying=UNCHECKED, output=plain)
    types = {t.name: t.type for t in ours.plan.tensors if len(t.shape) > 1}
    assert len({types[name] for name in kept}) >= 3
    columns = {name: imatrix.columns[name][0] for name in kept}
    rest = {name: values for name, values in on_random_tokens(tmp_path).items() if name not in columns}
    llama_quantize(plain, tmp_path / "theirs.gguf", name_patterns(types), {**columns, **rest})
    assert_same_bytes(ours.path, tmp_path / "theirs.gguf")


def on_random_tokens(folder: Path) -> dict[str, np.ndarray]:
    """Return the demo's column weights on random tokens."""
    with WorkFolder(folder) as files:
        session = Session(open_model(DEMO), Run(1), files)
        return dict(session.calibrated.column_weights(recipe(), {"Q4_K"}))


@pytest.mark.slow
def test_the_plan_says_where_column_weights_come_from(tmp_path: Path) -> None:
    imatrix = read_imatrix(GOLDEN / "imatrix.dat")
    options = Options(target_bpw=3.6, imatrix=imatrix.path)
    planned = plan(DEMO, options, run=Run(1))
    (made,) = planned.plans
    assert (made.recipe.calibration, made.recipe.rounding) == (imatrix.name, "rtn")
    note = (
        f"Column weights come from imatrix.dat (SHA-256 {imatrix.sha256[:12]}…). It has no entry for "
        "token_embd.weight, output.weight: their weights come from random tokens."
    )
    assert made.notes.count(note) == 1
    with pytest.raises(RecordError, match=f"importance matrix {imatrix.name}: pass that file with --imatrix"):
        convert(DEMO, (), loaded=made, verifying=UNCHECKED, output=tmp_path / "x.gguf")
    with pytest.raises(RecordError, match="pass that file with --imatrix"):
        plan(DEMO, replace(options, imatrix=None), loaded=planned.scores, run=Run(1))
    (file,) = convert(
        DEMO, Options(imatrix=imatrix.path), loaded=made, verifying=UNCHECKED, output=tmp_path / "x.gguf", run=Run(1)
    )
    assert file.plan == made
    without = plan(DEMO, replace(options, imatrix=None, rounding="rtn"), run=Run(1)).plans[0]
    with pytest.raises(RecordError, match=f"made without {imatrix.name}"):
        convert(DEMO, Options(imatrix=imatrix.path), loaded=without, verifying=UNCHECKED, output=tmp_path / "y.gguf")
    again = plan(DEMO, options, loaded=planned.scores, run=Run(1))
    assert again.plans == planned.plans


def test_a_stack_of_experts(tmp_path: Path) -> None:
    arrays, hparams = random_arrays(seed=1, n_embd=256, n_ff=256, n_heads=4, head_dim=64, n_vocab=300, n_layers=1)
    arrays["blk.0.ffn_up_exps.weight"] = np.ones((2, 4, 256), np.float32)
    model = make_model(arrays, hparams)
    one, two = np.full((1, 256), 2.0, np.float32), np.full((2, 256), 3.0, np.float32)

    def weights(columns: np.ndarray) -> np.ndarray:
        return Imatrix(tmp_path, "0" * 64, {"blk.0.ffn_up_exps.weight": columns}).weights(model)[
            "blk.0.ffn_up_exps.weight"
        ]

    assert weights(one).shape == (256,)
    assert weights(two).shape == (2, 256)
    assert weights(two.reshape(1, 512)).shape == (2, 256)  # as the older form has it
    with pytest.raises(RecordError, match="wanted 2 x 256 columns, got 3 x 256"):
        weights(np.ones((3, 256), np.float32))


# The command


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    arguments = ["--target-bpw", "3.6", "--imatrix", GOLDEN / "imatrix.gguf", "--threads", 1]
    assert call("plan", DEMO, *arguments, "--json", tmp_path / "plan.json", "-q").code == 0
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["recipe"]["calibration"].startswith("imatrix:")
    outcome = call("plan", DEMO, *arguments, "--calibration", "norm")
    assert message(outcome, 4) == "--imatrix and --calibration norm contradict each other; drop one"
    outcome = call("convert", DEMO, "--plan", tmp_path / "plan.json", "-o", tmp_path / "x.gguf", "--no-verify")
    assert message(outcome, 4).endswith("pass that file with --imatrix")
    assert not (tmp_path / "x.gguf").exists()


# What is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "4 bytes wanted at byte 0 of 0"),
        (legacy(n=0), "0 entries"),
        (legacy(("a", 1, [1.0]), n=2), "bytes wanted at byte"),
        (legacy(("a", 1, [1.0]))[:-20], "bytes wanted at byte"),
        (struct.pack("<i", 1) + struct.pack("<i", -5), "-5 bytes wanted at byte 8"),
        (legacy(("a", 1, [float("nan")])), "a: wanted finite mean squares from 0 up"),
        (legacy(("a", 1, [-1.0, 2.0])), "a: wanted finite mean squares from 0 up"),
        (b"GGUF" + bytes(30), "GGUF"),
    ],
)
def test_damaged_files(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=reason):
        read_imatrix(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot be read: No such file or directory; wanted an importance matrix"):
        read_imatrix(tmp_path / "none")
    model = of_gguf(tmp_path / "model.gguf", {"a.weight": np.ones((2, 2), np.float32)}, kind="model")
    with pytest.raises(RecordError, match=r"general\.type is 'model', wanted 'imatrix'"):
        read_imatrix(model)
    lonely = of_gguf(tmp_path / "lonely.gguf", {"a.weight.in_sum2": np.ones((2, 2), np.float32)})
    with pytest.raises(RecordError, match=r"a\.weight\.in_sum2 has no matching \.counts"):
        read_imatrix(lonely)


def test_a_matrix_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(("blk.0.attn_q.weight", 1, [1.0] * 64)))
    options = Options(target_bpw=4, imatrix=path)
    with pytest.raises(RecordError, match=r"blk\.0\.attn_q\.weight: wanted 1 x 256 columns, got 1 x 64"):
        plan(DEMO, options)
    path.write_bytes(legacy(("h.0.weight", 1, [1.0])))
    with pytest.raises(RecordError, match=r"has no tensor of Books 4\.6m; it belongs to another model"):
        plan(DEMO, options)
