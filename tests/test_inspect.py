"""``inspect`` of any GGUF: numbers against gguf's reader, and what people see of them."""

from __future__ import annotations

import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from command import call
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import quantize
from rich.console import Console
from test_gguf_source import converted, split_tiny, uniform, written
from tiny_archs import write_tiny_arch
from tiny_gguf import N_LAYERS, tiny_weights, write_tiny_gguf

from nsds_gguf.cli.inspect_view import inspection_view
from nsds_gguf.errors import ModelError
from nsds_gguf.evaluate.inspect import VECTORS, inspect_gguf
from nsds_gguf.records import Options


def shown(path, width=80, colours=False):
    """Return the view of a file as a terminal of a width, or a file, gets it."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=colours, color_system="truecolor" if colours else None, highlight=False
    )
    console.print(inspection_view(inspect_gguf(path)))
    return stream.getvalue()


def mixed(path):
    """Write a model of three layers in several types and return the path."""
    rng = np.random.default_rng(1)
    types = {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q5_0",
        "blk.1.attn_q.weight": "Q5_1",
        "blk.12.attn_q.weight": "Q5_1",
        "blk.0.ffn_up_exps.weight": "Q4_0",
        "blk.1.ffn_up_exps.weight": "F16",
    }
    arrays = {name: rng.standard_normal((4, 2, 256) if "exps" in name else (8, 256)).astype("f4") for name in types}
    arrays |= {f"blk.{i}.attn_norm.weight": np.ones(256, "f4") for i in (0, 1, 12)}
    return written(path, arrays, types=types)


def test_sums_are_those_of_ggufs_reader(tmp_path):
    path = mixed(tmp_path / "a.gguf")
    found = inspect_gguf(path)
    tensors = GGUFReader(path).tensors
    n_bytes = {t.name: t.n_elements // GGML_QUANT_SIZES[t.tensor_type][0] * GGML_QUANT_SIZES[t.tensor_type][1]
               for t in tensors}  # fmt: skip
    n_weights = {t.name: int(t.n_elements) for t in tensors}
    assert found.n_weights == sum(n_weights.values())
    assert found.bpw == 8 * sum(n_bytes.values()) / found.n_weights
    quantized = [t.name for t in tensors if t.tensor_type.name not in ("F32", "F16")]
    assert found.quantized_bpw == 8 * sum(n_bytes[n] for n in quantized) / sum(n_weights[n] for n in quantized)
    assert found.file_bpw == 8 * path.stat().st_size / found.n_weights
    assert list(found.roles) == ["token_embd", "attn_q", "ffn_up_exps", VECTORS]
    assert found.roles["attn_q"].types == {"Q5_1": 2, "Q5_0": 1}
    assert found.roles[VECTORS].types == {"F32": 3}
    assert list(found.layers) == [""] and list(found.layers[""]) == [0, 1, 12]
    for layer, sums in found.layers[""].items():
        names = [t.name for t in tensors if t.name.startswith(f"blk.{layer}.")]
        assert sums.bpw == 8 * sum(n_bytes[n] for n in names) / sum(n_weights[n] for n in names)
        assert sums.types == Counter(t.tensor_type.name for t in tensors if t.name in names)


def test_json_holds_everything(tmp_path):
    path = mixed(tmp_path / "a.gguf")
    data = json.loads(call("inspect", path, "--json", "-").out)
    found = inspect_gguf(path)
    assert data["architecture"] == "llama" and data["files"] == [str(path)] and data["missing"] == []
    assert (data["bpw"], data["quantized_bpw"], data["file_bpw"]) == (found.bpw, found.quantized_bpw, found.file_bpw)
    assert data["roles"]["attn_q"]["types"] == {"Q5_1": 2, "Q5_0": 1}
    assert [entry["layer"] for entry in data["layers"][""]] == [0, 1, 12]
    assert data["layers"][""][1]["bpw"] == found.layers[""][1].bpw
    assert len(data["tensors"]) == 9 and data["bytes_by_type"] == found.bytes_by_type()


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_but_long_values(width, tmp_path):
    text = shown(mixed(tmp_path / "a.gguf"), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert re.search(r"attn_q +2\xa0Q5_1, 1\xa0Q5_0 +5\.833 ", text)
    assert re.search(r"ffn_up_exps +1\xa0Q4_0, 1\xa0F16 +10\.250 ", text)
    assert re.search(r"\n layer +\+0 +\+1 +\+2 .*\+9 *\n +0 +\d+\.\d\d +\d+\.\d\d *\n +10 +\d+\.\d\d *\n", text)


def test_layers_are_coloured_by_their_bits_on_a_terminal(tmp_path):
    path = mixed(tmp_path / "a.gguf")
    plain, coloured = shown(path), shown(path, colours=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).split() == plain.split()
    cells = re.findall(r"48;2;(\d+);(\d+);(\d+)m +(\d+\.\d\d)", coloured)
    bits = {float(value): tuple(map(int, rgb)) for *rgb, value in cells}
    assert len(cells) == 3 and len(set(bits.values())) == len(bits)
    scale = {2: "fde725", 3: "90d743", 4: "35b779", 5: "21918c", 6: "31688e", 8: "443983", 16: "8c6bb1"}
    channels = np.array([list(bytes.fromhex(colour)) for colour in scale.values()]).T
    for value, colour in bits.items():
        wanted = [np.interp(value, list(scale), channel) for channel in channels]
        np.testing.assert_allclose(colour, wanted, atol=1)


def test_our_files_say_how_they_were_made(tmp_path):
    source = write_tiny_gguf(tmp_path / "a.gguf")
    path = converted(source, tmp_path / "b.gguf", Options(target_bpw=6.5, rounding="rtn"))
    made = inspect_gguf(path).made_by_us
    text = shown(path, 120)
    assert "allocator fisher, metric none, rounding rtn, calibration random, target 6.5 bpw" in text
    assert made["plan_sha256"][:16] + "…" in text and made["scores_sha256"][:16] + "…" in text
    assert "made by" not in shown(source)
    plain = shown(converted(source, tmp_path / "c.gguf", uniform("Q8_0")), 120)
    assert "allocator uniform, metric none" in plain and "digests          plan " in plain and "scores 0" not in plain


@pytest.mark.parametrize("named", [0, 2])
def test_a_split_file_is_shown_as_one(named, tmp_path):
    whole, parts = split_tiny(tmp_path)
    found, wanted = inspect_gguf(parts[named]), inspect_gguf(whole)
    assert found.tensors == wanted.tensors and found.name == "Tiny"
    assert found.files == tuple(map(str, parts)) and not found.missing
    assert found.file_bytes == sum(part.stat().st_size for part in parts)
    assert "3 of 3 files, summed up" in shown(parts[named])


def test_missing_parts_are_named_and_the_rest_is_shown(tmp_path):
    _, parts = split_tiny(tmp_path)
    n_tensors = len(GGUFReader(parts[2]).tensors)
    for part in parts[:2]:
        part.unlink()
    found = inspect_gguf(parts[2])
    assert len(found.tensors) == n_tensors and found.missing == tuple(map(str, parts[:2]))
    text = shown(parts[2], 120)
    assert "1 of 3 files, summed up" in text and "part-00001-of-00003.gguf, part-00002-of-00003.gguf" in text


def test_a_renamed_part_stands_alone(tmp_path):
    _, parts = split_tiny(tmp_path)
    parts[1].rename(tmp_path / "other.gguf")
    assert inspect_gguf(tmp_path / "other.gguf").files == (str(tmp_path / "other.gguf"),)
    parts[0].rename(parts[1])  # a part in the place of another
    assert inspect_gguf(parts[1]).files == (str(parts[1]),)


def test_other_kinds_of_files(tmp_path):
    matrix = np.ones((2, 32), "f4")
    names = ("v.blk.0.attn_q.weight", "v.blk.1.attn_q.weight", "mm.0.weight")
    encoder = written(tmp_path / "a.gguf", dict.fromkeys(names, matrix), "clip", [lambda w: w.add_type("mmproj")])
    found = inspect_gguf(encoder)
    assert list(found.roles) == ["v.attn_q", "mm.0"] and list(found.layers) == ["v"]
    assert "Bits per weight of each layer of v" in shown(encoder) and "architecture clip" in shown(encoder)

    sums = dict.fromkeys(("blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"), np.ones((1, 32), "f4"))
    importance = written(tmp_path / "b.gguf", sums, keys=[lambda w: (w.kv_data[0].clear(), w.add_type("imatrix"))])
    assert inspect_gguf(importance).architecture == "imatrix" and "imatrix" in shown(importance)

    empty = written(tmp_path / "c.gguf", {})
    assert inspect_gguf(empty).bpw == 0 and "bits per weight" not in shown(empty)
    state_space = write_tiny_arch(tmp_path / "d.gguf", "mamba")
    assert {"ssm_in", "ssm_a", "ssm_conv1d"} <= set(inspect_gguf(state_space).roles)


def test_text_cannot_drive_the_terminal(tmp_path):
    evil = "\x1b]0;owned\x07\x1b[2J\r\nx\u202e"

    def keys(writer):
        writer.add_name(evil)
        writer.add_string(f"key{evil}", evil)
        writer.add_array("list", [evil, evil])

    path = written(tmp_path / "a.gguf", {f"blk.0.{evil}.weight": np.ones((2, 32), "f4")}, keys=[keys])
    text = shown(path, 300)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert r"\x1b]0;owned\x07\x1b[2J⏎x\u202e" in text


def test_long_values_are_shortened(tmp_path):
    def keys(writer):
        writer.add_string("text", "word " * 1000)
        writer.add_array("few", [1, 2, 3])
        writer.add_array("many", list(range(1000)))

    path = written(tmp_path / "a.gguf", {}, keys=[keys])
    metadata = inspect_gguf(path).metadata
    assert metadata["few"] == [1, 2, 3] and metadata["many"] == "[0, 1, 2, 3, … 1000 in all]"
    assert metadata["text"].endswith("… 5000 characters in all") and len(metadata["text"]) < 530
    assert max(map(len, shown(path, 80).splitlines())) == 80


def test_what_is_no_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"no such thing")
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        inspect_gguf(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="no such file"):
        inspect_gguf(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        inspect_gguf(tmp_path)


def test_quantized_files_of_the_tiny_model(tmp_path):
    path = write_tiny_gguf(tmp_path / "a.gguf", "Q8_0")
    weights = tiny_weights()
    n_quantized = sum(array.size for array in weights.values() if array.ndim == 2)
    n_other = sum(array.size for array in weights.values() if array.ndim == 1)
    found = inspect_gguf(path)
    assert found.quantized_bpw == 8.5 and len(found.layers[""]) == N_LAYERS
    assert found.bpw == (8.5 * n_quantized + 32 * n_other) / (n_quantized + n_other)
    assert quantize(weights["output.weight"], GGMLQuantizationType.Q8_0).nbytes == found.roles["output"].n_bytes
