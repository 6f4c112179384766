"""A section of the configuration as pydantic checks it: each key's type, range and meaning."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = type["DataclassInstance"]
_SIGNS = {">=": "ge", ">": "gt", "<=": "le", "<": "lt"}
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)
_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a text in quotes",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be >= {ge:g}",
    "greater_than": "must be > {gt:g}",
    "less_than_equal": "must be <= {le:g}",
    "less_than": "must be < {lt:g}",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one key.

    Attributes:
        key: Key within its section; empty for a rule between several keys.
        text: Rule, value and remedy.
    """

    key: str
    text: str


def near(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` for the known word nearest to a misspelt one, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def keys_of(section: Section) -> list[str]:
    """List a section's keys in the order in which they are declared."""
    return [item.name for item in dataclasses.fields(section)]


@functools.cache
def hints_of(section: Section) -> dict[str, Any]:
    """Return a section's type hints, with what `Annotated` adds to them."""
    return typing.get_type_hints(section, include_extras=True)


def takes_none(section: Section, key: str) -> bool:
    """Say whether a key may be left out, so that the text `none` stands for that."""
    arms = typing.get_args(_bare(hints_of(section)[key]))
    return type(None) in arms and str not in arms


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def is_int(section: Section, key: str) -> bool:
    """Say whether a key holds whole numbers."""
    return _holds(section, key, int)


def is_float(section: Section, key: str) -> bool:
    """Say whether a key holds real numbers."""
    return _holds(section, key, float)


def _holds(section: Section, key: str, kind: type) -> bool:
    hint = _bare(hints_of(section)[key])
    return hint is kind or kind in typing.get_args(hint)


@functools.cache
def form(section: Section) -> type[BaseModel]:
    """Build the pydantic model of a section: the same keys, with their ranges and meanings."""
    hints = hints_of(section)
    fields: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        rules = {_SIGNS[sign]: bound for sign, bound in item.metadata.get("rules", {}).items()}
        known: Any = Field(description=item.metadata.get("help"), **rules)
        fields[item.name] = (Annotated[hints[item.name], known], item.default)
    model: type[BaseModel] = create_model(
        section.__name__, __config__=_STRICT, __doc__=section.__doc__, **fields
    )
    return model


@functools.cache
def _adapter(section: Section, key: str) -> TypeAdapter[Any]:
    item = form(section).model_fields[key]
    kind: Any = Annotated[item.annotation, item]
    return TypeAdapter(kind, config=_STRICT)


def check_value(section: Section, key: str, value: object) -> tuple[Any, list[Fault]]:
    """Check one value against its key's type and range; returns the value as the key holds it."""
    if (value is None or value == "none") and takes_none(section, key):
        return None, []
    try:
        return _adapter(section, key).validate_python(value), []
    except ValidationError as err:
        return None, _faults(err, key, value)


def check_section(
    section: Section, raw: Mapping[str, object]
) -> tuple[dict[str, Any], list[Fault]]:
    """Check the keys of a section one by one.

    Returns:
        The values that are right, and what is wrong with the others.
    """
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, value in raw.items():
        if key not in form(section).model_fields:
            faults.append(Fault(key, f"is no key of this section.{near(key, keys_of(section))}"))
            continue
        checked, wrong = check_value(section, key, value)
        faults.extend(wrong)
        if not wrong:
            values[key] = checked
    return values, faults


def _faults(err: ValidationError, key: str, value: object) -> list[Fault]:
    error = err.errors(include_url=False)[0]
    context: dict[str, Any] = error.get("ctx", {})
    remedy = ""
    if error["type"] == "value_error":
        rule = str(context["error"])
    elif error["type"] == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        rule = f"must be one of {', '.join(choices)}"
        remedy = near(str(value), choices)
    else:
        rule = _RULES.get(error["type"], error["msg"]).format(**context)
    return [Fault(key, f"{rule}, but got {key}={value!r}.{remedy}")]
