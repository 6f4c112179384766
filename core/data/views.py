"""Seeded views: (seed, epoch, position) decides an image's crop, flip and augmentation."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from core.config import Preprocessing, TrainConfig
from core.data.draws import FloatArray, IntArray, crop_boxes, flips, policy_seeds, view_draws
from core.data.splits import ImageData, Split
from core.device import usable_cores

# RandAugment makes 692 views per second and core (measured), so that these feed 11,000.
_MOST_WORKERS = 16


def eval_views(data: ImageData, split: Split, positions: IntArray, shown: Preprocessing) -> Tensor:
    """Return evaluation views of a split's images, (B, 3, S, S), uint8, channels last."""
    store = data.views.store(shown)
    return torch.from_numpy(store.views(split.indices[positions])).permute(0, 3, 1, 2)


def train_views(
    split: Split,
    positions: IntArray,
    shown: Preprocessing,
    config: TrainConfig,
    draws: FloatArray,
) -> Tensor:
    """Make random crops of a split's images, (B, 3, S, S), uint8.

    `draws` are the epoch's random numbers for the whole split, from `view_draws`.
    """
    draws = draws[positions]
    boxes = crop_boxes(draws, split.store.sizes[split.indices[positions]], config.crop_scale)
    seeds = policy_seeds(draws)
    mirrored = flips(draws, config.flip)
    policy = _policy(config)
    # Laid out as views come, which spares a transposing copy.
    layout = torch.contiguous_format if policy else torch.channels_last
    size = [shown.image_size, shown.image_size]
    mode = InterpolationMode(shown.interpolation)
    views = torch.empty((len(positions), 3, *size), dtype=torch.uint8, memory_format=layout)
    for row, position in enumerate(positions):
        top, left, height, width = boxes[row]
        pixels = split.store.image(int(split.indices[position]))
        copied = np.array(pixels[top : top + height, left : left + width])
        image = torch.from_numpy(copied).permute(2, 0, 1)
        view = functional.resize(image, size, mode, antialias=True)
        view = view.flip(-1) if mirrored[row] else view
        views[row] = _apply_seeded(policy, view, int(seeds[row])) if policy else view
    return views


def _policy(config: TrainConfig) -> Any:
    if config.augment == "trivial":
        return v2.TrivialAugmentWide()
    return v2.RandAugment(magnitude=config.rand_magnitude) if config.augment == "rand" else None


def _apply_seeded(transform: Any, view: Tensor, seed: int) -> Tensor:
    """Transform a view under a generator of its own seed."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerator's generator, dropout's, as well.
        torch.default_generator.manual_seed(seed)
        transformed: Tensor = transform(view.contiguous())  # channels last is slower here
        return transformed


_Key = tuple[int, IntArray]  # a batch: its epoch and its images' positions


class _TrainViews(Dataset[Tensor]):
    def __init__(self, split: Split, shown: Preprocessing, config: TrainConfig) -> None:
        self.split, self.shown, self.config = split, shown, config
        self._epoch = -1

    def __getitem__(self, key: _Key) -> Tensor:
        epoch, positions = key
        if epoch != self._epoch:
            self._epoch = epoch
            self._draws = view_draws(len(self.split), self.config.seed, epoch)
        return train_views(self.split, positions, self.shown, self.config, self._draws)


class Loader:
    """Training views by (epoch, positions), made here or by worker processes.

    The numbers do not depend on how many workers there are. Workers live as long as the loader;
    with none, this process makes the views. Pinned views are copied to a GPU without waiting.
    """

    def __init__(
        self, split: Split, shown: Preprocessing, config: TrainConfig, device: torch.device
    ) -> None:
        self._views = _TrainViews(split, shown, config)
        # A CPU's own threads are busy training.
        most = 0 if device.type == "cpu" else min(_MOST_WORKERS, max(1, usable_cores() - 1))
        self._workers = most if config.workers is None else config.workers
        self._is_pinned = device.type == "cuda"
        self._keys: list[_Key] = []  # the epoch's; the loader reads them at each iteration
        self._loader: DataLoader[Tensor] | None = None

    def epoch(self, epoch: int, batches: Sequence[IntArray]) -> Iterator[Tensor]:
        """Iterate over views of an epoch at these positions, uint8 (B, 3, S, S)."""
        self._keys[:] = [(epoch, positions) for positions in batches]
        if not self._workers:
            yield from map(self._views.__getitem__, self._keys)
            return
        with warnings.catch_warnings():
            # Workers may outnumber the cores: slower, not wrong, and asked for.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            if self._loader is None:
                self._loader = DataLoader(
                    self._views,
                    batch_size=None,  # a key is a whole batch already
                    sampler=self._keys,
                    num_workers=self._workers,
                    persistent_workers=True,
                    pin_memory=self._is_pinned,
                    # Else the loader draws its seeds from the generator that dropout uses.
                    generator=torch.Generator(),
                )
            made = iter(self._loader)
        yield from made
