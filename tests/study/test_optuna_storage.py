import json
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from optuna_dashboard import wsgi

from study.ledger import Ledger
from study.optuna_storage import (
    delete_optuna_study,
    open_optuna_storage,
    write_reports,
    write_trial,
)
from study.samplers import make_pruner

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {
    "base_lr": FloatDistribution(1e-4, 1e-1, log=True),
    "backbone": CategoricalDistribution(("a", "b", None, True)),
    "freeze_depth": IntDistribution(0, 5),
}
NOW = datetime(2026, 3, 29, 2, 30)


def _trial(state: TrialState, **facts: Any) -> optuna.trial.FrozenTrial:
    params = {"base_lr": 0.01, "backbone": None, "freeze_depth": 3}
    trial = create_trial(
        state=state,
        params=params,
        distributions=SPACE,
        user_attrs={"origin": "recipe:x", "reruns": 1},
        system_attrs={"completed_rung_0": 0.5, "text": "ä" * 3000},
        **facts,
    )
    trial.datetime_start = NOW
    trial.datetime_complete = NOW if state.is_finished() else None
    return trial


TRIALS = {
    "complete": _trial(TrialState.COMPLETE, value=0.5, intermediate_values={1: 0.1, 2: 0.5}),
    "infinite": _trial(TrialState.COMPLETE, value=float("-inf")),
    "pruned": _trial(TrialState.PRUNED, value=0.1, intermediate_values={1: 0.1}),
    "failed": _trial(TrialState.FAIL),
    "running": _trial(
        TrialState.RUNNING,
        intermediate_values={1: float("nan"), 2: float("inf"), 3: float("-inf"), 4: 1.0},
    ),
}


def _dump(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with sqlite3.connect(path) as connection:
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall()
        rows = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for (name,) in names}
    connection.close()
    return rows


@pytest.mark.parametrize("kinds", [[kind] for kind in TRIALS] + [list(TRIALS)])
def test_every_row_is_the_one_that_optuna_writes(tmp_path: Path, kinds: list[str]) -> None:
    plain = RDBStorage(f"sqlite:///{tmp_path}/plain.db")
    ours = open_optuna_storage(f"{tmp_path}/ours.db")
    for storage in (plain, ours):
        # The second study's trials must count from 0 too.
        optuna.create_study(storage=storage, study_name="x").add_trial(TRIALS["complete"])
        optuna.create_study(storage=storage, study_name="photos")
    key = plain.get_study_id_from_name("photos")
    for kind in kinds:
        theirs = plain.create_new_trial(key, template_trial=TRIALS[kind])
        assert write_trial(ours, key, TRIALS[kind]) == theirs
    assert _dump(tmp_path / "ours.db") == _dump(tmp_path / "plain.db")


def test_reports_are_the_rows_that_optuna_writes(tmp_path: Path) -> None:
    reports = {5: 0.25, 6: float("nan"), 7: float("inf")}
    plain = RDBStorage(f"sqlite:///{tmp_path}/plain.db")
    ours = open_optuna_storage(f"{tmp_path}/ours.db")
    for storage in (plain, ours):
        optuna.create_study(storage=storage, study_name="photos")
        storage.create_new_trial(1, template_trial=TRIALS["running"])
    for step, value in reports.items():
        plain.set_trial_intermediate_value(1, step, value)
    write_reports(ours, 1, reports)
    write_reports(ours, 1, {})
    assert _dump(tmp_path / "ours.db") == _dump(tmp_path / "plain.db")


def test_a_trial_is_written_wholly_or_not_at_all(tmp_path: Path) -> None:
    storage = open_optuna_storage(f"{tmp_path}/s.db")
    optuna.create_study(storage=storage, study_name="photos")
    trial = _trial(TrialState.COMPLETE, value=0.5)
    trial.user_attrs["broken"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_trial(storage, 1, trial)
    assert storage.get_n_trials(1) == 0
    assert write_trial(storage, 1, TRIALS["complete"]) == 1


def test_the_dashboard_reads_what_is_written(tmp_path: Path) -> None:
    storage = open_optuna_storage(f"{tmp_path}/s.db")
    optuna.create_study(storage=storage, study_name="photos", direction="maximize")
    for kind in ("complete", "pruned", "failed", "running"):
        write_trial(storage, 1, TRIALS[kind])
    answer: list[str] = []
    environ: dict[str, Any] = {"PATH_INFO": "/api/studies/1", "QUERY_STRING": "after=0"}
    setup_testing_defaults(environ)
    body = b"".join(wsgi(storage)(environ, lambda *head: answer.append(head[0])))
    assert answer == ["200 OK"]
    told = json.loads(body)
    assert [trial["state"] for trial in told["trials"]] == [
        "Complete", "Pruned", "Fail", "Running",
    ]  # fmt: skip
    assert told["trials"][0]["intermediate_values"] == [
        {"step": 1, "value": 0.1}, {"step": 2, "value": 0.5},
    ]  # fmt: skip
    assert {p["name"]: p["param_external_value"] for p in told["trials"][0]["params"]} == {
        "base_lr": "0.01", "backbone": "None", "freeze_depth": "3",
    }  # fmt: skip


def test_database_is_in_wal_mode_and_waits_for_locks(tmp_path: Path) -> None:
    storage = open_optuna_storage(str(tmp_path / "s.db"))
    with storage.engine.connect() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60000}


def test_deleting_a_study_leaves_the_others(tmp_path: Path) -> None:
    path = str(tmp_path / "s.db")
    for name in ("photos", "other"):
        Ledger(path, name, make_pruner("none", 1))
    delete_optuna_study(path, "photos")
    delete_optuna_study(path, "photos")
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT study_name FROM studies").fetchall()
    connection.close()
    assert rows == [("other",)]
