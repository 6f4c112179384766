"""The report of an ablation: every state of every design, files, several datasets."""

import contextlib
import csv
import io
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from reports.ablation import Ablation, read_ablations
from reports.ablation_report import AblationPaths, Section, describe_ablation, write_ablation
from reports.across import compare_across, score_frame
from reports.effects import judge
from reports.publish import p_words
from study.ablation.designs import Cell, Design
from study.record.database import RecordError
from study.record.models import Misclassified
from study.record.record import Record
from tests.reports.pages import Page
from tests.reports.studies import (
    Score,
    Simulator,
    analysis,
    design_of,
    follow,
    make_ablation,
    make_study,
    spec_of,
)

pytestmark = pytest.mark.usefixtures("unsaved")
NAME = "pets-ablation"
TRUTH = {"augment = none": -0.06, "augment = mixup": 0.05, "freeze = 5": 0.012}
TESTED = {"baseline": 0.78, "augment = mixup": 0.85}
OFAT = design_of(
    "ofat", augment=["crop", "none", "mixup"], freeze=["0", "3", "5"], head=["xavier", "zero"]
)
AUGMENTS = design_of("ofat", augment=["crop", "none", "mixup"])
Report = tuple[AblationPaths, Page, Section]


def simulate(means: dict[str, float], *, seed: int = 0, sd: float = 0.002) -> Simulator:
    """Return how runs go: true accuracy by the cell's label, the same whenever it is asked."""
    rng = np.random.default_rng(seed)
    seeds = rng.normal(0, 0.01, 20)
    noise: dict[tuple[str, int], float] = {}

    def score(cell: Cell, replicate: int) -> Score:
        key = cell.label, replicate
        if key not in noise:
            noise[key] = rng.normal(0, 0.03 if "freeze = 3" in cell.label else sd)
        true = 0.8 + sum(gain for name, gain in means.items() if name in cell.label)
        return float(true + seeds[replicate] + noise[key])

    return score


def report(
    folder: Path, design: Design, score: Simulator, *analyses: dict[str, Any], **made: Any
) -> Report:
    """Make an ablation, in a database that may hold others, and write its report."""
    name = made.setdefault("name", NAME)
    with (
        contextlib.chdir(folder),  # as one works: paths in the record are relative to it
        make_ablation(Path("s.db"), design, score, *analyses, **made) as store,
    ):
        paths = write_ablation(store, name, folder / "out" / name)
    return paths, Page(paths.html), paths.sections[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


# Levels against the baseline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine-path")


@pytest.fixture(scope="module")
def levels(folder: Path) -> Report:
    """The drawn report of five levels, the test split read for the baseline and one of them."""
    design, score, analyses, made = STATES["ofat"]
    return report(folder, design, score, *analyses, **made)


def test_every_file_is_written(levels: Report) -> None:
    paths, _, _ = levels
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    stems = ("forest", "forest-wide", "replicates", "replicates-wide")
    figures = {f"ofat-{stem}{kind}" for stem in stems for kind in starts}
    assert {path.name for path in paths.figures} == figures
    assert all(p.read_bytes().startswith(starts[p.suffix]) for p in paths.figures)
    found = {path.name for path in paths.html.parent.iterdir()}
    tables = {"tables.md", "tables.tex", "ofat-effects.csv", "ofat-runs.csv"}
    assert found == {"ablation.html", "figures", *tables}


def test_no_path_of_this_machine_is_in_any_file(levels: Report) -> None:
    paths, _, _ = levels
    texts = [paths.html, paths.markdown, paths.latex, *paths.csv]
    for path in (*texts, *(path for path in paths.figures if path.suffix == ".svg")):
        text = path.read_text(encoding="utf-8")
        for trace in ("machine-path", str(Path.home()) + "/", socket.gethostname()):
            assert trace not in text, f"{trace} in {path.name}"


def test_the_csv_files_are_unrounded(folder: Path, levels: Report) -> None:
    effect_rows, run_rows = map(rows_of, levels[0].csv)
    with Record(str(folder / "s.db")) as store:
        (ablation,) = read_ablations(store, NAME)
    base = [row for row in run_rows if row["setting"] == "baseline"]
    assert len(run_rows) == 30 and [row["seed"] for row in base] == ["7", "8", "9", "10", "11"]
    for key, values in (("val_acc", ablation.runs[0].values), ("test_acc", ablation.runs[0].test)):
        assert [float(row[key]) for row in base] == list(values)
    effects = [*judge(ablation), *judge(ablation, "test")]
    for row, effect in zip(effect_rows, effects, strict=True):
        assert f"{row['factor']} = {row['level']}" == effect.contrast.label
        assert row["verdict"] == effect.verdict
        keys = ("p", "p_family", "p_equivalence", "p_seeds", "sd", "median", "n", "n_failed")
        expected = {key: getattr(effect, key) for key in keys}
        expected |= {"difference": effect.difference.estimate, "low": effect.difference.low}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-12)
    assert [row["split"] for row in effect_rows] == ["val"] * 5 + ["test"]


