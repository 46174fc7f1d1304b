"""llama.cpp at arm's length: open a GGUF, tokenize, decode blocks of tokens, read their logits.

llama.cpp runs in a process of its own (``process``, ``child``, ``binding``): what would abort, crash or hang the
program becomes a ``GgmlError`` with llama.cpp's last words. Logits come back in shared memory. Models and contexts are
context managers, so that nothing is left open.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..errors import OutputError, PlanError, TextError, VerifyError
from ..records import Float32
from ..system.resources import n_blas_threads
from .binding import N_PHYSICAL_BATCH, ContextOptions, Int32, ModelFacts, Observer
from .messages import SharedBuffer
from .process import LlamaProcess, end_process, llama_process

__all__ = [
    "N_PHYSICAL_BATCH", "Int32", "LlamaContext", "LlamaModel", "Observer", "check_loads", "complete", "default_threads",
    "embed", "end_process", "gpu_layers", "llama_build", "logits", "memory", "open_context", "open_model",
    "quantize_preset",
]  # fmt: skip

# llama_tokenize counts bytes and tokens in int32.
_MAX_TEXT_BYTES = 2**31 - 1


_n_gpu_layers = 0  # of every model that is opened


def llama_build() -> str:
    """Return llama.cpp's version, that of the binding, the features in use, and the layers on a GPU, in one line."""
    build: str = llama_process().call("llama.cpp", "build")
    return f"{build}; {_n_gpu_layers} layers on the GPU" if _n_gpu_layers else build


@contextmanager
def gpu_layers(n_layers: int) -> Iterator[None]:
    """Hand the last ``n_layers`` layers of every model that is opened in the ``with`` block to a GPU.

    The output counts as one more layer; a number beyond a model's layers means all of it. Without this, or with 0,
    llama.cpp computes on the CPU, whatever its build. Raises ``PlanError`` where llama.cpp has no GPU to use.
    """
    global _n_gpu_layers
    if n_layers and not llama_process().call("llama.cpp", "supports_gpu"):
        raise PlanError(
            f"--gpu-layers {n_layers}: this build of llama.cpp has no GPU backend, or finds no GPU; drop the option, "
            "or install llama-cpp-python built for the GPU: CMAKE_ARGS=-DGGML_CUDA=on pip install llama-cpp-python"
        )
    before, _n_gpu_layers = _n_gpu_layers, n_layers
    try:
        yield
    finally:
        _n_gpu_layers = before


def quantize_preset(
    source: Path, target: Path, mix: str, n_threads: int, importance: Mapping[str, Float32] | None = None
) -> None:
    """Let llama.cpp quantize a GGUF by its own rules.

    Args:
        source: F32, F16, BF16 or Q8_0 GGUF.
        target: file to write; an existing one is replaced.
        mix: name of a file type, ``Q3_K_M``.
        n_threads: CPU threads.
        importance: column weights by tensor name, ``(n_cols,)`` or for a stack ``(n_matrices, n_cols)``, as an
            importance matrix holds them (``Imatrix.columns``); ``None`` for none.

    Raises ``GgmlError`` when llama.cpp refuses.
    """
    paths = os.path.abspath(source), os.path.abspath(target)  # noqa: PTH100 - the process has a folder of its own
    llama_process().call(str(source), "quantize", *paths, mix, n_threads, importance)


def default_threads() -> int:
    """Return the number of physical cores that this process may run on.

    llama.cpp is fastest with one thread a core: hyper-threads share the unit that multiplies
    (llama.cpp common/common.cpp, ``common_cpu_get_num_physical_cores``).
    """
    if hasattr(os, "sched_getaffinity"):
        return len({_core(cpu) for cpu in os.sched_getaffinity(0)})
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def logits(file: Path, tokens: Sequence[int], *, n_threads: int | None = None) -> Float32:
    """Return the logits after each token of one sequence, computed as exactly as llama.cpp can.

    The KV cache is F32 and flash attention is off, so that what remains is float32 rounding: this is for comparing
    a file with another implementation, not for speed.

    Args:
        file: the GGUF.
        tokens: token ids, taken as they are (no BOS is added).
        n_threads: CPU threads; ``None`` for ``default_threads()``.

    Returns:
        ``(n_tokens, n_vocab)`` float32.

    Raises:
        VerifyError: the file cannot be loaded.
        GgmlError: llama.cpp is missing, refuses or dies.

    """
    row = np.asarray(tokens, dtype=np.int32)[np.newaxis]
    n_tokens = row.size
    with (
        open_model(file) as model,
        open_context(model, n_ctx=n_tokens, n_batch=n_tokens, n_threads=n_threads, exact=True) as context,
    ):
        rows: Float32 = context.decode(row)[0].copy()
    return rows


