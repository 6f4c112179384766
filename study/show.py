"""What the command line shows: tables of studies, trials, freeze levels, and an estimate."""

import math
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.metrics import EpochMetrics
from study.config.formatting import (
    format_accuracy,
    format_duration,
    format_params,
    format_value,
    hide_password,
    json_text,
)
from study.execution.progress import Outcome

if TYPE_CHECKING:
    from core.models.freeze_stages import Level
    from study.record.models import Study, StudySummary, Test, Trial
    from study.search.plan import Estimate

_SUMMARY_ROWS = 5
# Above this many trials, `show` lists the best ones only.
_SHOWN_TRIALS = 50
_STOPPED = {
    "trials": "All trials are done.",
    "timeout": "Time is up (study.timeout).",
    "patience": "Nothing has improved for study.patience trials.",
    "space exhausted": "Every setting of the space has been tried.",
    "interrupted": "Interrupted; the record is complete up to here.",
}


def make_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Make an empty table; the columns named in `right` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        is_right = name in right
        table.add_column(name, justify="right" if is_right else "left", no_wrap=is_right)
    return table


def _add(table: Table, *cells: object) -> None:
    """Add a row of plain texts: names with brackets are no markup."""
    table.add_row(*(Text("-" if cell is None else str(cell)) for cell in cells))


