"""Several arms compared over several data sets by their ranks, after Demšar 2006."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import f as f_distribution
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from reports.effects import holm

RankMethod = Literal["nemenyi", "wilcoxon-holm"]
Floats = NDArray[np.float64]

# Means over replicates that differ by less than this are equal: rounding makes no ranks.
_DECIMALS = 12
# Data sets up to which the tests over all arms are rough: Demšar 2006, section 3.2.2. By 800
# simulated tables Iman and Davenport's 5 % are 19 % for three arms on 3, 7 % on 8.
_N_ROUGH = 10


@dataclass(frozen=True, slots=True)
class ArmRank:
    """One arm's place among the arms.

    Attributes:
        name: Of the arm.
        mean_rank: Over the data sets, 1 = best; equal scores share the mean of their ranks.
        n_failed: Data sets on which it failed and took the worst rank.
    """

    name: str
    mean_rank: float
    n_failed: int


@dataclass(frozen=True, slots=True)
class RankTest:
    """A test that all arms are equal.

    Attributes:
        statistic: Friedman's chi-square with correction for ties, or Iman and Davenport's F;
            infinite where all data sets rank the arms in the same way.
        p_value: Of the statistic.
    """

    statistic: float
    p_value: float


@dataclass(frozen=True, slots=True)
class ArmPair:
    """Two arms, the one of the better mean rank first.

    Attributes:
        first: Name.
        second: Name.
        rank_difference: Mean rank of the second minus that of the first, never negative.
        p_value: Corrected for the number of arms or of pairs.
        is_distinct: The two are told apart: `p_value` is at most alpha.
    """

    first: str
    second: str
    rank_difference: float
    p_value: float
    is_distinct: bool


@dataclass(frozen=True, slots=True)
class RankComparison:
    """Arms ranked over data sets, and which of them can be told apart.

    Attributes:
        arms: Best mean rank first.
        friedman: Friedman's test; None for two arms.
        iman_davenport: The same as an F test, which is less timid; None for two arms.
        critical_difference: Of mean ranks, after Nemenyi; None for `wilcoxon-holm`.
        pairs: All pairs of arms, in the order of the arms.
        cliques: Maximal groups of arms not told apart; each pair not told apart is in one or
            more. Runs of neighbours by rank after Nemenyi; after Wilcoxon with gaps, perhaps.
        n_datasets: Data sets that were ranked.
        alpha: Share of false positives allowed over all pairs together.
        method: How pairs were tested; with two arms always `wilcoxon-holm`.
        notes: What the numbers cannot say, a sentence each.
    """

    arms: tuple[ArmRank, ...]
    friedman: RankTest | None
    iman_davenport: RankTest | None
    critical_difference: float | None
    pairs: tuple[ArmPair, ...]
    cliques: tuple[tuple[str, ...], ...]
    n_datasets: int
    alpha: float
    method: RankMethod
    notes: tuple[str, ...]


def compare_ranks(
    scores: pd.DataFrame, *, alpha: float = 0.05, method: RankMethod = "nemenyi"
) -> RankComparison:
    """Rank arms on each data set and test which arms differ.

    An arm that failed on a data set takes the worst rank there; where several failed, they share
    the mean of the worst ranks. To Wilcoxon's test a failure is the largest loss there is.
    Nemenyi's mean ranks, and so what it tells apart, depend on which other arms take part;
    Wilcoxon's p before Holm's correction does not (Benavoli et al. 2016).

    Args:
        scores: Mean accuracy, a row a data set, a column an arm; fraction in [0, 1], NaN where
            the arm failed. Data sets count as independent.
        alpha: Share of false positives allowed over all pairs together.
        method: `nemenyi` by mean ranks, or `wilcoxon-holm` by exact signed ranks of each pair.
            Two arms are always compared by Wilcoxon's test.

    Raises:
        ValueError: Fewer than two arms or two data sets; names twice; scores outside [0, 1];
            alpha outside (0, 1); unknown method.

    References:
        https://jmlr.org/papers/v7/demsar06a.html, https://jmlr.org/papers/v17/benavoli16a.html.
    """
    _check(scores, alpha, method)
    finished = scores.dropna(how="all")
    values = finished.to_numpy(float, na_value=np.nan).round(_DECIMALS)  # (N, k)
    n_datasets, n_arms = values.shape
    ranks = rankdata(-np.nan_to_num(values, nan=-1.0), axis=1)
    order = np.argsort(ranks.mean(axis=0), kind="stable")
    values, ranks = values[:, order], ranks[:, order]
    method = method if n_arms > 2 else "wilcoxon-holm"
    columns = zip(finished.columns[order], ranks.T, values.T, strict=True)
    arms = [ArmRank(str(c), float(r.mean()), int(np.isnan(v).sum())) for c, r, v in columns]
    p_values = _nemenyi(arms, n_datasets) if method == "nemenyi" else _wilcoxon_holm(values)
    pairs = [
        ArmPair(a.name, b.name, b.mean_rank - a.mean_rank, p, p <= alpha)
        for (a, b), p in zip(combinations(arms, 2), p_values, strict=True)
    ]
    friedman, iman_davenport = _all_equal(ranks) if n_arms > 2 else (None, None)
    comparison = RankComparison(
        arms=tuple(arms),
        friedman=friedman,
        iman_davenport=iman_davenport,
        critical_difference=_critical(n_arms, n_datasets, alpha) if method == "nemenyi" else None,
        pairs=tuple(pairs),
        cliques=tuple(_cliques([arm.name for arm in arms], pairs)),
        n_datasets=n_datasets,
        alpha=alpha,
        method=method,
        notes=(),
    )
    notes = _notes(comparison, n_empty=len(scores) - n_datasets)
    return replace(comparison, notes=tuple(notes))


def _check(scores: pd.DataFrame, alpha: float, method: str) -> None:
    """Refuse what cannot be ranked."""
    if method not in get_args(RankMethod):
        raise ValueError(f"method must be one of {get_args(RankMethod)}, but got {method=}.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be above 0 and below 1, but got {alpha=}.")
    n_arms, n_datasets = scores.shape[1], len(scores.dropna(how="all"))
    if n_arms < 2:
        raise ValueError(f"Ranks need two arms or more, but got {n_arms=}: add columns.")
    if n_datasets < 2:
        raise ValueError(f"Ranks need two data sets or more, but got {n_datasets=}: run on more.")
    for kind, names in (("arm", scores.columns), ("data set", scores.index)):
        if len(twice := names[names.astype(str).duplicated()]):
            raise ValueError(f"Each {kind} must be there once; average {str(twice[0])!r} first.")
    values = scores.to_numpy(float, na_value=np.nan)
    wrong = values[~np.isnan(values) & ~((values >= 0) & (values <= 1))]
    if wrong.size:
        raise ValueError(f"Scores must be in [0, 1] or NaN, but got {wrong[0]:g}: give fractions.")


def _all_equal(ranks: Floats) -> tuple[RankTest, RankTest]:
    """Test all arms at once after Friedman, and after Iman and Davenport; ranks are (N, k)."""
    n_datasets, n_arms = ranks.shape
    if (ranks == ranks[:, :1]).all():  # scipy divides zero by zero there
        return RankTest(0.0, 1.0), RankTest(0.0, 1.0)
    told = friedmanchisquare(*ranks.T)
    friedman = RankTest(float(told.statistic), float(told.pvalue))
    if (ranks == ranks[0]).all():
        # p is the chance that all follow the first (Conover 1999, Nonparametric Statistics, 5.8).
        ties = np.unique(ranks[0], return_counts=True)[1].tolist()
        n_orders = math.factorial(n_arms) // math.prod(map(math.factorial, ties))
        return friedman, RankTest(math.inf, float(n_orders) ** (1 - n_datasets))
    freedom = n_arms - 1, (n_arms - 1) * (n_datasets - 1)
    f = (n_datasets - 1) * told.statistic / (n_datasets * freedom[0] - told.statistic)
    return friedman, RankTest(float(f), float(f_distribution.sf(f, *freedom)))


def _critical(n_arms: int, n_datasets: int, alpha: float) -> float:
    """Return the difference of mean ranks from which on Nemenyi tells two arms apart."""
    q = float(studentized_range.ppf(1 - alpha, n_arms, math.inf))
    return q * math.sqrt(n_arms * (n_arms + 1) / (12 * n_datasets))


def _nemenyi(arms: Sequence[ArmRank], n_datasets: int) -> list[float]:
    """Return a p for each pair of arms, in the order of `itertools.combinations`."""
    unit = math.sqrt(len(arms) * (len(arms) + 1) / (12 * n_datasets))
    gaps = [(b.mean_rank - a.mean_rank) / unit for a, b in combinations(arms, 2)]
    p_values = studentized_range.sf(gaps, len(arms), math.inf)
    return [float(p) for p in np.clip(p_values, 0, 1)]


def _wilcoxon_holm(values: Floats) -> list[float]:
    """Return a p for each pair of columns, in the order of `itertools.combinations`.

    Values have shape (N, k); NaN loses to every number by the most, and ties with NaN.
    """
    lowest = np.where(np.isnan(values), -np.inf, values)
    p_values = []
    for first, second in combinations(lowest.T, 2):
        with np.errstate(invalid="ignore"):
            differences = np.nan_to_num(first - second, nan=0.0, posinf=2.0, neginf=-2.0)
        p_values.append(signed_rank_p(differences))
    return holm(p_values)


def signed_rank_p(differences: Floats) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test, exact with ties too.

    Zeros are left out, as Wilcoxon did. The p counts all ways to set the signs; scipy's
    `method="exact"` counts as if there were no ties, and accuracies on few pictures tie often.

    Args:
        differences: One a data set; those equal to 12 decimals are tied.
    """
    rounded = np.round(differences, _DECIMALS)
    rounded = rounded[rounded != 0]
    doubled = np.rint(2 * rankdata(np.abs(rounded))).astype(int)  # whole, also with ties
    chances = np.ones(1)  # of each sum of the positive ranks, doubled
    for rank in doubled.tolist():
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    n_lower = int(min(doubled[rounded > 0].sum(), doubled[rounded < 0].sum()))
    return min(1.0, 2 * float(chances[: n_lower + 1].sum()))


