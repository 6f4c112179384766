import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrainConfig
from study.ablation.designs import Factorial
from study.ablation.factors import (
    Level,
    components,
    make_factors,
    parse_factors,
    propose_levels,
    recipe_levels,
)
from study.config.search_space import Choices, Range, apply_params

PLAIN = TrainConfig()
SPACE = {
    "freeze_depth": Range(0, 5),
    "base_lr": Range(1e-4, 1e-2, log=True),
    "head_lr_mult": Range(1.0, 100.0, log=True),
    "optimizer": Choices(("sgd", "adamw")),
    "mixup": Choices((0.0, 0.2)),
    "clip_norm": Choices((None, 1.0)),
    "seed": Range(0, 9),
}

# Values of every key that a rule between settings or a component knows; two of a kind at least.
_SOME: dict[str, list[Any]] = {
    "weights": ["none", "auto", "imagenet"],
    "freeze_depth": [0, 1, 3, 5],
    "head_lr_mult": [1.0, 10.0, 0.5],
    "momentum": [0.0, 0.9],
    "nesterov": [False, True],
    "optimizer": ["sgd", "adamw"],
    "schedule": ["constant", "cosine", "one-cycle"],
    "warmup_epochs": [0.0, 1.5, 3.0],
    "epochs": [3, 10],
    "augment": ["none", "standard", "trivial"],
    "mixup": [0.0, 0.2],
    "cutmix": [0.0, 1.0],
    "clip_norm": [None, 1.0],
    "ema_decay": [None, 0.99],
    "batch_norm": ["auto", "train", "frozen"],
    "base_lr": [1e-3, 1e-2, 0.00100049],
}


def _is_allowed(values: dict[str, Any]) -> bool:
    try:
        TrainConfig(**values)
    except ValueError:
        return False
    return True


BASELINES = st.fixed_dictionaries({key: st.sampled_from(v) for key, v in _SOME.items()})
BASELINES = BASELINES.filter(_is_allowed).map(lambda values: TrainConfig(**values))


def test_a_training_key_takes_values_and_a_name_of_ones_own_tables_of_keys() -> None:
    raw = tomllib.loads(
        'augment = "none"\nhead_lr_mult = [1, 100]\nclip_norm = ["none", 0.5]\n'
        '[recipe."frozen extractor"]\nfreeze_depth = 5\nhead_init = "zero"'
    )
    levels, faults = parse_factors(raw)
    assert faults == []
    assert levels == {
        "augment": [Level("none", {"augment": "none"})],
        "head_lr_mult": [Level(text, {"head_lr_mult": float(text)}) for text in ("1", "100")],
        "clip_norm": [Level("none", {"clip_norm": None}), Level("0.5", {"clip_norm": 0.5})],
        "recipe": [Level("frozen extractor", {"freeze_depth": 5, "head_init": "zero"})],
    }
    assert isinstance(levels["head_lr_mult"][0].overrides["head_lr_mult"], float)
    (*_, recipe), faults = make_factors(PLAIN, levels)
    assert (faults, recipe.baseline, recipe.overrides("baseline")) == ([], "baseline", {})
    assert recipe.overrides("frozen extractor") == levels["recipe"][0].overrides


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ({"augmnt": ["none"]}, ["no training key", "Did you mean augment?"]),
        ({"augment": ["nnoe"]}, ["augment='nnoe'", "Did you mean none?"]),
        ({"augment": []}, ["at least one level", "[]"]),
        ({"weight_decay": [0.1, 0.1]}, ["levels must differ", "0.1 twice"]),
        ({"recipe": {"plain": {"augmnt": "none"}}}, ["level plain: augmnt", "mean augment?"]),
        ({"recipe": {"plain": 3}}, ["level plain must be a table", "got 3"]),
        # With the baseline's mixup = 0.2 and warmup_epochs = 3
        ({"mixup": [0.2]}, ["a level other than the baseline's, but got 0.2 only"]),
        ({"short": {"two": {"epochs": 2}}}, ["level two: warmup_epochs must"]),
    ],
)
def test_a_wrong_level_is_reported_with_key_and_value(
    raw: dict[str, object], shown: list[str]
) -> None:
    levels, faults = parse_factors(raw)
    faults = faults or make_factors(TrainConfig(mixup=0.2, warmup_epochs=3.0), levels)[1]
    (fault,) = faults
    assert fault.key == f"factors.{next(iter(raw))}"
    assert all(part in fault.text for part in shown), fault.text


@pytest.mark.parametrize(
    ("base_lr", "raw"),
    [
        (0.0123456, {"base_lr": [0.0123, 0.1]}),
        (0.01, {"recipe": {"baseline": {"augment": "none"}, "other": {"freeze_depth": 5}}}),
    ],
)
def test_a_level_is_never_called_like_the_baselines_own(base_lr: float, raw: Any) -> None:
    baseline = TrainConfig(base_lr=base_lr)
    (factor,), faults = make_factors(baseline, parse_factors(raw)[0])
    assert faults == []
    assert factor.baseline not in [level.label for level in factor.levels]
    first, *others = [apply_params(baseline, cell.overrides) for cell in Factorial([factor]).cells]
    assert first == baseline and len({first, *others}) == 3


@given(BASELINES)
def test_proposed_levels_are_valid_and_never_the_baselines_own(baseline: TrainConfig) -> None:
    proposed = propose_levels(baseline, SPACE)
    factors, faults = make_factors(baseline, proposed)
    assert faults == []
    for factor in factors:
        own = getattr(baseline, factor.name)
        values = [level.overrides[factor.name] for level in factor.levels]
        assert values
        assert own not in values
        assert len(set(values)) == len(values)
        assert factor.levels == tuple(proposed[factor.name])
        assert factor.baseline not in [level.label for level in factor.levels]
    assert "seed" not in proposed


@given(BASELINES)
def test_components_are_what_the_baseline_has_and_can_do_without(baseline: TrainConfig) -> None:
    found = components(baseline)
    assert make_factors(baseline, found)[1] == []
    for key, (level,) in found.items():
        without = apply_params(baseline, level.overrides)
        assert without != baseline
        assert key in level.overrides
        assert key not in components(without)


def test_a_searched_setting_is_tried_at_its_recipe_default() -> None:
    baseline = TrainConfig(base_lr=0.0042, optimizer="sgd", clip_norm=1.0, freeze_depth=1)
    proposed = propose_levels(baseline, SPACE)
    values = {key: [lv.overrides[key] for lv in levels] for key, levels in proposed.items()}
    wanted = {"base_lr": [3e-4], "optimizer": ["adamw"], "clip_norm": [None]}
    wanted["freeze_depth"] = [0, 3, 5]
    assert values | wanted == values
    assert "mixup" not in values
    begin = recipe_levels(baseline, {"base_lr": Range(5e-3, 1e-1), "mixup": SPACE["mixup"]})
    assert begin == {"base_lr": [Level("0.005", {"base_lr": 5e-3})]}
