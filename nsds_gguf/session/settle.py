"""From options to a recipe: the one place that knows defaults and makes the choices that users leave open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..allocate import ALLOCATORS, check_type, default_types
from ..calibration import CALIBRATIONS, generated_text
from ..calibration.imatrix import IMATRIX, Imatrix, read_imatrix
from ..compute import BACKENDS
from ..compute.decoder import what_is_missing
from ..errors import PlanError, RecordError
from ..evaluate.texts import embeds, predicts
from ..llamacpp import ggml
from ..metrics import METRICS, SE_READINGS
from ..quantize import ROUNDINGS
from ..quantize.header import header_bytes
from ..quantize.padding import WIDTH, padding_obstacle
from ..records import AUTO, K_TYPES, UNQUANTIZED, Model, Options, Recipe, Scores
from .device import choose_device
from .original import PLAIN
from .pad import settle_padding

# Models with more weights are rounded by GPTQ only on request. A billion parameters take about eight minutes on two
# cores, and 4 GB of disk for Hessians (docs/log.md, 2026-11-28).
GPTQ_WEIGHTS = 10 * 10**9

DEFAULT_ALLOCATOR, DEFAULT_METRIC, DEFAULT_SE = "fisher", "nsds", "product"
# Calibrations: text that the model generates, random tokens, gains of norms.
GENERATED, RANDOM, NORM = "generated", "random", "norm"


@dataclass(frozen=True)
class Settled:
    """A recipe, its importance matrix, and notes on the choices that the user left open.

    ``alternative`` is another recipe to plan by, of which the plan with less predicted divergence counts.
    """

    recipe: Recipe
    imatrix: Imatrix | None = None
    notes: tuple[str, ...] = ()
    alternative: Recipe | None = None

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipe and its alternative."""
        return (self.recipe,) if self.alternative is None else (self.recipe, self.alternative)


def settle(options: Options, model: Model, scores: Scores | None = None, *, scores_layers: bool = False) -> Settled:
    """Return the recipe of options for a model.

    Args:
        options: the options.
        model: the opened model.
        scores: scores of an earlier run; they decide an open rounding, calibration and metric.
        scores_layers: whether to score layers in any case, as ``score`` does.

    Raises:
        PlanError: options contradict one another, are unknown, or do not apply to this model.
        RecordError: the importance matrix cannot be read, or is not the one that the scores were made with.

    """
    _check_contradictions(options)
    imatrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    allocator = _allocator(options)
    types = _types(options, model, allocator, scores)
    metric, se = _metric(options, allocator, scores, scores_layers)
    rounding, calibration, note = _rounding(replace(options, types=types), model, allocator, scores)
    calibration = imatrix.name if imatrix is not None else calibration
    device, device_note = choose_device(options.device, model)
    recipe = Recipe(
        target=options.target,
        allocator=allocator,
        types=types,
        tensor_types=options.tensor_types,
        rounding=rounding,
        calibration=calibration,
        metric=metric,
        se=se,
        score_weight=options.score_weight or ALLOCATORS[allocator].score_weight,
        prefer=options.prefer,
        seed=options.seed,
        allocation_seed=options.seed,
        device=device,
        calibration_tokens=_calibration_tokens(options, calibration, scores),
        tune_norms=options.tune_norms,
    )
    recipe, alternative = settle_padding(options.pad, model, recipe, scores)
    check_possible(model, recipe)
    check_imatrix(model, recipe, imatrix)
    return Settled(recipe, imatrix, tuple(each for each in (note, device_note) if each), alternative)


def check_imatrix(model: Model, recipe: Recipe, imatrix: Imatrix | None) -> None:
    """Raise ``RecordError`` for an importance matrix of another model, or another than the recipe names."""
    if imatrix is not None:
        imatrix.weights(model)
    if recipe.calibration.startswith(IMATRIX) and (imatrix is None or imatrix.name != recipe.calibration):
        raise RecordError(f"made with the importance matrix {recipe.calibration}: pass that file with --imatrix")