def test_classes_and_the_images_that_two_settings_disagree_on_are_shown(folder: Path) -> None:
    # 20 of 400 images, all dogs, are right in the level's runs alone; of one there is a thumbnail.
    own = np.ones(400)
    own[1:41:2] = 0
    found = {"baseline": own, "augment = on": np.ones(400)}
    design = design_of("ofat", "augment")
    runs = design, lambda cell, _: found[cell.label], analysis(1, 2)
    with make_ablation(folder / "s.db", *runs, name="cats") as store:
        trial = store.trial(store.study("cats").id, 0)
        shown = {"path": "dog/1363.jpg", "label": "dog", "predicted": "cat", "probability": 0.1}
        row = Misclassified(trial_id=trial.id, split="val", rank=0, thumbnail=b"JPEG", **shown)
        store.add_misclassified(trial.id, [row])
        paths = write_ablation(store, "cats", folder / "cats")
    (grid,) = (grid for grid in paths.sections[0].grids if grid.name == "ofat-classes")
    assert [(row[0], *row[2:]) for row in grid.rows] == [
        ("cat", "100.0", "0.0"), ("dog", "90.0", "+10.0"),
    ]  # fmt: skip
    disagreement = paths.sections[0].disagreement
    assert disagreement is not None and disagreement.level == "augment = on"
    assert len(disagreement.images) == 12
    first = disagreement.images[0]
    assert (first.path, first.label, first.thumbnail) == ("dog/1363.jpg", "dog", b"JPEG")
    page = Page(paths.html)
    assert all(image.path in page.text for image in disagreement.images)
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 1


# What is said in every state of every design

SIMULATED = simulate(TRUTH)
FALLEN = ("freeze = 3", 2)
ADAPTED = simulate({"augment = none": -0.1, "augment = mixup": 0.1, "head = zero": 0.004})
PLANTED = simulate({"augment = on": 0.05, "augment = on, freeze = on": 0.06})
COSTLY = simulate({"augment = on": -0.03, "freeze = on": -0.12})  # what is still `on` costs
SHARES = simulate({"train_fraction = 0.5": -0.04, "train_fraction = 0.25": -0.11})
FACTORIAL = design_of("factorial", "augment", "freeze")
SIZES = design_of("ofat", train_fraction=["1", "0.5", "0.25"])
PATH = follow(design_of("path", "augment", "freeze", "head"), COSTLY, 5)
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


