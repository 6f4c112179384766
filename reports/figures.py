"""Every figure of a report: drawn for the page and, if wanted, for a paper, or why it is not."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reports import frames
from reports.fidelity import EarlyRank
from reports.importance import Importance
from reports.plots import (
    MAX_NAMED_CLASSES,
    plot_confusion,
    plot_cost,
    plot_curves,
    plot_early_rank,
    plot_history,
)
from reports.record import SearchRecord
from reports.setting_plots import plot_depth_lr, plot_importance, plot_slice
from reports.style import style
from reports.words import percent
from study.record.models import UNFINISHED

# A column of a two-column page is about 85 mm; at this width 9-point type is still readable there.
_WIDTH, _HEIGHT = 4.6, 3.1
_DPI = 220

# What a file would say of when and by what it was written.
_UNSTABLE = {"svg": ("Date",), "png": ("Software",), "pdf": ("CreationDate", "Producer")}

Draw = Callable[[Axes], Any]


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure of the report.

    Attributes:
        name: Of its files, without suffix.
        title: What it shows.
        caption: How to read it.
        svg: For the page; empty where `why_empty` says why.
        png: For a slide; empty where none is wanted.
        pdf: For a paper; empty where none is wanted.
        why_empty: One sentence, or None.
    """

    name: str
    title: str
    caption: str
    svg: bytes = b""
    png: bytes = b""
    pdf: bytes = b""
    why_empty: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A figure to be drawn; what it needs is checked before."""

    name: str
    title: str
    caption: str
    draw: Draw
    why_empty: str | None = None
    size: tuple[float, float] = (_WIDTH, _HEIGHT)
    is_for_paper: bool = False


def render(draw: Draw, size: tuple[float, float], kind: str) -> bytes:
    """Draw on fresh axes and return the file's bytes; the same data give the same bytes.

    Args:
        draw: Draws on the axes.
        size: Width and height, inches.
        kind: `png`, `svg` or `pdf`.
    """
    with style():
        figure = Figure(figsize=size, dpi=_DPI)
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        metadata: Any = dict.fromkeys(_UNSTABLE[kind])
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def draw_figures(record: SearchRecord, importance: Importance, early: EarlyRank) -> list[Drawing]:
    """Draw all figures of a report, in reading order."""
    return [drawn(plan) for plan in _plans(record, importance, early)]


def save_figures(drawings: Sequence[Drawing], folder: Path) -> tuple[Path, ...]:
    """Write each figure's files; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings:
        forms = ((".svg", drawing.svg), (".png", drawing.png), (".pdf", drawing.pdf))
        for suffix, content in forms:
            path = folder / f"{drawing.name}{suffix}"
            if drawing.why_empty is not None or not content:
                path.unlink(missing_ok=True)  # of an earlier report of this study
                continue
            path.write_bytes(content)
            paths.append(path)
    return tuple(paths)


def drawn(plan: Plan) -> Drawing:
    """Draw a figure in all its forms."""
    if plan.why_empty is not None:
        return Drawing(plan.name, plan.title, plan.caption, why_empty=plan.why_empty)
    return Drawing(
        plan.name,
        plan.title,
        plan.caption,
        svg=render(plan.draw, plan.size, "svg"),
        png=render(plan.draw, plan.size, "png") if plan.is_for_paper else b"",
        pdf=render(plan.draw, plan.size, "pdf") if plan.is_for_paper else b"",
    )


def _plans(record: SearchRecord, importance: Importance, early: EarlyRank) -> Iterator[Plan]:
    yield _importance_plan(importance)
    yield from _confusion_plans(record)
    yield from _history_plans(record)
    yield from _slice_plans(record)
    yield _depth_lr_plan(record)
    yield _cost_plan(record)
    yield _early_plan(early)


def _no_accuracy(record: SearchRecord) -> str | None:
    """Say why nothing can be drawn against accuracy, if so."""
    scored = record.trials["value"].notna() & ~record.trials["state"].isin(UNFINISHED)
    if scored.any():
        return None
    states = record.trials["state"].value_counts()
    if not len(record.trials):
        return "The study has no trials yet."
    text = ", ".join(f"{n} {state}" for state, n in states.items())
    return f"No trial has an accuracy ({text})."


def _importance_plan(importance: Importance) -> Plan:
    factors = importance.factors
    return Plan(
        "importance",
        "What mattered",
        "Bars: share of each setting in what decided the accuracy, over all trials; whiskers: "
        "95 % bootstrap interval. Diamonds: Optuna's own figure, which leaves pruned trials out.",
        lambda ax: plot_importance(factors, ax),
        importance.why_empty,
        (_WIDTH, max(1.7, 0.9 + 0.34 * len(factors))),
    )


