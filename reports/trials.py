"""What a search's trials say together: final accuracies of the pruned ones, and importances."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.isotonic import IsotonicRegression

from study.record.models import UNFINISHED

Array = np.ndarray[Any, np.dtype[np.float64]]

MIN_TRIALS = 8
"""Fewer trials with an accuracy say nothing about importance. Assumption."""
# Trees of the forest; points of the space, and values of each setting, at which it is asked.
_TREES, _POINTS, _GRID = 64, 128, 10
MOST_FITTED = 1_000
"""Of more trials so many are drawn for the forest. Assumption."""
_RESAMPLES = 39  # the ends of so many hold another one in 95 % of cases


def is_copy(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Say which trials were not trained, because one with equal settings and seed had been."""
    return trials["origin"].astype(str).str.startswith("same as")


def count_states(trials: pd.DataFrame) -> str:
    """Say how many trials ended how."""
    counts = trials["state"].value_counts()
    names = ("complete", "pruned", "failed", *UNFINISHED)
    parts = [f"{counts[state]} {state}" for state in names if counts.get(state)]
    return ", ".join(parts) or "no trials yet"


def rank_of(frame: pd.DataFrame, accuracy: str) -> "pd.Series[float]":
    """Give what trials or epochs are ranked by: the score, or the accuracy where there is none."""
    return frame["score"].astype(float).fillna(frame[accuracy].astype(float))


def final_accuracies(trials: pd.DataFrame, epochs: pd.DataFrame) -> "pd.Series[float]":
    """Give every trial that says something about its settings a final accuracy.

    A completed trial keeps its own. A pruned trial gets the isotonic (monotone) regression of the
    final accuracy on the accuracy of the best epoch so far, at the epoch after which it stopped,
    over the trials that went further; those pruned later are estimated first and serve those
    pruned earlier, so the order at an epoch is kept. A trial worse than all of them stays worse by
    as much. Diverged trials get the lowest of all. Left out are trials that failed for other
    reasons, and those not trained because an equal one had been.

    Returns:
        Accuracies in [0, 1] by trial number.

    References:
        Barlow et al. 1972, Statistical Inference under Order Restrictions;
        Li et al. 2018, https://arxiv.org/abs/1603.06560 (the order at a rung that pruning trusts).
    """
    own = trials[~is_copy(trials)].set_index("number")
    finished = own[own["state"] == "complete"]["value"].dropna().astype(float)
    found: dict[Any, float] = finished.to_dict()
    ordered = epochs.sort_values(["number", "epoch"]).dropna(subset=["val_acc"])
    ordered = ordered.assign(best=_accuracy_of_best(ordered))
    n_epochs = ordered.groupby("number")["epoch"].max()
    best = ordered.pivot(index="number", columns="epoch", values="best")
    pruned = best.loc[best.index.isin(own.index[own["state"] == "pruned"])]
    last = pruned.apply(lambda row: row.last_valid_index(), axis=1)
    for epoch in sorted(last.unique(), reverse=True):
        at_epoch = best[epoch].dropna()
        is_longer = n_epochs[at_epoch.index] > epoch  # a solved head has but one
        known = at_epoch[at_epoch.index.isin(list(found)) & is_longer]
        stopped = at_epoch.loc[last.index[last == epoch]]
        estimates = stopped.to_numpy()
        if len(known):
            final = np.array([found[number] for number in known.index])
            fit = IsotonicRegression(out_of_bounds="clip").fit(known.to_numpy(), final)
            below = np.maximum(known.min() - estimates, 0.0)
            estimates = np.maximum(fit.predict(estimates) - below, 0.0)
        found.update(zip(stopped.index, estimates.tolist(), strict=True))
    reasons = own["reason"].fillna("").astype(str)
    diverged = own.index[(own["state"] == "failed") & reasons.str.startswith("diverged")]
    found.update(dict.fromkeys(diverged, min(found.values(), default=0.0)))
    return pd.Series(found, dtype=float).sort_index()


def _accuracy_of_best(epochs: pd.DataFrame) -> "pd.Series[float]":
    """Give, at each epoch, the accuracy of its trial's best epoch so far."""
    numbers, ranks = epochs["number"], rank_of(epochs, "val_acc")
    before = ranks.groupby(numbers).cummax().groupby(numbers).shift()
    is_new = ~(ranks <= before)  # the first has none before it
    return epochs["val_acc"].astype(float).where(is_new).groupby(numbers).ffill()


def as_optuna_study(
    trials: Sequence[FrozenTrial], final: "pd.Series[float]"
) -> "optuna.study.Study":
    """Copy a study in memory, with pruned trials complete at their estimated final accuracy.

    Optuna's plots leave pruned trials out, and so the settings that a pruner stopped.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        create_trial(
            value=float(final[trial.number]),
            params=trial.params,
            distributions=trial.distributions,
        )
        for trial in trials
        if trial.number in final.index
    )
    return study


def dimensions(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Return the searched settings with the distributions that they were last drawn from."""
    return {name: own for trial in trials for name, own in trial.distributions.items()}


