"""Measure the quality of plans on the zoo of models and write docs/quality.md and docs/quality.json.

    python tools/quality/quality.py --work DIR --text NAME=FILE --calibration FILE [--zoo DIR] [--models A,B]
    [--partial]

Every text is cut in two: sensitivities, and whatever else is chosen, come from the first half of the first text; the
tables are measured on the second halves. ``--trial`` measures everything on the first half and leaves the second alone.

What is measured is kept in ``--work`` at once, so that a run that was interrupted goes on where it stopped, and models
can be measured by several runs side by side (``--models``). The page is made of all models of the zoo
(``quality_zoo.py``) that were measured in this run or, by the same settings and the same code, an earlier one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import outlier_copy
from quality_figures import alpha
from quality_measure import N_CTX, Passage, digest, halves
from quality_model import CALIBRATION_BYTES, CALIBRATION_PIECES, ModelBench, Settings, calibration_text
from quality_page import page
from quality_sensitivity import MEASURED_AT
from quality_zoo import IN_REPOSITORY, ROOT, ZOO, Entry

from nsds_gguf.evaluate.texts import read_text
from nsds_gguf.llamacpp import llama

PAGE, NUMBERS = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.json"
FORMAT = "nsds-gguf quality 1"

N_CHUNKS = 32
N_SENSITIVITY_CHUNKS = 16


def main() -> int:
    arguments = parser().parse_args()
    entries = chosen(arguments.models)
    folders = {entry.name: source(entry, arguments) for entry in ZOO}
    missing = [entry.name for entry in entries if folders[entry.name] is None]
    if missing and not arguments.partial:
        print(f"error: not there: {', '.join(missing)}; name their folder with --zoo, or pass --partial")
        return 1
    settings = make_settings(arguments)
    mark = settings_digest(arguments, settings)
    for entry in entries:
        folder = folders[entry.name]
        if folder is not None:
            measure(entry, folder, settings, arguments.work, mark)
    results, unmeasured = known_results(arguments.work, mark)
    if not results:
        print("error: nothing was measured")
        return 1
    write(results, {**facts(arguments), "missing": unmeasured}, arguments.page, arguments.numbers)
    if arguments.alphas is not None:
        write_alphas(results, arguments.alphas)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is measured; may be an earlier run's")
    parser.add_argument("--text", action="append", required=True, metavar="[NAME=]FILE", help="may be given again")
    parser.add_argument("--calibration", type=Path, help="in-domain text for the real imatrix, also .xz")
    parser.add_argument("--zoo", type=Path, help="folder of the models that are not in the repository")
    parser.add_argument("--models", help="names of the zoo, by commas; all unless told")
    parser.add_argument("--partial", action="store_true", help="go on without models that are not there")
    parser.add_argument("--trial", action="store_true", help="tables too on the half for choosing")
    parser.add_argument("--chunks", type=int, default=N_CHUNKS)
    parser.add_argument("--sensitivity-chunks", type=int, default=N_SENSITIVITY_CHUNKS)
    parser.add_argument("--sensitivity-types", default=",".join(MEASURED_AT))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frozen", help="commit at which constants were frozen; the last that touched the package")
    parser.add_argument("--alphas", type=Path, help="folder that gets sensitivities as NAME.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--numbers", type=Path, default=NUMBERS)
    return parser


def chosen(names: str | None) -> list[Entry]:
    """Return the entries of some names; ends the program when one is not known."""
    if names is None:
        return list(ZOO)
    known = {entry.name: entry for entry in ZOO}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"error: {unknown[0]!r} is not in the zoo; it has {'; '.join(known)}")
    return [known[name] for name in wanted]


def source(entry: Entry, arguments: argparse.Namespace) -> Path | None:
    """Return the folder of a model, that of a copy made when it is first needed; ``None`` where it is not there."""
    if entry.copy_of:
        original = source(next(e for e in ZOO if e.name == entry.copy_of), arguments)
        if original is None:
            return None
        target = arguments.work / "copies" / entry.name
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            outlier_copy.outlier_copy(original, target, entry.seed)
        return target
    places = [ROOT / IN_REPOSITORY, *([arguments.zoo] if arguments.zoo else [])]
    return next((place / entry.folder for place in places if (place / entry.folder / "config.json").is_file()), None)


def make_settings(arguments: argparse.Namespace) -> Settings:
    final, choosing = [], None
    for text in arguments.text:
        name, path = named(text)
        first, second = halves(read_text(path))
        choosing = choosing or Passage(name, "choosing", first, arguments.sensitivity_chunks)
        half, words = ("choosing", first) if arguments.trial else ("final", second)
        final.append(Passage(name, half, words, arguments.chunks))
    if choosing is None:
        raise SystemExit("error: no text")
    calibration = None if arguments.calibration is None else calibration_text(arguments.calibration)
    types = tuple(arguments.sensitivity_types.split(","))
    return Settings(tuple(final), choosing, calibration, types, arguments.threads,
                    lambda line: print(line, file=sys.stderr, flush=True))  # fmt: skip


def named(text: str) -> tuple[str, Path]:
    """Return name and path of ``NAME=FILE``, or of ``FILE`` by its stem."""
    name, separator, path = text.partition("=")
    return (name, Path(path)) if separator else (Path(text).stem, Path(text))


def settings_digest(arguments: argparse.Namespace, settings: Settings) -> str:
    """Return a digest of what results must share to stand in one table: settings, and the code that decides."""
    package, here = ROOT / "nsds_gguf", Path(__file__).parent
    code = [*sorted(package.rglob("*.py")), *(here / f"quality_{name}.py" for name in ("measure", "model", "zoo"))]
    passages = [f"{p.name} {p.half} {p.digest} {p.n_chunks}" for p in (*settings.final, settings.choosing)]
    return digest(
        *passages,
        settings.calibration or "",
        arguments.sensitivity_types,
        llama.llama_build(),
        *(file.read_text(encoding="utf-8") for file in code),
    )


def measure(entry: Entry, folder: Path, settings: Settings, work: Path, mark: str) -> None:
    """Measure one model and keep its result."""
    place = work / entry.name
    with ModelBench(entry, folder, place, settings) as bench:
        result = bench.run()
    temporary = place / "result.part"
    temporary.write_text(json.dumps({"format": FORMAT, "settings": mark, "result": result}), encoding="utf-8")
    temporary.replace(place / "result.json")


def known_results(work: Path, mark: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the results of the zoo's models that were made by these settings, and the names of the others."""
    results, lacking = [], []
    for entry in ZOO:
        path = work / entry.name / "result.json"
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if data.get("format") == FORMAT and data.get("settings") == mark:
            results.append(data["result"])
        else:
            lacking.append(entry.name)
    return results, lacking


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the page says of the run."""
    names = [named(text)[0] for text in arguments.text]
    with_imatrix = (
        f"collected as llama-imatrix does from {CALIBRATION_BYTES // 1000} kB of in-domain text in "
        f"{CALIBRATION_PIECES} pieces of the training text; it has no entries for output and embedding: there "
        "presets use none and ours those of random tokens."
    )
    return {
        "texts": names,
        "n_chunks": arguments.chunks,
        "sensitivity_chunks": arguments.sensitivity_chunks,
        "n_ctx": N_CTX,
        "commit": arguments.frozen or last_commit(),
        "build": llama.llama_build(),
        "command": "python tools/quality/quality.py",
        "trial": arguments.trial,
        "imatrix": with_imatrix if arguments.calibration else "not measured in this run.",
    }


def last_commit() -> str:
    """Return the last commit that touched the package, marked where it was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    commit = git("log", "-1", "--format=%h", "--", "nsds_gguf")
    return f"{commit} with changes since" if git("status", "--porcelain", "--", "nsds_gguf") else commit


