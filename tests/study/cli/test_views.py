import dataclasses
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from core.metrics import EpochMetrics
from core.models.freeze_stages import Level
from study.cli import views
from study.config.study_config import StudyConfig, StudySection
from study.record.models import Test, Trial
from study.record.record import Record
from study.search.plan import BackboneCost, Estimate
from study.search.search import SearchOutcome
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
SECTION = StudySection(name="ants", trials=30)


def epoch_of(value: float) -> EpochMetrics:
    return EpochMetrics(0, 0.5, 0.4, value, value, value, 0.1, 1.0, 99.0, 0, 0, 0, 1, 32, True)


@pytest.fixture
def store(tmp_path: Path) -> Record:
    """A database with one study of four trials."""
    made = Record(str(tmp_path / "studies.db"), create=True)
    study_id = made.create_study("ants", StudyConfig().to_record(), DATA, {"torch": "2"})
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
        made.begin_trial(row)
        if value is not None:
            made.add_epoch(row, epoch_of(value), 1.0)
            trial.report(value, 1)
        row.reason, row.duration_s = reason, 2.0
        made.end_trial(row, state)
    return made


@pytest.fixture
def trials(store: Record) -> list[Trial]:
    return list(store.trials(store.study("ants").id))


def text_of(view: RenderableType) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def words_of(view: RenderableType) -> list[list[str]]:
    return [line.split() for line in text_of(view).splitlines()]


def test_a_table_prints_brackets_as_they_are_and_none_as_a_dash() -> None:
    table = views.make_table(("a [b]", "n"), [("x [red]", None), ("y", 12)], right=("n",))
    assert text_of(table).splitlines() == ["a [b]     n", "x [red]   -", "y        12"]


def test_studies_are_listed_with_their_best(store: Record) -> None:
    head, row = words_of(views.studies_table(store.studies()))
    assert head[:4] == ["study", "best", "trial", "complete"]
    assert row[:8] == ["ants", "90.0", "%", "1", "2", "1", "1", "0"]
    assert "python -m study run" in text_of(views.studies_table([]))


def test_a_study_shows_its_images_and_every_trial(store: Record, trials: list[Trial]) -> None:
    view = views.study_view(store.study("ants"), trials, [row_of(0.85)])
    text, rows = text_of(view), words_of(view)
    assert "folder:ants: 80 train, 20 val, 10 test, 2 classes" in text
    assert "Best trial: 1, 90.0 %." in text
    assert "Test accuracy of trial 4" in text
    assert ["1", "90.0", "%", "1", "2.0", "s", "complete", "sampler", "base_lr=0.01"] in rows
    assert ["3", "-", "0", "2.0", "s", "failed", "sampler", "base_lr=0.0001"] in rows


def test_a_trial_shows_reason_epochs_and_configuration(store: Record, trials: list[Trial]) -> None:
    view = views.trial_view(trials[2], store.epochs(trials[2].id))
    for part in ("pruned: hopeless", "1,234 of 5,678", "30.0 % (validation, epoch 1)"):
        assert part in text_of(view)
    assert ["clip_norm", "none"] in words_of(view)
    assert "failed: diverged [bad]" in text_of(views.trial_view(trials[3], []))


def test_a_trial_shows_what_the_cache_saved(trials: list[Trial]) -> None:
    reader = dataclasses.replace(epoch_of(0.5), saved_s=1.5, cache_hits=2)
    maker = dataclasses.replace(epoch_of(0.5), cache_misses=1)
    assert "1.5 s (2 of 3 arrays" in text_of(views.trial_view(trials[0], [reader, maker]))


def test_the_summary_names_the_best_and_how_far_to_trust_it(trials: list[Trial]) -> None:
    view = views.summary_view(SearchOutcome("timeout", trials, 20, 65.0), SECTION)
    text = text_of(view)
    for part in ("study.timeout", "4 of 30 trials, 2 complete", "checkpoint: not kept"):
        assert part in text
    assert "Selected from 3 trials on 20 validation images" in text
    assert [row[0] for row in words_of(view) if "complete" in row][-2:] == ["1", "0"]


