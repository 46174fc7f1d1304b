"""The whole pipeline on the shipped demo model."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from nsds_gguf import conversion
from nsds_gguf.allocate import parse_tensor_type
from nsds_gguf.errors import PlanError, RecordError
from nsds_gguf.evaluate.texts import VerifyOptions
from nsds_gguf.llamacpp import ggml
from nsds_gguf.publish.tensor_type_file import tensor_type_file
from nsds_gguf.records import Options, Plan, Scores
from nsds_gguf.session.outputs import Output
from nsds_gguf.session.run import Run, Silent

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"
FEW = VerifyOptions(n_chunks=4)
OFF = VerifyOptions(enabled=False)


def bpw(value, **options):
    return Options(**{"target_bpw": value, "rounding": "rtn", **options})


@pytest.fixture(scope="module")
def scores():
    return conversion.score(DEMO, Options(rounding="rtn"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The demo model at its own precision."""
    path = tmp_path_factory.mktemp("reference") / "demo-BF16.gguf"
    conversion.convert(DEMO, Options(uniform="BF16"), output=path, verifying=OFF)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_original_precision_is_the_checkpoint_bit_for_bit(reference):
    found = {tensor.name: tensor for tensor in GGUFReader(reference).tensors}
    raw = (DEMO / "model.safetensors").read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + n_header])["model.layers.2.mlp.down_proj.weight"]
    begin, end = entry["data_offsets"]
    assert found["blk.2.ffn_down.weight"].data.tobytes() == raw[8 + n_header :][begin:end]


@pytest.mark.slow
def test_one_run_makes_several_files_and_checks_them(tmp_path, scores, reference):
    stages = []

    class Listener(Silent):
        def stage(self, name):
            stages.append(name)
            return super().stage(name)

    verifying = dataclasses.replace(FEW, reference=str(reference))
    results = conversion.convert(
        DEMO, [bpw(2.8), bpw(4.5)], verifying=verifying, output=tmp_path, run=Run(report=Listener())
    )
    assert [result.path.name.rsplit("-", 1)[1] for result in results] == ["FISHER_2_80BPW.gguf", "FISHER_4_50BPW.gguf"]
    assert stages.count("find sensitivities") == stages.count("measure tensors") == 1
    assert not any(name.startswith("score layers") for name in stages)  # nothing uses the scores
    coarse, fine = (result.perplexity.divergence for result in results)
    assert coarse.reference_ppl == fine.reference_ppl
    assert 0 < fine.kld_mean < coarse.kld_mean < 1 and fine.same_top > coarse.same_top > 0.5
    for result in results:
        assert result.path.stat().st_size == result.plan.file_bytes
        assert result.plan.unused_bytes >= 0
        for tensor in result.plan.tensors:  # no upgrade that fits is left
            for name in result.plan.recipe.types if tensor.reason == "optimum" else ():
                extra = tensor.n_weights // 256 * ggml.block(name)[1] - tensor.n_bytes
                assert extra <= 0 or extra > result.plan.unused_bytes
    assert sorted(tmp_path.iterdir()) == sorted(result.path for result in results)


def test_same_input_same_bytes_whatever_the_threads(tmp_path, scores):
    digests = set()
    for n_threads in (1, 3):
        output = Output(tmp_path / "model.gguf", force=True)
        conversion.convert(DEMO, [bpw(3.1)], loaded=scores, output=output, verifying=OFF, run=Run(n_threads))
        digests.add(sha256(tmp_path / "model.gguf"))
    assert len(digests) == 1


def test_target_size_counts_the_whole_file(tmp_path, scores):
    (result,) = conversion.convert(
        DEMO, bpw(None, target_size=2_000_000), loaded=scores, output=tmp_path, verifying=OFF
    )
    assert 2_000_000 * 0.999 < result.path.stat().st_size <= 2_000_000


@pytest.mark.slow
def test_scores_and_plans_come_back_from_files(tmp_path, scores):
    kept = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    (plan,) = conversion.plan(DEMO, [bpw(3.3)], loaded=kept).plans
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    conversion.convert(DEMO, [bpw(3.3)], loaded=scores, output=first, verifying=OFF)
    conversion.convert(DEMO, Options(), loaded=again, output=second, verifying=OFF)
    assert sha256(first) == sha256(second)


