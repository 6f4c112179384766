import dataclasses
import math
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from core.metrics import EpochMetrics
from study.config.study_config import StudyConfig
from study.execution.progress import Counts
from study.record.models import Test, Trial
from study.record.record import Record
from study.show import (
    best_first,
    differences_table,
    estimate_view,
    format_bytes,
    levels_table,
    next_commands,
    say_looks,
    say_shared,
    say_test,
    selection_bonus,
    studies_table,
    study_view,
    summary_view,
    trial_differences,
    trial_view,
)
from support import distributions_of

DATA = {
    "source": "folder:ants",
    "classes": ["ant", "bee [x]"],
    "n_train": 80,
    "n_val": 20,
    "n_test": 10,
    "fingerprint": "0",
    "warnings": [],
}


@pytest.fixture
def store(tmp_path: Path) -> Record:
    """A database with one study of four trials."""
    made = Record.open(str(tmp_path / "studies.db"), create=True)
    config = StudyConfig().to_record()
    study_id = made.create_study("ants", config, DATA, {"torch": "2"})
    run_id = made.begin_run(study_id, command="c", device="cpu", versions={})
    ends = [
        ("complete", 0.8, None),
        ("complete", 0.9, None),
        ("pruned", 0.3, "hopeless"),
        ("failed", None, "diverged [bad]"),
    ]
    for number, (state, value, reason) in enumerate(ends):
        lr = 10.0 ** -(number + 1)
        params = {"base_lr": lr}
        trial = made.start_trial(study_id, params, distributions_of(params))
        row = Trial(
            study_id=study_id,
            number=number,
            run_id=run_id,
            origin="recipe:linear-probe" if number == 0 else "sampler",
            config={"base_lr": lr, "epochs": 2, "clip_norm": None},
            config_hash=str(number),
            device="cpu",
            trained_parameters=1234,
            total_parameters=5678,
        )
        key = made.begin_trial(row)
        if value is not None:
            made.add_epoch(key, epoch_of(value), 1.0)
            trial.report(value, 1)
        made.end_trial(
            key,
            state,
            reason=reason,
            value=value,
            best_epoch=None if value is None else 0,
            epochs_done=0 if value is None else 1,
            duration_s=2.0,
            checkpoint=None,
        )
    return made


def epoch_of(value: float) -> EpochMetrics:
    return EpochMetrics(0, 0.5, 0.4, value, value, value, 0.1, 1.0, 99.0, 0, 0, 0, 1, 32, True)


def text_of(view: RenderableType) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_an_empty_list_says_what_to_do() -> None:
    assert "python -m study run" in text_of(studies_table([]))


def test_studies_are_listed_with_their_best(store: Record) -> None:
    head, row = text_of(studies_table(store.studies())).splitlines()
    assert head.split()[:4] == ["study", "best", "trial", "complete"]
    assert row.split()[:8] == ["ants", "90.0", "%", "1", "2", "1", "1", "0"]


def test_a_study_shows_its_pictures_and_every_trial(store: Record) -> None:
    study = store.study("ants")
    text = text_of(study_view(study, store.trials(study.id), []))
    assert "folder:ants: 80 train, 20 val, 10 test, 2 classes" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "90.0", "%", "1", "2.0", "s", "complete", "sampler", "base_lr=0.01"] in rows
    assert ["3", "-", "0", "2.0", "s", "failed", "sampler", "base_lr=0.0001"] in rows


def test_a_trial_shows_reason_epochs_and_configuration(store: Record) -> None:
    study = store.study("ants")
    trial = store.trial(study.id, 2)
    text = text_of(trial_view(trial, store.epochs(trial.id)))
    assert "pruned: hopeless" in text
    assert "1,234 of 5,678" in text
    assert "30.0 % (validation, epoch 1)" in text
    assert ["clip_norm", "none"] in [line.split() for line in text.splitlines()]
    failed = store.trial(study.id, 3)
    assert "failed: diverged [bad]" in text_of(trial_view(failed, []))