def test_the_summary_of_failures_says_why(trials: list[Trial]) -> None:
    text = text_of(views.summary_view(SearchOutcome("timeout", trials[3:], 20, 65.0), SECTION))
    assert "No trial is complete. The last one failed: diverged [bad]." in text


def test_the_selection_bias_is_that_of_equally_good_trials() -> None:
    # Twenty equally good classifiers of 90 % on 400 images, simulated.
    rng = np.random.default_rng(0)
    best = rng.binomial(400, 0.9, size=(20_000, 20)).max(axis=1) / 400
    assert views.selection_bias(0.9, 400, 20) == pytest.approx(best.mean() - 0.9, abs=0.002)
    assert views.selection_bias(0.9, 400, 1) == 0
    assert views.selection_bias(1.0, 400, 5) == 0


def row_of(val_acc: float | None, number: int = 4) -> Test:
    return Test(
        id=1,
        study_id=1,
        trial_number=number,
        created_at=datetime(2026, 3, 4, 5, 6),
        n=100,
        n_correct=80,
        balanced_acc=0.8,
        macro_f1=0.8,
        val_acc=val_acc,
        confusion=[],
        command="c",
    )


@pytest.mark.parametrize(
    ("val_acc", "words"),
    [
        (None, "80.0 % on 100 images (95 % interval"),
        (0.85, "85.0 %, 5.0 points higher"),
        (0.78, "78.0 %, 2.0 points lower"),
        (0.8, "80.0 %, the same"),
    ],
)
def test_a_test_has_its_interval_and_is_compared(val_acc: float | None, words: str) -> None:
    assert words in views.describe_test(row_of(val_acc))


def test_a_result_that_is_not_the_only_test_is_marked() -> None:
    first, second = row_of(0.8, 1), row_of(0.8, 7)
    alone = views.describe_test(first)
    assert views.describe_use(first, [first], is_new=True) == alone
    assert "2026-03-04 05:06 UTC" in views.describe_use(first, [first], is_new=False)
    both = views.describe_use(second, [first, second], is_new=True)
    assert "2 times (trials 1, 7)" in both


def test_the_next_commands_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = tmp_path / "environment"
    environment.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", str(environment))
    assert views.study_command("show", "ants", "studies.db") == (
        "environment/python -m study show ants"
    )
    assert views.dashboard_command("studies.db").startswith("environment/optuna-dashboard ")
    # With all its programs, and activated.
    for name in ("python", "optuna-dashboard"):
        (environment / name).touch(mode=0o755)
    assert views.study_command("show", "ants", "studies.db") == "python -m study show ants"
    assert views.study_command("test", "my ants", "sub dir/a.db", "--levels all") == (
        "python -m study test 'my ants' --storage 'sub dir/a.db' --levels all"
    )
    secret = views.study_command("show", "a", "postgresql://me:hunter2@db/x")
    assert "hunter2" not in secret and "me:***@db/x" in secret
    dashboards = {
        "sub dir/a.db": "optuna-dashboard 'sqlite:///sub dir/a.db'",
        "sqlite:////x.db": "optuna-dashboard sqlite:////x.db",
    }
    assert {storage: views.dashboard_command(storage) for storage in dashboards} == dashboards


def test_levels_are_shown_with_parameters_and_flops() -> None:
    levels = [Level(0, (), 2_000_000, 0.0), Level(1, ("conv1", "bn1"), 1_900_000, 0.25)]
    rows = words_of(views.levels_view("resnet18", levels))
    assert rows[2] == ["0", "2,000,000", "0", "%", "nothing"]
    assert rows[3] == ["1", "1,900,000", "25", "%", "conv1,", "bn1"]


def test_an_estimate_shows_time_and_disk() -> None:
    cost = BackboneCost("resnet18", 224, (0.1, 0.02), 0.02, 45_000_000)
    estimate = Estimate("cpu", 20, (cost,), 30.0, 600.0, 135_000_000)
    text = " ".join(text_of(views.estimate_view(estimate)).split())
    assert "resnet18 224 px 10 images/s 50 images/s 45.0 MB" in text
    assert "about 30.0 s per trial, 10 min 00 s if none is pruned, 135.0 MB of checkpoints" in text
