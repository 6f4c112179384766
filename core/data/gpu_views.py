"""The same views made on a GPU in batches, from images in its memory.

A random resized crop with an antialiased filter is separable: each output row is a weighted sum of
image rows, each output column of image columns. For a batch this is two batched matrix
products with weights built from the crop boxes, the flip folded into the column weights.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.config import Preprocessing, TrainConfig
from core.data.draws import FloatArray, IntArray, crop_boxes, eval_boxes, flips, view_draws
from core.data.splits import Split

# Share of the device's free memory that images may take; the rest is the network's. Assumption.
_MEMORY_SHARE = 0.3


def fits_device(split: Split, augment: str, device: torch.device) -> bool:
    """Say whether a split's images fit the device and its augmentation can be done there."""
    if augment not in ("none", "standard") or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    height, width = split.store.sizes[split.indices].max(axis=0)  # images are padded to these
    return int(len(split) * height * width * 3) <= _MEMORY_SHARE * free


class DeviceViews:
    """Training views, augmented by `none` or `standard`, of images in the device's memory."""

    def __init__(
        self, split: Split, shown: Preprocessing, config: TrainConfig, device: torch.device
    ) -> None:
        self.shown, self.config, self.device = shown, config, device
        self.sizes: IntArray = split.store.sizes[split.indices]
        height, width = (int(side) for side in self.sizes.max(axis=0))
        shape = (len(split), 3, height, width)
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        for row, index in enumerate(split.indices.tolist()):
            image = torch.from_numpy(np.array(split.store.image(index)))
            h, w = self.sizes[row]
            self.pixels[row, :, :h, :w] = image.permute(2, 0, 1).to(device)

    def epoch(self, epoch: int, batches: Sequence[IntArray]) -> Iterator[Tensor]:
        """Iterate over views of an epoch at these positions, float in [0, 255], (B, 3, S, S)."""
        boxes, mirrored = self._boxes(epoch)
        # One copy an epoch; whole numbers of pixels and the fractions of a resize fit 32 bits.
        table = np.concatenate([boxes, mirrored[:, None]], axis=1).astype(np.float32)
        rows = torch.from_numpy(table).to(self.device)
        for positions in batches:
            which = torch.from_numpy(positions).to(self.device)
            part = rows[which]
            yield self._views(which, part[:, :4], part[:, 4] > 0)

    def _boxes(self, epoch: int) -> tuple[FloatArray, FloatArray]:
        n, config = len(self.sizes), self.config
        if config.augment == "none":
            boxes = eval_boxes(self.sizes, self.shown.image_size, self.shown.resize_size)
            return boxes, np.zeros(n)
        draws = view_draws(n, config.seed, epoch)
        crops = crop_boxes(draws, self.sizes, config.crop_scale)
        return crops.astype(np.float64), flips(draws, config.flip).astype(np.float64)

    def _views(self, which: Tensor, boxes: Tensor, mirrored: Tensor) -> Tensor:
        """Cut boxes out of rows of the split, resize them, and flip them where `mirrored`."""
        height, width = self.pixels.shape[2:]
        is_crop = self.config.augment != "none"
        rows = self._weights(boxes[:, 0], boxes[:, 2], height, is_crop)  # (B, S, H)
        columns = self._weights(boxes[:, 1], boxes[:, 3], width, is_crop)  # (B, S, W)
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
        images = self.pixels[which].to(rows.dtype)  # (B, 3, H, W)
        # Rounded between the passes as torchvision's uint8 kernel does: else bicubic, which
        # overshoots at edges, is up to 12 levels away from it.
        across = images.flatten(1, 2) @ columns.transpose(1, 2)  # (B, 3 H, S)
        across = _to_levels(across).view(len(which), 3, height, -1)
        return _to_levels(rows[:, None] @ across)

    def _weights(self, start: Tensor, length: Tensor, n: int, is_crop: bool) -> Tensor:
        """Build antialiased resampling weights, (B, S, n), each row summing to 1.

        A crop reads nothing outside its box; the evaluation view resizes the whole image first,
        so its filter may reach beyond.
        """
        size = self.shown.image_size
        scale = (length / size)[:, None, None]  # (B, 1, 1), image pixels per view pixel
        support = scale.clamp(min=1.0)
        out = torch.arange(size, device=self.device, dtype=start.dtype)[None, :, None] + 0.5
        centre = start[:, None, None] + out * scale  # (B, S, 1)
        pixel = torch.arange(n, device=self.device, dtype=start.dtype)[None, None] + 0.5
        weights = _filter((pixel - centre) / support, self.shown.interpolation)
        if is_crop:
            inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
            weights = weights * inside
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
