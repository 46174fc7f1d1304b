"""Why a tensor got its type: words and sentences against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command import call
from recipes import recipe

from nsds_gguf.errors import PlanError, RecordError
from nsds_gguf.publish.explain import exchange_rate, in_a_word, sensitivity_per_weight, steps, why
from nsds_gguf.records import Plan, PlannedTensor, Scores, TensorCost

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"
ERRORS = {"Q2_K": 0.08, "Q3_K": 0.02, "Q4_K": 0.005}
BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144}  # of a block of 256


def planned(name: str, type_name: str = "Q3_K", sensitivity: float = 0.1, n_rows: int = 100, **values: object):
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    role = name.removesuffix(".weight").split(".", 2)[-1]
    n_bytes = n_rows * BYTES.get(type_name, 1024)
    tensor = PlannedTensor(
        name, role, layer, (n_rows, 256), type_name, n_bytes, "chosen", "optimum", ERRORS.get(type_name), 0.0, n_rows,
        sensitivity,
    )  # fmt: skip
    return replace(tensor, **values)


def plan_of(*tensors: PlannedTensor) -> Plan:
    return Plan(recipe(3, types=("Q2_K", "Q3_K", "Q4_K")), tensors, 0, "id", "model")


def scores_of(*tensors: PlannedTensor) -> Scores:
    costs = tuple(TensorCost(t.name, t.sensitivity or 0, ERRORS, dict.fromkeys(ERRORS, 0.0), 1) for t in tensors)
    return Scores(recipe(types=("Q2_K", "Q3_K", "Q4_K")), (), "id", "model", costs=costs)


AVERAGE = planned("blk.0.ffn_up.weight", "Q2_K", 0.1)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (planned("output.weight", "Q4_K", 1.0), "error reaches the logits directly"),
        (planned("token_embd.weight", "Q4_K", 1.14), "error reaches the logits directly"),
        (planned("token_embd.weight", "Q2_K", 0.01), "tolerant: 0.10 x the median weight"),
        (planned("blk.1.attn_v.weight", "Q4_K", 0.5), "sensitive: 5.0 x the median weight"),
        (planned("blk.1.attn_v.weight", "Q2_K", 0.1), "typical: 1.00 x the median weight"),
        (planned("blk.1.attn_q.weight", kind="fixed", reason="fixed by --tensor-type"), "fixed by --tensor-type"),
        (planned("blk.1.attn_norm.weight", "F32", kind="unquantized", reason="vector"), "vector: not quantized"),
        (
            planned("blk.1.ffn_down.weight", "Q5_0", kind="fallback", reason="rows of 896 are not a multiple of 256"),
            "rows of 896 are not a multiple of 256: Q5_0 at 5.5 bpw",
        ),
    ],
)  # fmt: skip
def test_words(tensor: PlannedTensor, word: str) -> None:
    assert in_a_word(plan_of(tensor, AVERAGE), tensor) == word


def test_a_cheap_tensor() -> None:
    tensor, large = (
        planned("blk.0.attn_k.weight", "Q4_K", 0.001, n_rows=1),
        planned("blk.0.ffn_up.weight", "Q2_K", 0.5, 500),
    )
    assert in_a_word(plan_of(tensor, large), tensor) == "cheap: 0.34 % of the bytes"


def test_the_median_is_that_of_the_layers_by_weights() -> None:
    small, large = (
        planned("blk.0.attn_v.weight", sensitivity=0.3, n_rows=100),
        planned("blk.0.ffn_up.weight", n_rows=300),
    )
    plan = plan_of(small, large, planned("output.weight", sensitivity=1.0))
    assert sensitivity_per_weight(plan, small) == pytest.approx((0.3 / 100) / (0.1 / 300))
    assert sensitivity_per_weight(plan, large) == pytest.approx(1.0)
    assert sensitivity_per_weight(plan, plan.tensors[2]) == pytest.approx((1.0 / 100) / (0.1 / 300))


def test_steps_down_and_up() -> None:
    tensor = planned("blk.0.ffn_up.weight", "Q3_K", 0.5)
    down, up = steps(tensor, scores_of(tensor).costs[0])
    assert (down.type, down.n_bytes, down.divergence) == ("Q2_K", -2600, pytest.approx(0.5 * 0.06))
    assert (up.type, up.n_bytes, up.divergence) == ("Q4_K", 3400, pytest.approx(-0.5 * 0.015))
    assert steps(planned("a", "Q2_K"), scores_of(tensor).costs[0])[0] is None
    assert steps(planned("a", "Q4_K"), scores_of(tensor).costs[0])[1] is None


def test_the_last_byte_is_the_best_step_left() -> None:
    tensors = [planned("blk.0.a.weight", "Q3_K", 0.5), planned("blk.0.b.weight", "Q2_K", 0.1)]
    plan, costs = plan_of(*tensors), {cost.name: cost for cost in scores_of(*tensors).costs}
    assert exchange_rate(plan, costs) == pytest.approx(max(0.5 * 0.015 / 3400, 0.1 * 0.06 / 2600))


def test_a_sentence_with_its_numbers() -> None:
    tensors = [planned("blk.0.a.weight", "Q3_K", 0.5), planned("blk.0.b.weight", "Q2_K", 0.25)]
    # divergence: 0.5 x 0.02 + 0.25 x 0.08 = 0.03; last byte: 0.25 x 0.06 / 2600 = 5.77e-6
    assert why(plan_of(*tensors), scores_of(*tensors), "blk.0.a.weight") == (
        "blk.0.a.weight is Q3_K: 3.4375 bits per weight, 11,000 bytes, 57 % of the total (sensitive: 2.0 x the median "
        "weight). Its relative error at this type is 0.02, its sensitivity 0.5: 33 % of the predicted divergence. "
        "Q2_K would save 2,600 bytes and add 100 % to the divergence, 2 x what the plan pays for its last bytes. "
        "Q4_K would cost 3,400 bytes and remove 25 %, 0.38 x what the plan pays for its last bytes."
    )


def test_without_scores_only_the_plan_speaks() -> None:
    tensor = planned("blk.0.a.weight", "Q3_K", 0.5)
    assert why(plan_of(tensor), None, tensor.name).endswith("100 % of the total (typical: 1.00 x the median weight).")


def test_a_tensor_that_is_not_there() -> None:
    with pytest.raises(PlanError, match=r"--why blk\.0\.aa: no such tensor; nearest is blk\.0\.a\.weight"):
        why(plan_of(planned("blk.0.a.weight")), None, "blk.0.aa")


def test_scores_that_lack_the_type() -> None:
    tensor = planned("blk.0.a.weight", "Q6_K", 0.5, error=0.1)
    with pytest.raises(RecordError, match="no error of blk"):
        why(plan_of(tensor), scores_of(tensor), tensor.name)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    outcome = call("plan", DEMO, "--target-bpw", "3.2", "--threads", 1, "--why", "output.weight", "--json", written)
    assert outcome.code == 0, outcome.err
    plan = Plan.from_json(json.loads(written.read_text()))
    (output,) = (tensor for tensor in plan.tensors if tensor.name == "output.weight")
    bits = 8 * output.n_bytes / output.n_weights
    assert f"output.weight is {output.type}: {bits:g} bits per weight, {output.n_bytes:,} bytes" in outcome.out
    assert "what the plan pays for its last bytes." in outcome.out
    assert call("plan", DEMO, "--target-bpw", "3.2", "--why", "output").code == 4
