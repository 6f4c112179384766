"""What a user sees while a study runs: a live table, plain lines, JSON lines, or nothing."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.metrics import EpochMetrics
from study.space import ParamValue
from study.words import format_accuracy, format_duration, format_params, json_text

if TYPE_CHECKING:
    from study.rows import TrialRow

# Seconds between two lines about decoding where lines cannot be overwritten.
_PICTURES_EVERY_S = 10.0
_REFRESH_PER_S = 2.0


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
        paused: Stopped at a rung, to go on if they turn out good enough.
    """

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    cut_short: int = 0
    paused: int = 0

    @property
    def finished(self) -> int:
        """Return how many trials came to a stop of their own, as the study's target counts.

        A paused trial is counted when it stops first: going on with it is no new trial.
        """
        return self.complete + self.pruned + self.failed + self.paused - self.cut_short


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
    def of(cls, trial: "TrialRow") -> "BestTrial":
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

    def trial_continued(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int, done: int
    ) -> None:
        """Tell that a paused trial goes on after so many of its epochs."""

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

        It is `complete`, `pruned`, `failed` or `paused`; a paused trial may be told of again, as
        continued or as pruned.
        """

    def study_ended(self, outcome: Outcome) -> None:
        """Tell how the run ended."""

    def close(self) -> None:
        """Give the terminal back, also after an error."""


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

    def go_on(self, number: int, trial: _Running) -> None:
        self.counts = dataclasses.replace(self.counts, paused=self.counts.paused - 1)
        self.running[number] = trial

    def end(
        self,
        number: int,
        state: str,
        value: float | None,
        reason: str | None,
        score: float | None,
    ) -> _Running | None:
        counts = {state: getattr(self.counts, state) + 1}
        if number not in self.running:  # it was paused
            counts["paused"] = self.counts.paused - 1
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
            f"{counts.complete} complete, {counts.pruned} pruned, {counts.failed} failed"
            + (f", {counts.paused} paused" if counts.paused else ""),
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

    def trial_continued(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int, done: int
    ) -> None:
        """Say after which epoch."""
        self._board.go_on(number, _Running(origin, params, epochs, done))
        self._say(f"trial {number:>3}  goes on after epoch {done}")

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

    def trial_continued(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int, done: int
    ) -> None:
        """Add its row again."""
        self._board.go_on(number, _Running(origin, params, epochs, done))

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

    def trial_continued(
        self, number: int, origin: str, params: Mapping[str, ParamValue], epochs: int, done: int
    ) -> None:
        """Write `trial_continued`."""
        self._emit("trial_continued", trial=number, epochs=epochs, done=done)

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
    return LiveProgress() if sys.stdout.isatty() else PlainProgress()
