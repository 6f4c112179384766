"""How long the report of a large search takes to write and to open, and how large it is.

The trials are entered as a run would have, nothing is trained; the page is opened in Chromium.

    python benchmarks/report_size.py 30 1000 10000
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
from playwright.sync_api import sync_playwright

# The project and its tests are no packages of the environment, so imports follow (E402).
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reports.search_report import write_report  # noqa: E402
from tests.reports.studies import SPACE, Plan, make_study  # noqa: E402

OPENINGS = 3


def plans(n: int) -> list[Plan]:
    """Plan a search of five settings, a third of it pruned."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        params = {
            "backbone": str(rng.choice(SPACE["backbone"]["choices"])),
            "freeze_depth": int(rng.integers(6)),
            "base_lr": float(10 ** rng.uniform(-4, -1.6)),
            "head_lr_mult": float(10 ** rng.uniform(0, 2)),
            "weight_decay": float(10 ** rng.uniform(-6, -2)),
        }
        final = 0.9 - 0.1 * abs(np.log10(params["base_lr"]) + 2.5) + rng.normal(0, 0.02)
        curve = (final * (1 - 0.5 ** np.arange(1, 9))).tolist()
        is_pruned = rng.random() < 1 / 3
        found.append(
            Plan(params, curve[:2], "pruned", "pruned after epoch 2")
            if is_pruned
            else Plan(params, curve)
        )
    return found


def main() -> None:
    """Print a line per size."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for n in map(int, sys.argv[1:]):
            with make_study(Path(folder, f"{n}.db"), plans(n)) as store:
                begin = time.perf_counter()
                paths = write_report(store, "pets", Path(folder, str(n)))
                build_s = time.perf_counter() - begin
            times = []
            for _ in range(OPENINGS):
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                begin = time.perf_counter()
                page.goto(paths.html.as_uri(), wait_until="load")
                page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done()))")
                times.append(time.perf_counter() - begin)
                page.close()
            size = paths.html.stat().st_size / 1e6
            print(
                f"{n} trials: written in {build_s:.1f} s, {size:.1f} MB, answers after "
                f"{statistics.median(times):.1f} s (median of {OPENINGS})",
                flush=True,
            )
        browser.close()


if __name__ == "__main__":
    main()