def _facts(pairs: Iterable[tuple[str, object]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in pairs:
        _add(table, name, value)
    return table


def studies_table(summaries: Sequence["StudySummary"]) -> RenderableType:
    """Show all studies of a database."""
    if not summaries:
        return Text("No study yet; `python -m study run` makes one.")
    counts = ("complete", "pruned", "failed", "running", "interrupted")
    table = make_table(
        "study", "best", "trial", *counts, "updated (UTC)", right=("best", "trial", *counts)
    )
    for row in summaries:
        _add(
            table,
            row.name,
            format_accuracy(row.best_value),
            row.best_number,
            row.n_complete,
            row.n_pruned,
            row.n_failed,
            row.n_running,
            row.n_interrupted,
            str(row.updated_at)[:19],
        )
    return table


def best_first(trials: Iterable["Trial"]) -> list["Trial"]:
    """Sort trials: complete ones from the best, then the pruned, and the others."""
    rank = {"complete": 0, "pruned": 1}
    return sorted(
        trials,
        key=lambda row: (rank.get(row.state, 2), row.value is None, *row.rank),
    )


def _are_scored_alike(trials: Iterable["Trial"]) -> bool:
    """Say whether trials are ranked by their accuracy, so that a score would say it again."""
    return all(row.score is None or row.score == row.value for row in trials)


def _ranking_words(trials: Sequence["Trial"]) -> str:
    """Say what trials are ranked by where that is not the accuracy that is shown."""
    if _are_scored_alike(trials):
        return ""
    return (
        f"Trials are ranked by {trials[0].chosen_by} (score = exp(-loss)), not by "
        "accuracy, which on few pictures goes by luck."
    )


def trials_table(trials: Sequence["Trial"]) -> Table:
    """Show trials in the given order; the score where it is not the accuracy."""
    more = () if _are_scored_alike(trials) else ("score",)
    right = ("trial", "accuracy", *more, "epochs", "time")
    table = make_table(*right, "state", "from", "settings", right=right)
    for row in trials:
        score = "" if row.ranked_by is None else f"{row.ranked_by:.4f}"
        _add(
            table,
            row.number,
            format_accuracy(row.value),
            *((score,) if more else ()),
            row.epochs_done,
            format_duration(row.duration_s),
            row.state,
            row.origin,
            format_params(row.params) or "as configured",
        )
    return table


def study_view(
    study: "Study", trials: Sequence["Trial"], tests: Sequence["Test"]
) -> RenderableType:
    """Show a study: its data, its trials, its tests."""
    data: Mapping[str, Any] = study.data
    pictures = ", ".join(f"{data[f'n_{split}']} {split}" for split in ("train", "val", "test"))
    facts = _facts(
        [
            ("study", study.name),
            ("pictures", f"{data['source']}: {pictures}, {len(data['classes'])} classes"),
            ("begun", str(study.created_at)[:19]),
            ("output", Path(study.config["study"]["output"]) / study.name),
        ]
    )
    parts: list[RenderableType] = [facts]
    best = next((row for row in best_first(trials) if row.state == "complete"), None)
    if best is not None:
        told = f"Best trial: {best.number}, {format_accuracy(best.value)}."
        parts += [Text(f"{told} {_ranking_words(trials)}".strip())]
    if len(trials) > _SHOWN_TRIALS:
        parts += [Text(f"\nThe best {_SHOWN_TRIALS} of {len(trials)} trials:")]
        parts += [trials_table(best_first(trials)[:_SHOWN_TRIALS])]
    else:
        parts += [Text(""), trials_table(trials)]
    parts += [Text(f"\n{say_test(row)}") for row in tests]
    return Group(*parts)


def trial_view(trial: "Trial", epochs: Sequence[EpochMetrics]) -> RenderableType:
    """Show a trial: how it went, its settings, its epochs."""
    best = "" if trial.best_epoch is None else f" (validation, epoch {trial.best_epoch + 1})"
    score = None if trial.score is None else f"{trial.score:.4f} (by {trial.chosen_by})"
    trained, total = trial.trained_parameters, trial.total_parameters
    facts = [
        ("trial", trial.number),
        ("state", f"{trial.state}: {trial.reason}" if trial.reason else trial.state),
        ("from", trial.origin),
        ("accuracy", f"{format_accuracy(trial.value)}{best}"),
        ("score", score),
        ("time", format_duration(trial.duration_s)),
        ("saved by sharing", say_shared(epochs)),
        ("trained parameters", None if trained is None else f"{trained:,} of {total:,}"),
        ("device", trial.device),
        ("checkpoint", trial.checkpoint or "not kept"),
        ("settings", format_params(trial.params) or "as configured"),
    ]
    config = [(key, format_value(value)) for key, value in trial.config.items()]
    head = "\nConfiguration:"
    return Group(_facts(facts), Text(""), epochs_table(epochs), Text(head), _facts(config))


def say_shared(epochs: Sequence[EpochMetrics]) -> str:
    """Say what a trial took from shared work, and what it left for others."""
    if not epochs:
        return "-"
    hits = sum(row.cache_hits for row in epochs)
    misses = sum(row.cache_misses for row in epochs)
    saved = format_duration(sum(row.saved_s for row in epochs))
    return f"{saved} ({hits} of {hits + misses} arrays were there)" if hits + misses else saved


def epochs_table(epochs: Sequence[EpochMetrics]) -> Table:
    """Show a trial's epochs."""
    has_scores = any(row.score not in (None, row.val_acc) for row in epochs)
    more = ("score",) if has_scores else ()
    losses = ("train loss", "val loss")
    columns = ("epoch", *losses, "accuracy", *more, "balanced", "base_lr", "images/s")
    table = make_table(*columns, right=columns)
    for row in epochs:
        score = f"{row.ranked_by:.4f}" + (" *" if row.is_best else "  ")
        star = "" if more else " *" if row.is_best else "  "
        _add(
            table,
            row.epoch + 1,
            f"{row.train_loss:.4f}",
            f"{row.val_loss:.4f}",
            format_accuracy(row.val_acc) + star,
            *((score,) if more else ()),
            format_accuracy(row.val_balanced_acc),
            f"{row.base_lr:.3g}",
            f"{row.images_per_s:.0f}",
        )
    return table


def trial_differences(a: "Trial", b: "Trial") -> dict[str, tuple[Any, Any]]:
    """Return what differs between two trials: settings first, then results."""
    found = {}
    for key in dict.fromkeys((*a.config, *b.config)):
        pair = a.config.get(key), b.config.get(key)
        if pair[0] != pair[1]:
            found[key] = pair
    results = ("value", *(() if _are_scored_alike((a, b)) else ("score",)))
    more = ("best_epoch", "epochs_done", "trained_parameters", "duration_s")
    for key in ("state", *results, *more):
        pair = getattr(a, key), getattr(b, key)
        if key == "best_epoch":  # as people count, and as everything else that is shown
            first, second = (None if epoch is None else epoch + 1 for epoch in pair)
            pair = first, second
        if pair[0] != pair[1]:
            found[key] = pair
    return found


def differences_table(a: "Trial", b: "Trial") -> RenderableType:
    """Show what differs between two trials."""
    table = make_table("", f"trial {a.number}", f"trial {b.number}")
    for key, pair in trial_differences(a, b).items():
        _add(table, key, *(format_value(value) for value in pair))
    if a.value is not None and b.value is not None:
        gain = 100 * (b.value - a.value)
        said = f"\nTrial {b.number} is {gain:+.1f} points of accuracy away."
        if not _are_scored_alike((a, b)) and a.ranked_by != b.ranked_by:
            first = min((a, b), key=lambda row: row.rank)
            said += f" By {first.chosen_by}, trial {first.number} is the better one."
        return Group(table, Text(said))
    return table


def selection_bonus(value: float, n_val: int, n_trials: int) -> float:
    """Return how much the best of many trials flatters itself at most, in accuracy.

    If all trials were equally good and their validation errors independent, the best one would
    lie this far above the truth: the expected largest of `n_trials` normal draws (Blom 1958)
    times the standard error of an accuracy on `n_val` pictures. Trials share the pictures and are
    not equally good, so the truth is milder.
    """
    if n_trials < 2 or n_val < 1:
        return 0.0
    largest = statistics.NormalDist().inv_cdf((n_trials - 0.375) / (n_trials + 0.25))
    return largest * math.sqrt(value * (1 - value) / n_val)


def summary_view(
    outcome: Outcome, trials: Sequence["Trial"], n_val: int, target: int
) -> RenderableType:
    """Show how a run ended: the best trials, and how far to trust the best one."""
    counts = outcome.counts
    head = (
        f"\n{_STOPPED.get(outcome.stopped_because, outcome.stopped_because)} Study "
        f"{outcome.study_name}: {counts.finished} of {target} trials, {counts.complete} complete, "
        f"{counts.pruned} pruned, {counts.failed} failed, {format_duration(outcome.duration_s)}."
    )
    parts: list[RenderableType] = [Text(head)]
    best = [row for row in best_first(trials) if row.state == "complete"][:_SUMMARY_ROWS]
    if not best or outcome.best_value is None:
        failed = next((row for row in reversed(trials) if row.state == "failed"), None)
        why = f" The last one failed: {failed.reason}." if failed else ""
        return Group(*parts, Text(f"No trial is complete.{why}"))
    parts += [trials_table(best)]
    if words := _ranking_words(best):
        parts += [Text(words)]
    n_seen = counts.complete + counts.pruned
    bonus = selection_bonus(outcome.best_value, n_val, n_seen)
    if bonus > 0:
        parts.append(
            Text(
                f"The best of {n_seen} trials on {n_val} validation pictures flatters itself: by "
                f"up to {100 * bonus:.1f} points if all were equally good. The test split decides."
            )
        )
    kept = outcome.checkpoint / "model.safetensors" if outcome.checkpoint else "not kept"
    parts.append(Text(f"Best checkpoint: {kept}"))
    return Group(*parts)


def next_commands(
    name: str, storage: str, *, goes_on: bool = False, has_best: bool = True
) -> list[str]:
    """Return the commands to try after a run, ready to be pasted but for a password.

    Args:
        name: The study's.
        storage: Its database.
        goes_on: Whether the first thing to do is to go on.
        has_best: Whether there is a complete trial, which can be tested.
    """
    rest = [shlex.quote(name)]
    storage = hide_password(storage)
    if storage != "studies.db":
        rest += ["--storage", shlex.quote(storage)]
    words = " ".join(rest)
    url = storage if "://" in storage else f"sqlite:///{storage}"
    python, dashboard = _program("python"), _program("optuna-dashboard")
    first = f"{python} -m study {'resume' if goes_on else 'show'} {words}"
    test = [f"{python} -m study test {words}"] if has_best else []
    return [first, *test, f"{dashboard} {shlex.quote(url)}"]


def _program(name: str) -> str:
    """Return how to call a program of this environment: by its path where it is not activated."""
    folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found is None or Path(found).parent != folder:
        return shlex.quote(os.path.relpath(folder / name))
    return name


def say_looks(looks: Sequence["Test"], told: "Test", *, is_new: bool) -> str:
    """Say where a test's result comes from, if not from the one look at the test split.

    Args:
        looks: All of the study, oldest first.
        told: The one that is told.
        is_new: Whether it was taken just now.
    """
    lines = []
    if not is_new:
        lines.append(f"(From the record: it was read on {str(told.created_at)[:16]} UTC.)")
    if len(looks) > 1:
        numbers = ", ".join(str(look.trial_number) for look in looks)
        lines.append(
            f"The test split has been read {len(looks)} times (trials {numbers}): only the first "
            "reading is untouched by what the others showed."
        )
    return "\n".join(lines)


def say_test(row: "Test") -> str:
    """Say what the test split said, and how it compares with what validation promised."""
    text = (
        f"Test of trial {row.trial_number}: {format_accuracy(row.accuracy)} of {row.n} pictures "
        f"(95 % interval {format_accuracy(row.low)} to {format_accuracy(row.high)})."
    )
    if row.val_acc is None:
        return text
    gap = 100 * (row.val_acc - row.accuracy)
    word = f"{abs(gap):.1f} points {'more' if gap > 0 else 'less'}" if gap else "the same"
    said = f"Validation had said {format_accuracy(row.val_acc)}, {word}"
    return f"{text} {said} (the report says what chance alone can give)."


def levels_table(backbone: str, levels: Sequence["Level"]) -> RenderableType:
    """Show a backbone's freeze levels."""
    right = ("freeze_depth", "trained parameters", "forward frozen")
    table = make_table(*right, "freezes, beyond the level above", right=right)
    for row in levels:
        _add(
            table,
            row.depth,
            f"{row.trained_parameters:,}",
            f"{100 * row.frozen_flops_share:.0f} %",
            ", ".join(row.newly_frozen) or "nothing",
        )
    return Group(Text(backbone, style="bold"), table)


def estimate_view(estimate: "Estimate") -> RenderableType:
    """Show what a study would cost."""
    right = ("size", "all trained", "head alone", "checkpoint")
    table = make_table("backbone", *right, right=right)
    for cost in estimate.costs:
        _add(
            table,
            cost.backbone,
            f"{cost.image_size} px",
            f"{1 / cost.train_s[0]:.0f} images/s",
            f"{1 / cost.train_s[-1]:.0f} images/s",
            format_bytes(cost.weights_bytes),
        )
    total = (
        f"{estimate.n_trials} trials on {estimate.device}, {estimate.n_train} training and "
        f"{estimate.n_val} validation pictures: about {format_duration(estimate.trial_s)} a "
        f"trial, {format_duration(estimate.total_s)} if none is pruned, "
        f"{format_bytes(estimate.checkpoint_bytes)} of checkpoints."
    )
    return Group(table, Text(total))


def format_bytes(size: float) -> str:
    """Write a number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def print_view(view: RenderableType) -> None:
    """Print a table or text."""
    # A pipe gets whole lines, whatever the width that a terminal would have.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(view)


def print_json(value: object) -> None:
    """Print a value as a line of JSON."""
    print(json_text(value))
