"""How soon a sampler finds a good setting: thaw, tpe and random on replayed trials.

`record` trains settings spread evenly over a space and writes each epoch's validation accuracy and
seconds. `replay` fits extremely randomised trees to such a table (accuracy by epoch over backbone,
freeze level, both rates and decay; two trials a leaf; they favour no Gaussian process) and lets
samplers search it: what they see has the noise of the validation split, and what counts is
the noise-free accuracy of the trial that the study would call its best. Frozen layers' outputs are
shared in every arm: the first trial at a freeze level pays for them, epoch by epoch.

    python benchmarks/thaw.py record --data photos/hotdog --size 96 --trials 96 --out hotdog.csv
    python benchmarks/thaw.py replay hotdog.csv --seeds 20

A surrogate benchmark as in Eggensperger et al. 2015, https://doi.org/10.1609/aaai.v29i1.9375.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from core.config import DataConfig, TrainConfig
from study.config.search_space import RECIPES
from study.cost import CostModel
from study.samplers import SeenTrials, make_pruner, make_sampler, quiet_experiments
from study.thaw import Outlook

SPACE: dict[str, BaseDistribution] = {
    "freeze_depth": IntDistribution(0, 5),
    "base_lr": FloatDistribution(1e-4, 3e-2, log=True),
    "head_lr_mult": FloatDistribution(1.0, 100.0, log=True),
    "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
}
SETTINGS = ("backbone", *SPACE)
# Where the best setting is told to lie: among so many drawn evenly.
N_SOUGHT = 20_000
# Building a network and keeping a trial's record, seconds. Assumption.
TRIAL_S = 0.5
# Share of the validation noise that all epochs of a trial have in common. Assumption.
COMMON_NOISE = 0.8


def record(args: argparse.Namespace) -> None:
    """Train settings of a scrambled Sobol sequence and write a row per epoch."""
    from scipy.stats import qmc

    from core.data import load_data
    from core.fit import fit
    from core.metrics import TrainingDiverged
    from core.prefix_cache import PrefixCache

    weights = dict(zip(args.backbones, args.weights, strict=True))
    chosen = DataConfig(
        source=f"folder:{Path(args.data)}", val_fraction=0.5, cache_dir=args.cache_dir
    )
    data = load_data(chosen, round(args.size * 1.25))
    cache = PrefixCache(3 << 30)
    points = qmc.Sobol(5, scramble=True, rng=np.random.default_rng(7)).random(args.trials)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", *SETTINGS, "epoch", "val_acc", "seconds", "saved_s", "n_train", "n_val"]
        )
        for number, u in enumerate(points):
            params = _at(u, args.backbones)
            config = TrainConfig(
                weights=weights[params["backbone"]],
                image_size=args.size,
                epochs=args.epochs,
                head_init=args.head_init,
                workers=0,
                **params,
            )
            begin = time.process_time()
            try:
                for metrics in fit(config, data, None, cache):
                    now = time.process_time()
                    row = [number, *params.values(), metrics.epoch + 1, metrics.val_acc]
                    row += [now - begin, metrics.saved_s, len(data.train), len(data.val)]
                    writer.writerow(row)
                    begin = now
            except TrainingDiverged as err:
                print(f"trial {number}: {err}")
            file.flush()


def _at(u: np.ndarray[Any, Any], backbones: list[str]) -> dict[str, Any]:
    """Return the setting at a place of the unit cube."""
    params: dict[str, Any] = {"backbone": backbones[int(u[0] * len(backbones))]}
    for place, (name, dist) in zip(u[1:], SPACE.items(), strict=True):
        assert isinstance(dist, IntDistribution | FloatDistribution)
        if isinstance(dist, IntDistribution):
            params[name] = dist.low + int(place * (dist.high - dist.low + 1))
        else:
            params[name] = float(dist.low * (dist.high / dist.low) ** place)
    return params


class Landscape:
    """Accuracy by epoch, and seconds, over the space of a recorded table."""

    def __init__(self, file: Path) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        table = pd.read_csv(file)
        self.backbones = sorted(table["backbone"].unique())
        self.epochs = int(table["epoch"].max())
        self.n_val, self.n_train = int(table["n_val"].iloc[0]), int(table["n_train"].iloc[0])
        curves = table.pivot(index="trial", columns="epoch", values="val_acc")
        params = table.drop_duplicates("trial").set_index("trial")[list(SETTINGS)]
        self.n_recorded = len(params)
        # A run that diverged stays where it was: at what it had before.
        curves = curves.ffill(axis=1)
        self._trees = ExtraTreesRegressor(100, min_samples_leaf=2, random_state=0)
        self._trees.fit(self._inputs(params), curves.to_numpy())
        table["alone"] = table["seconds"] + table["saved_s"]
        self._cold: dict[tuple[str, int], float] = {}
        self._warm: dict[tuple[str, int], float] = {}
        later = table[table["epoch"] > 1]
        for key, rows in later.groupby(["backbone", "freeze_depth"]):
            warm = rows[rows["saved_s"] > 0]
            self._cold[key] = float(rows["alone"].median())
            self._warm[key] = float((warm if len(warm) else rows)["seconds"].median())
        self.space = {"backbone": CategoricalDistribution(self.backbones), **SPACE}
        rng = np.random.default_rng(0)
        drawn = [_at(u, self.backbones) for u in rng.random((N_SOUGHT, 5))]
        finals = self.curves(drawn).max(axis=1)
        self.best = float(finals.max())
        self.best_params = drawn[int(finals.argmax())]
        self.share_good = float((finals >= self.best - 0.01).mean())

    def _inputs(self, params: pd.DataFrame) -> np.ndarray[Any, Any]:
        head = params["base_lr"] * params["head_lr_mult"]
        columns = [params["freeze_depth"], np.log(params["base_lr"]), np.log(head)]
        columns += [np.log(params["weight_decay"])]
        columns += [(params["backbone"] == name).astype(float) for name in self.backbones]
        return np.stack(columns, axis=1)

    def curves(self, params: list[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
        """Return noise-free accuracies, (n, epochs)."""
        return np.asarray(self._trees.predict(self._inputs(pd.DataFrame(params))))

    def seconds(self, params: Mapping[str, Any], is_cached: bool) -> float:
        """Return an epoch's seconds."""
        table = self._warm if is_cached else self._cold
        return table[params["backbone"], params["freeze_depth"]]


