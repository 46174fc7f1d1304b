"""Records of finished work, by name: JSON values, arrays and files that a later run can use instead of computing them.

A record is a head, one sealed line of JSON in a file of its own, and for arrays and files a second file beside it. The
head holds the record's name, kind and key and the payload's length and CRC-32, and is written last: a record without
one does not exist. Files are written beside their place and renamed. Nothing is synced: after a power loss, what the
system had not written yet fails its checksum and is computed again.

The key says what a record was computed from. It begins with the version of this program and of this format, and each
``keyed`` adds what the next kind of record depends on:

===================  ===================================================================================================
record               key
===================  ===================================================================================================
layer scores         files of the model (``FileState``), options of the source (pre-tokenizer), metric, reading of SE
generated text       files of the model, number of tokens, seed, llama.cpp's version
sensitivities,       files of the model, digest of the tokens (which stands for the options that made them)
pass over tokens,
Hessians
column statistics,   those of the sensitivities, channel equalization; of an imatrix its digest
Hessian factors
measured errors      those of the column statistics and of the factors; types, rounding, ggml's version
finished tensors     the plan's digest, and those of the column statistics and of the factors; ggml's version
===================  ===================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .workfolder import output_error

FORMAT = "nsds-gguf record 1"
HEAD = ".record"  # suffix
PAYLOADS = {"arrays": ".npz", "file": ".bin"}  # suffixes by kind

_CHUNK_BYTES = 1 << 20
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


class Store:
    """Records in a folder, of one key; several stores may share the folder, but no two may share a name.

    Names say what a record is of, in words for the user, with a part after a slash: ``sensitivities/blk.3``. Threads
    may use a store at the same time for different names.

    Attributes:
        folder: where the records lie.

    """

    def __init__(self, folder: Path, key: str, say: Callable[[str], None] | None = None) -> None:
        """Take an existing folder and a key; ``say`` is told once of each kind of record that cannot be used."""
        self.folder, self._key, self._say = folder, key, say
        self._said: set[str] = set()
        self._put: set[str] = set()  # names of this run

    @staticmethod
    def key(*parts: object) -> str:
        """Return the hex SHA-256 of JSON values, frozen records and paths, and of the versions of what wrote them.

        Raises ``TypeError`` or ``ValueError`` for what JSON cannot hold.
        """
        return hashlib.sha256(_canonical([FORMAT, __version__, *parts])).hexdigest()

    def keyed(self, *parts: object) -> Store:
        """Return a store in the same folder with a key made of this one's and of what else its records depend on."""
        store = Store(self.folder, self.key(self._key, *parts), self._say)
        store._said, store._put = self._said, self._put
        return store

    def get(self, name: str) -> Any | None:
        """Return the value of a record, tuples as lists; ``None`` where there is none that can be used."""
        return self._checked(name, "value", lambda head: head["value"])

    def put(self, name: str, value: Any) -> None:
        """Record a JSON value other than ``None``; raises ``OutputError`` when it cannot be written."""
        self._put_head(name, "value", {"value": value})

    def get_arrays(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Return the arrays of a record by their names; ``None`` where there is none that can be used."""
        path = self._path(name, PAYLOADS["arrays"])

        def load(head: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
            _check_payload(path, head)
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            if _shapes(arrays) != head["arrays"]:
                raise ValueError("arrays of other shapes")
            return arrays

        return self._checked(name, "arrays", load)

    def put_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Record arrays of numbers by name, as an uncompressed npz.

        Raises ``OutputError`` when they cannot be written, ``ValueError`` for Python objects.
        """
        with self._payload(name, "arrays", {"arrays": _shapes(arrays)}) as path, zipfile.ZipFile(path, "w") as archive:
            for key, array in arrays.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)

    def get_file(self, name: str) -> Path | None:
        """Return the path of a recorded file, to be read only; ``None`` where there is none that can be used."""
        path = self._path(name, PAYLOADS["file"])

        def check(head: Mapping[str, Any]) -> Path:
            _check_payload(path, head)
            return path

        return self._checked(name, "file", check)

    @contextmanager
    def put_file(self, name: str) -> Iterator[Path]:
        """Give a path to write a file to, which is recorded when the block ends without an exception.

        Raises ``OutputError`` when it cannot be written.
        """
        with self._payload(name, "file", {}) as path:
            yield path

    def file_path(self, name: str) -> Path:
        """Return where the file of a record lies, unchecked."""
        return self._path(name, PAYLOADS["file"])

    def remove(self, name: str) -> None:
        """Remove a record, the head first; none need be there."""
        for suffix in (HEAD, *PAYLOADS.values()):
            with suppress(OSError):  # whoever puts it next is told
                self._path(name, suffix).unlink()

    def remove_all(self, kind: str) -> None:
        """Remove the records whose names begin with ``kind`` and a slash, of any key."""
        found = list(self._of_kind(kind))
        for path in sorted(found, key=lambda path: path.suffix != HEAD):
            with suppress(OSError):
                path.unlink()

    def n_bytes(self, kind: str) -> int:
        """Return the bytes of the records whose names begin with ``kind`` and a slash."""
        return sum(path.stat().st_size for path in self._of_kind(kind))

    def tell_kept(self, what: str, names: Sequence[str] = (), total: int = 0) -> None:
        """Report once what an interrupted run left to reuse, and how much remains to do.

        Args:
            what: the things, in words.
            names: the records of those that exist; if this run put them all, nothing is reported.
            total: number of things; 0 if a single record holds them all.

        """
        kept = sum(name not in self._put for name in names)
        if kept:
            self._tell(kept_note(what, kept, total))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process: it reports nothing."""
        return {**self.__dict__, "_say": None, "_said": set(), "_put": set()}

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / (file_name(name) + suffix)

    def _of_kind(self, kind: str) -> Iterator[Path]:
        return self.folder.glob(f"{_plain(kind)}+*")

    def _checked(self, name: str, kind: str, read: Callable[[Mapping[str, Any]], Any]) -> Any | None:
        """Return what ``read`` makes of a head; a record that is stale or damaged is removed and told."""
        try:
            line = self._path(name, HEAD).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            line = b""
        try:
            head = unseal(line)
            if (head["format"], head["key"], head["kind"]) == (FORMAT, self._key, kind):
                if head["name"] != name:
                    raise ValueError("the record of another name")
                return read(head)
            why = "of another model or other options"
        except _UNREADABLE:
            why = "damaged"
        self.remove(name)
        self._tell(f"Recomputed: the record of {name.partition('/')[0]} is {why}.")
        return None

    def _tell(self, note: str) -> None:
        if self._say is not None and note not in self._said:
            self._said.add(note)
            self._say(note)

    @contextmanager
    def _payload(self, name: str, kind: str, more: Mapping[str, Any]) -> Iterator[Path]:
        """Give a path for a record's payload; at the end of the block rename it and write the head."""
        path = self._path(name, PAYLOADS[kind])
        self.remove(name)
        with _renamed(path) as temporary:
            yield temporary
            n_bytes, crc32 = temporary.stat().st_size, file_crc32(temporary)
        self._put_head(name, kind, {**more, "n_bytes": n_bytes, "crc32": crc32})

    def _put_head(self, name: str, kind: str, more: Mapping[str, Any]) -> None:
        line = seal({"format": FORMAT, "name": name, "key": self._key, "kind": kind, **more})
        with _renamed(self._path(name, HEAD)) as temporary:
            temporary.write_bytes(line)
        self._put.add(name)


