"""A search space as columns of numbers: what a surrogate sees of a setting, and how to move in it.

Settings travel as rows of Optuna's internal values, one column a dimension: the number itself, or
the position in the list of choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from core.config import MAX_FREEZE_DEPTH

FloatArray = NDArray[np.float64]
_DEPTH, _RATE, _MULT = "freeze_depth", "base_lr", "head_lr_mult"
# A perturbed choice becomes another one with this probability. Assumption.
_SWAP = 0.15


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension.

    Attributes:
        name: Its key.
        distribution: As Optuna has it.
        order: For a list of numbers, the position of each in the sorted list; else None.
    """

    name: str
    distribution: BaseDistribution
    order: tuple[int, ...] | None

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """List the values of a dimension of choices; None for numbers."""
        dist = self.distribution
        return dist.choices if isinstance(dist, CategoricalDistribution) else None

    @property
    def n_points(self) -> int | None:
        """Count the values; None for a continuum."""
        dist = self.distribution
        if isinstance(dist, CategoricalDistribution):
            return len(dist.choices)
        if isinstance(dist, IntDistribution):
            return (dist.high - dist.low) // dist.step + 1
        assert isinstance(dist, FloatDistribution)
        return None if dist.step is None else int((dist.high - dist.low) / dist.step + 1e-9) + 1

    @property
    def is_log(self) -> bool:
        """Say whether values are drawn evenly in their logarithm."""
        return bool(getattr(self.distribution, "log", False))

    @property
    def numbers(self) -> tuple[float, float]:
        """Return the lowest and the highest number; of a dimension of numbers only."""
        dist = self.distribution
        if isinstance(dist, CategoricalDistribution):
            values = [float(choice) for choice in dist.choices]  # type: ignore[arg-type]  # numbers
            return min(values), max(values)
        assert isinstance(dist, IntDistribution | FloatDistribution)
        return float(dist.low), float(dist.high)

    @property
    def is_ordered(self) -> bool:
        """Say whether values lie on a line."""
        return self.choices is None or self.order is not None

    def units(self, values: FloatArray) -> FloatArray:
        """Map values of an ordered dimension to [0, 1], in the logarithm where searched so."""
        if self.order is not None:
            ranks = np.array(self.order, dtype=float)[values.astype(int)]
            return np.asarray(ranks / max(1, len(self.order) - 1))
        low, high = self._bounds()
        at = np.log(np.maximum(values, 1e-300)) if self.is_log else values
        return np.asarray(np.clip((at - low) / ((high - low) or 1.0), 0.0, 1.0))

    def values(self, units: FloatArray) -> FloatArray:
        """Return the values nearest to places in [0, 1]; the inverse of `units`."""
        if self.order is not None:
            ranks = np.round(np.clip(units, 0, 1) * (len(self.order) - 1)).astype(int)
            return np.asarray(np.argsort(self.order)[ranks], dtype=float)
        dist = self.distribution
        assert isinstance(dist, IntDistribution | FloatDistribution)
        low, high = self._bounds()
        at = low + np.clip(units, 0, 1) * (high - low)
        at = np.exp(at) if self.is_log else at
        if dist.step is not None and not dist.log:
            at = dist.low + np.round((at - dist.low) / dist.step) * dist.step
        elif isinstance(dist, IntDistribution):
            at = np.round(at)
        last = dist.low + ((self.n_points or 1) - 1) * dist.step if dist.step else dist.high
        return np.asarray(np.clip(at, dist.low, last), dtype=float)

    def draw(self, rng: Generator, n: int) -> FloatArray:
        """Draw n values evenly."""
        listed = self.listed() if self.choices is not None or not self.is_log else None
        if listed is None:
            return self.values(rng.random(n))
        return np.asarray(rng.choice(listed, size=n), dtype=float)

    def listed(self) -> FloatArray | None:
        """List all values, as internal ones; None for a continuum."""
        n, dist = self.n_points, self.distribution
        if n is None:
            return None
        if isinstance(dist, CategoricalDistribution):
            return np.arange(n, dtype=float)
        assert isinstance(dist, IntDistribution | FloatDistribution)
        return np.asarray(dist.low + np.arange(n) * float(dist.step or 1), dtype=float)

    def nudge(self, values: FloatArray, rng: Generator, scale: float) -> FloatArray:
        """Move values by a normal step of so much of the range; swap choices now and then."""
        if not self.is_ordered:
            swapped = rng.random(len(values)) < _SWAP
            return np.where(swapped, self.draw(rng, len(values)), values)
        n = self.n_points
        step = max(scale, 0.5 / (n - 1)) if n is not None and n > 1 else scale
        return self.values(self.units(values) + step * rng.standard_normal(len(values)))

    def nearest(self, value: Any) -> float | None:
        """Return the internal value nearest to one of the key's own; None where none is."""
        if isinstance(self.distribution, CategoricalDistribution):
            choices = self.distribution.choices
            if value in choices:
                return float(choices.index(value))
            if self.order is None or not _is_number(value):
                return None
            return float(min(range(len(choices)), key=lambda i: abs(float(choices[i]) - value)))  # type: ignore[arg-type]  # numbers, as `order` says
        if not _is_number(value):
            return None
        bare = np.array([float(value)])
        return float(self.values(self.units(bare))[0])

    def _bounds(self) -> tuple[float, float]:
        low, high = self.numbers
        return (float(np.log(low)), float(np.log(high))) if self.is_log else (low, high)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _axis(name: str, dist: BaseDistribution) -> Axis:
    order = None
    if isinstance(dist, CategoricalDistribution) and all(map(_is_number, dist.choices)):
        ranked = np.argsort(np.argsort([float(c) for c in dist.choices]))  # type: ignore[arg-type]  # numbers
        order = tuple(int(rank) for rank in ranked)
    return Axis(name, dist, order)


