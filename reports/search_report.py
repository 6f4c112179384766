"""Write the report of a search: an interactive page that needs no network, and trials as CSV."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution

from reports.intervals import Interval, difference_interval, wilson_interval
from reports.page import plotly_js, render_template
from reports.pruning import audit_of, audited_grid, rank_grid
from reports.publish import Grid
from reports.record import SearchRecord, read_record
from reports.search_plots import MOST_DRAWN, PLOTS, drawn, hovers
from reports.trials import is_copy, rank_of
from reports.words import (
    config_words,
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
from study.record.models import MODEL_FOLDER, UNFINISHED, Test
from study.record.record import Record

_MOST_FINDINGS = 5
# Keys of the database, of no meaning outside it, and lists.
_INNER = ("id", "study_id", "run_id", "without_effect")
_STORAGE = "studies.db"  # where the command line looks without --storage
_NEAR = 0.7  # a trial that took less than this share of the best one's time is worth naming


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where a report's files lie.

    Attributes:
        html: The page, complete in itself.
        csv: All trials.
    """

    html: Path
    csv: Path


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the page with its figures and tables.

    Attributes:
        title: The heading.
        figures: Key, title, caption, size, and the figure as JSON or why there is none.
        sentences: Findings below them.
        grids: Tables below those.
    """

    title: str
    figures: list[Mapping[str, Any]]
    sentences: list[str]
    grids: list[Grid]


def write_report(
    store: Record,
    study_name: str,
    out_dir: Path,
    *,
    beside: Sequence[str] = (),
    refresh_s: int = 0,
) -> ReportPaths:
    """Write a study's report into a folder, over an earlier one.

    Reads the record only. The same record gives the same figures and numbers.

    Args:
        store: The record.
        study_name: Which study.
        out_dir: Made where it is missing.
        beside: Other studies, in a table of their own.
        refresh_s: The page loads itself again after so many seconds; 0 for never.

    Raises:
        RecordError: There is no such study.
    """
    record = read_record(store, study_name)
    others = [read_record(store, name) for name in beside]
    contents = _contents(record, others) | {"refresh_s": refresh_s}
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(html=out_dir / "report.html", csv=out_dir / "trials.csv")
    part = out_dir / ".report.html"  # a browser that reads meanwhile finds a whole page
    part.write_text(render_template("search.html", contents), encoding="utf-8")
    part.replace(paths.html)
    text = record.trials.drop(columns=list(_INNER)).to_csv(index=False, lineterminator="\n")
    paths.csv.write_text(text, encoding="utf-8", newline="")
    return paths


def _contents(record: SearchRecord, others: Sequence[SearchRecord]) -> dict[str, Any]:
    """Collect what the template shows."""
    sections = {section.title: section for section in _sections(record)}
    n_drawn, n = len(drawn(record)), len(record.trials)
    thinned = ""
    if n > MOST_DRAWN:
        thinned = (
            f"Figures and table show {n_drawn:,} of {n:,} trials: the best ones, and evenly "
            "spaced others. trials.csv has all."
        )
    return {
        "study": record.study,
        "record": record,
        "cards": cards(record),
        "findings": findings(record)[:_MOST_FINDINGS],
        "test_line": _test_line(record),
        "next_commands": _next_commands(record),
        "warnings": [str(warning) for warning in record.study.data.get("warnings", [])],
        "best_section": sections.pop("Best trial"),
        "sections": list(sections.values()),
        "others": _others(record, others),
        "best": _best_facts(record),
        "best_config": _json(record.best.config) if record.best else "",
        "confused": confused_grid(record),
        "epochs": epochs_grid(record),
        "tests": tests_grid(record),
        "trials": trials_rows(record),
        "thinned": thinned,
        "data": _data_facts(record),
        "runs": _runs_grid(record),
        "space": [(name, _dimension_words(dim)) for name, dim in record.dims.items()],
        "config": config_words(record.study.config),
        "hovers": json.dumps(hovers(record)).replace("</", "<\\/"),
        "plotly": plotly_js(),
        "written": moment(datetime.now(UTC)),
    }


def _sections(record: SearchRecord) -> Iterator[Section]:
    """Draw all figures, by heading."""
    found: dict[str, Section] = {}
    for plot in PLOTS:
        section = found.setdefault(plot.section, Section(plot.section, [], [], []))
        for k, (key, figure) in enumerate(plot.draw(record)):
            why, text = figure, ""
            if isinstance(figure, go.Figure):  # "</" would end the script that holds it
                why, text = "", str(figure.to_json()).replace("</", "<\\/")
            section.figures.append(
                {
                    "key": f"{plot.name}-{len(section.figures)}",
                    "title": plot.title or key,
                    "caption": plot.caption if k == 0 else "",
                    "size": plot.size,
                    "json": text,
                    "why_empty": why,
                }
            )
    for title, make in TABLES:
        if (grid := make(record)).rows:
            found[title].grids.append(grid)
    audit = audit_of(record)
    if audit.n_pruned:
        found["Learning curves and pruning"].sentences.extend(audit.findings)
    yield from found.values()


# Cards and findings.


def cards(record: SearchRecord) -> list[tuple[str, str, str]]:
    """Return name, figure and a few words of what a reader looks for first."""
    trials, accuracy = record.trials, _validation(record)
    best: tuple[str, str] = ("–", "no trial has one")
    if record.best is not None:
        ends = f"{percent_range(accuracy.low, accuracy.high)} · " if accuracy else ""
        share = accuracy.estimate if accuracy else record.best.value
        best = percent(share), f"{ends}trial {record.best.number}"
    found = [("Validation accuracy", *best)]
    if record.model:
        members = ", ".join(map(str, record.model.get("trials", [])))
        what = f"mean of trials {members}" if "," in members else f"trial {members}"
        found.append(("Model", percent(record.model.get("val_acc")), f"in validation · {what}"))
    if record.tests:
        first = record.tests[0]
        more = f" · first of {len(record.tests)} readings" if len(record.tests) > 1 else ""
        text = f"{percent_range(first.low, first.high)} · {first.of}{more}"
        found.append(("Test accuracy", percent(first.accuracy), text))
    else:
        text = f"{count(record.n_test)} images kept apart" if record.n_test else "no test split"
        found.append(("Test accuracy", "not read" if record.n_test else "none", text))
    found.append(("Trials", f"{len(trials):,}", _states(trials)))
    spent = duration(trials["duration_s"].sum()) if len(trials) else "–"
    found.append(("Time", spent, "in which trials ran"))
    return found


def _states(trials: pd.DataFrame) -> str:
    counts = trials["state"].value_counts()
    names = ("complete", "pruned", "failed", *UNFINISHED)
    parts = [f"{counts[state]} {state}" for state in names if counts.get(state)]
    return ", ".join(parts) or "no trials yet"


def _validation(record: SearchRecord) -> Interval | None:
    if record.best is None or record.best.value is None or not record.n_val:
        return None
    return wilson_interval(round(record.best.value * record.n_val), record.n_val)


def findings(record: SearchRecord) -> list[str]:
    """Say what a study found, the most important first."""
    found = (
        _best_finding(record),
        _model_finding(record),
        _rivals_finding(record),
        _test_finding(record),
        _importance_finding(record),
        _failed_finding(record),
    )
    return [sentence for sentence in found if sentence]


def _best_finding(record: SearchRecord) -> str:
    best = record.best
    if best is None:
        return f"No trial has an accuracy ({_states(record.trials)})."
    among = int((record.trials["state"] == "complete").sum())
    where = f"the best of {among} complete trials" if among > 1 else "the only complete trial"
    if best.state == "pruned":
        where = "the best pruned trial; none is complete"
    text = f"Trial {best.number} is {where}"
    if accuracy := _validation(record):
        text += (
            f": it classifies {percent(accuracy.estimate)} of the {count(record.n_val)} "
            "validation images correctly (95 % interval "
            f"{percent_range(accuracy.low, accuracy.high)})."
        )
    else:
        text += f": {percent(best.value)} validation accuracy."
    trials = record.trials
    top_value = trials.loc[trials["state"] == "complete", "value"].max()
    if best.value is not None and top_value > best.value:
        first = trials.loc[trials["value"] == top_value, "number"].iloc[0]
        text += (
            f" It has the lowest {best.chosen_by}, by which trials are ranked; the highest "
            f"accuracy has trial {first}, {percent(top_value)}."
        )
    is_recipe = trials["origin"].astype(str).str.startswith("recipe:")
    recipes = trials[is_recipe & (trials["state"] == "complete") & trials["value"].notna()]
    if best.state != "complete" or not len(recipes):
        return text
    top = recipes.iloc[int(rank_of(recipes, "value").to_numpy().argmax())]
    name = str(top["origin"]).removeprefix("recipe:")
    if int(top["number"]) == best.number:
        return f"{text} It is a plain recipe ({name}); no trial that was searched is better."
    gain = 100 * ((best.value or 0.0) - float(top["value"]))
    words = f"{abs(gain):.1f} points {'more' if gain >= 0 else 'less'}"
    return f"{text} That is {words} than the best plain recipe ({name}, trial {top['number']})."


def _model_finding(record: SearchRecord) -> str | None:
    """Say what `model/` is, which is what a user takes away."""
    numbers = record.model.get("trials")
    if not numbers:
        return None
    what = f"is trial {numbers[0]}"
    if len(numbers) > 1:
        what = f"averages the predictions of trials {', '.join(map(str, numbers))}"
    fitted = (
        ", fitted again on all images but the test split"
        if any(record.model.get("refitted", []))
        else ""
    )
    accuracy = percent(record.model.get("val_acc"))
    return (
        f"The model to use is in {record.study.output / MODEL_FOLDER}: it {what}{fitted}, and "
        f"classifies {accuracy} of the validation images correctly."
    )


def _rivals_finding(record: SearchRecord) -> str | None:
    """Say which complete trials the validation split cannot distinguish from the best."""
    best, trials, accuracy = record.best, record.trials, _validation(record)
    if best is None or accuracy is None or best.state != "complete":
        return None
    is_other = (trials["number"] != best.number) & ~is_copy(trials)
    is_near = trials["value"].between(accuracy.low, accuracy.high)
    rivals = trials[(trials["state"] == "complete") & is_other & is_near]
    if not len(rivals):
        return None
    text = (
        f"{plural(len(rivals), 'other complete trial')} "
        f"{'lies' if len(rivals) == 1 else 'lie'} within that interval: {count(record.n_val)} "
        "images cannot separate them from the best."
    )
    quick = rivals[rivals["duration_s"] < _NEAR * (best.duration_s or 0.0)]
    if len(quick):
        row = quick.sort_values(["value", "duration_s"], ascending=[False, True]).iloc[0]
        text += (
            f" Much faster was trial {row['number']} ({percent(row['value'])}): it took "
            f"{duration(row['duration_s'])} instead of {duration(best.duration_s)}."
        )
    return text


def _optimism(record: SearchRecord, test: Test) -> Interval | None:
    """Return validation minus test accuracy with its interval."""
    if test.val_acc is None or not record.n_val:
        return None
    promised = wilson_interval(round(test.val_acc * record.n_val), record.n_val)
    return difference_interval(promised, Interval(test.accuracy, test.low, test.high))


def _test_finding(record: SearchRecord) -> str | None:
    if not record.tests:
        return None
    test = record.tests[0]
    text = (
        f"On the test split {test.of} classifies {percent(test.accuracy)} of {count(test.n)} "
        f"images correctly (95 % interval {percent_range(test.low, test.high)})."
    )
    gap = _optimism(record, test)
    if gap is None:
        return text
    side = "above" if gap.estimate >= 0 else "below"
    text += (
        f" Its validation accuracy is {abs(100 * gap.estimate):.1f} points {side} that (95 % "
        f"interval {points(gap.low)} to {points(gap.high)}): "
    )
    if gap.low > 0:
        return f"{text}the validation accuracy of a selected trial is optimistic."
    if gap.high < 0:
        return f"{text}the test images are easier than the validation images."
    return f"{text}no more than chance can give."


def _importance_finding(record: SearchRecord) -> str | None:
    frame = record.importance.shares
    if not len(frame):
        return None
    top = frame.iloc[0]
    text = (
        f"{top['setting']} mattered most: {percent(top['share'], 0)} of the importance (95 % "
        f"interval {percent_range(top['low'], top['high'], 0)})"
    )
    rivals = frame.loc[1:].loc[frame["high"] >= top["low"], "setting"]
    return f"{text}, not clearly ahead of {', '.join(rivals)}." if len(rivals) else f"{text}."


def _failed_finding(record: SearchRecord) -> str | None:
    trials, found = record.trials, []
    failed = trials[trials["state"] == "failed"]
    if len(failed):
        kinds = failed["reason"].fillna("no reason recorded").astype(str)
        common = kinds.str.split(":").str[0].value_counts()
        text = ", ".join(f"{n} × {kind}" for kind, n in common.head(4).items())
        found.append(f"{plural(len(failed), 'trial')} failed ({text}).")
    for state, words in (("running", "still running"), ("interrupted", "interrupted")):
        if n := int((trials["state"] == state).sum()):
            found.append(f"{plural(n, 'trial')} {'is' if n == 1 else 'are'} {words}.")
    return " ".join(found) or None


def _test_line(record: SearchRecord) -> str:
    if not record.n_test:
        return "There is no test split: only new images can show how optimistic validation is."
    if not record.tests:
        return (
            f"The test split ({count(record.n_test)} images) has not been read. Validation "
            "accuracy is optimistic, since trials were selected by it; read the test split once, "
            "at the end."
        )
    numbers = ", ".join(test.of for test in record.tests)
    if len(record.tests) == 1:
        return f"The test split has been read once, for {numbers}."
    return (
        f"The test split has been read {len(record.tests)} times ({numbers}). Only the first "
        "result is independent of the others."
    )


def _next_commands(record: SearchRecord) -> list[str]:
    name, settings = shlex.quote(record.study.name), record.study.config.get("study", {})
    storage = str(settings.get("storage", _STORAGE))
    if storage != _STORAGE:
        name += f" --storage {shlex.quote(hide_password(storage))}"
    commands = []
    if record.best is not None:
        if record.best.state == "complete" and record.n_test and not record.tests:
            commands.append(f"python -m study test {name}  # reads the test split, once")
        commands.append(f"python -m study ablate {name} --dry-run  # what would settings change")
    done, asked = int(record.trials["ended_at"].notna().sum()), settings.get("trials")
    more = "" if asked is None else f" --trials {asked if done < asked else done + 20}"
    return [*commands, f"python -m study resume {name}{more}  # search on"]


# Tables.


def trials_rows(record: SearchRecord) -> dict[str, Any]:
    """Return the table of trials: its header, and rows with a state and cells.

    A cell is the value to sort by and the text that is shown.
    """
    trials = record.trials
    if len(trials) > MOST_DRAWN:
        kept = set(drawn(record)["number"])
        trials = trials[trials["number"].isin(kept) | trials["state"].isin(UNFINISHED)]
    is_scored = trials["score"].notna() & (trials["score"] != trials["value"])
    names = record.varied  # what is the same in all trials stands under Provenance
    best = -1 if record.best is None else record.best.number
    rows = []
    for row in trials.to_dict("records"):
        cells = [(row["number"], str(row["number"])), (row["state"], row["state"])]
        cells.append(_number(row["value"], percent(row["value"])))
        if is_scored.any():
            text = "–" if is_missing(row["score"]) else f"{row['score']:.4f}"
            cells.append(_number(row["score"], text))
        cells.append((row["epochs_done"], count(row["epochs_done"])))
        cells.append(_number(row["duration_s"], duration(row["duration_s"])))
        for name in names:
            value = row.get(f"params_{name}")
            is_idle = is_missing(value) or row["number"] in record.idle[name]
            value, text = (None, "–") if is_idle else (value, setting(value))
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            cells.append(_number(value, text) if is_number else (text, text))
        reason = "" if is_missing(row["reason"]) else str(row["reason"])
        cells += [(str(row["origin"]), str(row["origin"])), (reason, reason)]
        state = f"{row['state']} best" if row["number"] == best else row["state"]
        rows.append({"state": state, "cells": cells})
    score = ("score",) if is_scored.any() else ()
    header = ("trial", "state", "accuracy", *score, "epochs", "time", *names, "from", "reason")
    return {"header": header, "rows": rows, "n_text": 2}


def _number(value: Any, text: str) -> tuple[Any, str]:
    return ("" if is_missing(value) else value), text


def _best_facts(record: SearchRecord) -> list[tuple[str, str]]:
    """List the best trial's settings and figures."""
    trial = record.best
    if trial is None:
        return []
    settings = {"backbone": trial.backbone, "freeze_depth": trial.freeze_depth}
    settings |= trial.effective_params
    trained, total = trial.trained_parameters, trial.total_parameters
    share = count(trained)
    if trained is not None and total:
        digits = 2 if trained < total / 100 else 0
        share = f"{trained:,} of {total:,} ({percent(trained / total, digits)})"
    return [
        *((name, setting(value)) for name, value in settings.items()),
        ("from", trial.origin),
        ("selected by", trial.chosen_by),
        ("best epoch", "–" if trial.best_epoch is None else str(trial.best_epoch)),
        ("epochs trained", count(trial.epochs_done)),
        ("time", duration(trial.duration_s)),
        ("parameters trained", share),
        ("seed", str(trial.seed)),
        ("device", trial.device),
        ("checkpoint", trial.checkpoint or "not kept"),
    ]


