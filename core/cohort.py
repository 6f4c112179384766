"""Cohorts: many head-only runs in one pass over the features that they share.

Runs of one network on one sequence of views (`stream_key`) look at the same features, so that
these are read once an epoch for all of them. Each run's figures are those that `fit` gives it
alone.
"""

import dataclasses
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import torch

from core.checkpoint import save_checkpoint, write_predictions
from core.config import TrainConfig
from core.data.splits import ImageData
from core.device import choose_device, deterministic, peak_memory_bytes
from core.epoch import Clock, epoch_metrics
from core.evaluate import Evaluation
from core.features import Features, feature_config, frozen_part
from core.feed import Feed
from core.fit import build_for, check_batch, check_small_size, make_card
from core.head_runs import HeadRuns, check_finite, n_trained, trains_head_alone, with_head
from core.metrics import EpochMetrics, TrainingDiverged
from core.models.builder import Network
from core.prefix_cache import PrefixCache

# What may differ between runs that look at the same features.
_OWN = (
    "head_init",
    "standardize",
    "epochs",
    "batch_size",
    "micro_batch_size",
    "optimizer",
    "base_lr",
    "head_lr_mult",
    "weight_decay",
    "decay_all",
    "momentum",
    "nesterov",
    "schedule",
    "warmup_epochs",
    "step_epochs",
    "step_gamma",
    "loss_reduction",
    "label_smoothing",
    "clip_norm",
    "batch_norm",
    "compile",
    "monitor",
    "workers",
)


def stream_key(config: TrainConfig) -> Hashable | None:
    """Return what runs must agree in to form a cohort; None for one that trains more."""
    if not trains_head_alone(config):
        return None
    settings = dataclasses.asdict(config)
    return tuple((name, value) for name, value in settings.items() if name not in _OWN)


@dataclasses.dataclass(slots=True)
class HeadResult:
    """What became of one run.

    Attributes:
        config: The run.
        epochs: Its figures so far; times are its share of what the cohort took.
        error: Why it ended early; None otherwise.
        best: Its best epoch's figures, evaluation and head; None before the first epoch.
    """

    config: TrainConfig
    epochs: list[EpochMetrics]
    error: TrainingDiverged | None = None
    best: tuple[EpochMetrics, Evaluation, torch.Tensor, torch.Tensor] | None = None


class Cohort:
    """Head-only runs that agree in `stream_key`.

    Args:
        configs: The runs.
        data: Pictures; `train` and `val` are read, `test` never.
        cache: Work shared with other runs of this process; the figures are the same without.

    Attributes:
        results: One a run, in the order of `configs`.

    Raises:
        ValueError: The runs do not agree, or the batch size cannot be used; `epochs` raises it
            where the backbone or its weights cannot be, or its head is not one linear layer.
    """

    def __init__(
        self, configs: Sequence[TrainConfig], data: ImageData, cache: PrefixCache | None = None
    ) -> None:
        if stream_key(configs[0]) is None or len({stream_key(c) for c in configs}) > 1:
            raise ValueError("configs must train the head alone, and look at the same features.")
        for config in configs:
            check_batch(config, data)
        self.results = [HeadResult(config, []) for config in configs]
        self._configs = list(configs)
        self._data = data
        self._cache = cache
        self._device = choose_device(configs[0].device)
        self._built: dict[str, Network] = {}
        self._gone: set[int] = set()

    def epochs(self) -> Iterator[None]:
        """Train the cohort an epoch at a time; leave the loop to stop all runs."""
        for config in self._configs:
            if config.head_init not in self._built:
                built = self._built[config.head_init] = build_for(config, self._data.classes)
                check_small_size(config, built)
        first = self._configs[0]
        built = self._built[first.head_init]
        prefix = frozen_part(built, first, self._device)
        if prefix is None:
            raise ValueError(
                "a cohort needs a backbone whose head is one linear layer, but got "
                f"backbone={first.backbone!r}."
            )
        batches = feature_config(first, len(self._data.train))
        with Feed(batches, built.preprocessing, self._data, self._device) as feed:
            features = Features(first, built, self._data, feed, prefix, self._cache)
            networks = [self._built[config.head_init] for config in self._configs]
            runs = HeadRuns(self._configs, networks, self._data, features)
            for epoch in range(max(config.epochs for config in self._configs)):
                with deterministic(self._device):
                    self._one_epoch(epoch, runs, features)
                yield
                self._gone |= {k for k in runs.members if self._configs[k].epochs == epoch + 1}
                runs.leave(self._gone)
                if not runs.members:
                    return

    def leave(self, k: int) -> None:
        """Take a run out after the epoch that was just trained."""
        self._gone.add(k)

    def _one_epoch(self, epoch: int, runs: HeadRuns, features: Features) -> None:
        begin = time.perf_counter()
        losses = runs.train_epoch(epoch)
        between = time.perf_counter()
        evaluations = runs.evaluate()
        heads, factors = runs.heads(), runs.lr_factors()
        members = runs.members
        data_s = features.take_data()
        clock = Clock(
            data_s, between - begin - data_s, time.perf_counter() - between, features.take_shared()
        ).share(len(members))
        memory = peak_memory_bytes(self._device)
        for at, k in enumerate(members):
            result, config = self.results[k], self._configs[k]
            try:
                check_finite(losses[at], epoch)
                metrics = epoch_metrics(
                    config,
                    epoch,
                    losses[at],
                    evaluations[at],
                    clock=clock,
                    lr_factor=factors[at],
                    n_images=n_trained(config, len(self._data.train)),
                    peak_memory_bytes=memory,
                    micro_batch_size=config.batch_size,
                    best_score=result.best[0].score if result.best else None,
                )
            except TrainingDiverged as err:
                result.error = err
                self._gone.add(k)
                continue
            result.epochs.append(metrics)
            if metrics.is_best:
                result.best = (metrics, evaluations[at], *heads[at])

    def save(self, k: int, checkpoint_dir: Path) -> None:
        """Write a run's best epoch as `fit` writes it."""
        result = self.results[k]
        assert result.best is not None, "the run had an epoch"
        metrics, evaluation, weight, bias = result.best
        built = self._built[result.config.head_init]
        state = with_head(built, weight, bias)
        save_checkpoint(
            checkpoint_dir, state, make_card(result.config, built, self._data, metrics)
        )
        write_predictions(checkpoint_dir, evaluation)
