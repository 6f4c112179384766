"""A run that was left after an epoch and may go on: one file with all that its epochs need."""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from core.config import TrainConfig
from core.data.splits import ImageData
from core.evaluate import Evaluation, count_confusion
from core.feed import Feed
from core.metrics import EpochMetrics

Epochs = Generator[EpochMetrics, bool | None, None]
"""A run: gives an epoch's figures, and takes True for `pause after this one`."""


class Run(Protocol):
    """A network in training, as `fit` goes through the epochs with it.

    Epoch e of a run that was restored gives the same figures, to the bit, as epoch e of one that
    was never left: what an epoch draws at random depends on (seed, epoch) alone, and all the rest
    is in `state`.

    Attributes:
        micro_batch_size: Pictures per forward pass.
        lr_factor: Share of the peak rate at the last step.
    """

    micro_batch_size: int
    lr_factor: float

    def train_epoch(self, epoch: int, feed: Feed, /) -> tuple[float, float, int]:
        """Train an epoch: mean loss, seconds spent waiting for pictures, number of pictures."""

    def evaluate(self, feed: Feed, /) -> Evaluation:
        """Evaluate the weights that would be kept on the validation split."""

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the weights that were evaluated to the CPU: the whole network, by name."""

    def state(self) -> dict[str, Tensor]:
        """Return what training has changed and later epochs depend on, by name.

        Trained parameters and statistics, the optimizer's and the average's memory, and counters
        as tensors without dimensions; nothing of the frozen part. The tensors may be the live
        ones, on any device and in any layout: whoever keeps them copies them.
        """

    def restore(self, state: dict[str, Tensor], /) -> None:
        """Take over a state, given on the CPU, before the first epoch that this run trains.

        Raises:
            ValueError: It is not the state of such a run; nothing has been changed then.
            LookupError: The same.
        """


@dataclass(frozen=True, slots=True)
class Best:
    """The best epoch so far.

    Attributes:
        metrics: Its figures.
        evaluation: What it says about the validation split.
        weights: Its whole network by name, on the CPU; empty where weights are not kept.
    """

    metrics: EpochMetrics
    evaluation: Evaluation
    weights: dict[str, Tensor]


class PausedError(ValueError):
    """A paused run's file is missing, damaged, or another run's."""


# Where and by how many processes a run is computed does not make it another run.
_MAY_CHANGE = ("device", "workers")
_STATE, _WEIGHTS, _LOG_PROBS = "state.", "best.", "log_probs"


def pause(epochs: Epochs) -> None:
    """Have a run leave its state in its `pause_file` after the epoch that it gave last, and end.

    Raises:
        OSError: The file cannot be written.
    """
    with contextlib.suppress(StopIteration):
        epochs.send(True)


def write_paused(
    file: Path, config: TrainConfig, data: ImageData, run: Run, next_epoch: int, best: Best
) -> None:
    """Write what a run needs to go on; the file appears whole or not at all.

    Of the best epoch's weights only those are written that differ from the run's present ones, so
    that nothing frozen is.

    Raises:
        OSError: The file cannot be written.
    """
    now = run.snapshot() if best.weights else {}
    tensors = {_STATE + name: tensor for name, tensor in run.state().items()}
    tensors |= {
        _WEIGHTS + name: tensor
        for name, tensor in best.weights.items()
        if not torch.equal(tensor, now[name])
    }
    tensors[_LOG_PROBS] = torch.from_numpy(best.evaluation.log_probs)
    kept = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    facts = {
        **_told(config, data),
        "next_epoch": next_epoch,
        "best": dataclasses.asdict(best.metrics),
        "has_weights": bool(best.weights),
        "checksum": _checksum(kept),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    try:
        safetensors.torch.save_file(kept, partial, metadata=metadata)
        os.replace(partial, file)
    except safetensors.SafetensorError as err:  # how it tells a full disk
        raise OSError(f"{file} cannot be written: {err}") from err
    finally:
        partial.unlink(missing_ok=True)


def paused_after(file: Path) -> int | None:
    """Return how many epochs a paused run has done, or None where its file cannot be read."""
    try:
        return int(_facts(file)["next_epoch"])
    except PausedError:
        return None


def restore_paused(
    file: Path, config: TrainConfig, data: ImageData, run: Run, *, needs_weights: bool
) -> tuple[int, Best]:
    """Bring a run, fresh from its beginning, to where it was paused.

    Args:
        file: From `write_paused`.
        config: The run's configuration.
        data: Its pictures.
        run: Changed in place, or not at all.
        needs_weights: Whether the best epoch's weights are to be kept.

    Returns:
        The epoch that comes next, and the best one so far.

    Raises:
        PausedError: The file is missing or damaged, or is that of another run.
    """
    facts = _facts(file)
    told = _told(config, data)
    if any(facts.get(name) != value for name, value in told.items()):
        raise PausedError(f"{file} was left by a run of other settings or pictures.")
    if needs_weights and not facts["has_weights"]:
        raise PausedError(f"{file} was left by a run that keeps no weights.")
    try:
        # Copied, since in the file tensors are not aligned, by which products round differently.
        tensors = {name: t.clone() for name, t in safetensors.torch.load_file(file).items()}
    except (OSError, safetensors.SafetensorError) as err:
        raise PausedError(f"{file} cannot be read ({err}).") from err
    if _checksum(tensors) != facts["checksum"]:
        raise PausedError(f"{file} is damaged: its checksum differs.")
    log_probs = tensors.pop(_LOG_PROBS).numpy()
    try:
        metrics = EpochMetrics(**facts["best"])
        run.restore(_part(tensors, _STATE))
    except (TypeError, ValueError, LookupError) as err:
        raise PausedError(f"{file} is of another version ({err}).") from err
    weights = {**run.snapshot(), **_part(tensors, _WEIGHTS)} if needs_weights else {}
    labels = data.val.labels
    predicted = log_probs.argmax(axis=1).astype(np.int64)
    confusion = count_confusion(labels, predicted, log_probs.shape[1])
    return facts["next_epoch"], Best(metrics, Evaluation(labels, log_probs, confusion), weights)


def _told(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Return what makes a run the same run."""
    settings = dataclasses.asdict(config)
    identity = {name: value for name, value in settings.items() if name not in _MAY_CHANGE}
    # As JSON gives it back: lists for tuples.
    return {
        "config": json.loads(json.dumps(identity)),
        "classes": list(data.classes),
        "fingerprint": data.fingerprint,
    }


def _facts(file: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        facts = {name: json.loads(value) for name, value in metadata.items()}
        int(facts["next_epoch"])
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, KeyError) as err:
        raise PausedError(f"{file} cannot be read ({err}).") from err
    return facts


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of contiguous tensors on the CPU, in the order of their names."""
    checksum = 0
    for name in sorted(tensors):
        octets = tensors[name].reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(octets.data, checksum)
    return checksum
