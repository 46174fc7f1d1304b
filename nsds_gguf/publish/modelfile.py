r"""Ollama's Modelfile for a GGUF: the chat format as a Go template, stop strings and parameters.

Facts about Ollama, from its public documentation (docs/modelfile.md, docs/template.md) and sources:

* A template describes one turn, ``.System``, ``.Prompt`` and ``.Response``, and is applied turn by turn, with the
  system prompt in the first; the last turn leaves out what follows ``.Response``. All versions understand this form,
  which is written wherever it suffices.
* Since July 2024 a template that mentions ``.Messages`` is applied once, to the whole conversation. It is needed
  where the first turn differs even without a system prompt, or where the system prompt belongs in the last turn.
  Older versions find no ``.Messages`` and take the ``else``, the closest form turn by turn.
* Old versions look for ``.Response`` outside conditions only, so it is written there.
* A value in a Modelfile is quoted by ``"`` or by three of them, without escapes. Characters that Go does not print (a
  non-breaking space, zero-width marks) are lost, so a template writes them as Go escapes.
* llama.cpp adds BOS where the model needs it; the template does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import Keys, TokenType
from gguf.gguf_writer import GGUFValue

from .. import __version__
from ..errors import OutputError
from .chat import ChatFormat, find_format

Metadata = Mapping[str, GGUFValue]

# Ollama's default was 2048 tokens, then 4096; a larger cache than this may not fit beside the weights.
MAX_NUM_CTX = 8192

# Ollama's parameters and the GGUF keys that hold them, from generation_config.json. llama.cpp's converter does not copy
# the repetition penalty, so it is read from generation_config.json itself.
_PARAMETERS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
    "repeat_last_n": "general.sampling.penalty_last_n",
}

# Tokens that are also HTML: as strings they would stop an answer about HTML; their ids stop it anyway.
_MARKUP = ("<s>", "</s>")

_LAST = "(eq (len (slice $.Messages $i)) 1)"  # inside range: nothing follows this message
_FIRST = "(le $i 1)"  # the first prompt: after a system prompt or nothing


def chat_format(metadata: Metadata) -> ChatFormat | None:
    """Return the format of a GGUF's chat template, ``None`` where it has no template.

    Raises ``UnsupportedError`` when the template does not fit ``ChatFormat``.
    """
    entry = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if entry is None or not str(entry.value).strip():
        return None
    bos, eos = special_texts(metadata)
    return find_format(str(entry.value), bos, eos, adds_bos=adds_bos(metadata))


def adds_bos(metadata: Metadata) -> bool:
    """Return whether llama.cpp begins every text with BOS."""
    entry = metadata.get(Keys.Tokenizer.ADD_BOS)
    return bool(entry.value) if entry is not None else True


def special_texts(metadata: Metadata) -> tuple[str, str]:
    """Return the texts of BOS and EOS, "" where there is none."""
    return _token(metadata, Keys.Tokenizer.BOS_ID) or "", _token(metadata, Keys.Tokenizer.EOS_ID) or ""


def go_template(chat: ChatFormat) -> str:
    """Return a chat format as a Go template for Ollama."""
    before = _begin(".System", ".System", chat, chat.user)
    answer = _either(".Response", chat.answer, chat.generate)
    turn = f"{before}{{{{ .Prompt }}}}{answer}"
    has_system = chat.default_system != "" and quoted(chat.default_system) is not None  # then SYSTEM holds it
    if chat.system != "last" and (chat.opening == chat.user or has_system):
        return f"{turn}{{{{ .Response }}}}{_text(chat.end)}"
    end = "{{ if .Response }}" + _text(chat.end) + "{{ end }}" if chat.end else ""
    return f"{{{{ if .Messages }}}}{_messages(chat)}{{{{ else }}}}{turn}{{{{ end }}}}{{{{ .Response }}}}{end}"


def _messages(chat: ChatFormat) -> str:
    """Return the template of a whole conversation."""
    answer = _either(_LAST, chat.generate, chat.answer)
    end = "{{ if not " + _LAST + " }}" + _text(chat.end) + "{{ end }}" if chat.end else ""
    before = _before_prompt(chat)
    return (
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{answer}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{end}{{{{ end }}}}{{{{ end }}}}'
    )


def _before_prompt(chat: ChatFormat) -> str:
    """Return the beginning of a turn whose position in the conversation is known."""
    if chat.system == "first" and chat.opening == chat.system_before + chat.system_after:
        return _begin(_FIRST, "$.System", chat, chat.user)
    cases = []
    if chat.system != "none":
        place = _LAST if chat.system == "last" else _FIRST
        cases.append((f"and $.System {place}", _round_system(chat, "$.System")))
    if chat.opening != chat.user:
        cases.append((_FIRST, _text(chat.opening)))
    branches = "{{ else ".join(f"if {condition} }}}}{text}" for condition, text in cases)
    return f"{{{{ {branches}{{{{ else }}}}{_text(chat.user)}{{{{ end }}}}"


def _round_system(chat: ChatFormat, system: str) -> str:
    return f"{_text(chat.system_before)}{{{{ {system} }}}}{_text(chat.system_after)}"


def _begin(condition: str, system: str, chat: ChatFormat, user: str) -> str:
    """Return the beginning of a turn: the system prompt with its marks, or else ``user``."""
    if chat.system == "none":
        return _text(user)
    if chat.system_after.endswith(user):
        before, after = _text(chat.system_before), _text(chat.system_after.removesuffix(user))
        return f"{{{{ if {condition} }}}}{before}{{{{ {system} }}}}{after}{{{{ end }}}}{_text(user)}"
    if chat.system_before.startswith(user):
        before, after = _text(chat.system_before.removeprefix(user)), _text(chat.system_after)
        return f"{_text(user)}{{{{ if {condition} }}}}{before}{{{{ {system} }}}}{after}{{{{ end }}}}"
    return f"{{{{ if {condition} }}}}{_round_system(chat, system)}{{{{ else }}}}{_text(user)}{{{{ end }}}}"


def _either(condition: str, first: str, second: str) -> str:
    """Return one text or the other by a condition; their common prefix precedes it."""
    if first == second:
        return _text(first)
    n = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    common, first, second = _text(first[:n]), _text(first[n:]), _text(second[n:])
    if not first:
        return f"{common}{{{{ if not {condition} }}}}{second}{{{{ end }}}}"
    otherwise = f"{{{{ else }}}}{second}" if second else ""
    return f"{common}{{{{ if {condition} }}}}{first}{otherwise}{{{{ end }}}}"


# Text that must be escaped in a template, or in a value between three quotes.
_SPECIAL = re.compile(r'\{+(?=\{)|\{+$|"{3,}')


def _text(text: str) -> str:
    """Return text as written in a Go template in a Modelfile."""
    plain = _SPECIAL.sub(lambda match: "".join(map(_escape, match[0])), text)
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _escape(letter) for letter in plain)


def _escape(letter: str) -> str:
    """Return a character as an action with a Go string."""
    if letter in '{"':
        return '{{ "\\' + letter + '" }}' if letter == '"' else '{{ "{" }}'
    number = ord(letter)
    return f'{{{{ "\\u{number:04x}" }}}}' if number < 0x10000 else f'{{{{ "\\U{number:08x}" }}}}'


def quoted(value: str) -> str | None:
    """Return a value as written in a Modelfile, ``None`` where the format cannot hold it.

    A Modelfile has no escapes: a value ends at the first line that ends with its opening quotes.
    """
    if not all(letter.isprintable() or letter in "\n\t" for letter in value):
        return None
    if '"' not in value and "\n" not in value:
        return f'"{value}"'
    if any(line.rstrip().endswith('"""') for line in value.split("\n")[:-1]):
        return None
    return f'"""{value}"""'


