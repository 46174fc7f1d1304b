"""A plan for llama-quantize: lines of ``--tensor-type-file``."""

from __future__ import annotations

import re

from ..llamacpp import ggml
from ..records import Plan


def tensor_type_file(plan: Plan) -> str:
    """Return the plan as lines for ``llama-quantize --tensor-type-file``.

    llama-quantize searches for a pattern anywhere in the name and takes the first hit, so patterns are anchored. Its
    base type must be a quantized one (it ignores the file otherwise) that needs no importance matrix: not Q2_K_S.
    """
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) > 1 and tensor.type in ggml.TYPES]
    return "".join(f"^{re.escape(tensor.name)}$={tensor.type.lower()}\n" for tensor in matrices)
