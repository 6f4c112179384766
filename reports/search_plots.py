"""The interactive figures of a search, in the order of the page.

A figure is a function with the decorator `plot`: from a study's record to a plotly figure, or to
a sentence that says why there is none. Nothing else need be changed for a new one.
"""

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution

from reports.pruning import early_rank_correlation
from reports.record import SearchRecord
from reports.trials import as_optuna_study, is_copy, is_on_front, rank_of, varied
from reports.words import duration, percent, plural, setting, shorten
from study.config.formatting import short_backbone
from study.record.models import UNFINISHED

Figures = Iterator[tuple[str, go.Figure | str]]
Draw = Callable[[SearchRecord], Figures]

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
    """A figure of the page.

    Attributes:
        name: Of the function that draws it.
        section: Heading of the page under which it stands.
        title: What it shows.
        caption: How to read it.
        draw: Yields a key and a figure, or a sentence in its place; a plot may be several.
        size: `wide`, `half` or `small`.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Draw
    size: str = "half"


PLOTS: list[Plot] = []
"""All figures, in the order of the page."""


def plot(section: str, title: str, caption: str = "", size: str = "half") -> Callable[[Any], Any]:
    """Add a function that draws a figure to the page."""

    def add(draw: Callable[[SearchRecord], go.Figure | str]) -> Any:
        def one(record: SearchRecord) -> Figures:
            yield draw.__name__, draw(record)

        PLOTS.append(Plot(draw.__name__, section, title, caption, one, size))
        return draw

    return add


def plots(section: str, caption: str = "", size: str = "small") -> Callable[[Draw], Draw]:
    """Add a function that draws several figures, each under its own title."""

    def add(draw: Draw) -> Draw:
        PLOTS.append(Plot(draw.__name__, section, "", caption, draw, size))
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
    trials = trials[trials["state"].isin(["complete", "pruned"]) & trials["value"].notna()]
    return trials.astype({"value": float})


def _why_empty(record: SearchRecord) -> str:
    if not len(record.trials):
        return "The study has no trials yet."
    states = ", ".join(
        f"{n} {state}" for state, n in record.trials["state"].value_counts().items()
    )
    return f"No trial has an accuracy ({states})."


def _text(value: Any, most: int = 40) -> str:
    """Write a name as plotly shows it letter by letter."""
    return html.escape(shorten(str(value), most), quote=False)


def _short(value: Any) -> str:
    """Write a choice where there is little room; the ends of a backbone's name differ."""
    return _text(short_backbone(setting(value)), 17)


def hovers(record: SearchRecord) -> dict[int, str]:
    """Say of each trial that is drawn how it ended, what it reached, and all its settings."""
    found = {}
    for row in drawn(record).to_dict("records"):
        lines = [f"<b>trial {row['number']}</b> {row['state']}, {percent(row['value'])}"]
        lines += [f"{duration(row['duration_s'])}, {_text(row['origin'], 60)}"]
        if row["reason"] is not None and row["reason"] == row["reason"]:
            lines.append(_text(row["reason"], 60))
        for name in record.varied:
            value = row.get(f"params_{name}")
            if value is not None and value == value and row["number"] not in record.idle[name]:
                lines.append(f"{_text(name)} = {_text(setting(value))}")
        found[row["number"]] = "<br>".join(lines)
    return found


def with_hovers(figure: go.Figure, texts: Mapping[int, str]) -> go.Figure:
    """Give a figure the texts that the page holds once for all its figures."""
    for trace in figure.data:
        if trace.meta == HOVERED:
            trace.text = [texts[number] for number in trace.customdata]
    return figure


def _by_state(
    record: SearchRecord, trials: pd.DataFrame, x: Any, y: Any, hover: list[str] | None = None
) -> Iterator[go.Scatter]:
    """Draw trials as points whose look says how they ended."""
    points = pd.DataFrame({"x": np.asarray(x), "y": np.asarray(y)}, index=trials.index)
    points["number"] = trials["number"]
    points["text"] = "" if hover is None else hover
    for state, (colour, symbol) in _LOOKS.items():
        own = points[trials["state"] == state]
        if len(own):
            marker = {"color": colour, "symbol": symbol, "size": 7, "line": {"width": 2}}
            if state != "pruned":
                marker["line"] = {"width": 0}
            yield go.Scatter(
                x=own["x"].tolist(),
                y=own["y"].tolist(),
                text=own["text"].tolist() if hover else None,
                customdata=None if hover else own["number"].tolist(),
                meta=None if hover else HOVERED,
                mode="markers",
                name=state,
                marker=marker,
                hovertemplate="%{text}<extra></extra>",
            )


