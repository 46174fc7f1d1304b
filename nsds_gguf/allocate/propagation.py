"""How quantization noise travels through the residual stream, from the weights alone.

One forward sweep of second moments: no data, no forward pass, only products with squared matrices. It gives for every
matrix a *sensitivity* (predicted divergence per unit of relative error) and the second moment of what each of its
columns reads, the *importance* that ggml's quantizers take.

The theory: divergence is about ``sum_t alpha_t e_t``, additive in small independent errors (HIGGS, arXiv 2411.17525),
with ``alpha_t = E_t / R_l``: the energy of the write that tensor ``t`` takes part in over that of the stream after it.
Second moments are per channel; channels are treated as uncorrelated, positions as independent draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import ModelError, PlanError
from ..records import Float32, Float64, Model, Progress, Tensor, no_progress

IMPORTANCES = {
    "sweep": "second moment of each column's input, swept through the model",
    "norm": "squared gain of the norm in front of the matrix",
    "none": "every column weighs the same",
}

# The two constants that are measured, not derived (docs/log.md, 2026-11-23).
STREAM_WEIGHT = 0.14  # divergence of relative noise in the stream, over that of the same noise in the output tensor
ATTENTION_SHRINK = 0.3  # energy of a value after averaging over the attended positions, over that of one value

FLOOR_OF_IMPORTANCE = 1e-4  # of the mean: a block of zero weights would make ggml divide by zero

_SLAB_WEIGHTS = 1 << 22  # 16 MiB of float32 at a time
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()  # quadrature for a standard normal


@dataclass(frozen=True)
class Propagation:
    """Result of the sweep, by tensor name.

    ``sensitivity`` is in units of the output tensor's; ``inputs`` holds ``(n_cols,)`` float64 second moments of what
    each matrix multiplies, ``gains`` the squared gain of the norm in front of it where there is one.
    """

    sensitivity: Mapping[str, float]
    inputs: Mapping[str, Float64]
    gains: Mapping[str, Float64]

    def importance(self, kind: str) -> dict[str, Float32]:
        """Return ``(n_cols,)`` float32 weights of mean 1 by tensor name; no entry where columns weigh the same.

        Raises ``PlanError`` for a kind that is not one of ``IMPORTANCES``.
        """
        if kind not in IMPORTANCES:
            raise PlanError(f"importance {kind!r} is not known; wanted one of {', '.join(IMPORTANCES)}")
        moments = {"sweep": self.inputs, "norm": self.gains, "none": {}}[kind]
        return {name: _normalized(moment) for name, moment in moments.items()}


def propagate(model: Model, progress: Progress = no_progress) -> Propagation:
    """Sweep second moments through the model.

    Args:
        model: a pre-norm decoder with RMS norms and (gated) feed-forward blocks.
        progress: called with layers done and layers in all.

    Returns:
        Sensitivity and column moments of every matrix that the theory covers.

    Raises:
        ModelError: the moments overflow or are not finite: the weights are damaged.

    """
    sweep = _Sweep(model)
    progress(0, model.hparams.n_layers)
    for index in range(model.hparams.n_layers):
        layer = model.layer(index)
        sweep.attention(layer)
        sweep.feed_forward(layer)
        progress(index + 1, model.hparams.n_layers)
    sweep.output()
    return Propagation(sweep.sensitivity, sweep.inputs, sweep.gains)


class _Sweep:
    """State of the sweep: ``stream`` is the second moment of each residual channel, ``(n_embd,)``."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.hparams = model.hparams
        self.sensitivity: dict[str, float] = {}
        self.inputs: dict[str, Float64] = {}
        self.gains: dict[str, Float64] = {}
        embedding = model.by_name["token_embd.weight"]
        self.stream = _column_moments(embedding)
        self.sensitivity[embedding.name] = STREAM_WEIGHT

    def normed(self, norm: Tensor, readers: list[Tensor]) -> Float64:
        """Return the second moment after an RMS norm, and record it for the matrices that read it."""
        gain = norm.load().astype(np.float64) ** 2
        moment: Float64 = self.stream / (self.stream.mean() + self.hparams.norm_eps) * gain
        for tensor in readers:
            self.inputs[tensor.name], self.gains[tensor.name] = moment, gain
        return moment

    def write(self, name: str, moment: Float64) -> None:
        """Add a block's write to the stream; raises ``ModelError`` when it is not finite."""
        if not np.isfinite(moment).all():
            raise ModelError(f"tensor {name}: its output has no finite second moment; the weights are damaged")
        self.stream = self.stream + moment

    def record(self, energies: Mapping[str, float]) -> None:
        """Turn energies of writes into sensitivities, relative to the stream that now holds them."""
        total = float(self.stream.sum())
        for name, energy in energies.items():
            self.sensitivity[name] = STREAM_WEIGHT * energy / total

    def attention(self, layer: Mapping[str, Tensor]) -> None:
        q, k, v, o = (layer[role] for role in ("attn_q", "attn_k", "attn_v", "attn_output"))
        x2 = self.normed(layer["attn_norm"], [q, k, v])
        value = ATTENTION_SHRINK * _matrix_moments(v, x2) + _bias_moments(layer, "attn_v", v.n_rows)
        grouped = value.reshape(self.hparams.n_kv_heads, -1)
        o2 = np.repeat(grouped, self.hparams.n_heads // self.hparams.n_kv_heads, axis=0).ravel()
        self.inputs[o.name] = o2
        written = _matrix_moments(o, o2)
        self.write(o.name, written + _bias_moments(layer, "attn_output", o.n_rows))
        energy = float(written.sum())
        of_values = energy / ATTENTION_SHRINK  # noise of a matrix is alike at all positions: no averaging shrinks it
        of_logits = energy * self.logit_variance(layer, x2)
        self.record({v.name: of_values, o.name: of_values, q.name: of_logits, k.name: of_logits})

    def logit_variance(self, layer: Mapping[str, Tensor], x2: Float64) -> float:
        """Return the second moment of the attention logits, mean over heads.

        ``tr(M_q M_k) / head_dim`` with ``M = W diag(x2) W^T + b b^T``; with norms on q and k only their gains count.
        """
        h = self.hparams
        if h.qk_norm:
            gains = layer["attn_q_norm"].load().astype(np.float64) * layer["attn_k_norm"].load()
            return float((gains**2).sum() / h.head_dim)
        total = 0.0
        per_group = h.n_heads // h.n_kv_heads
        for group in range(h.n_kv_heads):
            key_moment = self.head_moment(layer, "attn_k", group, x2)
            for head in range(group * per_group, (group + 1) * per_group):
                total += float((self.head_moment(layer, "attn_q", head, x2) * key_moment).sum())
        return total / (h.n_heads * h.head_dim)

    def head_moment(self, layer: Mapping[str, Tensor], role: str, head: int, x2: Float64) -> Float64:
        """Return ``W diag(x2) W^T + b b^T`` of one head, ``(head_dim, head_dim)``."""
        start, stop = head * self.hparams.head_dim, (head + 1) * self.hparams.head_dim
        rows = layer[role].read_rows(start, stop) * np.sqrt(x2).astype(np.float32)
        moment: Float64 = (rows @ rows.T).astype(np.float64)
        bias = layer.get(f"{role}.bias")
        if bias is not None:
            values = bias.load()[start:stop].astype(np.float64)
            moment = moment + np.outer(values, values)
        return moment

    def feed_forward(self, layer: Mapping[str, Tensor]) -> None:
        gate, up, down = layer["ffn_gate"], layer["ffn_up"], layer["ffn_down"]
        x2 = self.normed(layer["ffn_norm"], [gate, up])
        gate2, up2, both = _gated_moments(gate, up, x2)
        gate2 = gate2 + _bias_moments(layer, "ffn_gate", gate.n_rows)
        up2 = up2 + _bias_moments(layer, "ffn_up", up.n_rows)
        h2, gate_noise2 = gated_unit_moments(gate2, up2, both)
        self.inputs[down.name] = h2
        written = _matrix_moments(down, h2)
        self.write(down.name, written + _bias_moments(layer, "ffn_down", down.n_rows))
        energy, gate_energy = float(written.sum()), float(_matrix_moments(down, gate_noise2).sum())
        self.record({down.name: energy, up.name: energy, gate.name: gate_energy})

    def output(self) -> None:
        """Record the output tensor, or add its part to the embedding that doubles as it."""
        tensor = self.model.unembedding()
        self.normed(self.model.by_name["output_norm.weight"], [tensor])
        self.sensitivity[tensor.name] = 1.0 + (STREAM_WEIGHT if self.model.is_tied else 0.0)


def gated_unit_moments(gate2: Float64, up2: Float64, both: Float64) -> tuple[Float64, Float64]:
    """Return ``E[(silu(g) u)^2]`` and ``E[(silu'(g) sigma_g u)^2]`` of jointly Gaussian g and u.

    Args:
        gate2: ``(n_ff,)`` variance of g.
        up2: ``(n_ff,)`` variance of u.
        both: ``(n_ff,)`` covariance of g and u.

    Gauss-Hermite quadrature over ``g = sigma_g z``; given z, ``E[u^2] = sigma_u^2 (1 - rho^2 + rho^2 z^2)``.

    """
    sigma = np.sqrt(gate2)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho2 = np.where(gate2 * up2 > 0, both**2 / (gate2 * up2), 0.0)
    rho2 = np.clip(rho2, 0.0, 1.0)
    unit = np.zeros_like(gate2)
    noise = np.zeros_like(gate2)
    for z, weight in zip(_NODES, _WEIGHTS, strict=True):
        up_given = up2 * (1 - rho2 + rho2 * z * z)
        unit += weight * _silu(sigma * z) ** 2 * up_given
        noise += weight * (_silu_slope(sigma * z) * sigma) ** 2 * up_given
    return unit, noise


def _silu(x: Float64) -> Float64:
    return x * _sigmoid(x)


def _silu_slope(x: Float64) -> Float64:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def _sigmoid(x: Float64) -> Float64:
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow at either end


def _slabs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, _SLAB_WEIGHTS // tensor.n_cols)
    for start in range(0, tensor.n_rows, step):
        yield start, min(start + step, tensor.n_rows)


def _matrix_moments(tensor: Tensor, x2: Float64) -> Float64:
    """Return ``(W ** 2) @ x2``, ``(n_rows,)``."""
    out = np.empty(tensor.n_rows)
    narrow = x2.astype(np.float32)
    for start, stop in _slabs(tensor):
        rows = tensor.read_rows(start, stop)
        out[start:stop] = np.square(rows, out=rows) @ narrow
    return out


def _gated_moments(gate: Tensor, up: Tensor, x2: Float64) -> tuple[Float64, Float64, Float64]:
    """Return second moments of gate and up and their covariance, each ``(n_ff,)``."""
    out = np.empty((3, gate.n_rows))
    narrow = x2.astype(np.float32)
    for start, stop in _slabs(gate):
        g, u = gate.read_rows(start, stop), up.read_rows(start, stop)
        out[2, start:stop] = (g * u) @ narrow
        out[0, start:stop] = np.square(g, out=g) @ narrow
        out[1, start:stop] = np.square(u, out=u) @ narrow
    return out[0], out[1], out[2]


def _column_moments(tensor: Tensor) -> Float64:
    """Return the mean of the squared rows, ``(n_cols,)``."""
    total = np.zeros(tensor.n_cols)
    for start, stop in _slabs(tensor):
        rows = tensor.read_rows(start, stop)
        total += np.square(rows, out=rows).sum(axis=0, dtype=np.float64)
    return total / tensor.n_rows


def _bias_moments(layer: Mapping[str, Tensor], role: str, n_rows: int) -> Float64:
    bias = layer.get(f"{role}.bias")
    return np.zeros(n_rows) if bias is None else bias.load().astype(np.float64) ** 2


def _normalized(moment: Float64) -> Float32:
    mean = float(moment.mean())
    if mean <= 0:
        return np.ones(moment.shape, dtype=np.float32)
    weights: Float32 = np.maximum(moment / mean, FLOOR_OF_IMPORTANCE).astype(np.float32)
    return weights