def confused_grid(record: SearchRecord, n_pairs: int = 8) -> Grid:
    """List the most frequent mistakes of the best trial."""
    rows = []
    if record.confusion is not None and len(record.classes) == len(record.confusion):
        errors = np.array(record.confusion, dtype=float)
        np.fill_diagonal(errors, 0)
        order = np.argsort(-errors, axis=None, kind="stable")[:n_pairs]
        for truth, guess in zip(*np.unravel_index(order, errors.shape), strict=True):
            if n := int(errors[truth, guess]):
                share = percent(n / float(record.confusion[truth].sum()), 0)
                rows.append((record.classes[truth], record.classes[guess], str(n), share))
    header = ("True class", "Predicted", "Images", "Of the class")
    return Grid("confused", "Most confused pairs", header, tuple(rows), n_text=2)


def epochs_grid(record: SearchRecord) -> Grid:
    """List the best trial's epochs."""
    header = ("Epoch", "Accuracy", "Balanced", "Macro-F1", "Validation loss", "Training loss",
              "Base LR", "Images/s")  # fmt: skip
    number = -1 if record.best is None else record.best.number
    rows = [
        (
            str(row["epoch"]),
            *(percent(row[key]) for key in ("val_acc", "val_balanced_acc", "val_macro_f1")),
            *(f"{row[key]:.3f}" for key in ("val_loss", "train_loss")),
            f"{row['base_lr']:.2e}",
            f"{row['images_per_s']:,.0f}",
        )
        for row in record.epochs[record.epochs["number"] == number].to_dict("records")
    ]
    note = (
        "On the validation split. A solved head's score, by which trials are ranked, is of all "
        "images but the test split, each predicted by folds without it, and of calibrated "
        "probabilities."
    )
    return Grid("epochs", "Epochs", header, tuple(rows), n_text=0, note=note)


