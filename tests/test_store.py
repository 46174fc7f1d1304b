"""Records of finished work: what is put comes back or is missing, never wrong, whatever happened to the files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command import ENVIRONMENT

from nsds_gguf import __version__
from nsds_gguf.errors import OutputError
from nsds_gguf.system import store as store_module
from nsds_gguf.system.atomic import unfinished
from nsds_gguf.system.filestate import FileState
from nsds_gguf.system.partfile import PartFile
from nsds_gguf.system.store import Store, file_name, seal, unseal
from nsds_gguf.system.workfolder import WorkFolder

DAMAGED = "Recomputed: the record of scores is damaged."
STALE = "Recomputed: the record of scores is of another model or other options."
ARRAYS = {
    "factors": np.arange(24, dtype=np.float32).reshape(4, 6),
    "is_dead": np.array([True, False]),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "nothing": np.zeros((0, 3), np.int16),
    "scalar": np.array(np.nan),
}


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    return Store(tmp_path, "key", said.append)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def put(store, kind):
    """Put a record of a kind, called ``scores/1``."""
    if kind == "value":
        store.put("scores/1", {"layers": [1, 2.5, None, "é"]})
    elif kind == "arrays":
        store.put_arrays("scores/1", ARRAYS)
    else:
        with store.put_file("scores/1") as path:
            path.write_bytes(bytes(range(256)))


def get(store, kind):
    """Return whether the record that ``put`` put is there; what is there must be it."""
    if kind == "value":
        found = store.get("scores/1")
        assert found in (None, {"layers": [1, 2.5, None, "é"]})
    elif kind == "arrays":
        found = store.get_arrays("scores/1")
        assert found is None or list(found) == list(ARRAYS)
        for name in found or {}:
            np.testing.assert_array_equal(found[name], ARRAYS[name], strict=True)
    else:
        found = store.get_file("scores/1")
        assert found is None or found.read_bytes() == bytes(range(256))
    return found is not None


KINDS = ["value", "arrays", "file"]


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_comes_back(store, tmp_path, said, kind):
    assert not get(store, kind)
    put(store, kind)
    assert get(store, kind) and get(Store(tmp_path, "key"), kind)
    put(store, kind)  # over the first
    assert get(store, kind)
    assert len(names(tmp_path)) == (1 if kind == "value" else 2)
    store.remove("scores/1")
    assert not get(store, kind) and names(tmp_path) == [] and said == []


def test_values_come_back_as_json_has_them(store):
    store.put("scores/1", (1, float("inf"), {"a": ()}))
    assert store.get("scores/1") == [1, float("inf"), {"a": []}]
    with pytest.raises(TypeError):
        store.put("scores/2", np.float32(1))
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        store.put_arrays("scores/2", {"a": np.array([{}])})
    assert store.get("scores/2") is None and store.get_arrays("scores/2") is None


def test_a_block_that_fails_leaves_no_record(store, tmp_path):
    put(store, "file")
    with pytest.raises(KeyboardInterrupt), store.put_file("scores/1") as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == [] and store.get_file("scores/1") is None


@pytest.mark.parametrize("kind", ["arrays", "file"])
def test_a_record_that_is_being_replaced_is_missing_and_not_damaged(store, tmp_path, said, kind, monkeypatch):
    def die(*_arguments):
        raise KeyboardInterrupt

    put(store, kind)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_put_head", die)
        put(store, kind)
    assert not get(store, kind) and said == []
    put(store, kind)
    assert get(store, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_another_key_is_removed_and_told_once(store, tmp_path, said, kind):
    put(store, kind)
    store.put("scores/2", 1)
    other = Store(tmp_path, "other", said.append)
    assert not get(other, kind) and other.get("scores/2") is None
    assert said == [STALE] and names(tmp_path) == []


def test_a_record_of_another_kind_is_stale(store, said):
    store.put("scores/1", 1)
    assert store.get_arrays("scores/1") is None and said == [STALE]


def test_records_of_a_kind_are_counted_and_removed_together(store, tmp_path):
    for name in ("scores/1", "scores/2", "scores of others/1", "scores"):
        store.put_arrays(name, ARRAYS)
    total, others = sum(path.stat().st_size for path in tmp_path.iterdir()), store.n_bytes("scores of others")
    others += sum(path.stat().st_size for path in tmp_path.glob("scores-*"))
    assert store.n_bytes("scores") == total - others > 2 * sum(array.nbytes for array in ARRAYS.values())
    store.keyed("more").remove_all("scores")
    assert store.n_bytes("scores") == 0 and others == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert store.get_arrays("scores/1") is None and store.get_arrays("scores of others/1") is not None


def test_what_an_earlier_run_left_is_told_once(store, tmp_path, said):
    store.put("scores/1", 1)
    store.tell_kept("scores", ["scores/1"], 3)  # put by this run
    assert said == []
    later = Store(tmp_path, "key", said.append)
    later.put("scores/2", 1)
    for _ in range(2):
        later.keyed("more").tell_kept("scores", ["scores/1", "scores/2"], 3)
    later.tell_kept("text", ["text"])
    later.tell_kept("nothing", [], 3)
    told = ["Kept from the interrupted run: 1 of 3 scores; 2 left.", "Kept from the interrupted run: text."]
    assert said == told


def test_kinds_of_record_are_told_apart(store, tmp_path, said):
    for name in ("scores/1", "scores/2", "text"):
        store.put(name, 1)
    other = Store(tmp_path, "other", said.append)
    keyed = other.keyed("more")
    assert [keyed.get(name) for name in ("scores/1", "text")] + [other.get("scores/2")] == [None] * 3
    assert said == [STALE, STALE.replace("scores", "text")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["flip", "cut", "grow", "empty", "remove"])
def test_damage_anywhere_is_found(tmp_path, said, kind, change):
    """One bit in turn of every byte; a cut at every 8th byte, in each file of the record."""
    put(Store(tmp_path, "key"), kind)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, data in whole.items():
        cases = {
            "flip": (data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in range(len(data))),
            "cut": (data[:i] for i in range(1, len(data), 8)),
            "grow": (data + more for more in (b"\0", b"\n", data)),
            "empty": (b"",),
            "remove": (None,),
        }[change]
        for case in cases:
            for other, bytes_of_other in whole.items():
                other.write_bytes(bytes_of_other)
            if case is None:
                path.unlink()
            else:
                path.write_bytes(case)
            said = []
            assert not get(Store(tmp_path, "key", said.append), kind)
            is_missing = case is None and path.suffix == ".record"
            assert said == ([] if is_missing else [DAMAGED])
            assert is_missing or names(tmp_path) == []


def test_large_files_are_checked_to_their_end(store, said):
    """A cut or a flipped bit in each stretch of 64 bytes of the last of several chunks that are read."""
    data = np.random.default_rng(0).bytes((2 << 20) + 999)
    for at in range(2 << 20, len(data), 64):
        for change in (data[:at], data[:at] + bytes([data[at] ^ 128]) + data[at + 1 :]):
            with store.put_file("scores/1") as path:
                path.write_bytes(data)
            store.get_file("scores/1").write_bytes(change)
            assert store.get_file("scores/1") is None
    assert said == [DAMAGED]


@pytest.mark.parametrize(
    "head",
    [
        None,
        [],
        1,
        {},
        {"format": store_module.FORMAT},
        {"format": store_module.FORMAT, "key": "key", "kind": "value", "name": "scores/1"},
        {"format": store_module.FORMAT, "key": "key", "kind": "value", "name": "scores/2", "value": 1},
    ],
)
def test_heads_that_are_not_ours(store, tmp_path, said, head):
    (tmp_path / f"{file_name('scores/1')}.record").write_bytes(seal(head))
    assert store.get("scores/1") is None and said == [DAMAGED] and names(tmp_path) == []


@pytest.mark.parametrize(
    "arrays",
    [{"a": np.zeros((3, 2))}, {"a": np.zeros((2, 3), np.float32)}, {"b": np.zeros((2, 3))}, {}, None, "object"],
)
def test_arrays_that_are_not_those_of_the_head(store, tmp_path, said, arrays):
    """The payload has the length and the checksum that the head tells, but other arrays in it."""
    store.put_arrays("scores/1", {"a": np.zeros((2, 3))})
    head_path, payload_path = (tmp_path / (file_name("scores/1") + suffix) for suffix in (".record", ".npz"))
    if arrays is None:
        payload_path.write_bytes(b"no zip")
    elif arrays == "object":
        np.savez(payload_path, a=np.array([{}], dtype=object))
    else:
        np.savez(payload_path, **arrays)
    head = unseal(head_path.read_bytes())
    head |= {"n_bytes": payload_path.stat().st_size, "crc32": store_module.file_crc32(payload_path)}
    head_path.write_bytes(seal(head))
    assert store.get_arrays("scores/1") is None and said == [DAMAGED] and names(tmp_path) == []


def test_a_npz_is_one_for_numpy_too(store, tmp_path):
    put(store, "arrays")
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as found:
        np.testing.assert_array_equal(found["factors"], ARRAYS["factors"])
    assert {entry.compress_type for entry in zipfile.ZipFile(path).infolist()} == {zipfile.ZIP_STORED}


def test_sealed_lines():
    """The CRC-32 of the digits is the one by which implementations are checked."""
    assert seal(123456789) == b"cbf43926 123456789\n"
    value = {"a": [1, "é", None]}
    assert unseal(seal(value)) == value and seal(value).isascii()
    for line in (b"", b"\n", b"00000000 \n", b"cbf43926 123456788\n", b"cbf43926 123456789", b"CBF43926 123456789\n",
                 b"cbf43926 123456789\n\n"):  # fmt: skip
        with pytest.raises(ValueError, match=r"damaged line|Expecting value"):
            unseal(line)


def test_names_of_any_characters_are_files_of_their_own(store, tmp_path):
    found = ["a", "A", "a/b", "a_b", "../../x", "con", "é", "x" * 1000, "x" * 1001, ".", ""]
    for i, name in enumerate(found):
        store.put(name, i)
    assert [store.get(name) for name in found] == list(range(len(found)))
    assert len({name.lower() for name in names(tmp_path)}) == len(found)
    assert max(map(len, names(tmp_path))) == 81 + len(".record")


# --- keys ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    metric: str = "nsds"
    types: tuple[str, ...] = ("Q4_K",)


def test_keys_tell_apart_what_records_depend_on(monkeypatch):
    state = FileState(Path("model.safetensors"), 10, 1)
    keys = [
        Store.key(*parts)
        for parts in (
            (), (1,), (1.0,), ("1",), (None,), ([],), ([[]],), ({"a": 1},), (Options(),), (Options("mse"),),
            (Options(types=()),), ((state,),), ((dataclasses.replace(state, mtime_ns=2),),), (Path("a"), "b"), ("ab",),
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {64}
    assert Store.key({"a": 1, "b": 2}) == Store.key({"b": 2, "a": 1})
    assert Store.key((1, 2)) == Store.key([1, 2])
    before = Store.key(1)
    for constant in ("FORMAT", "__version__"):
        with monkeypatch.context() as patch:
            patch.setattr(store_module, constant, "another")
            assert Store.key(1) != before
    assert Store.key(1) == before


def test_a_key_is_the_digest_of_canonical_json():
    import hashlib

    text = f'["nsds-gguf record 1","{__version__}",{{"":"Options","metric":"nsds","types":["Q4_K"]}},"a/b"]'
    assert Store.key(Options(), Path("a/b")) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("part", [np.zeros(2), object(), {1, 2}, float("nan"), Options])
def test_keys_of_what_json_cannot_hold_are_refused(part):
    with pytest.raises((TypeError, ValueError)):
        Store.key(part)


def test_keyed_stores_share_the_folder_and_build_on_the_key(store, tmp_path):
    keyed = store.keyed("tokens", 8)
    keyed.put("scores/1", 1)
    assert Store(tmp_path, "key").keyed("tokens", 8).get("scores/1") == 1
    assert Store(tmp_path, "key 2").keyed("tokens", 8).get("scores/1") is None


# --- disks -----------------------------------------------------------------------------------------------------------


def in_child(code, *arguments, **options):
    """Run code in a process of its own."""
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


FULL = """
import resource, sys, signal
from pathlib import Path
import numpy as np
from nsds_gguf.errors import OutputError
from nsds_gguf.system.partfile import PartFile
from nsds_gguf.system.store import Store
store = Store(Path(sys.argv[1]), "key")
store.put("small", "x" * 10)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def put_file():
    with store.put_file("c") as path:
        path.write_bytes(bytes(2000))
