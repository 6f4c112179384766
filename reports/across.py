"""Several ablations of one design on several datasets: one table, mean ranks, Friedman's test."""

import math
from collections.abc import Sequence

import pandas as pd
from scipy.stats import friedmanchisquare

from reports.ablation import Ablation, Runs
from reports.methods import dataset_name
from reports.publish import Grid, mean_words, p_words
from reports.words import plural


def score_frame(ablations: Sequence[Ablation]) -> pd.DataFrame:
    """Return mean accuracies: one row per dataset, one column per level that all of them have.

    NaN where a run of the level failed.
    """
    cells = [_by_label(ablation) for ablation in ablations]
    shared = [label for label in cells[0] if all(label in each for each in cells)]
    rows = {
        name: {label: math.nan if each[label].n_failed else each[label].mean for label in shared}
        for name, each in zip(dataset_names(ablations), cells, strict=True)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=shared)


def dataset_names(ablations: Sequence[Ablation]) -> list[str]:
    """Name each ablation's dataset; the study's name where two would be equal."""
    names = [dataset_name(ablation) for ablation in ablations]
    return names if len(set(names)) == len(names) else [a.study.name for a in ablations]


def _by_label(ablation: Ablation) -> dict[str, Runs]:
    return {runs.label: runs for runs in ablation.runs}


def compare_across(ablations: Sequence[Ablation]) -> tuple[str, Grid | None]:
    """Compare the levels that several ablations share, dataset by dataset.

    Ranks are per dataset, 1 for the highest mean accuracy; equal means share a rank, and a level
    with a failed run ranks last.

    Args:
        ablations: Of one design on different datasets; at least two.

    Returns:
        A sentence, and a table unless fewer than two levels are shared.

    References:
        Demšar 2006, https://www.jmlr.org/papers/v7/demsar06a.html (mean ranks, Friedman's test).
    """
    scores = score_frame(ablations)
    if len(scores.columns) < 2:
        text = "The ablations share fewer than two levels, so nothing can be compared across them."
        return text, None
    ranks = scores.rank(axis=1, ascending=False, na_option="bottom")
    return _finding(ranks), _table(ablations, ranks.mean().sort_values())


def _finding(ranks: pd.DataFrame) -> str:
    n_datasets, n_levels = ranks.shape
    over = f"{plural(n_datasets, 'dataset')} and {plural(n_levels, 'level')}"
    if n_levels < 3:
        return f"Mean ranks over {over}; Friedman’s test needs three levels or more."
    if (ranks.nunique(axis=1) == 1).all():
        return f"Every level ranks equal over {over}."
    found = friedmanchisquare(*(ranks[label] for label in ranks))
    return (
        f"Friedman’s test over {over}: p = {p_words(float(found.pvalue))} (approximate, and rough "
        "below about ten datasets; it compares ranks, so a gain of any size counts alike)."
    )


def _table(ablations: Sequence[Ablation], mean_ranks: "pd.Series[float]") -> Grid:
    rows = []
    for label, rank in mean_ranks.items():
        cells = []
        for ablation in ablations:
            runs = _by_label(ablation)[str(label)]
            failed = f" ({runs.n_failed} failed)" if runs.n_failed else ""
            cells.append(f"{mean_words(runs.accuracies['val'])}{failed}")
        rows.append((str(label), *cells, f"{rank:.2f}"))
    replicates = " / ".join(str(ablation.replicates) for ablation in ablations)
    date = max(ablation.design.updated_at for ablation in ablations)
    note = (
        "Mean validation accuracy in per cent ± SD over replicates "
        f"({replicates}); rows by mean rank, 1 is best (Demšar 2006). "
        f"Studies: {', '.join(a.study.name for a in ablations)}. {date:%Y-%m-%d}."
    )
    header = ("Level", *dataset_names(ablations), "Mean rank")
    return Grid("across", "Levels across datasets", header, tuple(rows), note=note)
