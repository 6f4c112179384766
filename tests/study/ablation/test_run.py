import contextlib
import dataclasses
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from optuna.trial import TrialState
from small_study import SETTINGS, Reacts, optuna_trials, rows_of

from core.data.splits import ImageData, load_data
from reports.ablation import Ablation, read_ablations
from reports.ablation_report import describe_ablation
from reports.effects import judge
from study.ablation.baseline import find_baseline
from study.ablation.run import (
    AblationOutcome,
    Plan,
    choose_folds,
    make_plan,
    run_ablation,
    settled_config,
)
from study.config.errors import ConfigError
from study.execution.progress import EpochEnded, QuietProgress
from study.record.frames import read_predictions
from study.record.models import SPLITS_FILE, Design
from study.record.record import Record
from support import classic_settings, make_folder

# The head alone is trained: a fifth of a second a run.
CLASSIC = [f"{key}={value}" for key, value in classic_settings().items()]
HEADS = [*CLASSIC, "train.freeze_depth=5", "train.epochs=1", "train.seed=7"]
HEADS += ["ablation.keep_checkpoints=false"]
FACTORS = {"base_lr": [0.001], "augment": ["none"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "photos", {"red": 16, "blue": 16})


def _plan(
    photos: Path,
    home: Path,
    *settings: str,
    factors: dict[str, object] = FACTORS,
    design: str = "ofat",
    replicates: int = 2,
) -> Plan:
    (home / "study.toml").touch()
    flags = {
        "data.source": str(photos),
        "data.cache_dir": str(photos.parent / "cache"),
        "study.name": "tiny",
        "study.output": str(home / "runs"),
        "study.storage": str(home / "s.db"),
        "ablation.factors": factors,
        "ablation.design": design,
        "ablation.replicates": replicates,
    }
    file, overrides = str(home / "study.toml"), [*SETTINGS, *HEADS, *settings]
    return make_plan(find_baseline(file, "best", overrides, flags))


def _no_looks() -> set[int]:
    raise AssertionError("a fixed ablation takes no look")


def _run(plan: Plan, progress: QuietProgress | None = None) -> AblationOutcome:
    def announce(data: ImageData, n_folds: int, order: int) -> None:
        assert n_folds == choose_folds(plan.baseline, len(data.val))

    progress = progress or QuietProgress()
    return run_ablation(
        plan, progress=progress, command="test", decide=_no_looks, announce=announce
    )


def _ablation(home: Path) -> Ablation:
    """Read what reports make of the last design used."""
    with Record(str(home / "s.db")) as store:
        return read_ablations(store, "tiny")[0]


def _designs(home: Path) -> list[Design]:
    with Record(str(home / "s.db")) as store:
        return store.designs(store.study("tiny").id)


def _analyses(design: Design) -> list[tuple[int, list[int]]]:
    return [(each["order"], each["replicates"]) for each in design.spec["analyses"]]


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished ablation: three cells, three replicates."""
    home = tmp_path_factory.mktemp("finished")
    outcome = _run(_plan(photos, home, replicates=3))
    assert (outcome.stopped_because, outcome.n_done, outcome.n_planned) == ("complete", 9, 9)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished ablation's database, to go on with."""
    with (
        contextlib.closing(sqlite3.connect(finished / "s.db")) as old,
        contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as new,
    ):
        old.backup(new)  # a copied file may lack what is in the write-ahead log
    return tmp_path


def test_every_cell_and_replicate_is_run_once_with_paired_seeds(finished: Path) -> None:
    rows = rows_of(finished, "tiny")
    # A whole replicate after the other, so that a stop leaves whole pairs.
    cells = (("baseline", None), ("base_lr", "0.001"), ("augment", "none"))
    assert [(row.replicate, row.seed, row.factor, row.level) for row in rows] == [
        (replicate, 7 + replicate, *cell) for replicate in range(3) for cell in cells
    ]
    for trial, row in zip(optuna_trials(finished, "tiny"), rows, strict=True):
        own = {"base_lr": {"base_lr": 0.001}, "augment": {"augment": "none"}}.get(row.factor, {})
        own = {"base_lr": 0.01, "augment": "standard", "seed": 7 + row.replicate} | own
        assert row.config | own == row.config
        levels = {} if row.factor == "baseline" else {row.factor: row.level}
        levels = {"base_lr": "0.01", "augment": "standard"} | levels
        assert trial.user_attrs["levels"] == row.params == levels
        assert (trial.state, trial.number) == (TrialState.COMPLETE, row.number)
        assert trial.intermediate_values == {1: row.value} == {1: trial.value}


def test_only_what_is_missing_is_run(home: Path, photos: Path) -> None:
    before = rows_of(home, "tiny")
    for replicates in (3, 2):
        outcome = _run(_plan(photos, home, replicates=replicates))
        assert outcome.n_done == outcome.n_planned == 3 * replicates
    assert rows_of(home, "tiny") == before
    assert _run(_plan(photos, home, replicates=4)).n_done == 12
    rows = rows_of(home, "tiny")
    assert rows[:9] == before
    assert [(row.replicate, row.seed) for row in rows[9:]] == [(3, 10)] * 3
    (design,) = _designs(home)
    assert [len(hashes) for hashes in design.spec["runs"]] == [4, 4, 4]
    # Each number of replicates is an analysis, once, recorded before its runs.
    assert _analyses(design) == [(1, [3]), (2, [2]), (3, [4])]
    assert _run(_plan(photos, home, "study.time=1e-3", replicates=5)).stopped_because == "timeout"
    assert _analyses(_designs(home)[0])[3:] == [(4, [5])]
    assert len(rows_of(home, "tiny")) == 12


def test_another_design_of_the_same_ablation_shares_cells(home: Path, photos: Path) -> None:
    before = rows_of(home, "tiny")
    outcome = _run(_plan(photos, home, design="factorial", replicates=3))
    assert (outcome.n_done, outcome.n_planned) == (12, 12)
    rows = rows_of(home, "tiny")
    assert rows[:9] == before
    assert [(r.factor, r.level) for r in rows[9:]] == [("base_lr, augment", "0.001, none")] * 3
    designs = _designs(home)
    assert [design.kind for design in designs] == ["ofat", "factorial"]
    assert set(designs[0].spec["runs"][0]) == set(designs[1].spec["runs"][0])
    assert list(map(_analyses, designs)) == [[(1, [3])], [(2, [3])]]


def test_solved_heads_of_one_split_and_levels_that_train_the_same_share_their_runs(
    photos: Path, tmp_path: Path
) -> None:
    heads = ["train.head_solver=logistic", "train.weights=packaged", "train.features=several"]
    heads += ["train.backbone=timm:tf_efficientnet_lite0", "ablation.folds=1"]
    factors = {"features": ["last"], "view": {"plain": {"features": "last"}}, "weights": ["none"]}
    assert _run(_plan(photos, tmp_path, *heads, factors=factors)).n_done == 8
    assert len(rows_of(tmp_path, "tiny")) == 4
    # From scratch, the seed draws the frozen layers.
    assert {runs.label: (runs.numbers, runs.is_solved) for runs in _ablation(tmp_path).runs} == {
        "baseline": ((0, 0), True),
        "features = last": ((1, 1), True),
        "view = plain": ((1, 1), True),
        "weights = none": ((2, 3), False),
    }


def test_a_diverging_level_is_a_result(home: Path, photos: Path) -> None:
    before = len(rows_of(home, "tiny"))
    plan = _plan(photos, home, factors={"base_lr": [1e30]}, replicates=3)
    outcome = _run(plan)
    rows = rows_of(home, "tiny")[before:]
    assert [(row.state, row.level) for row in rows] == [("failed", "1e+30")] * 3
    begin = "diverged: the training loss is no longer finite at epoch 1"
    assert all((row.reason or "").startswith(begin) for row in rows)
    assert outcome.n_done == 6
    assert _run(plan).n_done == 6
    assert len(rows_of(home, "tiny")) == before + 3  # not run again
    (diverged,) = judge(_ablation(home))
    assert (diverged.verdict, diverged.n_failed) == ("fails", 3)
    assert list((home / "runs").rglob("trial-*")) == []


def test_an_interrupted_path_takes_the_steps_of_an_uninterrupted_one(
    photos: Path, tmp_path: Path
) -> None:
    plans = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        plans.append(_plan(photos, tmp_path / name, "train.epochs=2", design="path"))
    assert _run(plans[0]).stopped_because == "complete"
    # At the last replicate of the second candidate.
    at = Reacts(
        lambda event: isinstance(event, EpochEnded) and event.trial == 5,
        lambda: signal.raise_signal(signal.SIGINT),
    )
    outcome = _run(plans[1], at)
    assert (outcome.stopped_because, outcome.n_done) == ("interrupted", 5)
    assert rows_of(tmp_path / "cut", "tiny")[5].ended_at is None
    assert [design.spec["steps"] for design in _designs(tmp_path / "cut")] == [[]]
    outcome = _run(_plan(photos, tmp_path / "cut", "train.epochs=2", design="path"))
    assert (outcome.stopped_because, outcome.n_done, outcome.n_planned) == ("complete", 8, 8)
    ((whole,), (cut,)) = (_designs(tmp_path / name) for name in ("whole", "cut"))
    assert len(cut.spec["steps"]) == 2 and cut.spec == whole.spec
    assert len(cut.spec["cells"]) == len(cut.spec["runs"]) == 4
    assert [row.state for row in rows_of(tmp_path / "cut", "tiny")] == ["complete"] * 8


# Folds and shares


def test_replicates_validate_on_folds_which_splits_csv_names(photos: Path, tmp_path: Path) -> None:
    plan = _plan(photos, tmp_path, "ablation.folds=2", replicates=5)
    assert _run(plan).n_done == 15
    data = load_data(plan.baseline.config.data, 50)
    splits = pd.read_csv(tmp_path / "runs" / "tiny" / SPLITS_FILE)
    assert data.test is not None
    own = [(n, *row) for n in ("train", "val", "test") for row in _images(data, n)]
    assert list(splits[["split", "path", "class"]].itertuples(index=False, name=None)) == own
    assert list(splits.columns[3:]) == ["2-folds-0", "2-folds-1", "2-folds-2"]
    assert (splits.loc[splits["split"] == "test", "2-folds-0":] == -1).all(axis=None)
    with Record(str(tmp_path / "s.db")) as store:
        predicted = read_predictions(store, "tiny")
    for row in rows_of(tmp_path, "tiny"):
        assert row.seed == 7 + row.replicate
        division, fold = divmod(row.replicate, 2)  # the same for all levels
        images = splits[splits[f"2-folds-{division}"] == fold]
        labels, found = predicted[row.number]
        assert np.take(data.classes, labels).tolist() == images["class"].tolist()
        assert (labels == found).mean() == pytest.approx(row.value)
        assert set(images["path"]) == set(data.with_fold(2, division, fold).val.paths)
    assert not splits["2-folds-0"].equals(splits["2-folds-1"])
    _run(plan)
    assert len(rows_of(tmp_path, "tiny")) == 15
    # On the validation split it is another design, of other runs; both are still reported.
    assert _run(_plan(photos, tmp_path, "ablation.folds=1", replicates=1)).n_done == 3
    assert len(rows_of(tmp_path, "tiny")) == 18
    assert list(map(_analyses, _designs(tmp_path))) == [[(1, [5])], [(2, [1])]]
    with Record(str(tmp_path / "s.db")) as store:
        alone, folded = describe_ablation(store, "tiny")
    assert (alone.name, folded.name) == ("ofat-2", "ofat")
    for part, images in ((alone, data.val), (folded, data.development)):
        assert part.disagreement is not None
        assert sum(int(n) for _, n, *_ in part.disagreement.by_class.rows) == len(images)


def _images(data: ImageData, split: str) -> list[tuple[str, str]]:
    part = getattr(data, split)
    return list(zip(part.paths, np.take(data.classes, part.labels), strict=True))


def test_few_images_or_a_search_take_folds(photos: Path, tmp_path: Path) -> None:
    own = _plan(photos, tmp_path).baseline
    apart = _plan(photos, tmp_path, "data.ablation_fraction=0.2").baseline
    searched, seen = (dataclasses.replace(b, source=b.config) for b in (apart, own))
    assert [choose_folds(own, n) for n in (399, 400)] == [5, 1]
    assert [choose_folds(b, 400) for b in (seen, searched, apart)] == [5, 1, 1]
    for n in (1, 3):
        asked = _plan(photos, tmp_path, f"ablation.folds={n}", "data.ablation_fraction=0.2")
        assert choose_folds(asked.baseline, 100) == n


def test_the_share_of_training_images_is_a_factor(photos: Path, tmp_path: Path) -> None:
    factors = {"train_fraction": [0.5, 0.1]}
    settings = "ablation.folds=1", "train.batch_size=2", "train.head_solver=logistic"
    assert _run(_plan(photos, tmp_path, *settings, factors=factors, replicates=1)).n_done == 3
    runs = _ablation(tmp_path).runs
    assert [each.label for each in runs[1:]] == ["train_fraction = 0.5", "train_fraction = 0.1"]
    with Record(str(tmp_path / "s.db")) as store:
        (plot,) = (p for p in describe_ablation(store, "tiny")[0].plots if "size" in p.name)
    assert plot.render("svg", 5.0).startswith(b"<?xml")


def test_an_adaptive_ablation_looks_after_half_as_many_replicates_again(
    photos: Path, tmp_path: Path
) -> None:
    def looks(first: int, most: int) -> tuple[int, ...]:
        adaptive = ("ablation.adaptive=true", f"ablation.max_replicates={most}")
        return _plan(photos, tmp_path, *adaptive, replicates=first).looks

    assert [looks(5, 20), looks(2, 4), looks(2, 3)] == [(5, 8, 12, 20), (2, 4), (2, 3)]
    for first, most in ((1, 20), (4, 4)):
        with pytest.raises(ConfigError, match=f"got {first} and {most}"):
            looks(first, most)


def test_checkpoints_are_kept_or_leave_no_folder(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    assert list((finished / "runs").rglob("trial-*")) == []
    assert {row.checkpoint for row in rows_of(finished, "tiny")} == {None}
    keep = "ablation.keep_checkpoints=true"
    _run(_plan(photos, tmp_path, keep, factors={"augment": ["none"]}, replicates=1))
    folders = [Path(row.checkpoint or "") for row in rows_of(tmp_path, "tiny")]
    assert sorted((tmp_path / "runs" / "tiny").glob("trial-*")) == folders
    assert all((folder / "model.safetensors").is_file() for folder in folders)


def test_another_baseline_under_the_same_name_is_refused_with_what_differs(
    home: Path, photos: Path
) -> None:
    before = rows_of(home, "tiny")
    with pytest.raises(ConfigError) as caught:
        _run(_plan(photos, home, "train.epochs=3", "train.momentum=0.5"))
    parts = ("tiny is already in", "epochs: 1 -> 3", "momentum: 0.9 -> 0.5", "another --name")
    assert all(part in str(caught.value) for part in parts)
    assert rows_of(home, "tiny") == before


def test_the_size_of_images_does_not_depend_on_later_designs(photos: Path, tmp_path: Path) -> None:
    first = _plan(photos, tmp_path, factors={"image_size": [64]}, replicates=1)
    size = settled_config(first).data.store_size
    assert size == settled_config(_plan(photos, tmp_path, "train.image_size=64")).data.store_size
    assert size != settled_config(_plan(photos, tmp_path)).data.store_size
    _run(first)
    _run(_plan(photos, tmp_path, replicates=1))
    assert len(rows_of(tmp_path, "tiny")) == 4  # the baseline once
    with Record(str(tmp_path / "s.db")) as store:
        assert store.study("tiny").config["data"]["store_size"] == size


@pytest.mark.parametrize(
    ("design", "factors", "rule"),
    [
        ("factorial", {"mixup": [0.2], "cutmix": [1.0]}, "^mixup = 0.2, cutmix = 1: mixup and"),
        ("ofat", {"train_fraction": [0.1]}, "train.batch_size must be <= the number of training"),
    ],
)
def test_a_level_that_cannot_run_is_named_before_any_run(
    design: str, factors: dict[str, object], rule: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rule):
        _run(_plan(photos, tmp_path, factors=factors, design=design))
    with Record(str(tmp_path / "s.db")) as store:
        assert store.studies() == []
