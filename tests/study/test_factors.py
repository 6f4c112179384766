import dataclasses
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrainConfig, fields_of
from study.config.errors import ConfigError
from study.config.load import load_config, parse_config
from study.config.search_space import Choices, Range, apply_params
from study.config.study_config import AblationSection
from study.designs import make_design
from study.factors import (
    Level,
    against,
    as_record,
    components,
    from_record,
    parse_factors,
    propose,
    read_flags,
    recipe_default,
)

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
    "head_init": ["default", "xavier", "zero"],
    "head_lr_mult": [1.0, 10.0, 0.5],
    "weight_decay": [0.0, 1e-4],
    "momentum": [0.0, 0.9],
    "nesterov": [False, True],
    "optimizer": ["sgd", "adamw"],
    "schedule": ["constant", "cosine", "one-cycle"],
    "warmup_epochs": [0.0, 1.5, 3.0],
    "epochs": [3, 10],
    "augment": ["none", "standard", "trivial"],
    "normalize": ["weights", "none"],
    "label_smoothing": [0.0, 0.1],
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


def _faults(raw: dict[str, object]) -> list[str]:
    return [f"{fault.key}: {fault.text}" for fault in parse_factors(raw)[1]]


def test_a_training_key_takes_one_value_or_a_list() -> None:
    raw = tomllib.loads('augment = "none"\nhead_lr_mult = [1, 100]\nclip_norm = ["none", 0.5]')
    levels, faults = parse_factors(raw)
    assert faults == []
    assert levels == {
        "augment": [Level("none", {"augment": "none"})],
        "head_lr_mult": [
            Level("1", {"head_lr_mult": 1.0}),
            Level("100", {"head_lr_mult": 100.0}),
        ],
        "clip_norm": [Level("none", {"clip_norm": None}), Level("0.5", {"clip_norm": 0.5})],
    }
    assert isinstance(levels["head_lr_mult"][0].overrides["head_lr_mult"], float)


def test_a_name_of_ones_own_takes_tables_of_training_keys() -> None:
    raw = tomllib.loads(
        '[recipe."frozen extractor"]\nfreeze_depth = 5\nhead_init = "zero"\n'
        "[recipe.plain]\naugment = 'none'"
    )
    levels, faults = parse_factors(raw)
    assert faults == []
    assert levels["recipe"] == [
        Level("frozen extractor", {"freeze_depth": 5, "head_init": "zero"}),
        Level("plain", {"augment": "none"}),
    ]
    (factor,), faults = against(PLAIN, levels)
    assert faults == []
    assert factor.baseline == "baseline"
    assert factor.overrides("plain") == {"augment": "none"}
    assert factor.overrides("baseline") == {}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (
            {"augmnt": ["none"]},
            "factors.augmnt: is no training key, so its levels must be tables of training keys. "
            "Did you mean augment?",
        ),
        (
            {"head_lr_mult": ["a"]},
            "factors.head_lr_mult: must be a valid number, but got head_lr_mult='a'.",
        ),
        (
            {"freeze_depth": [True]},
            "factors.freeze_depth: must be a valid integer, but got freeze_depth=True.",
        ),
        (
            {"freeze_depth": [9]},
            "factors.freeze_depth: must be less than or equal to 5, but got freeze_depth=9.",
        ),
        (
            {"augment": ["nnoe"]},
            "factors.augment: must be 'none', 'standard', 'trivial' or 'rand', but got "
            "augment='nnoe'. Did you mean none?",
        ),
        ({"augment": []}, "factors.augment: must have at least one level, but got []."),
        (
            {"weight_decay": [0.1, 0.1]},
            "factors.weight_decay: levels must differ, but got 0.1 twice.",
        ),
        (
            {"recipe": {"plain": {"augmnt": "none"}}},
            "factors.recipe: level plain: augmnt is no training key. Did you mean augment?",
        ),
        (
            {"recipe": {"deep": {"freeze_depth": 7}}},
            "factors.recipe: level deep: must be less than or equal to 5, but got freeze_depth=7.",
        ),
        (
            {"recipe": {"plain": 3}},
            "factors.recipe: level plain must be a table of training keys, but got 3.",
        ),
        (
            {"recipe": {"plain": {}}},
            "factors.recipe: level plain must be a table of training keys, but got {}.",
        ),
        ({"recipe": {}}, "factors.recipe: must have at least one level, but got none."),
    ],
)
def test_a_wrong_level_is_told_with_key_rule_and_value(raw: dict[str, object], told: str) -> None:
    assert told in _faults(raw)


