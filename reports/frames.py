"""What the plots draw and the tables list, as plain frames made from the record's frames."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from study.record.models import UNFINISHED

PARAM_PREFIX = "params_"
"""Columns of the trials frame that hold suggested values begin with this."""

ParamValue = str | int | float | bool | None

# A range guessed from values alone (the study's configuration does not name the dimension) is
# taken as logarithmic when it spans two decades: assumption.
_LOG_SPAN = 100.0
# As many different numbers as this, and they are drawn as an axis, not as choices: assumption.
_MAX_GUESSED_CHOICES = 6


@dataclass(frozen=True, slots=True)
class Dimension:
    """One searched setting.

    Attributes:
        name: Key of the training configuration.
        choices: The values of a choice, in the user's order; empty for a range.
        low: Lower end of a range.
        high: Upper end of a range.
        is_log: The range is searched in the logarithm.
        is_int: The range holds whole numbers only.
    """

    name: str
    choices: tuple[ParamValue, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_int: bool = False

    @property
    def is_single(self) -> bool:
        """Whether the dimension holds one value only, and so decides nothing."""
        return len(self.choices) == 1 or (not self.choices and self.low == self.high)

    def value(self, raw: Any) -> ParamValue:
        """Bring a cell of the trials frame back to the value that was suggested.

        A column with gaps turns whole numbers into floats and None into NaN; this undoes it.

        Raises:
            KeyError: The cell is empty: the trial did not have this setting.
        """
        value = raw.item() if isinstance(raw, np.generic) else raw
        is_empty = value is None or (isinstance(value, float) and math.isnan(value))
        if is_empty and None not in self.choices:
            raise KeyError(self.name)
        if is_empty:
            return None
        if self.choices:
            return self.choices[self.choices.index(value)]
        return int(value) if self.is_int else float(value)


def param_names(trials: pd.DataFrame) -> list[str]:
    """List the suggested settings of a trials frame, in column order."""
    return [c.removeprefix(PARAM_PREFIX) for c in trials.columns if c.startswith(PARAM_PREFIX)]


def dimensions(space: Mapping[str, Any], trials: pd.DataFrame) -> tuple[Dimension, ...]:
    """Describe every setting that the trials varied or could have varied.

    The study's space comes first; values outside it (the range was changed on the way) widen
    it, and settings that it does not name are described from their values.

    Args:
        space: The space of the study's configuration: name -> {low, high, log?} or {choices},
            or a plain value for a fixed setting.
        trials: One row per trial.
    """
    names = [name for name in space if PARAM_PREFIX + name in trials]
    names += [name for name in param_names(trials) if name not in space]
    return tuple(_dimension(name, space.get(name), trials[PARAM_PREFIX + name]) for name in names)


def _dimension(name: str, declared: Any, column: "pd.Series[Any]") -> Dimension:
    seen = [v.item() if isinstance(v, np.generic) else v for v in column.dropna()]
    if isinstance(declared, Mapping) and declared.get("choices"):
        choices = list(declared["choices"])
        return Dimension(name, choices=_with_unseen(choices, seen))
    is_numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in seen)
    if isinstance(declared, Mapping) and declared.get("low") is not None and is_numeric:
        low, high = declared["low"], declared["high"]
        is_int = isinstance(low, int) and isinstance(high, int) and all(v == int(v) for v in seen)
        return Dimension(
            name,
            low=float(min([low, *seen])),
            high=float(max([high, *seen])),
            is_log=bool(declared.get("log")),
            is_int=is_int,
        )
    if not is_numeric or len(set(seen)) <= _MAX_GUESSED_CHOICES:
        unique = list(dict.fromkeys(seen))
        ordered = sorted(unique) if is_numeric else sorted(unique, key=str)
        return Dimension(name, choices=tuple(ordered))
    low, high = min(seen), max(seen)
    return Dimension(
        name,
        low=float(low),
        high=float(high),
        is_log=low > 0 and high / low >= _LOG_SPAN,
        is_int=all(v == int(v) for v in seen),
    )


def _with_unseen(choices: list[Any], seen: list[Any]) -> tuple[ParamValue, ...]:
    extra = [v for v in dict.fromkeys(seen) if v not in choices]
    return (*choices, *extra)


def is_diverged(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Say which trials failed because their training diverged, by the reason recorded."""
    reasons = trials["reason"].fillna("").astype(str)
    return (trials["state"] == "failed") & reasons.str.startswith("diverged")


