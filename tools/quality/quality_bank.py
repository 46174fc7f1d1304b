"""Files of many plans of one model, assembled from tensors that are quantized once.

A tensor's bytes depend on its type, the rounding and the calibration, not on the types of the other tensors. The bank
keeps them on disk, so that a plan whose tensors are all known costs the time of copying a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quality_measure import build_digest, digest, original_plan

from nsds_gguf.allocate import Candidate, candidates
from nsds_gguf.llamacpp.gguf_header import read_gguf_header
from nsds_gguf.quantize.header import header_bytes, plan_header
from nsds_gguf.records import Plan, PlannedTensor, Recipe
from nsds_gguf.session.session import Session


class TensorBank:
    """The quantized tensors of one model under one rounding and calibration.

    Attributes:
        recipe: rounding, calibration and candidate types; plans are written by it, whatever allocated them.
        key: digest of what the bytes depend on besides the types.
    """

    def __init__(self, session: Session, recipe: Recipe, folder: Path) -> None:
        """Take the model; tensors go to a folder of their own below ``folder``."""
        self.session, self.recipe = session, recipe
        how = (recipe.rounding, recipe.calibration, recipe.device, str(recipe.seed))
        self.key = digest(session.model.model_id, *how, build_digest())
        self.folder = folder / f"tensors-{self.key[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, plan: Plan, path: Path) -> None:
        """Write the file of a plan: from the bank if it has all tensors, else by the session, which fills the bank."""
        plan = self.alike(plan)
        if all(self._place(tensor.name, tensor.type).is_file() for tensor in plan.tensors):
            self._assemble(plan, path)
            return
        self.session.write(plan, path)
        self._keep(path)

    def fill(self) -> None:
        """Quantize every tensor to each of its candidate types."""
        found = candidates(self.session.model, self.recipe.types)
        path = self.folder / ".level.gguf"
        for level in range(max(len(candidate.types) for candidate in found)):
            self.write(level_plan(self.session, found, level), path)
            path.unlink()

    def alike(self, plan: Plan) -> Plan:
        """Return the plan with the bank's rounding and calibration, in place of its own."""
        recipe = self.recipe.to(plan.recipe.target)
        return replace(plan, recipe=recipe, header_bytes=header_bytes(self.session.model, recipe))

    def _place(self, name: str, type_name: str) -> Path:
        return self.folder / f"{name}-{type_name}"

    def _assemble(self, plan: Plan, path: Path) -> None:
        with path.open("wb") as stream:
            stream.write(plan_header(self.session.model, plan))
            for tensor in plan.tensors:
                stream.write(self._place(tensor.name, tensor.type).read_bytes())
                stream.write(bytes(tensor.padded_bytes - tensor.n_bytes))

    def _keep(self, path: Path) -> None:
        with path.open("rb") as stream:
            for tensor in read_gguf_header(path).tensors:
                place = self._place(tensor.name, tensor.type)
                if place.is_file():
                    continue
                stream.seek(tensor.offset)
                temporary = place.with_name(f".{place.name}")
                temporary.write_bytes(stream.read(tensor.n_bytes))
                temporary.replace(place)


def level_plan(session: Session, found: Sequence[Candidate], level: int) -> Plan:
    """Return the plan that gives each tensor its candidate type number ``level``, or its last."""
    plan = original_plan(session)
    tensors = tuple(_at_level(tensor, c, level) for tensor, c in zip(plan.tensors, found, strict=True))
    return replace(plan, tensors=tensors)


def _at_level(tensor: PlannedTensor, candidate: Candidate, level: int) -> PlannedTensor:
    type_name = candidate.types[min(level, len(candidate.types) - 1)]
    return replace(tensor, type=type_name, n_bytes=candidate.n_bytes(type_name))
