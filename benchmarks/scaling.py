"""Time and memory for more and more pictures: loading, a head alone, and a thawed trial.

A real set is enlarged: every new picture is a random crop of a real one, at 96 px, as JPEG, so
that contents differ and no two files are the same. Each size runs in its own process, with one
budget for shared work; what the cache holds must stay within it, and is printed with the peak
memory of the process.

    python benchmarks/scaling.py --data photos/flowers5 --sizes 1000 4000 16000 --cache 500
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SIDE = 96
IMAGE_SIZE = 64


def enlarge(source: Path, target: Path, n: int) -> None:
    """Write n crops of a set's training pictures, its classes in turn."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    classes = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    files = {name: sorted((source / "train" / name).iterdir()) for name in classes}
    for name in classes:
        (target / name).mkdir(parents=True)
    opened: dict[Path, Image.Image] = {}
    for k in range(n):
        name = classes[k % len(classes)]
        file = files[name][(k // len(classes)) % len(files[name])]
        if file not in opened:
            opened[file] = Image.open(file).convert("RGB")
        picture = opened[file]
        side = int(min(picture.size) * rng.uniform(0.6, 1.0))
        left = int(rng.integers(picture.width - side + 1))
        top = int(rng.integers(picture.height - side + 1))
        crop = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
        crop.save(target / name / f"{k:06d}.jpg", quality=85)


def measure(folder: Path, cache_mb: int) -> dict[str, float]:
    """Load the pictures and train two trials; return seconds and bytes."""
    from dataclasses import replace

    from core.config import DataConfig, TrainConfig
    from core.data.splits import load_data
    from core.disk_entries import DiskEntries
    from core.fit import fit
    from core.prefix_cache import PrefixCache

    told: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        begin = time.perf_counter()
        chosen = DataConfig(source=f"folder:{folder}", cache_dir=cache_dir)
        data = load_data(chosen, round(1.25 * IMAGE_SIZE))
        told["load_s"] = time.perf_counter() - begin
        half = cache_mb * 500_000
        disk = DiskEntries(Path(cache_dir) / "entries", half)
        cache = PrefixCache(half, disk)
        base = TrainConfig(image_size=IMAGE_SIZE, epochs=1, base_lr=1e-3)
        for name, depth in (("head", 5), ("head again", 5), ("level 4", 4), ("level 4 again", 4)):
            begin = time.perf_counter()
            for _ in fit(replace(base, freeze_depth=depth), data, None, cache):
                pass
            told[f"{name}_s"] = time.perf_counter() - begin
        told["cache_mb"] = cache.size_bytes / 1e6
        files = (Path(cache_dir) / "entries").rglob("*")
        told["disk_mb"] = sum(f.stat().st_size for f in files if f.is_file()) / 1e6
    told["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return told


def main() -> None:
    """Print a row for every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000, 64000])
    parser.add_argument("--cache", type=int, default=500, help="budget for shared work, MB")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.cache)))
        return
    for n in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            enlarge(args.data, Path(folder) / "pictures", n)
            command = [sys.executable, __file__, "--data", args.data, "--cache", args.cache]
            command += ["--measure", Path(folder) / "pictures"]
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, check=True
            )
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["cache_mb"] + told["disk_mb"] <= args.cache * 1.001, "over the budget"
        print(f"{n:6d}: " + ", ".join(f"{k} {v:.1f}" for k, v in told.items()), flush=True)


if __name__ == "__main__":
    main()
