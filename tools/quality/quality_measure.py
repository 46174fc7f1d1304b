"""Measure GGUFs of one model against its original, on chunks spread evenly over half a text.

The original's logits on those chunks are computed once and kept on disk, so that a file costs one pass of its own.
Everything measured is appended to a file of JSON lines at once; a measurement with a known key is not made again. A key
covers types, column weights, the recipe, the code named in ``WRITERS``, the tokens and llama.cpp's
build.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nsds_gguf
from nsds_gguf.allocate import make_plan
from nsds_gguf.calibration.activations import collect
from nsds_gguf.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from nsds_gguf.errors import TextError
from nsds_gguf.evaluate.divergence import TOKEN_SCORE, TokenScores, score_rows
from nsds_gguf.evaluate.inspect import inspect_gguf
from nsds_gguf.llamacpp import llama
from nsds_gguf.quantize.header import header_bytes
from nsds_gguf.records import UNQUANTIZED, Float32, Plan, Recipe, Scores
from nsds_gguf.session.original import PLAIN
from nsds_gguf.session.session import Session

Int32 = NDArray[np.int32]

N_CTX = 512
N_SEQUENCES = 4  # decoded together, as nsds_gguf.perplexity does at this context

# What llama.cpp's mixes treat apart, and llama-imatrix has no entry for.
OUTSIDE = ("output.weight", "token_embd.weight")

# Whose code decides, with llama.cpp's build, which bytes a plan becomes: part of every key.
WRITERS = ("quantize/*.py", "calibration/hessians.py")

# What of a recipe the bytes of a plan's tensors depend on, beside types.
DECIDING = ("rounding", "calibration", "device")

# Gives a file for the length of a ``with`` block.
File = Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True)
class Passage:
    """Half of a text and how many chunks of it are taken; ``name`` is that of the text.

    In conversations (``is_chat``) names of special tokens stand for the tokens.
    """

    name: str
    half: str  # "choosing" or "final"
    text: str
    n_chunks: int
    is_chat: bool = False

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Measured:
    """One file on one passage: per chunk the mean over its scored tokens.

    Attributes:
        key: digest of what was measured how.
        tensor_bytes: of the file's tensors, without padding.
        kld: divergence from the original, nats per token.
        nll: negative log-likelihood, nats per token.
        original_nll: that of the original.
        same_top: share of positions at which both prefer the same token.
        n_tokens: scored tokens of a chunk.
        outside: types of the tensors ``OUTSIDE``, as far as the file has them.
        kld_99: 99th percentile of the divergence over all tokens.
    """

    key: str
    tensor_bytes: int
    kld: tuple[float, ...]
    nll: tuple[float, ...]
    original_nll: tuple[float, ...]
    same_top: tuple[float, ...]
    n_tokens: int
    outside: dict[str, str]
    kld_99: float = math.nan


def halves(text: str) -> tuple[str, str]:
    """Return the half of a text to choose on and the half for final tables, cut behind a line."""
    middle = text.rfind("\n", 0, len(text) // 2) + 1
    if middle == 0:
        middle = len(text) // 2
    return text[:middle], text[middle:]


def spread(n_all: int, n_taken: int) -> list[int]:
    """Return the numbers of ``n_taken`` of ``n_all`` things, spread evenly: the middles of equal stretches."""
    n_taken = min(n_all, n_taken)
    return [(2 * i + 1) * n_all // (2 * n_taken) for i in range(n_taken)]


class Yardstick:
    """The chosen chunks of a passage and the original's logits on them."""

    def __init__(self, reference: Path, model_id: str, passage: Passage, folder: Path, n_threads: int) -> None:
        """Tokenize the passage and compute the original's logits, or take both from ``folder``."""
        self.passage, self.n_threads = passage, n_threads
        what = f"{model_id} {passage.digest} {N_CTX} {passage.n_chunks} {llama.llama_build()}"
        self.digest = hashlib.sha256(what.encode()).hexdigest()
        tokens = folder / f"tokens-{self.digest[:16]}.npy"
        logits = folder / f"logits-{self.digest[:16]}.npy"
        if not tokens.is_file():
            np.save(tokens, chosen_chunks(reference, passage))
        self.chunks: Int32 = np.load(tokens)
        if not logits.is_file():
            self._keep_logits(reference, logits)
        self.logits: Float32 = np.load(logits, mmap_mode="r")

    def score(self, file: Path) -> TokenScores:
        """Return the scores of a file's tokens, ``(n_chunks, n_scored)`` of ``TOKEN_SCORE``."""
        n, n_scored = self.logits.shape[:2]
        scores = np.zeros((n, n_scored), dtype=TOKEN_SCORE)
        for index, logits in second_halves(file, self.chunks, self.n_threads):
            targets = self.chunks[index, -n_scored:]
            score_rows(scores[index], [logits, np.asarray(self.logits[index])], targets)
        if not all(np.isfinite(scores[name]).all() for name in ("nll", "kld")):
            raise TextError(f"{file}: NaN or infinite logits")
        return scores

    def measure(self, file: Path, key: str) -> Measured:
        """Return what a file does on the passage."""
        scores = self.score(file)

        def means(name: str) -> tuple[float, ...]:
            return tuple(float(f"{value:.9g}") for value in scores[name].mean(axis=1))

        tensors = inspect_gguf(file).tensors
        columns = (means(name) for name in ("kld", "nll", "reference_nll", "same_top"))
        outside = {tensor.name: tensor.type for tensor in tensors if tensor.name in OUTSIDE}
        percentile = float(f"{np.percentile(scores['kld'], 99):.9g}")
        return Measured(key, sum(tensor.n_bytes for tensor in tensors), *columns, scores.shape[1], outside, percentile)

    def _keep_logits(self, reference: Path, path: Path) -> None:
        n_scored = N_CTX - 1 - N_CTX // 2
        temporary = path.with_suffix(".part")
        kept: Float32 | None = None
        for index, logits in second_halves(reference, self.chunks, self.n_threads):
            if kept is None:
                shape = (len(self.chunks), n_scored, logits.shape[1])
                kept = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            kept[index] = logits
        if kept is not None:
            kept.flush()
        temporary.replace(path)


