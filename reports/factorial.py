"""Factorials: analysis of variance, main effects and interactions."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from reports.ablation import Ablation
from reports.effects import holm
from reports.intervals import Interval
from reports.paired import Array, paired_t, spread, t_interval

# Accuracies that differ by less differ by rounding.
_SMALL = 1e-12


@dataclass(frozen=True, slots=True)
class Source:
    """A line of an analysis of variance.

    Attributes:
        name: A factor, an interaction `a × b`, `replicate` or `residual`.
        df: Degrees of freedom.
        sum_of_squares: Type II, in squared accuracy.
        f: F statistic; NaN for the residual.
        p: Its p value; NaN for the residual.
        partial_eta_squared: Share of what the other sources leave over; NaN for the residual.
    """

    name: str
    df: int
    sum_of_squares: float
    f: float
    p: float
    partial_eta_squared: float


@dataclass(frozen=True, slots=True)
class Contrast:
    """Effect of a two-level factor, or of an interaction of two, in a factorial.

    Attributes:
        name: A factor, or `a × b`.
        low: Label of the baseline's level; empty for an interaction.
        high: Label of the other level.
        effect: Mean accuracy at the high level minus that at the low one, a fraction; for an
            interaction half the difference of the one factor's effect between the other's levels.
        n: Replicates, each of which gives one estimate.
        p: One-sample t-test over replicates; NaN with one.
        p_family: The same after Holm's correction over the design's contrasts.
    """

    name: str
    low: str
    high: str
    effect: Interval
    n: int
    p: float
    p_family: float


def score_matrix(ablation: Ablation) -> Array:
    """Return accuracies by cell and replicate, shape (cells, R); NaN where there is none."""
    return np.array([runs.arm.values for runs in ablation.runs])


def analyse_variance(ablation: Ablation) -> list[Source]:
    """Analyse a factorial's variance, with replicates (paired seeds) as blocks.

    Type II sums of squares; interactions of two factors where the design, and what is left of it,
    separates them. Runs that failed are left out, which the caller is to say.

    Returns:
        Factors, interactions, `replicate`, `residual`; empty where there are too few runs.

    References:
        Langsrud 2003, https://doi.org/10.1023/A:1023260610025 (type II).
    """
    names = [factor["name"] for factor in ablation.spec["factors"]]
    frame = _long_frame(ablation, names)
    terms = [f"C(x{k})" for k in range(len(names))]
    labels = dict(zip(terms, names, strict=True)) | {"C(replicate)": "replicate"}
    for a, b in itertools.combinations(terms, 2):
        labels[f"{a}:{b}"] = f"{labels[a]} × {labels[b]}"
    blocks = frame["replicate"].nunique() > 1
    wanted = [term for term in labels if term != "C(replicate)" or blocks]
    if len(frame) < 2 or any(frame[f"x{k}"].nunique() < 2 for k in range(len(names))):
        return []
    model = _fitted(frame, wanted)
    if model is None or model.df_resid < 1 or not model.ssr > _SMALL**2:
        return []
    return _sources(anova_lm(model, typ=2), labels)


def _fitted(frame: pd.DataFrame, terms: Sequence[str]) -> Any:
    """Fit what can be separated: no interactions where failed settings leave too few others."""
    for tried in (terms, [term for term in terms if ":" not in term]):
        model = ols(f"acc ~ {' + '.join(tried)}", frame)
        if np.linalg.matrix_rank(model.exog) == model.exog.shape[1]:
            return model.fit()
    return None


def _long_frame(ablation: Ablation, names: Sequence[str]) -> pd.DataFrame:
    rows = []
    for runs in ablation.runs:
        for replicate, value in enumerate(runs.arm.values):
            if math.isfinite(value):
                levels = {f"x{k}": runs.levels.get(name, "") for k, name in enumerate(names)}
                rows.append({**levels, "replicate": replicate, "acc": value})
    columns = [*(f"x{k}" for k in range(len(names))), "replicate", "acc"]
    return pd.DataFrame(rows, columns=columns)


def _sources(table: pd.DataFrame, labels: dict[str, str]) -> list[Source]:
    records = table.rename_axis("term").reset_index().to_dict("records")
    rows = {str(row["term"]): row for row in records}
    left, left_df = float(rows["Residual"]["sum_sq"]), float(rows["Residual"]["df"])
    found = []
    for term, name in labels.items():
        if term not in rows:
            continue
        ss, df = float(rows[term]["sum_sq"]), float(rows[term]["df"])
        f, p = float(rows[term]["F"]), float(rows[term]["PR(>F)"])
        found.append(Source(name, int(df), ss, f, p, ss / (ss + left)))
    nan = math.nan
    return [*found, Source("residual", int(left_df), left, nan, nan, nan)]


def estimate_contrasts(ablation: Ablation) -> list[Contrast]:
    """Estimate main effects and interactions of a factorial with two levels per factor.

    Each replicate gives one estimate of each contrast by least squares; Student's interval and the
    t-test are over replicates, so nothing is assumed of how single runs scatter. Replicates with a
    failed cell are left out.

    Returns:
        One contrast per factor, then interactions; empty where a factor has more than two levels,
        or nothing is complete.
    """
    factors = ablation.spec["factors"]
    if any(len(f["levels"]) != 1 for f in factors):
        return []
    scores = score_matrix(ablation)
    scores = scores[:, np.isfinite(scores).all(axis=0)]  # (cells, complete replicates)
    if not scores.shape[1]:
        return []
    coded = 2 * np.array(ablation.spec["coded"], dtype=float) - 1  # (cells, factors), -1 and 1
    columns = [coded[:, k] for k in range(len(factors))]
    names = [(f["name"], f["baseline"], f["levels"][0]["label"]) for f in factors]
    for a, b in itertools.combinations(range(len(factors)), 2):
        columns.append(coded[:, a] * coded[:, b])
        names.append((f"{names[a][0]} × {names[b][0]}", "", ""))
    design = np.column_stack([np.ones(len(coded)), *columns])
    fitted = np.linalg.lstsq(design, scores, rcond=None)[0]
    slopes: Array = np.asarray(fitted[1:], dtype=np.float64)  # (contrasts, R)
    # An effect is a mean over cells, so that of N roundings only 2 / sqrt(N) is left in it.
    return _judged(names, 2 * slopes, 2 * ablation.rules.resolution / math.sqrt(len(coded)))


def _judged(
    names: Sequence[tuple[str, str, str]], estimates: Array, resolution: float
) -> list[Contrast]:
    seen = [spread(row, resolution) for row in estimates]
    found = [
        Contrast(*name, t_interval(each), each.n, paired_t(each), math.nan)
        for name, each in zip(names, seen, strict=True)
    ]
    if not all(math.isfinite(c.p) for c in found):
        return found
    corrected = holm([c.p for c in found])
    return [replace(c, p_family=p) for c, p in zip(found, corrected, strict=True)]


def interaction_means(ablation: Ablation, a: str, b: str) -> pd.DataFrame:
    """Return mean accuracy by the levels of two factors: rows a, columns b; all else averaged."""
    factors = {factor["name"]: factor for factor in ablation.spec["factors"]}
    rows = [
        {
            a: runs.levels.get(a, factors[a]["baseline"]),
            b: runs.levels.get(b, factors[b]["baseline"]),
            "acc": float(np.nanmean(runs.arm.values)),
        }
        for runs in ablation.runs
        if np.isfinite(runs.arm.values).any()
    ]
    frame = pd.DataFrame(rows, columns=[a, b, "acc"])
    table = frame.groupby([a, b], sort=False)["acc"].mean().unstack(b)
    return table.reindex(index=_order(factors[a]), columns=_order(factors[b]))


def _order(factor: dict[str, object]) -> list[str]:
    levels = factor["levels"]
    assert isinstance(levels, list)
    return [str(factor["baseline"]), *(str(level["label"]) for level in levels)]


def main_effect_means(ablation: Ablation, name: str) -> list[tuple[str, Interval]]:
    """Return each level's accuracy with Student's interval over replicates; all else averaged."""
    factor = next(f for f in ablation.spec["factors"] if f["name"] == name)
    found = []
    for label in _order(factor):
        cells = [
            r.arm.values for r in ablation.runs if r.levels.get(name, factor["baseline"]) == label
        ]
        if not cells:
            continue
        scores = np.array(cells)
        whole = scores[:, np.isfinite(scores).all(axis=0)].mean(axis=0)  # (replicates,)
        if len(whole):
            found.append((label, t_interval(spread(whole))))
    return found
