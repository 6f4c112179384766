"""Optuna's samplers and pruners by name, each one entry."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna import pruners, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial

Distributions = Mapping[str, BaseDistribution]
FloatArray = NDArray[np.float64]
GridValue = str | float | int | bool | None

# Points of a continuous dimension that the grid sampler takes. Assumption.
_GRID_POINTS = 5
_SEEDS = 2**31


class SeenTrials(IntersectionSearchSpace):
    """What the samplers of one study remember of its trials from one draw to the next.

    A sampler is made anew for every trial; finished trials do not change.
    """

    def __init__(self) -> None:
        super().__init__(include_pruned=True)
        self._space: dict[str, BaseDistribution] = {}
        self._points: dict[int, list[float]] = {}

    def points(self, trials: Iterable[FrozenTrial], space: Distributions) -> FloatArray:
        """Return finished trials as points of the space, (trials, dimensions).

        Args:
            trials: Finished ones, each with a value for every dimension.
            space: From `calculate`.
        """
        if space != self._space:  # its bounds may widen as trials come in
            self._space, self._points = dict(space), {}
        points = self._points
        rows = []
        for trial in trials:
            point = points.get(trial.number)
            if point is None:
                point = [d.to_internal_repr(trial.params[name]) for name, d in space.items()]
                points[trial.number] = point
            rows.append(point)
        return np.array(rows, dtype=float).reshape(len(rows), len(space))


@dataclass(frozen=True, slots=True)
class _Draw:
    """What a sampler is made from.

    Attributes:
        trial_seed: Differs from trial to trial: for samplers that keep no state, so that a
            resumed study draws what it would have drawn without the stop, and never repeats.
        study_seed: The same for all trials: for samplers that walk through a fixed sequence and
            keep their place in the study.
        space: Distributions by name.
        seen: What is remembered from trial to trial.
    """

    trial_seed: int
    study_seed: int
    space: Distributions
    seen: SeenTrials


class _TPE(samplers.TPESampler):
    """TPE that does not go through all trials again for what it knew at the last draw."""

    def __init__(self, draw: _Draw) -> None:
        super().__init__(seed=draw.trial_seed)
        self._seen = draw.seen
        self._common: dict[str, BaseDistribution] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the dimensions that all finished trials share."""
        common = self._seen.calculate(study)
        self._common = {name: dist for name, dist in common.items() if not dist.single()}
        return self._common

    def _get_internal_repr(
        self,
        trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
        study: optuna.Study,
    ) -> dict[str, FloatArray]:
        """Return the values of trials by dimension."""
        are_finished = all(trial.state.is_finished() for trial in trials)
        if not are_finished or search_space != self._common:
            return super()._get_internal_repr(trials, search_space, study)
        points = self._seen.points(trials, search_space)
        return {name: points[:, k] for k, name in enumerate(search_space)}


class _Unstopped:
    """Leaves it to the search to see that every setting was tried.

    Optuna's exhaustive samplers stop the study themselves, which asking and telling forbids.
    """

    def after_trial(self, *_: object) -> None:
        """Do nothing."""


class _Hyperband(pruners.HyperbandPruner):
    """Hyperband for one study, which works out a trial's bracket once.

    Optuna hashes every trial of the study anew each time that one reaches a rung.
    """

    def __init__(self, epochs: int) -> None:
        super().__init__(min_resource=1, max_resource=max(1, epochs), reduction_factor=3)
        self._brackets: dict[int, int] = {}

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if not self._pruners:  # its brackets are not laid out yet
            return super()._get_bracket_id(study, trial)
        number = trial.number
        if number not in self._brackets:
            self._brackets[number] = super()._get_bracket_id(study, trial)
        return self._brackets[number]


class _Grid(_Unstopped, samplers.GridSampler):
    pass


class _BruteForce(_Unstopped, samplers.BruteForceSampler):
    pass


def _grid(draw: _Draw) -> samplers.BaseSampler:
    grid = {name: grid_points(dist) for name, dist in draw.space.items()}
    return _Grid(grid, seed=draw.study_seed)


