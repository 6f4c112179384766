"""Remove a study: its record, Optuna's, and the checkpoints that it kept."""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core.config import TrainConfig
from core.models.weights import WeightsError
from core.training.checkpoint import read_card, weights_hash
from core.training.resume import epochs_in_state
from study.record.models import Trial, trial_folder
from study.record.record import Record


def delete_study(store: Record, name: str, *, command: str) -> tuple[list[Path], list[Path]]:
    """Delete a study for good, but for its report.

    Of its output only checkpoints and training states that are its own trials' go: another study
    may have written there since, and a received database can name any folder.

    Returns:
        The checkpoints that went, and what stays because it is not this study's.

    Raises:
        RecordError: There is no such study, or a process is running it.
    """
    study = store.study(name)
    # Entering as the process that works on it keeps others out until it is gone.
    store.begin_run(study.id, command=command, device="none", versions={})
    trials = store.trials(study.id)
    store.delete_study(name)
    images: Any = SimpleNamespace(**study.data)  # what a state must know of them
    gone: list[Path] = []
    left: list[Path] = []
    for row in trials:
        folder = study.output / trial_folder(row.number)
        state = study.output / "state" / f"{folder.name}.pt"
        if folder.exists():
            is_own = not folder.is_symlink() and _is_checkpoint_of(folder, row)
            (gone if is_own else left).append(folder)
            if is_own:
                shutil.rmtree(folder, ignore_errors=True)
        if state.exists():
            if epochs_in_state(state, TrainConfig(**row.config), images) is None:
                left.append(state)
            else:
                state.unlink()
    for folder in (study.output / "state", study.output):
        with contextlib.suppress(OSError):  # it is not empty, or missing
            folder.rmdir()
    return gone, left


def _is_checkpoint_of(folder: Path, row: Trial) -> bool:
    """Return whether a folder holds a trial's weights; without their hash its card decides."""
    try:
        if row.weights_hash:
            return weights_hash(folder) == row.weights_hash
        return read_card(folder).config == TrainConfig(**row.config)
    except WeightsError:
        return False