class Axes:
    """The dimensions of a space, in its order.

    Attributes:
        axes: One for each dimension, those with a single value included.
        names: Their keys.
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.axes = tuple(_axis(name, dist) for name, dist in space.items())
        self.names = tuple(axis.name for axis in self.axes)

    def at(self, name: str) -> int | None:
        """Return a dimension's column, if it is searched."""
        return self.names.index(name) if name in self.names else None

    @property
    def n_points(self) -> int | None:
        """Count the settings; None for a continuum."""
        total = 1
        for axis in self.axes:
            if axis.n_points is None:
                return None
            total *= axis.n_points
        return total

    def every(self) -> FloatArray:
        """List all settings of a finite space, (settings, dimensions)."""
        columns = [values for axis in self.axes if (values := axis.listed()) is not None]
        return np.stack(np.meshgrid(*columns, indexing="ij"), -1).reshape(-1, len(columns))

    def row(self, params: Mapping[str, Any]) -> list[float] | None:
        """Return a trial's settings as internal values; None where one is missing or foreign."""
        row = []
        for axis in self.axes:
            if axis.name not in params:
                return None
            try:
                row.append(float(axis.distribution.to_internal_repr(params[axis.name])))
            except (ValueError, TypeError):  # a choice that is listed no more
                return None
        return row

    def params(self, row: FloatArray) -> dict[str, Any]:
        """Return a row as settings."""
        return {
            axis.name: axis.distribution.to_external_repr(float(value))
            for axis, value in zip(self.axes, row, strict=True)
        }

    def draw(self, rng: Generator, n: int) -> FloatArray:
        """Draw n settings evenly, (n, dimensions)."""
        return np.stack([axis.draw(rng, n) for axis in self.axes], axis=1)

    def nudge(self, rows: FloatArray, rng: Generator, scale: float) -> FloatArray:
        """Move settings by normal steps, every dimension in half of them, (n, dimensions)."""
        moved = rows.copy()
        for k, axis in enumerate(self.axes):
            chosen = rng.random(len(rows)) < (0.5 if len(self.axes) > 1 else 1.0)
            moved[:, k] = np.where(chosen, axis.nudge(rows[:, k], rng, scale), rows[:, k])
        return moved

    def inputs(self, rows: FloatArray) -> FloatArray:
        """Return what the surrogate sees, (n, columns), each in about [0, 1].

        A name in a list has a column to itself. The head's rate stands in place of its multiplier,
        and where the head alone is trained the backbone's rate is blanked out: it has no effect.
        Whether that is so is a column too, since what a head gains says little of what thawing
        does.
        """
        columns: list[FloatArray] = []
        for k, axis in enumerate(self.axes):
            if axis.is_ordered:
                columns.append(axis.units(rows[:, k]))
            else:
                wanted = np.arange(len(axis.choices or ()))
                columns.extend((rows[:, k, None] == wanted).T / np.sqrt(2))
        depth, rate, mult = (self._number_at(name) for name in (_DEPTH, _RATE, _MULT))
        place = {name: i for i, name in enumerate(self._columns())}
        head_only = np.zeros(len(rows), dtype=bool)
        if depth is not None:
            head_only = self._numbers(rows, depth) >= MAX_FREEZE_DEPTH
            columns.append(head_only.astype(float))
        if rate is not None and mult is not None:
            logs = np.log(self._numbers(rows, rate) * self._numbers(rows, mult))
            ends = zip(self.axes[rate].numbers, self.axes[mult].numbers, strict=True)
            low, high = (float(np.log(a * b)) for a, b in ends)
            columns[place[_MULT]] = (logs - low) / ((high - low) or 1.0)
            columns[place[_RATE]] = np.where(head_only, 0.5, columns[place[_RATE]])
        return np.stack(columns, axis=1)

    def _number_at(self, name: str) -> int | None:
        at = self.at(name)
        return at if at is not None and self.axes[at].is_ordered else None

    def _columns(self) -> list[str]:
        names: list[str] = []
        for axis in self.axes:
            names += [axis.name] if axis.is_ordered else [axis.name] * len(axis.choices or ())
        return names

    def _numbers(self, rows: FloatArray, k: int) -> FloatArray:
        choices = self.axes[k].choices
        if choices is None:
            return rows[:, k]
        numbers = np.array([float(choice) for choice in choices])
        return np.asarray(numbers[rows[:, k].astype(int)])
