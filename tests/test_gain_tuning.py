"""Gains of norms tuned to rounded weights: derivatives against differences, divergence against plain logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from arrays import random_arrays
from command import TINY
from gguf import GGUFReader
from models import make_model
from recorded_inputs import logits_of
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny
from zoo_specs import write_spec

from nsds_gguf import conversion
from nsds_gguf.calibration import generated_text
from nsds_gguf.compute.decoder import Decoder
from nsds_gguf.compute.gain_tape import GainTape
from nsds_gguf.compute.layers import view_layer
from nsds_gguf.compute.tape import Node
from nsds_gguf.errors import PlanError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.quantize.gain_tuning import HELD_OUT, tune_gains, write_gains
from nsds_gguf.read import open_model
from nsds_gguf.records import Options
from nsds_gguf.session.run import Run
from nsds_gguf.session.settle import settle

# Plain, gains of queries and keys (shared by heads, and one a head), norms behind blocks, layer norms, parallel blocks,
# experts.
FAMILIES = ["llama-biases", "qwen3", "cohere-qk-norm", "gemma2", "olmo2", "gpt2", "phi-2", "mixtral"]


@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_by_gains_are_those_of_differences(name, tmp_path):
    model = open_model(write_spec(tmp_path / "checkpoint", name))
    n, width, rng = 12, model.hparams.n_embd, np.random.default_rng(0)
    x, by_output = (rng.standard_normal((n, width), dtype=np.float32) for _ in range(2))
    decoder, view = Decoder.of(model, n // 2), view_layer(model, 0)

    def layer(gains):
        tape = GainTape(None, n // 2, {}, gains=gains)
        return tape, decoder.layer(tape, view, Node(x))

    tape, out = layer({})
    out.receive(by_output)
    tape.backward()
    wanted = {t.name for t in model.tensors if t.layer == 0 and t.role.endswith("norm")}
    assert tape.gain_grads.keys() == wanted and wanted
    for gain in sorted(wanted):
        start = model.by_name[gain].load().ravel()
        along, step = rng.standard_normal(start.shape, dtype=np.float32), np.float32(3e-3)
        ahead, back = (layer({gain: start + sign * step * along})[1].value.astype("f8") for sign in (1, -1))
        difference = float(((ahead - back) * by_output).sum()) / (2 * step)
        assert float(tape.gain_grads[gain] @ along) == pytest.approx(difference, rel=2e-2, abs=1e-3), gain


def divergence(original, arrays, hparams, tokens):
    """Return the mean KL divergence of a model of arrays, in float64."""
    total = 0.0
    for sequence in tokens:
        p, q = (logits_of(model, sequence).astype("f8") for model in (original, make_model(arrays, hparams)))
        p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
        total += float((np.exp(p) * (p - q)).sum(axis=1).mean())
    return total / len(tokens)


def noisy(arrays, share):
    """Return arrays whose matrices lost a share of every second column, and gained noise."""
    rng, found = np.random.default_rng(3), {}
    for name, array in arrays.items():
        noise = share * array.std() * rng.standard_normal(array.shape)
        shrunk = np.where(np.arange(array.shape[-1]) % 2, 1 - share, 1)
        found[name] = (array * shrunk + noise).astype(np.float32) if array.ndim == 2 else array
    return found


def test_tuned_gains_lower_the_divergence_by_what_they_say():
    arrays, hparams = random_arrays(5, n_layers=2, qk_norm=True)
    changed = noisy(arrays, 0.2)
    original, quantized = make_model(arrays, hparams), make_model(changed, hparams)
    tokens = np.random.default_rng(2).integers(0, hparams.n_vocab, (2 * HELD_OUT, 24))
    done = []
    found = tune_gains(original, quantized, tokens, 1, lambda *at: done.append(at))
    assert found.gains.keys() == {name for name in arrays if name.endswith("norm.weight")}
    held = tokens[-2:]
    assert found.before == pytest.approx(divergence(original, changed, hparams, held), rel=1e-4)
    assert found.after == pytest.approx(divergence(original, {**changed, **found.gains}, hparams, held), rel=1e-4)
    assert found.after < 0.9 * found.before
    assert done == sorted(done) and done[-1][0] == done[-1][1]
    threads = tune_gains(original, quantized, tokens, 3)
    assert all(np.array_equal(found.gains[name], threads.gains[name]) for name in found.gains)


def test_gains_stay_where_nothing_is_to_gain():
    arrays, hparams = random_arrays(5)
    model = make_model(arrays, hparams)
    tokens = np.random.default_rng(2).integers(0, hparams.n_vocab, (4, 16))
    found = tune_gains(model, model, tokens)
    assert found.gains == {} and abs(found.before) < 1e-6
    assert "stay as they are" in found.note


def test_gains_are_written_in_place(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    before = path.read_bytes()
    old = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    gain = np.linspace(0.5, 2, 64, dtype=np.float32)
    write_gains(path, {"blk.1.ffn_norm.weight": gain})
    new = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    assert [name for name in old if not np.array_equal(old[name], new[name])] == ["blk.1.ffn_norm.weight"]
    np.testing.assert_array_equal(new["blk.1.ffn_norm.weight"], gain)
    at = before.index(old["blk.1.ffn_norm.weight"].tobytes())
    assert path.read_bytes() == before[:at] + gain.tobytes() + before[at + gain.nbytes :]


def test_a_conversion_changes_norms_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(generated_text, "N_TOKENS", 512)
    source, found = write_tiny_gguf(tmp_path / "tiny.gguf"), {}
    for is_tuned in (False, True):
        options = Options(uniform="Q4_0", rounding="gptq", calibration="generated", tune_norms=is_tuned)
        path = tmp_path / f"{is_tuned}.gguf"
        conversion.convert(source, options, output=path, verifying=VerifyOptions(enabled=False), run=Run(1))
        reader = GGUFReader(path)
        found[is_tuned] = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        assert json.loads(reader.fields["nsds_gguf.recipe"].contents())["tune_norms"] is is_tuned
    changed = {name for name, data in found[False].items() if not np.array_equal(data, found[True][name])}
    assert changed == {name for name in found[False] if name.endswith("norm.weight")}
    ratios = np.concatenate([found[True][name] / found[False][name] for name in changed])
    assert 1e-4 < np.abs(ratios - 1).mean() < 0.2


def test_refused_where_predictions_cannot_be_compared(tmp_path):
    model = open_model(write_tiny(tmp_path / "tiny", TINY))
    for calibration in ("random", "none"):
        options = Options(target_bpw=5, rounding="rtn", calibration=calibration, tune_norms=True)
        with pytest.raises(PlanError, match=f"the calibration is {calibration}; drop it, or pass --calibration gen"):
            settle(options, model)
