"""The report of an ablation: every state of every design, files, several datasets."""

import contextlib
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from command_line import without_figures
from reports.ablation import read_ablations
from reports.ablation_report import AblationPaths, write_ablation
from reports.across import compare_across, score_frame
from reports.effects import judge
from reports.publish import p_words
from study.ablation.designs import Cell, Design
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
    spec_of,
)

NAME = "pets-ablation"
TRUTH = {"augment = none": -0.06, "augment = mixup": 0.05, "freeze = 5": 0.012}
TESTED = {"baseline": 0.78, "augment = mixup": 0.85}
OFAT = design_of(
    "ofat", augment=["crop", "none", "mixup"], freeze=["0", "3", "5"], head=["xavier", "zero"]
)
AUGMENTS = design_of("ofat", augment=["crop", "none", "mixup"])


def simulate(means: dict[str, float], seed: int = 0) -> Simulator:
    """Return how runs go: true accuracy by the cell's label, the same whenever it is asked."""
    rng = np.random.default_rng(seed)
    seeds = rng.normal(0, 0.01, 20)
    noise: defaultdict[tuple[str, int], float] = defaultdict(rng.standard_normal)

    def score(cell: Cell, replicate: int) -> Score:
        true = 0.8 + sum(gain for name, gain in means.items() if name in cell.label)
        sd = 0.03 if "freeze = 3" in cell.label else 0.002
        return float(true + seeds[replicate] + sd * noise[cell.label, replicate])

    return score


def report(
    folder: Path, design: Design, score: Simulator, *analyses: dict[str, Any], **made: Any
) -> AblationPaths:
    """Make an ablation, in a database that may hold others, and write its report."""
    name = made.setdefault("name", NAME)
    with (
        contextlib.chdir(folder),  # as one works: paths in the record are relative to it
        make_ablation(Path("s.db"), design, score, *analyses, **made) as store,
    ):
        return write_ablation(store, name, folder / "out" / name)


@pytest.fixture(autouse=True)
def unsaved() -> Iterator[None]:
    """Draw every figure and save none but those of `levels`."""
    with without_figures():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine-path")


@pytest.fixture(scope="module")
def levels(folder: Path) -> AblationPaths:
    """The drawn report of five levels, the test split read for the baseline and one of them."""
    design, score, analyses, made = STATES["ofat"]
    return report(folder, design, score, *analyses, **made)


def test_every_file_is_written_and_none_has_a_path_of_this_machine(levels: AblationPaths) -> None:
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert all(p.read_bytes().startswith(starts[p.suffix]) for p in levels.figures)
    found = [path for path in levels.html.parent.rglob("*") if path.is_file()]
    named = {path.name for path in found} - {path.name for path in levels.figures}
    assert named == {"ablation.html", "tables.md", "tables.tex", *(p.name for p in levels.csv)}
    for path in (path for path in found if path.suffix not in (".png", ".pdf")):
        text = path.read_text(encoding="utf-8")
        for trace in ("machine-path", str(Path.home()) + "/", socket.gethostname()):
            assert trace not in text, f"{trace} in {path.name}"


def test_the_csv_files_are_unrounded(folder: Path, levels: AblationPaths) -> None:
    effect_rows, run_rows = map(pd.read_csv, levels.csv)
    with Record(str(folder / "s.db")) as store:
        (ablation,) = read_ablations(store, NAME)
    base = run_rows[run_rows["setting"] == "baseline"]
    assert len(run_rows) == 30 and base["seed"].tolist() == [7, 8, 9, 10, 11]
    for split, values in ablation.runs[0].accuracies.items():
        assert base[f"{split}_acc"].tolist() == pytest.approx(values.tolist(), rel=1e-12)
    effects = [*judge(ablation), *judge(ablation, "test")]
    assert effect_rows["split"].tolist() == ["val"] * 5 + ["test"]
    labels = effect_rows["factor"] + " = " + effect_rows["level"]
    assert labels.tolist() == [effect.contrast.label for effect in effects]
    assert effect_rows["verdict"].tolist() == [effect.verdict for effect in effects]
    for key in ("p", "p_family", "p_equivalence", "p_seeds", "sd", "median", "n", "n_failed"):
        expected = [getattr(effect, key) for effect in effects]
        assert effect_rows[key].tolist() == pytest.approx(expected, rel=1e-12)
    lows = [effect.difference.low for effect in effects]
    assert effect_rows["low"].tolist() == pytest.approx(lows, rel=1e-12)


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
    shares = [(row[0], *row[2:]) for row in grid.rows]
    assert shares == [("cat", "100.0", "0.0"), ("dog", "90.0", "+10.0")]
    disagreement = paths.sections[0].disagreement
    assert disagreement is not None and disagreement.level == "augment = on"
    assert len(disagreement.images) == 12
    first = disagreement.images[0]
    assert (first.path, first.label, first.thumbnail) == ("dog/1363.jpg", "dog", b"JPEG")
    page = Page(paths.html)
    assert all(image.path in page.text for image in disagreement.images)
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 1


