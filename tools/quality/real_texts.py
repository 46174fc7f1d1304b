"""Texts of several kinds that real language models are measured on.

    python tools/quality/real_texts.py OUT [--chat NAME=GGUF ...] [--tokens N]

| file | kind | from |
|---|---|---|
| ``code.txt`` | source code | the standard library of the Python that runs this, PSF licence |
| ``persian.txt`` | a language in another script | the ghazals of Hafez (14th century), as a package carries them |
| ``chat-NAME.txt`` | conversations in the model's own chat template | answered by the model itself, at temperature 1 |

Encyclopedia and books are files that the user has. The questions of the conversations are those of this file; no
calibration uses them. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf_weights import read_weights
from real_models import Package, fetch

from nsds_gguf.calibration.generated_text import draw
from nsds_gguf.llamacpp.llama import LlamaModel, open_context, open_model
from nsds_gguf.publish.chat import ChatTemplate

PERSIAN = Package(("fatol-hafez==0.1.3",), "*/ghazals.txt", "", 0, "the ghazals of Hafez, in the public domain")

# Modules of every trade: text, numbers, network, files, languages.
MODULES = (
    "argparse", "ast", "bdb", "calendar", "configparser", "csv", "dataclasses", "decimal", "difflib", "doctest",
    "ftplib", "fractions", "gettext", "heapq", "http/client", "imaplib", "inspect", "ipaddress", "json/decoder",
    "mailbox", "optparse", "pathlib", "pdb", "pickle", "plistlib", "pprint", "random", "sched", "shlex", "smtplib",
    "statistics", "string", "tarfile", "textwrap", "threading", "tokenize", "traceback", "turtle", "typing",
    "urllib/parse", "uuid", "wave", "weakref", "xml/dom/minidom", "zipfile",
)  # fmt: skip
CODE_BYTES = 9_000  # of each module

TOPICS = (
    "bees", "the Roman aqueducts", "sourdough bread", "black holes", "compound interest", "the violin",
    "chess openings", "volcanoes", "the French Revolution", "learning to swim", "photosynthesis", "sailing at night",
    "database indexes", "migraine", "the desert", "writing a letter of complaint",
)  # fmt: skip
QUESTIONS = (
    "Explain {} to a curious child.",
    "Write a short story in which {} plays a part.",
    "Give me five surprising facts about {}, as a list.",
    "What do people most often get wrong about {}?",
)
FOLLOW_UPS = (
    "Can you give me an example?",
    "Why is that?",
    "Please say the same in two sentences.",
    "Thank you! What next?",
)

TEMPERATURE = 1.0
CONVERSATION = 256  # tokens
N_PARALLEL = 16


def write_code(path: Path) -> None:
    """Write pieces of the standard library, one module after another."""
    library = Path(sysconfig.get_paths()["stdlib"])
    pieces = [(library / f"{name}.py").read_text(encoding="utf-8")[:CODE_BYTES] for name in MODULES]
    path.write_text("\n\n".join(pieces), encoding="utf-8")


def write_persian(path: Path) -> None:
    """Write the ghazals, with no blank lines between their couplets."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        fetched = Path(temporary) / "ghazals"
        fetch(PERSIAN, fetched)
        path.write_text(re.sub(r"\n{3,}", "\n\n", fetched.read_text(encoding="utf-8")), encoding="utf-8")


# --- chat -------------------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """One conversation as it is written: tokens so far, and those that are given rather than drawn."""

    tokens: list[int]
    given: list[int]
    n_turns: int = 1


def write_chat(gguf: Path, path: Path, n_tokens: int, seed: int = 0) -> None:
    """Write conversations of a model with itself; those without a chat template get none."""
    weights = read_weights(gguf)
    source = weights.value("tokenizer.chat_template")
    if source is None:
        print(f"{gguf}: no chat template, no conversations")
        return
    template = ChatTemplate(source)
    questions = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    questions = questions[: -(-n_tokens // CONVERSATION)]
    rng = np.random.default_rng(seed)
    texts = []
    with open_model(gguf) as model:
        for start in range(0, len(questions), N_PARALLEL):
            for tokens in conversations(model, template, questions[start : start + N_PARALLEL], rng):
                texts.append(model.detokenize(tokens))
    path.write_text("\n".join(texts), encoding="utf-8")


def conversations(
    model: LlamaModel, template: ChatTemplate, questions: Sequence[str], rng: np.random.Generator
) -> Iterator[list[int]]:
    """Yield the tokens of conversations that begin with these questions, all written in step."""
    running = [Conversation([], given(model, opening(template, question))) for question in questions]
    none = np.zeros(0, np.intp)
    with open_context(model, n_ctx=CONVERSATION, n_batch=len(running), n_seq=len(running)) as context:
        drawn = np.zeros(len(running), np.int32)
        for at in range(CONVERSATION):
            for one, token in zip(running, drawn, strict=True):
                advance(one, int(token), model, template)
            column = np.array([[one.tokens[-1]] for one in running], np.int32)
            drawn = draw(context.decode(column, start=at)[:, 0], TEMPERATURE, none, rng)
    yield from (one.tokens for one in running)


def advance(one: Conversation, drawn: int, model: LlamaModel, template: ChatTemplate) -> None:
    """Append the next token of a conversation: one that is given, or else the drawn one.

    A token that ends a turn is followed by the user's next.
    """
    if one.given:
        one.tokens.append(one.given.pop(0))
        return
    if drawn in model.end_tokens:
        one.given = given(model, between_turns(template, FOLLOW_UPS[one.n_turns % len(FOLLOW_UPS)]))
        one.n_turns += 1
        one.tokens.append(one.given.pop(0))
        return
    one.tokens.append(drawn)


def opening(template: ChatTemplate, question: str) -> str:
    """Return the text before the first answer."""
    return template.render([{"role": "user", "content": question}])


def between_turns(template: ChatTemplate, question: str) -> str:
    """Return the text from the end of an answer to the start of the next: end of turn, question, start of turn."""
    mark = "Zanswer"
    messages = [("user", "Zquestion"), ("assistant", mark), ("user", question)]
    return template.render([{"role": role, "content": text} for role, text in messages]).split(mark, 1)[1]


def given(model: LlamaModel, text: str) -> list[int]:
    """Return the tokens of a text of the template."""
    ids: list[int] = model.tokenize(text, add_special=False, parse_special=True).tolist()
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat", action="append", default=[], metavar="NAME=GGUF")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a model's conversations")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, write in (("code.txt", write_code), ("persian.txt", write_persian)):
        if not (arguments.out / name).is_file():
            write(arguments.out / name)
    for chat in arguments.chat:
        name, _, gguf = chat.partition("=")
        path = arguments.out / f"chat-{name}.txt"
        if not path.is_file():
            write_chat(Path(gguf), path, arguments.tokens)


if __name__ == "__main__":
    main()
