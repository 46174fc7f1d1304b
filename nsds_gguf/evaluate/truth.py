"""What a GGUF really is, whatever its name says: bits, types, and tensors that have other types than the name promises.

llama.cpp's presets name a type with blocks of 256. Where the rows of a tensor are not a multiple of 256, it takes a
larger type with blocks of 32 and keeps the name (``tensor_type_fallback`` in src/llama-quant.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import LlamaFileType
from gguf.constants import QK_K

from ..llamacpp import ggml
from .inspect import FoundTensor, Inspection

# Bits per weight of llama.cpp's presets on Llama 3.1 8B (tools/quantize/README.md).
USUAL_BPW = {
    "IQ1_S": 2.00, "IQ1_M": 2.15, "IQ2_XXS": 2.38, "IQ2_XS": 2.59, "IQ2_S": 2.74, "IQ2_M": 2.93, "IQ3_XXS": 3.25,
    "IQ3_XS": 3.50, "IQ3_S": 3.66, "IQ3_M": 3.76, "IQ4_XS": 4.46, "IQ4_NL": 4.68, "Q2_K_S": 2.97, "Q2_K": 3.16,
    "Q3_K_S": 3.64, "Q3_K_M": 4.00, "Q3_K_L": 4.30, "Q4_K_S": 4.67, "Q4_K_M": 4.89, "Q5_K_S": 5.57, "Q5_K_M": 5.70,
    "Q6_K": 6.56, "Q4_0": 4.66, "Q4_1": 5.13, "Q5_0": 5.59, "Q5_1": 6.07, "Q8_0": 8.50, "F16": 16.0, "BF16": 16.0,
    "F32": 32.0, "Q2_0": 2.25,
}  # fmt: skip
TOLERANCE = 0.15  # of the usual bits per weight, beyond which a name misleads about the size

# The types that tensor_type_fallback gives to rows that are not a multiple of 256, or not of 32.
_FALLBACKS = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16")
_SMALL_BLOCKS = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_0", "F16", "BF16", "F32")

_TYPES = frozenset(ggml.TYPE_NUMBERS)
_NAMES = "|".join(sorted({*USUAL_BPW, "Q3_K", "Q4_K", "Q5_K"}, key=lambda name: -len(name)))
_CLAIM = re.compile(rf"(?<![A-Z0-9])(?P<own>UD[-_])?(?P<type>{_NAMES})(?P<size>_X?[SLM]+)?(?![A-Z0-9])")
_OWN_BPW = re.compile(r"(\d+)_(\d{2})BPW")
_SHOWN_TYPES, _SHOWN_SHARE = 4, 0.005
_LARGE_SHARE = 0.5  # of the weights in larger types, beyond which a name misleads about the types


@dataclass(frozen=True)
class Truth:
    """What a file is, and what its name says.

    Attributes:
        file: name of the file.
        claim: preset or budget that the name states, else the preset of ``general.file_type``; empty without either.
        source: where the claim stands: ``name``, ``general.file_type`` or empty.
        claimed_bpw: bits per weight that the claim stands for; ``None`` if it stands for none.
        bpw: bits over the weights of all tensors.
        file_bytes: bytes of all files.
        shares: share of the bytes by type, largest first.
        n_matrices: matrices of the file.
        fallbacks: names of tensors in larger types than the claim, since their rows are not a multiple of 256.
        fallback_share: their share of the weights.
        lies: how types or bits contradict the claim; empty if they do not.
    """

    file: str
    claim: str
    source: str
    claimed_bpw: float | None
    bpw: float
    file_bytes: int
    shares: dict[str, float]
    n_matrices: int
    fallbacks: tuple[str, ...]
    fallback_share: float
    lies: str

    @property
    def line(self) -> str:
        """The record as one line for people."""
        shown = [entry for entry in self.shares.items() if entry[1] >= _SHOWN_SHARE][:_SHOWN_TYPES]
        types = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shown)
        parts = [f"{self.file}: {self.bpw:.2f} bpw, {self.file_bytes / 1e6:,.0f} MB; bytes: {types}"]
        if self.fallbacks:
            parts.append(
                f"{len(self.fallbacks)} of {self.n_matrices} matrices ({100 * self.fallback_share:.0f} % of the "
                "weights) are fallbacks: rows are not a multiple of 256"
            )
        if self.claim:
            verdict = f"misleads: {self.lies}" if self.lies else "is true"
            parts.append(f"the {self.source} {self.claim} {verdict}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {**vars(self), "line": self.line}


def truth(found: Inspection) -> Truth:
    """Return what an inspected file is."""
    claim, source = _claim(found)
    matrices = [tensor for tensor in found.tensors if len(tensor.shape) > 1]
    n_bytes = sum(tensor.n_bytes for tensor in found.tensors)
    shares = {name: held / n_bytes for name, held in found.bytes_by_type().items()} if n_bytes else {}
    fallbacks = [tensor for tensor in matrices if _promises_large_blocks(claim, found) and _is_fallback(tensor)]
    fallback_share = sum(tensor.n_weights for tensor in fallbacks) / (found.n_weights or 1)
    return Truth(
        file=Path(found.path).name,
        claim=claim,
        source=source,
        claimed_bpw=_claimed_bpw(claim),
        bpw=found.bpw,
        file_bytes=found.file_bytes,
        shares=shares,
        n_matrices=len(matrices),
        fallbacks=tuple(tensor.name for tensor in fallbacks),
        fallback_share=fallback_share,
        lies=_lies(found, claim, fallback_share),
    )


def _claim(found: Inspection) -> tuple[str, str]:
    """Return what the name, or else ``general.file_type``, says of the types, and where."""
    name = Path(found.path).name.upper()
    own = _OWN_BPW.search(name)
    if own is not None:
        return own[0], "name"
    match = _CLAIM.search(name)
    if match is not None:
        return f"{match['own'] or ''}{match['type']}{match['size'] or ''}".replace("UD_", "UD-"), "name"
    number = found.metadata.get("general.file_type")
    known = {member.value: member.name for member in LlamaFileType}
    if found.made_by_us or number not in known:
        return "", ""  # in our files it is the type with most bytes, which promises nothing
    preset = known[number].removeprefix("MOSTLY_").removeprefix("ALL_")
    return (preset, "general.file_type") if preset in USUAL_BPW else ("", "")


def _claimed_bpw(claim: str) -> float | None:
    """Return the bits per weight of a claim; ``None`` for names that are not llama.cpp's (``UD-``, ``_XL``)."""
    own = _OWN_BPW.fullmatch(claim)
    return float(f"{own[1]}.{own[2]}") if own is not None else USUAL_BPW.get(claim)


