"""Our GGUFs against what llama.cpp's own converter made of the same folders (recorded by
tools/check/check_converter.py)."""

from __future__ import annotations

import json

import pytest
from converter_record import (
    ABSENT,
    GOLDEN,
    OURS,
    computed_differences,
    convert_ours,
    differences,
    digests,
    names,
    read_entry,
    short,
    write_folder,
)

RECORD = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_record_is_of_models_that_there_are():
    assert RECORD and set(RECORD) <= set(names())


@pytest.mark.parametrize("name", RECORD)
def test_our_file_is_the_converters(name, tmp_path):
    wanted = RECORD[name]
    found = read_entry(convert_ours(write_folder(tmp_path / name, name), tmp_path / "ours.gguf"))
    assert not differences(digests(found.tensors), wanted["tensors"])
    assert not computed_differences(found.computed, wanted["computed"])
    keys = {key: short(value) for key, value in found.keys.items() if not key.startswith(OURS)}
    expected = {**wanted["keys"], **wanted["own"]}
    assert keys == {key: value for key, value in expected.items() if value != ABSENT}
