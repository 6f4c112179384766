"""What pruning did: how early the final order shows, and whether a pruned trial would have won."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr

from reports.intervals import Interval, wilson_interval
from reports.publish import Grid, number_words, signed
from reports.record import Audited, SearchRecord, read_record
from reports.trials import is_copy, rank_of
from reports.words import percent, plural
from study.record.record import Record

MIN_TRIALS = 8
"""Fewer trials give an interval that says nothing: assumption (at 8, a correlation of 0.7 cannot
be distinguished from none)."""


@dataclass(frozen=True, slots=True)
class EpochRank:
    """What one epoch says about the final accuracy.

    Attributes:
        epoch: From 1.
        best_so_far: Spearman's correlation of what trials are ranked by up to this epoch with what
            they are in the end, in [-1, 1], and its 95 % interval; None where all are equal.
        n: Finished trials that reached this epoch.
        n_stopped: Pruned trials that ended with this epoch.
    """

    epoch: int
    best_so_far: Interval | None
    n: int
    n_stopped: int


@dataclass(frozen=True, slots=True)
class EarlyRank:
    """How early the final order shows, and the trials that this rests on.

    Attributes:
        epochs: In order; only those that enough finished trials reached. Empty where `why_empty`
            says why.
        n_complete: Finished trials used.
        n_pruned: Pruned trials, which are in no correlation here.
        why_empty: One sentence, or None.
    """

    epochs: tuple[EpochRank, ...]
    n_complete: int
    n_pruned: int
    why_empty: str | None

    @property
    def caveat(self) -> str | None:
        """Say what the pruned trials leave unknown; None where none was pruned."""
        if self.n_pruned == 0:
            return None
        return (
            f"Over the {plural(self.n_complete, 'finished trial')} only: how "
            f"{plural(self.n_pruned, 'pruned trial')} would have ended is not known. Pruning "
            "removed those that were low early, so over all trials the correlation is likely "
            "higher."
        )


def early_rank_correlation(epochs: pd.DataFrame, trials: pd.DataFrame) -> EarlyRank:
    """Correlate what trials are ranked by at each epoch (`rank_of`) with its final value.

    Over finished trials, the only ones whose final value is known. Where a pruner was at work they
    are survivors, chosen by the very accuracy that is correlated here: the low early values are
    gone, the spread that is left is narrower, and a correlation over a narrower range is smaller
    (range restriction). So read it as a likely lower bound for all trials. It is no sure bound:
    the relation may be weaker among the pruned ones than among the survivors. Pruned trials are
    not imputed here: an imputed value follows the order at the epoch of pruning, and would put
    into the correlation what it asks about.

    The final value is the best of the trial, so that at the last epoch `best_so_far` is 1 by
    definition.

    Args:
        epochs: One row per trial and epoch.
        trials: One row per trial.

    References:
        Sackett and Yang 2000, https://doi.org/10.1037/0021-9010.85.1.112 (range restriction).
    """
    own = trials[~is_copy(trials)]
    finished = own[(own["state"] == "complete") & own["value"].notna()]
    final = rank_of(finished.set_index("number"), "value")
    pruned = own.loc[own["state"] == "pruned", "number"]
    seen = epochs.dropna(subset=["val_acc"]).sort_values(["number", "epoch"])
    seen = seen.assign(rank=rank_of(seen, "val_acc"))
    seen = seen.assign(best=seen.groupby("number")["rank"].cummax())
    stops = seen[seen["number"].isin(pruned)].groupby("number")["epoch"].max().value_counts()
    seen = seen[seen["number"].isin(final.index)]
    lengths = seen.groupby("number")["epoch"].transform("size")
    seen = seen[lengths > 1]  # of one epoch the first is the last
    ranks = []
    for epoch, rows in seen.groupby("epoch"):
        if len(rows) < MIN_TRIALS:
            continue
        known = final.loc[rows["number"]].tolist()
        best = spearman_interval(rows["best"].tolist(), known)
        number = int(str(epoch))
        ranks.append(EpochRank(number, best, len(rows), int(stops.get(number, 0))))
    why_empty = None
    if not ranks:
        n = seen["number"].nunique()
        why_empty = (
            f"The correlation needs at least {MIN_TRIALS} finished trials of several epochs; "
            f"this study has {n}."
        )
    return EarlyRank(tuple(ranks), len(final), len(pruned), why_empty)


def spearman_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> Interval | None:
    """Give Spearman's rank correlation with its interval; None where either does not vary.

    Fisher's z with the standard error sqrt((1 + r^2 / 2) / (n - 3)). A perfect correlation, whose
    z is infinite, is moved half way to the next one that n trials can show for the far end, and
    keeps itself as the near end. Coverage measured on 8000 pairs of normal variables, n = 5 to
    50, correlation 0.3 to 0.95: 94 % or more.

    Args:
        first: n values, at least 4.
        second: n values, paired with `first`.
        confidence: Share of such intervals that hold the true value.

    Raises:
        ValueError: There are fewer than 4 values.

    References:
        Bonett and Wright 2000, https://doi.org/10.1007/BF02294183.
    """
    n = len(first)
    if n < 4:
        raise ValueError(f"a correlation's interval needs at least 4 values, but got {n=}.")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    r = float(np.clip(spearmanr(first, second).statistic, -1.0, 1.0))
    edge = 1 - 6 / (n * (n * n - 1))
    inner = min(max(r, -edge), edge)
    reach = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((1 + inner**2 / 2) / (n - 3))
    z = math.atanh(inner)
    return Interval(r, min(math.tanh(z - reach), r), max(math.tanh(z + reach), r))


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
        sentences = [
            f"{plural(self.n_pruned, 'trial')} of {self.n_pruned + self.n_complete} pruned."
        ]
        share = self.share_won
        if share is not None and self.best is not None:
            ends = f"{100 * share.low:.0f} to {100 * share.high:.0f} %"
            sentences.append(
                f"Of {plural(len(self.trials), 'pruned trial')} trained to the end, {self.n_won} "
                f"would have been ranked above the best one ({percent(self.best)}) by "
                f"{self.chosen_by}: "
                f"{100 * share.estimate:.0f} % (95 % interval {ends})."
            )
            top = max(self.trials, key=lambda t: -1 if math.isnan(t.full_score) else t.full_score)
            sentences.append(
                f"The best of them by that, trial {top.number}, ends at {percent(top.full_value)}"
                f", {signed(100 * (top.full_value - self.best), 1)} points from the best."
            )
        return sentences


def read_audit(store: Record, name: str) -> Audit:
    """Read a search and, where there is one, its audit.

    Raises:
        RecordError: There is no such study.
    """
    return audit_of(read_record(store, name))


def audit_of(record: SearchRecord) -> Audit:
    """Say what a search's pruner did, and what its audit found."""
    states, best = record.trials["state"], record.best
    return Audit(
        record.study.name,
        early_rank_correlation(record.epochs, record.trials),
        int((states == "complete").sum()),
        int((states == "pruned").sum()),
        best.value if best else None,
        best.ranked_by if best else None,
        best.chosen_by if best else "",
        record.audited,
    )


def rank_grid(audit: Audit) -> Grid:
    """Show how early the final order shows."""
    rows = []
    for found in audit.early.epochs:
        rho = found.best_so_far
        ends = f" [{number_words(rho.low)}, {number_words(rho.high)}]" if rho else ""
        cell = f"{number_words(rho.estimate)}{ends}" if rho else "–"
        rows.append((str(found.epoch), cell, str(found.n), str(found.n_stopped)))
    note = (
        "Spearman’s rank correlation, with its 95 % interval, of what trials are ranked by. "
        + (audit.early.caveat or "")
    )
    header = ("Epoch", "Correlation", "Finished trials", "Pruned here")
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
