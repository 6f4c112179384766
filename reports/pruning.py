"""What pruning did: whether a pruned trial would have won."""

import math
from dataclasses import dataclass

from reports.intervals import Interval, wilson_interval
from reports.publish import Grid, signed
from reports.record import Audited, SearchRecord
from reports.words import percent, percent_range, plural


@dataclass(frozen=True, slots=True)
class Audit:
    """A search's pruner under audit.

    Attributes:
        best: Validation accuracy of the search's best trial; None where none finished.
        best_score: What that trial is ranked by.
        chosen_by: What that is, in words.
        trials: Pruned trials that were trained to the end, by number.
    """

    name: str
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
        """Say it in sentences; none where nothing was pruned."""
        if not self.n_pruned:
            return []
        sentences = [
            f"{plural(self.n_pruned, 'trial')} of {self.n_pruned + self.n_complete} pruned."
        ]
        share = self.share_won
        if share is not None and self.best is not None:
            sentences.append(
                f"Of {plural(len(self.trials), 'pruned trial')} trained to the end, {self.n_won} "
                f"would have been ranked above the best one ({percent(self.best)}) by "
                f"{self.chosen_by}: {percent(share.estimate, 0)} (95 % interval "
                f"{percent_range(share.low, share.high, 0)})."
            )
            top = max(self.trials, key=lambda t: -1 if math.isnan(t.full_score) else t.full_score)
            if math.isnan(top.full_value):
                return sentences  # all of them diverged
            sentences.append(
                f"The best of them by that, trial {top.number}, ends at {percent(top.full_value)}"
                f", {signed(100 * (top.full_value - self.best), 1)} points from the best."
            )
        return sentences


def audit_of(record: SearchRecord) -> Audit:
    """Say what a search's pruner did, and what its audit found."""
    states, best = record.trials["state"], record.best
    return Audit(
        record.study.name,
        int((states == "complete").sum()),
        int((states == "pruned").sum()),
        best.value if best else None,
        best.ranked_by if best else None,
        best.chosen_by if best else "",
        record.audited,
    )


def audited_grid(audit: Audit) -> Grid:
    """Show the pruned trials that were trained to the end."""
    rows = []
    for trial in audit.trials:
        is_known = math.isfinite(trial.full_value)
        gap = "–"
        if audit.best is not None and is_known:
            gap = signed(100 * (trial.full_value - audit.best), 1)
        full = percent(trial.full_value) if is_known else "failed"
        row = (str(trial.number), str(trial.epochs), percent(trial.pruned_value), full, gap)
        rows.append(row)
    header = ("Trial", "Epochs when pruned", "Accuracy then", "At the end", "Points from the best")
    note = "Validation accuracy, each with the seed of the pruned trial. A random sample."
    return Grid("audit-trials", "Pruned trials trained to the end", header, tuple(rows), note=note)
