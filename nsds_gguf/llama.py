"""llama.cpp through its Python binding: open a GGUF, tokenize, decode blocks of tokens, read their logits.

What is here is what the package and its tests need, with nothing left open behind them: models and contexts are
context managers. Long calls run in a thread of their own, so that Ctrl-C is seen at once and stops them. llama.cpp's
log is silenced in the whole process; the error that it names becomes part of ours.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import ggml
from .errors import GgmlError, TextError, VerifyError
from .records import Float32

Int32 = NDArray[np.int32]
Result = TypeVar("Result")

# Constants of llama.h and ggml.h: enum llama_flash_attn_type, ggml_type, llama_vocab_type, ggml_log_level.
_FLASH_ATTN_DISABLED = 0
_GGML_TYPE_F32 = 0
_VOCAB_TYPE_NONE = 0
_LOG_LEVEL_ERROR = 4

# llama.cpp's name, in its system info, of the AMX kernels. Compilers drop the stores that set up their tiles (GCC 12
# and older: _tile_loadconfig declares that it reads 8 bytes of 64), and the first quantized matrix kills the process:
# llama.cpp issue 20824, pull request 26954. So weights stay in their own layout where those kernels would be used.
_AMX = "AMX_INT8 = 1"

# Tokens that llama.cpp computes at once unless told, and with them the rows of logits in its working memory
# (llama-context.cpp, llama_context_default_params).
N_PHYSICAL_BATCH = 512

# Constants of llama.h: enum llama_load_mode, llama_pooling_type.
_LOAD_MODE_NONE = 0
_POOLING_NONE = 0

# llama_tokenize counts bytes and tokens in int32.
_MAX_TEXT_BYTES = 2**31 - 1


class Observer(Protocol):
    """Who looks at the products with weights while a context decodes; called in the thread that decodes."""

    def wants(self, product: ggml.Product) -> bool:
        """Return whether ``take`` is to be called when this product has been computed."""
        ...

    def take(self, product: ggml.Product) -> None:
        """Look at what the product read, with ``ggml.product_rows``."""
        ...


def llama_build() -> str:
    """Return llama.cpp's version, that of the binding, and the CPU features in use, in one line."""
    binding = _binding()
    version = binding.llama_version().decode() if hasattr(binding, "llama_version") else "of unknown version"
    features = re.findall(r"(\w+) = 1", binding.llama_print_system_info().decode())
    return f"{version} (llama-cpp-python {binding.__version__}; {' '.join(features)})"


