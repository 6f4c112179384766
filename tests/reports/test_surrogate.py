from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.fidelity import EarlyRank, EpochRank
from reports.figures import render
from reports.frames import Dimension
from reports.intervals import Interval
from reports.style import style
from reports.surrogate import (
    MIN_TRIALS,
    LocalFactor,
    PartialDependence,
    Surrogate,
    _averaged,
    fit_surrogate,
    local_importance,
    partial_dependence,
)
from reports.surrogate_plots import (
    plot_early_rank,
    plot_local_importance,
    plot_partial_dependence,
)

UNIT = {"low": 0.0, "high": 1.0}
DIMS = tuple(Dimension(name, **UNIT) for name in ("f1", "f2", "f3"))
MIXED = (
    Dimension("lr", low=1e-4, high=1e-1, is_log=True),
    Dimension("depth", low=0, high=5, is_int=True),
    Dimension("net", choices=("a", None, "c")),
)


def frames(rows: list[dict[str, Any]], n_epochs: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials, all finished if not told otherwise, that stand at their value in each epoch."""
    blank: dict[str, Any] = {"state": "complete", "reason": None, "origin": "sampler"}
    trials = pd.DataFrame([{"number": i, **blank, **row} for i, row in enumerate(rows)])
    epochs = [(i, e, row["value"]) for i, row in enumerate(rows) for e in range(n_epochs)]
    return trials, pd.DataFrame(epochs, columns=["number", "epoch", "val_acc"])


def planted(n: int = 60, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A search in which f1 decides, and every trial with a bad f1 is pruned."""
    rng = np.random.default_rng(seed)
    rows, curves = [], []
    for number in range(n):
        f1, f2, f3 = rng.random(3)
        is_good = f1 < 0.5
        final = (0.9 if is_good else 0.6) + 0.02 * f2 + rng.normal(0, 0.002)
        curve = [final * (1 - 0.5 ** (epoch + 1)) for epoch in range(10 if is_good else 2)]
        state = "complete" if is_good else "pruned"
        params = {"params_f1": f1, "params_f2": f2, "params_f3": f3}
        rows.append({"state": state, "value": curve[-1], **params})
        curves += [(number, epoch, value) for epoch, value in enumerate(curve)]
    return frames(rows)[0], pd.DataFrame(curves, columns=["number", "epoch", "val_acc"])


def accuracy(lr: Any, depth: Any, net: Any) -> Any:
    place = np.log10(np.asarray(lr, dtype=float)) + 2.5
    return 0.85 - 0.05 * place**2 - 0.006 * (np.asarray(depth) - 2) ** 2 + 0.03 * (net == "a")


def mixed(n: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        lr, depth = 10 ** rng.uniform(-4, -1), int(rng.integers(0, 6))
        net = MIXED[2].choices[rng.integers(3)]
        value = float(accuracy(lr, depth, net)) + rng.normal(0, 0.01)
        rows.append({"value": value, "params_lr": lr, "params_depth": depth, "params_net": net})
    return frames(rows)


def fitted(study: tuple[pd.DataFrame, pd.DataFrame], dims: Any = DIMS) -> Surrogate:
    return fit_surrogate(*study, dims, np.random.default_rng(0))


def test_the_planted_setting_is_found_where_pruning_hides_it() -> None:
    trials, epochs = planted()
    surrogate = fitted((trials, epochs))
    assert surrogate.is_trusted
    assert set(surrogate.states) == {"complete", "pruned"}
    around = local_importance(surrogate, np.random.default_rng(1), 40)
    assert around[0].name == "f1"
    assert around[0].low > max(factor.high for factor in around[1:])
    along = partial_dependence(surrogate, np.random.default_rng(1), 0)
    spans = {told.dimension.name: np.ptp(told.mean) for told in along}
    assert spans["f1"] > 5 * max(spans["f2"], spans["f3"])
    finished = trials[trials["state"] == "complete"]
    without = local_importance(fitted((finished, epochs)), np.random.default_rng(1), 0)
    assert without[0].name == "f2"


def test_the_band_covers_the_truth_for_most_values() -> None:
    covered = []
    for seed in range(4):
        told = partial_dependence(fitted(mixed(60, seed), MIXED), np.random.default_rng(seed), 60)
        # The truth, averaged over the space that the trials were drawn from.
        lr, depth = np.geomspace(1e-4, 1e-1, 400), np.arange(6)
        net = np.array(MIXED[2].choices, dtype=object)
        whole = np.meshgrid(lr, depth, net, indexing="ij")
        for d, along in enumerate(told):
            for value, low, high in zip(along.values, along.low, along.high, strict=True):
                settings: list[Any] = list(whole)
                settings[d] = np.full(whole[0].shape, value, dtype=whole[d].dtype)
                covered.append(low <= accuracy(*settings).mean() <= high)
    assert np.mean(covered) > 0.8


def test_the_predicted_order_holds_for_trials_held_out_and_not_for_noise() -> None:
    told = fitted(mixed(60, 0), MIXED)
    assert told.rank_correlation is not None
    assert told.rank_correlation.low > 0.5 and told.is_trusted
    trials, epochs = mixed(60, 0)
    trials["value"] = np.random.default_rng(5).normal(0.7, 0.05, 60)
    assert not fitted((trials, epochs), MIXED).is_trusted


@pytest.mark.parametrize(("n", "n_dims"), [(0, 3), (1, 3), (MIN_TRIALS - 1, 3), (23, 6)])
def test_few_trials_are_refused_and_told(n: int, n_dims: int) -> None:
    trials, epochs = planted(max(n, 1))
    more = {f"params_g{i}": np.arange(len(trials)) for i in range(n_dims - 3)}
    dims = (*DIMS, *(Dimension(f"g{i}", low=0, high=50) for i in range(n_dims - 3)))
    told = fitted((trials.assign(**more).head(n), epochs[epochs["number"] < n]), dims)
    assert told.why_empty is not None
    assert f"needs at least {max(MIN_TRIALS, 4 * n_dims)} trials" in told.why_empty
    assert f"has {n}." in told.why_empty
    assert told.rank_correlation is None and not told.is_trusted
    assert partial_dependence(told, np.random.default_rng(0)) == ()
    assert local_importance(told, np.random.default_rng(0)) == ()


def test_equal_accuracies_and_single_values_are_refused() -> None:
    trials, epochs = planted(30)
    equal = trials.assign(value=0.5, state="complete")
    assert "same accuracy" in str(fitted((equal, epochs)).why_empty)
    single = (Dimension("f1", low=1.0, high=1.0),)
    assert "more than one value" in str(fitted((trials, epochs), single).why_empty)


def test_diverged_trials_are_the_worst_and_what_says_nothing_is_left_out() -> None:
    trials, epochs = mixed(30, 0)
    lowest = trials["value"].iloc[5:].min()
    trials.loc[0, ["state", "reason"]] = ["failed", "diverged: the loss is nan"]
    trials.loc[1, ["state", "reason"]] = ["failed", "out of memory"]
    trials.loc[2, "state"] = "running"
    trials.loc[3, "origin"] = "same as 9"
    trials.loc[4, "params_lr"] = np.nan
    told = fitted((trials, epochs), MIXED)
    assert told.numbers == (0, *range(5, 30))
    assert told.states[0] == "diverged"
    assert told.scores[0] == pytest.approx(min(lowest, trials.loc[4, "value"]))


def test_places_without_trials_are_told_and_have_a_wide_band() -> None:
    trials, epochs = mixed(60, 1)
    place = np.log10(trials["params_lr"])
    trials["params_lr"] = 10 ** (-4 + (place + 4) * 0.5)  # nothing above 0.003
    trials["params_depth"] = trials["params_depth"].replace(3, 2)
    trials["value"] = accuracy(
        trials["params_lr"], trials["params_depth"], trials["params_net"].to_numpy()
    )
    told = partial_dependence(fitted((trials, epochs), MIXED), np.random.default_rng(0), 40)
    lr, depth, net = told
    width = np.array(lr.high) - np.array(lr.low)
    assert lr.n_near[-1] == 0 and min(lr.n_near[2:10]) > 0
    assert width[-1] > 3 * width[6]
    counts = trials["params_depth"].value_counts()
    assert depth.n_near == tuple(int(counts.get(value, 0)) for value in range(6))
    assert sum(net.n_near) == 60


def test_values_are_those_of_the_dimension() -> None:
    dims = (*MIXED, Dimension("batch", low=1, high=1000, is_log=True, is_int=True))
    trials, epochs = mixed(40, 0)
    trials["params_batch"] = np.random.default_rng(0).integers(1, 1001, 40)
    lr, depth, net, batch = partial_dependence(
        fitted((trials, epochs), dims), np.random.default_rng(0), 0, 9
    )
    assert lr.values == pytest.approx(np.geomspace(1e-4, 1e-1, 9))
    assert depth.values == tuple(range(6))
    assert net.values == ("a", None, "c")
    assert batch.values == (1, 2, 6, 13, 32, 75, 178, 422, 1000)
    assert net.mean == net.low == net.high


def test_the_average_is_that_of_the_process_and_its_spread_too() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor

    told = fitted(mixed(40, 0), MIXED)
    process = GaussianProcessRegressor(told.kernel, optimizer=None, normalize_y=True)
    process.fit(told.inputs, told.scores)
    mean, std = _averaged(told, process, np.arange(40), 1, (0, 5))
    for g, place in enumerate((0.0, 1.0)):
        moved = told.inputs.copy()
        moved[:, 1] = place
        slow, covariance = process.predict(moved, return_cov=True)
        noise = told.kernel.k2.noise_level * told.scores.var() / len(moved)
        assert mean[g] == pytest.approx(slow.mean())
        assert std[g] ** 2 == pytest.approx(covariance.mean() - noise, abs=1e-9)
    along = partial_dependence(told, np.random.default_rng(0), 0)[1]
    assert (along.mean[0], along.mean[-1]) == pytest.approx(tuple(mean))


def test_shares_add_up_lie_in_their_intervals_and_repeat() -> None:
    told = fitted(mixed(40, 3), MIXED)
    around = local_importance(told, np.random.default_rng(2), 30)
    assert sum(factor.share for factor in around) == pytest.approx(1)
    assert all(0 <= f.low <= f.share <= f.high <= 1 for f in around)
    assert [f.share for f in around] == sorted((f.share for f in around), reverse=True)
    assert around == local_importance(told, np.random.default_rng(2), 30)
    along = partial_dependence(told, np.random.default_rng(2), 10)
    assert along == partial_dependence(told, np.random.default_rng(2), 10)
    for line in along:
        assert all(np.array(line.low) <= line.mean) and all(np.array(line.mean) <= line.high)


def dependence(dim: Dimension, values: tuple[Any, ...]) -> PartialDependence:
    mean = np.linspace(0.7, 0.9, len(values))
    near = tuple(int(i % 3 != 1) for i in range(len(values)))
    ends = [tuple((mean + by).tolist()) for by in (0.0, -0.05, 0.02)]
    return PartialDependence(dim, values, *ends, near)


LONG = tuple(f"timm:tf_efficientnet_lite{i}.in1k_a_long_name" for i in range(9))
EPOCHS = tuple(
    EpochRank(e, Interval(0.1 * e, 0.1 * e - 0.3, 0.1 * e + 0.1), None, 20, e % 2)
    for e in range(6)
)
PLOTS: dict[str, Callable[[Axes], Axes]] = {
    "log range": lambda ax: plot_partial_dependence(
        dependence(MIXED[0], tuple(np.geomspace(1e-4, 1e-1, 9).tolist())), ax
    ),
    "range": lambda ax: plot_partial_dependence(dependence(DIMS[0], (0.0, 0.5, 1.0)), ax),
    "whole numbers": lambda ax: plot_partial_dependence(dependence(MIXED[1], tuple(range(6))), ax),
    "choices": lambda ax: plot_partial_dependence(dependence(MIXED[2], ("a$b$", None, 2)), ax),
    "long names": lambda ax: plot_partial_dependence(
        dependence(Dimension("backbone", choices=LONG), LONG), ax
    ),
    "around": lambda ax: plot_local_importance(
        [LocalFactor("a$b$", 0.9, 0.5, 1.0, 0.2), LocalFactor("b", 0.1, 0.0, 0.4, 0.001)], ax
    ),
    "early": lambda ax: plot_early_rank(EarlyRank(EPOCHS, 20, 3, None), ax),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_draws_and_repeats_itself(name: str) -> None:
    first = render(PLOTS[name], (4.6, 3.1), "svg")
    assert first == render(PLOTS[name], (4.6, 3.1), "svg")
    assert first != render(PLOTS[name], (4.6, 3.1), "svg", is_dark=True)


def test_long_names_stay_different() -> None:
    with style():
        ax = PLOTS["long names"](Figure().add_subplot())
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(set(labels)) == len(LONG)
