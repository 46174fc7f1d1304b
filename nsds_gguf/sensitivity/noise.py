"""Sensitivities without derivatives: the divergence that noise in one tensor causes, measured by llama.cpp.

For small noise of relative error ``e`` in a tensor, divergence is ``s e`` with ``s`` the sensitivity that the Fisher
pass computes (``fisher``). Here ``s`` is the divergence over ``e`` at an ``e`` of the size of quantization errors. That
needs no derivative, so it works for all that llama.cpp runs: recurrent layers, delta nets, latent attention.

llama.cpp reads the same tokens in several sequences at once, each with noise in another tensor. Where it multiplies
rows ``x`` with a matrix ``W``, ``dW x`` is added to the product, ``dW_ij = +-sqrt(e) W_ij`` with random signs; rows
that it looks up change likewise. All tensors are measured on the same tokens, so that differences between tokens do
not blur their order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compute.backend import Tokens
from ..compute.pass_records import PASS
from ..errors import VerifyError
from ..llamacpp import graph
from ..llamacpp.llama import N_PHYSICAL_BATCH, LlamaContext, open_context, open_model
from ..llamacpp.rules import kept_reason
from ..records import Float32, Model, Progress, Tensor, no_progress
from ..system.store import Store
from .moment_propagation import typical_sensitivities
from .result import Sensitivities

RELATIVE_ERROR = 0.03  # of the noise: that of 3 bits; smaller noise drowns in llama.cpp's rounding of activations
N_SEQUENCES, N_POSITIONS = 2, 128  # of the text
SCORED_FROM = 16  # position; the first predictions have little context

_SLAB_BYTES = 1 << 26


@dataclass(frozen=True)
class Noisy:
    """A tensor to add noise to: where it multiplies rows, or (``is_lookup``) where rows of it are looked up."""

    tensor: Tensor
    is_lookup: bool = False

    @property
    def record(self) -> str:
        """Name of the record of its divergence."""
        return f"{PASS}/noise in {'rows of ' if self.is_lookup else ''}{self.tensor.name}"


def noisy_tensors(model: Model, multiplied: Collection[str]) -> list[Noisy]:
    """Return what to measure of a model's quantized tensors; a tied embedding has two parts.

    ``multiplied`` has the names of those that multiply rows; of the others, rows are looked up.
    """
    quantized = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    found = [Noisy(tensor) for tensor in quantized if tensor.name in multiplied]
    return found + [Noisy(t, True) for t in quantized if t.name not in multiplied or t.name == "token_embd.weight"]


def with_noise(found: Sensitivities, model: Model, divergence: Mapping[Noisy, float]) -> Sensitivities:
    """Return the result of moment propagation with measured sensitivities, in nats per unit of relative error.

    ``divergence`` is that of ``noise_divergence``. Tensors whose noise changes nothing get the median of their kind.
    """
    quantized = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    known: dict[str, float] = {}
    for each, value in divergence.items():
        if value > 0:
            known[each.tensor.name] = known.get(each.tensor.name, 0.0) + value / RELATIVE_ERROR
    head = model.unembedding()
    lookups = divergence.get(Noisy(head, True), 0.0) / RELATIVE_ERROR
    looked_up = lookups / known[head.name] if lookups and model.is_tied else 0.0
    missed = [tensor for tensor in quantized if tensor.name not in known]
    sensitivity = {**known, **typical_sensitivities(model, known, missed)}
    return replace(found, sensitivity=sensitivity, looked_up=looked_up, notes=_notes(missed))


def _notes(missed: Sequence[Tensor]) -> tuple[str, ...]:
    if not missed:
        return ()
    shown = ", ".join(sorted({tensor.role for tensor in missed}))
    return (f"Noise in {len(missed)} tensors ({shown}) changes nothing: they get the median of their kind.",)


def noise_divergence(
    file: Path,
    noisy: Sequence[Noisy],
    tokens: Tokens,
    n_threads: int | None = None,
    records: Store | None = None,
    progress: Progress = no_progress,
) -> dict[Noisy, float]:
    """Return the mean divergence that noise of ``RELATIVE_ERROR`` in one tensor causes, in nats per token.

    Args:
        file: the model as a GGUF.
        noisy: the tensors, each measured on its own.
        tokens: ``(n_sequences, n_positions)`` ids, at most ``N_PHYSICAL_BATCH`` positions.
        n_threads: CPU threads of llama.cpp.
        records: keep what is measured, tensor by tensor.
        progress: called with (tensors done, total).

    Raises:
        VerifyError: llama.cpp cannot load the file, or its logits are not finite.
        GgmlError: llama.cpp refuses or dies.

    """
    found: dict[Noisy, float | None] = dict.fromkeys(noisy)
    if records is not None:
        found = {each: records.get(each.record) for each in noisy}
        records.tell_kept("tensors with noise", [n.record for n in noisy if found[n] is not None], len(noisy))
    left = [each for each in noisy if found[each] is None]
    n_positions = tokens.shape[1]
    n_seq = min(max(1, N_PHYSICAL_BATCH // n_positions), max(1, len(left)))
    groups = [left[start : start + n_seq] for start in range(0, len(left), n_seq)]
    readings = [(), *groups]
    adder = _NoiseAdder([group for group in readings for _ in tokens], n_seq * n_positions, n_positions)
    with (
        open_model(file) as model,
        open_context(
            model, n_ctx=n_positions, n_batch=n_seq * n_positions, n_seq=n_seq, n_threads=n_threads, observer=adder
        ) as context,
    ):
        repeated = [np.tile(sequence, (n_seq, 1)).astype(np.int32) for sequence in tokens]
        wanted = [_log_chances(_read(context, each, file)[0]) for each in repeated]
        for group in groups:
            rows = [_divergences(wanted[i], _read(context, each, file)) for i, each in enumerate(repeated)]
            for each, value in zip(group, np.mean(rows, axis=0), strict=False):
                found[each] = float(value)
                if records is not None:
                    records.put(each.record, float(value))
            progress(sum(value is not None for value in found.values()), len(noisy))
    return {each: value for each, value in found.items() if value is not None}


def _read(context: LlamaContext, tokens: NDArray[np.int32], file: Path) -> Float32:
    """Return the scored logits of sequences, ``(n_seq, n_scored, n_vocab)``."""
    context.clear()
    first = min(SCORED_FROM, tokens.shape[1] - 1)
    logits = context.decode(tokens)[:, first:]  # all are computed: every product sees every token
    if not np.isfinite(logits).all():
        raise VerifyError(f"{file}: the model's logits are not finite; its weights are damaged")
    return logits


def _log_chances(logits: Float32) -> Float32:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chances: Float32 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return chances


def _divergences(wanted: Float32, logits: Float32) -> list[float]:
    """Return the mean KL divergence of each sequence from log-probabilities ``(n_scored, n_vocab)``."""
    chances = np.exp(wanted)
    return [float((chances * (wanted - _log_chances(each))).sum(axis=-1, dtype=np.float64).mean()) for each in logits]


class _NoiseAdder:
    """An ``llama.Observer``: in reading i, adds noise to sequence k in the k-th tensor of group i."""

    def __init__(self, groups: Sequence[Sequence[Noisy]], n_tokens: int, n_positions: int) -> None:
        self._groups, self._n_tokens, self._n_positions = iter(groups), n_tokens, n_positions
        self._noisy: dict[tuple[str, bool], tuple[int, Tensor]] = {}

    def begin(self) -> None:
        """Take the next group."""
        group = next(self._groups)
        self._noisy = {(each.tensor.name, each.is_lookup): (k, each.tensor) for k, each in enumerate(group)}

    def wants(self, product: graph.Product) -> bool:
        """Return whether the weights of a product are to have noise now."""
        return (product.weight, product.is_lookup) in self._noisy

    def take(self, product: graph.Product) -> None:
        """Add the noise to the output of a product or lookup."""
        at, tensor = self._noisy[product.weight, product.is_lookup]
        output, scale = graph.output_rows(product), np.float32(math.sqrt(RELATIVE_ERROR))
        if product.is_lookup:
            own = self._rows_of(at, len(output), product)
            rows, where = np.unique(graph.looked_up_rows(product)[own], return_inverse=True)
            output[own] *= 1 + scale * _signs(tensor, 0, (len(rows), output.shape[1]))[where]
        else:
            x, matrices = graph.product_rows(product)
            own = self._rows_of(at, len(x), product)
            output[own] += scale * _noise(tensor, product.rows, x[own], None if matrices is None else matrices[own])
        graph.replace_output(product, output)

    def _rows_of(self, sequence: int, n_rows: int, product: graph.Product) -> NDArray[np.intp]:
        """Return the numbers of the rows of a sequence; in a stack that all tokens read, rows go by matrix first."""
        number = np.arange(n_rows)
        is_stack = product.ids is None and product.n_matrices > 1
        token = number % self._n_tokens if is_stack else number // (n_rows // self._n_tokens)
        return np.flatnonzero(token // self._n_positions == sequence)

    def results(self) -> Iterator[Any]:
        """Yield nothing."""
        return iter(())


def _noise(tensor: Tensor, rows: range, x: Float32, matrices: NDArray[np.intp] | None) -> Float32:
    """Return ``dW x`` for noise of relative error 1, ``(len(x), len(rows))``."""
    added = np.zeros((len(x), len(rows)), np.float32)
    owners: Mapping[int, Any] = (
        {0: slice(None)} if matrices is None else {int(m): np.flatnonzero(matrices == m) for m in np.unique(matrices)}
    )
    step = max(1, _SLAB_BYTES // (4 * tensor.n_cols))
    for matrix, own in owners.items():
        base = matrix * tensor.n_matrix_rows + rows.start
        for start in range(0, len(rows), step):
            stop = min(start + step, len(rows))
            weights = tensor.rows(slice(base + start, base + stop))
            weights *= _signs(tensor, base + start, weights.shape)
            added[own, start:stop] = x[own] @ weights.T
    return added


def _signs(tensor: Tensor, first: int, shape: tuple[int, ...]) -> Float32:
    """Return random signs, the same for the same tensor and first row."""
    digest = hashlib.sha256(f"{tensor.name} {first}".encode()).digest()[:8]
    n = math.prod(shape)
    random = np.random.default_rng(int.from_bytes(digest, "little")).bytes(-(-n // 8))
    bits = np.unpackbits(np.frombuffer(random, np.uint8), count=n)
    return (bits.astype(np.float32) * 2 - 1).reshape(shape)
