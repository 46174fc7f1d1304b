"""The reference that a finished file is compared with, as a GGUF."""

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
    """Give the reference: the user's file, the original, or none; embedding models always have one."""
    if not options.enabled or (options.reference is None and not embeds(session.model)):
        yield None
    elif options.reference not in (None, ORIGINAL):
        yield Path(str(options.reference))
    else:
        with session.original() as path:
            yield path


@contextmanager
def reference_of(reference: Source | Path | None, file: Path, text: str, n_ctx: int, run: Run) -> Iterator[Path | None]:
    """Give the reference of a finished file: a GGUF itself, or the original of a model folder.

    The original is a temporary GGUF in the working directory, removed on every exit. The vocabulary, the disk and
    the memory are checked before it is written.

    Args:
        reference: a GGUF, a Hugging Face model folder, or ``None`` for no comparison.
        file: the finished file.
        text: the text that both read.
        n_ctx: tokens per chunk.
        run: threads and reporter.

    Yields:
        The reference.

    Raises:
        NsdsError: the folder holds no readable model, another vocabulary, or a model too large for this machine.

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