def test_what_a_trial_shared_is_told_in_a_line() -> None:
    epoch = EpochMetrics(
        0, 0.7, 0.6, 0.9, 0.9, 0.9, 0.01, 0.1, 100.0, 0.1, 1.0, 0.2, 10**9, 32, True
    )
    reader = dataclasses.replace(
        epoch, saved_s=1.5, cache_hits=2, cache_read_bytes=3_000_000, cache_disk_bytes=2_000_000
    )
    maker = dataclasses.replace(epoch, cache_misses=1, cache_kept_bytes=500)
    assert say_shared([reader, maker]) == (
        "1.5 s (2 of 3 entries were there: 3 MB, 2 MB of it from disk; 500 B left for others)"
    )
    assert say_shared([epoch]) == "0.0 s"
    assert say_shared([]) == "-"


def test_trials_are_ranked_complete_first(store: Record) -> None:
    trials = store.trials(store.study("ants").id)
    assert [row.number for row in best_first(trials)] == [1, 0, 2, 3]


def test_two_trials_differ_in_settings_and_results(store: Record) -> None:
    study = store.study("ants")
    a, b = store.trial(study.id, 0), store.trial(study.id, 1)
    assert trial_differences(a, b) == {"base_lr": (0.1, 0.01), "value": (0.8, 0.9)}
    text = text_of(differences_table(a, b))
    assert ["base_lr", "0.1", "0.01"] in [line.split() for line in text.splitlines()]
    assert "Trial 1 is +10.0 points of accuracy away." in text
    assert "the better one" not in text  # accuracy says it already


def test_two_trials_by_loss_are_told_apart_by_it(store: Record) -> None:
    study = store.study("ants")
    a, b = (
        dataclasses.replace(row, score=score, config={**row.config, "monitor": "val_loss"})
        for row, score in zip(store.trials(study.id)[:2], (0.7, 0.6), strict=True)
    )
    text = text_of(differences_table(a, b))
    assert "Trial 1 is +10.0 points of accuracy away." in text
    assert "By validation loss, trial 0 is the better one." in text
    assert ["score", "0.7", "0.6"] in [line.split() for line in text.splitlines()]


@dataclass(frozen=True)
class Ended:
    study_name: str = "ants"
    stopped_because: str = "timeout"
    counts: Counts = Counts(complete=2, pruned=1, failed=1)
    best_number: int | None = 1
    best_value: float | None = 0.9
    checkpoint: Path | None = Path("runs/ants/trial-1")
    duration_s: float = 65.0


def test_a_test_that_is_not_the_one_look_says_so() -> None:
    def look(number: int) -> Test:
        when = datetime(2026, 3, 4, 5, 6)
        return dataclasses.replace(looked_at(0.8), trial_number=number, created_at=when)

    first, second = look(1), look(7)
    assert say_looks([first], first, is_new=True) == ""
    again = say_looks([first], first, is_new=False)
    assert again == "(From the record: it was read on 2026-03-04 05:06 UTC.)"
    both = say_looks([first, second], second, is_new=True)
    assert both.startswith("The test split has been read 2 times (trials 1, 7)")


def test_the_summary_names_the_best_and_how_it_flatters_itself(store: Record) -> None:
    trials = store.trials(store.study("ants").id)
    text = text_of(summary_view(Ended(), trials, 20, 30))
    assert "Time is up (study.timeout). Study ants: 4 of 30 trials, 2 complete" in text
    assert "The best of 3 trials on 20 validation pictures flatters itself" in text
    assert "Best checkpoint: runs/ants/trial-1" in text
    numbers = [line.split()[0] for line in text.splitlines() if "complete" in line.split()]
    assert numbers[-2:] == ["1", "0"]


def test_the_summary_of_failures_says_why(store: Record) -> None:
    trials = store.trials(store.study("ants").id)[3:]
    ended = Ended(best_number=None, best_value=None, checkpoint=None)
    text = text_of(summary_view(ended, trials, 20, 30))
    assert "No trial is complete. The last one failed: diverged [bad]." in text


def test_the_selection_bonus_is_what_equally_good_trials_would_show() -> None:
    # Twenty equally good classifiers of 90 % on 400 pictures, simulated.
    rng = np.random.default_rng(0)
    best = rng.binomial(400, 0.9, size=(20_000, 20)).max(axis=1) / 400
    assert selection_bonus(0.9, 400, 20) == pytest.approx(best.mean() - 0.9, abs=0.002)
    assert selection_bonus(0.9, 400, 1) == 0
    assert math.isclose(selection_bonus(1.0, 400, 5), 0)


