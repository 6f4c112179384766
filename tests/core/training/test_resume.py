from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from core.cache import ArrayCache
from core.config import TrainConfig
from core.data.splits import ImageData
from core.fit import Interrupted, fit
from core.training import resume
from support import TINY, figures

BASE = replace(TINY, epochs=3, head_solver="logistic")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing costs nothing, so that the state is written whenever it is time to."""
    monkeypatch.setattr(resume, "_MOST_SHARE", float("inf"))


def _whole(config: TrainConfig, data: ImageData, folder: Path) -> list[dict[str, Any]]:
    return [figures(m) for m in fit(config, data, checkpoint_dir=folder)]


def _in_pieces(
    config: TrainConfig, data: ImageData, folder: Path, every: int, cache: ArrayCache | None = None
) -> list[dict[str, Any]]:
    """Train with a stop at each so many questions, each time from the file alone."""
    found = []
    file = folder / "state.pt"
    for _ in range(100):
        asked = 0

        def should_stop() -> bool:
            nonlocal asked
            asked += 1
            return asked > every

        epochs = fit(
            config, data, cache=cache, checkpoint_dir=folder, state_file=file,
            should_stop=should_stop,
        )  # fmt: skip
        try:
            for metrics in epochs:
                found.append(figures(metrics))
            return found
        except Interrupted:
            assert file.is_file()
    raise AssertionError("it never ended")


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "base_lr": 1e-3, "freeze_depth": 3},
        {"ema_decay": 0.9, "micro_batch_size": 3, "batch_norm": "frozen"},
        {
            "backbone": "timm:test_efficientnet",
            "freeze_depth": 5,
            "head_solver": "sgd",
            "monitor": "val_acc",
        },
        {"backbone": "squeezenet1_1", "image_size": 64, "base_lr": 1e-3},  # draws dropout
        {"mixup": 0.3, "schedule": "one-cycle", "amp": "bf16"},
    ],
    ids=str,
)
def test_a_run_in_pieces_gives_the_same_bits(
    data: ImageData, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(BASE, **settings)
    whole = _whole(config, data, tmp_path / "whole")
    cache = ArrayCache(tmp_path / "arrays", 1 << 30)
    pieces = _in_pieces(config, data, tmp_path / "pieces", 5, cache)
    assert pieces == whole
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("pieces", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("free")
def test_a_killed_run_continues_after_its_last_epoch(data: ImageData, tmp_path: Path) -> None:
    whole = _whole(BASE, data, tmp_path / "whole")
    file = tmp_path / "state.pt"
    epochs = fit(BASE, data, state_file=file)
    first = [figures(next(epochs)) for _ in range(2)]
    next(epochs)  # the state is saved once the caller has recorded the epoch
    epochs.close()
    assert first + [figures(m) for m in fit(BASE, data, state_file=file)] == whole


@pytest.mark.usefixtures("free")
def test_a_run_killed_before_its_checkpoint_still_writes_it(
    data: ImageData, tmp_path: Path
) -> None:
    file = tmp_path / "state.pt"
    list(fit(BASE, data, state_file=file))
    assert list(fit(BASE, data, checkpoint_dir=tmp_path / "late", state_file=file)) == []
    assert (tmp_path / "late" / "card.json").is_file()


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "other"])
def test_a_file_that_is_not_this_runs_is_passed_over(
    data: ImageData, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "state.pt"
    config = replace(BASE, epochs=2)
    run = fit(replace(config, seed=1) if damage == "foreign" else config, data, state_file=file)
    next(run)
    next(run)
    run.close()
    if damage == "other":
        torch.save([1, 2], file)
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    assert [figures(m) for m in fit(config, data, state_file=file)] == _whole(
        config, data, tmp_path
    )


def test_the_state_is_not_written_where_that_would_cost_too_much(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_LEAST_COST_S", 1e6)
    list(fit(BASE, data, state_file=tmp_path / "state.pt"))
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.usefixtures("free")
def test_the_state_is_written_inside_an_epoch_when_it_is_time(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_EVERY_S", 0.0)
    file = tmp_path / "state.pt"

    class Killed(Exception):
        pass

    asked = 0

    def die() -> bool:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise Killed
        return False

    with pytest.raises(Killed):
        list(fit(BASE, data, state_file=file, should_stop=die))
    state = torch.load(file, weights_only=True)
    assert (state["trainer"]["position"]["epoch"], state["trainer"]["position"]["step"]) == (0, 2)
    assert [figures(m) for m in fit(BASE, data, state_file=file)] == _whole(BASE, data, tmp_path)
