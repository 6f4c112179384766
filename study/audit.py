"""Audit a search's pruner: train some of its pruned trials to the end, in a study of their own."""

import dataclasses
import time

import numpy as np
import optuna

from core.config import TrainConfig
from study.ablation.run import is_done
from study.config.errors import ConfigError
from study.config.search_space import distributions
from study.config.study_config import StudyConfig
from study.progress import Progress
from study.record.models import Trial
from study.record.record import Record
from study.roster import Roster
from study.runner import Asked, Work, drop_checkpoint, identity, run_trial
from study.search import SearchOutcome
from study.session import (
    close_killed,
    corner_configs,
    open_session,
    picture_size,
)

SUFFIX = "-audit"
"""What the audit's study is called after the search's name."""
FACTOR = "audit"
"""What its trials have in the column `factor`; their `level` is the pruned trial's number."""


def audit_study(
    store: Record,
    name: str,
    n_trials: int,
    *,
    progress: Progress,
    command: str,
    take_over: bool = False,
) -> SearchOutcome | None:
    """Train pruned trials of a study to their full budget, as they would have gone on.

    The sample is drawn at random, but the same whenever the command is given again: with a larger
    number it goes on. Nothing is chosen by it, so the test split is not read.

    Args:
        store: The record.
        name: The search.
        n_trials: How many of its pruned trials to train; fewer where it has fewer.
        progress: What the user sees.
        command: Command line, for the record.
        take_over: Begin although a process of another machine has not signed off.

    Returns:
        How the run ended; None where nothing was pruned.

    Raises:
        ConfigError: The study is an ablation or an audit.
        RecordError: There is no such study, or its audit is being run elsewhere.
    """
    study = store.study(name)
    rows = store.trials(study.id)
    if store.designs(study.id) or any(row.factor == FACTOR for row in rows):
        raise ConfigError(
            f"an audit looks at a search's pruner, but {name} is no search. Name the search."
        )
    pruned = sorted(
        (row for row in rows if row.state == "pruned" and row.epochs_done), key=lambda r: r.number
    )
    if not pruned:
        return None
    order = np.random.default_rng(study.id).permutation(len(pruned))
    chosen = [pruned[k] for k in order[:n_trials]]
    config = _audit_config(StudyConfig.from_record(study.config))
    trains = [TrainConfig(**row.config) for row in chosen]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    begin = time.monotonic()
    with open_session(
        store, config, trains, progress=progress, command=command, take_over=take_over
    ) as session:
        session.because = _run(session.work, config, chosen, trains)
        return _outcome(session.work, config, session.because, begin)


def _audit_config(source: StudyConfig) -> StudyConfig:
    """Return the audit's configuration: the search's, on pictures of the same size."""
    data = source.data
    if data.store_size is None:
        size = picture_size(corner_configs(source))
        data = dataclasses.replace(data, store_size=size)
    named = dataclasses.replace(source.study, name=source.study.name + SUFFIX, timeout=None)
    return source.model_copy(update={"study": named, "data": data})


def _run(work: Work, config: StudyConfig, chosen: list[Trial], trains: list[TrainConfig]) -> str:
    store, study_id = work.store, work.study_id
    space = distributions(config.space)
    close_killed(work)
    done = {row.level for row in store.trials(study_id) if is_done(row)}
    work.progress.study_started(config.study.name, len(chosen), Roster(work).counts(), None)
    for row, train in zip(chosen, trains, strict=True):
        if work.stop.is_set():
            return "interrupted"
        if str(row.number) in done:
            continue
        known = {key: value for key, value in row.params.items() if key in space}
        trial = store.start_trial(study_id, known, space, {"audits": row.number})
        asked = Asked(
            trial,
            f"audit of trial {row.number}",
            FACTOR,
            str(row.number),
            None,
            identity(train),
        )

        run_trial(work, asked, train)
        drop_checkpoint(work, trial.number)
    return "trials"


def _outcome(work: Work, config: StudyConfig, because: str, begin: float) -> SearchOutcome:
    return SearchOutcome(
        study_name=config.study.name,
        stopped_because=because,
        counts=Roster(work).counts(),
        best_number=None,
        best_value=None,
        best_params={},
        checkpoint=None,
        n_val=len(work.data.val),
        duration_s=time.monotonic() - begin,
    )
