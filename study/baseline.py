"""What an ablation compares against: a study's best trial, one of its trials, or a file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import TrainConfig
from study.config.errors import ConfigError
from study.config.formatting import format_value
from study.config.load import load_config, parse_config
from study.config.search_space import Space
from study.config.study_config import AblationSection, StudyConfig
from study.factors import (
    Factor,
    Level,
    against,
    components,
    parse_factors,
    propose,
    recipe_default,
)
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
        source: The study whose pictures it must see at the same size; None for a file.
    """

    config: StudyConfig
    origin: str
    space: Space
    source: StudyConfig | None = None

    @property
    def settings(self) -> AblationSection:
        """Return what the ablation was told."""
        return self.config.ablation


def find_baseline(
    storage: str | None,
    base: str,
    which: str,
    name: str | None,
    overrides: Sequence[str],
    flags: Mapping[str, object],
) -> Baseline:
    """Find the baseline that a user named.

    Args:
        storage: Database; None for the file's own, or the default.
        base: A study's name, or the path of a TOML file.
        which: `best`, or a trial's number.
        name: Name of the ablation's study; None for that of the base with `-ablation`.
        overrides: `section.key=value` of --set.
        flags: Key with its section -> value.

    Raises:
        ConfigError: The file is wrong, or the trial cannot be a baseline.
        RecordError: There is no such database, study or trial.
    """
    if base.endswith(".toml"):
        if which != "best":
            raise ConfigError(
                f"--from takes a trial of a study, but {base} is a file. Leave --from out, or "
                "name the study."
            )
        given = {"study.storage": storage, "study.name": name}
        more = {key: value for key, value in given.items() if value}
        config = load_config(Path(base), overrides, {**flags, **more})
        return _from_file(config, base, name)
    storage = storage or "studies.db"
    # The database may have been moved since the record in it was written.
    flags = {**flags, "study.storage": storage}
    with Record.open(storage) as store:
        row = store.study(base)
        designs = store.designs(row.id)
        if designs:
            _refuse_other(base, which, name)
            return _resumed(row, designs[-1].spec, overrides, flags)
        trial = _chosen(store, row, which)
        is_best = which == "best"
    return _from_trial(row, trial, is_best, name, overrides, flags)


def _refuse_other(base: str, which: str, name: str | None) -> None:
    if which != "best" or name not in (None, base):
        raise ConfigError(
            f"{base} is an ablation, which goes on with its own baseline under its own name. "
            "Leave --from and --name out, or name the search or the file that it came from."
        )


def _chosen(store: Record, study: Study, which: str) -> Trial:
    if which != "best":
        if not which.isdigit():
            raise ConfigError(f"--from must be best or a trial's number, but got {which!r}.")
        trial = store.trial(study.id, int(which))
        if trial.state != "complete":
            raise ConfigError(
                f"a baseline must be a complete trial, but trial {which} of {study.name} is "
                f"{trial.state}. Choose another: python -m study show {study.name}"
            )
        return trial
    complete = [row for row in store.trials(study.id) if row.state == "complete"]
    if not complete:
        raise ConfigError(
            f"study {study.name} must have a complete trial to be ablated, but has none. Run it "
            f"on: python -m study resume {study.name}"
        )
    return min(complete, key=lambda row: row.rank)


def _from_trial(
    study: Study,
    trial: Trial,
    is_best: bool,
    name: str | None,
    overrides: Sequence[str],
    flags: Mapping[str, object],
) -> Baseline:
    source = StudyConfig.from_record(study.config)
    # The trial was chosen because it did well with its own seed, so its baseline gets new ones.
    train = dataclasses.replace(TrainConfig(**trial.config), seed=trial.seed + 1)
    record = {
        **source.to_record(),
        "train": dataclasses.asdict(train),
        "space": {},
    }
    record["study"] = {
        **record["study"],
        "name": name or study.name + _SUFFIX,
        "timeout": None,
    }
    config = parse_config(record, f"study {study.name}", overrides, flags)
    best = ", its best" if is_best else ""
    return Baseline(
        config,
        f"trial {trial.number} of study {study.name}{best}",
        source.space,
        source,
    )


def _from_file(config: StudyConfig, path: str, name: str | None) -> Baseline:
    ablated = dataclasses.replace(config.study, name=name or config.study.name + _SUFFIX)
    made = config.model_copy(update={"study": ablated, "space": {}})
    space = {key: dim for key, dim in config.space.items() if key != "seed"}
    origin = f"the settings of {Path(path).name}"
    return Baseline(made, origin, space)


def _resumed(
    study: Study,
    spec: Mapping[str, Any],
    overrides: Sequence[str],
    flags: Mapping[str, object],
) -> Baseline:
    """Go on with an ablation by its own name: as it was told last, but for what is told now."""
    record = dict(study.config)
    record["ablation"] = {**record.get("ablation", {}), **spec["settings"]}
    if "ablation.factors" not in flags and "ablation.design" not in flags:
        record["ablation"]["factors"] = spec["given"]
    config = parse_config(record, f"study {study.name}", overrides, flags)
    return Baseline(config, spec["origin"], {})


def factors_of(baseline: Baseline) -> list[Factor]:
    """Return the factors of an ablation: those given, or a set that suits the design.

    Raises:
        ConfigError: Levels break a rule, or do not differ from the baseline.
    """
    train, settings = baseline.config.train, baseline.settings
    levels: Mapping[str, Sequence[Level]]
    if settings.factors:
        levels = parse_factors(settings.factors)[0]
    elif settings.design == "loco":
        levels = components(train)
    elif settings.design == "path":
        levels = _recipe_levels(train, baseline.space)
    else:
        levels = propose(train, baseline.space)
        if settings.design in ("factorial", "screen"):
            levels = {name: listed[:1] for name, listed in levels.items()}
    factors, faults = against(train, levels)
    if faults:
        raise ConfigError(*(f"ablation.{fault.key}: {fault.text}" for fault in faults))
    return factors


def _recipe_levels(train: TrainConfig, space: Space) -> dict[str, list[Level]]:
    """Return the searched settings at their recipe default: where a path begins."""
    found = {}
    for key in space:
        value = recipe_default(key, space)
        if value != getattr(train, key):
            found[key] = [Level(format_value(value), {key: value})]
    return found


def given_factors(factors: Sequence[Factor]) -> dict[str, Any]:
    """Write factors as [ablation.factors] would give them, for a later run to go on with."""
    return {
        factor.name: (
            [next(iter(level.overrides.values())) for level in factor.levels]
            if all(_is_plain(factor.name, level) for level in factor.levels)
            else {level.label: level.overrides for level in factor.levels}
        )
        for factor in factors
    }


def _is_plain(name: str, level: Level) -> bool:
    """Say whether a level is a value of a training key, and called so."""
    return list(level.overrides) == [name] and level.label == format_value(level.overrides[name])
