"""Write the report of a search: an interactive page that needs no network, and trials as CSV."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution
from plotly.offline import get_plotlyjs

from reports.intervals import Interval, difference_interval, wilson_interval
from reports.page import render_template
from reports.pruning import audit_of, audited_grid
from reports.publish import Grid
from reports.record import SearchRecord, read_record
from reports.search_plots import MOST_DRAWN, PLOTS, drawn, hovers
from reports.trials import MOST_FITTED, count_states, is_copy, rank_of
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
from study.config.formatting import hide_password, short_backbone, study_command
from study.record.models import COMMIT, MODEL_FOLDER, UNFINISHED, WEIGHTS_OF, Test, Trial
from study.record.record import Record

_MOST_FINDINGS, _MOST_CONFUSED = 5, 8
# Keys of the database, of no meaning outside it, and lists.
_INNER = ("id", "study_id", "run_id", "without_effect")
_LONG_S = 30.0  # of shorter trials it does not matter which one is faster
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


def write_report(
    store: Record,
    study_name: str,
    out_dir: Path,
    *,
    beside: Sequence[str] = (),
    refresh_s: int = 0,
) -> ReportPaths:
    """Write a study's report into a folder, over an earlier one.

    Reads the record only. The same record gives the same figures and numbers. Studies that are
    named in `beside` stand in a table of their own. After `refresh_s` seconds the page loads
    itself again; 0 for never.

    Raises:
        RecordError: There is no such study.
    """
    record = read_record(store, study_name)
    studies = studies_grid([record, *(read_record(store, name) for name in beside)])
    contents = _contents(record) | {"studies": studies, "refresh_s": refresh_s}
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(html=out_dir / "report.html", csv=out_dir / "trials.csv")
    part = out_dir / ".report.html"  # a browser that reads meanwhile finds a whole page
    part.write_text(render_template("search.html", contents), encoding="utf-8")
    part.replace(paths.html)
    text = record.trials.drop(columns=list(_INNER)).to_csv(index=False, lineterminator="\n")
    paths.csv.write_text(text, encoding="utf-8", newline="")
    return paths


def _contents(record: SearchRecord) -> dict[str, Any]:
    """Collect what the template shows."""
    sections = _sections(record)
    n_drawn, n = len(drawn(record)), len(record.trials)
    thinned = ""
    if n > MOST_DRAWN:
        thinned = (
            f"Figures and table show {n_drawn:,} of {n:,} trials: the best ones, and evenly "
            "spaced others. trials.csv has all."
        )
    config = record.best.config if record.best else {}
    return {
        "study": record.study,
        "record": record,
        "cards": cards(record),
        "findings": findings(record)[:_MOST_FINDINGS],
        "test_line": _test_line(record),
        "warnings": record.study.data.get("warnings", []),
        "best_figures": sections.pop("Best trial")["figures"],
        "sections": sections,
        "best": _best_facts(record),
        "best_config": json.dumps(config, indent=2, ensure_ascii=False, default=str),
        "confused": confused_grid(record),
        "n_wrong": _n_wrong(record),
        "tests": tests_grid(record),
        "trials": trials_rows(record),
        "score": "accuracy" if config.get("monitor") == "val_acc" else "exp(−loss)",
        "thinned": thinned,
        "data": _data_facts(record),
        "runs": _runs_grid(record),
        "space": [(name, _dimension_words(dim)) for name, dim in record.dims.items()],
        "config": config_words(record.study.config),
        "hovers": json.dumps(hovers(record)),
        "plotly": get_plotlyjs(),  # whole, so that the page needs no network
        "written": moment(datetime.now(UTC)),
    }


def _sections(record: SearchRecord) -> dict[str, dict[str, list[Any]]]:
    """Make the figures, sentences and tables under each heading of the page, in this order."""
    found: dict[str, dict[str, list[Any]]] = {}
    for plot in PLOTS:
        section = found.setdefault(plot.section, {"figures": [], "sentences": [], "grids": []})
        for k, (key, figure) in enumerate(plot.draw(record)):
            text = str(figure.to_json()) if isinstance(figure, go.Figure) else ""
            section["figures"].append(
                {
                    "key": f"{plot.name}-{k}",
                    "title": plot.title or key,
                    "caption": "" if k else plot.caption,
                    "size": plot.size,
                    "json": text,
                    "why_empty": "" if text else figure,
                }
            )
    for title, make in TABLES:
        if (grid := make(record)).rows:
            found[title]["grids"].append(grid)
    found["Importance"]["sentences"] = _importance_basis(record)
    found["Learning curves and pruning"]["sentences"] = audit_of(record).findings
    return found


# Cards and findings.


def cards(record: SearchRecord) -> list[tuple[str, str, str]]:
    """Return name, figure and a few words of what a reader looks for first."""
    trials, best = record.trials, ("–", "no trial has one")
    if record.best is not None:
        accuracy = _validation(record, record.best)
        ends = percent_range(accuracy.low, accuracy.high)
        best = percent(accuracy.estimate), f"{ends} · trial {record.best.number}"
    found = [("Best trial, validation", *best)]
    if record.model:
        members = ", ".join(map(str, record.model.get("trials", [])))
        what = f"mean of trials {members}" if "," in members else f"trial {members}"
        if not members:
            what = f"a first look at {record.model.get('n_images')} images"
        found.insert(0, ("Model, validation", percent(record.model.get("val_acc")), what))
    if record.tests:
        first = record.tests[0]
        more = f" · first of {len(record.tests)} readings" if len(record.tests) > 1 else ""
        text = f"{percent_range(first.low, first.high)} · {first.of}{more}"
        found.append(("Test accuracy", percent(first.accuracy), text))
    else:
        text = f"{count(record.n_test)} images kept apart" if record.n_test else "no test split"
        found.append(("Test accuracy", "not read" if record.n_test else "none", text))
    trained = trials[~is_copy(trials)]
    repeats = len(trials) - len(trained)
    words = f"; {plural(repeats, 'repeat')} of an earlier one not trained" if repeats else ""
    found.append(("Trials", f"{len(trained):,}", count_states(trained) + words))
    found.append(("Time", duration(trials["duration_s"].sum()), "in which trials ran"))
    return found


def _validation(record: SearchRecord, trial: Trial) -> Interval:
    return wilson_interval(round((trial.value or 0.0) * record.n_val), record.n_val)


def findings(record: SearchRecord) -> list[str]:
    """Say what a study found, the most important first."""
    found = (
        _best_finding(record),
        _model_finding(record),
        _rivals_finding(record),
        _test_finding(record),
        _next_finding(record),
        _importance_finding(record),
        _failed_finding(record),
    )
    return [sentence for sentence in found if sentence]


def _best_finding(record: SearchRecord) -> str:
    best, trials = record.best, record.trials
    if best is None:
        return f"No trial has an accuracy ({count_states(trials)})."
    accuracy = _validation(record, best)
    among = int(((trials["state"] == "complete") & ~is_copy(trials)).sum())
    where = f"the best of {among} complete trials" if among > 1 else "the only complete trial"
    if best.state == "pruned":
        where = "the best pruned trial; none is complete"
    value = best.value or 0.0
    text = (
        f"Trial {best.number} is {where}: it classifies {percent(accuracy.estimate)} of the "
        f"{count(record.n_val)} validation images correctly (95 % interval "
        f"{percent_range(accuracy.low, accuracy.high)})."
    )
    top_value = trials.loc[trials["state"] == "complete", "value"].max()
    if top_value > value:
        first = trials.loc[trials["value"] == top_value, "number"].iloc[0]
        text += (
            " It has the highest score, by which trials are ranked; the highest accuracy has "
            f"trial {first}, {percent(top_value)}."
        )
    is_recipe = trials["origin"].astype(str).str.startswith("recipe:")
    recipes = trials[is_recipe & (trials["state"] == "complete") & trials["value"].notna()]
    if best.state != "complete" or not len(recipes):
        return text
    top = recipes.iloc[int(rank_of(recipes, "value").to_numpy().argmax())]
    name = str(top["origin"]).removeprefix("recipe:")
    if int(top["number"]) == best.number:
        return f"{text} It is a plain recipe ({name}); no trial that was searched is better."
    gain = 100 * (value - float(top["value"]))
    words = f"{abs(gain):.1f} points {'above' if gain >= 0 else 'below'}"
    return (
        f"{text} Trial {best.number} is {words} the best plain recipe ({name}, trial "
        f"{top['number']})."
    )


def _model_finding(record: SearchRecord) -> str | None:
    """Say what `model/` is, which is what a user takes away."""
    numbers = record.model.get("trials")
    if not numbers:
        return None
    what = f"is trial {numbers[0]}"
    if len(numbers) > 1:
        what = f"averages the predictions of trials {', '.join(map(str, numbers))}"
    text = (
        f"The model to use is in {record.study.output / MODEL_FOLDER}: it {what}, with "
        f"{percent(record.model.get('val_acc'))} of the validation images right"
    )
    if any(record.model.get("refitted", [])):
        return f"{text} before it was fitted again on all images but the test split."
    return f"{text}."


def _rivals_finding(record: SearchRecord) -> str | None:
    """Say which complete trials the validation split cannot distinguish from the best."""
    best, trials = record.best, record.trials
    if best is None or best.state != "complete":
        return None
    accuracy = _validation(record, best)
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
    if len(quick) and (best.duration_s or 0.0) > _LONG_S:
        row = quick.sort_values(["value", "duration_s"], ascending=[False, True]).iloc[0]
        text += (
            f" Much faster was trial {row['number']} ({percent(row['value'])}): it took "
            f"{duration(row['duration_s'])} instead of {duration(best.duration_s)}."
        )
    return text


def _optimism(record: SearchRecord, test: Test) -> Interval | None:
    """Return validation minus test accuracy with its interval."""
    if test.val_acc is None:
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
        f"{top['setting']} has the largest share of the importance, {percent(top['share'], 0)} "
        f"(95 % interval {percent_range(top['low'], top['high'], 0)})"
    )
    rivals = frame.loc[1:].loc[frame["high"] >= top["low"], "setting"]
    return f"{text}; {', '.join(rivals)} may matter as much." if len(rivals) else f"{text}."


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


def _next_finding(record: SearchRecord) -> str | None:
    """Say how to continue a search whose time ended before its plan did."""
    outcome = record.runs[-1].outcome if record.runs else None
    if outcome not in ("no time", "timeout", "interrupted"):
        return None
    # The page may lie elsewhere by now, so it names no database.
    command = study_command("resume", record.study.name, "studies.db", "--time 30m")
    return f"The last run ended before all was tried ({outcome}); {command} continues it."


def _test_line(record: SearchRecord) -> str:
    if not record.n_test:
        return "There is no test split: only new images can show how optimistic validation is."
    if not record.tests:
        about, most = (f"{100 * share:.1f} points" for share in record.optimism)
        return (
            f"The test split ({count(record.n_test)} images) has not been read. The validation "
            "accuracy of the best of many trials is too high: by about "
            f"{about} if all are equally good (simulated from their predictions), by {most} at "
            "most, if all epochs erred independently. Read the test split once, at the end."
        )
    numbers = ", ".join(test.of for test in record.tests)
    if len(record.tests) == 1:
        return f"The test split has been read once, for {numbers}."
    return (
        f"The test split has been read {len(record.tests)} times ({numbers}). Only the first "
        "result is independent of the others."
    )


# Tables.


def trials_rows(record: SearchRecord) -> dict[str, Any]:
    """Return the table of trials: its header, and rows with a state and cells.

    A cell is the value to sort by and the text that is shown.
    """
    trials = record.trials
    trials = trials[trials.index.isin(drawn(record).index) | trials["state"].isin(UNFINISHED)]
    has_scores = bool((trials["score"].notna() & (trials["score"] != trials["value"])).any())
    has_reasons = bool(trials["reason"].notna().any())
    best = -1 if record.best is None else record.best.number
    rows = []
    for row in trials.to_dict("records"):
        number, reason = row["number"], "" if is_missing(row["reason"]) else row["reason"]
        # What is the same in all trials stands under Provenance.
        values = (None if number in record.idle[n] else row[f"params_{n}"] for n in record.varied)
        cells = [
            (number, str(number)),
            (row["state"], row["state"]),
            _cell(row["value"], percent(row["value"])),
            *([_cell(row["score"], f"{row['score']:.4f}")] if has_scores else []),
            (row["epochs_done"], count(row["epochs_done"])),
            _cell(row["duration_s"], duration(row["duration_s"])),
            *(_cell(value, setting(value)) for value in values),
            (row["origin"], row["origin"]),
            *([(reason, reason)] if has_reasons else []),
        ]
        state = f"{row['state']} best" if number == best else row["state"]
        rows.append({"state": state, "cells": cells})
    score = ("score",) if has_scores else ()
    last = ("from", "reason") if has_reasons else ("from",)
    header = ("trial", "state", "accuracy", *score, "epochs", "time", *record.varied, *last)
    return {"header": header, "rows": rows, "n_text": 2}


def _cell(value: Any, text: str) -> tuple[Any, str]:
    if is_missing(value):
        return "", "–"
    return text if isinstance(value, bool) else value, text


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


def confused_grid(record: SearchRecord) -> Grid:
    """List the most frequent mistakes of the best trial."""
    rows = []
    if record.confusion is not None and len(record.classes) > 2:  # else the matrix says it all
        totals = record.confusion.sum(axis=1)
        errors = record.confusion - np.diag(np.diag(record.confusion))
        order = np.argsort(-errors, axis=None, kind="stable")[:_MOST_CONFUSED]
        for truth, guess in zip(*np.unravel_index(order, errors.shape), strict=True):
            if n := int(errors[truth, guess]):
                names = record.classes[truth], record.classes[guess]
                rows.append((*names, str(n), percent(n / totals[truth], 0)))
    header = ("True class", "Predicted", "Images", "Of the class")
    return Grid("confused", "Most confused pairs", header, tuple(rows), n_text=2)


def _n_wrong(record: SearchRecord) -> int:
    """Count the best trial's mistakes on the validation split."""
    counts = record.confusion
    return 0 if counts is None else int(counts.sum() - np.trace(counts))


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


