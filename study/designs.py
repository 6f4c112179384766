"""Ablation designs: which settings are run, and what can be told from them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.config.errors import ConfigError
from study.config.search_space import ParamValue
from study.config.study_config import AblationSection
from study.factors import Factor, as_record, from_record, named

BASELINE = "baseline"
"""What the baseline's own cell is called."""
_HIGHEST_RESOLUTION = 5


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of a design.

    Attributes:
        levels: Factor -> its level's label; factors at the baseline's level are left out.
        overrides: Training keys that differ from the baseline's configuration.
    """

    levels: dict[str, str]
    overrides: dict[str, ParamValue]

    @property
    def label(self) -> str:
        """Name the cell for tables and dashboards."""
        told = ", ".join(named(factor, level) for factor, level in self.levels.items())
        return told or BASELINE


@dataclass(frozen=True, slots=True)
class Design:
    """What an ablation runs: every cell once for each replicate.

    Attributes:
        kind: `ofat`, `loco`, `factorial`, `path` or `screen`.
        factors: What is varied.
        cells: The settings; those of a path come step by step.
        coded: For `factorial` and `screen`: level of every factor in every cell as a number,
            -1 and 1 (0 for the middle of three), or its position; shape (cells, factors).
        resolution: Of a fractional factorial; None for a whole one and other designs.
        aliasing: What cannot be told apart, one sentence each.
        construction: How the design was made, in words.
    """

    kind: str
    factors: tuple[Factor, ...]
    cells: tuple[Cell, ...]
    coded: tuple[tuple[int, ...], ...] = ()
    resolution: int | None = None
    aliasing: tuple[str, ...] = ()
    construction: str = ""

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "factors": [as_record(factor) for factor in self.factors],
            "cells": [{"levels": c.levels, "overrides": c.overrides} for c in self.cells],
            "coded": [list(row) for row in self.coded],
            "resolution": self.resolution,
            "aliasing": list(self.aliasing),
            "construction": self.construction,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Design":
        """Read back what `to_record` wrote."""
        return cls(
            record["kind"],
            tuple(from_record(item) for item in record["factors"]),
            tuple(Cell(dict(c["levels"]), dict(c["overrides"])) for c in record["cells"]),
            tuple(tuple(row) for row in record["coded"]),
            record["resolution"],
            tuple(record["aliasing"]),
            record["construction"],
        )


def make_design(factors: Sequence[Factor], settings: AblationSection) -> Design:
    """Expand factors into the cells of a design.

    Raises:
        ConfigError: The factors do not suit the design; says what does.
    """
    if not factors:
        raise ConfigError(
            "an ablation needs at least one factor, but the baseline differs from none of the "
            "proposed levels. Name some: --factor head_lr_mult=1,100."
        )
    if settings.design in ("ofat", "loco"):
        return one_at_a_time(settings.design, factors)
    _check_apart(factors, settings.design)
    if settings.design == "factorial":
        return _factorial(factors, settings)
    if settings.design == "screen":
        return screening(factors)
    return path(factors)


def _check_apart(factors: Sequence[Factor], kind: str) -> None:
    """Refuse factors that set the same key: their levels could not be combined."""
    owner: dict[str, str] = {}
    for factor in factors:
        for key in sorted({key for level in factor.levels for key in level.overrides}):
            if key in owner:
                raise ConfigError(
                    f"factors of a {kind} design must not share a setting, but {owner[key]} and "
                    f"{factor.name} both set {key}. Drop one, or use --design ofat."
                )
            owner[key] = factor.name


def one_at_a_time(kind: str, factors: Sequence[Factor]) -> Design:
    """Take the baseline, and each level of each factor alone."""
    cells = [Cell({}, {})]
    for factor in factors:
        cells += [Cell({factor.name: lv.label}, dict(lv.overrides)) for lv in factor.levels]
    told = {
        "ofat": "one factor at a time: the baseline, and each level with all else as in it",
        "loco": "leave one component out: the baseline, and each of its components removed",
    }
    return Design(kind, tuple(factors), tuple(cells), construction=told[kind])


def _combined(factors: Sequence[Factor], labels: Sequence[str]) -> Cell:
    pairs = list(zip(factors, labels, strict=True))
    levels = {factor.name: label for factor, label in pairs if label != factor.baseline}
    overrides: dict[str, ParamValue] = {}
    for factor, label in pairs:
        overrides |= factor.overrides(label)
    return Cell(levels, overrides)


def _all_labels(factor: Factor) -> list[str]:
    return [factor.baseline, *(level.label for level in factor.levels)]


def _factorial(factors: Sequence[Factor], settings: AblationSection) -> Design:
    labels = [_all_labels(factor) for factor in factors]
    size = int(np.prod([len(listed) for listed in labels]))
    if size <= settings.max_cells and settings.resolution is None:
        coded = tuple(itertools.product(*(range(len(listed)) for listed in labels)))
        return _coded("factorial", factors, labels, coded, f"full factorial, {size} combinations")
    if any(len(listed) != 2 for listed in labels):
        many = ", ".join(f.name for f, listed in zip(factors, labels, strict=True) if listed[2:])
        raise ConfigError(
            f"a fraction of a factorial needs two levels per factor, but {many} has more, and the "
            f"full design has {size} combinations (ablation.max_cells is {settings.max_cells}). "
            "Give one level beside the baseline's for each, fewer factors, or a larger "
            "--set ablation.max_cells."
        )
    return _fraction(factors, labels, settings, size)


def _fraction(
    factors: Sequence[Factor],
    labels: list[list[str]],
    settings: AblationSection,
    size: int,
) -> Design:
    import pydoe

    n = len(factors)
    tried = [settings.resolution] if settings.resolution else range(_HIGHEST_RESOLUTION, 2, -1)
    for resolution in tried:
        if resolution > n:
            continue
        table = pydoe.fracfact_by_res(n, resolution)
        if len(table) <= settings.max_cells or settings.resolution:
            break
    else:
        raise ConfigError(
            f"a fraction of {n} two-level factors needs more than {settings.max_cells} "
            "combinations, or the resolution is larger than the number of factors. Raise --set "
            "ablation.max_cells, lower the resolution, or use --design screen."
        )
    names = [factor.name for factor in factors]
    coded = tuple(tuple(int(value > 0) for value in row) for row in table)
    return _coded(
        "factorial",
        factors,
        labels,
        coded,
        f"2^({n}-{n - int(np.log2(len(table)))}) fractional factorial of resolution "
        f"{resolution}: {len(table)} of {size} combinations (pyDOE)",
        resolution=resolution,
        aliasing=aliases(table, names),
    )


def aliases(table: NDArray[np.float64], names: Sequence[str]) -> tuple[str, ...]:
    """Say which main effects and two-factor interactions a two-level design mixes up.

    Args:
        table: Design of -1 and 1, shape (cells, factors).
        names: The factors.
    """
    signs = np.sign(np.asarray(table, dtype=float))
    words: list[tuple[int, ...]] = [(k,) for k in range(len(names))]
    words += list(itertools.combinations(range(len(names)), 2))
    groups: dict[bytes, list[str]] = {}
    for word in words:
        column = np.prod(signs[:, word], axis=1)
        column *= column[0]  # a column and its negative say the same
        told = " × ".join(names[k] for k in word)
        groups.setdefault(column.astype(np.int8).tobytes(), []).append(told)
    return tuple(" = ".join(group) for group in groups.values() if len(group) > 1)


def _coded(
    kind: str,
    factors: Sequence[Factor],
    labels: Sequence[Sequence[str]],
    coded: Iterable[Sequence[int]],
    construction: str,
    **more: Any,
) -> Design:
    """Turn positions of levels into cells, the baseline's first where it is among them."""
    rows = sorted({tuple(row) for row in coded}, key=lambda row: (any(row), row))
    cells = tuple(
        _combined(factors, [names[k] for names, k in zip(labels, row, strict=True)])
        for row in rows
    )
    return Design(kind, tuple(factors), cells, tuple(rows), construction=construction, **more)


