"""What is wrong with a configuration, in words: key, rule, value and remedy."""

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
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
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    found = found or [name for name in known if word in name.split("_")]  # lr: base_lr
    return f" Did you mean {found[0]}?" if found else ""


def explain(err: ValidationError, known: Iterable[str]) -> list[Fault]:
    """Say in words what pydantic found wrong with a section of `known` keys."""
    errors = err.errors(include_url=False)
    if errors[0]["type"] == "rules":  # these are checked once every key is right
        return [Fault("", text, keys) for keys, text in errors[0]["ctx"]["rules"]]
    faults = []
    for key, group in itertools.groupby(errors, key=lambda error: str(error["loc"][0])):
        first, *others = group
        if first["type"] == "unexpected_keyword_argument":
            text = f"is no known key.{near(key, known)}"
        elif first["type"] == "missing":
            text = "must be given."
        else:
            text = _sentence([first, *others], key)
        faults.append(Fault(key, text))
    return faults


def _sentence(errors: Sequence[Mapping[str, Any]], key: str) -> str:
    """Join what every type that a key may have says of its value."""
    rules, value, hint = [], errors[0]["input"], ""
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
    """Check a value of a training key; return it as the key holds it, and what is wrong.

    Messages call it `name`, else by the key.
    """
    try:
        return _adapter(key).validate_python(value), []
    except ValidationError as err:
        return None, [Fault(key, _sentence(err.errors(include_url=False), name or key))]


def takes_numbers(key: str) -> bool:
    """Say whether a training key may hold numbers."""
    return bool(re.search(r"\b(int|float)\b", str(fields_of(TrainConfig)[key].annotation)))
