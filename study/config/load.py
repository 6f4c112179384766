"""Read a configuration: defaults, file, --set and flags merged into one and checked at once."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.config import TrainConfig, fields_of
from study.ablation.factors import parse_factors
from study.config.backbones import MODERN
from study.config.errors import ConfigError, Fault, explain, near
from study.config.search_space import DEFAULT_SPACE, default_params, parse_space, space_faults
from study.config.study_config import EXHAUSTIVE, LONGEST_NAME, SECTIONS, StudyConfig
from study.config.toml import read_file, read_value

_FLAGS = {
    "data.source": "--data",
    "ablation.factors": "--factor",
    "study.refit": "--no-refit",
}
"""Flags that are not called as the key that they set."""
_CLASSIC = ("sampler", "pruner", "recipes")  # of a search that is no plan
# Tables within tables, of which [space] and [ablation.factors] need four. Assumption.
_DEEPEST = 8
_LONGEST_TEXT, _FIRST_TOO_LARGE = 4096, 2**63  # Linux's longest path; a database's integers
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_Origin = tuple[int, str]
"""Where a key was given: its layer, counted from the defaults at 0, and that layer's name."""


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
    """Check, as `load_config` does, a configuration that was read from a file or a record.

    Messages call it `source`; a section or key that it leaves out takes its default.
    """
    merged = _Merged(source)
    for name, table in raw.items():
        merged.put((1, source), [name], table)
    for text in overrides:
        merged.put_override((2, "--set"), text)
    for key, value in (flags or {}).items():
        path = key.split(".")
        merged.put((3, _FLAGS.get(key, f"--{path[-1]}")), path, value)
    return merged.checked()


class _Merged:
    """The merged sections, with the origin of every key, and the faults found so far.

    Attributes:
        values: Section -> key -> value as it was written.
        faults: Complete messages.
    """

    def __init__(self, source: str) -> None:
        """Begin with the default space; `source` is what messages call keys that nobody gave."""
        self.values: dict[str, dict[str, Any]] = {name: {} for name in (*SECTIONS, "space")}
        self.faults: list[str] = []
        defaults: _Origin = (0, source)
        self._origins: dict[tuple[str, str], _Origin] = defaultdict(lambda: defaults)
        self.put(defaults, ["space"], DEFAULT_SPACE)

    def put_override(self, origin: _Origin, text: str) -> None:
        """Lay `section.key=value` over what is there; the value is TOML, else a text."""
        name, sign, written = text.partition("=")
        path = name.strip().split(".")
        if not sign or not all(path):
            rule = f"must be section.key=value, but got {text!r}"
            self._add(origin, "", f"{rule}; for example --set train.epochs=5.")
            return
        homes = _homes(path[0])
        if path[0] not in self.values and len(homes) == 1:
            path = [*homes, *path]
        self.put(origin, path, read_value(written.strip()))

    def put(self, origin: _Origin, path: Sequence[str], value: object) -> None:
        """Lay a section, a key or a part of its table over what is there."""
        section, *keys = path
        key, where = (keys or path)[0], ".".join(path[:2])
        homes = _homes(key)
        is_section = section in self.values and not keys
        if is_section and isinstance(value, Mapping):
            if section == "space":  # as a whole it replaces what is there
                self.values[section] = {}
            for inner_key, inner in value.items():
                self.put(origin, [section, inner_key], inner)
        elif rule := _unusable(value, len(path)):
            self._add(origin, where, rule)
        elif is_section:
            self._add(origin, where, f"must be a table, [{section}], but got {value!r}.")
        elif section in (["space", *homes] if homes else self.values):
            self._origins[section, key] = origin
            table = self.values[section]
            for part in keys[:-1]:  # what was given stays as it is: the tables here are copies
                inner = table.get(part)
                table[part] = dict(inner) if isinstance(inner, Mapping) else {}
                table = table[part]
            table[keys[-1]] = value
        elif homes:
            meant = " or ".join(f"{home}.{key}" for home in homes)
            self._add(origin, where, f"is in the wrong section or in none; say {meant}.")
        else:
            known = [*self.values, *(key for each in SECTIONS.values() for key in fields_of(each))]
            text = f"is no section or key.{near(section, known)}"
            self._add(origin, section, f"{text} The sections are {', '.join(self.values)}.")

    def checked(self) -> StudyConfig:
        """Make the configuration, or refuse it with every fault."""
        self._settle()
        search = self.values["search"]
        given = [self._origins["search", key] for key in _CLASSIC if key in search]
        chosen = self._origins["search", "strategy"] if "strategy" in search else (0, "")
        if given and max(given)[0] > chosen[0]:
            search["strategy"] = "sampler"
        if search.get("download") is True:
            self._add_modern()
        space, wrong = parse_space(self.values["space"])
        self._explain("space", wrong)
        fixed = {key: dim.ends[0] for key, dim in space.items() if len(dim.ends) == 1}
        space = {key: dim for key, dim in space.items() if key not in fixed}
        self.values["train"] = default_params(space) | self.values["train"] | fixed
        made: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            try:
                made[name] = section(**self.values[name])
            except ValidationError as err:
                self._explain(name, explain(err, fields_of(section)))
        name = self.values["study"].get("name", "")
        if isinstance(name, str) and len(name.encode()) > LONGEST_NAME:
            text = f"must have at most {LONGEST_NAME} bytes, but has {len(name.encode())}."
            self._explain("study", [Fault("name", text)])
        if not self.faults:
            self._explain("space", space_faults(space, made["train"]))
            endless = ", ".join(key for key, dim in space.items() if dim.n_points is None)
            if endless and (sampler := made["search"].sampler) in EXHAUSTIVE:
                rule = f"{sampler} visits every setting, so each dimension needs choices or a step"
                text = f"{rule}, but these have neither: {endless}."
                self._explain("search", [Fault("sampler", text)])
            self._explain("ablation", parse_factors(made["ablation"].factors or {})[1])
        if self.faults:
            raise ConfigError(*self.faults)
        return StudyConfig(**made, space=space)

    def _add_modern(self) -> None:
        """Search modern backbones, too, where the default ones are searched."""
        own = self.values["space"].get("backbone")
        names = [modern.name for modern in MODERN]
        if own == DEFAULT_SPACE["backbone"]:
            self.values["space"]["backbone"] = {"choices": [*own["choices"], *names]}
        elif not any(name in str(own) for name in names):  # as in a study that did so before
            text = "adds backbones to the default ones, but others are given; name there all of"
            self._explain("search", [Fault("download", f"{text} {', '.join(names)} you want.")])

    def _settle(self) -> None:
        """Where a key is both searched and given a value, let the later layer win.

        A file that `study init` wrote gives every key its default; that contradicts no dimension.
        """
        train, space = self.values["train"], self.values["space"]
        for key in [key for key in space if key in train and key in fields_of(TrainConfig)]:
            searched, given = self._origins["space", key], self._origins["train", key]
            if searched == given and train[key] != fields_of(TrainConfig)[key].default:
                text = f"is given a value by train.{key} too; remove one of the two."
                self._explain("space", [Fault(key, text)])
            del (space if searched < given else train)[key]

    def _explain(self, section: str, faults: Iterable[Fault]) -> None:
        """Add faults, each with where the last of its keys was given: that one broke a rule."""
        for fault in faults:
            sections = ("train", "space") if section in ("train", "space") else (section,)
            places = itertools.product(sections, (fault.key.partition(".")[0], *fault.about))
            origin = max(self._origins[place] for place in places)
            self._add(origin, ".".join(filter(None, (section, fault.key))), fault.text)

    def _add(self, origin: _Origin, where: str, text: str) -> None:
        self.faults.append(": ".join(filter(None, (origin[1], where, text))))


