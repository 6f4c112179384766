"""What sharing work between trials saves: the same trials alone, building the cache, reading it.

Every trial is run three times in turn: without a cache, with an empty one (cold) and with what
that run left (warm), so that what else the machine does falls on all three alike. The figures must
be equal to the bit, which is checked.

    python benchmarks/sharing.py --data photos/hotdog --size 96 --rounds 3
"""

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from core.config import DataConfig, TrainConfig
from core.data import ImageData, load_data
from core.fit import fit
from core.prefix_cache import PrefixCache

MEASURED = ("images_per_s", "data_s", "train_s", "eval_s", "peak_memory_bytes", "saved_s")


def timed(
    config: TrainConfig, data: ImageData, cache: PrefixCache | None
) -> tuple[float, list[dict[str, object]]]:
    """Run a trial; return its seconds, and its figures but for those that a clock gives."""
    begin = time.perf_counter()
    epochs = [dataclasses.asdict(metrics) for metrics in fit(config, data, None, cache)]
    seconds = time.perf_counter() - begin
    return seconds, [{k: v for k, v in m.items() if k not in MEASURED} for m in epochs]


def told(ratios: list[float]) -> str:
    """Return the median ratio with the smallest and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Print a row per freeze level, and the sum over a study of evenly drawn levels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of pictures, or digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="training pictures")
    parser.add_argument("--cache-dir", help="folder of decoded pictures")
    args = parser.parse_args()
    source = args.data if args.data == "digits" else f"folder:{Path(args.data)}"
    chosen = DataConfig(source=source, limit=args.limit, cache_dir=args.cache_dir)
    data = load_data(chosen, round(args.size * 1.25))
    base = TrainConfig(
        backbone=args.backbone,
        weights=args.weights,
        image_size=args.size,
        epochs=args.epochs,
        base_lr=0.001,
    )
    print(f"{source}: {len(data.train)} training, {len(data.val)} validation pictures")
    print(f"{args.backbone}, {args.size} px, {args.epochs} epochs, n = {args.rounds}")
    print("alone / cold and alone / warm: median (smallest to largest); above 1 is faster")
    sums: dict[str, list[float]] = {"alone": [], "cold": [], "warm": []}
    for depth in range(5, -1, -1):
        config = dataclasses.replace(base, freeze_depth=depth)
        rows: dict[str, list[float]] = {name: [] for name in sums}
        for _ in range(args.rounds):
            cache = PrefixCache(4 << 30)
            alone, figures = timed(config, data, None)
            cold, built = timed(config, data, cache)
            warm, read = timed(config, data, cache)
            assert figures == built == read, "shared work changed a number"
            for name, seconds in zip(sums, (alone, cold, warm), strict=True):
                rows[name].append(seconds)
        for name in sums:
            sums[name].append(statistics.median(rows[name]))
        cold_ratio = [a / b for a, b in zip(rows["alone"], rows["cold"], strict=True)]
        warm_ratio = [a / b for a, b in zip(rows["alone"], rows["warm"], strict=True)]
        print(
            f"  depth {depth}: alone {sums['alone'][-1]:6.2f} s  cold {told(cold_ratio)}  "
            f"warm {told(warm_ratio)}",
            flush=True,
        )
    alone, warm = sum(sums["alone"]), sum(sums["warm"])
    print(f"  all six levels once, warm: {alone / warm:.2f} times as fast as alone")


if __name__ == "__main__":
    main()