TABLES: tuple[tuple[str, Callable[[SearchRecord], Grid]], ...] = (
    ("Learning curves and pruning", lambda record: audited_grid(audit_of(record))),
)
"""The tables below the figures, each with the heading under which it stands."""


def _importance_basis(record: SearchRecord) -> list[str]:
    """Say which trials the importances rest on."""
    counts = record.importance.counts
    if record.importance.why_empty:
        return []
    words = {"complete": "complete", "pruned": "pruned (final accuracy estimated)",
             "failed": "diverged (as the worst)"}  # fmt: skip
    parts = ", ".join(f"{counts[key]} {text}" for key, text in words.items() if counts.get(key))
    n = sum(counts.values())
    drawn_of = f"{MOST_FITTED:,} of " if n > MOST_FITTED else ""
    return [
        "Variance of each setting's main effect over the space, by a forest that has seen "
        f"{drawn_of}{n:,} trials: {parts}. Optuna's dashboard counts complete trials alone, which "
        "a pruner has selected."
    ]


def studies_grid(records: Sequence[SearchRecord]) -> Grid:
    """List several studies side by side."""
    header = ("Study", "Images", "Fingerprint", "Trials", "Time", "Best", "Backbone",
              "Freeze depth", "Test")  # fmt: skip
    rows = []
    for record in records:
        best, data = record.best, record.study.data
        images = f"{data['source']}, {count(data['n_train'])} training"
        whole = duration(record.trials["duration_s"].sum())
        rows.append(
            (
                *(record.study.name, images, data["fingerprint"][:12]),
                *(str(len(record.trials)), whole, percent(best.value if best else None)),
                *((best.backbone, str(best.freeze_depth)) if best else ("–", "–")),
                percent(record.tests[0].accuracy) if record.tests else "–",
            )
        )
    differ = len({record.study.data["fingerprint"] for record in records}) > 1
    note = "Their images or splits differ, so that accuracies do not compare." if differ else ""
    return Grid("studies", "Studies", header, tuple(rows), n_text=3, note=note)


