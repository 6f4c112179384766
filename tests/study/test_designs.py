import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrainConfig
from study.config.errors import ConfigError
from study.config.search_space import apply_params
from study.config.study_config import AblationSection
from study.designs import Design, candidates, extend_path, make_design
from study.factors import Factor, against, parse_factors

# Two levels each, the baseline's and another, of settings that break no rule together.
TWO = {
    "augment": "none",
    "schedule": "constant",
    "normalize": "none",
    "weights": "none",
    "head_init": "zero",
    "freeze_depth": 5,
    "weight_decay": 0.0,
    "label_smoothing": 0.1,
    "head_lr_mult": 1.0,
    "decay_all": True,
    "flip": 0.0,
}
BASE = TrainConfig()


def _factors(raw: dict[str, object], baseline: TrainConfig = BASE) -> list[Factor]:
    levels, wrong = parse_factors(raw)
    factors, faults = against(baseline, levels)
    assert (wrong, faults) == ([], [])
    return factors


def _two(n: int) -> list[Factor]:
    return _factors(dict(list(TWO.items())[:n]))


def _design(kind: str, factors: Sequence[Factor], **settings: object) -> Design:
    return make_design(factors, AblationSection(design=kind, **settings))


def _told(kind: str, factors: Sequence[Factor], **settings: object) -> str:
    with pytest.raises(ConfigError) as told:
        _design(kind, factors, **settings)
    return str(told.value)


def _signs(design: Design) -> np.ndarray:
    """Read the coded design off its cells' levels: -1 the baseline's, 1 the other; (cells, k)."""
    return np.array(
        [[1 if f.name in cell.levels else -1 for f in design.factors] for cell in design.cells]
    )


@pytest.mark.parametrize("kind", ["ofat", "loco"])
def test_one_at_a_time_is_the_baseline_and_each_level_alone(kind: str) -> None:
    design = _design(kind, _factors({"freeze_depth": [0, 3, 5], "augment": "none"}))
    assert [(cell.label, cell.levels, cell.overrides) for cell in design.cells] == [
        ("baseline", {}, {}),
        ("freeze_depth = 3", {"freeze_depth": "3"}, {"freeze_depth": 3}),
        ("freeze_depth = 5", {"freeze_depth": "5"}, {"freeze_depth": 5}),
        ("augment = none", {"augment": "none"}, {"augment": "none"}),
    ]


def test_an_ablation_without_factors_is_told_how_to_name_some() -> None:
    told = _told("ofat", [])
    assert "needs at least one factor" in told
    assert "--factor head_lr_mult=1,100" in told


def test_a_full_factorial_has_every_combination_once_and_the_baseline_first() -> None:
    raw = {
        "freeze_depth": [3, 5],
        "augment": ["none"],
        "recipe": {"a": {"momentum": 0.5}, "b": {"momentum": 0.0, "weight_decay": 0.0}},
    }
    design = _design("factorial", _factors(raw))
    assert len(design.cells) == 3 * 2 * 3
    trained = [apply_params(BASE, cell.overrides) for cell in design.cells]
    assert len(set(trained)) == 18
    assert design.cells[0].levels == {}
    assert trained[0] == BASE
    assert design.resolution is None
    assert design.aliasing == ()
    assert "full factorial, 18 combinations" in design.construction
    seen = {(t.freeze_depth, t.augment, t.momentum, t.weight_decay) for t in trained}
    assert seen == set(
        (d, a, *m)
        for d, a, m in itertools.product(
            (0, 3, 5), ("standard", "none"), ((0.9, 1e-4), (0.5, 1e-4), (0.0, 0.0))
        )
    )


def test_coded_values_of_a_factorial_are_the_positions_of_the_cells_levels() -> None:
    design = _design("factorial", _factors({"freeze_depth": [3, 5], "augment": ["none"]}))
    for row, cell in zip(design.coded, design.cells, strict=True):
        for factor, code in zip(design.factors, row, strict=True):
            labels = [factor.baseline, *(level.label for level in factor.levels)]
            assert cell.levels.get(factor.name, factor.baseline) == labels[code]


def _aliases(signs: np.ndarray, names: Sequence[str]) -> set[frozenset[str]]:
    """Multiply columns: equal products of one or two factors cannot be told apart."""
    n = len(names)
    groups: dict[tuple[int, ...], set[str]] = {}
    for some in [*itertools.combinations(range(n), 1), *itertools.combinations(range(n), 2)]:
        product = signs[:, list(some)].prod(axis=1)
        if product[0] < 0:  # a negative alias is one too
            product = -product
        label = " × ".join(names[k] for k in some)
        groups.setdefault(tuple(product.tolist()), set()).add(label)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def _resolution(signs: np.ndarray) -> int:
    """Return the fewest factors whose product is the same in every cell."""
    n = signs.shape[1]
    for length in range(1, n + 1):
        for some in itertools.combinations(range(n), length):
            if len(set(signs[:, list(some)].prod(axis=1).tolist())) == 1:
                return length
    raise AssertionError("a full design")


