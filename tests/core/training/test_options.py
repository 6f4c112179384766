"""Each option of a run changes what is trained, is refused, or is known to do nothing."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.cache import ArrayCache
from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.data.splits import ImageData
from core.training.no_effect import without_effect
from core.training.trainer import Trainer
from support import TINY
from tests.core.runs import Weights, train, weights_of

BASE = replace(TINY, augment="rand", head_solver="logistic")
# Another value of each field; one that does something wherever the field can.
CHANGES: dict[str, Any] = {
    "backbone": "timm:test_efficientnet",
    "weights": "",  # a file, see below
    "image_size": 48,
    "normalize": "none",
    "freeze_depth": None,  # the next level
    "head_init": "zero",
    "head_solver": "sgd",
    "features": "last",
    "mirrored": True,
    "head_decay": 0.5,
    "train_fraction": 0.5,
    "epochs": 3,
    "batch_size": 6,
    "micro_batch_size": 3,
    "optimizer": "adamw",
    "base_lr": 0.02,
    "head_lr_mult": 5.0,
    "weight_decay": 0.1,
    "decay_all": True,
    "momentum": 0.5,
    "nesterov": True,
    "schedule": "constant",
    "warmup_epochs": 1.0,
    "step_epochs": 1,
    "step_gamma": 0.5,
    "loss_reduction": "sum",
    "label_smoothing": 0.1,
    "clip_norm": 0.01,
    "mixup": 0.4,
    "cutmix": 1.0,
    "ema_decay": 0.9,
    "batch_norm": "frozen",
    "monitor": "val_acc",
    "augment": "standard",
    "views": 1,
    "crop_scale": 0.8,
    "flip": 0.0,
    "rand_magnitude": 2,
    "amp": "bf16",
    "device": "auto",
    "workers": 1,
    "seed": 1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ArrayCache:
    return ArrayCache(tmp_path_factory.mktemp("arrays"), 1 << 30)


@pytest.fixture
def trained(
    data: ImageData, cache: ArrayCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[TrainConfig], Weights]:
    """Give what returns the weights that a configuration trains, after the last epoch."""
    end_epoch, last = Trainer.end_epoch, dict[str, Weights]()

    def keep(trainer: Trainer) -> None:
        last["epoch"] = trainer.snapshot()
        end_epoch(trainer)

    def run(config: TrainConfig) -> Weights:
        last.clear()
        train(config, data, cache=cache, checkpoint_dir=tmp_path)
        return last.get("epoch") or weights_of(tmp_path)  # no epochs: solved

    monkeypatch.setattr(Trainer, "end_epoch", keep)
    return run


def _differ(one: Weights, two: Weights) -> bool:
    """Return whether tensors that both networks have differ, or there are none."""
    shared = one.keys() & two.keys()
    return not shared or any(not torch.equal(one[name], two[name]) for name in shared)


def test_every_field_has_a_change() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    # The whole network, what lies behind a cut, a solved head, and a head that is trained.
    ("depth", "head_solver"),
    [(0, "logistic"), (4, "logistic"), (5, "logistic"), (5, "sgd")],
)
def test_each_option_changes_the_weights_or_is_refused_or_known_to_do_nothing(
    trained: Callable[[TrainConfig], Weights], weights_file: Path, depth: int, head_solver: str
) -> None:
    base = replace(BASE, freeze_depth=depth, head_solver=head_solver)
    plain = trained(base)
    assert not _differ(plain, trained(base))
    wrong = []
    for name, value in CHANGES.items():
        if name == "device":  # another one may not be there
            assert name in without_effect(base)
            continue
        value = str(weights_file) if name == "weights" else value
        value = "logistic" if name == "head_solver" and head_solver == "sgd" else value
        value = (depth + 1) % (MAX_FREEZE_DEPTH + 1) if name == "freeze_depth" else value
        try:
            config = replace(base, **{name: value})
        except ValueError:  # refused
            continue
        changed = _differ(plain, trained(config))
        expected = name not in without_effect(base) or name not in without_effect(config)
        if name == "mirrored" and not base.is_solved:  # what is predicted, not the weights
            expected = False
        if changed != expected:
            wrong.append((name, changed))
    assert not wrong


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"schedule": "step"}, "step_epochs", 1),
        ({"schedule": "step", "step_epochs": 1}, "step_gamma", 0.5),
        ({"schedule": "one-cycle"}, "warmup_epochs", 1.0),
        ({"weight_decay": 0.0}, "decay_all", True),
        ({"augment": "none"}, "flip", 0.0),
        ({"augment": "standard"}, "rand_magnitude", 2),
        ({"optimizer": "adamw", "base_lr": 1e-3}, "momentum", 0.5),
    ],
    ids=str,
)
def test_what_an_option_does_beside_others_is_known(
    trained: Callable[[TrainConfig], Weights], settings: dict[str, Any], name: str, value: Any
) -> None:
    base = replace(BASE, freeze_depth=5, head_solver="sgd", **settings)
    changed = replace(base, **{name: value})
    assert _differ(trained(base), trained(changed)) is (name not in without_effect(base))