def _queue(landscape: Landscape, sampler: str) -> Iterator[dict[str, Any]]:
    """Give the settings that a search tries first."""
    names = ["linear-probe"] if sampler.startswith("thaw") else list(RECIPES)
    for name in names:
        backbones = landscape.backbones if name == "linear-probe" else landscape.backbones[:1]
        for backbone in backbones:
            yield {"backbone": backbone, "weight_decay": 1e-4, **RECIPES[name]}


def search(
    landscape: Landscape,
    arm: str,
    pruner: str,
    seed: int,
    budget_s: float,
    outlook: Outlook,
    power: float | None = None,
) -> list[tuple[float, float]]:
    """Search until the seconds are spent.

    Returns:
        Seconds and the noise-free accuracy of the best trial then, whenever a trial ended.
    """
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize", pruner=make_pruner(pruner, landscape.epochs))
    for params in _queue(landscape, arm):
        study.enqueue_trial(params)
    cached: dict[tuple[str, int], int] = {}
    seen, spent = SeenTrials(), 0.0
    best_seen, path = -1.0, []
    number = 0
    while spent < budget_s:
        study.sampler = make_sampler(arm, seed, number, landscape.space, seen, outlook)
        if power is not None:
            study.sampler._cost_power = power
        with quiet_experiments():
            trial = study.ask(landscape.space)
            params = trial.params
            true = landscape.curves([params])[0]
            noise = np.sqrt(true * (1 - true) / landscape.n_val)
            common, own = rng.standard_normal(), rng.standard_normal(len(true))
            mixed = COMMON_NOISE * common + np.sqrt(1 - COMMON_NOISE**2) * own
            told = np.clip(np.round((true + noise * mixed) * landscape.n_val), 0, landscape.n_val)
            told = told / landscape.n_val
            place = (params["backbone"], params["freeze_depth"])
            spent += TRIAL_S
            state = TrialState.COMPLETE
            for epoch in range(landscape.epochs):
                spent += landscape.seconds(params, cached.get(place, 0) > epoch)
                cached[place] = max(cached.get(place, 0), epoch + 1)
                trial.report(float(told[epoch]), epoch + 1)
                if epoch + 1 < landscape.epochs and trial.should_prune():
                    state = TrialState.PRUNED
                    break
            value = float(told[: epoch + 1].max())
            study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        if state is TrialState.COMPLETE and value > best_seen:
            best_seen = value
            path.append((spent, float(true[int(told.argmax())])))
        number += 1
    return path


