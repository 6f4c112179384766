"""Equal settings give equal bits, wherever what frozen layers give comes from."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.training import activations
from support import TINY, make_folder
from tests.core.runs import Figures, train

BASE = replace(TINY, batch_size=16)
ARRAYS = [
    ({"freeze_depth": 2}, 0),  # to read its rows would cost more than to compute them
    ({"freeze_depth": 5, "mixup": 0.4}, 0),  # blends of images are a batch's own
    ({"freeze_depth": 5, "cutmix": 1.0}, 0),
    ({"backbone": "timm:test_efficientnet", "freeze_depth": 4}, 3),
    ({"backbone": "timm:test_vit", "image_size": 64, "freeze_depth": 5}, 3),
]
"""Settings, and how many arrays they keep: two epochs' views, and the validation split."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("images")
    make_folder(folder / "photos", {"red": 50, "blue": 40, "green": 30}, side=40)
    return DataConfig(source=str(folder / "photos"), cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def data(source: DataConfig) -> ImageData:
    found = load_data(source, 40)
    assert len(found.train) > activations._CHUNK_CPU
    return found


def _train_all(
    configs: list[TrainConfig], source: DataConfig, folder: Path
) -> list[tuple[Figures, int]]:
    """Train one after the other; gives figures, and how many arrays were made."""
    data, caches = load_data(source, 40), [ArrayCache(folder, 1 << 30) for _ in configs]
    return [
        (train(config, data, cache=cache), cache.misses)
        for config, cache in zip(configs, caches, strict=True)
    ]


def test_without_arrays_making_them_and_in_another_process_are_equal_to_the_bit(
    data: ImageData, source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [replace(BASE, **settings) for settings, _ in ARRAYS]
    alone = [train(config, data) for config in configs]
    counts = [n_arrays for _, n_arrays in ARRAYS]
    assert _train_all(configs, source, tmp_path) == list(zip(alone, counts, strict=True))
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # a key must not depend on it
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        again = pool.submit(_train_all, configs, source, tmp_path).result()
    assert again == [(expected, 0) for expected in alone]


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9, "micro_batch_size": 5, "batch_norm": "frozen"},
        {"amp": "bf16", "batch_size": 7},
        {"augment": "none", "optimizer": "adamw", "base_lr": 1e-3, "clip_norm": 0.5},
        {"workers": 1},
    ],
    ids=str,
)
def test_every_way_of_training_reads_arrays_and_gives_the_same_bits(
    data: ImageData, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(BASE, freeze_depth=4, **settings)
    alone = train(config, data)
    for _ in ("cold", "warm"):
        cache = ArrayCache(tmp_path, 1 << 30)
        assert train(config, data, cache=cache) == alone
    assert cache.misses == 0 < cache.hits


def test_runs_share_arrays_of_equal_views_through_equal_frozen_weights(
    data: ImageData, source: DataConfig, tmp_path: Path
) -> None:
    photos = make_folder(tmp_path / "photos", {"red": 50, "blue": 40, "green": 30}, seed=5)
    others = load_data(replace(source, source=str(photos)), 40)
    cache = ArrayCache(tmp_path / "arrays", 1 << 30)
    config = replace(BASE, freeze_depth=5, epochs=1)

    def n_made(images: ImageData = data, **settings: Any) -> int:
        before = cache.misses
        train(replace(config, **settings), images, cache=cache)
        return cache.misses - before

    assert n_made() == 2  # training views and validation views
    for change in ({"batch_size": 5}, {"ema_decay": 0.9}, {"head_init": "zero"}, {"base_lr": 0.5}):
        assert n_made(**change) == 0, change
    assert n_made(crop_scale=0.9) == n_made(epochs=2) == 1
    changes = [{"image_size": 48}, {"normalize": "none"}, {"amp": "bf16"}, {"seed": 1}]
    for change in [*changes, {"freeze_depth": 4}]:
        assert n_made(**change) == 2, change
    assert n_made(others) == 2


@pytest.mark.parametrize("budget", [0, 30_000, None])
def test_a_small_budget_or_a_full_disk_costs_time_and_no_bit(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    config = replace(BASE, freeze_depth=4)
    alone = train(config, data)
    if budget is None:
        monkeypatch.setattr(ArrayCache, "get", lambda *_: None)
    assert train(config, data, cache=ArrayCache(tmp_path, budget or 0)) == alone
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= (budget or 0)
