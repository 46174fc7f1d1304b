"""The Fisher pass: how much divergence noise in a tensor causes, from the Fisher information of its weights.

For small changes ``dW`` of the weights the mean KL divergence is ``1/2 sum F_ij dW_ij^2`` when changes are independent,
with ``F`` the diagonal of the Fisher information (Amari, Natural gradient works efficiently in learning, 1998): the
mean over tokens of ``(d log p(y) / dW_ij)^2``, ``y`` sampled from the model's own prediction. Noise of relative error
``e`` has ``dW_ij^2 = e W_ij^2``: the *sensitivity* of a tensor is ``1/2 sum F_ij W_ij^2``, in nats per unit of relative
error, without fitted constants.

No data is needed: the result depends little on the tokens (docs/log.md, 2026-11-25). One forward and one backward pass
over the layers; the input stream of every layer is kept in a file, everything else is recomputed.

One backward pass covers all tokens of a sequence: their losses get random signs, so that in the square of the sum the
products of different tokens cancel on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..calibration.column_weights import column_moments, has_own_inputs
from ..calibration.hessians import mixed_roles
from ..compute.backend import Tokens
from ..compute.pass_records import Backward, get_backward, put_backward
from ..compute.walk import Walk, WalkOptions, walk
from ..errors import ModelError
from ..records import Float32, Float64, Model, Progress, no_progress
from ..system.store import Store

SCORED_FROM = 0.5  # share of a sequence; like perplexity, skip tokens with little context
_BACK = 3  # time of a layer backward, in layers forward


@dataclass(frozen=True)
class Fisher:
    """Result of a Fisher pass, by stored tensor name.

    Attributes:
        sensitivity: nats of divergence per unit of relative error.
        of_rows: the same of every row of the matrices of layers, ``(n_rows,)`` float32; it adds up to the sensitivity.
        inputs: ``(n_cols,)`` float64, mean square of the input of each column, first positions left out; for a tied
            embedding, averaged over both roles. ``(n_experts, n_cols)`` for experts with separate inputs: the mean over
            the others for experts that no token is routed to.
        all_inputs: the same with first positions, where trained models have their largest inputs.
        looked_up: share of the sensitivity of a tied embedding that is due to lookups, not to the output.
        n_experts: number of routed experts in all layers.
        n_missed: number of them that no token is routed to.
    """

    sensitivity: Mapping[str, float]
    of_rows: Mapping[str, Float32]
    inputs: Mapping[str, Float64]
    all_inputs: Mapping[str, Float64]
    looked_up: float = 0.0
    n_experts: int = 0
    n_missed: int = 0


def fisher(
    model: Model,
    tokens: Tokens,
    n_threads: int,
    progress: Progress = no_progress,
    seed: int = 0,
    folder: Path | None = None,
) -> Fisher:
    """Return the sensitivity of every matrix and the moments of its columns: a forward and a backward pass.

    Args:
        model: a model that ``Decoder`` supports (``decoder.what_is_missing``).
        tokens: ``(n_sequences, n_positions)`` ids.
        n_threads: CPU threads; they do not change the result.
        progress: called with (steps done, total), over both passes.
        seed: of the sampled predictions.
        folder: of the temporary file; default: the system's temporary folder.

    Raises:
        ModelError: activations are not finite: the weights are damaged.
        OutputError: too little memory, or no room on the disk for the temporary file.

    """
    options = WalkOptions(len(tokens), n_threads=n_threads, folder=folder)
    n_back = steps_back(model)
    with walk(model, tokens, options, lambda done, total: progress(done, total + n_back)) as forward:
        n_forward = model.hparams.n_layers + 1
        return walk_back(forward, seed, lambda done, total: progress(n_forward + done, n_forward + total))


def steps_back(model: Model) -> int:
    """Return the number of progress steps of ``walk_back``."""
    return _BACK * model.hparams.n_layers + 1


def walk_back(forward: Walk, seed: int = 0, progress: Progress = no_progress) -> Fisher:
    """Run the backward pass on the first batch of a walk, or what its records leave; progress counts ``steps_back``."""
    model, backend, n_layers, records = forward.model, forward.backend, forward.model.hparams.n_layers, forward.records
    position = np.arange(forward.tokens.size) % forward.tokens.shape[1]
    scored = np.flatnonzero(position >= int(forward.tokens.shape[1] * SCORED_FROM))
    state = None if records is None else get_backward(records, seed, n_layers)
    if state is None:
        state = Backward(n_layers, *backend.output().backward(forward.streams.read(n_layers), scored, seed), {})
        _keep(records, seed, state, {})
    progress(1 + _BACK * (n_layers - state.index), steps_back(model))
    for index in reversed(range(state.index)):
        grad, found = backend.layer(index).backward(forward.streams.read(index), state.grad)
        state = Backward(index, grad, state.of_output, {**state.squared_norms, **found})
        _keep(records, seed, state, found)
        progress(1 + _BACK * (n_layers - index), steps_back(model))
    of_lookup = backend.embed_backward(forward.tokens, state.grad)
    of_rows = state.squared_norms.values()
    if not np.isfinite([*(squared.sum() for squared in of_rows), state.of_output, of_lookup]).all():
        raise ModelError("the derivatives of the logits are not finite; the weights are damaged")
    return _result(forward, state.squared_norms, state.of_output, of_lookup, 0.5 / len(scored))


def _keep(records: Store | None, seed: int, state: Backward, found: Mapping[str, Float32]) -> None:
    if records is not None:
        put_backward(records, seed, state, found)


def _result(
    forward: Walk, squared_norms: Mapping[str, Float32], of_output: float, of_lookup: float, per_token: float
) -> Fisher:
    """Return the result, with the two roles of a tied embedding combined."""
    model, looked_up = forward.model, 0.0
    inputs, all_inputs = (column_moments(forward.first_inputs, first) for first in (False, True))
    head = model.unembedding().name
    found = {name: float(squared.sum(dtype=np.float64)) for name, squared in squared_norms.items()}
    if model.is_tied:
        found[head] = of_lookup + of_output
        looked_up = of_lookup / found[head] if found[head] else 0.0
        for each in (inputs, all_inputs):
            each[head] = mixed_roles(each[head], looked_up)
    else:
        found[head], found["token_embd.weight"] = of_output, of_lookup
    own = [sums.counts[1] for name, sums in forward.first_inputs.items() if sums.is_stack and has_own_inputs(name)]
    n_experts, n_missed = (sum(counts.size for counts in own), sum(int((counts == 0).sum()) for counts in own))
    sensitivity = {name: per_token * squared for name, squared in found.items()}
    of_rows = {name: np.float32(per_token) * squared for name, squared in squared_norms.items()}
    return Fisher(sensitivity, of_rows, inputs, all_inputs, looked_up, n_experts, n_missed)
