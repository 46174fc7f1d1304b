"""Where tokens and column statistics come from: random tokens, generated text, an importance matrix.

A new calibration is a class like those here and one line in ``kinds.CALIBRATIONS``.
"""

from .evidence import Calibration, Evidence, TokenRequest
from .kinds import CALIBRATIONS, CalibrationKind, find_calibration

__all__ = ["CALIBRATIONS", "Calibration", "CalibrationKind", "Evidence", "TokenRequest", "find_calibration"]
