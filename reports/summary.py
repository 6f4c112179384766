"""What a study found, in figures with intervals and in sentences."""

import shlex
from dataclasses import dataclass

import pandas as pd

from reports.frames import busy_seconds, is_copy, rank_of
from reports.importance import Importance
from reports.intervals import Interval, difference_interval, wilson_interval
from reports.record import SearchRecord
from reports.words import (
    count,
    duration,
    percent,
    percent_range,
    plural,
    points,
)
from study.config.formatting import hide_password
from study.record.models import UNFINISHED, Test

_STORAGE = "studies.db"  # where the command line looks without --storage
_STATES = (("complete", "finished"), ("pruned", "pruned"), ("failed", "failed"))


@dataclass(frozen=True, slots=True)
class Look:
    """A look at the test split, beside what validation had promised.

    Attributes:
        row: As recorded.
        accuracy: On the test split, with its 95 % interval.
        optimism: Validation minus test accuracy, with its 95 % interval; None where unknown.
    """

    row: Test
    accuracy: Interval
    optimism: Interval | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The findings that a reader wants first.

    Attributes:
        states: How the trials ended, as `23 finished, 15 pruned`.
        busy: Time in which trials ran.
        accuracy: Of the best trial on the validation split, with its 95 % interval.
        looks: At the test split, oldest first.
        findings: Sentences, the most important first.
        test_line: Whether the test split has been read, and how often.
        next_commands: What to type next.
    """

    states: str
    busy: str
    accuracy: Interval | None
    looks: tuple[Look, ...]
    findings: tuple[str, ...]
    test_line: str
    next_commands: tuple[str, ...]


def summarise(record: SearchRecord, importance: Importance) -> Summary:
    """Put a study's findings together."""
    accuracy = _validation(record)
    looks = tuple(_look(row, record.n_val) for row in record.tests)
    sentences = [
        _best_sentence(record, accuracy),
        _gain_sentence(record),
        _rivals_sentence(record, accuracy),
        *_optimism_sentences(looks),
        _importance_sentence(importance),
        _failed_sentence(record.trials),
        _running_sentence(record.trials),
    ]
    return Summary(
        states=_states(record.trials),
        busy=duration(busy_seconds(record.trials).max()) if len(record.trials) else "–",
        accuracy=accuracy,
        looks=looks,
        findings=tuple(sentence for sentence in sentences if sentence),
        test_line=_test_line(record),
        next_commands=_next_commands(record),
    )


def _states(trials: pd.DataFrame) -> str:
    counts = trials["state"].value_counts()
    text = (*_STATES, *((state, state) for state in UNFINISHED))
    parts = [f"{counts[state]} {word}" for state, word in text if counts.get(state)]
    return ", ".join(parts) or "no trials yet"


def _validation(record: SearchRecord) -> Interval | None:
    if record.best is None or record.best.value is None or not record.n_val:
        return None
    return wilson_interval(round(record.best.value * record.n_val), record.n_val)


def _look(row: Test, n_val: int) -> Look:
    accuracy = Interval(row.accuracy, row.low, row.high)
    optimism = None
    if row.val_acc is not None and n_val:
        promised = wilson_interval(round(row.val_acc * n_val), n_val)
        optimism = difference_interval(promised, accuracy)
    return Look(row, accuracy, optimism)


def _best_sentence(record: SearchRecord, accuracy: Interval | None) -> str:
    best = record.best
    if best is None:
        return f"No trial has an accuracy ({_states(record.trials)})."
    among = int((record.trials["state"] == "complete").sum())
    where = f"the best of {among} finished trials" if among > 1 else "the only finished trial"
    if best.state == "pruned":
        where = "the best pruned trial; none has finished"
    if accuracy is None:
        return f"Trial {best.number} is {where}: {percent(best.value)} validation accuracy."
    return (
        f"Trial {best.number} is {where}: it gets {percent(accuracy.estimate)} of the "
        f"{count(record.n_val)} validation images right (95 % interval "
        f"{percent_range(accuracy.low, accuracy.high)})."
    )


def _gain_sentence(record: SearchRecord) -> str | None:
    trials, best = record.trials, record.best
    is_recipe = trials["origin"].astype(str).str.startswith("recipe:")
    recipes = trials[is_recipe & (trials["state"] == "complete") & trials["value"].notna()]
    if best is None or best.value is None or best.state != "complete" or not len(recipes):
        return None
    ranked = recipes.assign(rank=rank_of(recipes, "value"))
    top = ranked.sort_values(["rank", "number"], ascending=[False, True]).iloc[0]
    name = str(top["origin"]).removeprefix("recipe:")
    if int(top["number"]) == best.number:
        return f"It is a plain recipe ({name}): the search found nothing better."
    gain = 100 * (best.value - top["value"])
    text = f"The best plain recipe ({name}, trial {top['number']}) reached {percent(top['value'])}"
    if gain < 0:
        chosen = f"which was chosen by its {best.chosen_by}"
        return f"{text}, {-gain:.1f} points more than the best trial, {chosen}."
    return f"{text}; the search gained {gain:.1f} points on validation."