def seconds_to(path: list[tuple[float, float]], target: float, budget_s: float) -> float:
    """Return when the best trial's accuracy first was the target; infinity if it never was."""
    return next((s for s, acc in path if acc >= target and s <= budget_s), float("inf"))


def _told(values: list[float]) -> str:
    low, middle, high = (
        f"{v:.0f}" for v in np.quantile(values, [0.25, 0.5, 0.75], method="lower")
    )
    return f"{middle} ({low} to {high})"


def replay(args: argparse.Namespace) -> None:
    """Print each arm's seconds to near the best, and how far it stays below."""
    from core.build import stage_flops

    for file in args.tables:
        landscape = Landscape(file)
        base = TrainConfig(weights="none", image_size=args.size, epochs=landscape.epochs)
        cost = CostModel(base, landscape.n_train, landscape.n_val, stage_flops)
        outlook = Outlook(landscape.epochs, landscape.n_val, cost)
        print(
            f"{file.name}: {landscape.n_recorded} recorded trials, {landscape.epochs} epochs, "
            f"{landscape.n_train} + {landscape.n_val} pictures; best {landscape.best:.3f} at "
            f"{landscape.best_params}; {landscape.share_good:.2%} of the space within a point"
        )
        target = landscape.best - args.within
        for arm in args.arms:
            name, _, power = arm.partition("^")
            for pruner in args.pruners:
                times, finals, quarter = [], [], []
                begin = time.process_time()
                for seed in range(args.seeds):
                    path = search(
                        landscape, name, pruner, seed, args.budget, outlook,
                        float(power) if power else None,
                    )  # fmt: skip
                    times.append(seconds_to(path, target, args.budget))
                    finals.append(100 * (landscape.best - path[-1][1]))
                    early = [acc for s, acc in path if s <= args.budget / 4]
                    quarter.append(100 * (landscape.best - (early[-1] if early else 0)))
                print(
                    f"  {arm:10} {pruner:10} seconds {_told(times):24} reached "
                    f"{np.isfinite(times).mean():4.0%}  points short at 1/4: "
                    f"{statistics.mean(quarter):.2f}, at the end: {statistics.mean(finals):.2f} "
                    f"+- {statistics.stdev(finals) / args.seeds**0.5:.2f}  "
                    f"[{time.process_time() - begin:.0f} s]",
                    flush=True,
                )


def main() -> None:
    """Record a table, or replay searches on some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="train and write a table")
    recorder.add_argument("--data", required=True, help="folder of pictures")
    recorder.add_argument("--size", type=int, default=96)
    recorder.add_argument("--trials", type=int, default=96)
    recorder.add_argument("--epochs", type=int, default=9)
    recorder.add_argument("--head-init", default="default")
    recorder.add_argument("--backbones", nargs="+", default=["timm:tf_efficientnet_lite0"])
    recorder.add_argument("--weights", nargs="+", default=["auto"])
    recorder.add_argument("--cache-dir")
    recorder.add_argument("--out", type=Path, required=True)
    recorder.set_defaults(run=record)
    player = commands.add_parser("replay", help="search recorded tables")
    player.add_argument("tables", nargs="+", type=Path)
    player.add_argument("--size", type=int, default=96)
    player.add_argument("--seeds", type=int, default=20)
    player.add_argument("--budget", type=float, default=600.0, help="seconds of a search")
    player.add_argument("--within", type=float, default=0.01, help="target below the best")
    player.add_argument("--arms", nargs="+", default=["thaw", "tpe", "random"])
    player.add_argument("--pruners", nargs="+", default=["none", "hyperband"])
    player.set_defaults(run=replay)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.run(args)


if __name__ == "__main__":
    main()
