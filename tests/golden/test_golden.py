import json

import pytest

from golden.record import HERE, STUDIES, measure


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study_gives_the_recorded_figures(name: str) -> None:
    expected, found = json.loads((HERE / f"{name}.json").read_text()), measure(name)
    assert found.keys() == expected.keys()
    for trial, figures in expected.items():
        # Another CPU may round a loss or a setting otherwise, not turn an answer of the network.
        if "best" not in trial:
            figures["params"] = pytest.approx(figures["params"])
            figures["val_loss"] = pytest.approx(figures["val_loss"], rel=1e-4)
        assert found[trial] == figures, trial
