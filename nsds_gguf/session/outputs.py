"""Output paths: names, what may be replaced, and whether they can be written."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
from gguf.gguf_writer import GGUFValue

from ..allocate import decided_by
from ..errors import GgmlError, OutputError, VerifyError, told_of
from ..llamacpp import gguf_header
from ..records import Model, Projector, Recipe

# Characters that some file systems refuse in names, and the longest name part: names may have 255 bytes.
_NO_FILE_LETTERS = r'/\:*?"<>|'
_NAME_LETTERS = 96


@dataclass(frozen=True)
class Output:
    """The output path: a file, an existing folder, or ``None`` for the working directory.

    ``mmproj`` is the type of the vision part to write next to it, one of ``PROJECTOR_TYPES``; ``None`` for none.
    """

    path: Path | None = None
    force: bool = False
    keep_failed: bool = False
    mmproj: str | None = None


def default_name(model: Model, recipe: Recipe) -> str:
    """Return the file name by the GGUF naming convention, ``Name-Size-v1.0-FISHER_3_00BPW.gguf``.

    The encoding names what decided the types, as ``allocate.decided_by`` returns it.
    """
    field = partial(_field, model.metadata)
    encoding, target = "_".join(decided_by(recipe)), recipe.target
    if target is not None and recipe.allocator != "uniform":
        bpw = target.value if target.kind == "bpw" else target.value * 8 / model.n_weights
        encoding = f"{encoding}_{bpw:.2f}BPW".replace(".", "_")
    model_name, version = _file_letters(model.name), field("version") or "v1.0"
    name = gguf.naming_convention(
        model_name, field("basename"), field("finetune"), version, field("size_label"), encoding
    )
    return f"{name}.gguf"


def projector_name(projector: Projector) -> str:
    """Return the file name of a vision part as llama.cpp's converter names it, ``mmproj-Name-F16.gguf``."""
    field = partial(_field, projector.metadata)
    name = gguf.naming_convention(
        field("name"), field("basename"), field("finetune"), field("version"), None, projector.type
    )
    return f"mmproj-{name}.gguf"


def _field(metadata: Mapping[str, GGUFValue], key: str) -> str | None:
    """Return a ``general.*`` key in letters of a file name."""
    entry = metadata.get(f"general.{key}")
    return _file_letters(entry.value) if entry is not None and isinstance(entry.value, str) else None


def _file_letters(text: str) -> str | None:
    """Return text that is valid in any file name, or ``None`` when nothing is left: a GGUF may hold anything."""
    safe = "".join(letter if letter.isprintable() and letter not in _NO_FILE_LETTERS else "-" for letter in text)
    return safe.strip(" .-")[:_NAME_LETTERS] or None


def check_output_folder(output: Output) -> None:
    """Raise ``OutputError`` when the output's folder is missing or not a folder."""
    path = output.path
    if path is not None:
        _check_name(path)
    folder = Path.cwd() if path is None else path if path.is_dir() else path.parent
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; wanted a folder for the output")
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder for the output; create it first")


def output_paths(names: Sequence[str], output: Output) -> list[Path]:
    """Return one path per file; raise ``OutputError`` for a name that cannot be, or that several share."""
    if output.path is not None and not output.path.is_dir():
        if len(names) > 1:
            raise OutputError(f"{output.path}: one file cannot hold {len(names)} targets; pass a folder")
        paths = [output.path]
    else:
        paths = [(output.path or Path.cwd()) / name for name in names]
    if len(set(paths)) < len(paths):
        raise OutputError(f"two targets share the file name {paths[0].name}; drop one")
    for path in paths:
        _check_name(path)
    return paths


def check_replaceable(paths: Sequence[Path], force: bool) -> None:
    """Raise ``OutputError`` when a path exists and is not to be replaced."""
    for path in filter(Path.exists, paths):
        if not _may_replace(path):
            raise OutputError(f"{path}: exists and is not a GGUF file, so it is not replaced; choose another name")
        if not force:
            raise OutputError(f"{path}: exists already; pass --force to replace it")


def check_not_input(paths: Sequence[Path], model: Model) -> None:
    """Raise ``OutputError`` when an output is one of the model's own files, under any name or link."""
    for path in filter(Path.exists, paths):
        if any(path.samefile(file) for file in model.files):
            raise OutputError(f"{path}: is the input and is never replaced; choose another name")


def _check_name(path: Path) -> None:
    """Raise ``OutputError`` for an impossible file name, or a link to a missing file."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # the check of the folder reports that
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}; choose another name or folder") from error
    if stat.S_ISLNK(found.st_mode) and not path.exists():
        raise OutputError(f"{path}: is a link to a file that is missing; remove the link or choose another name")


def _may_replace(path: Path) -> bool:
    """Return whether a path is a GGUF or an empty file: ``--force`` replaces nothing else."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(gguf_header.MAGIC)) in (gguf_header.MAGIC, b"")


@contextmanager
def named(target: Path, temporary: Path, output: Output) -> Iterator[None]:
    """Make the message of a failed check name the target, and say what happened to the file."""
    try:
        with told_of(target, temporary):
            yield
    except (VerifyError, GgmlError) as error:
        fate = f"kept as {target.name}.failed" if output.keep_failed else "removed; pass --keep-failed to keep it"
        raise type(error)(f"{error} ({fate})") from error
