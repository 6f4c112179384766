"""Plots of the trials: history, curves, cost, and what the best one confuses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.fidelity import EarlyRank, EpochRank
from reports.intervals import Interval
from reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    accuracy_axis,
    drawable,
    entry,
    legend_above,
    plain_log_axis,
    scatter_states,
)
from reports.words import plural

_BACKBONE_COLOURS = (BLUE, RED, GREEN, PURPLE, SKY, GREY)
_BACKBONE_MARKERS = "osD^vP"
_MAX_COUNTED_CLASSES = 12
MAX_NAMED_CLASSES = 40
"""With more classes than this, a confusion matrix numbers them."""


def plot_history(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Draw every trial's accuracy and the best finished one so far.

    Args:
        frame: From `history_frame`.
        ax: Drawn on.
    """
    entries = scatter_states(frame, "number", ax)
    steps = frame.dropna(subset=["best"])
    ax.step(steps["number"], steps["best"], where="post", color=GREEN)
    entries.append(Line2D([], [], color=GREEN, label="best so far"))
    failed = frame[frame["state"] == "failed"]
    if len(failed):
        bottom = ax.get_xaxis_transform()
        y = np.full(len(failed), 0.02)
        ax.plot(failed["number"], y, "v", color=RED, ms=4, transform=bottom)
        entries.append(entry("v", RED, "failed"))
    ax.set_xlabel("Trial")
    ax.set_ylabel("Validation accuracy")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy_axis(ax.yaxis)
    legend_above(ax, entries)
    return ax


def _time_unit(seconds: "pd.Series[float]") -> tuple[float, str]:
    longest = seconds.max()
    if longest > 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest > 180 else (1.0, "seconds")


