"""Run one trial: the only caller of `core.fit` and the only writer of trials to the record."""

import contextlib
import dataclasses
import io
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import Trial
from PIL import Image

from core.cache import ArrayCache
from core.config import TrainConfig
from core.data.splits import ImageData
from core.device import choose_device, describe_device
from core.fit import fit
from core.metrics import TrainingDiverged
from core.models.builder import count_parameters
from core.training.checkpoint import PREDICTIONS_FILE
from study.progress import CUT_SHORT, Progress
from study.store import PictureRow, Store, config_hash, params_of

# These settings do not change what a trial learns, so they do not tell two trials apart.
_NOT_IDENTITY = ("device", "workers")
# The worst pictures that a report shows, and the side of their thumbnails in pixels.
_N_WORST = 16
_THUMBNAIL = 160

REASON_INTERRUPTED, REASON_KILLED = CUT_SHORT
REASON_DIVERGED = "diverged"
REASON_OUT_OF_MEMORY = "out of memory"
REASON_ERROR = "error"
# A trial cut short from outside says nothing about its settings: they are run again.
RERUN_REASONS = CUT_SHORT


@dataclass(frozen=True, slots=True)
class TrialResult:
    """How a trial stopped.

    Attributes:
        state: `complete`, `pruned` or `failed`.
        value: Validation accuracy of its best epoch, in [0, 1]; None if no epoch was finished.
        reason: Why it did; None for a complete trial.
        duration_s: Wall time.
    """

    state: str
    value: float | None
    reason: str | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What all trials of one process share.

    Attributes:
        store: The record.
        study_id: The study's key in it.
        run_id: This process's key in it.
        data: Pictures.
        output: Folder of the study's checkpoints.
        progress: What the user sees.
        stop: Set when the process is to leave after the current epoch.
        cache: Work that trials share; None where they share nothing.
    """

    store: Store
    study_id: int
    run_id: int
    data: ImageData
    output: Path
    progress: Progress
    stop: threading.Event
    cache: ArrayCache | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial that was asked for.

    Attributes:
        trial: Optuna's side of it.
        origin: Where the setting came from: a recipe, the sampler, an ablation's cell.
        factor: What an ablation varies in it; None for a search.
        level: Its setting of the factor.
        replicate: Which of the equal runs.
        identity: Tells its setting and seed apart; None for that of the configuration alone.
    """

    trial: Trial
    origin: str
    factor: str | None = None
    level: str | None = None
    replicate: int | None = None
    identity: str | None = None


def identity(config: TrainConfig) -> str:
    """Return the hash by which two trials are the same setting under the same seed."""
    settings = dataclasses.asdict(config)
    return config_hash({k: v for k, v in settings.items() if k not in _NOT_IDENTITY})


