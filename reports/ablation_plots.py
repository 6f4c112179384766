"""Plots of an ablation: effects, seeds, interactions, a path."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports.ablation import Runs
from reports.effects import Effect, Rules
from reports.factorial import Contrast
from reports.intervals import Interval
from reports.path import Step
from reports.publish import digits_for, signed
from reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    accuracy_axis,
    drawable,
    entry,
    legend_above,
)

# Each verdict has a shape of its own, so that a print without colours can be read.
_LOOKS: dict[str, tuple[str, str, str]] = {
    "helps": ("^", GREEN, "helps"),
    "hurts": ("v", RED, "hurts"),
    "no difference": ("s", BLUE, "no difference beyond the margin"),
    "identical": ("D", BLUE, "identical in all seeds"),
    "inconclusive": ("o", GREY, "inconclusive"),
    "fails": ("X", PURPLE, "runs failed"),
}
_SEED_MARKS = "osD^vP*Xhd<>"
_SEED_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)
_NAME_LETTERS = 34


def points_axis(axis: Any) -> None:
    """Write an axis of fractions as accuracy points with a sign."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    low, high = axis.get_view_interval()
    digits = 0 if high - low > 0.05 else 1
    axis.set_major_formatter(FuncFormatter(lambda x, _: signed(100 * x, digits)))


def plot_forest(effects: Sequence[Effect], rules: Rules, ax: Axes) -> Axes:
    """Draw each level's difference to the baseline with its interval; shapes show the verdict.

    Args:
        effects: In the order of the table.
        rules: Gives the margin, which is shaded.
        ax: Drawn on.
    """
    ax.axvspan(-rules.margin, rules.margin, color=INK, alpha=0.07, lw=0)
    ax.axvline(0, color=INK, lw=0.8)
    for y, effect in enumerate(effects):
        marker, colour, _ = _LOOKS[effect.verdict]
        found = effect.difference
        if math.isfinite(found.low):
            ax.plot([found.low, found.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        if math.isfinite(found.estimate):
            ax.plot(found.estimate, y, marker, color=colour, ms=5, mew=0)
        else:
            ax.plot(0, y, marker, color=colour, ms=6, mew=0)
            ax.annotate(
                "no finished pair", (0, y), xytext=(6, -3), textcoords="offset points", fontsize=7
            )
    _name_rows([effect.arm.label for effect in effects], ax)
    _separate_factors([effect.arm.factor for effect in effects], ax)
    ax.set_xlabel("Difference to the baseline, accuracy points")
    points_axis(ax.xaxis)
    present = {effect.verdict for effect in effects}
    entries = [
        entry(marker, colour, label, markeredgewidth=0)
        for verdict, (marker, colour, label) in _LOOKS.items()
        if verdict in present
    ]
    legend_above(ax, entries)
    return ax


def _name_rows(labels: Sequence[str], ax: Axes) -> None:
    size = 8 if len(labels) <= 16 else 7
    names = [drawable(label, _NAME_LETTERS) for label in labels]
    ax.set_yticks(range(len(labels)), names, fontsize=size)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)


def _separate_factors(factors: Sequence[str], ax: Axes) -> None:
    for y in range(1, len(factors)):
        if factors[y] != factors[y - 1]:
            ax.axhline(y - 0.5, color=INK, alpha=0.13, lw=0.6)


def plot_seeds(runs: Sequence[Runs], first_seed: int, ax: Axes) -> Axes:
    """Draw every run's accuracy; a line joins the runs of one seed over the levels.

    Args:
        runs: The baseline first.
        first_seed: Seed of the first replicate.
        ax: Drawn on.
    """
    n_seeds = max((len(each.arm.values) for each in runs), default=0)
    entries = []
    for seed in range(n_seeds):
        values = [_at(each, seed) for each in runs]
        if not np.isfinite(values).any():
            continue
        colour = _SEED_COLOURS[seed % len(_SEED_COLOURS)]
        marker = _SEED_MARKS[seed % len(_SEED_MARKS)]
        ax.plot(
            values,
            range(len(runs)),
            marker=marker,
            color=colour,
            ms=3.5,
            lw=0.8,
            alpha=0.85,
            mew=0,
        )
        entries.append(
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                ms=4,
                lw=0.8,
                label=f"seed {first_seed + seed}",
            )
        )
    for y, each in enumerate(runs):
        mean = each.arm.accuracy.estimate
        if math.isfinite(mean):
            ax.plot([mean, mean], [y - 0.32, y + 0.32], color=INK, lw=1.8)
    entries.append(Line2D([], [], color=INK, lw=1.8, label="mean"))
    _name_rows([each.arm.label for each in runs], ax)
    ax.set_xlabel("Validation accuracy")
    accuracy_axis(ax.xaxis)
    legend_above(ax, entries)
    return ax


def _at(runs: Runs, seed: int) -> float:
    return float(runs.arm.values[seed]) if seed < len(runs.arm.values) else math.nan


