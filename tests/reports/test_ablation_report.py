"""The report of an ablation: verdicts, tables, files, designs, several datasets."""

import csv
import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from reports.ablation import read_ablations
from reports.ablation_report import AblationPaths, write_ablation
from reports.ablation_sections import Section, describe_ablation
from reports.across import compare_across, score_frame
from reports.effects import Rules, estimate_effects
from reports.publish import p_words
from study.ablation.designs import Cell, Design
from study.record.database import RecordError
from study.record.record import Record
from tests.reports.pages import Page
from tests.reports.studies import (
    Score,
    Simulator,
    design_of,
    follow,
    make_ablation,
    make_arm,
    make_study,
)

pytestmark = pytest.mark.usefixtures("unsaved")
NAME = "pets-ablation"
EVIL = "<script>alert(1)</script>"
TRUTH = {"augment = none": -0.06, "augment = mixup": 0.05, "freeze = 5": 0.008}
TESTED = {"baseline": 0.78, "augment = mixup": 0.85}
OFAT = design_of(
    "ofat", augment=["crop", "none", "mixup"], freeze=["0", "3", "5"], head=["xavier", "zero"]
)
Report = tuple[AblationPaths, Page, Section]


def simulate(means: dict[str, float], *, seed: int = 0, sd: float = 0.01) -> Simulator:
    """Return how runs go: true accuracy by the cell's label, the same whenever it is asked."""
    rng = np.random.default_rng(seed)
    seeds = rng.normal(0, 0.015, 20)
    noise: dict[tuple[str, int], float] = {}

    def score(cell: Cell, replicate: int) -> Score:
        key = cell.label, replicate
        if key not in noise:
            noise[key] = rng.normal(0, sd)
        true = 0.8 + sum(gain for name, gain in means.items() if name in cell.label)
        return round(400 * (true + seeds[replicate] + noise[key])) / 400

    return score


