import contextlib
import dataclasses
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from small_study import SETTINGS, optuna_trials, rows_of

from core.config import TrainConfig
from core.data.sources import DataError
from core.data.splits import ImageData, load_data
from core.fit import Interrupted
from core.metrics import EpochMetrics
from core.training.checkpoint import PREDICTIONS_FILE
from reports.ablation import Ablation, read_ablations
from reports.ablation_tables import failures_grid
from reports.effects import Rules, open_levels
from study.ablation.baseline import find_baseline
from study.ablation.designs import Scores
from study.ablation.run import AblationOutcome, Plan, make_plan, run_ablation, settled_config
from study.config.errors import ConfigError
from study.execution.progress import EpochEnded, Event, QuietProgress
from study.execution.trial_engine import is_settled
from study.record.models import Design
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


def _all_open(scores: Scores, looks: Sequence[int]) -> set[int]:
    raise AssertionError("a fixed ablation takes no look")


def _run(plan: Plan, progress: QuietProgress | None = None, decide=_all_open) -> AblationOutcome:
    return run_ablation(plan, progress=progress or QuietProgress(), command="test", decide=decide)


def _ablation(home: Path) -> Ablation:
    """Read what reports make of the last design used."""
    with Record(str(home / "s.db")) as store:
        return read_ablations(store, "tiny")[0]


def _designs(home: Path) -> list[Design]:
    with Record(str(home / "s.db")) as store:
        return store.designs(store.study("tiny").id)


