"""Which searched setting mattered, estimated from all trials, the pruned ones included.

Optuna's importance looks at completed trials only. A pruner stops the bad ones, so what is left
varies little in the setting that decides: the more a setting matters, the surer its bad values are
pruned, and the less important it looks. Here a pruned trial is given the final accuracy that its
record promises, and the same estimator (PED-ANOVA) sees every trial.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from reports.frames import PARAM_PREFIX, Dimension, accuracy_of_best, is_copy, is_diverged

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

MIN_TRIALS = 8
"""Fewer scored trials say nothing about importance: assumption; PED-ANOVA's documentation asks for
five among the best alone."""

# Shares of the trials that count as good, one after the other. Each stands for the accuracies
# between the middles to its neighbours; the best and the worst twentieth weigh nothing, so that
# one odd trial does not decide: assumption.
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_HALF_STEP = 0.05
# The best tenth (Optuna's default), but at least five (its documentation's advice), and never more
# than half of the trials (else "best" means nothing).
_TOP_SHARE, _MIN_TOP, _MAX_TOP_SHARE = 0.1, 5, 0.5


@dataclass(frozen=True, slots=True)
class FactorImportance:
    """How much one setting mattered.

    Attributes:
        name: The setting.
        share: Of the importances' sum over all settings, in [0, 1]; from all trials, over all
            levels of accuracy.
        low: Lower end of the 95 % bootstrap interval of `share`.
        high: Upper end.
        top_share: The same for being among the best only (PED-ANOVA's usual question).
        completed_only: Optuna's own figure, from completed trials; None where it has none.
    """

    name: str
    share: float
    low: float
    high: float
    top_share: float
    completed_only: float | None


@dataclass(frozen=True, slots=True)
class Importance:
    """Importance of every searched setting, and the trials that it rests on.

    Attributes:
        factors: Most important first; empty where `why_empty` says why.
        n_completed: Finished trials used.
        n_pruned: Pruned trials used, with an estimated final accuracy.
        n_diverged: Diverged trials used, as the worst.
        n_left_out: Trials without a score of their own: failed for other reasons, still running,
            or a copy of an equal one.
        n_top: Trials that count as the best in `top_share`.
        why_empty: One sentence, or None.
    """

    factors: tuple[FactorImportance, ...]
    n_completed: int
    n_pruned: int
    n_diverged: int
    n_left_out: int
    n_top: int
    why_empty: str | None


def estimate_final(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Give every trial that says something about its settings a final accuracy.

    A completed trial keeps its own. A pruned trial, last seen at epoch e with accuracy v at its
    best epoch so far, gets the isotonic (monotone least-squares) regression of the final accuracy
    on that accuracy at epoch e, over the trials that went further, read off at v. Those pruned
    later are estimated first and then serve as references for those pruned earlier, so order at a
    rung is kept. The estimate is never above the best final accuracy among references equal to it
    at that epoch, and never below v, which the trial did reach, unless that of a reference fell
    (as it may where the best epoch is chosen by loss). Worse than every reference, it
    stays worse by as much (parallel curves). Without references it keeps v. Diverged trials get
    the lowest score of all others. Left out are trials that failed for other reasons, which say
    nothing about their settings, and those not trained because an equal one had been.

    Args:
        trials: One row per trial.
        epochs: One row per trial and epoch.

    Returns:
        number, state (`complete`, `pruned`, `diverged`), score; in the order of `trials`.

    References:
        Barlow et al. 1972, Statistical Inference under Order Restrictions (isotonic regression);
        Li et al. 2018, https://arxiv.org/abs/1603.06560 (the ranks at a rung that pruning trusts).
    """
    trials = trials[~is_copy(trials)]
    best = _best_by_epoch(epochs)
    scores: dict[int, float] = {}
    finished = trials[(trials["state"] == "complete") & trials["value"].notna()]
    scores.update(
        zip(finished["number"].astype(int), finished["value"].astype(float), strict=True)
    )
    pruned = trials.loc[trials["state"] == "pruned", "number"].astype(int)
    last = best.loc[best.index.isin(pruned)].apply(lambda row: row.last_valid_index(), axis=1)
    for epoch in sorted(last.dropna().unique(), reverse=True):
        at_epoch = best[epoch].dropna()
        references = [n for n in at_epoch.index if n in scores]
        known = np.array([scores[n] for n in references])
        stopped = last.index[last == epoch]
        estimates = _map_to_final(
            at_epoch.loc[references].to_numpy(), known, at_epoch.loc[stopped].to_numpy()
        )
        scores.update(zip(stopped, estimates, strict=True))
    diverged = set(trials.loc[is_diverged(trials), "number"].astype(int))
    scores.update(dict.fromkeys(diverged, min(scores.values(), default=0.0)))
    frame = trials.loc[trials["number"].isin(list(scores)), ["number", "state"]]
    frame = frame.reset_index(drop=True)
    frame["state"] = frame["state"].mask(frame["number"].isin(list(diverged)), "diverged")
    frame["score"] = frame["number"].map(scores).astype(float)
    return frame


def _best_by_epoch(epochs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the best epoch so far, (trials, epochs); NaN from where a record ends."""
    ordered = epochs.sort_values(["number", "epoch"]).dropna(subset=["val_acc"])
    ordered = ordered.assign(best=accuracy_of_best(ordered))
    return ordered.pivot(index="number", columns="epoch", values="best").sort_index(axis=1)


def _map_to_final(at_epoch: FloatArray, final: FloatArray, values: FloatArray) -> FloatArray:
    """Map accuracies at an epoch to final ones by the references `at_epoch -> final`."""
    if len(at_epoch) == 0:
        return values
    knots, group = np.unique(at_epoch, return_inverse=True)
    counts = np.bincount(group)
    means = np.bincount(group, weights=final) / counts
    fitted = isotonic_regression(means, weights=counts).x
    # Pooling can lift a knot above what anyone at that knot reached; take that back, and keep
    # the map monotone.
    reached = np.full(len(knots), -np.inf)
    np.maximum.at(reached, group, final)
    fitted = np.minimum.accumulate(np.minimum(fitted, reached)[::-1])[::-1]
    mapped = np.interp(values, knots, fitted) - np.maximum(knots[0] - values, 0.0)
    if (final < at_epoch).any():  # chosen by loss, accuracy may fall
        return np.asarray(mapped, dtype=np.float64)
    return np.asarray(np.maximum(mapped, values), dtype=np.float64)


def estimate_importance(
    trials: pd.DataFrame,
    epochs: pd.DataFrame,
    dims: tuple[Dimension, ...],
    rng: np.random.Generator,
    n_resamples: int = 100,
) -> Importance:
    """Estimate how much each setting mattered for the accuracy, over all trials.

    PED-ANOVA with a threshold estimates the variance of "this trial is among the best p" that a
    setting explains alone, from where the best p lie and where all trials lie. Here that is
    summed over thresholds p, each weighed by the accuracy that lies between it and its
    neighbours: a first-order Cramer-von Mises index over accuracy. So it sees what makes a trial
    hopeless and what makes it excellent in proportion to the points at stake, and does not hang
    on one cut. The interval is a percentile bootstrap over trials (estimated accuracies are
    kept): it says what another search of the same kind could have shown.

    Args:
        trials: One row per trial.
        epochs: One row per trial and epoch.
        dims: The searched settings; those with a single value are passed over.
        rng: Source of the bootstrap draws.
        n_resamples: Bootstrap draws; 0 leaves the interval at the estimate.

    References:
        Watanabe et al. 2023, https://arxiv.org/abs/2304.10255 (PED-ANOVA);
        Gamboa et al. 2021, https://arxiv.org/abs/2002.04465 (indices integrated over thresholds);
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    scored = estimate_final(trials, epochs)
    counts = scored["state"].value_counts()
    n_top = _n_top(len(scored))
    varied = tuple(dim for dim in dims if not dim.is_single)
    why_empty = _why_empty(scored, varied)
    factors: tuple[FactorImportance, ...] = ()
    if why_empty is None:
        factors = _factors(scored, trials, varied, rng, n_resamples)
    return Importance(
        factors=factors,
        n_completed=int(counts.get("complete", 0)),
        n_pruned=int(counts.get("pruned", 0)),
        n_diverged=int(counts.get("diverged", 0)),
        n_left_out=len(trials) - len(scored),
        n_top=n_top,
        why_empty=why_empty,
    )


def _n_top(n: int) -> int:
    return int(min(np.ceil(_MAX_TOP_SHARE * n), max(_MIN_TOP, np.ceil(_TOP_SHARE * n))))


def _why_empty(scored: pd.DataFrame, varied: tuple[Dimension, ...]) -> str | None:
    if not varied:
        return "No setting was searched over more than one value."
    if len(scored) < MIN_TRIALS:
        return (
            f"Importance needs at least {MIN_TRIALS} trials with an accuracy; "
            f"this study has {len(scored)}."
        )
    if scored["score"].nunique() == 1:
        return "Every trial reached the same accuracy, so no setting made a difference."
    return None


def _factors(
    scored: pd.DataFrame,
    trials: pd.DataFrame,
    varied: tuple[Dimension, ...],
    rng: np.random.Generator,
    n_resamples: int,
) -> tuple[FactorImportance, ...]:
    frozen = _frozen_trials(scored, trials, varied)
    is_complete = (scored["state"] == "complete").to_list()
    completed = [trial for trial, is_kept in zip(frozen, is_complete, strict=True) if is_kept]
    names = [dim.name for dim in varied]
    shares = _shares(frozen, names)
    top = _shares(frozen, names, _n_top(len(frozen)) / len(frozen))
    own = _shares(completed, names, _TOP_SHARE) if len(completed) > 1 else {}
    draws = []
    for _ in range(n_resamples):
        picked = rng.integers(len(frozen), size=len(frozen))
        draws.append(_shares([frozen[i] for i in picked], names))
    factors = []
    for name in names:
        share = shares.get(name, 0.0)
        drawn = [draw[name] for draw in draws if name in draw] or [share]
        low, high = np.quantile(drawn, [0.025, 0.975])
        # A percentile interval need not hold the estimate; a reader expects that it does.
        low, high = min(float(low), share), max(float(high), share)
        factors.append(FactorImportance(name, share, low, high, top.get(name, 0.0), own.get(name)))
    return tuple(sorted(factors, key=lambda factor: -factor.share))


def _frozen_trials(
    scored: pd.DataFrame, trials: pd.DataFrame, varied: tuple[Dimension, ...]
) -> list["FrozenTrial"]:
    """One completed Optuna trial per scored trial, with the settings that it had."""
    from optuna.trial import create_trial

    distributions = {dim.name: _distribution(dim) for dim in varied}
    rows = trials.set_index("number")
    frozen = []
    for number, score in zip(scored["number"], scored["score"], strict=True):
        params = {}
        for dim in varied:
            try:
                params[dim.name] = dim.value(rows.at[number, PARAM_PREFIX + dim.name])
            except KeyError:
                continue
        own = {name: distributions[name] for name in params}
        frozen.append(create_trial(value=float(score), params=params, distributions=own))
    return frozen


def _distribution(dim: Dimension) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dim.choices:
        return CategoricalDistribution(dim.choices)
    if dim.is_int:
        return IntDistribution(int(dim.low), int(dim.high), log=dim.is_log)
    return FloatDistribution(dim.low, dim.high, log=dim.is_log)


def _shares(
    frozen: list["FrozenTrial"], names: list[str], threshold: float | None = None
) -> dict[str, float]:
    """Run PED-ANOVA and scale what the settings explain to a sum of 1; empty if all is 0.

    Args:
        frozen: The trials, all as completed ones.
        names: The settings.
        threshold: Share of the trials that count as good; None goes over all thresholds.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    weights = _weights(frozen) if threshold is None else {threshold: 1.0}
    # The study's direction says that higher is better; a `target` would be taken as a loss.
    study = _memory_study(frozen)
    totals = {name: 0.0 for name in names if any(name in trial.params for trial in frozen)}
    with warnings.catch_warnings():
        # Where the best and all trials are the same set, the threshold has nothing to tell.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)  # `normalize`
        for quantile, weight in weights.items():
            evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
            explained = get_param_importances(
                study, evaluator=evaluator, params=list(totals), normalize=False
            )
            for name, value in explained.items():
                totals[name] += weight * value
    total = sum(totals.values())
    return {name: value / total for name, value in totals.items()} if total > 0 else {}


def _weights(frozen: list["FrozenTrial"]) -> dict[float, float]:
    """Weigh each threshold by the accuracy between the middles to its neighbours."""
    values = np.array([trial.value for trial in frozen], dtype=float)
    middles = 1 - (_THRESHOLDS[0] - _HALF_STEP + 2 * _HALF_STEP * np.arange(len(_THRESHOLDS) + 1))
    gaps = -np.diff(np.quantile(values, np.clip(middles, 0, 1)))
    if not gaps.sum() > 0:  # all but a few are equal: then by rank
        gaps = np.ones(len(_THRESHOLDS))
    pairs = zip(_THRESHOLDS, gaps.tolist(), strict=True)
    return {threshold: gap for threshold, gap in pairs if gap > 0}


def _memory_study(frozen: list["FrozenTrial"]) -> "Study":
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(frozen)
    return study
