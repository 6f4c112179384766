"""The record: every study, trial, epoch and look at the test split, written and read back."""

import dataclasses
import difflib
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import ColumnElement, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from core.metrics import EpochMetrics
from study.answers import Answers
from study.database import Database, StoreError, sole_writer
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
LEVELS = "levels"
"""The user attribute that holds an ablation run's levels: they may change from one design to the
next, which Optuna allows no categorical parameter."""
_OPTUNAS = ("state", "params", "value")
_TRIAL = {
    field.name: getattr(TrialTable, field.name)
    for field in dataclasses.fields(TrialRow)
    if field.name not in _OPTUNAS
}
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
_STATE_NAMES = {state: name for name, state in _STATES.items()}
_DESIGN = columns_of(DesignTable, DesignRow)


class Store(Answers):
    """The record in one database: studies, runs, trials, epochs, designs, and answers.

    A trial's number, parameters, state and reported values stand in Optuna's tables and nowhere
    else; ours hang off its study and number. At a trial's end ours are written first, so that a
    trial which is running for Optuna and ended for us is one whose process died in between.
    """

    def __init__(self, database: Database, storage: str) -> None:
        super().__init__(database, storage)
        self._studies: dict[int, optuna.Study] = {}  # by our key

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
            study_id = self._insert(StudyTable, values)
        except IntegrityError as err:
            raise StoreError(
                f"a study's name must be new, but {self.storage} has a study {name}. Use another "
                "--name, or go on with that one."
            ) from err
        self.optuna_study(study_id)
        return study_id

    def optuna_study(self, study_id: int) -> optuna.Study:
        """Return Optuna's side of a study, the same object each time; made where it is missing."""
        if study_id not in self._studies:
            query = select(StudyTable.name).where(StudyTable.id == study_id)
            with self._engine.connect() as connection:
                name = connection.execute(query).scalar_one()
            found: dict[str, Any] = {
                "study_name": name,
                "storage": self._optuna,
                "sampler": optuna.samplers.RandomSampler(),
                "pruner": optuna.pruners.NopPruner(),
            }
            try:
                study = optuna.load_study(**found)
            except KeyError:
                study = optuna.create_study(**found, direction="maximize", load_if_exists=True)
            self._studies[study_id] = study
        return self._studies[study_id]

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
        with self._engine.connect() as connection:
            names = list(connection.execute(select(StudyTable.name)).scalars())
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
        known = f" There is: {', '.join(near)}." if near else " It holds no study yet."
        raise StoreError(f"there is no study {name} in {self.storage}.{known}")

    def studies(self) -> list[StudySummary]:
        """List all studies, the newest first."""
        rows = self._rows(StudyRow, select(*_STUDY).order_by(StudyTable.id.desc()))
        return [StudySummary.of(row, self.trials(row.id)) for row in rows]

    def update_study(self, study_id: int, config: Json, data: Json) -> None:
        """Replace a study's configuration and description of its pictures."""
        self._update(StudyTable, study_id, {"config": config, "data": data})

    def delete_study(self, name: str) -> None:
        """Remove a study with all its trials, from Optuna's tables too.

        Raises:
            StoreError: There is none of that name.
        """
        row = self.study(name)
        optuna.delete_study(study_name=name, storage=self._optuna)
        self._studies.pop(row.id, None)
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
        self._require_writable()
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

    def start_trial(
        self,
        study_id: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        user_attrs: Mapping[str, Any] | None = None,
    ) -> Trial:
        """Begin a trial of Optuna's whose parameters are given; nothing is sampled."""
        study = self.optuna_study(study_id)
        number = len(study.get_trials(deepcopy=False))
        running = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions={name: distributions[name] for name in params},
            user_attrs=dict(user_attrs or {}),
        )
        study.add_trial(running)
        return self.take_up_trial(study_id, number)

    def take_up_trial(self, study_id: int, number: int) -> Trial:
        """Return a running trial, of this process or of one that died, to report its epochs."""
        study = self.optuna_study(study_id)
        key = self._optuna.get_study_id_from_name(study.study_name)
        return Trial(study, self._optuna.get_trial_id_from_study_id_trial_number(key, number))

    def begin_trial(
        self,
        study_id: int,
        number: int,
        run_id: int,
        *,
        origin: str,
        config: Json,
        config_hash: str,
        seed: int,
        backbone: str,
        freeze_depth: int,
        device: str,
        **more: Any,
    ) -> int:
        """Enter our part of a trial that is running for Optuna; return its key.

        Args:
            study_id: Its study.
            number: Its number in the study.
            run_id: The process that runs it.
            origin: Where its settings came from.
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
            "origin": origin,
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
        """Add an epoch, and keep the trial's own figures up to date with it.

        Its accuracy is to be reported to Optuna, too.
        """
        values = {name: getattr(metrics, name) for name in _EPOCH_FIELDS}
        values |= {"trial_id": trial_id, "seconds_since_start": seconds_since_start}
        so_far: Json = {"epochs_done": metrics.epoch + 1}
        if metrics.is_best:
            so_far |= {"best_epoch": metrics.epoch, "score": metrics.ranked_by}
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
        """Close a trial with its last figures, and tell Optuna its state.

        Its score is the one that came with its epochs, unless another is given.
        """
        values = {
            "reason": reason,
            "best_epoch": best_epoch,
            "epochs_done": epochs_done,
            "duration_s": duration_s,
            "checkpoint": checkpoint,
            "ended_at": now(),
        }
        if score is not None:
            values["score"] = score
        self._update(TrialTable, trial_id, values)
        query = select(TrialTable.study_id, TrialTable.number).where(TrialTable.id == trial_id)
        with self._engine.connect() as connection:
            study_id, number = connection.execute(query).one()
        self.tell(study_id, number, state, value)

    def tell(self, study_id: int, number: int, state: str, value: float | None = None) -> None:
        """Tell Optuna how a trial ended; a pruned one keeps its last report as its value."""
        is_complete = state == "complete"
        self.optuna_study(study_id).tell(
            number, value if is_complete else None, state=_STATES[state]
        )

    def set_checkpoint(self, trial_id: int, checkpoint: str | None) -> None:
        """Note where a trial's weights lie, or that they were removed."""
        self._update(TrialTable, trial_id, {"checkpoint": checkpoint})

    def trials(self, study_id: int) -> list[TrialRow]:
        """List a study's trials by number."""
        return self._trials(study_id)

    def trial(self, study_id: int, number: int) -> TrialRow:
        """Return a trial.

        Raises:
            StoreError: The study has no trial of that number.
        """
        rows = self._trials(study_id, TrialTable.number == number)
        if not rows:
            last = select(func.max(TrialTable.number)).where(TrialTable.study_id == study_id)
            with self._engine.connect() as connection:
                top = connection.execute(last).scalar()
            range_ = "it has none yet" if top is None else f"they go from 0 to {top}"
            raise StoreError(f"there is no trial {number} in that study; {range_}.")
        return rows[0]

    def find_finished(self, study_id: int, config_hash: str) -> TrialRow | None:
        """Return the first complete or pruned trial of equal settings, if any."""
        alike = self._trials(study_id, TrialTable.config_hash == config_hash)
        return next((row for row in alike if row.state in ("complete", "pruned")), None)

    def _trials(self, study_id: int, *conditions: ColumnElement[bool]) -> list[TrialRow]:
        query = select(*_TRIAL.values()).where(TrialTable.study_id == study_id, *conditions)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(TrialTable.number)).all()
        if not rows:
            return []
        optunas = self.optuna_study(study_id).get_trials(deepcopy=False)
        own = [dict(zip(_TRIAL, row, strict=True)) for row in rows]
        return [TrialRow(**row, **_of_optuna(optunas[row["number"]], row)) for row in own]

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
            spec: Factors, cells and rules, as `study.ablation.designs` writes them.
            command: Command line.
        """
        values = {"kind": kind, "spec": spec, "command": command, "updated_at": now()}
        known = select(DesignTable.id).where(
            DesignTable.study_id == study_id, DesignTable.key == key
        )
        with self._engine.connect() as connection:
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


def _of_optuna(trial: FrozenTrial, own: Json) -> Json:
    """Return what a trial's row takes from Optuna.

    Its value is the accuracy of its best epoch; of a complete trial that is what Optuna was told.
    """
    best = own["best_epoch"]
    value = trial.value if trial.state is TrialState.COMPLETE else None
    if value is None and best is not None:
        value = trial.intermediate_values.get(best + 1)
    return {"state": _STATE_NAMES[trial.state], "params": params_of(trial), "value": value}


def params_of(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """Return a trial's parameters, or an ablation run's factors with their levels."""
    return dict(trial.user_attrs.get(LEVELS, trial.params))