def _runs_grid(record: SearchRecord) -> Grid:
    header = ("Began", "Ended", "Because", "Host", "Device", "Git commit", "Command")
    rows = tuple(
        (
            *(moment(run.started_at), moment(run.ended_at), run.outcome or "–"),
            *(run.host, run.device, run.versions.get(COMMIT, "–")),
            hide_password(run.command),
        )
        for run in record.runs
    )
    return Grid("runs", "Runs", header, rows, n_text=len(header))


# Provenance.


def _data_facts(record: SearchRecord) -> list[tuple[str, str]]:
    study, data = record.study, record.study.data
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    used = {key: value for run in record.runs for key, value in run.versions.items()}
    weights = (
        f"{short_backbone(key.removeprefix(WEIGHTS_OF))} {value[:12]}"
        for key, value in used.items()
        if key.startswith(WEIGHTS_OF)
    )
    return [
        ("images", data["source"]),
        ("training", count(data["n_train"])),
        ("validation", count(record.n_val)),
        ("test", count(record.n_test) if record.n_test else "none"),
        ("classes", f"{len(record.classes)}: {', '.join(record.classes)}"),
        ("fingerprint", data["fingerprint"]),
        ("study began", moment(study.created_at)),
        ("seed", str(study.config.get("study", {}).get("seed", "–"))),
        ("devices", ", ".join(dict.fromkeys(record.trials["device"].astype(str))) or "–"),
        ("versions", versions),
        ("pretrained weights, SHA-256", ", ".join(weights) or "–"),
        ("weights of the best trial, SHA-256", (record.best and record.best.weights_hash) or "–"),
    ]


def _dimension_words(dim: BaseDistribution) -> str:
    if isinstance(dim, CategoricalDistribution):
        return ", ".join(setting(choice) for choice in dim.choices)
    own = vars(dim)
    return f"{own['low']:g} to {own['high']:g}{', logarithmic' if own['log'] else ''}"
