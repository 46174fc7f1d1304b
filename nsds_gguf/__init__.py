"""nsds-gguf: the best small GGUF of a model, without calibration data."""

__version__ = "0.1.0"

__all__ = ["__version__"]
