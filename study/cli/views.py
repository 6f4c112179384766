"""What the commands print: tables and sentences about studies, trials, tests and costs."""

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from rich import filesize
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.config import TrainConfig
from core.metrics import EpochMetrics
from study.config.formatting import (
    describe_trial,
    format_accuracy,
    format_duration,
    format_params,
    format_value,
    hide_password,
    json_text,
)
from study.record.models import MODEL_FOLDER, Counts, best_of, now

if TYPE_CHECKING:
    from core.models.freeze_stages import Level
    from reports.publish import Grid
    from study.config.backbones import ModernBackbone
    from study.config.study_config import StudySection
    from study.record.models import Run, Study, StudySummary, Test, Trial
    from study.search.choice import Choice
    from study.search.plan import Estimate
    from study.search.search import SearchOutcome

_SUMMARY_ROWS = 5
# Above this many trials, `show` lists the best ones only.
_SHOWN_TRIALS = 50
_PIPE_WIDTH = 1000
_STOPPED = {
    "trials": "All trials are done.",
    "timeout": "The time is up (study.time).",
    "no time": "No trial that may gain fits into the time that is left (study.time).",
    "plan": "All trials of the plan are done.",
    "no gain": "All planned trials are done; no other one promises a gain.",
    "patience": "No improvement for study.patience trials.",
    "space exhausted": "The search space holds no setting that has not been tried.",
    "interrupted": "Interrupted; the record is complete up to here.",
}


# How anything is printed.


def print_view(view: RenderableType) -> None:
    """Print a table or a text."""
    # A pipe gets whole lines, whatever the width that a terminal would have.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(width=width, highlight=False)
    with console.capture() as shown:  # rich would end the program where a pipe is closed
        console.print(view)
    print(shown.get(), end="")


def print_json(value: object) -> None:
    """Print a value as a line of JSON."""
    print(json_text(value))


