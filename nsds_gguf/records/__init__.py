"""The nouns that stages hand to one another: Model in, Scores and Plan along the way.

All are frozen. ``Scores`` and ``Plan`` round-trip through JSON, so that every stage can run alone and be looked at.
"""

from .json_records import read_json
from .model import (
    ALIGNMENT_BYTES,
    COPIED_TYPES,
    UNQUANTIZED,
    Float32,
    Float64,
    Hparams,
    Model,
    Progress,
    Tensor,
    kv,
    no_progress,
    role_and_layer,
)
from .plan import PLAN_FORMAT, Plan, PlannedTensor, TensorKind
from .recipe import AUTO, K_TYPES, Options, Recipe, Target, TensorType
from .scores import SCORES_FORMAT, LayerScore, Scores, TensorCost

__all__ = [
    "ALIGNMENT_BYTES",
    "COPIED_TYPES",
    "PLAN_FORMAT",
    "SCORES_FORMAT",
    "UNQUANTIZED",
    "Float32",
    "Float64",
    "Hparams",
    "LayerScore",
    "Model",
    "Plan",
    "PlannedTensor",
    "Progress",
    "Scores",
    "AUTO",
    "K_TYPES",
    "Options",
    "Recipe",
    "Target",
    "TensorType",
    "Tensor",
    "TensorCost",
    "TensorKind",
    "kv",
    "no_progress",
    "read_json",
    "role_and_layer",
]
