"""The record: every study, run, trial, epoch and test, written and read back by name."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import ArrayLike
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Select, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.metrics import EpochMetrics, IntArray
from study.config.formatting import hide_password, study_command
from study.record.database import (
    RecordError,
    check_dead,
    database_folder,
    failure,
    is_alive,
    open_database,
    writing,
)
from study.record.models import (
    EPOCHS,
    LOST,
    Base,
    Design,
    Json,
    Misclassified,
    Prediction,
    Run,
    Study,
    StudySummary,
    Test,
    Trial,
    best_of,
    now,
    trial_folder,
)

LEVELS = "levels"
"""The user attribute that holds an ablation run's levels: they may change from one design to the
next, which Optuna allows no categorical parameter."""
EPOCH_FIELDS = tuple(field.name for field in dataclasses.fields(EpochMetrics))
_PATHS = ("study", "output"), ("data", "source"), ("data", "root"), ("data", "cache_dir")
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
_STATE_NAMES = {state: name for name, state in _STATES.items()}


def config_hash(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings, hexadecimal; their order does not count."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def params_of(trial: FrozenTrial | optuna.Trial) -> dict[str, Any]:
    """Return a trial's hyperparameters, or the levels of an ablation's run."""
    return dict(trial.user_attrs.get(LEVELS, trial.params))


class Record(AbstractContextManager["Record"]):
    """The record in one database; read its rows freely, write by these methods alone.

    A trial's number, hyperparameters, state and reported values stand in Optuna's tables and
    nowhere else; ours hang off its study and number. At a trial's end ours are written first, so
    that a trial which is running for Optuna and ended for us is one whose process died in between.
    """

    def __init__(self, storage: str, *, create: bool = False) -> None:
        """Open the record, as `open_database` does."""
        self.engine, self.optuna_storage = open_database(storage, create=create)
        self.storage = hide_password(storage)
        self._folder = database_folder(self.engine.url)
        self._studies: dict[int, optuna.Study] = {}  # by our key

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.optuna_storage.remove_session()
        self.optuna_storage.engine.dispose()

    def __exit__(self, _: object, err: BaseException | None, __: object) -> None:
        self.close()
        if err is not None and (why := failure(err)):
            raise RecordError(f"database {self.storage} {why}") from err

    def save(self, row: Base) -> None:
        """Add a row, or bring one that was read and changed up to date."""
        with writing(self.engine) as session:
            session.add(row)

    # Studies

    def create_study(
        self, name: str, config: Json, data: Json, versions: Mapping[str, str]
    ) -> int:
        """Add a study and return its key.

        Raises:
            RecordError: There is one of that name.
        """
        stored = _with_paths(config, self._stored_path)
        study = Study(name=name, config=stored, data=data, versions=dict(versions))
        try:
            self.save(study)
        except IntegrityError as err:
            rule = f"a study's name must be new, but {self.storage} has a study {name}."
            raise RecordError(f"{rule} Use another --name, or resume that one.") from err
        self.optuna_study(study.id)
        return study.id

    def _studies_where(self, condition: ColumnElement[bool]) -> Iterator[Study]:
        for row in self._all(select(Study).where(condition)):
            config = _with_paths(row.config, self.usable_path)
            row.config = {**config, "study": {**config.get("study", {}), "storage": self.storage}}
            yield row

    def update_study(self, study: Study, config: Json, data: Json) -> None:
        """Replace a study's configuration, and what is known of its images."""
        study.config, study.data = _with_paths(config, self._stored_path), data
        self.save(study)

    def optuna_study(self, study_id: int) -> optuna.Study:
        """Return Optuna's study, the same object each time; created where it is missing."""
        if study_id not in self._studies:
            found: dict[str, Any] = {
                "study_name": self._all(select(Study).where(Study.id == study_id))[0].name,
                "storage": self.optuna_storage,
                "sampler": optuna.samplers.RandomSampler(),
                "pruner": optuna.pruners.NopPruner(),
            }
            try:
                study = optuna.load_study(**found)
            except KeyError:
                study = optuna.create_study(**found, direction="maximize", load_if_exists=True)
                quiet = optuna.exceptions.ExperimentalWarning
                with warnings.catch_warnings(action="ignore", category=quiet):
                    study.set_metric_names(["validation accuracy"])
            self._studies[study_id] = study
        return self._studies[study_id]

    def find_study(self, name: str) -> Study | None:
        """Return a study, or None."""
        return next(self._studies_where(Study.name == name), None)

    def study(self, name: str) -> Study:
        """Return a study.

        Raises:
            RecordError: There is none of that name; names the nearest.
        """
        if row := self.find_study(name):
            return row
        names = [row.name for row in self._all(select(Study))]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
        known = f" There is: {', '.join(near)}." if near else " It holds no study yet."
        raise RecordError(f"there is no study {name} in {self.storage}.{known}")

    def studies(self) -> list[StudySummary]:
        """List all studies, the newest first."""
        rows = self._all(select(Study).order_by(Study.id.desc()))
        return [StudySummary.of(row, self.trials(row.id)) for row in rows]

    def delete_study(self, name: str) -> None:
        """Remove a study with all that belongs to it, from Optuna's tables too.

        Raises:
            RecordError: There is none of that name.
        """
        row = self.study(name)
        with contextlib.suppress(KeyError):  # a kill came between the two
            optuna.delete_study(study_name=name, storage=self.optuna_storage)
        self._studies.pop(row.id, None)
        with writing(self.engine) as session:
            session.execute(delete(Study).where(Study.id == row.id))

    # Runs

    def begin_run(
        self,
        study_id: int,
        *,
        command: str,
        device: str,
        versions: Mapping[str, str],
        take_over: bool = False,
    ) -> int:
        """Enter this process as the one that works on a study; return the run's key.

        With `take_over` even if a process of another machine has not signed off.

        Raises:
            RecordError: Another process works on it.
        """
        run = Run(study_id=study_id, command=command, device=device, versions=dict(versions))
        with writing(self.engine) as session:
            # The lock where SQLite's own does not serve.
            session.execute(select(Study.id).where(Study.id == study_id).with_for_update())
            for other in session.scalars(select(Run).where(Run.study_id == study_id)):
                check_dead(other, take_over)
                if other.ended_at is None:
                    other.ended_at, other.outcome = now(), LOST
            session.add(run)
        return run.id

    def end_run(self, run_id: int, outcome: str) -> None:
        """Sign a process off."""
        with writing(self.engine) as session:
            ended = {"ended_at": now(), "outcome": outcome}
            session.execute(update(Run).where(Run.id == run_id).values(ended))

    def runs(self, study_id: int) -> list[Run]:
        """List the processes that worked on a study, oldest first."""
        return self._all(select(Run).where(Run.study_id == study_id).order_by(Run.id))

    # Trials

    def start_trial(
        self,
        study_id: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        user_attrs: Mapping[str, Any] | None = None,
    ) -> optuna.Trial:
        """Begin a trial of Optuna's with given hyperparameters; nothing is sampled."""
        study = self.optuna_study(study_id)
        number = len(study.get_trials(deepcopy=False))
        running = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions={name: distributions[name] for name in params},
            user_attrs=dict(user_attrs or {}),
        )
        study.add_trial(running)
        return self.take_up_trial(study_id, number)

    def take_up_trial(self, study_id: int, number: int) -> optuna.Trial:
        """Return a running trial, of this process or of one that died, to report its epochs."""
        study = self.optuna_study(study_id)
        key = self.optuna_storage.get_study_id_from_name(study.study_name)
        return optuna.Trial(
            study, self.optuna_storage.get_trial_id_from_study_id_trial_number(key, number)
        )

    def add_epoch(self, trial: Trial, metrics: EpochMetrics, seconds_since_start: float) -> None:
        """Add an epoch, and bring the trial's own figures up to date with it.

        Its accuracy must be reported to Optuna as well.
        """
        values = {name: getattr(metrics, name) for name in EPOCH_FIELDS}
        values |= {"trial_id": trial.id, "seconds_since_start": seconds_since_start}
        trial.epochs_done = metrics.epoch
        if metrics.is_best:
            trial.best_epoch, trial.score = metrics.epoch, metrics.ranked_by
            trial.value = metrics.val_acc
        with writing(self.engine) as session:
            session.execute(insert(EPOCHS), values)
            session.add(trial)

    def end_trial(self, trial: Trial, state: str) -> None:
        """Close a trial with its last figures, and tell Optuna its state and value."""
        trial.ended_at = now()
        self.save(trial)
        shown = self.take_up_trial(trial.study_id, trial.number)
        for name, value in trial.shown.items():
            shown.set_user_attr(name, value)
        self.tell(trial.study_id, trial.number, state, trial.value)

    def tell(self, study_id: int, number: int, state: str, value: float | None = None) -> None:
        """Tell Optuna how a trial ended; a pruned one keeps its last report as its value."""
        value = value if state == "complete" else None
        self.optuna_study(study_id).tell(number, value, state=_STATES[state])

    def trial(self, study_id: int, number: int) -> Trial:
        """Return a trial.

        Raises:
            RecordError: The study has no trial of that number.
        """
        rows = self.trials(study_id, Trial.number == number)
        if not rows:
            known = self._all(select(Trial.number).where(Trial.study_id == study_id))
            range_ = f"they go from 0 to {max(known)}" if known else "it has none yet"
            raise RecordError(f"there is no trial {number} in that study; {range_}.")
        return rows[0]

    def best_trial(self, study: Study) -> Trial:
        """Return a study's best complete trial.

        Raises:
            RecordError: It has none.
        """
        best = best_of(self.trials(study.id))
        if best is None:
            rule = f"study {study.name} must have a complete trial, but has none."
            command = study_command("resume", study.name, self.storage)
            raise RecordError(f"{rule} Continue it: {command}")
        return best

    def trials(self, study_id: int, *conditions: ColumnElement[bool]) -> list[Trial]:
        """List a study's trials by number, joined with what Optuna's tables hold of them."""
        query = select(Trial).where(Trial.study_id == study_id, *conditions)
        rows = self._all(query.order_by(Trial.number))
        study = next(self._studies_where(Study.id == study_id), None)
        found = self.optuna_study(study_id).get_trials(deepcopy=False) if rows else []
        optunas = {trial.number: trial for trial in found}
        for row in rows:
            if study and row.weights_hash:
                row.checkpoint = str(study.output / trial_folder(row.number))
            _join(row, optunas.get(row.number))
        running = [row for row in rows if row.state == "running"]
        if running and self.working(study_id) is None:
            for row in running:
                row.state = "interrupted"
        return rows

    def working(self, study_id: int) -> Run | None:
        """Return the process that works on a study, if one does."""
        return next(filter(is_alive, self.runs(study_id)), None)

    def epochs(self, trial_id: int) -> list[EpochMetrics]:
        """List a trial's epochs in order."""
        query = select(*(EPOCHS.c[name] for name in EPOCH_FIELDS))
        query = query.where(EPOCHS.c.trial_id == trial_id).order_by(EPOCHS.c.epoch)
        with Session(self.engine) as session:
            return [EpochMetrics(*row) for row in session.execute(query)]

    # Predictions and tests

    def add_misclassified(self, trial_id: int, rows: Sequence[Misclassified]) -> None:
        """Keep the images that a trial classified wrongly; they replace earlier ones."""
        with writing(self.engine) as session:
            session.execute(delete(Misclassified).where(Misclassified.trial_id == trial_id))
            session.add_all(rows)

    def add_predictions(
        self, trial_id: int, split: str, labels: ArrayLike, predicted: ArrayLike
    ) -> None:
        """Keep what a trial predicts for each image of a split; it replaces an earlier answer.

        Labels are the true class numbers, (N,), in the order of the split, `val` or `test`.
        """
        packed = {"labels": _pack(labels), "predicted": _pack(predicted)}
        with writing(self.engine) as session:
            session.merge(Prediction(trial_id=trial_id, split=split, **packed))

    def tests(self, study_id: int) -> list[Test]:
        """List a study's results on the test split, oldest first."""
        return self._all(select(Test).where(Test.study_id == study_id).order_by(Test.id))

    # Designs

    def put_design(self, study_id: int, key: str, kind: str, spec: Json, command: str) -> None:
        """Keep an ablation's design, in place of the one with the same key."""
        design = Design(study_id=study_id, key=key, kind=kind, spec=spec, command=command)
        with writing(self.engine) as session:
            session.execute(delete(Design).where(Design.study_id == study_id, Design.key == key))
            session.add(design)

    def designs(self, study_id: int) -> list[Design]:
        """List a study's designs, the last one used at the end."""
        query = select(Design).where(Design.study_id == study_id)
        return self._all(query.order_by(Design.updated_at, Design.id))

    # Paths

    def _stored_path(self, path: str) -> str:
        """Return a path, given from where one stands, as it is stored: from the database's folder.

        An absolute one stays so, but inside that folder: a project may be moved.
        """
        path = os.path.expanduser(path)
        if self._folder is None:
            return os.path.abspath(path)
        inside = os.path.relpath(path, self._folder)
        return path if os.path.isabs(path) and inside.startswith("..") else inside

    def usable_path(self, path: str) -> str:
        """Return a stored path so that it can be used where one stands."""
        return os.path.normpath((self._folder or Path()) / os.path.expanduser(path))

    # One transaction each

    def _all(self, query: Select[Any]) -> list[Any]:
        with Session(self.engine) as session:
            return list(session.scalars(query))


