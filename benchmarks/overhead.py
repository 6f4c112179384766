"""Cost per trial of search and record together, beside plain Optuna on its default SQLite.

A trial here trains nothing: it samples the five default settings, makes 20 reports (each asked
for pruning, each kept in our record too), and ends. All sides go on from a database that holds so
many trials already; they take turns, and the first trial of each side at each size is not counted.
    python benchmarks/overhead.py --sizes 100 1000 --trials 12
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import optuna
from optuna.trial import TrialState, create_trial

from core.metrics import EpochMetrics
from study.config.load import load_config
from study.config.search_space import distributions
from study.record.models import Trial
from study.record.record import Record
from study.search.samplers import make_pruner, make_sampler

REPORTS = 20
SPACE = distributions(load_config().space)


def history(n: int, seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    """Make n finished trials, half of them pruned at a fifth of their length."""
    sampler = make_sampler("random", seed, 0, SPACE)
    scratch = optuna.create_study(direction="maximize", sampler=sampler)
    trials = []
    now = datetime.now()
    for k in range(n):
        params = scratch.ask(SPACE).params
        is_pruned = k % 2 == 1
        steps = REPORTS // 5 if is_pruned else REPORTS
        value = (k * 37 % 100) / 100
        made = create_trial(
            state=TrialState.PRUNED if is_pruned else TrialState.COMPLETE,
            value=value,
            params=params,
            distributions=SPACE,
            intermediate_values={s: value * s / REPORTS for s in range(1, steps + 1)},
            # What Hyperband notes where a trial is compared with others, after epochs 1 and 3.
            system_attrs={f"completed_rung_{r}": value * 3**r / REPORTS for r in range(2)},
        )
        made.datetime_start = made.datetime_complete = now
        trials.append(made)
    return trials


def metrics(step: int, value: float) -> EpochMetrics:
    """Make an epoch's figures."""
    return EpochMetrics(
        step, 0.5, 0.5, value, value, value, 1e-3, 1e-2, 99.0, 0.1, 1.0, 0.1, 10**9, 32, step == 0
    )


class Clock:
    """Adds up seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str):
        """Time a block."""
        begin = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def per_trial(self, n: int) -> dict[str, float]:
        """Return milliseconds a trial by phase."""
        return {name: 1e3 * sum(values) / n for name, values in self.seconds.items()}


def plain_side(path: Path, past: list[optuna.trial.FrozenTrial]) -> Callable[[], None]:
    """Return one trial of plain Optuna: default storage, TPE, Hyperband."""
    study = optuna.create_study(
        storage=f"sqlite:///{path}",
        study_name="x",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.HyperbandPruner(1, REPORTS, 3),
    )
    study.add_trials(past)

    def trial() -> None:
        asked = study.ask(SPACE)
        for step in range(1, REPORTS + 1):
            asked.report(0.9 + step / 1000, step)
            asked.should_prune()
        study.tell(asked, 0.9)

    return trial


def our_side(path: Path, past: list[optuna.trial.FrozenTrial], clock: Clock) -> Callable[[], None]:
    """Return one trial of ours: the record over Optuna's tables, same sampler and pruner."""
    store = Record(str(path), create=True)
    study_id = store.create_study("x", {}, {"fingerprint": "x"}, {})
    run = store.begin_run(study_id, command="benchmark", device="none", versions={})
    study = store.optuna_study(study_id)
    study.pruner = make_pruner("hyperband", REPORTS)
    study.add_trials(past)

    def trial() -> None:
        with clock.phase("sampling"):
            number = len(study.get_trials(deepcopy=False))
            study.sampler = make_sampler("tpe", 0, number, SPACE)
            asked = study.ask(SPACE)
        with clock.phase("record"):
            row = Trial(
                study_id=study_id, number=number, run_id=run, origin="sampler", config={},
                config_hash=str(number), device="none",
            )  # fmt: skip
            store.save(row)
        for step in range(1, REPORTS + 1):
            with clock.phase("record"):
                store.add_epoch(row, metrics(step, 0.9 + step / 1000), 0.1)
            with clock.phase("report and prune"):
                asked.report(0.9 + step / 1000, step)
                asked.should_prune()
        with clock.phase("end"):
            row.duration_s = 0.1
            store.end_trial(row, "complete")

    return trial


def measure(size: int, n: int, folder: Path) -> None:
    """Alternate the sides n times at one size, and print."""
    past = history(size)
    clock = Clock()
    sides = {
        "plain": plain_side(folder / f"plain{size}.db", past),
        "ours": our_side(folder / f"ours{size}.db", past, clock),
    }
    for trial in sides.values():
        trial()
    clock.seconds.clear()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(n):
        for name, trial in sides.items():
            begin = time.perf_counter()
            trial()
            spent[name].append(1e3 * (time.perf_counter() - begin))
    for name, values in spent.items():
        print(f"  {size:5} trials, {name:5}: {spread(values, ' ms a trial')}")
    ratios = [a / b for a, b in zip(spent["plain"], spent["ours"], strict=True)]
    print(f"  {size:5} trials, plain / ours: {spread(ratios, '')}")
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in clock.per_trial(n).items())
    print(f"  {size:5} trials, where ours goes, ms: {parts}", flush=True)


def spread(values: list[float], unit: str) -> str:
    """Tell the median, the number and the extremes."""
    middle = statistics.median(values)
    return f"median {middle:.1f}{unit} (n = {len(values)}, {min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--trials", type=int, default=12)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            measure(size, args.trials, Path(folder))


if __name__ == "__main__":
    main()