def complete(
    file: Path, text: str, *, n_tokens: int, max_seconds: float = math.inf, n_threads: int | None = None
) -> str:
    """Return what a model says next: its most likely tokens one after another, until one ends the text.

    Args:
        file: the GGUF.
        text: what has been said; names of special tokens in it stand for the tokens, BOS comes first where the
            vocabulary wants it.
        n_tokens: how many at most.
        max_seconds: after this time no further token is begun.
        n_threads: CPU threads; ``None`` for ``default_threads()``.

    Raises:
        VerifyError: the file cannot be loaded, or does not predict the next token.
        TextError: the text has no tokens.
        GgmlError: llama.cpp is missing, refuses or dies.

    """
    with open_model(file) as model:
        bos = [] if model.bos is None else [model.bos]
        prompt = np.append(bos, model.tokenize(text, add_special=False, parse_special=True)).astype(np.int32)
        if prompt.size == 0:
            raise TextError(f"{file}: the prompt has no tokens; give a longer one")
        n_prompt, said = prompt.size, list[int]()
        with open_context(model, n_ctx=n_prompt + n_tokens, n_batch=n_prompt, n_threads=n_threads) as context:
            deadline = time.monotonic() + max_seconds
            rows = context.decode(prompt[np.newaxis], first_output=n_prompt - 1)
            while (token := int(rows[0, 0].argmax())) not in model.end_tokens:
                said.append(token)
                if len(said) == n_tokens or time.monotonic() > deadline:
                    break
                rows = context.decode(np.array([[token]], dtype=np.int32), start=n_prompt + len(said) - 1)
        return model.detokenize(said)


def check_loads(file: Path) -> None:
    """Let llama.cpp load a GGUF without its weights and build what it would compute: neither is read nor allocated.

    Of the tensors only names, shapes and types count, so that a file with a hole for data will do.

    Raises:
        VerifyError: llama.cpp refuses keys, vocabulary or tensors; the message gives its reason.
        GgmlError: llama.cpp is missing, or dies of the file.

    """
    llama_process().call(str(file), "check_loads", file, os.path.abspath(file))  # noqa: PTH100


def memory(file: Path, n_ctx: int, cache_type: int) -> dict[str, float]:
    """Return the bytes that llama.cpp says it allocates for one sequence of ``n_ctx`` tokens, on the CPU.

    Args:
        file: the GGUF; its weights are neither read nor allocated, so that an outline will do.
        n_ctx: tokens of the context.
        cache_type: ggml's number of the type of the KV cache.

    Returns:
        ``attention cache``, ``recurrent states``, ``compute`` and ``output``, to 0.01 MiB, as llama.cpp logs them.

    Raises:
        VerifyError: llama.cpp refuses the file or the context.
        GgmlError: llama.cpp is missing, or dies of the file.

    """
    path = os.path.abspath(file)  # noqa: PTH100
    found: dict[str, float] = llama_process().call(str(file), "memory", file, path, n_ctx, cache_type)
    return found


def embed(file: Path, texts: Sequence[Int32], *, n_threads: int | None = None) -> Float32:
    """Return the embeddings of texts, pooled as the file says and not normalised, as exactly as llama.cpp can.

    Args:
        file: the GGUF of an embedding model.
        texts: token ids of each text, ``(n_tokens,)`` int32, taken as they are.
        n_threads: CPU threads; ``None`` for ``default_threads()``.

    Returns:
        ``(n_texts, n_embd)`` float32.

    Raises:
        VerifyError: the file cannot be loaded, or does not say how it pools.
        GgmlError: llama.cpp is missing, refuses or dies.

    """
    with open_model(file) as model:
        rows: Float32 = model.call("embed", list(texts), n_threads or default_threads())
    return rows


@contextmanager
def open_model(file: Path, *, vocab_only: bool = False) -> Iterator[LlamaModel]:
    """Load a GGUF with llama.cpp for the length of a ``with`` block.

    Args:
        file: the GGUF.
        vocab_only: load the vocabulary without the weights; enough to tokenize.

    Yields:
        The model.

    Raises:
        VerifyError: the file is missing or llama.cpp cannot load it; the message gives llama.cpp's reason.
        GgmlError: llama-cpp-python is not installed, or llama.cpp dies of the file.

    """
    if not file.is_file():
        raise VerifyError(f"{file}: no such GGUF file")
    process = llama_process()
    path = os.path.abspath(file)  # noqa: PTH100
    facts: ModelFacts = process.call(str(file), "load", file, path, vocab_only, _n_gpu_layers)
    try:
        yield LlamaModel(file, process, facts)
    finally:
        if process.is_alive:
            process.call(str(file), "free_model", facts.number)


