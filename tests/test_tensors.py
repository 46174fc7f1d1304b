"""Tensors as data: rows, slabs and steps against numpy, and the same bytes in another process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from models import make_tensor
from plans import uniform_plan
from test_fp8 import checkpoint, codes, floats, random_scales
from tiny_gguf import write_tiny_gguf
from zoo_specs import SPECS, write_spec

from nsds_gguf.compute.layers import entries_of, rows_of, view_layer
from nsds_gguf.errors import ModelError
from nsds_gguf.llamacpp import ggml
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.equalization import find_equalization
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.read import open_model
from nsds_gguf.read.gguf_source import GgufTensor
from nsds_gguf.read.safetensors import SafetensorsTensor
from nsds_gguf.read.torch_bin import read_torch_file
from nsds_gguf.records import FromArray, Source, Stack, Tensor
from nsds_gguf.records.transforms import (
    MinusExp,
    PlusOne,
    Reshape,
    ScaleByPowersOfTwo,
    SliceColumns,
    SliceRows,
    TakeColumns,
    TakeRows,
    Transform,
    Transformed,
    Transpose,
)
from nsds_gguf.system.workers import Threads

_READER = """
import hashlib, json, pickle, sys
while True:
    try:
        tensors = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    print(json.dumps([hashlib.sha256(tensor.load().tobytes()).hexdigest() for tensor in tensors]), flush=True)
"""


class OtherProcess:
    """A Python that unpickles tensors and reads them."""

    def __init__(self, path: Sequence[str | Path] = ()) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, *sys.path]))}
        command = [sys.executable, "-c", _READER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def reads_the_same(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether it finds the bytes of all tensors that are found here."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(pickle.dumps(tensors))
        self.process.stdin.flush()
        theirs = json.loads(self.process.stdout.readline())
        ours = [hashlib.sha256(tensor.load().tobytes()).hexdigest() for tensor in tensors]
        assert len(ours) == len(theirs) == len(tensors) > 0
        return theirs == ours

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def other() -> Iterator[OtherProcess]:
    process = OtherProcess()
    yield process
    process.close()


def tensor_of(
    stored: Source, shape: tuple[int, ...], dtype: str = "F32", transforms: Sequence[Transform] = ()
) -> Tensor:
    return Tensor("blk.0.ffn_up.weight", "ffn_up", 0, shape, dtype, "up", stored, tuple(transforms))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


# --- in another process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_every_class_reads_the_same_in_another_process(name: str, other: OtherProcess, tmp_path: Path) -> None:
    """As a folder, layer by layer in views, with channels equalized, and as a GGUF."""
    model = open_model(write_spec(tmp_path / "model", name))
    assert pickle.loads(pickle.dumps(model)) == model
    spread = {tensor.n_cols: np.exp2(np.linspace(-20, 20, tensor.n_cols)) for tensor in model.tensors}
    inputs = {tensor.name: spread[tensor.n_cols] for tensor in model.tensors}
    equalized = find_equalization(model, inputs).applied(model)
    views = [matrix for i in range(model.hparams.n_layers) for matrix in view_layer(model, i).matrices()]
    plan = uniform_plan(model, "F16")
    write_gguf(model, plan, TensorQuantizers(), tmp_path / "model.gguf", workers=Threads(1))
    again = open_model(tmp_path / "model.gguf")
    assert pickle.loads(pickle.dumps(again)) == again
    assert other.reads_the_same([*model.tensors, *views, *equalized.tensors, *again.tensors])


def test_a_split_gguf_reads_the_same_in_another_process(other: OtherProcess, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0", split_max_tensors=8)
    model = open_model(min(tmp_path.glob("*.gguf")))
    assert len(model.files) > 1
    assert other.reads_the_same(model.tensors)


@pytest.mark.parametrize("type_name", [*ggml.TYPES, "I32", "F64"])
def test_every_type_of_gguf_reads_the_same_in_another_process(
    type_name: str, other: OtherProcess, tmp_path: Path
) -> None:
    rows = numbers(6, 512)
    data = {"I32": rows.astype("<i4"), "F64": rows.astype("<f8")}.get(type_name)
    data = ggml.quantize(rows, type_name) if data is None else data.view(np.uint8)
    (tmp_path / "data").write_bytes(b"before" + data.tobytes())
    stored = GgufTensor("up", type_name, (6, 512), tmp_path / "data", 6)
    tensor = tensor_of(stored, (6, 512), type_name)
    assert other.reads_the_same([tensor, rows_of(tensor, 2, 5)])
    order = np.array([5, 0, 0, 4, 3, 1])
    np.testing.assert_array_equal(tensor.rows(order), tensor.load()[order])
    np.testing.assert_array_equal(stored.values(order, slice(3, 9)), tensor.load()[order, 3:9])
    if tensor.is_copied:
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(tensor)).stored_rows(slice(1, 4)), data[1:4])


def test_fp8_reads_the_same_in_another_process(other: OtherProcess, tmp_path: Path) -> None:
    entry, values = codes((300, 200))
    scales = random_scales((3, 2))
    stored = checkpoint(tmp_path, {"w": entry, "w_scale_inv": floats(scales)})["w"]
    tensor = tensor_of(stored, (300, 200), "F8_E4M3")
    grid = scales.repeat(128, axis=0).repeat(128, axis=1)[:300, :200]
    np.testing.assert_array_equal(tensor.load(), values.astype(np.float32) * grid)
    assert other.reads_the_same([tensor, rows_of(tensor, 100, 290)])


# A torch that maps arrays of numpy: as much of it as our reader calls.
_TORCH = """
    import numpy as np
    strided, uint8, float32 = "strided", np.uint8, np.float32

    class Tensor:
        layout, is_quantized = strided, False
        device = type("Device", (), {"type": "cpu"})

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, f"torch.{array.dtype}"

        def detach(self): return self
        def numel(self): return self.array.size
        def reshape(self, *shape): return Tensor(self.array.reshape(*shape))
        def contiguous(self): return Tensor(np.ascontiguousarray(self.array))
        def numpy(self): return self.array
        def to(self, dtype, copy): return Tensor(self.array.astype(dtype, copy=copy))
        def __getitem__(self, index):
            parts = index if isinstance(index, tuple) else (index,)
            return Tensor(self.array[tuple(getattr(part, "array", part) for part in parts)])

    def from_numpy(array): return Tensor(array)

    def load(file, map_location, weights_only, mmap):
        whole = np.memmap(file, np.float32, "r", offset=4)
        return {"a": Tensor(whole[:30].reshape(5, 6)), "b": Tensor(whole[30:42].reshape(3, 4).T)}
