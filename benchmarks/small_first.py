"""Smaller pictures first: what it saves, and whether settings keep their ranks.

Settings are drawn at random (levels 0 to 4, rates about the recipes'), and each is trained twice
in turn, nothing shared: with every epoch at the full size, and with the first ones at a smaller
one. Told are the ratio of seconds, the difference in test accuracy, and rank correlations: of what
the smaller-first trials end with, and of what they have at earlier epochs (where a pruner looks),
with what the same settings end with at the full size.

    python benchmarks/small_first.py --data photos/hotdog --size 128 --small 96 --settings 12
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import numpy as np
from naive import BACKBONES
from scipy.stats import spearmanr
from time_to_quality import test_accuracy

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.metrics import TrainingDiverged

# Narrower than the search space: what diverges at one size does at the other, and would make any
# two rankings agree.
_BASE_LR, _HEAD_LR_MULT, _WEIGHT_DECAY = (2e-4, 1e-2), (1.0, 12.0), (1e-6, 1e-2)


@dataclass(frozen=True)
class Run:
    """One trial.

    Attributes:
        seconds: Wall time of its epochs.
        scores: Of each epoch.
        test_acc: Of the network as it is at its end.
    """

    seconds: float
    scores: list[float]
    test_acc: float


def run(config: TrainConfig, data: ImageData) -> Run:
    """Train a trial to its end and test its network; testing is off the clock."""
    begin = time.perf_counter()
    scores: list[float] = []
    with contextlib.closing(fit(config, data)) as epochs:
        for metrics in epochs:
            scores.append(metrics.score or 0.0)
            if metrics.epoch == config.epochs - 1:
                seconds = time.perf_counter() - begin
                state = epochs.gi_frame.f_locals["run"].snapshot()
    return Run(seconds, scores, test_accuracy(config, data, state))


def drawn(rng: np.random.Generator, backbones: list[str], level: int) -> dict[str, Any]:
    """Draw settings of a freeze level."""

    def rate(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    return {
        "backbone": str(rng.choice(backbones)),
        "freeze_depth": level,
        "base_lr": rate(*_BASE_LR),
        "head_lr_mult": rate(*_HEAD_LR_MULT),
        "weight_decay": rate(*_WEIGHT_DECAY),
    }


def told(full: list[Run], small: list[Run], small_epochs: int) -> str:
    """Sum up the pairs so far."""
    ratios = [a.seconds / b.seconds for a, b in zip(full, small, strict=True)]
    gains = [100 * (b.test_acc - a.test_acc) for a, b in zip(full, small, strict=True)]
    spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    final = [one.scores[-1] for one in full]
    lines = [
        f"n = {len(full)}; full / small first, seconds: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        f"test accuracy, small first minus full: {statistics.fmean(gains):+.1f} points (standard "
        f"error {spread:.1f})",
        "rank correlation with the full-size final score:",
    ]
    for epoch in range(len(full[0].scores)):
        at = f"  after epoch {epoch + 1}{' (small)' if epoch < small_epochs else ''}"
        pairs = [("full", full), ("small first", small)]
        rhos = [
            f"{name} {spearmanr([one.scores[epoch] for one in runs], final).statistic:.2f}"
            for name, runs in pairs
        ]
        lines.append(f"{at}: {', '.join(rhos)}")
    return "\n".join(lines)


def main() -> None:
    """Train pairs, and print what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--small", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--small-epochs", type=int, default=4)
    parser.add_argument("--settings", type=int, default=10)
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 2, 0, 3, 1])
    parser.add_argument("--limit", type=int, help="training pictures")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="folder of decoded pictures")
    args = parser.parse_args()
    source = DataConfig(f"folder:{args.data}", limit=args.limit, cache_dir=args.cache_dir)
    data = load_data(source, round(args.size * 1.25))
    base = TrainConfig(image_size=args.size, epochs=args.epochs, device="cpu", head_init="probe")
    rng = np.random.default_rng(args.seed)
    full: list[Run] = []
    small: list[Run] = []
    for k in range(args.settings):
        settings = drawn(rng, args.backbones, args.levels[k % len(args.levels)])
        config = dataclasses.replace(base, **settings)
        shrunk = dataclasses.replace(config, small_size=args.small, small_epochs=args.small_epochs)
        try:
            turns = [(config, full), (shrunk, small)]
            done = [(runs, run(each, data)) for each, runs in turns[:: 1 if k % 2 else -1]]
        except TrainingDiverged as err:
            print(f"left out: {err}", flush=True)
            continue
        for runs, found in done:
            runs.append(found)
        row = {**settings, "full": vars(full[-1]), "small": vars(small[-1])}
        print(json.dumps(row), flush=True)
    print(told(full, small, args.small_epochs))


if __name__ == "__main__":
    main()
