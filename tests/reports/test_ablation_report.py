"""The report of an ablation: verdicts, tables, files, designs, several datasets."""

import csv
import io
import re
import socket
from pathlib import Path

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
    tested = {"baseline": 0.78, "augment = mixup": 0.85}
    folder = tmp_path_factory.mktemp("machine-path")
    return report(folder, OFAT, simulate(TRUTH), test=lambda cell, r: tested.get(cell.label))


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


def test_the_page_says_which_levels_help_hurt_and_are_open(levels: Report) -> None:
    _, page, found = levels
    verdicts = {effect.arm.label: effect.verdict for effect in found.effects}
    assert verdicts["augment = mixup"] == "helps" and verdicts["augment = none"] == "hurts"
    heads = {
        "helps": "Better than the baseline:",
        "hurts": "Worse than the baseline:",
        "no difference": "No difference beyond ±1 points:",
        "inconclusive": "Inconclusive:",
    }
    for verdict, head in heads.items():
        expected = {label for label, own in verdicts.items() if own == verdict}
        assert set(re.findall(r"\w{2,} = [\w.]+", page.finding(head))) == expected
    assert "replicates would settle it" in page.finding("Inconclusive:")


def test_the_page_says_that_the_test_split_was_read(levels: Report) -> None:
    paths, page, found = levels
    assert page.finding("Test split:") == "The test split was read for 10 runs."
    assert "The test split was not used" not in page.text
    grids = {grid.name: grid for grid in found.grids}
    assert set(grids) == {"ofat-effects", "ofat-test"}
    assert [row[0] for row in grids["ofat-test"].rows] == ["baseline", "augment = mixup"]
    assert "read for 10 runs" in paths.markdown.read_text(encoding="utf-8")
    cards = {card.name: card.figure for card in found.cards}
    assert (cards["Test split"], cards["Replicates"], cards["Runs"]) == ("read", "5", "30")


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


# Other states of such a study


def test_failed_runs_are_findings(tmp_path: Path) -> None:
    score = simulate(TRUTH)
    failed: dict[tuple[str, int], Score] = {
        ("head = zero", 1): "out of memory: 8 GiB", ("freeze = 3", 0): "interrupted",
        **{("freeze = 5", r): f"diverged: the loss is nan {EVIL}" for r in range(5)},
    }  # fmt: skip
    paths, page, found = report(
        tmp_path, OFAT, lambda cell, r: failed.get((cell.label, r)) or score(cell, r)
    )
    assert page.finding("Runs failed:") == "freeze = 5 (5 of 5 runs); head = zero (1 of 5 runs)."
    verdicts = {effect.arm.label: effect for effect in found.effects}
    assert verdicts["freeze = 5"].n == 0
    assert found.grids[0].rows[-1][found.grids[0].header.index("n")] == "4 (1 failed)"
    # What was cut short from outside will come again: it is missing, not failed.
    assert verdicts["freeze = 3"].verdict != "fails" and verdicts["freeze = 3"].n == 4
    cards = {card.name: card for card in found.cards}
    assert cards["Runs"].more == "6 failed, 1 still missing"
    grid = next(grid for grid in found.grids if grid.name == "ofat-failures")
    assert [row[:2] for row in grid.rows] == [
        *[("freeze = 5", str(seed)) for seed in range(7, 12)], ("head = zero", "8"),
    ]  # fmt: skip
    assert EVIL in page.text
    assert [row["n_failed"] for row in rows_of(paths.csv[0])] == ["0", "0", "0", "0", "5", "1"]


def test_an_unfinished_study_says_what_is_missing(tmp_path: Path) -> None:
    score = simulate(TRUTH)

    def half(cell: Cell, replicate: int) -> Score:
        is_done = replicate == 0 or (replicate == 1 and cell.label in ("baseline", "freeze = 3"))
        return score(cell, replicate) if is_done and cell.label != "head = zero" else None

    _, page, found = report(tmp_path, OFAT, half)
    cards = {card.name: card for card in found.cards}
    assert (cards["Runs"].figure, cards["Runs"].more) == ("7", "0 failed, 23 still missing")
    n = {effect.arm.label: effect.n for effect in found.effects}
    assert n["freeze = 3"] == 2 and n["head = zero"] == 0
    assert "head = zero (not run yet)" in page.finding("Inconclusive:")
    assert "augment = none (too few replicates)" in page.finding("Inconclusive:")
    assert {row[1]: row[-1] for row in found.grids[0].rows}["zero"] == "not run yet"


