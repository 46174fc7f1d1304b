"""A cluster changes no byte: three worker processes, dying workers, workers that do not fit, and what stays bounded."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster_faults
import numpy as np
import psutil
import pytest
from command import ENVIRONMENT, TINY, call, message
from tiny_archs import write_tiny_arch
from tiny_models import write_tiny

from nsds_gguf import Options, Output, Run, VerifyOptions, convert
from nsds_gguf.calibration import random_tokens
from nsds_gguf.errors import ClusterError, ModelError
from nsds_gguf.quantize import TensorQuantizers
from nsds_gguf.quantize.hessian_factors import FactorStore, factor_hessian
from nsds_gguf.records import Progress
from nsds_gguf.session.cluster import software
from nsds_gguf.session.run import Silent
from nsds_gguf.session.source import open_model
from nsds_gguf.system import cluster
from nsds_gguf.system.cluster import Requirements, connected
from nsds_gguf.system.filestate import file_states
from nsds_gguf.system.workers import Threads, in_order

distributed = pytest.importorskip("distributed")

N_WORKERS = 3
UNCHECKED = VerifyOptions(enabled=False)
RTN = Options(target_bpw=6.0, rounding="rtn", score_weight=1.0, types=("Q4_K", "Q8_0"))
GPTQ = Options(target_bpw=6.0, rounding="gptq", calibration="random", types=("Q4_K", "Q6_K", "Q8_0"))

# Every distributed stage: the model, the options, and the function that runs in workers.
STAGES = {
    "layer scores": ("dense", RTN, "nsds_gguf.metrics.nsds", "_layer"),
    "moment propagation": ("experts", RTN, "nsds_gguf.sensitivity.blocks", "_used_update"),
    "Hessian factors": ("dense", GPTQ, "nsds_gguf.calibration.hessians", "_factor"),
    "measuring": ("dense", GPTQ, "nsds_gguf.quantize.measure", "_measure_one"),
    "writing": ("dense", GPTQ, "nsds_gguf.quantize.write", "_quantize_slab"),
}


class Watching(Silent):
    """A reporter that keeps what was said and calls a function at every step of a stage."""

    def __init__(self, name: str = "", step: Callable[[], object] = lambda: None) -> None:
        self.name, self.step, self.said = name, step, list[str]()

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield lambda done, total: self.step() if name == self.name else None

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "dense", replace(TINY, n_layers=1))
    return {"dense": folder / "dense", "experts": write_tiny_arch(folder / "experts.gguf", "deepseek2")}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_tokens, "N_SEQUENCES_HESSIANS", 2)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Any]:
    """Return a scheduler with three worker processes, whose nannies replace those that die."""
    with cluster._quiet(), cluster._local_cluster(N_WORKERS) as local:
        yield local


@pytest.fixture
def client(scheduler: Any) -> Iterator[Any]:
    """Return a client of the test's own; all workers are there again."""
    with distributed.Client(scheduler, set_as_default=False) as own:
        own.wait_for_workers(N_WORKERS, timeout=30)
        yield own


def converted(source: Path, folder: Path, options: Options, address: str | None, report: Silent | None = None) -> bytes:
    folder.mkdir(exist_ok=True)
    run = Run(2, report or Silent(), cluster=address)
    (done,) = convert(source, options, output=Output(folder / "a.gguf"), verifying=UNCHECKED, run=run)
    assert [path.name for path in folder.iterdir()] == ["a.gguf"]
    return done.path.read_bytes()


