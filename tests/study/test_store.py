import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import sqlalchemy

from core.metrics import EpochMetrics
from study.read import read_confusion, read_epochs, read_pictures, read_trials
from study.store import (
    PictureRow,
    Store,
    StoreError,
    config_hash,
)
from study.tables import Base
from support import distributions_of

DATA = {"source": "folder:x", "classes": ["a", "b"], "fingerprint": "f", "n_train": 8}


def _epoch(epoch: int, acc: float, is_best: bool = True) -> EpochMetrics:
    return EpochMetrics(
        epoch, 0.7, 0.6, acc, acc, acc, 0.01, 0.1, 100.0, 0.1, 1.0, 0.2, 10**9, 32, is_best
    )


def _study(store: Store, name: str = "photos") -> tuple[int, int]:
    study = store.create_study(name, {"study": {"name": name}}, DATA, {"torch": "2"})
    return study, store.begin_run(study, command="test", device="cpu", versions={})


def _trial(store: Store, study: int, run: int, number: int, **more: object) -> int:
    params = {"base_lr": 0.1 * (number + 1), "backbone": "resnet18"}
    trial = store.start_trial(study, params, distributions_of(params))
    assert trial.number == number
    return store.begin_trial(
        study,
        number,
        run,
        origin="sampler",
        config={"seed": 0},
        config_hash=f"hash{number}",
        seed=0,
        backbone="resnet18",
        freeze_depth=2,
        device="cpu",
        **more,
    )


def _epochs(store: Store, study: int, trial: int, number: int, *values: float) -> None:
    """Enter epochs, in both tables."""
    best = max(values)
    for epoch, value in enumerate(values):
        is_best = value == best and value not in values[:epoch]
        store.add_epoch(trial, _epoch(epoch, value, is_best=is_best), epoch + 1.0)
        store.take_up_trial(study, number).report(value, epoch + 1)


def _end(store: Store, trial: int, state: str, value: float | None, **more: object) -> None:
    facts = {"reason": None, "best_epoch": 1, "epochs_done": 2, "duration_s": 1.5}
    store.end_trial(trial, state, value=value, checkpoint=None, **{**facts, **more})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "s.db"), create=True)


def test_what_is_written_is_read_back(store: Store) -> None:
    study, run = _study(store)
    trial = _trial(store, study, run, 0, trained_parameters=5, total_parameters=9)
    _epochs(store, study, trial, 0, 0.5, 0.8)
    running = store.trial(study, 0)
    assert (running.state, running.value, running.epochs_done) == ("running", 0.8, 2)
    _end(store, trial, "complete", 0.8)
    row = store.trial(study, 0)
    assert (row.state, row.value, row.best_epoch, row.trained_parameters) == (
        "complete",
        0.8,
        1,
        5,
    )
    assert row.params == {"base_lr": 0.1, "backbone": "resnet18"}
    assert row.ended_at is not None
    assert row.ended_at >= row.started_at
    assert store.epochs(trial) == [_epoch(0, 0.5, is_best=False), _epoch(1, 0.8)]
    assert store.study("photos").data == DATA


def test_a_later_epoch_that_is_not_better_keeps_the_value(store: Store) -> None:
    study, run = _study(store)
    trial = _trial(store, study, run, 0)
    _epochs(store, study, trial, 0, 0.8, 0.5)
    assert store.trial(study, 0).value == 0.8


def test_frames_have_a_row_a_trial_and_a_row_an_epoch(store: Store) -> None:
    study, run = _study(store)
    for number in range(3):
        trial = _trial(store, study, run, number)
        for epoch in range(number + 1):
            store.add_epoch(trial, _epoch(epoch, 0.5), 1.0)
        _end(store, trial, "complete", 0.5)
    trials, epochs = read_trials(store, "photos"), read_epochs(store, "photos")
    assert trials["number"].tolist() == [0, 1, 2]
    assert trials["params_base_lr"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert trials["params_backbone"].tolist() == ["resnet18"] * 3
    assert epochs[["number", "epoch"]].values.tolist() == [
        [0, 0], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2],
    ]  # fmt: skip
    assert epochs["val_acc"].tolist() == [0.5] * 6


def test_frames_of_an_empty_study_have_their_columns(store: Store) -> None:
    _study(store)
    assert read_trials(store, "photos").empty
    assert "val_acc" in read_epochs(store, "photos").columns


