"""Importance of hyperparameters: a planted one, and the final accuracy of pruned trials."""

import numpy as np
import pandas as pd
import pytest

from reports.frames import Dimension
from reports.importance import MIN_TRIALS, Importance, estimate_final, estimate_importance

DIMS = tuple(Dimension(name, low=0.0, high=1.0) for name in ("f1", "f2", "f3"))


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


def estimate(
    trials: pd.DataFrame, epochs: pd.DataFrame, dims: tuple[Dimension, ...] = DIMS
) -> Importance:
    return estimate_importance(trials, epochs, dims, np.random.default_rng(1), 30)


def test_optuna_names_the_wrong_setting_and_we_the_right_one() -> None:
    trials, epochs = planted()
    found = estimate(trials, epochs)
    own = {f.name: f.completed_only for f in found.factors}
    assert max(own, key=lambda name: own[name] or 0.0) == "f2"
    assert found.factors[0].name == "f1" and found.factors[0].share > 0.8
    # The intervals of the two do not even touch.
    assert found.factors[0].low > found.factors[1].high
    assert sum(f.share for f in found.factors) == pytest.approx(1)
    assert all(0 <= f.low <= f.share <= f.high <= 1 for f in found.factors)
    n_pruned = int((trials["state"] == "pruned").sum())
    counts = (found.n_completed, found.n_pruned, found.n_left_out)
    assert counts == (60 - n_pruned, n_pruned, 0)


@pytest.mark.parametrize(
    ("finished", "pruned", "expected"),
    [
        # Half way between the two; and below both by as much as it was at that epoch.
        ([[0.4, 0.8], [0.6, 0.9]], [[0.5], [0.3]], [0.85, 0.7]),
        # No better than its equal became: who stood lower and ended higher does not lift it.
        ([[0.4, 0.9], [0.5, 0.6]], [[0.5]], [0.6]),
        # What it has reached is not taken from it.
        ([[0.5, 0.6]], [[0.7]], [0.7]),
        # At epoch 1 it is 0.3 below the finished one; at epoch 0 the next is 0.1 below that.
        ([[0.6, 0.8, 0.9]], [[0.3, 0.5], [0.2]], [0.6, 0.5]),
    ],
)
def test_a_pruned_trial_is_read_off_the_trials_that_went_further(
    finished: list[list[float]], pruned: list[list[float]], expected: list[float]
) -> None:
    rows: list[dict[str, object]] = [{"value": max(curve)} for curve in finished]
    rows += [{"value": max(curve), "state": "pruned"} for curve in pruned]
    found = estimate_final(trials_of(rows), epochs_of([*finished, *pruned]))["score"]
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
    found = estimate_final(
        trials_of(rows), epochs_of([[0.9], [0.95], [0.2], [], [0.3], [0.5], []])
    )
    assert found["number"].tolist() == [0, 1, 4]
    assert found["state"].tolist() == ["complete", "diverged", "complete"]
    assert found["score"].tolist() == [0.9, 0.3, 0.3]


def test_estimates_keep_the_order_at_every_rung() -> None:
    trials, epochs = planted(80, 5)
    found = estimate_final(trials, epochs).set_index("number")["score"]
    at_rung = epochs[epochs["epoch"] == 1].set_index("number")["val_acc"]
    stopped = trials.loc[trials["state"] == "pruned", "number"]
    ordered = at_rung[stopped].sort_values().index
    assert found[ordered].is_monotonic_increasing


@pytest.mark.parametrize("n", [0, MIN_TRIALS - 1])
def test_few_trials_give_a_reason_instead_of_a_figure(n: int) -> None:
    trials, epochs = planted(max(n, 1))
    found = estimate(trials.head(n), epochs[epochs["number"] < n])
    assert found.factors == () and f"has {n}" in str(found.why_empty)


def test_choices_and_whole_numbers_are_judged_too() -> None:
    trials, epochs = planted(60)
    trials["params_f1"] = np.where(trials["params_f1"] < 0.5, "good", "bad")
    trials["params_f2"] = (trials["params_f2"] * 5).round().astype(int)
    choices = Dimension("f1", choices=("bad", "good", "never tried"))
    dims = (choices, Dimension("f2", low=0, high=5, is_int=True), DIMS[2])
    assert estimate(trials, epochs, dims).factors[0].name == "f1"
