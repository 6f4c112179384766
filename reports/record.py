"""All that a report says about one study, read from the record once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reports.frames import Dimension, best_number, dimensions
from study.read import read_confusion, read_epochs, read_pictures, read_trials
from study.store import (
    PictureRow,
    RunRow,
    Store,
    StudyRow,
    TestRow,
    TrialRow,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One study as the database knows it.

    Attributes:
        study: Its configuration, pictures and versions.
        trials: One row per trial, by number.
        epochs: One row per trial and epoch.
        dims: The searched settings.
        runs: The processes that worked on it, oldest first.
        tests: Looks at the test split, oldest first.
        best: The best trial; None where no trial has an accuracy.
        confusion: The best trial's matrix on the validation split, (K, K), rows = truth.
        pictures: What the best trial got wrong on the validation split, the worst first.
    """

    study: StudyRow
    trials: pd.DataFrame
    epochs: pd.DataFrame
    dims: tuple[Dimension, ...]
    runs: list[RunRow]
    tests: list[TestRow]
    best: TrialRow | None
    confusion: np.ndarray[Any, np.dtype[np.int64]] | None
    pictures: list[PictureRow]

    @property
    def classes(self) -> list[str]:
        """Name the classes in the order of the confusion matrix."""
        return [str(name) for name in self.study.data.get("classes", [])]

    @property
    def n_val(self) -> int:
        """Count the validation pictures; 0 where the record does not say."""
        return int(self.study.data.get("n_val") or 0)

    @property
    def n_test(self) -> int:
        """Count the test pictures; 0 where there is no test split."""
        return int(self.study.data.get("n_test") or 0)


def read_record(store: Store, name: str) -> Record:
    """Read a study.

    Raises:
        StoreError: There is no such study.
    """
    study = store.study(name)
    trials = _as_floats(read_trials(store, name), ("value", "duration_s"))
    number = best_number(trials)
    confusion, pictures = None, []
    if number is not None:
        shown = _trained_as(trials, number)
        confusion = read_confusion(store, name, shown)
        pictures = [row for row in read_pictures(store, name, shown) if row.split == "val"]
    return Record(
        study=study,
        trials=trials,
        epochs=_as_floats(read_epochs(store, name), ("val_acc",)),
        dims=dimensions(study.config.get("space", {}), trials),
        runs=store.runs(study.id),
        tests=store.tests(study.id),
        best=None if number is None else store.trial(study.id, number),
        confusion=confusion,
        pictures=pictures,
    )


def _as_floats(frame: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """Make figures of columns that hold no value yet: pandas would take them for objects."""
    return frame.astype(dict.fromkeys(columns, float))


def _trained_as(trials: pd.DataFrame, number: int) -> int:
    """Follow `same as N` to the trial that was trained."""
    origin = str(trials.set_index("number").at[number, "origin"])
    return int(origin.removeprefix("same as ")) if origin.startswith("same as ") else number
