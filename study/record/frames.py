"""The record as data frames and arrays, for reports."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from study.record.models import EPOCHS, ConfusionRow, PictureRow, PredictionRow, TrialRow
from study.record.record import EPOCH_FIELDS, Store, unpack_classes

if TYPE_CHECKING:
    import pandas as pd

_FROM_CONFIG = ("seed", "backbone", "freeze_depth")
_DICTS = ("params", "config", "without_effect")


def read_trials(store: Store, name: str) -> "pd.DataFrame":
    """Read a study's trials: one row each, its hyperparameters as columns `params_NAME`.

    Raises:
        StoreError: There is no such study.
    """
    import pandas as pd

    rows = store.trials(store.study(name).id)
    columns = [f.name for f in dataclasses.fields(TrialRow) if f.name not in _DICTS]
    columns += _FROM_CONFIG
    frame = pd.DataFrame([[getattr(row, c) for c in columns] for row in rows], columns=columns)
    for key in dict.fromkeys(key for row in rows for key in row.params):
        values = [row.params.get(key) for row in rows]
        is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        frame[f"params_{key}"] = pd.Series(values, dtype=None if is_number else object)
    return frame


def read_epochs(store: Store, name: str) -> "pd.DataFrame":
    """Read a study's epochs: one row per (trial `number`, `epoch`), in that order.

    Raises:
        StoreError: There is no such study.
    """
    import pandas as pd

    columns = (*EPOCH_FIELDS, "seconds_since_start")
    query = (
        select(TrialRow.number, *(EPOCHS.c[column] for column in columns))
        .join(TrialRow, TrialRow.id == EPOCHS.c.trial_id)
        .where(TrialRow.study_id == store.study(name).id)
        .order_by(TrialRow.number, EPOCHS.c.epoch)
    )
    with Session(store.engine) as session:
        rows = [tuple(row) for row in session.execute(query)]
    return pd.DataFrame(rows, columns=["number", *columns])


def read_confusion(
    store: Store, name: str, number: int, split: str = "val"
) -> NDArray[np.int64] | None:
    """Read a trial's confusion matrix, (K, K), rows the truth; None if it was not kept."""
    trial = store.trial(store.study(name).id, number)
    with Session(store.engine) as session:
        row = session.get(ConfusionRow, (trial.id, split))
    return None if row is None else np.array(row.matrix, dtype=np.int64)


def read_pictures(store: Store, name: str, number: int) -> list[PictureRow]:
    """Read the images that a trial classified wrongly, the worst first."""
    trial = store.trial(store.study(name).id, number)
    query = select(PictureRow).where(PictureRow.trial_id == trial.id)
    with Session(store.engine) as session:
        return list(session.scalars(query.order_by(PictureRow.split, PictureRow.rank)))


def read_predictions(
    store: Store, name: str, split: str = "val"
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Read what a study's trials predict for each image of a split.

    Returns:
        Trial number -> true and predicted class numbers, (N,) each; trials without are left out.
    """
    query = (
        select(TrialRow.number, PredictionRow.labels, PredictionRow.predicted)
        .join(TrialRow, TrialRow.id == PredictionRow.trial_id)
        .where(TrialRow.study_id == store.study(name).id, PredictionRow.split == split)
    )
    with Session(store.engine) as session:
        return {
            number: (np.array(unpack_classes(labels)), np.array(unpack_classes(predicted)))
            for number, labels, predicted in session.execute(query)
        }
