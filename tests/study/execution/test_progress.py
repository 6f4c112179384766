import io
import json

import pytest
from rich.console import Console

from core.metrics import EpochMetrics
from study.execution.progress import (
    DataProgress,
    EpochEnded,
    Event,
    JsonProgress,
    Note,
    Progress,
    QuietProgress,
    StepDone,
    StudyState,
    TrialEnded,
    TrialStarted,
)
from study.execution.terminal import LiveProgress, PlainProgress
from study.record.models import Counts


def metrics(epoch: int, acc: float, train_loss: float = 0.5, is_best: bool = True) -> EpochMetrics:
    times = (123.4, 0.1, 0.2, 0.3)
    return EpochMetrics(epoch, train_loss, 0.4, acc, acc, acc, 0.01, 0.1, *times, 1, 32, is_best)


# One complete, one pruned, one failed and one stopped trial.
EVENTS: list[Event] = [
    DataProgress(5, 10),
    DataProgress(10, 10),
    Note("3 files are no images [ignored]"),
    StudyState("ants", 6, Counts(complete=2), 0.8, 0.8, 0.0, 900.0),
    TrialStarted(2, "recipe:linear-probe", {"base_lr": 0.00123, "freeze_depth": 5}, 2),
    EpochEnded(2, metrics(1, 0.7)),
    EpochEnded(2, metrics(2, 0.9)),
    TrialEnded(2, "complete", 0.9, None, 4.25),
    StudyState("ants", 6, Counts(complete=3), 0.9, 0.9, 0.0, 900.0),
    TrialStarted(3, "sampler", {}, 2),
    EpochEnded(3, metrics(1, 0.1)),
    TrialEnded(3, "pruned", 0.1, "hopeless", 61),
    TrialStarted(4, "sampler", {}, 2),
    TrialEnded(4, "failed", None, "diverged", 3700),
    TrialStarted(5, "sampler", {}, 2),
    TrialEnded(5, "stopped", None, "interrupted", 1),
    StudyState("ants", 6, Counts(complete=3, pruned=1, failed=1), 0.9, 0.7, 0.0, 900.0),
]


def play(progress: Progress) -> None:
    for event in EVENTS:
        progress.emit(event)
    progress.close()


def test_plain_lines_show_each_trial_and_where_the_study_stands() -> None:
    out = io.StringIO()
    play(PlainProgress(out))
    assert out.getvalue().splitlines() == [
        "3 files are no images [ignored]",
        "study ants  0:00 of 15:00 · 2 of 6 trials · best 80.0 %",
        "trial   2   90.0 %      4.2 s  recipe:linear-probe: base_lr=0.00123, level 5",
        "trial   3   10.0 %  1 min 01 s  pruned  sampler  (hopeless)",
        "trial   4        -  1 h 01 min  failed  sampler  (diverged)",
        "trial   5        -      1.0 s  stopped  sampler  (interrupted)",
    ]


def test_a_long_trial_shows_where_it_is_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.execution.terminal._EVERY_S", 0.0)
    out = io.StringIO()
    progress = PlainProgress(out)
    for event in (*EVENTS[3:6], StepDone(2, 1.25)):
        progress.emit(event)
    line = "0:00  trial   2  epoch 2/2   25%  accuracy 70.0 %, loss 0.400, 123 images/s"
    assert out.getvalue().splitlines()[-1] == line
    progress.emit(EpochEnded(2, metrics(2, 0.7)))
    assert "epoch 2/2  100%" in out.getvalue().splitlines()[-1]
    # One that is continued begins where it was.
    progress.emit(TrialStarted(3, "sampler", {}, 8))
    progress.emit(StepDone(3, 4.5))
    assert "epoch 5/8   50%" in out.getvalue().splitlines()[-1]


def test_a_terminal_shows_what_runs_and_ended_trials_scroll_away_above_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    live = LiveProgress(console)
    live.close()  # unused, and again at the end of the study
    live.emit(EVENTS[0])
    assert live.render().plain == "decoding images: 5 of 10"
    for event in (*EVENTS[1:6], StepDone(2, 1.5)):
        live.emit(event)
    assert live.render().plain.splitlines() == [
        "trial   2  recipe:linear-probe: base_lr=0.00123, level 5",
        "━━━━━━━━━━━━──────────── epoch 2/2   50%  accuracy 70.0 %, loss 0.400, 123 imag",
        "study ants  0:00 of 15:00 · 2 of 6 trials · best 80.0 %",
    ]
    for event in EVENTS[6:]:
        live.emit(event)
    live.close()
    assert "3 files are no images [ignored]" in out.getvalue()
    assert "trial   4        -  1 h 01 min  failed  sampler  (diverged)" in out.getvalue()
    assert live.render().plain.splitlines()[-1].startswith("study ants  0:00 of 15:00 · 5 of 6")


def test_json_lines_hold_the_fields_of_each_event_and_no_number_that_json_lacks() -> None:
    out = io.StringIO()
    progress = JsonProgress(out)
    play(progress)
    progress.emit(EpochEnded(9, metrics(1, 0.5, train_loss=float("nan"))))
    note, state, started, epoch, *_, last = map(json.loads, out.getvalue().splitlines())
    assert note == {"event": "note", "text": "3 files are no images [ignored]"}
    others = ("pruned", "failed", "running", "interrupted", "cut_short")
    assert state == {
        "event": "study", "study": "ants", "target": 6, "best": 0.8, "best_score": 0.8,
        "counts": {"complete": 2} | dict.fromkeys(others, 0), "spent_s": 0.0, "time_s": 900.0,
    }  # fmt: skip
    assert started["params"] == {"base_lr": 0.00123, "freeze_depth": 5}
    assert (epoch["trial"], epoch["val_acc"], epoch["epoch"]) == (2, 0.7, 1)
    assert (last["event"], last["train_loss"]) == ("epoch", None)
    ended = json.dumps({
        "event": "trial_ended", "trial": 2, "state": "complete", "value": 0.9, "reason": None,
        "duration_s": 4.25,
    })  # fmt: skip
    assert ended in out.getvalue().splitlines()


def test_quiet_prints_notes_only(capsys: pytest.CaptureFixture[str]) -> None:
    play(QuietProgress())
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "3 files are no images [ignored]\n")
