from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.config import DataConfig, Preprocessing, TrainConfig
from core.data.draws import IntArray, batch_positions, epoch_order, view_draws
from core.data.gpu_views import DeviceViews
from core.data.splits import ImageData, Split, load_data
from core.data.views import train_views
from support import make_folder, shared_data

# Largest difference of a pixel from the CPU's view, of 255, and the mean over a batch. Measured
# over 60 epochs of the noise below: worst batch 2 and 0.025 (24 px, bilinear); photos at 224 px:
# 2 and 0.004.
LEVELS, MEAN = 2, 0.03


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    root = make_folder(tmp_path_factory.mktemp("views") / "photos", {"a": 20, "b": 21}, side=50)
    return load_data(DataConfig(source=str(root), cache_dir=str(root.parent / "cache")), 60)


def _check_against_the_cpu(split: Split, shown: Preprocessing, size: int) -> None:
    config = TrainConfig(seed=5)
    draws, batches = view_draws(len(split), 5, 2), _batches(split, 5, 2, size)
    views = DeviceViews(split, shown, config, torch.device("cpu"))
    for positions, images in zip(batches, views.epoch(2, batches), strict=True):
        ours = train_views(split, positions, shown, config, draws).float()
        difference = (images - ours).abs()
        assert difference.max() <= LEVELS
        assert difference.mean() <= MEAN


def _batches(split: Split, seed: int, epoch: int, size: int) -> list[IntArray]:
    return batch_positions(epoch_order(len(split), seed, epoch), size)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 64])
def test_device_views_equal_the_cpus_within_rounding(
    noise: ImageData, shown: Preprocessing, interpolation: str, size: int
) -> None:
    # torchvision's CPU kernel keeps its weights in 16-bit integers; a last digit in the first of
    # the two passes can become two levels. The images here are noise, the worst case.
    sizes = {"image_size": size, "resize_size": round(size * 1.15)}
    shown = replace(shown, interpolation=interpolation, **sizes)
    _check_against_the_cpu(noise.train, shown, 8)


def test_device_views_of_real_photos_equal_the_cpus_within_rounding(
    tmp_path: Path, shown: Preprocessing
) -> None:
    config = DataConfig(source=str(shared_data("hotdog")), cache_dir=str(tmp_path), limit=16)
    shown = replace(shown, image_size=96, resize_size=110)
    _check_against_the_cpu(load_data(config, 128).train, shown, 16)


def test_device_views_do_not_depend_on_the_batch(noise: ImageData, shown: Preprocessing) -> None:
    views = DeviceViews(noise.train, shown, TrainConfig(seed=3), torch.device("cpu"))
    small = torch.cat(list(views.epoch(1, _batches(noise.train, 3, 1, 4))))
    large = torch.cat(list(views.epoch(1, _batches(noise.train, 3, 1, 12))))
    n = min(len(small), len(large))
    # A matrix product may sum in another order for another batch: one rounding apart at most.
    assert (small[:n] - large[:n]).abs().max() <= 1
