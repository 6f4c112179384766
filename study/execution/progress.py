"""What happens while a study runs, as events; shown here by nobody or as JSON lines."""

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from core.metrics import EpochMetrics
from study.config.formatting import json_text
from study.config.search_space import ParamValue
from study.record.models import Counts, Trial, best_of


@dataclass(frozen=True, slots=True)
class StudyState:
    """Where a study stands: before its first trial of this run, and after each.

    Attributes:
        target: Finished trials that it shall have in total; None for no limit.
        best: Validation accuracy of the best complete trial so far, in [0, 1].
        best_score: What it is the best by, as in `EpochMetrics`.
        spent_s: Seconds of this run so far.
        time_s: Seconds that it may take as a whole; None for no limit.
    """

    study: str
    target: int | None
    counts: Counts
    best: float | None = None
    best_score: float | None = None
    spent_s: float = 0.0
    time_s: float | None = None

    @classmethod
    def of(
        cls,
        study: str,
        target: int | None,
        trials: Sequence[Trial],
        spent_s: float = 0.0,
        time_s: float | None = None,
    ) -> "StudyState":
        """Sum up the trials that a study has."""
        best = best_of(trials)
        shown = (best.value, best.ranked_by) if best else (None, None)
        return cls(study, target, Counts.of(trials), *shown, spent_s, time_s)


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial begins: its settings, where they come from, and its epochs if it is not pruned."""

    trial: int
    origin: str
    params: Mapping[str, ParamValue]
    epochs: int


@dataclass(frozen=True, slots=True)
class EpochEnded:
    """A trial has finished an epoch."""

    trial: int
    metrics: EpochMetrics


@dataclass(frozen=True, slots=True)
class StepDone:
    """A trial has done a step, and so many epochs, of the unfinished one its share."""

    trial: int
    epochs: float


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial has ended.

    Attributes:
        state: `complete`, `pruned`, `failed`, or `stopped`: the next start continues it.
        value: Validation accuracy of its best epoch, in [0, 1]; None if no epoch was finished.
        reason: Why it was pruned, failed or stopped.
        duration_s: Wall time, in all processes.
    """

    trial: int
    state: str
    value: float | None
    reason: str | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Note:
    """A warning or another fact, in a sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class DataProgress:
    """So many of so many images are decoded."""

    done: int
    total: int


Event = StudyState | TrialStarted | StepDone | EpochEnded | TrialEnded | Note | DataProgress
# The command line writes the end of a study: it adds the report.
_JSON_NAMES: dict[type, str] = {
    StudyState: "study",
    TrialStarted: "trial_started",
    EpochEnded: "epoch",
    TrialEnded: "trial_ended",
    Note: "note",
}


class Progress:
    """Shows events; this one shows nothing.

    Attributes:
        stopped_by: The signal that ended the process's work, if one did.
    """

    stopped_by: int = signal.SIGINT

    def emit(self, event: Event) -> None:
        """Show an event."""

    def close(self) -> None:
        """Give the terminal back, after an error too."""


class QuietProgress(Progress):
    """Nothing but notes, on standard error."""

    def emit(self, event: Event) -> None:
        """Print a note."""
        if isinstance(event, Note):
            print(event.text, file=sys.stderr, flush=True)


class JsonProgress(Progress):
    """One JSON object per line: an event's fields and its name as `event`."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout

    def emit(self, event: Event) -> None:
        """Write an event."""
        name = _JSON_NAMES.get(type(event))
        if name is None:
            return
        values = dataclasses.asdict(event)
        values |= values.pop("metrics", {})
        print(json_text({"event": name} | values), file=self._out, flush=True)


def choose_progress(*, is_quiet: bool, is_json: bool) -> Progress:
    """Choose what suits the flags and the terminal."""
    if is_json:
        return JsonProgress()
    if is_quiet:
        return QuietProgress()
    from study.execution.terminal import LiveProgress, PlainProgress

    return LiveProgress() if sys.stdout.isatty() else PlainProgress()
