"""Images per second of `fit` over the bare model's training step on tensors already in memory.

Both sides train the same network on the same device with the same batch, optimizer and precision;
they take turns, so that a machine that slows down slows both. The bare side has
one ready batch and does nothing but forward, backward and step; `fit` has the images, the
augmentation, the bookkeeping and (outside the time taken here) the evaluation.

    python benchmarks/core_throughput.py                       # CPU: ResNet-18 at 224
    python benchmarks/core_throughput.py --device cuda --batch 128 --images 4096 --rounds 7
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.device import amp_dtype, choose_device, describe_device, synchronize
from core.fit import fit
from core.models.builder import build, input_of
from core.models.freeze_stages import freeze, train_mode
from core.training.optim import make_optimizer, parameter_groups


def make_images(folder: Path, n: int, side: int) -> None:
    """Write n JPEG images of smooth noise in two classes, a val and a train folder."""
    rng = np.random.default_rng(0)
    for i in range(n):
        split = "val" if i % 16 == 0 else "train"
        path = folder / split / f"class{(i // 16 + i) % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path)
    for name in ("class0", "class1"):
        path = folder / "test" / name
        path.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path / "t.png")


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
        self.images = torch.randn(config.batch_size, 3, side, side, device=self.device)
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


def measure(args: argparse.Namespace, data: ImageData) -> list[tuple[float, float]]:
    """Return (fit, bare) images per second of each round; the first round is not counted."""
    config = TrainConfig(
        backbone=args.backbone,
        weights="none",
        image_size=args.size,
        freeze_depth=args.depth,
        batch_size=args.batch,
        epochs=args.rounds + 1,
        schedule="constant",
        base_lr=1e-3,
        device=args.device,
    )
    bare = Bare(config, data.classes)
    steps = len(data.train) // args.batch
    pairs = []
    bare.images_per_s(max(1, steps // 2))
    for metrics in fit(config, data):
        pairs.append((metrics.images_per_s, bare.images_per_s(steps)))
    return pairs[1:]


def main() -> None:
    """Measure and print each round and the ratio's median and range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images", args.images, round(args.size * 1.3))
        source = DataConfig(
            source=f"folder:{folder}/images", cache_dir=f"{folder}/cache", store_size=None
        )
        bound = round(1.25 * input_of(args.backbone, "auto", None).resize_size)
        data = load_data(source, bound)
        pairs = measure(args, data)
    device = describe_device(choose_device(args.device))
    print(f"{args.backbone} at {args.size} px, batch {args.batch}, depth {args.depth}, {device}")
    for k, (ours, bare) in enumerate(pairs):
        print(f"  round {k}: fit {ours:7.1f} images/s, bare {bare:7.1f}, ratio {ours / bare:.3f}")
    ratios = [ours / bare for ours, bare in pairs]
    print(
        f"fit / bare step: median {statistics.median(ratios):.3f} "
        f"(n = {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