def part():
    with PartFile(Path(sys.argv[1]) / "d.part", "key") as part:
        part.write(bytes(900))
        part.complete("one")
        try:
            part.write(bytes(900))
        finally:
            try:
                part.complete("torn")
            except ValueError:
                print("closed")
for put in (lambda: store.put("a", "x" * 2000), lambda: store.put_arrays("b", {"a": np.zeros(500)}), put_file, part):
    try:
        put()
    except OutputError as error:
        print(error)
print(store.get("a"), store.get_arrays("b"), store.get_file("c"), store.get("small"))
print(PartFile(Path(sys.argv[1]) / "d.part", "key").names)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Unix")
def test_a_full_disk_is_an_output_error(tmp_path):
    out, err = in_child(FULL, tmp_path).communicate()
    told = f"{tmp_path}: disk full or file too large while writing: File too large\n"
    assert err == ""
    assert out == told * 3 + "closed\n" + told + "None None None xxxxxxxxxx\n['one']\n"
    kept = ["d.part", "d.part.journal", f"{file_name('small')}.record"]
    assert names(tmp_path) == kept


def test_a_folder_that_is_gone_is_an_output_error(tmp_path):
    store = Store(tmp_path / "gone", "key")
    assert store.get("a") is None
    with pytest.raises(OutputError, match=r"gone: cannot write: No such file or directory$"):
        store.put("a", 1)
    with pytest.raises(OutputError, match=r"gone: cannot write: No such file or directory$"):
        PartFile(tmp_path / "gone" / "a", "key")


