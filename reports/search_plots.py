"""The interactive figures of a search, in the order of the page.

A figure is a function with the decorator `plot`: from a study's record to a plotly figure, or to
a sentence that says why there is none. Nothing else need be changed for a new one.
"""

import html
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution

from reports.record import SearchRecord
from reports.trials import as_optuna_study, count_states, is_copy, rank_of, varied
from reports.words import duration, is_missing, percent, plural, setting, shorten
from study.config.formatting import short_backbone
from study.record.models import UNFINISHED

Figure: TypeAlias = go.Figure | str
Draw = Callable[[SearchRecord], Figure | dict[str, Figure]]

BLUE, ORANGE, RED, GREEN, GREY = "#0072b2", "#e69f00", "#d55e00", "#009e73", "#8a919c"
_LOOKS = {
    "complete": (BLUE, "circle"),
    "pruned": (ORANGE, "x-thin-open"),
    "failed": (RED, "triangle-up"),
}
# What a page of a study with thousands of trials draws; the table has as many rows, the CSV all.
MOST_DRAWN = 600
_MOST_CURVES, _MOST_LINES = 150, 200
# More classes than these have no names or no counts in the confusion matrix.
_MOST_NAMED, _MOST_COUNTED = 40, 20
_PERCENT = ".0%"
HOVERED = "trials"
"""Mark of traces whose points are trials, by number: the page shows what `hovers` says."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of the page, or several with a caption in common.

    Attributes:
        name: Of the function that draws it.
        section: Heading of the page under which it stands.
        title: What it shows; empty where each of several figures has its key for a title.
        size: `wide`, `half` or `small`.
    """

    name: str
    section: str
    title: str
    caption: str
    size: str
    function: Draw

    def draw(self, record: SearchRecord) -> Iterator[tuple[str, Figure]]:
        """Give a key and a figure, or a sentence in its place."""
        found = self.function(record)
        yield from found.items() if isinstance(found, dict) else [(self.name, found)]


PLOTS: list[Plot] = []
"""All figures, in the order of the page."""


def plot(
    section: str, title: str, caption: str = "", size: str = "half"
) -> Callable[[Draw], Draw]:
    """Add a function that draws a figure, or several by their titles, to the page."""

    def add(draw: Draw) -> Draw:
        PLOTS.append(Plot(draw.__name__, section, title, caption, size, draw))
        return draw

    return add


