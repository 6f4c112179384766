"""How thaw begins: known settings that tell most, in an order of rising cost, and no model yet.

The head alone on every backbone; then freeze levels from the top as long as that gains, by the
known recipe with a fresh head; then, at the best of them, the backbone's rate three times as high
and as low. A model of the settings that is asked at once is least sure at the ends of each range,
and looks there alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.axes import Axes, FloatArray
from study.space import RECIPES

Costs = Callable[[FloatArray], FloatArray]
"""From settings as rows, (n, dimensions), to the cost of each, (n,)."""
RATE_STEP = 3.0
"""How far the backbone's rate is moved, as a factor. Assumption."""
_RECIPE = RECIPES["linear-probe"]


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

    def recipe(self, head_init: str = "probe", **more: Any) -> FloatArray:
        """Return the known recipe in this space: what it does not name is in the middle.

        Args:
            head_init: What heads start from, where that is searched.
            more: Other settings in place of the recipe's.
        """
        wanted = {**self._given, **_RECIPE, "head_init": head_init, **more}
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

        A level is tried for its own sake if the one above it gained on the one before: it costs
        more, and what fails for want of memory fails there, too.

        Args:
            wanted: What would be drawn otherwise, (dimensions,); gives the backbone.
            tried: Settings that were begun, (n, dimensions).
            rows: Those that have a score.
            scores: Theirs.
        """
        if self._depth is None:
            return None
        anchor, before = None, -math.inf
        for level in self._levels()[1:]:
            if level not in tried[:, self._depth]:
                return self._at(level, wanted)
            at_level = rows[:, self._depth] == level
            if not at_level.any() or scores[at_level].max() < before:
                break
            before = scores[at_level].max()
            anchor = rows[at_level][int(scores[at_level].argmax())]
        return None if anchor is None else self._other_rate(anchor, tried)

    def _at(self, level: float, wanted: FloatArray) -> FloatArray:
        row = self.recipe("default")
        assert self._depth is not None  # as the caller has seen
        row[self._depth] = level
        if self._backbone is not None:
            row[self._backbone] = wanted[self._backbone]
        return row

    def _other_rate(self, anchor: FloatArray, tried: FloatArray) -> FloatArray | None:
        """Return a setting with the backbone's rate moved, and the head's where it was."""
        rate, mult = self._axes.at("base_lr"), self._axes.at("head_lr_mult")
        if rate is None or not self._axes.axes[rate].is_ordered:
            return None
        if anchor[rate] != self.recipe()[rate]:
            return None  # another rate was better there already
        now = self._axes.params(anchor)
        for factor in (RATE_STEP, 1 / RATE_STEP):
            moved = self.recipe(base_lr=now["base_lr"] * factor)
            row = anchor.copy()
            row[rate] = moved[rate]
            if mult is not None:
                row[mult] = self.recipe(head_lr_mult=now["head_lr_mult"] / factor)[mult]
            if row[rate] != anchor[rate] and not (tried == row).all(axis=1).any():
                return row
        return None

    def _levels(self) -> FloatArray:
        """Return the freeze levels, the highest first."""
        assert self._depth is not None
        axis = self._axes.axes[self._depth]
        listed = axis.listed()
        assert listed is not None  # levels are whole numbers
        return np.asarray(listed[np.argsort(-axis.units(listed), kind="stable")])
