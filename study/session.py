"""A process at work on a study: checked, entered in the record, and leaving it cleanly."""

import dataclasses
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import platformdirs
import psutil
from optuna.trial import TrialState

from core.cache import ArrayCache
from core.config import TrainConfig
from core.data.splits import ImageData, load_data
from core.device import choose_device, describe_device
from core.fit import build_for
from core.models.builder import input_of
from core.models.sources import library_versions
from study.config.errors import ConfigError
from study.config.search_space import ParamValue, apply_params
from study.config.study_config import StudyConfig, config_diff
from study.progress import Progress
from study.runner import REASON_KILLED, Work
from study.store import Store

# The store keeps pictures this much larger than a network looks at, so that random crops of them
# still have detail. Assumption.
_STORE_MARGIN = 1.25
# Of the disk that is free: pictures and checkpoints need it, too. Assumption.
_SHARE_OF_FREE_DISK = 0.1


@dataclass(slots=True)
class Session:
    """One process's part in a study.

    Attributes:
        work: What its trials share.
        because: Why it ended, for the record; set by whoever runs the trials.
    """

    work: Work
    because: str = "error"


@contextmanager
def open_session(
    store: Store,
    config: StudyConfig,
    trains: Sequence[TrainConfig],
    *,
    progress: Progress,
    command: str,
    allow_changes: bool = False,
    take_over: bool = False,
) -> Iterator[Session]:
    """Enter a study as the process that works on it, and sign off at the end.

    Args:
        store: The record.
        config: The resolved configuration.
        trains: What will be trained, or the extremes of it: every network is tried at once.
        progress: What the user sees.
        command: Command line, for the record.
        allow_changes: Continue a stored study although its configuration or pictures changed.
        take_over: Begin although a process of another machine has not signed off.

    Raises:
        ConfigError: The configuration differs from the stored one, or cannot be run.
        StoreError: The study is being run elsewhere.
        ValueError: Pictures, weights, backbone or device cannot be used.
    """
    _refuse_changes(store, config, allow_changes)
    data = load_pictures(config, progress)
    preflight(trains, data)
    study_id = _enter(store, config, data, allow_changes)
    device = describe_device(choose_device(config.train.device))
    run_id = store.begin_run(
        study_id, command=command, device=device, versions=versions(), take_over=take_over
    )
    # Only now: a process that was refused must not have changed the study of the other.
    store.update_study(study_id, config.to_record(), _described(data))
    with _leaving_cleanly(progress) as stop:
        output = Path(config.study.output) / config.study.name
        cache = _cache(config)
        session = Session(Work(store, study_id, run_id, data, output, progress, stop, cache))
        try:
            yield session
        finally:
            store.end_run(run_id, session.because)


def _cache(config: StudyConfig) -> ArrayCache | None:
    """Make room for shared work; None where nothing is to be shared."""
    budget: int | None = config.study.cache
    if budget == 0:
        return None
    # Beside the decoded images, as core.data.splits places them.
    folder = Path(config.data.cache_dir or platformdirs.user_cache_dir("frostline")) / "arrays"
    if budget is None:
        budget = _free_disk(folder)
    return ArrayCache(folder, budget)


def _free_disk(folder: Path) -> int:
    """Return how much of a disk may be taken unasked, bytes."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return int(_SHARE_OF_FREE_DISK * psutil.disk_usage(str(there)).free)


def close_killed(work: Work) -> None:
    """Close what a process that died left open, in both tables.

    A trial that had ended for us is reported to Optuna as it ended; any other is failed.
    """
    store, study_id = work.store, work.study_id
    rows = {row.number: row for row in store.trials(study_id)}
    running = store.optuna_study(study_id).get_trials(states=(TrialState.RUNNING,))
    for trial in running:
        row = rows.get(trial.number)
        if row is None:  # asked for, but never begun
            store.tell(study_id, trial.number, "failed")
        elif row.ended_at is not None:
            store.tell(study_id, trial.number, row.ended_as, row.value)
        else:
            spent = sum(m.data_s + m.train_s + m.eval_s for m in store.epochs(row.id))
            store.end_trial(
                row.id,
                "failed",
                reason=REASON_KILLED,
                value=None,
                best_epoch=row.best_epoch,
                epochs_done=row.epochs_done,
                duration_s=spent,
                checkpoint=None,
            )
            work.progress.note(
                f"Trial {row.number} was cut short when its process died; its settings are run "
                "again."
            )


def picture_size(trains: Iterable[TrainConfig]) -> int:
    """Return the shorter side at which decoded pictures are kept: enough for every network."""
    shapes = {(train.backbone, train.weights, train.image_size) for train in trains}
    resizes = [input_of(*shape).resize_size for shape in shapes]
    return round(_STORE_MARGIN * max(resizes))


def corner_configs(config: StudyConfig, *, with_starts: bool = False) -> list[TrainConfig]:
    """Return the base configuration at every network of the space, at the largest batch.

    Args:
        config: The study.
        with_starts: At every start of a head, too.
    """
    corners: list[dict[str, ParamValue]] = [{}]
    starts = ("head_init",) if with_starts else ()
    for name in ("backbone", "weights", "image_size", *starts):
        if name in config.space:
            ends = config.space[name].ends
            corners = [{**corner, name: end} for corner in corners for end in ends]
    if "batch_size" in config.space:
        largest = max(int(v) for v in config.space["batch_size"].ends if v is not None)
        corners = [{**corner, "batch_size": largest} for corner in corners]
    return [apply_params(config.train, corner) for corner in corners]


def load_pictures(config: StudyConfig, progress: Progress) -> ImageData:
    """Load the study's pictures, telling progress and warnings."""
    data = load_data(config.data, picture_size(corner_configs(config)), progress.pictures)
    for warning in data.warnings:
        progress.note(warning)
    return data


