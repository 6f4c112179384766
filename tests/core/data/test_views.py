from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from core.data.draws import epoch_order, view_draws
from core.data.splits import ImageData
from core.data.views import Loader, ViewSpec, eval_views, train_views


@contextmanager
def _loader(data: ImageData, spec: ViewSpec, batch_size: int, workers: int) -> Iterator[Loader]:
    loader = Loader(data.train, spec, 7, batch_size, workers)
    yield loader
    loader.close()


def _by_position(
    data: ImageData, spec: ViewSpec, batch_size: int, epoch: int
) -> dict[int, torch.Tensor]:
    with _loader(data, spec, batch_size, 0) as loader:
        batches = list(loader.epoch(epoch))
    return {int(p): view for views, _, at in batches for p, view in zip(at, views, strict=True)}


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand", "none"])
@pytest.mark.parametrize("workers", [1, 4])
def test_views_are_the_same_with_any_number_of_workers(
    noise: ImageData, spec: ViewSpec, augment: str, workers: int
) -> None:
    spec = replace(spec, augment=augment)
    with _loader(noise, spec, 8, 0) as alone, _loader(noise, spec, 8, workers) as helped:
        next(helped.epoch(5))  # an epoch that is left early does not spoil the next
        for epoch in (0, 1):
            for ours, theirs in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
                assert np.array_equal(ours[2], theirs[2])


def test_views_are_the_same_in_any_batch_and_order(noise: ImageData, spec: ViewSpec) -> None:
    one, two = _by_position(noise, spec, 4, 3), _by_position(noise, spec, 13, 3)
    shared = one.keys() & two.keys()
    assert len(shared) >= len(noise.train) - 2
    assert all(torch.equal(one[k], two[k]) for k in shared)
    n = len(noise.train)
    backwards = train_views(noise.train, np.arange(n)[::-1], spec, view_draws(n, 7, 3)).flip(0)
    assert all(torch.equal(one[k], backwards[k]) for k in one)


def test_an_epoch_visits_in_its_order_with_labels(noise: ImageData, spec: ViewSpec) -> None:
    with _loader(noise, spec, 8, 0) as loader:
        batches = list(loader.epoch(2))
    positions = np.concatenate([at for _, _, at in batches])
    assert np.array_equal(positions, epoch_order(len(noise.train), 7, 2)[: len(positions)])
    labels = torch.cat([labels for _, labels, _ in batches])
    assert np.array_equal(labels, noise.train.labels[positions])


def test_every_epoch_and_seed_has_other_views(noise: ImageData, spec: ViewSpec) -> None:
    first, *others = (
        train_views(noise.train, np.arange(6), spec, view_draws(len(noise.train), *key))
        for key in ((0, 0), (0, 1), (1, 0))
    )
    assert not any(torch.equal(first, views) for views in others)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_leave_the_global_generators_alone(
    noise: ImageData, spec: ViewSpec, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded the GPU"))
    before = torch.random.get_rng_state()
    with _loader(noise, replace(spec, augment="rand"), 8, workers) as loader:
        list(loader.epoch(0))
        list(loader.epoch(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_evaluation_view_is_torchvisions_resize_and_centre_crop(
    noise: ImageData, spec: ViewSpec
) -> None:
    views = eval_views(noise.val, np.arange(len(noise.val)), spec)
    reference = v2.Compose([v2.Resize(28, antialias=True), v2.CenterCrop(24)])
    for row, index in enumerate(noise.val.indices):
        image = torch.from_numpy(np.array(noise.val.store.image(int(index)))).permute(2, 0, 1)
        assert torch.equal(views[row], reference(image))


def test_a_centre_crop_beyond_the_image_is_refused(spec: ViewSpec) -> None:
    with pytest.raises(ValueError, match="resize_size must be >= image_size, but got resize_si"):
        replace(spec, resize_size=20)
