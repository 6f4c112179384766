"""What is random about an epoch: its order, and each image's row of random numbers."""

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TAG_ORDER, _TAG_VIEW = 1, 2
_TRIES = 10
# Columns of an image's row of random numbers: tries of (area, ratio), then these.
_TOP, _LEFT, _FLIP, _POLICY = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2, 2 * _TRIES + 3
_COLUMNS = 2 * _TRIES + 4
_RATIOS = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop


def epoch_order(n: int, seed: int, epoch: int) -> IntArray:
    """Return the order in which an epoch visits n images: a function of its arguments alone."""
    order: IntArray = _generator(seed, _TAG_ORDER, epoch).permutation(n).astype(np.int64)
    return order


def _generator(seed: int, tag: int, epoch: int) -> Generator:
    return Generator(Philox(SeedSequence((seed, tag, epoch))))


def view_draws(n: int, seed: int, epoch: int) -> FloatArray:
    """Return one row of uniform random numbers per image, (n, columns).

    Row i depends on (seed, epoch, i) alone: the generator counts through the rows, so a larger n
    only adds rows.
    """
    return _generator(seed, _TAG_VIEW, epoch).random((n, _COLUMNS))


def crop_boxes(draws: FloatArray, sizes: IntArray, crop_scale: float) -> IntArray:
    """Draw the boxes of random resized crops, as torchvision's RandomResizedCrop does.

    Args:
        draws: Uniform numbers, (B, columns).
        sizes: Heights and widths of the images, (B, 2).
        crop_scale: Smallest share of the image's area.

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
    """Return which images are flipped, (B,)."""
    return np.asarray(draws[:, _FLIP] < flip)


def policy_seeds(draws: FloatArray) -> IntArray:
    """Return the seed of each image's augmentation policy, (B,)."""
    return (draws[:, _POLICY] * 2**53).astype(np.int64)


def batch_positions(order: IntArray, batch_size: int) -> list[IntArray]:
    """Cut an epoch's order into batches; a remainder of one, too few for batch norm, is left out.

    The order changes with every epoch, and so does the image left out.
    """
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 < batch_size else batches
