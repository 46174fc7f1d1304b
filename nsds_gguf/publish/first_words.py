"""The first words of a finished file: a prompt in its chat template, and the most likely answer.

A smoke test for human eyes: a file with good perplexity may still have a template that makes the model ramble. A model
without a usable template continues the bare prompt.
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
_MAX_SECONDS = 20.0  # for a large model on few cores


@dataclass(frozen=True)
class Sample:
    """A prompt and the beginning of the answer.

    Attributes:
        prompt: the prompt.
        answer: the first tokens of the answer, the most likely ones.
        is_chat: whether the chat template was used.
        note: why its template was not used, if it has one.

    """

    prompt: str
    answer: str
    is_chat: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)


def sample(file: Path, prompt: str = DEFAULT_PROMPT, n_threads: int | None = None) -> Sample:
    """Return the beginning of a GGUF's answer to a prompt.

    Raises:
        ModelError: the file is not a GGUF.
        VerifyError: llama.cpp cannot load it, or it does not predict the next token.
        TextError: the prompt is empty.
        GgmlError: llama.cpp is missing or refuses.

    """
    metadata = read_gguf_header(file).metadata
    text, is_chat, note = _wrapped(metadata, prompt)
    answer = complete(file, text, n_tokens=_N_TOKENS, max_seconds=_MAX_SECONDS, n_threads=n_threads)
    return Sample(prompt, answer, is_chat, note)


def _wrapped(metadata: Metadata, prompt: str) -> tuple[str, bool, str]:
    """Return the text to continue, whether the template made it, and if not, why."""
    entry = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if entry is None:
        return prompt, False, ""
    bos, eos = special_texts(metadata)
    try:
        text = ChatTemplate(str(entry.value), bos, eos, datetime.datetime.now()).render(conversation(prompt))
    except UnsupportedError as error:
        return prompt, False, str(error)
    return (text.removeprefix(bos) if adds_bos(metadata) else text), True, ""
