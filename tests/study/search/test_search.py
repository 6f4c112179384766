import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna_dashboard import wsgi
from small_study import config_of, make_home, optuna_trials, rows_of, run

from study.config.errors import ConfigError
from study.config.study_config import StudyConfig
from study.execution.progress import QuietProgress
from study.record.frames import read_predictions
from study.record.models import Trial
from study.record.record import Record
from study.search.final_test import test_trials as read_test_split

SPACE = """
[search]
pruner = "halving"
[space]
freeze_depth = {low = 0, high = 5}
base_lr = {low = 1e-3, high = 1.0, log = true}
"""
N_TRIALS = 8


def _config(home: Path, trials: int, *more: str, **flags: object) -> StudyConfig:
    settings = ("train.epochs=5", "study.keep_checkpoints=1", "study.finish=single", *more)
    return config_of(home, trials, *settings, **flags)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search that keeps one checkpoint; tests leave it as it is."""
    home = make_home(tmp_path_factory.mktemp("done"), SPACE, n=24)
    assert run(_config(home, N_TRIALS)).stopped_because == "trials"
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path, SPACE)


@pytest.mark.parametrize("monitor", ["val_loss", "val_acc"])
def test_the_best_trial_and_its_best_epoch_are_those_of_the_monitor(
    home: Path, monitor: str
) -> None:
    outcome = run(_config(home, 4, f"train.monitor={monitor}"))
    with Record(str(home / "s.db")) as store:
        trials = store.trials(store.study("photos").id)
        epochs = [store.epochs(row.id) for row in trials]
        (summary,) = store.studies()
    for row, own in zip(trials, epochs, strict=True):
        best = own[(row.best_epoch or 0) - 1]
        assert best.score == max(epoch.score or 0.0 for epoch in own) == row.score
        assert (row.value, best.is_best) == (best.val_acc, True)
        assert monitor == "val_loss" or row.score == row.value
    complete = [row for row in trials if row.state == "complete"]
    first = max(complete, key=lambda row: (row.score or 0.0, -row.number))
    assert outcome.best == first
    assert (summary.best_number, summary.best_value) == (first.number, first.value)
    (kept,) = (home / "runs" / "photos").glob("trial-*/model.safetensors")
    assert str(kept.parent) == first.checkpoint


def test_recipes_that_wait_are_dropped_where_a_changed_space_lacks_them(home: Path) -> None:
    run(_config(home, 1, "study.time=1e-6"))
    assert [trial.state.name for trial in optuna_trials(home)] == ["WAITING"] * 3
    run(_config(home, 1, "space.freeze_depth=[1, 2]"), allow_changes=True)
    assert [trial.state.name for trial in optuna_trials(home)] == ["FAIL"] * 3 + ["COMPLETE"]
    (row,) = rows_of(home)
    assert (row.origin, row.freeze_depth in (1, 2)) == ("sampler", True)


def test_a_finished_study_runs_nothing_more_and_keeps_what_ranks_its_trials(done: Path) -> None:
    before = rows_of(done)
    assert run(_config(done, N_TRIALS)).stopped_because == "trials"
    with pytest.raises(ConfigError, match="train.monitor must stay val_loss, by which"):
        run(_config(done, 20, "train.monitor=val_acc"), allow_changes=True)
    assert rows_of(done) == before


def test_optunas_tables_agree_with_the_record_and_the_dashboard_reads_them(done: Path) -> None:
    rows, trials = rows_of(done), optuna_trials(done)
    assert [row.origin.partition(":")[0] for row in rows[:4]] == ["recipe"] * 3 + ["sampler"]
    assert "pruned" in [row.state for row in rows[3:]]
    with Record(str(done / "s.db")) as store:
        curves = [{m.epoch: m.val_acc for m in store.epochs(row.id)} for row in rows]
    states = [trial.state.name for trial in trials]
    assert [(trial.number, trial.params, trial.intermediate_values) for trial in trials] == [
        (row.number, row.params, curve) for row, curve in zip(rows, curves, strict=True)
    ]
    assert states == [row.state.upper() for row in rows]
    storage = optuna.storages.RDBStorage(f"sqlite:///{done}/s.db")
    answer: list[str] = []
    environ: dict[str, Any] = {"PATH_INFO": "/api/studies/1", "QUERY_STRING": "after=0"}
    setup_testing_defaults(environ)
    body = b"".join(wsgi(storage)(environ, lambda *head: answer.append(head[0])))
    assert answer == ["200 OK"]
    assert [trial["state"].upper() for trial in json.loads(body)["trials"]] == states


def test_the_test_split_is_read_once_and_needs_the_trials_checkpoint(done: Path) -> None:
    options = {"progress": QuietProgress(), "command": "study test photos"}
    with Record(str(done / "s.db")) as store:
        (kept,) = (trial.number for trial in rows_of(done) if trial.checkpoint)
        assert kept == store.best_trial(store.study("photos")).number
        (row,) = read_test_split(store, "photos", [kept], **options)
        assert (row.trial_number, row.n) == (kept, 10)
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
        ((labels, predicted),) = read_predictions(store, "photos", "test").values()
        assert (labels == predicted).mean() == row.accuracy
        assert read_test_split(store, "photos", [kept], **options) == [row]
        assert store.tests(store.study("photos").id) == [row]
        with pytest.raises(ConfigError, match="must have its checkpoint"):
            read_test_split(store, "photos", [(kept + 1) % N_TRIALS], **options)


def _repeated(home: Path) -> list[Trial]:
    """Check the copies of a study, and return its other trials."""
    rows, own = rows_of(home), []
    for row in rows:
        if not row.origin.startswith("same as "):
            own.append(row)
            continue
        equal = rows[int(row.origin.removeprefix("same as "))]
        assert equal.epochs_done > 0
        assert (row.epochs_done, row.duration_s) == (0, 0.0)
        for name in ("config_hash", "state", "value", "score"):
            assert getattr(row, name) == getattr(equal, name)
    assert len({row.config_hash for row in own}) == len(own)
    return own


def test_a_solved_head_that_is_proposed_again_is_no_trial_of_the_target(home: Path) -> None:
    # A solved head has no learning rate, so all trials of level 5 are one.
    space = "space={freeze_depth=[4, 5], base_lr={low=1e-3, high=1.0, log=true}}"
    outcome = run(_config(home, 6, 'train.head_solver="logistic"', "study.patience=50", space))
    own = _repeated(home)
    assert outcome.stopped_because == "trials"
    assert (outcome.counts.finished, len(own)) == (6, 6)
    assert [row.freeze_depth for row in own].count(5) == 1
    assert len(rows_of(home)) > 6


@pytest.mark.parametrize(
    ("sampler", "base_lr", "n_all"),
    [
        ("random", "[0.1, 0.2, 0.3]", None),
        ("grid", "[0.1, 0.2, 0.3]", 3),
        ("tpe", "{low=0.1, high=1.0}", 8),  # 7 copies in a row
    ],
)
def test_a_study_ends_where_no_setting_is_new(
    sampler: str, base_lr: str, n_all: int | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.search.search._MOST_COPIES", 7 if sampler == "tpe" else 100)
    settings = ('train.head_solver="logistic"', f'search.sampler="{sampler}"')
    space = f"space={{freeze_depth=[5], base_lr={base_lr}}}"
    outcome = run(_config(home, 50, *settings, "search.recipes=false", space))
    assert outcome.stopped_because == "space exhausted"
    assert outcome.counts.finished == len(_repeated(home)) == 1
    assert n_all is None or len(rows_of(home)) == n_all


def test_patience_and_timeout_end_a_study(home: Path) -> None:
    outcome = run(_config(home, 50, "study.patience=2", 'search.pruner="none"'))
    assert outcome.stopped_because == "patience"
    assert outcome.best is not None
    assert outcome.counts.finished == outcome.best.number + 3
    later = run(_config(home, 50, "study.time=1e-3", 'search.pruner="none"'))
    assert (later.stopped_because, later.counts) == ("timeout", outcome.counts)


def test_recipes_that_a_killed_start_did_not_queue_are_queued(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = optuna.Study.enqueue_trial

    def dies(study: optuna.Study, *args: Any, **more: Any) -> None:
        if study.trials:
            raise KeyboardInterrupt
        whole(study, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", dies)
        run(_config(home, 1))
    assert len(optuna_trials(home)) == 1
    run(_config(home, 1))
    origins = [trial.user_attrs["origin"] for trial in optuna_trials(home)]
    assert len(origins) == len(set(origins)) == 3