@pytest.mark.parametrize("kind", ["ofat", "factorial", "path"])
def test_a_study_of_which_nothing_has_run_can_be_drawn(kind: str, tmp_path: Path) -> None:
    _, page, found = report(tmp_path, design_of(kind, "a", "b", "c"), lambda cell, r: None)
    assert {card.name: card.figure for card in found.cards}["Runs"] == "0"
    assert page.finding("Test split:") == "The test split was not used."


def test_an_adaptive_study_shows_the_replicates_of_each_level(tmp_path: Path) -> None:
    score = simulate({"augment = none": -0.1, "augment = mixup": 0.1}, sd=0.02)

    def adaptive(cell: Cell, replicate: int) -> Score:
        most = 5 if "augment" in cell.label else 8
        return score(cell, replicate) if replicate < most else None

    paths, page, found = report(tmp_path, OFAT, adaptive, looks=(5, 8, 12), margin=0.5)
    own = {effect.arm.label: (effect.n, effect.verdict) for effect in found.effects}
    assert own["augment = none"] == (5, "hurts") and own["augment = mixup"] == (5, "helps")
    assert own["freeze = 3"][0] == 8
    assert "looks at 5, 8, 12 replicates" in page.text and "±0.5 points" in page.text
    assert "missing" not in {card.name: card for card in found.cards}["Runs"].more
    assert len(rows_of(paths.csv[1])) == 4 * 8 + 2 * 5


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


# Factorials and paths


def test_a_full_factorial_finds_the_planted_interaction(tmp_path: Path) -> None:
    truth = {"augment = on": 0.05, "augment = on, freeze = on": 0.06}
    design = design_of("factorial", "augment", "freeze")
    paths, page, found = report(tmp_path, design, simulate(truth))
    assert "augment × freeze (interaction)" in page.finding("Matters:")
    assert [grid.name for grid in found.grids] == [
        "factorial-contrasts", "factorial-anova", "factorial-cells",
    ]  # fmt: skip
    assert {path.stem for path in paths.figures} == {
        "factorial-main-effects", "factorial-interactions", "factorial-cells-augment-freeze",
    }  # fmt: skip
    assert page.finding("Design:") == "full factorial, 4 combinations."
    assert [path.name for path in paths.csv] == ["factorial-effects.csv", "factorial-runs.csv"]
    assert len(rows_of(paths.csv[0])) == 3
    assert not found.effects


def test_a_path_tells_its_order_and_its_gains(tmp_path: Path) -> None:
    # Towards the baseline: what is still `on` costs.
    score = simulate({"augment = on": -0.03, "freeze = on": -0.12})
    design = follow(design_of("path", "augment", "freeze", "head"), score, 5)
    paths, page, found = report(tmp_path, design, score)
    assert page.finding("Order:").startswith("freeze, then augment, then head")
    changed = page.finding("Steps that changed the accuracy:")
    assert "freeze (+1" in changed and "augment (+" in changed and "head" not in changed
    assert page.finding("In all:").startswith("+1") and "over 3 steps" in page.finding("In all:")
    grid = found.grids[0]
    assert [row[1] for row in grid.rows][:2] == ["start", "freeze: on → off"]
    assert [row[-2] for row in grid.rows] == ["", "3", "2", "1"]
    assert {path.stem for path in paths.figures} == {"path-waterfall"}


@pytest.mark.parametrize(
    ("kind", "rest", "head"),
    [("factorial", "diverged: nan", "Not estimated:"), ("path", None, "Path:")],
)
def test_a_design_without_a_whole_replicate_claims_nothing(
    kind: str, rest: Score, head: str, tmp_path: Path
) -> None:
    score = simulate({"b = on": -0.3})
    _, page, _ = report(
        tmp_path,
        design_of(kind, "a", "b"),
        lambda cell, r: score(cell, r) if len(cell.levels) == 2 else rest,
    )
    assert page.finding(head) and not page.finding("Matters:") and not page.finding("Order:")


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
