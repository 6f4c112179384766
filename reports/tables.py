"""The report's tables as rows of text, and the trials as CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reports.frames import PARAM_PREFIX, Dimension, confused_pairs
from reports.importance import Importance
from reports.record import SearchRecord
from reports.summary import Summary
from reports.words import (
    count,
    duration,
    is_missing,
    moment,
    percent,
    percent_range,
    plural,
    points,
    setting,
)
from study.config.formatting import hide_password

_STATE_WORDS = {"complete": "finished"}
# Keys of the database, of no meaning outside it.
_INNER = ("id", "study_id", "run_id")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        header: Column names.
        rows: Cells, as many a row as there are columns.
        kinds: One word a row that says how it is shown; empty where rows are alike.
        n_text: Leading columns that are names, not figures.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...] = ()
    n_text: int = 1


def trials_csv(trials: pd.DataFrame) -> str:
    """Write all trials as CSV, values as they are (accuracy in [0, 1], times in UTC)."""
    return trials.drop(columns=list(_INNER), errors="ignore").to_csv(
        index=False, lineterminator="\n"
    )


def trials_table(record: SearchRecord) -> Table:
    """List all trials: how they ended, with which settings, and why."""
    names = [dim.name for dim in record.dims]
    own = record.trials["score"].notna() & (record.trials["score"] != record.trials["value"])
    more = ("Score",) if own.any() else ()
    header = ("Trial", "State", "Accuracy", *more, "Epochs", "Duration", *names, "From", "Reason")
    best = -1 if record.best is None else record.best.number
    rows, kinds = [], []
    for row in record.trials.to_dict("records"):
        settings = (_cell(row[PARAM_PREFIX + dim.name], dim) for dim in record.dims)
        state = str(row["state"])
        rows.append(
            (
                f"{row['number']}",
                _STATE_WORDS.get(state, state),
                percent(row["value"]),
                *(("–" if is_missing(row["score"]) else f"{row['score']:.4f}",) if more else ()),
                count(row["epochs_done"]),
                duration(row["duration_s"]),
                *settings,
                str(row["origin"]),
                "" if is_missing(row["reason"]) else str(row["reason"]),
            )
        )
        kinds.append(f"{state} best" if row["number"] == best else state)
    return Table(header, tuple(rows), tuple(kinds), n_text=2)


def _cell(raw: Any, dim: Dimension) -> str:
    try:
        return setting(dim.value(raw))
    except KeyError:
        return "–"


def best_table(record: SearchRecord) -> Table:
    """List the best trial's settings and figures."""
    trial = record.best
    if trial is None:
        return Table((), ())
    searched = {dim.name: trial.params.get(dim.name) for dim in record.dims}
    settings = {"backbone": trial.backbone, "freeze_depth": trial.freeze_depth} | searched
    pairs = [(name, setting(value)) for name, value in settings.items()]
    pairs += [
        ("found by", trial.origin),
        ("chosen by", trial.chosen_by),
        ("best epoch", "–" if trial.best_epoch is None else str(trial.best_epoch)),
        ("epochs trained", count(trial.epochs_done)),
        ("duration", duration(trial.duration_s)),
        ("parameters trained", _share(trial.trained_parameters, trial.total_parameters)),
        ("seed", str(trial.seed)),
        ("device", trial.device),
        ("checkpoint", trial.checkpoint or "not kept"),
    ]
    return Table(("Setting", "Value"), tuple(pairs), n_text=2)


def _share(part: int | None, whole: int | None) -> str:
    if part is None or not whole:
        return count(part)
    return f"{part:,} of {whole:,} ({percent(part / whole, 2 if part < whole / 100 else 0)})"


def tests_table(summary: Summary) -> Table:
    """List the looks at the test split."""
    header = ("When", "What", "Test accuracy", "95 % interval", "Right", "Balanced", "Macro-F1",
              "Validation", "Validation − test, points")  # fmt: skip
    rows = []
    for look in summary.looks:
        row, gap = look.row, look.optimism
        text = "–"
        if gap is not None:
            text = f"{points(gap.estimate)} ({points(gap.low)} to {points(gap.high)})"
        rows.append(
            (
                moment(row.created_at),
                row.of,
                percent(row.accuracy),
                percent_range(row.low, row.high),
                f"{count(row.n_correct)} of {count(row.n)}",
                percent(row.balanced_acc),
                percent(row.macro_f1),
                percent(row.val_acc),
                text,
            )
        )
    return Table(header, tuple(rows), n_text=0)


