"""What going on with paused trials gains over killing them: equal settings, equal seconds.

Every setting is trained to its end once, with a pause at each rung, by the real core: so every
epoch, every start (network, weights, state) and every pause has its measured seconds. A trial's
figures do not depend on when it runs (the tests hold that), so what a pruner would have done with
the settings in any order follows from these curves; Optuna's own pruners and ours are asked epoch
by epoch. An order is drawn `--orders` times; the orders share the curves, so their spread is that
of the search's luck on this data set, not that of other data.

    python benchmarks/promotion.py --data photos/hotdog --size 96 --limit 600
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.paused import pause
from core.prefix_cache import PrefixCache
from study.promotion import Promotion, rungs
from study.samplers import make_pruner, quiet_experiments

MEMORY = 4 << 30
SPACE = {"setting": IntDistribution(0, 10**6)}
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(slots=True)
class Curve:
    """A setting's measured course.

    Attributes:
        val_acc: Validation accuracy after each epoch.
        epoch_s: Seconds of each epoch.
        start_s: Seconds of each start: the first, then one a rung.
        pause_s: Seconds of each pause.
    """

    val_acc: list[float] = field(default_factory=list)
    epoch_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)


def train(config: TrainConfig, data: ImageData, cache: PrefixCache) -> Curve:
    """Train a setting to its end with a pause at every rung, as a study keeps its weights."""
    found = Curve()
    with tempfile.TemporaryDirectory() as folder:
        for stop in (*rungs(config.epochs), config.epochs):
            begin = time.perf_counter()
            run = fit(config, data, Path(folder) / "kept", cache, Path(folder) / "paused")
            with contextlib.closing(run) as epochs:
                for metrics in epochs:
                    seconds = metrics.data_s + metrics.train_s + metrics.eval_s
                    if len(found.start_s) == len(found.pause_s):
                        found.start_s.append(time.perf_counter() - begin - seconds)
                    found.val_acc.append(metrics.val_acc)
                    found.epoch_s.append(seconds)
                    if metrics.epoch + 1 == stop < config.epochs:
                        begin = time.perf_counter()
                        pause(epochs)
                        found.pause_s.append(time.perf_counter() - begin)
    assert len(found.val_acc) == config.epochs
    return found


@dataclass(slots=True)
class Course:
    """What a search had after so many seconds: best accuracy of complete trials, and of all."""

    seconds: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)
    n_epochs: int = 0
    n_complete: int = 0

    def add(self, seconds: float, complete_acc: float | None) -> None:
        """Go on for some seconds; they may have completed a trial."""
        best = max(self.complete[-1] if self.complete else 0.0, complete_acc or 0.0)
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + seconds)
        self.complete.append(best)
        self.n_complete += complete_acc is not None

    def after(self, seconds: float) -> float:
        """Return the best accuracy of the trials that were complete by then."""
        at = int(np.searchsorted(self.seconds, seconds, side="right")) - 1
        return self.complete[at] if at >= 0 else 0.0


def play_killing(pruner: BasePruner, curves: list[Curve]) -> Course:
    """Let an Optuna pruner stop trials for good."""
    course = Course()
    study = optuna.create_study(
        direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for curve in curves:
        trial = study.ask()
        seconds, reached = curve.start_s[0], 0
        for step, value in enumerate(curve.val_acc, start=1):
            seconds, reached = seconds + curve.epoch_s[step - 1], step
            trial.report(value, step)
            if trial.should_prune():
                break
        is_complete = reached == len(curve.val_acc)
        state = TrialState.COMPLETE if is_complete else TrialState.PRUNED
        study.tell(trial, max(curve.val_acc) if is_complete else None, state=state)
        course.add(seconds, max(curve.val_acc) if is_complete else None)
        course.n_epochs += reached
    return course


def frozen(number: int, curve: Curve, done: int) -> FrozenTrial:
    """Return a trial as Optuna's tables show it to the promotion rule."""
    trial = create_trial(
        state=TrialState.PRUNED,
        params={"setting": number},
        distributions=SPACE,
        intermediate_values=dict(enumerate(curve.val_acc[:done], start=1)),
    )
    trial.number = number
    return trial