def make_table(
    header: Sequence[str], rows: Iterable[Iterable[object]], *, right: Collection[str] = ()
) -> Table:
    """Make a table of plain texts: brackets are not markup, None is a dash.

    No header is shown where no column has a name; those named in `right` are aligned there.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(header))
    for name in header:
        is_right = name in right
        table.add_column(Text(name), justify="right" if is_right else "left", no_wrap=is_right)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    return Text("-" if value is None else hide_password(str(value)))


def _facts(pairs: Iterable[tuple[str, object]]) -> Table:
    return make_table(("", ""), ((Text(name, "bold"), value) for name, value in pairs))


def grid_table(grid: "Grid") -> Table:
    """Show a table of a report."""
    end = len(grid.header) - grid.is_last_text
    return make_table(grid.header, grid.rows, right=grid.header[grid.n_text : end])


# Studies and trials.


def studies_table(summaries: Sequence["StudySummary"]) -> RenderableType:
    """Show all studies of a database."""
    if not summaries:
        return Text("There is no study yet; `python -m study run` makes one.")
    states = ("complete", "pruned", "failed", "running", "interrupted")
    right = ("best", "trial", *states)
    rows = (
        (
            *(row.name, format_accuracy(row.best_value), row.best_number),
            *(getattr(row.counts, state) for state in states),
            str(row.updated_at)[:19],
        )
        for row in summaries
    )
    return make_table(("study", *right, "updated (UTC)"), rows, right=right)


def study_view(
    study: "Study", trials: Sequence["Trial"], tests: Sequence["Test"]
) -> RenderableType:
    """Show a study: its data, its trials, its tests."""
    data = study.data
    images = ", ".join(f"{data[f'n_{split}']} {split}" for split in ("train", "val", "test"))
    facts = _facts(
        [
            ("study", study.name),
            ("images", f"{data['source']}: {images}, {len(data['classes'])} classes"),
            ("created", f"{str(study.created_at)[:19]} UTC"),
            ("output", study.output),
        ]
    )
    parts: list[RenderableType] = [facts]
    if best := best_of(trials):
        words = f"Best trial: {best.number}, {format_accuracy(best.value)}."
        parts += [Text(f"{words} {_ranking_words(trials)}".strip())]
    if len(trials) > _SHOWN_TRIALS:
        parts += [Text(f"\nThe best {_SHOWN_TRIALS} of {len(trials)} trials:")]
        parts += [trials_table(best_first(trials)[:_SHOWN_TRIALS])]
    else:
        parts += [Text(""), trials_table(trials)]
    parts += [Text(f"\n{describe_test(row)}") for row in tests]
    return Group(*parts)


def status_text(name: str, trials: Sequence["Trial"], run: "Run | None") -> str:
    """Say whether a study is running, and where it stands."""
    best = best_of(trials)
    accuracy = format_accuracy(best.value if best else None)
    n = Counts.of(trials).finished
    text = f"{n} trial{'' if n == 1 else 's'}, best {accuracy}"
    if run is None:
        return f"Study {name} is not running: {text}."
    since = (now() - run.started_at).total_seconds()
    text = f"Study {name} has been running for {format_duration(since)}: {text}"
    for row in (trial for trial in trials if trial.state == "running"):
        config = TrainConfig(**row.config)
        where = f"is after epoch {row.epochs_done} of {config.epochs}"
        text += f"; trial {row.number} {'solves a head' if config.is_solved else where}"
    return f"{text} (process {run.pid} on {run.host})."


def best_first(trials: Iterable["Trial"]) -> list["Trial"]:
    """Sort trials: complete ones from the best, then the pruned, and the others."""
    order = {"complete": 0, "pruned": 1}
    return sorted(trials, key=lambda row: (order.get(row.state, 2), row.value is None, *row.rank))


def _are_ranked_by_accuracy(trials: Iterable["Trial"]) -> bool:
    return all(row.score is None or row.score == row.value for row in trials)


def _ranking_words(trials: Sequence["Trial"]) -> str:
    """Say what trials are ranked by where that is not the accuracy that is shown."""
    if _are_ranked_by_accuracy(trials):
        return ""
    if trials[0].config.get("monitor") == "val_acc":
        return (
            "Trials are ranked by accuracy, estimated for all images but the test split (score)."
        )
    return (
        f"Trials are ranked by {trials[0].chosen_by} (score = exp(-loss)), since accuracy on "
        "few images is noisy."
    )


def trials_table(trials: Sequence["Trial"]) -> Table:
    """Show trials in the given order; the score where it is not the accuracy."""
    score = () if _are_ranked_by_accuracy(trials) else ("score",)
    right = ("trial", "accuracy", *score, "time")
    state = () if all(row.state == "complete" for row in trials) else ("state",)
    rows = (
        (
            *(row.number, format_accuracy(row.value)),
            *("" if row.ranked_by is None else f"{row.ranked_by:.4f}" for _ in score),
            *(format_duration(row.duration_s), *(row.state for _ in state)),
            describe_trial(row.origin, row.effective_params),
        )
        for row in trials
    )
    return make_table((*right, *state, "what"), rows, right=right)


def trial_view(trial: "Trial", epochs: Sequence[EpochMetrics]) -> RenderableType:
    """Show a trial: how it went, its settings, its epochs."""
    best = "" if trial.best_epoch is None else f" (validation, epoch {trial.best_epoch})"
    trained, total = trial.trained_parameters, trial.total_parameters
    facts = [
        ("trial", trial.number),
        ("state", f"{trial.state}: {trial.reason}" if trial.reason else trial.state),
        ("from", trial.origin),
        ("accuracy", f"{format_accuracy(trial.value)}{best}"),
        ("score", None if trial.score is None else f"{trial.score:.4f} (by {trial.chosen_by})"),
        ("time", format_duration(trial.duration_s)),
        ("saved by the cache", _cache_words(epochs)),
        ("trained parameters", None if trained is None else f"{trained:,} of {total:,}"),
        ("device", trial.device),
        ("checkpoint", trial.checkpoint or "not kept"),
        ("settings", format_params(trial.params) or "as configured"),
    ]
    config = [(key, format_value(value)) for key, value in trial.config.items()]
    head = Text("\nConfiguration:")
    return Group(_facts(facts), Text(""), _epochs_table(epochs), head, _facts(config))


def _cache_words(epochs: Sequence[EpochMetrics]) -> str | None:
    """Say what a trial took from work that is shared between trials."""
    if not epochs:
        return None
    saved = format_duration(sum(row.saved_s for row in epochs))
    hits = sum(row.cache_hits for row in epochs)
    n = hits + sum(row.cache_misses for row in epochs)
    return f"{saved} ({hits} of {n} arrays were cached)" if n else saved


def _epochs_table(epochs: Sequence[EpochMetrics]) -> Table:
    """Show a trial's epochs; a star marks the best ones so far."""
    header = "epoch", "train loss", "val loss", "accuracy", "score", "balanced", "base_lr", "speed"
    rows = (
        (
            *(row.epoch, f"{row.train_loss:.4f}", f"{row.val_loss:.4f}"),
            *(format_accuracy(row.val_acc), f"{row.ranked_by:.4f} {'*' if row.is_best else ' '}"),
            *(format_accuracy(row.val_balanced_acc), f"{row.base_lr:.3g}"),
            f"{row.images_per_s:.0f} images/s",
        )
        for row in epochs
    )
    return make_table(header, rows, right=header)


