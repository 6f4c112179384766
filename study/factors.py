"""What an ablation varies: factors, their levels, and the ones proposed for a baseline."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from study.fields import Fault, check_value, keys_of, near
from study.space import RECIPES, ParamValue, Space, apply_params
from study.words import format_value

# A component's level at which it does nothing, or does what the plainest recipe does. The keys
# that must go with it stand beside it: Nesterov's form needs momentum.
NEUTRAL: dict[str, dict[str, ParamValue]] = {
    "weights": {"weights": "none"},
    "freeze_depth": {"freeze_depth": 0},
    "head_init": {"head_init": "default"},
    "head_lr_mult": {"head_lr_mult": 1.0},
    "weight_decay": {"weight_decay": 0.0},
    "momentum": {"momentum": 0.0, "nesterov": False},
    "schedule": {"schedule": "constant"},
    "warmup_epochs": {"warmup_epochs": 0.0},
    "augment": {"augment": "none"},
    "normalize": {"normalize": "none"},
    "label_smoothing": {"label_smoothing": 0.0},
    "mixup": {"mixup": 0.0},
    "cutmix": {"cutmix": 0.0},
    "clip_norm": {"clip_norm": None},
    "ema_decay": {"ema_decay": None},
    "batch_norm": {"batch_norm": "train"},
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
    """One setting of a factor.

    Attributes:
        label: What tables call it.
        overrides: Training keys with their values.
    """

    label: str
    overrides: dict[str, ParamValue]


@dataclass(frozen=True, slots=True)
class Factor:
    """Something that an ablation varies.

    Attributes:
        name: A training key, or a name of the user's for several keys together.
        baseline: What the baseline's own level is called.
        levels: The other levels.
    """

    name: str
    baseline: str
    levels: tuple[Level, ...]

    def overrides(self, label: str) -> dict[str, ParamValue]:
        """Return the settings of a level; the baseline's own has none."""
        found = next((level for level in self.levels if level.label == label), None)
        return dict(found.overrides) if found else {}


Levels = Mapping[str, Sequence[Level]]


def parse_factors(raw: Mapping[str, object]) -> tuple[dict[str, list[Level]], list[Fault]]:
    """Read [ablation.factors].

    Args:
        raw: A training key -> a value or a list of values; or any other name -> a table of levels,
            each a table of training keys.

    Returns:
        The levels of each factor, and what is wrong.
    """
    found: dict[str, list[Level]] = {}
    faults: list[Fault] = []
    for name, value in raw.items():
        if isinstance(value, Mapping):
            levels, wrong = _compound(name, value)
        else:
            levels, wrong = _plain(name, value)
        found[name] = levels
        faults += [Fault(f"factors.{name}", fault.text) for fault in wrong]
    return found, faults


def _plain(name: str, value: object) -> tuple[list[Level], list[Fault]]:
    if name not in keys_of(TrainConfig):
        hint = near(name, keys_of(TrainConfig))
        text = f"is no training key, so its levels must be tables of training keys.{hint}"
        return [], [Fault(name, text)]
    values = list(value) if isinstance(value, list | tuple) else [value]
    levels, faults = [], []
    for item in values:
        checked, wrong = check_value(TrainConfig, name, item)
        faults += wrong
        if not wrong:
            levels.append(Level(format_value(checked), {name: checked}))
    labels = [level.label for level in levels]
    if len(set(labels)) < len(labels):  # three figures do not tell them apart
        levels = [Level(str(level.overrides[name]), level.overrides) for level in levels]
    if not values:
        faults.append(Fault(name, "must have at least one level, but got []."))
    return levels, faults + _twice(name, levels)


def _compound(name: str, table: Mapping[str, object]) -> tuple[list[Level], list[Fault]]:
    levels, faults = [], []
    for label, settings in table.items():
        if not isinstance(settings, Mapping) or not settings:
            text = f"level {label} must be a table of training keys, but got {settings!r}."
            faults.append(Fault(name, text))
            continue
        overrides: dict[str, ParamValue] = {}
        for key, value in settings.items():
            if key not in keys_of(TrainConfig):
                hint = near(key, keys_of(TrainConfig))
                text = f"level {label}: {key} is no training key.{hint}"
                faults.append(Fault(name, text))
                continue
            overrides[key], wrong = check_value(TrainConfig, key, value)
            faults += [Fault(name, f"level {label}: {fault.text}") for fault in wrong]
        levels.append(Level(label, overrides))
    if not table:
        faults.append(Fault(name, "must have at least one level, but got none."))
    return levels, faults


