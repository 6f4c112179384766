"""The state of a run in training: one file, from which it continues at a step, to the bit."""

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from core.config import TrainConfig
from core.keys import SOURCE
from core.metrics import EpochMetrics, Evaluation
from core.models.sources import library_versions
from core.models.weights import resolve
from core.training.activations import Run
from core.training.trainer import Trainer

# Inside an epoch the state is written this often: what a kill may cost. Assumption.
_EVERY_S = 60.0
# Writing may take this share of the time that was trained since. Assumption.
_MOST_SHARE = 1 / 20
_LEAST_COST_S = 0.02  # what the first write is taken to cost. Assumption.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, UnpicklingError, BadZipFile)
# Where and by how many processes a run is computed does not make it another run.
_MAY_CHANGE = ("device", "workers")


@dataclass(frozen=True, slots=True)
class Best:
    """The best epoch so far; its `weights` are what was trained, by its names in the network."""

    metrics: EpochMetrics
    evaluation: Evaluation
    weights: dict[str, Tensor]


def epochs_in_state(
    file: Path, config: TrainConfig, classes: tuple[str, ...], fingerprint: str
) -> int | None:
    """Return the epochs that a run had finished when its state was saved; None if unusable."""
    state = _read(file, _run_key(config, classes, fingerprint))
    return None if state is None else int(state["trainer"]["position"]["epoch"])


def _run_key(config: TrainConfig, classes: tuple[str, ...], fingerprint: str) -> str:
    """Return what a state must have been saved by to be continued."""
    settings = dataclasses.asdict(config)
    own = {name: value for name, value in settings.items() if name not in _MAY_CHANGE}
    weights = resolve(config.backbone, config.weights)  # a package may have come since
    text = json.dumps([own, weights, classes, fingerprint, library_versions(), SOURCE])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path, run: str) -> dict[str, Any] | None:
    """Read a state; None for one that is missing, damaged or another run's."""
    try:
        with ZipFile(file) as parts:  # PyTorch itself compares no checksums
            if parts.testzip() is not None:
                return None
        state = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE:
        return None
    return state if isinstance(state, dict) and state.get("run") == run else None


class TrainingState:
    """A run's state file, None for none; one that is damaged or another run's counts as none."""

    def __init__(self, file: Path | None, run: Run, trainer: Trainer) -> None:
        self._file, self._trainer, self._device = file, trainer, run.device
        self._labels = run.data.val.labels
        self._key = _run_key(run.config, run.data.classes, run.data.fingerprint)
        self._saved_at = time.perf_counter()
        self._cost_s = _LEAST_COST_S
        self._random: list[Tensor] = []

    def restore(self) -> Best | None:
        """Bring a trainer, before its first step, to where the file says; give the best epoch."""
        state = _read(self._file, self._key) if self._file else None
        if state is None:
            return None
        self._trainer.load_state_dict(state["trainer"])
        if state["trainer"]["position"]["step"]:  # an epoch begins with random numbers of its own
            self._random = state["random"]
        best = state["best"]
        return best and Best(
            EpochMetrics(**best["metrics"]),
            Evaluation(self._labels, best["log_probs"].numpy()),
            best["weights"],
        )

    def restore_random(self) -> None:
        """Continue the random numbers of an unfinished epoch, once."""
        if self._random:
            torch.set_rng_state(self._random[0])
            if self._device.type == "cuda" and len(self._random) > 1:  # else it began elsewhere
                torch.cuda.set_rng_state(self._random[1], self._device)
        self._random = []

    def save(self, best: Best | None) -> None:
        """Write the state; the file appears whole or not at all."""
        if self._file is None:
            return
        begin = time.perf_counter()
        state: dict[str, Any] = {
            "run": self._key,
            "trainer": self._trainer.state_dict(),
            "random": [torch.get_rng_state()],
            "best": best
            and {
                "metrics": dataclasses.asdict(best.metrics),
                "log_probs": torch.from_numpy(best.evaluation.log_probs),
                "weights": best.weights,
            },
        }
        if self._device.type == "cuda":
            state["random"] += [torch.cuda.get_rng_state(self._device)]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._file)
        except RuntimeError as err:  # how PyTorch says that a write failed
            raise OSError(f"{self._file} cannot be written: {err}") from err
        finally:
            partial.unlink(missing_ok=True)
        self._saved_at = time.perf_counter()
        self._cost_s = self._saved_at - begin

    def save_if_due(self, best: Best | None, *, after_epoch: bool = False) -> None:
        """Write the state where it is time to, and writing costs little beside training."""
        trained_s = time.perf_counter() - self._saved_at
        if (after_epoch or trained_s >= _EVERY_S) and self._cost_s <= _MOST_SHARE * trained_s:
            self.save(best)