def tests_grid(record: SearchRecord) -> Grid:
    """List the readings of the test split."""
    header = ("When", "What", "Test accuracy", "95 % interval", "Correct", "Balanced", "Macro-F1",
              "Validation", "Validation − test, points")  # fmt: skip
    rows = []
    for row in record.tests:
        gap = _optimism(record, row)
        text = "–"
        if gap is not None:
            text = f"{points(gap.estimate)} ({points(gap.low)} to {points(gap.high)})"
        shares = (row.balanced_acc, row.macro_f1, row.val_acc)
        correct = f"{count(row.n_correct)} of {count(row.n)}"
        ends = percent_range(row.low, row.high)
        first = (moment(row.created_at), row.of, percent(row.accuracy), ends, correct)
        rows.append((*first, *map(percent, shares), text))
    return Grid("tests", "Test split", header, tuple(rows), n_text=2)


def importance_grid(record: SearchRecord) -> Grid:
    """List the importances and the trials that they rest on."""
    found = record.importance
    rows = [
        (row["setting"], percent(row["share"], 0), percent_range(row["low"], row["high"], 0))
        for row in found.shares.to_dict("records")
    ]
    words = {"complete": "complete", "pruned": "pruned (final accuracy estimated)",
             "failed": "diverged (as the worst)"}  # fmt: skip
    parts = ", ".join(f"{found.counts[key]} {text}" for key, text in words.items()
                      if found.counts.get(key))  # fmt: skip
    note = (
        f"Variance of each setting's main effect over the space, by a forest that has seen "
        f"{sum(found.counts.values())} trials: {parts}. Optuna's dashboard counts "
        "complete trials alone, which a pruner has selected."
    )
    header = ("Setting", "Importance", "95 % interval")
    return Grid("importance", "Importance", header, tuple(rows), note=note)


