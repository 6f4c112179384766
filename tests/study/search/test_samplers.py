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
    assert drawn == _draw(name, 1, 6, space)
    assert len({str(params) for params in drawn}) >= 5


@pytest.mark.parametrize("name", ["tpe", "random", "gp"])
def test_a_resumed_study_draws_what_an_uninterrupted_one_draws(name: str) -> None:
    # Samplers are made anew for every trial, so there is nothing that a stop could lose; the
    # seed must differ from trial to trial all the same.
    first = _draw(name, 3, 3, NUMBERS)
    assert _draw(name, 3, 8, NUMBERS)[:3] == first
    assert first[0] != first[1]


@pytest.mark.parametrize("name", ["grid", "bruteforce"])
def test_exhaustive_samplers_visit_every_setting_once(name: str) -> None:
    drawn = _draw(name, 0, 6, LISTED)
    assert len({str(params) for params in drawn}) == 6


def test_grid_points_of_each_kind_of_dimension() -> None:
    space = {
        "choice": CategoricalDistribution(("a", None)),
        "int": IntDistribution(0, 6, step=2),
        "log int": IntDistribution(1, 1000, log=True),
        "step": FloatDistribution(0.0, 0.3, step=0.1),
        "log": FloatDistribution(1e-4, 1.0, log=True),
    }
    grid = grid_of(space)
    assert (grid["choice"], grid["int"]) == (["a", None], [0, 2, 4, 6])
    assert grid["log int"] == [1, 6, 32, 178, 1000]
    assert grid["step"] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert grid["log"] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("epochs", [1, 3, 10, 30])
def test_every_pruner_but_none_stops_hopeless_trials_and_no_hopeful_one(
    name: str, epochs: int
) -> None:
    sampler = optuna.samplers.RandomSampler(seed=0)
    with quiet_experiments():
        study = optuna.create_study(
            direction="maximize", sampler=sampler, pruner=make_pruner(name, epochs)
        )
        pruned_good = pruned_bad = 0
        # Wilcoxon's test is slow, and needs no more: it compares with the best trial alone.
        for number in range(10 if name == "wilcoxon" else 40):
            is_good = number % 2 == 0
            trial = study.ask(NUMBERS)
            state = optuna.trial.TrialState.COMPLETE
            level = 0.9 if is_good else 0.1
            for step in range(1, epochs + 1):
                trial.report(level + 0.001 * step + 1e-5 * ((number * 7 + step) % 5), step)
                if step < epochs and trial.should_prune():
                    state = optuna.trial.TrialState.PRUNED
                    break
            done = state is optuna.trial.TrialState.COMPLETE
            study.tell(trial, level if done else None, state=state)
            pruned_good += is_good and not done
            pruned_bad += not is_good and not done
    if name == "none" or epochs == 1:
        assert (pruned_good, pruned_bad) == (0, 0)
    elif name == "wilcoxon" and epochs < 10:
        assert pruned_good == 0  # its test needs more steps than that to decide anything
    else:
        assert pruned_bad > 0
        # Halving keeps a third, so of twenty equally good ones some must go.
        assert name in ("hyperband", "halving") or pruned_good <= pruned_bad
