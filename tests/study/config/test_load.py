from pathlib import Path

import pytest
import timm
import torch

from study.config.backbones import MODERN
from study.config.errors import ConfigError
from study.config.load import check_inputs, load_config, parse_config
from study.config.search_space import Choices, Range
from study.config.toml import config_text


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(text: str, folder: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    file = str(folder / "study.toml")
    return tuple(fault.replace(file, "FILE") for fault in caught.value.faults)


def test_load_reads_keys_of_every_section(tmp_path: Path) -> None:
    text = """
        [study]
        time = "1h30m"
        cache = "1.5GB"
        [data]
        source = "images/ants"
        [train]
        epochs = 3
        clip_norm = "none"
        [search]
        recipes = false
        [space]
        base_lr = {low = 1e-4, high = 1, log = true}
        ema_decay = ["none", 0.99]
        momentum = 0.8
    """
    config = load_config(write(tmp_path, text))
    assert (config.study.time, config.study.cache) == (5400, 1_500_000_000)
    assert config.data.source == "folder:images/ants"
    assert (config.train.epochs, config.train.momentum, config.train.clip_norm) == (3, 0.8, None)
    assert not config.search.has_recipes
    space = {"base_lr": Range(1e-4, 1.0, log=True), "ema_decay": Choices((None, 0.99))}
    assert config.space == space


def test_load_reports_all_faults_at_once_with_origin_and_key(tmp_path: Path) -> None:
    text = """
        [study]
        trials = 0
        cache = "8 elephants"
        [data]
        val_fraction = "much"
        source = "folder: "
        [train]
        epoch = 3
        optimizer = "sdg"
        weight_decay = nan
        [search]
        sampler = "tpo"
        recipes = ["all"]
        [space]
        freeze_dept = [1, 2]
        epoch = [1, 2]
    """
    malformed, *faults = faults_of(text, tmp_path, "epochs", "alpha=2")
    keys = """
        study.trials study.cache data.val_fraction data.source train.epoch train.optimizer
        train.weight_decay search.sampler search.recipes space.freeze_dept space.epoch
    """
    expected = [*(f"FILE: {key}" for key in keys.split()), "--set: ablation.alpha"]
    assert malformed.startswith("--set: must be section.key=value, but got 'epochs'; for example")
    assert sorted(": ".join(fault.split(": ")[:2]) for fault in faults) == sorted(expected)
    found = "\n".join(faults)
    assert "FILE: train.epoch: is no known key. Did you mean epochs?\n" in found
    assert "but got sampler='tpo'. Did you mean tpe?" in found
    assert "Did you mean freeze_depth?" in found
    assert "FILE: data.source: must name a folder of images, but got source=" in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base_lr = {low = 0.1, high = 0.1}", "low must be < high"),
        ("base_lr = {low = 0.0, high = 0.1}", "must be greater than 0, but got low=0.0"),
        ("weight_decay = {low = 0.0, high = 0.1, log = true}", "low must be > 0 where log = true"),
        ("base_lr = {low = 0.1}", "high must be given"),
        ("base_lr = {low = 0.1, high = 1.0, setp = 1}", "setp is no known key. Did you mean step"),
        ("base_lr = {low = 0.1, high = 1.0, step = 2.0}", "step must be <= high - low"),
        ("epochs = {low = 1, high = 9, step = 0.5}", "step must be a whole number"),
        ("epochs = {low = 1, high = 9, step = 2, log = true}", "log = true and step"),
        ("epochs = {low = 1.5, high = 9}", "must be a valid integer, but got low=1.5"),
        ("freeze_depth = {low = 0, high = 6}", "must be less than or equal to 5, but got high=6"),
        ("backbone = {low = 0, high = 1}", "is no number, so it takes choices"),
        ("backbone = {choices = []}", "at least 1 item"),
        ('backbone = ["resnet18", "resnet18"]', "choices must differ"),
        ('backbone = {choices = ["resnet18", "vgg11"], low = 1}', "low is no known key"),
        ("augment = ['none', 'strong']", "must be 'none', 'standard', 'trivial' or 'rand'"),
        ("monitor = ['val_loss', 'val_acc']", "set train.monitor"),
    ],
)
def test_load_refuses_a_wrong_dimension(line: str, message: str, tmp_path: Path) -> None:
    (fault,) = faults_of(f"[space]\n{line}", tmp_path)
    assert fault.startswith(f"FILE: space.{line.split(' ')[0]}: ")
    assert message in fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[study]\nname = '../x'", "study.name: must begin and end with a letter or digit"),
        ("[study]\ntime = '2 hours'", 'study.time: must be a text like "2h"'),
        ("[search]\nsampler = 'grid'", "search.sampler: grid visits every setting"),
        ("[space]\nmixup = [0.0, 0.2]\ncutmix = [0.0, 1.0]", "mixup=0.2 with cutmix=1.0"),
        ("[space]\nepochs = {low = 1, high = 9}\n[train]\nwarmup_epochs = 2", "space.epochs: may"),
        ("[train]\nbase_lr = 1\n[space]\nbase_lr = [2, 3]", "space.base_lr: is given a value by"),
        ("[data]\nepochs = 3", "data.epochs: is in the wrong section or in none; say train.e"),
        ("[train]\nlr = 0.1", "train.lr: is no known key. Did you mean base_lr?"),
        ("[sarch]\nsampler = 'tpe'", "sarch: is no section or key. Did you mean search?"),
        ("train = 3", "train: must be a table, [train], but got 3."),
        ("[train\nepochs = 3", "must be TOML, but expected ']'"),
        ("[ablation.factors]\nepoch = [1]", "ablation.factors.epoch: is no training key"),
    ],
)
def test_load_refuses_broken_rules_and_misplaced_keys(
    text: str, message: str, tmp_path: Path
) -> None:
    (fault,) = faults_of(text, tmp_path)
    assert fault.startswith(("FILE: ", "study.toml"))
    assert message in fault