def plot_interactions(contrasts: Sequence[Contrast], names: Sequence[str], ax: Axes) -> Axes:
    """Draw a heat map of factors by factors: main effects on the diagonal, interactions off it.

    Args:
        contrasts: Main effects and interactions, from `estimate_contrasts`.
        names: The factors.
        ax: Drawn on.
    """
    found = {contrast.name: contrast for contrast in contrasts}
    n = len(names)
    values = np.full((n, n), math.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names[: i + 1]):
            contrast = found.get(a if i == j else f"{b} × {a}")
            if contrast is not None:
                values[i, j] = contrast.effect.estimate
    top = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    norm = TwoSlopeNorm(0, -(top or 1.0), top or 1.0)
    image = ax.imshow(values, cmap="PuOr", norm=norm, interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "white" if abs(value) > 0.6 * top else INK
            digits = 1 if top > 0.01 else 2
            contrast = found[names[i] if i == j else f"{names[j]} × {names[i]}"]
            star = "*" if contrast.p_family <= 0.05 else ""
            text = f"{signed(100 * value, digits)}{star}"
            ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    shown = [drawable(name, 18) for name in names]
    ax.set_xticks(range(n), shown, rotation=40, ha="right")
    ax.set_yticks(range(n), shown)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("Effect, accuracy points")
    points_axis(bar.ax.yaxis)
    return ax


def plot_cell_means(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the mean accuracy by the levels of two factors as a heat map.

    Args:
        table: From `interaction_means`: rows one factor's levels, columns the other's.
        ax: Drawn on.
    """
    values = table.to_numpy(dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    span = (high - low) or 0.01
    image = ax.imshow(values, cmap="cividis", vmin=low, vmax=low + span, interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = INK if value - low > 0.6 * span else "white"
            ax.text(
                j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=7.5, color=colour
            )
    ax.set_xticks(range(len(table.columns)), [drawable(name, 16) for name in table.columns])
    ax.set_yticks(range(len(table.index)), [drawable(name, 16) for name in table.index])
    ax.set_xlabel(drawable(table.columns.name or "", 30))
    ax.set_ylabel(drawable(table.index.name or "", 30))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("Mean accuracy")
    accuracy_axis(bar.ax.yaxis)
    return ax


def plot_main_effects(
    means: Sequence[tuple[str, Sequence[tuple[str, Interval]]]], ax: Axes
) -> Axes:
    """Draw each factor's mean accuracy by level, all else averaged, with 95 % t intervals.

    Args:
        means: Factor -> its levels with their means.
        ax: Drawn on.
    """
    x, ticks, labels = 0.0, [], []
    for name, levels in means:
        places = [x + k for k in range(len(levels))]
        centre = [found.estimate for _, found in levels]
        ax.plot(places, centre, color=BLUE, marker="o", ms=4)
        for place, (label, found) in zip(places, levels, strict=True):
            if math.isfinite(found.low):
                ax.plot([place, place], [found.low, found.high], color=BLUE, lw=1.2)
            ticks.append(place)
            labels.append(drawable(f"{name} = {label}", _NAME_LETTERS))
        x = places[-1] + 1.8 if places else x
    ax.set_xticks(ticks, labels, rotation=55, ha="right", rotation_mode="anchor", fontsize=7)
    ax.set_ylabel("Mean validation accuracy")
    ax.grid(visible=False, axis="x")
    accuracy_axis(ax.yaxis)
    return ax


def plot_path(steps: Sequence[Step], ax: Axes) -> Axes:
    """Draw a path as a waterfall: each bar is a step's gain, whiskers its interval.

    Args:
        steps: From `path_steps`, the start first.
        ax: Drawn on.
    """
    level = steps[0].runs.arm.accuracy.estimate
    labels = ["start"]
    ax.barh(0, level, color=GREY, height=0.62)
    for y, step in enumerate(steps[1:], start=1):
        gain = step.gain
        assert gain is not None, "every step but the start has a gain"
        colour = GREEN if gain.estimate >= 0 else RED
        ax.barh(y, gain.estimate, left=level, color=colour, height=0.62)
        if math.isfinite(gain.low):
            ax.plot([level + gain.low, level + gain.high], [y, y], color=INK, lw=1.1)
        half = 100 * (gain.high - gain.low) / 2
        text = signed(100 * gain.estimate, digits_for(half))
        ax.annotate(
            text, (level + max(gain.estimate, gain.high if math.isfinite(gain.high) else 0, 0), y),
            xytext=(4, -3), textcoords="offset points", fontsize=7,
        )  # fmt: skip
        level += gain.estimate
        labels.append(f"{step.factor}: {step.before} → {step.after}")
    end = steps[-1].runs.arm.accuracy.estimate
    ax.barh(len(steps), end, color=BLUE, height=0.62)
    labels.append("end of the path")
    _name_rows(labels, ax)
    seen = [end, *(step.runs.arm.accuracy.estimate for step in steps)]
    gains = [step.gain for step in steps if step.gain is not None]
    reach = max([abs(e) for g in gains for e in (g.low, g.high) if math.isfinite(e)], default=0.0)
    room = max(seen) - min(seen) + reach + 0.01
    ax.set_xlim(max(0, min(seen) - 0.5 * room), min(1.05, max(seen) + 0.6 * room))
    ax.set_xlabel("Validation accuracy")
    accuracy_axis(ax.xaxis)
    return ax


def forest_size(n_rows: int) -> tuple[float, float]:
    """Return the width and height, inches, that a plot with one row a level needs."""
    return 5.6, 1.75 + 0.2 * max(4, n_rows)
