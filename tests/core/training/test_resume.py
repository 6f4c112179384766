from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from core.cache import ArrayCache
from core.data.splits import ImageData
from core.fit import fit
from core.training import resume
from support import TINY, figures
from tests.core.runs import are_equal, train, train_in_pieces, weights_of

BASE = replace(TINY, epochs=3, head_solver="logistic")
pytestmark = pytest.mark.usefixtures("is_state_free")


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "base_lr": 1e-3, "freeze_depth": 3},
        {"ema_decay": 0.9, "micro_batch_size": 3, "batch_norm": "frozen"},
        {"backbone": "timm:test_efficientnet", "freeze_depth": 5, "head_solver": "sgd"},
        {"backbone": "squeezenet1_1", "image_size": 64, "base_lr": 1e-3},  # draws dropout
        {"mixup": 0.3, "schedule": "one-cycle", "amp": "bf16", "monitor": "val_acc"},
    ],
    ids=str,
)
def test_a_run_in_pieces_gives_the_same_bits(
    data: ImageData, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(BASE, **settings)
    one, two, file = tmp_path / "whole", tmp_path / "pieces", tmp_path / "state.pt"
    whole = train(config, data, checkpoint_dir=one)
    cache = ArrayCache(tmp_path / "arrays", 1 << 30)
    assert train_in_pieces(config, data, file, 5, cache=cache, checkpoint_dir=two) == whole
    assert are_equal(weights_of(one), weights_of(two))


def test_a_killed_run_continues_after_its_last_epoch(data: ImageData, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    epochs = fit(BASE, data, state_file=file)
    first = [figures(next(epochs)) for _ in range(2)]
    next(epochs)  # the state is saved once the caller has recorded the epoch
    epochs.close()
    assert first + train(BASE, data, state_file=file) == train(BASE, data)


def test_a_run_killed_before_its_checkpoint_still_writes_it(
    data: ImageData, tmp_path: Path
) -> None:
    file = tmp_path / "state.pt"
    train(BASE, data, state_file=file)
    assert train(BASE, data, checkpoint_dir=tmp_path / "late", state_file=file) == []
    assert (tmp_path / "late" / "card.json").is_file()


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "other"])
def test_a_file_that_is_not_this_runs_is_passed_over(
    data: ImageData, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "state.pt"
    config = replace(BASE, epochs=2)
    train(replace(config, seed=1) if damage == "foreign" else config, data, state_file=file)
    whole = file.read_bytes()
    half = len(whole) // 2
    if damage == "cut":
        file.write_bytes(whole[:half])
    elif damage == "flipped":
        file.write_bytes(whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :])
    elif damage == "other":
        torch.save([1, 2], file)
    assert train(config, data, state_file=file) == train(config, data)


def test_the_state_is_not_written_where_that_would_cost_too_much(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_MOST_SHARE", 0.0)
    train(BASE, data, state_file=tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()


def test_the_state_is_written_inside_an_epoch_when_it_is_time(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_EVERY_S", 0.0)
    file = tmp_path / "state.pt"
    killed = Mock(side_effect=[False, False, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        train(BASE, data, state_file=file, should_stop=killed)
    state = torch.load(file, weights_only=True)
    position = state["trainer"]["position"]
    assert (position["epoch"], position["step"]) == (0, 2)
    assert train(BASE, data, state_file=file) == train(BASE, data)
