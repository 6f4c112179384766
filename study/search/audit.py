"""Audit a search's pruner: train some of its pruned trials to the end, in a study of their own."""

import dataclasses

import numpy as np

from core.config import TrainConfig
from study.config.errors import ConfigError
from study.config.formatting import study_command
from study.config.search_space import distributions
from study.config.study_config import StudyConfig
from study.execution.progress import Progress, StudyState
from study.execution.recovery import recover
from study.execution.session import Session, corner_configs, open_session, stored_side
from study.execution.trial_engine import TrialEngine, TrialRequest, is_settled
from study.record.models import Trial
from study.record.record import Record

SUFFIX = "-audit"
"""What the audit's study is called after the search's name."""
FACTOR = "audit"
"""What its trials have in the column `factor`; their `level` is the pruned trial's number."""


def audit_study(
    record: Record,
    name: str,
    n_trials: int,
    *,
    progress: Progress,
    command: str,
    take_over: bool = False,
) -> str | None:
    """Train `n_trials` pruned trials of a study to the end, as if they had not been pruned.

    The sample is drawn at random, but the same whenever the command is given again: with a larger
    number it is extended.

    Returns:
        Why the run ended, `trials` or `interrupted`; None where nothing was pruned.

    Raises:
        ConfigError: The study is an ablation or an audit.
        RecordError: There is no such study, or another process runs its audit.
    """
    study = record.study(name)
    rows = record.trials(study.id)
    if record.designs(study.id) or any(row.factor == FACTOR for row in rows):
        raise ConfigError(
            f"an audit looks at a search's pruner, but {name} is no search. Name the search."
        )
    pruned = [row for row in rows if row.state == "pruned" and row.epochs_done]
    if not pruned:
        return None
    order = np.random.default_rng(study.id).permutation(len(pruned))
    chosen = [pruned[k] for k in order[:n_trials]]
    with open_session(
        record,
        _audit_config(StudyConfig.from_record(study.config)),
        [TrainConfig(**row.config) for row in chosen],
        progress=progress,
        command=command,
        resume=study_command("audit", name, record.storage, f"--sample {n_trials}"),
        take_over=take_over,
    ) as session:
        session.because = _run(session, chosen)
        return session.because


def _audit_config(source: StudyConfig) -> StudyConfig:
    """Return the audit's configuration: the search's, on images of the same size."""
    data = source.data
    if data.store_size is None:
        data = dataclasses.replace(data, store_size=stored_side(corner_configs(source)))
    named = dataclasses.replace(source.study, name=source.study.name + SUFFIX, time=None)
    return source.model_copy(update={"study": named, "data": data})


def _run(session: Session, chosen: list[Trial]) -> str:
    record, study_id = session.record, session.study_id
    space = distributions(session.config.space)
    engine = TrialEngine(session, keep_best=0)
    requests = recover(engine)
    rows = record.trials(study_id)
    done = {row.level for row in rows if is_settled(row)} | {r.level for r in requests}

    def show() -> None:
        state = StudyState.of(session.config.study.name, len(chosen), record.trials(study_id))
        session.progress.emit(state)

    show()
    for request in requests:
        engine.run(request)  # each only saves its state again, once a stop was asked for
        show()
    for row in chosen:
        if because := session.halted():
            return because
        if str(row.number) in done:
            continue
        params = {key: value for key, value in row.params.items() if key in space}
        number = record.start_trial(study_id, params, space, {"audits": row.number}).number
        request = TrialRequest(
            number=number,
            config=TrainConfig(**row.config),
            origin=f"audit of trial {row.number}",
            params=params,
            factor=FACTOR,
            level=str(row.number),
        )
        engine.run(request)
        show()
    return session.halted() or "trials"
