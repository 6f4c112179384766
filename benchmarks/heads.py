"""Head-only trials against the naive loop.

Both sides of each ratio take turns. A naive trial builds the network, decodes and augments all
pictures in every epoch, and trains the head behind it. Ours does that work once (cold), and later
trials read what it left (warm); its record in SQLite, with all epochs, is included.

    python benchmarks/naive.py prepare --data photos/hotdog --size 64 --out work/task
    python benchmarks/heads.py --task work/task --rounds 5
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from naive import CROP_SCALE, Settings, Task, read_task, train

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.prefix_cache import PrefixCache
from study.progress import QuietProgress
from study.record.record import Record
from study.runner import Asked, Work, run_trial


def told(ratios: list[float]) -> str:
    """Return the median ratio with the smallest and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def naive_trial(task: Task, settings: Settings, epochs: int) -> float:
    """Train a naive trial; return its seconds."""
    begin = time.perf_counter()
    for _ in train(task, settings, epochs=epochs):
        pass
    return time.perf_counter() - begin


class Alone:
    """Runs our trials one at a time, each with its record."""

    def __init__(self, folder: Path, data: ImageData, config: TrainConfig) -> None:
        store = Record.open(str(folder / "studies.db"), create=True)
        study_id = store.create_study("heads", {}, {"fingerprint": data.fingerprint}, {})
        run_id = store.begin_run(study_id, command="benchmark", device="cpu", versions={})
        event = threading.Event()
        self.work = Work(store, study_id, run_id, data, folder, QuietProgress(), event)
        self.config = config
        self.n_trials = 0

    def trial(self, cache: PrefixCache) -> float:
        """Train and record a trial with rates of its own; return its seconds."""
        self.n_trials += 1
        config = dataclasses.replace(self.config, base_lr=1e-3 * (1 + 1e-3 * self.n_trials))
        work = dataclasses.replace(self.work, cache=cache)
        begin = time.perf_counter()
        trial = work.store.start_trial(work.study_id, {}, {})
        result = run_trial(work, Asked(trial, "benchmark"), config)
        assert result.state == "complete", result.reason
        return time.perf_counter() - begin


def against_naive(args: argparse.Namespace, task: Task, data: ImageData, folder: Path) -> None:
    """Print naive / cold and naive / warm."""
    backbone = next(iter(task.networks))
    size = task.networks[backbone].image_size
    config = TrainConfig(
        backbone=backbone,
        image_size=size,
        freeze_depth=5,
        epochs=args.epochs,
        crop_scale=CROP_SCALE[0],
    )
    settings = Settings(backbone, 5, 1e-3, 10.0, 1e-4)
    alone = Alone(folder, data, config)
    naive_trial(task, settings, 1)  # the first use of a network loads and traces it
    alone.trial(PrefixCache(1 << 30))
    seconds: dict[str, list[float]] = {"naive": [], "cold": [], "warm": []}
    for _ in range(args.rounds):
        cache = PrefixCache(1 << 30)
        seconds["naive"].append(naive_trial(task, settings, args.epochs))
        seconds["cold"].append(alone.trial(cache))
        seconds["warm"].append(alone.trial(cache))
    for name in ("cold", "warm"):
        ratios = [a / b for a, b in zip(seconds["naive"], seconds[name], strict=True)]
        print(
            f"{task.name}, {size} px, {args.epochs} epochs: naive "
            f"{statistics.median(seconds['naive']):.2f} s, {name} "
            f"{statistics.median(seconds[name]):.3f} s, naive / {name} {told(ratios)}",
            flush=True,
        )


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, required=True, help="folder that naive.py prepared")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="training pictures; as naive.py was told")
    args = parser.parse_args()
    task = read_task(args.task)
    size = next(iter(task.networks.values())).image_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = DataConfig(
            source=f"folder:{task.root}", limit=args.limit, cache_dir=str(folder / "cache")
        )
        data = load_data(chosen, round(1.25 * size))
        against_naive(args, task, data, folder)


if __name__ == "__main__":
    main()
