"""Ready inputs for one run: views of pictures, on the device, normalised."""

from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from core.config import Preprocessing, TrainConfig
from core.data.gpu_views import DeviceViews, fits_device
from core.data.splits import ImageData, Split
from core.data.views import Loader, ViewSpec, eval_views
from core.device import usable_cores
from core.evaluate import IntArray

# Larger batches evaluate no faster on two cores, and 256 keep an H200 busy at 224 px (assumption).
_EVAL_BATCH = {"cpu": 64, "cuda": 256}
# Evaluation views are the same in every epoch; up to this many bytes of them are kept.
_KEPT_EVAL_BYTES = 2 << 30
_MOST_WORKERS = 8


def view_spec(config: TrainConfig, shown: Preprocessing) -> ViewSpec:
    """Return how a run's views are made, but for smaller ones in its first epochs."""
    return ViewSpec(
        image_size=shown.image_size,
        resize_size=shown.resize_size,
        interpolation=shown.interpolation,
        augment=config.augment,
        crop_scale=config.crop_scale,
        flip=config.flip,
        rand_magnitude=config.rand_magnitude,
    )


def small_spec(config: TrainConfig, spec: ViewSpec) -> ViewSpec:
    """Return how the training views of a run's first `small_epochs` epochs are made."""
    if config.small_size is None:
        return spec
    resize_size = round(config.small_size * spec.resize_size / spec.image_size)
    return replace(spec, image_size=config.small_size, resize_size=resize_size)


class Normalizer:
    """Turns uint8 views into a network's input on its device."""

    def __init__(self, shown: Preprocessing, device: torch.device, channels_last: bool) -> None:
        mean = torch.tensor(shown.mean, device=device) * 255
        std = torch.tensor(shown.std, device=device) * 255
        self.shift = mean.view(1, 3, 1, 1)
        self.scale = (1 / std).view(1, 3, 1, 1)
        self.device = device
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise views, (N, 3, H, W), uint8 or already float in [0, 255]."""
        images = images.to(self.device, non_blocking=True)
        floats = images.to(torch.float32, memory_format=self.layout, copy=True)
        return floats.sub_(self.shift).mul_(self.scale)


class Feed:
    """Batches of one run, in the order and with the views that its seed gives.

    On an accelerator the pictures lie in its memory and views are made there, where they fit and
    the augmentation can be done in batches; otherwise views are made on the CPU.

    Attributes:
        spec: How views are made; training views of the first epochs may be smaller (`train_spec`).
    """

    def __init__(
        self, config: TrainConfig, shown: Preprocessing, data: ImageData, device: torch.device
    ) -> None:
        self.spec = view_spec(config, shown)
        self.device = device
        self.normalize = Normalizer(shown, device, config.channels_last)
        self.val_split = data.val
        self.batch_size = config.batch_size
        self.seed = config.seed
        self.n_train = len(data.train)
        self._small_spec = small_spec(config, self.spec)
        self._small_epochs = config.small_epochs
        self._device_views: DeviceViews | None = None
        self._data = data
        self._workers = default_workers(config.workers, device)
        self._loader: Loader | None = None
        self._loader_spec: ViewSpec | None = None
        if device.type == "cuda" and fits_device(data.train, self.spec, device):
            self._device_views = DeviceViews(data.train, self.spec, device)
        self._kept_val: list[Tensor] | None = None

    @property
    def makes_views_there(self) -> bool:
        """Whether training views are made on the accelerator: alike, but not to the bit."""
        return self._device_views is not None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; a last batch of one picture is left out."""
        full, rest = divmod(self.n_train, self.batch_size)
        return full + (rest > 1 or (rest == 1 and full == 0))

    @property
    def val_labels(self) -> IntArray:
        """Labels of the validation split, in the order of `val`."""
        return self.val_split.labels

    def train_spec(self, epoch: int) -> ViewSpec:
        """Return how an epoch's training views are made."""
        return self._small_spec if epoch < self._small_epochs else self.spec

    def views(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's views (N, 3, S, S), not normalised, and labels (N,)."""
        spec = self.train_spec(epoch)
        self._data.train.store.mark_used()
        if self._device_views is not None:
            views = self._device_views.of(spec)
            yield from views.epoch(self.seed, epoch, self.batch_size)
            return
        for images, labels, _ in self._loader_of(spec).epoch(epoch):
            yield images, labels.to(self.device, non_blocking=True)

    def _loader_of(self, spec: ViewSpec) -> Loader:
        """Return the loader of such views; there is one at a time."""
        if self._loader is None or self._loader_spec != spec:
            self._close()
            self._loader = Loader(
                self._data.train, spec, self.seed, self.batch_size, self._workers
            )
            self._loader_spec = spec
        return self._loader

    def _close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def val(self) -> Iterator[Tensor]:
        """Iterate over the validation split's inputs in its order."""
        if self._kept_val is not None:
            yield from map(self.normalize, self._kept_val)
            return
        kept = []
        size = len(self.val_split) * 3 * self.spec.image_size**2
        for images in eval_batches(self.val_split, self.spec, self.device):
            if size <= _KEPT_EVAL_BYTES:
                images = images.to(self.device)
                kept.append(images)
            yield self.normalize(images)
        self._kept_val = kept or None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def eval_batches(split: Split, spec: ViewSpec, device: torch.device) -> Iterator[Tensor]:
    """Iterate over a split's evaluation views, uint8, on the CPU."""
    import numpy as np

    size = _EVAL_BATCH.get(device.type, 64)
    for at in range(0, len(split), size):
        yield eval_views(split, np.arange(at, min(at + size, len(split))), spec)


def default_workers(workers: int | None, device: torch.device) -> int:
    """Return how many loader processes to use: none beside a CPU's own training threads."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(_MOST_WORKERS, max(1, usable_cores() - 1))
