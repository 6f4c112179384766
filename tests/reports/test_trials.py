"""What trials say together: importance of a planted setting, final accuracies, the best."""

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from reports.trials import MIN_TRIALS, as_optuna_study, final_accuracies, importances

Rows = list[dict[str, object]]
DIMS: dict[str, BaseDistribution] = {n: FloatDistribution(0, 1) for n in ("f1", "f2", "f3")}
MIXED = DIMS | {
    "f1": CategoricalDistribution(["bad", "good", "never tried"]),
    "f2": IntDistribution(0, 5),
}


def trials_of(rows: Rows) -> pd.DataFrame:
    blank = {"state": "complete", "reason": None, "origin": "sampler"}
    return pd.DataFrame([blank | {"number": i} | row for i, row in enumerate(rows)])


def epochs_of(curves: list[list[float]]) -> pd.DataFrame:
    rows = [(n, e, v) for n, curve in enumerate(curves) for e, v in enumerate(curve)]
    return pd.DataFrame(rows, columns=["number", "epoch", "val_acc"]).assign(score=np.nan)


def planted(
    n: int = 60, seed: int = 0, dims: dict[str, BaseDistribution] = DIMS
) -> tuple[list[FrozenTrial], "pd.Series[float]"]:
    """A search in which f1 alone decides, and every trial with a bad f1 is pruned."""
    rng = np.random.default_rng(seed)
    study = optuna.create_study()
    rows: Rows = []
    curves = []
    for f1, f2, f3 in rng.random((n, 3)):
        n_epochs, state = (10, "complete") if f1 < 0.5 else (2, "pruned")
        final = (0.9 if f1 < 0.5 else 0.6) + 0.02 * f2 + rng.normal(0, 0.002)
        curve = [final * (1 - 0.5 ** (epoch + 1)) for epoch in range(n_epochs)]
        rows.append({"state": state, "value": curve[-1]})
        curves.append(curve)
        params = {"f1": f1, "f2": f2, "f3": f3}
        if dims is MIXED:
            params |= {"f1": "good" if f1 < 0.5 else "bad", "f2": round(5 * f2)}
        trial = create_trial(
            state=TrialState[state.upper()], value=curve[-1], params=params, distributions=dims
        )
        study.add_trial(trial)
    return study.trials, final_accuracies(trials_of(rows), epochs_of(curves))


def test_the_setting_that_pruned_trials_vary_in_is_named() -> None:
    frozen, final = planted()
    found = importances(frozen, final)
    first, second = (found.shares.iloc[i] for i in range(2))
    assert first["setting"] == "f1" and first["share"] > 0.8 and first["low"] > second["high"]
    assert found.shares["share"].sum() == pytest.approx(1)
    n_pruned = sum(trial.state is TrialState.PRUNED for trial in frozen)
    assert found.counts == {"complete": 60 - n_pruned, "pruned": n_pruned}


def test_choices_and_whole_numbers_are_judged_too() -> None:
    assert importances(*planted(dims=MIXED)).shares["setting"].iloc[0] == "f1"


def test_few_trials_and_those_that_a_plan_chose_give_a_reason_instead_of_a_figure() -> None:
    few = importances(*planted(MIN_TRIALS - 1))
    assert not len(few.shares) and f"has {MIN_TRIALS - 1}" in str(few.why_empty)
    frozen, final = planted()
    found = importances(frozen, final, planned=range(60))
    assert not len(found.shares) and "plan chose" in str(found.why_empty)
    assert importances(frozen, final, planned=range(20)).shares["setting"].iloc[0] == "f1"


def test_pruned_trials_are_drawn_at_an_estimate_that_keeps_their_order_at_the_rung() -> None:
    frozen, final = planted(80, 5)
    drawn = as_optuna_study(frozen, final).trials
    assert [trial.value for trial in drawn] == final.tolist()
    assert {trial.state for trial in drawn} == {TrialState.COMPLETE}
    stopped = [trial for trial in frozen if trial.state is TrialState.PRUNED]
    at_rung = sorted(stopped, key=lambda trial: trial.value or 0.0)
    assert final[[trial.number for trial in at_rung]].is_monotonic_increasing


@pytest.mark.parametrize(
    ("finished", "pruned", "expected"),
    [
        # Half way between the two; and below both by as much as it was at that epoch.
        ([[0.4, 0.8], [0.6, 0.9]], [[0.5], [0.3]], [0.85, 0.7]),
        # Who stood lower and ended higher is averaged with who stood higher and ended lower.
        ([[0.4, 0.9], [0.5, 0.6]], [[0.5]], [0.75]),
        # Without others it keeps what it has.
        ([], [[0.7]], [0.7]),
        # At epoch 1 it is 0.3 below the finished one; at epoch 0 the next is 0.1 below that.
        ([[0.6, 0.8, 0.9]], [[0.3, 0.5], [0.2]], [0.6, 0.5]),
        # A solved head, of one epoch, did not go further.
        ([[0.7], [0.4, 0.8], [0.6, 0.9]], [[0.5]], [0.85]),
    ],
)
def test_a_pruned_trial_is_read_off_the_trials_that_went_further(
    finished: list[list[float]], pruned: list[list[float]], expected: list[float]
) -> None:
    rows: Rows = [{"value": max(curve)} for curve in finished]
    rows += [{"value": max(curve), "state": "pruned"} for curve in pruned]
    found = final_accuracies(trials_of(rows), epochs_of([*finished, *pruned]))
    ends = [curve[-1] for curve in finished]
    assert found.tolist() == pytest.approx([*ends, *expected])


def test_diverged_trials_are_the_worst_and_other_failures_say_nothing() -> None:
    rows: Rows = [
        {"value": 0.9},
        {"state": "failed", "reason": "diverged: loss is nan", "value": 0.95},
        {"state": "failed", "reason": "error: disk is full", "value": 0.2},
        {"value": 0.9, "origin": "same as 0"},
        {"value": 0.3},
        {"state": "running", "value": 0.5},
        {"state": "pruned", "value": None},
    ]
    curves = [[0.9], [0.95], [0.2], [], [0.3], [0.5], []]
    found = final_accuracies(trials_of(rows), epochs_of(curves))
    assert found.to_dict() == {0: 0.9, 1: 0.3, 4: 0.3}
