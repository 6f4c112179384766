import contextlib
import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import sqlalchemy

from core.metrics import EpochMetrics
from study.record.database import RecordError
from study.record.frames import (
    read_confusion,
    read_epochs,
    read_misclassified,
    read_predictions,
    read_trials,
)
from study.record.models import Base, Counts, Misclassified, Trial
from study.record.record import Record
from support import distributions_of
from tests.reports.studies import Plan, enter

DATA = {"source": "folder:x", "classes": ["a", "b"], "fingerprint": "f", "n_train": 8}


def _epoch(epoch: int, acc: float, is_best: bool = True) -> EpochMetrics:
    return EpochMetrics(
        epoch, 0.7, 0.6, acc, acc, acc, 0.01, 0.1, 100.0, 0.1, 1.0, 0.2, 10**9, 32, is_best
    )


def _study(store: Record, name: str = "photos") -> tuple[int, int]:
    study = store.create_study(name, {"study": {"name": name}}, DATA, {"torch": "2"})
    return study, store.begin_run(study, command="test", device="cpu", versions={})


def _enter(
    store: Record, study: int, run: int, *curve: float, state: str = "running", lr: float = 0.1
) -> Trial:
    plan = Plan({"base_lr": lr, "backbone": "resnet18"}, curve, state, config_hash="h")
    return enter(store, study, run, plan, distributions_of(plan.params))


@pytest.fixture
def store(tmp_path: Path) -> Record:
    return Record(str(tmp_path / "s.db"), create=True)


def test_record_returns_what_was_written_joined_with_optuna(store: Record) -> None:
    study, run = _study(store)
    trial = _enter(store, study, run, 0.8)
    store.add_epoch(trial, _epoch(2, 0.5, is_best=False), 2.0)
    running = store.trial(study, 0)
    assert (running.state, running.value, running.epochs_done) == ("running", 0.8, 2)
    assert (running.seed, running.backbone, running.freeze_depth) == (7, "resnet18", 0)
    store.end_trial(trial, "complete")
    row = store.trial(study, 0)
    assert (row.state, row.value, row.best_epoch) == ("complete", 0.8, 1)
    assert row.params == {"base_lr": 0.1, "backbone": "resnet18"}
    assert row.ended_at is not None and row.ended_at >= row.started_at
    assert store.epochs(trial.id)[1] == _epoch(2, 0.5, is_best=False)
    assert store.study("photos").data == DATA


def test_frames_have_a_row_per_trial_and_per_epoch(store: Record) -> None:
    study, run = _study(store)
    assert read_trials(store, "photos").empty
    assert "val_acc" in read_epochs(store, "photos").columns
    for number in range(3):
        _enter(store, study, run, *[0.5] * (number + 1), lr=0.1 * (number + 1))
    trials, epochs = read_trials(store, "photos"), read_epochs(store, "photos")
    assert trials["number"].tolist() == [0, 1, 2]
    assert trials["params_base_lr"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert trials["params_backbone"].tolist() == ["resnet18"] * 3
    assert epochs["number"].tolist() == [0, 1, 1, 2, 2, 2]
    assert epochs["epoch"].tolist() == [1, 1, 2, 1, 2, 3]
    assert epochs["val_acc"].tolist() == [0.5] * 6


def test_trials_are_counted_by_state(store: Record) -> None:
    study, run = _study(store)
    for state, *curve in (("complete", 0.5), ("complete", 0.9), ("pruned", 0.95), ("failed",)):
        _enter(store, study, run, *curve, state=state)
    _enter(store, study, run)
    _study(store, "empty")
    newest, oldest = store.studies()
    assert (newest.name, newest.best_value, newest.counts) == ("empty", None, Counts())
    counts = dataclasses.astuple(oldest.counts)[:4]
    assert counts == (2, 1, 1, 1)
    assert (oldest.best_value, oldest.best_number) == (0.9, 1)


def test_predictions_of_a_trial_replace_earlier_ones(store: Record) -> None:
    study, run = _study(store)
    trial = _enter(store, study, run).id
    row = Misclassified(
        trial_id=trial, split="val", rank=0, path="a/1.jpg", label="a", predicted="b",
        probability=0.1, thumbnail=b"jpeg",
    )  # fmt: skip
    assert read_confusion(store, "photos", 0) is None
    for labels in ([0, 1, 1], [1, 1, 0]):
        store.add_misclassified(trial, [dataclasses.replace(row)])
        store.add_predictions(trial, "val", labels, [0, 0, 1])
    store.add_predictions(trial, "test", [70_000], [0])
    ((true, predicted),) = read_predictions(store, "photos", "test").values()
    assert (true.tolist(), predicted.tolist()) == ([70_000], [0])
    assert read_misclassified(store, "photos", 0) == [row]
    confusion = read_confusion(store, "photos", 0)
    assert confusion is not None
    assert confusion.tolist() == [[0, 1], [2, 0]]


def test_delete_study_removes_all_of_it_and_nothing_else(store: Record) -> None:
    for name in ("photos", "other"):
        trial = _enter(store, *_study(store, name), 0.5)
        store.add_predictions(trial.id, "val", [0], [0])
    store.delete_study("photos")
    assert [row.name for row in store.studies()] == ["other"]
    assert len(read_epochs(store, "other")) == 1
    with store.engine.connect() as connection:
        for table in Base.metadata.sorted_tables:
            n = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table))
            assert n.scalar() in (0, 1), table.name