@pytest.mark.parametrize(
    ("n", "settings", "size", "resolution", "name"),
    [
        (5, {"max_cells": 16}, 16, 5, "2^(5-1)"),
        (7, {"max_cells": 8}, 8, 3, "2^(7-4)"),
        (7, {"max_cells": 16}, 16, 4, "2^(7-3)"),
        (8, {"max_cells": 64}, 64, 5, "2^(8-2)"),
        (7, {"resolution": 3}, 8, 3, "2^(7-4)"),
        (4, {"resolution": 4}, 8, 4, "2^(4-1)"),
        (11, {"max_cells": 16}, 16, 3, "2^(11-7)"),
    ],
)
def test_a_fraction_is_of_the_size_and_resolution_that_it_states(
    n: int, settings: dict[str, object], size: int, resolution: int, name: str
) -> None:
    design = _design("factorial", _two(n), **settings)
    signs = _signs(design)
    assert len(design.cells) == size
    assert len({tuple(row) for row in signs.tolist()}) == size
    assert design.resolution == resolution == _resolution(signs)
    assert f"{name} fractional factorial of resolution {resolution}" in design.construction
    assert f"{size} of {2**n} combinations" in design.construction
    assert np.array_equal(signs.T @ signs, size * np.eye(n))
    assert np.array_equal(np.array(design.coded) * 2 - 1, signs)


@pytest.mark.parametrize(("n", "size"), [(5, 16), (7, 8), (7, 16), (6, 8)])
def test_aliasing_says_exactly_which_columns_are_equal(n: int, size: int) -> None:
    design = _design("factorial", _two(n), max_cells=size)
    told = {frozenset(line.split(" = ")) for line in design.aliasing}
    assert told == _aliases(_signs(design), [factor.name for factor in design.factors])
    assert (len(told) > 0) == (design.resolution != 5)


def test_a_fraction_is_taken_only_where_the_full_design_is_too_large() -> None:
    assert _design("factorial", _two(6)).resolution is None
    assert len(_design("factorial", _two(6)).cells) == 64
    assert _design("factorial", _two(7)).resolution == 5


def test_a_fraction_of_factors_with_more_levels_is_refused_with_remedies() -> None:
    told = _told(
        "factorial", _factors({"freeze_depth": [1, 2, 3], "augment": "none"}), max_cells=7
    )
    assert "needs two levels per factor, but freeze_depth has more" in told
    assert "8 combinations (ablation.max_cells is 7)" in told
    assert "--set ablation.max_cells" in told
    assert "freeze_depth has more" in _told(
        "factorial", _factors({"freeze_depth": [1, 2], "augment": "none"}), resolution=3
    )


def test_a_fraction_that_does_not_fit_is_refused_with_remedies() -> None:
    for settings in ({"max_cells": 4}, {"resolution": 8}):
        told = _told("factorial", _two(7), **settings)
        assert "a fraction of 7 two-level factors needs more than" in told
        assert "--design screen" in told


@pytest.mark.parametrize("kind", ["factorial", "screen", "path"])
def test_factors_that_set_the_same_key_are_refused(kind: str) -> None:
    raw = {
        "augment": "none",
        "weight_decay": 0.0,
        "recipe": {"plain": {"schedule": "constant", "augment": "trivial"}},
    }
    told = _told(kind, _factors(raw))
    assert "must not share a setting, but augment and recipe both set augment" in told
    assert "--design ofat" in told
    assert len(_design("ofat", _factors(raw)).cells) == 4


