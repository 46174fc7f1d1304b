"""A parser of Modelfiles, written from what Ollama documents of them (docs/modelfile.md): the oracle of our writer.

    # comment
    INSTRUCTION arguments

Instructions are not case sensitive and may come in any order; FROM is required. A value stands alone on its line, or
between ``"``, or between three of them, and may then go over lines; it ends where a line does that ends with the quotes
it began with. What is between them is taken as it is, but characters that cannot be printed are lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES")

# Parameters of the documentation's table and the types of their values.
PARAMETERS = {
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float, "seed": int, "stop": str,
    "num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip


@dataclass
class Modelfile:
    """What a Modelfile says."""

    model: str = ""
    template: str | None = None
    system: str | None = None
    license: str | None = None
    parameters: dict[str, int | float] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)


def parse(text: str) -> Modelfile:
    """Return what a Modelfile says; raises ``ValueError`` where it is not one."""
    found = Modelfile()
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("#"):
            found.comments.append(line.lstrip("# "))
            continue
        name, _, rest = line.lstrip().partition(" ")
        if name.upper() not in INSTRUCTIONS:
            raise ValueError(f"no instruction: {line!r}")
        if name.upper() == "PARAMETER":
            parameter, _, rest = rest.lstrip().partition(" ")
            _set_parameter(found, parameter, _value(rest, lines))
        else:
            _set(found, name.upper(), _value(rest, lines))
    if not found.model:
        raise ValueError("no FROM")
    return found


def _value(rest: str, lines) -> str:
    rest = rest.lstrip()
    quotes = '"""' if rest.startswith('"""') else '"' if rest.startswith('"') else ""
    while quotes and (len(rest.strip()) < 2 * len(quotes) or not rest.rstrip().endswith(quotes)):
        line = next(lines, None)
        if line is None:
            raise ValueError(f"a value is not closed: {rest[:40]!r}")
        rest += "\n" + line
    value = rest.strip()[len(quotes) : len(rest.strip()) - len(quotes)] if quotes else rest.rstrip()
    return "".join(letter for letter in value if letter.isprintable() or letter in "\n\t")


def _set(found: Modelfile, name: str, value: str) -> None:
    attribute = {"FROM": "model", "TEMPLATE": "template", "SYSTEM": "system", "LICENSE": "license"}[name]
    if getattr(found, attribute):
        raise ValueError(f"{name} twice")
    setattr(found, attribute, value)


def _set_parameter(found: Modelfile, name: str, value: str) -> None:
    if PARAMETERS[name] is str:
        found.stops.append(value)
    else:
        found.parameters[name] = PARAMETERS[name](value)