def stop_strings(metadata: Metadata, chat: ChatFormat | None) -> list[str]:
    """Return the strings that end an answer: marks of the next turn, and end tokens.

    Marks are the special tokens between an answer and the next prompt; a prompt without special tokens is marked by
    its first line.
    """
    found: list[str | None] = []
    if chat is not None:
        special = _special_tokens(metadata)
        marks = _within(chat.end + chat.user, special)
        heading = chat.user.strip().partition("\n")[0]
        found = [*marks, None if _within(chat.user, special) else heading]
    ends = (_token(metadata, key) for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID))
    return [text for text in dict.fromkeys([*found, *ends]) if text and text not in _MARKUP]


def parameters(metadata: Metadata, generation: Mapping[str, Any] | None = None) -> dict[str, int | float]:
    """Return the sampling parameters and context that the GGUF or generation_config.json names."""
    numbers = ((name, metadata[key].value) for name, key in _PARAMETERS.items() if key in metadata)
    found = {name: value for name, value in numbers if type(value) in (int, float)}
    penalty = (generation or {}).get("repetition_penalty")
    if isinstance(penalty, int | float) and not isinstance(penalty, bool):
        found.setdefault("repeat_penalty", float(penalty))
    architecture = metadata.get(Keys.General.ARCHITECTURE)
    context = _integer(metadata, f"{architecture.value}.context_length") if architecture is not None else None
    if context is not None and context > 0:
        found["num_ctx"] = min(context, MAX_NUM_CTX)
    return found