@contextmanager
def open_context(
    model: LlamaModel,
    *,
    n_ctx: int,
    n_batch: int,
    n_seq: int = 1,
    n_threads: int | None = None,
    exact: bool = False,
    observer: Observer | None = None,
) -> Iterator[LlamaContext]:
    """Create the state in which a model decodes, for the length of a ``with`` block.

    Whatever is not an argument here stays at llama.cpp's default, which is also what its own tools use: F16 KV cache,
    flash attention where the backend has it, one KV stream per sequence, physical batches of 512.

    Args:
        model: an open model.
        n_ctx: tokens of the longest sequence.
        n_batch: tokens of the largest block handed to ``decode``, all sequences together.
        n_seq: sequences of a block.
        n_threads: CPU threads; ``None`` for ``default_threads()``.
        exact: F32 KV cache and no flash attention.
        observer: what sees the products with weights, in llama.cpp's process; its BLAS uses as many threads there as
            are allowed here. What it raises, ``decode`` raises.

    Yields:
        The context.

    Raises:
        VerifyError: the model is not one that predicts the next token.
        OutputError: the system gives no shared memory for the logits.
        GgmlError: llama.cpp cannot create the context, usually for want of memory.

    """
    options = ContextOptions(
        n_ctx, n_batch, n_seq, n_threads or default_threads(), exact, observer, n_blas_threads() if observer else 1
    )
    n_bytes = n_batch * model.n_vocab * np.dtype(np.float32).itemsize
    try:
        shared = SharedBuffer(n_bytes)
    except OSError as error:
        raise OutputError(
            f"{model.file}: logits take up to {n_bytes / 2**20:.0f} MiB of shared memory, which the system refuses "
            f"({error.strerror}): lower --batch, or raise the limits on memory and the size of files (ulimit)"
        ) from error
    try:
        number = model.call("open_context", options, shared.path)
        try:
            yield LlamaContext(model, number, shared)
        finally:
            if model.is_alive:
                model.call("free_context", number, of_model=False)
    finally:
        shared.close()


class LlamaModel:
    """A GGUF that llama.cpp has loaded; made by ``open_model``.

    Attributes:
        file: where it was loaded from.
        n_vocab: size of the vocabulary.
        bos: token id of BOS when the vocabulary begins every text with it, else ``None``.
        adds_eos: whether the vocabulary ends every text with EOS.
        n_bytes: size of the weights, all parts of a split model together.
        n_ctx_train: tokens of the longest sequence that the model was trained for.

    """

    def __init__(self, file: Path, process: LlamaProcess, facts: ModelFacts) -> None:
        """Take what ``open_model`` found."""
        self.file, self._process, self._number = file, process, facts.number
        self.n_vocab, self.bos, self.adds_eos = facts.n_vocab, facts.bos, facts.adds_eos
        self.n_bytes, self.n_ctx_train = facts.n_bytes, facts.n_ctx_train

    @property
    def is_alive(self) -> bool:
        """Return whether the process that holds the model still runs."""
        return self._process.is_alive

    def call(self, method: str, *arguments: Any, of_model: bool = True) -> Any:
        """Call a method of ``binding.Engine`` about this model, or something of it that has a number of its own."""
        numbers = (self._number,) if of_model else ()
        return self._process.call(str(self.file), method, *numbers, *arguments)

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> Int32:
        """Return the token ids of a text, ``(n_tokens,)`` int32.

        Args:
            text: any text.
            add_special: add BOS and EOS where the vocabulary says so.
            parse_special: take ``</s>`` and the like in the text for the token of that name.

        Raises:
            TextError: the text has more bytes than llama.cpp can count.
            GgmlError: llama.cpp refuses.

        """
        n_bytes = len(text.encode())
        if n_bytes > _MAX_TEXT_BYTES:
            raise TextError(f"text: wanted at most {_MAX_TEXT_BYTES} bytes, got {n_bytes}; use a shorter text")
        ids: Int32 = self.call("tokenize", text, add_special, parse_special)
        return ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones by their names; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.call("detokenize", list(tokens))
        return text

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text or a turn of a conversation."""
        return frozenset(self.call("end_tokens").tolist())


class LlamaContext:
    """The state in which a model decodes; made by ``open_context``."""

    def __init__(self, model: LlamaModel, number: int, shared: SharedBuffer) -> None:
        """Take what ``open_context`` made."""
        self._model, self._number, self._shared = model, number, shared

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._model.call(method, self._number, *arguments, of_model=False)

    def clear(self) -> None:
        """Forget all that was decoded."""
        self._call("clear")

    def decode(self, tokens: Int32, *, start: int = 0, first_output: int = 0) -> Float32:
        """Decode the next tokens of every sequence.

        Args:
            tokens: ``(n_seq, n)`` int32; row i continues sequence i.
            start: position of the first column in its sequence.
            first_output: lowest position whose logits are wanted.

        Returns:
            ``(n_seq, n_outputs, n_vocab)`` float32: the logits after each wanted position. A view of memory shared
            with llama.cpp's process, valid until the next call.

        Raises:
            GgmlError: llama.cpp refuses or dies.
            Exception: whatever the context's observer raised.

        """
        self._call("decode", tokens, start, first_output, True)
        n_seq, n = tokens.shape
        shape = (n_seq, max(0, start + n - max(start, first_output)), self._model.n_vocab)
        return np.frombuffer(self._shared.data, np.float32, math.prod(shape)).reshape(shape)

    def read(self, tokens: Int32, *, start: int = 0) -> None:
        """Decode like ``decode``, all logits computed and none returned: for what an observer sees."""
        self._call("decode", tokens, start, 0, False)

    def observed(self) -> Iterator[Any]:
        """Yield what the observer's ``results`` yields."""
        while (found := self._call("next_observed")) is not None:
            yield found


def _core(cpu: int) -> str:
    """Return what identifies the physical core of a logical CPU: the list of its hyper-threads."""
    with suppress(OSError):
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    return str(cpu)
