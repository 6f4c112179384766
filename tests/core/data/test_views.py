from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from core.data.draws import IntArray, batch_positions, epoch_order, view_draws
from core.data.splits import ImageData
from core.data.views import Loader, ViewSpec, eval_views, train_views


def _batches(data: ImageData, epoch: int, size: int) -> list[IntArray]:
    return batch_positions(epoch_order(len(data.train), 7, epoch), size)


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand", "none"])
@pytest.mark.parametrize("workers", [1, 4])
def test_views_are_the_same_with_any_number_of_workers(
    noise: ImageData, spec: ViewSpec, augment: str, workers: int
) -> None:
    spec = replace(spec, augment=augment)
    alone, helped = Loader(noise.train, spec, 7, 0), Loader(noise.train, spec, 7, workers)
    next(helped.epoch(5, _batches(noise, 5, 8)))  # an epoch left early does not spoil the next
    for epoch in (0, 1):
        batches = _batches(noise, epoch, 8)
        pairs = zip(alone.epoch(epoch, batches), helped.epoch(epoch, batches), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_views_are_the_same_in_any_batch_and_order(noise: ImageData, spec: ViewSpec) -> None:
    n = len(noise.train)
    views = train_views(noise.train, np.arange(n), spec, view_draws(n, 7, 3))
    backwards = train_views(noise.train, np.arange(n)[::-1], spec, view_draws(n, 7, 3)).flip(0)
    assert torch.equal(views, backwards)
    for size in (4, 13):
        batches = _batches(noise, 3, size)
        made = Loader(noise.train, spec, 7, 0).epoch(3, batches)
        for positions, batch in zip(batches, made, strict=True):
            assert torch.equal(batch, views[torch.from_numpy(positions)])


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
    loader = Loader(noise.train, replace(spec, augment="rand"), 7, workers)
    for epoch in (0, 1):
        list(loader.epoch(epoch, _batches(noise, epoch, 8)))
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
