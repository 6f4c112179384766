"""The same random crops made on a GPU in batches, from images in its memory.

A random resized crop with an antialiased filter is separable: each output row is a weighted sum of
image rows, each output column of image columns. For a batch this is two batched matrix
products with weights built from the crop boxes, the flip folded into the column weights.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.config import Preprocessing, TrainConfig
from core.data.draws import IntArray, crop_boxes, flips, view_draws
from core.data.splits import Split
from core.device import in_parts

# Share of the device's memory that images may take; the rest is the network's. Assumption.
_MEMORY_SHARE = 0.25
# Images that go to the device at once: 64 MB at 256 px. Assumption.
_UPLOAD = 256
# Pixels of boxes, padded to the largest, that are worked on at once: about 1 GB. Assumption.
_MOST_PIXELS = 1 << 25


def fits_device(split: Split, augment: str, device: torch.device) -> bool:
    """Say whether a split's images fit the device and its augmentation can be done there.

    By all of its memory, not by what is free just now: a run that is repeated or continued beside
    another process must not get other views.
    """
    if augment != "standard" or device.type != "cuda":
        return False
    _, total = torch.cuda.mem_get_info(device)
    n_pixels = split.store.sizes[split.indices].prod(axis=1).sum()
    return int(3 * n_pixels) <= _MEMORY_SHARE * total


class DeviceViews:
    """Training views, augmented by `standard`, of images in the device's memory."""

    def __init__(
        self, split: Split, shown: Preprocessing, config: TrainConfig, device: torch.device
    ) -> None:
        self.shown, self.config, self.device = shown, config, device
        self.sizes: IntArray = split.store.sizes[split.indices]
        ends = self.sizes.prod(axis=1).cumsum()
        self.starts: IntArray = ends - self.sizes.prod(axis=1)
        # Image after image without padding, since one large image must not enlarge all others.
        self.pixels = torch.empty((int(ends[-1]), 3), dtype=torch.uint8, device=device)
        for at in range(0, len(split), _UPLOAD):
            which = split.indices[at : at + _UPLOAD].tolist()
            images = np.concatenate([split.store.image(i).reshape(-1, 3) for i in which])
            first = int(self.starts[at])
            self.pixels[first : first + len(images)] = torch.from_numpy(images)

    def epoch(self, epoch: int, batches: Sequence[IntArray]) -> Iterator[Tensor]:
        """Iterate over views of an epoch at these positions, float in [0, 255], (B, 3, S, S)."""
        order = np.concatenate([np.empty(0, np.int64), *batches])
        draws = view_draws(len(self.sizes), self.config.seed, epoch)[order]
        boxes = crop_boxes(draws, self.sizes[order], self.config.crop_scale)
        mirrored = flips(draws, self.config.flip)
        table = np.column_stack([boxes, mirrored, self.starts[order], self.sizes[order, 1]])
        rows = torch.from_numpy(table).to(self.device)  # GPU sync, once per epoch
        at = 0
        for positions in batches:
            here = slice(at, at + len(positions))
            at = here.stop
            yield self._batch(rows[here], *boxes[here, 2:].max(axis=0).tolist())

    def _batch(self, rows: Tensor, height: int, width: int) -> Tensor:
        """Make a batch's views in parts that memory has room for; boxes are at most so large."""
        parts = torch.split(rows, max(1, _MOST_PIXELS // (height * width)))
        # In float32 whatever the network computes in: bf16 would be 4 levels off.
        with torch.autocast(self.device.type, enabled=False):
            made = [in_parts(lambda part: self._views(part, height, width), p) for p in parts]
        return torch.cat(made)

    def _views(self, rows: Tensor, height: int, width: int) -> Tensor:
        """Cut boxes out of the images, resize them, and flip them where the row says so."""
        top, left, box_height, box_width, mirrored, start, stride = rows[..., None, None].unbind(1)
        down = torch.arange(height, device=self.device)[:, None]
        across = torch.arange(width, device=self.device)
        index = start + (top + down) * stride + (left + across)  # (B, H, W)
        # Beyond a smaller box lie other pixels, whose weights are 0.
        pixels = self.pixels[index.clamp_(max=len(self.pixels) - 1)]  # (B, H, W, 3)
        images = pixels.permute(0, 3, 1, 2).flatten(1, 2).to(torch.float32)  # (B, 3 H, W)
        columns = self._weights(box_width, width)  # (B, S, W)
        columns = torch.where(mirrored > 0, columns.flip(1), columns)
        # Rounded between the passes as torchvision's uint8 kernel does: else bicubic, which
        # overshoots at edges, is up to 12 levels away from it.
        resized = _to_levels(images @ columns.transpose(1, 2))  # (B, 3 H, S)
        resized = resized.view(len(rows), 3, height, -1)
        return _to_levels(self._weights(box_height, height)[:, None] @ resized)

    def _weights(self, length: Tensor, n: int) -> Tensor:
        """Build antialiased resampling weights, (B, S, n), each row summing to 1.

        Nothing outside the box, of `length` (B, 1, 1) of n pixels, is read.
        """
        size = self.shown.image_size
        scale = length.to(torch.float32) / size  # image pixels per view pixel
        centre = (torch.arange(size, device=self.device)[:, None] + 0.5) * scale  # (B, S, 1)
        pixel = torch.arange(n, device=self.device) + 0.5
        weights = _filter((pixel - centre) / scale.clamp(min=1.0), self.shown.interpolation)
        weights = weights * (pixel < length)
        return weights / weights.sum(dim=2, keepdim=True)


def _to_levels(values: Tensor) -> Tensor:
    """Round in place to whole levels, halves up as torchvision does: halved crops have many."""
    return values.add_(0.5).floor_().clamp_(0, 255)


def _filter(x: Tensor, interpolation: str) -> Tensor:
    """Evaluate the triangle or the cubic convolution kernel at distances in support units."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5  # Pillow's and torch's antialiased bicubic coefficient
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
