import multiprocessing
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from study.ledger import Ledger
from study.samplers import make_pruner, make_sampler
from study.store import Store

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {
    "base_lr": FloatDistribution(1e-4, 1e-1, log=True),
    "backbone": CategoricalDistribution(("a", "b")),
}


def _ledger(
    path: Path,
    pruner: str = "none",
    write_after_s: float = 60.0,
    paused: dict[int, int] | None = None,
) -> Ledger:
    rule = make_pruner(pruner, 5)
    return Ledger(str(path), "photos", rule, write_after_s=write_after_s, paused=paused)


def _one(ledger: Ledger, value: float = 0.5, steps: int = 3) -> dict[str, object]:
    sampler = make_sampler("tpe", 0, ledger.next_number(), SPACE)
    trial = ledger.ask(sampler, SPACE)
    for step in range(1, steps + 1):
        ledger.report(trial, value * step / steps, step)
    ledger.tell(trial, TrialState.COMPLETE, value)
    return dict(trial.params)


@pytest.mark.parametrize("write_after", [0.0, 60.0])
def test_plain_optuna_reads_what_was_told(tmp_path: Path, write_after: float) -> None:
    ledger = _ledger(tmp_path / "s.db", write_after_s=write_after)
    params = [_one(ledger, value) for value in (0.2, 0.8, 0.4)]
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
    assert [trial.params for trial in study.trials] == params
    assert study.best_trial.number == 1
    assert study.best_value == 0.8
    assert study.direction.name == "MAXIMIZE"
    assert study.trials[2].intermediate_values == pytest.approx({1: 0.4 / 3, 2: 0.8 / 3, 3: 0.4})
    assert all(trial.state is TrialState.COMPLETE for trial in study.trials)
    assert all(trial.duration is not None for trial in study.trials)


def test_a_running_trial_can_be_seen_from_outside(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "s.db", write_after_s=0.0)
    trial = ledger.ask(make_sampler("random", 0, 0, SPACE), SPACE)
    ledger.report(trial, 0.3, 1)
    (seen,) = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db").trials
    assert seen.state is TrialState.RUNNING
    assert seen.intermediate_values == {1: 0.3}
    assert seen.params == trial.params


def test_a_reopened_ledger_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    whole = _ledger(tmp_path / "whole.db")
    expected = [_one(whole, 0.1 * k) for k in range(12)]
    cut = tmp_path / "cut.db"
    first = _ledger(cut)
    got = [_one(first, 0.1 * k) for k in range(5)]
    second = _ledger(cut)
    assert second.next_number() == 5
    got += [_one(second, 0.1 * k) for k in range(5, 12)]
    assert got == expected


def test_queued_settings_come_first_and_survive_a_stop(tmp_path: Path) -> None:
    first = _ledger(tmp_path / "s.db")
    wanted = [{"base_lr": 0.01, "backbone": "b"}, {"base_lr": 0.02, "backbone": "a"}]
    for params in wanted:
        first.enqueue(params, {"origin": "recipe:x"})
    assert _one(first) == wanted[0]
    second = _ledger(tmp_path / "s.db")
    assert second.next_number() == 1
    assert _one(second) == wanted[1]
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
    assert [t.user_attrs["origin"] for t in study.trials] == ["recipe:x", "recipe:x"]
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2


def test_a_setting_can_be_put_at_the_head_of_the_line(tmp_path: Path) -> None:
    first = _ledger(tmp_path / "s.db")
    recipes = [{"base_lr": 0.01, "backbone": "b"}, {"base_lr": 0.02, "backbone": "a"}]
    for params in recipes:
        first.enqueue(params, {"origin": "recipe", "reruns": 0})
    urgent = {"base_lr": 0.05, "backbone": "b"}
    first.enqueue_first(urgent, {"origin": "retry", "reruns": 1})
    second = _ledger(tmp_path / "s.db")
    assert [_one(second) for _ in range(3)] == [urgent, *recipes]
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
    assert [t.user_attrs["origin"] for t in study.trials] == ["retry", "recipe", "recipe"]
    assert [t.user_attrs["reruns"] for t in study.trials] == [1, 0, 0]


