"""The plan: which trial comes next, from what is known and from the time that is left."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
from small_study import bare_trial

from core.config import TrainConfig
from study.config.search_space import DEFAULT_SPACE, Choices, Range, apply_params, parse_space
from study.record.models import COPY, Trial
from study.search.planner import SAMPLED, NetworkCost, Planner, Step

SIZES = parse_space(DEFAULT_SPACE)[0]
SPACE = {name: dim for name, dim in SIZES.items() if name != "image_size"}
LITE0, LITE1, LITE2 = SPACE["backbone"].ends
FROZEN = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
KEPT = (False, False, True, True, True, True)
PLAIN = TrainConfig()
# Two CPU cores.
COSTS = {
    (name,): NetworkCost(forward_s, FROZEN, KEPT, 2560)
    for name, forward_s in ((LITE2, 0.012), (LITE0, 0.006), (LITE1, 0.009))
}


def _planner(**changes: object) -> Planner:
    own = {"space": SPACE, "base": PLAIN, "costs": COSTS}
    return Planner(**own | changes, n_train=1600, n_val=400, n_classes=5)


def _row(
    step: Step, config: TrainConfig, score: float | None, number: int = 0, origin: str = "plan"
) -> Trial:
    """Return a trial that lasted as forecast; it was pruned where it has no score."""
    row = bare_trial(number, asdict(config), origin)
    row.params, row.duration_s, row.score = step.params, step.forecast_s, score
    row.state = "complete" if score is not None else "pruned"
    return row


def _play(
    planner: Planner, score: Callable[[TrainConfig], float | None], total_s: float | None = None
) -> tuple[list[Step], str]:
    """Run a plan to its end."""
    steps: list[Step] = []
    rows: list[Trial] = []
    left = total_s
    while isinstance(step := planner.next(rows, left, total_s), Step):
        steps.append(step)
        config = apply_params(PLAIN, step.params)
        origin = SAMPLED if step.is_sampled else "plan"
        rows.append(_row(step, config, score(config), number=len(rows), origin=origin))
        left = left and left - step.forecast_s
        assert len(rows) < 60
    return steps, step


def _courses(steps: list[Step]) -> list[tuple[object, object]]:
    return [(step.params["backbone"], step.params["freeze_depth"]) for step in steps]


def test_heads_come_first_and_little_else_where_thawing_does_not_gain() -> None:
    steps, why = _play(_planner(), lambda config: 0.7 if config.is_solved else 0.6)
    heads = [(LITE0, 5), (LITE1, 5), (LITE2, 5)]
    ends = [*heads, (LITE1, 5), (LITE2, 5)]  # mirrored, and on the last layer
    assert _courses(steps) == [*heads, (LITE0, 5), (LITE0, 4), (LITE0, 3), *ends]
    assert steps[3].params["features"] == "last"
    assert [step.params["mirrored"] for step in steps[-5:]] == [True] * 3 + [False] * 2
    assert why == "no gain"


def test_thawing_goes_down_while_it_gains_and_then_to_other_networks() -> None:
    by_level = {5: 0.7, 4: 0.71, 3: 0.73, 2: 0.69, 1: 0.9, 0: 0.9}
    steps, _ = _play(_planner(), lambda config: by_level[config.freeze_depth])
    thawed = [step for step in _courses(steps) if step[1] != 5]
    assert thawed[:5] == [(LITE0, 4), (LITE0, 3), (LITE0, 2), (LITE1, 3), (LITE2, 3)]
    assert thawed[5:] == [(LITE0, 3)] * 4  # the sampler's, until four in a row are no better
    assert all(step.is_sampled for step in steps[-4:])


@pytest.mark.parametrize("gain", [-0.01, 0.01])
def test_larger_images_are_tried_and_trained_on_where_their_head_scores_higher(
    gain: float,
) -> None:
    costs = {
        (*key, size): replace(cost, forward_s=cost.forward_s * factor)
        for key, cost in COSTS.items()
        for size, factor in ((None, 1), (320, 2))
    }
    is_large = {LITE0: gain, LITE1: -0.01, LITE2: -0.01}
    by_level = {5: 0.7, 4: 0.72, 3: 0.71, 2: 0.71, 1: 0.71, 0: 0.71}

    def score(config: TrainConfig) -> float:
        larger = is_large[config.backbone] if config.image_size else 0.0
        return by_level[config.freeze_depth] + larger

    steps, _ = _play(_planner(space=SIZES, costs=costs), score)
    sizes = [step.params["image_size"] for step in steps]
    assert sizes[:7] == [None] * 3 + ([320, 320, None, None] if gain > 0 else [320] + [None] * 3)
    large = [step.params for step in steps if step.params["image_size"] == 320]
    trained = [p["backbone"] for p in large if p["freeze_depth"] != 5]
    assert set(trained) == ({LITE0} if gain > 0 else set())
    assert not any(step.params["mirrored"] for step in steps)  # since thawing gains


@pytest.mark.parametrize(
    ("scores", "tried"),  # of levels 0 to 5
    [
        ((0.9, 0.75, 0.76, 0.73, 0.74, 0.7), [4, 3, 2, 1, 0]),  # one that is lower
        ((0.9, 0.75, 0.72, 0.73, 0.74, 0.7), [4, 3, 2]),  # two
        ((0.9, 0.8, 0.65, 0.6, 0.5, 0.7), [4, 3, 2, 1, 0]),  # below the head's, and rising
    ],
)
def test_thawing_ends_at_two_levels_in_a_row_that_score_lower(
    scores: tuple[float, ...], tried: list[int]
) -> None:
    steps, _ = _play(_planner(), lambda config: scores[config.freeze_depth])
    levels = [level for name, level in _courses(steps) if name == LITE0 and level != 5]
    assert levels[: len(tried)] == tried
    assert min(levels) == tried[-1]


def test_a_thawed_trial_that_was_stopped_is_tried_at_a_third_of_its_rate() -> None:
    def score(config: TrainConfig) -> float | None:
        return 0.7 if config.is_solved else None if config.base_lr > 4e-4 else 0.8

    steps, _ = _play(_planner(), score)
    rates = [step.params["base_lr"] for step in steps if step.params["freeze_depth"] == 4]
    assert rates[:2] == pytest.approx([1e-3, 1e-3 / 3])


@pytest.mark.parametrize("total_s", [1.0, 60.0, 300.0, 900.0, 7200.0])
def test_no_trial_but_the_first_head_takes_more_than_its_share_of_what_is_left(
    total_s: float,
) -> None:
    steps, why = _play(planner := _planner(), lambda config: 1 - config.freeze_depth / 10, total_s)
    assert steps, "the first head is solved however short the time is"
    left = total_s
    for number, step in enumerate(steps):
        share = 0.8 if step.params["freeze_depth"] == 5 else 0.6  # 1/4 unless nothing else fits
        assert number == 0 or step.forecast_s <= share * left
        left -= step.forecast_s
    # A large thawed trial comes before variants of the heads, which promise less.
    assert total_s != 900 or (LITE0, 0) in _courses(steps)
    assert why == "no time" or total_s > 300
    assert all(step.forecast_s > 0.6 * left for step in planner.left_out)


def test_what_promises_more_comes_before_refits_and_variants_do_not() -> None:
    def score(config: TrainConfig) -> float:
        return 1 - config.freeze_depth / 10

    steps, _ = _play(planner := _planner(costs={(LITE0,): COSTS[LITE0,]}), score)
    rows = [_row(s, c := apply_params(PLAIN, s.params), score(c)) for s in steps[:3]]
    assert _courses(steps)[2:4] == [(LITE0, 4), (LITE0, 3)]
    left = steps[3].forecast_s / 0.6 + 1
    found = planner.next(rows, left, 9_000, refits_s=0.3 * left)
    assert isinstance(found, Step) and found.params == steps[3].params
    variant = planner.next(rows, 0.9 * left, 9_000, refits_s=0.3 * left)
    assert isinstance(variant, Step) and variant.params["freeze_depth"] == 4  # it does not fit


def test_trials_that_take_longer_than_forecast_make_the_next_forecasts_longer() -> None:
    planner = _planner()
    first = planner.next([], None, None)
    assert isinstance(first, Step)
    row, found = _row(first, apply_params(PLAIN, first.params), 0.7), []
    for factor, run_id in ((1, 0), (3, 0), (3, 1), (0.01, 0)):
        row.duration_s, row.run_id = factor * first.forecast_s, run_id
        step = planner.next([row], None, None)
        assert isinstance(step, Step)
        found.append(step.forecast_s)
    assert found[1] == pytest.approx(3 * found[0])
    assert found[2] == found[0]  # an earlier run's pace says nothing about this one
    assert found[3] == pytest.approx(0.6 * found[0])  # it may have found its arrays


def test_trials_of_one_level_are_forecast_with_the_arrays_of_the_first() -> None:
    steps, _ = _play(_planner(), lambda c: 0.7 if c.is_solved else 0.8 + c.freeze_depth / 100)
    first, *_, drawn = (s for s in steps if _courses([s]) == [(LITE0, 4)])
    config, cost = apply_params(PLAIN, first.params), COSTS[LITE0,]
    both = [cost.seconds(config, 1600, 400, 5, has_arrays=kept) for kept in (False, True)]
    assert [first.forecast_s, drawn.forecast_s] == pytest.approx(both)


def test_a_gpu_reaches_full_fine_tuning_at_full_size() -> None:
    # Made up: an H100's forward pass of EfficientNet-Lite and ResNet-50 at two sizes.
    sizes, names = (224, 384), (LITE0, "resnet50")
    space = SPACE | {"backbone": Choices(names), "image_size": Choices(sizes)}
    costs = {
        (name, size): NetworkCost(s * (size / 224) ** 2, FROZEN, KEPT, 2560)
        for name, s in ((LITE0, 1.2e-4), ("resnet50", 3e-4))
        for size in sizes
    }
    steps = _planner(space=space, costs=costs).preview(900.0)
    keys = ("backbone", "image_size", "freeze_depth")
    assert ("resnet50", 384, 0) in [tuple(step.params[key] for key in keys) for step in steps]


def test_a_space_without_levels_or_networks_is_planned_too() -> None:
    own = {"space": {"base_lr": Range(3e-5, 3e-3, log=True)}, "costs": {(): COSTS[LITE0,]}}
    steps, _ = _play(_planner(**own, base=replace(PLAIN, freeze_depth=4)), lambda _: 0.8)
    assert [step.is_sampled for step in steps] == [False] + [True] * 4
    # No head to start from is proposed where the space has none, or trains it.
    space = {key: dim for key, dim in SPACE.items() if key != "freeze_depth"}
    steps, _ = _play(_planner(space=space, base=replace(PLAIN, freeze_depth=2)), lambda _: 0.8)
    assert all(step.params["features"] == "several" for step in steps)
    trained = _planner(base=replace(PLAIN, head_solver="sgd"))
    assert all(step.reason != "solved head to thaw from" for step in trained.preview(None))


def test_what_copies_another_trial_is_not_proposed_again() -> None:
    step = _planner().next([], None, None)
    assert isinstance(step, Step)
    copy = _row(step, apply_params(PLAIN, step.params), 0.7, origin=f"{COPY}3")
    following = _planner().next([copy], None, None)
    assert isinstance(following, Step) and following.params != step.params


def test_a_step_of_all_layers_takes_the_measured_passes_and_one_of_fewer_fewer() -> None:
    cost = replace(COSTS[LITE0,], step_passes=lambda: 5.5, kept=(False,) * 6)
    seconds = [cost.seconds(TrainConfig(freeze_depth=k, epochs=1), 1000, 0, 5) for k in (0, 2, 4)]
    # 6 ms a pass; at level 4 nine tenths are passed through, and 2.5 steps' worth of the rest.
    passes = [5.5, 0.5 + 0.5 * 4, 0.9 + 0.1 * 2.5]
    solver_s = 1.1e-7 * 1000 * 1280 * 5  # of the head that it starts from
    assert seconds == pytest.approx([1.1 + solver_s + 6 * n for n in passes])
