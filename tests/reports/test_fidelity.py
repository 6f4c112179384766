import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from reports.fidelity import MIN_TRIALS, early_rank_correlation, spearman_interval

NOISE = (0.3, 0.1, 0.05, 0.0)


def search(n: int, seed: int, cut_after: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves that near their final value by less and less noise; the worse half may be pruned."""
    rng = np.random.default_rng(seed)
    final = 0.7 + 0.1 * rng.standard_normal(n)
    curves = np.array([final - 0.4 + 0.1 * e + s * rng.standard_normal(n)
                       for e, s in enumerate(NOISE)]).T  # fmt: skip
    curves[:, -1] = final + 1  # the best, so that the value is the last epoch's
    is_cut = np.zeros(n, dtype=bool)
    if cut_after is not None:
        is_cut = curves[:, cut_after] < np.median(curves[:, cut_after])
    rows: list[dict[str, Any]] = []
    points = []
    for number, curve in enumerate(curves):
        kept = curve[: cut_after + 1] if is_cut[number] and cut_after is not None else curve
        state = "pruned" if is_cut[number] else "complete"
        rows.append({"number": number, "state": state, "value": max(kept), "origin": "sampler"})
        points += [(number, epoch, value) for epoch, value in enumerate(kept)]
    return pd.DataFrame(points, columns=["number", "epoch", "val_acc"]), pd.DataFrame(rows)


def estimates(epochs: pd.DataFrame, trials: pd.DataFrame) -> list[float]:
    told = early_rank_correlation(epochs, trials).epochs
    return [row.at_epoch.estimate for row in told if row.at_epoch is not None]


def test_it_is_spearmans_with_bonett_and_wrights_interval() -> None:
    first, second = [1.0, 2, 3, 4, 5, 6, 7], [2.0, 1, 4, 3, 7, 5, 6]
    told = spearman_interval(first, second)
    assert told is not None
    assert told.estimate == pytest.approx(spearmanr(first, second).statistic)
    # r = 1 - 6 * 10 / (7 * 48), z = 1.1648, error sqrt((1 + r^2 / 2) / 4).
    r = 1 - 60 / 336
    reach = 1.959964 * math.sqrt((1 + r * r / 2) / 4)
    bounds = [math.tanh(math.atanh(r) + sign * reach) for sign in (-1, 1)]
    assert [told.low, told.high] == pytest.approx(bounds)


@pytest.mark.parametrize("rho", [0.3, 0.9])
@pytest.mark.parametrize("n", [8, 30])
def test_the_interval_holds_the_truth_as_often_as_it_says(n: int, rho: float) -> None:
    rng = np.random.default_rng(0)
    truth = 6 / math.pi * math.asin(rho / 2)  # of normal variables
    held = 0
    for _ in range(500):
        first = rng.standard_normal(n)
        second = rho * first + math.sqrt(1 - rho**2) * rng.standard_normal(n)
        told = spearman_interval(first.tolist(), second.tolist())
        held += told is not None and told.low <= truth <= told.high
    assert held / 500 > 0.92


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_order_is_no_certainty(sign: int) -> None:
    told = spearman_interval(range(8), [sign * v for v in range(8)])
    assert told is not None and told.estimate == pytest.approx(sign)
    far = told.low if sign > 0 else -told.high
    assert 0.5 < far < 0.99
    assert sign * (told.high if sign > 0 else told.low) == pytest.approx(1)


def test_what_does_not_vary_has_no_correlation_and_few_values_are_an_error() -> None:
    assert spearman_interval([1.0] * 9, list(range(9))) is None
    with pytest.raises(ValueError, match="at least 4 values, but got n=3"):
        spearman_interval([1, 2, 3], [1, 2, 3])


def test_the_correlation_at_each_epoch_is_the_planted_one() -> None:
    told = early_rank_correlation(*search(3000, 0))
    for row, noise in zip(told.epochs, NOISE, strict=True):
        rho = 0.1 / math.hypot(0.1, noise)
        assert row.at_epoch is not None and row.best_so_far is not None
        assert row.at_epoch.estimate == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.04)
    assert told.epochs[0].at_epoch == told.epochs[0].best_so_far
    last = told.epochs[-1].best_so_far
    assert last is not None and last.estimate == pytest.approx(1)
    assert (told.n_complete, told.n_pruned, told.caveat, told.why_empty) == (3000, 0, None, None)


def test_among_survivors_the_correlation_is_lower_and_the_reader_is_told() -> None:
    for seed in range(5):
        whole, survivors = search(200, seed), search(200, seed, cut_after=1)
        assert estimates(*survivors)[1] < estimates(*whole)[1]
    told = early_rank_correlation(*survivors)
    assert [row.n_stopped for row in told.epochs] == [0, 100, 0, 0]
    assert [row.n for row in told.epochs] == [100] * 4
    assert told.n_pruned == 100
    assert told.caveat is not None
    assert "100 finished trials only" in told.caveat and "100 pruned trials" in told.caveat


def test_only_finished_trials_with_their_own_epochs_count() -> None:
    epochs, trials = search(20, 0)
    trials.loc[:3, "state"] = ["running", "failed", "failed", "running"]
    trials.loc[4, "origin"] = "same as 5"
    told = early_rank_correlation(epochs, trials)
    assert told.n_complete == 15
    assert {row.n for row in told.epochs} == {15}


def test_epochs_that_few_trials_reached_are_left_out() -> None:
    epochs, trials = search(20, 0)
    is_short = (epochs["number"] >= MIN_TRIALS - 1) & (epochs["epoch"] == 3)
    told = early_rank_correlation(epochs[~is_short], trials)
    assert [row.epoch for row in told.epochs] == [0, 1, 2]


@pytest.mark.parametrize("n", [0, 1, MIN_TRIALS - 1])
def test_few_trials_give_a_reason_instead_of_a_figure(n: int) -> None:
    epochs, trials = search(20, 0)
    told = early_rank_correlation(epochs, trials.head(n))
    assert told.epochs == ()
    assert told.why_empty is not None and f"has {n}." in told.why_empty
