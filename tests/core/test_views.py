from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from core.config import DataConfig
from core.data import ImageData, load_data
from core.draws import batch_positions, epoch_order
from core.views import Loader, ViewSpec, eval_views, train_views
from support import make_folder

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


def _batches(data: ImageData, epoch: int, size: int) -> list[np.ndarray]:
    return batch_positions(epoch_order(len(data.train), 7, epoch), size)


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand", "none"])
@pytest.mark.parametrize("workers", [1, 4])
def test_views_are_the_same_with_any_number_of_workers(
    data: ImageData, augment: str, workers: int
) -> None:
    spec = replace(SPEC, augment=augment)
    alone, helped = Loader(data.train, spec, 7, 0), Loader(data.train, spec, 7, workers)
    for epoch in (0, 1):
        batches = _batches(data, epoch, 8)
        for ours, theirs in zip(
            alone.epoch(epoch, batches), helped.epoch(epoch, batches), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_views_are_the_same_in_any_batch_and_order(data: ImageData) -> None:
    one = train_views(data.train, np.arange(len(data.train)), SPEC, 7, 3)
    for size in (4, 13):
        batches = _batches(data, 3, size)
        for where, views in zip(
            batches, Loader(data.train, SPEC, 7, 0).epoch(3, batches), strict=True
        ):
            assert torch.equal(views, one[torch.from_numpy(where)])
    backwards = train_views(data.train, np.arange(len(data.train))[::-1], SPEC, 7, 3).flip(0)
    assert torch.equal(one, backwards)


def test_every_epoch_and_seed_has_other_views(data: ImageData) -> None:
    positions = np.arange(6)
    first = train_views(data.train, positions, SPEC, 0, 0)
    assert not torch.equal(first, train_views(data.train, positions, SPEC, 0, 1))
    assert not torch.equal(first, train_views(data.train, positions, SPEC, 1, 0))


def test_views_leave_the_global_generator_alone(data: ImageData) -> None:
    before = torch.random.get_rng_state()
    train_views(data.train, np.arange(4), replace(SPEC, augment="trivial"), 0, 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_evaluation_view_is_torchvisions_resize_and_centre_crop(data: ImageData) -> None:
    views = eval_views(data.val, np.arange(len(data.val)), SPEC)
    reference = v2.Compose([v2.Resize(28, antialias=True), v2.CenterCrop(24)])
    for row, index in enumerate(data.val.indices):
        picture = torch.from_numpy(np.array(data.val.store.picture(int(index)))).permute(2, 0, 1)
        assert torch.equal(views[row], reference(picture))


def test_workers_and_policies_leave_all_global_generators_alone(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded the GPU"))
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        loader = Loader(data.train, replace(SPEC, augment="rand"), 0, workers)
        for epoch in (0, 1):
            list(loader.epoch(epoch, _batches(data, epoch, 8)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_epoch_that_was_left_early_does_not_spoil_the_next(data: ImageData) -> None:
    alone, helped = Loader(data.train, SPEC, 0, 0), Loader(data.train, SPEC, 0, 2)
    next(helped.epoch(0, _batches(data, 0, 4)))
    batches = _batches(data, 1, 4)
    for ours, theirs in zip(alone.epoch(1, batches), helped.epoch(1, batches), strict=True):
        assert torch.equal(ours, theirs)


def test_a_centre_crop_beyond_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_size must be >= image_size, but got resize_si"):
        replace(SPEC, resize_size=20)