def test_taken_and_missing_names_and_numbers_are_refused(store: Record) -> None:
    study, run = _study(store)
    with pytest.raises(RecordError, match=r"must be new, but .* has a study photos\. Use another"):
        _study(store)
    with pytest.raises(RecordError, match="there is no study photo in .* There is: photos"):
        store.study("photo")
    with pytest.raises(RecordError, match="it has none yet"):
        store.trial(study, 5)
    _enter(store, study, run)
    with pytest.raises(RecordError, match="they go from 0 to 0"):
        store.trial(study, 5)


def test_begin_run_lets_one_of_many_processes_in(store: Record) -> None:
    # Threads stand in for processes: this process is alive, so each must refuse the others.
    study = store.create_study("photos", {}, DATA, {})
    barrier = Barrier(6)

    def begins(_: int) -> bool:
        barrier.wait()
        try:
            store.begin_run(study, command="x", device="cpu", versions={})
        except RecordError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(begins, range(6))) == 1
    assert len(store.runs(study)) == 1
    with pytest.raises(RecordError, match=r"is being run by process \d+ on .* another --name"):
        store.begin_run(study, command="x", device="cpu", versions={})


def test_trial_of_a_dead_process_is_interrupted_and_its_study_is_free(store: Record) -> None:
    study, run = _study(store)
    _enter(store, study, run)
    with store.engine.begin() as connection:  # another process has its number now
        connection.execute(sqlalchemy.text("UPDATE frostline_runs SET pid_started = 1"))
    assert [row.state for row in store.trials(study)] == ["interrupted"]
    (summary,) = store.studies()
    assert (summary.counts.running, summary.counts.interrupted) == (0, 1)
    store.begin_run(study, command="y", device="cpu", versions={})
    assert [row.state for row in store.trials(study)] == ["running"]
    dead, alive = store.runs(study)
    assert (dead.outcome, dead.ended_at is None, alive.ended_at) == ("lost", False, None)


def test_begin_run_takes_over_another_machine_only_when_asked(store: Record) -> None:
    study, run = _study(store)
    with store.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE frostline_runs SET host = 'elsewhere'"))
    with pytest.raises(RecordError, match="If that machine is gone, add --take-over"):
        store.begin_run(study, command="x", device="cpu", versions={})
    second = store.begin_run(study, command="x", device="cpu", versions={}, take_over=True)
    store.end_run(second, "trials")
    assert store.begin_run(study, command="x", device="cpu", versions={}) > second > run  # once


def test_opening_a_database_again_leaves_the_locks_of_this_process(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    read = (
        f"import sqlite3; c = sqlite3.connect({str(path)!r}); "
        "print(c.execute('SELECT name FROM frostline_studies').fetchall()); c.close()"
    )

    def names_elsewhere() -> str:
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, check=True)
        return done.stdout.decode()

    with Record(str(path), create=True) as store:
        _study(store, "first")
        Record(str(path)).close()
        assert "first" in names_elsewhere()  # the last to leave, were our locks gone
        _study(store, "second")
        assert "second" in names_elsewhere()


NEWER = "CREATE TABLE frostline_schema AS SELECT 99 AS number"
OLDER = "CREATE TABLE frostline_info (key TEXT, value TEXT)"


