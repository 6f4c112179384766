"""How plots look: colours, type, axes, legends; letters that can be drawn, drawn as they are."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.words import shorten

# Okabe and Ito's colours, distinct with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#858C97"
INK = "#22262c"
"""Colour of text and axes."""

# Of the legend's type, measured.
_LETTERS_PER_INCH = 15
# Fonts that may be there for names outside Latin, Greek and Cyrillic scripts.
_MORE_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Hiragino Sans", "PingFang SC", "Arial Unicode MS",
)  # fmt: skip


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
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.13,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "frostline",
        "svg.fonttype": "path",
    }
    return mpl.rc_context(settings)


def drawable(name: Any, limit: int = 22) -> str:
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
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    low, high = axis.get_view_interval()
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))


def legend_above(ax: Axes, entries: Sequence[Line2D]) -> None:
    """Put the legend above the axes, where it hides no data, in as many rows as it needs."""
    if not entries:
        return
    widest = max(len(str(line.get_label())) for line in entries) + 5
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that are drawn on belong to a figure"
    n_fitting = int(figure.get_size_inches()[0] * _LETTERS_PER_INCH // widest)
    figure.legend(
        handles=list(entries),
        loc="outside upper left",
        ncols=max(1, min(n_fitting, len(entries))),
        borderaxespad=0.2,
        handletextpad=0.4,
        columnspacing=1.1,
    )
