import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from study.ablation.baseline import Baseline, factors_of, find_baseline, read_flags
from study.ablation.designs import DESIGNS
from study.config.errors import ConfigError
from study.config.load import parse_config
from study.config.search_space import Choices, Range
from study.config.study_config import StudyConfig
from study.record.database import RecordError
from study.record.record import Record
from support import distributions_of
from tests.reports.studies import DATA, Plan, enter

TOML = """
[study]
name = "bees"
time = 60
[train]
epochs = 4
seed = 20
[space]
base_lr = {low = 1e-4, high = 1e-2, log = true}
augment = ["none", "standard"]
"""
SPACE = {"base_lr": Range(1e-4, 1e-2, log=True), "augment": Choices(("none", "standard"))}
TRIALS = [  # state, value, base_lr, seed
    ("complete", 0.7, 0.001, 20),
    ("failed", 0.9, 0.002, 20),
    ("complete", 0.8, 0.003, 21),
    ("pruned", 0.95, 0.004, 20),
    ("complete", 0.8, 0.005, 20),
    ("running", 0.99, 0.006, 20),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with bees.toml and its study of six trials."""
    monkeypatch.chdir(tmp_path)
    Path("bees.toml").write_text(TOML)
    config = parse_config(tomllib.loads(TOML), "bees.toml")
    with Record("studies.db", create=True) as store:
        study = store.create_study("bees", config.to_record(), DATA, {})
        run = store.begin_run(study, command="c", device="cpu", versions={})
        for number, (state, value, base_lr, seed) in enumerate(TRIALS):
            train = dataclasses.asdict(config.train) | {"seed": seed}
            plan = Plan({"base_lr": base_lr}, [value], state, config_hash=str(number))
            plan.config = train | plan.params
            enter(store, study, run, plan, distributions_of(plan.params))
        store.end_run(run, "trials")
        store.create_study("empty", StudyConfig().to_record(), {}, {})
    return tmp_path


def _find(
    base: str = "bees",
    which: str = "best",
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    **study: object,
) -> Baseline:
    named = {f"study.{key}": value for key, value in study.items()}
    return find_baseline(base, which, overrides, {**(flags or {}), **named})


def test_the_best_trial_is_the_first_complete_one_of_the_highest_accuracy(here: Path) -> None:
    baseline = _find()
    assert baseline.origin == "trial 2 of study bees, its best"
    config = baseline.config
    assert (config.train.base_lr, config.train.epochs) == (0.003, 4)
    assert (config.study.name, config.space, baseline.space) == ("bees-ablation", {}, SPACE)
    assert baseline.source is not None and baseline.source.study.name == "bees"
    # Fresh seeds, and no timeout but its own.
    assert (config.train.seed, config.study.time) == (22, None)
    assert _find(flags={"study.time": "2m"}).config.study.time == 120
    other = _find(which="4")
    assert other.origin == "trial 4 of study bees"
    assert (other.config.train.base_lr, other.config.train.seed) == (0.005, 21)
    with Record("studies.db") as store:  # whose backbones were to be downloaded
        study = store.study("bees")
        study.config["search"]["download"] = True
        store.update_study(study, study.config, study.data)
    assert not _find().config.search.download


@pytest.mark.parametrize(
    ("base", "given", "shown"),
    [
        ("bees", {"which": "3"}, "trial 3 of bees is pruned"),
        ("bees", {"which": "7"}, "there is no trial 7 .*; they go from 0 to 5"),
        ("bees", {"which": "last"}, "--from must be best or a trial's number, but got 'last'"),
        ("empty", {}, "study empty must have a complete trial, but has"),
        ("bees.toml", {"which": "3"}, "--from takes a trial of a study, but bees.toml is a file"),
        ("bees", {"name": "../bees"}, "must begin and end with a letter or digit"),
    ],
)
def test_what_cannot_be_a_baseline_is_refused(
    base: str, given: dict[str, str], shown: str, here: Path
) -> None:
    with pytest.raises((ConfigError, RecordError), match=shown):
        _find(base, **given)


def test_a_file_gives_its_own_settings(here: Path) -> None:
    baseline = _find("bees.toml")
    config, train = baseline.config, baseline.config.train
    assert (baseline.origin, baseline.source) == ("the settings of bees.toml", None)
    assert (train.epochs, train.seed, train.base_lr) == (4, 20, 3e-4)
    assert (config.study.name, config.study.time) == ("bees-ablation", 60)
    assert (config.space, baseline.space) == ({}, SPACE)
    named = _find("bees.toml", name="why", overrides=["train.epochs=6"], storage="other.db").config
    assert (named.study.name, named.train.epochs) == ("why", 6)
    assert named.study.storage == "other.db"


def test_images_that_the_search_did_not_see_judge_where_there_are_any(here: Path) -> None:
    assert _find().config.data.judged_by == _find("bees.toml").config.data.judged_by == "val"
    kept = _find("bees.toml", overrides=["data.ablation_fraction=0.1"])
    assert kept.config.data.judged_by == "ablation"
    with Record("studies.db") as store:
        study = store.study("bees")
        study.config["data"]["ablation_fraction"] = 0.1
        store.update_study(study, dict(study.config), DATA)
    assert _find().config.data.judged_by == "ablation"
    assert _find().source.data.judged_by == "val"


def _put(baseline: Baseline) -> None:
    """Enter an ablation as a run of it does, with its design."""
    design = DESIGNS[baseline.config.ablation.design](factors_of(baseline))
    spec = design.to_record() | {
        "origin": baseline.origin,
        "chosen": dict(baseline.chosen),
        "settings": dataclasses.asdict(baseline.config.ablation) | {"factors": None},
    }
    config = baseline.config
    with Record("studies.db") as store:
        study = store.find_study(config.study.name)
        if study is None:
            store.create_study(config.study.name, config.to_record(), {}, {})
        store.put_design(store.study(config.study.name).id, design.kind, design.kind, spec, "c")


GIVEN = {
    "clip_norm": ["none", 0.5],
    "momentum": [0.5],
    "recipe": {"plain": {"augment": "none", "clip_norm": "none"}},
    "augment": {"bare": {"augment": "none"}},  # a named level of one key
}


def test_an_ablation_resumes_by_its_name_but_for_what_is_given_now(here: Path) -> None:
    flags = {"ablation.factors": GIVEN, "ablation.replicates": 3, "study.time": 10}
    first = _find(overrides=["ablation.margin=2", "clip_norm=1"], flags=flags)
    _put(first)
    again = _find("bees-ablation")
    assert again.config.train == first.config.train  # no fresher seeds than before
    assert again.config.study.name == "bees-ablation"
    assert again.origin == "trial 2 of study bees, its best"
    assert again.chosen == first.chosen != {}
    assert (again.config.ablation.replicates, again.config.ablation.margin) == (3, 2)
    more = _find("bees-ablation", flags={"ablation.replicates": 6, "ablation.folds": 3})
    assert (more.config.ablation.replicates, more.config.ablation.folds) == (6, 3)
    assert factors_of(more) == factors_of(again) == factors_of(first)
    other = _find("bees-ablation", flags={"ablation.factors": {"freeze_depth": [5]}})
    assert [factor.name for factor in factors_of(other)] == ["freeze_depth"]
    loco = _find("bees-ablation", flags={"ablation.design": "loco"})
    assert "weight_decay" in [factor.name for factor in factors_of(loco)]


def test_the_last_design_is_resumed_with_the_factors_that_suit_it(here: Path) -> None:
    found = {}
    for design in ("ofat", "loco", "path", "loco"):
        # Nesterov's form goes with momentum, and a long number keeps its digits.
        sgd = ["optimizer=sgd", "nesterov=true"]
        first = _find(overrides=sgd, flags={"ablation.design": design})
        _put(first)
        again = _find("bees-ablation")
        assert again.config.ablation.design == design
        assert factors_of(again) == factors_of(first)
        found[design] = {factor.name: factor.levels for factor in factors_of(first)}
        assert "seed" not in found[design]
    (level,) = found["loco"]["momentum"]
    assert level.overrides == {"momentum": 0.0, "nesterov": False}
    (level,) = found["path"]["base_lr"]
    assert level.overrides == {"base_lr": 3e-4}
    assert list(found["path"]) == ["base_lr"]
    assert len(found["ofat"]["freeze_depth"]) == 2


def test_flags_are_read_as_toml_or_as_texts() -> None:
    texts = ["head_lr_mult=1,1e2", "augment=none, trivial", "clip_norm=[none,2]", "nesterov=true"]
    with pytest.raises(ConfigError, match="'=none'.*\n.*'mixup= '"):
        read_flags([*texts, "=none", "mixup= "])
    assert read_flags(texts) == {
        "head_lr_mult": [1, 100.0],
        "augment": ["none", "trivial"],
        "clip_norm": ["none", 2],
        "nesterov": [True],
    }
