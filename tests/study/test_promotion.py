"""Successive halving with pauses: who goes on, and that no figure of a study shows the pauses."""

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.config import TrainConfig
from core.fit import fit
from core.metrics import MEASURED, EpochMetrics
from study import search as search_module
from study.config import StudyConfig, load_config
from study.progress import QuietProgress
from study.promotion import Promotion, rungs, worth_keeping
from study.runner import pause_file
from study.search import SearchOutcome, run_search
from study.session import load_pictures
from study.store import Store
from support import make_folder

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, ()), (2, (1,)), (5, (1,)), (6, (1, 3)), (10, (1, 3)), (15, (1, 3)), (16, (1, 3, 9))],
)
def test_rungs_are_powers_of_three_that_leave_something_to_do(
    epochs: int, expected: tuple[int, ...]
) -> None:
    assert rungs(epochs) == expected


def _trial(number: int, values: list[float], state: TrialState = TrialState.PRUNED) -> FrozenTrial:
    trial = create_trial(
        state=state,
        value=values[-1] if state is TrialState.COMPLETE else None,
        params={"x": float(number)},
        distributions={"x": FloatDistribution(0, 1000)},
        intermediate_values=dict(enumerate(values, start=1)),
    )
    trial.number = number
    return trial


def test_the_best_third_of_a_rung_goes_on_the_highest_rung_first() -> None:
    promotion = Promotion(10)
    trials = [_trial(k, [value]) for k, value in enumerate([0.5, 0.7, 0.7, 0.1, 0.2, 0.3])]
    order = promotion.standings(trials, range(6))
    # Of equals the earlier one is better.
    assert [row.number for row in order] == [1, 2, 0, 5, 4, 3]
    assert [row.is_promotable for row in order] == [True, True, False, False, False, False]
    trials[1] = _trial(1, [0.7, 0.6, 0.2])
    trials[2] = _trial(2, [0.7, 0.6, 0.9])
    order = promotion.standings(trials, range(6))
    assert [(row.number, row.epochs) for row in order[:3]] == [(2, 3), (1, 3), (0, 1)]
    assert not any(row.is_promotable for row in order)  # two at 3 epochs, and their places taken
    trials[0] = _trial(0, [0.8, 0.6, 0.8])
    assert [row.number for row in promotion.standings(trials, range(6)) if row.is_promotable] == [
        2
    ]


def test_trials_are_ranked_by_their_scores_where_there_are_any() -> None:
    trials = [_trial(k, [value]) for k, value in enumerate([0.9, 0.8, 0.7])]
    scores = {0: {1: 0.4}, 1: {1: 0.5}, 2: {1: 0.6, 2: 0.1}}
    order = Promotion(10, scores).standings(trials, range(3))
    assert [row.number for row in order] == [2, 1, 0]
    del scores[0]  # what Optuna was told stands in
    assert [row.number for row in Promotion(10, scores).standings(trials, range(3))] == [0, 2, 1]


def test_an_interrupted_trial_goes_on_before_all_others() -> None:
    trials = [_trial(0, [0.1, 0.1]), *(_trial(k, [0.9]) for k in range(1, 4))]
    order = Promotion(10).standings(trials, range(4))
    assert [row.number for row in order if row.is_promotable] == [0, 1]


def test_failed_trials_and_copies_take_nobodys_place() -> None:
    trials = [
        _trial(0, [0.9], TrialState.FAIL),
        _trial(1, [0.8], TrialState.COMPLETE),
        *(_trial(k, [0.5]) for k in (2, 3, 4)),
    ]
    copy = _trial(5, [0.8])
    copy.params = dict(trials[1].params)
    order = Promotion(10).standings([*trials, copy], (2, 3, 4))
    assert [(row.number, row.place, row.is_promotable) for row in order] == [
        (2, 1, False), (3, 2, False), (4, 3, False),
    ]  # fmt: skip