@pytest.mark.parametrize("n", [3, 5, 7, 8, 11])
def test_plackett_burman_has_orthogonal_main_effects(n: int) -> None:
    design = _design("screen", _two(n))
    signs = _signs(design)
    size = len(design.cells)
    assert size == 4 * (n // 4 + 1)
    assert np.array_equal(np.array(design.coded), signs)
    assert np.array_equal(signs.T @ signs, size * np.eye(n))
    assert not signs.sum(axis=0).any()
    assert len({tuple(row) for row in signs.tolist()}) == size
    assert "Plackett-Burman" in design.construction


THREE = {
    "base_lr": [0.1, 0.001],
    "head_lr_mult": [1.0, 100.0],
    "weight_decay": [0.0, 0.01],
    "momentum": [0.5, 0.95],
    "freeze_depth": [0, 5],
    "flip": [0.0, 1.0],
}
MIDDLE = dataclasses.replace(BASE, freeze_depth=3)


def _values(design: Design, baseline: TrainConfig) -> list[list[float]]:
    """Return what every cell trains with, (cells, factors)."""
    trained = [apply_params(baseline, cell.overrides) for cell in design.cells]
    return [[float(getattr(t, f.name)) for f in design.factors] for t in trained]


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_definitive_screening_has_main_effects_free_of_each_other_squares_and_interactions(
    n: int,
) -> None:
    design = _design("screen", _factors(dict(list(THREE.items())[:n]), MIDDLE))
    coded = np.array(design.coded)
    assert len(design.cells) == 2 * (n + n % 2) + 1
    gram = coded.T @ coded
    assert np.array_equal(gram, np.diag(np.diag(gram)))
    for a, b in itertools.combinations_with_replacement(range(n), 2):
        assert not (coded.T @ (coded[:, a] * coded[:, b])).any()
    assert "definitive screening" in design.construction
    assert {} in [cell.levels for cell in design.cells]


@pytest.mark.parametrize("names", [list(THREE), [*list(THREE)[:3], "augment", "schedule"]])
def test_coded_values_of_a_definitive_screening_agree_with_what_is_trained(
    names: list[str],
) -> None:
    raw: dict[str, object] = {key: THREE.get(key, TWO.get(key)) for key in names}
    design = _design("screen", _factors(raw, MIDDLE))
    trained = [apply_params(MIDDLE, cell.overrides) for cell in design.cells]
    for row, config in zip(design.coded, trained, strict=True):
        for factor, code in zip(design.factors, row, strict=True):
            if factor.name in THREE:
                low, high = sorted(THREE[factor.name])
                middle = getattr(MIDDLE, factor.name)
                expected = {-1: low, 0: middle, 1: high}[code]
            else:
                expected = {-1: getattr(MIDDLE, factor.name), 1: TWO[factor.name]}[code]
            assert getattr(config, factor.name) == expected
    columns = np.column_stack([np.ones(len(trained)), np.array(design.coded)])
    assert np.linalg.matrix_rank(columns) == len(names) + 1


def test_screening_needs_three_factors() -> None:
    told = _told("screen", _two(2))
    assert "at least three factors, but got 2" in told
    assert "--design factorial" in told


@pytest.mark.parametrize(
    "levels",
    [
        {"freeze_depth": [1, 2, 3]},
        {"freeze_depth": [3, 5]},  # both above the baseline's
        {"augment": ["none", "trivial"]},  # no numbers
        {"recipe": {"a": {"epochs": 2}, "b": {"epochs": 20}}},
    ],
)
def test_screening_takes_one_level_or_one_on_each_side(levels: dict[str, object]) -> None:
    rest: dict[str, object] = {"head_init": "zero", "schedule": "constant", "flip": 0.0}
    told = _told("screen", _factors({**rest, **levels}))
    assert f"this does not hold for {next(iter(levels))}." in told
    assert "--design ofat" in told


def test_a_path_begins_at_the_other_levels_with_one_candidate_for_each_change() -> None:
    design = _design("path", _two(3))
    names = [factor.name for factor in design.factors]
    assert [set(cell.levels) for cell in design.cells] == [
        set(names),
        set(names) - {"augment"},
        set(names) - {"schedule"},
        set(names) - {"normalize"},
    ]
    assert candidates(design, []) == {"augment": 1, "schedule": 2, "normalize": 3}


def test_a_path_is_extended_by_what_is_left_to_change() -> None:
    design = _design("path", _two(3))
    second = extend_path(design, ["schedule"])
    assert second.cells[:4] == design.cells
    steps = candidates(second, ["schedule"])
    assert set(steps) == {"augment", "normalize"}
    assert set(second.cells[steps["augment"]].levels) == {"normalize"}
    assert set(second.cells[steps["normalize"]].levels) == {"augment"}
    assert extend_path(second, ["schedule"]) == second
    third = extend_path(second, ["schedule", "augment"])
    (last,) = candidates(third, ["schedule", "augment"]).values()
    assert third.cells[last].overrides == {}
    assert len(third.cells) == 1 + 3 + 2 + 1
    assert candidates(third, ["schedule", "augment", "normalize"]) == {}


def test_a_path_from_several_levels_is_refused() -> None:
    told = _told("path", _factors({"freeze_depth": [3, 5], "augment": "none"}))
    assert "each factor has one level beside the baseline's, but got more for freeze_depth" in told


@pytest.mark.parametrize(
    ("kind", "factors", "settings"),
    [
        ("ofat", _factors({"clip_norm": [1.0, 2.0], "r": {"x": {"augment": "none"}}}), {}),
        ("loco", _two(3), {}),
        ("factorial", _factors({"freeze_depth": [3, 5], "augment": "none"}), {}),
        ("factorial", _two(5), {"max_cells": 16}),
        ("screen", _two(4), {}),
        ("screen", _factors({**dict(list(THREE.items())[:3]), "flip": 0.0}, MIDDLE), {}),
        ("path", _two(3), {}),
    ],
)
def test_a_design_survives_its_record_as_json(
    kind: str, factors: list[Factor], settings: dict[str, object]
) -> None:
    design = _design(kind, factors, **settings)
    assert Design.from_record(json.loads(json.dumps(design.to_record()))) == design


@given(
    st.sampled_from(["ofat", "loco", "factorial", "screen", "path"]),
    st.lists(st.sampled_from(list(TWO)), unique=True, min_size=3),
)
def test_every_cell_of_every_design_is_allowed_and_no_two_train_the_same(
    kind: str, names: list[str]
) -> None:
    design = _design(kind, _factors({name: TWO[name] for name in names}))
    trained = [apply_params(BASE, cell.overrides) for cell in design.cells]
    assert len(set(trained)) == len(trained)
    for cell, config in zip(design.cells, trained, strict=True):
        changed = {name for name in names if getattr(config, name) != getattr(BASE, name)}
        assert changed == set(cell.levels)