_SAMPLERS: dict[str, Callable[[_Draw], samplers.BaseSampler]] = {
    "tpe": _TPE,
    "random": lambda draw: samplers.RandomSampler(seed=draw.trial_seed),
    "gp": lambda draw: samplers.GPSampler(seed=draw.trial_seed, deterministic_objective=False),
    "cmaes": lambda draw: samplers.CmaEsSampler(seed=draw.study_seed),
    "qmc": lambda draw: samplers.QMCSampler(seed=draw.study_seed, scramble=True),
    "grid": _grid,
    "bruteforce": lambda draw: _BruteForce(seed=draw.trial_seed),
}

_PRUNERS: dict[str, Callable[[int], pruners.BasePruner]] = {
    "hyperband": lambda epochs: _Hyperband(epochs),
    "median": lambda epochs: pruners.MedianPruner(
        n_startup_trials=4, n_warmup_steps=_warmup(epochs)
    ),
    "percentile": lambda epochs: pruners.PercentilePruner(
        25.0, n_startup_trials=4, n_warmup_steps=_warmup(epochs)
    ),
    "halving": lambda _: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    "wilcoxon": lambda _: pruners.WilcoxonPruner(p_threshold=0.1),
    "none": lambda _: pruners.NopPruner(),
}

SAMPLER_NAMES = tuple(_SAMPLERS)
PRUNER_NAMES = tuple(_PRUNERS)


def _warmup(epochs: int) -> int:
    """Return how many epochs a trial has before it may be compared: a fifth, one at least."""
    return max(1, epochs // 5)


def make_sampler(
    name: str,
    seed: int,
    trial_number: int,
    space: Distributions,
    seen: SeenTrials | None = None,
) -> samplers.BaseSampler:
    """Build a sampler for one trial.

    Args:
        name: One of `SAMPLER_NAMES`.
        seed: The study's seed.
        trial_number: Number of the trial that it will draw.
        space: Distributions by name.
        seen: One object for all trials of a study, to spare the sampler old trials; None to look
            at all of them again.

    Raises:
        ValueError: Unknown name.
    """
    if name not in _SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLER_NAMES)}, but got {name!r}.")
    words = np.random.SeedSequence((seed, trial_number)).generate_state(1)
    with quiet_experiments():
        memory = seen or SeenTrials()
        draw = _Draw(int(words[0]) % _SEEDS, seed % _SEEDS, space, memory)
        return _SAMPLERS[name](draw)


def make_pruner(name: str, epochs: int) -> pruners.BasePruner:
    """Build a pruner for trials of at most so many epochs.

    Args:
        name: One of `PRUNER_NAMES`.
        epochs: A trial's full length.

    Raises:
        ValueError: Unknown name.
    """
    if name not in _PRUNERS:
        raise ValueError(f"pruner must be one of {', '.join(PRUNER_NAMES)}, but got {name!r}.")
    with quiet_experiments():
        return _PRUNERS[name](epochs)


def quiet_experiments() -> warnings.catch_warnings:
    """Silence Optuna's notes that a sampler's or pruner's interface may still change."""
    return warnings.catch_warnings(action="ignore", category=ExperimentalWarning)


def grid_points(distribution: BaseDistribution) -> list[GridValue]:
    """List the values that the grid takes of a dimension."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, optuna.distributions.IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(
        distribution,
        (optuna.distributions.IntDistribution, optuna.distributions.FloatDistribution),
    )
    low, high = distribution.low, distribution.high
    if isinstance(distribution, optuna.distributions.FloatDistribution) and distribution.step:
        count = math.floor((high - low) / distribution.step + 1e-9) + 1
        return [low + k * distribution.step for k in range(count)]
    spread = np.geomspace if distribution.log else np.linspace
    values = spread(low, high, _GRID_POINTS).clip(low, high).tolist()
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return sorted({round(value) for value in values})
    return list(values)
