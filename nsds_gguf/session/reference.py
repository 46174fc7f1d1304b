"""The GGUF that a finished file is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..evaluate.perplexity import check_comparable
from ..evaluate.texts import ORIGINAL, VerifyOptions, embeds, outline_file
from ..system.filestate import unchanged
from ..system.resources import check_disk, check_memory
from ..system.workfolder import WorkFolder
from .original import original_bytes
from .room import working_bytes
from .run import Run
from .session import Session
from .source import Source, open_model


@contextmanager
def reference_file(session: Session, options: VerifyOptions) -> Iterator[Path | None]:
    """Give the GGUF to compare with: a file of the user's, the original, or none; embeddings have one always."""
    if not options.enabled or (options.reference is None and not embeds(session.model)):
        yield None
    elif options.reference not in (None, ORIGINAL):
        yield Path(str(options.reference))
    else:
        with session.original() as path:
            yield path


@contextmanager
def reference_of(reference: Source | Path | None, file: Path, text: str, n_ctx: int, run: Run) -> Iterator[Path | None]:
    """Give the GGUF to compare a finished file with: a GGUF itself, or of a model folder its original.

    The original is a temporary GGUF in the working directory, removed on every exit. The vocabulary, the disk and
    the memory are checked before it is written.

    Args:
        reference: a GGUF, a Hugging Face model folder, or ``None`` for no comparison.
        file: the finished file.
        text: what both will read.
        n_ctx: tokens of a chunk of it.
        run: threads to write with, and who is told.

    Yields:
        The reference.

    Raises:
        NsdsError: the folder holds no model that can be read, another vocabulary, or one too large for this machine.

    """
    if reference is None:
        yield None
        return
    source = Source.of(reference)
    if not isinstance(source.path, Path) or not source.path.is_dir():
        yield Path(str(source.path))
        return
    model = open_model(source, run)
    with WorkFolder(Path.cwd(), say=run.report.say) as files, unchanged(model.inputs):
        session = Session(model, run, files)
        with outline_file(model, files) as outline:  # the vocabulary alone; errors name the model's own path
            check_comparable(file, outline, text, n_ctx)
        n_bytes = original_bytes(model)
        check_disk(files.folder, n_bytes, "the reference")
        check_memory(
            n_bytes + file.stat().st_size + working_bytes(run),
            "a comparison with the original",
            "close other programs or compare with a smaller GGUF",
        )
        with session.original() as path:
            yield path
