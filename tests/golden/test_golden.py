import pytest

from golden.record import STUDIES, differences, is_near, measure, recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study_gives_the_recorded_figures(name: str) -> None:
    expected, found = recorded(name), measure(name)
    assert found.keys() == expected.keys()
    wrong = []
    for file in expected:
        for where, before, now in differences(expected[file], found[file]):
            # Another CPU may round a loss otherwise, not turn an answer of the network.
            may_round = "val_loss" in where or "params" in where
            if not (may_round and is_near(before, now, relative=1e-4)):
                wrong.append(f"{file}: {where}: {before} -> {now}")
    assert wrong == []


def test_differences_names_each_figure_that_changed() -> None:
    old = {"trial 0": {"state": "pruned", "val_loss": [1.0, 2.0]}}
    new = {"trial 0": {"state": "complete", "val_loss": [1.0, 2.5]}}
    assert differences(old, old) == []
    assert differences(old, new) == [
        ("trial 0, state", "pruned", "complete"),
        ("trial 0, val_loss[1]", 2.0, 2.5),
    ]
