from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import make_folder
from torchvision.transforms import v2

from core.config import DataConfig
from core.data import ImageData, load_data
from core.device_views import DeviceViews, padded_bytes
from core.draws import batch_positions, crop_boxes, epoch_order, view_draws
from core.views import Loader, ViewSpec, eval_views, train_views

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


def _by_picture(loader: Loader, epoch: int) -> dict[int, torch.Tensor]:
    batches = list(loader.epoch(epoch))
    return {
        int(p): view for views, _, where in batches for p, view in zip(where, views, strict=True)
    }


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand", "none"])
@pytest.mark.parametrize("workers", [1, 4])
def test_views_are_the_same_with_any_number_of_workers(
    data: ImageData, augment: str, workers: int
) -> None:
    spec = replace(SPEC, augment=augment)
    alone = Loader(data.train, spec, 7, 8, 0)
    helped = Loader(data.train, spec, 7, 8, workers)
    for epoch in (0, 1):
        for ours, theirs in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert np.array_equal(ours[2], theirs[2])
    helped.close()


def test_views_are_the_same_in_any_batch_and_order(data: ImageData) -> None:
    one = _by_picture(Loader(data.train, SPEC, 7, 4, 0), 3)
    two = _by_picture(Loader(data.train, SPEC, 7, 13, 0), 3)
    shared = one.keys() & two.keys()
    assert len(shared) >= len(data.train) - 2
    assert all(torch.equal(one[k], two[k]) for k in shared)
    backwards = train_views(data.train, np.arange(len(data.train))[::-1], SPEC, 7, 3).flip(0)
    assert all(torch.equal(one[k], backwards[k]) for k in one)


def test_every_epoch_and_seed_has_other_views(data: ImageData) -> None:
    positions = np.arange(6)
    first = train_views(data.train, positions, SPEC, 0, 0)
    assert not torch.equal(first, train_views(data.train, positions, SPEC, 0, 1))
    assert not torch.equal(first, train_views(data.train, positions, SPEC, 1, 0))


def test_views_leave_the_global_generator_alone(data: ImageData) -> None:
    before = torch.random.get_rng_state()
    train_views(data.train, np.arange(4), replace(SPEC, augment="trivial"), 0, 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_of_a_picture_do_not_depend_on_how_many_there_are() -> None:
    assert np.array_equal(view_draws(10, 1, 2), view_draws(50, 1, 2)[:10])


@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    scale=st.floats(0.01, 1),
)
def test_boxes_lie_inside_the_picture(seed: int, height: int, width: int, scale: float) -> None:
    sizes = np.tile([[height, width]], (20, 1))
    top, left, box_h, box_w = crop_boxes(view_draws(20, seed, 0), sizes, scale).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (box_h >= 1).all()
    assert (box_w >= 1).all()
    assert (top + box_h <= height).all()
    assert (left + box_w <= width).all()


def test_boxes_are_distributed_as_torchvisions() -> None:
    n = 4000
    sizes = np.tile([[200, 300]], (n, 1))
    boxes = crop_boxes(view_draws(n, 0, 0), sizes, 0.2)
    image = torch.empty(3, 200, 300)
    torch.manual_seed(0)
    theirs = np.array(
        [v2.RandomResizedCrop(10, (0.2, 1)).make_params([image]) for _ in range(n)], dtype=object
    )
    reference = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in theirs])
    for column in range(4):
        ours = np.quantile(boxes[:, column], [0.1, 0.25, 0.5, 0.75, 0.9])
        expected = np.quantile(reference[:, column].astype(float), [0.1, 0.25, 0.5, 0.75, 0.9])
        # About three standard errors of a quantile of 4,000 draws over a range of 300.
        assert np.abs(ours - expected).max() < 8


def test_evaluation_view_is_torchvisions_resize_and_centre_crop(data: ImageData) -> None:
    views = eval_views(data.val, np.arange(len(data.val)), SPEC)
    reference = v2.Compose([v2.Resize(28, antialias=True), v2.CenterCrop(24)])
    for row, index in enumerate(data.val.indices):
        picture = torch.from_numpy(np.array(data.val.store.picture(int(index)))).permute(2, 0, 1)
        assert torch.equal(views[row], reference(picture))


def test_order_is_a_permutation_by_seed_and_epoch() -> None:
    order = epoch_order(100, 0, 0)
    assert sorted(order) == list(range(100))
    assert np.array_equal(order, epoch_order(100, 0, 0))
    assert not np.array_equal(order, epoch_order(100, 0, 1))
    assert not np.array_equal(order, epoch_order(100, 1, 0))


@pytest.mark.parametrize(("n", "sizes"), [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (1, [1])])
def test_a_last_batch_of_one_is_left_out(n: int, sizes: list[int]) -> None:
    assert [len(b) for b in batch_positions(np.arange(n), 4)] == sizes


@pytest.mark.parametrize(
    ("interpolation", "levels", "mean"), [("bilinear", 1, 0.25), ("bicubic", 12, 0.3)]
)
@pytest.mark.parametrize("augment", ["standard", "none"])
@pytest.mark.parametrize("size", [24, 64])
def test_device_views_equal_the_cpus_within_rounding(
    data: ImageData, interpolation: str, levels: int, mean: float, augment: str, size: int
) -> None:
    # In levels of 255. torchvision's CPU kernel works in 16-bit integers and rounds (and, for
    # bicubic, clips) between the two passes; the pictures here are noise, the worst case.
    spec = replace(
        SPEC,
        interpolation=interpolation,
        augment=augment,
        image_size=size,
        resize_size=round(size * 1.15),
    )
    views = DeviceViews(data.train, spec, torch.device("cpu"))
    seen = 0
    order = epoch_order(len(data.train), 5, 2)
    for images, labels in views.epoch(5, 2, 8):
        positions = order[seen : seen + len(labels)]
        seen += len(labels)
        expected = train_views(data.train, positions, spec, 5, 2).float()
        difference = (images - expected).abs()
        assert difference.max() <= levels
        assert difference.mean() <= mean
        assert labels.tolist() == data.train.labels[positions].tolist()
    assert seen >= len(data.train) - 1


def test_padded_size_counts_the_largest_picture(data: ImageData, tmp_path: Path) -> None:
    height, width = data.train.store.sizes[data.train.indices].max(axis=0)
    assert padded_bytes(data.train) == len(data.train) * height * width * 3
