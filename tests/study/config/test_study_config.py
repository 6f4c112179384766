from core.config import DataConfig
from study.config.load import load_config
from study.config.study_config import StudyConfig, config_diff


def test_the_difference_names_keys_and_leaves_free_ones_out() -> None:
    old = load_config()
    new = load_config(overrides=["epochs=3", "base_lr=0.1", "trials=50", "workers=2"])
    assert config_diff(old, new) == [
        "train.epochs: 8 -> 3",
        "train.base_lr: searched in 3e-05 to 0.003, log -> 0.1",
    ]
    assert config_diff(old, old) == []


def test_a_study_is_named_after_its_data() -> None:
    names = {"digits": "digits", "torchvision:CIFAR10": "CIFAR10", "folder:/": "study"}
    names["folder:/data/Hot Dogs/"] = "Hot-Dogs"
    configs = {source: StudyConfig(data=DataConfig(source=source)) for source in names}
    assert {source: config.study.name for source, config in configs.items()} == names