def screening(factors: Sequence[Factor]) -> Design:
    """Make a one-pass screening design.

    Definitive screening (Jones & Nachtsheim 2011) where a factor has a level on each side of the
    baseline's, so that curvature shows; Plackett-Burman where every factor has one other level.

    Raises:
        ConfigError: A factor has more levels than that, or there are fewer than three factors.
    """
    import pydoe

    if len(factors) < 3:
        raise ConfigError(
            f"a screening design needs at least three factors, but got {len(factors)}. Name more, "
            "or use --design factorial."
        )
    three = [factor for factor in factors if _is_bracketed(factor)]
    two = [factor for factor in factors if len(factor.levels) == 1]
    if len(three) + len(two) < len(factors):
        wrong = ", ".join(f.name for f in factors if f not in three and f not in two)
        raise ConfigError(
            "a factor of a screening design must have one level beside the baseline's, or two "
            f"numbers, one below and one above it; this does not hold for {wrong}. Use --design "
            "ofat for factors with more levels."
        )
    if three:
        table = pydoe.definitive_screening_design(len(three), n_cat=len(two))
        name = "definitive screening design (Jones & Nachtsheim 2011, by pyDOE)"
        aliasing = (
            "main effects are free of two-factor interactions and of squares"
            if not two
            else "main effects of three-level factors are free of squares; with two-level "
            "factors, main effects are partly mixed with interactions",
        )
    else:
        table = pydoe.pbdesign(len(two))
        name = "Plackett-Burman design (pyDOE)"
        aliasing = ("every main effect is mixed with parts of the interactions of other factors",)
    ordered = [*three, *two]
    rows = tuple(tuple(round(value) for value in row) for row in table)
    cells = tuple(_screened(ordered, row) for row in rows)
    told = f"{name}: {len(rows)} settings for {len(factors)} factors"
    return Design("screen", tuple(ordered), cells, rows, aliasing=aliasing, construction=told)


