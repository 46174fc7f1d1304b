"""Sensitivities and column moments of a model: by the Fisher pass, else by moment propagation.

``fisher`` has no fitted constants, but needs every operation of a model. If ``decoder`` does not support one (latent
attention, recurrence, ...), ``moment_propagation`` propagates moments through the blocks that it supports.
"""

from __future__ import annotations

from dataclasses import replace

from ..calibration.norm_gains import squared_gains
from ..compute.backend import Tokens
from ..compute.decoder import what_is_missing
from ..compute.walk import WalkOptions, walk
from ..llamacpp.rules import kept_reason
from ..records import Model, Progress, no_progress
from ..system.workers import Threads, Workers
from .fisher import Fisher, steps_back, walk_back
from .moment_propagation import propagate, typical_sensitivities
from .result import Sensitivities


def sensitivities(
    model: Model,
    tokens: Tokens,
    options: WalkOptions,
    progress: Progress = no_progress,
    workers: Workers | None = None,
) -> Sensitivities:
    """Return the sensitivity of every matrix that may be quantized and the moments of its columns.

    One forward and one backward pass over the layers; in memory: one layer, its activations and its Hessians.

    Args:
        model: any model; if ``Decoder`` does not support it, ``tokens`` and ``options`` are not used.
        tokens: ``(n_sequences, n_positions)`` ids.
        options: of the walk; sensitivities and ``inputs`` come from the first batch, ``moments`` from all.
        progress: called with (steps done, total).
        workers: compute the local parts of moment propagation; default: the threads of ``options``.

    Raises:
        ModelError: activations or moments are not finite: the weights are damaged.
        OutputError: too little memory or disk space.

    """
    missing = what_is_missing(model)
    if missing:
        propagated = propagate(model, progress, workers or Threads(options.n_threads))
        note = f"Sensitivities come from moment propagation: the Fisher pass does not support {missing}."
        return replace(propagated, notes=(note, *propagated.notes))
    n_back = steps_back(model)
    with walk(model, tokens, options, lambda done, total: progress(done, total + n_back)) as forward:
        n_forward = (model.hparams.n_layers + 1) * -(-len(tokens) // options.n_first)
        found = walk_back(forward, 0, lambda done, _: progress(n_forward + done, n_forward + n_back))
        moments = {name: sums.moments(first_positions=True) for name, sums in forward.inputs.items()}
        return replace(_of_all_tensors(model, found), moments=moments, column_squares=forward.column_squares)


def _of_all_tensors(model: Model, found: Fisher) -> Sensitivities:
    """Return the result, with typical sensitivities where the pass has none."""
    quantized = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    known = {t.name: found.sensitivity[t.name] for t in quantized if t.name in found.sensitivity}
    missed = [tensor for tensor in quantized if tensor.name not in known]
    sensitivity = {**known, **typical_sensitivities(model, known, missed)}
    notes: tuple[str, ...] = ()
    if found.n_missed:
        notes = (
            f"No token is routed to {found.n_missed} of {found.n_experts} experts: their column weights are the mean "
            "of the other experts in the layer.",
        )
    return Sensitivities(
        sensitivity,
        found.inputs,
        squared_gains(model),
        notes,
        found.looked_up,
        of_rows=found.of_rows,
        all_inputs=found.all_inputs,
    )
