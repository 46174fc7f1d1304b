"""How much divergence noise in a tensor causes: the Fisher information of its weights, on tokens drawn at random.

For small changes ``dW`` of the weights the mean KL divergence is ``1/2 sum F_ij dW_ij^2`` when changes are independent,
with ``F`` the diagonal of the Fisher information (Amari, Natural gradient works efficiently in learning, 1998): the
mean over tokens of ``(d log p(y) / dW_ij)^2``, ``y`` drawn from the model's own prediction. Noise of relative energy
``e`` has ``dW_ij^2 = e W_ij^2``: the *sensitivity* of a tensor is ``1/2 sum F_ij W_ij^2``, in nats per unit of relative
error. There is no constant to fit.

No data is needed: of which tokens the model reads, little depends (docs/log.md, 2026-11-25). They are drawn by Zipf's
law from the vocabulary, whose ids are ordered by how common the tokens were when it was made. One pass goes forward
and back through the model, in numpy, layer by layer; what a layer reads is kept in a file, the rest computed again
backward.

One backward pass serves all tokens of a sequence: their losses get random signs, so that in the square of the sum the
products of two tokens cancel on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..compute.decoder import Decoder
from ..compute.layer_file import LayerFile, layer_file
from ..compute.layers import view_layer
from ..compute.norms import Norm
from ..compute.tape import Ids, Node, Tape, energy_of, slabs
from ..errors import ModelError
from ..records import Float32, Float64, Model, Progress, Tensor, no_progress
from ..system.resources import check_memory

Tokens = NDArray[np.int64]

N_SEQUENCES, N_POSITIONS = 4, 512  # of the tokens drawn
N_SEQUENCES_LARGE, LARGE_WEIGHTS = 2, 10**8  # half as many tell as much (docs/log.md), where more would cost minutes
SCORED_FROM = 0.5  # of a sequence: as perplexity does, tokens with little in front of them are left out
ZIPF_SHIFT = 27.0  # ranks count from here (Mandelbrot's form of the law): the commonest token is 1 % of the text

# Copies of the stream's width and of the hidden units that a layer holds at most: 14 and 7 of keys' and values' width
# were measured, and 8.6 (docs/log.md, 2026-11-25).
_WIDTHS, _HIDDEN_WIDTHS = 21, 9

_LOOKUP = "rows looked up"  # energy of the embedding as such, beside that of the output
_NORMAL = 1  # LLAMA_TOKEN_TYPE_NORMAL


@dataclass(frozen=True)
class Fisher:
    """Result of a pass, by stored tensor name.

    Attributes:
        sensitivity: nats of divergence per unit of relative error.
        inputs: ``(n_cols,)`` float64, mean square of what each column multiplies; of an embedding that doubles as the
            output, of what noise in it meets in both roles. ``(n_experts, n_cols)`` where experts multiply what is
            their own: of those that no token visits, the mean over the others.
        looked_up: share of the sensitivity of a tied embedding that is due to the rows looked up, not to the output.
        n_experts: routed experts of all layers.
        n_missed: of them, how many no token visits.
    """

    sensitivity: Mapping[str, float]
    inputs: Mapping[str, Float64]
    looked_up: float = 0.0
    n_experts: int = 0
    n_missed: int = 0


def draw_tokens(model: Model, n_sequences: int = N_SEQUENCES, n_positions: int = N_POSITIONS, seed: int = 0) -> Tokens:
    """Return ``(n_sequences, n_positions)`` token ids drawn by Zipf's law, behind BOS where the model knows one.

    Ranks are those of the vocabulary's scores where it has any (sentencepiece), otherwise of its ids; control tokens
    and bytes are left out. A model without a vocabulary gets all rows of its embedding alike. No sequence exceeds the
    context that the model was trained for.
    """
    rng = np.random.default_rng(seed)
    n_vocab, n_positions = model.hparams.n_vocab, min(n_positions, model.hparams.n_ctx_train or n_positions)
    chance = token_chances(model)
    tokens: Tokens = rng.choice(n_vocab, (n_sequences, n_positions), p=chance)
    bos = model.metadata.get("tokenizer.ggml.bos_token_id")
    adds = model.metadata.get("tokenizer.ggml.add_bos_token")
    if bos is not None and 0 <= int(bos.value) < n_vocab and (adds is None or adds.value):
        tokens[:, 0] = int(bos.value)
    return tokens


def n_sequences_for(model: Model) -> int:
    """Return how many sequences are drawn for a model."""
    return N_SEQUENCES if model.n_weights < LARGE_WEIGHTS else N_SEQUENCES_LARGE


def token_chances(model: Model) -> Float64:
    """Return the probability of each row of the embedding, ``(n_vocab,)``."""
    n_vocab = model.hparams.n_vocab
    types, scores = (model.metadata.get(f"tokenizer.ggml.{key}") for key in ("token_type", "scores"))
    order = np.arange(n_vocab, dtype=np.float64)
    if scores is not None and len(scores.value) == n_vocab:
        order = -np.asarray(scores.value, dtype=np.float64)
    known = np.ones(n_vocab, dtype=bool)
    if types is not None and len(types.value) == n_vocab:
        known = np.asarray(types.value) == _NORMAL
    if not known.any():
        known[:] = True
    ranks = np.empty(n_vocab)
    ranks[np.argsort(np.where(known, order, np.inf), kind="stable")] = np.arange(n_vocab)
    chance = np.where(known, 1 / (ranks + ZIPF_SHIFT), 0.0) if types is not None else np.ones(n_vocab)
    total: Float64 = chance / chance.sum()
    return total


def fisher(
    model: Model,
    tokens: Tokens,
    n_threads: int,
    progress: Progress = no_progress,
    seed: int = 0,
    folder: Path | None = None,
) -> Fisher:
    """Return the sensitivity of every matrix and what its columns multiply.

    In memory: the activations of one layer. In a temporary file: what every layer reads, ``n_layers * tokens.size *
    n_embd`` float32.

    Args:
        model: one of which nothing ``decoder.what_is_missing``.
        tokens: ``(n_sequences, n_positions)`` ids.
        n_threads: threads; they do not change the result.
        folder: where the temporary file goes; ``None`` for the system's folder of such.
        progress: called with layers done, forward and back, and layers in all.
        seed: of the predictions that are drawn.

    Raises:
        ModelError: activations are not finite: the weights are damaged.
        OutputError: there is too little memory, or no room on the disk for the temporary file.

    """
    check_memory(working_bytes(model, tokens.size), "the pass over tokens", "close other programs")
    return _Pass(model, tokens, n_threads, progress, seed).run(folder)


def working_bytes(model: Model, n_tokens: int) -> int:
    """Return about what the activations of one layer, forward and back, take in memory."""
    h = model.hparams
    return 4 * n_tokens * (_WIDTHS * h.n_embd + _HIDDEN_WIDTHS * h.n_ff)


def mixed_roles(moments: Float64, looked_up: float) -> Float64:
    """Return column moments, or full ones, of a matrix in two roles, each weighing its share of the sensitivity.

    Looked-up rows enter the stream, where noise in one channel does as much as in another.

    Args:
        moments: ``(n_cols,)`` or ``(n_cols, n_cols)``, of what the output multiplies.
        looked_up: share of the other role, from 0 to 1.

    """
    scale = (moments if moments.ndim == 1 else moments.diagonal()).mean()
    alike = np.ones(len(moments)) if moments.ndim == 1 else np.eye(len(moments))
    mixed: Float64 = (1 - looked_up) * moments + looked_up * scale * alike
    return mixed


def read_tokens(
    model: Model, tokens: Tokens, n_threads: int, on_input: Callable[[str, Float32], None], n_layers: int
) -> None:
    """Read tokens with the first layers of a model, and with its output where these are all.

    Args:
        model: one of which nothing ``decoder.what_is_missing``.
        tokens: ``(n_sequences, n_positions)`` ids.
        n_threads: threads; they do not change the result.
        on_input: told of every matrix and what it multiplies, ``(n, n_cols)``, first positions left out; matrices with
            one input are told one array. Of stacked experts those that read the stream.
        n_layers: how many layers read.

    """
    reader = _Pass(model, tokens, n_threads, no_progress, 0)
    last: list[Float32] = []  # an input and what is told of it

    def told(name: str, x: Float32) -> None:
        if not last or last[0] is not x:
            last[:] = x, x[reader.seen]
        on_input(name, last[1])

    with ThreadPoolExecutor(n_threads) as pool:
        tape = reader.tape(pool, told, is_kept=False)
        stream = reader.embed(tape)[1].value
        for index in range(n_layers):
            stream = reader.decoder.layer(tape, view_layer(model, index), Node(stream)).value
        if n_layers == model.hparams.n_layers:
            told(model.unembedding().name, reader.behind_norm(tape, Node(stream)).value)


class _Pass:
    """State of one pass: ``inputs`` and ``energies`` fill up on the way."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        n_threads: int,
        progress: Progress,
        seed: int,
    ) -> None:
        self.model, self.tokens, self.hparams = model, tokens, model.hparams
        self.n_threads, self.progress, self.seed = n_threads, progress, seed
        self.n_positions = tokens.shape[1]
        self.decoder = Decoder.of(model, self.n_positions)
        self.inputs: dict[str, Float64] = {}
        self.experts: dict[str, dict[int, Float64]] = {}  # as inputs, of stacked matrices, by number of the expert
        self.energies: dict[str, float] = {}
        position = np.arange(tokens.size) % self.n_positions
        self.seen = position > 0  # first tokens are sinks of attention: their activations are like no other's
        self.scored = np.flatnonzero(position >= int(self.n_positions * SCORED_FROM))

    def run(self, folder: Path | None) -> Fisher:
        """Go forward, keeping what layers read, then back."""
        n_bytes = self.hparams.n_layers * self.tokens.size * self.hparams.n_embd * np.dtype(np.float32).itemsize
        with (
            np.errstate(over="ignore", invalid="ignore"),  # what is not finite is refused where it appears
            layer_file(folder, n_bytes) as file,
        ):
            return self.there_and_back(file)

    def there_and_back(self, file: LayerFile) -> Fisher:
        """Do the pass."""
        h, done = self.hparams, 0
        total = 2 * h.n_layers + 1
        with ThreadPoolExecutor(self.n_threads) as pool:
            embedded, forward = self.tape(pool), self.tape(pool, self.record, self.record_expert, is_kept=False)
            rows, entry = self.embed(embedded)
            stream = entry.value
            for index in range(h.n_layers):
                file.append(stream)
                stream = self.decoder.layer(forward, view_layer(self.model, index), Node(stream)).value
                if not np.isfinite(stream).all():
                    raise ModelError(f"layer {index}: its output is not finite; the weights are damaged")
                self.progress(done := done + 1, total)
            grad = self.output(pool, stream)
            self.progress(done := done + 1, total)
            for index in reversed(range(h.n_layers)):
                tape, x = self.tape(pool), Node(file.read(index, stream))
                self.decoder.layer(tape, view_layer(self.model, index), x).receive(grad)
                tape.backward()
                grad = np.zeros_like(grad) if x.grad is None else x.grad
                self.progress(done := done + 1, total)
        entry.receive(grad)
        embedded.backward()
        self.embedding(rows)
        if not all(np.isfinite(energy) for energy in self.energies.values()):
            raise ModelError("the derivatives of the logits are not finite; the weights are damaged")
        return self.result(0.5 / len(self.scored))

    def result(self, per_token: float) -> Fisher:
        """Return what was found, the two roles of a tied embedding put together."""
        energies, head = dict(self.energies), self.model.unembedding().name
        looked_up = 0.0
        if self.model.is_tied:
            rows, output = energies.pop(_LOOKUP), energies[head]
            energies[head] = rows + output
            looked_up = rows / energies[head] if energies[head] else 0.0
            self.inputs[head] = mixed_roles(self.inputs[head], looked_up)
        else:
            energies["token_embd.weight"] = energies.pop(_LOOKUP)
        sensitivity = {name: per_token * energy for name, energy in energies.items()}
        n_experts = sum(self.model.by_name[name].shape[0] for name in self.experts)
        n_visited = sum(len(found) for found in self.experts.values())
        inputs = {**self.inputs, **self.of_experts()}
        return Fisher(sensitivity, inputs, looked_up, n_experts, n_experts - n_visited)

    def of_experts(self) -> dict[str, Float64]:
        """Return ``(n_experts, n_cols)`` inputs of stacked matrices whose experts have their own, by stored name."""
        stacked = {}
        for name, found in self.experts.items():
            mean: Float64 = np.mean(list(found.values()), axis=0)
            stacked[name] = np.stack([found.get(i, mean) for i in range(self.model.by_name[name].shape[0])])
        return stacked

    def tape(
        self,
        pool: Executor,
        on_input: Callable[[str, Float32], None] | None = None,
        on_expert: Callable[[str, int, Ids, Float32], None] | None = None,
        is_kept: bool = True,
    ) -> Tape:
        """Return an empty tape."""
        return Tape(pool, self.n_positions, self.energies, on_input, is_kept, on_expert)

    def record(self, name: str, x: Float32) -> None:
        """Take the mean square of a matrix's input; several parts of one stored tensor read the same."""
        if name not in self.inputs:
            self.inputs[name] = np.square(x[self.seen], dtype=np.float64).mean(axis=0)

    def record_expert(self, name: str, expert: int, tokens: Ids, x: Float32) -> None:
        """Take the mean square of the input of an expert's last matrix, where tokens other than first ones visit it."""
        found, seen = self.experts.setdefault(name, {}), self.seen[tokens]
        if seen.any():
            found[expert] = np.square(x[seen], dtype=np.float64).mean(axis=0)

    def embed(self, tape: Tape) -> tuple[Node, Node]:
        """Return the embedding's rows, and what enters the first layer, each ``(n, n_embd)``."""
        tensors, ids = self.model.by_name, self.tokens.ravel()
        rows = Node(_rows(tensors["token_embd.weight"], ids) * np.float32(self.hparams.embedding_scale))
        entry = rows
        for name, which in (("position_embd.weight", np.arange(len(ids)) % self.n_positions),
                            ("token_types.weight", np.zeros(len(ids), dtype=np.intp))):  # fmt: skip
            if name in tensors:
                entry = tape.add(entry, Node(_rows(tensors[name], which)))
        if "token_embd_norm.weight" in tensors:
            norm = Norm(tensors["token_embd_norm.weight"], tensors.get("token_embd_norm.bias"))
            entry = self.decoder.norm(tape, norm, entry)
        return rows, entry

    def embedding(self, rows: Node) -> None:
        """Add the energy of the embedding, whose rows have received their derivative."""
        energy, self.energies[_LOOKUP] = 0.0, 0.0
        if rows.grad is None:
            return
        weighted = rows.grad * rows.value  # of a row's occurrences the derivatives add up, the row is the same
        for start in range(0, len(weighted), self.n_positions):
            ids, at = np.unique(self.tokens.ravel()[start : start + self.n_positions], return_inverse=True)
            sums = np.zeros((len(ids), weighted.shape[1]))
            np.add.at(sums, at, weighted[start : start + self.n_positions])
            energy += float(np.square(sums).sum())
        self.energies[_LOOKUP] = energy

    def behind_norm(self, tape: Tape, x: Node) -> Node:
        """Return what the output reads."""
        tensors = self.model.by_name
        gain = tensors.get("output_norm.weight")
        if gain is None:  # RMS models without a gain have no norm here; layer norms without one are olmo's
            return x if self.hparams.norm == "rms" else self.decoder.norm(tape, Norm(), x)
        return self.decoder.norm(tape, Norm(gain, tensors.get("output_norm.bias")), x)

    def output(self, pool: Executor, stream: Float32) -> Float32:
        """Draw predictions, add the energy of the output tensor, return the derivative by the stream, its shape."""
        tape, x = self.tape(pool), Node(stream)
        read = self.behind_norm(tape, x)
        if not np.isfinite(read.value).all():
            raise ModelError("tensor output_norm.weight: what it gives is not finite; the weights are damaged")
        head = Head(self.model, read.value[self.scored], self.seed)
        self.record(head.tensor.name, read.value)
        found = list(tape.each(head.scan, head.slabs))
        log_sum = np.logaddexp.reduce([part.log_sum for part in found])
        best = np.argmax([part.best for part in found], axis=0)
        drawn = np.array([part.drawn for part in found])[best, np.arange(len(best))]
        signs = np.random.default_rng(self.seed).choice(np.array([-1, 1], dtype=np.float32), len(self.scored))
        grad = np.zeros_like(stream)
        n_scored = len(self.scored) // len(self.tokens)
        energy = 0.0
        for by_input, part in tape.each(
            lambda slab: head.derivative(slab, log_sum, drawn, signs, n_scored), head.slabs
        ):
            grad[self.scored] += by_input
            energy += part
        self.energies[head.tensor.name] = self.energies.get(head.tensor.name, 0.0) + energy
        read.receive(grad)
        tape.backward()
        if x.grad is None:
            raise ModelError("the output reads nothing of the stream")
        return x.grad


