"""What a user sees in a terminal while a study runs: a live table, or plain lines."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from study.config.formatting import format_accuracy, format_duration, format_params
from study.execution.progress import (
    COPY,
    Counts,
    DataProgress,
    EpochEnded,
    Event,
    Note,
    Progress,
    StudyStarted,
    TrialEnded,
    TrialStarted,
)

# Seconds between two lines about decoding where lines cannot be overwritten.
_DATA_EVERY_S = 10.0
_REFRESH_PER_S = 2.0


@dataclass(slots=True)
class _Running:
    """A trial under way."""

    started: TrialStarted
    done: int = 0
    accuracy: float | None = None
    best: float | None = None

    @property
    def settings(self) -> str:
        return format_params(self.started.params) or "as configured"


class _Board(Progress):
    """The state of a study as far as its events say."""

    def __init__(self) -> None:
        self.study = StudyStarted("", 0, Counts())
        self.counts = Counts()
        self.best: tuple[float, float] | None = None  # score, value
        self.begin = 0.0
        self.running: dict[int, _Running] = {}

    def emit(self, event: Event) -> None:
        """Take an event in."""
        match event:
            case StudyStarted():
                self.study, self.counts, self.begin = event, event.counts, time.monotonic()
                self._add(event.best, event.best_score)
            case TrialStarted():
                self.running[event.trial] = _Running(event)
            case EpochEnded(number, metrics):
                trial = self.running[number]
                trial.done, trial.accuracy = metrics.epoch + 1, metrics.val_acc
                if metrics.is_best:
                    trial.best = metrics.val_acc
            case TrialEnded():
                trial = self.running.pop(event.trial)
                if event.state != "stopped" and not trial.started.origin.startswith(COPY):
                    n = getattr(self.counts, event.state) + 1
                    self.counts = dataclasses.replace(self.counts, **{event.state: n})
                if event.state == "complete":
                    self._add(event.value, event.score)

    def _add(self, value: float | None, score: float | None) -> None:
        if value is not None:
            score = value if score is None else score
            if self.best is None or score > self.best[0]:
                self.best = score, value

    def summary(self) -> str:
        """Return the counts, the best accuracy, the pace and the time left, in one line."""
        counts, target, (score, value) = self.counts, self.study.target, self.best or (None, None)
        parts = [
            f"{counts.finished} of {target} trials",
            f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed",
            f"best {'' if score == value else 'by loss '}{format_accuracy(value)}",
        ]
        here = counts.finished - self.study.counts.finished
        if here > 0:
            each = (time.monotonic() - self.begin) / here
            left = max(0, target - counts.finished) * each
            parts.append(f"{3600 / max(each, 1e-9):.0f} trials/h")
            parts.append(f"about {format_duration(left)} left")
        return f"{self.study.study}: " + " · ".join(parts)


def _ended_line(event: TrialEnded) -> str:
    line = f"trial {event.trial:>3}  {event.state:<8}  {format_accuracy(event.value):>7}"
    line += f"  {format_duration(event.duration_s):>9}"
    return f"{line}  {event.reason}" if event.reason else line


class PlainProgress(_Board):
    """Lines for a log file or a pipe."""

    def __init__(self, out: TextIO | None = None) -> None:
        """Write to a stream; None for standard output."""
        super().__init__()
        self._out = out or sys.stdout
        self._data_shown_at = 0.0

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def emit(self, event: Event) -> None:
        """Print an event; decoding only every ten seconds."""
        super().emit(event)
        match event:
            case StudyStarted():
                self._print(f"study {self.summary()}")
            case Note(text):
                self._print(text)
            case DataProgress(done, total):
                now = time.monotonic()
                self._data_shown_at = self._data_shown_at or now
                if now - self._data_shown_at >= _DATA_EVERY_S:
                    self._data_shown_at = now
                    self._print(f"decoding images: {done} of {total}")
            case TrialStarted(number, origin):
                self._print(f"trial {number:>3}  {origin}: {self.running[number].settings}")
            case EpochEnded(number, metrics):
                trial = self.running[number]
                self._print(
                    f"trial {number:>3}  epoch {trial.done:>2}/{trial.started.epochs}"
                    f"  accuracy {format_accuracy(metrics.val_acc):>7}"
                    f"  loss {metrics.val_loss:.3f} (training {metrics.train_loss:.3f})"
                    f"  {metrics.images_per_s:.0f} images/s"
                )
            case TrialEnded():
                self._print(_ended_line(event))
                self._print(f"study {self.summary()}")


class LiveProgress(_Board):
    """A table of the running trials that is drawn over itself; ended trials scroll away above."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on a console; None for standard output."""
        super().__init__()
        self.console = console or Console()
        self._decoding: DataProgress | None = None
        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
        )

    def render(self) -> Group:
        """Return what the terminal shows now."""
        parts: list[Table | Text] = []
        if self._decoding:
            parts.append(Text(f"decoding images: {self._decoding.done} of {self._decoding.total}"))
        if self.running:
            parts.append(self._table())
        if self.study.study:
            parts.append(Text(self.summary(), style="bold"))
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "epoch", "accuracy", "best"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("from", no_wrap=True)
        table.add_column("settings")
        for number, trial in self.running.items():
            table.add_row(
                str(number),
                f"{trial.done}/{trial.started.epochs}",
                format_accuracy(trial.accuracy),
                format_accuracy(trial.best),
                Text(trial.started.origin),
                Text(trial.settings),
            )
        return table

    def emit(self, event: Event) -> None:
        """Change the table, or print above it."""
        match event:
            case Note(text):
                self.console.print(Text(text, style="yellow"))
            case DataProgress(done, total):
                self._decoding = event if done < total else None
                self._live.start()
            case StudyStarted():
                self._decoding = None
                self._live.start()
            case TrialEnded(number, state):
                trial = self.running.get(number)
                settings = format_params(trial.started.params) if trial else ""
                style = "red" if state == "failed" else ""
                self.console.print(Text(f"{_ended_line(event)}  {settings}".rstrip(), style=style))
        super().emit(event)

    def close(self) -> None:
        """Stop drawing."""
        self._live.stop()