def _script(
    monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[TrainConfig], float]
) -> list[tuple[TrainConfig, ImageData]]:
    """Let a script stand in for training; returns what was trained, as it comes."""
    trained = []

    def scripted(config: TrainConfig, data: ImageData, *, checkpoint_dir: Path, **options: Any):
        trained.append((config, data))
        acc = accuracy(config)
        for epoch in range(1, config.epochs + 1):
            if options["should_stop"]():
                raise Interrupted
            figures = (0.5, 0.5, acc, acc, acc, 0.01, 0.1, 9.0, 0.0, 0.0, 0.0, 1, 8)
            yield EpochMetrics(epoch, *figures, is_best=epoch == 1)
        checkpoint_dir.mkdir(parents=True)
        np.savez(
            checkpoint_dir / PREDICTIONS_FILE, labels=data.val.labels, predicted=data.val.labels
        )

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
    rows = rows_of(finished, "tiny")
    assert Counter((row.factor, row.level, row.replicate, row.seed) for row in rows) == Counter(
        (*cell, replicate, 7 + replicate)
        for cell in (("baseline", None), ("base_lr", "0.001"), ("augment", "none"))
        for replicate in range(3)
    )
    assert [row.state for row in rows] == ["complete"] * 9
    # A whole replicate after the other, so that a stop leaves whole pairs.
    assert [row.replicate for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    for row in rows:
        config = TrainConfig(**row.config)
        assert config.seed == row.seed
        assert config.base_lr == (0.001 if row.factor == "base_lr" else 0.01)
        assert config.augment == ("none" if row.factor == "augment" else "standard")
    for trial, row in zip(optuna_trials(finished, "tiny"), rows, strict=True):
        assert (trial.state, trial.number) == (TrialState.COMPLETE, row.number)
        assert trial.intermediate_values == {1: row.value} == {1: trial.value}
        levels = {} if row.factor == "baseline" else {row.factor: row.level}
        levels = {"base_lr": "0.01", "augment": "standard"} | levels
        assert trial.user_attrs["levels"] == row.params == levels


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


def test_levels_that_train_the_same_share_their_runs(photos: Path, tmp_path: Path) -> None:
    factors = {"augment": ["none"], "view": {"plain": {"augment": "none"}}}
    outcome = _run(_plan(photos, tmp_path, factors=factors))
    assert (outcome.n_done, len(rows_of(tmp_path, "tiny"))) == (6, 4)
    others = _ablation(tmp_path).others
    assert [runs.arm.label for runs in others] == ["augment = none", "view = plain"]
    assert others[0].numbers == others[1].numbers


def test_a_diverging_level_is_a_result(home: Path, photos: Path) -> None:
    before = len(rows_of(home, "tiny"))
    plan = _plan(photos, home, factors={"base_lr": [1e30]}, replicates=3)
    outcome = _run(plan)
    rows = rows_of(home, "tiny")[before:]
    assert [(row.state, row.level) for row in rows] == [("failed", "1e+30")] * 3
    assert all((row.reason or "").startswith("diverged: the ") for row in rows)
    assert outcome.n_done == 6
    states = [trial.state for trial in optuna_trials(home, "tiny")[before:]]
    assert states == [TrialState.FAIL] * 3
    assert _run(plan).n_done == 6
    assert len(rows_of(home, "tiny")) == before + 3  # not run again
    (diverged,) = _ablation(home).effects()
    assert (diverged.verdict, diverged.arm.n_failed) == ("fails", 3)
    grid = failures_grid(_ablation(home))
    assert grid is not None
    assert [row[:2] for row in grid.rows] == [("base_lr = 1e+30", str(s)) for s in (7, 8, 9)]
    assert list((home / "runs").rglob("trial-*")) == []


class _Interrupts(QuietProgress):
    """Presses Ctrl-C when a trial reaches its first epoch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def emit(self, event: Event) -> None:
        is_epoch = isinstance(event, EpochEnded) and event.trial == self.number
        if is_epoch and event.metrics.epoch == 1:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_ablation_continues_its_trial(photos: Path, tmp_path: Path) -> None:
    plan = _plan(photos, tmp_path, "train.epochs=2")
    outcome = _run(plan, _Interrupts(4))
    assert (outcome.stopped_because, outcome.n_done) == ("interrupted", 4)
    assert rows_of(tmp_path, "tiny")[4].ended_at is None
    outcome = _run(plan)
    assert (outcome.stopped_because, outcome.n_done) == ("complete", 6)
    assert [row.state for row in rows_of(tmp_path, "tiny")] == ["complete"] * 6


def test_an_interrupted_path_takes_the_steps_of_an_uninterrupted_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second candidate is the better one; its last replicate is cut short.
    _script(monkeypatch, lambda c: {"none": 0.9}.get(c.augment, 0.5) - c.base_lr * 50)
    settings, design = ("train.epochs=2",), "path"
    outcome = _run(_plan(photos, tmp_path, *settings, design=design), _Interrupts(5))
    assert (outcome.stopped_because, outcome.n_done) == ("interrupted", 5)
    assert [design.spec["steps"] for design in _designs(tmp_path)] == [[]]
    outcome = _run(_plan(photos, tmp_path, *settings, design=design))
    assert (outcome.stopped_because, outcome.n_done, outcome.n_planned) == ("complete", 8, 8)
    (recorded,) = _designs(tmp_path)
    assert recorded.spec["steps"] == ["augment", "base_lr"]
    assert len(recorded.spec["cells"]) == len(recorded.spec["runs"]) == 4


def test_a_timeout_begins_no_further_run(home: Path, photos: Path) -> None:
    outcome = _run(_plan(photos, home, "study.time=1e-3", replicates=4))
    assert (outcome.stopped_because, outcome.n_done, outcome.n_planned) == ("timeout", 9, 12)
    assert len(rows_of(home, "tiny")) == 9


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
    assert rows_of(tmp_path, "tiny") == []


def test_adaptive_stops_where_the_effect_is_huge_and_goes_on_where_it_is_open(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(config: TrainConfig) -> float:
        unclear = 0.95 if config.seed % 2 else 0.85
        return {1: 0.5, 100: unclear}.get(config.head_lr_mult, 0.9 + 0.001 * config.seed)

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
    assert Counter(row.level for row in rows_of(tmp_path, "tiny")) == {None: 10, "1": 4, "100": 10}
    huge, unclear = _ablation(tmp_path).effects()
    assert (huge.verdict, huge.n) == ("hurts", 4)
    assert (unclear.verdict, unclear.n) == ("inconclusive", 10)
    assert huge.p_family <= 0.05 < unclear.p_family


@pytest.mark.parametrize(
    ("first", "most", "looks"),
    [(5, 20, (5, 8, 12, 20)), (2, 4, (2, 4)), (2, 3, (2, 3)), (1, 20, None), (4, 4, None)],
)
def test_an_adaptive_ablation_looks_after_half_as_many_replicates_again(
    first: int, most: int, looks: tuple[int, ...] | None, photos: Path, tmp_path: Path
) -> None:
    adaptive = ("ablation.adaptive=true", f"ablation.max_replicates={most}")
    if looks is None:
        with pytest.raises(ConfigError, match=f"got {first} and {most}"):
            _plan(photos, tmp_path, *adaptive, replicates=first)
    else:
        assert _plan(photos, tmp_path, *adaptive, replicates=first).looks == looks


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


def test_a_combination_that_breaks_a_rule_is_named_before_any_run(
    photos: Path, tmp_path: Path
) -> None:
    plan = _plan(photos, tmp_path, factors={"mixup": [0.2], "cutmix": [1.0]}, design="factorial")
    with pytest.raises(ConfigError, match=r"^mixup = 0.2, cutmix = 1: mixup and cutmix must not"):
        _run(plan)
    with Record(str(tmp_path / "s.db")) as store:
        assert store.studies() == []


def test_a_run_is_done_when_its_result_is_its_own(finished: Path) -> None:
    row = rows_of(finished, "tiny")[0]

    def settled(state: str, reason: str | None = None) -> bool:
        return is_settled(dataclasses.replace(row, state=state, reason=reason))

    assert settled("complete") and settled("failed", "diverged: the loss is not finite")
    assert settled("failed", "out of memory: one image")
    assert not settled("failed", "error: [Errno 28] no space") and not settled("running")
