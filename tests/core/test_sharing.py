"""Runs that share work give exactly the numbers that they give alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.disk_entries import DiskEntries
from core.disk_rates import Rates
from core.entry_keys import prefix_key
from core.fit import fit
from core.metrics import MEASURED, EpochMetrics
from core.models.builder import build
from core.models.freeze_stages import freeze, train_mode
from core.prefix_cache import PrefixCache
from core.segments import middle
from core.sharing import can_share
from core.split import Halves, split_network
from support import make_folder, step_losses

CPU = torch.device("cpu")
# So that every entry of these small sets is worth writing.
FAST = Rates(write=1e12, read=1e12)
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


def _steps_and_epochs(
    config: TrainConfig, data: ImageData, cache: PrefixCache | None
) -> tuple[list[float], list[dict[str, Any]]]:
    with step_losses() as losses:
        epochs = _run(config, data, cache)
    return losses[config], epochs


@pytest.fixture(scope="module")
def shared() -> PrefixCache:
    """One cache for all examples, so that later ones read what earlier ones left."""
    return PrefixCache(1 << 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of entries for all examples, each read by caches that begin empty."""
    return tmp_path_factory.mktemp("entries")


def _on_disk(folder: Path, memory: int = 0, disk: int = 1 << 30) -> PrefixCache:
    return PrefixCache(memory, DiskEntries(folder, disk, FAST))


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
    small_epochs=st.sampled_from([0, 0, 1]),
)
def test_sharing_changes_no_number(
    data: ImageData,
    shared: PrefixCache,
    folder: Path,
    backbone: str,
    depth: int,
    workers: int,
    small_epochs: int,
    **settings: Any,
) -> None:
    small_size = 24 if small_epochs else None
    config = dataclasses.replace(
        TINY, backbone=backbone, freeze_depth=depth, workers=workers, small_epochs=small_epochs,
        small_size=small_size, **settings,
    )  # fmt: skip
    alone = _steps_and_epochs(config, data, None)
    assert all(alone)
    assert _steps_and_epochs(config, data, shared) == alone  # builds what is not there
    assert _steps_and_epochs(config, data, shared) == alone  # reads it
    memory = 1 << 30 if workers else 0  # entries written when they are whole, or batch by batch
    assert _steps_and_epochs(config, data, _on_disk(folder, memory)) == alone
    later = _on_disk(folder)
    assert _steps_and_epochs(config, data, later) == alone
    assert later.hits > 0 and later.misses == 0


def test_a_second_run_reads_and_what_it_read_is_counted(data: ImageData) -> None:
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, freeze_depth=4)
    first = list(fit(config, data, None, cache))
    assert [m.saved_s > 0 for m in first] == [False, True]  # the second epoch reads validation
    assert [m.cache_hits for m in first] == [0, 1]
    # What crosses and pixels of both splits; then those of training, and validation is read.
    assert [m.cache_misses for m in first] == [4, 2]
    assert sum(m.cache_kept_bytes for m in first) == cache.size_bytes
    again = list(fit(dataclasses.replace(config, base_lr=0.001), data, None, cache))
    assert all(m.saved_s > 0 and m.cache_hits == 2 and m.cache_misses == 0 for m in again)
    assert all(m.cache_read_bytes > 0 and m.cache_disk_bytes == 0 for m in again)
    assert cache.saved_s == pytest.approx(sum(m.saved_s for m in (*first, *again)))


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_a_deeper_run_starts_from_a_shallower_boundary(data: ImageData, backbone: str) -> None:
    cache = PrefixCache(1 << 30)
    shallow = dataclasses.replace(TINY, backbone=backbone, freeze_depth=1)
    deep = dataclasses.replace(shallow, freeze_depth=4)
    _run(shallow, data, cache)
    found = list(fit(deep, data, None, cache))
    assert [_told(m) for m in found] == _run(deep, data, None)
    # In both epochs what crosses at level 1 in training, and in the first that of validation.
    assert [m.cache_hits for m in found] == [2, 2]
    assert [m.cache_misses for m in found] == [2, 1]
    between = dataclasses.replace(shallow, freeze_depth=3)
    assert _run(between, data, cache) == _run(between, data, None)
    # What it left counts what making it from the start takes, not the layers between alone.
    again = list(fit(deep, data, None, cache))
    assert all(m.cache_hits == 2 and m.cache_misses == 0 for m in again)
    assert again[0].saved_s > found[0].saved_s


def test_a_head_that_needs_more_than_a_linear_layer_starts_from_a_shallower_boundary(
    data: ImageData,
) -> None:
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, backbone="squeezenet1_1", image_size=64, freeze_depth=4)
    _run(config, data, cache)
    head = dataclasses.replace(config, freeze_depth=5)
    hits = cache.hits
    assert _run(head, data, cache) == _run(head, data, None)
    assert cache.hits >= hits + 3


PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from core.config import DataConfig, TrainConfig
from core.data.splits import load_data
from core.disk_entries import DiskEntries
from core.disk_rates import Rates
from core.fit import fit
from core.prefix_cache import PrefixCache

