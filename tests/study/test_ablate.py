import contextlib
import csv
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from core.config import DataConfig, TrainConfig
from core.data.sources import DataError
from core.data.splits import ImageData, load_data
from core.fit import Interrupted, fit
from core.metrics import EpochMetrics
from core.training.checkpoint import PREDICTIONS_FILE
from reports.ablation import read_ablations
from reports.ablation_tables import effects_csv, failures_grid
from reports.effects import Rules, open_levels
from study.ablate import AblationOutcome, Scores, run_ablation, run_identity
from study.ablation_plan import (
    Plan,
    cell_configs,
    looks_of,
    make_plan,
    n_runs,
    settled_config,
)
from study.baseline import factors_of, find_baseline
from study.config.errors import ConfigError
from study.config.study_config import StudyConfig
from study.designs import make_design
from study.execution.progress import EpochEnded, Event, QuietProgress, TrialEnded
from study.execution.session import StudyHalted
from study.execution.trial_engine import identity, is_settled
from study.record.frames import read_predictions
from study.record.models import Trial
from study.record.record import Record
from support import make_folder

# The head alone is trained: a fifth of a second a run.
SETTINGS = [
    'train.backbone="resnet18"',
    'train.weights="none"',
    "train.image_size=32",
    "train.freeze_depth=5",
    "train.epochs=1",
    "train.batch_size=8",
    "train.seed=7",
    'train.device="cpu"',
    "ablation.keep_checkpoints=false",
]
FACTORS = {"base_lr": [0.001], "augment": ["none"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures") / "photos", {"red": 16, "blue": 16})


def _plan(
    photos: Path,
    home: Path,
    *settings: str,
    factors: dict[str, object] = FACTORS,
    design: str = "ofat",
    replicates: int = 2,
    name: str = "tiny",
) -> Plan:
    (home / "study.toml").touch()
    flags = {
        "data.source": str(photos),
        "data.cache_dir": str(photos.parent / "cache"),
        "study.output": str(home / "runs"),
        "ablation.factors": factors,
        "ablation.design": design,
        "ablation.replicates": replicates,
    }
    overrides = [*SETTINGS, *settings]
    baseline = find_baseline(
        str(home / "s.db"), str(home / "study.toml"), "best", name, overrides, flags
    )
    return make_plan(baseline, make_design(factors_of(baseline), baseline.settings))


def _undecided(scores: Scores, looks: Sequence[int]) -> set[int]:
    raise AssertionError("a fixed ablation takes no look")


def _run(plan: Plan, progress: QuietProgress | None = None, decide=_undecided) -> AblationOutcome:
    return run_ablation(plan, progress=progress or QuietProgress(), command="test", decide=decide)


def _rows(home: Path, name: str = "tiny") -> list[Trial]:
    with Record.open(str(home / "s.db")) as store:
        return store.trials(store.study(name).id)


def _effects(home: Path, name: str = "tiny") -> list[dict[str, str]]:
    """Return the effects' CSV, of the last design used, without what a run cost."""
    with Record.open(str(home / "s.db")) as store:
        ablation = read_ablations(store, name)[0]
    rows = list(csv.DictReader(io.StringIO(effects_csv(ablation, ablation.effects()))))
    for row in rows:
        del row["cost_s"]
    return rows


def _optuna_trials(home: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="tiny", storage=f"sqlite:///{home}/s.db").trials


def _script(
    monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[TrainConfig], float]
) -> list[tuple[TrainConfig, ImageData]]:
    """Let a script stand in for training; returns what was trained, as it comes."""
    trained = []

    def scripted(config: TrainConfig, data: ImageData, **options: Any):
        trained.append((config, data))
        acc, folder = accuracy(config), options["checkpoint_dir"]
        for epoch in range(config.epochs):
            if options["should_stop"]():
                raise Interrupted
            figures = (0.5, 0.5, acc, acc, acc, 0.01, 0.1, 9.0, 0.0, 0.0, 0.0, 1, 8)
            yield EpochMetrics(epoch, *figures, is_best=epoch == 0)
        folder.mkdir(parents=True)
        np.savez(folder / PREDICTIONS_FILE, labels=data.val.labels, predicted=data.val.labels)

    monkeypatch.setattr("study.execution.trial_engine.fit", scripted)
    return trained


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
    rows = _rows(finished)
    assert Counter((row.factor, row.level, row.replicate, row.seed) for row in rows) == Counter(
        (*cell, replicate, 7 + replicate)
        for cell in (("baseline", None), ("base_lr", "0.001"), ("augment", "none"))
        for replicate in range(3)
    )
    assert [row.state for row in rows] == ["complete"] * 9
    # A whole replicate after the other, so that a stop leaves whole pairs.
    assert [row.replicate for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row in rows:
        config = TrainConfig(**row.config)
        assert config.seed == row.seed
        assert config.base_lr == (0.001 if row.factor == "base_lr" else 0.01)
        assert config.augment == ("none" if row.factor == "augment" else "standard")


def test_a_run_has_the_same_numbers_as_fit_alone(finished: Path, photos: Path) -> None:
    cache = str(photos.parent / "cache")
    with Record.open(str(finished / "s.db")) as store:
        study = store.study("tiny")
        size = study.config["data"]["store_size"]
        data = load_data(DataConfig(source=f"folder:{photos}", cache_dir=cache), size)
        for row in store.trials(study.id)[2:7]:
            alone = [(m.train_loss, m.val_loss, m.val_acc) for m in fit(_of(row), data)]
            kept = [(m.train_loss, m.val_loss, m.val_acc) for m in store.epochs(row.id)]
            assert kept == alone
            assert row.value == alone[0][2]


def _of(row: Trial) -> TrainConfig:
    return TrainConfig(**row.config)


def test_an_ablation_is_an_ordinary_optuna_study(finished: Path) -> None:
    rows, trials = _rows(finished), _optuna_trials(finished)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 9
    assert [trial.value for trial in trials] == [row.value for row in rows]
    assert [trial.number for trial in trials] == [row.number for row in rows]
    assert [trial.intermediate_values for trial in trials] == [{1: row.value} for row in rows]
    for trial, row in zip(trials, rows, strict=True):
        own = {"base_lr": "0.01", "augment": "standard"}
        levels = {} if row.factor == "baseline" else {row.factor: row.level}
        assert trial.user_attrs["levels"] == own | levels
        assert trial.user_attrs["replicate"] == row.replicate
        assert row.params == own | levels
    cells = ["baseline", "base_lr = 0.001", "augment = none"]
    assert [trial.user_attrs["cell"] for trial in trials] == cells * 3


def test_every_runs_answers_are_kept_and_agree_with_its_accuracy(finished: Path) -> None:
    with Record.open(str(finished / "s.db")) as store:
        answers = read_predictions(store, "tiny")
    rows = _rows(finished)
    assert set(answers) == {row.number for row in rows}
    for row in rows:
        labels, predicted = answers[row.number]
        assert row.value == np.mean(labels == predicted)


def test_a_finished_ablation_runs_nothing_again(home: Path, photos: Path) -> None:
    before = _rows(home)
    outcome = _run(_plan(photos, home, replicates=3))
    assert (outcome.stopped_because, outcome.n_done) == ("complete", 9)
    assert _rows(home) == before
    with Record.open(str(home / "s.db")) as store:
        assert len(store.designs(store.study("tiny").id)) == 1


def test_more_replicates_run_the_new_ones_only(home: Path, photos: Path) -> None:
    before = _rows(home)
    assert _run(_plan(photos, home, replicates=4)).n_done == 12
    rows = _rows(home)
    assert rows[:9] == before
    assert [(row.replicate, row.seed) for row in rows[9:]] == [(3, 10)] * 3
    with Record.open(str(home / "s.db")) as store:
        (design,) = store.designs(store.study("tiny").id)
    assert [len(hashes) for hashes in design.spec["runs"]] == [4, 4, 4]


def test_fewer_replicates_run_nothing_and_count_what_they_ask_for(
    home: Path, photos: Path
) -> None:
    outcome = _run(_plan(photos, home, replicates=2))
    assert (outcome.n_done, outcome.n_planned, len(_rows(home))) == (6, 6, 9)


def test_another_design_of_the_same_ablation_shares_cells(home: Path, photos: Path) -> None:
    before = _rows(home)
    outcome = _run(_plan(photos, home, design="factorial", replicates=3))
    assert (outcome.n_done, outcome.n_planned) == (12, 12)
    rows = _rows(home)
    assert rows[:9] == before
    assert [(row.factor, row.level) for row in rows[9:]] == [
        ("base_lr, augment", "0.001, none")
    ] * 3
    with Record.open(str(home / "s.db")) as store:
        designs = store.designs(store.study("tiny").id)
    assert [design.kind for design in designs] == ["ofat", "factorial"]
    assert set(designs[0].spec["runs"][0]) == set(designs[1].spec["runs"][0])


def test_levels_that_train_the_same_share_their_runs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = _script(monkeypatch, lambda config: 0.5)
    factors = {"augment": ["none"], "view": {"plain": {"augment": "none"}}}
    outcome = _run(_plan(photos, tmp_path, factors=factors))
    assert (outcome.n_done, len(trained)) == (6, 4)
    with Record.open(str(tmp_path / "s.db")) as store:
        others = read_ablations(store, "tiny")[0].others
    assert [runs.arm.label for runs in others] == ["augment = none", "view = plain"]
    assert others[0].numbers == others[1].numbers


def test_a_factor_may_get_other_levels_later(home: Path, photos: Path) -> None:
    plan = _plan(photos, home, factors={"augment": ["trivial", "none"]}, replicates=1)
    assert _run(plan).n_done == 3
    trials = _optuna_trials(home)
    assert len(trials) == 10
    assert trials[9].user_attrs["levels"] == {"augment": "trivial"}
    assert _run(_plan(photos, home, replicates=3)).n_done == 9
    assert len(_rows(home)) == 10


def test_a_diverging_level_is_a_result(home: Path, photos: Path) -> None:
    before = len(_rows(home))
    plan = _plan(photos, home, factors={"base_lr": [1e30]}, replicates=3)
    outcome = _run(plan)
    rows = _rows(home)[before:]
    assert [(row.state, row.level) for row in rows] == [("failed", "1e+30")] * 3
    assert all((row.reason or "").startswith("diverged: the ") for row in rows)
    assert (outcome.n_done, outcome.counts.failed) == (6, 3)
    states = [trial.state for trial in _optuna_trials(home)[before:]]
    assert states == [TrialState.FAIL] * 3
    assert _run(plan).n_done == 6
    assert len(_rows(home)) == before + 3  # not run again
    own, diverged = _effects(home)
    assert (own["n_failed"], diverged["n_failed"]) == ("0", "3")
    assert diverged["verdict"] == "fails"
    with Record.open(str(home / "s.db")) as store:
        grid = failures_grid(read_ablations(store, "tiny")[0])
    assert grid is not None
    assert [row[:2] for row in grid.rows] == [("base_lr = 1e+30", str(s)) for s in (7, 8, 9)]
    assert list((home / "runs").rglob("trial-*")) == []


class _Acts(QuietProgress):
    """Does something when a trial reaches its first epoch, or its end."""

    def __init__(self, number: int, act: Callable[[], None], *, at_end: bool = False) -> None:
        super().__init__()
        self.number, self.act, self.at_end = number, act, at_end

    def emit(self, event: Event) -> None:
        match event:
            case EpochEnded(self.number, metrics):
                if metrics.epoch == 0 and not self.at_end:
                    self.act()
            case TrialEnded(self.number):
                if self.at_end:
                    self.act()


def _kill_own_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_until_killed(photos: Path, home: Path, number: int) -> None:
    _run(_plan(photos, home, "train.epochs=2"), _Acts(number, _kill_own_process))


@pytest.mark.slow
def test_a_killed_ablation_goes_on_and_ends_with_the_same_effects(
    photos: Path, tmp_path: Path
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=_run_until_killed, args=(photos, cut, 3)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [row.state for row in _rows(cut)] == ["complete"] * 3 + ["running"]
    outcome = _run(_plan(photos, cut, "train.epochs=2"))
    assert (outcome.stopped_because, outcome.n_done) == ("complete", 6)
    states = [(row.state, row.reason) for row in _rows(cut)]
    assert states == [("complete", None)] * 3 + [("failed", "killed")] + [("complete", None)] * 3
    assert [trial.state for trial in _optuna_trials(cut)] == (
        [TrialState.COMPLETE] * 3 + [TrialState.FAIL] + [TrialState.COMPLETE] * 3
    )
    _run(_plan(photos, whole, "train.epochs=2"))
    assert len(_rows(whole)) == 6
    assert _effects(cut) == _effects(whole)
    assert len({row["accuracy"] for row in _effects(whole)}) > 1


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [1, 5])
def test_ctrl_c_leaves_cleanly_and_the_ablation_goes_on(
    number: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _script(monkeypatch, lambda config: config.base_lr)
    plan = _plan(photos, tmp_path, "train.epochs=2")
    handler = signal.getsignal(signal.SIGINT)
    outcome = _run(plan, _Acts(number, _interrupt))
    assert (outcome.stopped_because, outcome.n_done) == ("interrupted", number)
    assert signal.getsignal(signal.SIGINT) is handler
    rows = _rows(tmp_path)
    assert len(rows) == number + 1
    assert rows[-1].ended_at is None
    with Record.open(str(tmp_path / "s.db")) as store:
        (run,) = store.runs(store.study("tiny").id)
    assert run.outcome == "interrupted"
    outcome = _run(plan)
    assert (outcome.stopped_because, outcome.n_done, len(_rows(tmp_path))) == ("complete", 6, 6)
    assert all(row["n_failed"] == "0" for row in _effects(tmp_path))


def test_a_path_that_is_interrupted_takes_no_step_it_has_not_seen(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second candidate is the better one; its last replicate is cut short.
    _script(monkeypatch, lambda c: {"none": 0.9}.get(c.augment, 0.5) - c.base_lr * 100)
    plan = _plan(photos, tmp_path, "train.epochs=2", design="path")
    outcome = _run(plan, _Acts(5, _interrupt))
    assert (outcome.stopped_because, outcome.n_done) == ("interrupted", 5)
    with Record.open(str(tmp_path / "s.db")) as store:
        (design,) = store.designs(store.study("tiny").id)
    assert design.spec["steps"] == []


def _fail() -> None:
    raise RuntimeError("the process dies between two writes")


def test_a_process_that_dies_between_two_writes_loses_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run is complete in our record, and unknown to Optuna.
    _script(monkeypatch, lambda config: config.base_lr)
    plan = _plan(photos, tmp_path)
    with pytest.raises(RuntimeError, match="between two writes"):
        _run(plan, _Acts(2, _fail, at_end=True))
    outcome = _run(plan)
    assert (outcome.stopped_because, outcome.n_done) == ("complete", 6)
    rows, trials = _rows(tmp_path), _optuna_trials(tmp_path)
    assert [row.number for row in rows] == [trial.number for trial in trials]
    assert sum(row.state == "complete" for row in rows) == 6


def test_a_full_disk_ends_the_run_and_is_tried_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]

    def accuracy(config: TrainConfig) -> float:
        if config.seed == 8 and full[0]:
            raise OSError("no space left on device")
        return 0.5

    _script(monkeypatch, accuracy)
    plan = _plan(photos, tmp_path)
    with pytest.raises(StudyHalted, match="no space left"):
        _run(plan)
    assert [row.ended_at is None for row in _rows(tmp_path)] == [False] * 3 + [True]
    full[0] = False
    outcome = _run(plan)
    assert (outcome.stopped_because, outcome.n_done) == ("complete", 6)
    assert all(row["n_failed"] == "0" for row in _effects(tmp_path))


def test_a_timeout_begins_no_further_run_and_the_ablation_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def accuracy(config: TrainConfig) -> float:
        now[0] += 10
        return 0.5

    _script(monkeypatch, accuracy)
    monkeypatch.setattr("study.ablate.time", SimpleNamespace(monotonic=lambda: now[0]))
    outcome = _run(_plan(photos, tmp_path, "study.timeout=25"))
    assert (outcome.stopped_because, outcome.n_done, outcome.duration_s) == ("timeout", 3, 30)
    outcome = _run(_plan(photos, tmp_path))
    assert (outcome.stopped_because, outcome.n_done, len(_rows(tmp_path))) == ("complete", 6, 6)


def test_resplit_draws_a_validation_split_a_replicate_and_leaves_the_test_split(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = _script(monkeypatch, lambda config: 0.5)
    plan = _plan(photos, tmp_path, "ablation.resplit=true", replicates=3)
    assert _run(plan).n_done == 9
    by_seed: dict[int, set[tuple[str, ...]]] = {}
    for config, data in trained:
        by_seed.setdefault(config.seed, set()).add(data.val.paths)
    assert [len(splits) for splits in by_seed.values()] == [1, 1, 1]  # paired: as the seeds are
    own = load_data(plan.baseline.config.data, 50)
    splits = {paths for found in by_seed.values() for paths in found}
    assert len(splits | {own.val.paths}) == 4
    assert own.test is not None
    assert {data.test.paths for _, data in trained if data.test} == {own.test.paths}
    _run(plan)
    assert len(trained) == 9
    assert _run(_plan(photos, tmp_path, replicates=3)).n_done == 9
    assert len(trained) == 18  # a run on another split is another run


def test_resplit_is_refused_where_validation_is_given(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make_folder(root / "train", {"a": 12, "b": 12})
    make_folder(root / "val", {"a": 4, "b": 4}, seed=1)
    with pytest.raises(DataError, match="merge val/ into train/"):
        _run(_plan(root, tmp_path, "ablation.resplit=true"))
    assert _rows(tmp_path) == []


def test_adaptive_stops_where_the_effect_is_huge_and_goes_on_where_it_is_open(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(config: TrainConfig) -> float:
        if config.head_lr_mult == 1:
            return 0.5
        if config.head_lr_mult == 100:
            return 0.95 if config.seed % 2 else 0.85
        return 0.9 + 0.001 * config.seed

    _script(monkeypatch, accuracy)
    settings = ("ablation.adaptive=true", "ablation.max_replicates=10")
    plan = _plan(photos, tmp_path, *settings, factors={"head_lr_mult": [1.0, 100.0]}, replicates=4)
    assert plan.looks == (4, 6, 10)
    looked = []

    def decide(scores: Scores, looks: Sequence[int]) -> set[int]:
        looked.append((tuple(looks), [len(values) for values in scores]))
        return open_levels(scores, Rules(looks=plan.looks))

    assert _run(plan, decide=decide).stopped_because == "complete"
    assert looked == [((4,), [4, 4, 4]), ((4, 6), [6, 4, 6])]
    counts = Counter((row.factor, row.level) for row in _rows(tmp_path))
    assert counts == {
        ("baseline", None): 10,
        ("head_lr_mult", "1"): 4,
        ("head_lr_mult", "100"): 10,
    }
    _, huge, unclear = _effects(tmp_path)
    assert (huge["verdict"], huge["n"]) == ("hurts", "4.0")
    assert (unclear["verdict"], unclear["n"]) == ("undecided", "10.0")
    assert float(huge["p_family"]) <= 0.05 < float(unclear["p_family"])


def test_adaptive_ends_at_the_first_look_where_all_is_settled(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = _script(monkeypatch, lambda c: 0.9 if c.augment == "standard" else 0.1)
    plan = _plan(photos, tmp_path, "ablation.adaptive=true", factors={"augment": ["none"]})
    outcome = _run(plan, decide=lambda scores, looks: set())
    assert (outcome.stopped_because, len(trained)) == ("complete", 4)


@pytest.mark.parametrize(
    ("replicates", "most", "looks"),
    [(5, 20, (5, 8, 12, 20)), (2, 4, (2, 4)), (5, 5, (5,)), (2, 3, (2, 3))],
)
def test_looks_grow_by_half_up_to_the_most(
    replicates: int, most: int, looks: tuple[int, ...]
) -> None:
    assert looks_of(replicates, most) == looks


@pytest.mark.parametrize(
    ("settings", "design", "replicates", "told"),
    [
        ([], "factorial", 2, "needs --design ofat or loco, but got design='factorial'"),
        ([], "ofat", 1, "must begin with at least 2 replicates .* but got 1 and 20"),
        (["ablation.max_replicates=4"], "ofat", 4, "at least 2 replicates .* but got 4 and 4"),
    ],
)
def test_an_adaptive_ablation_has_its_rules(
    settings: list[str], design: str, replicates: int, told: str, photos: Path, tmp_path: Path
) -> None:
    adaptive = ["ablation.adaptive=true", *settings]
    with pytest.raises(ConfigError, match=told):
        _plan(photos, tmp_path, *adaptive, design=design, replicates=replicates)


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_are_kept_or_leave_no_folder(keep: bool, photos: Path, tmp_path: Path) -> None:
    keeping = f"ablation.keep_checkpoints={str(keep).lower()}"
    _run(_plan(photos, tmp_path, keeping, factors={"augment": ["none"]}, replicates=1))
    rows = _rows(tmp_path)
    folders = sorted((tmp_path / "runs" / "tiny").glob("*"))
    if keep:
        assert [folder.name for folder in folders] == ["trial-0000", "trial-0001"]
        assert [Path(row.checkpoint or "") for row in rows] == folders
        assert all((folder / "model.safetensors").is_file() for folder in folders)
    else:
        assert folders == []
        assert [row.checkpoint for row in rows] == [None, None]


def test_a_path_takes_the_change_with_the_best_mean(photos: Path, tmp_path: Path) -> None:
    factors = {"base_lr": [1e-6], "augment": ["none"], "head_init": ["zero"]}
    plan = _plan(photos, tmp_path, factors=factors, design="path")
    outcome = _run(plan)
    assert outcome.n_done == outcome.n_planned == n_runs(plan) == 14
    means: dict[frozenset[str], list[float]] = {}
    for row in _rows(tmp_path):
        left = frozenset() if row.factor == "baseline" else frozenset(row.factor.split(", "))
        means.setdefault(left, []).append(row.value)
    assert [len(values) for values in means.values()] == [2] * 7
    with Record.open(str(tmp_path / "s.db")) as store:
        (design,) = store.designs(store.study("tiny").id)
    left = frozenset(factors)
    assert len(design.spec["steps"]) == 3
    for name in design.spec["steps"]:
        score = {other: sum(means[left - {other}]) for other in left}
        assert score[name] == max(score.values())
        left -= {name}
    _run(plan)
    assert len(_rows(tmp_path)) == 14


def test_a_paths_order_is_by_mean_and_a_failed_candidate_comes_last(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(config: TrainConfig) -> float:
        if config.augment == "standard" and config.flip == 0 and config.seed == 8:
            raise ValueError("this setting breaks")
        gains = {"augment": 0.4 * (config.augment == "standard")}
        gains["head_init"] = 0.2 * (config.head_init == "default")
        # The seeds disagree; the mean decides: 0.3.
        gains["flip"] = (0.6 if config.seed == 7 else 0.0) * (config.flip > 0)
        return sum(gains.values()) / 2

    _script(monkeypatch, accuracy)
    factors = {"augment": ["none"], "head_init": ["zero"], "flip": [0.0]}
    _run(_plan(photos, tmp_path, factors=factors, design="path"))
    with Record.open(str(tmp_path / "s.db")) as store:
        (design,) = store.designs(store.study("tiny").id)
    assert design.spec["steps"] == ["flip", "augment", "head_init"]


def test_another_baseline_under_the_same_name_is_refused_with_what_differs(
    home: Path, photos: Path
) -> None:
    before = _rows(home)
    with pytest.raises(ConfigError) as told:
        _run(_plan(photos, home, "train.epochs=3", "train.momentum=0.5"))
    assert "ablation tiny is already in" in str(told.value)
    assert "train.epochs: 1 -> 3" in str(told.value)
    assert "train.momentum: 0.9 -> 0.5" in str(told.value)
    assert "Use another --name" in str(told.value)
    assert _rows(home) == before


def test_changed_pictures_are_refused(home: Path, photos: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(photos, tmp_path / "copy" / "photos")
    assert _run(_plan(photos, home, replicates=1)).n_done == 3
    make_folder(copy, {"red": 1}, seed=5)
    plan = _plan(photos, home)
    moved = dataclasses.replace(plan.baseline.config.data, source=f"folder:{copy}")
    config = plan.baseline.config.model_copy(update={"data": moved})
    changed = dataclasses.replace(plan, baseline=dataclasses.replace(plan.baseline, config=config))
    with pytest.raises(ConfigError):
        _run(changed)
    assert len(_rows(home)) == 9


def test_a_searchs_name_is_refused(photos: Path, tmp_path: Path) -> None:
    with Record.open(str(tmp_path / "s.db"), create=True) as store:
        store.create_study("photos", StudyConfig().to_record(), {"fingerprint": "f"}, {})
    with pytest.raises(ConfigError, match="study photos is a search, so it cannot hold"):
        _run(_plan(photos, tmp_path, name="photos"))
    with Record.open(str(tmp_path / "s.db")) as store:
        assert store.designs(store.study("photos").id) == []


def test_the_size_of_pictures_does_not_depend_on_later_designs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = _script(monkeypatch, lambda config: 0.5)
    first = _plan(photos, tmp_path, factors={"image_size": [64]}, replicates=1)
    settled = settled_config(first).data.store_size
    assert (
        settled == settled_config(_plan(photos, tmp_path, "train.image_size=64")).data.store_size
    )
    assert settled != settled_config(_plan(photos, tmp_path)).data.store_size
    _run(first)
    _run(_plan(photos, tmp_path, replicates=1))
    assert len(trained) == 4  # the baseline once
    with Record.open(str(tmp_path / "s.db")) as store:
        assert store.study("tiny").config["data"]["store_size"] == settled


def test_a_combination_that_breaks_a_rule_is_named_before_any_run(
    photos: Path, tmp_path: Path
) -> None:
    plan = _plan(photos, tmp_path, factors={"mixup": [0.2], "cutmix": [1.0]}, design="factorial")
    with pytest.raises(ConfigError, match=r"^mixup = 0.2, cutmix = 1: mixup and cutmix must not"):
        cell_configs(plan)
    with pytest.raises(ConfigError, match="mixup and cutmix must not both be on"):
        _run(plan)
    with Record.open(str(tmp_path / "s.db")) as store:
        assert store.studies() == []


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("complete", None, True),
        ("failed", "diverged: the loss is not finite", True),
        ("failed", "out of memory: one picture", True),
        ("failed", "error: [Errno 28] no space", False),
        ("failed", "interrupted", False),
        ("failed", "killed", False),
        ("running", None, False),
    ],
)
def test_a_run_is_done_when_its_result_is_its_own(
    state: str, reason: str | None, expected: bool, finished: Path
) -> None:
    row = dataclasses.replace(_rows(finished)[0], state=state, reason=reason)
    assert is_settled(row) is expected


def test_a_runs_identity_is_its_settings_seed_and_split() -> None:
    config = TrainConfig()
    assert run_identity(config, None) == identity(config)
    other = dataclasses.replace(config, seed=1)
    found = [run_identity(c, v) for c in (config, other) for v in (None, 0, 1)]
    assert len(set(found)) == 6
    moved = dataclasses.replace(config, device="cpu", workers=0)
    assert run_identity(moved, 1) == run_identity(config, 1)
