"""Compare llama.cpp's logits on our F32 GGUF with transformers' on the checkpoint, and record the latter for the tests.

    python tools/check_logits.py [--record] [NAME ...]

Runs the tiny models of ``tests/tiny_models.py``, all or those named: transformers in float32 with eager attention,
llama.cpp with an F32 cache. For each it demands that

* config.json is what transformers writes (form 5) or reads without loss (form 4);
* the largest difference is at most 1e-3 of the largest logit, and the argmax is the same at every position where the
  two best are further apart than that;
* attention is peaked: its mean entropy is under 60 % of the uniform one's;
* every error of ``tests/mutations.py`` moves llama.cpp's logits by more than 20 times the tolerance;
* the recorded logits, unless they are being written, are those of this run.

Needs the ``dev`` extra. Exit code 1 when anything is off or a package is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the models, the errors and the comparison of the tests themselves

from test_logits import BITE, GOLDEN, TOLERANCE, best_tokens, difference, model_logits, moves, recorded  # noqa: E402
from tiny_models import SPECS, Spec, digest, tiny_config, tiny_tokens, write_tiny  # noqa: E402

from nsds_gguf.llama import llama_build  # noqa: E402
from nsds_gguf.read import open_model  # noqa: E402
from nsds_gguf.records import Float32  # noqa: E402

MAX_ENTROPY = 0.6  # of the uniform attention's

# transformers 4 ignores rope_parameters.
MIN_TRANSFORMERS = 5

Golden = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Outcome:
    """What came out for one model; ``entropy`` is a part of the uniform attention's, ``faults`` says what is off."""

    error: float
    entropy: float
    weakest: tuple[str, float]
    faults: tuple[str, ...]


def main() -> int:
    args = _arguments()
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"error: {error}; run: pip install 'nsds-gguf[dev]'", file=sys.stderr)
        return 1
    if int(transformers.__version__.split(".")[0]) < MIN_TRANSFORMERS:
        print(f"error: wanted transformers {MIN_TRANSFORMERS}, got {transformers.__version__}", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {llama_build()}")
    golden = {} if args.record or not GOLDEN.exists() else dict(np.load(GOLDEN, allow_pickle=False))
    fresh: Golden = {}
    n_faults = 0
    print(f"{'model':36} {'difference':>10} {'entropy':>8}  least moved by an error")
    for name in args.names or SPECS:
        outcome, arrays = check(name, golden if not args.record else None)
        fresh |= arrays
        n_faults += len(outcome.faults)
        error, by = outcome.weakest
        print(f"{name:36} {outcome.error:10.1e} {outcome.entropy:8.2f}  {by / TOLERANCE:6.0f} x tolerance: {error}")
        for fault in outcome.faults:
            print(f"  WRONG: {fault}")
    if args.record and not n_faults:
        np.savez_compressed(GOLDEN, **fresh)
        print(f"wrote {GOLDEN.relative_to(ROOT)}: {GOLDEN.stat().st_size} bytes")
    print(f"{n_faults} faults")
    return 1 if n_faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare llama.cpp's logits on our GGUF with transformers'.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to check; default: all")
    parser.add_argument("--record", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SPECS))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    if args.record and args.names:
        parser.error("--record takes all models")
    return args


def check(name: str, golden: Golden | None) -> tuple[Outcome, Golden]:
    """Check one model; returns what came out and the arrays to record. ``golden`` ``None`` compares with none."""
    spec = SPECS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = write_tiny(folder / "checkpoint", spec)
        config = config_of(checkpoint)
        wanted, entropy = transformers_logits(checkpoint, tiny_tokens(spec))
        ours = model_logits(open_model(checkpoint), folder / "model.gguf", tiny_tokens(spec))
        moved = moves(folder, spec)
    error, best = difference(ours, wanted), best_tokens(wanted)
    arrays: Golden = {
        f"{name}/digest": np.array(digest(spec)),
        f"{name}/logits": recorded(wanted),
        f"{name}/largest": np.abs(wanted).max(),
        f"{name}/best": best,
    }
    checks = {
        f"config.json is not what transformers makes of it: {config}": spec.form == 5 and config != _own_config(spec),
        f"difference above {TOLERANCE}": error > TOLERANCE,
        "argmax differs": not np.array_equal(ours.argmax(axis=1)[best >= 0], best[best >= 0]),
        f"entropy above {MAX_ENTROPY} of uniform": entropy > MAX_ENTROPY,
        "recorded logits are others": golden is not None and not _same(arrays, golden),
    }
    faults = [fault for fault, found in checks.items() if found]
    faults += [f"{what}: moves the logits by {by:.1e} only" for what, by in moved.items() if by <= BITE * TOLERANCE]
    weakest = min(moved.items(), key=lambda item: item[1])
    return Outcome(error, entropy, weakest, tuple(faults)), arrays


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json as transformers writes it after reading it."""
    from transformers import AutoConfig

    config: dict[str, Any] = json.loads(AutoConfig.from_pretrained(folder).to_json_string())
    del config["transformers_version"]
    return config


def _own_config(spec: Spec) -> dict[str, Any]:
    return {key: value for key, value in tiny_config(spec).items() if key != "transformers_version"}


def transformers_logits(folder: Path, tokens: list[int]) -> tuple[Float32, float]:
    """Return transformers' logits, ``(n_tokens, n_vocab)`` float32, and the attention entropy as a part of uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_attentions=True)
    attention = np.stack([layer[0].double().numpy() for layer in output.attentions])  # layer, head, query, key
    logarithms = np.log(attention, out=np.zeros_like(attention), where=attention > 0)
    entropy = -(attention * logarithms).sum(axis=-1).mean(axis=(0, 1))
    uniform = np.log(np.arange(1, len(tokens) + 1))
    return output.logits[0].float().numpy(), float(entropy.sum() / uniform.sum())


def _same(arrays: Golden, golden: Golden) -> bool:
    """Return whether recorded arrays are those of this run, but for rounding on another machine."""
    if not arrays.keys() <= golden.keys():
        return False
    logits = [key for key in arrays if key.endswith(("/logits", "/largest"))]
    exact = [key for key in arrays if key not in logits]
    return all(np.array_equal(arrays[key], golden[key]) for key in exact) and all(
        np.allclose(arrays[key], golden[key], rtol=0, atol=TOLERANCE / 10 * np.abs(golden[key]).max()) for key in logits
    )


if __name__ == "__main__":
    sys.exit(main())
