from dataclasses import replace
from pathlib import Path

import pytest

from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from support import TINY
from tests.core.runs import train


@pytest.fixture(scope="module")
def config(weights_file: Path) -> TrainConfig:
    return replace(TINY, weights=str(weights_file), freeze_depth=5, head_solver="logistic")


def test_cache_seed_and_options_of_training_change_no_bit(
    config: TrainConfig, data: ImageData, tmp_path: Path
) -> None:
    alone = train(config, data)
    assert len(alone) == 1
    cache = ArrayCache(tmp_path, 1 << 30)
    assert train(config, data, cache=cache) == alone  # cold
    for change in ({}, {"seed": 1}, {"epochs": 3}, {"base_lr": 0.5, "augment": "rand"}):
        assert train(replace(config, **change), data, cache=cache) == alone, change
    assert (cache.hits, cache.misses) == (8, 2)
    train(replace(config, features="last"), data, cache=cache)  # a part of what several give
    assert (cache.hits, cache.misses) == (10, 2)
    train(replace(config, mirrored=True), data, cache=cache)
    assert (cache.hits, cache.misses) == (12, 4)
    assert train(replace(config, head_decay=1.0), data, cache=cache) != alone


def test_a_head_that_is_no_linear_layer_is_refused_with_the_remedy(
    config: TrainConfig, data: ImageData
) -> None:
    other = replace(config, backbone="squeezenet1_1", weights="none", image_size=64)
    with pytest.raises(
        ValueError, match="train.backbone .*'squeezenet1_1'.*train.head_solver=sgd"
    ):
        next(fit(other, data))


@pytest.mark.parametrize("depth", [3, 5])
def test_a_trained_head_starts_from_the_solved_one(
    config: TrainConfig, data: ImageData, depth: int
) -> None:
    [solved] = fit(config, data)
    trained = replace(config, freeze_depth=depth, head_solver="sgd", base_lr=1e-7, epochs=1)
    [default] = fit(replace(trained, head_init="default"), data)
    [started] = fit(replace(trained, head_init="solved"), data)
    assert started.val_loss == pytest.approx(solved.val_loss, abs=1e-3)
    assert default.val_loss > started.val_loss + 0.05


def test_a_head_is_solved_on_images_far_smaller_than_the_network_was_made_for(
    tmp_path: Path,
) -> None:
    data = load_data(DataConfig(cache_dir=str(tmp_path)), 40)  # the digits, packaged weights
    (metrics,) = fit(TrainConfig(image_size=32, freeze_depth=5, features="last"), data)
    assert metrics.val_acc > 0.8
