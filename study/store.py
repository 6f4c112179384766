"""The record: every study, trial, epoch and look at the test split, written and read back."""

import dataclasses
import difflib
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, case, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from core.metrics import EpochMetrics
from study.answers import Answers
from study.database import StoreError, sole_writer
from study.liveness import is_alive, process_start, told_alive
from study.records import columns_of, now
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

_EPOCH_FIELDS = tuple(field.name for field in dataclasses.fields(EpochMetrics))


def config_hash(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings, hexadecimal; their order does not count."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


_STUDY = columns_of(StudyTable, StudyRow)
_RUN = columns_of(RunTable, RunRow)
_TRIAL = columns_of(TrialTable, TrialRow)
_DESIGN = columns_of(DesignTable, DesignRow)


class Store(Answers):
    """The record in one database: studies, runs, trials, epochs, designs, and answers."""

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
            "created_at": now(),
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
                names = ("n_complete", "n_pruned", "n_failed", "n_running")
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
            "pid_started": process_start(os.getpid()),
            "started_at": now(),
            "command": command,
            "device": device,
            "versions": dict(versions),
        }
        with sole_writer(self._engine) as connection:
            mine = select(StudyTable.id).where(StudyTable.id == study_id)
            connection.execute(mine.with_for_update())  # where SQLite's lock does not serve
            for row in connection.execute(_runs(study_id)).all():
                run = RunRow(*row)
                if run.ended_at is None and is_alive(run, take_over):
                    raise StoreError(told_alive(run))
            key = connection.execute(insert(RunTable), values).inserted_primary_key
        assert key is not None
        return int(key[0])

    def end_run(self, run_id: int, outcome: str) -> None:
        """Sign a process off."""
        self._update(RunTable, run_id, {"ended_at": now(), "outcome": outcome})

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
            "started_at": now(),
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
        """Close a trial with its last state and figures.

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
            "ended_at": now(),
        }
        if score is not None:
            values["score"] = score
        self._update(TrialTable, trial_id, values)

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
        """Return the first complete or pruned trial of equal settings, if any."""
        query = select(*_TRIAL).where(
            TrialTable.study_id == study_id,
            TrialTable.config_hash == config_hash,
            TrialTable.state.in_(("complete", "pruned")),
        )
        rows = self._rows(TrialRow, query.order_by(TrialTable.number).limit(1))
        return rows[0] if rows else None

    def epochs(self, trial_id: int) -> list[EpochMetrics]:
        """List a trial's epochs in order."""
        columns = [getattr(EpochTable, name) for name in _EPOCH_FIELDS]
        query = select(*columns).where(EpochTable.trial_id == trial_id)
        return self._rows(EpochMetrics, query.order_by(EpochTable.epoch))

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
        values = {"kind": kind, "spec": spec, "command": command, "updated_at": now()}
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


def _runs(study_id: int) -> Select[Any]:
    return select(*_RUN).where(RunTable.study_id == study_id).order_by(RunTable.id)
