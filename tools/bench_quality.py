"""Mean KL divergence of our plans over that of llama.cpp's stock mixes at the same bytes.

    python tools/bench_quality.py --model DIR --text FILE [--stock Q2_K,Q3_K_S,Q3_K_M] [--chunks N]

Every stock mix is made by llama_model_quantize from a GGUF of the model's own precision; ours gets as many bits per
weight as that mix takes, to the byte. Both are compared with that GGUF on the same chunks of the text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import llama_cpp

from nsds_gguf import convert
from nsds_gguf.allocate import PlanOptions
from nsds_gguf.inspect import inspect_gguf
from nsds_gguf.llama import default_threads
from nsds_gguf.perplexity import Perplexity, perplexity
from nsds_gguf.records import Target

DEMO = Path(__file__).parent.parent / "examples" / "books-4.6m"
STOCK = ("Q2_K", "Q3_K_S", "Q3_K_M")


def stock_mix(source: Path, name: str, path: Path) -> None:
    """Quantize with llama.cpp's own mix."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = default_threads()
    params.allow_requantize = True
    with redirect_stderr(StringIO()):
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    if code != 0:
        raise SystemExit(f"llama_model_quantize({name}) failed with {code}")


def bench(model: Path, text: str, stock: Sequence[str] = STOCK, n_chunks: int | None = None,
          **options: Any) -> list[dict[str, Any]]:  # fmt: skip
    """Return one row per stock mix; ``options`` go to ``PlanOptions`` (importance, allocator, types)."""
    with tempfile.TemporaryDirectory() as folder:
        return _bench(Path(folder), model, text, stock, n_chunks, options)


def _bench(
    folder: Path, model: Path, text: str, stock: Sequence[str], n_chunks: int | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    unchecked = convert.VerifyOptions(enabled=False)
    opened = convert.open_model(model, None, convert.Silent())
    source = folder / "source.gguf"
    convert.convert(model, (), given=convert.reference_plan(opened), output=convert.Output(source), verifying=unchecked)
    scores = convert.score_model(model, convert.ScoreOptions(), importance=options.get("importance", "sweep"))

    def measure(file: Path) -> Perplexity:
        return perplexity(file, text, n_chunks=n_chunks, against=source)

    rows = []
    for name in stock:
        theirs, ours = folder / f"stock-{name}.gguf", folder / f"ours-{name}.gguf"
        stock_mix(source, name, theirs)
        found = inspect_gguf(theirs)
        target = Target("bpw", found.bpw)
        (result,) = convert.convert(
            model, [PlanOptions(target, **options)], given=scores, output=convert.Output(ours), verifying=unchecked
        )
        our, their = measure(ours), measure(theirs)
        a, b = our.divergence, their.divergence
        if a is None or b is None:
            raise RuntimeError("no divergence though a reference was given")
        rows.append({
            "stock": name, "bpw": found.bpw, "our_bpw": result.plan.bpw,
            "stock_kld": b.kld_mean, "stock_kld_error": b.kld_error, "stock_ppl": their.ppl,
            "our_kld": a.kld_mean, "our_kld_error": a.kld_error, "our_ppl": our.ppl,
            "ratio": a.kld_mean / b.kld_mean, "reference_ppl": a.reference_ppl,
        })  # fmt: skip
    return rows


def geometric_mean(rows: Sequence[dict[str, Any]]) -> float:
    """Return the geometric mean of the ratios."""
    return math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a text table."""
    lines = [f"{'stock mix':10} {'bpw':>7} {'stock KLD':>20} {'ours KLD':>20} {'ratio':>7}"]
    for row in rows:
        stock = f"{row['stock_kld']:.5f} ± {row['stock_kld_error']:.5f}"
        ours = f"{row['our_kld']:.5f} ± {row['our_kld_error']:.5f}"
        lines.append(f"{row['stock']:10} {row['bpw']:7.4f} {stock:>20} {ours:>20} {row['ratio']:7.3f}")
    lines.append(f"{'geometric mean':61} {geometric_mean(rows):6.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--stock", default=",".join(STOCK))
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--importance", default="sweep")
    arguments = parser.parse_args()
    text = convert.evaluation_text(convert.VerifyOptions(text=arguments.text))
    stock = arguments.stock.split(",")
    print(report(bench(arguments.model, text, stock, arguments.chunks, importance=arguments.importance)))


if __name__ == "__main__":
    main()