def test_summaries_count_states_and_name_the_best_complete_trial(store: Store) -> None:
    study, run = _study(store)
    ends = [("complete", 0.5), ("complete", 0.9), ("pruned", 0.95), ("failed", None)]
    for number, (state, value) in enumerate(ends):
        _end(store, _trial(store, study, run, number), state, value)
    _trial(store, study, run, 4)
    _study(store, "empty")
    newest, oldest = store.studies()
    assert (newest.name, newest.best_value, newest.n_complete) == ("empty", None, 0)
    counts = (oldest.n_complete, oldest.n_pruned, oldest.n_failed, oldest.n_running)
    assert counts == (2, 1, 1, 1)
    assert (oldest.best_value, oldest.best_number) == (0.9, 1)


def test_equal_settings_are_found_only_when_they_were_finished(store: Store) -> None:
    study, run = _study(store)
    ends = {"running": False, "failed": False, "pruned": True, "complete": True}
    for number, state in enumerate(ends):
        trial = _trial(store, study, run, number)
        if state != "running":
            _end(store, trial, state, 0.5)
    found = [store.find_finished(study, f"hash{number}") for number in range(5)]
    assert [row is not None for row in found] == [*ends.values(), False]


def test_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": None}) == config_hash({"b": None, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_pictures_and_confusions_replace_earlier_ones(store: Store) -> None:
    study, run = _study(store)
    trial = _trial(store, study, run, 0)
    row = PictureRow("val", 0, "a/1.jpg", "a", "b", 0.1, b"jpeg")
    for _ in range(2):
        store.add_confusion(trial, "val", [[3, 1], [0, 4]])
        store.add_pictures(trial, [row])
    assert read_pictures(store, "photos", 0) == [row]
    confusion = read_confusion(store, "photos", 0)
    assert confusion is not None
    assert confusion.tolist() == [[3, 1], [0, 4]]
    assert read_confusion(store, "photos", 0, "test") is None


def test_a_test_has_its_wilson_interval(store: Store) -> None:
    study, _ = _study(store)
    store.add_test(
        study, 3, n=200, n_correct=170, balanced_acc=0.85, macro_f1=0.85, val_acc=0.9,
        confusion=[[85, 15], [15, 85]], command="test",
    )  # fmt: skip
    (row,) = store.tests(study)
    # Wilson's formula by hand: centre (k + z^2/2) / (n + z^2), z = 1.959964.
    assert row.accuracy == 0.85
    assert row.low == pytest.approx(0.7939, abs=1e-4)
    assert row.high == pytest.approx(0.8928, abs=1e-4)


def test_deleting_removes_everything_of_the_study_and_nothing_else(store: Store) -> None:
    for name in ("photos", "other"):
        study, run = _study(store, name)
        trial = _trial(store, study, run, 0)
        store.add_epoch(trial, _epoch(0, 0.5), 1.0)
        store.add_confusion(trial, "val", [[1]])
    store.delete_study("photos")
    assert [row.name for row in store.studies()] == ["other"]
    assert len(read_epochs(store, "other")) == 1
    with store.engine.connect() as connection:
        for table in Base.metadata.sorted_tables:
            n = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table))
            assert n.scalar() in (0, 1), table.name


def test_missing_names_and_numbers_tell_what_there_is(store: Store) -> None:
    study, run = _study(store)
    with pytest.raises(StoreError, match="there is no study photo in .* There is: photos"):
        store.study("photo")
    with pytest.raises(StoreError, match="it has none yet"):
        store.trial(study, 5)
    _trial(store, study, run, 0)
    with pytest.raises(StoreError, match="they go from 0 to 0"):
        store.trial(study, 5)


def test_a_second_live_process_is_refused(store: Store) -> None:
    study, _ = _study(store)
    with pytest.raises(StoreError, match=r"is being run by process \d+ on .* another --name"):
        store.begin_run(study, command="second", device="cpu", versions={})


def test_of_processes_that_begin_at_once_one_gets_the_study(store: Store) -> None:
    # Threads stand in for processes: this process is alive, so each must refuse the others.
    study = store.create_study("photos", {}, DATA, {})
    barrier = Barrier(6)

    def begins(_: int) -> bool:
        barrier.wait()
        try:
            store.begin_run(study, command="x", device="cpu", versions={})
        except StoreError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(begins, range(6))) == 1
    assert len(store.runs(study)) == 1


def test_a_name_is_given_once(store: Store) -> None:
    _study(store)
    with pytest.raises(StoreError, match=r"must be new, but .* has a study photos\. Use another"):
        _study(store)


