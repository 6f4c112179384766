"""A process that works on a study: checked, entered in the record, and signed off at the end."""

import dataclasses
import errno
import hashlib
import itertools
import math
import operator
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import optuna
import pandas as pd
import psutil
import torch
from sqlalchemy.exc import SQLAlchemyError

from core.cache import ArrayCache
from core.config import TrainConfig
from core.data.splits import ImageData, cache_folder, load_data
from core.device import choose_device, describe_device
from core.models.builder import build, input_of
from core.models.partition import check_head
from core.models.sources import library_versions
from core.models.weights import resolve, weights_file
from core.training.trainer import check_batches
from study.config.errors import ConfigError
from study.config.formatting import study_command
from study.config.search_space import apply_params, distributions
from study.config.study_config import StudyConfig, config_diff
from study.execution.progress import DataProgress, Note, Progress
from study.record.database import failure
from study.record.models import COMMIT, SPLITS_FILE, WEIGHTS_OF, Study, folds_column
from study.record.record import Record

# Images are stored this much larger than a network's input, so that random crops of them still
# have detail. Assumption.
_STORE_MARGIN = 1.25
# Of the disk that is free: images and checkpoints need it, too. Assumption.
_SHARE_OF_FREE_DISK = 0.1
# Images between two looks at the clock while they are decoded: a few take no time worth saving.
_CHECK_EVERY = 64
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DEAD_DEVICE = ("CUDA error", "CUDA driver", "HIP error", "MPS backend")


class StudyHalted(RuntimeError):
    """The study cannot continue until the user has done something; the text says what."""


@dataclass(slots=True)
class Session:
    """One process's part in a study.

    Attributes:
        study_id: The study's key in the record.
        run_id: This process's key in it.
        data: Images, in the study's split.
        output: Folder of the study's checkpoints and training states.
        stop: Set when the process is to leave after the current step.
        cache: Arrays that trials share; None where they share nothing.
        resume: Command that continues the study.
        same_images: Whether the images are those of the study so far.
        because: Why the process left, for the record; set by whoever runs the trials.
        deadline: When the running trial is to stop, as `time.monotonic` counts.
    """

    record: Record
    study_id: int
    run_id: int
    config: StudyConfig
    data: ImageData
    output: Path
    progress: Progress
    stop: threading.Event
    cache: ArrayCache | None
    resume: str
    same_images: bool
    because: str = "error"
    deadline: float = math.inf

    def halted(self) -> str | None:
        """Return why the process is to leave after the current step, if it is."""
        if self.stop.is_set():
            return "interrupted"
        return "timeout" if time.monotonic() > self.deadline else None

    def images(self, fold: tuple[int, int, int] | None) -> ImageData:
        """Return the images in the study's split; or with a fold, of how many by which seed."""
        return self.data if fold is None else self.data.with_fold(*fold)