@pytest.mark.parametrize(
    ("storage", "content", "message"),
    [
        ("s.db", "this is no database, but it is long enough", "file is not a database"),
        ("s.db", "CREATE TABLE photos (id INTEGER)", r"to another program \(tables photos\)"),
        ("s.db", NEWER, "written by a newer version of Frostline, .* another with --storage"),
        ("s.db", OLDER, "written by an older version of Frostline, .* another with --storage"),
        (".", None, "must be a file, but .* is a folder"),
        ("nowhere/s.db", None, "must lie in a folder that exists"),
        ("sqlite://", None, "must be a file, but got an SQLite database in memory"),
        ("nonsense://x", None, "cannot be opened: Can't load plugin"),
    ],
)
def test_open_refuses_what_is_not_ours_and_leaves_it_unchanged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    content: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("s.db")
    if content and content.startswith("CREATE"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(content)
    elif content:
        path.write_text(content)
    before = content and path.read_bytes()
    with pytest.raises(RecordError, match=message):
        Record(storage, create=True)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_full_disk_is_named_and_loses_nothing(
    tmp_path: Path, limit_files: Callable[[int], None]
) -> None:
    path = str(tmp_path / "s.db")
    with Record(path, create=True) as store:
        _study(store, "first")
    limit_files(300_000)
    words = r"s\.db cannot be written: .* Free space on its disk"
    with pytest.raises(RecordError, match=words), Record(path) as store:
        for number in range(1000):
            _study(store, f"study {number}")
    limit_files(-1)
    with Record(path) as store:
        assert store.study("study 0").data == DATA
        _study(store, "last")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("ALTER TABLE frostline_trials RENAME score TO x", "is damaged: no such column"),
        ("DROP TABLE frostline_epochs", "lacks the tables frostline_epochs"),
        ("UPDATE alembic_version SET version_num = 'x'", "cannot be read: The runtime optuna"),
    ],
)
def test_a_damaged_database_is_named(store: Record, damage: str, message: str) -> None:
    _study(store)
    store.close()
    path = str(store.engine.url.database)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(damage)
    with pytest.raises(RecordError, match=message), Record(path) as damaged:
        damaged.trials(damaged.study("photos").id)


def test_an_error_that_is_not_the_databases_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="ours"), Record(str(tmp_path / "s.db"), create=True):
        raise KeyError("ours")


@pytest.mark.parametrize(
    ("kind", "settings"), [("ext4", ("wal", 1)), ("nfs4", ("delete", 2)), ("cifs", ("delete", 2))]
)
def test_journal_mode_suits_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: tuple[str, int]
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    mounts += [SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)
    path = str(tmp_path / "s.db")
    with Record(path, create=True) as store, store.engine.connect() as connection:
        pragmas = [f"PRAGMA {name}" for name in ("journal_mode", "synchronous")]
        found = [connection.exec_driver_sql(text).scalar_one() for text in pragmas]
    assert tuple(found) == settings


def test_paths_begin_in_the_databases_folder_wherever_one_stands_or_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paths(storage: str) -> list[str]:
        with Record(storage) as store:
            row = store.study("photos")
            data = row.config["data"]
            places = [str(row.output), data["source"].removeprefix("folder:"), data["root"]]
            places.append(str(store.trial(row.id, 0).checkpoint))
            return [os.path.relpath(place, tmp_path) for place in places]

    project, outside = tmp_path / "proj", str(tmp_path.parent / "sets")
    (project / "sub").mkdir(parents=True)
    monkeypatch.chdir(project)
    data = {"source": "folder:images", "root": outside}
    config = {"study": {"output": "runs", "storage": "pg://a:b@c"}, "data": data}
    with Record("s.db", create=True) as store:
        study = store.create_study("photos", config, DATA, {})
        run = store.begin_run(study, command="c", device="cpu", versions={})
        row = _enter(store, study, run, 0.5)
        row.weights_hash = "abc"
        store.end_trial(row, "complete")
        assert store.trials(study)[0].checkpoint == "runs/photos/trial-0000"
    expected = ["proj/runs/photos", "proj/images", "../sets", "proj/runs/photos/trial-0000"]
    assert paths("s.db") == paths("sqlite:///s.db") == expected
    for where, storage in (("sub", "sqlite:///../s.db"), ("..", "proj/s.db")):
        monkeypatch.chdir(project / where)
        assert paths(storage) == expected
        with Record(storage) as store:  # as `resume` does
            found = store.study("photos")
            store.update_study(found, found.config, DATA)
    project.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert paths("new/s.db") == [place.replace("proj", "new") for place in expected]