def run_trial(
    work: Work,
    asked: Asked,
    config: TrainConfig,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrialResult:
    """Train one configuration and keep its record, whatever becomes of it.

    Args:
        work: What the trials share.
        asked: Which trial, and where it comes from.
        config: What to train.
        should_stop: Asked after every epoch; True prunes the trial.

    Raises:
        OSError: The disk is full, or a file cannot be written; the trial is recorded as failed.
    """
    begin = time.perf_counter()
    trial_id = _begin_record(work, asked, config)
    folder = checkpoint_folder(work.output, asked.trial.number)
    value, score, best_epoch, epochs_done = None, None, None, 0
    state, reason, fatal = "complete", None, None
    try:
        with contextlib.closing(
            fit(config, work.data, cache=work.cache, checkpoint_dir=folder)
        ) as epochs:
            for metrics in epochs:
                epochs_done = metrics.epoch + 1
                if metrics.is_best:
                    value, score, best_epoch = metrics.val_acc, metrics.score, metrics.epoch
                work.store.add_epoch(trial_id, metrics, time.perf_counter() - begin)
                # A pruner counts epochs done (its resource).
                asked.trial.report(metrics.val_acc, epochs_done)
                work.progress.epoch(asked.trial.number, metrics)
                is_last = epochs_done == config.epochs
                is_stopped = should_stop()
                if is_last or not (is_stopped or work.stop.is_set()):
                    continue
                if is_stopped:
                    state, reason = "pruned", f"pruned after epoch {epochs_done}"
                else:
                    state, reason = "failed", REASON_INTERRUPTED
                break
    except TrainingDiverged as err:
        state, reason = "failed", f"{REASON_DIVERGED}: {err}"
    except torch.OutOfMemoryError as err:
        state = "failed"
        reason = f"{REASON_OUT_OF_MEMORY}: even one picture at a time does not fit ({err})"
    except OSError as err:
        state, reason, fatal = "failed", f"{REASON_ERROR}: {err}", err
    except Exception as err:  # one broken setting must not end a night's search
        state, reason = "failed", f"{REASON_ERROR}: {_told(err)}"
    duration = time.perf_counter() - begin
    work.store.end_trial(
        trial_id,
        state,
        reason=reason,
        value=value,
        best_epoch=best_epoch,
        epochs_done=epochs_done,
        duration_s=duration,
        checkpoint=str(folder) if state == "complete" else None,
    )
    work.progress.trial_ended(asked.trial.number, state, value, reason, duration, score)
    if fatal is not None:
        raise fatal
    return TrialResult(state, value, reason, duration)


def _begin_record(work: Work, asked: Asked, config: TrainConfig) -> int:
    """Enter a trial as running; return its key in the record."""
    trained, total = count_parameters(
        config.backbone,
        config.weights,
        config.image_size,
        config.freeze_depth,
        len(work.data.classes),
    )
    trial_id = work.store.begin_trial(
        work.study_id,
        asked.trial.number,
        work.run_id,
        origin=asked.origin,
        config=dataclasses.asdict(config),
        config_hash=asked.identity or identity(config),
        seed=config.seed,
        backbone=config.backbone,
        freeze_depth=config.freeze_depth,
        device=describe_device(choose_device(config.device)),
        trained_parameters=trained,
        total_parameters=total,
        factor=asked.factor,
        level=asked.level,
        replicate=asked.replicate,
    )
    work.progress.trial_started(
        asked.trial.number, asked.origin, params_of(asked.trial), config.epochs
    )
    return trial_id


def _told(err: Exception) -> str:
    """Tell a user's fault in its own words, and a fault of ours with where it happened."""
    if isinstance(err, ValueError):
        return str(err)
    where = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__}: {err} ({Path(where.filename).name}:{where.lineno})"


def checkpoint_folder(output: Path, number: int) -> Path:
    """Return where a trial's checkpoint lies."""
    return output / f"trial-{number:04d}"


def drop_checkpoint(work: Work, number: int) -> None:
    """Remove a trial's weights."""
    work.store.set_checkpoint(work.store.trial(work.study_id, number).id, None)
    shutil.rmtree(checkpoint_folder(work.output, number), ignore_errors=True)


def record_answers(work: Work, number: int) -> None:
    """Put what a finished trial says of every validation picture into the record."""
    trial = work.store.trial(work.study_id, number)
    with np.load(checkpoint_folder(work.output, number) / PREDICTIONS_FILE) as saved:
        labels, predicted = saved["labels"].tolist(), saved["predicted"].tolist()
    work.store.add_predictions(trial.id, "val", labels, predicted)


def record_predictions(work: Work, number: int) -> None:
    """Put a finished trial's confusion matrix and worst pictures into the record.

    Reads what `fit` left beside the checkpoint; reports then need the database only.
    """
    trial = work.store.trial(work.study_id, number)
    folder = checkpoint_folder(work.output, number)
    with np.load(folder / PREDICTIONS_FILE) as saved:
        labels, predicted = saved["labels"], saved["predicted"]
        probability, confusion = saved["probability"], saved["confusion"]
    work.store.add_confusion(trial.id, "val", confusion.tolist())
    wrong = np.flatnonzero(labels != predicted)
    worst = wrong[np.argsort(probability[wrong], kind="stable")][:_N_WORST]
    split, classes = work.data.val, work.data.classes
    rows = [
        PictureRow(
            split="val",
            rank=rank,
            path=split.paths[i],
            label=classes[labels[i]],
            predicted=classes[predicted[i]],
            probability=float(probability[i]),
            thumbnail=_thumbnail(split.store.image(int(split.indices[i]))),
        )
        for rank, i in enumerate(worst.tolist())
    ]
    work.store.add_pictures(trial.id, rows)


def _thumbnail(picture: np.ndarray[Any, Any]) -> bytes:
    image = Image.fromarray(np.asarray(picture))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
