import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from core.metrics import EpochMetrics
from study.progress import (
    CUT_SHORT,
    BestTrial,
    Counts,
    JsonProgress,
    Progress,
    QuietProgress,
    choose_progress,
)
from study.terminal import LiveProgress, PlainProgress


@dataclass(frozen=True)
class Ended:
    study_name: str = "ants"
    stopped_because: str = "trials"
    counts: Counts = Counts(complete=1, pruned=1, failed=1)
    best_number: int | None = 0
    best_value: float | None = 0.9
    checkpoint: Path | None = None
    duration_s: float = 1.0


def metrics(epoch: int, val_acc: float, train_loss: float = 0.5) -> EpochMetrics:
    return EpochMetrics(
        epoch=epoch,
        train_loss=train_loss,
        val_loss=0.4,
        val_acc=val_acc,
        val_balanced_acc=val_acc,
        val_macro_f1=val_acc,
        base_lr=0.01,
        head_lr=0.1,
        images_per_s=123.4,
        data_s=0.1,
        train_s=0.2,
        eval_s=0.3,
        peak_memory_bytes=1,
        micro_batch_size=32,
        is_best=True,
    )


def play(progress: Progress) -> None:
    """Tell a study of one complete, one pruned and one failed trial."""
    progress.pictures(5, 10)
    progress.pictures(10, 10)
    progress.note("3 files are no pictures [ignored]")
    progress.study_started("ants", 6, Counts(complete=2), BestTrial(0.8, 0.8))
    progress.trial_started(2, "recipe:linear-probe", {"base_lr": 0.00123, "depth": 5}, 2)
    progress.epoch(2, metrics(0, 0.7))
    progress.epoch(2, metrics(1, 0.9))
    progress.trial_ended(2, "complete", 0.9, None, 4.25)
    progress.trial_started(3, "sampler", {}, 2)
    progress.epoch(3, metrics(0, 0.1))
    progress.trial_ended(3, "pruned", 0.1, "hopeless", 61)
    progress.trial_started(4, "sampler", {}, 2)
    progress.trial_ended(4, "failed", None, "diverged", 3700)
    progress.study_ended(Ended())
    progress.close()


def test_plain_lines_tell_each_trial_and_where_the_study_stands() -> None:
    out = io.StringIO()
    play(PlainProgress(out))
    lines = out.getvalue().splitlines()
    assert lines[0] == "3 files are no pictures [ignored]"
    assert lines[1] == "study ants: 2 of 6 trials · 2 complete, 0 pruned, 0 failed · best 80.0 %"
    assert lines[2] == "trial   2  recipe:linear-probe: base_lr=0.00123, depth=5"
    assert (
        lines[4]
        == "trial   2  epoch  2/2  accuracy  90.0 %  loss 0.400 (training 0.500)  123 images/s"
    )
    assert lines[5] == "trial   2  complete   90.0 %      4.2 s"
    assert lines[6].startswith(
        "study ants: 3 of 6 trials · 3 complete, 0 pruned, 0 failed · best 90.0 %"
    )
    assert "trials/h · about" in lines[6]
    assert "trial   3  pruned     10.0 %  1 min 01 s  hopeless" in lines
    assert "trial   4  failed          -  1 h 01 min  diverged" in lines
    assert lines[-1].startswith("study ants: 5 of 6 trials · 3 complete, 1 pruned, 1 failed")


def recorded() -> tuple[LiveProgress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    return LiveProgress(console), out


def rendered(progress: LiveProgress) -> str:
    with progress.console.capture() as capture:
        progress.console.print(progress.render())
    return capture.get()


def test_the_live_table_shows_running_trials_and_the_study() -> None:
    progress, _ = recorded()
    progress.study_started("ants", 6, Counts(complete=2), BestTrial(0.8, 0.8))
    progress.trial_started(2, "recipe:linear-probe", {"base_lr": 0.00123}, 3)
    progress.epoch(2, metrics(0, 0.7))
    progress.epoch(2, metrics(1, 0.6))
    shown = rendered(progress)
    progress.close()
    row = next(line for line in shown.splitlines() if "linear-probe" in line)
    assert row.split() == [
        "2",
        "2/3",
        "60.0",
        "%",
        "70.0",
        "%",
        "recipe:linear-probe",
        "base_lr=0.00123",
    ]
    assert "ants: 2 of 6 trials · 2 complete, 0 pruned, 0 failed · best 80.0 %" in shown


def test_ended_trials_scroll_away_above_the_live_table() -> None:
    progress, out = recorded()
    play(progress)
    text = out.getvalue()
    assert "3 files are no pictures [ignored]" in text
    assert "trial   2  complete   90.0 %      4.2 s  base_lr=0.00123, depth=5" in text
    assert "trial   4  failed          -  1 h 01 min  diverged" in text
    assert rendered(progress).splitlines()[-1].startswith("ants: 5 of 6 trials")


def test_decoding_is_counted_until_it_is_done() -> None:
    progress, _ = recorded()
    progress.pictures(5, 10)
    assert "decoding pictures: 5 of 10" in rendered(progress)
    progress.pictures(10, 10)
    assert "decoding" not in rendered(progress)
    progress.close()


def test_closing_twice_or_unused_is_harmless() -> None:
    progress, _ = recorded()
    progress.close()
    progress.close()


def test_json_lines_hold_every_event_and_no_number_that_json_lacks() -> None:
    out = io.StringIO()
    progress = JsonProgress(out)
    play(progress)
    progress.epoch(9, metrics(0, 0.5, train_loss=float("nan")))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        "note",
        "study_started",
        "trial_started",
        "epoch",
        "epoch",
        "trial_ended",
        "trial_started",
        "epoch",
        "trial_ended",
        "trial_started",
        "trial_ended",
        "epoch",
    ]
    assert events[1] == {
        "event": "study_started",
        "study": "ants",
        "target": 6,
        "counts": {
            "complete": 2, "pruned": 0, "failed": 0, "running": 0, "cut_short": 0,
        },
        "best": 0.8,
    }  # fmt: skip
    assert events[2]["params"] == {"base_lr": 0.00123, "depth": 5}
    assert (events[4]["trial"], events[4]["val_acc"], events[4]["epoch"]) == (2, 0.9, 1)
    assert events[-1]["train_loss"] is None


def test_quiet_tells_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    play(QuietProgress())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "3 files are no pictures [ignored]\n"


def test_without_a_terminal_lines_are_chosen() -> None:
    assert isinstance(choose_progress(), PlainProgress)
    assert isinstance(choose_progress(is_quiet=True), QuietProgress)
    assert isinstance(choose_progress(is_json=True, is_quiet=True), JsonProgress)


def test_a_trial_that_was_cut_short_does_not_count_towards_the_target() -> None:
    out = io.StringIO()
    progress = PlainProgress(out)
    progress.study_started(
        "ants", 6, Counts(complete=2, failed=2, cut_short=1), BestTrial(0.8, 0.8)
    )
    progress.trial_started(4, "sampler", {}, 2)
    progress.trial_ended(4, "failed", None, "interrupted", 1.0)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("study ants: 3 of 6 trials · 2 complete, 0 pruned, 2 failed")
    assert lines[-1].startswith("study ants: 3 of 6 trials · 2 complete, 0 pruned, 3 failed")


def test_the_reasons_that_cut_a_trial_short_are_the_runners() -> None:
    from study.runner import RERUN_REASONS

    assert set(CUT_SHORT) == set(RERUN_REASONS)
