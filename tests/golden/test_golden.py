import pytest

from golden.record import STUDIES, flat, measure, recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study_gives_the_recorded_figures(name: str) -> None:
    expected, found = flat(recorded(name)), flat(measure(name))
    assert found.keys() == expected.keys()
    wrong = {}
    for where, value in expected.items():
        # Another CPU may round a loss otherwise, not turn an answer of the network.
        may_round = isinstance(value, float) and ("val_loss" in where or "params" in where)
        if found[where] != (pytest.approx(value, rel=1e-4) if may_round else value):
            wrong[where] = (value, found[where])
    assert wrong == {}
