import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrainConfig
from study.config.search_space import (
    Choices,
    ParamValue,
    Range,
    apply_params,
    distributions,
    fits,
    n_points,
    recipes,
)
from study.config.study_config import StudyConfig

SPACE = {
    "backbone": Choices(("resnet18", "resnet34")),
    "freeze_depth": Range(0, 5),
    "base_lr": Range(1e-4, 1e-2, log=True),
    "momentum": Range(0.0, 0.9, step=0.3),
    "clip_norm": Choices((None, 1.0)),
}


def test_optuna_draws_every_dimension_inside_its_bounds() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        params = study.ask(distributions(SPACE)).params
        assert list(params) == list(SPACE)
        assert fits(SPACE, params)
        assert not fits(SPACE, params | {"momentum": 0.95})
        assert not fits({"base_lr": SPACE["base_lr"]}, params)


def test_points_of_a_space_are_counted() -> None:
    depth, seed = Range(0, 5), Choices((0, 1))
    dimensions = [depth, Range(0, 5, step=2), Range(0.0, 0.9, step=0.3), seed, Range(0.1, 1.0)]
    assert [dimension.n_points for dimension in dimensions] == [6, 3, 4, 2, None]
    assert n_points({}) == 1
    assert n_points({"seed": seed, "freeze_depth": depth}) == 12
    assert n_points({"seed": seed, "base_lr": Range(0.1, 1.0)}) is None


@given(st.floats(-10, 10), st.floats(0.01, 3), st.integers(1, 20))
def test_the_nearest_value_is_one_of_the_range(value: float, step: float, n: int) -> None:
    dimension = Range(0.0, n * step, step=step)
    found = dimension.nearest(value)
    assert isinstance(found, float)
    assert dimension.nearest(found) == found
    assert all(
        abs(found - value) <= abs(k * step - value) + 1e-9 for k in range(dimension.n_points or 0)
    )


@pytest.mark.parametrize(
    ("dimension", "value", "found"),
    [
        *((Range(0, 5), value, found) for value, found in ((7, 5), (-1, 0), ("x", 0), (True, 0))),
        (Choices((None, 0.1, 1.0)), 0.4, 0.1),
        (Choices(("a", "b")), "b", "b"),
        (Choices(("a", "b")), "c", "a"),
        (Choices((2, 1)), True, 2),  # True == 1, but it is no batch size
    ],
)
def test_the_nearest_value(dimension: Range | Choices, value: ParamValue, found: object) -> None:
    assert dimension.nearest(value) == found


def test_the_default_space_has_every_recipe() -> None:
    config = StudyConfig()
    found = recipes(config.space, config.train)
    backbones = config.space["backbone"].ends
    assert len(found) == len(backbones) + 2
    probe = found[f"linear-probe {backbones[1]}"]
    assert probe == {
        "backbone": backbones[1],
        "freeze_depth": 5,
        "base_lr": 3e-4,
        "head_lr_mult": 1.0,
        "features": "several",
        "image_size": None,
        "mirrored": False,
        "weight_decay": config.train.weight_decay,
    }
    for params in found.values():
        assert all(config.space[name].nearest(value) == value for name, value in params.items())
        apply_params(TrainConfig(), params)


@pytest.mark.parametrize(
    ("space", "base_depth", "found"),
    [
        (
            {"base_lr": Range(5e-4, 9e-4), "freeze_depth": Range(0, 5)},  # rates are clipped
            0,
            {
                "linear-probe": {"base_lr": 5e-4, "freeze_depth": 5},
                "fine-tune-half": {"base_lr": 5e-4, "freeze_depth": 3},
                "fine-tune-all": {"base_lr": 5e-4, "freeze_depth": 0},
            },
        ),
        ({"freeze_depth": Range(1, 4)}, 0, {"fine-tune-half": {"freeze_depth": 3}}),
        ({"base_lr": Range(1e-3, 1e-1)}, 5, {"linear-probe": {"base_lr": 1e-3}}),
        ({"seed": Choices((0, 1))}, 5, {}),
    ],
)
def test_recipes_are_what_a_space_can_express(
    space: dict[str, Range | Choices], base_depth: int, found: dict[str, object]
) -> None:
    assert recipes(space, TrainConfig(freeze_depth=base_depth)) == found
