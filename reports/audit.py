"""What an audit of a search's pruner says: would a pruned trial have won?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports.fidelity import EarlyRank, early_rank_correlation
from reports.frames import best_number
from reports.intervals import Interval, wilson_interval
from reports.publish import Grid, number_words, signed
from reports.words import percent, plural
from study.read import read_epochs, read_trials
from study.rows import chosen_by
from study.store import Store, TrialRow

_SUFFIX = "-audit"
_FACTOR = "audit"


@dataclass(frozen=True, slots=True)
class Audited:
    """A pruned trial that was trained to the end.

    Attributes:
        number: Its number in the search.
        epochs: Epochs that it had when it was pruned.
        pruned_value: Validation accuracy of its best epoch then, a fraction.
        full_value: The same at the full budget; NaN where it failed.
        full_score: What that epoch is ranked by; NaN where it failed.
    """

    number: int
    epochs: int
    pruned_value: float
    full_value: float
    full_score: float


@dataclass(frozen=True, slots=True)
class Audit:
    """A search's pruner under audit.

    Attributes:
        name: The search.
        early: How early the final order shows, over finished trials.
        n_complete: Finished trials of the search.
        n_pruned: Pruned trials of the search.
        best: Validation accuracy of the search's best trial; None where none finished.
        best_score: What that trial is ranked by.
        chosen_by: What that is, in words.
        trials: Pruned trials that were trained to the end, by number.
    """

    name: str
    early: EarlyRank
    n_complete: int
    n_pruned: int
    best: float | None
    best_score: float | None
    chosen_by: str
    trials: tuple[Audited, ...]

    @property
    def n_won(self) -> int:
        """Count the audited trials that end above the search's best."""
        best = self.best_score
        return sum(best is not None and trial.full_score > best for trial in self.trials)

    @property
    def share_won(self) -> Interval | None:
        """Return the share that would have won, with its 95 % Wilson interval."""
        return wilson_interval(self.n_won, len(self.trials)) if self.trials else None

    @property
    def findings(self) -> list[str]:
        """Say it in sentences."""
        told = [f"{plural(self.n_pruned, 'trial')} of {self.n_pruned + self.n_complete} pruned."]
        share = self.share_won
        if share is not None and self.best is not None:
            ends = f"{100 * share.low:.0f} to {100 * share.high:.0f} %"
            told.append(
                f"Of {plural(len(self.trials), 'pruned trial')} trained to the end, {self.n_won} "
                f"would have been ranked above the best one ({percent(self.best)}) by "
                f"{self.chosen_by}: "
                f"{100 * share.estimate:.0f} % (95 % interval {ends})."
            )
            top = max(self.trials, key=lambda t: -1 if math.isnan(t.full_score) else t.full_score)
            told.append(
                f"The best of them by that, trial {top.number}, ends at {percent(top.full_value)}"
                f", {signed(100 * (top.full_value - self.best), 1)} points from the best."
            )
        return told


def read_audit(store: Store, name: str) -> Audit:
    """Read a search and, where there is one, its audit.

    Raises:
        StoreError: There is no such study.
    """
    trials, epochs = read_trials(store, name), read_epochs(store, name)
    number = best_number(trials)
    rows = {row.number: row for row in store.trials(store.study(name).id)}
    audits = store.find_study(name + _SUFFIX)
    audited = _audited(store.trials(audits.id), rows) if audits else []
    states = [row.state for row in rows.values()]
    return Audit(
        name,
        early_rank_correlation(epochs, trials),
        states.count("complete"),
        states.count("pruned"),
        None if number is None else rows[number].value,
        None if number is None else rows[number].ranked_by,
        chosen_by(store.study(name).config.get("train", {})),
        tuple(sorted(audited, key=lambda trial: trial.number)),
    )


def _audited(rows: Sequence[TrialRow], source: dict[int, TrialRow]) -> list[Audited]:
    found: dict[int, Audited] = {}
    for row in rows:
        is_done = row.state == "complete" or (row.reason or "").startswith("diverged")
        if row.factor != _FACTOR or not is_done or row.level is None:
            continue
        pruned = source.get(int(row.level))
        if pruned is not None:
            full = score = math.nan
            if row.state == "complete" and row.value is not None:
                full, score = row.value, row.ranked_by or 0.0
            value = math.nan if pruned.value is None else pruned.value
            found[pruned.number] = Audited(pruned.number, pruned.epochs_done, value, full, score)
    return list(found.values())


def rank_grid(audit: Audit) -> Grid:
    """Show how early the final order shows."""
    rows = []
    for found in audit.early.epochs:
        cells = []
        for told in (found.at_epoch, found.best_so_far):
            ends = f" [{number_words(told.low)}, {number_words(told.high)}]" if told else ""
            cells.append(f"{number_words(told.estimate)}{ends}" if told else "–")
        rows.append((str(found.epoch + 1), *cells, str(found.n), str(found.n_stopped)))
    note = (
        "Spearman’s rank correlation, with its 95 % interval, of what trials are ranked by. "
        + (audit.early.caveat or "")
    )
    header = ("Epoch", "At this epoch", "Best so far", "Finished trials", "Pruned here")
    title = "Rank correlation of early epochs with the last"
    return Grid("audit-ranks", title, header, tuple(rows), note=note.strip())


def audited_grid(audit: Audit) -> Grid:
    """Show the pruned trials that were trained to the end."""
    rows = []
    for trial in audit.trials:
        gap = "–"
        if audit.best is not None and math.isfinite(trial.full_value):
            gap = signed(100 * (trial.full_value - audit.best), 1)
        rows.append(
            (
                str(trial.number),
                str(trial.epochs),
                percent(trial.pruned_value),
                percent(trial.full_value) if math.isfinite(trial.full_value) else "failed",
                gap,
            )
        )
    header = ("Trial", "Epochs when pruned", "Accuracy then", "At the end", "Points from the best")
    note = "Validation accuracy, each with the seed of the pruned trial. A random sample."
    return Grid("audit-trials", "Pruned trials trained to the end", header, tuple(rows), note=note)
