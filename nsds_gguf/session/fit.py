"""The largest file that fits a memory together with llama.cpp's KV cache, buffers and projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import allocate
from ..compute.torch_device import free_device_bytes, missing_cuda
from ..errors import PlanError, TargetError, VerifyError
from ..evaluate.texts import outline_file
from ..llamacpp import ggml, llama
from ..llamacpp.memory import Context, Memory, memory
from ..quantize.header import header_bytes
from ..records import Fit, Model, Options, Plan, Recipe
from ..system.resources import available_memory_bytes, free_nvidia_bytes
from ..system.workfolder import WorkFolder
from .run import Run
from .settle import settle

SHARE_OF_FREE = 0.9  # of the memory that is free now; the rest is for other programs and the driver
_SMALLEST_CTX = 512


@dataclass(frozen=True)
class Fitted:
    """A memory, and what goes into it; the whole file counts as weights."""

    fit: Fit
    memory: Memory

    @property
    def left_bytes(self) -> int:
        """What is left of the memory."""
        return self.fit.memory_bytes - self.memory.total

    def holding(self, plan: Plan) -> Fitted:
        """Return the same with the file of a plan."""
        return replace(self, memory=self.memory.holding(plan.file_bytes))

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {**asdict(self.fit), **asdict(self.memory), "total": self.memory.total, "left": self.left_bytes}


def machine_memory() -> tuple[int, str]:
    """Return the memory to fit, in bytes, and what it belongs to: the GPU if there is one, else this machine."""
    free = free_nvidia_bytes()
    if free is None and not missing_cuda():
        free = free_device_bytes()
    where = "the GPU" if free is not None else "this machine"
    return int(SHARE_OF_FREE * (available_memory_bytes() if free is None else free)), where


def fitted(model: Model, options: Options, run: Run, vision_bytes: int = 0) -> tuple[Options, Fitted | None]:
    """Return options with the budget that a memory leaves for the file, and what else goes into that memory.

    ``vision_bytes`` is the size of the vision part that is written too; a projector that the user names replaces it.

    Raises:
        PlanError: a second budget, or a type of the cache that the model's heads do not fit.
        TargetError: not even the smallest file fits; the message says what would.
        UnsupportedError: the memory that llama.cpp takes for this architecture is not known.

    """
    fit = options.fit
    if fit is None:
        return options, None
    _check_alone(options)
    fit = replace(fit, projector_bytes=fit.projector_bytes or vision_bytes)
    (beside,) = memory_beside_weights(model, [Context(fit.n_ctx, fit.cache_type)], run)
    beside = replace(beside, projector=fit.projector_bytes)
    room = fit.memory_bytes - beside.total
    smallest = smallest_file_bytes(model, settle(replace(options, fit=None, target_bpw=32.0), model).recipe)
    if room < smallest:
        raise TargetError(_too_small(model, fit, beside, smallest))
    return replace(options, fit=None, target_size=room), Fitted(fit, beside)


def _check_alone(options: Options) -> None:
    others = {
        "--target-bpw": options.target_bpw, "--target-size": options.target_size, "--uniform": options.uniform,
    }  # fmt: skip
    for option, value in others.items():
        if value is not None:
            raise PlanError(f"--fit and {option} are two budgets; drop one")


def memory_beside_weights(model: Model, contexts: Sequence[Context], run: Run) -> list[Memory]:
    """Return what llama.cpp keeps besides the weights, one entry per context.

    Formulas decide whether that is known; if llama.cpp can load an outline of the model, its own figures replace them.
    Raises ``UnsupportedError`` and ``PlanError`` as ``memory`` does.
    """
    found = [_calculated(model, context) for context in contexts]
    try:
        with (
            run.report.stage("ask llama.cpp for buffers"),
            WorkFolder(Path()) as files,
            outline_file(model, files) as path,
        ):
            return [_reported(path, context) for context in contexts]
    except VerifyError as error:
        run.report.say(f"Sizes of cache and buffers are calculated, since llama.cpp does not report them: {error}")
        return found


def _calculated(model: Model, context: Context) -> Memory:
    """Return what the formulas say."""
    keys = {key: entry.value for key, entry in model.metadata.items()}
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    return memory(model.architecture, keys, shapes, context)


def _reported(path: Path, context: Context) -> Memory:
    """Return what llama.cpp reports for the outline of a model."""
    found = llama.memory(path, context.n_ctx, ggml.TYPE_NUMBERS[context.cache_type.upper()])
    return Memory(
        weights=0,
        attention_cache=round(found["attention cache"]),
        states=round(found["recurrent states"]),
        compute=round(found["compute"]),
        output=round(found["output"]),
    )


def smallest_file_bytes(model: Model, recipe: Recipe) -> int:
    """Return the bytes of the file in which every tensor has its smallest type."""
    found = allocate.candidates(model, recipe.types, recipe.tensor_types)
    return header_bytes(model, recipe) + sum(each.cost(each.types[0], padded=True) for each in found)


def _too_small(model: Model, fit: Fit, beside: Memory, smallest: int) -> str:
    """Return the message of a model that does not fit, with the largest context that would, if any."""
    n_ctx = fit.n_ctx // 2
    while n_ctx >= _SMALLEST_CTX:
        less = _calculated(model, Context(n_ctx, fit.cache_type))
        if less.total + fit.projector_bytes + smallest <= fit.memory_bytes:
            break
        n_ctx //= 2
    advice = f"pass --ctx-size {n_ctx}" if n_ctx >= _SMALLEST_CTX else f"--fit {smallest + beside.total} would do"
    return (
        f"{model.name} does not fit {_mib(fit.memory_bytes)} with {fit.n_ctx} tokens of context: the smallest file "
        f"takes {_mib(smallest)}, the cache ({fit.cache_type}) {_mib(beside.attention_cache + beside.states)}, buffers "
        f"{_mib(beside.compute + beside.output)}"
        + (f", the projector {_mib(beside.projector)}" if beside.projector else "")
        + f"; {advice}"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
