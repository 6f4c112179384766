import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from core.data.draws import batch_positions, crop_boxes, epoch_order, view_draws


def test_draws_of_an_image_do_not_depend_on_how_many_there_are() -> None:
    assert np.array_equal(view_draws(10, 1, 2), view_draws(50, 1, 2)[:10])


@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    scale=st.floats(0.01, 1),
)
def test_boxes_lie_inside_the_image(seed: int, height: int, width: int, scale: float) -> None:
    sizes = np.tile([[height, width]], (20, 1))
    start, shape = np.split(crop_boxes(view_draws(20, seed, 0), sizes, scale), 2, axis=1)
    assert (start >= 0).all() and (shape >= 1).all() and (start + shape <= sizes).all()


def test_boxes_are_distributed_as_torchvisions() -> None:
    n = 4000
    sizes = np.tile([[200, 300]], (n, 1))
    boxes = crop_boxes(view_draws(n, 0, 0), sizes, 0.2)
    image = torch.empty(3, 200, 300)
    torch.manual_seed(0)
    theirs = [v2.RandomResizedCrop(10, (0.2, 1)).make_params([image]) for _ in range(n)]
    reference = [[float(p[k]) for k in ("top", "left", "height", "width")] for p in theirs]
    ours, expected = (np.quantile(b, [0.1, 0.25, 0.5, 0.75, 0.9], 0) for b in (boxes, reference))
    # About three standard errors of a quantile of 4,000 draws over a range of 300.
    assert np.abs(ours - expected).max() < 8


def test_order_is_a_permutation_by_seed_and_epoch() -> None:
    order = epoch_order(100, 0, 0)
    assert sorted(order) == list(range(100))
    assert np.array_equal(order, epoch_order(100, 0, 0))
    assert not np.array_equal(order, epoch_order(100, 0, 1))
    assert not np.array_equal(order, epoch_order(100, 1, 0))


@pytest.mark.parametrize(
    ("n", "size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1])],
)
def test_a_remainder_of_one_is_left_out(n: int, size: int, sizes: list[int]) -> None:
    assert [len(b) for b in batch_positions(np.arange(n), size)] == sizes