def _is_bracketed(factor: Factor) -> bool:
    values = [lv.overrides.get(factor.name) for lv in factor.levels]
    if len(values) != 2 or not all(isinstance(v, int | float) for v in values):
        return False
    try:
        own = float(factor.baseline.partition(" ")[0])
    except ValueError:
        return False
    low, high = sorted(float(v) for v in values if v is not None)
    return low < own < high


def _screened(factors: Sequence[Factor], row: Sequence[int]) -> Cell:
    """Read a coded row: three levels are low, baseline, high; of two, -1 is the baseline's."""
    labels = []
    for factor, code in zip(factors, row, strict=True):
        if len(factor.levels) == 1:
            labels.append(factor.levels[0].label if code > 0 else factor.baseline)
            continue
        low, high = sorted(factor.levels, key=lambda lv: float(str(lv.overrides[factor.name])))
        labels.append({-1: low.label, 0: factor.baseline, 1: high.label}[code])
    return _combined(factors, labels)


def path(factors: Sequence[Factor]) -> Design:
    """Begin a path from the factors' other levels to the baseline.

    Each step takes over from the baseline the one setting that helps most, when really trained
    (Fawcett & Hoos 2016, doi:10.1007/s10732-014-9275-9); `extend_path` adds the steps.

    Raises:
        ConfigError: A factor has more than one level: a path has one beginning.
    """
    many = [factor.name for factor in factors if len(factor.levels) > 1]
    if many:
        raise ConfigError(
            "a path leads from one setting to the baseline, so each factor has one level beside "
            f"the baseline's, but got more for {', '.join(many)}."
        )
    begin = _at(factors, frozenset())
    told = (
        "ablation path (Fawcett & Hoos 2016): from the start, at each step every remaining change "
        "towards the baseline is trained, and the one with the best mean accuracy is kept"
    )
    return extend_path(Design("path", tuple(factors), (begin,), construction=told), [])


def _at(factors: Sequence[Factor], taken: frozenset[str]) -> Cell:
    """Return the cell in which these factors have the baseline's level already."""
    labels = [f.baseline if f.name in taken else f.levels[0].label for f in factors]
    return _combined(factors, labels)


def extend_path(design: Design, chosen: Sequence[str]) -> Design:
    """Add the candidates of the step after the chosen changes, where there is one."""
    taken = frozenset(chosen)
    left = [factor.name for factor in design.factors if factor.name not in taken]
    cells = list(design.cells)
    for name in left:
        cell = _at(design.factors, taken | {name})
        if cell not in cells:
            cells.append(cell)
    return Design(design.kind, design.factors, tuple(cells), construction=design.construction)


def candidates(design: Design, chosen: Sequence[str]) -> dict[str, int]:
    """Map the changes that a path's next step may take to their cells' positions."""
    taken = frozenset(chosen)
    return {
        factor.name: design.cells.index(_at(design.factors, taken | {factor.name}))
        for factor in design.factors
        if factor.name not in taken
    }
