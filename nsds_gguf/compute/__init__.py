"""The numerics of a decoder: layer views, forward and backward through them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """An entry of ``BACKENDS``."""

    description: str


BACKENDS = {"cpu": Kind("numpy on the CPU")}