def looked_at(val_acc: float | None) -> Test:
    row = dict(id=1, study_id=1, trial_number=4, created_at=None, n=100, n_correct=80)
    rest = dict(accuracy=0.8, low=0.71, high=0.87, balanced_acc=0.8, macro_f1=0.8)
    return Test(**row, **rest, val_acc=val_acc, confusion=[], command="c")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("val_acc", "words"),
    [
        (0.85, "85.0 %, 5.0 points more (the report says what chance alone can give)."),
        (0.95, "95.0 %, 15.0 points more (the report says what chance alone can give)."),
        (0.78, "78.0 %, 2.0 points less (the report says what chance alone can give)."),
        (0.8, "80.0 %, the same (the report says what chance alone can give)."),
        (None, "(95 % interval 71.0 % to 87.0 %)."),
    ],
)
def test_a_test_is_told_beside_what_validation_said(val_acc: float | None, words: str) -> None:
    sentence = say_test(looked_at(val_acc))
    assert sentence.startswith("Test of trial 4: 80.0 % of 100 pictures")
    assert sentence.endswith(words)


def test_the_next_commands_name_the_programs_where_the_environment_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(Path(sys.executable).parent.parent)
    folder = Path(sys.executable).parent.name
    commands = next_commands("ants", "studies.db")
    assert commands[0] == f"{folder}/python -m study show ants"
    assert commands[2] == f"{folder}/optuna-dashboard sqlite:///studies.db"


def test_the_next_commands_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An activated environment with all its programs.
    for name in ("python", "optuna-dashboard"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert next_commands("ants", "studies.db") == [
        "python -m study show ants",
        "python -m study test ants",
        "optuna-dashboard sqlite:///studies.db",
    ]
    assert next_commands("my ants", "sub dir/a.db", goes_on=True) == [
        "python -m study resume 'my ants' --storage 'sub dir/a.db'",
        "python -m study test 'my ants' --storage 'sub dir/a.db'",
        "optuna-dashboard 'sqlite:///sub dir/a.db'",
    ]
    assert next_commands("a", "sqlite:////x.db")[2] == "optuna-dashboard sqlite:////x.db"
    secret = next_commands("a", "postgresql://me:hunter2@db/x")
    assert "hunter2" not in " ".join(secret) and "me:***@db/x" in secret[0]
    halted = next_commands("a", "studies.db", goes_on=True, has_best=False)
    assert halted == ["python -m study resume a", "optuna-dashboard sqlite:///studies.db"]


@dataclass(frozen=True)
class Level:
    depth: int
    newly_frozen: tuple[str, ...]
    trained_parameters: int
    frozen_flops_share: float


def test_levels_are_shown_with_parameters_and_flops() -> None:
    levels = [Level(0, (), 2_000_000, 0.0), Level(1, ("conv1", "bn1"), 1_900_000, 0.25)]
    lines = text_of(levels_table("resnet18", levels)).splitlines()  # type: ignore[arg-type]
    assert lines[2].split() == ["0", "2,000,000", "0", "%", "nothing"]
    assert lines[3].split() == ["1", "1,900,000", "25", "%", "conv1,", "bn1"]


@dataclass(frozen=True)
class Cost:
    backbone: str = "resnet18"
    image_size: int = 224
    train_s: tuple[float, ...] = (0.1, 0.02)
    eval_s: float = 0.02
    weights_bytes: int = 45_000_000


@dataclass(frozen=True)
class Estimate:
    device: str = "cpu"
    n_trials: int = 20
    n_train: int = 80
    n_val: int = 20
    costs: tuple[Cost, ...] = (Cost(),)
    trial_s: float = 30.0
    total_s: float = 600.0
    checkpoint_bytes: int = 135_000_000


def test_an_estimate_shows_time_and_disk() -> None:
    text = " ".join(text_of(estimate_view(Estimate())).split())  # type: ignore[arg-type]
    assert "resnet18 224 px 10 images/s 50 images/s 45 MB" in text
    assert "about 30.0 s a trial, 10 min 00 s if none is pruned, 135 MB of checkpoints" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [(12, "12 B"), (1500, "2 kB"), (45e6, "45 MB"), (2.5e9, "2.5 GB"), (999.6, "1000 B")],
)
def test_bytes_are_written_in_their_unit(size: float, text: str) -> None:
    assert format_bytes(size) == text
