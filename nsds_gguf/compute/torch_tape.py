"""The operations of a ``Tape`` on PyTorch tensors, differentiated by autograd. Importing this module imports torch.

``Node.value`` is a float32 tensor on the device. Matrices are not leaves of the graph: they are read slab by slab, and
their squared gradient norms are summed while the derivative passes through them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ..records import Float32, Tensor
from .layers import Linear
from .norms import Norm
from .tape import _LEAST_SUM, Ids, Node, Tape
from .weights import slabs

# By the name in ``Hparams.activation``; the same functions as ``activation_functions.ACTIVATIONS``.
TORCH_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": torch.nn.functional.silu,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "swiglu_oai": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass
class TorchTape(Tape):
    """A ``Tape`` on a device; ``weights`` returns rows on the same device.

    Attributes:
        device: name in PyTorch.

    """

    device: str = "cpu"

    def node(self, value: Float32) -> Node:
        """See ``Tape``."""
        return Node(self.on_device(value))

    def input(self, value: Float32) -> Node:
        """Return a node whose derivative ``backward_from`` computes."""
        return Node(self.on_device(value).requires_grad_())

    def on_device(self, values: Any) -> Any:
        """Return an array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def vector(self, tensor: Tensor) -> Any:
        """Return the weights of a tensor as a vector on the device."""
        return self.on_device(tensor.load().ravel())

    def backward_from(self, out: Node, grad: Any) -> None:
        """Differentiate from the derivative with respect to ``out``, ``(n, channels)`` on the device."""
        torch.autograd.backward(out.value, grad)

    def linear(self, linear: Linear, x: Node) -> Node:
        """See ``Tape``."""
        if self.on_input is not None:
            self.on_input(linear.name, x.value)
        out = _Product.apply(x.value, linear.weight, self)
        return Node(out if linear.bias is None else out + self.vector(linear.bias))

    def through(self, weight: Tensor, grad: Any, x: Any) -> Any:
        """See ``Tape``."""
        edges, total, norms = self.edges(len(x)), torch.zeros_like(x), []
        for slab in slabs(weight):
            rows, part = self.weights.rows(weight, slab), grad[:, slice(*slab)]
            total += part @ rows
            norms.append(squared_gradient_norms(rows, part, x, edges))
        self.add_norms(weight, torch.cat(norms))
        return total

    def norm(self, norm: Norm, x: Node, kind: str, eps: float) -> Node:
        """See ``Tape``."""
        out = _normed(x.value, kind, eps) * self.on_device(norm.gains(x.value.shape[1]).astype(np.float32))
        return Node(out if norm.bias is None else out + self.vector(norm.bias))

    def heads_norm(self, gain: Tensor, x: Node, n_heads: int, kind: str, eps: float) -> Node:
        """See ``Tape``."""
        n_channels = x.value.shape[1]
        width = n_channels // n_heads if gain.n_weights != n_channels else n_channels
        if gain.n_weights == n_channels and len(gain.shape) > 1:
            width = gain.n_cols  # one gain per head
        gains = np.resize(gain.load().ravel(), n_channels)
        unit = _normed(x.value.reshape(len(x.value), -1, width), kind, eps)
        return Node(unit.reshape(x.value.shape) * self.on_device(gains))

    def rotate(self, x: Node, cos: Float32, sin: Float32, n_heads: int, is_neox: bool) -> Node:
        """See ``Tape``."""
        (n_positions, n_pairs), shape = cos.shape, x.value.shape
        shaped = tensor_of(x).reshape(-1, n_positions, n_heads, shape[1] // n_heads)
        turned, rest = shaped[..., : 2 * n_pairs], shaped[..., 2 * n_pairs :]
        pairs = turned.unflatten(-1, (2, n_pairs) if is_neox else (n_pairs, 2))
        a, b = pairs.unbind(-2 if is_neox else -1)
        c, s = (self.on_device(part)[:, None] for part in (cos, sin))
        turned = torch.stack([a * c - b * s, a * s + b * c], dim=-2 if is_neox else -1).flatten(-2)
        return Node(torch.cat([turned, rest], dim=-1).reshape(shape))

    def attention(self, q: Node, k: Node, v: Node, n_heads: int, n_kv_heads: int, scale: float, cap: float) -> Node:
        """See ``Tape``; sequences one at a time, recomputed backward."""
        t, group = self.n_positions, n_heads // n_kv_heads
        hidden = torch.ones(t, t, dtype=torch.bool, device=self.device).triu(1)

        def attend(queries: Any, keys: Any, values: Any) -> Any:
            heads, shared, read = (
                part.reshape(t, n, -1).transpose(0, 1)
                for part, n in ((queries, n_heads), (keys, n_kv_heads), (values, n_kv_heads))
            )
            logits = heads @ shared.repeat_interleave(group, 0).mT * scale
            logits = cap * torch.tanh(logits / cap) if cap else logits
            weights = torch.softmax(logits.masked_fill(hidden, -math.inf), -1)
            return (weights @ read.repeat_interleave(group, 0)).transpose(0, 1).reshape(t, -1)

        sequences = zip(*(tensor_of(node).split(t) for node in (q, k, v)), strict=True)
        out = [checkpoint(attend, *parts, use_reentrant=False, preserve_rng_state=False) for parts in sequences]
        return Node(torch.cat(out))

    def units(self, gate: Node | None, up: Node, activation: str, offset: float = 0.0) -> Node:
        """See ``Tape``."""
        function = TORCH_ACTIVATIONS[activation]
        return Node(function(up.value) if gate is None else function(gate.value) * (up.value + offset))

    def scores(self, logits: Node, kind: str) -> Node:
        """See ``Tape``."""
        return Node(torch.softmax(logits.value, 1) if kind == "softmax" else torch.sigmoid(logits.value))

    def chosen(self, scores: Node, bias: Tensor | None, n_chosen: int) -> Ids:
        """See ``Tape``; the ids are a numpy array."""
        ranked = tensor_of(scores).detach()
        ranked = ranked if bias is None else ranked + self.vector(bias)
        ids: Ids = torch.sort(-ranked, dim=1, stable=True)[1][:, :n_chosen].cpu().numpy()
        return ids

    def chosen_weights(self, scores: Node, chosen: Ids, normed: bool, scale: float) -> Node:
        """See ``Tape``."""
        picked = tensor_of(scores).gather(1, self.on_device(chosen))
        if normed:
            picked = picked / picked.sum(1, keepdim=True).clamp(min=float(_LEAST_SUM))
        return Node(picked * scale)

    def experts(self, x: Node, chosen: Ids, weights: Node, write: Callable[[Tape, int, Node], Node]) -> Node:
        """See ``Tape``; keeps the values of the experts for the way back."""
        out = torch.zeros_like(x.value)
        for expert in np.unique(chosen):
            tokens, places = np.nonzero(chosen == expert)
            inner, at = replace(self, on_input=None, tokens=tokens), self.on_device(tokens)
            written = write(inner, int(expert), Node(x.value[at]))
            out.index_add_(0, at, written.value * weights.value[at, self.on_device(places), None])
        return Node(out)

    def times(self, x: Node, factor: Node) -> Node:
        """See ``Tape``."""
        return Node(x.value * factor.value)

    def add(self, first: Node, second: Node, scale: float = 1.0) -> Node:
        """See ``Tape``."""
        return Node(first.value + second.value * scale)


def tensor_of(node: Node) -> Any:
    """Return the value of a node, which is a tensor."""
    return node.value


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """``x W^T``, the weights read slab by slab forward and backward."""

    @staticmethod
    def forward(context: Any, x: Any, weight: Tensor, tape: TorchTape) -> Any:
        context.save_for_backward(x)
        context.weight, context.tape = weight, tape
        return torch.cat([x @ tape.weights.rows(weight, slab).T for slab in slabs(weight)], dim=1)

    @staticmethod
    def backward(context: Any, grad: Any) -> tuple[Any, None, None]:
        return context.tape.through(context.weight, grad, context.saved_tensors[0]), None, None


def squared_gradient_norms(rows: Any, grad: Any, x: Any, edges: Any) -> Any:
    """Return ``sum (W dL/dW)^2`` of the rows in float64 on the device; see ``tape.squared_gradient_norms``."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in itertools.pairwise(edges):
        if start < stop:
            total += (grad[start:stop].T @ x[start:stop]).mul_(rows).square_().sum(1, dtype=torch.float64)
    return total


def _normed(x: Any, kind: str, eps: float) -> Any:
    """Return the last dimension over its root mean square; centred before if ``kind`` is ``layer``."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return centred * (1 / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps))
