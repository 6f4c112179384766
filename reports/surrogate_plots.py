"""Plots of the search analysis: each setting's effect on average, at the best, and how early."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.fidelity import EarlyRank, EpochRank
from reports.frames import Dimension
from reports.intervals import Interval
from reports.style import (
    BLUE,
    GREY,
    ORANGE,
    accuracy_axis,
    drawable,
    entry,
    ink,
    legend_above,
    plain_log_axis,
)
from reports.surrogate import LocalFactor, PartialDependence
from reports.words import plural, setting

# As many whole numbers as this are drawn as marks with names, not as a line; more choices than
# the second turn the axes, so that long names have a line each.
_MAX_LISTED, _MAX_UPRIGHT = 12, 5


def plot_partial_dependence(result: PartialDependence, ax: Axes) -> Axes:
    """Draw one setting's average predicted accuracy with its band.

    Where no trial lies near, the line is dashed, marks are hollow, and the band is grey: there
    the model guesses. Many choices are drawn below one another.

    Args:
        result: One of `partial_dependence`.
        ax: Drawn on.
    """
    dim = result.dimension
    if dim.choices:
        _draw_choices(result, ax)
    elif dim.is_int and len(result.values) <= _MAX_LISTED:
        _draw_marks(result, np.array(result.values, dtype=float), ax)
        ax.xaxis.set_major_locator(MaxNLocator(_MAX_LISTED, integer=True))
        ax.set_xlim(dim.low - 0.6, dim.high + 0.6)
        _label(ax, dim)
    else:
        _draw_line(result, ax)
        _label(ax, dim)
    return ax


def _label(ax: Axes, dim: Dimension) -> None:
    ax.set_xlabel(drawable(dim.name, 40))
    ax.set_ylabel("Predicted accuracy")
    accuracy_axis(ax.yaxis)


def _draw_line(result: PartialDependence, ax: Axes) -> None:
    dim = result.dimension
    x = np.array(result.values, dtype=float)
    is_bare = np.array(result.n_near) == 0
    # A stretch between a value with trials and one without is bare.
    beside = is_bare | np.append(is_bare[1:], False) | np.insert(is_bare[:-1], 0, False)
    ax.fill_between(x, result.low, result.high, where=~is_bare, color=BLUE, alpha=0.25, lw=0)
    ax.fill_between(x, result.low, result.high, where=beside, color=GREY, alpha=0.25, lw=0)
    ax.plot(x, result.mean, color=GREY, ls=(0, (3, 2)))
    ax.plot(x, np.where(is_bare, np.nan, result.mean), color=BLUE, lw=2)
    entries = [_line(BLUE, "mean, with 95 % band")]
    if is_bare.any():
        entries.append(_line(GREY, "no trial near", ls=(0, (3, 2))))
    if dim.is_log:
        ax.set_xscale("log")
        ax.set_xlim(dim.low, dim.high)
        plain_log_axis(ax.xaxis)
    else:
        ax.set_xlim(dim.low, dim.high)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=dim.is_int))
    legend_above(ax, entries)


def _line(color: str, label: str, ls: Any = "-") -> Line2D:
    return Line2D([], [], color=color, label=label, linestyle=ls, lw=2)


def _draw_marks(
    result: PartialDependence, at: "np.ndarray[tuple[int], np.dtype[np.float64]]", ax: Axes,
    *, is_turned: bool = False,
) -> None:  # fmt: skip
    """Draw values as marks with whiskers; turned, the accuracy runs to the right."""
    mean, low, high = (np.array(v) for v in (result.mean, result.low, result.high))
    is_bare = np.array(result.n_near) == 0
    entries = []
    for part, color, face, label in (
        (~is_bare, BLUE, BLUE, "mean, with 95 % interval"),
        (is_bare, GREY, "none", "no trial has it"),
    ):
        if not part.any():
            continue
        whiskers = np.vstack([mean - low, high - mean])[:, part]
        look: dict[str, Any] = {
            "fmt": "o",
            "color": color,
            "markerfacecolor": face,
            "ms": 5,
            "capsize": 2.5,
        }
        if is_turned:
            ax.errorbar(mean[part], at[part], xerr=whiskers, elinewidth=1.3, **look)
        else:
            ax.errorbar(at[part], mean[part], yerr=whiskers, elinewidth=1.3, **look)
        entries.append(entry("o", color, label, markerfacecolor=face))
    legend_above(ax, entries)


def _draw_choices(result: PartialDependence, ax: Axes) -> None:
    names = _told_apart([setting(value) for value in result.values])
    at = np.arange(len(names), dtype=float)
    if len(names) <= _MAX_UPRIGHT and sum(map(len, names)) <= 30:
        _draw_marks(result, at, ax)
        ax.set_xticks(at, names)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.grid(visible=False, axis="x")
        _label(ax, result.dimension)
        return
    _draw_marks(result, at, ax, is_turned=True)
    ax.set_yticks(at, names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_ylabel(drawable(result.dimension.name, 26))
    ax.set_xlabel("Predicted accuracy")
    accuracy_axis(ax.xaxis)


def _told_apart(names: Sequence[str]) -> list[str]:
    """Shorten names no further than leaves them different."""
    for limit in (22, 32, 48):
        short = [drawable(name, limit) for name in names]
        if len(set(short)) == len(names):
            break
    return short


def plot_local_importance(result: Sequence[LocalFactor], ax: Axes) -> Axes:
    """Draw each setting's share around the best trial, most important on top.

    Beside each bar stands how many percentage points the setting moves the prediction: shares of
    nearly nothing add up to 100 % too.

    Args:
        result: From `local_importance`, not empty.
        ax: Drawn on.
    """
    y = np.arange(len(result), dtype=float)
    share, low, high = (
        np.array([getattr(factor, end) for factor in result]) for end in ("share", "low", "high")
    )
    ax.barh(y, share, height=0.55, color=BLUE)
    whiskers = np.vstack([share - low, high - share])
    ax.errorbar(share, y, xerr=whiskers, fmt="none", ecolor=ink(), elinewidth=1.1, capsize=2.5)
    for at, end, factor in zip(y, high, result, strict=True):
        ax.annotate(
            f"{100 * factor.span:.1f} pts", (end, at), (6, 0),
            textcoords="offset points", va="center", fontsize=7.5,
        )  # fmt: skip
    ax.set_yticks(y, [drawable(factor.name) for factor in result])
    ax.invert_yaxis()
    # The longest note needs about a fifth of the width.
    ax.set_xlim(0, max(float(high.max()), 0.1) * 1.25)
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= 1])
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("Share of the variance around the best trial")
    legend_above(ax, [entry("s", BLUE, "with 95 % interval, and the span of the prediction")])
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
        told = _known(result.epochs, name)
        if not told:
            continue
        x = [epoch.epoch + 1 for epoch, _ in told]
        low, mid, high = np.array([(i.low, i.estimate, i.high) for _, i in told]).T
        ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        ax.plot(x, mid, color=color, marker=marker, ms=3.5, ls=line)
        entries.append(entry(marker, color, names[name], linestyle=line))
        lows.append(float(low.min()))
    # From 0, or from below where an interval goes there; from 0.5 where nothing lies under it.
    foot = 0.5 if min(lows) > 0.55 else min(0.0, *lows)
    ax.set_ylim(foot - 0.05, 1.03)
    stops = [epoch.epoch + 1 for epoch in result.epochs if epoch.n_stopped]
    if stops:
        ax.plot(
            stops, np.full(len(stops), 0.025), "x", color=ink(), ms=5, clip_on=False,
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
        entries.append(
            entry("x", ink(), f"{plural(result.n_pruned, 'pruned trial')}, not counted")
        )
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlabel(f"Epoch ({plural(result.n_complete, 'finished trial')})")
    ax.set_ylabel("Rank correlation with the end")
    legend_above(ax, entries)
    return ax


def _known(epochs: Sequence[EpochRank], name: str) -> list[tuple[EpochRank, Interval]]:
    told = [(epoch, getattr(epoch, name)) for epoch in epochs]
    return [(epoch, interval) for epoch, interval in told if interval is not None]
