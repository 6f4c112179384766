import os

import numpy as np
import pytest
import torch

from core.config import Preprocessing, TrainConfig
from core.data.draws import IntArray, batch_positions, epoch_order, view_draws
from core.data.splits import ImageData
from core.data.views import Loader, train_views

CPU = torch.device("cpu")


def _batches(data: ImageData, epoch: int, size: int) -> list[IntArray]:
    return batch_positions(epoch_order(len(data.train), 7, epoch), size)


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand"])
@pytest.mark.parametrize("workers", [1, 4])
def test_views_are_the_same_with_any_number_of_workers(
    data: ImageData, shown: Preprocessing, augment: str, workers: int
) -> None:
    configs = (TrainConfig(augment=augment, seed=7, workers=n) for n in (0, workers))
    alone, helped = (Loader(data.train, shown, config, CPU) for config in configs)
    next(helped.epoch(5, _batches(data, 5, 8)))  # an epoch left early does not spoil the next
    for epoch in (0, 1):
        batches = _batches(data, epoch, 8)
        pairs = zip(alone.epoch(epoch, batches), helped.epoch(epoch, batches), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_views_are_the_same_in_any_batch_and_order(data: ImageData, shown: Preprocessing) -> None:
    n, config = len(data.train), TrainConfig(seed=7)
    views, backwards = (
        train_views(data.train, positions, shown, config, view_draws(n, 7, 3))
        for positions in (np.arange(n), np.arange(n)[::-1])
    )
    assert torch.equal(views, backwards.flip(0))
    for size in (4, 13):
        batches = _batches(data, 3, size)
        made = Loader(data.train, shown, config, CPU).epoch(3, batches)
        for positions, batch in zip(batches, made, strict=True):
            assert torch.equal(batch, views[torch.from_numpy(positions)])


def test_every_epoch_and_seed_has_other_views(data: ImageData, shown: Preprocessing) -> None:
    first, *others = (
        train_views(data.train, np.arange(6), shown, TrainConfig(), draws)
        for draws in (view_draws(len(data.train), *key) for key in ((0, 0), (0, 1), (1, 0)))
    )
    assert not any(torch.equal(first, views) for views in others)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_leave_the_global_generators_alone(
    data: ImageData, shown: Preprocessing, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getpid()  # a worker seeds itself, which reaches no one else
    seeded = lambda _: os.getpid() != own or pytest.fail("seeded the GPU")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    before = torch.random.get_rng_state()
    config = TrainConfig(augment="rand", seed=7, workers=workers)
    loader = Loader(data.train, shown, config, CPU)
    for epoch in (0, 1):
        list(loader.epoch(epoch, _batches(data, epoch, 8)))
    assert torch.equal(before, torch.random.get_rng_state())
