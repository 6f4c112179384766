import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrainConfig
from study.ablation.designs import DESIGNS, Cell, Design, Factorial, OneFactorAtATime, Path
from study.ablation.factors import Factor, make_factors, parse_factors
from study.config.errors import ConfigError
from study.config.search_space import apply_params

# Two levels each, the baseline's and another, of settings that break no rule together.
TWO = {
    "augment": "none",
    "schedule": "constant",
    "normalize": "none",
    "weights": "none",
    "head_init": "zero",
    "freeze_depth": 5,
    "weight_decay": 0.0,
}
BASE = TrainConfig()


def _factors(raw: dict[str, object]) -> list[Factor]:
    levels, wrong = parse_factors(raw)
    factors, faults = make_factors(BASE, levels)
    assert (wrong, faults) == ([], [])
    return factors


@given(
    st.sampled_from(list(DESIGNS)),
    st.lists(st.sampled_from(list(TWO)), unique=True, min_size=3, max_size=5),
)
def test_every_cell_of_every_design_is_allowed_and_no_two_train_the_same(
    kind: str, names: list[str]
) -> None:
    design = DESIGNS[kind](_factors({name: TWO[name] for name in names}))
    trained = [apply_params(BASE, cell.overrides) for cell in design.cells]
    assert len(set(trained)) == len(trained)
    for cell, config in zip(design.cells, trained, strict=True):
        changed = {name for name in names if getattr(config, name) != getattr(BASE, name)}
        assert changed == set(cell.levels)
    record = design.to_record()
    assert json.loads(json.dumps(record)) == record
    assert [cell["levels"] for cell in record["cells"]] == [cell.levels for cell in design.cells]


@pytest.mark.parametrize("kind", DESIGNS)
def test_designs_refuse_to_vary_nothing_and_never_combine_levels_of_one_key(kind: str) -> None:
    with pytest.raises(ConfigError, match="at least one factor.*--factor head_lr_mult=1,100"):
        DESIGNS[kind]([])
    plain = {"schedule": "constant", "augment": "trivial"}
    factors = _factors({"augment": "none", "weight_decay": 0.0, "recipe": {"plain": plain}})
    if not DESIGNS[kind].combines_factors:
        assert len(DESIGNS[kind](factors).cells) == 4
        return
    with pytest.raises(ConfigError, match="but augment and recipe both set augment"):
        DESIGNS[kind](factors)


def _run(
    design: Design, looks: Sequence[int], score: object = 0.5, decide: object = None
) -> list[tuple[str, int]]:
    """Run a design to its end; return the runs in order."""
    done: dict[str, dict[int, float | None]] = {}
    order = []
    for cell, replicate in design.missing(looks, lambda cell: done.get(cell.label, {}), decide):
        value = score(cell, replicate) if callable(score) else score
        done.setdefault(cell.label, {})[replicate] = value
        order.append((cell.label, replicate))
    return order


def test_an_adaptive_design_adds_replicates_to_the_open_cells_and_the_baseline() -> None:
    design = OneFactorAtATime(_factors({"freeze_depth": [3, 5]}))
    answers = iter([{2}, set[int]()])
    order = _run(design, [2, 3, 5], decide=lambda: next(answers))
    assert order[6:] == [("baseline", 2), ("freeze_depth = 5", 2)]
    assert list(answers) == []  # asked after 2 and 3 replicates, and not at the end
    assert len(_run(design, [2, 4], decide=lambda: {1})) == 6 + 2 * 2


def test_a_full_factorial_has_every_combination_once_and_the_baseline_first() -> None:
    recipe = {"a": {"momentum": 0.5}, "b": {"momentum": 0.0, "weight_decay": 0.0}}
    raw = {"freeze_depth": [3, 5], "augment": ["none"], "recipe": recipe}
    design = Factorial(_factors(raw))
    trained = [apply_params(BASE, cell.overrides) for cell in design.cells]
    assert trained[0] == BASE
    seen = [(t.freeze_depth, t.augment, t.momentum, t.weight_decay) for t in trained]
    assert sorted(seen) == sorted(
        (depth, augment, *both)
        for depth, augment, both in itertools.product(
            (0, 3, 5), ("standard", "none"), ((0.9, 0.05), (0.5, 0.05), (0.0, 0.0))
        )
    )
    for row, cell in zip(design.coded, design.cells, strict=True):
        for factor, code in zip(design.factors, row, strict=True):
            assert cell.levels.get(factor.name, factor.baseline) == factor.labels[code]


def test_factors_that_do_not_suit_a_design_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ablation.max_cells = 100 .*have 128.*--design ofat"):
        Factorial(_factors(TWO), max_cells=100)
    with pytest.raises(ConfigError, match="but got more for freeze_depth"):
        Path(_factors({"freeze_depth": [3, 5], "augment": "none"}))


def test_a_path_takes_the_change_with_the_best_mean_and_a_failed_one_last() -> None:
    design = Path(_factors({"augment": "none", "head_init": "zero", "flip": 0.0}))
    assert [set(cell.levels) for cell in design.cells] == [
        {"augment", "head_init", "flip"},
        {"head_init", "flip"},
        {"augment", "flip"},
        {"augment", "head_init"},
    ]
    # The replicates disagree about `flip`; its mean of 0.3 decides.
    gains = {"augment": (0.4, 0.4), "head_init": (0.2, 0.2), "flip": (0.6, 0.0)}

    def score(cell: Cell, replicate: int) -> float | None:
        if set(cell.levels) == {"head_init", "flip"} and replicate == 1:
            return None
        return sum(gain[replicate] for name, gain in gains.items() if name not in cell.levels)

    order = _run(design, [2], score)
    assert design.steps == ["flip", "augment", "head_init"]
    assert design.cells[-1] == Cell({}, {})
    assert len(order) == len(set(order)) == design.n_runs(2) == 14
