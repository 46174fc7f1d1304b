"""The model card of a finished GGUF: README.md with the front matter that Hugging Face reads.

Everything in it comes from the file's own keys and tensors, the plan and the measurements. Unknown facts are left out;
where that matters, the card says so. Keys of the front matter: hub-docs, modelcard.md and
docs/hub/model-cards.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from gguf import Keys
from gguf.gguf_writer import GGUFValue

from ..evaluate.embedding import POOLINGS, EmbeddingCheck
from ..evaluate.inspect import FoundTensor, Inspection
from ..evaluate.perplexity import Perplexity
from ..evaluate.texts import spoken
from ..records import Plan

HUB = "https://huggingface.co"
PROJECT = "nsds-gguf"

_REPO = r"[\w][\w.-]*/[\w][\w.-]*"
_REPO_URL = re.compile(rf"https?://(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)({_REPO})/?", re.ASCII)
_CACHE_FOLDER = re.compile(
    r"models--([\w.-]+?)--([\w.-]+)", re.ASCII
)  # of huggingface_hub, for a downloaded repository

# Keys that name the repository of the model itself, not of its base model.
_SOURCE_KEYS = ("general.source.repo_url", "general.source.url", "general.repo_url", "general.url")


@dataclass(frozen=True)
class Origin:
    """The original of a model, as ``ORG/NAME`` on the Hub.

    Attributes:
        repos: the original or, with ``is_parent``, the base models that the original names.
        is_parent: whether the original itself is unknown.

    """

    repos: tuple[str, ...] = ()
    is_parent: bool = False


@dataclass(frozen=True)
class Facts:
    """The facts on a card.

    Attributes:
        file: the GGUF.
        metadata: its keys.
        origin: the original of the model.
        is_chat: whether it has a chat template.
        plan: the plan of the file.
        perplexity: its perplexity on ``text``.
        text: name of the evaluation text.
        command: the command that made it; empty where unknown.
        reference: the reference of the perplexity.
        embedding: the embedding check, instead of perplexity.
        projector: the file of the vision part and its bytes; ``None`` without one.

    """

    file: Inspection
    metadata: Mapping[str, GGUFValue]
    origin: Origin
    is_chat: bool
    plan: Plan | None = None
    perplexity: Perplexity | None = None
    text: str = ""
    command: str = ""
    reference: str | None = None
    embedding: EmbeddingCheck | None = None
    projector: tuple[str, int] | None = None

    @property
    def embeds(self) -> bool:
        """Whether it is an embedding model: its keys name a pooling type."""
        key = f"{self.file.architecture}.pooling_type"
        entry = self.metadata.get(key)
        return entry is not None and isinstance(entry.value, int) and entry.value in POOLINGS


def is_repo(text: str) -> bool:
    """Return whether a text is a valid name of a repository on the Hub."""
    return re.fullmatch(_REPO, text, re.ASCII) is not None


def find_origin(metadata: Mapping[str, GGUFValue], source: Path | None = None) -> Origin:
    """Return the original of a model from the path of a downloaded model folder, or from the GGUF's keys."""
    for part in source.absolute().parts if source is not None and source.is_dir() else ():
        if match := _CACHE_FOLDER.fullmatch(part):
            return Origin((f"{match[1]}/{match[2]}",))
    own = [repo for key in _SOURCE_KEYS if (repo := _repo(metadata.get(key)))]
    if own:
        return Origin((own[0],))
    count = metadata.get(Keys.General.BASE_MODEL_COUNT)
    n_parents = count.value if count is not None and type(count.value) is int else 0
    keys = [Keys.General.BASE_MODEL_REPO_URL.format(id=i) for i in range(min(n_parents, len(metadata)))]
    parents = tuple(repo for key in keys if (repo := _repo(metadata.get(key))))
    return Origin(parents, is_parent=bool(parents))


def _repo(entry: GGUFValue | None) -> str | None:
    match = _REPO_URL.fullmatch(str(entry.value)) if entry is not None else None
    return match[1] if match else None