def write(results: list[dict[str, Any]], what: dict[str, Any], path: Path, numbers: Path) -> None:
    """Write the page and, without the chunks of each row, the numbers behind it."""
    path.write_text(page(results, what), encoding="utf-8")
    bare = [
        {**result, "rows": [{k: v for k, v in row.items() if k != "chunks"} for row in result["rows"]]}
        for result in results
    ]
    numbers.write_text(compact({"format": FORMAT, **what, "results": bare}) + "\n", encoding="utf-8")


def compact(data: dict[str, Any]) -> str:
    """Return JSON with one line for every row or tensor, floats of 6 digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list | tuple) else value

    def dump(value: Any, depth: int) -> str:
        pad = " " * depth
        if isinstance(value, dict) and depth < 3:
            inner = ",\n".join(f"{pad} {json.dumps(k)}: {dump(v, depth + 1)}" for k, v in value.items())
            return f"{{\n{inner}\n{pad}}}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"{pad} {dump(v, depth + 1)}" for v in value) + f"\n{pad}]"
        return json.dumps(value)

    return dump(rounded(data), 0)


def write_alphas(results: list[dict[str, Any]], folder: Path) -> None:
    """Write predicted and measured sensitivities, a file a model."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        tensors = [{**tensor, "alpha": alpha(tensor)} for tensor in result["sensitivities"]]
        (folder / f"{result['name']}.json").write_text(json.dumps(tensors, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