def _next_job(at: dict[int, dict[int, float]], gone_on: dict[int, set[int]]) -> int | None:
    """Algorithm 2 of Li et al. 2020, line by line."""
    for rung in sorted(at, reverse=True):
        results = sorted(at[rung].items(), key=lambda item: (-item[1], item[0]))
        candidates = [number for number, _ in results[: len(results) // 3]]
        promotable = [number for number in candidates if number not in gone_on[rung]]
        if promotable:
            return promotable[0]
    return None


@pytest.mark.parametrize("seed", range(5))
def test_promotions_are_those_of_the_published_algorithm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = rng.integers(0, 20, (40, 30)) / 20  # with ties
    promotion = Promotion(30)
    steps = (*promotion.rungs, 30)
    at: dict[int, dict[int, float]] = {rung: {} for rung in promotion.rungs}
    gone_on: dict[int, set[int]] = {rung: set() for rung in promotion.rungs}
    trials: dict[int, FrozenTrial] = {}
    done: dict[int, int] = {}
    n_promotions = 0
    for _ in range(80):
        paused = [number for number, epochs in done.items() if epochs < 30]
        order = promotion.standings(list(trials.values()), paused)
        chosen = next((row.number for row in order if row.is_promotable), None)
        assert chosen == _next_job(at, gone_on)
        number = len(trials) if chosen is None else chosen
        if number == len(curves):
            break
        if chosen is not None:
            gone_on[done[number]].add(number)
            n_promotions += 1
        done[number] = next(step for step in steps if step > done.get(number, 0))
        if done[number] < 30:
            at[done[number]][number] = curves[number][done[number] - 1]
        trials[number] = _trial(number, list(curves[number][: done[number]]))
    assert n_promotions > 10


def test_only_what_may_still_go_on_stays_on_disk() -> None:
    promotion = Promotion(10)
    trials = [_trial(k, [0.9 - 0.01 * k]) for k in range(15)]
    for k in range(4):
        trials[k] = _trial(k, [0.9, 0.9, 0.9 - 0.01 * k])
    order = promotion.standings(trials, range(15))
    # Of 20 trials 6 come to three epochs, and 2 of them go on; four are there already.
    assert worth_keeping(order, 20) == [0, 1, 4, 5]
    assert worth_keeping(order, 9) == [0]
    assert worth_keeping(order, 2) == [0]  # the one that would be completed at last
    assert worth_keeping([], 2) == []
    many = promotion.standings([_trial(k, [0.5]) for k in range(400)], range(400))
    assert len(worth_keeping(many, 1200)) == 32


def test_a_trial_stops_at_a_rung_unless_it_is_good_enough() -> None:
    study = optuna.create_study(direction="maximize", pruner=Promotion(10))
    stops = []
    for k, value in enumerate([0.5, 0.4, 0.3, 0.6, 0.7, 0.8]):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        stops.append([])
        for step in range(1, 11):
            trial.report(value, step)
            stops[k].append(trial.should_prune())
            if stops[k][-1]:
                break
        state = TrialState.PRUNED if stops[k][-1] else TrialState.COMPLETE
        study.tell(trial, None if stops[k][-1] else value, state=state)
    # The fourth is the best of four, the fifth of five; at three epochs there are too few.
    assert [len(row) for row in stops] == [1, 1, 1, 3, 3, 10]


SETTINGS = [
    'train.backbone="shufflenet_v2_x0_5"',
    'train.weights="none"',
    "train.image_size=32",
    "train.epochs=6",
    "train.batch_size=8",
    'train.device="cpu"',
    'search.pruner="promote"',
    'search.sampler="random"',
]
SPACE = """
[space]
freeze_depth = {low = 3, high = 5}
base_lr = {low = 1e-4, high = 1e-1, log = true}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"red": 24, "blue": 24})
    (tmp_path / "study.toml").write_text(SPACE)
    return tmp_path


def _config(home: Path, trials: int, *settings: str, **flags: object) -> StudyConfig:
    return load_config(
        home / "study.toml",
        [*SETTINGS, *settings],
        {
            "data.source": str(home / "photos"),
            "data.cache_dir": str(home / "cache"),
            "study.storage": str(home / "s.db"),
            "study.output": str(home / "runs"),
            "study.trials": trials,
            **flags,
        },
    )


def _run(config: StudyConfig, progress: QuietProgress | None = None) -> SearchOutcome:
    return run_search(config, progress=progress or QuietProgress(), command="test")


def _told(metrics: EpochMetrics) -> dict[str, Any]:
    figures = dataclasses.asdict(metrics)
    return {name: value for name, value in figures.items() if name not in MEASURED}


def _record(home: Path, name: str = "photos") -> list[dict[str, Any]]:
    """Read all of a study's record that is not measured by a clock."""
    with Store.open(str(home / "s.db")) as store:
        rows = store.trials(store.study(name).id)
        kept = ("number", "state", "reason", "origin", "params", "config", "value", "best_epoch")
        return [
            {
                **{field: getattr(row, field) for field in (*kept, "epochs_done")},
                "has_checkpoint": row.checkpoint is not None,
                "epochs": [_told(metrics) for metrics in store.epochs(row.id)],
            }
            for row in rows
        ]


def _optuna(home: Path, name: str = "photos") -> list[tuple[Any, ...]]:
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{home}/s.db")
    return [
        (trial.number, trial.state.name, trial.params, trial.intermediate_values)
        for trial in study.trials
    ]


def test_every_trial_has_the_figures_of_its_setting_alone(home: Path) -> None:
    config = _config(home, 9)
    outcome = _run(config)
    assert outcome.stopped_because == "trials"
    rows = _record(home)
    assert len(rows) == 9
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    done = [row["epochs_done"] for row in rows]
    assert set(done) == {1, 3, 6}
    # A third of the nine goes on, and those that were of a third before others came.
    assert 3 <= sum(epochs > 1 for epochs in done) <= 6
    data = load_pictures(config, QuietProgress())
    for row in [*rows[:2], *(row for row in rows[2:] if row["epochs_done"] > 1)]:
        alone = []
        run = fit(TrainConfig(**row["config"]), data)
        for metrics, _ in zip(run, range(row["epochs_done"]), strict=False):
            alone.append(_told(metrics))
        assert row["epochs"] == alone
        assert row["value"] == max(figures["val_acc"] for figures in alone)
    told = _optuna(home)
    assert [state for _, state, _, _ in told] == [row["state"].upper() for row in rows]
    assert [list(values.values()) for *_, values in told] == [
        [figures["val_acc"] for figures in row["epochs"]] for row in rows
    ]
    assert not (home / "runs" / "photos" / "paused").exists()
    assert outcome.counts.finished == 9
    assert outcome.checkpoint is not None
    assert _run(config).stopped_because == "trials"
    assert _record(home) == rows


class _Stops(QuietProgress):
    """Asks for a stop, as Ctrl-C does, after so many epochs."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def epoch(self, number: int, metrics: EpochMetrics) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def test_stopping_and_resuming_gives_the_same_study(home: Path) -> None:
    _run(_config(home, 9, **{"study.name": "whole"}))
    config = _config(home, 9, **{"study.name": "cut"})
    n_runs = 1
    while (outcome := _run(config, _Stops(5))).stopped_because == "interrupted":
        n_runs += 1
        assert outcome.counts.paused > 0
        assert outcome.counts.running == 0
        states = [state for _, state, _, _ in _optuna(home, "cut")]
        assert states.count("RUNNING") == outcome.counts.paused
        if n_runs == 3:  # what is lost on disk is trained again
            for file in (home / "runs" / "cut" / "paused").iterdir():
                file.write_bytes(file.read_bytes()[:100])
    assert n_runs > 3
    assert _record(home, "cut") == _record(home, "whole")
    assert _optuna(home, "cut") == _optuna(home, "whole")


class _Dies(QuietProgress):
    """Kills its process, as a crash does: where a trial goes on, is paused, or is given up."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.continued: set[int] = set()

    def _die(self, where: str) -> None:
        if where == self.where:
            os.kill(os.getpid(), signal.SIGKILL)

    def trial_continued(self, number: int, *_: object) -> None:
        self.continued.add(number)

    def epoch(self, number: int, metrics: EpochMetrics) -> None:
        if number in self.continued:
            self._die("goes on")

    def trial_ended(self, number: int, state: str, *_: object) -> None:
        if state == "pruned" or number in self.continued:
            self._die(state)


@pytest.mark.slow
def test_a_killed_process_changes_nothing_but_for_what_it_had_not_paused_yet(home: Path) -> None:
    _run(_config(home, 6, **{"study.name": "whole"}))
    config = _config(home, 6, **{"study.name": "cut"})
    context = multiprocessing.get_context("spawn")
    for where in ("goes on", "paused", "pruned"):
        process = context.Process(target=_run, args=(config, _Dies(where)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert _run(config).stopped_because == "trials"
    assert _record(home, "cut") == _record(home, "whole")
    assert _optuna(home, "cut") == _optuna(home, "whole")


class _StopsAtOnce(QuietProgress):
    def study_started(self, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)


def test_a_trial_that_keeps_killing_its_process_is_not_gone_on_with(home: Path) -> None:
    config = _config(home, 4)
    _run(config, _Stops(1))
    with Store.open(str(home / "s.db")) as store:
        study = store.study("photos").id
        states = []
        for _ in range(4):
            row = store.trial(study, 0)
            store.continue_trial(row.id, row.run_id)  # what a process leaves that dies in it
            _run(config, _StopsAtOnce())
            states.append((store.trial(study, 0).state, store.trial(study, 0).reason))
    assert states == [("paused", "paused after epoch 1")] * 3 + [("failed", "killed")]
    assert _optuna(home)[0][1] == "FAIL"


def test_a_timeout_leaves_trials_paused_for_a_resume(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(QuietProgress):
        now = 0.0

        def trial_ended(self, *_: object) -> None:
            self.now += 10.0

    clock = Clock()
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    outcome = _run(_config(home, 50, "study.timeout=15", "search.recipes=false"), clock)
    assert outcome.stopped_because == "timeout"
    assert (outcome.counts.paused, outcome.best_number) == (2, None)
    assert [row["state"] for row in _record(home)] == ["paused"] * 2
    again = _run(_config(home, 3, "search.recipes=false"))
    assert again.stopped_because == "trials"
    assert again.counts.paused == 0
    assert {row["state"] for row in _record(home)} == {"complete", "pruned"}


def test_a_study_too_small_for_a_promotion_still_completes_its_best(home: Path) -> None:
    outcome = _run(_config(home, 2, "search.recipes=false"))
    assert (outcome.counts.complete, outcome.counts.pruned) == (1, 1)
    rows = _record(home)
    first = [row["epochs"][0]["val_loss"] for row in rows]
    assert outcome.best_number == first.index(min(first))
    assert rows[outcome.best_number]["epochs_done"] == 6
    assert outcome.checkpoint is not None


def test_states_on_disk_are_bounded(home: Path) -> None:
    class Counts(QuietProgress):
        most = 0

        def trial_started(self, number: int, *_: object) -> None:
            folder = home / "runs" / "photos" / "paused"
            if folder.exists():
                Counts.most = max(Counts.most, len(list(folder.iterdir())))

    _run(_config(home, 12), Counts())
    assert 1 <= Counts.most <= 12 // 3 + 12 // 9


def test_an_equal_setting_is_not_paused_twice(home: Path) -> None:
    (home / "study.toml").write_text("[space]\nbase_lr = {choices = [1e-3, 1e-2, 2e-3]}\n")
    outcome = _run(_config(home, 9, "train.freeze_depth=5", "search.recipes=false"))
    rows = _record(home)
    trained = [row for row in rows if row["epochs_done"]]
    assert len(trained) == len({row["params"]["base_lr"] for row in trained}) == 3
    assert outcome.stopped_because == "space exhausted"
    assert outcome.counts.complete == 1


def test_a_state_of_a_deleted_study_is_not_taken_up(home: Path) -> None:
    config = _config(home, 2)
    file = pause_file(home / "runs" / "photos", 0)
    outcome = _run(config, _Stops(1))
    assert outcome.counts.paused == 1
    left = file.read_bytes()
    assert _run(config).stopped_because == "trials"
    other = _config(home, 2, **{"study.name": "other"})
    stale = pause_file(home / "runs" / "other", 0)
    stale.parent.mkdir(parents=True)
    stale.write_bytes(left)
    _run(other)
    assert _record(home, "other") == _record(home, "photos")
