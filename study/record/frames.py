"""The record as data frames and arrays, for reports."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from core.metrics import IntArray
from study.record.models import EPOCHS, Misclassified, Prediction, Trial
from study.record.record import EPOCH_FIELDS, Record, unpack_classes

if TYPE_CHECKING:
    import pandas as pd


def read_trials(store: Record, name: str) -> "pd.DataFrame":
    """Read a study's trials: one row each, its hyperparameters as columns `params_NAME`."""
    import pandas as pd

    rows = store.trials(store.study(name).id)
    columns = [f.name for f in dataclasses.fields(Trial) if f.name not in ("params", "config")]
    columns += ["seed", "backbone", "freeze_depth"]
    frame = pd.DataFrame([[getattr(row, c) for c in columns] for row in rows], columns=columns)
    for key in dict.fromkeys(key for row in rows for key in row.params):
        values = [row.params.get(key) for row in rows]
        is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        frame[f"params_{key}"] = pd.Series(values, dtype=None if is_number else object)
    return frame


def read_epochs(store: Record, name: str) -> "pd.DataFrame":
    """Read a study's epochs: one row per (trial `number`, `epoch`), in that order."""
    import pandas as pd

    columns = (*EPOCH_FIELDS, "seconds_since_start")
    query = (
        select(Trial.number, *(EPOCHS.c[column] for column in columns))
        .join(Trial, Trial.id == EPOCHS.c.trial_id)
        .where(Trial.study_id == store.study(name).id)
        .order_by(Trial.number, EPOCHS.c.epoch)
    )
    with Session(store.engine) as session:
        rows = [tuple(row) for row in session.execute(query)]
    return pd.DataFrame(rows, columns=["number", *columns])


def read_misclassified(store: Record, name: str, number: int) -> list[Misclassified]:
    """Read the images that a trial classified wrongly, the worst first."""
    trial = store.trial(store.study(name).id, number)
    query = select(Misclassified).where(Misclassified.trial_id == trial.id)
    with Session(store.engine) as session:
        return list(session.scalars(query.order_by(Misclassified.split, Misclassified.rank)))


def read_thumbnails(store: Record, study_id: int, paths: Sequence[str]) -> dict[str, bytes]:
    """Read thumbnails of images that a trial of a study classified wrongly; path -> JPEG."""
    query = (
        select(Misclassified.path, Misclassified.thumbnail)
        .join(Trial, Trial.id == Misclassified.trial_id)
        .where(Trial.study_id == study_id, Misclassified.path.in_(paths))
    )
    with Session(store.engine) as session:
        return {path: thumbnail for path, thumbnail in session.execute(query)}


def read_predictions(
    store: Record, name: str, split: str = "val", number: int | None = None
) -> dict[int, tuple[IntArray, IntArray]]:
    """Read what a study's trials, or that of a number, predict for each image of `val` or `test`.

    Returns:
        Trial number -> true and predicted class numbers, (N,) each; trials without are left out.
    """
    query = (
        select(Trial.number, Prediction.labels, Prediction.predicted)
        .join(Trial, Trial.id == Prediction.trial_id)
        .where(Trial.study_id == store.study(name).id, Prediction.split == split)
    )
    if number is not None:
        query = query.where(Trial.number == number)
    with Session(store.engine) as session:
        return {
            trial: (unpack_classes(labels), unpack_classes(predicted))
            for trial, labels, predicted in session.execute(query)
        }


def read_confusion(store: Record, name: str, number: int) -> IntArray | None:
    """Count a trial's validation images by class, (K, K), rows the truth; None if unknown."""
    found = read_predictions(store, name, number=number)
    if number not in found:
        return None
    labels, predicted = found[number]
    n = len(store.study(name).data["classes"])
    return np.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)
