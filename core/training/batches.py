"""What the trainer is fed: batches of inputs, ready on the device, from views of images."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.config import Preprocessing, TrainConfig
from core.data.draws import IntArray, batch_positions, epoch_order
from core.data.gpu_views import DeviceViews, fits_device
from core.data.splits import ImageData, Split
from core.data.views import Loader, eval_views

# Larger batches evaluate no faster on two cores, and 256 keep an H200 busy at 224 px (assumption).
_EVAL_BATCH = {"cpu": 16, "cuda": 256}


class Normalizer:
    """Turns uint8 views into a network's input on its device."""

    def __init__(self, shown: Preprocessing, device: torch.device) -> None:
        mean = torch.tensor(shown.mean, device=device) * 255
        std = torch.tensor(shown.std, device=device) * 255
        self.shift, self.scale = mean.view(1, 3, 1, 1), (1 / std).view(1, 3, 1, 1)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise views, (N, 3, H, W), uint8 or already float in [0, 255]."""
        images = images.to(self.device, non_blocking=True)
        floats = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return floats.sub_(self.shift).mul_(self.scale)


class Views:
    """Batches of images through their views, in the order that the seed gives.

    On a GPU the training images lie in its memory and views are made there, where they fit and
    the augmentation can be done in batches; otherwise views are made on the CPU.
    """

    def __init__(
        self, config: TrainConfig, shown: Preprocessing, data: ImageData, device: torch.device
    ) -> None:
        self.shown, self.device = shown, device
        self.normalize = Normalizer(shown, device)
        self.is_made_on_device = fits_device(data.train, config.augment, device)
        self._data, self._config = data, config
        self._labels = torch.from_numpy(data.train.labels)
        self._maker: DeviceViews | Loader | None = None

    def order(self, epoch: int) -> list[IntArray]:
        """Return the positions of each of an epoch's batches."""
        order = epoch_order(len(self._labels), self._config.seed, epoch)
        return batch_positions(order, self._config.batch_size)

    def train(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's inputs (N, 3, S, S) and labels (N,) from a batch on."""
        batches = self.order(epoch)[first:]
        inputs_of = self.train_inputs(epoch, batches)
        for positions, inputs in zip(batches, inputs_of, strict=True):
            labels = self._labels[torch.from_numpy(positions)]
            yield inputs, labels.to(self.device, non_blocking=True)

    def train_inputs(self, draw: int, batches: Sequence[IntArray]) -> Iterator[Tensor]:
        """Iterate over the inputs of a set of training views at these positions."""
        split, config = self._data.train, self._config
        split.store.mark_used()
        if config.augment == "none":
            yield from self.eval_inputs(split, batches)
            return
        if self._maker is None:
            make: type[DeviceViews | Loader] = DeviceViews if self.is_made_on_device else Loader
            self._maker = make(split, self.shown, config, self.device)
        yield from map(self.normalize, self._maker.epoch(draw, batches))

    def eval_inputs(self, split: Split, batches: Sequence[IntArray]) -> Iterator[Tensor]:
        """Iterate over the inputs of a split's evaluation views at these positions."""
        for positions in batches:
            yield self.normalize(eval_views(self._data, split, positions, self.shown))

    def val(self, *, is_mirrored: bool = False) -> Iterator[Tensor]:
        """Iterate over the validation split's inputs, or their mirror images, in its order."""
        for images in eval_batches(self._data, self._data.val, self.shown, self.device):
            inputs = self.normalize(images)
            yield inputs.flip(-1) if is_mirrored else inputs


def in_order(n: int, size: int) -> list[IntArray]:
    """Cut n positions, in their order, into batches of a size."""
    return [np.arange(at, min(at + size, n)) for at in range(0, n, size)]


def eval_batches(
    data: ImageData, split: Split, shown: Preprocessing, device: torch.device
) -> Iterator[Tensor]:
    """Iterate over a split's evaluation views, uint8, on the CPU."""
    for positions in in_order(len(split), _EVAL_BATCH.get(device.type, 64)):
        yield eval_views(data, split, positions, shown)
