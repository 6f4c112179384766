"""Remove a study: its record, Optuna's, and the checkpoints that it kept."""

import shutil
from pathlib import Path

from study.record.record import Record


def delete_study(store: Record, name: str, *, command: str) -> list[Path]:
    """Delete a study for good, but for its report; return the checkpoint folders that went.

    Raises:
        RecordError: There is no such study, or a process is running it.
    """
    study = store.study(name)
    # Entering as the process that works on it keeps others out until it is gone.
    store.begin_run(study.id, command=command, device="none", versions={})
    folders = [Path(row.checkpoint) for row in store.trials(study.id) if row.checkpoint]
    store.delete_study(name)
    states = Path(study.config["study"]["output"]) / name / "state"
    for folder in (*folders, states):
        shutil.rmtree(folder, ignore_errors=True)
    return folders
