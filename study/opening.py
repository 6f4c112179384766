"""How thaw begins: known settings that tell most, in an order of rising cost, and no model yet.

The head alone on every backbone; once a thawed setting is wanted, freeze levels from the top as
long as that gains (two at least), by the known recipe with a fresh head; then, at the best of
them, the backbone's rate three times as high and, if that is no better, as low. A model of the
settings that is asked at once is least sure at the ends of each range, and looks there alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.axes import Axes, FloatArray
from study.config.search_space import RECIPES

Costs = Callable[[FloatArray], FloatArray]
"""From settings as rows, (n, dimensions), to the cost of each, (n,)."""
# How far the backbone's rate is moved, as a factor. Assumption.
_RATE_STEP = 3.0
_RECIPE = RECIPES["linear-probe"]
# Settings are the same where they differ by rounding alone.
_SAME = 1e-9


class Opening:
    """Known settings of a space, as rows of its internal values.

    Args:
        axes: The space.
        given: Settings to begin with, beyond the known recipe's.
    """

    def __init__(self, axes: Axes, given: Mapping[str, Any]) -> None:
        self._axes = axes
        self._given = given
        self._depth = axes.at("freeze_depth")
        self._backbone = axes.at("backbone")

    def recipe(self, head_init: str = "probe") -> FloatArray:
        """Return the known recipe in this space: what it does not name is in the middle.

        Args:
            head_init: What heads start from, where that is searched.
        """
        wanted = {**self._given, **_RECIPE, "head_init": head_init}
        row = np.empty(len(self._axes.axes))
        for k, axis in enumerate(self._axes.axes):
            value = axis.nearest(wanted[axis.name]) if axis.name in wanted else None
            if value is None:
                value = float(axis.values(np.array([0.5]))[0]) if axis.is_ordered else 0.0
            row[k] = value
        return row

    def is_thawed(self, rows: FloatArray) -> NDArray[np.bool_]:
        """Say which settings train more than the highest freeze level does, (n,)."""
        if self._depth is None:
            return np.zeros(len(rows), bool)
        return np.asarray(rows[:, self._depth] != self._levels()[0])

    def probe(self, tried: FloatArray, costs: Costs) -> FloatArray | None:
        """Return the cheapest backbone's head-only setting that was not tried yet, if any."""
        backbones: Sequence[float] = [0.0]
        if self._backbone is not None:
            choices = self._axes.axes[self._backbone].choices or ()
            backbones = [float(i) for i in range(len(choices))]
        heads = tried[~self.is_thawed(tried)]
        waiting = []
        for backbone in backbones:
            row, known = self.recipe(), heads
            if self._depth is not None:
                row[self._depth] = self._levels()[0]
            if self._backbone is not None:
                row[self._backbone] = backbone
                known = heads[heads[:, self._backbone] == backbone]
            if not len(known):
                waiting.append(row)
        return waiting[int(np.argmin(costs(np.array(waiting))))] if waiting else None

    def thawed(
        self, wanted: FloatArray, tried: FloatArray, rows: FloatArray, scores: FloatArray
    ) -> FloatArray | None:
        """Return the next known setting to thaw with, if any is left.

        All are of one backbone, and what fails for want of memory fails deeper, too. Where another
        setting was thawed already, the opening is over.

        Args:
            wanted: What would be drawn otherwise, (dimensions,); gives the backbone at first.
            tried: Settings that were begun, (n, dimensions).
            rows: Those that have a score.
            scores: Theirs.
        """
        descent = self._descent(wanted, tried)
        known = [*descent, *(other for row in descent for other in self._other_rates(row))]
        own = np.any([_equal(tried, row) for row in known], axis=0)
        if (self.is_thawed(tried) & ~own).any():
            return None
        best, reached = None, -np.inf
        for row in descent:
            if not _equal(tried, row).any():
                return row
            score = scores[_equal(rows, row)].max(initial=-np.inf)
            if score <= reached:
                break
            best, reached = row, score
        for row in [] if best is None else self._other_rates(best):
            if not _equal(tried, row).any():
                return row
            if scores[_equal(rows, row)].max(initial=-np.inf) > reached:
                break
        return None

    def _descent(self, wanted: FloatArray, tried: FloatArray) -> list[FloatArray]:
        """Return the known recipe at every level below the top one, the highest first."""
        found: list[FloatArray] = []
        if self._depth is None:
            return found
        for level in self._levels()[1:]:
            row = self.recipe("default")
            row[self._depth] = level
            if self._backbone is not None:
                row[self._backbone] = found[0][self._backbone] if found else wanted[self._backbone]
                if not found:
                    row = self._begun(row, tried)
            found.append(row)
        return found

    def _begun(self, row: FloatArray, tried: FloatArray) -> FloatArray:
        """Return the row with the backbone that it was tried with first, if it was."""
        assert self._backbone is not None
        others = np.arange(len(row)) != self._backbone
        known = tried[_equal(tried[:, others], row[others])]
        return row if not len(known) else known[0]

    def _other_rates(self, anchor: FloatArray) -> list[FloatArray]:
        """Return an anchor with the backbone's rate moved up and down.

        The head's own rate stays, as far as the multiplier's range allows; it moves along where
        that is not searched.
        """
        rate, mult = self._axes.at("base_lr"), self._axes.at("head_lr_mult")
        if rate is None or not self._axes.axes[rate].is_ordered:
            return []
        now = self._axes.params(anchor)
        found = []
        for factor in (_RATE_STEP, 1 / _RATE_STEP):
            row = anchor.copy()
            row[rate] = self._moved(rate, anchor, factor)
            if _equal(row[None], anchor)[0]:
                continue  # at the end of the range
            if mult is not None:
                real = self._axes.params(row)["base_lr"] / now["base_lr"]
                value = self._axes.axes[mult].nearest(now["head_lr_mult"] / real)
                row[mult] = anchor[mult] if value is None else value
            found.append(row)
        return found

    def _moved(self, rate: int, anchor: FloatArray, factor: float) -> float:
        """Return the rate nearest to so many times the anchor's; in a list, its neighbour."""
        axis = self._axes.axes[rate]
        if axis.order is None:
            value = axis.nearest(self._axes.params(anchor)["base_lr"] * factor)
            assert value is not None  # a number
            return value
        listed = axis.listed()
        assert listed is not None  # a list
        ranked = listed[np.argsort(axis.units(listed), kind="stable")]
        beside = int(np.flatnonzero(ranked == anchor[rate])[0]) + (1 if factor > 1 else -1)
        return float(ranked[min(max(beside, 0), len(ranked) - 1)])

    def _levels(self) -> FloatArray:
        """Return the freeze levels, the highest first."""
        assert self._depth is not None
        axis = self._axes.axes[self._depth]
        listed = axis.listed()
        assert listed is not None  # levels are whole numbers
        return np.asarray(listed[np.argsort(-axis.units(listed), kind="stable")])


def _equal(rows: FloatArray, row: FloatArray) -> NDArray[np.bool_]:
    """Say which rows are a setting, but for rounding, (n,)."""
    return np.asarray(np.isclose(rows, row, rtol=_SAME, atol=0).all(axis=1))
