"""Measure what NSDS is worth: as the paper's allocation, as a factor on Fisher sensitivities, and alone.

    python tools/quality/nsds_study.py --work DIR --text FILE --model NAME=PATH [--model ...] [--chunks N]

Three questions, each answered by the divergence of files of equal bytes from the original:

* paper: whole layers at Q2_K or Q4_K, round-to-nearest. Which metric ranks the layers best, and is it better than
  random orders? Models whose rows do not fit K-quants are left out.
* factor: does ``exp(g (S - mean S))`` on the Fisher sensitivities of a layer's tensors lower the divergence of the
  knapsack's plan, under round-to-nearest and GPTQ?
* alone: sensitivities without Fisher pass, from the role of a tensor and NSDS, against moment propagation.

Everything measured is kept in ``--work``; a second run measures only what is missing. ``nsds_page.py`` makes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from nsds_priors import LAYERS_ALONE, Priors
from quality_bank import TensorBank
from quality_measure import Bench, Passage, Yardstick, digest, halves, planned
from quality_model import DEFAULT, FREE
from quality_sensitivity import with_factors
from quality_zoo import NSDS_WEIGHTS, PAPER_BITS, PAPER_METRICS

from nsds_gguf.allocate import candidates
from nsds_gguf.comparison import exact_bpw
from nsds_gguf.evaluate.texts import read_text
from nsds_gguf.metrics import score_layers
from nsds_gguf.read import open_model
from nsds_gguf.records import LayerScore, Plan, Recipe, Scores, Target
from nsds_gguf.session.run import Run
from nsds_gguf.session.session import Session
from nsds_gguf.system.workfolder import WorkFolder

PAPER, FACTOR, ALONE = "paper", "factor", "alone"
QUESTIONS = (PAPER, FACTOR, ALONE)

FISHER, RANDOM_ORDER = "knapsack", "random order"
N_RANDOM_ORDERS = 4

ROUNDINGS = {"rtn": FREE, "gptq": DEFAULT}

# Budgets in bits per weight, where rows fit K-quants and where they do not.
K_BUDGETS, NARROW_BUDGETS = (3.0, 3.5, 4.25), (4.75, 5.25, 6.0)

REAL_WEIGHTS = 50_000_000  # models with more count as real, others as of the trained zoo


@dataclass(frozen=True)
class Row:
    """One file: what it answers, and per chunk its divergence from the original, nats per token.

    ``predicted`` is the divergence by Fisher sensitivities without factor, whatever allocated the types.
    """

    question: str
    rounding: str
    budget: str
    kind: str
    tensor_bytes: int
    bpw: float
    predicted: float
    chunks: tuple[float, ...]


class Study:
    """One model under study."""

    def __init__(self, name: str, source: Path, folder: Path, passage: Passage, n_threads: int) -> None:
        """Open the model in ``source``; ``folder`` keeps what is measured."""
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)
        files = WorkFolder(folder, ("study.gguf",), resume=True)
        self.bench = Bench(Session(open_model(source), Run(n_threads), files), folder)
        self.passage = passage

    @property
    def session(self) -> Session:
        """The stages on the model."""
        return self.bench.session

    @cached_property
    def yardstick(self) -> Yardstick:
        """The original's logits."""
        return self.bench.yardstick(self.passage)

    @cached_property
    def has_k_rows(self) -> bool:
        """Whether the rows of most weights fit K-quants."""
        found = candidates(self.session.model, FREE.types)
        narrow = sum(c.tensor.n_weights for c in found if c.kind == "fallback")
        return narrow < self.session.model.n_weights / 2

    @cached_property
    def layers(self) -> Mapping[str, tuple[LayerScore, ...]]:
        """Scores of the layers by metric and reading."""
        return {name: self._layers(*which) for name, which in PAPER_METRICS.items()}

    def _layers(self, metric: str, se: str) -> tuple[LayerScore, ...]:
        place = self.folder / f"layers-{metric}-{se}.json"
        if not place.is_file():
            found, _ = score_layers(self.session.model, metric, se)
            place.write_text(json.dumps([asdict(layer) for layer in found]), encoding="utf-8")
        return tuple(LayerScore(**values) for values in json.loads(place.read_text(encoding="utf-8")))

    def scores(self, rounding: str) -> Scores:
        """Return sensitivities and errors under a rounding; measured once."""
        recipe = ROUNDINGS[rounding]
        place = self.folder / f"scores-{self.bank(rounding).key[:16]}.json"
        if not place.is_file():
            place.write_text(json.dumps(self.session.score(recipe).to_json()), encoding="utf-8")
        return Scores.from_json(json.loads(place.read_text(encoding="utf-8")))

    def bank(self, rounding: str) -> TensorBank:
        """Return the bank of a rounding."""
        return TensorBank(self.session, ROUNDINGS[rounding], self.folder)

    def run(self, question: str, rounding: str) -> dict[str, Any]:
        """Answer a question under a rounding, and return what was measured with what is known of the model."""
        rows = []
        self.bank(rounding).fill()
        for budget, kind, scores, recipe in getattr(self, question)(rounding):
            found = self.measured(rounding, planned(self.session, recipe, scores))
            rows.append(Row(question, rounding, budget, kind, *found))
            mean = np.mean(rows[-1].chunks)
            print(f"{self.name} {question} {rounding} {budget} {kind}: {mean:.5f}", file=sys.stderr, flush=True)
        model = self.session.model
        group = "real" if model.n_weights > REAL_WEIGHTS else "trained zoo"
        return {
            "name": self.name,
            "group": group if self.has_k_rows else f"{group}, rows that fit no K-quant",
            "n_layers": model.hparams.n_layers,
            "n_weights": model.n_weights,
            "text": self.passage.name,
            "n_chunks": self.passage.n_chunks,
            "rows": [asdict(row) for row in rows],
        }

    # --- questions: budget, kind, scores and recipe of each plan --------------------------------------------------

    def paper(self, rounding: str) -> Iterator[tuple[str, str, Scores, Recipe]]:
        """Yield the plans of the paper's allocator, and the knapsack's at their bytes."""
        if not self.has_k_rows:
            return
        base, free = self.scores(rounding), ROUNDINGS[rounding]
        for bits in PAPER_BITS:
            target = paper_target(self.session, bits)
            for name, layers in self.orders():
                yield f"{bits:g}", name, replace(base, layers=layers), replace(free.to(target), allocator="paper")
            yield f"{bits:g}", FISHER, base, free.to(target)

    def orders(self) -> Iterator[tuple[str, tuple[LayerScore, ...]]]:
        """Yield what ranks the layers: every metric, then random numbers."""
        yield from self.layers.items()
        for seed in range(N_RANDOM_ORDERS):
            values = np.random.default_rng(seed).random(self.session.model.hparams.n_layers)
            yield f"{RANDOM_ORDER} {seed}", tuple(map(LayerScore, range(len(values)), values))

    def factor(self, rounding: str) -> Iterator[tuple[str, str, Scores, Recipe]]:
        """Yield the knapsack's plans with NSDS as a factor, by reading and weight."""
        base = self.scores(rounding)
        for budget in self.budgets:
            for weight in NSDS_WEIGHTS:
                for reading in ("product", "ratio") if weight else ("product",):
                    scores = with_factors(base, layer_factors(self.layers[f"nsds, {reading}"], weight))
                    yield f"{budget:g}", factor_name(weight, reading), scores, self._free(rounding, budget)

    def alone(self, rounding: str) -> Iterator[tuple[str, str, Scores, Recipe]]:
        """Yield the knapsack's plans with sensitivities found without the Fisher pass."""
        base = self.scores(rounding)
        priors = Priors(self.session.model, {r: self.layers[f"nsds, {r}"] for r in ("product", "ratio")})
        for budget in self.budgets:
            for name in LAYERS_ALONE:
                costs = tuple(replace(c, sensitivity=priors.sensitivity(name, c.name)) for c in base.costs)
                yield f"{budget:g}", name, replace(base, costs=costs), self._free(rounding, budget)
            yield f"{budget:g}", FISHER, base, self._free(rounding, budget)

    @property
    def budgets(self) -> Sequence[float]:
        """Bits per weight that the knapsack's plans get."""
        return K_BUDGETS if self.has_k_rows else NARROW_BUDGETS

    def _free(self, rounding: str, bpw: float) -> Recipe:
        return ROUNDINGS[rounding].to(Target("bpw", bpw))

    # --- files ----------------------------------------------------------------------------------------------------

    def measured(self, rounding: str, plan: Plan) -> tuple[int, float, float, tuple[float, ...]]:
        """Return a plan's tensor bytes, bpw, predicted divergence, and divergence by chunk.

        Plans of the same types are measured once.
        """
        bank = self.bank(rounding)

        @contextmanager
        def file() -> Iterator[Path]:
            path = self.folder / ".study.gguf"
            try:
                bank.write(plan, path)
                yield path
            finally:
                path.unlink(missing_ok=True)

        recipe = digest(bank.key, json.dumps([(tensor.name, tensor.type) for tensor in plan.tensors]))
        (found,) = self.bench.measure(recipe, file, [self.yardstick])
        return plan.tensor_bytes, plan.bpw, self.predicted(rounding, plan), found.kld

    def predicted(self, rounding: str, plan: Plan) -> float:
        """Return the sum of Fisher sensitivity times error over the tensors, nats per token."""
        types = {tensor.name: tensor.type for tensor in plan.tensors}
        errors = ((cost.sensitivity, cost.errors.get(types[cost.name])) for cost in self.scores(rounding).costs)
        return sum(sensitivity * error for sensitivity, error in errors if error is not None)


