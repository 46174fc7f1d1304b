"""Squared gains of the norms before matrices: a calibration without tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..compute.layers import view_layer
from ..compute.norm_placement import BlockNorms, norm_placement
from ..records import Float64, Model
from .random_tokens import RandomTokens


@dataclass(frozen=True)
class NormGains(RandomTokens):
    """A ``Calibration``: the squared gain of the norm before a matrix, if it has one."""

    def column_moments(self, name: str) -> Float64 | None:
        """Return the squared gains, ``(n_cols,)``."""
        return self.evidence.gains.get(name)


def squared_gains(model: Model) -> dict[str, Float64]:
    """Return the squared gain of the norm before every matrix that has one, ``(n_cols,)`` by stored name."""
    h, found = model.hparams, dict[str, Float64]()

    def note(norms: BlockNorms, *names: str) -> None:
        if norms.before is not None:
            found.update(dict.fromkeys(names, norms.before.gains(h.n_embd) ** 2))

    for index in range(h.n_layers):
        view = view_layer(model, index)
        placement, a = norm_placement(view.tensors, h), view.attention
        if a is not None:
            note(placement.attention, a.q.name, a.k.name, a.v.name)
        for block in view.feed_forward:
            note(placement.feed_forward, *(part.name for part in (block.gate, block.up) if part is not None))
    gain = model.by_name.get("output_norm.weight")
    if gain is not None:
        found[model.unembedding().name] = gain.load().ravel().astype("f8") ** 2
    return found
