"""The measurements: models, variants of ours, budgets and goals. Tables only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

IN_REPOSITORY = "examples"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: name in tables, and of its folder of results.
        folder: below ``examples`` of the repository, or else of the folder given by ``--zoo``; empty for a copy.
        fitted: whether constants were chosen by looking at it.
        copy_of: name of the model that this is an outlier copy of (``tools/quality/outlier_copy.py``), or empty.
        seed: of that copy.
        about: remark for the reader, in a few words.
    """

    name: str
    folder: str = ""
    fitted: bool = False
    copy_of: str = ""
    seed: int = 0
    about: str = ""

    @property
    def group(self) -> str:
        """One of ``GROUPS``."""
        if self.copy_of:
            return OUTLIER
        return PLAIN_FITTED if self.fitted else PLAIN_HELD_OUT


PLAIN_HELD_OUT, PLAIN_FITTED, OUTLIER = "plain, held out", "plain, fitted on", "outlier copies"
GROUPS = (PLAIN_HELD_OUT, PLAIN_FITTED, OUTLIER)

ZOO = (
    Entry("books-4.6m", "books-4.6m", fitted=True, about="5.9 tokens seen per parameter"),
    Entry("books-11m", "books-11m", fitted=True, about="0.8 tokens seen per parameter"),
    Entry("normed", "zoo/normed", fitted=True, about="Qwen3: norms on queries and keys; 28 tokens seen per parameter"),
    Entry("full", "zoo/full", about="one KV head per query head; 81 tokens seen per parameter"),
    Entry("deep", "zoo/deep", about="24 layers, feed-forward as wide as the model; 21 tokens seen per parameter"),
    Entry("wide", "zoo/wide", about="width 512; 25 tokens seen per parameter"),
    Entry("books-4.6m-outliers", copy_of="books-4.6m", seed=1, fitted=True, about="a copy with outlier channels"),
    Entry("wide-outliers", copy_of="wide", seed=2, about="a copy with outlier channels"),
)


@dataclass(frozen=True)
class Variant:
    """One way of ours: rounding and calibration.

    The calibration ``IMATRIX_OF_TEXT`` stands for the importance matrix collected from in-domain text.
    """

    name: str
    rounding: str
    calibration: str


IMATRIX_OF_TEXT = "imatrix of text"

# The default of the command line, and its default for models that are too large for GPTQ.
OURS, RTN = "ours", "ours, rtn"
VARIANTS = (
    Variant(OURS, "gptq", "generated"),
    Variant("ours, random tokens", "gptq", "random"),
    Variant(RTN, "rtn", "random"),
    Variant("ours, rtn, generated text", "rtn", "generated"),
    Variant("ours, rtn, real imatrix", "rtn", IMATRIX_OF_TEXT),
    Variant("ours, rtn, no calibration", "rtn", "none"),
)

STOCK, STOCK_IMATRIX, ORACLE, RANDOM, UNIFORM = "preset", "preset, real imatrix", "oracle", "random", "uniform"

# Budgets: the bytes of llama.cpp's presets, in the classes of the goals.
BUDGET_CLASSES = {
    "2 and 3 bit": ("Q2_K", "Q3_K_S", "Q3_K_M"),
    "4 bit": ("Q4_K_S", "Q4_K_M"),
    "5 bit": ("Q5_K_M",),
}
BUDGETS = tuple(preset for presets in BUDGET_CLASSES.values() for preset in presets)

# Types of which one for all is compared with ours at its bytes; at Q2_K's there is nothing to choose.
UNIFORM_TYPES = ("Q3_K", "Q4_K", "Q5_K")

N_RANDOM = 2  # seeds a budget

# Goals: our divergence over that of another at most this, geometric mean over models and the budgets of a class.
PLAIN_GOALS = {
    STOCK: {"2 and 3 bit": 0.60, "4 bit": 0.80, "5 bit": 0.90},
    STOCK_IMATRIX: {"2 and 3 bit": 0.65, "4 bit": 0.85, "5 bit": 0.95},
    ORACLE: {"2 and 3 bit": 1.15, "4 bit": 1.15, "5 bit": 1.15},
    RANDOM: {"2 and 3 bit": 0.50, "4 bit": 0.50, "5 bit": 0.50},
}
PLAIN_WORST = {STOCK: 1.0, STOCK_IMATRIX: 1.0, ORACLE: 1.35}
OUTLIER_GOAL = 0.55  # over the preset with a real importance matrix
UNIFORM_GOAL = 1.0  # worst case, exclusive

# The comparison of the paper: metrics (name, reading of SE) under its own allocator, mean bits of layers at 2 or 4.
PAPER_METRICS = {
    "nsds, ratio": ("nsds", "ratio"),
    "nsds, product": ("nsds", "product"),
    "zd": ("zd", "ratio"),
    "mse": ("mse", "ratio"),
    "ewq": ("ewq", "ratio"),
    "kurtboost": ("kurtboost", "ratio"),
}
PAPER_BITS = (2.5, 3.0, 3.5)
N_RANDOM_ORDERS = 3

NSDS_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)
