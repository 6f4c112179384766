"""Every shipped study loads, and says what it is meant to."""

import tomllib
from pathlib import Path

import pytest

from core.config import TrainConfig
from core.training.no_effect import without_effect
from study.ablation.baseline import find_baseline
from study.ablation.run import make_plan
from study.config.load import load_config, parse_config
from study.config.study_config import StudyConfig
from study.config.toml import DEMO, config_text, read_file
from support import CLASSIC

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(set(CONFIGS.glob("*.toml")) - {CONFIGS / "default.toml"})


def test_the_default_study_is_what_init_writes_and_holds_the_defaults() -> None:
    path = CONFIGS / "default.toml"
    assert path.read_text(encoding="utf-8") == config_text(load_config(), with_help=True)
    assert load_config(path) == load_config() == StudyConfig()


def test_the_demo_loads_from_the_package() -> None:
    config = parse_config(read_file(DEMO), "the demo")
    assert (config.data.source, config.study.trials) == ("digits", None)


def test_the_books_recipe_is_kept() -> None:
    train = load_config(CONFIGS / "d2l-hotdog.toml").train
    assert train == TrainConfig(
        backbone="resnet18", weights="imagenet:IMAGENET1K_V1", image_size=224, head_init="xavier",
        epochs=5, batch_size=128, optimizer="sgd", momentum=0.0, base_lr=5e-5,
        loss_reduction="sum", head_lr_mult=10.0, weight_decay=1e-3, decay_all=True,
        schedule="constant", monitor="val_acc", crop_scale=0.08, batch_norm="train", amp="off",
        views=None,
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_depends_on_no_default_that_moves_and_has_three_seeds(path: Path) -> None:
    train = tomllib.loads(path.read_text(encoding="utf-8"))["train"]
    assert CLASSIC.keys() | {"epochs"} <= train.keys()
    config = load_config(path)
    assert StudyConfig.from_record(config.to_record()) == config
    assert config.train.views is None
    if not path.stem.startswith("ablation"):
        assert list(config.space) == ["seed"]
        assert config.study.trials == config.space["seed"].n_points == 3
        assert not config.search.has_recipes


def test_no_level_of_a_shipped_ablation_sets_what_has_no_effect() -> None:
    baseline = find_baseline(str(CONFIGS / "ablation-d2l-hotdog.toml"), "best", (), {})
    plan = make_plan(baseline)
    for cell, train in zip(plan.design.cells, plan.configs(), strict=True):
        assert not cell.overrides.keys() & without_effect(train)
        assert not train.is_solved
