"""The first words of a finished file: a prompt, wrapped by the chat template inside, and the most likely answer.

A smoke test for eyes: a file whose perplexity is right may still have a template that makes the model ramble. A model
without a template, or with one that cannot be rendered, continues the prompt as it is.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import Keys

from ..errors import UnsupportedError
from ..llamacpp.gguf_header import read_gguf_header
from ..llamacpp.llama import complete
from .chat import ChatTemplate, conversation
from .modelfile import Metadata, adds_bos, special_texts

DEFAULT_PROMPT = "What is the capital of France?"

_N_TOKENS = 24
_MAX_SECONDS = 20.0  # of a large model on few cores


@dataclass(frozen=True)
class Sample:
    """What a file said.

    Attributes:
        prompt: what it was asked.
        answer: its first tokens, the most likely ones.
        is_chat: whether its chat template was used.
        note: why not, where it has one.

    """

    prompt: str
    answer: str
    is_chat: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)


def sample(file: Path, prompt: str = DEFAULT_PROMPT, n_threads: int | None = None) -> Sample:
    """Return what a GGUF says first to a prompt.

    Raises:
        ModelError: the file is no GGUF.
        VerifyError: llama.cpp cannot load it, or it does not predict the next token.
        TextError: the prompt is empty.
        GgmlError: llama.cpp is missing or refuses.

    """
    metadata = read_gguf_header(file).metadata
    text, is_chat, note = _wrapped(metadata, prompt)
    answer = complete(file, text, n_tokens=_N_TOKENS, max_seconds=_MAX_SECONDS, n_threads=n_threads)
    return Sample(prompt, answer, is_chat, note)


def _wrapped(metadata: Metadata, prompt: str) -> tuple[str, bool, str]:
    """Return the text that the model continues, whether the template made it, and why not."""
    entry = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if entry is None:
        return prompt, False, ""
    bos, eos = special_texts(metadata)
    try:
        text = ChatTemplate(str(entry.value), bos, eos, datetime.datetime.now()).render(conversation(prompt))
    except UnsupportedError as error:
        return prompt, False, str(error)
    return (text.removeprefix(bos) if adds_bos(metadata) else text), True, ""