# The end of a run.


def summary_view(
    outcome: "SearchOutcome", study: "StudySection", optimism: float
) -> RenderableType:
    """Show how a run ended: the best trials, and how far to trust the best one.

    Its accuracy is too high by `optimism` on average, as simulated from the trials' predictions.
    """
    counts = outcome.counts
    of = f" of {study.trials}" if study.trials else ""
    noun = "trial" if counts.finished == 1 and not of else "trials"
    head = Text(
        f"\n{_STOPPED.get(outcome.stopped_because, outcome.stopped_because)} Study "
        f"{study.name}: {counts.finished}{of} {noun}, {counts.complete} complete, "
        f"{counts.pruned} pruned, {counts.failed} failed, {format_duration(outcome.duration_s)}."
    )
    trials = outcome.trials
    best = [row for row in best_first(trials) if row.state == "complete"][:_SUMMARY_ROWS]
    if not best:
        failed = next((row for row in reversed(trials) if row.state == "failed"), None)
        why = f" The last one failed: {failed.reason}." if failed else ""
        if not failed and outcome.stopped_because == "timeout":
            why = " The time was too short for one: give it more (--time)."
        if n := outcome.n_first_look:
            why += f" The model is the first one, from {n} of the images."
        return Group(head, Text(f"No trial is complete.{why}"))
    lines = [_ranking_words(best)]
    from reports.intervals import selection_bias

    n_epochs = sum(row.epochs_done for row in trials)
    bias = selection_bias(best[0].value or 0.0, outcome.n_val, n_epochs)
    if bias > 0:
        lines.append(
            f"The best accuracy of {counts.complete} trials on {outcome.n_val} validation images "
            f"is about {100 * optimism:.1f} points too high if they are equally good (simulated "
            f"from their predictions), at most {100 * bias:.1f} counting all {n_epochs} epochs. "
        )
        lines[-1] += "The test split decides." if outcome.n_test else "There is no test split."
    if outcome.model is not None:
        lines.append(_model_words(outcome, outcome.model))
    return Group(head, trials_table(best), *(Text(line) for line in lines if line))


