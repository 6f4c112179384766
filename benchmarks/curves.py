"""Learning curves of thawed networks, and what rules that stop trials early would have cost.

Each photo set's fold of `minutes.py` is searched by `study run`, no trial stopped: the solved head
that networks start from, then settings drawn at random. Every trial's curve, seconds and test
accuracy go into one table; stopping rules are replayed over its trials of levels 3 and 4, on
random orders. With `--deep`, trials of levels 0 to 2 are added to the table.

    python benchmarks/curves.py --data photos/hotdog --folds 0 --trials 30 --work /tmp/curves
    python benchmarks/curves.py --data photos/hotdog --folds 0 --trials 6 --deep --work /tmp/curves
    python benchmarks/curves.py --work /tmp/curves --report --table benchmarks/tables/curves.csv.gz
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from minutes import N_FOLDS, ROOT, SEED, Case, PhotoSet, model_entry, partition

from study.record.frames import read_epochs, read_trials
from study.record.record import Record

N_REPLAYED, N_REPLAYS = 8, 2000  # trials of a replayed search; replays of each set and fold
DEEP = 100  # what is added to the numbers of trials of levels 0 to 2
CONFIG = """
study = {finish = "single", refit = false, keep_checkpoints = 1000}
search = {strategy = "sampler", sampler = "random", pruner = "none", recipes = false}
[space]
freeze_depth = {low = 0, high = 5}
base_lr = {low = 1e-4, high = 5e-3, log = true}
head_lr_mult = {low = 0.1, high = 10.0, log = true}
weight_decay = {low = 1e-3, high = 0.3, log = true}
epochs = [4, 8]
features = ["last", "several"]
"""

Curves = list[dict[str, Any]]
"""Trials: `scores` by epoch, `epochs`, `level`, `seconds`, `test` accuracy."""
Rule = Callable[[dict[str, Any]], int]
"""Gives the epoch after which a trial ends, its last one or an earlier one."""


def settings(n: int, is_deep: bool) -> list[dict[str, Any]]:
    """Draw settings, the same for all sets; the head that they start from comes first."""
    rng = np.random.default_rng([SEED, 1] if is_deep else SEED)
    own = {"freeze_depth": 5, "base_lr": 1e-3, "head_lr_mult": 1.0, "weight_decay": 0.05}
    found = [own | {"epochs": 8, "features": "last"}]
    for k in range(n):
        ends = (1e-4, 0.1, 1e-3), (1e-3 if is_deep else 5e-3, 10, 0.3)
        rate, factor, decay = np.exp(rng.uniform(*np.log(ends)))
        own = {"base_lr": rate, "head_lr_mult": factor, "weight_decay": decay}
        own |= {"freeze_depth": int(rng.integers(3, 5)), "epochs": int(rng.choice([4, 8]))}
        if is_deep:
            own["freeze_depth"] = k % 3
        found.append(own | {"features": "several"})
    return [{"params": params} for params in found]


def search(case: Case, n: int, is_deep: bool) -> pd.DataFrame:
    """Run or continue a fold's search; return a row per epoch."""
    name, work = f"{case.photos.name}-{case.fold}{'-deep' * is_deep}", case.work.resolve()
    (work / "plan.json").write_text(json.dumps(settings(n, is_deep)))
    (work / "curves.toml").write_text(CONFIG)
    database = str(work / "curves.db")
    with Record(database, create=True) as record:
        is_known = record.find_study(name) is not None
    command = ["resume", name] if is_known else ["run", "--name", name, "--plan", "plan.json"]
    if not is_known:
        command += ["--config", "curves.toml", "--data", str(case.link())]
    command = [sys.executable, "-m", "study", *command, "--trials", str(n + 1)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--storage", database], cwd=work, check=True, env=env)
    with Record(database) as record:
        trials = read_trials(record, name).set_index("number")
        epochs = read_epochs(record, name)[["number", "epoch", "score", "val_acc"]]
    done = trials[trials["state"] == "complete"]
    for number, folder in done["checkpoint"].items():
        trials.loc[number, "test"] = model_entry(case, 0.0, Path(folder))[1]
    kept = [*(column for column in trials if column.startswith("params_")), "duration_s", "test"]
    found = epochs.join(trials.loc[done.index, kept], on="number", how="inner")
    found = found[found["number"] > 0] if is_deep else found  # its head is in the table
    found["number"] += DEEP * is_deep
    return found.assign(set=case.photos.name, fold=case.fold)


def read_curves(table: pd.DataFrame) -> Curves:
    """Return a fold's trials, the head that the others start from first."""
    return [
        {
            "scores": rows["score"].to_numpy(),
            "epochs": len(rows),
            "level": rows["params_freeze_depth"].iloc[0],
            "seconds": rows["duration_s"].iloc[0],
            "test": rows["test"].iloc[0],
        }
        for _, rows in table.groupby("number")
    ]


def below_head(share: float, head: float) -> Rule:
    """Stop what, from half of its epochs on, has less than a share of its head's score."""

    def run(trial: dict[str, Any]) -> int:
        late = range(-(-trial["epochs"] // 2), trial["epochs"])
        return next((e for e in late if trial["scores"][e - 1] < share * head), trial["epochs"])

    return run


def by_optuna(pruner: optuna.pruners.BasePruner) -> Rule:
    """Stop as one of Optuna's pruners does, among trials of one level and length."""
    studies: dict[tuple[int, int], optuna.Study] = {}

    def run(trial: dict[str, Any]) -> int:
        key = trial["level"], trial["epochs"]
        if key not in studies:
            studies[key] = optuna.create_study(direction="maximize", pruner=pruner)
        asked = studies[key].ask()
        for epoch, score in enumerate(map(float, trial["scores"]), start=1):
            asked.report(score, epoch)
            if epoch < trial["epochs"] and asked.should_prune():
                studies[key].tell(asked, state=optuna.trial.TrialState.PRUNED)
                return epoch
        studies[key].tell(asked, score)
        return int(trial["epochs"])

    return run


SHARES = (0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
RULES: dict[str, Callable[[float], Rule]] = {
    **{f"below {s:.0%} of the head": functools.partial(below_head, s) for s in SHARES},
    "Optuna, median": lambda _: by_optuna(optuna.pruners.MedianPruner(n_startup_trials=2)),
    "Optuna, halving": lambda _: by_optuna(optuna.pruners.SuccessiveHalvingPruner()),
}


def replay(curves: Curves, make: Callable[[float], Rule], n: int) -> list[float]:
    """Replay searches; return the share whose winner was stopped, points lost, time saved."""
    rng, found = np.random.default_rng(SEED), []
    head, *thawed = curves
    for _ in range(n):
        trials = [thawed[k] for k in rng.permutation(len(thawed))[:N_REPLAYED]]
        rule = make(head["scores"].max())
        ends = [rule(trial) for trial in trials]
        whole = [t for t, end in zip(trials, ends, strict=True) if end == t["epochs"]]
        best, left = (max([head, *each], key=_score) for each in (trials, whole))
        spent = sum(t["seconds"] * e / t["epochs"] for t, e in zip(trials, ends, strict=True))
        saved = 1 - spent / sum(t["seconds"] for t in trials)
        found.append((best is not left, best["test"] - left["test"], saved))
    return [100 * float(x) for x in np.mean(found, axis=0)]


def _score(trial: dict[str, Any]) -> float:
    return float(trial["scores"].max())


def report(table: pd.DataFrame) -> None:
    """Replay every rule on every fold; print means, and what each set says of a rule's share."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = ["winners stopped, %", "points lost", "time saved, %"]
    rows = []
    for (photos, fold), part in table.groupby(["set", "fold"]):
        if part["number"].min() > 0:
            print(f"{photos} {fold}: there is no head; run it without --deep, too")
            continue
        head, *thawed = read_curves(part)
        curves = [head, *(trial for trial in thawed if trial["level"] > 2)]
        deep = [trial for trial in thawed if trial["level"] <= 2]
        for words, some in (("3 and 4", curves[1:]), ("0 to 2", deep)):
            if some:
                gains = [100 * (t["test"] - head["test"]) for t in some]
                best = 100 * (max([head, *some], key=_score)["test"] - head["test"])
                print(f"{photos} {fold}, levels {words}: {len(gains)} trials, test points to the "
                      f"head: mean {np.mean(gains):+.1f}, of the best score {best:+.1f}; best "
                      f"scores {_score(head):.3f} and {max(map(_score, some)):.3f}")  # fmt: skip
        for name, make in RULES.items():
            rows.append((name, photos, fold, *replay(curves, make, N_REPLAYS)))
    frame = pd.DataFrame(rows, columns=["rule", "set", "fold", *names])
    means = frame.groupby("rule", sort=False)[names].agg(["mean", "sem"])
    print(means.round(2).to_string())
    print(frame.pivot_table(index="rule", columns="set", values=names, sort=False).round(1))
    of_head = frame[frame["rule"].str.startswith("below")]
    for photos in of_head["set"].unique():  # chosen on the other sets
        others = of_head[of_head["set"] != photos].groupby("rule", sort=False)[names].mean()
        safe = others[others[names[1]] <= 0.05]
        rule = safe[names[2]].idxmax() if len(safe) else "none"
        own = of_head[(of_head["set"] == photos) & (of_head["rule"] == rule)][names].mean()
        print(f"{photos}: chosen on the others: {rule}; here {own.round(2).to_dict()}")


def main() -> None:
    """Train what is missing, then replay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--deep", action="store_true", help="of levels 0 to 2")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="the table (WORK/curves.csv.gz)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.table or args.work / "curves.csv.gz"
    table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["set", "fold", "number"])
    for photos in [] if args.report else map(PhotoSet.read, args.data):
        fold_of = partition(photos.labels.tolist(), photos.contents, N_FOLDS, SEED)
        for fold in args.folds:
            train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            found = search(Case(photos, fold, args.work, train, test), args.trials, args.deep)
            is_same = (table["set"] == photos.name) & (table["fold"] == fold)
            is_same &= (table["number"] > DEEP) == args.deep
            table = pd.concat([table[~is_same], found])
            table = table.sort_values(["set", "fold", "number", "epoch"])
            table.to_csv(file, index=False, float_format="%.6g")
    if len(table):
        report(table)


if __name__ == "__main__":
    main()
