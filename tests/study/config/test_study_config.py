import json

import pytest

from core.config import DataConfig
from study.config.load import load_config
from study.config.study_config import StudyConfig, config_diff


def test_a_record_reads_back_to_the_same_configuration() -> None:
    space = ["space.ema_decay=['none',0.99]", "space.epochs={low=20, high=30}"]
    others = ["recipes=false", "study.time=2h", "ablation.factors={epochs=[1, 2]}"]
    config = load_config(overrides=[*space, *others, "cache=1GB"])
    record = json.loads(json.dumps(config.to_record()))
    assert StudyConfig.from_record(record) == config
    assert "base_lr" not in record["train"]


def test_the_difference_names_keys_and_leaves_free_ones_out() -> None:
    old = load_config()
    new = load_config(overrides=["epochs=3", "base_lr=0.1", "trials=50", "workers=2"])
    assert config_diff(old, new) == [
        "train.epochs: 8 -> 3",
        "train.base_lr: searched in 3e-05 to 0.003, log -> 0.1",
    ]
    assert config_diff(old, old) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("folder:/data/Hot Dogs/", "Hot-Dogs"),
        ("torchvision:CIFAR10", "CIFAR10"),
        ("folder:/", "study"),
    ],
)
def test_a_study_is_named_after_its_data(source: str, name: str) -> None:
    assert StudyConfig(data=DataConfig(source=source)).study.name == name