def _cliques(names: Sequence[str], pairs: Sequence[ArmPair]) -> list[tuple[str, ...]]:
    """Widen each pair not told apart, and not yet in a group, as far as it goes."""
    equal = {frozenset((pair.first, pair.second)) for pair in pairs if not pair.is_distinct}
    places = {name: i for i, name in enumerate(names)}
    covered: set[frozenset[str]] = set()
    groups: list[list[str]] = []
    # The widest pair first, which leaves few groups to be drawn after Wilcoxon.
    for pair in sorted(pairs, key=lambda pair: places[pair.first] - places[pair.second]):
        group = [pair.first, pair.second]
        if frozenset(group) not in equal - covered:
            continue
        for name in names:
            if name not in group and all(frozenset((name, other)) in equal for other in group):
                group.append(name)
        covered |= {frozenset(two) for two in combinations(group, 2)}
        groups.append(sorted(group, key=places.__getitem__))
    return [tuple(group) for group in sorted(groups, key=lambda group: places[group[0]])]


def _notes(comparison: RankComparison, n_empty: int) -> Iterator[str]:
    """Say what the numbers cannot: a sentence each."""
    n, told = comparison.n_datasets, comparison.iman_davenport
    failed = [f"{arm.name} on {arm.n_failed}" for arm in comparison.arms if arm.n_failed]
    if failed:
        yield f"Failed, and ranked worst there: {', '.join(failed)} of {n} data sets."
    if n_empty:
        yield f"Data sets left out, since no arm finished there: {n_empty}."
    if told is None:
        yield "Friedman's and Nemenyi's tests need three arms; two are compared by Wilcoxon's."
    elif n <= _N_ROUGH:
        yield f"With {n} data sets the p values over all arms are rough and may be too small."
    yield from _limits(comparison)
    n_distinct = sum(pair.is_distinct for pair in comparison.pairs)
    if told is not None and (told.p_value <= comparison.alpha) != (n_distinct > 0):
        p = f"Iman and Davenport's p over all arms is {told.p_value:.2g}"
        yield f"{p}, yet the pairs told apart are {n_distinct}: only more data sets settle it."


def _limits(comparison: RankComparison) -> Iterator[str]:
    """Say so where no scores whatsoever on so few data sets could tell a pair apart."""
    n, alpha, critical = comparison.n_datasets, comparison.alpha, comparison.critical_difference
    n_arms, n_pairs = len(comparison.arms), len(comparison.pairs)
    needed = 1
    if critical is not None:
        needed = math.ceil((_critical(n_arms, 1, alpha) / (n_arms - 1)) ** 2)
        why = f"the critical difference, {critical:.2f}, exceeds the range of ranks, {n_arms - 1}"
    else:
        while n_pairs * 2.0 ** (1 - needed) > alpha:
            needed += 1
        why = f"the exact Wilcoxon p cannot go below {2.0 ** (1 - n):.2g}, too much for " + (
            f"Holm's {alpha:g} over {n_pairs} pairs" if n_pairs > 1 else f"{alpha:g}"
        )
    if n < needed:
        yield f"With {n} data sets {why}: no pair can be told apart before there are {needed}."
