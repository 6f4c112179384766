"""A study of small images and a small network that runs in seconds, and what it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.execution.progress import Event, Note, QuietProgress
from study.record.models import Trial
from study.record.record import Record
from study.search.search import SearchOutcome, run_search
from support import classic_settings, figures, make_folder

SETTINGS = [
    'train.backbone="timm:test_resnet"',
    'train.weights="none"',
    "train.image_size=32",
    "train.epochs=2",
    "train.batch_size=8",
    'train.device="cpu"',
    'train.head_solver="sgd"',
]
HEADS = """
[train]
freeze_depth = 5
[search]
pruner = "none"
recipes = false
[space]
base_lr = {low = 1e-4, high = 1e-1, log = true}
"""


class Listener(QuietProgress):
    """Collects the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def notes(self) -> list[str]:
        """Return the texts of the notes."""
        return [event.text for event in self.events if isinstance(event, Note)]


class Reacts(Listener):
    """Acts once, at the first event of a kind."""

    def __init__(self, is_meant: Callable[[Event], bool], act: Callable[[], None]) -> None:
        super().__init__()
        self.is_meant, self.act = is_meant, act

    def emit(self, event: Event) -> None:
        was_there = any(map(self.is_meant, self.events))
        super().emit(event)
        if self.is_meant(event) and not was_there:
            self.act()


def make_home(home: Path, space: str = HEADS, n: int = 16) -> Path:
    """Write a folder of images and a configuration."""
    make_folder(home / "photos", {"red": n, "blue": n})
    (home / "study.toml").write_text(space)
    return home


def config_of(home: Path, trials: int, *settings: str, **flags: object) -> StudyConfig:
    """Return a study's configuration; all that it writes is in its home."""
    classic = classic_settings("\n".join([(home / "study.toml").read_text(), *settings]))
    return load_config(
        home / "study.toml",
        [*(f"{key}={value}" for key, value in classic.items()), *SETTINGS, *settings],
        {
            "data.source": str(home / "photos"),
            "data.cache_dir": str(home / "cache"),
            "study.storage": str(home / "s.db"),
            "study.output": str(home / "runs"),
            "study.trials": trials,
            **flags,
        },
    )


def run(config: StudyConfig, **options: object) -> SearchOutcome:
    """Run a search that says nothing."""
    return run_search(config, **({"progress": Listener(), "command": "test"} | options))


def bare_trial(number: int, config: dict[str, Any], origin: str = "plan") -> Trial:
    """Return a trial that is in no record."""
    return Trial(
        study_id=1, number=number, run_id=1, origin=origin, config=config, config_hash="",
        device="cpu",
    )  # fmt: skip


def rows_of(home: Path, name: str = "photos", database: str = "s.db") -> list[Trial]:
    """Return the trials in our record."""
    with Record(str(home / database)) as record:
        return record.trials(record.study(name).id)


def figures_of(home: Path, number: int, name: str = "photos") -> list[dict[str, object]]:
    """Return the figures of a trial's epochs that do not depend on the clock."""
    with Record(str(home / "s.db")) as record:
        epochs = record.epochs(record.trial(record.study(name).id, number).id)
    return [figures(metrics) for metrics in epochs]


def optuna_trials(home: Path, name: str = "photos") -> list[optuna.trial.FrozenTrial]:
    """Return the trials in Optuna's tables, as another program reads them."""
    return optuna.load_study(study_name=name, storage=f"sqlite:///{home}/s.db").trials