def plot_curves(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Draw validation accuracy by epoch; pruned trials dashed, with a cross where they stopped.

    Args:
        frame: From `curves_frame`.
        ax: Drawn on.
    """
    n = frame["number"].nunique()
    faint = max(0.25, min(0.8, 12 / max(n, 1)))
    looks: dict[str, dict[str, Any]] = {
        "complete": {"color": BLUE, "linewidth": 1.0, "alpha": faint},
        "pruned": {"color": ORANGE, "linewidth": 1.0, "alpha": max(faint, 0.45), "ls": "--"},
        "failed": {"color": RED, "linewidth": 1.0, "alpha": 0.8, "ls": ":"},
        "running": {"color": PURPLE, "linewidth": 1.0, "alpha": 0.8, "ls": "-."},
    }
    looks["interrupted"] = looks["running"]
    names = {
        "complete": "finished",
        "pruned": "pruned",
        "failed": "failed",
        "running": "running",
        "interrupted": "interrupted",
    }
    ends = {"pruned": "x", "failed": "v"}
    entries = []
    for state, look in looks.items():
        part = frame[(frame["state"] == state) & ~frame["is_best"]]
        for _, curve in part.groupby("number"):
            dot = "." if len(curve) == 1 else ""
            ax.plot(curve["epoch"], curve["val_acc"], marker=dot, **look)
            if state in ends:
                ax.plot(
                    curve["epoch"].iloc[-1], curve["val_acc"].iloc[-1],
                    ends[state], color=look["color"], ms=4, alpha=0.9,
                )  # fmt: skip
        if len(part):
            more = "more " if (frame["is_best"] & (frame["state"] == state)).any() else ""
            label = f"{part['number'].nunique()} {more}{names[state]}"
            entries.append(
                Line2D(
                    [],
                    [],
                    color=look["color"],
                    ls=look.get("ls", "-"),
                    label=label,
                    marker=ends.get(state, ""),
                    ms=4,
                )  # fmt: skip
            )
    best = frame[frame["is_best"]]
    if len(best):
        dot = "o" if len(best) == 1 else ""
        ax.plot(best["epoch"], best["val_acc"], color=GREEN, lw=2.2, marker=dot)
        label = f"best (trial {best['number'].iloc[0]})"
        entries.insert(0, Line2D([], [], color=GREEN, lw=2.2, label=label))
    ax.set_xlabel("Epochs trained")
    ax.set_ylabel("Validation accuracy")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy_axis(ax.yaxis)
    legend_above(ax, entries)
    return ax


def plot_cost(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Draw accuracy against duration; the front of what is worth its time is a line.

    Args:
        frame: From `cost_frame`.
        ax: Drawn on.
    """
    scale, unit = _time_unit(frame["duration_s"])
    common = frame["backbone"].value_counts().index[: len(_BACKBONE_COLOURS) - 1]
    entries = []
    for i, name in enumerate([*common, None]):
        of_name = frame["backbone"] == name if name else ~frame["backbone"].isin(common)
        colour, marker = _BACKBONE_COLOURS[i], _BACKBONE_MARKERS[i]
        part = frame[of_name]
        if not len(part):
            continue
        done = part[part["state"] == "complete"]
        stopped = part[part["state"] == "pruned"]
        look: dict[str, Any] = {"marker": marker, "s": 22, "edgecolors": colour}
        ax.scatter(done["duration_s"] / scale, done["value"], facecolors=colour, **look)
        ax.scatter(
            stopped["duration_s"] / scale, stopped["value"], facecolors="none", alpha=0.6, **look
        )
        entries.append(entry(marker, colour, drawable(name or "others")))
    front = frame[frame["is_front"]].sort_values("duration_s")
    if len(front):
        ax.step(front["duration_s"] / scale, front["value"], where="post", color=INK, lw=1)
        ring: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidths": 1.1}
        ax.scatter(front["duration_s"] / scale, front["value"], s=70, **ring)
        for _, row in front.iterrows():
            ax.annotate(
                f"{row['number']}", (row["duration_s"] / scale, row["value"]),
                xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7.5,
            )  # fmt: skip
        entries.append(
            Line2D(
                [],
                [],
                color=INK,
                lw=1,
                marker="o",
                mfc="none",
                ms=7,
                label="best for its time",
            )
        )
    if (frame["state"] == "pruned").any():
        entries.append(entry("o", GREY, "hollow: pruned", markerfacecolor="none"))
    ax.margins(y=0.1)
    ax.set_xlabel(f"Duration of the trial ({unit})")
    ax.set_ylabel("Validation accuracy")
    if (
        frame["duration_s"].min() > 0
        and frame["duration_s"].max() > 20 * frame["duration_s"].min()
    ):
        ax.set_xscale("log")
        plain_log_axis(ax.xaxis)
    accuracy_axis(ax.yaxis)
    legend_above(ax, entries)
    return ax


def plot_confusion(matrix: np.ndarray[Any, Any], classes: Sequence[str], ax: Axes) -> Axes:
    """Draw a confusion matrix as shares of the true class, with counts where there is room.

    Args:
        matrix: Counts, shape (K, K), rows = truth.
        classes: K names.
        ax: Drawn on.
    """
    n_classes = len(classes)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.grid(visible=False)
    if n_classes <= _MAX_COUNTED_CLASSES:
        for (i, j), n in np.ndenumerate(matrix):
            if n:
                colour = "white" if shares[i, j] > 0.55 else INK
                ax.text(j, i, str(n), ha="center", va="center", fontsize=7.5, color=colour)
    if n_classes <= MAX_NAMED_CLASSES:
        names = [drawable(name, 18) for name in classes]
        size = 8 if n_classes <= 16 else 5.5
        ax.set_xticks(range(n_classes), names, rotation=90, fontsize=size)
        ax.set_yticks(range(n_classes), names, fontsize=size)
    else:
        ax.set_title(f"{n_classes} classes, by number", loc="left")
    ax.tick_params(length=0 if n_classes <= MAX_NAMED_CLASSES else 2)
    ax.set_xlabel("Predicted")
    ax.set_ylabel("True class")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("Share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return ax


def plot_early_rank(result: EarlyRank, ax: Axes) -> Axes:
    """Draw the rank correlation with the final accuracy, epoch by epoch, with 95 % bands.

    Crosses at the foot mark epochs after which trials were pruned; those are in no correlation.

    Args:
        result: From `early_rank_correlation`, not empty.
        ax: Drawn on.
    """
    names = {"at_epoch": "accuracy at the epoch", "best_so_far": "best so far"}
    looks = {"at_epoch": (ORANGE, "o", "--"), "best_so_far": (BLUE, "s", "-")}
    entries, lows = [], [1.0]
    for name, (color, marker, line) in looks.items():
        known = _known(result.epochs, name)
        if not known:
            continue
        x = [epoch.epoch for epoch, _ in known]
        low, mid, high = np.array([(i.low, i.estimate, i.high) for _, i in known]).T
        ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        ax.plot(x, mid, color=color, marker=marker, ms=3.5, ls=line)
        entries.append(entry(marker, color, names[name], linestyle=line))
        lows.append(float(low.min()))
    # From 0, or from below where an interval goes there; from 0.5 where nothing lies under it.
    foot = 0.5 if min(lows) > 0.55 else min(0.0, *lows)
    ax.set_ylim(foot - 0.05, 1.03)
    stops = [epoch.epoch for epoch in result.epochs if epoch.n_stopped]
    if stops:
        ax.plot(
            stops, np.full(len(stops), 0.025), "x", color=INK, ms=5, clip_on=False,
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
        entries.append(entry("x", INK, f"{plural(result.n_pruned, 'pruned trial')}, not counted"))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlabel(f"Epoch ({plural(result.n_complete, 'finished trial')})")
    ax.set_ylabel("Rank correlation with the end")
    legend_above(ax, entries)
    return ax


def _known(epochs: Sequence[EpochRank], name: str) -> list[tuple[EpochRank, Interval]]:
    known = [(epoch, getattr(epoch, name)) for epoch in epochs]
    return [(epoch, interval) for epoch, interval in known if interval is not None]
