import dataclasses

import pytest
from pydantic import ValidationError

from core.config import DataConfig, TrainConfig, fields_of


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.0}, "epochs"),
        ({"base_lr": float("nan")}, "base_lr"),
        ({"optimizer": "lion"}, "optimizer"),
    ],
)
def test_train_config_refuses(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig(**settings)  # type: ignore[arg-type]
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


def test_train_config_reports_every_broken_rule_with_its_keys() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig(mixup=0.1, cutmix=0.1, epochs=2, warmup_epochs=3, momentum=0.0, nesterov=True)
    rules = dict(caught.value.errors()[0]["ctx"]["rules"])
    assert set(rules) == {
        ("mixup", "cutmix"),
        ("warmup_epochs", "epochs"),
        ("nesterov", "optimizer", "momentum"),
    }
    assert rules["warmup_epochs", "epochs"].endswith("but got warmup_epochs=3.0 and epochs=2.")


def test_the_text_none_leaves_a_key_out() -> None:
    assert TrainConfig(clip_norm="none").clip_norm is None  # type: ignore[arg-type]


def test_neutral_settings_are_settings() -> None:
    for key, field in fields_of(TrainConfig).items():
        if isinstance(marked := field.json_schema_extra, dict):
            settings = {key: marked["neutral"], **marked.get("neutral_with", {})}  # type: ignore
            assert dataclasses.replace(TrainConfig(), **settings)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("photos/ants/", "folder:photos/ants"),
        ("folder:photos", "folder:photos"),
        ("digits", "digits"),
        ("torchvision:CIFAR10", "torchvision:CIFAR10"),
    ],
)
def test_a_path_is_a_folder_of_images(source: str, found: str) -> None:
    assert DataConfig(source=source).source == found


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValidationError, match="must name a folder of images"):
        DataConfig(source="folder: ")