def _promises_large_blocks(claim: str, found: Inspection) -> bool:
    return bool(found.made_by_us) or bool(claim and not claim.startswith(_SMALL_BLOCKS))


def _is_fallback(tensor: FoundTensor) -> bool:
    return tensor.shape[-1] % QK_K != 0 and tensor.type in _FALLBACKS


def _lies(found: Inspection, claim: str, fallback_share: float) -> str:
    """Return how types or bits contradict a claim."""
    wrong, claimed_bpw = [], _claimed_bpw(claim)
    base = re.sub(r"^UD-|(?<=_K)_X?[SML]+$", "", claim)
    has_base = any(len(tensor.shape) > 1 and tensor.type == base for tensor in found.tensors)
    if base in _TYPES and not base.startswith("IQ") and not has_base:  # presets of IQ types mix several of them
        wrong.append(f"no matrix is {base}")
    elif base in _TYPES and fallback_share > _LARGE_SHARE:
        wrong.append(f"{100 * fallback_share:.0f} % of the weights have larger types")
    if claimed_bpw is not None and abs(found.bpw / claimed_bpw - 1) > TOLERANCE:
        kind = "is" if _OWN_BPW.fullmatch(claim) else "usually is"
        wrong.append(f"it {kind} {claimed_bpw:.2f} bpw")
    return ", ".join(wrong)
