"""The heavy parts of NSDS on a PyTorch device. Importing this module imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..compute.torch_backend import reports_full_memory
from ..records import Float64
from .stats import Matrix

_ROWS = 1024  # of a product of factors at once


@dataclass(frozen=True)
class TorchAlgebra:
    """An ``nsds.Algebra`` on a device, PyTorch's name of it."""

    device: str

    def gram(self, slabs: Iterable[Float64], d: int) -> Float64:
        """See ``nsds.residual_gram``; returns the whole matrix."""
        with reports_full_memory():
            total = torch.zeros(d, d, dtype=torch.float64, device=self.device)
            for slab in slabs:
                rows = torch.from_numpy(slab).to(self.device)
                total.addmm_(rows.T, rows)
            gram: Float64 = total.cpu().numpy()
        return gram

    def eigh(self, gram: Float64) -> tuple[Float64, Float64]:
        """Return eigenvalues, ascending, and eigenvectors, columns, of a symmetric matrix."""
        with reports_full_memory():
            values, vectors = torch.linalg.eigh(torch.from_numpy(gram).to(self.device), UPLO="U")
            return values.cpu().numpy(), vectors.cpu().numpy()

    def fourth_powers(self, left: Matrix, right: Matrix) -> float:
        """Return ``sum((left @ right)**4)``, products in the dtype of the factors, sums in float64."""
        with reports_full_memory():
            a, b = (torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in (left, right))
            parts = ((rows @ b).square_().double().square_().sum() for rows in a.split(_ROWS))
            return float(sum(parts))