def drawn(record: SearchRecord, most: int | None = None) -> pd.DataFrame:
    """Return the trials that are drawn: all, or the best and evenly spaced others."""
    trials = record.trials[~record.trials["state"].isin(UNFINISHED)]
    most = most or MOST_DRAWN
    if len(trials) <= most:
        return trials
    best = rank_of(trials, "value").nlargest(most // 4).index
    others = trials.index.difference(best)
    step = np.linspace(0, len(others) - 1, most - len(best)).astype(int)
    return trials.loc[best.union(others[step])].sort_values("number")


def _scored(record: SearchRecord) -> pd.DataFrame:
    trials = drawn(record)
    return trials[trials["state"].isin(["complete", "pruned"]) & trials["value"].notna()]


def _why_empty(record: SearchRecord) -> str:
    return f"No trial has an accuracy ({count_states(record.trials)})."


def _text(value: Any, most: int = 40) -> str:
    """Write a name as plotly shows it letter by letter."""
    return html.escape(shorten(str(value), most), quote=False)


def _short(value: Any) -> str:
    """Write a choice on a narrow axis; the ends of a backbone's name differ."""
    return _text(short_backbone(setting(value)), 17)


def hovers(record: SearchRecord) -> dict[int, str]:
    """Say of each trial that is drawn how it ended, what it reached, and all its settings."""
    found = {}
    for row in drawn(record).to_dict("records"):
        lines = [f"<b>trial {row['number']}</b> {row['state']}, {percent(row['value'])}"]
        lines += [f"{duration(row['duration_s'])}, {_text(row['origin'], 60)}"]
        if not is_missing(row["reason"]):
            lines.append(_text(row["reason"], 60))
        for name in record.varied:
            value = row.get(f"params_{name}")
            if not is_missing(value) and row["number"] not in record.idle[name]:
                lines.append(f"{_text(name)} = {_text(setting(value))}")
        found[row["number"]] = "<br>".join(lines)
    return found


def with_hovers(figure: go.Figure, texts: Mapping[int, str]) -> go.Figure:
    """Give a figure the texts that the page holds once for all its figures."""
    for trace in figure.data:
        if trace.meta == HOVERED:
            trace.text = [texts[number] for number in trace.customdata]
    return figure


def _by_state(trials: pd.DataFrame, x: "pd.Series[Any]", y: "pd.Series[Any]") -> list[go.Scatter]:
    """Draw trials as points whose look says how they ended; x and y have the trials' index."""
    traces = []
    for state, (colour, symbol) in _LOOKS.items():
        own = trials.index[trials["state"] == state]
        if len(own):
            line = {"width": 2 if state == "pruned" else 0}
            traces.append(
                go.Scatter(
                    x=x[own].tolist(),
                    y=y[own].tolist(),
                    customdata=trials.loc[own, "number"].tolist(),
                    meta=HOVERED,
                    mode="markers",
                    name=state,
                    marker={"color": colour, "symbol": symbol, "size": 7, "line": line},
                    hovertemplate="%{text}<extra></extra>",
                )
            )
    return traces


def _steps(x: list[Any], y: list[Any], name: str) -> go.Scatter:
    """Draw the line of the best."""
    line = {"color": GREEN, "shape": "hv"}
    return go.Scatter(x=x, y=y, name=name, mode="lines", line=line, hoverinfo="skip")


def _figure(data: Any, x: str = "", y: str = "", **layout: Any) -> go.Figure:
    figure = go.Figure(list(data))
    figure.update_layout(template="none", xaxis_title=x, yaxis_title=y, **layout)
    return figure


@plot("Best trial", "Learning curve", "Loss and accuracy after each epoch of the best trial.")
def learning_curve(record: SearchRecord) -> Figure:
    """Draw the best trial's losses and accuracy by epoch."""
    if record.best is None:
        return _why_empty(record)
    own = record.epochs[record.epochs["number"] == record.best.number]
    if len(own) < 2:
        return f"It has {plural(len(own), 'epoch')}."
    x = own["epoch"].tolist()
    lines = (("validation accuracy", "val_acc", BLUE, "y"),
             ("validation loss", "val_loss", ORANGE, "y2"),
             ("training loss", "train_loss", GREY, "y2"))  # fmt: skip
    data = [
        go.Scatter(
            x=x, y=own[column].tolist(), name=name, yaxis=axis, mode="lines+markers",
            line={"color": colour}, hovertemplate="epoch %{x}: %{y:.4f}",
        )
        for name, column, colour, axis in lines
    ]  # fmt: skip
    second = {"title": "loss", "overlaying": "y", "side": "right", "showgrid": False}
    second["rangemode"] = "tozero"
    first = {"title": "accuracy", "tickformat": _PERCENT, "autorangeoptions": {"maxallowed": 1}}
    return _figure(data, "epoch", yaxis=first, yaxis2=second)


@plot(
    "Best trial",
    "Confusion matrix",
    "Rows are the true class, columns the predicted one, on the validation split; colours are "
    "shares of the true class.",
)
def confusion(record: SearchRecord) -> Figure:
    """Draw the best trial's confusion matrix."""
    counts, classes = record.confusion, record.classes
    if counts is None:
        return "No predictions are kept: that needs a trial that finished."
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_text(name, 18) for name in classes]
    ticks: dict[str, Any] = {"tickvals": list(range(len(names))), "ticktext": names}
    if len(classes) > _MOST_NAMED:
        ticks = {}
    # Of many classes the texts alone would be megabytes.
    text = None if len(classes) > _MOST_NAMED else [
        [f"true {names[i]}<br>predicted {names[j]}<br>{plural(int(n), 'image')}"
         for j, n in enumerate(row)] for i, row in enumerate(counts)
    ]  # fmt: skip
    data = go.Heatmap(
        z=np.round(shares, 4).tolist(), hovertext=text, hoverinfo="text" if text else "all",
        colorscale="Blues", zmin=0, zmax=1, showscale=False, xgap=1, ygap=1,
        text=counts.tolist() if len(classes) <= _MOST_COUNTED else None,
        texttemplate="%{text}" if len(classes) <= _MOST_COUNTED else None,
    )  # fmt: skip
    height = min(760, 260 + 14 * len(classes))
    y = {"autorange": "reversed", "title": "true class", **ticks}
    x = {"title": "predicted class", "tickangle": -60, **ticks}
    return _figure([data], xaxis=x, yaxis=y, height=height)


