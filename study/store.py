"""The record: every study, trial, epoch and look at the test split, written and read back."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, Select, case, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from core.metrics import EpochMetrics
from study.database import StoreError, open_database, sole_writer
from study.rows import (
    DesignRow,
    Json,
    PictureRow,
    RunRow,
    StudyRow,
    StudySummary,
    TestRow,
    TrialRow,
)
from study.tables import (
    Base,
    ConfusionTable,
    DesignTable,
    EpochTable,
    PictureTable,
    PredictionTable,
    RunTable,
    StudyTable,
    TestTable,
    TrialTable,
)

__all__ = [
    "DesignRow",
    "PictureRow",
    "RunRow",
    "Store",
    "StoreError",
    "StudyRow",
    "StudySummary",
    "TestRow",
    "TrialRow",
    "config_hash",
]

Row = TypeVar("Row")
_EPOCH_FIELDS = tuple(field.name for field in dataclasses.fields(EpochMetrics))
# Two readings of a process's start differ by rounding only.
_SAME_START_S = 2.0


def config_hash(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings, hexadecimal; their order does not count."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def pack_classes(numbers: Sequence[int]) -> bytes:
    """Write class numbers as compressed 32-bit integers, little-endian."""
    return zlib.compress(struct.pack(f"<{len(numbers)}i", *numbers))


def unpack_classes(packed: bytes) -> tuple[int, ...]:
    """Read back what `pack_classes` wrote."""
    raw = zlib.decompress(packed)
    return struct.unpack(f"<{len(raw) // 4}i", raw)


def _now() -> datetime:
    """Return the time in UTC; SQLite keeps no zone, so neither do the rows."""
    return datetime.now(UTC).replace(tzinfo=None)


def _columns(table: type[Base], row: type[Any]) -> list[Any]:
    return [getattr(table, field.name) for field in dataclasses.fields(row)]


_STUDY = _columns(StudyTable, StudyRow)
_RUN = _columns(RunTable, RunRow)
_TRIAL = _columns(TrialTable, TrialRow)
_PICTURE = _columns(PictureTable, PictureRow)
_TEST = _columns(TestTable, TestRow)
_DESIGN = _columns(DesignTable, DesignRow)


class Store:
    """The record in one database, open for reading and writing.

    Args:
        engine: From `open_database`.
        storage: What the user called it.
    """

    def __init__(self, engine: Engine, storage: str) -> None:
        self._engine = engine
        self._held: Connection | None = None
        self.storage = storage

    @classmethod
    def open(cls, storage: str, *, create: bool = False) -> Self:
        """Open the record.

        Args:
            storage: SQLAlchemy URL, or path of an SQLite file.
            create: Make it where there is none.

        Raises:
            StoreError: Missing, not a database, another program's, or of a newer Frostline.
        """
        return cls(open_database(storage, create=create), storage)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Studies

    def create_study(
        self, name: str, config: Json, data: Json, versions: Mapping[str, str]
    ) -> int:
        """Add a study and return its key.

        Raises:
            StoreError: There is one of that name.
        """
        values = {
            "name": name,
            "created_at": _now(),
            "config": config,
            "data": data,
            "versions": dict(versions),
        }
        try:
            return self._insert(StudyTable, values)
        except IntegrityError as err:
            raise StoreError(
                f"a study's name must be new, but {self.storage} has a study {name}. Use another "
                "--name, or go on with that one."
            ) from err

    def find_study(self, name: str) -> StudyRow | None:
        """Return a study, or None."""
        rows = self._rows(StudyRow, select(*_STUDY).where(StudyTable.name == name))
        return rows[0] if rows else None

    def study(self, name: str) -> StudyRow:
        """Return a study.

        Raises:
            StoreError: There is none of that name; names the nearest.
        """
        row = self.find_study(name)
        if row is not None:
            return row
        with self._reading() as connection:
            names = list(connection.execute(select(StudyTable.name)).scalars())
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
        known = f" There is: {', '.join(near)}." if near else " It holds no study yet."
        raise StoreError(f"there is no study {name} in {self.storage}.{known}")

    def studies(self) -> list[StudySummary]:
        """List all studies, the newest first."""

        def count(state: str) -> Any:
            return func.count(case((TrialTable.state == state, 1)))

        rank = func.coalesce(TrialTable.score, TrialTable.value)
        complete_rank = case((TrialTable.state == "complete", rank))
        touched = func.max(func.coalesce(TrialTable.ended_at, TrialTable.started_at))
        query = (
            select(
                StudyTable.id,
                StudyTable.name,
                StudyTable.created_at,
                func.coalesce(touched, StudyTable.created_at),
                count("complete"),
                count("pruned"),
                count("failed"),
                count("running"),
                count("paused"),
                func.max(complete_rank),
            )
            .outerjoin(TrialTable, TrialTable.study_id == StudyTable.id)
            .group_by(StudyTable.id)
            .order_by(StudyTable.id.desc())
        )
        summaries = []
        with self._reading() as connection:
            for study_id, name, created, touched_at, *counts, best in connection.execute(query):
                first = (
                    select(TrialTable.number, TrialTable.value)
                    .where(
                        TrialTable.study_id == study_id,
                        TrialTable.state == "complete",
                        rank == best,
                    )
                    .order_by(TrialTable.number)
                )
                found = None if best is None else connection.execute(first).first()
                number, value = found or (None, None)
                names = ("n_complete", "n_pruned", "n_failed", "n_running", "n_paused")
                told = dict(zip(names, counts, strict=True))
                summaries.append(
                    StudySummary(
                        name, created, touched_at, best_value=value, best_number=number, **told
                    )
                )
        return summaries

    def update_study(self, study_id: int, config: Json, data: Json) -> None:
        """Replace a study's configuration and description of its pictures."""
        self._update(StudyTable, study_id, {"config": config, "data": data})

    def delete_study(self, name: str) -> None:
        """Remove a study of ours with all its trials (Optuna's tables are not touched).

        Raises:
            StoreError: There is none of that name.
        """
        row = self.study(name)
        trials = select(TrialTable.id).where(TrialTable.study_id == row.id)
        with self._writing() as connection:
            for table in (EpochTable, ConfusionTable, PictureTable, PredictionTable):
                connection.execute(delete(table).where(table.trial_id.in_(trials)))
            for owned in (TestTable, DesignTable, TrialTable, RunTable):
                connection.execute(delete(owned).where(owned.study_id == row.id))
            connection.execute(delete(StudyTable).where(StudyTable.id == row.id))

    # Runs

    def begin_run(
        self,
        study_id: int,
        *,
        command: str,
        device: str,
        versions: Mapping[str, str],
        take_over: bool = False,
    ) -> int:
        """Enter this process as the one that works on a study; return the run's key.

        Args:
            study_id: The study.
            command: Command line.
            device: What it runs on.
            versions: Libraries.
            take_over: Enter even if a process of another machine has not signed off.

        Raises:
            StoreError: Another process is at it.
        """
        values = {
            "study_id": study_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": _process_start(os.getpid()),
            "started_at": _now(),
            "command": command,
            "device": device,
            "versions": dict(versions),
        }
        with sole_writer(self._engine) as connection:
            mine = select(StudyTable.id).where(StudyTable.id == study_id)
            connection.execute(mine.with_for_update())  # where SQLite's lock does not serve
            for row in connection.execute(_runs(study_id)).all():
                run = RunRow(*row)
                if run.ended_at is None and _is_alive(run, take_over):
                    raise StoreError(_told_alive(run))
            key = connection.execute(insert(RunTable), values).inserted_primary_key
        assert key is not None
        return int(key[0])

    def end_run(self, run_id: int, outcome: str) -> None:
        """Sign a process off."""
        self._update(RunTable, run_id, {"ended_at": _now(), "outcome": outcome})

    def runs(self, study_id: int) -> list[RunRow]:
        """List the processes that worked on a study, oldest first."""
        return self._rows(RunRow, _runs(study_id))

    # Trials

    def begin_trial(
        self,
        study_id: int,
        number: int,
        run_id: int,
        *,
        origin: str,
        params: Mapping[str, Any],
        config: Json,
        config_hash: str,
        seed: int,
        backbone: str,
        freeze_depth: int,
        device: str,
        **more: Any,
    ) -> int:
        """Enter a trial as running; return its key.

        Args:
            study_id: Its study.
            number: Its number in the study.
            run_id: The process that runs it.
            origin: Where its settings came from.
            params: Values that the search chose.
            config: Full `TrainConfig`.
            config_hash: Identity of the settings.
            seed: Seed of the run.
            backbone: Its backbone.
            freeze_depth: Its freeze level.
            device: What it runs on.
            more: Further columns: trained_parameters, total_parameters, factor, level, replicate.
        """
        values = {
            "study_id": study_id,
            "number": number,
            "run_id": run_id,
            "state": "running",
            "origin": origin,
            "params": dict(params),
            "config": config,
            "config_hash": config_hash,
            "seed": seed,
            "backbone": backbone,
            "freeze_depth": freeze_depth,
            "device": device,
            "started_at": _now(),
            "epochs_done": 0,
            **more,
        }
        return self._insert(TrialTable, values)

    def add_epoch(self, trial_id: int, metrics: EpochMetrics, seconds_since_start: float) -> None:
        """Add an epoch, and keep the trial's own figures up to date with it."""
        values = {name: getattr(metrics, name) for name in _EPOCH_FIELDS}
        values |= {"trial_id": trial_id, "seconds_since_start": seconds_since_start}
        so_far: Json = {"epochs_done": metrics.epoch + 1}
        if metrics.is_best:
            so_far |= {"value": metrics.val_acc, "best_epoch": metrics.epoch}
            so_far |= {"score": metrics.ranked_by}
        with self._writing() as connection:
            connection.execute(insert(EpochTable), values)
            connection.execute(update(TrialTable).where(TrialTable.id == trial_id), so_far)

    def end_trial(
        self,
        trial_id: int,
        state: str,
        *,
        reason: str | None,
        value: float | None,
        best_epoch: int | None,
        epochs_done: int,
        duration_s: float,
        checkpoint: str | None,
        score: float | None = None,
    ) -> None:
        """Close a trial with its last state and figures; a paused one may go on later.

        Its score is the one that came with its epochs, unless another is given.
        """
        values = {
            "state": state,
            "reason": reason,
            "value": value,
            "best_epoch": best_epoch,
            "epochs_done": epochs_done,
            "duration_s": duration_s,
            "checkpoint": checkpoint,
            "ended_at": _now(),
        }
        if score is not None:
            values["score"] = score
        self._update(TrialTable, trial_id, values)

    def continue_trial(self, trial_id: int, run_id: int) -> None:
        """Mark a paused trial as running again, now in this run."""
        values = {"state": "running", "run_id": run_id, "reason": None, "ended_at": None}
        self._update(TrialTable, trial_id, values)

    def cut_epochs(self, trial_id: int, n_epochs: int) -> None:
        """Forget all epochs of a trial but its first so many: it trains the others again."""
        beyond = (EpochTable.trial_id == trial_id) & (EpochTable.epoch >= n_epochs)
        with self._writing() as connection:
            connection.execute(delete(EpochTable).where(beyond))

    def prune_paused(self, trial_id: int, reason: str) -> None:
        """Give up a paused trial."""
        self._update(TrialTable, trial_id, {"state": "pruned", "reason": reason})

    def set_checkpoint(self, trial_id: int, checkpoint: str | None) -> None:
        """Note where a trial's weights lie, or that they were removed."""
        self._update(TrialTable, trial_id, {"checkpoint": checkpoint})

    def scores(self, study_id: int) -> dict[int, dict[int, float]]:
        """Return what a study's epochs are ranked by: trial number -> epochs done -> score."""
        columns = (TrialTable.number, EpochTable.epoch, EpochTable.score, EpochTable.val_acc)
        query = (
            select(*columns)
            .join(TrialTable, TrialTable.id == EpochTable.trial_id)
            .where(TrialTable.study_id == study_id)
        )
        found: dict[int, dict[int, float]] = {}
        with self._reading() as connection:
            for number, epoch, score, accuracy in connection.execute(query):
                found.setdefault(number, {})[epoch + 1] = accuracy if score is None else score
        return found

    def trials(self, study_id: int) -> list[TrialRow]:
        """List a study's trials by number."""
        query = select(*_TRIAL).where(TrialTable.study_id == study_id)
        return self._rows(TrialRow, query.order_by(TrialTable.number))

    def trial(self, study_id: int, number: int) -> TrialRow:
        """Return a trial.

        Raises:
            StoreError: The study has no trial of that number.
        """
        query = select(*_TRIAL).where(TrialTable.study_id == study_id, TrialTable.number == number)
        rows = self._rows(TrialRow, query)
        if not rows:
            last = select(func.max(TrialTable.number)).where(TrialTable.study_id == study_id)
            with self._reading() as connection:
                top = connection.execute(last).scalar()
            range_ = "it has none yet" if top is None else f"they go from 0 to {top}"
            raise StoreError(f"there is no trial {number} in that study; {range_}.")
        return rows[0]

    def stale_trials(self, study_id: int) -> list[TrialRow]:
        """List trials marked as running: once a run has begun, their processes are gone."""
        query = select(*_TRIAL).where(
            TrialTable.study_id == study_id, TrialTable.state == "running"
        )
        return self._rows(TrialRow, query.order_by(TrialTable.number))

    def find_finished(self, study_id: int, config_hash: str) -> TrialRow | None:
        """Return the first complete, pruned or paused trial of equal settings, if any."""
        query = select(*_TRIAL).where(
            TrialTable.study_id == study_id,
            TrialTable.config_hash == config_hash,
            TrialTable.state.in_(("complete", "pruned", "paused")),
        )
        rows = self._rows(TrialRow, query.order_by(TrialTable.number).limit(1))
        return rows[0] if rows else None

    def epochs(self, trial_id: int) -> list[EpochMetrics]:
        """List a trial's epochs in order."""
        columns = [getattr(EpochTable, name) for name in _EPOCH_FIELDS]
        query = select(*columns).where(EpochTable.trial_id == trial_id)
        return self._rows(EpochMetrics, query.order_by(EpochTable.epoch))

    # Results

    def add_confusion(self, trial_id: int, split: str, matrix: list[list[int]]) -> None:
        """Keep a trial's confusion matrix on a split, rows the truth; an earlier one goes."""
        with self._writing() as connection:
            connection.execute(
                delete(ConfusionTable).where(
                    ConfusionTable.trial_id == trial_id, ConfusionTable.split == split
                )
            )
            values = {"trial_id": trial_id, "split": split, "matrix": matrix}
            connection.execute(insert(ConfusionTable), values)

    def add_pictures(self, trial_id: int, rows: Sequence[PictureRow]) -> None:
        """Keep the pictures that a trial got wrong; earlier ones of the trial go."""
        values = [{"trial_id": trial_id, **dataclasses.asdict(row)} for row in rows]
        with self._writing() as connection:
            connection.execute(delete(PictureTable).where(PictureTable.trial_id == trial_id))
            if values:
                connection.execute(insert(PictureTable), values)

    def add_test(
        self,
        study_id: int,
        trial_number: int,
        *,
        n: int,
        n_correct: int,
        balanced_acc: float,
        macro_f1: float,
        val_acc: float | None,
        confusion: list[list[int]],
        command: str,
    ) -> int:
        """Record a look at the test split, with its 95 % Wilson interval; return its key."""
        from scipy.stats import binomtest

        interval = binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
        values = {
            "study_id": study_id,
            "trial_number": trial_number,
            "created_at": _now(),
            "n": n,
            "n_correct": n_correct,
            "accuracy": n_correct / n,
            "low": float(interval.low),
            "high": float(interval.high),
            "balanced_acc": balanced_acc,
            "macro_f1": macro_f1,
            "val_acc": val_acc,
            "confusion": confusion,
            "command": command,
        }
        return self._insert(TestTable, values)

    def tests(self, study_id: int) -> list[TestRow]:
        """List the looks at a study's test split, oldest first."""
        query = select(*_TEST).where(TestTable.study_id == study_id).order_by(TestTable.id)
        return self._rows(TestRow, query)

    def add_predictions(
        self, trial_id: int, split: str, labels: Sequence[int], predicted: Sequence[int]
    ) -> None:
        """Keep what a trial says of each picture of a split; an earlier answer goes.

        Args:
            trial_id: The trial.
            split: `val` or `test`.
            labels: True class numbers, (N,), in the split's order.
            predicted: Chosen class numbers, (N,).
        """
        values = {
            "trial_id": trial_id,
            "split": split,
            "labels": pack_classes(labels),
            "predicted": pack_classes(predicted),
        }
        with self._writing() as connection:
            connection.execute(
                delete(PredictionTable).where(
                    PredictionTable.trial_id == trial_id, PredictionTable.split == split
                )
            )
            connection.execute(insert(PredictionTable), values)

    def has_predictions(self, trial_id: int, split: str) -> bool:
        """Say whether a trial's answers on a split are kept."""
        query = select(PredictionTable.trial_id).where(
            PredictionTable.trial_id == trial_id, PredictionTable.split == split
        )
        with self._reading() as connection:
            return connection.execute(query).scalar() is not None

    # Designs

    def put_design(self, study_id: int, key: str, kind: str, spec: Json, command: str) -> int:
        """Keep an ablation's design, in place of the one with the same key; return its row's key.

        Args:
            study_id: The ablation's study.
            key: Tells the study's designs apart: equal for a design that goes on.
            kind: `ofat`, `loco`, `factorial`, `path` or `screen`.
            spec: Factors, cells and rules, as `study.designs` writes them.
            command: Command line.
        """
        values = {"kind": kind, "spec": spec, "command": command, "updated_at": _now()}
        known = select(DesignTable.id).where(
            DesignTable.study_id == study_id, DesignTable.key == key
        )
        with self._reading() as connection:
            found = connection.execute(known).scalar()
        if found is None:
            return self._insert(DesignTable, {"study_id": study_id, "key": key, **values})
        self._update(DesignTable, found, values)
        return int(found)

    def designs(self, study_id: int) -> list[DesignRow]:
        """List a study's designs, the last one used at the end."""
        query = select(*_DESIGN).where(DesignTable.study_id == study_id)
        return self._rows(DesignRow, query.order_by(DesignTable.updated_at, DesignTable.id))

    @property
    def engine(self) -> Engine:
        """Return the database's engine, for readers."""
        return self._engine

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write all that is written inside the block in one transaction, or nothing of it."""
        with self._engine.begin() as connection:
            self._held = connection
            try:
                yield
            finally:
                self._held = None

    def _writing(self) -> contextlib.AbstractContextManager[Connection]:
        """Begin a transaction, or take part in the one that is open."""
        held = self._held
        return self._engine.begin() if held is None else contextlib.nullcontext(held)

    def _reading(self) -> contextlib.AbstractContextManager[Connection]:
        """Connect, or read what the open transaction sees."""
        held = self._held
        return self._engine.connect() if held is None else contextlib.nullcontext(held)

    def _insert(self, table: type[Base], values: Json) -> int:
        with self._writing() as connection:
            key = connection.execute(insert(table), values).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _update(self, table: type[Any], key: int, values: Json) -> None:
        with self._writing() as connection:
            connection.execute(update(table).where(table.id == key), values)

    def _rows(self, kind: type[Row], query: Any) -> list[Row]:
        with self._reading() as connection:
            return [kind(*values) for values in connection.execute(query).all()]


def _runs(study_id: int) -> Select[Any]:
    return select(*_RUN).where(RunTable.study_id == study_id).order_by(RunTable.id)


def _process_start(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def _is_alive(run: RunRow, take_over: bool) -> bool:
    """Say whether a run's process still exists; of another machine's, only it could know."""
    import psutil

    if run.host != socket.gethostname():
        return not take_over
    try:
        return abs(_process_start(run.pid) - run.pid_started) < _SAME_START_S
    except psutil.Error:
        return False


def _told_alive(run: RunRow) -> str:
    where = f"process {run.pid} on {run.host} since {run.started_at:%Y-%m-%d %H:%M} UTC"
    remedy = "Wait for it, stop it, or use another --name."
    if run.host != socket.gethostname():
        remedy += " If that machine is gone, add --take-over."
    return f"the study is being run by {where}. {remedy}"