def test_pruned_trials_keep_their_last_report(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "s.db", "median")
    for _ in range(6):
        _one(ledger, 0.9, 5)
    trial = ledger.ask(make_sampler("random", 0, 6, SPACE), SPACE)
    stops = [ledger.report(trial, 0.01, step) for step in range(1, 4)]
    assert stops[-1]
    ledger.tell(trial, TrialState.PRUNED)
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
    assert study.trials[6].state is TrialState.PRUNED
    assert study.trials[6].value == 0.01


def test_trials_left_running_are_failed(tmp_path: Path) -> None:
    first = _ledger(tmp_path / "s.db", write_after_s=0.0)
    trial = first.ask(make_sampler("random", 0, 0, SPACE), SPACE)
    first.report(trial, 0.3, 1)
    second = _ledger(tmp_path / "s.db")
    (left,) = second.fail_open()
    assert left.params == trial.params
    third = _ledger(tmp_path / "s.db")
    assert third.trials(TrialState.RUNNING) == []
    assert [t.state for t in third.trials()] == [TrialState.FAIL]


@pytest.mark.parametrize("name", ["qmc", "cmaes"])
def test_samplers_that_keep_their_place_go_on_after_a_stop(tmp_path: Path, name: str) -> None:
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}

    def draw(ledger: Ledger, n: int) -> list[dict[str, object]]:
        drawn = []
        for _ in range(n):
            trial = ledger.ask(make_sampler(name, 0, ledger.next_number(), space), space)
            ledger.tell(trial, TrialState.COMPLETE, trial.params["x"])
            drawn.append(dict(trial.params))
        return drawn

    expected = draw(_ledger(tmp_path / "whole.db"), 12)
    got = draw(_ledger(tmp_path / "cut.db"), 5) + draw(_ledger(tmp_path / "cut.db"), 7)
    assert len({str(params) for params in got}) == 12
    if name == "qmc":
        assert got == expected


def _open_both(path: str) -> None:
    Store.open(path, create=True).close()
    Ledger(path, "photos", make_pruner("none", 1))


def test_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    path = str(tmp_path / "s.db")
    workers = [context.Process(target=_open_both, args=(path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4


def _begin(ledger: Ledger, values: list[float]) -> optuna.trial.Trial:
    trial = ledger.ask(make_sampler("random", 0, ledger.next_number(), SPACE), SPACE)
    for step, value in enumerate(values, start=1):
        ledger.report(trial, value, step)
    return trial


def test_several_trials_may_be_open_and_keep_their_numbers(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "s.db")
    trials = [_begin(ledger, [0.1 * k]) for k in range(4)]
    ledger.tell(trials[2], TrialState.COMPLETE, 0.2)
    ledger.pause(trials[1])
    ledger.enqueue({"base_lr": 0.01, "backbone": "b"}, {})
    for k in (3, 0):
        ledger.tell(trials[k], TrialState.PRUNED)
    ledger.tell(ledger.go_on(1), TrialState.PRUNED)
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
    assert [t.params for t in study.trials[:4]] == [trial.params for trial in trials]
    assert [t.intermediate_values for t in study.trials[:4]] == [{1: 0.1 * k} for k in range(4)]
    assert [t.state.name[0] for t in study.trials] == ["P", "P", "C", "P", "W"]


def test_trials_that_end_together_are_written_together_those_in_line_too(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "s.db", write_after_s=0.0)
    ledger.enqueue({"base_lr": 0.01, "backbone": "b"}, {"origin": "recipe"})
    with ledger.together():
        trials = [_begin(ledger, [0.1 * k]) for k in range(3)]
        for k, trial in enumerate(trials):
            ledger.tell(trial, TrialState.COMPLETE, 0.1 * k)
        seen = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
        assert [t.state for t in seen.trials] == [TrialState.RUNNING]
    study = optuna.load_study(study_name="photos", storage=f"sqlite:///{tmp_path}/s.db")
    assert [t.params for t in study.trials] == [trial.params for trial in trials]
    assert [t.intermediate_values for t in study.trials] == [{1: 0.1 * k} for k in range(3)]
    assert all(t.state is TrialState.COMPLETE for t in study.trials)
