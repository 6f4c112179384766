"""Every plot of a search draws; names and classes are drawn as they are."""

import io
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures import render
from reports.frames import Dimension
from reports.importance import FactorImportance
from reports.plots import MAX_NAMED_CLASSES, plot_confusion, plot_cost, plot_curves, plot_history
from reports.setting_plots import plot_depth_lr, plot_importance, plot_slice
from reports.style import drawable, style

STATES = ["complete", "pruned", "failed", "complete"]
HISTORY = pd.DataFrame({"number": range(4), "state": STATES, "value": [0.7, 0.5, np.nan, 0.9]})
HISTORY["best"] = [0.7, 0.7, 0.7, 0.9]
CURVES = pd.DataFrame({"number": [0, 0, 1, 3, 3], "epoch": [0, 1, 0, 0, 1], "state": "complete"})
CURVES["val_acc"] = [0.5, 0.7, 0.5, 0.6, 0.9]
CURVES["is_best"] = CURVES["number"] == 3
CURVES.loc[2, "state"] = "pruned"
COST = HISTORY.assign(duration_s=[9.0, 3.0, 1.0, 400.0], backbone=["a$b$", "_c", "d", "a$b$"])
COST = COST[COST["state"] != "failed"].assign(is_front=[True, False, True])
MAP = HISTORY.head(2).assign(freeze_depth=[5, 0], base_lr=[0.01, 0.001])
SLICE = HISTORY.dropna().assign(x=[0.0, 1.0, 1.0])
RATES = SLICE.assign(x=[1e-4, 1e-3, 1e-3])
FACTORS = [
    FactorImportance("a$b$", 0.8, 0.6, 0.9, 0.5, 0.1),
    FactorImportance("b", 0.2, 0.1, 0.4, 0.5, None),
]
MANY = MAX_NAMED_CLASSES + 1

PLOTS: dict[str, Callable[[Axes], Axes]] = {
    "history": lambda ax: plot_history(HISTORY, ax),
    "curves": lambda ax: plot_curves(CURVES, ax),
    "importance": lambda ax: plot_importance(FACTORS, ax),
    "choices": lambda ax: plot_slice(SLICE, Dimension("o", choices=("a$b$", None)), ax),
    "log range": lambda ax: plot_slice(
        RATES, Dimension("lr", low=1e-4, high=1e-2, is_log=True), ax
    ),
    "integers": lambda ax: plot_slice(SLICE, Dimension("n", low=0, high=5, is_int=True), ax),
    "depth and learning rate": lambda ax: plot_depth_lr(MAP, ax),
    "cost": lambda ax: plot_cost(COST, ax),
    "confusion": lambda ax: plot_confusion(np.array([[0, 0], [1, 3]]), ["<b>x</b>", "a$b$"], ax),
    "many classes": lambda ax: plot_confusion(np.eye(MANY), [f"{i}" for i in range(MANY)], ax),
}


def axes_of(name: str) -> Axes:
    with style():
        figure = Figure()
        ax = figure.add_subplot()
        assert PLOTS[name](ax) is ax
        figure.savefig(io.BytesIO())
    return ax


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_draws_the_same_twice_and_leaves_rcparams_alone(name: str) -> None:
    before = dict(mpl.rcParams)
    assert render(PLOTS[name], (4.6, 3.1), "svg") == render(PLOTS[name], (4.6, 3.1), "svg")
    assert dict(mpl.rcParams) == before


def test_names_are_drawn_letter_by_letter() -> None:
    labels = axes_of("confusion").get_xticklabels()
    assert [label.get_text() for label in labels] == ["<b>x</b>", "a$b$"]
    assert not any(label.get_parse_math() for label in labels)
    with style():
        assert drawable("ab\U000f0000") == "ab?"


def test_axes_are_labelled_in_percent_and_plain_numbers() -> None:
    for name in ("history", "curves", "cost"):
        labels = [label.get_text() for label in axes_of(name).get_yticklabels()]
        assert labels and all(label.endswith("%") for label in labels)
    labels = [label.get_text() for label in axes_of("log range").get_xticklabels()]
    assert {"0.0001", "0.001", "0.01"} <= set(labels)