TABLES: tuple[tuple[str, Callable[[SearchRecord], Grid]], ...] = (
    ("Importance", importance_grid),
    ("Learning curves and pruning", lambda record: rank_grid(audit_of(record))),
    ("Learning curves and pruning", lambda record: audited_grid(audit_of(record))),
)
"""The tables below the figures, each with the heading under which it stands."""


def _runs_grid(record: SearchRecord) -> Grid:
    header = ("Began", "Ended", "Outcome", "Host", "Device", "Command")
    rows = tuple(
        (
            *(moment(run.started_at), moment(run.ended_at), _outcome(run.outcome)),
            *(run.host, run.device, hide_password(run.command)),
        )
        for run in record.runs
    )
    return Grid("runs", "Runs", header, rows, n_text=len(header))


def _outcome(because: str | None) -> str:
    words = {
        "no gain": "nothing that was not tried promised a gain",
        "no time": "nothing more fitted into the time",
        "trials": "all trials done",
        "timeout": "the time was up",
    }
    return words.get(because or "", because or "–")


def _others(record: SearchRecord, others: Sequence[SearchRecord]) -> Grid:
    """List several studies side by side."""
    header = ("Study", "Images", "Trials", "Time", "Best", "Backbone", "Freeze depth", "Test")
    rows = []
    for each in (record, *others):
        best, data = each.best, each.study.data
        rows.append(
            (
                each.study.name,
                f"{data.get('source', '–')}, {count(data.get('n_train'))} training",
                str(len(each.trials)),
                duration(each.trials["duration_s"].sum()),
                percent(best.value if best else None),
                best.backbone if best else "–",
                str(best.freeze_depth) if best else "–",
                percent(each.tests[0].accuracy) if each.tests else "–",
            )
        )
    own = record.study.data.get("fingerprint")
    is_same = all(each.study.data.get("fingerprint") == own for each in others)
    note = "" if is_same else "Their images or splits differ, so that accuracies do not compare."
    return Grid("others", "Studies", header, tuple(rows) if others else (), n_text=2, note=note)


# Provenance.


def _data_facts(record: SearchRecord) -> list[tuple[str, str]]:
    study, data = record.study, record.study.data
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    return [
        ("images", str(data.get("source", "–"))),
        ("training", count(data.get("n_train"))),
        ("validation", count(data.get("n_val"))),
        ("test", count(data.get("n_test")) if data.get("n_test") else "none"),
        ("classes", f"{len(record.classes)}: {', '.join(record.classes)}"),
        ("fingerprint", str(data.get("fingerprint", "–"))),
        ("study began", moment(study.created_at)),
        ("seed", str(study.config.get("study", {}).get("seed", "–"))),
        ("devices", ", ".join(dict.fromkeys(record.trials["device"].astype(str))) or "–"),
        ("versions", versions),
        ("weights of the best trial", (record.best and record.best.weights_hash) or "–"),
    ]


def _dimension_words(dim: BaseDistribution) -> str:
    if isinstance(dim, CategoricalDistribution):
        return ", ".join(setting(choice) for choice in dim.choices)
    own = vars(dim)
    log = ", logarithmic" if getattr(dim, "log", False) else ""
    return f"{own['low']:g} to {own['high']:g}{log}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
