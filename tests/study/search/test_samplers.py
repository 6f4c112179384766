from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from study.search.samplers import (
    PRUNERS,
    SAMPLERS,
    grid_of,
    make_pruner,
    make_sampler,
    quiet_experiments,
)
from study.search.within_level import WithinLevel

optuna.logging.set_verbosity(optuna.logging.WARNING)
NUMBERS = {"x": FloatDistribution(0.0, 1.0), "k": IntDistribution(0, 5)}
LISTED = {"c": CategoricalDistribution(("a", "b")), "k": IntDistribution(0, 2)}


def _draw(name: str, seed: int, n: int, space: dict[str, object]) -> list[dict[str, object]]:
    study = optuna.create_study(direction="maximize")
    drawn = []
    for number in range(n):
        study.sampler = make_sampler(name, seed, number, space)
        with quiet_experiments():
            trial = study.ask(dict(space))
            drawn.append(dict(trial.params))
            value = float(trial.params.get("x", 0.5)) + float(trial.params["k"])
            study.tell(trial, value)
    return drawn


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_from_the_space_and_again_the_same(name: str) -> None:
    space = LISTED if name in ("grid", "bruteforce") else NUMBERS
    drawn = _draw(name, 1, 6, space)
    assert all(set(params) == set(space) for params in drawn)
    # A sampler is made for every trial, so a resumed study draws as an uninterrupted one.
    assert drawn == _draw(name, 1, 6, space)
    # Its seed differs from trial to trial; exhaustive ones visit each of the six settings.
    n_different = len({str(params) for params in drawn})
    assert n_different == 6 or (n_different == 5 and space is NUMBERS)


def test_grid_of_lists_every_value_of_a_dimension() -> None:
    space = {
        "choice": CategoricalDistribution(("a", None)),
        "int": IntDistribution(0, 6, step=2),
        "log int": IntDistribution(1, 4, log=True),
        "step": FloatDistribution(0.0, 0.3, step=0.1),
    }
    grid = grid_of(space)
    assert grid.pop("step") == pytest.approx([0, 0.1, 0.2, 0.3])
    assert grid == {"choice": ["a", None], "int": [0, 2, 4, 6], "log int": [1, 2, 3, 4]}


def _is_pruned(study: optuna.Study, space: dict[str, Any], scores: Sequence[float]) -> bool:
    """Run a trial that scores so after each epoch; say whether it was pruned."""
    trial = study.ask(space)
    for epoch, score in enumerate(scores, start=1):
        trial.report(score, epoch)
        if epoch < len(scores) and trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return True
    study.tell(trial, scores[-1])
    return False


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("epochs", [1, 10])
def test_every_pruner_but_none_stops_hopeless_trials_and_hardly_hopeful_ones(
    name: str, epochs: int
) -> None:
    n_pruned = {True: 0, False: 0}
    with quiet_experiments():
        sampler = optuna.samplers.RandomSampler(seed=0)
        pruner = make_pruner(name, epochs)
        study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        # Wilcoxon's test is slow, and needs no more: it compares with the best trial alone.
        for number in range(10 if name == "wilcoxon" else 40):
            is_good = number % 2 == 0
            level = 0.9 if is_good else 0.1
            steps = range(1, epochs + 1)
            scores = [level + 0.001 * k + 1e-5 * ((number * 7 + k) % 5) for k in steps]
            n_pruned[is_good] += _is_pruned(study, NUMBERS, scores)
    if name == "none" or epochs == 1:
        assert n_pruned == {True: 0, False: 0}
    else:
        assert n_pruned[False] > 0
        # Halving keeps a third, so of twenty equally good ones some must go.
        assert name in ("hyperband", "halving") or n_pruned[True] <= n_pruned[False]


@pytest.mark.parametrize("name", ["median", "hyperband", "halving", "wilcoxon"])
def test_trials_are_compared_with_those_of_their_own_level_alone(name: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    pruned = []
    with quiet_experiments():
        study = optuna.create_study(
            storage=storage, direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=WithinLevel(make_pruner(name, 10), storage),
            study_name="photos",  # brackets follow the name; "levels" would compare no two
        )  # fmt: skip
        for number in range(16):
            level, is_last = (5, 0)[number % 2], number >= 14
            study.enqueue_trial({"freeze_depth": level})
            # Half of them score far higher; the last of each level falls behind its own.
            start = (0.9 if level else 0.5) + 0.001 * number - (0.3 if is_last else 0)
            space = {"freeze_depth": CategoricalDistribution([0, 5])}
            if _is_pruned(study, space, [start] * 10):
                pruned.append(number)
    assert {14, 15} <= set(pruned)
    assert name in ("hyperband", "halving") or pruned == [14, 15]
