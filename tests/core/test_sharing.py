"""Runs that share work give exactly the numbers that they give alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.build import build
from core.config import DataConfig, TrainConfig
from core.data import ImageData, load_data
from core.fit import fit
from core.metrics import EpochMetrics
from core.prefix_cache import PrefixCache
from core.sharing import can_share
from core.split import Halves, split_network
from core.stages import freeze, train_mode
from support import make_folder

CPU = torch.device("cpu")
# What a clock or the memory tells is not the same twice.
MEASURED = ("images_per_s", "data_s", "train_s", "eval_s", "peak_memory_bytes", "saved_s")
TINY = TrainConfig(
    backbone="resnet18",
    weights="none",
    image_size=32,
    epochs=2,
    batch_size=8,
    base_lr=0.01,
    head_lr_mult=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    folder = tmp_path_factory.mktemp("pictures")
    make_folder(folder / "photos", {"red": 14, "blue": 13, "green": 12}, side=40)
    config = DataConfig(source=f"folder:{folder / 'photos'}", cache_dir=str(folder / "cache"))
    return load_data(config, 40)


def _told(metrics: EpochMetrics) -> dict[str, Any]:
    figures = dataclasses.asdict(metrics)
    return {name: value for name, value in figures.items() if name not in MEASURED}


def _run(config: TrainConfig, data: ImageData, cache: PrefixCache | None) -> list[dict[str, Any]]:
    return [_told(metrics) for metrics in fit(config, data, None, cache)]


@pytest.fixture(scope="module")
def shared() -> PrefixCache:
    """One cache for all examples, so that later ones read what earlier ones left."""
    return PrefixCache(1 << 30)


@settings(
    max_examples=9, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    backbone=st.sampled_from(["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"]),
    depth=st.integers(0, 5),
    seed=st.integers(0, 1),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    augment=st.sampled_from(["none", "standard", "trivial"]),
    batch_size=st.sampled_from([5, 8]),
    workers=st.sampled_from([0, 0, 1]),
    batch_norm=st.sampled_from(["train", "frozen"]),
)
def test_sharing_changes_no_number(
    data: ImageData, shared: PrefixCache, backbone: str, depth: int, workers: int, **settings: Any
) -> None:
    config = dataclasses.replace(
        TINY, backbone=backbone, freeze_depth=depth, workers=workers, **settings
    )
    alone = _run(config, data, None)
    assert _run(config, data, shared) == alone  # builds what is not there
    assert _run(config, data, shared) == alone  # reads it


def test_a_second_run_reads_and_a_deeper_one_takes_the_pixels(data: ImageData) -> None:
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, freeze_depth=4)
    first = list(fit(config, data, None, cache))
    assert [m.saved_s > 0 for m in first] == [False, True]  # the second epoch reads validation
    again = list(fit(dataclasses.replace(config, base_lr=0.001), data, None, cache))
    assert all(m.saved_s > 0 for m in again)
    hits = cache.hits
    deeper = list(fit(dataclasses.replace(config, freeze_depth=5), data, None, cache))
    assert cache.hits > hits and deeper[0].saved_s > 0


def test_a_stopped_run_leaves_whole_epochs_only(data: ImageData) -> None:
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, freeze_depth=3)
    run = fit(config, data, None, cache)
    next(run)
    run.close()
    alone = _run(config, data, None)
    assert _run(config, data, cache) == alone
    assert _run(config, data, cache) == alone


@pytest.mark.parametrize(
    "settings",
    [{"mixup": 0.4}, {"cutmix": 1.0}, {"ema_decay": 0.9}, {"micro_batch_size": 4}],
    ids=str,
)
def test_runs_whose_frozen_outputs_are_their_own_share_nothing(
    data: ImageData, settings: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, freeze_depth=3, **settings)
    assert not can_share(config, CPU)
    cache = PrefixCache(1 << 30)
    assert _run(config, data, cache) == _run(config, data, None)
    assert cache.size_bytes == 0


@pytest.mark.parametrize("budget", [1, 40_000, 400_000])
def test_memory_stays_within_the_budget_and_numbers_stay_right(
    data: ImageData, budget: int
) -> None:
    cache = PrefixCache(budget)
    for depth in (5, 2, 5, 0):
        config = dataclasses.replace(TINY, freeze_depth=depth)
        assert _run(config, data, cache) == _run(config, data, None)
        assert cache.size_bytes <= budget


def test_other_pixels_seeds_and_weights_are_not_mixed_up(data: ImageData, tmp_path: Path) -> None:
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, freeze_depth=5)
    for other in (
        config,
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, crop_scale=0.9),
        dataclasses.replace(config, normalize="none"),
        dataclasses.replace(config, image_size=48),
        dataclasses.replace(config, batch_size=6),
        dataclasses.replace(config, channels_last=False),
    ):
        assert _run(other, data, cache) == _run(other, data, None)
    make_folder(tmp_path / "photos", {"red": 14, "blue": 13, "green": 12}, side=40, seed=5)
    source = DataConfig(source=f"folder:{tmp_path / 'photos'}", cache_dir=str(tmp_path / "cache"))
    others = load_data(source, 40)
    assert _run(config, others, cache) == _run(config, others, None)


def test_the_least_valuable_entries_make_room() -> None:
    cache = PrefixCache(100)
    assert cache.put("slow", [1], 50, built_s=10.0)
    assert cache.put("quick", [2], 50, built_s=1.0)
    assert not cache.put("quicker", [3], 50, built_s=0.5)
    assert cache.put("middling", [4], 50, built_s=5.0)
    assert cache.get("quick") is None
    found = cache.get("slow")
    assert found is not None and found == ([1], 10.0)
    assert not cache.put("too large", [5], 101, built_s=1e9)
    assert (cache.size_bytes, cache.hits, cache.misses, cache.saved_s) == (100, 1, 1, 10.0)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v2", 32),
        ("densenet121", 32),
        ("squeezenet1_1", 64),
        ("timm:tf_efficientnet_lite0", 32),
        ("timm:vit_tiny_patch16_224", 224),
    ],
)
def test_the_halves_do_exactly_what_the_network_does(backbone: str, size: int) -> None:
    built = build(backbone, "none", ("a", "b", "c"), seed=0, image_size=size)
    images = torch.randn(2, 3, size, size)
    for depth in (1, 3, 5):
        freeze(built.model, built.stages, depth)
        halves = split_network(built.model, built.stages, depth, freeze_statistics=False)
        assert halves is not None
        before = {name: value.clone() for name, value in built.model.state_dict().items()}
        for suffix, is_training in ((halves.train_suffix, True), (halves.eval_suffix, False)):
            built.model.eval()
            if is_training:
                train_mode(built.model, built.stages, depth)
            torch.manual_seed(1)
            whole = built.model(images)
            built.model.load_state_dict(before)
            torch.manual_seed(1)
            with torch.no_grad():
                crossing = halves.prefix(images)
            assert torch.equal(suffix(crossing), whole)
            built.model.load_state_dict(before)


def test_there_is_no_prefix_at_level_0() -> None:
    built = build("resnet18", "none", ("a", "b"), seed=0, image_size=32)
    with pytest.raises(ValueError, match="depth must be 1 to 5 to be cut at, but got depth=0"):
        split_network(built.model, built.stages, 0, freeze_statistics=False)


def test_what_the_trained_half_writes_into_is_not_kept(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writing(*args: Any, **options: Any) -> Halves | None:
        halves = split_network(*args, **options)
        assert halves is not None
        first = halves.train_suffix.graph_module
        first.register_forward_pre_hook(lambda _, inputs: inputs[0].mul_(1.0))
        return halves

    monkeypatch.setattr("core.fit.split_network", writing)
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, freeze_depth=3)
    alone = _run(config, data, None)
    assert _run(config, data, cache) == alone
    # Pixels are there, what crossed is not.
    hits = cache.hits
    assert _run(config, data, cache) == alone
    assert cache.hits > hits
    assert not [key for key in cache._entries if key[0] in ("train", "val")]
