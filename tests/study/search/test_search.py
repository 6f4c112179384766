import sqlite3
from pathlib import Path

import pytest
from small_study import config_of, make_home, optuna_trials, rows_of, run

from study.config.errors import ConfigError
from study.execution.progress import QuietProgress
from study.record.database import RecordError
from study.record.record import Record
from study.search.final_test import test_study as read_test_split
from support import make_folder

SPACE = """
[space]
freeze_depth = {low = 0, high = 5}
base_lr = {low = 1e-4, high = 1e-2, log = true}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path, SPACE, n=24)


def _trials(home: Path, name: str = "photos") -> list[tuple[object, ...]]:
    return [
        (row.number, row.state, row.origin, row.value, row.params) for row in rows_of(home, name)
    ]


def test_a_study_tries_recipes_first_then_the_sampler_and_keeps_the_best(home: Path) -> None:
    outcome = run(config_of(home, 6, "study.keep_checkpoints=1"))
    assert outcome.stopped_because == "trials"
    rows = rows_of(home)
    assert [row.origin.partition(":")[0] for row in rows] == ["recipe"] * 3 + ["sampler"] * 3
    best = {row.number: row.value for row in rows if row.state == "complete"}
    assert outcome.best_value == best[outcome.best_number]
    assert outcome.checkpoint is not None
    assert (outcome.checkpoint / "model.safetensors").is_file()
    assert len(list((home / "runs" / "photos").glob("trial-*"))) == 1
    assert [t.params for t in optuna_trials(home)] == [row.params for row in rows]
    assert all(t.intermediate_values for t in optuna_trials(home))


@pytest.mark.parametrize("monitor", ["val_loss", "val_acc"])
def test_the_best_trial_and_its_best_epoch_are_those_of_the_monitor(
    home: Path, monitor: str
) -> None:
    outcome = run(config_of(home, 6, f"train.monitor={monitor}", 'search.pruner="none"'))
    with Record.open(str(home / "s.db")) as store:
        trials = store.trials(store.study("photos").id)
        epochs = {row.number: store.epochs(row.id) for row in trials}
        (summary,) = store.studies()
    for row in trials:
        assert row.best_epoch is not None
        best = epochs[row.number][row.best_epoch]
        assert best.score == max(epoch.score or 0.0 for epoch in epochs[row.number]) == row.score
        assert (row.value, best.is_best) == (best.val_acc, True)
    ranked = sorted(trials, key=lambda row: (-(row.score or 0.0), row.number))
    assert (outcome.best_number, outcome.best_value) == (ranked[0].number, ranked[0].value)
    assert (summary.best_number, summary.best_value) == (ranked[0].number, ranked[0].value)
    if monitor == "val_acc":
        assert all(row.score == row.value for row in trials)


def test_stopping_and_resuming_gives_the_same_study(home: Path) -> None:
    run(config_of(home, 5, **{"study.name": "whole"}))
    for n in (2, 4, 5):
        outcome = run(config_of(home, n, **{"study.name": "cut"}))
    assert outcome.counts.finished == 5
    assert _trials(home, "cut") == _trials(home, "whole")


def test_a_finished_study_runs_nothing_more(home: Path) -> None:
    run(config_of(home, 3))
    before = _trials(home)
    assert run(config_of(home, 3)).stopped_because == "trials"
    assert _trials(home) == before


def test_a_changed_configuration_is_refused_with_the_difference(home: Path) -> None:
    run(config_of(home, 1))
    with pytest.raises(ConfigError, match=r"train.epochs: 2 -> 3"):
        run(config_of(home, 2, "train.epochs=3"))
    assert len(_trials(home)) == 1
    assert run(config_of(home, 2, "train.epochs=3"), allow_changes=True).counts.finished == 2


def test_a_study_keeps_what_ranks_its_trials(home: Path) -> None:
    run(config_of(home, 1, "train.monitor=val_acc"))
    with pytest.raises(
        ConfigError, match=r"train.monitor must stay val_acc, by which study photos"
    ):
        run(config_of(home, 2), allow_changes=True)
    assert run(config_of(home, 2, "train.monitor=val_acc")).counts.finished == 2


def test_changed_images_are_refused(home: Path) -> None:
    run(config_of(home, 1))
    make_folder(home / "photos", {"red": 30}, seed=5)
    with pytest.raises(ConfigError, match="images of study photos have changed"):
        run(config_of(home, 2))


def test_an_equal_setting_is_not_trained_again(home: Path) -> None:
    (home / "study.toml").write_text("[space]\nfreeze_depth = {choices = [4, 5]}\n")
    config = config_of(home, 5, 'search.sampler="random"', 'search.pruner="none"', "base_lr=0.001")
    outcome = run(config)
    assert outcome.stopped_because == "space exhausted"
    rows = rows_of(home)
    trained = [row for row in rows if row.epochs_done]
    repeated = [row for row in rows if row.origin.startswith("same as")]
    assert len(trained) == 2
    assert len({row.config_hash for row in trained}) == 2
    for row in repeated:
        original = trained[int(row.origin.rpartition(" ")[2])]
        assert (row.value, row.score, row.state) == (
            original.value,
            original.score,
            original.state,
        )


def test_a_diverging_trial_fails_with_its_reason_and_the_study_goes_on(home: Path) -> None:
    (home / "study.toml").write_text("[space]\nbase_lr = {choices = [1e-3, 1e30]}\n")
    config = config_of(home, 2, 'search.sampler="grid"', "freeze_depth=5")
    outcome = run(config)
    assert (outcome.counts.complete, outcome.counts.failed) == (1, 1)
    (failed,) = [row for row in rows_of(home) if row.state == "failed"]
    assert failed.reason is not None
    assert failed.reason.startswith("diverged: the training loss is no longer finite")


def test_patience_ends_a_study_that_does_not_improve(home: Path) -> None:
    outcome = run(config_of(home, 50, "study.patience=2", 'search.pruner="none"'))
    assert outcome.stopped_because == "patience"
    assert outcome.best_number is not None
    assert outcome.counts.finished == outcome.best_number + 3


def test_a_timeout_ends_a_study(home: Path) -> None:
    outcome = run(config_of(home, 5000, "study.timeout=3"))
    assert outcome.stopped_because == "timeout"
    assert 0 < outcome.counts.finished < 5000


def test_a_batch_larger_than_the_data_is_refused_before_any_trial(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size must be <= .* training images, 28"):
        run(config_of(home, 2, "train.batch_size=500"))


def test_weights_are_checked_before_any_trial(home: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        run(config_of(home, 2, 'train.weights="nowhere.pth"'))
    with Record.open(str(home / "s.db")) as store:
        assert store.studies() == []


def test_the_test_split_is_read_once_and_recorded(home: Path) -> None:
    outcome = run(config_of(home, 2))
    with Record.open(str(home / "s.db")) as store:
        options = {"progress": QuietProgress(), "command": "study test photos"}
        row = read_test_split(store, "photos", None, **options)
        assert row.trial_number == outcome.best_number
        assert row.n == 10
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
        again = read_test_split(store, "photos", None, **options)
        assert again == row
        assert len(store.tests(store.study("photos").id)) == 1


def test_a_removed_checkpoint_cannot_be_tested(home: Path) -> None:
    run(config_of(home, 3, "study.keep_checkpoints=1", 'search.pruner="none"'))
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
        gone = next(row.number for row in rows if row.checkpoint is None)
        with pytest.raises(ConfigError, match="must have its checkpoint"):
            read_test_split(store, "photos", gone, progress=QuietProgress(), command="x")


def test_recipes_are_never_pruned(home: Path) -> None:
    run(config_of(home, 9, "train.epochs=4", 'search.pruner="halving"'))
    rows = rows_of(home)
    assert [row.state for row in rows if row.origin.startswith("recipe:")] == ["complete"] * 3
    assert "pruned" in [row.state for row in rows]


def test_the_database_is_untouched_when_it_is_not_ours(home: Path) -> None:
    with sqlite3.connect(home / "s.db") as connection:
        connection.execute("CREATE TABLE theirs (id INTEGER)")
    connection.close()
    before = (home / "s.db").read_bytes()
    with pytest.raises(RecordError, match="another program"):
        run(config_of(home, 1))
    assert (home / "s.db").read_bytes() == before