def quantize_stock(
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
    binding = _binding()
    params = binding.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(binding, f"LLAMA_FTYPE_MOSTLY_{mix}"), n_threads
    params.allow_requantize = True  # of Q8_0
    if importance is not None:
        params.imatrix, _columns = _imatrix_data(binding, importance)
    _log.clear()
    if binding.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise GgmlError(f"{source}: llama.cpp cannot make {mix} of it: {_log_error()}")


def _imatrix_data(binding: Any, importance: Mapping[str, Float32]) -> tuple[Any, list[Float32]]:
    """Return llama.cpp's array of names and columns, ended by a null name, and what its pointers point to."""
    columns = [np.ascontiguousarray(values, dtype=np.float32).ravel() for values in importance.values()]
    data = (binding.llama_model_imatrix_data * (len(columns) + 1))()
    for entry, name, values in zip(data, importance, columns, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(type(entry.data))
    return data, columns


def default_threads() -> int:
    """Return the number of physical cores that this process may run on.

    llama.cpp is fastest with one thread a core: hyper-threads share the unit that multiplies
    (llama.cpp common/common.cpp, ``common_cpu_get_num_physical_cores``).
    """
    if hasattr(os, "sched_getaffinity"):
        return len({_core(cpu) for cpu in os.sched_getaffinity(0)})
    return os.cpu_count() or 1


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
        GgmlError: llama.cpp is missing or refuses.

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
        GgmlError: llama.cpp is missing or refuses.

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
            while not model.ends_text(token := int(rows[0, 0].argmax())):
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
        GgmlError: llama.cpp is missing.

    """
    binding = _binding()
    params = binding.llama_model_default_params()
    params.no_alloc, params.load_mode = True, _LOAD_MODE_NONE
    _log.clear()
    model = binding.llama_model_load_from_file(os.fsencode(file), params)
    if not model:
        raise VerifyError(f"{file}: llama.cpp cannot load it: {_log_error()}")
    try:
        context_params = binding.llama_context_default_params()
        context_params.n_ctx = context_params.n_batch = N_PHYSICAL_BATCH
        context = binding.llama_init_from_model(model, context_params)
        if not context:
            raise VerifyError(f"{file}: llama.cpp cannot run it: {_log_error()}")
        binding.llama_free(context)
    finally:
        binding.llama_model_free(model)


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
        GgmlError: llama.cpp is missing or refuses.

    """
    binding, n_longest = _binding(), max(len(text) for text in texts)
    with open_model(file) as model:
        params = binding.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_longest  # pooling needs a text in one physical batch
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.embeddings = True
        params.flash_attn_type, params.type_k, params.type_v = _FLASH_ATTN_DISABLED, _GGML_TYPE_F32, _GGML_TYPE_F32
        _log.clear()
        context = model._worker.run(binding.llama_init_from_model, model._pointer, params)
        if not context:
            raise GgmlError(f"{file}: llama.cpp cannot create a context: {_log_error()}")
        try:
            if binding.llama_pooling_type(context) == _POOLING_NONE:
                raise VerifyError(f"{file}: does not say how embeddings are pooled; wanted a key pooling_type")
            return np.stack([_embedding(model, context, text) for text in texts])
        finally:
            binding.llama_free(context)


def _embedding(model: LlamaModel, context: Any, tokens: Int32) -> Float32:
    """Return the embedding of one text, ``(n_embd,)`` float32."""
    binding, n = model._binding, len(tokens)
    if binding.llama_get_memory(context):
        binding.llama_memory_clear(binding.llama_get_memory(context), True)
    ids = np.ascontiguousarray(tokens, dtype=np.int32)
    batch = binding.llama_batch_get_one(ids.ctypes.data_as(binding.ctypes.POINTER(binding.llama_token)), n)
    _log.clear()
    status = model._worker.run(binding.llama_decode, context, batch)
    address = binding.llama_get_embeddings_seq(context, 0)
    if status or not address:
        raise GgmlError(f"{model.file}: llama_decode failed with status {status}: {_log_error()}")
    found: Float32 = np.ctypeslib.as_array(address, shape=(binding.llama_model_n_embd_out(model._pointer),)).copy()
    return found


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
        GgmlError: llama-cpp-python is not installed.

    """
    model = LlamaModel(file)
    try:
        model._load(vocab_only)
        yield model
    finally:
        model._close()


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
        observer: who sees the products with weights. What it raises, ``decode`` raises.

    Yields:
        The context.

    Raises:
        VerifyError: the model is not one that predicts the next token.
        GgmlError: llama.cpp cannot create the context, usually for want of memory.

    """
    context = LlamaContext(model)
    try:
        context._create(n_ctx, n_batch, n_seq, n_threads or default_threads(), exact, observer)
        yield context
    finally:
        context._close()


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

    def __init__(self, file: Path) -> None:
        self.file = file
        self.n_vocab = 0
        self.bos: int | None = None
        self.adds_eos = False
        self.n_bytes = 0
        self.n_ctx_train = 0
        self._binding = _binding()
        self._worker = _Worker()
        self._pointer: Any = None
        self._vocab: Any = None

    def _load(self, vocab_only: bool) -> None:
        if not self.file.is_file():
            raise VerifyError(f"{self.file}: no such GGUF file")
        binding = self._binding
        params = binding.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = _AMX not in binding.llama_print_system_info().decode()
        params.progress_callback = binding.llama_progress_callback(lambda _fraction, _data: not self._worker.stopping)
        self._worker.run(self._load_from_file, params)
        if not self._pointer:
            raise VerifyError(f"{self.file}: llama.cpp cannot load it: {_log_error()}")
        self._vocab = binding.llama_model_get_vocab(self._pointer)
        if binding.llama_vocab_type(self._vocab) == _VOCAB_TYPE_NONE:
            raise VerifyError(f"{self.file}: holds no vocabulary; wanted a GGUF with tokenizer.ggml keys")
        self.n_vocab = binding.llama_vocab_n_tokens(self._vocab)
        self.n_bytes = binding.llama_model_size(self._pointer)
        self.n_ctx_train = binding.llama_model_n_ctx_train(self._pointer)
        self.adds_eos = bool(binding.llama_vocab_get_add_eos(self._vocab))
        if binding.llama_vocab_get_add_bos(self._vocab):
            self.bos = binding.llama_vocab_bos(self._vocab)

    def _load_from_file(self, params: Any) -> None:
        _log.clear()
        self._pointer = self._binding.llama_model_load_from_file(os.fsencode(self.file), params)

    def _close(self) -> None:
        self._worker.close()
        if self._pointer:
            self._binding.llama_model_free(self._pointer)
            self._pointer = None

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
        data = text.encode()
        if len(data) > _MAX_TEXT_BYTES:
            raise TextError(f"text: wanted at most {_MAX_TEXT_BYTES} bytes, got {len(data)}; use a shorter text")
        room = len(data) + 2  # a token a byte, BOS and EOS; a vocabulary may need more, and then says how much
        for _ in range(2):
            buffer = (self._binding.llama_token * room)()
            n_tokens: int = self._worker.run(
                self._binding.llama_tokenize, self._vocab, data, len(data), buffer, room, add_special, parse_special
            )
            if n_tokens >= 0:
                ids: Int32 = np.frombuffer(buffer, dtype=np.int32, count=n_tokens).copy()
                return ids
            room = -n_tokens
        raise GgmlError(f"{self.file}: llama_tokenize failed on a text of {len(data)} bytes with status {n_tokens}")

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones by their names; bytes that are not UTF-8 become U+FFFD."""
        room = 1 + sum(len(self._binding.llama_vocab_get_text(self._vocab, token)) for token in tokens)
        ids = (self._binding.llama_token * len(tokens))(*tokens)
        for _ in range(2):
            buffer = self._binding.ctypes.create_string_buffer(room)
            n_bytes = self._binding.llama_detokenize(self._vocab, ids, len(tokens), buffer, room, False, True)
            if n_bytes >= 0:
                data: bytes = buffer.raw[:n_bytes]
                return data.decode(errors="replace")
            room = -n_bytes
        raise GgmlError(f"{self.file}: llama_detokenize failed on {len(tokens)} tokens with status {n_bytes}")

    def ends_text(self, token: int) -> bool:
        """Return whether a token ends a text or a turn of a conversation."""
        return bool(self._binding.llama_vocab_is_eog(self._vocab, token))


class LlamaContext:
    """The state in which a model decodes; made by ``open_context``."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._binding = model._binding
        self._worker = model._worker
        self._pointer: Any = None
        self._batch: Any = None
        self._observer: Observer | None = None
        self._observer_error: BaseException | None = None

    def _create(
        self, n_ctx: int, n_batch: int, n_seq: int, n_threads: int, exact: bool, observer: Observer | None
    ) -> None:
        binding = self._binding
        params = binding.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_batch = n_batch
        params.n_seq_max = n_seq
        params.n_threads = params.n_threads_batch = n_threads
        if exact:
            params.flash_attn_type = _FLASH_ATTN_DISABLED
            params.type_k = params.type_v = _GGML_TYPE_F32
        # Kept alive by self: llama.cpp keeps nothing but the address.
        self._abort_callback = params.abort_callback = binding.ggml_abort_callback(lambda _: self._worker.stopping)
        if observer is not None:
            self._observer = observer
            self._eval_callback = params.cb_eval = binding.ggml_backend_sched_eval_callback(self._evaluated)
        self._worker.run(self._init_from_model, params)
        if not self._pointer:
            raise GgmlError(f"{self._model.file}: llama.cpp cannot create a context: {_log_error()}")
        if not binding.llama_get_memory(self._pointer):
            raise VerifyError(f"{self._model.file}: not a model that predicts the next token; wanted a decoder")
        self._batch = binding.llama_batch_init(n_batch, 0, 1)

    def _init_from_model(self, params: Any) -> None:
        _log.clear()
        self._pointer = self._binding.llama_init_from_model(self._model._pointer, params)

    def _evaluated(self, address: int, ask: bool, _data: Any) -> bool:
        """Answer llama.cpp before a node of the graph (``ask``) and after one that was wanted; false ends the graph.

        An exception cannot pass through llama.cpp, so it waits here for ``decode``.
        """
        if self._observer is None or self._observer_error is not None or self._worker.stopping:
            return False
        try:
            product = ggml.product(address)
            if product is None or (ask and not self._observer.wants(product)):
                return False
            if not ask:
                self._observer.take(product)
        except Exception as error:
            self._observer_error = error
            return False
        return True

    def _close(self) -> None:
        if self._batch:
            self._binding.llama_batch_free(self._batch)
            self._batch = None
        if self._pointer:
            self._binding.llama_free(self._pointer)
            self._pointer = None

    def clear(self) -> None:
        """Forget all that was decoded."""
        self._binding.llama_memory_clear(self._binding.llama_get_memory(self._pointer), True)

    def decode(self, tokens: Int32, *, start: int = 0, first_output: int = 0) -> Float32:
        """Decode the next tokens of every sequence.

        Args:
            tokens: ``(n_seq, n)`` int32; row i continues sequence i.
            start: position of the first column in its sequence.
            first_output: lowest position whose logits are wanted.

        Returns:
            ``(n_seq, n_outputs, n_vocab)`` float32: the logits after each wanted position. A view of llama.cpp's own
            buffer, valid until the next call and not after the context is closed.

        Raises:
            GgmlError: llama.cpp refuses.
            Exception: whatever the context's observer raised.

        """
        n_seq, n = tokens.shape
        n_outputs = max(0, start + n - max(start, first_output))
        self._fill_batch(tokens, start, first_output)
        _log.clear()
        self._observer_error = None
        status, address = self._worker.run(self._decode_batch)
        if self._observer_error is not None:
            raise self._observer_error
        if status != 0:
            raise GgmlError(f"{self._model.file}: llama_decode failed with status {status}: {_log_error()}")
        shape = (n_seq, n_outputs, self._model.n_vocab)
        if n_outputs == 0:
            return np.empty(shape, dtype=np.float32)
        return np.ctypeslib.as_array(address, shape=shape)

    def _fill_batch(self, tokens: Int32, start: int, first_output: int) -> None:
        batch, (n_seq, n), n_tokens = self._batch, tokens.shape, tokens.size
        positions = np.tile(np.arange(start, start + n), n_seq)
        batch.n_tokens = n_tokens
        np.ctypeslib.as_array(batch.token, shape=(n_tokens,))[:] = tokens.ravel()
        np.ctypeslib.as_array(batch.pos, shape=(n_tokens,))[:] = positions
        np.ctypeslib.as_array(batch.n_seq_id, shape=(n_tokens,))[:] = 1
        np.ctypeslib.as_array(batch.logits, shape=(n_tokens,))[:] = positions >= first_output
        for i in range(n_tokens):
            batch.seq_id[i][0] = i // n

    def _decode_batch(self) -> tuple[int, Any]:
        status = self._binding.llama_decode(self._pointer, self._batch)
        return status, self._binding.llama_get_logits(self._pointer) if status == 0 else None


class _Worker:
    """A thread for the long calls of llama.cpp.

    While the main thread is inside a foreign function, Python cannot raise KeyboardInterrupt in it; while it waits
    for another thread, it can. ``stopping`` then tells llama.cpp's callbacks to give up, and the call is waited for,
    so that nothing is freed under it.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")
        self._pool.submit(int).result()  # the thread runs from here on: a call is either queued in it or not made

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        self.stopping = done = False
        try:
            result = self._pool.submit(function, *args).result()
            done = True
        finally:
            if not done:
                self._stop()
        return result

    def _stop(self) -> None:
        self.stopping = True
        while True:
            with suppress(KeyboardInterrupt):
                self._pool.submit(int).result()  # runs when all before it is over
                return

    def close(self) -> None:
        self._pool.shutdown()


# The last things that llama.cpp logged, as (level, text); cleared before every call whose failure is explained by it.
_log: deque[tuple[int, str]] = deque(maxlen=256)


def _log_error() -> str:
    """Return the first error that llama.cpp logged, in one line: it is the most specific, later ones pass it on."""
    errors = (text.strip() for level, text in _log if level == _LOG_LEVEL_ERROR)
    return next((" ".join(error.split()) for error in errors if error), "it gives no reason")


@functools.cache
def _binding() -> Any:
    """Import llama_cpp, silence its log and initialize it, once."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise GgmlError(f"llama-cpp-python cannot be used: {error}; run: pip install llama-cpp-python") from error
    llama_cpp.llama_log_set(_log_callback(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _log_callback(binding: Any) -> Any:
    """Return the log callback; cached because llama.cpp keeps nothing but its address."""
    return binding.llama_log_callback(lambda level, text, _: _log.append((level, text.decode(errors="replace"))))


def _core(cpu: int) -> str:
    """Return what identifies the physical core of a logical CPU: the list of its hyper-threads."""
    with suppress(OSError):
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    return str(cpu)
