"""What noise in each tensor does, and what its columns multiply: by a pass over tokens where a model can be followed.

``fisher`` is the theory without constants; it needs every operation of a model. Where one is not known to ``decoder``
(latent attention, recurrence, ...), ``propagation`` sweeps moments through the blocks that it knows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..compute.decoder import what_is_missing
from ..compute.layers import view_layer
from ..compute.norm_placement import BlockWiring, read_wiring
from ..llamacpp.rules import kept_reason
from ..records import Float64, Model, Progress, no_progress
from .fisher import Tokens, draw_tokens, fisher, n_sequences_for
from .moment_propagation import Propagation, propagate, typical_sensitivities


def sensitivities(
    model: Model,
    n_threads: int,
    progress: Progress = no_progress,
    tokens: Tokens | None = None,
    folder: Path | None = None,
) -> Propagation:
    """Return the sensitivity of every matrix that may be quantized and the moments of its columns.

    Args:
        model: any model.
        n_threads: threads; they do not change the result.
        progress: called with layers done and layers in all.
        tokens: ``(n_sequences, n_positions)`` ids to read; ``None`` for ids drawn at random.
        folder: where a temporary file goes; ``None`` for the system's folder of such.

    Raises:
        ModelError: activations or moments are not finite: the weights are damaged.

    """
    missing = what_is_missing(model)
    if missing:
        swept = propagate(model, progress)
        note = f"Sensitivities come from the moment sweep: the pass over tokens cannot follow {missing}."
        return replace(swept, notes=(note, *swept.notes))
    tokens = draw_tokens(model, n_sequences_for(model)) if tokens is None else tokens
    found = fisher(model, tokens, n_threads, progress, folder=folder)
    open_to_choice = [tensor for tensor in model.tensors if not kept_reason(tensor, model.architecture)]
    known = {t.name: found.sensitivity[t.name] for t in open_to_choice if t.name in found.sensitivity}
    missed = [tensor for tensor in open_to_choice if tensor.name not in known]
    sensitivity = {**known, **typical_sensitivities(model, known, missed)}
    notes: tuple[str, ...] = ()
    if found.n_missed:
        notes = (
            f"None of the tokens read visits {found.n_missed} of {found.n_experts} experts: their columns weigh as "
            "those of the others of their layer do on average.",
        )
    return Propagation(sensitivity, found.inputs, squared_gains(model), notes, found.looked_up)


def squared_gains(model: Model) -> dict[str, Float64]:
    """Return the squared gain of the norm in front of every matrix that has one, ``(n_cols,)`` by stored name."""
    h, found = model.hparams, dict[str, Float64]()

    def note(wiring: BlockWiring, *names: str) -> None:
        if wiring.before is not None:
            found.update(dict.fromkeys(names, wiring.before.gains(h.n_embd) ** 2))

    for index in range(h.n_layers):
        view = view_layer(model, index)
        wiring, a = read_wiring(view.tensors, h), view.attention
        if a is not None:
            note(wiring.attention, a.q.name, a.k.name, a.v.name)
        for block in view.feed_forward:
            note(wiring.feed_forward, *(part.name for part in (block.gate, block.up) if part is not None))
    gain = model.by_name.get("output_norm.weight")
    if gain is not None:
        found[model.unembedding().name] = gain.load().ravel().astype("f8") ** 2
    return found
