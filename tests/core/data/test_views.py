from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from core.config import DataConfig
from core.data.draws import epoch_order, view_draws
from core.data.splits import ImageData, load_data
from core.data.views import Loader, ViewSpec, eval_views, train_views
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


@contextmanager
def _loader(data: ImageData, spec: ViewSpec, batch_size: int, workers: int) -> Iterator[Loader]:
    loader = Loader(data.train, spec, 7, batch_size, workers)
    yield loader
    loader.close()


def _by_position(data: ImageData, batch_size: int, epoch: int) -> dict[int, torch.Tensor]:
    with _loader(data, SPEC, batch_size, 0) as loader:
        batches = list(loader.epoch(epoch))
    return {int(p): view for views, _, at in batches for p, view in zip(at, views, strict=True)}


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand", "none"])
@pytest.mark.parametrize("workers", [1, 4])
def test_views_are_the_same_with_any_number_of_workers(
    data: ImageData, augment: str, workers: int
) -> None:
    spec = replace(SPEC, augment=augment)
    with _loader(data, spec, 8, 0) as alone, _loader(data, spec, 8, workers) as helped:
        next(helped.epoch(5))  # an epoch that is left early does not spoil the next
        for epoch in (0, 1):
            for ours, theirs in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
                assert np.array_equal(ours[2], theirs[2])


def test_views_are_the_same_in_any_batch_and_order(data: ImageData) -> None:
    one, two = _by_position(data, 4, 3), _by_position(data, 13, 3)
    shared = one.keys() & two.keys()
    assert len(shared) >= len(data.train) - 2
    assert all(torch.equal(one[k], two[k]) for k in shared)
    n = len(data.train)
    backwards = train_views(data.train, np.arange(n)[::-1], SPEC, view_draws(n, 7, 3)).flip(0)
    assert all(torch.equal(one[k], backwards[k]) for k in one)


def test_an_epoch_visits_in_its_order_with_labels(data: ImageData) -> None:
    with _loader(data, SPEC, 8, 0) as loader:
        batches = list(loader.epoch(2))
    positions = np.concatenate([at for _, _, at in batches])
    assert np.array_equal(positions, epoch_order(len(data.train), 7, 2)[: len(positions)])
    labels = torch.cat([labels for _, labels, _ in batches])
    assert np.array_equal(labels, data.train.labels[positions])


def test_every_epoch_and_seed_has_other_views(data: ImageData) -> None:
    first, *others = (
        train_views(data.train, np.arange(6), SPEC, view_draws(len(data.train), *key))
        for key in ((0, 0), (0, 1), (1, 0))
    )
    assert not any(torch.equal(first, views) for views in others)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_leave_the_global_generators_alone(
    data: ImageData, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded the GPU"))
    before = torch.random.get_rng_state()
    with _loader(data, replace(SPEC, augment="rand"), 8, workers) as loader:
        list(loader.epoch(0))
        list(loader.epoch(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_evaluation_view_is_torchvisions_resize_and_centre_crop(data: ImageData) -> None:
    views = eval_views(data.val, np.arange(len(data.val)), SPEC)
    reference = v2.Compose([v2.Resize(28, antialias=True), v2.CenterCrop(24)])
    for row, index in enumerate(data.val.indices):
        image = torch.from_numpy(np.array(data.val.store.image(int(index)))).permute(2, 0, 1)
        assert torch.equal(views[row], reference(image))


def test_a_centre_crop_beyond_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_size must be >= image_size, but got resize_si"):
        replace(SPEC, resize_size=20)