def model_card(facts: Facts) -> str:
    """Return the text of README.md."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {_name(facts)} GGUF, {facts.file.bpw:.2f} bits per weight",
        _origin_sentence(facts.origin),
        _table(("", ""), _measured(facts)),
        "Bits per weight count all tensors; "
        + ("a cosine nearer 1 is better." if facts.embeds else "a lower perplexity and a lower divergence are better."),
        "## Types",
        _table(("tensors", "types", "weights", "bits per weight"), _types(facts.file.tensors)),
        "## How it was made",
        *_making(facts),
        "## How to run it",
        *_running(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """Return the front matter that Hugging Face reads, without keys of unknown value."""
    origin, metadata = facts.origin, facts.metadata
    found: dict[str, Any] = {}
    if origin.repos:
        found["base_model"] = origin.repos[0] if len(origin.repos) == 1 else list(origin.repos)
        if not origin.is_parent:
            found["base_model_relation"] = "quantized"
    found["quantized_by"] = _text(metadata, "general.quantized_by") or PROJECT
    found["library_name"] = "gguf"
    generates = "text-generation" if facts.projector is None else "image-text-to-text"
    found["pipeline_tag"] = "feature-extraction" if facts.embeds else generates
    if licence := _text(metadata, Keys.General.LICENSE):
        names = licence.split(",")
        found["license"] = licence if len(names) == 1 else names
        for key in ("name", "link"):
            if value := _text(metadata, f"general.license.{key}"):
                found[f"license_{key}"] = value
    if languages := _list(metadata, Keys.General.LANGUAGES):
        found["language"] = languages
    found["tags"] = list(dict.fromkeys(["gguf", PROJECT, *_list(metadata, Keys.General.TAGS)]))
    return found


def _origin_sentence(origin: Origin) -> str:
    links = " and ".join(f"[{repo}]({HUB}/{repo})" for repo in origin.repos)
    if not origin.repos:
        return "The repository of the original is not known, so this card names no base model."
    if origin.is_parent:
        return f"The repository of the original is not known; its metadata names {links} as its base."
    return f"Quantized from {links}."


def _measured(facts: Facts) -> list[tuple[str, str]]:
    """Return the rows of sizes and measurements."""
    file, found = facts.file, facts.perplexity
    rows = [
        ("file", f"`{Path(file.path).name}`"),
        ("bytes", f"{file.file_bytes:,}"),
        ("parameters", f"{file.n_weights:,}"),
        ("bits per weight, all tensors", f"{file.bpw:.4f}"),
        ("bits per weight, quantized tensors", f"{file.quantized_bpw:.4f}"),
        ("bits per weight, whole file", f"{file.file_bpw:.4f}"),
    ]
    if facts.projector is not None:
        rows.append(("vision part", f"`{facts.projector[0]}`, {facts.projector[1]:,} bytes"))
    if facts.embeds:
        return [*rows, _measured_embedding(facts)]
    if found is None:
        return [*rows, ("perplexity", "not measured")]
    on = f"{found.n_chunks} chunks of {found.n_ctx} tokens of {facts.text}"
    rows.append(("perplexity", f"{found.ppl:.4f} ± {found.ppl_error:.4f} ({on})"))
    compared = found.divergence
    if compared is None:
        return rows
    return [
        *rows,
        (
            f"perplexity of {spoken(facts.reference or 'reference')}",
            f"{compared.reference_ppl:.4f} ± {compared.reference_ppl_error:.4f}",
        ),
        ("ratio of the two", f"{compared.ppl_ratio:.4f} ± {compared.ppl_ratio_error:.4f}"),
        (
            f"mean KL divergence from {spoken(facts.reference or 'reference')}, nats per token",
            f"{compared.kld_mean:.6f} ± {compared.kld_error:.6f}",
        ),
        ("same top token", f"{100 * compared.same_top:.2f} % ± {100 * compared.same_top_error:.2f} %"),
    ]


def _measured_embedding(facts: Facts) -> tuple[str, str]:
    found = facts.embedding
    if found is None:
        return "cosine similarity to the original", "not measured"
    return (
        "cosine similarity of embeddings to the original's",
        f"mean {found.cosine_mean:.4f}, lowest {found.cosine_min:.4f} ({found.n_passages} passages of {facts.text})",
    )


def _types(tensors: Sequence[FoundTensor]) -> list[tuple[str, str, str, str]]:
    """Return a row per role of matrices, one for all vectors, and one for the whole file."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    rows = [
        _type_row(role, [t for t in matrices if t.role == role]) for role in dict.fromkeys(t.role for t in matrices)
    ]
    if vectors := [tensor for tensor in tensors if len(tensor.shape) <= 1]:
        rows.append(_type_row("vectors", vectors))
    return [*rows, _type_row("all", tensors)]


