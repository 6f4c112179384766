"""A run that was paused gives, to the last bit, what it would have given without the pause."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.fit import fit
from core.metrics import MEASURED
from core.models.builder import count_parameters
from core.paused import pause, paused_after
from core.prefix_cache import PrefixCache
from support import make_folder

TINY = TrainConfig(
    backbone="shufflenet_v2_x0_5",
    weights="none",
    image_size=32,
    epochs=3,
    batch_size=8,
    base_lr=0.01,
    head_lr_mult=2,
    device="cpu",
)
EMA: dict[str, Any] = {"ema_decay": 0.9}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    folder = tmp_path_factory.mktemp("pictures")
    make_folder(folder / "photos", {"red": 14, "blue": 13, "green": 12}, side=40)
    config = DataConfig(source=f"folder:{folder / 'photos'}", cache_dir=str(folder / "cache"))
    return load_data(config, 40)


def _run(
    config: TrainConfig,
    data: ImageData,
    folder: Path,
    cache: PrefixCache | None = None,
    pauses: tuple[int, ...] = (),
) -> list[dict[str, Any]]:
    """Train to the end with pauses after so many epochs; return every epoch's figures."""
    told: list[dict[str, Any]] = []
    for stop in (*pauses, config.epochs):
        with contextlib.closing(fit(config, data, folder, cache, folder / "paused")) as epochs:
            for metrics in epochs:
                figures = dataclasses.asdict(metrics)
                told.append({k: v for k, v in figures.items() if k not in MEASURED})
                if metrics.epoch + 1 == stop < config.epochs:
                    pause(epochs)
    return told


def _checkpoint(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    with np.load(folder / "val_predictions.npz") as predictions:
        return {**{k: v.numpy() for k, v in weights.items()}, **predictions}


def _assert_equal(config: TrainConfig, data: ImageData, folder: Path, **how: Any) -> None:
    whole, parts = folder / "whole", folder / "parts"
    assert _run(config, data, parts, **how) == _run(config, data, whole)
    expected, got = _checkpoint(whole), _checkpoint(parts)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert np.array_equal(value, got[name]), name


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    backbone=st.sampled_from(["shufflenet_v2_x0_5", "mobilenet_v2", "mnasnet0_5"]),
    freeze_depth=st.integers(0, 5),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    schedule=st.sampled_from(["constant", "cosine", "one-cycle", "step"]),
    average=st.sampled_from([{}, EMA]),
    mix=st.sampled_from([{}, {"mixup": 0.3}, {"cutmix": 1.0}]),
    pauses=st.sampled_from([(1,), (2,), (1, 2)]),
    is_cached=st.booleans(),
)
def test_a_pause_changes_no_number(
    data: ImageData,
    tmp_path_factory: pytest.TempPathFactory,
    average: dict[str, Any],
    mix: dict[str, Any],
    pauses: tuple[int, ...],
    is_cached: bool,
    **drawn: Any,
) -> None:
    config = dataclasses.replace(TINY, step_epochs=1, warmup_epochs=0.5, **drawn, **average, **mix)
    folder = tmp_path_factory.mktemp("run")
    cache = PrefixCache(1 << 30) if is_cached else None
    _assert_equal(config, data, folder, cache=cache, pauses=pauses)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw", "batch_norm": "frozen", "clip_norm": 1.0},
        {"backbone": "mobilenet_v2", "nesterov": True, "freeze_depth": 3},  # with dropout
        {"ema_decay": 0.9, "mixup": 0.2, "freeze_depth": 4},
        {"micro_batch_size": 4, "workers": 1, "momentum": 0.0},
        {"freeze_depth": 5, "optimizer": "adamw"},
        {"amp": "fp16", "freeze_depth": 4, "channels_last": False},
    ],
    ids=str,
)
def test_a_pause_changes_no_number_of_particular_runs(
    data: ImageData, tmp_path: Path, change: dict[str, Any]
) -> None:
    _assert_equal(dataclasses.replace(TINY, **change), data, tmp_path, pauses=(1, 2))


