"""The report of a search: what it says, that it is complete in itself, and rare studies."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from reports.ablation_report import describe_ablation, write_ablation
from reports.record import read_record
from reports.search_plots import PLOTS, accuracy_over_minutes, history
from reports.search_report import ReportPaths, trials_rows, write_report
from study.record.database import RecordError
from study.record.record import Record
from tests.reports.pages import Page
from tests.reports.studies import SPACE, Plan, add_results, add_test, make_study

TRAPS = ("<script>alert(1)</script>|*x*", "a$b$", "ordinary", "_under_", "日本 🐱", "x" * 90)
PARAMS = {"freeze_depth": 2, "base_lr": 0.01}
SMALL = {name: SPACE[name] for name in PARAMS}


def report(store: Record, folder: Path, name: str = "pets") -> tuple[ReportPaths, Page]:
    with store:
        paths = write_report(store, name, folder / "report")
    return paths, Page(paths.html)


def finished(final: float = 0.9, **more: object) -> Plan:
    return Plan(PARAMS | more, [final - 0.3, final - 0.1, final])


def test_the_report_says_what_was_found(searched: ReportPaths) -> None:
    page = Page(searched.html)
    page.says_as_recorded("search")
    table = next(table for table in page.tables if table[0][:2] == ["trial", "state"])
    assert sum(row[1] in ("complete", "pruned", "failed") for row in table) == 40
    for part in ("linear-probe-mobilenet_v3_large", "9f2c9f2c", "--data pets --name pets"):
        assert part in page.text


def test_the_page_is_complete_in_itself_and_so_is_the_csv(searched: ReportPaths) -> None:
    page = Page(searched.html)
    assert "Content-Security-Policy" in page.source
    for source in page.sources:
        assert source.startswith("data:") or f'id="{source[1:]}"' in page.source
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 12
    figures = {key: json.loads(text) for key, text in page.figures.items() if "-" in key}
    assert {plot.name for plot in PLOTS} == {key.rpartition("-")[0] for key in figures}
    assert all(figure["data"] for figure in figures.values())
    frame = pd.read_csv(searched.csv)
    assert frame["number"].tolist() == list(range(40)) and frame["value"].max() < 1
    assert {f"params_{name}" for name in SPACE} <= set(frame.columns)


def test_trials_are_ranked_by_their_score_and_the_best_so_far_never_falls(tmp_path: Path) -> None:
    reached = [(0.8, 0.4), (0.7, 0.5), (0.9, 0.45)]
    plans = [Plan(PARAMS, [value], score=score) for value, score in reached]
    with make_study(tmp_path / "s.db", plans, space=SMALL) as store:
        record = read_record(store, "pets")
    table = trials_rows(record)
    column = table["header"].index("score")
    shown = [row["cells"][column] for row in table["rows"]]
    assert shown == [(0.4, "0.4000"), (0.5, "0.5000"), (0.45, "0.4500")]
    assert [row["state"] for row in table["rows"]] == ["complete", "complete best", "complete"]
    lines = [draw(record).data[-1].y for draw in (history, accuracy_over_minutes)]
    assert lines == [(0.4, 0.5, 0.5), (0.8, 0.7, 0.7)]


def test_the_same_record_gives_the_same_report(tmp_path: Path) -> None:
    with make_study(tmp_path / "s.db", MANY, space=SMALL) as store:
        pages = [write_report(store, "pets", tmp_path / folder).html for folder in "ab"]
    first, second = (re.sub(r"written [0-9: UTC-]+", "", p.read_text("utf-8")) for p in pages)
    assert first == second


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    trap = TRAPS[0]
    space = {"backbone": {"choices": list(TRAPS)}, "<b>lr$x$": {"low": 0.0, "high": 1.0}}
    plans = [
        Plan(
            {"backbone": TRAPS[i % 6], "<b>lr$x$": i / 12},
            [0.4, 0.5 + 0.05 * (i % 6)],
            *(("failed", f"diverged: {trap}") if i == 3 else ("complete", None)),
            f"recipe:{trap}" if i < 2 else "sampler",
        )
        for i in range(12)
    ]
    store = make_study(
        tmp_path / "s.db", plans, name=trap, space=space, classes=TRAPS, warnings=[trap]
    )
    add_results(store, trap, store.best_trial(store.study(trap)).number, TRAPS, 20)
    _, page = report(store, tmp_path, trap)
    assert page.text.count(trap) > 6
    # In a figure, plotly reads names as a little HTML: they are escaped there, too.
    figures = " ".join(text for key, text in page.figures.items() if "-" in key)
    assert "&lt;script&gt;" in figures and "<script" not in figures


RATES = [{"base_lr": 10 ** (-4 + i / 6)} for i in range(12)]
MANY = [finished(0.5 + 0.01 * i, **rate) for i, rate in enumerate(RATES)]
RARE: dict[str, list[Plan]] = {
    "empty": [],
    "one-finished": [Plan(PARAMS, [1.0])],
    "one-interrupted": [Plan(PARAMS, [], "running")],
    "failed": [Plan(PARAMS, [], "failed", "diverged: the loss is nan")] * 3,
    "pruned": [
        Plan(PARAMS | rate, [0.4, 0.5 + 0.02 * i], "pruned", "pruned after epoch 2")
        for i, rate in enumerate(RATES)
    ],
    "equal": [Plan(PARAMS | rate, [0.5, 0.9]) for rate in RATES],
    "one-choice": [Plan({"backbone": "resnet18"}, [0.7, 0.7 + 0.01 * i]) for i in range(10)],
    "tested-twice": [*MANY, Plan(PARAMS, [], "complete", "same settings", "same as 3", score=0.5)],
}


@pytest.mark.parametrize("case", RARE)
def test_rare_studies_have_a_report_that_says_what_is_missing(case: str, tmp_path: Path) -> None:
    space = {"backbone": {"choices": ["resnet18"]}} if case == "one-choice" else SMALL
    n_test = 400 if case == "tested-twice" else 0
    store = make_study(tmp_path / "s.db", RARE[case], space=space, n_test=n_test)
    if n_test:
        add_test(store, "pets", 11, 0.75, 0.61)
        add_test(store, "pets", 10, 0.5, 0.6)
    paths, page = report(store, tmp_path)
    page.says_as_recorded(f"search-{case}")
    assert not re.search(r"\b(?:nan|None|NaT)\b", page.text.replace("loss is nan", ""))
    assert len(pd.read_csv(paths.csv)) == len(RARE[case])


def test_many_trials_are_thinned_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("search_plots", "search_report"):
        monkeypatch.setattr(f"reports.{name}.MOST_DRAWN", 20)
    plans = [Plan(PARAMS | {"base_lr": 1e-4 + i * 1e-6}, [0.5 + i / 100]) for i in range(30)]
    paths, page = report(make_study(tmp_path / "s.db", plans, space=SMALL), tmp_path)
    assert "show 20 of 30 trials" in page.text and len(pd.read_csv(paths.csv)) == 30
    table = next(table for table in page.tables if table[0][:2] == ["trial", "state"])
    assert {row[0] for row in table[1:]} > {"25", "26", "27", "28", "29"} and len(table) == 21


def test_studies_are_shown_side_by_side(tmp_path: Path) -> None:
    with make_study(tmp_path / "s.db", [finished()], space=SMALL):
        store = make_study(tmp_path / "s.db", [finished(0.8)], name="dogs", fingerprint="other")
    with store:
        paths = write_report(store, "pets", tmp_path / "report", beside=["dogs"], refresh_s=5)
    page = Page(paths.html)
    table = next(table for table in page.tables if table[0][0] == "Study")
    assert [row[0] for row in table[1:]] == ["pets", "dogs"]
    assert "accuracies do not compare" in page.text and page.figures["refresh"] == "5"


def test_what_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    with make_study(tmp_path / "s.db", []) as store:
        with pytest.raises(RecordError, match="pest"):
            write_report(store, "pest", tmp_path / "report")
        with pytest.raises(RecordError, match="no ablation.*python -m study ablate pets"):
            write_ablation(store, "pets", tmp_path / "report")
        with pytest.raises(RecordError, match="pest"):
            describe_ablation(store, "pest")
    assert not (tmp_path / "report").exists()