@contextmanager
def open_session(
    record: Record,
    config: StudyConfig,
    trains: Sequence[TrainConfig],
    *,
    progress: Progress,
    command: str,
    resume: str | None = None,
    allow_changes: bool = False,
    take_over: bool = False,
    deadline: float = math.inf,
) -> Iterator[Session]:
    """Enter a study as the process that works on it, and sign off at the end.

    Every network of `trains`, what will be trained or the extremes of it, is built once. The
    command `resume` continues the study; None for that of a search. With `allow_changes` a stored
    study is continued although its configuration or images changed, and with `take_over` although
    a process of another machine has not signed off.

    Raises:
        ConfigError: The configuration differs from the stored one, or cannot be run.
        RecordError: Another process runs the study.
        StudyHalted: The disk is full, a file cannot be used, the device fails, or the deadline
            passes while images are decoded.
        ValueError: Images, weights, backbone or device cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, stored = config.study.name, record.find_study(config.study.name)
    if stored is not None:
        _check_config(stored, config, allow_changes)
        _check_space(record, stored, config)
    try:
        data = load_images(config, progress, deadline)
    except KeyboardInterrupt:
        progress.emit(Note("No trial has begun; the same command begins again."))
        raise
    preflight(trains, data)
    settings, described = config.to_record(), _described(data)
    output = Path(record.usable_path(config.study.output)) / name
    settings["study"]["output"] = str(output.parent)
    is_same = True
    if stored is None:
        study_id = record.create_study(name, settings, described, versions())
    else:
        study_id = stored.id
        is_same = _has_same_images(stored, described, allow_changes)
    device = describe_device(choose_device(config.train.device))
    run_id = record.begin_run(
        study_id, command=command, device=device, versions=made_with(trains), take_over=take_over
    )
    if stored is not None:  # only now: a process that was refused must not have changed it
        record.update_study(stored, settings, described)
    with _stopped_by_signals(progress) as stop:
        session = Session(
            record=record,
            study_id=study_id,
            run_id=run_id,
            config=config,
            data=data,
            output=output,
            progress=progress,
            stop=stop,
            cache=_cache(config),
            resume=resume or study_command("resume", name, record.storage),
            same_images=is_same,
            deadline=deadline,
        )
        try:
            write_splits(data, output)
            yield session
        except Exception as err:
            if cause := outside_cause(err):
                session.because = "halted"
                raise StudyHalted(f"{cause} Then continue: {session.resume}") from err
            raise
        finally:
            with suppress(SQLAlchemyError):  # a full disk: the next process sees it gone
                record.end_run(run_id, session.because)


def outside_cause(err: Exception) -> str | None:
    """Return what failed and what to do about it, where an error has nothing to do with a trial.

    That is a full disk, a file that cannot be read or written, the database, and a device that
    fails for another reason than its memory. None for any other error.
    """
    if why := failure(err):
        return f"the database {why}"
    text = " ".join(str(err).split())
    if isinstance(err, OSError):
        cause: BaseException | None = err
        is_full = "No space left" in text
        while cause is not None and not is_full:
            is_full = isinstance(cause, OSError) and cause.errno in _FULL_DISK
            cause = cause.__cause__ or cause.__context__
        if is_full:
            return f"the disk is full or cannot be written: {text}. Free space on it."
        return f"a file cannot be read or written: {text}. Correct that."
    is_device = isinstance(err, RuntimeError) and any(word in text for word in _DEAD_DEVICE)
    if is_device and not isinstance(err, torch.OutOfMemoryError):
        return f"the device failed: {text}. Check it, or choose another with train.device."
    return None


def _cache(config: StudyConfig) -> ArrayCache | None:
    """Return the arrays that trials share; None where nothing is to be shared."""
    folder = cache_folder(config.data) / "arrays"
    budget: int | None = config.study.cache
    if budget is None:
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        budget = int(_SHARE_OF_FREE_DISK * psutil.disk_usage(str(parent)).free)
    return ArrayCache(folder, budget) if budget else None


def stored_side(trains: Iterable[TrainConfig]) -> int:
    """Return the shorter side at which decoded images are stored: enough for every network."""
    shapes = {(train.backbone, train.weights, train.image_size) for train in trains}
    return round(_STORE_MARGIN * max(input_of(*shape).resize_size for shape in shapes))


def corner_configs(config: StudyConfig, *, with_starts: bool = False) -> list[TrainConfig]:
    """Return the base configuration at every network of the space, at the largest batch size.

    A plan's are of the first image size: whether it comes to another is open. `with_starts` adds
    every freeze level, every way to start or solve a head and to treat batch norms, and every
    possible extreme of the batch size.
    """
    starts = ("head_init", "head_solver", "freeze_depth", "batch_norm") if with_starts else ()
    names = ("backbone", "weights", "image_size", *starts)
    ends = {name: config.space[name].ends for name in names if name in config.space}
    if config.search.strategy == "plan" and "image_size" in ends:
        ends["image_size"] = ends["image_size"][:1]
    if "batch_size" in config.space:
        sizes = sorted(int(n or 0) for n in config.space["batch_size"].ends)
        possible = [n for n in sizes if n >= (config.train.micro_batch_size or 1)]
        ends["batch_size"] = tuple(possible if with_starts else sizes[-1:])
    corners = itertools.product(*ends.values())
    return [apply_params(config.train, dict(zip(ends, c, strict=True))) for c in corners]


def load_images(config: StudyConfig, progress: Progress, deadline: float = math.inf) -> ImageData:
    """Load the study's images, showing progress and warnings; `deadline` is as a session's.

    Raises:
        StudyHalted: The deadline has passed.
    """
    trains = corner_configs(config)
    shown = [input_of(train.backbone, train.weights, train.image_size) for train in trains]

    def show(done: int, total: int) -> None:
        progress.emit(DataProgress(done, total))
        if time.monotonic() > deadline and done % _CHECK_EVERY == 0:
            raise StudyHalted(
                f"the time (study.time) must be long enough to decode all images, but {done} of "
                f"{total} were decoded when it ended. Give it more (--time)."
            )

    data = load_data(config.data, stored_side(trains), show, shown)
    for warning in data.warnings:
        progress.emit(Note(warning))
    return data


def write_splits(
    data: ImageData, folder: Path, folds: Iterable[tuple[int, int, int] | None] = ()
) -> None:
    """Write `splits.csv`: of every image its split, path and class, in the order of predictions.

    With the folds of an ablation's replicates, a column per division says which fold an image is
    in; those of earlier designs stay.
    """
    splits = {"train": data.train, "val": data.val}
    if data.test is not None:
        splits["test"] = data.test
    frame = pd.concat(
        pd.DataFrame(
            {"split": name, "path": split.paths, "class": np.take(data.classes, split.labels)}
        )
        for name, split in splits.items()
    )
    divisions = dict.fromkeys(fold[:2] for fold in folds if fold is not None)
    for n_folds, seed in divisions:
        column = np.full(len(frame), -1)
        column[: len(data.development)] = data.folds(n_folds, seed)
        frame[folds_column(n_folds, seed)] = column
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SPLITS_FILE
    with suppress(OSError, ValueError, KeyError):  # none yet, or a damaged one
        known = pd.read_csv(path, dtype={"path": str, "class": str}, keep_default_na=False)
        if list(known["path"]) == list(frame["path"]):
            known[frame.columns] = frame.to_numpy()
            frame = known
    partial = path.with_suffix(".partial")
    frame.to_csv(partial, index=False, lineterminator="\n")
    os.replace(partial, path)


def preflight(trains: Sequence[TrainConfig], data: ImageData) -> None:
    """Build every network once, so that a fault shows before the first trial.

    Raises:
        ValueError: A backbone, its weights, the device, or the batch size cannot be used.
    """
    makes_network = operator.attrgetter(
        "backbone", "weights", "image_size", "normalize", "head_init"
    )
    for _, group in itertools.groupby(trains, makes_network):
        alike = list(group)
        choose_device(alike[0].device)
        network = build(alike[0], data.classes)
        for train in alike:
            try:
                n_train = len(data.with_share(train.train_fraction).train)
                check_batches(train, network, n_train)
            except ValueError as err:
                raise ConfigError(str(err)) from err
        solved = next((t for t in alike if t.is_solved or t.head_init == "solved"), None)
        if solved is not None:
            check_head(network, solved)


def is_on_this_machine(train: TrainConfig) -> bool:
    """Return whether a run's pretrained weights need not be downloaded."""
    weights = resolve(train.backbone, train.weights)
    return weights == "none" or weights_file(train.backbone, weights) is not None