def _confusion_plans(record: SearchRecord) -> Iterator[Plan]:
    classes, why = record.classes, None
    matrix = np.zeros((0, 0), dtype=np.int64) if record.confusion is None else record.confusion
    if record.confusion is None:
        why = "No confusion matrix is kept: that needs a trial that finished."
    elif len(classes) != len(matrix):
        why = "The confusion matrix and the names of the classes do not fit together."
    side = min(7.0, max(3.4, 2.6 + 0.13 * len(classes)))
    caption = "Rows are the true class, columns what the network said, on the validation split."
    if len(classes) > MAX_NAMED_CLASSES:
        caption += " Classes are numbered from 0 in the order listed under Provenance."
    yield Plan(
        "confusion",
        "What the best trial confuses",
        caption,
        lambda ax: plot_confusion(matrix, classes, ax),
        why,
        (side + 0.9, side),
    )


def _history_plans(record: SearchRecord) -> Iterator[Plan]:
    why = _no_accuracy(record)
    history = frames.history_frame(record.trials)
    chosen_by = record.best.chosen_by if record.best else "validation accuracy"
    caption = f"Each mark is a trial; the line is the best finished trial so far, by {chosen_by}."
    yield Plan("history", "Trial by trial", caption, lambda ax: plot_history(history, ax), why)
    curves = frames.curves_frame(record.trials, record.epochs)
    yield Plan(
        "curves",
        "Epoch by epoch",
        "Validation accuracy after each epoch. Pruned trials are dashed and end in a cross.",
        lambda ax: plot_curves(curves, ax),
        None if curves["val_acc"].notna().any() else why or "No epoch was recorded.",
    )


def _slice_plans(record: SearchRecord) -> Iterator[Plan]:
    used: set[str] = set()
    for dim in record.dims:
        frame = frames.slice_frame(record.trials, dim)
        why = _no_accuracy(record)
        if dim.is_single:
            why = "It had one value only."
        elif why is None and not len(frame):
            why = "No trial with an accuracy has this setting."
        yield Plan(
            _file_name(f"slice-{dim.name}", used),
            dim.name,
            "",
            _slice_draw(frame, dim),
            why,
            (3.5, 2.7),
        )


def _slice_draw(frame: Any, dim: frames.Dimension) -> Draw:
    return lambda ax: plot_slice(frame, dim, ax)


def _file_name(name: str, used: set[str]) -> str:
    """Make a name that any file system takes, and no two alike."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:60]
    unique, n = plain, 2
    while unique.lower() in used:
        unique, n = f"{plain}-{n}", n + 1
    used.add(unique.lower())
    return unique


def _depth_lr_plan(record: SearchRecord) -> Plan:
    frame = frames.depth_lr_frame(record.trials)
    dims = {dim.name: dim for dim in record.dims if not dim.is_single}
    missing = [name for name in ("freeze_depth", "base_lr") if name not in dims]
    why = _no_accuracy(record)
    if missing:
        why = f"This map needs both settings searched; {' and '.join(missing)} had one value only."
    elif why is None and not len(frame):
        why = "No trial with an accuracy has both settings."
    is_log = "base_lr" not in dims or dims["base_lr"].is_log
    return Plan(
        "depth-lr",
        "Freeze depth and learning rate",
        "Each mark is a trial, coloured by its accuracy; a ring marks the best finished one. "
        "Equal depths are spread a little so that marks do not hide each other.",
        lambda ax: plot_depth_lr(frame, ax, is_log=is_log),
        why,
    )


def _cost_plan(record: SearchRecord) -> Plan:
    frame = frames.cost_frame(record.trials)
    front = frame[frame["is_front"]].sort_values("duration_s")
    worth = "; ".join(f"trial {r['number']}: {percent(r['value'])}" for _, r in front.iterrows())
    return Plan(
        "cost",
        "Accuracy against cost",
        "Ringed and numbered: no other finished trial is both quicker and better"
        + (f" ({worth})." if worth else "."),
        lambda ax: plot_cost(frame, ax),
        _no_accuracy(record) or (None if len(frame) else "No trial has a duration."),
    )


def _early_plan(early: EarlyRank) -> Plan:
    return Plan(
        "early-rank",
        "How early the final order shows",
        f"Rank correlation of each epoch with the final accuracy. {early.caveat or ''}",
        lambda ax: plot_early_rank(early, ax),
        early.why_empty,
    )
