"""The JSON schema of study.toml, for editors and for `python -m study schema`."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import TrainConfig
from study.config import DEFAULT_SPACE, SECTIONS
from study.fields import form, is_float, is_int


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file."""
    sections = {name: form(section).model_json_schema() for name, section in SECTIONS.items()}
    values = sections["train"]["properties"]
    space = {
        "description": "Searched training keys; given as a whole, it replaces the default space.",
        "type": "object",
        "additionalProperties": False,
        "default": DEFAULT_SPACE,
        "properties": {key: _dimension_schema(key, value) for key, value in values.items()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Frostline study",
        "type": "object",
        "additionalProperties": False,
        "properties": {**sections, "space": space},
    }


def _dimension_schema(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: rule for name, rule in value.items() if name not in ("title", "default")}
    listed = {"type": "array", "items": plain, "minItems": 1}
    kinds: list[dict[str, Any]] = [plain, listed, _table({"choices": listed}, ["choices"])]
    if is_int(TrainConfig, key) or is_float(TrainConfig, key):
        step = {"type": "number", "exclusiveMinimum": 0}
        ends = {"low": plain, "high": plain, "log": {"type": "boolean"}, "step": step}
        kinds.append(_table(ends, ["low", "high"]))
    return {"description": f"Searches train.{key}, or fixes it by a plain value.", "anyOf": kinds}


def _table(properties: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }
