"""What keeping the outputs of frozen layers saves: the same run without arrays, cold and warm.

Every run is done three times in turn: without a cache, with an empty one (cold) and with what
that one left (warm), so that what else the machine does falls on all alike. The figures must be
equal to the bit; where they are not, the status is 1.

    python benchmarks/sharing.py --data photos/hotdog --size 96 --rounds 3
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.metrics import MEASURED

ARMS = ("alone", "cold", "warm")
_BUDGET = 8 << 30


def measure(
    train: TrainConfig, data: ImageData, rounds: int
) -> tuple[dict[str, list[float]], bool]:
    """Run all arms in turn; return seconds by arm, and whether all figures are equal."""
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seen = set()
    list(fit(dataclasses.replace(train, epochs=1), data))  # loads weights and libraries
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = ArrayCache(Path(folder), _BUDGET)
            for arm in ARMS:
                begin = time.perf_counter()
                epochs = list(fit(train, data, cache=None if arm == "alone" else cache))
                seconds[arm].append(time.perf_counter() - begin)
                rows = [dataclasses.asdict(metrics) for metrics in epochs]
                seen.add(repr([{k: v for k, v in r.items() if k not in MEASURED} for r in rows]))
    return seconds, len(seen) == 1


def main() -> int:
    """Print a line per level: seconds of each arm with their range, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--levels", type=int, nargs="+", default=[5, 4, 3])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = load_data(DataConfig(source=args.data, limit=args.limit), round(1.25 * args.size))
    is_good = True
    for level in args.levels:
        train = TrainConfig(
            backbone=args.backbone,
            weights=args.weights,
            image_size=args.size,
            freeze_depth=level,
            epochs=args.epochs,
            head_solver="sgd",
        )
        seconds, is_equal = measure(train, data, args.rounds)
        is_good &= is_equal
        mid = {arm: statistics.median(values) for arm, values in seconds.items()}
        text = ", ".join(
            f"{arm} {mid[arm]:.2f} s ({min(values):.2f}-{max(values):.2f})"
            for arm, values in seconds.items()
        )
        ratio = mid["alone"] / mid["warm"]
        print(f"level {level}: {text}; warm {ratio:.2f} x; equal to the bit: {is_equal}")
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