def test_all_wrong_factors_of_a_file_are_told_together(tmp_path: Any) -> None:
    path = tmp_path / "study.toml"
    path.write_text("[ablation.factors]\naugmnt = 'none'\nfreeze_depth = [1, 9]\nmixup = []\n")
    with pytest.raises(ConfigError) as told:
        load_config(path)
    assert len(told.value.faults) == 3
    for fault, key in zip(told.value.faults, ("augmnt", "freeze_depth", "mixup"), strict=True):
        assert fault.startswith(f"{path}: ablation.factors.{key}: ")


def test_flags_are_read_as_toml_or_as_texts() -> None:
    texts = ["head_lr_mult=1,1e2", "augment=none, trivial", "clip_norm=[none,2]", "nesterov=true"]
    found, faults = read_flags(texts)
    assert faults == []
    assert found == {
        "head_lr_mult": [1, 100.0],
        "augment": ["none", "trivial"],
        "clip_norm": ["none", 2],
        "nesterov": [True],
    }
    levels, wrong = parse_factors(found)
    assert wrong == []
    assert [level.overrides for level in levels["clip_norm"]] == [
        {"clip_norm": None},
        {"clip_norm": 2.0},
    ]


@pytest.mark.parametrize("text", ["augment", "=none", "augment=", "augment= "])
def test_a_flag_without_key_or_value_is_told_with_an_example(text: str) -> None:
    found, faults = read_flags([text, "freeze_depth=1"])
    assert found == {"freeze_depth": [1]}
    assert faults == [
        f"--factor: must be KEY=VALUE or KEY=VALUE,VALUE, but got {text!r}; say, "
        "--factor head_lr_mult=1,100."
    ]


def test_the_baselines_own_level_is_dropped() -> None:
    levels = parse_factors({"freeze_depth": [0, 3, 5], "augment": ["standard", "none"]})[0]
    factors, faults = against(PLAIN, levels)
    assert faults == []
    told = [(f.name, f.baseline, [level.label for level in f.levels]) for f in factors]
    assert told == [("freeze_depth", "0", ["3", "5"]), ("augment", "standard", ["none"])]


def test_a_factor_with_the_baselines_level_alone_is_told() -> None:
    levels = parse_factors({"augment": "standard", "freeze_depth": 5})[0]
    factors, faults = against(PLAIN, levels)
    assert [factor.name for factor in factors] == ["freeze_depth"]
    assert [(fault.key, fault.text) for fault in faults] == [
        (
            "factors.augment",
            "must have a level other than the baseline's, but got standard only.",
        )
    ]


@pytest.mark.parametrize(
    ("baseline", "raw", "told"),
    [
        (
            {"mixup": 0.2},
            {"cutmix": [1.0]},
            "level 1: mixup and cutmix must not both be on, but got mixup=0.2 and cutmix=1.0.",
        ),
        (
            {"nesterov": True},
            {"momentum": [0.5, 0.0]},
            "level 0: nesterov needs optimizer = sgd with momentum > 0, but got "
            "nesterov=True and optimizer='sgd' and momentum=0.0.",
        ),
        (
            {"warmup_epochs": 3.0},
            {"short": {"two epochs": {"epochs": 2}}},
            "level two epochs: warmup_epochs must be <= epochs, but got warmup_epochs=3.0 and "
            "epochs=2.",
        ),
    ],
)
def test_a_level_that_breaks_a_rule_with_the_baseline_is_told(
    baseline: dict[str, Any], raw: dict[str, object], told: str
) -> None:
    _, faults = against(TrainConfig(**baseline), parse_factors(raw)[0])
    assert [(fault.key, fault.text) for fault in faults] == [(f"factors.{next(iter(raw))}", told)]