def without_weights(train: TrainConfig) -> TrainConfig:
    """Return a configuration of the same network that needs nothing from outside."""
    is_auto = train.batch_norm == "auto" and train.weights != "none"
    norms = "frozen" if is_auto else train.batch_norm
    return dataclasses.replace(train, weights="none", normalize="none", batch_norm=norms)


def versions() -> dict[str, str]:
    """Return the versions that decide a study's numbers, for the record."""
    ours = {name: version(name) for name in ("frostline", "optuna", "numpy", "pillow")}
    return {"python": platform.python_version(), **library_versions(), **ours}


def made_with(trains: Iterable[TrainConfig]) -> dict[str, str]:
    """Return the versions, the SHA-256 of pretrained weights, and the working folder's commit."""
    found = versions()
    for backbone, weights in dict.fromkeys((train.backbone, train.weights) for train in trains):
        if file := weights_file(backbone, resolve(backbone, weights)):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found[f"{WEIGHTS_OF}{backbone}"] = digest
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        found[COMMIT] = said.stdout.strip()
    return found


def _check_config(study: Study, config: StudyConfig, allow_changes: bool) -> None:
    """Refuse to continue a study with settings that change its results."""
    stored = StudyConfig.from_record(study.config)
    if stored.train.monitor != config.train.monitor:
        raise ConfigError(
            f"train.monitor must stay {stored.train.monitor}, by which study {study.name} "
            f"has ranked its trials, but got {config.train.monitor}. Add --set "
            f"train.monitor={stored.train.monitor}, or use another --name."
        )
    changes = [] if allow_changes else config_diff(stored, config)
    if changes:
        raise ConfigError(
            f"study {study.name} is already in {config.study.storage} with another "
            "configuration:\n  "
            + "\n  ".join(changes)
            + "\nContinue it as it was ("
            + study_command("resume", study.name, config.study.storage)
            + "), use another --name, or mix both (--allow-changes)."
        )


