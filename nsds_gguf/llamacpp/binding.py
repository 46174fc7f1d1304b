"""llama.cpp through its Python binding. Runs in the process of ``child`` only: nothing else may load a model.

``Engine`` holds models and contexts by number. Its methods are the calls that the parent makes; they return plain
values, arrays and what pickles.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from ..errors import GgmlError, VerifyError
from ..records import Float32
from . import graph
from .messages import map_shared

Int32 = NDArray[np.int32]

# Constants of llama.h and ggml.h: enum llama_flash_attn_type, ggml_type, llama_vocab_type,
# llama_load_mode, llama_pooling_type, ggml_log_level.
_FLASH_ATTN_DISABLED = 0
_GGML_TYPE_F32 = 0
_VOCAB_TYPE_NONE = 0
_LOAD_MODE_NONE = 0
_POOLING_NONE = 0
_LOG_LEVEL_ERROR = 4

# Tokens that llama.cpp computes at once by default, and with them the rows of logits in its working memory
# (llama-context.cpp, llama_context_default_params).
N_PHYSICAL_BATCH = 512

# llama.cpp's name, in its system info, of the AMX kernels. Compilers drop the stores that set up their tiles (GCC 12
# and older: _tile_loadconfig declares that it reads 8 bytes of 64), and the first quantized matrix kills the process:
# llama.cpp issue 20824, pull request 26954. So weights stay in their own layout where those kernels would be used.
_AMX = "AMX_INT8 = 1"

# The lines in which a context reports what it allocates, in MiB: llama-kv-cache.cpp, llama-memory-recurrent.cpp,
# llama-context.cpp. Without weights the buffers of caches are not allocated either, but their sizes are the same.
_MEMORY_LINES = {
    "attention cache": r": size = +([\d.]+) MiB \(.*?layers, .*?K \(",
    "recurrent states": r": size = +([\d.]+) MiB \(.*?layers, .*?R \(",
    "compute": r"compute buffer size = +([\d.]+) MiB",
    "output": r"output buffer size = +([\d.]+) MiB",
}


class Observer(Protocol):
    """What looks at the products with weights while a context decodes. It is pickled into llama.cpp's process."""

    def begin(self) -> None:
        """Prepare for a new graph: addresses of the last one mean nothing any more."""
        ...

    def wants(self, product: graph.Product) -> bool:
        """Return whether ``take`` is to be called when this product has been computed."""
        ...

    def take(self, product: graph.Product) -> None:
        """Look at what the product read, with ``graph.product_rows``."""
        ...

    def results(self) -> Iterator[Any]:
        """Yield what was found, piece by piece; each is pickled back and may be forgotten."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """What a loaded model says of itself; ``LlamaModel`` explains the fields."""

    number: int
    n_vocab: int
    bos: int | None
    adds_eos: bool
    n_bytes: int
    n_ctx_train: int


@dataclass(frozen=True)
class ContextOptions:
    """How a context decodes.

    Attributes:
        n_ctx: tokens of the longest sequence.
        n_batch: tokens of the largest block handed to ``decode``, all sequences together.
        n_seq: sequences of a block.
        n_threads: CPU threads.
        exact: F32 KV cache and no flash attention.
        observer: what looks at the products with weights.
        n_blas_threads: threads of NumPy's BLAS, for the observer.

    """

    n_ctx: int
    n_batch: int
    n_seq: int
    n_threads: int
    exact: bool
    observer: Observer | None
    n_blas_threads: int


class Engine:
    """The calls that the parent makes.

    Attributes:
        signs_of_life: grows whenever llama.cpp calls back: between tensors that it loads, operations that it computes,
            lines that it logs.

    """

    def __init__(self) -> None:
        self.signs_of_life = 0
        self._binding = _import_binding()
        self._messages: deque[tuple[int, str]] = deque(maxlen=256)  # level and text, since the last call that may fail
        self._sizes: deque[str] = deque(maxlen=64)  # the last lines that report the size of something
        self._log_callback = self._binding.llama_log_callback(self._logged)
        self._binding.llama_log_set(self._log_callback, None)
        self._binding.llama_backend_init()
        self._numbers = itertools.count()
        self._models: dict[int, _Model] = {}
        self._contexts: dict[int, _Context] = {}

    def build(self) -> str:
        """Return llama.cpp's version, that of the binding, and the CPU features in use, in one line."""
        binding = self._binding
        version = binding.llama_version().decode() if hasattr(binding, "llama_version") else "of unknown version"
        features = re.findall(r"(\w+) = 1", binding.llama_print_system_info().decode())
        return f"{version} (llama-cpp-python {binding.__version__}; {' '.join(features)})"

    def supports_gpu(self) -> bool:
        """Return whether this build of llama.cpp can hand layers to a GPU that is here."""
        return bool(self._binding.llama_supports_gpu_offload())

    # --- models ---

    def load(self, file: Path, path: str, vocab_only: bool, n_gpu_layers: int) -> ModelFacts:
        """Load the model at ``path``, called ``file`` in messages; raises ``VerifyError`` with llama.cpp's reason."""
        binding = self._binding
        params = binding.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = _AMX not in binding.llama_print_system_info().decode()
        params.progress_callback = binding.llama_progress_callback(lambda _fraction, _data: self._is_alive())
        self._messages.clear()
        pointer = binding.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            raise VerifyError(f"{file}: llama.cpp cannot load it: {self._error()}")
        vocab = binding.llama_model_get_vocab(pointer)
        if binding.llama_vocab_type(vocab) == _VOCAB_TYPE_NONE:
            binding.llama_model_free(pointer)
            raise VerifyError(f"{file}: holds no vocabulary; wanted a GGUF with tokenizer.ggml keys")
        number = next(self._numbers)
        self._models[number] = _Model(file, pointer, vocab, binding.llama_vocab_n_tokens(vocab), n_gpu_layers > 0)
        return ModelFacts(
            number=number,
            n_vocab=self._models[number].n_vocab,
            bos=binding.llama_vocab_bos(vocab) if binding.llama_vocab_get_add_bos(vocab) else None,
            adds_eos=bool(binding.llama_vocab_get_add_eos(vocab)),
            n_bytes=binding.llama_model_size(pointer),
            n_ctx_train=binding.llama_model_n_ctx_train(pointer),
        )

    def free_model(self, model: int) -> None:
        """Free a model; its contexts must be freed before."""
        self._binding.llama_model_free(self._models.pop(model).pointer)

    def tokenize(self, model: int, text: str, add_special: bool, parse_special: bool) -> Int32:
        """Return the token ids of a text, ``(n_tokens,)`` int32."""
        data, found = text.encode(), self._models[model]
        room = len(data) + 2  # a token a byte, BOS and EOS; a vocabulary may need more, and then says how much
        for _ in range(2):
            buffer = (self._binding.llama_token * room)()
            n_tokens = self._binding.llama_tokenize(
                found.vocab, data, len(data), buffer, room, add_special, parse_special
            )
            if n_tokens >= 0:
                ids: Int32 = np.frombuffer(buffer, dtype=np.int32, count=n_tokens).copy()
                return ids
            room = -n_tokens
        raise GgmlError(f"{found.file}: llama_tokenize failed on a text of {len(data)} bytes with status {n_tokens}")

    def detokenize(self, model: int, tokens: list[int]) -> str:
        """Return the text of tokens."""
        binding, found = self._binding, self._models[model]
        room = 1 + sum(len(binding.llama_vocab_get_text(found.vocab, token)) for token in tokens)
        ids = (binding.llama_token * len(tokens))(*tokens)
        for _ in range(2):
            buffer = binding.ctypes.create_string_buffer(room)
            n_bytes = binding.llama_detokenize(found.vocab, ids, len(tokens), buffer, room, False, True)
            if n_bytes >= 0:
                data: bytes = buffer.raw[:n_bytes]
                return data.decode(errors="replace")
            room = -n_bytes
        raise GgmlError(f"{found.file}: llama_detokenize failed on {len(tokens)} tokens with status {n_bytes}")

    def end_tokens(self, model: int) -> Int32:
        """Return the tokens that end a text or a turn, ``(n,)`` int32, in order."""
        found, is_end = self._models[model], self._binding.llama_vocab_is_eog
        return np.array([token for token in range(found.n_vocab) if is_end(found.vocab, token)], np.int32)

    # --- contexts ---

    def open_context(self, model: int, options: ContextOptions, shared: str) -> int:
        """Create a context whose logits go to a shared buffer, and return its number."""
        threadpoolctl.threadpool_limits(options.n_blas_threads, user_api="blas")
        context = _Context(self, self._models[model], options, map_shared(shared))
        number = next(self._numbers)
        self._contexts[number] = context
        return number

    def free_context(self, context: int) -> None:
        """Free a context."""
        self._contexts.pop(context).close()

    def clear(self, context: int) -> None:
        """Forget all that was decoded."""
        pointer = self._contexts[context].pointer
        self._binding.llama_memory_clear(self._binding.llama_get_memory(pointer), True)

    def decode(self, context: int, tokens: Int32, start: int, first_output: int, reads: bool) -> None:
        """Decode the next tokens of every sequence; where ``reads``, leave the logits in the shared buffer."""
        self._contexts[context].decode(tokens, start, first_output, reads)

    def next_observed(self, context: int) -> Any:
        """Return the next of what a context's observer found, ``None`` after the last."""
        return next(self._contexts[context].results, None)

    def embed(self, model: int, texts: list[Int32], n_threads: int) -> Float32:
        """Return the pooled embeddings of texts, ``(n_texts, n_embd)`` float32."""
        binding, found, n_longest = self._binding, self._models[model], max(len(text) for text in texts)
        params = binding.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_longest  # pooling needs a text in one physical batch
        params.n_threads = params.n_threads_batch = n_threads
        params.offload_kqv = params.op_offload = found.uses_gpu
        params.embeddings = True
        params.flash_attn_type, params.type_k, params.type_v = _FLASH_ATTN_DISABLED, _GGML_TYPE_F32, _GGML_TYPE_F32
        abort_callback = params.abort_callback = binding.ggml_abort_callback(lambda _: not self._is_alive())
        self._messages.clear()
        context = binding.llama_init_from_model(found.pointer, params)
        if not context:
            raise GgmlError(f"{found.file}: llama.cpp cannot create a context: {self._error()}")
        try:
            if binding.llama_pooling_type(context) == _POOLING_NONE:
                raise VerifyError(f"{found.file}: does not say how embeddings are pooled; wanted a key pooling_type")
            return np.stack([self._embedding(found, context, text) for text in texts])
        finally:
            binding.llama_free(context)
            del abort_callback  # llama.cpp kept no more than its address

    def _embedding(self, model: _Model, context: Any, tokens: Int32) -> Float32:
        """Return the embedding of one text, ``(n_embd,)`` float32."""
        binding = self._binding
        if binding.llama_get_memory(context):
            binding.llama_memory_clear(binding.llama_get_memory(context), True)
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        batch = binding.llama_batch_get_one(ids.ctypes.data_as(binding.ctypes.POINTER(binding.llama_token)), len(ids))
        self._messages.clear()
        status = binding.llama_decode(context, batch)
        address = binding.llama_get_embeddings_seq(context, 0)
        if status or not address:
            raise GgmlError(f"{model.file}: llama_decode failed with status {status}: {self._error()}")
        n_embd = binding.llama_model_n_embd_out(model.pointer)
        found: Float32 = np.ctypeslib.as_array(address, shape=(n_embd,)).copy()
        return found

    # --- files ---

    def check_loads(self, file: Path, path: str) -> None:
        """Load a model without its weights and build what it computes; raises ``VerifyError`` where that fails."""
        params = self._binding.llama_context_default_params()
        params.n_ctx = params.n_batch = N_PHYSICAL_BATCH
        self._build_without_weights(file, path, params)

    def memory(self, file: Path, path: str, n_ctx: int, cache_type: int) -> dict[str, float]:
        """Return the bytes that llama.cpp would allocate for a context, by kind, from what it logs.

        It loads the model without its weights; ``llama.memory`` names the kinds.
        """
        params = self._binding.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.swa_full = n_ctx, 1, False
        params.type_k = params.type_v = cache_type
        params.offload_kqv = params.op_offload = False  # all of it in one place: the CPU
        self._build_without_weights(file, path, params)
        text = "".join(self._sizes)
        return {kind: sum(map(float, re.findall(pattern, text))) * 2**20 for kind, pattern in _MEMORY_LINES.items()}

    def _build_without_weights(self, file: Path, path: str, context_params: Any) -> None:
        """Load a model without its weights and create a context; ``_sizes`` then holds what the context logged."""
        binding = self._binding
        params = binding.llama_model_default_params()
        params.no_alloc, params.load_mode, params.n_gpu_layers = True, _LOAD_MODE_NONE, 0
        self._messages.clear()
        model = binding.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise VerifyError(f"{file}: llama.cpp cannot load it: {self._error()}")
        try:
            self._messages.clear()
            self._sizes.clear()
            context = binding.llama_init_from_model(model, context_params)
            if not context:
                raise VerifyError(f"{file}: llama.cpp cannot run it: {self._error()}")
            binding.llama_free(context)
        finally:
            binding.llama_model_free(model)

    def quantize(
        self, source: str, target: str, preset: str, n_threads: int, importance: Mapping[str, Float32] | None
    ) -> None:
        """Let llama.cpp quantize a GGUF by its own rules; paths are absolute."""
        binding = self._binding
        params = binding.llama_model_quantize_default_params()
        params.ftype, params.nthread = getattr(binding, f"LLAMA_FTYPE_MOSTLY_{preset}"), n_threads
        params.allow_requantize = True  # of Q8_0
        if importance is not None:
            params.imatrix, _columns = _imatrix_data(binding, importance)
        self._messages.clear()
        if binding.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
            raise GgmlError(f"{source}: llama.cpp cannot make {preset} of it: {self._error()}")

    # --- signs of life, and last words ---

    def _is_alive(self) -> bool:
        self.signs_of_life += 1
        return True

    def _logged(self, level: int, text: bytes, _data: Any) -> None:
        self._is_alive()
        message = text.decode(errors="replace")
        self._messages.append((level, message))
        if "size =" in message:
            self._sizes.append(message)
        if level == _LOG_LEVEL_ERROR:  # should the process die of it, this is what it leaves
            sys.stderr.write(message)
            sys.stderr.flush()

    def _error(self) -> str:
        """Return the first error that was logged, in one line: the most specific, which later ones pass on."""
        errors = (text.strip() for level, text in self._messages if level == _LOG_LEVEL_ERROR)
        return next((" ".join(error.split()) for error in errors if error), "it gives no reason")


