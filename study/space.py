"""The search space: its dimensions, how a trial draws from it, and the recipes tried first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from study.fields import Fault, check_value, is_float, is_int, keys_of, near

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ParamValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Range:
    """A dimension of numbers; whole numbers where `low` is an `int`.

    Attributes:
        low: Smallest value, included.
        high: Largest value, included.
        log: Draw uniformly in the logarithm.
        step: Distance between neighbouring values; None draws from the whole range.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_int(self) -> bool:
        """Say whether the values are whole numbers."""
        return isinstance(self.low, int)

    @property
    def n_points(self) -> int | None:
        """Count the values; None where they are a continuum."""
        if self.step is None and not self.is_int:
            return None
        # The small share keeps 0.3 / 0.1 = 2.999... at three steps.
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    @property
    def ends(self) -> tuple[ParamValue, ...]:
        """Return the extreme values."""
        return (self.low, self.high)

    def holds(self, value: ParamValue) -> bool:
        """Say whether a value can be drawn."""
        return _is_number(value) and self.nearest(value) == value

    def nearest(self, value: ParamValue) -> ParamValue:
        """Return the value of the range that is nearest to a number."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return self.low
        inside = min(max(value, self.low), self.high)
        if self.step is not None:
            last = (self.n_points or 1) - 1
            inside = self.low + self.step * min(round((inside - self.low) / self.step), last)
        return round(inside) if self.is_int else float(inside)

    def __str__(self) -> str:
        text = f"{self.low:g} to {self.high:g}"
        return (
            text + (", log" if self.log else "") + (f", step {self.step:g}" if self.step else "")
        )


@dataclass(frozen=True, slots=True)
class Choices:
    """A dimension of listed values.

    Attributes:
        choices: The values, at least two, no two equal.
    """

    choices: tuple[ParamValue, ...]

    @property
    def n_points(self) -> int | None:
        """Count the values."""
        return len(self.choices)

    @property
    def ends(self) -> tuple[ParamValue, ...]:
        """Return all values: a list has no order in which two of them were extreme."""
        return self.choices

    def holds(self, value: ParamValue) -> bool:
        """Say whether a value can be drawn."""
        return any(value == choice and type(value) is type(choice) for choice in self.choices)

    def nearest(self, value: ParamValue) -> ParamValue:
        """Return the value itself where it is listed, else the nearest number, else the first."""
        if self.holds(value) or not _is_number(value):
            return value if self.holds(value) else self.choices[0]
        numbers = [choice for choice in self.choices if _is_number(choice)]
        return min(numbers, key=lambda n: abs(n - value), default=self.choices[0])

    def __str__(self) -> str:
        return " | ".join("none" if choice is None else str(choice) for choice in self.choices)


Dimension = Range | Choices
Space = Mapping[str, Dimension]


def _is_number(value: ParamValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_space(
    raw: Mapping[str, object],
) -> tuple[dict[str, Dimension], dict[str, Any], list[Fault]]:
    """Read the [space] section.

    Args:
        raw: Key of the training section -> a table `{low, high}` or `{choices}`, a list of
            choices, or a plain value.

    Returns:
        Dimensions, keys that a plain value (or a single choice) fixes, and faults.
    """
    space: dict[str, Dimension] = {}
    fixed: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, value in raw.items():
        if key not in keys_of(TrainConfig):
            hint = near(key, keys_of(TrainConfig))
            faults.append(Fault(key, f"is no training key, so it cannot be searched.{hint}"))
            continue
        table = {"choices": value} if isinstance(value, list | tuple) else value
        if not isinstance(table, Mapping):
            fixed[key], wrong = check_value(TrainConfig, key, table)
        elif "choices" in table:
            choices, wrong = _parse_choices(key, table)
            if len(choices) == 1:
                fixed[key] = choices[0]
            elif choices:
                space[key] = Choices(choices)
        else:
            found, wrong = _parse_range(key, table)
            if found is not None:
                space[key] = found
        faults.extend(wrong)
    if "monitor" in space:
        text = (
            "says which trial is best, so all trials must agree on it; set train.monitor instead."
        )
        faults.append(Fault("monitor", text))
    return space, fixed, faults


def _parse_choices(
    key: str, table: Mapping[str, object]
) -> tuple[tuple[ParamValue, ...], list[Fault]]:
    extra = [name for name in table if name != "choices"]
    if extra:
        text = f"takes choices alone, or low and high, but got {', '.join(extra)} beside choices."
        return (), [Fault(key, text)]
    listed = table["choices"]
    if not isinstance(listed, list | tuple) or not listed:
        rule = "choices must be a list of at least one value"
        return (), [Fault(key, f"{rule}, but got choices={listed!r}.")]
    values: list[ParamValue] = []
    faults: list[Fault] = []
    for value in listed:
        checked, wrong = check_value(TrainConfig, key, value)
        faults.extend(wrong)
        if not wrong and checked in values:
            faults.append(Fault(key, f"choices must differ, but got {value!r} twice."))
        values.append(checked)
    return (() if faults else tuple(values)), faults


def _parse_range(key: str, table: Mapping[str, object]) -> tuple[Range | None, list[Fault]]:
    known = ("low", "high", "log", "step")
    faults = [
        Fault(
            key, f"takes low, high, log and step, or choices, but got {name}.{near(name, known)}"
        )
        for name in table
        if name not in known
    ]
    if not (is_int(TrainConfig, key) or is_float(TrainConfig, key)):
        faults.append(Fault(key, "is no number, so it takes choices = [...], not low and high."))
    elif not faults and not {"low", "high"} <= set(table):
        faults.append(Fault(key, "needs both low and high (or choices = [...])."))
    if faults:
        return None, faults
    return _checked_range(key, table)


def _checked_range(key: str, table: Mapping[str, object]) -> tuple[Range | None, list[Fault]]:
    kind = int if is_int(TrainConfig, key) else float
    faults: list[Fault] = []
    bounds: dict[str, Any] = {}
    for name in ("low", "high"):
        bounds[name], wrong = check_value(TrainConfig, key, table[name])
        faults += [Fault(key, f"{name} {fault.text}") for fault in wrong]
    log, step = table.get("log", False), table.get("step")
    if not isinstance(log, bool):
        faults.append(Fault(key, f"log must be true or false, but got log={log!r}."))
    if step is not None and not _is_step(step, kind):
        noun = "whole number" if kind is int else "number"
        faults.append(Fault(key, f"step must be a {noun} > 0, but got step={step!r}."))
    if faults:
        return None, faults
    steps: Any = step
    size = None if steps is None else kind(steps)
    found = Range(kind(bounds["low"]), kind(bounds["high"]), bool(log), size)
    faults = [Fault(key, text) for text in _range_faults(found)]
    return (None, faults) if faults else (found, [])


def _is_step(step: object, kind: type) -> bool:
    if isinstance(step, bool) or not isinstance(step, int | float):
        return False
    return 0 < step < math.inf and (kind is float or isinstance(step, int))


def _range_faults(dimension: Range) -> list[str]:
    low, high, step = dimension.low, dimension.high, dimension.step
    faults = []
    if low >= high:
        faults.append(
            f"low must be < high, but got low={low!r} and high={high!r}; "
            "a plain value instead of the table fixes the key."
        )
    elif step is not None and step > high - low:
        faults.append(f"step must be <= high - low, but got step={step!r}.")
    if dimension.log and low <= 0:
        faults.append(f"low must be > 0 where log = true, but got low={low!r}.")
    if dimension.log and step is not None:
        faults.append(f"log = true and step exclude each other, but got step={step!r}.")
    return faults


def n_points(space: Space) -> int | None:
    """Count the settings that a space holds (1 where it is empty); None for a continuum."""
    total = 1
    for dimension in space.values():
        if dimension.n_points is None:
            return None
        total *= dimension.n_points
    return total


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the space as Optuna writes it."""
    return {name: _distribution(dimension) for name, dimension in space.items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    if dimension.is_int:
        step = int(dimension.step or 1)
        return IntDistribution(int(dimension.low), int(dimension.high), dimension.log, step)
    return FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step)


