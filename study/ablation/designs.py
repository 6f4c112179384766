"""Ablation designs: which settings are run, in which order, and what they can distinguish."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from core.config import TrainConfig
from study.ablation.factors import Factor, Levels, components, propose_levels, recipe_levels
from study.config.errors import ConfigError
from study.config.search_space import ParamValue, Space

BASELINE = "baseline"
"""Label of the baseline's own cell."""

Decide = Callable[[], set[int]]
"""Judges the runs in the record: returns the cells whose question more replicates may decide."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of a design.

    Attributes:
        levels: Factor -> label of its level; factors at the baseline's level are left out.
        overrides: Training keys that differ from the baseline's configuration.
    """

    levels: dict[str, str]
    overrides: dict[str, ParamValue]

    @property
    def label(self) -> str:
        """Name the cell by those of its levels that are not the baseline's."""
        return ", ".join(f"{name} = {level}" for name, level in self.levels.items()) or BASELINE


Done = Callable[[Cell], Mapping[int, float | None]]
"""The runs of a cell that are done: replicate -> validation accuracy, None = the run failed."""


class Design(ABC):
    """What an ablation runs: every cell once per replicate.

    A new design is a subclass here, in `DESIGNS`; what it compares, where that is not levels with
    the baseline, stands in `reports.effects.contrasts_of`.

    Args:
        factors: What is varied, at least one.
        max_cells: Most cells of a design that combines all levels.

    Attributes:
        kind: Its name, which users and the record give it.
        title: Its heading in the report.
        summary: What is run, for the configuration's help.
        combines_factors: A cell may have several factors at levels other than the baseline's.
        grows: Which cells follow depends on the results of earlier ones.
        cells: The settings; the baseline, where it is one of them, comes first.
        coded: Of a factorial: position of every factor's level in every cell; shape
            (cells, factors).
        steps: Of a path: the factors that have taken over the baseline's level, in order.

    Raises:
        ConfigError: The factors do not suit the design; says what does.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    combines_factors: ClassVar[bool] = True
    grows: ClassVar[bool] = False
    construction: str

    def __init__(self, factors: Sequence[Factor], *, max_cells: int = 64) -> None:
        if not factors:
            rule = "an ablation needs at least one factor, but no proposed level differs from the"
            raise ConfigError(f"{rule} baseline. Name some: --factor head_lr_mult=1,100.")
        self.factors = tuple(factors)
        self.cells: list[Cell] = []
        self.coded: list[tuple[int, ...]] = []
        self.steps: list[str] = []
        if self.combines_factors:
            self._check_apart()
        self._make(max_cells)

    @classmethod
    def propose(cls, baseline: TrainConfig, space: Space) -> Levels:
        """Propose levels where the user named none: one per factor, to keep the cells few."""
        return {name: levels[:1] for name, levels in propose_levels(baseline, space).items()}

    @abstractmethod
    def _make(self, max_cells: int) -> None:
        """Set the cells, and what else is known of them."""

    @property
    def n_tests(self) -> int:
        """Count the comparisons that are tested: of a path, the candidates of all steps."""
        return math.comb(len(self.factors) + 1, 2)

    def n_runs(self, replicates: int) -> int:
        """Count the runs, all steps of a path included."""
        return len(self.cells) * replicates

    def missing(
        self, looks: Sequence[int], done: Done, decide: Decide
    ) -> Iterator[tuple[Cell, int]]:
        """Give the runs to do, in order; `done` is asked again after each.

        `looks` are the replicates at each interim analysis, and at the end. Of the cells that
        `decide` does not name at an interim analysis, all but the baseline get no more runs.
        """
        cells = self.cells
        *interim, last = looks
        for n in interim:
            yield from _undone(cells, n, done)
            active = decide()
            if not active:
                return
            cells = [self.cells[i] for i in sorted(active | {0})]
        yield from _undone(cells, last, done)

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "title": self.title,
            "factors": [asdict(f) | {"levels": list(map(asdict, f.levels))} for f in self.factors],
            "cells": [asdict(cell) for cell in self.cells],
            "coded": [list(row) for row in self.coded],
            "construction": self.construction,
            "n_tests": self.n_tests,
            "steps": list(self.steps),
        }

    def _check_apart(self) -> None:
        """Refuse factors that set the same key: their levels could not be combined."""
        owner: dict[str, str] = {}
        for factor in self.factors:
            for key in sorted({key for level in factor.levels for key in level.overrides}):
                if key in owner:
                    both = f"{owner[key]} and {factor.name} both set {key}"
                    rule = f"factors of a {self.kind} design must not share a setting, but {both}."
                    raise ConfigError(f"{rule} Drop one, or use --design ofat.")
                owner[key] = factor.name

    def _cell(self, labels: Iterable[str]) -> Cell:
        """Combine one level of every factor."""
        pairs = list(zip(self.factors, labels, strict=True))
        levels = {factor.name: label for factor, label in pairs if label != factor.baseline}
        overrides: dict[str, ParamValue] = {}
        for factor, label in pairs:
            overrides |= factor.overrides(label)
        return Cell(levels, overrides)


def _undone(cells: Sequence[Cell], n: int, done: Done) -> Iterator[tuple[Cell, int]]:
    """Give the missing ones of the first n replicates, one whole replicate after the other."""
    for replicate in range(n):
        for cell in cells:
            if replicate not in done(cell):
                yield cell, replicate


class OneFactorAtATime(Design):
    """The baseline, and each level of each factor alone."""

    kind = "ofat"
    title = "One factor at a time"
    summary = "one factor at a time"
    combines_factors = False
    construction = "one factor at a time: the baseline, and each level with all else as in it"

    @classmethod
    def propose(cls, baseline: TrainConfig, space: Space) -> Levels:
        """Propose all levels that are worth a comparison."""
        return propose_levels(baseline, space)

    def _make(self, max_cells: int) -> None:
        levels = [(factor.name, level) for factor in self.factors for level in factor.levels]
        alone = [Cell({name: level.label}, dict(level.overrides)) for name, level in levels]
        self.cells = [Cell({}, {}), *alone]

    @property
    def n_tests(self) -> int:
        """Count the levels, each of which is compared with the baseline."""
        return len(self.cells) - 1


class LeaveOneComponentOut(OneFactorAtATime):
    """The baseline, and the baseline without each of its components."""

    kind = "loco"
    title = "Leave one component out"
    summary = "each component of the baseline removed"
    construction = "leave one component out: the baseline, and each of its components removed"

    @classmethod
    def propose(cls, baseline: TrainConfig, space: Space) -> Levels:
        """Propose to take out each component that the baseline has."""
        return components(baseline)


class Factorial(Design):
    """All combinations of levels."""

    kind = "factorial"
    title = "Factorial"
    summary = "all combinations"

    def _make(self, max_cells: int) -> None:
        counts = [len(factor.labels) for factor in self.factors]
        size = math.prod(counts)
        if size > max_cells:
            raise ConfigError(
                f"a factorial must have at most ablation.max_cells = {max_cells} combinations, "
                f"but these factors have {size}. Name fewer (--factor augment=none), use "
                f"--design ofat, or allow it: --set ablation.max_cells={size}."
            )
        self.coded = list(itertools.product(*(range(n) for n in counts)))
        self.construction = f"full factorial, {size} combinations"
        self.cells = [
            self._cell(factor.labels[k] for factor, k in zip(self.factors, row, strict=True))
            for row in self.coded
        ]

    @property
    def n_tests(self) -> int:
        """Count the main effects of all levels and the interactions of two levels."""
        counts = [len(factor.levels) for factor in self.factors]
        return sum(counts) + sum(a * b for a, b in itertools.combinations(counts, 2))


class Path(Design):
    """From the factors' other levels to the baseline, the best change first.

    Each step takes over from the baseline the one setting that helps most, when really trained
    (Fawcett & Hoos 2016, doi:10.1007/s10732-014-9275-9).
    """

    kind = "path"
    title = "Path"
    summary = "from one setting to another, the best change first"
    grows = True
    construction = (
        "ablation path (Fawcett & Hoos 2016): from the start, at each step every remaining change "
        "towards the baseline is trained, and the one with the best mean accuracy is kept"
    )

    @classmethod
    def propose(cls, baseline: TrainConfig, space: Space) -> Levels:
        """Propose to begin at the recipes' values of what was searched."""
        return recipe_levels(baseline, space)

    def _make(self, max_cells: int) -> None:
        if many := ", ".join(each.name for each in self.factors if len(each.levels) > 1):
            rule = "each factor of a path must have one level besides the baseline's"
            raise ConfigError(f"{rule}, but got more for {many}.")
        self.cells = [self._at(()), *self.candidates().values()]

    def _at(self, taken: Iterable[str]) -> Cell:
        """Return the cell in which these factors have the baseline's level already."""
        names = set(taken)
        return self._cell(factor.labels[factor.name not in names] for factor in self.factors)

    def candidates(self) -> dict[str, Cell]:
        """Return the changes that the next step may take, and the cells that they lead to."""
        left = [factor.name for factor in self.factors if factor.name not in self.steps]
        return {name: self._at([*self.steps, name]) for name in left}

    def take(self, name: str) -> None:
        """Take a step; the candidates of the next one become cells."""
        self.steps.append(name)
        self.cells += [cell for cell in self.candidates().values() if cell not in self.cells]

    def missing(
        self, looks: Sequence[int], done: Done, decide: Decide
    ) -> Iterator[tuple[Cell, int]]:
        """Give the runs of one step after the other, from wherever the path is."""
        n = looks[-1]
        yield from _undone(self.cells[:1], n, done)
        while candidates := self.candidates():
            yield from _undone(list(candidates.values()), n, done)
            means = {name: _mean(done(cell), n) for name, cell in candidates.items()}
            self.take(max(means, key=lambda name: means[name]))

    def n_runs(self, replicates: int) -> int:
        """Count the runs of the start and of every step's candidates."""
        return (1 + self.n_tests) * replicates


def _mean(runs: Mapping[int, float | None], n: int) -> float:
    """Return the mean accuracy; a cell of which a run failed comes last."""
    values = [value for r in range(n) if (value := runs[r]) is not None]
    return sum(values) / n if len(values) == n else -1.0


DESIGNS: dict[str, type[Design]] = {
    design.kind: design  # a new one is added here
    for design in (OneFactorAtATime, LeaveOneComponentOut, Factorial, Path)
}
"""The designs by name."""
