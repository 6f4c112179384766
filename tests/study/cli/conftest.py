"""What the tests of the command line share: running a command, and a recorded study."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_line import without_figures
from study.cli.main import DEFAULT_STORAGE, main
from study.config.study_config import StudyConfig
from study.record.record import Record
from support import distributions_of
from tests.reports.studies import DATA as PETS
from tests.reports.studies import Plan, enter

DATA = PETS | {"source": "digits", "n_train": 8, "n_val": 4, "n_test": 0}
ENDS = [
    ("complete", 0.5, None),
    ("complete", 0.75, None),
    ("pruned", 0.25, "hopeless"),
    ("failed", None, "diverged [bad]"),
]


@pytest.fixture
def answered(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed; return what it printed."""

    def run(*args: str) -> str:
        assert main(args) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused with status 2; return its message."""

    def run(*args: str) -> str:
        assert main(args) == 2
        message = capsys.readouterr().err
        assert "error: " in message
        return message

    return run


@pytest.fixture
def no_figures() -> Iterator[None]:
    with without_figures():
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorded(here: Path) -> Path:
    """A working folder with one study of four trials; the best one's checkpoint is kept."""
    with Record(DEFAULT_STORAGE, create=True) as store:
        study = store.create_study("ants", StudyConfig().to_record(), DATA, {})
        run = store.begin_run(study, command="c", device="cpu", versions={})
        for number, (state, value, reason) in enumerate(ENDS):
            params, curve = {"base_lr": 10.0 ** -(number + 1)}, [] if value is None else [value]
            plan = Plan(params, curve, state, reason, epoch_s=1.0, config_hash=str(number))
            row = enter(store, study, run, plan, distributions_of(params))
            if number == 1:
                row.weights_hash = hashlib.sha256(b"weights of 1").hexdigest()
                store.save(row)
        store.end_run(run, "trials")
    for number in (0, 1):
        folder = here / "frostline-runs" / "ants" / f"trial-000{number}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(f"weights of {number}")
    return here
