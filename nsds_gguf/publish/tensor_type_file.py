"""A plan as a ``--tensor-type-file`` for llama-quantize."""

from __future__ import annotations

import re

from ..errors import PlanError
from ..llamacpp import ggml
from ..records import Plan


def tensor_type_file(plan: Plan) -> str:
    """Return the plan as lines for ``llama-quantize --tensor-type-file``.

    llama-quantize searches for a pattern anywhere in the name and takes the first match, so patterns are anchored. Its
    base type must be a quantized one, or it ignores the file, and need no importance matrix: not Q2_K_S.

    Raises ``PlanError`` for a plan of padded tensors, which llama-quantize cannot make.
    """
    if plan.recipe.padding is not None:
        raise PlanError("--tensor-type-file: llama-quantize cannot pad the model as this plan does; pass --pad off")
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) > 1 and tensor.type in ggml.TYPES]
    return "".join(f"^{re.escape(tensor.name)}$={tensor.type.lower()}\n" for tensor in matrices)
