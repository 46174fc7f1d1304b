"""Chat templates of the model families in their published form, shortened to what a conversation of text needs.

The templates are the files of the folder jinja; here is what is expected of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nsds_gguf.publish.chat import ChatFormat

FOLDER = Path(__file__).parent / "jinja"

# Prompts and answers in turn, after a system prompt or none.
TALK = (
    'Why is the "sky" {{ blue }}?',
    "Because of\n\n1. Rayleigh.\n2. The eye's cones.",
    "Und bei Nacht? 🌙",
    "<b>Dark.</b>",
    "Thank you.",
)
SYSTEM = "You are a pirate.\nBe brief."


def conversation(n_texts: int, system: str | None) -> list[dict[str, str]]:
    """Return the messages of a conversation of so many texts."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": TALK[i]} for i in range(n_texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = {
    f"{n_texts} {'with' if system else 'without'} system": conversation(n_texts, system)
    for n_texts in (1, 3, 5)
    for system in (SYSTEM, None)
}


def messages_for(chat: ChatFormat, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return what Ollama makes of messages: the system prompt of the Modelfile before those that have none."""
    if messages[0]["role"] == "system" or not chat.default_system:
        return messages
    return [{"role": "system", "content": chat.default_system}, *messages]


@dataclass(frozen=True)
class Family:
    """What is expected of a template; ``stops`` in the order in which the Modelfile has them."""

    format: str
    stops: tuple[str, ...]
    bos: str = "<s>"
    eos: str = "</s>"
    adds_bos: bool = True
    control: tuple[str, ...] = ()  # special tokens of the vocabulary beside BOS and EOS
    default_system: str = ""
    refuses_system: bool = False
    by_turns: bool = True  # whether one turn at a time says it all

    @property
    def special(self) -> tuple[str, ...]:
        """All control tokens."""
        return (self.bos, self.eos, *self.control)


FAMILIES = {
    "chatml": Family(
        "ChatML", ("<|im_end|>", "<|im_start|>"), eos="<|im_end|>", control=("<|im_start|>", "<|im_end|>")
    ),
    "qwen2.5": Family(
        "ChatML",
        ("<|im_end|>", "<|im_start|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        adds_bos=False,
        control=("<|im_start|>", "<|im_end|>"),
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": Family(
        "ChatML",
        ("<|im_end|>", "<|im_start|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        adds_bos=False,
        control=("<|im_start|>", "<|im_end|>"),
    ),
    "llama2": Family("Llama 2", ("[INST]",)),
    "llama3": Family(
        "Llama 3",
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama3.1": Family(
        "Llama 3",
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        by_turns=False,
    ),
    "llama3.2": Family(
        "Llama 3",
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        by_turns=False,
    ),
    "llama4": Family(
        "Llama 4",
        ("<|eot|>", "<|header_start|>", "<|header_end|>"),
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        control=("<|header_start|>", "<|header_end|>"),
    ),
    "mistral-v1": Family("Mistral", ("[INST]",), refuses_system=True),
    "mistral-v3": Family("Mistral", ("[INST]",), control=("[INST]", "[/INST]"), by_turns=False),
    "mistral-tekken": Family("Mistral", ("[INST]",), control=("[INST]", "[/INST]"), by_turns=False),
    "mistral-v7-tekken": Family(
        "Mistral",
        ("[INST]",),
        control=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        default_system="You are Mistral Small 3, a Large Language Model (LLM).",
    ),
    "gemma2": Family(
        "Gemma",
        ("<end_of_turn>", "<start_of_turn>", "<eos>"),
        bos="<bos>",
        eos="<eos>",
        control=("<start_of_turn>", "<end_of_turn>"),
        refuses_system=True,
    ),
    "gemma3": Family(
        "Gemma",
        ("<end_of_turn>", "<start_of_turn>", "<eos>"),
        bos="<bos>",
        eos="<eos>",
        control=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": Family(
        "Phi-3",
        ("<|end|>", "<|user|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        control=("<|end|>", "<|user|>", "<|assistant|>"),
    ),
    "phi4": Family(
        "Phi-4",
        ("<|im_end|>", "<|im_start|>", "<|im_sep|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        adds_bos=False,
        control=("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    ),
    "zephyr": Family("Zephyr", ("<|user|>",)),
    "command-r": Family(
        "Command-R",
        ("<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        control=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
    ),
    "vicuna": Family(
        "Vicuna", ("USER:",), default_system="A chat between a curious user and an artificial intelligence assistant."
    ),
    "alpaca": Family(
        "Alpaca",
        ("### Instruction:",),
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    "deepseek-v2": Family(
        "User and Assistant",
        ("<｜end▁of▁sentence｜>", "User:"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "deepseek-r1": Family(
        "DeepSeek",
        ("<｜end▁of▁sentence｜>", "<｜User｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        control=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "granite3": Family(
        "Granite",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        adds_bos=False,
        control=("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "tulu": Family("Zephyr", ("<|endoftext|>", "<|user|>"), bos="<|startoftext|>", eos="<|endoftext|>"),
    "smollm2": Family(
        "ChatML",
        ("<|im_end|>", "<|im_start|>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        adds_bos=False,
        control=("<|im_start|>", "<|im_end|>"),
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    "internlm2": Family("ChatML", ("<|im_end|>", "<|im_start|>"), control=("<|im_start|>", "<|im_end|>")),
    "falcon": Family(
        "User and Assistant", ("User:", "<|endoftext|>"), bos="<|endoftext|>x", eos="<|endoftext|>", adds_bos=False
    ),
    "falcon3": Family("Zephyr", ("<|endoftext|>", "<|user|>"), bos="", eos="<|endoftext|>", adds_bos=False),
    "glm4": Family(
        "GLM",
        ("<|user|>", "<|endoftext|>"),
        bos="[gMASK]",
        eos="<|endoftext|>",
        adds_bos=False,
        control=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        by_turns=False,
    ),
    "openchat": Family("OpenChat", ("<|end_of_turn|>", "GPT4 Correct User:"), eos="<|end_of_turn|>"),
    "exaone3": Family(
        "EXAONE",
        ("[|endofturn|]", "[|user|]"),
        bos="[BOS]",
        eos="[|endofturn|]",
        adds_bos=False,
        control=("[|user|]", "[|assistant|]", "[|system|]"),
        by_turns=False,
    ),
    "solar": Family("a custom format", ("### User:",)),
    "minicpm": Family("a custom format", ("<用户>",)),
    # No model's: all that Go templates and Modelfiles cannot hold as it is.
    "odd": Family("a custom format", ()),
}


def source(family: str) -> str:
    """Return a Jinja template."""
    return (FOLDER / f"{family}.jinja").read_bytes().decode()
