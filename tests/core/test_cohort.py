"""Cohorts of heads: the figures of each run alone, and checkpoints that stand by themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.checkpoint import PREDICTIONS_FILE, load_checkpoint, read_card
from core.cohort import Cohort, stream_key
from core.config import DataConfig, TrainConfig
from core.data.splits import ImageData, load_data
from core.evaluate import evaluate
from core.feed import Feed
from core.fit import build_for, fit
from core.metrics import MEASURED, EpochMetrics, TrainingDiverged
from core.prefix_cache import PrefixCache
from support import make_folder, step_losses

CPU = torch.device("cpu")
TINY = TrainConfig(
    backbone="resnet18",
    weights="none",
    image_size=32,
    freeze_depth=5,
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


@pytest.fixture(scope="module")
def shared() -> PrefixCache:
    """One cache for all examples, so that later ones read what earlier ones left."""
    return PrefixCache(1 << 30)


def _told(epochs: list[EpochMetrics]) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(metrics) for metrics in epochs]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _train(cohort: Cohort) -> Cohort:
    for _ in cohort.epochs():
        pass
    return cohort


_RUNS = st.fixed_dictionaries(
    {
        "base_lr": st.sampled_from([1e-3, 0.03]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "optimizer": st.sampled_from(["sgd", "adamw"]),
        "batch_size": st.sampled_from([6, 8, 23]),
        "epochs": st.sampled_from([1, 2, 3]),
        "standardize": st.booleans(),
        "head_init": st.sampled_from(["default", "zero", "probe"]),
        "schedule": st.sampled_from(["cosine", "constant"]),
        "monitor": st.sampled_from(["val_loss", "val_acc"]),
    }
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    runs=st.lists(_RUNS, min_size=1, max_size=6),
    seed=st.sampled_from([0, 3]),
    small_epochs=st.sampled_from([0, 0, 1]),
)
def test_a_cohort_gives_each_run_the_figures_it_has_alone(
    data: ImageData,
    shared: PrefixCache,
    runs: list[dict[str, Any]],
    seed: int,
    small_epochs: int,
) -> None:
    small = {"small_size": 24, "small_epochs": small_epochs} if small_epochs else {}
    runs = [run | {"epochs": max(run["epochs"], small_epochs + 1)} for run in runs]
    configs = [dataclasses.replace(TINY, seed=seed, **run, **small) for run in runs]
    with step_losses() as together:
        cohort = _train(Cohort(configs, data, shared))
    for config, result in zip(configs, cohort.results, strict=True):
        with step_losses() as by_itself:
            alone = list(fit(config, data))  # without any sharing
        assert _told(result.epochs) == _told(alone)
        # Equal runs stand in one lane, side by side.
        own = together[config][:: configs.count(config)]
        assert own == by_itself[config]
        assert own
        assert _told(list(fit(config, data, None, shared))) == _told(alone)


def test_a_checkpoint_of_standardised_features_gives_the_recorded_accuracy(
    data: ImageData, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY, epochs=3, base_lr=0.05)
    cohort = _train(Cohort([config], data))
    cohort.save(0, tmp_path / "cohort")
    list(fit(config, data, tmp_path / "alone"))
    for folder in (tmp_path / "cohort", tmp_path / "alone"):
        model, card = load_checkpoint(folder)
        with Feed(config, card.preprocessing, data, CPU) as feed:
            found = evaluate(model, feed.val(), data.val.labels)
        assert found.acc == card.metrics.val_acc
        assert found.loss == pytest.approx(card.metrics.val_loss, abs=1e-4)
    with (
        np.load(tmp_path / "cohort" / PREDICTIONS_FILE) as ours,
        np.load(tmp_path / "alone" / PREDICTIONS_FILE) as theirs,
    ):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.files)
    assert read_card(tmp_path / "cohort").config == config


def test_a_run_that_diverges_leaves_and_the_others_stay(data: ImageData) -> None:
    wild = dataclasses.replace(TINY, base_lr=1e38, standardize=False, epochs=3)
    tame = dataclasses.replace(TINY, epochs=3)
    cohort = _train(Cohort([wild, tame], data))
    assert isinstance(cohort.results[0].error, TrainingDiverged)
    assert "lower base_lr" in str(cohort.results[0].error)
    assert len(cohort.results[0].epochs) < 3
    assert _told(cohort.results[1].epochs) == _told(list(fit(tame, data)))
    with pytest.raises(TrainingDiverged):
        list(fit(wild, data))


def test_a_run_that_is_taken_out_has_no_more_epochs(data: ImageData) -> None:
    cohort = Cohort([TINY, dataclasses.replace(TINY, base_lr=0.02)], data)
    for done, _ in enumerate(cohort.epochs()):
        if done == 0:
            cohort.leave(0)
    assert [len(result.epochs) for result in cohort.results] == [1, 2]


def test_runs_that_look_at_other_features_form_no_cohort(data: ImageData) -> None:
    for changes in ({"seed": 1}, {"augment": "none"}, {"image_size": 48}, {"backbone": "vgg11"}):
        other = dataclasses.replace(TINY, **changes)
        assert stream_key(other) != stream_key(TINY)
        with pytest.raises(ValueError, match="same features"):
            Cohort([TINY, other], data)
    for changes in ({"freeze_depth": 4}, {"mixup": 0.2}, {"ema_decay": 0.9}):
        assert stream_key(dataclasses.replace(TINY, **changes)) is None


def test_a_probe_s_head_starts_where_the_probe_ends_at_every_depth(data: ImageData) -> None:
    """With a rate that moves nothing, every epoch is the probe's own."""
    still = dataclasses.replace(
        TINY, head_init="probe", base_lr=1e-12, weight_decay=0.0, epochs=1, batch_norm="frozen"
    )
    figures = [
        next(iter(fit(dataclasses.replace(still, freeze_depth=depth), data)))
        for depth in (5, 2, 0)
    ]
    assert len({metrics.val_acc for metrics in figures}) == 1
    assert figures[1].val_loss == pytest.approx(figures[0].val_loss, abs=1e-5)
    plain = next(iter(fit(dataclasses.replace(still, head_init="default"), data)))
    assert figures[0].val_loss < plain.val_loss


def test_a_probe_needs_a_linear_head(data: ImageData) -> None:
    config = dataclasses.replace(TINY, backbone="squeezenet1_1", head_init="probe", image_size=64)
    with pytest.raises(ValueError, match="head_init = probe needs a backbone"):
        list(fit(config, data))


def test_a_head_that_is_a_convolution_is_trained_all_the_same(data: ImageData) -> None:
    config = dataclasses.replace(TINY, backbone="squeezenet1_1", image_size=64, epochs=1)
    assert len(list(fit(config, data))) == 1
    assert build_for(config, data.classes).head == ("classifier.1",)
