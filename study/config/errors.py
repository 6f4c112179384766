"""What is wrong with a configuration, in words: key, rule, value and remedy."""

import difflib
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from core.config import SECTION, TrainConfig, fields_of


class ConfigError(ValueError):
    """The configuration is wrong; `faults` lists all, each with its key, rule and value."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one key, or with several together.

    Attributes:
        key: Key within its section; empty for a rule between several keys.
        text: Rule, value and remedy.
        about: The keys that a rule between several keys is about.
    """

    key: str
    text: str
    about: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """Return the text with the key that it is about, for places that do not name it."""
        return self.text if f"{self.key}=" in self.text else f"{self.key} {self.text}".strip()


def near(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` for the known word nearest to a misspelt one, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def explain(err: ValidationError, known: Iterable[str]) -> list[Fault]:
    """Say in words what pydantic found wrong with a section of `known` keys."""
    faults: list[Fault] = []
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for error in err.errors(include_url=False):
        if error["type"] == "rules":
            faults += [Fault("", text, keys) for keys, text in error["ctx"]["rules"]]
            continue
        key = str(error["loc"][0])
        if error["type"] == "unexpected_keyword_argument":
            faults.append(Fault(key, f"is no known key.{near(key, known)}"))
        elif error["type"] == "missing":
            faults.append(Fault(key, "must be given."))
        else:
            by_key.setdefault(key, []).append(error)
    for key, errors in by_key.items():
        faults.append(Fault(key, _sentence(errors, key, errors[0]["input"])))
    return faults


def _sentence(errors: Iterable[Mapping[str, Any]], key: str, value: object) -> str:
    """Join what every type that a key may have says of its value."""
    rules, hint = [], ""
    for error in errors:
        rule = error["msg"].removeprefix("Value error, ")
        rules.append(rule.replace("Input should be", "must be"))
        if error["type"] == "literal_error":
            hint = near(str(value), re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    first, *others = dict.fromkeys(rules)
    rule = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    return f"{rule}, but got {key}={value!r}.{hint}"


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
    field = fields_of(TrainConfig)[key]
    kind: Any = Annotated[field.annotation, *field.metadata, "key"]
    return TypeAdapter(kind, config=SECTION)


def check_value(key: str, value: object, name: str = "") -> tuple[Any, list[Fault]]:
    """Check one value of a training key against the key's type and range.

    Args:
        key: Training key.
        value: A value of it.
        name: What messages call the value; the key where empty.

    Returns:
        The value as the key holds it, and what is wrong.
    """
    try:
        return _adapter(key).validate_python(value), []
    except ValidationError as err:
        text = _sentence(err.errors(include_url=False), name or key, value)
        return None, [Fault(key, text)]


@functools.cache
def is_number(key: str) -> bool:
    """Say whether a training key may hold numbers."""
    return bool({int, float} & set(_types(fields_of(TrainConfig)[key].annotation)))


def _types(hint: Any) -> list[Any]:
    inner = typing.get_args(hint)
    return [kind for part in inner for kind in _types(part)] if inner else [hint]
