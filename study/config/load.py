"""Read a configuration: defaults, file, --set and flags merged into one and checked at once."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from core.config import TrainConfig, fields_of
from study.ablation.factors import parse_factors
from study.config.errors import ConfigError, Fault, explain, near
from study.config.search_space import (
    DEFAULT_SPACE,
    Space,
    default_params,
    n_points,
    parse_space,
    space_faults,
)
from study.config.study_config import EXHAUSTIVE, SECTIONS, SearchSection, StudyConfig
from study.config.toml import read_file, read_value

_KEYS = {name: list(fields_of(section)) for name, section in SECTIONS.items()} | {
    "space": list(fields_of(TrainConfig))
}


class _Origin(NamedTuple):
    """Where a key was given: its layer, counted from the defaults at 0, and that layer's name."""

    rank: int
    label: str


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
        ConfigError: Something is wrong; it lists every fault.
    """
    raw = {} if path is None else read_file(path)
    return parse_config(raw, "defaults" if path is None else str(path), overrides, flags)


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
        ConfigError: Something is wrong; it lists every fault.
    """
    merged = _Merged(source)
    for name, table in raw.items():
        merged.put([name], table, _Origin(1, source))
    for text in overrides:
        merged.put_override(text, _Origin(2, "--set"))
    named = {"data.source": "--data", "ablation.factors": "--factor"}
    for key, value in (flags or {}).items():
        path = key.split(".")
        merged.put(path, value, _Origin(3, named.get(key, f"--{path[-1]}")))
    return merged.checked()


class _Merged:
    """The merged sections, with the origin of every key, and the faults found so far.

    Attributes:
        values: Section -> key -> value as it was written.
        faults: Complete messages.
    """

    def __init__(self, source: str) -> None:
        """Begin with the default space; `source` is what messages call keys that nobody gave."""
        self._unsaid = _Origin(0, source)
        self._origins: dict[tuple[str, str], _Origin] = {}
        self.values: dict[str, dict[str, Any]] = {name: {} for name in _KEYS}
        self.values["space"] = deepcopy(DEFAULT_SPACE)
        self.faults: list[str] = []

    def put_override(self, text: str, origin: _Origin) -> None:
        """Lay `section.key=value` over what is there; the value is TOML, else a text."""
        name, sign, written = text.partition("=")
        path = name.strip().split(".")
        if not sign or not all(path):
            example = "for example --set train.epochs=5."
            text = f"must be section.key=value, but got {text!r}; {example}"
            self.faults.append(f"{origin.label}: {text}")
            return
        homes = _homes(path[0])
        if path[0] not in _KEYS and len(homes) > 1:
            meant = " or ".join(f"{home}.{path[0]}" for home in homes)
            text = f"is a key of several sections; say {meant}."
            self.faults.append(f"{origin.label}: {path[0]}: {text}")
            return
        if path[0] not in _KEYS:
            path = [*homes, *path]
        self.put(path, read_value(written.strip()), origin)

    def put(self, path: Sequence[str], value: object, origin: _Origin) -> None:
        """Lay a section, a key or a part of its table over what is there."""
        section, *rest = path
        homes = _homes(rest[0] if rest else section)
        where, text = ".".join(path[:2]), ""
        if section not in _KEYS:
            where = section
            if homes and not rest:
                text = f"is in no section; it belongs in [{homes[0]}]."
            else:
                hint = near(section, {*_KEYS, *itertools.chain(*_KEYS.values())})
                text = f"is no section or key.{hint} The sections are {', '.join(_KEYS)}."
        elif not rest and not isinstance(value, Mapping):
            text = f"must be a table, [{section}], but got {value!r}."
        elif section != "space" and rest and homes and section not in homes:
            text = f"is no key of this section; it belongs in [{'] or ['.join(homes)}]."
        if text:
            self.faults.append(f"{origin.label}: {where}: {text}")
        elif isinstance(value, Mapping) and not rest:
            if section == "space":  # as a whole it replaces what is there
                self.values[section] = {}
            for key, inner in value.items():
                self.put([section, key], inner, origin)
        else:
            self._put_key(section, rest, value, origin)

    def _put_key(self, section: str, path: Sequence[str], value: object, origin: _Origin) -> None:
        self._origins[section, path[0]] = origin
        table = self.values[section]
        for part in path[:-1]:
            if not isinstance(table.get(part), dict):
                table[part] = {}
            table = table[part]
        table[path[-1]] = deepcopy(value)

    def checked(self) -> StudyConfig:
        """Make the configuration.

        Raises:
            ConfigError: Something is wrong; it lists every fault.
        """
        self._settle()
        space, wrong = parse_space(self.values["space"])
        self._tell("space", wrong)
        fixed = {key: dim.ends[0] for key, dim in space.items() if len(dim.ends) == 1}
        space = {key: dim for key, dim in space.items() if key not in fixed}
        self.values["train"] = default_params(space) | self.values["train"] | fixed
        made: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            try:
                made[name] = section(**self.values[name])
            except ValidationError as err:
                self._tell(name, explain(err, _KEYS[name]))
        if not self.faults:
            self._tell("space", space_faults(space, made["train"]))
            self._tell("search", _search_faults(space, made["search"]))
            self._tell("ablation", parse_factors(made["ablation"].factors or {})[1])
        if self.faults:
            raise ConfigError(*self.faults)
        return StudyConfig(**made, space=space)

    def _settle(self) -> None:
        """Where a key is both searched and given a value, let the later layer win.

        A file that `study init` wrote gives every key its default; that contradicts no dimension.
        """
        train, space = self.values["train"], self.values["space"]
        for key in [key for key in space if key in train]:
            searched, given = self._origin("space", key), self._origin("train", key)
            is_default = train[key] == fields_of(TrainConfig)[key].default
            if searched.rank == given.rank and not is_default:
                text = f"is given a value by train.{key} too; remove one of the two."
                self._tell("space", [Fault(key, text)])
            del (space if searched.rank < given.rank else train)[key]

    def _tell(self, section: str, faults: Iterable[Fault]) -> None:
        """Add faults, each with where the last of its keys was given: that one broke a rule."""
        for fault in faults:
            sections = ("train", "space") if section in ("train", "space") else (section,)
            keys = [key for key in (fault.key.partition(".")[0], *fault.about) if key]
            places = itertools.product(sections, keys)
            origin = max((self._origin(*place) for place in places), default=self._unsaid)
            where = ".".join(filter(None, (section, fault.key)))
            self.faults.append(f"{origin.label}: {where}: {fault.text}")

    def _origin(self, section: str, key: str) -> _Origin:
        return self._origins.get((section, key), self._unsaid)


def _homes(key: str) -> list[str]:
    """Return the sections that have a key; a dimension's is [train]."""
    return [name for name, keys in _KEYS.items() if key in keys and name != "space"]


def _search_faults(space: Space, search: SearchSection) -> list[Fault]:
    if search.sampler not in EXHAUSTIVE or n_points(space) is not None:
        return []
    endless = ", ".join(key for key, dim in space.items() if dim.n_points is None)
    rule = f"{search.sampler} visits every setting, so each dimension needs choices or a step"
    return [Fault("sampler", f"{rule}, but these have neither: {endless}.")]


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
    except (DataError, OSError) as err:
        raise ConfigError(f"data.source: {err}") from err


def check_backbones(config: StudyConfig) -> None:
    """Refuse backbones that neither library knows (this loads torch).

    Raises:
        ConfigError: Unknown names, each with its nearest.
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
