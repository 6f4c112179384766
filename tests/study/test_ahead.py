"""Trials trained together leave the study that they leave one after the other."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from core.checkpoint import load_checkpoint
from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.progress import QuietProgress
from study.search import run_search
from support import make_folder

SETTINGS = [
    'train.backbone="resnet18"',
    'train.weights="none"',
    "train.image_size=32",
    "train.epochs=3",
    "train.batch_size=8",
    'train.device="cpu"',
    "search.recipes=false",
]
SPACE = """
[space]
base_lr = {low = 1e-4, high = 1.0, log = true}
freeze_depth = {low = 4, high = 5}
optimizer = {choices = ["sgd", "adamw"]}
"""
TRIALS = "number, state, reason, origin, value, best_epoch, epochs_done, params, config_hash"
QUERIES = (
    f"select {TRIALS} from frostline_trials order by number",
    "select t.number, e.epoch, e.train_loss, e.val_loss, e.val_acc, e.is_best, e.head_lr "
    "from frostline_epochs e join frostline_trials t on t.id = e.trial_id order by 1, 2",
    "select number, state from trials order by number",
    "select t.number, v.step, v.intermediate_value from trial_intermediate_values v "
    "join trials t on t.trial_id = v.trial_id order by 1, 2",
    "select t.number, p.param_name, p.param_value from trial_params p "
    "join trials t on t.trial_id = p.trial_id order by 1, 2",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"red": 24, "blue": 24})
    return tmp_path


def _config(home: Path, name: str, space: str, *settings: str, trials: int = 10) -> StudyConfig:
    (home / "study.toml").write_text(space)
    flags = {
        "data.source": str(home / "photos"),
        "data.cache_dir": str(home / "cache"),
        "study.storage": str(home / f"{name}.db"),
        "study.output": str(home / name),
        "study.name": "heads",  # Hyperband draws brackets by the name
        "study.trials": trials,
    }
    return load_config(home / "study.toml", [*SETTINGS, *settings], flags)


def _record(home: Path, name: str) -> list[list[tuple[Any, ...]]]:
    with sqlite3.connect(home / f"{name}.db") as database:
        return [database.execute(query).fetchall() for query in QUERIES]


def _run(config: StudyConfig) -> Any:
    return run_search(config, progress=QuietProgress(), command="test")


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_a_cohort_leaves_the_same_record_as_one_after_the_other(home: Path, sampler: str) -> None:
    together = _config(home, "together", SPACE, f"search.sampler={sampler}")
    alone = _config(home, "alone", SPACE, f"search.sampler={sampler}", "search.cohort=1")
    best, same = _run(together), _run(alone)
    record = _record(home, "together")
    assert record == _record(home, "alone")
    depths = [row[7] for row in record[0]]
    assert sum('"freeze_depth": 5' in text for text in depths) > 3
    assert any(row[1] == "pruned" for row in record[0])
    assert best.best_number == same.best_number
    kept = {path.name for path in (home / "together" / "heads").glob("trial-*")}
    assert kept == {path.name for path in (home / "alone" / "heads").glob("trial-*")}
    model, card = load_checkpoint(best.checkpoint)
    assert card.metrics.val_acc == best.best_value
    assert model.fc.out_features == 2


def test_an_exhaustive_search_tries_every_setting_once_in_one_pass(home: Path) -> None:
    space = """
[space]
base_lr = {choices = [0.001, 0.01, 0.1, 1.0]}
weight_decay = {choices = [0.0, 0.01]}
"""
    fixed = ("search.sampler=grid", "train.freeze_depth=5")
    outcome = _run(_config(home, "together", space, *fixed, trials=50))
    _run(_config(home, "alone", space, *fixed, "search.cohort=1", trials=50))
    assert outcome.stopped_because == "space exhausted"
    record = _record(home, "together")
    assert len(record[0]) == 8 and record == _record(home, "alone")


def test_a_study_cut_between_cohorts_goes_on_as_if_it_had_not_been(home: Path) -> None:
    fixed = ("search.sampler=random", "train.freeze_depth=5")
    space = "[space]\nbase_lr = {low = 1e-4, high = 1.0, log = true}\n"
    _run(_config(home, "whole", space, *fixed, trials=9))
    for trials in (4, 9):
        _run(_config(home, "cut", space, *fixed, trials=trials))
    assert _record(home, "cut") == _record(home, "whole")


def test_a_head_that_diverges_fails_with_its_reason_and_no_other_does(home: Path) -> None:
    space = "[space]\nbase_lr = {choices = [0.001, 1e38, 0.01]}\n"
    fixed = ("search.sampler=grid", "train.freeze_depth=5", "train.standardize=false")
    _run(_config(home, "together", space, *fixed, trials=3))
    states = {row[7]: (row[1], row[2]) for row in _record(home, "together")[0]}
    failed = [reason for state, reason in states.values() if state == "failed"]
    assert len(failed) == 1 and failed[0].startswith("diverged: ")
