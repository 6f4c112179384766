"""What a user sees while a study runs: plain lines, or in a terminal lines that are redrawn."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from study.config.formatting import format_accuracy, format_duration, format_params
from study.execution.progress import (
    DataProgress,
    EpochEnded,
    Event,
    Note,
    Progress,
    StudyState,
    TrialEnded,
    TrialStarted,
)

# Seconds between two lines about decoding where lines cannot be overwritten.
_DATA_EVERY_S = 10.0
_REFRESH_PER_S = 2.0


class PlainProgress(Progress):
    """Lines for a log file or a pipe."""

    def __init__(self, out: TextIO | None = None) -> None:
        """Write to a stream; None for standard output."""
        self._out = out or sys.stdout
        self._data_shown_at = 0.0
        self._first: StudyState | None = None
        self._begin = time.monotonic()
        self._trial = TrialStarted(-1, "", {}, 0)

    def emit(self, event: Event) -> None:
        """Show an event; decoding only every ten seconds."""
        match event:
            case DataProgress(done, total):
                self._show_decoding(done, total)
            case Note(text):
                self._keep(text, style="yellow")
            case StudyState():
                if self._first is None:
                    self._first, self._begin = event, time.monotonic()
                self._show("study", self._summary(event, self._first))
            case TrialStarted(number, origin, params):
                self._trial = event
                settings = format_params(params) or "as configured"
                self._show("trial", f"trial {number:>3}  {origin}: {settings}")
                self._show("epoch", "")
            case EpochEnded(number, metrics):
                self._show(
                    "epoch",
                    f"trial {number:>3}  epoch {metrics.epoch:>2}/{self._trial.epochs}"
                    f"  accuracy {format_accuracy(metrics.val_acc):>7}"
                    f"  loss {metrics.val_loss:.3f} (training {metrics.train_loss:.3f})"
                    f"  {metrics.images_per_s:.0f} images/s",
                )
            case TrialEnded():
                self._end(event)

    def _end(self, event: TrialEnded) -> None:
        line = f"trial {event.trial:>3}  {event.state:<8}  {format_accuracy(event.value):>7}"
        line += f"  {format_duration(event.duration_s):>9}"
        line += f"  {event.reason}" if event.reason else ""
        self._show("trial", "")
        self._show("epoch", "")
        settings = format_params(self._trial.params)
        self._keep(line, settings, style="red" if event.state == "failed" else "")

    def _summary(self, now: StudyState, first: StudyState) -> str:
        """Return the counts, the best accuracy, the pace and the time left, in one line."""
        counts = now.counts
        parts = [
            f"{counts.finished} of {now.target} trials"
            if now.target
            else f"{counts.finished} trials",
            f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed",
            f"best {'' if now.best_score == now.best else 'by loss '}{format_accuracy(now.best)}",
        ]
        here = counts.finished - first.counts.finished
        if here > 0:
            each = (time.monotonic() - self._begin) / here
            parts.append(f"{3600 / max(each, 1e-9):.0f} trials/h")
            if now.target:
                left = max(0, now.target - counts.finished) * each
                parts.append(f"about {format_duration(left)} left")
        return f"study {now.study}: " + " · ".join(parts)

    def _show_decoding(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._data_shown_at = self._data_shown_at or now
        if now - self._data_shown_at >= _DATA_EVERY_S:
            self._data_shown_at = now
            self._show("data", f"decoding images: {done} of {total}")

    def _show(self, name: str, text: str) -> None:
        """Show what holds now, in place of what was shown by this name, where that can be."""
        if text:
            self._keep(text)

    def _keep(self, text: str, settings: str = "", *, style: str = "") -> None:
        """Show what stays on the screen; `settings` where they would scroll away with a trial."""
        print(text, file=self._out, flush=True)


class LiveProgress(PlainProgress):
    """The running trial and the study, drawn over themselves; ended trials scroll away above."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on a console; None for standard output."""
        super().__init__()
        self.console = console or Console()
        self._lines: dict[str, str] = {}
        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
        )

    def render(self) -> Text:
        """Return what the terminal shows now."""
        return Text(
            "\n".join(filter(None, map(self._lines.get, ("data", "trial", "epoch", "study"))))
        )

    def _show_decoding(self, done: int, total: int) -> None:
        self._show("data", f"decoding images: {done} of {total}" if done < total else "")

    def _show(self, name: str, text: str) -> None:
        self._lines[name] = text
        self._live.start()

    def _keep(self, text: str, settings: str = "", *, style: str = "") -> None:
        self.console.print(Text(f"{text}  {settings}".rstrip(), style=style))

    def close(self) -> None:
        """Stop drawing."""
        self._live.stop()
