"""Why a tensor has its type: in a few words for the table, in sentences with numbers for one tensor."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..allocate import ALLOCATORS
from ..errors import PlanError, RecordError
from ..llamacpp import ggml
from ..records import UNQUANTIZED, Plan, PlannedTensor, Scores, TensorCost

# A tensor below this share of the bytes is cheap whatever it takes; above this multiple of the layers' median
# sensitivity per weight (or below its inverse) that is the reason.
CHEAP_SHARE = 0.005
NOTABLE = 1.5


@dataclass(frozen=True)
class Step:
    """The next smaller or larger type of a tensor: the bytes and the predicted divergence that it adds."""

    type: str
    n_bytes: int
    divergence: float

    @property
    def price(self) -> float:
        """Divergence per byte, 0 or more in either direction."""
        return abs(self.divergence) / abs(self.n_bytes) if self.n_bytes else 0.0


def in_a_word(plan: Plan, tensor: PlannedTensor) -> str:
    """Return in a few words why a tensor of the plan has its type."""
    if tensor.kind == "unquantized":
        return f"{tensor.reason}: not quantized"
    if tensor.kind == "fallback":
        return f"{tensor.reason}: {tensor.type} at {ggml.bits_per_weight(tensor.type):g} bpw"
    if not _is_optimum(plan, tensor) or tensor.sensitivity is None:
        return tensor.reason
    if tensor.role in ("output", "token_embd") and tensor.sensitivity >= max(t.sensitivity or 0 for t in plan.tensors):
        return "error reaches the logits directly"
    share = tensor.n_bytes / plan.tensor_bytes
    density = sensitivity_per_weight(plan, tensor)
    if density >= NOTABLE:
        return f"sensitive: {density:.1f} x the median weight"
    if share < CHEAP_SHARE and ggml.bits_per_weight(tensor.type) > plan.quantized_bpw:
        return f"cheap: {_percent(share)} of the bytes"
    if density <= 1 / NOTABLE:
        return f"tolerant: {density:.2f} x the median weight"
    return f"typical: {density:.2f} x the median weight"


def sensitivity_per_weight(plan: Plan, tensor: PlannedTensor) -> float:
    """Return a tensor's sensitivity per weight, relative to the median over the quantized weights of all layers."""
    known = [t for t in plan.tensors if t.sensitivity is not None and t.type not in UNQUANTIZED]
    in_layers = [t for t in known if t.layer is not None] or known
    densities = sorted(((t.sensitivity or 0.0) / t.n_weights, t.n_weights) for t in in_layers)
    reached = itertools.accumulate(n_weights for _, n_weights in densities)
    half = sum(n_weights for _, n_weights in densities) / 2
    median = next((d for (d, _), n in zip(densities, reached, strict=True) if n >= half), 0.0)
    if tensor.sensitivity is None or median <= 0:
        return 1.0
    return tensor.sensitivity / tensor.n_weights / median


def why(plan: Plan, scores: Scores | None, name: str) -> str:
    """Explain a tensor's type: what the next smaller and larger ones cost and gain, and what the plan pays elsewhere.

    Args:
        plan: the plan.
        scores: the scores that it was made from; without their costs the answer leaves out other types.
        name: of a tensor of the plan.

    Raises:
        PlanError: the plan has no such tensor.
        RecordError: the scores lack the errors of its other types.

    """
    tensor = _named(plan, name)
    word = in_a_word(plan, tensor)
    share = _percent(tensor.n_bytes / plan.tensor_bytes)
    bpw = ggml.bits_per_weight(tensor.type) if tensor.type in ggml.TYPES else tensor.n_bytes * 8 / tensor.n_weights
    sentences = [
        f"{name} is {tensor.type}: {bpw:g} bits per weight, {tensor.n_bytes:,} bytes, {share} of the total ({word})."
    ]
    costs = {cost.name: cost for cost in scores.costs} if scores is not None else {}
    if tensor.error is None or tensor.sensitivity is None or name not in costs:
        return sentences[0]
    total = plan.predicted_divergence or 0.0
    own = tensor.sensitivity * tensor.error
    part = _percent(own / total if total else 0.0)
    sentences.append(
        f"Its relative error at this type is {tensor.error:.3g}, its sensitivity {tensor.sensitivity:.3g}: "
        f"{part} of the predicted divergence."
    )
    if _is_optimum(plan, tensor):
        down, up = steps(tensor, costs[name])
        price = exchange_rate(plan, costs)
        sentences += [_step_sentence(step, total, price) for step in (down, up) if step is not None]
    return " ".join(sentences)


def steps(tensor: PlannedTensor, cost: TensorCost) -> tuple[Step | None, Step | None]:
    """Return the next type down and the next one up, ``None`` where there is none; raises ``RecordError``."""
    if tensor.type not in cost.errors:
        raise RecordError(f"the scores hold no error of {tensor.name} at {tensor.type}; score again")
    ladder = sorted(cost.errors, key=ggml.bits_per_weight)
    at = ladder.index(tensor.type)
    down = _step(tensor, cost, ladder[at - 1]) if at > 0 else None
    return down, _step(tensor, cost, ladder[at + 1]) if at + 1 < len(ladder) else None


def _step(tensor: PlannedTensor, cost: TensorCost, to: str) -> Step:
    n_bytes = math.prod(tensor.shape[:-1]) * ggml.row_bytes(to, tensor.shape[-1]) - tensor.n_bytes
    change = (tensor.sensitivity or 0.0) * (cost.errors[to] - cost.errors[tensor.type])
    return Step(to, n_bytes, change)


def exchange_rate(plan: Plan, costs: Mapping[str, TensorCost]) -> float:
    """Return the divergence that the plan's last byte saves: the largest gain per byte of any next larger type."""
    found = []
    for tensor in plan.tensors:
        if _is_optimum(plan, tensor) and tensor.name in costs:
            _, up = steps(tensor, costs[tensor.name])
            if up is not None and up.n_bytes > 0:
                found.append(max(-up.divergence, 0.0) / up.n_bytes)
    return max(found, default=0.0)


def _step_sentence(step: Step, total: float, price: float) -> str:
    share = _percent(abs(step.divergence) / total if total else 0.0)
    times = f", {step.price / price:.2g} x what the plan pays for its last bytes" if price > 0 else ""
    if step.n_bytes < 0:
        return f"{step.type} would save {-step.n_bytes:,} bytes and add {share} to the divergence{times}."
    verb = "remove" if step.divergence <= 0 else "add"
    return f"{step.type} would cost {step.n_bytes:,} bytes and {verb} {share}{times}."


def _is_optimum(plan: Plan, tensor: PlannedTensor) -> bool:
    """Return whether the type is the best choice by predicted divergence."""
    return tensor.kind == "chosen" and ALLOCATORS[plan.recipe.allocator].needs_costs


def _percent(share: float) -> str:
    """Return a share as a percentage with two significant digits, or more from 100 % up."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _named(plan: Plan, name: str) -> PlannedTensor:
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)
        raise PlanError(f"--why {name}: no such tensor; nearest is {near[0] if near else 'none'}")
    return by_name[name]
