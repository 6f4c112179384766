import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from study.config.errors import ConfigError
from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.progress import QuietProgress
from study.record.database import RecordError
from study.record.frames import read_trials
from study.record.record import Record
from study.runner import identity
from study.search import run_search
from study.test_split import test_study as look_at_test_split
from support import make_folder

SETTINGS = [
    'train.backbone="resnet18"',
    'train.weights="none"',
    "train.image_size=32",
    "train.epochs=2",
    "train.batch_size=8",
    'train.device="cpu"',
]
SPACE = """
[space]
freeze_depth = {low = 0, high = 5}
base_lr = {low = 1e-4, high = 1e-2, log = true}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"red": 24, "blue": 24})
    (tmp_path / "study.toml").write_text(SPACE)
    return tmp_path


def _config(home: Path, trials: int, *settings: str, **flags: object) -> StudyConfig:
    return load_config(
        home / "study.toml",
        [*SETTINGS, *settings],
        {
            "data.source": str(home / "photos"),
            "data.cache_dir": str(home / "cache"),
            "study.storage": str(home / "s.db"),
            "study.output": str(home / "runs"),
            "study.trials": trials,
            **flags,
        },
    )


def _run(config: StudyConfig, **options: object):
    return run_search(config, progress=QuietProgress(), command="test", **options)


def _numbers(home: Path, name: str = "photos") -> list[list[object]]:
    with Record.open(str(home / "s.db")) as store:
        frame = read_trials(store, name)
    columns = ["number", "state", "origin", "value", "params_freeze_depth", "params_base_lr"]
    return frame[columns].values.tolist()


def test_a_study_tries_recipes_first_then_the_sampler_and_keeps_the_best(home: Path) -> None:
    outcome = _run(_config(home, 6, "study.keep_checkpoints=1"))
    assert outcome.stopped_because == "trials"
    rows = _numbers(home)
    assert [row[2].partition(":")[0] for row in rows[:3]] == ["recipe"] * 3
    assert [row[2] for row in rows[3:]] == ["sampler"] * 3
    complete = [row for row in rows if row[1] == "complete"]
    best = {row[0]: row[3] for row in complete}
    assert outcome.best_value == best[outcome.best_number]
    assert outcome.checkpoint is not None
    assert (outcome.checkpoint / "model.safetensors").is_file()
    assert len(list((home / "runs" / "photos").glob("trial-*"))) == 1
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{home}/s.db")
    assert [t.params["base_lr"] for t in study.trials] == [row[5] for row in rows]
    assert all(t.intermediate_values for t in study.trials)


@pytest.mark.parametrize("monitor", ["val_loss", "val_acc"])
def test_the_best_trial_and_its_best_epoch_are_those_of_the_monitor(
    home: Path, monitor: str
) -> None:
    outcome = _run(_config(home, 6, f"train.monitor={monitor}", 'search.pruner="none"'))
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
    _run(_config(home, 5, **{"study.name": "whole"}))
    for n in (2, 4, 5):
        outcome = _run(_config(home, n, **{"study.name": "cut"}))
    assert outcome.counts.finished == 5
    assert _numbers(home, "cut") == _numbers(home, "whole")


def test_a_finished_study_runs_nothing_more(home: Path) -> None:
    _run(_config(home, 3))
    before = _numbers(home)
    assert _run(_config(home, 3)).stopped_because == "trials"
    assert _numbers(home) == before


def test_a_changed_configuration_is_refused_with_the_difference(home: Path) -> None:
    _run(_config(home, 1))
    with pytest.raises(ConfigError, match=r"train.epochs: 2 -> 3"):
        _run(_config(home, 2, "train.epochs=3"))
    assert len(_numbers(home)) == 1
    assert _run(_config(home, 2, "train.epochs=3"), allow_changes=True).counts.finished == 2


def test_a_study_keeps_what_ranks_its_trials(home: Path) -> None:
    _run(_config(home, 1, "train.monitor=val_acc"))
    with pytest.raises(
        ConfigError, match=r"train.monitor must stay val_acc, by which study photos"
    ):
        _run(_config(home, 2), allow_changes=True)
    assert _run(_config(home, 2, "train.monitor=val_acc")).counts.finished == 2


def test_a_copy_of_a_trial_has_its_score(home: Path) -> None:
    (home / "study.toml").write_text("[space]\nworkers = {choices = [0, 1]}\n")
    config = _config(home, 2, 'search.sampler="grid"', "freeze_depth=5")
    _run(config)
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
        assert rows[1].origin == "same as 0"
        assert (rows[1].score, rows[1].value) == (rows[0].score, rows[0].value)


def test_changed_pictures_are_refused(home: Path) -> None:
    _run(_config(home, 1))
    make_folder(home / "photos", {"red": 30}, seed=5)
    with pytest.raises(ConfigError, match="pictures of study photos have changed"):
        _run(_config(home, 2))


def test_an_equal_setting_is_not_trained_again(home: Path) -> None:
    (home / "study.toml").write_text("[space]\nfreeze_depth = {choices = [4, 5]}\n")
    config = _config(home, 5, 'search.sampler="random"', 'search.pruner="none"', "base_lr=0.001")
    outcome = _run(config)
    assert outcome.stopped_because == "space exhausted"
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
        trained = [row for row in rows if row.epochs_done]
        repeated = [row for row in rows if row.origin.startswith("same as")]
    assert len(trained) == 2
    assert len({row.config_hash for row in trained}) == 2
    for row in repeated:
        original = trained[int(row.origin.rpartition(" ")[2])]
        assert (row.value, row.state) == (original.value, original.state)


def test_a_diverging_trial_fails_with_its_reason_and_the_study_goes_on(home: Path) -> None:
    (home / "study.toml").write_text("[space]\nbase_lr = {choices = [1e-3, 1e30]}\n")
    config = _config(home, 2, 'search.sampler="grid"', "freeze_depth=5")
    outcome = _run(config)
    assert (outcome.counts.complete, outcome.counts.failed) == (1, 1)
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
    (failed,) = [row for row in rows if row.state == "failed"]
    assert failed.reason is not None
    assert failed.reason.startswith("diverged: the training loss is no longer finite")


def test_patience_ends_a_study_that_does_not_improve(home: Path) -> None:
    outcome = _run(_config(home, 50, "study.patience=2", 'search.pruner="none"'))
    assert outcome.stopped_because == "patience"
    assert outcome.best_number is not None
    assert outcome.counts.finished == outcome.best_number + 3


def test_a_timeout_ends_a_study(home: Path) -> None:
    outcome = _run(_config(home, 5000, "study.timeout=3"))
    assert outcome.stopped_because == "timeout"
    assert 0 < outcome.counts.finished < 5000


def test_a_batch_larger_than_the_data_is_refused_before_any_trial(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size must be <= .* training pictures, 28"):
        _run(_config(home, 2, "train.batch_size=500"))


def test_weights_are_checked_before_any_trial(home: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        _run(_config(home, 2, 'train.weights="nowhere.pth"'))
    with Record.open(str(home / "s.db")) as store:
        assert store.studies() == []


def test_the_test_split_is_read_once_and_recorded(home: Path) -> None:
    outcome = _run(_config(home, 2))
    with Record.open(str(home / "s.db")) as store:
        options = {"progress": QuietProgress(), "command": "study test photos"}
        row = look_at_test_split(store, "photos", None, **options)
        assert row.trial_number == outcome.best_number
        assert row.n == 10
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
        again = look_at_test_split(store, "photos", None, **options)
        assert again == row
        assert len(store.tests(store.study("photos").id)) == 1


def test_a_removed_checkpoint_cannot_be_tested(home: Path) -> None:
    _run(_config(home, 3, "study.keep_checkpoints=1", 'search.pruner="none"'))
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
        gone = next(row.number for row in rows if row.checkpoint is None)
        with pytest.raises(ConfigError, match="must have its checkpoint"):
            look_at_test_split(store, "photos", gone, progress=QuietProgress(), command="x")


def test_recipes_are_never_pruned(home: Path) -> None:
    _run(_config(home, 9, "train.epochs=4", 'search.pruner="halving"'))
    rows = _numbers(home)
    assert [row[1] for row in rows if str(row[2]).startswith("recipe:")] == ["complete"] * 3
    assert "pruned" in [row[1] for row in rows]


def test_identity_leaves_out_what_does_not_change_the_numbers(home: Path) -> None:
    plain = _config(home, 1).train
    workers = _config(home, 1, "train.workers=3").train
    seed = _config(home, 1, "train.seed=3").train
    assert identity(plain) == identity(workers)
    assert identity(plain) != identity(seed)


def _command(home: Path, trials: int, *more: str) -> list[str]:
    settings = [part for text in SETTINGS for part in ("--set", text)]
    return [
        sys.executable, "-m", "study", "run", "--config", str(home / "study.toml"),
        "--data", str(home / "photos"), "--trials", str(trials), "--storage", str(home / "s.db"),
        *settings, "--set", f"data.cache_dir={home / 'cache'}", "--set",
        f"study.output={home / 'runs'}", *more,
    ]  # fmt: skip


def _start(home: Path, trials: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(home, trials, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for_event(process: subprocess.Popen[str], event: str, trial: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        told = json.loads(line)
        if told["event"] == event and told.get("trial") == trial:
            return
    raise AssertionError(f"the study ended before {event} of trial {trial}")


# Long enough to be killed in the middle, and never run to its end.
LONG = ("--set", "train.epochs=400", "--set", "search.pruner=none", "--json")


@pytest.mark.slow
def test_a_killed_study_loses_nothing_and_runs_the_cut_trial_again(home: Path) -> None:
    process = _start(home, 4, "--set", "search.pruner=none", "--json")
    _wait_for_event(process, "epoch", 2)
    process.kill()
    process.communicate()
    done = subprocess.run(
        _command(home, 4, "--set", "search.pruner=none"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Trial 2 was cut short when its process died" in done.stdout
    with Record.open(str(home / "s.db")) as store:
        rows = store.trials(store.study("photos").id)
    states = [(row.number, row.state, row.reason) for row in rows]
    assert states[2] == (2, "failed", "killed")
    assert sum(row.state == "complete" for row in rows) == 4
    (again,) = [row for row in rows if row.origin == "retry of 2"]
    assert again.number == 3
    assert again.params == rows[2].params
    assert again.config_hash == rows[2].config_hash
    assert again.state == "complete"
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{home}/s.db")
    running = [t for t in study.trials if t.state is optuna.trial.TrialState.RUNNING]
    assert running == []
    assert len(study.trials) == 5


@pytest.mark.slow
def test_one_interrupt_finishes_the_record_and_leaves(home: Path) -> None:
    process = _start(home, 4, *LONG)
    _wait_for_event(process, "epoch", 0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    with Record.open(str(home / "s.db")) as store:
        study = store.study("photos").id
        (row,) = store.trials(study)
        (run,) = store.runs(study)
    assert (row.state, row.reason) == ("failed", "interrupted")
    assert run.outcome == "interrupted"
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{home}/s.db")
    waiting = [t for t in study.trials if t.state is optuna.trial.TrialState.WAITING]
    assert waiting[0].user_attrs["origin"] == "retry of 0"


@pytest.mark.slow
def test_a_second_process_on_a_running_study_is_refused(home: Path) -> None:
    process = _start(home, 4, *LONG)
    _wait_for_event(process, "epoch", 0)
    second = subprocess.run(_command(home, 9, *LONG), capture_output=True, text=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert second.returncode == 2
    assert "is being run by process" in second.stderr
    assert "Traceback" not in second.stderr
    with Record.open(str(home / "s.db")) as store:
        assert store.study("photos").config["study"]["trials"] == 4


def test_the_database_is_untouched_when_it_is_not_ours(home: Path) -> None:
    with sqlite3.connect(home / "s.db") as connection:
        connection.execute("CREATE TABLE theirs (id INTEGER)")
    connection.close()
    before = (home / "s.db").read_bytes()
    with pytest.raises(RecordError, match="another program"):
        _run(_config(home, 1))
    assert (home / "s.db").read_bytes() == before
