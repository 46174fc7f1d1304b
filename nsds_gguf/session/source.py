"""The source of a model: a folder, a GGUF, or a name on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import read
from ..read.hub import HubName, fetch, parse_name
from ..records import Model
from .run import Run


@dataclass(frozen=True)
class Source:
    """Where a model is, and how to read it.

    Attributes:
        path: Hugging Face model folder, GGUF file, or name of a model on the Hub.
        pre_tokenizer: llama.cpp pre-tokenizer to use instead of the detected one.
        allow_requantize: whether to accept a GGUF that is already quantized below Q8_0.
        mtp: ``keep`` or ``drop`` layers of multi-token prediction; default: as llama.cpp's converter does.

    """

    path: Path | HubName
    pre_tokenizer: str | None = None
    allow_requantize: bool = False
    mtp: str | None = None

    @classmethod
    def of(cls, source: str | Path | HubName | Source) -> Source:
        """Return a ``Source`` unchanged, or make one of a path or ``ORG/MODEL`` on the Hub."""
        if isinstance(source, Source):
            return source
        if isinstance(source, str):
            return cls(parse_name(source) or Path(source))
        return cls(source)


def open_model(source: str | Path | HubName | Source, run: Run | None = None) -> Model:
    """Open a model: headers, hparams, keys and tokenizer; weights are read on demand.

    Args:
        source: Hugging Face model folder, GGUF file, ``ORG/MODEL`` on the Hub, or a ``Source``.
        run: its reporter receives the model's notes.

    Raises:
        NsdsError: the model cannot be read or is not supported.

    """
    run, wanted = run or Run(), Source.of(source)
    path = wanted.path
    if isinstance(path, HubName):
        with run.report.stage(f"download {path}") as progress:
            path = fetch(path, progress)
    if run.cluster is not None:  # whose workers have other working directories
        path = path.absolute()
    with run.report.stage("read headers"):
        model = read.open_model(path, wanted.pre_tokenizer, wanted.allow_requantize, wanted.mtp)
    for note in model.notes:
        run.report.say(note)
    return model
