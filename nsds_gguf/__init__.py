"""nsds-gguf: quantize a model to a GGUF within a budget, without calibration data.

    from nsds_gguf import Options, convert

    (result,) = convert("model/", Options(target_bpw=3.0))
    print(result.path, result.plan.bpw)

The names in ``__all__`` are public; everything else may change. They are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .comparison import Budgets, compare
    from .conversion import Converted, Planned, convert, plan, score
    from .errors import NsdsError
    from .evaluate.perplexity import Perplexity, Window, perplexity
    from .evaluate.texts import VerifyOptions
    from .records import Fit, Model, Options, Plan, Recipe, Scores, Target, TensorType
    from .records.comparison import Comparison
    from .session.outputs import Output
    from .session.run import Reporter, Run
    from .session.source import Source, open_model

__all__ = [
    "Budgets",
    "Comparison",
    "Converted",
    "Fit",
    "Model",
    "NsdsError",
    "Options",
    "Output",
    "Perplexity",
    "Plan",
    "Planned",
    "Recipe",
    "Reporter",
    "Run",
    "Scores",
    "Source",
    "Target",
    "TensorType",
    "VerifyOptions",
    "Window",
    "__version__",
    "compare",
    "convert",
    "open_model",
    "perplexity",
    "plan",
    "score",
]

_HOMES = {
    "Budgets": "comparison",
    "Comparison": "records.comparison",
    "Converted": "conversion",
    "Fit": "records",
    "Model": "records",
    "NsdsError": "errors",
    "Options": "records",
    "Output": "session.outputs",
    "Perplexity": "evaluate.perplexity",
    "Plan": "records",
    "Planned": "conversion",
    "Recipe": "records",
    "Reporter": "session.run",
    "Run": "session.run",
    "Scores": "records",
    "Source": "session.source",
    "Target": "records",
    "TensorType": "records",
    "VerifyOptions": "evaluate.texts",
    "Window": "evaluate.perplexity",
    "compare": "comparison",
    "convert": "conversion",
    "open_model": "session.source",
    "perplexity": "evaluate.perplexity",
    "plan": "conversion",
    "score": "conversion",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