def is_copy(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Say which trials were not trained, because one with equal settings and seed had been."""
    return trials["origin"].astype(str).str.startswith("same as")


def rank_of(frame: pd.DataFrame, accuracy: str) -> "pd.Series[float]":
    """Give what trials or epochs are ranked by: the score, or the accuracy where there is none."""
    known = frame[accuracy].astype(float)
    return frame["score"].astype(float).fillna(known) if "score" in frame else known


def accuracy_of_best(epochs: pd.DataFrame) -> "pd.Series[float]":
    """Give, at each epoch, the accuracy of its trial's best epoch so far.

    Args:
        epochs: One row per trial and epoch, in this order.
    """
    numbers, ranks = epochs["number"], rank_of(epochs, "val_acc")
    before = ranks.groupby(numbers).cummax().groupby(numbers).shift()
    is_new = ~(ranks <= before)  # the first has none before it
    return epochs["val_acc"].astype(float).where(is_new).groupby(numbers).ffill()


def best_number(trials: pd.DataFrame) -> int | None:
    """Name the best trial: highest score, earliest on a tie; pruned ones only if none finished.

    A trial without a score is ranked by its value.
    """
    for state in ("complete", "pruned"):
        scored = trials[(trials["state"] == state) & trials["value"].notna()]
        if len(scored):
            ranked = scored.assign(rank=rank_of(scored, "value"))
            ordered = ranked.sort_values(["rank", "number"], ascending=[False, True])
            return int(ordered["number"].iloc[0])
    return None


def busy_seconds(trials: pd.DataFrame) -> "pd.Series[float]":
    """Give, for the end of each trial, the seconds so far in which any trial was running.

    Trials that ran side by side count once, and the pause between two runs of a study counts
    nothing, so that a night between them does not stretch the axis.
    """
    starts, ends = (_seconds(trials[column]) for column in ("started_at", "ended_at"))
    spans: list[tuple[float, float]] = []  # disjoint, in order
    covered_until = -math.inf
    for i in np.argsort(starts, kind="stable"):
        start, end = max(starts[i], covered_until), ends[i]
        if end > start:  # False where either is NaN
            spans.append((start, end))
            covered_until = end
    if not spans:
        return pd.Series(np.where(np.isnan(ends), np.nan, 0.0), index=trials.index)
    begun, until = np.array(spans).T
    before = np.concatenate([[0.0], np.cumsum(until - begun)[:-1]])
    span = np.maximum(np.searchsorted(begun, ends, side="left") - 1, 0)
    inside = np.maximum(np.minimum(ends, until[span]) - begun[span], 0.0)
    return pd.Series(before[span] + inside, index=trials.index)


def _seconds(times: "pd.Series[Any]") -> np.ndarray[Any, np.dtype[np.float64]]:
    moments = pd.to_datetime(times, utc=True)
    epoch = pd.Timestamp(0, tz="UTC")
    return np.asarray((moments - epoch).dt.total_seconds(), dtype=np.float64)


def history_frame(trials: pd.DataFrame) -> pd.DataFrame:
    """Give each ended trial its value and the best finished value so far.

    Returns:
        number, state, value, best; sorted by number.
    """
    ended = trials[~trials["state"].isin(UNFINISHED)].sort_values("number")
    frame = ended[["number", "state", "value"]].astype({"value": float}).reset_index(drop=True)
    finished = frame["value"].where(frame["state"] == "complete")
    ranks = pd.Series(rank_of(ended, "value").to_numpy(), index=frame.index)
    frame["best"] = _best_so_far(finished, ranks.where(finished.notna()))
    return frame


def _best_so_far(values: "pd.Series[float]", ranks: "pd.Series[float]") -> "pd.Series[float]":
    """Give at each place the value of the finished trial that ranks highest so far."""
    before = ranks.fillna(-math.inf).cummax().shift(fill_value=-math.inf)
    return values.where(ranks > before).ffill()


def curves_frame(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Give validation accuracy by epoch: number, epoch, val_acc, state, is_best."""
    states = trials.set_index("number")["state"]
    frame = epochs[["number", "epoch", "val_acc"]].sort_values(["number", "epoch"])
    frame = frame[frame["number"].isin(states.index)].reset_index(drop=True)
    frame["state"] = frame["number"].map(states)
    best = best_number(trials)
    frame["is_best"] = frame["number"] == (-1 if best is None else best)
    return frame


def slice_frame(trials: pd.DataFrame, dimension: Dimension) -> pd.DataFrame:
    """Give one setting against accuracy: number, x, value, state.

    A choice's x is its position; a pruned trial's value is what it had when it was stopped.
    """
    rows = []
    column = trials[PARAM_PREFIX + dimension.name]
    for number, raw, value, state in zip(
        trials["number"], column, trials["value"], trials["state"], strict=True
    ):
        if state not in ("complete", "pruned") or pd.isna(value):
            continue
        try:
            setting = dimension.value(raw)
        except KeyError:
            continue
        if dimension.choices:
            x = float(dimension.choices.index(setting))
        else:
            assert isinstance(setting, (int, float)), "a range holds numbers"
            x = float(setting)
        rows.append((int(number), x, float(value), state))
    return pd.DataFrame(rows, columns=["number", "x", "value", "state"])


def is_on_front(
    cost: Sequence[float], value: Sequence[float]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the points that no other point beats: cheaper and at least as good, or the reverse.

    Args:
        cost: Shape (N,), less is better.
        value: Shape (N,), more is better.

    Returns:
        Shape (N,). Of equal points the first is marked.
    """
    front = np.zeros(len(cost), dtype=bool)
    best = -math.inf
    for i in np.lexsort((-np.asarray(value, dtype=float), np.asarray(cost, dtype=float))):
        if value[i] > best:
            front[i] = True
            best = value[i]
    return front


def cost_frame(trials: pd.DataFrame) -> pd.DataFrame:
    """Give accuracy against duration: number, duration_s, value, backbone, state, is_front.

    The front is over finished trials: what a pruned one would have cost is not known. Trials
    that copy an earlier one's result cost nothing and are left out.
    """
    has_both = trials["value"].notna() & trials["duration_s"].notna()
    is_scored = trials["state"].isin(["complete", "pruned"])
    kept = trials[has_both & is_scored & ~is_copy(trials)]
    frame = kept[["number", "duration_s", "value", "backbone", "state"]].reset_index(drop=True)
    frame = frame.astype({"duration_s": float, "value": float})
    frame["is_front"] = False
    finished = frame.index[frame["state"] == "complete"]
    front = is_on_front(
        frame.loc[finished, "duration_s"].tolist(), frame.loc[finished, "value"].tolist()
    )
    frame.loc[finished, "is_front"] = front
    return frame


def depth_lr_frame(trials: pd.DataFrame) -> pd.DataFrame:
    """Give freeze depth, base learning rate, value, score and state of trials that have them.

    Empty where the study did not search the base learning rate.
    """
    columns = ["number", "freeze_depth", "base_lr", "value", "score", "state"]
    if PARAM_PREFIX + "base_lr" not in trials:
        return pd.DataFrame(columns=columns)
    named = trials.rename(columns={PARAM_PREFIX + "base_lr": "base_lr"})
    frame = named.assign(score=rank_of(trials, "value"))[columns]
    is_scored = frame["state"].isin(["complete", "pruned"])
    return frame[is_scored].dropna().reset_index(drop=True)


def confused_pairs(
    matrix: np.ndarray[Any, Any], classes: Sequence[str], n_pairs: int = 8
) -> pd.DataFrame:
    """List the commonest mistakes: true class, predicted class, count, share of the true class.

    Args:
        matrix: Counts, shape (K, K), rows = truth.
        classes: K names.
        n_pairs: At most so many rows.
    """
    errors = np.array(matrix, dtype=float)
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:n_pairs]
    rows = []
    for truth, predicted in zip(*np.unravel_index(order, errors.shape), strict=True):
        n = int(errors[truth, predicted])
        if n:
            share = n / float(np.sum(matrix[truth]))
            rows.append((classes[truth], classes[predicted], n, share))
    return pd.DataFrame(rows, columns=["truth", "predicted", "n", "share"])
