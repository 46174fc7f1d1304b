"""Sources of tokens and column statistics: random tokens, generated calibration text, an importance matrix.

To add a calibration, write a class like those here and add one line to ``kinds.CALIBRATIONS``.
"""

from .evidence import Calibration, Evidence, TokenRequest
from .kinds import CALIBRATIONS, CalibrationKind, find_calibration

__all__ = ["CALIBRATIONS", "Calibration", "CalibrationKind", "Evidence", "TokenRequest", "find_calibration"]
