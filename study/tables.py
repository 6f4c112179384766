"""The tables of the record, as SQLAlchemy sees them."""

from datetime import datetime
from typing import Annotated, Any

from sqlalchemy import JSON, BigInteger, ForeignKey, LargeBinary, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 7
PREFIX = "frostline_"

Json = dict[str, Any]


class Base(DeclarativeBase):
    """All tables of ours; their names begin with `PREFIX`."""

    type_annotation_map = {Json: JSON, list[list[int]]: JSON}


class InfoTable(Base):
    """Facts about the database itself, such as its schema version."""

    __tablename__ = f"{PREFIX}info"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class StudyTable(Base):
    """A study: its resolved configuration and its pictures."""

    __tablename__ = f"{PREFIX}studies"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    config: Mapped[Json]
    data: Mapped[Json]
    versions: Mapped[Json]


StudyKey = Annotated[int, mapped_column(ForeignKey(StudyTable.id, ondelete="CASCADE"), index=True)]


class RunTable(Base):
    """A process that worked on a study."""

    __tablename__ = f"{PREFIX}runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(
        ForeignKey(StudyTable.id, ondelete="CASCADE"), index=True
    )
    host: Mapped[str]
    pid: Mapped[int]
    pid_started: Mapped[float]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    command: Mapped[str]
    device: Mapped[str]
    versions: Mapped[Json]


class TrialTable(Base):
    """What Optuna has no place for of a trial: its full configuration and how it ended."""

    __tablename__ = f"{PREFIX}trials"
    __table_args__ = (UniqueConstraint("study_id", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(
        ForeignKey(StudyTable.id, ondelete="CASCADE"), index=True
    )
    number: Mapped[int]
    run_id: Mapped[int] = mapped_column(ForeignKey(RunTable.id, ondelete="CASCADE"))
    reason: Mapped[str | None]
    origin: Mapped[str]
    config: Mapped[Json]
    config_hash: Mapped[str] = mapped_column(index=True)
    seed: Mapped[int]
    backbone: Mapped[str]
    freeze_depth: Mapped[int]
    device: Mapped[str]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    duration_s: Mapped[float | None]
    epochs_done: Mapped[int] = mapped_column(default=0)
    best_epoch: Mapped[int | None]
    score: Mapped[float | None]
    trained_parameters: Mapped[int | None]
    total_parameters: Mapped[int | None]
    checkpoint: Mapped[str | None]
    factor: Mapped[str | None]
    level: Mapped[str | None]
    replicate: Mapped[int | None]


class EpochTable(Base):
    """One epoch of a trial; the columns are `EpochMetrics`' fields."""

    __tablename__ = f"{PREFIX}epochs"
    trial_id: Mapped[int] = mapped_column(
        ForeignKey(TrialTable.id, ondelete="CASCADE"), primary_key=True
    )
    epoch: Mapped[int] = mapped_column(primary_key=True)
    train_loss: Mapped[float]
    val_loss: Mapped[float]
    val_acc: Mapped[float]
    val_balanced_acc: Mapped[float]
    val_macro_f1: Mapped[float]
    base_lr: Mapped[float]
    head_lr: Mapped[float]
    images_per_s: Mapped[float]
    data_s: Mapped[float]
    train_s: Mapped[float]
    eval_s: Mapped[float]
    peak_memory_bytes: Mapped[int] = mapped_column(BigInteger)
    micro_batch_size: Mapped[int]
    is_best: Mapped[bool]
    saved_s: Mapped[float] = mapped_column(default=0.0)
    cache_hits: Mapped[int] = mapped_column(default=0)
    cache_misses: Mapped[int] = mapped_column(default=0)
    cache_read_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    cache_disk_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    cache_kept_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    score: Mapped[float | None]
    seconds_since_start: Mapped[float]


class ConfusionTable(Base):
    """A trial's confusion matrix on a split; rows are the truth."""

    __tablename__ = f"{PREFIX}confusions"
    trial_id: Mapped[int] = mapped_column(
        ForeignKey(TrialTable.id, ondelete="CASCADE"), primary_key=True
    )
    split: Mapped[str] = mapped_column(primary_key=True)
    matrix: Mapped[list[list[int]]]


class PictureTable(Base):
    """A picture that a trial got wrong, as a thumbnail."""

    __tablename__ = f"{PREFIX}pictures"
    trial_id: Mapped[int] = mapped_column(
        ForeignKey(TrialTable.id, ondelete="CASCADE"), primary_key=True
    )
    split: Mapped[str] = mapped_column(primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    label: Mapped[str]
    predicted: Mapped[str]
    probability: Mapped[float]
    thumbnail: Mapped[bytes] = mapped_column(LargeBinary)


class TestTable(Base):
    """A look at the test split."""

    __tablename__ = f"{PREFIX}tests"
    __test__ = False  # pytest would take the name for a test class
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(
        ForeignKey(StudyTable.id, ondelete="CASCADE"), index=True
    )
    trial_number: Mapped[int]
    created_at: Mapped[datetime]
    n: Mapped[int]
    n_correct: Mapped[int]
    accuracy: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]
    balanced_acc: Mapped[float]
    macro_f1: Mapped[float]
    val_acc: Mapped[float | None]
    confusion: Mapped[list[list[int]]]
    command: Mapped[str]


class DesignTable(Base):
    """An ablation's design: its factors, cells and rules."""

    __tablename__ = f"{PREFIX}designs"
    __table_args__ = (UniqueConstraint("study_id", "key"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(
        ForeignKey(StudyTable.id, ondelete="CASCADE"), index=True
    )
    key: Mapped[str]
    kind: Mapped[str]
    spec: Mapped[Json]
    command: Mapped[str]
    updated_at: Mapped[datetime]


class PredictionTable(Base):
    """What a trial says of every picture of a split: class numbers, packed by the store."""

    __tablename__ = f"{PREFIX}predictions"
    trial_id: Mapped[int] = mapped_column(
        ForeignKey(TrialTable.id, ondelete="CASCADE"), primary_key=True
    )
    split: Mapped[str] = mapped_column(primary_key=True)
    labels: Mapped[bytes] = mapped_column(LargeBinary)
    predicted: Mapped[bytes] = mapped_column(LargeBinary)
