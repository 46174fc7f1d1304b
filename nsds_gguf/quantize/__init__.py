"""Quantization: rows of weights become bytes by round-to-nearest or GPTQ, and a GGUF file.

A rounding is an entry of ``ROUNDINGS`` that makes a ``Quantizer`` for each tensor. ``measure`` and ``write`` use the
same quantizer, so the errors that an allocator weighs are those of the written bytes. To add a rounding, write a
module with a quantizer and a ``Rounding``, and add it to the table.

    rtn     round to nearest                llama.cpp, ggml-quants.c
    gptq    error feedback from columns     Frantar et al., arXiv 2210.17323; Chee et al., arXiv 2307.13304
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..records import Float32, Tensor
from . import gptq, rtn
from .deferred import DeferredQuantizer
from .hessian_factors import FactorStore
from .quantizer import Quantizer, Quantizers, Rounding

__all__ = ["ROUNDINGS", "Quantizer", "Quantizers", "Rounding", "TensorQuantizers"]

ROUNDINGS: dict[str, Rounding] = {each.name: each for each in (rtn.ROUNDING, gptq.ROUNDING)}


@dataclass(frozen=True)
class TensorQuantizers:
    """The quantizers of a model's tensors, as ``measure`` and ``write_gguf`` take them.

    Attributes:
        rounding: name of one of ``ROUNDINGS``.
        column_weights: by tensor name, ``(n_cols,)`` float32, or ``(n_experts, n_cols)`` where stacked matrices differ;
            tensors that are absent have columns of equal weight.
        factors: Hessian factors, for a rounding that needs them; tensors without factors are rounded to nearest.

    """

    rounding: str = "rtn"
    column_weights: Mapping[str, Float32] = field(default_factory=dict)
    factors: FactorStore | None = None

    def __call__(self, tensor: Tensor) -> DeferredQuantizer:
        """Return the quantizer of a tensor, which reads its factors from disk when it is first used."""
        factors = None if self.factors is None else self.factors.only((tensor.name,))
        return DeferredQuantizer(ROUNDINGS[self.rounding], tensor, self.column_weights.get(tensor.name), factors)