def test_a_plan_edited_by_hand_is_followed_within_its_target(tmp_path, scores):
    (plan,) = conversion.plan(DEMO, [bpw(3.3)], loaded=scores).plans

    def with_type(name, type_name):
        tensors = (dataclasses.replace(t, type=type_name) if t.name == name else t for t in plan.tensors)
        return dataclasses.replace(plan, tensors=tuple(tensors))

    path = tmp_path / "edited.gguf"
    conversion.convert(DEMO, Options(), loaded=with_type("blk.0.ffn_up.weight", "q2_k"), output=path, verifying=OFF)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == "Q2_K"
    with pytest.raises(PlanError, match=r"^the plan exceeds its target 3\.3 bpw by \d+ bytes$"):
        conversion.convert(DEMO, Options(), loaded=with_type("output.weight", "F32"), output=Output(path, force=True))
    with pytest.raises(RecordError, match=r"^the plan belongs to another model"):
        conversion.convert(DEMO, Options(), loaded=dataclasses.replace(plan, model_id="0" * 64))


def test_fixed_types_hold_in_the_file(tmp_path):
    path = tmp_path / "fixed.gguf"
    options = bpw(4.3, tensor_types=tuple(map(parse_tensor_type, (r"blk\.[01]\..*=Q5_K", "output.weight=Q8_0"))))
    conversion.convert(DEMO, [options], output=path, verifying=OFF)
    for tensor in GGUFReader(path).tensors:
        if tensor.name.startswith(("blk.0.", "blk.1.")) and len(tensor.shape) > 1:
            assert tensor.tensor_type.name == "Q5_K"
    assert next(t for t in GGUFReader(path).tensors if t.name == "output.weight").tensor_type.name == "Q8_0"


@pytest.mark.parametrize("allocator", ["fisher", "paper"])
def test_files_say_where_they_come_from(tmp_path, scores, allocator):
    path = tmp_path / "model.gguf"
    (result,) = conversion.convert(DEMO, [bpw(3.7, allocator=allocator)], loaded=scores, output=path, verifying=OFF)
    keys = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert keys["nsds_gguf.allocator"] == allocator and keys["nsds_gguf.target"] == "3.7 bpw"
    assert keys["nsds_gguf.recipe"] == result.plan.recipe.to_json()
    assert keys["nsds_gguf.scores_sha256"] == scores.digest and keys["nsds_gguf.plan_sha256"] == result.plan.digest
    assert keys["general.quantization_version"] == 2 and keys["general.size_label"] == "4.6M"


@pytest.mark.slow
def test_default_plan_beats_whole_layers_at_the_same_bytes(tmp_path, scores, reference):
    """The reason for all this: less divergence at the same bytes."""

    def divergence(options):
        path = tmp_path / "model.gguf"
        verifying = dataclasses.replace(FEW, n_chunks=8, reference=str(reference))
        output = Output(path, force=True)
        (result,) = conversion.convert(DEMO, [options], loaded=scores, output=output, verifying=verifying)
        return result.plan.bpw, result.perplexity.divergence.kld_mean

    paper_bpw, paper = divergence(bpw(3.5, allocator="paper"))
    _, ours = divergence(bpw(paper_bpw + 1e-6))
    assert ours < 0.8 * paper


def test_tensor_type_file_is_anchored(scores):
    (plan,) = conversion.plan(DEMO, [bpw(3.3)], loaded=scores).plans
    lines = tensor_type_file(plan).splitlines()
    assert len(lines) == sum(len(t.shape) > 1 for t in plan.tensors)
    assert any(line.startswith(r"^blk\.1\.attn_q\.weight$=q") for line in lines)


def test_costs_fall_with_bits(scores):
    assert scores.recipe.calibration == "random" and np.isfinite([c.sensitivity for c in scores.costs]).all()
    assert all(c.errors["Q6_K"] < c.errors["Q4_K"] < c.errors["Q2_K"] for c in scores.costs)
