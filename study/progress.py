"""What a study tells while it runs, and who says nothing or JSON; `study.terminal` draws it."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from core.metrics import EpochMetrics
from study.config.formatting import json_text
from study.config.search_space import ParamValue

if TYPE_CHECKING:
    from study.record.models import Trial


CUT_SHORT = ("interrupted", "killed")
"""Reasons of trials that were stopped from outside: they are run again, and do not count."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Trials of a study by state.

    Attributes:
        complete: Reached their last epoch.
        pruned: Stopped by the pruner.
        failed: Diverged, broke, or were cut short.
        running: Under way.
        cut_short: Those of the failed that will be run again.
    """

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    cut_short: int = 0

    @property
    def finished(self) -> int:
        """Return how many trials came to a stop of their own, as the study's target counts."""
        return self.complete + self.pruned + self.failed - self.cut_short


@dataclass(frozen=True, slots=True)
class BestTrial:
    """A study's or a trial's best so far.

    Attributes:
        value: Validation accuracy, in [0, 1].
        score: What it is the best by, as in `EpochMetrics`.
    """

    value: float
    score: float

    @classmethod
    def of(cls, trial: "Trial") -> "BestTrial":
        """Return what a trial that has finished an epoch says of it."""
        return cls(trial.value or 0.0, trial.ranked_by or 0.0)


class Outcome(Protocol):
    """What progress needs of `study.search.SearchOutcome`, which loads torch."""

    @property
    def study_name(self) -> str: ...  # noqa: D102
    @property
    def stopped_because(self) -> str: ...  # noqa: D102
    @property
    def counts(self) -> Counts: ...  # noqa: D102
    @property
    def best_number(self) -> int | None: ...  # noqa: D102
    @property
    def best_value(self) -> float | None: ...  # noqa: D102
    @property
    def checkpoint(self) -> Path | None: ...  # noqa: D102
    @property
    def duration_s(self) -> float: ...  # noqa: D102


class Progress:
    """What the runner tells while it works; silent but for what is overridden."""

    def study_started(
        self, name: str, target: int, counts: Counts, best: BestTrial | None
    ) -> None:
        """Tell that trials begin.

        Args:
            name: Study.
            target: Finished trials that the study shall have in total.
            counts: Trials that it has already.
            best: The best complete trial so far.
        """

    def note(self, text: str) -> None:
        """Tell a warning or another fact in a sentence."""

    def pictures(self, done: int, total: int) -> None:
        """Tell how many pictures have been decoded."""

    def trial_started(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int
    ) -> None:
        """Tell a trial's settings, where they came from, and its epochs if it is not stopped."""

    def epoch(self, number: int, metrics: EpochMetrics) -> None:
        """Tell the figures of a trial's epoch."""

    def trial_ended(
        self,
        number: int,
        state: str,
        value: float | None,
        reason: str | None,
        duration_s: float,
        score: float | None = None,
    ) -> None:
        """Tell how a trial stopped, the accuracy and the score of its best epoch, and why.

        It is `complete`, `pruned` or `failed`.
        """

    def study_ended(self, outcome: Outcome) -> None:
        """Tell how the run ended."""

    def close(self) -> None:
        """Give the terminal back, also after an error."""


class QuietProgress(Progress):
    """Nothing but warnings, on standard error."""

    def note(self, text: str) -> None:
        """Say it on standard error."""
        print(text, file=sys.stderr, flush=True)


class JsonProgress(Progress):
    """One JSON object a line, each with its `event`."""

    def __init__(self, out: TextIO | None = None) -> None:
        """Write to a stream; None for standard output."""
        self._out = out or sys.stdout

    def _emit(self, event: str, **values: object) -> None:
        print(json_text({"event": event, **values}), file=self._out, flush=True)

    def study_started(
        self, name: str, target: int, counts: Counts, best: BestTrial | None
    ) -> None:
        """Write `study_started`."""
        value = best.value if best else None
        self._emit("study_started", study=name, target=target, counts=counts, best=value)

    def note(self, text: str) -> None:
        """Write `note`."""
        self._emit("note", text=text)

    def trial_started(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int
    ) -> None:
        """Write `trial_started`."""
        self._emit("trial_started", trial=number, origin=origin, params=params, epochs=epochs)

    def epoch(self, number: int, metrics: EpochMetrics) -> None:
        """Write `epoch` with every figure."""
        self._emit("epoch", trial=number, **dataclasses.asdict(metrics))

    def trial_ended(
        self,
        number: int,
        state: str,
        value: float | None,
        reason: str | None,
        duration_s: float,
        score: float | None = None,
    ) -> None:
        """Write `trial_ended`."""
        self._emit(
            "trial_ended",
            trial=number,
            state=state,
            value=value,
            reason=reason,
            duration_s=duration_s,
            score=score,
        )


def choose_progress(*, is_quiet: bool = False, is_json: bool = False) -> Progress:
    """Choose what suits the flags and the terminal."""
    if is_json:
        return JsonProgress()
    if is_quiet:
        return QuietProgress()
    from study.terminal import LiveProgress, PlainProgress

    return LiveProgress() if sys.stdout.isatty() else PlainProgress()
