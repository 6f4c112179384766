"""What sharing work between trials saves: the same trials alone, building the cache, reading it.

Every trial is run three times in turn: without a cache, with an empty one (cold) and with what
that run left (warm), so that what else the machine does falls on all three alike. With --disk two
more times: with an empty cache that writes to disk, too (written), and as a later process finds
it, with nothing in memory (from disk). The figures must be equal to the bit, which is checked.

    python benchmarks/sharing.py --data photos/hotdog --size 96 --rounds 3 --disk
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.disk_entries import DiskEntries
from core.disk_rates import Rates, measure_rates
from core.fit import fit
from core.metrics import MEASURED
from core.prefix_cache import PrefixCache

MEMORY, DISK = 4 << 30, 8 << 30


def timed(
    config: TrainConfig, data: ImageData, cache: PrefixCache | None
) -> tuple[float, list[dict[str, object]]]:
    """Run a trial; return its seconds, and its figures but for those that a clock gives."""
    begin = time.perf_counter()
    epochs = [dataclasses.asdict(metrics) for metrics in fit(config, data, None, cache)]
    seconds = time.perf_counter() - begin
    return seconds, [{k: v for k, v in m.items() if k not in MEASURED} for m in epochs]


def timed_on_disk(
    config: TrainConfig, data: ImageData, rates: Rates
) -> tuple[list[float], list[list[dict[str, object]]], int]:
    """Run a trial that fills a folder, and one that finds it.

    Returns:
        Their seconds, their figures, and the bytes in the folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            timed(config, data, PrefixCache(MEMORY, DiskEntries(Path(folder), DISK, rates)))
            for _ in range(2)
        ]
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return [seconds for seconds, _ in runs], [figures for _, figures in runs], size


def told(ratios: list[float]) -> str:
    """Return the median ratio with the smallest and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Print a row per freeze level, and the sum over a study in which each is drawn once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of pictures, or digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 4, 3, 2, 1, 0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="training pictures")
    parser.add_argument("--cache-dir", help="folder of decoded pictures")
    parser.add_argument("--disk", action="store_true", help="with entries on disk, too")
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
    arms = ["cold", "warm", *(["written", "from disk"] if args.disk else [])]
    print(f"alone / {', '.join(arms)}: median (smallest to largest); above 1 is faster")
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_rates(Path(folder))
    if args.disk:
        print(f"disk: writes {rates.write / 1e6:.0f} MB/s, reads {rates.read / 1e6:.0f} MB/s")
    sums: dict[str, list[float]] = {"alone": [], **{arm: [] for arm in arms}}
    for depth in args.depths:
        config = dataclasses.replace(base, freeze_depth=depth)
        rows: dict[str, list[float]] = {name: [] for name in sums}
        size = 0
        for _ in range(args.rounds):
            cache = PrefixCache(MEMORY)
            found = [timed(config, data, kept) for kept in (None, cache, cache)]
            seconds = [taken for taken, _ in found]
            figures = [told_ for _, told_ in found]
            if args.disk:
                more, equal, size = timed_on_disk(config, data, rates)
                seconds, figures = seconds + more, figures + equal
            assert all(one == figures[0] for one in figures), "shared work changed a number"
            for name, taken in zip(sums, seconds, strict=True):
                rows[name].append(taken)
        for name in sums:
            sums[name].append(statistics.median(rows[name]))
        ratios = {
            arm: [a / b for a, b in zip(rows["alone"], rows[arm], strict=True)] for arm in arms
        }
        line = "  ".join(f"{arm} {told(ratios[arm])}" for arm in arms)
        on_disk = f"  {size / 1e6:.1f} MB" if args.disk else ""
        print(f"  depth {depth}: alone {sums['alone'][-1]:6.2f} s  {line}{on_disk}", flush=True)
    for arm in arms:
        ratio = sum(sums["alone"]) / sum(sums[arm])
        print(f"  these levels once, {arm}: {ratio:.2f} times as fast as alone")


if __name__ == "__main__":
    main()
