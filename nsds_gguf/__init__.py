"""nsds-gguf: the best small GGUF of a model, without calibration data.

Read this package in the order of its pipeline, ``read -> score -> allocate -> write -> verify``; ``convert`` joins
the five. ``records`` holds the nouns that pass between them, ``ggml`` is the only module that knows ctypes.
"""

from .version import __version__

__all__ = ["__version__"]
