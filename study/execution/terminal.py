"""What a user sees while a study runs: a line per trial, and in a terminal what runs now."""

import math
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from core.metrics import EpochMetrics
from study.config.formatting import describe_trial, format_accuracy, format_duration
from study.execution.progress import (
    DataProgress,
    EpochEnded,
    Event,
    Note,
    Progress,
    StepDone,
    StudyState,
    TrialEnded,
    TrialStarted,
)
from study.record.models import Counts

# Seconds between two lines about what still lasts, where lines cannot be overwritten.
_EVERY_S = 30.0
_REFRESH_PER_S = 2.0
_BAR = 24
_BEGINNING = "reading images, building networks"


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainProgress(Progress):
    """A line per trial, for a log file or a pipe; one that lasts has more."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._shown_at = self._begin = time.monotonic()
        self._state = StudyState("", None, Counts())
        self._first: StudyState | None = None
        self._trial = TrialStarted(-1, "", {}, 0)
        self._last: EpochMetrics | None = None
        self._epochs = 0.0

    def emit(self, event: Event) -> None:
        """Show an event."""
        match event:
            case DataProgress(done, total):
                self._show_running(f"decoding images: {done} of {total}")
            case Note(text):
                self._keep(text, "yellow")
            case StudyState():
                self._state, self._begin = event, time.monotonic() - event.spent_s
                if self._first is None:
                    self._first = event
                    self._keep(self._summary())
            case TrialStarted():
                self._trial, self._last, self._epochs = event, None, 0.0
            case StepDone(_, epochs):
                self._epochs = epochs
                self._show_running(self._running())
            case EpochEnded(_, metrics):
                self._last, self._epochs = metrics, metrics.epoch
                self._show_running(self._running())
            case TrialEnded():
                self._end(event)

    def _end(self, event: TrialEnded) -> None:
        what = describe_trial(self._trial.origin, self._trial.params)
        is_said = event.state == "complete" or (event.reason or "").startswith(event.state)
        state = "" if is_said else f"{event.state}  "
        reason = f"  ({event.reason})" if event.reason else ""
        figures = f"{format_accuracy(event.value):>7}  {format_duration(event.duration_s):>9}"
        style = "red" if event.state == "failed" else ""
        self._keep(f"trial {event.trial:>3}  {figures}  {state}{what}{reason}", style)

    def _running(self) -> str:
        """Return what the running trial does, in one line."""
        epoch, share = self._place()
        text = f"trial {self._trial.trial:>3}  epoch {epoch}/{self._trial.epochs}  {share:4.0%}"
        if last := self._last:
            text += f"  accuracy {format_accuracy(last.val_acc)}, loss {last.val_loss:.3f}"
            text += f", {last.images_per_s:.0f} images/s"
        return text

    def _place(self) -> tuple[int, float]:
        """Return the running trial's epoch, from 1, and the share of it that is done."""
        epoch = max(1, math.ceil(self._epochs))
        return epoch, self._epochs - epoch + 1

    def _summary(self) -> str:
        """Return time, counts, the best accuracy and what is left, in one line."""
        now, first = self._state, self._first or self._state
        counts, spent = now.counts, time.monotonic() - self._begin
        parts = [f"{clock(spent)} of {clock(now.time_s)}" if now.time_s else clock(spent)]
        of = f" of {now.target}" if now.target else ""
        parts.append(f"{counts.finished}{of} trials")
        parts += [
            f"{n} {state}" for state in ("pruned", "failed") if (n := getattr(counts, state))
        ]
        if now.best is not None:
            parts.append(f"best {format_accuracy(now.best)}")
        here = counts.finished - first.counts.finished
        if here > 0 and now.target:
            each = (spent - first.spent_s) / here
            left = max(0, now.target - counts.finished) * each
            parts.append(f"about {clock(left)} left")
        return f"study {now.study}  " + " · ".join(parts)

    def _show_running(self, text: str) -> None:
        """Show what lasts, now and then."""
        now = time.monotonic()
        if now - self._shown_at >= _EVERY_S:
            self._keep(f"{clock(now - self._begin)}  {text}")

    def _keep(self, text: str, style: str = "") -> None:
        """Show what stays on the screen."""
        self._shown_at = time.monotonic()
        print(text, file=self._out, flush=True)


class LiveProgress(PlainProgress):
    """The running trial and the study, drawn over themselves; ended trials scroll away above."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console()
        self._line = _BEGINNING
        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
        )

    def emit(self, event: Event) -> None:
        """Show an event."""
        self._live.start()
        super().emit(event)
        match event:
            case TrialStarted(number, origin, params):
                self._line = f"trial {number:>3}  {describe_trial(origin, params)}"
            case TrialEnded():
                self._line = ""
            case DataProgress(done, total) if done == total:
                self._line = _BEGINNING

    def render(self) -> Text:
        """Return what the terminal shows now."""
        lines = [self._line]
        if self._line and self._trial.epochs > 1:
            done = round(self._place()[1] * _BAR)
            lines.append(f"{'━' * done}{'─' * (_BAR - done)} {self._running()[11:]}")
        if self._state.study:
            lines.append(self._summary())
        width = max(1, self.console.width - 1)
        return Text("\n".join(line[:width] for line in lines if line))

    def _show_running(self, text: str) -> None:
        if self._trial.trial < 0:  # images are decoded before any trial
            self._line = text

    def _keep(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style))

    def close(self) -> None:
        """Stop drawing."""
        self._live.stop()
