"""What an epoch of training tells: one frozen record, free of torch."""

from dataclasses import dataclass


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
        is_best: The highest validation accuracy so far, and so the epoch whose weights are kept.
        saved_s: Seconds that reading shared work saved: what making it had taken.
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


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number; the run cannot recover."""