def report(folder: Path, design: Design, score: Simulator, **made: object) -> Report:
    with make_ablation(folder / "s.db", design, score, **made) as store:
        paths = write_ablation(store, NAME, folder / "out" / "deep")
    return paths, Page(paths.html), paths.sections[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


# Levels against the baseline


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The drawn report of five levels, the test split read for the baseline and one of them."""
    folder = tmp_path_factory.mktemp("machine-path")
    return report(folder, OFAT, simulate(TRUTH), test=lambda cell, r: TESTED.get(cell.label))


def test_every_file_is_written(levels: Report) -> None:
    paths, _, _ = levels
    texts = [paths.html, paths.markdown, paths.latex, *paths.csv]
    assert [path.name for path in texts] == [
        "ablation.html", "tables.md", "tables.tex", "ofat-effects.csv", "ofat-runs.csv",
    ]  # fmt: skip
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    figures = {f"{stem}{kind}" for stem in ("ofat-forest", "ofat-seeds") for kind in starts}
    assert {path.name for path in paths.figures} == figures
    assert all(p.read_bytes().startswith(starts[p.suffix]) for p in paths.figures)
    found = {path for path in paths.html.parent.rglob("*") if path.is_file()}
    assert found == {*texts, *paths.figures}


def test_no_path_of_this_machine_is_in_any_file(levels: Report) -> None:
    paths, _, _ = levels
    texts = [paths.html, paths.markdown, paths.latex, *paths.csv]
    for path in (*texts, *(path for path in paths.figures if path.suffix == ".svg")):
        text = path.read_text(encoding="utf-8")
        for trace in ("machine-path", str(Path.home()) + "/", socket.gethostname()):
            assert trace not in text, f"{trace} in {path.name}"


def test_two_reads_give_the_same_bytes(levels: Report, tmp_path: Path) -> None:
    first, _, _ = levels
    with Record(str(first.html.parents[2] / "s.db")) as store:
        second = write_ablation(store, NAME, tmp_path)
    for one, other in zip((*first.csv, first.latex), (*second.csv, second.latex), strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_the_csv_files_are_unrounded(levels: Report) -> None:
    effect_rows, run_rows = map(rows_of, levels[0].csv)
    score = simulate(TRUTH)
    values = {(cell.label, r): score(cell, r) for r in range(5) for cell in OFAT.cells}
    assert len(run_rows) == len(values) == 30
    for row in run_rows:
        assert float(row["val_acc"]) == values[row["cell"], int(row["seed"]) - 7]
        assert (row["test_acc"] != "") == (row["cell"] in ("baseline", "augment = mixup"))
    arms = [make_arm(c.label, [values[c.label, r] for r in range(5)]) for c in OFAT.cells]
    assert effect_rows[0]["factor"] == "baseline" and effect_rows[0]["verdict"] == ""
    effects = estimate_effects(arms[0], arms[1:], Rules(resolution=1 / 400))
    for row, effect in zip(effect_rows[1:], effects, strict=True):
        assert f"{row['factor']} = {row['level']}" == effect.arm.label
        assert row["verdict"] == effect.verdict
        expected = {
            "difference": effect.difference.estimate, "difference_low": effect.difference.low,
            "difference_high": effect.difference.high, "p": effect.p, "sd": effect.sd,
            "p_family": effect.p_family, "p_equivalence": effect.p_equivalence,
            "d_z": effect.standardised,
        }  # fmt: skip
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, abs=1e-12)


# What is said in every state of every design

SIMULATED = simulate(TRUTH)
ADAPTED = simulate({"augment = none": -0.1, "augment = mixup": 0.1}, sd=0.02)
PLANTED = simulate({"augment = on": 0.05, "augment = on, freeze = on": 0.06})
COSTLY = simulate({"augment = on": -0.03, "freeze = on": -0.12})  # what is still `on` costs
FACTORIAL = design_of("factorial", "augment", "freeze")
FAILED = {
    ("head = zero", 1): "out of memory: 8 GiB", ("freeze = 3", 0): "interrupted",
    **{("freeze = 5", r): "diverged: the loss is nan" for r in range(5)},
}  # fmt: skip


def only(is_run: Callable[[Cell, int], bool], score: Simulator, rest: Score = None) -> Simulator:
    """Return how runs go of which only some are run, or go well."""
    return lambda cell, r: score(cell, r) if is_run(cell, r) else rest


def half(cell: Cell, replicate: int) -> bool:
    is_done = replicate == 0 or (replicate == 1 and cell.label in ("baseline", "freeze = 3"))
    return is_done and cell.label != "head = zero"


def is_whole(cell: Cell, replicate: int) -> bool:
    return len(cell.levels) == 2


STATES: dict[str, tuple[Design, Simulator, dict[str, Any]]] = {
    "ofat": (OFAT, SIMULATED, {"test": lambda cell, r: TESTED.get(cell.label)}),
    "failures": (OFAT, lambda c, r: FAILED.get((c.label, r)) or SIMULATED(c, r), {}),
    "unfinished": (OFAT, only(half, SIMULATED), {}),
    "adaptive": (
        OFAT,
        only(lambda c, r: r < (5 if "augment" in c.label else 8), ADAPTED),
        {"looks": (5, 8, 12), "margin": 0.5},
    ),
    "factorial": (FACTORIAL, PLANTED, {}),
    "path": (follow(design_of("path", "augment", "freeze", "head"), COSTLY, 5), COSTLY, {}),
    "factorial-failed": (FACTORIAL, only(is_whole, PLANTED, "diverged: nan"), {}),
    "path-begun": (design_of("path", "a", "b"), only(is_whole, PLANTED), {}),
    **{
        f"{kind}-empty": (design_of(kind, "a", "b"), only(lambda *_: False, PLANTED), {})
        for kind in ("ofat", "factorial", "path")
    },
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_told_as_recorded(state: str, tmp_path: Path) -> None:
    design, score, made = STATES[state]
    paths, page, found = report(tmp_path, design, score, **made)
    page.says_as_recorded(f"ablation-{state}")
    assert page.tables == [[list(g.header), *map(list, g.rows)] for g in found.grids]
    assert {path.name for path in paths.figures} == {
        f"{plan.name}{kind}" for plan in found.plans for kind in (".png", ".svg", ".pdf")
    }


def test_interrupted_runs_are_missing_and_broken_ones_failed(tmp_path: Path) -> None:
    design, score, _ = STATES["failures"]
    paths, _, found = report(tmp_path, design, score)
    verdicts = {effect.arm.label: (effect.n, effect.verdict) for effect in found.effects}
    assert verdicts["freeze = 3"] == (4, "inconclusive")
    assert (verdicts["freeze = 5"], verdicts["head = zero"]) == ((0, "fails"), (4, "fails"))
    assert [row["n_failed"] for row in rows_of(paths.csv[0])] == ["0", "0", "0", "0", "5", "1"]


def test_names_are_escaped_and_passwords_blanked_wherever_they_stand(tmp_path: Path) -> None:
    design = design_of("ofat", **{f"f{EVIL}": [f"b{EVIL}", f"l{EVIL}"], "x": ["y", "z"]})
    storage = "postgresql://me:hunter2@db/studies"
    paths, page, _ = report(
        tmp_path, design, simulate({}), origin=f"trial 1 of {EVIL}", source=f"folder:{EVIL}",
        command=f"python -m study ablate '{EVIL}' --storage {storage}", warnings=[f"small {EVIL}"],
    )  # fmt: skip
    assert page.text.count(EVIL) >= 8  # and a page with a script is refused
    assert "<script" not in paths.markdown.read_text(encoding="utf-8")
    assert "postgresql://me:***@db/studies" in page.text
    for path in (paths.html, paths.markdown, paths.latex):
        assert "hunter2" not in path.read_text(encoding="utf-8")


def test_a_search_is_no_ablation(tmp_path: Path) -> None:
    with make_study(tmp_path / "s.db", []) as store:
        with pytest.raises(RecordError, match="no ablation.*python -m study ablate pets"):
            write_ablation(store, "pets", tmp_path / "out")
        with pytest.raises(RecordError, match="nothing"):
            describe_ablation(store, "nothing")
    assert not (tmp_path / "out").exists()


# Several designs, several data sets


def test_two_designs_of_one_study_have_a_section_each(tmp_path: Path) -> None:
    with make_ablation(tmp_path / "s.db", OFAT, simulate(TRUTH)) as store:
        (row,) = store.designs(store.study(NAME).id)
        store.put_design(row.study_id, "another", row.kind, row.spec, "python -m study again")
        paths = write_ablation(store, NAME, tmp_path / "out")
    # The last one used comes first; names count from the first, so that they stay.
    assert [section.name for section in paths.sections] == ["ofat-2", "ofat"]
    assert [path.name for path in paths.csv] == [
        "ofat-2-effects.csv", "ofat-2-runs.csv", "ofat-effects.csv", "ofat-runs.csv",
    ]  # fmt: skip
    assert "ofat-2-effects" in paths.latex.read_text(encoding="utf-8")


def test_ablations_of_several_datasets_are_compared(tmp_path: Path) -> None:
    names = ["set-0", "set-1", "set-2", "set-3"]
    for k, name in enumerate(names):
        store = make_ablation(
            tmp_path / "s.db", OFAT, simulate(TRUTH, seed=k), name=name, source=f"folder:a/{name}"
        )
    with store:
        ablations = [read_ablations(store, name)[0] for name in names]
    scores = score_frame(ablations)
    found = compare_across(ablations)
    (grid,) = found.grids
    assert grid.header == ("Level", *names, "Mean rank")
    assert (grid.rows[0][0], grid.rows[-1][0]) == ("augment = mixup", "augment = none")
    ranks = np.array([stats.rankdata(-row) for row in scores.to_numpy()])  # (datasets, levels)
    expected = dict(zip(scores.columns, ranks.mean(axis=0), strict=True))
    assert {row[0]: float(row[-1]) for row in grid.rows} == pytest.approx(expected, abs=0.005)
    p = stats.friedmanchisquare(*scores.to_numpy().T).pvalue
    assert f"Friedman’s test over 4 datasets and 6 levels: p = {p_words(p)}" in found.findings[0]


def test_a_level_that_failed_on_a_dataset_ranks_last_there(tmp_path: Path) -> None:
    score = simulate(TRUTH)

    def failing(cell: Cell, replicate: int) -> Score:
        is_lost = cell.label == "augment = mixup" and replicate == 1
        return "diverged: nan" if is_lost else score(cell, replicate)

    make_ablation(tmp_path / "s.db", OFAT, failing, name="other", source="folder:b").close()
    with make_ablation(tmp_path / "s.db", OFAT, score) as store:
        ablations = [read_ablations(store, name)[0] for name in (NAME, "other")]
    rows = {row[0]: row for row in compare_across(ablations).grids[0].rows}
    assert rows["augment = mixup"][-1] == "3.50"  # first of six, and last of six
    assert rows["augment = mixup"][2].endswith("(1 failed)")


def test_ablations_that_share_no_level_are_not_compared(tmp_path: Path) -> None:
    other = design_of("ofat", decay=["0", "1"])
    make_ablation(tmp_path / "s.db", other, simulate({}), name="other").close()
    with make_ablation(tmp_path / "s.db", OFAT, simulate(TRUTH)) as store:
        page = Page(write_ablation(store, NAME, tmp_path, beside=["other"]).html)
    assert "nothing can be compared across them" in page.text