def play_promoting(promotion: Promotion, curves: list[Curve]) -> Course:
    """Pause trials at the rungs, and go on with those that turn out good enough."""
    course = Course()
    length = len(curves[0].val_acc)
    stops = (*promotion.rungs, length)
    done: dict[int, int] = {}
    trials: dict[int, FrozenTrial] = {}
    while True:
        paused = [number for number, epochs in done.items() if epochs < length]
        order = promotion.standings(list(trials.values()), paused)
        number = next((row.number for row in order if row.is_promotable), len(trials))
        is_last = number == len(curves)
        if is_last and (course.n_complete or not order):
            return course
        if is_last:  # as a study does that would end without a model
            number = order[0].number
        curve, begin = curves[number], done.get(number, 0)
        reached, seconds = begin, curve.start_s[sum(begin >= stop for stop in stops)]
        while reached < length:
            reached = next(stop for stop in stops if stop > reached)
            done[number], trials[number] = reached, frozen(number, curve, reached)
            if reached < length and not is_last:
                [standing] = promotion.standings(list(trials.values()), [number])
                if not standing.is_promotable:
                    seconds += curve.pause_s[standing.level]
                    break
        seconds += sum(curve.epoch_s[begin:reached])
        course.add(seconds, max(curve.val_acc) if reached == length else None)
        course.n_epochs += reached - begin


def settings(base: TrainConfig, n: int, seed: int, shallowest: int) -> list[TrainConfig]:
    """Draw settings at random: freeze level, rates, optimizer."""
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            base,
            freeze_depth=int(rng.integers(shallowest, 6)),
            base_lr=float(10 ** rng.uniform(-4, -2)),
            head_lr_mult=float(10 ** rng.uniform(0, 2)),
            optimizer=str(rng.choice(["sgd", "adamw"])),
        )
        for _ in range(n)
    ]


def told(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Return the median with the middle 80 %."""
    low, high = np.quantile(values, [0.1, 0.9]) * scale
    return f"{statistics.median(values) * scale:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def main() -> None:
    """Print what starts and pauses cost, then a row per pruner."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of pictures, or digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--settings", type=int, default=27)
    parser.add_argument("--shallowest", type=int, default=4, help="lowest freeze level drawn")
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--limit", type=int, help="training pictures")
    parser.add_argument("--cache-dir", help="folder of decoded pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    source = args.data if args.data == "digits" else f"folder:{Path(args.data)}"
    data = load_data(
        DataConfig(source=source, limit=args.limit, cache_dir=args.cache_dir),
        round(args.size * 1.25),
    )
    base = TrainConfig(
        backbone=args.backbone, weights=args.weights, image_size=args.size, epochs=args.epochs
    )
    cache = PrefixCache(MEMORY)
    drawn = settings(base, args.settings, args.seed, args.shallowest)
    begin = time.perf_counter()
    curves = [train(config, data, cache) for config in drawn]
    print(f"{source}: {len(data.train)} training, {len(data.val)} validation pictures")
    print(
        f"{args.backbone}, {args.size} px, {args.epochs} epochs, {len(curves)} settings trained "
        f"to their end in {time.perf_counter() - begin:.0f} s; rungs {rungs(args.epochs)}"
    )
    print(f"  an epoch: {told([s for c in curves for s in c.epoch_s], 1e3)} ms")
    print(f"  a first start: {told([c.start_s[0] for c in curves], 1e3)} ms")
    print(f"  going on: {told([s for c in curves for s in c.start_s[1:]], 1e3)} ms")
    print(f"  a pause: {told([s for c in curves for s in c.pause_s], 1e3)} ms")
    full = sum(sum(curve.epoch_s) + curve.start_s[0] for curve in curves)
    best = max(max(curve.val_acc) for curve in curves)
    print(f"  best of all settings: {100 * best:.1f} %, after {full:.0f} s without a pruner")
    names = ("none", "halving", "hyperband", "promote")
    played: dict[str, list[Course]] = {name: [] for name in names}
    for k in range(args.orders):
        order = np.random.default_rng((args.seed, k)).permutation(len(curves))
        line = [curves[i] for i in order]
        for name in names:
            pruner = make_pruner(name, args.epochs)
            with quiet_experiments():
                played[name].append(
                    play_promoting(pruner, line)
                    if isinstance(pruner, Promotion)
                    else play_killing(pruner, line)
                )
    print(f"{args.orders} orders: median (10 % to 90 %); accuracy of complete trials, in %")
    for name, courses in played.items():
        print(
            f"  {name:9} all settings in {told([c.seconds[-1] for c in courses])} s, "
            f"{told([float(c.n_epochs) for c in courses], 1, 0)} epochs, "
            f"{told([float(c.n_complete) for c in courses], 1, 0)} complete, "
            f"best {told([c.complete[-1] for c in courses], 100)}, is the best of all in "
            f"{100 * statistics.mean(c.complete[-1] >= best for c in courses):.0f} %"
        )
    budget = statistics.median(course.seconds[-1] for course in played["promote"])
    print(f"best after a share of promote's {budget:.0f} s:")
    for name, courses in played.items():
        cells = [told([c.after(share * budget) for c in courses], 100) for share in SHARES]
        row = "  ".join(f"{share:.0%} {cell}" for share, cell in zip(SHARES, cells, strict=True))
        print(f"  {name:9} {row}")


if __name__ == "__main__":
    main()
