"""Measure ours against the recipe of COLDPRESS (github.com/asystemoffields/PERM) at the bytes of a preset.

    python tools/quality/coldpress.py --work DIR --model PATH --train FILE --text FILE [--budgets Q2_K,Q3_K_M]

The recipe, as its description has it: the types of llama.cpp's preset; ggml's scales, found with an importance matrix
and then frozen; GPTQ's error feedback onto their grid, single columns by falling diagonal of the Hessian (act-order);
gains of norms distilled on the same text by the KL divergence. Hessians and gains come from ``--train``, ours from text
that the model generates. Left out is the permutation of channels, which gains one percent of the perplexity there. All
rows must be multiples of 256.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quality_measure import N_CTX, Passage, Yardstick, halves, original_plan, spread, tokenized
from quality_model import calibration_text

from nsds_gguf.allocate.presets import preset_types
from nsds_gguf.calibration.hessians import multiplied
from nsds_gguf.comparison import exact_bpw
from nsds_gguf.compute.input_moments import Recording
from nsds_gguf.compute.walk import WalkOptions, walk
from nsds_gguf.evaluate.texts import read_text
from nsds_gguf.quantize.formats import FORMATS, Blocks
from nsds_gguf.quantize.gain_tuning import tune_gains, write_gains
from nsds_gguf.quantize.rtn import RtnQuantizer
from nsds_gguf.quantize.write import write_gguf
from nsds_gguf.read import open_model
from nsds_gguf.records import UNQUANTIZED, Float32, Float64, Model, Options, Plan, Tensor, TensorType
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.session.settle import settle
from nsds_gguf.system.workfolder import WorkFolder

DAMPING = 0.01  # share of the mean of the diagonal, as in GPTQ
N_POSITIONS = 256
N_TUNED = 32  # sequences on which gains are tuned, as in ours

OURS, OURS_TUNED, COLD, COLD_TUNED = "ours", "ours, norms tuned", "COLDPRESS without norms", "COLDPRESS"


@dataclass(frozen=True)
class FrozenQuantizer:
    """Error feedback onto the grid of ggml's scales, columns by falling diagonal of the Hessian."""

    hessian: Float64
    n_rows: int
    tile_rows: int = 1 << 30

    def for_rows(self, first_row: int) -> FrozenQuantizer:
        """See ``TensorQuantizer``."""
        return self

    def quantize(self, rows: Float32, type_name: str, first_row: int = 0) -> NDArray[np.uint8]:
        """See ``Quantizer``."""
        weights = self.hessian.diagonal().astype(np.float32)
        data = RtnQuantizer(weights / weights.mean(), self.n_rows).quantize(rows, type_name)
        if type_name not in FORMATS:
            return data
        format = FORMATS[type_name]
        found = format.unpack(data)
        scale, offset = (part.repeat(format.sub, axis=-1).reshape(rows.shape) for part in (found.scale, found.offset))
        codes = fed_back(rows, scale, offset, format.levels, self.hessian)
        return format.pack(Blocks(codes.reshape(found.codes.shape), found.s, found.m, found.d, found.dmin))

    def errors(self, rows: Float32, type_name: str, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        raise NotImplementedError("types are the preset's")

    def squared_norms(self, rows: Float32, first_row: int = 0) -> Float64:
        """See ``Quantizer``."""
        raise NotImplementedError("types are the preset's")


def fed_back(rows: Float32, scale: Float32, offset: Float32, levels: Float32, hessian: Float64) -> NDArray[np.uint8]:
    """Return codes, ``(n_rows, n_cols)``, of weights ``scale * levels[code] - offset``; levels are 1 apart."""
    order = np.argsort(-hessian.diagonal(), kind="stable")
    damped = hessian[np.ix_(order, order)] + DAMPING * hessian.diagonal().mean() * np.eye(len(order))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    left, codes = np.ascontiguousarray(rows[:, order].T), np.zeros(rows.shape, np.uint8)
    for i, column in enumerate(order):
        s, o = scale[:, column], offset[:, column]
        steps = np.divide(left[i] + o, s, out=np.zeros_like(o), where=s != 0)
        codes[:, column] = np.clip(np.rint(steps - levels[0]), 0, len(levels) - 1)
        error = (left[i] - (s * levels[codes[:, column]] - o)) / upper[i, i]
        left[i + 1 :] -= upper[i, i + 1 :, np.newaxis] * error
    return codes


class Comparison:
    """One model with its training text and the texts that files are compared on."""

    def __init__(self, source: Path, folder: Path, train: str, passage: Passage, given: argparse.Namespace) -> None:
        """Open the model, compute the original's logits, and the Hessians of the training text."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.session = Session(open_model(source), Run(given.threads), WorkFolder(folder, ("cold.gguf",), resume=True))
        self.session.files.open()
        self.reference = folder / "original.gguf"
        self.session.write(original_plan(self.session), self.reference)
        self.original = open_model(self.reference)
        n_threads = self.session.run.n_threads
        self.yardstick = Yardstick(self.reference, self.session.model.model_id, passage, folder, n_threads)
        chunks = tokenized(self.reference, train).astype(np.int64)
        chosen = chunks[spread(len(chunks), given.tokens // N_CTX)].reshape(-1, N_POSITIONS)
        self.tokens, self.hessians = chosen, hessians_of(self.original, chosen, n_threads)

    def run(self, preset: str) -> dict[str, float]:
        """Return the divergence of every variant at the bytes of a preset."""
        model = self.session.model
        chosen = preset_types(model, preset).items()
        fixed = tuple(TensorType(re.escape(n), t) for n, t in chosen if t not in UNQUANTIZED)
        recipe = settle(Options(uniform="Q2_K", tensor_types=fixed, rounding="rtn", calibration="none"), model).recipe
        plan = self.session.plan(recipe, None)
        bpw, found = exact_bpw(plan.tensor_bytes, model.n_weights), dict[str, float]()
        mine = self.session.plans([settle(Options(target_bpw=bpw, rounding="gptq", tune_norms=True), model)], None)[0]
        path = self.folder / "measured.gguf"
        self.session.write(mine, path)
        found[OURS] = self.kld(path)
        self.session.tune_norms(mine, path)
        found[OURS_TUNED] = self.kld(path)
        self.write_cold(plan, path)
        found[COLD] = self.kld(path)
        quantized, n_threads = open_model(path, None, True), self.session.run.n_threads
        gains = tune_gains(self.original, quantized, self.tokens[:N_TUNED], n_threads)
        write_gains(path, gains.gains)
        found[COLD_TUNED] = self.kld(path)
        path.unlink()
        return {"bpw": bpw, **found}

    def write_cold(self, plan: Plan, path: Path) -> None:
        """Write the file of a plan by error feedback; a matrix without a Hessian is rounded to nearest."""

        def quantizer(tensor: Tensor) -> FrozenQuantizer:
            return FrozenQuantizer(self.hessians.get(tensor.name, np.eye(tensor.n_cols)), tensor.n_matrix_rows)

        write_gguf(self.session.model, plan, quantizer, path, workers=self.session.workers)

    def kld(self, path: Path) -> float:
        """Return the divergence of a file, nats per token."""
        return float(self.yardstick.score(path)["kld"].mean())


def hessians_of(model: Model, tokens: NDArray[np.int64], n_threads: int) -> Mapping[str, Float64]:
    """Return ``E[x x^T]`` of the inputs of matrices, by stored name."""
    found: dict[str, Float64] = {}

    def keep(names: tuple[str, ...], hessian: Float32) -> None:
        found.update(dict.fromkeys(names, hessian.astype(np.float64)))

    with walk(model, tokens, WalkOptions(1, Recording(frozenset(multiplied(model))), keep, n_threads)):
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="text, also .xz, for Hessians and gains of COLDPRESS")
    parser.add_argument("--text", type=Path, required=True, help="its second half is measured on")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--budgets", default="Q2_K,Q3_K_M")
    arguments = parser.parse_args()
    passage = Passage(arguments.text.stem, "final", halves(read_text(arguments.text))[1], arguments.chunks)
    bench = Comparison(arguments.model, arguments.work, calibration_text(arguments.train), passage, arguments)
    for preset in arguments.budgets.split(","):
        found = bench.run(preset)
        cells = [f"{name} {value:.4f}" for name, value in found.items()]
        print(f"{arguments.model.stem} {preset}: {', '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
