"""One entry in a registry is enough: it shows in the help, in plans, in the file's keys and in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import TINY, call
from gguf import GGUFReader
from tiny_models import write_tiny

from nsds_gguf.allocate import ALLOCATORS, Allocator, Choice
from nsds_gguf.calibration import CALIBRATIONS
from nsds_gguf.cli import build_parser
from nsds_gguf.compute import BACKENDS
from nsds_gguf.metrics import METRICS
from nsds_gguf.publish.report import plan_report
from nsds_gguf.quantize import ROUNDINGS
from nsds_gguf.records import LayerScore, Plan, read_json

Register = Callable[[pytest.MonkeyPatch], None]


def metric(patch: pytest.MonkeyPatch) -> None:
    def first_layer(model: Any, _se: str, _workers: Any, _progress: Any) -> tuple[LayerScore, ...]:
        return tuple(LayerScore(i, float(i == 0)) for i in range(model.hparams.n_layers))

    patch.setitem(METRICS, "dummy", first_layer)


def allocator(patch: pytest.MonkeyPatch) -> None:
    def largest(problem: Any) -> Choice:
        return Choice(tuple(candidate.types[-1] for candidate in problem.candidates))

    patch.setitem(ALLOCATORS, "dummy", Allocator(largest, "a dummy for a test", reason="dummy"))


def rounding(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ROUNDINGS, "dummy", replace(ROUNDINGS["rtn"], name="dummy", description="a dummy for a test"))


def calibration(patch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(64, dtype=np.int64).reshape(2, 32)
    kind = replace(CALIBRATIONS["random"], name="dummy", description="a dummy for a test", tokens=lambda _: tokens)
    patch.setitem(CALIBRATIONS, "dummy", kind)


def backend(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(BACKENDS, "dummy", replace(BACKENDS["cpu"], name="dummy", description="a dummy for a test"))


KINDS: dict[str, tuple[Register, list[object], str]] = {
    "metric": (metric, ["--metric", "dummy", "--score-weight", 1], "metric"),
    "allocator": (allocator, ["--allocator", "dummy"], "allocator"),
    "rounding": (rounding, ["--rounding", "dummy"], "rounding"),
    "calibration": (calibration, ["--calibration", "dummy"], "calibration"),
    "backend": (backend, ["--device", "dummy"], "device"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_is_enough(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    register, options, name = KINDS[kind]
    register(monkeypatch)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "dummy" in told and (kind == "metric" or "a dummy for a test" in told)
    model, out = write_tiny(tmp_path / "model", TINY), tmp_path / "out"
    out.mkdir()
    budget = ["--target-bpw", 12] if kind == "allocator" else ["--target-bpw", 6]
    plan_file = tmp_path / "plan.json"
    assert call("plan", model, *budget, *options, "--json", plan_file, "-q", "--threads", 1).code == 0
    plan = Plan.from_json(read_json(plan_file))
    assert getattr(plan.recipe, name) == "dummy"
    assert (name, "dummy") in plan_report(plan).facts and f"--{name} dummy" in plan_report(plan).command
    outcome = call("convert", model, *budget, *options, "--no-verify", "-o", out / "a.gguf", "-q", "--threads", 1)
    assert outcome.code == 0, outcome.err
    recipe = json.loads(GGUFReader(out / "a.gguf").fields["nsds_gguf.recipe"].contents())
    assert recipe[name] == "dummy"
