"""An epoch's figures, put together from what a run measured."""

import dataclasses
from dataclasses import dataclass

from core.config import TrainConfig
from core.evaluate import Evaluation
from core.metrics import EpochMetrics, Shared, TrainingDiverged


@dataclass(frozen=True, slots=True)
class Clock:
    """Where an epoch's time went, seconds.

    Attributes:
        data_s: Waiting for pictures.
        train_s: The rest of training.
        eval_s: Evaluation.
        shared: What was read of shared work and left there.
    """

    data_s: float
    train_s: float
    eval_s: float
    shared: Shared = Shared()

    def share(self, n: int) -> "Clock":
        """Return one run's part, where n runs took the time together."""
        return Clock(self.data_s / n, self.train_s / n, self.eval_s / n, self.shared.share(n))


def epoch_metrics(
    config: TrainConfig,
    epoch: int,
    train_loss: float,
    evaluation: Evaluation,
    *,
    clock: Clock,
    lr_factor: float,
    n_images: int,
    peak_memory_bytes: int,
    micro_batch_size: int,
    best_score: float | None,
) -> EpochMetrics:
    """Return an epoch's figures.

    Args:
        config: The run.
        epoch: Counted from 0.
        train_loss: Mean loss a training picture.
        evaluation: On the validation split.
        clock: Where the time went.
        lr_factor: Share of the peak learning rates at the last step.
        n_images: Training pictures of the epoch.
        peak_memory_bytes: Of the device, or of the process.
        micro_batch_size: Pictures per forward pass.
        best_score: Highest score of the epochs before; None for the first.

    Raises:
        TrainingDiverged: The validation loss is not a finite number.
    """
    if not evaluation.loss < float("inf"):  # NaN, too
        raise TrainingDiverged(
            f"the validation loss is no longer finite at epoch {epoch}; lower base_lr."
        )
    score = evaluation.score(config.monitor)
    return EpochMetrics(
        epoch=epoch,
        train_loss=train_loss,
        val_loss=evaluation.loss,
        val_acc=evaluation.acc,
        val_balanced_acc=evaluation.balanced_acc,
        val_macro_f1=evaluation.macro_f1,
        base_lr=config.base_lr * lr_factor,
        head_lr=config.base_lr * config.head_lr_mult * lr_factor,
        images_per_s=n_images / (clock.data_s + clock.train_s),
        data_s=clock.data_s,
        train_s=clock.train_s,
        eval_s=clock.eval_s,
        peak_memory_bytes=peak_memory_bytes,
        micro_batch_size=micro_batch_size,
        is_best=best_score is None or score > best_score,
        score=score,
        **dataclasses.asdict(clock.shared),
    )