@plot(
    "Progress",
    "Accuracy over minutes",
    "Points are trials at the time they ended; the line is the accuracy of the best trial so far. "
    "It may fall where trials are ranked by loss.",
)
def accuracy_over_minutes(record: SearchRecord) -> Figure:
    """Draw accuracy against the time that trials took up to there."""
    minutes = record.trials["duration_s"].fillna(0.0).cumsum() / 60
    return _progress(record, minutes, record.trials["value"], "minutes")


@plot(
    "Progress",
    "History",
    "What trials are ranked by, in their order; the line is the best so far. Click an entry of "
    "the legend to hide it.",
)
def history(record: SearchRecord) -> Figure:
    """Draw what trials are ranked by, in their order."""
    trials = record.trials
    return _progress(record, trials["number"], rank_of(trials, "value"), "trial")


def _progress(
    record: SearchRecord, x: "pd.Series[Any]", y: "pd.Series[float]", x_title: str
) -> Figure:
    trials, ranks = record.trials, rank_of(record.trials, "value")
    if not ranks.notna().any():
        return _why_empty(record)
    shown = drawn(record)
    foot = y[shown.index].min() - 0.02  # where failed trials stand
    data = _by_state(shown, x, y.fillna(foot))
    finished = ranks.where(trials["state"] == "complete")
    is_new = finished > finished.cummax().shift(fill_value=-np.inf).ffill()
    if is_new.any():
        best = y[is_new].tolist()
        data.append(_steps([*x[is_new], x.iloc[-1]], [*best, best[-1]], "best so far"))
    if y.equals(trials["value"]):
        return _figure(data, x_title, "validation accuracy", yaxis_tickformat=_PERCENT)
    return _figure(data, x_title, "score")


@plot(
    "Importance",
    "What mattered",
    "Share of each setting in the differences of final accuracy, with its 95 % bootstrap "
    "interval.",
)
def importance(record: SearchRecord) -> Figure:
    """Draw the importances."""
    found = record.importance
    if found.why_empty:
        return found.why_empty
    frame = found.shares[::-1]
    above, below = frame["high"] - frame["share"], frame["share"] - frame["low"]
    data = go.Bar(
        x=frame["share"].tolist(), y=[_text(name) for name in frame["setting"]], orientation="h",
        marker_color=BLUE, hovertemplate="%{y}: %{x:.0%}<extra></extra>",
        error_x={"array": above.tolist(), "arrayminus": below.tolist(), "color": GREY},
    )  # fmt: skip
    height = 150 + 30 * len(frame)
    return _figure([data], "share of importance", xaxis_tickformat=_PERCENT, height=height)