def planned(session: Session, recipe: Recipe, scores: Scores | None = None) -> Plan:
    """Return the plan of a recipe; nothing is calibrated."""
    return make_plan(session.model, scores, recipe, header_bytes(session.model, recipe))


def original_plan(session: Session) -> Plan:
    """Return the plan of the original's file: every weight as it is, in F32."""
    return planned(session, PLAIN)


def tokenized(file: Path, text: str, is_chat: bool = False) -> Int32:
    """Return all whole chunks of a text, ``(n, N_CTX)`` int32, begun by BOS where the model wants it."""
    with llama.open_model(file, vocab_only=True) as model:
        tokens = model.tokenize(text.removesuffix("\n"), parse_special=is_chat)
        chunks = tokens[: len(tokens) // N_CTX * N_CTX].reshape(-1, N_CTX).copy()
        if model.bos is not None:
            chunks[:, 0] = model.bos
    return chunks


def chosen_chunks(reference: Path, passage: Passage) -> Int32:
    """Return the chunks of a passage that are taken, ``(n_chunks, N_CTX)`` int32."""
    chunks = tokenized(reference, passage.text, passage.is_chat)
    if len(chunks) < passage.n_chunks:
        raise TextError(f"{passage.name}: wanted {passage.n_chunks} chunks in half of it, got {len(chunks)}")
    return chunks[spread(len(chunks), passage.n_chunks)]


def second_halves(file: Path, chunks: Int32, n_threads: int) -> Iterator[tuple[int, Float32]]:
    """Yield the number of every chunk and the logits that predict its second half, ``(n_scored, n_vocab)``.

    The logits are a view that is valid until the next one is asked for.
    """
    n_chunks, n_ctx = chunks.shape
    n_seq = min(N_SEQUENCES, n_chunks)
    with (
        llama.open_model(file) as model,
        llama.open_context(model, n_ctx=n_ctx, n_batch=n_seq * n_ctx, n_seq=n_seq, n_threads=n_threads) as context,
    ):
        for start in range(0, n_chunks, n_seq):
            block = chunks[start : start + n_seq]
            context.clear()
            logits = context.decode(block, first_output=n_ctx // 2)
            for i in range(len(block)):
                yield start + i, logits[i, :-1]


class Bench:
    """Makes files of one model, measures and removes them, and keeps what it found.

    ``reference`` is the original as a GGUF; it stays in ``folder``. It is F32 whatever the source is: with BF16 weights
    llama.cpp rounds what they multiply too, which alone is a divergence of 1e-5.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        """Take the model; write the original unless it is there."""
        self.session, self.folder = session, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.reference = folder / f"original-{session.model.model_id[:16]}.gguf"
        if not self.reference.is_file():
            temporary = self.reference.with_suffix(".part")
            session.write(original_plan(session), temporary)
            temporary.replace(self.reference)
        self._log = folder / "measured.jsonl"
        self._known = self._read_log()
        self._build = build_digest()

    def yardstick(self, passage: Passage) -> Yardstick:
        """Return the yardstick of a passage."""
        return Yardstick(self.reference, self.session.model.model_id, passage, self.folder, self.session.run.n_threads)

    def plan(self, plan: Plan, yardsticks: Sequence[Yardstick]) -> list[Measured]:
        """Measure the file of a plan."""

        @contextmanager
        def file() -> Iterator[Path]:
            path = self.folder / f".measured-{os.getpid()}.gguf"
            try:
                self.session.write(plan, path)
                yield path
            finally:
                path.unlink(missing_ok=True)

        return self.measure(self._recipe(plan), file, yardsticks)

    def stock(self, mix: str, imatrix: Imatrix | None, yardsticks: Sequence[Yardstick]) -> list[Measured]:
        """Measure llama.cpp's own mix, made with an importance matrix where one is given."""

        @contextmanager
        def file() -> Iterator[Path]:
            path = self.folder / f".stock-{mix}-{os.getpid()}.gguf"
            try:
                columns = None if imatrix is None else imatrix.columns
                llama.quantize_preset(self.reference, path, mix, self.session.run.n_threads, columns)
                yield path
            finally:
                path.unlink(missing_ok=True)

        recipe = f"stock {mix} {self.session.model.model_id} {imatrix.sha256 if imatrix else 'none'}"
        return self.measure(recipe, file, yardsticks)

    def imatrix(self, text: str, is_chat: bool = False) -> Imatrix:
        """Return the importance matrix of a text, as llama-imatrix collects it: nothing for the tensors ``OUTSIDE``.

        From then on ``session`` knows it.
        """
        chunks = tokenized(self.reference, text, is_chat)
        path = self.folder / f"imatrix-{digest(self.session.model.model_id, text)[:16]}.gguf"
        if not path.is_file():
            moments = collect(self.reference, chunks, n_threads=self.session.run.n_threads)
            inside = {name: moment for name, moment in moments.items() if name not in OUTSIDE}
            write_imatrix(path.with_suffix(".part"), inside, source="text", n_chunks=len(chunks), n_ctx=N_CTX)
            path.with_suffix(".part").replace(path)
        imatrix = read_imatrix(path)
        self.session = Session(self.session.model, self.session.run, self.session.files, imatrix)
        return imatrix

    def measure(self, recipe: str, file: File, yardsticks: Sequence[Yardstick]) -> list[Measured]:
        """Measure a file unless one of the same ``recipe``, a digest of all that its bytes depend on, was measured."""
        keys = [digest(recipe, yardstick.digest, self._build) for yardstick in yardsticks]
        lacking = [(key, y) for key, y in zip(keys, yardsticks, strict=True) if key not in self._known]
        if lacking:
            with file() as path:
                for key, yardstick in lacking:
                    self._keep(yardstick.measure(path, key))
        return [self._known[key] for key in keys]

    def _keep(self, measured: Measured) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(measured)) + "\n")
        self._known[measured.key] = measured

    def _read_log(self) -> dict[str, Measured]:
        if not self._log.is_file():
            return {}
        found = {}
        for line in self._log.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            found[values["key"]] = Measured(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return found

    def _recipe(self, plan: Plan) -> str:
        """Return what the bytes of a plan's tensors depend on: types, column weights, equalization, the recipe."""
        calibrated, recipe = self.session.calibrated, plan.recipe
        columns = calibrated.column_weights(recipe, {tensor.type for tensor in plan.tensors})
        types = [(tensor.name, tensor.type) for tensor in plan.tensors]
        quantized = {tensor.name for tensor in plan.tensors if tensor.type not in UNQUANTIZED}
        parts = [f"{name} {hash_array(columns[name])}" for name, _ in types if name in columns and name in quantized]
        equalized = calibrated.equalization(recipe).columns
        parts += [f"{name} {hash_array(exponents)}" for name, exponents in sorted(equalized.items())]
        deciding = {name: getattr(recipe, name) for name in DECIDING}
        return digest(plan.model_id, json.dumps(deciding), json.dumps(types), *parts)


def digest(*parts: str) -> str:
    """Return the hex SHA-256 of some texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hash_array(array: NDArray[Any]) -> str:
    """Return the hex SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def build_digest() -> str:
    """Return a digest of llama.cpp's build and of the code that turns plans into bytes."""
    package = Path(nsds_gguf.__file__).parent
    files = [file for pattern in WRITERS for file in sorted(package.glob(pattern))]
    return digest(llama.llama_build(), *(file.read_text(encoding="utf-8") for file in files))
