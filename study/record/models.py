"""The tables of the record. An instance is a row, and what `Record` returns; times are UTC."""

import dataclasses
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import psutil
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Table,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from core.config import MAX_FREEZE_DEPTH
from core.metrics import EpochMetrics

SCHEMA = 5
"""Number of this layout. Another one is refused; there are no migrations."""
PREFIX = "frostline_"

Json = dict[str, Any]
UNFINISHED = ("running", "interrupted")
"""States of a trial that has not ended."""
LOST = "lost"
"""Outcome of a process that never signed off, once another one has taken its place."""
REASON_KILLED = "killed"
"""Reason of a trial whose process died: its settings run again, so it does not count."""
COPY = "same as "
"""How the origin of a trial begins that has an earlier one's result: it does not count."""
MODEL_FOLDER = "model"
"""Name of the model's folder in that of its study."""
ARTIFACTS_FOLDER = "optuna-artifacts"
"""Next to the studies' folders: one for all studies, as Optuna's dashboard wants it."""
COMMIT = "git commit"
"""What a run's versions call the commit of the working folder."""
WEIGHTS_OF = "weights of "
"""How the names of the pretrained weights' hashes begin in a run's versions."""
SPLITS_FILE = "splits.csv"
"""Name of the file that says which image is in which split."""


def folds_column(n_folds: int, seed: int) -> str:
    """Name the column of that file that says which fold of a division each image is in."""
    return f"{n_folds}-folds-{seed}"


def now() -> datetime:
    """Return the time in UTC without a zone: SQLite stores none."""
    return datetime.now(UTC).replace(tzinfo=None)


def trial_folder(number: int) -> str:
    """Return the name of a trial's checkpoint, and of its training state but for the ending."""
    return f"trial-{number:04d}"


class Base(MappedAsDataclass, DeclarativeBase):
    """All tables of ours; their names begin with `PREFIX`."""

    type_annotation_map = {Json: JSON, list[list[int]]: JSON, list[str]: JSON}


class Schema(Base):
    """The layout's number, in the only row."""

    __tablename__ = f"{PREFIX}schema"
    number: Mapped[int] = mapped_column(primary_key=True)


class Study(Base, kw_only=True):
    """A study.

    Attributes:
        config: Resolved `StudyConfig`. In the table its relative paths begin in the database's
            folder, and so does a project that is moved; `Record` returns paths that can be used.
        data: Source, classes, counts per split, fingerprint, warnings.
        versions: Versions of the libraries it was created with.
    """

    __tablename__ = f"{PREFIX}studies"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(default_factory=now)
    config: Mapped[Json]
    data: Mapped[Json]
    versions: Mapped[Json]

    @property
    def output(self) -> Path:
        """Folder of its checkpoints, training states and reports."""
        return Path(self.config["study"]["output"]) / self.name


def is_model_of(study: Study, facts: Mapping[str, Any]) -> bool:
    """Say whether a model's description is a study's own; a first look's has no time."""
    created_at = study.created_at.isoformat()
    return (facts.get("study"), facts.get("created_at", created_at)) == (study.name, created_at)


OfStudy = Annotated[int, mapped_column(ForeignKey(Study.id, ondelete="CASCADE"), index=True)]


class Run(Base, kw_only=True):
    """A process that worked on a study: this one, where nothing else is said.

    Attributes:
        pid_started: Seconds since 1970: distinguishes it from a later process of the same `pid`.
        ended_at: When it signed off; None while it runs, or after a kill until the next run.
        outcome: Why it ended; `LOST` after a kill.
        versions: Of the libraries; the weights' hashes, and the working folder's commit.
    """

    __tablename__ = f"{PREFIX}runs"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    study_id: Mapped[OfStudy]
    host: Mapped[str] = mapped_column(default_factory=lambda: socket.gethostname())
    pid: Mapped[int] = mapped_column(default_factory=os.getpid)
    pid_started: Mapped[float] = mapped_column(
        default_factory=lambda: psutil.Process().create_time()
    )
    started_at: Mapped[datetime] = mapped_column(default_factory=now)
    ended_at: Mapped[datetime | None] = mapped_column(default=None)
    outcome: Mapped[str | None] = mapped_column(default=None)
    command: Mapped[str]
    device: Mapped[str]
    versions: Mapped[Json]


def chosen_by(train: Mapping[str, Any]) -> str:
    """Return in words what a training configuration's `monitor` is."""
    return "validation loss" if train.get("monitor") == "val_loss" else "validation accuracy"


