"""The files of trials: which checkpoints are kept, and what they say of the validation images."""

import dataclasses
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from PIL import Image

from core.config import MAX_FREEZE_DEPTH
from core.data.decode import UInt8Array
from core.metrics import FloatArray, IntArray
from core.models.weights import WeightsError
from core.training.checkpoint import (
    CARD_FILE,
    PREDICTIONS_FILE,
    read_card,
    remove_checkpoint,
    weights_hash,
)
from study.execution.session import Session
from study.record.frames import read_confusion
from study.record.models import ARTIFACTS_FOLDER, Misclassified, Trial, trial_folder

# The worst images that a report shows, and the side of their thumbnails in pixels.
_N_WORST = 16
_THUMBNAIL = 160


class TrialFiles:
    """The checkpoints and training states of a study's trials.

    Args:
        keep_best: Checkpoints to keep: those of the best trials, and where the model is a mean of
            trials those of which it can be made; None for all, 0 for none.
    """

    def __init__(self, session: Session, keep_best: int | None) -> None:
        self._session = session
        self._keep_best = keep_best
        self._kept: list[Trial] = []

    def checkpoint(self, number: int) -> Path:
        """Return the folder of a trial's checkpoint."""
        return self._session.output / trial_folder(number)

    def state(self, number: int) -> Path:
        """Return the file of a trial's training state."""
        return self._session.output / "state" / f"{trial_folder(number)}.pt"

    def load(self, rows: Iterable[Trial], continued: Sequence[int]) -> None:
        """Take over the checkpoints of earlier processes, and the states of continued trials.

        What other trials left, as a killed one does, is removed.
        """
        others = [row for row in rows if row.number not in continued]
        self._kept = [row for row in others if row.weights_hash]
        self._drop()
        for row in others:
            folder = self.checkpoint(row.number)
            is_cut_short = not (folder / CARD_FILE).is_file()  # it is written last
            if not row.weights_hash and (is_cut_short or is_checkpoint_of(folder, row)):
                remove_checkpoint(folder)
        wanted = {self.state(number) for number in continued}
        for file in self._session.output.glob("state/*"):
            if file not in wanted:
                file.unlink(missing_ok=True)

    def record(self, row: Trial) -> str | None:
        """Record what a complete trial predicts; return its weights' hash if they are kept.

        Of a search's best trial so far, its worst images are recorded, too. It comes before the
        trial ends: what a kill prevents is then done again.
        """
        folder, record = self.checkpoint(row.number), self._session.record
        with np.load(folder / PREDICTIONS_FILE) as saved:
            labels, predicted = saved["labels"], saved["predicted"]
            record.add_predictions(row.id, "val", labels, predicted)
            if self._keep_best and all(row.rank < other.rank for other in self._kept):
                probability = saved["probabilities"][np.arange(len(labels)), labels]
                self._record_worst(row.id, labels, predicted, probability)
        return None if self._keep_best == 0 else weights_hash(folder)

    def attach(self, row: Trial) -> None:
        """Attach card, learning curve and mistakes of a recorded trial for Optuna's dashboard."""
        record, classes = self._session.record, self._session.data.classes
        folder = self._session.output.parent / ARTIFACTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        store = FileSystemArtifactStore(str(folder))
        trial = record.take_up_trial(row.study_id, row.number)
        with tempfile.TemporaryDirectory() as made:
            curve = Path(made) / "learning-curve.csv"
            confusion = Path(made) / "confusion-matrix.csv"
            pd.DataFrame(record.epochs(row.id)).to_csv(curve, index=False)
            counts = read_confusion(record, self._session.config.study.name, row.number)
            frame = pd.DataFrame(counts, classes, classes)
            frame.to_csv(confusion, index_label="true / predicted")
            for file in (self.checkpoint(row.number) / CARD_FILE, curve, confusion):
                upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial)

    def keep(self, row: Trial) -> None:
        """Keep a recorded trial's checkpoint while it is among the best."""
        self._kept.append(row)
        self._drop()

    def _drop(self) -> None:
        if self._keep_best is None:
            return
        self._kept.sort(key=lambda row: row.rank)
        is_mean = self._keep_best and self._session.config.study.finish == "ensemble"
        members = model_members(self._kept) if is_mean else []
        kept = self._kept[: self._keep_best]
        dropped = [row for row in self._kept if row not in kept and row not in members]
        for row in dropped:
            self._kept.remove(row)
            row.weights_hash = None
            self._session.record.save(row)
            remove_checkpoint(self.checkpoint(row.number))

    def _record_worst(
        self, trial_id: int, labels: IntArray, predicted: IntArray, probability: FloatArray
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


def model_members(rows: Iterable[Trial]) -> list[Trial]:
    """Return, best first, each backbone's best head and thawed trial: what a mean is made of."""
    found: dict[tuple[object, ...], Trial] = {}
    for row in sorted(rows, key=lambda row: row.rank):
        is_head = row.freeze_depth == MAX_FREEZE_DEPTH
        found.setdefault((row.backbone, is_head), row)
    return list(found.values())


def is_checkpoint_of(folder: Path, row: Trial) -> bool:
    """Return whether a folder holds a trial's weights; without their hash its card decides.

    Another study may have written there, and a received database can name any folder.
    """
    try:
        if row.weights_hash:
            return weights_hash(folder) == row.weights_hash
        return dataclasses.asdict(read_card(folder).config) == row.config
    except WeightsError:
        return False


def _thumbnail(pixels: UInt8Array) -> bytes:
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
