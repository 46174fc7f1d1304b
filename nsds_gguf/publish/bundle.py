"""A folder for Hugging Face or Ollama: the GGUF and the files that belong beside it.

========== ===================================================================================================
mmproj-*   the vision part of a multimodal model, where known
Modelfile  for ``ollama create``: chat format, stop strings, sampling parameters
README.md  model card with the front matter that Hugging Face reads
plan.json  the plan of the file, where known
scores.json  the scores of the plan, where known
SHA256SUMS for ``sha256sum -c``
========== ===================================================================================================

Each file appears under its name when it is complete. ``convert`` writes the GGUF there; otherwise it is linked, or
copied to another file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError, OutputError, RecordError, UnsupportedError
from ..evaluate.embedding import EmbeddingCheck
from ..evaluate.inspect import Inspection, inspect_gguf
from ..evaluate.perplexity import Perplexity
from ..llamacpp.gguf_header import SPLIT_COUNT, read_gguf_header, split_number
from ..read.tokenizer.json_files import read_json
from ..records import Plan, Progress, Scores
from ..session.run import Reporter, Silent
from ..system.atomic import unfinished
from ..system.leftovers import remove_stale
from ..system.resources import check_disk
from ..system.workfolder import WorkFolder, output_error
from .chat import KNOWS_TOOLS, ChatFormat
from .model_card import Facts, Origin, find_origin, model_card
from .modelfile import Metadata, chat_format, go_template, modelfile

MODELFILE, CARD, PLAN, SCORES, SUMS = "Modelfile", "README.md", "plan.json", "scores.json", "SHA256SUMS"
OLLAMA = "ollama"

_HASHED_BYTES = 1 << 20  # read at once


@dataclass(frozen=True)
class Source:
    """Facts about a GGUF that it does not hold itself.

    Attributes:
        path: the model folder or file that it was made from.
        base_model: the repository of the original, ``ORG/NAME``, from the user.
        plan: the plan of the file.
        scores: the scores of that plan.
        perplexity: the perplexity on ``text``.
        embedding: the embedding check, for an embedding model.
        text: name of the text.
        command: the command that made it.
        reference: the reference of the perplexity, as ``Converted.reference``.
        projector: the GGUF of the vision part; ``None`` without one.

    """

    path: Path | None = None
    base_model: str | None = None
    plan: Plan | None = None
    scores: Scores | None = None
    perplexity: Perplexity | None = None
    embedding: EmbeddingCheck | None = None
    text: str = ""
    command: str = ""
    reference: str | None = None
    projector: Path | None = None


@dataclass(frozen=True)
class Bundle:
    """A finished folder.

    Attributes:
        folder: the folder.
        gguf: the model in it.
        sha256: hex digest of every file but SHA256SUMS, by name.
        chat: the chat format of the Modelfile; ``None`` where it has no TEMPLATE.
        origin: the original of the model.
        notes: notes for the user, one sentence each.

    """

    folder: Path
    gguf: Path
    sha256: dict[str, str]
    chat: ChatFormat | None
    origin: Origin
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the contents of the folder as plain JSON values."""
        return {
            "folder": str(self.folder),
            "sha256": self.sha256,
            "chat_format": self.chat.name if self.chat else None,
            "base_model": list(self.origin.repos),
            "notes": list(self.notes),
        }


@contextmanager
def bundle_folder(folder: Path, force: bool, report: Reporter) -> Iterator[Path]:
    """Create the folder of a bundle; remove it again when the block fails and it is empty.

    Raises ``OutputError`` when it cannot be created, or is not empty without ``force``.
    """
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; wanted a folder for the bundle")
    left = remove_stale(folder)
    for note in left.notes:
        report.say(note)
    if existed and not force and set(folder.iterdir()) - {found.path for found in left.kept}:
        raise OutputError(f"{folder}: is not empty; pass --force to replace the bundle in it")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}; create the folder above it first") from error
    try:
        yield folder
    except BaseException:
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise


def make_bundle(file: Path, folder: Path, source: Source | None = None, report: Reporter | None = None) -> Bundle:
    """Put a GGUF and the files that belong to it into a folder; replace those of an earlier bundle.

    Args:
        file: the GGUF, in the folder or anywhere else.
        folder: an existing folder, from ``bundle_folder``.
        source: other facts about the file.
        report: receives stages and notes.

    Raises:
        ModelError: the file is not a GGUF, or is only a part of one; or the projector is not a vision part.
        RecordError: the plan or the scores belong to another file.
        OutputError: the folder cannot be written, the disk is full, or a Modelfile cannot hold the file's name.

    """
    source, report = source or Source(), report or Silent()
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder for the bundle; create it first")
    inspection, metadata = inspect_gguf(file), read_gguf_header(file).metadata
    _check_whole(file)
    _check_projector(source.projector)
    _check_records(inspection, metadata, source)
    chat, notes = _chat_and_notes(metadata)
    origin = Origin((source.base_model,)) if source.base_model else find_origin(metadata, source.path)
    beside = source.projector.name if source.projector else ""
    modelfile_text = modelfile(file.name, metadata, chat, notes, _generation_config(source.path), beside)
    if not origin.repos or origin.is_parent:
        notes.append("The repository of the original is not known: pass --base-model ORG/NAME for the model card.")
    facts = Facts(inspection, metadata, origin, chat is not None, source.plan, source.perplexity, source.text,
                  source.command, source.reference, source.embedding, _named_bytes(source.projector))  # fmt: skip
    texts = {
        MODELFILE: modelfile_text,
        CARD: model_card(facts),
        PLAN: _json(source.plan),
        SCORES: _json(source.scores),
    }
    with WorkFolder(folder, [file.name], report.say) as files:
        gguf = _placed(file, folder, files)
        beside_it = [_placed(source.projector, folder, files).name] if source.projector else []
        for name, text in texts.items():
            _write(folder / name, text, files)
        names = [gguf.name, *beside_it, *(name for name, text in texts.items() if text is not None)]
        with report.stage("hash") as progress:
            sums = _sha256_sums([folder / name for name in names], progress)
        _write(folder / SUMS, "".join(map(sum_line, sums, sums.values())), files)
    return Bundle(folder, gguf, sums, chat, origin, tuple(notes))


