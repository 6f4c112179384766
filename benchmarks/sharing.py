"""What keeping the outputs of frozen layers saves: the same run without arrays, cold and warm.

Every run is done three times in turn: without a cache, with an empty one (cold) and with what
that one left (warm), so that what else the machine does falls on all alike. The figures must be
equal to the bit, which is checked. With --base another checkout of Frostline (7fb2af4 or later)
does the same in turn, in a process of its own, and the ratio of the two is printed.

    python benchmarks/sharing.py --data photos/hotdog --size 96 --rounds 3 --base ../before
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ARMS = ("alone", "cold", "warm")


def run_side(settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run all arms of this checkout; seconds by arm, peak anonymous memory, equal figures."""
    import dataclasses

    from core.config import DataConfig, TrainConfig
    from core.fit import fit
    from core.metrics import MEASURED

    try:
        from core.cache import ArrayCache
        from core.data.splits import load_data
    except ModuleNotFoundError:  # 7fb2af4
        from core.data import load_data
        from core.prefix_cache import PrefixCache

        def make(_: Path) -> Any:
            return PrefixCache(4 << 30)
    else:

        def make(folder: Path) -> Any:
            return ArrayCache(folder, 8 << 30)

    known = {field.name for field in dataclasses.fields(TrainConfig)}
    train = TrainConfig(**{k: v for k, v in settings["train"].items() if k in known})
    data = load_data(DataConfig(**settings["data"]), round(1.25 * settings["train"]["image_size"]))
    peak = _watch_memory()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seen: set[str] = set()
    list(fit(dataclasses.replace(train, epochs=1), data))  # loads weights and libraries
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = make(Path(folder))
            for arm in ARMS:
                begin = time.perf_counter()
                epochs = list(fit(train, data, cache=None if arm == "alone" else cache))
                seconds[arm].append(time.perf_counter() - begin)
                figures = [dataclasses.asdict(m) for m in epochs]
                seen.add(
                    repr([{k: v for k, v in f.items() if k not in MEASURED} for f in figures])
                )
    return {"seconds": seconds, "peak_mb": peak[0] / 1e6, "is_equal": len(seen) == 1}


def _watch_memory() -> list[int]:
    """Follow the process's anonymous memory; the largest so far stands in the list."""
    peak = [0]

    def watch() -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024)
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    return peak


def side(checkout: Path, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run a checkout's side in a process of its own."""
    given = json.dumps({"settings": settings, "rounds": rounds})
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, __file__, "--side", given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table: level, seconds of each arm, ratios with their range, peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--levels", type=int, nargs="+", default=[5, 4, 3])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(**json.loads(args.side))))
        return
    here = Path(__file__).resolve().parents[1]
    for level in args.levels:
        settings = {
            "train": {
                "backbone": args.backbone,
                "weights": args.weights,
                "image_size": args.size,
                "freeze_depth": level,
                "epochs": args.epochs,
                "head_solver": "sgd",
                "standardize": False,
            },
            "data": {"source": args.data, "limit": args.limit},
        }
        sides = {"this": here} | ({"base": args.base} if args.base else {})
        found = {name: side(path, settings, args.rounds) for name, path in sides.items()}
        for name, row in found.items():
            means = {arm: statistics.median(row["seconds"][arm]) for arm in ARMS}
            spread = {
                arm: f"{min(row['seconds'][arm]):.2f}-{max(row['seconds'][arm]):.2f}"
                for arm in ARMS
            }
            text = ", ".join(f"{arm} {means[arm]:.2f} s ({spread[arm]})" for arm in ARMS)
            print(
                f"level {level}, {name}: {text}; warm {means['alone'] / means['warm']:.2f} x; "
                f"RssAnon {row['peak_mb']:.0f} MB; equal to the bit: {row['is_equal']}"
            )
        if args.base:
            ours, theirs = (found[n]["seconds"]["warm"] for n in ("this", "base"))
            print(
                f"  base / this, warm: {statistics.median(theirs) / statistics.median(ours):.2f}"
            )


if __name__ == "__main__":
    main()