def _figure(data: Any, x: str = "", y: str = "", **layout: Any) -> go.Figure:
    figure = go.Figure(list(data))
    figure.update_layout(template="none", xaxis_title=x, yaxis_title=y, **layout)
    return figure


@plot(
    "Best trial",
    "Learning curve",
    "Loss and accuracy after each epoch of the best trial.",
)
def learning_curve(record: SearchRecord) -> go.Figure | str:
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
    return _figure(data, "epoch", "accuracy", yaxis_tickformat=_PERCENT, yaxis2=second)


@plot(
    "Best trial",
    "Confusion matrix",
    "Rows are the true class, columns the predicted one, on the validation split; colours are "
    "shares of the true class.",
)
def confusion(record: SearchRecord) -> go.Figure | str:
    """Draw the best trial's confusion matrix."""
    counts, classes = record.confusion, record.classes
    if counts is None:
        return "No predictions are kept: that needs a trial that finished."
    if len(classes) != len(counts):
        return "The confusion matrix and the names of the classes do not fit together."
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    names = [f"{_text(name, 18)}" for name in classes]
    ticks: dict[str, Any] = {"tickvals": list(range(len(names))), "ticktext": names}
    if len(classes) > _MOST_NAMED:
        ticks = {}
    text = [
        [f"true {names[i]}<br>predicted {names[j]}<br>{plural(int(n), 'image')}"
         for j, n in enumerate(row)] for i, row in enumerate(counts)
    ]  # fmt: skip
    data = go.Heatmap(
        z=np.round(shares, 4).tolist(), hovertext=text, hoverinfo="text", colorscale="Blues",
        zmin=0, zmax=1, showscale=False, xgap=1, ygap=1,
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
def accuracy_over_minutes(record: SearchRecord) -> go.Figure | str:
    """Draw accuracy against the time that trials took up to there."""
    return _progress(record, record.trials["duration_s"].fillna(0.0).cumsum() / 60, "minutes")


@plot(
    "Progress",
    "History",
    "By what trials are ranked: the line is the best so far. Click an entry of the legend to hide "
    "it.",
)
def history(record: SearchRecord) -> go.Figure | str:
    """Draw what trials are ranked by, in their order."""
    return _progress(record, record.trials["number"], "trial", by_rank=True)


def _progress(
    record: SearchRecord, x: "pd.Series[Any]", label: str, *, by_rank: bool = False
) -> go.Figure | str:
    trials = drawn(record)
    ranks = rank_of(record.trials, "value")
    finished = ranks.where(record.trials["state"] == "complete")
    if not ranks.notna().any():
        return _why_empty(record)
    y = ranks if by_rank else record.trials["value"].astype(float)
    is_new = finished > finished.cummax().shift(fill_value=-np.inf).ffill()
    foot = float(y[trials.index].min()) - 0.02  # where failed trials stand
    data = list(_by_state(record, trials, x[trials.index], y[trials.index].fillna(foot)))
    if is_new.any():
        line = {"color": GREEN, "shape": "hv"}
        ends_x = [*x[is_new], x.iloc[-1]]
        ends_y = [*y[is_new], y[is_new].iloc[-1]]
        best = go.Scatter(x=ends_x, y=ends_y, mode="lines", name="best so far", line=line)
        data.append(best.update(hoverinfo="skip"))
    accuracy = "score (exp of minus the validation loss)"
    is_accuracy = not by_rank or ranks.equals(record.trials["value"].astype(float))
    name = "validation accuracy" if is_accuracy else accuracy
    return _figure(data, label, name, yaxis_tickformat=_PERCENT if is_accuracy else ".3f")


@plot(
    "Importance",
    "What mattered",
    "Share of each setting in the differences of final accuracy, with its 95 % bootstrap "
    "interval.",
)
def importance(record: SearchRecord) -> go.Figure | str:
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


@plots(
    "Settings",
    "Accuracy by the value of each setting, of trials on which it had an effect. Pruned trials "
    "stand at the accuracy of their best epoch.",
)
def slices(record: SearchRecord) -> Figures:
    """Draw accuracy against each searched setting."""
    trials = _scored(record)
    hover = [f"trial {n}, {percent(v)}" for n, v in zip(trials["number"], trials["value"],
                                                        strict=True)]  # fmt: skip
    shown = pd.Series(hover, index=trials.index)
    for name in record.varied:
        dim = record.dims[name]
        values = trials[f"params_{name}"][~trials["number"].isin(record.idle[name])]
        is_choice = isinstance(dim, CategoricalDistribution)
        if not is_choice:
            values = values.dropna().astype(float)
        own = trials.loc[values.index]
        x = [_short(v) for v in values] if is_choice else values.tolist()
        if not len(own):
            yield name, _why_empty(record)
            continue
        axis: dict[str, Any] = {
            "type": "log" if getattr(dim, "log", False) else "category" if is_choice else None
        }
        if isinstance(dim, CategoricalDistribution):
            axis |= {"categoryorder": "array", "categoryarray": [_short(v) for v in dim.choices]}
        elif axis["type"] == "log":
            axis |= {"minor": {"showgrid": False}, "exponentformat": "power", "nticks": 5}
        figure = _figure(
            _by_state(record, own, x, own["value"], shown[own.index].tolist()),
            yaxis_tickformat=_PERCENT, showlegend=False, xaxis=axis, height=240,
        )  # fmt: skip
        yield name, figure


@plot(
    "Settings",
    "Parallel coordinates",
    "Each line is a trial, coloured by its final accuracy; that of pruned trials is estimated.",
    "wide",
)
def parallel(record: SearchRecord) -> go.Figure | str:
    """Draw Optuna's parallel coordinates of all trials, the pruned ones included."""
    names = varied(record.view.get_trials(deepcopy=False))
    if len(names) < 2 or record.final.nunique() < 2:
        return "This needs two settings that vary, and trials of different accuracy."
    view = _thinned(record, _MOST_LINES)
    figure = optuna.visualization.plot_parallel_coordinate(
        view, params=names, target_name="accuracy"
    )
    return figure.update_layout(template="none", title=None)


@plot(
    "Settings",
    "Freeze depth and learning rate",
    "Final accuracy by both, interpolated between the trials (points; pruned ones estimated).",
    "wide",
)
def contour(record: SearchRecord) -> go.Figure | str:
    """Draw Optuna's contour of the two settings that a fine-tuning study turns on."""
    pair = ["base_lr", "freeze_depth"]
    names = varied(record.view.get_trials(deepcopy=False))
    missing = [name for name in pair if name not in names]
    if record.importance.why_empty:
        return record.importance.why_empty
    if missing:
        return f"This needs trials with several values of {' and '.join(missing)}."
    figure = optuna.visualization.plot_contour(
        _thinned(record), params=pair, target_name="accuracy"
    )
    return figure.update_layout(template="none", title=None)


def _thinned(record: SearchRecord, most: int | None = None) -> optuna.study.Study:
    """Return the view with the trials that are drawn."""
    numbers = set(drawn(record, most)["number"])
    trials = record.view.get_trials(deepcopy=False)
    if len(trials) <= len(numbers):
        return record.view
    study = as_optuna_study([], record.final)
    study.add_trials([t for t in trials if t.user_attrs["trial"] in numbers])
    return study


@plot(
    "Learning curves and pruning",
    "Learning curves",
    "Validation accuracy after each epoch, of trials with more than one.",
)
def curves(record: SearchRecord) -> go.Figure | str:
    """Draw accuracy by epoch."""
    trials = _scored(record)
    numbers = set(trials["number"])
    epochs = record.epochs[record.epochs["number"].isin(numbers)].dropna(subset=["val_acc"])
    lengths = epochs.groupby("number").size()
    best = rank_of(trials, "value").sort_values(ascending=False).index
    ordered = trials.loc[best, "number"]
    shown = ordered[ordered.map(lengths).fillna(0) > 1].head(_MOST_CURVES)
    if not len(shown):
        return "No trial was trained for more than one epoch."
    data: list[go.Scatter] = []
    states = trials.set_index("number")["state"]
    for state, (colour, _) in _LOOKS.items():
        xs: list[Any] = []
        ys: list[Any] = []
        text: list[str] = []
        for number in sorted(shown[states[shown].to_numpy() == state]):
            own = epochs[epochs["number"] == number]
            xs += [*own["epoch"], None]  # None ends a line
            ys += [*own["val_acc"], None]
            text += [f"trial {number}"] * (len(own) + 1)
        if xs:
            line = {"color": colour, "width": 1.5, "dash": "dot" if state == "pruned" else "solid"}
            data.append(
                go.Scatter(
                    x=xs,
                    y=ys,
                    text=text,
                    name=state,
                    mode="lines",
                    line=line,
                    opacity=0.7,
                    hovertemplate="%{text}, epoch %{x}: %{y:.1%}<extra></extra>",
                )
            )
    axis = {"showlegend": True, "yaxis_tickformat": _PERCENT}
    return _figure(data, "epoch", "validation accuracy", **axis)


@plot(
    "Learning curves and pruning",
    "How early the final order shows",
    "Rank correlation of each epoch with the end, over finished trials, with 95 % intervals.",
)
def early_rank(record: SearchRecord) -> go.Figure | str:
    """Draw the rank correlation with the final order, epoch by epoch."""
    early = early_rank_correlation(record.epochs, record.trials)
    if early.why_empty:
        return early.why_empty
    known = [(e.epoch, e.best_so_far) for e in early.epochs if e.best_so_far is not None]
    if not known:
        return "All trials have the same accuracy."
    x = [epoch for epoch, _ in known]
    low, mid, high = np.array([(i.low, i.estimate, i.high) for _, i in known]).T.tolist()
    band = {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    data = [
        go.Scatter(x=x, y=low, mode="lines", **band),
        go.Scatter(
            x=x, y=high, mode="lines", fill="tonexty", fillcolor="rgba(0,114,178,.2)", **band
        ),
        go.Scatter(x=x, y=mid, mode="lines+markers", line={"color": BLUE}, showlegend=False),
    ]
    return _figure(data, "epoch", "rank correlation with the end")


@plot(
    "Cost",
    "Accuracy against time",
    "The line joins finished trials that no other one beats in both.",
)
def cost(record: SearchRecord) -> go.Figure | str:
    """Draw accuracy against the time that a trial took."""
    trials = _scored(record)
    trials = trials[trials["duration_s"].notna() & ~is_copy(trials)]
    if not len(trials):
        return _why_empty(record) if record.best is None else "No trial has a duration."
    seconds = trials["duration_s"].astype(float)
    data = list(_by_state(record, trials, seconds, trials["value"]))
    finished = trials[trials["state"] == "complete"]
    own = seconds[finished.index]
    front = finished[is_on_front(own.tolist(), finished["value"].tolist())]
    front = front.assign(s=own[front.index]).sort_values("s")
    line = {"color": GREEN, "shape": "hv"}
    if len(front):
        best = go.Scatter(x=front["s"].tolist(), y=front["value"].tolist(), line=line)
        data.append(best.update(mode="lines", name="best for its time", hoverinfo="skip"))
    x = {"type": "log", "title": "seconds"}
    return _figure(data, y="validation accuracy", yaxis_tickformat=_PERCENT, xaxis=x)


@plot("Cost", "Timeline", "When each trial ran.")
def timeline(record: SearchRecord) -> go.Figure | str:
    """Draw when each trial ran."""
    trials = drawn(record)
    trials = trials[trials["ended_at"].notna()]
    if not len(trials):
        return _why_empty(record)
    begun = pd.to_datetime(trials["started_at"])
    length = (pd.to_datetime(trials["ended_at"]) - begun).dt.total_seconds() * 1000
    data = []
    for state, (colour, _) in _LOOKS.items():
        own = trials.index[trials["state"] == state]
        if len(own):
            data.append(
                go.Bar(
                    base=begun[own].dt.strftime("%Y-%m-%d %H:%M:%S.%f").tolist(),
                    x=length[own].tolist(),
                    y=trials.loc[own, "number"].tolist(),
                    customdata=trials.loc[own, "number"].tolist(),
                    meta=HOVERED,
                    textposition="none",
                    name=state,
                    orientation="h",
                    marker_color=colour,
                    hovertemplate="%{text}<extra></extra>",
                )
            )
    x = {"type": "date", "title": "UTC"}
    return _figure(data, y="trial", xaxis=x, barmode="overlay")


@plot(
    "Cost",
    "Where the time went",
    "Of all trials. The rest is starting, solving heads and writing; what cached outputs of "
    "frozen layers saved is not part of the whole.",
    "wide",
)
def where_the_time_went(record: SearchRecord) -> go.Figure | str:
    """Draw the time that trials spent on data, training and evaluation."""
    whole = float(record.trials["duration_s"].fillna(0.0).sum())
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
