"""What the record gives back: frozen rows, one kind a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A study.

    Attributes:
        id: Key in the database.
        name: Its name, one of a kind.
        created_at: UTC.
        config: Resolved `StudyConfig`.
        data: Source, classes, counts of the splits, fingerprint, warnings.
        versions: Libraries that began it.
    """

    id: int
    name: str
    created_at: datetime
    config: Json
    data: Json
    versions: dict[str, str]


def chosen_by(train: Mapping[str, Any]) -> str:
    """Say in words what a training configuration's `monitor` is, as recorded."""
    return "validation loss" if train.get("monitor") == "val_loss" else "validation accuracy"


@dataclass(frozen=True, slots=True)
class StudySummary:
    """A study in one line.

    Attributes:
        name: Its name.
        created_at: UTC.
        updated_at: When its last trial began or ended, UTC; its creation where it has none.
        n_complete: Trials that reached their last epoch.
        n_pruned: Trials that the pruner stopped.
        n_failed: Trials that diverged, broke, or were cut short.
        n_running: Trials under way.
        best_value: Validation accuracy of the best complete trial, in [0, 1].
        best_number: That trial.
    """

    name: str
    created_at: datetime
    updated_at: datetime
    n_complete: int
    n_pruned: int
    n_failed: int
    n_running: int
    best_value: float | None
    best_number: int | None

    @classmethod
    def of(cls, study: StudyRow, trials: "Sequence[TrialRow]") -> "StudySummary":
        """Sum up a study."""
        states = [row.state for row in trials]
        complete = [row for row in trials if row.state == "complete"]
        best = min(complete, key=lambda row: row.rank, default=None)
        return cls(
            name=study.name,
            created_at=study.created_at,
            updated_at=max(
                (row.ended_at or row.started_at for row in trials), default=study.created_at
            ),
            n_complete=len(complete),
            n_pruned=states.count("pruned"),
            n_failed=states.count("failed"),
            n_running=states.count("running"),
            best_value=best.value if best else None,
            best_number=best.number if best else None,
        )


@dataclass(frozen=True, slots=True)
class RunRow:
    """A process that worked on a study; times are UTC."""

    id: int
    study_id: int
    host: str
    pid: int
    pid_started: float
    started_at: datetime
    ended_at: datetime | None
    outcome: str | None
    command: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class TrialRow:
    """A trial.

    Attributes:
        id: Key in the database.
        study_id: Its study's key.
        number: Its number in the study, as in Optuna.
        run_id: The process that ran it.
        state: `running`, `complete`, `pruned` or `failed`.
        reason: Why it was pruned or failed.
        origin: `recipe:NAME`, `sampler`, `retry of N` or `same as N`.
        params: Values that the search chose.
        config: The full `TrainConfig`.
        config_hash: Equal for equal settings under one seed.
        seed: Seed of the run.
        backbone: Its backbone.
        freeze_depth: Its freeze level.
        device: What it ran on.
        started_at: UTC.
        ended_at: UTC; None while it runs.
        duration_s: Wall time.
        epochs_done: Epochs that were finished.
        value: Validation accuracy of the best epoch so far, in [0, 1].
        best_epoch: The epoch with the highest score.
        score: That epoch's score, as in `EpochMetrics`: what trials are ranked by.
        trained_parameters: Scalars that were trained.
        total_parameters: Scalars of the network.
        checkpoint: Folder of the best epoch's weights, while it is kept.
        factor: What an ablation varied; None for a search.
        level: Its setting of the factor.
        replicate: Which of the equal runs.
    """

    id: int
    study_id: int
    number: int
    run_id: int
    state: str
    reason: str | None
    origin: str
    params: Json
    config: Json
    config_hash: str
    seed: int
    backbone: str
    freeze_depth: int
    device: str
    started_at: datetime
    ended_at: datetime | None
    duration_s: float | None
    epochs_done: int
    value: float | None
    best_epoch: int | None
    score: float | None
    trained_parameters: int | None
    total_parameters: int | None
    checkpoint: str | None
    factor: str | None
    level: str | None
    replicate: int | None

    @property
    def chosen_by(self) -> str:
        """What its best epoch was chosen by, and it is ranked by, in words."""
        return chosen_by(self.config)

    @property
    def ended_as(self) -> str:
        """The state that belongs to the reason it ended for, whether Optuna was told or not."""
        if self.reason is None:
            return "complete"
        return "pruned" if self.reason.startswith("pruned") else "failed"

    @property
    def ranked_by(self) -> float | None:
        """The score, or for a trial that was entered without its epochs the accuracy."""
        return self.value if self.score is None else self.score

    @property
    def rank(self) -> tuple[float, int]:
        """The place among trials of one state: the lowest is the best, of equals the earlier."""
        return (-(self.ranked_by or 0.0), self.number)


@dataclass(frozen=True, slots=True)
class PictureRow:
    """A picture that a trial got wrong.

    Attributes:
        split: `val` or `test`.
        rank: 0 is the worst.
        path: The picture.
        label: Its class.
        predicted: The class that the network chose.
        probability: What the network gave its true class, in [0, 1].
        thumbnail: JPEG.
    """

    split: str
    rank: int
    path: str
    label: str
    predicted: str
    probability: float
    thumbnail: bytes


@dataclass(frozen=True, slots=True)
class TestRow:
    """A look at the test split.

    Attributes:
        id: Key in the database.
        study_id: Its study's key.
        trial_number: The trial that was tested.
        created_at: UTC.
        n: Test pictures.
        n_correct: Classified rightly.
        accuracy: Their share, in [0, 1].
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        balanced_acc: Mean over classes of the share classified rightly.
        macro_f1: Mean F1 over classes.
        val_acc: Validation accuracy of the epoch that was chosen.
        confusion: Pictures by true (row) and predicted (column) class.
        command: Command line.
    """

    __test__ = False  # pytest would take the name for a test class

    id: int
    study_id: int
    trial_number: int
    created_at: datetime
    n: int
    n_correct: int
    accuracy: float
    low: float
    high: float
    balanced_acc: float
    macro_f1: float
    val_acc: float | None
    confusion: list[list[int]]
    command: str


@dataclass(frozen=True, slots=True)
class DesignRow:
    """An ablation's design.

    Attributes:
        id: Key in the database.
        study_id: The ablation's study.
        key: Tells the study's designs apart.
        kind: `ofat`, `loco`, `factorial`, `path` or `screen`.
        spec: Factors, cells and rules, as `study.ablation.designs.Design.to_record` writes them.
        command: Command line that last went on with it.
        updated_at: When that was, UTC.
    """

    id: int
    study_id: int
    key: str
    kind: str
    spec: Json
    command: str
    updated_at: datetime