def check_possible(model: Model, recipe: Recipe) -> None:
    """Raise ``PlanError`` for a recipe with unknown names, or one that does not work for the model."""
    if recipe.padding not in (None, WIDTH):
        raise PlanError(f"padding {recipe.padding!r} is not known; wanted {WIDTH}")
    if recipe.padding is not None and (obstacle := padding_obstacle(model)):
        raise PlanError(f"{model.name} cannot be padded: {obstacle}")
    _known("allocator", recipe.allocator, ALLOCATORS)
    rounding = ROUNDINGS[_known("rounding", recipe.rounding, ROUNDINGS)]
    from_file = recipe.calibration.startswith(IMATRIX)
    if not from_file:
        _known("calibration", recipe.calibration, CALIBRATIONS)
    _known("device", recipe.device, BACKENDS)
    if recipe.metric is not None:
        _known("metric", recipe.metric, METRICS)
    if recipe.se is not None:
        _known("SE reading", recipe.se, SE_READINGS)
    if rounding.needs_hessians and (from_file or not CALIBRATIONS[recipe.calibration].has_hessians):
        with_hessians = [name for name, calibration in CALIBRATIONS.items() if calibration.has_hessians]
        raise PlanError(
            f"--rounding {recipe.rounding} needs Hessians, which --calibration {recipe.calibration.partition(':')[0]} "
            f"does not have; pass --calibration {' or '.join(with_hessians)}"
        )
    if recipe.tune_norms:
        _check_tunable(model, recipe)
    missing = what_is_missing(model) if rounds_by_hessians(recipe) and recipe.calibration == RANDOM else ""
    if missing:
        raise PlanError(
            f"--rounding {recipe.rounding} on random tokens cannot follow {missing} of {model.name}; pass "
            f"--calibration {GENERATED}, which llama.cpp computes"
        )


def _check_tunable(model: Model, recipe: Recipe) -> None:
    """Raise ``PlanError`` where the gains of norms cannot be tuned."""
    if recipe.calibration != GENERATED:
        calibration = recipe.calibration.partition(":")[0]
        raise PlanError(
            f"--tune-norms takes text that the model generates, and the calibration is {calibration}; drop it, or pass "
            f"--calibration {GENERATED}"
        )
    if not predicts(model):
        raise PlanError(f"--tune-norms compares predictions, which {model.name} does not make; drop it")
    missing = what_is_missing(model)
    if missing:
        raise PlanError(f"--tune-norms cannot follow {missing} of {model.name}; drop it")


def rounds_by_hessians(recipe: Recipe) -> bool:
    """Return whether the recipe rounds any type with Hessians."""
    return ROUNDINGS[recipe.rounding].needs_hessians and not set(recipe.types) <= set(UNQUANTIZED)


def weighs_columns(recipe: Recipe, types: set[str]) -> bool:
    """Return whether the rounding to any of the types uses column weights."""
    weighing = {name for name, row in ggml.TYPES.items() if row.weighs_columns}
    if ROUNDINGS[recipe.rounding].needs_hessians:
        weighing = types - set(UNQUANTIZED)
    return recipe.calibration != "none" and not weighing.isdisjoint(types)


def _check_contradictions(options: Options) -> None:
    if options.target_bpw is not None and options.target_size is not None:
        raise PlanError("--target-bpw and --target-size are two budgets; drop one")
    if options.uniform is not None:
        check_type(options.uniform, "--uniform")
        if options.allocator not in (AUTO, "uniform"):
            raise PlanError(f"--uniform and --allocator {options.allocator} contradict each other; drop one")
    elif options.allocator == "uniform":
        raise PlanError("allocator uniform needs a type: --uniform TYPE")
    if options.imatrix is not None and options.calibration != AUTO:
        raise PlanError(f"--imatrix and --calibration {options.calibration} contradict each other; drop one")


def _allocator(options: Options) -> str:
    if options.uniform is not None:
        return "uniform"
    name = DEFAULT_ALLOCATOR if options.allocator == AUTO else options.allocator
    return _known("allocator", name, ALLOCATORS)


def _types(options: Options, model: Model, allocator: str, scores: Scores | None) -> tuple[str, ...]:
    """Return the candidate types; open ones fit the budget, and are among those that the scores measured."""
    if options.uniform is not None:
        return (options.uniform.upper(),)
    chosen = ALLOCATORS[allocator].types or options.types
    if chosen is not None:
        return chosen
    if not ALLOCATORS[allocator].needs_costs:
        return K_TYPES
    target = options.target
    n_header = header_bytes(model, PLAIN) if target is not None and target.kind == "size" else 0
    types = default_types(model, target, options.tensor_types, n_header)
    if scores is None or not scores.costs:
        return types
    return tuple(name for name in types if name in scores.recipe.types) or scores.recipe.types


