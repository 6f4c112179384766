"""Images per second of `fit` over the bare model's training step on tensors already in memory.

Both sides train the same network on the same device with the same batch, optimizer and precision;
they take turns, so that a machine that slows down slows both. The bare side has
one ready batch and does nothing but forward, backward and step; `fit` has the images, the
augmentation, the bookkeeping and (outside the time taken here) the evaluation. The result is a
Markdown table, a row for each network and batch size.

    python benchmarks/throughput.py                              # five networks on a GPU
    python benchmarks/throughput.py --networks resnet18 --batches 32 --images 104  # on a CPU
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.device import amp_dtype, choose_device, describe_device, synchronize
from core.fit import fit
from core.models.builder import build
from core.models.freeze_stages import freeze, train_mode
from core.training.optim import make_optimizer, parameter_groups

NETWORKS = (
    "resnet18",
    "resnet50",
    "timm:tf_efficientnet_lite0",
    "convnext_tiny",
    "timm:vit_small_patch16_224",
)
HEADER = """| network | batch | `fit`, images/s | bare, images/s | ratio: median (range) | n |
| --- | --- | --- | --- | --- | --- |"""


def make_images(folder: Path, n: int, side: int) -> None:
    """Write n JPEG images of smooth noise in two classes to train on, and 32 others to val."""
    rng = np.random.default_rng(0)
    for i in range(n + 32):
        path = folder / ("train" if i < n else "val") / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path)


class Bare:
    """The training step alone, on one batch that is there already."""

    def __init__(self, config: TrainConfig, classes: tuple[str, ...]) -> None:
        self.device = choose_device(config.device)
        built = build(config, classes)
        self.built, self.config = built, config
        freeze(built.model, built.stages, config.freeze_depth)
        self.model = built.model.to(self.device)
        groups = parameter_groups(self.model, built, config)
        self.optimizer = make_optimizer(groups, config, self.device)
        dtype = amp_dtype(config.amp, self.device)
        self.autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        side = built.preprocessing.image_size
        shape = (config.batch_size, 3, side, side)
        images = torch.randn(shape, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)  # as `fit` has them
        self.labels = torch.randint(len(classes), (config.batch_size,), device=self.device)

    def images_per_s(self, steps: int) -> float:
        """Take so many steps and return the pace."""
        train_mode(self.model, self.built.stages, self.config.freeze_depth)
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            with self.autocast:
                loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return steps * self.config.batch_size / (time.perf_counter() - begin)


def measure(config: TrainConfig, data: ImageData) -> list[tuple[float, float]]:
    """Return (fit, bare) images per second of each epoch; the first is not counted."""
    bare = Bare(config, data.classes)
    steps = len(data.train) // config.batch_size
    pairs = []
    bare.images_per_s(max(1, steps // 2))
    for metrics in fit(config, data):
        pairs.append((metrics.images_per_s, bare.images_per_s(steps)))
    return pairs[1:]


def rows(args: argparse.Namespace, data: ImageData) -> Iterator[str]:
    """Measure every network at every batch size while there is time; give a row for each."""
    longest, begin = 0.0, time.perf_counter()
    for network, batch in ((n, b) for n in args.networks for b in args.batches):
        started = time.perf_counter()
        if started - begin + longest > args.seconds:
            yield f"| {network} | {batch} | not measured: no time was left | | | |"
            continue
        config = TrainConfig(
            backbone=network,
            weights="none",
            image_size=args.size,
            batch_size=batch,
            epochs=args.rounds + 1,
            schedule="constant",
            base_lr=1e-3,
            device=args.device,
        )
        try:
            pairs = measure(config, data)
        except Exception as err:  # another network may still be measured
            yield f"| {network} | {batch} | failed: {(str(err).splitlines() or [''])[0]} | | | |"
            continue
        finally:
            longest = max(longest, time.perf_counter() - started)
        ours, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = [ours / bare for ours, bare in pairs]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        yield f"| {network} | {batch} | {ours:.0f} | {bare:.0f} | {spread} | {len(ratios)} |"


def main() -> None:
    """Print the table, each row once it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images", args.images, round(args.size * 1.3))
        source = DataConfig(source=f"folder:{folder}/images", cache_dir=f"{folder}/cache")
        data = load_data(source, 2 * args.size)
        device = describe_device(choose_device(args.device))
        print(f"{device}; {args.size} px; {args.images} images per epoch\n\n{HEADER}", flush=True)
        for row in rows(args, data):
            print(row, flush=True)


if __name__ == "__main__":
    main()
