"""A model of the accuracy over the searched settings: what each does on average, and at the best.

Pruned trials enter with the final accuracy that their record promises, diverged ones with the
lowest of all others, as in `reports.importance`. Trials that failed for other reasons, copies and
trials that lack one of the settings (the space was changed on the way) are left out.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular

from reports.fidelity import spearman_interval
from reports.frames import PARAM_PREFIX, Dimension, ParamValue, best_number
from reports.importance import estimate_final
from reports.intervals import Interval
from reports.words import plural

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

MIN_TRIALS, MIN_TRIALS_PER_SETTING = 20, 4
"""Fewer scored trials, in all or for each setting, are refused: assumption. Above that it is the
cross-validated correlation that says whether to trust the model."""
TRUSTED_FROM = 0.5
"""Rank correlation from which the predicted order is worth reading: assumption."""

_REACH = 0.05  # share of a (logarithmic) range that counts as near: assumption
_N_FOLDS = 5
# Costs grow with the cube of the trials. So many fit the kernel and are held out in turn; a
# resample is no larger than the second; a draw averages over no more than the third: assumptions.
_MAX_FITTED, _MAX_RESAMPLE, _MAX_AVERAGED = 300, 1000, 64


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """A fitted model and what it was fitted to.

    Attributes:
        dims: The D settings searched over more than one value.
        numbers: The N trials used.
        states: Each one's: `complete`, `pruned` or `diverged`.
        inputs: Their settings, (N, C): ranges on [0, 1], in the logarithm where searched so; one
            column for each choice.
        scores: Final accuracy, known or estimated, (N,), fraction in [0, 1].
        best: Number of the best trial used; None where there is none.
        kernel: Of the Gaussian process, fitted; None where `why_empty` says why.
        rank_correlation: Spearman's, of the scores with their predictions when held out, and its
            95 % interval; None where one of them does not vary, or `why_empty` says why.
            Scores of pruned trials are estimates themselves.
        why_empty: One sentence, or None.
    """

    dims: tuple[Dimension, ...]
    numbers: tuple[int, ...]
    states: tuple[str, ...]
    inputs: FloatArray
    scores: FloatArray
    best: int | None
    kernel: Any
    rank_correlation: Interval | None
    why_empty: str | None

    @property
    def is_trusted(self) -> bool:
        """Whether it orders trials that it has not seen well enough to be read."""
        told = self.rank_correlation
        return told is not None and told.low > 0 and told.estimate >= TRUSTED_FROM


@dataclass(frozen=True, slots=True)
class PartialDependence:
    """Predicted accuracy over one setting, averaged over the others as the trials had them.

    Attributes:
        dimension: The setting.
        values: G values of it: all choices, or from the range's low to its high end.
        mean: Predicted accuracy, G fractions in [0, 1].
        low: Lower end of the 95 % band, at each value by itself.
        high: Upper end.
        n_near: Trials with this value, or within a twentieth of the range from it. Where there
            are none, only the model's smoothness holds the band: do not trust it there.
    """

    dimension: Dimension
    values: tuple[ParamValue, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n_near: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalFactor:
    """How much one setting decides around the best trial.

    Attributes:
        name: The setting.
        share: Variance of the prediction along it, over the sum of these over all settings; in
            [0, 1].
        low: Lower end of the 95 % interval of `share`.
        high: Upper end.
        span: Highest less lowest predicted accuracy along it, a fraction.
    """

    name: str
    share: float
    low: float
    high: float
    span: float


def fit_surrogate(
    trials: pd.DataFrame,
    epochs: pd.DataFrame,
    dims: tuple[Dimension, ...],
    rng: np.random.Generator,
) -> Surrogate:
    """Fit a Gaussian process (Matern 3/2, a length for each column) to all scored trials.

    Measured against extremely randomised trees, on planted functions of five settings, smooth and
    with a cliff, 40 and 120 trials: 0.3 to 0.6 of their error along the setting that
    decides. The final accuracies of pruned trials are estimated from all trials before folds are
    dealt, so that held-out scores are not wholly unseen.

    Args:
        trials: One row per trial.
        epochs: One row per trial and epoch.
        dims: The searched settings; those with a single value are passed over.
        rng: Deals the folds.

    References:
        Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, chapters 2 and 5.
    """
    dims = tuple(dim for dim in dims if not dim.is_single)
    known = _inputs(dims, trials)
    scored = estimate_final(trials, epochs)
    scored = scored[scored["number"].isin(list(known))]
    numbers, scores = scored["number"].tolist(), scored["score"].to_numpy(dtype=np.float64)
    inputs = np.array([known[number] for number in numbers], dtype=np.float64)
    why_empty = _why_empty(scores, dims)
    kernel, told = None, None
    if why_empty is None:
        rows = rng.permutation(len(scores))[:_MAX_FITTED]
        with _one_thread():
            kernel = _process(inputs[rows], scores[rows]).kernel_
            told = spearman_interval(_held_out(inputs[rows], scores[rows]), scores[rows].tolist())
    return Surrogate(
        dims=dims,
        numbers=tuple(numbers),
        states=tuple(scored["state"]),
        inputs=inputs,
        scores=scores,
        best=best_number(trials[trials["number"].isin(numbers)]),
        kernel=kernel,
        rank_correlation=told,
        why_empty=why_empty,
    )


def partial_dependence(
    surrogate: Surrogate, rng: np.random.Generator, n_resamples: int = 100, n_points: int = 25
) -> tuple[PartialDependence, ...]:
    """Predict the accuracy over each setting, averaged over the trials' other settings.

    The average is over where the search went, not over the whole space. A draw of the band is a
    resample of the trials, the process given it, and a sample of what that process leaves open;
    so the band widens where trials are few, and says what another search of the same kind could
    have shown. The kernel and the accuracies estimated for pruned trials are kept. Coverage
    measured on the functions of `fit_surrogate`, smooth and with the cliff, 12 seeds each: 83 and
    93 % with 24 trials, 92 and 91 % with 40, 93 and 98 % with 120.

    Args:
        surrogate: From `fit_surrogate`.
        rng: Source of the draws.
        n_resamples: Draws; 0 leaves the band at the mean.
        n_points: Values of a range, of whole numbers at most so many.

    Returns:
        One for each of the surrogate's settings; none where its `why_empty` says why.

    References:
        Friedman 2001, https://doi.org/10.1214/aos/1013203451 (partial dependence);
        Moosbauer et al. 2021, https://arxiv.org/abs/2111.04820 (its uncertainty in a search).
    """
    if surrogate.why_empty is not None:
        return ()
    grids = [_grid(dim, n_points) for dim in surrogate.dims]
    draws: list[list[FloatArray]] = [[] for _ in grids]
    with _one_thread():
        processes = _processes(surrogate, rng, n_resamples)
        whole, rows = next(processes)
        means = [_averaged(surrogate, whole, rows, d, g)[0] for d, g in enumerate(grids)]
        for process, rows in processes:
            for d, grid in enumerate(grids):
                mean, std = _averaged(surrogate, process, rows, d, grid, _MAX_AVERAGED)
                draws[d].append(mean + std * rng.standard_normal())
    told = []
    for d, (dim, grid) in enumerate(zip(surrogate.dims, grids, strict=True)):
        band = np.clip([means[d], *_band(means[d], draws[d])], 0.0, 1.0)
        mean_, low, high = map(tuple, band.tolist())
        told.append(PartialDependence(dim, grid, mean_, low, high, _n_near(surrogate, d, grid)))
    return tuple(told)


def local_importance(
    surrogate: Surrogate, rng: np.random.Generator, n_resamples: int = 100, n_points: int = 25
) -> tuple[LocalFactor, ...]:
    """Say what decides around the best trial: one setting varied, the others held at its values.

    The interval is from draws made as in `partial_dependence`.

    Args:
        surrogate: From `fit_surrogate`.
        rng: Source of the draws.
        n_resamples: Draws; 0 leaves the interval at the estimate.
        n_points: Values of a range, of whole numbers at most so many.

    Returns:
        Most important first; none where the surrogate's `why_empty` says why.

    References:
        Biedenkapp et al. 2018, https://doi.org/10.1007/978-3-030-05348-2_10 (LPI).
    """
    if surrogate.why_empty is not None:
        return ()
    assert surrogate.best is not None, "accuracies differ, so a trial has its own"
    best = surrogate.inputs[[surrogate.numbers.index(surrogate.best)]]
    grids = [_grid(dim, n_points) for dim in surrogate.dims]
    points = np.vstack([_moved(surrogate, best, d, grid)[:, 0] for d, grid in enumerate(grids)])
    cuts = np.cumsum([len(grid) for grid in grids])[:-1]
    draws = []
    with _one_thread():
        processes = _processes(surrogate, rng, n_resamples)
        lines = np.split(next(processes)[0].predict(points), cuts)
        for process, rows in processes:
            mean, covariance = process.predict(points, return_cov=True)
            noise = process.kernel_.k2.noise_level * surrogate.scores[rows].var()
            values, vectors = np.linalg.eigh(covariance - noise * np.eye(len(points)))
            z = rng.standard_normal(len(points)) * np.sqrt(np.maximum(values, 0.0))
            draws.append(_shares(np.split(mean + vectors @ z, cuts)))
    share = _shares(lines)
    spans = [np.ptp(line) for line in lines]
    names = [dim.name for dim in surrogate.dims]
    columns = zip(names, share, *_band(share, draws), spans, strict=True)
    factors = [LocalFactor(name, *map(float, row)) for name, *row in columns]
    return tuple(sorted(factors, key=lambda factor: -factor.share))


def _why_empty(scores: FloatArray, dims: tuple[Dimension, ...]) -> str | None:
    if not dims:
        return "No setting was searched over more than one value."
    n_needed = max(MIN_TRIALS, MIN_TRIALS_PER_SETTING * len(dims))
    if len(scores) < n_needed:
        return (
            f"A model of {plural(len(dims), 'setting')} needs at least {n_needed} trials with an "
            f"accuracy and every setting; this study has {len(scores)}."
        )
    if np.ptp(scores) == 0:
        return "Every trial reached the same accuracy, so no setting made a difference."
    return None


def _inputs(dims: tuple[Dimension, ...], trials: pd.DataFrame) -> dict[int, FloatArray]:
    """What the model sees of each trial that has every setting, (C,)."""
    known = {}
    for trial in trials.to_dict("records"):
        with contextlib.suppress(KeyError):
            settings = [_columns(dim, [dim.value(trial[PARAM_PREFIX + dim.name])]) for dim in dims]
            known[int(trial["number"])] = np.hstack([np.zeros((1, 0)), *settings])[0]
    return known


def _columns(dim: Dimension, values: Sequence[ParamValue]) -> FloatArray:
    if dim.choices:
        return np.eye(len(dim.choices))[[dim.choices.index(value) for value in values]]
    numbers = np.array([dim.low, dim.high, *values], dtype=np.float64)
    numbers = np.log(numbers) if dim.is_log else numbers
    return np.asarray((numbers[2:, None] - numbers[0]) / (numbers[1] - numbers[0]))


def _grid(dim: Dimension, n_points: int) -> tuple[ParamValue, ...]:
    if dim.choices:
        return dim.choices
    if dim.is_int and dim.high - dim.low < n_points:
        return tuple(range(int(dim.low), int(dim.high) + 1))
    spaced = (np.geomspace if dim.is_log else np.linspace)(dim.low, dim.high, n_points)
    return tuple((np.unique(np.rint(spaced).astype(int)) if dim.is_int else spaced).tolist())


def _place(surrogate: Surrogate, d: int) -> slice:
    widths = [len(dim.choices) or 1 for dim in surrogate.dims[: d + 1]]
    return slice(sum(widths[:d]), sum(widths))


def _moved(
    surrogate: Surrogate, rows: FloatArray, d: int, grid: tuple[ParamValue, ...]
) -> FloatArray:
    """Rows with one setting put to each value of the grid, (G, rows, C)."""
    moved = np.repeat(rows[None], len(grid), axis=0)
    moved[:, :, _place(surrogate, d)] = _columns(surrogate.dims[d], grid)[:, None]
    return moved


def _n_near(surrogate: Surrogate, d: int, grid: tuple[ParamValue, ...]) -> tuple[int, ...]:
    own = surrogate.inputs[:, _place(surrogate, d)]
    gaps = np.abs(_columns(surrogate.dims[d], grid)[:, None] - own).max(axis=2)  # (G, N)
    return tuple((gaps <= _REACH + 1e-9).sum(axis=1).tolist())


def _one_thread() -> contextlib.AbstractContextManager[Any]:
    """Keep small matrices off the threads: measured 4 to 34 times quicker, 80 trials, 2 cores."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)  # type: ignore[no-any-return]  # untyped library


