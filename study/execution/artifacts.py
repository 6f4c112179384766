"""What Optuna's dashboard shows of a trial beside its values: its card, epochs and mistakes."""

import csv
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from core.metrics import EpochMetrics
from core.training.checkpoint import CARD_FILE, PREDICTIONS_FILE

ARTIFACTS_FOLDER = "optuna-artifacts"
"""Beside the studies' folders: one for all studies, as the dashboard wants it."""


def attach(
    trial: optuna.Trial,
    epochs: Sequence[EpochMetrics],
    checkpoint: Path,
    classes: Sequence[str],
    folder: Path,
) -> None:
    """Attach a running trial's card, learning curve and confusion matrix to it."""
    folder.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(str(folder))
    with tempfile.TemporaryDirectory() as made:
        for path, kind in _files(epochs, checkpoint, classes, Path(made)):
            upload_artifact(
                artifact_store=store, file_path=str(path), study_or_trial=trial, mimetype=kind
            )


def _files(
    epochs: Sequence[EpochMetrics], checkpoint: Path, classes: Sequence[str], folder: Path
) -> Iterator[tuple[Path, str]]:
    yield checkpoint / CARD_FILE, "application/json"
    rows = [dataclasses.asdict(metrics) for metrics in epochs]
    header = list(rows[0])
    lines: list[Sequence[Any]] = [[row[key] for key in header] for row in rows]
    yield _write(folder / "learning-curve.csv", [header, *lines]), "text/csv"
    with np.load(checkpoint / PREDICTIONS_FILE) as saved:
        n = len(classes)
        pairs = saved["labels"] * n + saved["predicted"]
    counts = np.bincount(pairs, minlength=n * n).reshape(n, n).tolist()
    table = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    path = _write(folder / "confusion-matrix.csv", [["true / predicted", *classes], *table])
    yield path, "text/csv"


def _write(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path
