"""How early the final order shows: the correlation, its interval, and the effect of pruning."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from reports.pruning import MIN_TRIALS, early_rank_correlation, spearman_interval

NOISE = (0.3, 0.1, 0.05, 0.0)


def search(n: int, seed: int, cut_after: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves that near their final value by less and less noise; the worse half may be pruned."""
    rng = np.random.default_rng(seed)
    final = 0.7 + 0.1 * rng.standard_normal(n)
    curves = np.array([final - 0.4 + 0.1 * e + s * rng.standard_normal(n)
                       for e, s in enumerate(NOISE)]).T  # fmt: skip
    curves[:, -1] = final + 1  # the best, so that the value is the last epoch's
    n_epochs = np.full(n, len(NOISE))
    if cut_after is not None:
        is_cut = curves[:, cut_after] < np.median(curves[:, cut_after])
        n_epochs[is_cut] = cut_after + 1
    points = [(i, e, curves[i, e]) for i in range(n) for e in range(n_epochs[i])]
    epochs = pd.DataFrame(points, columns=["number", "epoch", "val_acc"])
    trials = pd.DataFrame(epochs.groupby("number")["val_acc"].max().rename("value")).reset_index()
    states = np.where(n_epochs < len(NOISE), "pruned", "complete")
    return epochs, trials.assign(state=states, origin="sampler")


@pytest.mark.parametrize("rho", [0.3, 0.9])
@pytest.mark.parametrize("n", [8, 30])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int, rho: float) -> None:
    rng = np.random.default_rng(0)
    truth, held = 6 / math.pi * math.asin(rho / 2), 0  # of normal variables
    for _ in range(500):
        first = rng.standard_normal(n)
        second = rho * first + math.sqrt(1 - rho**2) * rng.standard_normal(n)
        found = spearman_interval(first.tolist(), second.tolist())
        assert found is not None
        assert found.estimate == pytest.approx(spearmanr(first, second).statistic)
        held += found.low <= truth <= found.high
    assert held / 500 > 0.92


def test_a_perfect_order_is_no_certainty_and_equal_values_have_none() -> None:
    found = spearman_interval(range(8), range(8))
    assert found is not None and (found.estimate, found.high) == pytest.approx((1, 1))
    assert 0.5 < found.low < 0.99
    assert spearman_interval([1.0] * 9, list(range(9))) is None


def test_the_correlation_is_the_planted_one() -> None:
    found = early_rank_correlation(*search(3000, 0))
    first, last = found.epochs[0].best_so_far, found.epochs[-1].best_so_far
    rho = 0.1 / math.hypot(0.1, NOISE[0])
    assert first is not None
    assert first.estimate == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.04)
    assert last is not None and last.estimate == pytest.approx(1)
    assert (found.n_complete, found.n_pruned, found.caveat) == (3000, 0, None)


def test_only_finished_trials_count_and_the_caveat_names_the_pruned() -> None:
    epochs, trials = search(200, 0, cut_after=1)
    trials.loc[trials.index[trials["state"] == "complete"][:2], "origin"] = "same as 5"
    found = early_rank_correlation(epochs, trials)
    assert [row.n_stopped for row in found.epochs] == [0, 100, 0, 0]
    assert [row.n for row in found.epochs] == [98] * 4
    for words in ("98 finished trials only", "100 pruned trials"):
        assert words in str(found.caveat)


@pytest.mark.parametrize("n", [0, 1, MIN_TRIALS - 1])
def test_few_trials_give_a_reason_instead_of_a_figure(n: int) -> None:
    epochs, trials = search(20, 0)
    found = early_rank_correlation(epochs, trials.head(n))
    assert found.epochs == () and f"has {n}." in str(found.why_empty)
