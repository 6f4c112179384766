"""What Optuna's tables hold after a run; other programs read them."""

import json
import sqlite3
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna_dashboard import wsgi
from small_study import config_of, make_home, optuna_trials, rows_of, run

from study.record.record import Record


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path, n=12)


def _run(home: Path, trials: int) -> None:
    run(config_of(home, trials, 'search.pruner="halving"'))


def _agree(home: Path) -> None:
    """Assert that a reader of our record and one of Optuna's tables see the same trials."""
    trials = optuna_trials(home)
    rows = rows_of(home)
    with Record.open(str(home / "s.db")) as store:
        epochs = {row.number: store.epochs(row.id) for row in rows}
    names = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    for row in rows:
        trial = trials[row.number]
        assert (trial.params, trial.state.name) == (row.params, names[row.state])
        if not row.origin.startswith("same as"):
            values = {m.epoch + 1: m.val_acc for m in epochs[row.number]}
            assert trial.intermediate_values == values
            best = max(epochs[row.number], key=lambda m: m.ranked_by, default=None)
            assert row.value == (best.val_acc if best else None)


def test_optunas_tables_agree_with_the_record_and_the_dashboard_reads_them(home: Path) -> None:
    _run(home, 6)
    _agree(home)
    storage = optuna.storages.RDBStorage(f"sqlite:///{home}/s.db")
    answer: list[str] = []
    environ: dict[str, Any] = {"PATH_INFO": "/api/studies/1", "QUERY_STRING": "after=0"}
    setup_testing_defaults(environ)
    body = b"".join(wsgi(storage)(environ, lambda *head: answer.append(head[0])))
    assert answer == ["200 OK"]
    shown = json.loads(body)["trials"]
    assert [trial["state"].upper() for trial in shown] == [
        trial.state.name for trial in optuna_trials(home)
    ]
    with Record.open(str(home / "s.db")) as store:
        store.delete_study("photos")
    with sqlite3.connect(home / "s.db") as connection:
        assert connection.execute("SELECT * FROM trials").fetchall() == []
    connection.close()


def test_recipes_that_a_killed_start_did_not_queue_are_queued(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "study.toml").write_text("[space]\nfreeze_depth = {low = 0, high = 5}\n")
    whole = optuna.Study.enqueue_trial
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def dies(study: optuna.Study, *args: Any, **more: Any) -> None:
            if study.trials:
                raise KeyboardInterrupt
            whole(study, *args, **more)

        patch.setattr(optuna.Study, "enqueue_trial", dies)
        _run(home, 1)
    assert len(optuna_trials(home)) == 1
    _run(home, 1)
    origins = [trial.user_attrs["origin"] for trial in optuna_trials(home)]
    assert len(origins) == len(set(origins)) == 3
