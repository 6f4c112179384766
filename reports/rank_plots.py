"""The critical difference diagram: mean ranks of arms, with bars over those not told apart."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from reports.ranks import RankComparison
from reports.style import BLUE, drawable, ink

# Points; measured readable in print at a column's width. All other lengths are inches, by eye.
_FONT_SIZE = 6.8
_LINE_HEIGHT = 0.115
_MARGIN = 0.08
_GAP = 0.04  # between a line and its label
_LABEL_GAP = 0.045  # between labels
_FOOT_SPACING = 0.028  # between lines that go down to labels
_TOP, _RULER, _AXIS_HEIGHT = 0.09, 0.18, 0.27  # title's middle; ruler below it; axis below those
_BAR_SPACING = 0.075
_LEAN = 0.25  # height over width of the widest way from a rank to its foot
_MOST_LETTERS = 60  # of a name; the middle of longer ones is cut


@dataclass(frozen=True, slots=True)
class _Label:
    """An arm's name in lines, its foot and its height, inches from the upper left corner."""

    text: str
    rank_x: float
    foot_x: float
    line_end_x: float
    y: float


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything goes, inches from the upper left corner.

    Lines go straight down from `axis_y` to `fan_y`, lean to their foot at `feet_y`, and go down
    to their label. Bars are (left, right, y).
    """

    height: float
    axis_y: float
    fan_y: float
    feet_y: float
    bars: tuple[tuple[float, float, float], ...]
    labels: tuple[_Label, ...]


def diagram_size(comparison: RankComparison, width: float = 3.3) -> tuple[float, float]:
    """Return the figure's size that the arms need, inches: names are wrapped to fit the width.

    Args:
        comparison: From `compare_ranks`.
        width: Of the figure; 3.3 inches is a column of a two-column page.
    """
    return width, _layout(comparison, width).height


def plot_critical_difference(comparison: RankComparison, ax: Axes) -> Axes:
    """Draw mean ranks, the best at the left, and thick bars over arms not told apart.

    The ruler above is Nemenyi's critical difference. After Wilcoxon and Holm there is none, and
    a bar joins only those arms that have a white dot on it.

    Args:
        comparison: From `compare_ranks`.
        ax: Drawn on; alone in a figure of `diagram_size`, all of which it takes.

    References:
        Demšar 2006, https://jmlr.org/papers/v7/demsar06a.html, figure 1.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that are drawn on belong to a figure"
    width, height = (float(inches) for inches in figure.get_size_inches())
    layout = _layout(comparison, width)
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(max(height, layout.height), 0)
    _draw_axis(comparison, layout, width, ax)
    _draw_ruler(comparison, width, ax)
    for label in layout.labels:
        x = (label.rank_x, label.rank_x, label.foot_x, label.foot_x, label.line_end_x)
        y = (layout.axis_y, layout.fan_y, layout.feet_y, label.y, label.y)
        ax.plot(x, y, color=ink(), lw=0.6, solid_joinstyle="round")
        is_left = label.line_end_x < label.foot_x
        x_text = label.line_end_x + (-_GAP if is_left else _GAP)
        ax.text(
            x_text, label.y, label.text, ha="right" if is_left else "left",
            va="center_baseline", fontsize=_FONT_SIZE, linespacing=1.05,
        )  # fmt: skip
    _draw_bars(comparison, layout, width, ax)
    return ax


def _rank_x(rank: float, n_arms: int, width: float) -> float:
    return _MARGIN + (rank - 1) / (n_arms - 1) * (width - 2 * _MARGIN)


def _layout(comparison: RankComparison, width: float) -> _Layout:
    axis_y = _TOP + _AXIS_HEIGHT + (_RULER if comparison.critical_difference is not None else 0)
    bars = tuple(_bars(comparison, width, axis_y + 0.1))
    fan_y = max([axis_y, *(y for *_, y in bars)]) + 0.07
    placed = list(_labels(comparison, width))
    feet_y = fan_y + _LEAN * max(abs(label.foot_x - label.rank_x) for label in placed)
    labels = tuple(replace(label, y=label.y + feet_y + 0.02) for label in placed)
    bottom = max(label.y + _LINE_HEIGHT * (label.text.count("\n") + 1) / 2 for label in labels)
    return _Layout(bottom + _MARGIN, axis_y, fan_y, feet_y, bars, labels)


def _bars(
    comparison: RankComparison, width: float, top: float
) -> Iterator[tuple[float, float, float]]:
    """Place a bar for each clique, in their order; those that do not touch share a height."""
    ranks = {arm.name: arm.mean_rank for arm in comparison.arms}
    taken: list[list[tuple[float, float]]] = []
    for clique in comparison.cliques:
        left = _rank_x(ranks[clique[0]], len(ranks), width) - 0.03
        right = _rank_x(ranks[clique[-1]], len(ranks), width) + 0.03
        level = 0
        while level < len(taken) and any(left < b and a < right for a, b in taken[level]):
            level += 1
        if level == len(taken):
            taken.append([])
        taken[level].append((left - 0.05, right + 0.05))
        yield left, right, top + _BAR_SPACING * level


