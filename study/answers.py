"""The part of the record that says what a trial made of every picture, and looks at the test."""

import dataclasses
import struct
import zlib
from collections.abc import Sequence

from sqlalchemy import delete, insert, select

from study.records import Records, columns_of, now
from study.rows import PictureRow, TestRow
from study.tables import ConfusionTable, PictureTable, PredictionTable, TestTable

_TEST = columns_of(TestTable, TestRow)


def pack_classes(numbers: Sequence[int]) -> bytes:
    """Write class numbers as compressed 32-bit integers, little-endian."""
    return zlib.compress(struct.pack(f"<{len(numbers)}i", *numbers))


def unpack_classes(packed: bytes) -> tuple[int, ...]:
    """Read back what `pack_classes` wrote."""
    raw = zlib.decompress(packed)
    return struct.unpack(f"<{len(raw) // 4}i", raw)


class Answers(Records):
    """What trials say of pictures: confusions, mistakes, predictions, and tests."""

    def add_confusion(self, trial_id: int, split: str, matrix: list[list[int]]) -> None:
        """Keep a trial's confusion matrix on a split, rows the truth; an earlier one goes."""
        with self._writing() as connection:
            connection.execute(
                delete(ConfusionTable).where(
                    ConfusionTable.trial_id == trial_id, ConfusionTable.split == split
                )
            )
            values = {"trial_id": trial_id, "split": split, "matrix": matrix}
            connection.execute(insert(ConfusionTable), values)

    def add_pictures(self, trial_id: int, rows: Sequence[PictureRow]) -> None:
        """Keep the pictures that a trial got wrong; earlier ones of the trial go."""
        values = [{"trial_id": trial_id, **dataclasses.asdict(row)} for row in rows]
        with self._writing() as connection:
            connection.execute(delete(PictureTable).where(PictureTable.trial_id == trial_id))
            if values:
                connection.execute(insert(PictureTable), values)

    def add_test(
        self,
        study_id: int,
        trial_number: int,
        *,
        n: int,
        n_correct: int,
        balanced_acc: float,
        macro_f1: float,
        val_acc: float | None,
        confusion: list[list[int]],
        command: str,
    ) -> int:
        """Record a look at the test split, with its 95 % Wilson interval; return its key."""
        from scipy.stats import binomtest

        interval = binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
        values = {
            "study_id": study_id,
            "trial_number": trial_number,
            "created_at": now(),
            "n": n,
            "n_correct": n_correct,
            "accuracy": n_correct / n,
            "low": float(interval.low),
            "high": float(interval.high),
            "balanced_acc": balanced_acc,
            "macro_f1": macro_f1,
            "val_acc": val_acc,
            "confusion": confusion,
            "command": command,
        }
        return self._insert(TestTable, values)

    def tests(self, study_id: int) -> list[TestRow]:
        """List the looks at a study's test split, oldest first."""
        query = select(*_TEST).where(TestTable.study_id == study_id).order_by(TestTable.id)
        return self._rows(TestRow, query)

    def add_predictions(
        self, trial_id: int, split: str, labels: Sequence[int], predicted: Sequence[int]
    ) -> None:
        """Keep what a trial says of each picture of a split; an earlier answer goes.

        Args:
            trial_id: The trial.
            split: `val` or `test`.
            labels: True class numbers, (N,), in the split's order.
            predicted: Chosen class numbers, (N,).
        """
        values = {
            "trial_id": trial_id,
            "split": split,
            "labels": pack_classes(labels),
            "predicted": pack_classes(predicted),
        }
        with self._writing() as connection:
            connection.execute(
                delete(PredictionTable).where(
                    PredictionTable.trial_id == trial_id, PredictionTable.split == split
                )
            )
            connection.execute(insert(PredictionTable), values)

    def has_predictions(self, trial_id: int, split: str) -> bool:
        """Say whether a trial's answers on a split are kept."""
        query = select(PredictionTable.trial_id).where(
            PredictionTable.trial_id == trial_id, PredictionTable.split == split
        )
        with self._engine.connect() as connection:
            return connection.execute(query).scalar() is not None
