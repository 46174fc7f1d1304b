"""Look at reports in a real browser: headless Chromium, driven by playwright (pip install playwright).

    python tools/check/check_report.py [--chromium PATH] [--screenshots FOLDER] [--record]

Made-up plans of 2 to 126 layers and the demo model, converted on the spot, are loaded at desktop and phone width, light
and dark. A page passes when nothing is requested, the console stays empty and nothing scrolls sideways; when the heat
map holds every tensor with the plan's own numbers, in the row of its role and the column of its layer, in one colour
for the same bits per weight; and when pointing, tapping, arrow keys, the colour choices, sorting and filtering do what
they say. ``--record`` writes what was seen to ``tests/golden/report.json``, which the tests compare with the page.

The exit code is 1 when anything fails, also when playwright or Chromium is missing. ``--chromium`` names a browser that
is installed, as by apt; without it playwright's own is taken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from nsds_gguf.evaluate.texts import ORIGINAL, SHIPPED_TEXT, VerifyOptions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the plans that the tests use

import vl_convert
from playwright.sync_api import Browser, Error, Page, sync_playwright
from report_plans import DENSE, EXPERTS, HOSTILE_NAME, made_up_perplexity, made_up_plan, made_up_scores

from nsds_gguf.conversion import convert
from nsds_gguf.evaluate.inspect import inspect_gguf
from nsds_gguf.publish.report import (
    SCRIPTS,
    Check,
    Report,
    file_report,
    plan_report,
    template,
    write_report,
)
from nsds_gguf.records import Options

GOLDEN = ROOT / "tests" / "golden" / "report.json"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
SCREENS = {
    "desktop": DESKTOP,
    "desktop-dark": {**DESKTOP, "color_scheme": "dark"},
    "phone": {**PHONE, "reduced_motion": "reduce"},
    "phone-dark": {**PHONE, "color_scheme": "dark"},
}
MAPS = ("map-chart", "outside-chart")

# The cells of a heat map as the browser holds them: the datum that Vega drew, where, and in which colour.
READ_CELLS = """id => [...document.querySelectorAll(`#${id} path[aria-roledescription="rect mark"]`)].map(path => {
  const box = path.getBoundingClientRect();
  const { tip, ...datum } = path.__data__.datum;
  return { datum, label: path.ariaLabel ?? path.getAttribute("aria-label"), fill: path.getAttribute("fill"),
           x: Math.round(box.x), y: Math.round(box.y), width: box.width, height: box.height };
})"""
READ_ROWS = """() => [...document.querySelectorAll("#tensors-table tbody tr")].filter(row => !row.hidden)
  .map(row => [...row.cells].map(cell => cell.textContent))"""
READ_LABELS = """id => [...document.querySelectorAll(`#${id} .role-axis-label text`)].map(text => text.textContent)"""


class Failure(Exception):
    """Something on a page is not as it should be."""


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
            cases = {name: _check(browser, name, made, Path(folder), args) for name, made in _reports(Path(folder))}
            version = browser.version
        except (Failure, Error) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if args.record:
        page = "".join(map(template, ("page.html", "page.css", *SCRIPTS)))
        versions = {
            "chromium": version,
            "vega": vl_convert.get_vega_version(),
            "vl-convert": metadata.version("vl-convert-python"),
        }
        digest = hashlib.sha256(page.encode()).hexdigest()
        GOLDEN.write_text(json.dumps({"versions": versions, "page_sha256": digest, "cases": cases}, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", metavar="PATH", help="browser to run")
    parser.add_argument("--screenshots", metavar="FOLDER", type=Path, help="where to leave pictures of every page")
    parser.add_argument("--record", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.screenshots is not None:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    return args


def _reports(folder: Path) -> list[tuple[str, Report]]:
    def of_plan(n_layers: int, roles: dict[str, tuple[int, ...]], *, scored: bool = True, **names: str) -> Report:
        plan = made_up_plan(n_layers, roles, **names)
        check = Check(made_up_perplexity(), "wiki.test.raw", "original") if scored else None
        return plan_report(plan, scores=made_up_scores(plan) if scored else None, check=check)

    verifying = VerifyOptions(reference=ORIGINAL)
    options = Options(target_bpw=3.0, rounding="rtn", score_weight=1.0)
    output = folder / "demo.gguf"
    (demo,) = convert(ROOT / "examples" / "books-4.6m", options, verifying=verifying, output=output)
    check = Check(demo.perplexity, SHIPPED_TEXT, ORIGINAL) if demo.perplexity else None
    return [
        ("demo", plan_report(demo.plan, scores=demo.scores, check=check, architecture="llama", model="books-4.6m")),
        ("demo-gguf", file_report(inspect_gguf(demo.path))),
        ("dense-126", of_plan(126, DENSE)),
        ("dense-2", of_plan(2, DENSE)),
        ("experts-48", of_plan(48, EXPERTS)),
        ("hostile", of_plan(3, EXPERTS, scored=False, name=HOSTILE_NAME)),
    ]


def _check(browser: Browser, name: str, report: Report, folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Look at one page on every screen and return what it holds; raises ``Failure``."""
    path = folder / f"{name}.html"
    write_report(report, path)
    expected = report.to_json()
    for screen, settings in SCREENS.items():
        at = f"{name}, {screen}"
        context = browser.new_context(**settings)
        page, heard = context.new_page(), []
        page.on("console", lambda message, heard=heard: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error, heard=heard: heard.append(f"error: {error}"))
        page.on("request", lambda request, heard=heard: heard.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        _wait_until_drawn(page)
        if args.screenshots:
            page.screenshot(path=args.screenshots / f"{name}-{screen}.png", full_page=True)
        _check_layout(page, expected, at)
        cells = _check_cells(page, expected, at)
        rows = _check_table(page, expected, at)
        (_check_touch if "phone" in screen else _check_pointer)(page, at)
        _check_keys(page, at)
        _check_colours(page, expected, at)
        _expect(heard == [f"request: {path.as_uri()}"], at, f"nothing but the page itself, got {heard}")
        context.close()
        print(f"{at}: {cells} cells, {rows} rows")
    return {"cells": cells, "rows": rows, "kilobytes": round(path.stat().st_size / 1000)}


def _expect(holds: bool, at: str, wanted: str) -> None:
    if not holds:
        raise Failure(f"{at}: wanted {wanted}")


def _wait_until_drawn(page: Page) -> None:
    page.wait_for_selector("body[data-state=ready]", timeout=60_000)


def _check_layout(page: Page, expected: dict[str, Any], at: str) -> None:
    width, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    _expect(width <= room, at, f"no sideways scrolling, got {width} of {room} pixels")
    _expect(page.text_content("#title") == expected["title"], at, "the model's name as it is")
    for chart in page.query_selector_all(".chart:has(svg)"):
        _expect(bool(chart.get_attribute("aria-label")), at, "a text alternative for every chart")
    layers = sorted({layer for layer in expected["tensors"]["layer"] if layer is not None})
    for chart in ("layer-bytes-chart", "map-chart", *(["layers-chart"] if expected["layers"] else [])):
        labels = [label for label in page.evaluate(READ_LABELS, chart) if label.isdigit()]
        _expect(str(layers[0]) in labels, at, f"layer {layers[0]} on the axis of {chart}, got {labels}")


def _check_cells(page: Page, expected: dict[str, Any], at: str) -> int:
    """Compare the heat map with the report cell by cell: numbers, places, colours."""
    columns = expected["tensors"]
    wanted = {name: {key: columns[key][i] for key in columns} for i, name in enumerate(columns["name"])}
    cells = [cell for chart in MAPS for cell in page.evaluate(READ_CELLS, chart)]
    _expect(sorted(cell["datum"]["name"] for cell in cells) == sorted(wanted), at, "one cell a tensor")
    places, fills = defaultdict(set), defaultdict(set)
    for cell in cells:
        datum, tensor = cell["datum"], wanted[cell["datum"]["name"]]
        got = {key: datum[key] for key in columns}
        _expect(got == json.loads(json.dumps(tensor)), at, f"{tensor}, got {got}")
        _expect(
            cell["label"].startswith(f"{tensor['name']}: type {tensor['type']}"), at, f"a label of {tensor['name']}"
        )
        _expect(cell["width"] > 2 and cell["height"] > 8, at, f"room for {tensor['name']}")
        if tensor["layer"] is not None:
            places["layer", tensor["layer"]].add((cell["x"], cell["y"]))
            places["role", tensor["role"]].add((cell["x"], cell["y"]))
        plain = tensor["type"] in expected["unquantized"]
        fills["plain" if plain else min(8.5, max(1.8, datum["bpw"]))].add(cell["fill"])
    n_layered = sum(layer is not None for layer in columns["layer"])
    _expect(len(set.union(*places.values())) == n_layered, at, "a place of its own for every tensor of a layer")
    for (kind, key), found in places.items():
        lines = min(len({x for x, _ in found}), len({y for _, y in found}))
        _expect(lines == 1, at, f"{kind} {key} in one line, got {lines}")
    _expect(all(len(found) == 1 for found in fills.values()), at, f"one colour for the same bits, got {dict(fills)}")
    _expect(len(set.union(*fills.values())) == len(fills), at, f"other colours for other bits, got {dict(fills)}")
    return len(cells)


def _check_table(page: Page, expected: dict[str, Any], at: str) -> int:
    columns = expected["tensors"]
    rows = page.evaluate(READ_ROWS)
    got = [(row[0], row[1], int(row[3].replace(",", ""))) for row in rows]
    _expect(got == list(zip(columns["name"], columns["type"], columns["n_bytes"], strict=True)), at, "a row a tensor")
    button = page.locator("#tensors-table th button", has_text="bytes")
    for descending in (True, False):
        button.click()
        sizes = [int(row[3].replace(",", "")) for row in page.evaluate(READ_ROWS)]
        _expect(sizes == sorted(columns["n_bytes"], reverse=descending), at, f"bytes in order, {descending=}")
    _expect(page.locator("#tensors-table th[aria-sort=ascending]").count() == 1, at, "the order told to all")
    page.fill("#filter", "blk.1. attn")
    found = [row[0] for row in page.evaluate(READ_ROWS)]
    wanted = {name for name in columns["name"] if "blk.1." in name and "attn" in name}
    _expect(set(found) == wanted and len(found) == len(wanted) > 0, at, f"{wanted} after filtering, got {found}")
    page.fill("#filter", "")
    return len(rows)


def _check_pointer(page: Page, at: str) -> None:
    for chart, mark in (("map-chart", "rect mark"), ("roles-chart", "bar"), ("layer-bytes-chart", "bar")):
        path = page.locator(f'#{chart} path[aria-roledescription="{mark}"]').nth(1)
        path.scroll_into_view_if_needed()
        path.hover(force=True)
        page.wait_for_selector("#vg-tooltip-element.visible")
        title, label = page.inner_text("#vg-tooltip-element h2"), path.get_attribute("aria-label") or ""
        _expect(bool(title) and label.startswith(title), at, f"a tooltip of {label}, got {title}")
        page.mouse.move(0, 0)


def _check_touch(page: Page, at: str) -> None:
    path = page.locator('#map-chart path[aria-roledescription="rect mark"]').nth(1)
    path.scroll_into_view_if_needed()
    path.tap(force=True)
    page.wait_for_selector("#picked-panel:not([hidden])")
    name, label = page.inner_text("#picked-name"), path.get_attribute("aria-label") or ""
    _expect(label.startswith(f"{name}: "), at, f"the numbers of {label} after a tap, got {name}")
    box = page.locator("#picked-panel").bounding_box()
    _expect(box is not None and 0 <= box["y"] <= 740 - box["height"], at, "the numbers in sight after a tap")
    page.click("#unpick")
    _expect(page.locator("#picked-panel").is_hidden(), at, "the numbers gone after Close")


def _check_keys(page: Page, at: str) -> None:
    page.focus("#map-chart")
    names = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        names.append(page.inner_text("#picked-name"))
    _expect(len(set(names)) == 4 and names[0] == names[4], at, f"a walk around four tensors, got {names}")
    page.keyboard.press("Escape")
    _expect(page.locator("#picked-panel").is_hidden(), at, "the numbers gone after Escape")


def _check_colours(page: Page, expected: dict[str, Any], at: str) -> None:
    choices = page.eval_on_selector_all("#map-colours input", "inputs => inputs.map(input => input.value)")
    measured = ["bpw", "error", "sensitivity", "loss"] if expected["kind"] == "plan" else ["bpw"]
    _expect(choices == measured, at, f"the choices {measured}, got {choices}")
    n_cells = len(page.evaluate(READ_CELLS, "map-chart"))
    for choice in choices[1:]:
        page.check(f"#map-colours input[value={choice}]")
        page.wait_for_selector("#map-chart .role-legend")
        cells = page.evaluate(READ_CELLS, "map-chart")
        _expect(len(cells) == n_cells, at, f"{n_cells} cells coloured by {choice}, got {len(cells)}")
        _expect(len({cell["fill"] for cell in cells}) > 3, at, f"cells told apart by {choice}")


if __name__ == "__main__":
    sys.exit(main())