def preflight(trains: Sequence[TrainConfig], data: ImageData) -> None:
    """Build every network once, so that a fault shows before the first trial.

    Args:
        trains: What will be trained, or the extremes of it.
        data: Pictures.

    Raises:
        ValueError: A backbone, its weights, the device, or the batch size cannot be used.
    """
    built = set()
    for train in trains:
        choose_device(train.device)
        network = (
            train.backbone, train.weights, train.image_size, train.normalize,
        )  # fmt: skip
        if network not in built:
            built.add(network)
            build_for(train, data.classes)
    largest = max(train.batch_size for train in trains)
    if largest > len(data.train):
        raise ConfigError(
            f"train.batch_size must be <= the number of training pictures, {len(data.train)}, but "
            f"got batch_size={largest}; set it smaller (--set train.batch_size={len(data.train)})."
        )


def without_weights(train: TrainConfig) -> TrainConfig:
    """Return a configuration of the same network that needs nothing from outside."""
    start = "default" if train.head_init == "source-classes" else train.head_init
    return dataclasses.replace(train, weights="none", normalize="none", head_init=start)


def versions() -> dict[str, str]:
    """Return the versions that decide a study's numbers, for the record."""
    import platform
    from importlib.metadata import version

    ours = {name: version(name) for name in ("frostline", "optuna", "numpy", "pillow")}
    return {"python": platform.python_version(), **library_versions(), **ours}


def _refuse_changes(store: Store, config: StudyConfig, allow_changes: bool) -> None:
    row = store.find_study(config.study.name)
    if row is None:
        return
    stored = StudyConfig.from_record(row.config)
    if stored.train.monitor != config.train.monitor:
        raise ConfigError(
            f"train.monitor must stay {stored.train.monitor}, by which study {config.study.name} "
            f"has ranked its trials, but got {config.train.monitor}. Add --set "
            f"train.monitor={stored.train.monitor}, or use another --name."
        )
    if allow_changes:
        return
    changes = config_diff(stored, config)
    if changes:
        raise ConfigError(
            f"study {config.study.name} is already in {config.study.storage} with another "
            "configuration:\n  " + "\n  ".join(changes) + "\nUse another --name, or "
            "--allow-changes to go on with the new one."
        )


def _enter(store: Store, config: StudyConfig, data: ImageData, allow_changes: bool) -> int:
    """Create the study in the record, or check that its pictures are the same."""
    row = store.find_study(config.study.name)
    if row is None:
        name, record = config.study.name, config.to_record()
        return store.create_study(name, record, _described(data), versions())
    if row.data["fingerprint"] != data.fingerprint and not allow_changes:
        raise ConfigError(
            f"the pictures of study {config.study.name} have changed since it began "
            f"({row.data['n_train']} + {row.data['n_val']} then, {len(data.train)} + "
            f"{len(data.val)} training and validation pictures now, or other contents). Restore "
            "them, or use another --name. (run and resume take --allow-changes to mix both.)"
        )
    return row.id


def _described(data: ImageData) -> dict[str, Any]:
    return {
        "source": data.source,
        "classes": list(data.classes),
        "n_train": len(data.train),
        "n_val": len(data.val),
        "n_test": len(data.test) if data.test else 0,
        "fingerprint": data.fingerprint,
        "warnings": list(data.warnings),
    }


@contextmanager
def _leaving_cleanly(progress: Progress) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or TERM) into a wish to stop; the second leaves at once."""
    stop = threading.Event()

    def wish(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        progress.note("Stopping after this epoch; press Ctrl-C again to leave at once.")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, wish) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