def importance_table(importance: Importance) -> Table:
    """List the importances beside Optuna's own."""
    header = ("Setting", "Importance", "95 % interval", "For the best", "Optuna, finished only")
    rows = tuple(
        (
            factor.name,
            percent(factor.share, 0),
            percent_range(factor.low, factor.high, 0),
            percent(factor.top_share, 0),
            percent(factor.completed_only, 0),
        )
        for factor in importance.factors
    )
    return Table(header, rows)


def importance_basis(importance: Importance) -> str:
    """Say which trials the importances rest on."""
    parts = [f"{importance.n_completed} finished"]
    if importance.n_pruned:
        parts.append(f"{importance.n_pruned} pruned (final accuracy estimated)")
    if importance.n_diverged:
        parts.append(f"{importance.n_diverged} diverged (as the worst)")
    n = importance.n_completed + importance.n_pruned + importance.n_diverged
    text = f"From {plural(n, 'trial')}: {', '.join(parts)}."
    if importance.n_left_out:
        text += (
            f" Left out: {plural(importance.n_left_out, 'trial')} with no accuracy of "
            f"{'its' if importance.n_left_out == 1 else 'their'} own."
        )
    return f"{text} Optuna's own figure is from the {importance.n_completed} finished ones."


def confused_table(record: SearchRecord) -> Table:
    """List the commonest mistakes of the best trial."""
    if record.confusion is None or len(record.classes) != len(record.confusion):
        return Table((), ())
    pairs = confused_pairs(record.confusion, record.classes)
    rows = tuple(
        (row["truth"], row["predicted"], str(row["n"]), percent(row["share"], 0))
        for row in pairs.to_dict("records")
    )
    return Table(("True class", "Taken for", "Images", "Of the class"), rows, n_text=2)


def epochs_table(record: SearchRecord) -> Table:
    """List the best trial's epochs."""
    header = ("Epoch", "Accuracy", "Balanced", "Macro-F1", "Validation loss", "Training loss",
              "Base LR", "Images/s")  # fmt: skip
    if record.best is None:
        return Table(header, ())
    epochs = record.epochs[record.epochs["number"] == record.best.number]
    rows, kinds = [], []
    for row in epochs.to_dict("records"):
        rows.append(
            (
                str(row["epoch"]),
                percent(row["val_acc"]),
                percent(row["val_balanced_acc"]),
                percent(row["val_macro_f1"]),
                f"{row['val_loss']:.3f}",
                f"{row['train_loss']:.3f}",
                f"{row['base_lr']:.2e}",
                f"{row['images_per_s']:,.0f}",
            )
        )
        kinds.append("best" if row["epoch"] == record.best.best_epoch else "")
    return Table(header, tuple(rows), tuple(kinds), n_text=0)


def data_table(record: SearchRecord) -> Table:
    """List where the images came from, and how many there are."""
    study, data = record.study, record.study.data
    classes = record.classes
    pairs = (
        ("images", str(data.get("source", "–"))),
        ("training", count(data.get("n_train"))),
        ("validation", count(data.get("n_val"))),
        ("test", count(data.get("n_test")) if data.get("n_test") else "none"),
        ("classes", f"{len(classes)}: {', '.join(classes)}"),
        ("fingerprint", str(data.get("fingerprint", "–"))),
        ("study began", moment(study.created_at)),
        ("seed", str(study.config.get("study", {}).get("seed", "–"))),
        ("devices", ", ".join(dict.fromkeys(record.trials["device"].astype(str))) or "–"),
        ("versions", ", ".join(f"{name} {v}" for name, v in study.versions.items())),
    )
    return Table(("What", "Value"), pairs, n_text=2)


def runs_table(record: SearchRecord) -> Table:
    """List the processes that worked on the study, with their command lines."""
    header = ("Began", "Ended", "Outcome", "Host", "Device", "Command")
    rows = tuple(
        (
            moment(run.started_at),
            moment(run.ended_at),
            run.outcome or "–",
            run.host,
            run.device,
            hide_password(run.command),
        )
        for run in record.runs
    )
    return Table(header, rows, n_text=len(header))


def space_table(dims: Sequence[Dimension]) -> Table:
    """List the searched settings with their ranges."""
    rows = []
    for dim in dims:
        if dim.choices:
            text = ", ".join(setting(choice) for choice in dim.choices)
        else:
            text = f"{dim.low:g} to {dim.high:g}{', logarithmic' if dim.is_log else ''}"
        rows.append((dim.name, text))
    return Table(("Setting", "Searched in"), tuple(rows), n_text=2)