@pytest.fixture(scope="module")
def wanted(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Options], bytes]:
    """Return a function that returns the bytes without a cluster."""
    found: dict[tuple[str, str], bytes] = {}

    def bytes_of(name: str, options: Options) -> bytes:
        key = name, options.rounding
        if key not in found:
            found[key] = converted(models[name], tmp_path_factory.mktemp("alone"), options, None)
        return found[key]

    return bytes_of


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("dense", RTN), ("dense", GPTQ), ("experts", RTN)])
def test_three_workers_give_the_same_bytes(
    name: str, options: Options, models: Any, wanted: Any, scheduler: Any, client: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    report = Watching()
    monkeypatch.chdir(models[name].parent)  # the workers are elsewhere: paths must not depend on it
    source = Path(models[name].name)
    assert converted(source, tmp_path / "out", options, scheduler.scheduler_address, report) == wanted(name, options)
    (told,) = [text for text in report.said if text.startswith("Cluster: ")]
    assert told.startswith("Cluster: 3 workers with 3 threads; dashboard: http://127.0.0.1:")


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_dies_and_the_bytes_are_the_same(
    stage: str, models: Any, wanted: Any, scheduler: Any, client: Any, tmp_path: Path
) -> None:
    name, options, module, function = STAGES[stage]
    flag = tmp_path / "flag"
    flag.touch()
    before = set(client.run(os.getpid).values())
    client.run(cluster_faults.die_once, module, function, flag)
    assert converted(models[name], tmp_path / "out", options, scheduler.scheduler_address) == wanted(name, options)
    assert not flag.exists()
    client.wait_for_workers(N_WORKERS, timeout=30)
    assert len(before - set(client.run(os.getpid).values())) == 1


def test_errors_of_the_system_are_tried_again(
    models: Any, wanted: Any, scheduler: Any, client: Any, tmp_path: Path
) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    for number in range(2):
        (flags / str(number)).touch()
    client.run(cluster_faults.fail_twice, "nsds_gguf.quantize.measure", "_measure_one", flags)
    assert converted(models["dense"], tmp_path / "out", RTN, scheduler.scheduler_address) == wanted("dense", RTN)
    assert not list(flags.iterdir())


def test_a_task_that_kills_every_worker_ends_the_run(scheduler: Any, client: Any) -> None:
    with (
        connected(scheduler.scheduler_address, 1, Requirements(software, software())) as workers,
        pytest.raises(
            ClusterError, match=r"^task kill: 4 workers died while they ran it, the last at tcp://127.0.0.1:"
        ),
    ):
        list(workers.ordered(kill, [signal.SIGKILL]))


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


# --- workers that do not fit ------------------------------------------------------------------------------------------


def refusal(models: Any, scheduler: Any, folder: Path, report: Silent | None = None) -> str:
    with pytest.raises(ClusterError) as caught:
        converted(models["dense"], folder, RTN, scheduler.scheduler_address, report)
    assert caught.value.exit_code == 9 and not list(folder.glob("*.gguf"))
    return str(caught.value)


def test_a_worker_that_does_not_see_the_model_is_refused(
    models: Any, scheduler: Any, client: Any, tmp_path: Path
) -> None:
    address, weights = list(client.nthreads())[1], models["dense"] / "model.safetensors"
    client.run(cluster_faults.hide, models["dense"], workers=[address])
    try:
        assert refusal(models, scheduler, tmp_path / "out") == (
            f"worker {address} does not see {weights} (No such file or directory): put it on storage that all workers "
            "mount at this path"
        )
    finally:
        client.run(cluster_faults.hide, models["dense"], False)


def test_a_worker_that_joins_later_is_refused_too(models: Any, scheduler: Any, client: Any, tmp_path: Path) -> None:
    """Workers are checked before their first task, not at the start alone."""
    report = Watching("find sensitivities", lambda: client.run(cluster_faults.hide, models["dense"]))
    try:
        assert f" does not see {models['dense'] / 'model.safetensors'} (" in refusal(
            models, scheduler, tmp_path / "out", report
        )
    finally:
        client.run(cluster_faults.hide, models["dense"], False)


def test_another_file_of_the_same_name_is_told(models: Any) -> None:
    (state,) = file_states([models["experts"]])
    needs = Requirements(software, software(), (replace(state, n_bytes=7),))
    assert needs.problem() == f"sees another {state.path}: it has {state.n_bytes} bytes there, 7 here"
    assert Requirements(software, software(), (state,)).problem() == ""


def test_a_worker_that_does_not_see_the_work_folder_is_refused(
    models: Any, scheduler: Any, client: Any, tmp_path: Path
) -> None:
    address, out = next(iter(client.nthreads())), tmp_path / "out"
    client.run(cluster_faults.hide, out, workers=[address])
    try:
        with pytest.raises(ClusterError) as caught:
            converted(models["dense"], out, GPTQ, scheduler.scheduler_address)
        assert str(caught.value).startswith(f"worker {address} does not see {out}/.nsds-gguf-")
        assert str(caught.value).endswith("or pass --rounding rtn")
        assert converted(models["dense"], tmp_path / "rtn", RTN, scheduler.scheduler_address)  # needs no shared output
    finally:
        client.run(cluster_faults.hide, out, False)


@pytest.mark.parametrize(("fault", "name"), [(cluster_faults.set_numpy, "numpy"),
                                             (cluster_faults.set_version, "nsds-gguf")])  # fmt: skip
def test_a_worker_of_another_version_is_refused(
    fault: Callable[[str], str], name: str, models: Any, scheduler: Any, client: Any, tmp_path: Path
) -> None:
    address = list(client.nthreads())[2]
    before = client.run(fault, "0.0.7", workers=[address])[address]
    try:
        assert refusal(models, scheduler, tmp_path / "out") == (
            f"worker {address} has {name} 0.0.7, this run has {before}: install the same version on all workers"
        )
    finally:
        client.run(fault, before, workers=[address])


def test_a_worker_without_the_package_is_refused(
    models: Any, scheduler: Any, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_problem", cluster_faults.no_package)
    assert refusal(models, scheduler, tmp_path / "out").endswith(
        " cannot load nsds-gguf: ModuleNotFoundError: No module named 'nsds_gguf'; "
        f"install nsds-gguf {software()['nsds-gguf']} on all workers"
    )


def test_other_blas_kernels_are_told() -> None:
    needs = Requirements(software, {**software(), "BLAS kernels": "Z80"})
    assert needs.problem().endswith(": start this command and all workers with the same OPENBLAS_CORETYPE")


def test_damaged_weights_are_told_as_without_a_cluster(scheduler: Any, client: Any, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", replace(TINY, n_layers=1))
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\xff\x7f"  # a NaN of float16
    weights.write_bytes(data)
    told = []
    for address in (None, scheduler.scheduler_address):
        with pytest.raises(ModelError) as caught:
            converted(source, tmp_path / "out", replace(RTN, score_weight=1.0), address)
        told.append(str(caught.value))
    assert told[0] == told[1] and "1 NaN and 0 infinite" in told[0]


# --- no cluster -------------------------------------------------------------------------------------------------------


def test_without_dask_the_extra_is_named(models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.chdir(tmp_path)
    outcome = call("convert", models["dense"], "--target-bpw", 6, "--cluster")
    assert message(outcome, 9) == "--cluster needs Dask; run: pip install 'nsds-gguf[cluster]'"


def test_a_scheduler_that_does_not_answer_is_named(
    models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "WAIT_S", 0.5)
    monkeypatch.chdir(tmp_path)
    told = message(call("plan", models["dense"], "--target-bpw", 6, "--cluster", "tcp://127.0.0.1:1"), 9)
    assert told.startswith("cluster tcp://127.0.0.1:1: cannot connect: ")


# --- what stays bounded -----------------------------------------------------------------------------------------------


class Counted:
    """A future that counts those whose result nobody has taken."""

    outstanding = 0

    def __init__(self, value: int) -> None:
        self.value, self.cancelled = value, False
        Counted.outstanding += 1

    def result(self) -> int:
        Counted.outstanding -= 1
        return self.value

    def cancel(self) -> None:
        Counted.outstanding -= 1


def test_tasks_are_drawn_and_kept_as_few_as_the_limit() -> None:
    drawn, most = [], []

    def tasks() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    results: Generator[tuple[int, int], None, None] = in_order(lambda n: Counted(n * n), tasks(), lambda: 5)
    with closing(results):
        for task, result in results:
            most.append(Counted.outstanding)
            assert result == task**2 and drawn[-1] - task <= 4
            if task == 12:
                break
    assert max(most) == 4 and Counted.outstanding == 0


def test_scheduler_and_client_hold_a_bounded_number_of_results(
    models: Any, scheduler: Any, client: Any, tmp_path: Path
) -> None:
    held: list[int] = []

    def count() -> None:
        held.append(len(distributed.default_client().futures))
        held.append(sum(task.state != "released" for task in scheduler.scheduler.tasks.copy().values()))

    report = Watching("quantize and write", count)
    converted(models["dense"], tmp_path / "out", RTN, scheduler.scheduler_address, report)
    n_tensors = len(open_model(models["dense"]).tensors)
    assert len(held) == 2 * n_tensors > 2 * (2 * N_WORKERS)
    assert N_WORKERS < max(held) <= 2 * N_WORKERS


def test_tasks_carry_neither_factors_nor_the_weights_of_others(models: Any, tmp_path: Path) -> None:
    model = open_model(models["experts"])
    stack = next(tensor for tensor in model.tensors if len(tensor.shape) == 3)
    plain = model.by_name["blk.0.attn_output.weight"]
    store = FactorStore(tmp_path)
    store.add([plain.name], np.eye(plain.n_cols), 0.05)
    columns = {tensor.name: np.ones((*tensor.shape[:-2], tensor.n_cols), np.float32) for tensor in model.tensors
               if tensor.is_matrix}  # fmt: skip
    quantizers = TensorQuantizers("gptq", columns, store)
    for tensor in (stack, plain):
        quantizer = quantizers(tensor)
        assert quantizer.quantizer.squared_norms(tensor.rows(slice(0, 1))) > 0  # made, and not sent
        assert len(pickle.dumps(quantizer.for_rows(0))) < 4 * tensor.n_cols + 2500
    again = pickle.loads(pickle.dumps(quantizers(plain)))
    np.testing.assert_array_equal(again.quantizer.factors.upper, factor_hessian(np.eye(plain.n_cols)).upper)


def test_large_tasks_run_one_at_a_time_in_each_process(client: Any, tmp_path: Path) -> None:
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None) as local,
        connected(local.scheduler_address, 1, Requirements(software, software())) as workers,
    ):
        small = [most for _, most in workers.ordered(overlap, [tmp_path] * 9)]
        large = [most for _, most in workers.ordered(overlap, [tmp_path] * 9, is_large=True)]
    assert max(small) > 1 and set(large) == {1}
    assert [most for _, most in Threads(3).ordered(overlap, [tmp_path] * 4, is_large=True)] == [1] * 4


def overlap(folder: Path) -> int:
    """Return how many of these run at the same time."""
    own = folder / f"{time.monotonic_ns()}-{os.getpid()}"
    own.touch()
    time.sleep(0.05)
    found = len(list(folder.iterdir()))
    time.sleep(0.05)
    own.unlink()
    return found


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_ctrl_c_leaves_no_workers(models: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nsds_gguf", "convert", str(models["dense"]), "--target-bpw", "6", "--rounding",
             "gptq", "--calibration", "random", "--cluster", "local", "--threads", "2", "-v"]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert process.stderr is not None
    lines = until(process.stderr, "Cluster: ")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, lines + err
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, 10)
    assert not alive
    assert not list(tmp_path.glob("*.gguf"))


def until(stream: Iterable[str], start: str) -> str:
    """Read lines up to one with this start."""
    lines = ""
    for line in stream:
        lines += line
        if line.startswith(start):
            return lines
    raise AssertionError(lines)