def _metric(
    options: Options, allocator: str, scores: Scores | None, scores_layers: bool
) -> tuple[str | None, str | None]:
    """Return the layer metric and the reading of SE, ``None`` where nothing uses them.

    A named metric that nothing would use is refused.
    """
    found = scores.recipe if scores is not None else None
    for name, option in (("metric", options.metric), ("se", options.se)):
        if found is not None and option not in (AUTO, getattr(found, name)):
            raise PlanError(
                f"the scores were made with {name} {getattr(found, name) or 'none'}, not --{name} {option}; "
                "score again or drop the option"
            )
    if not scores_layers and not ALLOCATORS[allocator].uses_layers(options.score_weight):
        for option, value in (("--metric", options.metric), ("--se", options.se)):
            if value != AUTO and scores is None:
                raise PlanError(
                    f"{option} {value} has no effect with allocator {allocator} and --score-weight "
                    f"{options.score_weight:g}; drop it, pass --score-weight, or choose --allocator paper"
                )
        return None, None
    metric = _open(options.metric, (found.metric if found else None) or DEFAULT_METRIC)
    _known("metric", metric, METRICS)
    if metric != "nsds":
        if options.se != AUTO:
            raise PlanError(f"--se {options.se} applies to metric nsds, the metric is {metric}; drop one")
        return metric, None
    return metric, _known("SE reading", _open(options.se, (found.se if found else None) or DEFAULT_SE), SE_READINGS)


def _rounding(options: Options, model: Model, allocator: str, scores: Scores | None) -> tuple[str, str, str]:
    """Return rounding and calibration, and a note where an open rounding falls back to round-to-nearest."""
    if ALLOCATORS[allocator].needs_costs and scores is not None and scores.costs:
        return (
            _open(options.rounding, scores.recipe.rounding),
            _open(options.calibration, scores.recipe.calibration),
            "",
        )
    obstacle = _against_gptq(options, model, allocator) if options.rounding == AUTO else ""
    rounding = _open(options.rounding, "rtn" if obstacle else "gptq")
    needs_hessians = ROUNDINGS[_known("rounding", rounding, ROUNDINGS)].needs_hessians
    without_text = NORM if ALLOCATORS[allocator].by_role else RANDOM
    calibration = _open(options.calibration, GENERATED if needs_hessians and not embeds(model) else without_text)
    is_own_choice = not ALLOCATORS[allocator].predicts or options.calibration not in (AUTO, GENERATED)
    return rounding, calibration, "" if is_own_choice or options.imatrix is not None else _rtn_note(obstacle)


def _calibration_tokens(options: Options, calibration: str, scores: Scores | None) -> int | None:
    """Return how many tokens the model generates; ``None`` where it generates none, and none are asked for."""
    if calibration == GENERATED:
        measured = None if scores is None else scores.recipe.calibration_tokens
        return options.calibration_tokens or measured or generated_text.N_TOKENS
    if options.calibration_tokens is not None:
        raise PlanError(
            f"--calibration-tokens counts text that the model generates, and the calibration is {calibration}; drop "
            f"it, or pass --calibration {GENERATED}"
        )
    return None


def _rtn_note(obstacle: str) -> str:
    if not obstacle:
        return ""
    return (
        f"Weights are rounded to nearest (--rounding rtn) because {obstacle}; --rounding gptq loses less in the same "
        "bytes."
    )


def _against_gptq(options: Options, model: Model, allocator: str) -> str:
    """Return why an open rounding is not GPTQ; empty where it is."""
    if not ALLOCATORS[allocator].predicts:
        return f"the allocator is {allocator}"
    if options.imatrix is not None:
        return "an importance matrix sets the column weights"
    if options.calibration not in (AUTO, GENERATED):
        return f"the calibration is {options.calibration}"
    if set(options.types or ()) <= set(UNQUANTIZED):
        return "no type is quantized"
    if embeds(model):
        return "the model computes embeddings and generates no text"
    if not predicts(model) or "tokenizer.ggml.model" not in model.metadata:
        return "the model does not generate text"
    if model.n_weights > GPTQ_WEIGHTS:
        return f"the model has {model.n_weights / 1e9:.1f}B parameters"
    return ""


def _open(value: str, default: str) -> str:
    return default if value == AUTO else value


def _known(kind: str, name: str, known: Mapping[str, object]) -> str:
    if name not in known:
        raise PlanError(f"{kind} {name!r} is not known; wanted one of {', '.join(known)}")
    return name
