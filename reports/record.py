"""All that a report says about one study, read from the record once."""

import contextlib
import functools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from reports.intervals import selection_bias, simulated_bias
from reports.trials import Importance, dimensions, final_accuracies, importances, varied
from study.record.frames import (
    read_confusion,
    read_epochs,
    read_misclassified,
    read_predictions,
    read_trials,
)
from study.record.models import (
    COPY,
    MODEL_FOLDER,
    Misclassified,
    Run,
    Study,
    Test,
    Trial,
    best_of,
    is_model_of,
)
from study.record.record import Record

_AUDIT_SUFFIX = "-audit"
_AUDIT_FACTOR = "audit"
_MOST_SIMULATED = 500  # trials: worse ones could not have been chosen


@dataclass(frozen=True, slots=True)
class Audited:
    """A pruned trial that was trained to the end.

    Attributes:
        epochs: Epochs that it had when it was pruned.
        pruned_value: Validation accuracy of its best epoch then, a fraction.
        full_value: The same at the full budget; NaN where it failed.
        full_score: What that epoch is ranked by; NaN where it failed.
    """

    number: int
    epochs: int
    pruned_value: float
    full_value: float
    full_score: float


@dataclass(frozen=True)
class SearchRecord:
    """One study as the database knows it.

    Attributes:
        study: Its configuration, images and versions.
        trials: One row per trial, by number.
        epochs: One row per trial and epoch.
        frozen: The same trials as Optuna has them.
        runs: The processes that worked on it, oldest first.
        tests: Looks at the test split, oldest first.
        best: The best trial, a pruned one only if none finished; None where none has an accuracy.
        confusion: The best trial's matrix on the validation split, (K, K), rows = truth.
        images: What the best trial got wrong on the validation split, the worst first.
        audited: Pruned trials that an audit trained to the end, by number.
        model: What `model/` is made of, as its `model.json` says; empty where there is none.
        optimism: How far the best accuracy is too high on average, and at most, fractions.
    """

    study: Study
    trials: pd.DataFrame
    epochs: pd.DataFrame
    frozen: list[FrozenTrial]
    runs: list[Run]
    tests: list[Test]
    best: Trial | None
    confusion: np.ndarray[Any, np.dtype[np.int64]] | None
    images: list[Misclassified]
    audited: tuple[Audited, ...]
    model: Mapping[str, Any]
    optimism: tuple[float, float]

    @functools.cached_property
    def idle(self) -> dict[str, set[int]]:
        """By setting, the numbers of trials in which it did nothing."""
        found: defaultdict[str, set[int]] = defaultdict(set)
        for number, keys in self.trials[["number", "without_effect"]].itertuples(index=False):
            for key in keys:
                found[key].add(number)
        return found

    @functools.cached_property
    def varied(self) -> list[str]:
        """The searched settings of which trials had more than one value."""
        return varied(self.frozen)

    @functools.cached_property
    def dims(self) -> dict[str, BaseDistribution]:
        """The searched settings."""
        return dimensions(self.frozen)

    @functools.cached_property
    def final(self) -> "pd.Series[float]":
        """Final accuracies by trial number, those of pruned trials estimated."""
        return final_accuracies(self.trials, self.epochs)

    @functools.cached_property
    def importance(self) -> Importance:
        """How much each setting mattered."""
        is_planned = self.trials["origin"].astype(str).str.startswith("plan")
        planned = set(self.trials.loc[is_planned, "number"])
        return importances(self.frozen, self.final, planned)

    @property
    def classes(self) -> list[str]:
        """Name the classes in the order of the confusion matrix."""
        return [str(name) for name in self.study.data["classes"]]

    @property
    def n_val(self) -> int:
        """Count the validation images."""
        return int(self.study.data["n_val"])

    @property
    def n_test(self) -> int:
        """Count the test images; 0 where there is no test split."""
        return int(self.study.data["n_test"])


def read_record(store: Record, name: str) -> SearchRecord:
    """Read a study.

    Raises:
        RecordError: There is no such study.
    """
    study = store.study(name)
    model: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((study.output / MODEL_FOLDER / "model.json").read_text("utf-8"))
        model = found if isinstance(found, dict) and is_model_of(study, found) else {}
    # Of columns that hold no value yet pandas would make objects.
    figures = dict.fromkeys(("value", "score", "duration_s"), float)
    trials, rows = read_trials(store, name).astype(figures), store.trials(study.id)
    pruned = (row for row in rows if row.state == "pruned" and row.value is not None)
    best = best_of(rows) or min(pruned, key=lambda row: row.rank, default=None)
    confusion, images = None, []
    if best is not None:
        is_copy = best.origin.startswith(COPY)
        trained = int(best.origin.removeprefix(COPY)) if is_copy else best.number
        confusion = read_confusion(store, name, trained)
        images = [row for row in read_misclassified(store, name, trained) if row.split == "val"]
    n_epochs, value = sum(row.epochs_done for row in rows), best.value if best else None
    bound = selection_bias(value or 0.0, int(study.data["n_val"]), n_epochs)
    return SearchRecord(
        study=study,
        trials=trials,
        epochs=read_epochs(store, name).astype({"val_acc": float}),
        frozen=store.optuna_study(study.id).get_trials(deepcopy=False),
        runs=store.runs(study.id),
        tests=store.tests(study.id),
        best=best,
        confusion=confusion,
        images=images,
        audited=_audited(store, study, rows),
        model=model,
        optimism=(optimism(store, name), bound),
    )


def optimism(store: Record, name: str) -> float:
    """Return how far a study's best accuracy is too high, simulated from its predictions."""
    found = [labels == guess for labels, guess in read_predictions(store, name).values()]
    found = [row for row in found if len(row) == len(found[-1])]  # the images may have changed
    best = sorted(found, key=np.mean)[-_MOST_SIMULATED:]
    return simulated_bias(np.stack(best).astype(np.float64)) if best else 0.0


def _audited(store: Record, study: Study, rows: Sequence[Trial]) -> tuple[Audited, ...]:
    audit = store.find_study(study.name + _AUDIT_SUFFIX)
    source = {row.number: row for row in rows}
    found: dict[int, Audited] = {}
    for row in store.trials(audit.id) if audit else []:
        pruned = source.get(int(row.level or -1)) if row.factor == _AUDIT_FACTOR else None
        is_complete = row.state == "complete"
        if pruned is None or not (is_complete or (row.reason or "").startswith("diverged")):
            continue
        found[pruned.number] = Audited(
            pruned.number,
            pruned.epochs_done,
            _or_nan(pruned.value),
            _or_nan(row.value if is_complete else None),
            _or_nan(row.ranked_by if is_complete else None),
        )
    return tuple(found[number] for number in sorted(found))


def _or_nan(figure: float | None) -> float:
    return math.nan if figure is None else figure
