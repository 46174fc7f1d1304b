"""The vision part of a model, a file of its own (mmproj): opened first, so that it is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedError, told_of
from ..evaluate.structure import verify_projector
from ..quantize.write import projector_bytes, write_projector
from ..read.projector import open_projector
from ..records import Model, Projector
from ..system.atomic import unfinished
from ..system.filestate import check_unchanged
from ..system.workers import Workers
from ..system.workfolder import WorkFolder
from .outputs import Output, projector_name
from .run import Run


@dataclass(frozen=True)
class ProjectorFile:
    """A vision part and the file that it becomes."""

    projector: Projector
    path: Path

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return projector_bytes(self.projector)


def open_projectors(model: Model, output: Output) -> list[Projector]:
    """Return the vision part that ``output`` asks for, or none.

    Raises ``UnsupportedError`` if the model has no vision part that llama.cpp's format holds.
    """
    if output.mmproj is None:
        return []
    if model.files:
        raise UnsupportedError(
            f"{model.path}: a GGUF holds the language model only; --mmproj needs the Hugging Face folder of the model"
        )
    return [open_projector(model.path, output.mmproj)]


def projector_files(projectors: Sequence[Projector], folder: Path, run: Run) -> list[ProjectorFile]:
    """Return the files of vision parts; report their names and sizes."""
    found = [ProjectorFile(projector, folder / projector_name(projector)) for projector in projectors]
    for each in found:
        run.report.say(
            f"The vision part is written to a file of its own: {each.path.name}, projector {each.projector.kind}, "
            f"{each.projector.type}, {each.n_bytes / 2**20:.2f} MiB."
        )
    return found


def write_projectors(found: list[ProjectorFile], run: Run, files: WorkFolder, workers: Workers) -> None:
    """Write files of vision parts and check their structure."""
    for each in found:
        with unfinished(each.path, files) as temporary, told_of(each.path, temporary):
            with run.report.stage("write projector") as progress:
                write_projector(each.projector, temporary, workers=workers, progress=progress)
            verify_projector(temporary, each.projector)
            check_unchanged(each.projector.inputs)
