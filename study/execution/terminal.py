"""What a user sees in a terminal while a study runs: a live table, or plain lines."""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from study.config.formatting import format_accuracy, format_duration, format_params
from study.execution.progress import (
    Counts,
    DataProgress,
    EpochEnded,
    Event,
    Note,
    Progress,
    StudyEnded,
    StudyStarted,
    TrialEnded,
    TrialStarted,
)

# Seconds between two lines about decoding where lines cannot be overwritten.
_DATA_EVERY_S = 10.0
_REFRESH_PER_S = 2.0


@dataclass(slots=True)
class _Best:
    """The best accuracy so far, and the score it is the best by; of equals the first."""

    value: float | None = None
    score: float | None = None

    def add(self, value: float | None, score: float | None) -> None:
        score = value if score is None else score
        if score is not None and (self.score is None or score > self.score):
            self.value, self.score = value, score


@dataclass(slots=True)
class _Running:
    """A trial under way."""

    started: TrialStarted
    done: int = 0
    accuracy: float | None = None
    best: _Best = field(default_factory=_Best)

    @property
    def settings(self) -> str:
        return format_params(self.started.params) or "as configured"


@dataclass(slots=True)
class _Board:
    """The state of a study as far as its events say."""

    name: str = ""
    target: int = 0
    counts: Counts = Counts()
    best: _Best = field(default_factory=_Best)
    begin: float = 0.0
    finished_before: int = 0
    running: dict[int, _Running] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        match event:
            case StudyStarted():
                self.name, self.target = event.study, event.target
                self.best = _Best()
                self.best.add(event.best, event.best_score)
                self.counts = event.counts
                self.begin, self.finished_before = time.monotonic(), event.counts.finished
            case TrialStarted():
                self.running[event.trial] = _Running(event)
            case EpochEnded(number, metrics):
                trial = self.running[number]
                trial.done, trial.accuracy = metrics.epoch + 1, metrics.val_acc
                trial.best.add(metrics.val_acc, metrics.score)
            case TrialEnded():
                self.running.pop(event.trial, None)
                if event.state != "stopped":
                    n = getattr(self.counts, event.state) + 1
                    self.counts = dataclasses.replace(self.counts, **{event.state: n})
                if event.state == "complete":
                    self.best.add(event.value, event.score)

    def summary(self) -> str:
        """Return the counts, the best accuracy, the pace and the time left, in one line."""
        counts, best = self.counts, self.best
        by_loss = "by loss " if best.score != best.value else ""
        parts = [
            f"{counts.finished} of {self.target} trials",
            f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed",
            f"best {by_loss}{format_accuracy(best.value)}",
        ]
        here = counts.finished - self.finished_before
        if here > 0:
            each = (time.monotonic() - self.begin) / here
            left = max(0, self.target - counts.finished) * each
            parts.append(f"{3600 / max(each, 1e-9):.0f} trials/h")
            parts.append(f"about {format_duration(left)} left")
        return " · ".join(parts)


def _ended_line(event: TrialEnded) -> str:
    line = f"trial {event.trial:>3}  {event.state:<8}  {format_accuracy(event.value):>7}"
    line += f"  {format_duration(event.duration_s):>9}"
    return f"{line}  {event.reason}" if event.reason else line


class PlainProgress(Progress):
    """Lines for a log file or a pipe."""

    def __init__(self, out: TextIO | None = None) -> None:
        """Write to a stream; None for standard output."""
        self._out = out or sys.stdout
        self._board = _Board()
        self._data_shown_at = 0.0

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def emit(self, event: Event) -> None:
        """Print an event; decoding only every ten seconds."""
        self._board.add(event)
        match event:
            case StudyStarted():
                self._print(f"study {event.study}: {self._board.summary()}")
            case Note(text):
                self._print(text)
            case DataProgress(done, total):
                now = time.monotonic()
                self._data_shown_at = self._data_shown_at or now
                if now - self._data_shown_at >= _DATA_EVERY_S:
                    self._data_shown_at = now
                    self._print(f"decoding images: {done} of {total}")
            case TrialStarted(number, origin):
                self._print(f"trial {number:>3}  {origin}: {self._board.running[number].settings}")
            case EpochEnded(number, metrics):
                trial = self._board.running[number]
                self._print(
                    f"trial {number:>3}  epoch {trial.done:>2}/{trial.started.epochs}"
                    f"  accuracy {format_accuracy(metrics.val_acc):>7}"
                    f"  loss {metrics.val_loss:.3f} (training {metrics.train_loss:.3f})"
                    f"  {metrics.images_per_s:.0f} images/s"
                )
            case TrialEnded():
                self._print(_ended_line(event))
                self._print(f"study {self._board.name}: {self._board.summary()}")


class LiveProgress(Progress):
    """A table of the running trials that is drawn over itself; ended trials scroll away above."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on a console; None for standard output."""
        self.console = console or Console()
        self._board = _Board()
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
        if self._board.running:
            parts.append(self._table())
        if self._board.name:
            parts.append(Text(f"{self._board.name}: {self._board.summary()}", style="bold"))
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "epoch", "accuracy", "best"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("from", no_wrap=True)
        table.add_column("settings")
        for number, trial in self._board.running.items():
            table.add_row(
                str(number),
                f"{trial.done}/{trial.started.epochs}",
                format_accuracy(trial.accuracy),
                format_accuracy(trial.best.value),
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
                trial = self._board.running.get(number)
                settings = format_params(trial.started.params) if trial else ""
                style = "red" if state == "failed" else ""
                self.console.print(Text(f"{_ended_line(event)}  {settings}".rstrip(), style=style))
            case StudyEnded():
                self.close()
        self._board.add(event)

    def close(self) -> None:
        """Stop drawing."""
        self._live.stop()
