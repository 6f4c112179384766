import dataclasses
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from small_study import rows_of

from core.metrics import EpochMetrics
from study.cli import views
from study.config.formatting import study_command
from study.config.study_config import StudySection
from study.record.models import Test, Trial
from study.search.search import SearchOutcome


def text_of(view: RenderableType) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


@pytest.fixture
def trials(recorded: Path) -> list[Trial]:
    """Two complete trials, a pruned one and a failed one."""
    return rows_of(recorded, "ants", "studies.db")


def test_a_trial_shows_what_the_cache_saved(trials: list[Trial]) -> None:
    figures = (0.1, 1.0, 9.0, 0.0, 0.0, 0.0, 1, 32, True)
    epoch = EpochMetrics(1, 0.5, 0.4, 0.5, 0.5, 0.5, *figures)
    reader = dataclasses.replace(epoch, saved_s=1.5, cache_hits=2)
    maker = dataclasses.replace(epoch, cache_misses=1)
    assert "1.5 s (2 of 3 arrays" in text_of(views.trial_view(trials[0], [reader, maker]))


def test_the_summary_names_the_best_and_how_far_to_trust_it(trials: list[Trial]) -> None:
    section = StudySection(name="ants", trials=30)
    view = views.summary_view(SearchOutcome("timeout", trials, 20, 10, 65.0), section, 0.0125)
    text = text_of(view)
    for part in ("study.time", "4 of 30 trials, 2 complete"):
        assert part in text
    assert "2 trials on 20 validation images is about 1.2 points too high" in text
    assert "counting all 3 epochs" in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["1", "0"]


def test_a_test_has_its_interval_and_says_whether_it_is_the_only_one() -> None:
    figures = {"n": 100, "n_correct": 80, "balanced_acc": 0.8, "macro_f1": 0.8, "confusion": []}
    ids = {"study_id": 1, "command": "c", "created_at": datetime(2026, 3, 4, 5, 6)}
    first = Test(id=1, trial_number=1, val_acc=0.85, **figures, **ids)
    second = Test(id=2, trial_number=7, val_acc=None, **figures, **ids)
    alone = views.describe_use(first, [first], is_new=True)
    assert "80.0 % on 100 images (95 % interval 71.1 % to 86.7 %)" in alone
    assert "85.0 %, 5.0 points higher" in alone
    for val_acc, words in ((0.78, "78.0 %, 2.0 points lower"), (0.8, "80.0 %, the same")):
        assert words in views.describe_test(dataclasses.replace(first, val_acc=val_acc))
    assert "2026-03-04 05:06 UTC" in views.describe_use(first, [first], is_new=False)
    both = views.describe_use(second, [first, second], is_new=True)
    assert "2 times (trial 1, trial 7)" in both and "Validation" not in both


def test_the_next_commands_can_be_pasted() -> None:
    assert study_command("show", "ants", "studies.db") == "python -m study show ants"
    assert study_command("test", "my ants", "sub dir/a.db", "--levels all") == (
        "python -m study test 'my ants' --storage 'sub dir/a.db' --levels all"
    )
    secret = study_command("show", "a", "postgresql://me:hunter2@db/x")
    assert "hunter2" not in secret and "me:***@db/x" in secret
