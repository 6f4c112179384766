"""Seeded views: (seed, epoch, position) decides a picture's crop, flip and augmentation."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from core.config import Augment
from core.data import Split

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TAG_ORDER, _TAG_VIEW = 1, 2
_TRIES = 10
# Columns of a picture's row of random numbers: tries of (area, ratio), then these.
_TOP, _LEFT, _FLIP, _POLICY = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2, 2 * _TRIES + 3
_COLUMNS = 2 * _TRIES + 4
_RATIOS = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """How views are made.

    Attributes:
        image_size: Side of a view, pixels.
        resize_size: Shorter side before the evaluation view's centre crop, pixels.
        interpolation: `bilinear` or `bicubic`, antialiased.
        augment: What the training view does.
        crop_scale: Smallest share of the picture in a random crop.
        flip: Probability of a left-right flip.
        rand_magnitude: RandAugment's magnitude.
    """

    image_size: int
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"]
    augment: Augment
    crop_scale: float
    flip: float
    rand_magnitude: int


def epoch_order(n: int, seed: int, epoch: int) -> IntArray:
    """Return the order in which an epoch visits n pictures: a function of its arguments alone."""
    order: IntArray = _generator(seed, _TAG_ORDER, epoch).permutation(n).astype(np.int64)
    return order


def _generator(seed: int, tag: int, epoch: int) -> Generator:
    return Generator(Philox(SeedSequence((seed, tag, epoch))))


def view_draws(n: int, seed: int, epoch: int) -> FloatArray:
    """Return one row of uniform random numbers per picture, (n, columns).

    Row i depends on (seed, epoch, i) alone: the generator counts through the rows, so a larger n
    only adds rows.
    """
    return _generator(seed, _TAG_VIEW, epoch).random((n, _COLUMNS))


def crop_boxes(draws: FloatArray, sizes: IntArray, crop_scale: float) -> IntArray:
    """Draw the boxes of random resized crops, as torchvision's RandomResizedCrop does.

    Args:
        draws: Uniform numbers, (B, columns).
        sizes: Heights and widths of the pictures, (B, 2).
        crop_scale: Smallest share of the picture's area.

    Returns:
        Top, left, height, width, (B, 4). Where ten tries do not fit, the largest centred box of
        an allowed shape.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)  # (B, 1)
    area = (crop_scale + (1 - crop_scale) * draws[:, :_TRIES]) * height * width  # (B, tries)
    low, high = np.log(_RATIOS)
    ratio = np.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    first = np.where(fits.any(1), fits.argmax(1), -1)  # (B,)
    rows = np.arange(len(draws))
    box_h, box_w = heights[rows, first], widths[rows, first]
    shape = np.clip(width / height, *_RATIOS)
    none = first < 0
    box_w[none] = np.rint(np.minimum(width, height * shape))[none, 0]
    box_h[none] = np.rint(np.minimum(height, width / shape))[none, 0]
    spare_h, spare_w = sizes[:, 0] - box_h, sizes[:, 1] - box_w
    top = np.where(none, spare_h // 2, np.floor(draws[:, _TOP] * (spare_h + 1)))
    left = np.where(none, spare_w // 2, np.floor(draws[:, _LEFT] * (spare_w + 1)))
    return np.stack([top, left, box_h, box_w], axis=1).astype(np.int64)


def flips(draws: FloatArray, flip: float) -> NDArray[np.bool_]:
    """Say which pictures are flipped, (B,)."""
    return np.asarray(draws[:, _FLIP] < flip)


def resized_size(sizes: IntArray, resize_size: int) -> IntArray:
    """Return heights and widths when the shorter side becomes `resize_size`, (B, 2)."""
    short = sizes.min(axis=1, keepdims=True)
    return np.asarray(np.maximum(sizes * resize_size // short, resize_size))


def eval_boxes(sizes: IntArray, spec: ViewSpec) -> FloatArray:
    """Return the region of each picture that its evaluation view shows.

    Returns:
        Top, left, height, width in the picture's own pixels, fractional, (B, 4).
    """
    resized = resized_size(sizes, spec.resize_size)
    scale = sizes / resized
    start = np.rint((resized - spec.image_size) / 2)
    return np.concatenate([start * scale, spec.image_size * scale], axis=1)


def eval_views(split: Split, positions: IntArray, spec: ViewSpec) -> Tensor:
    """Make evaluation views: shorter side resized, centre cropped.

    Args:
        split: Pictures.
        positions: Which of the split's pictures, (B,).
        spec: Sizes and interpolation.

    Returns:
        Views, uint8, (B, 3, S, S).
    """
    views = torch.empty(len(positions), 3, spec.image_size, spec.image_size, dtype=torch.uint8)
    for row, position in enumerate(positions):
        views[row] = _eval_view(_picture(split, int(position)), spec)
    return views


def _eval_view(picture: Tensor, spec: ViewSpec) -> Tensor:
    sizes = np.array([picture.shape[1:]])
    size = resized_size(sizes, spec.resize_size)[0].tolist()
    resized = functional.resize(picture, size, _mode(spec), antialias=True)
    view: Tensor = functional.center_crop(resized, [spec.image_size, spec.image_size])
    return view


def _picture(split: Split, position: int) -> Tensor:
    """Copy a picture out of the map, (3, H, W)."""
    pixels = np.array(split.store.picture(int(split.indices[position])))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _mode(spec: ViewSpec) -> InterpolationMode:
    bicubic = spec.interpolation == "bicubic"
    return InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR


def train_views(
    split: Split, positions: IntArray, spec: ViewSpec, seed: int, epoch: int
) -> Tensor:
    """Make training views.

    Args:
        split: Pictures.
        positions: Which of the split's pictures, (B,).
        spec: What a view is.
        seed: The run's seed.
        epoch: The epoch.

    Returns:
        Views, uint8, (B, 3, S, S).
    """
    return _train_views(split, positions, spec, view_draws(len(split), seed, epoch))


def _train_views(split: Split, positions: IntArray, spec: ViewSpec, draws: FloatArray) -> Tensor:
    if spec.augment == "none":
        return eval_views(split, positions, spec)
    draws = draws[positions]
    boxes = crop_boxes(draws, split.store.sizes[split.indices[positions]], spec.crop_scale)
    mirrored = flips(draws, spec.flip)
    size = [spec.image_size, spec.image_size]
    views = torch.empty(len(positions), 3, *size, dtype=torch.uint8)
    for row, position in enumerate(positions):
        picture = _picture(split, int(position))
        view = functional.resized_crop(
            picture, *boxes[row].tolist(), size=size, interpolation=_mode(spec), antialias=True
        )
        view = view.flip(-1) if mirrored[row] else view
        views[row] = _policy(view, spec, float(draws[row, _POLICY]))
    return views


def _policy(view: Tensor, spec: ViewSpec, draw: float) -> Tensor:
    """Apply TrivialAugment or RandAugment under a generator seeded by the picture's own draw."""
    if spec.augment not in ("trivial", "rand"):
        return view
    transform = (
        v2.TrivialAugmentWide()
        if spec.augment == "trivial"
        else v2.RandAugment(magnitude=spec.rand_magnitude)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draw * 2**53))
        changed: Tensor = transform(view)
    return changed


Key = tuple[int, int]
Batch = tuple[Tensor, Tensor, IntArray]


class _Views(Dataset[Batch]):
    """Makes a whole batch from keys (epoch, position); keeps the current epoch's draws."""

    def __init__(self, split: Split, spec: ViewSpec, seed: int) -> None:
        self.split, self.spec, self.seed = split, spec, seed
        self._epoch = -1
        self._draws: FloatArray = np.empty((0, _COLUMNS))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        epoch = keys[0][0]
        if epoch != self._epoch:
            self._epoch = epoch
            self._draws = view_draws(len(self.split), self.seed, epoch)
        positions = np.array([position for _, position in keys], dtype=np.int64)
        views = _train_views(self.split, positions, self.spec, self._draws)
        return views, torch.from_numpy(self.split.labels[positions]), positions

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])


class _Batches:
    """Yields an epoch's batches of keys; the epoch is set between iterations."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[list[Key]]:
        order = epoch_order(self.n, self.seed, self.epoch)
        for positions in batch_positions(order, self.batch_size):
            yield [(self.epoch, int(position)) for position in positions]


def batch_positions(order: IntArray, batch_size: int) -> list[IntArray]:
    """Cut an epoch's order into batches; a last batch of one is left out.

    Batch norm cannot train on one picture; the order changes with every epoch, and so does the
    picture left out.
    """
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


class Loader:
    """Batches of training views, made in this process or in worker processes.

    The numbers do not depend on how many workers there are. Workers live until `close`.

    Args:
        split: Pictures.
        spec: What a view is.
        seed: The run's seed.
        batch_size: Pictures per batch.
        workers: Loader processes; 0 makes views in this one.
    """

    def __init__(
        self, split: Split, spec: ViewSpec, seed: int, batch_size: int, workers: int
    ) -> None:
        self._batches = _Batches(len(split), batch_size, seed)
        self._views = _Views(split, spec, seed)
        self._loader: DataLoader[Batch] | None = None
        if workers:
            with _quiet_about_workers():
                self._loader = DataLoader(
                    self._views,
                    batch_sampler=self._batches,
                    num_workers=workers,
                    persistent_workers=True,
                    pin_memory=torch.cuda.is_available(),
                    collate_fn=_as_it_is,
                    worker_init_fn=_one_thread,
                )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Iterate over an epoch: views uint8 (B, 3, S, S), labels (B,), positions (B,)."""
        self._batches.epoch = epoch
        if self._loader is not None:
            with _quiet_about_workers():
                batches = iter(self._loader)
            yield from batches
            return
        for keys in self._batches:
            yield self._views.__getitems__(keys)

    def close(self) -> None:
        """End the workers."""
        self._loader = None


@contextlib.contextmanager
def _quiet_about_workers() -> Iterator[None]:
    """Silence the note that workers outnumber cores: slower, not wrong, and asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
