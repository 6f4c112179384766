"""Where a level and the baseline differ: class by class, and on which images most."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.ablation import Ablation, Runs
from reports.effects import Effect
from reports.publish import Grid, signed
from reports.words import plural
from study.record.frames import read_thumbnails
from study.record.models import SPLITS_FILE, folds_column
from study.record.record import Record

_MOST_IMAGES = 12
_CANDIDATES = 200
_MOST_LEVELS = 6


@dataclass(frozen=True, slots=True)
class Image:
    """An image on which a level and the baseline disagree.

    Attributes:
        path: What the dataset calls it.
        label: Its class.
        right: Runs of the level that classify it correctly, of how many.
        baseline: The same of the baseline.
        thumbnail: JPEG; None where no run kept one.
    """

    path: str
    label: str
    right: str
    baseline: str
    thumbnail: bytes | None


@dataclass(frozen=True, slots=True)
class Disagreement:
    """What is known of single images.

    Attributes:
        level: The level with the largest difference.
        images: Where it disagrees with the baseline most, the level's failures first.
        by_class: The differences of the levels to the baseline by class, in points.
    """

    level: str
    images: tuple[Image, ...]
    by_class: Grid


def disagreements(
    store: Record, ablation: Ablation, effects: Sequence[Effect]
) -> Disagreement | None:
    """Compare a design's levels with the baseline image by image; None where it has none."""
    alone = [effect for effect in effects if effect.n]
    if ablation.kind not in ("ofat", "loco") or not alone:
        return None
    alone.sort(key=lambda effect: -abs(effect.difference.estimate))
    try:
        splits = pd.read_csv(
            ablation.study.output / SPLITS_FILE,
            dtype={"path": str, "class": str},
            keep_default_na=False,  # a class may be called None
        )
    except (OSError, ValueError):
        return None
    frames = [_by_image(ablation, runs, splits) for runs in ablation.runs]
    base = frames[ablation.position({})]
    levels = [
        (effect.contrast.label, frames[cell])
        for effect in alone
        for cell, weight in effect.contrast.weights.items()
        if weight > 0
    ]
    level, most = levels[0]
    both = most.merge(base, left_index=True, right_index=True, suffixes=("", "_base"))
    both["size"] = -(both["right"] - both["right_base"]).abs()
    both = both[both["size"] < 0].sort_values("size", kind="stable").head(_CANDIDATES)
    thumbnails = read_thumbnails(store, ablation.study.id, list(both.index))
    both["unseen"] = [path not in thumbnails for path in both.index]
    both = both[~both["unseen"] | (both["n"] > 1)]  # of one run each, a name says nothing
    both = both.sort_values(["size", "unseen"], kind="stable").head(_MOST_IMAGES)
    images = [
        Image(
            str(path),
            str(row["class"]),
            f"{round(row['right'] * row['n'])} of {plural(int(row['n']), 'run')}",
            f"{round(row['right_base'] * row['n_base'])} of {int(row['n_base'])}",
            thumbnails.get(str(path)),
        )
        for path, row in both.iterrows()
    ]
    return Disagreement(level, tuple(images), _class_grid(base, levels))


def _by_image(ablation: Ablation, runs: Runs, splits: pd.DataFrame) -> pd.DataFrame:
    """Return by path: its class, the share of runs that are right, and how many there are."""
    parts = []
    for replicate, correct in enumerate(runs.correct["val"]):
        if correct is None:
            continue
        images = splits[splits["split"] == "val"]
        if ablation.n_folds > 1:
            repetition, fold = divmod(replicate, ablation.n_folds)
            seed = int(ablation.study.config["data"]["split_seed"]) + repetition
            column = folds_column(ablation.n_folds, seed)
            if column not in splits:  # the images' names have changed since
                continue
            images = splits[splits[column] == fold]
        if len(images) == len(correct):
            parts.append(images[["path", "class"]].assign(right=correct))
    if not parts:
        return pd.DataFrame({"class": [], "right": [], "n": []})
    groups = pd.concat(parts).groupby("path")
    return groups.agg(
        **{"class": ("class", "first")}, right=("right", "mean"), n=("right", "size")
    )


def _class_grid(base: pd.DataFrame, levels: Sequence[tuple[str, pd.DataFrame]]) -> Grid:
    """Show the difference of each level to the baseline by class, in points."""
    shown = levels[:_MOST_LEVELS]
    own, sizes = _mean_by_class(base), base.groupby("class").size()
    means = [_mean_by_class(frame) for _, frame in shown]
    rows = []
    for name in own.index:
        differences = [100 * (mean.get(name, np.nan) - own[name]) for mean in means]
        cells = ["–" if np.isnan(each) else signed(each, 1) for each in differences]
        rows.append((str(name), str(sizes[name]), f"{100 * own[name]:.1f}", *cells))
    marks = [f"({letter})" for letter in "abcdef"][: len(shown)]
    names = "; ".join(f"{mark} {label}" for mark, (label, _) in zip(marks, shown, strict=True))
    left = f", the largest of {len(levels)}" if len(levels) > len(shown) else ""
    note = (
        "Validation images. Difference to the baseline in points, mean over replicates, not "
        f"tested, of {names}{left}."
    )
    header = ("Class", "Images", "Baseline, %", *marks)
    return Grid("classes", "By class", header, tuple(rows), note=note)


def _mean_by_class(frame: pd.DataFrame) -> "pd.Series[float]":
    return frame.groupby("class")["right"].mean() if len(frame) else pd.Series(dtype=float)
