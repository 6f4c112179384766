"""Equal settings give equal bits, wherever what frozen layers give comes from."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.data.views import eval_views
from core.fit import fit
from core.metrics import EpochMetrics
from core.models.builder import build
from core.models.layers import find_layers, tap
from core.training import activations
from core.training.activations import Run, evaluation_features, kept_partition
from core.training.batches import Normalizer
from support import TINY, figures, make_folder

BASE = replace(TINY, batch_size=16)
NETWORKS = [("timm:test_resnet", 2), ("timm:test_efficientnet", 4), ("timm:test_vit", 5)]
CPU = torch.device("cpu")


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


def _run(config: TrainConfig, data: ImageData, cache: ArrayCache | None) -> list[dict[str, Any]]:
    return [figures(metrics) for metrics in fit(config, data, cache=cache)]


PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from core.cache import ArrayCache
from core.config import DataConfig, TrainConfig
from core.data.splits import load_data
from core.fit import fit

configs, source, folder = json.loads(sys.argv[1])
data = load_data(DataConfig(**source), 40)
for config in configs:
    cache = ArrayCache(Path(folder), 1 << 30)
    epochs = fit(TrainConfig(**config), data, cache=cache)
    print(json.dumps([[dataclasses.asdict(m) for m in epochs], cache.misses]))
"""


def test_without_cold_warm_and_in_another_process_are_equal_to_the_bit(
    data: ImageData, source: DataConfig, tmp_path: Path
) -> None:
    configs = [
        replace(
            BASE, backbone=backbone, image_size=64 if "vit" in backbone else 32, freeze_depth=depth
        )
        for backbone, depth in NETWORKS
    ]
    alone = [_run(config, data, None) for config in configs]
    for config, expected in zip(configs, alone, strict=True):
        cold, warm = (ArrayCache(tmp_path, 1 << 30) for _ in range(2))
        assert _run(config, data, cold) == expected
        assert _run(config, data, warm) == expected
        assert (warm.hits, warm.misses) == (cold.misses, 0)
        # Two epochs' views, and the validation split; none where the whole network is trained.
        assert cold.misses == (0 if config.freeze_depth == 2 else 3)
    settings = [dataclasses.asdict(config) for config in configs]
    done = subprocess.run(
        [
            sys.executable, "-c", PROGRAM,
            json.dumps([settings, dataclasses.asdict(source), str(tmp_path)]),
        ],
        check=True,
        capture_output=True,
        text=True,
        # Another hash seed, since a key must not depend on it.
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    for line, expected in zip(done.stdout.splitlines(), alone, strict=True):
        epochs, misses = json.loads(line)
        assert [figures(EpochMetrics(**m)) for m in epochs] == expected
        assert misses == 0


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
    alone = _run(config, data, None)
    for _ in range(2):
        assert _run(config, data, cache := ArrayCache(tmp_path, 1 << 30)) == alone
    assert cache.misses == 0 < cache.hits


def test_runs_of_other_batch_sizes_and_heads_share_arrays(data: ImageData, tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 1 << 30)
    config = replace(BASE, freeze_depth=5)
    _run(config, data, cache)
    misses = cache.misses
    for change in ({"batch_size": 5}, {"ema_decay": 0.9}, {"head_init": "zero"}, {"epochs": 1}):
        _run(replace(config, **change), data, cache)
    assert cache.misses == misses
    _run(replace(config, epochs=1, crop_scale=0.9), data, cache)
    assert cache.misses == misses + 1


def test_other_images_are_not_mixed_up(data: ImageData, tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"red": 50, "blue": 40, "green": 30}, side=40, seed=5)
    other = DataConfig(source=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    others = load_data(other, 40)
    config = replace(BASE, freeze_depth=5, epochs=1)
    cache = ArrayCache(tmp_path / "arrays", 1 << 30)
    for images in (data, others):
        assert _run(config, images, cache) == _run(config, images, None)


@pytest.mark.parametrize("budget", [0, 30_000, None])
def test_a_small_budget_or_a_full_disk_costs_time_and_no_bit(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    config = replace(BASE, freeze_depth=4)
    alone = _run(config, data, None)
    if budget is None:
        monkeypatch.setattr(ArrayCache, "get", lambda *_: None)
    assert _run(config, data, ArrayCache(tmp_path, budget or 0)) == alone
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= (budget or 0)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_blended_images_go_through_the_whole_network(
    data: ImageData, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(BASE, freeze_depth=5, epochs=1, **settings)
    cache = ArrayCache(tmp_path, 1 << 30)
    assert _run(config, data, cache) == _run(config, data, None)
    assert not list(tmp_path.iterdir())


def test_a_cut_is_kept_where_rows_are_small_for_what_they_cost() -> None:
    kept = []
    for depth in range(6):
        config = replace(
            BASE, backbone="timm:tf_efficientnet_lite0", image_size=224, freeze_depth=depth
        )
        kept.append(kept_partition(build(config, ("a", "b")), config, CPU) is not None)
    assert kept == [False, True, True, True, True, True]


def test_evaluation_features_come_from_one_pass_per_view(data: ImageData, tmp_path: Path) -> None:
    network, n = build(BASE, data.classes), len(data.train)
    cache = ArrayCache(tmp_path, 1 << 30)
    several = evaluation_features(Run(BASE, network, data, cache))
    last = evaluation_features(Run(replace(BASE, features="last"), network, data, cache))
    assert (cache.hits, cache.misses) == (2, 2)
    assert torch.equal(several[:, -last.shape[1] :], last)
    mirrored = evaluation_features(Run(replace(BASE, mirrored=True), network, data, cache))
    assert (cache.hits, cache.misses) == (4, 4)
    normalize = Normalizer(network.preprocessing, CPU)
    images = normalize(eval_views(data, data.train, np.arange(n), network.preprocessing))
    features = tap(network.model, find_layers(network))
    with torch.no_grad():
        expected = (features(images) + features(images.flip(-1))) / 2
    torch.testing.assert_close(mirrored[:n], expected)
