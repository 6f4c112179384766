"""Draw the anytime curves of benchmarks/time_to_quality.py, and print its table.

A curve is the test accuracy of the model that is best by validation so far. Thick: the median
over seeds, from when the last of them has a model; band: the smallest and the largest.

    python benchmarks/anytime.py work/results.jsonl --out work
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart; the first two for the main sides.
_COLOURS = {
    "naive": ("#000000", "plain Optuna (TPE, Hyperband)"),
    "naive-channels-last": ("#888888", "the same, channels-last"),
    "frostline": ("#D55E00", "Frostline"),
    "frostline-acc": ("#F5A742", "Frostline, best by accuracy"),
    "frostline-alone": ("#56B4E9", "Frostline, nothing shared"),
}
_GRID_POINTS = 1000


def read_results(files: Sequence[Path]) -> list[Row]:
    """Read results; of a side that was summed up twice the later counts."""
    rows: dict[tuple[str, int, str], Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["data"], row["seed"], row["side"]] = row
    return list(rows.values())


def grouped(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Sort rows by data set and side, in the order of the legend."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: list(_COLOURS).index(row["side"])):
        groups[row["data"]][row["side"]].append(row)
    return groups


def at_times(curve: Sequence[Sequence[float]], times: FloatArray) -> FloatArray:
    """Return a curve's test accuracy at some times; NaN before its first model."""
    seconds = np.array([point[0] for point in curve])
    values = np.array([math.nan, *(point[2] for point in curve)])
    return values[np.searchsorted(seconds, times, side="right")]


def draw(ax: Axes, sides: dict[str, list[Row]]) -> Axes:
    """Draw one data set's curves up to the naive side's budget."""
    rows = [row for own in sides.values() for row in own]
    begin = min(row["curve"][0][0] for row in rows if row["curve"])
    end = max(row["budget_s"] for row in rows)
    times = np.geomspace(begin, end, _GRID_POINTS)
    seen: list[float] = []
    for side, own in sides.items():
        colour, label = _COLOURS[side]
        values = np.array([at_times(row["curve"], times) for row in own])  # (seeds, times)
        shown = ~np.isnan(values).any(axis=0)
        if not shown.any():
            continue
        scores = 100 * values[:, shown]
        band = {"color": colour, "alpha": 0.15, "lw": 0, "step": "post"}
        ax.fill_between(times[shown], scores.min(axis=0), scores.max(axis=0), **band)
        line = {"color": colour, "lw": 2, "label": label, "drawstyle": "steps-post"}
        ax.plot(times[shown], np.median(scores, axis=0), **line)
        seen += np.median(scores, axis=0).tolist()
    target = 100 * statistics.median(row["target"] for row in sides["naive"])
    ax.axhline(target, color="black", lw=1, ls=":", label="plain Optuna's final accuracy")
    ax.set_xscale("log")
    ax.set_xlim(begin, end)
    ax.set_ylim(bottom=max(0.0, min(seen) - 3))
    ax.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    ax.grid(alpha=0.25)
    ax.set_xlabel("seconds since the start")
    n = len(sides["naive"])
    data = rows[0]["data"]
    ax.set_title(f"{data} ({n} {'seed' if n == 1 else 'seeds'})", fontsize=11)
    return ax


def plot(groups: dict[str, dict[str, list[Row]]], file: Path) -> None:
    """Draw a panel per data set."""
    width = max(5.5, 4.2 * len(groups))
    figure, axes = plt.subplots(1, len(groups), figsize=(width, 4.4), squeeze=False)
    labels: dict[str, Any] = {}
    for ax, sides in zip(axes[0], groups.values(), strict=True):
        draw(ax, sides)
        for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, line)
    axes[0][0].set_ylabel("test accuracy of the best by validation, %")
    columns = min(len(labels), max(2, math.ceil(4 * len(groups) / 3)))
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    below = 0.06 * math.ceil(len(labels) / columns) + 0.02
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Return median and range; None stands for never, which is later than all."""
    numbers = sorted(math.inf if value is None else value for value in values)
    middle = statistics.median(numbers)
    told = ["never" if math.isinf(v) else f"{v:.{digits}f}" for v in (middle, *numbers)]
    return told[0] if len(numbers) == 1 else f"{told[0]} ({told[1]} to {told[-1]})"


def table(groups: dict[str, dict[str, list[Row]]]) -> str:
    """Return the table in Markdown: medians over seeds, with the smallest and the largest."""
    lines = [
        "| data | side | n | final test accuracy, % | reaches naive's final, s | for good, s "
        "| naive's budget / reach | trials | epochs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for data, sides in groups.items():
        for side, rows in sides.items():
            final = [100 * (r["final_test_acc"] or 0.0) for r in rows]  # 0: no model in time
            # A side that never gets there has the ratio 0, which is smaller than all.
            ratio = statistics.median(r["ratio"] or 0.0 for r in rows)
            ends = sorted(r["ratio"] or 0.0 for r in rows)
            range_ = "" if len(rows) == 1 else f" ({ends[0]:.1f} to {ends[-1]:.1f})"
            lines.append(
                f"| {data} | {side} | {len(rows)} | {spread(final, 1)} "
                f"| {spread([r['reach_s'] for r in rows], 0)} "
                f"| {spread([r['lasting_reach_s'] for r in rows], 0)} | {ratio:.1f}{range_} "
                f"| {spread([r['n_trials'] for r in rows], 0)} "
                f"| {spread([r['n_epochs'] for r in rows], 0)} |"
            )
    budgets = [
        f"{data} {spread([r['budget_s'] for r in sides['naive']], 0)} s"
        for data, sides in groups.items()
    ]
    lines += ["", f"The naive side's budget: {', '.join(budgets)}."]
    return "\n".join(lines)


def main() -> None:
    """Print and write the table, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--sides", nargs="+", choices=list(_COLOURS), help="only these")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    rows = read_results(args.results)
    groups = grouped([row for row in rows if not args.sides or row["side"] in args.sides])
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(groups)
    print(text)
    (args.out / "anytime.md").write_text(text + "\n", encoding="utf-8")
    plot(groups, args.out / "anytime.png")


if __name__ == "__main__":
    main()
