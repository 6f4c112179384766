"""What an ablation compares against: a study's best trial, one of its trials, or a file."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import DataConfig, TrainConfig
from study.ablation.designs import DESIGNS
from study.ablation.factors import Factor, Levels, make_factors, parse_factors
from study.config.errors import ConfigError
from study.config.formatting import study_command
from study.config.load import load_config, parse_config
from study.config.search_space import Space
from study.config.study_config import StudyConfig
from study.config.toml import read_value
from study.record.models import Study, Trial
from study.record.record import Record

_SUFFIX = "-ablation"


@dataclass(frozen=True, slots=True)
class Baseline:
    """A baseline, ready to be ablated.

    Attributes:
        config: The ablation's own study: `train` is the baseline with the first replicate's seed,
            and nothing is searched.
        origin: Where it comes from, in words.
        space: What was searched where it was found; empty for a file's fixed settings.
        source: The study whose images it must see at the same size; None for a file.
        chosen: How it was chosen: epochs it is the best of, its accuracy, and on how many images;
            empty where no search chose it.
    """

    config: StudyConfig
    origin: str
    space: Space
    source: StudyConfig | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)


def read_flags(texts: Iterable[str]) -> dict[str, list[object]]:
    """Read `--factor key=v1,v2` flags; values are TOML, or texts where they are not.

    Raises:
        ConfigError: Some are written otherwise.
    """
    found: dict[str, list[object]] = {}
    faults = []
    for text in texts:
        key, _, written = text.partition("=")
        if not key.strip() or not written.strip():
            example = "for example --factor head_lr_mult=1,100."
            faults.append(f"--factor: must be KEY=VALUE,VALUE, but got {text!r}; {example}")
            continue
        values = [read_value(part.strip()) for part in written.strip("[]").split(",")]
        found.setdefault(key.strip().removeprefix("train."), []).extend(values)
    if faults:
        raise ConfigError(*faults)
    return found


def find_baseline(
    base: str, which: str, overrides: Sequence[str], flags: Mapping[str, object]
) -> Baseline:
    """Find the baseline that a user named.

    Args:
        base: A study's name, or the path of a TOML file.
        which: `best`, or a trial's number.
        overrides: `section.key=value` of --set.
        flags: Key with its section -> value. `study.name` is that of the ablation's study, else
            the name of the base with `-ablation`.

    Raises:
        ConfigError: The file is wrong, or the trial cannot be a baseline.
        RecordError: There is no such database, study or trial.
    """
    name = flags.get("study.name")
    if base.endswith(".toml"):
        if which != "best":
            rule = f"--from takes a trial of a study, but {base} is a file."
            raise ConfigError(f"{rule} Leave --from out, or name the study.")
        return _from_file(load_config(Path(base), overrides, flags), base, bool(name))
    # The database may have been moved since the record in it was written.
    flags = {"study.storage": StudyConfig().study.storage, **flags}
    with Record(str(flags["study.storage"])) as store:
        study = store.study(base)
        designs = store.designs(study.id)
        if not designs:
            trial = _choose(store, study, which)
            best = ", its best" if which == "best" else ""
            origin = f"trial {trial.number} of study {base}{best}"
            n_epochs = sum(row.epochs_done for row in store.trials(study.id))
            chosen = {
                "epochs": n_epochs,
                "value": trial.value or 0.0,
                "n_val": study.data["n_val"],
            }
            found = _from_trial(study, trial, origin, overrides, flags)
            return dataclasses.replace(found, chosen=chosen)
    if which != "best" or name not in (None, base):
        rule = f"{base} is an ablation, which continues with its own baseline and name."
        raise ConfigError(f"{rule} Leave --from and --name out, or name the search or file.")
    return _resume(study, designs[-1].spec, overrides, flags)


def _choose(store: Record, study: Study, which: str) -> Trial:
    if which == "best":
        return store.best_trial(study)
    if not re.fullmatch("[0-9]{1,18}", which):
        raise ConfigError(f"--from must be best or a trial's number, but got {which!r}.")
    trial = store.trial(study.id, int(which))
    if trial.state != "complete":
        given = f"trial {which} of {study.name} is {trial.state}"
        rule = f"a baseline must be a complete trial, but {given}."
        command = study_command("show", study.name, store.storage)
        raise ConfigError(f"{rule} Choose another: {command}")
    return trial


def _from_trial(
    study: Study,
    trial: Trial,
    origin: str,
    overrides: Sequence[str],
    flags: Mapping[str, object],
) -> Baseline:
    source = StudyConfig.from_record(study.config)
    # The trial was chosen because it did well with its own seed, so its baseline gets new ones.
    train = dataclasses.replace(TrainConfig(**trial.config), seed=trial.seed + 1)
    record = source.to_record()
    record |= {"train": dataclasses.asdict(train), "space": {}}
    record["data"] |= _judged(source.data)
    record["study"] |= {"name": study.name + _SUFFIX, "time": None}
    record["search"] |= {"download": False}  # which is about backbones to search
    config = parse_config(record, f"study {study.name}", overrides, flags)
    if config.data.ablation_fraction != source.data.ablation_fraction:
        raise ConfigError(
            f"data.ablation_fraction must be that of study {study.name}, whose search has seen "
            f"all others, {source.data.ablation_fraction:g}, but got "
            f"{config.data.ablation_fraction:g}. Give it to the search."
        )
    return Baseline(config, origin, source.space, source)


def _from_file(config: StudyConfig, path: str, is_named: bool) -> Baseline:
    name = config.study.name + ("" if is_named else _SUFFIX)
    study = dataclasses.replace(config.study, name=name)
    space = {key: dim for key, dim in config.space.items() if key != "seed"}
    data = dataclasses.replace(config.data, **_judged(config.data))
    changed = {"study": study, "data": data, "space": {}}
    changed["search"] = dataclasses.replace(config.search, download=False)
    made = config.model_copy(update=changed)
    return Baseline(made, f"the settings of {Path(path).name}", space)


def _judged(data: DataConfig) -> dict[str, Any]:
    return {"judged_by": "ablation" if data.ablation_fraction else "val"}


def _resume(
    study: Study,
    spec: Mapping[str, Any],
    overrides: Sequence[str],
    flags: Mapping[str, object],
) -> Baseline:
    """Continue an ablation by its own name: its last design, but for what is given now."""
    record = dict(study.config)
    record["ablation"] = {**record["ablation"], **spec["settings"]}
    if "ablation.factors" not in flags and "ablation.design" not in flags:
        record["ablation"]["factors"] = {
            factor["name"]: {level["label"]: level["overrides"] for level in factor["levels"]}
            for factor in spec["factors"]
        }
    config = parse_config(record, f"study {study.name}", overrides, flags)
    return Baseline(config, spec["origin"], {}, chosen=spec["chosen"])


def factors_of(baseline: Baseline) -> list[Factor]:
    """Return the factors of an ablation: those given, or a set that suits the design.

    Raises:
        ConfigError: Levels break a rule, or do not differ from the baseline.
    """
    train, settings = baseline.config.train, baseline.config.ablation
    levels: Levels
    if settings.factors:
        levels = parse_factors(settings.factors)[0]
    else:
        levels = DESIGNS[settings.design].propose(train, baseline.space)
    factors, faults = make_factors(train, levels)
    if faults:
        raise ConfigError(*(f"ablation.{fault.key}: {fault.text}" for fault in faults))
    return factors
