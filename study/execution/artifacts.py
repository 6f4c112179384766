"""What Optuna's dashboard shows of a trial in files: its card, learning curve and mistakes."""

import tempfile
from pathlib import Path

import pandas as pd
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from core.training.checkpoint import CARD_FILE
from study.execution.session import Session
from study.record.frames import read_confusion
from study.record.models import ARTIFACTS_FOLDER, Trial


def attach(session: Session, row: Trial, checkpoint: Path) -> None:
    """Attach card, learning curve and confusion matrix to a trial whose predictions are kept."""
    record, classes = session.record, session.data.classes
    folder = session.output.parent / ARTIFACTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(str(folder))
    trial = record.take_up_trial(row.study_id, row.number)
    with tempfile.TemporaryDirectory() as made:
        curve, confusion = Path(made) / "learning-curve.csv", Path(made) / "confusion-matrix.csv"
        pd.DataFrame(record.epochs(row.id)).to_csv(curve, index=False)
        counts = read_confusion(record, session.config.study.name, row.number)
        pd.DataFrame(counts, classes, classes).to_csv(confusion, index_label="true / predicted")
        for file in (checkpoint / CARD_FILE, curve, confusion):
            upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial)