def test_messages_name_the_folder_of_the_output(tmp_path, monkeypatch):
    with WorkFolder(tmp_path, ["a.gguf"], resume=True) as files:
        store = Store(files.records, "key")
        monkeypatch.setattr(store_module.Path, "write_bytes", refuse)
        with pytest.raises(OutputError) as caught:
            store.put("a", 1)
    assert str(caught.value) == f"{tmp_path}: disk full or file too large while writing: No space left on device"


def refuse(*_arguments):
    raise OSError(28, "No space left on device")


def test_thousands_of_small_records_and_many_threads(store, tmp_path):
    def work(first):
        for i in range(first, 2000, 4):
            store.put(f"layer/{i}", i)

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get(f"layer/{i}") for i in range(2000)] == list(range(2000))
    assert len(names(tmp_path)) == 2000


# --- part files ------------------------------------------------------------------------------------------------------

PIECES = {f"blk.{i}": np.random.default_rng(i).bytes(100 + 37 * i) for i in range(8)}


def write_pieces(path, key="key", say=None, stop=8):
    """Write the pieces that are missing, up to some number; return those that were there."""
    with PartFile(path, key, say) as part:
        found = list(part.names)
        assert part.names == list(PIECES)[: len(part.names)]
        assert part.n_bytes == sum(len(PIECES[name]) for name in part.names)
        for name in list(PIECES)[len(found) : stop]:
            part.write(PIECES[name][:40])
            part.write(memoryview(PIECES[name])[40:])
            part.complete(name)
        if stop == len(PIECES):
            part.finish()
    return found


