"""Read the record as frames and arrays, for reports."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from core.metrics import EpochMetrics
from study.answers import unpack_classes
from study.rows import PictureRow, TrialRow
from study.store import Store
from study.tables import (
    ConfusionTable,
    EpochTable,
    PictureTable,
    PredictionTable,
    TrialTable,
)

if TYPE_CHECKING:
    import pandas as pd

_EPOCH_FIELDS = tuple(field.name for field in dataclasses.fields(EpochMetrics))
_PICTURE = [getattr(PictureTable, field.name) for field in dataclasses.fields(PictureRow)]


def read_trials(store: Store, name: str) -> "pd.DataFrame":
    """Read a study's trials: one row each, its parameters as columns `params_NAME`.

    Raises:
        StoreError: There is no such study.
    """
    import pandas as pd

    rows = [dataclasses.asdict(row) for row in store.trials(store.study(name).id)]
    names = [f.name for f in dataclasses.fields(TrialRow) if f.name not in ("params", "config")]
    frame = pd.DataFrame([{k: row[k] for k in names} for row in rows], columns=names)
    searched = list(dict.fromkeys(key for row in rows for key in row["params"]))
    for key in searched:
        values = [row["params"].get(key) for row in rows]
        is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        frame[f"params_{key}"] = pd.Series(values, dtype=None if is_number else object)
    return frame


def read_epochs(store: Store, name: str) -> "pd.DataFrame":
    """Read a study's epochs: one row per (trial `number`, `epoch`), in that order.

    Raises:
        StoreError: There is no such study.
    """
    import pandas as pd

    columns = [TrialTable.number, *(getattr(EpochTable, f) for f in _EPOCH_FIELDS)]
    query = (
        select(*columns, EpochTable.seconds_since_start)
        .join(TrialTable, TrialTable.id == EpochTable.trial_id)
        .where(TrialTable.study_id == store.study(name).id)
        .order_by(TrialTable.number, EpochTable.epoch)
    )
    with store.engine.connect() as connection:
        rows = connection.execute(query).all()
    return pd.DataFrame(
        [tuple(row) for row in rows], columns=["number", *_EPOCH_FIELDS, "seconds_since_start"]
    )


def read_confusion(
    store: Store, name: str, number: int, split: str = "val"
) -> NDArray[np.int64] | None:
    """Read a trial's confusion matrix, (K, K), rows the truth; None if it was not kept."""
    trial = store.trial(store.study(name).id, number)
    query = select(ConfusionTable.matrix).where(
        ConfusionTable.trial_id == trial.id, ConfusionTable.split == split
    )
    with store.engine.connect() as connection:
        matrix = connection.execute(query).scalar()
    return None if matrix is None else np.array(matrix, dtype=np.int64)


def read_pictures(store: Store, name: str, number: int) -> list[PictureRow]:
    """Read the pictures that a trial got wrong, the worst first."""
    trial = store.trial(store.study(name).id, number)
    query = select(*_PICTURE).where(PictureTable.trial_id == trial.id)
    with store.engine.connect() as connection:
        rows = connection.execute(query.order_by(PictureTable.split, PictureTable.rank)).all()
    return [PictureRow(*row) for row in rows]


def read_predictions(
    store: Store, name: str, split: str = "val"
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Read what a study's trials say of each picture of a split.

    Returns:
        Trial number -> true and chosen class numbers, (N,) each; trials without are left out.
    """
    columns = (TrialTable.number, PredictionTable.labels, PredictionTable.predicted)
    query = (
        select(*columns)
        .join(TrialTable, TrialTable.id == PredictionTable.trial_id)
        .where(TrialTable.study_id == store.study(name).id, PredictionTable.split == split)
    )
    with store.engine.connect() as connection:
        rows = connection.execute(query).all()
    return {
        number: (np.array(unpack_classes(labels)), np.array(unpack_classes(predicted)))
        for number, labels, predicted in rows
    }
