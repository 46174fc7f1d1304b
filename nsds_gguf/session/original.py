"""The original as a GGUF: a GGUF input itself, or a temporary file of a model folder; and a copy that runs faster."""

from __future__ import annotations

from dataclasses import replace

from .. import allocate
from ..evaluate.texts import ORIGINAL, QUANTIZED_INPUT, VerifyOptions, predicts
from ..llamacpp import ggml
from ..quantize.header import header_bytes
from ..read.gguf_source import SOURCE_TYPES
from ..records import Model, Plan, Recipe

PLAIN = Recipe(
    target=None,
    allocator="uniform",
    types=("F32",),
    tensor_types=(),
    rounding="rtn",
    calibration="none",
    metric=None,
    se=None,
    score_weight=0.0,
    prefer="quality",
    seed=0,
    allocation_seed=0,
    device="cpu",
)


def original_plan(model: Model) -> Plan:
    """Return the plan of a file at the source's precision: the type that all matrices share, else F32."""
    dtypes = {tensor.dtype for tensor in model.tensors if tensor.is_matrix}
    uniform = dtypes.pop() if len(dtypes) == 1 and dtypes <= set(ggml.TYPES) else "F32"
    recipe = replace(PLAIN, types=(uniform,))
    return allocate.make_plan(model, None, recipe, header_bytes(model, recipe))


def fast_plan(model: Model) -> Plan | None:
    """Return the plan of a copy in Q8_0, which llama.cpp evaluates fast; ``None`` if no weights are of a wider type.

    Text from it differs little from that of the original (docs/log.md, 2026-11-28).
    """
    if not any(tensor.is_matrix and tensor.dtype in ggml.FLOAT_TYPES for tensor in model.tensors):
        return None
    recipe = replace(PLAIN, types=("Q8_0",))
    return allocate.make_plan(model, None, recipe, header_bytes(model, recipe))


def is_own_original(model: Model) -> bool:
    """Return whether the input is a GGUF that llama.cpp loads unchanged."""
    return bool(model.files) and not model.is_repaired


def original_bytes(model: Model) -> int:
    """Return the bytes of the original as a GGUF, all parts together."""
    if is_own_original(model):
        return sum(state.n_bytes for state in model.inputs)
    return original_plan(model).file_bytes


def fast_copy_bytes(model: Model) -> int:
    """Return the bytes of the copy that generates text."""
    plan = fast_plan(model)
    return original_bytes(model) if plan is None else plan.file_bytes


def with_original_at_hand(model: Model, options: VerifyOptions, is_written: bool) -> VerifyOptions:
    """Return options that compare with the original where it exists as a GGUF anyway and no reference is named."""
    is_at_hand = is_own_original(model) or is_written
    if options.enabled and options.reference is None and is_at_hand and predicts(model):
        return replace(options, reference=ORIGINAL)
    return options


def reference_name(model: Model, options: VerifyOptions) -> str | None:
    """Return the reference of a comparison: ``ORIGINAL``, ``QUANTIZED_INPUT`` or the user's path."""
    is_quantized = any(tensor.is_matrix and tensor.dtype not in SOURCE_TYPES for tensor in model.tensors)
    return QUANTIZED_INPUT if options.reference == ORIGINAL and model.files and is_quantized else options.reference
