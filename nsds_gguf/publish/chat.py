"""Chat templates: rendered as in transformers, and their format derived from the output.

A chat template is a Jinja program by the model's author. This module does not parse it but observes it: it renders a
few conversations of known texts, and the format is whatever appears between those texts. One piece of code thus covers
ChatML, Llama, Mistral, Gemma and later formats, and each derived format is checked on further conversations.

Templates are untrusted programs: they run in Jinja's sandbox, which exposes only their arguments, and in a separate
process with limited time and memory (``renderer``).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UnsupportedError
from .renderer import RENDERER, TemplateLimitError

Message = Mapping[str, str]

# Texts of the conversations that reveal a format: words that no template writes itself.
_SYSTEM, _USERS, _ANSWERS = "Zsystem0", ("Zuser1", "Zuser2", "Zuser3"), ("Zanswer1", "Zanswer2")

# A tool and a thought, which some templates treat specially.
_TOOL = {"type": "function", "function": {"name": "Ztool", "description": "Z", "parameters": {}}}
_THOUGHT = "<think>\nZthought\n</think>\n\n"

REFUSES_SYSTEM = "The original refuses system prompts; this puts one before the first prompt, as Gemma 3 does."
_DROPS_SYSTEM = "The original and this both drop system prompts."
DATED_SYSTEM = "The original's default system prompt contains the date and is left out; there is no default here."
KNOWS_TOOLS = "The original also supports tools; this does not."
_DROPS_THOUGHTS = "The original removes thoughts (<think>) from earlier answers; this keeps them."

# Any two days: a template that uses the date renders differently on them.
_DAYS = (datetime.datetime(2024, 7, 26), datetime.datetime(2025, 11, 3))

# Names of formats by marks in the user's turns; the first match counts.
_NAMES = {
    "<|im_sep|>": "Phi-4",
    "<|im_start|>": "ChatML",
    "<|start_header_id|>": "Llama 3",
    "<|header_start|>": "Llama 4",
    "<<SYS>>": "Llama 2",
    "[INST]": "Mistral",
    "<start_of_turn>": "Gemma",
    "<|START_OF_TURN_TOKEN|>": "Command-R",
    "<|start_of_role|>": "Granite",
    "<｜User｜>": "DeepSeek",
    "[|user|]": "EXAONE",
    "[gMASK]": "GLM",
    "### Instruction": "Alpaca",
    "GPT4 Correct User:": "OpenChat",
    "USER:": "Vicuna",
    "<|end|>": "Phi-3",
    "<|user|>": "Zephyr",
    "User: ": "User and Assistant",
}


class ChatTemplate:
    """A Jinja chat template with the tokens that it may write, in the environment that transformers gives it."""

    def __init__(self, source: str, bos: str = "", eos: str = "", now: datetime.datetime | None = None) -> None:
        """Compile a template.

        Args:
            source: the Jinja text.
            bos: text of the token that begins a sequence, for ``bos_token``.
            eos: text of the token that ends one, for ``eos_token``.
            now: the time that ``strftime_now`` formats; ``None`` leaves that function undefined.

        Raises:
            UnsupportedError: it is not valid Jinja, or takes too long.

        """
        self._source, self._now = source, now.isoformat() if now is not None else None
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._ask(None)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: whether to end with the start of the assistant's turn.
            tools: functions that the assistant may call, in transformers' format.

        Raises:
            UnsupportedError: the template refuses the conversation, fails on it, or exceeds the limits of time, memory
                or length.

        """
        return self._ask(
            {
                "messages": [dict(message) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._tokens,
            }
        )

    def _ask(self, variables: Mapping[str, Any] | None) -> str:
        """Return the text for variables; ``None`` only compiles the template."""
        answer = RENDERER.ask({"source": self._source, "now": self._now, "variables": variables})
        if "error" in answer:
            what = "is not valid Jinja" if answer["is_syntax"] else "cannot be rendered"
            raise UnsupportedError(f"chat template {what}: {answer['error']}")
        return str(answer["text"])


@dataclass(frozen=True)
class ChatFormat:
    """The text that a template writes around the messages of a conversation.

    A conversation is a sequence of turns, ``user`` prompt ``answer`` response ``end``, except that the last is ``user``
    prompt ``generate``, and the first begins with ``opening`` instead of ``user``. With a system prompt one turn, the
    first or the last, begins with ``system_before`` system ``system_after`` instead.

    Attributes:
        opening: before the first prompt when there is no system prompt; BOS, which llama.cpp adds, left out.
        user: before the other prompts.
        answer: between a prompt and its answer.
        generate: after the last prompt, for the assistant to continue; usually the same as ``answer``.
        end: after an answer.
        system: which turn begins with the system prompt; ``none`` where the template drops it.
        system_before: before the system prompt.
        system_after: between the system prompt and the user's.
        default_system: the system prompt in ``opening``; "" where it has none.
        notes: differences from the original template, one sentence each.

    """

    opening: str
    user: str
    answer: str
    generate: str
    end: str
    system: Literal["first", "last", "none"] = "none"
    system_before: str = ""
    system_after: str = ""
    default_system: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The common name of the format."""
        marks = self.opening + self.system_before + self.system_after + self.user + self.answer + self.end
        return next((name for mark, name in _NAMES.items() if mark in marks), "a custom format")

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation for the assistant to continue; the last message is the user's."""
        system = next((message["content"] for message in messages if message["role"] == "system"), None)
        talk = [message for message in messages if message["role"] != "system"]
        place = {"first": 0, "last": len(talk) - 1, "none": None}[self.system]
        parts = []
        for i, message in enumerate(talk):
            if message["role"] == "assistant":
                parts += [self.answer, message["content"], self.end]
            elif system is not None and i == place:
                parts += [self.system_before, system, self.system_after, message["content"]]
            else:
                parts += [self.user if i else self.opening, message["content"]]
        return "".join([*parts, self.generate])


def find_format(source: str, bos: str = "", eos: str = "", *, adds_bos: bool = True) -> ChatFormat:
    """Return the format of a chat template.

    A default system prompt that contains the date is left out, with a note.

    Args:
        source: the Jinja text.
        bos: text of BOS.
        eos: text of EOS.
        adds_bos: whether llama.cpp begins every text with BOS by itself.

    Raises:
        UnsupportedError: it cannot be rendered, or its output does not fit ``ChatFormat``.

    """
    try:
        return _find_format(ChatTemplate(source, bos, eos), bos if adds_bos else "")
    except TemplateLimitError:
        raise
    except UnsupportedError:
        if "strftime_now" not in source:
            raise
    first, second = (_find_format(ChatTemplate(source, bos, eos, day), bos if adds_bos else "") for day in _DAYS)
    if first == second:
        return first
    undated = replace(first, opening=first.user, default_system="")
    if undated != replace(second, opening=second.user, default_system=""):
        raise UnsupportedError("chat template writes the date into every conversation")
    return replace(undated, notes=(*undated.notes, DATED_SYSTEM))


def conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Return the messages of a conversation: alternating prompts and answers, after an optional system prompt."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _find_format(template: ChatTemplate, bos: str) -> ChatFormat:
    (user1, user2, _), (answer1, _) = _USERS, _ANSWERS

    def render(*texts: str, system: str | None = None) -> str:
        return template.render(conversation(*texts, system=system)).removeprefix(bos)

    opening, answer, between, generate = _split(render(user1, answer1, user2), user1, answer1, user2)
    ended = template.render(conversation(user1, answer1), add_generation_prompt=False)
    end, user = _parted(between, opening, ended.rpartition(answer1)[2])
    found = _with_system(render, ChatFormat(opening, user, answer, generate, end))
    _check(template, found, bos)
    return replace(found, notes=(*found.notes, *_losses(template, render)))


def _losses(template: ChatTemplate, render: Callable[..., str]) -> list[str]:
    """Return a note on each feature of the template that a format cannot express."""
    notes = []
    prompt = conversation(_USERS[0])
    try:
        if template.render(prompt, tools=[_TOOL]) != template.render(prompt):
            notes.append(KNOWS_TOOLS)
    except TemplateLimitError:
        raise
    except UnsupportedError:
        notes.append(KNOWS_TOOLS)
    if "Zthought" not in render(_USERS[0], _THOUGHT + _ANSWERS[0], _USERS[1]):
        notes.append(_DROPS_THOUGHTS)
    return notes


def _split(text: str, *marks: str) -> list[str]:
    """Return the parts before, between and after marks that occur in a text once each, in this order."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise UnsupportedError("chat template does not write every message once and in order")
        parts.append(part)
    return [*parts, text]


def _parted(between: str, opening: str, ended: str) -> tuple[str, str]:
    """Split the text between two turns into the end of an answer and the start of the next prompt.

    ``opening`` starts the first prompt; ``ended`` ends a conversation whose last message is the assistant's.
    """
    if between.endswith(opening):
        return between.removesuffix(opening), opening
    if ended and between.startswith(ended):
        return ended, between[len(ended) :]
    n = next((n for n in range(len(between)) if opening.endswith(between[n:])), len(between))
    while between[:n].count("<") > between[:n].count(">"):  # inside a mark such as <|end|>
        n += 1
    return between[:n], between[n:]


def _with_system(render: Callable[..., str], bare: ChatFormat) -> ChatFormat:
    """Return the format with its handling of a system prompt."""
    try:
        text = render(_USERS[0], _ANSWERS[0], _USERS[1], system=_SYSTEM)
    except TemplateLimitError:
        raise
    except UnsupportedError:
        before, after = bare.opening, "\n\n"
        return replace(bare, system="first", system_before=before, system_after=after, notes=(REFUSES_SYSTEM,))
    if _SYSTEM not in text:
        return replace(bare, notes=(_DROPS_SYSTEM,))
    if text.find(_SYSTEM) > text.find(_USERS[0]) >= 0:
        parts = _split(text, _USERS[0], _ANSWERS[0], _SYSTEM, _USERS[1])
        return replace(bare, system="last", system_before=parts[2].removeprefix(bare.end), system_after=parts[3])
    before, after, *_ = _split(text, _SYSTEM, *_USERS[:1])
    default = "" if bare.opening == bare.user else _between(bare.opening, before, after)
    return replace(bare, system="first", system_before=before, system_after=after, default_system=default)


def _between(text: str, before: str, after: str) -> str:
    """Return the part of a text between ``before`` and ``after``; empty where they do not match."""
    if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        return ""
    return text[len(before) : len(text) - len(after)]


def _check(template: ChatTemplate, found: ChatFormat, bos: str) -> None:
    """Raise ``UnsupportedError`` when the format and the template render a conversation differently."""
    talk = ('Why?\nTell me "all" {{ of }} it.', "Because.\n\n1. It is so.", "And Ünïcödé 😀?", "<b>Yes</b>", "Then?")
    systems = (None,) if REFUSES_SYSTEM in found.notes else (None, "Be brief.\nBe kind.")
    for system in systems:
        for n in (1, 3, 5):
            messages = conversation(*talk[:n], system=system)
            wanted = template.render(messages).removeprefix(bos)
            if wanted != found.render(messages):
                raise UnsupportedError("chat template treats some messages differently")
