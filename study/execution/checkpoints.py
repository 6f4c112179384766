"""Which trials keep their checkpoint, and what it says about the validation images."""

import io
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.training.checkpoint import PREDICTIONS_FILE
from study.execution.session import Session
from study.record.models import Misclassified, Trial

# The worst images that a report shows, and the side of their thumbnails in pixels.
_N_WORST = 16
_THUMBNAIL = 160


class Checkpoints:
    """The checkpoints of a study's trials.

    Args:
        session: The study that this process works on.
        keep_best: How many to keep: those of the best trials; None for all, 0 for none.
    """

    def __init__(self, session: Session, keep_best: int | None) -> None:
        self._session = session
        self._keep_best = keep_best
        self._kept: dict[int, tuple[tuple[float, int], int]] = {}  # number -> rank, trial_id

    def folder(self, number: int) -> Path:
        """Return where a trial's checkpoint lies."""
        return self._session.output / f"trial-{number:04d}"

    def load(self, rows: Iterable[Trial]) -> None:
        """Take over the checkpoints of earlier processes."""
        self._kept = {row.number: (row.rank, row.id) for row in rows if row.checkpoint}
        self._drop()

    def record(self, trial_id: int, number: int, score: float) -> str | None:
        """Record what a complete trial predicts; return its checkpoint's folder if it is kept.

        Of a search's best trial so far, its confusion matrix and its worst images are recorded,
        too. It comes before the trial ends: what a kill prevents is then done again.
        """
        rank = -score, number
        with np.load(self.folder(number) / PREDICTIONS_FILE) as saved:
            labels, predicted = saved["labels"], saved["predicted"]
            self._session.record.add_predictions(
                trial_id, "val", labels.tolist(), predicted.tolist()
            )
            if self._keep_best and all(rank < other for other, _ in self._kept.values()):
                self._session.record.add_confusion(trial_id, "val", saved["confusion"].tolist())
                self._record_worst(trial_id, labels, predicted, saved["probability"])
        return None if self._keep_best == 0 else str(self.folder(number))

    def keep(self, trial_id: int, number: int, score: float) -> None:
        """Keep a recorded trial's checkpoint while it is among the best."""
        self._kept[number] = (-score, number), trial_id
        self._drop()

    def _drop(self) -> None:
        if self._keep_best is None:
            return
        ranked = sorted(self._kept, key=lambda number: self._kept[number])
        for number in ranked[self._keep_best :]:
            _, trial_id = self._kept.pop(number)
            if self._keep_best:
                self._session.record.set_checkpoint(trial_id, None)
            shutil.rmtree(self.folder(number), ignore_errors=True)

    def _record_worst(
        self,
        trial_id: int,
        labels: NDArray[np.int64],
        predicted: NDArray[np.int64],
        probability: NDArray[np.float64],
    ) -> None:
        wrong = np.flatnonzero(labels != predicted)
        worst = wrong[np.argsort(probability[wrong], kind="stable")][:_N_WORST]
        split, classes = self._session.data.val, self._session.data.classes
        rows = [
            Misclassified(
                trial_id=trial_id,
                split="val",
                rank=rank,
                path=split.paths[i],
                label=classes[labels[i]],
                predicted=classes[predicted[i]],
                probability=float(probability[i]),
                thumbnail=_thumbnail(split.store.image(int(split.indices[i]))),
            )
            for rank, i in enumerate(worst.tolist())
        ]
        self._session.record.add_misclassified(trial_id, rows)


def _thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
