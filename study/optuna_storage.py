"""Optuna's tables: opened like ours, and written a whole trial at a time.

Optuna's own storage checks and reads back every parameter and every report through its object
mapper, which takes 20 ms for a trial with 20 reports. What is written here is row for row what
Optuna would have written, and a test holds the two side by side.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy import Table, delete, func, insert, select
from sqlalchemy.exc import IntegrityError, OperationalError

from study.database import BUSY_TIMEOUT_S, database_url, sole_writer, sqlite_pragmas

_RETRY_S = 0.1
_TRIALS: Table = models.TrialModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_REPORTS: Table = models.TrialIntermediateValueModel.__table__
_USER_ATTRS: Table = models.TrialUserAttributeModel.__table__
_SYSTEM_ATTRS: Table = models.TrialSystemAttributeModel.__table__


def open_optuna_storage(storage: str) -> RDBStorage:
    """Open Optuna's tables, with the same settings of SQLite as ours.

    Several processes may open a new database at once; Optuna's creation of tables then fails in
    all but one, and is tried again.
    """
    url = database_url(storage)
    options: dict[str, Any] = {}
    if url.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    last = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            opened = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
            break
        except (IntegrityError, OperationalError):
            if time.monotonic() > last:
                raise
            time.sleep(_RETRY_S)
    opened.engine.dispose()  # connections made so far lack the settings
    sqlite_pragmas(opened.engine)
    return opened


def delete_optuna_study(storage: str, name: str) -> None:
    """Remove a study from Optuna's tables, if it is there."""
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name=name, storage=open_optuna_storage(storage))


def write_trial(storage: RDBStorage, study_id: int, trial: FrozenTrial) -> int:
    """Add a trial with all that is known of it in one transaction; return its key.

    Args:
        storage: From `open_optuna_storage`.
        study_id: The study's key in it.
        trial: Any state; its number is given by the database.
    """
    return write_trials(storage, study_id, [trial])[0]


def write_trials(
    storage: RDBStorage, study_id: int, trials: Sequence[FrozenTrial]
) -> tuple[int, ...]:
    """Add trials, in the order of their numbers, in one transaction; return their keys."""
    number = select(func.count()).select_from(_TRIALS).where(_TRIALS.c.study_id == study_id)
    with sole_writer(storage.engine) as connection:
        first = connection.execute(number).scalar_one()
        rows: dict[Table, list[dict[str, Any]]] = {}
        keys = []
        for k, trial in enumerate(trials):
            row = {
                "study_id": study_id,
                "number": first + k,
                "state": trial.state,
                "datetime_start": _utc(trial.datetime_start),
                "datetime_complete": _utc(trial.datetime_complete),
            }
            key = connection.execute(insert(_TRIALS), row).inserted_primary_key
            assert key is not None
            keys.append(int(key[0]))
            for table, parts in _parts(trial).items():
                rows.setdefault(table, []).extend({"trial_id": key[0], **part} for part in parts)
        for table, parts in rows.items():
            if parts:
                connection.execute(insert(table), parts)
    return tuple(keys)


def write_reports(storage: RDBStorage, trial_id: int, reports: Mapping[int, float]) -> None:
    """Add a running trial's values by step, none of which is there yet, in one transaction."""
    if reports:
        rows = [{"trial_id": trial_id, **row} for row in _reports(reports)]
        with storage.engine.begin() as connection:
            connection.execute(insert(_REPORTS), rows)


def drop_reports(storage: RDBStorage, trial_id: int, last_step: int) -> None:
    """Remove a trial's values beyond a step."""
    beyond = (_REPORTS.c.trial_id == trial_id) & (_REPORTS.c.step > last_step)
    with storage.engine.begin() as connection:
        connection.execute(delete(_REPORTS).where(beyond))


def _parts(trial: FrozenTrial) -> dict[Table, list[dict[str, Any]]]:
    """Return what a trial puts into the tables beside its own."""
    to_stored = models.TrialValueModel.value_to_stored_repr
    values = [(k, *to_stored(value)) for k, value in enumerate(trial.values or ())]
    params = [
        {
            "param_name": name,
            "param_value": distribution.to_internal_repr(trial.params[name]),
            "distribution_json": distribution_to_json(distribution),
        }
        for name, distribution in trial.distributions.items()
    ]
    return {
        _VALUES: [{"objective": k, "value": v, "value_type": kind} for k, v, kind in values],
        _PARAMS: params,
        _USER_ATTRS: _attrs(trial.user_attrs),
        _SYSTEM_ATTRS: _attrs(trial.system_attrs),
        _REPORTS: _reports(trial.intermediate_values),
    }


def _attrs(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]


def _reports(reports: Mapping[int, float]) -> list[dict[str, Any]]:
    to_stored = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
    stored = [(step, *to_stored(value)) for step, value in reports.items()]
    return [
        {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
        for step, value, kind in stored
    ]


def _utc(moment: datetime | None) -> datetime | None:
    """Return local time as Optuna keeps it: UTC, without saying so."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)