SIMULATED = simulate(TRUTH)
ADAPTED = simulate({"augment = none": -0.1, "augment = mixup": 0.1, "head = zero": 0.004})
SOLVED = {"train": {"freeze_depth": 5, "head_solver": "logistic"}, "is_solved": True}
PLANTED = simulate({"augment = on": 0.05, "augment = on, freeze = on": 0.06})
COSTLY = simulate({"augment = on": -0.03, "freeze = on": -0.12})  # what is still `on` costs
SHARES = simulate({"train_fraction = 0.5": -0.04, "train_fraction = 0.25": -0.11})
FACTORIAL = design_of("factorial", "augment", "freeze")
SIZES = design_of("ofat", train_fraction=["1", "0.5", "0.25"])
PATH = follow(design_of("path", "augment", "freeze", "head"), COSTLY, 5)
FALLEN = {("freeze = 3", 2): 0.6}
FAILED = {
    ("head = zero", 1): "out of memory: 8 GiB", ("freeze = 3", 0): "interrupted",
    **{("freeze = 5", r): "diverged: the loss is nan" for r in range(5)},
}  # fmt: skip


def only(is_run: Callable[[Cell, int], bool], score: Simulator, rest: Score = None) -> Simulator:
    """Return how runs go of which only some are run, or go well."""
    return lambda cell, r: score(cell, r) if is_run(cell, r) else rest


def is_asked(cell: Cell, replicate: int) -> bool:
    return replicate < (5 if "augment" in cell.label else 8)


def is_whole(cell: Cell, replicate: int) -> bool:
    return len(cell.levels) == 2


STATES: dict[str, tuple[Design, Simulator, list[dict[str, Any]], dict[str, Any]]] = {
    "ofat": (
        *(OFAT, SIMULATED, [analysis(1, 5), analysis(2, 5, split="test")]),
        {"test": lambda cell, r: TESTED.get(cell.label)},
    ),
    "folds": (AUGMENTS, SIMULATED, [analysis(1, 5), analysis(2, 10)], {"n_folds": 5}),
    "failures": (OFAT, lambda c, r: FAILED.get((c.label, r)) or SIMULATED(c, r), [], {}),
    "fallen": (OFAT, lambda c, r: FALLEN.get((c.label, r)) or SIMULATED(c, r), [], {}),
    "adaptive": (OFAT, only(is_asked, ADAPTED), [analysis(1, 5, 8, 12)], {"margin": 0.5}),
    "one-replicate": (OFAT, SIMULATED, [analysis(1, 1)], {"origin": "the settings of bees.toml"}),
    "solved": (SIZES, SHARES, [analysis(1, 1)], SOLVED),
    "factorial": (FACTORIAL, PLANTED, [], {}),
    "path": (PATH, COSTLY, [], {}),
    "factorial-failed": (FACTORIAL, only(is_whole, PLANTED, "diverged: nan"), [], {}),
    "path-begun": (design_of("path", "a", "b"), only(is_whole, PLANTED), [], {}),
    "ofat-empty": (design_of("ofat", "a", "b"), lambda cell, r: None, [], {"n_folds": 5}),
    "path-empty": (design_of("path", "a", "b"), lambda cell, replicate: None, [], {}),
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_told_as_recorded(state: str, folder: Path, levels: AblationPaths) -> None:
    design, score, analyses, made = STATES[state]
    paths = levels
    if state != "ofat":
        paths = report(folder, design, score, *analyses, name=state, **made)
    page, found = Page(paths.html), paths.sections[0]
    assert page.tables == [[list(g.header), *map(list, g.rows)] for g in found.grids]
    assert {path.name for path in paths.figures} == {
        f"{plot.name}{width}{kind}"
        for plot in found.plots
        for width in ("", "-wide")
        for kind in (".png", ".svg", ".pdf")
    }
    assert any("training-size" in path.name for path in paths.figures) == (design is SIZES)
    page.says_as_recorded(f"ablation-{state}")


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


def test_ablations_of_several_datasets_are_compared_and_a_failed_level_ranks_last(
    folder: Path,
) -> None:
    def goes_well(cell: Cell, replicate: int) -> bool:
        return (cell.label, replicate) != ("augment = mixup", 1)

    scores = {f"set-{k}": simulate(TRUTH, seed=k) for k in range(4)}
    scores["set-3"] = only(goes_well, scores["set-3"], "diverged: nan")
    for name, score in scores.items():
        given = {"name": name, "data": {"source": f"folder:a/{name}"}}
        store = make_ablation(folder / "s.db", AUGMENTS, score, analysis(1, 2), **given)
    with store:
        ablations = [read_ablations(store, name)[0] for name in scores]
    means = score_frame(ablations)
    finding, grid = compare_across(ablations)
    assert grid is not None
    assert grid.header == ("Level", *scores, "Mean rank")
    assert [row[0] for row in grid.rows] == ["augment = mixup", "baseline", "augment = none"]
    assert grid.rows[0][4].endswith("(1 failed)")
    ranks = stats.rankdata(-means.fillna(0), axis=1)  # (datasets, levels)
    expected = dict(zip(means.columns, ranks.mean(axis=0), strict=True))
    assert {row[0]: float(row[-1]) for row in grid.rows} == pytest.approx(expected, abs=0.005)
    p = stats.friedmanchisquare(*ranks.T).pvalue
    assert f"Friedman’s test over 4 datasets and 3 levels: p = {p_words(p)}" in finding
    assert compare_across([ablations[0], replace(ablations[1], runs=())])[1] is None