def test_an_override_changes_fixes_or_empties_dimensions() -> None:
    overrides = ["space.base_lr.high=0.1", "freeze_depth=3", "space.seed=[1,2]"]
    config = load_config(overrides=overrides)
    assert config.space["base_lr"] == Range(3e-5, 0.1, log=True)
    assert config.space["seed"] == Choices((1, 2))
    assert "freeze_depth" not in config.space
    assert config.train.freeze_depth == 3
    assert load_config(overrides=["space={}"]).space == {}
    # A searched key's base value lies in its dimension, and its default contradicts none.
    config = load_config(overrides=["space={epochs={low=20,high=30}}", "train.warmup_epochs=15"])
    assert config.train.epochs == 20
    assert load_config(overrides=["space.seed=[0,1]", "train.seed=0"]).space["seed"].n_points == 2


def test_a_sampler_or_pruner_given_later_than_the_plan_makes_a_classic_search(
    tmp_path: Path,
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(config_text(load_config(), with_help=True))  # as `study init` writes it
    assert load_config(path).search.strategy == "plan"
    assert load_config(path, ["search.pruner=median"]).search.strategy == "sampler"
    both = ["search.strategy=plan", "search.sampler=random"]
    assert load_config(path, both).search.strategy == "plan"


def test_wrong_overrides_are_reported_as_such() -> None:
    wrong = {
        "epoch=1": "is no section or key. Did you mean epochs?",
        "seed=1": "is in the wrong section or in none; say study.seed or train.seed.",
        "train.epochs=x": "must be a valid integer, but got epochs='x'.",
        "tran.epochs=1": "is in the wrong section or in none; say train.epochs.",
    }
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=list(wrong))
    for fault, (text, rule) in zip(sorted(caught.value.faults), wrong.items(), strict=True):
        assert fault.startswith(f"--set: {text.split('=')[0]}: {rule}")


def test_a_rule_between_keys_is_reported_where_the_last_of_them_was_given(tmp_path: Path) -> None:
    text = "[train]\nwarmup_epochs = 4\nmixup = 0.2\ncutmix = 1.0"
    mixed, warm = faults_of(text, tmp_path, "epochs=3")
    assert warm.startswith("--set: train: warmup_epochs must be <= epochs")
    assert mixed.startswith("FILE: train: mixup and cutmix")
    (fault,) = faults_of("[space]\nmixup = [0.0, 0.2]", tmp_path, "cutmix=1.0")
    assert fault.startswith("--set: space.mixup: may draw mixup=0.2, but")


def test_missing_data_and_unknown_backbones_are_refused_at_once(tmp_path: Path) -> None:
    source = {"source": str(tmp_path / "no")}
    space = {"backbone": ["resnet18", "resnet19", "timm:resnte50"]}
    with pytest.raises(ConfigError) as caught:
        check_inputs(parse_config({"data": source, "space": space}, "x"))
    first, second, third = caught.value.faults
    assert first.startswith("space.backbone: ") and "Near: resnet18" in first
    assert "'timm:resnte50'" in second
    assert third.startswith("data.source: ") and str(tmp_path / "no") in third


def test_download_adds_modern_backbones_to_the_default_ones_alone() -> None:
    config = load_config(flags={"search.download": True})
    names = config.space["backbone"].ends
    assert len(names) == 9 and "timm:convnext_nano" in names
    again = parse_config(config.to_record(), "study x", (), {})
    assert again.space["backbone"].ends == names
    with pytest.raises(ConfigError, match="search.download: adds backbones to the default ones"):
        load_config(None, ['space.backbone=["resnet18", "resnet34"]'], {"search.download": True})


def test_modern_backbones_are_timms_of_the_size_that_is_said() -> None:
    for modern in MODERN:
        name = modern.name.removeprefix("timm:")
        settings = timm.models.get_pretrained_cfg(name)
        assert settings.tag == modern.tag
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=settings.num_classes)
        size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        assert size / 1e6 == pytest.approx(modern.megabytes, rel=0.02)
