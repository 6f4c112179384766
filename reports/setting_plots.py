"""Plots of the searched settings: their importance, each by itself, and two together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.frames import Dimension, best_number
from reports.importance import FactorImportance
from reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    accuracy_axis,
    drawable,
    entry,
    legend_above,
    plain_log_axis,
    scatter_states,
)
from reports.words import setting


def plot_importance(factors: Sequence[FactorImportance], ax: Axes) -> Axes:
    """Draw importance with intervals, most important on top, and Optuna's own figure beside it.

    Args:
        factors: Most important first.
        ax: Drawn on.
    """
    y = np.arange(len(factors), dtype=float)
    share = np.array([factor.share for factor in factors])
    low = np.array([factor.low for factor in factors])
    high = np.array([factor.high for factor in factors])
    ax.barh(y, share, height=0.55, color=BLUE)
    whiskers = np.vstack([share - low, high - share])
    ax.errorbar(share, y, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)
    own = [
        (factor.completed_only, i)
        for i, factor in enumerate(factors)
        if factor.completed_only is not None
    ]
    entries = [
        entry("s", BLUE, "all trials, with 95 % interval"),
    ]
    if own:
        own_x, own_y = zip(*own, strict=True)
        ax.scatter(
            own_x,
            own_y,
            marker="D",
            s=26,
            facecolor=ORANGE,
            edgecolor=INK,
            lw=0.7,
            zorder=4,
        )
        entries.append(entry("D", ORANGE, "Optuna's own: finished trials only"))
    ax.set_yticks(y, [drawable(factor.name) for factor in factors])
    ax.invert_yaxis()
    ax.set_xlim(0, min(1.02, max(float(high.max()), *(x for x, _ in own), 0.1) * 1.08))
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("Share of the importance")
    legend_above(ax, entries)
    return ax


def plot_slice(frame: pd.DataFrame, dimension: Dimension, ax: Axes) -> Axes:
    """Draw one setting against accuracy.

    Args:
        frame: From `slice_frame`.
        dimension: The setting.
        ax: Drawn on.
    """
    data = frame
    is_listed = bool(dimension.choices) or dimension.is_int and dimension.high - dimension.low < 12
    if is_listed:
        # Spread trials of equal settings by their number, the same way every time.
        spread = 0.5 * ((data["number"] * 0.618034) % 1 - 0.5)
        data = data.assign(x=data["x"] + spread)
    scatter_states(data, "x", ax)
    finished = frame[frame["state"] == "complete"]
    if is_listed and len(finished):
        medians = finished.groupby("x")["value"].median()
        ax.hlines(medians, medians.index - 0.32, medians.index + 0.32, color=GREEN, lw=2)
    if dimension.choices:
        names = [drawable(setting(choice), 18) for choice in dimension.choices]
        is_long = sum(map(len, names)) > 22
        ax.set_xticks(
            range(len(names)),
            names,
            rotation=25 if is_long else 0,
            ha="right" if is_long else "center",
        )
        ax.set_xlim(-0.6, len(names) - 0.4)
    elif dimension.is_log:
        # Before the scale: an axis of one value only cannot be turned into a logarithmic one.
        ax.set_xlim(dimension.low / 1.15, dimension.high * 1.15)
        ax.set_xscale("log")
        plain_log_axis(ax.xaxis)
    else:
        n_ticks = 12 if is_listed else 6
        ax.xaxis.set_major_locator(MaxNLocator(n_ticks, integer=dimension.is_int))
        margin = 0.6 if is_listed else 0.04 * (dimension.high - dimension.low)
        ax.set_xlim(dimension.low - margin, dimension.high + margin)
    ax.set_xlabel(drawable(dimension.name, 40))
    accuracy_axis(ax.yaxis)
    return ax


def plot_depth_lr(frame: pd.DataFrame, ax: Axes, *, is_log: bool = True) -> Axes:
    """Draw the map of freeze depth and base learning rate, coloured by accuracy.

    Args:
        frame: From `depth_lr_frame`, not empty.
        ax: Drawn on.
        is_log: The learning rate was searched in the logarithm.
    """
    # The best is ringed; equal depths are spread a little, the same way every time.
    y = frame["freeze_depth"] + 0.5 * ((frame["number"] * 0.618034) % 1 - 0.5)
    low, high = frame["value"].min(), frame["value"].max()
    norm = Normalize(low, high if high > low else low + 0.01)
    points = None
    for state, marker, size in (("pruned", "X", 30), ("complete", "o", 42)):
        part = frame[frame["state"] == state]
        points = ax.scatter(
            part["base_lr"], y[part.index], c=part["value"], cmap="viridis", norm=norm,
            marker=marker, s=size, linewidths=0.5, edgecolors=INK,
        )  # fmt: skip
    finished = frame[frame["state"] == "complete"]
    entries = [entry("o", GREY, "finished")] if len(finished) else []
    if len(finished) < len(frame):
        entries.append(entry("X", GREY, "pruned"))
    if len(finished):
        at = frame.index[frame["number"] == best_number(finished)][0]
        ring: dict[str, Any] = {"facecolor": "none", "edgecolor": RED, "linewidths": 1.8, "s": 130}
        ax.scatter(frame.loc[at, "base_lr"], y[at], **ring)
        label = f"best (trial {frame.loc[at, 'number']})"
        entries.append(entry("o", RED, label, markerfacecolor="none", markersize=8))
    if is_log:
        ax.set_xscale("log")
        plain_log_axis(ax.xaxis)
    assert points is not None
    bar = ax.figure.colorbar(points, ax=ax, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("Validation accuracy")
    accuracy_axis(bar.ax.yaxis)
    ax.set_xlabel("Base learning rate")
    ax.set_ylabel("Freeze depth (0 = all trained)")
    ax.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.set_ylim(frame["freeze_depth"].min() - 0.6, frame["freeze_depth"].max() + 0.6)
    legend_above(ax, entries)
    return ax
