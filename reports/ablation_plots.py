"""Figures of an ablation, for the page and for a paper; each draws on axes that it is given."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from reports.ablation import Runs
from reports.effects import Effect
from reports.publish import digits_for, signed
from reports.words import shorten

# Okabe and Ito's colours, distinct with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#858C97"
INK = "#22262c"  # of text and axes
# Widths of one and of two columns of a two-column page, inches.
WIDTHS = {"": 3.4, "-wide": 6.9}
_DPI = 300
_ROW, _FRAME = 0.19, 1.35  # inches: a row, and what stands around the rows
# Letters per inch of a figure: of names, in a third of the width, and of the legend, measured.
_NAME_LETTERS, _LEGEND_LETTERS = 6.5, 15
# Fonts that may be there for names outside Latin, Greek and Cyrillic scripts.
_MORE_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Hiragino Sans", "PingFang SC", "Arial Unicode MS",
)  # fmt: skip
# What a file would say of when and by what it was written.
_UNSTABLE = {"svg": ("Date",), "png": ("Software",), "pdf": ("CreationDate", "Producer")}
# Each verdict has a shape of its own, so that a print without colours can be read.
_LOOKS: dict[str, tuple[str, str]] = {
    "improves": ("^", GREEN),
    "degrades": ("v", RED),
    "improves on these images": (">", SKY),
    "degrades on these images": ("<", ORANGE),
    "equivalent": ("s", BLUE),
    "identical": ("D", BLUE),
    "inconclusive": ("o", GREY),
    "unfinished": ("o", GREY),
    "fails": ("X", PURPLE),
}
_SEED_MARKS = "osD^vP*Xhd<>"
_SEED_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure that is drawn at any width.

    Attributes:
        name: Of its files, without suffix.
        n_rows: Rows of text at the left, which decide the height; 0 for a fixed one.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], Any]
    n_rows: int = 0

    def render(self, kind: str, width: float) -> bytes:
        """Return the bytes of a `png`, `svg` or `pdf`; the same data give the same bytes."""
        height = _FRAME + _ROW * self.n_rows if self.n_rows else 0.2 * width + 1.6
        with style():
            figure = Figure(figsize=(width, height), dpi=_DPI)
            self.draw(figure.add_subplot())
            buffer = io.BytesIO()
            metadata: Any = dict.fromkeys(_UNSTABLE[kind])
            figure.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()

    def save(self, folder: Path) -> list[Path]:
        """Write PDF, SVG and PNG for one and for two columns of a paper; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for suffix, width in WIDTHS.items():
            for kind in _UNSTABLE:
                name = re.sub(r"[^\w.-]+", "-", self.name)  # factors may be called anything
                paths.append(folder / f"{name}{suffix}.{kind}")
                paths[-1].write_bytes(self.render(kind, width))
        return paths


def style() -> AbstractContextManager[None]:
    """Set how plots look while the context lasts: drawing and saving both belong inside.

    Names are drawn letter by letter (no mathtext), and an SVG of the same data is the same file.
    """
    known = {font.name for font in font_manager.fontManager.ttflist}
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", *(name for name in _MORE_FONTS if name in known)],
        "font.size": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "grid.alpha": 0.13,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "frostline",
        "svg.fonttype": "path",
    }
    return mpl.rc_context(settings)


def plot_forest(effects: Sequence[Effect], margin: float, ax: Axes) -> Axes:
    """Draw each difference with its interval; shapes show the verdict, the band the margin."""
    ax.axvspan(-margin, margin, color=INK, alpha=0.07, lw=0)
    ax.axvline(0, color=INK, lw=0.8)
    for y, effect in enumerate(effects):
        marker, colour = _LOOKS[effect.verdict]
        found = effect.difference
        if math.isfinite(found.low):
            ax.plot([found.low, found.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        if math.isfinite(found.estimate):
            ax.plot(found.estimate, y, marker, color=colour, ms=5, mew=0)
        else:
            ax.plot(0, y, marker, color=colour, ms=6, mew=0)
            ax.annotate("no pair", (0, y), xytext=(6, -3), textcoords="offset points", fontsize=7)
    _name_rows([effect.contrast.label for effect in effects], ax)
    factors = [effect.contrast.factor for effect in effects]
    for y in range(1, len(factors)):
        if factors[y] != factors[y - 1]:
            ax.axhline(y - 0.5, color=INK, alpha=0.13, lw=0.6)
    ax.set_xlabel("Difference, accuracy points")
    ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    low, high = ax.xaxis.get_view_interval()
    digits = 0 if high - low > 0.05 else 1
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: signed(100 * x, digits)))
    present = {effect.verdict for effect in effects}
    entries = [
        Line2D([], [], ls="", marker=marker, ms=5, mew=1.2, color=colour, label=verdict)
        for verdict, (marker, colour) in _LOOKS.items()
        if verdict in present
    ]
    legend_above(ax, entries)
    return ax


def _name_rows(labels: Sequence[str], ax: Axes) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that are drawn on belong to a figure"
    limit = max(16, int(_NAME_LETTERS * figure.get_size_inches()[0]))
    ax.set_yticks(range(len(labels)), [drawable(label, limit) for label in labels], fontsize=7.5)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)


