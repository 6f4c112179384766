"""What an error says about the database that it came from."""

import zlib
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from pydantic.dataclasses import dataclass
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from core.config import TrainConfig
from study.config.search_space import parse_space
from study.config.study_config import StudyConfig
from study.record.models import Base, Study

_FULL = "disk is full", "disk I/O error", "No space left"
_DAMAGED = "malformed", "decode", "not a database", "no such", "does not exist"
_OF_TRIAL = itemgetter("seed", "backbone", "freeze_depth")
_OURS = "core", "study", "reports", "click"


@dataclass
class _Images:
    source: str
    classes: list[str]
    n_train: int
    n_val: int
    n_test: int
    fingerprint: str


def _check_config(config: Any) -> None:
    StudyConfig.from_record(config)
    wrong = [fault.sentence for fault in parse_space(config["space"])[1]]
    if wrong or not config["study"]["output"]:
        raise ValueError(wrong or "study.output is missing")


_CHECKS: dict[str, Callable[[Any], object]] = {
    "frostline_studies.config": _check_config,
    "frostline_studies.data": lambda data: _Images(**data),
    "frostline_studies.versions": lambda versions: versions.items(),
    "frostline_trials.config": lambda config: (TrainConfig(**config), _OF_TRIAL(config)),
    "frostline_predictions.labels": zlib.decompress,
    "frostline_predictions.predicted": zlib.decompress,
}


def is_full(err: BaseException) -> bool:
    """Return whether a database could not write for want of space."""
    return any(words in str(getattr(err, "orig", err)) for words in _FULL)


def failure(err: BaseException) -> str | None:
    """Say in words what failed in a database and what to do; None for an error elsewhere."""
    # Optuna's word for an error of the database
    cause = err.__cause__ if isinstance(err, StorageInternalError) else err
    if not isinstance(cause, SQLAlchemyError):
        return None
    # What follows in the same transaction only says that it was broken off.
    while not hasattr(cause, "orig") and cause.__context__ is not None:
        cause = cause.__context__
    text = " ".join(str(getattr(cause, "orig", cause)).split()).rstrip(".?")
    if is_full(cause):
        return f"cannot be written: {text}. Free space on its disk."
    if any(words in text for words in _DAMAGED):
        return f"is damaged: {text}. Restore a copy of it, or name another with --storage."
    return f"cannot be used: {text}. Check that it can be reached, and its permissions."


def find_damage(err: Exception, engine: Engine, optuna: RDBStorage) -> str | None:
    """Say what is wrong in a database that made us fail; None where that is not its fault.

    It reads every row, since any of them may be what led to the error.
    """
    # A folder that cannot be written, or what we said ourselves, has nothing to do with it.
    if isinstance(err, OSError) or type(err).__module__.partition(".")[0] in _OURS:
        return None
    place = "its file"
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                found = connection.exec_driver_sql("PRAGMA quick_check").scalar()
                if found != "ok":
                    raise ValueError(found)
            for table in Base.metadata.sorted_tables:
                place = table.name
                for row in connection.execute(select(table)):
                    for column, value in zip(table.columns, row, strict=True):
                        place = str(column)
                        kind = (column.type.python_type, type(None))[: 1 + bool(column.nullable)]
                        if not isinstance(value, kind):
                            raise TypeError(f"holds {str(value)[:40]!r}")
                        _CHECKS.get(place, bool)(value)
            place = "Optuna's tables"
            optuna.get_all_studies()
            for name in connection.scalars(select(Study.name)).all():
                optuna.get_all_trials(optuna.get_study_id_from_name(name))
    except Exception as found:  # damage makes a driver, Optuna or pydantic raise nearly anything
        return failure(found) or f"is damaged ({place}: {found}). Restore a copy of it."
    return None
