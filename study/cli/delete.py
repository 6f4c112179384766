"""Remove a study: its record, Optuna's, and the checkpoints that it kept."""

import contextlib
from pathlib import Path

from optuna.artifacts import get_all_artifact_meta

from core.config import TrainConfig
from core.model import described, remove_model
from core.training.checkpoint import remove_checkpoint
from core.training.resume import epochs_in_state
from study.execution.files import is_checkpoint_of
from study.record.models import ARTIFACTS_FOLDER, MODEL_FOLDER, is_model_of, trial_folder
from study.record.record import Record


def delete_study(
    store: Record, name: str, *, command: str, take_over: bool = False
) -> tuple[list[Path], list[Path]]:
    """Delete a study for good, but for its report.

    Of its output only checkpoints and training states that are its own trials' go.

    Returns:
        The checkpoints that went, and what stays because it is not this study's.

    Raises:
        RecordError: There is no such study, or a process is running it.
    """
    study = store.study(name)
    # Entering as the process that works on it keeps others out until it is gone.
    store.begin_run(study.id, command=command, device="none", versions={}, take_over=take_over)
    trials = store.trials(study.id)
    images = tuple(study.data["classes"]), study.data["fingerprint"]
    artifacts = study.output.parent / ARTIFACTS_FOLDER
    for trial in store.optuna_study(study.id).get_trials(deepcopy=False):
        for found in get_all_artifact_meta(trial, storage=store.optuna_storage):
            (artifacts / found.artifact_id).unlink(missing_ok=True)
    store.delete_study(name)
    gone: list[Path] = []
    left: list[Path] = []
    for row in trials:
        folder = study.output / trial_folder(row.number)
        state = study.output / "state" / f"{folder.name}.pt"
        if folder.exists():
            if is_checkpoint_of(folder, row):
                remove_checkpoint(folder)
            (left if folder.exists() else gone).append(folder)
        if state.exists():
            if epochs_in_state(state, TrainConfig(**row.config), *images) is None:
                left.append(state)
            else:
                state.unlink()
    if is_model_of(study, described(study.output / MODEL_FOLDER)):
        remove_model(study.output / MODEL_FOLDER)
    for folder in (study.output / "state", study.output, artifacts):
        with contextlib.suppress(OSError):  # it is not empty, or missing
            folder.rmdir()
    return gone, left