def _rivals_sentence(record: SearchRecord, accuracy: Interval | None) -> str | None:
    """Say which finished trials the validation split cannot distinguish from the best."""
    best, trials = record.best, record.trials
    if best is None or accuracy is None or best.state != "complete":
        return None
    is_other = (trials["number"] != best.number) & ~is_copy(trials)
    is_near = trials["value"].between(accuracy.low, accuracy.high)
    rivals = trials[(trials["state"] == "complete") & is_other & is_near]
    if not len(rivals):
        return None
    text = (
        f"{plural(len(rivals), 'other finished trial')} "
        f"{'lies' if len(rivals) == 1 else 'lie'} within that interval, so the order among them "
        "may be luck."
    )
    quick = rivals.dropna(subset=["duration_s"]).sort_values("duration_s")
    if len(quick) and best.duration_s and quick["duration_s"].iloc[0] < 0.7 * best.duration_s:
        row = quick.iloc[0]
        text += (
            f" The cheapest of them, trial {row['number']} ({percent(row['value'])}), took "
            f"{duration(row['duration_s'])} instead of {duration(best.duration_s)}."
        )
    return text


def _optimism_sentences(looks: tuple[Look, ...]) -> list[str]:
    """Say, for the first look at each trial, how far validation was above test."""
    sentences = []
    first: dict[str, Look] = {}
    for look in looks:
        first.setdefault(look.row.of, look)
    for what, look in first.items():
        text = (
            f"{what[0].upper()}{what[1:]} on the test split: {percent(look.accuracy.estimate)} of "
            f"{count(look.row.n)} images (95 % interval "
            f"{percent_range(look.accuracy.low, look.accuracy.high)})."
        )
        if look.optimism is not None:
            gap = look.optimism
            side = "above" if gap.estimate >= 0 else "below"
            text += (
                f" Its validation accuracy lies {abs(100 * gap.estimate):.1f} points {side} that "
                f"(95 % interval {points(gap.low)} to {points(gap.high)}): "
            )
            if gap.low > 0:
                text += "validation was optimistic, as figures are that one has chosen among."
            elif gap.high < 0:
                text += "the test images are easier than the validation images."
            else:
                text += "no more than chance alone can give."
        sentences.append(text)
    return sentences


def _importance_sentence(importance: Importance) -> str | None:
    if not importance.factors:
        return None
    top = importance.factors[0]
    text = (
        f"What mattered most is {top.name}: {percent(top.share, 0)} of the importance (95 % "
        f"interval {percent_range(top.low, top.high, 0)})"
    )
    rivals = [factor.name for factor in importance.factors[1:] if factor.high >= top.low]
    return f"{text}, not clearly ahead of {', '.join(rivals)}." if rivals else f"{text}."


def _failed_sentence(trials: pd.DataFrame) -> str | None:
    failed = trials[trials["state"] == "failed"]
    if not len(failed):
        return None
    kinds = failed["reason"].fillna("no reason recorded").astype(str)
    common = kinds.str.split(":").str[0].value_counts()
    text = ", ".join(f"{n} × {kind}" for kind, n in common.head(4).items())
    return f"{plural(len(failed), 'trial')} failed ({text}); the table of trials has the reasons."


def _running_sentence(trials: pd.DataFrame) -> str | None:
    endings = {
        "running": "running when this was written",
        "interrupted": "interrupted; resume deals with it",
    }
    text = []
    for state, words in endings.items():
        if n := int((trials["state"] == state).sum()):
            text.append(f"{plural(n, 'trial')} {'was' if n == 1 else 'were'} {words}.")
    return " ".join(text) or None


def _test_line(record: SearchRecord) -> str:
    n = len(record.tests)
    if not n:
        if not record.n_test:
            return "There is no test split."
        return f"The test split ({count(record.n_test)} images) has not been read."
    numbers = ", ".join(look.of for look in record.tests)
    if n == 1:
        return f"The test split has been read once, for {numbers}."
    return (
        f"The test split has been read {n} times ({numbers}). Only the first reading is "
        "untouched by what the others showed."
    )


def _next_commands(record: SearchRecord) -> tuple[str, ...]:
    name = shlex.quote(record.study.name)
    storage = str(record.study.config.get("study", {}).get("storage", _STORAGE))
    if storage != _STORAGE:
        name += f" --storage {shlex.quote(hide_password(storage))}"
    commands = []
    if record.best is not None:
        commands.append(f"python -m study show {name} --trial {record.best.number}")
        if record.best.state == "complete" and record.n_test and not record.tests:
            commands.append(f"python -m study test {name}")
    commands.append(f"python -m study resume {name} --trials {_more_trials(record)}")
    return tuple(commands)


def _more_trials(record: SearchRecord) -> int:
    asked = int(record.study.config.get("study", {}).get("trials") or 0)
    done = int((~record.trials["state"].isin(UNFINISHED)).sum())
    return asked if done < asked else done + 20
