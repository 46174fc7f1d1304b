"""Run llama.cpp's convert_hf_to_gguf.py on model folders: what ``check_converter.py`` starts in a process of its own.

    python tools/check/run_converter.py LLAMA_CPP_DIR < jobs.json > results.json

A job is ``{"folder", "outfile", "outtype", "pre", "options"}``, with ``"mmproj"`` for the vision part; its result is
``null``, or the last line that the converter wrote when it failed. The converter is imported once and each job runs in
a fork of it.

Two things are replaced, because tiny models have a tiny tokenizer, and only where the converter would give up:

* ``get_vocab_base_pre`` knows pre-tokenizers by a hash of token ids: where it does not know it, the job's ``pre``;
* ``set_vocab`` of classes that want ``tokenizer.model``, or tokens or attributes of their own: where there are none,
  that of byte-level tokenizers.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import IO, Any


def main() -> None:
    llama_cpp = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    converter = importlib.import_module("convert_hf_to_gguf")
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018 - imported lazily: once, not in every fork
    jobs = json.load(sys.stdin)
    json.dump([run(converter, job) for job in jobs], sys.stdout)


def run(converter: Any, job: dict[str, str]) -> str | None:
    """Run one job in a fork and return what it said if it failed."""
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            convert(converter, job, log)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return None
        log.seek(0)
        said = log.read().decode(errors="replace").split("\n\nDuring handling of the above exception")[0].strip()
        return said.split("\n")[-1] or f"wait status {status}"


def convert(converter: Any, job: dict[str, str], log: IO[bytes]) -> None:
    """Convert and leave the process, whatever happens."""
    code = 1
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        if not job.get("mmproj"):  # a vision part has no tokenizer
            allow_tiny_tokenizers(converter, job["pre"])
        sys.argv = ["convert_hf_to_gguf.py", job["folder"], "--outfile", job["outfile"], "--outtype", job["outtype"]]
        sys.argv += ["--mmproj"] if job.get("mmproj") else []
        sys.argv += job.get("options", "").split()
        converter.main()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)


def allow_tiny_tokenizers(converter: Any, pre: str) -> None:
    """Replace what would give up on a tokenizer that is nobody's."""
    text_model = importlib.import_module("conversion.base").TextModel
    known_pre, find_class = text_model.get_vocab_base_pre, converter.get_model_class

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            name: str = known_pre(self, tokenizer)
        except NotImplementedError:
            return pre
        return name

    def get_model_class(*args: Any, **kwargs: Any) -> Any:
        found = find_class(*args, **kwargs)
        own = found.set_vocab

        def set_vocab(self: Any) -> None:
            try:
                own(self)
            except (AttributeError, FileNotFoundError, KeyError, SystemExit):
                if (self.dir_model / "tokenizer.model").exists():
                    raise
                self._set_vocab_gpt2()

        found.set_vocab = set_vocab
        return found

    text_model.get_vocab_base_pre, converter.get_model_class = get_vocab_base_pre, get_model_class


if __name__ == "__main__":
    main()
