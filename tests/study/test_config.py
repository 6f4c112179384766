import json
from pathlib import Path

import pytest

from core.config import DataConfig, TrainConfig
from study.config import (
    FREE_KEYS,
    ConfigError,
    StudyConfig,
    check_backbones,
    config_diff,
    default_name,
    load_config,
    parse_config,
)
from study.sections import StudySection
from study.space import Choices, Range


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(text: str, folder: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return caught.value.faults


def test_nothing_said_gives_the_defaults() -> None:
    config = load_config()
    assert config == StudyConfig()
    assert config.train == TrainConfig()
    assert config.study.name == "digits"
    assert list(config.space) == [
        "backbone",
        "freeze_depth",
        "base_lr",
        "head_lr_mult",
        "weight_decay",
    ]


def test_a_file_sets_keys_of_every_section(tmp_path: Path) -> None:
    text = """
        [study]
        name = "ants"
        timeout = "1h30m"
        [data]
        source = "pictures/ants"
        [train]
        epochs = 3
        clip_norm = "none"
        [search]
        sampler = "random"
        recipes = ["fine-tune-all"]
        [space]
        base_lr = {low = 1e-4, high = 1e-2, log = true}
        batch_size = [16, 32]
        momentum = 0.8
    """
    config = load_config(write(tmp_path, text))
    assert config.study.timeout == 5400
    assert config.data.source == "folder:pictures/ants"
    assert (config.train.epochs, config.train.momentum, config.train.clip_norm) == (3, 0.8, None)
    assert config.search.recipe_names == ("fine-tune-all",)
    assert config.space == {
        "base_lr": Range(1e-4, 1e-2, log=True),
        "batch_size": Choices((16, 32)),
    }


def test_all_faults_are_told_at_once_with_file_and_key(tmp_path: Path) -> None:
    text = """
        [study]
        trials = 0
        [data]
        val_fraction = "much"
        [train]
        epoch = 3
        optimizer = "sdg"
        base_lr = nan
        [search]
        sampler = "tpo"
        [space]
        base_lr = {low = 0.1, high = 0.01}
        freeze_dept = [1, 2]
    """
    path = tmp_path / "study.toml"
    assert set(faults_of(text, tmp_path)) == {
        f"{path}: study.trials: must be >= 1, but got trials=0.",
        f"{path}: data.val_fraction: must be a number, but got val_fraction='much'.",
        f"{path}: train.epoch: is no key of this section. Did you mean epochs?",
        f"{path}: train.optimizer: must be one of sgd, adamw, but got optimizer='sdg'."
        " Did you mean sgd?",
        f"{path}: search.sampler: must be one of tpe, random, gp, cmaes, qmc, grid, bruteforce,"
        " but got sampler='tpo'. Did you mean tpe?",
        f"{path}: space.base_lr: is given a value by train.base_lr too; remove one of the two.",
        f"{path}: space.base_lr: low must be < high, but got low=0.1 and high=0.01;"
        " a plain value instead of the table fixes the key.",
        f"{path}: space.freeze_dept: is no training key, so it cannot be searched."
        " Did you mean freeze_depth?",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base_lr = {low = 0.1, high = 0.01}", "low must be < high"),
        ("base_lr = {low = 0.1, high = 0.1}", "a plain value instead of the table fixes the key"),
        ("base_lr = {low = 0.0, high = 0.1}", "low must be > 0, but got base_lr=0.0"),
        ("weight_decay = {low = 0.0, high = 0.1, log = true}", "low must be > 0 where log = true"),
        ("base_lr = {low = 0.1}", "needs both low and high"),
        ("base_lr = {low = 0.1, hihg = 1.0}", "but got hihg. Did you mean high?"),
        ("base_lr = {low = 0.1, high = 1.0, log = 1}", "log must be true or false"),
        ("base_lr = {low = 0.1, high = 1.0, step = 2.0}", "step must be <= high - low"),
        ("base_lr = {low = 0.1, high = 1.0, step = 0}", "step must be a number > 0"),
        ("epochs = {low = 1, high = 9, step = 0.5}", "step must be a whole number > 0"),
        ("epochs = {low = 1, high = 9, step = 2, log = true}", "exclude each other"),
        ("epochs = {low = 1.5, high = 9}", "low must be a whole number"),
        ("freeze_depth = {low = 0, high = 6}", "high must be <= 5"),
        ("backbone = {low = 0, high = 1}", "is no number, so it takes choices"),
        ("backbone = {choices = []}", "choices must be a list of at least one value"),
        ('backbone = ["resnet18", "resnet18"]', "choices must differ"),
        ('backbone = {choices = ["resnet18", "vgg11"], low = 1}', "takes choices alone"),
        ("augment = ['none', 'strong']", "must be one of none, standard, trivial, rand"),
        ("epochs = [3, 'x']", "must be a whole number, but got epochs='x'"),
    ],
)
def test_a_wrong_dimension_is_refused(line: str, message: str, tmp_path: Path) -> None:
    (fault,) = faults_of(f"[space]\n{line}", tmp_path)
    assert f"space.{line.split(' ')[0]}: " in fault
    assert message in fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nmixup = 0.2\ncutmix = 1.0", "mixup and cutmix must not both be on"),
        ("[train]\nwarmup_epochs = 11", "warmup_epochs must be <= epochs"),
        ("[study]\nname = '../x'", "must begin and end with a letter or digit"),
        ("[study]\ntimeout = '2 hours'", 'must be seconds or a text like "2h"'),
        ("[search]\nrecipes = ['all']", "must be true, false or a list of linear-probe"),
        ("[search]\nsampler = 'grid'", "needs choices or a step, but these have neither: base_lr"),
        ("[space]\nmixup = [0.0, 0.2]\ncutmix = [0.0, 1.0]", "may draw mixup=0.2 with cutmix=1.0"),
        ("[space]\nepochs = {low = 1, high = 9}\n[train]\nwarmup_epochs = 2", "may draw epochs=1"),
        ("epochs = 3", "epochs: stands in no section; it belongs into [train]."),
        ("[data]\nepochs = 3", "data.epochs: is no key of this section; it belongs into [train]."),
        ("[sarch]\nsampler = 'tpe'", "sarch: is no section or key. Did you mean search?"),
        ("train = 3", "train: must be a table, [train], but got 3."),
        ("[train\nepochs = 3", "must be TOML, but expected ']'"),
    ],
)
def test_a_rule_between_keys_or_a_misplaced_key_is_told(
    text: str, message: str, tmp_path: Path
) -> None:
    (fault,) = faults_of(text, tmp_path)
    assert fault.startswith(f"{tmp_path / 'study.toml'}: ") or fault.startswith("study.toml")
    assert message in fault


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: there is no such file; `python -m study"):
        load_config(tmp_path / "no.toml")


def test_overrides_win_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    path = write(tmp_path, "[study]\ntrials = 5\n[train]\nepochs = 4\nbatch_size = 8")
    config = load_config(
        path, ["train.epochs=6", "study.trials=7", "label_smoothing=0.1"], {"study.trials": 9}
    )
    assert (config.study.trials, config.train.epochs, config.train.batch_size) == (9, 6, 8)
    assert config.train.label_smoothing == 0.1


def test_an_override_changes_a_part_of_a_default_dimension_or_fixes_it() -> None:
    config = load_config(
        overrides=["space.base_lr.high=1e-2", "freeze_depth=3", "space.seed=[1,2]"]
    )
    assert config.space["base_lr"] == Range(1e-4, 1e-2, log=True)
    assert "freeze_depth" not in config.space
    assert config.train.freeze_depth == 3
    assert config.space["seed"] == Choices((1, 2))


def test_an_override_may_empty_the_space() -> None:
    assert load_config(overrides=["space={}"]).space == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "--set: must be section.key=value, but got 'epochs'"),
        ("seed=1", "--set: seed: is a key of several sections; say study.seed or train.seed."),
        ("epoch=1", "--set: epoch: is no section or key. Did you mean epochs?"),
        ("tran.epochs=1", "--set: tran: is no section or key. Did you mean train?"),
        (
            "train.epochs=many",
            "--set: train.epochs: must be a whole number, but got epochs='many'",
        ),
        ("train.warmup_epochs=11", "--set: train: warmup_epochs must be <= epochs"),
        ("data.batch_size=4", "--set: data.batch_size: is no key of this section; it belongs"),
        ("data.seed=4", "--set: data.seed: is no key of this section; it belongs into [study] or"),
    ],
)
def test_a_wrong_override_is_told_as_such(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert str(caught.value).startswith(message)


def test_a_rule_between_keys_is_told_where_the_last_of_them_was_said(tmp_path: Path) -> None:
    text = "[train]\nwarmup_epochs = 4\nmixup = 0.2\ncutmix = 1.0"
    mixed, warm = faults_of(text, tmp_path, "epochs=3")
    assert warm.startswith("--set: train: warmup_epochs must be <= epochs")
    assert "study.toml: train: mixup and cutmix" in mixed
    (fault,) = faults_of("", tmp_path, "space.warmup_epochs=[11]")
    assert fault.startswith("--set: train: warmup_epochs must be <= epochs")
    (fault,) = faults_of("[space]\nmixup = [0.0, 0.2]", tmp_path, "cutmix=1.0")
    assert fault.startswith("--set: space.mixup: may draw mixup=0.2, but")


def test_a_flag_is_named_in_its_fault() -> None:
    with pytest.raises(ConfigError, match=r"^--trials: study\.trials: must be >= 1"):
        load_config(flags={"study.trials": 0})
    with pytest.raises(ConfigError, match=r"^--timeout: study\.timeout: must be > 0"):
        load_config(flags={"study.timeout": "0"})


def test_a_written_default_does_not_contradict_a_dimension(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[train]\nseed = 0\n[space]\nseed = [0, 1]"))
    assert config.space == {"seed": Choices((0, 1))}


def test_a_searched_keys_base_value_lies_in_its_dimension() -> None:
    config = load_config(overrides=["space={epochs={low=20,high=30}}", "train.warmup_epochs=15"])
    assert config.train.epochs == 20


def test_none_can_be_a_choice_of_a_key_that_may_be_left_out() -> None:
    config = load_config(overrides=['space.ema_decay=["none", 0.99]'])
    assert config.space["ema_decay"] == Choices((None, 0.99))


def test_the_record_reads_back_to_the_same_configuration() -> None:
    config = load_config(
        overrides=["space.ema_decay=['none',0.99]", "recipes=['linear-probe']", "timeout=2h"]
    )
    record = json.loads(json.dumps(config.to_record()))
    assert StudyConfig.from_record(record) == config
    assert "base_lr" not in record["train"]


def test_the_difference_names_keys_and_leaves_free_ones_out() -> None:
    old = load_config()
    new = load_config(overrides=["epochs=3", "base_lr=0.1", "trials=50", "workers=2"])
    assert config_diff(old, new) == [
        "train.epochs: 10 -> 3",
        "train.base_lr: searched in 0.0001 to 0.01, log -> 0.1",
    ]
    assert config_diff(old, old) == []
    assert {line.split(":")[0] for line in config_diff(old, new, with_free=True)} >= {
        "study.trials",
        "train.workers",
    }


def test_every_free_key_is_a_key() -> None:
    config = StudyConfig()
    assert all(hasattr(getattr(config, k.split(".")[0]), k.split(".")[1]) for k in FREE_KEYS)


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
    assert default_name(source) == name
    assert StudyConfig(data=DataConfig(source=source)).study.name == name


def test_a_given_name_stays() -> None:
    assert StudyConfig(study=StudySection(name="mine")).study.name == "mine"


def test_an_exhaustive_sampler_takes_no_recipes() -> None:
    config = load_config(overrides=["space={seed=[0,1]}", "sampler=grid"])
    assert config.search.recipe_names == ()


def test_unknown_backbones_are_all_told() -> None:
    config = parse_config({"space": {"backbone": ["resnet18", "resnet19", "timm:resnte50"]}}, "x")
    with pytest.raises(ConfigError) as caught:
        check_backbones(config)
    assert len(caught.value.faults) == 2
    assert "space.backbone: " in caught.value.faults[0]
    assert "resnet18" in caught.value.faults[0]


def test_what_ranks_trials_cannot_be_searched() -> None:
    with pytest.raises(ConfigError, match=r"all trials must agree on it; set train.monitor"):
        parse_config({"space": {"monitor": ["val_loss", "val_acc"]}}, "study.toml")
    assert parse_config({"space": {"monitor": "val_acc"}}, "x").train.monitor == "val_acc"