WHOLE = b"".join(PIECES.values())


def test_a_part_file_goes_on_behind_its_last_piece(tmp_path, said):
    path = tmp_path / "out.part"
    for stop in range(len(PIECES) + 1):
        assert len(write_pieces(path, say=said.append, stop=stop)) == max(0, stop - 1)
    assert write_pieces(path, say=said.append) == list(PIECES)
    assert path.read_bytes() == WHOLE and said == []


def test_a_piece_may_be_empty_or_an_array(tmp_path):
    with PartFile(tmp_path / "a", "key") as part:
        part.complete("nothing")
        part.write(np.arange(6, dtype=np.float32).reshape(2, 3).data)
        part.complete("array")
    with PartFile(tmp_path / "a", "key") as part:
        assert (part.names, part.n_bytes) == (["nothing", "array"], 24)


def test_a_torn_tail_is_cut_off_without_a_word(tmp_path, said):
    """The process died while it wrote a piece, or the journal's line of one."""
    path = tmp_path / "out.part"
    write_pieces(path, stop=3)
    journal, data = path.with_name("out.part.journal"), path.read_bytes()
    whole = journal.read_bytes()
    for tail in (b"", b"half", PIECES["blk.3"], PIECES["blk.3"] + b"x"):
        path.write_bytes(data + tail)
        journal.write_bytes(whole)
        with PartFile(path, "key", said.append) as part:
            assert part.names == list(PIECES)[:3]
        assert path.read_bytes() == data
    lines = whole.splitlines(keepends=True)
    for i in range(len(lines[0]), len(whole)):
        path.write_bytes(data)
        journal.write_bytes(whole[:i])
        assert write_pieces(path, say=said.append) == list(PIECES)[: whole[:i].count(b"\n") - 1]
        assert path.read_bytes() == WHOLE
    for i in range(len(lines[0])):
        path.write_bytes(data)
        journal.write_bytes(whole[:i])
        assert write_pieces(path, say=said.append) == []
        assert path.read_bytes() == WHOLE
    assert said == []


