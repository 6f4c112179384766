"""Optuna's samplers and pruners by name, each one entry; Optuna is imported when one is made."""

import math
import warnings
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

Distributions = Mapping[str, "BaseDistribution"]
GridValue = str | float | int | bool | None

_SEEDS = 2**31


SAMPLERS: dict[str, tuple[str, Callable[[int, int, Distributions], dict[str, Any]]]] = {
    "tpe": ("optuna.samplers:TPESampler", lambda trial, study, space: {"seed": trial}),
    "random": ("optuna.samplers:RandomSampler", lambda trial, study, space: {"seed": trial}),
    "gp": (
        "optuna.samplers:GPSampler",
        lambda trial, study, space: {"seed": trial, "deterministic_objective": False},
    ),
    "cmaes": ("optuna.samplers:CmaEsSampler", lambda trial, study, space: {"seed": study}),
    "qmc": (
        "optuna.samplers:QMCSampler",
        lambda trial, study, space: {"seed": study, "scramble": True},
    ),
    "grid": (
        "optuna.samplers:GridSampler",
        lambda trial, study, space: {"search_space": grid_of(space), "seed": study},
    ),
    "bruteforce": (
        "optuna.samplers:BruteForceSampler",
        lambda trial, study, space: {"seed": trial},
    ),
}
"""Name -> import path, and its arguments, given a seed of the trial, one of the study, and the
space. Samplers that keep no state take the trial's, so that a resumed study draws what it would
have drawn without the stop; those that walk through a fixed sequence take the study's."""


def _startup(epochs: int) -> dict[str, Any]:
    """Compare trials once there are four, each after a fifth of its epochs, one at least."""
    return {"n_startup_trials": 4, "n_warmup_steps": max(1, epochs // 5)}


PRUNERS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "hyperband": (
        "optuna.pruners:HyperbandPruner",
        lambda epochs: {"min_resource": 1, "max_resource": max(1, epochs), "reduction_factor": 3},
    ),
    "median": ("optuna.pruners:MedianPruner", _startup),
    "percentile": (
        "optuna.pruners:PercentilePruner",
        lambda epochs: {"percentile": 25.0} | _startup(epochs),
    ),
    "halving": (
        "optuna.pruners:SuccessiveHalvingPruner",
        lambda _: {"min_resource": 1, "reduction_factor": 3},
    ),
    "wilcoxon": ("optuna.pruners:WilcoxonPruner", lambda _: {"p_threshold": 0.1}),
    "none": ("optuna.pruners:NopPruner", lambda _: {}),
}
"""Name -> import path, and its arguments for trials of at most so many epochs."""


def make_sampler(name: str, seed: int, trial_number: int, space: Distributions) -> "BaseSampler":
    """Build a sampler for one trial; its name is one of `SAMPLERS`, and `seed` the study's."""
    words = np.random.SeedSequence((seed, trial_number)).generate_state(1)
    path, arguments = SAMPLERS[name]
    # Optuna's exhaustive samplers stop the study themselves, which asking and telling forbids;
    # the search sees by itself that every setting was tried.
    kind = resolve_name(path)
    unstopped = type(kind.__name__, (kind,), {"after_trial": lambda *_: None})
    with quiet_experiments():
        made: BaseSampler = unstopped(**arguments(int(words[0]) % _SEEDS, seed % _SEEDS, space))
    return made


def make_pruner(name: str, epochs: int) -> "BasePruner":
    """Build a pruner for trials of at most so many epochs; its name is one of `PRUNERS`."""
    path, arguments = PRUNERS[name]
    with quiet_experiments():
        made: BasePruner = resolve_name(path)(**arguments(epochs))
    return made


def quiet_experiments() -> warnings.catch_warnings:
    """Silence Optuna's notes that a sampler's or pruner's interface may still change."""
    from optuna.exceptions import ExperimentalWarning

    return warnings.catch_warnings(action="ignore", category=ExperimentalWarning)


def grid_of(space: Distributions) -> dict[str, list[GridValue]]:
    """List the values of every dimension, none of which may be a continuum."""
    return {name: _values(distribution) for name, distribution in space.items()}


def _values(distribution: Any) -> list[GridValue]:
    if hasattr(distribution, "choices"):
        return list(distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    # The small share keeps 0.3 / 0.1 = 2.999... at three steps.
    return [low + k * step for k in range(math.floor((high - low) / step + 1e-9) + 1)]