settings, source, entries = json.loads(sys.argv[1])
data = load_data(DataConfig(**source), 40)
disk = DiskEntries(Path(entries), 1 << 30, Rates(write=1e12, read=1e12))
for depth in (2, 5):
    config = TrainConfig(**{**settings, "freeze_depth": depth})
    for metrics in fit(config, data, None, PrefixCache(1 << 30, disk)):
        print(json.dumps(dataclasses.asdict(metrics)))
"""


def test_another_process_reads_what_a_process_left(data: ImageData, tmp_path: Path) -> None:
    photos = Path(data.source.removeprefix("folder:"))
    source = {"source": data.source, "cache_dir": str(photos.parent / "cache")}
    told = json.dumps([dataclasses.asdict(TINY), source, str(tmp_path)])
    # Another hash seed, since a key must not depend on it.
    variables = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, told],
        check=True,
        capture_output=True,
        text=True,
        env=variables,
        cwd=Path(__file__).parents[2],
    )
    theirs = [EpochMetrics(**json.loads(line)) for line in done.stdout.splitlines()]
    assert sum(m.cache_misses for m in theirs) > 0
    for depth, built in ((2, theirs[:2]), (5, theirs[2:])):
        config = dataclasses.replace(TINY, freeze_depth=depth)
        read = list(fit(config, data, None, _on_disk(tmp_path)))
        assert [_told(m) for m in read] == [_told(m) for m in built] == _run(config, data, None)
        assert all(m.cache_misses == 0 for m in read)
        assert all(0 < m.cache_disk_bytes == m.cache_read_bytes for m in read)


def test_damaged_entries_are_made_again_and_numbers_stay_right(
    data: ImageData, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY, freeze_depth=3)
    alone = _run(config, data, None)
    _run(config, data, _on_disk(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6  # pixels and what crosses: two epochs, and validation
    for k, path in enumerate(files):
        content = bytearray(path.read_bytes())
        content[-100] ^= 4
        path.write_bytes(content if k % 2 else content[: len(content) // 2])
    cache = _on_disk(tmp_path)
    assert _run(config, data, cache) == alone
    assert cache.hits == 1  # validation, in the second epoch
    later = _on_disk(tmp_path)
    assert _run(config, data, later) == alone
    assert later.misses == 0


@pytest.mark.parametrize("budget", [20_000, 200_000])
def test_the_disk_stays_within_its_budget_and_numbers_stay_right(
    data: ImageData, tmp_path: Path, budget: int
) -> None:
    for depth in (4, 1, 5):
        config = dataclasses.replace(TINY, freeze_depth=depth)
        assert _run(config, data, _on_disk(tmp_path, 50_000, budget)) == _run(config, data, None)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_stopped_run_leaves_whole_epochs_only(
    data: ImageData, tmp_path: Path, memory: int
) -> None:
    cache = _on_disk(tmp_path, memory)
    config = dataclasses.replace(TINY, freeze_depth=3)
    run = fit(config, data, None, cache)
    next(run)
    run.close()
    # Pixels and what crosses of one epoch and of validation.
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * 4
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


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v2", 32),
        ("densenet121", 32),
        ("timm:tf_efficientnet_lite0", 32),
        ("timm:vit_tiny_patch16_224", 224),
        ("swin_t", 64),
    ],
)
def test_the_middle_makes_a_deeper_crossing_of_a_shallower_one(backbone: str, size: int) -> None:
    built = build(backbone, "none", ("a", "b", "c"), seed=0, image_size=size)
    built.model.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    for low, high in ((1, 2), (1, 4), (2, 5), (4, 5)):
        freeze(built.model, built.stages, high)
        crossings = []
        for depth in (low, high):
            halves = split_network(built.model, built.stages, depth, freeze_statistics=False)
            assert halves is not None
            with torch.no_grad():
                crossings.append(halves.prefix(images))
        rest = middle(built.model, halves.prefix, built.stages, low, high)
        assert rest is not None
        with torch.no_grad():
            deeper = rest(*crossings[0])
        assert len(deeper) == len(crossings[1])
        for got, expected in zip(deeper, crossings[1], strict=True):
            if isinstance(expected, torch.Tensor):
                assert torch.equal(got, expected) and got.stride() == expected.stride()
            else:
                assert got == expected


def test_a_key_of_frozen_layers_names_their_values() -> None:
    def key(depth: int, **settings: Any) -> Any:
        config = dataclasses.replace(TINY, freeze_depth=depth, **settings)
        built = build("resnet18", "none", ("a", "b"), seed=config.seed, image_size=32)
        with torch.no_grad():  # what is trained does not count
            built.model.get_parameter("fc.weight").add_(1)
            if depth < 5:
                built.model.get_parameter("layer4.1.conv2.weight").add_(1)
        return prefix_key(config, built)

    assert key(4) == key(4) == key(4, base_lr=0.5)
    assert len({key(4), key(3), key(4, seed=1), key(4, channels_last=False)}) == 4


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

    monkeypatch.setattr("core.network_run.split_network", writing)
    cache = PrefixCache(1 << 30)
    config = dataclasses.replace(TINY, freeze_depth=3)
    alone = _run(config, data, None)
    assert _run(config, data, cache) == alone
    # Pixels are there, what crossed is not.
    hits = cache.hits
    assert _run(config, data, cache) == alone
    assert cache.hits > hits
    assert not [key for key in cache._entries if key.text.startswith(("('train'", "('val',"))]
    assert len(cache._entries) == 3