def test_pieces_that_are_damaged_are_written_again(tmp_path):
    """A bit in every byte of the data, and a cut at every byte: the piece and those behind it are written again."""
    path, journal = tmp_path / "out.part", tmp_path / "out.part.journal"
    write_pieces(path)
    lines = journal.read_bytes()
    ends = np.cumsum([len(piece) for piece in PIECES.values()])
    for i in range(0, len(WHOLE), 5):
        n_whole = int(np.searchsorted(ends, i, side="right"))
        for case in (WHOLE[:i], WHOLE[:i] + bytes([WHOLE[i] ^ 1 << i % 8]) + WHOLE[i + 1 :]):
            path.write_bytes(case)
            journal.write_bytes(lines)
            said = []
            assert write_pieces(path, say=said.append) == list(PIECES)[:n_whole]
            assert said == [f"Recomputed: finished tensors are damaged, from number {n_whole + 1} on."]
            assert path.read_bytes() == WHOLE and journal.read_bytes() == lines


def test_a_damaged_journal_never_gives_wrong_bytes(tmp_path):
    path, journal = tmp_path / "out.part", tmp_path / "out.part.journal"
    write_pieces(path)
    lines, n_told = journal.read_bytes(), 0
    for i in range(len(lines)):
        journal.write_bytes(lines[:i] + bytes([lines[i] ^ 1 << i % 8]) + lines[i + 1 :])
        said = []
        found = write_pieces(path, say=said.append)
        assert len(found) <= max(0, lines[: i + 1].count(b"\n") - 1 + (lines[i : i + 1] != b"\n"))
        assert path.read_bytes() == WHOLE and journal.read_bytes() == lines
        n_told += len(said)
    assert n_told >= len(lines) - 1  # a last line without its end was never complete


def test_a_part_file_of_another_key_or_without_its_data_is_written_anew(tmp_path, said):
    path = tmp_path / "out.part"
    write_pieces(path)
    assert write_pieces(path, "other", said.append, stop=2) == []
    assert path.read_bytes() == WHOLE[: len(PIECES["blk.0"] + PIECES["blk.1"])]
    path.unlink()
    assert write_pieces(path, "other", said.append, stop=2) == []
    assert said == [
        "Recomputed: the record of finished tensors is of another model or other options.",
        "Recomputed: finished tensors are damaged, from number 1 on.",
    ]


def test_progress_of_the_check(tmp_path):
    write_pieces(tmp_path / "a", stop=2)
    seen = []
    PartFile(tmp_path / "a", "key", progress=lambda *at: seen.append(at)).close()
    assert seen == [(100, 237), (237, 237)]


def test_a_part_file_becomes_the_output(tmp_path):
    def run(fails):
        with WorkFolder(tmp_path, ["a.gguf"], resume=True) as files, unfinished(
            tmp_path / "a.gguf", files, resumable=True
        ) as path:  # fmt: skip
            found = write_pieces(path, stop=3 if fails else len(PIECES))
            if fails:
                raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        run(fails=True)
    assert len(names(tmp_path)) == 1
    assert run(fails=False) == list(PIECES)[:3]
    assert names(tmp_path) == ["a.gguf"] and (tmp_path / "a.gguf").read_bytes() == WHOLE


# --- death -----------------------------------------------------------------------------------------------------------

