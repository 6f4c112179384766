"""Cost per trial of search and record together, against plain Optuna on its default SQLite.

A trial here trains nothing: it samples the five default settings, makes 20 reports (each asked
for pruning, each kept in our record too), and ends. Both sides begin with a database that holds so
many trials already; they take turns, and the first trial of each side at each size is not counted.
    python benchmarks/overhead.py --sizes 100 1000 --trials 12
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import optuna
from optuna.trial import TrialState, create_trial

from core.config import TrainConfig
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
    """Make an epoch's figures; every epoch is the best so far."""
    return EpochMetrics(
        step, 0.5, 0.5, value, value, value, 1e-3, 1e-2, 99.0, 0.1, 1.0, 0.1, 10**9, 32, True
    )


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


def our_side(path: Path, past: list[optuna.trial.FrozenTrial]) -> Callable[[], None]:
    """Return one trial of ours: the record over Optuna's tables, same sampler and pruner."""
    store = Record(str(path), create=True)
    study_id = store.create_study("x", {}, {"fingerprint": "x"}, {})
    run = store.begin_run(study_id, command="benchmark", device="none", versions={})
    study = store.optuna_study(study_id)
    study.pruner = make_pruner("hyperband", REPORTS)
    study.add_trials(past)
    config = dataclasses.asdict(TrainConfig())

    def trial() -> None:
        number = len(study.get_trials(deepcopy=False))
        study.sampler = make_sampler("tpe", 0, number, SPACE)
        asked = study.ask(SPACE)
        row = Trial(
            study_id=study_id, number=number, run_id=run, origin="sampler", config=config,
            config_hash=str(number), device="none",
        )  # fmt: skip
        store.save(row)
        for step in range(1, REPORTS + 1):
            store.add_epoch(row, metrics(step, 0.9 + step / 1000), 0.1)
            asked.report(0.9 + step / 1000, step)
            asked.should_prune()
        row.duration_s = 0.1
        store.end_trial(row, "complete")

    return trial


def measure(size: int, n: int, folder: Path) -> None:
    """Alternate the sides n times at one size, and print."""
    past = history(size)
    sides = {
        "plain": plain_side(folder / f"plain{size}.db", past),
        "ours": our_side(folder / f"ours{size}.db", past),
    }
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + n):
        for name, trial in sides.items():
            begin = time.perf_counter()
            trial()
            spent[name].append(1e3 * (time.perf_counter() - begin))
    plain, ours = spent["plain"][1:], spent["ours"][1:]
    ratios = [a / b for a, b in zip(plain, ours, strict=True)]
    for name, values in (("plain, ms", plain), ("ours, ms", ours), ("plain / ours", ratios)):
        middle, ends = statistics.median(values), f"{min(values):.1f} to {max(values):.1f}"
        print(f"{size:5} trials, {name:12}: median {middle:.1f} (n = {n}, {ends})", flush=True)


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
