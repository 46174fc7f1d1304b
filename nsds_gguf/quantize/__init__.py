"""Quantization: rows of weights become bytes by round-to-nearest or GPTQ, and a GGUF file.

A rounding is an entry of ``ROUNDINGS`` that makes a ``Quantizer`` for each tensor. ``measure`` and ``write`` use the
same quantizer, so the errors that an allocator weighs are those of the written bytes. To add a rounding, write a
module with a quantizer and a ``Rounding``, and add it to the table.

    rtn     round to nearest                llama.cpp, ggml-quants.c
    gptq    error feedback from columns     Frantar et al., arXiv 2210.17323; Chee et al., arXiv 2307.13304
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..compute.backend import BACKENDS, DEFAULT_BACKEND
from ..records import Float32, Tensor
from . import gptq, rtn
from .deferred import DeferredQuantizer
from .hessian_factors import Factoring, FactorStore, factor_hessian
from .quantizer import Quantizer, Quantizers, Rounding

__all__ = ["ROUNDINGS", "Quantizer", "Quantizers", "Rounding", "TensorQuantizers", "factoring"]

ROUNDINGS: dict[str, Rounding] = {each.name: each for each in (rtn.ROUNDING, gptq.ROUNDING)}


@dataclass(frozen=True)
class TensorQuantizers:
    """The quantizers of a model's tensors, as ``measure`` and ``write_gguf`` take them.

    Attributes:
        rounding: name of one of ``ROUNDINGS``.
        column_weights: by tensor name, ``(n_cols,)`` float32, or ``(n_experts, n_cols)`` where stacked matrices differ;
            tensors that are absent have columns of equal weight.
        factors: Hessian factors, for a rounding that needs them; tensors without factors are rounded to nearest.
        device: key of ``compute.BACKENDS``: where to round, for roundings that can run elsewhere than on the CPU.

    """

    rounding: str = "rtn"
    column_weights: Mapping[str, Float32] = field(default_factory=dict)
    factors: FactorStore | None = None
    device: str = DEFAULT_BACKEND

    def __call__(self, tensor: Tensor) -> DeferredQuantizer:
        """Return the quantizer of a tensor, which reads its factors from disk when it is first used."""
        factors = None if self.factors is None else self.factors.only((tensor.name,))
        rounding = rounding_on(self.device, self.rounding)
        return DeferredQuantizer(rounding, tensor, self.column_weights.get(tensor.name), factors)


def rounding_on(device: str, name: str) -> Rounding:
    """Return a rounding, a key of ``ROUNDINGS``, as it runs on a device, a key of ``compute.BACKENDS``."""
    torch_device = BACKENDS[device].torch_device
    if not torch_device or name != gptq.ROUNDING.name:
        return ROUNDINGS[name]
    from . import gptq_torch

    make = functools.partial(gptq_torch.make_gptq_on, torch_device)
    return replace(gptq.ROUNDING, make=make, tile_rows=gptq_torch.ROW_TILE)


def factoring(device: str, n_threads: int = 1) -> Factoring:
    """Return the function that factors Hessians on a device, a key of ``compute.BACKENDS``, or in CPU threads."""
    torch_device = BACKENDS[device].torch_device
    if not torch_device:
        return functools.partial(factor_hessian, n_threads=n_threads)
    from .gptq_torch import factor_hessian_on

    return functools.partial(factor_hessian_on, torch_device)
