"""Chat formats, Go templates and Modelfiles.

The renderings of a real Go engine are in golden/templates.json (tools/check/check_templates.py makes and checks them).
"""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CONVERSATIONS, FAMILIES, SYSTEM, messages_for, source
from gguf import GGUFValueType, TokenType
from modelfile_parser import parse

from nsds_gguf.errors import OutputError, UnsupportedError
from nsds_gguf.publish.chat import (
    DATED_SYSTEM,
    REFUSES_SYSTEM,
    ChatFormat,
    ChatTemplate,
    conversation,
    find_format,
)
from nsds_gguf.publish.modelfile import (
    chat_format,
    go_template,
    modelfile,
    parameters,
    quoted,
    stop_strings,
)
from nsds_gguf.records import kv

GOLDEN = json.loads((Path(__file__).parent / "golden" / "templates.json").read_text(encoding="utf-8"))
TODAY = datetime.datetime(2026, 1, 2)


def found_format(name):
    family = FAMILIES[name]
    return find_format(source(name), family.bos, family.eos, adds_bos=family.adds_bos)


def metadata_of(name, **more):
    """Return the keys of a GGUF with a family's template and special tokens."""
    family = FAMILIES[name]
    words = ["Hello", "[INST]", "world"]
    tokens = list(dict.fromkeys([*family.special, *words]))
    types = [TokenType.CONTROL if token in family.special else TokenType.NORMAL for token in tokens]
    return {
        "general.architecture": kv("llama", GGUFValueType.STRING),
        "llama.context_length": kv(131072, GGUFValueType.UINT32),
        "tokenizer.chat_template": kv(source(name), GGUFValueType.STRING),
        "tokenizer.ggml.tokens": kv(tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": kv(list(map(int, types)), GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.bos_token_id": kv(tokens.index(family.bos), GGUFValueType.UINT32),
        "tokenizer.ggml.eos_token_id": kv(tokens.index(family.eos), GGUFValueType.UINT32),
        "tokenizer.ggml.add_bos_token": kv(family.adds_bos, GGUFValueType.BOOL),
        **more,
    }


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_go_renders_is_what_jinja_renders(name):
    family, chat = FAMILIES[name], found_format(name)
    template = ChatTemplate(source(name), family.bos, family.eos, now=TODAY)
    assert go_template(chat) == GOLDEN[name]["go"]  # so what Go made of it speaks of this template
    assert len(GOLDEN[name]["texts"]) >= 3
    for key, text in GOLDEN[name]["texts"].items():
        messages = CONVERSATIONS[key]
        assert chat.render(messages_for(chat, messages)) == text
        if family.refuses_system and messages[0]["role"] == "system":
            with pytest.raises(UnsupportedError, match="cannot be rendered"):
                template.render(messages)
        elif "Today Date" not in text:  # Llama 3.2 names the day, of which Ollama knows nothing
            assert template.render(messages).removeprefix(family.bos if family.adds_bos else "") == text


@pytest.mark.parametrize("name", FAMILIES)
def test_formats_are_known_by_what_they_render(name):
    family, chat = FAMILIES[name], found_format(name)
    assert chat.name == family.format
    assert chat.default_system == family.default_system
    assert (REFUSES_SYSTEM in chat.notes) == family.refuses_system
    assert (".Messages" not in go_template(chat)) == family.by_turns
    head, found, _ = go_template(chat).rpartition("{{ .Response }}")  # at the top level, once
    assert found and head.count("{{ if") + head.count("{{ range") == head.count("{{ end }}")


def test_hand_made_chatml():
    chat = found_format("chatml")
    assert chat == ChatFormat(
        "<|im_start|>user\n", "<|im_start|>user\n", *2 * ("<|im_end|>\n<|im_start|>assistant\n",), "<|im_end|>\n",
        "first", "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n",
    )  # fmt: skip
    assert go_template(chat) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    )


