"""What an epoch of training tells: one frozen record, free of torch."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """The figures of one epoch, taken after it; fractions are in [0, 1], times in seconds.

    Attributes:
        epoch: Counted from 0.
        train_loss: Mean cross-entropy over the training views as they were seen, nats.
        val_loss: Mean cross-entropy on the validation split, nats, without label smoothing.
        val_acc: Share of validation pictures classified rightly.
        val_balanced_acc: Mean over classes of the share of the class that was classified rightly.
        val_macro_f1: Mean over classes of the F1 score; a class never predicted counts 0.
        base_lr: Backbone's learning rate at the epoch's last step.
        head_lr: Head's learning rate at the epoch's last step.
        images_per_s: Training pictures per second of the training phase (data and steps).
        data_s: Time spent waiting for pictures.
        train_s: Forward, backward and optimizer.
        eval_s: Evaluation.
        peak_memory_bytes: Largest device memory so far (CUDA), or resident memory of the process.
        micro_batch_size: Pictures per forward pass; smaller than asked for after an
            out-of-memory retry.
        is_best: The highest `score` so far, and so the epoch whose weights are kept.
        saved_s: Seconds that reading shared work saved: what making it had taken.
        cache_hits: Entries of shared work that were read.
        cache_misses: Entries that were not there.
        cache_read_bytes: Bytes that were read, from memory or disk.
        cache_disk_bytes: Those of them that came from disk.
        cache_kept_bytes: Bytes of new entries, left for others in memory or on disk.
        score: What epochs and trials are ranked by, in [0, 1], from `Evaluation.score`; None in
            the record of an older version, which ranked by `val_acc`.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_acc: float
    val_balanced_acc: float
    val_macro_f1: float
    base_lr: float
    head_lr: float
    images_per_s: float
    data_s: float
    train_s: float
    eval_s: float
    peak_memory_bytes: int
    micro_batch_size: int
    is_best: bool
    saved_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_read_bytes: int = 0
    cache_disk_bytes: int = 0
    cache_kept_bytes: int = 0
    score: float | None = None

    @property
    def ranked_by(self) -> float:
        """The score, or the accuracy where a record has none."""
        return self.val_acc if self.score is None else self.score


MEASURED = frozenset(
    {"images_per_s", "data_s", "train_s", "eval_s", "peak_memory_bytes", "saved_s"}
    | {field.name for field in fields(EpochMetrics) if field.name.startswith("cache_")}
)
"""Figures that a clock, the memory or the cache tells: they are not the same twice."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What a run took from shared work and left there; the fields are `EpochMetrics`' own."""

    saved_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_read_bytes: int = 0
    cache_disk_bytes: int = 0
    cache_kept_bytes: int = 0

    def share(self, n: int) -> "Shared":
        """Return one run's part, where n runs read and left it together.

        Each of them was served by every entry; seconds and bytes are divided.
        """
        return replace(
            self,
            saved_s=self.saved_s / n,
            cache_read_bytes=self.cache_read_bytes // n,
            cache_disk_bytes=self.cache_disk_bytes // n,
            cache_kept_bytes=self.cache_kept_bytes // n,
        )


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number; the run cannot recover."""
