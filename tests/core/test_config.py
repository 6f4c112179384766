import pytest
from pydantic import ValidationError

from core.config import DataConfig, TrainConfig


@pytest.mark.parametrize("epochs", [0, 2.0])
def test_train_config_refuses(epochs: float) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig(epochs=epochs)  # type: ignore[arg-type]
    assert [error["loc"] for error in caught.value.errors()] == [("epochs",)]


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


def test_a_path_is_a_folder_of_images() -> None:
    assert DataConfig(source="photos/ants/").source == "folder:photos/ants"
