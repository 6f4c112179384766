from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import DataConfig, Preprocessing, TrainConfig
from core.data.draws import IntArray, batch_positions, epoch_order, view_draws
from core.data.gpu_views import DeviceViews
from core.data.splits import ImageData, Split, load_data
from core.data.views import train_views
from support import make_folder, some_photos

# Largest difference of a pixel from the CPU's view, of 255, and the mean over a batch. Measured
# over 60 epochs of the noise below: worst batch 2 and 0.025 (24 px, bilinear); photos at 224 px:
# 2 and 0.004.
LEVELS, MEAN = 2, 0.03


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    root = make_folder(tmp_path_factory.mktemp("views") / "photos", {"a": 20, "b": 21}, side=50)
    wide = np.random.default_rng(1).integers(0, 256, (60, 600, 3), dtype=np.uint8)
    Image.fromarray(wide).save(root / "a" / "wide.png")
    return load_data(DataConfig(source=str(root), cache_dir=str(root.parent / "cache")), 60)


def _check_against_the_cpu(
    split: Split, shown: Preprocessing, size: int, device: torch.device
) -> None:
    config = TrainConfig(seed=5)
    draws, batches = view_draws(len(split), 5, 2), _batches(split, 5, 2, size)
    views = DeviceViews(split, shown, config, device)
    for positions, images in zip(batches, views.epoch(2, batches), strict=True):
        ours = train_views(split, positions, shown, config, draws).float()
        difference = (images.cpu() - ours).abs()
        assert difference.max() <= LEVELS
        assert difference.mean() <= MEAN


def _batches(split: Split, seed: int, epoch: int, size: int) -> list[IntArray]:
    return batch_positions(epoch_order(len(split), seed, epoch), size)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 64])
def test_device_views_equal_the_cpus_within_rounding(
    noise: ImageData, shown: Preprocessing, interpolation: str, size: int, device: torch.device
) -> None:
    # torchvision's CPU kernel keeps its weights in 16-bit integers; a last digit in the first of
    # the two passes can become two levels. The images here are noise, the worst case.
    sizes = {"image_size": size, "resize_size": round(size * 1.15)}
    shown = replace(shown, interpolation=interpolation, **sizes)
    # Made in float32 under mixed precision, too.
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _check_against_the_cpu(noise.train, shown, 8, device)


def test_device_views_of_real_photos_equal_the_cpus_within_rounding(
    tmp_path: Path, shown: Preprocessing, device: torch.device
) -> None:
    config = DataConfig(source=str(some_photos()), cache_dir=str(tmp_path), limit=16)
    shown = replace(shown, image_size=96, resize_size=110)
    _check_against_the_cpu(load_data(config, 128).train, shown, 16, device)


def test_device_views_do_not_depend_on_the_batch(
    noise: ImageData, shown: Preprocessing, device: torch.device
) -> None:
    views = DeviceViews(noise.train, shown, TrainConfig(seed=3), device)
    small = torch.cat(list(views.epoch(1, _batches(noise.train, 3, 1, 4))))
    large = torch.cat(list(views.epoch(1, _batches(noise.train, 3, 1, 12))))
    n = min(len(small), len(large))
    # A matrix product may sum in another order for another batch: one rounding apart at most.
    assert (small[:n] - large[:n]).abs().max() <= 1
    assert list(views.epoch(1, [])) == []  # of an epoch that was cut off after its last batch


def test_views_for_which_memory_is_too_small_are_made_in_parts(
    noise: ImageData, shown: Preprocessing, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = DeviceViews._views

    def small_memory(views: DeviceViews, rows: torch.Tensor, *box: int) -> torch.Tensor:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(views, rows, *box)

    monkeypatch.setattr(DeviceViews, "_views", small_memory)
    _check_against_the_cpu(noise.train, shown, 8, device)