def _with_paths(config: Json, change: Callable[[str], str]) -> Json:
    """Return a study's configuration with other paths of its images and of its output."""
    changed = {name: dict(table) for name, table in config.items()}
    for section, key in _PATHS:
        path, prefix = changed.get(section, {}).get(key), "folder:" if key == "source" else ""
        if path and path.startswith(prefix):
            changed[section][key] = prefix + change(path.removeprefix(prefix))
    return changed


def _join(row: Trial, trial: FrozenTrial | None) -> None:
    """Fill in what a trial's row takes from Optuna.

    Its value is the accuracy of its best epoch; of a complete trial that is Optuna's value.
    Optuna's is missing where a kill came in the middle of `delete_study`.
    """
    if trial is None:
        row.state, row.params, row.value = "interrupted", {}, None
        return
    value = trial.value if trial.state is TrialState.COMPLETE else None
    if value is None and row.best_epoch is not None:
        steps = row.best_epoch, row.config.get("epochs")  # a solved head's only one is the last
        known = trial.intermediate_values
        value = next((known[step] for step in steps if step in known), None)
    row.state = _STATE_NAMES.get(trial.state, "interrupted")
    row.params, row.value = params_of(trial), value


def _pack(numbers: ArrayLike) -> bytes:
    """Write class numbers as compressed 32-bit integers, little-endian."""
    return zlib.compress(np.asarray(numbers, dtype="<i4").tobytes())


def unpack_classes(packed: bytes) -> IntArray:
    """Read the class numbers of a `Prediction`."""
    return np.frombuffer(zlib.decompress(packed), dtype="<i4").astype(np.int64)
