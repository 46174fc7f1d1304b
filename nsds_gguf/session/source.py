"""What is read: a model folder, a GGUF, or a name on the Hub, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import read
from ..read.hub import HubName, fetch, parse_name
from ..records import Model
from .run import Run


@dataclass(frozen=True)
class Source:
    """Where a model is, and how it is read.

    Attributes:
        path: Hugging Face model folder, GGUF file, or name of a model on the Hub.
        pre_tokenizer: llama.cpp's pre-tokenizer, in place of the one that is recognised.
        allow_requantize: whether to take a GGUF whose weights are quantized already to less than Q8_0.

    """

    path: Path | HubName
    pre_tokenizer: str | None = None
    allow_requantize: bool = False

    @classmethod
    def of(cls, source: str | Path | HubName | Source) -> Source:
        """Return a source as it is, or that of a path or of ``ORG/MODEL``, which names a model on the Hub."""
        if isinstance(source, Source):
            return source
        if isinstance(source, str):
            return cls(parse_name(source) or Path(source))
        return cls(source)


def open_model(source: str | Path | HubName | Source, run: Run | None = None) -> Model:
    """Open a model: its headers, numbers, keys and tokenizer; weights are read when they are needed.

    Args:
        source: Hugging Face model folder, GGUF file, ``ORG/MODEL`` on the Hub, or a ``Source``.
        run: who is told; the model's notes are.

    Raises:
        NsdsError: the model cannot be read, or is not supported.

    """
    run, wanted = run or Run(), Source.of(source)
    path = wanted.path
    if isinstance(path, HubName):
        with run.report.stage(f"download {path}") as progress:
            path = fetch(path, progress)
    with run.report.stage("read headers"):
        model = read.open_model(path, wanted.pre_tokenizer, wanted.allow_requantize)
    for note in model.notes:
        run.report.say(note)
    return model
