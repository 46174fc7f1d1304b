"""Coverage-guided fuzzing of the readers with atheris (libFuzzer), where it finds more than blind mutation.

    pip install atheris
    python tools/check/fuzz_atheris.py safetensors|gguf|config|tokenizer|proto|imatrix|plan -runs=100000 [libFuzzer's
    options]

libFuzzer's bytes are the mutated file itself; the corpus begins with a whole one, and with a hundred of
``fuzz_mutations``. The same is demanded as in ``fuzz.py``: an ``NsdsError`` or nothing; anything else ends the run.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["nsds_gguf"]):
    import fuzz_inputs

    from nsds_gguf.errors import NsdsError

KINDS = {
    "safetensors": "safetensors header",
    "index": "safetensors index",
    "gguf": "GGUF header",
    "config": "config.json",
    "tokenizer": "tokenizer.json",
    "side": "tokenizer side files",
    "proto": "tokenizer.model",
    "imatrix": "imatrix.dat",
    "plan": "plan record",
    "scores": "scores record",
}
_N_SEEDS = 100


def main() -> None:
    name, options = sys.argv[1], sys.argv[2:]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    for path in (folder / "inputs", folder / "out", corpus):
        path.mkdir()
    targets = fuzz_inputs.make_inputs(folder / "inputs", folder / "out" / "keys.gguf")[KINDS[name]]
    target = targets[0]
    if target.file.exists():
        (corpus / "whole").write_bytes(target.file.read_bytes())
    for number in range(_N_SEEDS):
        (corpus / f"mutated-{number}").write_bytes(target.mutate(Random(number)))

    def test_one(data: bytes) -> None:
        target.file.write_bytes(data)
        with contextlib.suppress(NsdsError):
            target.use()

    atheris.Setup(
        [sys.argv[0], "-timeout=10", "-rss_limit_mb=1024", "-max_len=200000", *options, str(corpus)], test_one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
