"""What an ablation varies: factors, their levels, and the ones proposed for a baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from core.config import MAX_FREEZE_DEPTH, TrainConfig, fields_of
from core.training.no_effect import without_effect
from study.config.errors import Fault, check_value, near
from study.config.formatting import format_value
from study.config.search_space import RECIPES, ParamValue, Space, apply_params

_KEYS = fields_of(TrainConfig)
NEUTRAL: dict[str, dict[str, Any]] = {
    key: {key: marked["neutral"], **marked.get("neutral_with", {})}
    for key, field in _KEYS.items()
    if (marked := cast(dict[str, Any], field.json_schema_extra or {}))
}
"""Components that `loco` removes: key -> the settings without it."""

_PROPOSED: dict[str, tuple[ParamValue, ...]] = {
    "weights": ("none",),
    "freeze_depth": (0, 3, MAX_FREEZE_DEPTH),
    "head_lr_mult": (1.0,),
    "weight_decay": (0.0,),
    "augment": ("none",),
    "schedule": ("constant",),
    "normalize": ("none",),
    "head_init": ("default", "xavier", "zero"),
}


@dataclass(frozen=True, slots=True)
class Level:
    """One setting of a factor: what tables call it, and its training keys with their values."""

    label: str
    overrides: dict[str, ParamValue]


@dataclass(frozen=True, slots=True)
class Factor:
    """Something that an ablation varies.

    Attributes:
        name: A training key, or a user's name for several keys together.
        baseline: Label of the baseline's own level.
        levels: The other levels.
    """

    name: str
    baseline: str
    levels: tuple[Level, ...]

    @property
    def labels(self) -> list[str]:
        """List the labels of all levels, the baseline's first."""
        return [self.baseline, *(level.label for level in self.levels)]

    def overrides(self, label: str) -> dict[str, ParamValue]:
        """Return the settings of a level; the baseline's own has none."""
        return next((dict(each.overrides) for each in self.levels if each.label == label), {})


Levels = Mapping[str, Sequence[Level]]


def parse_factors(raw: Mapping[str, object]) -> tuple[dict[str, list[Level]], list[Fault]]:
    """Read [ablation.factors]; return the levels of each factor, and what is wrong.

    It has a training key -> a value or a list of values; or any name -> a table of levels, each a
    table of training keys.
    """
    found: dict[str, list[Level]] = {}
    faults: list[Fault] = []
    for name, value in raw.items():
        if isinstance(value, Mapping):
            levels, texts = _read_tables(value)
        else:
            levels, texts = _read_values(name, value)
        if not levels and not texts:
            texts.append(f"must have at least one level, but got {value!r}.")
        settings = [level.overrides for level in levels]
        twice = {level.label for level in levels if settings.count(level.overrides) > 1}
        texts += [f"levels must differ, but got {label} twice." for label in sorted(twice)]
        found[name] = levels
        faults += [Fault(f"factors.{name}", text) for text in texts]
    return found, faults


def _read_values(key: str, value: object) -> tuple[list[Level], list[str]]:
    if key not in _KEYS:
        rule = "is no training key, so its levels must be tables of training keys."
        return [], [f"{rule}{near(key, _KEYS)}"]
    listed = value if isinstance(value, list | tuple) else [value]
    checked = [check_value(key, item) for item in listed]
    values = [item for item, wrong in checked if not wrong]
    labels = [format_value(item) for item in values]
    if len(set(labels)) < len(labels):  # three figures do not tell them apart
        labels = [str(item) for item in values]
    levels = [Level(label, {key: item}) for label, item in zip(labels, values, strict=True)]
    return levels, [fault.text for _, wrong in checked for fault in wrong]


def _read_tables(tables: Mapping[str, object]) -> tuple[list[Level], list[str]]:
    levels, texts = [], []
    for label, table in tables.items():
        if not isinstance(table, Mapping) or not table:
            texts.append(f"level {label} must be a table of training keys, but got {table!r}.")
            continue
        overrides: dict[str, ParamValue] = {}
        for key, value in table.items():
            if key in _KEYS:
                overrides[key], wrong = check_value(key, value)
                texts += [f"level {label}: {fault.text}" for fault in wrong]
            else:
                texts.append(f"level {label}: {key} is no training key.{near(key, _KEYS)}")
        levels.append(Level(label, overrides))
    return levels, texts


