"""The evaluation text, and checks of model and vocabulary on it before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..errors import TextError, VerifyError, told_of
from ..llamacpp import llama
from ..quantize.header import write_outline
from ..records import Model
from ..system.workfolder import WorkFolder
from .embedding import POOLINGS
from .inspect import inspect_gguf

SHIPPED_TEXT = "old_curiosity_shop.txt"

ORIGINAL = "original"  # --reference: a temporary GGUF of the source's own precision
QUANTIZED_INPUT = "quantized input"  # the reference where the input is already quantized

# Architectures that decode only their encoder's input (llama.cpp, llama_model_has_encoder).
WITH_ENCODER = ("t5", "t5encoder", "eagle3", "dflash")

DEFAULT_CTX = 512  # tokens per chunk, as in llama-perplexity

_EXTRA_TOKENS = 3  # that a tokenizer may add to a text: BOS, EOS and a leading space


@dataclass(frozen=True)
class VerifyOptions:
    """How to check a finished file, by perplexity or embeddings, on a text.

    Attributes:
        text: the text; ``None`` for the one that ships.
        n_ctx: tokens per chunk.
        n_chunks: largest number of chunks; ``None`` for all.
        reference: ``original``, the path of a GGUF, or ``None``: the original where a conversion has it as a GGUF
            anyway and memory allows, else none.
        enabled: whether to check more than the structure.

    """

    text: Path | None = None
    n_ctx: int = DEFAULT_CTX
    n_chunks: int | None = 8
    reference: str | None = None
    enabled: bool = True


def spoken(reference: str) -> str:
    """Return the name of a reference in a sentence: ``the original``, or a file name."""
    return f"the {reference}" if reference in (ORIGINAL, QUANTIZED_INPUT) else Path(reference).name


def evaluation_text(verifying: VerifyOptions) -> str:
    """Return the text to verify on, or the public-domain one that ships with the package.

    Raises ``TextError`` when it cannot be read, or is too short for any tokenizer: a token takes at least a byte.
    """
    if verifying.text is None:
        text = (resources.files("nsds_gguf.evaluate") / SHIPPED_TEXT).read_text(encoding="utf-8")
    else:
        text = read_text(verifying.text)
    n_bytes = len(text.encode())
    if n_bytes + _EXTRA_TOKENS < 2 * verifying.n_ctx:
        raise TextError(
            f"{verifying.text or SHIPPED_TEXT}: text too short: wanted at least {2 * verifying.n_ctx} tokens for a "
            f"context of {verifying.n_ctx}, got {n_bytes} bytes; use a longer text or a smaller --ctx-size"
        )
    return text


def read_text(path: Path) -> str:
    """Return the text of a file; raises ``TextError`` when it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode()  # keeps line ends: llama-perplexity counts them
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}; wanted a text file") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start}; "
            "convert it to UTF-8 or choose another text"
        ) from error


def check_vocabulary(model: Model, verifying: VerifyOptions, text: str, files: WorkFolder) -> None:
    """Let llama.cpp load an outline of the model and tokenize the text, before the work to be verified.

    Raises ``VerifyError`` when the model has neither perplexity nor embeddings, or llama.cpp refuses its vocabulary,
    keys or tensors; ``TextError`` when the text is too short; for a reference, ``ModelError`` when it is not a GGUF,
    ``VerifyError`` when its vocabulary differs.
    """
    if not verifying.enabled:
        return
    check_predicts(model)
    if "tokenizer.ggml.model" not in model.metadata:
        raise VerifyError(
            f"{model.path}: has no tokenizer, which llama.cpp needs to load a file: use a GGUF with tokenizer.ggml "
            "keys, or pass --no-verify"
        )
    with outline_file(model, files) as path:
        llama.check_loads(path)
        with llama.open_model(path, vocab_only=True) as vocabulary:
            n_tokens, n_vocab = len(vocabulary.tokenize(text)), vocabulary.n_vocab
    if n_tokens < 2 * verifying.n_ctx:
        raise TextError(
            f"{verifying.text or SHIPPED_TEXT}: text too short: wanted at least {2 * verifying.n_ctx} tokens for a "
            f"context of {verifying.n_ctx}, got {n_tokens}; use a longer text or a smaller --ctx-size"
        )
    _check_reference(model, verifying, n_vocab)


def _check_reference(model: Model, verifying: VerifyOptions, n_vocab: int) -> None:
    if verifying.reference in (None, ORIGINAL):
        return
    path = Path(str(verifying.reference))
    inspect_gguf(path)
    with llama.open_model(path, vocab_only=True) as reference:
        if reference.n_vocab != n_vocab:
            raise VerifyError(
                f"--reference {path}: wanted a vocabulary of {n_vocab}, got {reference.n_vocab}; "
                f"compare with a GGUF of {model.name}"
            )


def embeds(model: Model) -> bool:
    """Return whether a model computes embeddings: its metadata names a pooling type."""
    pooling = model.metadata.get(f"{model.architecture}.pooling_type")
    return pooling is not None and isinstance(pooling.value, int) and pooling.value in POOLINGS


@contextmanager
def outline_file(model: Model, files: WorkFolder) -> Iterator[Path]:
    """Give a GGUF of the model with a hole for its weights, removed on exit; messages name the model instead."""
    path = files.path / "outline.gguf"
    try:
        write_outline(model, path)
        with told_of(model.path, path):
            yield path
    finally:
        path.unlink(missing_ok=True)


def predicts(model: Model) -> bool:
    """Return whether a model predicts the next token."""
    causal = model.metadata.get(f"{model.architecture}.attention.causal")
    return model.architecture not in WITH_ENCODER and (causal is None or bool(causal.value))


def check_predicts(model: Model) -> None:
    """Raise ``VerifyError`` when a model neither predicts the next token nor embeds: no check applies."""
    if not predicts(model) and not embeds(model):
        raise VerifyError(
            f"{model.path}: architecture {model.architecture} does not predict the next token, so perplexity "
            "cannot check it; pass --no-verify"
        )