def _model_words(outcome: "SearchOutcome", model: "Choice") -> str:
    """Say what the model of a study is made of."""
    speed = f", {outcome.images_per_s:.0f} images/s" if outcome.images_per_s else ""
    numbers = [row.number for row in model.trials]
    what = f"trial {numbers[0]}"
    if len(numbers) > 1:
        shares = (f"{n} ({w:.0%})" for n, w in zip(numbers, model.weights, strict=True))
        what = f"the mean of trials {', '.join(shares)}"
    refitted = "fitted to all images but the test split"
    n_refitted = sum(model.refitted)
    how = {0: "", len(numbers): f", {refitted}"}.get(
        n_refitted, f", {n_refitted} of them {refitted}"
    )
    text = (
        f"Model: {what}{how}; score {model.score:.4f}, accuracy {format_accuracy(model.val_acc)} "
        f"in validation{speed}. In {outcome.output / MODEL_FOLDER}"
    )
    best = outcome.best
    if best is not None and best.number not in numbers and best.rank[0] < -model.score:
        text += (
            f"\n(Trial {best.number} scores higher on one fold alone; on the same images it is no "
            "clear gain over the heads.)"
        )
    return text


def print_next(commands: Iterable[str]) -> None:
    """Print the commands to try next."""
    print("\nNext:", *commands, sep="\n  ")


# Tests.


def describe_test(row: "Test") -> str:
    """Say what a test gave, and how it compares with validation."""
    text = (
        f"Test accuracy of {row.of}: {format_accuracy(row.accuracy)} on {row.n} "
        f"images (95 % interval {format_accuracy(row.low)} to {format_accuracy(row.high)})."
    )
    if row.val_acc is None:
        return text
    gap = 100 * (row.val_acc - row.accuracy)
    word = f"{abs(gap):.1f} points {'higher' if gap > 0 else 'lower'}" if gap else "the same"
    validation = f"Validation accuracy was {format_accuracy(row.val_acc)}, {word}"
    return f"{text} {validation} (the report says how much chance alone can give)."


def describe_use(row: "Test", tests: Sequence["Test"], *, is_new: bool) -> str:
    """Say what a test gave, and whether it is the only one of the study's `tests`."""
    lines = [describe_test(row)]
    if not is_new:
        lines.append(f"(From the record: tested on {str(row.created_at)[:16]} UTC.)")
    if len(tests) > 1:
        numbers = ", ".join(test.of for test in tests)
        lines.append(
            f"The test split has been used {len(tests)} times ({numbers}): only the first "
            "result is independent of the others."
        )
    return "\n".join(lines)


# Backbones and costs.


def modern_view(backbones: Sequence["ModernBackbone"]) -> Table:
    """Show the backbones that `--download` adds."""
    header = ["backbone", "weights", "MB", "what it is (not measured here)", "source"]
    rows = [(m.name, m.tag, m.megabytes, m.reason, m.source) for m in backbones]
    return make_table(header, rows, right=("MB",))


def levels_view(backbone: str, levels: Sequence["Level"]) -> RenderableType:
    """Show a backbone's freeze levels."""
    right = ("freeze_depth", "trained parameters", "forward frozen")
    rows = (
        (
            *(row.depth, f"{row.trained_parameters:,}", f"{100 * row.frozen_flops_share:.0f} %"),
            ", ".join(row.newly_frozen) or "nothing",
        )
        for row in levels
    )
    table = make_table((*right, "freezes, beyond the level above"), rows, right=right)
    return Group(Text(backbone, style="bold"), table)


def estimate_view(estimate: "Estimate") -> RenderableType:
    """Show what a study would cost."""
    total = (
        f"{estimate.n_trials} trials on {estimate.device}: about "
        f"{format_duration(estimate.trial_s)} per trial, "
        f"{format_duration(estimate.total_s)} if none is pruned, "
        f"{filesize.decimal(estimate.checkpoint_bytes)} of checkpoints."
    )
    steps = (
        (step.reason, format_duration(step.forecast_s), format_params(step.params))
        for step in estimate.plan
    )
    plan = make_table(("plan, if thawing gains", "about", "settings"), steps)
    return Group(*([plan] if estimate.plan else []), Text(total))