def make_factors(baseline: TrainConfig, levels: Levels) -> tuple[list[Factor], list[Fault]]:
    """Compare levels with a baseline: its own level is dropped, and the others must be allowed.

    Return the factors that have a level other than the baseline's, and what is wrong.
    """
    factors, faults = [], []
    for name, listed in levels.items():
        others = [level for level in listed if not _is_in(baseline, level)]
        if not others:
            own = ", ".join(level.label for level in listed)
            text = f"must have a level other than the baseline's, but got {own} only."
            faults.append(Fault(f"factors.{name}", text))
            continue
        for level in others:
            if rule := _broken_rule(baseline, level):
                faults.append(Fault(f"factors.{name}", f"level {level.label}: {rule}"))
        own = format_value(getattr(baseline, name)) if name in _KEYS else "baseline"
        if own in [level.label for level in others]:  # 0.01234 and 0.0123, say
            own += " (baseline)"
        factors.append(Factor(name, own, tuple(others)))
    return factors, faults


def _is_in(baseline: TrainConfig, level: Level) -> bool:
    return all(getattr(baseline, key) == value for key, value in level.overrides.items())


def propose_levels(baseline: TrainConfig, space: Space) -> dict[str, list[Level]]:
    """Propose levels for a baseline whose user named none.

    What was searched, in `space`, is also tried at its default in the recipes.
    """
    wanted: dict[str, list[ParamValue]] = {key: list(values) for key, values in _PROPOSED.items()}
    for key in space:
        if key != "seed":
            wanted.setdefault(key, []).append(_recipe_default(key, space))
    found = {
        key: _levels_of(baseline, key, values)
        for key, values in wanted.items()
        if not _has_no_effect(baseline, key)
    }
    return {key: levels for key, levels in found.items() if levels}


def recipe_levels(baseline: TrainConfig, space: Space) -> dict[str, list[Level]]:
    """Return the searched settings at their default in the recipes: where a path begins."""
    keys = [key for key in space if key != "seed"]
    found = {key: _levels_of(baseline, key, [_recipe_default(key, space)]) for key in keys}
    return {key: levels for key, levels in found.items() if levels}


def _recipe_default(key: str, space: Space) -> ParamValue:
    value = RECIPES["fine-tune-all"].get(key, getattr(TrainConfig(), key))
    return space[key].nearest(value)


def _levels_of(baseline: TrainConfig, key: str, values: Iterable[ParamValue]) -> list[Level]:
    others = [value for value in dict.fromkeys(values) if value != getattr(baseline, key)]
    levels = [Level(format_value(value), {key: value}) for value in others]
    return [level for level in levels if not _broken_rule(baseline, level)]


def _broken_rule(baseline: TrainConfig, level: Level) -> str | None:
    """Say which rule between keys a level breaks, as adamw does with nesterov; None if none."""
    try:
        apply_params(baseline, level.overrides)
    except ValueError as err:
        return str(err)
    return None


def _has_no_effect(baseline: TrainConfig, key: str) -> bool:
    is_scale = key == "head_lr_mult" and baseline.freeze_depth == MAX_FREEZE_DEPTH  # of base_lr
    return is_scale or key in without_effect(baseline)


def components(baseline: TrainConfig) -> dict[str, list[Level]]:
    """List what can be taken out of a baseline, each as a factor whose one level lacks it."""
    trains_norms = baseline.batch_norm == "auto" and baseline.weights == "none"
    found = {}
    for key, without in NEUTRAL.items():
        if key == "batch_norm" and trains_norms:
            continue
        level = Level(format_value(without[key]), dict(without))
        if not _is_in(baseline, level) and not _has_no_effect(baseline, key):
            found[key] = [level]
    return found
