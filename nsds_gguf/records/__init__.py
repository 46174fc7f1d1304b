"""The records that stages pass to one another: Model, Recipe, Scores, Plan.

All are frozen. ``Scores`` and ``Plan`` round-trip through JSON, so that each stage can run alone and be inspected.
"""

from .json_records import read_json
from .model import ALIGNMENT_BYTES, Hparams, Model, Progress, kv, no_progress
from .plan import PLAN_FORMAT, Plan, PlannedTensor, TensorKind
from .projector import Projector
from .recipe import AUTO, K_TYPES, Fit, Options, Recipe, Target, TensorType
from .scores import SCORES_FORMAT, LayerScore, Scores, TensorCost
from .sources import SLAB_BYTES, Float32, Float64, FromArray, Rows, Source, Stack
from .tensor import COPIED_TYPES, UNQUANTIZED, Tensor, role_and_layer

__all__ = [
    "ALIGNMENT_BYTES",
    "AUTO",
    "COPIED_TYPES",
    "K_TYPES",
    "PLAN_FORMAT",
    "SCORES_FORMAT",
    "SLAB_BYTES",
    "UNQUANTIZED",
    "Fit",
    "Float32",
    "Float64",
    "FromArray",
    "Hparams",
    "LayerScore",
    "Model",
    "Options",
    "Plan",
    "PlannedTensor",
    "Progress",
    "Projector",
    "Recipe",
    "Rows",
    "Scores",
    "Source",
    "Stack",
    "Target",
    "Tensor",
    "TensorCost",
    "TensorKind",
    "TensorType",
    "kv",
    "no_progress",
    "read_json",
    "role_and_layer",
]