@plot(
    "Settings",
    "",
    "Accuracy by the value of each setting, of trials on which it had an effect. Pruned trials "
    "stand at the accuracy of their best epoch.",
    "small",
)
def slices(record: SearchRecord) -> dict[str, Figure]:
    """Draw accuracy against each searched setting."""
    trials = _scored(record)
    figures: dict[str, Figure] = {}
    for name in record.varied:
        dim = record.dims[name]
        own = trials[~trials["number"].isin(record.idle[name])]
        x = own[f"params_{name}"]
        axis: dict[str, Any] = {}
        if isinstance(dim, CategoricalDistribution):
            shorts = [_short(choice) for choice in dim.choices]
            labels = {  # two choices may be alike when they are cut short
                choice: text if shorts.count(text) == 1 else f"{text} ({k})"
                for k, (choice, text) in enumerate(zip(dim.choices, shorts, strict=True), start=1)
            }
            x = x.map(lambda choice, own=labels: own.get(choice, _short(choice)))
            axis = {"type": "category", "categoryorder": "array"}
            axis |= {"categoryarray": [*labels.values()]}
        elif vars(dim)["log"]:
            axis = {"type": "log", "minor": {"showgrid": False}}
            axis |= {"exponentformat": "power", "nticks": 5}
        data = _by_state(own, x, own["value"])
        why = "It had no effect in any trial that has an accuracy."
        figures[name] = why if len(trials) else _why_empty(record)
        if data:
            figures[name] = _figure(
                data, yaxis_tickformat=_PERCENT, showlegend=False, xaxis=axis, height=240
            )
    return figures


@plot(
    "Settings",
    "Parallel coordinates",
    "Each line is a trial, coloured by its final accuracy; that of pruned trials is estimated. "
    f"Of more than {_MOST_LINES} trials, the best and evenly spaced others.",
    "wide",
)
def parallel(record: SearchRecord) -> Figure:
    """Draw Optuna's parallel coordinates of all trials, the pruned ones included."""
    view = _view(record, _MOST_LINES)
    names = varied(view.get_trials(deepcopy=False))
    if len(names) < 2 or record.final.nunique() < 2:
        return "This needs two settings that vary, and trials of different accuracy."
    figure = optuna.visualization.plot_parallel_coordinate(view, names, target_name="accuracy")
    for tick in figure.layout.annotations:  # long names would cover the next axis
        tick.text = _short(tick.text)
    return figure.update_layout(template="none", title=None)


@plot(
    "Settings",
    "Freeze depth and learning rate",
    "Final accuracy by both, interpolated between the trials (points; pruned ones estimated).",
    "wide",
)
def contour(record: SearchRecord) -> Figure:
    """Draw Optuna's contour of the two settings that a fine-tuning study turns on."""
    if record.importance.why_empty:
        return record.importance.why_empty
    pair = ["base_lr", "freeze_depth"]
    view = _view(record, without=record.idle["base_lr"])  # solved heads have no rate
    missing = [name for name in pair if name not in varied(view.get_trials(deepcopy=False))]
    if missing:
        return f"This needs trials with several values of {' and '.join(missing)}."
    figure = optuna.visualization.plot_contour(view, pair, target_name="accuracy")
    return figure.update_layout(template="none", title=None)


def _view(
    record: SearchRecord, most: int | None = None, without: Collection[int] = ()
) -> optuna.study.Study:
    """Copy the trials that are drawn for Optuna's plots, but for some numbers."""
    is_drawn = record.final.index.isin(drawn(record, most)["number"])
    is_drawn &= ~record.final.index.isin(list(without))
    return as_optuna_study(record.frozen, record.final[is_drawn])


@plot(
    "Learning curves and pruning",
    "Learning curves",
    "Validation accuracy after each epoch, of trials with more than one; of more than "
    f"{_MOST_CURVES} such trials, the best.",
    "wide",
)
def curves(record: SearchRecord) -> Figure:
    """Draw accuracy by epoch."""
    trials = _scored(record).set_index("number")
    epochs = record.epochs.dropna(subset=["val_acc"])
    lengths = epochs.groupby("number").size()
    is_long = trials.index.isin(lengths.index[lengths > 1])
    shown = trials[is_long].loc[rank_of(trials[is_long], "value").nlargest(_MOST_CURVES).index]
    if not len(shown):
        return "No trial was trained for more than one epoch."
    own = dict(list(epochs[epochs["number"].isin(shown.index)].groupby("number")))
    data = []
    for state, numbers in shown.groupby("state").groups.items():
        xs: list[Any] = []
        ys: list[Any] = []
        text: list[str] = []
        for number in sorted(numbers):
            xs += [*own[number]["epoch"], None]  # None ends a line
            ys += [*own[number]["val_acc"], None]
            text += [f"trial {number}"] * (len(own[number]) + 1)
        dash = "dot" if state == "pruned" else "solid"
        data.append(
            go.Scatter(
                x=xs, y=ys, text=text, name=state, mode="lines", opacity=0.7,
                line={"color": _LOOKS[str(state)][0], "width": 1.5, "dash": dash},
                hovertemplate="%{text}, epoch %{x}: %{y:.1%}<extra></extra>",
            )
        )  # fmt: skip
    y = "validation accuracy"
    return _figure(data, "epoch", y, yaxis_tickformat=_PERCENT, showlegend=True)


