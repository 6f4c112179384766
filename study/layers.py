"""Layers of a configuration (defaults, file, --set, flags) merged, each key with its origin."""

import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from study.fields import near


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a key was said.

    Attributes:
        rank: Layer, counted from the defaults at 0; the higher one wins.
        label: What a message calls the place: a file, `--set` or a flag.
    """

    rank: int
    label: str


class Layers:
    """The merged sections, with the origin of every key and the faults found while merging.

    Attributes:
        values: Section -> key -> value as it was written.
        faults: Complete messages.
    """

    def __init__(self, sections: Mapping[str, Sequence[str]], source: str) -> None:
        """Begin with nothing said.

        Args:
            sections: The known keys of each section.
            source: What a message calls the place of a key that nobody said.
        """
        self._known = sections
        self._origins: dict[tuple[str, str], Origin] = {}
        self._source = Origin(0, source)
        self.values: dict[str, dict[str, Any]] = {name: {} for name in sections}
        self.faults: list[str] = []

    def origin(self, section: str, key: str) -> Origin:
        """Return where a key was said."""
        return self._origins.get((section, key), self._source)

    def latest(self, sections: Iterable[str], keys: Iterable[str]) -> Origin:
        """Return where the last of some keys was said, in any of some sections."""
        places = itertools.product(sections, keys)
        return max(
            (self.origin(*place) for place in places),
            key=attrgetter("rank"),
            default=self._source,
        )

    def drop(self, section: str, key: str) -> None:
        """Forget a key."""
        del self.values[section][key]

    def replace(self, section: str, values: Mapping[str, Any], origin: Origin) -> None:
        """Replace a whole section."""
        self.values[section] = deepcopy(dict(values))
        self._origins |= {(section, key): origin for key in values}

    def add_tables(self, raw: Mapping[str, object], origin: Origin) -> None:
        """Lay a configuration file's tables over what is there; its [space] replaces the space."""
        for name, table in raw.items():
            if name not in self._known:
                self.faults.append(f"{origin.label}: {name}: {self._no_section(name)}")
            elif not isinstance(table, Mapping):
                self.faults.append(
                    f"{origin.label}: {name}: must be a table, [{name}], but got {table!r}."
                )
            elif name == "space":
                self.replace(name, table, origin)
            else:
                for key, value in table.items():
                    self._put([name, key], value, origin)

    def add_override(self, text: str, origin: Origin) -> None:
        """Lay `section.key=value` over what is there; the section may be left out if it is clear.

        The value is read as TOML, and as a text where it is none.
        """
        name, sign, written = text.partition("=")
        path = name.strip().split(".")
        if not sign or not all(path):
            self.faults.append(
                f"{origin.label}: must be section.key=value, but got {text!r}; "
                "say, --set train.epochs=5."
            )
            return
        path = self._with_section(path, origin)
        if path:
            self.add_value(path, _toml_value(written.strip()), origin)

    def add_value(self, path: Sequence[str], value: object, origin: Origin) -> None:
        """Lay one value over what is there."""
        if len(path) == 1:
            self.add_tables({path[0]: value}, origin)
        elif path[0] not in self._known:
            self.faults.append(f"{origin.label}: {path[0]}: {self._no_section(path[0])}")
        else:
            self._put(path, value, origin)

    def _put(self, path: Sequence[str], value: object, origin: Origin) -> None:
        section, key, *inner = path
        homes = self._homes(key)
        if section != "space" and homes and section not in homes:
            text = f"is no key of this section; it belongs into [{'] or ['.join(homes)}]."
            self.faults.append(f"{origin.label}: {section}.{key}: {text}")
            return
        self._origins[section, key] = origin
        table = self.values[section]
        for part in inner:
            if not isinstance(table.get(key), dict):
                table[key] = {}
            table, key = table[key], part
        table[key] = deepcopy(value)

    def _with_section(self, path: list[str], origin: Origin) -> list[str]:
        """Find the section of a key that was given without one."""
        if path[0] in self._known:
            return path
        homes = self._homes(path[0])
        if len(homes) == 1:
            return [homes[0], *path]
        if homes:
            meant = " or ".join(f"{home}.{path[0]}" for home in homes)
            text = f"is a key of several sections; say {meant}."
        else:
            text = self._no_section(path[0])
        self.faults.append(f"{origin.label}: {path[0]}: {text}")
        return []

    def _homes(self, key: str) -> list[str]:
        """Return the sections that have a key; a dimension's is its setting's."""
        return [name for name, keys in self._known.items() if key in keys and name != "space"]

    def _no_section(self, name: str) -> str:
        homes = [section for section, keys in self._known.items() if name in keys]
        if homes:
            return f"stands in no section; it belongs into [{homes[0]}]."
        every = {key for keys in self._known.values() for key in keys}
        hint = near(name, [*self._known, *every])
        return f"is no section or key.{hint} The sections are {', '.join(self._known)}."


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: It cannot be read or is not TOML; the text says why, without the path.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as err:
        raise ValueError("there is no such file; `python -m study init` writes one.") from err
    except OSError as err:
        raise ValueError(f"cannot be read: {err.strerror}.") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"must be TOML, but {str(err)[0].lower()}{str(err)[1:]}.") from err


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