def _process(inputs: FloatArray, scores: FloatArray, kernel: Any = None) -> Any:
    """Gaussian process given the trials; the kernel is fitted too where none is given."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    optimizer = None if kernel else "fmin_l_bfgs_b"
    lengths = Matern(np.ones(inputs.shape[1]), (0.05, 50.0), nu=1.5)
    fresh = ConstantKernel(1.0, (1e-2, 1e2)) * lengths + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel or fresh, optimizer=optimizer, normalize_y=True)
    with warnings.catch_warnings():
        # A length at its bound is what a setting without effect looks like.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(inputs, scores)


def _held_out(inputs: FloatArray, scores: FloatArray) -> list[float]:
    """Predict each trial from the other folds; rows come shuffled."""
    predicted = np.empty_like(scores)
    for fold in range(_N_FOLDS):
        held = np.arange(len(scores)) % _N_FOLDS == fold
        predicted[held] = _process(inputs[~held], scores[~held]).predict(inputs[held])
    return [float(value) for value in predicted]


def _processes(
    surrogate: Surrogate, rng: np.random.Generator, n_resamples: int
) -> Iterator[tuple[Any, Any]]:
    """Give the process on all trials, then on each resample, with the trials that it saw."""
    n = len(surrogate.scores)
    for resample in range(n_resamples + 1):
        rows = rng.integers(n, size=min(n, _MAX_RESAMPLE)) if resample else rng.permutation(n)
        yield _process(surrogate.inputs[rows], surrogate.scores[rows], surrogate.kernel), rows


def _averaged(
    surrogate: Surrogate,
    process: Any,
    rows: Any,
    d: int,
    grid: tuple[ParamValue, ...],
    n_most: int = _MAX_FITTED,
) -> tuple[FloatArray, FloatArray]:
    """Mean prediction over trials at each value of one setting, and its standard deviation."""
    moved = _moved(surrogate, surrogate.inputs[rows[:n_most]], d, grid)
    points = moved.reshape(-1, moved.shape[2])
    kernel, scale = process.kernel_.k1, surrogate.scores[rows].std()
    to_seen = kernel(points, process.X_train_).reshape(*moved.shape[:2], -1).mean(axis=1)
    mean = surrogate.scores[rows].mean() + scale * (to_seen @ process.alpha_)
    explained = solve_triangular(process.L_, to_seen.T, lower=True)
    # All points of one value share that setting, so any value gives their covariance.
    variance = kernel(moved[0]).mean() - np.square(explained).sum(axis=0)
    return mean, scale * np.sqrt(np.maximum(variance, 0.0))


def _band(estimate: FloatArray, draws: list[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """95 % of the draws, widened to hold the estimate, as a reader expects."""
    low, high = np.quantile(draws or [estimate], [0.025, 0.975], axis=0)
    return np.minimum(low, estimate), np.maximum(high, estimate)


def _shares(lines: list[FloatArray]) -> FloatArray:
    variances = np.array([np.var(line) for line in lines])
    return np.asarray(variances / max(variances.sum(), 1e-300))