@plot(
    "Cost",
    "Accuracy against time",
    "The line joins finished trials that no other one beats in both.",
)
def cost(record: SearchRecord) -> Figure:
    """Draw accuracy against the time that a trial took."""
    trials = _scored(record)
    trials = trials[trials["duration_s"].notna() & ~is_copy(trials)]
    if not len(trials):
        return _why_empty(record) if record.best is None else "No trial has a duration."
    data = _by_state(trials, trials["duration_s"], trials["value"])
    finished = trials[trials["state"] == "complete"]
    ordered = finished.sort_values(["duration_s", "value"], ascending=[True, False])
    before = ordered["value"].cummax().shift(fill_value=-np.inf)
    front = ordered[ordered["value"] > before]
    if len(front):
        x, y = front["duration_s"].tolist(), front["value"].tolist()
        data.append(_steps(x, y, "best for its time"))
    axis = {"type": "log", "title": "seconds"}
    return _figure(data, y="validation accuracy", yaxis_tickformat=_PERCENT, xaxis=axis)


@plot("Cost", "Timeline", "When each trial ran.")
def timeline(record: SearchRecord) -> Figure:
    """Draw when each trial ran."""
    trials = drawn(record)
    trials = trials[trials["ended_at"].notna()]
    if not len(trials):
        return "No trial has ended."
    begun = pd.to_datetime(trials["started_at"])
    length = (pd.to_datetime(trials["ended_at"]) - begun).dt.total_seconds() * 1000
    data = [
        go.Bar(
            base=begun[own].dt.strftime("%Y-%m-%d %H:%M:%S.%f").tolist(), x=length[own].tolist(),
            y=trials.loc[own, "number"].tolist(), orientation="h", name=state,
            customdata=trials.loc[own, "number"].tolist(), meta=HOVERED, textposition="none",
            marker_color=_LOOKS[str(state)][0], hovertemplate="%{text}<extra></extra>",
        )
        for state, own in trials.groupby("state").groups.items()
    ]  # fmt: skip
    return _figure(data, "UTC", "trial", xaxis_type="date", barmode="overlay")


@plot(
    "Cost",
    "Where the time went",
    "Of all trials. Training holds what frozen layers compute and the solving of heads, the rest "
    "starting and writing; what cached outputs of frozen layers saved is not part of the whole.",
    "wide",
)
def where_the_time_went(record: SearchRecord) -> Figure:
    """Draw the time that trials spent on data, training and evaluation."""
    whole = float(record.trials["duration_s"].sum())
    sums = record.epochs[["data_s", "train_s", "eval_s", "saved_s"]].sum()
    if whole <= 0:
        return "No trial has ended."
    parts = {"data": sums["data_s"], "training": sums["train_s"], "evaluation": sums["eval_s"]}
    parts["rest"] = max(0.0, whole - sum(parts.values()))
    parts["saved by the cache"] = sums["saved_s"]
    colours = (ORANGE, BLUE, GREEN, GREY, "rgba(0,158,115,.35)")
    data = [
        go.Bar(
            x=[float(s)], y=["saved" if "saved" in name else "spent"], name=name,
            orientation="h", marker_color=colour,
            hovertemplate=f"{name}: {duration(float(s))}<extra></extra>",
        )
        for (name, s), colour in zip(parts.items(), colours, strict=True)
        if s > 0
    ]  # fmt: skip
    return _figure(data, "seconds", barmode="stack", height=220)
