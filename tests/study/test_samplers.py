import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from study.samplers import (
    PRUNER_NAMES,
    SAMPLER_NAMES,
    SeenTrials,
    grid_points,
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


@pytest.mark.parametrize("name", SAMPLER_NAMES)
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
    assert grid_points(IntDistribution(0, 6, step=2)) == [0, 2, 4, 6]
    assert grid_points(FloatDistribution(0.0, 0.3, step=0.1)) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert grid_points(FloatDistribution(1e-4, 1.0, log=True)) == pytest.approx(
        [1e-4, 1e-3, 1e-2, 1e-1, 1]
    )
    assert grid_points(IntDistribution(1, 1000, log=True)) == [1, 6, 32, 178, 1000]


@pytest.mark.parametrize("name", PRUNER_NAMES)
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


@pytest.mark.parametrize("epochs", [3, 10, 30])
def test_hyperband_forms_brackets(epochs: int) -> None:
    study = optuna.create_study(direction="maximize", pruner=make_pruner("hyperband", epochs))
    for _ in range(3):
        trial = study.ask(NUMBERS)
        trial.report(0.5, 1)
        trial.should_prune()
        study.tell(trial, 0.5)
    brackets = {3: 2, 10: 3, 30: 4}
    assert study.pruner._n_brackets == brackets[epochs]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sampler must be one of tpe, random"):
        make_sampler("tree", 0, 0, NUMBERS)
    with pytest.raises(ValueError, match="pruner must be one of hyperband, median"):
        make_pruner("scissors", 3)


def test_tpe_and_hyperband_with_a_memory_do_what_optunas_own_do() -> None:
    space = {**NUMBERS, "c": CategoricalDistribution(("a", None, 2)), "one": IntDistribution(3, 3)}

    def drawn(is_ours: bool) -> list[object]:
        pruner = make_pruner("hyperband", 9) if is_ours else HyperbandPruner(1, 9, 3)
        study = optuna.create_study(study_name="same", direction="maximize", pruner=pruner)
        seen = SeenTrials()
        told = []
        for number in range(60):
            study.sampler = make_sampler("tpe", 0, number, space, seen)
            if not is_ours:
                study.sampler = TPESampler(seed=study.sampler._rng.rng.get_state()[1][0])
            trial = study.ask(space)
            reached = 0
            while reached < 9:
                reached += 1
                trial.report(trial.params["x"] * reached, reached)
                if trial.should_prune():
                    break
            state = TrialState.PRUNED if reached < 9 else TrialState.COMPLETE
            study.tell(trial, trial.params["x"] if reached == 9 else None, state=state)
            told.append((trial.params, reached))
        return told

    ours = drawn(True)
    assert ours == drawn(False)
    assert {reached for _, reached in ours} == {1, 3, 9}


def test_memory_of_trials_is_dropped_when_the_space_changes() -> None:
    seen = SeenTrials()
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=0))
    for number in range(30):
        wide = {"x": FloatDistribution(0.0, 1.0 if number < 15 else 2.0), "k": NUMBERS["k"]}
        study.sampler = make_sampler("tpe", 0, number, wide, seen)
        fresh = make_sampler("tpe", 0, number, wide)
        trial = study.ask(wide)
        frozen = study.trials[-1]
        assert study.sampler.infer_relative_search_space(
            study, frozen
        ) == fresh.infer_relative_search_space(study, frozen)
        study.tell(trial, trial.params["x"])
        if number > 15:
            assert set(seen.calculate(study)) == {"k"}
