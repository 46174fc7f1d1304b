"""How quantization noise travels through the residual stream, from the weights alone.

One forward propagation of second moments: no data, no forward pass, only products with squared matrices. For every
matrix, it yields a *sensitivity* (predicted divergence per unit of relative error) and the second moment of the input
of each column, from which the column weights for ggml's quantizers are computed.

The theory: divergence is about ``sum_t alpha_t e_t``, additive in small independent errors (HIGGS, arXiv 2411.17525),
with ``alpha_t = E_t / R_l``: the squared norm of the residual update that depends on tensor ``t`` over that of the
stream after it. Second moments are per channel; channels are treated as uncorrelated, positions as independent samples.

What differs between architectures comes from data: ``norm_placement`` for the norms, ``layers`` for the blocks,
``Hparams`` for the scales. Layer norms remove the channel mean, so a stream that only layer norms read is propagated
without it. Ignored: softcapping, sinks, windows, rope; they bound or shift attention, not the values.

A block of unknown structure (recurrence, linear attention, ...) adds nothing to the stream; its tensors get the typical
sensitivity of their kind, and a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..compute.activation_functions import ACTIVATIONS
from ..compute.layers import Layer, view_layer
from ..compute.norm_placement import (
    BlockNorms,
    has_plain_experts,
    is_plain_stream,
    norm_placement,
    reads_as_attention,
)
from ..compute.norms import Norm
from ..errors import ModelError
from ..llamacpp.rules import kept_reason
from ..records import Float64, Model, Progress, Tensor, no_progress
from ..system.workers import Threads, Workers
from .blocks import (
    ResidualUpdate,
    attention_update,
    feed_forward_update,
    has_known_gate,
    has_known_qk_norms,
)
from .latent import latent_update, view_latent
from .moments import Signal, normed, row_moments
from .result import Sensitivities

# Divergence of relative noise in the stream over that of the same noise in the output tensor; measured, not derived
# (docs/log.md, 2026-11-23).
STREAM_WEIGHT = 0.14

# Architectures whose gate on the output of attention is not a sigmoid, or that mix in linear attention.
_OTHER_ATTENTION = ("laguna", "minimax-01")

MAX_SHOWN_ROLES = 4  # in the note on tensors that propagation does not reach


def propagate(model: Model, progress: Progress = no_progress, workers: Workers | None = None) -> Sensitivities:
    """Propagate second moments through the model.

    Args:
        model: any model; the result degrades block by block where the theory does not apply.
        progress: called with (layers done, total).
        workers: compute the feed-forward blocks and experts of a layer; default: one thread.

    Returns:
        Sensitivities of all matrices that may be quantized, and column moments where the theory applies.

    Raises:
        ModelError: the moments overflow or are not finite: the weights are damaged.

    """
    propagation = _Propagation(model, workers or Threads())
    n_layers = model.hparams.n_layers
    progress(0, n_layers)
    for index in range(n_layers):
        propagation.layer(view_layer(model, index))
        progress(index + 1, n_layers)
    propagation.output()
    known = propagation.sensitivity
    missed = [t for t in model.tensors if t.name not in known and not kept_reason(t, model.architecture)]
    typical = typical_sensitivities(model, known, missed)
    return Sensitivities({**known, **typical}, propagation.inputs, propagation.gains, _notes(missed))


class _Propagation:
    """State of the propagation: ``stream`` holds the moments of the residual channels, ``(n_embd,)``.

    It is ``None`` without an embedding to start from; then nothing is reached. Channel means are propagated where layer
    norms read the stream, which is where models have biases.
    """

    def __init__(self, model: Model, workers: Workers) -> None:
        self.model, self.workers = model, workers
        self.hparams = model.hparams
        self.centred = model.hparams.norm == "layer"
        self.sensitivity: dict[str, float] = {}
        self.inputs: dict[str, Float64] = {}
        self.gains: dict[str, Float64] = {}
        self.stream = self.embed()

    def embed(self) -> Signal | None:
        """Return the input stream of the first layer."""
        embedding = self.model.by_name.get("token_embd.weight")
        if embedding is None or embedding.n_cols != self.hparams.n_embd:
            return None
        self.sensitivity[embedding.name] = STREAM_WEIGHT
        scale = self.hparams.embedding_scale
        stream = row_moments(embedding, self.centred).scaled(scale**2, scale)
        for name in ("position_embd.weight", "token_types.weight"):
            table = self.model.by_name.get(name)
            if table is not None and table.n_cols == embedding.n_cols:
                stream = stream.plus(row_moments(table, self.centred))
        norm = None if self.output_norm_role() == "token_embd_norm" else self.norm("token_embd_norm")
        return stream if norm is None else normed(norm, stream, self.hparams.norm_eps)

    def norm(self, role: str) -> Norm | None:
        """Return a norm outside the layers."""
        gain = self.model.by_name.get(f"{role}.weight")
        return None if gain is None else Norm(gain, self.model.by_name.get(f"{role}.bias"))

    def output_norm_role(self) -> str:
        """Return the role of the norm before the output; lfm2 files use another name."""
        is_odd = self.model.architecture.startswith("lfm2") and "output_norm.weight" not in self.model.by_name
        return "token_embd_norm" if is_odd else "output_norm"

    def layer(self, view: Layer) -> None:
        """Propagate the stream through one layer if its structure is known."""
        if self.stream is None or not is_plain_stream(view.tensors):
            return
        placement, entry = norm_placement(view.tensors, self.hparams), self.stream
        updates = self.attention(view, placement.attention, entry)
        if placement.parallel:
            updates += self.feed_forward(view, placement.feed_forward, entry)
        else:
            entry = self.add_updates(entry, updates, placement.attention)
            updates = self.feed_forward(view, placement.feed_forward, entry)
        stream = self.add_updates(entry, updates, placement.feed_forward)
        scale = view.tensors.get("layer_output_scale")
        factor = 1.0 if scale is None else float(scale.load().ravel()[0])
        self.stream = stream.scaled(factor**2, factor)

    def attention(self, view: Layer, norms: BlockNorms, stream: Signal) -> list[ResidualUpdate]:
        """Return the update of plain or latent attention; an empty list for any other attention."""
        a, x = view.attention, self.block_input(norms, stream)
        self.record_consumers([t.name for t in view.rest if reads_as_attention(t)], norms, x)
        latent = view_latent(view.tensors, self.hparams)
        if latent is not None:
            return [self.finished(latent_update(latent, view.tensors, x, self.hparams), norms, x)]
        known = a is not None and has_known_gate(a, view.tensors) and has_known_qk_norms(a, view.tensors)
        if a is None or not known or self.model.architecture in _OTHER_ATTENTION:
            return []
        return [self.finished(attention_update(a, view.tensors, x, self.hparams), norms, x)]

    def feed_forward(self, view: Layer, norms: BlockNorms, stream: Signal) -> list[ResidualUpdate]:
        """Return the update of the feed-forward blocks; an empty list if their structure is unknown."""
        if not view.feed_forward or self.hparams.activation not in ACTIVATIONS or not has_plain_experts(view.tensors):
            return []
        x = self.block_input(norms, stream)
        update = feed_forward_update(view.feed_forward, view.tensors, x, self.hparams, self.workers)
        return [self.finished(update, norms, x)]

    def block_input(self, norms: BlockNorms, stream: Signal) -> Signal:
        """Return the input of a block: the stream, through its norm if it has one."""
        return stream if norms.before is None else normed(norms.before, stream, self.hparams.norm_eps)

    def finished(self, update: ResidualUpdate, norms: BlockNorms, x: Signal) -> ResidualUpdate:
        """Return a residual update, normed and scaled; record the inputs of its matrices."""
        self.record_consumers(update.consumers, norms, x)
        self.inputs.update(update.inputs)
        if not np.isfinite(update.signal.second).all():
            raise ModelError(f"tensor {update.name}: its output has no finite second moment; the weights are damaged")
        if norms.after is not None:
            update = update.normed(norms.after, self.hparams.norm_eps)
        return update.scaled(self.hparams.residual_scale**2, self.hparams.residual_scale)

    def record_consumers(self, names: Iterable[str], norms: BlockNorms, x: Signal) -> None:
        """Record the input of matrices after a norm, and the gain of the norm."""
        for name in names:
            self.inputs[name] = x.second
            if norms.before is not None:
                self.gains[name] = norms.before.gains(len(x.second)) ** 2

    def add_updates(self, stream: Signal, updates: Sequence[ResidualUpdate], norms: BlockNorms) -> Signal:
        """Add updates to the stream; turn their noise, relative to the resulting stream, into sensitivities."""
        for update in updates:
            stream = stream.plus(update.signal if self.centred else Signal(update.signal.second))
        total = float(stream.second.sum())
        for update in updates:
            for name, noise in update.noise.items():
                self.sensitivity[name] = STREAM_WEIGHT * float(noise.sum()) / total
        return stream if norms.on_stream is None else normed(norms.on_stream, stream, self.hparams.norm_eps)

    def output(self) -> None:
        """Record the output tensor, or add its part to a tied embedding."""
        if self.stream is None:
            return
        tensor, norm = self.model.unembedding(), self.norm(self.output_norm_role())
        if norm is None and self.hparams.norm == "layer":
            norm = Norm()
        norms = BlockNorms(norm)
        self.record_consumers([tensor.name], norms, self.block_input(norms, self.stream))
        self.sensitivity[tensor.name] = 1.0 + (STREAM_WEIGHT if self.model.is_tied else 0.0)


# --- tensors that propagation does not reach --------------------------------------------------------------------------


def typical_sensitivities(model: Model, known: Mapping[str, float], missed: Sequence[Tensor]) -> dict[str, float]:
    """Return sensitivities for tensors that propagation does not reach, by name.

    The median over known tensors of the same kind: feed-forward, or mixing of positions. Without any, and outside the
    layers: the share of one update in a stream of ``2 n_layers`` equal updates.
    """
    default = STREAM_WEIGHT / (2 * max(model.hparams.n_layers, 1))
    by_kind: dict[str, list[float]] = {}
    for tensor in model.tensors:
        if tensor.name in known and tensor.layer is not None:
            by_kind.setdefault(_kind(tensor), []).append(known[tensor.name])
    medians = {kind: float(np.median(values)) for kind, values in by_kind.items()}
    return {t.name: default if t.layer is None else medians.get(_kind(t), default) for t in missed}


def _kind(tensor: Tensor) -> str:
    return "feed-forward" if tensor.role.startswith(("ffn_", "channel_mix_")) else "mixing"


def _notes(missed: Sequence[Tensor]) -> tuple[str, ...]:
    if not missed:
        return ()
    roles = sorted({tensor.role for tensor in missed})
    shown = ", ".join(roles[:MAX_SHOWN_ROLES]) + (", ..." if len(roles) > MAX_SHOWN_ROLES else "")
    return (
        f"{len(missed)} tensors ({shown}) belong to blocks that moment propagation does not follow: "
        "they get the median sensitivity of the others of their kind.",
    )
