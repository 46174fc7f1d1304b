"""Compare the devices of PyTorch with the numpy backend: the passes over tokens, plans, rounded bytes, divergence.

    python tools/check/check_torch.py [--cuda] [--models MODEL ...] [NAME ...]

Needs the extra ``torch``. Runs on PyTorch's CPU, with ``--cuda`` on the GPU, and fails where that cannot run. Without
``--cuda`` it first lets ``meta_device.py`` look for tensors that would miss a GPU.

Every random model of ``tests/zoo_specs.py`` that the passes support, or those named: streams, sensitivities, Hessians,
column sums, NSDS scores, and the predicted divergence of a GPTQ conversion. Every trained model in ``examples``, or
those given: the whole conversion on generated text; types must be equal, predicted divergences within 0.5 %, and the KL
divergence from the original at most 1 % worse in the geometric mean over the models: a change of the last bits of the
Hessian factors moves that of a single model by up to 1.6 % (docs/log.md, 2026-11-28). The exit code is 1 when anything
is off.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the makers of the very models that the tests use

from zoo_specs import SPECS, write_spec

import nsds_gguf
from nsds_gguf import allocate
from nsds_gguf.calibration.hessians import multiplied
from nsds_gguf.compute.backend import find_backend
from nsds_gguf.compute.decoder import what_is_missing
from nsds_gguf.compute.input_moments import Recording
from nsds_gguf.compute.walk import WalkOptions, walk
from nsds_gguf.errors import PlanError
from nsds_gguf.metrics import score_layers
from nsds_gguf.read import open_model
from nsds_gguf.records import K_TYPES, Float32, Float64, Model, Options, Plan
from nsds_gguf.sensitivity.fisher import walk_back
from nsds_gguf.session.run import Run
from nsds_gguf.system.resources import blas_threads

# Largest differences, relative to the largest value of an array; sensitivities each to its own, because a prediction is
# sampled differently if two logits differ by less than float32 resolves.
TOLERANCES = {"streams": 1e-4, "Hessians": 1e-4, "input sums": 1e-4, "column squares": 1e-9, "NSDS": 1e-4,
              "sensitivities": 1e-2}  # fmt: skip
PREDICTED, DIVERGENCE = 0.005, 1.01  # of each model; geometric mean of the ratios
MODEL_BITS = 4.5
TRAINED = ("books-4.6m", "zoo/deep", "zoo/full", "zoo/normed", "zoo/wide")


@dataclass(frozen=True)
class Passes:
    """What the passes over tokens find on one device."""

    streams: list[Float32]
    sensitivity: Mapping[str, float]
    hessians: Mapping[str, Float32]
    sums: Mapping[str, Float64]
    counts: Mapping[str, Any]
    column_squares: Mapping[str, Float64]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--models", nargs="*", type=Path, default=[], metavar="MODEL", help="only these trained models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these random models")
    arguments = parser.parse_args()
    device = "cuda" if arguments.cuda else "torch-cpu"
    try:
        find_backend(device)
    except PlanError as error:
        print(error)
        return 1
    n_wrong = 0
    if not arguments.cuda:
        n_wrong += subprocess.run([sys.executable, ROOT / "tools" / "check" / "meta_device.py"], check=False).returncode
    runs_all = not arguments.names and not arguments.models
    models = [ROOT / "examples" / name for name in TRAINED] if runs_all else arguments.models
    n_wrong += sum(compare_spec(name, device) for name in (SPECS if runs_all else arguments.names))
    ratios = []
    for model in models:
        is_wrong, ratio = compare_conversions(model, device)
        n_wrong += is_wrong
        ratios.append(ratio)
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"divergence on {device} over that on cpu, geometric mean of {len(ratios)} models: {mean:.5f}")
        n_wrong += mean > DIVERGENCE
    print(f"{n_wrong} comparisons are off")
    return int(n_wrong > 0)


def compare_spec(name: str, device: str) -> int:
    """Return 1 when a random model comes out differently from the CPU."""
    with tempfile.TemporaryDirectory() as folder, blas_threads(1):
        path = write_spec(Path(folder) / name, name)
        model = open_model(path)
        if missing := what_is_missing(model):
            print(f"{name:28} the passes do not support {missing}")
            return 0
        first, second = passes(model, "cpu"), passes(model, device)
        found = differences(first, second) | {"NSDS": nsds_difference(model, device)}
        plans = [planned(path, middling_bits(model), each) for each in ("cpu", device)]
    off = [what for what, size in found.items() if not size <= TOLERANCES[what]]
    predicted = predicted_ratio(*plans)
    if types(plans[0]) != types(plans[1]):  # of tiny tensors some cost the same in two types to a thousandth
        found["other types, predicted divergence"] = abs(predicted - 1)
    off += ["predicted divergence"] if abs(predicted - 1) > PREDICTED else []
    print(f"{name:28}", ", ".join(f"{what} {size:.0e}" for what, size in found.items()), *(f"OFF: {x}" for x in off))
    return int(bool(off))


def passes(model: Model, device: str) -> Passes:
    """Run both passes on random tokens, the forward pass in batches of two sequences."""
    tokens = np.random.default_rng(2).integers(0, model.hparams.n_vocab, (5, 32))
    hessians: dict[str, Float32] = {}
    recording = Recording(frozenset(multiplied(model)), column_squares=True)

    def keep(names: tuple[str, ...], hessian: Float32) -> None:
        hessians.update(dict.fromkeys(names, hessian))

    with walk(model, tokens, WalkOptions(2, recording, keep, backend=device)) as found:
        streams = [found.streams.read(index) for index in range(model.hparams.n_layers + 1)]
        sums = {name: each.squares for name, each in found.inputs.items()}
        counts = {name: each.counts for name, each in found.inputs.items()}
        return Passes(streams, walk_back(found).sensitivity, hessians, sums, counts, dict(found.column_squares))


def differences(first: Passes, second: Passes) -> dict[str, float]:
    """Return the largest relative difference of each kind; infinity where names or counts differ."""
    for a, b in ((first.sensitivity, second.sensitivity), (first.hessians, second.hessians), (first.sums, second.sums),
                 (first.column_squares, second.column_squares)):  # fmt: skip
        if a.keys() != b.keys():
            return {"streams": math.inf}
    pairs = list(zip(first.streams, second.streams, strict=True))
    same_counts = all(np.array_equal(counts, second.counts[name]) for name, counts in first.counts.items())
    sensitivities = [relative(np.array(value), np.array(second.sensitivity[name]))
                     for name, value in first.sensitivity.items()]  # fmt: skip
    return {
        "streams": max(relative(a, b) for a, b in pairs),
        "sensitivities": max(sensitivities),
        "Hessians": max(relative(a, second.hessians[name]) for name, a in first.hessians.items()),
        "input sums": max(relative(a, second.sums[name]) for name, a in first.sums.items()) + (0 if same_counts else 1),
        "column squares": max((relative(a, second.column_squares[name]) for name, a in first.column_squares.items()),
                              default=0.0),
    }  # fmt: skip


def relative(first: Any, second: Any) -> float:
    """Return the largest difference over the largest value."""
    largest = float(np.abs(first).max())
    return float(np.abs(first - second).max()) / largest if largest else float(np.abs(second).max())


def nsds_difference(model: Model, device: str) -> float:
    """Return the largest relative difference of a part of the layers' scores."""
    every = [score_layers(model, device=each)[0] for each in ("cpu", device)]
    parts = [np.array([[*layer.nv.values(), *layer.se.values()] for layer in layers], float) for layers in every]
    return float(np.nanmax(np.abs(parts[0] - parts[1]) / np.maximum(np.abs(parts[0]), 1e-3)))