def layer_factors(layers: Sequence[LayerScore], weight: float) -> dict[int, float]:
    """Return ``exp(weight (S - mean S))`` by layer."""
    mean = float(np.mean([layer.score for layer in layers]))
    return {layer.layer: float(np.exp(weight * (layer.score - mean))) for layer in layers}


def factor_name(weight: float, reading: str) -> str:
    """Return the kind of a plan with the factor."""
    return f"{weight:g} {reading}" if weight else "0"


def paper_target(session: Session, bits: float) -> Target:
    """Return the bytes of so many layers at 4 bits that their mean is ``bits``, the others at 2, the rest at 4.

    Layers are taken to be equally large.
    """
    small, large = (planned(session, replace(FREE, allocator="uniform", types=(name,))) for name in ("Q2_K", "Q4_K"))
    n_layers = session.model.hparams.n_layers
    n_high = round(n_layers * (bits - 2) / 2)
    per_layer = [sum(t.n_bytes for t in plan.tensors if t.layer is not None) // n_layers for plan in (small, large)]
    n_bytes = large.tensor_bytes - (n_layers - n_high) * (per_layer[1] - per_layer[0])
    return Target("bpw", exact_bpw(n_bytes, session.model.n_weights))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is measured; may be an earlier run's")
    parser.add_argument("--text", type=Path, required=True, help="its second half is measured on")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="folder or GGUF")
    parser.add_argument("--questions", default=",".join(QUESTIONS))
    parser.add_argument("--roundings", default=",".join(ROUNDINGS), help="of the question factor")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main() -> int:
    arguments = parser().parse_args()
    passage = Passage(arguments.text.stem, "final", halves(read_text(arguments.text))[1], arguments.chunks)
    for model in arguments.model:
        name, _, path = model.partition("=")
        study = Study(name, Path(path), arguments.work / name, passage, arguments.threads)
        for question in arguments.questions.split(","):
            for rounding in arguments.roundings.split(",") if question == FACTOR else ("rtn",):
                found = study.run(question, rounding)
                (study.folder / f"{question}-{rounding}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