def kept_note(what: str, kept: int = 1, total: int = 0) -> str:
    """Return the note on what is kept of an interrupted run and what is left; see ``Store.tell_kept``."""
    counted = f"{kept} of {total} {what}; {total - kept} left" if total else what
    return f"Kept from the interrupted run: {counted}."


def file_name(name: str) -> str:
    """Return a name for files of any system, of at most 81 characters, that stands for a name of any characters."""
    return f"{_plain(name)[:64]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _plain(name: str) -> str:
    """Return a name in letters, digits and ``_.-``, with ``+`` for slashes."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", name.replace("/", "+"))


def seal(value: Any) -> bytes:
    """Return a JSON value as one line of ASCII that begins with its CRC-32."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unseal(line: bytes) -> Any:
    """Return the value of a sealed line; raises ``ValueError`` for anything else."""
    crc32, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or crc32 != b"%08x" % zlib.crc32(text):
        raise ValueError("a damaged line")
    return json.loads(text)


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file; raises ``OSError``."""
    found = 0
    with path.open("rb", buffering=0) as stream:
        while data := stream.read(_CHUNK_BYTES):
            found = zlib.crc32(data, found)
    return found


def sync(descriptor: int) -> None:
    """Wait until what was written to an open file is on the disk; raises ``OSError`` when it cannot get there."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # not on every file system
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # macOS's fsync leaves it in the cache of the drive
            return
    os.fsync(descriptor)


def _check_payload(path: Path, head: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` or ``OSError`` when a file is not the one that was recorded."""
    if path.stat().st_size != head["n_bytes"] or file_crc32(path) != head["crc32"]:
        raise ValueError("another file than was recorded")


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, list[Any]]:
    """Return dtype and shape by name, as JSON has them."""
    return {key: [array.dtype.str, *array.shape] for key, array in arrays.items()}


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """Give a path beside another, renamed to it when the block ends well, removed otherwise.

    Only one thread writes a name, so a file that a killed run left there is written over.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_json).encode()


def _as_json(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__, **{item.name: getattr(value, item.name) for item in fields(value)}}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a key of {type(value).__name__}; wanted JSON values, records and paths")