def _type_row(name: str, tensors: Sequence[FoundTensor]) -> tuple[str, str, str, str]:
    counts = Counter(tensor.type for tensor in tensors)
    types = ", ".join(kind if len(tensors) == 1 else f"{n} {kind}" for kind, n in counts.most_common())
    n_weights = sum(tensor.n_weights for tensor in tensors)
    return name, types, f"{n_weights:,}", f"{sum(tensor.n_bytes for tensor in tensors) * 8 / n_weights:.4f}"


def _making(facts: Facts) -> list[str]:
    ours = {key.removeprefix("nsds_gguf."): str(entry.value) for key, entry in facts.metadata.items()
            if key.startswith("nsds_gguf.")}  # fmt: skip
    if not ours:
        return ["The file does not say how it was made; nsds-gguf made this card and the files beside it."]
    lines = [
        "By nsds-gguf, without calibration data: it chooses a type for every tensor within the budget and checks the "
        "finished file against its plan." + (" Its perplexity is measured with llama.cpp." if facts.perplexity else "")
    ]
    if facts.command:
        lines.append(f"```sh\n{facts.command}\n```")
    versions = dict(facts.plan.versions) if facts.plan else {}
    if measured := facts.perplexity or facts.embedding:
        versions |= measured.versions
    rows = [*ours.items(), *((f"version of {name}", version) for name, version in versions.items())]
    return [*lines, _table(("", ""), [(name.replace("_", " "), f"`{value}`") for name, value in rows])]


def _running(facts: Facts) -> list[str]:
    name = Path(facts.file.path).name
    if facts.embeds:
        return [f"llama.cpp: `llama-embedding -m {name}`, the text after `-p`; `llama-server --embeddings -m {name}`"]
    command = "llama-cli" if facts.is_chat else "llama-completion"
    shell = _quoted(name)
    images = []
    if facts.projector is not None:
        images = [f"llama.cpp, with images: `llama-mtmd-cli -m {shell} --mmproj {_quoted(facts.projector[0])}`"]
    return [
        f"llama.cpp: `{command} -m {shell}`" + ("" if facts.is_chat else ", the text to continue after `-p`"),
        *images,
        "Ollama: `ollama create NAME -f Modelfile`, then `ollama run NAME`. The Modelfile describes its chat format.",
        f"LM Studio: `lms import {shell}`, or put the file two folders deep into the models folder.",
        "`sha256sum -c SHA256SUMS` checks that the files are complete.",
    ]


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name, re.ASCII) else f"'{name}'"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _name(facts: Facts) -> str:
    return " ".join(_text(facts.metadata, Keys.General.NAME).split()) or Path(facts.file.path).stem


def _text(metadata: Mapping[str, GGUFValue], key: str) -> str:
    entry = metadata.get(key)
    return "" if entry is None or isinstance(entry.value, list) else str(entry.value)


def _list(metadata: Mapping[str, GGUFValue], key: str) -> list[str]:
    entry = metadata.get(key)
    return [str(item) for item in entry.value] if entry is not None and isinstance(entry.value, list) else []
