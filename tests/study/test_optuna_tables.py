"""What Optuna's tables hold after a run, a kill and a resume; other programs read them."""

import json
import sqlite3
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.trial import TrialState
from optuna_dashboard import wsgi

from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.progress import QuietProgress
from study.record.record import Record
from study.search import run_search
from support import make_folder

SETTINGS = [
    'train.backbone="resnet18"',
    'train.weights="none"',
    "train.image_size=32",
    "train.epochs=2",
    "train.batch_size=8",
    'train.device="cpu"',
    'search.pruner="halving"',
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"red": 12, "blue": 12})
    (tmp_path / "study.toml").write_text(
        "[train]\nfreeze_depth = 5\n[space]\nbase_lr = {low = 1e-4, high = 1e-1, log = true}\n"
    )
    return tmp_path


def _config(home: Path, trials: int) -> StudyConfig:
    flags = {
        "data.source": str(home / "photos"),
        "data.cache_dir": str(home / "cache"),
        "study.storage": str(home / "s.db"),
        "study.output": str(home / "runs"),
        "study.trials": trials,
    }
    return load_config(home / "study.toml", SETTINGS, flags)


def _run(home: Path, trials: int) -> None:
    run_search(_config(home, trials), progress=QuietProgress(), command="test")


def _optuna(home: Path) -> optuna.Study:
    return optuna.load_study(study_name="photos", storage=f"sqlite:///{home}/s.db")


def _agree(home: Path) -> None:
    """Assert that a reader of our record and one of Optuna's tables see the same trials."""
    trials = _optuna(home).trials
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
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
        trial.state.name for trial in _optuna(home).trials
    ]
    with Record.open(str(home / "s.db")) as store:
        store.delete_study("photos")
    with sqlite3.connect(home / "s.db") as connection:
        assert connection.execute("SELECT * FROM trials").fetchall() == []
    connection.close()


class _Killed(BaseException):
    """Stands in for a kill: nothing of ours catches it, and nothing more is written."""


@pytest.mark.parametrize("method", ["begin_trial", "add_epoch", "end_trial", "tell"])
def test_a_process_may_die_before_any_write(
    home: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    _run(home, 3)
    with monkeypatch.context() as patch, pytest.raises(_Killed):

        def dies(*_: object, **__: object) -> None:
            raise _Killed

        patch.setattr(Record, method, dies)
        _run(home, 6)
    before = _optuna(home).trials
    assert [trial.state for trial in before[3:]] == [TrialState.RUNNING]
    _run(home, 6)
    trials = _optuna(home).trials
    _agree(home)
    if method == "tell":  # it had ended for us
        assert [trial.state.is_finished() for trial in trials] == [True] * 6
        assert trials[3].state in (TrialState.COMPLETE, TrialState.PRUNED)
    else:
        assert trials[3].state is TrialState.FAIL
        assert trials[4].params == trials[3].params
        assert trials[4].user_attrs["origin"] == "retry of 3"
        assert len(trials) == 7


def test_recipes_that_a_killed_start_did_not_queue_are_queued(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "study.toml").write_text("[space]\nfreeze_depth = {low = 0, high = 5}\n")
    whole = optuna.Study.enqueue_trial
    with monkeypatch.context() as patch, pytest.raises(_Killed):

        def dies(study: optuna.Study, *args: Any, **more: Any) -> None:
            if study.trials:
                raise _Killed
            whole(study, *args, **more)

        patch.setattr(optuna.Study, "enqueue_trial", dies)
        _run(home, 1)
    assert len(_optuna(home).trials) == 1
    _run(home, 1)
    origins = [trial.user_attrs["origin"] for trial in _optuna(home).trials]
    assert len(origins) == len(set(origins)) == 3