"""


def test_torch_files_read_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has mapped stays here: the other process maps the file itself."""
    (tmp_path / "torch.py").write_text(textwrap.dedent(_TORCH))
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch.py")
    assert spec is not None and spec.loader is not None
    torch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torch)
    monkeypatch.setitem(sys.modules, "torch", torch)
    file, values = tmp_path / "pytorch_model.bin", numbers(42)
    file.write_bytes(b"PK\x03\x04" + values.tobytes())
    stored = read_torch_file(file)
    tensors = [tensor_of(stored["a"], (5, 6)), tensor_of(stored["b"], (4, 3), transforms=[TakeRows(np.array([3, 1]))])]
    np.testing.assert_array_equal(tensors[0].load(), values[:30].reshape(5, 6))
    np.testing.assert_array_equal(stored["b"].rows(slice(None)), values[30:].reshape(3, 4).T)
    assert len(pickle.dumps(tensors)) < 4096
    process = OtherProcess([tmp_path])
    assert process.reads_the_same([tensors[0], rows_of(tensors[1], 0, 2)])
    process.close()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="tensor a can no longer be read: the file shrank from 172 to 168 bytes"):
        pickle.loads(pickle.dumps(tensors[0])).load()


# --- rows and slabs -------------------------------------------------------------------------------------------


def test_rows_by_slice_and_by_number() -> None:
    array = numbers(3, 4, 5)
    tensor, flat = make_tensor("blk.0.ffn_up_exps.weight", array), array.reshape(12, 5)
    for index in (slice(2, 9), slice(None), slice(-3, None), slice(4, 99), slice(5, 5), np.array([7, 2, 2, 11]),
                  np.array([3, 4, 5]), np.arange(0)):  # fmt: skip
        rows = tensor.rows(index)
        np.testing.assert_array_equal(rows, flat[index])
        assert rows.dtype == np.float32 and rows.shape[1] == 5 and rows.flags.c_contiguous
        rows[:] = 0  # the caller's own
    np.testing.assert_array_equal(tensor.load(), array)


@pytest.mark.parametrize("index", [np.array([0, 12]), np.array([-1]), slice(None, None, 2), slice(None, None, -1)])
def test_rows_that_there_are_not(index: slice | np.ndarray) -> None:
    with pytest.raises(IndexError):
        make_tensor("blk.0.ffn_up.weight", numbers(12, 5)).rows(index)


def test_slabs_are_whole_tiles_of_one_matrix() -> None:
    tensor = make_tensor("blk.0.ffn_up_exps.weight", numbers(2, 11, 5))
    slices = [(some.start, some.stop) for some in tensor.row_slices(4 * 5 * 7, multiple_of=3)]
    assert slices == [(0, 6), (6, 11), (11, 17), (17, 22)]
    slabs = list(tensor.slabs(4 * 5 * 7, multiple_of=3))
    assert [start for start, _ in slabs] == [0, 6, 11, 17]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in slabs]), tensor.load().reshape(22, 5))
    assert [some.stop for some in tensor.row_slices(1)] == list(range(1, 23))
    assert [some.stop for some in tensor.row_slices(1, multiple_of=8)] == [8, 11, 19, 22]
    assert [(start, rows.shape) for start, rows in make_tensor("output_norm.weight", numbers(9)).slabs()] == [
        (0, (1, 9))
    ]


def test_stored_rows_are_those_of_tables_only() -> None:
    tensor = make_tensor("blk.0.ffn_up.weight", numbers(4, 5))
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight: stored rows of F32"):
        tensor.stored_rows(slice(0, 1))


