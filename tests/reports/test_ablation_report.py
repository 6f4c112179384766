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
from study.ablation.designs import Path as PathDesign
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
    make_factors,
    make_study,
    repeat_design,
    section,
    two_levels,
)

pytestmark = pytest.mark.usefixtures("unsaved")
NAME = "pets-ablation"
EVIL = "<script>alert(1)</script>"


def simulate(
    means: dict[str, float], *, seed: int = 0, sd: float = 0.01, n: int = 20, n_val: int = 400
) -> Simulator:
    """Return how runs go: true accuracy by the cell's label, the same whenever it is asked."""
    rng = np.random.default_rng(seed)
    seeds = rng.normal(0, 0.015, n)
    noise: dict[tuple[str, int], float] = {}

    def score(cell: Cell, replicate: int) -> Score:
        key = cell.label, replicate
        if key not in noise:
            noise[key] = rng.normal(0, sd)
        true = 0.8 + sum(gain for name, gain in means.items() if name in cell.label)
        return round(n_val * (true + seeds[replicate] + noise[key])) / n_val

    return score


def ofat() -> Design:
    factors = make_factors(
        augment=["crop", "none", "mixup"], freeze=["0", "3", "5"], head=["xavier", "zero"]
    )
    return design_of("ofat", factors)


TRUTH = {"augment = none": -0.06, "augment = mixup": 0.05, "freeze = 5": 0.008}