def plot_replicates(runs: Sequence[Runs], names: Sequence[str], ax: Axes) -> Axes:
    """Draw every run's accuracy; a line joins the runs of one replicate over the settings.

    `names` are those of the replicates.
    """
    entries = []
    for r, row in enumerate(np.stack([each.accuracies["val"] for each in runs], axis=1)):
        if not np.isfinite(row).any():
            continue
        look: dict[str, Any] = {
            "color": _SEED_COLOURS[r % len(_SEED_COLOURS)],
            "marker": _SEED_MARKS[r % len(_SEED_MARKS)],
            "lw": 0.8,
        }
        ax.plot(row, range(len(runs)), ms=3.5, alpha=0.85, mew=0, **look)
        entries.append(Line2D([], [], ms=4, label=names[r], **look))
    for y, each in enumerate(runs):
        if math.isfinite(each.mean):
            ax.plot([each.mean, each.mean], [y - 0.32, y + 0.32], color=INK, lw=1.8)
    entries.append(Line2D([], [], color=INK, lw=1.8, label="mean"))
    _name_rows([each.label for each in runs], ax)
    ax.set_xlabel("Validation accuracy")
    accuracy_axis(ax.xaxis)
    legend_above(ax, entries)
    return ax


def plot_interaction(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the mean accuracy by the levels of two factors: parallel lines do not interact.

    The rows of `table` are one factor's levels (the x axis), the columns the other's.
    """
    for k, name in enumerate(table.columns):
        look: dict[str, Any] = {"color": _SEED_COLOURS[k % 6], "marker": _SEED_MARKS[k % 12]}
        label = drawable(f"{table.columns.name} = {name}", 34)
        ax.plot(range(len(table)), table[name].to_numpy(float), lw=1.3, ms=4, label=label, **look)
    ax.set_xticks(range(len(table)), [drawable(name, 16) for name in table.index])
    ax.set_xlabel(drawable(table.index.name or "", 30))
    ax.set_ylabel("Mean accuracy")
    ax.margins(x=0.15)
    accuracy_axis(ax.yaxis)
    legend_above(ax, list(ax.get_lines()))
    return ax


def plot_path(accuracies: Sequence[float], steps: Sequence[Effect], ax: Axes) -> Axes:
    """Draw a path as a waterfall: each bar is a step's gain, whiskers its interval.

    `accuracies` are the means at the start and after each step.
    """
    ax.barh(0, accuracies[0], color=GREY, height=0.62)
    ends = list(accuracies)
    for y, (level, step) in enumerate(zip(accuracies, steps, strict=False), start=1):
        gain = step.difference
        colour = GREEN if gain.estimate >= 0 else RED
        ax.barh(y, gain.estimate, left=level, color=colour, height=0.62)
        if math.isfinite(gain.low):
            ax.plot([level + gain.low, level + gain.high], [y, y], color=INK, lw=1.1)
            ends += [level + gain.low, level + gain.high]
        digits = digits_for(100 * (gain.high - gain.low) / 2)
        ax.annotate(
            signed(100 * gain.estimate, digits), (np.nanmax([level, level + gain.high]), y),
            xytext=(4, -3), textcoords="offset points", fontsize=7,
        )  # fmt: skip
    ax.barh(len(steps) + 1, accuracies[-1], color=BLUE, height=0.62)
    _name_rows(["start", *(step.contrast.label for step in steps), "end"], ax)
    span = max(ends) - min(ends) + 0.01
    ax.set_xlim(max(0, min(ends) - 0.2 * span), min(1.05, max(ends) + 0.3 * span))
    ax.set_xlabel("Validation accuracy")
    accuracy_axis(ax.xaxis)
    return ax


def plot_training_size(runs: Mapping[int, Runs], ax: Axes) -> Axes:
    """Draw accuracy over the number of training images: every run, and the means."""
    for size, each in runs.items():
        ax.plot([size] * len(each.done), each.done, "o", color=GREY, ms=3, mew=0, alpha=0.8)
    ax.plot(list(runs), [each.mean for each in runs.values()], "-o", color=BLUE, ms=4)
    ax.set_xscale("log")
    ax.set_xticks(list(runs), [f"{size:,}" for size in runs])
    ax.minorticks_off()
    ax.set_xlabel("Training images")
    ax.set_ylabel("Validation accuracy")
    accuracy_axis(ax.yaxis)
    return ax


def drawable(name: Any, limit: int) -> str:
    """Shorten a name and replace letters that no font at hand can draw."""
    text = " ".join(shorten(str(name), limit).split()) or "?"
    fonts = [
        font_manager.get_font(font_manager.findfont(family))
        for family in mpl.rcParams["font.family"]
    ]
    charmaps = [font.get_charmap() for font in fonts]
    return "".join(c if any(ord(c) in known for known in charmaps) else "?" for c in text)


def accuracy_axis(axis: Any) -> None:
    """Write an axis of fractions as per cent, with a decimal where the span is narrow."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    low, high = axis.get_view_interval()
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))


def legend_above(ax: Axes, entries: Sequence[Line2D]) -> None:
    """Put the legend above the axes, where it hides no data, in as many rows as it needs."""
    if not entries:
        return
    widest = max(len(str(line.get_label())) for line in entries) + 5
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that are drawn on belong to a figure"
    n_fitting = int(figure.get_size_inches()[0] * _LEGEND_LETTERS // widest)
    figure.legend(
        handles=list(entries),
        loc="outside upper left",
        ncols=max(1, min(n_fitting, len(entries))),
        borderaxespad=0.2,
        handletextpad=0.4,
        columnspacing=1.1,
    )