def modelfile(
    file_name: str,
    metadata: Metadata,
    chat: ChatFormat | None,
    notes: list[str],
    generation: Mapping[str, Any] | None = None,
    projector: str = "",
) -> str:
    """Return the text of a Modelfile.

    Args:
        file_name: the GGUF beside it.
        metadata: its keys.
        chat: its chat format; ``None`` writes no template, and Ollama uses the one in the GGUF.
        notes: sentences for the reader, written as comments.
        generation: the original's parsed generation_config.json, where there is one.
        projector: the GGUF of the vision part beside it, for a second FROM; empty without one.

    Raises:
        OutputError: a Modelfile cannot hold a file name.

    """
    for name in filter(None, (file_name, projector)):
        if not name.isprintable() or name != name.strip():
            raise OutputError(f"{name!r}: a Modelfile cannot hold this name; rename the GGUF")
    lines = [f"# Written by nsds-gguf {__version__}. Use: ollama create NAME -f Modelfile", *(f"# {n}" for n in notes)]
    lines += [f"FROM ./{name}" for name in (file_name, projector) if name]
    if chat is not None:
        lines.append(f'TEMPLATE """{go_template(chat)}"""')
        lines += _line("SYSTEM", chat.default_system)
    for name, value in parameters(metadata, generation).items():
        lines.append(f"PARAMETER {name} {value:.6g}" if isinstance(value, float) else f"PARAMETER {name} {value}")
    for stop in stop_strings(metadata, chat):
        lines += _line("PARAMETER stop", stop)
    licence = metadata.get(Keys.General.LICENSE)
    lines += _line("LICENSE", str(licence.value) if licence is not None else "")
    return "\n".join(lines) + "\n"


def _line(instruction: str, value: str) -> Iterator[str]:
    """Yield one instruction; nothing for an empty value, and a comment for one that cannot be written."""
    if value:
        written = quoted(value)
        yield f"{instruction} {written}" if written else f"# A Modelfile cannot hold this: {instruction} {value!a}"


def _token(metadata: Metadata, id_key: str) -> str | None:
    tokens, number = _list(metadata, Keys.Tokenizer.LIST), _integer(metadata, id_key)
    return str(tokens[number]) if number is not None and 0 <= number < len(tokens) else None


def _special_tokens(metadata: Metadata) -> list[str]:
    """Return the texts of control tokens, the longest first."""
    tokens, types = _list(metadata, Keys.Tokenizer.LIST), _list(metadata, Keys.Tokenizer.TOKEN_TYPE)
    found = [str(token) for token, kind in zip(tokens, types, strict=False) if kind == TokenType.CONTROL]
    return sorted((token for token in found if token.strip()), key=len, reverse=True)


def _list(metadata: Metadata, key: str) -> list[Any]:
    """Return an array, empty where the key holds none: a GGUF may hold anything."""
    entry = metadata.get(key)
    return entry.value if entry is not None and isinstance(entry.value, list) else []


def _integer(metadata: Metadata, key: str) -> int | None:
    """Return an integer, ``None`` where the key holds none."""
    entry = metadata.get(key)
    return entry.value if entry is not None and type(entry.value) is int else None


def _within(text: str, special: list[str]) -> list[str]:
    """Return the special tokens in a text, in the order in which a tokenizer finds them."""
    if not special:
        return []
    return re.findall("|".join(map(re.escape, special)), text)
