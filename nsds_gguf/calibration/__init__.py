"""Where tokens and column statistics come from: random tokens, generated text, an importance matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """An entry of ``CALIBRATIONS``."""

    description: str
    has_hessians: bool


CALIBRATIONS = {
    "random": Kind("random tokens by Zipf's law", True),
    "generated": Kind("text that the model generates", True),
    "norm": Kind("squared gains of the norms in front of the matrices", False),
    "none": Kind("every column weighs the same", False),
}
