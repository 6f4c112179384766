"""The frames behind the plots and tables of a search."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.frames import (
    Dimension,
    accuracy_of_best,
    best_number,
    busy_seconds,
    confused_pairs,
    cost_frame,
    dimensions,
    history_frame,
    is_copy,
    is_diverged,
    is_on_front,
    slice_frame,
)


def trials_of(**columns: Any) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    starts = pd.date_range("2026-03-01", periods=n, freq="min")
    plain = {
        "number": range(n), "state": "complete", "reason": None, "origin": "sampler",
        "value": 0.5, "score": np.nan, "started_at": starts,
        "ended_at": starts + pd.Timedelta(minutes=1), "duration_s": 60.0,
        "backbone": "resnet18", "freeze_depth": 0,
    }  # fmt: skip
    return pd.DataFrame(plain | columns)


def test_dimensions_come_from_the_space_in_its_order() -> None:
    trials = trials_of(params_b=["x", "y"], params_a=[0.1, 0.2], params_n=[1, 2])
    space = {
        "a": {"low": 0.01, "high": 1.0, "log": True},
        "n": {"low": 0, "high": 5},
        "b": {"choices": ["y", "x", "z"]},
        "unused": {"low": 0, "high": 1},
    }
    assert dimensions(space, trials) == (
        Dimension("a", low=0.01, high=1.0, is_log=True),
        Dimension("n", low=0, high=5, is_int=True),
        Dimension("b", choices=("y", "x", "z")),
    )


def test_dimensions_without_a_space_are_read_from_the_values() -> None:
    rates = [10.0**-i for i in range(8)]
    names = ["sgd", "adamw"] * 4
    assert dimensions({}, trials_of(params_lr=rates, params_o=names, params_n=range(8))) == (
        Dimension("lr", low=1e-7, high=1.0, is_log=True),
        Dimension("o", choices=("adamw", "sgd")),
        Dimension("n", low=0, high=7, is_int=True),
    )


def test_a_column_with_gaps_gives_back_what_was_suggested() -> None:
    whole = Dimension("n", low=0, high=5, is_int=True)
    assert whole.value(np.float64(3.0)) == 3 and isinstance(whole.value(np.float64(3.0)), int)
    assert Dimension("c", choices=(None, 1.0)).value(np.nan) is None
    with pytest.raises(KeyError, match="n"):
        whole.value(np.nan)


def test_the_best_is_the_earliest_of_the_highest_finished() -> None:
    states = ["complete", "complete", "complete", "pruned"]
    assert best_number(trials_of(value=[0.5, 0.9, 0.9, 0.95], state=states)) == 1
    assert best_number(trials_of(value=[0.5, 0.6], state=["failed", "pruned"])) == 1
    assert best_number(trials_of(value=[None, 0.6], state=["complete", "failed"])) is None


def test_diverged_and_copied_trials_are_told_from_the_others() -> None:
    trials = trials_of(
        state=["failed", "failed", "complete", "pruned"],
        reason=["diverged: loss is nan", "out of memory: no", None, "pruned after epoch 3"],
        origin=["sampler", "retry of 3", "same as 0", "recipe:same as"],
    )
    assert is_diverged(trials).tolist() == [True, False, False, False]
    assert is_copy(trials).tolist() == [False, False, True, False]


def test_busy_seconds_leave_pauses_out_and_count_overlaps_once() -> None:
    at = pd.to_datetime([0, 10, 12, 1000, 1500], unit="s")
    end = pd.to_datetime([20, 15, 30, 1010, None], unit="s")
    found = busy_seconds(trials_of(started_at=at, ended_at=end))
    assert found.tolist()[:4] == [20.0, 15.0, 30.0, 40.0]
    assert np.isnan(found.iloc[4])


def test_slices_hold_scored_trials_only() -> None:
    states = ["complete", "failed", "pruned", "running"]
    trials = trials_of(value=[0.5, None, 0.6, 0.7], state=states, params_b=list("xyzx"))
    found = slice_frame(trials, Dimension("b", choices=("z", "x", "y")))
    assert found.values.tolist() == [[0, 1.0, 0.5, "complete"], [2, 0.0, 0.6, "pruned"]]


def test_the_front_has_what_nothing_beats() -> None:
    cost, value = [3, 1, 2, 2, 5, 1], [0.9, 0.5, 0.5, 0.8, 0.9, 0.5]
    assert is_on_front(cost, value).tolist() == [True, True, False, True, False, False]
    origins = ["sampler", "same as 0", "sampler"]  # a copy costs nothing
    trials = trials_of(value=[0.8, 0.8, 0.9], duration_s=[60.0, 0.0, 5.0], origin=origins)
    found = cost_frame(trials.assign(state=["complete", "complete", "pruned"]))
    assert found[["number", "is_front"]].values.tolist() == [[0, True], [2, False]]


def test_confused_pairs_are_the_commonest_first() -> None:
    matrix = np.array([[8, 2, 0], [0, 5, 5], [1, 0, 0]])
    found = confused_pairs(matrix, ["a", "b", "c"], n_pairs=2)
    assert found.values.tolist() == [["b", "c", 5, 0.5], ["a", "b", 2, 0.2]]
    assert confused_pairs(np.eye(3), ["a", "b", "c"]).empty


def test_history_keeps_the_best_finished_trial_by_its_score_where_there_is_one() -> None:
    states = ["complete", "pruned", "complete", "failed"]
    found = history_frame(trials_of(value=[0.5, 0.9, 0.7, None], state=states))
    assert found["best"].tolist() == [0.5, 0.5, 0.7, 0.7]
    trials = trials_of(value=[0.5, 0.9, 0.7], score=[0.6, 0.4, 0.8])
    assert best_number(trials) == 2
    assert history_frame(trials)["best"].tolist() == [0.5, 0.5, 0.7]


def test_an_epoch_is_shown_with_the_accuracy_of_the_best_so_far() -> None:
    epochs = pd.DataFrame(
        {"number": [0, 0, 0, 1, 1], "val_acc": [0.5, 0.9, 0.7, 0.2, 0.1],
         "score": [0.3, 0.2, 0.4, 0.5, 0.6]}
    )  # fmt: skip
    assert accuracy_of_best(epochs).tolist() == [0.5, 0.5, 0.7, 0.2, 0.1]
    assert accuracy_of_best(epochs.drop(columns="score")).tolist() == [0.5, 0.9, 0.9, 0.2, 0.2]
