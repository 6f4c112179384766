"""What trials say together: importance of a planted setting, final accuracies, the best."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from reports.trials import (
    MIN_TRIALS,
    Importance,
    as_optuna_study,
    final_accuracies,
    importances,
)

DIMS: dict[str, BaseDistribution] = {n: FloatDistribution(0, 1) for n in ("f1", "f2", "f3")}
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


def trials_of(rows: list[dict[str, object]]) -> pd.DataFrame:
    blank = {"state": "complete", "reason": None, "origin": "sampler"}
    return pd.DataFrame([blank | {"number": i} | row for i, row in enumerate(rows)])


def epochs_of(curves: list[list[float]]) -> pd.DataFrame:
    rows = [(n, e, v) for n, curve in enumerate(curves) for e, v in enumerate(curve)]
    return pd.DataFrame(rows, columns=["number", "epoch", "val_acc"])


def planted(n: int = 60, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A search in which f1 alone decides, and every trial with a bad f1 is pruned."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    curves = []
    for _ in range(n):
        f1, f2, f3 = rng.random(3)
        n_epochs, state = (10, "complete") if f1 < 0.5 else (2, "pruned")
        final = (0.9 if f1 < 0.5 else 0.6) + 0.02 * f2 + rng.normal(0, 0.002)
        curves.append([final * (1 - 0.5 ** (epoch + 1)) for epoch in range(n_epochs)])
        params = {"params_f1": f1, "params_f2": f2, "params_f3": f3}
        rows.append({"state": state, "value": curves[-1][-1], **params})
    return trials_of(rows), epochs_of(curves)


def frozen_of(trials: pd.DataFrame, dims: dict[str, BaseDistribution]) -> list[FrozenTrial]:
    """The trials as Optuna has them."""
    found = []
    for row in trials.to_dict("records"):
        params: dict[str, Any] = {name: row[f"params_{name}"] for name in dims}
        state = STATES[str(row["state"])]
        trial = create_trial(
            state=state, value=row["value"], params=params, distributions=dict(dims)
        )
        trial.number = int(row["number"])
        found.append(trial)
    return found


def estimate(
    trials: pd.DataFrame, epochs: pd.DataFrame, dims: dict[str, BaseDistribution] = DIMS
) -> Importance:
    return importances(frozen_of(trials, dims), final_accuracies(trials, epochs))


def test_the_setting_that_pruned_trials_vary_in_is_named() -> None:
    trials, epochs = planted()
    found = estimate(trials, epochs)
    first, second = (found.shares.iloc[i] for i in range(2))
    assert first["setting"] == "f1" and first["share"] > 0.8 and first["low"] > second["high"]
    assert found.shares["share"].sum() == pytest.approx(1)
    n_pruned = int((trials["state"] == "pruned").sum())
    assert found.counts == {"complete": 60 - n_pruned, "pruned": n_pruned}


def test_settings_that_a_plan_chose_have_no_importance() -> None:
    trials, epochs = planted()
    frozen, final = frozen_of(trials, DIMS), final_accuracies(trials, epochs)
    found = importances(frozen, final, planned=range(60))
    assert not len(found.shares) and "plan chose" in str(found.why_empty)
    assert importances(frozen, final, planned=range(20)).shares["setting"].iloc[0] == "f1"


def test_the_view_has_pruned_trials_at_their_final_accuracy() -> None:
    trials, epochs = planted(20)
    final = final_accuracies(trials, epochs)
    view = as_optuna_study(frozen_of(trials, DIMS), final).get_trials()
    assert [t.value for t in view] == pytest.approx(final.tolist())
    assert {t.state for t in view} == {TrialState.COMPLETE}


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
    ],
)
def test_a_pruned_trial_is_read_off_the_trials_that_went_further(
    finished: list[list[float]], pruned: list[list[float]], expected: list[float]
) -> None:
    rows: list[dict[str, object]] = [{"value": max(curve)} for curve in finished]
    rows += [{"value": max(curve), "state": "pruned"} for curve in pruned]
    found = final_accuracies(trials_of(rows), epochs_of([*finished, *pruned]))
    ends = [curve[-1] for curve in finished]
    assert found.tolist() == pytest.approx([*ends, *expected])


def test_diverged_trials_are_the_worst_and_other_failures_say_nothing() -> None:
    rows: list[dict[str, object]] = [
        {"value": 0.9},
        {"state": "failed", "reason": "diverged: loss is nan", "value": 0.95},
        {"state": "failed", "reason": "error: disk is full", "value": 0.2},
        {"value": 0.9, "origin": "same as 0"},
        {"value": 0.3},
        {"state": "running", "value": 0.5},
        {"state": "pruned", "value": None},
    ]
    found = final_accuracies(
        trials_of(rows), epochs_of([[0.9], [0.95], [0.2], [], [0.3], [0.5], []])
    )
    assert found.to_dict() == {0: 0.9, 1: 0.3, 4: 0.3}


def test_estimates_keep_the_order_at_every_rung() -> None:
    trials, epochs = planted(80, 5)
    found = final_accuracies(trials, epochs)
    at_rung = epochs[epochs["epoch"] == 1].set_index("number")["val_acc"]
    stopped = trials.loc[trials["state"] == "pruned", "number"]
    ordered = at_rung[stopped].sort_values().index
    assert found[ordered].is_monotonic_increasing


@pytest.mark.parametrize("n", [0, MIN_TRIALS - 1])
def test_few_trials_give_a_reason_instead_of_a_figure(n: int) -> None:
    trials, epochs = planted(max(n, 1))
    found = estimate(trials.head(n), epochs[epochs["number"] < n])
    assert not len(found.shares) and f"there are {n}" in str(found.why_empty)


def test_choices_and_whole_numbers_are_judged_too() -> None:
    trials, epochs = planted(60)
    trials["params_f1"] = np.where(trials["params_f1"] < 0.5, "good", "bad")
    trials["params_f2"] = (trials["params_f2"] * 5).round().astype(int)
    dims: dict[str, BaseDistribution] = {
        "f1": CategoricalDistribution(["bad", "good", "never tried"]),
        "f2": IntDistribution(0, 5),
        "f3": DIMS["f3"],
    }
    assert estimate(trials, epochs, dims).shares["setting"].iloc[0] == "f1"
