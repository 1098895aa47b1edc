"""Claim: report.html of 250 pairs is interactive within 2 s; of 10,000 candidates within 5 s, below 40 MB, and scrolls.

    python benchmarks/report_page.py [--run RUN] [--candidates 300 10000] [--repeats 5]

The pages are those of runs that are made here without models, with texts of 40 tokens (see tests/page_run.py), and of
`--run`, a finished run. Chromium opens each from disk, without a window and in a new profile each time. Interactive is
the first frame after the page's script has ended: everything is drawn, and every control answers. Then the list of
candidates is scrolled by 400 pixels a frame, and tau is moved, which decides and draws everything again. Prints one
JSON document; `load` is the number of processes that wanted a processor in the minute before.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import document, spread
from playwright.sync_api import Browser, Page, sync_playwright

from tuneshift.report.page.render import write_page
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from page_run import Written, made_origin, make_run, plain_texts

DESKTOP = {"width": 1280, "height": 900}
FRAMES = 120  # of scrolling: two seconds at 60 frames a second
WHEN_READY = """
new MutationObserver((changes, observer) => {
  if (document.documentElement?.dataset.ready !== "true") return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.interactive = performance.now(); }));
}).observe(document, { attributes: true, subtree: true, childList: true });
"""
SCROLL = """
(frames) => new Promise((resolve) => {
  const list = document.querySelector(".viewport");
  const times = [];
  let before;
  const step = (now) => {
    if (before !== undefined) times.push(now - before);
    before = now;
    if (times.length === frames) return resolve(times);
    list.scrollTop += 400;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})
"""
DECIDE = """
(tau) => new Promise((resolve) => {
  const field = document.querySelector("#at-tau + input");
  field.value = tau;
  const before = performance.now();
  field.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - before))));
})
"""


def with_page(run: RunDirectory) -> Path:
    with Ledger(run.ledger) as ledger:
        write_page(run, ledger, made_origin(run))
    return run.page


def made_page(folder: Path, candidates: int) -> Path:
    texts = [Written(f"{text.prompt} and some more words", "", "") for text in plain_texts(candidates)]
    return with_page(make_run(folder / str(candidates), texts, prose=True))


def measured(browser: Browser, path: Path, repeats: int) -> dict[str, Any]:
    """Return what opening, scrolling and deciding took; the first of the times warms up and is left out."""
    opened = [_one(browser, path) for _ in range(repeats + 1)][1:]
    return {
        "megabytes": path.stat().st_size / 1e6,
        **{key: spread([one[key] for one in opened]) for key in opened[0]},
    }


def _one(browser: Browser, path: Path) -> dict[str, float]:
    context = browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
    page: Page = context.new_page()
    page.add_init_script(WHEN_READY)
    page.goto(path.resolve().as_uri())
    page.wait_for_function("window.interactive !== undefined")
    interactive = page.evaluate("window.interactive")
    page.locator(".viewport").scroll_into_view_if_needed()
    frames = sorted(page.evaluate(SCROLL, FRAMES))
    decided = page.evaluate(DECIDE, 2)
    context.close()
    return {
        "seconds_to_interactive": interactive / 1000,
        "milliseconds_per_scrolled_frame": statistics.median(frames),
        "milliseconds_of_the_95th_percent": frames[int(0.95 * len(frames))],
        "milliseconds_of_the_slowest_frame": frames[-1],
        "milliseconds_to_decide_again": decided,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--candidates", type=int, nargs="*", default=[300, 10_000])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = {f"made, {number} candidates": made_page(Path(folder), number) for number in options.candidates}
        if options.run is not None:
            run = RunDirectory.existing(options.run)
            pages[f"real run, {_candidates(run)} candidates"] = run.page
        unsafe = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses its own sandbox to root
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=unsafe)
        load = [os.getloadavg()[0]]
        found = {name: measured(browser, path, options.repeats) for name, path in pages.items()}
        load.append(os.getloadavg()[0])
        document(__doc__.splitlines()[0], pages=found, load=load, browser=f"chromium {browser.version}")
        browser.close()


def _candidates(run: RunDirectory) -> int:
    with Ledger(run.ledger, read_only=True) as ledger:
        return ledger.counts().candidates


if __name__ == "__main__":
    main()