def middling_bits(model: Model) -> float:
    """Return a budget between the smallest and the largest plan, in bits per weight."""
    found = allocate.candidates(model, K_TYPES)
    least, most = (sum(each.n_bytes(each.types[end]) for each in found) for end in (0, -1))
    return 8 * (0.6 * least + 0.4 * most) / model.n_weights


def planned(path: Path, bits: float, device: str) -> Plan:
    """Return the plan of a GPTQ conversion on random tokens."""
    options = Options(target_bpw=bits, rounding="gptq", calibration="random", device=device)
    return nsds_gguf.plan(path, options, run=Run(1)).plans[0]


def predicted_ratio(first: Plan, second: Plan) -> float:
    """Return the second predicted divergence over the first."""
    return second.predicted_divergence / first.predicted_divergence


def types(plan: Plan) -> list[str]:
    """Return the type of every tensor."""
    return [tensor.type for tensor in plan.tensors]


def compare_conversions(path: Path, device: str) -> tuple[int, float]:
    """Convert a trained model on both devices; return 1 when types differ, and the ratio of divergences."""
    converted, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for each in ("cpu", device):
            start = time.monotonic()
            options, verifying = (
                Options(target_bpw=MODEL_BITS, device=each),
                nsds_gguf.VerifyOptions(reference="original"),
            )
            output = Path(folder) / f"{each}.gguf"
            converted += nsds_gguf.convert(path, options, output=output, verifying=verifying)
            seconds.append(time.monotonic() - start)
        first, second = (data_of(made) for made in converted)
    predicted = predicted_ratio(converted[0].plan, converted[1].plan)
    is_wrong = types(converted[0].plan) != types(converted[1].plan) or abs(predicted - 1) > PREDICTED
    divergences = [made.perplexity.divergence.kld_mean for made in converted]
    equal = float((first == second).mean()) if first.size == second.size else 0.0
    ratio = divergences[1] / divergences[0]
    print(f"{path.name}: {100 * equal:.2f} % of the bytes are equal, KL divergence {divergences[0]:.6f} on cpu, "
          f"{divergences[1]:.6f} on {device} ({ratio:.5f}, predicted {predicted:.5f}); {seconds[0]:.0f} s and "
          f"{seconds[1]:.0f} s" + ("; OFF" if is_wrong else ""))  # fmt: skip
    return int(is_wrong), ratio


def data_of(made: nsds_gguf.Converted) -> Any:
    """Return the bytes of a file after its header, which names the device."""
    return np.fromfile(made.path, np.uint8)[made.plan.header_bytes :]


if __name__ == "__main__":
    sys.exit(main())
