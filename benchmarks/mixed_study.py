"""A study with freeze levels drawn evenly: naive, ours, and the bound that its parts give.

Forty settings, every freeze level as often as any other, each trained by the naive loop and by
ours with one empty cache at the start. The bound is what no sharing can beat: for every trial the
forward and backward pass of the layers it trains and their evaluation, bare; and once for all of
them the pictures and all frozen layers. It is measured in the same run, on the same pictures.

    python benchmarks/naive.py prepare --data photos/hotdog --size 64 --limit 160 --out work/task
    python benchmarks/mixed_study.py --task work/task --limit 160 --rounds 3
"""

import argparse
import dataclasses
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from heads import told
from naive import CROP_SCALE, Settings, Task, read_task, train

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.feed import Feed, eval_batches
from core.fit import build_for, fit
from core.models.builder import build
from core.models.freeze_stages import freeze, train_mode
from core.optim import make_optimizer, parameter_groups
from core.prefix_cache import PrefixCache
from core.split import split_network

CPU = torch.device("cpu")
DEPTHS = range(6)


def draw_settings(task: Task, n: int) -> list[Settings]:
    """Draw settings in which every freeze level comes equally often."""
    rng = random.Random(0)
    backbone = next(iter(task.networks))
    depths = [DEPTHS[k % len(DEPTHS)] for k in range(n)]
    rng.shuffle(depths)
    return [
        Settings(backbone, depth, 10 ** rng.uniform(-4, -2), 10 ** rng.uniform(0, 2), 1e-4)
        for depth in depths
    ]


def as_config(settings: Settings, size: int, epochs: int) -> TrainConfig:
    """Return our configuration of a naive trial's settings."""
    return TrainConfig(
        **dataclasses.asdict(settings), image_size=size, epochs=epochs, crop_scale=CROP_SCALE[0]
    )


def parts(config: TrainConfig, data: ImageData) -> tuple[float, float]:
    """Measure what a trial must do, and what its freeze level must do once.

    Returns:
        Seconds of an epoch's bare training steps and evaluation behind the frozen layers, and
        seconds of an epoch's pictures and frozen layers, training and validation.
    """
    built = build_for(config, data.classes)
    depth = config.freeze_depth
    trainable = freeze(built.model, built.stages, depth)
    model = built.model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(parameter_groups(model, trainable, built.head, config), config, CPU)
    halves = split_network(model, built.stages, depth, freeze_statistics=True) if depth else None
    labels_of, batches, val = [], [], []
    with Feed(config, built.preprocessing, data, CPU) as feed, torch.no_grad():
        begin = time.perf_counter()
        for images, labels in feed.views(0):
            ready = feed.normalize(images)
            batches.append(halves.prefix(ready) if halves else ready)
            labels_of.append(labels)
        for images in eval_batches(data.val, feed.spec, CPU):
            ready = feed.normalize(images)
            val.append(halves.prefix(ready) if halves else ready)
        once = time.perf_counter() - begin
    train_mode(model, built.stages, depth, freeze_statistics=True)
    begin = time.perf_counter()
    for inputs, labels in zip(batches, labels_of, strict=True):
        optimizer.zero_grad(set_to_none=True)
        logits = (halves.train_suffix if halves else model)(inputs)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        for inputs in val:
            (halves.eval_suffix if halves else model)(inputs)
    return time.perf_counter() - begin, once


def main() -> None:
    """Print the ratios, round by round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, required=True, help="folder that naive.py prepared")
    parser.add_argument("--limit", type=int, help="training pictures; as naive.py was told")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    task = read_task(args.task)
    size = next(iter(task.networks.values())).image_size
    drawn = draw_settings(task, args.trials)
    build(drawn[0].backbone, "auto", task.classes, seed=0, image_size=size)  # loads and traces
    to_naive, to_bound = [], []
    with tempfile.TemporaryDirectory() as folder:
        chosen = DataConfig(source=f"folder:{task.root}", limit=args.limit, cache_dir=folder)
        data = load_data(chosen, round(1.25 * size))
        for number in range(args.rounds):
            cache = PrefixCache(8 << 30)
            naive = ours = bound = 0.0
            costs = {}
            for settings in drawn:  # in turn, so that what else the machine does falls on all
                begin = time.perf_counter()
                for _ in train(task, settings, epochs=args.epochs):
                    pass
                naive += time.perf_counter() - begin
                config = as_config(settings, size, args.epochs)
                begin = time.perf_counter()
                for _ in fit(config, data, None, cache):
                    pass
                ours += time.perf_counter() - begin
                step, once = parts(config, data)
                bound += args.epochs * step
                costs.setdefault(settings.freeze_depth, []).append(once)
            # The validation split's part of the first pass is made once, not once an epoch.
            share = len(data.val) / (len(data.train) + len(data.val))
            passes = args.epochs * (1 - share) + share
            bound += passes * max(statistics.median(found) for found in costs.values())
            to_naive.append(naive / ours)
            to_bound.append(bound / ours)
            print(
                f"round {number + 1}: naive {naive:.1f} s, ours {ours:.1f} s, bound "
                f"{bound:.1f} s: naive / ours {naive / ours:.2f}, bound / ours {bound / ours:.3f}",
                flush=True,
            )
    print(f"naive / ours {told(to_naive)}, bound / ours {told(to_bound)}, n = {args.rounds}")


if __name__ == "__main__":
    main()