STATES: dict[str, tuple[Design, Simulator, list[dict[str, Any]], dict[str, Any]]] = {
    "ofat": (
        *(OFAT, SIMULATED, [analysis(1, 5), analysis(2, 5, split="test")]),
        {"test": lambda cell, r: TESTED.get(cell.label)},
    ),
    "folds": (AUGMENTS, SIMULATED, [analysis(1, 5), analysis(2, 10)], {"n_folds": 5}),
    "failures": (OFAT, lambda c, r: FAILED.get((c.label, r)) or SIMULATED(c, r), [], {}),
    "fallen": (OFAT, lambda c, r: 0.6 if (c.label, r) == FALLEN else SIMULATED(c, r), [], {}),
    "unfinished": (OFAT, only(half, SIMULATED), [], {}),
    "adaptive": (
        *(OFAT, only(lambda c, r: r < (5 if "augment" in c.label else 8), ADAPTED)),
        *([analysis(1, 5, 8, 12)], {"margin": 0.5}),
    ),
    "one-replicate": (OFAT, SIMULATED, [analysis(1, 1)], {"origin": "the settings of bees.toml"}),
    "solved": (
        *(SIZES, SHARES, [analysis(1, 1)]),
        {"train": {"freeze_depth": 5, "head_solver": "logistic"}, "is_solved": True},
    ),
    "factorial": (FACTORIAL, PLANTED, [], {}),
    "path": (PATH, COSTLY, [], {}),
    "factorial-failed": (FACTORIAL, only(is_whole, PLANTED, "diverged: nan"), [], {}),
    "path-begun": (design_of("path", "a", "b"), only(is_whole, PLANTED), [], {}),
    **{
        f"{kind}-empty": (design_of(kind, "a", "b"), only(lambda *_: False, PLANTED), [], {})
        for kind in ("ofat", "factorial", "path")
    },
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_told_as_recorded(state: str, folder: Path, levels: Report) -> None:
    design, score, analyses, made = STATES[state]
    paths, page, found = levels
    if state != "ofat":
        paths, page, found = report(folder, design, score, *analyses, name=state, **made)
    if state == "failures":
        verdicts = {e.contrast.label: (e.n, e.verdict, e.n_failed) for e in found.effects}
        assert verdicts["freeze = 3"] == (4, "unfinished", 0)  # a run of it was interrupted
        assert verdicts["freeze = 5"] == (0, "fails", 5)
        assert verdicts["head = zero"] == (4, "fails", 1)
    assert page.tables == [[list(g.header), *map(list, g.rows)] for g in found.grids]
    assert {path.name for path in paths.figures} == {
        f"{plot.name}{width}{kind}"
        for plot in found.plots
        for width in ("", "-wide")
        for kind in (".png", ".svg", ".pdf")
    }
    assert any("training-size" in path.name for path in paths.figures) == (design is SIZES)
    page.says_as_recorded(f"ablation-{state}")


def test_a_search_is_no_ablation(tmp_path: Path) -> None:
    with make_study(tmp_path / "s.db", []) as store:
        with pytest.raises(RecordError, match="no ablation.*python -m study ablate pets"):
            write_ablation(store, "pets", tmp_path / "out")
        with pytest.raises(RecordError, match="nothing"):
            describe_ablation(store, "nothing")
    assert not (tmp_path / "out").exists()


# Several designs, several datasets


def test_two_designs_of_one_study_have_a_section_each_and_share_the_error(folder: Path) -> None:
    once = analysis(1, 1)
    with make_ablation(folder / "s.db", AUGMENTS, simulate(TRUTH), once, name="two") as store:
        spec = spec_of(AUGMENTS, analysis(2, 1))
        store.put_design(store.study("two").id, "another", "ofat", spec, "python -m study again")
        paths = write_ablation(store, "two", folder / "two")
    # The last one used comes first; names count from the first, so that they stay.
    assert [section.name for section in paths.sections] == ["ofat-2", "ofat"]
    csv = [f"{name}-{kind}.csv" for name in ("ofat-2", "ofat") for kind in ("effects", "runs")]
    assert [path.name for path in paths.csv] == csv
    assert "ofat-2-effects" in paths.latex.read_text(encoding="utf-8")
    assert all("2 analyses of this ablation so far" in s.methods for s in paths.sections)


def compared(folder: Path, scores: dict[str, Simulator]) -> list[Ablation]:
    for name, score in scores.items():
        given = {"name": name, "data": {"source": f"folder:a/{name}"}}
        store = make_ablation(folder / "s.db", AUGMENTS, score, analysis(1, 2), **given)
    with store:
        return [read_ablations(store, name)[0] for name in scores]


def test_ablations_of_several_datasets_are_compared(folder: Path) -> None:
    names = [f"set-{k}" for k in range(4)]
    ablations = compared(folder, {n: simulate(TRUTH, seed=k) for k, n in enumerate(names)})
    scores = score_frame(ablations)
    found = compare_across(ablations)
    (grid,) = found.grids
    assert grid.header == ("Level", *names, "Mean rank")
    assert (grid.rows[0][0], grid.rows[-1][0]) == ("augment = mixup", "augment = none")
    ranks = np.array([stats.rankdata(-row) for row in scores.to_numpy()])  # (datasets, levels)
    expected = dict(zip(scores.columns, ranks.mean(axis=0), strict=True))
    assert {row[0]: float(row[-1]) for row in grid.rows} == pytest.approx(expected, abs=0.005)
    p = stats.friedmanchisquare(*scores.to_numpy().T).pvalue
    assert f"Friedman’s test over 4 datasets and 3 levels: p = {p_words(p)}" in found.findings[0]


def test_a_level_that_failed_on_a_dataset_ranks_last_there(folder: Path) -> None:
    score = simulate(TRUTH)

    def failing(cell: Cell, replicate: int) -> Score:
        is_lost = cell.label == "augment = mixup" and replicate == 1
        return "diverged: nan" if is_lost else score(cell, replicate)

    ablations = compared(folder, {"one": score, "other": failing})
    assert compare_across([ablations[0], replace(ablations[1], runs=())]).grids == ()
    rows = {row[0]: row for row in compare_across(ablations).grids[0].rows}
    assert rows["augment = mixup"][-1] == "2.00"  # first of three, and last of three
    assert rows["augment = mixup"][2].endswith("(1 failed)")