def test_thoughts_begun_for_the_model_are_not_begun_in_the_past():
    chat = found_format("deepseek-r1")
    assert (chat.answer, chat.generate) == ("<｜Assistant｜>", "<｜Assistant｜><think>\n")
    assert "{{ if not .Response }}<think>\n{{ end }}{{ .Response }}" in go_template(chat)
    assert [note for note in chat.notes if "thoughts" in note]


def test_a_default_system_prompt_with_the_day_in_it_is_left_out():
    assert DATED_SYSTEM in found_format("granite3").notes
    assert "20" not in go_template(found_format("granite3"))


def test_tools_are_noted():
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + source("chatml")
    assert [note for note in find_format(template).notes if "tools" in note]


def test_generation_marks_of_transformers_are_read():
    marked = source("chatml").replace("{{ '<|im_start|>' +", "{% generation %}{{ '<|im_start|>' +")
    marked = marked.replace("'\n' }}{% endfor", "'\n' }}{% endgeneration %}{% endfor")
    assert marked.count("generation %}") == 2
    assert find_format(marked) == find_format(source("chatml"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "is not valid Jinja"),
        ("{{ raise_exception('no chat') }}", "cannot be rendered: no chat"),
        ("{{ messages[9].content }}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ strftime_now('%F') }}{% for m in messages %}[{{ m.content }}]{% endfor %}", "the date into every"),
        ("{{ messages[-1].content }}", "every message once"),
        ("{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}", "every message once"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}", "every message once"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | replace('T', 't') }}{% endfor %}", "differently"),
        ("{% for m in messages %}<{{ m.role }} {{ loop.index }}>{{ m.content }}{% endfor %}", "differently"),
    ],
)
def test_templates_that_are_no_such_format_are_refused(template, message):
    with pytest.raises(UnsupportedError, match=message):
        find_format(template)


def test_rendering_is_that_of_transformers():
    """Blocks take their line breaks with them, JSON is not escaped for HTML, dates are formatted."""
    template = "  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n"
    template += "{{ {'a': '<é>'} | tojson }} {{ strftime_now('%Y') }}"
    text = ChatTemplate(template, now=TODAY).render(conversation("x", "y"))
    assert text == 'x\ny\n{"a": "<é>"} 2026'


# --- Modelfiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_modelfiles_say_what_was_meant(name):
    metadata = metadata_of(name)
    chat = chat_format(metadata)
    found = parse(modelfile("My Model Q3.gguf", metadata, chat, ["A note."]))
    assert found.model == "./My Model Q3.gguf"
    assert found.template == GOLDEN[name]["go"]
    assert (found.system or "") == FAMILIES[name].default_system
    assert tuple(found.stops) == FAMILIES[name].stops
    assert found.parameters == {"num_ctx": 8192}
    assert "A note." in found.comments


def test_parameters_are_those_of_the_generation_config():
    sampling = {"temp": 0.7, "top_p": 0.8, "min_p": 0.05, "penalty_repeat": 1.05}
    more = {f"general.sampling.{key}": kv(value, GGUFValueType.FLOAT32) for key, value in sampling.items()}
    more["general.sampling.top_k"] = kv(20, GGUFValueType.INT32)
    more["llama.context_length"] = kv(2048, GGUFValueType.UINT32)
    metadata = metadata_of("chatml", **more)
    wanted = {
        "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repeat_penalty": 1.05, "num_ctx": 2048,
    }  # fmt: skip
    assert parameters(metadata) == wanted
    assert parse(modelfile("x.gguf", metadata, None, [])).parameters == wanted


def test_floats_read_back_from_a_gguf_are_written_as_they_were_meant():
    metadata = metadata_of("chatml", **{"general.sampling.temp": kv(0.699999988079071, GGUFValueType.FLOAT32)})
    assert "PARAMETER temperature 0.7\n" in modelfile("x.gguf", metadata, None, [])


def test_without_a_chat_template_there_is_no_template():
    metadata = metadata_of("chatml")
    del metadata["tokenizer.chat_template"]
    assert chat_format(metadata) is None
    found = parse(modelfile("base.gguf", metadata, None, []))
    assert (found.template, found.system, found.stops) == (None, None, ["<|im_end|>"])


