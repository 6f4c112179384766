from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.config import DataConfig
from core.data import ImageData, load_data
from core.device_views import DeviceViews, padded_bytes
from core.draws import batch_positions, epoch_order
from core.views import ViewSpec, eval_views, train_views
from support import make_folder, shared_data

# Largest difference of a pixel from the CPU's view, of 255, and the mean over a batch. Measured
# over 60 epochs of the noise below: worst batch 2 and 0.025 (24 px, bilinear); photos at 224 px:
# 2 and 0.004.
LEVELS, MEAN = 2, 0.03
SPEC = ViewSpec(
    image_size=24,
    resize_size=28,
    interpolation="bilinear",
    augment="standard",
    crop_scale=0.35,
    flip=0.5,
    rand_magnitude=9,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    folder = tmp_path_factory.mktemp("views")
    make_folder(folder / "photos", {"a": 20, "b": 21}, side=50)
    config = DataConfig(source=str(folder / "photos"), cache_dir=str(folder / "cache"))
    return load_data(config, 60)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("augment", ["standard", "none"])
@pytest.mark.parametrize("size", [24, 64])
def test_device_views_equal_the_cpus_within_rounding(
    data: ImageData, interpolation: str, augment: str, size: int
) -> None:
    # torchvision's CPU kernel keeps its weights in 16-bit integers; a last digit in the first of
    # the two passes can become two levels. The pictures here are noise, the worst case.
    spec = replace(
        SPEC,
        interpolation=interpolation,
        augment=augment,
        image_size=size,
        resize_size=round(size * 1.15),
    )
    views = DeviceViews(data.train, spec, torch.device("cpu"))
    batches = batch_positions(epoch_order(len(data.train), 5, 2), 8)
    for positions, images in zip(batches, views.epoch(5, 2, batches), strict=True):
        expected = train_views(data.train, positions, spec, 5, 2).float()
        difference = (images - expected).abs()
        assert difference.max() <= LEVELS
        assert difference.mean() <= MEAN


def test_padded_size_counts_the_largest_picture(data: ImageData, tmp_path: Path) -> None:
    height, width = data.train.store.sizes[data.train.indices].max(axis=0)
    assert padded_bytes(data.train) == len(data.train) * height * width * 3


def test_device_views_of_real_photos_equal_the_cpus_within_rounding(tmp_path: Path) -> None:
    config = DataConfig(source=str(shared_data("hotdog")), cache_dir=str(tmp_path), limit=16)
    photos = load_data(config, 128).train
    for augment in ("standard", "none"):
        spec = replace(SPEC, image_size=96, resize_size=110, augment=augment)
        views = DeviceViews(photos, spec, torch.device("cpu"))
        order = epoch_order(len(photos), 0, 0)
        images = next(views.epoch(0, 0, [order]))
        difference = (images - train_views(photos, order, spec, 0, 0).float()).abs()
        assert difference.max() <= LEVELS
        assert difference.mean() <= MEAN


def test_device_views_without_augmentation_are_the_evaluation_views(data: ImageData) -> None:
    views = DeviceViews(data.train, replace(SPEC, augment="none"), torch.device("cpu"))
    positions = epoch_order(len(data.train), 1, 0)[:16]
    images = next(views.epoch(1, 0, [positions]))
    expected = eval_views(data.train, positions, SPEC)
    assert (images - expected.float()).abs().max() <= LEVELS


def test_device_views_do_not_depend_on_the_batch(data: ImageData) -> None:
    views = DeviceViews(data.train, SPEC, torch.device("cpu"))
    order = epoch_order(len(data.train), 3, 1)
    small = torch.cat(list(views.epoch(3, 1, batch_positions(order, 4))))
    large = torch.cat(list(views.epoch(3, 1, batch_positions(order, 12))))
    n = min(len(small), len(large))
    # A matrix product may sum in another order for another batch: one rounding apart at most.
    assert (small[:n] - large[:n]).abs().max() <= 1
