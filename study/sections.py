"""The sections of the configuration that belong to the study: [study] and [search]."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from core.config import setting
from study.space import RECIPES

Sampler = Literal["tpe", "random", "gp", "cmaes", "qmc", "grid", "bruteforce"]
Pruner = Literal["hyperband", "median", "percentile", "halving", "wilcoxon", "none"]
DesignKind = Literal["ofat", "loco", "factorial", "path", "screen"]
EXHAUSTIVE: tuple[Sampler, ...] = ("grid", "bruteforce")
"""Samplers that visit every setting of the space."""
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?B)?")
_SIZES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[hms])+")


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    if not _DURATION.fullmatch(value):
        raise ValueError('must be seconds or a text like "2h", "90m" or "1h30m"')
    parts = re.findall(r"([\d.]+)([hms])", value)
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if not found:
        raise ValueError('must be bytes or a text like "8GB" or "500MB"')
    return int(float(found[1]) * _SIZES[(found[2] or "").upper()])


def _study_name(value: object) -> object:
    if not (isinstance(value, str) and re.fullmatch(r"\w([\w .-]*\w)?", value)):
        raise ValueError(
            "must begin and end with a letter or digit, with . _ - or a space between"
        )
    return value


def _recipe_names(value: object) -> object:
    if isinstance(value, bool):
        return value
    if not isinstance(value, list | tuple) or not all(name in list(RECIPES) for name in value):
        raise ValueError(f"must be true, false or a list of {', '.join(RECIPES)}")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class StudySection:
    """What the study is called, where it is kept, and when it is done."""

    name: Annotated[str, BeforeValidator(_study_name)] = setting(
        "", "Name of the study; leave out for the name of the data folder."
    )
    storage: str = setting(
        "studies.db", "Database of all studies: a file, or an SQLAlchemy URL (postgresql://...)."
    )
    output: str = setting("frostline-runs", "Folder of checkpoints and reports.")
    trials: int = setting(20, "Finished trials that the study shall have in total.", ge=1)
    timeout: Annotated[
        float | None, BeforeValidator(_seconds, json_schema_input_type=float | str | None)
    ] = setting(
        None,
        'No trial begins after this time of one run, in seconds or as "2h" or "90m"; leave out '
        "for none.",
        gt=0,
    )
    patience: int | None = setting(
        None,
        "Stop when this many finished trials in a row were no better; leave out for never.",
        ge=1,
    )
    keep_checkpoints: int = setting(
        3, "Checkpoints that stay on disk: those of the best trials.", ge=1
    )
    seed: int = setting(0, "Seed of the sampler. (That of training is train.seed.)", ge=0)
    cache: Annotated[
        int | None, BeforeValidator(_bytes, json_schema_input_type=int | str | None)
    ] = setting(
        None,
        "Most bytes for work that trials share (augmented pixels, frozen layers), in memory and "
        'on disk together, as "8GB"; 0 shares nothing; leave out for a quarter of the memory that '
        "is free, and as much again (at most a tenth of what is free) on disk. It changes no "
        "number.",
        ge=0,
    )


@dataclass(frozen=True, slots=True)
class SearchSection:
    """How settings are proposed, and how hopeless trials are stopped."""

    sampler: Sampler = setting(
        "tpe",
        "Proposes settings: tpe, random, gp, cmaes, qmc, grid or bruteforce.",
    )
    pruner: Pruner = setting(
        "hyperband",
        "Stops hopeless trials early: hyperband, median, percentile, halving, wilcoxon or none.",
    )
    recipes: Annotated[
        bool | tuple[str, ...],
        BeforeValidator(_recipe_names, json_schema_input_type=bool | list[str]),
    ] = setting(
        True,
        "Known settings to try first: true (all; none under grid and bruteforce), false, or "
        f"a list of {', '.join(RECIPES)}.",
    )

    @property
    def recipe_names(self) -> tuple[str, ...]:
        """List the recipes to try first: none where the sampler visits every setting anyway."""
        if self.recipes is False or self.sampler in EXHAUSTIVE:
            return ()
        if self.recipes is True:
            return tuple(RECIPES)
        return self.recipes


@dataclass(frozen=True, slots=True)
class AblationSection:
    """What `study ablate` varies about a baseline, how often, and how it judges."""

    design: DesignKind = setting(
        "ofat",
        "Which settings are run: ofat (one factor at a time), loco (each component of the "
        "baseline removed), factorial (all combinations, or a stated fraction), path (from one "
        "setting to another, the best change first), screen (many factors in few runs).",
    )
    replicates: int = setting(
        5,
        "Runs of every setting, with seeds paired over the settings; with adaptive, those of the "
        "first look.",
        ge=1,
    )
    resplit: bool = setting(
        False, "Draw a new training and validation split for every replicate too."
    )
    adaptive: bool = setting(
        False,
        "Add replicates where the question is still open, up to max_replicates; the error that "
        "looking often would add is paid for.",
    )
    max_replicates: int = setting(20, "With adaptive: most replicates of a setting.", ge=2)
    alpha: float = setting(0.05, "Family-wise error that Holm's correction holds.", gt=0, lt=1)
    margin: float = setting(
        1.0,
        "Accuracy points below which a difference does not matter: two settings are told equal "
        "where the difference is shown to be smaller.",
        gt=0,
        le=100,
    )
    max_cells: int = setting(
        64, "Most settings of a factorial; a larger one is cut to a fraction.", ge=2
    )
    resolution: int | None = setting(
        None,
        "Resolution of a fractional factorial (3, 4 or 5); leave out for the highest that fits.",
        ge=3,
    )
    keep_checkpoints: bool = setting(
        True, "Keep every run's weights, so that chosen settings can be tested later."
    )
    factors: dict[str, Any] | None = setting(
        None,
        "What is varied: a training key with a list of values, or a name with a table of levels, "
        "each a table of training keys. Leave out for a set proposed for the baseline.",
    )
