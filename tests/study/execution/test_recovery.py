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
from small_study import Listener, config_of, figures_of, make_home, optuna_trials, rows_of, run

from core.fit import fit
from study.config.study_config import StudyConfig
from study.execution import trial_engine
from study.execution.progress import Note
from study.record.record import Record

EPOCHS = "train.epochs=4"
# Arguments: home, trials, and after how many saved states the process dies.
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
    if saved == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

resume.TrainingState.save = save_and_die
resume._EVERY_S = resume._LEAST_COST_S = 0.0
resume._MOST_SHARE = 1e9
home = Path(sys.argv[1])
run(config_of(home, int(sys.argv[2]), "train.epochs=4"))
"""
KILLED_BETWEEN_THE_COMMITS = """
import os, sys
from pathlib import Path
from small_study import config_of, run
from study.record.record import Record

whole = Record.tell

def die_at_the_second(store, study_id, number, *args, **more):
    if number == 1:
        os._exit(9)
    whole(store, study_id, number, *args, **more)

Record.tell = die_at_the_second
run(config_of(Path(sys.argv[1]), int(sys.argv[2]), "train.epochs=4"))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


def _dies(script: str, home: Path, *arguments: object) -> None:
    places = [str(Path(__file__).parents[k]) for k in (2, 3)]  # tests, and the project
    path = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, str(home), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode in (9, -signal.SIGKILL), done.stderr


def _assert_equal_studies(home: Path, other: Path) -> None:
    """Assert that two studies have the same trials, epochs and reported values."""
    for a, b in zip(rows_of(home), rows_of(other), strict=True):
        assert (a.number, a.state, a.params, a.value, a.origin, a.epochs_done) == (
            b.number, b.state, b.params, b.value, b.origin, b.epochs_done,
        )  # fmt: skip
        assert figures_of(home, a.number) == figures_of(other, b.number)
    ours, theirs = optuna_trials(home), optuna_trials(other)
    assert [(t.state, t.value, t.intermediate_values) for t in ours] == [
        (t.state, t.value, t.intermediate_values) for t in theirs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("n_saved", [6, 8])  # in the second epoch of three steps, and at its end
def test_a_trial_killed_in_an_epoch_is_continued_and_equals_the_uninterrupted_one(
    home: Path, tmp_path_factory: pytest.TempPathFactory, n_saved: int
) -> None:
    whole = make_home(tmp_path_factory.mktemp("whole"))
    run(config_of(whole, 2, EPOCHS))
    _dies(KILLED_IN_AN_EPOCH, home, 2, n_saved)
    assert [trial.state for trial in optuna_trials(home)][0] is TrialState.RUNNING
    assert (home / "runs" / "photos" / "state" / "trial-0000.pt").is_file()
    listener = Listener()
    outcome = run(config_of(home, 2, EPOCHS), progress=listener)
    assert outcome.counts.finished == 2
    assert any("continued after epoch" in e.text for e in listener.events if isinstance(e, Note))
    _assert_equal_studies(home, whole)
    assert not list((home / "runs" / "photos" / "state").iterdir())


@pytest.mark.slow
def test_a_trial_killed_between_its_last_two_commits_is_reported_and_counted_once(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = make_home(tmp_path_factory.mktemp("whole"))
    run(config_of(whole, 3, EPOCHS))
    _dies(KILLED_BETWEEN_THE_COMMITS, home, 3)
    assert optuna_trials(home)[1].state is TrialState.RUNNING
    ended = rows_of(home)[1].ended_at
    outcome = run(config_of(home, 3, EPOCHS))
    assert (outcome.counts.finished, outcome.counts.complete) == (3, 3)
    assert rows_of(home)[1].ended_at == ended
    _assert_equal_studies(home, whole)


_MACHINES = itertools.count()


class _Killed(BaseException):
    """Stands in for a kill: nothing of ours catches it, and nothing more is written."""


def _dies_here(config: StudyConfig, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Run a study in this process, on another machine as it seems, until it dies."""

    def dies(*_: object, **__: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr("socket.gethostname", lambda: f"elsewhere {next(_MACHINES)}")
        patch.setattr(Record, method, dies)
        patch.setattr(Record, "end_run", lambda *_: None)
        run(config, take_over=True)


@pytest.mark.parametrize("method", ["begin_trial", "add_epoch", "end_trial"])
def test_a_trial_without_a_state_is_failed_and_its_settings_run_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = config_of(home, 1)
    _dies_here(config, monkeypatch, method)
    assert [trial.state for trial in optuna_trials(home)][0] is TrialState.RUNNING
    shutil.rmtree(home / "runs" / "photos" / "state", ignore_errors=True)  # from a slow epoch
    outcome = run(config, take_over=True)
    assert (outcome.counts.finished, outcome.counts.running) == (1, 0)
    first, again = optuna_trials(home)
    assert (first.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert (again.params, again.user_attrs["origin"]) == (first.params, "retry of 0")


def test_settings_that_kill_the_process_run_three_more_times_at_most(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(home, 1)
    for _ in range(6):
        _dies_here(config, monkeypatch, "add_epoch")
    params = [str(row.params) for row in rows_of(home)]
    assert [params.count(text) for text in dict.fromkeys(params)] == [4, 2]


def test_a_stopped_trial_is_continued_under_its_number(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_home(tmp_path_factory.mktemp("whole"))
    run(config_of(whole, 2, EPOCHS))
    asked = 0

    def fit_until_told(*args: object, **options: object):
        def should_stop() -> bool:
            nonlocal asked
            asked += 1
            if asked == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return options["should_stop"]()

        return fit(*args, **{**options, "should_stop": should_stop})

    with monkeypatch.context() as patch:
        patch.setattr(trial_engine, "fit", fit_until_told)
        outcome = run(config_of(home, 2, EPOCHS))
    assert outcome.stopped_because == "interrupted"
    assert optuna_trials(home)[outcome.counts.finished].state is TrialState.RUNNING
    assert run(config_of(home, 2, EPOCHS)).counts.finished == 2
    _assert_equal_studies(home, whole)


@pytest.mark.slow
def test_the_command_line_stops_at_once_and_resumes(home: Path) -> None:
    command = [
        sys.executable, "-m", "study", "run", "--config", str(home / "study.toml"), "--data",
        str(home / "photos"), "--storage", str(home / "s.db"), "--trials", "2", "--json", "--set",
        "train.epochs=3000", "--set", f"data.cache_dir={home / 'cache'}", "--set",
        f"study.output={home / 'runs'}", "--set", "train.backbone=resnet18", "--set",
        "train.weights=none", "--set", "train.image_size=32", "--set", "search.pruner=none",
        "--set", "train.batch_size=8", "--set", "train.head_solver=sgd",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "epoch":
            break
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2, second.stderr
    assert "is being run by process" in second.stderr, second.stderr
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    ended = [json.loads(line) for line in out.splitlines() if '"trial_ended"' in line]
    assert [(e["state"], e["reason"]) for e in ended] == [("stopped", "interrupted")]
    with Record.open(str(home / "s.db")) as record:
        assert record.runs(record.study("photos").id)[0].outcome == "interrupted"