def _paused(config: TrainConfig, data: ImageData, folder: Path, n_epochs: int = 1) -> Path:
    with contextlib.closing(fit(config, data, folder, None, folder / "paused")) as epochs:
        for metrics in epochs:
            if metrics.epoch + 1 == n_epochs:
                pause(epochs)
    return folder / "paused"


def test_a_paused_run_ends_and_says_how_far_it_came(data: ImageData, tmp_path: Path) -> None:
    file = tmp_path / "paused"
    epochs = fit(TINY, data, tmp_path / "kept", None, file)
    next(epochs)
    assert paused_after(file) is None
    pause(epochs)
    assert paused_after(file) == 1
    assert next(epochs, None) is None
    assert not (tmp_path / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["paused"]
    rest = list(fit(TINY, data, tmp_path / "kept", None, file))
    assert [metrics.epoch for metrics in rest] == [1, 2]
    assert (tmp_path / "kept" / "card.json").is_file()


@pytest.mark.parametrize("depth", [0, 3, 4, 5])
def test_only_what_is_trained_is_written(data: ImageData, tmp_path: Path, depth: int) -> None:
    config = dataclasses.replace(TINY, momentum=0.0, freeze_depth=depth)
    network = (config.backbone, config.weights, config.image_size)
    trained, _ = count_parameters(*network, depth, len(data.classes))
    size = _paused(config, data, tmp_path).stat().st_size
    # Once, in float32: the best epoch's weights are the present ones. Then names and statistics;
    # a head run keeps its momentum too.
    assert 4 * trained < size < 4 * (1 + (depth == 5)) * trained + 100_000


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)


def _other_tensors(file: Path) -> None:
    with safetensors.safe_open(file, framework="pt") as opened:
        facts = opened.metadata()
    safetensors.torch.save_file({"x": torch.zeros(1)}, file, metadata=facts)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, _truncate, _flip_a_bit, _other_tensors, lambda file: file.write_bytes(b"")],
    ids=["missing", "truncated", "a bit flipped", "other tensors", "empty"],
)
def test_a_damaged_state_sends_the_run_back_to_its_beginning(
    data: ImageData, tmp_path: Path, damage: Any
) -> None:
    damage(_paused(TINY, data, tmp_path))
    assert _run(TINY, data, tmp_path) == _run(TINY, data, tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"base_lr": 0.02}, False),
        ({"seed": 1}, False),
        ({"epochs": 4}, False),
        ({"workers": 1}, True),
    ],
    ids=str,
)
def test_a_state_is_taken_up_by_its_own_run_only(
    data: ImageData, tmp_path: Path, change: dict[str, Any], is_same: bool
) -> None:
    _paused(TINY, data, tmp_path)
    other = dataclasses.replace(TINY, **change)
    first = next(fit(other, data, tmp_path, None, tmp_path / "paused"))
    assert first.epoch == (1 if is_same else 0)


def test_a_state_without_weights_is_no_start_for_a_run_that_keeps_them(
    data: ImageData, tmp_path: Path
) -> None:
    epochs = fit(TINY, data, None, None, tmp_path / "paused")
    next(epochs)
    pause(epochs)
    assert next(fit(TINY, data, None, None, tmp_path / "paused")).epoch == 1
    assert next(fit(TINY, data, tmp_path / "kept", None, tmp_path / "paused")).epoch == 0


def test_a_state_that_cannot_be_written_is_told_and_leaves_nothing(
    data: ImageData, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    epochs = fit(TINY, data, None, None, tmp_path / "file" / "paused")
    next(epochs)
    with pytest.raises(OSError, match="file"):
        pause(epochs)
    assert next(epochs, None) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"amp": "fp16"}, {"freeze_depth": 5}])
def test_a_pause_changes_no_number_on_a_gpu(
    data: ImageData, tmp_path: Path, change: dict[str, Any]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    config = dataclasses.replace(TINY, device="cuda", image_size=64, **change)
    _assert_equal(config, data, tmp_path, pauses=(1, 2))