def apply_params(base: TrainConfig, params: Mapping[str, ParamValue]) -> TrainConfig:
    """Return the training configuration with a trial's values in place.

    Raises:
        ValueError: A name is no training key, or a value breaks a rule of `TrainConfig`.
    """
    known = keys_of(TrainConfig)
    for name in params:
        if name not in known:
            raise ValueError(f"params must be training keys, but got {name!r}.{near(name, known)}")
    changes: dict[str, Any] = dict(params)
    return replace(base, **changes)


_LINEAR_PROBE = "linear-probe"
# Rates for SGD with momentum at batch 32; a head ten times as fast as the backbone is D2L's recipe
# (https://d2l.ai, section 14.2). Measured on EfficientNet-Lite0, one seed each: on digits (64 px,
# 3 epochs, 400 pictures) the probe has 78.8 % at 1e-3 and 71.6 % at 1e-2, where its loss grows,
# and with frozen batch norms three trained stages stay at chance at 3e-3; on hot dog photos
# (128 px, 8 to 15 epochs) 1e-3 does better than 3e-3 at every depth tried.
RECIPES: dict[str, dict[str, ParamValue]] = {
    _LINEAR_PROBE: {"freeze_depth": MAX_FREEZE_DEPTH, "base_lr": 1e-3, "head_lr_mult": 10.0},
    "fine-tune-half": {"freeze_depth": 3, "base_lr": 1e-3, "head_lr_mult": 10.0},
    "fine-tune-all": {"freeze_depth": 0, "base_lr": 1e-3, "head_lr_mult": 10.0},
}
"""Settings that are known to work, tried before the sampler draws."""


def recipes(
    space: Space, base: TrainConfig, names: Iterable[str] | None = None
) -> dict[str, dict[str, ParamValue]]:
    """Express the known recipes in a space.

    Rates are moved to the nearest value of their dimension. A recipe is left out where the space
    cannot express its freeze depth, or searches none of its keys. The linear probe comes once per
    backbone; the others with the first one.

    Args:
        space: The search space.
        base: Gives the values of keys that the recipe does not name.
        names: Only these; None for all.

    Returns:
        Name -> value of every dimension of the space; no two are equal.
    """
    wanted = list(RECIPES) if names is None else [name for name in RECIPES if name in set(names)]
    found: dict[str, dict[str, ParamValue]] = {}
    for name in wanted:
        if not set(RECIPES[name]) & set(space) or not _can_express(RECIPES[name], space, base):
            continue
        for backbone in _backbones(space) if name == _LINEAR_PROBE else _backbones(space)[:1]:
            recipe = RECIPES[name] | ({} if backbone is None else {"backbone": backbone})
            params = {
                key: dim.nearest(recipe.get(key, getattr(base, key))) for key, dim in space.items()
            }
            if params not in found.values():
                label = name if backbone is None else f"{name} {backbone}"
                found[label] = params
    return found


def _backbones(space: Space) -> Sequence[ParamValue]:
    dimension = space.get("backbone")
    return dimension.choices if isinstance(dimension, Choices) else [None]


def _can_express(recipe: Mapping[str, ParamValue], space: Space, base: TrainConfig) -> bool:
    depth = recipe["freeze_depth"]
    dimension = space.get("freeze_depth")
    return base.freeze_depth == depth if dimension is None else dimension.holds(depth)