@dataclass(frozen=True)
class Scan:
    """Of a slab of the vocabulary, by position: ``log sum exp`` of logits, the largest perturbed one, its token."""

    log_sum: Float64
    best: Float64
    drawn: Tokens


class Head:
    """The output tensor over slabs of the vocabulary: no more than a slab of logits is held.

    A token is drawn from the softmax as the largest logit after adding Gumbel noise (Gumbel, 1954), which needs no
    normalization; the noise of a slab comes from a generator of its own.
    """

    def __init__(self, model: Model, x: Float32, seed: int) -> None:
        self.tensor, self.hparams, self.x, self.seed = model.unembedding(), model.hparams, x, seed
        bias = model.by_name.get("output.bias")
        self.bias = None if bias is None else bias.load().ravel()
        self.slabs = slabs(self.tensor)

    def logits(self, slab: tuple[int, int]) -> tuple[Float32, Float32, Float32]:
        """Return the rows of a slab, its logits ``(n_scored, n_rows)``, and their derivative by the plain product."""
        h, rows = self.hparams, self.tensor.read_rows(*slab)
        logits = self.x @ rows.T
        if self.bias is not None:
            logits += self.bias[slice(*slab)]
        logits *= np.float32(h.logit_scale)
        slope = np.float32(h.logit_scale) * np.ones(1, dtype=np.float32)
        if h.logit_cap:
            bent = np.tanh(logits / np.float32(h.logit_cap))
            logits, slope = bent * np.float32(h.logit_cap), slope * (1 - bent**2)
        return rows, logits, slope

    def scan(self, slab: tuple[int, int]) -> Scan:
        """Return what of a slab is needed to draw."""
        _, logits, _ = self.logits(slab)
        noise = np.random.default_rng([self.seed, slab[0]]).gumbel(size=logits.shape)
        perturbed = logits + noise
        largest = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64)) + largest[:, 0]
        at = perturbed.argmax(axis=1)
        return Scan(log_sum, perturbed[np.arange(len(at)), at], at + slab[0])

    def derivative(
        self, slab: tuple[int, int], log_sum: Float64, drawn: Tokens, signs: Float32, length: int
    ) -> tuple[Float32, float]:
        """Return the derivative of ``sum signs log p(drawn)`` by the input, and the energy of that by the rows."""
        rows, logits, slope = self.logits(slab)
        grad = -np.exp(logits - log_sum[:, np.newaxis].astype(np.float32))
        inside = np.flatnonzero((drawn >= slab[0]) & (drawn < slab[1]))
        grad[inside, drawn[inside] - slab[0]] += 1
        grad *= signs[:, np.newaxis] * slope
        return grad @ rows, energy_of(rows, grad, self.x, range(0, len(grad) + 1, length))


def _rows(tensor: Tensor, ids: NDArray[np.intp]) -> Float32:
    """Return rows by number, ``(len(ids), n_cols)``; each is read once."""
    distinct, at = np.unique(ids, return_inverse=True)
    return np.concatenate([tensor.read_rows(int(i), int(i) + 1) for i in distinct])[at]
