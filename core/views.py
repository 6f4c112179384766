"""Seeded views: (seed, epoch, position) decides a picture's crop, flip and augmentation."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from core.config import Augment
from core.data import Split
from core.draws import (
    FloatArray,
    IntArray,
    crop_boxes,
    flips,
    policy_seeds,
    resized_size,
    view_draws,
)


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

    def __post_init__(self) -> None:
        """Check that the centre crop lies inside the resized picture.

        Raises:
            ValueError: It does not.
        """
        if self.resize_size < self.image_size:
            raise ValueError(
                "resize_size must be >= image_size, but got "
                f"resize_size={self.resize_size!r} and image_size={self.image_size!r}."
            )


def eval_views(split: Split, positions: IntArray, spec: ViewSpec) -> Tensor:
    """Make evaluation views: shorter side resized, centre cropped.

    Args:
        split: Pictures.
        positions: Which of the split's pictures, (B,).
        spec: Sizes and interpolation.

    Returns:
        Views, uint8, (B, 3, S, S).
    """
    views = _room(len(positions), spec)
    for row, position in enumerate(positions):
        views[row] = _eval_view(_picture(split, int(position)), spec)
    return views


def _room(n: int, spec: ViewSpec) -> Tensor:
    """Make room for n views, laid out as they come, which spares a transposing copy."""
    shape = (n, 3, spec.image_size, spec.image_size)
    is_plain = spec.augment in ("trivial", "rand")
    layout = torch.contiguous_format if is_plain else torch.channels_last
    return torch.empty(shape, dtype=torch.uint8, memory_format=layout)


def _eval_view(picture: Tensor, spec: ViewSpec) -> Tensor:
    sizes = np.array([picture.shape[1:]])
    size = resized_size(sizes, spec.resize_size)[0].tolist()
    resized = functional.resize(picture, size, _mode(spec), antialias=True)
    view: Tensor = functional.center_crop(resized, [spec.image_size, spec.image_size])
    return view


def _picture(split: Split, position: int, box: IntArray | None = None) -> Tensor:
    """Copy a picture, or a box of it, out of the map, (3, H, W)."""
    pixels = split.store.picture(int(split.indices[position]))
    if box is not None:
        top, left, height, width = box
        pixels = pixels[top : top + height, left : left + width]
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


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
    seeds = policy_seeds(draws)
    mirrored = flips(draws, spec.flip)
    size = [spec.image_size, spec.image_size]
    policy = _policy(spec)
    views = _room(len(positions), spec)
    for row, position in enumerate(positions):
        crop = _picture(split, int(position), boxes[row])
        view = functional.resize(crop, size, _mode(spec), antialias=True)
        view = view.flip(-1) if mirrored[row] else view
        views[row] = _seeded(policy, view, int(seeds[row])) if policy else view
    return views


def _policy(spec: ViewSpec) -> Callable[[Tensor], Tensor] | None:
    """Return what is done after crop and flip, if anything."""
    if spec.augment == "trivial":
        return v2.TrivialAugmentWide()  # type: ignore[no-any-return]  # untyped library
    if spec.augment == "rand":
        return v2.RandAugment(magnitude=spec.rand_magnitude)  # type: ignore[no-any-return]
    return None


def _seeded(transform: Callable[[Tensor], Tensor], view: Tensor, seed: int) -> Tensor:
    """Transform a view under a generator of its own seed."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerator's generator, dropout's, as well.
        torch.default_generator.manual_seed(seed)
        return transform(view.contiguous())  # channels last is slower here


Key = tuple[int, int]


class _Views(Dataset[Tensor]):
    """Makes a whole batch from keys (epoch, position); keeps the current epoch's draws."""

    def __init__(self, split: Split, spec: ViewSpec, seed: int) -> None:
        self.split, self.spec, self.seed = split, spec, seed
        self._epoch = -1
        self._draws: FloatArray = view_draws(0, seed, 0)

    def __getitems__(self, keys: Sequence[Key]) -> Tensor:
        epoch = keys[0][0]
        if epoch != self._epoch:
            self._epoch = epoch
            self._draws = view_draws(len(self.split), self.seed, epoch)
        positions = np.array([position for _, position in keys], dtype=np.int64)
        return _train_views(self.split, positions, self.spec, self._draws)

    def __getitem__(self, key: Key) -> Tensor:
        return self.__getitems__([key])


class _Batches:
    """Yields batches of keys; epoch and positions are set between iterations."""

    def __init__(self) -> None:
        self.epoch = 0
        self.positions: Sequence[IntArray] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        for positions in self.positions:
            yield [(self.epoch, int(position)) for position in positions]


class Loader:
    """Batches of training views, made in this process or in worker processes.

    The numbers do not depend on how many workers there are. Workers live as long as the loader.

    Args:
        split: Pictures.
        spec: What a view is.
        seed: The run's seed.
        workers: Loader processes; 0 makes views in this one.
    """

    def __init__(self, split: Split, spec: ViewSpec, seed: int, workers: int) -> None:
        self._batches = _Batches()
        self._views = _Views(split, spec, seed)
        self._loader: DataLoader[Tensor] | None = None
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
                    # Else the loader draws its seeds from the generator that dropout uses.
                    generator=torch.Generator(),
                )

    def epoch(self, epoch: int, batches: Sequence[IntArray]) -> Iterator[Tensor]:
        """Iterate over views of an epoch at these positions, uint8 (B, 3, S, S)."""
        self._batches.epoch, self._batches.positions = epoch, batches
        if self._loader is not None:
            with _quiet_about_workers():
                made = iter(self._loader)
            yield from made
            return
        for keys in self._batches:
            yield self._views.__getitems__(keys)


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
