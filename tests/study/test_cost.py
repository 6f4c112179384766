import math

import pytest

from core.config import TrainConfig
from core.models.builder import stage_flops
from study.cost import CostModel

FLOPS = (10e9, 20e9, 30e9, 40e9, 50e9, 1e9)


def _model(**changes: object) -> CostModel:
    base = TrainConfig(backbone="a", epochs=4)
    flops = {"a": FLOPS, "b": tuple(2 * f for f in FLOPS)}
    settings = {"n_train": 100, "n_val": 10, "stage_flops": lambda name, *_: flops[name]}
    return CostModel(base, **{**settings, **changes})


def test_a_trial_costs_what_is_counted_by_hand() -> None:
    model = _model()
    # Level 3: the prefix of 60 GFLOPs once a picture and epoch, thrice the suffix of 91; for
    # validation the prefix once, the suffix every epoch. At 30 GFLOPs a second.
    work = 100 * 4 * (60 + 3 * 91) + 10 * (60 + 4 * 91)
    assert model.predict({"freeze_depth": 3}) == pytest.approx(0.5 + work / 30)
    # Nothing is kept where nothing is frozen, or nothing shared.
    work = 100 * 4 * 3 * 151 + 10 * 4 * 151
    assert model.predict({"freeze_depth": 0}) == pytest.approx(0.5 + work / 30)
    alone = _model(is_shared=False)
    work = 100 * 4 * (150 + 3) + 10 * 4 * 151
    assert alone.predict({"freeze_depth": 5}) == pytest.approx(0.5 + 4 * 100 * 5e-4 + work / 30)


def test_heads_may_share_where_deeper_trials_do_not() -> None:
    model = _model(is_shared=False, shares_heads=True)
    shared, alone = _model(), _model(is_shared=False)
    for depth in range(6):
        like = shared if depth == 5 else alone
        params = {"freeze_depth": depth}
        for done in (0, 4):
            assert model.predict(params, cached_epochs=done) == like.predict(
                params, cached_epochs=done
            )


def test_what_is_cached_is_not_paid_again() -> None:
    model = _model()
    params = {"freeze_depth": 5}
    costs = [model.predict(params, cached_epochs=done) for done in (0, 1, 4, 9)]
    assert costs[0] - costs[1] == pytest.approx((100 + 10) * 150 / 30)
    assert costs[1] - costs[2] == pytest.approx(3 * 100 * 150 / 30)
    assert costs[2] == costs[3]
    assert costs[0] / costs[2] > 30
    nothing = {"freeze_depth": 0}
    assert model.predict(nothing, cached_epochs=4) == model.predict(nothing)


def test_cost_falls_with_the_freeze_level_and_grows_with_epochs_and_backbone() -> None:
    model = _model()
    levels = [model.predict({"freeze_depth": depth}) for depth in range(6)]
    assert levels == sorted(levels, reverse=True)
    assert model.predict({}, epochs=2) < model.predict({}) < model.predict({"epochs": 5})
    assert model.predict({"backbone": "b"}) > 1.9 * model.predict({"backbone": "a"})


def test_small_views_in_the_first_epochs_cost_their_share() -> None:
    def stages(_: str, __: str, size: int | None) -> tuple[int, ...]:
        return tuple(f * (size or 64) ** 2 for f in (10_000,) * 5)

    base = TrainConfig(epochs=4, image_size=64, small_size=32, small_epochs=3)
    model = CostModel(base, 1000, 1, stages)
    full = {"small_size": None, "small_epochs": 0}
    start = model.predict(full, epochs=0)
    for depth in (0, 3):
        whole = model.predict({"freeze_depth": depth, **full}) - start
        small = model.predict({"freeze_depth": depth}) - start
        assert small / whole == pytest.approx((1 + 3 / 4) / 4, rel=0.01)
    assert model.shared_by({}) != model.shared_by(full)


def test_trials_share_frozen_outputs_only_where_all_agrees_that_decides_them() -> None:
    model = _model()
    own = model.shared_by({"freeze_depth": 3, "base_lr": 0.1})
    assert own == model.shared_by({"freeze_depth": 3, "base_lr": 0.2, "weight_decay": 0.5})
    for name, value in (("freeze_depth", 2), ("backbone", "b"), ("seed", 1), ("augment", "rand")):
        assert own != model.shared_by({"freeze_depth": 3, name: value})


def test_observed_seconds_correct_the_forecast_per_backbone() -> None:
    model = _model()
    counted = {name: model.predict({"backbone": name}) for name in "ab"}
    for depth in (0, 3, 5):
        params = {"backbone": "a", "freeze_depth": depth}
        model.observe(params, 4, 3 * _model().predict(params))
    assert model.predict({"backbone": "a"}) == pytest.approx(3 * counted["a"])
    assert model.predict({"backbone": "b"}) == pytest.approx(3 * counted["b"])  # as all so far
    model.observe({"backbone": "b"}, 4, counted["b"])
    assert model.predict({"backbone": "a"}) > 2.5 * counted["a"]
    assert model.predict({"backbone": "b"}) < 2 * counted["b"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_broken_clock_is_passed_over(seconds: float) -> None:
    model = _model()
    before = model.predict({})
    model.observe({}, 4, seconds)
    model.observe({}, 0, 1.0)
    assert model.predict({}) == before


def test_a_backbone_that_cannot_be_counted_has_a_cost_all_the_same() -> None:
    def refuse(*_: object) -> tuple[int, ...]:
        raise ValueError("no such backbone")

    assert 0 < _model(stage_flops=refuse).predict({}) < math.inf


def test_flops_of_a_real_backbone_go_with_its_input() -> None:
    small = stage_flops("squeezenet1_1", "none", 64)
    large = stage_flops("squeezenet1_1", "none", 128)
    assert len(small) == 6
    assert all(flops > 0 for flops in small)
    assert 3 < sum(large) / sum(small) < 6