def _generation_config(path: Path | None) -> dict[str, Any]:
    return read_json(path / "generation_config.json") if path is not None and path.is_dir() else {}


def _check_whole(file: Path) -> None:
    if (split_number(read_gguf_header(file), SPLIT_COUNT) or 1) > 1:
        raise UnsupportedError(
            f"{file}: is a part of a split model; convert it first, which joins all parts in one file"
        )


def _check_projector(file: Path | None) -> None:
    """Raise ``ModelError`` for a file that is not the GGUF of a vision part."""
    if file is not None:
        architecture = read_gguf_header(file).metadata.get("general.architecture")
        if architecture is None or architecture.value != "clip":
            raise ModelError(f"{file}: is not a vision part (mmproj) of llama.cpp: its architecture is not clip")


def _named_bytes(file: Path | None) -> tuple[str, int] | None:
    return None if file is None else (file.name, file.stat().st_size)


def _check_records(inspection: Inspection, metadata: Metadata, source: Source) -> None:
    """Raise ``RecordError`` when the plan or the scores belong to another file."""
    types = [(tensor.name, tensor.shape, tensor.type) for tensor in inspection.tensors]
    if source.plan is not None and types != [(t.name, t.shape, t.type) for t in source.plan.tensors]:
        raise RecordError(f"the plan is not that of {inspection.path}: tensors or types differ; pass its plan")
    digest = metadata.get("nsds_gguf.scores_sha256")
    if source.scores is not None and (digest is None or digest.value != source.scores.digest):
        raise RecordError(f"the scores are not those of {inspection.path}: their digest differs; pass its scores")


def _chat_and_notes(metadata: Metadata) -> tuple[ChatFormat | None, list[str]]:
    """Return the chat format, and notes on the Modelfile."""
    try:
        chat = chat_format(metadata)
    except UnsupportedError as error:
        return None, [
            f"TEMPLATE is left out: {error}.",
            "Recent versions of Ollama read the chat template in the GGUF; older ones send the bare prompt.",
        ]
    if chat is None:
        return None, ["The model has no chat template: it continues text instead of answering."]
    notes = [f"The chat format is {chat.name}.", *chat.notes]
    if KNOWS_TOOLS in chat.notes:
        notes.append("For tools with a recent version of Ollama, delete TEMPLATE: it then reads the one in the GGUF.")
    if ".Messages" in go_template(chat):
        notes.append("Versions of Ollama before July 2024 use the second half of TEMPLATE, for single turns.")
    return chat, notes


def _json(record: Plan | Scores | None) -> str | None:
    return None if record is None else json.dumps(record.to_json(), indent=1) + "\n"


def _placed(file: Path, folder: Path, files: WorkFolder) -> Path:
    """Link the file into the folder, or copy it from another file system, and return its path there."""
    target = folder / file.name
    if target.exists() and target.samefile(file):
        return target
    with unfinished(target, files) as temporary:
        try:
            os.link(file.resolve(), temporary)  # the file itself, not a symbolic link such as those of the Hub's cache
        except OSError:  # another file system, or one without links
            check_disk(folder, file.stat().st_size, "the GGUF")
            _copy(file, temporary)
    return target


def _copy(file: Path, target: Path) -> None:
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        raise output_error(target, error) from error


def _write(path: Path, text: str | None, files: WorkFolder) -> None:
    """Write a small file; without a text, remove the one of an earlier bundle."""
    try:
        if text is None:
            path.unlink(missing_ok=True)
            return
        with unfinished(path, files) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _sha256_sums(paths: list[Path], progress: Progress) -> dict[str, str]:
    total, done = sum(path.stat().st_size for path in paths), 0
    sums = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while data := stream.read(_HASHED_BYTES):
                digest.update(data)
                done += len(data)
                progress(done, total)
        sums[path.name] = digest.hexdigest()
    return sums


def sum_line(name: str, digest: str) -> str:
    """Return a line for ``sha256sum -c``, with backslashes in the name escaped and marked."""
    escaped = name.replace("\\", "\\\\")
    return f"{chr(92) if escaped != name else ''}{digest}  {escaped}\n"


def check_ollama() -> None:
    """Raise ``OutputError`` when the program ``ollama`` is not installed."""
    if shutil.which(OLLAMA) is None:
        raise OutputError(
            "the program ollama is not installed (https://ollama.com); install it, or leave out --ollama and run "
            "'ollama create NAME -f Modelfile' in the folder later"
        )


def ollama_create(bundle: Bundle, name: str) -> None:
    """Create a model of the bundle in Ollama; raise ``OutputError`` with Ollama's message on failure."""
    check_ollama()
    command = [OLLAMA, "create", name, "-f", MODELFILE]
    done = subprocess.run(command, cwd=bundle.folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it gives no reason").splitlines()[-1]
        raise OutputError(f"{bundle.folder}: ollama create {name} failed: {said}; the bundle itself is complete")
