"""Which effort and importance, where the user leaves them open: feedback by the model's own text, up to some size."""

from __future__ import annotations

from dataclasses import replace

from ..allocate import PlanOptions
from ..evaluate.texts import embeds, predicts
from ..records import SELF, UNQUANTIZED, Model, Scores

# Stands for an effort or an importance that is left open.
AUTO = "auto"

# Models of more weights get high effort only when told: beyond, it takes hours on a laptop (docs/log.md, 2026-11-26).
AUTO_HIGH_WEIGHTS = 2 * 10**9

PLAIN_IMPORTANCE = "sweep"


def rounding_of(effort: str) -> str:
    """Return the name of the rounding that an effort stands for."""
    return {"normal": "rtn", "high": "gptq"}[effort]


def settled(model: Model, options: PlanOptions, given: Scores | None = None) -> PlanOptions:
    """Return options without ``AUTO``: as given scores were measured; else high effort unless something is against it.

    High effort goes with the model's own text, but of a model for embeddings, and normal effort with
    ``PLAIN_IMPORTANCE``, unless importance is named.
    """
    if options.allocator == "nsds" and given is not None and given.costs:
        effort, importance = given.effort, given.importance or PLAIN_IMPORTANCE
    else:
        effort = options.effort if options.effort != AUTO else "normal" if against_high(model, options) else "high"
        importance = SELF if effort == "high" and not embeds(model) else PLAIN_IMPORTANCE
    return replace(
        options,
        effort=effort if options.effort == AUTO else options.effort,
        importance=importance if options.importance == AUTO else options.importance,
    )


def effort_note(model: Model, options: PlanOptions) -> str:
    """Return what the user must know where effort is left open and normal all the same, or nothing."""
    plainly_asked = options.allocator != "nsds" or options.importance not in (AUTO, SELF)
    reason = "" if options.effort != AUTO or plainly_asked else against_high(model, options)
    return (
        f"Rounding to nearest (--effort normal), since {reason}; --effort high loses less in the same bytes."
        if reason
        else ""
    )


def against_high(model: Model, options: PlanOptions) -> str:
    """Return what is against high effort where effort is left open, or nothing."""
    if options.allocator != "nsds":
        return f"the allocator is {options.allocator}"
    if options.importance not in (AUTO, SELF):
        return f"importance is {options.importance}"
    if set(options.allowed_types) <= set(UNQUANTIZED):
        return "nothing is rounded"
    if embeds(model):
        return "the model embeds texts and writes none"
    if not predicts(model) or "tokenizer.ggml.model" not in model.metadata:
        return "the model does not write text"
    if model.n_weights > AUTO_HIGH_WEIGHTS:
        return f"the model has {model.n_weights / 1e9:.1f} B weights"
    return ""