def test_one_check_finds_what_is_not_finite() -> None:
    """Whatever is done to the weights, the tensor that is named and counted is the one in the file."""
    array = numbers(4, 6)
    array[2, 3:] = np.nan, np.inf, -np.inf
    good, bad = (FromArray(name, values) for name, values in (("good", numbers(4, 6)), ("bad", array)))
    transposed = tensor_of(bad, (6, 4), transforms=[Transpose((1, 6, 4))])
    stack = tensor_of(Stack((good, bad)), (2, 4, 6))
    message = "^tensor bad: 1 NaN and 2 infinite of 24 weights; wanted finite numbers: the file is damaged, download it"
    for tensor, index in ((transposed, slice(5, 6)), (stack, np.array([6, 0])), (rows_of(stack, 5, 7), slice(None))):
        with pytest.raises(ModelError, match=message):
            tensor.rows(index)
    assert transposed.rows(slice(0, 3)).shape == (3, 4)
    assert stack.rows(slice(0, 6)).shape == (6, 6)
    large = tensor_of(FromArray("large", np.full((1, 2), 100, np.float32)), (1, 2), transforms=[MinusExp()])
    with pytest.raises(ModelError, match="tensor large: its weights are finite, but overflow float32 when"):
        large.load()


# --- steps ----------------------------------------------------------------------------------------------------

_MATRIX = numbers(12, 10)
_ROWS, _COLUMNS = np.array([9, 0, 5, 5, 2]), np.array([3, 8, 0])
_BY_ROW, _BY_COLUMN = np.arange(12) - 6, np.arange(10) - 5

STEPS: dict[str, tuple[Transform, np.ndarray]] = {
    "take rows": (TakeRows(_ROWS), _MATRIX[_ROWS]),
    "take columns": (TakeColumns(_COLUMNS), _MATRIX[:, _COLUMNS]),
    "slice rows": (SliceRows(3, 8), _MATRIX[3:8]),
    "slice columns": (SliceColumns(2, 9), _MATRIX[:, 2:9]),
    "reshape": (Reshape((2, 5)), _MATRIX[0].reshape(2, 5)),
    "transpose": (Transpose((1, 10, 12)), _MATRIX.T),
    "transpose each": (Transpose((3, 10, 4)), _MATRIX.reshape(3, 4, 10).swapaxes(1, 2).reshape(30, 4)),
    "plus one": (PlusOne(), _MATRIX + np.float32(1)),
    "minus exp": (MinusExp(), -np.exp(_MATRIX)),
    "scale columns": (ScaleByPowersOfTwo(columns=_BY_COLUMN), _MATRIX * np.float32(2) ** _BY_COLUMN),
    "scale both": (
        ScaleByPowersOfTwo(_BY_ROW, _BY_COLUMN), _MATRIX * np.exp2(_BY_ROW[:, None] + _BY_COLUMN).astype("f4")
    ),
}  # fmt: skip


def sources(tmp_path: Path) -> list[Source]:
    """Return the matrix in memory, in a file, and as the stack of its quarters."""
    (tmp_path / "matrix").write_bytes(bytes(20) + _MATRIX.tobytes())
    parts = [SafetensorsTensor("m", "F32", (3, 10), tmp_path / "matrix", 20 + 4 * 30 * i) for i in range(4)]
    whole = SafetensorsTensor("m", "F32", (12, 10), tmp_path / "matrix", 20)
    return [FromArray("m", _MATRIX), whole, Stack(tuple(parts))]


@pytest.mark.parametrize("name", STEPS)
def test_every_step_gives_the_rows_and_columns_asked_for(name: str, tmp_path: Path) -> None:
    step, wanted = STEPS[name]
    n_rows, n_cols = wanted.shape
    some = np.random.default_rng(1).integers(0, n_rows, 7)
    for stored in sources(tmp_path):
        for rows in (slice(0, n_rows), slice(1, n_rows), slice(n_rows - 1, n_rows), some):
            for columns in (slice(0, n_cols), slice(1, n_cols - 1)):
                found = Transformed(stored, step).values(rows, columns)
                np.testing.assert_array_equal(found, wanted[rows, columns])
                assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
        tensor = pickle.loads(pickle.dumps(tensor_of(stored, wanted.shape, transforms=[step])))
        np.testing.assert_array_equal(tensor.load(), wanted)
    np.testing.assert_array_equal(sources(tmp_path)[1].rows(slice(None)), _MATRIX)  # no step writes below


def test_steps_follow_one_another() -> None:
    tensor = tensor_of(FromArray("m", _MATRIX), (10, 5), transforms=[TakeRows(_ROWS), Transpose((1, 10, 5)), PlusOne()])
    np.testing.assert_array_equal(tensor.load(), _MATRIX[_ROWS].T + np.float32(1))
    np.testing.assert_array_equal(rows_of(tensor, 4, 9).rows(slice(1, 3)), (_MATRIX[_ROWS].T + np.float32(1))[5:7])
    np.testing.assert_array_equal(entries_of(tensor, 1, 4, row=6).load(), _MATRIX[_ROWS].T[6, 1:4] + np.float32(1))