class Trial(Base, kw_only=True):
    """A trial: what Optuna has no column for, joined with what stands in its tables alone.

    Attributes:
        number: Its number in the study, as in Optuna.
        reason: Why it was pruned or failed; None for a complete one.
        origin: `recipe:NAME`, `sampler`, `retry of N` or `same as N`.
        config: Full `TrainConfig`.
        config_hash: Equal for equal settings and seed.
        ended_at: None while it runs.
        duration_s: Wall time.
        best_epoch: Epoch with the highest score, from 1.
        score: That epoch's score, as in `EpochMetrics`; trials are ranked by it.
        without_effect: Settings that did nothing in this trial.
        weights_hash: SHA-256 of the best epoch's weights file, while its checkpoint is kept.
        factor: What an ablation varied; None in a search.
        level: Its setting of the factor.
        replicate: Number among equal runs.
        state: From Optuna: `running`, `complete`, `pruned` or `failed`; `interrupted` where it
            is running for Optuna but no process works on the study.
        params: From Optuna: hyperparameters that the search chose, or an ablation's levels.
        value: From Optuna: validation accuracy of the best epoch so far, in [0, 1].
        checkpoint: Its folder while it is kept; it follows from the study's and from the number.
    """

    __tablename__ = f"{PREFIX}trials"
    __table_args__ = (UniqueConstraint("study_id", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    study_id: Mapped[OfStudy]
    number: Mapped[int]
    run_id: Mapped[int] = mapped_column(ForeignKey(Run.id, ondelete="CASCADE"))
    reason: Mapped[str | None] = mapped_column(default=None)
    origin: Mapped[str]
    config: Mapped[Json]
    config_hash: Mapped[str] = mapped_column(index=True)
    device: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(default_factory=now)
    ended_at: Mapped[datetime | None] = mapped_column(default=None)
    duration_s: Mapped[float | None] = mapped_column(default=None)
    epochs_done: Mapped[int] = mapped_column(default=0)
    best_epoch: Mapped[int | None] = mapped_column(default=None)
    score: Mapped[float | None] = mapped_column(default=None)
    trained_parameters: Mapped[int | None] = mapped_column(default=None)
    total_parameters: Mapped[int | None] = mapped_column(default=None)
    without_effect: Mapped[list[str]] = mapped_column(default_factory=list)
    weights_hash: Mapped[str | None] = mapped_column(default=None)
    factor: Mapped[str | None] = mapped_column(default=None)
    level: Mapped[str | None] = mapped_column(default=None)
    replicate: Mapped[int | None] = mapped_column(default=None)
    # Not columns.
    state: str = "running"
    params: Json = dataclasses.field(default_factory=dict)
    value: float | None = None
    checkpoint: str | None = None

    @property
    def seed(self) -> int:
        """Training seed."""
        return int(self.config["seed"])

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return str(self.config["backbone"])

    @property
    def freeze_depth(self) -> int:
        """Frozen stages, counted from the input."""
        return int(self.config["freeze_depth"])

    @property
    def effective_params(self) -> Json:
        """Hyperparameters but for those that did nothing in this trial."""
        return {key: v for key, v in self.params.items() if key not in self.without_effect}

    @property
    def shown(self) -> dict[str, Any]:
        """What Optuna's dashboard shows of it apart from its hyperparameters."""
        words = {0: "0, everything trained", MAX_FREEZE_DEPTH: f"{MAX_FREEZE_DEPTH}, head alone"}
        return {
            "seconds": round(self.duration_s or 0, 1),
            "freeze level": words.get(self.freeze_depth, str(self.freeze_depth)),
            "parameters trained": self.trained_parameters or 0,
        }

    @property
    def chosen_by(self) -> str:
        """What chose its best epoch and ranks it, in words."""
        return chosen_by(self.config)

    @property
    def ended_as(self) -> str:
        """State that follows from `reason`, once it has ended for us."""
        if self.reason is None:
            return "complete"
        return "pruned" if self.reason.startswith("pruned") else "failed"

    @property
    def ranked_by(self) -> float | None:
        """Score, or accuracy where the trial has no epochs of its own."""
        return self.value if self.score is None else self.score

    @property
    def rank(self) -> tuple[float, int]:
        """Sort key among trials of one state: the lowest is the best, of equals the earlier."""
        return (-(self.ranked_by or 0.0), self.number)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """Return the best complete trial, if any."""
    complete = (row for row in trials if row.state == "complete")
    return min(complete, key=lambda row: row.rank, default=None)


@dataclass(frozen=True, slots=True)
class Counts:
    """Trials of a study by state; `cut_short` are the failed ones whose process was killed."""

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    interrupted: int = 0
    cut_short: int = 0

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> "Counts":
        """Count the trials of a study, but for copies."""
        rows = [row for row in trials if not row.origin.startswith(COPY)]
        cut_short = sum(row.reason == REASON_KILLED for row in rows)
        return cls(**Counter(row.state for row in rows), cut_short=cut_short)

    @property
    def finished(self) -> int:
        """Trials that ended by themselves, as the study's target counts them."""
        return self.complete + self.pruned + self.failed - self.cut_short


@dataclass(frozen=True, slots=True)
class StudySummary:
    """A study in one line: its trials by state, and the best complete one's accuracy."""

    name: str
    created_at: datetime
    updated_at: datetime
    counts: Counts
    best_value: float | None
    best_number: int | None

    @classmethod
    def of(cls, study: Study, trials: Sequence[Trial]) -> "StudySummary":
        """Sum up a study."""
        best, counts = best_of(trials), Counts.of(trials)
        shown = (best.value, best.number) if best else (None, None)
        times = [row.ended_at or row.started_at for row in trials]
        updated_at = max(times, default=study.created_at)
        return cls(study.name, study.created_at, updated_at, counts, *shown)


_TYPES = {int: BigInteger, float: Float, bool: Boolean}
OfTrial = Annotated[int, mapped_column(ForeignKey(Trial.id, ondelete="CASCADE"))]


def _column(field: dataclasses.Field[Any]) -> Column[Any]:
    """Make the column of a field of `EpochMetrics`."""
    kinds = get_args(field.type) or (field.type,)
    is_key = field.name == "epoch"
    return Column(field.name, _TYPES[kinds[0]], primary_key=is_key, nullable=NoneType in kinds)


EPOCHS = Table(
    f"{PREFIX}epochs",
    Base.metadata,
    Column("trial_id", ForeignKey(Trial.id, ondelete="CASCADE"), primary_key=True),
    *map(_column, dataclasses.fields(EpochMetrics)),
    Column("seconds_since_start", Float, nullable=False),
)
"""One row per epoch of a trial; the columns are the fields of `EpochMetrics`, which is the row."""


class Prediction(Base, kw_only=True):
    """What a trial predicts for every image of a split: class numbers, packed."""

    __tablename__ = f"{PREFIX}predictions"
    trial_id: Mapped[OfTrial] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    labels: Mapped[bytes]
    predicted: Mapped[bytes]


class Misclassified(Base, kw_only=True):
    """An image that a trial classified wrongly.

    Attributes:
        split: `val` or `test`.
        rank: 0 is the worst.
        label: Its class.
        probability: What the network gave the true class, in [0, 1].
        thumbnail: JPEG.
    """

    __tablename__ = f"{PREFIX}misclassified"
    trial_id: Mapped[OfTrial] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    label: Mapped[str]
    predicted: Mapped[str]
    probability: Mapped[float]
    thumbnail: Mapped[bytes]


class Test(Base, kw_only=True):
    """A result on the test split: a trial's, or the model's that a search left.

    Attributes:
        trial_number: None for the study's model.
        model_hash: SHA-256 of the model's description; None for a trial.
        created_at: When the split was read.
        n: Number of test images.
        low: Lower end of its 95 % Wilson interval; `high` is the upper one.
        balanced_acc: Mean over classes of the share classified correctly.
        val_acc: Validation accuracy of the tested epoch.
        confusion: Images by true (row) and predicted (column) class.
    """

    __test__ = False  # pytest would take the name for a test class
    __tablename__ = f"{PREFIX}tests"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    study_id: Mapped[OfStudy]
    trial_number: Mapped[int | None]
    model_hash: Mapped[str | None] = mapped_column(default=None)
    created_at: Mapped[datetime] = mapped_column(default_factory=now)
    n: Mapped[int]
    n_correct: Mapped[int]
    accuracy: Mapped[float] = mapped_column(init=False)
    low: Mapped[float] = mapped_column(init=False)
    high: Mapped[float] = mapped_column(init=False)
    balanced_acc: Mapped[float]
    macro_f1: Mapped[float]
    val_acc: Mapped[float | None]
    confusion: Mapped[list[list[int]]]
    command: Mapped[str]

    @property
    def of(self) -> str:
        """What was tested, in words."""
        return "the model" if self.trial_number is None else f"trial {self.trial_number}"

    def __post_init__(self) -> None:
        from scipy.stats import binomtest

        interval = binomtest(self.n_correct, self.n).proportion_ci(0.95, method="wilson")
        self.accuracy = self.n_correct / self.n
        self.low, self.high = float(interval.low), float(interval.high)


class Design(Base, kw_only=True):
    """An ablation's design.

    Attributes:
        kind: A name in `DESIGNS`.
        spec: Factors, cells and rules, as `Design.to_record` returns them.
        command: Command line that used it last, at `updated_at`.
    """

    __tablename__ = f"{PREFIX}designs"
    __table_args__ = (UniqueConstraint("study_id", "key"),)
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    study_id: Mapped[OfStudy]
    key: Mapped[str]
    kind: Mapped[str]
    spec: Mapped[Json]
    command: Mapped[str]
    updated_at: Mapped[datetime] = mapped_column(default_factory=now)