def test_a_licence_is_carried_over():
    metadata = metadata_of("chatml", **{"general.license": kv("apache-2.0", GGUFValueType.STRING)})
    assert parse(modelfile("x.gguf", metadata, None, [])).license == "apache-2.0"


@pytest.mark.parametrize(
    "value",
    ["<|im_end|>", "### User:", " leading", "trailing ", 'a "quoted" word', '"', '""', "two\nlines", 'a"\nb"',
     "tab\there", "<｜end▁of▁sentence｜>", "用户", "# no comment", "FROM x", "\n", '"\n"', "{{ .Prompt }}"],
)  # fmt: skip
def test_values_survive_their_quotes(value):
    chat = ChatFormat("u:", value, "a", "a", "", default_system=value)
    written = quoted(value)
    assert written is not None
    text = f"FROM ./x\nPARAMETER stop {written}\nSYSTEM {written}\nPARAMETER top_k 1\n"
    found = parse(text)
    assert (found.stops, found.system, found.parameters) == ([value], value, {"top_k": 1})
    assert chat.default_system == value


def test_any_value_survives_its_quotes_or_is_left_out():
    rng = np.random.default_rng(1)
    n_left_out = 0
    for _ in range(3000):
        value = "".join(rng.choice(list('ab" \n#\t'), size=rng.integers(1, 10)))
        written = quoted(value)
        n_left_out += written is None
        if written is not None:
            found = parse(f"SYSTEM {written}\nPARAMETER top_k 1\nFROM ./x\n")
            assert (found.system, found.parameters, found.model) == (value, {"top_k": 1}, "./x")
    assert 0 < n_left_out < 100


@pytest.mark.parametrize("value", ['x"""\ny', 'x""" \ny', "zero\u200bwidth", "non\u00a0breaking", "bell\a"])
def test_values_that_a_modelfile_cannot_hold_are_left_out(value):
    assert quoted(value) is None


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ("{{ x }}", '{{ "{" }}{ x }}'),
        ("{", '{{ "{" }}'),
        ("{{{", '{{ "{" }}' * 3),
        ('"""', '{{ "\\"" }}' * 3),
        ("a\u00a0b\u200c", 'a{{ "\\u00a0" }}b{{ "\\u200c" }}'),
        ("\U000e0001", '{{ "\\U000e0001" }}'),
    ],
)
def test_text_is_escaped_for_go(end, wanted):
    chat = ChatFormat("u", "u", "a", "a", end)
    assert go_template(chat) == "u{{ .Prompt }}a{{ .Response }}" + wanted


def test_what_a_modelfile_cannot_hold_is_said_and_a_system_prompt_stays_in_the_template():
    template = source("qwen2.5").replace("You are Qwen", "You are\\u00a0Qwen")
    metadata = metadata_of("qwen2.5", **{
        "tokenizer.chat_template": kv(template, GGUFValueType.STRING),
        "general.license": kv("my\u200blicence", GGUFValueType.STRING),
    })  # fmt: skip
    chat = chat_format(metadata)
    assert chat.default_system.startswith("You are\u00a0Qwen")
    text = modelfile("x.gguf", metadata, chat, [])
    found = parse(text)
    assert (found.system, found.license) == (None, None)
    assert 'system\nYou are{{ "\\u00a0" }}Qwen, created' in found.template and ".Messages" in found.template
    assert "# A Modelfile cannot hold this: LICENSE 'my\\u200blicence'\n" in text


@pytest.mark.parametrize("name", ["line\nbreak.gguf", "zero\u200bwidth.gguf", " space.gguf"])
def test_file_names_that_a_modelfile_cannot_hold_are_refused(name):
    with pytest.raises(OutputError, match="rename the GGUF"):
        modelfile(name, metadata_of("chatml"), None, [])


def test_stops_end_answers_and_not_their_html():
    metadata = metadata_of("zephyr", **{"tokenizer.ggml.eot_token_id": kv(2, GGUFValueType.UINT32)})
    assert stop_strings(metadata, found_format("zephyr")) == ["<|user|>", "Hello"]
    assert SYSTEM not in stop_strings(metadata, None)