def test_a_dead_process_is_no_hindrance_and_its_trials_are_told(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    script = (
        "import sys; from study.store import Store\n"
        f"store = Store.open({str(path)!r}, create=True)\n"
        f"study = store.create_study('photos', {{}}, {DATA!r}, {{}})\n"
        "run = store.begin_run(study, command='x', device='cpu', versions={})\n"
        "store.start_trial(study, {}, {})\n"
        "store.begin_trial(study, 0, run, origin='sampler', config={},"
        " config_hash='h', seed=0, backbone='b', freeze_depth=0, device='cpu')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with Store.open(str(path)) as store:
        study = store.study("photos").id
        store.begin_run(study, command="y", device="cpu", versions={})
        assert [row.state for row in store.trials(study)] == ["running"]


def test_a_process_of_another_machine_must_be_taken_over(store: Store) -> None:
    study, run = _study(store)
    with store.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE frostline_runs SET host = 'elsewhere'"))
    with pytest.raises(StoreError, match="If that machine is gone, add --take-over"):
        store.begin_run(study, command="x", device="cpu", versions={})
    assert store.begin_run(study, command="x", device="cpu", versions={}, take_over=True) > run


def _file(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("this is no database, but it is long enough")
    elif kind == "folder":
        path.mkdir()
    elif kind in ("foreign", "optuna", "newer", "odd"):
        statements = {
            "foreign": ["CREATE TABLE photos (id INTEGER)"],
            "optuna": [
                f"CREATE TABLE {name} (id INTEGER)"
                for name in ("studies", "trials", "trial_params", "alembic_version")
            ],
            "newer": [
                "CREATE TABLE frostline_info (key TEXT, value TEXT)",
                "INSERT INTO frostline_info VALUES ('schema_version', '99')",
            ],
            "odd": ["CREATE TABLE frostline_info (key TEXT, value TEXT)"],
        }[kind]
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()


def test_opening_a_database_again_leaves_the_locks_of_this_process(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    read = (
        f"import sqlite3; c = sqlite3.connect({str(path)!r}); "
        "print(c.execute('SELECT name FROM frostline_studies').fetchall()); c.close()"
    )

    def names_elsewhere() -> str:
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, check=True)
        return done.stdout.decode()

    with Store.open(str(path), create=True) as store:
        _study(store, "first")
        Store.open(str(path)).close()
        assert "first" in names_elsewhere()  # the last to leave, were our locks gone
        _study(store, "second")
        assert "second" in names_elsewhere()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "file is not a database"),
        ("folder", "must be a file, but .* is a folder"),
        ("foreign", r"belongs to another program \(tables photos\)"),
        ("optuna", "holds plain Optuna studies, not Frostline's"),
        ("newer", r"written by another version of Frostline \(schema 99; this one knows 7\)"),
        ("odd", r"written by another version of Frostline \(schema None; this one"),
        ("missing", "there is no database"),
    ],
)
def test_databases_that_are_not_ours_are_refused_and_left_as_they_are(
    tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "s.db"
    _file(path, kind)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError, match=message):
        Store.open(str(path), create=kind != "missing")
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nowhere/s.db", "must lie in a folder that exists"),
        ("sqlite://", "must be a file, but got an SQLite database in memory"),
        ("nonsense://x", "cannot be opened: Can't load plugin"),
    ],
)
def test_storages_that_cannot_be_are_told(storage: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store.open(storage, create=True)


@contextlib.contextmanager
def _without_power() -> Iterator[None]:
    """Be somebody to whom permissions apply, even where the tests are root's."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o555, 0o777], ids=["closed folder", "open folder"])
def test_a_database_that_may_not_be_written_is_read(mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder, path = Path(name), Path(name) / "s.db"
        with Store.open(str(path), create=True) as store:
            study, run = _study(store)
            trial = _trial(store, study, run, 0)
            _epochs(store, study, trial, 0, 0.5)
            _end(store, trial, "complete", 0.5, best_epoch=0)
        path.chmod(0o444)
        folder.chmod(mode)
        with _without_power():
            with Store.open(str(path)) as store:
                (row,) = store.trials(store.study("photos").id)
                assert (row.state, row.value) == ("complete", 0.5)
                with pytest.raises(StoreError, match="cannot be written"):
                    store.begin_run(study, command="x", device="cpu", versions={})
            if mode == 0o555:
                with pytest.raises(StoreError, match="cannot be opened: unable to open database"):
                    Store.open(str(folder / "new.db"), create=True)
        folder.chmod(0o755)


def _journal(path: Path) -> tuple[str, int]:
    with Store.open(str(path), create=True) as store, store.engine.connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        return mode, connection.exec_driver_sql("PRAGMA synchronous").scalar_one()


@pytest.mark.parametrize(
    ("kind", "settings"), [("ext4", ("wal", 1)), ("nfs4", ("delete", 2)), ("cifs", ("delete", 2))]
)
def test_the_journal_suits_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: tuple[str, int]
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    mounts += [SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)
    assert _journal(tmp_path / "s.db") == settings
