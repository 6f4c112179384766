"""What a process leaves that is killed or stopped, and what the next start makes of it."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState
from small_study import (
    SETTINGS,
    Listener,
    Reacts,
    config_of,
    figures_of,
    make_home,
    optuna_trials,
    rows_of,
    run,
)

from command_line import start
from study.config.study_config import StudyConfig
from study.execution import trial_engine
from study.execution.progress import StepDone
from study.record.record import Record

EPOCHS = "train.epochs=4"
# In the second epoch of three steps. The argument: home.
KILLED_IN_AN_EPOCH = """
import os, signal, sys
from pathlib import Path
from core.training import resume
from small_study import config_of, run

saved = 0
whole = resume.TrainingState.save

def save_and_die(state, *args):
    global saved
    whole(state, *args)
    saved += 1
    if saved == 6:
        os.kill(os.getpid(), signal.SIGKILL)

resume.TrainingState.save = save_and_die
resume._EVERY_S = resume._LEAST_COST_S = 0.0
resume._MOST_SHARE = 1e9
home = Path(sys.argv[1])
run(config_of(home, 2, "train.epochs=4"))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home where the study was not interrupted."""
    home = make_home(tmp_path_factory.mktemp("whole"))
    run(config_of(home, 2, EPOCHS))
    return home


def _assert_equal_studies(home: Path, other: Path) -> None:
    """Assert that two studies have the same trials, epochs and reported values."""

    def found(home: Path) -> list[tuple[object, ...]]:
        return [
            (row.number, row.state, row.params, row.value, row.origin, row.epochs_done,
             figures_of(home, row.number), trial.state, trial.value, trial.intermediate_values)
            for row, trial in zip(rows_of(home), optuna_trials(home), strict=True)
        ]  # fmt: skip

    assert found(home) == found(other)


@pytest.mark.slow
def test_a_trial_killed_in_an_epoch_is_continued_and_equals_the_uninterrupted_one(
    home: Path, whole: Path
) -> None:
    places = [str(Path(__file__).parents[k]) for k in (2, 3)]  # tests, and the project
    path = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED_IN_AN_EPOCH, str(home)]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [trial.state for trial in optuna_trials(home)][0] is TrialState.RUNNING
    assert (home / "runs" / "photos" / "state" / "trial-0000.pt").is_file()
    listener = Listener()
    outcome = run(config_of(home, 2, EPOCHS), progress=listener)
    assert outcome.counts.finished == 2
    assert any("continued after epoch" in text for text in listener.notes)
    _assert_equal_studies(home, whole)
    assert not list((home / "runs" / "photos" / "state").iterdir())


_MACHINES = itertools.count()


class _Killed(BaseException):
    """Stands in for a kill: nothing of ours catches it, and nothing more is written."""


def _dies_here(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch, method: str, owner: type = Record
) -> None:
    """Run a study in this process, on another machine as it seems, until it dies."""

    def dies(*_: object, **__: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr("socket.gethostname", lambda: f"elsewhere {next(_MACHINES)}")
        patch.setattr(owner, method, dies)
        patch.setattr(Record, "end_run", lambda *_: None)
        run(config, take_over=True)


def test_a_trial_killed_between_its_last_two_commits_is_reported_and_counted_once(
    home: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(home, 2, EPOCHS)
    _dies_here(config, monkeypatch, "tell")
    assert optuna_trials(home)[0].state is TrialState.RUNNING
    ended = rows_of(home)[0].ended_at
    outcome = run(config, take_over=True)
    assert (outcome.counts.finished, outcome.counts.complete) == (2, 2)
    assert rows_of(home)[0].ended_at == ended
    _assert_equal_studies(home, whole)


def test_a_solved_head_killed_between_its_last_two_commits_is_reported(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(home, 1, EPOCHS, 'train.head_solver="logistic"')
    _dies_here(config, monkeypatch, "tell")
    assert run(config, take_over=True).counts.complete == 1
    (trial,), (row,) = optuna_trials(home), rows_of(home)
    assert trial.value == row.value is not None


@pytest.mark.parametrize(
    ("owner", "method"),
    [(trial_engine.TrialEngine, "_enter"), (Record, "add_epoch"), (Record, "end_trial")],
)
def test_a_trial_without_a_state_is_failed_and_its_settings_run_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    config = config_of(home, 1)
    _dies_here(config, monkeypatch, method, owner)
    assert [trial.state for trial in optuna_trials(home)][0] is TrialState.RUNNING
    shutil.rmtree(home / "runs" / "photos" / "state", ignore_errors=True)  # from a slow epoch
    listener = Listener()
    outcome = run(config, take_over=True, progress=listener)
    assert (outcome.counts.finished, outcome.counts.running) == (1, 0)
    first, again = optuna_trials(home)
    assert (first.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert (again.params, again.user_attrs["origin"]) == (first.params, "retry of 0")
    assert "The settings of trial 0 run again." in listener.notes
    assert [path.name for path in (home / "runs" / "photos").glob("trial-*")] == ["trial-0001"]


def test_the_checkpoint_of_another_database_in_the_same_folder_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(home, 1))
    other = config_of(home, 1, EPOCHS, **{"study.storage": str(home / "other.db")})
    _dies_here(other, monkeypatch, "_enter", trial_engine.TrialEngine)
    run(other, take_over=True)
    assert len(list((home / "runs" / "photos").glob("trial-*/model.safetensors"))) == 2


def test_settings_that_a_changed_space_lacks_are_dropped_and_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _dies_here(config_of(home, 1), monkeypatch, "_enter", trial_engine.TrialEngine)
    listener, space = Listener(), "space.base_lr={low=0.2, high=0.5, log=true}"
    run(config_of(home, 1, space), take_over=True, allow_changes=True, progress=listener)
    assert [trial.state.name for trial in optuna_trials(home)] == ["FAIL", "COMPLETE"]
    (row,) = rows_of(home)
    assert (row.origin, 0.2 <= row.params["base_lr"] <= 0.5) == ("sampler", True)
    dropped = "Dropped are the settings of trial 0: they lie outside"
    assert any(text.startswith(dropped) for text in listener.notes)


@pytest.mark.parametrize("strategy", ["sampler", "plan"])
def test_settings_that_kill_the_process_run_three_more_times_at_most(
    home: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    space = ["space.freeze_depth={low=4, high=5}"] if strategy == "plan" else []
    config = config_of(home, 1, *space, **{"search.strategy": strategy})
    for _ in range(6):
        _dies_here(config, monkeypatch, "add_epoch")
    params = [str(row.params) for row in rows_of(home)]
    assert [params.count(text) for text in dict.fromkeys(params)] == [4, 2]


def test_a_stopped_trial_is_continued_under_its_number(home: Path, whole: Path) -> None:
    in_an_epoch = Reacts(
        lambda event: isinstance(event, StepDone) and event.epochs > 1 and event.epochs % 1 > 0,
        lambda: signal.raise_signal(signal.SIGINT),
    )
    outcome = run(config_of(home, 2, EPOCHS), progress=in_an_epoch)
    assert (outcome.stopped_because, outcome.counts.finished) == ("interrupted", 0)
    (paused,) = optuna_trials(home)
    assert (paused.state, paused.user_attrs["paused"]) == (TrialState.RUNNING, True)
    assert run(config_of(home, 2, EPOCHS)).counts.finished == 2
    assert optuna_trials(home)[0].user_attrs["paused"] is False
    _assert_equal_studies(home, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_the_command_line_stops_at_once_and_says_so(number: str, status: int, home: Path) -> None:
    sets = [word for text in (*SETTINGS, "train.epochs=3000") for word in ("--set", text)]
    process = start(home, "run", "--config", "study.toml", "--data", "photos", "--json", *sets)
    assert process.stdout is not None
    next(line for line in process.stdout if json.loads(line)["event"] == "epoch")
    process.send_signal(signal.Signals[f"SIG{number}"])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status
    ended = [json.loads(line) for line in out.splitlines() if '"trial_ended"' in line]
    assert [(e["state"], e["reason"]) for e in ended] == [("stopped", "interrupted")]
    with Record(str(home / "studies.db")) as record:
        assert record.runs(record.study("photos").id)[0].outcome == "interrupted"
        assert (home / "frostline-runs" / "photos" / "state" / "trial-0000.pt").is_file()