def _unusable(value: object, depth: int) -> str | None:
    """Say why no key can take a value: no database, file system or library could keep it."""
    if depth > _DEEPEST:
        return f"must be nested at most {_DEEPEST} deep, but is deeper."
    if isinstance(value, str) and (_CONTROL.search(value) or len(value) > _LONGEST_TEXT):
        rule = f"must be at most {_LONGEST_TEXT} characters, none of them a control character"
        return f"{rule}, but got {ascii(value[:50])} of {len(value)}."
    if isinstance(value, int) and not -_FIRST_TOO_LARGE < value < _FIRST_TOO_LARGE:
        return "must be a number of at most 64 bits (below 9.2e18), but is larger."
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = itertools.chain(value, value.values())
    elif isinstance(value, list | tuple):
        inner = value
    return next(filter(None, (_unusable(item, depth + 1) for item in inner)), None)


def _homes(key: str) -> list[str]:
    """Return the sections that have a key; a dimension's is [train]."""
    return [name for name, section in SECTIONS.items() if key in fields_of(section)]


def check_inputs(config: StudyConfig) -> None:
    """Refuse a missing data folder and unknown backbones before anything is written.

    It loads torch.

    Raises:
        ConfigError: Everything that is wrong.
    """
    from core.data.sources import DataError, check_folder
    from core.models.sources import BackboneError, find_source

    searched = config.space.get("backbone")
    section, names = ("space", searched.ends) if searched else ("train", [config.train.backbone])
    checks: list[tuple[str, Any, Any]] = [(f"{section}.backbone", find_source, n) for n in names]
    kind, _, path = config.data.source.partition(":")
    if kind == "folder":
        checks.append(("data.source", check_folder, Path(path).expanduser()))
    faults = []
    for key, check, value in checks:
        try:
            check(value)
        except (BackboneError, DataError, OSError) as err:
            faults.append(f"{key}: {err}")
    if faults:
        raise ConfigError(*faults)
