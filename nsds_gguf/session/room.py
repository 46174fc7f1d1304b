"""Whether a run fits this machine, and how long it will take: asked before the heavy work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import allocate
from ..allocate import ALLOCATORS
from ..calibration.generated_text import LENGTH, N_TOKENS
from ..calibration.random_tokens import N_POSITIONS, N_SEQUENCES_HESSIANS
from ..evaluate.perplexity import needed_bytes
from ..evaluate.texts import ORIGINAL, VerifyOptions, embeds
from ..llamacpp import ggml
from ..quantize.gain_tuning import N_SEQUENCES
from ..quantize.header import header_bytes
from ..quantize.padding import laid_out
from ..records import ALIGNMENT_BYTES, Model, Plan, Recipe
from ..system.resources import check_disk, check_memory, lacks_memory
from .estimate import Work, duration, estimate_stages
from .original import fast_copy_bytes, is_own_original, original_bytes
from .run import Run
from .settle import rounds_by_hessians

# Working memory of scoring and writing, without the page cache: measured in tools/bench/bench.py.
BASE_MEMORY_BYTES = 400 << 20
THREAD_MEMORY_BYTES = 48 << 20


def working_bytes(run: Run) -> int:
    """Return the working memory of a run, without models that llama.cpp loads."""
    return BASE_MEMORY_BYTES + run.n_threads * THREAD_MEMORY_BYTES


def largest_file_bytes(model: Model, recipe: Recipe) -> int:
    """Return the largest size of a recipe's file: the budget, or less where the types cannot use it all."""
    model = laid_out(model, recipe)
    n_header = header_bytes(model, recipe)
    found = allocate.checked_candidates(model, recipe, n_header)
    ceiling = n_header + sum(candidate.cost(candidate.types[-1], padded=True) for candidate in found)
    if recipe.target is None:
        return ceiling
    if recipe.target.kind == "size":
        return min(ceiling, int(recipe.target.value))
    padding = ALIGNMENT_BYTES * len(found)
    return min(ceiling, n_header + int(recipe.target.value * model.n_weights / 8) + padding)


def check_room(
    model: Model, run: Run, folder: Path, sizes: Sequence[int], verifying: VerifyOptions, generates: bool
) -> None:
    """Raise ``OutputError`` when disk or memory are too small for a conversion.

    Args:
        model: the model.
        run: threads and reporter.
        folder: the folder of the outputs.
        sizes: largest bytes of each file.
        verifying: how to check the files.
        generates: whether the model generates calibration text.

    """
    needs_original = verifying.reference == ORIGINAL or (verifying.reference is None and embeds(model))
    compares = verifying.enabled and needs_original
    reference = original_bytes(model) if compares else 0
    written = 0 if is_own_original(model) else reference
    copy = fast_copy_bytes(model) if generates else 0
    beside = max(written, copy)  # never at the same time
    check_disk(folder, sum(sizes) + beside, "the output" + (" with a temporary copy of the model" if beside else ""))
    working = working_bytes(run)
    check_memory(working, "converting", "close other programs or lower --threads")
    if generates:
        check_memory(copy + working, "generating calibration text", "choose another --calibration")
    if verifying.enabled:
        remedy = "pass --no-verify" + (" or leave out --reference" if reference else "")
        check_memory(max(sizes, default=0) + reference + BASE_MEMORY_BYTES, "verification", remedy)


def lacks_room_for_original(model: Model, plan: Plan, n_ctx: int) -> tuple[str, ...]:
    """Return a note when the original does not fit in memory beside a finished file."""
    files = (plan.file_bytes, original_bytes(model))
    shortage = lacks_memory(BASE_MEMORY_BYTES + needed_bytes(files, model.hparams.n_vocab, n_ctx))
    return (f"The KL divergence from the original is not measured: it takes {shortage}.",) if shortage else ()


def tell_time(model: Model, run: Run, jobs: Sequence[Recipe | Plan], verifying: VerifyOptions, generates: bool) -> None:
    """Report the estimated time of a conversion and of its stages, from a short trial on this machine."""
    n_tokens = verifying.n_ctx * (verifying.n_chunks or 0) * len(jobs) * (2 if verifying.reference else 1)
    job = jobs[0]
    recipe = job.recipe if isinstance(job, Plan) else job
    allocator = ALLOCATORS[recipe.allocator]
    stages = estimate_stages(
        model,
        Work(
            types=_quantized_types(job) if isinstance(job, Plan) else recipe.types,
            n_files=len(jobs),
            scores=not isinstance(job, Plan) and recipe.metric is not None,
            measures=not isinstance(job, Plan) and allocator.needs_costs,
            passes=not isinstance(job, Plan) and allocator.predicts,
            n_tokens=n_tokens if verifying.enabled else 0,
            n_generated_tokens=(recipe.calibration_tokens or N_TOKENS) if generates else 0,
            n_hessian_tokens=_hessian_tokens(recipe),
            n_tuning_tokens=_tuning_tokens(recipe),
        ),
        run.n_threads,
    )
    run.report.say(
        f"{model.name}, {model.n_weights / 1e6:.1f}M parameters: about {duration(sum(s for _, s in stages))} with "
        f"{run.n_threads} threads."
    )
    run.report.expect(stages)


def _hessian_tokens(recipe: Recipe) -> int:
    """Return the number of tokens that Hessians are made of; 0 without Hessians."""
    if not rounds_by_hessians(recipe):
        return 0
    return recipe.calibration_tokens or N_SEQUENCES_HESSIANS * N_POSITIONS


def _tuning_tokens(recipe: Recipe) -> int:
    """Return the number of tokens on which gains of norms are tuned; 0 where they are not."""
    return min(recipe.calibration_tokens or N_TOKENS, N_SEQUENCES * LENGTH) if recipe.tune_norms else 0


def _quantized_types(plan: Plan) -> tuple[str, ...]:
    """Return the types in a plan that ggml quantizes to; other tensors are copied."""
    return tuple(sorted({tensor.type for tensor in plan.tensors} & set(ggml.TYPES))) or ("F32",)
