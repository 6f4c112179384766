"""Take up the trials that a killed or stopped process left running, before new ones begin."""

from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.training.resume import epochs_in_state
from study.execution.progress import Note
from study.execution.trial_engine import FOLD, TrialEngine, TrialRequest, training_s
from study.record.models import COMMIT, LOST, REASON_KILLED, Trial
from study.record.record import params_of

MOST_RERUNS = 3
"""Settings that took the process down with them are run again this often at most."""
RERUNS = "reruns"
"""The user attribute that holds how often a trial's settings ran before."""


def recover(engine: TrialEngine) -> list[TrialRequest]:
    """Deal with every trial that is still running for Optuna; return those to be continued.

    One that ended in our tables is reported to Optuna; one with a usable training state is to be
    continued; any other is failed, so that its settings run again.
    """
    record, study_id = engine.session.record, engine.session.study_id
    rows = {row.number: row for row in record.trials(study_id)}
    running = record.optuna_study(study_id).get_trials(False, states=(TrialState.RUNNING,))
    continued = []
    for trial in running:
        row = rows.get(trial.number)
        if row is None:  # asked for, but never begun
            record.tell(study_id, trial.number, "failed")
        elif row.ended_at is not None:
            record.tell(study_id, row.number, row.ended_as, row.value)
        elif (request := _continuation(engine, row, trial)) is not None:
            continued.append(request)
        else:
            row.reason, row.duration_s = REASON_KILLED, training_s(record.epochs(row.id))
            record.end_trial(row, "failed")
            repeated = "; it is run again" if row.factor else ""  # of a search its settings may be
            note = f"Trial {row.number} was cut short when its process died{repeated}."
            engine.session.progress.emit(Note(note))
    engine.files.load(rows.values(), continued=[request.number for request in continued])
    return continued


def _continuation(engine: TrialEngine, row: Trial, trial: FrozenTrial) -> TrialRequest | None:
    """Return the request that continues a trial; None where that cannot be.

    Trials whose process was killed are continued a few times only: they may be the cause.
    """
    session = engine.session
    runs = session.record.runs(session.study_id)
    was_killed = len(runs) > 1 and runs[-2].outcome == LOST
    reruns = int(trial.user_attrs.get(RERUNS, 0)) + was_killed
    request = TrialRequest(
        number=row.number,
        config=TrainConfig(**row.config),
        origin=row.origin,
        params=params_of(trial),
        fold=tuple(fold) if (fold := trial.user_attrs.get(FOLD)) else None,
        factor=row.factor,
        level=row.level,
        replicate=row.replicate,
        identity=row.config_hash,
        is_continued=True,
    )
    data = session.images(request.fold)
    file = engine.files.state(row.number)
    n_done = epochs_in_state(file, request.config, data.classes, data.fingerprint)
    versions = {run.id: {**run.versions, COMMIT: ""} for run in runs}
    is_repeatable = session.same_images and versions[row.run_id] == versions[session.run_id]
    if n_done is None and not was_killed and (is_repeatable or not row.epochs_done):
        n_done = 0  # nothing was saved, or the disk was full: the same epochs again
    if reruns > MOST_RERUNS or n_done is None or n_done > row.epochs_done:
        return None
    if was_killed:
        session.record.take_up_trial(session.study_id, row.number).set_user_attr(RERUNS, reruns)
    return request
