"""Fine-tune one network: a generator of one `EpochMetrics` per epoch."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from core.checkpoint import Card, save_checkpoint, write_predictions
from core.config import TrainConfig
from core.data.splits import ImageData
from core.device import (
    choose_device,
    deterministic,
    peak_memory_bytes,
    seeded,
)
from core.epoch import Clock, epoch_metrics
from core.features import Features, feature_config, frozen_part
from core.feed import Feed
from core.head_runs import HeadRun, start_from_probe, trains_head_alone
from core.metrics import EpochMetrics
from core.models.builder import Network, build
from core.models.sources import library_versions
from core.network_run import NetworkRun
from core.paused import Best, Epochs, PausedError, restore_paused, write_paused
from core.prefix_cache import PrefixCache
from core.sharing import can_share

_TAG_DROPOUT = 101
# Backbones that were seen to take views of a size, with the size that they were built for.
_FIT_FOR_SMALL: set[tuple[str, int, int]] = set()


def fit(
    config: TrainConfig,
    data: ImageData,
    checkpoint_dir: Path | None = None,
    cache: PrefixCache | None = None,
    pause_file: Path | None = None,
) -> Epochs:
    """Fine-tune a network and yield each epoch's figures.

    Equal configuration, data and device give equal figures. The caller stops early by closing
    the generator; a checkpoint is written only by a run that reaches its last epoch. With
    `core.paused.pause` it leaves what a later call needs to go on with the next epoch, and that
    call gives what this one would have given.

    Args:
        config: What to train, and how.
        data: Pictures; `train` and `val` are read, `test` never.
        checkpoint_dir: Where the best epoch's weights, card and validation predictions go; None
            to keep nothing.
        cache: Work shared with other runs of this process; the figures are the same without.
        pause_file: Where a paused run's state goes, and is taken up from; a file that is not
            there, is damaged or belongs to another run is passed over, and the run begins at its
            beginning. It is the caller's to remove.

    Yields:
        One record per epoch, in order, from the first that is still to be done.

    Raises:
        TrainingDiverged: The loss is not a finite number any more.
        ValueError: The backbone, its weights, the device or the batch size cannot be used.
        OSError: The checkpoint or the pause file cannot be written.
    """
    check_batch(config, data)
    device = choose_device(config.device)
    built = build_for(config, data.classes)
    check_small_size(config, built)
    best: Best | None = None
    first = 0
    with _started(config, built, data, device, cache) as (run, feed):
        if pause_file is not None:
            with contextlib.suppress(PausedError):
                needs_weights = checkpoint_dir is not None
                first, best = restore_paused(
                    pause_file, config, data, run, needs_weights=needs_weights
                )
        for epoch in range(first, config.epochs):
            with deterministic(device), seeded(_mixed(config.seed, epoch), device):
                begin = time.perf_counter()
                train_loss, data_s, n_images = run.train_epoch(epoch, feed)
                between = time.perf_counter()
                evaluation = run.evaluate(feed)
                end = time.perf_counter()
            metrics = epoch_metrics(
                config,
                epoch,
                train_loss,
                evaluation,
                clock=Clock(data_s, between - begin - data_s, end - between, run.take_shared()),
                lr_factor=run.lr_factor,
                n_images=n_images,
                peak_memory_bytes=peak_memory_bytes(device),
                micro_batch_size=run.micro_batch_size,
                best_score=best.metrics.score if best else None,
            )
            if metrics.is_best:
                kept = run.snapshot() if checkpoint_dir else {}
                best = Best(metrics, evaluation, kept)
            if (yield metrics) and pause_file is not None:
                assert best is not None, "an epoch has been done"
                write_paused(pause_file, config, data, run, epoch + 1, best)
                return
    if checkpoint_dir is not None and best is not None:
        save_checkpoint(checkpoint_dir, best.weights, make_card(config, built, data, best.metrics))
        write_predictions(checkpoint_dir, best.evaluation)


@contextlib.contextmanager
def _started(
    config: TrainConfig,
    built: Network,
    data: ImageData,
    device: torch.device,
    cache: PrefixCache | None,
) -> Iterator[tuple[NetworkRun | HeadRun, Feed]]:
    """Make the run that a configuration asks for, with its pictures."""
    if trains_head_alone(config):
        prefix = frozen_part(built, config, device)
        if prefix is not None:
            with Feed(
                feature_config(config, len(data.train)), built.preprocessing, data, device
            ) as feed:
                features = Features(config, built, data, feed, prefix, cache)
                yield HeadRun(config, built, data, features), feed
            return
    with Feed(config, built.preprocessing, data, device) as feed:
        if config.head_init == "probe":
            start_from_probe(config, built, data, feed, cache)
        run = NetworkRun(config, built, device)
        if cache is not None and can_share(config, device):
            run.share(cache, built, data, feed)
        yield run, feed


def build_for(config: TrainConfig, classes: tuple[str, ...]) -> Network:
    """Build the network that a configuration names, for these classes."""
    return build(
        config.backbone,
        config.weights,
        classes,
        seed=config.seed,
        image_size=config.image_size,
        normalize=config.normalize,
        head_init=config.head_init,
        channels_last=config.channels_last,
    )


def check_small_size(config: TrainConfig, built: Network) -> None:
    """Refuse a size of the first epochs' views that the network cannot take.

    Raises:
        ValueError: It cannot.
    """
    size, full = config.small_size, built.preprocessing.image_size
    if size is None:
        return
    if size >= full:
        raise ValueError(
            f"small_size must be < {full}, the image_size that {config.backbone} is built for, "
            f"but got small_size={size!r}. Set it smaller, or leave it and small_epochs out."
        )
    network = (config.backbone, full, size)
    if network in _FIT_FOR_SMALL:
        return
    model = built.model.eval()
    images = next(model.parameters()).new_zeros(1, 3, size, size)
    try:
        with torch.no_grad():  # not inference mode: a network may keep what it made
            model(images)
    except (AssertionError, RuntimeError, ValueError) as err:  # how networks refuse a size
        raise ValueError(
            f"{config.backbone}, built for {full} pixels, cannot take views of "
            f"small_size={size!r} ({(str(err) or type(err).__name__).splitlines()[0]}). Leave "
            "small_size and small_epochs out, or take another backbone."
        ) from err
    _FIT_FOR_SMALL.add(network)


def check_batch(config: TrainConfig, data: ImageData) -> None:
    """Refuse a batch that is larger than the training split.

    Raises:
        ValueError: It is.
    """
    if config.batch_size > len(data.train):
        raise ValueError(
            f"batch_size must be <= the number of training pictures, {len(data.train)}, but got "
            f"batch_size={config.batch_size!r}. Set it smaller."
        )


def _mixed(seed: int, *rest: int) -> int:
    """Derive one seed from several numbers."""
    return int(np.random.SeedSequence((seed, _TAG_DROPOUT, *rest)).generate_state(1, np.uint64)[0])


def make_card(config: TrainConfig, built: Network, data: ImageData, metrics: EpochMetrics) -> Card:
    """Return what a checkpoint of this run's epoch says of itself."""
    return Card(
        backbone=config.backbone,
        classes=data.classes,
        preprocessing=built.preprocessing,
        config=config,
        metrics=metrics,
        weights=built.weights,
        data={"source": data.source, "fingerprint": data.fingerprint},
        versions=library_versions(),
    )