@dataclass(frozen=True)
class _Model:
    file: Path
    pointer: Any
    vocab: Any
    n_vocab: int
    uses_gpu: bool


class _Context:
    """A context, its batch, and who observes it."""

    def __init__(self, engine: Engine, model: _Model, options: ContextOptions, shared: Any) -> None:
        self._engine, self._binding, self._model, self._shared = engine, engine._binding, model, shared
        self._observer = options.observer
        self._observer_error: Exception | None = None
        self.pointer = self._create(options)
        self._batch = self._binding.llama_batch_init(options.n_batch, 0, 1)

    def _create(self, options: ContextOptions) -> Any:
        binding, engine = self._binding, self._engine
        params = binding.llama_context_default_params()
        params.n_ctx = options.n_ctx * options.n_seq
        params.n_batch = options.n_batch
        params.n_seq_max = options.n_seq
        params.n_threads = params.n_threads_batch = options.n_threads
        params.offload_kqv = params.op_offload = self._model.uses_gpu  # else a GPU would still take large products
        if options.exact:
            params.flash_attn_type = _FLASH_ATTN_DISABLED
            params.type_k = params.type_v = _GGML_TYPE_F32
        # Kept alive by self: llama.cpp keeps nothing but addresses. It asks between operations whether to give up.
        self._abort_callback = params.abort_callback = binding.ggml_abort_callback(lambda _: not engine._is_alive())
        if self._observer is not None:
            self._eval_callback = params.cb_eval = binding.ggml_backend_sched_eval_callback(self._evaluated)
        engine._messages.clear()
        pointer = binding.llama_init_from_model(self._model.pointer, params)
        if not pointer:
            raise GgmlError(f"{self._model.file}: llama.cpp cannot create a context: {engine._error()}")
        if not binding.llama_get_memory(pointer):
            binding.llama_free(pointer)
            raise VerifyError(f"{self._model.file}: not a model that predicts the next token; wanted a decoder")
        return pointer

    def _evaluated(self, address: int, ask: bool, _data: Any) -> bool:
        """Answer llama.cpp before a node of the graph (``ask``) and after one that was wanted; false ends the graph.

        An exception cannot pass through llama.cpp, so it waits here for ``decode``.
        """
        if self._observer is None or self._observer_error is not None:
            return False
        try:
            product = graph.product(address)
            if product is None or (ask and not self._observer.wants(product)):
                return False
            if not ask:
                self._observer.take(product)
        except Exception as error:
            self._observer_error = error
            return False
        return True

    def decode(self, tokens: Int32, start: int, first_output: int, reads: bool) -> None:
        self._fill_batch(tokens, start, first_output)
        self._engine._messages.clear()
        self._observer_error = None
        if self._observer is not None:
            self._observer.begin()
        status = self._binding.llama_decode(self.pointer, self._batch)
        if self._observer_error is not None:
            raise self._observer_error
        if status != 0:
            raise GgmlError(f"{self._model.file}: llama_decode failed with status {status}: {self._engine._error()}")
        n_seq, n = tokens.shape
        shape = n_seq, max(0, start + n - max(start, first_output)), self._model.n_vocab
        if reads and shape[1]:
            logits = np.ctypeslib.as_array(self._binding.llama_get_logits(self.pointer), shape=shape)
            np.frombuffer(self._shared, np.float32, logits.size).reshape(shape)[...] = logits

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

    @functools.cached_property
    def results(self) -> Iterator[Any]:
        return iter(()) if self._observer is None else self._observer.results()

    def close(self) -> None:
        self._binding.llama_batch_free(self._batch)
        self._binding.llama_free(self.pointer)


def _import_binding() -> Any:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise GgmlError(f"llama-cpp-python cannot be used: {error}; run: pip install llama-cpp-python") from error
    return llama_cpp


def _imatrix_data(binding: Any, importance: Mapping[str, Float32]) -> tuple[Any, list[Float32]]:
    """Return llama.cpp's array of names and columns, ended by a null name, and what its pointers point to."""
    columns = [np.ascontiguousarray(values, dtype=np.float32).ravel() for values in importance.values()]
    data = (binding.llama_model_imatrix_data * (len(columns) + 1))()
    for entry, name, values in zip(data, importance, columns, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(type(entry.data))
    return data, columns