def report(store: Record, folder: Path, **more: object) -> tuple[AblationPaths, Page, Section]:
    with store:
        sections = describe_ablation(store, NAME)
        paths = write_ablation(store, NAME, folder, **more)
    return paths, Page(paths.html), sections[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def names(cells: str) -> set[str]:
    """Return the levels that a finding names."""
    return set(re.findall(r"\w{2,} = [\w.]+", cells))


# Levels against the baseline

Levels = tuple[Path, AblationPaths, Page, Section]


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Levels:
    """The drawn report of five levels, the test split read for the baseline and one of them."""
    folder = tmp_path_factory.mktemp("machine-path")
    score = simulate(TRUTH)

    def test(cell: Cell, replicate: int) -> Score:
        return 0.78 if not cell.levels else 0.85 if cell.label == "augment = mixup" else None

    store = make_ablation(folder / "studies.db", ofat(), score, test=test)
    return folder, *report(store, folder / "out" / "deep")


def test_every_file_is_written(levels: Levels) -> None:
    folder, paths, _, _ = levels
    out = folder / "out" / "deep"
    assert [paths.html, paths.markdown, paths.latex, *paths.csv] == [
        out / "ablation.html", out / "tables.md", out / "tables.tex",
        out / "ofat-effects.csv", out / "ofat-runs.csv",
    ]  # fmt: skip
    stems = {(path.stem, path.suffix) for path in paths.figures}
    assert stems == {
        (name, kind) for name in ("ofat-forest", "ofat-seeds") for kind in (".png", ".svg", ".pdf")
    }
    every = [paths.html, paths.markdown, paths.latex, *paths.csv, *paths.figures]
    assert all(path.stat().st_size > 200 for path in every)
    assert {path.name for path in out.rglob("*") if path.is_file()} == {p.name for p in every}
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert all(p.read_bytes().startswith(starts[p.suffix]) for p in paths.figures)


def test_the_page_says_which_levels_help_hurt_and_are_open(levels: Levels) -> None:
    _, _, page, found = levels
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
        assert names(page.finding(head)) == expected
    assert len(set(verdicts.values())) >= 3
    assert "replicates would settle it" in page.finding("Inconclusive:")


def test_the_page_says_that_the_test_split_was_read(levels: Levels) -> None:
    _, paths, page, found = levels
    assert page.finding("Test split:") == "The test split was read for 10 runs."
    assert "The test split was not used" not in page.text
    grids = {grid.name: grid for grid in found.grids}
    assert set(grids) == {"ofat-effects", "ofat-test"}
    assert [row[0] for row in grids["ofat-test"].rows] == ["baseline", "augment = mixup"]
    assert "read for 10 runs" in paths.markdown.read_text(encoding="utf-8")
    cards = {card.name: card.figure for card in found.cards}
    assert cards["Test split"] == "read"
    assert (cards["Replicates"], cards["Runs"]) == ("5", "30")


def test_no_path_of_this_machine_is_in_any_file(levels: Levels) -> None:
    folder, paths, _, _ = levels
    texts = [paths.html, paths.markdown, paths.latex, *paths.csv]
    texts += [path for path in paths.figures if path.suffix == ".svg"]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for trace in ("machine-path", str(folder), str(Path.home()) + "/", socket.gethostname()):
            assert trace not in text, f"{trace} in {path.name}"


def test_two_reads_give_the_same_bytes(levels: Levels, tmp_path: Path) -> None:
    folder, paths, _, _ = levels
    with Record.open(str(folder / "studies.db")) as store:
        again = write_ablation(store, NAME, tmp_path)
    for first, second in zip(paths.csv, again.csv, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()
    assert paths.latex.read_bytes() == again.latex.read_bytes()


def test_the_effects_csv_is_unrounded_and_that_of_estimate_effects(levels: Levels) -> None:
    folder, paths, _, _ = levels
    score, cells = simulate(TRUTH), ofat().cells
    values = [[score(cell, r) for cell in cells] for r in range(5)]  # as it was entered
    rows = rows_of(paths.csv[0])
    arms = [make_arm(cell.label, [row[k] for row in values]) for k, cell in enumerate(cells)]
    rules = Rules(resolution=1 / 400)
    effects = estimate_effects(arms[0], arms[1:], rules)
    assert rows[0]["factor"] == "baseline" and rows[0]["verdict"] == ""
    for row, effect in zip(rows[1:], effects, strict=True):
        assert f"{row['factor']} = {row['level']}" == effect.arm.label
        assert row["verdict"] == effect.verdict
        for key, own in (
            ("difference", effect.difference.estimate), ("difference_low", effect.difference.low),
            ("difference_high", effect.difference.high), ("p", effect.p), ("sd", effect.sd),
            ("p_family", effect.p_family), ("p_equivalence", effect.p_equivalence),
            ("d_z", effect.standardised),
        ):  # fmt: skip
            assert float(row[key]) == pytest.approx(own, abs=1e-12), key


def test_the_runs_csv_has_every_run(levels: Levels) -> None:
    _, paths, _, _ = levels
    rows = rows_of(paths.csv[1])
    score, cells = simulate(TRUTH), ofat().cells
    values = {(cell.label, r): score(cell, r) for r in range(5) for cell in cells}
    assert len(rows) == len(values) == 30
    for row in rows:
        assert float(row["val_acc"]) == values[row["cell"], int(row["seed"]) - 7]
        assert (row["test_acc"] != "") == (row["cell"] in ("baseline", "augment = mixup"))


# Other states of such a study


def test_failed_runs_are_findings(tmp_path: Path) -> None:
    score = simulate(TRUTH)

    def failing(cell: Cell, replicate: int) -> Score:
        if cell.label == "freeze = 5":
            return f"diverged: the loss is nan {EVIL}"
        if cell.label == "head = zero" and replicate == 1:
            return "out of memory: 8 GiB"
        if cell.label == "freeze = 3" and replicate == 0:
            return "interrupted"
        return score(cell, replicate)

    store = make_ablation(tmp_path / "s.db", ofat(), failing)
    paths, page, found = report(store, tmp_path / "out")
    assert page.finding("Runs failed:") == "freeze = 5 (5 of 5 runs); head = zero (1 of 5 runs)."
    verdicts = {effect.arm.label: effect for effect in found.effects}
    assert verdicts["freeze = 5"].n == 0
    # What was cut short from outside will come again: it is missing, not failed.
    assert verdicts["freeze = 3"].verdict != "fails" and verdicts["freeze = 3"].n == 4
    cards = {card.name: card for card in found.cards}
    assert cards["Runs"].more == "6 failed, 1 still missing"
    grid = next(grid for grid in found.grids if grid.name == "ofat-failures")
    assert [row[:2] for row in grid.rows] == [
        *[("freeze = 5", str(seed)) for seed in range(7, 12)], ("head = zero", "8"),
    ]  # fmt: skip
    assert EVIL in page.text
    rows = rows_of(paths.csv[0])
    assert [row["n_failed"] for row in rows] == ["0", "0", "0", "0", "5", "1"]


def test_an_unfinished_study_says_what_is_missing(tmp_path: Path) -> None:
    score = simulate(TRUTH)

    def half(cell: Cell, replicate: int) -> Score:
        is_done = replicate == 0 or (replicate == 1 and cell.label in ("baseline", "freeze = 3"))
        return score(cell, replicate) if is_done and cell.label != "head = zero" else None

    store = make_ablation(tmp_path / "s.db", ofat(), half)
    _, page, found = report(store, tmp_path / "out")
    cards = {card.name: card for card in found.cards}
    assert (cards["Runs"].figure, cards["Runs"].more) == ("7", "0 failed, 23 still missing")
    n = {effect.arm.label: effect.n for effect in found.effects}
    assert n["freeze = 3"] == 2 and n["head = zero"] == 0
    assert "head = zero (not run yet)" in page.finding("Inconclusive:")
    assert "augment = none (too few replicates)" in page.finding("Inconclusive:")
    last = {row[1]: row[-1] for row in found.grids[0].rows}
    assert last["zero"] == "not run yet"
    assert last["none"] == "inconclusive: one replicate cannot be tested"


@pytest.mark.parametrize("kind", ["ofat", "factorial", "path"])
def test_a_study_of_which_nothing_has_run_can_be_drawn(kind: str, tmp_path: Path) -> None:
    factors = two_levels("a", "b", "c")
    store = make_ablation(tmp_path / "s.db", design_of(kind, factors), lambda cell, r: None)
    _, page, found = report(store, tmp_path / "out")
    assert {card.name: card.figure for card in found.cards}["Runs"] == "0"
    assert page.finding("Test split:") == "The test split was not used."


def test_an_adaptive_study_shows_the_replicates_of_each_level(tmp_path: Path) -> None:
    score = simulate({"augment = none": -0.1, "augment = mixup": 0.1}, sd=0.02)

    def adaptive(cell: Cell, replicate: int) -> Score:
        most = 5 if "augment" in cell.label else 8
        return score(cell, replicate) if replicate < most else None

    settings = section(design="ofat", replicates=5, adaptive=True, max_replicates=12, margin=0.5)
    store = make_ablation(tmp_path / "s.db", ofat(), adaptive, looks=(5, 8, 12), settings=settings)
    paths, page, found = report(store, tmp_path / "out")
    own = {effect.arm.label: (effect.n, effect.verdict) for effect in found.effects}
    assert own["augment = none"] == (5, "hurts") and own["augment = mixup"] == (5, "helps")
    assert own["freeze = 3"][0] == 8
    assert "looks at 5, 8, 12 replicates" in page.text
    assert "±0.5 points" in page.text
    assert "missing" not in {card.name: card for card in found.cards}["Runs"].more
    rows = rows_of(paths.csv[1])
    assert len(rows) == 4 * 8 + 2 * 5


def test_names_are_escaped_and_passwords_blanked_wherever_they_stand(tmp_path: Path) -> None:
    factors = make_factors(**{f"f{EVIL}": [f"b{EVIL}", f"l{EVIL}"], "x": ["y", "z"]})
    store = make_ablation(
        tmp_path / "s.db", design_of("ofat", factors), simulate({}),
        origin=f"trial 1 of {EVIL}", command=f"python -m study ablate '{EVIL}' --storage postgresql://me:hunter2@db/studies",
        source=f"folder:{EVIL}", warnings=[f"class {EVIL} is small"],
    )  # fmt: skip
    paths, page, _ = report(store, tmp_path / "out")
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
    design = design_of("factorial", two_levels("augment", "freeze"))
    truth = {"augment = on": 0.05, "augment = on, freeze = on": 0.06}
    store = make_ablation(tmp_path / "s.db", design, simulate(truth))
    paths, page, found = report(store, tmp_path / "out")
    assert "augment × freeze (interaction)" in page.finding("Matters:")
    assert [grid.name for grid in found.grids] == [
        "factorial-contrasts", "factorial-anova", "factorial-cells",
    ]  # fmt: skip
    assert {path.stem for path in paths.figures} == {
        "factorial-main-effects", "factorial-interactions", "factorial-cells-augment-freeze",
    }  # fmt: skip
    assert page.finding("Design:") == "full factorial, 4 combinations."
    assert [path.name for path in paths.csv] == ["factorial-effects.csv", "factorial-runs.csv"]
    rows = rows_of(paths.csv[0])
    assert len(rows) == 3
    assert not found.effects


def test_a_factorial_without_a_whole_replicate_claims_nothing(tmp_path: Path) -> None:
    design = design_of("factorial", two_levels("a", "b", "c"))
    score = simulate({"b = on": -0.3})
    # Half of the settings diverge every time.
    store = make_ablation(
        tmp_path / "s.db",
        design,
        lambda cell, r: "diverged: nan" if "b" in cell.levels else score(cell, r),
    )
    _, page, _ = report(store, tmp_path / "out")
    assert "no effect is distinguishable from noise" not in page.finding("Matters:")


def path_store(path: Path, score: Simulator) -> Record:
    design, steps = follow(PathDesign(two_levels("augment", "freeze", "head")), score, 5)
    return make_ablation(path, design, score, steps=steps)


def test_a_path_tells_its_order_and_its_gains(tmp_path: Path) -> None:
    # Towards the baseline: what is still `on` costs.
    truth = {"augment = on": -0.03, "freeze = on": -0.12}
    store = path_store(tmp_path / "s.db", simulate(truth))
    paths, page, found = report(store, tmp_path / "out")
    assert page.finding("Order:").startswith("freeze, then augment, then head")
    changed = page.finding("Steps that changed the accuracy:")
    assert "freeze (+12" in changed and "augment (+" in changed and "head" not in changed
    assert page.finding("In all:").startswith("+1") and "over 3 steps" in page.finding("In all:")
    grid = found.grids[0]
    assert [row[1] for row in grid.rows][:2] == ["start", "freeze: on → off"]
    assert [row[-2] for row in grid.rows] == ["", "3", "2", "1"]
    assert {path.stem for path in paths.figures} == {"path-waterfall"}


def test_a_path_that_was_cut_short_is_told_as_far_as_it_went(tmp_path: Path) -> None:
    score = simulate({"freeze = on": -0.1})
    begun = design_of("path", two_levels("augment", "freeze"))
    store = make_ablation(
        tmp_path / "s.db", begun, lambda cell, r: score(cell, r) if len(cell.levels) == 2 else None
    )
    _, page, _ = report(store, tmp_path / "out")
    assert page.finding("Path:") == "no step was finished yet."


# Several designs, several data sets


def test_two_designs_of_one_study_have_a_section_each(tmp_path: Path) -> None:
    store = make_ablation(tmp_path / "s.db", ofat(), simulate(TRUTH))
    with store:
        repeat_design(store, NAME)
        sections = describe_ablation(store, NAME)
        paths = write_ablation(store, NAME, tmp_path / "out")
    # The last one used comes first; names count from the first, so that they stay.
    assert [section.name for section in sections] == ["ofat-2", "ofat"]
    assert [path.name for path in paths.csv] == [
        "ofat-2-effects.csv", "ofat-2-runs.csv", "ofat-effects.csv", "ofat-runs.csv",
    ]  # fmt: skip
    assert "ofat-2-effects" in paths.latex.read_text(encoding="utf-8")
    assert "ofat-2-effects" in [grid.name for s in sections for grid in s.grids]


def test_ablations_of_several_datasets_are_compared(tmp_path: Path) -> None:
    names_ = [NAME, "set-1", "set-2", "set-3"]
    for k, name in reversed(list(enumerate(names_))):
        store = make_ablation(
            tmp_path / "s.db", ofat(), simulate(TRUTH, seed=k), name=name,
            source=f"folder:photos/set{k}",
        )  # fmt: skip
    with store:
        ablations = [read_ablations(store, name)[0] for name in names_]
    scores = score_frame(ablations)
    found = compare_across(ablations)
    (grid,) = found.grids
    assert grid.header == ("Level", "set0", "set1", "set2", "set3", "Mean rank")
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

    make_ablation(tmp_path / "s.db", ofat(), failing, name="other", source="folder:b").close()
    with make_ablation(tmp_path / "s.db", ofat(), score) as store:
        ablations = [read_ablations(store, name)[0] for name in (NAME, "other")]
    rows = {row[0]: row for row in compare_across(ablations).grids[0].rows}
    assert rows["augment = mixup"][-1] == "3.50"  # first of six, and last of six
    assert rows["augment = mixup"][2].endswith("(1 failed)")


def test_ablations_that_share_no_level_are_not_compared(tmp_path: Path) -> None:
    other = design_of("ofat", make_factors(decay=["0", "1"]))
    make_ablation(tmp_path / "s.db", other, simulate({}), name="other").close()
    store = make_ablation(tmp_path / "s.db", ofat(), simulate(TRUTH))
    _, page, _ = report(store, tmp_path / "out", beside=["other"])
    assert "nothing can be compared across them" in page.text
