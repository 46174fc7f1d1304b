"""The public API: its names, its example in the README, and that it does what the command line does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import TINY, call
from gguf import GGUFReader
from tiny_models import write_tiny

import nsds_gguf
from nsds_gguf import Options, Run, convert, open_model, plan, score
from nsds_gguf.records import Recipe
from nsds_gguf.session.settle import settle

README = Path(__file__).parent.parent / "README.md"

ASKED = [
    ({"target_bpw": 6.0}, ["--target-bpw", 6, "--rounding", "auto"]),
    ({"target_bpw": 6.0, "rounding": "rtn", "seed": 1}, ["--target-bpw", 6, "--rounding", "rtn", "--seed", 1]),
    ({"target_bpw": 6.0, "rounding": "gptq", "calibration": "random"}, ["--target-bpw", 6, "--rounding", "gptq",
                                                                       "--calibration", "random"]),
    ({"uniform": "Q5_0"}, ["--uniform", "q5_0"]),
    ({"target_bpw": 6.0, "score_weight": 1.0, "rounding": "rtn"}, ["--target-bpw", 6, "--score-weight", 1,
                                                                   "--rounding", "rtn"]),
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", TINY)


def test_every_public_name_is_there_and_documented() -> None:
    for name in nsds_gguf.__all__:
        found = getattr(nsds_gguf, name)
        assert name == "__version__" or found.__doc__, name
    assert set(dir(nsds_gguf)) == set(nsds_gguf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'converter'"):
        nsds_gguf.converter  # noqa: B018


def test_public_names_stay_functions_whatever_is_imported() -> None:
    code = (
        "import nsds_gguf.cli.verbs, nsds_gguf.metrics, nsds_gguf.conversion\n"
        "from nsds_gguf import convert, plan, score, compare, perplexity, open_model\n"
        "print(all(callable(f) and not hasattr(f, '__path__') for f in "
        "(convert, plan, score, compare, perplexity, open_model)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(("options", "arguments"), ASKED, ids=lambda value: str(value)[:40])
def test_python_and_the_command_line_write_the_same_bytes(
    model: Path, tmp_path: Path, options: dict[str, object], arguments: list[object]
) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "shell").mkdir()
    verifying = nsds_gguf.VerifyOptions(enabled=False)
    (result,) = convert(model, Options(**options), output=tmp_path / "python", verifying=verifying, run=Run(1))
    outcome = call("convert", model, *arguments, "--no-verify", "--threads", 1, "-o", tmp_path / "shell", "-q")
    assert outcome.code == 0
    (other,) = (tmp_path / "shell").iterdir()
    assert other.name == result.path.name and other.read_bytes() == result.path.read_bytes()


def test_the_recipe_is_carried_whole(model: Path, tmp_path: Path) -> None:
    """By scores, plans and the file's own keys."""
    asked = Options(target_bpw=6.0, rounding="rtn", score_weight=0.5, seed=3, prefer="fast")
    recipe = settle(asked, open_model(model)).recipe
    scores = score(model, asked, run=Run(1))
    planned = plan(model, asked, loaded=scores, run=Run(1))
    assert scores.recipe == recipe.to(None) and planned.plans[0].recipe == recipe
    verifying = nsds_gguf.VerifyOptions(enabled=False)
    (result,) = convert(model, asked, output=tmp_path, verifying=verifying, loaded=scores, run=Run(1))
    text = str(GGUFReader(result.path).fields["nsds_gguf.recipe"].contents())
    assert text == recipe.to_json() and set(json.loads(text)) == set(Recipe.__dataclass_fields__)


def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = re.search(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    lines = [line for line in example[1].splitlines() if line.strip()]
    assert len(lines) <= 5
    write_tiny(tmp_path / "model", TINY)
    monkeypatch.chdir(tmp_path)
    exec(example[1].replace("target_bpw=3.0", "target_bpw=6.0"), {})
    assert ".gguf" in capsys.readouterr().out
