from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.models.sources import create
from core.training.batches import Views
from core.training.checkpoint import load_checkpoint
from support import TINY, figures


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = create("timm:test_resnet", 32, 2, is_pretrained=True)
    safetensors.torch.save_file(source.model.state_dict(), file)
    return replace(TINY, weights=str(file), freeze_depth=5, head_solver="logistic")


def _figures(
    config: TrainConfig, data: ImageData, cache: ArrayCache | None = None
) -> list[dict[str, Any]]:
    return [figures(metrics) for metrics in fit(config, data, cache=cache)]


def test_cache_seed_and_options_of_training_change_no_bit(
    config: TrainConfig, data: ImageData, tmp_path: Path
) -> None:
    alone = _figures(config, data)
    assert len(alone) == 1
    cache = ArrayCache(tmp_path, 1 << 30)
    assert _figures(config, data, cache) == alone  # cold
    for change in ({}, {"seed": 1}, {"epochs": 3}, {"base_lr": 0.5, "augment": "rand"}):
        assert _figures(replace(config, **change), data, cache) == alone, change
    assert (cache.hits, cache.misses) == (8, 2)
    assert _figures(replace(config, head_decay=1.0), data, cache) != alone


def test_the_checkpoint_loads_with_the_recorded_accuracy(
    config: TrainConfig, data: ImageData, tmp_path: Path
) -> None:
    [metrics] = fit(config, data, checkpoint_dir=tmp_path)
    model, card = load_checkpoint(tmp_path)
    assert card.metrics == metrics
    views = Views(config, card.preprocessing, data, torch.device("cpu"))
    with torch.no_grad():
        predicted = torch.cat([model(images) for images in views.val()]).argmax(1).numpy()
    assert (predicted == data.val.labels).mean() == metrics.val_acc > 0.5


@pytest.mark.parametrize("settings", [{}, {"freeze_depth": 3, "head_init": "solved"}], ids=str)
def test_a_head_that_is_no_linear_layer_is_refused_with_the_remedy(
    config: TrainConfig, data: ImageData, settings: dict[str, Any]
) -> None:
    other = replace(config, backbone="squeezenet1_1", weights="none", image_size=64, **settings)
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
