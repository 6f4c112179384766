"""What a user sees in a terminal while a study runs: a live table, or plain lines."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.metrics import EpochMetrics
from study.config.formatting import format_accuracy, format_duration, format_params
from study.config.search_space import ParamValue
from study.progress import CUT_SHORT, BestTrial, Counts, Outcome, Progress

# Seconds between two lines about decoding where lines cannot be overwritten.
_PICTURES_EVERY_S = 10.0
_REFRESH_PER_S = 2.0


def _better(best: BestTrial | None, value: float, score: float | None) -> BestTrial:
    """Return the better of two; of equals the first."""
    score = value if score is None else score
    return BestTrial(value, score) if best is None or score > best.score else best


@dataclass(slots=True)
class _Running:
    """A trial under way."""

    origin: str
    params: Mapping[str, ParamValue]
    epochs: int
    done: int = 0
    accuracy: float | None = None
    best: BestTrial | None = None


@dataclass(slots=True)
class _Board:
    """The state of a study as it has been told so far."""

    name: str = ""
    target: int = 0
    counts: Counts = Counts()
    best: BestTrial | None = None
    begin: float = 0.0
    finished_before: int = 0
    running: dict[int, _Running] = field(default_factory=dict)

    def start(self, name: str, target: int, counts: Counts, best: BestTrial | None) -> None:
        self.name, self.target, self.best = name, target, best
        self.counts = dataclasses.replace(counts, running=0)
        self.begin, self.finished_before = time.monotonic(), counts.finished

    def add_epoch(self, number: int, metrics: EpochMetrics) -> _Running:
        trial = self.running[number]
        trial.done, trial.accuracy = metrics.epoch + 1, metrics.val_acc
        trial.best = _better(trial.best, metrics.val_acc, metrics.score)
        return trial

    def end(
        self,
        number: int,
        state: str,
        value: float | None,
        reason: str | None,
        score: float | None,
    ) -> _Running | None:
        counts = {state: getattr(self.counts, state) + 1}
        if reason in CUT_SHORT:
            counts["cut_short"] = self.counts.cut_short + 1
        self.counts = dataclasses.replace(self.counts, **counts)
        if state == "complete" and value is not None:
            self.best = _better(self.best, value, score)
        return self.running.pop(number, None)

    def _told_best(self) -> str:
        if self.best is None or self.best.score == self.best.value:
            return f"best {format_accuracy(self.best.value if self.best else None)}"
        return f"best by loss {format_accuracy(self.best.value)}"

    def summary(self) -> str:
        """Return the counts, the best accuracy, the pace and the time left, in one line."""
        counts = self.counts
        parts = [
            f"{counts.finished} of {self.target} trials",
            f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed",
            self._told_best(),
        ]
        here = counts.finished - self.finished_before
        if here > 0:
            each = (time.monotonic() - self.begin) / here
            left = max(0, self.target - counts.finished) * each
            parts.append(f"{3600 / max(each, 1e-9):.0f} trials/h")
            parts.append(f"about {format_duration(left)} left")
        return " · ".join(parts)


def _ended_line(
    number: int, state: str, value: float | None, reason: str | None, duration_s: float
) -> str:
    line = f"trial {number:>3}  {state:<8}  {format_accuracy(value):>7}"
    line += f"  {format_duration(duration_s):>9}"
    return f"{line}  {reason}" if reason else line


class PlainProgress(Progress):
    """Lines for a log file or a pipe."""

    def __init__(self, out: TextIO | None = None) -> None:
        """Write to a stream; None for standard output."""
        self._out = out or sys.stdout
        self._board = _Board()
        self._pictures_told = 0.0

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def study_started(
        self, name: str, target: int, counts: Counts, best: BestTrial | None
    ) -> None:
        """Say which study begins, and with what."""
        self._board.start(name, target, counts, best)
        self._say(f"study {name}: {self._board.summary()}")

    def note(self, text: str) -> None:
        """Say it."""
        self._say(text)

    def pictures(self, done: int, total: int) -> None:
        """Say it every ten seconds."""
        now = time.monotonic()
        self._pictures_told = self._pictures_told or now
        if now - self._pictures_told >= _PICTURES_EVERY_S:
            self._pictures_told = now
            self._say(f"decoding pictures: {done} of {total}")

    def trial_started(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int
    ) -> None:
        """Say the settings."""
        self._board.running[number] = _Running(origin, params, epochs)
        self._say(f"trial {number:>3}  {origin}: {format_params(params) or 'as configured'}")

    def epoch(self, number: int, metrics: EpochMetrics) -> None:
        """Say accuracy, validation loss, training loss and pace."""
        trial = self._board.add_epoch(number, metrics)
        self._say(
            f"trial {number:>3}  epoch {trial.done:>2}/{trial.epochs}"
            f"  accuracy {format_accuracy(metrics.val_acc):>7}"
            f"  loss {metrics.val_loss:.3f} (training {metrics.train_loss:.3f})"
            f"  {metrics.images_per_s:.0f} images/s"
        )

    def trial_ended(
        self,
        number: int,
        state: str,
        value: float | None,
        reason: str | None,
        duration_s: float,
        score: float | None = None,
    ) -> None:
        """Say how it ended, and where the study stands."""
        self._board.end(number, state, value, reason, score)
        self._say(_ended_line(number, state, value, reason, duration_s))
        self._say(f"study {self._board.name}: {self._board.summary()}")


class LiveProgress(Progress):
    """A table of the running trials that is drawn over itself; ended trials scroll away above."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on a console; None for standard output."""
        self.console = console or Console()
        self._board = _Board()
        self._decoding: tuple[int, int] | None = None
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
            done, total = self._decoding
            parts.append(Text(f"decoding pictures: {done} of {total}"))
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
                f"{trial.done}/{trial.epochs}",
                format_accuracy(trial.accuracy),
                format_accuracy(trial.best.value if trial.best else None),
                Text(trial.origin),
                Text(format_params(trial.params) or "as configured"),
            )
        return table

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(text, style=style or ""))

    def study_started(
        self, name: str, target: int, counts: Counts, best: BestTrial | None
    ) -> None:
        """Begin to draw."""
        self._decoding = None
        self._board.start(name, target, counts, best)
        self._live.start()

    def note(self, text: str) -> None:
        """Print it above the table."""
        self._print(text, "yellow")

    def pictures(self, done: int, total: int) -> None:
        """Draw a counter."""
        self._decoding = (done, total) if done < total else None
        self._live.start()

    def trial_started(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int
    ) -> None:
        """Add a row."""
        self._board.running[number] = _Running(origin, params, epochs)

    def epoch(self, number: int, metrics: EpochMetrics) -> None:
        """Change the row."""
        self._board.add_epoch(number, metrics)

    def trial_ended(
        self,
        number: int,
        state: str,
        value: float | None,
        reason: str | None,
        duration_s: float,
        score: float | None = None,
    ) -> None:
        """Move the row above the table."""
        trial = self._board.end(number, state, value, reason, score)
        settings = format_params(trial.params) if trial else ""
        line = _ended_line(number, state, value, reason, duration_s)
        self._print(f"{line}  {settings}".rstrip(), "red" if state == "failed" else None)

    def study_ended(self, outcome: Outcome) -> None:
        """Stop drawing."""
        self.close()

    def close(self) -> None:
        """Stop drawing."""
        self._live.stop()