@pytest.mark.parametrize(
    ("baseline", "raw"),
    [
        (TrainConfig(base_lr=0.0123456), {"base_lr": [0.0123, 0.1]}),
        (PLAIN, {"recipe": {"baseline": {"augment": "none"}, "other": {"freeze_depth": 5}}}),
    ],
)
def test_a_level_is_never_called_like_the_baselines_own(
    baseline: TrainConfig, raw: dict[str, object]
) -> None:
    (factor,), faults = against(baseline, parse_factors(raw)[0])
    assert faults == []
    assert factor.baseline not in [level.label for level in factor.levels]
    design = make_design([factor], AblationSection(design="factorial"))
    settings = [apply_params(baseline, cell.overrides) for cell in design.cells]
    assert len(set(settings)) == 3
    assert settings[0] == baseline


@given(BASELINES)
def test_proposed_levels_are_valid_and_never_the_baselines_own(baseline: TrainConfig) -> None:
    proposed = propose(baseline, SPACE)
    factors, faults = against(baseline, proposed)
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
    for key, (level,) in found.items():
        without = apply_params(baseline, level.overrides)
        assert without != baseline
        assert key in level.overrides
        again = components(without)
        assert key not in again
    _, faults = against(baseline, found)
    assert faults == []


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (
            PLAIN,
            {
                "weights": "none",
                "head_lr_mult": "1",
                "weight_decay": "0",
                "momentum": "0",
                "schedule": "constant",
                "augment": "none",
                "normalize": "none",
                "batch_norm": "train",
            },
        ),
        (
            # Nothing is left to take out, but the settings without which there is no training.
            TrainConfig(
                weights="none",
                head_lr_mult=1.0,
                weight_decay=0.0,
                momentum=0.0,
                schedule="constant",
                augment="none",
                normalize="none",
            ),
            {},
        ),
        (
            TrainConfig(weights="none", freeze_depth=5, nesterov=True, clip_norm=1.0),
            {
                "freeze_depth": "0",
                "weight_decay": "0",
                "momentum": "0",
                "schedule": "constant",
                "augment": "none",
                "normalize": "none",
                "clip_norm": "none",
            },
        ),
    ],
)
def test_the_components_of_known_baselines(
    baseline: TrainConfig, expected: dict[str, str]
) -> None:
    assert {key: level.label for key, (level,) in components(baseline).items()} == expected


def test_taking_momentum_out_takes_nesterovs_form_with_it() -> None:
    (level,) = components(TrainConfig(nesterov=True))["momentum"]
    without = apply_params(TrainConfig(nesterov=True), level.overrides)
    assert (without.momentum, without.nesterov) == (0.0, False)


def test_a_searched_setting_is_tried_at_its_recipe_default() -> None:
    baseline = TrainConfig(base_lr=0.0042, optimizer="adamw", clip_norm=1.0, freeze_depth=1)
    proposed = propose(baseline, SPACE)
    values = {key: [lv.overrides[key] for lv in levels] for key, levels in proposed.items()}
    assert values["base_lr"] == [1e-3]
    assert values["optimizer"] == ["sgd"]
    assert values["clip_norm"] == [None]
    assert values["freeze_depth"] == [0, 3, 5]
    assert "mixup" not in values
    assert recipe_default("base_lr", {"base_lr": Range(1e-2, 1e-1)}) == 1e-2


def test_the_heads_rate_is_not_varied_where_the_head_alone_is_trained() -> None:
    frozen = TrainConfig(freeze_depth=5, head_lr_mult=30.0)
    assert "head_lr_mult" not in propose(frozen, SPACE)
    assert "head_lr_mult" not in components(frozen)
    assert "head_lr_mult" in propose(dataclasses.replace(frozen, freeze_depth=4), SPACE)


def test_a_factor_survives_its_record() -> None:
    levels = parse_factors({"clip_norm": ["none", 0.5], "r": {"x": {"augment": "none"}}})[0]
    factors, faults = against(TrainConfig(clip_norm=1.0), levels)
    assert faults == []
    assert [from_record(as_record(factor)) for factor in factors] == factors


def test_every_component_is_a_training_key_with_a_valid_neutral_setting() -> None:
    from study.factors import NEUTRAL

    for key, settings in NEUTRAL.items():
        assert key in settings
        assert set(settings) <= set(fields_of(TrainConfig))
        assert apply_params(PLAIN, settings) is not None


def test_set_gives_factors_too() -> None:
    config = parse_config({}, "x", ['ablation.factors.augment=["none"]'])
    assert config.ablation.factors == {"augment": ["none"]}
