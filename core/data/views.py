"""Seeded views: (seed, epoch, position) decides an image's crop, flip and augmentation."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from core.config import Augment
from core.data.draws import (
    FloatArray,
    IntArray,
    crop_boxes,
    flips,
    policy_seeds,
    resized_size,
    view_draws,
)
from core.data.splits import Split


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """How views are made.

    Attributes:
        image_size: Side of a view, pixels.
        resize_size: Shorter side before the evaluation view's centre crop, pixels.
        interpolation: `bilinear` or `bicubic`, antialiased.
        augment: What the training view does.
        crop_scale: Smallest share of the image in a random crop.
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

    def __post_init__(self) -> None:
        """Check that the centre crop lies inside the resized image.

        Raises:
            ValueError: It does not.
        """
        if self.resize_size < self.image_size:
            raise ValueError(
                "resize_size must be >= image_size, but got "
                f"resize_size={self.resize_size!r} and image_size={self.image_size!r}."
            )


def eval_views(split: Split, positions: IntArray, spec: ViewSpec) -> Tensor:
    """Make evaluation views of a split's images, shorter side resized and centre cropped.

    Args:
        split: Images.
        positions: Which of the split's images, (B,).
        spec: Sizes and interpolation.

    Returns:
        Views, uint8, (B, 3, S, S).
    """
    views = _empty_views(len(positions), spec)
    for row, position in enumerate(positions):
        image = _image(split, int(position))
        size = resized_size(np.array([image.shape[1:]]), spec.resize_size)[0].tolist()
        resized = functional.resize(image, size, _mode(spec), antialias=True)
        views[row] = functional.center_crop(resized, [spec.image_size, spec.image_size])
    return views


def train_views(split: Split, positions: IntArray, spec: ViewSpec, draws: FloatArray) -> Tensor:
    """Make training views.

    Args:
        split: Images.
        positions: Which of the split's images, (B,).
        spec: What a view is.
        draws: The epoch's random numbers for the whole split, from `view_draws`.

    Returns:
        Views, uint8, (B, 3, S, S).
    """
    if spec.augment == "none":
        return eval_views(split, positions, spec)
    draws = draws[positions]
    boxes = crop_boxes(draws, split.store.sizes[split.indices[positions]], spec.crop_scale)
    seeds = policy_seeds(draws)
    mirrored = flips(draws, spec.flip)
    size = [spec.image_size, spec.image_size]
    policy = _policy(spec)
    views = _empty_views(len(positions), spec)
    for row, position in enumerate(positions):
        crop = _image(split, int(position), boxes[row])
        view = functional.resize(crop, size, _mode(spec), antialias=True)
        view = view.flip(-1) if mirrored[row] else view
        views[row] = _apply_seeded(policy, view, int(seeds[row])) if policy else view
    return views


def _empty_views(n: int, spec: ViewSpec) -> Tensor:
    """Return memory for n views, laid out as they come, which spares a transposing copy."""
    shape = (n, 3, spec.image_size, spec.image_size)
    is_plain = spec.augment in ("trivial", "rand")
    layout = torch.contiguous_format if is_plain else torch.channels_last
    return torch.empty(shape, dtype=torch.uint8, memory_format=layout)


def _image(split: Split, position: int, box: IntArray | None = None) -> Tensor:
    """Copy an image, or a box of it, out of the map, (3, H, W)."""
    pixels = split.store.image(int(split.indices[position]))
    if box is not None:
        top, left, height, width = box
        pixels = pixels[top : top + height, left : left + width]
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _mode(spec: ViewSpec) -> InterpolationMode:
    bicubic = spec.interpolation == "bicubic"
    return InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR


def _policy(spec: ViewSpec) -> Any:
    """Return what is done to a view after crop and flip, if anything."""
    if spec.augment == "trivial":
        return v2.TrivialAugmentWide()
    return v2.RandAugment(magnitude=spec.rand_magnitude) if spec.augment == "rand" else None


def _apply_seeded(transform: Any, view: Tensor, seed: int) -> Tensor:
    """Transform a view under a generator of its own seed."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerator's generator, dropout's, as well.
        torch.default_generator.manual_seed(seed)
        transformed: Tensor = transform(view.contiguous())  # channels last is slower here
        return transformed


_Key = tuple[int, IntArray]  # a batch: its epoch and its images' positions


class _TrainViews(Dataset[Tensor]):
    """Makes batches by key; keeps the current epoch's draws."""

    def __init__(self, split: Split, spec: ViewSpec, seed: int) -> None:
        self.split = split
        self.spec = spec
        self.seed = seed
        self._epoch = -1

    def __getitem__(self, key: _Key) -> Tensor:
        epoch, positions = key
        if epoch != self._epoch:
            self._epoch = epoch
            self._draws = view_draws(len(self.split), self.seed, epoch)
        return train_views(self.split, positions, self.spec, self._draws)


class Loader:
    """Training views by (epoch, positions), made here or by worker processes.

    The numbers do not depend on how many workers there are. Workers live as long as the loader.

    Args:
        split: Images.
        spec: How views are made.
        seed: Seed of the run.
        workers: Loader processes; 0 makes views in this one.
    """

    def __init__(self, split: Split, spec: ViewSpec, seed: int, workers: int) -> None:
        self._views = _TrainViews(split, spec, seed)
        self._workers = workers
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
                    pin_memory=torch.cuda.is_available(),
                    collate_fn=_unchanged,
                    worker_init_fn=_use_one_thread,
                    # Else the loader draws its seeds from the generator that dropout uses.
                    generator=torch.Generator(),
                )
            made = iter(self._loader)
        yield from made


def _unchanged(batch: Any) -> Any:
    return batch


def _use_one_thread(_: int) -> None:
    torch.set_num_threads(1)