def _check_space(record: Record, study: Study, config: StudyConfig) -> None:
    """Refuse dimensions that Optuna cannot have beside those of the study's trials."""
    trials = record.optuna_study(study.id).get_trials(deepcopy=False)
    known = {name: dim for trial in trials for name, dim in trial.distributions.items()}
    faults = []
    for name, new in distributions(config.space).items():
        try:
            optuna.distributions.check_distribution_compatibility(known.get(name, new), new)
        except ValueError:
            rule = f"must keep its choices, log and kind of number in study {study.name}"
            text = f"{rule}, whose trials have it, but got {config.space[name]}"
            faults.append(f"space.{name}: {text}. Use another --name.")
    if faults:
        raise ConfigError(*faults)


def _has_same_images(study: Study, now: dict[str, Any], allow_changes: bool) -> bool:
    """Return whether the images are those of a study so far; refuse to continue on other ones."""
    then = study.data
    is_same: bool = then["fingerprint"] == now["fingerprint"]
    if not is_same and not allow_changes:
        raise ConfigError(
            f"the images of study {study.name} have changed since it began: {_counts(then)} of "
            f"{then['source']} then, {_counts(now)} of {now['source']} now (training + validation "
            "+ test; where the numbers are equal, the contents are not). Restore them, or use "
            "another --name. (run and resume take --allow-changes to mix both.)"
        )
    return is_same


def _counts(data: dict[str, Any]) -> str:
    return f"{data['n_train']} + {data['n_val']} + {data['n_test']} images"


def _described(data: ImageData) -> dict[str, Any]:
    counts = {"n_train": len(data.train), "n_val": len(data.val), "n_test": len(data.test or ())}
    facts = {"source": data.source, "classes": list(data.classes), **counts}
    return {**facts, "fingerprint": data.fingerprint, "warnings": list(data.warnings)}


@contextmanager
def _stopped_by_signals(progress: Progress) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C, TERM or HUP into a wish to stop; the second leaves at once."""
    stop, hang_up = threading.Event(), getattr(signal, "SIGHUP", None)
    terminals, owner = [fd for fd in (1, 2) if os.isatty(fd)], os.getpid()

    def wish(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that reads images
            return
        if number == hang_up:
            for fd in terminals:  # gone: whatever is written there would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            if stop.is_set():
                return  # shell and kernel may send one each
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        progress.stopped_by = number
        text = "Stopping, and saving the trial's state; Ctrl-C now leaves at once, without it."
        with suppress(OSError, RuntimeError):  # it may come in the middle of another line
            progress.emit(Note(text))

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(hang_up)
    before = {number: signal.signal(number, wish) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