# Writes what is missing, as fast as it can; what is there must be right. Prints how much of it there was.
WORKER = """
import sys, zlib
from pathlib import Path
import numpy as np
from nsds_gguf.system.partfile import PartFile
from nsds_gguf.system.store import Store
from nsds_gguf.system.workfolder import WorkFolder
n, said = 60, []
print("began", flush=True)
with WorkFolder(Path(sys.argv[1]), ["out"], lambda note: None, resume=True) as files:
    store = Store(files.records, Store.key("model"), said.append)
    n_found = 0
    for i in range(n):
        value, array, data = [i] * 300, np.full((50, 40), i), np.random.default_rng(i).bytes(20000)
        found = store.get(f"value/{i}"), store.get_arrays(f"arrays/{i}"), store.get_file(f"file/{i}")
        n_found += sum(item is not None for item in found)
        assert found[0] in (None, value)
        assert found[1] is None or (found[1]["a"] == array).all()
        assert found[2] is None or found[2].read_bytes() == data
        if found[0] is None:
            store.put(f"value/{i}", value)
        if found[1] is None:
            store.put_arrays(f"arrays/{i}", {"a": array})
        if found[2] is None:
            with store.put_file(f"file/{i}") as path:
                path.write_bytes(data)
    with PartFile(files.records / "out.part", "key", said.append) as part:
        n_found += len(part.names)
        for i in range(len(part.names), n):
            data = np.random.default_rng(i).bytes(30000 + i)
            for start in range(0, len(data), 1000):
                part.write(data[start : start + 1000])
            part.complete(str(i))
        part.finish()
    (files.records / "out.part").replace(Path(sys.argv[1]) / "out")
print(n_found, said)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_runs_that_are_killed_again_and_again_end_with_the_right_bytes(tmp_path):
    randoms, n_kills = random.Random(3), 0
    for _ in range(25):
        process = in_child(WORKER, tmp_path)
        assert process.stdout.readline() == "began\n"
        time.sleep(randoms.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        assert err == ""
        if process.returncode == 0:
            (tmp_path / "out").unlink()
        n_kills += process.returncode == -signal.SIGKILL
    assert n_kills >= 5
    process = in_child(WORKER, tmp_path)
    out, err = process.communicate()
    n_resumed, told = out.splitlines()[1].split(maxsplit=1)
    assert (process.returncode, err, told) == (0, "", "[]") and 0 <= int(n_resumed) <= 240
    whole = b"".join(np.random.default_rng(i).bytes(30000 + i) for i in range(60))
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("at", [1, 2, 30, 61, 179, 180, 181, 200, 239])
def test_a_run_that_is_killed_goes_on_with_all_that_it_had_finished(tmp_path, at):
    """Killed within the ``at``-th thing that it finishes: all before it are found."""
    dying = f"""
import os
from nsds_gguf.system import partfile, store
done = 0
def dies(real):
    def call(*arguments):
        global done
        done += 1
        if done == {at}:
            os.kill(os.getpid(), 9)
        return real(*arguments)
    return call
store.Store._put_head = dies(store.Store._put_head)
partfile.PartFile.complete = dies(partfile.PartFile.complete)
"""
    dead = in_child(dying + WORKER, tmp_path)
    assert dead.communicate() == ("began\n", "") and dead.returncode == -signal.SIGKILL
    out, err = in_child(WORKER, tmp_path).communicate()
    assert (out.splitlines()[1], err) == (f"{at - 1} []", "")
    assert (tmp_path / "out").stat().st_size == sum(30000 + i for i in range(60))


def test_two_runs_cannot_have_the_records_at_once(tmp_path):
    code = WORKER.replace("    store = Store(", '    print("has", flush=True); sys.stdin.read()\n    store = Store(', 1)
    first = in_child(code.replace("files:\n", "files:\n    files.open()\n"), tmp_path, stdin=subprocess.PIPE)
    assert [first.stdout.readline(), first.stdout.readline()] == ["began\n", "has\n"]
    _, err = in_child(WORKER, tmp_path).communicate()
    assert err.splitlines()[-1] == (
        f"nsds_gguf.errors.OutputError: {tmp_path}/out: another run (process {first.pid} on {os.uname().nodename}) is "
        "writing it; wait for that run, or choose another name"
    )
    out, err = first.communicate("")
    assert (out, err) == ("0 []\n", "")
    assert json.dumps(names(tmp_path)) == '["out"]'