def _twice(name: str, levels: Sequence[Level]) -> list[Fault]:
    values = [level.overrides for level in levels]
    again = {level.label for level in levels if values.count(level.overrides) > 1}
    return [Fault(name, f"levels must differ, but got {label} twice.") for label in sorted(again)]


def read_flags(texts: Iterable[str]) -> tuple[dict[str, object], list[str]]:
    """Read `--factor key=v1,v2` flags; values are TOML, or texts where they are none.

    Returns:
        Key -> list of values, and faults.
    """
    found: dict[str, list[object]] = {}
    faults = []
    for text in texts:
        key, sign, written = text.partition("=")
        if not sign or not key.strip() or not written.strip():
            faults.append(
                f"--factor: must be KEY=VALUE or KEY=VALUE,VALUE, but got {text!r}; say, "
                "--factor head_lr_mult=1,100."
            )
            continue
        values = [_value(part.strip()) for part in written.strip("[]").split(",")]
        found.setdefault(key.strip().removeprefix("train."), []).extend(values)
    return dict(found), faults


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def against(baseline: TrainConfig, levels: Levels) -> tuple[list[Factor], list[Fault]]:
    """Set levels against a baseline: its own level is no comparison, and rules must hold.

    Returns:
        The factors that have a level other than the baseline's, and what is wrong.
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
            try:
                apply_params(baseline, level.overrides)
            except ValueError as err:
                faults.append(Fault(f"factors.{name}", f"level {level.label}: {err}"))
        labels = [level.label for level in others]
        factors.append(Factor(name, _own_label(baseline, name, labels), tuple(others)))
    return factors, faults


def _is_in(baseline: TrainConfig, level: Level) -> bool:
    return all(getattr(baseline, key) == value for key, value in level.overrides.items())


def _own_label(baseline: TrainConfig, name: str, others: Sequence[str]) -> str:
    """Name the baseline's own level, unlike any other: 0.01234 beside 0.0123 is told apart."""
    is_key = name in keys_of(TrainConfig)
    label = format_value(getattr(baseline, name)) if is_key else "baseline"
    return f"{label} (baseline)" if label in others else label


def propose(baseline: TrainConfig, space: Space) -> dict[str, list[Level]]:
    """Propose levels for a baseline whose user named none.

    Args:
        baseline: What is compared against.
        space: The searched settings: each is tried at the default that recipes give it, too.
    """
    wanted: dict[str, list[ParamValue]] = {key: list(values) for key, values in _PROPOSED.items()}
    for key in space:
        if key != "seed":
            wanted.setdefault(key, []).append(recipe_default(key, space))
    found = {}
    for key, values in wanted.items():
        checked = [check_value(TrainConfig, key, value)[0] for value in values]
        distinct = [value for value in dict.fromkeys(checked) if value != getattr(baseline, key)]
        if distinct and not _is_idle(baseline, key):
            found[key] = [Level(format_value(value), {key: value}) for value in distinct]
    return found


def _is_idle(baseline: TrainConfig, key: str) -> bool:
    """Say whether a key does nothing in the baseline, so that varying it tells nothing."""
    return key == "head_lr_mult" and baseline.freeze_depth == MAX_FREEZE_DEPTH


def recipe_default(key: str, space: Space) -> ParamValue:
    """Return the value that the recipes give a searched key: fine-tuning everything, or ours."""
    value = RECIPES["fine-tune-all"].get(key, getattr(TrainConfig(), key))
    return space[key].nearest(value)


def components(baseline: TrainConfig) -> dict[str, list[Level]]:
    """List what can be taken out of a baseline, each as a factor whose one level lacks it."""
    found = {}
    for key, without in NEUTRAL.items():
        if key == "batch_norm" and _trains_norms(baseline):
            continue
        level = Level(format_value(without[key]), dict(without))
        if not _is_in(baseline, level) and not _is_idle(baseline, key):
            found[key] = [level]
    return found


def _trains_norms(baseline: TrainConfig) -> bool:
    return baseline.batch_norm == "train" or (
        baseline.batch_norm == "auto" and baseline.weights == "none"
    )


def named(factor: str, level: str) -> str:
    """Name a level for tables and messages."""
    return f"{factor} = {level}"


def as_record(factor: Factor) -> dict[str, Any]:
    """Return a factor as plain JSON values."""
    levels = [{"label": level.label, "overrides": level.overrides} for level in factor.levels]
    return {"name": factor.name, "baseline": factor.baseline, "levels": levels}


def from_record(record: Mapping[str, Any]) -> Factor:
    """Read back what `as_record` wrote."""
    levels = tuple(Level(item["label"], dict(item["overrides"])) for item in record["levels"])
    return Factor(record["name"], record["baseline"], levels)