def _labels(comparison: RankComparison, width: float) -> Iterator[_Label]:
    """Place the better half of the arms at the left and the others at the right, inner below.

    Heights are from the top of the labels.
    """
    arms = comparison.arms
    n_arms, n_left = len(arms), (len(arms) + 1) // 2
    room = (width - _FOOT_SPACING * (n_arms + 1)) / 2 - _MARGIN / 2 - _GAP
    texts = [_wrapped(drawable(arm.name, _MOST_LETTERS), room) for arm in arms]
    widths = [max(map(_text_width, text.split("\n"))) for text in texts]
    low = _MARGIN / 2 + max(widths[:n_left]) + _GAP
    high = width - _MARGIN / 2 - max(widths[n_left:]) - _GAP
    at = [_rank_x(arm.mean_rank, n_arms, width) for arm in arms]
    feet = _spread(at, low + _FOOT_SPACING, high - _FOOT_SPACING)
    for side, end in ((range(n_left), low), (range(n_arms - 1, n_left - 1, -1), high)):
        y = 0.0
        for i in side:
            height = _LINE_HEIGHT * (texts[i].count("\n") + 1)
            yield _Label(texts[i], at[i], feet[i], end, y + height / 2)
            y += height + _LABEL_GAP


def _spread(positions: Sequence[float], low: float, high: float) -> list[float]:
    """Move sorted positions as little as needed to lie apart, and between the bounds."""
    feet: list[float] = []
    for i, x in enumerate(positions):
        n_after = len(positions) - 1 - i
        x = max(min(x, high - n_after * _FOOT_SPACING), low)
        feet.append(max(x, feet[-1] + _FOOT_SPACING) if feet else x)
    return feet


def _text_width(text: str) -> float:
    """Return a line's width in inches."""
    font = FontProperties(family=mpl.rcParams["font.family"], size=_FONT_SIZE)
    return float(TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def _wrapped(text: str, room: float) -> str:
    """Break a name into lines that fit, after a space or a mark; within a word only if it must."""
    lines = [""]
    for piece in re.split(r"(?<=[ _:./-])", text):
        if _text_width(lines[-1] + piece.rstrip()) <= room:
            lines[-1] += piece
            continue
        lines.append("")
        for letter in piece:
            if _text_width(lines[-1] + letter.rstrip()) > room:
                lines.append("")
            lines[-1] += letter
    return "\n".join(line.strip() for line in lines if line.strip())


def _draw_axis(comparison: RankComparison, layout: _Layout, width: float, ax: Axes) -> None:
    n_arms, y = len(comparison.arms), layout.axis_y
    ax.plot([_MARGIN, width - _MARGIN], [y, y], color=ink(), lw=0.9)
    for rank in range(1, n_arms + 1):
        x = _rank_x(rank, n_arms, width)
        is_named = n_arms <= 12 or rank == 1 or rank % 5 == 0
        ax.plot([x, x], [y, y - (0.05 if is_named else 0.03)], color=ink(), lw=0.7)
        if is_named:
            ax.text(x, y - 0.07, str(rank), ha="center", va="bottom", fontsize=_FONT_SIZE)
    ax.text(
        width - _MARGIN, _TOP, "mean rank (1 = best)", ha="right", va="center",
        fontsize=_FONT_SIZE,
    )  # fmt: skip


def _draw_ruler(comparison: RankComparison, width: float, ax: Axes) -> None:
    """Draw the critical difference from rank 1 on; one longer than the axis has no end."""
    critical = comparison.critical_difference
    if critical is None:
        return
    n_arms, y = len(comparison.arms), _TOP + 0.12
    right = _rank_x(min(1 + critical, n_arms), n_arms, width)
    is_longer = critical > n_arms - 1
    ax.plot([_MARGIN, right], [y, y], color=ink(), lw=1.1)
    for x in [_MARGIN] if is_longer else [_MARGIN, right]:
        ax.plot([x, x], [y - 0.03, y + 0.03], color=ink(), lw=1.1)
    text = f"CD = {critical:.2f}" + (" (longer than the axis)" if is_longer else "")
    ax.text(_MARGIN, _TOP, text, ha="left", va="center", fontsize=_FONT_SIZE)


def _draw_bars(comparison: RankComparison, layout: _Layout, width: float, ax: Axes) -> None:
    ranks = {arm.name: arm.mean_rank for arm in comparison.arms}
    for clique, (left, right, y) in zip(comparison.cliques, layout.bars, strict=True):
        ax.plot([left, right], [y, y], color=BLUE, lw=3, solid_capstyle="butt", zorder=3)
        if comparison.method == "wilcoxon-holm":
            x = [_rank_x(ranks[name], len(ranks), width) for name in clique]
            ax.plot(x, [y] * len(x), "o", color="white", ms=2, mew=0, zorder=4)
