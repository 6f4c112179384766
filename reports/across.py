"""Several ablations of one kind on several data sets: one table, ranks, critical difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import pandas as pd

from reports.ablation import Ablation, Runs
from reports.figures import Drawing, Plan, drawn
from reports.publish import Grid, number_words, p_words, plus_minus
from reports.rank_plots import diagram_size, plot_critical_difference
from reports.ranks import RankComparison, RankMethod, compare_ranks
from reports.style import style
from reports.words import plural


@dataclass(frozen=True, slots=True)
class Across:
    """What several data sets say together.

    Attributes:
        findings: Sentences.
        grids: The table over data sets, and the pairs that differ.
        drawings: The critical-difference diagram.
        comparison: Ranks and tests; None where they cannot be compared.
    """

    findings: tuple[str, ...]
    grids: tuple[Grid, ...]
    drawings: tuple[Drawing, ...]
    comparison: RankComparison | None


def score_frame(ablations: Sequence[Ablation]) -> pd.DataFrame:
    """Return mean accuracies: a row a data set, a column an arm that all of them have.

    NaN where a run of the arm failed.
    """
    shared = [
        runs.arm.label
        for runs in ablations[0].runs
        if all(any(r.arm.label == runs.arm.label for r in a.runs) for a in ablations)
    ]
    rows = {
        name: {label: _mean(_runs(ablation, label)) for label in shared}
        for name, ablation in zip(data_names(ablations), ablations, strict=True)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=shared)


def data_names(ablations: Sequence[Ablation]) -> list[str]:
    """Name each ablation's data set; the study's name where two would be alike."""
    sources = [str(a.study.data.get("source", "")).removeprefix("folder:") for a in ablations]
    names = [PurePath(source).name or source for source in sources]
    return names if len(set(names)) == len(names) else [a.study.name for a in ablations]


def _runs(ablation: Ablation, label: str) -> Runs:
    return next(runs for runs in ablation.runs if runs.arm.label == label)


def _mean(runs: Runs) -> float:
    done = runs.arm.values[np.isfinite(runs.arm.values)]
    return math.nan if runs.arm.n_failed or not len(done) else float(done.mean())


def compare_across(ablations: Sequence[Ablation], method: RankMethod = "nemenyi") -> Across:
    """Compare the arms that several ablations share, data set by data set.

    Args:
        ablations: Of one design on different data sets; at least two.
        method: How pairs of arms are tested.
    """
    scores = score_frame(ablations)
    if len(scores.columns) < 2:
        text = "The ablations share fewer than two levels, so nothing can be compared across them."
        return Across((text,), (), (), None)
    comparison = compare_ranks(scores, method=method)
    table = _table(ablations, comparison)
    plan = Plan(
        "across-ranks",
        "Critical-difference diagram",
        "Mean ranks over data sets, the best at the left; a bar joins arms that cannot be told "
        "apart (Demšar 2006).",
        lambda ax: plot_critical_difference(comparison, ax),
        size=_size(comparison),
        with_pdf=True,
    )
    return Across(tuple(_findings(comparison)), (table,), (drawn(plan),), comparison)


def _size(comparison: RankComparison) -> tuple[float, float]:
    with style():
        return diagram_size(comparison, 4.6)


def _findings(comparison: RankComparison) -> list[str]:
    distinct = [pair for pair in comparison.pairs if pair.is_distinct]
    found = []
    if comparison.friedman is not None:
        found.append(
            f"Friedman’s test over {comparison.n_datasets} data sets and "
            f"{plural(len(comparison.arms), 'arm')}: p = {p_words(comparison.friedman.p_value)}."
        )
    told = "; ".join(f"{pair.first} ranks above {pair.second}" for pair in distinct[:10])
    more = f" and {len(distinct) - 10} more" if len(distinct) > 10 else ""
    found.append(
        f"Told apart over all data sets: {told}{more}."
        if distinct
        else "No two arms can be told apart over these data sets."
    )
    return [*found, *comparison.notes]


def _table(ablations: Sequence[Ablation], comparison: RankComparison) -> Grid:
    names = data_names(ablations)
    rows = []
    for arm in comparison.arms:
        cells = []
        for ablation in ablations:
            runs = _runs(ablation, arm.name)
            failed = f" ({runs.arm.n_failed} failed)" if runs.arm.n_failed else ""
            cells.append(f"{plus_minus(runs.arm.accuracy)}{failed}")
        rows.append((arm.name, *cells, number_words(arm.mean_rank, 2)))
    how = (
        f"Nemenyi’s critical difference at {comparison.alpha:g}: "
        f"{number_words(comparison.critical_difference or math.nan, 2)}"
        if comparison.method == "nemenyi"
        else f"Wilcoxon’s exact signed-rank test with Holm’s correction at {comparison.alpha:g}"
    )
    replicates = " / ".join(str(ablation.replicates) for ablation in ablations)
    dates = max(ablation.design.updated_at for ablation in ablations)
    note = (
        "Mean validation accuracy in per cent ± half-width of the 95 % t interval over seeds "
        f"(replicates: {replicates}); rows by mean rank, 1 is best. {how} (Demšar 2006). "
        f"Studies: {', '.join(a.study.name for a in ablations)}. {dates:%Y-%m-%d}."
    )
    header = ("Level", *names, "Mean rank")
    return Grid("across", "Levels across data sets", header, tuple(rows), note=note)
