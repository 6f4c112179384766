"""How long the report of a large search takes to write and to open, and how large it is.

The trials are entered in bulk, nothing is trained; the page is opened in Chromium, and answers
when its script has run and a first frame is drawn.

    python benchmarks/report_size.py 30 1000 10000
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages._rdb.models import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialValueModel,
)
from playwright.sync_api import sync_playwright
from sqlalchemy import insert
from sqlalchemy.orm import Session

# The project and its tests are no packages of the environment, so imports follow (E402).
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from core.metrics import EpochMetrics  # noqa: E402
from reports.search_report import write_report  # noqa: E402
from study.record.models import EPOCHS, Trial, now  # noqa: E402
from study.record.record import EPOCH_FIELDS, Record  # noqa: E402
from tests.reports.studies import SPACE, TRAIN, make_study  # noqa: E402

N_EPOCHS, N_PRUNED_AFTER, OPENINGS = 8, 2, 3
DIMENSIONS: dict[str, BaseDistribution] = {
    "backbone": CategoricalDistribution(SPACE["backbone"]["choices"]),
    "freeze_depth": IntDistribution(**SPACE["freeze_depth"]),
    **{
        key: FloatDistribution(**SPACE[key]) for key in ("base_lr", "head_lr_mult", "weight_decay")
    },
}


def enter(store: Record, n: int) -> None:
    """Enter a search of five settings, a third of it pruned.

    All in one transaction, through Optuna's private tables: one by one, 6,000 took 15 minutes.
    """
    study_id, rng = store.study("pets").id, np.random.default_rng(0)
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for number in range(n):
        params = draws.ask(DIMENSIONS).params
        final = 0.9 - 0.1 * abs(np.log10(params["base_lr"]) + 2.5) + rng.normal(0, 0.02)
        is_pruned, own = rng.random() < 1 / 3, {"trial_id": number + 1}
        done = N_PRUNED_AFTER if is_pruned else N_EPOCHS
        curve = [float(final * (1 - 0.5**epoch)) for epoch in range(1, done + 1)]
        state = optuna.trial.TrialState["PRUNED" if is_pruned else "COMPLETE"]
        times = {"datetime_start": now(), "datetime_complete": now()}
        rows[TrialModel].append(own | times | {"number": number, "study_id": 1, "state": state})
        rows[TrialValueModel].append(
            own | {"objective": 0, "value": curve[-1], "value_type": "FINITE"}
        )
        for name, dim in DIMENSIONS.items():
            drawn = {"param_name": name, "param_value": dim.to_internal_repr(params[name])}
            drawn["distribution_json"] = distribution_to_json(dim)
            rows[TrialParamModel].append(own | drawn)
        ours = {"id": number + 1, "study_id": study_id, "number": number, "run_id": 1}
        ours |= {"origin": "sampler", "config": TRAIN | params, "config_hash": "", "device": "cpu"}
        ours |= {"started_at": now(), "ended_at": now(), "duration_s": 1.0 + 4 * done}
        ours |= {"epochs_done": done, "best_epoch": done, "without_effect": []}
        rows[Trial].append(ours | {"reason": "pruned" if is_pruned else None})
        for epoch, value in enumerate(curve, start=1):
            reported = {"step": epoch, "intermediate_value": value}
            reported["intermediate_value_type"] = "FINITE"
            rows[TrialIntermediateValueModel].append(own | reported)
            metrics = EpochMetrics(
                epoch, 0.5, 0.5, *[value] * 3, 1e-3, 1e-2, 99.0, 0.1, 3.0, 0.5, 2**30, 32, True
            )
            figures = {name: getattr(metrics, name) for name in EPOCH_FIELDS}
            rows[EPOCHS].append(own | figures | {"seconds_since_start": 4.0 * epoch})
    with Session(store.engine) as session, session.begin():
        for table, values in rows.items():
            session.execute(insert(table), values)


def main() -> None:
    """Print a line per size."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for n in map(int, sys.argv[1:]):
            with make_study(Path(folder, f"{n}.db"), []) as store:
                enter(store, n)
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