def varied(trials: Sequence[FrozenTrial]) -> list[str]:
    """List the settings of which trials had more than one value."""
    seen: defaultdict[str, set[Any]] = defaultdict(set)
    for trial in trials:
        for name, value in trial.params.items():
            seen[name].add(value)
    return [name for name, values in seen.items() if len(values) > 1]


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each setting mattered, and the trials that this rests on.

    Attributes:
        shares: Setting, share of the importance (0 to 1), and the ends of its 95 % bootstrap
            interval, the most important first; empty where `why_empty` says why.
        counts: Trials used by how they ended: `complete`, `pruned`, `failed` (diverged).
        why_empty: A sentence, or None.
    """

    shares: pd.DataFrame
    counts: Mapping[str, int]
    why_empty: str | None = None


def importances(
    trials: Sequence[FrozenTrial],
    final: "pd.Series[float]",
    planned: Collection[int] = (),
) -> Importance:
    """Estimate how much each setting mattered for the final accuracy.

    The variance of each setting's main effect over the whole space (functional analysis of
    variance), as a forest of extremely randomised trees predicts it from all trials, the pruned
    ones included, whose settings a sampler drew: those whose settings a plan chose are left out,
    by their numbers in `planned`. The interval is a bootstrap over trials (estimated
    accuracies are kept).

    References:
        Hutter et al. 2014, https://proceedings.mlr.press/v32/hutter14.html;
        Geurts et al. 2006, https://doi.org/10.1007/s10994-006-6226-1 (the forest).
    """
    used = [t for t in trials if t.number in final.index and t.number not in planned]
    counts = Counter(
        "failed" if t.state is TrialState.FAIL else t.state.name.lower() for t in used
    )
    names = [name for name in varied(used) if all(name in trial.params for trial in used)]
    empty = pd.DataFrame(columns=["setting", "share", "low", "high"])
    if planned and len(used) < MIN_TRIALS:
        why = (
            "The plan chose these settings, so that they do not vary independently. Nothing can "
            "be concluded here about single settings; study ablate compares them."
        )
    elif len(used) < MIN_TRIALS:
        why = (
            f"This needs at least {MIN_TRIALS} complete, pruned or diverged trials, but has "
            f"{len(used)}."
        )
    elif not names:
        why = "No setting had more than one value."
    elif final[[trial.number for trial in used]].nunique() == 1:
        why = "All trials reached the same accuracy."
    else:
        return Importance(_shares(used, final, names), counts)
    return Importance(empty, counts, why)


def _shares(
    trials: Sequence[FrozenTrial], final: "pd.Series[float]", names: Sequence[str]
) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    if len(trials) > MOST_FITTED:
        kept = np.sort(rng.choice(len(trials), MOST_FITTED, replace=False))
        trials = [trials[i] for i in kept]
    known = dimensions(trials)
    dims = [known[name] for name in names]
    x = np.array(
        [[_place(trial.params[n], dim) for n, dim in zip(names, dims, strict=True)]
         for trial in trials]
    )  # fmt: skip
    y = np.array([final[trial.number] for trial in trials], dtype=np.float64)
    share = _main_effects(x, y, dims, 0)
    draws = []
    for seed in range(1, _RESAMPLES + 1):
        rows = rng.integers(len(y), size=len(y))
        draws.append(_main_effects(x[rows], y[rows], dims, seed))
    low, high = np.min(draws, axis=0), np.max(draws, axis=0)
    frame = pd.DataFrame(
        {
            "setting": names,
            "share": share,
            # A percentile interval need not hold the estimate; a reader expects that it does.
            "low": np.minimum(low, share),
            "high": np.maximum(high, share),
        }
    )
    return frame.sort_values("share", ascending=False, ignore_index=True)


def _place(value: Any, dim: BaseDistribution) -> float:
    """Return where a value lies in its range, 0 to 1; of a choice its number."""
    if isinstance(dim, CategoricalDistribution):
        return float(dim.choices.index(value))
    low, high = vars(dim)["low"], vars(dim)["high"]
    if vars(dim)["log"]:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low or 1.0))


def _main_effects(x: Array, y: Array, dims: Sequence[BaseDistribution], seed: int) -> Array:
    """Return each setting's share of the variance that a forest sees over the whole space, (D,).

    `x` are the places of the trials, (N, D), and `y` their final accuracies, (N,).
    """
    rng = np.random.default_rng(seed)
    sizes = [len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in dims]
    points = rng.random((_POINTS, len(dims)))
    points = np.where(np.array(sizes) > 0, np.floor(points * np.maximum(sizes, 1)), points)
    forest = ExtraTreesRegressor(_TREES, random_state=seed).fit(_columns(x, sizes), y)
    found = np.zeros(len(dims))
    for k, size in enumerate(sizes):
        grid = np.arange(size) if size else (np.arange(_GRID) + 0.5) / _GRID
        asked = np.repeat(points[None], len(grid), axis=0)
        asked[:, :, k] = grid[:, None]
        seen = forest.predict(_columns(asked.reshape(-1, len(dims)), sizes))
        found[k] = seen.reshape(len(grid), -1).mean(axis=1).var()
    return np.asarray(found / max(float(found.sum()), 1e-12), dtype=np.float64)


def _columns(x: Array, sizes: Sequence[int]) -> Array:
    """Give each choice a column of its own."""
    columns = [
        x[:, [k]] if size == 0 else x[:, [k]] == np.arange(size) for k, size in enumerate(sizes)
    ]
    return np.concatenate(columns, axis=1).astype(np.float64)
